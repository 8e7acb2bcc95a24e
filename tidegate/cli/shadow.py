"""Show and stop shadow traffic: ``tidegate shadow``. ``tidegate rollout --shadow`` starts it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import Control, Doc, control, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, seconds
from tidegate.cli.progress import Steps

_TIMES = ("p50", "p90", "p99")
_UNKNOWN = ("none", "too few")
_POLL_S = 1.0


def shadow(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The endpoint's name.")],
    stop: Annotated[bool, typer.Option("--stop", help="End the shadow traffic.")] = False,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait/--no-wait", help="Wait for a verdict. Exit code 4: the verdict is not `agrees`."
        ),
    ] = False,
    timeout: Annotated[str, typer.Option(metavar="TIME", help="How long to wait.")] = "10m",
    json: Json = False,
) -> None:
    """Show an endpoint's shadow traffic: copies, agreement, latencies and the verdict.

    `tidegate rollout NAME --to VERSION --shadow` starts it, and `tidegate promote NAME` sends all traffic to
    the shadow. Callers never see an answer of the shadow. Example: tidegate shadow digits --stop
    """
    if stop and wait:
        raise UsageError("Use --stop or --wait, not both.")
    plane = control()
    if stop:
        plane.registry.delete(f"/v1/endpoints/{part(name)}/shadow")
    found = _waited(plane, name, seconds(timeout)) if wait else read(plane, name)
    output.show(found, json, lambda: show(found))
    if wait and (found["report"] is None or found["report"]["verdict"] != "agrees"):
        raise typer.Exit(4)


def _waited(plane: Control, name: str, timeout_s: float) -> Doc:
    """Wait until the shadow has a verdict or ends, at most ``timeout_s`` seconds. Return its last state."""
    end = time.monotonic() + timeout_s
    with Steps().shown() as steps:
        while True:
            found = read(plane, name)
            known = found["report"] is not None and found["report"]["verdict"] not in _UNKNOWN
            if known or found["shadow"] is None or time.monotonic() >= end:
                steps.change(name, "done", line_of(found))
                return found
            steps.change(name, "waiting", line_of(found))
            time.sleep(_POLL_S)


def start(plane: Control, name: str, to: str, options: Doc) -> None:
    """Start shadow traffic to a version or a Deployment."""
    number = to.removeprefix("v")
    target = {"version": int(number)} if number.isdecimal() else {"deployment": to}
    plane.registry.put(f"/v1/endpoints/{part(name)}/shadow", {**target, **options})


def read(plane: Control, name: str) -> Doc:
    """Return an endpoint's shadow from the registry, with the router's report on it.

    If the router's report is still about an earlier shadow, ``report`` is None.
    """
    stated = plane.registry.get(f"/v1/endpoints/{part(name)}").get("shadow")
    shown: Doc = plane.router.get(f"/v1/shadows/{part(name)}")
    if stated is not None and (shown["shadow"] or {}).get("id") != stated["id"]:
        shown = {"endpoint": name, "problem": "", "report": None}
    return {**shown, "shadow": stated}


def options_of(
    rate: float | None, max_per_s: float | None, tolerance: str | None, lasts: str | None, *, wake: bool
) -> dict[str, Any]:
    """Return a shadow's options in the registry's format.

    ``lasts``: the duration of the shadow, such as ``2h``. Raise UsageError for a wrong tolerance or duration.
    """
    options: dict[str, Any] = {"wake": wake}
    if rate is not None:
        options["rate"] = rate
    if max_per_s is not None:
        options["max_per_s"] = max_per_s
    if tolerance is not None:
        options["tolerance"] = _tolerance(tolerance)
    if lasts is not None:
        options["until"] = (datetime.now(timezone.utc) + timedelta(seconds=seconds(lasts))).isoformat()
    return options


def _tolerance(text: str) -> dict[str, float]:
    """Parse a tolerance: ``RTOL,ATOL``, or one number for both."""
    try:
        numbers = [float(part) for part in text.split(",")]
        rtol, atol = numbers * 2 if len(numbers) == 1 else numbers
    except ValueError:
        raise UsageError(f"--tolerance {text!r}: write one number, as in 1e-3, or RTOL,ATOL.") from None
    return {"rtol": rtol, "atol": atol}


def line_of(found: Mapping[str, Any]) -> str:
    """Return the state of shadow traffic in one line."""
    shadow, report = found["shadow"], found["report"]
    if shadow is None:
        head = "no shadow" if report is None else "the shadow has ended"
    else:
        most = f", at most {shadow['max_per_s']:g}/s for each gateway process" if shadow["max_per_s"] else ""
        until = f", until {shadow['until']}" if shadow["until"] else ""
        head = f"{shadow['deployment']} gets {shadow['rate']:g}% copies{most}{until}"
    if found["problem"]:
        return f"{head}: {found['problem']}"
    if report is None:
        return f"{head}: the router has not counted copies yet" if shadow else head
    return f"{head}: {report['verdict']}: {report['why']}"


def show(found: Mapping[str, Any]) -> None:
    """Print shadow traffic: the verdict, copies by outcome, agreement by output, and latencies."""
    report, name = found["report"], found["endpoint"]
    if found["shadow"] is None and report is None:
        output.line(f"{name} has no shadow. Start one: tidegate rollout {name} --to VERSION --shadow")
        return
    output.line(line_of(found), style="bold")
    if report is None:
        return
    failed = sum(report["failed"].values())
    output.line(
        f"copies: {report['copied']} of {report['offered']} answered requests; "
        f"{report['answered']} answered, {failed} failed, {report['in_flight']} in flight"
    )
    for what, reasons in (("not copied", report["refused"]), ("failed", report["failed"])):
        if reasons:
            output.line(
                f"{what}: " + ", ".join(f"{reason} {count}" for reason, count in reasons.items()), style="dim"
            )
    if report["refused"].get("no ready replica"):
        deployment = found["shadow"]["deployment"] if found["shadow"] else "DEPLOYMENT"
        output.line(
            f"{deployment} had no ready replica. Use --wake, or start one: tidegate scale {deployment} 1",
            style="dim",
        )
    if report["last_failure"]:
        output.line(f"last failure: {report['last_failure']}", style="dim")
    _show_agreement(report)
    _show_times(report["latency_ms"])
    for each in report["differing"]:
        output.line(
            f"differs: request {each['request']}, {each['output']}: {each['difference']}", style="dim"
        )


def _show_agreement(report: Mapping[str, Any]) -> None:
    rows = [
        (
            name,
            f"{each['agreement']:.2%} of {each['compared']}",
            f"{each['top1']:.2%} of {each['rows']}" if each.get("top1") is not None else "",
            _difference(each),
        )
        for name, each in report["outputs"].items()
    ]
    if rows:
        output.table(rows, ("output", "agrees", "top 1", "differences"))
        output.line(
            f"all outputs agree: {report['agreement']:.2%} of {report['compared']} answers, at least "
            f"{report['agreement_at_least']:.2%} with 95% confidence"
        )


def _difference(output: Mapping[str, Any]) -> str:
    if output.get("texts"):
        edits = output["edit_distance"]
        words = f"{output['exact']:.2%} equal"
        return words if edits is None else f"{words}, edit distance of the others {edits:.1%}"
    return f"at most {output['max_abs']:.3g} ({output['max_rel']:.2%})"


def _show_times(times: Mapping[str, Mapping[str, float] | None]) -> None:
    rows = [
        (label, *(f"{found[each]:.3g}" for each in _TIMES))
        for key, label in (
            ("primary", "requests"),
            ("shadow", "copies"),
            ("primary_call", "requests, model call"),
            ("shadow_call", "copies, model call"),
        )
        if (found := times[key]) is not None
    ]
    if rows:
        output.table(rows, ("milliseconds", *_TIMES))
