"""The result of an inference. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tidegate.client.codec import HEAD_LENGTH, Array, decode_response
from tidegate.client.errors import BadAnswer
from tidegate.client.flow import Answer


class InferResult(Mapping[str, Array]):
    """The result of one inference: the outputs by name, and details of the call.

    ``timing``: the milliseconds of each phase in the services, from the header ``Server-Timing``.
    ``request_id``: the id of the request in the logs. ``parameters``: the parameters of the answer.
    ``feedback_id``: the id under which feedback on this answer is reported; empty if the endpoint collects no
    feedback.
    """

    def __init__(
        self,
        outputs: dict[str, Array],
        *,
        model_name: str,
        model_version: str,
        request_id: str,
        timing: dict[str, float],
        parameters: dict[str, Any],
        feedback_id: str = "",
    ) -> None:
        self._outputs = outputs
        self.model_name = model_name
        self.model_version = model_version
        self.request_id = request_id
        self.timing = timing
        self.parameters = parameters
        self.feedback_id = feedback_id

    def __getitem__(self, name: str) -> Array:
        try:
            return self._outputs[name]
        except KeyError:
            raise KeyError(f"no output {name!r}; the outputs are: {', '.join(self._outputs)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {a.dtype}{list(a.shape)}" for name, a in self._outputs.items())
        return f"InferResult({self.model_name} v{self.model_version}; {shapes})"


def read_result(answer: Answer) -> InferResult:
    """Return the result in an answer. Raise BadAnswer if the answer is malformed."""
    try:
        length = answer.headers.get(HEAD_LENGTH.lower())
        head, outputs = decode_response(answer.body, int(length) if length is not None else None)
    except ValueError as error:
        raise BadAnswer(f"The answer is not an inference response: {error}.") from None
    return InferResult(
        outputs,
        model_name=str(head.get("model_name", "")),
        model_version=str(head.get("model_version", "")),
        request_id=answer.headers.get("x-request-id") or str(head.get("id", "")),
        timing=read_timing(answer.headers.get("server-timing", "")),
        parameters=head.get("parameters") or {},
        feedback_id=answer.headers.get("x-feedback-id") or "",
    )


def read_timing(header: str) -> dict[str, float]:
    """Return ``Server-Timing`` as milliseconds by name. Leave out entries without a duration."""
    timing: dict[str, float] = {}
    for entry in header.split(","):
        name, *fields = (part.strip() for part in entry.split(";"))
        for part in fields:
            key, _, value = part.partition("=")
            if key.strip().lower() == "dur":
                try:
                    timing[name] = float(value.strip().strip('"'))
                except ValueError:
                    continue
    return timing
