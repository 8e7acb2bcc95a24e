"""TensorFlow Serving over gRPC: ``PredictionService`` and ``ModelService``.

Each inference request becomes a ``ModelInferRequest``. So limits, traffic rules, logs, metrics and error
codes are the same as for ``ModelInfer``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from grpc import StatusCode

from services.gateway.api.grpc.inference import GrpcInference
from services.gateway.api.grpc.server_call import MethodSpec
from services.gateway.api.grpc.tf_messages import MESSAGES
from services.gateway.application.catalogue import Catalogue
from services.gateway.domain import tf_tensors
from services.gateway.domain.rows import encoding
from services.gateway.domain.tf_tensors import NUMBERS
from tidegate.kernel.errors import BadRequest, Forbidden, NotFound
from tidegate.kernel.protocol.access import INFER, may_not_use
from tidegate.kernel.protocol.tensors import pack_strings
from tidegate.kernel.triton_protocol import pb

PREDICTION, MODELS = "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService"
SIGNATURE = "serving_default"
NAME_BYTES = 64 * 1024
# Values of TensorFlow Serving's enum ``ModelVersionStatus.State``.
LOADING, AVAILABLE = 20, 30
# MOST_EXAMPLES is the limit for the examples of a request. MOST_VALUES is the limit for the features of a
# request, for its values, and for the scores of an answer. The limits exist because the conversion of these
# messages blocks the event loop.
MOST_EXAMPLES, MOST_VALUES = 4096, 2**20


class TfServing:
    """The methods of TensorFlow Serving.

    ``max_bytes``: the most bytes of a request. It is also the most bytes of all its tensors in raw form.
    """

    def __init__(self, calls: GrpcInference, catalogue: Catalogue, *, max_bytes: int) -> None:
        self._calls = calls
        self._catalogue = catalogue
        self._max_bytes = max_bytes

    def methods(self) -> dict[str, MethodSpec]:
        """Return the methods, each under its path."""
        answered = {
            f"/{PREDICTION}/Predict": (self.predict, "PredictRequest", self._max_bytes),
            f"/{PREDICTION}/Classify": (self.classify, "ClassificationRequest", self._max_bytes),
            f"/{PREDICTION}/Regress": (self.regress, "RegressionRequest", self._max_bytes),
            f"/{PREDICTION}/GetModelMetadata": (self.metadata, "GetModelMetadataRequest", NAME_BYTES),
            f"/{MODELS}/GetModelStatus": (self.status, "GetModelStatusRequest", NAME_BYTES),
        }
        refused = {
            f"/{PREDICTION}/MultiInference": "call Predict for each model",
            f"/{MODELS}/HandleReloadConfigRequest": "use `tidegate deploy` and `tidegate delete`",
        }
        methods = {
            path: MethodSpec(call, MESSAGES[name], most) for path, (call, name, most) in answered.items()
        }
        for path, do in refused.items():
            methods[path] = MethodSpec(_refusal(path, do), MESSAGES["Any"], NAME_BYTES)
        return methods

    async def predict(self, request: Any, context: Any) -> Any:
        """Handle ``Predict``."""
        inputs, left = dict[str, tuple[str, list[int], bytes]](), self._max_bytes
        for name, tensor in request.inputs.items():
            inputs[name] = tf_tensors.raw_of(name, tensor, left)
            left -= len(inputs[name][2])
        answer = await self._infer(request.model_spec, inputs, request.output_filter, context)
        if answer is None:
            return None
        response = MESSAGES["PredictResponse"]()
        for tensor, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
            tf_tensors.proto_of(response.outputs[tensor.name], tensor.datatype, tensor.shape, raw)
        _name(response.model_spec, answer)
        return response

    async def classify(self, request: Any, context: Any) -> Any:
        """Handle ``Classify``: a label and a score for each class of each example."""
        answer = await self._examples(request, context)
        if answer is None:
            return None
        scores = encoding.scores(_arrays(answer))
        if scores.size > MOST_VALUES:
            raise BadRequest(
                f"the answer has {scores.size} scores, but this method returns at most {MOST_VALUES}: use "
                "Predict"
            )
        response = MESSAGES["ClassificationResponse"]()
        for row in scores.tolist():
            classes = response.result.classifications.add().classes
            for at, score in enumerate(row):
                classes.add(label=str(at), score=score)
        _name(response.model_spec, answer)
        return response

    async def regress(self, request: Any, context: Any) -> Any:
        """Handle ``Regress``: one number for each example."""
        answer = await self._examples(request, context)
        if answer is None:
            return None
        response = MESSAGES["RegressionResponse"]()
        for value in encoding.numbers(_arrays(answer)):
            response.result.regressions.add(value=value)
        _name(response.model_spec, answer)
        return response

    async def metadata(self, request: Any, context: Any) -> Any:
        """Handle ``GetModelMetadata``. Only the field ``signature_def`` is supported."""
        name, version = self._wanted(request.model_spec, context)
        if other := set(request.metadata_field) - {"signature_def"}:
            raise BadRequest(
                f"the metadata {sorted(other)[0][:60]!r} does not exist: request 'signature_def'"
            )
        _check(context, name)
        found = self._catalogue.metadata(name, version)
        signatures = MESSAGES["SignatureDefMap"]()
        signature = signatures.signature_def[SIGNATURE]
        signature.method_name = "tensorflow/serving/predict"
        for specs, infos in ((found["inputs"], signature.inputs), (found["outputs"], signature.outputs)):
            for spec in specs:
                info = infos[spec["name"]]
                info.name, info.dtype = f"{spec['name']}:0", NUMBERS.get(spec["datatype"], 0)
                for size in spec["shape"]:
                    info.tensor_shape.dim.add(size=size)
        response = MESSAGES["GetModelMetadataResponse"]()
        response.model_spec.name = name
        response.model_spec.version.value = int(version or found["versions"][-1])
        packed = response.metadata["signature_def"]
        packed.type_url = "type.googleapis.com/tensorflow.serving.SignatureDefMap"
        packed.value = signatures.SerializeToString()
        return response

    async def status(self, request: Any, context: Any) -> Any:
        """Handle ``GetModelStatus``."""
        name, version = self._wanted(request.model_spec, context)
        _check(context, name)
        endpoint = self._calls.core.table().endpoints.get(name)
        if endpoint is None:
            raise NotFound(f"the model {name[:100]!r} does not exist")
        response = MESSAGES["GetModelStatusResponse"]()
        for each in [version] if version else sorted(endpoint.versions, key=int):
            state = LOADING if self._catalogue.not_ready(name, each) else AVAILABLE
            response.model_version_status.add(version=int(each), state=state)
        return response

    def _wanted(self, spec: Any, context: Any) -> tuple[str, str]:
        """Return the model and the version that a ``ModelSpec`` names.

        The version is empty if the spec names none. Raise BadRequest if the signature name is unknown.

        A label in the spec is looked up in the route table. Then raise Forbidden if the caller may not use
        the model, and NotFound if the model or the label does not exist.
        """
        if spec.signature_name not in ("", SIGNATURE):
            raise BadRequest(
                f"the signature {spec.signature_name[:60]!r} does not exist: every model has only "
                f"{SIGNATURE!r}"
            )
        if not spec.version_label:
            return spec.name, str(spec.version.value) if spec.HasField("version") else ""
        _check(context, spec.name)
        endpoint = self._calls.core.table().endpoints.get(spec.name)
        if endpoint is None:
            raise NotFound(f"the model {spec.name[:100]!r} does not exist")
        return spec.name, endpoint.labelled(spec.version_label)

    async def _examples(self, request: Any, context: Any) -> Any:
        name, version = self._wanted(request.model_spec, context)
        _check(context, name)
        datatypes = {
            each["name"]: each["datatype"] for each in self._catalogue.metadata(name, version)["inputs"]
        }
        arrays = tf_tensors.columns(_features(request.input), datatypes)
        inputs = {each: (datatypes[each], list(array.shape), _raw(array)) for each, array in arrays.items()}
        return await self._infer(request.model_spec, inputs, (), context)

    async def _infer(
        self,
        spec: Any,
        inputs: Mapping[str, tuple[str, list[int], bytes]],
        outputs: Sequence[str],
        context: Any,
    ) -> Any:
        """Return the ``ModelInferResponse``; None if the call was ended with an error."""
        name, version = self._wanted(spec, context)
        request = pb.ModelInferRequest(model_name=name, model_version=version)
        for each, (datatype, shape, raw) in inputs.items():
            request.inputs.add(name=each, datatype=datatype, shape=shape)
            request.raw_input_contents.append(raw)
        for each in outputs:
            request.outputs.add(name=each)
        return await self._calls.infer(request, context)


def _check(context: Any, model: str) -> None:
    if not context.principal.may(INFER, model):
        raise Forbidden(may_not_use(context.principal, model))


def _features(given: Any) -> list[dict[str, Any]]:
    """Return the features of each example; raise BadRequest if the request is over a limit.

    The number of examples, of features and of values is limited. If the request has a context, each example
    also gets the features of the context.
    """
    with_context = given.HasField("example_list_with_context")
    source = given.example_list_with_context if with_context else given.example_list
    common = dict(source.context.features.feature) if with_context else {}
    if len(source.examples) > MOST_EXAMPLES:
        raise BadRequest(f"a request may have at most {MOST_EXAMPLES} examples: use Predict for more")
    features = sum(len(each.features.feature) + len(common) for each in source.examples)
    if features > MOST_VALUES:
        raise BadRequest(
            f"all examples together may have at most {MOST_VALUES} features: use Predict for more"
        )
    found = [{**common, **dict(each.features.feature)} for each in source.examples]
    values = sum(
        len(getattr(feature, kind).value)
        for each in found
        for feature in each.values()
        for kind in ("bytes_list", "float_list", "int64_list")
    )
    if values > MOST_VALUES:
        raise BadRequest(f"all examples together may have at most {MOST_VALUES} values: use Predict for more")
    return found


def _raw(array: tf_tensors.Array) -> bytes:
    return pack_strings(array.ravel().tolist()) if array.dtype == object else array.tobytes()


def _arrays(answer: Any) -> dict[str, np.ndarray]:
    """Return the numeric outputs, each under its name. BF16 outputs are left out."""
    found = {}
    for tensor, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        kind = tf_tensors.KINDS.get(NUMBERS.get(tensor.datatype, 0))
        if kind is not None and kind.name not in ("BYTES", "BF16"):
            shape = tuple(tensor.shape)
            found[tensor.name] = np.frombuffer(raw, kind.numpy, math.prod(shape)).reshape(shape)
    return found


def _name(spec: Any, answer: Any) -> None:
    spec.name, spec.signature_name = answer.model_name, SIGNATURE
    if answer.model_version.isdecimal():
        spec.version.value = int(answer.model_version)


def _refusal(path: str, do: str) -> Callable[[Any, Any], Any]:
    async def refuse(request: Any, context: Any) -> None:
        await context.abort(StatusCode.UNIMPLEMENTED, f"{path.rpartition('/')[2]} is not supported: {do}")

    return refuse
