"""A class: ``load`` runs once, a call of ``predict`` gets the rows of several requests."""

from typing import NamedTuple

import numpy as np

from tidegate import Tensor, batched


class Answer(NamedTuple):
    """The outputs, by name."""

    distance: Tensor[np.float32, -1]
    label: Tensor[str, -1]


class Distance:
    """The distances of points from a centre."""

    def load(self):
        """Prepare data for all calls. A real model would load its weights here."""
        self.centre = np.zeros(2, np.float32)

    @batched(max_size=64)
    def predict(self, point: Tensor[np.float32, -1, 2]) -> Answer:
        """Return one distance and one label for each row of ``point``."""
        if not np.isfinite(point).all():
            raise ValueError("a point must be finite")
        distance = np.linalg.norm(point - self.centre, axis=1)
        return Answer(distance, np.where(distance < 6, "near", "far"))
