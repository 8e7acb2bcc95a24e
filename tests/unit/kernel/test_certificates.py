"""Which certificates are read, and how often."""

from __future__ import annotations

import ssl

import certifi
import pytest

from tidegate.certificates import trusted


def test_without_encryption_there_is_nothing_to_verify():
    assert trusted("http://127.0.0.1:8000", "http://gateway") is False


def test_whoever_encrypts_is_verified_by_what_was_read_once():
    found = trusted("http://127.0.0.1:8000", "https://gateway.example")
    assert isinstance(found, ssl.SSLContext)
    assert found.verify_mode == ssl.CERT_REQUIRED
    assert found.check_hostname
    assert trusted("https://other.example") is found


def test_where_they_are_may_change(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SSL_CERT_FILE", certifi.where())
    found = trusted("https://gateway.example", trust_env=True)
    monkeypatch.delenv("SSL_CERT_FILE")
    assert trusted("https://gateway.example", trust_env=True) is not found
    assert trusted("https://gateway.example") is not found


def test_what_is_no_plain_http_is_verified():
    for url in ("HTTPS://gateway.example", "gateway.example:443", ""):
        assert trusted(url) is not False
