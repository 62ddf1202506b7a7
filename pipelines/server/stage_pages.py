"""The pages of the stages over all rows: near copies, decontamination, clusters, retrieval, filters, ..."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException

from pipelines.server import asked
from pipelines.server.asked import FAR, After, Id, Start, Text, served_of
from pipelines.server.pages import PAGE, onward, page
from pipelines.server.rendering import score
from pipelines.server.subjects import (
    CARDS,
    TABLE,
    Values,
    balance,
    by_id,
    clusters,
    counted,
    decontamination,
    duplicates,
    failures,
    filters,
    retrieval,
)
from pipelines.server.subjects.images import matches, total

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)


def subject(request: Request, title: str, values: Values, start: int = 0, step: int = CARDS) -> HTMLResponse:
    """A page of sections; `total` of the values: how many entries its list has, `step` of them on each page."""
    more = start + step < values.pop("total", 0)
    following = onward(request, start=start + step) if more else None
    return page(request, "subject.html.j2", title, next=following, first=onward(request, start=None), **values)


@router.get("/duplicates")
def duplicates_page(request: Request, start: Start = 0) -> HTMLResponse:
    index = asked.index_of(request)
    return subject(request, "Near copies", duplicates.page(served_of(request), index, start), start)


@router.get("/component/{component_id}")
def component_page(request: Request, component_id: Id, after: After = None) -> HTMLResponse:
    index = asked.index_of(request)
    found = index.listed({"component": component_id}, after, PAGE, index.tiles)
    if not found.images and after is None:
        found = index.listed({"chain": component_id}, after, PAGE, index.tiles)
    rows = found.images or [asked.one_of(index, component_id)]
    pair, chain = duplicates.component(served_of(request), index, component_id) if after is None else ([], [])
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
        count=total(found),
        before=pair,
        after=chain,
        decision=("component", component_id, "this component"),
        next=onward(request, after=found.after) if found.after is not None else None,
    )


@router.get("/decontamination")
def decontamination_page(request: Request, start: Start = 0) -> HTMLResponse:
    index = asked.index_of(request)
    return subject(request, "Decontamination", decontamination.page(served_of(request), index, start), start)


@router.get("/chain/{component_id}")
def chain_page(request: Request, component_id: Id, after: After = None) -> HTMLResponse:
    index = asked.index_of(request)
    found = index.listed({"chain": component_id}, after, PAGE, index.tiles)
    return page(
        request,
        "images.html.j2",
        f"Dropped together, component {component_id}",
        crumbs=[("Decontamination", "/decontamination")],
        here="/decontamination",
        lead="Beside each image the reference image that it matches; those without one hang on by other images.",
        pairs_of=matches(index, found.images),
        count=total(found),
        empty="No image of this run was dropped with it.",
        next=onward(request, after=found.after) if found.after is not None else None,
    )


@router.get("/reference/{name:path}")
def reference_page(request: Request, name: str, start: Start = 0) -> HTMLResponse:
    index = asked.index_of(request)
    found = index.ranked("matches", name[:400], start, PAGE // 2, table=index.tiles)
    known = next((s for s in index.document.get("references", []) if s["name"] == name), None)
    charts = [decontamination.chart(served_of(request), known)] if known and start == 0 else []
    return page(
        request,
        "images.html.j2",
        f"Matches of {name[:100]}",
        crumbs=[("Decontamination", "/decontamination")],
        here="/decontamination",
        lead="Each match beside the reference image it is most similar to, the most similar first.",
        before=[{"label": "Other thresholds", "charts": charts}] if charts else [],
        pairs_of=matches(index, found.images, name),
        count=total(found),
        empty="No image matches it.",
        next=onward(request, start=found.after) if found.after is not None else None,
        first=onward(request, start=None),
    )


@router.get("/clusters")
def clusters_page(
    request: Request,
    level: Annotated[int, Query(ge=1, le=20)] = 1,
    start: Start = 0,
    inside: Annotated[int | None, Query(ge=0, le=(1 << 31) - 1)] = None,
) -> HTMLResponse:
    return subject(request, "Clusters", clusters.page(asked.index_of(request), level, start, inside), start)


@router.get("/cluster/{level}/{cluster}")
def cluster_page(
    request: Request, level: int, cluster: int, start: Start = 0, after: After = None, farthest: bool = False
) -> HTMLResponse:
    index = asked.index_of(request)
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
    held = index.cluster(level, cluster)
    if held is None and not found.images:
        raise HTTPException(404, "no such cluster")
    lead, above, sections = clusters.cluster(index, level, held) if held else ("", [], [])
    ends = [("From the nearest to the centroid", ""), ("From the farthest", "?farthest=1")] if level == 1 else []
    return page(
        request,
        "images.html.j2",
        f"Cluster {level}:{cluster}",
        crumbs=[("Clusters", f"/clusters?level={level}")],
        here="/clusters",
        lead=lead,
        before=sections if not start and after is None and not farthest else [],
        links=[*above, *((words, f"/cluster/1/{cluster}{query}") for words, query in ends)],
        images=found.images,
        count=total(found) + (". The number is the distance to the centroid." if level == 1 and found.images else ""),
        empty="No image is in this cluster.",
        decision=("cluster", f"{level}:{cluster}", "this cluster") if found.images else None,
        next=following,
        first=f"/cluster/{level}/{cluster}",
    )


@router.get("/retrieval")
def retrieval_page(request: Request, start: Start = 0, seed_set: Text = None) -> HTMLResponse:
    values = retrieval.page(served_of(request), asked.index_of(request), start, seed_set)
    frame = {"crumbs": [("Retrieval", "/retrieval")], "here": "/retrieval"} if seed_set else {}
    return subject(request, f"Seed set {seed_set[:100]}" if seed_set else "Retrieval", values | frame, start)


@router.get("/seed/{image_id}")
def seed_page(request: Request, image_id: Id, start: Start = 0) -> HTMLResponse:
    index = asked.index_of(request)
    rows, drawn = index.retrieved("seed", image_id, start, PAGE)
    known = by_id(index, [image_id, *(r["image_id"] for r in rows)])
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
        count=counted(drawn, "retrieval"),
        next=onward(request, start=start + PAGE) if start + PAGE < drawn else None,
    )


@router.get("/filters")
def filters_page(request: Request) -> HTMLResponse:
    return subject(request, "Filters", filters.page(served_of(request), asked.index_of(request)))


@router.get("/scores/{name}")
def scores_page(
    request: Request,
    name: str,
    value: Annotated[float, Query(ge=-1e9, le=1e9)] = 0.0,
    after: Annotated[int | None, Query(ge=0, le=FAR)] = None,
    down: bool = False,
) -> HTMLResponse:
    index = asked.index_of(request)
    if name not in index.orders:
        raise HTTPException(404, "no such score")
    found = index.scored(name, value, after, PAGE, down, index.tiles)
    for row in found.images:
        row["note"] = score(row["score"])
    copies = name == "similarity"
    words = f"{counted(len(index.orders[name][0]), 'image')} by this score"
    section = {"label": "Histogram", "charts": [(words, filters.chart(served_of(request), index, name))]}
    return page(
        request,
        "images.html.j2",
        f"{filters.title(name)}, {'down' if down else 'up'} from {score(value)}",
        crumbs=[("Near copies", "/duplicates") if copies else ("Filters", "/filters")],
        here="/duplicates" if copies else "/filters",
        before=[section],
        links=[("Upwards", onward(request, down=None, after=None)), ("Downwards", onward(request, down=1, after=None))],
        images=[] if copies else found.images,
        pairs_of=duplicates.beside(index, found.images) if copies else [],
        empty="No image lies there.",
        next=onward(request, after=found.after) if found.after is not None else None,
        first=onward(request, after=None),
    )


@router.get("/failures")
def failures_page(request: Request, start: Start = 0) -> HTMLResponse:
    return subject(request, "Failures", failures.page(asked.index_of(request), start), start, TABLE)


@router.get("/balance")
def balance_page(request: Request) -> HTMLResponse:
    return subject(request, "Balance", balance.page(asked.index_of(request)))
