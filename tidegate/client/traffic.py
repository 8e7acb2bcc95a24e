"""Run rollouts, shadows and experiments through a gateway, for both clients.

The calls use the APIs of the registry and the router. `docs/access.md` lists the scopes that the caller's key
needs for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import orjson

from tidegate.client.calls import Call
from tidegate.client.core import Core
from tidegate.client.flow import Flow, Sleep
from tidegate.client.jobs import Document, document_of
from tidegate.kernel.errors import DeadlinePassed

ENDED = frozenset({"promoted", "rolled_back", "aborted"})
POLL_S = 1.0
To = int | str


@dataclass(frozen=True, slots=True)
class TrafficFlows:
    """The flows that change or read an endpoint's traffic.

    Each returns a document of the registry or the router.
    """

    core: Core

    def start(self, endpoint: str, to: To, swap: bool, options: Document) -> Flow[Document]:
        """Start a canary, and return the endpoint."""
        canary: Document = {"version": to} if isinstance(to, int) else {"deployment": to}
        body = {**canary, "options": options, **({"swap": True} if swap else {})}
        return (yield from self._change(endpoint, "rollout", body))

    def change(self, endpoint: str, what: str) -> Flow[Document]:
        """Promote, pause or resume a canary, and return the endpoint."""
        return (yield from self._change(endpoint, f"rollout/{what}", {}))

    def rollback(self, endpoint: str, version: int | None) -> Flow[Document]:
        """Go back to an earlier version, or end what is in progress. Return the endpoint.

        ``version``: the version to go back to. None: see :meth:`TrafficCalls.rollback`.
        """
        body: Document = {} if version is None else {"version": version}
        return (yield from self._change(endpoint, "rollback", body))

    def rollout(self, endpoint: str) -> Flow[Document]:
        """Return an endpoint's rollout, with the router's evidence.

        The rollout comes from the registry. If the router's evidence is about another rollout, leave it out.
        """
        stored = yield from self._read(f"/api/registry/v1/endpoints/{_part(endpoint)}")
        shown = yield from self._read(f"/api/router/v1/rollouts/{_part(endpoint)}")
        rollout, known = stored["rollout"], shown.get("rollout")
        if rollout is not None and (known is None or known["id"] != rollout["id"]):
            shown = {"endpoint": endpoint}
        return {**shown, "rollout": rollout}

    def wait(self, endpoint: str, timeout_s: float | None) -> Flow[Document]:
        """Wait until the endpoint's rollout has ended, and return it.

        Raise DeadlinePassed after ``timeout_s`` seconds (None: no limit).
        """
        clock = self.core.caller.clock
        deadline = None if timeout_s is None else clock() + timeout_s
        while True:
            found = yield from self.rollout(endpoint)
            if found["rollout"] is None or found["rollout"]["phase"] in ENDED:
                return found
            if deadline is not None and clock() >= deadline:
                reason = found["rollout"]["reason"]
                raise DeadlinePassed(
                    f"The rollout of {endpoint} has not ended after {timeout_s:g} s: {reason}",
                    reason="not_over",
                )
            yield Sleep(POLL_S)

    def start_shadow(self, endpoint: str, to: To, options: Document) -> Flow[Document]:
        """Start shadow traffic, and return the endpoint."""
        target: Document = {"version": to} if isinstance(to, int) else {"deployment": to}
        return (yield from self._change(endpoint, "shadow", {**target, **options}, "PUT"))

    def stop_shadow(self, endpoint: str) -> Flow[Document]:
        """End shadow traffic, and return the endpoint."""
        return (yield from self._change(endpoint, "shadow", {}, "DELETE"))

    def shadow(self, endpoint: str) -> Flow[Document]:
        """Return an endpoint's shadow, with the router's report.

        The shadow comes from the registry. If the router's report is about another shadow, leave it out.
        """
        stored = yield from self._read(f"/api/registry/v1/endpoints/{_part(endpoint)}")
        shown = yield from self._read(f"/api/router/v1/shadows/{_part(endpoint)}")
        shadow, known = stored["shadow"], shown["shadow"]
        if shadow is not None and (known is None or known["id"] != shadow["id"]):
            shown = {"endpoint": endpoint, "problem": "", "report": None}
        return {**shown, "shadow": shadow}

    def start_experiment(self, endpoint: str, to: Sequence[To], options: Document) -> Flow[Document]:
        """Start an experiment, and return the endpoint."""
        versions = [each for each in to if isinstance(each, int)]
        deployments = [each for each in to if isinstance(each, str)]
        body: Document = {"versions": versions, "deployments": deployments, "options": options}
        return (yield from self._change(endpoint, "experiment", body))

    def end_experiment(self, endpoint: str, winner: str | None) -> Flow[Document]:
        """Stop an experiment, or send all traffic to ``winner`` if it is given. Return the endpoint."""
        if winner is None:
            return (yield from self._change(endpoint, "experiment/stop", {}))
        return (yield from self._change(endpoint, "experiment/winner", {"deployment": winner}))

    def experiment(self, endpoint: str) -> Flow[Document]:
        """Return an endpoint's experiment, with the router's report.

        The experiment comes from the registry. If the router's report is about another experiment, leave it
        out.
        """
        stored = yield from self._read(f"/api/registry/v1/endpoints/{_part(endpoint)}")
        shown = yield from self._read(f"/api/router/v1/experiments/{_part(endpoint)}")
        experiment, known = stored["experiment"], shown["experiment"]
        if experiment is not None and (known is None or known["id"] != experiment["id"]):
            shown = {"endpoint": endpoint, "variants": [], "metrics": [], "points": []}
        return {**shown, "experiment": experiment}

    def _change(self, endpoint: str, what: str, body: Document, method: str = "POST") -> Flow[Document]:
        path = f"/api/registry/v1/endpoints/{_part(endpoint)}/{what}"
        headers = {"Content-Type": "application/json"}
        timeout_s = self.core.timeout_s
        content = orjson.dumps(body)
        answer = yield from self.core.caller.call(
            method, path, timeout_s=timeout_s, headers=headers, content=content, repeatable=False
        )
        return document_of(answer)

    def _read(self, path: str) -> Flow[Document]:
        return document_of((yield from self.core.call("GET", path, None)))


def _part(name: str) -> str:
    return quote(name, safe="")


class TrafficCalls:
    """The calls for rollouts, shadow traffic and experiments, for both clients. See `docs/canaries.md`."""

    _traffic: TrafficFlows

    @Call
    def start_rollout(
        self, /, endpoint: str, to: To, *, swap: bool = False, **options: Any
    ) -> Flow[Document]:
        """Start a canary and return the endpoint. ``to``: a version's number, or a deployment's name.

        ``options`` are those of ``CanaryOptions``, such as ``steps``, ``hold_s`` and ``min_samples``.
        With ``swap``, replace the present version immediately, without a canary. Raise Conflict while
        another rollout is in progress.
        """
        return self._traffic.start(endpoint, to, swap, options)

    @Call
    def rollout(self, endpoint: str) -> Flow[Document]:
        """Return an endpoint's ``rollout`` (None if it never had one), with the router's evidence.

        ``evidence``: the evidence by metric. ``missing``: the evidence that the next step still needs.
        ``points``: the points for a chart.
        """
        return self._traffic.rollout(endpoint)

    @Call
    def wait_rollout(self, endpoint: str, timeout_s: float | None = None) -> Flow[Document]:
        """Wait until the endpoint's rollout has ended, and return it.

        Raise DeadlinePassed after ``timeout_s`` seconds (None: no limit).
        """
        return self._traffic.wait(endpoint, timeout_s)

    @Call
    def promote(self, endpoint: str) -> Flow[Document]:
        """Send all traffic to the canary without waiting for evidence. Return the endpoint."""
        return self._traffic.change(endpoint, "promote")

    @Call
    def pause_rollout(self, endpoint: str) -> Flow[Document]:
        """Pause a canary, so that its share stays the same. Return the endpoint."""
        return self._traffic.change(endpoint, "pause")

    @Call
    def resume_rollout(self, endpoint: str) -> Flow[Document]:
        """Continue a paused canary. Return the endpoint."""
        return self._traffic.change(endpoint, "resume")

    @Call
    def rollback(self, endpoint: str, version: int | None = None) -> Flow[Document]:
        """Go back to an earlier version, or end what is in progress.

        With ``version``, go back to this version. Without ``version``, end the roll-over, the canary or the
        experiment that is in progress. If none of them is in progress, go back to the version before the
        present one.
        """
        return self._traffic.rollback(endpoint, version)

    @Call
    def start_shadow(self, /, endpoint: str, to: To, **options: Any) -> Flow[Document]:
        """Copy answered requests to a version or a deployment, and compare the answers.

        Return the endpoint.

        ``options``: ``rate`` (percent), ``max_per_s``, ``tolerance`` (a dict of ``rtol`` and ``atol``),
        ``wake`` (True: copies may start a replica) and ``until``. ``until`` is the time at which the shadow
        ends, as an ISO 8601 text with a time zone.
        """
        return self._traffic.start_shadow(endpoint, to, options)

    @Call
    def shadow(self, endpoint: str) -> Flow[Document]:
        """Return an endpoint's ``shadow`` (None: no shadow now) and its ``report`` (None: no counts yet)."""
        return self._traffic.shadow(endpoint)

    @Call
    def stop_shadow(self, endpoint: str) -> Flow[Document]:
        """End shadow traffic. Return the endpoint."""
        return self._traffic.stop_shadow(endpoint)

    @Call
    def start_experiment(self, /, endpoint: str, *to: To, **options: Any) -> Flow[Document]:
        """Start an experiment: compare one or more versions with the present version, by callers' feedback.

        Return the endpoint.

        ``to``: the numbers of versions, or the names of deployments. ``options`` are those of
        ``ExperimentOptions``: ``share``, ``metrics``, ``sticky``, ``samples`` and others. Raise Conflict
        while a rollout or an experiment is in progress.
        """
        return self._traffic.start_experiment(endpoint, to, options)

    @Call
    def experiment(self, endpoint: str) -> Flow[Document]:
        """Return an endpoint's ``experiment``, its ``metrics`` and a ``summary``.

        ``experiment`` is None if the endpoint never had one. ``summary`` can be missing while the router has
        no report on the experiment.
        """
        return self._traffic.experiment(endpoint)

    @Call
    def stop_experiment(self, endpoint: str) -> Flow[Document]:
        """End an experiment: the control gets all traffic. Return the endpoint."""
        return self._traffic.end_experiment(endpoint, None)

    @Call
    def choose_winner(self, endpoint: str, deployment: str) -> Flow[Document]:
        """Send all traffic to a variant of an experiment that runs or has ended. Return the endpoint."""
        return self._traffic.end_experiment(endpoint, deployment)
