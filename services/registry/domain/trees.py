"""The signatures of models of decision trees: XGBoost, LightGBM, CatBoost. Pure.

A classifier has the outputs ``label`` and ``probabilities``, like a scikit-learn classifier. Other models
have ``output``. The input is ``input``, with one row of features for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.registry.domain import names
from services.registry.domain.signature import check
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Datatype, Signature, TensorSpec

MAX_FEATURES = 1_000_000
MAX_OUTPUTS = 100_000


@dataclass(frozen=True, slots=True)
class TreeModel:
    """The facts about a model in a file.

    ``features``: the number of numeric features. ``categories``: the number of features that are texts
    (CatBoost). ``classes``: the number of classes; 0 if the model is not a classifier. ``outputs``: the
    number of outputs per row; 0 if the model returns one plain number. ``label``, ``floats`` and ``answers``:
    the datatypes of the label, of the numeric input and of the other outputs.
    """

    features: int
    classes: int = 0
    outputs: int = 0
    categories: int = 0
    label: Datatype = "INT64"
    floats: Datatype = "FP32"
    answers: Datatype = "FP32"
    names: Sequence[str] = field(default_factory=tuple)


def signature_of(model: TreeModel, user_signature: Signature | None, max_batch: int) -> Signature:
    """Return the user's signature, or derive one from the file if ``user_signature`` is None.

    Raise BadRequest if the user's signature does not fit the file, or if the file's numbers cannot be right.
    """
    if not 0 < model.features + model.categories <= MAX_FEATURES:
        raise BadRequest(
            f"The file says that the model has {model.features + model.categories} features, which cannot "
            "be right. Train the model, and save it again."
        )
    if not (0 <= model.classes <= MAX_OUTPUTS and 0 <= model.outputs <= MAX_OUTPUTS):
        raise BadRequest(f"The file says that the model has more than {MAX_OUTPUTS} outputs. Save it again.")
    found = Signature(inputs=_inputs(model), outputs=_outputs(model), max_batch_size=max_batch)
    if user_signature is None:
        return found
    check(user_signature)
    _check_fits(user_signature, found, model)
    return user_signature


def _inputs(model: TreeModel) -> list[TensorSpec]:
    inputs = []
    if model.features:
        inputs.append(TensorSpec(name="input", datatype=model.floats, shape=[model.features]))
    if model.categories:
        inputs.append(TensorSpec(name="categories", datatype="BYTES", shape=[model.categories]))
    return inputs


def _outputs(model: TreeModel) -> list[TensorSpec]:
    if model.classes:
        return [
            TensorSpec(name="label", datatype=model.label, shape=[]),
            TensorSpec(name="probabilities", datatype=model.answers, shape=[model.classes]),
        ]
    shape = [model.outputs] if model.outputs else []
    return [TensorSpec(name="output", datatype=model.answers, shape=shape)]


def _check_fits(given: Signature, found: Signature, model: TreeModel) -> None:
    outputs = {tensor.name for tensor in found.outputs}
    if unknown := [tensor.name for tensor in given.outputs if tensor.name not in outputs]:
        raise BadRequest(
            f"The signature names the outputs {names.quoted(unknown)}, but the model has "
            f"{names.quoted(sorted(outputs))}. Leave the signature out: the file has the names of the "
            "outputs."
        )
    if model.categories:
        same = {t.name for t in given.inputs} == {t.name for t in found.inputs}
    elif len(given.inputs) == 1:
        same = given.inputs[0].shape in ([model.features], [-1])
    else:
        same = len(given.inputs) == model.features and all(t.shape in ([], [1]) for t in given.inputs)
    if not same:
        raise BadRequest(
            f"The signature's inputs do not fit the model, which has {model.features} features"
            f"{f' and {model.categories} categories' if model.categories else ''}. Leave the signature out, "
            "or declare one input for all features, or one input with the shape [1] for each feature."
        )
