"""``python -m benchmarks.amplification``: measure the cost of a hostile body for a gateway or the registry.

Each body is sent to a new stack while another connection requests ``/health/live`` all the time. The longest
of those requests shows how long the event loop was blocked. Memory is the peak of the process above its
memory before. CPU time is that of the process alone, so other processes do not change it.
"""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from benchmarks import options, session, stack
from benchmarks.stack import Stack

MIB = 2**20
PIECE = 256 * 1024
ANSWER_S = 120.0
BODY = 63 * MIB
HONEST = 5_700_000
INFER = "/v2/models/echo/infer"
BINARY_ANSWER = b'"parameters":{"binary_data_output":true}'


@dataclass(frozen=True, slots=True)
class Attack:
    """A body that is sent ``times`` times concurrently; ``make`` makes it, in pieces."""

    name: str
    service: str
    method: str
    path: str
    make: Callable[[], bytes]
    times: int = 1
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """The effect of an attack. Sizes are in MiB."""

    name: str
    sent_mib: float
    grew_mib: float
    blocked_s: float
    cpu_s: float
    took_s: float
    answer: str


def repeated(first: bytes, middle: bytes, last: bytes, size: int = BODY) -> bytes:
    """Return a text of ``size`` bytes that repeats ``middle``."""
    return first + middle * ((size - len(first) - len(last)) // len(middle)) + last


def distinct_keys() -> bytes:
    """Return an object of millions of distinct keys."""
    return b'{"a":0' + b"".join(b',"%x":0' % n for n in range(BODY // 11)) + b"}"


def tensor(values: int, value: bytes, last: bytes = b"") -> bytes:
    """Return an inference request with an FP32 tensor as JSON."""
    data = b",".join([value] * (values - 1) + [last or value])
    return b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,%d],"data":[%b]}],%b}' % (
        values,
        data,
        BINARY_ANSWER,
    )


def bomb(mib: int, begin: bytes = b"") -> bytes:
    """Return that many MiB of spaces, compressed by gzip."""
    return gzip.compress(begin + b" " * (mib * MIB - len(begin)), 1)


def attacks() -> list[Attack]:
    """Return all attacks."""
    shapes: dict[str, Callable[[], bytes]] = {
        "empty keys": lambda: repeated(b'{"":0', b',"":0', b"}"),
        "distinct keys": distinct_keys,
        "empty lists": lambda: repeated(b'{"inputs":[[]', b",[]", b"]}"),
        "objects of one member": lambda: repeated(b'{"inputs":[{}', b',{"":0}', b"]}"),
        "nested lists": lambda: repeated(b'{"inputs":[[]', b",[[[[[[[[]]]]]]]]", b"]}"),
        "digits": lambda: repeated(b'{"inputs":[0', b",0", b"]}"),
        "numbers": lambda: repeated(b'{"inputs":[999', b",999", b"]}"),
        "strings": lambda: repeated(b'{"inputs":["ab"', b',"ab"', b"]}"),
        "one huge number": lambda: repeated(b'{"inputs":[1', b"1", b"]}"),
    }
    found = [Attack(f"infer: {name}", "gateway", "POST", INFER, make) for name, make in shapes.items()]
    found += [
        Attack("infer: honest FP32", "gateway", "POST", INFER, lambda: tensor(HONEST, b"0.12345678")),
        Attack(
            "infer: FP32 with a NaN", "gateway", "POST", INFER, lambda: tensor(HONEST, b"0.12345678", b"NaN")
        ),
        Attack("generate: empty keys", "gateway", "POST", "/v2/models/echo/generate", shapes["empty keys"]),
        Attack("job: objects of one member", "gateway", "POST", "/v1/jobs", shapes["objects of one member"]),
        Attack(
            "infer: gzip of 255 MiB",
            "gateway",
            "POST",
            INFER,
            lambda: bomb(255),
            headers={"Content-Encoding": "gzip", "Inference-Header-Content-Length": "100"},
        ),
        Attack(
            "infer: gzip of 255 MiB of JSON",
            "gateway",
            "POST",
            INFER,
            lambda: bomb(255, b"{"),
            headers={"Content-Encoding": "gzip"},
        ),
        Attack(
            "batch: no newline", "gateway", "POST", "/v1/batches?model=echo", lambda: b"x" * (60 * MIB), 20
        ),
        Attack(
            "registry: empty lists",
            "registry",
            "POST",
            "/v1/deploy",
            lambda: repeated(b"[[]", b",[]", b"]"),
        ),
        Attack(
            "registry: one string",
            "registry",
            "POST",
            "/v1/deploy",
            lambda: repeated(b'{"a":"', b"a", b'"}', 400 * MIB),
        ),
    ]
    return found


class Lag:
    """Requests a server's health all the time. ``longest``: the longest time until a response."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.longest = 0.0

    def __enter__(self) -> Lag:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(60)

    def _run(self) -> None:
        with socket.create_connection(("127.0.0.1", self._port), ANSWER_S) as line:
            while not self._over.is_set():
                begun = time.perf_counter()
                line.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
                line.recv(65536)
                self.longest = max(self.longest, time.perf_counter() - begun)
                time.sleep(0.002)


def send(port: int, token: str, attack: Attack, body: bytes) -> str:
    """Send one body. Return the status code and the reason of the response."""
    headers = {
        "Host": "localhost",
        "Authorization": f"Bearer {token}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **(attack.headers or {}),
    }
    head = f"{attack.method} {attack.path} HTTP/1.1\r\n" + "".join(
        f"{name}: {value}\r\n" for name, value in headers.items()
    )
    with socket.create_connection(("127.0.0.1", port), ANSWER_S) as line:
        with suppress(ConnectionError):
            line.sendall(head.encode() + b"\r\n")
            for at in range(0, len(body), PIECE):
                line.sendall(body[at : at + PIECE])
        answer = b""
        with suppress(ConnectionError):
            answer = line.recv(65536)
    status = answer[9:12].decode() or "closed"
    with suppress(ValueError, KeyError, IndexError):
        told = json.loads(answer.partition(b"\r\n\r\n")[2])
        return f"{status} {told['reason']}"
    return status


def peak(process: psutil.Process) -> int:
    """Return the peak memory of a process since :func:`forget_peak`, in bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def forget_peak(process: psutil.Process) -> int:
    """Reset the peak to the memory in use now, and return it."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    return int(process.memory_info().rss)


def listener(port: int) -> psutil.Process:
    """Return the process that listens on a port."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            for line in process.net_connections("tcp"):
                if line.status == psutil.CONN_LISTEN and line.laddr.port == port:
                    return process
    raise LookupError(f"nothing listens on port {port}")


def measure(running: Stack, attack: Attack) -> Cost:
    """Send an attack and measure its effect."""
    port = int(running.env[f"TIDEGATE_{attack.service.upper()}_PORT"])
    token = (running.state / "token").read_text().strip()
    process, body = listener(port), attack.make()
    before, cpu = forget_peak(process), sum(process.cpu_times()[:2])
    begun = time.perf_counter()
    with Lag(port) as lag, ThreadPoolExecutor(attack.times) as pool:
        answers = list(pool.map(lambda _: send(port, token, attack, body), range(attack.times)))
        took = time.perf_counter() - begun
    told = ", ".join(f"{answers.count(each)}x {each}" for each in sorted(set(answers)))
    grew = (peak(process) - before) / MIB
    return Cost(
        attack.name,
        round(len(body) * attack.times / MIB, 1),
        round(grew, 0),
        round(lag.longest, 3),
        round(sum(process.cpu_times()[:2]) - cpu, 2),
        round(took, 2),
        told,
    )


@contextmanager
def serving() -> Iterator[Stack]:
    """Start a stack with a model that takes tensors of any size."""
    with stack.tidegate("amplification") as running:
        running.deploy(stack.MODELS / "echo" / "model.py", "echo")
        yield running


def table(costs: list[Cost]) -> str:
    """Return the costs as a Markdown table."""
    rows = [
        "| body | MiB | memory grows by, MiB | loop blocked, s | processor, s | answer |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for c in costs:
        figures = f"{c.sent_mib:.1f} | {c.grew_mib:.0f} | {c.blocked_s:.3f} | {c.cpu_s:.2f}"
        rows.append(f"| {c.name} | {figures} | {c.answer} |")
    return "\n".join(rows)


def run(out: Path, only: str) -> None:
    """Measure all and write the table."""
    costs = []
    chosen = [attack for attack in attacks() if only in attack.name]
    with serving() as running:
        for attack in chosen:
            costs.append(measure(running, attack))
            print(table(costs[-1:]).splitlines()[-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "amplification.json").write_text(json.dumps([asdict(cost) for cost in costs], indent=1))
    (out / "amplification.md").write_text(table(costs) + "\n")
    print(table(costs))


def main() -> None:
    """Parse the command line and measure."""
    parser = options.parser(__doc__)
    parser.add_argument("--only", default="", help="measure only those whose name contains this")
    given = parser.parse_args()
    with session.session():
        run(given.out, given.only)


if __name__ == "__main__":
    session.run(main)
