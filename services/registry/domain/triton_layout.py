"""Find the models in a Triton model directory, and the model that gets the requests. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from services.registry.domain import names
from tidegate.kernel.errors import BadRequest

CONFIG = "config.pbtxt"
_ROOT = PurePosixPath(".")


def models(files: Iterable[PurePosixPath]) -> set[PurePosixPath]:
    """Return the folders that are models: those with a config.pbtxt or a numbered version folder.

    Only the outermost of these folders are models. Deeper ones belong to a model's code.
    """
    folders: set[PurePosixPath] = set()
    for path in files:
        if any(part.startswith((".", "__")) for part in path.parts):
            continue  # files that archivers and editors leave behind
        if path.name == CONFIG:
            folders.add(path.parent)
        for depth, part in enumerate(path.parts[:-1]):
            if part.isdecimal():
                folders.add(PurePosixPath(*path.parts[:depth]))
                break
    top = min((len(each.parts) for each in folders), default=0)
    return {each for each in folders if len(each.parts) == top}


def served(folders: set[PurePosixPath], model: str, ensembles: Mapping[PurePosixPath, bool]) -> PurePosixPath:
    """Return the folder of the model that gets requests.

    Choose the only folder, or else the folder whose name equals ``model``, or else the only outermost
    ensemble. An ensemble is outermost if no other ensemble uses it. ``model``: the model's name in the
    registry. ``ensembles``: True for the folder of an outermost ensemble. Raise BadRequest if there is no
    folder, or if the choice is not clear.
    """
    if not folders:
        raise BadRequest(
            "The archive is not a Triton model directory. It needs config.pbtxt and a version folder "
            "such as 1/, at its root or in one folder. For an ensemble, give each model its own folder."
        )
    if len(folders) == 1:
        return next(iter(folders))
    named = [each for each in folders if each.name == model]
    if len(named) == 1:
        return named[0]
    heads = [each for each in folders if ensembles.get(each)]
    if len(heads) == 1:
        return heads[0]
    found = names.quoted(sorted(each.name for each in folders))
    raise BadRequest(
        f"The archive holds several models ({found}), and it is not clear which one gets the requests. Make "
        f"one of them the ensemble, or give one folder the model's name, {model!r}."
    )


def check_versions(folder: PurePosixPath, files: Iterable[PurePosixPath]) -> None:
    """Raise BadRequest if a model's folder has no version folder with a file in it.

    Ensembles are not checked, because they need no file.
    """
    inside = [path.relative_to(folder).parts for path in files if path.is_relative_to(folder)]
    if any(len(parts) > 1 and parts[0].isdecimal() for parts in inside):
        return
    name = "." if folder == _ROOT else str(folder)
    raise BadRequest(
        f"The model in {name!r} has no version folder with a file in it. Triton looks for the model's files "
        f"in {'1' if folder == _ROOT else folder / '1'}/, beside {CONFIG}: put them there."
    )


def config_path(folder: PurePosixPath) -> PurePosixPath:
    """Return the path of a model's config.pbtxt."""
    return PurePosixPath(CONFIG) if folder == _ROOT else folder / CONFIG
