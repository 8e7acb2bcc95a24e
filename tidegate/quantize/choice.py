"""Choose a recipe by its loss and latency, and say why other recipes were refused. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Wanted = Literal["auto", "int8"]
ORIGINAL = "fp32"
# Recipes are treated as equally fast if their latencies are at most this many times the lowest latency. Among
# them, a recipe that is exact on every CPU is preferred. If several remain, the one with the smallest loss is
# chosen.
SAME_MS = 1.05


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurements of one recipe.

    ``ms``: the median time of a call. ``loss``: how much worse the answers are than the original's, from 0 to
    1. ``problem``: why the recipe has no measurements. ``full_range``: True if the recipe is exact only on
    some CPUs.
    """

    name: str
    ms: float | None = None
    size: int = 0
    loss: float = 1.0
    likeness: float = 0.0
    accuracy: float | None = None
    sqnr_db: float | None = None
    problem: str | None = None
    full_range: bool = False

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Measured:
        """Return the measurements of one recipe.

        ``row``: the recipe's entry in the study's result.
        """
        return cls(
            name=row["name"],
            ms=row.get("ms"),
            size=int(row.get("bytes") or 0),
            loss=float(row.get("loss", 1.0)),
            likeness=float(row.get("likeness", 0.0)),
            accuracy=row.get("accuracy"),
            sqnr_db=row.get("sqnr_db"),
            problem=row.get("problem"),
            full_range=bool(row.get("full_range")),
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """The recipe to serve, or :data:`ORIGINAL`. ``reasons``: why each recipe was chosen or refused."""

    name: str
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def quantised(self) -> bool:
        """Return True if a recipe was chosen."""
        return self.name != ORIGINAL


def choose(
    results: Sequence[Measured], max_loss: float, wanted: Wanted = "auto", *, portable: bool = False
) -> Choice:
    """Return the best recipe with a loss of at most ``max_loss``; the original if there is none.

    The best recipe is the fastest. If several recipes are about equally fast, see :data:`SAME_MS`. If
    ``wanted`` is ``auto``, a recipe must also be faster than the original. ``portable``: True to refuse
    recipes that are exact only on some CPUs.
    """
    original = next(each for each in results if each.name == ORIGINAL)
    reasons, able = {}, []
    for each in results:
        if each is original:
            continue
        reason = _refusal(each, original, max_loss, wanted, portable)
        if reason is None:
            able.append(each)
        else:
            reasons[each.name] = reason
    if not able:
        return Choice(ORIGINAL, {ORIGINAL: "kept, because every recipe was refused", **reasons})
    quickest = min(each.ms or 0.0 for each in able) * SAME_MS
    best = min(
        (each for each in able if (each.ms or 0.0) <= quickest),
        key=lambda each: (each.full_range, each.loss, each.ms),
    )
    slower = {
        each.name: f"{'not faster' if (each.ms or 0.0) <= quickest else 'slower'} than {best.name}"
        for each in able
        if each is not best
    }
    kept = {
        ORIGINAL: "the original",
        best.name: f"chosen as the fastest with a loss of at most {percent(max_loss)}",
    }
    return Choice(best.name, {**kept, **reasons, **slower})


def _refusal(
    each: Measured, original: Measured, max_loss: float, wanted: Wanted, portable: bool
) -> str | None:
    if each.problem is not None or each.ms is None:
        return f"failed: {each.problem or 'it was not measured'}"
    # Add a little to the limit. Otherwise, rounding could refuse a loss of exactly the limit.
    if not each.loss <= max_loss + 1e-9:
        return f"its loss of {percent(each.loss)} is above {percent(max_loss)}"
    if portable and each.full_range:
        return "exact only on CPUs with VNNI, and --portable excludes such recipes"
    if wanted == "auto" and original.ms is not None and each.ms >= original.ms:
        return f"not faster than {ORIGINAL}: {each.ms:.3g} ms against {original.ms:.3g} ms"
    return None


def percent(fraction: float) -> str:
    """Format a fraction as a percentage: 0.005 becomes ``0.5 %``."""
    return f"{round(fraction * 100, 2):g} %"
