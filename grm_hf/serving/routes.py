"""The routes that trainers call, each as its trainer documents it (docs/serving.md). `grm serve` and, through endpoint
plugins, a vLLM server use the same table. A row gives the path of a route, its request and its reply.
"""

import asyncio
import math
import time
import uuid
import warnings
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from ..encoding import Encoded, OverlengthError, describe, is_int, left_out, template_kwargs_of
from ..rewards.rollouts import Rendered, Rollout, RolloutEncoder
from ..rewards.transforms import Transform


class Engine(Protocol):
    """
    Computes rewards behind the routes.

    Attributes:
        name: The model's name in replies.
        config: The [`GRMConfig`] of the model.
        vocab_size: Token ids are below it.
        max_texts: Largest number of texts of one request.
    """

    name: str
    config: Any
    vocab_size: int
    max_texts: int

    async def encode(self, encode: Callable[[RolloutEncoder], list[Encoded]]) -> list[Encoded]:
        """Runs `encode` where the tokenizer may be used."""
        ...

    async def rewards(self, ids: list[list[int]]) -> list[float]:
        """Raw rewards of token sequences, in their order."""
        ...


def _either(words: str) -> WrapValidator:
    """One sentence for a value that is none of several types, where pydantic has one for each of them."""

    def check(value, validate):
        try:
            return validate(value)
        except ValidationError:
            found = {"words": words, "found": describe(value)}
            raise PydanticCustomError("form", "it must be {words}; found {found}", found) from None

    return WrapValidator(check)


Text = Annotated[StrictStr, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
Ids = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(min_length=1)]
Chat = Annotated[
    Text | list[dict[str, Any]] | dict[str, Any], _either("a text that is not empty, a list of messages, or a row")
]
Input = Annotated[
    Text | Texts | Ids | Annotated[list[Ids], Field(min_length=1)],
    _either("a text, texts, token ids, or lists of token ids, none of them empty"),
]


class Settings(BaseModel):
    """In the address of any route: transform and reference of grm_hf.rewards."""

    model_config = ConfigDict(extra="forbid")
    transform: str | None = None
    reference: float | None = None


class ScoreRequest(BaseModel):
    """Each chat is messages, a row (`prompt` and `response`, or `messages`), plain text, a policy's answer (`prompt`
    and `completion`; a string prompt is then text), or `ids` that a policy rendered."""

    model_config = ConfigDict(extra="forbid")
    chats: list[Chat] = Field(min_length=1)


class OpenRLHFRequest(BaseModel):
    query: Texts
    prompts: list[Any] | None = None
    labels: list[Any] | None = None


class LlamaFactoryRequest(BaseModel):
    model: Text | None = None
    messages: Texts
    max_length: int | None = Field(default=None, ge=2)


class SlimeRequest(BaseModel):
    prompt: Annotated[StrictStr | list[dict[str, Any]], _either("a text or a list of messages")]
    response: str
    label: Any = None


class TEIRequest(BaseModel):
    inputs: Annotated[
        Text | Annotated[list[list[Text]], Field(min_length=1)], _either("a text, or lists of one text each")
    ]
    raw_scores: bool = False
    truncate: bool = False
    truncation_direction: Literal["left", "Left", "right", "Right"] = "right"


class PoolingRequest(BaseModel):
    """The supported part of vLLM's request; anything else is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    input: Input | None = None
    messages: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    use_activation: bool | None = None  # there is none: a reward is raw
    task: Literal["classify"] | None = None
    add_special_tokens: Literal[True] | None = None
    encoding_format: Literal["float"] | None = None
    user: str | None = None
    request_id: str | None = None
    priority: int | None = None


@dataclass(frozen=True)
class RenderedText:
    """A text with its special tokens in it; with `special_tokens` it gets as many BOS as in training."""

    text: str
    special_tokens: bool = False


@dataclass(frozen=True)
class Route:
    """
    Attributes:
        path (`str`): Its path.
        request (`type`): The type of its request.
        rows (`Callable`): From a request to the rows to score: chats, [`Rollout`], [`Rendered`], [`RenderedText`], or
            [`Encoded`], which is scored as it is.
        reply (`Callable`): From rewards, the request, the rows as encoded and the engine to the reply.
        check (`Callable`, *optional*): Refuses encoded rows that the request does not allow.
    """

    path: str
    request: type[BaseModel]
    rows: Callable[[Any], list]
    reply: Callable[[list[float], Any, list[Encoded], Engine], Any]
    check: Callable[[Any, list[Encoded]], None] | None = None


# --------------------------------------------------------------------------------------------------- reading a request


def _chats(request: ScoreRequest) -> list:
    rows: list = []
    for chat in request.chats:
        row = {name: value for name, value in chat.items() if value is not None} if isinstance(chat, dict) else {}
        if {"prompt", "completion"} <= row.keys() and "messages" not in row:
            more = row.get("tools"), row.get("chat_template_kwargs") or {}
            rows.append(Rollout(row["prompt"], row["completion"], *more))
        elif "ids" in row:
            rows.append(Rendered(row["ids"]))
        else:
            rows.append(chat)
    return rows


def _sample(request: SlimeRequest) -> list:
    if isinstance(request.prompt, str):  # rendered, as the policy saw it
        return [RenderedText(request.prompt + request.response)]
    return [Rollout(request.prompt, request.response)]


def _tei(request: TEIRequest) -> list:
    texts = [[request.inputs]] if isinstance(request.inputs, str) else request.inputs
    if any(len(text) != 1 for text in texts):
        raise ValueError("a pair of texts is for cross-encoders; render prompt and answer as one text.")
    return [RenderedText(text, special_tokens=True) for [text] in texts]


def _tei_check(request: TEIRequest, encoded: list[Encoded]) -> None:
    if not any(row.truncated for row in encoded):
        return
    if not request.truncate:
        raise ValueError("a text is longer than the reward model reads; with `truncate` its beginning is cut.")
    if request.truncation_direction.lower() == "right":
        raise ValueError("`truncation_direction` is 'right', which cuts the answer; a reward model cuts on the left.")


def _pooling(request: PoolingRequest) -> list:
    if (request.input is None) == (request.messages is None):
        raise ValueError("give either `input` (text or token ids) or `messages`.")
    if request.messages is not None:
        return [{"messages": request.messages, "chat_template_kwargs": request.chat_template_kwargs}]
    if request.chat_template_kwargs is not None:
        raise ValueError("`chat_template_kwargs` is for `messages`, and there is `input`. Leave it out.")
    given: list = request.input if isinstance(request.input, list) else [request.input]
    if isinstance(given[0], int):
        given = [given]
    if isinstance(given[0], list):
        return [Encoded(ids, 0) for ids in given]  # scored as they are
    return [RenderedText(text, special_tokens=True) for text in given]


# ------------------------------------------------------------------------------------------------------------ replying


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _envelope(prefix: str, encoded: list[Encoded], engine: Engine, data: list) -> dict:
    tokens = sum(len(row.ids) for row in encoded)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": engine.name}
    return {**head, "data": data, "usage": usage}


def _tei_reply(rewards, request, encoded, engine):
    scores = rewards if request.raw_scores else map(_sigmoid, rewards)
    labels = [[{"score": score, "label": engine.config.id2label[0]}] for score in scores]
    return labels[0] if isinstance(request.inputs, str) else labels


ROUTES = {
    "score": Route(
        "/score",
        ScoreRequest,
        _chats,
        lambda rewards, request, encoded, engine: {
            "rewards": rewards,
            "tokens": [len(row.ids) for row in encoded],
            "truncated": [row.truncated for row in encoded],
            "unread": [row.unread for row in encoded],
        },
    ),
    "openrlhf": Route(
        "/get_reward",
        OpenRLHFRequest,
        lambda request: [RenderedText(text) for text in request.query],
        lambda rewards, request, encoded, engine: {
            "rewards": rewards,
            "scores": [_sigmoid(reward) for reward in rewards],  # between 0 and 1, for its dynamic filtering
            "extra_logs": {},
        },
    ),
    "llamafactory": Route(
        "/v1/score/evaluation",
        LlamaFactoryRequest,
        lambda request: [RenderedText(text) for text in request.messages],
        lambda rewards, request, encoded, engine: {
            "id": f"scoreval-{uuid.uuid4().hex}",
            "object": "score.evaluation",
            "model": request.model or engine.name,
            "scores": rewards,
        },
    ),
    "slime": Route("/slime", SlimeRequest, _sample, lambda rewards, request, encoded, engine: rewards[0]),
    "tei": Route("/predict", TEIRequest, _tei, _tei_reply, _tei_check),
    "classify": Route(
        "/classify",
        PoolingRequest,
        _pooling,
        lambda rewards, request, encoded, engine: _envelope(
            "classify",
            encoded,
            engine,
            [
                {"index": i, "label": engine.config.id2label[0], "probs": [reward], "num_classes": 1}
                for i, reward in enumerate(rewards)
            ],
        ),
    ),
    "pooling": Route(
        "/pooling",
        PoolingRequest,
        _pooling,
        lambda rewards, request, encoded, engine: _envelope(
            "pooling",
            encoded,
            engine,
            [{"index": i, "object": "pooling", "data": [reward]} for i, reward in enumerate(rewards)],
        ),
    ),
}


# ------------------------------------------------------------------------------------------------------------ handlers


def router(names: tuple[str, ...], engine_of: Callable[[Request], Engine]) -> APIRouter:
    """The named routes, for an application; `engine_of` finds the engine of a request."""
    routes = APIRouter()
    for name in names:
        route = ROUTES[name]
        handler = _handler(route, engine_of)
        routes.add_api_route(route.path, handler, methods=["POST"], name=name, response_model=None)
    return routes


def _handler(route: Route, engine_of: Callable[[Request], Engine]):
    async def answer(
        request: Request,
        body: Any,  # of the type that is set below
        settings: Annotated[Settings, Query()],
    ):
        engine = engine_of(request)

        async def work():
            encoded = await engine.encode(lambda rollouts: encode_rows(route, body, rollouts, engine))
            if route.check:
                route.check(body, encoded)
            return encoded, await engine.rewards([list(row.ids) for row in encoded])

        try:
            if settings.transform == "length_residual":
                raise ValueError("transform='length_residual' needs all rewards of a step: apply it in the trainer.")
            transformed = Transform(settings.transform, engine.config, settings.reference)
            encoded, raw = await until_disconnected(request, work())
        except OverlengthError as error:
            raise HTTPException(413, sentence(error)) from error
        except ValueError as error:
            raise HTTPException(400, sentence(error)) from error
        rewards = transformed(raw).tolist()
        return JSONResponse(route.reply(rewards, body, encoded, engine))

    answer.__annotations__["body"] = route.request
    return answer


def encode_rows(route: Route, request: Any, rollouts: RolloutEncoder, engine: Engine) -> list[Encoded]:
    """Token ids of a request. `ValueError` names the row that cannot be scored."""
    rows = route.rows(request)
    if len(rows) > engine.max_texts:
        raise OverlengthError(f"the request has {len(rows)} texts; at most {engine.max_texts} are taken at once.")
    if longest := getattr(request, "max_length", None):
        rollouts = rollouts.with_max_length(min(longest, rollouts.encoder.max_length or longest))
    encoded = []
    for number, row in enumerate(rows):
        try:
            _check_template_kwargs(row)
            if isinstance(row, RenderedText):
                row = rollouts.rendered(row.text, row.special_tokens)
            if isinstance(row, (Encoded, Rendered)):
                _check_ids(row.ids, engine.vocab_size)
            if not isinstance(row, Encoded):
                row = rollouts.encode(row)
            elif len(row.ids) > (rollouts.encoder.max_length or len(row.ids)):
                raise OverlengthError(f"it has {len(row.ids)} tokens; at most {rollouts.encoder.max_length} are read.")
        except (ValueError, RecursionError) as error:
            kind = OverlengthError if isinstance(error, OverlengthError) else ValueError
            raise kind(f"text {number}: {error}") from error
        encoded.append(row)
    for what in sorted({part for row in encoded for part in row.unread}):
        warnings.warn(f"There are chats {left_out(what)}.", stacklevel=2)
    return encoded


def _check_template_kwargs(row: Any) -> None:
    """A template is a program, so none of a request is run."""
    given = {"chat_template_kwargs": row.template_kwargs} if isinstance(row, Rollout) else row
    if isinstance(given, dict) and "chat_template" in template_kwargs_of(given):
        raise ValueError("`chat_template_kwargs` has a `chat_template`. Leave it out: the model's own is used.")


def _check_ids(ids: Any, vocab_size: int) -> None:
    if not isinstance(ids, list) or not ids or not all(is_int(index) and 0 <= index < vocab_size for index in ids):
        raise ValueError(f"token ids are a list of whole numbers from 0 to {vocab_size - 1}; found {describe(ids)}.")


def sentence(error: Exception) -> str:
    """The message of an error as one line."""
    return " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()


async def until_disconnected(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`; it is cancelled when the client goes away."""

    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise HTTPException(499, "the client went away")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
