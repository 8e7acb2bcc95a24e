"""Whether a file is what its format says, and what signature it carries. Nothing in it is ever run."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from services.registry.adapters import (
    archive_reader,
    onnx_archive,
    onnx_signature,
    pickle_file,
    triton_config,
)
from services.registry.domain import pickles, registration, requirements, signature
from services.registry.domain.archive_limits import ArchiveLimits
from services.registry.domain.pickles import PickleReleases
from tidegate.kernel import archives
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import backend_class, python_model, python_signature
from tidegate.kernel.protocol.models import Format, Signature

MODEL = "model.py"
MAX_PYTHON = 4 * 1024 * 1024
# A pickle of protocol 2 or later, or one that joblib compressed: zlib, gzip, bz2, xz, lzma, lz4.
_PICKLES = (b"\x80", b"\x78", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x5d\x00", b"\x04\x22\x4d\x18")


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a file tells of itself. ``signature``: given, or read from it; None: unknown.

    ``saved``: the releases that wrote it, of a pickle.
    """

    signature: Signature | None
    requirements: list[str] = field(default_factory=list)
    saved: PickleReleases = field(default_factory=PickleReleases)


def inspect(
    path: Path, format_: Format, *, model: str, given: Signature | None, max_batch: int, limits: ArchiveLimits
) -> Inspection:
    """Check a file against its format and return what it tells.

    Blocking: call it in a thread. Raises BadRequest, which says what was wrong and what helps.
    """
    if format_ == "onnx":
        graph = onnx_archive.read(path, limits) if archives.is_archive(path) else onnx_signature.read(path)
        return Inspection(signature.of_graph(graph, given, max_batch))
    if given is not None:
        signature.check(given)
    if format_ == "triton":
        declared, needs = triton_config.read(path, model, limits)
        return Inspection(_triton(declared, given), needs)
    if format_ == "torchscript":
        _check_torchscript(path)
        registration.check_described(format_, given)
    elif format_ == "python":
        return _python(path, given, limits)
    else:
        _check_pickle(path)
        return Inspection(given, saved=pickles.saved_with(pickle_file.pieces(path)))
    return Inspection(given)


def _triton(declared: Signature | None, given: Signature | None) -> Signature | None:
    if declared is not None and given is not None:
        given = given.model_copy(update={"decoupled": declared.decoupled})  # the config's alone to say
    if declared is not None and given is not None and declared != given:
        raise BadRequest(
            "The signature that was given is not the one in config.pbtxt: leave it out, or correct one."
        )
    return declared or given


def _check_torchscript(path: Path) -> None:
    remedy = "save the model with torch.jit.save(torch.jit.script(model), path)"
    try:
        archives.check_zip(path)
        with zipfile.ZipFile(path) as archive:
            inside = [name.partition("/")[2] for name in archive.namelist()]
    # NotImplementedError is zipfile's word for a version of zip that it does not know.
    except (archives.Broken, zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise BadRequest(
            f"The file is not TorchScript, which is a zip archive ({error}): {remedy}."
        ) from None
    if "constants.pkl" not in inside or not any(name.startswith("code/") for name in inside):
        raise BadRequest(
            "The file holds weights but no code (torch.save of a module or a state dict), and it would "
            f"take your Python classes to load: {remedy}."
        )


def _python(path: Path, given: Signature | None, limits: ArchiveLimits) -> Inspection:
    """Look at a model.py, or at an archive of a folder that has one, with the requirements beside it."""
    if not archives.is_packed(path):
        if path.stat().st_size > MAX_PYTHON:
            raise BadRequest(f"A {MODEL} of more than {MAX_PYTHON} bytes is refused.")
        return Inspection(_python_signature(path.read_bytes(), given))
    wanted = {MODEL, requirements.FILE}
    contents = archive_reader.read_archive(path, wanted=wanted, max_text=MAX_PYTHON, limits=limits)
    if PurePosixPath(MODEL) not in contents.files:
        raise BadRequest(f"The archive of a Python model needs {MODEL} at its root.")
    found = _python_signature(contents.texts[PurePosixPath(MODEL)].encode(), given)
    text = contents.texts.get(PurePosixPath(requirements.FILE), "")
    return Inspection(found, requirements.lines_of(text, requirements.FILE))


def _python_signature(source: bytes, given: Signature | None) -> Signature | None:
    """Return the signature of a file with ``predict``; of one for Triton's Python backend, the given one."""
    tree = python_model.parsed(source, MODEL)
    if backend_class.is_for_the_backend(tree):
        by_itself = backend_class.may_describe_itself(tree)
        registration.check_described("python", given, by_itself=by_itself)
        return given
    found = python_signature.signature_of(python_model.read(tree), given)
    signature.check(found)
    return found


def _check_pickle(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(8)
    if not magic.startswith(_PICKLES):
        raise BadRequest(
            "The file is not what joblib.dump writes: save the estimator with joblib.dump(model, path)."
        )
