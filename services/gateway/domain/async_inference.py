"""Check the object keys of inputs, and choose those of answers, for SageMaker's asynchronous API. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.bounded_json import shown

# The folder of the answers in the object store. An input must not be in this folder.
FOLDER = "tidegate-async"
# A job's record contains the form of the answer in the field with this name.
ASK = "async"
ID = re.compile(r"[\x21-\x7e]{1,64}")
MAX_LOCATION = 1024
# The limits and the default of a request's ttl, in seconds. As in SageMaker, 6 hours are the default and the
# maximum.
LEAST_TTL_S, DEFAULT_TTL_S, MOST_TTL_S = 60, 21_600, 21_600


class AnswerPlan(NamedTuple):
    """The form in which an answer is written.

    ``accept``: the content types that the caller accepts. ``rows``: True if the request was a list of rows.
    ``whole``: True if the model itself returns the complete response body.
    """

    accept: str
    rows: bool = True
    whole: bool = False

    def to_ask(self) -> dict[str, Any]:
        """Return the form as a field of a job's record."""
        return {ASK: {"accept": self.accept[:200], "rows": self.rows, "whole": self.whole}}

    @classmethod
    def from_ask(cls, ask: Mapping[str, Any]) -> AnswerPlan:
        """Read the form from a job's record."""
        found = ask.get(ASK, {})
        rows, whole = bool(found.get("rows", True)), bool(found.get("whole", False))
        return cls(str(found.get("accept", "")), rows, whole)


def key_of(location: str, root: str) -> str:
    """Return the path of an input, relative to ``root``, the URL of the store.

    Raise BadRequest if ``location`` is not a valid input below ``root``.
    """
    if not location or len(location) > MAX_LOCATION:
        raise BadRequest(f"the header X-Amzn-SageMaker-InputLocation must name an input below {root}/")
    if not location.startswith(f"{root}/"):
        raise BadRequest(
            f"InputLocation {shown(location)} is not below {root}/, the store of asynchronous inference "
            "(TIDEGATE_ASYNC_URL)"
        )
    key = location.removeprefix(f"{root}/")
    parts = key.split("/")
    if not key.isprintable() or {"", ".", ".."} & set(parts) or parts[0] == FOLDER:
        raise BadRequest(
            f"InputLocation {shown(location)} is not the path of an input: name a file below {root}/, but "
            f"not in {FOLDER}/"
        )
    return key


def output_key(job: str) -> str:
    """Return the path of a job's answer."""
    return f"{FOLDER}/output/{job}.out"


def failure_key(job: str) -> str:
    """Return the path of a job's error."""
    return f"{FOLDER}/failure/{job}-error.out"


def ttl_s(text: str) -> float:
    """Return the seconds after which a waiting request expires. An empty ``text`` means the default.

    Raise BadRequest if ``text`` is not a whole number from ``LEAST_TTL_S`` to ``MOST_TTL_S``.
    """
    if not text:
        return DEFAULT_TTL_S
    if not text.isdecimal() or len(text) > 9 or not LEAST_TTL_S <= int(text) <= MOST_TTL_S:
        raise BadRequest(
            f"RequestTTLSeconds must be a number from {LEAST_TTL_S} to {MOST_TTL_S}, got {shown(text)}"
        )
    return float(text)


def inference_id(text: str, job: str) -> str:
    """Return the caller's id of a request, or the job's id if the caller gave none.

    Raise BadRequest if the caller's id is invalid.
    """
    if text and ID.fullmatch(text) is None:
        raise BadRequest(f"InferenceId must have 1 to 64 characters without blanks, got {shown(text)}")
    return text or job
