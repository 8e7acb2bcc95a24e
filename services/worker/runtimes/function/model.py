"""Run a Python file that has a function or method ``predict`` and does not use Triton's API.

The Python file is the user's ``model.py``. This module is copied beside it, with the name
``tidegate_runtime.py``. ``tidegate_plan.json`` says how to call ``predict``. If Tidegate is not installed,
the user's file imports Tidegate's names from the folder ``tidegate_sdk``.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from tidegate_rows import Rows, failure, parameter, response
from tidegate_values import Outputs, argument

FOLDER = Path(__file__).resolve().parent


class TritonPythonModel:
    """One instance of the model. It imports the user's module once and calls ``load`` once."""

    def initialize(self, args: dict[str, str]) -> None:
        """Import the user's file, create an object of its class if it has one, and call ``load``."""
        config = json.loads(args["model_config"])
        self._plan = json.loads((FOLDER / "tidegate_plan.json").read_text())
        self._outputs = Outputs(self._plan["outputs"], pb_utils.triton_string_to_numpy)
        self._loop = _running_loop() if self._plan["asynchronous"] else None
        self._streaming: set[threading.Thread] = set()
        module = _imported()
        target = getattr(module, self._plan["entry"])() if self._plan["entry"] else module
        if self._plan["load"] is not None:
            gpu = args["model_instance_kind"] == "GPU"
            facts = {
                "device": f"cuda:{args['model_instance_device_id']}" if gpu else "cpu",
                "folder": FOLDER,
                "threads": int(parameter(config, "threads") or 1),
            }
            self._finished(target.load(**{name: facts[name] for name in self._plan["load"]}))
        self._predict = target.predict
        rows = Rows(config, self._run, error_response, decode=False)
        self.execute = self._streams if self._plan["streams"] else rows.execute

    def finalize(self) -> None:
        """Wait for the streams in flight, at most 5 s for each."""
        for thread in list(self._streaming):
            thread.join(timeout=5)

    def _run(self, feed: dict[str, Any], names: list[str]) -> list[Any]:
        rows = len(next(iter(feed.values()))) if self._plan["rows"] else None
        found = self._outputs.named(self._finished(self._predict(**self._arguments(feed))), rows)
        return [found[name] for name in names]

    def _arguments(self, feed: dict[str, Any]) -> dict[str, Any]:
        kinds = self._plan["inputs"]
        return {name: argument(array, kinds[name]) for name, array in feed.items()}

    def _finished(self, result: Any) -> Any:
        """Return the result of a call. If it is a coroutine, run it and return its result."""
        if not asyncio.iscoroutine(result):
            return result
        if self._loop is None:
            self._loop = _running_loop()
        return asyncio.run_coroutine_threadsafe(result, self._loop).result()

    def _streams(self, requests: list[Any]) -> None:
        """Start a thread for each request. The thread sends the answers of the stream."""
        for request in requests:
            thread = threading.Thread(target=self._stream, args=(request,), daemon=True)
            self._streaming.add(thread)
            thread.start()

    def _stream(self, request: Any) -> None:
        sender = request.get_response_sender()
        try:
            names = request.requested_output_names() or self._outputs.names
            feed = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            results = self._predict(**self._arguments(feed))
            if self._loop is not None:
                results = _waited_for(results, self._loop)
            for each in results:
                if sender.is_cancelled():
                    break
                found = self._outputs.named(each, None)
                sender.send(response(names, [found[name] for name in names]))
            results.close()
        except Exception as problem:
            sender.send(error_response(problem))
        finally:
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            self._streaming.discard(threading.current_thread())


def error_response(problem: Exception) -> Any:
    """Return a response with the exception's type, text and traceback.

    The worker removes the traceback from the answer. It logs the traceback with the id of the request.
    """
    stack = problem.__traceback__
    while stack is not None and Path(stack.tb_frame.f_code.co_filename).name.startswith("tidegate_"):
        stack = stack.tb_next
    frames = "".join(traceback.format_tb(stack))
    more = f"\nTraceback (most recent call last):\n{frames}" if frames else ""
    return failure(problem, hidden=f"{FOLDER}/", more=more)


def _imported() -> Any:
    # Append the folder at the end of `sys.path`. If the version's requirements include Tidegate, Python finds
    # that package first. It has names that the folder lacks.
    sys.path.append(str(FOLDER / "tidegate_sdk"))
    spec = importlib.util.spec_from_file_location("model", FOLDER / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["model"] = module  # dataclasses and pickles look up the module by its name
    spec.loader.exec_module(module)
    return module


def _running_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that runs in a separate thread until the process ends."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="tidegate-loop").start()
    return loop


def _waited_for(generator: Any, loop: asyncio.AbstractEventLoop) -> Any:
    """Yield the items of the asynchronous ``generator``. Closing the result also closes ``generator``."""
    try:
        while True:
            try:
                yield asyncio.run_coroutine_threadsafe(_next(generator), loop).result()
            except StopAsyncIteration:
                return
    finally:
        asyncio.run_coroutine_threadsafe(generator.aclose(), loop).result()


async def _next(generator: Any) -> Any:
    return await generator.__anext__()
