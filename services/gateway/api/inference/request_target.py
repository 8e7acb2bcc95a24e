"""Find the target of a request from its method and path: an inference call or a new job."""

from __future__ import annotations

from typing import NamedTuple

INFER_PREFIX, INFER_SUFFIX = "/v2/models/", "/infer"
JOBS_PATH = "/v1/jobs"


class Infer(NamedTuple):
    """The target of an inference call. ``version`` is empty if the path names no version."""

    model: str
    version: str

    @classmethod
    def named(cls, name: str) -> Infer:
        """Return the target for ``{model}`` or ``{model}/versions/{version}`` in a URL path."""
        model, _, version = name.partition("/versions/")
        return cls(model, version)


class SubmitJob(NamedTuple):
    """The target of a ``POST /v1/jobs``. The request's body names the model, so both fields are empty."""

    model: str = ""
    version: str = ""


Target = Infer | SubmitJob
SUBMIT_JOB = SubmitJob()


def target_of(method: str, path: str) -> Target | None:
    """Return the target of an inference call or of a new job; None for any other request."""
    if method != "POST":
        return None
    if path.startswith(INFER_PREFIX) and path.endswith(INFER_SUFFIX):
        return Infer.named(path[len(INFER_PREFIX) : -len(INFER_SUFFIX)])
    return SUBMIT_JOB if path == JOBS_PATH else None
