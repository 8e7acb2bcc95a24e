"""``restart``: start the services again one after another, with the current settings.

The command writes a request to ``run/restart-request.json`` and sends SIGUSR1 to the supervisor. The
supervisor writes its progress to ``run/restart.json``. Without a request, SIGUSR1 restarts all services.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tidegate.stack.errors import ChildFailed, StackError
from tidegate.stack.record import RunFolder

POLL_S = 0.1
# The command stops waiting after this many seconds without progress.
LIMIT_S = 400.0

_REQUEST, _PROGRESS = "restart-request.json", "restart.json"


@dataclass(frozen=True, slots=True)
class RestartRequest:
    """A request to restart services.

    ``services``: their names; empty for all. ``environment``: the ``TIDEGATE_*`` variables of the command.
    They have precedence over those of the last start.
    """

    id: str = ""
    services: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RestartProgress:
    """The progress of a restart. ``error``: why it ended early; empty if it did not."""

    id: str = ""
    services: tuple[str, ...] = ()
    done: tuple[str, ...] = ()
    finished: bool = False
    error: str = ""


def take_request(run: Path) -> RestartRequest:
    """Return the request, and delete it. If it is missing or unreadable, return one for all services."""
    try:
        raw = json.loads((run / _REQUEST).read_text())
        (run / _REQUEST).unlink()
        return RestartRequest(str(raw["id"]), tuple(raw["services"]), dict(raw["environment"]))
    except (OSError, ValueError, KeyError, TypeError):
        return RestartRequest()


def write_progress(run: Path, progress: RestartProgress) -> None:
    """Write the progress of a restart, in place of the earlier progress."""
    _write(run / _PROGRESS, asdict(progress))


def read_progress(run: Path) -> RestartProgress:
    """Return the progress of the last restart. Return an empty one if it is missing or unreadable."""
    try:
        raw = json.loads((run / _PROGRESS).read_text())
        return RestartProgress(
            raw["id"], tuple(raw["services"]), tuple(raw["done"]), raw["finished"], raw["error"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return RestartProgress()


def restart(
    state: Path,
    services: Sequence[str],
    environ: Mapping[str, str],
    on_progress: Callable[[RestartProgress], None],
) -> RestartProgress:
    """Restart services of the running stack, and wait until they are ready.

    ``services``: empty for all. Raise StackError if the stack does not run, or if the restart fails. If the
    restart fails, the services that it has not reached still run with their old settings.
    """
    folder = RunFolder(state / "run")
    with folder.turn("restart"):
        supervisor = folder.read().supervisor
        if supervisor is None or not supervisor.alive():
            raise StackError(f"The stack in {state} does not run. Start it: tidegate up")
        if not supervisor.handles(signal.SIGUSR1):
            raise StackError(
                "The stack was started by an older release, which does not know `tidegate restart`. "
                "Type `tidegate down`, then `tidegate up`."
            )
        given = {name: value for name, value in environ.items() if name.startswith("TIDEGATE_")}
        request = RestartRequest(secrets.token_hex(8), tuple(services), given)
        _write(folder.path / _REQUEST, asdict(request))
        supervisor.send(signal.SIGUSR1)
        seen, changed_at = RestartProgress(), time.monotonic()
        while True:
            progress = read_progress(folder.path)
            if progress.id == request.id and progress != seen:
                seen, changed_at = progress, time.monotonic()
                on_progress(progress)
                if progress.finished:
                    break
            if not supervisor.alive():
                raise StackError("The supervisor ended during the restart. See what runs: tidegate status")
            if time.monotonic() - changed_at > LIMIT_S:
                raise ChildFailed(f"The restart made no progress for {LIMIT_S:.0f} s. See: tidegate status")
            time.sleep(POLL_S)
    if seen.error:
        raise ChildFailed(seen.error)
    return seen


def _write(path: Path, content: Mapping[str, object]) -> None:
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.touch(mode=0o600)  # the environment can contain secrets
    fresh.write_text(json.dumps(content))
    fresh.replace(path)
