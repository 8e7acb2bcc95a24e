"""The calls that are the same in both clients. ``sync.py`` and ``aio.py`` have the other calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy.typing as npt

from tidegate.client.batches import BatchFlows
from tidegate.client.calls import Call
from tidegate.client.catalogue import CatalogueCalls, CatalogueFlows
from tidegate.client.core import Core, Metadata, Version
from tidegate.client.feedback import FeedbackFlows, item_of
from tidegate.client.flow import Caller, Flow
from tidegate.client.jobs import Document, Handle, JobFlows
from tidegate.client.llm import ChatResult
from tidegate.client.llm_flows import LlmFlows
from tidegate.client.quality import QualityCalls, QualityFlows
from tidegate.client.result import InferResult
from tidegate.client.traffic import TrafficCalls, TrafficFlows
from tidegate.client.uploads import UploadFlows
from tidegate.client.verification import VerificationCalls, VerificationFlows


class SharedCalls(TrafficCalls, QualityCalls, CatalogueCalls, VerificationCalls):
    """The calls that are the same in both clients. Each call runs one flow and returns its result."""

    def __init__(self, timeout_s: float, retries: int) -> None:
        self._core = Core(timeout_s, Caller(retries))
        self._jobs = JobFlows(self._core)
        self._batches = BatchFlows(self._core)
        self._llm = LlmFlows(self._core)
        self._feedback = FeedbackFlows(self._core)
        self._traffic = TrafficFlows(self._core)
        self._quality = QualityFlows(self._core)
        self._uploads = UploadFlows(self._core)
        self._catalogue = CatalogueFlows(self._core)
        self._verification = VerificationFlows(self._core)

    @Call
    def infer(
        self,
        model: str,
        inputs: Mapping[str, npt.ArrayLike] | npt.ArrayLike,
        *,
        version: Version = None,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> Flow[InferResult]:
        """Run ``model`` on arrays by input name, or on one array if the model has a single input.

        An array of another dtype is cast if no value changes. float64 arrays and lists of floats are rounded
        to the model's float datatype. If an array cannot be converted in one of these ways, raise TypeError
        with the expected datatype. BYTES inputs are object arrays of ``bytes`` or ``str``. BF16 inputs are
        float32 arrays, which are rounded. ``outputs`` names the outputs to return (default: all).

        Raise DeadlinePassed after ``timeout_s`` seconds. Raise Overloaded, with ``retry_after_s``, if the
        request is rejected because of too much load. Raise NotFound for an unknown model, and BadRequest for
        a wrong request. Raise ModelFailed, with the model's own message, if the model fails. Raise
        Unreachable if no gateway answers.
        """
        return self._core.infer(
            model,
            inputs,
            version=version,
            outputs=outputs,
            timeout_s=timeout_s,
            request_id=request_id,
            parameters=parameters,
        )

    @Call
    def feedback(
        self,
        answer: InferResult | ChatResult | Handle | str | None = None,
        *,
        score: float | None = None,
        reward: float | None = None,
        label: str | int | float | bool | None = None,
        metric: str | None = None,
        value: float | str | None = None,
        at: datetime | float | None = None,
        idempotency_key: str | None = None,
        timeout_s: float | None = None,
    ) -> Flow[Document]:
        """Report how good an answer was: a score, a reward, a label, or any ``metric`` with a ``value``.

        ``answer``: a result, a job, or an id (``feedback_id``). ``idempotency_key``: pass it instead of
        ``answer`` if you know only the idempotency key of the job. ``at``: the time of the outcome. Only the
        first value of each metric counts, so a repeated call is safe. Raise NotFound if the answer is unknown
        or too old. Raise Forbidden if another API key got the answer.
        """
        outcomes = {"score": score, "reward": reward, "label": label, "metric": metric, "value": value}
        return self._feedback.one(item_of(answer, idempotency_key, outcomes, at), timeout_s)

    @Call
    def feedback_many(
        self, items: Iterable[Mapping[str, Any]], *, timeout_s: float | None = None
    ) -> Flow[list[Document]]:
        """Report many outcomes. ``items``: objects with the members of ``POST /v1/feedback``.

        Each HTTP request contains at most 1,000 items. Return the ``index`` and the ``status`` of each item,
        and the ``message`` of each refused item.
        """
        return self._feedback.many(items, timeout_s)

    @Call
    def metadata(
        self, model: str, *, version: Version = None, timeout_s: float | None = None
    ) -> Flow[Metadata]:
        """Return a model's name, versions, platform, inputs and outputs. Raise NotFound if it is unknown."""
        return self._core.metadata(model, version=version, timeout_s=timeout_s)

    @Call
    def models(self, *, timeout_s: float | None = None) -> Flow[list[Metadata]]:
        """Return every model that can be called, each with ``name``, ``version`` and ``state``."""
        return self._core.models(timeout_s=timeout_s)

    @Call
    def costs(
        self,
        *,
        by: str = "deployment",
        since: float | None = None,
        until: float | None = None,
        deployment: str | None = None,
        timeout_s: float | None = None,
    ) -> Flow[dict[str, Any]]:
        """Return what replicas cost. The caller's key needs the scope ``operate``.

        ``by`` groups the costs: deployment, version, endpoint or key. ``since`` and ``until`` are Unix times
        in seconds; default: the last day. docs/costs.md explains the members of the returned object.
        """
        return self._core.costs(by, since, until, deployment, timeout_s)

    @Call
    def is_ready(self, model: str, *, version: Version = None, timeout_s: float | None = None) -> Flow[bool]:
        """Return True if the model accepts requests, even if it must start first.

        Return False if it accepts no requests now, or if the name is unknown.
        """
        return self._core.is_ready(model, version=version, timeout_s=timeout_s)

    @Call
    def wait_ready(self, model: str, timeout_s: float = 120.0, *, version: Version = None) -> Flow[None]:
        """Wait until the model is ready. Raise DeadlinePassed after ``timeout_s`` seconds."""
        return self._core.wait_ready(model, version=version, timeout_s=timeout_s)
