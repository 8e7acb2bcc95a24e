"""Forms that arrive in pieces of any size: parts, limits, incomplete and hostile forms."""

from __future__ import annotations

import pytest

from services.gateway.domain.multipart import (
    HEAD_BYTES,
    MAX_CONTENT_TYPE,
    MAX_PARTS,
    MAX_SEMICOLONS,
    MultipartReader,
    PartBegin,
    PartData,
    PartEnd,
    boundary_of,
)
from tidegate.kernel.errors import BadRequest

FORM = (
    b"--xx\r\n"
    b'Content-Disposition: form-data; name="purpose"\r\n\r\n'
    b"batch\r\n"
    b"--xx\r\n"
    b'content-disposition: form-data; name="file"; filename="lines \xc3\xa4.jsonl"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\n"
    b'{"a": 1}\r\n--x\r\n{"b": 2}\n\r\n'
    b"--xx--\r\nwhat follows"
)


def parts(form: bytes, size: int) -> list[tuple[str, str | None, bytes]]:
    """Return name, file name and content of each part, if the form arrives in pieces of ``size`` bytes."""
    reader, found = MultipartReader(b"xx"), list[tuple[str, str | None, bytes]]()
    begun: PartBegin | None = None
    content = b""
    for at in range(0, len(form), size):
        for event in reader.feed(form[at : at + size]):
            if isinstance(event, PartBegin):
                begun, content = event, b""
            elif isinstance(event, PartData):
                content += event.data
            else:
                assert isinstance(event, PartEnd)
                assert begun is not None
                found.append((begun.name, begun.filename, content))
    reader.end()
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
def test_a_form_in_pieces(size):
    assert parts(FORM, size) == [
        ("purpose", None, b"batch"),
        ("file", "lines ä.jsonl", b'{"a": 1}\r\n--x\r\n{"b": 2}\n'),
    ]


@pytest.mark.parametrize("size", [1, 1000])
def test_a_preamble_and_an_empty_part(size):
    form = b'hello\r\n--xx \r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n--xx--'
    assert parts(form, size) == [("a", None, b"")]


@pytest.mark.parametrize("cut", [3, 30, 80, len(FORM) - 20])
def test_an_incomplete_form_is_refused(cut):
    with pytest.raises(BadRequest, match="not complete"):
        parts(FORM[:cut], 10)


@pytest.mark.parametrize("size", [1, 100, 100_000])
@pytest.mark.parametrize(
    "form",
    [
        b"--xx\r\nContent-Type: text/plain\r\n\r\nx\r\n--xx--",
        b'--xx\r\nContent-Disposition: attachment; name="a"\r\n\r\nx\r\n--xx--',
        b"--xx\r\n\r\nx\r\n--xx--",
        b'--xxyz\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n--xx--',
        b"--xx\r\nX: " + b"y" * HEAD_BYTES + b"\r\n\r\nx\r\n--xx--",
        b'--xx\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * (MAX_PARTS + 1) + b"--xx--",
    ],
)
def test_other_forms_are_refused(form, size):
    with pytest.raises(BadRequest):
        parts(form, size)


def test_a_reader_holds_little():
    reader = MultipartReader(b"xx")
    list(reader.feed(FORM[: FORM.index(b"{")]))
    for _ in range(100):
        passed = sum(len(event.data) for event in reader.feed(b"z" * 10_000) if isinstance(event, PartData))
        assert passed >= 10_000 - 10
    assert len(reader._held) <= len(b"\r\n--xx")


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/form-data; boundary=abc", b"abc"),
        ('Multipart/Form-Data; charset=utf-8; boundary="a b"', b"a b"),
    ],
)
def test_boundaries(content_type, boundary):
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "application/json",
        "multipart/form-data",
        "multipart/mixed; boundary=a",
        f"multipart/form-data; boundary={'a' * 71}",
    ],
)
def test_other_content_types(content_type):
    with pytest.raises(BadRequest):
        boundary_of(content_type)


def test_a_content_type_that_is_slow_to_parse():
    with pytest.raises(BadRequest, match=f"at most {MAX_CONTENT_TYPE}"):
        boundary_of('multipart/form-data; boundary="' + ";" * 60_000 + '"')


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ('form-data; name="' + ";" * (MAX_SEMICOLONS + 1) + '"', "parameters"),
        ("form-data; name*" + "1" * 5000 + "=x", "with a name"),
    ],
)
def test_a_content_disposition_that_misuses_the_parser(value, problem):
    with pytest.raises(BadRequest, match=problem):
        parts(b"--xx\r\nContent-Disposition: " + value.encode() + b"\r\n\r\nx\r\n--xx--", 10_000)
