"""Write, read and adapt the text of Triton's model configuration, ``config.pbtxt``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise

from services.worker.domain.pbtxt import TOKEN, messages
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol.models import DeploymentSpec, Signature, TensorSpec, Version

ROWS = "tidegate_rows"
"""The parameter for the largest number of rows, if the dims of a model include the row axis."""

TRUSTED = "tidegate_trusted"
"""The parameter for the names that the publisher of a skops file has trusted, as JSON."""

DEFAULT_ROWS = 64


def build(
    version: Version,
    deployment: DeploymentSpec,
    *,
    model: str,
    backend: str,
    gpus: Sequence[int] = (),
    file: str | None = None,
) -> str:
    """Return the ``config.pbtxt`` with which ``backend`` serves a single-file artifact as ``model``.

    ``file`` is the file that Triton loads from the version's folder; None means the backend's default.
    ``gpus``: GPU numbers inside the replica. Each of these GPUs gets the Deployment's number of instances.

    With batching, Triton cannot describe a tensor with one scalar per row (``dims: []``). If the signature
    has such a tensor, the configuration disables Triton's batching and includes the row axis in the dims. So
    callers still get exactly the shapes of the signature. Without a signature, the model itself reports its
    tensors (Triton's auto-completion).
    """
    signature = version.signature
    parameters = {"threads": str(deployment.threads)}
    lines = [f"name: {_quoted(model)}", f"backend: {_quoted(backend)}"]
    if file is not None:
        lines.append(f"default_model_filename: {_quoted(file)}")
    if signature is None and version.format == "sklearn":
        # The output ``label`` of a classifier has one scalar per row, which Triton's batch axis does not
        # allow. So the model gets tensors with the row axis, and the parameter ROWS limits its rows.
        parameters[ROWS] = str(deployment.batching.max_batch or DEFAULT_ROWS)
    if version.trusted:
        parameters[TRUSTED] = json.dumps(version.trusted)
    if signature is not None:
        rows_spelt_out = signature.max_batch_size > 0 and has_scalar_rows(signature)
        if rows_spelt_out:
            parameters[ROWS] = str(signature.max_batch_size)
        lines.append(f"max_batch_size: {0 if rows_spelt_out else signature.max_batch_size}")
        lines += _tensors("input", signature.inputs, rows_spelt_out)
        lines += _tensors("output", signature.outputs, rows_spelt_out)
    if signature is not None and signature.decoupled:
        lines.append("model_transaction_policy { decoupled: true }")
    lines.append(_instance_group(deployment.instances, gpus))
    parameters |= _backend_parameters(backend, deployment.threads)
    lines += [_parameter(key, value) for key, value in parameters.items()]
    return "\n".join(lines) + "\n"


def _instance_group(count: int, gpus: Sequence[int]) -> str:
    kind = f"KIND_GPU gpus: [ {', '.join(map(str, gpus))} ]" if gpus else "KIND_CPU"
    return f"instance_group [ {{ count: {count} kind: {kind} }} ]"


def has_scalar_rows(signature: Signature) -> bool:
    """Return True if a tensor of the signature has one scalar per row."""
    return any(not tensor.shape for tensor in (*signature.inputs, *signature.outputs))


def top_level(text: str) -> dict[str, str]:
    """Return the top-level fields of a ``config.pbtxt``: scalars without quotes, other values as ''."""
    return {name: value for name, value, _ in _top_level_fields(text)}


def adapt(
    text: str,
    deployment: DeploymentSpec,
    *,
    model: str,
    backend: str | None,
    stand_in: bool = False,
    gpus: Sequence[int] = (),
) -> str:
    """Return the user's configuration ``text`` with only the necessary changes.

    ``text`` may be empty. Its field ``name`` gets the value ``model``, the name of the model's folder. Triton
    refuses a model with another name. In an ensemble, nothing else changes.

    The instances, the GPUs, the threads and the backend are each added only if ``text`` does not set them.
    ``stand_in``: True if a runtime of Tidegate replaces ``backend``.
    """
    fields = {name: value for name, value, _ in _top_level_fields(text)}
    if is_ensemble(text):
        return _with_values(text, {"name": model})
    lines = []
    if "instance_group" not in fields and gpus:
        lines.append(_instance_group(deployment.instances, gpus))
    elif "instance_group" not in fields and deployment.instances > 1:
        lines.append(f"instance_group [ {{ count: {deployment.instances} }} ]")
    settings = _backend_parameters(backend, deployment.threads)
    lines += [_parameter(key, value) for key, value in settings.items() if key not in text]
    values = {"name": model}
    if backend is not None and not fields.keys() & {"backend", "platform"}:
        values["backend"] = backend
    if stand_in:
        values |= {"backend": "python"} | dict.fromkeys(
            fields.keys() & {"platform", "default_model_filename"}, ""
        )
    text = _with_values(text, values)
    return "\n".join([text.rstrip(), *lines]) + "\n" if lines else text


def _with_values(text: str, values: Mapping[str, str]) -> str:
    """Return ``text`` with new values of top-level string fields."""
    spans = {name: span for name, _, span in _top_level_fields(text)}
    for name in sorted(values.keys() & spans.keys(), key=lambda each: spans[each], reverse=True):
        begin, end = spans[name]
        text = text[:begin] + _quoted(values[name]) + text[end:]
    new = [f"{name}: {_quoted(value)}\n" for name, value in values.items() if name not in spans]
    return "".join(new) + text


def load_order(configs: Mapping[str, str], served: str) -> list[str]:
    """Return the models of an archive in load order. An ensemble comes after the models in it.

    ``served`` comes last. It may be a Python model that calls other models. Its configuration does not name
    these models, so all other models are loaded before it.
    """
    order: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        # A cycle has no correct order. Triton reports the cycle.
        if name in order or name in above or name not in configs:
            return
        for part in sorted(parts(configs[name])):
            visit(part, (*above, name))
        order.append(name)

    for name in sorted(configs, key=lambda each: (each == served, is_ensemble(configs[each]), each)):
        visit(name, ())
    return [*(name for name in order if name != served), served]


def parts(text: str) -> set[str]:
    """Return the names of the models that an ensemble connects; an empty set if the model is no ensemble."""
    if not is_ensemble(text):
        return set()
    tokens = [t for t in TOKEN.finditer(text) if t.lastgroup not in ("comment", "mark")]
    return {
        value.group()[1:-1]
        for key, value in pairwise(tokens)
        if key.group() == "model_name" and value.lastgroup == "string"
    }


def served_model(configs: Mapping[str, str], version_model: str) -> str:
    """Return the name of the model that callers use. ``configs``: the configuration of each model.

    If there is only one model, return it. Otherwise return the model with the name ``version_model``. If no
    model has this name, return the ensemble that is not a part of another ensemble. Raise ModelFailed if
    there is no such ensemble, or more than one.
    """
    if not configs:
        raise ModelFailed(
            "The archive holds no Triton model. A model is a folder with a config.pbtxt, or with a numbered "
            "version folder such as 1/."
        )
    if len(configs) == 1:
        return next(iter(configs))
    if version_model in configs:
        return version_model
    inner = set().union(*(parts(text) for text in configs.values()))
    ensembles = [name for name, text in configs.items() if is_ensemble(text) and name not in inner]
    if len(ensembles) == 1:
        return ensembles[0]
    raise ModelFailed(
        f"The archive holds several models ({', '.join(sorted(configs))}), and callers can use only one. "
        f"Rename the model for callers to {version_model!r}, or add exactly one ensemble that connects "
        "the models."
    )


def is_ensemble(text: str) -> bool:
    """Return True for the configuration of an ensemble."""
    fields = top_level(text)
    return fields.get("platform") == "ensemble" or "ensemble_scheduling" in fields


def backend_of(text: str) -> str | None:
    """Return the backend that a configuration's ``backend`` or ``platform`` names, or None."""
    fields = top_level(text)
    if fields.get("backend"):
        return fields["backend"]
    platforms = {
        "onnxruntime_onnx": "onnxruntime",
        "pytorch_libtorch": "pytorch",
        "tensorrt_plan": "tensorrt",
    }
    return platforms.get(fields.get("platform", ""))


def wants_cache(text: str) -> bool:
    """Return True if a configuration enables Triton's response cache."""
    values = [value for cache in messages(text, "response_cache") for value in cache.get("enable", ())]
    return bool(values) and values[-1] in {"true", "True", "t", "1"}


def _tensors(kind: str, tensors: Sequence[TensorSpec], rows_spelt_out: bool) -> list[str]:
    lines = []
    for tensor in tensors:
        datatype = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
        shape = [-1, *tensor.shape] if rows_spelt_out else tensor.shape
        if not shape:
            raise ModelFailed(
                f"The {kind} {tensor.name!r} has no dimensions. Without a batch axis Triton cannot serve it. "
                "Give it the shape [1] in the signature."
            )
        dims = ", ".join(map(str, shape))
        optional = " optional: true" if tensor.optional and kind == "input" else ""
        tensor_type = f"data_type: TYPE_{datatype} dims: [ {dims} ]{optional}"
        lines.append(f"{kind} [ {{ name: {_quoted(tensor.name)} {tensor_type} }} ]")
    return lines


def _backend_parameters(backend: str | None, threads: int) -> dict[str, str]:
    """Return the parameters that set the number of threads of ``backend``.

    Tidegate's own runtimes for these backends read the same parameters.
    """
    if backend == "onnxruntime":
        return {"intra_op_thread_count": str(threads), "inter_op_thread_count": "1"}
    if backend == "pytorch":
        return {"INTRA_OP_THREAD_COUNT": str(threads), "INTER_OP_THREAD_COUNT": "1"}
    return {}


def _parameter(key: str, value: str) -> str:
    return f"parameters [ {{ key: {_quoted(key)} value: {{ string_value: {_quoted(value)} }} }} ]"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _top_level_fields(text: str) -> list[tuple[str, str, tuple[int, int]]]:
    """Return each top-level field in order: its name, its scalar value or '', and the value's position."""
    fields: list[tuple[str, str, tuple[int, int]]] = []
    depth = 0
    field: str | None = None
    for token in TOKEN.finditer(text):
        kind, value = token.lastgroup, token.group()
        if kind in ("comment", "mark"):
            continue
        if kind == "open":
            if depth == 0 and field is not None:
                fields.append((field, "", token.span()))
                field = None
            depth += 1
        elif kind == "close":
            depth -= 1
        elif depth == 0 and field is None and kind == "word":
            field = value
        elif depth == 0 and field is not None:
            fields.append((field, value[1:-1] if kind == "string" else value, token.span()))
            field = None
    return fields
