"""Hash the blocks of a prompt in a chain, so that prompts with a common beginning have common hashes.

An engine's KV cache keeps the prompts that the engine has read. So a replica that has read the beginning of a
prompt needs less computation for this prompt. The hashes depend on the caller. Otherwise, quick responses
would tell a caller how the prompts of other callers begin.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import orjson

# Bytes per block: about 32 tokens of English text. An engine reuses whole blocks of 16 to 32 tokens.
BLOCK = 128
# The most blocks of a prompt that are hashed. A common beginning of this length is enough to choose a
# replica.
MAX_BLOCKS = 256
HASH_SIZE = 8


def prompt_blocks(path: str, body: dict[str, Any], salt: bytes) -> list[bytes]:
    """Return a hash for each whole block of a prompt. Each hash also covers all earlier blocks.

    ``salt``: the caller, and all else that two requests must have in common to share an engine's KV cache.
    The result is empty for a request without a prompt, or with a prompt shorter than a block.
    """
    prompt = b"\0".join(_parts(path, body))[: BLOCK * MAX_BLOCKS]
    chain, last = [], blake2b(salt, digest_size=HASH_SIZE).digest()
    for at in range(0, len(prompt) - BLOCK + 1, BLOCK):
        last = blake2b(last + prompt[at : at + BLOCK], digest_size=HASH_SIZE).digest()
        chain.append(last)
    return chain


def _parts(path: str, body: dict[str, Any]) -> Iterator[bytes]:
    """Yield the parts of a prompt in the order of chat templates: tools, instructions, messages."""
    for name in ("tools", "instructions"):
        if body.get(name):
            yield orjson.dumps(body[name])
    if path.endswith(("/completions", "/responses")):
        for name in ("messages", "prompt", "input"):
            yield from _texts(body.get(name))


def _texts(value: Any) -> Iterator[bytes]:
    """Yield the texts of messages, of their parts, or of a prompt. Token ids become decimal numbers."""
    if isinstance(value, str):
        yield value.encode(errors="replace")
    elif isinstance(value, dict):
        for name in ("role", "text", "content"):
            yield from _texts(value.get(name))
        if "text" not in value and "content" not in value:
            yield orjson.dumps(value)  # an image, or a call of a tool
    elif isinstance(value, list):
        if value and all(isinstance(token, int) for token in value):
            yield b",".join(b"%d" % token for token in value)
        else:
            for each in value:
                yield from _texts(each)
