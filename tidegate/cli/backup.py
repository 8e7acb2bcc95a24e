"""``tidegate backup`` and ``tidegate restore``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli import api, output, source_checkout
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json
from tidegate.cli.progress import Steps
from tidegate.kernel.errors import Conflict

if TYPE_CHECKING:
    from tidegate.stack.backup_file import Manifest


def backup(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="The file to write; compressed if it ends with .gz or .tgz."),
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    json: Json = False,
) -> None:
    """Back up the stack while it runs: database, models, jobs, keys, secrets and settings.

    The file holds secrets, and only you can read it. Example: tidegate backup friday.tgz
    """
    source_checkout.require("backup")
    from tidegate import stack
    from tidegate.cli.own_stack import StackFailed, own
    from tidegate.stack.backup import backup as write

    if file.is_dir():
        raise UsageError(f"{file} is a folder. Name a file in the folder.")
    if file.exists() and not force:
        raise Conflict(f"{file} exists already. Name another file, or replace it with --force.")
    began = time.monotonic()
    with Steps().shown() as steps:
        try:
            manifest = write(
                own(starting=False), file.absolute(), lambda part, text: steps.change(part, "done", text)
            )
        except (stack.StackError, OSError) as error:
            raise StackFailed(f"No backup was made. {error}") from None
    size = file.stat().st_size

    def human() -> None:
        took = time.monotonic() - began
        output.line(f"{file}: {output.size_of(size)}, {len(manifest.files)} files, {took:.1f} s.")
        for part, why in manifest.left_out.items():
            output.line(f"  not in the backup: {part}, because {why}", style="yellow")
        output.line(f"Restore it with: tidegate restore {file}")

    output.show({"file": str(file), "bytes": size, **_summary(manifest)}, json, human)


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Made by `tidegate backup`.")],
    into: Annotated[
        Path | None,
        typer.Option("--into", metavar="DIR", help="The state folder; default: the folder in the settings."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Stop a running stack, and move its files aside. Replace tables in PostgreSQL."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Restore a backup into a state folder. To start the stack afterwards, run `tidegate up`.

    The checksums are verified first. A folder that has data is refused. With --force, the folder's data is
    moved aside, not deleted, but tables in PostgreSQL are replaced.
    Example: tidegate restore friday.tgz --into /srv/tidegate
    """
    source_checkout.require("restore")
    from tidegate import stack
    from tidegate.cli.own_stack import StackFailed, own
    from tidegate.stack.restore import restore as read

    found = own(starting=True) if into is None else api.settings_with({"state_dir": into.absolute()})
    with Steps().shown() as steps:
        try:
            manifest = read(
                found,
                file.absolute(),
                force=force,
                on_step=lambda part, text: steps.change(part, "done", text),
            )
        except (stack.StackError, OSError) as error:
            raise StackFailed(f"Nothing was restored. {error}") from None

    def human() -> None:
        output.line(f"{found.state_path} is restored to its state at {output.moment(manifest.created_at)}.")
        for part, why in manifest.left_out.items():
            output.line(f"  not in the backup: {part}, because {why}", style="yellow")
        where = f"TIDEGATE_STATE_DIR={found.state_path} " if into is not None else ""
        output.line(f"Start the stack: {where}tidegate up")

    output.show({"state_dir": str(found.state_path), **_summary(manifest)}, json, human)


def _summary(manifest: Manifest) -> dict[str, Any]:
    document = manifest.to_json()
    files: dict[str, Any] = document.pop("files")
    return {**document, "files": len(files), "bytes_of_files": sum(each["size"] for each in files.values())}
