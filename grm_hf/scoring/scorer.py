"""`GRMScorer`: chats in, rewards out, in the order given and with what was cut said.

A score does not depend on how chats are batched (beyond rounding: docs/numerics.md), so batches are made of texts of
similar length; that is the whole saving on texts that have nothing in common.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from ..modeling_grm import GRMForSequenceClassification
from ..pairs import Encoded, Encoder


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
        model (`str` or [`GRMForSequenceClassification`]):
            Hub id or folder, or a live reward model. It is put into evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; loaded from the same place if left out.
        max_tokens_per_batch (`int`, *optional*, defaults to `8192`):
            Most tokens of a batch, padding included. A longer text is a batch of its own.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.

    Example:

    ```python
    from grm_hf import GRMScorer

    scorer = GRMScorer("runs/demo/model")
    scorer.score([{"prompt": "What is 2 + 2?", "response": "4"}])
    ```
    """

    def __init__(self, model, tokenizer=None, max_tokens_per_batch=8192, progress=False):
        if isinstance(model, str):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
            model = GRMForSequenceClassification.from_pretrained(model)
        elif tokenizer is None:
            if not model.name_or_path:
                raise ValueError("The model was made in memory, so its tokenizer is not known. Pass `tokenizer`.")
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        if max_tokens_per_batch < 1:
            raise ValueError(f"`max_tokens_per_batch` is {max_tokens_per_batch}; it must be at least 1.")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.encoder = Encoder.from_config(tokenizer, model.config)
        self.max_tokens_per_batch, self.progress = max_tokens_per_batch, progress

    def score(self, chats: Iterable) -> list[float]:
        """
        Args:
            chats (`Iterable`):
                Each a list of messages that ends with the assistant's, a row (`{"prompt", "response"}` or
                `{"messages"}`), or plain text.

        Returns:
            `list[float]`: raw rewards, in the order given.
        """
        return [result.score for result in self.stream(chats)]

    def stream(self, chats: Iterable, window: int = 1024) -> Iterator[Score]:
        """As [`~GRMScorer.score`], with details, for any number of chats: `window` of them are sorted at a time."""
        chats = iter(chats)
        bar = tqdm(desc="Scoring", disable=not self.progress, unit="chat")
        number = 0
        while group := list(islice(chats, window)):
            encoded = []
            for chat in group:
                try:
                    encoded.append(self._encode(chat))
                except ValueError as error:
                    raise ValueError(f"chat {number}: {error}") from error
                number += 1
            yield from self._run(encoded, bar)
        bar.close()

    def score_pairs(self, rows: Iterable[dict]) -> list[tuple[float, float]]:
        """
        Args:
            rows (`Iterable[dict]`):
                Preference pairs: `chosen` and `rejected`, each text or messages, with or without a `prompt`.

        Returns:
            `list[tuple[float, float]]`: the rewards of the chosen and of the rejected response of each row.
        """
        flat = self.score(self._side(row, name) for row in rows for name in ("chosen", "rejected"))
        return list(zip(flat[::2], flat[1::2], strict=True))

    def best_of_n(self, prompt: str | list[dict], answers: list[str]) -> BestOfN:
        """
        Rank answers to one prompt.

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
        scores = self.score({"prompt": prompt, "response": answer} for answer in answers)
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        return BestOfN(scores=scores, order=order, best=answers[order[0]])

    def probability(self, reward_a: float, reward_b: float) -> float:
        """Probability that A is preferred to B: the sigmoid of their difference over the model's temperature."""
        z = (reward_a - reward_b) / self.model.config.reward_temperature
        return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))

    def _encode(self, chat) -> Encoded:
        if isinstance(chat, dict) and isinstance(chat.get("prompt"), str) and self.tokenizer.chat_template:
            chat = {**chat, "prompt": [{"role": "user", "content": chat["prompt"]}]}
        return self.encoder.encode_chat(chat)

    @staticmethod
    def _side(row, name):
        if row.get("prompt"):
            extras = {key: row[key] for key in ("tools", "chat_template_kwargs") if row.get(key) is not None}
            return {"prompt": row["prompt"], "response": row[name], **extras}
        return row[name]

    @torch.no_grad()
    def _run(self, encoded: list[Encoded], bar) -> list[Score]:
        """Rewards of encoded texts: sorted by length, in padded batches, put back into the order given."""
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids), reverse=True)
        scores = [0.0] * len(encoded)
        while order:
            # The first is the longest of those left: every row of the batch is padded to it.
            width = len(encoded[order[0]].ids)
            count = max(1, self.max_tokens_per_batch // width)
            batch, order = order[:count], order[count:]
            input_ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(input_ids)
            for row, i in enumerate(batch):
                input_ids[row, : len(encoded[i].ids)] = torch.tensor(encoded[i].ids)
                mask[row, : len(encoded[i].ids)] = 1
            device = self.model.device
            rewards = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits
            for i, reward in zip(batch, rewards.squeeze(-1).tolist(), strict=True):
                scores[i] = reward
            bar.update(len(batch))
        return [Score(s, len(e.ids), e.truncated) for s, e in zip(scores, encoded, strict=True)]
