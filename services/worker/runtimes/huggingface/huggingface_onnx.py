"""Run an exported ONNX file of a Hugging Face folder, without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from onnx_session import open_session, options


class OnnxEngine:
    """An ONNX session with the folder's own tokenizer or image processor."""

    def __init__(self, plan: dict[str, Any], home: Path, device: str, threads: int) -> None:
        gpu = None if device == "cpu" else int(device.partition(":")[2])
        settings = options({"parameters": {"threads": {"string_value": str(threads)}}})
        self._session = open_session(home / plan["file"], settings, gpu)
        self._inputs = [each.name for each in self._session.get_inputs()]
        self._outputs = [each.name for each in self._session.get_outputs()]
        if plan["task"] == "image-classification":
            self._images = json.loads((home / "preprocessor_config.json").read_text())
        else:
            self._tokenizer = tokenizer_of(home, plan["max_tokens"])

    def text_logits(self, texts: list[str], pairs: list[str] | None) -> Any:
        """Return the logits of texts, or of pairs of texts, with one row for each."""
        feed = self._encoded(list(zip(texts, pairs)) if pairs is not None else texts)  # noqa: B905
        return self._run(feed, "logits")

    def token_embeddings(self, texts: list[str]) -> tuple[Any, Any]:
        """Return the vectors of the tokens, and the attention mask.

        If the graph itself pools the vectors, return one vector for each text instead.
        """
        feed = self._encoded(texts)
        name = "sentence_embedding" if "sentence_embedding" in self._outputs else "last_hidden_state"
        return self._run(feed, name), feed["attention_mask"]

    def image_logits(self, pictures: list[Any]) -> Any:
        """Return the logits of RGB pictures."""
        pixels = np.stack([pixels_of(each, self._images) for each in pictures])
        return self._run({self._inputs[0]: pixels}, "logits")

    def _encoded(self, texts: list[Any]) -> dict[str, Any]:
        found = self._tokenizer.encode_batch(texts)
        return {
            "input_ids": np.array([each.ids for each in found], dtype=np.int64),
            "attention_mask": np.array([each.attention_mask for each in found], dtype=np.int64),
            "token_type_ids": np.array([each.type_ids for each in found], dtype=np.int64),
        }

    def _run(self, feed: dict[str, Any], output: str) -> Any:
        name = output if output in self._outputs else self._outputs[0]
        return self._session.run([name], {key: feed[key] for key in self._inputs if key in feed})[0]


def tokenizer_of(home: Path, max_tokens: int) -> Any:
    """Return the folder's tokenizer. It cuts texts at ``max_tokens``, and pads shorter texts of a batch."""
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(home / "tokenizer.json"))
    found.enable_truncation(max_tokens)
    config = home / "tokenizer_config.json"
    token = (json.loads(config.read_text()) if config.exists() else {}).get("pad_token") or "[PAD]"
    token = token["content"] if isinstance(token, dict) else token
    before = found.padding or {}
    found.enable_padding(
        pad_id=found.token_to_id(token) or 0,
        pad_token=token,
        pad_type_id=before.get("pad_type_id", 0),
        direction=before.get("direction", "right"),
    )
    return found


def pixels_of(picture: Any, how: dict[str, Any]) -> Any:
    """Return a picture as an array with the axes channel, height and width.

    ``how``: the settings in the folder's ``preprocessor_config.json``.
    """
    if how.get("do_resize", True) and how.get("size"):
        picture = picture.resize(target_size(picture, how), how.get("resample", 2))
    if how.get("do_center_crop") or is_cropped_later(how):
        picture = cropped(picture, *sides(how.get("crop_size") or how["size"]))
    array = np.asarray(picture, dtype=np.float32)
    if how.get("do_rescale", True):
        array = array * np.float32(how.get("rescale_factor", 1 / 255))
    if how.get("do_normalize", True) and how.get("image_mean"):
        array = (array - np.array(how["image_mean"], np.float32)) / np.array(how["image_std"], np.float32)
    return array.transpose(2, 0, 1).astype(np.float32)


def target_size(picture: Any, how: dict[str, Any]) -> tuple[int, int]:
    """Return the width and height to which a picture is resized."""
    size = how["size"]
    shortest = size if isinstance(size, int) else size.get("shortest_edge")
    if shortest is None:
        height, width = sides(size)
        return width, height
    if is_cropped_later(how):
        shortest = int(shortest / how["crop_pct"])
    elif how.get("crop_pct"):
        return shortest, shortest
    scale = shortest / min(picture.size)
    width, height = picture.size
    return (shortest, int(height * scale)) if width <= height else (int(width * scale), shortest)


def is_cropped_later(how: dict[str, Any]) -> bool:
    """Return True if a picture is first resized to more than ``size`` and then cropped, as for ConvNeXT."""
    return bool(how.get("crop_pct")) and how["size"].get("shortest_edge", 384) < 384


def sides(size: Any) -> tuple[int, int]:
    """Return height and width from a size in the folder's configuration."""
    if isinstance(size, int):
        return size, size
    return size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))


def cropped(picture: Any, height: int, width: int) -> Any:
    """Return the middle part of a picture, in the given size. A smaller picture gets a black border."""
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
