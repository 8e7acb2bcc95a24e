"""Pass whole bodies to models that decode them: imported scripts of SageMaker and handlers of TorchServe.

Such a model has the inputs ``body`` and ``content_type``, and may have ``accept``. Its outputs are ``body``
and ``content_type``. Each of these is one string without a batch axis.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from services.gateway.domain.contract import Contract, Decoded, Inputs
from tidegate.kernel.protocol.envelope import Buffer, Tensor
from tidegate.kernel.protocol.tensors import pack_strings, unpack_strings

BODY, CONTENT_TYPE, ACCEPT = "body", "content_type", "accept"
_IN = {BODY, CONTENT_TYPE, ACCEPT}
_MEDIA = re.compile(r"[\w.+-]{1,80}/[\w.+-]{1,80}(;[ \w=.\"+-]{1,80})?")
_BYTES = "application/octet-stream"


def takes_whole_body(contract: Contract) -> bool:
    """Return True if a model decodes the bodies of its requests itself."""
    signature = contract.signature
    if signature is None or contract.max_batch:
        return False
    inputs, outputs = ({each.name for each in side} for side in (signature.inputs, signature.outputs))
    every = (*signature.inputs, *signature.outputs)
    texts = all(each.datatype == "BYTES" and each.shape == [1] for each in every)
    return texts and {BODY, CONTENT_TYPE} <= inputs <= _IN and outputs == {BODY, CONTENT_TYPE}


def decode(body: Buffer, content_type: str, accept: str, contract: Contract) -> Decoded:
    """Return the request that passes a body to the model unchanged.

    Without a content type, the body is JSON, as for other models.
    """
    values: dict[str, bytes | str] = {BODY: bytes(body), CONTENT_TYPE: content_type or "application/json"}
    if ACCEPT in contract.inputs:
        values[ACCEPT] = accept or "application/json"
    inputs = Inputs(contract)
    for name, value in values.items():
        inputs.expect(name, "BYTES", [1])
        inputs.put(pack_strings([value]))
    tensors, data, rows = inputs.done()
    return Decoded("", rows, contract.key(tensors, (), {}), data, None, False, None, 0)


def answer(outputs: Sequence[Tensor], data: Sequence[Buffer]) -> tuple[str, bytes]:
    """Return the content type and the body of an answer."""
    found = {tensor.name: unpack_strings(memoryview(raw)) for tensor, raw in zip(outputs, data, strict=True)}
    media = found[CONTENT_TYPE][0].decode("latin-1")
    return (media if _MEDIA.fullmatch(media) else _BYTES), found[BODY][0]
