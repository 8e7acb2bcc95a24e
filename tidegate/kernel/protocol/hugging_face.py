"""Decide how to run a Hugging Face model that classifies texts or images, or that embeds texts. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.hugging_face_task import CONFIG, MODULES, ONNX, Task, task_of_config
from tidegate.kernel.protocol.models import Signature, TensorSpec

Engine = Literal["onnx", "torch"]

SENTENCES, TOKENIZER = "sentence_bert_config.json", "tokenizer_config.json"
POOLING = "1_Pooling/config.json"
IMAGES = "preprocessor_config.json"
# The names of the files that :func:`plan` reads, without their folders.
TEXTS = frozenset({CONFIG, MODULES, SENTENCES, TOKENIZER, IMAGES})
# Image processors that the runtime for ONNX files implements. Other processors need transformers.
_PLAIN_IMAGES = frozenset({"ViT", "DeiT", "CLIP", "Bit", "MobileNetV2", "PoolFormer", "ConvNext"})
MAX_TEXT = 4 * 1024 * 1024
_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_tokens": "mean",
}
_MAX_LABELS = 100_000
_LONGEST = 100_000  # a number in the folder's JSON files that is not below this limit is treated as unknown
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class HuggingFacePlan:
    """The plan to run a Hugging Face folder.

    ``labels``: the labels of a classifier, in the order of its scores.
    ``activation``: the function from the model's output to scores: softmax, sigmoid or none.
    ``size``: the length of an embedding; -1: unknown.
    """

    task: Task
    engine: Engine
    file: str = ""
    labels: tuple[str, ...] = ()
    activation: str = "softmax"
    pooling: str = "mean"
    normalize: bool = False
    size: int = -1
    max_tokens: int = 512
    lower_case: bool = False

    def document(self) -> dict[str, Any]:
        """Return the plan for the runtime, as a JSON document."""
        return asdict(self)


def read(texts: Mapping[str, str], name: str) -> dict[str, Any]:
    """Return the JSON object in a file; empty if the file is missing.

    Raise BadRequest if the file is not JSON or is not an object. ``texts``: the contents of the files, by
    name.
    """
    if name not in texts:
        return {}
    try:
        found = json.loads(texts[name])
    except (ValueError, RecursionError) as problem:
        raise BadRequest(
            f"{name} of the Hugging Face folder is not JSON: {str(problem)[:120]}. Download the folder again."
        ) from None
    if not isinstance(found, dict):
        raise BadRequest(
            f"{name} of the Hugging Face folder is not a JSON object. Download the folder again."
        )
    return found


def plan(texts: Mapping[str, str], files: Collection[str], *, allow_pickle: bool) -> HuggingFacePlan:
    """Return the plan to run a folder's model. Raise BadRequest with a remedy if no plan is possible.

    ``texts``: the contents of the files that :data:`TEXTS` names, by path.
    """
    config = read(texts, CONFIG)
    task = task_of_config(config, files)
    if task is None:
        raise BadRequest(
            f"The Hugging Face folder has the architecture {config.get('architectures')}. Tidegate runs "
            "models for sequence classification, image classification and embeddings. Deploy a language "
            "model with --model-format llm, and other models as a Python file (docs/models.md)."
        )
    file = next((name for name in ONNX if name in files), "")
    if file and task == "image-classification" and not _is_plain_images(read(texts, IMAGES)):
        if not _has_weights(files):
            raise BadRequest(
                f"The image processor in {IMAGES} needs transformers, which does not run the folder's ONNX "
                "file. Save the weights beside it: model.save_pretrained(FOLDER)"
            )
        file = ""
    _check_files(task, files, file, allow_pickle=allow_pickle)
    modules = _modules(texts)
    pooling = read(texts, POOLING)
    sentences = read(texts, SENTENCES)
    limits = (
        sentences.get("max_seq_length"),
        read(texts, TOKENIZER).get("model_max_length"),
        config.get("max_position_embeddings"),
    )
    return HuggingFacePlan(
        task=task,
        engine="onnx" if file else "torch",
        file=file,
        labels=_labels(config) if task != "embeddings" else (),
        activation=_activation(config),
        pooling=_pooling(pooling),
        normalize=any(kind.endswith("Normalize") for kind in modules),
        size=_number(config.get("hidden_size")) or _number(config.get("dim")) or -1,
        max_tokens=next((each for each in map(_number, limits) if each), 512),
        lower_case=bool(sentences.get("do_lower_case")),
    )


def signature_of(found: HuggingFacePlan, max_batch: int) -> Signature:
    """Return the signature of a folder's model. Each row is one text or one image."""
    if found.task == "embeddings":
        outputs = [TensorSpec(name="embedding", datatype="FP32", shape=[found.size])]
    else:
        outputs = [
            TensorSpec(name="label", datatype="BYTES"),
            TensorSpec(name="score", datatype="FP32"),
            TensorSpec(name="scores", datatype="FP32", shape=[len(found.labels)]),
        ]
    inputs = [TensorSpec(name="image" if found.task == "image-classification" else "text", datatype="BYTES")]
    if found.task == "text-classification":
        inputs.append(TensorSpec(name="text_pair", datatype="BYTES", optional=True))
    return Signature(inputs=inputs, outputs=outputs, max_batch_size=max_batch)


def requirements_of(found: HuggingFacePlan) -> list[str]:
    """Return the packages that a folder needs and that the models' environment lacks."""
    images = ["pillow"] if found.task == "image-classification" else []
    if found.engine == "torch":
        return ["torch", "transformers", *images]
    return images or ["tokenizers"]


def _check_files(task: Task, files: Collection[str], onnx: str, *, allow_pickle: bool) -> None:
    needed = IMAGES if task == "image-classification" else "tokenizer.json"
    # Without tokenizer.json, transformers builds a tokenizer from one of these files. The ONNX engine cannot
    # do that.
    others = {"vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"}
    if needed not in files and (onnx or needed == IMAGES or not others & set(files)):
        how = "AutoImageProcessor" if needed == IMAGES else "AutoTokenizer"
        raise BadRequest(
            f"The Hugging Face folder has no {needed}. Save it beside the model: "
            f"{how}.from_pretrained(...).save_pretrained(FOLDER)"
        )
    if onnx or _has_weights(files):
        return
    pickled = sorted(name for name in files if name.endswith(_PICKLED) and "/" not in name)
    if not pickled:
        raise BadRequest(
            "The Hugging Face folder has no weights: neither .safetensors nor onnx/model.onnx. If you cloned "
            "it with git, run `git lfs pull` in it first."
        )
    if not allow_pickle:
        raise BadRequest(
            f"The weights in {pickled[0]} are a pickle: loading it runs any code in it on the workers. Save "
            "the model with safe_serialization=True, or, if you trust its origin, deploy it with "
            "`tidegate deploy --allow-pickle` (in the API: allow_pickle=true)."
        )


def _has_weights(files: Collection[str]) -> bool:
    return any(name.endswith(".safetensors") and "/" not in name for name in files)


def _is_plain_images(config: Mapping[str, Any]) -> bool:
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    name = kind.removesuffix("Fast").removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    return name in _PLAIN_IMAGES


def _number(value: Any) -> int | None:
    """Return ``value`` if it is a whole number above 0 and below ``_LONGEST``, and None otherwise.

    None means that the number is unknown.
    """
    return value if type(value) is int and 0 < value < _LONGEST else None


def _modules(texts: Mapping[str, str]) -> list[str]:
    """Return the modules of a sentence-transformers model. Raise BadRequest for an unknown module."""
    if MODULES not in texts:
        return []
    try:
        listed = json.loads(texts[MODULES])
        found = [str(each["type"]) for each in listed or [None]]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadRequest(f"{MODULES} of the Hugging Face folder is not a list of modules.") from None
    known = ("Transformer", "Pooling", "Normalize")
    if unknown := [kind for kind in found if not kind.endswith(known)]:
        raise BadRequest(
            f"The sentence-transformers model has the module {unknown[0][:80]}, and Tidegate runs only "
            f"{', '.join(known)}. Deploy it as a Python file that uses sentence-transformers."
        )
    return found


def _pooling(config: Mapping[str, Any]) -> str:
    mode = str(config.get("pooling_mode") or "")
    found = mode or next((name for key, name in _POOLING.items() if config.get(key)), "mean")
    if found not in _POOLING.values():
        raise BadRequest(
            f"The pooling {found[:40]!r} of the sentence-transformers model is unknown: Tidegate has "
            f"{', '.join(_POOLING.values())}."
        )
    return found


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    named = config.get("id2label")
    if isinstance(named, dict) and named:
        try:
            numbers = sorted((int(number), str(label)) for number, label in named.items())
        except ValueError:
            numbers = [(-1, "")]
        if [number for number, _ in numbers] == list(range(len(numbers))) and len(numbers) <= _MAX_LABELS:
            return tuple(label for _, label in numbers)
        raise BadRequest(f"id2label in {CONFIG} does not number the labels from 0: correct it.")
    count = _number(config.get("num_labels")) or 2
    return tuple(f"LABEL_{number}" for number in range(min(count, _MAX_LABELS)))


def _activation(config: Mapping[str, Any]) -> str:
    """Return the function that turns logits into scores: ``softmax``, ``sigmoid`` or ``none``.

    The pipeline of the library transformers uses the same function.
    """
    kind = config.get("problem_type")
    if kind == "regression":
        return "none"
    if kind == "multi_label_classification" or len(_labels(config)) == 1:
        return "sigmoid"
    return "softmax"


def inside(files: Collection[PurePosixPath], home: PurePosixPath) -> list[str]:
    """Return the paths below ``home``, relative to it."""
    return [str(each.relative_to(home)) for each in files if home in each.parents]
