"""``tidegate uploads``: the caller's unfinished uploads of large files."""

from __future__ import annotations

from typing import Annotated

import typer

from tidegate.cli import output
from tidegate.cli.api import control, part
from tidegate.cli.options import Json


def uploads(
    delete: Annotated[
        str | None, typer.Option(metavar="ID", help="Delete this upload, and the bytes that have arrived.")
    ] = None,
    json: Json = False,
) -> None:
    """List your uploads of large files, or delete one: `tidegate uploads --delete ID`.

    To continue an interrupted upload, deploy the same file again. The registry keeps an unfinished upload for
    a day.
    """
    registry = control().registry
    if delete is not None:
        registry.delete(f"/v1/uploads/{part(delete)}")
        output.show({"deleted": delete}, json, lambda: output.line(f"Deleted upload {delete}."))
        return
    items = registry.items("/v1/uploads")
    rows = [
        (
            item["id"],
            f"{output.size_of(item['offset'])} of {output.size_of(item['size'])}",
            item["state"],
            item["sha256"][:12],
            item["problem"],
        )
        for item in items
    ]
    columns = ("id", "arrived", "state", "sha256", "problem")
    output.show({"items": items}, json, lambda: output.table(rows, columns, "No upload is in progress."))
