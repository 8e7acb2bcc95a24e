"""Signed tokens with strange claims: each is accepted or refused, and none causes an error."""

from __future__ import annotations

import asyncio
import base64
import json
import time

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from jwt.algorithms import RSAAlgorithm

from services.gateway.adapters.jwks import LONGEST, RETRY_S, Jwks
from tidegate.kernel.errors import Unauthorized

pytestmark = pytest.mark.integration

HEAD = b'{"alg": "RS256", "kid": "k"}'
HUGE = "1" + "0" * 400
DEEP = "[" * 2000 + "]" * 2000


def segment(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


@pytest.fixture(scope="module")
def private():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture
async def jwks(private, tmp_path):
    public = json.loads(RSAAlgorithm.to_jwk(private.public_key()))
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [public | {"kid": "k"}]}))
    found = Jwks(str(path), issuer="i", audience="a", roles_claim="scope", scopes_of={})
    await found.start()
    yield found
    await found.stop()


@pytest.fixture
def token(private):
    """``token(head, **claims)``: a signed token; claims are raw JSON."""

    def made(head: bytes = HEAD, **claims: str) -> bytes:
        usual = {"sub": '"u"', "iss": '"i"', "aud": '"a"', "exp": str(int(time.time()) + 60)}
        body = ", ".join(f'"{name}": {raw}' for name, raw in (usual | {"scope": '"infer"'} | claims).items())
        message = segment(head) + b"." + segment(f"{{{body}}}".encode())
        return message + b"." + segment(private.sign(message, padding.PKCS1v15(), hashes.SHA256()))

    return made


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": HUGE},
        {"sub": '"\\ud800"'},
        {"sub": '"a\\u0000"'},
        {"sub": json.dumps("x" * 4000)},
        {"name": '"\\ud800x"'},
        {"name": '{"a": 1}'},
        {"nbf": f"-{HUGE}"},
        {"iat": f"-{HUGE}"},
        {"scope": '"\\ud800 infer"'},
    ],
    ids=str,
)
async def test_strange_claims_of_valid_tokens(jwks, token, claims):
    principal, until_ms = jwks.verify(token(**claims))
    assert principal.scopes == {"infer"}
    assert principal.id.isprintable()
    assert len(principal.id) < 130
    assert until_ms / 1e3 <= time.time() + 300, "and looked at again soon"
    principal.to_header()


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": f"-{HUGE}"},
        {"exp": "1e999"},
        {"exp": "NaN"},
        {"exp": "-Infinity"},
        {"exp": "1" * 5000},
        {"exp": "[]"},
        {"exp": "true"},
        {"exp": "null"},
        {"nbf": HUGE},
        {"nbf": "1e999"},
        {"nbf": "NaN"},
        {"iat": HUGE},
        {"iat": "Infinity"},
        {"sub": '""'},
        {"sub": "5"},
        {"sub": "[]"},
        {"scope": DEEP},
        {"aud": '{"a": 1}'},
        {"aud": "[1]"},
        {"iss": '["i"]'},
    ],
    ids=lambda claims: str(claims)[:40],
)
async def test_claims_that_are_refused(jwks, token, claims):
    with pytest.raises(Unauthorized):
        jwks.verify(token(**claims))


@pytest.mark.parametrize(
    "head",
    [
        b"[]", b"5", b"\xff", b'{"alg": "none", "kid": "k"}', b'{"alg": 5, "kid": "k"}',
        b'{"alg": "RS256", "kid": ["k"]}', b'{"alg": "RS256", "kid": {}}', b'{"alg": "RS256"}',
        b'{"alg": "RS256", "kid": "k", "crit": ["zip"]}', b'{"alg": "RS256", "kid": "k", "b64": false}',
        b'{"alg": "RS256", "kid": "k", "x": ' + DEEP.encode() + b"}",
    ],
    ids=lambda head: str(head)[:40],
)  # fmt: skip
async def test_bad_headers_are_refused(jwks, token, head):
    with pytest.raises(Unauthorized):
        jwks.verify(token(head))


async def test_a_token_has_one_spelling_and_a_maximum_length(jwks, token):
    good = token()
    jwks.verify(good)
    for other in (
        good + b"!",
        good + b"=",
        good[:-3] + b"*" + good[-3:],
        b" " + good,
        good + b".x",
        b"",
        b"a",
    ):
        with pytest.raises(Unauthorized):
            jwks.verify(other)
    with pytest.raises(Unauthorized, match=str(LONGEST)):
        jwks.verify(token(name=json.dumps("x" * LONGEST)))


async def test_tokens_with_unknown_keys_cause_few_reads_of_the_issuer(jwks, token, until):
    reads: list[None] = []
    read = jwks._read

    async def counted() -> bytes:
        reads.append(None)
        return await read()

    jwks._read = counted
    jwks._read_at = float("-inf")
    began = time.monotonic()
    for number in range(1000):
        with pytest.raises(Unauthorized):
            jwks.verify(token(json.dumps({"alg": "RS256", "kid": str(number)}).encode()))
        await asyncio.sleep(0)
    await until(lambda: reads)
    assert len(reads) <= 2 + (time.monotonic() - began) / RETRY_S
