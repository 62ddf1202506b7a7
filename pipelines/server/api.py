"""The JSON API. Every list has a bounded page and a cursor: `after` or `start` of the page before."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, File, HTTPException, Path, Query, Request, Response, UploadFile
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from pipelines import decisions
from pipelines.decisions import AUTHOR_CHARACTERS, NOTE_CHARACTERS, TARGET_CHARACTERS, Decision
from pipelines.server import scans
from pipelines.server.opened import Opened, Page
from pipelines.server.pictures import LARGEST, Unavailable
from pipelines.server.served import Served
from pipelines.server.shown import plain

ID_MAX = (1 << 64) - 1
FAR = (1 << 53) - 1
PAGE_MOST = 200
SIMILAR_MOST = 100
Id = Annotated[int, Path(ge=0, le=ID_MAX)]
Start = Annotated[int, Query(ge=0, le=FAR, description="position of the first entry")]
After = Annotated[int | None, Query(ge=0, le=ID_MAX, description="`after` of the page before")]
Limit = Annotated[int, Query(ge=1, le=PAGE_MOST, description="entries on the page")]
Text = Annotated[str | None, Query(max_length=2000)]
Level = Annotated[int, Path(ge=1, le=20)]


class Images(BaseModel):
    """A page of images. after: the cursor of the next page, null at the end."""

    images: list[dict[str, Any]]
    after: int | None = None
    total: int | None = Field(None, description="how many there are, hidden ones included; null where not counted")
    looked: int = Field(0, description="rows that this page looked at")


class Entries(BaseModel):
    """A page of a list. next: `start` of the next page, null at the end."""

    entries: list[dict[str, Any]]
    total: int
    next: int | None = None


class Asked(BaseModel, extra="forbid"):
    """A decision to be made."""

    action: Literal["drop", "keep", "note"]
    scope: Literal["image", "component", "cluster", "host"]
    target: str = Field(max_length=TARGET_CHARACTERS, description="image id, component id, LEVEL:CLUSTER or host")
    author: str = Field("", max_length=AUTHOR_CHARACTERS)
    note: str = Field("", max_length=NOTE_CHARACTERS)


class Decided(BaseModel):
    """What was stored: the batch's file, how many images it covers, how many the run hides now."""

    batch: str
    images: int
    hidden: int


def served_of(request: Request) -> Served:
    """The run of this server, looked at again if it is time."""
    served: Served = request.app.state.served
    served.refresh()
    return served


def index_of(request: Request) -> Opened:
    """The index. Raises UserError while there is none."""
    return served_of(request).index


def images_of(page: Page) -> Images:
    return Images(images=[plain(row) for row in page.images], after=page.after, total=page.total, looked=page.looked)


def entries_of(index: Opened, name: str, start: int, limit: int) -> Entries:
    """A page of one of the index's lists."""
    total = len(index.lists[name]) if name in index.lists else 0
    rows = [plain(row) for row in index.rows(name, start, limit)]
    return Entries(entries=rows, total=total, next=start + limit if start + limit < total else None)


def one_of(index: Opened, image_id: int) -> dict[str, Any]:
    """The row of an image. Raises HTTPException: 410 for one that is hidden, 404 for none."""
    row = index.image(image_id)
    if row is None:
        gone = index.is_dropped(image_id)
        raise HTTPException(410 if gone else 404, "hidden by a decision, or forgotten" if gone else "no such image")
    return row


def filters_of(index: Opened, request: Request) -> dict[str, Any]:
    """The filters in the query. Raises HTTPException 422 for one that cannot be."""
    found: dict[str, Any] = {}
    for name in ("url", "host", "source", "status", "error", "label", "outcome", "brought", "reference", "words"):
        value = request.query_params.get(name)
        if value:
            found[name] = value[:2000].lower() if name == "host" else value[:2000]
    for name, limit in (("component", ID_MAX), ("chain", ID_MAX)):
        value = request.query_params.get(name)
        if value:
            found[name] = _integer(name, value, limit)
    cluster = request.query_params.get("cluster")
    if cluster:
        level, _, number = cluster.partition(":")
        if not number:
            raise HTTPException(422, "cluster: give LEVEL:CLUSTER")
        found[f"cluster_{_integer('cluster', level, 20)}"] = _integer("cluster", number, (1 << 31) - 1)
    return found


def _integer(name: str, value: str, most: int) -> int:
    if not value.isascii() or not value.isdecimal() or len(value) > 20 or int(value) > most:
        raise HTTPException(422, f"{name}: not a number from 0 to {most}")
    return int(value)


router = APIRouter(prefix="/api", tags=["api"])


@router.get("/run")
def run(request: Request) -> dict[str, Any]:
    """What the run holds: counts by source, status and reason, seed sets, spaces of vectors and their recall."""
    served = served_of(request)
    index = served.opened
    document = {} if index is None else {k: v for k, v in index.document.items() if k not in ("bytes", "stages")}
    return {"run": served.run.root.rsplit("/", 1)[-1], "state": served.state, "hidden": len(served.hidden), **document}


@router.get("/images")
def images(
    request: Request,
    words: Text = None,
    url: Text = None,
    host: Text = None,
    source: Text = None,
    status: Text = None,
    error: Text = None,
    label: Text = None,
    outcome: Text = None,
    brought: Text = None,
    reference: Text = None,
    component: Text = None,
    chain: Text = None,
    cluster: Text = None,
    after: After = None,
    limit: Limit = 48,
) -> Images:
    """Images for which all given filters hold, by ascending id. words: all of them occur in the alt text."""
    index = index_of(request)
    return images_of(index.listed(filters_of(index, request), after, limit))


@router.get("/hash/{digits}")
def by_hash(request: Request, digits: Annotated[str, Path(max_length=64)], limit: Limit = 48) -> Images:
    """Images by sha256 of the bytes, sha256 of the pixels (64 hexadecimal digits) or PCA hash (16)."""
    return Images(images=[plain(row) for row in index_of(request).by_hash(digits, limit)])


@router.get("/images/{image_id}")
def image(request: Request, image_id: Id) -> dict[str, Any]:
    """One image: everything that the stages say of it."""
    return plain(one_of(index_of(request), image_id))


@router.get("/images/{image_id}/bytes", response_class=Response)
def image_bytes(request: Request, image_id: Id) -> Response:
    """The image at full size: its stored bytes, by one range read."""
    served = served_of(request)
    try:
        data, kind = served.pictures.stored(one_of(served.index, image_id))
    except Unavailable as error:
        raise HTTPException(404, str(error)) from error
    assert len(data) <= LARGEST
    return picture(data, kind)


@router.get("/images/{image_id}/thumbnail", response_class=Response)
def thumbnail(request: Request, image_id: Id) -> Response:
    """A small version, decoded in a process of its own."""
    served = served_of(request)
    try:
        return picture(served.pictures.small(one_of(served.index, image_id)), "image/webp")
    except Unavailable as error:
        raise HTTPException(404, str(error)) from error


def picture(data: bytes, kind: str) -> Response:
    """Bytes that a browser may draw and nothing else."""
    policy = "sandbox; default-src 'none'; style-src 'unsafe-inline'"
    headers = {
        "content-security-policy": policy,
        "content-disposition": "inline; filename=image",
        "cache-control": "private, max-age=3600",
    }
    return Response(data, media_type=kind, headers=headers)


@router.get("/images/{image_id}/retrieved")
def retrieved(request: Request, image_id: Id, start: Start = 0, limit: Limit = 48) -> Entries:
    """Which seeds drew an image."""
    index = index_of(request)
    one_of(index, image_id)
    rows, total = index.retrieved("retrieved", image_id, start, limit)
    return Entries(entries=rows, total=total, next=start + limit if start + limit < total else None)


@router.get("/images/{image_id}/similar")
def similar(
    request: Request, image_id: Id, space: Text = None, count: Annotated[int, Query(ge=1, le=SIMILAR_MOST)] = 24
) -> dict[str, Any]:
    """The most similar images, by reading the nearest cells alone; with the recall measured for that."""
    index = index_of(request)
    one_of(index, image_id)
    return similar_to(index, space, count, image_id=image_id)


@router.post("/similar")
def similar_to_upload(
    request: Request,
    file: Annotated[UploadFile, File(description="an image")],
    space: Text = None,
    count: Annotated[int, Query(ge=1, le=SIMILAR_MOST)] = 24,
) -> dict[str, Any]:
    """The images most similar to an uploaded one."""
    served = served_of(request)
    name = space_of(served.index, space)
    try:
        vector = served.pictures.vector(file.file.read(), served.index.spaces[name].document.get("model"))
    except Unavailable as error:
        raise HTTPException(422, str(error)) from error
    return similar_to(served.index, name, count, vector=vector)


def space_of(index: Opened, name: str | None) -> str:
    """The space asked for, or the first. Raises HTTPException 404."""
    if not index.spaces or (name and name not in index.spaces):
        raise HTTPException(404, f"spaces: {', '.join(index.spaces) or 'the run has no embeddings'}")
    return name or next((n for n in index.spaces if n != "copies"), "copies")


def similar_to(
    index: Opened, space: str | None, count: int, *, image_id: int | None = None, vector: Any = None
) -> dict[str, Any]:
    """{images with `similarity_to_query`, space, recall, cells, probes}. One of image_id and vector is given."""
    name = space_of(index, space)
    held = index.spaces[name]
    if image_id is not None:
        row = int(index.rows_of_one(image_id))
        vector = held.vector(row) if row >= 0 else None
        if vector is None:
            raise HTTPException(404, f"the image has no vector in {name}")
    elif len(vector) != held.dimension:
        raise HTTPException(422, f"a vector of {len(vector)} dimensions, {held.dimension} expected")
    rows, cosines = held.search(vector, count + 1 + min(len(index.hidden), 100), rotated=image_id is not None)
    by_row = dict(zip(rows.tolist(), cosines.tolist(), strict=True))
    found = []
    for row in index.shown(rows.astype("int64")).tolist():
        entry = index.table.take(np.array([row]))[0]
        if int(entry["image_id"]) != image_id:
            found.append(entry | {"similarity_to_query": round(min(1.0, by_row[row]), 4)})
    document = held.document
    return {
        "images": [plain(entry) for entry in found[:count]],
        "space": name,
        "recall": document["recall"],
        "recall_of_nearest": 10,
        "cells_read": document["probes"],
        "cells": document["cells"],
    }


@router.get("/components")
def components(request: Request, start: Start = 0, limit: Limit = 48) -> Entries:
    """Components of near copies, the largest first."""
    return entries_of(index_of(request), "components", start, limit)


@router.get("/chains")
def chains(request: Request, start: Start = 0, limit: Limit = 48) -> Entries:
    """Components that were dropped for a reference image, the largest first."""
    return entries_of(index_of(request), "chains", start, limit)


@router.get("/clusters/{level}")
def clusters(request: Request, level: Level, start: Start = 0, limit: Limit = 48) -> Entries:
    """Clusters of a level, the largest first."""
    return entries_of(index_of(request), f"clusters_{level}", start, limit)


@router.get("/hosts")
def hosts(request: Request, start: Start = 0, limit: Limit = 48) -> Entries:
    """Hosts by the number of their images."""
    return entries_of(index_of(request), "hosts", start, limit)


@router.get("/failures")
def failures(request: Request, start: Start = 0, limit: Limit = 48) -> Entries:
    """What is not usable, by host, status and reason, the most frequent first."""
    return entries_of(index_of(request), "failures", start, limit)


@router.get("/seeds")
def seeds(request: Request, start: Start = 0, limit: Limit = 48) -> Entries:
    """Seeds that drew images, by seed set and id."""
    return entries_of(index_of(request), "seeds", start, limit)


@router.get("/seeds/{image_id}")
def seed(request: Request, image_id: Id, start: Start = 0, limit: Limit = 48) -> Entries:
    """What a seed drew, by rank."""
    rows, total = index_of(request).retrieved("seed", image_id, start, limit)
    return Entries(entries=rows, total=total, next=start + limit if start + limit < total else None)


@router.get("/references/{name}")
def references(
    request: Request, name: Annotated[str, Path(max_length=400)], start: Start = 0, limit: Limit = 48
) -> Images:
    """Images that match a reference set, the most similar first. after: `start` of the next page."""
    return images_of(index_of(request).ranked("matches", name, start, limit))


@router.get("/clusters/1/{cluster}/members")
def members(
    request: Request,
    cluster: Annotated[int, Path(ge=0, le=(1 << 31) - 1)],
    start: Start = 0,
    limit: Limit = 48,
    farthest: bool = False,
) -> Images:
    """Members of a leaf cluster by their distance to its centroid. after: `start` of the next page."""
    return images_of(index_of(request).ranked("near", cluster, start, limit, farthest))


@router.get("/scores/{name}")
def scores(
    request: Request,
    name: Annotated[str, Path(max_length=40)],
    value: Annotated[float, Query(ge=-1e9, le=1e9)] = 0.0,
    after: Annotated[int | None, Query(ge=0, le=FAR)] = None,
    limit: Limit = 48,
    down: bool = False,
) -> Images:
    """Images in the order of a score, from a value on."""
    index = index_of(request)
    if name not in index.orders:
        raise HTTPException(404, f"scores: {', '.join(index.orders)}")
    return images_of(index.scored(name, value, after, limit, down))


@router.get("/decisions")
def listed(request: Request, start: Start = 0, limit: Limit = 48) -> Entries:
    """Batches of decisions, the newest first."""
    found, total = decisions.listed(served_of(request).run.root, start, limit)
    return Entries(entries=found, total=total, next=start + limit if start + limit < total else None)


@router.post("/decisions", status_code=201)
def decide(request: Request, asked: Asked) -> Decided:
    """Drop, keep or note: an image, a component, a cluster or a host. Every reader applies it from now on."""
    served = served_of(request)
    author = asked.author.strip() or served.settings.author
    return Decided(**served.decide(Decision(asked.action, asked.scope, asked.target, author, asked.note)))


@router.get("/progress")
def progress(request: Request) -> dict[str, Any]:
    """How the run is getting on: stages, rates, remaining time, warnings."""
    return served_of(request).live()


@router.get("/comparison")
def comparison(request: Request) -> dict[str, Any]:
    """What entered and left the dataset since another run, by what brought it and by cluster."""
    return served_of(request).compared().document


@router.get("/comparison/{side}")
def compared(request: Request, side: Literal["entered", "left"], start: Start = 0, limit: Limit = 48) -> Entries:
    """Images that entered or left, by id."""
    rows, total = served_of(request).compared().images(side, start, limit)
    return Entries(
        entries=[plain(row) for row in rows], total=total, next=start + limit if start + limit < total else None
    )


@router.get("/scan", response_class=StreamingResponse)
async def scan(
    request: Request,
    text: Annotated[str, Query(min_length=1, max_length=400)],
    column: Literal["caption", "url", "label"] = "caption",
) -> Response:
    """Any substring, by reading the whole column: JSON lines of ids as they are found. One scan at a time."""
    served = await anyio.to_thread.run_sync(served_of, request)
    paths = (await anyio.to_thread.run_sync(served.parts)).images
    try:
        turn = served.scans.begin()
    except scans.Busy:
        raise HTTPException(409, "another scan is under way: wait for it or cancel it") from None
    events = scans.run(paths, column, text, served.hidden, turn)

    async def lines() -> AsyncIterator[bytes]:
        try:
            while (event := await anyio.to_thread.run_sync(next, events, None)) is not None:
                yield json.dumps(event).encode() + b"\n"
                await asyncio.sleep(0)
        finally:
            served.scans.end(turn)

    return _Streamed(lines(), served, turn)


class _Streamed(StreamingResponse):
    """Gives the turn back even if the client has left before the first line."""

    def __init__(self, content: AsyncIterator[bytes], served: Served, turn: Any) -> None:
        super().__init__(content, media_type="application/x-ndjson")
        self.served, self.turn = served, turn

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.served.scans.end(self.turn)


@router.delete("/scan")
def cancel(request: Request) -> dict[str, bool]:
    """Cancel the scan that is under way."""
    return {"cancelled": served_of(request).scans.cancel()}
