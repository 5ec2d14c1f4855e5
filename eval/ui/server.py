"""The server of `fovea ui`: reads artifacts and answers with pages. It writes nothing, and shows only what is under its
root or was an input of that."""

from __future__ import annotations

import functools
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from eval.report.explain import explain
from eval.report.templating import PAGE, render_template
from eval.ui import pages
from eval.ui.catalog import Catalog
from eval.ui.search import Searcher, thumbnails
from infra.artifacts.artifact import Artifact
from infra.corpus.corpus import Corpus
from infra.errors import UserError

# Nothing of a page runs, not even of one that an artifact holds; what it shows comes from this server or from itself.
_POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}
_TYPES = {
    ".html": "text/html",
    ".png": "image/png",
    ".json": "application/json",
    ".md": "text/plain",
    ".txt": "text/plain",
}
_LARGEST_PAGE, _LARGEST_IMAGE = 1 << 28, 1 << 25  # bytes
_SIDES = {96, 512}
_HITS = 48

Answer = Callable[[Request], Response]


class UiServer:
    """Answers to requests about the artifacts under a root."""

    def __init__(self, root: str) -> None:
        self.catalog = Catalog(root)
        self._corpus = functools.lru_cache(16)(lambda id: Corpus.from_artifact(self._known(id, "corpus")))
        self._searcher = functools.lru_cache(4)(lambda id: Searcher(self._known(id, "embeddings")))

    def index(self, request: Request) -> Response:
        return _page("ui_index", **pages.index(self.catalog, dict(request.query_params)))

    def artifact(self, request: Request) -> Response:
        return _page("ui_artifact", **pages.artifact(self.catalog, self._asked(request)))

    def compare(self, request: Request) -> Response:
        chosen = [self._known(id) for id in request.query_params.getlist("id")]
        if len(chosen) < 2:
            raise HTTPException(400, "choose two artifacts or more to compare them")
        return _page("ui_compare", **pages.comparison(self.catalog, chosen))

    def file(self, request: Request) -> Response:
        """A file that a manifest names, and only such a one."""
        artifact, path = self._asked(request), request.path_params["path"]
        entry = next((file for file in artifact.manifest.files if file.path == path), None)
        if entry is None:
            raise HTTPException(404, f"{path}: not a file of this artifact")
        suffix = f".{path.rpartition('.')[2]}"
        if suffix not in _TYPES or entry.bytes > _LARGEST_PAGE:
            raise HTTPException(404, f"{path}: no page; its URL is {artifact.url_of(path)}")
        return Response(artifact.read_bytes(path), media_type=_TYPES[suffix])

    def images(self, request: Request) -> Response:
        """The images of a corpus, or of a selection with their verdicts, some at a time."""
        artifact = self._asked(request, "corpus", "selection")
        return _page("ui_images", **pages.images(artifact, self._corpus, dict(request.query_params)))

    def thumbnail(self, request: Request) -> Response:
        corpus = self._corpus(self._asked(request, "corpus").id)
        row, asked = request.path_params["row"], request.query_params.get("side", "96")
        side = int(asked) if asked.isdecimal() else 0
        if row >= len(corpus) or side not in _SIDES:
            raise HTTPException(404, "no such image")
        (data,) = thumbnails(corpus, [row], side)
        return Response(data, media_type="image/webp", headers={"Cache-Control": "max-age=86400"})

    def explain_image(self, request: Request) -> Response:
        """What became of one image in a selection."""
        artifact = self._asked(request, "selection")
        return _page("explain", story=explain(artifact.url, request.query_params.get("key", "")))

    def search(self, request: Request, image: bytes | None = None) -> Response:
        asked = dict(request.query_params)
        searchable = [each for each in self.catalog.artifacts() if each.manifest.stage == "embed"]
        if not searchable:
            raise HTTPException(404, "no embeddings under this root; run fovea embed")
        id = asked.get("in", max(searchable, key=lambda each: each.metrics["images"]).id)
        searcher = self._searcher(id)
        hits = _hits(searcher, asked, image)
        found = pages.search(searchable, self._known(id), searcher, asked, hits)
        return _page("ui_search", **found)

    def _asked(self, request: Request, *kinds: str) -> Artifact:
        return self._known(request.path_params["id"], *kinds)

    def _known(self, id: str, *kinds: str) -> Artifact:
        artifact = self.catalog.find(id)
        if artifact is None or (kinds and artifact.manifest.kind not in kinds):
            raise HTTPException(
                404, f"{id}: no {' or '.join(kinds) or 'artifact'} of this id under {self.catalog.root}"
            )
        return artifact


def _hits(searcher: Searcher, asked: dict[str, str], image: bytes | None) -> list[Any] | None:
    if image is not None:
        return searcher.search_by_image(image, _HITS)
    if text := asked.get("text", "").strip():
        return searcher.search_by_text(text, _HITS)
    if key := asked.get("key", "").strip():
        row = searcher.row_of(key)
        if row is None:
            raise HTTPException(404, f"{key}: no image of this key in the corpus")
        return searcher.search_by_row(row, _HITS)
    return None


def _page(template: str, **values: Any) -> Response:
    return HTMLResponse(render_template(template, **values))


def make_app(root: str, hosts: list[str]) -> Starlette:
    """The application.

    Args:
        hosts: names by which it may be called; others are refused, so that no page elsewhere can have it read for it.
    """
    browser = UiServer(root)
    artifact = "/artifacts/{id:str}"
    routes = [
        Route("/", _answered(browser.index)),
        Route("/compare", _answered(browser.compare)),
        Route("/search", _answered(browser.search)),
        Route("/search", _uploaded(browser), methods=["POST"]),
        Route(artifact, _answered(browser.artifact)),
        Route(f"{artifact}/page", _to_page),
        Route(f"{artifact}/files/{{path:path}}", _answered(browser.file)),
        Route(f"{artifact}/images", _answered(browser.images)),
        Route(f"{artifact}/images/{{row:int}}", _answered(browser.thumbnail)),
        Route(f"{artifact}/explain", _answered(browser.explain_image)),
    ]
    handlers: dict[Any, Any] = {HTTPException: _refused, UserError: _mistaken}
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


def _answered(answer: Answer) -> Callable[[Request], Awaitable[Response]]:
    """In a thread, for storage may be slow; with the headers that every answer has."""

    async def handle(request: Request) -> Response:
        response = await run_in_threadpool(answer, request)
        response.headers.update({name: value for name, value in _HEADERS.items() if name not in response.headers})
        return response

    return handle


def _uploaded(browser: UiServer) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        _refuse_strangers(request)
        async with request.form(max_files=1, max_fields=4, max_part_size=_LARGEST_IMAGE) as form:
            file = form.get("image")
            if not isinstance(file, UploadFile):
                raise HTTPException(400, "give an image")
            data = await file.read()
        return await _answered(lambda asked: browser.search(asked, data))(request)

    return handle


def _refuse_strangers(request: Request) -> None:
    """Before anything is read: what is too large, and what another site's page sends."""
    length = request.headers.get("content-length", "")
    if not length.isdecimal() or int(length) > _LARGEST_IMAGE:
        raise HTTPException(413, "give an image of at most 32 MB")
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise HTTPException(403, "searches are asked from this site's own page")


async def _to_page(request: Request) -> Response:
    return RedirectResponse(f"/artifacts/{request.path_params['id']}/files/{PAGE}")


def _refused(request: Request, error: HTTPException) -> Response:
    return HTMLResponse(
        render_template("ui_message", message=error.detail), status_code=error.status_code, headers=_HEADERS
    )


def _mistaken(request: Request, error: UserError) -> Response:
    return HTMLResponse(render_template("ui_message", message=str(error)), status_code=422, headers=_HEADERS)


def serve(root: str, host: str, port: int, names: Sequence[str]) -> None:
    """Serve until interrupted.

    Args:
        names: by which it may be called beside its address and this machine's name.

    Raises:
        UserError: the root is not there, or the address is not to be had.
    """
    import uvicorn

    Catalog(root).artifacts()
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port: {port}: ports are 0 to 65535")
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"{host}:{port}: {error.strerror}; give another --port or --host") from None
    # The middleware cuts names at the first colon; an address of IPv6 is no name that a page elsewhere could take on.
    app = make_app(root, ["localhost", "127.0.0.1", "[", host, socket.gethostname(), *names])
    print(f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
