"""Refuse addresses of images, sound and video in requests, because the engine would fetch them.

The engine is in the operator's network. With an address, a caller could read data that only this network can
reach.
"""

from __future__ import annotations

from typing import Any

from calls import Refused

ALLOWED = "allowed-media-domains"
_MEMBERS = ("image_url", "video_url", "audio_url", "file_url")
_PLACES = ("messages", "input", "prompt")


def may_fetch(plan: dict[str, Any]) -> bool:
    """Return True if the engine may fetch addresses.

    An upstream may fetch them. vLLM may fetch them if its arguments include a list of allowed domains.
    """
    names = {name.lstrip("-").replace("_", "-") for name in plan.get("arguments", ())}
    return plan["engine"] == "openai-url" or (plan["engine"] == "vllm" and ALLOWED in names)


def check_media(body: dict[str, Any]) -> None:
    """Raise Refused if a request contains the address of data instead of the data itself."""
    left = [body.get(place) for place in _PLACES]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            left += value.values()
            for name in _MEMBERS:
                given = value.get(name)
                url = given.get("url") if isinstance(given, dict) else given
                if isinstance(url, str) and not url[:5].lower() == "data:":
                    raise Refused(
                        400,
                        f"{name} is the address {url[:80]!r}. This model fetches no addresses: send the data "
                        "itself, as data:image/png;base64,...",
                        code="media_address",
                    )
