"""What a client of Triton does with system shared memory, and what the server says to each step."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException

from tests.e2e.direct import Doors
from tests.e2e.wrong_requests import NAME, plain

A, B = np.arange(16, dtype=np.int32), np.full(16, 3, np.int32)
SIZE = A.nbytes
PREFIX = f"/tgt_{os.getpid()}_"


class Story:
    """The steps with one server over one protocol. ``told``: what the server said to each."""

    def __init__(self, doors: Doors, protocol: str) -> None:
        self.module: Any = triton_http if protocol == "http" else triton_grpc
        url = doors.http.removeprefix("http://") if protocol == "http" else doors.grpc
        self.client = self.module.InferenceServerClient(url)
        self.told: list[Any] = []
        self._stack = ExitStack()

    def run(self) -> list[Any]:
        """Do all steps; return what the server said."""
        with self._stack:
            self._stack.callback(self.client.close)
            self._stack.callback(self.client.unregister_system_shared_memory)
            self.client.unregister_system_shared_memory()
            self.client.unregister_cuda_shared_memory()
            self._registration()
            self._inference()
            self._wrong_parts()
            self.client.unregister_system_shared_memory("input")
            self.told.append(self._names())
            self.client.unregister_system_shared_memory()
            self.told.append(self._names())
        return self.told

    def _registration(self) -> None:
        self.source = self._segment("input", 4 * SIZE)
        self.target = self._segment("output", 2 * SIZE)
        shm.set_shared_memory_region(self.source, [A, B])
        register = self.client.register_system_shared_memory
        for offset, size in ((0, 4 * SIZE + 1), (1, 4 * SIZE), (4 * SIZE, 1)):
            self._try(partial(register, "input", f"{PREFIX}input", size, offset=offset))
        register("input", f"{PREFIX}input", 4 * SIZE)
        register("output", f"{PREFIX}output", 2 * SIZE)
        self._try(lambda: register("input", f"{PREFIX}input", SIZE))
        self._try(lambda: self.client.get_system_shared_memory_status("none"))
        self.told.append(self._names())

    def _inference(self) -> None:
        self._infer((0, SIZE), (SIZE, SIZE), (0, SIZE), (SIZE, SIZE))
        self._infer((0, SIZE), None, (SIZE, SIZE), None)
        self._infer(None, (SIZE, SIZE), None, (0, 2 * SIZE))

    def _wrong_parts(self) -> None:
        whole = (0, SIZE)
        self._infer((4 * SIZE, SIZE), whole, whole, whole)
        self._infer((4 * SIZE - 1, SIZE), whole, whole, whole)
        self._infer((0, 2 * SIZE), whole, whole, whole)
        self._infer((0, SIZE - 4), whole, whole, whole)
        self._infer(whole, whole, (2 * SIZE, SIZE), whole)

    def _infer(self, *parts: tuple[int, int] | None) -> None:
        """Ask with inputs and outputs at these parts, as (offset, size); None: in the message."""
        inputs = [self.module.InferInput(name, [1, 16], "INT32") for name in ("INPUT0", "INPUT1")]
        outputs = [self.module.InferRequestedOutput(name) for name in ("OUTPUT0", "OUTPUT1")]
        for tensor, part, values in zip(inputs, parts[:2], (A, B), strict=True):
            if part is None:
                tensor.set_data_from_numpy(values.reshape(1, 16))
            else:
                tensor.set_shared_memory("input", part[1], offset=part[0])
        for output, part in zip(outputs, parts[2:], strict=True):
            if part is not None:
                output.set_shared_memory("output", part[1], offset=part[0])

        def ask() -> list[Any]:
            answer = self.client.infer(NAME, inputs, outputs=outputs)
            names = ("OUTPUT0", "OUTPUT1")
            return [self._output(answer, name, part) for name, part in zip(names, parts[2:], strict=True)]

        self._try(ask)

    def _output(self, answer: Any, name: str, part: tuple[int, int] | None) -> Any:
        if part is None:
            return answer.as_numpy(name).ravel().tolist()
        values = shm.get_contents_as_numpy(self.target, np.int32, [16], offset=part[0]).tolist()
        described = answer.get_output(name)
        return [values, described["shape"] if isinstance(described, dict) else list(described.shape)]

    def _try(self, step: Callable[[], Any]) -> None:
        try:
            self.told.append(step())
        except InferenceServerException as error:
            self.told.append(plain(error.message()))

    def _names(self) -> Any:
        status = self.client.get_system_shared_memory_status()
        if isinstance(status, list):
            return sorted((each["name"], each["offset"], each["byte_size"]) for each in status)
        return sorted((each.name, each.offset, each.byte_size) for each in status.regions.values())

    def _segment(self, name: str, size: int) -> Any:
        found = shm.create_shared_memory_region(name, PREFIX + name, size)
        self._stack.callback(shm.destroy_shared_memory_region, found)
        return found
