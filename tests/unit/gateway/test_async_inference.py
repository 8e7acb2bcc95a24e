"""Where inputs of asynchronous inference may lie, and its options."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.gateway.adapters.async_store import AsyncStore
from services.gateway.domain.async_inference import (
    DEFAULT_TTL_S,
    FOLDER,
    AnswerPlan,
    inference_id,
    key_of,
    output_key,
    ttl_s,
)
from tidegate.kernel.errors import BadRequest, NotFound

pytestmark = pytest.mark.unit

ROOT = "s3://bucket/async"


def test_an_input_lies_below_the_store() -> None:
    assert key_of(f"{ROOT}/team/rows.json", ROOT) == "team/rows.json"


@pytest.mark.parametrize(
    "location",
    [
        "", ROOT, f"{ROOT}/", "s3://bucket/asynchronous/x", "s3://other/async/x", "file:///etc/passwd",
        f"{ROOT}/../x", f"{ROOT}/a/../../x", f"{ROOT}//x", f"{ROOT}/./x", f"{ROOT}/a\n",
        f"{ROOT}/{'a' * 1100}",
        f"{ROOT}/{output_key('ab')}", f"{ROOT}/{FOLDER}",
    ],
)  # fmt: skip
def test_other_places_are_refused(location: str) -> None:
    with pytest.raises(BadRequest, match="InputLocation"):
        key_of(location, ROOT)


def test_the_time_to_live() -> None:
    assert (ttl_s(""), ttl_s("60"), ttl_s("21600")) == (DEFAULT_TTL_S, 60, 21_600)
    for text in ("59", "21601", "x", "-1", "1.5", "9" * 30, "000000060" + "9" * 9):
        with pytest.raises(BadRequest, match="RequestTTLSeconds"):
            ttl_s(text)


def test_ids() -> None:
    assert (inference_id("mine", "job"), inference_id("", "job")) == ("mine", "job")
    for text in ("a b", "a" * 65, "ü"):
        with pytest.raises(BadRequest, match="InferenceId"):
            inference_id(text, "job")


def test_the_plan_is_part_of_the_jobs_record() -> None:
    plan = AnswerPlan("text/csv", rows=False)
    assert AnswerPlan.from_ask(plan.to_ask()) == plan
    assert AnswerPlan.from_ask({}) == AnswerPlan("", rows=True)


async def test_inputs_in_a_folder_are_plain_files_below_it(tmp_path: Path) -> None:
    root, secret = tmp_path / "store", tmp_path / "secret"
    root.mkdir()
    secret.write_bytes(b"secret")
    (root / "input").write_bytes(b"rows")
    (root / "link").symlink_to(secret)
    (root / "there").symlink_to(tmp_path)
    (root / "same").symlink_to("input")
    os.mkfifo(root / "pipe")
    store = AsyncStore(f"file://{root}")
    assert [await store.read(key, 100) for key in ("input", "same")] == [b"rows", b"rows"]
    for key in ("link", "there/secret", "pipe", "missing"):
        with pytest.raises(NotFound, match=f"the input .*{key} does not exist"):
            await store.read(key, 100)
