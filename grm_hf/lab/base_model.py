"""The world's base language model: a word-level tokenizer built from the world's vocabulary, and a small Llama
pretrained on its documents, both domains alike. A run pretrains it in seconds, so no weights are shipped."""

import math
import random
from collections.abc import Callable

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .world import World


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{{ message['content'] }}{{ eos_token }}"
    "{% else %}<user>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark of the world, lower-cased; anything else is `<unk>`."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"]
    vocabulary = {token: i for i, token in enumerate([*special, *world.vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """An untrained Llama of 0.2 million parameters, drawn from `seed`. The caller's random state does not change."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def tokenize_documents(
    tokenizer: PreTrainedTokenizerFast, documents: list[str | list[dict[str, str]]]
) -> list[list[int]]:
    """Token ids of each document: `<bos> ... <eos>`, conversations through the chat template."""
    texts = [
        f"<bos>{document}<eos>"
        if isinstance(document, str)
        else str(tokenizer.apply_chat_template(document, tokenize=False))
        for document in documents
    ]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _loss(model: torch.nn.Module, rows: list[list[int]], reduction: str) -> tuple[torch.Tensor, int]:
    """Negative log-likelihood in nats of all tokens after the first, and their number."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]  # (B, T - 1, V)
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
    return loss, int((targets != -100).sum())


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    steps: int = 700,
    batch_size: int = 48,
    learning_rate: float = 3e-3,
    seed: int = 0,
    on_step: Callable[[], object] = lambda: None,
) -> LlamaForCausalLM:
    """Trains `model` in place on documents of both domains in equal parts and returns it in eval mode.

    AdamW, linear warm-up over the first twentieth and cosine decay; `on_step` is called after each step.
    """
    documents = [d for domain in ("id", "ood") for d in world.documents(domain, 10_000, seed)]
    rows = tokenize_documents(tokenizer, documents)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup)),
        ],
        milestones=[warmup],
    )
    model.train()
    for _ in range(steps):
        loss, _ = _loss(model, rng.sample(rows, batch_size), reduction="mean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step()
    return model.eval()


@torch.no_grad()
def perplexity(lm: torch.nn.Module, rows: list[list[int]], batch_size: int = 256) -> float:
    """exp of the mean negative log-likelihood per token of `rows` (token ids, see `tokenize_documents`) under `lm`."""
    was_training = lm.training
    lm.eval()
    total, count = 0.0, 0
    for i in range(0, len(rows), batch_size):
        loss, tokens = _loss(lm, rows[i : i + batch_size], reduction="sum")
        total, count = total + loss.item(), count + tokens
    lm.train(was_training)
    return math.exp(total / count)
