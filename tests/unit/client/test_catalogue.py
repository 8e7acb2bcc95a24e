"""The catalogue over both clients, against a gateway that answers from memory."""

from __future__ import annotations

from typing import Any

import httpx

from tests.unit.client.test_client import make  # noqa: F401


def test_calls_of_the_catalogue(make: Any) -> None:  # noqa: F811
    asked: list[str] = []

    def plane(request: httpx.Request) -> httpx.Response:
        path = request.url.raw_path.decode().removeprefix("/api/registry/v1/")
        asked.append(f"{request.method} {path} {request.content.decode()}".rstrip())
        if request.method == "DELETE":
            return httpx.Response(204)
        if path == "models/digits/aliases":
            return httpx.Response(200, json={"items": [{"alias": "champion", "version": 3}]})
        if path.endswith("/restore"):
            return httpx.Response(200, json={"versions": [3]})
        if path.startswith(("versions", "deployments", "endpoints")) or "/retention" in path:
            return httpx.Response(200, json={"items": [1, 2], "next": None if "cursor" in path else "c"})
        return httpx.Response(200, json={"model": "digits", "number": 3, "text": "# Digits"})

    client = make(plane)
    assert client.search_versions("accuracy > 0.9", order_by="created desc") == [1, 2, 1, 2]
    assert client.search_versions(limit=2) == [1, 2]
    assert client.deployments("digits") == client.endpoints() == [1, 2, 1, 2]
    assert client.version("digits@champion")["number"] == 3
    client.describe_version("digits", {"owner": None})
    assert client.card("digits@3") == "# Digits"
    client.set_card("digits@3", "# New")
    client.set_card("digits@3", None)
    client.compare("digits@1", "digits@3")
    assert client.aliases("digits") == {"champion": 3}
    client.set_alias("digits", "champion", 4, expected=3)
    client.set_alias("digits", "champion", None)
    client.delete_version("digits", 3, permanent=True)
    assert client.restore_versions("digits", 3) == client.restore_versions("digits") == [3]
    client.set_retention("digits", {"keep_last": 2})
    assert client.retention("digits", keep_last=2) == [1, 2]
    client.retention("digits", dry_run=False)
    client.lineage("digits@3")
    client.stage("digits@3")
    client.set_stage("digits@3", None)
    client.approve("digits@3", "production", comment="fine")
    client.set_stages("digits", [{"name": "a"}], serve_from="a")
    version = "GET models/digits/versions"
    assert asked == [
        "GET versions?filter=accuracy+%3E+0.9&order_by=created+desc&limit=1000",
        "GET versions?filter=accuracy+%3E+0.9&order_by=created+desc&limit=1000&cursor=c",
        "GET versions?filter=&limit=2",
        "GET deployments?model=digits&limit=1000",
        "GET deployments?model=digits&limit=1000&cursor=c",
        "GET endpoints?limit=1000",
        "GET endpoints?limit=1000&cursor=c",
        f"{version}/champion",
        f"{version}/latest",
        'PATCH models/digits/versions/3 {"metadata_patch":{"owner":null}}',
        f"{version}/3",
        f"{version}/3/card",
        f"{version}/3",
        'PUT models/digits/versions/3/card {"text":"# New"}',
        f"{version}/3",
        "DELETE models/digits/versions/3/card",
        "GET compare?a=digits%401&b=digits%403",
        "GET models/digits/aliases",
        'PUT models/digits/aliases/champion {"version":4,"expected":3}',
        "DELETE models/digits/aliases/champion",
        "DELETE models/digits/versions/3?permanent=true",
        "POST models/digits/versions/3/restore {}",
        "POST models/digits/restore {}",
        'PATCH models/digits/policy {"retention":{"keep_last":2}}',
        "POST models/digits/retention?dry_run=true "
        '{"retention":{"keep_last":2,"max_age_days":null,"sleeping":false}}',
        "POST models/digits/retention {}",
        f"{version}/3",
        f"{version}/3/lineage",
        f"{version}/3",
        f"{version}/3/stage",
        f"{version}/3",
        'PUT models/digits/versions/3/stage {"stage":"none"}',
        f"{version}/3",
        'POST models/digits/versions/3/approvals {"stage":"production","comment":"fine"}',
        'PATCH models/digits/policy {"stages":[{"name":"a"}],"serve_from":"a"}',
    ]
