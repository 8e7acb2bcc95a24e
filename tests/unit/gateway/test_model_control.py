"""Loading and unloading by Triton's API: which Deployments wake and stop, who may, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from services.gateway.application import model_control as room
from services.gateway.application.inference.beside_body import BesideBody
from services.gateway.application.model_control import ModelControl
from services.gateway.domain import server_settings
from services.gateway.domain.replica_fleet import ReplicaFleet
from services.gateway.domain.routing import RouteTable, parse_table
from services.gateway.domain.shared_memory import UsesRegions
from tests.integration.gateway.process import make_table
from tidegate.kernel.errors import (
    BadRequest,
    Conflict,
    DeadlinePassed,
    Forbidden,
    ModelFailed,
    NotFound,
    TidegateError,
    Unauthorized,
    Unavailable,
)
from tidegate.kernel.protocol.access import ANONYMOUS, INFER, OPERATE, Principal
from tidegate.kernel.service import caller

pytestmark = pytest.mark.unit

OPERATOR = Principal("o", "operator", frozenset({OPERATE}))
USER = Principal("u", "user", frozenset({INFER}), frozenset({"digits"}))


class World:
    """The gateway's view, and the operations, which change it at once."""

    def __init__(self) -> None:
        self.fleets: dict[str, ReplicaFleet] = {}
        self.done: list[tuple[str, str, str]] = []
        self.woken: list[str] = []
        self.found = parse_table(make_table("d-1", wakeable=False))
        self.comes_up = ReplicaFleet(1)

    def table(self) -> RouteTable:
        return self.found

    def find(self, model: str, version: str) -> Any:
        return self.found.find(model, version)

    def fleet(self, name: str) -> ReplicaFleet:
        return self.fleets.get(name, ReplicaFleet())

    def wake(self, route: Any) -> None:
        self.woken.append(route.name)
        self.fleets[route.name] = self.comes_up

    async def pause(self, deployment: str) -> None:
        self._note("pause", deployment, wakeable=False)
        self.fleets[deployment] = ReplicaFleet(0)

    async def hold(self, deployment: str, replicas: int) -> None:
        self._note(f"hold {replicas}", deployment, wakeable=bool(replicas))
        self.fleets[deployment] = ReplicaFleet(replicas)

    async def resume(self, deployment: str) -> None:
        self._note("resume", deployment, wakeable=True)

    def _note(self, what: str, deployment: str, *, wakeable: bool) -> None:
        self.done.append((what, deployment, caller.current.get().principal.id))
        self.found = parse_table(make_table(deployment, wakeable=wakeable))


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def control(world: World) -> Callable[..., ModelControl]:
    core: Any = world
    return lambda allowed="operate": ModelControl(core, world, allowed)


async def test_a_load_wakes_a_paused_model_for_its_caller(world: World, control: Any):
    await control().load("digits", {}, OPERATOR)
    assert world.done == [("resume", "d-1", "o")]
    assert world.woken == ["d-1"]
    await control().load("digits", {}, OPERATOR)
    assert len(world.done) == 1, "it is loaded"
    await control().unload("digits", OPERATOR)
    assert world.done[1:] == [("pause", "d-1", "o")]


async def test_a_model_is_scaled_for_its_caller(world: World, control: Any):
    await control().scale("digits", "", 3, OPERATOR, wait=True)
    assert world.done == [("hold 3", "d-1", "o")]
    with pytest.raises(NotFound):
        await control().scale("digits", "7", 3, OPERATOR, wait=False)
    with pytest.raises((Forbidden, Unauthorized)):
        await control().scale("digits", "", 3, USER, wait=False)
    assert len(world.done) == 1


async def test_a_model_that_does_not_load_says_why(world: World, control: Any, monkeypatch: Any):
    world.comes_up = ReplicaFleet(fault="no such file")
    with pytest.raises(ModelFailed, match="failed to load 'digits', no such file"):
        await control().load("digits", {}, OPERATOR)
    monkeypatch.setattr(room, "TABLE_S", -1.0)
    monkeypatch.setattr(world, "resume", _nothing)
    world.fleets.clear()
    world.found = parse_table(make_table("d-1", wakeable=False))
    with pytest.raises(Conflict, match="may not start a replica: see `tidegate why d-1`"):
        await control().load("digits", {}, OPERATOR)


async def test_a_load_waits_as_long_as_its_caller_wants(world: World, control: Any):
    world.comes_up = ReplicaFleet(0)
    with pytest.raises(DeadlinePassed, match=r"failed to load 'digits', it is not ready after 0.001 s"):
        await control().load("digits", {}, OPERATOR, 1.0)


async def _nothing(_: str) -> None:
    pass


@pytest.mark.parametrize(
    ("allowed", "principal", "refusal"),
    [
        ("operate", ANONYMOUS, Unauthorized),
        ("operate", USER, Forbidden),
        ("operate", OPERATOR, None),
        ("infer", ANONYMOUS, None),
        ("infer", USER, None),
        ("infer", replace(USER, endpoints=frozenset({"letters"})), Forbidden),
        ("infer", OPERATOR, None),
        ("off", OPERATOR, Unavailable),
    ],
)
async def test_who_may(world: World, control: Any, allowed: str, principal: Principal, refusal: Any):
    if refusal is None:
        await control(allowed).unload("digits", principal)
        acting = principal.id if principal.may(OPERATE) else "service"
        assert world.done == [("pause", "d-1", acting)]
        return
    with pytest.raises(TidegateError) as caught:
        await control(allowed).unload("digits", principal)
    assert type(caught.value) is refusal
    assert world.done == []


@pytest.mark.parametrize("given", [{"config": "{}"}, {"config": "{}", "file:1/model.py": "x"}])
async def test_a_load_brings_nothing(control: Any, given: dict[str, str]):
    with pytest.raises(BadRequest, match=r"failed to load 'digits', a load cannot include .*tidegate deploy"):
        await control().load("digits", given, OPERATOR)


async def test_an_unknown_model(control: Any):
    for call in (control().load("letters", {}, OPERATOR), control().unload("letters", OPERATOR)):
        with pytest.raises(NotFound, match=r"failed to (un)?load 'letters', failed to poll"):
            await call


async def test_a_deployment_of_two_endpoints_is_not_stopped_for_one(world: World, control: Any):
    endpoints = dict(world.found.endpoints)
    endpoints["other"] = replace(endpoints["digits"], name="other")
    world.found = RouteTable(("e", 2), endpoints)
    with pytest.raises(Conflict, match="the Deployment d-1 also serves 'other'"):
        await control().unload("digits", OPERATOR)


@pytest.mark.parametrize(
    ("level", "info", "verbose"), [("DEBUG", True, 1), ("INFO", True, 0), ("WARNING", False, 0)]
)
def test_log_settings(level: str, info: bool, verbose: int):
    found = server_settings.log_settings(level)
    assert (found["log_info"], found["log_verbose_level"]) == (info, verbose)
    server_settings.check_update(found, {"log_error": True}, "")
    with pytest.raises(BadRequest, match="cannot be changed over this API: ask"):
        server_settings.check_update(found, {"log_error": False}, "ask")
    assert server_settings.trace_settings(on=True)["trace_level"] == ["TIMESTAMPS"]


def test_headers_for_models():
    headers = {
        b"x-user": b"7",
        b"x-user-id": b"8",
        b"authorization": b"secret",
        b"cookie": b"c",
        b":path": b"/",
        b"x-amz-security-token": b"secret",
        b"sequence_id": b"7",
        b"triton_mine": b"1",
        b"priority": b"u=1",
    }
    assert BesideBody(None, "x-user").headers(headers).forwarded == {"x-user": "7"}
    assert BesideBody(None, ".*").headers(headers).forwarded == {"x-user": "7", "x-user-id": "8"}
    assert BesideBody().headers(headers).forwarded == {}
    with pytest.raises(UsesRegions, match=re.escape("'x': a shared memory region needs /infer")):
        BesideBody().memory(headers, USER, UsesRegions("input 'x'"))
