"""The issuer's keys by URL: read, read again, and kept while the issuer is away."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from services.gateway.adapters import jwks
from services.gateway.adapters.jwks import Jwks
from tests.integration.gateway.test_control import AUDIENCE, ISSUER, Issuer
from tidegate.kernel.errors import Unauthorized, Unavailable

pytestmark = pytest.mark.integration


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def issuer(tmp_path: Path) -> Issuer:
    return Issuer(tmp_path / "jwks.json")


@pytest.fixture
def server(tmp_path: Path, issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def keys_at(server: ThreadingHTTPServer) -> Jwks:
    url = f"http://127.0.0.1:{server.server_port}/jwks.json"
    return Jwks(
        url, issuer=ISSUER, audience=AUDIENCE, roles_claim="realm.roles", scopes_of={"scientists": ["infer"]}
    )


async def test_keys_by_url(server, issuer, until, monkeypatch):
    monkeypatch.setattr(jwks, "RETRY_S", 0.0)
    found = keys_at(server)
    with pytest.raises(Unavailable, match="not known yet"):
        found.verify(issuer.token().encode())
    await found.start()
    principal, until_ms = found.verify(issuer.token().encode())
    assert principal.scopes == frozenset({"infer"})
    assert until_ms > 0

    # A new key is read when a token uses it.
    issuer.publish("second")

    def known() -> bool:
        try:
            return bool(found.verify(issuer.token().encode()))
        except Unauthorized:
            return False

    await until(known)

    # Errors and invalid answers of the issuer remove no key.
    issuer.path.write_text("no JSON")
    await found._refresh()
    assert known()
    issuer.path.unlink()
    await found._refresh()
    assert known()
    await found.stop()
