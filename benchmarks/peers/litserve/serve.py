"""LitServe: API servers in front, one inference worker per model behind a queue between processes."""

from __future__ import annotations

import base64
from typing import Any

import litserve as ls
import models
import numpy as np

BATCH = 64
BATCH_TIMEOUT_S = 0.001


class Identity(ls.LitAPI):
    """``x`` to ``y``."""

    def setup(self, device: str) -> None:
        """Load nothing."""

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads an annotation
        """Return the row of a request."""
        return np.asarray(request["x"][0], np.float32)

    def predict(self, x: Any) -> Any:
        """Return a batch unchanged."""
        return x

    def encode_response(self, output: Any) -> Any:
        """Encode one row."""
        return {"y": [output.tolist()]}


class Digits(ls.LitAPI):
    """``image`` to ``label`` and ``probabilities``."""

    def setup(self, device: str) -> None:
        """Load the model."""
        self.session = models.digits_session()

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads an annotation
        """Return the row of a request."""
        return np.asarray(request["image"][0], np.float32)

    def predict(self, x: Any) -> Any:
        """Run a batch as one call; return a list of rows."""
        return list(zip(*models.run_digits(self.session, x), strict=True))

    def unbatch(self, output: Any) -> Any:
        """Return the rows, which are already separate."""
        return output

    def encode_response(self, output: Any) -> Any:
        """Encode one row."""
        label, probabilities = output
        return {"label": [int(label)], "probabilities": [probabilities.tolist()]}


class Image(ls.LitAPI):
    """``image`` in base64 to ``mean``."""

    def setup(self, device: str) -> None:
        """Load nothing."""

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads an annotation
        """Return the image of a request."""
        return models.image_of(base64.b64decode(request["image"]))

    def predict(self, x: Any) -> Any:
        """Process one image."""
        return models.mean_of(x)

    def encode_response(self, output: Any) -> Any:
        """Encode one number."""
        return {"mean": output}


if __name__ == "__main__":
    apis = [
        Identity(api_path="/identity", max_batch_size=BATCH, batch_timeout=BATCH_TIMEOUT_S),
        Digits(api_path="/digits", max_batch_size=BATCH, batch_timeout=BATCH_TIMEOUT_S),
        Image(api_path="/image"),
    ]
    server = ls.LitServer(apis, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=models.port(), generate_client_file=False, log_level="warning")
