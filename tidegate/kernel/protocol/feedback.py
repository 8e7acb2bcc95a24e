"""Accepted feedback: outcomes of answers, as the gateways write them and other services read them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import orjson


@dataclass(frozen=True, slots=True)
class FeedbackRecord:
    """One outcome of one answer. Times are milliseconds since the epoch.

    ``request_id``: the ``X-Request-Id`` of the request. ``value``: the outcome if it is a number. ``label``:
    the outcome if it is a text. One of these two is None. ``at``: the time of the outcome. ``answered_at``:
    the time of the answer.

    ``assigned``: True if weights or a sticky key chose the Deployment. False if a traffic rule chose it, or
    if the request named a version. ``unit``: the hash of the sticky key; empty: the request had none.
    ``experiment``: the id of the experiment in which the Deployment was chosen; empty: no experiment.
    """

    endpoint: str
    deployment: str
    version: str
    request_id: str
    metric: str
    value: float | None
    label: str | None
    at: int
    answered_at: int
    assigned: bool = True
    unit: str = ""
    experiment: str = ""

    def to_json(self) -> bytes:
        """Return the record as a message."""
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, raw: bytes) -> FeedbackRecord:
        """Read a record. Raise ValueError or TypeError if it is broken.

        Fields that a newer version of Tidegate has added are ignored.
        """
        known = cls.__dataclass_fields__
        return cls(**{key: value for key, value in orjson.loads(raw).items() if key in known})
