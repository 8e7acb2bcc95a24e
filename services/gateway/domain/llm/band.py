"""Choose the band of a request from its headers and its body."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.llm import Band

BANDS: tuple[Band, ...] = get_args(Band)
# OpenAI's names of service tiers. Other names, such as "auto" and "default", mean the band normal.
_TIERS: dict[Any, Band] = {"priority": "high", "flex": "low", "batch": "low"}
_URGENCY = re.compile(rb"(?:^|[,\s])u=([0-7])(?![0-9])")
_USUAL_URGENCY = 3

# For each band, the value of the priority field in a request frame, as workers read it.
FRAME_PRIORITY: dict[Band, int] = {"high": 1, "normal": 0, "low": 7}


def band_of(headers: Mapping[bytes, bytes], body: Mapping[str, Any]) -> Band:
    """Return a request's band; raise BadRequest for an unknown band.

    The first of these that names a band decides:

    - the header ``X-Tidegate-Priority``
    - the member ``service_tier`` of the body
    - the header ``Priority`` (RFC 9218): an urgency below 3 means high, and an urgency above 4 means low

    If none of them names a band, the band is normal.
    """
    if (named := headers.get(b"x-tidegate-priority")) is not None:
        word = named.decode("latin-1").strip().lower()
        for band in BANDS:
            if word == band:
                return band
        raise BadRequest(f"X-Tidegate-Priority must be one of {', '.join(BANDS)}, got {word[:40]!r}")
    tier = body.get("service_tier")
    if isinstance(tier, str) and tier in _TIERS:
        return _TIERS[tier]
    found = _URGENCY.search(headers.get(b"priority", b""))
    urgency = int(found[1]) if found else _USUAL_URGENCY
    if urgency < _USUAL_URGENCY:
        return "high"
    return "low" if urgency > _USUAL_URGENCY + 1 else "normal"
