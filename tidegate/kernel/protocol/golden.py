"""Sample requests with expected outputs, and the comparison of an answer with the expected outputs. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tidegate.kernel.errors import BadRequest

TOLERANCE = 1e-5
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample request in the form of the Open Inference Protocol (OIP), with its expected outputs.

    ``expected``: the values of each output, by the output's name, as a flat list in row-major order. If it is
    empty, every answer without an error passes.
    """

    request: dict[str, Any]
    expected: Mapping[str, list[Any]] = field(default_factory=dict)
    tolerance: float = TOLERANCE


def read_sample(given: Any, where: str) -> Sample:
    """Return the sample in a JSON document. Raise BadRequest if the document is not a sample.

    ``where`` names the sample in the error's message.
    """
    if not isinstance(given, dict) or not isinstance(given.get("inputs"), list):
        raise BadRequest(
            f"{where} is not an inference request. Write "
            '{"inputs": [{"name": ..., "datatype": ..., "shape": [...], "data": [...]}]}. '
            'It may also have "expected": {"OUTPUT": [...]} and "tolerance": 0.001.'
        )
    tolerance = given.get("tolerance", TOLERANCE)
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not tolerance >= 0:
        raise BadRequest(f"{where}: the tolerance is {tolerance!r}; it must be a number, 0 or more.")
    request = {key: value for key, value in given.items() if key not in ("expected", "tolerance")}
    return Sample(request, _expected(given.get("expected", {}), where), float(tolerance))


def _expected(given: Any, where: str) -> dict[str, list[Any]]:
    """Return expected outputs by name, from ``{name: data}`` or from a list of OIP outputs."""
    if isinstance(given, list) and all(isinstance(each, dict) and "name" in each for each in given):
        given = {each["name"]: each.get("data") for each in given}
    if not isinstance(given, dict) or not all(isinstance(data, list) for data in given.values()):
        raise BadRequest(f'{where}: write the expected outputs as {{"OUTPUT": [...]}}.')
    return {str(name): list(_flat(data)) for name, data in given.items()}


def _flat(data: Any) -> Iterator[Any]:
    if isinstance(data, list):
        for each in data:
            yield from _flat(each)
    else:
        yield data


def differences(sample: Sample, answer: Mapping[str, Any]) -> list[str]:
    """Return the differences between an OIP answer and the expected outputs."""
    outputs = {output["name"]: list(_flat(output.get("data", []))) for output in answer.get("outputs", ())}
    found = []
    for name, wanted in sample.expected.items():
        if name not in outputs:
            found.append(f"output {name!r} is missing; the answer has {', '.join(sorted(outputs)) or 'none'}")
        elif len(outputs[name]) != len(wanted):
            found.append(f"output {name!r} has {len(outputs[name])} values, expected {len(wanted)}")
        else:
            found += _values(name, outputs[name], wanted, sample.tolerance)
    return found


def _values(name: str, values: Sequence[Any], wanted: Sequence[Any], tolerance: float) -> list[str]:
    wrong = [at for at, pair in enumerate(zip(values, wanted, strict=True)) if not close(*pair, tolerance)]
    if not wrong:
        return []
    shown = ", ".join(f"{name}[{at}] is {values[at]!r}, expected {wanted[at]!r}" for at in wrong[:SHOWN])
    return [f"{shown} (tolerance {tolerance:g}); {len(wrong)} of {len(values)} values differ"]


def close(value: Any, wanted: Any, tolerance: float) -> bool:
    """Return True if the two values are equal, or if they are numbers that differ little enough.

    Numbers may differ by ``tolerance`` plus ``tolerance`` times the wanted number.
    """
    numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (value, wanted))
    if not numbers or value == wanted:
        return bool(value == wanted)
    return bool(abs(value - wanted) <= tolerance + tolerance * abs(wanted))
