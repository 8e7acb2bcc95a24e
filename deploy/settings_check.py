"""Check settings before they are written to a file, or before a stack starts with them."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Mapping
from typing import Any

from deploy.settings_doc import SECTIONS
from tidegate.kernel.settings.base import Settings
from tidegate.kernel.settings.report import WRONG, problem_of, report

# These variables decide which settings file is read, so the file cannot contain them.
OUTSIDE = {"TIDEGATE_STATE_DIR", "TIDEGATE_CONFIG_DIR", "TIDEGATE_CONTEXT"}


def names() -> dict[str, tuple[str, ...]]:
    """Return the environment variable of every setting, with the services that read the variable.

    An empty tuple means that all services read it.
    """
    found: dict[str, tuple[str, ...]] = {}
    for _, settings in SECTIONS:
        for field in settings.model_fields:
            name = f"TIDEGATE_{field.upper()}"
            if field in Settings.model_fields:
                found[name] = ()
            else:
                found[name] = (*found.get(name, ()), settings.service)
    return found


def unknown(name: str) -> str:
    """Return the error message for a name that is not a setting."""
    near = difflib.get_close_matches(name, names(), 3, 0.6)
    meant = f" Did you mean {' or '.join(near)}?" if near else " `tidegate settings` lists all of them."
    return f"There is no setting {name}.{meant}"


def misspelled(environ: Mapping[str, str]) -> dict[str, str]:
    """Return each variable that is not a setting but resembles one, with the setting that it resembles."""
    known = names()
    found = {}
    for name in environ:
        if name.startswith("TIDEGATE_") and name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.9)
            if near:
                found[name] = near[0]
    return found


def problems(values: Mapping[str, str]) -> list[str]:
    """Return the problems of these settings, one sentence each."""
    known = names()
    found = [unknown(name) for name in values if name not in known and name not in OUTSIDE]
    found += [
        f"{name} decides which settings file is read, so the file cannot contain it: set it in the "
        "environment."
        for name in values
        if name in OUTSIDE
    ]
    right = {name: value for name, value in values.items() if name in known and name not in OUTSIDE}
    with tempfile.TemporaryDirectory() as nowhere:
        for _, settings in SECTIONS:
            try:
                settings.of({**right, "TIDEGATE_STATE_DIR": nowhere})
            except WRONG as error:
                found.append(f"{problem_of(error)}.")
    return list(dict.fromkeys(found))


def planned() -> list[dict[str, Any]]:
    """Return each service's report on its settings, as if the service were started in this environment."""
    return [report(settings()) for _, settings in SECTIONS if settings is not Settings]
