"""Send requests to an upstream with the Open Inference Protocol, over one connection."""

from __future__ import annotations

import http.client
import json
import ssl
import struct
from typing import Any
from urllib.parse import urlsplit

import numpy as np

DATATYPES = {
    "BOOL": np.bool_, "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "FP16": np.float16, "FP32": np.float32, "FP64": np.float64, "BYTES": np.object_,
}  # fmt: skip
NAMES = {np.dtype(kind): name for name, kind in DATATYPES.items()}
# The most bytes of an error's body that are shown to the caller.
MOST_BODY = 300


class UpstreamUnavailable(Exception):
    """The upstream cannot answer now. The worker and the gateway recognize this error by its name."""


class UpstreamRefused(Exception):
    """The upstream refused the request, or its answer is too long."""


class Upstream:
    """A model at an upstream, and the connection to that upstream.

    If the upstream has closed the connection, the request is sent once more, over a new connection.
    """

    def __init__(self, plan: dict[str, Any], credential: str) -> None:
        target = urlsplit(plan["address"])
        self.host = target.hostname or ""
        self._path = target.path.rstrip("/") + "/infer"
        self._binary, self._timeout_s = plan["binary"], plan["timeout_s"]
        self._most_bytes: int = plan["answer_bytes"]
        self._secure, self._port = target.scheme == "https", target.port
        header = plan.get("credential_header")
        sent = {header: credential} if header else {"Authorization": f"Bearer {credential}"}
        self._headers = sent if credential else {}
        self._credential = credential
        self._connection: http.client.HTTPConnection | None = None

    def infer(self, inputs: list[tuple[str, Any]], outputs: list[str]) -> dict[str, Any]:
        """Return the output arrays by name.

        Raise UpstreamUnavailable if the upstream does not answer, refuses the credential or sends a malformed
        answer, or if the status is 429, 3xx or 5xx. Raise UpstreamRefused for any other error status, and for
        an answer that is too long.
        """
        body, headers = self._request(inputs, outputs)
        status, found, raw = self._send(body, headers)
        if status in (401, 403):
            raise UpstreamUnavailable(
                f"{self.host} refused the credential of this Deployment (status {status})"
            )
        # Do not follow a redirect, because the credential would be sent to another address.
        if status == 429 or status >= 500 or 300 <= status < 400:
            raise UpstreamUnavailable(f"{self.host} answered {status}: {self._shown(raw)}")
        if status != 200:
            raise UpstreamRefused(f"{self.host} answered {status}: {self._shown(raw)}")
        try:
            return read_answer(raw, found.get("Inference-Header-Content-Length"))
        except (ValueError, KeyError, TypeError, struct.error) as problem:
            raise UpstreamUnavailable(
                f"{self.host} sent an answer that breaks the Open Inference Protocol: {problem}"
            ) from None

    def _request(self, inputs: list[tuple[str, Any]], outputs: list[str]) -> tuple[bytes, dict[str, str]]:
        tensors, tail = [], []
        for name, array in inputs:
            tensor = {"name": name, "shape": list(array.shape), "datatype": NAMES[np.dtype(array.dtype)]}
            if self._binary:
                raw = packed(array)
                tensor["parameters"] = {"binary_data_size": len(raw)}
                tail.append(raw)
            else:
                tensor["data"] = plain(array)
            tensors.append(tensor)
        asked = [
            {"name": name, "parameters": {"binary_data": True}} if self._binary else {"name": name}
            for name in outputs
        ]
        head = json.dumps({"inputs": tensors, "outputs": asked}).encode()
        if not self._binary:
            return head, {"Content-Type": "application/json"}
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(head)),
        }
        return b"".join((head, *tail)), headers

    def _send(self, body: bytes, headers: dict[str, str]) -> tuple[int, Any, bytes]:
        for fresh in (False, True):
            connection = self._open(fresh=fresh)
            was_used = connection.sock is not None
            try:
                connection.request("POST", self._path, body, {**self._headers, **headers})
                answer = connection.getresponse()
                return answer.status, answer.headers, self._read(answer)
            except (OSError, http.client.HTTPException) as problem:
                self.close()
                # A server may close an idle connection at any time. Then it has not processed the request, so
                # the request is sent again.
                closed = isinstance(
                    problem, http.client.RemoteDisconnected | ConnectionResetError | BrokenPipeError
                )
                if not (closed and was_used):
                    raise UpstreamUnavailable(f"{self.host} does not answer: {problem!r}") from None
        raise UpstreamUnavailable(f"{self.host} closes its connections")

    def _read(self, answer: http.client.HTTPResponse) -> bytes:
        """Return the body of an answer. Raise UpstreamRefused if it is too long for this worker's memory."""
        if (answer.length or 0) <= self._most_bytes:
            body = answer.read(self._most_bytes + 1)
            if len(body) <= self._most_bytes:
                return body
        self.close()  # the rest of the answer is unread, so the connection cannot be used again
        raise UpstreamRefused(
            f"{self.host} sent an answer of more than {self._most_bytes} bytes. Send fewer rows in a "
            "request, request fewer outputs, or raise the worker's TIDEGATE_MAX_FETCHED_BYTES"
        )

    def _open(self, *, fresh: bool) -> http.client.HTTPConnection:
        if fresh:
            self.close()
        if self._connection is None:
            if self._secure:
                context = ssl.create_default_context()
                self._connection = http.client.HTTPSConnection(
                    self.host, self._port, timeout=self._timeout_s, context=context
                )
            else:
                self._connection = http.client.HTTPConnection(self.host, self._port, timeout=self._timeout_s)
        return self._connection

    def close(self) -> None:
        """Close the connection; the next request opens another one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _shown(self, raw: bytes) -> str:
        text = raw[:MOST_BODY].decode(errors="replace").strip()
        return text.replace(self._credential, "[hidden]") if self._credential else text


def packed(array: Any) -> bytes:
    """Return the raw bytes of an array. Each string is preceded by its length."""
    if array.dtype != np.object_:
        raw: bytes = np.ascontiguousarray(array).tobytes()
        return raw
    texts = [text if isinstance(text, bytes) else str(text).encode() for text in array.ravel()]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def plain(array: Any) -> list[Any]:
    """Return the values of an array for JSON, as a flat list."""
    values: list[Any] = array.ravel().tolist()
    return [value.decode() if isinstance(value, bytes) else value for value in values]


def read_answer(raw: bytes, head_length: str | None) -> dict[str, Any]:
    """Return the arrays of an answer by name.

    Raise ValueError, KeyError, TypeError or struct.error if the answer is malformed.
    """
    at = len(raw) if head_length is None else int(head_length)
    found = {}
    for output in json.loads(raw[:at])["outputs"]:
        kind, shape = DATATYPES[output["datatype"]], output["shape"]
        size = (output.get("parameters") or {}).get("binary_data_size")
        if size is not None:
            array = unpacked(raw[at : at + size], kind)
            at += size
        elif kind is np.object_:
            array = np.array([str(text).encode() for text in np.ravel(output["data"])], dtype=np.object_)
        else:
            array = np.array(output["data"], dtype=kind)
        found[output["name"]] = array.reshape(shape)
    return found


def unpacked(raw: bytes, kind: Any) -> Any:
    """Return the flat array of type ``kind`` that ``raw`` contains."""
    if kind is not np.object_:
        return np.frombuffer(raw, kind)
    texts, at = [], 0
    while at < len(raw):
        (size,) = struct.unpack_from("<I", raw, at)
        texts.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    return np.array(texts, dtype=np.object_)
