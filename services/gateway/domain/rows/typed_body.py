"""Decode a body by its content type, and encode the answer in a type that the caller accepts.

SageMaker's containers do the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.gateway.domain.contract import Contract, Decoded
from services.gateway.domain.rows import content, encoding, whole_body
from tidegate.kernel.protocol import bounded_json
from tidegate.kernel.protocol.envelope import Buffer, Tensor


class TypedBody:
    """The body of one request. :meth:`decode` sets ``rows`` and ``whole``.

    ``rows``: True if the request had rows. ``whole``: True if the model itself decodes bodies and encodes
    answers.
    """

    def __init__(self, kind: str, accept: str, body: Buffer) -> None:
        self._kind = kind
        self._accept = accept
        self._body = body
        self.rows, self.whole = True, False

    def decode(self, contract: Contract) -> Decoded:
        """Return the request.

        Raise BadRequest for a wrong body, and PayloadTooLarge for one that is too large. Raise Unavailable if
        the model's signature is not known.
        """
        self.whole = whole_body.takes_whole_body(contract)
        if self.whole:
            return whole_body.decode(self._body, self._kind, self._accept, contract)
        if not content.is_json(self._kind):
            return content.decode(self._kind, self._body, contract)
        document = bounded_json.loads(self._body)
        self.rows = not content.is_columns(document, contract)
        return content.from_json(document, contract)

    @property
    def wanted(self) -> str:
        """Return the content types that the caller accepts, or else the request's content type."""
        return self._accept or self._kind


def encoded(
    wanted: str, outputs: Sequence[Tensor], data: Sequence[Buffer], batch: int, *, rows: bool, whole: bool
) -> tuple[str, bytes]:
    """Return the content type and the body of an answer.

    ``batch``: the number of rows in the answer; 0: it has no batch axis. ``rows``, ``whole``: as in
    :class:`TypedBody`.
    """
    if whole:
        return whole_body.answer(outputs, data)
    return content.encode(wanted, encoding.arrays(outputs, data, batch), rows=rows)
