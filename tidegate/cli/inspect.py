"""Commands that list models, versions, routes, replicas, decisions and cold starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import control, part
from tidegate.cli.options import Filter, Json, Limit, Model, Name, OrderBy
from tidegate.cli.output import moment

PHASES = ("launch", "fetch", "triton_start", "load", "warm_up")


def models(
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="Only models whose name contains this text.")
    ] = None,
    filter_: Annotated[
        str | None,
        typer.Option(
            "--filter", metavar="FILTER", help=("Only models with a version that matches this filter.")
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List the models, their latest version and the endpoints that serve them.

    Example: `tidegate models --filter 'tags.team = fraud'`
    """
    registry = control().registry
    items = registry.pages("/v1/models", name=text, filter=filter_)
    deployments = {d["name"]: d for d in registry.pages("/v1/deployments")}
    endpoints = registry.pages("/v1/endpoints")
    rows = []
    for item in items:
        name = item["name"]
        served = [e["name"] for e in endpoints if name in models_of(e, deployments)]
        latest = item["latest"]
        about = (latest["format"], output.moment(latest["created_at"]), item.get("aliases"), served)
        rows.append((name, latest["number"], *about))
    columns = ("model", "latest", "format", "registered", "aliases", "endpoints")
    output.show(
        {"items": items},
        json,
        lambda: output.table(rows, columns, "No model is registered. Deploy one: tidegate deploy model.onnx"),
    )


def models_of(endpoint: dict[str, Any], deployments: dict[str, Any]) -> set[str]:
    """Return the models behind an endpoint's targets."""
    names = (target["deployment"] for target in endpoint["targets"])
    return {deployments[name]["model"] for name in names if name in deployments}


def versions(
    name: Model,
    filter_: Filter = None,
    order_by: OrderBy = None,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="Number of versions to show; default: all.")
    ] = None,
    deleted: Annotated[
        bool, typer.Option("--deleted", help="List the deleted versions that `undelete` can restore.")
    ] = False,
    json: Json = False,
) -> None:
    """List the versions of a model with metadata, verification and capacity, oldest first.

    Example: `tidegate versions digits --order-by 'metrics.accuracy desc' -n 5`
    """
    from tidegate.cli.verification import state_words

    path = f"/v1/models/{part(name)}/versions"
    gone = "true" if deleted else None
    items = control().registry.pages(path, limit, filter=filter_, order_by=order_by, deleted=gone)
    rows = [
        (
            v["number"],
            v.get("aliases"),
            v["format"],
            output.size_of(v["artifact_size"]),
            v["artifact_sha256"][:12],
            output.moment(v["created_at"]),
            _shortened(state_words(v.get("verification") or {}), 60),
            output.moment(v["metadata"].get("trained_at")),
            v["metadata"].get("metrics"),
            v["metadata"].get("tags"),
            v["metadata"].get("notes"),
        )
        for v in items
    ]
    columns = (
        "version",
        "alias",
        "format",
        "size",
        "sha256",
        "registered",
        "verification",
        "trained",
        "metrics",
        "tags",
        "notes",
    )
    output.show({"items": items}, json, lambda: output.table(rows, columns))


def _shortened(text: str, length: int) -> str:
    """Return the first line of a text, with at most ``length`` characters."""
    first = text.partition("\n")[0]
    return first if len(first) <= length else f"{first[: length - 1]}…"


def routes(json: Json = False) -> None:
    """Show the route table that the router published last."""
    found = control().router.get("/v1/routes")
    rows = route_rows(found)
    columns = ("endpoint", "deployment", "weight", "model", "version", "ready", "wakeable", "queue")

    def human() -> None:
        output.table(rows, columns, "The route table is empty.")
        output.say(f"revision {found.get('epoch')}/{found.get('n')}", style="dim")

    output.show(found, json, human)


def route_rows(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Return a row for each target of each endpoint."""
    deployments = found["deployments"]
    rows = []
    for name, endpoint in sorted(found["endpoints"].items()):
        for target in endpoint["targets"]:
            d = deployments.get(target["deployment"], {})
            detail = (d.get(key) for key in ("model", "version", "ready", "wakeable", "queue"))
            rows.append((name, target["deployment"], target["weight"], *detail))
    return rows


def replicas(json: Json = False) -> None:
    """List the running replicas, with the figures of their heartbeats."""
    items = control().autoscaler.items("/v1/replicas")
    rows = [
        (
            r.get("replica"),
            r.get("state"),
            r.get("pid"),
            r.get("device"),
            memory_of(r),
            output.moment(r.get("started_at") or r.get("launched_at")),
            r.get("inflight"),
            r.get("completed"),
            r.get("failed"),
            r.get("call_ms"),
            r.get("batch_mean"),
            r.get("message"),
        )
        for r in items
    ]
    columns = (
        "replica", "state", "pid", "runs on", "memory", "started", "inflight", "completed", "failed",
        "call ms", "batch", "message",
    )  # fmt: skip
    output.show({"items": items}, json, lambda: output.table(rows, columns, "No replica runs."))


def memory_of(replica: Mapping[str, Any]) -> str:
    """Format the memory that a replica uses, and the replica's memory limit.

    Leave out a value that is unknown.
    """
    taken, limit = replica.get("memory_mb"), replica.get("memory_limit")
    return "; ".join([*([f"{taken} MiB"] if taken else []), *([f"limit {limit}"] if limit else [])])


def decisions(name: Name, limit: Limit = 20, json: Json = False) -> None:
    """List the autoscaler's decisions with their reasons, newest first."""
    plane = control()
    deployment = plane.deployment_of(name)
    items = plane.autoscaler.items("/v1/decisions", deployment=deployment, limit=limit)
    rows = [
        (
            output.moment(d["at"]),
            f"{d['before']} -> {d['after']}",
            d["rule"],
            d["actions"],
            d["reason"],
        )
        for d in items
    ]
    columns = ("time", "replicas", "rule", "actions", "reason")
    output.show({"items": items}, json, lambda: output.table(rows, columns, "No decision yet."))


def cold_starts(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="The deployment; default: a line for each deployment."),
    ] = None,
    json: Json = False,
) -> None:
    """Show the phases of each cold start, in milliseconds. Without NAME, summarise each deployment."""
    plane = control()
    if name is None:
        _cold_start_report(plane.autoscaler.items("/v1/cold-starts"), json)
        return
    deployment = plane.deployment_of(name)
    items = plane.autoscaler.items(f"/v1/deployments/{part(deployment)}/cold-starts")
    rows = [cold_start_row(start) for start in items]
    columns = ("replica", "at", *(f"{phase.replace('_', ' ')} ms" for phase in PHASES), "total ms", "cause")
    output.show({"items": items}, json, lambda: output.table(rows, columns, "No cold start yet."))


def _cold_start_report(items: list[dict[str, Any]], json: bool) -> None:
    rows = [
        (
            found["deployment"],
            found["count"],
            *(_ms(found["phases_ms"].get(phase)) for phase in PHASES),
            _ms(found["median_ms"]),
            _ms(found["longest_ms"]),
        )
        for found in items
    ]
    parts = (f"{phase.replace('_', ' ')} ms" for phase in PHASES)
    columns = ("deployment", "starts", *parts, "median ms", "longest ms")
    output.show({"items": items}, json, lambda: output.table(rows, columns, "Nothing is deployed."))


def cold_start_row(start: dict[str, Any]) -> tuple[Any, ...]:
    """Return the table row of one cold start, with the milliseconds of each phase and in total."""
    parts = start.get("phases_ms") or {}
    total = start.get("total_ms") or (sum(parts.values()) if parts else None)
    return (
        start.get("replica"),
        moment(start.get("at")),
        *(_ms(parts.get(phase)) for phase in PHASES),
        _ms(total),
        start.get("cause"),
    )


def _ms(value: float | None) -> int | None:
    return None if value is None else round(value)
