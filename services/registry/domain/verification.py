"""Decide which versions may serve, and plan the scratch replica of a version. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from services.registry.domain import merge
from services.registry.domain.desired_state import (
    Change,
    PutDeployment,
    PutEndpoint,
    RegistrySnapshot,
    StoredEndpoint,
)
from tidegate.kernel.errors import Conflict
from tidegate.kernel.protocol.models import DeploymentSpec, EndpointSpec, Format
from tidegate.kernel.protocol.verification import (
    NOT_VERIFIED,
    Verification,
    VerificationOptions,
    VerificationResult,
)

# Options of a Deployment that decide how a replica loads and runs its version.
RUN_OPTIONS = (
    "threads", "instances", "batching", "max_concurrency", "start_timeout_s", "env", "resources", "image",
    "llm", "upstream",
)  # fmt: skip
PENDING_RETRY_S = 2.0  # retry-after in seconds: a small version is verified in about this time
_SKIPPED: dict[Format, str] = {
    "llm": (
        "Language models are not verified, because loading takes long. The first replica shows whether the "
        "model loads."
    ),
    "oip": "Upstreams are not verified, because each call of the other server may cost money.",
}


def at_registration(format_: Format, now: datetime, *, enabled: bool, round_: int = 1) -> Verification:
    """Return the initial verification of a new version, or of a version that is verified again."""
    if not enabled:
        return Verification()
    if (reason := _SKIPPED.get(format_)) is not None:
        return Verification(state="skipped", message=reason, round=round_, at=now)
    return Verification(state="pending", round=round_, at=now)


def settled(stored: Verification, result: VerificationResult, now: datetime) -> Verification | None:
    """Return the verification after ``result``; None if ``result`` is a duplicate or outdated.

    An outdated result is from an earlier round of the verification.
    """
    if stored.state != "pending" or stored.round != result.round:
        return None
    card = result.card or stored.card
    return Verification(state=result.state, message=result.message, round=result.round, at=now, card=card)


def scratch_spec(
    snapshot: RegistrySnapshot, model: str, number: int, options: VerificationOptions
) -> DeploymentSpec:
    """Return the Deployment for a version's scratch replica. Raise BadRequest for invalid options.

    Its options are those of the Deployment that serves the model now. Options that the publisher states
    override them.
    """
    endpoint = snapshot.endpoints.get(model)
    base: dict[str, Any] = {}
    if endpoint is not None:
        current = snapshot.heaviest(endpoint.spec.targets).model_dump()
        base = {name: current[name] for name in RUN_OPTIONS}
    given = {name: value for name, value in options.deployment.items() if name in RUN_OPTIONS}
    return merge.deployment(
        {**base, "name": "scratch", "model": model, "version": number}, given, "The verification"
    )


def check(before: RegistrySnapshot, changes: Sequence[Change]) -> None:
    """Raise Conflict if a change lets a version serve while its verification is pending or rejected.

    Two things are checked: new Deployments, and Deployments that an Endpoint begins to use as a target, rule,
    shadow or failover. So Deployments that run already continue. A Deployment with ``unverified`` may run any
    version.
    """
    after = before.after(changes)
    for change in changes:
        match change:
            case PutDeployment(stored, True):
                _check(after, stored.spec)
            case PutEndpoint(spec):
                known = before.endpoints.get(spec.name)
                for name in sorted(_used(spec) - _used_before(known)):
                    if (found := after.deployments.get(name)) is not None:
                        _check(after, found.spec)


def refusal(model: str, number: int, verification: Verification) -> Conflict:
    """Return the error for a version that must not serve. Its message has the command to run next."""
    anyway = (
        f"To serve it without verification: `tidegate deploy {model} --version {number} --force` (API: "
        "unverified=true)."
    )
    if verification.state == "pending":
        return Conflict(
            f"Version {number} of model {model!r} is not verified yet. A scratch replica must load it "
            f"first. Wait for the result: `tidegate verify {model} --version {number}`. {anyway}",
            reason=NOT_VERIFIED,
            retry_after_s=PENDING_RETRY_S,
        )
    return Conflict(
        f"Version {number} of model {model!r} was rejected: {verification.message.rstrip('.')}. Correct the "
        f"model and deploy it again, or verify this version again: `tidegate verify {model} --version "
        f"{number}`. {anyway}",
        reason=NOT_VERIFIED,
    )


def _check(snapshot: RegistrySnapshot, spec: DeploymentSpec) -> None:
    found = snapshot.refused.get((spec.model, spec.version))
    if found is not None and not spec.unverified:
        raise refusal(spec.model, spec.version, found)


def _used(spec: EndpointSpec) -> set[str]:
    used = {target.deployment for target in spec.targets} | {rule.deployment for rule in spec.rules}
    used |= set(spec.failover)
    return used | ({spec.shadow.deployment} if spec.shadow is not None else set())


def _used_before(stored: StoredEndpoint | None) -> set[str]:
    if stored is None:
        return set()
    return _used(stored.spec) | {target.deployment for target in stored.spec.previous}
