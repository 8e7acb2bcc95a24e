"""Comparisons of versions, and references to them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from services.registry.domain import comparison, references
from services.registry.domain.references import Reference
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Signature, TensorSpec, Version, VersionMetadata


def version(number: int, **fields: Any) -> Version:
    given: dict[str, Any] = {
        "model": "digits",
        "number": number,
        "format": "onnx",
        "artifact_sha256": f"{number:064x}",
        "artifact_size": number * 10,
        "filename": "model.onnx",
        "created_at": datetime(2026, 1, number, tzinfo=UTC),
    }
    return Version(**(given | fields))


def signature(*inputs: str) -> Signature:
    tensors = [TensorSpec(name=name, datatype="FP32", shape=[4]) for name in inputs]
    return Signature(inputs=tensors, outputs=[TensorSpec(name="y", datatype="FP32", shape=[1])])


def test_metrics_have_deltas_and_the_rest_has_differences():
    a = version(
        1,
        metadata=VersionMetadata(metrics={"accuracy": 0.8, "loss": 0.0}, tags={"team": "x"}, owner="ann"),
        requirements=["torch", "numpy"],
    )
    b = version(
        2,
        metadata=VersionMetadata(metrics={"accuracy": 0.9, "loss": 0.5, "f1": 1.0}, tags={"team": "x"}),
        requirements=["numpy", "scipy"],
    )
    found = comparison.compare(a, b)
    deltas = {each.name: each for each in found.metrics}
    assert deltas["accuracy"].delta == pytest.approx(0.1)
    assert deltas["accuracy"].percent == pytest.approx(12.5)
    assert (deltas["loss"].delta, deltas["loss"].percent) == (0.5, None)
    assert (deltas["f1"].a, deltas["f1"].delta) == (None, None)
    assert [each.same for each in found.tags] == [True]
    assert {each.name for each in found.fields if not each.same} == {
        "artifact_sha256", "artifact_size", "created_at", "owner",
    }  # fmt: skip
    assert (found.requirements_added, found.requirements_removed) == (["scipy"], ["torch"])
    assert found.signature.known is False


def test_signatures_are_compatible_if_callers_can_go_over():
    a, b = version(1, signature=signature("x")), version(2, signature=signature("x", "z"))
    found = comparison.compare(a, b).signature
    assert (found.compatible, found.breaking) == (False, ["input 'z' is new and required"])
    assert comparison.compare(a, a).signature == comparison.SignatureDifference(True, True, True, [])


def test_references():
    assert references.parse("digits@3") == Reference("digits", number=3)
    assert references.parse("digits@v3") == Reference("digits", number=3)
    assert references.parse("digits") == references.parse("digits@latest") == Reference("digits")
    assert references.parse("digits@champion") == Reference("digits", alias="champion")
    for wrong, words in (
        ("digits@", "no version after the @"),
        ("@3", "not a valid name"),
        ("digits@0", "Versions are numbers"),
        ("digits@99999999999", "Versions are numbers"),
        ("digits@a b", "not a valid name of an alias"),
    ):
        with pytest.raises(BadRequest, match=words):
            references.parse(wrong)
    for wrong, words in (("latest", "cannot be set"), ("7", "looks like the number"), ("v7", "looks like")):
        with pytest.raises(BadRequest, match=words):
            references.check_alias(wrong)
