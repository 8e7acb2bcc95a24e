"""Triton's model configuration (``config.pbtxt``) as text: written, read and adapted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tidegate.errors import ModelFailed
from tidegate.protocol.models import DeploymentSpec, Signature, TensorSpec, Version

ROWS = "tidegate_rows"
"""Parameter: the model takes up to this many rows, along a first axis that the dims spell out themselves."""

DEFAULT_ROWS = 64

_TOKEN = re.compile(
    r"""(?P<comment>\#[^\n]*)|(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|(?P<open>[{\[<])|(?P<close>[}\]>])"""
    r"""|(?P<word>[A-Za-z_][\w.+-]*)|(?P<number>[-+.\d][\w.+-]*)|(?P<mark>[:,;])""",
    re.X,
)


def build(version: Version, deployment: DeploymentSpec, *, model: str, backend: str) -> str:
    """The ``config.pbtxt`` of a single-file artifact served by ``backend`` under the name ``model``.

    Triton knows no scalar per row (``dims: []``). A signature that has one is served with Triton's own
    batching off and the row axis spelt out in the dims, so that a client gets exactly the shapes that the
    signature promises. Without a signature the tensors are left to the model (Triton's auto-completion).
    """
    signature = version.signature
    parameters = {"threads": str(deployment.threads)}
    lines = [f"name: {_quoted(model)}", f"backend: {_quoted(backend)}"]
    if signature is None and version.format == "sklearn":
        # The runtime describes the estimator with the row axis spelt out: a label is a scalar per row.
        parameters[ROWS] = str(deployment.batching.max_batch or DEFAULT_ROWS)
    if signature is not None:
        rows_spelt_out = signature.max_batch_size > 0 and has_scalar_rows(signature)
        if rows_spelt_out:
            parameters[ROWS] = str(signature.max_batch_size)
        lines.append(f"max_batch_size: {0 if rows_spelt_out else signature.max_batch_size}")
        lines += _tensors("input", signature.inputs, rows_spelt_out)
        lines += _tensors("output", signature.outputs, rows_spelt_out)
    lines.append(f"instance_group [ {{ count: {deployment.instances} kind: KIND_CPU }} ]")
    lines += _backend_settings(backend, deployment.threads)
    lines += [_parameter(key, value) for key, value in parameters.items()]
    return "\n".join(lines) + "\n"


def has_scalar_rows(signature: Signature) -> bool:
    """Whether a tensor of the signature is one value per row."""
    return any(not tensor.shape for tensor in (*signature.inputs, *signature.outputs))


def top_level(text: str) -> dict[str, str]:
    """The fields at the top of a ``config.pbtxt``: scalars with their unquoted value, others with ''."""
    return {name: value for name, value, _ in _top_level_fields(text)}


def adapt(text: str, *, model: str, instances: int) -> str:
    """The user's own configuration, changed only where it must be.

    ``name`` becomes ``model`` (Triton refuses one that differs from its folder); more than one instance is
    added if the text says nothing of instances.
    """
    fields = {name: (value, span) for name, value, span in _top_level_fields(text)}
    if "name" not in fields:
        text = f"name: {_quoted(model)}\n{text}"
    elif fields["name"][0] != model:
        begin, end = fields["name"][1]
        text = text[:begin] + _quoted(model) + text[end:]
    if instances > 1 and "instance_group" not in fields:
        text = f"{text.rstrip()}\ninstance_group [ {{ count: {instances} }} ]\n"
    return text


def served_model(configs: Mapping[str, str], wanted: str) -> str:
    """Which of the models in one folder (name -> config text, may be empty) is the one that clients call.

    The only one; else the one called ``wanted``; else the only ensemble. Raises ModelFailed when none of
    that decides.
    """
    if not configs:
        raise ModelFailed(
            "The archive holds no Triton model: a folder with config.pbtxt or a numbered version folder."
        )
    if len(configs) == 1:
        return next(iter(configs))
    if wanted in configs:
        return wanted
    ensembles = [name for name, text in configs.items() if is_ensemble(text)]
    if len(ensembles) == 1:
        return ensembles[0]
    raise ModelFailed(
        f"The archive holds several models ({', '.join(sorted(configs))}), and it is unclear which to serve: "
        f"name one of them {wanted!r}, or put exactly one ensemble in it."
    )


def is_ensemble(text: str) -> bool:
    """Whether a configuration is one that only connects other models."""
    fields = top_level(text)
    return fields.get("platform") == "ensemble" or "ensemble_scheduling" in fields


def backend_of(text: str) -> str | None:
    """The backend that a configuration names (``backend`` or ``platform``); None: Triton finds it."""
    fields = top_level(text)
    if fields.get("backend"):
        return fields["backend"]
    platforms = {
        "onnxruntime_onnx": "onnxruntime",
        "pytorch_libtorch": "pytorch",
        "tensorrt_plan": "tensorrt",
    }
    return platforms.get(fields.get("platform", ""))


def _tensors(kind: str, tensors: Sequence[TensorSpec], rows_spelt_out: bool) -> list[str]:
    lines = []
    for tensor in tensors:
        datatype = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
        shape = [-1, *tensor.shape] if rows_spelt_out else tensor.shape
        if not shape:
            raise ModelFailed(
                f"The {kind} {tensor.name!r} has no dimensions, which Triton cannot serve without a batch "
                "axis: give it shape [1]."
            )
        dims = ", ".join(map(str, shape))
        lines.append(
            f"{kind} [ {{ name: {_quoted(tensor.name)} data_type: TYPE_{datatype} dims: [ {dims} ] }} ]"
        )
    return lines


def _backend_settings(backend: str, threads: int) -> list[str]:
    if backend == "onnxruntime":
        return [_parameter("intra_op_thread_count", str(threads)), _parameter("inter_op_thread_count", "1")]
    if backend == "pytorch":
        return [_parameter("INTRA_OP_THREAD_COUNT", str(threads)), _parameter("INTER_OP_THREAD_COUNT", "1")]
    return []


def _parameter(key: str, value: str) -> str:
    return f"parameters [ {{ key: {_quoted(key)} value: {{ string_value: {_quoted(value)} }} }} ]"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _top_level_fields(text: str) -> list[tuple[str, str, tuple[int, int]]]:
    """(field, scalar value or '', the value's span) in order of appearance."""
    fields: list[tuple[str, str, tuple[int, int]]] = []
    depth = 0
    field: str | None = None
    for token in _TOKEN.finditer(text):
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
