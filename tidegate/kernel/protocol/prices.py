"""The price list: what a replica costs per hour, and what tokens of a provider cost."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from tidegate.kernel.protocol.models import Deployment

# The entry for every GPU that the list does not name.
ANY = "*"
MIB_PER_GIB = 1024.0
# Strict, because YAML reads `no` as False, which pydantic would otherwise accept as the price 0.
_Price = Annotated[float, Field(ge=0, le=1e9, strict=True)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, populate_by_name=True)


class GpuPrice(_Entry):
    """The price of one GPU for an hour.

    ``memory_gib``: the memory of the GPU. A replica that reserves only a part of this memory is charged for
    the same part of the price.
    """

    per_hour: _Price
    memory_gib: float = Field(80.0, gt=0, le=100_000)


class TokenPrice(_Entry):
    """The prices of one million tokens at a provider.

    ``cached``: the price of prompt tokens that were in the provider's cache; None: the price ``input``.
    """

    input: _Price = Field(0.0, alias="in")
    output: _Price = Field(0.0, alias="out")
    cached: _Price | None = None

    def cost(self, read: int, written: int, cached: int) -> float:
        """Return the cost of a request's tokens; ``read`` includes ``cached``."""
        price = self.input if self.cached is None else self.cached
        cached = min(cached, read)  # a provider can report wrong numbers, but a cost must not be negative
        return ((read - cached) * self.input + cached * price + written * self.output) / 1e6


class ManagedPrice(_Entry):
    """The prices of a managed service, to compare them with Tidegate's costs.

    A price of 0 means that the service does not charge for this kind of use.
    """

    per_replica_hour: _Price = 0.0
    per_million_requests: _Price = 0.0
    per_million_tokens_in: _Price = 0.0
    per_million_tokens_out: _Price = 0.0


class PriceList(_Entry):
    """The prices of one installation. The defaults are typical prices of rented machines.

    ``gpu_hour``: the prices of GPUs. Each key is a GPU's name or a part of it.
    ``tokens``: the prices of providers' tokens. Each key is the name of a model.
    ``managed``: the prices of managed services. Each key is a name of your choice.
    ``cores``, ``memory_gib``: what a replica is charged for if its Deployment declares no resources.
    """

    currency: str = Field("USD", min_length=1, max_length=8)
    core_hour: _Price = 0.04
    gib_hour: _Price = 0.005
    gpu_hour: dict[str, GpuPrice] = Field(default_factory=lambda: {ANY: GpuPrice(per_hour=2.5)})
    cores: float = Field(1.0, gt=0, le=4096)
    memory_gib: float = Field(0.25, gt=0, le=100_000)
    tokens: dict[str, TokenPrice] = Field(default_factory=dict)
    managed: dict[str, ManagedPrice] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _expand_numbers(cls, value: object) -> object:
        """Read ``gpu_hour: {H100: 3.9}`` as ``{H100: {per_hour: 3.9}}``."""
        if not isinstance(value, dict) or not isinstance(gpus := value.get("gpu_hour"), dict):
            return value
        priced = {
            name: {"per_hour": each} if isinstance(each, int | float) else each for name, each in gpus.items()
        }
        return value | {"gpu_hour": priced}

    @model_validator(mode="after")
    def _has_any(self) -> Self:
        if self.gpu_hour and ANY not in self.gpu_hour:
            raise ValueError(f'gpu_hour needs an entry "{ANY}" for GPUs that it does not name')
        return self

    def gpu(self, device: str) -> GpuPrice:
        """Return the price of a GPU. If the GPU's name contains several entries, the longest one counts."""
        named = [name for name in self.gpu_hour if name != ANY and name.lower() in device.lower()]
        found = self.gpu_hour.get(max(named, key=len) if named else ANY)
        return found or GpuPrice(per_hour=0.0)


class Rate(_Entry):
    """The price of a replica per hour, and the resources for which the replica is charged.

    ``source``: where the price comes from: ``prices`` (the price list), or ``deployment`` if the Deployment
    has its own ``scaling.price_per_hour``.
    """

    per_hour: float
    cores: float
    memory_gib: float
    gpus: float = 0.0
    gpu: str = ""
    source: str = "prices"

    def cost(self, ns: int) -> float:
        """Return the cost of a replica for ``ns`` nanoseconds."""
        return self.per_hour * ns / 3.6e12


def rate_of(deployment: Deployment, prices: PriceList, device: str = "") -> Rate:
    """Return the rate of a Deployment's replica on ``device`` (as its worker reports it).

    A replica is charged for the resources that its Deployment reserves, even if it does not use them.
    """
    resources = deployment.resources
    cores = resources.cpus if resources.cpus is not None else prices.cores
    memory = prices.memory_gib if resources.memory_mb is None else resources.memory_mb / MIB_PER_GIB
    gpu = prices.gpu(device)
    gpus = float(resources.gpus)
    if resources.gpu_memory_mb is not None:
        gpus = min(1.0, resources.gpu_memory_mb / MIB_PER_GIB / gpu.memory_gib)
    own = deployment.scaling.price_per_hour
    listed = cores * prices.core_hour + memory * prices.gib_hour + gpus * gpu.per_hour
    return Rate(
        per_hour=listed if own is None else own,
        cores=cores,
        memory_gib=memory,
        gpus=gpus,
        gpu=device if gpus else "",
        source="prices" if own is None else "deployment",
    )
