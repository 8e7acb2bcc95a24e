"""``tidegate sign`` and ``tidegate signatures``: cryptographic signatures of models by their publisher."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from tidegate.cli import output
from tidegate.cli.api import REGISTER_TIMEOUT_S, Control, Doc, control, part
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.options import Json, Model

if TYPE_CHECKING:
    from tidegate.cli.package import Package

_PASSWORD = "TIDEGATE_SIGNING_PASSWORD"


def sign(
    path: Annotated[
        Path, typer.Argument(metavar="FILE|DIR", help="The model's file or folder, as for `deploy`.")
    ],
    key: Annotated[Path, typer.Option(metavar="FILE.pem", help="Your private key: P-256, P-384 or P-521.")],
    output_file: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The bundle to write.")
    ] = Path("model.sig"),
    json: Json = False,
) -> None:
    """Sign a model with your key. The bundle has the format of OpenSSF Model Signing.

    A key's password is read from TIDEGATE_SIGNING_PASSWORD.
    Example: tidegate sign model.onnx --key signing.pem
    """
    from tidegate.cli.package import packed

    if not path.exists():
        raise UsageError(f"{path}: no such file or folder.")
    with packed(path) as package:
        bundle = _signed(path.resolve().name, package, key)
    try:
        output_file.write_bytes(orjson.dumps(bundle) + b"\n")
    except OSError as error:
        raise UsageError(f"{output_file}: {error.strerror}.") from None
    signer = bundle["verificationMaterial"]["publicKey"]["hint"]
    shown = {"file": str(output_file), "key": signer}
    output.show(
        shown,
        json,
        lambda: output.line(
            f"Wrote {output_file}, signed by the key {signer[:12]}. "
            f"Next: tidegate deploy {path} --signed {output_file}"
        ),
    )


def signatures(
    name: Model,
    version: Annotated[int | None, typer.Option(min=1, help="Default: the latest version.")] = None,
    add: Annotated[Path | None, typer.Option(metavar="FILE", help="Add a bundle, such as model.sig.")] = None,
    remove: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="Remove the signature by this key; write the key's id or how it begins."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List, add and remove the cryptographic signatures of a version.

    Workers with TIDEGATE_TRUSTED_KEYS serve only versions with a signature by a trusted key.
    Example: tidegate signatures digits --add model.sig
    """
    from tidegate.cli.publish import read_bundle

    plane = control()
    sha256 = version_of(plane, name, version)["artifact_sha256"]
    address = f"/v1/artifacts/{sha256}/signatures"
    if add is not None:
        plane.registry.post(address, read_bundle(add), REGISTER_TIMEOUT_S)
    if remove is not None:
        plane.registry.delete(f"{address}/{_one_of(plane.registry.items(address), remove)}")
    items = plane.registry.items(address)
    rows = [(each["key"], output.moment(each["created_at"])) for each in items]
    empty = f"No signature yet. Add one: tidegate signatures {name} --add model.sig"
    output.show({"items": items}, json, lambda: output.table(rows, ("key", "since"), empty))


def version_of(plane: Control, name: str, number: int | None) -> Doc:
    """Return a version of a model; the latest one if ``number`` is None."""
    path = f"/v1/models/{part(name)}"
    found: Doc = (
        plane.registry.get(path)["latest"]
        if number is None
        else plane.registry.get(f"{path}/versions/{number}")
    )
    return found


def signing_module() -> Any:
    """Return the module that signs. Raise UsageError if its library is not installed."""
    try:
        from tidegate.kernel import signing
    except ImportError:
        raise UsageError(
            "Signing needs the package cryptography. Run python -m pip install cryptography. "
            "Or sign with `model_signing sign key`."
        ) from None
    return signing


def password() -> str | None:
    """Return the password of the private key; None if the environment has none."""
    return os.environ.get(_PASSWORD)


def _signed(name: str, package: Package, key: Path) -> Doc:
    signing = signing_module()
    with tempfile.NamedTemporaryFile() as copy:
        package.file.seek(0)
        shutil.copyfileobj(package.file, copy)
        copy.flush()
        artifact = Path(copy.name)
        files = {signing.ONE_FILE: package.sha256}
        # A folder is uploaded as an archive. The signature covers the files in it, not the archive's bytes.
        if package.filename.endswith((".tar", ".tar.gz")) and package.filename != name:
            files = signing.digests_of(artifact)
        try:
            bundle: Doc = signing.sign(name, files, key, password())
        except signing.BadKey as error:
            raise UsageError(f"{error}.") from None
    return bundle


def _one_of(items: list[Doc], text: str) -> str:
    found = [each["key"] for each in items if each["key"].startswith(text.lower())]
    if len(found) != 1:
        known = ", ".join(each["key"][:12] for each in items) or "none"
        raise UsageError(f"--remove {text}: {len(found)} keys begin with this; expected one. Keys: {known}.")
    return str(found[0])
