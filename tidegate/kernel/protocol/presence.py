"""The reports of workers and gateways about themselves, a few times a second."""

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

    ``words`` is a description for people: "the model's process ended (signal 9, out of memory?)". ``status``
    is an exit code, or the negative number of a signal; None if unknown, or the worker ended the process.
    ``in_a_row`` counts deaths in a row, each within a minute of a start. ``total`` counts all deaths of this
    worker's model.
    """

    at: float
    words: str
    status: int | None = None
    in_a_row: int = 1
    total: int = 1
    next_start_at: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineReport:
    """Facts about the engine of a language model. None: the engine does not report it.

    ``slots``: the most requests that it works on at the same time. ``running`` and ``waiting``: requests that
    run, and that wait. ``kv_used`` and ``kv_total``: tokens in its KV cache, and the most that fit. The other
    members count tokens since the engine's start: of prompts, of answers, and of prompts that were already in
    its cache.
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
        """Return the report of an engine's ``stats()``. Unknown and unusable members are ignored."""
        found = {name: stats.get(name) for name in cls.__dataclass_fields__}
        return cls(**{name: int(value) for name, value in found.items() if _is_count(value)})


def _is_count(value: object) -> TypeGuard[float]:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]


@dataclass(slots=True)
class ReplicaReport:
    """A worker's heartbeat. Durations are milliseconds. Counters count from the worker's start.

    ``phases_ms`` has the parts of the start: launch, environment (only with requirements), fetch,
    triton_start, load, warm_up. The current part still grows.
    ``busy_ms`` is the sum of the model calls' durations, ``call_ms`` the recent mean of one call, and
    ``batch_mean`` the recent mean of requests in a call; None if nothing was measured yet.
    ``parallel`` is the effective concurrency: the requests of a full call x instances, or, if a call has one
    request, the recent number of open calls.
    ``signature`` is the model's, as Triton reports it, in the form of a ``Signature``.
    ``jobs`` is the number of unacked messages of jobs.
    ``gpu_utilization`` (0 to 1) and ``gpu_memory_bytes`` (used) are those of its GPUs; None: it has none.
    ``device`` is where its model runs, as Triton reports it: ``cpu``, ``cuda:0 (NVIDIA H100 80GB HBM3)``,
    several separated by commas; empty until the model is loaded.
    ``sandbox`` says how the model's process is contained; empty if unknown. ``memory_limit`` says how much
    memory the process may use and what enforces it; empty means nothing, or the container.
    ``ready_at`` is when it was first ready, in seconds since the epoch; 0: never yet. A replica that was
    ready before and is ``starting`` now is loading its model again.
    ``death`` is the last death of the model's process; None: it has not died.
    ``llm`` has the facts of a language model's engine; None: no engine, or no facts yet.
    ``holds`` is the number of requests that it holds at a time, running and waiting; 0 if not known.
    ``host_busy`` is the share of time that the host's cores were busy (0 to 1); None if not known.
    ``scratch`` is the outcome of a scratch replica, in the form of a ``ScratchOutcome``; None: there is none.
    ``sequences`` is the number of sequences that it keeps, and ``sequence_slots`` the most that it can keep;
    0: its model is not stateful.
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
    """One gateway's load of one Deployment: its unanswered requests now, and totals since its start.

    ``waiting`` are the requests of a language model that have no event yet, and ``waiting_tokens`` the
    estimated tokens of their prompts. They are a part of ``outstanding``. ``flows`` has [unanswered requests,
    weight] by ``endpoint/caller``, of the flows with the most requests.
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
    """One gateway's totals of one Deployment of an endpoint since its start.

    ``failed``: requests that failed because of the Deployment. ``times``: the numbers of answered requests by
    time, in the buckets of :mod:`tidegate.kernel.protocol.latency_buckets`.
    """

    failed: int = 0
    times: list[int] = field(default_factory=list)


@dataclass(slots=True)
class GatewayReport:
    """A gateway's heartbeat. ``at`` is seconds since the epoch on the gateway's clock.

    ``traffic`` has the counts by endpoint and Deployment, for endpoints that compare Deployments.
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
    """All known gateways. The load of those that do not report (``missing``) is unknown."""

    reports: list[GatewayReport] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass(slots=True)
class ModelMetadata:
    """The metadata of a worker's model, beside its signature.

    ``config`` is the configuration as Triton completed it, in the form of its HTTP endpoint; ``labels`` are
    the names of the classes of an output, by its name.
    """

    config: dict[str, Any]
    labels: dict[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Return the metadata as JSON."""
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """Return the metadata in JSON; unknown fields of a newer writer are ignored."""
        known = cls.__dataclass_fields__
        return cls(**{k: v for k, v in orjson.loads(raw).items() if k in known})
