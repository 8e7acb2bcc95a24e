"""Run the functions of a SageMaker model's script.

model_fn loads the model. If the script has transform_fn, this function answers each request. Otherwise, each
request passes through input_fn, predict_fn and output_fn. Each of these three has a default.

`tidegate import sagemaker` wrote this file. The model's archive is in the folder `artifact`. The model's
inputs and outputs are HTTP bodies with their content types.
"""

import importlib
import inspect
import io
import json
import sys
from pathlib import Path

import numpy as np

JSON, CSV, NPY = "application/json", "text/csv", "application/x-npy"
FACTS = json.loads((Path(__file__).parent / "tidegate_import.json").read_text())


class Model:
    """The model, and the functions of its script."""

    def load(self, folder):
        """Import the script and call model_fn."""
        home = folder / "artifact"
        sys.path.insert(0, str(home / FACTS["code"]))
        self._script = importlib.import_module(FACTS["module"])
        self._model = _called(self._script.model_fn, str(home), None)

    def predict(
        self, body: bytes, content_type: str = "application/json", accept: str = "application/json"
    ) -> {"body": bytes, "content_type": str}:
        """Return the body and the content type of the answer."""
        if hasattr(self._script, "transform_fn"):
            answer = _called(self._script.transform_fn, self._model, body, content_type, accept, None)
            return _answer(answer, accept)
        decode = getattr(self._script, "input_fn", decoded)
        call = getattr(self._script, "predict_fn", predicted)
        encode = getattr(self._script, "output_fn", encoded)
        data = _called(decode, _text(body, content_type), content_type, None)
        return _answer(_called(encode, _called(call, data, self._model, None), accept, None), accept)


def decoded(body, content_type):
    """Return the array in a body, as SageMaker's default input_fn does."""
    kind = content_type.partition(";")[0].strip()
    if kind == JSON:
        return np.array(json.loads(body))
    if kind == CSV:
        text = body if isinstance(body, str) else body.decode()
        return np.genfromtxt(io.StringIO(text), delimiter=",")
    if kind == NPY:
        return np.load(io.BytesIO(body), allow_pickle=False)
    raise ValueError(
        f"content type {kind!r} is not supported without an input_fn; send {JSON}, {CSV} or {NPY}"
    )


def predicted(data, model):
    """Return the model's answer, as SageMaker's default predict_fn does."""
    if hasattr(model, "predict"):
        return model.predict(data)
    torch = importlib.import_module("torch")
    with torch.no_grad():
        return model(torch.as_tensor(data, dtype=torch.float32))


def encoded(prediction, accept):
    """Return an answer's body and content type, as SageMaker's default output_fn does."""
    array = prediction.detach().cpu().numpy() if hasattr(prediction, "detach") else np.asarray(prediction)
    kinds = [each.partition(";")[0].strip() for each in accept.split(",")]
    kind = next((each for each in kinds if each in (CSV, NPY)), JSON)
    if kind == CSV:
        text = io.StringIO()
        np.savetxt(text, array.reshape(len(array), -1), delimiter=",", fmt="%s")
        return text.getvalue(), CSV
    if kind == NPY:
        raw = io.BytesIO()
        np.save(raw, array, allow_pickle=False)
        return raw.getvalue(), NPY
    return json.dumps(array.tolist()), JSON


def _text(body, content_type):
    """Return the body for input_fn, as in SageMaker: str for a text content type, bytes for others."""
    kind = content_type.partition(";")[0].strip()
    if kind in (JSON, CSV, "application/jsonlines") or kind.startswith("text/"):
        return body.decode()
    return body


def _called(function, *arguments):
    """Call a function of the script. Leave out the last arguments if it accepts fewer.

    The last argument is the context, which many functions do not accept.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return function(*arguments)
    places = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return function(*arguments[: len(places)])


def _answer(answer, accept):
    """Convert the script's result to the model's outputs.

    The result is a body, a tuple of a body and its content type, or a response object.
    """
    kind = accept.partition(",")[0].strip()
    kind = JSON if kind in ("", "*/*") else kind
    if isinstance(answer, tuple) and len(answer) == 2:
        answer, kind = answer
    elif hasattr(answer, "response"):  # a worker.Response of sagemaker_containers
        answer, kind = answer.response, getattr(answer, "mimetype", None) or kind
    if isinstance(answer, list) and all(isinstance(each, bytes) for each in answer):
        answer = b"".join(answer)
    if not isinstance(answer, (str, bytes, bytearray)):
        answer, kind = json.dumps(answer, default=_plain), JSON
    return {"body": answer.encode() if isinstance(answer, str) else bytes(answer), "content_type": str(kind)}


def _plain(value):
    return value.tolist() if hasattr(value, "tolist") else str(value)
