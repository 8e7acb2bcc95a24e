"""One private stack for the session, on free ports, started and stopped by the commands that users type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from benchmarks import install, places
from deploy.bootstrap.command import Runner
from deploy.bootstrap.step import StepFailed
from tests.conftest import PATIENCE_S, MadeOnce
from tests.e2e.guard import Guard
from tidegate import Client
from tidegate.kernel import credentials
from tidegate.kernel.settings.base import Settings
from tidegate.stack.ports import free_ports

REPO = Path(__file__).parents[2]
# The environment of other systems' clients: benchmarks/peers/llm_clients.
CLIENTS = "llm_clients"
PORTS = (
    "GATEWAY_PORT",
    "GATEWAY_GRPC_PORT",
    "REGISTRY_PORT",
    "ROUTER_PORT",
    "AUTOSCALER_PORT",
    "RABBITMQ_PORT",
    "RABBITMQ_DIST_PORT",
    "EPMD_PORT",
    "VALKEY_PORT",
    "JOBS_PORT",
    "PROMETHEUS_PORT",
)


# The files that take longest, in that order: begun last, one would be left to run alone at the end.
LONG = (
    "test_rollout",
    "test_users_models",
    "test_stream",
    "test_sequences",
    "test_traces",
    "test_scaling",
    "test_clients",
    "test_access",
    "test_killer",
    "test_backup",
    "test_gpus",
    "test_edge",
    "test_resilience",
    "test_warm",
    "test_jobs",
    "test_losses",
    "test_formats",
    "test_verification",
    "test_job_worker",
    "test_tune",
    "test_scale",
    "test_drift",
    "test_sleep",
    "test_fair",
    "test_cli",
    "test_access_matrix",
    "test_imports",
    "test_llm_batches",
    "test_batches",
    "test_large",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files before short ones; the tests of a file stay in their order."""
    places = {name: at for at, name in enumerate(LONG)}
    items.sort(key=lambda item: -1 if "chaos" in item.path.parts else places.get(item.path.stem, len(LONG)))


@dataclass(frozen=True)
class Stack:
    """A running stack: its settings, and the CLI against it."""

    settings: Settings
    env: dict[str, str]

    def server_url(self, server: str, service: str) -> str:
        """The URL of a server of the stack (``tidegate.kernel.credentials``), as a service logs in there."""
        url = {
            credentials.RABBITMQ: self.settings.amqp_url,
            credentials.VALKEY: self.settings.redis_url,
            credentials.VALKEY_JOBS: self.settings.jobs_url,
        }[server]
        return credentials.logged_in(url, self.settings.secrets_path, server, service)

    def run(
        self, *args: str, timeout_s: float = 180.0, env: dict[str, str] | None = None, cwd: Path = REPO
    ) -> subprocess.CompletedProcess[str]:
        """Run ``tidegate ...`` and give its outcome, whatever it is."""
        command = [sys.executable, "-P", "-m", "tidegate.cli", *args]
        return subprocess.run(
            command,
            env=env or self.env,
            cwd=cwd,
            text=True,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )

    def cli(self, *args: str, timeout_s: float = 180.0) -> Any:
        """Run ``tidegate ... --json``, which must succeed, and give its document."""
        done = self.run(*args, "--json", timeout_s=timeout_s)
        assert done.returncode == 0, f"tidegate {args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout)

    def deploy(self, file: Path, name: str, *options: str) -> Any:
        """Deploy and wait until it serves."""
        return self.cli("deploy", str(file), "--name", name, "--wait", "--timeout", "120", *options)

    @property
    def async_url(self) -> str:
        """Return the store of asynchronous inference."""
        return self.env["TIDEGATE_ASYNC_URL"]

    def replicas(self, deployment: str) -> list[dict[str, Any]]:
        """The replicas of a Deployment."""
        return [r for r in self.autoscaler("/v1/replicas")["items"] if r["deployment"] == deployment]

    def autoscaler(self, path: str) -> Any:
        """What the autoscaler says, without the CLI: tests ask it in loops."""
        headers = {"Authorization": f"Bearer {self.settings.service_token}"}
        url = f"{self.settings.autoscaler_url}{path}"
        return (
            httpx.get(url, headers=headers, trust_env=False, verify=False, timeout=120)
            .raise_for_status()
            .json()
        )

    def worker(self, deployment: str) -> psutil.Process:
        """The process of the only ready worker of a Deployment, once there is one."""
        end = time.monotonic() + PATIENCE_S
        while not (found := [r for r in self.replicas(deployment) if r["state"] == "ready"]):
            assert time.monotonic() < end, f"{deployment} has no ready replica"
            time.sleep(0.05)
        (ready,) = found
        return psutil.Process(ready["pid"])

    def child(self, name: str) -> psutil.Process:
        """The process of a service or server of the stack, once it has one."""
        end = time.monotonic() + PATIENCE_S
        while True:
            record = json.loads((self.settings.state_path / "run" / "stack.json").read_text())
            (found,) = [c for c in record["children"] if c["name"] == name]
            if found["process"]:
                return psutil.Process(found["process"]["pid"])
            assert time.monotonic() < end, f"{name} does not start: {found}"
            time.sleep(0.1)


def processes_of(state: Path) -> list[psutil.Process]:
    """Every process that has something of this stack in its command line or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            told = [*process.cmdline(), *process.environ().values()]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(str(state) in word for word in told) and process.pid != os.getpid():
            found.append(process)
    return found


# The models that several modules use. All others are deleted after the module that deployed them, because
# each idle replica takes CPU time from the tests.
SHARED_MODELS = {"digits", "smol"}


@pytest.fixture(scope="module", autouse=True)
def own_models() -> Iterator[None]:
    """Delete the module's models from the shared stack at the end."""
    yield
    for shared in _shared_stacks:
        headers = {"Authorization": f"Bearer {shared.settings.service_token}"}
        url = f"{shared.settings.registry_url}/v1"
        with httpx.Client(headers=headers, trust_env=False, timeout=PATIENCE_S) as http:
            found = http.get(f"{url}/desired-state").raise_for_status().json()
            own = [each["name"] for each in found["deployments"] if each["model"] not in SHARED_MODELS]
            for endpoint in found["endpoints"]:
                if {each["deployment"] for each in endpoint["targets"]} <= set(own):
                    http.delete(f"{url}/endpoints/{endpoint['name']}")
            for name in own:
                http.delete(f"{url}/deployments/{name}")


_shared_stacks: list[Stack] = []


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack, with nothing deployed. At the end no process of it is left."""
    folder = tmp_path_factory.mktemp("stack")
    # How many files share this stack depends on the speed of the machine. Their models may be more than 32.
    fields: dict[str, float | str] = {
        "async_url": f"file://{folder}/async",
        "autoscaler_replicas_per_core": 64,
    }
    with running_stack(folder / "state", **fields) as found:
        _shared_stacks.append(found)
        yield found
        _shared_stacks.clear()


@contextmanager
def running_stack(state: Path, **fields: float | str) -> Iterator[Stack]:
    """A stack with these settings, with nothing deployed. At the end no process of it is left."""
    runtime = Settings().runtime_path
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    # One module verifies versions (test_verification.py). For the others, that would double each first start.
    fields = {"monitoring": "off", "verification": "off", **fields}
    given: dict[str, Any] = {
        "state_dir": state,
        "runtime_dir": runtime,
        **{name.lower(): port for name, port in ports.items()},
        **fields,
    }
    env = {k: v for k, v in os.environ.items() if not k.startswith("TIDEGATE_")}
    env |= {f"TIDEGATE_{name}": str(port) for name, port in ports.items()}
    env |= {f"TIDEGATE_{name.upper()}": str(value) for name, value in fields.items()}
    env |= {"TIDEGATE_STATE_DIR": str(state), "TIDEGATE_RUNTIME_DIR": str(runtime), "NO_COLOR": "1"}
    env["TIDEGATE_SHADOW_HOST_BUSY"] = "1"  # other tests run on this host
    started = Stack(Settings(**given), env)
    # A run that is interrupted with -n has ten seconds before its processes are killed: too few for `down`.
    guard = Guard([sys.executable, "-m", "tidegate.cli", "down"], env, REPO)
    try:
        done = started.run("up", timeout_s=300)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        # The token is there now.
        yield Stack(Settings(**given), env)
    finally:
        down = started.run("down", timeout_s=120)
        guard.dismiss()
    assert down.returncode == 0, f"{down.stdout}\n{down.stderr}"
    left = processes_of(state)
    assert not left, [p.cmdline() for p in left]


@dataclass(frozen=True)
class Digits:
    """The trained example and its held-out set, with what onnxruntime said of it in process."""

    model: Path
    images: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray


@pytest.fixture(scope="session")
def digits(made_once: MadeOnce) -> Digits:
    """Train the example, in the environment that it is served in."""
    python = Settings().runtime_path / "model-env" / "bin" / "python3"
    script = REPO / "examples" / "digits" / "train.py"
    out = made_once(
        "digits", lambda out: subprocess.run([python, script, "--out", out], check=True, capture_output=True)
    )
    held = np.load(out / "heldout.npz")
    return Digits(out / "model.onnx", held["image"], held["label"], held["probabilities"])


@pytest.fixture(scope="session")
def served(stack: Stack, digits: Digits) -> str:
    """The example, deployed as ``digits``."""
    stack.deploy(digits.model, "digits", "--min", "1", "--max", "1")
    return "digits"


@pytest.fixture(scope="session")
def clients_python() -> Path:
    """Return the Python that has other systems' clients. They are installed once."""
    if not install.installed(CLIENTS):
        print("Installing the clients of other systems, once: about a minute ...", flush=True)
        try:
            install.install(CLIENTS, Runner())
        except StepFailed as failure:
            pytest.skip(f"{failure.what} {failure.remedy}")
    return places.python(CLIENTS)


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    """The SDK against the stack's gateway."""
    with Client(stack.settings.gateway_url, timeout_s=60) as made:
        yield made


@pytest.fixture(scope="session")
def deploy_python(stack: Stack) -> Callable[..., str]:
    """Deploys one of ``examples/python-model`` under a name of its own."""

    def deploy(example: str, name: str, *options: str) -> str:
        folder = REPO / "examples" / "python-model" / example
        stack.deploy(folder / "model.py", name, "--signature", str(folder / "signature.json"), *options)
        return name

    return deploy
