"""BentoML: one service with three APIs."""

from __future__ import annotations

from typing import Any

import bentoml
import models
import numpy as np

BATCHED: dict[str, Any] = {"batchable": True, "max_batch_size": 64}


@bentoml.service(workers=1, traffic={"timeout": 30}, logging={"access": {"enabled": False}})
class Bench:
    """The three models."""

    def __init__(self) -> None:
        self.session = models.digits_session()

    @bentoml.api(**BATCHED)
    def identity(self, x: list[list[float]]) -> list[dict[str, Any]]:
        """Echo a batch of rows from ``x`` to ``y``."""
        return [{"y": row} for row in np.asarray(x, np.float32).tolist()]

    @bentoml.api(**BATCHED)
    def digits(self, image: list[list[float]]) -> list[dict[str, Any]]:
        """Classify a batch of rows in one call."""
        label, probabilities = models.run_digits(self.session, np.asarray(image, np.float32))
        rows = zip(label.tolist(), probabilities.tolist(), strict=True)
        return [{"label": one, "probabilities": each} for one, each in rows]

    @bentoml.api
    def image(self, body: bytes, /) -> dict[str, float]:
        """Raw bytes to ``mean``."""
        return {"mean": models.mean_of(models.image_of(body))}
