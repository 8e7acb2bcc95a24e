"""The wheel, installed into an empty environment, against a stack in another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from deploy.bootstrap.environments import pins
from tests.e2e.conftest import REPO, Digits, Stack
from tests.journeys.pages import read
from tests.journeys.reader import reader_of

# Another Python tries the wheel by this variable: TIDEGATE_WHEEL_PYTHON=/usr/bin/python3.13.
PYTHON = os.environ.get("TIDEGATE_WHEEL_PYTHON", sys.executable)
NO_INDEX = ("NewConnectionError", "ConnectTimeoutError", "Temporary failure in name resolution")


def pip(*args: str | Path, python: str = sys.executable) -> None:
    """Run pip; skip the tests where no index can be reached, and fail for every other reason."""
    command = [python, "-m", "pip", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and any(word in done.stderr for word in NO_INDEX):
        pytest.skip(f"no package index: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass(frozen=True)
class Installed:
    """An environment with nothing but the wheel and what it needs, and a folder that is not the source."""

    env: Path
    folder: Path
    environ: dict[str, str]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, outside the source."""
        return subprocess.run(
            [str(self.env / "bin" / command[0]), *command[1:]],
            cwd=self.folder,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def script(self, text: str) -> dict[str, object]:
        """Run a Python script; return the JSON document that it prints."""
        file = self.folder / "script.py"
        file.write_text(dedent(text))
        done = self.run("python", str(file))
        assert done.returncode == 0, done.stderr
        found: dict[str, object] = json.loads(done.stdout)
        return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, as `make wheel` builds it."""
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    # A copy: setuptools writes into the folder that it builds.
    for name in ("tidegate", "pyproject.toml", "LICENSE", "requirements.in", "docs/client.md"):
        (source / name).parent.mkdir(exist_ok=True, parents=True)
        subprocess.run(["cp", "-r", REPO / name, source / name], check=True)
    pip("wheel", "--no-deps", "--wheel-dir", out, source)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path) -> Path:
    """The environment. With our own Python its packages are those of the lock, which pip has at hand."""
    env, known = wheel.parent / "env", wheel.parent / "constraints.txt"
    other = sys.executable != PYTHON
    # Our own pip knows no later Python, but spares the time to install another one.
    subprocess.run([PYTHON, "-m", "venv", *([] if other else ["--without-pip"]), env], check=True)
    locked = pins(REPO / "requirements.lock") if sys.executable == PYTHON else []
    known.write_text("".join(f"{name}=={version}\n" for name, version in locked))
    own = str(env / "bin" / "python")
    if other:
        pip("install", "-c", known, wheel, python=own)
    else:
        pip("--python", own, "install", "-c", known, wheel)
    return env


@pytest.fixture
def installed(environment: Path, stack: Stack, tmp_path: Path) -> Installed:
    """The environment, with the gateway's URL and a key for all that the tests do."""
    key = stack.cli("keys", "create", f"wheel-{os.getpid()}", "--scope", "admin")
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "NO_COLOR": "1",
        "TIDEGATE_GATEWAY_URL": stack.settings.gateway_url,
        "TIDEGATE_API_KEY": key["key"],
    }
    return Installed(environment, tmp_path, environ)


def test_nothing_of_the_services_is_installed(installed: Installed) -> None:
    names = {path.name.split("-")[0] for path in installed.env.glob("lib/python*/site-packages/*.dist-info")}
    assert names >= {"tidegate", "httpx", "numpy", "typer"}
    assert not names & {"fastapi", "sqlalchemy", "grpcio", "tritonclient", "redis", "matplotlib", "psutil"}
    assert not list(installed.env.glob("lib/python*/site-packages/services"))


def test_the_sdk_calls_a_model(installed: Installed, served: str, digits: Digits) -> None:
    np.save(installed.folder / "images.npy", digits.images[:3])
    found = installed.script("""
        import json, os, numpy as np, tidegate
        with tidegate.Client(api_key=os.environ["TIDEGATE_API_KEY"]) as client:
            result = client.infer("digits", np.load("images.npy"))
            try:
                client.infer("nobody", {"x": [1.0]})
            except tidegate.NotFound as error:
                missed = [error.reason, bool(error.request_id)]
        print(json.dumps({"labels": result["label"].tolist(), "missed": missed}))
    """)
    assert found == {"labels": digits.labels[:3].tolist(), "missed": ["not_found", True]}


def test_the_sdk_streams_and_cancels(installed: Installed, stack: Stack, served: str) -> None:
    stack.deploy(REPO / "examples" / "python-model" / "tokens", "tokens")
    found = installed.script("""
        import asyncio, json, os, contextlib, tidegate
        key = os.environ["TIDEGATE_API_KEY"]
        def words(answers):
            return [answer["text_output"][0].decode() for answer in answers]
        async def awaited():
            async with tidegate.AsyncClient(api_key=key) as client:
                return words([each async for each in client.stream("tokens", {"text_input": ["a b c"]})])
        with tidegate.Client(api_key=key) as client:
            blocking = words(client.stream("tokens", {"text_input": ["a b c"]}))
            long = {"text_input": ["a b"], "count": [10000]}
            with contextlib.closing(client.stream("tokens", long)) as endless:
                first = words([next(endless)])
        print(json.dumps({"blocking": blocking, "awaited": asyncio.run(awaited()), "first": first}))
    """)
    assert found["blocking"] == found["awaited"]
    assert len(found["blocking"]) >= 3  # type: ignore[arg-type]
    assert found["first"] == found["blocking"][:1]  # type: ignore[index]


def test_the_sdk_runs_a_batch(installed: Installed, served: str, digits: Digits) -> None:
    np.save(installed.folder / "images.npy", digits.images[:5].astype(np.float64))
    found = installed.script("""
        import json, os, numpy as np, tidegate
        images = np.load("images.npy")
        with tidegate.Client(api_key=os.environ["TIDEGATE_API_KEY"]) as client:
            batch = client.submit_batch("digits", [image[None] for image in images])
            status = batch.wait(60)
            labels = [int(item.get()["label"][0]) for item in client.batch(batch.id).results()]
        print(json.dumps({"status": status, "labels": labels}))
    """)
    assert found == {"status": "completed", "labels": digits.labels[:5].tolist()}


def test_the_sdk_waits_out_a_rate_limit(installed: Installed, stack: Stack, served: str) -> None:
    key = stack.cli("keys", "create", f"slow-{os.getpid()}", "--rate", "2", "--burst", "1")
    installed.environ["TIDEGATE_API_KEY"] = key["key"]
    found = installed.script("""
        import json, os, numpy as np, tidegate
        key, image = os.environ["TIDEGATE_API_KEY"], np.zeros((1, 64))
        hasty = tidegate.Client(api_key=key, retries=0)
        with tidegate.Client(api_key=key, retries=20) as patient:
            answered = sum(len(patient.infer("digits", image)) > 0 for _ in range(4))
            refused = 0
            for _ in range(100):
                try:
                    hasty.infer("digits", image)
                except tidegate.TooManyRequests as error:
                    refused += error.retry_after_s is not None
                    break
        print(json.dumps({"answered": answered, "refused": refused}))
    """)
    assert found == {"answered": 4, "refused": 1}


def test_the_command_works_from_another_folder(installed: Installed, served: str, digits: Digits) -> None:
    status = installed.run("tidegate", "status", "--json")
    assert status.returncode == 0, status.stdout + status.stderr
    assert {s["state"] for s in json.loads(status.stdout)["services"]} == {"ready"}
    data = json.dumps({"image": digits.images[:1].tolist()})
    answer = installed.run("tidegate", "infer", served, "--data", data, "--json")
    outputs = {o["name"]: o["data"] for o in json.loads(answer.stdout)["outputs"]}
    assert outputs["label"] == digits.labels[:1].tolist()
    exported = installed.run("tidegate", "export")
    assert exported.returncode == 0, exported.stderr
    assert "digits-v1" in exported.stdout
    nothing = installed.run("tidegate", "logs", "--request", "0" * 16)
    assert nothing.returncode == 3, nothing.stderr
    assert not (installed.folder / ".tidegate").exists()


def test_a_context_replaces_the_environment(installed: Installed, stack: Stack, served: str) -> None:
    key = installed.environ.pop("TIDEGATE_API_KEY")
    (installed.folder / "key").write_text(key)
    url = installed.environ.pop("TIDEGATE_GATEWAY_URL")
    nothing = installed.run("tidegate", "models")
    assert nothing.returncode == 6
    assert "No stack in this folder" in nothing.stderr
    added = installed.run("tidegate", "context", "add", "there", "--url", url, "--key-file", "key")
    assert added.returncode == 0, added.stderr
    models = installed.run("tidegate", "models", "--json")
    assert served in [model["name"] for model in json.loads(models.stdout)["items"]]


def test_what_needs_the_source_says_so(installed: Installed) -> None:
    for command in ("up", "down"):
        done = installed.run("tidegate", command)
        assert done.returncode == 2
        assert "source checkout" in done.stderr


def test_a_consumer_passes_the_strict_type_checker(installed: Installed) -> None:
    file = installed.folder / "consumer.py"
    file.write_text(
        dedent("""
        import numpy as np

        import tidegate


        def label(client: tidegate.Client, image: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> int:
            try:
                result = client.infer("digits", {"image": image}, timeout_s=5)
            except tidegate.TooManyRequests as error:
                return -1 if error.retry_after_s is None else round(error.retry_after_s)
            except (tidegate.ModelFailed, tidegate.Unreachable):
                raise
            return int(result["label"][0])


        async def names(client: tidegate.AsyncClient) -> list[str]:
            async for answer in client.stream("tokens", {"text_input": ["hello"]}):
                print(answer["text_output"].shape)
            return [str(model["name"]) for model in await client.models()]


        def labels(client: tidegate.Client, images: list[list[float]]) -> list[int]:
            batch: tidegate.BatchHandle = client.submit_batch("digits", images, priority="low")
            return [int(item.get()["label"][0]) for item in batch.results(timeout_s=60)]
        """)
    )
    mypy = [sys.executable, "-P", "-m", "mypy", "--strict", "--cache-dir", str(installed.folder / "cache")]
    python = ["--python-executable", str(installed.env / "bin" / "python")]
    done = subprocess.run(
        [*mypy, *python, str(file)], cwd=installed.folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", ["first-model", "own-python", "roll-out"])
def test_a_guide_is_true(page: str, environment: Path, stack: Stack, tmp_path: Path) -> None:
    """The other pages are run by `make journeys`."""
    reader_of(stack, environment, tmp_path).follow(read(REPO / "docs" / "guides" / f"{page}.md"))
