"""A guard in front of the routes of a page: it limits what a visitor may send, and knows who is still there.

    with Page() as demo: ...
    demo.launch(app_kwargs={"middleware": [Middleware(Guard, most=2_000_000, values=1000, uploads=FOLDER)]})

A body that is too long, too slow, nested too deeply, or has too many values is refused before anything parses it. All
bodies that are read at one time stay within a limit, and so do uploaded files and open requests. A client that waits
for a result holds a stream open: `listening` says whether there is one.
"""

import asyncio
import inspect
import json
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from urllib.parse import parse_qs

import gradio as gr


MAX_DEPTH = 32  # of lists and objects in each other
MAX_TOGETHER = 32_000_000  # bytes of all bodies that are being read
MAX_SECONDS = 30  # until a body is there
MAX_UPLOADS = 200_000_000  # bytes on disk
MAX_OPEN = 400  # requests at one time

STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
STREAM = re.compile(r"/(?:queue/data|call/(?:v2/)?[^/]+/(?P<event>[^/]+))/?$")

_streams: Counter = Counter()


def listening(session: str) -> bool:
    """Whether a client holds a stream open for the results of a session."""
    return _streams[session] > 0


class Guard:
    """
    ASGI middleware.

    Args:
        app: The application behind it.
        most: Bytes of one body.
        values: Largest number of values in all lists and objects of one body.
        uploads: Folder of uploaded files.
    """

    def __init__(self, app, most: int, values: int, uploads: Path | None = None):
        self.app, self.most, self.values, self.uploads = app, most, values, uploads
        self.together = self.open = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if self.open >= MAX_OPEN:
            return await refuse(send, 503, "This page has too many visitors at this moment. Try again in a minute.")
        session = session_of(scope)
        self.open += 1
        _streams[session] += session is not None
        try:
            if scope["method"] in ("GET", "HEAD", "OPTIONS"):
                await self.app(scope, receive, send)
            else:
                await self.with_body(scope, receive, send)
        finally:
            self.open -= 1
            _streams[session] -= session is not None
            if not _streams[session]:
                del _streams[session]

    async def with_body(self, scope, receive, send):
        headers = {name.lower(): value for name, value in scope["headers"]}
        body, held = bytearray(), 0
        try:
            if (length := headers.get(b"content-length", b"0")).isdigit() and int(length[:20]) > self.most:
                raise Refused(413, self.too_long())
            if scope["path"].rstrip("/").endswith("/upload") and self.uploads and size(self.uploads) > MAX_UPLOADS:
                raise Refused(507, "This page holds too many files at this moment. Paste the table, or try later.")
            try:
                async with asyncio.timeout(MAX_SECONDS):
                    more = True
                    while more:
                        message = await receive()
                        if message["type"] != "http.request":
                            return None
                        part = message.get("body", b"")
                        body += part
                        held += len(part)
                        self.together += len(part)
                        more = message.get("more_body", False)
                        if len(body) > self.most:
                            raise Refused(413, self.too_long())
                        if self.together > MAX_TOGETHER:
                            raise Refused(503, "This page gets too much at this moment. Try again in a minute.")
            except TimeoutError:
                raise Refused(408, f"Nothing more came for {MAX_SECONDS} seconds.") from None
            if b"multipart/" not in headers.get(b"content-type", b""):
                rest = STRING.sub(b"", body)
                if rest.count(b",") >= self.values:
                    raise Refused(413, f"What you sent has more than {self.values:,} values; this page takes no more.")
                if too_deep(rest):
                    raise Refused(400, f"What you sent is no JSON, or nested more than {MAX_DEPTH} levels deep.")
            whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]
            body.clear()
            return await self.app(scope, lambda: again(whole, receive), send)
        except Refused as refused:
            return await refuse(send, *refused.args)
        finally:
            self.together -= held

    def too_long(self) -> str:
        return f"What you sent has more than {self.most / 1e6:g} MB; this page takes no more at once."


class Refused(Exception):
    pass


class Page(gr.Blocks):
    """A page that answers a call with too few or too many values with a sentence."""

    def validate_inputs(self, block_fn, inputs):
        needed = len(block_fn.inputs)
        if len(inputs) != needed:
            names = list(inspect.signature(block_fn.fn).parameters)[:needed]
            named = f" ({', '.join(names)})" if block_fn.api_visibility == "public" else ""
            message = f"`/{block_fn.api_name}` takes {needed} values{named}, and {len(inputs)} came."
            raise gr.Error(message, print_exception=False)


async def again(whole: list, receive):
    return whole.pop() if whole else await receive()


async def refuse(send, status: int, sentence: str):
    # `detail` is where gradio's pages and clients look for the words of an error.
    body = json.dumps({"detail": sentence, "error": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def session_of(scope) -> str | None:
    """The session whose results a request waits for."""
    found = STREAM.search(scope["path"]) if scope["method"] == "GET" else None
    if not found:
        return None
    named = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [None])[0]
    return found["event"] or named


def too_deep(rest: bytes) -> bool:
    """Whether JSON, given without its strings, is nested too deeply."""
    rest = rest.translate(None, NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        if not rest:
            return False
        rest = rest.replace(b"[]", b"").replace(b"{}", b"")
    return bool(rest)


def size(folder: Path) -> int:
    """Bytes of the files in a folder; a small file counts for its room on the disk."""
    found = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # it has just been deleted
            found += max(path.stat().st_size, 65536)
    return found
