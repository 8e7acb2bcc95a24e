"""Commands of the catalogue: ``search``, ``show``, ``describe``, ``card``, ``lineage`` and ``compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli import metadata_options as about
from tidegate.cli import output
from tidegate.cli.api import Control, Doc, control, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, OrderBy, Reference

_COLUMNS = ("model", "version", "alias", "format", "size", "registered", "owner", "metrics", "tags")


def search(
    filter_: Annotated[
        str, typer.Argument(metavar="FILTER", help="Conditions, joined by `and` (docs/catalogue.md).")
    ],
    order_by: OrderBy = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Number of versions to show.")] = 50,
    json: Json = False,
) -> None:
    """Find versions of all models by their metadata.

    Example: `tidegate search 'metrics.accuracy > 0.9 and tags.team = fraud and created > 2026-01-01'`
    """
    items = control().registry.pages("/v1/versions", limit, filter=filter_, order_by=order_by)
    rows = [
        (
            v["model"],
            v["number"],
            v.get("aliases"),
            v["format"],
            output.size_of(v["artifact_size"]),
            output.moment(v["created_at"]),
            *(v["metadata"].get(key) for key in ("owner", "metrics", "tags")),
        )
        for v in items
    ]
    output.show({"items": items}, json, lambda: output.table(rows, _COLUMNS, "No version matches."))


def show(version: Reference, json: Json = False) -> None:
    """Show all facts about one version. Example: `tidegate show digits@3`."""
    found = version_of(control(), version)
    output.show(found, json, lambda: output.table(_lines(found), ("what", "value")))


def describe(
    version: Reference,
    metadata: about.MetadataFile = None,
    trained_at: about.TrainedAt = None,
    metric: about.Metrics = None,
    param: about.Parameters = None,
    tag: about.Tags = None,
    note: about.Note = None,
    owner: about.Owner = None,
    license_: about.License = None,
    framework: about.Framework = None,
    commit: about.Commit = None,
    dataset: about.Dataset = None,
    run: about.Run = None,
    parent: about.Parent = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Remove a value, such as owner, tags.team or metrics.loss; repeatable."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Change the metadata of a version. Values that no option mentions stay the same.

    Example: `tidegate describe digits@3 --metric accuracy=0.98 --tag team=vision --remove notes`
    """
    options = about.stated(
        trained_at=trained_at,
        metrics=metric,
        parameters=param,
        tags=tag,
        note=note,
        owner=owner,
        license=license_,
        framework=framework,
        commit=commit,
        dataset=dataset,
        run=run,
        parent=parent,
    )
    patch = about.merged(metadata, options)
    for name in remove or ():
        _remove(patch, name)
    if not patch:
        raise UsageError(
            "Name a change, such as --tag team=vision. To see the metadata: tidegate show NAME@N"
        )
    plane = control()
    path = path_of(version_of(plane, version))
    changed = plane.registry.patch(path, {"metadata_patch": patch})
    said = f"The metadata of {changed['model']} version {changed['number']} is changed."
    output.show(changed, json, lambda: output.line(said))


def card(
    version: Reference,
    set_: Annotated[
        Path | None, typer.Option("--set", metavar="FILE.md", help="Set the card to this Markdown file.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the card.")] = False,
    json: Json = False,
) -> None:
    """Print, set or delete the model card of a version. A model card is a Markdown text."""
    from tidegate.cli.publish import read_text

    if set_ is not None and delete:
        raise UsageError("Use --set or --delete, not both.")
    text = read_text(set_) if set_ is not None else ""
    plane = control()
    found = version_of(plane, version)
    path, named = f"{path_of(found)}/card", f"{found['model']} version {found['number']}"
    if delete:
        plane.registry.delete(path)
        output.show({"deleted": True}, json, lambda: output.line(f"The card of {named} is deleted."))
    elif set_ is not None:
        stored = plane.registry.put(path, {"text": text})
        output.show(stored, json, lambda: output.line(f"The card of {named} is now {set_}."))
    else:
        stored = plane.registry.get(path)
        output.show(stored, json, lambda: output.line(stored["text"].rstrip("\n")))


def lineage(version: Reference, json: Json = False) -> None:
    """Show from which versions, runs and data a version was made, and which versions were made from it."""
    plane = control()
    about = version_of(plane, version)
    found = plane.registry.get(f"{path_of(about)}/lineage")
    itself = {"version": f"{about['model']}@{about['number']}", "known": True, **about["metadata"]}
    rows = [("ancestor", *_relative(each)) for each in reversed(found["ancestors"])]
    rows += [("itself", *_relative(itself)), *(("child", *_relative(each)) for each in found["children"])]
    output.show(
        found, json, lambda: output.table(rows, ("", "version", "run", "dataset", "commit", "registered"))
    )


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A version: NAME@3, NAME@ALIAS, or NAME.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The version to compare with A.")],
    all_: Annotated[bool, typer.Option("--all", help="Also show values that are equal.")] = False,
    json: Json = False,
) -> None:
    """Compare two versions: metrics, parameters, metadata, signature, size and requirements.

    Examples: `tidegate compare digits@3 digits@5`, `tidegate compare digits digits-small`
    """
    found = control().registry.get("/v1/compare", a=a, b=b)

    def human() -> None:
        names = [f"{found[side]['model']}@{found[side]['number']}" for side in ("a", "b")]
        compared = found["comparison"]
        output.table(comparison_rows(compared, everything=all_), ("what", *names, "delta"), "no difference")
        output.line()
        output.line(compatibility_line(compared["signature"], *names))

    output.show(found, json, human)


def comparison_rows(compared: Doc, *, everything: bool) -> list[Sequence[Any]]:
    """Return the rows of a comparison, numbers first. ``everything``: True to include equal values."""
    rows: list[Sequence[Any]] = [
        (f"{kind}.{delta['name']}", delta["a"], delta["b"], _delta(delta))
        for kind in ("metrics", "capacity")
        for delta in compared[kind]
        if everything or delta["a"] != delta["b"]
    ]
    for kind in ("parameters", "tags", "fields"):
        prefix = "" if kind == "fields" else f"{kind}."
        for each in compared[kind]:
            if everything or not each["same"]:
                values = (_shown(each["name"], each[side]) for side in ("a", "b"))
                rows.append((f"{prefix}{each['name']}", *values, ""))
    rows += [("requirement", line, "", "removed") for line in compared["requirements_removed"]]
    rows += [("requirement", "", line, "added") for line in compared["requirements_added"]]
    return rows


def compatibility_line(signature: Doc, a: str, b: str) -> str:
    """Return a sentence that says whether callers of ``a`` can call ``b``."""
    if not signature["known"]:
        return "The signatures cannot be compared, because a version has none."
    if signature["same"]:
        return "The signatures are the same."
    if signature["compatible"]:
        return f"The signatures differ, and callers of {a} can call {b}."
    return f"Callers of {a} cannot call {b}: {'; '.join(signature['breaking'])}."


def version_of(plane: Control, reference: str) -> Doc:
    """Return the version that a reference names, such as ``digits@3`` or ``digits``."""
    model, _, version = reference.partition("@")
    found: Doc = plane.registry.get(f"/v1/models/{part(model)}/versions/{part(version or 'latest')}")
    return found


def path_of(version: Doc) -> str:
    """Return a version's path in the registry's API."""
    return f"/v1/models/{part(version['model'])}/versions/{version['number']}"


def _lines(version: Doc) -> list[tuple[str, Any]]:
    described = version["metadata"]
    lines: list[tuple[str, Any]] = [
        ("version", f"{version['model']}@{version['number']}"),
        ("alias", version.get("aliases")),
        ("stage", version.get("stage")),
        ("verification", (version.get("verification") or {}).get("state")),
        ("format", version["format"]),
        ("size", output.size_of(version["artifact_size"])),
        ("sha256", version["artifact_sha256"]),
        ("file", version["filename"]),
        ("registered", output.moment(version["created_at"])),
        ("trained", output.moment(described.get("trained_at"))),
    ]
    for name, value in described.items():
        if name in ("metrics", "parameters", "tags"):
            lines += [(f"{name}.{key}", each) for key, each in value.items()]
        elif name != "trained_at" and value not in (None, "", []):
            lines.append((name, value))
    if signature := version["signature"]:
        for side in ("inputs", "outputs"):
            lines += [(side[:-1], f"{t['name']} {t['datatype']} {t['shape']}") for t in signature[side]]
        lines.append(("max_batch_size", signature.get("max_batch_size")))
    lines += [("requirement", line) for line in version["requirements"]]
    lines += [("trusted", name) for name in version.get("trusted", ())]
    return lines


def _relative(each: Doc) -> tuple[Any, ...]:
    return (*(each.get(key) for key in ("version", "run", "dataset", "commit")), each["known"])


def _remove(patch: Doc, name: str) -> None:
    collection, dot, key = name.partition(".")
    if not dot:
        patch[collection] = None
    else:
        patch.setdefault(collection, {})[key] = None


def _delta(delta: Doc) -> str:
    if delta["delta"] is None:
        return ""
    percent = "" if delta["percent"] is None else f" ({delta['percent']:+.3g} %)"
    return f"{delta['delta']:+.3g}{percent}"


def _shown(name: str, value: Any) -> Any:
    if value is None:
        return None
    match name:
        case "artifact_size":
            return output.size_of(value)
        case "artifact_sha256":
            return value[:12]
        case "created_at" | "trained_at":
            return output.moment(value)
    text = output.text_of(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
