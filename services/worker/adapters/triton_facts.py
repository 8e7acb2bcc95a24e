"""Convert a model's configuration, counts and class labels from Triton to plain values."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from tidegate.kernel.protocol.statistics import CACHE, COMPUTE, EXECUTIONS, batch_part, count_name, time_name


def as_json(message: Any) -> dict[str, Any]:
    """Return a protobuf message as a dict, in the form of the JSON of Triton's HTTP API.

    Field names are as in the ``.proto`` file. 64-bit numbers are numbers, not strings.
    """
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            kind = field.message_type.fields_by_name["value"]
            found[field.name] = {str(key): _value(kind, value[key]) for key in sorted(value)}
        elif field.is_repeated:
            found[field.name] = [_value(field, each) for each in value]
        elif not field.has_presence or message.HasField(field.name):
            found[field.name] = _value(field, value)
    return found


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return as_json(value)
    if field.enum_type is not None:
        named = field.enum_type.values_by_number.get(value)
        return named.name if named is not None else value
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def counts(statistics: Any) -> dict[str, int]:
    """Return the counts and times (in ns) of a ``ModelStatistics`` message as a flat dict.

    The values do not decrease while the model is loaded.
    """
    found = {EXECUTIONS: statistics.execution_count}
    for part in ("success", "queue", *COMPUTE, *CACHE):
        _add(found, part, getattr(statistics.inference_stats, part))
    for batch in statistics.batch_stats:
        for part in COMPUTE:
            _add(found, batch_part(batch.batch_size, part), getattr(batch, part))
    return found


def _add(found: dict[str, int], part: str, duration: Any) -> None:
    found[count_name(part)], found[time_name(part)] = duration.count, duration.ns


def labels(config: dict[str, Any], folder: Path) -> dict[str, list[str]]:
    """Return the class names of each output that has a label file in the model's ``folder``."""
    found = {}
    for output in config.get("output", ()):
        file = output.get("label_filename")
        # Ignore a path outside the folder. Do not raise an error, because Triton accepts the path.
        if file and (path := (folder / file).resolve()).is_relative_to(folder.resolve()) and path.is_file():
            found[output["name"]] = path.read_text(errors="replace").splitlines()
    return found
