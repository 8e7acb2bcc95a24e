"""Measure each batching setting at each load on a temporary replica, for ``tidegate tune``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tidegate.cli.api import Control, Doc, token_of
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.progress import Steps
from tidegate.cli.publish import status_of
from tidegate.cli.temporary_deployment import TemporaryDeployment
from tidegate.client.codec import Tensor, encode_request
from tidegate.client.core import arrange
from tidegate.kernel.errors import BadRequest, ModelFailed, TidegateError, Unavailable
from tidegate.tune import calls, grid, inputs
from tidegate.tune.curve import Point, choose
from tidegate.tune.grid import BatchSetting
from tidegate.tune.load_generator import LoadResult
from tidegate.tune.measurement import GatewayAddress, measure, request_bytes


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """The plan of a sweep: the batching settings and loads to measure, and the durations.

    ``latency_ms``: the limit of the p99 latency. ``connections``: the loads, as numbers of connections.
    ``windows_ms`` and ``max_batch``: the batch windows in milliseconds and the batch sizes to measure.
    ``seconds``: the duration of the measurement of one load. ``limit_s``: after this time in seconds, no
    further setting is measured.

    If ``max_batch`` is None, the sweep chooses batch sizes up to the signature's ``max_batch_size``. If
    ``inputs`` is None, the requests contain zeros.
    """

    latency_ms: float
    connections: Sequence[int]
    windows_ms: Sequence[float]
    max_batch: Sequence[int] | None
    seconds: float
    limit_s: float
    inputs: Any = None


@dataclass(frozen=True, slots=True)
class SweepResults:
    """The measurements of a sweep.

    ``left``: the number of settings that were not measured, because the plan's time limit was reached.
    """

    points: list[Point]
    left: int


class BatchingSweep:
    """A sweep over batching settings of the Deployment ``source``, which serves ``version``.

    Both are documents of the registry.
    """

    def __init__(self, control: Control, source: Doc, version: Doc, plan: SweepPlan, steps: Steps) -> None:
        self._control = control
        self._version = version
        self._plan = plan
        self._steps = steps
        self._limit = source.get("max_concurrency")
        self._temporary = TemporaryDeployment(control, source, steps)
        self._address = GatewayAddress.of(control.settings.gateway_url)
        self._request = b""
        self._points: list[Point] = []

    def run(self) -> SweepResults:
        """Start a temporary replica, measure each setting, and remove the replica.

        Raise UsageError for inputs that do not fit the model's signature. Raise ModelFailed, BadRequest or
        Unavailable if a measurement gets no answer.
        """
        end = time.monotonic() + self._plan.limit_s
        signature = self._version.get("signature")
        # If the registry has no signature, the largest batch is unknown until the replica reports it. Then
        # the replica starts with the batching of ``source``.
        first = self._settings(signature)[0] if signature else None
        with self._temporary.running(first):
            settings = self._settings(signature or self._learned())
            left = len(settings)
            for setting in settings:
                if time.monotonic() >= end and self._points:
                    break
                self._temporary.use(setting)
                self._measure(setting, f"{len(settings) - left + 1} of {len(settings)}")
                left -= 1
        return SweepResults(self._points, left)

    def _learned(self) -> Doc:
        signature = self._temporary.signature()
        if signature is None:
            raise BadRequest(
                "The model server does not report the model's inputs, so no request can be made. Deploy the "
                "model with a signature: tidegate deploy ... --signature FILE.json"
            )
        return signature

    def _settings(self, signature: Doc) -> list[BatchSetting]:
        """Build the request and store it in ``self._request``. Return the batching settings.

        The settings are in the order in which they are measured.
        """
        if signature.get("decoupled"):
            raise BadRequest(
                "The model is decoupled (many answers to a request), so it has no batch to tune."
            )
        tensors = self._tensors(signature)
        body, head = encode_request(tensors)
        token = token_of(self._control.settings)
        self._request = request_bytes(self._address, self._temporary.name, body, head, token)
        limit = int(signature["max_batch_size"])
        rows = inputs.rows_of(tensors, limit)
        if limit and rows > limit:
            raise UsageError(f"The input has {rows} rows, but the model accepts at most {limit} in a call.")
        most = min(limit, self._limit) if self._limit else limit
        sizes = grid.batches(most, rows, self._plan.connections)
        if self._plan.max_batch:
            sizes = [min(size, most or 1) for size in self._plan.max_batch]
        return grid.settings(sizes, self._plan.windows_ms, rows)

    def _tensors(self, signature: Doc) -> list[Tensor]:
        given = inputs.zeros(signature) if self._plan.inputs is None else self._plan.inputs
        try:
            return arrange(str(self._version["model"]), given, signature)
        except TypeError as error:
            raise UsageError(f"{error}.") from None

    def _measure(self, setting: BatchSetting, number: str) -> None:
        row, mine = f"{setting}", []
        for connections in self._plan.connections:
            self._steps.change(row, "running", f"{number}: {_callers(connections)}")
            before = calls.read(self._temporary.replica)
            figures = measure(self._address, self._request, connections, self._plan.seconds)
            if figures.failed and not figures.answers:
                raise _no_answers(figures, f"With {row} and {_callers(connections)}")
            mine.append(_point(setting, connections, figures, self._batch_since(before)))
        self._points += mine
        self._steps.change(row, "done", f"{number}: {_in_words(mine, self._plan.latency_ms)}")

    def _batch_since(self, before: calls.Calls | None) -> float | None:
        """Return the mean batch size of the calls that the replica ran after the reading ``before``.

        ``before``: the replica's counters at an earlier time. If its counters cannot be read, return the mean
        batch size that its worker reports for the latest calls. If there is no such report either, return
        None.
        """
        now = calls.read(self._temporary.replica) if before else None
        if before and now:
            return now.mean_since(before)
        status = status_of(self._control, self._temporary.name)
        reports: list[Doc] = status["replicas"] if status else []
        return reports[0]["batch_mean"] if reports else None


def _no_answers(figures: LoadResult, where: str) -> TidegateError:
    told = f"{where}: {figures.problem}"
    if 400 <= figures.status < 500:
        return BadRequest(told)
    return ModelFailed(told) if figures.status == 500 else Unavailable(told)


def _point(setting: BatchSetting, connections: int, figures: LoadResult, batch_mean: float | None) -> Point:
    return Point(
        setting=setting,
        connections=connections,
        rps=figures.answers / figures.seconds if figures.seconds else 0.0,
        p50_ms=figures.p50_ms,
        p99_ms=figures.p99_ms,
        batch_mean=batch_mean,
        answers=figures.answers,
        failed=figures.failed,
    )


def _callers(connections: int) -> str:
    return "1 connection" if connections == 1 else f"{connections} connections"


def _in_words(points: Sequence[Point], latency_ms: float) -> str:
    best = choose(points, latency_ms)
    if best is None:
        return f"no setting reaches a p99 of {latency_ms:g} ms or less"
    return f"{best.rps:,.0f} requests/s, p99 {best.p99_ms:.3g} ms"
