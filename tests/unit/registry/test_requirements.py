"""What is taken from a requirements.txt, and the sentence for everything that is not."""

from __future__ import annotations

from pathlib import PurePosixPath as P

import pytest

from services.registry.domain.requirements import MAX_LINES, gathered, lines_of
from tidegate.kernel.errors import BadRequest


def test_comments_blanks_continuations_and_doubles_go():
    text = """
    # what it needs
    tidepool >= 1 ; python_version < "4"   # a comment
    numpy\t==1.26.4 \\
        --hash=sha256:abc
    --extra-index-url https://example.org/a#fragment

    tidepool >= 1 ; python_version < "4"
    """
    assert lines_of(text, "r") == [
        'tidepool >= 1 ; python_version < "4"',
        "numpy ==1.26.4 --hash=sha256:abc",
        "--extra-index-url https://example.org/a#fragment",
    ]
    assert lines_of("", "r") == []


@pytest.mark.parametrize(
    "line",
    [
        "six", "six[extra]~=1.0", "pkg @ file:///opt/pkg.whl", "git+https://example.org/x.git@v1",
        "/opt/pkg.whl", "-f /opt/wheels", "--no-index", "--only-binary=:all:", "$UNSET_PACKAGE",
    ],
)  # fmt: skip
def test_what_pip_may_judge(line):
    assert lines_of(line, "r") == [line]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("-r more.txt", "the option '-r' cannot"),
        ("--requirement=more.txt", "the option '--requirement' cannot"),
        ("-c limits.txt", "the option '-c' cannot"),
        ("-e .", "the option '-e' cannot"),
        ("--target /tmp", "the option '--target' cannot"),
        ("./wheels/x.whl", "leads nowhere on a worker"),
        ("wheels/x.whl ; python_version > '3'", "leads nowhere on a worker"),
        (".", "leads nowhere on a worker"),
        ("a\x00b", "is not a requirement"),
        ("x" * 2001, "is not a requirement"),
    ],
)
def test_what_a_worker_could_not_carry_out(line, told):
    with pytest.raises(BadRequest, match=told):
        lines_of(line, "needs.txt")


def test_too_many():
    with pytest.raises(BadRequest, match="more than 500"):
        lines_of("\n".join(f"p{n}" for n in range(MAX_LINES + 1)), "r")


def test_those_of_a_triton_directory():
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
