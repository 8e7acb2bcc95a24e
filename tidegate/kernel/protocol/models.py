"""The objects of Tidegate, as the registry stores them and all other services read them."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator
from typing_extensions import Self

from tidegate.kernel.protocol.experiments import Experiment
from tidegate.kernel.protocol.nouns import LARGEST as LARGEST
from tidegate.kernel.protocol.nouns import NAME_PATTERN as NAME_PATTERN
from tidegate.kernel.protocol.nouns import Name as Name
from tidegate.kernel.protocol.nouns import Noun as Noun
from tidegate.kernel.protocol.nouns import Written as Written
from tidegate.kernel.protocol.scaling import Scaling
from tidegate.kernel.protocol.service_level import AlertLimits, ServiceLevel
from tidegate.kernel.protocol.splitting import CanaryOptions as CanaryOptions
from tidegate.kernel.protocol.splitting import Rollout as Rollout
from tidegate.kernel.protocol.splitting import RolloutEvent as RolloutEvent
from tidegate.kernel.protocol.splitting import RolloutPhase as RolloutPhase
from tidegate.kernel.protocol.splitting import Shadow as Shadow
from tidegate.kernel.protocol.splitting import StickyTraffic as StickyTraffic
from tidegate.kernel.protocol.splitting import Target as Target
from tidegate.kernel.protocol.splitting import Tolerance as Tolerance
from tidegate.kernel.protocol.splitting import TrafficRule as TrafficRule
from tidegate.kernel.protocol.verification import ScratchTask, Verification

VLLM_START_TIMEOUT_S = 900.0
REGION_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Region = Annotated[str, StringConstraints(pattern=REGION_PATTERN)]
HEADER_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
CredentialHeader = Annotated[str, StringConstraints(pattern=HEADER_PATTERN)]
# Headers that the worker sets itself in each request to an upstream.
OWN_HEADERS = frozenset({
    "accept", "accept-encoding", "connection", "content-length", "content-type", "expect", "host",
    "inference-header-content-length", "te", "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip
# The arguments of vLLM that divide one model among devices.
PARALLEL_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

Format = Literal[
    "onnx", "sklearn", "torchscript", "python", "triton", "llm", "oip",
    "xgboost", "lightgbm", "catboost", "tflite", "tensorflow", "mlflow", "huggingface", "pt2",
]  # fmt: skip
Engine = Literal["auto", "llamacpp", "vllm", "openai-url"]
LARGEST_AXIS = 2**63 - 1
Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BF16", "BYTES",
]  # fmt: skip


def check_credential_header(credential: str | None, header: str | None) -> None:
    """Raise ValueError if an upstream's credential cannot be sent in ``header``."""
    if header is not None and credential is None:
        raise ValueError("credential_header needs `credential`: set both, or remove credential_header")
    if header is not None and header.lower() in OWN_HEADERS:
        raise ValueError(
            f"credential_header must not be {header}, which each request sets itself. Use the header from "
            "which the upstream reads its key, such as api-key"
        )


class TensorSpec(Noun):
    """One input or output.

    ``shape`` does not include the batch axis; -1 means any size. ``optional``: a request may leave this input
    out.
    """

    name: str = Field(min_length=1, max_length=255)
    datatype: Datatype
    shape: list[Annotated[int, Field(ge=-1, le=LARGEST_AXIS)]] = Field(default_factory=list, max_length=16)
    optional: bool = False


class SequenceSpec(Noun):
    """The sequences of a stateful model (Triton's ``sequence_batching``).

    ``slots``: the number of sequences that one instance of the model keeps at the same time.
    ``idle_ms``: a sequence without a request for this many milliseconds ends.
    """

    strategy: Literal["direct", "oldest"] = "direct"
    slots: int = Field(1, ge=1, le=LARGEST)
    idle_ms: float = Field(1000.0, gt=0)


class Signature(Noun):
    """The inputs and outputs of a version.

    ``max_batch_size``: the most rows in a call; 0: the model has no batch axis.
    ``decoupled``: True if the model can return any number of answers to one request (Triton's term).
    ``sequences``: set if the model keeps a state between the requests of a sequence.
    """

    inputs: list[TensorSpec] = Field(min_length=1)
    outputs: list[TensorSpec] = Field(min_length=1)
    max_batch_size: int = Field(0, ge=0, le=LARGEST)
    decoupled: bool = False
    sequences: SequenceSpec | None = None


class VersionMetadata(Written):
    """Facts about a version for people and for searches. The registry limits their size.

    ``framework``, ``framework_version``, ``dependencies``, ``parameters``: facts about the training.
    ``commit``, ``run``, ``dataset``, ``parent``: the origin. ``parent`` is a version, such as ``digits@2``.
    ``license``: an SPDX identifier, or a name.
    """

    trained_at: datetime | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    dependencies: list[str] = Field(default_factory=list)
    tags: dict[str, str] = Field(default_factory=dict)
    notes: str = ""
    framework: str | None = None
    framework_version: str | None = None
    commit: str | None = None
    run: str | None = None
    dataset: str | None = None
    parent: str | None = None
    parameters: dict[str, bool | int | float | str] = Field(default_factory=dict)
    owner: str | None = None
    license: str | None = None


class Version(Noun):
    """An immutable artifact under a model's name.

    ``requirements``: the packages that the model needs and that the models' environment lacks, as lines for
    pip. ``trusted``: the names that a pickle or skops file may import, because the publisher trusts them.
    """

    model: Name
    number: int = Field(ge=1)
    format: Format
    artifact_sha256: Digest
    artifact_size: int = Field(ge=0)
    filename: str
    signature: Signature | None = None
    requirements: list[str] = Field(default_factory=list)
    trusted: list[str] = Field(default_factory=list)
    metadata: VersionMetadata = Field(default_factory=VersionMetadata)
    created_at: datetime
    verification: Verification = Field(default_factory=Verification)


class Batching(Written):
    """The batching of calls.

    ``max_batch``: the most rows in a call. ``window_ms``: the longest wait for further rows, in milliseconds.
    """

    max_batch: int | None = Field(None, ge=1, le=LARGEST)
    window_ms: float = Field(0.0, ge=0, le=10_000)


class Resources(Written):
    """The resources of one replica, in MiB and cores. Containers enforce them.

    ``memory_mb``, ``cpus``, ``shm_mb``: None means the launcher's setting. ``gpus``: the number of whole
    GPUs. ``gpu_memory_mb``: the GPU memory that the replica may use if it shares one GPU with other replicas;
    None: it shares no GPU. ``allow_cpu``: what happens if a model cannot use the GPU. True: it runs on the
    CPU. False: its replica fails to start. ``response_cache_mb``: the limit of Triton's response cache, if
    the model's configuration enables it.
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
            raise ValueError(
                "gpus is a number of whole GPUs and gpu_memory_mb is a share of one GPU: set only one of them"
            )
        return self


class LlmSpec(Written):
    """The options with which a replica runs a version of format ``llm``.

    ``engine``: ``auto`` means llama.cpp for a GGUF file, and vLLM for a Hugging Face folder. ``slots``: the
    most requests that the engine runs at the same time, and so the most that a worker takes. ``context``: the
    most tokens of a prompt and its answer together; None: the engine's default. ``kv_tokens``: the most
    tokens that a worker's requests may use in the engine's KV cache; None: the cache's size. ``arguments``:
    arguments that are passed to the engine unchanged. Each key is the engine's own name of the argument.
    ``adapters``: the paths of LoRA adapters in the artifact, by adapter name. Requests name an adapter as
    ``endpoint:adapter``. ``affinity_wait_ms``: the longest wait for the replica that has the beginning of the
    prompt in its KV cache; 0: no wait.

    ``upstream``: the address of an OpenAI-compatible server, for the engine ``openai-url``.
    ``upstream_model``: the model's name at the upstream. ``credential``: where the worker's host stores the
    upstream's key: ``env:NAME`` or ``file:PATH``. ``credential_header``: the header that carries the key
    alone; None: ``Authorization: Bearer KEY``. ``region``: where the upstream processes data.
    ``requests_per_minute``, ``tokens_per_minute``: the most requests and tokens that a replica sends to the
    upstream in a minute; None: no limit. ``upstream_timeout_s``: the longest wait for the beginning of the
    upstream's answer.
    """

    engine: Engine = "auto"
    slots: int = Field(4, ge=1, le=4096)
    context: int | None = Field(None, ge=16, le=LARGEST)
    kv_tokens: int | None = Field(None, ge=16, le=LARGEST)
    arguments: dict[str, str | int | float | bool] = Field(default_factory=dict)
    adapters: dict[Name, str] = Field(default_factory=dict)
    affinity_wait_ms: float = Field(100.0, ge=0, le=60_000)
    upstream: str | None = Field(None, pattern=r"^https?://", max_length=2048)
    upstream_model: str | None = Field(None, min_length=1, max_length=255)
    credential: str | None = Field(None, pattern=r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:/.+)$", max_length=1024)
    credential_header: CredentialHeader | None = None
    region: str | None = Field(None, pattern=REGION_PATTERN)
    requests_per_minute: int | None = Field(None, ge=1, le=LARGEST)
    tokens_per_minute: int | None = Field(None, ge=1, le=LARGEST)
    upstream_timeout_s: float | None = Field(None, gt=0, le=86_400)

    @model_validator(mode="after")
    def _upstream_fits(self) -> Self:
        if (self.engine == "openai-url") != (self.upstream is not None):
            raise ValueError("the engine openai-url needs `upstream`, and other engines must not have it")
        names = (
            "upstream_model",
            "credential",
            "credential_header",
            "requests_per_minute",
            "tokens_per_minute",
            "upstream_timeout_s",
        )
        if self.upstream is None and (extra := [name for name in names if getattr(self, name) is not None]):
            raise ValueError(f"{extra[0]} is only for the engine openai-url")
        if self.upstream is not None and "@" in self.upstream.partition("://")[2].partition("/")[0]:
            raise ValueError("upstream contains a password: remove it, and set `credential` instead")
        check_credential_header(self.credential, self.credential_header)
        return self

    @property
    def parallel(self) -> int:
        """Return the number of devices among which the engine's arguments divide one model."""
        own = {name.lstrip("-").replace("-", "_"): value for name, value in self.arguments.items()}
        sizes = [own.get(name, 1) for name in PARALLEL_SIZES]
        return math.prod(int(size) for size in sizes if str(size).isdigit() and int(size) > 0)


class UpstreamSpec(Written):
    """The upstream of a version of format ``oip``: a model at a server with the Open Inference Protocol.

    ``address``: the URL of the model. It ends in ``/v2/models/NAME`` or ``/v2/models/NAME/versions/VERSION``.
    ``credential``: where the worker's host stores the upstream's key: ``env:NAME`` or ``file:PATH``.
    ``credential_header``: the header that carries the key alone; None: ``Authorization: Bearer KEY``.
    ``region``: where the upstream processes data. ``timeout_s``: the longest wait for an answer.
    ``requests_per_minute``: the most requests that one instance of the model sends in a minute; None: no
    limit. ``binary``: True if the upstream supports the binary tensor data extension.
    """

    address: str = Field(pattern=r"^https?://[^/@\s]+/\S+$", max_length=2048)
    credential: str | None = Field(None, pattern=r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:/.+)$", max_length=1024)
    credential_header: CredentialHeader | None = None
    region: str | None = Field(None, pattern=REGION_PATTERN)
    timeout_s: float = Field(30.0, gt=0, le=86_400)
    requests_per_minute: int | None = Field(None, ge=1, le=LARGEST)
    binary: bool = True

    @model_validator(mode="after")
    def _header_fits(self) -> Self:
        check_credential_header(self.credential, self.credential_header)
        return self


class DeploymentSpec(Written):
    """The specification of a Deployment: one version, run by identical workers that share a queue.

    ``image``: the image of the workers if they are containers; None: the launcher's. ``start_timeout_s``: the
    longest time that a replica's start may take. The default is longer for vLLM, which compiles the model and
    measures its GPU memory at each start. ``progress_timeout_s``: if the model answers no waiting call for
    this many seconds, its process is ended. None: 60 seconds, or the longest timeout of the waiting callers,
    if that is longer.

    ``llm``: only for versions of format ``llm``; None: the defaults of :class:`LlmSpec`. ``upstream``: only
    for versions of format ``oip``, which need it. ``sampling``: the most rows per second that a replica
    samples into the version's profile; 0: none. ``keep_rows``: the most sampled rows whose values are kept in
    the blob store; 0: none. ``redact``: the names of inputs and outputs whose values are never stored.
    ``unverified``: True if the Deployment may run a version that is not verified, or that was rejected.
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
    llm: LlmSpec | None = None
    upstream: UpstreamSpec | None = None
    sampling: int = Field(200, ge=0, le=10_000)
    keep_rows: int = Field(0, ge=0, le=100_000)
    redact: list[Annotated[str, Field(min_length=1, max_length=255)]] = Field(
        default_factory=list, max_length=256
    )
    unverified: bool = False

    @model_validator(mode="after")
    def _vllm_starts_slowly(self) -> Self:
        if (
            self.llm is not None
            and self.llm.engine == "vllm"
            and "start_timeout_s" not in self.model_fields_set
        ):
            self.start_timeout_s = VLLM_START_TIMEOUT_S
        return self

    @model_validator(mode="after")
    def _gpus_fit(self) -> Self:
        if self.llm is None or self.llm.parallel == 1:
            return self
        count, shared = self.llm.parallel, self.resources.gpu_memory_mb
        if shared or self.resources.gpus not in (0, count):
            there = "a share of one" if shared else f"{self.resources.gpus}"
            raise ValueError(
                f"the engine's arguments divide the model among {count} GPUs, but resources has {there}: set "
                f"resources.gpus to {count}, or change {' x '.join(PARALLEL_SIZES)}"
            )
        return self


class Override(Noun):
    """The number of replicas that an operator set. ``force``: True if it may be above ``max_replicas``."""

    replicas: int = Field(ge=0, le=10_000)
    expires_at: datetime | None = None
    force: bool = False


class Deployment(DeploymentSpec):
    """A stored DeploymentSpec, with its revision."""

    revision: int
    created_at: datetime
    override: Override | None = None


class EndpointSpec(Noun):
    """The stable public name of a model, and the Deployments that get its requests.

    ``previous``: the targets that serve until all ``targets`` with a share have a ready replica.
    ``allowed_regions``, ``forbidden_regions``: the regions where requests may be processed, and those where
    they must not. Both lists apply to upstreams and to Deployments with a region. If one of the lists is set,
    an upstream without a region gets no requests. ``rules``: traffic rules, which apply before ``sticky`` and
    the weights. ``sticky`` applies before the weights.

    ``when_unready``: what happens to the share of a target that has no ready replica, while other targets
    have one. ``wake``: its requests wait for a replica, unless none can start. ``others``: its share goes to
    the other targets. ``fail``: the target keeps its share. A canary or a treatment that is not ready gets no
    share in any case.

    ``weight``: the weight of this endpoint at a busy Deployment that several endpoints share. It is
    multiplied by the weight of the caller's key. ``failover``: Deployments without a share, in the order of
    preference. They get the requests that an upstream cannot answer, and all traffic if ``when_unready``
    takes the share from every target. ``reserved``: the number of additional replicas that serve only this
    endpoint. They run the Deployment of the target with the largest weight.

    ``slo``: the objectives; None: no objectives. ``alerts``: limits that differ from the defaults.
    ``shadow``: the Deployment without a share that gets copies of requests, for a comparison. ``feedback``:
    True if answers get an id for feedback even without a rollout or an experiment.
    """

    name: Name
    targets: list[Target] = Field(min_length=1)
    previous: list[Target] = Field(default_factory=list)
    default_timeout_ms: int = Field(30_000, ge=1, le=86_400_000)
    allowed_regions: list[Region] = Field(default_factory=list, max_length=64)
    forbidden_regions: list[Region] = Field(default_factory=list, max_length=64)
    rules: list[TrafficRule] = Field(default_factory=list, max_length=100)
    sticky: StickyTraffic | None = None
    when_unready: Literal["wake", "others", "fail"] = "wake"
    weight: int = Field(1, ge=1, le=100)
    failover: list[Name] = Field(default_factory=list, max_length=16)
    reserved: int = Field(0, ge=0, le=1000)
    rollout: Rollout | None = None
    experiment: Experiment | None = None
    slo: ServiceLevel | None = None
    alerts: AlertLimits | None = None
    shadow: Shadow | None = None
    feedback: bool = False

    @property
    def collects_feedback(self) -> bool:
        """Return True if answers get an id, with which callers report outcomes."""
        return self.feedback or self.compared

    @property
    def compared(self) -> bool:
        """Return True if the gateways count answers, failures and times separately for each Deployment."""
        return any(each is not None and each.active for each in (self.rollout, self.experiment))

    def may_use(self, deployment: DeploymentSpec) -> bool:
        """Return True if requests may be processed in the region of the Deployment."""
        if not self.allowed_regions and not self.forbidden_regions:
            return True
        spec, upstream = deployment.llm, deployment.upstream
        if upstream is not None:
            region = (upstream.region or "").lower()
        elif spec is None or (spec.region is None and spec.upstream is None):
            return True
        else:
            region = (spec.region or "").lower()
        allowed = {each.lower() for each in self.allowed_regions}
        forbidden = {each.lower() for each in self.forbidden_regions}
        return bool(region) and region not in forbidden and (not allowed or region in allowed)


class Endpoint(EndpointSpec):
    """A stored EndpointSpec, with its revision."""

    revision: int


def unfit_for_shadow(version: Version) -> str | None:
    """Return why a version cannot be a shadow; None if it can.

    The text continues a sentence about the version.
    """
    if version.format == "llm":
        return "is a language model, and its answers cannot be compared"
    if version.signature is not None and version.signature.decoupled:
        return "returns any number of answers to a request (decoupled), which cannot be compared"
    return None


class DesiredState(Noun):
    """All Deployments and Endpoints that should exist, and their versions, at one moment.

    ``aliases``: for each model, its aliases, such as ``champion``, and the version of each alias.
    """

    revision: int
    versions: list[Version] = Field(default_factory=list)
    deployments: list[Deployment] = Field(default_factory=list)
    endpoints: list[Endpoint] = Field(default_factory=list)
    aliases: dict[str, dict[str, int]] = Field(default_factory=dict)


class Assignment(Noun):
    """The data that a worker needs to start. The worker gets the artifact itself from the registry.

    A worker of a warm pool gets this object as a message, so the object contains no address and no credential
    of the registry. The worker has the address in its settings, and reads its token from a file of the
    launcher. ``scratch``: set if the worker only verifies the version and opens no queue.
    """

    replica: str
    generation: int
    deployment: Deployment
    version: Version
    launched_at: float
    scratch: ScratchTask | None = None
