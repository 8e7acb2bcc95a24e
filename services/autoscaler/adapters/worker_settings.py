"""Read the settings that a new worker would have.

The autoscaler runs the module :mod:`services.worker.settings_report` in a new process, with the environment
variables of a worker. The process prints the settings as JSON.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any

import orjson

from tidegate.kernel.errors import Unavailable

LIMIT_S = 20.0


async def read_worker_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that a worker with this ``environment`` has.

    Raise Unavailable if the settings are not reported.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "services.worker.settings_report"),
        env=dict(environment),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, errors = await asyncio.wait_for(process.communicate(), LIMIT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise Unavailable(f"A worker did not report its settings within {LIMIT_S:g} s.") from None
    except asyncio.CancelledError:
        process.kill()
        raise
    if process.returncode:
        last = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise Unavailable(f"A worker cannot start with the present settings. Its last error: {last[:300]}")
    found: dict[str, Any] = orjson.loads(out)
    return found
