"""Check a version's metadata, patch it, and extract the facts for searches. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from services.registry.domain import merge
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import VersionMetadata

MOST_BYTES = 64 * 1024
MOST_CARD_BYTES = 256 * 1024
LONGEST_KEY = 128
LONGEST_VALUE = 1_000
LONGEST_NOTES = 16_000
# The maximum number of entries in each collection.
MOST_ENTRIES = {"metrics": 500, "parameters": 500, "tags": 200, "dependencies": 2_000}
# The fields that contain a single text.
TEXTS = ("owner", "framework", "framework_version", "license", "commit", "run", "dataset", "parent")

FactKind = Literal["metric", "parameter", "tag", "field"]


@dataclass(frozen=True, slots=True)
class Fact:
    """A searchable fact of a version. ``value``: the text as a number; None if it is not a number."""

    kind: FactKind
    name: str
    text: str
    value: float | None = None


def check(metadata: VersionMetadata) -> VersionMetadata:
    """Return the metadata. Raise BadRequest if a part exceeds its limit."""
    for name, most in MOST_ENTRIES.items():
        entries = getattr(metadata, name)
        if len(entries) > most:
            raise BadRequest(f"metadata.{name} has {len(entries)} entries, but the limit is {most}.")
        for entry in entries:
            _check_entry(name, entry, None if isinstance(entries, list) else entries[entry])
    for name in TEXTS:
        _check_length(f"metadata.{name}", getattr(metadata, name) or "", LONGEST_VALUE)
    _check_length("metadata.notes", metadata.notes, LONGEST_NOTES)
    if (size := len(metadata.model_dump_json().encode())) > MOST_BYTES:
        raise BadRequest(
            f"The metadata have {size} bytes as JSON, but the limit is {MOST_BYTES}. Put long texts into "
            "the model card: `tidegate card NAME@N --set FILE`."
        )
    return metadata


def check_card(text: str) -> str:
    """Return a model card. Raise BadRequest if it is empty or too long."""
    size = len(text.encode())
    if not text.strip():
        raise BadRequest("The model card is empty. To remove a card: `tidegate card NAME@N --delete`.")
    if size > MOST_CARD_BYTES:
        raise BadRequest(f"The model card has {size} bytes, but the limit is {MOST_CARD_BYTES}.")
    return text


def patched(metadata: VersionMetadata, patch: Mapping[str, Any]) -> VersionMetadata:
    """Return the metadata with a JSON merge patch applied. Raise BadRequest if the result is not valid."""
    fields = merge.patched(metadata.model_dump(), patch)
    return check(merge.checked(VersionMetadata, fields, "metadata"))


def facts_of(metadata: VersionMetadata) -> Iterator[Fact]:
    """Yield the searchable facts in metadata."""
    for name, value in metadata.metrics.items():
        yield Fact("metric", name, f"{value:g}", value)
    for name, parameter in metadata.parameters.items():
        yield Fact("parameter", name, text_of(parameter), _number(parameter))
    for name, tag in metadata.tags.items():
        yield Fact("tag", name, tag, _number(tag))
    for name in TEXTS:
        if (text := getattr(metadata, name)) is not None:
            yield Fact("field", name, text)
    if metadata.trained_at is not None:
        yield Fact("field", "trained", metadata.trained_at.isoformat(), seconds(metadata.trained_at))


def seconds(moment: datetime) -> float:
    """Return Unix time in seconds. A time without a zone is UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def text_of(value: bool | float | str) -> str:
    """Return a parameter as text. Booleans become ``true`` and ``false``, as in JSON."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _number(value: bool | float | str) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= 1e300 else None  # databases do not store nan and inf


def _check_entry(collection: str, key: str, value: Any) -> None:
    if value is None:  # the collection is a list, and ``key`` is one of its items
        _check_length(f"A line of metadata.{collection}", key, LONGEST_VALUE)
        return
    if not key or len(key) > LONGEST_KEY:
        raise BadRequest(
            f"metadata.{collection} has the name {key[:40]!r}. A name has 1 to {LONGEST_KEY} characters."
        )
    if isinstance(value, str):
        _check_length(f"metadata.{collection}[{key!r}]", value, LONGEST_VALUE)


def _check_length(what: str, text: str, longest: int) -> None:
    if len(text) > longest:
        raise BadRequest(f"{what} has {len(text)} characters, but the limit is {longest}.")
