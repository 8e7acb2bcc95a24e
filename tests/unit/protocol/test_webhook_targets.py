"""Which URLs and addresses a webhook may have."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from tidegate.kernel.protocol.webhooks import LONGEST_URL, WebhookTarget, is_public, read_url

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("url", "target", "authority"),
    [
        ("https://a.example/x?y=1", WebhookTarget("https", "a.example", 443, "/x?y=1"), "a.example"),
        ("http://A.Example", WebhookTarget("http", "a.example", 80, "/"), "a.example"),
        ("http://a:8080?y", WebhookTarget("http", "a", 8080, "/?y"), "a:8080"),
        ("https://[2001:db8::1]:8/h", WebhookTarget("https", "2001:db8::1", 8, "/h"), "[2001:db8::1]:8"),
    ],
)
def test_the_parts_of_a_url(url, target, authority):
    assert read_url(url) == target
    assert target.authority == authority


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://a/",
        "file:///etc/passwd",
        "a.example/x",
        "https://",
        "https://user:word@a.example/",
        "https://a.example/#part",
        "https://a.example/ b",
        "https://a.example/\r\nX: y",
        "https://a.example:0/",
        "https://a.example:65536/",
        "https://a.example:x/",
        "https://[127.0.0.1]/",
        "https://[::g]/",
        "https://bücher.example/",
        "https://a.example\\@b.example/",
        "https://a/" + "x" * LONGEST_URL,
    ],
)
def test_what_is_no_url_of_a_webhook(url):
    assert read_url(url) is None


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "0.1.2.3", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "::", "::1",
        "fe80::1", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
        "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a00:1::1",
        "2001:0:0:0:0:0:80ff:fffe",
        # Translators of one's own network put the address anywhere in their /48 (RFC 6052): here 10.0.0.1
        # in prefixes of 48, 56, 64 and 96 bits, with low bits that look public.
        "64:ff9b:1:a00:0:100::808", "64:ff9b:1:a:0:1:808:808", "64:ff9b:1:0:a:0:108:808", "64:ff9b:1::a00:1",
        "64:ff9b:1::808:808", "64:ff9b:1:ffff:ffff:ffff:808:808", "64:ff9b::a00:1", "64:ff9b::1:808:808",
        # Tunnels, whatever is at their other end; and what is no unicast address of the internet.
        "2002:808:808::1", "2002:c0a8:101::", "2001:0:808:808::", "2001:0:4136:e378:8000:63bf:f7f7:f7f7",
        "::8.8.8.8", "::ffff:0:808:808", "::ffff:169.254.169.254", "3fff::1", "5f00::1", "4000::1", "100::1",
        "2001:10::1",
    ],
)  # fmt: skip
def test_addresses_that_no_webhook_reaches(address):
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(address):
    assert is_public(ip_address(address))


def test_every_place_of_a_local_translators_prefix_is_refused():
    network = ip_network("64:ff9b:1::/48")
    for bit in range(80):
        assert not is_public(ip_address(int(network.network_address) | 1 << bit | 0x08080808))
