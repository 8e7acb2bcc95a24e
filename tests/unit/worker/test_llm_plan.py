"""How a replica runs a language model: engine, packages and sizes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from services.worker.domain import llm_plan
from services.worker.domain.concurrency import call_limits
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol import llm
from tidegate.kernel.protocol.gguf import GgufHeader
from tidegate.kernel.protocol.models import Deployment, Version

pytestmark = pytest.mark.unit

HEADER = GgufHeader({"general.architecture": "llama", "llama.context_length": 131072}, 0)


def version(filename: str = "m.gguf", requirements: list[str] | None = None) -> Version:
    return Version(
        model="m", number=1, format="llm", artifact_sha256="0" * 64, artifact_size=1, filename=filename,
        signature=llm.SIGNATURE, requirements=requirements or [], created_at=datetime.now(UTC),
    )  # fmt: skip


def deployment(**fields: Any) -> Deployment:
    own = {"max_concurrency": fields.pop("max_concurrency", None), "llm": fields or None}
    return Deployment(name="m-v1", model="m", version=1, revision=1, created_at=datetime.now(UTC), **own)


@pytest.mark.parametrize(
    ("filename", "engine", "found"),
    [
        ("m.gguf", "auto", "llamacpp"),
        ("weights.bin", "auto", "llamacpp"),
        ("m.gguf.tar", "auto", "llamacpp"),
        ("m.tar", "auto", "vllm"),
        ("m.tar.gz", "vllm", "vllm"),
        ("m.gguf", "vllm", "vllm"),
    ],
)
def test_engine_by_file_and_deployment(filename: str, engine: str, found: str):
    assert llm_plan.engine_of(version(filename), deployment(engine=engine)) == found


def test_llamacpp_reads_no_hugging_face_folder():
    with pytest.raises(ModelFailed, match="convert_hf_to_gguf"):
        llm_plan.engine_of(version("m.tar"), deployment(engine="llamacpp"))


def test_the_engines_package_is_added_unless_the_version_names_it():
    assert llm_plan.requirements(version(), deployment()) == [llm_plan.LLAMACPP]
    assert llm_plan.requirements(version(requirements=["xllamacpp<2027"]), deployment()) == ["xllamacpp<2027"]
    assert llm_plan.requirements(version("m.tar"), deployment()) == []
    other = version().model_copy(update={"format": "onnx"})
    assert llm_plan.requirements(other, deployment()) == []


@pytest.mark.parametrize(
    ("fields", "header", "sizes"),
    [
        ({}, HEADER, (8192, 8192)),  # the model's context, up to the default
        ({"slots": 16}, HEADER, (8192, 16 * 2048)),
        ({"context": 4096, "slots": 8}, HEADER, (4096, 8 * 4096)),
        ({"context": 4096, "slots": 8, "kv_tokens": 9000}, HEADER, (4096, 9000)),
        ({"slots": 2}, GgufHeader({"general.architecture": "x", "x.context_length": 1024}, 0), (1024, 2048)),
        ({}, None, (8192, 8192)),
    ],
)
def test_context_and_size_of_the_kv_cache(fields: dict[str, Any], header: GgufHeader | None, sizes: tuple):
    plan = llm_plan.plan(version(), deployment(**fields), "model.gguf", header)
    assert (plan["context"], plan["kv_total"]) == sizes
    assert plan["weights"] == "model.gguf"


def test_the_file_to_load_from_an_archive():
    assert llm_plan.main_weights(["readme.md", "m.gguf"]) == "m.gguf"
    assert (
        llm_plan.main_weights(["m-00002-of-00002.gguf", "m-00001-of-00002.gguf"]) == "m-00001-of-00002.gguf"
    )
    with pytest.raises(ModelFailed, match="exactly one"):
        llm_plan.main_weights(["a.gguf", "b.gguf"])


def test_a_worker_holds_at_most_the_engines_slots():
    assert call_limits(deployment(), llm.SIGNATURE, 1).streams == 4
    assert call_limits(deployment(slots=32), llm.SIGNATURE, 1).streams == 32
    assert call_limits(deployment(slots=32, max_concurrency=8), llm.SIGNATURE, 1).streams == 8
