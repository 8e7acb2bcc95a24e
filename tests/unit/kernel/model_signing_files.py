"""A key, and two signatures that `model_signing sign key` (1.1.1) made with it.

``ONE_FILE`` signs a file with the text ``hi`` and a newline. ``FOLDER`` signs a folder with this file at
``1/model.onnx``, and ``config.pbtxt`` with the text ``cfg`` and a newline.
"""

from __future__ import annotations

from typing import Any

PUBLIC_KEY = """\
-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEhSzjrB8RrZm1MelkwRec1eLeL5jX
iuLwDkP0WasPifWxBMvBSPC5XIjuPiql+5ANGLt1QIKGi06GapFJ16CcXw==
-----END PUBLIC KEY-----
"""
KEY_ID = "58abd4571fc7d34b00d8c43630d29ef3040ab6f28918eff0f4e3237c1e4a0197"


def _bundle(payload: str, signature: str) -> dict[str, Any]:
    return {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": KEY_ID}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": payload,
            "payloadType": "application/vnd.in-toto+json",
            "signatures": [{"sig": signature, "keyid": ""}],
        },
    }


ONE_FILE = _bundle(
    "ewogICJfdHlwZSI6ICJodHRwczovL2luLXRvdG8uaW8vU3RhdGVtZW50L3YxIiwKICAic3ViamVjdCI6IFsKICAgIHsKICAg"
    "ICAgIm5hbWUiOiAibW9kZWwub25ueCIsCiAgICAgICJkaWdlc3QiOiB7CiAgICAgICAgInNoYTI1NiI6ICJlOWIxM2ZhODkz"
    "YTA3MTI4ODhiOTgxYzUyNTgzMWIyYTcwMGVmYWQxY2VkOTY0ZWYzOTFjZGQ3MTJjZDEyZDM2IgogICAgICB9CiAgICB9CiAg"
    "XSwKICAicHJlZGljYXRlVHlwZSI6ICJodHRwczovL21vZGVsX3NpZ25pbmcvc2lnbmF0dXJlL3YxLjAiLAogICJwcmVkaWNh"
    "dGUiOiB7CiAgICAic2VyaWFsaXphdGlvbiI6IHsKICAgICAgIm1ldGhvZCI6ICJmaWxlcyIsCiAgICAgICJhbGxvd19zeW1s"
    "aW5rcyI6IGZhbHNlLAogICAgICAiaWdub3JlX3BhdGhzIjogWwogICAgICAgICIuZ2l0aHViIiwKICAgICAgICAiLmdpdCIs"
    "CiAgICAgICAgIi5naXRhdHRyaWJ1dGVzIiwKICAgICAgICAiLmdpdGlnbm9yZSIKICAgICAgXSwKICAgICAgImhhc2hfdHlw"
    "ZSI6ICJzaGEyNTYiCiAgICB9LAogICAgInJlc291cmNlcyI6IFsKICAgICAgewogICAgICAgICJhbGdvcml0aG0iOiAic2hh"
    "MjU2IiwKICAgICAgICAibmFtZSI6ICIuIiwKICAgICAgICAiZGlnZXN0IjogIjk4ZWE2ZTRmMjE2ZjJmYjRiNjlmZmY5YjNh"
    "NDQ4NDJjMzg2ODZjYTY4NWYzZjU1ZGM0OGM1ZDNmYjExMDdiZTQiCiAgICAgIH0KICAgIF0KICB9Cn0=",
    "MEUCIDwx/leGSrpUblyNmhpqf21Otm8pZpNPSR246eEp9ndmAiEAhp2CJqmX5+BlinxMUeTmdt1CUfd+PUMHwOg/ZSKF20E=",
)
FOLDER = _bundle(
    "ewogICJfdHlwZSI6ICJodHRwczovL2luLXRvdG8uaW8vU3RhdGVtZW50L3YxIiwKICAic3ViamVjdCI6IFsKICAgIHsKICAg"
    "ICAgIm5hbWUiOiAiZCIsCiAgICAgICJkaWdlc3QiOiB7CiAgICAgICAgInNoYTI1NiI6ICJjZjM0ZmVhOGMzMTZkZWM0ZjNj"
    "OGIzZWU5MTc5YWRkMzAwNzRmY2M5MzQyY2IxMTQzNGQ3ZWQyNDZjZDg3ZThiIgogICAgICB9CiAgICB9CiAgXSwKICAicHJl"
    "ZGljYXRlVHlwZSI6ICJodHRwczovL21vZGVsX3NpZ25pbmcvc2lnbmF0dXJlL3YxLjAiLAogICJwcmVkaWNhdGUiOiB7CiAg"
    "ICAicmVzb3VyY2VzIjogWwogICAgICB7CiAgICAgICAgImRpZ2VzdCI6ICI5OGVhNmU0ZjIxNmYyZmI0YjY5ZmZmOWIzYTQ0"
    "ODQyYzM4Njg2Y2E2ODVmM2Y1NWRjNDhjNWQzZmIxMTA3YmU0IiwKICAgICAgICAibmFtZSI6ICIxL21vZGVsLm9ubngiLAog"
    "ICAgICAgICJhbGdvcml0aG0iOiAic2hhMjU2IgogICAgICB9LAogICAgICB7CiAgICAgICAgImRpZ2VzdCI6ICI0ZDUyM2Rl"
    "ZTZiYzhjMTdhM2UyODM1NzA1MjZkOGQ2ZWQzZDFlZGRhMDdjNTNlOTRjNTVlNDkxYmJmNzgwMzM3IiwKICAgICAgICAibmFt"
    "ZSI6ICJjb25maWcucGJ0eHQiLAogICAgICAgICJhbGdvcml0aG0iOiAic2hhMjU2IgogICAgICB9CiAgICBdLAogICAgInNl"
    "cmlhbGl6YXRpb24iOiB7CiAgICAgICJhbGxvd19zeW1saW5rcyI6IGZhbHNlLAogICAgICAiaWdub3JlX3BhdGhzIjogWwog"
    "ICAgICAgICIuZ2l0aWdub3JlIiwKICAgICAgICAiLmdpdGF0dHJpYnV0ZXMiLAogICAgICAgICIuZ2l0IiwKICAgICAgICAi"
    "LmdpdGh1YiIKICAgICAgXSwKICAgICAgImhhc2hfdHlwZSI6ICJzaGEyNTYiLAogICAgICAibWV0aG9kIjogImZpbGVzIgog"
    "ICAgfQogIH0KfQ==",
    "MEUCIF7UZJmkx3azLdwgbuAltnbrjWq4oY6PGbfbOXbd7JgSAiEA8/lCgozlNGWeUI6SEF5BiShwlpg85U/uWPjcCgIGTNQ=",
)
