"""A temporary Deployment on which settings are measured. It is always deleted at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tidegate.cli.api import Control, Doc, Service, part
from tidegate.cli.interrupts import interrupted_by_signals, interrupts_ignored
from tidegate.cli.output import say
from tidegate.cli.progress import Steps
from tidegate.cli.publish import STALE_S, answers, judge, status_of
from tidegate.kernel.errors import Conflict, DeadlinePassed, ModelFailed, NotFound, TidegateError, Unavailable
from tidegate.tune.grid import BatchSetting

SUFFIX = "-tune"
POLL_S = 0.25
# Seconds that the autoscaler and the router may need, in addition to the Deployment's start and drain limits.
PATIENCE_S = 30.0
REMOVAL_TRIES = 5
REMOVAL_PAUSE_S = 1.0
# Fields that are copied from the source Deployment. Its bounds, and the number of replicas that an operator
# set (`override`), are not copied, because the temporary Deployment always has one replica.
_TAKEN_OVER = (
    "model",
    "version",
    "threads",
    "instances",
    "env",
    "batching",
    "retry",
    "max_concurrency",
    "start_timeout_s",
    "drain_limit_s",
    "llm",
    "unverified",
)


def name_for(model: str) -> str:
    """Return the name of the temporary Deployment and Endpoint."""
    return model[: 63 - len(SUFFIX)].rstrip("-.") + SUFFIX


class TemporaryDeployment:
    """A Deployment with one replica like those of ``source``, and an Endpoint only for this Deployment."""

    def __init__(self, control: Control, source: Doc, steps: Steps) -> None:
        self.name = name_for(str(source["model"]))
        self._control = control
        self._source = source
        self._steps = steps
        self._setting: BatchSetting | None = None
        self._replicas: set[str] = set()
        self.replica: Doc = {}

    @contextmanager
    def running(self, setting: BatchSetting | None) -> Iterator[TemporaryDeployment]:
        """Run the ``with`` block with a ready replica.

        ``setting``: the batching of the replica; None: the batching of the source Deployment.

        Delete the Deployment and the Endpoint afterwards, also after an error, Ctrl-C or SIGTERM.
        """
        paths = [f"/v1/{kind}/{part(self.name)}" for kind in ("deployments", "endpoints")]
        self._check_free(paths)
        with interrupted_by_signals():
            try:
                self._create(paths, setting)
                yield self
            finally:
                with interrupts_ignored():
                    self._remove(paths)

    def use(self, setting: BatchSetting) -> None:
        """Change the batching.

        Wait until a replica with the new batching is ready and all other replicas have ended.
        """
        if setting == self._setting:
            return
        path = f"/v1/deployments/{part(self.name)}"
        self._control.registry.patch(path, {"batching": setting.to_json()})
        self._setting = setting
        self._wait()

    def signature(self) -> Doc | None:
        """Return the signature that the model server reports; None if it reports none."""
        found: Doc | None = self.replica.get("signature")
        return found

    def _check_free(self, paths: list[str]) -> None:
        there = [path for path in paths if _is_there(self._control.registry, path)]
        if there:
            kinds = " and ".join(path.split("/")[2].removesuffix("s") for path in there)
            raise Conflict(
                f"A {kinds} {self.name} exists already: another `tidegate tune` of this model runs, or was "
                f"killed. If it was killed, remove what it left: {_by_hand(there, self.name)}"
            )

    def _create(self, paths: list[str], setting: BatchSetting | None) -> None:
        wanted = {key: self._source[key] for key in _TAKEN_OVER if key in self._source}
        if setting is not None:
            wanted["batching"] = setting.to_json()
        wanted |= {"min_replicas": 1, "max_replicas": 1}
        self._steps.change(self.name, "starting", "a temporary replica")
        self._control.registry.put(paths[0], wanted)
        self._control.registry.put(paths[1], {"targets": [{"deployment": self.name}]})
        self._setting = setting
        self._wait()

    def _wait(self) -> None:
        """Wait until all earlier replicas have ended, and one new replica is ready and accepts calls."""
        began, wall = time.monotonic(), time.time()
        limit_s = (
            float(self._source.get("start_timeout_s", 120.0))
            + float(self._source.get("drain_limit_s", 60.0))
            + PATIENCE_S
        )

        def fresh(at: float) -> bool:
            return at >= wall or time.monotonic() - began > STALE_S

        while True:
            status = status_of(self._control, self.name)
            look = judge(0, status, {"previous": []}, fresh)
            if look.state == "failed":
                raise ModelFailed(f"{self.name} did not load: {look.text}")
            found = self._only_new(status)
            if found is not None and answers(self._control, self.name):
                self.replica = found
                self._replicas.add(found["replica"])
                self._steps.change(self.name, "ready", f"{self._setting or 'with the deployed batching'}")
                return
            text = "the replica with the new setting is starting" if look.state == "ready" else look.text
            self._steps.change(self.name, "starting", text)
            if time.monotonic() - began > limit_s:
                raise DeadlinePassed(f"{self.name} is not ready after {limit_s:g} s: {look.text}.")
            time.sleep(POLL_S)

    def _only_new(self, status: Doc | None) -> Doc | None:
        replicas: list[Doc] = status["replicas"] if status else []
        if len(replicas) != 1 or replicas[0]["state"] != "ready" or replicas[0]["replica"] in self._replicas:
            return None
        return replicas[0]

    def _remove(self, paths: list[str]) -> None:
        """Delete the Endpoint, then the Deployment: a Deployment in use cannot be deleted."""
        self._steps.change(self.name, "stopping", "removing it")
        left = []
        for path in reversed(paths):
            try:
                _delete(self._control.registry, path)
            except TidegateError as error:
                left.append(path)
                say(f"{self.name} could not be removed: {error.message}", style="red")
        if left:
            say(f"It still exists. Remove it with: {_by_hand(left, self.name)}", style="red")
        self._steps.change(self.name, "failed" if left else "done", "" if left else "removed")


def _is_there(registry: Service, path: str) -> bool:
    try:
        registry.get(path)
    except NotFound:
        return False
    return True


def _delete(registry: Service, path: str) -> None:
    """Delete an object. Retry if the registry does not answer. A missing object is not an error."""
    for left in reversed(range(REMOVAL_TRIES)):
        try:
            registry.delete(path)
            return
        except NotFound:
            return
        except (Unavailable, DeadlinePassed):
            if not left:
                raise
            time.sleep(REMOVAL_PAUSE_S)


def _by_hand(paths: list[str], name: str) -> str:
    kinds = {path.split("/")[2].removesuffix("s") for path in paths}
    ordered = [kind for kind in ("endpoint", "deployment") if kind in kinds]
    return " && ".join(f"tidegate delete {name} --{kind} --yes" for kind in ordered)
