"""Run vLLM's server in a separate environment, on a Unix socket that only this process uses.

If the server ends, this process ends as well. Then the worker treats the requests in the model as lost, and
starts the model again. Each time the server ends soon after its start, the worker waits longer before it
starts the model again.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vllm_command
import vllm_resume
from bridge import Failure, Server, check_path, get, post, relay
from calls import Call, Refused
from vllm_events import VllmEvents, prepared
from vllm_metrics import read_metrics

KEEPER = Path(__file__).with_name("keeper.py")
POLL_S, REPORT_EVERY_S = 0.25, 10.0
# After a failed request, wait at most this many seconds until the server ends or reports that it is healthy.
VERDICT_S = 30.0
_ROOT_CAUSE = re.compile(r"\b\w*(Error|Exception)\b: (?!Engine core initialization failed)")


def create(plan: dict[str, Any], folder: Path) -> Vllm:
    """Start the server, and return its engine when the server is ready.

    Raise RuntimeError, with the reason, if the server ends before it is ready.
    """
    return Vllm(plan, folder)


class Vllm:
    """A vLLM server. ``plan``: see ``services/worker/domain/llm_plan.py``.

    ``on_end``: a function that gets the reason when the server has ended unexpectedly. By default, this
    process ends.
    """

    def __init__(
        self, plan: dict[str, Any], folder: Path, on_end: Callable[[str], None] | None = None
    ) -> None:
        self._plan, self._on_end, self._closing = plan, on_end or _end_this_process, False
        self._lines: deque[str] = deque(maxlen=400)
        config = _config(folder / plan["weights"])
        self._context = min(plan["context"], config.get("max_position_embeddings") or plan["context"])
        place = tempfile.mkdtemp(prefix="vllm-")
        self._server = Server(socket=f"{place}/s", connect_s=30.0)
        python = Path(plan["engine_python"])
        command = vllm_command.command(plan, config, folder, self._server.socket, bf16=_cpu_has_bf16())
        variables = vllm_command.environment(plan, config, os.environ, python.parent.parent / "lib", place)
        self._process = subprocess.Popen(
            [str(python), "-I", "-S", str(KEEPER), place, *command],
            env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, text=True, errors="replace",
        )  # fmt: skip
        self._reading = threading.Thread(target=self._read_log, daemon=True)
        self._reading.start()
        self._wait_ready()
        threading.Thread(target=self._watch, daemon=True).start()

    def call(self, path: str, body: dict[str, Any], resume: dict[str, Any] | None, call: Call) -> None:
        """Run a request, and emit its events until the last one."""
        check_path(path)
        model = self._model(body)
        try:
            if resume:
                self._continue(path, body, resume, model, call)
            else:
                reader = VllmEvents(body, self._verdict)
                relay(self._server, path, prepared(path, body, model), reader, call)
        except Failure as problem:
            if problem.status == 0 or problem.status >= 500:
                self._verdict()
            if problem.status == 0:
                raise Refused(503, f"vLLM did not answer: {problem}", "server_error") from None
            call.emit([problem.body], {"status": problem.status, "retry_after_s": problem.retry_after_s})
        except Refused as problem:
            if problem.code == "stream_broke_off":
                self._verdict()
            raise

    def stats(self) -> dict[str, Any]:
        """Return the facts that vLLM reports.

        They are fields of ``tidegate.kernel.protocol.presence.EngineReport``.
        """
        return {"slots": self._plan["slots"], **read_metrics(get(self._server, "/metrics")[1].decode())}

    def close(self) -> None:
        """End the server and all its processes."""
        self._closing = True
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(8.0)
        except subprocess.TimeoutExpired:
            self._kill()

    def _model(self, body: dict[str, Any]) -> str:
        """Return the engine's name for the model in a request: an adapter, or the base model."""
        adapter = str(body.get("model") or "").partition(":")[2]
        if not adapter:
            return str(self._plan["name"])
        if adapter not in self._plan["adapters"]:
            known = ", ".join(self._plan["adapters"]) or "none"
            raise Refused(
                404, f"The model has no adapter {adapter!r}. It has: {known}.", code="model_not_found"
            )
        return adapter

    def _continue(
        self, path: str, body: dict[str, Any], resume: dict[str, Any], model: str, call: Call
    ) -> None:
        if reason := vllm_resume.refusal(path, body):
            raise Refused(
                500, f"The stream was lost and cannot be continued: {reason}. Send the request again.",
                "server_error", "stream_not_continued",
            )  # fmt: skip
        emitted = resume["emitted"]
        done, skip = vllm_resume.kept(emitted, resume.get("text") or "", lambda ids: self._decode(ids, model))
        if done == len(emitted) and (ends := vllm_resume.finished(path, body, resume)):
            call.emit(ends, {"usage": [len(resume["prompt"]), done, 0]})
            return
        ids = [*resume["prompt"], *emitted[:done]]
        if len(ids) >= self._context:
            raise Refused(400, f"The prompt and its answer fill the context of {self._context} tokens.")
        reader = vllm_resume.ContinuedEvents(path, body, resume, done, skip)
        sent = vllm_resume.request(body, ids, done, self._context, model)
        relay(self._server, vllm_resume.COMPLETIONS, sent, reader, call)

    def _decode(self, ids: list[int], model: str) -> str:
        return str(post(self._server, "/detokenize", {"model": model, "tokens": ids})["prompt"])

    # --- the server's process --------------------------------------------------------------------------

    def _wait_ready(self) -> None:
        began = reported = time.monotonic()
        while not self._healthy():
            if self._process.poll() is not None:
                self._reading.join(5)
                raise RuntimeError(f"vLLM did not start: {self._reason()}")
            now = time.monotonic()
            if now - reported >= REPORT_EVERY_S:
                reported = now
                last = self._lines[-1] if self._lines else "loading its code"
                _say(f"vLLM has been starting for {now - began:.0f} s: {last}"[:300])
            time.sleep(POLL_S)
        _say(f"vLLM is ready after {time.monotonic() - began:.1f} s")

    def _healthy(self) -> bool:
        try:
            return get(self._server, "/health")[0] == 200
        except (OSError, http.client.HTTPException):  # a server that is ending may break off its answer
            return False

    def _verdict(self) -> None:
        """Wait after a failed request until the server is healthy.

        If the server ends instead, ``_watch`` ends this process. Return after ``VERDICT_S`` seconds at the
        latest.
        """
        until = time.monotonic() + VERDICT_S
        while not self._closing and time.monotonic() < until:
            if self._process.poll() is None and self._healthy():
                return
            time.sleep(POLL_S)

    def _read_log(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line.rstrip())
            print(line, end="", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        code = self._process.wait()
        self._kill()
        if not self._closing:
            self._reading.join(2)
            self._on_end(f"vLLM ended with exit code {code}: {self._reason()}")

    def _kill(self) -> None:
        """Kill the server's processes that still run.

        This is needed if the keeper (``keeper.py``) was killed or is too slow. Normally, the keeper ends
        these processes.
        """
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass

    def _reason(self) -> str:
        """Return the log line that best explains why the server ended.

        It is the first line with an error. If no line has an error, it is the last line.
        """
        lines = list(self._lines)
        found = next(
            (line for line in lines if _ROOT_CAUSE.search(line)), lines[-1] if lines else "no output"
        )
        return re.sub(r"^\(\w+ pid=\d+\) ?", "", found)[:500]


def _end_this_process(reason: str) -> None:
    _say(reason)
    os._exit(70)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _config(weights: Path) -> dict[str, Any]:
    try:
        found = json.loads((weights / "config.json").read_text())
    except OSError:
        return {}
    # The configuration of a model for text and images has the sizes of its text model in ``text_config``.
    return {**found, **(found.get("text_config") or {})}


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
