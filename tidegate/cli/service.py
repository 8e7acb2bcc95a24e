"""``tidegate service``: a systemd unit that starts the stack after a reboot."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidegate.cli import output, source_checkout
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json
from tidegate.kernel.errors import NotFound, TidegateError

if TYPE_CHECKING:
    from tidegate.stack.unit import Unit

service = typer.Typer(
    name="service",
    help="Let systemd start the stack at boot. Example: sudo tidegate service install",
    no_args_is_help=True,
)

BOOTED = Path("/run/systemd/system")
SYSTEM_UNITS = Path("/etc/systemd/system")
SHOWN = ("LoadState", "ActiveState", "SubState", "UnitFileState", "MainPID", "NRestarts", "StatusText")

UserWide = Annotated[
    bool | None,
    typer.Option(
        "--user/--system",
        help="Use the user's own systemd, or the machine's; default: --system for root, else --user.",
    ),
]
Name = Annotated[str, typer.Option("--name", help="The unit's name; several stacks need different names.")]


class ServiceFailed(TidegateError):
    """The error if systemd does not run, or if systemctl is not installed or fails."""

    reason = "service"


@service.command()
def install(
    user: UserWide = None,
    name: Name = "tidegate",
    run_as: Annotated[
        str | None,
        typer.Option(
            "--run-as",
            metavar="USER",
            help="User of a system-wide unit; default: the owner of the state folder.",
        ),
    ] = None,
    start: Annotated[bool, typer.Option("--start/--no-start", help="Also start the stack now.")] = True,
    print_: Annotated[bool, typer.Option("--print", help="Only print the unit.")] = False,
    json: Json = False,
) -> None:
    """Write and enable the stack's systemd unit, with this shell's TIDEGATE_ settings but no secrets."""
    from tidegate.stack.unit import text_of

    unit, left_out = described(user, name, run_as)
    for key in left_out:
        output.say(
            f"{key} is left out of the unit, because every user can read the unit. "
            f"To keep the setting: tidegate settings set {key}=...",
            style="yellow",
        )
    if print_:
        print(text_of(unit), end="")
        return
    place = place_of(unit)
    if start and not BOOTED.is_dir():
        raise ServiceFailed(
            "systemd does not run on this machine, so nothing was installed. --print shows the unit. "
            "--no-start only writes and enables it."
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text_of(unit))
    place.chmod(0o644)
    if BOOTED.is_dir():
        systemctl(unit.system, "daemon-reload")
    systemctl(unit.system, "enable", place.name)
    told = [f"{place} is written and enabled. From now on, systemd starts the stack."]
    if start and _runs_by_hand():
        told.append(
            "The stack runs already, without systemd. "
            f"To restart it under systemd: tidegate down && {_typed(unit, 'start')}"
        )
    elif start:
        systemctl(unit.system, "start", place.name)
        told.append("The stack is started and ready.")
    if not unit.system:
        told.append("The stack starts at your first login. To start it at boot: loginctl enable-linger")
    document = {"unit": str(place), "state_dir": str(unit.state), "user": unit.user or None, "told": told}

    def human() -> None:
        for text in told:
            output.line(text)

    output.show(document, json, human)


@service.command()
def uninstall(user: UserWide = None, name: Name = "tidegate", json: Json = False) -> None:
    """Stop the stack and remove its unit. The data stays."""
    unit, _ = described(user, name, None)
    place = place_of(unit)
    _require(place)
    if BOOTED.is_dir():
        systemctl(unit.system, "disable", "--now", place.name)
    else:
        systemctl(unit.system, "disable", place.name)
    place.unlink()
    if BOOTED.is_dir():
        systemctl(unit.system, "daemon-reload")
    output.show({"removed": str(place)}, json, lambda: output.line(f"{place} is removed. The data stays."))


@service.command()
def status(user: UserWide = None, name: Name = "tidegate", json: Json = False) -> None:
    """Show the state of the unit, as systemd reports it."""
    unit, _ = described(user, name, None)
    place = place_of(unit)
    _require(place)
    told: dict[str, str] = {}
    if BOOTED.is_dir():
        shown = systemctl(unit.system, "show", place.name, *(f"--property={each}" for each in SHOWN))
        told = dict(each.split("=", 1) for each in shown.splitlines() if "=" in each)
    else:
        told = {"ActiveState": "unknown: systemd does not run on this machine"}
    document = {"unit": str(place), **told}
    output.show(document, json, lambda: output.table(list(document.items()), ("what", "is")))


@service.command(hidden=True)
def run() -> None:
    """Run the stack in the foreground, and notify systemd when the stack is ready.

    The unit runs this command.
    """
    source_checkout.require("service run")
    from tidegate import stack
    from tidegate.cli.own_stack import StackFailed, own

    try:
        stack.run(own(starting=True))
    except stack.StackError as error:
        raise StackFailed(str(error)) from None


def described(user: bool | None, name: str, run_as: str | None) -> tuple[Unit, list[str]]:
    """Return the stack's unit, and the names of the secret settings that the unit leaves out.

    Raise UsageError if an option or a setting cannot be used in a unit.
    """
    source_checkout.require("service install")
    from tidegate.cli.own_stack import own as own_settings
    from tidegate.client import started
    from tidegate.stack.unit import Unit, check_name, text_of

    own = os.geteuid() != 0 if user is None else user
    if own and run_as:
        raise UsageError("--run-as needs --system, because a user's own systemd always runs as that user.")
    try:
        bare = check_name(name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    found = own_settings(starting=False)
    account = None if own else _account(run_as, found.state_path)
    # The unit also gets the settings from the environment of the last start: this shell may lack them.
    kept = started.read(found.state_path).environment | started.of(found, os.environ).environment
    unit = Unit(
        state=found.state_path,
        python=Path(sys.executable),
        folder=found.state_path.parent,
        user=account.pw_name if account else "",
        group=grp.getgrgid(account.pw_gid).gr_name if account else "",
        environment={**kept, "TIDEGATE_RUNTIME_DIR": str(found.runtime_path)},
        name=bare,
    )
    try:
        text_of(unit)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return unit, secrets_of(os.environ)


def secrets_of(environ: Mapping[str, str]) -> list[str]:
    """Return the names of this shell's secret settings. The unit leaves them out."""
    from tidegate.kernel.settings.base import is_secret

    ours = {key: value for key, value in environ.items() if key.startswith("TIDEGATE_") and value}
    return sorted(key for key, value in ours.items() if is_secret(key, value))


def place_of(unit: Unit) -> Path:
    """Return the path of the unit's file."""
    if unit.system:
        return SYSTEM_UNITS / f"{unit.name}.service"
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "systemd" / "user" / f"{unit.name}.service"


def systemctl(system: bool, *arguments: str) -> str:
    """Run systemctl and return its output.

    Raise ServiceFailed if systemctl is not installed or fails. The error's message contains systemctl's
    message.
    """
    command = ["systemctl", *([] if system else ["--user"]), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ServiceFailed(
            "systemctl is not installed. To see the unit: tidegate service install --print"
        ) from None
    if done.returncode:
        shown = f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}"
        more = " See: journalctl -u tidegate" if "start" in arguments else ""
        raise ServiceFailed(f"{shown}.{more}")
    return done.stdout


def _account(run_as: str | None, state: Path) -> pwd.struct_passwd:
    if os.geteuid() != 0:
        raise UsageError("A unit for the whole machine needs root. Use sudo, or --user.")
    try:
        if run_as is not None:
            return pwd.getpwnam(run_as)
        return pwd.getpwuid(next(each for each in (state, *state.parents) if each.exists()).stat().st_uid)
    except KeyError:
        raise UsageError(
            f"There is no user {run_as or 'that owns ' + str(state)}: give --run-as USER."
        ) from None


def _require(place: Path) -> None:
    if not place.is_file():
        raise NotFound(f"{place} does not exist. To write it: tidegate service install")


def _runs_by_hand() -> bool:
    from tidegate import stack
    from tidegate.cli.own_stack import own

    return stack.state(own(starting=False)).supervisor is not None


def _typed(unit: Unit, *arguments: str) -> str:
    words: Sequence[str] = ("systemctl", *([] if unit.system else ["--user"]), *arguments, unit.name)
    return " ".join(words)
