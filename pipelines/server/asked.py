"""What requests ask and are answered with: parameters, filters, bounded pages, errors that a client can understand."""

from typing import Annotated, Any, Literal

from fastapi import HTTPException, Path, Query, Request, Response
from pydantic import BaseModel, Field

from pipelines.decisions import AUTHOR_CHARACTERS, NOTE_CHARACTERS, TARGET_CHARACTERS
from pipelines.server.opened import Opened, Page
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


def picture(data: bytes, kind: str) -> Response:
    """Bytes that a browser may draw and nothing else."""
    policy = "sandbox; default-src 'none'; style-src 'unsafe-inline'"
    headers = {
        "content-security-policy": policy,
        "content-disposition": "inline; filename=image",
        "cache-control": "private, max-age=3600",
    }
    return Response(data, media_type=kind, headers=headers)
