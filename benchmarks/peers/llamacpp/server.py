"""``server.py PLAN.json PORT``: llama.cpp's own HTTP server, with the parameters that a worker gives it.

It runs in the environment ``llamacpp`` of the benchmarks.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "services" / "worker" / "runtimes" / "llm"))

import xllamacpp
from llamacpp_settings import settings

# A connection occupies a thread of the server for as long as it is open.
HTTP_THREADS = 80


def main() -> None:
    """Serve until the process ends."""
    plan_file, port = Path(sys.argv[1]), int(sys.argv[2])
    params, _ = settings(xllamacpp, json.loads(plan_file.read_text()), Path("/"))
    params.port, params.api_keys, params.n_threads_http = port, [], HTTP_THREADS
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
