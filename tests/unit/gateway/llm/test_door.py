"""The models that a caller may see at the APIs for language models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from services.gateway.api.llm.door import LlmDoor
from services.gateway.api.llm.jobs import _digest
from services.gateway.domain.job_options import JobOptions
from tidegate.kernel.errors import BadRequest, Forbidden
from tidegate.kernel.protocol.access import INFER, Principal
from tidegate.kernel.service import caller
from tidegate.kernel.service.caller import Caller

pytestmark = pytest.mark.unit


def test_a_key_sees_only_the_models_that_it_may_use():
    core: Any = SimpleNamespace(find=lambda model: (SimpleNamespace(name=model), f"{model}-v1"))
    door = LlmDoor(core, *[core] * 3)
    key = Principal("ab12", "robot", frozenset({INFER}), frozenset({"chat"}))
    token = caller.current.set(Caller(key, "127.0.0.1"))
    try:
        assert str(door.find("chat")) == "chat-v1"
        with pytest.raises(Forbidden):
            door.find("secret")
    finally:
        caller.current.reset(token)


def test_a_job_whose_body_is_nested_too_deeply_is_refused():
    nested: list[Any] = []
    for _ in range(500):
        nested = [nested]
    with pytest.raises(BadRequest, match="cannot be a job"):
        _digest("/v1/completions", {"prompt": nested}, JobOptions())
