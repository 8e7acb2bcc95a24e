"""Recognise and check an archive with a Hugging Face model that classifies or embeds."""

from __future__ import annotations

from pathlib import Path

from services.registry.adapters import archive_reader
from services.registry.adapters.archive_reader import ArchiveContents
from services.registry.domain import signature
from tidegate.kernel import archives
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import hugging_face
from tidegate.kernel.protocol.archives import ArchiveLimits, home_of
from tidegate.kernel.protocol.hugging_face_task import CONFIG, task_of_config
from tidegate.kernel.protocol.models import Format, Signature


def llm_or_other(path: Path, limits: ArchiveLimits) -> Format:
    """Return "huggingface" for a model that classifies or embeds, else "llm". Blocking."""
    try:
        found = _folder(_read(path, limits)) if archives.is_archive(path) else None
        if found is None:
            return "llm"
        texts, files = found
        config = hugging_face.read(texts, CONFIG)
    except BadRequest:  # the inspection reports the error later
        return "llm"
    return "llm" if task_of_config(config, files) is None else "huggingface"


def inspect(
    path: Path, user_signature: Signature | None, max_batch: int, limits: ArchiveLimits, *, allow_pickle: bool
) -> tuple[Signature, list[str]]:
    """Check an archive. Return its signature and requirements.

    Blocking: call it in a thread. Raise BadRequest if the archive does not pass the check.
    """
    found = _folder(_read(path, limits))
    if found is None:
        raise BadRequest(
            f"The archive has no {CONFIG} at its root, so it is not a Hugging Face folder. Pack the "
            "contents of the folder, not the folder itself."
        )
    plan = hugging_face.plan(*found, allow_pickle=allow_pickle)
    own = hugging_face.signature_of(plan, max_batch)
    given = user_signature or own
    if (given.inputs, given.outputs) != (own.inputs, own.outputs):
        raise BadRequest(
            f"The given signature differs from that of the Hugging Face folder ({plan.task}). Leave the "
            "given signature out."
        )
    signature.check(own)
    return given, hugging_face.requirements_of(plan)


def _read(path: Path, limits: ArchiveLimits) -> ArchiveContents:
    return archive_reader.read_archive(
        path, names=hugging_face.TEXTS, max_text=hugging_face.MAX_TEXT, limits=limits
    )


def _folder(contents: ArchiveContents) -> tuple[dict[str, str], list[str]] | None:
    """Return the model's text files by path, and the paths of all its files; None without a ``config.json``.

    The paths are relative to the folder with the ``config.json``.
    """
    home = home_of(contents.files, CONFIG)
    if home is None:
        return None
    texts = {
        str(name.relative_to(home)): text for name, text in contents.texts.items() if home in name.parents
    }
    return texts, hugging_face.inside(contents.files, home)
