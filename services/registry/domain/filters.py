"""Parse the filters of searches, such as ``metrics.accuracy > 0.9 and tags.team = "fraud"``. Pure.

A filter is a list of conditions that must all be true. No text of a filter becomes part of an SQL statement.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from tidegate.kernel.errors import BadRequest

LONGEST = 4_000
MOST_CONDITIONS = 32
MOST_VALUES = 100

Kind = Literal["column", "metric", "parameter", "tag", "field", "alias"]
Operator = Literal["=", "!=", ">", ">=", "<", "<=", "like", "in", "null", "not null"]
Type = Literal["text", "number", "time", "any"]
Value = str | float | datetime

EXAMPLE = 'metrics.accuracy > 0.9 and tags.team = "fraud" and created > 2026-01-01'
# The names that a filter may use. For each name: the kind of place that stores its value, the name of the
# value in that place, and the type of the value.
NAMES: dict[str, tuple[Kind, str, Type]] = {
    "name": ("column", "model", "text"),
    "model": ("column", "model", "text"),
    "version": ("column", "number", "number"),
    "format": ("column", "format", "text"),
    "sha256": ("column", "sha256", "text"),
    "stage": ("column", "stage", "text"),
    "verification": ("column", "verification", "text"),
    "registered_by": ("column", "registered_by", "text"),
    "size": ("column", "size", "number"),
    "created": ("column", "created", "time"),
    "trained": ("field", "trained", "time"),
    "owner": ("field", "owner", "text"),
    "framework": ("field", "framework", "text"),
    "framework_version": ("field", "framework_version", "text"),
    "license": ("field", "license", "text"),
    "commit": ("field", "commit", "text"),
    "run": ("field", "run", "text"),
    "dataset": ("field", "dataset", "text"),
    "parent": ("field", "parent", "text"),
    "alias": ("alias", "alias", "text"),
}
_FAMILIES: dict[str, tuple[Kind, Type]] = {
    "metrics": ("metric", "number"),
    "metric": ("metric", "number"),
    "parameters": ("parameter", "any"),
    "params": ("parameter", "any"),
    "tags": ("tag", "any"),
    "tag": ("tag", "any"),
}
# Matches a text that ends with an unescaped backslash. PostgreSQL rejects such a text as a pattern for
# `like`.
_ESCAPES = re.compile(r"(?<!\\)(?:\\\\)*\\\Z")
_TOKENS = re.compile(
    r"""\s*(?:
      (?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    | (?P<time>\d{4}-\d{2}-\d{2}(?:[T ]\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?:Z|[+-]\d{2}:?\d{2})?)?)(?![\w.])
    | (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])
    | (?P<operator>>=|<=|!=|<>|==|=|>|<)
    | (?P<mark>[(),])
    | (?P<name>[A-Za-z_]+\.(?:"[^"]+"|`[^`]+`)|[A-Za-z_][\w./@:+-]*)
    )""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A value of a version, such as the metric ``accuracy``.

    Conditions test this value, and lists are sorted by it.
    """

    kind: Kind
    name: str
    type: Type


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition of a filter. ``values``: the values with which the subject is compared.

    The operator ``in`` has several values, ``null`` and ``not null`` have none, and the others have one.
    """

    subject: Subject
    operator: Operator
    values: tuple[Value, ...] = ()


@dataclass(frozen=True, slots=True)
class Order:
    """The order of a list. Versions that lack the value are last."""

    subject: Subject
    descending: bool = False

    def __str__(self) -> str:
        kind, name, _ = self.subject.kind, self.subject.name, self.subject.type
        return f"{kind}.{name} {'desc' if self.descending else 'asc'}"


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    at: int


def parse(text: str) -> tuple[Condition, ...]:
    """Return the conditions of a filter; none for an empty text. Raise BadRequest for a wrong filter."""
    if len(text) > LONGEST:
        raise BadRequest(f"The filter has {len(text)} characters, but the limit is {LONGEST}.")
    if "\0" in text:
        raise BadRequest("The filter has a NUL character. Leave the character out.")
    tokens = list(_tokens(text))
    if not tokens:
        return ()
    found: list[Condition] = []
    rest = tokens
    while True:
        condition, rest = _condition(rest, text)
        found.append(condition)
        if len(found) > MOST_CONDITIONS:
            raise BadRequest(f"A filter has at most {MOST_CONDITIONS} conditions.")
        if not rest:
            return tuple(found)
        if rest[0].text.lower() != "and" or rest[0].kind != "name":
            hint = " Filters cannot use `or`: run two searches." if rest[0].text.lower() == "or" else ""
            raise _wrong(text, rest[0], f"write `and` between two conditions.{hint}")
        rest = rest[1:]


def parse_order(text: str) -> Order:
    """Return the order in a text such as ``metrics.accuracy desc``.

    Raise BadRequest if the text is not one name, with or without a direction.
    """
    name, _, direction = text.strip().rpartition(" ")
    if direction.lower() not in ("asc", "desc"):
        name, direction = text.strip(), "asc"
    tokens = list(_tokens(name)) if name.strip() else []
    if len(tokens) != 1 or tokens[0].kind != "name":
        raise BadRequest(f"order_by is {text[:80]!r}, but must be one name, such as `metrics.accuracy desc`.")
    subject = _subject(tokens[0].text)
    if subject is None:
        subject = Subject("metric", tokens[0].text, "number")
    if subject.kind == "alias":
        raise BadRequest("order_by cannot be alias, because a version can have several aliases.")
    return Order(subject, direction.lower() == "desc")


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while text[at:].strip():
        found = _TOKENS.match(text, at)
        if found is None:
            start = at + len(text[at:]) - len(text[at:].lstrip())
            raise BadRequest(f"The filter cannot be read at {text[start : start + 20]!r}. Example: {EXAMPLE}")
        kind = str(found.lastgroup)
        yield _Token(kind, found[kind], found.start(kind))
        at = found.end()


def _condition(tokens: list[_Token], text: str) -> tuple[Condition, list[_Token]]:
    if not tokens:
        raise BadRequest(f"The filter ends after `and`: another condition must follow. Example: {EXAMPLE}")
    head, rest = tokens[0], tokens[1:]
    if head.kind != "name":
        raise _wrong(text, head, "a condition must begin with a name, such as `metrics.accuracy` or `owner`.")
    if not rest:
        raise _wrong(text, head, "an operator must follow: = != > >= < <= like, in, is null.")
    operator, rest = _operator(rest, text)
    values: tuple[Value, ...] = ()
    if operator == "in":
        values, rest = _list(rest, text)
    elif operator not in ("null", "not null"):
        if not rest:
            raise BadRequest(f"The filter ends after `{head.text} {operator}`: a value must follow.")
        values, rest = (_value(rest[0], text),), rest[1:]
    return _checked(head, text, operator, values), rest


def _operator(tokens: list[_Token], text: str) -> tuple[Operator, list[_Token]]:
    head, word = tokens[0], tokens[0].text.lower()
    if head.kind == "operator":
        operators: dict[str, Operator] = {
            "=": "=", "==": "=", "!=": "!=", "<>": "!=", ">": ">", ">=": ">=", "<": "<", "<=": "<=",
        }  # fmt: skip
        return operators[word], tokens[1:]
    words = [token.text.lower() for token in tokens[:3]]
    if word in ("like", "ilike"):
        return "like", tokens[1:]
    if word == "in":
        return "in", tokens[1:]
    if words[:2] == ["is", "null"]:
        return "null", tokens[2:]
    if words == ["is", "not", "null"]:
        return "not null", tokens[3:]
    raise _wrong(text, head, "an operator is expected here: = != > >= < <= like, in, is null.")


def _list(tokens: list[_Token], text: str) -> tuple[tuple[Value, ...], list[_Token]]:
    wanted = "`in` needs values in parentheses, such as ('onnx', 'python')."
    if not tokens or tokens[0].text != "(":
        raise BadRequest(f"The filter is wrong: {wanted}")
    values: list[Value] = []
    for place in range(1, len(tokens), 2):
        values.append(_value(tokens[place], text))
        after = tokens[place + 1].text if place + 1 < len(tokens) else ""
        if after == ")" and len(values) <= MOST_VALUES:
            return tuple(values), tokens[place + 2 :]
        if after != ",":
            break
    raise BadRequest(f"The filter is wrong: {wanted}")


def _value(token: _Token, text: str) -> Value:
    match token.kind:
        case "text":
            return re.sub(r"\\(.)", r"\1", token.text[1:-1])
        case "number":
            return float(token.text)
        case "time":
            return _time(token, text)
        case "name":
            return token.text
    raise _wrong(text, token, "a value is expected here: a number, a date, or a text in quotes.")


def _time(token: _Token, text: str) -> datetime:
    written = token.text[:-1] + "+00:00" if token.text.endswith("Z") else token.text
    try:
        found = datetime.fromisoformat(written)
        found = found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise _wrong(text, token, "this is not a date. Write 2026-01-31 or 2026-01-31T12:00:00Z.") from None
    return found


def _subject(word: str) -> Subject | None:
    """Return the subject that a name means; None for an unknown name."""
    if word.lower() in NAMES:
        kind, name, type_ = NAMES[word.lower()]
        return Subject(kind, name, type_)
    family, dot, key = word.partition(".")
    if dot and family.lower() in _FAMILIES:
        kind, type_ = _FAMILIES[family.lower()]
        bare = key[1:-1] if key[:1] in ("`", '"') else key
        if not bare:
            raise BadRequest(
                f"The filter has {word!r}, but a name must follow the dot, such as {family}.NAME"
            )
        return Subject(kind, bare, type_)
    return None


def _checked(head: _Token, text: str, operator: Operator, values: tuple[Value, ...]) -> Condition:
    subject = _subject(head.text)
    if subject is None and values and all(isinstance(value, float) for value in values):
        subject = Subject("metric", head.text, "number")  # `accuracy > 0.9` means metrics.accuracy
    if subject is None:
        raise _wrong(
            text,
            head,
            f"the name {head.text!r} does not exist. The names are {', '.join(NAMES)}, metrics.NAME, "
            "parameters.NAME and tags.NAME.",
        )
    if operator == "like" and subject.type in ("number", "time"):
        raise _wrong(text, head, f"`like` compares texts, but this is a {subject.type}.")
    fitted = tuple(_fitted(subject, value, head, text) for value in values)
    if operator in (">", ">=", "<", "<=") and any(isinstance(value, str) for value in fitted):
        raise _wrong(text, head, f"texts have no order, so `{operator}` needs a number or a date.")
    if operator == "like":
        fitted = tuple(str(value) for value in values)
        if any(_ESCAPES.search(str(value)) for value in fitted):
            raise _wrong(text, head, "the pattern ends with a backslash: write two backslashes for one.")
    return Condition(subject, operator, fitted)


def _fitted(subject: Subject, value: Value, head: _Token, text: str) -> Value:
    match subject.type, value:
        case "number", float():
            return value
        case "number", _:
            raise _wrong(text, head, "this is a number, so compare it with a number, such as 0.9.")
        case "time", datetime():
            return value
        case "time", str():
            return _time(_Token("time", value, head.at), text)
        case "time", _:
            raise _wrong(text, head, "this is a time, so compare it with a date, such as 2026-01-31.")
        case "any", float():
            return value
        case _, float():
            return f"{value:g}"
        case _, datetime():
            return value.date().isoformat() if not value.time() else value.isoformat()
    return str(value)


def _wrong(text: str, token: _Token, why: str) -> BadRequest:
    near = text[token.at : token.at + 40]
    return BadRequest(f"The filter is wrong at {near!r}: {why} Example: {EXAMPLE}")
