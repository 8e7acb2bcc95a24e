"""Send the requests of a model to an upstream.

The upstream is an HTTP server with the Open Inference Protocol (KServe v2).

This folder is copied into the model's folder, together with ``breaker.py`` from the runtime of language
models. The code runs in the models' Python, where numpy is the only installed package. The credential is
stored only in an environment variable of this process.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from breaker import Breaker, MinuteLimit
from upstream_http import Upstream, UpstreamUnavailable

PLAN, CREDENTIAL = "tidegate_upstream.json", "TIDEGATE_UPSTREAM_CREDENTIAL"


class TritonPythonModel:
    """One instance of the model. It has its own connection, circuit breaker and request limit."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the plan, which holds the upstream's address and limits.

        The first request opens the connection to the upstream.
        """
        config = json.loads(args["model_config"])
        plan = json.loads(Path(__file__).with_name(PLAN).read_text())
        self._outputs = [output["name"] for output in config["output"]]
        self._upstream = Upstream(plan, os.environ.get(CREDENTIAL, ""))
        self._breaker = Breaker()
        self._limit = MinuteLimit(plan["requests_per_minute"], time.monotonic())

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return one response for each request, in order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            self._admit()
            inputs = [(each.name(), each.as_numpy()) for each in request.inputs()]
            names = request.requested_output_names() or self._outputs
            try:
                arrays = self._upstream.infer(inputs, list(names))
            except UpstreamUnavailable:
                self._breaker.fail(time.monotonic())
                raise
            except Exception:
                self._breaker.succeed()  # the upstream answered, although with an error
                raise
            self._breaker.succeed()
            return pb_utils.InferenceResponse([pb_utils.Tensor(name, arrays[name]) for name in names])
        except Exception as problem:
            text = f"{type(problem).__name__}: {problem}"
            return pb_utils.InferenceResponse([], pb_utils.TritonError(text))

    def _admit(self) -> None:
        now = time.monotonic()
        if (wait_s := self._limit.wait_s(1, now)) > 0:
            raise UpstreamUnavailable(
                f"the limit requests_per_minute is reached; try again in {wait_s:.0f} s"
            )
        if (wait_s := self._breaker.admit(now)) > 0:
            raise UpstreamUnavailable(
                f"{self._upstream.host} fails repeatedly; the next attempt is in {wait_s:.0f} s"
            )
        self._limit.take(1, now)
