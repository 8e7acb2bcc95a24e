"""Find the stack that a command calls.

A stack is one installation of Tidegate's services. A context is a stack that the user has named.

The contexts are in ``contexts.json`` in the user's config folder. Only the user can read the file. `tidegate
up` adds its stack, and `tidegate context add` adds a stack on another machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from tidegate.kernel.errors import BadRequest, NotFound
from tidegate.kernel.settings.file import is_trusted

STATE = ".tidegate"
# Environment variables that name the stack. If one of them is set, the current context is not used.
_STATED = ("TIDEGATE_STATE_DIR", "TIDEGATE_GATEWAY_URL")


@dataclass(frozen=True, slots=True)
class Context:
    """A named stack.

    ``state_dir``: the state folder, which contains the stack's service token; empty for a stack on another
    machine.
    """

    name: str
    url: str = ""
    state_dir: str = ""
    key: str = ""
    key_file: str = ""
    ca: str = ""

    @property
    def credential(self) -> str:
        """Return a short description of the credential that a command sends to the gateway."""
        if self.state_dir:
            return "service token"
        return f"key in {self.key_file}" if self.key_file else "key" if self.key else "none"


@dataclass(frozen=True, slots=True)
class Contexts:
    """The contexts by name, and the name of the current one."""

    current: str = ""
    items: dict[str, Context] = field(default_factory=dict)

    def get(self, name: str) -> Context:
        """Return the context with this name.

        If the name is unknown, raise NotFound with a list of all names.
        """
        if name not in self.items:
            known = f"There are: {', '.join(sorted(self.items))}." if self.items else "There is none yet."
            raise NotFound(
                f"There is no context {name!r}. {known} Add it: tidegate context add NAME --url URL."
            )
        return self.items[name]

    def having(self, context: Context, *, current: bool) -> Contexts:
        """Return the contexts with ``context`` added. It replaces a context of the same name.

        ``context`` becomes the current one if ``current`` is true, or if there is no current context.
        """
        items = {**self.items, context.name: context}
        return Contexts(context.name if current or not self.current else self.current, items)

    def without(self, name: str) -> Contexts:
        """Return the contexts without the context ``name``. Raise NotFound for an unknown name."""
        self.get(name)
        items = {each: context for each, context in self.items.items() if each != name}
        return Contexts("" if self.current == name else self.current, items)

    def name_for(self, state: Path) -> str:
        """Return the name of a state folder's context.

        If this folder has no context yet, return a name that no context uses.
        """
        for context in self.items.values():
            if context.state_dir == str(state):
                return context.name
        stem = (state.parent.name if state.name == STATE else state.name) or "local"
        names = [stem, *(f"{stem}-{number}" for number in range(2, len(self.items) + 3))]
        return next(name for name in names if name not in self.items)


@dataclass(frozen=True, slots=True)
class Place:
    """The stack that a command uses.

    ``fields``: the settings to reach it, by name. ``context``: the name of its context; empty if it has none.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    context: str = ""


def config_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the user's folder for Tidegate's configuration."""
    if own := environ.get("TIDEGATE_CONFIG_DIR"):
        return Path(own)
    return Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "tidegate"


def read(folder: Path | None = None) -> Contexts:
    """Return the user's contexts.

    Without a file, return no contexts. Raise BadRequest for an unreadable file.
    """
    path = (folder or config_dir()) / "contexts.json"
    try:
        found = orjson.loads(path.read_bytes())
        items = {name: Context(name=name, **fields) for name, fields in found["contexts"].items()}
        return Contexts(str(found.get("current") or ""), items)
    except FileNotFoundError:
        return Contexts()
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadRequest(
            f"{path} is not a file of contexts. Move it away, then add your contexts again."
        ) from None


def write(contexts: Contexts, folder: Path | None = None) -> Path:
    """Write the user's contexts to a file that only the user can read. Return its path.

    Raise BadRequest if the file cannot be written.
    """
    path = (folder or config_dir()) / "contexts.json"
    items = {name: asdict(context) for name, context in sorted(contexts.items.items())}
    for fields in items.values():
        del fields["name"]
    document = {"current": contexts.current, "contexts": items}
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(orjson.dumps(document, option=orjson.OPT_INDENT_2))
        fresh.replace(path)
    except OSError as error:
        raise BadRequest(f"{path} cannot be written: {error.strerror}.") from None
    return path


def find(chosen: str, environ: Mapping[str, str], here: Path, contexts: Contexts) -> Place:
    """Return the stack that a command uses. Raise NotFound for an unknown context.

    These sources are tried in order, and the first one that names a stack decides: the context ``chosen``,
    the environment variables, the stack in the folder ``here``, the current context.
    """
    if chosen:
        return _place(contexts.get(chosen))
    if environ.get("TIDEGATE_CONTEXT"):
        return _below(_place(contexts.get(environ["TIDEGATE_CONTEXT"])), environ)
    if any(environ.get(name) for name in _STATED):
        stated = environ.get("TIDEGATE_STATE_DIR")
        return _below(Place(_remembered(Path(stated))), environ) if stated else Place()
    if is_state(here / STATE):
        _check_owner(here / STATE)
        return _below(Place(_remembered(here / STATE)), environ)
    if contexts.current in contexts.items:
        return _below(_place(contexts.items[contexts.current]), environ)
    return Place()


def find_own(
    chosen: str,
    environ: Mapping[str, str],
    here: Path,
    contexts: Contexts,
    source: Path | None,
    *,
    starting: bool,
) -> Path | None:
    """Return the state folder of the stack to start or stop on this machine.

    The first of these that exists decides:

    - the context ``chosen``, or else the context that TIDEGATE_CONTEXT names
    - the variable TIDEGATE_STATE_DIR. Then return None, because the calling code reads this variable itself
    - the stack in the folder ``here``
    - only to stop a stack: the stack of the current context, if it is on this machine
    - the stack in ``source``, the folder of Tidegate's source code

    If none exists, return None. Raise BadRequest for a context of another machine, NotFound for an unknown
    context.
    """
    name = chosen or environ.get("TIDEGATE_CONTEXT", "")
    if not name and environ.get("TIDEGATE_STATE_DIR"):
        return None
    if not name and (here / STATE).is_dir():
        return here / STATE
    current = contexts.items.get(contexts.current)
    if name or (current is not None and current.state_dir and not starting):
        context = contexts.get(name or contexts.current)
        if not context.state_dir:
            raise BadRequest(
                f"Context {context.name!r} is not on this machine, so it cannot be started or stopped here."
            )
        return Path(context.state_dir)
    return source / STATE if source is not None else None


def register(state: Path, url: str) -> str:
    """Make the stack of a state folder the current context, and return the context's name.

    Raise BadRequest if the file of contexts cannot be read or written.
    """
    contexts = read()
    name = contexts.name_for(state)
    write(contexts.having(Context(name, url=url, state_dir=str(state)), current=True))
    return name


def is_state(folder: Path) -> bool:
    """Return True if a stack was started with this state folder."""
    try:
        return (folder / "token").is_file() or (folder / "run").is_dir()
    except OSError:
        return False


def _check_owner(state: Path) -> None:
    if not is_trusted(state.stat().st_uid, os.geteuid()):
        raise BadRequest(
            f"{state} belongs to another user, who would get your key and your requests. To use that stack, "
            f"set TIDEGATE_STATE_DIR={state}. Else go to another folder."
        )


def _below(place: Place, environ: Mapping[str, str]) -> Place:
    fields = {k: v for k, v in place.fields.items() if not environ.get(f"TIDEGATE_{k.upper()}")}
    return replace(place, fields=fields)


def _place(context: Context) -> Place:
    if context.state_dir:
        state = Path(context.state_dir)
        if not state.is_dir():
            raise NotFound(
                f"The folder of context {context.name!r}, {state}, does not exist any more. "
                f"Remove the context: tidegate context remove {context.name}."
            )
        return Place({"state_dir": state, **_remembered(state)}, context.name)
    # The stack is on another machine. Use a state folder without a token, so that the service token of this
    # machine is not sent to that stack.
    fields: dict[str, Any] = {
        "gateway_url": context.url,
        "state_dir": config_dir() / "elsewhere" / context.name,
    }
    if key := _key_of(context):
        fields["api_key"] = key
    if context.ca:
        fields["tls_ca"] = context.ca
    return Place(fields, context.name)


def _key_of(context: Context) -> str:
    if not context.key_file:
        return context.key
    try:
        return Path(context.key_file).read_text().strip()
    except OSError as error:
        raise BadRequest(
            f"The key of context {context.name!r} cannot be read from {context.key_file}: {error.strerror}."
        ) from None


def _remembered(state: Path) -> dict[str, Any]:
    from tidegate.client import started

    return dict(started.read(state).address)
