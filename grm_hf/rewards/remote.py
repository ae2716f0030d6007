"""The client of a served reward model: rewards over HTTP from `grm serve`, from vLLM with this package's plugin, or
from any server with one of the protocols below. It needs no weights, and only the standard library.
"""

import json
import math
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from transformers import AutoConfig, AutoTokenizer

from ..chats import rows_of
from ..configuration_grm import GRMConfig, take_policies
from ..encoding import Encoder, left_out
from ..folders import require_base
from ..scoring import Score
from .rollouts import Rendered, Rollout, RolloutEncoder


@dataclass(frozen=True)
class Protocol:
    """
    The request to a route, and the reading of its reply.

    Attributes:
        sends (`str`): `"chats"`, which the server renders, or `"ids"` or `"texts"`, which the client makes.
        request (`Callable`): From a batch of these to the JSON of a request.
        reply (`Callable`): From the JSON of a reply to the rewards.
        at_once (`int`): Largest number of them in one request.
        read (`Callable`, *optional*): From the JSON of a reply to what the server read of each chat, if it rendered
            them: number of tokens, whether it was cut, and what the template left out.
    """

    sends: str
    request: Callable[[list], Any]
    reply: Callable[[Any], list[float]]
    at_once: int = 64
    read: Callable[[Any], Iterable[tuple[int, bool, list[str]]]] | None = None


PROTOCOLS = {
    "/score": Protocol(
        "chats", lambda chats: {"chats": chats}, lambda reply: reply["rewards"],
        read=lambda reply: zip(reply["tokens"], reply["truncated"], reply["unread"], strict=True),
    ),
    "/classify": Protocol(
        "ids",
        lambda ids: {"input": ids, "use_activation": False},
        lambda reply: [row["probs"][-1] for row in sorted(reply["data"], key=lambda row: row["index"])],
    ),
    "/pooling": Protocol(
        "ids",
        lambda ids: {"input": ids, "use_activation": False},
        lambda reply: [_number(row["data"]) for row in sorted(reply["data"], key=lambda row: row["index"])],
    ),
    "/get_reward": Protocol(
        "texts", lambda texts: {"query": texts, "prompts": [], "labels": []}, lambda reply: reply["rewards"]
    ),
    "/v1/score/evaluation": Protocol(
        "texts", lambda texts: {"model": "model", "messages": texts}, lambda reply: reply["scores"]
    ),
    "/slime": Protocol(
        "texts", lambda texts: {"prompt": "", "response": texts[0], "label": None}, lambda reply: [reply], at_once=1
    ),
    "/predict": Protocol(
        "texts",
        lambda texts: {"inputs": [[text] for text in texts], "raw_scores": True, "truncate": True,
                       "truncation_direction": "Left"},
        lambda reply: [labels[0]["score"] for labels in reply],
    ),
}  # fmt: skip
AGAIN = (408, 425, 429, 500, 502, 503, 504)
REST = 300.0  # seconds for which an address that did not answer is the last to be asked


class RemoteScorer:
    """
    Scores chats and rollouts by a served reward model.

    Args:
        urls (`str` or `list[str]`):
            One address, or several of the same model, which share the work; one that does not answer is asked last
            for five minutes. The path names the route, one of `PROTOCOLS`. Without a path it is `/score`, the route
            of this package, which gets chats unchanged. The query (`?transform=standardize`) is sent with each
            request.
        tokenizer (`str`, *optional*):
            Hub id or folder of the reward model, required for every route but `/score`. Its tokenizer and its
            configuration are read, not its weights.
        api_key (`str`, *optional*):
            Sent as a bearer token. A password in the address (`http://:KEY@host:8000`) does the same.
        timeout (`float`, *optional*, defaults to `180`):
            Seconds that one request may take.
        retries (`int`, *optional*, defaults to `9`):
            How often a request is sent again, to the next address, after a temporary failure. The waits between
            them double from a quarter of a second up to 16 seconds; nine come to a minute.

    Raises:
        `ValueError`: an address is invalid, a server refuses a request, or a reply is not one number for each text;
        `ConnectionError`: no server answered.
    """

    def __init__(self, urls, tokenizer=None, api_key=None, timeout=180.0, retries=9):
        urls = [urls] if isinstance(urls, str) else list(urls)
        if not urls:
            raise ValueError("There is no address. Give one, such as http://localhost:8000.")
        if not (timeout > 0 and retries >= 0):
            raise ValueError(f"`timeout` is {timeout} and `retries` is {retries}; more than 0 s, and 0 or more.")
        self.timeout, self.retries = timeout, retries
        self.places = [_place(url, api_key) for url in urls]
        paths = {path for _, path, _ in self.places}
        if len(paths) > 1 or not paths <= PROTOCOLS.keys():
            raise ValueError(f"The addresses name the routes {sorted(paths)}; give one of {sorted(PROTOCOLS)} to all.")
        [self.route] = paths
        self.protocol = PROTOCOLS[self.route]
        self.source = urls[0].split("?")[0], None
        self.model, self.tokenizer, self.rollouts = None, None, None
        self._said: set[str] = set()  # what a warning was given for
        self._failed_at = [-math.inf] * len(urls)
        if tokenizer is not None:
            config = _config_of(tokenizer)
            self.model = SimpleNamespace(config=config)  # where `Transform` finds the stored mean
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
            self.rollouts = RolloutEncoder(Encoder.from_config(self.tokenizer, config))
        elif self.protocol.sends != "chats":
            raise ValueError(
                f"{self.route} takes {self.protocol.sends}, which are made here: pass `tokenizer`, the Hub id or "
                "folder of the reward model (its weights are not loaded). Or name the route /score, to which chats "
                "are sent as they are."
            )

    def score(self, chats: Iterable) -> list[float]:
        """Rewards of chats and rollouts, in the order given."""
        return [score.score for score in self.stream(chats)]

    def stream(self, chats: Iterable) -> Iterator[Score]:
        """As [`~RemoteScorer.score`], with details."""
        named = [self._sent(number, chat) for number, chat in enumerate(rows_of(chats))]
        size = self.protocol.at_once
        batches = [named[start : start + size] for start in range(0, len(named), size)]
        with ThreadPoolExecutor(max_workers=8 * len(self.places)) as pool:
            replies = list(pool.map(self._ask, range(len(batches)), [[sent for sent, _ in b] for b in batches]))
        rewards = chain.from_iterable(rewards for rewards, _ in replies)
        read = [*chain.from_iterable(read for _, read in replies)] or [read for _, read in named]
        for what in sorted({part for _, _, unread in read for part in unread} - self._said):
            self._said.add(what)
            warnings.warn(f"There are chats {left_out(what)}.", stacklevel=2)
        return (Score(reward, tokens, cut) for reward, (tokens, cut, _) in zip(rewards, read, strict=True))

    def _sent(self, number: int, chat) -> tuple[Any, Any]:
        """The part of a chat that is sent; and what of it is read, which for chats only the server knows."""
        if self.protocol.sends == "chats":
            return _json(chat), None
        try:
            encoded = self.rollouts.encode(chat)
        except ValueError as error:
            raise ValueError(f"chat {number}: {error}") from error
        ids = list(encoded.ids)
        read = len(ids), encoded.truncated, encoded.unread
        if self.protocol.sends == "ids":
            return ids, read
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if list(self.tokenizer(text, add_special_tokens=False).input_ids) != ids:
            raise ValueError(
                f"chat {number}: its token ids, written as text for {self.route}, come back as other ids. Use the "
                "route /score or /classify."
            )
        return text, read

    def _ask(self, number: int, batch: list) -> tuple[list[float], list]:
        """The rewards of a batch, and what the server read of it."""
        try:
            body = json.dumps(self.protocol.request(batch)).encode()
        except TypeError as error:
            raise ValueError(
                f"a chat cannot be sent as JSON ({error}). Give text, lists, dictionaries, numbers."
            ) from error
        places = self._places_for(number)
        for attempt in range(self.retries + 1):
            place = places[attempt % len(places)]
            url, _, headers = self.places[place]
            try:
                reply = self._post(url, body, headers)
                break
            except urllib.error.HTTPError as error:
                said = _message(error.read())
                if error.code not in AGAIN:
                    first = number * self.protocol.at_once
                    said += f" (Its text 0 is chat {first}.)" if first else ""
                    raise ValueError(f"{url} answers {error.code}: {said}") from error
                failure, wait = f"it answers {error.code}: {said}", error.headers.get("Retry-After")
            except (OSError, json.JSONDecodeError) as error:  # refused, reset, timed out, cut off
                failure, wait = str(error), None
                self._failed_at[place] = time.monotonic()
            if attempt == self.retries:
                raise ConnectionError(f"{url} gave no reward in {attempt + 1} attempts; {failure}")
            asked = float(wait) if wait and wait.isdecimal() else 0.0
            time.sleep(max(asked, min(0.25 * 2**attempt, 16.0)))
        try:
            rewards = [_number(reward) for reward in self.protocol.reply(reply)]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise self._other_reply(url, reply) from error
        if len(rewards) != len(batch):
            raise ValueError(f"{url} gives {len(rewards)} rewards for {len(batch)} texts.")
        if not all(map(math.isfinite, rewards)):
            raise ValueError(f"{url} gives rewards that are not numbers: {rewards[:5]}.")
        try:
            read = [*self.protocol.read(reply)] if self.protocol.read else []
        except (KeyError, TypeError, ValueError) as error:
            raise self._other_reply(url, reply) from error
        return rewards, read

    def _places_for(self, number: int) -> list[int]:
        """The addresses in the order in which a batch tries them."""
        count, now = len(self.places), time.monotonic()
        return sorted(range(count), key=lambda i: (now - self._failed_at[i] < REST, (i - number) % count))

    def _other_reply(self, url: str, reply: Any) -> ValueError:
        return ValueError(f"{url} gives another reply than {self.route} has: {str(reply)[:200]}")

    def _post(self, url: str, body: bytes, headers: dict) -> Any:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            return json.load(response)


def _config_of(place: str) -> Any:
    """The configuration of a reward model, or of an adapter of one: that of its base, with the adapter's policies."""
    folder = Path(place)
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(place)
    base: Any = folder / "base"  # beside the adapters of most runs
    if not (base / "config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
        require_base(base, place)
    config = GRMConfig.from_pretrained(base)
    take_policies(config, place)
    return config


def is_address(model: Any) -> bool:
    """Whether `model` is an address, or several, of a served reward model."""
    urls = model if isinstance(model, (list, tuple)) else [model]
    return bool(urls) and all(isinstance(url, str) and url.startswith(("http://", "https://")) for url in urls)


def _place(url: str, api_key: str | None) -> tuple[str, str, dict]:
    """The address to call, its path, and the headers for it."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"'{url}' is no address. Give one such as http://localhost:8000/score.")
    path = parts.path.rstrip("/") or "/score"
    key = api_key or parts.password
    address = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, parts.query, ""))
    # A route may lie behind the prefix of a gateway.
    route = next((name for name in PROTOCOLS if path.endswith(name)), path)
    return address, route, {"Authorization": f"Bearer {key}"} if key else {}


def _json(chat: Any) -> Any:
    if isinstance(chat, Rollout):
        more = {"tools": chat.tools, "chat_template_kwargs": chat.template_kwargs}
        sent = {"prompt": chat.prompt, "completion": chat.completion}
        return {**sent, **{name: value for name, value in more.items() if value}}
    return {"ids": list(chat.ids)} if isinstance(chat, Rendered) else chat


def _number(value: Any) -> float:
    """A number, also if it is in a list of one."""
    while isinstance(value, list):
        [value] = value
    return float(value)


def _message(body: bytes) -> str:
    """The sentence of an error reply, in the form of vLLM and of FastAPI."""
    try:
        reply = json.loads(body)
        return reply["error"]["message"] if "error" in reply else str(reply["detail"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace")[:300]
