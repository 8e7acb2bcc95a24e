"""Run a Hugging Face folder: classify texts or images, or embed texts.

This module is copied beside the unpacked folder, and the runtime for plain Python calls it.
``tidegate_huggingface.json`` states the task, the engine and their settings. If the folder has an ONNX file,
onnxruntime runs it, with the package ``tokenizers`` for texts. Otherwise transformers and torch run the
weights.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

# The most pixels of a picture. Even a small file can contain a huge picture, which would fill the memory.
MAX_PIXELS = 50_000_000


class Model:
    """One instance of the model."""

    def load(self, folder: Path, device: str, threads: int) -> None:
        """Load the weights, and the tokenizer or the image processor."""
        self._plan = json.loads((folder / "tidegate_huggingface.json").read_text())
        home = folder / "artifact" / self._plan["home"]
        if self._plan["engine"] == "onnx":
            from huggingface_onnx import OnnxEngine as Engine
        else:
            from huggingface_torch import TorchEngine as Engine
        self._engine = Engine(self._plan, home, device, threads)

    def predict(self, text: Any = None, text_pair: Any = None, image: Any = None) -> dict[str, Any]:
        """Return the outputs for a batch of texts or of encoded images."""
        if image is not None:
            return self._classes(self._engine.image_logits([picture(each) for each in image.ravel()]))
        texts = self._texts(text)
        if self._plan["task"] == "text-classification":
            return self._classes(self._engine.text_logits(texts, self._texts(text_pair)))
        tokens, mask = self._engine.token_embeddings(texts)
        vectors = tokens if tokens.ndim == 2 else pooled(tokens, mask, self._plan["pooling"])
        if self._plan["normalize"]:
            vectors = vectors / np.clip(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12, None)
        return {"embedding": vectors.astype(np.float32)}

    def _texts(self, array: Any) -> list[str] | None:
        if array is None:
            return None
        texts = [each.decode() if isinstance(each, bytes) else str(each) for each in array.ravel()]
        return [each.lower() for each in texts] if self._plan["lower_case"] else texts

    def _classes(self, logits: Any) -> dict[str, Any]:
        scores = activated(logits.astype(np.float32), self._plan["activation"])
        best = scores.argmax(axis=1)
        labels = np.array([self._plan["labels"][each] for each in best], dtype=object)
        return {"label": labels, "score": scores[np.arange(len(best)), best], "scores": scores}


def activated(logits: Any, how: str) -> Any:
    """Convert logits to scores in the same way as the pipelines of transformers."""
    if how == "none":
        return logits
    if how == "sigmoid":
        return 1.0 / (1.0 + np.exp(-logits))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def pooled(tokens: Any, mask: Any, how: str) -> Any:
    """Pool the vectors of each text's tokens into one vector, in the same way as sentence-transformers."""
    if how == "cls":
        return tokens[:, 0]
    if how == "lasttoken":
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
        return tokens[np.arange(len(tokens)), last]
    wide = mask[:, :, None].astype(tokens.dtype)
    if how == "max":
        return np.where(wide > 0, tokens, -1e9).max(axis=1)
    return (tokens * wide).sum(axis=1) / np.clip(wide.sum(axis=1), 1e-9, None)


def picture(data: bytes) -> Any:
    """Decode a picture to RGB. Raise ValueError if it is too large, or if the bytes are no picture."""
    from PIL import Image

    try:
        found = Image.open(io.BytesIO(data))
        width, height = found.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"the image has {width} x {height} pixels, the limit is {MAX_PIXELS}")
        return found.convert("RGB")
    except (OSError, Image.DecompressionBombError) as problem:
        raise ValueError(f"the input is not an image that Pillow can read: {problem}") from None
