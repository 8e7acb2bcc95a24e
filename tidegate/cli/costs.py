"""``costs``: what replicas cost, by Deployment, version, endpoint or key, and the prices that apply."""

from __future__ import annotations

import csv as csv_module
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import Control, control
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, parsed, seconds
from tidegate.cli.replay import TIME_LIMIT_S, variation
from tidegate.kernel.errors import TidegateError

BY = ("deployment", "version", "endpoint", "key")
# The replay accepts at most a week of recorded requests.
REPLAYED_S = 7 * 86_400.0
_SUMS = ("cost", "direct", "overhead", "token_cost")
_COUNTS = (
    "requests", "rows", "tokens_in", "tokens_out", "tokens_cached", "per_1000_requests", "per_1000_tokens",
)  # fmt: skip
_PARTS = ("busy", "idle", "starting", "wasted", "stopping", "unreported", "pending")


def costs(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Only this deployment, or this endpoint's deployment."),
    ] = None,
    by: Annotated[str, typer.Option(metavar="WHAT", help=f"What to sum by: {', '.join(BY)}.")] = "deployment",
    since: Annotated[
        str,
        typer.Option(
            metavar="WHEN", help="Start of the period: 24h, 30d, month, or a time such as 2026-01-31."
        ),
    ] = "24h",
    until: Annotated[
        str | None, typer.Option(metavar="WHEN", help="End of the period, in the same forms; default: now.")
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV, for spreadsheets.")] = False,
    prices: Annotated[
        bool, typer.Option("--prices", help="Show the prices, and what a replica of each deployment costs.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Write a picture.")] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE[;...]",
            help="Replay the recorded requests with another policy, such as max_replicas=2. Repeatable.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show what replicas cost: useful calls, idle time, starts and waste.

    Example: tidegate costs --by key --since month
    """
    plane = control()
    if prices:
        found = plane.autoscaler.get("/v1/prices")
        output.show(found, json, lambda: _show_prices(found))
        return
    if by not in BY:
        raise UsageError(f"--by {by!r}: write one of {', '.join(BY)}.")
    now = time.time()
    query: dict[str, Any] = {"since": _moment(since, now), "by": by}
    if until is not None:
        query["until"] = _moment(until, now)
    if name is not None:
        query["deployment"] = plane.deployment_of(name)
    if what_if and name is None:
        raise UsageError("--what-if needs a NAME, because a policy belongs to one deployment.")
    found = plane.autoscaler.get("/v1/costs", **query)
    if by == "key":
        _add_names(plane, found)
    if what_if:
        found["what_if"] = _replayed(plane, query, what_if, now)
    if plot is not None:
        _draw(found, plot)
    if csv:
        _write_csv(found)
    else:
        output.show(found, json, lambda: _show(found))


def _add_names(plane: Control, found: Mapping[str, Any]) -> None:
    """Add to each item of the report the name of its key.

    The name is "" if the key is unknown, or if the user may not list keys.
    """
    try:
        names = {each["id"]: each["name"] for each in plane.registry.items("/v1/keys", all="true")}
    except TidegateError:
        names = {}
    for item in found["items"]:
        item["key_name"] = names.get(item["key"], "")


def _replayed(plane: Control, query: Mapping[str, Any], texts: list[str], now: float) -> list[dict[str, Any]]:
    """Replay the period's recorded requests under other policies. Return what each policy would cost."""
    deployment, until = query["deployment"], query.get("until", now)
    order = {
        "deployment": deployment,
        "arrivals": {"kind": "recorded", "since": max(query["since"], until - REPLAYED_S), "until": until},
        "policies": [variation(text) for text in texts],
    }
    results = plane.autoscaler.post("/v1/replay", order, timeout=TIME_LIMIT_S)["results"]
    price = plane.autoscaler.get("/v1/prices")["deployments"][deployment]["per_hour"]
    kept = ("name", "replica_hours", "late", "late_share", "wait_p95_ms", "most_replicas")
    return [{**{key: each[key] for key in kept}, "cost": each["replica_hours"] * price} for each in results]


def _draw(found: Mapping[str, Any], path: Path) -> None:
    from tidegate.cli.cost_picture import svg

    try:
        path.write_text(svg(found))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from None
    output.say(f"picture: {path}")


def _moment(text: str, now: float) -> float:
    """Parse a moment: an age such as 24h, ``month`` (the start of this month, UTC) or an ISO time.

    Return the moment in seconds since 1970. Raise UsageError for other texts.
    """
    from datetime import datetime, timezone

    if text == "month":
        return (
            datetime.now(timezone.utc).replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp()
        )
    try:
        return parsed(text).timestamp()
    except ValueError:
        pass
    try:
        return now - seconds(text)
    except UsageError:
        raise UsageError(f"{text!r} is not a time: write 24h, 30d, month or 2026-01-31.") from None


def _show(found: Mapping[str, Any]) -> None:
    total, by = found["total"], found["by"]
    period = f"{output.moment(found['since'])} to {output.moment(found['until'])}"
    money = f"{output.money_of(total['cost'])} {found['currency']}"
    hours = found["replica_seconds"] / 3600
    output.line(f"{money} for {hours:.2f} replica-hours, {period}", style="bold")
    for part in found["parts"]:
        share = part["seconds"] / found["replica_seconds"] if found["replica_seconds"] else 0.0
        output.line(
            f"  {part['part']:<18} {share:>6.1%}  {output.money_of(part['cost']):>9}  {part['seconds']:.0f} s"
        )
    if total["token_cost"]:
        output.line(f"  {'tokens':<18} {'':>6}  {output.money_of(total['token_cost']):>9}")
    output.line()
    heads = (by, "cost", "direct", "overhead", "tokens", "requests", "per 1000", "per 1000 tokens")
    rows: list[tuple[Any, ...]] = [
        (
            item.get("key_name") or item[by],
            *(output.money_of(item[key]) for key in _SUMS),
            item["requests"],
            *(None if item[key] is None else output.money_of(item[key]) for key in _COUNTS[-2:]),
        )
        for item in found["items"]
    ]
    output.table(rows, heads, "No replica ran in this period.")
    _show_outlook(found)
    if "what_if" in found:
        _show_replayed(found["what_if"])
    for each in found["managed"]:
        output.line(
            f"At {each['service']}, the same would cost {output.money_of(each['cost'])} {found['currency']}."
        )


def _show_replayed(results: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        (
            each["name"],
            output.money_of(each["cost"]),
            f"{each['replica_hours']:.2f}",
            f"{each['late']} ({each['late_share']:.1%})",
            each["wait_p95_ms"],
            each["most_replicas"],
        )
        for each in results
    ]
    output.line()
    output.table(rows, ("policy, by replay", "cost", "replica h", "late", "p95 ms", "most"))


def _show_outlook(found: Mapping[str, Any]) -> None:
    """Print the forecast of this month's cost, the cost of idle time, and the budgets."""
    currency, month = found["currency"], found["month"]
    if found["problem"]:
        output.say(found["problem"], style="red")
    output.line()
    if month is not None:
        between = (
            ""
            if month["low"] is None
            else f" (80 % interval: {output.money_of(month['low'])} to {output.money_of(month['high'])})"
        )
        output.line(
            f"This month: {output.money_of(month['spent'])} spent, "
            f"{output.money_of(month['expected'])} {currency} expected{between}. "
            f"The forecast is based on {month['basis']}."
        )
    if found["idle_per_month"] is not None:
        output.line(
            f"Idle time costs {output.money_of(found['idle_per_month'])} {currency} in 30 days like these."
        )
    for each in found["budgets"]:
        for period in ("day", "month"):
            if (limit := each[f"max_cost_per_{period}"]) is not None:
                spent = f"{output.money_of(each[period])} of {limit:g} {currency} a {period}"
                output.line(f"Budget of {each['deployment']}: {spent} ({each[period] / limit:.0%}).")
        if each["used_up"]:
            output.line(f"{each['deployment']}: {each['used_up']}.", style="red")


def _write_csv(found: Mapping[str, Any]) -> None:
    by = found["by"]
    writer = csv_module.writer(sys.stdout)
    parts = [f"{part}_seconds" for part in _PARTS]
    writer.writerow(("since", "until", by, "currency", *_SUMS, *_COUNTS, *parts))
    for item in found["items"]:
        head: Sequence[Any] = (found["since"], found["until"], item[by], found["currency"])
        spent = [item["seconds"].get(part, 0) for part in _PARTS]
        writer.writerow((*head, *(item[key] for key in (*_SUMS, *_COUNTS)), *spent))
    sys.stdout.flush()


def _show_prices(found: Mapping[str, Any]) -> None:
    prices = found["prices"]
    source = found["file"] or "the defaults; to use your own, set TIDEGATE_PRICES to a file"
    output.line(f"Prices in {prices['currency']}: {source}", style="bold")
    if found["problem"]:
        output.say(found["problem"], style="red")
    rows: list[tuple[Any, ...]] = [
        ("core-hour", prices["core_hour"]),
        ("GiB-hour", prices["gib_hour"]),
    ]
    rows += [(f"GPU-hour {name}", each["per_hour"]) for name, each in prices["gpu_hour"].items()]
    for name, each in prices["tokens"].items():
        rows += [(f"million tokens {kind}, {name}", price) for kind, price in each.items()]
    output.table(rows, ("resource", "price"))
    output.line()
    replicas = [
        (
            name,
            output.money_of(rate["per_hour"]),
            rate["cores"],
            rate["memory_gib"],
            rate["gpus"],
            rate["source"],
        )
        for name, rate in found["deployments"].items()
    ]
    heads = ("deployment", "per replica-hour", "cores", "GiB", "GPUs", "from")
    output.table(replicas, heads, "Nothing is deployed.")
