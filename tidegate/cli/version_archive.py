"""``tidegate save`` and ``tidegate load``: copy one version to another stack, as a file.

The file is an uncompressed tar. It contains ``version.json``, ``signatures.json``, ``baseline.json`` (if the
version has a baseline), and the artifact's bytes as ``artifact``. ``save --key`` adds ``archive.sig``, an
OpenSSF Model Signing bundle that signs all these files.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
from pathlib import Path
from typing import IO, Annotated, Any

import orjson
import typer

from tidegate.cli import output
from tidegate.cli.api import REGISTER_TIMEOUT_S, Control, Doc, control, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json
from tidegate.cli.package import Package
from tidegate.cli.progress import Steps, transfer
from tidegate.kernel.errors import BadRequest, Conflict, NotFound, Unavailable

ARCHIVE = 1
VERSION, SIGNATURES, BASELINE = "version.json", "signatures.json", "baseline.json"
ARTIFACT, SEAL = "artifact", "archive.sig"
MAX_DOCUMENT = 256 * 2**20
CHUNK = 1024 * 1024
_NAMES = {VERSION, SIGNATURES, BASELINE, ARTIFACT, SEAL}
# The fields of a version that a registration accepts.
_REGISTERED = ("filename", "format", "signature", "requirements", "metadata")


def save(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME[@N]", help="The model and the version's number; default: its latest version."
        ),
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
    key: Annotated[
        Path | None, typer.Option(metavar="FILE.pem", help="Sign the file with this private key.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    json: Json = False,
) -> None:
    """Save one version with its metadata and cryptographic signatures to a file, for another stack.

    Example: tidegate save digits@3 digits-3.tar --key signing.pem; then, on the other stack: tidegate load
    digits-3.tar
    """
    from tidegate.cli.signatures import version_of

    model, number = named(name)
    if file.exists() and not force:
        raise Conflict(f"{file} exists already. Name another file, or replace it with --force.")
    plane = control()
    version = version_of(plane, model, number)
    partial = file.with_name(f"{file.name}.part")
    with Steps().shown() as steps:
        try:
            _write(plane, version, partial, key, steps)
            partial.replace(file)
        except OSError as error:
            raise UsageError(f"{file}: {error.strerror}.") from None
        finally:
            partial.unlink(missing_ok=True)
    shown = {"file": str(file), "model": model, "version": version["number"], "bytes": file.stat().st_size}

    def human() -> None:
        output.line(f"{file}: {model} version {version['number']}, {output.size_of(shown['bytes'])}.")
        output.line(f"On the other stack: tidegate load {file.name}")

    output.show(shown, json, human)


def load(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Made by `tidegate save`.")],
    name: Annotated[str | None, typer.Option(help="Another name for the model.")] = None,
    trusted: Annotated[
        Path | None,
        typer.Option(metavar="FILE|DIR", help="Refuse the file unless one of these public keys signed it."),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help=("Accept a pickle. Loading it can run any code on the workers.")),
    ] = False,
    trust: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Accept this name, which was refused in a pickle or skops file; repeatable. With --trusted, "
            "names that the publisher accepted are accepted, too.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Register the version that a file of `tidegate save` contains.

    The version gets the model's next number on this stack. Nothing is served yet. To serve it: tidegate
    deploy NAME --version N

    Example: tidegate load digits-3.tar --trusted keys/
    """
    with Steps().shown() as steps:
        version = _load(control(), file, name, trusted, allow_pickle, trust or [], steps)
    place = f"{version['model']} version {version['number']}"

    def human() -> None:
        output.line(f"{place} is registered.")
        output.line(f"Serve it: tidegate deploy {version['model']} --version {version['number']}")

    output.show({"version": version}, json, human)


def named(text: str) -> tuple[str, int | None]:
    """Parse ``NAME[@N]`` as the model and the number of a version.

    Without ``@N``, the number is None, which means the latest version. Raise UsageError for other texts.
    """
    model, at, number = text.partition("@")
    number = number.removeprefix("v")
    if at and not (number.isdecimal() and int(number)):
        raise UsageError(f"{text!r}: expected NAME or NAME@N, with the number of a version.")
    return model, int(number) if at else None


def _write(plane: Control, version: Doc, file: Path, key: Path | None, steps: Steps) -> None:
    sha256 = version["artifact_sha256"]
    bundles = [each["bundle"] for each in plane.registry.items(f"/v1/artifacts/{sha256}/signatures")]
    documents: dict[str, Any] = {VERSION: {"archive": ARCHIVE, "version": version}, SIGNATURES: bundles}
    if (baseline := _baseline(plane, version)) is not None:
        documents[BASELINE] = baseline
    texts = {name: orjson.dumps(document) for name, document in documents.items()}
    if key is not None:
        texts[SEAL] = orjson.dumps(_seal(version, texts, key))
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.") as artifact:
        _download(plane, version, artifact, steps)
        with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, text in texts.items():
                tar.addfile(_entry(name, len(text)), io.BytesIO(text))
            artifact.seek(0)
            tar.addfile(_entry(ARTIFACT, version["artifact_size"]), artifact)
    steps.change("save", "done", f"{len(texts) + 1} files")


def _download(plane: Control, version: Doc, into: IO[bytes], steps: Steps) -> None:
    digest = hashlib.sha256()
    with transfer(version["filename"], version["artifact_size"], "downloading") as count:

        def take(piece: bytes) -> None:
            digest.update(piece)
            into.write(piece)
            count(len(piece))

        plane.registry.download(f"/v1/artifacts/{version['artifact_sha256']}", take)
    if digest.hexdigest() != version["artifact_sha256"]:
        raise Unavailable("The registry sent bytes that differ from the registered ones. Try again.")
    steps.change("download", "done", version["filename"])


def _baseline(plane: Control, version: Doc) -> Any:
    try:
        return plane.registry.get(
            f"/v1/models/{part(version['model'])}/versions/{version['number']}/baseline"
        )
    except NotFound:
        return None


def _seal(version: Doc, texts: dict[str, bytes], key: Path) -> Doc:
    """Return a bundle that signs all files of the archive."""
    from tidegate.cli.signatures import password, signing_module

    signing = signing_module()
    files = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    files[ARTIFACT] = version["artifact_sha256"]
    try:
        found: Doc = signing.sign(f"{version['model']}@{version['number']}", files, key, password())
    except signing.BadKey as error:
        raise UsageError(f"{error}.") from None
    return found


def _entry(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info


def _load(
    plane: Control,
    file: Path,
    name: str | None,
    trusted: Path | None,
    allow_pickle: bool,
    trust: list[str],
    steps: Steps,
) -> Doc:
    texts, digests, size = _read(file)
    document = _document(texts, VERSION, file)
    version = document.get("version") if isinstance(document, dict) else None
    if not isinstance(version, dict) or document.get("archive") != ARCHIVE:
        raise UsageError(
            f"{file} cannot be read: `tidegate save` of this release did not make it. Save the version again "
            "with this release, or upgrade Tidegate here."
        )
    if digests.get(ARTIFACT) != version.get("artifact_sha256"):
        raise UsageError(
            f"{file} is damaged: its artifact is not the one that {VERSION} names. Copy the file again."
        )
    if trusted is not None:
        signer = _check_seal(texts, digests, trusted, file)
        steps.change("seal", "done", f"signed by the key {signer[:12]}")
        # Use the publisher's list of accepted pickle names only if a trusted key signed the file.
        trust = [*trust, *(version.get("trusted") or [])]
    sha256, model = digests[ARTIFACT], name or str(version["model"])
    _upload(plane, file, sha256, size, str(version["filename"]), steps)

    for bundle in _document(texts, SIGNATURES, file):
        plane.registry.post(f"/v1/artifacts/{sha256}/signatures", bundle, REGISTER_TIMEOUT_S)
    body = {field: version[field] for field in _REGISTERED if version.get(field) is not None}
    path = f"/v1/models/{part(model)}/versions"
    if trust:
        body["trust"] = trust
    body |= {"artifact": sha256, "allow_pickle": allow_pickle}
    found: Doc = plane.registry.post(path, body, REGISTER_TIMEOUT_S)
    if BASELINE in texts:
        plane.registry.put(f"{path}/{found['number']}/baseline", _document(texts, BASELINE, file))
    steps.change("register", "done", f"{model} version {found['number']} ({found['format']})")
    return found


def _read(file: Path) -> tuple[dict[str, bytes], dict[str, str], int]:
    """Return the documents of an archive, the sha256 of each file, and the artifact's size."""
    texts: dict[str, bytes] = {}
    digests: dict[str, str] = {}
    size = 0
    try:
        with tarfile.open(file, "r:") as tar:
            for entry in tar:
                content = tar.extractfile(entry) if entry.isfile() else None
                if content is None or entry.name in digests or entry.name not in _NAMES:
                    raise UsageError(
                        f"{file} has the member {entry.name[:60]!r}, so `tidegate save` did not make "
                        "it. Name a file of `tidegate save`."
                    )
                if entry.name == ARTIFACT:
                    size = entry.size
                elif entry.size > MAX_DOCUMENT:
                    raise UsageError(
                        f"{file}: {entry.name} has {entry.size} bytes, and at most {MAX_DOCUMENT} are read. "
                        "Save the version again."
                    )
                else:
                    texts[entry.name] = content.read()
                    digests[entry.name] = hashlib.sha256(texts[entry.name]).hexdigest()
                    continue
                digests[entry.name] = _digest(content)
    except (OSError, tarfile.TarError) as error:
        raise UsageError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    return texts, digests, size


def _digest(content: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := content.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _document(texts: dict[str, bytes], name: str, file: Path) -> Any:
    try:
        return orjson.loads(texts[name])
    except (KeyError, orjson.JSONDecodeError):
        raise UsageError(
            f"{name} in {file} is missing or unreadable. Copy the file again, or save the version again."
        ) from None


def _check_seal(texts: dict[str, bytes], digests: dict[str, str], trusted: Path, file: Path) -> str:
    """Return the id of the key that signed an archive. Raise UsageError if no trusted key signed it."""
    from tidegate.cli.signatures import signing_module
    from tidegate.kernel.protocol.model_signature import difference, read_bundle

    signing = signing_module()
    if SEAL not in texts:
        raise UsageError(f"{file} is not signed. Sign it: tidegate save NAME@N FILE --key signing.pem")
    try:
        signature = read_bundle(_document(texts, SEAL, file))
        keys = signing.TrustedKeys.read(trusted)
    except (BadRequest, signing.BadKey) as error:
        raise UsageError(f"{str(error).rstrip('.')}.") from None
    if not keys.trusts(signature):
        raise UsageError(
            f"{file} is signed by the key {signature.key[:12]}, but {trusted} has no such key, or the "
            "signature is wrong. If you trust the sender, add its public key."
        )
    sealed = {name: digest for name, digest in digests.items() if name != SEAL}
    if problem := difference(signature.files, sealed):
        raise UsageError(
            f"{file} was changed after it was signed: {problem}. Get a new copy from its sender."
        )
    return signature.key


def _upload(plane: Control, file: Path, sha256: str, size: int, filename: str, steps: Steps) -> None:
    from tidegate.cli.uploading import upload

    with tarfile.open(file, "r:") as tar:
        content = tar.extractfile(ARTIFACT)
        assert content is not None
        upload(plane, Package(content, filename, size, sha256), steps)  # type: ignore[arg-type]
