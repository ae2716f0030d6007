"""`GRMScorer` turns chats into rewards, in the given order, and reports truncation.

Equal texts are computed once, and so is a beginning that texts share: a prompt with many answers, the common turns of
histories, recurring prompts and responses in a set of pairs. For this, token sequences are sorted, so that those with
a common beginning are neighbours, and laid out in rows of a bounded number of tokens (`grm_hf.layouts`). This changes
a score by rounding at most; with `deterministic=True` it changes nothing.
"""

import math
import os
import threading
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence, Sized
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
from ..products import quick_products


def _names(names: Iterable[str] | None) -> Iterable[str]:
    return (f"chat {number}" for number in count()) if names is None else names


_tokenizing = threading.RLock()  # a call changes a fast tokenizer, so no other call may run


@dataclass(frozen=True)
class Score:
    """
    Attributes:
        score (`float`): The reward.
        tokens (`int`): Number of tokens that were read.
        truncated (`bool`): Whether the text was longer than the model's `max_sequence_length` and lost its beginning.
    """

    score: float
    tokens: int
    truncated: bool


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
            itself.
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
        if deterministic and layout not in ("auto", "padded"):
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
                self._encoded(name, self.encode, chat)
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
        rows = rows_of(rows, "row")
        sides = (
            (f"row {number}, `{side}`", self._encode_side, (row, side))
            for number, row in enumerate(rows)
            for side in ("chosen", "rejected")
        )
        total = 2 * len(rows) if isinstance(rows, Sized) else None
        flat = [result.score for result in self._stream(sides, None, total)]
        return list(zip(flat[::2], flat[1::2], strict=True))

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
        z = (reward_a - reward_b) / self.model.config.reward_temperature
        return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))

    # ---------------------------------------------------------------------------------------------------------- tokens

    def encode(self, chat) -> Encoded:
        """The token ids of a chat, as [`~GRMScorer.score`] reads it."""
        return self.encoder.encode_chat(to_score(chat, bool(self.tokenizer.chat_template)))

    def _encoded(self, name, encode, chat) -> Encoded:
        """`encode(chat)`, one call at a time; refuses tokens without an embedding. What the chat template leaves out
        is reported once."""
        with _tokenizing:
            encoded = encode(chat)
            for what in sorted({*encoded.unread} - self._said):
                self._said.add(what)
                warnings.warn(f"There are chats {left_out(what)}: {name}, and perhaps others.", stacklevel=2)
        embeddings, positions = self._embeddings
        require_embedded(encoded.ids, embeddings, positions, self.tokenizer)
        return encoded

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
        shown = self.progress and (self.accelerator is None or self.accelerator.is_main_process)
        with tqdm(total=total, desc="Scoring", disable=not shown, unit="chat") as bar:
            while group := list(islice(named, window)):
                texts, truncated = [], []
                for name, encode, chat in group:
                    try:
                        encoded = self._encoded(name, encode, chat)
                    except ValueError as error:
                        raise ValueError(f"{name}: {error}") from error
                    texts.append(array("i", encoded.ids))  # an eighth of what a list takes
                    truncated.append(encoded.truncated)
                rewards = self.rewards_of_ids(texts, bar, [name for name, _, _ in group])
                results = zip(rewards, texts, truncated, strict=True)
                yield from (Score(reward, len(ids), cut) for reward, ids, cut in results)

    def rewards_of_ids(self, ids: Sequence[Sequence[int]], bar=None, names: list[str] | None = None) -> list[float]:
        """Rewards of token sequences, in the order given. Equal ones are computed once. `bar` advances with each text;
        errors call the sequences by their `names`. `ValueError` for rewards that are not finite numbers."""
        texts = [row if isinstance(row, array) else array("i", row) for row in ids]
        order = sorted(range(len(texts)), key=texts.__getitem__)
        groups = [list(group) for _, group in groupby(order, key=texts.__getitem__)]
        distinct = [texts[group[0]] for group in groups]
        ranks = 1 if self.accelerator is None else self.accelerator.num_processes
        rank = 0 if self.accelerator is None else self.accelerator.process_index
        rewards = [0.0] * len(distinct)
        if LAYOUTS[self.layout].segments:
            serve_segments(self.model)
        device = self.model.device
        if self.deterministic:
            batches = [[i] for i in range(len(distinct))]
        else:
            batches = LAYOUTS[self.layout].batches(distinct, self.max_tokens_per_batch, ranks)
        for number, members in enumerate(batches):
            if number % ranks == rank:
                batch, _ = lay_out([distinct[i] for i in members], self.layout)
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                # For each batch, so that a trainer gets its turn.
                with torch.no_grad(), evaluating(self.model), quick_products(device, batch["input_ids"].numel()):
                    logits = self.forward(**model_kwargs(batch), use_cache=False).logits
                for i, reward in zip(members, logits.squeeze(-1).tolist(), strict=True):
                    rewards[i] = reward
            if bar is not None:
                bar.update(sum(len(groups[i]) for i in members))
        if ranks > 1:  # every rank has zeros for what others computed
            whole = torch.tensor(rewards, dtype=torch.float64, device=self.accelerator.device)
            rewards = self.accelerator.reduce(whole, "sum").tolist()
        results = [0.0] * len(texts)
        for group, reward in zip(groups, rewards, strict=True):
            for i in group:
                results[i] = reward
        if broken := [i for i, reward in enumerate(results) if not math.isfinite(reward)]:
            which = ", ".join(f"{names[i] if names else f'text {i}'}: {results[i]}" for i in broken[:3])
            raise ValueError(
                f"{len(broken)} of {len(results)} rewards are not finite numbers ({which}). The model's weights are "
                "broken, or overflow in its dtype."
            )
        return results
