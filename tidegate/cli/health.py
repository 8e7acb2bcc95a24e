"""The report of ``tidegate status``. It also works if some services do not answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tidegate.cli import output
from tidegate.cli.api import Control, Doc, Service, settings
from tidegate.cli.stack_memory import memory_of, show_memory
from tidegate.kernel.errors import TidegateError

STARTED_BY_STACK = ("rabbitmq", "valkey", "valkey-jobs", "prometheus")
NOT_ALLOWED = "not allowed with this key"


@dataclass(slots=True)
class Overview:
    """The state of the services, endpoints and deployments. A list that could not be read is None."""

    services: list[Doc]
    stack: Doc
    endpoints: list[Doc] | None = None
    deployments: list[Doc] | None = None
    wanted: list[Doc] | None = None
    problems: list[str] = field(default_factory=list)
    memory: Doc | None = None

    @classmethod
    def look(cls) -> Overview:
        """Ask every service for its state, and return the overview.

        If a service refuses the API key, do not read the lists of endpoints and deployments.
        """
        from tidegate import stack

        found = settings()
        plane = Control(found)
        state = stack.state(found)
        record = state.as_dict()
        asked = (plane.gateway, plane.registry, plane.router, plane.autoscaler)
        overview = cls([_health(service) for service in asked], record, memory=memory_of(found, state))
        overview.services[0]["grpc"] = found.gateway_grpc_target
        overview.problems += dict.fromkeys(s.pop("refusal") for s in overview.services if "refusal" in s)
        if overview.forbidden:
            return overview
        overview.endpoints = overview._ask(lambda: plane.registry.pages("/v1/endpoints"))
        overview.wanted = overview._ask(lambda: plane.registry.pages("/v1/deployments"))
        overview.deployments = overview._ask(lambda: plane.autoscaler.items("/v1/deployments"))
        return overview

    @property
    def complete(self) -> bool:
        """Return True if every service answered and every list could be read."""
        return not self.problems and all(s["state"] != "no answer" for s in self.services)

    @property
    def forbidden(self) -> bool:
        """Return True if at least one service refused the API key."""
        return any(s["state"] == NOT_ALLOWED for s in self.services)

    def _ask(self, call: Callable[[], list[Doc]]) -> list[Doc] | None:
        try:
            return call()
        except TidegateError as error:
            if error.message not in self.problems:
                self.problems.append(error.message)
            return None

    def document(self) -> Doc:
        """Return the document for ``--json``."""
        return {
            "services": self.services,
            "stack": self.stack,
            "endpoints": self.endpoints,
            "deployments": self.deployments,
            "problems": self.problems,
            "memory": self.memory,
        }

    def show(self) -> None:
        """Print the report."""
        output.table([(s["name"], s["state"], s["url"], s["detail"]) for s in self._rows()], _SERVICE)
        if self.endpoints:
            output.line()
            output.table(
                [(e["name"], shares(e["targets"]), shares(e["previous"])) for e in self.endpoints], _ENDPOINT
            )
        if self.deployments:
            output.line()
            versions = {d["name"]: f"{d['model']} {d['version']}" for d in self.wanted or ()}
            rows = [deployment_row(d, versions.get(d["deployment"])) for d in self.deployments]
            output.table(rows, _DEPLOYMENT)
        elif self.deployments is not None:
            output.line()
            output.say("Nothing is deployed. Deploy a model: tidegate deploy model.onnx")
        if self.memory is not None:
            output.line()
            show_memory(self.memory)
        for problem in self.problems:
            output.say(problem, style="red")

    def _rows(self) -> list[Doc]:
        servers = [c for c in self.stack["children"] if c["name"] in STARTED_BY_STACK]
        told = [
            {
                "name": c["name"],
                "state": c["state"],
                "url": f"port {c['ports'][0]}" if c["ports"] else "",
                "detail": c["detail"],
            }
            for c in servers
        ]
        return [*map(self._with_grpc, self.services), *told]

    @staticmethod
    def _with_grpc(service: Doc) -> Doc:
        grpc = service.get("grpc")
        return {**service, "url": f"{service['url']}, gRPC {grpc}"} if grpc else service


# An entry of the list `ended` in a Deployment's status has this ``cause`` if only the model died. Its replica
# still runs.
MODEL_DIED = "model died"
REMEMBERED_S = 600.0
_SERVICE = ("service", "state", "where", "detail")
_ENDPOINT = ("endpoint", "targets", "serves until the targets are ready")
_DEPLOYMENT = (
    "deployment", "model", "state", "ready", "desired", "runs on", "queue", "in/s", "detail"
)  # fmt: skip


def _health(service: Service) -> Doc:
    """Return a service's state as a document: ready, not ready, not allowed, or no answer.

    If the service does not allow the key, the field ``refusal`` contains the reason. For the other states,
    the field ``detail`` contains the reason, if there is one.
    """
    told = {"name": service.name, "url": service.url, "state": "ready", "detail": ""}
    try:
        status, body = service.health()
    except TidegateError as error:
        return {
            **told,
            "state": "no answer",
            "detail": "" if error.reason == "unreachable" else error.message,
        }
    if status in (401, 403):
        return {**told, "state": NOT_ALLOWED, "refusal": str(body.get("error") or f"answered {status}")}
    if status != 200:
        problems = body.get("problems") or {}
        detail = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        return {**told, "state": "not ready", "detail": detail}
    return told


def shares(targets: list[Doc]) -> str:
    """Return an endpoint's targets: ``digits-v2`` for one, ``a 90%, b 10%`` for several."""
    total = sum(target["weight"] for target in targets)
    if len(targets) == 1 or not total:
        return ", ".join(str(target["deployment"]) for target in targets)
    return ", ".join(f"{t['deployment']} {100 * t['weight'] / total:.3g}%" for t in targets)


def deployment_row(status: Doc, version: str | None) -> tuple[Any, ...]:
    """Return a deployment's row in the report, with its worst problem as the detail.

    Without a problem, the detail is the last death of the model, or else a message of a replica.
    """
    wrong = [c for c in status["conditions"] if not c["ok"]]
    failed = [c for c in wrong if c["type"] == "Loaded"]
    asleep = any(c["type"] == "Ready" and c["reason"] in {"Asleep", "Paused"} for c in status["conditions"])
    state = "failed" if failed else "asleep" if asleep else "starting" if wrong else "ready"
    if status["ready"] and state == "starting":
        state = "ready"
    sick = [c for c in wrong if c["type"] == "Healthy"]
    shown = (failed or sick or wrong)[:1]
    # Show only the first line, because Triton's message can be a traceback. `status --json` shows all lines.
    detail = (
        f"{shown[0]['reason']}: {shown[0]['message'].strip().partition(chr(10))[0]}"
        if shown
        else last_death(status, time.time()) or remark(status)
    )
    return (
        status["deployment"],
        version,
        state,
        status["ready"],
        status["desired"],
        "; ".join(status.get("devices", ())),
        status["queue"],
        status["arrival_rate"],
        detail,
    )


def remark(status: Doc) -> str:
    """Return the first message of a ready replica; empty if no ready replica has a message."""
    replicas = status.get("replicas") or ()
    return next((r["message"] for r in replicas if r["state"] == "ready" and r.get("message")), "")


def last_death(status: Doc, now: float) -> str:
    """Describe the last death of a model that is running again.

    Return "" if no model died in the last ten minutes.
    """
    died = [end for end in status.get("ended", ()) if end["cause"] == MODEL_DIED]
    if not died or now - died[0]["at"] > REMEMBERED_S:
        return ""
    ago = max(0.0, now - died[0]["at"])
    return f"serves again; {ago:.0f} s ago {died[0]['message']}"
