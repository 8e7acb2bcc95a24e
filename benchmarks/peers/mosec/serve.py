"""mosec: an HTTP server in Rust, with a Python worker process for each model."""

from __future__ import annotations

from typing import Any

import models
import numpy as np
import orjson
from mosec import Runtime, Server, Worker

BATCH = 64


class Json(Worker):
    """JSON in and out by orjson."""

    def deserialize(self, data: bytes) -> Any:
        """Decode the body as an object."""
        return orjson.loads(data)

    def serialize(self, data: Any) -> bytes:
        """Encode an object as JSON."""
        return orjson.dumps(data, option=orjson.OPT_SERIALIZE_NUMPY)


class Identity(Json):
    """``x`` to ``y``."""

    def forward(self, data: list[Any]) -> list[Any]:
        """Echo a batch of requests."""
        return [{"y": np.asarray(each["x"], np.float32)} for each in data]


class Digits(Json):
    """``image`` to ``label`` and ``probabilities``."""

    def __init__(self) -> None:
        self.session = models.digits_session()

    def forward(self, data: list[Any]) -> list[Any]:
        """Run a batch of requests of one row each, as one call."""
        images = np.asarray([each["image"][0] for each in data], np.float32)
        label, probabilities = models.run_digits(self.session, images)
        return [
            {"label": label[at : at + 1], "probabilities": probabilities[at : at + 1]}
            for at in range(len(data))
        ]


class Image(Json):
    """Raw bytes to ``mean``."""

    def deserialize(self, data: bytes) -> Any:
        """Decode the body as an image."""
        return models.image_of(data)

    def forward(self, data: Any) -> Any:
        """Process one image."""
        return {"mean": models.mean_of(data)}


if __name__ == "__main__":
    server = Server()
    server.register_runtime(
        {
            "/identity": [Runtime(Identity, num=1, max_batch_size=BATCH, max_wait_time=1)],
            "/digits": [Runtime(Digits, num=1, max_batch_size=BATCH, max_wait_time=1)],
            "/image": [Runtime(Image, num=1)],
        }
    )
    server.run()
