"""The policy of a laboratory run and its answers: candidates for the proxies to choose among, and pairs to train
them."""

import functools
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..devices import own_device
from .base_model import build_model, build_tokenizer, pretrain
from .gold import gold_of
from .settings import WORLD, Settings, prompts_of


ROUNDS = 10  # rounds of drawing pairs, before the answers count as too much alike


def prepare_base(output: Path, settings: Settings) -> dict:
    """The policy and its tokenizer, in `output/base`."""
    model: Any
    if settings.model:
        tokenizer: Any = AutoTokenizer.from_pretrained(settings.model)
        _check_tokenizer(tokenizer, settings.model)
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    else:
        tokenizer = build_tokenizer(WORLD)
        model = pretrain(build_model(tokenizer), tokenizer, WORLD, settings.pretrain_steps)
    model.save_pretrained(output / "base")
    tokenizer.save_pretrained(output / "base")
    return {"parameters": model.num_parameters()}


def _check_tokenizer(tokenizer, name):
    if tokenizer.chat_template is None:
        raise ValueError(f"The tokenizer of {name!r} has no chat template, which prompts are put into.")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise ValueError(
            f"The tokenizer of {name!r} has no padding token besides EOS, and PPO tells padding from text by the id. "
            "Save the model with a tokenizer whose `pad_token` is a token that no text holds."
        )


def device(settings: Settings) -> torch.device:
    """The CPU for the world's small model; a user's own model goes to the accelerator if there is one."""
    return own_device() if settings.model else torch.device("cpu")


@functools.lru_cache(maxsize=1)
def load_base(output: Path, settings: Settings):
    """The initial policy, in evaluation mode and on the device of training, and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(output / "base", padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(output / "base")
    return model.to(device(settings)).eval(), tokenizer


@torch.no_grad()
def sample(model, tokenizer, prompts: list[str], count: int, max_new_tokens: int, seed: int) -> list[list[list[int]]]:
    """
    Answers drawn from the policy itself: temperature 1, no token left out.

    Returns:
        `list[list[list[int]]]`: for each prompt `count` answers as token ids, with EOS where the policy ended.
    """
    rows = [ids for ids in (prompt_ids(tokenizer, prompt) for prompt in prompts) for _ in range(count)]
    answers: list[list[int]] = []
    eos = tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(rows), 512):
            batch = tokenizer.pad({"input_ids": rows[start : start + 512]}, return_tensors="pt", padding_side="left")
            drawn = model.generate(
                **batch.to(model.device), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            for ids in drawn[:, batch["input_ids"].shape[1] :].tolist():
                answers.append(ids[: ids.index(eos) + 1] if eos in ids else ids)
    return [answers[i : i + count] for i in range(0, len(answers), count)]


@torch.no_grad()
def divergences(policy, initial, prompt: list[int], answers: list[list[int]]) -> list[float]:
    """
    KL(policy || initial) along each answer: at every token, EOS included, the divergence of the two whole
    distributions of the next token. Their sum, averaged over answers of the policy, is an unbiased estimate of the
    divergence of the two distributions of answers. Its variance is lower than that of the log-ratio of the answer.
    """
    width = max(map(len, answers))
    ids = torch.tensor([[*prompt, *answer, *[0] * (width - len(answer))] for answer in answers], device=policy.device)
    result = []
    for rows, lengths in zip(ids.split(64), torch.tensor([*map(len, answers)]).split(64), strict=True):
        # The row ends are padding behind the text: causal attention does not see it.
        ours, theirs = (
            model(input_ids=rows).logits[:, len(prompt) - 1 : -1].float().log_softmax(-1)
            for model in (policy, initial)
        )
        kl = (ours.exp() * (ours - theirs)).sum(-1).cpu()
        result.append((kl * (torch.arange(width) < lengths[:, None])).sum(1))
    return torch.cat(result).tolist()


def text_of(tokenizer, answers: list[list[int]]) -> list[str]:
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


def draw_candidates(output: Path, settings: Settings, name: str) -> dict:
    """The answers to a set of prompts, with their gold rewards. Every proxy chooses among them."""
    model, tokenizer = load_base(output, settings)
    prompts = prompts_of(settings)[1][name]
    drawn = sample(
        model,
        tokenizer,
        prompts,
        settings.samples,
        settings.max_new_tokens,
        seed=1_000_000 + settings.sets.index(name),
    )
    texts = [text_of(tokenizer, answers) for answers in drawn]
    gold = [gold_of(settings, prompt, answers) for prompt, answers in zip(prompts, texts, strict=True)]
    return {
        "prompts": prompts,
        "prompt_ids": [prompt_ids(tokenizer, prompt) for prompt in prompts],
        "answers": drawn,
        "gold": gold,
        "distinct": sum(len(set(answers)) for answers in texts) / sum(map(len, texts)),
        "unfinished": sum(a[-1] != tokenizer.eos_token_id for answers in drawn for a in answers)
        / sum(map(len, texts)),
    }


def draw_pairs(output: Path, settings: Settings, seed: int) -> dict:
    """A seed's training pairs: two answers of the policy to a prompt, sampled for this seed, `better` and `worse` by
    gold with difference `gap`. Pairs of equal gold, of equal answers or without text are left out and counted."""
    model, tokenizer = load_base(output, settings)
    train, _ = prompts_of(settings)
    rng = random.Random(f"pairs-{seed}")
    wanted, skipped = max(settings.sizes), 0
    rows: list[dict] = []
    for turn in range(ROUNDS):
        asked = rng.choices(train, k=(wanted - len(rows)) * 5 // 4 + 1)
        drawn = sample(model, tokenizer, asked, 2, settings.max_new_tokens, seed=2_000_000 + 1000 * seed + turn)
        for prompt, answers in zip(asked, drawn, strict=True):
            a, b = text_of(tokenizer, answers)
            if not a.strip() or not b.strip() or a == b:
                skipped += 1
                continue
            gold_a, gold_b = gold_of(settings, prompt, [a, b])
            if gold_a == gold_b:
                skipped += 1
                continue
            better, worse = (a, b) if gold_a > gold_b else (b, a)
            rows.append({"prompt": prompt, "better": better, "worse": worse, "gap": abs(gold_a - gold_b)})
        if len(rows) >= wanted:
            return {"rows": rows[:wanted], "skipped": skipped}
    raise ValueError(
        f"{wanted} pairs are required, and of {len(rows) + skipped} pairs of answers {skipped} had equal gold "
        "rewards, were identical or had no text. The gold reward tells too few answers of this policy apart."
    )


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """The token ids that the policy reads before it answers."""
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
