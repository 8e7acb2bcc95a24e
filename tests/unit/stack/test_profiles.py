"""The edge profile: which processes a stack has, and what differs in their environment."""

from __future__ import annotations

import json

import pytest

from services.autoscaler.settings import AutoscalerSettings
from services.gateway.settings import GatewaySettings
from services.registry.settings import RegistrySettings
from services.router.settings import RouterSettings
from services.worker.settings import WorkerSettings
from tidegate.kernel.settings.base import COMPUTED, SOURCES, Settings
from tidegate.stack import profiles
from tidegate.stack.memory import PartMemory, total
from tidegate.stack.plan import plan

pytestmark = pytest.mark.unit

EDGE = Settings(profile="edge", service_token="t")
SERVICES = (AutoscalerSettings, GatewaySettings, RegistrySettings, RouterSettings, WorkerSettings)


def test_registry_router_and_autoscaler_are_one_process():
    children = {child.name: child for child in plan(EDGE, {})}
    assert set(children) == {"epmd", "rabbitmq", "valkey", "valkey-jobs", "migrate", "control", "gateway"}
    control, gateway = children["control"], children["gateway"]
    assert control.argv[-1] == "services.control"
    assert [port.number for port in control.ports] == [8010, 8020, 8030]
    assert control.after_stop[-1] == "sweep"
    assert set(control.after) <= set(children)
    assert "control" in gateway.after
    assert set(gateway.after) <= set(children)
    assert control.stop_order < gateway.stop_order


def test_what_is_not_needed_is_off_unless_the_user_says_otherwise():
    environ = {"TIDEGATE_MAX_BODY_BYTES": "1000", "MALLOC_ARENA_MAX": "4"}
    env = next(child for child in plan(EDGE, environ) if child.name == "gateway").env
    assert env["TIDEGATE_PROFILE"] == "edge"
    assert env["TIDEGATE_MONITORING"] == "off"
    assert env["TIDEGATE_MAX_BODY_BYTES"] == "1000"
    assert env["MALLOC_ARENA_MAX"] == "4"
    assert env["TIDEGATE_JOB_TTL_S"] == str(7.0 * 86_400)
    assert json.loads(env[SOURCES])["TIDEGATE_HTTP_CONNECTIONS"] == COMPUTED
    again = next(child for child in plan(Settings.of(env), env) if child.name == "gateway").env
    assert {name: again[name] for name in env} == dict(env), "the supervisor plans the same"


def test_every_setting_of_the_profile_exists_and_is_valid():
    given = profiles.defaults(EDGE, {})
    known = {f"TIDEGATE_{name.upper()}" for each in SERVICES for name in each.model_fields}
    assert set(given) <= known
    for each in SERVICES:
        each.of({**given, "TIDEGATE_SERVICE_TOKEN": "t"})


def test_the_default_profile_changes_nothing():
    plain = Settings(service_token="t")
    assert profiles.defaults(plain, {}) == profiles.process_environment(plain, {}) == {}
    names = {child.name for child in plan(plain, {})}
    assert {"registry", "router", "autoscaler"} <= names
    assert "control" not in names


def test_the_parts_sum_up():
    assert total([PartMemory("a", 1, 10, 20), PartMemory("b", 2, 5, 9)]) == 15
