"""Answer Triton's requests with as few model calls as possible.

This file is copied beside each runtime's ``model.py``. Like the runtimes, it runs in the models' Python and
imports nothing from Tidegate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

Feed = dict[str, Any]
Call = Callable[[Feed, list[str]], list[Any]]
"""A function that gets the input arrays by name and the names of the requested outputs.

It returns the arrays of these outputs, in the same order.
"""


class Rows:
    """Run requests with the function ``call``. Inputs are copied only if several requests share a call."""

    def __init__(
        self,
        config: dict[str, Any],
        call: Call,
        error_response: Callable[[Exception], Any] | None = None,
        *,
        decode: bool = True,
    ) -> None:
        """Store the arguments.

        ``error_response`` turns an exception into a response. ``decode``: True if BYTES inputs become str.
        """
        tensors = config["input"]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        self._call = call
        self._error_response = error_response or failure
        self._batches = config["max_batch_size"] > 0 or parameter(config, "tidegate_rows") is not None
        texts = (tensor["name"] for tensor in tensors if tensor["data_type"] == "TYPE_STRING")
        self._texts = frozenset(texts if decode else ())

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return one response for each request, in order. An error affects only its own request."""
        if len(requests) == 1 or not self._batches:
            return [self._run_one(request) for request in requests]
        responses: list[Any] = [None] * len(requests)
        for members in self._callable_together(requests).values():
            self._run_together(requests, members, responses)
        return responses

    def _run_one(self, request: Any) -> Any:
        try:
            names = request.requested_output_names() or self.outputs
            return response(names, self._call(self._feed(request), names))
        except Exception as problem:
            return self._error_response(problem)

    def _callable_together(self, requests: list[Any]) -> dict[Any, list[int]]:
        """Group the requests that can share a call. Return the indices of each group's requests.

        The requests of a group name the same outputs, and have the same inputs with the same row shapes.
        """
        groups: dict[Any, list[int]] = {}
        for index, request in enumerate(requests):
            shapes = tuple((tensor.name(), tuple(tensor.shape()[1:])) for tensor in request.inputs())
            groups.setdefault((tuple(request.requested_output_names()), shapes), []).append(index)
        return groups

    def _run_together(self, requests: list[Any], members: list[int], responses: list[Any]) -> None:
        try:
            feeds = [self._feed(requests[index]) for index in members]
            names = requests[members[0]].requested_output_names() or self.outputs
            joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
            arrays = self._call(joined, names)
            ends = np.cumsum([len(next(iter(feed.values()))) for feed in feeds])
            parts = [np.split(array, ends[:-1]) for array in arrays]
            for place, index in enumerate(members):
                responses[index] = response(names, [part[place] for part in parts])
        except Exception:
            # One bad row makes the whole call fail, so run each request alone.
            for index in members:
                responses[index] = self._run_one(requests[index])

    def _feed(self, request: Any) -> Feed:
        feed = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        for name in self._texts & feed.keys():
            feed[name] = decoded(feed[name])
        return feed


def table(feed: Feed, order: list[str] | None = None) -> Any:
    """Return the only input, or one array with a column for each of several inputs.

    ``order``: the names of the columns, if the model knows them. Otherwise the inputs keep their order.
    """
    if len(feed) == 1:
        return next(iter(feed.values()))
    names = order if order is not None and set(order) == set(feed) else list(feed)
    return np.column_stack([feed[name].reshape(len(feed[name])) for name in names])


def response(names: list[str], arrays: list[Any]) -> Any:
    """Return a response with these arrays as its outputs."""
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in zip(names, arrays)])  # noqa: B905


def failure(problem: Exception, hidden: str = "", more: str = "") -> Any:
    """Return an error response with the exception's type and text, and then the text ``more``.

    ``hidden``, the path of the model's folder, is removed from the text.
    """
    text = f"{type(problem).__name__}: {problem}{more}"
    return pb_utils.InferenceResponse([], pb_utils.TritonError(text.replace(hidden, "") if hidden else text))


def decoded(texts: Any) -> Any:
    """Return an array of UTF-8 bytes as an array of str. Raise UnicodeDecodeError for other bytes."""
    flat = [text.decode() if isinstance(text, bytes) else text for text in texts.ravel()]
    return np.array(flat, dtype=object).reshape(texts.shape)


def parameter(config: dict[str, Any], key: str) -> str | None:
    """Return the value of a parameter in a model configuration; None if it is not set."""
    found = config.get("parameters", {}).get(key)
    return None if found is None else found["string_value"]


def numpy_type(datatype: str) -> Any:
    """Return the numpy type for a datatype in Triton's notation, such as ``TYPE_FP32``."""
    return pb_utils.triton_string_to_numpy(datatype)
