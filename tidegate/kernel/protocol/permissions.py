"""The scopes that a caller needs for each route of each service.

The gateway's proxy checks this table before it forwards a call. Each service checks the table again for the
call's principal. A route that is missing here is closed for everyone. So
``tests/unit/protocol/test_permissions.py`` checks that the table has all routes of the services.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from tidegate.kernel.protocol.access import ADMIN, INFER, METRICS, OPERATE, PUBLISH, REPLICA

# Special values that a route may have instead of scopes.
OPEN = "open"  # no credential is needed
ANY = "any"  # any valid credential is enough; the service behind the proxy checks the scopes
INTERNAL = "internal"  # only Tidegate's own services may call the route, and not on behalf of a caller

Scopes = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Route:
    """A route and its scopes. A caller needs any one of ``scopes`` to call it."""

    path: str
    scopes: Scopes


@dataclass(frozen=True)
class RoutePermissions:
    """The routes of a service, each with its scopes: ``{"GET /v1/models/{name}": (PUBLISH, OPERATE), ...}``.

    ``{name}`` is a segment of the path or a part of a segment. ``{rest:path}`` is the rest of the path.
    """

    table: Mapping[str, Scopes]

    @cached_property
    def by_path(self) -> dict[str, dict[str, Scopes]]:
        """Return the scopes by path and method.

        ``/keys/table`` comes before ``/keys/{id}``, so it matches first.
        """
        found: dict[str, dict[str, Scopes]] = {}
        for line in sorted(self.table, key=lambda line: _precedence(line.partition(" ")[2])):
            method, _, path = line.partition(" ")
            found.setdefault(path, {})[method] = self.table[line]
        return found

    @cached_property
    def _patterns(self) -> dict[int, tuple[re.Pattern[str], list[str]]]:
        """Return a pattern and a list of path templates for each number of segments.

        The pattern matches every path that fits one of these templates. Key 0 is for templates with
        ``{rest:path}``, because they match any number of segments.
        """
        by_steps: dict[int, list[str]] = {}
        for path in self.by_path:
            by_steps.setdefault(0 if ":path}" in path else path.count("/"), []).append(path)
        return {
            steps: (re.compile("|".join(f"({_pattern_of(path)})" for path in paths)), paths)
            for steps, paths in by_steps.items()
        }

    def methods(self, path: str) -> tuple[str, dict[str, Scopes]] | None:
        """Return the template that matches the decoded ``path``, with its scopes by method, or None."""
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
        """Return the route of a call, or None if the service has no such route."""
        found = self.methods(path)
        if found is None or method not in found[1]:
            return None
        return Route(found[0], found[1][method])


def has_control_character(path: str) -> bool:
    """Return True if a path has a control character.

    No valid name has one, and web frameworks differ in how they match such paths.
    """
    return not path.isprintable() and any(ord(each) < 0x20 or ord(each) == 0x7F for each in path)


def _precedence(path: str) -> list[tuple[int, str]]:
    """Return a sort key for a path. It sorts literal segments before parameters.

    So ``/keys/table`` comes before ``/keys/{id}``.
    """
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


# Callers with one of these scopes may read models, Deployments and Endpoints.
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

REGISTRY = RoutePermissions(
    _OWN
    | {
        "PUT /v1/artifacts": (PUBLISH,),
        # A replica may read only its own artifact. The handler checks this.
        "HEAD /v1/artifacts/{sha256}": (*LOOK, REPLICA),
        "GET /v1/artifacts/{sha256}": (*LOOK, REPLICA),
        "GET /v1/artifacts/{sha256}/signatures": (*LOOK, REPLICA),
        "POST /v1/artifacts/{sha256}/signatures": (PUBLISH,),
        "DELETE /v1/artifacts/{sha256}/signatures/{key}": (PUBLISH,),
        # A caller sees only its own uploads.
        "GET /v1/uploads": (PUBLISH,),
        "POST /v1/uploads": (PUBLISH,),
        "GET /v1/uploads/{id}": (PUBLISH,),
        "PATCH /v1/uploads/{id}": (PUBLISH,),
        "DELETE /v1/uploads/{id}": (PUBLISH,),
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
        "GET /v1/versions": LOOK,
        "GET /v1/compare": LOOK,
        "POST /v1/models/{name}/restore": (PUBLISH,),
        "POST /v1/models/{name}/versions/{number}/restore": (PUBLISH,),
        "GET /v1/models/{name}/policy": LOOK,
        "GET /v1/models/{name}/versions/{number}/lineage": LOOK,
        "GET /v1/models/{name}/versions/{number}/stage": LOOK,
        "PUT /v1/models/{name}/versions/{number}/stage": (PUBLISH,),
        # The handler also requires the scope that the stage defines for its approvals.
        "POST /v1/models/{name}/versions/{number}/approvals": LOOK,
        "DELETE /v1/models/{name}/versions/{number}/approvals/{stage}": LOOK,
        "PATCH /v1/models/{name}/policy": (PUBLISH,),
        "POST /v1/models/{name}/retention": (PUBLISH,),
        "GET /v1/models/{name}/aliases": LOOK,
        "GET /v1/models/{name}/aliases/{alias}": LOOK,
        "PUT /v1/models/{name}/aliases/{alias}": (PUBLISH,),
        "DELETE /v1/models/{name}/aliases/{alias}": (PUBLISH,),
        "GET /v1/models/{name}/versions/{number}/card": LOOK,
        "PUT /v1/models/{name}/versions/{number}/card": (PUBLISH,),
        "DELETE /v1/models/{name}/versions/{number}/card": (PUBLISH,),
        "GET /v1/models/{name}/versions/{number}/verification": LOOK,
        "POST /v1/models/{name}/versions/{number}/verification": (PUBLISH,),
        "GET /v1/models/{name}/versions/{number}/verification/task": (INTERNAL,),
        "PUT /v1/models/{name}/versions/{number}/verification/result": (INTERNAL,),
        "GET /v1/models/{name}/versions/{number}/baseline": LOOK,
        "PUT /v1/models/{name}/versions/{number}/baseline": (PUBLISH,),
        "DELETE /v1/models/{name}/versions/{number}/baseline": (PUBLISH,),
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
        "POST /v1/endpoints/{name}/rollout": (PUBLISH,),
        "POST /v1/endpoints/{name}/rollout/promote": (PUBLISH,),
        "POST /v1/endpoints/{name}/rollout/pause": (PUBLISH,),
        "POST /v1/endpoints/{name}/rollout/resume": (PUBLISH,),
        # Only Tidegate's services may make this call, because the call can promote a canary.
        "POST /v1/endpoints/{name}/rollout/progress": (INTERNAL,),
        "PUT /v1/endpoints/{name}/shadow": (PUBLISH,),
        "DELETE /v1/endpoints/{name}/shadow": (PUBLISH,),
        "POST /v1/endpoints/{name}/experiment": (PUBLISH,),
        "POST /v1/endpoints/{name}/experiment/stop": (PUBLISH,),
        "POST /v1/endpoints/{name}/experiment/winner": (PUBLISH,),
        "POST /v1/endpoints/{name}/experiment/complete": (INTERNAL,),
        "GET /v1/desired-state": LOOK,
        "GET /v1/intention": LOOK,  # the older name of /v1/desired-state
        "POST /v1/deploy": (PUBLISH,),
        "POST /v1/apply": (PUBLISH,),
        "POST /v1/apply/dry-run": (PUBLISH,),
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
        "GET /v1/usage/quota": (INTERNAL,),
        "GET /v1/usage/{principal}/quota": (INTERNAL,),
    }
)

ROUTER = RoutePermissions(
    _OWN
    | {
        "GET /v1/routes": (OPERATE,),
        "GET /v1/rollouts/{name}": LOOK,
        "GET /v1/experiments/{name}": LOOK,
        "GET /v1/top": LOOK,
        "GET /v1/history/{name}": LOOK,
        "GET /v1/diagnosis": LOOK,
        "GET /v1/slo": LOOK,
        "GET /v1/shadows/{name}": LOOK,
        "GET /v1/quality": LOOK,
        "GET /v1/quality/{name}": LOOK,
        "GET /v1/drift": LOOK,
        "GET /v1/drift/{name}": LOOK,
        "GET /v1/drift/{name}/rows": (OPERATE,),  # not PUBLISH, because the rows contain callers' values
        "POST /v1/drift/{name}/rebase": (PUBLISH,),
        "GET /v1/alerts": LOOK,
        "GET /v1/alerts/history": LOOK,
        "GET /v1/alerts/rules": LOOK,
        "GET /v1/alerts/prometheus": LOOK,
        "GET /v1/alerts/messages": (OPERATE,),
        "GET /v1/alerts/silences": (OPERATE,),
        "POST /v1/alerts/silences": (OPERATE,),
        "DELETE /v1/alerts/silences/{id}": (OPERATE,),
        "GET /v1/alerts/receivers": (OPERATE,),
        "PUT /v1/alerts/receivers/{name}": (OPERATE,),
        "DELETE /v1/alerts/receivers/{name}": (OPERATE,),
        "POST /v1/alerts/test": (OPERATE,),
        "GET /v1/exceptions": (OPERATE,),
        "GET /v1/dead": (OPERATE,),
        "GET /v1/dead/{id}": (OPERATE,),
        "GET /v1/dead/{id}/payload": (OPERATE,),
        "POST /v1/dead/{id}/replay": (OPERATE,),
        "POST /v1/dead/replay": (OPERATE,),
        "DELETE /v1/dead/{id}": (OPERATE,),
        "GET /v1/ledger": (OPERATE,),
        # INFER is enough for the caller's own secret. For the secret of another principal, the handler
        # requires the scope admin.
        "GET /v1/webhooks/secret": (INFER,),
    }
)

AUTOSCALER = RoutePermissions(
    _OWN
    | {
        "GET /prometheus/workers": (METRICS, OPERATE),
        "GET /v1/settings/workers": (OPERATE,),
        # Not only for operators: `tidegate deploy` reads the status while it waits. If the Deployment does
        # not become ready, the command also reads the route `/v1/deployments/{name}/why`.
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
        # The publisher of a model may read what the model writes to its log.
        "GET /v1/logs/{name}": LOOK,
        "GET /v1/requests/{id}/logs": (OPERATE,),
        "GET /v1/hosts": (OPERATE,),
        "PUT /v1/hosts/{host}/cordon": (OPERATE,),
        "DELETE /v1/hosts/{host}/cordon": (OPERATE,),
        "GET /v1/replicas": (OPERATE,),
        "POST /v1/replicas/{replica}/drain": (OPERATE,),
        "GET /v1/warm": (OPERATE,),
        # Not only for operators: `tidegate deploy` shows the step of the verification while it waits.
        "GET /v1/verifications": LOOK,
        "GET /v1/decisions": (OPERATE,),
        "GET /v1/policy": (OPERATE,),
        "GET /v1/costs": (OPERATE,),
        "GET /v1/prices": (OPERATE,),
        "POST /v1/replay": (OPERATE,),
        "POST /v1/replay/verify": (OPERATE,),
    }
)

# Metrics need no credential here, because a worker shows only those of its own model.
WORKER = RoutePermissions(_HEALTH | {"GET /metrics": (OPEN,)})

_MODEL = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")

GATEWAY = RoutePermissions(
    _OWN
    | {
        # The page shows what Tidegate is. If the request has a credential, it also lists the models that the
        # caller may use.
        "GET /": (OPEN,),
        "HEAD /": (OPEN,),  # Ollama's command line calls this to check that a server is there
        "GET /v2/health/live": (OPEN,),
        "GET /v2/health/ready": (OPEN,),
        "GET /v2": (INFER,),
        "GET /v2/models": (INFER,),
        "GET /v2/models/stats": (INFER,),
        "POST /v2/repository/index": (INFER,),
        "POST /v2/repository/models/{model}/load": (OPERATE,),
        "POST /v2/repository/models/{model}/unload": (OPERATE,),
    }
    # A caller sees and uses only the shared memory regions that it registered.
    | {
        f"{method} /v2/{kind}sharedmemory{region}/{action}": (INFER,)
        for kind in ("system", "cuda")
        for method, region, action in (
            ("GET", "", "status"),
            ("GET", "/region/{name}", "status"),
            ("POST", "/region/{name}", "register"),
            ("POST", "/region/{name}", "unregister"),
            ("POST", "", "unregister"),
        )
    }
    | {
        f"{method} {path}": (INFER,)
        for method in ("GET", "POST")
        for path in ("/v2/logging", "/v2/trace/setting", "/v2/models/{model}/trace/setting")
    }
    | {f"GET {model}{part}": (INFER,) for model in _MODEL for part in ("", "/config", "/stats")}
    # PUBLISH is enough as well, because `tidegate deploy` repeats this call until the model is ready.
    | {f"GET {model}/ready": (INFER, PUBLISH) for model in _MODEL}
    | {
        f"POST {model}/{part}": (INFER,)
        for model in _MODEL
        for part in ("infer", "generate", "generate_stream")
    }
    # OpenAI's API.
    | {
        f"POST /v1/{part}": (INFER,)
        for part in ("chat/completions", "completions", "embeddings", "responses")
    }
    | {"GET /v1/models": (INFER,), "GET /v1/models/{model}": (INFER,)}
    # The APIs of TensorFlow Serving and KServe V1. They share `/v1/models/{model}` with OpenAI's API.
    | {
        f"POST /v1/models/{{model}}{part}:{action}": (INFER,)
        for part in ("", "/versions/{version}", "/labels/{label}")
        for action in ("predict", "classify", "regress")
    }
    | {
        f"GET /v1/models/{{model}}{part}": (INFER,)
        for part in ("/metadata", "/versions/{version}", "/versions/{version}/metadata")
    }
    | {f"GET /v1/models/{{model}}/labels/{{label}}{part}": (INFER,) for part in ("", "/metadata")}
    # TorchServe's API. POST and DELETE of /models change nothing. Their answer names the Tidegate command to
    # use instead.
    | {f"POST /predictions/{{model}}{part}": (INFER,) for part in ("", "/{version}")}
    | {f"GET /models{part}": (INFER,) for part in ("", "/{model}", "/{model}/{version}")}
    | {"POST /models": (INFER,), "DELETE /models/{model}": (INFER,)}
    | {f"PUT /models/{{model}}{part}": (OPERATE,) for part in ("", "/{version}")}
    # SageMaker's and Azure ML's APIs.
    | {
        f"POST {path}": (INFER,)
        for path in (
            *("/invocations", "/models/{model}/invoke", "/endpoints/{model}/invocations"),
            *("/endpoints/{model}/async-invocations", "/endpoints/{model}/score"),
        )
    }
    | {"GET /ping": (OPEN,)}
    # TGI's API. The path may name the model.
    | {f"POST {path}": (INFER,) for path in ("/", "/generate", "/generate_stream", "/tgi/{model}")}
    | {
        f"POST /tgi/{{model}}/{part}": (INFER,)
        for part in ("generate", "generate_stream", "v1/chat/completions", "v1/completions", "v1/embeddings")
    }
    | {
        "GET /info": (INFER,),
        "GET /tgi/{model}/info": (INFER,),
        "GET /health": (OPEN,),
        "GET /tgi/{model}/health": (INFER,),
    }
    # Ollama's API. The routes from pull to blobs change nothing. Their answer names the Tidegate command to
    # use instead.
    | {f"POST /api/{part}": (INFER,) for part in ("chat", "generate", "embed", "embeddings", "show")}
    | {f"POST /api/{part}": (INFER,) for part in ("pull", "push", "create", "copy", "blobs/{digest}")}
    | {"DELETE /api/delete": (INFER,), "HEAD /api/blobs/{digest}": (INFER,)}
    | {f"GET /api/{part}": (INFER,) for part in ("tags", "ps", "version")}
    # The parts of vLLM's API that OpenAI's API lacks.
    | {
        f"POST /{part}": (INFER,)
        for part in (
            *("tokenize", "detokenize", "pooling", "score", "v1/score"),
            *("rerank", "v1/rerank", "v2/rerank"),
        )
    }
    | {"GET /version": (INFER,)}
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
        "POST /v1/batches/{id}/cancel": (INFER,),
        "GET /v1/files": (INFER,),
        "POST /v1/files": (INFER,),
        "GET /v1/files/{id}": (INFER,),
        "DELETE /v1/files/{id}": (INFER,),
        "GET /v1/files/{id}/content": (INFER,),
        "GET /v1/webhooks/secret": (INFER,),
        # With INFER, a key may send feedback on the answers to its own requests. With OPERATE, it may send
        # feedback on all answers.
        "POST /v1/feedback": (INFER, OPERATE),
    }
    | {
        # The gateway accepts any credential here. The service behind the proxy checks the scopes with its own
        # table.
        f"{method} /api/{{service}}/{{rest:path}}": (ANY,)
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
    }
)

# The services behind the gateway's proxy.
CONTROL: dict[str, RoutePermissions] = {"registry": REGISTRY, "router": ROUTER, "autoscaler": AUTOSCALER}
SERVICES: dict[str, RoutePermissions] = CONTROL | {"gateway": GATEWAY, "worker": WORKER}
