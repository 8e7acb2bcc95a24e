"""``tidegate settings``: the settings that the running services use, and those in tidegate.env."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli import exit_codes as exits
from tidegate.cli import output, source_checkout
from tidegate.cli.api import Control, Doc
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json
from tidegate.client.errors import Unreachable
from tidegate.kernel.errors import BadRequest, TidegateError

if TYPE_CHECKING:
    from tidegate.kernel.settings.base import Settings

settings = typer.Typer(
    name="settings",
    help="Show the settings that the running services use. `set` and `unset` change tidegate.env.",
    invoke_without_command=True,
)

ALL = "all"
Values = Annotated[list[str], typer.Argument(metavar="NAME=VALUE...", help="The TIDEGATE_ is optional.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="The TIDEGATE_ is optional.")]


@settings.callback()
def listed(
    context: typer.Context,
    grep: Annotated[
        str | None,
        typer.Option(
            "--grep", "-g", metavar="WORD", help="Only settings with this word in their name or description."
        ),
    ] = None,
    changed: Annotated[
        bool,
        typer.Option(
            "--changed", help="Only settings that differ from the default or that a restart changes."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """List the settings that the running services use. If none runs, list those of the next start.

    The column `from` is the source of a value: default, computed (from other settings), file (tidegate.env in
    the state folder) or environment.
    """
    if context.invoked_subcommand is not None:
        return

    reports, problems, running = _reports()
    items = [item for item in merged(reports) if fits(item, grep, changed=changed)]
    document = {"running": running, "items": items, "problems": problems}

    def human() -> None:
        rows = [
            (i["name"], i["service"], i["value"], i["source"], i["on_restart"], i["description"])
            for i in items
        ]
        columns = ("setting", "service", "value", "from", "on restart", "description")
        output.table(rows, columns, "No setting matches.")
        if running and any(item["source"] == "environment" for item in items):
            output.say(
                "A value from the environment is lost if `tidegate up` runs without it. "
                "To keep it: tidegate settings set NAME=VALUE",
                style="dim",
            )
        if not running:
            output.say("No service runs. These are the settings that `tidegate up` would use.")
        for problem in problems:
            output.say(problem, style="red")

    output.show(document, json, human)
    if problems:
        raise typer.Exit(exits.UNREACHABLE if running else exits.ERROR)


@settings.command("set")
def set_(values: Values, json: Json = False) -> None:
    """Store settings in tidegate.env of the state folder: `tidegate settings set AUTH=required`.

    `tidegate up` and the services read the file. The environment overrides it.
    """
    given: dict[str, str | None] = {}
    for each in values:
        name, equals, value = each.partition("=")
        if not equals:
            raise UsageError(f"{each!r}: write NAME=VALUE. To remove a setting: tidegate settings unset NAME")
        given[full(name)] = value
    _change("settings set", given, json)


@settings.command("unset")
def unset(names: Names, json: Json = False) -> None:
    """Remove settings from tidegate.env of the state folder."""
    _change("settings unset", {full(name): None for name in names}, json)


def full(name: str) -> str:
    """Return the environment variable of a setting: TIDEGATE_AUTH for `auth`."""
    upper = name.strip().upper().replace("-", "_")
    return upper if upper.startswith("TIDEGATE_") else f"TIDEGATE_{upper}"


def merged(reports: Iterable[Doc]) -> list[Doc]:
    """Return one item for each setting, or one for each value if the services' values differ."""
    found: dict[tuple[str, str, str, str | None], Doc] = {}
    for report in reports:
        for item in report["items"]:
            key = (item["name"], item["value"], item["source"], item["on_restart"])
            if (known := found.get(key)) is not None:
                known["services"].append(report["service"])
            else:
                found[key] = {**item, "services": [report["service"]]}
    items = list(found.values())
    names = [item["name"] for item in items]
    for item in items:
        alone = names.count(item["name"]) == 1
        item["service"] = ALL if item["shared"] and alone else ", ".join(item.pop("services"))
        item.pop("services", None)
    return sorted(items, key=lambda item: (not item.pop("shared"), names.index(item["name"])))


def fits(item: Doc, word: str | None, *, changed: bool) -> bool:
    """Return True if the name or the description of the item contains the word.

    If ``changed`` is True, one more condition must hold: the value comes from the file or the environment, or
    a restart will change the value.
    """
    if changed and item["source"] in {"default", "computed"} and item["on_restart"] is None:
        return False
    text = f"{item['name']} {item['description']}".lower()
    return word is None or word.lower().replace("-", "_") in text or word.lower() in text


def _reports() -> tuple[list[Doc], list[str], bool]:
    """Return the settings reports, the error messages, and True if running services made the reports.

    If no service answers and Tidegate's source is here, the reports show the settings of the next start. Then
    the third value is False.
    """
    from tidegate.cli.api import Control, settings

    found = settings()
    plane = Control(found)
    reports, problems, away = [], [], 0
    for service, path in _doors(plane):
        try:
            reports.append(service.get(path))
        except Unreachable as error:
            away += 1
            problems.append(error.message)
        except TidegateError as error:
            problems.append(f"{service.name}: {error.message}")
    if away == len(_doors(plane)) and source_checkout.root() is not None:
        return *_planned(found), False
    problems += [f"{r['service']}: after a restart, {r['problem']}" for r in reports if r["problem"]]
    return reports, list(dict.fromkeys(problems)), True


def _doors(plane: Control) -> Sequence[tuple[Any, str]]:
    own = "/v1/settings"
    return (
        (plane.gateway, own),
        (plane.registry, own),
        (plane.router, own),
        (plane.autoscaler, own),
        (plane.autoscaler, f"{own}/workers"),
    )


def _planned(found: Settings) -> tuple[list[Doc], list[str]]:
    from deploy.settings_check import planned, problems

    before = os.environ.get("TIDEGATE_STATE_DIR")
    os.environ["TIDEGATE_STATE_DIR"] = str(found.state_path)
    try:
        if wrong := problems(found.file_values):
            return [], [f"{found.state_path / 'tidegate.env'}: {each}" for each in wrong]
        return planned(), []
    finally:
        if before is None:
            del os.environ["TIDEGATE_STATE_DIR"]
        else:
            os.environ["TIDEGATE_STATE_DIR"] = before


def check_file(found: Settings) -> None:
    """Raise BadRequest if tidegate.env in the state folder has a wrong name or value."""
    if not found.file_values:
        return
    from deploy.settings_check import problems

    if wrong := problems(found.file_values):
        where = found.state_path / "tidegate.env"
        raise BadRequest(f"{where} is wrong: {' '.join(wrong)} Correct it: tidegate settings set NAME=VALUE")


def check_environment(found: Settings, environ: Mapping[str, str]) -> None:
    """Raise BadRequest if a ``TIDEGATE_*`` variable of this command has a wrong value."""
    from deploy.settings_check import OUTSIDE, names, problems

    known = names()
    given = {name: value for name, value in environ.items() if name in known and name not in OUTSIDE}
    if wrong := problems({**found.file_values, **given}):
        raise BadRequest(f"A variable of the environment is wrong: {' '.join(wrong)}")


def _restart(services: list[str], children: set[str], *, everywhere: bool) -> str:
    """Return the command that the user must run so that these services use a changed setting.

    ``children``: the names of the stack's processes. ``everywhere``: True if all services read the setting.
    """
    from tidegate.stack.plan import CONTROL

    if everywhere:
        return (
            "`tidegate restart`. If it refuses, restart the whole stack: `tidegate down`, then `tidegate up`."
        )
    # A worker gets its settings from the autoscaler that starts it. So the autoscaler must restart.
    names = {"autoscaler" if name == "worker" else name for name in services}
    if CONTROL in children:
        names = {name if name in children else CONTROL for name in names}
    later = " Only replicas that start later use it." if "worker" in services else ""
    return f"`tidegate restart {' '.join(sorted(names))}`.{later}"


def _change(command: str, values: dict[str, str | None], json: bool) -> None:
    source_checkout.require(command)
    from deploy.settings_check import OUTSIDE, names, problems, unknown
    from tidegate.cli.own_stack import own_folder
    from tidegate.client import started
    from tidegate.kernel.settings import file as settings_file
    from tidegate.stack.record import RunFolder

    state = own_folder()
    known, before = names(), settings_file.read(state)
    new = {name: value for name, value in values.items() if value is not None}
    # Old and new values are checked together, because some settings depend on each other.
    kept = {name: value for name, value in before.items() if name in known and name not in values}
    wrong = [unknown(name) for name in values if name not in known and name not in {*before, *OUTSIDE}]
    wrong += problems({**kept, **new})
    if wrong:
        raise BadRequest(f"Nothing was written: {' '.join(dict.fromkeys(wrong))}")
    path = settings_file.change(state, values)
    services = sorted({service for name in values for service in known.get(name, ())})
    everywhere = any(not known.get(name) for name in values)
    record = RunFolder(state / "run").read()
    supervisor, children = record.supervisor, {child.name for child in record.children}
    running = supervisor is not None and supervisor.alive()
    hidden = [name for name in new if os.environ.get(name)]
    at_start = started.read(state).environment if running else {}
    overridden = [
        name for name, value in new.items() if name not in hidden and at_start.get(name, value) != value
    ]
    document = {
        "file": str(path),
        "changed": sorted(values),
        "services": [ALL] if everywhere else services,
        "restart": running,
        "hidden": hidden,
        "overridden": overridden,
    }

    def human() -> None:
        output.line(f"Wrote {path}.")
        parts = "all services" if everywhere else f"the {' and the '.join(services)}"
        if running:
            output.line(
                f"To use the change in {parts}: {_restart(services, children, everywhere=everywhere)}"
            )
        else:
            output.line("The next `tidegate up` uses the change.")
        for name in hidden:
            output.say(
                f"{name} is also set in this shell's environment, which overrides the file. Unset it there.",
                style="yellow",
            )
        for name in overridden:
            output.say(
                f"{name}={at_start[name]} was set in the environment of the last start, which overrides the "
                f"file. Restart with the new value ({name}={new[name]} tidegate restart), or start the stack "
                "without the variable: `tidegate down`, then `tidegate up`.",
                style="yellow",
            )

    output.show(document, json, human)
