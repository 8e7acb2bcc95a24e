"""The catalogue over HTTP, on the real database: metadata, searches, pages and cards."""

from __future__ import annotations

import re
from typing import Any

import orjson
import pytest
import sqlalchemy as sa
from alembic import command

from services.registry.adapters.sql import migrate
from services.registry.adapters.sql.database import engine_for
from services.registry.adapters.sql.search import Search, find, models_page
from services.registry.domain import filters
from services.registry.domain.pages import cursor_of
from tests.integration.registry.onnx_files import onnx_bytes


async def found(
    call: Any, filter_: str = "", path: str = "/v1/versions", **query: Any
) -> list[tuple[str, int]]:
    answer = await call("GET", path, params={"filter": filter_, **query})
    return [(item["model"], item["number"]) for item in answer["items"]]


@pytest.fixture
async def four(call):
    """Three versions of `digits` and one of `Fraud`, registered an hour apart."""
    for seed, accuracy in enumerate((0.5, 0.95, 0.91), start=1):
        metadata = {
            "metrics": {"accuracy": accuracy},
            "parameters": {"depth": seed, "booster": "dart", "shuffle": True},
            "tags": {"team": "vision", "year": "2024"},
            "owner": "ann" if seed < 3 else "bob",
            "trained_at": f"2026-01-0{seed}T00:00:00Z",
        }
        await call.register("digits", onnx_bytes(seed), metadata=metadata)
        call.clock.forward(3600)
    await call.register("Fraud", onnx_bytes(9), metadata={"tags": {"team": 'a "b"'}, "license": "MIT"})
    return call


async def test_searches_find_versions_by_their_metadata(four):
    one, two, three, fraud = ("digits", 1), ("digits", 2), ("digits", 3), ("Fraud", 1)
    for filter_, expected in {
        "": [fraud, one, two, three],
        "accuracy > 0.9": [two, three],
        "metrics.accuracy > 0.9 and owner = 'ann'": [two],
        "metrics.accuracy is null": [fraud],
        "owner is not null and version >= 2": [two, three],
        "tags.team = 'a \"b\"'": [fraud],
        "tags.year > 2023 and tags.team in (vision, other)": [one, two, three],
        "params.depth >= 2 and params.booster = dart and params.shuffle = true": [two, three],
        "name like '%RAU%'": [fraud],
        "format = onnx and license = MIT": [fraud],
        "trained >= 2026-01-02 and trained < 2026-01-03T00:00:00Z": [two],
        "created < 2026-01-02T04:00:00Z": [one],
        "size > 2.5 and owner != ann": [three],
        "tags.team = '%' and owner = \"' or 1=1 --\"": [],
    }.items():
        assert await found(four, filter_) == expected, filter_
    assert await found(four, "owner = bob", "/v1/models/digits/versions") == [three]
    answer = await four("GET", "/v1/versions", params={"filter": "onwer = x"}, status=400)
    assert "the name 'onwer' does not exist" in answer["error"]
    await four("PATCH", "/v1/models/digits/versions/1", {"metadata_patch": {"owner": "eve", "tags": None}})
    assert await found(four, "owner = eve and tags.team is null and accuracy = 0.5") == [one]


@pytest.mark.parametrize("server", ["postgresql"], indirect=True)
async def test_a_search_has_no_join_that_old_statistics_make_slow(database_url):
    """Each fact and size is found by a primary key, whatever PostgreSQL knows about the tables."""
    engine = engine_for(database_url)
    async with engine.connect() as connection:
        recorder: Any = _Recorder(connection)
        conditions = filters.parse("metrics.accuracy > 0.5 and tags.team = 'fraud' and size > 5")
        for order in ("metrics.accuracy desc", "size", "owner"):
            await find(recorder, Search(conditions, filters.parse_order(order)))
        await models_page(recorder, Search(conditions), "digits")
        assert len(recorder.queries) == 4
        for query in recorder.queries:
            sql = query.compile(dialect=engine.dialect, compile_kwargs={"literal_binds": True})
            plan = "\n".join((await connection.exec_driver_sql(f"EXPLAIN {sql}")).scalars())
            assert "SubPlan" in plan
            assert not re.search("Join|Nested Loop|Merge", plan), plan
    await engine.dispose()


class _Recorder:
    """A connection that keeps its queries."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.queries: list[Any] = []

    async def execute(self, query: Any) -> Any:
        self.queries.append(query)
        return await self._connection.execute(query)


async def test_pages_hold_each_version_once_in_every_order(four):
    for order, expected in {
        "metrics.accuracy desc": [("digits", 2), ("digits", 3), ("digits", 1), ("Fraud", 1)],
        "accuracy": [("digits", 1), ("digits", 3), ("digits", 2), ("Fraud", 1)],
        "created desc": [("Fraud", 1), ("digits", 3), ("digits", 2), ("digits", 1)],
        "trained": [("digits", 1), ("digits", 2), ("digits", 3), ("Fraud", 1)],
        "owner desc": [("digits", 3), ("digits", 2), ("digits", 1), ("Fraud", 1)],
        "name desc": [("digits", 3), ("digits", 2), ("digits", 1), ("Fraud", 1)],
        "license": [("Fraud", 1), ("digits", 1), ("digits", 2), ("digits", 3)],
        "": [("Fraud", 1), ("digits", 1), ("digits", 2), ("digits", 3)],
    }.items():
        listed, cursor, pages = [], None, 0
        while cursor is not None or not pages:
            query = {"order_by": order, "limit": 1, **({"cursor": cursor} if cursor else {})}
            page = await four("GET", "/v1/versions", params=query)
            listed += [(item["model"], item["number"]) for item in page["items"]]
            cursor, pages = page["next"], pages + 1
        assert (listed, pages) == (expected, 4), order
    for order, value in (("created", 1e300), ("created", -(10**18)), ("size", 1e308), ("owner", "x" * 99)):
        cursor = cursor_of(f"{'field' if order == 'owner' else 'column'}.{order} asc", value, "m", 1)
        answer = await four.http.get("/v1/versions", params={"order_by": order, "cursor": cursor})
        assert answer.status_code in (200, 400), answer.text
    page = await four("GET", "/v1/models", params={"limit": 1})
    assert [item["name"] for item in page["items"]] == ["Fraud"]
    rest = await four("GET", "/v1/models", params={"cursor": page["next"]})
    assert [(item["name"], item["versions"], item["latest"]["number"]) for item in rest["items"]] == [
        ("digits", [1, 2, 3], 3)
    ]
    assert rest["next"] is None
    named = await four("GET", "/v1/models", params={"name": "GIT"})
    assert [item["name"] for item in named["items"]] == ["digits"]
    high = await four("GET", "/v1/models", params={"filter": "license = MIT"})
    assert [item["name"] for item in high["items"]] == ["Fraud"]


async def test_deployments_and_endpoints_have_pages(call):
    await call.register("digits", onnx_bytes())
    await call.register("other", onnx_bytes(2))
    names = ["a", "a-b", "ab", "b-1", "b1"]  # in the order of their bytes, unlike that of a language
    for name in names:
        await call("PUT", f"/v1/deployments/{name}", {"model": "digits", "version": 1}, status=201)
        target = {"deployment": name, "weight": 1}
        await call("PUT", f"/v1/endpoints/{name}", {"targets": [target]}, status=201)
    await call("PUT", "/v1/deployments/aa", {"model": "other", "version": 1}, status=201)
    for path, query in (("/v1/deployments", {"model": "digits"}), ("/v1/endpoints", {})):
        whole = await call("GET", path, params=query)
        assert ([item["name"] for item in whole["items"]], whole["next"]) == (names, None)
        items: list[Any] = []
        cursor = None
        while True:
            paged = {**query, "limit": 2, **({"cursor": cursor} if cursor else {})}
            page = await call("GET", path, params=paged)
            items += page["items"]
            assert 1 <= len(page["items"]) <= 2
            if (cursor := page["next"]) is None:
                break
            if path == "/v1/endpoints":  # the end of a page may be deleted before the next page is read
                await call("DELETE", f"{path}/{page['items'][-1]['name']}", status=204)
        assert items == whole["items"]
        for wrong in ({"limit": 0}, {"cursor": "x"}, {"cursor": cursor_of("models", "a")}):
            assert (await call.http.get(path, params=wrong)).status_code == 400


async def test_metadata_has_limits_and_cards_are_text(call):
    await call.register("digits", onnx_bytes(), metadata={"metrics": {"accuracy": 0.9}})
    path = "/v1/models/digits/versions/1"
    for wrong, words in (
        ({"metrics": {"": 1}}, "1 to 128 characters"),
        ({"tags": {"a": "x" * 1_001}}, "the limit is 1000"),
        ({"notes": "x" * 16_001}, "the limit is 16000"),
        ({"parameters": {str(n): n for n in range(501)}}, "the limit is 500"),
        ({"dependencies": ["x" * 900] * 80}, "model card"),
        ({"onwer": "x"}, "there is no field 'onwer'"),
    ):
        answer = await call("PATCH", path, {"metadata_patch": wrong}, status=400)
        assert words in answer["error"], answer
    assert "no model card" in (await call("GET", f"{path}/card", status=404))["error"]
    await call("PUT", f"{path}/card", {"text": "# Digits\n\nFor tests."})
    assert (await call("GET", f"{path}/card"))["text"] == "# Digits\n\nFor tests."
    assert "is empty" in (await call("PUT", f"{path}/card", {"text": " "}, status=400))["error"]
    await call("DELETE", f"{path}/card", status=204)
    await call("GET", f"{path}/card", status=404)
    await call("DELETE", path, status=204)
    assert await found(call, "accuracy > 0") == []


async def test_the_desired_state_has_only_the_versions_that_run(call):
    for seed in range(1, 4):
        await call.register("digits", onnx_bytes(seed))
    await call("POST", "/v1/deploy", {"model": "digits", "version": 2})
    desired = await call("GET", "/v1/desired-state")
    assert [version["number"] for version in desired["versions"]] == [2]


async def test_going_back_drops_what_an_earlier_release_refuses(database_url, opened):
    async with opened() as call:
        metadata = {"owner": "ann", "parameters": {"depth": 6}, "metrics": {"accuracy": 0.9}}
        await call.register("digits", onnx_bytes(1), metadata=metadata)
    engine = engine_for(database_url)
    async with engine.execution_options(registry_writes=True).begin() as connection:
        await connection.run_sync(lambda c: command.downgrade(migrate.config_for(c), "0007"))
        stored = (await connection.execute(sa.text("SELECT metadata FROM versions"))).scalar_one()
    await engine.dispose()
    left = stored if isinstance(stored, dict) else orjson.loads(stored)
    assert set(left) == {"trained_at", "metrics", "dependencies", "tags", "notes"}
    await migrate.migrate(database_url)
    async with opened() as call:
        assert await found(call, "accuracy = 0.9 and owner is null") == [("digits", 1)]


async def test_aliases_move_at_once_and_keep_their_history(four):
    path = "/v1/models/digits/aliases"
    assert "has no version 9" in (await four("PUT", f"{path}/champion", {"version": 9}, status=404))["error"]
    for wrong, words in (("latest", "cannot be set"), ("v3", "looks like"), ("a" * 33, "the limit is 32")):
        answer = await four("PUT", f"{path}/{wrong}", {"version": 1}, status=400)
        assert words in answer["error"], answer
    await four("PUT", f"{path}/champion", {"version": 2, "expected": 0})
    four.clock.forward(60)
    lost = await four("PUT", f"{path}/champion", {"version": 1, "expected": 3}, status=409)
    assert "points to version 2, but the request expected it to point to version 3" in lost["error"]
    revision = (await four("GET", "/v1/desired-state"))["revision"]
    await four("PUT", f"{path}/champion", {"version": 3, "expected": 2})
    await four("PUT", f"{path}/champion", {"version": 3})
    assert (await four("GET", "/v1/desired-state"))["revision"] == revision + 1, (
        "a repeated call changes nothing"
    )
    history = await four("GET", f"{path}/champion")
    assert [(m["from_version"], m["to_version"], m["by"]) for m in history["moves"]] == [
        (2, 3, "service token"),
        (None, 2, "service token"),
    ]
    assert (await four("GET", "/v1/models/digits/versions/champion"))["number"] == 3
    assert (await four("GET", "/v1/models/digits"))["aliases"] == {"champion": 3}
    assert await found(four, "alias = champion and name = digits") == [("digits", 3)]
    listed = await four("GET", "/v1/models/digits/versions")
    assert [item["aliases"] for item in listed["items"]] == [[], [], ["champion"]]
    compared = await four("GET", "/v1/compare", params={"a": "digits@1", "b": "digits@champion"})
    assert (compared["a"]["number"], compared["b"]["number"]) == (1, 3)
    deltas = {each["name"]: each["delta"] for each in compared["comparison"]["metrics"]}
    assert deltas["accuracy"] == pytest.approx(0.41)
    refused = await four("DELETE", "/v1/models/digits/versions/3", status=409)
    assert "has the alias 'champion'" in refused["error"]
    assert "has the alias" in (await four("DELETE", "/v1/models/digits", status=409))["error"]
    await four("POST", "/v1/deploy", {"model": "digits", "version": "champion"})
    desired = await four("GET", "/v1/desired-state")
    assert (desired["deployments"][0]["version"], desired["aliases"]) == (3, {"digits": {"champion": 3}})
    unknown = await four("POST", "/v1/deploy", {"model": "digits", "version": "winner"}, status=404)
    assert "Its aliases: champion (3)" in unknown["error"]
    await four("DELETE", f"{path}/champion", status=204)
    gone = await four("GET", f"{path}/champion")
    assert (gone["version"], gone["moves"][0]["from_version"], gone["moves"][0]["to_version"]) == (
        None,
        3,
        None,
    )
    assert (await four("GET", path))["items"] == []
    await four("PUT", f"{path}/old", {"version": 1})
    await four("DELETE", "/v1/models/digits", params={"cascade": "true"})
    assert (await four("GET", path, status=404))["reason"] == "not_found"


async def test_lineage_follows_parents_and_finds_children(four):
    async def describe(number: int, **fields: Any) -> Any:
        return await four("PATCH", f"/v1/models/digits/versions/{number}", {"metadata_patch": fields})

    await four("PUT", "/v1/models/digits/aliases/champion", {"version": 2})
    await describe(1, parent="hub/base@main", run="r-1")
    await describe(2, parent="digits@1")
    described = await describe(3, parent="digits@champion")
    assert described["metadata"]["parent"] == "digits@2", "an alias may move, a parent does not"
    found = await four("GET", "/v1/models/digits/versions/3/lineage")
    assert [(each["version"], each["known"], each["run"]) for each in found["ancestors"]] == [
        ("digits@2", True, None),
        ("digits@1", True, "r-1"),
        ("hub/base@main", False, None),
    ]
    assert found["children"] == []
    found = await four("GET", "/v1/models/digits/versions/1/lineage")
    assert [each["version"] for each in found["children"]] == ["digits@2"]
    own = {"metadata_patch": {"parent": "digits@latest"}}
    refused = await four("PATCH", "/v1/models/digits/versions/3", own, status=400)
    assert "is this version itself" in refused["error"]
    await describe(1, parent="digits@3")
    circle = await four("GET", "/v1/models/digits/versions/3/lineage")
    assert [each["version"] for each in circle["ancestors"]] == ["digits@2", "digits@1"]
