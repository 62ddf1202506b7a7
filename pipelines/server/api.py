"""The JSON API. Every list has a bounded page and a cursor: `after` or `start` of the page before."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, File, HTTPException, Path, Query, Request, Response, UploadFile
from fastapi.responses import StreamingResponse

from pipelines import decisions
from pipelines.decisions import Decision
from pipelines.server import scans
from pipelines.server.alike import similar_to, space_of
from pipelines.server.asked import (
    FAR,
    SIMILAR_MOST,
    After,
    Asked,
    Decided,
    Entries,
    Id,
    Images,
    Level,
    Limit,
    Start,
    Text,
    entries_of,
    filters_of,
    images_of,
    index_of,
    one_of,
    picture,
    served_of,
)
from pipelines.server.pictures import LARGEST, Unavailable
from pipelines.server.served import Served
from pipelines.server.shown import plain

router = APIRouter(prefix="/api", tags=["api"])


@router.get("/run")
def run(request: Request) -> dict[str, Any]:
    """What the run holds: counts by source, status and reason, seed sets, spaces of vectors and their recall."""
    served = served_of(request)
    index = served.opened
    document = {} if index is None else {k: v for k, v in index.document.items() if k not in ("bytes", "stages")}
    return {"run": served.run.root.rsplit("/", 1)[-1], "state": served.state, "hidden": len(served.hidden), **document}


@router.get("/card")
def card(request: Request) -> dict[str, Any]:
    """The data card of the manifest."""
    found = served_of(request).card
    if found is None:
        raise HTTPException(404, "the run has no manifest")
    return found


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


@router.get("/clusters/{level}/{cluster}")
def cluster(request: Request, level: Level, cluster: Annotated[int, Path(ge=0, le=(1 << 31) - 1)]) -> dict[str, Any]:
    """One cluster: its size, labels, what brought its images, its place on the map."""
    found = index_of(request).cluster(level, cluster)
    if found is None:
        raise HTTPException(404, "no such cluster")
    return plain(found)


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


@router.get("/seed-sets")
def seed_sets(request: Request, start: Start = 0, limit: Limit = 48) -> Entries:
    """What each seed set brought: planned, nominal, unique, colliding, shared; null for what is not known."""
    rows = served_of(request).seed_sets()
    following = start + limit if start + limit < len(rows) else None
    return Entries(entries=rows[start : start + limit], total=len(rows), next=following)


@router.get("/seed-sets/{name}")
def seed_set(request: Request, name: Annotated[str, Path(max_length=400)]) -> dict[str, Any]:
    """How similar what a seed set drew is to its seeds: by mode, quantiles 0.1, 0.5 and 0.9 by rank."""
    curves = {}
    for mode, one in index_of(request).curves(name).items():
        ranks, quantiles = one.curve()
        low, median, high = quantiles.T.tolist()
        curves[mode] = {"rank": ranks.tolist(), "low": low, "median": median, "high": high}
    if not curves:
        raise HTTPException(404, "no such seed set")
    return {"seed_set": name, "curves": curves}


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
