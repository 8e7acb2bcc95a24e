"""Read the drift and the quality of versions through a gateway, for both clients.

The calls use the router's API. `docs/access.md` lists the scopes that the caller's key needs for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from tidegate.client.calls import Call
from tidegate.client.core import Core
from tidegate.client.flow import Flow
from tidegate.client.jobs import Document, document_of


@dataclass(frozen=True, slots=True)
class QualityFlows:
    """Calls about drift and quality. Each returns a JSON document of the router."""

    core: Core

    def read(self, what: str, name: str | None) -> Flow[Document]:
        """Return the drift or the quality of the versions behind ``name`` (None: of all versions).

        ``what``: ``drift`` or ``quality``. ``name``: an endpoint, a Deployment or a model.
        """
        path = f"/api/router/v1/{what}" + (f"/{quote(name, safe='')}" if name is not None else "")
        return document_of((yield from self.core.call("GET", path, None)))

    def rebase(self, name: str) -> Flow[Document]:
        """Start new drift baselines for the versions behind ``name``.

        ``name``: an endpoint, a Deployment or a model. The next samples form the new baselines.
        """
        answer = yield from self.core.caller.call(
            "POST",
            f"/api/router/v1/drift/{quote(name, safe='')}/rebase",
            timeout_s=self.core.timeout_s,
            headers={"Content-Type": "application/json"},
            content=b"{}",
            repeatable=True,
        )
        return document_of(answer)


class QualityCalls:
    """The calls about drift and quality, for both clients. See `docs/drift.md`."""

    _quality: QualityFlows

    @Call
    def drift(self, name: str | None = None) -> Flow[Document]:
        """Return ``items``: the drift of each version behind an endpoint, a Deployment or a model.

        With a name, each item has the drift of all its ``columns``, and the ``points`` for a chart. Without a
        name, the items are a summary of all deployed versions.
        """
        return self._quality.read("drift", name)

    @Call
    def quality(self, name: str | None = None) -> Flow[Document]:
        """Return ``items``: the quality of each version, measured with labels and estimated without them."""
        return self._quality.read("quality", name)

    @Call
    def rebase_drift(self, name: str) -> Flow[Document]:
        """Start new drift baselines for the versions behind ``name``.

        ``name``: an endpoint, a Deployment or a model. The next samples form the new baselines. Baselines
        from training data are not replaced.
        """
        return self._quality.rebase(name)
