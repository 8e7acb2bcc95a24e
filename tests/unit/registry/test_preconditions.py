from __future__ import annotations

import pytest

from services.registry.domain.preconditions import precondition
from tidegate.kernel.errors import BadRequest, PreconditionFailed


@pytest.mark.parametrize("match", ['"5"', "5", 'W/"5"', '"4", "5"', "*"])
def test_an_object_that_is_as_expected(match: str) -> None:
    wanted = precondition("deployment", "mine", match, None)
    assert wanted is not None
    wanted.check("5")


@pytest.mark.parametrize(
    ("match", "none_match", "etag", "words"),
    [
        ('"4"', None, "5", "Deployment 'mine' has the ETag 5, not 4"),
        ("*", None, None, "does not exist"),
        ('"4"', None, None, "does not exist"),
        (None, "*", "5", "already exists"),
    ],
)
def test_an_object_that_is_not(
    match: str | None, none_match: str | None, etag: str | None, words: str
) -> None:
    wanted = precondition("deployment", "mine", match, none_match)
    assert wanted is not None
    with pytest.raises(PreconditionFailed, match=words):
        wanted.check(etag)


def test_a_new_object_and_no_precondition() -> None:
    wanted = precondition("key", "k", None, " * ")
    assert wanted is not None
    wanted.check(None)
    assert precondition("key", "k", None, None) is None


@pytest.mark.parametrize(
    ("match", "none_match"), [("", None), ('"a" "b"', None), ("x" * 81, None), ('"5",', None), (None, '"5"')]
)
def test_headers_that_cannot_be_read(match: str | None, none_match: str | None) -> None:
    with pytest.raises(BadRequest):
        precondition("key", "k", match, none_match)
