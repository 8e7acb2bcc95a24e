"""The home page of the gateway, and the origins whose pages may call it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from services.gateway.domain import home
from services.gateway.domain.cors import Origins
from services.gateway.settings import GatewaySettings

pytestmark = pytest.mark.unit


def model(name: str, state: str = "READY") -> dict[str, str]:
    return {"name": name, "version": "1", "state": state, "reason": ""}


@pytest.mark.parametrize(
    ("models", "command"),
    [
        ([], "tidegate deploy model.onnx"),
        ([model("a", "UNAVAILABLE")], "tidegate status"),
        ([model("a", "UNAVAILABLE"), model("b")], "curl http://h:1/v2/models/b"),
        (None, "curl -H 'Authorization: Bearer tg_...' http://h:1/"),
    ],
)
def test_the_next_command_fits_the_state(models, command):
    told = home.document("1.2", "http://h:1", models, "needs a key")
    assert told["next"]["command"] == command
    assert ("problem" in told, told.get("models")) == (models is None, models)


def test_origins():
    some = Origins.of(" https://a.example/, http://localhost:3000,")
    assert some.names == ("https://a.example", "http://localhost:3000")
    assert b"https://a.example" in some
    assert b"https://a.example.evil" not in some
    assert b"null" not in some
    assert b"null" in Origins.of("*")
    assert not Origins.of("")


@pytest.mark.parametrize(
    "wrong", ["a.example", "https://a.example/path", "https://*.example", "null", "https://"]
)
def test_a_bad_origin_is_refused_when_the_gateway_starts(wrong):
    with pytest.raises(ValidationError, match="is not an origin"):
        GatewaySettings(cors_origins=wrong)
