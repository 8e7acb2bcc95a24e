"""The reports that workers and gateways write about themselves a few times a second."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeGuard

import orjson
from typing_extensions import Self

from tidegate.kernel.protocol.shadow import ShadowCounts

ReplicaState = Literal["warm", "starting", "ready", "draining", "failed"]


@dataclass(frozen=True, slots=True)
class ModelDeath:
    """The last death of a replica's model. Times are seconds since the epoch.

    ``words``: a description for people, such as "the model's process ended (signal 9, out of memory?)".
    ``status``: an exit code, or the negative number of a signal. None: it is unknown, or the worker ended the
    process.
    ``in_a_row``: the number of successive deaths, each less than a minute after a start.
    ``total``: the number of all deaths of this worker's model.
    """

    at: float
    words: str
    status: int | None = None
    in_a_row: int = 1
    total: int = 1
    next_start_at: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineReport:
    """Facts about the engine of a language model. None: the engine does not report the fact.

    ``slots``: the most requests that the engine works on at the same time.
    ``running``, ``waiting``: the numbers of running and waiting requests.
    ``kv_used``, ``kv_total``: the tokens in the engine's KV cache, and the most that fit.
    ``prompt_tokens``, ``answer_tokens``: the tokens of prompts and answers since the engine's start.
    ``cached_tokens``: the tokens of prompts that were in the cache already, since the engine's start.
    """

    slots: int | None = None
    running: int | None = None
    waiting: int | None = None
    kv_used: int | None = None
    kv_total: int | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    cached_tokens: int | None = None

    @classmethod
    def of(cls, stats: Mapping[str, Any]) -> Self:
        """Build the report from an engine's ``stats()``.

        Unknown members are ignored. A value that is not a count becomes None.
        """
        found = {name: stats.get(name) for name in cls.__dataclass_fields__}
        return cls(**{name: int(value) for name, value in found.items() if _is_count(value)})


def _is_count(value: object) -> TypeGuard[float]:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]


@dataclass(slots=True)
class ReplicaReport:
    """A worker's heartbeat. Durations are milliseconds. Counts begin at the worker's start.

    ``phases_ms``: the duration of each phase of the start: launch, environment (only with requirements),
      fetch, triton_start, load, warm_up. The duration of the current phase still grows.
    ``busy_ms``: the sum of the durations of all model calls.
    ``call_ms``, ``batch_mean``: recent means of a call's duration and of the requests in a call; None:
      not measured yet.
    ``parallel``: the effective concurrency: the number of requests that the replica completes in the time
      of one call, under full load.
    ``signature``: the model's signature as Triton reports it, in the form of a ``Signature``.
    ``jobs``: the number of unacked deliveries of jobs.
    ``gpu_utilization``: the share of time that the replica's GPUs were busy (0 to 1); None: no GPU.
    ``gpu_memory_bytes``: the used memory of these GPUs; None: no GPU.
    ``device``: where the model runs, such as ``cpu`` or ``cuda:0 (NVIDIA H100 80GB HBM3)``. Several
      devices are separated by commas. Empty until the model is loaded.
    ``sandbox``: the sandbox of the model's process; empty: unknown.
    ``memory_limit``: the maximum memory of the process, and what enforces it. Empty: no limit, except
      that of a container.
    ``ready_at``: when the replica was first ready, in seconds since the epoch; 0: not yet. If
      ``ready_at`` is set and the state is ``starting``, the replica loads its model again.
    ``death``: the last death of the model's process; None: it has not died.
    ``llm``: facts about a language model's engine; None: no engine, or no facts yet.
    ``holds``: the maximum number of requests in the worker, running and waiting together; 0: unknown.
    ``host_busy``: the share of time that the host's cores were busy (0 to 1); None: unknown.
    ``scratch``: the outcome of a scratch replica, in the form of a ``ScratchOutcome``; None: no outcome.
    ``sequences``, ``sequence_slots``: the present and the maximum number of sequences in the replica; 0:
      the model is not stateful.
    """

    replica: str
    deployment: str
    generation: int
    host: str
    pid: int
    state: ReplicaState
    message: str = ""
    phases_ms: dict[str, float] = field(default_factory=dict)
    inflight: int = 0
    completed: int = 0
    failed: int = 0
    busy_ms: float = 0.0
    call_ms: float | None = None
    batch_mean: float | None = None
    parallel: float = 1.0
    metrics_port: int = 0
    started_at: float = 0.0
    signature: dict[str, Any] | None = None
    jobs: int = 0
    gpu_utilization: float | None = None
    gpu_memory_bytes: int | None = None
    device: str = ""
    sandbox: str = ""
    memory_limit: str = ""
    ready_at: float = 0.0
    death: ModelDeath | None = None
    llm: EngineReport | None = None
    holds: int = 0
    host_busy: float | None = None
    scratch: dict[str, Any] | None = None
    sequences: int = 0
    sequence_slots: int = 0

    def to_json(self) -> bytes:
        """Return the report as JSON."""
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """Read a report. Unknown fields of a newer writer are ignored."""
        known = cls.__dataclass_fields__
        values = {k: v for k, v in orjson.loads(raw).items() if k in known}
        if values.get("death") is not None:
            fields = ModelDeath.__dataclass_fields__
            values["death"] = ModelDeath(**{k: v for k, v in values["death"].items() if k in fields})
        if values.get("llm") is not None:
            values["llm"] = EngineReport.of(values["llm"])
        return cls(**values)


@dataclass(slots=True)
class GatewayLoad:
    """One gateway's load of one Deployment: unanswered requests now, and totals since the gateway's start.

    ``waiting``: the unanswered requests of a language model that have no event yet. They are included in
    ``outstanding``. ``waiting_tokens``: the estimated tokens of their prompts.
    ``flows``: [unanswered requests, weight] by ``endpoint/caller``, for the flows with the most requests.
    """

    outstanding: int = 0
    arrived: int = 0
    completed: int = 0
    refused: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    flows: dict[str, list[int]] = field(default_factory=dict)


@dataclass(slots=True)
class VariantCounts:
    """One gateway's counts of the requests that an endpoint sent to one Deployment.

    The counts begin at the gateway's start.

    ``failed``: the number of requests that failed because of the Deployment.
    ``times``: the number of answered requests in each latency bucket of
      :mod:`tidegate.kernel.protocol.latency_buckets`.
    """

    failed: int = 0
    times: list[int] = field(default_factory=list)


@dataclass(slots=True)
class GatewayReport:
    """A gateway's heartbeat. ``at`` is seconds since the epoch on the gateway's clock.

    ``traffic`` has the counts by endpoint and Deployment, for endpoints with a rollout or an experiment.
    ``shadows`` has the counts of shadow traffic by endpoint.
    """

    incarnation: str
    at: float
    deployments: dict[str, GatewayLoad] = field(default_factory=dict)
    traffic: dict[str, dict[str, VariantCounts]] = field(default_factory=dict)
    shadows: dict[str, ShadowCounts] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Return the report as JSON."""
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """Read a report. Unknown fields of a newer writer are ignored."""
        data = orjson.loads(raw)
        known = GatewayLoad.__dataclass_fields__
        loads = {
            name: GatewayLoad(**{k: v for k, v in load.items() if k in known})
            for name, load in data["deployments"].items()
        }
        traffic = {
            endpoint: {name: VariantCounts(each["failed"], each["times"]) for name, each in counts.items()}
            for endpoint, counts in data.get("traffic", {}).items()
        }
        shadows = {name: ShadowCounts.of(each) for name, each in data.get("shadows", {}).items()}
        return cls(data["incarnation"], data["at"], loads, traffic, shadows)


@dataclass(slots=True)
class GatewayView:
    """The reports of all gateways.

    ``missing``: gateways that exist but sent no report, so their load is unknown.
    """

    reports: list[GatewayReport] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass(slots=True)
class ModelMetadata:
    """The metadata of a worker's model, without its signature.

    ``config``: the configuration after Triton has completed it, in the JSON form of Triton's HTTP API.
    ``labels``: the names of the classes of each output.
    """

    config: dict[str, Any]
    labels: dict[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Return the metadata as JSON."""
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """Read metadata from JSON. Unknown fields of a newer writer are ignored."""
        known = cls.__dataclass_fields__
        return cls(**{k: v for k, v in orjson.loads(raw).items() if k in known})
