"""Run one replica: ``python -m services.worker --replica-dir DIR``, started by the autoscaler."""

from __future__ import annotations

import argparse
import fcntl
import os
import socket
import sys
from pathlib import Path

from tidegate.kernel import quick_start


def main() -> int:
    """Run the worker until it is drained or fails. Return the exit code: 1 if the replica could not serve."""
    parser = argparse.ArgumentParser(prog="services.worker", description="Run one replica of a Deployment.")
    parser.add_argument("--replica-dir", type=Path, required=True, help="the folder with assignment.json")
    folder: Path = parser.parse_args().replica_dir
    quick_start.begin()
    from services.worker.app import Worker
    from services.worker.settings import WorkerSettings
    from tidegate.kernel import telemetry
    from tidegate.kernel.blobs import object_store
    from tidegate.kernel.service import app as service

    settings = WorkerSettings()
    object_store.require("worker", blob_url=settings.blob_url)
    telemetry.configure("worker", settings.log_level)
    lock = take_lock(folder)
    with socket.socket() as server:
        server.bind((settings.host, settings.worker_port) if settings.worker_port else ("127.0.0.1", 0))
        worker = Worker(settings, folder, server.getsockname()[1])
        service.run(worker.app, settings, 0, sock=server, on_stop=worker.drain)
    os.close(lock)
    return 1 if worker.failed else 0


def take_lock(folder: Path) -> int:
    """Lock the replica's folder until this process ends. Return the descriptor of the lock file.

    The pid of this process is written to the file. If another worker has the lock, this process exits, so
    that two workers never run the same replica.
    """
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"another worker runs the replica in {folder}: end that worker first")
    os.ftruncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    return lock


if __name__ == "__main__":
    sys.exit(main())
