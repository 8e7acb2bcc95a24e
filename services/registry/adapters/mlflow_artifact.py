"""Check an archive with an MLflow model, and read its signature and requirements."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from services.registry.adapters import archive_reader, pickle_scan, skops_file
from services.registry.domain import pickle_verdicts, requirements, signature, skops_types
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import mlflow_model, mlflow_requirements, mlflow_signature
from tidegate.kernel.protocol.archives import ArchiveLimits
from tidegate.kernel.protocol.models import Signature

_PICKLES, _SKOPS = (".pkl", ".pickle", ".joblib"), ".skops"


@dataclass(frozen=True, slots=True)
class MlflowInspection:
    """The properties of an MLflow model that the registry stores with its version.

    ``notes``: warnings for the publisher.
    """

    signature: Signature
    requirements: list[str]
    notes: list[str]


def inspect(
    path: Path,
    user_signature: Signature | None,
    max_batch: int,
    limits: ArchiveLimits,
    *,
    allow_pickle: bool,
    trust: Sequence[str] = (),
) -> MlflowInspection:
    """Check an archive, and return its properties. Blocking.

    ``trust``: names that a pickle or skops file in the archive may import. Raise BadRequest if the archive
    does not pass the check. The error names the problem and the remedy.
    """
    names = {mlflow_model.FILE, *mlflow_requirements.FILES}
    contents = archive_reader.read_archive(path, names=names, max_text=mlflow_model.MAX_FILE, limits=limits)
    home = mlflow_model.home_of(contents.files)
    if home is None:
        raise BadRequest(
            f"The archive has no {mlflow_model.FILE} at its root, so it is not an MLflow model. Pack the "
            f"contents of the folder that has {mlflow_model.FILE}."
        )
    model = mlflow_model.parsed(contents.texts[home / mlflow_model.FILE])
    files = [each.relative_to(home) for each in contents.files if home in each.parents]
    loading = mlflow_model.loading(model, files)
    mlflow_model.check_pickle(loading, allow_pickle=allow_pickle)
    if loading.file.endswith((*_PICKLES, _SKOPS)) or mlflow_model.loads_pickle(loading):
        _check_imports(path, home, loading, limits, trust, allow_pickle=allow_pickle)
    found = mlflow_signature.signature_of(model, user_signature, max_batch)
    signature.check(found)
    texts = {
        name: contents.texts[home / name]
        for name in mlflow_requirements.FILES
        if home / name in contents.texts
    }
    lines = requirements.parse(mlflow_requirements.lines_in(texts), mlflow_requirements.PIP)
    table = mlflow_signature.columns_of(model, found) is not None
    needed, notes = mlflow_requirements.needed(lines, loading, model.mlflow_version or "", table=table)
    return MlflowInspection(
        found, needed, [*notes, *(_python_note(model.python_version) if loading.pickled else ())]
    )


def _check_imports(
    path: Path,
    home: PurePosixPath,
    loading: mlflow_model.Loading,
    limits: ArchiveLimits,
    trust: Sequence[str],
    *,
    allow_pickle: bool,
) -> None:
    """Raise BadRequest if the archive's estimator imports dangerous names or untrusted types.

    ``trust``: names that the file may import nevertheless. If ``allow_pickle`` is True, a skops file is not
    checked.
    """
    inner = home / loading.file
    with tempfile.TemporaryDirectory(prefix="tidegate-registry-") as folder:
        file = Path(folder, "estimator")
        archive_reader.extract(path, inner, file)
        if inner.suffix == _SKOPS:
            if not allow_pickle:
                skops_types.check(skops_types.untrusted(skops_file.types(file, limits)), trust)
            return
        found = pickle_scan.imports(file, joblib=loading.engine == mlflow_model.SKLEARN)
        pickle_verdicts.check(pickle_verdicts.dangerous(found, pickle_scan.flagged(found)), trust)


def _python_note(saved_with: str) -> list[str]:
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if not saved_with or saved_with.split(".")[:2] == here.split("."):
        return []
    return [
        f"The MLflow model was saved with Python {saved_with}, and models here run with Python {here}. "
        f"Pickled functions may not load. Save the model with Python {here}, or save it as code."
    ]
