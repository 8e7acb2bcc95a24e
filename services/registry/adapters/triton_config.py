"""A model's config.pbtxt: name, batching, inputs and outputs, read through Triton's own protobuf."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.registry.adapters import archive_reader
from services.registry.domain import requirements, signature, triton_layout
from services.registry.domain.archive_limits import ArchiveLimits
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Datatype, Signature, TensorSpec

MAX_CONFIG = 1024 * 1024

_RENAMED: dict[str, Datatype] = {"STRING": "BYTES"}
_SAME: tuple[Datatype, ...] = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BF16",
)  # fmt: skip
DATATYPES: dict[str, Datatype] = {name: name for name in _SAME} | _RENAMED


@dataclass(frozen=True, slots=True)
class TritonConfig:
    """What of a config.pbtxt matters here; ``signature`` None: it declares no inputs or no outputs.

    ``parts`` are the models that an ensemble connects.
    """

    is_ensemble: bool
    parts: frozenset[str]
    signature: Signature | None


def read(path: Path, model: str, limits: ArchiveLimits) -> tuple[Signature | None, list[str]]:
    """The signature of the model that an archive of a Triton model directory serves, and all requirements.

    The signature is None when its config does not say, for Triton then finds it out when it loads the model.
    Blocking: call it in a thread. Raises BadRequest.
    """
    wanted = {triton_layout.CONFIG, requirements.FILE}
    contents = archive_reader.read_archive(path, wanted=wanted, max_text=MAX_CONFIG, limits=limits)
    found = triton_layout.models(contents.files)
    configs = {
        folder: parse(contents.texts[triton_layout.config_path(folder)], str(folder))
        for folder in found
        if triton_layout.config_path(folder) in contents.texts
    }
    parts = frozenset().union(*(config.parts for config in configs.values()))
    # An ensemble that is a part of another one is not what clients call.
    heads = {f: config.is_ensemble and f.name not in parts for f, config in configs.items()}
    served = triton_layout.served(found, model, heads)
    for folder in found:
        if folder not in configs or not configs[folder].is_ensemble:
            triton_layout.check_versions(folder, contents.files)
    declared = configs[served].signature if served in configs else None
    return declared, requirements.gathered(found, contents.texts)


def parse(text: str, where: str) -> TritonConfig:
    """A config.pbtxt as far as it matters here; raises BadRequest with the parser's line and column."""
    # Imported here: it brings gRPC along, and most registries never see a model directory.
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    config = model_config_pb2.ModelConfig()
    try:
        # A newer Triton's fields are Triton's to judge, not the registry's.
        text_format.Parse(text, config, allow_unknown_field=True)
    except (text_format.ParseError, RecursionError) as error:
        raise BadRequest(f"config.pbtxt of {where!r} cannot be read: {error}.") from None
    if config.HasField("sequence_batching"):
        raise BadRequest(
            f"config.pbtxt of {where!r}: sequence_batching keeps a caller's state in one server, and behind "
            "a queue any replica may answer the next request: remove it, and send the state each time."
        )
    is_ensemble = config.platform == "ensemble" or config.HasField("ensemble_scheduling")
    parts = frozenset(step.model_name for step in config.ensemble_scheduling.step)
    if not config.input or not config.output:
        return TritonConfig(is_ensemble, parts, None)
    if config.max_batch_size < 0:
        raise BadRequest(f"config.pbtxt of {where!r}: max_batch_size is {config.max_batch_size}.")
    found = Signature(
        inputs=[_tensor(each, where) for each in config.input],
        outputs=[_tensor(each, where) for each in config.output],
        max_batch_size=config.max_batch_size,
        decoupled=config.model_transaction_policy.decoupled,
    )
    signature.check(found)
    return TritonConfig(is_ensemble, parts, found)


def _tensor(declared: Any, where: str) -> TensorSpec:
    from tritonclient.grpc import model_config_pb2

    named = model_config_pb2.DataType.Name(declared.data_type).removeprefix("TYPE_")
    if named not in DATATYPES:
        raise BadRequest(f"config.pbtxt of {where!r}: {declared.name!r} has no usable data_type ({named}).")
    if not declared.name or any(dim < -1 or dim == 0 for dim in declared.dims):
        raise BadRequest(
            f"config.pbtxt of {where!r}: each input and output needs a name and dims of -1 or at least 1; "
            f"{declared.name!r} has {list(declared.dims)}."
        )
    # Only inputs have the field.
    optional = bool(getattr(declared, "optional", False))
    return TensorSpec(
        name=declared.name, datatype=DATATYPES[named], shape=list(declared.dims), optional=optional
    )
