"""Calls its neighbour, and calls it again with smaller numbers when it fails."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """What an ensemble cannot express: the next call depends on the answer to the one before."""

    def execute(self, requests):
        """One response for each request."""
        return [self._one(pb_utils.get_input_tensor_by_name(request, "x").as_numpy()) for request in requests]

    def _one(self, x):
        answer = self._call(x)
        if answer.has_error():
            answer = self._call(np.minimum(x, np.float32(10)))
        if answer.has_error():
            return pb_utils.InferenceResponse([], pb_utils.TritonError(answer.error().message()))
        y = pb_utils.get_output_tensor_by_name(answer, "y").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", y)])

    def _call(self, x):
        question = pb_utils.InferenceRequest(
            model_name="limited", requested_output_names=["y"], inputs=[pb_utils.Tensor("x", x)]
        )
        return question.exec()
