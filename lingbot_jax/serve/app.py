"""The server as an ASGI application: the page, what Prometheus and a balancer ask for, and the WebSocket.

/                   the page; /web/NAME its modules, from memory: no name of a client reaches the file system
/health             200 when sessions are taken, 503 while the world warms and when the server drains
/health/live        200 as long as the process lives
/metrics            Prometheus
/api/bundle         what is played
/api/pictures/N     picture N to start from
/ws                 control and frames (`serve.messages`)
"""

import asyncio
import hmac
import importlib.resources
import logging
import mimetypes
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from lingbot_jax.serve import messages
from lingbot_jax.serve.config import ServeConfig
from lingbot_jax.serve.connection import BUSY, POLICY, RESTART, Connection, say_goodbye
from lingbot_jax.serve.device import Device
from lingbot_jax.serve.game import Game
from lingbot_jax.serve.messages import SUBPROTOCOL
from lingbot_jax.serve.metrics import Metrics

_log = logging.getLogger(__name__)

LOCAL = ("localhost", "127.0.0.1", "::1")
RETRY_SECONDS = 5
SAFE = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_files() -> dict[str, tuple[bytes, str]]:
    """Content and type of every file of the page, by name."""
    folder = importlib.resources.files("lingbot_jax.serve") / "web"
    kinds = {".js": "text/javascript"}
    kind = lambda name: kinds.get(name[name.rfind(".") :]) or mimetypes.guess_type(name)[0] or "text/plain"
    return {f.name: (f.read_bytes(), kind(f.name)) for f in folder.iterdir() if f.is_file()}


class Hub:
    """Who plays, and whether more may come.

    Attributes:
      draining: no more are taken.
    """

    def __init__(self, game: Game, device: Device, metrics: Metrics):
        self._game, self._device, self._metrics = game, device, metrics
        self._playing: set[Connection] = set()
        self.draining = False
        metrics.capacity.set(game.config.max_sessions)
        metrics.sessions.set_function(lambda: len(self._playing))
        metrics.ready.set_function(lambda: self.ready)

    @property
    def ready(self) -> bool:
        return self._device.ready and not self.draining

    @property
    def playing(self) -> int:
        return len(self._playing)

    async def serve(self, socket: WebSocket) -> None:
        """A client, from its handshake to its end."""
        await socket.accept(SUBPROTOCOL if SUBPROTOCOL in socket.scope["subprotocols"] else None)
        full = self.playing >= self._game.config.max_sessions
        if self.draining or full:
            self._metrics.turned_away.inc()
            limit = self._game.config.max_sessions
            why = f"all {limit} places are taken" if not self.draining else "the server is about to restart"
            await socket.send_text(messages.to_json("busy", message=why, retry_seconds=RETRY_SECONDS))
            await say_goodbye(socket, "busy", BUSY)
            return
        connection = Connection(socket, self._game, self._device, self._metrics)
        self._playing.add(connection)
        try:
            why = await connection.run()
        finally:
            self._playing.discard(connection)
        self._metrics.ended.labels(why).inc()

    async def drain(self) -> None:
        """Takes no more clients, gives those that play some time, and ends them."""
        self.draining = True
        seconds = self._game.config.drain_seconds
        for connection in self._playing:
            connection.tell("draining", seconds=seconds)
        for _ in range(int(seconds / 0.1)):
            if not self._playing:
                return
            await asyncio.sleep(0.1)
        for connection in self._playing:
            connection.end("restart", RESTART)
        for _ in range(50):
            if self._playing:
                await asyncio.sleep(0.1)


class Guard:
    """Lets through whom it may: by the name that the server is called, the page that asks, and the token."""

    def __init__(self, app: ASGIApp, config: ServeConfig):
        self._app, self._config = app, config
        self._hosts = {*LOCAL, config.host, *config.allowed_hosts}
        # Open to the network without a list of names: any will do, and the page must be of the same name.
        self._any_host = config.host not in LOCAL and not config.allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refused = self._refused(scope, Headers(scope=scope))
        if refused is None:
            await self._app(scope, receive, _with_headers(send))
        elif scope["type"] == "websocket":
            await WebSocket(scope, receive, send).close(POLICY, refused[1])  # before accept: an HTTP 403
        else:
            await PlainTextResponse(refused[1], refused[0])(scope, receive, send)

    def _refused(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        path = scope["path"]
        if path.startswith("/health"):  # a balancer calls a pod by its address
            return None
        host = headers.get("host", "")
        if not self._any_host and urlsplit(f"//{host}").hostname not in self._hosts:
            return 400, "host: not a name of this server; --allowed_hosts adds one"
        origin = headers.get("origin")
        if origin is not None:
            page = urlsplit(origin)
            if page.netloc != host and page.hostname not in self._config.allowed_hosts:
                return 403, "origin: not a page of this server"
        secret = path == "/metrics" or path == "/ws" or path.startswith("/api/")
        if secret and self._config.token and not _knows(self._config.token, scope, headers):
            return 401, "token: missing or wrong"
        return None


def _knows(token: str, scope: Scope, headers: Headers) -> bool:
    """In a header; of a WebSocket, where a page can set none, as a subprotocol `token.TOKEN`."""
    given = [headers.get("authorization", "").removeprefix("Bearer ")]
    given += [p.removeprefix("token.") for p in scope.get("subprotocols", ())]
    return any(hmac.compare_digest(text.encode(), token.encode()) for text in given)


def _with_headers(send: Send) -> Send:
    async def sending(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            extra = [(name.lower().encode(), value.encode()) for name, value in SAFE.items()]
            message = message | {"headers": [*message["headers"], *extra]}
        await send(message)

    return sending


def make_app(game: Game, device: Device, metrics: Metrics) -> tuple[ASGIApp, Hub]:
    """The application, and the hub of its clients."""
    hub, files = Hub(game, device, metrics), page_files()

    def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in files:
            return PlainTextResponse("not found", 404)
        content, kind = files[name]
        return Response(content, media_type=kind)

    def health(_: Request) -> Response:
        state = "draining" if hub.draining else "ready" if hub.ready else "warming"
        body = {"state": state, "sessions": hub.playing, "max_sessions": game.config.max_sessions}
        return JSONResponse(body, 200 if hub.ready else 503)

    def picture(request: Request) -> Response:
        number = request.path_params["number"]
        if number >= len(game.beginnings):
            return PlainTextResponse("not found", 404)
        return Response(game.beginnings[number].png, media_type="image/png")

    routes = [
        ("/", page),
        ("/web/{name}", page),
        ("/health", health),
        ("/health/live", lambda _: JSONResponse({"state": "alive"})),
        ("/metrics", lambda _: PlainTextResponse(metrics.text())),
        ("/api/bundle", lambda _: JSONResponse(game.about())),
        ("/api/pictures/{number:int}", picture),
    ]
    made = [Route(path, _asynchronous(function)) for path, function in routes]
    return Guard(Starlette(routes=[*made, WebSocketRoute("/ws", hub.serve)]), game.config), hub


def _asynchronous(function: Any) -> Any:
    """Answers in the event loop: all is in memory, and a thread each would cost more."""

    async def answer(request: Request) -> Response:
        return function(request)

    return answer
