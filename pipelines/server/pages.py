"""The pages for people: the subjects of the static report over all rows, and what only a server can show."""

from typing import Annotated, Any
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException

from curation.audit.words import visible
from pipelines.server import api, figures, listings, rendering
from pipelines.server.api import FAR, ID_MAX, After, Id, Start, Text, served_of
from pipelines.server.rendering import number, score
from pipelines.server.shown import name_of

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)
PAGE = 48
CARDS, CARD_TILES = 24, 4
ROWS = 100
Cluster = Annotated[int, Query(ge=0, le=(1 << 31) - 1)]


def page(request: Request, template: str, title: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A page in the frame that all share."""
    served = served_of(request)
    path = request.url.path
    now = path + (f"?{request.url.query}" if request.url.query else "")
    html = rendering.render(
        template,
        title=visible(title, 120),
        run_name=visible(served.run.root.rstrip("/").rsplit("/", 1)[-1], 60),
        menu=figures.menu(served),
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
    return page(request, "overview.html.j2", "Overview", **figures.overview(served))


@router.get("/search")
def search(request: Request, q: Annotated[str, Query(max_length=2000)] = "") -> Response:
    """Goes to what is meant: an image by its id, a hash, a URL, a host, else words of the alt text."""
    index, text = api.index_of(request), q.strip()
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
    index = api.index_of(request)
    filters = api.filters_of(index, request)
    found = index.listed(filters, after, PAGE, index.tiles)
    given = {k: v for k, v in request.query_params.items() if k != "after"}
    return page(
        request,
        "images.html.j2",
        "Images",
        searching=True,
        given=given,
        images=found.images,
        count=figures.counted(found),
        empty=figures.nothing(filters, found),
        next=onward(request, after=found.after) if found.after is not None else None,
        first=onward(request, after=None),
        q=given.get("words", ""),
        decision=("host", filters["host"], "this host") if set(filters) == {"host"} and found.images else None,
        **figures.choices(index),
    )


@router.get("/image/{image_id}")
def image(request: Request, image_id: Id) -> HTMLResponse:
    index = api.index_of(request)
    row = api.one_of(index, image_id)
    return page(request, "image.html.j2", name_of(row), here="/images", **figures.image(index, row))


@router.get("/duplicates")
def duplicates(request: Request, start: Start = 0) -> HTMLResponse:
    index = api.index_of(request)
    rows = index.rows("components", start, CARDS)
    total = len(index.lists["components"]) if "components" in index.lists else 0
    cards = [
        figures.Card(
            f"/component/{r['component_id']}",
            f"{number(r['images'])} images",
            f"{number(r['kept'])} kept · least cosine to another {score(r['least']) or '–'}",
            figures.first_of(index, "component", r["component_id"], CARD_TILES),
        )
        for r in rows
    ]
    return page(
        request,
        "cards.html.j2",
        "Near copies",
        lead=f"{number(total)} components of several images, the largest first. One image of each stays.",
        charts=figures.duplicate_charts(served_of(request)) if start == 0 else [],
        links=[
            (
                "Images around the threshold",
                "/scores/similarity?value=" + figures.threshold(served_of(request), "threshold"),
            )
        ]
        if "similarity" in index.orders
        else [],
        cards=cards,
        empty="No two images are near copies.",
        next=onward(request, start=start + CARDS) if start + CARDS < total else None,
    )


@router.get("/component/{component_id}")
def component(request: Request, component_id: Id, after: After = None) -> HTMLResponse:
    index = api.index_of(request)
    found = index.listed({"component": component_id}, after, PAGE, index.tiles)
    if not found.images and after is None:
        found = index.listed({"chain": component_id}, after, PAGE, index.tiles)
    rows = found.images or [api.one_of(index, component_id)]
    for row in rows:
        row |= {"note": score(row.get("similarity")), "mark": "kept" if row.get("kept") else ""}
    return page(
        request,
        "images.html.j2",
        f"Component {component_id}",
        crumbs=[("Near copies", "/duplicates")],
        here="/duplicates",
        lead="The number is the cosine to the nearest other image of the pool.",
        images=rows,
        count=figures.counted(found),
        decision=("component", component_id, "this component"),
        next=onward(request, after=found.after) if found.after is not None else None,
    )


@router.get("/decontamination")
def decontamination(request: Request, start: Start = 0) -> HTMLResponse:
    index = api.index_of(request)
    rows = index.rows("chains", start, CARDS)
    total = len(index.lists["chains"]) if "chains" in index.lists else 0
    cards = [
        figures.Card(
            f"/chain/{r['reference_component_id']}",
            f"{number(r['images'])} images dropped",
            f"{number(r['direct'])} match a reference image directly",
            figures.first_of(index, "chain", r["reference_component_id"], CARD_TILES),
        )
        for r in rows
    ]
    sets = index.document.get("references", [])
    return page(
        request,
        "cards.html.j2",
        "Decontamination",
        lead="Components that hold an image of an evaluation set are dropped whole; the largest first.",
        links=[
            (
                f"{visible(s['name'], 60)}: {number(s['images'])} direct matches",
                f"/reference/{quote(s['name'], safe='')}",
            )
            for s in sets
        ],
        cards=cards,
        empty="Nothing matches a reference set.",
        next=onward(request, start=start + CARDS) if start + CARDS < total else None,
    )


@router.get("/chain/{component_id}")
def chain(request: Request, component_id: Id, after: After = None) -> HTMLResponse:
    index = api.index_of(request)
    found = index.listed({"chain": component_id}, after, PAGE, index.tiles)
    figures.with_matches(index, found.images)
    return page(
        request,
        "images.html.j2",
        f"Dropped together, component {component_id}",
        crumbs=[("Decontamination", "/decontamination")],
        here="/decontamination",
        images=found.images,
        count=figures.counted(found),
        empty="No image of this run was dropped with it.",
        next=onward(request, after=found.after) if found.after is not None else None,
    )


@router.get("/reference/{name:path}")
def reference(request: Request, name: str, start: Start = 0) -> HTMLResponse:
    index = api.index_of(request)
    found = index.ranked("matches", name[:400], start, PAGE // 2, table=index.tiles)
    pairs = figures.with_matches(index, found.images, name)
    return page(
        request,
        "images.html.j2",
        f"Matches of {name[:100]}",
        crumbs=[("Decontamination", "/decontamination")],
        here="/decontamination",
        lead="Each match stands before the reference image it is most similar to.",
        images=pairs,
        count=figures.counted(found),
        empty="No image matches it.",
        next=onward(request, start=found.after) if found.after is not None else None,
        first=onward(request, start=None),
    )


@router.get("/clusters")
def clusters(request: Request, level: Annotated[int, Query(ge=1, le=20)] = 1, start: Start = 0) -> HTMLResponse:
    index = api.index_of(request)
    name = f"clusters_{level}"
    total = len(index.lists[name]) if name in index.lists else 0
    cards = [figures.cluster_card(index, level, row) for row in index.rows(name, start, CARDS)]
    return page(
        request,
        "cards.html.j2",
        "Clusters",
        lead=f"{number(total)} clusters of level {level}, the largest first.",
        links=[(f"Level {k}", f"/clusters?level={k}") for k in range(1, index.levels + 1)],
        charts=[
            (
                "Centroids on their two principal axes; of the darker ones more was chosen than on the whole",
                figures.cluster_map(index, level),
            )
        ]
        if start == 0 and total
        else [],
        cards=cards,
        empty="The run has no clusters of this level.",
        next=onward(request, start=start + CARDS) if start + CARDS < total else None,
    )


@router.get("/cluster/{level}/{cluster}")
def cluster(
    request: Request, level: int, cluster: int, start: Start = 0, after: After = None, farthest: bool = False
) -> HTMLResponse:
    index = api.index_of(request)
    if not 1 <= level <= 20 or not 0 <= cluster < 1 << 31:
        raise HTTPException(404, "no such cluster")
    if level == 1:
        found = index.ranked("near", cluster, start, PAGE, farthest, index.tiles)
        for row in found.images:
            row["note"] = score(row.get("distance"))
        following = onward(request, start=found.after) if found.after is not None else None
    else:
        found = index.listed({f"cluster_{level}": cluster}, after, PAGE, index.tiles)
        following = onward(request, after=found.after) if found.after is not None else None
    links = [("Nearest to the centroid", f"/cluster/1/{cluster}"), ("Farthest", f"/cluster/1/{cluster}?farthest=1")]
    return page(
        request,
        "images.html.j2",
        f"Cluster {level}:{cluster}",
        crumbs=[("Clusters", f"/clusters?level={level}")],
        here="/clusters",
        lead="The number is the distance to the centroid." if level == 1 else "",
        links=(links if level == 1 else []) + figures.family(index, level, found.images),
        images=found.images,
        count=figures.counted(found),
        empty="No image is in this cluster.",
        decision=("cluster", f"{level}:{cluster}", "this cluster") if found.images else None,
        next=following,
        first=f"/cluster/{level}/{cluster}",
    )


@router.get("/retrieval")
def retrieval(request: Request, start: Start = 0, seed_set: Text = None) -> HTMLResponse:
    index = api.index_of(request)
    return page(request, "cards.html.j2", "Retrieval", **figures.retrieval(index, request, start, seed_set, onward))


@router.get("/seed/{image_id}")
def seed(request: Request, image_id: Id, start: Start = 0) -> HTMLResponse:
    index = api.index_of(request)
    rows, total = index.retrieved("seed", image_id, start, PAGE)
    known = {
        int(row["image_id"]): row for row in index.some([image_id, *(int(r["image_id"]) for r in rows)], index.tiles)
    }
    found = [
        known[int(r["image_id"])] | {"note": f"{r['rank'] + 1} · {score(r['similarity'])}"}
        for r in rows
        if int(r["image_id"]) in known
    ]
    return page(
        request,
        "images.html.j2",
        f"Drawn by seed {image_id}",
        crumbs=[("Retrieval", "/retrieval")],
        here="/retrieval",
        lead="Rank and cosine to the seed, which stands first.",
        images=([known[image_id] | {"note": "the seed"}] if image_id in known and not start else []) + found,
        count=f"{number(total)} retrievals",
        next=onward(request, start=start + PAGE) if start + PAGE < total else None,
    )


@router.get("/filters")
def filters(request: Request) -> HTMLResponse:
    index = api.index_of(request)
    return page(request, "table.html.j2", "Filters", **listings.filters(served_of(request), index))


@router.get("/scores/{name}")
def scores(
    request: Request,
    name: str,
    value: Annotated[float, Query(ge=-1e9, le=1e9)] = 0.0,
    after: Annotated[int | None, Query(ge=0, le=FAR)] = None,
    down: bool = False,
) -> HTMLResponse:
    index = api.index_of(request)
    if name not in index.orders:
        raise HTTPException(404, "no such score")
    found = index.scored(name, value, after, PAGE, down, index.tiles)
    for row in found.images:
        row["note"] = score(row["score"])
    words = figures.SCORE_NAMES.get(name, name)
    return page(
        request,
        "images.html.j2",
        f"{words}, {'down' if down else 'up'} from {score(value)}",
        crumbs=[("Filters", "/filters")],
        here="/filters",
        chart=figures.score_chart(served_of(request), index, name),
        links=[("Upwards", onward(request, down=None, after=None)), ("Downwards", onward(request, down=1, after=None))],
        images=found.images,
        empty="No image lies there.",
        next=onward(request, after=found.after) if found.after is not None else None,
        first=onward(request, after=None),
    )


@router.get("/failures")
def failures(request: Request, start: Start = 0) -> HTMLResponse:
    index = api.index_of(request)
    return page(request, "table.html.j2", "Failures", **listings.failures(index, start, request, onward))


@router.get("/balance")
def balance(request: Request) -> HTMLResponse:
    index = api.index_of(request)
    return page(request, "table.html.j2", "Balance", **listings.balance(index))


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
