"""`Reader`: what signals (`grm_hf.signals`) ask for, computed by a scorer: on its tokens, in its batches, with a
reference beside it."""

import math
import os
import threading
import warnings
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from ..attention import grm_within
from ..chats import as_messages, to_score
from ..devices import alone, evaluating
from ..encoding import template_kwargs_of, text_of
from ..folders import readable
from ..layouts import embedded_positions, model_kwargs, text_tokens
from ..logprobs import token_values
from ..modeling_grm import GRMForSequenceClassification
from ..signals import (
    SIGNALS,
    Asked,
    Comparison,
    Read,
    Reading,
    Settings,
    Writing,
    checked,
    compared,
    dropout_masks,
    record_of,
    run,
    unread,
)


tokenizing = threading.RLock()  # a fast tokenizer sets itself up in a call, and cannot while another one runs
WIDTH = 5  # numbers of a Read besides `tokens` and `draws`


class Reader:
    """
    Signals of the chats of one call.

    Args:
        scorer ([`GRMScorer`]):
            The model, its tokenizer, and how texts are put together.
        names (`Iterable[str]`):
            The signals.
        settings (`dict`):
            Of [`~grm_hf.signals.Settings`].
    """

    def __init__(self, scorer, names: Iterable[str], settings: dict[str, Any]):
        self.scorer, self.settings = scorer, Settings.of(settings)
        self.names = checked(names, self.settings)
        given = [name for name, value in settings.items() if value is not None and name != "reference"]
        if ignored := unread(given, self.names):
            warnings.warn(
                f"`{'`, `'.join(ignored)}` {'is' if len(ignored) == 1 else 'are'} ignored: none of the signals "
                f"{', '.join(self.names)} depends on it.",
                stacklevel=1,  # so that it is said once
            )
        self.grm = grm_within(scorer.model)
        wrapped = vars(scorer.model).get("_adapted", scorer.model)  # as PEFT wraps it
        self.adapted: Any = wrapped if hasattr(wrapped, "disable_adapter") else None
        self.known: list[float] | None = None  # log-probabilities of the reference, one for each chat
        self.reference = self._reference(self.settings.reference)
        self.count = 0

    def _reference(self, given):
        """A scorer of the reference; `None` where it is the adapter switched off, or its numbers are known."""
        if not any(SIGNALS[name].needs == "reference" for name in self.names):
            if given is not None:
                raise ValueError(f"`reference` is given, and none of the signals {list(self.names)} needs one.")
            return None
        if given is None:
            if self.adapted is None:
                raise ValueError(
                    "the signal 'implicit' compares with the language model before training, and this model has no "
                    "adapter to switch off. Pass it as `reference` (a Hub id, a folder, a live model, or stored "
                    "log-probabilities), or use 'implicit_free'."
                )
            return None
        if isinstance(given, (list, tuple)):
            self.known = [float(number) for number in given]
            for i, number in enumerate(self.known):
                if not math.isfinite(number):
                    raise ValueError(f"`reference` holds {number} for chat {i}; give finite numbers.")
            return None
        return reference_scorer(self.scorer, given)

    def asked(self, chat, name: str) -> Asked:
        """A chat, tokenised. `name` is what an error calls it."""
        try:
            encoded = self.scorer.encoded(name, self.scorer.encode, chat)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        known = None
        if self.known is not None:
            if self.count >= len(self.known):
                raise ValueError(f"`reference` holds {len(self.known)} log-probabilities; there are more chats.")
            known = self.known[self.count]
        self.count += 1
        return Asked(encoded, *self._messages(chat), self.scorer.encoder, self.settings, name, known)

    def _messages(self, chat) -> tuple[list[dict] | None, str, dict[str, Any]]:
        """The messages of a chat, the text of the last one, and what else its template takes; no messages for text."""
        chat = to_score(chat, bool(self.scorer.tokenizer.chat_template))
        row = chat if isinstance(chat, dict) else {}
        extras = {"tools": row.get("tools"), **template_kwargs_of(row)}
        if isinstance(chat, dict) and "messages" not in chat:
            prompt, response = chat.get("prompt") or [], chat.get("response", chat.get("completion"))
            response = [response] if isinstance(response, dict) else response
            chat = "" if isinstance(prompt, str) else as_messages({"prompt": prompt, "response": response})
        if isinstance(chat, str):
            return None, "", extras
        messages = as_messages(chat)
        return messages, text_of(messages[-1]), extras

    def finish(self) -> None:
        """Refuse stored log-probabilities of another number of chats."""
        if self.known is not None and self.count != len(self.known):
            raise ValueError(f"`reference` holds {len(self.known)} log-probabilities; there are {self.count} chats.")

    def records(self, asked: list[Asked]) -> list[dict[str, Any]]:
        return self._records(asked, {})[0]

    def _records(self, asked, pairs) -> tuple[list[dict[str, Any]], dict]:
        """A record of each chat, and what was found for `pairs`, computed together."""
        alone = {(i, name): SIGNALS[name].function(chat) for i, chat in enumerate(asked) for name in self.names}
        found = self._run(alone | pairs, asked)
        records = [
            {"tokens": len(chat.answer.ids), "truncated": chat.answer.truncated}
            | record_of({name: found[i, name] for name in self.names})
            for i, chat in enumerate(asked)
        ]
        return records, found

    def comparisons(
        self, asked: list[Asked], scales: Mapping[str, float], threshold: float | None
    ) -> list[Comparison]:
        """Of each two chats that follow each other."""
        places = range(0, len(asked), 2)
        whole = {name: pair for name in self.names if (pair := SIGNALS[name].pair)}
        pairs = {(i, name, "pair"): pair(asked[i], asked[i + 1]) for i in places for name, pair in whole.items()}
        records, found = self._records(asked, pairs)
        return [
            compared(
                self.names, records[i], records[i + 1], {name: found[i, name, "pair"] for name in whole}, scales,
                threshold,
            )
            for i in places
        ]

    # -------------------------------------------------------------------------------------------------------- computed

    def _run(self, askings, asked):
        def said(key):
            return f"{asked[key[0]].name}, signal {key[1]!r}"

        return run(askings, self._reads, self._writes, said, tokenizing)

    def _reads(self, readings: list[Reading]) -> list[Read]:
        """What the model, and for some of them the reference, computes of readings, in the order given."""
        results: dict[Reading, Read] = {}
        if own := [reading for reading in readings if not reading.reference]:
            results |= zip(own, self._measured(self.scorer, own), strict=True)
        if others := [reading for reading in readings if reading.reference]:
            with ExitStack() as stack:
                if self.reference is None:
                    stack.enter_context(alone(self.scorer.model))  # nobody else is to compute without the adapter
                    stack.enter_context(self.adapted.disable_adapter())
                found = self._measured(self.reference or self.scorer, others)
            results |= zip(others, found, strict=True)
        return [results[reading] for reading in readings]

    def _measured(self, scorer, readings: list[Reading]) -> list[Read]:
        for reading in readings:
            scorer.require_embedded(reading.ids)
        order = sorted(range(len(readings)), key=lambda i: (readings[i].ids, readings[i].start))
        width = self.grm.get_output_embeddings().weight.shape[-1]
        masks = dropout_masks(self.scorer.model.config, width, self.settings)
        if not any(reading.draws for reading in readings):
            masks = masks[:0]

        def compute(members, batch, paths):
            part = [readings[order[i]] for i in members]
            return measure(scorer.forward, batch, paths, part, masks, self.settings.alpha)

        texts = [array("i", readings[i].ids) for i in order]
        table = scorer.in_batches(texts, WIDTH + len(masks), compute)
        if not table.isfinite().all():
            raise ValueError(
                "some numbers of the signals are not finite. The model's weights are broken, or overflow in its dtype."
            )
        found = {}
        for i, row in zip(order, table.tolist(), strict=True):
            counted = len(readings[i].ids) - max(readings[i].start, 1)
            reward, logp, soft, first, last = row[:WIDTH]
            found[i] = Read(reward, counted, logp, soft, first, last, tuple(row[WIDTH:]))
        return [found[i] for i in range(len(readings))]

    def _writes(self, writings: list[Writing]) -> list[str]:
        """How the LM head goes on, without chance; one at a time, so that a text does not depend on its neighbours."""
        tokenizer, ends = self.scorer.tokenizer, self.grm.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        positions = embedded_positions(self.scorer.model) or math.inf
        texts = []
        for writing in writings:
            self.scorer.require_embedded(writing.ids)
            greedy = GenerationConfig(  # what is left out is the model's own: penalties and beams of its chats
                do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
                max_new_tokens=int(min(self.settings.max_new_tokens, positions - len(writing.ids) + 1)),
                eos_token_id=sorted(ends), pad_token_id=tokenizer.eos_token_id,
            )
            ids = torch.tensor([writing.ids], device=self.grm.device)
            with torch.no_grad(), evaluating(self.scorer.model):
                out = self.grm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
            texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
        return texts


def reference_scorer(scorer, given):
    """A scorer of the reference, on the tokens of `scorer`: of a Hub id, a folder or a live model. A scorer is one."""
    if hasattr(given, "rewards_of_ids"):
        return given
    if isinstance(given, (str, os.PathLike)):
        with readable(given) as place:
            is_grm = AutoConfig.from_pretrained(place).model_type == "grm"
            load = GRMForSequenceClassification.from_pretrained if is_grm else _with_head
            given = load(place).to(scorer.model.device)
    elif not isinstance(given, torch.nn.Module):
        raise ValueError(
            f"`reference` is {type(given).__name__}; give a language model (a Hub id, a folder, a live model), or a "
            "list of its log-probabilities, a number for each chat."
        )
    elif grm_within(given) is None:
        given = _with_head(given)
    return scorer.beside(given)


def _with_head(base):
    """A causal language model as a scorer takes it, with a reward head that nobody asks; always the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GRMForSequenceClassification.from_base(base, head_type="linear")


def measure(
    forward: Callable,
    batch: dict[str, torch.Tensor],
    paths: Sequence[Sequence[int]],
    readings: Sequence[Reading],
    masks: torch.Tensor,
    alpha: float,
) -> torch.Tensor:
    """
    One forward for several readings.

    Args:
        forward (`Callable`): The model.
        batch, paths: What [`lay_out`] made of the readings' ids.
        readings (`Sequence[Reading]`): The readings.
        masks (`torch.Tensor` of shape `(draws, hidden_size)`): What dropout multiplies hidden states by.
        alpha (`float`): See [`Settings`].

    Returns:
        `torch.Tensor` of shape `(num_readings, WIDTH + draws)`, in float64: `reward`, `logp`, `soft`, `first`, `last`
        and the draws; 0 where a reading does not ask.
    """
    asked = [i for i, reading in enumerate(readings) if reading.text]
    tokens = text_tokens(
        [readings[i].ids for i in asked], [readings[i].start for i in asked], [paths[i] for i in asked]
    )
    ends = [i for i in asked if readings[i].values]
    drawn = [i for i, reading in enumerate(readings) if reading.draws]
    last = torch.tensor([path[-1] for path in paths])
    index = tokens["text_index"]
    if "output_rows" in batch:
        batch = {**batch, "output_rows": torch.cat([batch["output_rows"], index, last[ends]]).unique()}
    device = batch["input_ids"].device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}

    def ask(hidden, model, index, targets):
        return token_values(hidden, model, index.to(hidden.device), targets.to(hidden.device), alpha).double().cpu()

    def look(hidden, model):
        said = ask(hidden, model, index, tokens["text_targets"])
        # By themselves: the bits of a matrix product depend on its number of rows.
        behind = ask(hidden, model, last[ends], torch.zeros(len(ends), dtype=torch.long))
        states = hidden.flatten(0, 1)[last[drawn].to(hidden.device)]
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        return said, behind, model.score(states * masks.to(states)[:, None]).squeeze(-1) if drawn else None

    out = forward(**model_kwargs(batch), use_cache=False, lm_fn=look)
    said, behind, under_dropout = out.lm_output
    table = torch.zeros(len(readings), WIDTH + len(masks), dtype=torch.float64)
    table[:, 0] = out.logits.squeeze(-1).double().cpu()
    if asked:
        owner, count = tokens["text_owner"], len(index)
        table[asked, 1:3] = torch.zeros(len(asked), 2, dtype=torch.float64).index_add(0, owner, said[:, :2])
        begins = torch.searchsorted(owner, torch.arange(len(asked))).clamp(max=max(count - 1, 0))
        table[asked, 3] = said[begins, 2] if count else 0.0
        table[ends, 4] = behind[:, 2]
    if drawn:
        table[drawn, WIDTH:] = under_dropout.double().cpu().T
    return table
