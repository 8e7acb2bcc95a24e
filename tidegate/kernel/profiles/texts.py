"""Make columns from a language model's answers: the numbers of tokens, and why the answers ended. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tidegate.kernel.profiles.columns import Columns

PROMPT_TOKENS, ANSWER_TOKENS, FINISH_REASON = "prompt_tokens", "answer_tokens", "finish_reason"


class TextAnswer(NamedTuple):
    """An answer of a language model. A field is None if it is not known."""

    prompt_tokens: int | None
    answer_tokens: int | None
    finish_reason: str | None


def add_texts(columns: Columns, answers: Sequence[TextAnswer]) -> None:
    """Add the columns of answers. Each answer is one row."""
    columns.put(PROMPT_TOKENS, np.array([_number(each.prompt_tokens) for each in answers]))
    columns.put(ANSWER_TOKENS, np.array([_number(each.answer_tokens) for each in answers]))
    columns.values[FINISH_REASON] = [each.finish_reason for each in answers]


def _number(value: int | None) -> float:
    return float("nan") if value is None else float(value)
