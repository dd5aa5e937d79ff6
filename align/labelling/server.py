"""The page behind FastAPI and uvicorn. :mod:`align.label` starts it and says which addresses it has.

Everything of a person lies below ``/annotate/NAME``: their token, where there is one, is a cookie of that path.
Pictures are asked for by number. No page loads or sends anything anywhere else: the headers below forbid it to the
browser.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import socket
from collections.abc import Callable
from importlib.resources import files
from typing import Any
from urllib.parse import quote

import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.exceptions import HTTPException

from align.common.errors import UserError
from align.labelling.access import Access
from align.labelling.answers import NAME, TAGS, Answer, Refused
from align.labelling.screen import Screen
from align.labelling.session import Session, Showing
from align.labelling.summary import summarize
from rewards.common.command import run_until_stopped
from rewards.common.errors import WriteError
from rewards.data.images import UnreadableError
from rewards.serving.batching import Limits
from rewards.serving.server import check_token, is_loopback, protocol

logger = logging.getLogger(__name__)
AHEAD = 8  # items that a page asks for at once
MOST_ENTRIES = 200
MAX_BODY = 1 << 18
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
COOKIES = ("t2i-align-label", "t2i-align-annotator")  # of the summary, of a person's page
WRONG_TOKEN = "the link has no token, or a wrong one; ask for the whole link"
STATIC = {"label.js": "text/javascript", "label.css": "text/css"}


class Page:
    """The application over a :class:`Session`; ``title`` is of the source, ``fault`` what drawing says of itself."""

    def __init__(
        self, session: Session, access: Access, title: str, fault: Callable[[], str] = lambda: "", local: bool = True
    ) -> None:
        self.session, self.access, self.title, self.fault, self.local = session, access, title, fault, local
        self.screen = Screen(session.items)
        loader = PackageLoader("align.labelling")
        self._templates = Environment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        static = files("align.labelling").joinpath("static")
        self._static = {name: static.joinpath(name).read_bytes() for name in STATIC}
        self._version = hashlib.sha256(b"".join(self._static.values())).hexdigest()[:12]
        self.app = self._application()

    # pages
    def _html(self, template: str, **values: Any) -> HTMLResponse:
        rules = self.session.rules
        text = self._templates.get_template(template).render(
            version=self._version, task=rules.task, tags=TAGS, title=self.title, **values
        )
        return HTMLResponse(text, headers={"Cache-Control": "no-store"})

    def _application(self) -> FastAPI:
        app = FastAPI(openapi_url=None)

        @app.middleware("http")
        async def guard(request: Request, go_on: Callable[[Request], Any]) -> Response:
            host = request.headers.get("Host", "").rsplit(":", 1)[0].strip("[]")
            if self.local and not is_loopback(host):  # a name that some page made lead here
                response: Response = JSONResponse({"error": "this page is for this machine alone"}, 403)
            else:
                response = await go_on(request)
            for name, value in HEADERS.items():
                response.headers.setdefault(name, value)
            response.headers.setdefault("Cache-Control", "no-store")
            return response

        @app.exception_handler(HTTPException)
        async def refuse(request: Request, error: HTTPException) -> Response:
            if "text/html" in request.headers.get("Accept", ""):
                page = self._html("refused.html.j2", reason=error.detail)
                page.status_code = error.status_code
                return page
            return JSONResponse({"error": error.detail}, error.status_code)

        @app.get("/static/{name}")
        def static(name: str) -> Response:
            if name not in STATIC:
                raise HTTPException(404, "there is no such file")
            headers = {"Cache-Control": "public, max-age=31536000, immutable"}
            return Response(self._static[name], media_type=STATIC[name], headers=headers)

        @app.get("/favicon.ico")
        def icon() -> Response:
            return Response(status_code=204)

        @app.get("/")
        def index(request: Request, name: str = "", token: str | None = None) -> Response:
            if moved := self._admit(request, "/", token):
                return moved
            if name:
                self._person(name)
                return RedirectResponse(self.access.link(f"/annotate/{quote(name)}", name), 303)
            people = self.access.names or sorted({answer.annotator for answer in self.session.answers()})
            links = {name: self.access.link(f"/annotate/{quote(name)}", name) for name in people}
            open_to_all = not self.access.names
            return self._html("index.html.j2", links=links, open_to_all=open_to_all, summary="/summary")

        @app.get("/summary")
        def summary(request: Request, token: str | None = None) -> Response:
            if moved := self._admit(request, "/summary", token):
                return moved
            session = self.session
            found = summarize(session.items, session.answers(), session.rules.task)
            return self._html("summary.html.j2", found=found, items=session.items)

        @app.get("/summary/summary.json")
        def figures(request: Request) -> Response:
            self._check(request, "")
            found = summarize(self.session.items, self.session.answers(), self.session.rules.task)
            return JSONResponse(dataclasses.asdict(found))

        @app.get("/summary/picture/{item}/{place}")
        def disputed(request: Request, item: int, place: int) -> Response:
            self._check(request, "")
            return self._picture(item, place, full=False)

        @app.get("/annotate/{name}")
        def annotate(request: Request, name: str, token: str | None = None) -> Response:
            self._person(name)
            if moved := self._admit(request, f"/annotate/{quote(name)}", token, name):
                return moved
            return self._html("annotate.html.j2", name=name)

        @app.get("/annotate/{name}/next")
        def upcoming(request: Request, name: str, held: str = Query("", max_length=4000), last: bool = False) -> Any:
            self._check(request, name)
            keys = [key for key in held.split(",") if key][:100]
            found = self.session.next(name, max(0, AHEAD - len(keys)), keys)
            answer = {
                "session": self.session.digest,
                "items": [self._view(showing) for showing in found],
                "progress": self.session.progress(name),
                "fault": self.fault(),
            }
            return answer | ({"last": [self._said(one) for one in self.session.last(name, 20)]} if last else {})

        @app.post("/annotate/{name}/answers")
        async def answers(request: Request, name: str) -> Any:
            self._check(request, name)
            if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
                raise HTTPException(415, "Content-Type must be application/json")
            if int(request.headers.get("Content-Length") or 0) > MAX_BODY:
                raise HTTPException(413, f"at most {MAX_BODY} bytes are taken")
            body = bytearray()
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise HTTPException(413, f"at most {MAX_BODY} bytes are taken")
            return await run_in_threadpool(self._take, name, bytes(body))

        @app.get("/annotate/{name}/picture/{item}/{place}")
        def picture(request: Request, name: str, item: int, place: int, full: bool = False) -> Response:
            self._check(request, name)
            if not 0 <= item < len(self.session.items):
                raise HTTPException(404, "there is no such item")
            shown = self.session.shown(name, item)
            if not 0 <= place < len(shown):
                raise HTTPException(404, "the item has no such picture")
            return self._picture(item, shown[place], full)

        return app

    # who asks
    def _person(self, name: str) -> None:
        if not NAME.fullmatch(name) or (self.access.names and name not in self.access.names):
            among = (
                f"one of {', '.join(self.access.names)}" if self.access.names else "1 to 40 letters, digits, ., _ and -"
            )
            raise HTTPException(404, f"nobody is called {name[:40]!r} here; expected {among}")

    def _admit(self, request: Request, path: str, token: str | None, name: str = "") -> Response | None:
        """Let somebody in: a token in the link becomes a cookie and leaves the address bar. Raises 401."""
        if token is None or self.access.token is None:
            self._check(request, name)
            return None
        if not self.access.allows(name, token):
            raise HTTPException(401, WRONG_TOKEN)
        response, below = RedirectResponse(path, 303), path if name else "/"
        response.set_cookie(COOKIES[bool(name)], token, path=below, httponly=True, samesite="lax", max_age=30 * 86400)
        return response

    def _check(self, request: Request, name: str) -> None:
        if name:
            self._person(name)
        if not self.access.allows(name, request.cookies.get(COOKIES[bool(name)])):
            raise HTTPException(401, WRONG_TOKEN)

    # what is sent
    def _view(self, showing: Showing) -> dict[str, Any]:
        """Pictures by their place on the first screen, whatever the source's order is: that may tell the better one."""
        item = self.session.items[showing.item]
        places = range(len(item.pictures))
        order = list(reversed(places)) if showing.check == "swap" else list(places)
        sources = [f"picture/{showing.item}/{place}?v={self.session.digest}" for place in order]
        return {"key": showing.key, "item": showing.item, "check": showing.check, "prompt": item.prompt, "src": sources}

    def _said(self, answer: Answer) -> dict[str, Any]:
        return {"id": answer.id} | self._view(Showing(answer.item, answer.check, answer.shown))

    def _picture(self, item: int, place: int, full: bool) -> Response:
        try:
            shown = self.screen.picture(item, place, full)
        except LookupError as error:
            raise HTTPException(404, "the item has no such picture") from error
        except (UnreadableError, UserError) as error:
            raise HTTPException(422, f"This picture cannot be shown: {error}") from error
        return Response(shown.data, media_type=shown.media_type, headers={"Cache-Control": "private, max-age=86400"})

    def _take(self, name: str, body: bytes) -> dict[str, Any]:
        try:
            entries = json.loads(body)["entries"]
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise TypeError("entries is no list of objects")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise HTTPException(400, f"expected {{'entries': [{{..}}, ..]}}: {str(error)[:200]}") from error
        if len(entries) > MOST_ENTRIES:
            raise HTTPException(413, f"at most {MOST_ENTRIES} answers at a time")
        results = {}
        for entry in entries:
            identity = str(entry.get("id"))[:64].encode(errors="replace").decode()  # JSON may hold what is no text
            try:
                results[identity] = self.session.submit(name, entry)
            except Refused as error:
                results[identity] = f"refused: {error}"
            except WriteError as error:  # the page keeps it and tries again
                logger.error("%s", error)
                raise HTTPException(507, str(error)) from error
        return {"results": results, "progress": self.session.progress(name), "fault": self.fault()}


class Server:
    """``run`` serves until ``stop`` or Ctrl-C, and calls ``ended`` then; ``port`` tells one that was given as 0. Raises
    :class:`UserError` where it would listen beyond this machine without a token, or where the port is taken."""

    def __init__(
        self, page: Page, host: str = "127.0.0.1", port: int = 8080, ended: Callable[[], object] = lambda: None
    ) -> None:
        check_token(host, page.access.token)
        self.page, self._ended = page, ended
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family, backlog=128)
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot listen on {host} port {port}: {error}; give another --host or --port") from error
        self.port = int(self._socket.getsockname()[1])
        config = uvicorn.Config(
            page.app,
            http=protocol(Limits(read_timeout=60.0)),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=3,
        )
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        try:
            run_until_stopped(lambda: self._server.run([self._socket]), self.stop)
        finally:
            self._ended()

    def stop(self) -> None:
        """Make ``run`` end."""
        self._server.should_exit = True
