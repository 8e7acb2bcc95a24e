"""Count the characters of each text."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The second step of the ensemble."""

    def execute(self, requests):
        """Return one response for each request."""
        return [self._count(pb_utils.get_input_tensor_by_name(request, "text")) for request in requests]

    def _count(self, texts):
        lengths = np.array([len(text.decode()) for text in texts.as_numpy().ravel()], dtype=np.int64)
        return pb_utils.InferenceResponse([pb_utils.Tensor("length", lengths.reshape(texts.shape()))])
