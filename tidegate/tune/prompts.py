"""Make prompts of a given length for a load on a language model. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

# Each word, with the space before it, is one token in the usual vocabularies.
_TEXT = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or "
    "had an they which one you were all her she there would their we him been has when who will no "
    "more if out so up said what its about than into them can only other time new some could these "
    "two may first then do any like my now over such our man me even most made after also did many "
    "off before must well back through years much where your way down should because long each just "
    "state those people too how little good world still see own men work here life both under old "
    "year great day same part house small again place night home found"
)
WORDS = _TEXT.split()
TASK = "Write a long story with these words:"


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a load. If ``given`` is not empty, its prompts are used in turn.

    Otherwise, each prompt has ``words`` random words. Such a prompt contains the request's number, so that an
    engine cannot reuse its KV cache for the text after the number. The first ``shared`` words are the same in
    all prompts, like a system prompt.
    """

    words: int
    given: Sequence[str] = ()
    shared: int = 0
    seed: int = 0

    def prompt(self, number: int) -> str:
        """Return the prompt of the request with a given number."""
        if self.given:
            return self.given[number % len(self.given)]
        start = " ".join(random.Random(self.seed).choices(WORDS, k=self.shared))
        own = " ".join(
            random.Random(f"{self.seed} {number}").choices(WORDS, k=max(1, self.words - self.shared))
        )
        return f"{start} {number} {TASK} {own}".strip()


def fitted(words: int, measured: int, wanted: int) -> int:
    """Return the number of words for a prompt of ``wanted`` tokens.

    ``measured``: the number of tokens of an earlier prompt with ``words`` words. It includes the tokens of
    the chat template and of ``TASK``. Each word is assumed to be one token.
    """
    return max(1, words + wanted - measured)


@dataclass(frozen=True, slots=True)
class ChatBodies:
    """The bodies of chat requests with these prompts. ``options``: more members for each body."""

    model: str
    prompts: Prompts
    options: Mapping[str, Any] = field(default_factory=dict)

    def body(self, number: int) -> bytes:
        """Return the body of request ``number``. It asks for a stream that ends with token counts."""
        return orjson.dumps(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": self.prompts.prompt(number)}],
                "stream": True,
                "stream_options": {"include_usage": True},
                **self.options,
            }
        )
