"""Packing and describing language models for ``tidegate deploy``."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from services.registry.domain.merge import patched
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.llm_options import adapter_files, llm_fields, upstream_artifact, value_of
from tidegate.cli.llm_packages import is_hugging_face
from tidegate.cli.package import format_of, packed

pytestmark = pytest.mark.unit


def folder(at: Path, *names: str) -> Path:
    for name in names:
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(b"GGUF" if name.endswith(".gguf") else b"{}")
    return at


def contents(path: Path, adapters: dict[str, Path] | None = None) -> tuple[str, str | None, list[str]]:
    with packed(path, adapters) as package:
        package.file.seek(0)
        with tarfile.open(fileobj=package.file) as tar:
            return package.filename, package.format, tar.getnames()


def test_a_folder_with_gguf_files_is_not_for_vllm(tmp_path: Path):
    weights = folder(tmp_path / "hf", "config.json", "tokenizer.json", "model.safetensors")
    assert is_hugging_face(weights)
    assert not is_hugging_face(folder(tmp_path / "gguf", "config.json", "tokenizer.json", "m.gguf"))
    assert not is_hugging_face(weights / "config.json")


def test_a_gguf_file_is_recognised_by_its_first_bytes(tmp_path: Path):
    for name in ("m.gguf", "weights.bin"):
        (tmp_path / name).write_bytes(b"GGUF....")
        with packed(tmp_path / name) as package:
            assert (package.filename, package.format, package.size) == (name, "llm", 8)


def test_a_hugging_face_folder_has_only_what_engines_read(tmp_path: Path):
    names = ["config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", ".git/config"]
    found = contents(folder(tmp_path / "smol", *names))
    assert found == ("smol.tar", "llm", ["config.json", "model.safetensors", "tokenizer.json"])


def test_adapters_are_packed_beside_the_model(tmp_path: Path):
    at = folder(tmp_path, "m.gguf", "my.gguf", "peft/adapter_config.json")
    name, kind, names = contents(at / "m.gguf", {"tone": at / "my.gguf", "law": at / "peft"})
    assert (name, kind) == ("m.gguf.tar", "llm")
    assert names == ["adapters/law/adapter_config.json", "adapters/tone.gguf", "m.gguf"]
    with pytest.raises(UsageError, match="does not exist"):
        contents(at / "m.gguf", {"x": at / "missing.gguf"})


def test_other_folders_keep_their_format(tmp_path: Path):
    assert format_of(folder(tmp_path / "a", "model.py", "config.json", "tokenizer.json")) == "python"
    assert format_of(folder(tmp_path / "b", "config.pbtxt", "config.json", "tokenizer.json")) == "triton"
    assert format_of(folder(tmp_path / "c", "m.gguf")) == "llm"


def test_options_become_fields_of_the_deployment(tmp_path: Path):
    adapters = adapter_files([f"tone={tmp_path / 'x.gguf'}"])
    arguments = ["n_batch=256", "warmup=false", "rope_freq_base=1e4", "cache_type_k=q8_0"]
    found = llm_fields(engine="llamacpp", slots=8, context=None, arguments=arguments, adapters=adapters)
    assert found is not None
    assert {key: value for key, value in found.items() if value is not None} == {
        "engine": "llamacpp", "slots": 8, "adapters": {"tone": "adapters/tone.gguf"},
        "arguments": {"n_batch": 256, "warmup": False, "rope_freq_base": 1e4, "cache_type_k": "q8_0"},
    }  # fmt: skip
    none = {"engine": None, "slots": None, "context": None, "arguments": None}
    assert llm_fields(**none, adapters={}) is None
    assert llm_fields(**none, adapters={}, affinity_wait_ms=0.0) == {"affinity_wait_ms": 0.0}
    with pytest.raises(UsageError, match="choose one of auto"):
        llm_fields(engine="ollama", slots=None, context=None, arguments=None, adapters={})


def test_an_address_alone_makes_an_upstream_and_another_engine_forgets_it():
    upstream = {"upstream": "https://models.example/v1", "credential": None, "region": "eu"}
    none: dict[str, Any] = {"slots": None, "context": None, "arguments": None, "adapters": {}}
    assert llm_fields(engine=None, **none, upstream=upstream) == {
        "engine": "openai-url", "slots": 64, "upstream": "https://models.example/v1", "region": "eu",
    }  # fmt: skip
    back = llm_fields(engine="vllm", **none, upstream={})
    assert back is not None
    assert back["upstream"] is back["credential"] is None, "a null restores the default"
    assert patched({"llm": {"upstream": "https://x"}}, {"llm": back}) == {"llm": {"engine": "vllm"}}


def test_a_new_credential_forgets_the_header_of_the_last_one():
    none: dict[str, Any] = {"engine": None, "slots": None, "context": None, "arguments": None, "adapters": {}}
    far = {"upstream": "https://far/v1", "credential": "env:FAR_API_KEY"}
    found = llm_fields(**none, upstream=far)
    assert found is not None
    assert patched({"llm": {"credential_header": "api-key"}}, {"llm": found})["llm"].keys() == {
        "engine", "slots", "upstream", "credential",
    }  # fmt: skip
    found = llm_fields(**none, upstream={**far, "credential_header": "api-key"})
    assert found is not None
    assert found["credential_header"] == "api-key"


@pytest.mark.parametrize("header", ["api-key: sk-secret", "Host", "content-type", "a b", "-a", "api-key\n"])
def test_a_header_that_cannot_carry_a_credential_is_not_repeated(header: str):
    far = {"upstream": "https://far/v1", "credential": "env:FAR_API_KEY", "credential_header": header}
    with pytest.raises(UsageError, match="--credential-header takes the name") as refused:
        llm_fields(engine=None, slots=None, context=None, arguments=None, adapters={}, upstream=far)
    assert "sk-secret" not in str(refused.value)


def test_the_artifact_of_an_upstream_is_deleted_after_the_upload():
    with upstream_artifact("https://models.example/v1", "m") as path:
        assert json.loads(path.read_text()) == {"upstream": "https://models.example/v1", "model": "m"}
    assert not path.exists()


def test_values_of_arguments():
    assert [value_of(text) for text in ("1", "-2.5", "TRUE", "q8_0", "")] == [1, -2.5, True, "q8_0", ""]
