"""How a replica runs a language model: engine, packages and sizes."""

from __future__ import annotations

import json
import shutil
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from services.worker.adapters import llm_repository
from services.worker.domain import llm_plan
from services.worker.domain.concurrency import call_limits
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol import llm
from tidegate.kernel.protocol.gguf import GgufHeader
from tidegate.kernel.protocol.models import Deployment, Resources, Version

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


def on_gpus(engine: str = "auto", **resources: Any) -> Deployment:
    return deployment(engine=engine).model_copy(update={"resources": Resources(**resources)})


def test_a_build_of_llamacpp_for_the_cpu_does_not_pretend_to_use_a_gpu():
    with pytest.raises(ModelFailed, match=r"runs on the CPU only.*--requirements"):
        llm_plan.usable_gpus(version(), on_gpus(gpus=1), (0,))
    assert llm_plan.usable_gpus(version(), on_gpus(gpus=1, allow_cpu=True), (0,)) == ()
    own = version(requirements=["xllamacpp @ https://example.org/xllamacpp-cuda.whl"])
    assert llm_plan.usable_gpus(own, on_gpus(gpus=1), (0,)) == (0,)
    assert llm_plan.usable_gpus(version("m.tar"), on_gpus(gpus=2), (0, 1)) == (0, 1), "vLLM"
    assert llm_plan.usable_gpus(version(), on_gpus(), ()) == ()


def copied(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def test_vllm_takes_only_its_share_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command `nvidia-smi` is a made up one."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho GPU-aa, 24564\necho GPU-bb, 81559\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bb")
    archive, folder = tmp_path / "m.tar", tmp_path / "m"
    model = tmp_path / "config.json"
    model.write_text("{}")
    with tarfile.open(archive, "w") as file:
        file.add(model, "config.json")
    served = on_gpus(gpu_memory_mb=20_000)
    llm_repository.prepare(version("m.tar"), served, archive, folder, (0,), copied)
    assert json.loads((folder / "1" / llm_repository.PLAN).read_text())["gpu_share"] == 0.245
    tool.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(ModelFailed, match="nvidia-smi"):
        llm_repository.prepare(version("m.tar"), served, archive, tmp_path / "n", (0,), copied)
