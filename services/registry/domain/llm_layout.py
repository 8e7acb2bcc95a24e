"""Recognise and check the files of a language model in an archive. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath

from tidegate.kernel.errors import BadRequest

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
TOKENIZERS = frozenset({
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model",
    "tekken.json",
})  # fmt: skip
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


def is_llm(files: Collection[PurePosixPath]) -> bool:
    """Return True for a folder with a GGUF file at its root, or a Hugging Face folder with a tokenizer."""
    names = _at_root(files)
    return bool(_gguf(names)) or (CONFIG in names and bool(names & TOKENIZERS))


def check(
    files: Collection[PurePosixPath], texts: Mapping[PurePosixPath, str], *, allow_pickle: bool
) -> None:
    """Raise BadRequest unless an engine can load these files. The message says what is missing.

    ``texts``: the contents of :data:`CONFIG` and :data:`INDEX`, if the archive has them.
    """
    names = _at_root(files)
    if _gguf(names) and CONFIG not in names:
        _check_gguf(_gguf(names))
        return
    if CONFIG not in names:
        raise BadRequest(
            f"A language model is a GGUF file, or a Hugging Face folder with {CONFIG}, a tokenizer and "
            f"weights. This archive has neither a GGUF file nor {CONFIG} at its root. Pack the folder's "
            "contents, not the folder."
        )
    _read_json(texts, CONFIG)
    if not names & TOKENIZERS:
        raise BadRequest(
            "The folder has no tokenizer (tokenizer.json or tokenizer.model). Save it beside the model: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)"
        )
    _check_weights(names, texts, allow_pickle=allow_pickle)


def _check_weights(names: frozenset[str], texts: Mapping[PurePosixPath, str], *, allow_pickle: bool) -> None:
    if INDEX in names:
        index = _read_json(texts, INDEX).get("weight_map")
        shards = set(index.values()) if isinstance(index, dict) else set()
        if missing := sorted(str(shard) for shard in shards - names):
            raise BadRequest(
                f"{INDEX} names {len(shards)} files. Missing: {len(missing)}, for example {missing[0]}. "
                "Download the model again, completely."
            )
    if any(name.endswith(".safetensors") for name in names):
        return
    pickled = sorted(name for name in names if name.endswith(_PICKLED))
    if not pickled:
        raise BadRequest(
            "The folder has no weights: no .safetensors file at its root. If you cloned it with git, run "
            "`git lfs pull` in it first."
        )
    if not allow_pickle:
        raise BadRequest(
            f"The weights in {pickled[0]} are a pickle. Loading a pickle can run any code on the workers. "
            "Save the model with safe_serialization=True. If you trust the model's origin, deploy it with "
            "`tidegate deploy --allow-pickle` (in the API: allow_pickle=true)."
        )


def _check_gguf(names: list[str]) -> None:
    parts = {name: part for name in names if (part := _PART.fullmatch(name))}
    whole = [name for name in names if name not in parts]
    firsts = {part[1] for part in parts.values()}
    if len(whole) + len(firsts) != 1:
        raise BadRequest(
            f"The archive has several GGUF files at its root ({', '.join(names[:4])}), and it is unclear "
            "which one is the model. Keep one at the root, and put adapters into a folder."
        )
    for part in parts.values():
        if len(parts) != int(part[3]):
            raise BadRequest(
                f"The model is split into {int(part[3])} GGUF files, but the archive has {len(parts)}. Pack "
                "all of them."
            )


def _gguf(names: Collection[str]) -> list[str]:
    return sorted(name for name in names if name.lower().endswith(".gguf"))


def _at_root(files: Collection[PurePosixPath]) -> frozenset[str]:
    return frozenset(str(path) for path in files if len(path.parts) == 1)


def _read_json(texts: Mapping[PurePosixPath, str], name: str) -> dict[str, object]:
    try:
        found = json.loads(texts[PurePosixPath(name)])
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{name} of the language model is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise BadRequest(f"{name} of the language model is not a JSON object.")
    return found
