"""Plan the services of a running stack again, with the current settings."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tidegate.client import started
from tidegate.kernel.settings.base import SOURCES, Settings
from tidegate.kernel.settings.report import WRONG, problem_of
from tidegate.stack.child import MARK, Child
from tidegate.stack.errors import StackError
from tidegate.stack.plan import CONTROL, SERVICES, plan
from tidegate.stack.restarting import RestartRequest

TOKEN = "TIDEGATE_SERVICE_TOKEN"
# These variables say where the stack is. A restart never changes them.
_PLACES = ("TIDEGATE_STATE_DIR", "TIDEGATE_RUNTIME_DIR", MARK)


@dataclass(frozen=True, slots=True)
class Replanned:
    """The services to restart, in this order. ``environ``: the variables from which ``settings`` was read."""

    children: list[Child]
    environ: dict[str, str]
    settings: Settings

    def accept(self) -> None:
        """Record that the stack now runs with these settings. The next restart begins with them."""
        os.environ.clear()
        os.environ.update(self.environ)
        with contextlib.suppress(OSError):  # a full disk must not end the supervisor
            started.write(self.settings.state_path, started.of(self.settings, self.environ))


def replanned(children: Sequence[Child], request: RestartRequest) -> Replanned:
    """Return the services of a restart as the current settings describe them.

    The settings come from the settings file, which is read again, and from variables. See :func:`environment`
    for these variables. Raise StackError for an unknown service, for wrong settings, and for changes that
    need a stop of the stack.
    """
    running = {child.name: child for child in children}
    known = [name for name in (CONTROL, *SERVICES) if name in running]
    if unknown := [name for name in request.services if name not in known]:
        raise StackError(
            f"Nothing was restarted: this stack has no service {', '.join(unknown)}. "
            f"It has {', '.join(known)}."
        )
    environ = environment(os.environ, request.environment)
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environ)
    try:
        settings = Settings()
        planned = {child.name: child for child in plan(settings, os.environ)}
        _check(running, planned)
    except WRONG as error:
        raise StackError(f"Nothing was restarted. A setting is wrong: {problem_of(error)}") from None
    except (StackError, ValueError, OSError) as error:
        raise StackError(f"Nothing was restarted: {error}") from None
    finally:
        os.environ.clear()
        os.environ.update(before)
    names = request.services or known
    # The gateway is last, because it becomes ready only while the others run.
    return Replanned([planned[name] for name in known if name in names], environ, settings)


def environment(present: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the last start, overridden by the variables of a request.

    ``present``: the supervisor's variables. Some of them come from the settings file, or were computed from
    other settings. These are left out, because their values may have changed. ``given``: the variables of the
    request.
    """
    sources = json.loads(present.get(SOURCES) or "{}")
    kept = {name: value for name, value in present.items() if name not in sources or name in _PLACES}
    kept.pop(SOURCES, None)
    return kept | {name: value for name, value in given.items() if name not in (*_PLACES, SOURCES)}


def _check(running: Mapping[str, Child], planned: Mapping[str, Child]) -> None:
    """Raise StackError if the new plan needs more than a restart of services."""
    way = "Stop the stack and start it again: `tidegate down`, then `tidegate up`"
    if running.keys() != planned.keys():
        parts = ", ".join(sorted(running.keys() ^ planned.keys()))
        raise StackError(f"the stack would have other parts ({parts}). {way}")
    for name, child in planned.items():
        old = running[name]
        if child.ports != old.ports:
            settings = ", ".join(port.setting for port in child.ports if port not in old.ports)
            raise StackError(f"{name} would listen elsewhere ({settings} or TIDEGATE_HOST changed). {way}")
        service = name in (*SERVICES, CONTROL)
        if not service and (child.argv, child.files, child.links) != (old.argv, old.files, old.links):
            raise StackError(f"the settings of {name} have changed, and a restart does not include it. {way}")
        if child.env.get(TOKEN) != old.env.get(TOKEN):
            raise StackError(f"the services would have another {TOKEN}. {way}")
        if child.processes != old.processes:
            change = f"from {old.processes} to {child.processes} (TIDEGATE_GATEWAY_WORKERS)"
            raise StackError(f"the number of {name} processes would change {change}. {way}")
