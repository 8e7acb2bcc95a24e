"""The flows (:mod:`tidegate.client.flow`) of the SDK's calls, for both clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

import orjson

from tidegate.client import streams
from tidegate.client.casting import fit
from tidegate.client.codec import HEAD_LENGTH, Tensor, encode_request
from tidegate.client.errors import BadAnswer, Unreachable
from tidegate.client.flow import Alone, Answer, Caller, Flow, Sleep, T
from tidegate.client.result import InferResult, read_result
from tidegate.client.streams import Opened
from tidegate.kernel.errors import BadRequest, DeadlinePassed, NotFound, TidegateError, Unavailable

METADATA_TTL_S = 60.0
POLL_S = 0.25
NOT_READY = "the model is not ready"
NOT_KNOWN_YET = "not_known_yet"

Metadata = dict[str, Any]
Version = int | str | None


@dataclass(slots=True)
class Core:
    """The flows of ``infer``, ``stream`` and other basic calls. Other modules' flows use this class.

    A model's metadata is cached for a minute. If a request fails because it does not fit the model, the
    metadata is read again.
    """

    timeout_s: float
    caller: Caller
    _known: dict[str, tuple[float, Metadata]] = field(default_factory=dict)

    def infer(
        self,
        model: str,
        inputs: Any,
        *,
        version: Version,
        outputs: Sequence[str] | None,
        timeout_s: float | None,
        request_id: str | None,
        parameters: Mapping[str, Any] | None,
    ) -> Flow[InferResult]:
        """Run one inference. If it fails and the model's inputs have changed, run it once more.

        The request is also sent again after a broken connection, and after a 429 or 503. But if it belongs to
        a sequence, it is not sent again after a broken connection.
        """
        path = _path(model, version)

        def attempt(metadata: Metadata, left: float) -> Flow[InferResult]:
            body, head = encode_request(
                arrange(model, inputs, metadata),
                outputs=outputs,
                request_id=request_id,
                parameters=parameters,
            )
            headers = {HEAD_LENGTH: str(head), "Content-Type": "application/octet-stream"}
            if request_id is not None:
                headers["X-Request-Id"] = request_id
            answer = yield from self.caller.call(
                "POST",
                f"{path}/infer",
                timeout_s=left,
                headers=headers,
                content=body,
                repeatable=_may_repeat(parameters),
            )
            return read_result(answer)

        return (yield from self.fitting(model, version, inputs, timeout_s, attempt))

    def stream(
        self,
        model: str,
        inputs: Any,
        *,
        version: Version,
        timeout_s: float | None,
        request_id: str | None,
        parameters: Mapping[str, Any] | None,
    ) -> Flow[Opened]:
        """Start a stream of answers and return it. Its events are not read yet."""
        path = _path(model, version)
        limit = self.timeout_s if timeout_s is None else timeout_s

        def attempt(metadata: Metadata, left: float) -> Flow[Opened]:
            body = streams.encode(arrange(model, inputs, metadata), request_id, parameters)
            headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
            if request_id is not None:
                headers["X-Request-Id"] = request_id
            answer = yield from self.caller.call(
                "POST",
                f"{path}/generate_stream",
                timeout_s=left,
                headers=headers,
                content=body,
                stream=True,
                repeatable=_may_repeat(parameters),
            )
            return Opened(answer, metadata)

        return (yield from self.fitting(model, version, inputs, limit, attempt))

    def fitting(
        self,
        model: str,
        version: Version,
        inputs: Any,
        timeout_s: float | None,
        attempt: Callable[[Metadata, float], Flow[T]],
    ) -> Flow[T]:
        """Run ``attempt`` with the model's metadata and the seconds until the timeout.

        If it fails with cached metadata, read the metadata again. If the model's inputs have changed, repeat
        ``attempt`` once.
        """
        path = _path(model, version)
        deadline = self.caller.clock() + (self.timeout_s if timeout_s is None else timeout_s)
        known = self._fresh(path)
        metadata = known or (yield from self._expected(path, inputs, deadline))
        try:
            return (yield from attempt(metadata, self._left(deadline)))
        except (BadRequest, NotFound, TypeError):
            if known is None:
                raise
            self._known.pop(path, None)
            try:
                metadata = yield from self._fetch(path, self._left(deadline), NOT_KNOWN_YET)
            except Unavailable:
                metadata = known  # the metadata cannot be read again, so the first error is raised below
            if metadata.get("inputs") == known.get("inputs"):
                raise
        return (yield from attempt(metadata, self._left(deadline)))

    def metadata(self, model: str, *, version: Version, timeout_s: float | None) -> Flow[Metadata]:
        """Fetch the model's metadata."""
        return (yield from self._fetch(_path(model, version), timeout_s))

    def models(self, *, timeout_s: float | None) -> Flow[list[Metadata]]:
        """Fetch the list of models that can be called."""
        answer = yield from self.call("POST", "/v2/repository/index", timeout_s, content=b"{}")
        found = _json(answer)
        if not isinstance(found, list):
            raise BadAnswer("The answer is not a list of models; is this the URL of a Tidegate gateway?")
        return found

    def costs(
        self,
        by: str,
        since: float | None,
        until: float | None,
        deployment: str | None,
        timeout_s: float | None,
    ) -> Flow[dict[str, Any]]:
        """Fetch the report of costs."""
        query = {"by": by, "since": since, "until": until, "deployment": deployment}
        given = urlencode({name: value for name, value in query.items() if value is not None})
        answer = yield from self.call("GET", f"/api/autoscaler/v1/costs?{given}", timeout_s)
        found = _json(answer)
        if not isinstance(found, dict):
            raise BadAnswer("The answer is not a report of costs; is this the URL of a Tidegate gateway?")
        return found

    def is_ready(self, model: str, *, version: Version, timeout_s: float | None) -> Flow[bool]:
        """Return True if the model accepts requests, False if it accepts none or is unknown."""
        return not (yield from self._why_not_ready(model, version, timeout_s))

    def _why_not_ready(self, model: str, version: Version, timeout_s: float | None) -> Flow[str]:
        """Return the reason why the model accepts no requests. Return an empty text if it accepts them."""
        try:
            yield from self.call("GET", f"{_path(model, version)}/ready", timeout_s)
        except Unreachable:
            raise
        except (BadRequest, NotFound, Unavailable) as error:
            return error.message or NOT_READY
        except TidegateError as error:
            if error.reason in {"no_capacity", "no_routes", "overloaded"}:
                return error.message or NOT_READY
            raise
        return ""

    def wait_ready(self, model: str, *, version: Version, timeout_s: float) -> Flow[None]:
        """Wait until the model is ready. Raise DeadlinePassed after ``timeout_s`` seconds."""
        deadline = self.caller.clock() + timeout_s
        last = NOT_READY
        while (left := deadline - self.caller.clock()) > 0:
            try:
                if not (why := (yield from self._why_not_ready(model, version, left))):
                    return
                last = why
            except Unreachable as error:
                last = error.message
            yield Sleep(min(POLL_S, left))
        raise DeadlinePassed(f"Not ready after {timeout_s:g} s: {last.rstrip('.')}.")

    def _left(self, deadline: float) -> float:
        left = deadline - self.caller.clock()
        if left <= 0:
            raise DeadlinePassed("The timeout passed before the request was sent.")
        return left

    def _fresh(self, path: str) -> Metadata | None:
        at, metadata = self._known.get(path, (0.0, {}))
        return metadata if metadata and self.caller.clock() - at < METADATA_TTL_S else None

    def _fetch(self, path: str, timeout_s: float | None, at_once: str = "") -> Flow[Metadata]:
        metadata = _json((yield from self.call("GET", path, timeout_s, at_once=at_once)))
        if not isinstance(metadata, dict):
            raise BadAnswer("The answer is not a model's metadata; is this the URL of a Tidegate gateway?")
        self._known[path] = (self.caller.clock(), metadata)
        return metadata

    def _expected(self, path: str, inputs: Any, deadline: float) -> Flow[Metadata]:
        """Return the model's metadata. If the gateway does not have it yet, return {} or wait.

        If ``inputs`` has names, return {}, because then an inference request needs no metadata. If ``inputs``
        is one array without a name, wait until the gateway has the metadata, because the metadata contains
        the name. The call that reads the metadata also starts the model.
        """

        def unless_known() -> Flow[Metadata]:
            return self._fresh(path) or (yield from self._fetch(path, self._left(deadline), NOT_KNOWN_YET))

        last: Unavailable | None = None
        while True:
            try:
                metadata: Metadata = yield Alone(unless_known())
            except DeadlinePassed:
                # The timeout passed before the next poll. Raise the last error, because it has the reason.
                raise last or DeadlinePassed("The timeout passed before the request was sent.") from None
            except Unavailable as error:
                last = error
                if error.reason != NOT_KNOWN_YET:
                    raise
                if isinstance(inputs, Mapping):
                    return {}
                pause = error.retry_after_s or POLL_S
                if self.caller.clock() + pause >= deadline:
                    raise
                yield Sleep(pause)
            else:
                return metadata

    def call(
        self, method: str, path: str, timeout_s: float | None, content: bytes = b"", at_once: str = ""
    ) -> Flow[Answer]:
        """Send one call and return its answer. ``timeout_s`` None means the client's timeout.

        ``at_once``: an error with this reason is raised without a retry.
        """
        limit = self.timeout_s if timeout_s is None else timeout_s
        return (yield from self.caller.call(method, path, timeout_s=limit, content=content, at_once=at_once))


def _may_repeat(parameters: Mapping[str, Any] | None) -> bool:
    """Return True if a request may be sent twice.

    A request of a sequence may not be sent twice, because a second copy would change the model's state again.
    """
    return not (parameters or {}).get("sequence_id")


def arrange(model: str, inputs: Any, metadata: Metadata) -> list[Tensor]:
    """Return the tensors to send. ``inputs`` has arrays by name, or is one array if the model has one input.

    A scalar becomes an array of one element if the model's input has one axis of size 1 or -1. Raise
    TypeError if an array does not fit, or if the model has several inputs and only one array is given.
    """
    specs = {spec["name"]: spec for spec in metadata.get("inputs") or []}
    datatypes = {name: spec["datatype"] for name, spec in specs.items()}
    if not isinstance(inputs, Mapping):
        if len(datatypes) != 1:
            wanted = f"the inputs {', '.join(datatypes)}" if datatypes else "undeclared inputs"
            raise TypeError(f"{model} has {wanted}; pass a dict of arrays by input name")
        inputs = {next(iter(datatypes)): inputs}
    tensors = []
    for name, value in inputs.items():
        array, datatype = fit(name, value, datatypes.get(name))
        if array.ndim == 0 and name in specs and specs[name].get("shape") in ([1], [-1]):
            array = array.reshape(1)
        tensors.append(Tensor(name, datatype, array))
    return tensors


def _path(model: str, version: Version) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return path if version is None else f"{path}/versions/{quote(str(version), safe='')}"


def _json(answer: Answer) -> Any:
    try:
        return orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        raise BadAnswer("The answer is not JSON; is this the URL of a Tidegate gateway?") from None
