"""A piece of a profile: the samples of one replica since its last piece. Pure."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from tidegate.kernel.profiles.bins import Bins, Summary, bins_from_json
from tidegate.kernel.profiles.profile import Profile

# A reader refuses a piece that unpacks to more bytes than this, so that a bad piece cannot fill the reader's
# memory.
MAX_BYTES = 32 * 2**20


class Unreadable(ValueError):
    """An error: the bytes are not a piece of a profile, or not published bins."""


class SampledPrediction(NamedTuple):
    """The prediction of one row, to be joined with feedback.

    ``request_id``: the answer's ``X-Request-Id``.
    ``label``, ``score``: None if the model returns none.
    ``at``: seconds since the epoch.
    """

    request_id: str
    label: str | None
    score: float | None
    confidence: float | None
    at: float


@dataclass(slots=True)
class ProfilePiece:
    """The counts of the rows that a replica sampled from ``begin`` to ``end``.

    ``begin``, ``end``: seconds since the epoch.

    ``bins_id``: the id of the bins of ``profile``. It is empty while the replica has no bins. Until the
    replica has bins, ``summaries`` has the quantiles of the replica's newest rows, and ``learned_rows`` is
    the number of these rows.

    If the Deployment stores raw rows, ``rows_key`` is the key of the blob with the rows, and ``rows`` is
    their number.
    """

    replica: str
    begin: float
    end: float
    bins_id: str = ""
    profile: Profile = field(default_factory=Profile)
    summaries: dict[str, Summary] = field(default_factory=dict)
    learned_rows: int = 0
    predictions: list[SampledPrediction] = field(default_factory=list)
    dropped: int = 0
    rows_key: str = ""
    rows: int = 0

    def to_bytes(self) -> bytes:
        """Return the piece as a message."""
        document = {
            "v": 1,
            "replica": self.replica,
            "begin": self.begin,
            "end": self.end,
            "bins": self.bins_id,
            "profile": self.profile.to_json(),
            "summaries": {name: [each.rows, each.points] for name, each in self.summaries.items()},
            "learned_rows": self.learned_rows,
            "predictions": [tuple(each) for each in self.predictions],
            "dropped": self.dropped,
            "rows_key": self.rows_key,
            "rows": self.rows,
        }
        return zlib.compress(orjson.dumps(document), 1)

    @classmethod
    def from_bytes(cls, raw: bytes) -> ProfilePiece:
        """Read a piece from a message. Raise Unreadable if the message contains no valid piece."""
        try:
            found: dict[str, Any] = orjson.loads(_unpacked(raw))
            if found["v"] != 1:
                raise ValueError(f"version {found['v']} is not known")
            return cls(
                str(found["replica"]),
                float(found["begin"]),
                float(found["end"]),
                str(found["bins"]),
                Profile.from_json(found["profile"]),
                {
                    str(name): Summary(int(rows), tuple(map(float, points)))
                    for name, (rows, points) in found["summaries"].items()
                },
                int(found["learned_rows"]),
                [SampledPrediction(*each) for each in found["predictions"]],
                int(found["dropped"]),
                str(found["rows_key"]),
                int(found["rows"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, zlib.error) as error:
            raise Unreadable(f"not a piece of a profile: {error!r}") from None


def _unpacked(raw: bytes) -> bytes:
    reader = zlib.decompressobj()
    found = reader.decompress(raw, MAX_BYTES)
    if reader.unconsumed_tail:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    if not reader.eof:
        raise ValueError("it is cut off")
    return found


@dataclass(frozen=True, slots=True)
class PublishedBins:
    """The bins that all replicas of a Deployment use.

    ``id``: the id of the bins. Different bins have different ids. ``id`` is empty if there are no bins yet.
    ``predictions``: True if replicas must send the predictions of sampled requests, because labels may arrive
    for them.
    """

    id: str
    bins: dict[str, Bins]
    predictions: bool = False

    def to_bytes(self) -> bytes:
        """Return the bins as a message."""
        bins = {name: each.to_json() for name, each in self.bins.items()}
        document = {"id": self.id, "bins": bins, "predictions": self.predictions}
        return zlib.compress(orjson.dumps(document), 1)

    @classmethod
    def from_bytes(cls, raw: bytes) -> PublishedBins:
        """Read bins from a message. Raise Unreadable if the message contains no valid bins."""
        try:
            found = orjson.loads(_unpacked(raw))
            return cls(str(found["id"]), bins_from_json(found["bins"]), bool(found["predictions"]))
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
            raise Unreadable(f"not the bins of a profile: {error!r}") from None
