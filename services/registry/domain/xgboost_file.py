"""Read an XGBoost file: features, objective and the release that saved it. Pure.

Source of the layout: https://xgboost.readthedocs.io/en/stable/tutorials/saving_model.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from mmap import mmap
from typing import Any

from services.registry.domain.json_outline import Malformed, pick_json, pick_ubj
from services.registry.domain.trees import TreeModel
from tidegate.kernel.errors import BadRequest

_PARAMETERS, _OBJECTIVE = ("learner", "learner_model_param"), ("learner", "objective")
_NAMES, _TREES = ("learner", "feature_names"), ("learner", "gradient_booster", "name")
_VERSION = ("version",)
_UBJ_MARKERS = b"LlIUi$#"


@dataclass(frozen=True, slots=True)
class XgboostFacts:
    """The facts in a file. ``saved_by``: the release that saved it, such as (3, 2, 0); empty if unknown."""

    features: int
    classes: int
    targets: int
    objective: str
    saved_by: tuple[int, ...]
    names: tuple[str, ...] = ()


def read(data: mmap | bytes) -> XgboostFacts:
    """Return the facts in a JSON or UBJSON file.

    Raise Malformed if the file is damaged, BadRequest if it is not a model.
    """
    pick = pick_ubj if data[1:2] in [bytes([each]) for each in _UBJ_MARKERS] else pick_json
    found = pick(data, {_PARAMETERS, _OBJECTIVE, _NAMES, _TREES, _VERSION})
    parameters, objective = found.get(_PARAMETERS), found.get(_OBJECTIVE)
    if _TREES not in found or not isinstance(parameters, Mapping) or not isinstance(objective, Mapping):
        raise BadRequest(
            "The file is JSON of XGBoost, but not a model: trees, parameters or objective are missing. It "
            "may be a file of save_config. Save the model with booster.save_model('model.ubj')."
        )
    names = found.get(_NAMES) or ()
    return XgboostFacts(
        features=_number(parameters, "num_feature"),
        classes=_number(parameters, "num_class"),
        targets=_number(parameters, "num_target", 1),
        objective=str(objective.get("name", ""))[:64],
        saved_by=_release(found.get(_VERSION)),
        names=tuple(map(str, names)) if isinstance(names, list) else (),
    )


def model_of(facts: XgboostFacts) -> TreeModel:
    """Return the inputs of a model, and the outputs of its ``predict`` or ``predict_proba``."""
    if facts.targets > 1:
        return TreeModel(facts.features, outputs=facts.targets, names=facts.names)
    if facts.objective == "binary:logistic":
        return TreeModel(facts.features, classes=2, names=facts.names)
    if facts.objective == "multi:softprob":
        return TreeModel(facts.features, classes=facts.classes, names=facts.names)
    # multi:softmax returns the number of the class. A custom objective returns a margin for each class.
    several = facts.classes > 1 and facts.objective != "multi:softmax"
    return TreeModel(facts.features, outputs=facts.classes if several else 0, names=facts.names)


def _number(parameters: Mapping[str, Any], key: str, default: int = 0) -> int:
    value = parameters.get(key, default)
    text = str(value)
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise Malformed(f"the file's {key} is {text[:40]!r}, not a number")
    return int(text)


def _release(version: Any) -> tuple[int, ...]:
    numbers = version if isinstance(version, list) else []
    return tuple(numbers) if all(type(each) is int and 0 <= each < 1000 for each in numbers) else ()
