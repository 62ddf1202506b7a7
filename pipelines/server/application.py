"""The server as one ASGI application, and how it is run."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from curation.audit.words import visible
from curation.errors import UserError
from pipelines.run_directory import RunDirectory
from pipelines.server import api, desk, pages, stage_pages
from pipelines.server.guard import Guard
from pipelines.server.metrics import Metrics
from pipelines.server.served import Served, Settings

THREADS = 16


def application(run: str, settings: Settings | None = None) -> Any:
    """The guarded ASGI application of a run directory. Raises UserError for what cannot be served."""
    settings = settings or Settings()
    app = FastAPI(
        title="curate serve",
        description="What a run did to which images. Every list has a bounded page and a cursor.",
        version="1",
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
    )
    app.state.served = Served(RunDirectory(run), settings)
    app.state.metrics = Metrics()
    app.include_router(api.router)
    app.include_router(pages.router)
    app.include_router(stage_pages.router)
    app.include_router(desk.router)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(UserError, _sentence)
    guard = Guard(app, settings.token, settings.hosts, app.state.metrics)
    app.state.guard = guard
    return guard


def run(application: Any, host: str, port: int) -> None:
    """Answer until stopped."""
    import uvicorn

    uvicorn.run(
        application,
        host=host,
        port=port,
        log_level="warning",
        server_header=False,
        date_header=False,
        limit_concurrency=256,
        h11_max_incomplete_event_size=32 << 10,
        timeout_keep_alive=10,
    )


def _wants_page(request: Request) -> bool:
    return not request.url.path.startswith("/api/") and request.url.path != "/metrics"


def _answer(request: Request, status: int, text: str, detail: Any = None) -> Response:
    if _wants_page(request):
        decision = None
        number = request.url.path.rsplit("/", 1)[-1]
        if status == 410 and number.isascii() and number.isdecimal():
            decision = ("image", number, "this image")
        title = {404: "Not here", 410: "Hidden"}.get(status, "That cannot be")
        try:
            return pages.page(request, "error.html.j2", title, status, text=visible(text, 600), decision=decision)
        except UserError:
            return Response(text, status, media_type="text/plain")
    return JSONResponse({"detail": detail if detail is not None else text}, status)


def _refused(request: Request, error: Any) -> Response:
    return _answer(request, error.status_code, str(error.detail))


def _invalid(request: Request, error: Any) -> Response:
    found = [{"where": [str(p)[:100] for p in e["loc"]], "what": str(e["msg"])[:300]} for e in error.errors()[:10]]
    words = "; ".join(f"{'.'.join(e['where'][1:])}: {e['what']}" for e in found)
    return _answer(request, 422, words, found)


def _sentence(request: Request, error: Any) -> Response:
    return _answer(request, 409 if error.exit_code == 1 else 422, str(error))
