"""Render ``/docs``: the OpenAPI document as a page that needs no scripts and no other files."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from html import escape
from typing import Any

import orjson

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "summary{font-family:ui-monospace,monospace;cursor:pointer;padding:.2rem 0}"
    "b{display:inline-block;min-width:4.5rem}details>*:not(summary){margin-left:1.2rem}"
    "pre{background:#f4f4f4;color:#222;padding:.6rem;overflow:auto;font-size:.85rem}small{color:#777}"
    "th,td{text-align:left;padding:.1rem 1.5rem .1rem 0}"
)
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}


def page(document: Mapping[str, Any]) -> str:
    """Return the page of an OpenAPI document, grouped by tag."""
    groups: dict[str, list[str]] = {}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            tag = (operation.get("tags") or [""])[0]
            groups.setdefault(tag, []).append(_operation(method, path, operation))
    body = "".join(f"<h2>{escape(tag)}</h2>{''.join(parts)}" for tag, parts in groups.items())
    schemas = "".join(
        f"<details><summary>{escape(name)}</summary>{_code(schema)}</details>"
        for name, schema in document.get("components", {}).get("schemas", {}).items()
    )
    whole = f"<p>As a document: <a href=/openapi.json>/openapi.json</a></p>{body}<h2>Schemas</h2>{schemas}"
    return frame(f"{document['info']['title']} {document['info']['version']}", whole)


def frame(title: str, body: str) -> str:
    """Return an HTML page with ``title`` and with the HTML ``body``.

    The calling code must send the page with ``HEADERS``. These headers let the browser use the page's style.
    """
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>{body}</html>"
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    scopes = operation.get("x-tidegate-scopes", [])
    needs = f" <small>needs the scope {escape(' or '.join(scopes))}</small>" if scopes else ""
    parts = [f"<p>{escape(operation.get('description', ''))}</p>"]
    for parameter in operation.get("parameters", []):
        label = f"{parameter['in']} {parameter['name']}"
        parts.append(f"<p><code>{escape(label)}</code> {escape(parameter.get('description', ''))}</p>")
        parts.append(_code(parameter.get("schema", {})))
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<p>Body, <code>{escape(kind)}</code></p>{_code(content.get('schema', {}))}")
    for status, response in operation.get("responses", {}).items():
        parts.append(f"<p>{escape(str(status))}: {escape(response.get('description', ''))}</p>")
        if str(status).startswith("2"):
            parts += [_code(content.get("schema", {})) for content in response.get("content", {}).values()]
    summary = f"<b>{escape(method.upper())}</b> {escape(path)}{needs}"
    return f"<details><summary>{summary}</summary>{''.join(parts)}</details>"


def _code(schema: Any) -> str:
    return f"<pre>{escape(orjson.dumps(schema, option=orjson.OPT_INDENT_2).decode())}</pre>" if schema else ""
