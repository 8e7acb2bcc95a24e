"""KServe's own model server, without a cluster around it."""

from __future__ import annotations

from typing import Any

import models
import uvicorn
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from kserve.utils.utils import generate_uuid


class LoopbackConfig(uvicorn.Config):
    """A server on the loopback interface only. ModelServer has no option for the interface."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"host": "127.0.0.1"})


class Served(Model):  # type: ignore[misc]
    """Converts numpy results to KServe's responses."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.ready = True

    def answer(self, request: InferRequest, arrays: dict[str, tuple[str, Any]], binary: bool) -> Any:
        """Return a response of arrays by name, with their datatypes."""
        outputs = []
        for name, (datatype, array) in arrays.items():
            output = InferOutput(name=name, shape=list(array.shape), datatype=datatype)
            output.set_data_from_numpy(array, binary_data=binary)
            outputs.append(output)
        return InferResponse(
            response_id=request.id or generate_uuid(),
            model_name=self.name,
            infer_outputs=outputs,
            use_binary_outputs=binary,
        )


class Identity(Served):
    """``x`` to ``y``."""

    def predict(self, payload: InferRequest, headers: Any = None, response_headers: Any = None) -> Any:
        """Handle one request."""
        return self.answer(payload, {"y": ("FP32", payload.inputs[0].as_numpy())}, binary=False)


class Digits(Served):
    """``image`` to ``label`` and ``probabilities``."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.session = models.digits_session()

    def predict(self, payload: InferRequest, headers: Any = None, response_headers: Any = None) -> Any:
        """Handle one request."""
        label, probabilities = models.run_digits(self.session, payload.inputs[0].as_numpy())
        arrays = {"label": ("INT64", label), "probabilities": ("FP32", probabilities)}
        return self.answer(payload, arrays, binary=False)


class Image(Served):
    """``image`` to ``mean``, binary both ways."""

    def predict(self, payload: InferRequest, headers: Any = None, response_headers: Any = None) -> Any:
        """Handle one request."""
        image = payload.inputs[0].as_numpy()
        mean = image.reshape(len(image), -1).mean(axis=1, keepdims=True)
        return self.answer(payload, {"mean": ("FP32", mean)}, binary=True)


if __name__ == "__main__":
    uvicorn.Config = LoopbackConfig  # type: ignore[misc]
    served = [Identity("identity"), Digits("digits"), Image("image")]
    ModelServer(http_port=models.port(), enable_grpc=False, workers=1).start(served)
