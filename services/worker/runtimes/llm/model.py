"""Run a language model. A request is an OpenAI-compatible body, and its answers are the engine's events.

``tidegate_llm.json`` beside this file is the plan: the engine, its slots and its arguments. Each engine is a
module with a function ``create(plan, folder)`` that returns a :class:`calls.Engine`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import locale
import os
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from calls import Call, Engine, Refused
from media import check_media, may_fetch
from tally import Tally

FOLDER = Path(__file__).resolve().parent
MODULES = {"llamacpp": "llamacpp", "vllm": "vllm", "openai-url": "upstream"}
STATS = "/tidegate/stats"
# Seconds between two checks whether the caller still waits. A check calls Triton's process, so it would cost
# too much after each token.
WATCH_S = 0.05


class TritonPythonModel:
    """The only instance of the model. Triton calls ``execute`` as soon as a request arrives."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the engine. Raise an exception, with the reason, if it cannot serve the model."""
        # Triton starts Python in the C locale, in which engines fail on text that is not ASCII.
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_ALL, "C.UTF-8")
        # Waiting threads of the engine must not use the CPU. The engine's library reads this variable when it
        # is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        plan = json.loads((FOLDER / "tidegate_llm.json").read_text())
        self._engine_name, self._may_fetch = plan["engine"], may_fetch(plan)
        module = importlib.import_module(MODULES[plan["engine"]])
        self._engine: Engine = module.create(plan, FOLDER)
        # One permit for each engine slot. A cancelled call keeps its permit until the engine has ended the
        # call, so that the engine never gets more calls than it has slots.
        self._slots = threading.BoundedSemaphore(plan["slots"])
        self._tally = Tally(plan)

    def execute(self, requests: list[Any]) -> None:
        """Start a thread for each request. The thread sends the answers through the request's sender."""
        for request in requests:
            threading.Thread(target=self._serve, args=(request,), daemon=True).start()

    def finalize(self) -> None:
        """End the engine."""
        self._engine.close()

    def _serve(self, request: Any) -> None:
        sender = request.get_response_sender()
        try:
            raw = pb_utils.get_input_tensor_by_name(request, "request").as_numpy()[0]
            if not raw and self._engine_name == "openai-url":
                return  # do not warm up an upstream, because its provider would charge for the call
            document = json.loads(raw) if raw else _warm_up()
            if document["path"] == STATS:
                # The figures that the engine reports replace those of ``Tally``, which counts in this
                # process.
                known = {k: v for k, v in self._engine.stats().items() if v is not None}
                sender.send(_response([json.dumps(self._tally.stats() | known).encode()], {}))
            else:
                self._relay(sender, document)
        except Exception as problem:
            traceback.print_exc()
            with contextlib.suppress(Exception):
                sender.send(_response([_failure(problem).body()], {"status": 500}))
        finally:
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _relay(self, sender: Any, document: dict[str, Any]) -> None:
        """Run a request in a separate thread, and send its events until the last one."""
        call = Call()
        worker = threading.Thread(target=self._run, args=(document, call), daemon=True)
        worker.start()
        ended, check_at = False, 0.0
        try:
            while not ended:
                events, meta, ended = call.take(WATCH_S)
                now = time.monotonic()
                if now >= check_at:
                    check_at = now + WATCH_S
                    if sender.is_cancelled():
                        call.cancel()
                if (events or meta) and not call.cancelled:
                    sender.send(_response(events, meta))
        except BaseException:
            call.cancel()  # otherwise the request would keep its slot, although no caller waits
            raise
        worker.join()

    def _run(self, document: dict[str, Any], call: Call) -> None:
        try:
            if not self._may_fetch:
                check_media(document["body"])
            with self._tally.slot(call, self._slots):
                if not call.cancelled:
                    self._engine.call(document["path"], document["body"], document.get("resume"), call)
        except Refused as problem:
            call.emit([problem.body()], problem.meta())
        except Exception as problem:
            traceback.print_exc()
            call.emit([_failure(problem).body()], {"status": 500})
        finally:
            call.end()


def _warm_up() -> dict[str, Any]:
    """Return the request for an empty input. The worker sends an empty input to warm up the model."""
    return {"path": "/v1/completions", "body": {"prompt": "Hello", "max_tokens": 1, "temperature": 0}}


def _failure(problem: Exception) -> Refused:
    return Refused(500, f"The engine failed: {type(problem).__name__}: {problem}", "server_error")


def _response(events: list[bytes], meta: dict[str, Any]) -> Any:
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor("events", np.array(events, dtype=np.object_)),
            pb_utils.Tensor("meta", np.array([json.dumps(meta).encode()], dtype=np.object_)),
        ]
    )
