"""Compare a model's answers with its signature. Usually this takes one set lookup per output."""

from __future__ import annotations

from collections.abc import Sequence

from services.worker.domain.split import Output
from tidegate.kernel.protocol.models import Signature, TensorSpec

# The maximum number of shapes to remember. Without this limit, a model that returns new shapes again and
# again would fill the memory.
KEPT = 1024


class OutputCheck:
    """A check of a model's answers against its signature.

    ``count``: the number of answers that contradict the signature. ``last``: the last contradiction in words.
    """

    def __init__(self, signature: Signature) -> None:
        self._specs = {spec.name: spec for spec in signature.outputs}
        self._first = 1 if signature.max_batch_size > 0 else 0
        self._agreed: set[tuple[str, str, tuple[int, ...], int]] = set()
        self.count = 0
        self.last = ""

    def agrees(self, outputs: Sequence[Output], rows: int) -> bool:
        """Return True if the outputs agree with the signature in datatype, shape and number of rows.

        If they do not agree, count the answer and store the reason in ``last``. ``rows``: the number of rows;
        0 if it is unknown, as in a stream. Outputs that the signature does not name are ignored.
        """
        agreed = self._agreed
        for name, datatype, shape, _ in outputs:
            if (name, datatype, shape, rows) not in agreed:
                return self._judged(outputs, rows)
        return True

    @property
    def summary(self) -> str:
        """Return a text: how many answers contradict the signature, and the last contradiction.

        The text is empty if no answer contradicts the signature.
        """
        if not self.count:
            return ""
        many = "1 answer contradicts" if self.count == 1 else f"{self.count} answers contradict"
        return f"{many} the signature: {self.last}"

    def missing(self, outputs: Sequence[Output]) -> str:
        """Return a text about a missing output of the signature; empty if the answer has all outputs."""
        lacking = self._specs.keys() - {output.name for output in outputs}
        return f"the output {min(lacking)!r} is missing" if lacking else ""

    def _judged(self, outputs: Sequence[Output], rows: int) -> bool:
        for output in outputs:
            spec = self._specs.get(output.name)
            problem = None if spec is None else self._problem(spec, output, rows)
            if problem is not None:
                self.count += 1
                self.last = problem
                return False
            if len(self._agreed) >= KEPT:
                self._agreed.clear()
            self._agreed.add((output.name, output.datatype, output.shape, rows))
        return True

    def _problem(self, spec: TensorSpec, output: Output, rows: int) -> str | None:
        expected = [rows or "rows", *spec.shape] if self._first else list(spec.shape)
        same_rank = len(output.shape) == len(expected)
        fits = same_rank and all(
            want in (-1, "rows", have) for want, have in zip(expected, output.shape, strict=True)
        )
        if fits and output.datatype == spec.datatype:
            return None
        return (
            f"the output {output.name!r} is {output.datatype} {list(output.shape)}, but the signature says "
            f"{spec.datatype} [{', '.join(map(str, expected))}]"
        )
