"""Wait for the verification of a version, start it again, and describe its capacity card."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from tidegate.cli.api import Control, Doc, part
from tidegate.cli.progress import Steps
from tidegate.kernel.errors import DeadlinePassed, ModelFailed, TidegateError

POLL_S, LOOK_S = 0.05, 0.5  # In one request, the registry waits up to LOOK_S for the verification to end.
STEP = "verify"
REJECTED = "version_rejected"


def again(control: Control, version: Doc, options: Doc, samples: list[Doc]) -> Doc:
    """Start a new verification of a version. Return the version with the state of this verification."""
    body = {"deployment": options, "samples": samples}
    return {**version, "verification": control.registry.post(_path(version), body)}


def wait_verified(control: Control, version: Doc, timeout_s: float, steps: Steps) -> Doc:
    """Wait for the end of a version's verification, and return the version.

    Raise ModelFailed with Triton's message if the version is rejected. Raise DeadlinePassed if the
    verification has not ended after ``timeout_s`` seconds. A registry of an earlier release has no
    verification. In that case return the version unchanged.
    """
    until = time.monotonic() + timeout_s
    while True:
        verification: Doc = version.get("verification") or {}
        state = verification.get("state", "unchecked")
        if state == "rejected":
            steps.change(STEP, "failed", verification["message"])
            raise ModelFailed(_rejection(version, verification), reason=REJECTED)
        if state != "pending":
            if state != "unchecked":
                steps.change(STEP, "done", state_words(verification))
            return version
        step = _step(control, version)
        steps.change(STEP, "starting", step)
        if time.monotonic() > until:
            raise DeadlinePassed(
                f"Version {version['number']} of {version['model']} is not verified after {timeout_s:g} s: "
                f"{step}. Wait for it: tidegate verify {version['model']} --version {version['number']}"
            )
        time.sleep(POLL_S)
        version = {**version, "verification": control.registry.get(_path(version), wait_s=LOOK_S)}


def state_words(verification: Mapping[str, Any]) -> str:
    """Return the state of a verification with its main figures, for people."""
    card = verification.get("card") or {}
    state: str = verification.get("state", "unchecked")
    if state == "verified" and card.get("requests_per_s"):
        return (
            f"verified: up to {rate(card['requests_per_s'])} rows/s in Triton, {card['memory_mb']:,} MiB, "
            f"starts in {card['start_s']:.1f} s"
        )
    message = str(verification.get("message") or "").strip()
    return f"{state}: {message}" if message else state


def card_lines(card: Mapping[str, Any] | None) -> Iterable[str]:
    """Return the lines of a capacity card: one for each batch size, one for memory, one for the machine."""
    if not card:
        return
    for each in card["batches"]:
        yield (
            f"batch {each['rows']:>4}: p50 {each['p50_ms']:.2f} ms, p99 {each['p99_ms']:.2f} ms, "
            f"{rate(each['rows_per_s'])} rows/s"
        )
    yield f"memory {card['memory_mb']:,} MiB, load {card['load_ms']:,.0f} ms, start {card['start_s']:.1f} s"
    yield f"measured on {card['cpu']}, {card['cores']} cores, at {card['measured_at']}"


def rate(value: float) -> str:
    """Return a rate as text: a whole number from 100 on, else three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rejection(version: Doc, verification: Doc) -> str:
    name, number = version["model"], version["number"]
    return (
        f"Version {number} of {name} was rejected: {verification['message'].rstrip()}\n"
        "It got no request. Versions that already serve continue. Correct the model and deploy it again. "
        f"To verify it again: `tidegate verify {name} --version {number}`. "
        f"To serve it anyway: `tidegate deploy {name} --version {number} --force`."
    )


def _step(control: Control, version: Doc) -> str:
    """Return in words why a version is not verified yet."""
    try:
        found = control.autoscaler.get("/v1/verifications")
    except TidegateError as error:
        return f"waits for a scratch replica, but the autoscaler does not answer: {error.message}"
    for each in found["items"]:
        if (each["model"], each["version"]) == (version["model"], version["number"]):
            failed = f"; {each['failed_tries']} failed before" if each["failed_tries"] else ""
            return f"scratch replica: {each['step']}{failed}"
    return str(found.get("problem") or "waits for a scratch replica")


def _path(version: Doc) -> str:
    return f"/v1/models/{part(version['model'])}/versions/{version['number']}/verification"
