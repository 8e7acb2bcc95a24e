"""Find, describe and compare registered versions through a gateway: shared by both clients.

The caller's key needs the scope that the registry's routes need (`docs/access.md`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import orjson

from tidegate.client.core import Core
from tidegate.client.flow import Flow, T
from tidegate.client.jobs import Document, document_of

MOST_ITEMS = 1_000  # the largest page of a list


@dataclass(frozen=True, slots=True)
class CatalogueFlows:
    """The calls. Each returns documents of the registry. A reference is ``NAME``, ``NAME@3`` or an alias."""

    core: Core

    def pages(self, path: str, limit: int | None, query: Mapping[str, Any]) -> Flow[list[Document]]:
        """Return up to ``limit`` items of a list, page by page; None: all."""
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
        """Send a change of the version that a reference names, and return the answer; {} without a body."""
        found = yield from self.version(reference)
        path = f"models/{_part(found['model'])}/versions/{found['number']}{what}"
        return (yield from self.send(method, path, body))

    def card(self, reference: str) -> Flow[str]:
        """Return the card of the version that a reference names."""
        found = yield from self.version(reference)
        path = f"models/{_part(found['model'])}/versions/{found['number']}/card"
        return str((yield from self.read(path, {}))["text"])

    def set_alias(self, model: str, alias: str, version: int | None, expected: int | None) -> Flow[Document]:
        """Point an alias to a version; None deletes it."""
        path = f"models/{_part(model)}/aliases/{_part(alias)}"
        if version is None:
            return (yield from self.send("DELETE", path, None))
        return (yield from self.send("PUT", path, {"version": version, "expected": expected}))

    def delete_version(self, model: str, version: int, permanent: bool) -> Flow[Document]:
        """Delete a version."""
        query = "?permanent=true" if permanent else ""
        return (yield from self.send("DELETE", f"models/{_part(model)}/versions/{version}{query}", None))

    def restore(self, model: str, version: int | None) -> Flow[list[int]]:
        """Restore a version; None: all deleted versions of a model."""
        one = "" if version is None else f"/versions/{version}"
        found = yield from self.send("POST", f"models/{_part(model)}{one}/restore", {})
        return list(found["versions"])

    def retention(
        self, model: str, keep_last: int | None, max_age_days: float | None, sleeping: bool, dry_run: bool
    ) -> Flow[list[Document]]:
        """Return the fate of each version, by the limits given; without limits by the model's policy."""
        limits = {"keep_last": keep_last, "max_age_days": max_age_days, "sleeping": sleeping}
        given = keep_last is not None or max_age_days is not None
        path = f"models/{_part(model)}/retention" + ("?dry_run=true" if dry_run else "")
        found = yield from self.send("POST", path, {"retention": limits} if given else {})
        return list(found["items"])

    def read(self, path: str, query: Mapping[str, Any]) -> Flow[Document]:
        """Send GET; query values of None are left out."""
        given = urlencode({name: value for name, value in query.items() if value is not None})
        whole = f"/api/registry/v1/{path}" + (f"?{given}" if given else "")
        return document_of((yield from self.core.call("GET", whole, None)))

    def send(self, method: str, path: str, body: Document | None) -> Flow[Document]:
        """Send a change, and return the answer; {} if it has no body."""
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
    """The blocking calls. A reference is ``NAME``, ``NAME@3`` or ``NAME@ALIAS``. See `docs/catalogue.md`."""

    _catalogue: CatalogueFlows

    @abstractmethod
    def _run(self, flow: Flow[T]) -> T: ...

    def search_versions(
        self, filter: str = "", *, order_by: str | None = None, limit: int | None = None
    ) -> list[Document]:
        """Return the versions of all models that match a filter, such as ``metrics.accuracy > 0.9``.

        ``order_by``: a name and ``asc`` or ``desc``. ``limit``: the most versions; None: all.
        """
        query = {"filter": filter, "order_by": order_by}
        return self._run(self._catalogue.pages("versions", limit, query))

    def registered_models(self, name: str | None = None, *, filter: str = "") -> list[Document]:
        """Return the models with ``name`` in their name, and with a version that matches the filter."""
        return self._run(self._catalogue.pages("models", None, {"name": name, "filter": filter}))

    def version(self, reference: str) -> Document:
        """Return one version with its metadata."""
        return self._run(self._catalogue.version(reference))

    def describe_version(self, reference: str, changes: Mapping[str, Any]) -> Document:
        """Change metadata by a JSON merge patch: ``{"tags": {"team": "a"}, "owner": None}``."""
        body = {"metadata_patch": dict(changes)}
        return self._run(self._catalogue.change("PATCH", reference, "", body))

    def compare(self, a: str, b: str) -> Document:
        """Compare two versions: metadata, metrics, signature, size and requirements."""
        return self._run(self._catalogue.read("compare", {"a": a, "b": b}))

    def card(self, reference: str) -> str:
        """Return a version's model card. Raise NotFound if it has none."""
        return self._run(self._catalogue.card(reference))

    def lineage(self, reference: str) -> Document:
        """Return the ``ancestors`` of a version, nearest first, and its ``children``."""
        return self._run(self._catalogue.change("GET", reference, "/lineage", None))

    def set_card(self, reference: str, text: str | None) -> None:
        """Set a version's model card, a Markdown text. None deletes it."""
        method, body = ("DELETE", None) if text is None else ("PUT", {"text": text})
        self._run(self._catalogue.change(method, reference, "/card", body))

    def aliases(self, model: str) -> dict[str, int]:
        """Return the aliases of a model, and the version of each."""
        found = self._run(self._catalogue.read(f"models/{_part(model)}/aliases", {}))
        return {item["alias"]: item["version"] for item in found["items"]}

    def set_alias(self, model: str, alias: str, version: int | None, *, expected: int | None = None) -> None:
        """Point an alias to a version, at once; None deletes it.

        ``expected``: raise Conflict unless it points to this version now; 0: unless it does not exist.
        """
        self._run(self._catalogue.set_alias(model, alias, version, expected))

    def alias_history(self, model: str, alias: str) -> list[Document]:
        """Return the latest moves of an alias, newest first: ``at``, ``by`` and both versions."""
        path = f"models/{_part(model)}/aliases/{_part(alias)}"
        moves: list[Document] = self._run(self._catalogue.read(path, {}))["moves"]
        return moves

    def delete_version(self, model: str, version: int, *, permanent: bool = False) -> None:
        """Delete a version. It can be restored for a while, unless ``permanent`` is set."""
        self._run(self._catalogue.delete_version(model, version, permanent))

    def restore_versions(self, model: str, version: int | None = None) -> list[int]:
        """Restore a deleted version, or all deleted versions of a model. Return their numbers."""
        return self._run(self._catalogue.restore(model, version))

    def set_retention(self, model: str, retention: Document | None) -> Document:
        """Set how many versions of a model are kept: ``{"keep_last": 10}``; None: all. Return the policy."""
        path = f"models/{_part(model)}/policy"
        return self._run(self._catalogue.send("PATCH", path, {"retention": retention}))

    def retention(
        self, model: str, *, keep_last: int | None = None, max_age_days: float | None = None,
        sleeping: bool = False, dry_run: bool = True,
    ) -> list[Document]:  # fmt: skip
        """Return the fate of each version. With limits: by these. ``dry_run`` False: delete them now."""
        return self._run(self._catalogue.retention(model, keep_last, max_age_days, sleeping, dry_run))

    def stage(self, reference: str) -> Document:
        """Return a version's ``stage``, its ``approvals``, and what is ``missing`` for the ``next`` stage."""
        return self._run(self._catalogue.change("GET", reference, "/stage", None))

    def set_stage(self, reference: str, stage: str | None) -> Document:
        """Move a version to a stage; None: to no stage. Raise Conflict, with what the version lacks."""
        return self._run(self._catalogue.change("PUT", reference, "/stage", {"stage": stage or "none"}))

    def approve(self, reference: str, stage: str, *, comment: str = "") -> Document:
        """Approve a version for a stage, with the client's key."""
        body = {"stage": stage, "comment": comment}
        return self._run(self._catalogue.change("POST", reference, "/approvals", body))

    def set_stages(
        self, model: str, stages: list[Document] | None, *, serve_from: str | None = None
    ) -> Document:
        """Set a model's stages, and the first one that may serve; None removes them. Return the policy."""
        body = {"stages": stages, "serve_from": serve_from}
        return self._run(self._catalogue.send("PATCH", f"models/{_part(model)}/policy", body))


class AsyncCatalogueCalls:
    """The calls of :class:`CatalogueCalls` for asyncio."""

    _catalogue: CatalogueFlows

    @abstractmethod
    async def _run(self, flow: Flow[T]) -> T: ...

    async def search_versions(
        self, filter: str = "", *, order_by: str | None = None, limit: int | None = None
    ) -> list[Document]:
        """Return the versions that match a filter; see :meth:`CatalogueCalls.search_versions`."""
        query = {"filter": filter, "order_by": order_by}
        return await self._run(self._catalogue.pages("versions", limit, query))

    async def registered_models(self, name: str | None = None, *, filter: str = "") -> list[Document]:
        """Return models; see :meth:`CatalogueCalls.registered_models`."""
        return await self._run(self._catalogue.pages("models", None, {"name": name, "filter": filter}))

    async def version(self, reference: str) -> Document:
        """Return one version with its metadata; see :meth:`CatalogueCalls.version`."""
        return await self._run(self._catalogue.version(reference))

    async def describe_version(self, reference: str, changes: Mapping[str, Any]) -> Document:
        """Change metadata; see :meth:`CatalogueCalls.describe_version`."""
        body = {"metadata_patch": dict(changes)}
        return await self._run(self._catalogue.change("PATCH", reference, "", body))

    async def compare(self, a: str, b: str) -> Document:
        """Compare two versions; see :meth:`CatalogueCalls.compare`."""
        return await self._run(self._catalogue.read("compare", {"a": a, "b": b}))

    async def card(self, reference: str) -> str:
        """Return a version's model card; see :meth:`CatalogueCalls.card`."""
        return await self._run(self._catalogue.card(reference))

    async def lineage(self, reference: str) -> Document:
        """Return the lineage of a version; see :meth:`CatalogueCalls.lineage`."""
        return await self._run(self._catalogue.change("GET", reference, "/lineage", None))

    async def set_card(self, reference: str, text: str | None) -> None:
        """Set or delete a version's model card; see :meth:`CatalogueCalls.set_card`."""
        method, body = ("DELETE", None) if text is None else ("PUT", {"text": text})
        await self._run(self._catalogue.change(method, reference, "/card", body))

    async def aliases(self, model: str) -> dict[str, int]:
        """Return the aliases of a model; see :meth:`CatalogueCalls.aliases`."""
        found = await self._run(self._catalogue.read(f"models/{_part(model)}/aliases", {}))
        return {item["alias"]: item["version"] for item in found["items"]}

    async def set_alias(
        self, model: str, alias: str, version: int | None, *, expected: int | None = None
    ) -> None:
        """Point an alias to a version; see :meth:`CatalogueCalls.set_alias`."""
        await self._run(self._catalogue.set_alias(model, alias, version, expected))

    async def alias_history(self, model: str, alias: str) -> list[Document]:
        """Return the latest moves of an alias; see :meth:`CatalogueCalls.alias_history`."""
        path = f"models/{_part(model)}/aliases/{_part(alias)}"
        moves: list[Document] = (await self._run(self._catalogue.read(path, {})))["moves"]
        return moves

    async def delete_version(self, model: str, version: int, *, permanent: bool = False) -> None:
        """Delete a version; see :meth:`CatalogueCalls.delete_version`."""
        await self._run(self._catalogue.delete_version(model, version, permanent))

    async def restore_versions(self, model: str, version: int | None = None) -> list[int]:
        """Restore deleted versions; see :meth:`CatalogueCalls.restore_versions`."""
        return await self._run(self._catalogue.restore(model, version))

    async def set_retention(self, model: str, retention: Document | None) -> Document:
        """Set how many versions are kept; see :meth:`CatalogueCalls.set_retention`."""
        path = f"models/{_part(model)}/policy"
        return await self._run(self._catalogue.send("PATCH", path, {"retention": retention}))

    async def retention(
        self, model: str, *, keep_last: int | None = None, max_age_days: float | None = None,
        sleeping: bool = False, dry_run: bool = True,
    ) -> list[Document]:  # fmt: skip
        """Return the fate of each version; see :meth:`CatalogueCalls.retention`."""
        return await self._run(self._catalogue.retention(model, keep_last, max_age_days, sleeping, dry_run))

    async def stage(self, reference: str) -> Document:
        """Return a version's stage; see :meth:`CatalogueCalls.stage`."""
        return await self._run(self._catalogue.change("GET", reference, "/stage", None))

    async def set_stage(self, reference: str, stage: str | None) -> Document:
        """Move a version to a stage; see :meth:`CatalogueCalls.set_stage`."""
        body = {"stage": stage or "none"}
        return await self._run(self._catalogue.change("PUT", reference, "/stage", body))

    async def approve(self, reference: str, stage: str, *, comment: str = "") -> Document:
        """Approve a version for a stage; see :meth:`CatalogueCalls.approve`."""
        body = {"stage": stage, "comment": comment}
        return await self._run(self._catalogue.change("POST", reference, "/approvals", body))

    async def set_stages(
        self, model: str, stages: list[Document] | None, *, serve_from: str | None = None
    ) -> Document:
        """Set a model's stages; see :meth:`CatalogueCalls.set_stages`."""
        body = {"stages": stages, "serve_from": serve_from}
        return await self._run(self._catalogue.send("PATCH", f"models/{_part(model)}/policy", body))
