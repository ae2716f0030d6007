"""`grm serve`: the routes of `grm_hf.serving.routes` from a [`GRMScorer`], on FastAPI and uvicorn. Texts that arrive
together are scored together, so answers to one prompt share it, whoever sent them.
"""

import asyncio
import contextlib
import ctypes
import ipaddress
import math
import secrets
import signal
import socket
import time
from base64 import b64decode
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException

from ..encoding import Encoded
from ..rewards.rollouts import RolloutEncoder
from ..scoring import GRMScorer
from .routes import ROUTES, router, sentence


AT_ONCE = 64  # bodies of the largest size that are held in memory, however many requests they are
KINDS = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 413: "TooLargeError"}


@dataclass(frozen=True)
class Limits:
    """
    Limits of one request, and of all requests together.

    Attributes:
        body (`int`): Largest number of bytes of a request.
        texts (`int`): Largest number of texts of a request.
        queue (`int`): Largest number of texts that wait; a request beyond it gets 503 and may come again.
    """

    body: int = 16 * 2**20
    texts: int = 1024
    queue: int = 8192


@dataclass(eq=False)
class _Waiting:
    """The texts of one request, those that still wait to be scored, and the future of their rewards."""

    ids: list[list[int]]
    future: asyncio.Future = field(repr=False)

    def __post_init__(self):
        self.rewards = [math.nan] * len(self.ids)
        # Taken from the end. Texts with a common beginning are neighbours, as in the scorer.
        self.left = sorted(range(len(self.ids)), key=self.ids.__getitem__, reverse=True)

    def take(self, room: int, alone: bool) -> tuple[list[int], int]:
        """Indices of the next texts for a batch with room for so many tokens, and the room that is left. What
        neighbours share counts once. A text that would be `alone` in the batch may be longer."""
        part: list[int] = []
        while self.left:
            text = self.ids[self.left[-1]]
            tokens = len(text) - (len(commonprefix([self.ids[part[-1]], text])) if part else 0)
            if tokens > room and (part or not alone):
                break
            room -= tokens
            part.append(self.left.pop())
        return part, room


class Batcher:
    """
    The engine of `grm serve`: one thread tokenises, one computes. The second takes the waiting texts, up to the token
    budget of the scorer. A request beyond it is computed in parts, and others have their turn in between.

    Args:
        scorer ([`GRMScorer`]):
            The reward model, for this engine alone.
        name (`str`):
            What the model is called in replies.
        limits ([`Limits`], *optional*):
            See there.
    """

    def __init__(self, scorer: GRMScorer, name: str, limits: Limits | None = None):
        self.scorer, self.name, self.limits = scorer, name, limits or Limits()
        self.config, self.rollouts = scorer.model.config, RolloutEncoder(scorer.encoder)
        self.max_texts = min(self.limits.texts, self.limits.queue)
        self.vocab_size = scorer.model.get_input_embeddings().weight.shape[0]
        self.waiting: deque[_Waiting] = deque()
        self.scored_texts = self.scored_tokens = self.truncated_texts = 0
        self.failure: str | None = None  # why the last computation failed, if it did
        self._arrived = asyncio.Event()
        self._tokenise, self._compute = ThreadPoolExecutor(1, "tokenise"), ThreadPoolExecutor(1, "compute")

    @property
    def queued(self) -> int:
        """Texts that wait."""
        return sum(len(item.left) for item in self.waiting)

    async def encode(self, encode: Callable[[RolloutEncoder], list[Encoded]]) -> list[Encoded]:
        encoded = await asyncio.get_running_loop().run_in_executor(self._tokenise, encode, self.rollouts)
        for number, row in enumerate(encoded):
            try:
                self.scorer.require_embedded(row.ids)
            except ValueError as error:
                raise ValueError(f"text {number}: {error}") from error
        self.truncated_texts += sum(row.truncated for row in encoded)
        return encoded

    async def rewards(self, ids: list[list[int]]) -> list[float]:
        assert ids, "a request has texts"
        if self.queued + len(ids) > self.limits.queue:
            full = f"{self.queued} texts wait already, and the queue holds {self.limits.queue}."
            raise HTTPException(503, full, {"Retry-After": "1"})
        item = _Waiting(ids, asyncio.get_running_loop().create_future())
        self.waiting.append(item)
        self._arrived.set()
        try:
            return await item.future
        finally:
            with contextlib.suppress(ValueError):  # cancelled while it waited: nobody computes the rest of it
                self.waiting.remove(item)

    async def run(self) -> None:
        """Scores what arrives, until it is cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while batch := self._next_batch():
                try:
                    await self._compute_batch(batch)
                except Exception:  # one of them spoils the others: each alone, so only its own sender gets the error
                    for item, part in batch:
                        await self._alone(item, part)

    def _next_batch(self) -> list[tuple[_Waiting, list[int]]]:
        batch: list[tuple[_Waiting, list[int]]] = []
        room = self.scorer.max_tokens_per_batch
        while self.waiting:
            item = self.waiting[0]
            if not item.future.done():
                part, room = item.take(room, alone=not batch)
                if not part:
                    break
                batch.append((item, part))
            self.waiting.popleft()
            if item.left and not item.future.done():
                self.waiting.append(item)  # its rest, when the others had their turn
                break
        return batch

    async def _compute_batch(self, batch: list[tuple[_Waiting, list[int]]]) -> None:
        ids = [item.ids[i] for item, part in batch for i in part]
        loop = asyncio.get_running_loop()
        rewards = iter(await loop.run_in_executor(self._compute, self.scorer.rewards_of_ids, ids))
        for item, part in batch:
            for i in part:
                item.rewards[i] = next(rewards)
            if not item.left and not item.future.done():  # its sender may have gone away
                item.future.set_result(item.rewards)
        self.scored_texts += len(ids)
        self.scored_tokens += sum(map(len, ids))
        self.failure = None

    async def _alone(self, item: _Waiting, part: list[int]) -> None:
        try:
            await self._compute_batch([(item, part)])
        except Exception as error:  # the model's fault: the request was checked
            self.failure = f"{type(error).__name__}: {sentence(error)}"
            if not item.future.done():  # a ValueError would be told as the sender's fault
                item.future.set_exception(RuntimeError(error) if isinstance(error, ValueError) else error)

    def close(self) -> None:
        for pool in (self._tokenise, self._compute):
            pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------------------------- application


def make_app(scorer: GRMScorer, name: str, routes=tuple(ROUTES), api_key=None, limits=None) -> FastAPI:
    """
    The application that `grm serve` runs.

    Args:
        scorer ([`GRMScorer`]):
            The reward model.
        name (`str`):
            Its name in replies.
        routes (`tuple[str, ...]`, *optional*):
            Names in `ROUTES`; all of them by default.
        api_key (`str`, *optional*):
            Required of each request, as a bearer token or as the password of basic authentication.
        limits ([`Limits`], *optional*):
            See there.
    """
    engine = Batcher(scorer, name, limits)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        work = asyncio.create_task(engine.run())
        yield
        work.cancel()
        engine.close()

    app = FastAPI(title=f"grm serve {name}", lifespan=lifespan)
    app.state.engine = engine
    app.include_router(router(tuple(routes), lambda request: engine))
    app.add_exception_handler(StarletteHTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _failed)
    registry = CollectorRegistry()
    app.add_middleware(_Gate, api_key=api_key, limits=engine.limits, registry=registry)
    _gauges(engine, registry)

    @app.get("/health")
    async def health():
        if engine.failure is not None:
            return _error(503, f"The last computation failed. {engine.failure}")
        return Response()

    @app.get("/metrics")
    async def metrics():
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models():
        longest = engine.config.max_sequence_length
        card = {"id": name, "object": "model", "owned_by": "grm_hf", "max_model_len": longest}
        return {"object": "list", "data": [card]}

    return app


def _gauges(engine: Batcher, registry: CollectorRegistry) -> None:
    for key, text, value in (
        ("grm_queued_texts", "Texts that wait", lambda: engine.queued),
        ("grm_scored_texts", "Texts scored since the start", lambda: engine.scored_texts),
        ("grm_scored_tokens", "Tokens scored since the start, shared prompts counted each time",
         lambda: engine.scored_tokens),
        ("grm_truncated_texts", "Texts that lost their beginning", lambda: engine.truncated_texts),
    ):  # fmt: skip
        Gauge(key, text, registry=registry).set_function(value)


def _error(status: int, message: str, headers=None) -> JSONResponse:
    error_type = KINDS.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    return JSONResponse({"error": {"message": message, "type": error_type, "code": status}}, status, headers)


async def _refused(request: Request, error: Any) -> Response:
    return _error(error.status_code, str(error.detail), error.headers)


async def _invalid(request: Request, error: Any) -> Response:
    first = error.errors()[0]
    if first["type"] == "model_attributes_type":
        return _error(400, "The body must be a JSON object, sent with `Content-Type: application/json`.")
    where = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
    return _error(400, f"{where}: {first['msg']}")


async def _failed(request: Request, error: Exception) -> Response:
    return _error(500, f"{type(error).__name__}: {sentence(error)}")


class _Gate:
    """ASGI middleware for API keys, limits and counters. Starlette has no limit on a body."""

    def __init__(self, app, api_key: str | None, limits: Limits, registry: CollectorRegistry):
        self.app, self.api_key, self.limits = app, api_key, limits
        self.held = 0  # bytes of requests that are not answered yet
        self.requests = Counter("grm_requests", "Requests answered", ["route", "status"], registry=registry)
        self.seconds = Histogram("grm_request_seconds", "From request to reply", ["route"], registry=registry)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, read, kept = time.perf_counter(), 0, 0
        known = {route.path for route in ROUTES.values()} | {"/health", "/metrics", "/v1/models"}
        route = scope["path"] if scope["path"] in known else "other"

        async def counted(message):
            if message["type"] == "http.response.start":
                self.requests.labels(route, message["status"]).inc()
                self.seconds.labels(route).observe(time.perf_counter() - start)
            await send(message)

        async def limited():
            nonlocal read, kept
            message = await receive()
            size = len(message.get("body", b""))
            read += size
            if read > self.limits.body:
                refusal = StarletteHTTPException(413, f"The request is larger than {self.limits.body} bytes.")
            elif self.held + size > AT_ONCE * self.limits.body:
                full = f"{self.held} bytes of other requests wait already."
                refusal = StarletteHTTPException(503, full, {"Retry-After": "1"})
            else:
                self.held, kept = self.held + size, kept + size
                return message
            while message.get("more_body") and read <= 8 * self.limits.body:  # who still sends reads no reply
                message = await receive()
                read += len(message.get("body", b""))
            raise refusal

        headers = {name.lower(): value for name, value in scope["headers"]}
        app = self.app
        if scope["path"] != "/health" and not self._may(headers.get(b"authorization", b"")):
            app = _error(401, "The API key is missing or wrong: send `Authorization: Bearer KEY`.")
        try:
            await app(scope, limited, counted)
        finally:
            self.held -= kept

    def _may(self, header: bytes) -> bool:
        if self.api_key is None:
            return True
        scheme, _, value = header.partition(b" ")
        if scheme.lower() == b"basic":
            with contextlib.suppress(ValueError):
                value = b64decode(value, validate=True).partition(b":")[2]
        elif scheme.lower() != b"bearer":
            return False
        return secrets.compare_digest(value.strip(), self.api_key.encode())


# ----------------------------------------------------------------------------------------------------------------- run


def is_loopback(host: str) -> bool:
    """Whether every address of `host` is this machine's own."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host or "0.0.0.0", None)}
    except OSError as error:
        raise ValueError(f"'{host}' is no address of this machine. ({error})") from error
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in addresses)


# Settings of glibc's `mallopt`: its number, its name as an environment variable, and the value.
MEMORY = ((-8, "MALLOC_ARENA_MAX", 1), (-3, "MALLOC_MMAP_THRESHOLD_", 2**25), (-1, "MALLOC_TRIM_THRESHOLD_", 2**30))


def keep_memory() -> None:
    """Lets this process keep the memory of freed tensors, up to 1 GiB. glibc returns the memory of large ones to the
    system, which then gives it back page by page to the next: up to a tenth of the time of a forward on a CPU. With
    another C library nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for number, _, value in MEMORY:
            mallopt(number, value)


def serve(
    model, host="127.0.0.1", port=8000, routes=tuple(ROUTES), api_key=None, name=None, limits=None, **scorer_settings
) -> None:
    """
    Serves a reward model until SIGINT or SIGTERM. Requests in work are then still answered.

    Args:
        model (`str`):
            Hub id or folder.
        host (`str`, *optional*, defaults to `"127.0.0.1"`), port (`int`, *optional*, defaults to 8000):
            Where to listen.
        api_key (`str`, *optional*):
            Required for any address that others can reach.
        routes, name, limits:
            See [`make_app`].
        **scorer_settings:
            Settings of [`GRMScorer`].

    Raises:
        `ValueError`: an address other than loopback without `api_key`; a folder without a reward model.
    """
    if not api_key and not is_loopback(host):
        raise ValueError(
            f"'{host}' can be reached from other machines, so an API key is required: --api-key KEY, or the "
            "environment variable GRM_API_KEY."
        )
    keep_memory()
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        app = make_app(GRMScorer(model, **scorer_settings), name or str(model), routes, api_key or None, limits)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=60))
        print(f"grm serve: {app.state.engine.name} on http://{host}:{port} ({', '.join(routes)})", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again when it has stopped
            server.run([listener])
