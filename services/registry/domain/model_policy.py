"""The policy of a model: how many versions are kept. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from services.registry.domain import merge
from tidegate.kernel.protocol.models import LARGEST, Noun

DAY_S = 86_400.0


class RetentionPolicy(Noun):
    """The versions that are kept; the others are deleted. Versions in use are always kept.

    ``keep_last``: this many of the newest versions are always kept. ``max_age_days``: only older versions are
    deleted. ``sleeping``: a sleeping Deployment that no Endpoint names does not keep its version, and is
    deleted with it.
    """

    keep_last: int | None = Field(None, ge=1, le=LARGEST)
    max_age_days: float | None = Field(None, gt=0, le=36_500)
    sleeping: bool = False

    @property
    def active(self) -> bool:
        """Return True if the policy can delete a version."""
        return self.keep_last is not None or self.max_age_days is not None


class ModelPolicy(Noun):
    """The policy of a model, such as the retention of its versions."""

    retention: RetentionPolicy = RetentionPolicy()


def patched(policy: ModelPolicy, patch: Mapping[str, Any]) -> ModelPolicy:
    """Return a policy with a JSON merge patch applied. Raise BadRequest."""
    return merge.checked(ModelPolicy, merge.patched(policy.model_dump(), patch), "policy")
