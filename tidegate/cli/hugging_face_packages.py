"""Recognise a Hugging Face folder whose model classifies or embeds, and choose the files to pack."""

from __future__ import annotations

import json
from pathlib import Path

from tidegate.kernel.protocol.hugging_face_task import CONFIG, ONNX, task_of_config

_SKIPPED = {"__pycache__", ".git", ".DS_Store", ".cache", ".gitattributes"}
# File extensions of weights. Files in a format of ``_OTHERS`` are never packed. Files in a format of
# ``_PICKLED`` are left out if the folder has safetensors, or an ONNX file that replaces them.
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_OTHERS = (".h5", ".msgpack", ".ot", ".tflite", ".mlmodel", ".xml")


def task_of(folder: Path) -> str | None:
    """Return the task of a Hugging Face folder; None for a language model or any other folder."""
    config = folder / CONFIG
    if not config.is_file() or (folder / "config.pbtxt").exists() or (folder / "model.py").exists():
        return None
    try:
        found = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    names = {path.name for path in folder.iterdir()}
    return task_of_config(found, names) if isinstance(found, dict) else None


def files_of(folder: Path) -> dict[str, Path]:
    """Return the files to pack, without needless copies of the weights.

    Each key is a file's path in the folder, and its value is the path on this machine.
    """
    found = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and not _SKIPPED & set(path.relative_to(folder).parts)
    }
    skipped: tuple[str, ...] = _OTHERS
    onnx = next((name for name in ONNX if name in found), None)
    # An ONNX file replaces the other weights, except in image models. If only transformers can prepare the
    # images, transformers also runs the model. Because transformers cannot run the ONNX file, such a model
    # needs the other weights.
    if onnx is not None and task_of(folder) != "image-classification":
        skipped += (".safetensors", *_PICKLED)
    elif any(name.endswith(".safetensors") for name in found):
        skipped += _PICKLED
    return {
        name: path
        for name, path in found.items()
        if not name.endswith(skipped) and not (name.endswith(".onnx") and name != onnx)
    }
