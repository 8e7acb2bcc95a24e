"""Builds a state folder with the code of an earlier revision: what an upgrade starts from.

    python -m tests.upgrade.old_state REVISION STATE

The revision is checked out from git beside this one, and runs with the packages that this one has. It serves
a model in two versions, makes a key, keeps one job's result, leaves jobs that wait, and stops. What is to be
there after the upgrade is written to ``STATE/expected.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

REPO = Path(__file__).parents[2]
EXPECTED = "expected.json"
NAME, SLEEPER = "kept", "kept-sleeper"
WAITING, SLEEP_MS = 6, 2_000
IDENTITY = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        found = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", value * FACTOR)]) for value in found]
"""


class NoHistory(Exception):
    """The revision is not in this copy of the repository."""


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """Check a revision out for the block. Raise NoHistory."""
    git = ["git", "-C", str(REPO)]
    known = subprocess.run(
        [*git, "cat-file", "-e", f"{revision}^{{commit}}"], capture_output=True, check=False
    )
    if known.returncode:
        raise NoHistory(f"git does not know {revision} here: fetch the history, or set FROM=<revision>")
    with tempfile.TemporaryDirectory(prefix="tidegate-upgrade-") as folder:
        # The models' user has to read the code of the worker's side.
        Path(folder).chmod(0o755)
        tree = Path(folder) / "tree"
        subprocess.run(
            [*git, "worktree", "add", "--detach", str(tree), revision], check=True, capture_output=True
        )
        try:
            yield tree
        finally:
            subprocess.run(
                [*git, "worktree", "remove", "--force", str(tree)], check=True, capture_output=True
            )


def command_line(tree: Path, env: Mapping[str, str], *arguments: str) -> str:
    """Run ``tidegate`` of a checkout; what it writes. Raise RuntimeError with its messages if it fails."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tidegate.cli", *arguments],
        env={**env, "PYTHONPATH": str(tree)},
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"tidegate {' '.join(arguments)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def build(revision: str, state: Path, env: Mapping[str, str]) -> None:
    """Fill ``state`` with what the revision makes of it. ``env`` names the ports of the stack."""
    with checkout(revision) as tree:
        command_line(tree, env, "up", "--json")
        try:
            expected = _use(tree, env, f"http://127.0.0.1:{env['TIDEGATE_GATEWAY_PORT']}")
        finally:
            command_line(tree, env, "down", "--json")
    (state / EXPECTED).write_text(json.dumps({"revision": revision, **expected}, indent=1))


def _use(tree: Path, env: Mapping[str, str], url: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.py"
        signature = str(tree / "examples" / "python-model" / "identity" / "signature.json")
        for factor in (2, 3):
            model.write_text(IDENTITY.replace("FACTOR", str(factor)))
            command_line(tree, env, "deploy", str(model), "--name", NAME, "--signature", signature, "--json")
    sleep = tree / "examples" / "python-model" / "sleep"
    command_line(
        tree, env, "deploy", str(sleep / "model.py"), "--name", SLEEPER, "--json",
        "--signature", str(sleep / "signature.json"), "--max-batch", "1",
    )  # fmt: skip
    key = json.loads(command_line(tree, env, "keys", "create", "kept", "--scope", "publish", "--json"))["key"]
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        done = _submit(http, NAME, "x", [1, 16], [1.0] * 16, wait=True)
        waiting = [_submit(http, SLEEPER, "ms", [1, 1], [SLEEP_MS]) for _ in range(WAITING)]
        models = command_line(tree, env, "models", "--json")
    return {
        "key": key,
        "done": done,
        "waiting": waiting,
        "models": {each["name"]: each["versions"] for each in json.loads(models)["items"]},
    }


def _submit(
    http: httpx.Client, name: str, tensor: str, shape: list[int], data: list[float], *, wait: bool = False
) -> str:
    inputs = [{"name": tensor, "datatype": "FP32", "shape": shape, "data": data}]
    headers = {"Prefer": "respond-async"}
    answer = http.post(
        f"/v2/models/{name}/infer", json={"inputs": inputs}, headers=headers
    ).raise_for_status()
    job = str(answer.json()["id"])
    if wait:
        http.get(f"/v1/jobs/{job}/result", headers={"Prefer": "wait=30"}).raise_for_status()
    return job


def environment(state: Path, ports: Mapping[str, int], runtime: Path) -> dict[str, str]:
    """Return the environment of a stack in ``state``."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("TIDEGATE_")}
    env |= {f"TIDEGATE_{name}": str(port) for name, port in ports.items()}
    # The user's own contexts are left alone.
    env["TIDEGATE_MONITORING"] = "off"
    env["TIDEGATE_CONFIG_DIR"] = str(state.parent / "config")
    return env | {"TIDEGATE_STATE_DIR": str(state), "TIDEGATE_RUNTIME_DIR": str(runtime), "NO_COLOR": "1"}


def main() -> None:
    """Build a state folder and say where."""
    from tidegate.kernel.settings.base import Settings

    revision, state = sys.argv[1], Path(sys.argv[2]).absolute()
    settings = Settings(state_dir=state)
    ports = {
        name.upper(): getattr(settings, name) for name in Settings.model_fields if name.endswith("_port")
    }
    build(revision, state, environment(state, ports, Settings().runtime_path))
    print(f"{state} is as {revision} leaves it")


if __name__ == "__main__":
    main()
