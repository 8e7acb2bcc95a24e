"""A coalesced call to the model in Triton: raw bytes in, raw bytes out, no tensor parsed."""

from __future__ import annotations

from collections.abc import Sequence

from services.worker.adapters.triton_client import ModelInferRequest, TritonClient
from services.worker.domain.split import Output
from tidegate.protocol.envelope import Request, read_call_key


class Model:
    """One model of one Triton; ``outputs`` are its outputs in the order of its signature."""

    def __init__(self, client: TritonClient, name: str, outputs: Sequence[str] = ()) -> None:
        self._client = client
        self._name = name
        self._order = {name: at for at, name in enumerate(outputs)}

    async def call(self, requests: list[Request], timeout_s: float) -> list[Output]:
        """Run requests of one call key as one batch; the answer has their rows in order.

        Raises what :meth:`TritonClient.infer` raises. Cancelling the task cancels the call in Triton.
        """
        first = requests[0]
        key = read_call_key(first.key)
        rows = sum(request.rows for request in requests)
        message = ModelInferRequest(model_name=self._name)
        for at, tensor in enumerate(key.inputs):
            shape = (rows, *tensor.dims) if rows else tensor.dims
            message.inputs.add(name=tensor.name, datatype=tensor.datatype.name, shape=shape)
            message.raw_input_contents.append(
                bytes(first.data[at]) if len(requests) == 1 else b"".join([r.data[at] for r in requests])
            )
        for name in key.outputs:
            message.outputs.add(name=name)
        for name, value in key.parameters.items():
            _set_parameter(message, name, value)
        answer = await self._client.infer(message, timeout_s)
        found = [
            Output(output.name, output.datatype, tuple(output.shape), raw)
            for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        ]
        # Triton gives them in an order of its own, another one in each process.
        order = {name: at for at, name in enumerate(key.outputs)} if key.outputs else self._order
        found.sort(key=lambda output: order.get(output.name, len(order)))
        return found


def _set_parameter(message: ModelInferRequest, name: str, value: object) -> None:
    parameter = message.parameters[name]
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = str(value)
