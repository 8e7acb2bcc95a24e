"""The nouns of Tidegate, as the registry stores them and everybody else reads them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from typing_extensions import Self

from tidegate.kernel.protocol import names
from tidegate.kernel.protocol.scaling import Scaling

NAME_PATTERN = names.PATTERN
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

Format = Literal["onnx", "sklearn", "torchscript", "python", "triton"]
# Numbers of people. Databases and other programs keep no larger ones.
LARGEST = 2**31 - 1
LARGEST_AXIS = 2**63 - 1
Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BF16", "BYTES",
]  # fmt: skip


class Noun(BaseModel):
    """Base: unknown fields are refused, so that a misspelt option is an error and not silence."""

    model_config = ConfigDict(extra="forbid")


class Written(Noun):
    """The base of user input. Numbers must be finite, because JSON has no others."""

    model_config = ConfigDict(allow_inf_nan=False)


class TensorSpec(Noun):
    """One input or output. ``shape`` is without the batch axis when the model batches; -1 is any size.

    ``optional`` is for inputs: a request may leave it out.
    """

    name: str = Field(min_length=1, max_length=255)
    datatype: Datatype
    shape: list[Annotated[int, Field(ge=-1, le=LARGEST_AXIS)]] = Field(default_factory=list, max_length=16)
    optional: bool = False


class Signature(Noun):
    """The inputs and outputs of a version. ``max_batch_size`` 0: the model has no batch axis.

    ``decoupled``: it returns any number of answers to one request (Triton's policy of that name).
    """

    inputs: list[TensorSpec] = Field(min_length=1)
    outputs: list[TensorSpec] = Field(min_length=1)
    max_batch_size: int = Field(0, ge=0, le=LARGEST)
    decoupled: bool = False


class VersionMetadata(Written):
    """What people want to know of a version later."""

    trained_at: datetime | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    dependencies: list[str] = Field(default_factory=list)
    tags: dict[str, str] = Field(default_factory=dict)
    notes: str = ""


class Version(Noun):
    """An immutable artifact under a model's name.

    ``requirements``: lines as pip reads them, of what its Python needs beside the models' environment.
    """

    model: Name
    number: int = Field(ge=1)
    format: Format
    artifact_sha256: Digest
    artifact_size: int = Field(ge=0)
    filename: str
    signature: Signature | None = None
    requirements: list[str] = Field(default_factory=list)
    metadata: VersionMetadata = Field(default_factory=VersionMetadata)
    created_at: datetime


class Batching(Written):
    """The latency/cost knob: at most ``max_batch`` rows in a call, waiting up to ``window_ms`` for them."""

    max_batch: int | None = Field(None, ge=1, le=LARGEST)
    window_ms: float = Field(0.0, ge=0, le=10_000)


class Resources(Written):
    """What one replica may use, in MiB and cores; None: as the launcher is set. Containers are held to it.

    ``gpus`` are whole ones; with ``gpu_memory_mb`` the replica shares one with others, by declared memory.
    ``allow_cpu``: a model that cannot use the GPU runs on the CPU; else its replica fails to start.
    ``response_cache_mb`` is the most that Triton's response cache takes, of a model that asks for one.
    """

    memory_mb: int | None = Field(None, ge=64, le=LARGEST)
    cpus: float | None = Field(None, gt=0, le=4096)
    shm_mb: int | None = Field(None, ge=1, le=LARGEST)
    gpus: int = Field(0, ge=0, le=64)
    gpu_memory_mb: int | None = Field(None, ge=1, le=LARGEST)
    allow_cpu: bool = False
    response_cache_mb: int = Field(64, ge=1, le=1_048_576)

    @model_validator(mode="after")
    def _whole_or_shared(self) -> Self:
        if self.gpus and self.gpu_memory_mb:
            raise ValueError("gpus are whole ones and gpu_memory_mb is a share of one: state one of them")
        return self


class DeploymentSpec(Written):
    """One Version run by identical workers that share a queue.

    ``image`` is that of its workers where they are containers; None: the launcher's.
    ``progress_timeout_s``: a model that answers no call for so long is hung, and its process is ended; None:
    a minute, or longer if callers of these calls wait for longer.
    """

    name: Name
    model: Name
    version: int = Field(ge=1, le=LARGEST)
    min_replicas: int = Field(1, ge=0, le=10_000)
    max_replicas: int = Field(1, ge=0, le=10_000)
    scale_to_zero_after_s: float | None = Field(None, ge=0)
    target_wait_ms: float = Field(200.0, gt=0)
    scaling: Scaling = Scaling()
    batching: Batching = Batching(max_batch=None, window_ms=0.0)
    threads: int = Field(1, ge=1, le=1024)
    instances: int = Field(1, ge=1, le=64)
    max_queue: int = Field(10_000, ge=1, le=LARGEST)
    max_concurrency: int | None = Field(None, ge=1, le=LARGEST)
    retry: Literal["safe", "never"] = "safe"
    drain_limit_s: float = Field(60.0, gt=0)
    start_timeout_s: float = Field(120.0, gt=0)
    progress_timeout_s: float | None = Field(None, gt=0)
    env: dict[str, str] = Field(default_factory=dict)
    resources: Resources = Resources(gpus=0)
    image: str | None = Field(None, min_length=1, max_length=512)


class Override(Noun):
    """An operator's word on the number of replicas, until it expires. ``force``: above the maximum, too."""

    replicas: int = Field(ge=0, le=10_000)
    expires_at: datetime | None = None
    force: bool = False


class Deployment(DeploymentSpec):
    """A DeploymentSpec as stored."""

    revision: int
    created_at: datetime
    override: Override | None = None


class Target(Noun):
    """A share of an endpoint's traffic."""

    deployment: Name
    weight: int = Field(100, ge=0, le=1_000_000)


class EndpointSpec(Noun):
    """The stable public name. ``previous`` goes on serving until a target has a ready replica."""

    name: Name
    targets: list[Target] = Field(min_length=1)
    previous: list[Target] = Field(default_factory=list)
    default_timeout_ms: int = Field(30_000, ge=1, le=86_400_000)


class Endpoint(EndpointSpec):
    """An EndpointSpec as stored."""

    revision: int


class DesiredState(Noun):
    """All versions, Deployments and Endpoints that are to exist, as one consistent read."""

    revision: int
    versions: list[Version] = Field(default_factory=list)
    deployments: list[Deployment] = Field(default_factory=list)
    endpoints: list[Endpoint] = Field(default_factory=list)


class Assignment(Noun):
    """All that one worker is started with: it needs the registry for the artifact's bytes only.

    It also travels as a message, so it holds no address and no credential: a worker has these from its
    own settings.
    """

    replica: str
    generation: int
    deployment: Deployment
    version: Version
    launched_at: float


class WarmPoolSpec(Noun):
    """A warm pool: how many workers wait without a model, with which image, resources and threads.

    A Deployment with the same ``image`` and ``resources`` can use one of them. If its ``threads`` differ or
    it has an ``env``, the worker restarts its Triton.
    """

    workers: int = Field(1, ge=0, le=1000)
    image: str | None = Field(None, min_length=1, max_length=512)
    resources: Resources = Resources(gpus=0)
    threads: int = Field(1, ge=1, le=1024)
    start_timeout_s: float = Field(120.0, gt=0)


class WarmAssignment(Noun):
    """Everything that a worker of a warm pool is started with. Its :class:`Assignment` comes later.

    In JSON the name of the pool is ``flavour``, which workers of earlier versions read.
    """

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    replica: str
    generation: int
    pool_name: Name = Field(alias="flavour")
    pool: WarmPoolSpec
    launched_at: float


class Condition(Noun):
    """One thing that is well or not, with the reason, as of ``at`` (seconds since the epoch)."""

    type: str
    ok: bool
    reason: str = ""
    message: str = ""
    at: float = 0.0


class DeploymentStatus(Noun):
    """What the autoscaler sees and wants of a Deployment. None: not known.

    ``revision`` is the Deployment's, as the autoscaler has read it: a later change is not in this status.
    ``rule`` and ``reason`` are those of ``desired``, ``limits`` the bounds in force. ``start_s`` is what a
    replica takes to become ready. ``devices`` are those that its replicas' models run on. ``ended`` are the
    last replicas that did not end as they should.
    """

    deployment: str
    revision: int | None = None
    desired: int = 0
    ready: int = 0
    starting: int = 0
    draining: int = 0
    queue: int | None = None
    demand: int | None = None
    arrival_rate: float | None = None
    service_rate: float | None = None
    utilization: float | None = None
    gpu_utilization: float | None = None
    gpu_memory_bytes: int | None = None
    devices: list[str] = Field(default_factory=list)
    predicted_wait_ms: float | None = None
    start_s: float | None = None
    cost_per_hour: float | None = None
    rule: str = ""
    reason: str = ""
    limits: tuple[int, int] | None = None
    conditions: list[Condition] = Field(default_factory=list)
    cold_starts: list[dict[str, Any]] = Field(default_factory=list)
    replicas: list[dict[str, Any]] = Field(default_factory=list)
    ended: list[dict[str, Any]] = Field(default_factory=list)
