"""Which scope opens which route of which service: the one table that both sides read.

The gateway's proxy asks it before it passes a call on, and each service asks it again for the caller that the
call carries. A route that the table does not name is answered to nobody: ``tests/unit/protocol/
test_permissions.py`` compares it with the routes that the services have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from tidegate.kernel.protocol.access import ADMIN, INFER, METRICS, OPERATE, PUBLISH, REPLICA

# Words that stand where scopes do.
OPEN = "open"  # no credential is needed
ANY = "any"  # every credential that is taken here; the handler asks for more
INTERNAL = "internal"  # Tidegate's own services, and nobody for whom they ask

Scopes = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Route:
    """A route that was found. ``scopes``: one of these opens it."""

    path: str
    scopes: Scopes


@dataclass(frozen=True)
class Permissions:
    """The routes of a service: ``{"GET /v1/models/{name}": (PUBLISH, OPERATE)}``.

    ``{name}`` is one step of a path or a part of one, ``{rest:path}`` is all that follows.
    """

    table: Mapping[str, Scopes]

    @cached_property
    def by_path(self) -> dict[str, dict[str, Scopes]]:
        """The scopes by path and method, the most literal paths first."""
        found: dict[str, dict[str, Scopes]] = {}
        for line in sorted(self.table, key=lambda line: _precedence(line.partition(" ")[2])):
            method, _, path = line.partition(" ")
            found.setdefault(path, {})[method] = self.table[line]
        return found

    @cached_property
    def _patterns(self) -> dict[int, tuple[re.Pattern[str], list[str]]]:
        """One pattern for the paths of each number of steps, and one for those of any number (0)."""
        by_steps: dict[int, list[str]] = {}
        for path in self.by_path:
            by_steps.setdefault(0 if ":path}" in path else path.count("/"), []).append(path)
        return {
            steps: (re.compile("|".join(f"({_pattern_of(path)})" for path in paths)), paths)
            for steps, paths in by_steps.items()
        }

    def methods(self, path: str) -> tuple[str, dict[str, Scopes]] | None:
        """The path of the table that a request's (decoded) path is, and its methods; None: there is none."""
        if path != "/" and any(step in ("", ".", "..") for step in path[1:].split("/")):
            return None
        for steps in (path.count("/"), 0):
            pattern, paths = self._patterns.get(steps, (None, []))
            found = pattern.fullmatch(path) if pattern is not None else None
            if found is not None and found.lastindex is not None:
                template = paths[found.lastindex - 1]
                return template, self.by_path[template]
        return None

    def find(self, method: str, path: str) -> Route | None:
        """The route of a call; None: the service has no such route."""
        found = self.methods(path)
        if found is None or method not in found[1]:
            return None
        return Route(found[0], found[1][method])


def has_control_character(path: str) -> bool:
    """Return whether a path has a character that no name has, and that routers read in different ways."""
    return not path.isprintable() and any(ord(each) < 0x20 or ord(each) == 0x7F for each in path)


def _precedence(path: str) -> list[tuple[int, str]]:
    """Literal steps before those with a parameter, so ``/keys/table`` before ``/keys/{id}``."""
    return [(_rank(step), step) for step in path.split("/")]


def _rank(step: str) -> int:
    if "{" not in step:
        return 0
    if step.endswith(":path}"):
        return 3
    return 2 if step.startswith("{") and step.endswith("}") else 1


def _pattern_of(path: str) -> str:
    pieces = re.split(r"(\{[a-z0-9_]+(?::path)?\})", path)
    return "".join(
        (".*" if piece.endswith(":path}") else "[^/]+") if piece.startswith("{") else re.escape(piece)
        for piece in pieces
    )


# What it takes to look at what is deployed.
LOOK: Scopes = (PUBLISH, OPERATE)

_HEALTH: dict[str, Scopes] = {
    "GET /health/live": (OPEN,),
    "GET /health/ready": (OPEN,),
}
_OWN: dict[str, Scopes] = _HEALTH | {
    "GET /metrics": (METRICS, OPERATE),
    "GET /docs": (OPEN,),
    "GET /openapi.json": (OPEN,),
    "GET /v1/settings": (OPERATE,),
}

REGISTRY = Permissions(
    _OWN
    | {
        "PUT /v1/artifacts": (PUBLISH,),
        # A replica reads its own artifact; the handler refuses it any other.
        "HEAD /v1/artifacts/{sha256}": (*LOOK, REPLICA),
        "GET /v1/artifacts/{sha256}": (*LOOK, REPLICA),
        "PUT /v1/replicas": (INTERNAL,),
        "GET /v1/models": LOOK,
        "GET /v1/models/{name}": LOOK,
        "DELETE /v1/models/{name}": (PUBLISH,),
        "GET /v1/models/{name}/versions": LOOK,
        "POST /v1/models/{name}/versions": (PUBLISH,),
        "POST /v1/models/{name}/check": (PUBLISH,),
        "GET /v1/models/{name}/versions/{number}": LOOK,
        "PATCH /v1/models/{name}/versions/{number}": (PUBLISH,),
        "DELETE /v1/models/{name}/versions/{number}": (PUBLISH,),
        "GET /v1/deployments": LOOK,
        "GET /v1/deployments/{name}": LOOK,
        "PUT /v1/deployments/{name}": (PUBLISH,),
        "PATCH /v1/deployments/{name}": (PUBLISH,),
        "DELETE /v1/deployments/{name}": (PUBLISH,),
        "PATCH /v1/deployments/{name}/policy": (OPERATE,),
        "PUT /v1/deployments/{name}/override": (OPERATE,),
        "DELETE /v1/deployments/{name}/override": (OPERATE,),
        "GET /v1/endpoints": LOOK,
        "GET /v1/endpoints/{name}": LOOK,
        "PUT /v1/endpoints/{name}": (PUBLISH,),
        "DELETE /v1/endpoints/{name}": (PUBLISH,),
        "POST /v1/endpoints/{name}/settle": (OPERATE,),
        "POST /v1/endpoints/{name}/rollback": (PUBLISH,),
        "POST /v1/endpoints/{name}/split": (PUBLISH,),
        "GET /v1/desired-state": LOOK,
        "GET /v1/intention": LOOK,  # the older name of the same route
        "POST /v1/deploy": (PUBLISH,),
        "POST /v1/apply": (PUBLISH,),
        "GET /v1/keys": (ADMIN,),
        "POST /v1/keys": (ADMIN,),
        "GET /v1/keys/table": (INTERNAL,),
        "GET /v1/keys/{id}": (ADMIN,),
        "PATCH /v1/keys/{id}": (ADMIN,),
        "DELETE /v1/keys/{id}": (ADMIN,),
        "POST /v1/keys/{id}/rotate": (ADMIN,),
        "GET /v1/audit": (ADMIN,),
        "GET /v1/usage": (ADMIN,),
        "GET /v1/usage.csv": (ADMIN,),
        "GET /v1/usage/{principal}/quota": (INTERNAL,),
    }
)

ROUTER = Permissions(
    _OWN
    | {
        "GET /v1/routes": (OPERATE,),
        "GET /v1/exceptions": (OPERATE,),
        "GET /v1/dead": (OPERATE,),
        "GET /v1/dead/{id}": (OPERATE,),
        "GET /v1/dead/{id}/payload": (OPERATE,),
        "POST /v1/dead/{id}/replay": (OPERATE,),
        "POST /v1/dead/replay": (OPERATE,),
        "DELETE /v1/dead/{id}": (OPERATE,),
        "GET /v1/ledger": (OPERATE,),
        # The caller's own secret; another principal's needs the scope admin, which the handler asks for.
        "GET /v1/webhooks/secret": (INFER,),
    }
)

AUTOSCALER = Permissions(
    _OWN
    | {
        "GET /prometheus/workers": (METRICS, OPERATE),
        "GET /v1/settings/workers": (OPERATE,),
        # A deploy waits by the status, and `why` says what keeps it from being ready.
        "GET /v1/deployments": LOOK,
        "GET /v1/deployments/{name}": LOOK,
        "PUT /v1/deployments/{name}/replicas": (OPERATE,),
        "DELETE /v1/deployments/{name}/replicas": (OPERATE,),
        "POST /v1/deployments/{name}/pause": (OPERATE,),
        "POST /v1/deployments/{name}/resume": (OPERATE,),
        "GET /v1/deployments/{name}/why": LOOK,
        "GET /v1/deployments/{name}/policy": (OPERATE,),
        "PATCH /v1/deployments/{name}/policy": (OPERATE,),
        "GET /v1/deployments/{name}/cold-starts": (OPERATE,),
        "GET /v1/cold-starts": (OPERATE,),
        # What a model printed is for its author, too.
        "GET /v1/logs/{name}": LOOK,
        "GET /v1/requests/{id}/logs": (OPERATE,),
        "GET /v1/hosts": (OPERATE,),
        "PUT /v1/hosts/{host}/cordon": (OPERATE,),
        "DELETE /v1/hosts/{host}/cordon": (OPERATE,),
        "GET /v1/replicas": (OPERATE,),
        "POST /v1/replicas/{replica}/drain": (OPERATE,),
        "GET /v1/warm": (OPERATE,),
        "GET /v1/decisions": (OPERATE,),
        "GET /v1/policy": (OPERATE,),
        "POST /v1/replay": (OPERATE,),
        "POST /v1/replay/verify": (OPERATE,),
    }
)

# What a worker shows of itself are its own model's counts.
WORKER = Permissions(_HEALTH | {"GET /metrics": (OPEN,)})

_MODEL = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")

GATEWAY = Permissions(
    _OWN
    | {
        # Shows the caller what that caller may use, and everybody what this is.
        "GET /": (OPEN,),
        "GET /v2/health/live": (OPEN,),
        "GET /v2/health/ready": (OPEN,),
        "GET /v2": (INFER,),
        "GET /v2/models": (INFER,),
        "GET /v2/models/stats": (INFER,),
        "POST /v2/repository/index": (INFER,),
        "POST /v2/repository/models/{model}/{action}": (INFER,),
        "GET /v2/{kind}sharedmemory/status": (INFER,),
        "GET /v2/{kind}sharedmemory/region/{name}/status": (INFER,),
        "POST /v2/{kind}sharedmemory/{rest:path}": (INFER,),
    }
    | {
        f"{method} {path}": (INFER,)
        for method in ("GET", "POST")
        for path in ("/v2/logging", "/v2/trace/setting", "/v2/models/{model}/trace/setting")
    }
    | {f"GET {model}{part}": (INFER,) for model in _MODEL for part in ("", "/config", "/stats")}
    # A deploy waits for it.
    | {f"GET {model}/ready": (INFER, PUBLISH) for model in _MODEL}
    | {
        f"POST {model}/{part}": (INFER,)
        for model in _MODEL
        for part in ("infer", "generate", "generate_stream")
    }
    | {
        "GET /v1/jobs": (INFER,),
        "POST /v1/jobs": (INFER,),
        "GET /v1/jobs/{id}": (INFER,),
        "DELETE /v1/jobs/{id}": (INFER,),
        "GET /v1/jobs/{id}/result": (INFER,),
        "GET /v1/jobs/{id}/events": (INFER,),
        "GET /v1/jobs/{id}/deliveries": (INFER,),
        "POST /v1/jobs/{id}/retry": (INFER,),
        "GET /v1/batches": (INFER,),
        "POST /v1/batches": (INFER,),
        "GET /v1/batches/{id}": (INFER,),
        "DELETE /v1/batches/{id}": (INFER,),
        "GET /v1/batches/{id}/results": (INFER,),
        "GET /v1/webhooks/secret": (INFER,),
    }
    | {
        # Decided by the table of the service that the call is for.
        f"{method} /api/{{service}}/{{rest:path}}": (ANY,)
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
    }
)

# What the gateway passes calls on to.
CONTROL: dict[str, Permissions] = {"registry": REGISTRY, "router": ROUTER, "autoscaler": AUTOSCALER}
SERVICES: dict[str, Permissions] = CONTROL | {"gateway": GATEWAY, "worker": WORKER}
