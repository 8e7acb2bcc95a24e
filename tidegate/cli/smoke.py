"""The smoke test of ``deploy --check``: sample requests that a version must answer before it gets traffic."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tidegate.cli.api import Control, Doc, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.interrupts import interrupted_by_signals, interrupts_ignored
from tidegate.cli.output import say
from tidegate.cli.progress import Steps
from tidegate.cli.publish import place, read_json, wait_serving
from tidegate.kernel.errors import BadRequest, ModelFailed, NotFound, TidegateError
from tidegate.kernel.protocol.golden import Sample, differences, read_sample


class CheckFailed(ModelFailed):
    """The error of a version that did not answer a sample as expected."""

    reason = "check_failed"


def read_samples(path: Path) -> list[Sample]:
    """Return the samples of a JSON file with one OIP request or a list of them.

    Raise UsageError if the file has no sample or a wrong one.
    """
    found = read_json(path)
    documents = found if isinstance(found, list) else [found]
    if not documents:
        raise UsageError(f"{path} has no sample. Write one inference request, or a list of them.")
    return [_sample(each, f"{path}, sample {number}") for number, each in enumerate(documents, start=1)]


def samples_of(path: Path) -> list[Doc]:
    """Return the samples of a JSON file, in the registry's format.

    Raise UsageError if the file has no sample or a wrong one.
    """
    return [
        {**each.request, "expected": dict(each.expected), "tolerance": each.tolerance}
        for each in read_samples(path)
    ]


def _sample(given: Any, where: str) -> Sample:
    try:
        return read_sample(given, where)
    except BadRequest as error:
        raise UsageError(error.message) from None


def checked(
    control: Control, version: Doc, options: Doc, samples: Sequence[Sample], timeout_s: float, steps: Steps
) -> None:
    """Send the samples to a version, in a Deployment without other traffic.

    Raise CheckFailed if a sample fails or its answer is unexpected. Raise ModelFailed if the version does not
    load, and DeadlinePassed if it is not ready after ``timeout_s`` seconds.

    If the check ends by an error, Ctrl-C or SIGTERM, it undoes its change: a new Deployment is deleted, and
    an existing one gets its old options again.
    """
    before = {
        each["name"]: each for each in control.registry.pages("/v1/deployments", model=version["model"])
    }
    with interrupted_by_signals():
        deployment = ""
        try:
            placed = place(control, version, options, steps, traffic=False)
            deployment = placed["deployment"]["name"]
            with _probe(control, version["model"], deployment, timeout_s) as endpoint:
                wait_serving(control, {**placed, "endpoint": {"name": endpoint}}, timeout_s, steps)
                for number, sample in enumerate(samples, start=1):
                    _ask(control, endpoint, deployment, sample, number, timeout_s)
            steps.change("check", "done", f"{len(samples)} sample{'s' * (len(samples) > 1)} answered")
        except BaseException as error:
            with interrupts_ignored():
                _undo(control, deployment, before.get(deployment))
            if isinstance(error, TidegateError):
                steps.change("check", "failed", error.message)
                error.message = f"{error.message} {_consequence(version, before)}"
            raise


@contextmanager
def _probe(control: Control, model: str, deployment: str, timeout_s: float) -> Iterator[str]:
    """Create a temporary endpoint for the check. Delete it after the ``with`` block."""
    ending = f"-check-{secrets.token_hex(3)}"
    name = model[: 63 - len(ending)].rstrip("-") + ending
    fields = {"targets": [{"deployment": deployment}], "default_timeout_ms": max(int(timeout_s * 1e3), 1)}
    try:
        control.registry.put(f"/v1/endpoints/{part(name)}", fields)
        yield name
    finally:
        with interrupts_ignored():
            _delete(control, f"/v1/endpoints/{part(name)}", f"tidegate delete {name} --endpoint --yes")


def _ask(
    control: Control, endpoint: str, deployment: str, sample: Sample, number: int, timeout_s: float
) -> None:
    path = f"/v2/models/{part(endpoint)}/infer"
    try:
        answer = control.gateway.post(path, sample.request, timeout=timeout_s)
    except TidegateError as error:
        if error.reason == "unreachable":
            raise
        raise CheckFailed(f"{deployment} failed on sample {number}: {error.message}") from None
    found = differences(sample, answer)
    if found:
        raise CheckFailed(f"{deployment} gave an unexpected answer to sample {number}: {'; '.join(found)}.")


def _undo(control: Control, deployment: str, before: Doc | None) -> None:
    """Delete the Deployment if it is new. Otherwise restore its old options, ``before``."""
    if not deployment:
        return
    path = f"/v1/deployments/{part(deployment)}"
    if before is None:
        _delete(control, path, f"tidegate delete {deployment} --deployment --yes")
        return
    try:
        patch = back_to(_options(before), _options(control.registry.get(path)))
        if patch:
            control.registry.patch(path, patch)
    except TidegateError as error:
        say(
            f"The old options of {deployment} could not be restored: {error.message}",
            style="red",
        )


def _delete(control: Control, path: str, by_hand: str) -> None:
    try:
        control.registry.delete(path)
    except NotFound:
        return
    except TidegateError as error:
        say(f"The clean-up failed: {error.message} To clean up: {by_hand}", style="red")


def _options(deployment: Doc) -> Doc:
    return {k: v for k, v in deployment.items() if k not in ("revision", "created_at", "override")}


def back_to(old: Mapping[str, Any], new: Mapping[str, Any]) -> Doc:
    """Return the JSON merge patch that turns ``new`` back into ``old``."""
    patch: Doc = dict.fromkeys(new.keys() - old.keys())
    for key, value in old.items():
        now = new.get(key)
        if value == now:
            continue
        both = isinstance(value, Mapping) and isinstance(now, Mapping)
        patch[key] = back_to(value, now) if both else value  # type: ignore[arg-type]  # mypy does not follow `both`
    return patch


def _consequence(version: Doc, before: Mapping[str, Doc]) -> str:
    model, number = version["model"], version["number"]
    serving = "The earlier version still serves." if before else "Nothing serves it."
    return (
        f"{serving} Version {number} stays registered: serve it anyway with `tidegate deploy {model} "
        f"--version {number}`, or remove it with `tidegate delete {model} --version {number}`."
    )
