"""The models as MLServer runs them."""

from typing import Annotated, Any

import models
import numpy as np
from fastapi import Body
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.handlers import custom_handler
from mlserver.types import InferenceRequest, InferenceResponse


class Identity(MLModel):
    """``x`` to ``y``."""

    async def load(self) -> bool:
        """Load nothing."""
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Echo a batch."""
        x = NumpyCodec.decode_input(payload.inputs[0])
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", x)])


class Digits(MLModel):
    """``image`` to ``label`` and ``probabilities``."""

    async def load(self) -> bool:
        """Load the model."""
        self.session = models.digits_session()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Run a batch as one call."""
        image = np.asarray(NumpyCodec.decode_input(payload.inputs[0]), np.float32)
        label, probabilities = models.run_digits(self.session, image)
        outputs = [
            NumpyCodec.encode_output("label", label.reshape(-1, 1)),
            NumpyCodec.encode_output("probabilities", probabilities),
        ]
        return InferenceResponse(model_name=self.name, outputs=outputs)


class Image(MLModel):
    """Raw bytes to ``mean``, by a custom handler, because MLServer's REST API has no binary tensors."""

    async def load(self) -> bool:
        """Load nothing."""
        return True

    @custom_handler(rest_path="/image")
    async def mean(self, body: Annotated[bytes, Body(media_type="application/octet-stream")]) -> Any:
        """Process one image."""
        return {"mean": models.mean_of(models.image_of(body))}
