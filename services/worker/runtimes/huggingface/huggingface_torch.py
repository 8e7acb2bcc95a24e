"""Run the weights of a Hugging Face folder with transformers and torch. No code of the folder is executed."""

from __future__ import annotations

import locale
from pathlib import Path
from typing import Any

# Triton starts Python in the C locale, in which torch and transformers cannot read UTF-8 files.
locale.setlocale(locale.LC_ALL, "C.UTF-8")

import torch  # noqa: E402
import transformers  # noqa: E402

_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "embeddings": "AutoModel",
}


class TorchEngine:
    """A model of transformers with the folder's own tokenizer or image processor."""

    def __init__(self, plan: dict[str, Any], home: Path, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._device, self._max_tokens = device, plan["max_tokens"]
        kind = getattr(transformers, _CLASSES[plan["task"]])
        only_here = {"local_files_only": True, "trust_remote_code": False}
        # If the folder has safetensors, the registry does not check its pickles. A pickle can execute code.
        # So read only the safetensors.
        safe = {"use_safetensors": True} if any(home.glob("*.safetensors")) else {}
        self._model = kind.from_pretrained(home, dtype=torch.float32, **safe, **only_here).eval().to(device)
        if plan["task"] == "image-classification":
            # Use the image processors that need only Pillow. In transformers 5, the option for this has
            # another name.
            release = int(transformers.__version__.partition(".")[0])
            pillow: dict[str, Any] = {"backend": "pil"} if release >= 5 else {"use_fast": False}
            self._images = transformers.AutoImageProcessor.from_pretrained(home, **pillow, **only_here)
        else:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(home, **only_here)

    def text_logits(self, texts: list[str], pairs: list[str] | None) -> Any:
        """Return the logits of texts, or of pairs of texts."""
        return self._run(self._encoded(texts, pairs)).logits.float().cpu().numpy()

    def token_embeddings(self, texts: list[str]) -> tuple[Any, Any]:
        """Return the vectors of all tokens, and the attention mask."""
        feed = self._encoded(texts, None)
        found = self._run(feed).last_hidden_state.float().cpu().numpy()
        return found, feed["attention_mask"].cpu().numpy()

    def image_logits(self, pictures: list[Any]) -> Any:
        """Return the logits of RGB pictures."""
        return self._run(self._images(images=pictures, return_tensors="pt")).logits.float().cpu().numpy()

    def _encoded(self, texts: list[str], pairs: list[str] | None) -> Any:
        return self._tokenizer(
            texts, pairs, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        )

    def _run(self, feed: Any) -> Any:
        with torch.inference_mode():
            return self._model(**{name: each.to(self._device) for name, each in feed.items()})
