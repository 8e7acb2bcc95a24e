"""Command-line options that describe a version, and their conversion to metadata."""

from __future__ import annotations

import re
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import numbers, pairs, parsed

PANEL = "About the version"

TrainedAt = Annotated[
    str | None,
    typer.Option("--trained-at", metavar="DATE", help="Date or time of the training.", rich_help_panel=PANEL),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option("--metric", metavar="K=V", help="accuracy=0.98; repeatable.", rich_help_panel=PANEL),
]
Parameters = Annotated[
    list[str] | None,
    typer.Option(
        "--param",
        metavar="K=V",
        help="A training parameter, such as depth=6; repeatable.",
        rich_help_panel=PANEL,
    ),
]
Tags = Annotated[
    list[str] | None,
    typer.Option(
        "--tag", metavar="K=V", help="A tag, such as team=vision; repeatable.", rich_help_panel=PANEL
    ),
]
Note = Annotated[str | None, typer.Option("--note", help="Free text.", rich_help_panel=PANEL)]
Owner = Annotated[
    str | None,
    typer.Option("--owner", help="The person or team responsible for the version.", rich_help_panel=PANEL),
]
License = Annotated[
    str | None,
    typer.Option("--license", metavar="ID", help="An SPDX identifier: Apache-2.0.", rich_help_panel=PANEL),
]
Framework = Annotated[
    str | None,
    typer.Option(
        "--framework",
        metavar="NAME[==VERSION]",
        help="xgboost==2.1.0, as in training.",
        rich_help_panel=PANEL,
    ),
]
Commit = Annotated[
    str | None, typer.Option("--commit", help="The commit of the training's code.", rich_help_panel=PANEL)
]
Dataset = Annotated[
    str | None,
    typer.Option("--dataset", metavar="NAME|URI", help="The training data.", rich_help_panel=PANEL),
]
Run = Annotated[
    str | None, typer.Option("--run", metavar="ID|URL", help="The training run.", rich_help_panel=PANEL)
]
Parent = Annotated[
    str | None,
    typer.Option(
        "--parent", metavar="NAME@N", help="The version from which this one was made.", rich_help_panel=PANEL
    ),
]
MetadataFile = Annotated[
    Path | None,
    typer.Option(
        "--metadata",
        metavar="FILE",
        help="Read metadata from a JSON or YAML file; the options below override its values.",
        rich_help_panel=PANEL,
    ),
]
Card = Annotated[
    Path | None,
    typer.Option("--card", metavar="FILE.md", help="The model card, in Markdown.", rich_help_panel=PANEL),
]


def stated(
    *,
    trained_at: str | None = None,
    metrics: list[str] | None = None,
    parameters: list[str] | None = None,
    tags: list[str] | None = None,
    note: str | None = None,
    framework: str | None = None,
    **texts: str | None,
) -> dict[str, Any]:
    """Return the metadata of the options that were given. Raise UsageError for a wrong value."""
    name, _, version = (framework or "").partition("==")
    found = {
        "trained_at": None if trained_at is None else iso_time(trained_at),
        "metrics": numbers("--metric", metrics) or None,
        "parameters": {k: _value(v) for k, v in pairs("--param", parameters).items()} or None,
        "tags": pairs("--tag", tags) or None,
        "notes": note,
        "framework": name or None,
        "framework_version": version or None,
        **texts,
    }
    return {key: value for key, value in found.items() if value is not None}


def merged(file: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """Merge the metadata of a file with the metadata of the options. Options override the file.

    A dict such as the metrics is merged by key: an option replaces only the value of the same key.
    """
    found = read_metadata(file) if file is not None else {}
    for name, value in options.items():
        both = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = {**found[name], **value} if both else value
    return found


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata in a JSON or YAML file. Raise UsageError if the file contains no object."""
    from tidegate.cli.publish import read_json, read_text

    if path.suffix.lower() not in (".yaml", ".yml"):
        found = read_json(path)
    else:
        import yaml

        try:
            found = yaml.safe_load(read_text(path))
        except yaml.YAMLError as error:
            raise UsageError(f"{path} is not YAML: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f'{path} must contain one object, such as {{"metrics": {{"accuracy": 0.98}}}}.')
    return {str(key): _plain(value) for key, value in found.items()}


def iso_time(text: str) -> str:
    """Parse ``2024-05-31`` or a full ISO time. Return a full ISO time. Raise UsageError for other texts."""
    try:
        return parsed(text).astimezone().isoformat()
    except ValueError:
        raise UsageError(f"--trained-at {text!r} is not an ISO date or time, such as 2024-05-31.") from None


def _value(text: str) -> bool | float | str:
    """Parse a parameter as a whole number, another number, true or false; otherwise return the text."""
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"[+-]?\d{1,15}", text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return text
    return number if abs(number) < float("inf") else text


def _plain(value: Any) -> Any:
    """Convert a YAML value to a JSON value: dates become texts."""
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).isoformat()
    if isinstance(value, date):
        return f"{value.isoformat()}T00:00:00Z"
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value
