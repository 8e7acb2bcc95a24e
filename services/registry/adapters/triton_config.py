"""Read a model's config.pbtxt with Triton's protobuf classes: batching, inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.registry.adapters import archive_reader
from services.registry.domain import requirements, signature, triton_layout
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.archives import ArchiveLimits
from tidegate.kernel.protocol.models import Datatype, SequenceSpec, Signature, TensorSpec
from tidegate.kernel.protocol.sequences import spec_of, tightest

MAX_CONFIG = 1024 * 1024

_RENAMED: dict[str, Datatype] = {"STRING": "BYTES"}
_SAME: tuple[Datatype, ...] = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BF16",
)  # fmt: skip
DATATYPES: dict[str, Datatype] = {name: name for name in _SAME} | _RENAMED


@dataclass(frozen=True, slots=True)
class TritonConfig:
    """The fields of a config.pbtxt that the registry needs.

    ``signature`` None: the config does not declare inputs and outputs. ``parts``: the models of an ensemble.
    ``sequences`` None: the model is stateless.
    """

    is_ensemble: bool
    parts: frozenset[str]
    signature: Signature | None
    sequences: SequenceSpec | None = None


def read(path: Path, model: str, limits: ArchiveLimits) -> tuple[Signature | None, list[str]]:
    """Return the signature and all pip requirements of a Triton model directory. Blocking.

    ``model``: the name of the registered model. The signature is None if the config does not declare inputs
    and outputs. Then Triton derives them when it loads the model.

    Raise BadRequest if a file is invalid, or if it is not clear which model gets the requests.
    """
    names = {triton_layout.CONFIG, requirements.FILE}
    contents = archive_reader.read_archive(path, names=names, max_text=MAX_CONFIG, limits=limits)
    folders = triton_layout.models(contents.files)
    configs = {
        folder: parse(contents.texts[triton_layout.config_path(folder)], str(folder))
        for folder in folders
        if triton_layout.config_path(folder) in contents.texts
    }
    parts = frozenset().union(*(config.parts for config in configs.values()))
    # The archive may have several models, each in its own folder. Requests go to the folder with the name
    # ``model``. If there is none, they go to the ensemble that no other ensemble uses. ``heads``: for each
    # folder, True if its model is such an ensemble.
    heads = {f: config.is_ensemble and f.name not in parts for f, config in configs.items()}
    served = triton_layout.served(folders, model, heads)
    for folder in folders:
        if folder not in configs or not configs[folder].is_ensemble:
            triton_layout.check_versions(folder, contents.files)
    declared = configs[served].signature if served in configs else None
    # If one model of an ensemble is stateful, the ensemble is stateful too.
    stateful = [config.sequences for config in configs.values() if config.sequences is not None]
    if declared is not None and stateful:
        declared = declared.model_copy(update={"sequences": tightest(stateful)})
    return declared, requirements.gathered(folders, contents.texts)


def parse(text: str, where: str) -> TritonConfig:
    """Parse a config.pbtxt. ``where``: the file's folder, for messages.

    Raise BadRequest if the file is invalid. A syntax error is reported with its line and column.
    """
    # Import these modules only here. They load gRPC, which most registries never need.
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    config = model_config_pb2.ModelConfig()
    try:
        # Allow unknown fields, because a newer Triton may have more fields. Triton checks them itself.
        text_format.Parse(text, config, allow_unknown_field=True)
    except (text_format.ParseError, RecursionError) as error:
        # The parser's message quotes the file. Replace its control characters, which could disturb the user's
        # terminal.
        reason = "".join(each if each.isprintable() else "?" for each in str(error))[:300]
        raise BadRequest(
            f"config.pbtxt of {where!r} cannot be read: {reason}. Correct the file and deploy again."
        ) from None
    if config.max_batch_size < 0:
        raise BadRequest(
            f"config.pbtxt of {where!r}: max_batch_size is {config.max_batch_size}, but must be 0 or more."
        )
    is_ensemble = config.platform == "ensemble" or config.HasField("ensemble_scheduling")
    parts = frozenset(step.model_name for step in config.ensemble_scheduling.step)
    sequences = spec_of(config)
    if not config.input or not config.output:
        return TritonConfig(is_ensemble, parts, None, sequences)
    declared = Signature(
        inputs=[_tensor(each, where) for each in config.input],
        outputs=[_tensor(each, where) for each in config.output],
        max_batch_size=config.max_batch_size,
        decoupled=config.model_transaction_policy.decoupled,
        sequences=sequences,
    )
    signature.check(declared)
    return TritonConfig(is_ensemble, parts, declared, sequences)


def _tensor(declared: Any, where: str) -> TensorSpec:
    from tritonclient.grpc import model_config_pb2

    named = model_config_pb2.DataType.Name(declared.data_type).removeprefix("TYPE_")
    if named not in DATATYPES:
        raise BadRequest(f"config.pbtxt of {where!r}: {declared.name!r} has no usable data_type ({named}).")
    if not declared.name or any(dim < -1 or dim == 0 for dim in declared.dims):
        raise BadRequest(
            f"config.pbtxt of {where!r}: each input and output needs a name, and each of its dims must be "
            f"-1 or at least 1. But {declared.name!r} has the dims {list(declared.dims)}."
        )
    # Only inputs have the field ``optional``.
    optional = bool(getattr(declared, "optional", False))
    return TensorSpec(
        name=declared.name, datatype=DATATYPES[named], shape=list(declared.dims), optional=optional
    )
