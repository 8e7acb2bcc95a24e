"""Compare versions by the outcomes that callers report: ``experiment``, and ``rollout --ab``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import Control, Doc, control, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, parse_sticky, parsed, seconds
from tidegate.cli.progress import Steps

_POLL_S = 1.0
_MEASURED = ("errors", "latency")
_COLUMNS = (
    "metric", "deployment", "outcomes", "mean", "low", "high", "difference", "difference_low",
    "difference_high", "lift", "p_value", "verdict", "needed", "needed_for_min_lift",
)  # fmt: skip


def experiment(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The endpoint's name.")],
    stop: Annotated[
        bool, typer.Option("--stop", help="End the experiment: the control gets all traffic.")
    ] = False,
    winner: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION",
            help="End the experiment: this version (v2, 2 or a deployment) gets all traffic.",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the experiment has ended.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print the numbers as CSV.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw each difference over time.")
    ] = None,
    json: Json = False,
) -> None:
    """Show an experiment: the outcomes, the differences, and the outcomes that are still needed.

    The report states how many more outcomes would make the present difference significant. You may read the
    report at any time and as often as you like: its intervals stay valid. `tidegate rollout NAME --to VERSION
    --ab` starts an experiment. Example: tidegate experiment digits --winner v2
    """
    if sum((stop, winner is not None, wait)) > 1 or (csv and json):
        raise UsageError("Use only one of --stop, --winner and --wait, and one of --csv and --json.")
    plane = control()
    path = f"/v1/endpoints/{part(name)}/experiment"
    if stop:
        plane.registry.post(f"{path}/stop", {})
    elif winner is not None:
        endpoint = plane.registry.get(f"/v1/endpoints/{part(name)}")
        plane.registry.post(f"{path}/winner", {"deployment": _variant(plane, endpoint, winner)})
    found = _waited(plane, name) if wait else read(plane, name)
    if plot is not None:
        _draw(found, plot)
    if csv:
        print(csv_of(found), end="")
    else:
        output.show(found, json, lambda: show(found))


def start(plane: Control, name: str, to: str, options: Doc) -> None:
    """Start an experiment. ``to``: its treatments (versions or Deployments), separated by commas."""
    body: Doc = {"versions": [], "deployments": [], "options": options}
    for each in (text.strip() for text in to.split(",")):
        number = each.removeprefix("v")
        if number.isdecimal():
            body["versions"].append(int(number))
        else:
            body["deployments"].append(each)
    plane.registry.post(f"/v1/endpoints/{part(name)}/experiment", body)


def options_of(
    share: int | None,
    metrics: Sequence[str] | None,
    unit: str | None,
    samples: int | None,
    until: str | None,
) -> Doc:
    """Return an experiment's options for the registry. Raise UsageError for a wrong option."""
    options: Doc = {}
    if share is not None:
        options["share"] = share
    if metrics:
        options["metrics"] = [metric_of(text) for text in metrics]
    if unit is not None:
        if (sticky := parse_sticky(unit)) is None:
            raise UsageError("An experiment needs a unit. Write --unit header:NAME, parameter:NAME or key.")
        options["sticky"] = sticky
    if samples is not None:
        options["samples"] = samples
    if until is not None:
        options["until"] = moment_of(until).isoformat()
    return options


def metric_of(text: str) -> Doc:
    """Parse a metric, written ``NAME[=LABEL][:up|down][:LIFT]``. Raise UsageError for other texts.

    With ``LABEL``, the metric is the share of reported labels that equal ``LABEL``. ``up`` or ``down``: the
    better direction. ``LIFT``: the smallest difference worth finding, as a fraction or a percentage of the
    control's value.
    """
    head, *parts = text.split(":")
    name, equals, label = head.partition("=")
    metric: Doc = {"name": name}
    if name in _MEASURED and not equals:
        metric |= {"kind": name, "goal": "down"}
    elif equals:
        metric |= {"kind": "rate", "label": label}
    for each in parts:
        if each in ("up", "down"):
            metric["goal"] = each
            continue
        try:
            lift = float(each.removesuffix("%")) / (100 if each.endswith("%") else 1)
        except ValueError:
            lift = 0.0
        if not lift > 0:
            raise UsageError(
                f"--metric {text!r}: write NAME, NAME=LABEL, errors or latency. You can add :up or :down, "
                "and a smallest lift, as in score:up:5%."
            )
        metric["min_lift"] = lift
    return metric


def moment_of(text: str) -> datetime:
    """Return the moment in ``text``: an ISO 8601 time, or a duration from now such as ``2h``.

    Raise UsageError for other texts.
    """
    try:
        return parsed(text).astimezone()
    except ValueError:
        return datetime.now(timezone.utc) + timedelta(seconds=seconds(text))


def read(plane: Control, name: str) -> Doc:
    """Return an experiment's report.

    The router may still report an older experiment, because it has not read the present one yet. Then return
    a report without outcomes.
    """
    stated = plane.registry.get(f"/v1/endpoints/{part(name)}").get("experiment")
    shown: Doc = plane.router.get(f"/v1/experiments/{part(name)}")
    if stated is not None and (shown["experiment"] or {}).get("id") != stated["id"]:
        shown = {"endpoint": name, "metrics": [], "variants": [], "summary": "No outcome was counted yet."}
    return {**shown, "experiment": stated}


def _variant(plane: Control, endpoint: Doc, text: str) -> str:
    """Return the name of the variant whose name or version number ``text`` states.

    If there is not exactly one such variant, return ``text`` unchanged.
    """
    stated = endpoint.get("experiment") or {}
    variants = [stated.get("control", ""), *stated.get("treatments", ())]
    if text in variants:
        return text
    number = text.removeprefix("v")
    held = {each["name"]: each for each in plane.registry.pages("/v1/deployments")}
    found = [each for each in variants if each in held and str(held[each]["version"]) == number]
    return found[0] if len(found) == 1 else text


def _waited(plane: Control, name: str) -> Doc:
    with Steps().shown() as steps:
        while True:
            found = read(plane, name)
            stated = found["experiment"]
            running = stated is not None and stated["phase"] == "running"
            steps.change(name, "waiting" if running else "done", found.get("summary", ""))
            if not running:
                return found
            time.sleep(_POLL_S)


def rows_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a flat row for each pair of a metric and a variant."""
    rows = []
    for metric in found.get("metrics", ()):
        for variant in metric["variants"]:
            compared = variant["comparison"] or {}
            own = {key: variant[key] for key in ("deployment", "outcomes", "mean", "low", "high")}
            rows.append(
                {"metric": metric["name"], **own}
                | {
                    "difference": compared.get("difference"),
                    "difference_low": compared.get("low"),
                    "difference_high": compared.get("high"),
                }
                | {
                    key: compared.get(key)
                    for key in ("lift", "p_value", "verdict", "needed", "needed_for_min_lift")
                }
            )
    return rows


def csv_of(found: Mapping[str, Any]) -> str:
    """Return the report as CSV, with a header line."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows_of(found))
    return text.getvalue()


def line_of(found: Mapping[str, Any]) -> str:
    """Return the state of an experiment in one line."""
    stated = found["experiment"]
    against = f"{', '.join(stated['treatments'])} against {stated['control']}"
    return f"{against}: {stated['phase']}. {found.get('summary', '')}"


def show(found: Mapping[str, Any]) -> None:
    """Print an experiment and its report."""
    stated = found["experiment"]
    if stated is None:
        output.line(
            f"{found['endpoint']} has no experiment. Start one: "
            f"tidegate rollout {found['endpoint']} --to VERSION --ab"
        )
        return
    output.line(line_of(found), style="bold")
    heads = ("metric", "version", "outcomes", "mean", "lift", "interval of the lift", "p", "verdict", "needs")
    output.table([_row(metric, each) for metric in found["metrics"] for each in metric["variants"]], heads)
    ratio = found.get("sample_ratio")
    if ratio:
        shares = ", ".join(
            f"{name} {got:.4g}% of {want:.4g}%"
            for name, got, want in zip(
                [stated["control"], *stated["treatments"]], ratio["found"], ratio["expected"], strict=True
            )
        )
        verdict = "MISMATCH" if ratio["mismatch"] else "as planned"
        output.line(f"{ratio['over']}: {shares} ({verdict})", style="red" if ratio["mismatch"] else "dim")
    for event in stated["history"]:
        output.line(f"{output.moment(event['at'])}  {event['phase']}: {event['reason']}")


def _row(metric: Mapping[str, Any], variant: Mapping[str, Any]) -> tuple[Any, ...]:
    compared = variant["comparison"]
    start = (metric["name"], variant["deployment"], variant["outcomes"], variant["mean"])
    if compared is None:
        return (*start, "control", "", "", "", "")
    control = metric["variants"][0]["mean"]
    return (
        *start,
        _percent(compared["lift"]),
        _interval(compared, control),
        f"{compared['p_value']:.2g}",
        compared["verdict"],
        _needs(compared),
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.2%}"


def _interval(compared: Mapping[str, Any], control: float | None) -> str:
    """Format the confidence interval of the relative difference to the control, in percent.

    If the control's mean is 0 or unknown, format the interval of the absolute difference.
    """
    low, high = compared["low"], compared["high"]
    if low is None or high is None:
        return "unknown"
    if not control:
        return f"{low:+.3g} to {high:+.3g} (difference)"
    return f"{_percent(low / abs(control))} to {_percent(high / abs(control))}"


def _needs(compared: Mapping[str, Any]) -> str:
    if compared["significant"]:
        return ""
    small = compared["needed_for_min_lift"]
    if compared["needed"] is None:
        return "" if small is None else f"{small} more outcomes to detect the smallest lift"
    return f"{compared['needed']} more outcomes"


def _draw(found: Mapping[str, Any], plot: Path) -> None:
    from tidegate.cli.experiment_picture import svg

    if not found.get("points"):
        raise UsageError(
            "This experiment has no measurements yet, so there is nothing to draw. Leave out --plot for now."
        )
    plot.write_text(svg(found))
