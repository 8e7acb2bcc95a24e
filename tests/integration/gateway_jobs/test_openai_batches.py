"""OpenAI's files and batches at a gateway: every line exactly one result, whatever is killed."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress

import httpx
import orjson
import pytest

from tests.conftest import PATIENCE_S

pytestmark = pytest.mark.integration

URL = "/v1/completions"


def line(n, prompt=None, **given):
    body = {"model": "chat", "prompt": f"prompt {n}" if prompt is None else prompt}
    return {"custom_id": f"request-{n}", "method": "POST", "url": URL, "body": body} | given


def file_of(lines):
    return b"\n".join(map(orjson.dumps, lines)) + b"\n"


async def upload(http, content, status=200, **fields):
    answer = await http.post(
        "/v1/files", files={"file": ("lines.jsonl", content)}, data={"purpose": "batch"} | fields
    )
    assert answer.status_code == status, answer.text
    return answer.json()


async def create(http, content, status=200, **given):
    file = await upload(http, content)
    wish = {"input_file_id": file["id"], "endpoint": URL, "completion_window": "24h"} | given
    answer = await http.post("/v1/batches", json=wish)
    assert answer.status_code == status, answer.text
    return answer.json()


async def over(http, batch, until, patience_s=5 * PATIENCE_S):
    async def done():
        found = (await http.get(f"/v1/batches/{batch['id']}")).json()
        return found if found["status"] in {"completed", "failed", "expired", "cancelled"} else None

    return await until(done, patience_s=patience_s)


async def rows(http, file_id):
    if file_id is None:
        return []
    answer = await http.get(f"/v1/files/{file_id}/content")
    assert answer.status_code == 200
    return [orjson.loads(row) for row in answer.content.splitlines()]


def blobs_of(gateway):
    return sorted(path for path in (gateway.state / "data" / "blobs").rglob("*") if path.is_file())


async def test_a_file_comes_back_byte_by_byte(http):
    content = b'{"a": 1}\r\n\n  {"b": "\xc3\xa4"}\n{"c": 3}'
    file = await upload(http, content)
    assert (file["object"], file["purpose"], file["filename"], file["status"]) == (
        "file",
        "batch",
        "lines.jsonl",
        "processed",
    )
    assert (file["bytes"], file["id"][:5]) == (len(content), "file-")
    assert (await http.get(f"/v1/files/{file['id']}")).json() == file
    answer = await http.get(f"/v1/files/{file['id']}/content")
    assert answer.content == content
    deleted = (await http.delete(f"/v1/files/{file['id']}")).json()
    assert deleted == {"id": file["id"], "object": "file", "deleted": True}
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        gone = await http.request(method, f"/v1/files/{file['id']}{path}")
        assert gone.status_code == 404
        assert gone.json()["error"]["type"] == "invalid_request_error"


async def test_the_list_of_files(http):
    files = [await upload(http, b"{}\n", **{"expires_after[seconds]": "3600"}) for _ in range(5)]
    assert files[0]["expires_at"] == files[0]["created_at"] + 3600
    ids = [file["id"] for file in files]
    page = (await http.get("/v1/files", params={"limit": 2})).json()
    assert [file["id"] for file in page["data"]] == ids[:2:-1]
    assert (page["object"], page["has_more"], page["last_id"]) == ("list", True, ids[3])
    more = (await http.get("/v1/files", params={"limit": 3, "after": page["last_id"]})).json()
    assert [file["id"] for file in more["data"]] == ids[2::-1]
    first = (await http.get("/v1/files", params={"order": "asc", "after": ids[0], "limit": 2})).json()
    assert [file["id"] for file in first["data"]] == ids[1:3]
    assert (await http.get("/v1/files", params={"purpose": "nothing"})).json()["data"] == []


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        (b"", {}),
        (b"\n \n", {}),
        (b"{}", {"purpose": "fine-tune"}),
        (b"{}", {"expires_after[seconds]": "5"}),
        (b"{}", {"expires_after[anchor]": "birth", "expires_after[seconds]": "3600"}),
        (b"{}", {"purpose": "x" * 5000}),
    ],
)
async def test_refused_uploads_leave_nothing(http, gateway, content, fields):
    before = blobs_of(gateway), (await http.get("/v1/files")).json()
    told = await upload(http, content, 400, **fields)
    assert told["error"]["message"]
    assert (blobs_of(gateway), (await http.get("/v1/files")).json()) == before
    assert gateway.jobs.zcard("tidegate:file:uploads") == 0


async def test_a_body_that_is_no_form(http):
    for content, kind in ((b"{}", "application/json"), (b"--x\r\nbroken", "multipart/form-data; boundary=x")):
        answer = await http.post("/v1/files", content=content, headers={"content-type": kind})
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"


async def unfinished_upload(http):
    """Send the first 4 MB of a file, and no end."""

    async def body():
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        for _ in range(64):
            yield (b"x" * 99 + b"\n") * 656
        await asyncio.sleep(PATIENCE_S)

    kind = {"content-type": "multipart/form-data; boundary=b"}
    with suppress(httpx.TransportError):
        await http.post("/v1/files", content=body(), headers=kind)


async def test_an_upload_that_its_caller_ends_leaves_nothing(http, gateway, until):
    before = blobs_of(gateway)
    task = asyncio.create_task(unfinished_upload(http))
    await until(lambda: len(blobs_of(gateway)) > len(before))
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await until(lambda: blobs_of(gateway) == before)
    await until(lambda: gateway.jobs.zcard("tidegate:file:uploads") == 0)


async def test_limits_of_a_caller(gateways):
    gateway = gateways.start(max_files="100000", max_files_bytes="3000000", max_batch_bytes="2000000")
    async with httpx.AsyncClient(base_url=gateway.url, timeout=120) as http:
        line_ = b"x" * 999 + b"\n"
        assert (await upload(http, line_ * 2100, 413))["error"]["code"] == "request_too_large"
        file = await upload(http, line_ * 1600)
        told = await upload(http, line_ * 1600, 429)
        assert "DELETE /v1/files/ID" in told["error"]["message"]
        await http.delete(f"/v1/files/{file['id']}")
        file = await upload(http, line_ * 1600)
        await http.delete(f"/v1/files/{file['id']}")
    few = gateways.start(max_files="1")
    async with httpx.AsyncClient(base_url=few.url, timeout=120) as http:
        for listed in (await http.get("/v1/files")).json()["data"]:
            await http.delete(f"/v1/files/{listed['id']}")
        await upload(http, b"{}\n")
        await upload(http, b"{}\n", 429)


async def test_every_line_has_one_result_in_order(http, talker, until):
    batch = await create(http, file_of(line(n) for n in range(500)), metadata={"by": "me"})
    assert (batch["object"], batch["status"], batch["endpoint"]) == ("batch", "validating", URL)
    assert (batch["metadata"], batch["completion_window"]) == ({"by": "me"}, "24h")
    assert batch["expires_at"] == pytest.approx(batch["created_at"] + 86_400, abs=1)
    done = await over(http, batch, until)
    assert (done["status"], done["model"], done["errors"]) == ("completed", "chat", None)
    assert done["request_counts"] == {"total": 500, "completed": 500, "failed": 0}
    assert done["error_file_id"] is None
    assert done["in_progress_at"] <= done["finalizing_at"] <= done["completed_at"]
    found = await rows(http, done["output_file_id"])
    assert [row["custom_id"] for row in found] == [f"request-{n}" for n in range(500)]
    assert [row["response"]["body"]["text"] for row in found] == [f"prompt {n}" for n in range(500)]
    assert {row["response"]["status_code"] for row in found} == {200}
    assert len({row["id"] for row in found}) == 500
    assert all(row["error"] is None for row in found)
    output = (await http.get(f"/v1/files/{done['output_file_id']}")).json()
    assert (output["purpose"], output["filename"]) == ("batch_output", f"{batch['id']}_output.jsonl")
    content = (await http.get(f"/v1/files/{output['id']}/content")).content
    assert output["bytes"] == len(content)


async def test_refused_requests_are_in_the_error_file(http, talker, until):
    prompts = {3: "refuse", 7: "refuse"}
    batch = await create(http, file_of(line(n, prompts.get(n)) for n in range(10)))
    done = await over(http, batch, until)
    assert done["request_counts"] == {"total": 10, "completed": 8, "failed": 2}
    good, bad = await rows(http, done["output_file_id"]), await rows(http, done["error_file_id"])
    assert [row["custom_id"] for row in good] == [f"request-{n}" for n in range(10) if n not in prompts]
    assert [row["custom_id"] for row in bad] == ["request-3", "request-7"]
    assert bad[0]["response"]["status_code"] == 400
    assert bad[0]["response"]["body"]["error"]["code"] == "no"
    assert bad[0]["error"] is None


async def test_bad_lines_fail_the_batch_with_their_numbers(http, until):
    lines = [
        line(1),
        line(2, method="GET"),
        line(3, url="/v1/embeddings"),
        line(1),
        line(5, custom_id=""),
        line(6, body={"prompt": "x"}),
        line(7, body={"model": "nothing"}),
        line(8, body={"model": "digits"}),
        line(9, body={"model": "chat", "stream": True}),
        line(10, body=[]),
    ]
    content = file_of(lines[:4]) + b"\n\n" + file_of(lines[4:]) + b"no json\n[1]"
    done = await over(http, await create(http, content), until)
    assert (done["status"], done["output_file_id"], done["error_file_id"]) == ("failed", None, None)
    assert done["failed_at"] is not None
    assert done["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    told = [(error["line"], error["code"], error["param"]) for error in done["errors"]["data"]]
    assert told == [
        (2, "invalid_method", "method"),
        (3, "invalid_url", "url"),
        (4, "duplicate_custom_id", "custom_id"),
        (7, "missing_required_parameter", "custom_id"),
        (8, "missing_required_parameter", "body.model"),
        (9, "model_not_found", "body.model"),
        (10, "model_not_found", "body.model"),
        (11, "invalid_request", "body.stream"),
        (12, "missing_required_parameter", "body"),
        (13, "invalid_json_line", None),
        (14, "invalid_json_line", None),
    ]


@pytest.mark.parametrize(
    "given",
    [
        {"endpoint": "/v1/audio"},
        {"completion_window": "soon"},
        {"completion_window": "31d"},
        {"input_file_id": 5},
        {"metadata": {"a": 1}},
        {"metadata": {str(n): "" for n in range(17)}},
    ],
)
async def test_bad_batches_are_refused_at_once(http, given):
    told = await create(http, file_of([line(0)]), 400, **given)
    assert told["error"]["type"] == "invalid_request_error"


async def test_unknown_ids(http):
    await create(http, b"{}\n", 404, input_file_id=f"file-{'0' * 32}")
    for method, path in (
        ("GET", f"batch_{'0' * 32}"),
        ("GET", "batch_5"),
        ("POST", f"batch_{'0' * 32}/cancel"),
        ("GET", f"batch_{'0' * 32}/results"),
    ):
        assert (await http.request(method, f"/v1/batches/{path}")).status_code == 404, path


async def test_a_cancelled_batch_has_a_result_for_each_line(http, talker, until):
    talker.open.clear()
    batch = await create(http, file_of(line(n) for n in range(50)))
    await until(lambda: talker.frames)
    answer = (await http.post(f"/v1/batches/{batch['id']}/cancel")).json()
    assert answer["status"] == "cancelling"
    assert answer["cancelling_at"] is not None
    done = await over(http, batch, until)
    assert (done["status"], done["output_file_id"]) == ("cancelled", None)
    assert done["cancelled_at"] is not None
    bad = await rows(http, done["error_file_id"])
    assert [row["custom_id"] for row in bad] == [f"request-{n}" for n in range(50)]
    assert {row["error"]["code"] for row in bad} == {"batch_cancelled"}
    again = await http.post(f"/v1/batches/{batch['id']}/cancel")
    assert (again.status_code, again.json()["status"]) == (200, "cancelled")


async def test_a_batch_ends_with_its_window(http, talker, until):
    talker.open.clear()
    batch = await create(http, file_of(line(n) for n in range(20)), completion_window="2s")
    done = await over(http, batch, until)
    assert done["status"] == "expired"
    assert done["expired_at"] is not None
    bad = await rows(http, done["error_file_id"])
    assert [row["custom_id"] for row in bad] == [f"request-{n}" for n in range(20)]
    assert {row["error"]["code"] for row in bad} == {"batch_expired"}


async def test_a_file_that_a_batch_reads_stays(http, talker, until):
    talker.open.clear()
    batch = await create(http, file_of([line(0)]))
    path = f"/v1/files/{batch['input_file_id']}"
    refused = await http.delete(path)
    assert refused.status_code == 409
    assert batch["id"] in refused.json()["error"]["message"]
    talker.open.set()
    done = await over(http, batch, until)
    assert (await http.delete(path)).json()["deleted"]
    assert (await http.delete(f"/v1/files/{done['output_file_id']}")).json()["deleted"]
    assert (await http.get(f"/v1/batches/{batch['id']}")).json()["status"] == "completed"


async def test_both_kinds_of_batches_have_one_path(http, worker, talker, until):
    """A client of one kind sees none of the other's batches."""
    tensors = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
    kinds = [{}, {"content-type": "application/json"}, {"content-type": "application/x-ndjson"}]
    own = []
    for headers in kinds:
        for content in (orjson.dumps(tensors), file_of([tensors] * 3000)):
            answer = await http.post(
                "/v1/batches", params={"model": "digits"}, content=content, headers=headers
            )
            assert answer.status_code == 202, answer.text
            own.append(answer.json()["id"])
    theirs = [(await create(http, file_of([line(0)])))["id"] for _ in range(3)]
    listed = (await http.get("/v1/batches", params={"limit": 2})).json()
    assert [item["id"] for item in listed["items"]] == own[:-3:-1]
    assert [item["id"] for item in listed["data"]] == theirs[:0:-1]
    assert (listed["object"], listed["has_more"], listed["last_id"]) == ("list", True, theirs[1])
    after = (await http.get("/v1/batches", params={"limit": 1, "after": theirs[1]})).json()
    assert ([item["id"] for item in after["data"]], after["items"]) == ([theirs[0]], [])
    older = (await http.get("/v1/batches", params={"limit": 2, "cursor": listed["next"]})).json()
    assert ([item["id"] for item in older["items"]], older["data"]) == (own[-3:-5:-1], [])
    for id_ in own:
        assert (await http.post(f"/v1/batches/{id_}/cancel")).status_code == 202
    for id_ in theirs:
        await over(http, {"id": id_}, until)


async def test_another_gateway_continues_the_batch_of_a_killed_one(gateways, gateway, talker, until):
    """Every line has exactly one result, also if the gateway is killed in the middle."""
    doomed = gateways.start()
    async with httpx.AsyncClient(base_url=doomed.url, timeout=120) as http:
        talker.open.clear()
        batch = await create(http, file_of(line(n) for n in range(2000)))
        await until(lambda: len(talker.frames) >= 100)
    doomed.process.kill()
    doomed.process.wait()
    talker.open.set()
    async with httpx.AsyncClient(base_url=gateway.url, timeout=120) as http:
        done = await over(http, batch, until)
        assert done["request_counts"] == {"total": 2000, "completed": 2000, "failed": 0}
        found = await rows(http, done["output_file_id"])
    counts = Counter(row["custom_id"] for row in found)
    assert [row["custom_id"] for row in found] == [f"request-{n}" for n in range(2000)]
    assert set(counts.values()) == {1}
    jobs = {row["response"]["request_id"] for row in found}
    assert len(jobs) == 2000
    print(f"{len(found)} lines, {len(counts)} results, each once, {len(jobs)} jobs")
