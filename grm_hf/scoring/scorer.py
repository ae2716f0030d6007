"""`GRMScorer` turns chats into rewards, in the given order, and reports truncation.

Equal texts are computed once, and so is a beginning that texts share: a prompt with many answers, the common turns of
histories, recurring prompts and responses in a set of pairs. For this, token sequences are sorted, so that those with
a common beginning are neighbours, and laid out in rows of a bounded number of tokens (`grm_hf.layouts`). This changes
a score by rounding at most; with `deterministic=True` it changes nothing.
"""

import math
import os
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from itertools import count, groupby, islice, repeat

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from ..attention import serve_segments
from ..chats import rows_of, to_score
from ..devices import evaluating, is_whole, own_device
from ..encoding import Encoded, Encoder, left_out, require_embedded
from ..folders import readable
from ..layouts import LAYOUTS, embedded_positions, lay_out, model_kwargs, resolve_layout
from ..modeling_grm import HUB_ARGUMENTS, GRMForSequenceClassification
from ..products import PackedWeights, quick_products
from ..signals import SIGNALS, Comparison, check_threshold, sigmoid
from .reader import Reader, tokenizing


# Tokens of a batch on a CPU from which on more unrelated text makes it no faster: its tensors leave the caches.
ENOUGH_ON_CPU = 1024

def _names(names: Iterable[str] | None) -> Iterable[str]:
    return (f"chat {number}" for number in count()) if names is None else names


@dataclass(frozen=True)
class Score:
    """
    Attributes:
        score (`float`): The reward.
        tokens (`int`): Number of tokens that were read.
        truncated (`bool`): Whether the text was longer than the model's `max_sequence_length` and lost its beginning.
        attributes (`dict[str, float]`): Those of the model by their names; `None` if it has none.
    """

    score: float
    tokens: int
    truncated: bool
    attributes: dict[str, float] | None = None


@dataclass(frozen=True)
class BestOfN:
    """
    Attributes:
        scores (`list[float]`): Rewards, in the order the answers were given.
        order (`list[int]`): Indices of the answers, best first; equal rewards keep the order given.
        best (`str`): The answer with the highest reward.
    """

    scores: list[float]
    order: list[int] = field(repr=False)
    best: str


class GRMScorer:
    r"""
    Scores chats with a reward model, by the policies in its configuration (template, end of turn, maximum length), so
    the reward is that of training.

    Args:
        model (`str`, `Path`, [`GRMForSequenceClassification`] or [`~peft.PeftModel`]):
            Hub id or folder, loaded onto the accelerator if there is one; or a live reward model, whose training mode
            and attention implementation do not change. Several scorers and threads may use one model at the same time,
            also while a [`GRMRewardTrainer`] trains it: scores and training steps take turns.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer. By default loaded from the same place.
        max_tokens_per_batch (`int`, *optional*, defaults to `8192`):
            Largest number of tokens of a batch, padding included; it bounds the memory. A longer text is a batch by
            itself. On a CPU a batch of 1,024 tokens takes no more texts but those that share its beginning.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.
        deterministic (`bool`, *optional*, defaults to `False`):
            Score each text alone, so the result is bit-identical whatever else you score (on the same machine, with
            the same libraries and number of threads). Nothing is shared, and a batch is one text: this is as slow as a
            loop.
        layout (`str`, *optional*, defaults to `"auto"`):
            `"shared_prefix"`, `"packed"` or `"padded"`; `"auto"` is the fastest layout that is exact for the model.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            With several processes: each computes a part, and every one gets all results. Each must hold the whole
            model and be given the same chats.
        dtype (`str` or `torch.dtype`, *optional*):
            Dtype of the body of a model that is loaded here. `"bfloat16"` is faster if the processor has the
            instructions, and exact within the tolerance of docs/numerics.md. The reward head stays in float32.
        **hub_arguments:
            `revision`, `subfolder`, `token`, `cache_dir`, ... of `from_pretrained`, for the model and its tokenizer.

    Example:

    ```python
    from grm_hf import GRMScorer

    scorer = GRMScorer("runs/demo/model")
    scorer.score([{"prompt": "What is 2 + 2?", "response": "4"}])
    ```
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        max_tokens_per_batch=8192,
        progress=False,
        deterministic=False,
        layout="auto",
        accelerator=None,
        dtype=None,
        **hub_arguments,
    ):
        if unknown := sorted(hub_arguments.keys() - set(HUB_ARGUMENTS)):
            raise TypeError(f"GRMScorer takes no argument {unknown[0]!r}.")
        if max_tokens_per_batch < 1:
            raise ValueError(f"`max_tokens_per_batch` is {max_tokens_per_batch}; it must be at least 1.")
        if deterministic and getattr(LAYOUTS.get(layout), "segments", False):
            raise ValueError(
                f"layout={layout!r} puts several texts into a row, and deterministic=True computes each alone. Leave "
                "`layout` at 'auto'."
            )
        given = {**({} if dtype is None else {"dtype": dtype}), **hub_arguments}
        loads = isinstance(model, (str, os.PathLike))
        if given and not loads:
            raise ValueError(f"The model is a live one, so {sorted(given)} cannot be applied. Load it with them.")
        if loads:
            if "subfolder" in given and os.path.isdir(model):
                model = os.path.join(model, given.pop("subfolder"))
                hub_arguments.pop("subfolder")
            with readable(model) as place:
                tokenizer = tokenizer or AutoTokenizer.from_pretrained(place, **hub_arguments)
                model = GRMForSequenceClassification.from_pretrained(place, **given).to(own_device())
        elif tokenizer is None:
            if not model.name_or_path:
                raise ValueError("The model was made in memory, so its tokenizer is not known. Pass `tokenizer`.")
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, **model.hub_arguments)
        if accelerator is not None and accelerator.num_processes > 1 and not is_whole(model):
            raise ValueError(
                "The model is split over the processes, and each of them would have to compute a part of the texts "
                "alone. Save it and load it in every process, or leave `accelerator` out."
            )
        self.model, self.tokenizer = model, tokenizer
        self.forward = model  # what is called; `save_golden` goes past accelerate's autocast
        self.encoder = Encoder.from_config(tokenizer, model.config)
        self._said: set[str] = set()  # what a warning was given for
        self._embeddings = model.get_input_embeddings().weight.shape[0], embedded_positions(model)
        self.max_tokens_per_batch, self.progress = max_tokens_per_batch, progress
        self.deterministic = deterministic
        self.layout = "padded" if deterministic else resolve_layout(layout, model)
        self.accelerator = accelerator
        # Of a model that was loaded here: nobody else changes it. One text alone is computed alike each time.
        self.packed = PackedWeights() if loads and not deterministic else None

    def score(self, chats: Iterable) -> list[float]:
        """
        Args:
            chats (`Iterable`):
                Each a list of messages that ends with the assistant's, a row (`{"prompt", "response"}`, `{"messages"}`
                or `{"text"}`), or plain text. The rows of a `Dataset` or a `DataFrame` are such rows.

        Returns:
            `list[float]`: raw rewards, in the order given.

        Raises:
            `ValueError`: a chat cannot be scored (the message has its index and the reason, and nothing was computed),
            or a reward is not a finite number.
        """
        return [result.score for result in self.stream(chats, window=None)]

    def stream(
        self, chats: Iterable, window: int | None = 1024, names: Iterable[str] | None = None
    ) -> Iterator[Score]:
        """As [`~GRMScorer.score`], with details and for any number of chats. Each process reads and computes `window`
        of them at a time; only these share a beginning. Errors call the chats by their `names`."""
        chats = rows_of(chats)
        named = zip(_names(names), repeat(self.encode), chats, strict=False)
        return self._stream(named, window, len(chats) if isinstance(chats, Sized) else None)

    def check(self, chats: Iterable, names: Iterable[str] | None = None) -> None:
        """Raises a `ValueError` if chats cannot be scored. It shows the first 20."""
        wrong = []
        for name, chat in zip(_names(names), rows_of(chats), strict=False):
            try:
                self.encoded(name, self.encode, chat)
            except ValueError as error:
                wrong.append(f"{name}: {error}")
        if wrong:
            more = f" And {len(wrong) - 20} more." if len(wrong) > 20 else ""
            raise ValueError("\n".join(wrong[:20]) + more)

    def score_pairs(self, rows: Iterable[dict]) -> list[tuple[float, float]]:
        """
        Args:
            rows (`Iterable[dict]`):
                Preference pairs as the trainer takes them: `chosen` and `rejected`, each text or messages, with or
                without a `prompt`. They are encoded as in training, so text is not put into a chat template.

        Returns:
            `list[tuple[float, float]]`: the rewards of the chosen and of the rejected response of each row.
        """
        flat = [result.score for result in self._stream_pairs(rows)]
        return list(zip(flat[::2], flat[1::2], strict=True))

    def _stream_pairs(self, rows: Iterable[dict]) -> Iterator[Score]:
        rows = rows_of(rows, "row")
        sides = (
            (f"row {number}, `{side}`", self._encode_side, (row, side))
            for number, row in enumerate(rows)
            for side in ("chosen", "rejected")
        )
        return self._stream(sides, None, 2 * len(rows) if isinstance(rows, Sized) else None)

    def attributes(self, chats: Iterable) -> list[dict[str, float]]:
        """
        Args:
            chats (`Iterable`):
                As for [`~GRMScorer.score`].

        Returns:
            `list[dict[str, float]]`: the model's attributes of each chat by their names, on the scale of the ratings
            that it learned.

        Raises:
            `ValueError`: as [`~GRMScorer.score`], or the model has no attributes.
        """
        self._require_attributes()
        return [result.attributes or {} for result in self.stream(chats, window=None)]

    def attributes_of_pairs(self, rows: Iterable[dict]) -> list[tuple[dict[str, float], dict[str, float]]]:
        """As [`~GRMScorer.score_pairs`], with the attributes of each response."""
        self._require_attributes()
        flat = [result.attributes or {} for result in self._stream_pairs(rows)]
        return list(zip(flat[::2], flat[1::2], strict=True))

    def _require_attributes(self):
        if not self._attribute_names:
            raise ValueError("The model has no attributes: its configuration has no `attribute_names`.")

    @property
    def _attribute_names(self) -> list[str]:
        return getattr(self.model.config, "attribute_names", None) or []  # an export is scored, too

    def best_of_n(self, prompt: str | list[dict], answers: list[str]) -> BestOfN:
        """
        Rank answers to one prompt. The prompt is computed once.

        Args:
            prompt (`str` or `list[dict]`):
                Messages, or one user message as text (plain text for a tokenizer without a chat template).
            answers (`list[str]`):
                At least one.

        Returns:
            [`BestOfN`].
        """
        answers = list(rows_of(answers, "answer"))
        if not answers:
            raise ValueError("`answers` is empty; there is nothing to rank.")
        named = ((f"answer {i}", self.encode, {"prompt": prompt, "response": a}) for i, a in enumerate(answers))
        scores = [result.score for result in self._stream(named, None, len(answers))]
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        return BestOfN(scores=scores, order=order, best=answers[order[0]])

    def probability(self, reward_a: float, reward_b: float) -> float:
        """Probability that A is preferred to B: the sigmoid of their difference over the model's temperature."""
        return sigmoid((reward_a - reward_b) / self.model.config.reward_temperature)

    # --------------------------------------------------------------------------------------------------------- signals

    def signals(self, chats: Iterable, names: Iterable[str], **settings) -> list[dict]:
        """
        What both heads say about answers, computed together: what two signals need is computed once.

        Args:
            chats (`Iterable`):
                As for [`~GRMScorer.score`].
            names (`Iterable[str]`):
                Rows of [`~grm_hf.signals.SIGNALS`].
            **settings:
                Of [`~grm_hf.signals.Settings`]: `beta`, `alpha`, `reference`, `draws`, `dropout`, `generate`,
                `max_new_tokens`, `wording`.

        Returns:
            `list[dict]`: a record for each chat, in the order given: `tokens`, `truncated`, each signal under its name
            (a larger value speaks for the answer), and what belongs to it under `name/detail`.

        Raises:
            `ValueError`: an unknown signal or setting, a signal that lacks what it needs, a chat that cannot be
                computed, with its index, or a number that is not finite.
        """
        return list(self.stream_signals(chats, names, window=None, **settings))

    def stream_signals(
        self, chats: Iterable, names: Iterable[str], window: int | None = 256, chat_names=None, **settings
    ) -> Iterator[dict]:
        """As [`~GRMScorer.signals`], for any number of chats: `window` of them for each process are computed at a time
        and share what they have in common. `chat_names` are what errors call them."""
        reader = Reader(self, names, settings)
        if window is not None:
            window *= 1 if self.accelerator is None else self.accelerator.num_processes
        named = zip(_names(chat_names), rows_of(chats), strict=False)
        with tqdm(desc="Signals", disable=not self._shows_progress, unit="chat") as bar:
            while group := list(islice(named, window)):
                yield from reader.records([reader.asked(chat, name) for name, chat in group])
                bar.update(len(group))
        reader.finish()

    def compare(
        self,
        prompt: str | list[dict],
        a: str,
        b: str,
        signals: Iterable[str] | None = None,
        threshold: float | None = None,
        **settings,
    ) -> Comparison:
        """
        Two answers to one prompt by several signals, and how far these agree.

        Args:
            prompt (`str` or `list[dict]`):
                As for [`~GRMScorer.best_of_n`].
            a, b (`str`):
                The answers.
            signals (`Iterable[str]`, *optional*):
                Rows of [`~grm_hf.signals.SIGNALS`]; the head is always among them. Left out: those that were chosen on
                a validation file (`grm eval --choose`), or the head alone.
            threshold (`float`, *optional*):
                The least agreement at which the comparison is not abstained from; that of the validation file if
                `signals` is left out.
            **settings:
                As for [`~GRMScorer.signals`]; a stored `reference` has two numbers.

        Returns:
            [`~grm_hf.signals.Comparison`].
        """
        chats = [({"prompt": prompt, "response": a}, {"prompt": prompt, "response": b})]
        return self.comparisons(chats, signals, threshold, **settings)[0]

    def comparisons(
        self,
        pairs: Iterable[tuple],
        signals: Iterable[str] | None = None,
        threshold: float | None = None,
        **settings,
    ) -> list[Comparison]:
        """As [`~GRMScorer.compare`], for many pairs of chats, each as [`~GRMScorer.score`] takes it; the two differ in
        their answers only. A stored `reference` has two numbers a pair."""
        chosen = self.model.config.signals or {}
        if signals is None:
            signals = chosen.get("names", [])
            threshold = chosen.get("threshold") if threshold is None else threshold
        check_threshold(threshold)
        reader = Reader(self, signals if isinstance(signals, str) else ["head", *signals], settings)
        if threshold is not None and reader.names == ("head",):
            raise ValueError("`threshold` is of the agreement of signals, and the head is alone. Name `signals`.")
        asked = []
        for number, pair in enumerate(pairs):
            for side, chat in zip("ab", pair, strict=True):
                asked.append(reader.asked(chat, f"pair {number}, {side}"))
        reader.finish()
        scales = {name: self.model.config.reward_temperature for name in reader.names if SIGNALS[name].is_reward}
        return reader.comparisons(asked, {**scales, **chosen.get("scales", {})}, threshold)

    def beside(self, model) -> "GRMScorer":
        """A scorer of another model on the same tokens, in the same way."""
        return GRMScorer(
            model, self.tokenizer, self.max_tokens_per_batch, deterministic=self.deterministic,
            accelerator=self.accelerator,
        )

    @property
    def _shows_progress(self) -> bool:
        return self.progress and (self.accelerator is None or self.accelerator.is_main_process)

    # ---------------------------------------------------------------------------------------------------------- tokens

    def encode(self, chat) -> Encoded:
        """The token ids of a chat, as [`~GRMScorer.score`] reads it."""
        return self.encoder.encode_chat(to_score(chat, bool(self.tokenizer.chat_template)))

    def encoded(self, name, encode, chat) -> Encoded:
        """`encode(chat)`, one call at a time; refuses tokens without an embedding. What the chat template leaves out
        is reported once."""
        with tokenizing:
            encoded = encode(chat)
            for what in sorted({*encoded.unread} - self._said):
                self._said.add(what)
                warnings.warn(f"There are chats {left_out(what)}: {name}, and perhaps others.", stacklevel=2)
        self.require_embedded(encoded.ids)
        return encoded

    def require_embedded(self, ids: Sequence[int]) -> None:
        """Raises `ValueError` if the model has no embedding for one of the ids, or for so many positions."""
        embeddings, positions = self._embeddings
        require_embedded(ids, embeddings, positions, self.tokenizer)

    def _encode_side(self, row_and_side) -> Encoded:
        row, side = row_and_side
        if row.get(side) is None:
            raise ValueError(f"it is missing; the row has {sorted(row)}. A pair has `chosen` and `rejected`.")
        prompt, response = row.get("prompt"), row[side]
        extras = {key: row[key] for key in ("tools", "chat_template_kwargs") if row.get(key) is not None}
        if isinstance(response, list) and (not prompt or isinstance(prompt, str)):  # the whole conversation
            return self.encoder.encode_chat({"messages": response, **extras})
        return self.encoder.encode_chat({"prompt": prompt or "", "response": response, **extras})

    # --------------------------------------------------------------------------------------------------------- rewards

    def _stream(self, named, window, total):
        if window is not None:
            window *= 1 if self.accelerator is None else self.accelerator.num_processes
        with tqdm(total=total, desc="Scoring", disable=not self._shows_progress, unit="chat") as bar:
            while group := list(islice(named, window)):
                texts, truncated = [], []
                for name, encode, chat in group:
                    try:
                        encoded = self.encoded(name, encode, chat)
                    except ValueError as error:
                        raise ValueError(f"{name}: {error}") from error
                    texts.append(array("i", encoded.ids))  # an eighth of what a list takes
                    truncated.append(encoded.truncated)
                found = self._numbers_of_ids(texts, bar, [name for name, _, _ in group])
                for (reward, *numbers), ids, cut in zip(found, texts, truncated, strict=True):
                    attributes = dict(zip(self._attribute_names, numbers, strict=True))
                    yield Score(reward, len(ids), cut, attributes or None)

    def rewards_of_ids(self, ids: Sequence[Sequence[int]], bar=None, names: list[str] | None = None) -> list[float]:
        """Rewards of token sequences, in the order given. Equal ones are computed once. `bar` advances with each text;
        errors call the sequences by their `names`. `ValueError` for rewards that are not finite numbers."""
        return [reward for reward, *_ in self._numbers_of_ids(ids, bar, names)]

    def attributes_of_ids(self, ids: Sequence[Sequence[int]]) -> list[dict[str, float]]:
        """Attributes of token sequences, as [`~GRMScorer.rewards_of_ids`]; empty if the model has none."""
        numbers = self._numbers_of_ids(ids)
        return [dict(zip(self._attribute_names, attributes, strict=True)) for _, *attributes in numbers]

    def _numbers_of_ids(self, ids, bar=None, names=None) -> list[list[float]]:
        """For each token sequence its reward and its attributes."""
        width = 1 + len(self._attribute_names)
        texts = [row if isinstance(row, array) else array("i", row) for row in ids]
        order = sorted(range(len(texts)), key=texts.__getitem__)
        groups = [list(group) for _, group in groupby(order, key=texts.__getitem__)]

        def compute(members, batch, _):
            batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
            out = self.forward(**model_kwargs(batch), use_cache=False)
            return torch.cat([out.logits, out.attributes], dim=1) if width > 1 else out.logits

        def done(members):
            bar.update(sum(len(groups[i]) for i in members))

        told = None if bar is None else done
        table = self.in_batches([texts[group[0]] for group in groups], width, compute, told).tolist()
        results: list[list[float]] = [[] for _ in texts]
        for group, numbers in zip(groups, table, strict=True):
            for i in group:
                results[i] = numbers
        if broken := [i for i, numbers in enumerate(results) if not all(map(math.isfinite, numbers))]:
            which = ", ".join(f"{names[i] if names else f'text {i}'}: {results[i][0]}" for i in broken[:3])
            raise ValueError(
                f"{len(broken)} of {len(results)} rewards are not finite numbers ({which}). The model's weights are "
                "broken, or overflow in its dtype."
            )
        return results

    def in_batches(self, texts: list[array], width: int, compute: Callable, done=None) -> torch.Tensor:
        """`(len(texts), width)` numbers of the sorted `texts`, in float64. `compute(members, batch, paths)` gives
        those of a batch, and [`lay_out`] says what that is; `done(members)` hears of each."""
        ranks = 1 if self.accelerator is None else self.accelerator.num_processes
        rank = 0 if self.accelerator is None else self.accelerator.process_index
        table = torch.zeros(len(texts), width, dtype=torch.float64)
        if LAYOUTS[self.layout].segments:
            serve_segments(self.model)
        if self.deterministic:
            batches = [[i] for i in range(len(texts))]
        else:
            enough = ENOUGH_ON_CPU if self.model.device.type == "cpu" else None
            batches = LAYOUTS[self.layout].batches(texts, self.max_tokens_per_batch, ranks, enough)
        for number, members in enumerate(batches):
            if number % ranks == rank:
                batch, paths = lay_out([texts[i] for i in members], self.layout)
                device, tokens = self.model.device, batch["input_ids"].numel()
                # For each batch, so that a trainer gets its turn.
                with torch.no_grad(), evaluating(self.model), quick_products(device, tokens, self.packed):
                    table[members] = compute(members, batch, paths).double().cpu()
            if done is not None:
                done(members)
        if ranks > 1:  # every rank has zeros for what others computed
            table = self.accelerator.reduce(table.to(self.accelerator.device), "sum").cpu()
        return table
