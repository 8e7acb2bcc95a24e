"""Triton with HTTP and the three models, from the same binaries and runtimes as in a worker.

It writes the model repository, then replaces itself by tritonserver.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from benchmarks import places
from services.worker.adapters.model_repository import RUNTIMES
from services.worker.adapters.triton_install import TritonInstall
from tidegate.stack.ports import free_ports

HERE = Path(__file__).parent
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def write_repository(repository: Path, delay_us: int) -> None:
    """Write the layout that Triton loads: a folder per model with its configuration and version 1."""
    shutil.rmtree(repository, ignore_errors=True)
    files = {
        "identity": {"model.py": places.ROOT / "examples" / "python-model" / "identity" / "model.py"},
        "digits": {
            "model.onnx": Path(os.environ["BENCH_DIGITS"]),
            "model.py": RUNTIMES / "onnx" / "model.py",
            "rows.py": RUNTIMES / "rows.py",
        },
        "image": {"model.py": places.HERE / "models" / "mean" / "model.py"},
    }
    for model, parts in files.items():
        folder = repository / model / "1"
        folder.mkdir(parents=True)
        for name, source in parts.items():
            shutil.copyfile(source, folder / name)
        config = (HERE / "models" / model / "config.pbtxt").read_text()
        (folder.parent / "config.pbtxt").write_text(config.replace("@DELAY_US@", str(delay_us)))


def main() -> None:
    """Write the repository and replace this process by tritonserver. It does not return."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delay-us", type=int, required=True, help="how long a batch waits for more")
    work = Path(os.environ["BENCH_WORK"])
    write_repository(work / "models", parser.parse_args().delay_us)
    install = TritonInstall.find(places.runtime_dir())
    grpc_port, metrics_port = free_ports(2)
    arguments = [
        str(install.server),
        f"--model-repository={work / 'models'}",
        f"--backend-directory={install.backends_dir}",
        "--http-address=127.0.0.1",
        f"--http-port={os.environ['BENCH_PORT']}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={grpc_port}",
        "--metrics-address=127.0.0.1",
        f"--metrics-port={metrics_port}",
        "--allow-cpu-metrics=false",
        f"--backend-config=python,shm-region-prefix-name=tidegate-bench-{os.getpid()}",
    ]
    marks = {key: value for key, value in os.environ.items() if key.startswith("TIDEGATE_BENCH")}
    os.execve(arguments[0], arguments, install.environment(dict.fromkeys(THREADS, "1") | marks))


if __name__ == "__main__":
    main()
