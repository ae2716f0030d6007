"""What a reward model's LM head still knows: the perplexity of given answers, and its own answers to prompts."""

import math

import torch
from torch.nn.functional import cross_entropy

from ..encoding import Encoder


@torch.no_grad()
def perplexity(lm, tokenizer, rows: list[dict], max_length: int = 512, batch_size: int = 8) -> float:
    """
    Args:
        lm ([`~transformers.PreTrainedModel`]):
            A causal language model, in evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        rows (`list[dict]`):
            `prompt` and `chosen`, as messages.
        max_length (`int`, *optional*, defaults to `512`):
            A longer text loses the beginning of its prompt.
        batch_size (`int`, *optional*, defaults to `8`):
            Texts computed together, sorted by length.

    Returns:
        `float`: exp of the mean negative log-likelihood, in nats, of a token of the chosen responses.
    """
    encoder = Encoder(tokenizer, max_length)
    texts = sorted((encoder.encode(row["prompt"], row["chosen"]) for row in rows), key=lambda text: len(text.ids))
    total, tokens = 0.0, 0
    for i in range(0, len(texts), batch_size):
        batch = texts[i : i + batch_size]
        width = len(batch[-1].ids)
        ids = torch.tensor([text.ids + [0] * (width - len(text.ids)) for text in batch], device=lm.device)
        position = torch.arange(width, device=lm.device)
        real = position < torch.tensor([len(text.ids) for text in batch], device=lm.device)[:, None]
        response = real & (position >= torch.tensor([text.start for text in batch], device=lm.device)[:, None])
        logits = lm(input_ids=ids, attention_mask=real.long()).logits[:, :-1].float()  # (B, width - 1, V)
        targets = ids.masked_fill(~response, -100)[:, 1:]
        total += cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        tokens += int((targets != -100).sum())
    return math.exp(total / tokens)


@torch.no_grad()
def answers(lm, tokenizer, prompts: list[str], max_new_tokens: int = 40) -> list[str]:
    """The model's greedy answer to each prompt, one prompt at a time."""
    written = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(lm.device)
        ids = lm.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        written.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return written
