"""The client openai, unmodified: files and batches."""

from __future__ import annotations

import io
import json
import time

import openai
from report import MODEL, NO_KEY, OPENAI_URL, QUESTION, main, refused

client = openai.OpenAI(base_url=OPENAI_URL, api_key=NO_KEY, max_retries=0)
CHAT = "/v1/chat/completions"
PATIENCE_S = 1200
PROMPTS = 20


def lines(count: int, **given) -> bytes:
    requests = [
        {
            "custom_id": f"prompt-{n}",
            "method": "POST",
            "url": CHAT,
            "body": {"model": MODEL, "messages": QUESTION, "max_tokens": 1 + n % 4, "temperature": 0} | given,
        }
        for n in range(count)
    ]
    return "".join(json.dumps(request) + "\n" for request in requests).encode()


def upload(content: bytes):
    return client.files.create(file=("prompts.jsonl", io.BytesIO(content)), purpose="batch")


def begun(content: bytes, **given):
    file = upload(content)
    return client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"by": "a test"}, **given
    )


def ended(batch):
    end = time.monotonic() + PATIENCE_S
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < end, f"the batch does not end: {batch}"
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    return batch


def check_files():
    content = lines(3)
    file = upload(content)
    assert (file.object, file.purpose, file.bytes) == ("file", "batch", len(content))
    assert client.files.retrieve(file.id).filename == "prompts.jsonl"
    assert client.files.content(file.id).content == content
    assert file.id in [each.id for each in client.files.list()]
    assert client.files.delete(file.id).deleted
    assert refused(openai.NotFoundError, lambda: client.files.retrieve(file.id)).code == "no_such_file"


def check_a_batch():
    batch = begun(lines(PROMPTS))
    assert (batch.object, batch.endpoint, batch.metadata) == ("batch", CHAT, {"by": "a test"})
    assert batch.id in [each.id for each in client.batches.list(limit=100)]
    batch = ended(batch)
    assert batch.status == "completed", batch
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (PROMPTS, PROMPTS, 0)
    rows = [json.loads(row) for row in client.files.content(batch.output_file_id).text.splitlines()]
    assert [row["custom_id"] for row in rows] == [f"prompt-{n}" for n in range(PROMPTS)]
    for n, row in enumerate(rows):
        answer = row["response"]["body"]
        assert row["response"]["status_code"] == 200
        assert (answer["object"], answer["model"]) == ("chat.completion", MODEL)
        assert 0 < answer["usage"]["completion_tokens"] <= 1 + n % 4
    assert batch.error_file_id is None
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"


def check_a_batch_that_is_cancelled():
    batch = begun(lines(40, max_tokens=64))
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = ended(batch)
    assert batch.status == "cancelled"
    assert batch.cancelled_at >= batch.cancelling_at
    files = [each for each in (batch.output_file_id, batch.error_file_id) if each is not None]
    rows = [json.loads(row) for each in files for row in client.files.content(each).text.splitlines()]
    assert sorted(row["custom_id"] for row in rows) == sorted(f"prompt-{n}" for n in range(40))


def check_bad_lines():
    batch = ended(begun(lines(2) + lines(1) + b"no json\n" + lines(1, model="nothing").replace(b"-0", b"-9")))
    assert batch.status == "failed"
    told = [(error.line, error.code) for error in batch.errors.data]
    assert told == [(3, "duplicate_custom_id"), (4, "invalid_json_line"), (5, "model_not_found")]


def check_errors_of_batches():
    refused(openai.NotFoundError, lambda: client.batches.retrieve("batch_" + "0" * 32))
    error = refused(
        openai.BadRequestError,
        lambda: client.batches.create(
            input_file_id="file-" + "0" * 32, endpoint=CHAT, completion_window="soon"
        ),
    )
    assert "completion_window" in error.message


def check_a_request_that_runs_as_a_job():
    headers = {"Prefer": "wait=300"}
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=4, extra_headers=headers
    )
    assert answer.model == MODEL
    assert answer.choices[0].message.content is not None
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=QUESTION, max_tokens=4, extra_headers={"Prefer": "respond-async"}
    )
    assert raw.status_code == 202
    assert raw.headers["location"].startswith("/v1/jobs/")
    stream = {"model": MODEL, "messages": QUESTION, "stream": True, "extra_headers": headers}
    refused(openai.BadRequestError, lambda: client.chat.completions.create(**stream))


if __name__ == "__main__":
    main()
