"""Print the reference intervals of ``test_experiments.py``, made by ville 0.1.0 (BSD-3).

ville needs scipy, which is no requirement here. So run this in an environment of its own:
``pip install ville==0.1.0`` and ``python -m tests.unit.router.ville_numbers``.
"""

from __future__ import annotations

import importlib

import numpy as np

CASES = ((150, 0.05, 500), (1000, 0.05, 5000), (1000, 0.01, 500), (20_000, 0.05, 5000))


def draw(kind: str, n: int) -> np.ndarray:
    """Return outcomes of a kind, always the same ones."""
    rng = np.random.default_rng(2026)
    if kind == "normal":
        return rng.normal(3, 2, n)
    return (rng.random(n) < 0.1).astype(float) if kind == "clicks" else rng.lognormal(0, 1, n)


if __name__ == "__main__":
    ville = importlib.import_module("ville")
    for name in ("normal", "clicks", "skewed"):
        for number, alpha, best_at in CASES:
            found = ville.AsymptoticCS(alpha=alpha, t_opt=best_at).fit(draw(name, number))
            low, high = found.interval()
            print(f'    ("{name}", {number}, {alpha}, {best_at}, {low:.6f}, {high:.6f}),')
