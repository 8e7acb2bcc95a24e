"""Run the checks of a client, and print a line of JSON for each: its name, and what failed.

It runs in the environment of the clients, with only its neighbours of this folder.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import traceback
from types import ModuleType

# The addresses and names that the test passes as JSON.
GIVEN: dict[str, str] = json.loads(os.environ.get("LLM_CLIENTS", "{}"))
MODEL = GIVEN.get("model", "")
URL = GIVEN.get("url", "")
OPENAI_URL = f"{URL}/v1"
NO_KEY = "EMPTY"

QUESTION = [{"role": "user", "content": "Name a colour."}]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"type": "string", "maxLength": 8}, "number": {"type": "integer"}},
    "required": ["colour", "number"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Return the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 10}},
            "required": ["city"],
        },
    },
}


def calls_so_far(arguments, **answer):
    """Return a chat with calls of the tool and their answers, so that a small model makes the next call.

    ``arguments`` encodes a call's arguments. ``answer`` returns the members of the message with an answer.
    """
    chat = []
    for number, city in enumerate(("Rome", "Paris", "Oslo")):
        call = {"id": f"c{number}", "type": "function",
                "function": {"name": "weather", "arguments": arguments({"city": city})}}  # fmt: skip
        chat += [
            {"role": "user", "content": f"Weather in {city}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "sunny", **({"tool_call_id": f"c{number}"} | answer)},
            {"role": "assistant", "content": "It is sunny."},
        ]
    return [*chat, {"role": "user", "content": "Weather in Bonn?"}]


# The engine lets a model write text before a call that is required.
TOOLS = {"messages": calls_so_far(json.dumps), "max_tokens": 60, "temperature": 0, "tools": [WEATHER]}


class Skipped(Exception):
    """The engine cannot do it."""


def needs_embeddings():
    """Skip a check with an engine that has no embeddings beside text."""
    if GIVEN["engine"] == "vllm":
        raise Skipped("a model for text in vLLM returns no embeddings")


def run(module: ModuleType) -> None:
    """Run every function ``check_...`` of a client's script."""
    for name, check in list(vars(module).items()):
        if not name.startswith("check_"):
            continue
        failed = None
        try:
            result = check()
            if inspect.iscoroutine(result):
                asyncio.run(result)
        except Skipped as reason:
            failed = f"skipped: {reason}"
        except Exception:
            failed = traceback.format_exc()
        print(json.dumps({"check": name, "failed": failed}), flush=True)


def refused(kind: type[Exception], call) -> Exception:
    """Return the error of a call that must raise this class."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"the call was answered, but {kind.__name__} was expected")


def main() -> None:
    """Run the checks of the script that was started."""
    run(sys.modules["__main__"])
