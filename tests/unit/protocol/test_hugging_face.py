"""Hugging Face folders: what they do, and how they are run."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import hugging_face
from tidegate.kernel.protocol.hugging_face import HuggingFacePlan
from tidegate.kernel.protocol.hugging_face_task import task_of_config

pytestmark = pytest.mark.unit

TEXT = {
    "architectures": ["DistilBertForSequenceClassification"],
    "id2label": {"0": "NEGATIVE", "1": "POSITIVE"},
}
IMAGE = {"architectures": ["ViTForImageClassification"], "id2label": {"1": "dog", "0": "cat"}}
SENTENCES = {"architectures": ["BertModel"], "hidden_size": 384, "max_position_embeddings": 512}
WEIGHTS = ("model.safetensors", "tokenizer.json")
MODULES = [
    {"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Normalize")
]


def plan(
    config: dict[str, Any], *files: str, allow_pickle: bool = False, texts: Any = None
) -> HuggingFacePlan:
    contents = {"config.json": json.dumps(config)}
    contents |= {name: json.dumps(value) for name, value in (texts or {}).items()}
    return hugging_face.plan(contents, [*contents, *(files or WEIGHTS)], allow_pickle=allow_pickle)


@pytest.mark.parametrize(
    ("architecture", "files", "task"),
    [
        ("BertForSequenceClassification", [], "text-classification"),
        ("ResNetForImageClassification", [], "image-classification"),
        ("MPNetModel", [], "embeddings"),
        ("MPNetForMaskedLM", ["modules.json"], "embeddings"),
        ("XLMRobertaForSequenceClassification", ["modules.json"], "text-classification"),
        ("LlamaForCausalLM", [], None),
        ("GPT2LMHeadModel", [], None),
        ("T5ForConditionalGeneration", [], None),
        ("BertForTokenClassification", [], None),
    ],
)
def test_the_architecture_says_what_a_folder_does(
    architecture: str, files: list[str], task: str | None
) -> None:
    assert task_of_config({"architectures": [architecture]}, files) == task


@pytest.mark.parametrize("architectures", [None, [], "BertModel", {}])
def test_a_folder_without_an_architecture_is_left_to_language_models(architectures: Any) -> None:
    assert task_of_config({"architectures": architectures}, []) is None


def test_a_text_classifier() -> None:
    found = plan(TEXT, texts={"tokenizer_config.json": {"model_max_length": 10**30}})
    assert (found.engine, found.labels, found.activation) == ("torch", ("NEGATIVE", "POSITIVE"), "softmax")
    assert found.max_tokens == 512
    signature = hugging_face.signature_of(found, 32)
    assert [(t.name, t.optional) for t in signature.inputs] == [("text", False), ("text_pair", True)]
    assert [(t.name, t.shape) for t in signature.outputs] == [("label", []), ("score", []), ("scores", [2])]
    assert hugging_face.requirements_of(found) == ["torch", "transformers"]


def test_an_exported_graph_needs_neither_torch_nor_the_weights() -> None:
    found = plan(TEXT, "onnx/model.onnx", "tokenizer.json")
    assert (found.engine, found.file) == ("onnx", "onnx/model.onnx")
    assert hugging_face.requirements_of(found) == ["tokenizers"]
    with pytest.raises(BadRequest, match=r"no tokenizer\.json"):
        plan(TEXT, "onnx/model.onnx", "vocab.txt")


def test_an_image_classifier_has_its_labels_in_order() -> None:
    found = plan(IMAGE, "model.safetensors", "preprocessor_config.json")
    assert found.labels == ("cat", "dog")
    assert [t.name for t in hugging_face.signature_of(found, 8).inputs] == ["image"]
    assert hugging_face.requirements_of(found) == ["torch", "transformers", "pillow"]
    with pytest.raises(BadRequest, match=r"no preprocessor_config\.json"):
        plan(IMAGE, "model.safetensors")


def test_an_unknown_image_processor_needs_transformers() -> None:
    files = ("onnx/model.onnx", "preprocessor_config.json")
    plain = {"preprocessor_config.json": {"image_processor_type": "ViTImageProcessorFast"}}
    assert plan(IMAGE, *files, texts=plain).engine == "onnx"
    other = {"preprocessor_config.json": {"image_processor_type": "LevitImageProcessor"}}
    assert plan(IMAGE, *files, "model.safetensors", texts=other).engine == "torch"
    with pytest.raises(BadRequest, match="needs transformers"):
        plan(IMAGE, *files, texts=other)


def test_sentence_embeddings_are_pooled_as_the_folder_says() -> None:
    texts = {
        "modules.json": MODULES,
        "1_Pooling/config.json": {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
    }
    found = plan(SENTENCES, texts=texts)
    assert (found.task, found.pooling, found.normalize) == ("embeddings", "mean", True)
    assert (found.max_tokens, found.size) == (256, 384)
    assert hugging_face.signature_of(found, 8).outputs[0].shape == [384]
    found = plan(SENTENCES, texts=(texts | {"1_Pooling/config.json": {"pooling_mode": "cls"}}))
    assert found.pooling == "cls"
    with pytest.raises(BadRequest, match="pooling 'weighted'"):
        plan(SENTENCES, texts=(texts | {"1_Pooling/config.json": {"pooling_mode": "weighted"}}))
    with pytest.raises(BadRequest, match=r"module sentence_transformers\.models\.Dense"):
        plan(SENTENCES, texts=(texts | {"modules.json": [{"type": "sentence_transformers.models.Dense"}]}))


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        ({"problem_type": "multi_label_classification"}, "sigmoid"),
        ({"problem_type": "regression"}, "none"),
        ({"id2label": {"0": "relevance"}}, "sigmoid"),
        ({}, "softmax"),
    ],
)
def test_scores_follow_as_in_the_pipelines_of_transformers(config: dict[str, Any], activation: str) -> None:
    assert plan(TEXT | config).activation == activation


def test_pickled_weights_need_the_permission() -> None:
    with pytest.raises(BadRequest, match="--allow-pickle"):
        plan(TEXT, "pytorch_model.bin", "tokenizer.json")
    assert plan(TEXT, "pytorch_model.bin", "tokenizer.json", allow_pickle=True).engine == "torch"
    with pytest.raises(BadRequest, match=r"no weights.*git lfs pull"):
        plan(TEXT, "tokenizer.json")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "not JSON"),
        ("config.json", "[]", "not a JSON object"),
        ("config.json", '{"architectures": ["BertForTokenClassification"]}', "Python file"),
        ("modules.json", "{}", "not a list of modules"),
        ("config.json", json.dumps(TEXT | {"id2label": {"a": "b"}}), "does not number the labels"),
    ],
)
def test_a_bad_folder_says_what_is_wrong(name: str, text: str, message: str) -> None:
    texts = {"config.json": json.dumps(TEXT), name: text}
    with pytest.raises(BadRequest, match=message):
        hugging_face.plan(texts, [*texts, *WEIGHTS], allow_pickle=False)


NAMES = st.sampled_from([
    "architectures", "id2label", "num_labels", "problem_type", "hidden_size", "max_position_embeddings",
    "max_seq_length", "model_max_length", "pooling_mode", "do_lower_case", "image_processor_type",
])  # fmt: skip
VALUES = (
    st.none() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.text(max_size=8), max_size=2)
)
OBJECTS = st.dictionaries(
    NAMES, VALUES | st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=6
)


@pytest.mark.fuzz
@given(st.sampled_from([TEXT, IMAGE, SENTENCES]), OBJECTS, OBJECTS, OBJECTS)
def test_any_configuration_is_read_or_refused(known: Any, config: Any, tokenizer: Any, pooling: Any) -> None:
    texts = {"tokenizer_config.json": tokenizer, "1_Pooling/config.json": pooling, "modules.json": MODULES}
    with contextlib.suppress(BadRequest):
        hugging_face.signature_of(
            plan({**config, **known, **config}, "preprocessor_config.json", *WEIGHTS, texts=texts), 8
        )
