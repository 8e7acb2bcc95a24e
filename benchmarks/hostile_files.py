"""``python -m benchmarks.hostile_files``: send the registry hostile files, and print the answer to each.

A registry runs as a process of its own, on SQLite and a folder. Each file is uploaded and registered. Every
answer must be a refusal that says what is wrong. At the end no version, no artifact and no other file is
left, and the process has needed little memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.hostile_corpus import CASES
from benchmarks.hostile_corpus.case import Case
from benchmarks.hostile_corpus.codes import TREES as GOOD
from tidegate.stack.ports import free_ports

MIB = 2**20
TOKEN = "hostile-files-benchmark"
START_S, ANSWER_S = 120.0, 120.0
PENDING_S = 1  # how long the registry keeps an upload that no version uses
GROWTH_MIB = 400
"""The most memory that the process may need above its memory before the first file."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one file. ``problem``: why it is wrong; empty if it is right."""

    name: str
    size: int
    status: int
    message: str
    seconds: float
    problem: str


@dataclass(slots=True)
class Outcome:
    """The answers to all files, and what was left."""

    answers: list[Answer] = field(default_factory=list)
    began_mib: float = 0.0
    peak_mib: float = 0.0
    left: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """Return everything that is wrong."""
        found = [f"{each.name}: {each.problem}" for each in self.answers if each.problem]
        found += [f"left behind: {each}" for each in self.left]
        if self.peak_mib > self.began_mib + GROWTH_MIB:
            found.append(f"the process grew by {self.peak_mib - self.began_mib:.0f} MiB")
        return found


class Registry:
    """A registry as a process, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (port,) = free_ports(1)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
        self._environment = kept | {
            "TIDEGATE_STATE_DIR": str(folder / "state"),
            "TIDEGATE_SERVICE_TOKEN": TOKEN,
            "TIDEGATE_REGISTRY_PORT": str(port),
            "TIDEGATE_ARTIFACT_URL": f"file://{folder}/artifacts",
            "TIDEGATE_AMQP_URL": "amqp://guest:guest@127.0.0.1:9/",  # nothing listens there
            "TIDEGATE_PENDING_ARTIFACT_S": str(PENDING_S),
            "TIDEGATE_DELETED_VERSION_S": "0",
            "TIDEGATE_PROBE_EVERY_S": "1",
            "TMPDIR": str(folder / "tmp"),
        }
        (folder / "tmp").mkdir()
        subprocess.run(
            [sys.executable, "-m", "services.registry", "migrate"], env=self._environment, check=True,
            capture_output=True,
        )  # fmt: skip
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.registry"], env=self._environment, stdout=log, stderr=log
            )
        headers = {"Authorization": f"Bearer {TOKEN}"}
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=ANSWER_S)
        self._wait_ready()

    def _wait_ready(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            with suppress(httpx.TransportError):
                if self.http.get("/health/live").status_code == 200:
                    return
            time.sleep(0.05)
        raise RuntimeError((self._folder / "log").read_text()[-2000:])

    def memory_mib(self, key: str) -> float:
        """Return a size of the process's memory, such as VmHWM, the highest one so far."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(rf"{key}:\s+(\d+)", text)[0]) / 1024

    def refuse(self, case: Case) -> Answer:
        """Upload and register a file. Return the answer."""
        content, began = case.make(), time.monotonic()
        answer = self.http.put("/v1/artifacts", content=content)
        if answer.status_code < 300:
            body: dict[str, Any] = {
                "artifact": answer.json()["sha256"],
                "filename": case.filename,
                **case.more,
            }
            answer = self.http.post("/v1/models/hostile/versions", json=body)
        message = str(answer.json().get("error", "")) if answer.content else ""
        took = time.monotonic() - began
        problem = _problem(case, answer.status_code, message)
        return Answer(case.name, len(content), answer.status_code, message, took, problem)

    def left(self) -> list[str]:
        """Return the models and files that are there, after unused uploads are swept."""
        self._sweep()
        models = [each["name"] for each in self.http.get("/v1/models").json()["items"]]
        return [*models, *self._files(), *map(str, Path("/tmp").glob("tidegate-hostile*"))]

    def _sweep(self) -> None:
        """Let the registry delete unused uploads, as it does when a model is deleted."""
        time.sleep(2 * PENDING_S)
        sha256 = self.http.put("/v1/artifacts", content=GOOD).json()["sha256"]
        body = {"artifact": sha256, "filename": "model.txt"}
        self.http.post("/v1/models/good/versions", json=body).raise_for_status()
        self.http.delete("/v1/models/good").raise_for_status()

    def _files(self) -> list[str]:
        folders = (self._folder / "artifacts", self._folder / "tmp")
        return [str(path) for folder in folders for path in folder.rglob("*") if path.is_file()]

    def stop(self) -> None:
        """End the process."""
        self.http.close()
        self.process.terminate()
        self.process.wait(30)


def _problem(case: Case, status: int, message: str) -> str:
    if status not in case.statuses:
        return f"the status is {status}"
    if re.search(case.words, message, re.DOTALL) is None:
        return f"the message lacks {case.words!r}: {message[:300]}"
    if len(message) > 1500 or any(ord(each) < 32 for each in message):
        return f"the message has {len(message)} characters, or some that a terminal obeys"
    return ""


@contextmanager
def running(folder: Path) -> Iterator[Registry]:
    """Start a registry; stop it at the end."""
    registry = Registry(folder)
    try:
        yield registry
    finally:
        registry.stop()


def measure(folder: Path, *, short: bool = False) -> Outcome:
    """Send all hostile files to a registry in an empty folder; ``short``: only half of the quick ones."""
    outcome = Outcome()
    with running(folder) as registry:
        outcome.began_mib = registry.memory_mib("VmHWM")
        cases = [case for case in CASES if not case.slow][::2] if short else CASES
        outcome.answers = [registry.refuse(case) for case in cases]
        outcome.left = registry.left()
        outcome.peak_mib = registry.memory_mib("VmHWM")
    return outcome


def main() -> int:
    """Print a table of the answers; return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = measure(Path(folder))
    if chosen.json:
        print(json.dumps(asdict(outcome) | {"problems": outcome.problems()}, indent=1))
        return bool(outcome.problems())
    for each in outcome.answers:
        print(f"{each.name:<52} {each.size:>9} B {each.status} {each.seconds:6.2f} s  {each.message[:160]!r}")
    longest = max(each.seconds for each in outcome.answers)
    print(
        f"{len(outcome.answers)} files; memory {outcome.began_mib:.0f} MiB before, at most "
        f"{outcome.peak_mib:.0f} MiB; the longest answer took {longest:.1f} s; left: {len(outcome.left)}"
    )
    for problem in outcome.problems():
        print(f"WRONG: {problem}")
    return bool(outcome.problems())


if __name__ == "__main__":
    sys.exit(main())
