"""Decide which versions a model's retention deletes. Pure.

A version is kept if a Deployment runs it, an alias points to it, a rollback would return to it, or it is the
latest version. With the option ``sleeping``, a Deployment that sleeps does not keep its version. All other
versions are judged by the limits that the retention sets. A version is deleted if it is not among the newest
``keep_last`` versions and is older than ``max_age_days``. A limit that is not set is not checked. Without any
limit, no version is deleted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from services.registry.domain.desired_state import (
    Change,
    DropDeployment,
    MarkVersion,
    RegistrySnapshot,
    StoredDeployment,
)
from services.registry.domain.model_policy import RetentionPolicy


@dataclass(frozen=True, slots=True)
class Fate:
    """The decision whether to delete a version, with its reason.

    ``deployments``: the sleeping Deployments that are deleted together with the version.
    """

    version: int
    delete: bool
    reason: str
    deployments: tuple[str, ...] = ()


def fates(
    snapshot: RegistrySnapshot,
    model: str,
    created: Mapping[int, datetime],
    rollback_targets: Mapping[int, str],
    policy: RetentionPolicy,
    now: datetime,
) -> list[Fate]:
    """Return the decision for each version of a model, oldest version first.

    ``created``: the time of each version's registration. ``rollback_targets``: for each version that a
    rollback would return to, the text "endpoint NAME".
    """
    newest_first = sorted(created, reverse=True)
    ranks = {number: rank for rank, number in enumerate(newest_first)}
    return [
        _fate(snapshot, model, number, ranks[number], now - created[number], rollback_targets, policy)
        for number in sorted(created)
    ]


def _fate(
    snapshot: RegistrySnapshot,
    model: str,
    number: int,
    rank: int,
    age: timedelta,
    rollback_targets: Mapping[int, str],
    policy: RetentionPolicy,
) -> Fate:
    runs = [
        stored
        for stored in snapshot.deployments.values()
        if (stored.spec.model, stored.spec.version) == (model, number)
    ]
    used = [each for each in runs if not (policy.sleeping and _sleeps(snapshot, each))]
    named = sorted(alias for alias, each in snapshot.aliases_of(model).items() if each == number)
    days = age.total_seconds() / 86_400
    if used:
        asleep = all(_sleeps(snapshot, each) for each in used)
        note = " and sleeps: add --sleeping to delete both" if asleep else ""
        return Fate(number, False, f"Deployment {_first(used)} runs this version{note}")
    if named:
        return Fate(number, False, f"the alias {named[0]} points to this version")
    if number in rollback_targets:
        return Fate(number, False, f"a rollback of {rollback_targets[number]} would return to this version")
    if rank == 0:
        return Fate(number, False, "this is the latest version")
    if not policy.active:
        return Fate(number, False, "the model has no retention")
    if policy.keep_last is not None and rank < policy.keep_last:
        return Fate(number, False, f"this version is among the newest {policy.keep_last}")
    if policy.max_age_days is not None and days <= policy.max_age_days:
        return Fate(
            number, False, f"this version is {days:.1f} days old, and the limit is {policy.max_age_days:g}"
        )
    why = [f"this version is not among the newest {policy.keep_last}"] if policy.keep_last is not None else []
    if policy.max_age_days is not None:
        why.append(f"this version is older than {policy.max_age_days:g} days")
    gone = tuple(sorted(each.spec.name for each in runs))
    return Fate(number, True, " and ".join(why), gone)


def deletions(model: str, found: Sequence[Fate]) -> list[Change]:
    """Return the changes that carry out the decisions in ``found``."""
    changes: list[Change] = []
    for fate in found:
        if fate.delete:
            changes += [DropDeployment(name) for name in fate.deployments]
            changes.append(MarkVersion(model, fate.version))
    return changes


def _first(used: Sequence[StoredDeployment]) -> str:
    return min(each.spec.name for each in used)


def _sleeps(snapshot: RegistrySnapshot, stored: StoredDeployment) -> bool:
    """Return True if a Deployment sleeps: its minimum is 0 replicas, and no Endpoint uses it.

    A Deployment that a user declared, or that has an ``override``, never counts as sleeping.
    """
    if stored.declared or stored.override is not None or stored.spec.min_replicas > 0:
        return False
    return stored.spec.name not in snapshot.in_use() | snapshot.failovers()
