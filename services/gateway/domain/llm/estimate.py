"""Estimate the tokens of a request before the engine has counted them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tidegate.kernel.protocol.llm import encoded

# English text has about four characters per token.
CHARACTERS_PER_TOKEN = 4
# The tokens of roles and separators that a chat template adds to each message.
TOKENS_PER_MESSAGE = 4
# The tokens of an image of a usual size, for engines that accept images.
TOKENS_PER_IMAGE = 1024
# The assumed number of tokens of an answer, if neither the request nor the model's context limits it.
USUAL_ANSWER = 1024

_PROMPT = ("messages", "prompt", "input", "instructions", "inputs", "system", "suffix", "query", "documents")
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "max_new_tokens", "n_predict")
_UNSEEN = frozenset({"image_url", "url", "data", "type", "role", "id"})


class TokenEstimate(NamedTuple):
    """The estimated tokens of a request's prompt, and the most tokens that its answer can have."""

    prompt: int
    answer: int

    @property
    def total(self) -> int:
        """Return the most tokens that the request can need in the engine's KV cache."""
        return self.prompt + self.answer


NO_TOKENS = TokenEstimate(0, 0)


def estimate(path: str, body: Mapping[str, Any], context: int | None) -> TokenEstimate:
    """Return the estimated tokens of a request's prompt and answer.

    ``path``: the request's URL path. ``context``: the model's context length in tokens; None if unknown.
    """
    prompt = max(1, sum(_tokens(body[name]) for name in _PROMPT if name in body))
    if (tools := body.get("tools")) is not None:
        prompt += len(encoded(tools)) // CHARACTERS_PER_TOKEN
    if path.endswith(("/embeddings", "/pooling", "/score", "/rerank", "/tokenize", "/detokenize")):
        return TokenEstimate(prompt, 0)
    room = max(1, context - prompt) if context is not None else None
    # Engines read the limit of the answer from different members of the body (see _LIMITS), so use the
    # largest value. When the answer ends, the charge is corrected to the counted tokens.
    limit = max((body[name] for name in _LIMITS if _is_count(body.get(name))), default=None)
    if limit is None:
        limit = room if room is not None else USUAL_ANSWER
    answer = limit if room is None else min(limit, room)
    return TokenEstimate(prompt, answer * _choices(body))


def states_answer(body: Mapping[str, Any]) -> bool:
    """Return True if a request sets a limit for the tokens of its answer."""
    return any(_is_count(body.get(name)) for name in _LIMITS)


def _choices(body: Mapping[str, Any]) -> int:
    """Return how many answers the engine writes: the answers per prompt, times the number of prompts."""
    each = max((body[name] for name in ("n", "best_of") if _is_count(body.get(name))), default=1)
    prompt = body.get("prompt")
    if not isinstance(prompt, list) or not prompt or type(prompt[0]) is int:
        return each
    return each * len(prompt)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _tokens(value: Any, depth: int = 0) -> int:
    if isinstance(value, str):
        return -(-len(value) // CHARACTERS_PER_TOKEN)
    if depth > 8:
        return 0
    if isinstance(value, list):
        if value and type(value[0]) is int:
            return len(value)  # token ids
        return sum(_tokens(each, depth + 1) for each in value)
    if isinstance(value, dict):
        own = TOKENS_PER_MESSAGE if "role" in value else 0
        if "image_url" in value or value.get("type") in ("image", "input_image"):
            own += TOKENS_PER_IMAGE
        return own + sum(_tokens(each, depth + 1) for name, each in value.items() if name not in _UNSEEN)
    return 0
