"""Which certificates are read, and how often."""

from __future__ import annotations

import ssl

import certifi
import pytest

from tidegate.kernel.http.certificates import trusted


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


def test_a_file_of_authorities_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("TIDEGATE_TLS_CA", str(tmp_path / "none.pem"))
    with pytest.raises(ValueError, match=r"TIDEGATE_TLS_CA: .*none\.pem is not a file of PEM certificates"):
        trusted("https://gateway.example")


def test_only_loopback_goes_by_the_gateways_own_certificate(monkeypatch: pytest.MonkeyPatch):
    public = trusted("https://gateway.example")
    monkeypatch.setenv("TIDEGATE_TLS_CERT", certifi.where())
    assert trusted("https://gateway.example") is public
    assert trusted("https://127.0.0.1:8000", "https://gateway.example") is public
    own = trusted("https://127.0.0.1:8000")
    assert isinstance(own, ssl.SSLContext)
    assert (own.verify_mode, own.check_hostname) == (ssl.CERT_REQUIRED, False)


def test_what_is_no_plain_http_is_verified():
    for url in ("HTTPS://gateway.example", "gateway.example:443", ""):
        assert trusted(url) is not False
