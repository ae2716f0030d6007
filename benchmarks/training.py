"""The cost of a training step: TRL's `RewardTrainer` without a regulariser, the original GRM loss (full logits), and
`GRMRewardTrainer` in each layout and with each regulariser; and of the text loss by itself.

    python benchmarks/training.py            # measures (needs a quiet machine), then the section in docs/benchmarks.md
    python benchmarks/training.py --report   # the section only, from docs/results/benchmarks_training.json
    python benchmarks/training.py --again dpo   # measures this one of `STEPS` (or several) again, keeps the others
    python benchmarks/training.py --quick    # a tiny model and made-up lengths, to see that it works; writes nothing

All sides run the same pairs with the same weights in one process, one after the other on every batch. Real lengths are
taken from `shared/data` beside the repository; without it they are drawn (lognormal, the same medians).
"""

import argparse
import copy
import gc
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from datasets import Dataset
from scoring import DATA, llama, peak_bytes, rows, word_tokenizer
from sections import ROOT, write_section
from torch.nn.functional import linear_cross_entropy, logsigmoid
from transformers import LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.reward_trainer import DataCollatorForPreference

from grm_hf import GRMForSequenceClassification, GRMRewardConfig, GRMRewardTrainer
from grm_hf.layouts import PairCollator
from grm_hf.logprobs import ROWS, sequence_logps
from grm_hf.losses import text_loss
from grm_hf.training import CHECKPOINTING


RESULTS = ROOT / "docs" / "results" / "benchmarks_training.json"
# Name: file, and median tokens of prompt, chosen and rejected where the file is missing.
SETS = {
    "hh": ("hh_harmless_base_train", (96, 33, 43)),
    "ultrafeedback": ("ultrafeedback_train", (78, 440, 308)),
    "qa_feedback": ("qa_feedback", (614, 92, 87)),
}
MAX_LENGTH = 1024
ALPHA, BETA = 0.01, 0.1
TEXT = {"none": "none", "sft": "chosen", "dpo_noref": "both", "dpo": "both"}  # whose tokens a regulariser reads
TRL, ORIGINAL, OURS = "TRL, no regulariser", "original loss (full logits)", "sft, shared_prefix"
NONE, DPO = "none, shared_prefix", "dpo_noref, shared_prefix"
CACHED, LIVE = "dpo, cached reference", "dpo, live reference"
MIX = (TRL, ORIGINAL, "sft, padded", "sft, packed", OURS, NONE, DPO)


@dataclass
class Shape:
    """A Llama's dimensions; `keys` is the width of the keys, all heads together."""

    layers: int
    hidden: int
    intermediate: int
    keys: int
    vocabulary: int


BENCH = Shape(8, 512, 1408, 256, 32_768)
REAL = {"bench model": BENCH, "Llama-3.2-1B": Shape(16, 2048, 8192, 512, 128_256)}


@dataclass
class Step:
    """Steps to measure: `batches` batches of `pairs` pairs, each side `rounds` times."""

    data: str
    order: str
    pairs: int
    batches: int
    rounds: int
    sides: tuple[str, ...]
    vocabulary: int = BENCH.vocabulary


STEPS = {
    "hh": Step("hh", "random", 8, 10, 2, (TRL, OURS)),
    "hh sorted": Step("hh", "sorted", 8, 4, 2, (TRL, OURS)),
    "hh 128k": Step("hh", "random", 8, 3, 1, (TRL, OURS), 131_072),
    "hh 128k, batches of 2": Step("hh", "random", 2, 6, 5, (TRL, OURS), 131_072),
    "dpo": Step("hh", "random", 4, 3, 5, (DPO, CACHED, LIVE)),
    "hh, all sides": Step("hh", "random", 8, 2, 1, MIX),
    "ultrafeedback, all sides": Step("ultrafeedback", "random", 2, 2, 1, MIX),
    "qa_feedback, all sides": Step("qa_feedback", "random", 2, 2, 1, MIX),
    "hh 128k, all sides": Step("hh", "random", 2, 2, 1, (TRL, ORIGINAL, OURS, NONE), 131_072),
}
LM_ROWS = ((133, BENCH.vocabulary), (1024, BENCH.vocabulary), (256, 131_072))


# --------------------------------------------------------------------------------------------------------------- pairs


def ids(text: str, vocabulary: int) -> list[int]:
    """A token for each word with the space before it, run of signs, or white space: about as many as with GPT-2's
    tokenizer."""
    return [2 + zlib.crc32(w.encode()) % (vocabulary - 2) for w in re.findall(r" ?\w+| ?[^\w\s]+|\s", text)]


def pair(prompt: list[int], chosen: list[int], rejected: list[int], length: int) -> dict:
    """A tokenised pair with terminators; the prompt loses its beginning if a sequence would be too long."""
    chosen, rejected = ([*response, 1][:length] for response in (chosen, rejected))
    prompt = prompt[-max(1, length - max(len(chosen), len(rejected))) :]
    sides = {"chosen": (prompt + chosen)[:length], "rejected": (prompt + rejected)[:length]}
    starts = {f"{name}_start": len(prompt) for name in sides}
    return {**{f"{name}_ids": sequence for name, sequence in sides.items()}, **starts}


def load(name: str, vocabulary: int, shrink: int = 1) -> list[dict]:
    """Tokenised pairs of a data set, or made-up pairs if its file is missing or lengths are divided."""
    file, medians = SETS[name]
    if shrink == 1 and (DATA / f"{file}.parquet").is_file():
        turns = lambda messages: "".join(f"\n\n{m['role']}: {m['content']}" for m in messages)  # noqa: E731
        texts = [(turns(r["prompt"]) + "\n\nassistant:", turns(r["chosen"]), turns(r["rejected"])) for r in rows(file)]
        texts = [(p, c.partition(":")[2], r.partition(":")[2]) for p, c, r in texts]
        return [pair(*(ids(text, vocabulary) for text in row), MAX_LENGTH) for row in texts]
    rng = random.Random(0)

    def draw(middle: int) -> list[int]:
        return [rng.randrange(2, vocabulary) for _ in range(1 + int(rng.lognormvariate(0, 0.8) * middle / shrink))]

    return [pair(*map(draw, medians), MAX_LENGTH // shrink) for _ in range(64 if shrink > 1 else 1000)]


def longest(pairs: list[dict]) -> int:
    return max(len(p[name]) for p in pairs for name in ("chosen_ids", "rejected_ids"))


def batches_of(pairs: list[dict], size: int, order: str) -> list[list[dict]]:
    """Whole batches in a random order; `"sorted"`: of pairs of like length."""
    rng = random.Random(0)
    pairs = rng.sample(pairs, len(pairs))
    if order == "sorted":
        pairs.sort(key=lambda p: longest([p]))
    batches = [pairs[i : i + size] for i in range(0, len(pairs) - size + 1, size)]
    return rng.sample(batches, len(batches))


def padding(batches: list[list[dict]]) -> float:
    """Tokens of padded batches for each real token."""
    real = sum(len(p["chosen_ids"]) + len(p["rejected_ids"]) for batch in batches for p in batch)
    return sum(2 * len(batch) * longest(batch) for batch in batches) / real


# --------------------------------------------------------------------------------------------------------------- FLOPs


@dataclass
class Work:
    """The work of a step: tokens, tokens whose last-layer output is read, pairs of a query and a key, tokens whose
    logits are computed."""

    tokens: float = 0
    read: float = 0
    attended: float = 0
    logits: float = 0

    def flops(self, shape: Shape, trimmed: bool = True) -> dict[str, float]:
        """Forward and backward: 6 a weight and token, 14 a query, key and channel (scores are computed again). The
        last layer makes keys and values of all tokens and, `trimmed`, the rest only where its output is read."""
        keys = 2 * shape.hidden * shape.keys
        others = 2 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate
        last = self.read if trimmed else self.tokens
        return {
            "layers": 6 * (shape.layers - 1) * (keys + others) * self.tokens,
            "last layer": 6 * (keys * self.tokens + others * last),
            "attention": 14 * shape.layers * shape.hidden * self.attended,
            "text": 6 * shape.hidden * shape.vocabulary * self.logits,
        }


def work(pairs: list[dict], side: str) -> Work:
    """Attention under a padding mask counts as if a causal kernel ran; this favours padding."""
    if side in (TRL, ORIGINAL):
        regularizer, layout = "none", "padded"
    else:
        regularizer, _, layout = side.partition(", ")
    batch = PairCollator(0, layout, TEXT[regularizer])(pairs)
    tokens, logits = batch["input_ids"].numel(), len(batch.get("text_index", ()))
    if layout == "padded":
        width = batch["input_ids"].shape[1]
        return Work(tokens, tokens, tokens * width / 2, tokens if side == ORIGINAL else logits)
    segments = batch["segments"].tolist()
    attended = sum(length * (length + shared) if shared else length**2 / 2 for _, length, _, shared in segments)
    return Work(tokens, len(batch["output_rows"]), attended, logits)


def total(works: list[Work]) -> Work:
    return Work(*(sum(column) for column in zip(*(asdict(w).values() for w in works), strict=True)))


# --------------------------------------------------------------------------------------------------------------- sides


class Sides:
    """Training steps of every side on one set of weights: `sides(name)` takes pairs, runs forward and backward."""

    def __init__(self, shape: Shape, folder: str):
        self.folder, self.tokenizer = folder, word_tokenizer(shape.vocabulary)
        lm = llama(shape.vocabulary, shape.layers, shape.hidden).lm
        self.grm = GRMForSequenceClassification.from_base(lm, head_type="linear").train()
        config = copy.deepcopy(lm.config)
        config.num_labels = 1
        with torch.device("meta"):
            self.classifier = LlamaForSequenceClassification(config)
        self.classifier.model, self.classifier.score.weight = lm.model, self.grm.score.weight
        self.trainers: dict[str, RewardTrainer] = {}

    def trainer(self, name: str) -> RewardTrainer:
        if name not in self.trainers:
            common = {"bf16": False, CHECKPOINTING: False, "use_cpu": True, "report_to": "none"}
            one = pair([2] * 9, [3], [4], 16) | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0}
            given = {"train_dataset": Dataset.from_list([one]), "processing_class": self.tokenizer}
            if name == TRL:
                made = RewardTrainer(self.classifier, RewardConfig(f"{self.folder}/trl", **common), **given)
                assert type(made.data_collator) is DataCollatorForPreference
            else:
                regularizer, _, layout = name.partition(", ")
                settings = {"regularizer": regularizer, "alpha": ALPHA, "beta": BETA, "layout": layout}
                if regularizer == "dpo":
                    settings |= {"layout": "shared_prefix", "reference": "model" if name == LIVE else "precompute"}
                args = GRMRewardConfig(f"{self.folder}/{name}", **settings, **common)
                made = GRMRewardTrainer(self.grm, args, **given)
                assert made.layout == settings["layout"]
            made.current_gradient_accumulation_steps = 1  # set by `train`
            self.trainers[name] = made
        return self.trainers[name]

    def __call__(self, name: str) -> Callable[[list[dict]], torch.Tensor]:
        if name == ORIGINAL:
            return self.original
        trainer = self.trainer(name)
        reference = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0} if name == CACHED else {}
        return lambda pairs: trainer.training_step(
            trainer.model, trainer.data_collator([p | reference for p in pairs])
        )

    def original(self, pairs: list[dict]) -> torch.Tensor:
        """The loss as written in the paper: log-probabilities of all tokens of both texts, from all logits."""
        device = self.grm.device
        batch = {key: value.to(device) for key, value in DataCollatorForPreference(pad_token_id=0)(pairs).items()}
        out = self.grm(**batch, use_cache=False, return_lm_logits=True)
        logps = out.lm_logits.float()[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        place = torch.arange(1, batch["input_ids"].shape[1], device=device)
        starts = torch.tensor([p[f"{side}_start"] for side in ("chosen", "rejected") for p in pairs], device=device)
        sums = (logps * ((place >= starts[:, None]) & (batch["attention_mask"][:, 1:] == 1))).sum(-1)
        chosen, rejected = out.logits.squeeze(-1).chunk(2)
        text = -logsigmoid(BETA * sums[: len(pairs)]).mean()
        loss = (1 - ALPHA) * -logsigmoid(chosen - rejected).mean() + ALPHA * text
        loss.backward()
        return loss.detach()


def cost(model: torch.nn.Module, run: Callable) -> dict[str, float]:
    """CPU seconds of a run, and its peak bytes above weights, without and with parameter gradients. The allocator is
    watched during the timed run. This costs a few microseconds an operation, most for the side with the most
    operations, ours."""
    model.zero_grad()
    seconds = []

    def timed():
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)

    peak = peak_bytes(timed)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return {"seconds": seconds[0], "peak_bytes": peak - gradients, "all_bytes": peak}


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Several times the same run: median seconds, largest peak."""
    return {name: (median if name == "seconds" else max)(run[name] for run in runs) for name in runs[0]}


def measure(step: Step, sides: Sides, pairs: list[dict]) -> dict:
    """Every side on every batch, one side after the other: medians over the rounds, for each batch."""
    batches = batches_of(pairs, step.pairs, step.order)[: step.batches]
    named = {name: sides(name) for name in step.sides}
    smallest = min(batches, key=longest)[:1]
    for run in named.values():
        run(smallest)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in named}
    for batch in batches:
        rounds = [
            {name: cost(sides.grm, lambda run=run, batch=batch: run(batch)) for name, run in named.items()}
            for _ in range(step.rounds)
        ]
        for name, values in found.items():
            values.append(summary([one[name] for one in rounds]))
    return {
        **{name: getattr(step, name) for name in ("data", "order", "pairs", "vocabulary", "rounds")},
        "padding": [padding([batch]) for batch in batches],
        "padded_tokens": [2 * len(batch) * longest(batch) for batch in batches],
        "work": {side: asdict(total([work(batch, side) for batch in batches])) for side in MIX},
        "sides": {name: {key: [one[key] for one in values] for key in values[0]} for name, values in found.items()},
    }


# ------------------------------------------------------------------------------------------------- language-model term


def lm_term(model: GRMForSequenceClassification, tokens: int, rounds: int) -> dict:
    """Text loss (`sft`, 33 tokens a response) and its gradients from given hidden states, without the layers."""
    torch.manual_seed(0)
    head = model.get_output_embeddings()
    pairs = max(1, tokens // 33)
    owner = torch.arange(tokens) * pairs // tokens
    states = torch.randn(1, 3 * tokens, head.in_features)
    index = torch.randperm(3 * tokens)[:tokens].sort()[0]
    targets = torch.randint(head.out_features, (tokens,))
    loss = lambda sums: text_loss("sft", BETA, sums[:pairs]).mean()  # noqa: E731
    add_up = lambda logps: torch.zeros(2 * pairs).index_add(0, owner, logps)  # noqa: E731
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=ROWS)
    sides = {
        "full logits": lambda x: add_up(head(x[0, index]).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)),
        "ours": lambda x: sequence_logps(x, model, index, targets, owner, 2 * pairs, loss),
        "torch linear_cross_entropy": lambda x: add_up(
            -linear_cross_entropy(x[0, index], head.weight, targets, reduction="none", options=options)
        ),
        "TRL kernel": lambda x: add_up(
            ChunkedLogProbFunction.apply(x[0, index], head.weight, None, targets, 1.0, 32_768, None, 1.0, ())[0]
        ),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    expected: list[torch.Tensor] = []
    for number in range(rounds + 1):
        for name, run in sides.items():
            hidden = states.clone().requires_grad_()
            one = cost(model, lambda run=run, hidden=hidden: loss(run(hidden)).backward())
            if number:
                found[name].append(one | {"peak_bytes": one["peak_bytes"] - hidden.grad.nbytes})
                continue
            expected = expected or [hidden.grad, head.weight.grad.clone()]
            for right, gradient in zip(expected, (hidden.grad, head.weight.grad), strict=True):
                assert (gradient - right).norm() < 1e-4 * right.norm(), name
    return {
        "tokens": tokens,
        "vocabulary": head.out_features,
        "sides": {name: summary(runs) for name, runs in found.items()},
    }


# ----------------------------------------------------------------------------------------------------------------- run


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def whole_set(name: str, pairs: list[dict], order: str, size: int = 8) -> dict:
    batches = batches_of(pairs, size, order)
    works = {side: asdict(total([work(batch, side) for batch in batches])) for side in MIX}
    return {"data": name, "order": order, "batches": len(batches), "padding": padding(batches), "work": works}


def run_all(quick: bool = False, only: tuple[str, ...] = ()) -> dict:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # `dpo_noref` on random weights: its gradients are 0 but for these, which are slow
    gc.freeze()  # what is imported: every measurement collects garbage first
    started = time.process_time()
    shape = Shape(2, 64, 176, 32, 512) if quick else BENCH
    steps = {
        name: Step(s.data, s.order, 2, 2, 1, s.sides, s.vocabulary // BENCH.vocabulary * shape.vocabulary)
        if quick
        else s
        for name, s in STEPS.items()
        if name in (only or STEPS)
    }
    terms = [(n // (32 if quick else 1), v // BENCH.vocabulary * shape.vocabulary) for n, v in LM_ROWS]
    sets = {name: load(name, shape.vocabulary, 16 if quick else 1) for name in SETS}
    real = not quick and all((DATA / f"{file}.parquet").is_file() for file, _ in SETS.values())
    results: dict = {
        "machine": f"{cpu()}, {os.cpu_count()} CPUs, one thread",
        "versions": {name: version(name) for name in ("grm-hf", "torch", "transformers", "trl")},
        "shape": asdict(shape),
        "lengths": "real" if real else "made up",
        "whole_sets": [whole_set(name, sets[name], order) for name in sets for order in ("random", "sorted")],
        "steps": {},
        "lm_term": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary in sorted({step.vocabulary for step in steps.values()}):
            sides = Sides(Shape(**{**asdict(shape), "vocabulary": vocabulary}), f"{folder}/{vocabulary}")
            for tokens, size in terms:
                if size == vocabulary and not only:
                    results["lm_term"].append(lm_term(sides.grm, tokens, 1 if quick else max(3, 2048 // tokens)))
            for name, step in steps.items():
                if step.vocabulary == vocabulary:
                    results["steps"][name] = measure(step, sides, sets[step.data])
                    print(name, f"{time.process_time() - started:.0f} s", file=sys.stderr, flush=True)
    results["cpu_seconds"] = time.process_time() - started
    return results


# -------------------------------------------------------------------------------------------------------------- report


@dataclass
class Row:
    """A line of the table of goals: one or several reached values, and the largest allowed values."""

    figure: str
    padding: str
    reached: tuple[float, ...]
    goals: tuple[float, ...]

    @property
    def met(self) -> tuple[bool, ...]:
        return tuple(found <= goal for found, goal in zip(self.reached, self.goals, strict=True))

    def __str__(self) -> str:
        cells = (
            self.figure,
            self.padding,
            " / ".join(f"{found:.3f}" for found in self.reached),
            "<= " + " / ".join(f"{goal:.2f}" for goal in self.goals),
            " / ".join("yes" if met else "no" for met in self.met),
        )
        return f"| {' | '.join(cells)} |"


def ratio(step: dict, name: str, base: str, what: str = "seconds") -> float:
    """Ratio of CPU time, summed over the batches, or of bytes, the largest of any batch."""
    combine = sum if what == "seconds" else max
    return combine(step["sides"][name][what]) / combine(step["sides"][base][what])


def mean_padding(step: dict) -> float:
    padded = step["padded_tokens"]
    return sum(padded) / sum(tokens / factor for tokens, factor in zip(padded, step["padding"], strict=True))


def flops(found: dict, name: str, shape: Shape, trimmed: bool = True) -> float:
    return sum(Work(**found["work"][name]).flops(shape, trimmed).values())


def table_of_goals(results: dict) -> list[Row]:
    shape, steps = Shape(**results["shape"]), results["steps"]
    sets = {(found["data"], found["order"]): found for found in results["whole_sets"]}
    hh, hh_sorted = sets["hh", "random"], sets["hh", "sorted"]
    feedback = [sets["ultrafeedback", order] for order in ("random", "sorted")]
    arithmetic = lambda found, name, base: flops(found, name, shape) / flops(found, base, shape)  # noqa: E731
    factor = lambda *found: " / ".join(f"{one['padding']:.2f}" for one in found)  # noqa: E731
    measured = lambda name: f"{mean_padding(steps[name]):.2f}"  # noqa: E731
    large = [steps["hh 128k"], steps["hh 128k, batches of 2"]]
    both = steps["hh, all sides"]
    term = results["lm_term"]
    slowest = max(t["sides"]["ours"]["seconds"] / t["sides"]["full logits"]["seconds"] for t in term)
    largest = max(t["sides"]["ours"]["peak_bytes"] / (ROWS * t["vocabulary"] * 4) for t in term)
    return [
        Row("FLOPs, ours / TRL, whole hh set, random batches of 8", factor(hh), (arithmetic(hh, OURS, TRL),), (0.27,)),
        Row(
            f"CPU time, same, {len(steps['hh']['padding'])} batches",
            measured("hh"),
            (ratio(steps["hh"], OURS, TRL),),
            (0.30,),
        ),
        Row(
            f"peak memory above weights and parameter gradients, same (gradients included: "
            f"{ratio(steps['hh'], OURS, TRL, 'all_bytes'):.3f})",
            measured("hh"),
            (ratio(steps["hh"], OURS, TRL, "peak_bytes"),),
            (0.20,),
        ),
        Row(
            "CPU time / FLOPs against length-sorted TRL",
            f"{measured('hh sorted')} / {factor(hh_sorted)}",
            (ratio(steps["hh sorted"], OURS, TRL), arithmetic(hh_sorted, OURS, TRL)),
            (0.65, 0.60),
        ),
        Row(
            "CPU time / peak memory against the original's loss, random (gradients included: "
            f"{ratio(both, OURS, ORIGINAL, 'all_bytes'):.3f})",
            measured("hh, all sides"),
            (ratio(both, OURS, ORIGINAL), ratio(both, OURS, ORIGINAL, "peak_bytes")),
            (0.15, 0.12),
        ),
        Row(
            "ultrafeedback: FLOPs, random / sorted",
            factor(*feedback),
            tuple(arithmetic(found, OURS, TRL) for found in feedback),
            (0.58, 1.00),
        ),
        Row(
            f"vocabulary {large[0]['vocabulary']}, hh, CPU time, random batches of "
            + " / of ".join(str(step["pairs"]) for step in large),
            " / ".join(f"{mean_padding(step):.2f}" for step in large),
            tuple(ratio(step, OURS, TRL) for step in large),
            (0.62, 0.62),
        ),
        Row(
            "regulariser's own cost: ours / ours with `none`, FLOPs, sft / dpo",
            factor(hh),
            (arithmetic(hh, OURS, NONE), arithmetic(hh, DPO, NONE)),
            (1.15, 1.30),
        ),
        Row(
            f"LM term alone, N >= {min(t['tokens'] for t in term)}: time / full logits; extra memory / (256 V 4 B)",
            "none",
            (slowest, largest),
            (1.0, 1.1),
        ),
        Row(
            "dpo, CPU time: cached reference / reference-free; live / reference-free",
            measured("dpo"),
            (ratio(steps["dpo"], CACHED, DPO), ratio(steps["dpo"], LIVE, DPO)),
            (1.05, 1.45),
        ),
    ]


def profile(results: dict, goals: list[Row]) -> list[str]:
    """The parts of a step's arithmetic, and why a figure misses its goal."""
    shape = Shape(**results["shape"])
    hh = next(found for found in results["whole_sets"] if found["data"] == "hh")
    sides = {"none": NONE, "sft": OURS, "dpo": DPO}
    base = flops(hh, NONE, shape)
    parts = {name: Work(**hh["work"][side]).flops(shape) for name, side in sides.items()}
    whole = {name: flops(hh, side, shape, trimmed=False) for name, side in sides.items()}
    lines = [
        "FLOPs of a step by part, relative to the whole step with `none` (hh, random batches of 8, shared_prefix). "
        "The last layer is completed only where its output is read. The last column is the step without this saving.",
        "",
        f"| regulariser | {' | '.join(parts['none'])} | all | all, last layer whole |",
        f"|---|{'---|' * (len(parts['none']) + 2)}",
    ]
    for name, found in parts.items():
        numbers = [*found.values(), sum(found.values()), whole[name]]
        lines.append(f"| {name} | {' | '.join(f'{number / base:.3f}' for number in numbers)} |")
    (row,) = (row for row in goals if row.figure.startswith("regulariser"))
    for name, met, reached, goal in zip(("sft", "dpo"), row.met, row.reached, row.goals, strict=True):
        if not met:
            untrimmed = whole[name] / whole["none"]
            lines += [
                "",
                f"`{name}` over `none` is {reached:.3f}, above {goal:.2f}, because `none` saves most in the last "
                f"layer: {1 - base / whole['none']:.1%} of its FLOPs. `{name}` saves "
                f"{1 - sum(parts[name].values()) / whole[name]:.1%}, because its text loss reads more of the layer. "
                f"Without this saving the ratio would be {untrimmed:.3f}, "
                f"{'within' if untrimmed <= goal else 'still above'} the goal, and both steps would cost more.",
            ]
    small = results["steps"]["hh 128k, batches of 2"]
    large = Shape(**{**asdict(shape), "vocabulary": small["vocabulary"]})
    done = Work(**small["work"][OURS])
    whole_step = flops(small, TRL, large)
    (row,) = (row for row in goals if row.figure.startswith("vocabulary"))
    if not row.met[-1]:
        lines += [
            "",
            f"With a vocabulary of {large.vocabulary} and batches of {small['pairs']}, CPU time is "
            f"{row.reached[-1]:.3f}, above {row.goals[-1]:.2f}; the FLOPs of these batches are "
            f"{flops(small, OURS, large) / whole_step:.3f} of TRL's, "
            f"{done.flops(large)['text'] / whole_step:.3f} for the text loss alone. Each of its three products "
            f"reads {4 * large.hidden * large.vocabulary / 2**20:.0f} MiB of LM head or gradient for the "
            f"{done.logits / len(small['padding']):.0f} tokens of a batch. In batches of "
            f"{results['steps']['hh 128k']['pairs']} CPU time is {row.reached[0]:.3f}.",
        ]
    return lines


def section(results: dict) -> str:
    shape, goals = Shape(**results["shape"]), table_of_goals(results)
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    sets = results["whole_sets"]
    lines = [
        "## Training",
        "",
        "`python benchmarks/training.py`",
        "",
        f"A Llama of {shape.layers} layers, hidden size {shape.hidden}, vocabulary {shape.vocabulary} unless said, "
        f"float32, random weights, forward and backward; {results['machine']}; {versions}. Lengths: "
        f"{results['lengths']} (`{'`, `'.join(SETS)}`), cut at {MAX_LENGTH} tokens; a token is a word, a run of signs "
        f'or white space. "Ours" is `{OURS}`. "TRL" is the step of its `RewardTrainer` on the same pairs and weights, '
        'without a regulariser. "Padding" is the number of tokens in padded batches for each real token. CPU time is '
        "the sum over the batches of the medians over the rounds. Peak memory is that of the largest batch, by the "
        "allocator, above the weights and without the parameter gradients. FLOPs come from a formula that the tests "
        "compare with `torch.utils.flop_counter`; padded batches count with causal attention.",
        "",
        *([results["conditions"], ""] if "conditions" in results else []),
        "| figure | padding | reached | goal | met |",
        "|---|---|---|---|---|",
        *map(str, goals),
        "",
        *profile(results, goals),
        "",
        "### Side by side",
        "",
        "Relative to TRL on the same batches; peak memory is above weights, parameter gradients included.",
        "",
    ]
    for step in (step for name, step in results["steps"].items() if name.endswith("all sides")):
        here = Shape(**{**asdict(shape), "vocabulary": step["vocabulary"]})
        lines += [
            f"{step['data']}, vocabulary {step['vocabulary']}, {len(step['padding'])} batches of {step['pairs']}, "
            f"padding {mean_padding(step):.2f}:",
            "",
            "| side | CPU time | peak memory | FLOPs |",
            "|---|---|---|---|",
        ]
        for side in step["sides"]:
            numbers = [ratio(step, side, TRL), ratio(step, side, TRL, "all_bytes")]
            numbers.append(flops(step, side, here) / flops(step, TRL, here))
            lines.append(f"| {side} | {' | '.join(f'{number:.3f}' for number in numbers)} |")
        lines.append("")
    lines += [
        "FLOPs of ours against TRL over whole sets, for this model and for the dimensions of a real one:",
        "",
        f"| data | order | padding | {' | '.join(f'{name}, {kind}' for name in REAL for kind in ('sft', 'dpo'))} |",
        f"|---|---|---|{'---|' * 2 * len(REAL)}",
    ]
    for found in sets:
        numbers = [flops(found, side, s) / flops(found, TRL, s) for s in REAL.values() for side in (OURS, DPO)]
        cells = " | ".join(f"{number:.3f}" for number in numbers)
        lines.append(f"| {found['data']} | {found['order']} | {found['padding']:.2f} | {cells} |")
    lines += [
        "",
        "### The text loss by itself",
        "",
        "It starts from given hidden states and computes the gradients of these and of the LM head. CPU time is "
        "relative to full logits; peak memory is without these gradients. Liger's fused kernel needs a GPU and was "
        "not measured.",
        "",
        "| tokens | vocabulary | side | CPU time | memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for term in results["lm_term"]:
        base = term["sides"]["full logits"]["seconds"]
        for name, side in term["sides"].items():
            numbers = f"{side['seconds'] / base:.2f} | {side['peak_bytes'] / 2**20:.0f}"
            lines.append(f"| {term['tokens']} | {term['vocabulary']} | {name} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of a training step, against TRL and the original.")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", nargs="+", choices=STEPS, default=[])
    args = parser.parse_args()
    if args.quick:
        print(section(run_all(quick=True)))
        return
    if not args.report:
        results = run_all(only=tuple(args.again))
        if args.again:
            before = json.loads(RESULTS.read_text(encoding="utf-8"))
            results = before | {"steps": before["steps"] | results["steps"]}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_section("training", section(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
