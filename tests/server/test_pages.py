"""The pages' HTML without a browser: what they show is what the tables hold, a bounded piece at a time."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.pipelines.synthetic_run import SyntheticRun
from tests.server.conftest import client_of
from tests.server.test_index import rows_of

EVERY_PAGE = (
    "/",
    "/progress",
    "/images",
    "/images?words=picture&status=ok",
    "/image/0",
    "/image/7",
    "/failures",
    "/filters",
    "/scores/nsfw?value=0.5",
    "/scores/similarity?value=0.6&down=1",
    "/duplicates",
    "/component/2",
    "/decontamination",
    "/chain/5",
    "/reference/evaluation",
    "/clusters",
    "/clusters?level=2",
    "/clusters?level=1&inside=1",
    "/cluster/1/2",
    "/cluster/1/2?farthest=1",
    "/cluster/2/1",
    "/retrieval",
    "/retrieval?seed_set=flowers",
    "/retrieval?seed_set=animals",
    "/balance",
    "/like",
    "/like?id=0",
    "/scan",
    "/decisions",
    "/api",
    "/search?q=no+such+words",
)


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(word for word in self.words if word)


@pytest.mark.parametrize("path", EVERY_PAGE)
def test_every_page_is_whole_and_loads_only_from_the_server(client: Any, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    page = Page(answer.text)
    assert len(page.all("h1")) == 1 and len(page.all("main")) == 1
    for tag, name in (("script", "src"), ("link", "href"), ("img", "src"), ("a", "href"), ("form", "action")):
        leads = [attributes.get(name) or "/" for attributes in page.all(tag)]
        assert all(re.match(r"#|/(?!/)", link) for link in leads)
    assert not any(name.startswith("on") or name == "style" for _, a in page.tags for name in a)
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert all(a.get("alt") for a in page.all("img"))


@pytest.mark.parametrize("path", EVERY_PAGE)
def test_links_of_every_page_lead_somewhere(client: Any, path: str) -> None:
    page = Page(client.get(path).text)
    links = {a["href"] or "" for a in page.all("a") if (a.get("href") or "").startswith("/")}
    unlike = {re.sub(r"\d+", "1", link): link for link in sorted(links)}  # one of each kind
    for link in list(unlike.values())[:12]:
        assert client.get(link, follow_redirects=True).status_code == 200, link


def test_figures_of_the_overview_are_those_of_the_tables(client: Any, made: SyntheticRun) -> None:
    text = Page(client.get("/").text).text
    images = rows_of(made, "filter")
    copies = sum(row["reason"] == "self" for row in rows_of(made, "dedup"))
    for name, value in (
        ("Images listed", len(images)),
        ("Usable", sum(row["status"] == "ok" for row in images)),
        ("Copies removed", copies),
        ("In the dataset", len(made.in_mix)),
    ):
        assert f"{name} {value:,}" in text


def test_every_list_goes_on_where_the_page_before_ended(client: Any, made: SyntheticRun) -> None:
    ids = sorted(row["image_id"] for row in rows_of(made, "filter"))
    found: list[int] = []
    path: str | None = "/images"
    while path:
        page = Page(client.get(path).text)
        found += [int((a["href"] or "").removeprefix("/image/")) for a in page.all("a") if (a.get("class") == "frame")]
        path = next((a["href"] for a in page.all("a") if "data-next" in a), None)
    shown = {
        row["image_id"] for row in rows_of(made, "filter") if not (row["shard"] and row["nsfw"] and row["nsfw"] > 0.5)
    }
    assert found == [i for i in ids if i in shown]  # flagged ones have a box to tick in the place of the link


def test_flagged_images_are_veiled(client: Any) -> None:
    page = Page(client.get("/image/9").text)
    assert any("veil" in (a.get("class") or "") for a in page.all("label"))
    assert not any("veil" in (a.get("class") or "") for a in Page(client.get("/image/0").text).all("label"))


def test_search_goes_to_what_is_meant(client: Any, made: SyntheticRun) -> None:
    row = rows_of(made, "filter")[4]
    for asked, leads in (
        (str(row["image_id"]), "/image/4"),
        (row["url"], "/images?url="),
        ("host-1.example", "/images?host=host-1.example"),
        ("picture 4", "/images?words=picture+4"),
        ("99999999999999999999999999", "/images?words="),
        ("", "/images"),
    ):
        answer = client.get("/search", params={"q": asked}, follow_redirects=False)
        assert answer.status_code == 303 and answer.headers["location"].startswith(leads), asked
    assert f"/image/{row['image_id']}" in client.get("/search", params={"q": row["sha256"].hex()}).text


@pytest.mark.parametrize(
    "path",
    [
        "/api/images?limit=201",
        "/api/images?limit=0",
        "/api/images?limit=1000000000000",
        "/api/images?after=-1",
        "/api/images?after=99999999999999999999999",
        "/api/components?start=-1",
        "/api/images?cluster=1",
        "/api/images?cluster=1:x",
        "/api/images?component=1e3",
        "/api/images/0/similar?count=100000",
        "/api/scores/nsfw?value=nan",
        "/images?after=x",
        "/scores/nsfw?value=inf",
    ],
)
def test_pages_that_are_too_large_or_nonsense_are_refused(client: Any, path: str) -> None:
    assert client.get(path).status_code == 422


@pytest.mark.parametrize(
    "path",
    [
        "/image/12345",
        "/api/images/12345",
        "/cluster/99/1",
        "/cluster/19/1",
        "/cluster/1/99",
        "/scores/none",
        "/nothing",
        "/api/images/0/similar?space=none",
    ],
)
def test_what_is_not_there_is_not_found(client: Any, path: str) -> None:
    assert client.get(path).status_code == 404


def test_bytes_come_as_they_are_stored_with_a_type_that_cannot_run(client: Any, made: SyntheticRun) -> None:
    row = rows_of(made, "filter")[4]
    stored = Path(made.run.resolve(row["shard"])).read_bytes()[row["offset"] : row["offset"] + row["length"]]
    answer = client.get("/api/images/4/bytes")
    assert answer.content == stored and answer.headers["content-type"] == "image/jpeg"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    small = client.get("/api/images/4/thumbnail")
    assert small.headers["content-type"] == "image/webp" and small.content[:4] == b"RIFF"
    assert client.get("/api/images/7/bytes").status_code == 404  # failed: no bytes


def test_json_says_what_the_page_says(client: Any, made: SyntheticRun) -> None:
    row = client.get("/api/images/2").json()
    wanted = next(r for r in rows_of(made, "filter") if r["image_id"] == 2)
    assert row["sha256"] == wanted["sha256"].hex() and int(row["pca_hash"], 16) == wanted["pca_hash"]
    assert "shard" not in row and row["component_id"] == 2
    alike = client.get("/api/images/2/similar?count=3").json()
    assert len(alike["images"]) == 3 and 0 <= alike["recall"] <= 1 and alike["cells_read"] <= alike["cells"]
    assert 2 not in [entry["image_id"] for entry in alike["images"]]


def test_a_run_without_optional_stages_has_its_pages(tmp_path: Any) -> None:
    from tests.pipelines.synthetic_run import build

    client = client_of(build(tmp_path / "run", pool=20, optional=False).run.root)
    for path in (
        "/",
        "/images",
        "/image/0",
        "/duplicates",
        "/clusters",
        "/retrieval",
        "/balance",
        "/filters",
        "/like?id=0",
        "/decontamination",
    ):
        assert client.get(path).status_code == 200, path
    client.served.close()


def test_an_uploaded_image_finds_its_like_by_the_model_that_made_the_vectors(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from embeddings.models import registry
    from tests.pipelines.synthetic_run import picture

    index = client.served.index
    vector = index.spaces["mobilenet_v2"].vector(4)

    class Model:
        identity: ClassVar[dict[str, Any]] = {"name": "mobilenet_v2", "weights": "sha256:0123", "size": 224}
        dimension, batch_size = 16, 2

        def prepare(self, pixels: np.ndarray) -> np.ndarray:
            assert pixels.shape == (36, 48, 3)
            return pixels

        def embed(self, batch: np.ndarray) -> np.ndarray:
            return np.repeat(vector[None], len(batch), axis=0)

    monkeypatch.setattr(registry, "load", lambda name: Model())
    client.served.pictures._models.clear()
    answer = client.post("/api/similar", files={"file": ("a.jpg", picture(1))})
    assert answer.status_code == 200 and answer.json()["images"][0]["image_id"] == 4
    assert client.post("/like", files={"file": ("a.jpg", picture(1))}).status_code == 200
    for bad in (b"", b"<svg onload=alert(1)>", picture(1)[:200]):
        assert client.post("/api/similar", files={"file": ("a.jpg", bad)}).status_code == 422
        assert 'role="alert"' in client.post("/like", files={"file": ("a.jpg", bad)}).text
    client.served.pictures._models.clear()
    Model.identity = {"name": "mobilenet_v2", "weights": "others"}
    answer = client.post("/api/similar", files={"file": ("a.jpg", picture(1))})
    assert answer.status_code == 409 and "another version" in answer.json()["detail"]
    client.served.pictures._models.clear()
