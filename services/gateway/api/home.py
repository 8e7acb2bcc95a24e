"""``/``: a page for people who open the gateway's address, and the same as JSON."""

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
        "description": "As HTML if `Accept` names it.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/html": {}},
    }
}


def router(access: Access) -> APIRouter:
    """Return the router of the page. It is open to all, and shows each caller what that caller may use."""
    found = APIRouter(tags=["health"])

    @found.get("/", response_class=Response, responses=_BODIES)
    async def what_is_this(request: Request) -> Response:
        """Return what this is, the models that the caller may use, and the next command."""
        told = _told(request, access)
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(_page(told), headers=api_page.HEADERS | {"Vary": "Accept"})
        body = orjson.dumps(told, option=orjson.OPT_INDENT_2)
        return Response(body, media_type="application/json", headers={"Vary": "Accept"})

    return found


def _told(request: Request, access: Access) -> dict[str, Any]:
    catalogue: Catalogue = request.app.state.catalogue
    url = str(request.base_url).rstrip("/")
    try:
        who = access.authenticate(dict(request.headers.raw))
        models = [entry for entry in catalogue.index() if who.may(INFER, entry["name"])]
    except NoRoutes:
        return home.document(VERSION, url, [])
    except TidegateError as error:
        return home.document(VERSION, url, None, error.message)
    return home.document(VERSION, url, models)


def _page(told: Mapping[str, Any]) -> str:
    parts = [f"<p>{escape(told['description'])}</p>"]
    if "problem" in told:
        parts.append(f"<p>{escape(told['problem'])}</p>")
    elif not told["models"]:
        parts.append("<p>Nothing is deployed yet.</p>")
    else:
        rows = "".join(map(_row, told["models"]))
        parts.append(f"<h2>Models</h2><table><tr><th>model<th>version<th>state{rows}</table>")
    parts.append(
        f"<h2>Next</h2><p>{escape(told['next']['do'])}:</p><pre>{escape(told['next']['command'])}</pre>"
    )
    links = "".join(f"<li><a href={path}>{escape(name)}</a>" for name, path in told["links"].items())
    return api_page.frame(f"Tidegate {told['version']}", f"{''.join(parts)}<h2>More</h2><ul>{links}</ul>")


def _row(model: Mapping[str, Any]) -> str:
    state = model["state"].lower() + (f": {model['reason'].partition(chr(10))[0]}" if model["reason"] else "")
    return "<tr>" + "".join(f"<td>{escape(text)}" for text in (model["name"], model["version"], state))
