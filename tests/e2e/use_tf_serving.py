"""A client of TensorFlow Serving over gRPC, unmodified: the package ``min-tfs-client``.

It has the generated modules of TensorFlow Serving's API without TensorFlow.

Standard input is JSON: ``address`` and ``rows``. Standard output is JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import grpc
import numpy as np
from min_tfs_client.requests import TensorServingClient
from min_tfs_client.tensors import tensor_proto_to_ndarray
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    prediction_service_pb2_grpc,
    regression_pb2,
)


def main() -> None:
    given = json.load(sys.stdin)
    host, port = given["address"].split(":")
    rows = np.array(given["rows"], np.float32)
    client = TensorServingClient(host, int(port))
    answer = client.predict_request("digits", {"image": rows}, model_version=1)
    found: dict[str, Any] = {
        name: tensor_proto_to_ndarray(tensor).tolist() for name, tensor in answer.outputs.items()
    }
    found["version"] = answer.model_spec.version.value
    with grpc.insecure_channel(given["address"]) as channel:
        predictions = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        for name, call, kind in (
            ("classes", predictions.Classify, classification_pb2.ClassificationRequest),
            ("numbers", predictions.Regress, regression_pb2.RegressionRequest),
        ):
            request = kind()
            request.model_spec.name = "digits"
            for row in given["rows"]:
                example = request.input.example_list.examples.add()
                example.features.feature["image"].float_list.value.extend(row)
            result = call(request).result
            found[name] = (
                [[each.score for each in one.classes] for one in result.classifications]
                if name == "classes"
                else [each.value for each in result.regressions]
            )
        metadata = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        metadata.model_spec.name = "digits"
        signatures = get_model_metadata_pb2.SignatureDefMap()
        predictions.GetModelMetadata(metadata).metadata["signature_def"].Unpack(signatures)
        image = signatures.signature_def["serving_default"].inputs["image"]
        found["image"] = [image.dtype, [dim.size for dim in image.tensor_shape.dim]]
        status = get_model_status_pb2.GetModelStatusRequest()
        status.model_spec.name = "digits"
        states = model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(status).model_version_status
        found["states"] = [[each.version, each.State.Name(each.state)] for each in states]
    try:
        client.predict_request("nothing", {"image": rows})
    except grpc.RpcError as error:
        found["unknown"] = [error.code().name, error.details()]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
