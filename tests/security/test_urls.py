"""Requests that a stranger would have us make inside our own network, in every disguise, and through redirects."""

import ipaddress
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.download import addresses
from pipelines.download.errors import FetchError
from pipelines.download.opener import FetchRules, Opener
from pipelines.download.politeness import HostGate
from pipelines.download.robots import MAX_WILDCARDS, parse_rules
from tests.pipelines import web as site
from tests.pipelines.web import Web, jpeg, send

INSIDE = """http://127.0.0.1/ http://localhost/ http://127.0.0.1./ http://１２７.0.0.1/ http://127。0。0。1/ http://①②⑦.0.0.1/
http://[::1]/ http://[::]/ http://[::ffff:127.0.0.1]/ http://[::ffff:7f00:1]/ http://[::127.0.0.1]/ http://0.0.0.0/
http://[64:ff9b::127.0.0.1]/ http://[64:ff9b:1::7f00:1]/ http://[2002:7f00:1::]/ http://[2001:0:7f00:1::]/
http://[fe80::1]/ http://[fc00::1]/ http://[fec0::1]/ http://[2a00:1450::5efe:10.0.0.1]/ http://[2a00:1450::200:5efe:7f00:1]/
http://10.0.0.1/ http://169.254.169.254/latest/ http://[fd00:ec2::254]/ http://100.100.100.200/ http://192.0.0.192/
http://168.63.129.16/ http://[3fff::1]/ http://[5f00::1]/"""
NEVER = """http://2130706433/ http://0x7f000001/ http://017700000001/ http://0177.0.0.1/ http://127.1/ http://0x7f.1/ http://127.0.1/
http://0/ http://a.0x7f/ http://1.2.3.4.5/ http://[fe80::1%25eth0]/ http://[2606:4700::1111%25eth0]/ http://[::1%25lo]/
http://[v1.abc]/ http://a[::1]/ http://[::1]a/ http://[127.0.0.1]/ http://[::1/ http://%31%32%37.0.0.1/
http://ex%61mple.com/
http://user:pw@127.0.0.1/ http://example.com@127.0.0.1/ http://example.com\\@127.0.0.1/
http:\\\\127.0.0.1/ http:/127.0.0.1/
http://example.com:22/ http://example.com:25/ http://example.com:6667/ http://example.com:0/ http://example.com:٣/
http://example.com:65536/ gopher://127.0.0.1/ dict://127.0.0.1/ file:///etc/passwd ftp://127.0.0.1/
jar:http://a!/ //127.0.0.1/"""


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with site.serve() as web:
        yield web


@pytest.fixture
def opener(tmp_path: Path) -> Callable[..., Opener]:
    def make(**rules: Any) -> Opener:
        settings: dict[str, Any] = {"allow_hosts": (), "timeout_s": 2.0, "max_bytes": 100_000, "attempts": 1}
        return Opener(FetchRules(**(settings | rules)), HostGate(str(tmp_path), 8, 0.0, 5.0))

    return make


@pytest.mark.parametrize("url", INSIDE.split())
def test_no_spelling_of_an_inner_address_is_connected_to(url: str) -> None:
    with pytest.raises(FetchError) as caught:
        addresses.resolve(addresses.parse(url), frozenset())
    assert caught.value.name in ("private_address", "bad_url", "dns", "dns_temporary")


@pytest.mark.parametrize("url", NEVER.split())
def test_no_disguise_is_even_resolved(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail(f"{url} was resolved"))
    with pytest.raises(FetchError) as caught:
        addresses.parse(url)
    assert caught.value.name in ("bad_url", "scheme", "credentials")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com\r\nX: y/",
        "http://example.com/\r\nHost: inside",
        "http://example.com/a\tb",
        "\x00http://example.com/",
        "ht\ntp://example.com/",
        "http://exa\u2028mple.com/",
        "http://example.com/\ud800",
        "http://" + "a" * 64 + ".com/",
        "http://" + ".".join(["a" * 60] * 6) + "/",
        "http://example.com/" + "a" * 9000,
    ],
)
def test_urls_that_would_break_a_request_are_refused(url: str) -> None:
    with pytest.raises(FetchError, match="bad_url"):
        addresses.parse(url)


def test_only_what_is_asked_stands_in_a_request_line() -> None:
    for url in ("http://example.com/ä b?c=d e#f", "http://example.com/%0d%0aHost:x", "http://example.com/\u202e\\..\\"):
        path = addresses.parse(url).path
        assert path.isascii() and path.isprintable() and " " not in path


@pytest.mark.parametrize("location", [*INSIDE.split()[:4], *NEVER.split()[-8:], "http://127.0.0.1:22/", "//10.0.0.1/x"])
def test_no_redirect_leads_inside(web: Web, opener: Callable[..., Opener], location: str) -> None:
    web.routes["/out"] = site.redirect(location.encode().decode("latin-1"))
    web.hits.clear()
    with pytest.raises(FetchError) as caught:
        opener(allow_hosts=(f"127.0.0.1:{web.port}",)).open(web.url("/out"))
    assert caught.value.name in ("private_address", "bad_url", "scheme", "credentials", "robots_unreachable", "dns")
    assert set(web.hits) <= {"/out", "/robots.txt"}


def test_robots_txt_is_no_way_in_either(web: Web, opener: Callable[..., Opener]) -> None:
    web.routes["/robots.txt"] = site.redirect("http://169.254.169.254/latest/meta-data/")
    try:
        with pytest.raises(FetchError):
            opener(allow_hosts=(f"127.0.0.1:{web.port}",)).open(web.url("/image/1.jpg"))
    finally:
        del web.routes["/robots.txt"]


def test_a_name_with_a_public_and_an_inner_address_is_connected_to_the_public_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (text, 80)) for text in ("10.0.0.1", "93.184.216.34")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    assert addresses.resolve(addresses.parse("http://both.example/"), frozenset()) == [
        (socket.AF_INET, ("93.184.216.34", 80))
    ]


def test_the_ports_of_mail_and_shells_are_not_spoken_to_even_where_a_host_is_allowed() -> None:
    assert {22, 25, 6667} <= addresses.REFUSED_PORTS and not {80, 443, 8080, 8443} & addresses.REFUSED_PORTS
    with pytest.raises(FetchError, match="bad_url"):
        addresses.parse_allowed(["mail.example:25"])


def test_every_address_that_an_ipv6_address_carries_decides() -> None:
    for inside in ("127.0.0.1", "10.1.2.3", "169.254.169.254"):
        word = int(ipaddress.IPv4Address(inside))
        for carrier in (0xFFFF << 32 | word, 0x2A001450 << 96 | 0x5EFE << 32 | word, 0x64FF9B << 96 | word):
            assert not addresses.is_public(ipaddress.IPv6Address(carrier))
    assert addresses.is_public(ipaddress.IPv6Address("2a00:1450::5efe:8.8.8.8"))


def test_packed_bodies_unfold_no_further_than_the_bound(web: Web, opener: Callable[..., Opener]) -> None:
    import gzip
    import zlib

    twice = gzip.compress(gzip.compress(bytes(30 << 20)))
    web.routes |= {
        "/deflated": lambda h: send(h, zlib.compress(bytes(30 << 20)), Content_Encoding="deflate"),
        "/twice": lambda h: send(h, twice, Content_Encoding="gzip, gzip"),
        "/brotli": lambda h: send(h, b"\x1b\xff\xff", Content_Encoding="br"),
        "/broken": lambda h: send(h, gzip.compress(jpeg(1))[:-9], Content_Encoding="gzip"),
    }
    asking = opener(allow_hosts=("127.0.0.1",))
    for path, name in (
        ("/deflated", "too_large"),
        ("/twice", "content_encoding"),
        ("/brotli", "content_encoding"),
        ("/broken", "truncated"),
    ):
        with pytest.raises(FetchError) as caught:
            asking.open(web.url(path))
        assert caught.value.name == name


def test_rules_of_thousands_of_wildcards_are_obeyed_without_being_tried() -> None:
    some = parse_rules("User-agent: *\n" + "Disallow: /*a*b\n" * (MAX_WILDCARDS // 4))
    many = parse_rules("User-agent: *\nAllow: /\n" + "Disallow: /*a*b\n" * MAX_WILDCARDS)
    assert some.can_fetch("http://a.example/x", "lvd-curate")
    assert not many.can_fetch("http://a.example/x", "lvd-curate")
