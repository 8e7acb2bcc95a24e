"""Load by wrk: a closed loop over several connections, each with one request at a time."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import places
from benchmarks.errors import BenchmarkFailed
from benchmarks.install import WRK_MISSING
from benchmarks.workloads import Exchange

SCRIPT = places.HERE / "wrk" / "post.lua"
REQUEST_LIMIT_S = 30
WARM_S = 1


class LoadFailed(BenchmarkFailed):
    """wrk is missing, or it printed no figures."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one run of wrk. ``errors``: answers that are not 2xx, and broken connections."""

    connections: int
    requests: int
    seconds: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    errors: int

    @property
    def rate(self) -> float:
        """Successful requests per second."""
        return max(0, self.requests - self.errors) / self.seconds if self.seconds else 0.0

    @property
    def valid(self) -> bool:
        """True if every request succeeded. Other runs do not count."""
        return self.errors == 0 and self.requests > 0

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a plain object, with the rate."""
        return asdict(self) | {"rate": self.rate, "valid": self.valid}


class Load:
    """A run of wrk in progress; ``result`` waits for its figures."""

    def __init__(
        self, base_url: str, exchange: Exchange, connections: int, seconds: int, *, pause_ms: float = 0.0
    ) -> None:
        """Start the load. ``pause_ms`` is the mean pause before a request, uniform from 0 to twice it."""
        wrk = shutil.which("wrk")
        if wrk is None:
            raise LoadFailed(WRK_MISSING)
        self._connections = connections
        self._limit_s = seconds + REQUEST_LIMIT_S + 15
        self._folder = tempfile.TemporaryDirectory(prefix="tidegate-bench-")
        body, headers = Path(self._folder.name, "body"), Path(self._folder.name, "headers")
        body.write_bytes(exchange.body)
        headers.write_text("".join(f"{name}: {value}\n" for name, value in exchange.headers.items()))
        options = [f"-c{connections}", "-t1", f"-d{seconds}s", f"--timeout={REQUEST_LIMIT_S}s"]
        self._process = subprocess.Popen(
            [wrk, *options, "-s", str(SCRIPT), base_url + exchange.path],
            env={
                "BENCH_BODY": str(body),
                "BENCH_HEADERS": str(headers),
                "BENCH_PAUSE_MS": str(pause_ms),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def result(self) -> Figures:
        """Wait for the end of the run and return the figures. Raise LoadFailed."""
        try:
            output, _ = self._process.communicate(timeout=self._limit_s)
        except subprocess.TimeoutExpired:
            raise LoadFailed("wrk has not ended in time") from None
        finally:
            self.stop()
        line = next((text for text in output.splitlines() if text.startswith("BENCH ")), None)
        if line is None:
            raise LoadFailed(f"wrk gave no figures: {output.strip()[-300:]}")
        told = json.loads(line.removeprefix("BENCH "))
        errors = told.pop("bad_status") + told.pop("broken") + told.pop("timeouts")
        return Figures(connections=self._connections, errors=errors, **told)

    def stop(self) -> None:
        """End the run now, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def measure(base_url: str, exchange: Exchange, connections: int, seconds: int) -> Figures:
    """Load a server for some seconds. Raise LoadFailed."""
    load = Load(base_url, exchange, connections, seconds)
    try:
        return load.result()
    finally:
        load.stop()


def warm(base_url: str, exchange: Exchange, connections: int) -> None:
    """Warm up a server with the load that follows. The figures are not used."""
    measure(base_url, exchange, connections, WARM_S)
