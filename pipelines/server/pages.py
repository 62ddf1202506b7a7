"""The frame that all pages share, and the pages that are of no stage: overview, search, images, progress."""

from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from curation.audit.words import visible
from pipelines.server import asked, listings, rendering
from pipelines.server.asked import ID_MAX, After, Id, served_of
from pipelines.server.shown import name_of
from pipelines.server.subjects import images as subject
from pipelines.server.subjects import overview as first

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)
PAGE = 48


def page(request: Request, template: str, title: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A page in the frame that all share."""
    served = served_of(request)
    path = request.url.path
    now = path + (f"?{request.url.query}" if request.url.query else "")
    html = rendering.render(
        template,
        title=visible(title, 120),
        run_name=visible(served.run.root.rstrip("/").rsplit("/", 1)[-1], 60),
        menu=first.menu(served),
        here=values.pop("here", path),
        now=now[:2000],
        first=values.pop("first", path),
        state=served.state,
        author=served.settings.author,
        **values,
    )
    return HTMLResponse(html.encode("utf-8", "replace"), status)


def onward(request: Request, **changed: Any) -> str:
    """The address of this page with other values in its query."""
    query = {k: v for k, v in request.query_params.items() if k not in changed}
    query |= {k: v for k, v in changed.items() if v is not None}
    return f"{request.url.path}?{urlencode(query)}" if query else str(request.url.path)


@router.get("/")
def overview(request: Request) -> HTMLResponse:
    served = served_of(request)
    if served.opened is None:
        return progress(request)
    return page(request, "overview.html.j2", "Overview", **first.page(served))


@router.get("/search")
def search(request: Request, q: Annotated[str, Query(max_length=2000)] = "") -> Response:
    """Goes to what is meant: an image by its id, a hash, a URL, a host, else words of the alt text."""
    index, text = asked.index_of(request), q.strip()
    if not text:
        return RedirectResponse("/images", 303)
    if text.isascii() and text.isdecimal() and int(text[:21]) <= ID_MAX and index.rows_of_one(int(text[:21])) >= 0:
        return RedirectResponse(f"/image/{int(text)}", 303)
    found = index.by_hash(text, PAGE)
    if found:
        return page(
            request,
            "images.html.j2",
            "Images with this hash",
            images=found,
            q=text,
            lead=text,
            here="/images",
            next=None,
        )
    if "://" in text:
        return RedirectResponse("/images?" + urlencode({"url": text}), 303)
    if "host" in index.groups and " " not in text and index.groups["host"].size(index.key("host", text.lower())):
        return RedirectResponse("/images?" + urlencode({"host": text.lower()}), 303)
    return RedirectResponse("/images?" + urlencode({"words": text}), 303)


@router.get("/images")
def images(request: Request, after: After = None) -> HTMLResponse:
    index = asked.index_of(request)
    filters = asked.filters_of(index, request)
    found = index.listed(filters, after, PAGE, index.tiles)
    given = {k: v for k, v in request.query_params.items() if k != "after"}
    return page(
        request,
        "images.html.j2",
        "Images",
        searching=True,
        given=given,
        images=found.images,
        count=subject.total(found),
        empty=subject.nothing(filters, found),
        next=onward(request, after=found.after) if found.after is not None else None,
        first=onward(request, after=None),
        q=given.get("words", ""),
        decision=("host", filters["host"], "this host") if set(filters) == {"host"} and found.images else None,
        **subject.choices(index),
    )


@router.get("/image/{image_id}")
def image(request: Request, image_id: Id) -> HTMLResponse:
    index = asked.index_of(request)
    row = asked.one_of(index, image_id)
    return page(request, "image.html.j2", name_of(row), here="/images", **subject.image(index, row))


@router.get("/progress")
def progress(request: Request) -> HTMLResponse:
    live = served_of(request).live()
    running = live["driver"] is not None
    return page(
        request,
        "progress.html.j2",
        "Progress",
        live=live,
        here="/progress",
        lead="A process is at work on the run; this page looks again every 5 seconds."
        if running
        else "No process is at work on the run.",
        failures=listings.stage_failures(live),
        again=5 if running or served_of(request).opened is None else None,
    )
