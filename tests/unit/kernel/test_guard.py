"""The frame of every service's app: the callers that it admits, and its errors."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi import APIRouter, FastAPI, HTTPException
from pydantic import BaseModel

from tidegate.kernel import errors
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.http.heads import is_local
from tidegate.kernel.protocol.access import ADMIN, METRICS, OPERATE, PUBLISH, Principal, metrics_token
from tidegate.kernel.protocol.permissions import INTERNAL, OPEN, RoutePermissions
from tidegate.kernel.service.api import JsonRoute, create_app, explain_validation
from tidegate.kernel.service.app import bare_app
from tidegate.kernel.service.error_answers import STATUS, status_of
from tidegate.kernel.settings.base import Settings
from tidegate.kernel.store import StoreUnavailable

pytestmark = pytest.mark.unit

TOKEN = "secret-token"
OURS = {"Authorization": f"Bearer {TOKEN}"}


PERMISSIONS = RoutePermissions(
    {
        "GET /health/live": (OPEN,),
        "GET /health/ready": (OPEN,),
        "GET /openapi.json": (OPEN,),
        "GET /metrics": (METRICS, OPERATE),
        "GET /v1/thing": (OPERATE,),
        "GET /v1/thing/table": (INTERNAL,),
        "GET /open/thing": (OPEN,),
        "POST /v1/number": (PUBLISH,),
        "GET /v1/raise/{name}": (OPERATE,),
    }
)


class Body(BaseModel):
    number: int


def routes() -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.get("/v1/thing")
    @router.get("/v1/thing/table")
    @router.get("/v1/unlisted")
    @router.get("/open/thing")
    async def thing() -> dict[str, str]:
        return {"a": "thing"}

    @router.post("/v1/number")
    async def number(body: Body) -> int:
        return body.number

    @router.get("/v1/raise/{name}")
    async def fail(name: str) -> None:
        if name == "unexpected":
            raise RuntimeError("the details are for the log")
        if name == "http":
            raise HTTPException(418, "a teapot", headers={"X-Tea": "green"})
        error: type[TidegateError] = getattr(errors, name)
        raise error(f"{name} it is", retry_after_s=1.2)

    return router


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    yield


def build(tmp_path, **settings) -> FastAPI:
    wanted = Settings(state_dir=tmp_path, service_token=TOKEN, **settings)
    return create_app(
        name="test", settings=wanted, lifespan=lifespan, routers=[routes()], permissions=PERMISSIONS
    )


def client_of(app) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")


@pytest.fixture
async def client(tmp_path, monkeypatch):
    monkeypatch.delenv("TIDEGATE_HOST", raising=False)
    async with client_of(build(tmp_path)) as found:
        yield found


@pytest.fixture
async def public_client(tmp_path):
    async with client_of(build(tmp_path, host="0.0.0.0")) as found:
        yield found


async def test_the_token_opens(client):
    answer = await client.get("/v1/thing", headers=OURS)
    assert (answer.status_code, answer.json()) == (200, {"a": "thing"})


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", "Bearer é"],
)
async def test_no_other_token_opens(client, given):
    headers = {} if given is None else {"Authorization": given.encode()}
    answer = await client.get("/v1/thing", headers=headers)
    assert answer.status_code == 401
    assert answer.json()["reason"] == "unauthorized"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/openapi.json", "/open/thing"])
async def test_open_paths_need_no_token(client, path):
    assert (await client.get(path)).status_code == 200


async def test_a_slash_at_the_end_is_no_other_path(client):
    for path in ("/health/live/", "/open/thing/"):
        assert (await client.get(path)).status_code == 200, "not a redirect"
    assert (await client.get("/v1/thing/")).status_code == 401
    answer = await client.get("/v1/thing/", headers=OURS)
    assert (answer.status_code, answer.json()) == (200, {"a": "thing"})
    assert (await client.get("/v1/thing//", headers=OURS)).status_code == 404
    wrong = await client.put("/v1/thing/", headers=OURS)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET")


async def test_metrics_need_the_metrics_token_which_opens_nothing_else(client):
    scrapes = {"Authorization": f"Bearer {metrics_token(TOKEN)}"}
    assert (await client.get("/metrics")).status_code == 401
    assert (await client.get("/metrics", headers=scrapes)).status_code == 200
    assert (await client.get("/metrics", headers=OURS)).status_code == 200
    assert (await client.get("/v1/thing", headers=scrapes)).status_code == 403
    wrong = {"Authorization": f"Bearer {metrics_token(TOKEN + 'x')}"}
    assert (await client.get("/metrics", headers=wrong)).status_code == 401


def carried(*scopes: str) -> dict[str, str]:
    """Return headers of a service that calls for a principal with these scopes."""
    principal = Principal("k", "somebody", frozenset(scopes))
    return OURS | {"X-Tidegate-Principal": principal.to_header()}


async def test_the_scope_of_the_carried_principal_is_checked_here_too(client):
    for scopes, status in (((OPERATE,), 200), ((ADMIN,), 200), ((PUBLISH,), 403), ((), 403)):
        assert (await client.get("/v1/thing", headers=carried(*scopes))).status_code == status, scopes
    refused = await client.post("/v1/number", headers=carried(OPERATE), content=b"not JSON")
    assert refused.status_code == 403, "judged before the body is read"
    assert (await client.get("/v1/thing/table", headers=OURS)).status_code == 200
    assert (await client.get("/v1/thing/table", headers=carried(ADMIN))).status_code == 403


async def test_a_route_that_the_table_does_not_name_is_answered_to_nobody(client):
    assert (await client.get("/v1/unlisted", headers=OURS)).status_code == 404


@pytest.mark.parametrize("path", ["/v1/raise/%0A", "/v1/thing/table%0A", "/v1/raise/a%00", "/v1/raise/a%7F"])
async def test_a_path_with_a_control_character_is_refused(client, path):
    for headers in (OURS, carried(ADMIN)):
        answer = await client.get(path, headers=headers)
        assert (answer.status_code, answer.json()["reason"]) == (400, "bad_request")


async def test_what_does_not_exist_is_not_told_to_strangers(client):
    assert (await client.get("/v1/nothing")).status_code == 401
    answer = await client.get("/v1/nothing", headers=OURS)
    assert (answer.status_code, answer.json()["reason"]) == (404, "not_found")


@pytest.mark.parametrize("path", ["/v1/thing", "/open/thing", "/health/live"])
@pytest.mark.parametrize(
    "foreign",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8000"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "[::1"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "http://localhost.evil.example"},
        {"Origin": "null"},
        {"Origin": "http://[::1"},
    ],
    ids=str,
)
async def test_foreign_pages_are_refused(client, path, foreign):
    answer = await client.get(path, headers=OURS | foreign)
    assert (answer.status_code, answer.json()["reason"]) == (403, "forbidden")


@pytest.mark.parametrize(
    "local",
    [
        {"Host": "localhost"},
        {"Host": "LOCALHOST:9"},
        {"Host": "127.0.0.1:8000"},
        {"Host": "[::1]:8000"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "https://127.0.0.1"},
    ],
    ids=str,
)
async def test_local_pages_are_not(client, local):
    assert (await client.get("/v1/thing", headers=OURS | local)).status_code == 200


async def test_a_public_address_answers_to_every_name(public_client):
    foreign = {"Host": "models.example", "Origin": "https://app.example"}
    assert (await public_client.get("/v1/thing", headers=OURS | foreign)).status_code == 200
    assert (await public_client.get("/v1/thing", headers=foreign)).status_code == 401


LOCAL = {b"host": b"localhost:8000"}


def test_without_a_host_header_nobody_is_local():
    assert not is_local({})
    assert is_local(LOCAL)


@pytest.mark.parametrize(
    "host", [b"x@localhost", b"localhost@evil.example", b"localhost/", b"localhost:x", b""]
)
def test_a_host_is_a_name_and_a_port(host):
    assert not is_local({b"host": host})


@pytest.mark.parametrize("origin", [b"http://x@localhost", b"localhost", b"http://localhost/x", b"null"])
def test_an_origin_is_a_scheme_and_a_host(origin):
    assert not is_local(LOCAL | {b"origin": origin})


@pytest.mark.parametrize(
    ("site", "local"),
    [(b"cross-site", False), (b"same-site", False), (b"same-origin", True), (b"none", True)],
)
def test_what_a_browser_does_for_another_site_is_not_local(site, local):
    """An image or a link has no Origin. A local page is recognized by its Origin."""
    told = LOCAL | {b"sec-fetch-site": site}
    assert is_local(told) == local
    assert is_local(told | {b"origin": b"http://127.0.0.1:3000"})


async def test_a_page_cannot_even_read(client):
    for path in ("/open/thing", "/health/live", "/v1/thing"):
        answer = await client.get(path, headers=OURS | {"Sec-Fetch-Site": "cross-site"})
        assert (answer.status_code, answer.json()["reason"]) == (403, "forbidden")


@pytest.mark.parametrize("path", ["/v1/thing", "/health/live", "/v1/raise/NotFound", "/v1/raise/unexpected"])
async def test_the_request_id_comes_back(client, path):
    answer = await client.get(path, headers=OURS | {"X-Request-Id": "abc-123"})
    assert answer.headers.get_list("x-request-id") == ["abc-123"]
    if answer.status_code >= 400:
        assert answer.json()["request_id"] == "abc-123"


async def test_a_request_without_id_gets_one(client):
    one, other = [(await client.get("/health/live")).headers["x-request-id"] for _ in range(2)]
    assert len(one) == len(other) == 16
    assert one != other
    refused = await client.get("/v1/thing")
    assert refused.json()["request_id"] == refused.headers["x-request-id"]


async def test_a_long_request_id_is_cut(client):
    answer = await client.get("/health/live", headers={"X-Request-Id": "x" * 500})
    assert answer.headers["x-request-id"] == "x" * 128


EXPECTED = {
    "BadRequest": (400, "bad_request"),
    "Unauthorized": (401, "unauthorized"),
    "Forbidden": (403, "forbidden"),
    "NotFound": (404, "not_found"),
    "MethodNotAllowed": (405, "method_not_allowed"),
    "Conflict": (409, "conflict"),
    "SequenceLost": (409, "sequence_lost"),
    "PreconditionFailed": (412, "precondition_failed"),
    "PayloadTooLarge": (413, "payload_too_large"),
    "TooMany": (429, "too_many_requests"),
    "ModelFailed": (500, "model_failed"),
    "Overloaded": (503, "overloaded"),
    "NoCapacity": (503, "no_capacity"),
    "ColdStart": (503, "cold_start"),
    "NoRoutes": (503, "no_routes"),
    "Unavailable": (503, "unavailable"),
    "DeadlinePassed": (504, "deadline_passed"),
}


@pytest.mark.parametrize("name", EXPECTED)
async def test_errors_have_their_status(client, name):
    answer = await client.get(f"/v1/raise/{name}", headers=OURS | {"X-Request-Id": "r"})
    status, reason = EXPECTED[name]
    assert answer.status_code == status
    assert answer.json() == {"error": f"{name} it is", "reason": reason, "request_id": "r"}
    assert answer.headers["retry-after"] == "2", "whole seconds, rounded up"


def test_every_error_is_in_the_tables():
    subclasses = {cls for cls in TidegateError.__subclasses__() if cls.__module__ == errors.__name__}
    assert subclasses <= set(STATUS) == set(errors.BY_REASON.values())
    assert {cls.__name__ for cls in STATUS} == set(EXPECTED)


def test_the_nearest_class_decides():
    assert status_of(StoreUnavailable("away")) == 503
    assert status_of(TidegateError("?")) == 500
    assert StoreUnavailable("away").reason == "store_unavailable"
    assert errors.NotFound("x", reason="no_version").reason == "no_version"


async def test_an_unexpected_error_keeps_its_details(client, caplog):
    with caplog.at_level(logging.ERROR):
        answer = await client.get("/v1/raise/unexpected", headers=OURS)
    assert (answer.status_code, answer.json()["reason"]) == (500, "internal")
    assert "details" not in answer.text
    assert "the details are for the log" in caplog.text


async def test_framework_errors_look_alike(client):
    answer = await client.get("/v1/raise/http", headers=OURS)
    assert (answer.status_code, answer.headers["x-tea"]) == (418, "green")
    assert (answer.json()["error"], answer.json()["reason"]) == ("a teapot", "http")
    answer = await client.put("/v1/thing", headers=OURS)
    assert (answer.status_code, answer.json()["reason"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "GET"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"number": "many"}, "number: Input should be a valid integer, unable to parse"),
        ({}, "number: Field required"),
        ([1], "the body must be a JSON object"),
    ],
)
async def test_validation_says_where(client, body, message):
    answer = await client.post("/v1/number", headers=OURS, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(message)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"{", "application/json", "the body is not JSON: unexpected end of data (character 1)"),
        (
            b"[" * 5000,
            "application/json",
            "the body is not JSON: it nests lists or objects more than 1,024 levels deep",
        ),
        (
            b'{"number": 1}',
            "text/plain",
            "the body was not read as JSON: send 'Content-Type: application/json'",
        ),
    ],
)
async def test_a_body_that_is_no_json_says_so(client, content, kind, message):
    answer = await client.post("/v1/number", headers=OURS | {"Content-Type": kind}, content=content)
    assert (answer.status_code, answer.json()["reason"]) == (400, "bad_request")
    assert answer.json()["error"].startswith(message)


def test_validation_shows_what_was_given():
    finding = {"type": "any", "loc": ("body", "a", 0), "msg": "wrong", "input": "x" * 200}
    assert explain_validation([finding] * 9) == "; ".join([f"a.0: wrong (given: {'x' * 80!r})"] * 5)


async def test_ready_says_what_is_wrong(tmp_path):
    app = build(tmp_path)
    problems: dict[str, str | None] = {"broker": "away", "store": None}
    for name in problems:
        app.state.health.add(name, lambda name=name: problems[name])
    async with client_of(app) as client:
        answer = await client.get("/health/ready")
        assert answer.status_code == 503
        assert answer.json() == {"status": "not ready", "problems": {"broker": "away"}}
        problems["broker"] = None
        answer = await client.get("/health/ready")
        assert (answer.status_code, answer.json()) == (200, {"status": "ready", "problems": {}})


def test_no_service_starts_without_a_token(tmp_path, monkeypatch):
    monkeypatch.delenv("TIDEGATE_SERVICE_TOKEN", raising=False)
    settings = Settings(state_dir=tmp_path)
    with pytest.raises(SystemExit, match="no service token"):
        create_app(name="router", settings=settings, lifespan=lifespan, routers=[])


async def test_an_app_without_an_api(tmp_path):
    settings = Settings(state_dir=tmp_path, service_token=TOKEN)
    app = bare_app(name="worker", settings=settings, lifespan=lifespan)
    app.state.health.add("model", lambda: "not loaded")
    async with client_of(app) as client:
        assert (await client.get("/health/live")).json() == {"status": "live"}
        answer = await client.get("/health/ready")
        assert (answer.status_code, answer.json()["problems"]) == (503, {"model": "not loaded"})
        assert "# TYPE" in (await client.get("/metrics")).text
        assert (await client.get("/v1/nothing")).status_code == 401
        answer = await client.get("/v1/nothing", headers=OURS)
        assert (answer.status_code, answer.json()["reason"]) == (404, "not_found")
        assert (await client.get("/health/live", headers={"Host": "evil.example"})).status_code == 403


async def test_each_request_is_one_line(client, caplog):
    with caplog.at_level(logging.DEBUG, "tidegate.kernel.service.guard"):
        await client.get("/v1/thing", headers=OURS)
        await client.get("/v1/thing")
    seen = [(r.levelname, r.path, r.status) for r in caplog.records if r.message == "request"]
    assert seen == [("DEBUG", "/v1/thing", 200), ("INFO", "/v1/thing", 401)]
