"""The warm pools of workers without a model."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from tidegate.kernel.protocol.models import Name, Noun, Resources


class WarmPoolSpec(Noun):
    """The settings of a warm pool.

    ``workers``: the number of workers that wait without a model. A Deployment with the same ``image`` and
    ``resources`` can use such a worker. If the Deployment has an ``env`` or another number of ``threads``,
    the worker restarts its Triton.
    """

    workers: int = Field(1, ge=0, le=1000)
    image: str | None = Field(None, min_length=1, max_length=512)
    resources: Resources = Resources(gpus=0)
    threads: int = Field(1, ge=1, le=1024)
    start_timeout_s: float = Field(120.0, gt=0)


class WarmAssignment(Noun):
    """Everything that a worker of a warm pool needs to start without a model.

    The worker gets an :class:`Assignment` when it becomes a replica. In JSON, the field ``pool_name`` is
    called ``flavour``, because workers of earlier versions read this name.
    """

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    replica: str
    generation: int
    pool_name: Name = Field(alias="flavour")
    pool: WarmPoolSpec
    launched_at: float
