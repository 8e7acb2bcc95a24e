"""Serve ``/``: facts about this gateway, as a page for browsers and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from services.gateway.application.access import Access
from services.gateway.application.catalogue import Catalogue
from services.gateway.domain import home
from tidegate.kernel.errors import NoRoutes, TidegateError
from tidegate.kernel.protocol.access import INFER
from tidegate.kernel.service import api_page
from tidegate.version import VERSION

_BODIES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "HTML if the `Accept` header contains `text/html`, else JSON.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/html": {}},
    }
}


def router(access: Access) -> APIRouter:
    """Return the FastAPI router of ``/``, which needs no credential."""
    routes = APIRouter(tags=["health"])

    @routes.head("/", response_class=Response, operation_id="is_there_a_server__head")
    @routes.get("/", response_class=Response, responses=_BODIES, operation_id="what_is_this__get")
    async def home_page(request: Request) -> Response:
        """Return what this service is, the models that the caller may use, and a command to run next."""
        document = _document(request, access)
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(_page(document), headers=api_page.HEADERS | {"Vary": "Accept"})
        body = orjson.dumps(document, option=orjson.OPT_INDENT_2)
        return Response(body, media_type="application/json", headers={"Vary": "Accept"})

    return routes


def _document(request: Request, access: Access) -> dict[str, Any]:
    catalogue: Catalogue = request.app.state.catalogue
    url = str(request.base_url).rstrip("/")
    try:
        principal = access.authenticate(dict(request.headers.raw))
        models = [entry for entry in catalogue.index() if principal.may(INFER, entry["name"])]
    except NoRoutes:
        return home.document(VERSION, url, [])
    except TidegateError as error:
        return home.document(VERSION, url, None, error.message)
    return home.document(VERSION, url, models)


def _page(document: Mapping[str, Any]) -> str:
    parts = [f"<p>{escape(document['description'])}</p>"]
    if "problem" in document:
        parts.append(f"<p>{escape(document['problem'])}</p>")
    elif not document["models"]:
        parts.append("<p>Nothing is deployed yet.</p>")
    else:
        rows = "".join(map(_row, document["models"]))
        parts.append(f"<h2>Models</h2><table><tr><th>model<th>version<th>state{rows}</table>")
    parts.append(
        f"<h2>Next</h2><p>{escape(document['next']['do'])}:</p><pre>{escape(document['next']['command'])}</pre>"
    )
    links = "".join(f"<li><a href={path}>{escape(name)}</a>" for name, path in document["links"].items())
    return api_page.frame(f"Tidegate {document['version']}", f"{''.join(parts)}<h2>More</h2><ul>{links}</ul>")


def _row(model: Mapping[str, Any]) -> str:
    state = model["state"].lower() + (f": {model['reason'].partition(chr(10))[0]}" if model["reason"] else "")
    return "<tr>" + "".join(f"<td>{escape(text)}" for text in (model["name"], model["version"], state))
