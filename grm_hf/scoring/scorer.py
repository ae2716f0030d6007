"""`GRMScorer`: chats in, rewards out, in the order given and with what was cut said.

Every distinct text is computed once, and so is what texts have in common at their beginning: a prompt with many
answers, the turns that histories share, the prompts and responses that recur in a set of pairs. To that end token
sequences are sorted, which puts those that begin alike side by side, and laid out in rows of a bounded number of
tokens (`grm_hf.layouts`). A score does not depend on this beyond rounding; with `deterministic=True` not even that.
"""

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from itertools import groupby, islice, pairwise

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from ..attention import layout_attention
from ..devices import evaluating, is_whole, own_device
from ..encoding import Encoded, Encoder
from ..layouts import MIN_SHARED, common_prefix, model_kwargs, plant, resolve_layout
from ..modeling_grm import GRMForSequenceClassification
from ..products import quick_products


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
    Scores chats with a reward model, by the policies frozen in its configuration (template, end of turn, maximum
    length), so that the number is the one training saw.

    Args:
        model (`str` or [`GRMForSequenceClassification`] or [`~peft.PeftModel`]):
            Hub id or folder, loaded onto the accelerator if there is one; or a live reward model, which is left as it
            was (training mode, attention implementation).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; loaded from the same place if left out.
        max_tokens_per_batch (`int`, *optional*, defaults to `8192`):
            Most tokens of a batch, padding included; this bounds the memory. A longer text is a batch of its own.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.
        deterministic (`bool`, *optional*, defaults to `False`):
            Compute each text alone, so that its score has the same bits whatever it is scored with (same machine,
            libraries and number of threads). Nothing is shared and no batch is larger than one text: as slow as a
            loop, and on a GPU slower by the size of the batches.
        layout (`str`, *optional*, defaults to `"auto"`):
            `"shared_prefix"`, `"packed"` or `"padded"`; `"auto"` is the fastest that is exact for the model.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            With several processes: each computes a part, and every one gets all results. Each must hold the whole
            model and be given the same chats.
        dtype (`str` or `torch.dtype`, *optional*):
            Of the body of a model that is loaded here, such as `"bfloat16"`, which is faster where the processor has
            the instructions and within the tolerance of docs/numerics.md. The head stays in float32.

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
    ):
        if max_tokens_per_batch < 1:
            raise ValueError(f"`max_tokens_per_batch` is {max_tokens_per_batch}; it must be at least 1.")
        if deterministic and layout not in ("auto", "padded"):
            raise ValueError(
                f"layout={layout!r} puts several texts into a row, and deterministic=True computes each alone. Leave "
                "`layout` at 'auto'."
            )
        given = {} if dtype is None else {"dtype": dtype}
        if given and not isinstance(model, str):
            raise ValueError(f"The model is a live one, so dtype={dtype!r} cannot be applied. Load it with it.")
        if isinstance(model, str):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
            model = GRMForSequenceClassification.from_pretrained(model, **given).to(own_device())
        elif tokenizer is None:
            if not model.name_or_path:
                raise ValueError("The model was made in memory, so its tokenizer is not known. Pass `tokenizer`.")
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        if accelerator is not None and accelerator.num_processes > 1 and not is_whole(model):
            raise ValueError(
                "The model is split over the processes, and each of them would have to compute a part of the texts "
                "alone. Save it and load it in every process, or leave `accelerator` out."
            )
        self.model, self.tokenizer = model, tokenizer
        self.encoder = Encoder.from_config(tokenizer, model.config)
        self.max_tokens_per_batch, self.progress = max_tokens_per_batch, progress
        self.deterministic = deterministic
        self.layout = "padded" if deterministic else resolve_layout(layout, model)
        self.accelerator = accelerator

    def score(self, chats: Iterable) -> list[float]:
        """
        Args:
            chats (`Iterable`):
                Each a list of messages that ends with the assistant's, a row (`{"prompt", "response"}` or
                `{"messages"}`), or plain text.

        Returns:
            `list[float]`: raw rewards, in the order given.

        Raises:
            `ValueError`: a chat cannot be scored, with its index and why. Nothing has been computed then.
        """
        return [result.score for result in self.stream(chats, window=None)]

    def stream(self, chats: Iterable, window: int | None = 1024) -> Iterator[Score]:
        """As [`~GRMScorer.score`], with details and for any number of chats: `window` of them for each process are
        read and computed at a time, and share what they have in common."""
        named = ((f"chat {number}", self.encode, chat) for number, chat in enumerate(chats))
        return self._stream(named, window, len(chats) if isinstance(chats, Sized) else None)

    def score_pairs(self, rows: Iterable[dict]) -> list[tuple[float, float]]:
        """
        Args:
            rows (`Iterable[dict]`):
                Preference pairs as the trainer takes them: `chosen` and `rejected`, each text or messages, with or
                without a `prompt`. They are encoded as in training, so text is not put into a chat template.

        Returns:
            `list[tuple[float, float]]`: the rewards of the chosen and of the rejected response of each row.
        """
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
        Rank answers to one prompt, which is computed once.

        Args:
            prompt (`str` or `list[dict]`):
                Messages, or one user message as text (plain text for a tokenizer without chat template).
            answers (`list[str]`):
                At least one.

        Returns:
            [`BestOfN`].
        """
        if not answers:
            raise ValueError("`answers` is empty; there is nothing to rank.")
        scores = self.score([{"prompt": prompt, "response": answer} for answer in answers])
        if broken := [i for i, score in enumerate(scores) if math.isnan(score)]:
            raise ValueError(
                f"the rewards of answers {broken} are not numbers (NaN), so there is no order. The model's weights "
                "are broken, or overflow in its dtype."
            )
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        return BestOfN(scores=scores, order=order, best=answers[order[0]])

    def probability(self, reward_a: float, reward_b: float) -> float:
        """Probability that A is preferred to B: the sigmoid of their difference over the model's temperature."""
        z = (reward_a - reward_b) / self.model.config.reward_temperature
        return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))

    # ---------------------------------------------------------------------------------------------------------- tokens

    def encode(self, chat) -> Encoded:
        """The token ids of a chat, as [`~GRMScorer.score`] reads it."""
        if isinstance(chat, dict) and isinstance(chat.get("prompt"), str) and self.tokenizer.chat_template:
            chat = {**chat, "prompt": [{"role": "user", "content": chat["prompt"]}]}
        return self.encoder.encode_chat(chat)

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
                        encoded = encode(chat)
                    except ValueError as error:
                        raise ValueError(f"{name}: {error}") from error
                    texts.append(array("i", encoded.ids))  # an eighth of what a list takes
                    truncated.append(encoded.truncated)
                results = zip(self.rewards_of_ids(texts, bar), texts, truncated, strict=True)
                yield from (Score(reward, len(ids), cut) for reward, ids, cut in results)

    def rewards_of_ids(self, ids: Sequence[Sequence[int]], bar=None) -> list[float]:
        """Rewards of token sequences, in the order given. Equal ones are computed once. `bar` is told of each text."""
        texts = [row if isinstance(row, array) else array("i", row) for row in ids]
        order = sorted(range(len(texts)), key=texts.__getitem__)
        groups = [list(group) for _, group in groupby(order, key=texts.__getitem__)]
        distinct = [texts[group[0]] for group in groups]
        ranks = 1 if self.accelerator is None else self.accelerator.num_processes
        rank = 0 if self.accelerator is None else self.accelerator.process_index
        rewards = [0.0] * len(distinct)
        device = self.model.device
        with torch.no_grad(), evaluating(self.model), layout_attention(self.model, self.layout):
            batches = self._batches(distinct, ranks)
            for number, members in enumerate(batches):
                if number % ranks == rank:
                    batch = {k: v.to(device) for k, v in self._batch([distinct[i] for i in members]).items()}
                    with quick_products(device, batch["input_ids"].numel()):
                        found = self.model(**model_kwargs(batch), use_cache=False).logits.squeeze(-1).tolist()
                    for i, reward in zip(members, found, strict=True):
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
        return results

    def _batches(self, texts: list[array], ranks: int) -> list[list[int]]:
        """Which of the sorted `texts` are computed together."""
        batches: list[list[int]] = []
        if self.deterministic:
            return [[i] for i in range(len(texts))]
        if self.layout == "padded":
            order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
            while order:  # the first is the longest of those left: every row of the batch is padded to it
                count = max(1, self.max_tokens_per_batch // len(texts[order[0]]))
                batches.append(order[:count])
                order = order[count:]
            return batches
        new = [len(text) for text in texts]  # tokens that a text adds to a row behind its predecessor
        if self.layout == "shared_prefix":
            for i, pair in enumerate(pairwise(texts), 1):
                shared = common_prefix(*pair)
                new[i] -= shared if shared >= MIN_SHARED else 0
        budget = min(self.max_tokens_per_batch, -(-sum(new) // ranks))  # a row for each process
        room = -1
        for i, text in enumerate(texts):
            if room < new[i]:
                batches.append([])
                room = budget - len(text)
            else:
                room -= new[i]
            batches[-1].append(i)
        return batches

    def _batch(self, texts: list[array]) -> dict[str, torch.Tensor]:
        if self.layout == "padded":
            width = max(map(len, texts))
            return {
                "input_ids": torch.tensor([[*text, *[0] * (width - len(text))] for text in texts]),
                "attention_mask": torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts]),
            }
        forest = plant(texts, share=self.layout == "shared_prefix")
        read = torch.tensor([path[-1] for path in forest.paths])
        return {
            "input_ids": torch.tensor([forest.ids]),
            "position_ids": torch.tensor([forest.positions]),
            "segments": torch.tensor(forest.segments),
            "read_index": read,
            "output_rows": read.unique(),
        }
