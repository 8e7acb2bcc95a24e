"""``tidegate reproduce``: run a dead letter again on a separate model server, and show the model's log."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.cli import source_checkout
from tidegate.cli.api import Control, Doc, control, part
from tidegate.cli.options import seconds
from tidegate.cli.output import say

GRACE_S = 15.0


def reproduce(
    id: Annotated[str, typer.Argument(metavar="ID", help="The letter's id, as `tidegate dead` lists it.")],
    deployment: Annotated[
        str | None, typer.Option(metavar="NAME", help="Use this deployment instead of the letter's own.")
    ] = None,
    timeout: Annotated[str, typer.Option(help="Longest time for the request.")] = "60s",
) -> None:
    """Run a dead letter's request again on this machine, in a separate worker without other requests.

    Exit code 0: the request was answered. 1: it failed. 3: it killed a process: the model's, Triton's or the
    worker's.
    """
    source_checkout.require("reproduce")
    from tidegate.cli.dead import save

    limit_s, found = seconds(timeout), control()
    letter = found.router.get(f"/v1/dead/{part(id)}")
    assignment = _assignment(found, letter, deployment or str(letter["deployment"]))
    with _folder(found.settings.state_path / "reproduce", id) as folder:
        save(found.router, id, folder / "payload")
        _write(folder / "assignment.json", assignment)
        raise typer.Exit(_run(folder, limit_s))


def _assignment(control: Control, letter: Doc, deployment: str) -> Doc:
    """Return the document that tells a worker which deployment and version to run."""
    from tidegate.kernel.protocol.models import Version

    wanted = control.registry.get(f"/v1/deployments/{part(deployment)}")
    version = control.registry.get(f"/v1/models/{part(wanted['model'])}/versions/{wanted['version']}")
    return {
        "replica": f"reproduce-{letter['letter']}",
        "generation": 0,
        "deployment": wanted,
        # A worker accepts only the fields of the class `Version`, so leave out what the registry adds.
        "version": {name: version[name] for name in Version.model_fields if name in version},
        "launched_at": time.time(),
    }


def _run(folder: Path, timeout_s: float) -> int:
    """Run the worker in a separate process, so that the model cannot kill this command.

    Return the worker's exit code, or 3 if a signal killed the worker.
    """
    command = [sys.executable, "-m", "services.worker.reproduce", "--replica-dir", str(folder)]
    command += ["--payload", str(folder / "payload"), "--timeout", str(timeout_s)]
    with subprocess.Popen(command) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # The worker also got Ctrl-C from the terminal. Wait until it has stopped its Triton.
            code = _ended(process)
            raise
        finally:
            if process.poll() is None:
                process.kill()
    if code < 0:
        say(f"The failure is reproduced: the worker was killed by {signal.Signals(-code).name}.")
        return 3
    return code


def _ended(process: subprocess.Popen[Any]) -> int:
    try:
        return process.wait(GRACE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        return process.wait()


@contextmanager
def _folder(parent: Path, id: str) -> Iterator[Path]:
    """Yield a new folder that only this user can read, and delete it after the ``with`` block.

    SIGTERM and Ctrl-C also end the block, so the folder is deleted then, too.
    """

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    folder = parent / f"{id}-{os.getpid()}"
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield folder
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, document: Doc) -> None:
    import orjson

    path.touch(mode=0o600)
    path.write_bytes(orjson.dumps(document))
