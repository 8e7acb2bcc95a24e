"""The model of a request that may name none."""

from __future__ import annotations

import pytest

from services.gateway.domain.llm.model_choice import chosen
from tidegate.kernel.errors import BadRequest, NotFound


def test_the_first_name_is_taken_and_without_one_the_only_model() -> None:
    assert chosen([None, "", "b", "c"], ["a"], "it") == "b"
    assert chosen([None], ["a", "a:fr"], "it") == "a"


def test_no_model_and_several_models_are_errors_that_say_what_to_do() -> None:
    with pytest.raises(NotFound, match="tidegate deploy"):
        chosen([], [], "it")
    with pytest.raises(BadRequest, match="a, b; name one with the member 'model'"):
        chosen([], ["a", "a:fr", "b"], "the member 'model'")
