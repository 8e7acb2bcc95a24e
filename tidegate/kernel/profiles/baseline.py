"""The baseline of a version: a profile and its bins, with which later samples are compared. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from tidegate.kernel.profiles.bins import Bins, bins_from_json, learn_all
from tidegate.kernel.profiles.columns import Columns
from tidegate.kernel.profiles.profile import Profile

BaselineSource = Literal["training", "first_rows"]


@dataclass(frozen=True, slots=True)
class Baseline:
    """The profile of a version's training data or of its first rows."""

    source: BaselineSource
    bins: dict[str, Bins]
    profile: Profile

    @property
    def bins_id(self) -> str:
        """Return the id of the bins. Equal bins have the same id."""
        return bins_id(self.bins)

    def to_json(self) -> dict[str, Any]:
        """Return the baseline as JSON values."""
        return {
            "v": 1,
            "source": self.source,
            "bins": {name: each.to_json() for name, each in self.bins.items()},
            "profile": self.profile.to_json(),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Baseline:
        """Read the result of :meth:`to_json`. Raise ValueError for anything else."""
        try:
            if found["v"] != 1 or found["source"] not in ("training", "first_rows"):
                raise ValueError("the baseline's format version or its source is not known")
            bins, profile = bins_from_json(found["bins"]), Profile.from_json(found["profile"])
            for name, numbers in profile.numbers.items():
                if name not in bins or len(numbers.counts) != len(bins[name].cuts) + 1:
                    raise ValueError(f"the counts of {name} do not fit its bins")
            return cls(found["source"], bins, profile)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"a member is missing or has the wrong type: {error!r}") from None


def bins_id(bins: Mapping[str, Bins]) -> str:
    """Return the id of these bins, a hash of their cuts."""
    document = {name: bins[name].to_json() for name in sorted(bins)}
    return hashlib.sha256(orjson.dumps(document)).hexdigest()[:16]


def training_baseline(columns: Columns) -> Baseline:
    """Return the baseline of training data."""
    bins, profile = learn_all(columns), Profile()
    profile.count(columns, bins)
    return Baseline("training", bins, profile)
