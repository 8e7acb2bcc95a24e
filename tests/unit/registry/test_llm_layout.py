"""The files of a language model in an archive."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from services.registry.domain import formats, llm_layout
from tidegate.kernel.errors import BadRequest

pytestmark = pytest.mark.unit

FOLDER = ["config.json", "tokenizer.json", "model.safetensors"]
INDEX = '{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}'


def paths(names: list[str]) -> list[PurePosixPath]:
    return [PurePosixPath(name) for name in names]


def check(names: list[str], *, allow_pickle: bool = False, config: str = "{}") -> None:
    contents = {"config.json": config, "model.safetensors.index.json": INDEX}
    found = {PurePosixPath(name): contents[name] for name in names if name in contents}
    llm_layout.check(paths(names), found, allow_pickle=allow_pickle)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (FOLDER, True),
        (["m.gguf", "adapters/a.gguf"], True),
        (["config.pbtxt", "1/model.onnx"], False),
        (["deep/config.json", "deep/tokenizer.json"], False),
        (["config.json", "model.bin"], False),
    ],
)
def test_what_is_a_language_model(names: list[str], found: bool):
    assert llm_layout.is_llm(paths(names)) is found


def test_complete_models_are_accepted():
    check(FOLDER)
    check(["m.GGUF", "adapters/x.gguf"])
    check(["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"])
    check(["config.json", "tokenizer.model", "pytorch_model.bin"], allow_pickle=True)
    sharded = ["model.safetensors.index.json", "m-1.safetensors", "m-2.safetensors"]
    check(["config.json", "tokenizer.json", *sharded])


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["readme.md"], "Pack the folder's contents"),
        (["config.json", "model.safetensors"], "no tokenizer"),
        (["config.json", "tokenizer.json"], "no weights.*git lfs pull"),
        (["config.json", "tokenizer.json", "pytorch_model.bin"], "--allow-pickle"),
        (
            ["config.json", "tokenizer.json", "model.safetensors.index.json", "m-1.safetensors"],
            "Missing: 1, for example m-2.safetensors",
        ),
        (["a.gguf", "b.gguf"], "several GGUF"),
        (["m-00001-of-00003.gguf", "m-00002-of-00003.gguf"], "split into 3"),
    ],
)
def test_incomplete_models_are_refused_with_the_remedy(names: list[str], says: str):
    with pytest.raises(BadRequest, match=says):
        check(names)


def test_the_configuration_must_be_json():
    with pytest.raises(BadRequest, match=r"config\.json of the language model is not JSON"):
        check(FOLDER, config="{")


def test_formats_by_name():
    assert formats.format_by_name("SmolLM2.gguf") == formats.format_by_name("x.gguf.tar") == "llm"
    assert formats.format_by_name("m.tar") == "triton"
