"""Allow calls from web pages of the origins in ``TIDEGATE_CORS_ORIGINS`` (CORS).

The middleware answers preflight requests, which carry no credential. Inference calls do not pass through the
middleware, so :class:`CrossOriginHandler` handles them. If ``TIDEGATE_CORS_ORIGINS`` is not set, the code of
this module does not run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware

from services.gateway.api.body_limits import Headers
from services.gateway.api.compression import HttpResponse
from services.gateway.api.inference.handler import InferenceHandler
from services.gateway.api.inference.request_target import Target
from services.gateway.application.inference.core import InferenceCore
from services.gateway.domain.cors import EXPOSED, Origins
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.http.heads import without_page
from tidegate.kernel.protocol.envelope import Buffer

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def allow(app: Starlette, origins: Origins) -> None:
    """Let pages of these origins read the responses of ``app``. The pages still need credentials."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins.names,
        allow_methods=METHODS,
        allow_headers=["*"],
        allow_private_network=True,
        expose_headers=EXPOSED,
    )


class CrossOriginHandler(InferenceHandler):
    """A handler for inference calls that also accepts calls from web pages of ``origins``."""

    def __init__(self, origins: Origins, core: InferenceCore, **parts: Any) -> None:
        super().__init__(core, **parts)
        self.origins = origins

    def check_headers(self, headers: Headers) -> TidegateError | None:
        """Return the error if a request must be refused because of its headers, else None."""
        return super().check_headers(without_page(headers, self.origins))

    def begin(
        self,
        target: Target,
        headers: Headers,
        body: Buffer,
        done: Callable[[HttpResponse], None],
        started: float | None = None,
    ) -> bytes | None:
        """Start the call.

        If a page of ``origins`` makes the call, the headers of the response allow the page to read the
        response.
        """
        origin = headers.get(b"origin")
        if origin is None or origin not in self.origins:
            return super().begin(target, headers, body, done, started)

        def marked(response: HttpResponse) -> None:
            response.headers.extend(self.origins.headers(origin))
            done(response)

        return super().begin(target, without_page(headers, self.origins), body, marked, started)

    def refuse(self, target: Target, headers: Headers, error: TidegateError) -> HttpResponse:
        """Return the response to a request that is refused before its body is complete."""
        response = super().refuse(target, headers, error)
        origin = headers.get(b"origin")
        if origin is not None and origin in self.origins:
            response.headers.extend(self.origins.headers(origin))
        return response
