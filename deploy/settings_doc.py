"""``python -m deploy.settings_doc [--check]``: write ``docs/settings.md`` from the settings classes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic.fields import FieldInfo

from services.autoscaler.settings import AutoscalerSettings
from services.gateway.settings import GatewaySettings
from services.registry.settings import RegistrySettings
from services.router.settings import RouterSettings
from services.worker.settings import WorkerSettings
from tidegate.kernel.settings.base import Settings

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
HEAD = """# Settings

Every setting is an environment variable; an empty value means the default. Permanent settings are in the
file `tidegate.env` in the state folder: `tidegate settings set NAME=VALUE` checks them and writes them. The
environment overrides the file. `tidegate settings` prints the values in force. `make docs` writes this page
from the settings classes.
"""
SECTIONS: tuple[tuple[str, type[Settings]], ...] = (
    ("Shared by every part", Settings),
    ("Gateway", GatewaySettings),
    ("Registry", RegistrySettings),
    ("Router", RouterSettings),
    ("Autoscaler", AutoscalerSettings),
    ("Worker", WorkerSettings),
)


def page() -> str:
    """Return the text of ``docs/settings.md``."""
    parts = [HEAD]
    for title, settings in SECTIONS:
        own = {
            name: field
            for name, field in settings.model_fields.items()
            if settings is Settings or name not in Settings.model_fields
        }
        if own:
            parts.append(f"\n## {title}\n\n| variable | default | what it is |\n|---|---|---|\n")
            parts += [_row(name, field) for name, field in own.items()]
    return "".join(parts)


def _row(name: str, field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    value = json.dumps(value) if isinstance(value, dict | list) else value
    default = "" if value in (None, "") else f"`{value}`"
    return f"| `TIDEGATE_{name.upper()}` | {default} | {field.description} |\n"


def main() -> int:
    """Write the page. With ``--check``, write nothing, and return 1 if the page is not up to date."""
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() != page():
            print("docs/settings.md is not up to date: run `make docs`.")
            return 1
        return 0
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
