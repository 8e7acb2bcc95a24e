"""Which lines of a requirements.txt are accepted, and the messages for the others."""

from __future__ import annotations

from pathlib import PurePosixPath as P

import pytest

from services.registry.domain.requirements import MAX_LINES, gathered, parse
from tidegate.kernel.errors import BadRequest


def test_comments_blanks_continuations_and_duplicates_are_removed():
    text = """
    # what it needs
    tidepool >= 1 ; python_version < "4"   # a comment
    numpy\t==1.26.4 \\
        --hash=sha256:abc
    --extra-index-url https://example.org/a#fragment

    tidepool >= 1 ; python_version < "4"
    """
    assert parse(text, "r") == [
        'tidepool >= 1 ; python_version < "4"',
        "numpy ==1.26.4 --hash=sha256:abc",
        "--extra-index-url https://example.org/a#fragment",
    ]
    assert parse("", "r") == []


@pytest.mark.parametrize(
    "line",
    [
        "six", "six[extra]~=1.0", "pkg @ file:///opt/pkg.whl", "git+https://example.org/x.git@v1",
        "/opt/pkg.whl", "-f /opt/wheels", "--no-index", "--only-binary=:all:", "$UNSET_PACKAGE",
    ],
)  # fmt: skip
def test_lines_that_only_pip_can_judge(line):
    assert parse(line, "r") == [line]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-r more.txt", "the option '-r' does not work"),
        ("--requirement=more.txt", "the option '--requirement' does not work"),
        ("-c limits.txt", "the option '-c' does not work"),
        ("-e .", "the option '-e' does not work"),
        ("--target /tmp", "the option '--target' does not work"),
        ("./wheels/x.whl", "does not exist on a worker"),
        ("wheels/x.whl ; python_version > '3'", "does not exist on a worker"),
        (".", "does not exist on a worker"),
        ("a\x00b", "is not a requirement"),
        ("x" * 2001, "is not a requirement"),
    ],
)
def test_lines_that_a_worker_cannot_install(line, message):
    with pytest.raises(BadRequest, match=message):
        parse(line, "needs.txt")


def test_too_many_lines():
    with pytest.raises(BadRequest, match="the limit is 500"):
        parse("\n".join(f"p{n}" for n in range(MAX_LINES + 1)), "r")


def test_requirements_of_a_triton_directory():
    texts = {
        P("repo/requirements.txt"): "everywhere\n",
        P("repo/a/requirements.txt"): "a\neverywhere\n",
        P("repo/b/1/requirements.txt"): "b\n",
        P("repo/b/1/vendored/requirements.txt"): "not-ours\n",
        P("repo/b/config.pbtxt"): "x",
        P("docs/requirements.txt"): "sphinx\n",
    }
    assert gathered([P("repo/a"), P("repo/b")], texts) == ["a", "everywhere", "b"]
    assert gathered([P(".")], {P("requirements.txt"): "x", P("1/requirements.txt"): "y"}) == ["y", "x"]
