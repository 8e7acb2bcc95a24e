"""The table of routes and scopes: it names what the services have, and it matches whole routes."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import re
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from services.gateway.api.llm.error_forms import ERROR_FORMS
from tidegate.kernel.errors import Forbidden
from tidegate.kernel.protocol import access, permissions
from tidegate.kernel.protocol.permissions import CONTROL, LOOK, SERVICES, has_control_character
from tidegate.kernel.service import api_page
from tidegate.kernel.service.api import JsonRoute
from tidegate.kernel.service.caller import permit

pytestmark = pytest.mark.unit

# Served in front of the gateway's app, which does not have them: `services/gateway/api/inference/`.
IN_FRONT = {
    "POST /v1/jobs",
    "POST /v2/models/{}/infer",
    "POST /v2/models/{}/versions/{}/infer",
}


def nameless(route: str) -> str:
    """Return a route without the names of its parameters."""
    return re.sub(r"\{[a-z0-9_]+(:path)?\}", r"{\1}", route)


@pytest.fixture(scope="module")
def apps(tmp_path_factory) -> dict[str, Any]:
    """The app of every service, not started."""
    state = tmp_path_factory.mktemp("state")
    found = {}
    for name in CONTROL:
        room = importlib.import_module(f"services.{name}.app")
        settings = importlib.import_module(f"services.{name}.settings")
        chosen = getattr(settings, f"{name.capitalize()}Settings")(state_dir=state, service_token="t")
        found[name] = room.build(chosen)
    gateway = importlib.import_module("services.gateway.app")
    settings = importlib.import_module("services.gateway.settings")
    parts = gateway.build(settings.GatewaySettings(state_dir=state, service_token="t"))
    found["gateway"] = parts.app.app
    return found


def scopes_of(service: str, method: str, path: str) -> tuple[str, ...] | None:
    """Return the scopes of a route; None: there is none."""
    found = CONTROL[service].find(method, path)
    return None if found is None else found.scopes


def routes_of(app: FastAPI) -> set[tuple[str, str]]:
    """Return method and path of each route of an app."""
    contexts = list(iter_route_contexts(app.routes))
    return {(method, str(each.path)) for each in contexts for method in each.methods or ()}


@pytest.mark.parametrize("service", [*CONTROL, "gateway"])
def test_the_table_names_every_route_of_a_service_and_no_other(apps, service):
    shown = {("HEAD", "/openapi.json"), ("HEAD", "/docs")}  # the guard leaves GET
    there = {nameless(f"{method} {path}") for method, path in routes_of(apps[service]) - shown}
    named = {nameless(line) for line in SERVICES[service].table}
    assert named - (IN_FRONT if service == "gateway" else set()) == there


@pytest.mark.parametrize("service", [*CONTROL, "gateway"])
def test_guard_and_framework_read_the_same_route_in_a_path(apps, service):
    """Each path is tried with every word of the service's paths as a name."""
    table = SERVICES[service]
    words = {step for path in table.by_path for step in path.split("/") if step and "{" not in step}
    words -= {"infer"}  # what ends in it is in front of the app
    contexts = [each for each in iter_route_contexts(apps[service].routes) if each.path_regex is not None]
    for path in table.by_path:
        for word in sorted(words):
            called = re.sub(r"\{[^}]+\}", word, path)
            found = table.methods(called)
            assert found is not None, called
            for method in found[1]:
                if nameless(f"{method} {found[0]}") in IN_FRONT:
                    continue
                first = next(
                    each
                    for each in contexts
                    if each.path_regex.match(called) and method in (each.methods or ())
                )
                assert nameless(str(first.path)) == nameless(found[0]), (method, called)


def test_words_of_routes_are_names_like_others():
    for name in ("override", "settle", "quota", "table", "policy", "keys", "replicas"):
        for noun in ("deployments", "endpoints"):
            assert scopes_of("registry", "PUT", f"/v1/{noun}/{name}") == ("publish",), (noun, name)
        assert scopes_of("registry", "PUT", f"/v1/deployments/{name}/override") == ("operate",)
        assert scopes_of("registry", "POST", f"/v1/endpoints/{name}/settle") == ("operate",)
        assert scopes_of("registry", "POST", f"/v1/models/{name}/versions") == ("publish",)
        assert scopes_of("autoscaler", "PUT", f"/v1/deployments/{name}/replicas") == ("operate",)
    assert scopes_of("registry", "GET", "/v1/usage/quota/quota") == ("internal",)


@pytest.mark.parametrize(
    ("service", "method", "path", "scopes"),
    [
        ("registry", "GET", "/v1/models", ("publish", "operate")),
        ("registry", "HEAD", "/v1/artifacts/a", ("publish", "operate", "replica")),
        ("registry", "PUT", "/v1/replicas", ("internal",)),
        ("registry", "PUT", "/v1/artifacts", ("publish",)),
        ("registry", "PATCH", "/v1/deployments/a", ("publish",)),
        ("registry", "GET", "/v1/keys", ("admin",)),
        ("registry", "POST", "/v1/keys/a/rotate", ("admin",)),
        ("registry", "GET", "/v1/usage.csv", ("admin",)),
        ("registry", "GET", "/v1/keys/table", ("internal",)),
        ("router", "GET", "/v1/routes", ("operate",)),
        ("autoscaler", "GET", "/prometheus/workers", ("metrics", "operate")),
    ],
)
def test_the_scopes_of_some_routes(service, method, path, scopes):
    assert scopes_of(service, method, path) == scopes


@pytest.mark.parametrize(
    "path",
    [
        "/v1/../v1/keys", "//v1/keys", "/v1/keys/", "/v1/models/..", "/v1/models/.", "/v1/models//versions",
        "/v1/usageXcsv", "/v1/keys/a/b/c", "/v1", "/", "", "/v1/keysx",
    ],
)  # fmt: skip
def test_what_is_no_route(path):
    assert CONTROL["registry"].methods(path) is None


def test_other_methods_and_words():
    registry = CONTROL["registry"]
    assert registry.find("DELETE", "/v1/models") is None
    assert registry.find("get", "/v1/models") is None
    for service in SERVICES.values():
        for scopes in service.table.values():
            assert scopes
            words = {"infer", "publish", "operate", "admin", "metrics", "replica"}
            assert set(scopes) <= words or scopes in (
                (permissions.OPEN,),
                (permissions.ANY,),
                (permissions.INTERNAL,),
            )


def test_control_characters():
    assert not has_control_character("/v1/models/münchen")
    for bad in ("\x00", "\n", "\x1f", "\x7f"):
        assert has_control_character(f"/v1/models/a{bad}")


@pytest.mark.parametrize("service", [*CONTROL, "gateway"])
def test_the_openapi_document_is_whole(apps, service):
    document = apps[service].openapi()
    listed = {
        nameless(f"{method.upper()} {path}") for path, item in document["paths"].items() for method in item
    }
    hidden = {
        "GET /metrics",
        "GET /docs",
        "GET /openapi.json",
        "GET /v1/keys/table",
        "GET /v1/usage/{}/quota",
        "GET /v1/usage/quota",
    }
    named = {nameless(line).replace("{:path}", "{}") for line in SERVICES[service].table}
    assert listed == named - hidden
    text = json.dumps(document)
    referred = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert referred <= set(document["components"]["schemas"])
    ids = re.findall(r'"operationId": "([^"]+)"', text)
    assert len(ids) == len(set(ids)) == len(listed)
    # FastAPI's own 422 must not be described. The engines of language models have a 422, in their API's form.
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert {"400", "403", "503"} <= set(operation["responses"]), (method, path)
            described = service == "gateway" and set(operation.get("tags", ())) & set(ERROR_FORMS)
            assert described or "422" not in operation["responses"], (method, path)


@pytest.mark.parametrize("service", [*CONTROL, "gateway"])
async def test_the_page_of_the_api_loads_and_runs_nothing(apps, service):
    app = apps[service]
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        answer = await client.get("/docs")
        assert (await client.get("/redoc")).status_code in (401, 404)
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
    assert not re.search(r"<script|<link|<img|<iframe|src=|url\(|@import|https?://", answer.text)
    for path in app.openapi()["paths"]:
        assert path in answer.text
    (style,) = re.findall("<style>(.*?)</style>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in answer.headers["content-security-policy"]


def test_the_page_shows_names_as_text():
    operation = {"tags": ["<b>"], "description": "<script>x</script>", "responses": {}}
    document = {"info": {"title": "t", "version": "1"}, "paths": {"/<i>": {"get": operation}}}
    shown = api_page.page(document)
    assert "<script" not in shown
    assert "<i>" not in shown


@pytest.mark.parametrize("service", ["registry", "autoscaler"])
def test_every_route_with_a_body_reads_it_by_the_standard(apps, service):
    contexts = list(iter_route_contexts(apps[service].routes))
    with_body = [each for each in contexts if getattr(each.original_route, "body_field", None) is not None]
    assert with_body
    for each in with_body:
        assert isinstance(each.original_route, JsonRoute), each.path


@pytest.mark.parametrize("service", ["registry", "router", "autoscaler", "gateway"])
def test_each_reference_of_a_document_leads_somewhere(apps, service):
    document = apps[service].openapi()
    for each in set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document))):
        at = document
        for step in each.removeprefix("#/").split("/"):
            at = at[step]


def test_a_key_of_an_endpoint_may_do_nothing_but_ask_it():
    """No other deed is limited to an endpoint: with `operate` it read other callers' dead letters."""
    held = access.Principal("k", "k", frozenset(access.SCOPES), frozenset({"digits"}))
    assert held.may(access.INFER, "digits")
    assert not held.may(access.INFER, "other")
    for scope in (access.PUBLISH, access.OPERATE, access.ADMIN):
        assert not held.may(scope)
    assert not held.sees("somebody")
    route = SERVICES["router"].find("GET", "/v1/dead/x/payload")
    assert route is not None
    with pytest.raises(Forbidden, match="limited to some endpoints, so it may only infer"):
        permit(held, route.scopes)


@pytest.mark.parametrize(
    ("who", "told"),
    [
        (
            access.Principal("ab12", "robot", frozenset({"infer"})),
            "the key 'robot' (tg_ab12) has the scope infer, but this needs publish or operate: an admin "
            "adds it with `tidegate keys change ab12 --scope infer --scope publish`",
        ),
        (
            access.Principal("jwt:olga", "olga", frozenset()),
            "the token of 'olga' has no scope, but this needs publish or operate: map one of its "
            "roles to that scope (TIDEGATE_JWT_ROLE_SCOPES)",
        ),
        (
            access.SCRAPER,
            "the token of 'metrics token' is for one purpose only; this needs a key with the scope publish "
            "or operate",
        ),
    ],
)
def test_a_refusal_says_who_was_refused_and_how_to_get_what_is_missing(who, told):
    with pytest.raises(Forbidden) as caught:
        permit(who, LOOK)
    assert caught.value.message == told
