"""``python -m benchmarks.access_matrix``: call every route of every service with every credential.

The expected outcomes are those of ``tidegate/kernel/protocol/permissions.py``. The calls go to a running
stack. They are invalid on purpose (unknown names, empty bodies), so an allowed call changes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tidegate.kernel.protocol import permissions, replica_token
from tidegate.kernel.protocol.access import METRICS, REPLICA, SCOPES, Principal, metrics_token
from tidegate.kernel.protocol.permissions import ANY, INTERNAL, LOOK, OPEN, SERVICES, Scopes

AT_ONCE = 16
PATIENCE_S = 30.0
FILLED = {"number": "1", "kind": "system", "service": "registry", "rest:path": "region/x/register"}
# An invalid query: a call that passes the access check fails because of it.
QUERIES = {"PUT /v1/artifacts": "?sha256=none"}


@dataclass(frozen=True, slots=True)
class Credential:
    """The headers that a caller sends, and its scopes at the services that know it."""

    name: str
    header: str | None
    scopes: Mapping[str, frozenset[str]] = field(default_factory=dict)
    is_service: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A route, and how it is called: at the service itself or through the gateway (``/api/<service>``)."""

    service: str
    line: str
    scopes: Scopes
    by_gateway: bool = False

    @property
    def method(self) -> str:
        """The HTTP method."""
        return self.line.partition(" ")[0]

    def path(self, sha256: str) -> str:
        """Return the path to call, with names that do not exist; only the artifact ``sha256`` exists."""
        filled = FILLED | {"sha256": sha256}
        path = re.sub(r"\{([^}]+)\}", lambda m: filled.get(m[1], "none-such"), self.line.partition(" ")[2])
        path += QUERIES.get(self.line, "")
        return f"/api/{self.service}{path}" if self.by_gateway else path


@dataclass(frozen=True, slots=True)
class Cell:
    """One call with one credential: ``expected``: ``in``, ``401`` or ``403``; ``status``: the response's."""

    call: Call
    credential: str
    expected: str
    status: int

    @property
    def seen(self) -> str:
        """The outcome in the words of ``expected``."""
        return str(self.status) if self.status in (401, 403) else "in"

    @property
    def well(self) -> bool:
        """Return True if the outcome is as expected and the call did not fail otherwise."""
        return self.seen == self.expected and (self.status < 500 or self.status == 503)


def calls() -> Iterator[Call]:
    """Yield every route of every service, at the service itself and through the gateway."""
    for service, table in SERVICES.items():
        for line, scopes in table.table.items():
            if ANY in scopes:
                continue  # the routes that the gateway forwards are below, one by one
            yield Call(service, line, scopes)
            if service in permissions.CONTROL:
                yield Call(service, line, scopes, by_gateway=True)


def expected(call: Call, credential: Credential) -> str:
    """Return the outcome that the table of permissions expects: ``in``, ``401`` or ``403``."""
    if call.scopes == (OPEN,) and not call.by_gateway:
        return "in"
    held = credential.scopes.get("gateway" if call.by_gateway else call.service)
    if held is None:
        return "401"
    if INTERNAL in call.scopes:
        return "in" if credential.is_service else "403"
    scopes = LOOK if call.scopes == (OPEN,) else call.scopes
    who = Principal("", "", held)
    return "in" if any(who.may(scope) for scope in scopes) else "403"


class Keys:
    """Creates keys in a running registry, and waits until the gateway knows them."""

    def __init__(self, registry: str, gateway: str, token: str) -> None:
        self._registry = httpx.Client(base_url=registry, headers=_bearer(token), timeout=30, trust_env=False)
        self._gateway = httpx.Client(base_url=gateway, timeout=30, trust_env=False)
        self.made: list[str] = []

    def close(self) -> None:
        """Revoke all keys that were created."""
        for id_ in self.made:
            self._registry.delete(f"/v1/keys/{id_}")
        self._registry.close()
        self._gateway.close()

    def make(self, name: str, scopes: Sequence[str], **fields: object) -> tuple[str, str]:
        """Create a key. Return its id and the key."""
        body = {"name": f"matrix {name}", "scopes": list(scopes), **fields}
        made = self._registry.post("/v1/keys", json=body).raise_for_status().json()
        self.made.append(made["id"])
        return str(made["id"]), str(made["key"])

    def revoke(self, id_: str) -> None:
        """Revoke a key."""
        self._registry.delete(f"/v1/keys/{id_}").raise_for_status()

    def wait(self, key: str, *, good: bool) -> None:
        """Wait until the gateway accepts a key, or until it rejects it. Raise TimeoutError."""
        end = time.monotonic() + PATIENCE_S
        while (self._gateway.get("/v2/models", headers=_bearer(key)).status_code != 401) is not good:
            if time.monotonic() > end:
                raise TimeoutError("the gateway does not apply the change of a key")
            time.sleep(0.02)


def credentials(keys: Keys, service_token: str, replica: str) -> dict[str, Credential]:
    """Make and return every kind of credential, by name. ``replica``: a running one."""
    _, expired = keys.make("expired", SCOPES, ttl_s=1.0)
    id_, revoked = keys.make("revoked", SCOPES)
    known = {scope: keys.make(scope, [scope])[1] for scope in SCOPES}
    for key in (revoked, *known.values()):
        keys.wait(key, good=True)
    keys.revoke(id_)
    for key in (revoked, expired):
        keys.wait(key, good=False)
    everything, counts = frozenset(SCOPES), frozenset({METRICS})
    everywhere = (*permissions.CONTROL, "gateway")
    found = [
        Credential("none", None),
        Credential("wrong", "Bearer tg_none_wrong"),
        Credential("expired", f"Bearer {expired}"),
        Credential("revoked", f"Bearer {revoked}"),
        *(Credential(s, f"Bearer {key}", {"gateway": frozenset({s})}) for s, key in known.items()),
        Credential(
            "metrics token", f"Bearer {metrics_token(service_token)}", dict.fromkeys(everywhere, counts)
        ),
        Credential(
            "service token", f"Bearer {service_token}", dict.fromkeys(everywhere, everything), is_service=True
        ),
        Credential(
            "replica token",
            f"Bearer {replica_token.issue(service_token, replica)}",
            {"registry": frozenset({REPLICA})},
        ),
    ]
    return {each.name: each for each in found}


async def tried(urls: Mapping[str, str], credentials: Mapping[str, Credential], sha256: str) -> list[Cell]:
    """Make every call with every credential. ``urls``: the address of each service.

    ``sha256``: the artifact of the replica whose token is used.
    """
    limit = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:

        async def one(call: Call, credential: Credential) -> Cell:
            headers = {} if credential.header is None else {"Authorization": credential.header}
            body = b"" if call.method in {"POST", "PUT", "PATCH"} else None
            base = urls["gateway" if call.by_gateway else call.service]
            async with limit:
                answer = await client.request(
                    call.method, base + call.path(sha256), headers=headers, content=body
                )
            return Cell(call, credential.name, expected(call, credential), answer.status_code)

        return list(await asyncio.gather(*(one(c, k) for c in calls() for k in credentials.values())))


def undeclared(urls: Mapping[str, str]) -> list[str]:
    """Return the routes that the services' OpenAPI documents have and the table does not."""
    found = []
    for service in (*permissions.CONTROL, "gateway"):
        document = httpx.get(f"{urls[service]}/openapi.json", timeout=30, trust_env=False).json()
        named = {_nameless(line) for line in SERVICES[service].table}
        for path, item in document["paths"].items():
            lines = {_nameless(f"{method.upper()} {path}") for method in item}
            found += [f"{service} {line}" for line in sorted(lines - named)]
    return found


def _nameless(line: str) -> str:
    return re.sub(r"\{[^}]+\}", "{}", line)


def as_markdown(cells: Sequence[Cell]) -> str:
    """Return the matrix as a table: the status of each call, and the expected outcome if it differs."""
    names = list(dict.fromkeys(cell.credential for cell in cells))
    rows: dict[Call, dict[str, Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.call, {})[cell.credential] = cell
    head = ["service", "by", "route", "opened by", *names]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for call, by_name in rows.items():
        door = "gateway" if call.by_gateway else "itself"
        told = [call.service, door, f"`{call.line}`", ", ".join(call.scopes)]
        lines.append(" | ".join(told + [_shown(by_name.get(name)) for name in names]))
    return "\n".join(f"| {line} |" for line in lines)


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""  # only some of the cells are shown
    return str(cell.status) if cell.well else f"**{cell.status}, expected {cell.expected}**"


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def main() -> int:
    """Start a stack with a model, make all calls, print the table. Return 1 if a cell is not as expected."""
    from benchmarks import stack

    parser = argparse.ArgumentParser(prog="python -m benchmarks.access_matrix")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    out = parser.parse_args().out
    with stack.tidegate("access-matrix", {"TIDEGATE_AUTH": "required"}) as running:
        running.deploy(stack.MODELS / "echo" / "model.py", "echo")
        token = (running.state / "token").read_text().strip()
        ports = {s: running.env[f"TIDEGATE_{s.upper()}_PORT"] for s in (*permissions.CONTROL, "gateway")}
        urls = {service: f"http://127.0.0.1:{port}" for service, port in ports.items()}
        replica, urls["worker"], sha256 = running_replica(urls, token)
        keys = Keys(urls["registry"], urls["gateway"], token)
        try:
            made = credentials(keys, token, replica)
            began = time.monotonic()
            found = asyncio.run(tried(urls, made, sha256))
            took_s = time.monotonic() - began
        finally:
            keys.close()
        missing = undeclared(urls)
    table = as_markdown(found)
    wrong = [cell for cell in found if not cell.well]
    print(table)
    print(f"\n{len(found)} calls in {took_s:.1f} s, {len(found) - len(wrong)} as expected", end="; ")
    print(f"not in the table: {', '.join(missing) or 'none'}")
    if out is not None:
        out.write_text(table + "\n")
    return 1 if wrong or missing else 0


def running_replica(urls: Mapping[str, str], token: str) -> tuple[str, str, str]:
    """Return a replica of the stack: its name, its address, and the sha256 of its artifact.

    Wait until one reports.
    """
    end = time.monotonic() + PATIENCE_S
    while True:
        found = httpx.get(f"{urls['autoscaler']}/prometheus/workers", headers=_bearer(token), trust_env=False)
        if found.status_code == 200 and found.json():
            break
        if time.monotonic() > end:
            raise TimeoutError("no worker reports")
        time.sleep(0.1)
    worker = found.json()[0]
    intention = httpx.get(f"{urls['registry']}/v1/intention", headers=_bearer(token), trust_env=False).json()
    return (
        worker["labels"]["replica"],
        f"http://{worker['targets'][0]}",
        intention["versions"][0]["artifact_sha256"],
    )


if __name__ == "__main__":
    sys.exit(main())
