"""Run one request in the foreground, on a Triton that runs nothing else.

The command is ``python -m services.worker.reproduce``. ``tidegate reproduce`` starts it for a dead letter.
The program prints the model's log. It does not connect to the broker, to a store or to a replica.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import signal
import struct
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from services.worker.adapters.model import Model
from services.worker.adapters.model_call import ModelAnswer
from services.worker.adapters.sandbox import sandbox_of
from services.worker.adapters.triton_client import TritonClient
from services.worker.adapters.triton_process import TritonProcess, new_triton
from services.worker.application.preparation import Preparation
from services.worker.domain.phases import Phases
from services.worker.settings import WorkerSettings
from tidegate.kernel import tasks
from tidegate.kernel.errors import TidegateError, Unavailable
from tidegate.kernel.protocol.envelope import Request, Undecodable, read_call_key, read_request
from tidegate.kernel.protocol.models import Assignment
from tidegate.kernel.protocol.tensors import DATATYPES
from tidegate.kernel.settings.base import Settings

POLL_S = 0.1
FAULTHANDLER = b"\n\nimport faulthandler as _faulthandler\n\n_faulthandler.enable()\n"
SHOWN_BYTES = 80
ANSWERED, FAILED, DIED = 0, 1, 3
# Informational lines of Triton, and its tables. They are not printed.
_TRITONS_LINE = re.compile(r"I\d{4} |[|+]")


async def reproduce(settings: WorkerSettings, folder: Path, request: Request, timeout_s: float) -> int:
    """Run ``request`` in the version that the assignment in ``folder`` names.

    Returns exit code 0 if the model answered, 1 after an error or a timeout, 3 if the model server died.
    """
    assignment = Assignment.model_validate_json((folder / "assignment.json").read_bytes())
    async with _serving(settings, assignment, folder) as (triton, client, model):
        _say(f"running the request {request.id.hex()} of {_size(request)} bytes")
        try:
            async with asyncio.timeout(timeout_s):
                await _run(model, request, timeout_s)
            _say("The model answered: the failure did not occur again.")
            return ANSWERED
        except TimeoutError:
            _say(f"The model did not answer within {timeout_s:g} s.")
            return FAILED
        except Unavailable as error:
            _say(await _how_it_died(triton, client, error))
            return DIED
        except (TidegateError, Undecodable) as error:
            _say(f"The model rejected the request: {error}")
            return FAILED


@asynccontextmanager
async def _serving(
    settings: WorkerSettings, assignment: Assignment, folder: Path
) -> AsyncIterator[tuple[TritonProcess, TritonClient, Model]]:
    """Start a Triton with the version's model, and print its log. Stop it at the end of the block."""
    # Use a sandbox as in a replica, because the operator trusts neither the model nor this request.
    sandbox = sandbox_of(settings, folder)
    preparation = Preparation(settings, assignment, folder, sandbox, Phases(time.perf_counter), _say)
    install = await preparation.install()
    operator = Settings()  # this process is no replica, so it uses the operator's token
    prepared = await preparation.prepare(install, operator.registry_url, operator.service_token)
    _enable_faulthandler(prepared.repository)
    models = prepared.models
    triton = new_triton(install, folder, prepared.options, sandbox)
    following = asyncio.create_task(_follow(triton.log_path))
    client = None
    try:
        _say("starting Triton")
        await triton.start()
        client = TritonClient(triton.target, triton.http)
        _say("loading the model")
        await prepared.loader.load(client, models, triton.tail)
        signature = await client.signature(models[-1])
        yield triton, client, Model(client, models[-1], signature.outputs, decoupled=signature.decoupled)
    finally:
        if client is not None:
            await client.close()
        await triton.stop(grace_s=0)
        preparation.close()
        await asyncio.sleep(POLL_S)  # leave time to print the end of the log
        await tasks.end(following)


def _enable_faulthandler(repository: Path) -> None:
    """Make Python models print a traceback when a signal kills them.

    Triton's Python ignores PYTHONFAULTHANDLER. So add code to the models' files in this Triton's repository.
    """
    for path in repository.glob("*/*/model.py"):
        if path.resolve().is_relative_to(repository.resolve()):  # skip links to the cached artifact
            code = path.read_bytes()
            path.unlink()  # it may be a hard link to the cached artifact, which must not change
            path.write_bytes(code + FAULTHANDLER)
            path.chmod(0o644)  # the model's user must be able to read the file, whatever the umask is


async def _run(model: Model, request: Request, timeout_s: float) -> None:
    if not model.decoupled:
        _print_answer(await model.call([request], timeout_s))
        return
    async with aclosing(model.stream(request)) as answers:
        async for answer in answers:
            _print_answer(answer)


async def _how_it_died(triton: TritonProcess, client: TritonClient, error: Unavailable) -> str:
    if client.model_died:
        return "Reproduced: the model's process died. Its output is above."
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2.0):
            code = await triton.wait()
            return f"Reproduced: Triton {ended(code)}."
    return f"The model server was lost: {error.message}"


def ended(code: int) -> str:
    """Return a text about how a process ended.

    ``code``: the exit code. If a signal killed the process, it is minus the number of the signal.
    """
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    return f"was killed by signal {-code}"


async def _follow(path: Path) -> None:
    """Print each line of a log soon after it is written. Lines of Triton are left out."""
    at, rest = 0, b""
    while True:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as log:
            log.seek(at)
            data = log.read()
            at += len(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                text = line.decode(errors="replace")
                if text.strip() and not _TRITONS_LINE.match(text):
                    print(f"  | {text}", flush=True)
        await asyncio.sleep(POLL_S)


def _print_answer(answer: ModelAnswer) -> None:
    for output in answer.outputs:
        shown = _values(output.datatype, bytes(output.raw[:SHOWN_BYTES]))
        more = " ..." if len(output.raw) > SHOWN_BYTES else ""
        print(f"{output.name}: {output.datatype} {list(output.shape)} {shown}{more}", flush=True)
    if answer.parameters:
        print(f"parameters: {answer.parameters}", flush=True)


def _values(datatype: str, raw: bytes) -> str:
    """Return a tensor's first values as text, or its raw bytes if the datatype is no simple number."""
    form = {"FP32": "f", "FP64": "d", "BOOL": "?", "INT8": "b", "UINT8": "B", "INT16": "h", "UINT16": "H"}
    form |= {"INT32": "i", "UINT32": "I", "INT64": "q", "UINT64": "Q"}
    size = DATATYPES[datatype].size
    if datatype not in form or not size:
        return repr(raw)
    count = len(raw) // size
    return str(list(struct.unpack_from(f"<{count}{form[datatype]}", raw)))


def _size(request: Request) -> int:
    return sum(map(len, request.data))


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> int:
    """Read a request from a file, and run it; see :func:`reproduce`."""
    parser = argparse.ArgumentParser(
        prog="services.worker.reproduce", description="Run one request alone on a separate Triton."
    )
    parser.add_argument("--replica-dir", type=Path, required=True, help="the folder with assignment.json")
    parser.add_argument("--payload", type=Path, required=True, help="a file with the request's frame")
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="longest time for the request, in seconds [60]"
    )
    chosen = parser.parse_args()
    try:
        request = read_request(chosen.payload.read_bytes())
        read_call_key(request.key)
    except Undecodable as error:
        _say(f"The payload is not a request that can be read: {error}.")
        return FAILED
    try:
        return asyncio.run(reproduce(WorkerSettings(), chosen.replica_dir, request, chosen.timeout))
    except TidegateError as error:
        _say(error.message)
        return FAILED
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
