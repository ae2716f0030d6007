"""The proxies: reward models trained on a seed's pairs, ensembles of them, and best-of-n with both."""

import random
import tempfile
from pathlib import Path

import numpy as np
import torch

from ..metrics import best_of_n
from .answers import device
from .settings import Settings, read_unit, within


LABELS = {"clean": "clean labels", "flipped": "flipped labels"}
# The text losses of the paper sum over the tokens of a response, which are here more than ten times fewer than those
# its alpha of 0.01 was chosen for. All weights are set by one rule, before any result: at the start, the text loss
# pulls on the log-probability of a chosen response with about 0.01 per nat (alpha * beta * sigmoid(...) for `sft` and
# the two `dpo`, alpha for `sft_nll`, alpha / tokens for `sft_token_mean`).
METHODS: dict[str, tuple[str, dict]] = {
    "bt": ("Bradley-Terry", {"regularizer": "none"}),
    "margin": ("margin", {"regularizer": "none", "pair_loss": "margin"}),
    "smoothing": ("label smoothing 0.1", {"regularizer": "none", "label_smoothing": 0.1}),
    "sft": ("GRM sft", {"regularizer": "sft", "alpha": 0.1}),
    "sft_nll": ("GRM sft_nll", {"regularizer": "sft_nll", "alpha": 0.01}),
    "sft_token_mean": ("GRM sft_token_mean", {"regularizer": "sft_token_mean", "alpha": 0.1}),
    "dpo_noref": ("GRM dpo_noref", {"regularizer": "dpo_noref", "alpha": 0.1}),
    "dpo": ("GRM dpo", {"regularizer": "dpo", "alpha": 0.1}),
}
ENSEMBLES = {"ensemble_mean": ("ensemble, mean", "mean"), "ensemble_min": ("ensemble, min", "min")}
BASELINE = "bt"
NAMES = {key: label for key, (label, _) in (METHODS | ENSEMBLES).items()}
HEAD_SEEDS = 1000  # a member's head and order are drawn from seed + 1000 * member


def proxy_name(labels: str, size: int, method: str, seed: int, member: int = 0) -> str:
    return f"proxy-{labels}-{size}-{method}-{seed}" + (f"-member{member}" if member else "")


def training_rows(settings: Settings, pairs: list[dict], labels: str, size: int, seed: int) -> list[dict]:
    """The first `size` of a seed's pairs in the trainer's form. With flipped labels exactly that share of them is
    turned around; the margin (the gap in gold over its mean) stays."""
    turned = set()
    if labels == "flipped":
        turned = set(random.Random(f"flips-{size}-{seed}").sample(range(size), round(settings.flipped * size)))
    mean_gap = sum(row["gap"] for row in pairs) / len(pairs)
    rows = []
    for number, row in enumerate(pairs[:size]):
        chosen, rejected = ("worse", "better") if number in turned else ("better", "worse")
        rows.append(
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row[chosen]}],
                "rejected": [{"role": "assistant", "content": row[rejected]}],
                "margin": row["gap"] / mean_gap,
            }
        )
    return rows


def train_proxy(output: Path, settings: Settings, labels: str, size: int, method: str, seed: int, member: int) -> dict:
    """Trains one reward model on the base and lets it choose among all candidates. Its scores are kept for ensembles,
    its weights for policies that train against it."""
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, set_seed

    from ..modeling_grm import GRMForSequenceClassification
    from ..rewards.adapters import PolicyScorer
    from ..training import GRMRewardConfig, GRMRewardTrainer

    pairs = read_unit(output, f"pairs-{seed}")["rows"]
    rows = training_rows(settings, pairs, labels, size, seed)
    if method != "margin":
        rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(output / "base")
    set_seed(seed + HEAD_SEEDS * member)  # the head is drawn next, the same for every method
    model = GRMForSequenceClassification.from_base(str(output / "base"))
    steps = settings.epochs * -(-size // settings.batch_size)
    name = proxy_name(labels, size, method, seed, member)
    with tempfile.TemporaryDirectory() as folder:
        args = GRMRewardConfig(
            folder,
            **METHODS[method][1],
            seed=seed + HEAD_SEEDS * member,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            warmup_steps=steps // 10,
            max_length=min(model.config.max_position_embeddings, 4096),
            layout="auto" if settings.model else "shared_prefix",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **machine(settings),
        )
        trainer = GRMRewardTrainer(
            model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    scores = score_candidates(PolicyScorer(model, tokenizer, max_tokens_per_batch=1024), output, settings)
    every = np.concatenate([scores[key].ravel() for key in settings.sets])
    if not np.isfinite(every).all() or every.std() == 0:
        gave = "every answer the same reward" if np.isfinite(every).all() else "rewards that are no numbers"
        raise ValueError(f"The proxy {name} gave {gave}: training went wrong. Lower `learning_rate`.")
    model.config.reward_mean, model.config.reward_std = float(every.mean()), float(every.std())
    if method == BASELINE:
        (output / "scores").mkdir(exist_ok=True)
        np.save(output / "scores" / f"{name}.npy", every.astype(np.float32))
    if (labels, size) == (settings.policy_labels, settings.policy_size) and method in _kept(settings):
        trainer.save_model(str(output / "models" / name))
    return measure(scores, output, settings) | {"reward_mean": float(every.mean()), "reward_std": float(every.std())}


def machine(settings: Settings) -> dict:
    """Training arguments for the device."""
    from ..training import CHECKPOINTING

    demo: dict = {} if settings.model else {CHECKPOINTING: False}
    return {"use_cpu": device(settings).type == "cpu", "bf16": False, **demo}


def _kept(settings: Settings) -> set[str]:
    """The methods that policies train against; an ensemble counts as its members."""
    return {BASELINE if proxy in ENSEMBLES else proxy for proxy in settings.policy_proxies}


def score_candidates(scorer, output: Path, settings: Settings) -> dict[str, np.ndarray]:
    """Rewards of the candidates of each set, `(prompts, samples)`."""
    from ..rewards.rollouts import Rendered

    result = {}
    for key in settings.sets:
        candidates = read_unit(output, f"candidates-{key}")
        rendered = [
            Rendered([*prompt, *answer])
            for prompt, answers in zip(candidates["prompt_ids"], candidates["answers"], strict=True)
            for answer in answers
        ]
        result[key] = np.array(scorer.score(rendered)).reshape(len(candidates["prompts"]), -1)
    return result


def combine_proxies(output: Path, settings: Settings, labels: str, size: int, method: str, seed: int) -> dict:
    """An ensemble's choice among the candidates, from the scores of its members, standardised over all candidates."""
    from ..rewards import combine

    files = [output / "scores" / f"{proxy_name(labels, size, BASELINE, seed, m)}.npy" for m in range(settings.members)]
    members = np.stack([np.load(file) for file in files]).astype(np.float64)
    members = (members - members.mean(1, keepdims=True)) / members.std(1, keepdims=True)
    flat = combine(torch.tensor(members), ENSEMBLES[method][1]).numpy()
    scores, start = {}, 0
    for key in settings.sets:
        shape = len(read_unit(output, f"candidates-{key}")["prompts"]), settings.samples
        scores[key] = flat[start : start + shape[0] * shape[1]].reshape(shape)
        start += shape[0] * shape[1]
    return measure(scores, output, settings)


def measure(scores: dict[str, np.ndarray], output: Path, settings: Settings) -> dict:
    """
    Best-of-n and accuracy on each set.

    Returns:
        `dict`: for each set `proxy` and `gold`, the expected rewards of the answer that the proxy picks among n (means
        over prompts, one for each n of `settings.ns`, in each reward's own units); `proxy_std`, the standard deviation
        of the proxy within prompts; `accuracy`, the share of pairs of candidates with different gold (each answer and
        the next of its prompt) that the proxy orders as gold does.
    """
    result = {}
    for key, rewards in scores.items():
        gold = np.array(read_unit(output, f"candidates-{key}")["gold"])
        curves = {
            name: [
                float(np.mean([best_of_n(r, v, n) for r, v in zip(rewards, values, strict=True)])) for n in settings.ns
            ]
            for name, values in (("proxy", rewards), ("gold", gold))
        }
        gap, margin = np.diff(gold)[:, ::2], np.diff(rewards)[:, ::2]
        right = np.where(margin == 0, 0.5, np.sign(margin) == np.sign(gap))[gap != 0]
        result[key] = {
            **curves,
            "proxy_std": within(rewards),
            "accuracy": float(right.mean()) if right.size else 0.5,
        }
    return {"sets": result}
