"""The opener: what it refuses, what it bounds, what it tries again."""

import datetime
import ipaddress
import socket
import ssl
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.download import addresses, connection
from pipelines.download.errors import FetchError, status_of
from pipelines.download.opener import FetchRules, Opener
from pipelines.download.politeness import HostGate
from tests.pipelines import web as site
from tests.pipelines.web import Web, jpeg, send


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with site.serve() as web:
        web.routes |= {
            "/drip": site.drip(jpeg(1), 0.02),
            "/loop": site.redirect("/loop"),
            "/long": site.redirect("/long?" + "x"),
            "/to-private": site.redirect("http://10.1.2.3/a.jpg?token=s3cret"),
            "/to-metadata": site.redirect("http://169.254.169.254/latest/meta-data/"),
            "/to-file": site.redirect("file:///etc/passwd"),
            "/to-forbidden": site.redirect("/private/1.jpg"),
            "/to-nowhere": lambda h: send(h, b"", status=302),
            "/to-image": site.redirect("/image/7.jpg"),
            "/truncated": site.truncated(jpeg(3)),
            "/noai": lambda h: send(h, jpeg(4), X_Robots_Tag="noai"),
            "/big": lambda h: send(h, bytes(200_000)),
            "/endless": endless,
            "/bomb": lambda h: send(h, zlib.compress(bytes(10_000_000), wbits=31), Content_Encoding="gzip"),
            "/packed": lambda h: send(h, zlib.compress(jpeg(5), wbits=31), Content_Encoding="gzip"),
            "/headers": slow_headers,
            "/closing": closing,
            "/nonsense": lambda h: h.wfile.write(b"SMTP ready\r\n\r\n") and setattr(h, "close_connection", True),
            "/busy": lambda h: send(h, b"", status=503),
        }
        yield web


def endless(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"1000\r\n" + bytes(4096) + b"\r\n")
    except OSError:
        handler.close_connection = True


LARGE = jpeg(6) + bytes(90_000)


def closing(handler: Any) -> None:
    """As HTTP/1.0 servers answer: no length, the end of the connection is the end of the body."""
    handler.close_connection = True
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\n")
    for start in range(0, len(LARGE), 30_000):
        handler.wfile.write(LARGE[start : start + 30_000])
        time.sleep(0.02)


def slow_headers(handler: Any) -> None:
    try:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        for _ in range(400):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.01)
    except OSError:
        handler.close_connection = True


@pytest.fixture
def opener(tmp_path: Path) -> Callable[..., Opener]:
    def make(tls: ssl.SSLContext | None = None, opted_out: set[str] = frozenset(), **rules: Any) -> Opener:  # type: ignore[assignment]
        settings: dict[str, Any] = {
            "allow_hosts": ("127.0.0.1",),
            "timeout_s": 0.6,
            "max_bytes": 100_000,
            "backoff_s": 0.01,
        }
        gate = HostGate(str(tmp_path), 8, 0.0, 5.0)
        return Opener(FetchRules(**(settings | rules)), gate, lambda url: url in opted_out, tls)

    return make


def refusal(opener: Opener, url: str) -> FetchError:
    with pytest.raises(FetchError) as caught:
        opener.open(url)
    return caught.value


@pytest.mark.parametrize(
    ("path", "name", "status"),
    [
        ("/404", "http_404", "failed"),
        ("/loop", "redirect_loop", "failed"),
        ("/to-private", "private_address", "failed"),
        ("/to-metadata", "private_address", "failed"),
        ("/to-file", "scheme", "failed"),
        ("/to-nowhere", "bad_redirect", "failed"),
        ("/to-forbidden", "robots_disallowed", "excluded"),
        ("/private/1.jpg", "robots_disallowed", "excluded"),
        ("/noai", "x_robots_tag", "excluded"),
        ("/big", "too_large", "failed"),
        ("/endless", "too_large", "failed"),
        ("/bomb", "too_large", "failed"),
        ("/truncated", "truncated", "transient"),
        ("/nonsense", "protocol", "failed"),
        ("/busy", "http_503", "transient"),
    ],
)
def test_each_failure_has_its_class(web: Web, opener: Callable[..., Opener], path: str, name: str, status: str) -> None:
    error = refusal(opener(), web.url(path))
    assert (error.name, status_of(error.name)) == (name, status)


@pytest.mark.parametrize("path", ["/drip", "/headers"])
def test_a_slow_drip_is_cut_at_the_total_time(web: Web, opener: Callable[..., Opener], path: str) -> None:
    patient = opener(attempts=1, timeout_s=0.3)
    patient.robots.check(addresses.parse(web.url("/")))
    began = time.monotonic()
    assert refusal(patient, web.url(path)).name == "timeout"
    assert time.monotonic() - began < 2


def test_bytes_come_as_served(web: Web, opener: Callable[..., Opener]) -> None:
    assert opener().open(web.url("/image/5.jpg")).read() == jpeg(5)
    assert opener().open(web.url("/to-image")).read() == jpeg(7)
    assert opener().open(web.url("/packed")).read() == jpeg(5)
    assert opener().open(web.url("/closing")).read() == LARGE


def test_only_transient_failures_are_tried_again(web: Web, opener: Callable[..., Opener]) -> None:
    web.routes["/later"] = site.failing(2, jpeg(9))
    assert opener(attempts=3).open(web.url("/later")).read() == jpeg(9)
    web.hits.clear()
    refusal(opener(attempts=3), web.url("/404"))
    refusal(opener(attempts=3), web.url("/busy"))
    assert (web.hits["/404"], web.hits["/busy"]) == (1, 3)


def test_a_redirect_from_an_allowed_host_to_another_private_one_is_refused(
    web: Web, opener: Callable[..., Opener]
) -> None:
    web.routes["/to-localhost"] = site.redirect(f"http://localhost:{web.port}/image/1.jpg")
    assert refusal(opener(), web.url("/to-localhost")).name == "private_address"
    one_port = opener(allow_hosts=(f"127.0.0.1:{web.port + 1}",))
    assert refusal(one_port, web.url("/image/1.jpg")).name == "private_address"
    assert opener(allow_hosts=(f"127.0.0.1:{web.port}",)).open(web.url("/image/1.jpg")).read() == jpeg(1)


def test_proxy_variables_are_ignored(web: Web, opener: Callable[..., Opener], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert opener().open(web.url("/image/2.jpg")).read() == jpeg(2)


def test_img2dataset_fetches_through_the_installed_opener(web: Web, opener: Callable[..., Opener]) -> None:
    from pipelines.download.shard import downloader_class

    download_image = downloader_class().download_shard.__globals__["download_image"]
    with opener().installed():
        _, stream, error = download_image((0, web.url("/image/3.jpg")), 5, None, None)
        assert (stream.read(), error) == (jpeg(3), None)
        _, stream, error = download_image((0, "file:///etc/hostname"), 5, None, None)
        assert stream is None and error.startswith("scheme")
        _, stream, error = download_image((0, web.url("/to-private")), 5, None, None)
        assert stream is None and error.startswith("private_address")
    assert web.agents == {"lvd-curate/1.0"}


def test_a_name_that_changes_its_answer_is_connected_to_where_it_was_checked(
    opener: Callable[..., Opener], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["93.184.216.34", "127.0.0.1", "127.0.0.1"])
    asked: list[str] = []
    connected: list[Any] = []

    def resolver(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    def exchange(target: addresses.Target, places: Any, *_: Any, **__: Any) -> connection.Reply:
        connected.extend(place for _, place in places)
        return connection.Reply(404, urllib.request.Request("http://x").headers, b"", 0.0)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    monkeypatch.setattr(connection, "exchange", exchange)
    monkeypatch.setattr("pipelines.download.opener._retry_after", lambda headers: None)
    assert refusal(opener(allow_hosts=()), "http://images.example/a.jpg").name == "http_404"
    assert asked == ["images.example"]
    assert set(connected) == {("93.184.216.34", 80)}
    assert refusal(opener(allow_hosts=()), "http://images.example/a.jpg").name == "private_address"


def test_a_resolver_that_hangs_is_cut(opener: Callable[..., Opener], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(1.0))
    began = time.monotonic()
    assert refusal(opener(timeout_s=0.1, attempts=1), "http://images.example/a.jpg").name == "robots_unreachable"
    assert time.monotonic() - began < 0.9


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://user:secret@example.com/a.jpg", "credentials"),
        ("http://secret@example.com/a.jpg", "credentials"),
        ("ftp://example.com/a.jpg", "scheme"),
        ("file:///etc/passwd", "scheme"),
        ("data:image/png;base64,AAAA", "scheme"),
        ("javascript:alert(1)", "scheme"),
        ("//example.com/a.jpg", "scheme"),
        ("", "bad_url"),
        ("http://", "bad_url"),
        ("http:///a.jpg", "bad_url"),
        ("http://exa mple.com/", "bad_url"),
        ("http://example.com\r\nHost: x/", "bad_url"),
        ("http://example.com:99999/", "bad_url"),
        ("http://example.com:0/", "bad_url"),
        ("http://[::1/", "bad_url"),
        ("http://2130706433/", "bad_url"),
        ("http://0x7f000001/", "bad_url"),
        ("http://0177.0.0.1/", "bad_url"),
        ("http://127.1/", "bad_url"),
        ("http://0/", "bad_url"),
        ("http://1.2.3.4.5/", "bad_url"),
        ("http://example.com\\@127.0.0.1/", "credentials"),
        ("http://" + "a" * 300 + ".com/", "bad_url"),
    ],
)
def test_urls_that_are_never_asked(url: str, name: str) -> None:
    with pytest.raises(FetchError) as caught:
        addresses.parse(url)
    assert caught.value.name == name
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("HTTP://Example.COM:80/a b.jpg#x", "http://example.com/a%20b.jpg"),
        ("https://example.com", "https://example.com/"),
        ("https://example.com:8443?q=ü", "https://example.com:8443/?q=%C3%BC"),
        ("https://bücher.example/ä.jpg", "https://xn--bcher-kva.example/%C3%A4.jpg"),
        ("http://[2606:4700::1111]:8080/a%2Fb", "http://[2606:4700::1111]:8080/a%2Fb"),
        (" http://example.com./x ", "http://example.com/x"),
    ],
)
def test_urls_are_asked_as_browsers_do(url: str, asked: str) -> None:
    assert addresses.parse(url).url == asked


REFUSED = """0.0.0.0 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 169.254.169.254 172.16.0.1 172.31.0.1
192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 240.0.0.1 255.255.255.255
168.63.129.16 :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 64:ff9b::7f00:1 64:ff9b::a00:1
64:ff9b:1::1 100::1 2001::1 2001:db8::1 2002:7f00:1::1 2002:a00:1::1 fc00::1 fd00:ec2::254 fe80::1 fec0::1 ff02::1"""
ACCEPTED = "1.1.1.1 8.8.8.8 93.184.216.34 ::ffff:8.8.8.8 64:ff9b::808:808 2606:4700::1111 2a00:1450:4001::1"


@pytest.mark.parametrize("text", REFUSED.split())
def test_addresses_that_are_not_public_are_refused(text: str) -> None:
    assert not addresses.is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", ACCEPTED.split())
def test_public_addresses_are_accepted(text: str) -> None:
    assert addresses.is_public(ipaddress.ip_address(text))


@given(st.ip_addresses(v=4))
def test_no_wrapping_makes_an_address_public(address: ipaddress.IPv4Address) -> None:
    word = int(address)
    for wrapped in (0xFFFF << 32 | word, 0x64FF9B << 96 | word, 0x2002 << 112 | word << 80 | 1, word):
        if addresses.is_public(ipaddress.IPv6Address(wrapped)):
            assert addresses.is_public(address)


def test_scoped_addresses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1%eth0", 80, 0, 2))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    with pytest.raises(FetchError, match="private_address"):
        addresses.resolve(addresses.parse("http://images.example/"), frozenset())


def test_lists_are_asked_before_anybody_is_and_at_redirects(web: Web, opener: Callable[..., Opener]) -> None:
    web.hits.clear()
    blocked = opener(blocked_domains=frozenset({"bad.example"}))
    assert refusal(blocked, "http://img.bad.example/a.jpg").name == "blocked_domain"
    assert refusal(opener(opted_out={web.url("/image/7.jpg")}), web.url("/to-image")).name == "opted_out"
    assert web.hits["/image/7.jpg"] == 0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    return path


def test_certificates_are_checked_against_the_hosts_name(certificate: Path, opener: Callable[..., Opener]) -> None:
    with site.serve() as web:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(certificate)
        web.server.socket = server.wrap_socket(web.server.socket, server_side=True)
        trusting = ssl.create_default_context(cafile=str(certificate))
        hosts = ("localhost", "127.0.0.1")
        good = opener(tls=trusting, allow_hosts=hosts, timeout_s=5)
        assert good.open(f"https://localhost:{web.port}/image/1.jpg").read() == jpeg(1)
        assert refusal(good, f"https://127.0.0.1:{web.port}/image/1.jpg").name == "tls"
        assert refusal(opener(allow_hosts=hosts), f"https://localhost:{web.port}/image/1.jpg").name == "tls"


def test_what_is_not_a_host_is_refused_as_an_allowed_host() -> None:
    assert addresses.parse_allowed(["127.0.0.1", "localhost:8080", "[::1]:80", "::1"]) == {
        ("127.0.0.1", None),
        ("localhost", 8080),
        ("::1", 80),
        ("::1", None),
    }
    for entry in ("http://x/", "a/b", "*", "10.0.0.0/8", ""):
        with pytest.raises(FetchError):
            addresses.parse_allowed([entry])
