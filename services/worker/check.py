"""Check that this machine or image has what a worker needs: ``python -m services.worker.check``."""

from __future__ import annotations

import subprocess
import sys

from services.worker.adapters.triton_install import TritonInstall
from services.worker.settings import WorkerSettings
from tidegate.kernel.errors import Unavailable


def main() -> int:
    """Print Triton's backends and the Python that runs models.

    Return 1 if a part is missing or does not run; 0 otherwise.
    """
    settings = WorkerSettings()
    try:
        install = TritonInstall.find(settings.runtime_path, settings.triton_server, settings.triton_backends)
    except Unavailable as error:
        print(error.message, file=sys.stderr)
        return 1
    # The server loads its libraries before it reads its options. So even `--help` fails if a library is
    # missing.
    started = subprocess.run(
        [str(install.server), "--help"], capture_output=True, text=True, env=install.environment({})
    )
    if "--model-repository" not in started.stdout + started.stderr:
        print(f"{install.server} does not run: {started.stderr.strip()[-500:]}", file=sys.stderr)
        return 1
    backends = ", ".join(sorted(install.backends()))
    print(f"{install.server}; backends: {backends}; models' Python: {install.python}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
