"""Show the drift of a model's versions: ``drift``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import Control, control, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json
from tidegate.cli.progress import Steps

Name = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="An endpoint, a Deployment or a model; default: all versions."),
]
SHOWN = 10


def drift(
    name: Name = None,
    every: Annotated[bool, typer.Option("--all", help="Show all columns, not only the first 10.")] = False,
    rebase: Annotated[
        bool,
        typer.Option("--rebase", help="Make the next window the new baseline, after an intended change."),
    ] = False,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Make this training data (.csv, .npz, .parquet) the new baseline."),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Write to a file the rows that `deploy --keep-rows` kept."),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE.svg", help="Draw the scores over time, and columns that drifted most."),
    ] = None,
    json: Json = False,
) -> None:
    """Compare the inputs and answers of each version with its baseline.

    A column has drifted if its score was above the limit in two windows in a row. docs/drift.md describes
    the comparison. Example: tidegate drift digits --plot drift.svg
    """
    plane = control()
    if name is None:
        if rebase or plot or baseline or rows:
            raise UsageError(
                "--rebase, --baseline, --rows and --plot need a name: tidegate drift NAME --plot drift.svg"
            )
        found = plane.router.get("/v1/drift")
        output.show(found, json, lambda: show_all(found))
        return
    if rows is not None:
        _write_rows(plane, name, rows)
    if baseline is not None:
        _set_baseline(plane, name, baseline)
    if rebase:
        changed = plane.router.post(f"/v1/drift/{part(name)}/rebase", {})
        output.show(changed, json, lambda: output.line(rebased(changed)))
        return
    found = plane.router.get(f"/v1/drift/{part(name)}")
    if plot is not None:
        _draw(found, plot)
    output.show(found, json, lambda: show(found, every=every))


def _write_rows(plane: Control, name: str, path: Path) -> None:
    # Write to a new file, so that a failed download does not damage an existing file.
    new = path.with_name(f"{path.name}.part")
    try:
        with new.open("wb") as file:
            plane.router.download(f"/v1/drift/{part(name)}/rows", file.write)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _set_baseline(plane: Control, name: str, path: Path) -> None:
    """Set the baseline of the newest version of a model or an endpoint, from a file of training data."""
    from tidegate.cli.publish import set_baseline

    with Steps().shown() as steps:
        newest = max(plane.router.get(f"/v1/drift/{part(name)}")["items"], key=lambda each: each["version"])
        address = f"/v1/models/{part(newest['model'])}/versions/{newest['version']}"
        set_baseline(plane, plane.registry.get(address), path, steps)


def rebased(changed: Mapping[str, Any]) -> str:
    """Describe which versions get a new baseline."""
    names = [f"{each['model']} version {each['version']}" for each in changed["versions"]]
    if not names:
        return "Nothing was changed, because every version has a training baseline."
    return f"The next window is the new baseline of {', '.join(names)}."


def show_all(found: Mapping[str, Any]) -> None:
    """Print a line for each version."""
    rows = [
        (
            each["model"],
            each["version"],
            each["state"],
            each["score"],
            ", ".join(each["drifted"][:3]) or each["reason"],
            baseline_of(each),
        )
        for each in found["items"]
    ]
    columns = ("model", "version", "state", "score", "columns", "baseline")
    output.table(rows, columns, "No version is deployed.")


def baseline_of(version: Mapping[str, Any]) -> str:
    """Describe a version's baseline."""
    baseline = version["baseline"]
    if baseline is None:
        return ""
    source = "training data" if baseline["source"] == "training" else "its first rows"
    return f"{baseline['rows']:,} rows of {source}"


def show(found: Mapping[str, Any], *, every: bool) -> None:
    """Print each version with its columns. The columns that drifted most come first."""
    for version in found["items"]:
        output.line(line_of(version), style="bold")
        if version["baseline"]:
            output.line(f"  baseline: {baseline_of(version)}", style="dim")
        columns = version["columns"] if every else version["columns"][:SHOWN]
        if columns:
            output.table([_row(each) for each in columns], HEADS)
        if (left := len(version["columns"]) - len(columns)) > 0:
            output.line(f"  {left} more columns: tidegate drift {found['name']} --all", style="dim")
        if version["predecessor"] is not None:
            output.line(_against(version["predecessor"]))


HEADS = ("column", "state", "score", "JS", "KS", "PSI", "W/sd", "mean", "was", "missing", "outside")


def _row(each: Mapping[str, Any]) -> tuple[Any, ...]:
    if "score" not in each:
        return (each["column"], each["state"], *[None] * 9)
    return (
        each["column"],
        each["state"],
        each["score"],
        each["js"],
        each["ks"],
        each["psi"],
        each["wasserstein"],
        each["mean"],
        each["baseline_mean"],
        f"{each['missing']:.2%}",
        f"{each['outside']:.2%}",
    )


def line_of(version: Mapping[str, Any]) -> str:
    """Return a version's state in one line."""
    head = f"{version['model']} version {version['version']}: {version['state']}"
    if version["drifted"]:
        count = "1 column" if len(version["drifted"]) == 1 else f"{len(version['drifted'])} columns"
        return f"{head}, {count}: {', '.join(version['drifted'][:5])}"
    if version["reason"]:
        return f"{head} ({version['reason']})"
    window = version["window"]
    return f"{head}, the last window had {window['rows']:,} rows" if window else head


def _against(predecessor: Mapping[str, Any]) -> str:
    columns = [each["column"] for each in predecessor["worst"] if each["state"] == "suspect"]
    found = ", ".join(columns) if columns else predecessor["reason"] or "no column is above its limit"
    return f"  against version {predecessor['version']}: {found}"


def _draw(found: Mapping[str, Any], plot: str) -> None:
    from tidegate.cli.drift_picture import svg

    drawn = next((each for each in found["items"] if each["points"]), None)
    if drawn is None:
        raise UsageError(
            "No window has been judged yet, so there is nothing to draw. Leave out --plot for now."
        )
    Path(plot).write_text(svg(drawn))
