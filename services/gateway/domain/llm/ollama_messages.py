"""Translate messages of Ollama's chats into messages of OpenAI's API."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import orjson

from services.gateway.domain.llm import members
from tidegate.kernel.errors import BadRequest

# The first characters of base64 images, with their types.
_IMAGES = {"iVBORw0KGgo": "png", "/9j/": "jpeg", "UklGR": "webp", "R0lGOD": "gif"}


def translated(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Translate the messages of a chat; raise BadRequest if a message is invalid.

    In OpenAI's API, a tool's message contains the id of the tool call that it answers. In Ollama's API, it
    may contain only the tool's name. So this function gives an id to each tool call that has none. A message
    with only a tool's name gets the id of the oldest unanswered call of this tool.
    """
    waiting: deque[tuple[str, str]] = deque()
    result = []
    for message in messages:
        role = members.text(message, "role")
        if role == "tool":
            result.append(_tool_answer(message, waiting))
            continue
        content = members.text(message, "content", "")
        done: dict[str, Any] = {
            "role": role,
            "content": user_content(content, members.texts(message, "images")),
        }
        if thinking := members.text(message, "thinking", ""):
            done["reasoning_content"] = thinking
        if calls := members.groups(message, "tool_calls"):
            done["tool_calls"] = [_tool_call(call, waiting, len(result), at) for at, call in enumerate(calls)]
        result.append(done)
    return result


def user_content(prompt: str, images: Sequence[str]) -> str | list[dict[str, Any]]:
    """Return the content of a message: text, or text with images."""
    if not images:
        return prompt
    parts: list[dict[str, Any]] = [{"type": "text", "text": prompt}] if prompt else []
    return parts + [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]


def _data_url(image: str) -> str:
    if image.startswith("data:"):
        return image
    kinds = [kind for start, kind in _IMAGES.items() if image.startswith(start)]
    if not kinds:
        raise BadRequest("'images' must have PNG, JPEG, WebP or GIF images in base64")
    return f"data:image/{kinds[0]};base64,{image}"


def _tool_call(
    call: dict[str, Any], waiting: deque[tuple[str, str]], message: int, at: int
) -> dict[str, Any]:
    function = members.group(call, "function")
    name = members.text(function, "name")
    arguments = orjson.dumps(members.group(function, "arguments")).decode()
    id_ = members.text(call, "id", "") or f"call_{message}_{at}"
    waiting.append((name, id_))
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def _tool_answer(message: dict[str, Any], waiting: deque[tuple[str, str]]) -> dict[str, Any]:
    content = members.text(message, "content", "")
    id_ = members.text(message, "tool_call_id", "")
    if not id_:
        name = members.text(message, "tool_name", "") or members.text(message, "name", "")
        id_ = _oldest(waiting, name)
    return {"role": "tool", "tool_call_id": id_, "content": content}


def _oldest(waiting: deque[tuple[str, str]], name: str) -> str:
    for entry in waiting:
        if not name or entry[0] == name:
            waiting.remove(entry)
            return entry[1]
    raise BadRequest(
        f"a message of role 'tool' answers no call{f' of {name!r}' if name else ''}: "
        "send the assistant's message with its 'tool_calls' before the answers"
    )
