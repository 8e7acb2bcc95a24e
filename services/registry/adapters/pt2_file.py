"""Check a torch.export file, and read its signature. Nothing is unpickled."""

from __future__ import annotations

import io
import json
import pickletools
import zipfile
from pathlib import Path

from services.registry.domain import pt2, signature
from tidegate.kernel import archives
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Signature

# The maximum size of a program's description, in bytes. A program with 5,000 operations needs 10 MB.
MAX_PROGRAM = 64 * 1024 * 1024
MAX_EXAMPLES = 64 * 1024 * 1024
MAX_PICKLE = 1024 * 1024
_BROKEN = (archives.BrokenArchive, zipfile.BadZipFile)
_STRINGS = frozenset({"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"})
_MEMOS = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})


def inspect(path: Path, user_signature: Signature | None, max_batch: int, *, allow_pickle: bool) -> Signature:
    """Check a file, and return its signature. Blocking.

    Raise BadRequest if the file cannot be read or served. Also raise it if loading the file could run code
    and ``allow_pickle`` is False. The error names the problem and the remedy.
    """
    try:
        archives.check_zip(path)
        with zipfile.ZipFile(path) as archive:
            program, problem = _read(archive)
    except (
        archives.BrokenArchive,
        zipfile.BadZipFile,
        OSError,
        NotImplementedError,
        ValueError,
        KeyError,
    ) as error:
        raise BadRequest(
            f"The file is not a program of torch.export ({str(error)[:120]}). Save it with "
            "torch.export.save(exported_program, 'model.pt2')."
        ) from None
    if problem and not allow_pickle:
        raise BadRequest(
            f"Loading this file of torch.export could run any code on the workers: {problem}. If you trust "
            "the file's author, deploy with `tidegate deploy --allow-pickle` (in the API: "
            "allow_pickle=true)."
        )
    found = pt2.signature_of(program, user_signature, max_batch)
    signature.check(found)
    return found


def _read(archive: zipfile.ZipFile) -> tuple[dict[str, object], str]:
    """Return the program's description, and why loading the file could run code ("" if it cannot).

    torch ignores the case of file names, and reads only the folder of the first file. With names that differ
    only by case, or with two folders, torch could load other files than this check reads. So such archives
    are rejected.
    """
    sizes = {info.filename: info.file_size for info in archive.infolist()}
    inner = {name.partition("/")[2].lower(): name for name in sizes}
    if len(inner) < len(sizes) or len({name.partition("/")[0] for name in sizes}) > 1:
        raise ValueError("the file has two folders at its root, or names that differ only by case")
    models = [each for each in inner if each.startswith("models/") and each.endswith(".json")]
    if len(models) != 1:
        old = "serialized_exported_program.json" in sizes
        raise ValueError(
            "an old release of torch saved the file"
            if old
            else f"the file has {len(models)} programs, expected one"
        )
    if sizes[inner[models[0]]] > MAX_PROGRAM:
        raise ValueError(f"the description of the program is larger than {MAX_PROGRAM} bytes")
    program = json.loads(archive.read(inner[models[0]]))
    if not isinstance(program, dict):
        raise ValueError("the description of the program is not a JSON object")
    payloads, names = {}, {}
    for each, name in inner.items():
        if each.startswith("data/aotinductor/"):
            return program, "the file has compiled libraries"
        if each.endswith("_config.json") and each.startswith("data/"):
            if sizes[name] > MAX_PROGRAM:
                return program, f"{each} has more than {MAX_PROGRAM} bytes"
            payloads[each] = archive.read(name).decode()
        elif each.endswith(".pt"):
            if sizes[name] > MAX_EXAMPLES:
                return program, f"{each} is a pickle of more than {MAX_EXAMPLES} bytes"
            names[each] = _names_in(archive.read(name))
    return program, pt2.runs_code(program, payloads, names)


def _names_in(saved: bytes) -> set[str]:
    """Return the names that the pickle in a torch.save file imports; "?" if it cannot be read."""
    found: set[str] = set()
    try:
        # Python's zipfile recognises a zip by the end of the file. torch recognises it by the beginning of
        # the file, and reads any other file as a pickle. Without this check, a pickle with a zip at its end
        # would not be scanned.
        archives.check_zip(saved)
        with zipfile.ZipFile(io.BytesIO(saved)) as archive:
            files = archive.infolist()
            pickles = [info for info in files if info.filename.lower().endswith("data.pkl")]
            folders = {info.filename.partition("/")[0] for info in files}
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE or len(folders) != 1:
                return {"?"}
            texts: list[str] = []
            for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
                if opcode.name == "GLOBAL":
                    found.add(str(argument))
                elif opcode.name == "STACK_GLOBAL":
                    found.add(" ".join(texts[-2:]) if len(texts) >= 2 else "?")
                elif opcode.name in ("INST", "EXT1", "EXT2", "EXT4"):
                    found.add("?")
                if opcode.name in _STRINGS:
                    texts.append(str(argument))
                elif opcode.name not in _MEMOS:
                    texts = []
    except (*_BROKEN, ValueError, OSError, NotImplementedError, KeyError, IndexError):
        return {"?"}
    return found
