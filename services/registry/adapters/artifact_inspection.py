"""Check an artifact against its format, and read its signature. None of its code is executed."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from services.registry.adapters import (
    archive_reader,
    hugging_face_artifact,
    llm_artifact,
    mlflow_artifact,
    onnx_archive,
    onnx_signature,
    pickle_file,
    pickle_scan,
    pt2_file,
    saved_model,
    skops_file,
    tree_files,
    triton_config,
)
from services.registry.adapters.mapped import mapped
from services.registry.domain import (
    formats,
    needs,
    pickle_verdicts,
    pickles,
    registration,
    requirements,
    signature,
    skops_types,
    tflite_file,
    trees,
)
from services.registry.domain.needs import Need
from services.registry.domain.pickles import PickleReleases
from services.registry.domain.signature import OnnxGraph
from tidegate.kernel import archives
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import backend_class, llm, python_model, python_signature
from tidegate.kernel.protocol.archives import ArchiveLimits
from tidegate.kernel.protocol.models import Format, Signature

MODEL_FILE = "model.py"
MAX_PYTHON = 4 * 1024 * 1024
# The first bytes of a pickle (protocol 2 or later), and of joblib's compressions: zlib, gzip, bz2, xz, lzma,
# lz4.
_PICKLE_MAGIC = (b"\x80", b"\x78", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x5d\x00", b"\x04\x22\x4d\x18")


@dataclass(frozen=True, slots=True)
class Inspection:
    """The properties of an artifact.

    ``signature``: the user's signature or the one in the file; None if unknown. ``saved_by``: the library
    releases that wrote a pickle. ``needs``: packages that the model needs. ``notes``: warnings for the
    publisher. ``trusted``: names that the file may import, because the publisher trusts them.
    """

    signature: Signature | None
    requirements: list[str] = field(default_factory=list)
    saved_by: PickleReleases = field(default_factory=PickleReleases)
    needs: tuple[Need, ...] = ()
    notes: list[str] = field(default_factory=list)
    trusted: list[str] = field(default_factory=list)


def inspect(
    path: Path,
    format_: Format,
    *,
    model: str,
    user_signature: Signature | None,
    max_batch: int,
    limits: ArchiveLimits,
    allow_pickle: bool = False,
    trust: Sequence[str] = (),
) -> Inspection:
    """Check a file against its format. Return its properties.

    ``max_batch``: max_batch_size of a model with a dynamic batch axis. ``allow_pickle``: True if the
    publisher accepts a pickle. ``trust``: names that a pickle or skops file may import. Blocking: call it in
    a thread. Raise BadRequest if the file does not pass the check. The error names the problem and the
    remedy.
    """
    if format_ == "onnx":
        graph = onnx_archive.read(path, limits) if archives.is_archive(path) else onnx_signature.read(path)
        return Inspection(signature.of_graph(graph, user_signature, max_batch))
    if format_ == "llm":
        llm_artifact.check(path, limits, allow_pickle=allow_pickle)
        return Inspection(llm.SIGNATURE)
    if format_ in ("xgboost", "lightgbm", "catboost"):
        found = tree_files.read(path, format_)
        return Inspection(trees.signature_of(found.model, user_signature, max_batch), needs=(found.need,))
    if format_ in ("tflite", "tensorflow"):
        read = _tflite(path) if format_ == "tflite" else saved_model.read(path, limits)
        return Inspection(
            signature.of_graph(read, user_signature, max_batch), needs=(needs.OF_FORMAT[format_],)
        )
    if user_signature is not None:
        signature.check(user_signature)
    if format_ in ("mlflow", "huggingface", "pt2"):
        return _of_other_tools(
            path, format_, user_signature, max_batch, limits, allow_pickle=allow_pickle, trust=trust
        )
    if format_ == "triton":
        declared, required = triton_config.read(path, model, limits)
        return Inspection(_triton_signature(declared, user_signature), required)
    if format_ == "oip":
        if not llm_artifact.is_upstream(path):
            raise BadRequest(
                'The file does not describe an upstream: it must be JSON such as {"upstream": ADDRESS}. '
                "`tidegate deploy --upstream ADDRESS --name NAME` writes it."
            )
        registration.check_has_signature(format_, user_signature)
    elif format_ == "torchscript":
        _check_torchscript(path)
        registration.check_has_signature(format_, user_signature)
    elif format_ == "python":
        return _python(path, user_signature, limits)
    else:
        return _estimator(path, user_signature, limits, allow_pickle=allow_pickle, trust=trust)
    return Inspection(user_signature)


def _of_other_tools(
    path: Path,
    format_: Format,
    user_signature: Signature | None,
    max_batch: int,
    limits: ArchiveLimits,
    *,
    allow_pickle: bool,
    trust: Sequence[str],
) -> Inspection:
    """Inspect a folder of MLflow or Hugging Face, or a file of torch.export."""
    if format_ == "pt2":
        return Inspection(pt2_file.inspect(path, user_signature, max_batch, allow_pickle=allow_pickle))
    if format_ == "mlflow":
        found = mlflow_artifact.inspect(
            path, user_signature, max_batch, limits, allow_pickle=allow_pickle, trust=trust
        )
        return Inspection(found.signature, found.requirements, notes=found.notes)
    return Inspection(
        *hugging_face_artifact.inspect(path, user_signature, max_batch, limits, allow_pickle=allow_pickle)
    )


def _tflite(path: Path) -> OnnxGraph:
    with mapped(path) as data:
        return tflite_file.read(data)


def _triton_signature(declared: Signature | None, user_signature: Signature | None) -> Signature | None:
    if declared is not None and user_signature is not None:
        # A user's signature does not say if the model is decoupled or stateful. So copy both facts from
        # config.pbtxt.
        from_config = {"decoupled": declared.decoupled, "sequences": declared.sequences}
        user_signature = user_signature.model_copy(update=from_config)
    if declared is not None and user_signature is not None and declared != user_signature:
        raise BadRequest(
            "The given signature differs from the one in config.pbtxt. Leave the given signature out, or "
            "correct one of them."
        )
    return declared or user_signature


def _check_torchscript(path: Path) -> None:
    remedy = "save the model with torch.jit.save(torch.jit.script(model), path)"
    try:
        archives.check_zip(path)
        with zipfile.ZipFile(path) as archive:
            inner = [name.partition("/")[2] for name in archive.namelist()]
    # zipfile raises NotImplementedError for a zip version that it does not support.
    except (archives.BrokenArchive, zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise BadRequest(
            f"The file is not TorchScript, which is a zip archive ({error}). To convert it, {remedy}."
        ) from None
    if "constants.pkl" not in inner or not any(name.startswith("code/") for name in inner):
        raise BadRequest(
            "The file has weights but no code (torch.save of a module or a state dict). Without your "
            f"Python classes it cannot be loaded. Instead, {remedy}."
        )


def _python(path: Path, user_signature: Signature | None, limits: ArchiveLimits) -> Inspection:
    """Inspect a model.py, or an archive of a folder with a model.py and its requirements."""
    if not archives.is_packed(path):
        if path.stat().st_size > MAX_PYTHON:
            raise BadRequest(
                f"{MODEL_FILE} is larger than {MAX_PYTHON} bytes, the limit. Put data into files beside it."
            )
        return Inspection(_python_signature(path.read_bytes(), user_signature))
    names = {MODEL_FILE, requirements.FILE}
    contents = archive_reader.read_archive(path, names=names, max_text=MAX_PYTHON, limits=limits)
    if PurePosixPath(MODEL_FILE) not in contents.files:
        raise BadRequest(f"An archive of a Python model needs {MODEL_FILE} at its root.")
    found = _python_signature(contents.texts[PurePosixPath(MODEL_FILE)].encode(), user_signature)
    text = contents.texts.get(PurePosixPath(requirements.FILE), "")
    return Inspection(found, requirements.parse(text, requirements.FILE))


def _python_signature(source: bytes, user_signature: Signature | None) -> Signature | None:
    """Return the signature of a model.py; for a class of Triton's Python backend, the user's signature."""
    tree = python_model.parsed(source, MODEL_FILE)
    if backend_class.is_for_the_backend(tree):
        describes_itself = backend_class.may_describe_itself(tree)
        registration.check_has_signature("python", user_signature, describes_itself=describes_itself)
        return user_signature
    found = python_signature.signature_of(python_model.read(tree), user_signature)
    signature.check(found)
    return found


def _estimator(
    path: Path,
    user_signature: Signature | None,
    limits: ArchiveLimits,
    *,
    allow_pickle: bool,
    trust: Sequence[str],
) -> Inspection:
    """Inspect a scikit-learn estimator: a skops file, or a pickle."""
    if skops_file.is_skops(path):
        asked = skops_types.untrusted(skops_file.types(path, limits))
        skops_types.check(asked, trust)
        return Inspection(user_signature, needs=(needs.SKOPS,), trusted=sorted(set(trust)))
    formats.check_pickle_allowed("sklearn", allow_pickle=allow_pickle)
    _check_pickle(path)
    found = pickle_scan.imports(path)
    pickle_verdicts.check(pickle_verdicts.dangerous(found, pickle_scan.flagged(found)), trust)
    return Inspection(
        user_signature,
        saved_by=pickles.releases_in(pickle_file.pieces(path)),
        needs=tuple(needs.of_modules({module.partition(".")[0] for module, _ in found})),
        notes=pickle_verdicts.notes(found),
        trusted=sorted(set(trust)),
    )


def _check_pickle(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(8)
    if not magic.startswith(_PICKLE_MAGIC):
        raise BadRequest(
            "The file was not written by joblib.dump. Save the estimator with joblib.dump(model, path)."
        )
