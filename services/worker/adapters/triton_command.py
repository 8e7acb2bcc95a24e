"""The command line and the environment of a tritonserver."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from services.worker.adapters.sandbox import Sandbox
from services.worker.adapters.triton_install import TritonInstall

# The launcher chooses the GPUs of a replica with these variables, so a Deployment cannot set them.
_DEVICES = frozenset({"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES"})
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class TritonOptions:
    """The options that differ between Tritons.

    ``env`` has the Deployment's environment variables; ``TIDEGATE_*`` are ignored. ``secrets`` has variables
    that no log or report may show. ``response_cache_mb`` is the size of the response cache; 0 means no cache.
    What the model prints beyond ``log_bytes_per_s`` is dropped and counted.
    """

    replica: str
    threads: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    auto_complete: bool = True
    start_timeout_s: float = 120.0
    response_cache_mb: int = 0
    secrets: dict[str, str] = field(default_factory=dict, repr=False)
    log_bytes_per_s: int = 64 * 1024


def environment(
    install: TritonInstall, options: TritonOptions, sandbox: Sandbox, home: Path
) -> dict[str, str]:
    """Return the environment of a Triton. ``home`` is its HOME if it runs as a separate user."""
    found = install.environment(
        dict.fromkeys(_THREADS, str(options.threads))
        | sandbox.environment(home)
        | {key: value for key, value in options.env.items() if _is_the_models(key)}
        # With this order, a GPU has the same number in CUDA as in `nvidia-smi`.
        | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        # The launcher finds the worker's processes by this name. A worker of a warm pool keeps the name that
        # it was started with, which differs from the replica's name.
        | {"TIDEGATE_REPLICA": os.environ.get("TIDEGATE_REPLICA", options.replica)}
        | options.secrets
    )
    for key in sandbox.unusable_variables():
        if key not in options.env:
            found.pop(key, None)
    return found


def arguments(
    install: TritonInstall, options: TritonOptions, repository: Path, region: str, metrics_port: int
) -> list[str]:
    """Return the command-line options of a tritonserver that listens on Unix sockets in its working folder.

    ``region`` is the prefix for the names of Triton's shared memory.
    """
    arguments = [
        f"--id={options.replica}",
        f"--model-repository={repository}",
        f"--backend-directory={install.backends_dir}",
        "--model-control-mode=explicit",
        "--strict-readiness=true",
        "--http-address=unix:http",
        # The port is not used, but without a port Triton would read the address as a TCP address.
        "--http-port=1",
        "--http-thread-count=2",
        "--grpc-address=unix:grpc",
        "--grpc-port=1",
        "--metrics-address=127.0.0.1",
        f"--metrics-port={metrics_port}",
        # The thread that collects CPU metrics would delay Triton's end by a second.
        "--allow-cpu-metrics=false",
        "--exit-timeout-secs=10",
        f"--backend-config=python,shm-region-prefix-name={region}",
        f"--backend-config=python,stub-timeout-seconds={int(options.start_timeout_s) or 1}",
    ]
    if not options.auto_complete:
        arguments.append("--disable-auto-complete-config")
    if options.response_cache_mb:
        size = options.response_cache_mb * 2**20
        arguments += [
            f"--cache-directory={install.caches_dir}",
            f"--cache-config=local,size={size}",
        ]
    return arguments


def _is_the_models(variable: str) -> bool:
    """Return True if a Deployment may set this variable."""
    return not variable.startswith("TIDEGATE_") and variable not in _DEVICES
