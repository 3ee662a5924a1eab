"""Serves the page: its files, and the functions `draw` and `save` behind gradio's queue.

gradio is imported here only when a page is started, because it is an optional package (`pip install -e '.[demo]'`).
"""

from __future__ import annotations

import base64
import functools
import importlib
import pathlib
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from types import ModuleType
from typing import Any

from dalle_jax.demo import requests, saved
from dalle_jax.demo.studio import Studio
from dalle_jax.errors import ConfigError, UserError

PAGE = pathlib.Path(__file__).parent / "page"
_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Scripts and styles come from this server alone, so that no text on the page can become one.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
# Of the body of a call: one image in base64 and a mask, or two images.
MOST_BYTES = 2 * (requests.MOST_BYTES * 4 // 3) + 2**20

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def require_gradio() -> ModuleType:
    """Imports gradio.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise ConfigError(
            f"The page needs gradio, which cannot be imported ({error}). Install it with "
            "pip install 'dalle_jax[demo]', or in a clone with pip install -e '.[demo]'."
        ) from error


class BodyLimit:
    """ASGI middleware that answers 413 to a request whose body is larger than a limit."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or rejects it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        seen, begun = 0, False

        async def counted() -> MutableMapping[str, Any]:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            return {"type": "http.disconnect"} if seen > self.most else message

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            begun = True
            await send(message)

        if declared.isdigit() and int(declared) <= self.most:
            try:
                await self.app(scope, counted, watched)
            except Exception:
                if seen <= self.most or begun:
                    raise
        if not begun:
            text = f"The request has more than {self.most // 2**20} MiB. Give a smaller image."
            await send({"type": "http.response.start", "status": 413, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": text.encode()})


def build(studio: Studio, waiting: int) -> Any:
    """Returns the gradio app, `gradio.Blocks`, with the functions of the page.

    Args:
      studio: the models.
      waiting: the most drawings that wait. Another one is answered with an error.
    """
    gradio = require_gradio()

    def draw(request: dict) -> Iterator[dict]:
        """Draws images. The events are those of `dalle_jax.demo.studio`."""
        yield from studio.draw(request)

    def save(request: dict) -> dict:
        """Packs an image with its manifest: {"zip": base64} or {"error": text}."""
        try:
            return {"zip": base64.b64encode(saved.archive(studio.models, request, studio.places)).decode()}
        except UserError as error:
            return {"error": studio.public(str(error))}

    with gradio.Blocks(title="dalle_jax", analytics_enabled=False) as blocks:
        gradio.api(draw, api_name="draw", concurrency_limit=1)
        gradio.api(save, api_name="save", concurrency_limit=1)
    return blocks.queue(max_size=waiting)


def routes(studio: Studio) -> list[Any]:
    """Returns the routes of the page's files and of its description."""
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Route

    described = functools.cache(studio.describe)

    async def file(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in {path.name for path in PAGE.iterdir()}:
            return Response("There is no such file.", 404)
        return FileResponse(PAGE / name, headers=_HEADERS, media_type=_TYPES.get(pathlib.Path(name).suffix))

    async def about(_: Request) -> Response:
        return JSONResponse(described(), headers=_HEADERS)

    return [Route("/", file), Route("/page/about", about), Route("/page/{name}", file)]


def serve(
    studio: Studio,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    waiting: int = 16,
    block: bool = True,
) -> tuple[Any, str]:
    """Starts the page.

    Args:
      studio: the models.
      host: the address to listen on. "0.0.0.0" lets other machines in.
      port: the port; None for the first free one from 7860 on.
      share: whether gradio opens a public address for 72 hours.
      waiting: the most drawings that wait.
      block: whether to return only when the server ends.

    Returns:
      The gradio app, with `close`, and the local address.

    Raises:
      ConfigError: gradio is missing, or the port is not free.
    """
    blocks = build(studio, waiting)
    from starlette.middleware import Middleware

    extra = {"routes": routes(studio), "middleware": [Middleware(BodyLimit, most=MOST_BYTES)]}
    try:
        _, local, shared = blocks.launch(
            server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True, show_error=False,
            ssr_mode=False, max_file_size=requests.MOST_BYTES, app_kwargs=extra,
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"--port={port} cannot be used: {error}. Give another one.") from error
    print(
        f"The page is at {local}" + (f" and at {shared}" if shared else "") + ". Press Ctrl-C to stop it.", flush=True
    )
    if block:
        blocks.block_thread()
    return blocks, local
