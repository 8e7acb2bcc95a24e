"""Show the quality of a model's versions: ``quality``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import control, part
from tidegate.cli.options import Json

Name = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="An endpoint, a Deployment or a model; default: all versions."),
]
MEASURES = ("accuracy", "auc", "ece", "mae", "rmse")


def quality(
    name: Name = None,
    windows: Annotated[int, typer.Option("-n", min=1, help="Number of windows to show.")] = 10,
    json: Json = False,
) -> None:
    """Show accuracy, AUC, error and calibration of each version, from labels that callers sent as feedback.

    Without labels, a classifier's accuracy is estimated from its own probabilities and marked as an estimate.
    How to send labels: docs/drift.md. Example: tidegate quality digits
    """
    plane = control()
    if name is None:
        found = plane.router.get("/v1/quality")
        output.show(found, json, lambda: show_all(found))
        return
    found = plane.router.get(f"/v1/quality/{part(name)}")
    output.show(found, json, lambda: show(found, windows))


def show_all(found: Mapping[str, Any]) -> None:
    """Print a line for each version."""
    rows = [
        (
            each["model"],
            each["version"],
            each["state"],
            *_measures((each["window"] or each["open"])["measures"]),
            (each["estimate"] or {}).get("accuracy"),
            each["all"]["rows"] + each["open"]["rows"],
        )
        for each in found["items"]
    ]
    columns = ("model", "version", "state", *MEASURES, "estimated accuracy", "labels")
    output.table(rows, columns, "No version is deployed.")


def show(found: Mapping[str, Any], windows: int) -> None:
    """Print each version with its last windows."""
    for version in found["items"]:
        output.line(line_of(version), style="bold")
        rows = [
            (output.moment(each["end"]), each["rows"], each["state"], *_measures(each["measures"]))
            for each in version["points"][-windows:]
        ]
        if version["open"]["rows"]:
            opened = version["open"]
            rows.append(("open window", opened["rows"], "", *_measures(opened["measures"])))
        if rows:
            output.table(rows, ("window", "labels", "state", *MEASURES))
        output.line(f"  {estimate_of(version)}")
        output.line(f"  {labels_of(version)}", style="dim")


def line_of(version: Mapping[str, Any]) -> str:
    """Return a version's state in one line."""
    line = f"{version['model']} version {version['version']}: {version['state']}"
    return f"{line} ({version['reason']})" if version["reason"] else line


def estimate_of(version: Mapping[str, Any]) -> str:
    """Describe the accuracy that is estimated without labels, or say why there is no estimate."""
    found = version["estimate"]
    if found is None:
        return "no estimate yet: no window of samples is full, or the model returns no probabilities"
    area = f", AUC {found['auc']:.3f}" if "auc" in found else ""
    basis = (
        "calibrated with labels" if found["calibrated"] else "not calibrated, because there are few labels"
    )
    return f"estimate without labels (CBPE, {basis}): accuracy {found['accuracy']:.3f}{area}"


def labels_of(version: Mapping[str, Any]) -> str:
    """Describe how many labels belong to sampled requests, and how many do not.

    Also give the number of predictions that wait for labels.
    """
    line = (
        f"{version['labels_joined']:,} labels joined to predictions; "
        f"{version['labels_unmatched']:,} labels are for requests that were "
    )
    return f"{line}not sampled; {version['predictions_waiting']:,} predictions wait for labels"


def _measures(found: Mapping[str, float]) -> list[float | None]:
    return [found.get(name) for name in MEASURES]
