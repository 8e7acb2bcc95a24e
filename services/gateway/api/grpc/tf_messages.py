"""The protobuf messages of the gRPC methods of TensorFlow Serving that Tidegate serves.

TensorFlow's own Python modules for these messages are part of the package tensorflow, which is 600 MB. So the
messages are described here. The names and field numbers are those of ``tensorflow/core`` and
``tensorflow_serving/apis``. Fields that Tidegate does not read are left out, because protobuf skips unknown
fields. The messages are in a separate descriptor pool, so that a program can also import TensorFlow's own
messages.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

_PACKAGE = "tidegate.tf"
# The messages, each with a list of its fields. A field is written as its number, its name and its type. A
# type ``*T`` is a list of ``T``, and ``<T>`` is a map from strings to ``T``. Enums are declared as int32,
# which has the same encoding.
_MESSAGES = {
    "Int64Value": "1 value int64",
    "Any": "1 type_url string, 2 value bytes",
    "Dim": "1 size int64, 2 name string",
    "TensorShapeProto": "2 dim *Dim, 3 unknown_rank bool",
    "TensorProto": "1 dtype int32, 2 tensor_shape TensorShapeProto, 4 tensor_content bytes, "
    "5 float_val *float, 6 double_val *double, 7 int_val *int32, 8 string_val *bytes, 10 int64_val *int64, "
    "11 bool_val *bool, "
    "13 half_val *int32, 16 uint32_val *uint32, 17 uint64_val *uint64",
    "ModelSpec": "1 name string, 2 version Int64Value, 3 signature_name string, 4 version_label string",
    "PredictRequest": "1 model_spec ModelSpec, 2 inputs <TensorProto>, 3 output_filter *string",
    "PredictResponse": "1 outputs <TensorProto>, 2 model_spec ModelSpec",
    "BytesList": "1 value *bytes",
    "FloatList": "1 value *float",
    "Int64List": "1 value *int64",
    "Feature": "1 bytes_list BytesList, 2 float_list FloatList, 3 int64_list Int64List",
    "Features": "1 feature <Feature>",
    "Example": "1 features Features",
    "ExampleList": "1 examples *Example",
    "ExampleListWithContext": "1 examples *Example, 2 context Example",
    "Input": "1 example_list ExampleList, 2 example_list_with_context ExampleListWithContext",
    "ClassificationRequest": "1 model_spec ModelSpec, 2 input Input",
    "Class": "1 label string, 2 score float",
    "Classifications": "1 classes *Class",
    "ClassificationResult": "1 classifications *Classifications",
    "ClassificationResponse": "1 result ClassificationResult, 2 model_spec ModelSpec",
    "RegressionRequest": "1 model_spec ModelSpec, 2 input Input",
    "Regression": "1 value float",
    "RegressionResult": "1 regressions *Regression",
    "RegressionResponse": "1 result RegressionResult, 2 model_spec ModelSpec",
    "TensorInfo": "1 name string, 2 dtype int32, 3 tensor_shape TensorShapeProto",
    "SignatureDef": "1 inputs <TensorInfo>, 2 outputs <TensorInfo>, 3 method_name string",
    "SignatureDefMap": "1 signature_def <SignatureDef>",
    "GetModelMetadataRequest": "1 model_spec ModelSpec, 2 metadata_field *string",
    "GetModelMetadataResponse": "1 model_spec ModelSpec, 2 metadata <Any>",
    "GetModelStatusRequest": "1 model_spec ModelSpec",
    "StatusProto": "1 error_code int32, 2 error_message string",
    "ModelVersionStatus": "1 version int64, 2 state int32, 3 status StatusProto",
    "GetModelStatusResponse": "1 model_version_status *ModelVersionStatus",
}
_SCALARS = {
    kind: getattr(FieldDescriptorProto, f"TYPE_{kind.upper()}")
    for kind in ("int32", "int64", "uint32", "uint64", "float", "double", "bool", "string", "bytes")
}


def _file() -> FileDescriptorProto:
    file = FileDescriptorProto(name="tidegate/tf.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for text in fields.split(", "):
            number, field_name, kind = text.split(" ")
            field = message.field.add(name=field_name, number=int(number))
            field.label = field.LABEL_REPEATED if kind[0] in "*<" else field.LABEL_OPTIONAL
            if kind[0] == "<":
                entry = message.nested_type.add(name=f"{field_name.title().replace('_', '')}Entry")
                entry.options.map_entry = True
                key = entry.field.add(name="key", number=1, label=field.LABEL_OPTIONAL)
                key.type = field.TYPE_STRING
                value = entry.field.add(name="value", number=2, label=field.LABEL_OPTIONAL)
                _set_type(value, kind[1:-1])
                _set_type(field, f"{name}.{entry.name}")
            else:
                _set_type(field, kind.removeprefix("*"))
    return file


def _set_type(field: Any, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type, field.type_name = field.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"


def _classes() -> dict[str, Any]:
    pool = DescriptorPool()
    pool.Add(_file())
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES}


MESSAGES = _classes()
