"""``tidegate tune``: measure the batching settings of a model on this machine, and choose one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import Control, Doc, control, part
from tidegate.cli.exit_codes import ERROR, UsageError
from tidegate.cli.options import Json, Name, seconds
from tidegate.cli.progress import Steps

if TYPE_CHECKING:
    from tidegate.cli.batching_sweep import SweepPlan, SweepResults
    from tidegate.tune.curve import Point

_GRID, _REQUEST = "What to measure", "The request"


def tune(
    name: Name,
    latency_ms: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="Highest p99 to accept, in milliseconds; default: the deployment's target wait."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            metavar="JSON",
            help="The inputs as JSON; @FILE reads a file, - reads stdin.",
            rich_help_panel=_REQUEST,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            metavar="FILE",
            help="File of inputs: .json, .npy or .npz.",
            rich_help_panel=_REQUEST,
        ),
    ] = None,
    max_batch: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Maximum rows in a call: a value to measure; repeatable. [1, 2, 4 ..]",
            rich_help_panel=_GRID,
        ),
    ] = None,
    window_ms: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            help="Longest wait to fill a batch, in milliseconds: a value to measure; repeatable. [0, 2, 5]",
            rich_help_panel=_GRID,
        ),
    ] = None,
    connections: Annotated[
        list[int] | None,
        typer.Option(
            "--connections",
            "-c",
            min=1,
            max=1024,
            help="Number of concurrent callers: a value to measure; repeatable. [1, 8, 64]",
            rich_help_panel=_GRID,
        ),
    ] = None,
    point_seconds: Annotated[
        float, typer.Option("--seconds", min=0.1, max=600, help="Seconds of load for each measurement.")
    ] = 2.0,
    limit: Annotated[
        str, typer.Option(metavar="TIME", help="Measure no further setting after this time.")
    ] = "10m",
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="The picture. [./MODEL-tune.png]")] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Change the deployment to the chosen batching.")
    ] = False,
    json: Json = False,
) -> None:
    """Measure throughput and latency of each batching setting, and choose the best one.

    The measurement uses a temporary replica. Without --data or --file the inputs are zeros. The capacity is
    stored with the version.
    """
    from tidegate.cli.batching_sweep import BatchingSweep, SweepPlan
    from tidegate.cli.infer import given_inputs
    from tidegate.tune import grid
    from tidegate.tune.picture import drawable

    given = None if data is None and file is None else given_inputs(data, file)
    plane = control()
    deployment = plane.deployment_of(name)
    source = plane.registry.get(f"/v1/deployments/{part(deployment)}")
    model, number = source["model"], source["version"]
    version = plane.registry.get(f"/v1/models/{part(model)}/versions/{number}")
    drawable()
    picture = _writable(png or Path(f"{model}-tune.png"))
    plan = SweepPlan(
        latency_ms=source["target_wait_ms"] if latency_ms is None else latency_ms,
        connections=grid.load_levels(connections),
        windows_ms=window_ms or grid.WINDOWS_MS,
        max_batch=max_batch,
        seconds=point_seconds,
        limit_s=seconds(limit),
        inputs=given,
    )
    with Steps().shown() as steps:
        results = BatchingSweep(plane, source, version, plan, steps).run()
    _conclude(plane, source, plan, results, picture, apply=apply, json=json)


def _conclude(
    plane: Control,
    source: Doc,
    plan: SweepPlan,
    results: SweepResults,
    picture: Path,
    *,
    apply: bool,
    json: bool,
) -> None:
    from tidegate.tune.curve import choose
    from tidegate.tune.picture import draw

    chosen = choose(results.points, plan.latency_ms)
    title = f"{source['model']} version {source['version']}"
    draw(picture, title, results.points, chosen, plan.latency_ms)
    stored = _store(plane, source, chosen) if chosen else None
    if apply and chosen:
        _apply(plane, source, chosen)
    document = {
        "model": source["model"],
        "version": source["version"],
        "deployment": source["name"],
        "latency_ms": plan.latency_ms,
        "points": _documents(results.points, chosen),
        "chosen": chosen.to_json() if chosen else None,
        "stored": stored,
        "applied": bool(apply and chosen),
        "settings_left": results.left,
        "png": str(picture.resolve()),
    }

    def human() -> None:
        rows = [_row(point, results.points, chosen) for point in results.points]
        columns = ("max batch", "window ms", "connections", "req/s", "p50 ms", "p99 ms", "mean batch", "")
        output.table(rows, columns)
        _tell(source, plan, results, chosen, picture, applied=apply)

    output.show(document, json, human)
    if chosen is None:
        output.say(_nothing_fits(results.points, plan), style="red")
        raise typer.Exit(ERROR)


def _tell(
    source: Doc,
    plan: SweepPlan,
    results: SweepResults,
    chosen: Point | None,
    picture: Path,
    *,
    applied: bool,
) -> None:
    if results.left:
        output.say(
            f"{results.left} settings were not measured, because the time was over (--limit).", style="yellow"
        )
    if chosen:
        output.line(
            f"Chosen for a p99 within {plan.latency_ms:g} ms: {chosen.setting}, {chosen.rps:,.0f} requests/s "
            f"with a p99 of {chosen.p99_ms:.3g} ms. "
            f"Stored with {source['model']} version {source['version']}."
        )
        if applied:
            output.line(f"{source['name']} now has this batching.")
        elif not _has(source, chosen):
            output.line(f"To measure again and set it: tidegate tune {source['name']} --apply")
    output.line(f"Picture: {picture}")


def _nothing_fits(points: list[Point], plan: SweepPlan) -> str:
    measured = [point.p99_ms for point in points if point.p99_ms is not None]
    if not measured:
        return f"No answer came within {plan.seconds:g} s. Measure longer: --seconds N"
    return (
        f"No setting has a p99 within {plan.latency_ms:g} ms; the lowest was {min(measured):.3g} ms. "
        "Nothing is stored. Allow more with --latency-ms, or try fewer --connections."
    )


def _row(point: Point, points: list[Point], chosen: Point | None) -> tuple[Any, ...]:
    from tidegate.tune.curve import front

    mark = "chosen" if point == chosen else "front" if point in front(points) else ""
    if point.failed:
        mark = f"{point.failed} failed"
    return (
        point.setting.max_batch,
        f"{point.setting.window_ms:g}",
        point.connections,
        f"{point.rps:,.0f}" if point.rps >= 100 else f"{point.rps:.3g}",
        point.p50_ms,
        point.p99_ms,
        point.batch_mean,
        mark or " ",
    )


def _documents(points: list[Point], chosen: Point | None) -> list[dict[str, Any]]:
    from tidegate.tune.curve import front

    best = front(points)
    return [{**p.to_json(), "front": p in best, "chosen": p == chosen} for p in points]


def _store(plane: Control, source: Doc, chosen: Point) -> dict[str, float]:
    """Add the capacity of the chosen setting to the version's metrics. Return only the added metrics."""
    path = f"/v1/models/{part(source['model'])}/versions/{source['version']}"
    metadata = plane.registry.get(path)["metadata"]
    found = chosen.capacity().to_metrics()
    plane.registry.patch(path, {"metadata": {**metadata, "metrics": {**metadata["metrics"], **found}}})
    return found


def _has(source: Doc, chosen: Point) -> bool:
    return bool(source["batching"] == chosen.setting.to_json())


def _apply(plane: Control, source: Doc, chosen: Point) -> None:
    plane.registry.patch(f"/v1/deployments/{part(source['name'])}", {"batching": chosen.setting.to_json()})


def _writable(path: Path) -> Path:
    """Return the path for the picture. Raise UsageError if no picture can be written there.

    The command calls this before the measurement, so that a wrong path fails early.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: the picture's name must end with .png.")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{path} cannot be written. Name another file.")
    return path
