"""Callers and their rights: principals, scopes, keys and limits, shared by all services.

A scope is a kind of action, not a rank: ``publish`` does not contain ``infer``. Only ``admin`` contains all.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

INFER = "infer"  # call models, and use the caller's own jobs
PUBLISH = "publish"  # upload, register, deploy, delete models
OPERATE = "operate"  # scale, override and inspect Deployments, and use all jobs
ADMIN = "admin"  # manage keys, read audit and usage, and do everything else
SCOPES = (INFER, PUBLISH, OPERATE, ADMIN)
# The scope to read metrics and to list the workers, as Prometheus does. No key has this scope. The metrics
# token has it, and callers on loopback without a credential have it.
METRICS = "metrics"
# The scope of a replica: the replica may read the artifact of its own version. No key has this scope. Only
# the tokens of replicas have it.
REPLICA = "replica"

# Headers of a proxied call. They are ignored in calls without the service token.
PRINCIPAL_HEADER = b"x-tidegate-principal"
ORIGIN_HEADER = b"x-tidegate-origin"


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller.

    ``endpoints``: the only endpoints that the caller may use; None: all endpoints.
    ``weight``: the caller's share of a busy Deployment, in proportion to the other callers' weights.
    ``role``: for a caller with a JWT, the role whose limits it has; empty if it has none.
    """

    id: str
    name: str
    scopes: frozenset[str]
    endpoints: frozenset[str] | None = None
    weight: int = 1
    role: str = ""

    def may(self, scope: str, endpoint: str | None = None) -> bool:
        """Return True if the principal has the scope and may use ``endpoint``.

        If ``endpoint`` is None, only the scope is checked. A principal that is limited to endpoints may only
        infer, because the other scopes cannot be limited to endpoints.
        """
        if self.endpoints is not None and scope != INFER:
            return False
        if scope not in self.scopes and ADMIN not in self.scopes:
            return False
        return endpoint is None or self.endpoints is None or endpoint in self.endpoints

    def sees(self, owner: str) -> bool:
        """Return True if the principal is ``owner``, or may see all owners' data because it has ``admin``."""
        return owner == self.id or self.may(ADMIN)

    def to_header(self) -> str:
        """Return the principal as one line of ASCII, for a proxied call."""
        endpoints = None if self.endpoints is None else sorted(self.endpoints)
        return json.dumps(
            {"id": self.id, "name": self.name, "scopes": sorted(self.scopes), "endpoints": endpoints}
        )

    @classmethod
    def from_header(cls, raw: bytes) -> Principal:
        """Read the result of :meth:`to_header`. Raises ValueError for anything else."""
        try:
            values = json.loads(raw)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if not isinstance(values, dict):
            raise ValueError("a principal must be a JSON object")
        endpoints = values.get("endpoints")
        try:
            return cls(
                str(values["id"]),
                str(values["name"]),
                frozenset(map(str, values["scopes"])),
                None if endpoints is None else frozenset(map(str, endpoints)),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a principal: {error!r}") from None


# A caller on loopback without a credential.
ANONYMOUS = Principal("anonymous", "anonymous", frozenset({INFER, METRICS}))
# A holder of the service token: Tidegate's own services, and the operator of this machine.
SERVICE = Principal("service", "service token", frozenset(SCOPES))
# A holder of the metrics token.
SCRAPER = Principal("metrics", "metrics token", frozenset({METRICS}))


def metrics_token(service_token: str) -> str:
    """Return the token that gives access only to a stack's metrics. It is derived from the service token."""
    return "tgm_" + hmac.digest(service_token.encode(), b"tidegate metrics", hashlib.sha256).hex()


def engine_token(service_token: str) -> str:
    """Return the token that gives access only to the proxy in front of the container engine."""
    return "tge_" + hmac.digest(service_token.encode(), b"tidegate engine", hashlib.sha256).hex()


# The prefix of the id of a replica's principal.
REPLICA_PREFIX = "replica:"


def replica_principal(replica: str) -> Principal:
    """Return the principal of a replica that has authenticated with its token.

    This principal may only read the artifact of the replica's version.
    """
    return Principal(f"{REPLICA_PREFIX}{replica}", replica, frozenset({REPLICA}))


# The prefix of the id of a principal that authenticated with a token of an identity provider.
JWT_PREFIX = "jwt:"


def lacks(principal: Principal, scopes: Sequence[str]) -> str:
    """Return an error text with the scopes of ``principal``, the needed scopes, and how to get them."""
    needed, held = " or ".join(scopes), ", ".join(s for s in SCOPES if s in principal.scopes) or "no scope"
    if principal is SCRAPER or principal.id.startswith(REPLICA_PREFIX):
        return (
            f"the token of {principal.name!r} is for one purpose only; this needs a key with the scope "
            f"{needed}"
        )
    if principal.id.startswith(JWT_PREFIX):
        return (
            f"the token of {principal.name!r} has {held}, but this needs {needed}: map one of its roles to "
            "that scope (TIDEGATE_JWT_ROLE_SCOPES)"
        )
    key = f"the key {principal.name!r} ({KEY_PREFIX}{principal.id})"
    if principal.endpoints is not None:
        return (
            f"{key} is limited to some endpoints, so it may only infer. This needs {needed}: use a key "
            f"without --endpoint; an admin makes one with `tidegate keys create NAME --scope {scopes[0]}`"
        )
    wanted = " ".join(
        f"--scope {scope}" for scope in SCOPES if scope in principal.scopes or scope == scopes[0]
    )
    return (
        f"{key} has the scope {held}, but this needs {needed}: an admin adds it with "
        f"`tidegate keys change {principal.id} {wanted}`"
    )


def may_not_use(principal: Principal, endpoint: str) -> str:
    """Return why ``principal`` may not send requests to ``endpoint``."""
    if not principal.may(INFER):
        return lacks(principal, (INFER,))
    return (
        f"the key {principal.name!r} ({KEY_PREFIX}{principal.id}) may not use the model {endpoint[:80]!r}: "
        f"it is limited to {', '.join(sorted(principal.endpoints or ()))[:200]}; an admin changes that with "
        f"`tidegate keys change {principal.id} --endpoint ...`"
    )


def carried(headers: Mapping[bytes, bytes]) -> Principal:
    """Return the principal in the header of a service's call. Without the header, return SERVICE.

    Raises ValueError if the header does not contain a principal.
    """
    raw = headers.get(PRINCIPAL_HEADER)
    return SERVICE if raw is None else Principal.from_header(raw)


# A key is ``tg_<id>_<secret>``. The id identifies the record; the secret has 256 random bits.
KEY_PREFIX = "tg_"


def key_of(id_: str, secret: str) -> str:
    """Return the key in the form that its owner gets."""
    return f"{KEY_PREFIX}{id_}_{secret}"


def key_id(credential: bytes) -> str | None:
    """Return the id in a key, or None if the credential is not a key."""
    prefix, _, rest = credential.partition(b"_")
    id_, _, secret = rest.partition(b"_")
    if prefix != b"tg" or not id_ or not secret:
        return None
    return id_.decode("latin-1")


def digest_of(credential: bytes) -> str:
    """Return the sha256 of a key, which is stored in place of the key.

    No slow hash is needed, because nobody can guess 256 random bits.
    """
    return hashlib.sha256(credential).hexdigest()


@dataclass(frozen=True, slots=True)
class Allowance:
    """The limits of a key over all gateway processes. None means no limit.

    ``rate``: requests per second. ``burst``: the size of the rate limit's token bucket, in requests.
    ``concurrency``: requests in flight. ``day``, ``month``: requests in a calendar day and month (UTC).
    ``day_budget``, ``month_budget``: amounts in billionths of the currency of the price list.
    """

    rate: float | None = None
    burst: int = 1
    concurrency: int | None = None
    day: int | None = None
    month: int | None = None
    day_budget: int | None = None
    month_budget: int | None = None

    @property
    def unlimited(self) -> bool:
        """True if the key has no limit."""
        return (
            self.rate
            is self.concurrency
            is self.day
            is self.month
            is self.day_budget
            is self.month_budget
            is None
        )


@dataclass(frozen=True, slots=True)
class TokenAllowance:
    """The most tokens of language models, prompts and answers together, over all gateway processes.

    ``minute`` is the limit in any 60 seconds, ``day`` the limit in a calendar day (UTC). None means no limit.
    """

    minute: int | None = None
    day: int | None = None

    @property
    def unlimited(self) -> bool:
        """True if there is no limit."""
        return self.minute is self.day is None


@dataclass(frozen=True, slots=True)
class Key:
    """A key as gateways store it, without its secret. Times are ms since the epoch.

    ``digest``: the key's sha256.
    ``tokens``: the token limit for all endpoints together. ``endpoint_tokens``: token limits by endpoint.
    """

    principal: Principal
    digest: str
    expires_ms: float | None = None
    allowance: Allowance = Allowance()
    # The digest of the key before a rotation. It stays valid until previous_until_ms.
    previous: str | None = None
    previous_until_ms: float = 0.0
    tokens: TokenAllowance = TokenAllowance()
    endpoint_tokens: Mapping[str, TokenAllowance] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the key as JSON values."""
        mine, allowance = self.principal, self.allowance
        return {
            "id": mine.id,
            "name": mine.name,
            "scopes": sorted(mine.scopes),
            "endpoints": None if mine.endpoints is None else sorted(mine.endpoints),
            "weight": mine.weight,
            "digest": self.digest,
            "expires_ms": self.expires_ms,
            "previous": self.previous,
            "previous_until_ms": self.previous_until_ms,
            "rate": allowance.rate,
            "burst": allowance.burst,
            "concurrency": allowance.concurrency,
            "day": allowance.day,
            "month": allowance.month,
            "day_budget": allowance.day_budget,
            "month_budget": allowance.month_budget,
            "tokens": [self.tokens.minute, self.tokens.day],
            "endpoint_tokens": {name: [each.minute, each.day] for name, each in self.endpoint_tokens.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Key:
        """Read the result of :meth:`to_dict`.

        Raises KeyError, TypeError or ValueError for anything else.
        """
        endpoints = values["endpoints"]
        return cls(
            principal=Principal(
                values["id"],
                values["name"],
                frozenset(values["scopes"]),
                None if endpoints is None else frozenset(endpoints),
                values.get("weight", 1),
            ),
            digest=values["digest"],
            expires_ms=values["expires_ms"],
            allowance=Allowance(
                values["rate"],
                values["burst"],
                values["concurrency"],
                values["day"],
                values["month"],
                # An earlier version of Tidegate may have written the stored table of keys. Then the table has
                # no budgets.
                values.get("day_budget"),
                values.get("month_budget"),
            ),
            previous=values["previous"],
            previous_until_ms=values["previous_until_ms"],
            # An earlier version of Tidegate may have written the stored table of keys. Then the table has no
            # token limits.
            tokens=TokenAllowance(*values.get("tokens", ())),
            endpoint_tokens={
                name: TokenAllowance(*each) for name, each in values.get("endpoint_tokens", {}).items()
            },
        )
