"""Which version a registration is, whether it needs a signature, and which changes break callers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from services.registry.domain import compatibility, registration
from tidegate.kernel.errors import BadRequest, Conflict
from tidegate.kernel.protocol.models import Signature, TensorSpec, Version

ART, OTHER = "a" * 64, "b" * 64


def tensor(name: str = "x", datatype: Any = "FP32", shape: Any = (4,), **more: Any) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=list(shape), **more)


def signature(inputs: Any = None, outputs: Any = None, **more: Any) -> Signature:
    fields = {"max_batch_size": 8} | more
    return Signature(inputs=inputs or [tensor()], outputs=outputs or [tensor("y")], **fields)


def version(number: int, artifact: str = ART, found: Signature | None = None, **more: Any) -> Version:
    return Version(
        model="m",
        number=number,
        format="python",
        artifact_sha256=artifact,
        artifact_size=1,
        filename="model.py",
        signature=found,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        **more,
    )


def test_the_bytes_of_an_older_version_are_that_version():
    held = [version(1, ART), version(2, OTHER), version(3, OTHER, requirements=["x"])]
    assert registration.same_version(held, ART, "python", [], None) == held[0]
    assert registration.same_version(held, OTHER, "python", [], None) == held[1]
    assert registration.same_version(held, OTHER, "python", ["x"], None) == held[2]
    assert registration.same_version(held, ART, "triton", [], None) is None
    assert registration.same_version(held, "c" * 64, "python", [], None) is None


def test_of_several_versions_with_the_same_bytes_the_newest_counts():
    assert registration.same_version(
        [version(1), version(4), version(2)], ART, "python", [], None
    ) == version(4)


def test_another_signature_is_another_version_and_a_learned_one_is_not():
    held = [version(1, found=signature())]
    assert registration.same_version(held, ART, "python", [], None) == held[0]
    assert registration.same_version(held, ART, "python", [], signature()) == held[0]
    assert registration.same_version(held, ART, "python", [], signature(max_batch_size=4)) is None


@pytest.mark.parametrize("format_", ["python", "torchscript"])
def test_some_formats_need_a_signature(format_):
    with pytest.raises(BadRequest, match="Add a signature") as refused:
        registration.check_has_signature(format_, None)
    assert '"outputs"' in refused.value.message
    registration.check_has_signature(format_, signature())
    registration.check_has_signature(format_, None, describes_itself=True)
    registration.check_has_signature("sklearn", None)


WIDER = [
    signature([tensor(shape=(-1,))]),
    signature([tensor(), tensor("new", optional=True)]),
    signature(outputs=[tensor("y"), tensor("more")]),
    signature(max_batch_size=16),
]
NARROWER = [
    (signature([tensor("z")]), "input 'x' is removed; input 'z' is new and required"),
    (signature([tensor(datatype="FP64")]), "input 'x' is FP64, was FP32"),
    (signature([tensor(shape=(5,))]), r"input 'x' has shape \[5\], had \[4\]"),
    (signature([tensor(shape=(4, 1))]), r"input 'x' has shape \[4, 1\], had \[4\]"),
    (signature(outputs=[tensor("z")]), "output 'y' is removed"),
    (signature(outputs=[tensor("y", "FP64")]), "output 'y' is FP64, was FP32"),
    (signature(outputs=[tensor("y", shape=(-1,))]), r"output 'y' has shape \[-1\], had \[4\]"),
    (signature(max_batch_size=4), "max_batch_size is 4, was 8"),
    (signature(max_batch_size=0), "no longer have a batch axis"),
    (signature(decoupled=True), "now decoupled"),
]


@pytest.mark.parametrize("after", WIDER)
def test_wider_is_compatible(after):
    assert compatibility.breaking_changes(signature(), after) == []
    compatibility.check([version(1, found=signature())], after, breaking=False)


@pytest.mark.parametrize(("after", "words"), NARROWER)
def test_what_breaks_callers_is_named(after, words):
    held = [version(2, found=signature()), version(1, found=after)]
    with pytest.raises(Conflict, match=f"version 2 of model 'm': .*{words}.*--breaking") as refused:
        compatibility.check(held, after, breaking=False)
    assert refused.value.reason == "breaking_change"
    compatibility.check(held, after, breaking=True)


def test_narrowed_optional_and_any_size():
    wide = signature([tensor(shape=(-1,), optional=True)], [tensor("y", shape=(-1,))])
    assert compatibility.breaking_changes(wide, signature([tensor(shape=(-1,), optional=True)])) == []
    found = compatibility.breaking_changes(wide, signature())
    assert found == ["input 'x' has shape [4], had [-1]", "input 'x' is now required"]


def test_versions_without_a_signature_are_not_compared():
    compatibility.check([], signature(), breaking=False)
    compatibility.check([version(1)], signature(), breaking=False)
    compatibility.check([version(1, found=signature())], None, breaking=False)
