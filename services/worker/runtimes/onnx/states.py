"""Keep the implicit state of sequences: the tensors that a model returns for the next request.

A model of Triton's Python backend cannot return this state to Triton, so this module keeps it. Triton sends
the initial state with the first request of a sequence. Each later request gets the state that the model
returned for the previous request.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import triton_python_backend_utils as pb_utils
from rows import Call, Rows, failure, response


class StatefulRows(Rows):
    """A runner that calls the model for one request at a time, with the state of the request's sequence."""

    def __init__(self, config: dict[str, Any], call: Call) -> None:
        super().__init__(config, call)
        batching = config["sequence_batching"]
        self._states = {state["input_name"]: state["output_name"] for state in batching["state"]}
        # Triton runs at most ``_most`` sequences at the same time. If more states are stored, the oldest
        # states belong to ended sequences. These oldest states are removed.
        slots = batching.get("oldest", {}).get("max_candidate_sequences", 0)
        self._most = max(1, int(slots), int(config["max_batch_size"]))
        self._kept: OrderedDict[Any, dict[str, Any]] = OrderedDict()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return one response for each request, in order. An error affects only its own request."""
        return [self._run_stateful(request) for request in requests]

    def _run_stateful(self, request: Any) -> Any:
        try:
            id_, flags = request.correlation_id(), request.flags()
            feed, names = self._feed(request), request.requested_output_names() or self.outputs
            if id_ and not flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
                feed |= self._state_of(id_)
            wanted = [*names, *(name for name in self._states.values() if name not in names)]
            found = dict(zip(wanted, self._call(feed, wanted)))  # noqa: B905
            if flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END:
                self._kept.pop(
                    id_, None
                )  # otherwise, this state could displace the state of a running sequence
            elif id_:  # a request without an id only fills an empty batch slot, and has no state
                self._keep(id_, {put: found[got] for put, got in self._states.items()})
            return response(names, [found[name] for name in names])
        except Exception as problem:
            return failure(problem)

    def _state_of(self, id_: Any) -> dict[str, Any]:
        """Return the state from the sequence's previous request. Raise RuntimeError if it was removed."""
        state = self._kept.get(id_)
        if state is None:
            raise RuntimeError(f"the state of sequence {id_} is gone: start the sequence again")
        return state

    def _keep(self, id_: Any, state: dict[str, Any]) -> None:
        self._kept[id_] = state
        self._kept.move_to_end(id_)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
