"""The packages that a format needs in addition to those of the models' environment. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tidegate.kernel.protocol.models import Format

# The tested releases of XGBoost and CatBoost. Both libraries can also read files of older releases.
# FIRST_XGBOOST_CPU: the first release of XGBoost with a CPU-only build.
XGBOOST, FIRST_XGBOOST_CPU = (3, 2, 0), (2, 1, 1)
CATBOOST = "1.2.10"


@dataclass(frozen=True, slots=True)
class Need:
    """A package that a version needs. ``line``: the requirement for pip.

    ``packages``: names of packages; any one of them meets the need. ``note``: a warning for the publisher.
    """

    line: str
    packages: tuple[str, ...]
    note: str = ""


OF_FORMAT: dict[Format, Need] = {
    "lightgbm": Need("lightgbm==4.7.0", ("lightgbm",)),
    "tflite": Need("ai-edge-litert==2.3.0", ("ai-edge-litert", "tflite-runtime")),
    "tensorflow": Need(
        "tensorflow-cpu==2.21.0",
        ("tensorflow-cpu", "tensorflow"),
        "The SavedModel runs on tensorflow-cpu. The first replica on a host downloads that package (274 "
        "MB), and each replica needs about 500 MB of memory. To serve the model on onnxruntime instead: pip "
        "install tensorflow-cpu tf2onnx, then python -m tf2onnx.convert --saved-model FOLDER --output "
        "model.onnx, and deploy that file.",
    ),
}
SKOPS = Need("skops==0.16.0", ("skops",))


def xgboost(saved_by: Sequence[int]) -> Need:
    """Return the need for the XGBoost release that saved a file.

    ``saved_by``: the numbers of this release. If they are unknown, or if the release has no CPU-only build,
    return the need for the tested release.
    """
    version = tuple(saved_by) if len(saved_by) == 3 and tuple(saved_by) >= FIRST_XGBOOST_CPU else XGBOOST
    return Need(f"xgboost-cpu=={'.'.join(map(str, version))}", ("xgboost-cpu", "xgboost"))


def catboost(release: str) -> Need:
    """Return the need for the CatBoost release that saved a file.

    ``release`` is empty if it is unknown. Then return the need for the tested release.
    """
    return Need(f"catboost=={release or CATBOOST}", ("catboost",))


def of_modules(modules: Collection[str]) -> list[Need]:
    """Return the needs of a pickle that imports these top-level modules."""
    known = {"xgboost": xgboost(()), "lightgbm": OF_FORMAT["lightgbm"], "catboost": catboost("")}
    return [need for module, need in known.items() if module in modules]


def unmet(lines: Sequence[str], needs: Sequence[Need], installed: Collection[str]) -> list[Need]:
    """Return the needs that neither the requirements nor the models' environment meets.

    ``lines``: the requirements. ``installed``: the packages of the models' environment.
    """
    met = named(lines) | set(installed)
    return [need for need in needs if not met & set(need.packages)]


def named(lines: Sequence[str]) -> set[str]:
    """Return the normalized names of the packages in requirements."""
    names = {re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0] for line in lines}
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}
