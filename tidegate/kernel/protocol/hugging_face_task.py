"""Find the task of a Hugging Face folder's model in its configuration. Pure, and quick to import."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

Task = Literal["text-classification", "embeddings", "image-classification"]

CONFIG, MODULES = "config.json", "modules.json"
# Paths at which exporters write a folder's ONNX file. The first one that exists is used.
ONNX = ("onnx/model.onnx", "model.onnx")
_TASKS: dict[str, Task] = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "Model": "embeddings",
}
_GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def task_of_config(config: Mapping[str, Any], files: Collection[str]) -> Task | None:
    """Return the task of a folder's model; None if it is a language model or has no known task.

    ``config``: the folder's ``config.json``. ``files``: the names of the files at its root.
    """
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    if name.endswith(_GENERATORS):
        return None
    # Only a model of sentence-transformers has a list of modules. Such a model embeds texts, unless its
    # architecture is for sequence classification.
    if MODULES in files and not name.endswith("ForSequenceClassification"):
        return "embeddings"
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
