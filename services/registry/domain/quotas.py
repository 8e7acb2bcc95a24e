"""Check the quota of a key. It limits the number of versions and the bytes of their artifacts. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.kernel.errors import Forbidden

REASON = "quota_exceeded"


@dataclass(frozen=True, slots=True)
class Quota:
    """The quota of a key. ``key``: the key's name. A limit of None means no limit."""

    key: str
    versions: int | None = None
    artifact_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Used:
    """The number of versions that a key has registered, and the bytes of their artifacts.

    Deleted versions do not count.
    """

    versions: int
    artifact_bytes: int


def check(quota: Quota, used: Used, size: int) -> None:
    """Raise Forbidden if one more version would exceed the quota. ``size``: bytes that its artifact adds."""
    remedy = "Delete versions (`tidegate delete NAME --version N`), or let an admin raise the quota: "
    if quota.versions is not None and used.versions + 1 > quota.versions:
        raise Forbidden(
            f"The key {quota.key!r} has {used.versions} registered versions, and the key's quota is "
            f"{quota.versions}. {remedy}`tidegate keys change {quota.key} --max-versions N`.",
            reason=REASON,
        )
    if quota.artifact_bytes is not None and used.artifact_bytes + size > quota.artifact_bytes:
        raise Forbidden(
            f"The versions of the key {quota.key!r} have {used.artifact_bytes} bytes. With {size} more, "
            f"they would exceed the key's quota of {quota.artifact_bytes}. {remedy}`tidegate keys change "
            f"{quota.key} --max-artifact-bytes N`.",
            reason=REASON,
        )
