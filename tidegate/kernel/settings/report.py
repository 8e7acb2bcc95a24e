"""Report a process's settings: the current value, its source, and the value after a restart."""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pydantic import ValidationError
from pydantic_settings import SettingsError

from tidegate.kernel.settings.base import COMPUTED, DEFAULT, SERVERS, Settings, secrets_in

# The errors that settings raise for wrong values. The second one is for values that should be JSON.
WRONG = (ValidationError, SettingsError)
MASK = "********"


def report(settings: Settings) -> dict[str, Any]:
    """Return ``items``, one for each setting, and ``problem``, the error that a restart would cause.

    ``on_restart`` of an item: the setting's value after a restart in the same environment; None: the same
    value as now.
    """
    fresh, problem = _after_restart(settings)
    sources = settings.sources()
    items = []
    for name, field in type(settings).model_fields.items():
        now = _value(settings, name)
        then = now if fresh is None else _value(fresh, name)
        items.append(
            {
                "name": f"TIDEGATE_{name.upper()}",
                "value": shown(name, now, sources[name]),
                "source": sources[name],
                "on_restart": None if then == now else shown(name, then, ""),
                "description": field.description or "",
                "shared": name in Settings.model_fields,
            }
        )
    return {"service": type(settings).service, "items": items, "problem": problem}


def _after_restart(settings: Settings) -> tuple[Settings | None, str]:
    sources = settings.sources()
    ours = {f"TIDEGATE_{name.upper()}": source for name, source in sources.items()}
    kept = {
        name: value
        for name, value in os.environ.items()
        if ours.get(name, "environment") == "environment" or name in _FOLDERS
    }
    try:
        return type(settings).of(kept), ""
    except WRONG as error:
        return None, problem_of(error)


_FOLDERS = {"TIDEGATE_STATE_DIR", "TIDEGATE_RUNTIME_DIR"}


def problem_of(error: ValidationError | SettingsError) -> str:
    """Return the errors of the settings in one line, with the names of their environment variables."""
    if isinstance(error, SettingsError):
        name = re.search(r'"([a-z_0-9]+)"', str(error))
        return f"TIDEGATE_{name[1].upper() if name else ''}: the value is not JSON"
    return "; ".join(
        f"TIDEGATE_{'_'.join(map(str, each['loc'])).upper()}: {each['msg']}" if each["loc"] else each["msg"]
        for each in error.errors()
    )


def _value(settings: Settings, name: str) -> str:
    if name in {"state_dir", "runtime_dir"}:
        return str(getattr(settings, name.replace("dir", "path")))
    value = getattr(settings, name)
    return "" if value is None else str(value)


def shown(name: str, value: str, source: str) -> str:
    """Return a value with its secrets masked: a whole token, or the passwords in a URL."""
    if name.endswith(("token", "password", "secret", "key")) and name != "tls_key":
        return MASK if value else ""
    if "://" not in value:
        return value
    try:
        parts = urlsplit(value)
    except ValueError:
        return MASK  # not a valid URL, so its password cannot be found
    if parts.query and secrets_in(value):
        parts = parts._replace(query=_options_masked(parts.query))
    if parts.password is None:
        return urlunsplit(parts) if parts.query else value
    user, _, host = parts.netloc.rpartition("@")
    if name in SERVERS and source in {DEFAULT, COMPUTED}:
        return urlunsplit(parts._replace(netloc=host))  # without the user name, which depends on the service
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}:{MASK}@{host}"))


def _options_masked(query: str) -> str:
    return re.sub(r"=[^&;]*", f"={MASK}", query)
