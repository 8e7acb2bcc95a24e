"""Find, describe and compare registered versions through a gateway, for both clients.

The caller's key needs the scopes of the registry's API (`docs/access.md`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import orjson

from tidegate.client.calls import Call
from tidegate.client.core import Core
from tidegate.client.flow import Flow
from tidegate.client.jobs import Document, document_of

MOST_ITEMS = 1_000  # the highest number of items in one page of a list


@dataclass(frozen=True, slots=True)
class CatalogueFlows:
    """Calls about registered versions. Each returns documents of the registry.

    A reference is ``NAME``, ``NAME@3`` or ``NAME@ALIAS``.
    """

    core: Core

    def pages(self, path: str, limit: int | None, query: Mapping[str, Any]) -> Flow[list[Document]]:
        """Return the first ``limit`` items of a list, or all items if ``limit`` is None.

        The list is read page by page.
        """
        found: list[Document] = []
        cursor: str | None = None
        while limit is None or len(found) < limit:
            most = MOST_ITEMS if limit is None else min(limit - len(found), MOST_ITEMS)
            page = yield from self.read(path, {**query, "limit": most, "cursor": cursor})
            found += page["items"]
            if (cursor := page.get("next")) is None:
                break
        return found if limit is None else found[:limit]

    def version(self, reference: str) -> Flow[Document]:
        """Return the version that a reference names."""
        model, _, version = reference.partition("@")
        return (yield from self.read(f"models/{_part(model)}/versions/{_part(version or 'latest')}", {}))

    def change(self, method: str, reference: str, what: str, body: Document | None) -> Flow[Document]:
        """Send a request about a version. Return the answer, or {} if the answer has no body.

        ``reference`` names the version, as in ``NAME@3``. ``what``: the end of the URL path, such as
        ``/card``.
        """
        found = yield from self.version(reference)
        path = f"models/{_part(found['model'])}/versions/{found['number']}{what}"
        return (yield from self.send(method, path, body))

    def read(self, path: str, query: Mapping[str, Any]) -> Flow[Document]:
        """Send a GET request, and return the JSON object of the answer.

        ``query``: the query values by name. Values of None are not sent.
        """
        given = urlencode({name: value for name, value in query.items() if value is not None})
        whole = f"/api/registry/v1/{path}" + (f"?{given}" if given else "")
        return document_of((yield from self.core.call("GET", whole, None)))

    def send(self, method: str, path: str, body: Document | None) -> Flow[Document]:
        """Send a change, and return the answer, or {} if it has no body."""
        answer = yield from self.core.caller.call(
            method,
            f"/api/registry/v1/{path}",
            timeout_s=self.core.timeout_s,
            headers={} if body is None else {"Content-Type": "application/json"},
            content=b"" if body is None else orjson.dumps(body),
        )
        return document_of(answer) if answer.body else {}


def _part(name: str) -> str:
    return quote(name, safe="")


class CatalogueCalls:
    """The calls about registered versions, for both clients. See `docs/catalogue.md`.

    A reference is ``NAME``, ``NAME@3`` or ``NAME@ALIAS``.
    """

    _catalogue: CatalogueFlows

    @Call
    def search_versions(
        self, filter: str = "", *, order_by: str | None = None, limit: int | None = None
    ) -> Flow[list[Document]]:
        """Return the versions of all models that match a filter, such as ``metrics.accuracy > 0.9``.

        ``order_by``: the field to sort by, then ``asc`` or ``desc``, as in ``metrics.accuracy desc``.
        ``limit``: return at most this many versions; None: all.
        """
        query = {"filter": filter, "order_by": order_by}
        return self._catalogue.pages("versions", limit, query)

    @Call
    def registered_models(self, name: str | None = None, *, filter: str = "") -> Flow[list[Document]]:
        """Return the models whose name contains ``name``, and that have a version that matches ``filter``."""
        return self._catalogue.pages("models", None, {"name": name, "filter": filter})

    @Call
    def deployments(self, model: str | None = None) -> Flow[list[Document]]:
        """Return the Deployments of all models, or of one model, sorted by name."""
        return self._catalogue.pages("deployments", None, {"model": model})

    @Call
    def endpoints(self) -> Flow[list[Document]]:
        """Return the Endpoints, sorted by name."""
        return self._catalogue.pages("endpoints", None, {})

    @Call
    def version(self, reference: str) -> Flow[Document]:
        """Return one version with its metadata."""
        return self._catalogue.version(reference)

    @Call
    def describe_version(self, reference: str, changes: Mapping[str, Any]) -> Flow[Document]:
        """Change a version's metadata. ``changes``: a JSON merge patch, as in ``{"tags": {"team": "a"}}``."""
        body = {"metadata_patch": dict(changes)}
        return self._catalogue.change("PATCH", reference, "", body)

    @Call
    def compare(self, a: str, b: str) -> Flow[Document]:
        """Compare two versions: metadata, metrics, signature, size and requirements."""
        return self._catalogue.read("compare", {"a": a, "b": b})

    @Call
    def card(self, reference: str) -> Flow[str]:
        """Return a version's model card. Raise NotFound if it has none."""
        found = yield from self._catalogue.version(reference)
        path = f"models/{_part(found['model'])}/versions/{found['number']}/card"
        return str((yield from self._catalogue.read(path, {}))["text"])

    @Call
    def lineage(self, reference: str) -> Flow[Document]:
        """Return the ``ancestors`` of a version, nearest first, and its ``children``."""
        return self._catalogue.change("GET", reference, "/lineage", None)

    @Call
    def set_card(self, reference: str, text: str | None) -> Flow[None]:
        """Set a version's model card, a Markdown text. None deletes it."""
        method, body = ("DELETE", None) if text is None else ("PUT", {"text": text})
        yield from self._catalogue.change(method, reference, "/card", body)

    @Call
    def aliases(self, model: str) -> Flow[dict[str, int]]:
        """Return the aliases of a model, and the version of each."""
        found = yield from self._catalogue.read(f"models/{_part(model)}/aliases", {})
        return {item["alias"]: item["version"] for item in found["items"]}

    @Call
    def set_alias(
        self, model: str, alias: str, version: int | None, *, expected: int | None = None
    ) -> Flow[None]:
        """Point an alias to a version, or delete the alias if ``version`` is None.

        ``expected``: the version to which the alias must point before the change. 0: the alias must not
        exist. None: no check. Raise Conflict if this condition is not met. A deletion ignores ``expected``.
        """
        path = f"models/{_part(model)}/aliases/{_part(alias)}"
        if version is None:
            yield from self._catalogue.send("DELETE", path, None)
        else:
            yield from self._catalogue.send("PUT", path, {"version": version, "expected": expected})

    @Call
    def alias_history(self, model: str, alias: str) -> Flow[list[Document]]:
        """Return the latest moves of an alias, newest first.

        Each has its time ``at``, its author ``by``, and the versions ``from_version`` and ``to_version``.
        """
        path = f"models/{_part(model)}/aliases/{_part(alias)}"
        return list((yield from self._catalogue.read(path, {}))["moves"])

    @Call
    def delete_version(self, model: str, version: int, *, permanent: bool = False) -> Flow[None]:
        """Delete a version. It can be restored for a while, unless ``permanent`` is True."""
        path = f"models/{_part(model)}/versions/{version}" + ("?permanent=true" if permanent else "")
        yield from self._catalogue.send("DELETE", path, None)

    @Call
    def restore_versions(self, model: str, version: int | None = None) -> Flow[list[int]]:
        """Restore a deleted version, or all deleted versions of a model. Return their numbers."""
        one = "" if version is None else f"/versions/{version}"
        found = yield from self._catalogue.send("POST", f"models/{_part(model)}{one}/restore", {})
        return list(found["versions"])

    @Call
    def set_retention(self, model: str, retention: Document | None) -> Flow[Document]:
        """Set a model's retention, and return the model's policy.

        ``retention``: the rule, as in ``{"keep_last": 10}``. None: all versions are kept.
        """
        path = f"models/{_part(model)}/policy"
        return self._catalogue.send("PATCH", path, {"retention": retention})

    @Call
    def retention(
        self, model: str, *, keep_last: int | None = None, max_age_days: float | None = None,
        sleeping: bool = False, dry_run: bool = True,
    ) -> Flow[list[Document]]:  # fmt: skip
        """Return for each version whether the retention keeps it.

        If ``dry_run`` is False, delete the versions that it does not keep.

        ``keep_last``: the number of newest versions that are always kept. ``max_age_days``: only versions
        that are older than this are deleted. If neither is given, the model's own retention applies, and
        ``sleeping`` is ignored.

        ``sleeping`` True: a Deployment that sleeps does not keep its version if no Endpoint names the
        Deployment.
        """
        limits = {"keep_last": keep_last, "max_age_days": max_age_days, "sleeping": sleeping}
        given = keep_last is not None or max_age_days is not None
        path = f"models/{_part(model)}/retention" + ("?dry_run=true" if dry_run else "")
        found = yield from self._catalogue.send("POST", path, {"retention": limits} if given else {})
        return list(found["items"])

    @Call
    def stage(self, reference: str) -> Flow[Document]:
        """Return a version's ``stage``, its ``approvals``, and its ``next`` stage.

        ``missing`` has the checks and approvals that the next stage still needs.
        """
        return self._catalogue.change("GET", reference, "/stage", None)

    @Call
    def set_stage(self, reference: str, stage: str | None) -> Flow[Document]:
        """Move a version to a stage (None: no stage). Raise Conflict if a check or an approval is missing."""
        return self._catalogue.change("PUT", reference, "/stage", {"stage": stage or "none"})

    @Call
    def approve(self, reference: str, stage: str, *, comment: str = "") -> Flow[Document]:
        """Approve a version for a stage. The owner of the client's key is recorded as the approver."""
        body = {"stage": stage, "comment": comment}
        return self._catalogue.change("POST", reference, "/approvals", body)

    @Call
    def set_stages(
        self, model: str, stages: list[Document] | None, *, serve_from: str | None = None
    ) -> Flow[Document]:
        """Set a model's stages, and return its policy. If ``stages`` is None, remove the stages.

        ``serve_from``: only versions in this stage or a later one may serve; None: all versions may serve.
        """
        body = {"stages": stages, "serve_from": serve_from}
        return self._catalogue.send("PATCH", f"models/{_part(model)}/policy", body)
