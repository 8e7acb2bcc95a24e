"""The policy of a model: which versions are kept, and the stages of versions. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from services.registry.domain import filters, merge
from tidegate.kernel.protocol.models import LARGEST, Noun

StageName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
NO_STAGE = "none"


class RetentionPolicy(Noun):
    """The rule for how many versions are kept. Versions in use are always kept.

    ``keep_last``: the number of newest versions that are always kept. ``max_age_days``: only versions that
    are older than this many days are deleted.

    ``sleeping`` False: a version is in use if any Deployment runs it. ``sleeping`` True: a sleeping
    Deployment that no Endpoint uses does not count. If the version is deleted, this Deployment is deleted
    too.
    """

    keep_last: int | None = Field(None, ge=1, le=LARGEST)
    max_age_days: float | None = Field(None, gt=0, le=36_500)
    sleeping: bool = False

    @property
    def active(self) -> bool:
        """Return True if the policy can delete a version."""
        return self.keep_last is not None or self.max_age_days is not None


class Stage(Noun):
    """A stage of versions, and its requirements.

    ``approvals``: the number of owners who must approve the version. They approve with keys that have the
    scope ``scope``. The owner of the key that registered the version does not count.

    ``verified``: True if the version must be verified. ``checks``: a filter that the version must match.
    """

    name: StageName
    approvals: int = Field(0, ge=0, le=20)
    scope: Literal["publish", "operate", "admin"] = "operate"
    verified: bool = False
    checks: str = Field("", max_length=filters.LONGEST)


class ModelPolicy(Noun):
    """The policy of a model. ``stages`` are in the order in which a version enters them.

    ``serve_from``: versions of this stage and of later stages may serve. None: every version may serve.
    """

    retention: RetentionPolicy = RetentionPolicy()
    stages: list[Stage] = Field(default_factory=list, max_length=10)
    serve_from: StageName | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError("two stages have the same name: give each stage another name")
        if NO_STAGE in names:
            raise ValueError(f"a stage cannot be called {NO_STAGE!r}, which means no stage")
        if self.serve_from is not None and self.serve_from not in names:
            raise ValueError(
                f"serve_from is {self.serve_from!r}, which is not one of the stages: name one of the stages"
            )
        return self

    def rank(self, stage: str | None) -> int:
        """Return the position of a stage, starting at 1; 0 for no stage or an unknown stage."""
        names = [each.name for each in self.stages]
        return names.index(stage) + 1 if stage in names else 0

    def guards(self, other: ModelPolicy) -> bool:
        """Return True if the policies differ in ``stages`` or ``serve_from``.

        These two fields decide which versions may serve.
        """
        return (self.stages, self.serve_from) != (other.stages, other.serve_from)


def patched(policy: ModelPolicy, patch: Mapping[str, Any]) -> ModelPolicy:
    """Return a policy with a JSON merge patch applied. Raise BadRequest if the result is not valid."""
    found = merge.checked(ModelPolicy, merge.patched(policy.model_dump(), patch), "policy")
    for stage in found.stages:
        filters.parse(stage.checks)
    return found
