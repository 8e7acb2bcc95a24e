"""A Deployment whose model is at another server: the real Triton as the upstream of the real Triton."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.worker.application.model_calls import decide_failure
from services.worker.domain.backlog import QueuedRequest
from tests.integration.worker.test_triton_models import DIGITS, DIGITS_OUTPUTS, ask, request
from tidegate.cli.oip_upstream import described
from tidegate.kernel.errors import ModelFailed, UpstreamUnavailable
from tidegate.kernel.protocol.models import Signature

pytestmark = pytest.mark.integration

Run = Callable[..., Awaitable[Any]]


@asynccontextmanager
async def over_tcp(path: str) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """Yield an address of a Triton that listens on a Unix socket, and a function that closes this address."""
    open_pipes: set[asyncio.StreamWriter] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(path)
        open_pipes.update((writer, far_writer))
        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)

    def close() -> None:
        server.close()
        for pipe in open_pipes:
            pipe.transport.abort()

    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", close
    close()


@pytest.mark.parametrize("binary", [True, False])
async def test_an_upstream_answers_as_its_own_model_does(
    run: Run, models: Path, tmp_path: Path, binary: bool
) -> None:
    far = await run("onnx", models / "model.onnx", DIGITS, "digits")
    async with over_tcp(far.process.http) as (server, close):
        address = f"{server}/v2/models/digits"
        if binary:
            signature, extension = await asyncio.to_thread(described, address, None)
            # The runtime that stands in for Triton's ONNX backend describes the rows as an axis.
            assert [each["shape"] for each in signature["inputs"]] == [[-1, 64]]
            assert [each["shape"] for each in signature["outputs"]] == [[-1], [-1, 10]]
            Signature.model_validate(signature)
            assert extension
        file = tmp_path / "upstream.json"
        file.write_text("{}")
        near = await run("oip", file, DIGITS, "near", upstream={"address": address, "binary": binary})
        with np.load(models / "heldout.npz") as heldout:
            images = heldout["image"][:64]
        expected = await ask(far.client, request("digits", "image", images))
        found = await ask(near.client, request("near", "image", images))
        for name in DIGITS_OUTPUTS:
            assert np.allclose(found[name], expected[name])
        (label,) = (await ask(near.client, request("near", "image", images, ("label",)))).values()
        assert (label == expected["label"]).all()
        if not binary:
            return
        close()
        # The circuit breaker opens after five failures. On a busy machine, it may have closed again before
        # the sixth call.
        for _ in range(20):
            with pytest.raises(ModelFailed) as caught:
                await ask(near.client, request("near", "image", images))
            if "UpstreamUnavailable: 127.0.0.1 fails repeatedly" in caught.value.message:
                break
        assert "UpstreamUnavailable: 127.0.0.1 fails repeatedly" in caught.value.message
        group: list[QueuedRequest] = []
        failure = decide_failure(group, caught.value, "")
        assert isinstance(failure.error, UpstreamUnavailable)
        assert failure.error.message.startswith("the upstream is not available: 127.0.0.1 fails repeatedly")
