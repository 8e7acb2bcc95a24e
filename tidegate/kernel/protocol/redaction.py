"""Remove tracebacks and the server's paths from error messages for callers. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

from tidegate.kernel.errors import ModelFailed, NoCapacity, TidegateError, Unavailable

# An absolute path of at least two segments, at the start of a word. URLs and paths of the API do not match,
# because callers may see them.
_PATH = re.compile(
    r"(?:(?<=[\s'\"`(\[{<=,;|])|(?<=:)(?!//)|^)/(?!v[12]/|api/|health/)"
    r"(?:[^\s'\"`:,;()<>|\[\]{}/]+/)+(?P<last>[^\s'\"`:,;()<>|\[\]{}/]*)",
    re.MULTILINE,
)
# The texts that Triton puts around the error of a Python model: a prefix before it, and a traceback after it.
_AROUND = re.compile(r"^Failed to process the request\(s\) for model (?:instance )?'[^']*', message: ")
_AT = re.compile(r"\n+At:\n(?:  .*(?:\n|$))+")
_TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n(?:[ \t]+.*(?:\n|$))+")


class Told(NamedTuple):
    """The two texts of a failure: ``message`` for the caller, and ``traceback`` (or empty) for the log."""

    message: str
    traceback: str


def without_paths(text: str) -> str:
    """Return the text with each absolute path shortened to its last segment, as in ``.../model.py``."""
    return _PATH.sub(lambda found: f".../{found['last']}", text)


def for_caller(error: TidegateError) -> str:
    """Return an error's message for the caller.

    Each absolute path is shortened to its last segment if the error is a ModelFailed, NoCapacity or
    Unavailable, or a TidegateError without a class of its own. All other messages are unchanged.
    """
    if isinstance(error, ModelFailed | NoCapacity | Unavailable) or type(error) is TidegateError:
        return without_paths(error.message)
    return error.message


def told(message: str) -> Told:
    """Split a model's failure into the message for its caller and the traceback for the log."""
    removed: list[str] = []

    def remove(found: re.Match[str]) -> str:
        removed.append(found[0].strip("\n"))
        return "\n"

    short = _TRACEBACK.sub(remove, _AT.sub(remove, _AROUND.sub("", message)))
    shown = without_paths(short).strip().rstrip(";").rstrip()
    return Told(shown or "the model failed without a message", "\n".join(removed))
