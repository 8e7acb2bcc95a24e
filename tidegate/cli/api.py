"""Calls to the control plane: registry, autoscaler and router.

With an API key, calls go through the gateway, from any machine. Without a key, they go directly to the
services, with the service token.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import orjson

from tidegate.client import contexts
from tidegate.client.errors import BadAnswer, Unreachable, from_answer
from tidegate.client.flow import Answer, Flow, Send, Sleep, Step, T, driven
from tidegate.kernel.errors import BadRequest, DeadlinePassed, NotFound, PreconditionFailed, TidegateError

if TYPE_CHECKING:
    import httpx

    from tidegate.kernel.settings.base import Settings

TIMEOUT_S = 15.0
HEALTH_TIMEOUT_S = 3.0
UPLOAD_TIMEOUT_S = 300.0
# A registration can take minutes: the registry reads the whole artifact, perhaps from an object store.
REGISTER_TIMEOUT_S = 300.0
REVISIONS = 5
MOST_ITEMS = 1_000  # the most items that one page of a list can have

Doc = dict[str, Any]


class Service:
    """One service of the control plane. Every failure raises a TidegateError; a 404 raises NotFound."""

    def __init__(self, name: str, url: str, token: str, transport: httpx.BaseTransport | None = None) -> None:
        self.name = name
        self.url = url.rstrip("/")
        self._token = token
        self._transport = transport

    @cached_property
    def _http(self) -> httpx.Client:
        import httpx

        from tidegate.client.http import options

        try:
            arguments = options(self.url, self._token)
        except ValueError as error:
            raise BadRequest(f"TIDEGATE_{self.name.upper()}_URL: {error}.") from None
        return httpx.Client(**arguments, timeout=TIMEOUT_S, transport=self._transport)

    def get(self, path: str, **query: Any) -> Any:
        """Send GET and return the answer's JSON. A query parameter whose value is None is not sent."""
        # Request JSON, because a job's result can also be binary.
        return self._send("GET", path, params=_given(query), headers={"Accept": "application/json"})

    def get_waiting(self, path: str, wait_s: float) -> Any:
        """Send GET. The gateway may wait up to ``wait_s`` seconds for a result before it answers."""
        headers = {"Prefer": f"wait={max(1, round(wait_s))}"}
        return self._send("GET", path, headers=headers, timeout=TIMEOUT_S + wait_s)

    def items(self, path: str, **query: Any) -> list[Doc]:
        """Send GET and return the ``items`` of the answer."""
        found: list[Doc] = self.get(path, **query)["items"]
        return found

    def pages(self, path: str, limit: int | None = None, **query: Any) -> list[Doc]:
        """Send GET for each page of a list, and return up to ``limit`` items; None means all."""
        found: list[Doc] = []
        cursor: str | None = None
        while limit is None or len(found) < limit:
            most = MOST_ITEMS if limit is None else min(limit - len(found), MOST_ITEMS)
            page = self.get(path, **query, limit=most, cursor=cursor)
            found += page["items"]
            if (cursor := page.get("next")) is None:
                break
        return found if limit is None else found[:limit]

    def put(self, path: str, body: Any) -> Any:
        """Send PUT with a JSON body."""
        return self._send("PUT", path, json=body)

    def revise(self, path: str, change: Callable[[Doc], Doc]) -> Doc:
        """Read an object, PUT it with the fields that ``change(object)`` returns, and return the answer.

        If ``change`` returns no fields, return the object without a PUT. If somebody else changes the object
        before the PUT, start again. Raise PreconditionFailed after five attempts.
        """
        for left in reversed(range(REVISIONS)):
            stored: Doc = self.get(path)
            if not (fields := change(stored)):
                break
            spec = {key: value for key, value in stored.items() if key not in ("name", "revision")}
            try:
                return self._put_if(path, spec | fields, stored.get("revision"))
            except PreconditionFailed:
                if not left:
                    raise
        return stored

    def _put_if(self, path: str, body: Doc, revision: Any) -> Doc:
        headers = {} if revision is None else {"If-Match": f'"{revision}"'}
        found: Doc = self._send("PUT", path, json=body, headers=headers)
        return found

    def post(self, path: str, body: Any, timeout: float = TIMEOUT_S) -> Any:
        """Send POST with a JSON body; ``timeout`` in seconds."""
        return self._send("POST", path, json=body, timeout=timeout)

    def patch(self, path: str, body: Any) -> Any:
        """Send PATCH with a JSON body."""
        return self._send("PATCH", path, json=body)

    def delete(self, path: str, **query: Any) -> Any:
        """Send DELETE. A query parameter whose value is None is not sent."""
        return self._send("DELETE", path, params=_given(query))

    def upload(self, path: str, chunks: Iterable[bytes], size: int, **query: Any) -> Any:
        """Send PUT with raw bytes, streamed."""
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        return self._send(
            "PUT", path, content=chunks, headers=headers, params=query, timeout=UPLOAD_TIMEOUT_S
        )

    def run(self, flow: Flow[T]) -> T:
        """Send the requests of ``flow`` to this service. Return the flow's result.

        A flow is a call of the Python client as a generator. It does no I/O itself.
        """
        return driven(flow, self._step)

    def _step(self, step: Step) -> Answer | None:
        from tidegate.client.http import answer_of

        if isinstance(step, Sleep):
            time.sleep(step.seconds)
            return None
        assert isinstance(step, Send), step
        arguments = {"headers": dict(step.headers), "content": step.content, "timeout": step.timeout_s}
        return answer_of(self._exchange(step.method, step.path, **arguments))

    def send_lines(self, path: str, chunks: Iterable[bytes], **query: Any) -> Any:
        """Send POST with a file of lines (JSONL), streamed. Omit query parameters whose value is None."""
        headers = {"Content-Type": "application/jsonl"}
        return self._send(
            "POST", path, content=chunks, headers=headers, params=_given(query), timeout=UPLOAD_TIMEOUT_S
        )

    def download(self, path: str, take: Callable[[bytes], object]) -> None:
        """Send GET and call ``take`` with each piece of the body. The body can have any size."""
        with self._failing(), self._http.stream("GET", path, timeout=UPLOAD_TIMEOUT_S) as response:
            if response.status_code >= 400:
                raise from_answer(response.status_code, response.headers, response.read())
            for piece in response.iter_bytes():
                take(piece)

    def exists(self, path: str) -> bool:
        """Send HEAD. Return True if the path exists, False for a 404.

        An answer to HEAD has no error message. So after any other error, send GET and raise the error of that
        answer.
        """
        try:
            self._send("HEAD", path)
        except NotFound:
            return False
        except TidegateError:
            self.download(path, lambda _: None)
        return True

    def health(self) -> tuple[int, Doc]:
        """Return status and body of ``/health/ready``; a 503 is a result here, not an error."""
        response = self._exchange("GET", "/health/ready", timeout=HEALTH_TIMEOUT_S)
        return response.status_code, _json(response, self)

    def _exchange(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        with self._failing():
            return self._http.request(method, path, **arguments)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Raise DeadlinePassed or Unreachable in place of httpx's errors in the ``with`` block."""
        import httpx

        try:
            yield
        except httpx.ReadTimeout:
            raise DeadlinePassed(
                f"The {self.name} at {self.url} did not answer in time. "
                f"Try again, or see its log: tidegate logs {self.name}"
            ) from None
        except httpx.HTTPError as error:
            raise unreachable(self.name, self.url) from error

    def _send(self, method: str, path: str, **arguments: Any) -> Any:
        response = self._exchange(method, path, **arguments)
        if response.status_code >= 400:
            raise from_answer(response.status_code, response.headers, response.content)
        return _json(response, self) if response.content else None


def _given(query: Doc) -> Doc:
    return {key: value for key, value in query.items() if value is not None}


def _json(response: httpx.Response, service: Service) -> Any:
    try:
        return orjson.loads(response.content)
    except orjson.JSONDecodeError:
        raise BadAnswer(
            f"{service.url} answered, but it is not Tidegate's {service.name}. Check "
            f"TIDEGATE_{service.name.upper()}_URL."
        ) from None


class Control:
    """The services of the control plane, at the addresses of the settings."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.registry = self._service("registry")
        self.autoscaler = self._service("autoscaler")
        self.router = self._service("router")
        self.gateway = Service("gateway", settings.gateway_url, token_of(settings))

    def _service(self, name: str) -> Service:
        key, token = self.settings.api_key, self.settings.service_token
        if key:
            return Service(name, f"{self.settings.gateway_url.rstrip('/')}/api/{name}", key)
        return Service(name, getattr(self.settings, f"{name}_url"), token)

    def deployment_of(self, name: str) -> str:
        """Return ``name`` if it is a deployment, or the name of the only target if it is an endpoint.

        Raise NotFound if ``name`` is neither. Raise BadRequest for an endpoint that does not have exactly one
        target. If the registry does not answer, return ``name``, because the autoscaler may still know a
        deployment of that name.
        """
        try:
            return self._deployment_of(name)
        except Unreachable:
            return name

    def _deployment_of(self, name: str) -> str:
        try:
            self.registry.get(f"/v1/deployments/{part(name)}")
            return name
        except NotFound:
            pass
        try:
            endpoint = self.registry.get(f"/v1/endpoints/{part(name)}")
        except NotFound:
            raise NotFound(
                f"There is neither a deployment nor an endpoint {name!r}. `tidegate status` lists them."
            ) from None
        targets = [target["deployment"] for target in endpoint["targets"]]
        if len(targets) != 1:
            raise BadRequest(
                f"Endpoint {name!r} has several deployments. Name one of them: {', '.join(targets)}."
            )
        return str(targets[0])


def control() -> Control:
    """Return the control plane at the addresses in the settings.

    Raise Unreachable if the settings have neither an API key nor a service token.
    """
    found = settings()
    if not token_of(found):
        raise no_stack(found)
    return Control(found)


def no_stack(found: Settings) -> Unreachable:
    """Return the error for a command that has no credential.

    The message names the reason. Either there is no key for the gateway in TIDEGATE_GATEWAY_URL, or no stack
    was started in TIDEGATE_STATE_DIR, or no stack was found.
    """
    if os.environ.get("TIDEGATE_GATEWAY_URL"):
        return Unreachable(
            f"No key for {found.gateway_url}. Set TIDEGATE_API_KEY, or use a context with a key."
        )
    if os.environ.get("TIDEGATE_STATE_DIR"):
        return Unreachable(f"No stack was started in {found.state_path}. Start it: tidegate up")
    return Unreachable(
        "No stack in this folder. Go to the folder of `make up`, or set TIDEGATE_STATE_DIR. "
        "For a stack elsewhere: tidegate context add NAME --url URL --key -"
    )


def token_of(settings: Settings) -> str:
    """Return the credential for the gateway: the key, else this machine's service token, else ""."""
    return settings.api_key or settings.service_token


chosen: ContextVar[str] = ContextVar("chosen", default="")
"""The context of the option `--context`."""


def settings() -> Settings:
    """Return the settings of the stack in use (see ``tidegate.client.contexts``).

    Raise BadRequest for a wrong setting, NotFound for an unknown context.
    """
    found = contexts.find(chosen.get(), os.environ, Path.cwd(), contexts.read())
    return settings_with(found.fields)


def settings_with(fields: dict[str, Any]) -> Settings:
    """Return the settings from the environment. ``fields`` override some of them.

    Raise BadRequest for a wrong setting.
    """
    from tidegate.kernel.settings.base import Settings
    from tidegate.kernel.settings.report import WRONG, problem_of

    try:
        made = Settings(**fields)
        _trust(made)
        return made
    except WRONG as error:
        from tidegate.kernel.settings import file as settings_file

        state = Path(fields.get("state_dir") or os.environ.get("TIDEGATE_STATE_DIR") or contexts.STATE)
        wrong = problem_of(error)
        named = [name for name in settings_file.read(state) if f"{name}:" in wrong]
        in_file = [name for name in named if not os.environ.get(name)]
        where = f" (from {state / settings_file.NAME}: {', '.join(in_file)})" if in_file else ""
        raise BadRequest(f"A setting is wrong: {wrong}{where}.") from None


def _trust(made: Settings) -> None:
    # The HTTP clients read the paths of trusted certificates from the environment, so put the paths there.
    for name in ("tls_cert", "tls_ca"):
        if value := getattr(made, name):
            os.environ.setdefault(f"TIDEGATE_{name.upper()}", str(value))


def unreachable(name: str, url: str) -> Unreachable:
    """Return the error for a service that does not answer. The message says what the user can do."""
    if urlsplit(url).hostname in {"localhost", "127.0.0.1", "::1"}:
        advice = "See what runs: tidegate status. Start the stack: tidegate up."
    else:
        advice = "Check the address (tidegate context list), and whether the stack runs there."
    return Unreachable(f"The {name} does not answer at {url}. {advice}")


def part(name: str) -> str:
    """Quote a name as one segment of a path."""
    return quote(name, safe="")
