"""``tidegate context``: the stacks that this user's commands can use."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json
from tidegate.client import contexts as places

if TYPE_CHECKING:
    from tidegate.client.contexts import Context, Contexts

context = typer.Typer(
    name="context",
    help="The stacks that commands can use, by name. `tidegate up` adds its own stack.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The context's name.")]


@context.command("list")
def listed(json: Json = False) -> None:
    """List the contexts; the star marks the current one."""
    contexts = places.read()
    items = [_document(each, contexts) for _, each in sorted(contexts.items.items())]
    rows = [
        ("*" if item["current"] else " ", item["name"], item["url"], item["state_dir"], item["credential"])
        for item in items
    ]
    empty = "No context yet. Start a stack with `make up`, or add one: tidegate context add NAME --url URL"
    columns = ("", "name", "gateway", "state folder", "credential")
    output.show({"items": items}, json, lambda: output.table(rows, columns, empty))


@context.command()
def use(name: Name, json: Json = False) -> None:
    """Make a context the current one. Commands then use its stack.

    There are two exceptions. In a folder of `make up`, commands use that folder's stack. `--context NAME` and
    TIDEGATE_CONTEXT choose another context.
    """
    contexts = places.read()
    found = contexts.get(name)
    changed = contexts.having(found, current=True)
    places.write(changed)
    output.show(_document(found, changed), json, lambda: output.line(f"Commands now use {name}: {found.url}"))


@context.command()
def add(
    name: Name,
    url: Annotated[str, typer.Option(metavar="URL", help="The gateway's address.")] = "",
    key: Annotated[
        str | None, typer.Option(metavar="KEY", help="An API key to store; `-` reads it from stdin.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file with the key, read by each command.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificates (PEM) to trust for this gateway.")
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="State folder of a stack on this machine, instead of a URL."),
    ] = None,
    use: Annotated[bool, typer.Option("--use", help="Make the new context the current one.")] = False,
    json: Json = False,
) -> None:
    """Add a stack, or replace the context of the same name.

    Example: `tidegate context add prod --url https://models.example.com --key -`
    """
    if "/" in name or name in ("", ".", ".."):
        raise UsageError(
            f"{name!r} cannot be the name of a context, because a folder gets the same name. "
            "Choose a name without '/', and not '.' or '..'."
        )
    if bool(url) == (state_dir is not None):
        raise UsageError("Give --url URL, or --state-dir DIR for a stack on this machine.")
    if url and not url.startswith(("http://", "https://")):
        raise UsageError(f"--url {url}: write http://HOST:PORT or https://HOST.")
    if key is not None and key_file is not None:
        raise UsageError("Give --key or --key-file, not both.")
    for file in (key_file, ca):
        if file is not None and not file.is_file():
            raise UsageError(f"{file} does not exist, or is not a file.")
    if state_dir is not None and not places.is_state(state_dir):
        raise UsageError(
            f"{state_dir} is not the state folder of a stack: it has neither `token` nor `run`. "
            "Name the folder that `make up` created, called .tidegate."
        )
    made = places.Context(
        name,
        url=url or _url_of(state_dir),
        state_dir=str(state_dir.absolute()) if state_dir else "",
        key=sys.stdin.readline().strip() if key == "-" else key or "",
        key_file=str(key_file.absolute()) if key_file else "",
        ca=str(ca.absolute()) if ca else "",
    )
    contexts = places.read().having(made, current=use)
    path = places.write(contexts)
    now = (
        "Commands use this context now."
        if contexts.current == name
        else f"To use this context: tidegate context use {name}"
    )
    output.show(_document(made, contexts), json, lambda: output.line(f"Added {name} to {path}. {now}"))


@context.command()
def remove(name: Name, json: Json = False) -> None:
    """Remove a context. The stack itself does not change."""
    contexts = places.read()
    found, left = contexts.get(name), contexts.without(name)
    places.write(left)
    said = f"Removed {name}." + (
        "" if left.current else " No context is current now. Choose one: tidegate context use NAME"
    )
    output.show(_document(found, left), json, lambda: output.line(said))


@context.command()
def show(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help=("The context; default: the current one."))
    ] = None,
    json: Json = False,
) -> None:
    """Show one context; its key is masked."""
    contexts = places.read()
    if not (name or contexts.current):
        raise UsageError("No context is current. `tidegate context list` shows the contexts.")
    document = _document(contexts.get(name or contexts.current), contexts)
    rows = [(field.replace("_", " "), value) for field, value in document.items()]
    output.show(document, json, lambda: output.table(rows, ("what", "value")))


def _document(each: Context, contexts: Contexts) -> dict[str, Any]:
    return {
        "name": each.name,
        "current": contexts.current == each.name,
        "url": each.url,
        "state_dir": each.state_dir,
        "credential": each.credential,
        "ca": each.ca,
    }


def _url_of(state_dir: Path | None) -> str:
    from tidegate.client import started
    from tidegate.kernel.settings.base import Settings

    if state_dir is None:
        return ""
    return Settings(state_dir=state_dir, **started.read(state_dir).address).gateway_url  # type: ignore[arg-type]
