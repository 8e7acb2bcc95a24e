"""Remove the blanks around each text."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The first step of the ensemble."""

    def execute(self, requests):
        """Return one response for each request."""
        return [self._clean(pb_utils.get_input_tensor_by_name(request, "text")) for request in requests]

    def _clean(self, texts):
        clean = np.array([text.strip() for text in texts.as_numpy().ravel()], dtype=object)
        return pb_utils.InferenceResponse([pb_utils.Tensor("clean", clean.reshape(texts.shape()))])
