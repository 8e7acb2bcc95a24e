"""Read the facts about models from XGBoost, LightGBM and CatBoost files, without these libraries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.registry.adapters.mapped import mapped
from services.registry.domain import catboost_file, lightgbm_file, needs, xgboost_file
from services.registry.domain.needs import Need
from services.registry.domain.trees import TreeModel
from tidegate.kernel.protocol.models import Format


@dataclass(frozen=True, slots=True)
class TreeFile:
    """The model in a file, and the package that runs it."""

    model: TreeModel
    need: Need


def read(path: Path, format_: Format) -> TreeFile:
    """Return the model in a file, and the package that runs it. Blocking.

    Raise BadRequest if the file cannot be read, or if Tidegate cannot serve the model.
    """
    with mapped(path) as data:
        if format_ == "xgboost":
            facts = xgboost_file.read(data)
            return TreeFile(xgboost_file.model_of(facts), needs.xgboost(facts.saved_by))
        if format_ == "lightgbm":
            return TreeFile(lightgbm_file.read(data), needs.OF_FORMAT["lightgbm"])
        found = catboost_file.read(data)
        return TreeFile(found.model, needs.catboost(found.release))
