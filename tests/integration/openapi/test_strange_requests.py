"""Requests that no client library makes: each is refused by a status of its own, and none is our error."""

from __future__ import annotations

import httpx
import pytest

from tests.integration.openapi.conftest import TOKEN

pytestmark = pytest.mark.integration

HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
SURROGATE = r'"\ud800"'
DIGITS = "9" * 5000
DEEP = "[" * 50_000

CONTROLS = ["%00", "%03", "%0A", "%7F"]
PATHS = [
    ("registry", "GET", "/v1/models/{}"),
    ("registry", "GET", "/v1/deployments/{}"),
    ("registry", "GET", "/v1/artifacts/{}"),
    ("registry", "GET", "/v1/keys/{}"),
    ("autoscaler", "GET", "/v1/deployments/{}"),
    ("autoscaler", "DELETE", "/v1/deployments/{}/replicas"),
    ("autoscaler", "POST", "/v1/replicas/{}/drain"),
    ("autoscaler", "DELETE", "/v1/hosts/{}/cordon"),
    ("gateway", "GET", "/v2/models/{}"),
    ("gateway", "GET", "/v1/jobs/{}"),
    ("gateway", "GET", "/api/autoscaler/v1/deployments/{}"),
]
QUERIES = [
    ("registry", "/v1/audit?before=99999999999999999999999999"),
    ("registry", "/v1/audit?before=-99999999999999999999999999"),
    ("registry", "/v1/audit?principal=%00&kind=%00&name=%00"),
    ("registry", "/v1/audit?principal=%ff"),
    ("registry", "/v1/usage?since=0001-01-01&until=9999-12-31&principal=%00"),
    ("registry", "/v1/usage.csv?endpoint=%0D%0A&by=day"),
    ("registry", "/v1/usage/x/quota?day=0001-01-01"),
    ("registry", "/v1/usage/x/quota?day=9999-12-31"),
    ("registry", "/v1/deployments?model=%00"),
    ("autoscaler", "/v1/decisions?deployment=%00&limit=1"),
    ("autoscaler", "/v1/decisions?limit=99999999999999999999999"),
    ("router", "/v1/exceptions?limit=99999999999999999999999"),
    ("router", "/v1/webhooks/secret?principal=%00"),
    ("gateway", "/v1/jobs?principal=%00&endpoint=%00&deployment=%00&batch=%00"),
    ("gateway", "/v1/jobs?cursor=%00"),
    ("gateway", "/v1/batches?principal=%ff&cursor=99999999999999999999999999999999"),
]
NUMBERS = ["NaN", "Infinity", "-Infinity", "1e400", DIGITS]
BODIES = [
    *(
        ("autoscaler", "PUT", "/v1/deployments/0/replicas", f'{{"replicas": 1, "ttl_s": {number}}}')
        for number in NUMBERS
    ),
    *(("autoscaler", "POST", "/v1/deployments/0/pause", f'{{"ttl_s": {number}}}') for number in NUMBERS),
    *(
        ("autoscaler", "PATCH", "/v1/deployments/0/policy", f'{{"target_wait_ms": {number}}}')
        for number in NUMBERS
    ),
    *(
        ("autoscaler", "POST", "/v1/replay", f'{{"deployment": "0", "start_at": {number}, "seed": {number}}}')
        for number in NUMBERS
    ),
    *(("autoscaler", "POST", "/v1/replay/verify", f'{{"since": {number}}}') for number in NUMBERS),
    *(
        ("registry", "PUT", "/v1/deployments/0/override", f'{{"replicas": 1, "ttl_s": {number}}}')
        for number in NUMBERS
    ),
    *(("registry", "PATCH", "/v1/deployments/0", f'{{"target_wait_ms": {number}}}') for number in NUMBERS),
    *(("registry", "PATCH", "/v1/deployments/0", f'{{"max_queue": {number}}}') for number in NUMBERS),
    *(("registry", "POST", "/v1/keys", f'{{"name": "k", "rate": {number}}}') for number in NUMBERS),
    *(("registry", "POST", "/v1/keys", f'{{"name": "k", "ttl_s": {number}}}') for number in NUMBERS),
    *(("registry", "POST", "/v1/keys", f'{{"name": "k", "day": {number}}}') for number in NUMBERS),
    *(("registry", "POST", "/v1/endpoints/0/settle", f'{{"revision": {number}}}') for number in NUMBERS),
    ("registry", "POST", "/v1/keys", f'{{"name": {SURROGATE}}}'),
    ("registry", "POST", "/v1/keys", f'{{"name": "k", {SURROGATE}: 1}}'),
    ("registry", "POST", "/v1/keys", f'{{"name": "k", "endpoints": [{SURROGATE}]}}'),
    ("registry", "POST", "/v1/keys", r'{"name": "a\u0000"}'),
    ("registry", "PATCH", "/v1/deployments/0", f'{{"env": {{"A": {SURROGATE}}}}}'),
    ("registry", "PATCH", "/v1/deployments/0", f'{{"env": {{{SURROGATE}: "a"}}}}'),
    ("registry", "PATCH", "/v1/deployments/0", r'{"env": {"A": "\u0000"}}'),
    ("registry", "PATCH", "/v1/deployments/0", f"{{{SURROGATE}: 1}}"),
    ("registry", "PATCH", "/v1/deployments/0/policy", f"{{{SURROGATE}: 1}}"),
    ("registry", "PATCH", "/v1/models/0/versions/1", f'{{"metadata": {{"notes": {SURROGATE}}}}}'),
    ("registry", "PATCH", "/v1/models/0/versions/1", f'{{"metadata": {{"tags": {{{SURROGATE}: "a"}}}}}}'),
    ("registry", "PATCH", "/v1/models/0/versions/1", '{"metadata": {"metrics": {"a": NaN}}}'),
    ("registry", "POST", "/v1/models/0/versions", f'{{"artifact": "{"0" * 64}", "filename": {SURROGATE}}}'),
    ("registry", "POST", "/v1/deploy", f'{{"model": "0", "deployment": {{{SURROGATE}: 1}}}}'),
    ("registry", "POST", "/v1/apply", f'{{"deployments": [{{"name": {SURROGATE}}}]}}'),
    ("registry", "POST", "/v1/apply", '{"deployments": [{"name": ["a"]}], "endpoints": [{"name": null}]}'),
    ("registry", "PUT", "/v1/replicas", f'{{"artifacts": {{{SURROGATE}: "a"}}}}'),
    ("autoscaler", "PATCH", "/v1/deployments/0/policy", f'{{"scaling": {{{SURROGATE}: 1}}}}'),
    ("autoscaler", "POST", "/v1/replay", f'{{"deployment": {SURROGATE}}}'),
    ("gateway", "POST", "/v2/repository/index", f'{{"ready": {SURROGATE}}}'),
    ("gateway", "POST", "/v2/models/0/infer", f'{{"inputs": [{{"name": {SURROGATE}}}]}}'),
    ("gateway", "POST", "/v1/jobs", f'{{"model": {SURROGATE}, "inputs": []}}'),
    ("gateway", "POST", "/v1/jobs", f'{{"model": "0", "ttl_s": {DIGITS}, "inputs": []}}'),
    *(
        (service, method, path, body)
        for service, method, path in (
            ("registry", "POST", "/v1/deploy"),
            ("registry", "PATCH", "/v1/deployments/0"),
            ("registry", "POST", "/v1/keys"),
            ("autoscaler", "POST", "/v1/replay"),
            ("gateway", "POST", "/v2/repository/index"),
            ("gateway", "POST", "/v2/models/0/infer"),
            ("gateway", "POST", "/v1/jobs"),
        )
        for body in (DEEP, '{"a":' * 50_000, "\ufeff{}", "null", "5", '"a"', "{", "\x00")
    ),
]
HEADED = [
    ("registry", "PATCH", "/v1/deployments/0", {"If-Match": DIGITS}),
    ("registry", "PATCH", "/v1/deployments/0", {"If-Match": "9" * 30}),
    ("registry", "PUT", "/v1/artifacts", {"X-Request-Id": "a\x7f"}),
    ("registry", "GET", "/v1/keys/table", {"If-None-Match": '"\xff"'}),
    ("registry", "GET", "/v1/models", {"X-Tidegate-Principal": "{" * 1000}),
    ("registry", "GET", "/v1/models", {"X-Tidegate-Principal": "[" * 100_000}),
    ("registry", "GET", "/v1/models", {"X-Tidegate-Principal": '{"id": 1, "name": [], "scopes": 5}'}),
    ("gateway", "GET", "/v1/jobs/" + "0" * 32 + "/events", {"Last-Event-ID": DIGITS}),
    ("gateway", "POST", "/v2/models/0/infer", {"X-Request-Timeout-Ms": "1e400"}),
    ("gateway", "POST", "/v2/models/0/infer", {"X-Request-Timeout-Ms": DIGITS}),
    ("gateway", "POST", "/v2/models/0/generate", {"X-Request-Timeout-Ms": "nan"}),
    ("gateway", "POST", "/v1/jobs", {"X-Job-TTL": "nan"}),
    ("gateway", "POST", "/v1/jobs", {"Idempotency-Key": "\xff"}),
    ("gateway", "POST", "/v1/batches", {"Content-Encoding": "gzip"}),
]


def refused(answer: httpx.Response) -> bool:
    return answer.status_code < 500 or (answer.status_code == 503 and answer.json()["reason"] != "internal")


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize(("service", "method", "path"), PATHS)
def test_control_characters_in_names(services, service, method, path, control):
    for name in (control, f"a{control}", f"{control}a"):
        url = f"{services[service]}{path.format(name)}"
        answer = httpx.request(method, url, headers=HEADERS, timeout=120)
        assert answer.status_code in (400, 404), (url, answer.text)
        assert answer.json()["reason"] in ("bad_request", "not_found")


@pytest.mark.parametrize(("service", "query"), QUERIES)
def test_queries(services, service, query):
    answer = httpx.get(f"{services[service]}{query}", headers=HEADERS, timeout=120)
    assert refused(answer), answer.text


@pytest.mark.parametrize(("service", "method", "path", "body"), BODIES, ids=lambda part: str(part)[:50])
def test_bodies(services, service, method, path, body):
    answer = httpx.request(
        method, f"{services[service]}{path}", headers=HEADERS, content=body.encode(), timeout=120
    )
    assert refused(answer), answer.text[:500]


@pytest.mark.parametrize(("service", "method", "path", "headers"), HEADED, ids=lambda part: str(part)[:50])
def test_headers(services, service, method, path, headers):
    raw = [(name, value.encode("latin-1")) for name, value in (HEADERS | headers).items()]
    content = b"{}" if method in ("POST", "PATCH", "PUT") else None
    answer = httpx.request(method, f"{services[service]}{path}", headers=raw, content=content, timeout=120)
    assert refused(answer), answer.text[:500]
