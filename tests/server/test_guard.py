"""The token cannot be bypassed, foreign pages cannot ask or change anything, hostile content is inert."""

import asyncio
import json
from typing import Any

import pytest
from fastapi.routing import APIRoute

from pipelines.server import api, desk, pages
from pipelines.server import guard as guarding
from pipelines.server.guard import COOKIE, OPEN_PATHS
from tests.pipelines.synthetic_run import build
from tests.server.conftest import client_of
from tests.server.test_pages import EVERY_PAGE, Page

TOKEN = "a-token-of-more-than-16"


@pytest.fixture
def guarded(copied: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(guarding, "WRONG_TOKEN_S", 0.0)
    return copied(token=TOKEN)


def addresses() -> list[tuple[str, str]]:
    """Every method and path that the application has."""
    found = [("GET", "/api/openapi.json"), ("GET", "/nothing"), ("GET", "/docs")]
    for route in [*api.router.routes, *pages.router.routes, *desk.router.routes]:
        if isinstance(route, APIRoute):
            path = route.path
            for name in route.param_convertors:
                path = path.replace(f"{{{name}}}", "1").replace(f"{{{name}:path}}", "1")
            found += [(method, path) for method in route.methods]
    return found


def test_no_address_answers_without_the_token(guarded: Any) -> None:
    tried = addresses()
    assert len(tried) > 50
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": f"Bearer {TOKEN[:-1]}"},
        {"cookie": f"{COOKIE}=wrong"},
        {"cookie": f"{COOKIE}="},
        {"cookie": f"other={TOKEN}"},
        {"x-forwarded-for": "127.0.0.1", "x-original-url": "/login"},
    ):
        for method, path in tried:
            if path in OPEN_PATHS:
                continue
            answer = guarded.request(method, path, headers=headers)
            assert answer.status_code in (401, 403), (method, path, headers)
            assert "picture" not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "//images",
        "/login/../images",
        "/login/..%2fimages",
        "/login%2f..%2fimages",
        "/LOGIN",
        "/login/",
        "/static/style.css/../../images",
        "/static/../images",
        "/api/../login/../api/run",
        "/login;/images",
        "/login%00",
        "/static/style.css%2f..%2f..%2fimages",
    ],
)
def test_no_spelling_of_a_path_goes_around_the_token(guarded: Any, path: str) -> None:
    scope = {
        "type": "http",
        "method": "GET",
        "headers": [(b"host", b"127.0.0.1")],
        "query_string": b"",
        "path": path,
        "raw_path": path.encode(),
        "scheme": "http",
        "server": ("127.0.0.1", 8000),
        "client": ("1.2.3.4", 1),
        "http_version": "1.1",
        "root_path": "",
    }
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(guarded.app(scope, receive, send))
    assert sent[0]["status"] in (400, 401, 404)


def test_token_opens_by_header_and_by_cookie_of_the_login(guarded: Any) -> None:
    assert guarded.get("/api/run", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert guarded.get("/", headers={"accept": "text/html"}, follow_redirects=False).headers["location"] == "/login"
    assert guarded.post("/login", data={"token": "wrong"}).status_code == 401
    assert "password" in guarded.get("/login").text
    answer = guarded.post("/login", data={"token": TOKEN}, follow_redirects=False)
    cookie = answer.headers["set-cookie"].lower()
    assert answer.status_code == 303 and "httponly" in cookie and "samesite=strict" in cookie
    assert guarded.get("/").status_code == 200  # the client keeps cookies


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "",
        "localhost.evil",
        "[::2]",
        "1.2.3.4",
        "@127.0.0.1.evil",
    ],
)
def test_a_foreign_name_for_this_machine_is_refused(client: Any, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 421
    assert client.post("/api/decisions", headers={"host": host}, json={}).status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:9999", "localhost:8000", "[::1]:8000", "127.8.8.8"])
def test_own_names_are_answered(client: Any, host: str) -> None:
    assert client.get("/api/run", headers={"host": host}).status_code == 200


def test_changes_from_pages_of_others_are_refused(copied: Any) -> None:
    client = copied()
    asked = {"action": "drop", "scope": "image", "target": "0", "author": "someone"}
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9"},
        {"origin": "http://[bad"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"cookie": "any=thing"},
    ):
        assert client.post("/api/decisions", json=asked, headers=headers).status_code == 403, headers
        assert client.post("/decide", data=asked, headers=headers).status_code == 403, headers
        assert client.request("DELETE", "/api/scan", headers=headers).status_code == 403, headers
    own = {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin", "cookie": "any=thing"}
    assert client.post("/api/decisions", json=asked, headers=own).status_code == 201
    client.served.close()


def test_too_much_is_refused(client: Any) -> None:
    assert client.post("/api/decisions", content=b"x" * (1 << 20)).status_code == 413
    assert client.get("/images?words=" + "x" * 9000).status_code == 414
    assert client.get("/" + "y" * 9000).status_code == 414
    assert client.get("/images?words=a%00b").status_code == 400


def test_a_body_without_a_length_ends_at_the_bound() -> None:
    taken = 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    async def drain() -> None:
        bounded = guarding._bounded(receive, 10_500)
        while (await bounded())["type"] != "http.disconnect":
            pass

    asyncio.run(drain())
    assert taken == 11


@pytest.mark.parametrize(
    "path",
    [
        "/static/../served.py",
        "/static/..%2fserved.py",
        "/static/server.css.bak",
        "/static/",
        "/api/images/..%2f..%2fetc%2fpasswd/bytes",
    ],
)
def test_path_tricks_find_nothing(client: Any, path: str) -> None:
    assert client.get(path).status_code in (404, 405, 422)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def content(source: int, row: int) -> bytes:
        from tests.pipelines.synthetic_run import picture

        script = b"<html><script>alert(1)</script></html>"
        svg = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>'
        return [picture(row), script, svg, b"GIF89a" + script, b""][row % 5] if source == 0 else picture(row)

    made = build(tmp_path_factory.mktemp("hostile") / "run", pool=30, hostile=True, content=content)
    found = client_of(made.run.root)
    yield found
    found.served.close()


@pytest.mark.parametrize(
    "path",
    [
        *EVERY_PAGE,
        "/search?q=%22%3E%3Cscript%3Ealert(1)%3C%2Fscript%3E",
        "/images?words=%3Cscript%3E",
        "/reference/%3Cscript%3E",
        "/like?id=%3Cscript%3E",
        "/like?space=%3Cscript%3E",
        "/retrieval?seed_set=%3Cscript%3Ealert(1)%3C/script%3E",
        "/images?host=%22onmouseover=alert(1)",
        "/%3Cscript%3E",
        "/images?host=%E2%80%AEgpj",
    ],
)
def test_hostile_content_is_shown_inert(hostile: Any, path: str) -> None:
    answer = hostile.get(path, follow_redirects=True)
    assert answer.status_code < 500 and len(answer.content) < 1_000_000
    page = Page(answer.text)
    assert [a.get("src") for a in page.all("script")] in (["/static/server.js"], [])
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    for tag, name in (("a", "href"), ("img", "src"), ("form", "action")):
        for attributes in page.all(tag):
            assert not (attributes.get(name) or "").lower().startswith(("javascript:", "data:", "http", "//"))
    assert not any(mark in answer.text for mark in "\u202e\u200f\u2066")


def test_hostile_strings_are_whole_json(hostile: Any) -> None:
    for row in hostile.get("/api/images?limit=40").json()["images"]:
        assert len(json.dumps(row)) < 20_000


def test_bytes_that_are_no_image_are_never_handed_to_a_browser(hostile: Any) -> None:
    kinds = {}
    for row in range(10):
        answer = hostile.get(f"/api/images/{row}/bytes")
        kinds[row] = (answer.status_code, answer.headers["content-type"].split(";")[0])
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert kinds[0] == (200, "image/jpeg") and kinds[1] == kinds[2] == kinds[4] == (404, "application/json")
    gif = next(row for row in range(30) if row % 5 == 3 and row % 10 not in (3, 7))  # 3 of 10 repeats its neighbour
    answer = hostile.get(f"/api/images/{gif}/bytes")
    assert answer.status_code in (200, 404) and "html" not in answer.headers["content-type"]
    assert hostile.get(f"/api/images/{gif}/thumbnail").status_code == 404


def test_a_location_outside_images_shows_nothing_of_the_machine(copied: Any, tmp_path: Any) -> None:
    client = copied()
    pictures = client.served.pictures
    secret = tmp_path / "secret.txt"
    secret.write_text("root:x:0:0")
    from pipelines.server.pictures import Unavailable

    for shard, offset, length in (
        (str(secret), 0, 10),
        ("../../secret.txt", 0, 10),
        ("/nowhere", 0, 5),
        ("x", -1, 5),
        ("x", 0, 1 << 40),
    ):
        with pytest.raises(Unavailable):
            pictures.stored({"shard": shard, "offset": offset, "length": length})
    client.served.close()
