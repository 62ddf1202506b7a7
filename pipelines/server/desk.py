"""What only a server can do: more like this, scans, decisions, two runs compared; and how one gets in."""

from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException

from pipelines import decisions
from pipelines.decisions import Decision
from pipelines.server import alike, api, asked, listings, rendering
from pipelines.server.asked import ID_MAX, Id, Start, Text, served_of
from pipelines.server.guard import COOKIE
from pipelines.server.opened import Opened
from pipelines.server.pages import PAGE, onward, page
from pipelines.server.pictures import Unavailable
from pipelines.server.rendering import number

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)


@router.get("/like")
def like(request: Request, id: Text = None, space: Text = None) -> HTMLResponse:
    index = asked.index_of(request)
    if not id:
        return _like(request, index, space)
    if not id.isascii() or not id.isdecimal() or len(id) > 20 or int(id) > ID_MAX:
        return _like(request, index, space, problem="An image id is a number.", status=422)
    try:
        row = asked.one_of(index, int(id))
        found = alike.similar_to(index, space, PAGE, image_id=int(id))
    except HTTPException as error:
        return _like(request, index, space, problem=str(error.detail), status=error.status_code)
    return _like(request, index, space, found=found, query=row)


@router.post("/like")
def like_upload(
    request: Request, file: Annotated[UploadFile, File()], space: Annotated[str | None, Form(max_length=200)] = None
) -> HTMLResponse:
    index = asked.index_of(request)
    try:
        found = api.similar_to_upload(request, file, space, PAGE)
    except HTTPException as error:
        return _like(request, index, space, problem=str(error.detail), status=error.status_code)
    return _like(request, index, space, found=found)


def _like(
    request: Request,
    index: Opened,
    space: str | None,
    found: dict[str, Any] | None = None,
    query: dict[str, Any] | None = None,
    problem: str = "",
    status: int = 200,
) -> HTMLResponse:
    rows = None
    lead = "Images whose vectors point the same way. The nearest cells of the index are read, not the run."
    if found is not None:
        ids = [int(entry["image_id"]) for entry in found["images"]]
        cosines = {int(e["image_id"]): e["similarity_to_query"] for e in found["images"]}
        rows = [row | {"note": f"{cosines[int(row['image_id'])]:.3f}"} for row in index.some(ids, index.tiles)]
        lead = (
            f"{number(found['cells_read'])} of {number(found['cells'])} cells were read; measured so, "
            f"{found['recall']:.1%} of the ten nearest are found."
        )
    return page(
        request,
        "like.html.j2",
        "More like this",
        status,
        spaces=list(index.spaces),
        space=(found or {}).get("space") or space or (alike.space_of(index, None) if index.spaces else ""),
        found=rows,
        query=query,
        asked=query["image_id"] if query else "",
        problem=problem,
        lead=lead,
    )


@router.get("/scan")
def scan(request: Request) -> HTMLResponse:
    return page(request, "scan.html.j2", "Scan", running=served_of(request).scans.running)


@router.get("/decisions")
def decided(request: Request, start: Start = 0) -> HTMLResponse:
    served = served_of(request)
    rows, total = decisions.listed(served.run.root, start, PAGE)
    return page(
        request, "subject.html.j2", "Decisions", **listings.decided(served, rows, total, start, onward, request)
    )


@router.post("/decide")
def decide(
    request: Request,
    action: Annotated[str, Form(max_length=20)],
    scope: Annotated[str, Form(max_length=20)],
    target: Annotated[str, Form(max_length=400)],
    author: Annotated[str, Form(max_length=100)] = "",
    note: Annotated[str, Form(max_length=2000)] = "",
    back: Annotated[str, Form(max_length=2000)] = "/decisions",
) -> Response:
    served = served_of(request)
    served.decide(Decision(action, scope, target, author.strip() or served.settings.author, note))
    local = back.startswith("/") and not back.startswith(("//", "/\\")) and back.isprintable()
    gone = action == "drop" and scope in ("image", "component")
    return RedirectResponse("/decisions" if gone or not local else back, 303)


@router.get("/compare")
def compare(request: Request) -> HTMLResponse:
    return page(request, "subject.html.j2", "Two runs compared", **listings.compared(served_of(request)))


@router.get("/compare/{side}")
def compared(request: Request, side: str, start: Start = 0) -> HTMLResponse:
    served = served_of(request)
    if side not in ("entered", "left"):
        raise HTTPException(404, "entered or left")
    comparison = served.compared()
    rows, total = comparison.images(side, start, PAGE)
    return page(
        request,
        "images.html.j2",
        f"Images that {side}",
        crumbs=[("Two runs compared", "/compare")],
        here="/compare",
        lead=f"{number(total)} images that only {'this run' if side == 'entered' else 'the other run'} has.",
        images=listings.compared_rows(served, side, rows),
        next=onward(request, start=start + PAGE) if start + PAGE < total else None,
        empty="None.",
    )


@router.get("/compare/left/{image_id}/thumbnail")
def left_thumbnail(request: Request, image_id: Id) -> Response:
    """An image of the other run."""
    served = served_of(request)
    row = served.compared().left_row(image_id)
    if row is None:
        raise HTTPException(404, "not among what left")
    try:
        return asked.picture(served.pictures.small(row, served.compared().other.root), "image/webp")
    except Unavailable as error:
        raise HTTPException(404, str(error)) from error


@router.get("/api")
def described(request: Request) -> HTMLResponse:
    return page(request, "subject.html.j2", "The API", **listings.described(request.app.openapi()))


@router.get("/login")
def login(request: Request) -> HTMLResponse:
    return HTMLResponse(rendering.render("login.html.j2", wrong=False))


@router.post("/login")
def log_in(request: Request, token: Annotated[str, Form(max_length=400)] = "") -> Response:
    guard = request.app.state.guard
    if not guard.accepts(token):
        return HTMLResponse(rendering.render("login.html.j2", wrong=True), 401)
    answer = RedirectResponse("/", 303)
    answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=request.url.scheme == "https", path="/")
    return answer


@router.get("/static/{name}")
def static(request: Request, name: str) -> Response:
    found = rendering.static(name)
    if found is None:
        raise HTTPException(404, "no such file")
    return Response(found[0], media_type=found[1], headers={"cache-control": "private, max-age=300"})


@router.get("/metrics")
def metrics(request: Request) -> Response:
    text, kind = request.app.state.metrics.text(served_of(request))
    return Response(text, media_type=kind)
