"""The cost of scoring, against transformers alone: the text-classification pipeline, length-sorted padded batches, and
reuse of the prompt's key-value cache.

    python benchmarks/scoring.py             # measures (needs a quiet machine), then the section in docs/benchmarks.md
    python benchmarks/scoring.py --report    # the section only, from docs/results/scoring.json
    python benchmarks/scoring.py --small     # a small model and one round, to see that it works; writes nothing

All contenders score the same texts with the same weights in one process, one after the other in every round (CPU time,
median over the rounds). Real lengths are taken from `shared/data` beside the repository; without it these cases are
left out.
"""

import argparse
import gc
import json
import os
import platform
import re
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median

import numpy as np
import torch
from sections import ROOT, write_section
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

from grm_hf import GRMForSequenceClassification, GRMScorer
from grm_hf.modeling_grm import CACHE


DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "docs" / "results" / "scoring.json"
EOS = "</s>"
PROMPT, ANSWER, SIGMA = 300, 200, 0.6  # tokens of the prompt; median and spread of the lognormal answers
# Case: least speed-up of `ours` over the pipeline at batch 8.
TARGETS = {"n = 1": 0.97, "n = 4": 2.0, "n = 16": 3.0, "n = 64": 3.3, "n = 16, equal": 2.2, "64 unrelated": 1.8}
UNRELATED_AGAINST_BATCH_1 = 1.0
RM_BENCH_TOKENS = 0.30  # most tokens computed, relative to each text of each pair alone
CONTENDERS = ("pipeline, batch 8", "pipeline, batch 1", "sorted, batch 8", "cache reuse, batch 8", "ours")


# ----------------------------------------------------------------------------------------------------- model and texts


def word_tokenizer(size: int = 32_768) -> PreTrainedTokenizerFast:
    """One token a word: `w0`, `w1`, ..., so lengths are exact."""
    vocabulary = {"<pad>": 0, EOS: 1, **{f"w{i}": i for i in range(2, size)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token="<pad>")


def llama(size: int = 32_768, layers: int = 8, hidden: int = 512) -> GRMForSequenceClassification:
    """Random weights: the cost of a token does not depend on them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=16_384,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    return GRMForSequenceClassification.from_base(LlamaForCausalLM(config)).eval()


@dataclass
class Case:
    """Texts to score. `prompt` words are common to all of them; the answers end with EOS, which is a word too."""

    prompt: str
    answers: list[str]

    @property
    def texts(self) -> list[str]:
        return [f"{self.prompt} {answer}".strip() for answer in self.answers]

    @property
    def lengths(self) -> list[int]:
        return [len(text.split()) for text in self.texts]

    @property
    def padding(self) -> float:
        """Tokens that batches of 8 in the given order compute, for each real token."""
        lengths = self.lengths
        batches = [lengths[i : i + 8] for i in range(0, len(lengths), 8)]
        return sum(len(batch) * max(batch) for batch in batches) / sum(lengths)


def words(rng: np.random.Generator, count: int, size: int = 32_768) -> str:
    return " ".join(f"w{i}" for i in rng.integers(2, size, count))


def best_of_n(n: int, equal: bool = False, scale: int = 1) -> Case:
    """`n` answers to one prompt; all lengths divided by `scale`."""
    rng = np.random.default_rng(n)
    lengths = np.full(n, ANSWER) if equal else ANSWER * np.exp(SIGMA * rng.standard_normal(n))
    if n == 1:
        lengths = [ANSWER]
    counts = [max(2, int(length) // scale) for length in lengths]
    return Case(words(rng, PROMPT // scale), [f"{words(rng, count - 1)} {EOS}" for count in counts])


def in_words(text: str) -> str:
    """Real text as words of the vocabulary: one for each word or sign; equal words stay equal."""
    return " ".join(f"w{2 + zlib.crc32(piece.encode()) % 32_766}" for piece in re.findall(r"\w+|[^\w\s]", text))


def rows(name: str) -> list[dict]:
    from datasets import load_dataset

    return load_dataset("parquet", data_files=str(DATA / f"{name}.parquet"), split="train").to_list()


def conversation(messages: list[dict]) -> str:
    return " ".join(in_words(f"{message['role']}: {message['content']}") for message in messages)


def unrelated(count: int = 64) -> Case:
    data = rows("hh_harmless_base_train")
    chosen = [data[i] for i in np.random.default_rng(0).choice(len(data), count, replace=False)]
    return Case("", [f"{conversation([*row['prompt'], *row['chosen']])} {EOS}" for row in chosen])


# ---------------------------------------------------------------------------------------------------------- contenders


def contenders(model, tokenizer, case: Case) -> dict[str, Callable[[], list[float]]]:
    """The contenders that score the texts of a case, in the given order: name and function."""
    texts = case.texts
    pipelines = {n: pipeline("text-classification", model=model, tokenizer=tokenizer, batch_size=n) for n in (1, 8)}
    scorer = GRMScorer(model, tokenizer)
    found = {
        "pipeline, batch 8": lambda: [row["score"] for row in pipelines[8](texts)],
        "pipeline, batch 1": lambda: [row["score"] for row in pipelines[1](texts)],
        "sorted, batch 8": lambda: sorted_batches(model, tokenizer, texts),
        "ours": lambda: scorer.score(texts),
    }
    if case.prompt:
        found["cache reuse, batch 8"] = lambda: cache_reuse(model, tokenizer, case)
    return {name: found[name] for name in CONTENDERS if name in found}


@torch.no_grad()
def sorted_batches(model, tokenizer, texts: list[str]) -> list[float]:
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].split()))
    scores = [0.0] * len(texts)
    for start in range(0, len(texts), 8):
        batch = order[start : start + 8]
        inputs = tokenizer([texts[i] for i in batch], padding=True, return_tensors="pt", return_token_type_ids=False)
        for i, score in zip(batch, model(**inputs).logits.squeeze(-1).tolist(), strict=True):
            scores[i] = score
    return scores


@torch.no_grad()
def cache_reuse(model, tokenizer, case: Case) -> list[float]:
    prompt = tokenizer(case.prompt, return_tensors="pt").input_ids
    cached = model.model(input_ids=prompt, use_cache=True)[CACHE]
    scores = []
    for start in range(0, len(case.answers), 8):
        inputs = tokenizer(case.answers[start : start + 8], padding=True, return_tensors="pt")
        count = len(inputs.input_ids)
        cache = DynamicCache()
        for number, layer in enumerate(cached.layers):
            cache.update(*(x.expand(count, -1, -1, -1) for x in (layer.keys, layer.values)), number)
        mask = torch.cat([prompt.new_ones(count, prompt.shape[1]), inputs.attention_mask], 1)
        out = model(input_ids=inputs.input_ids, attention_mask=mask, cache=cache, use_cache=True)
        scores += out.logits.squeeze(-1).tolist()
    return scores


# ------------------------------------------------------------------------------------------------------------ measures


def counted(model, run: Callable) -> tuple[list[float], int, int]:
    """The result of a run, the number of token positions that went into the model (with padding), and FLOPs."""
    seen = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    try:
        with FlopCounterMode(display=False) as counter:
            scores = run()
    finally:
        hook.remove()
    return scores, sum(seen), counter.get_total_flops()


def peak_bytes(run: Callable) -> int:
    """Largest number of bytes of live tensors, above those alive before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    alive = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def measure(model, tokenizer, case: Case, rounds: int) -> dict:
    """For each contender: CPU seconds (median), tokens, FLOPs, peak bytes, and the distance of its scores from the
    first one's."""
    sides = contenders(model, tokenizer, case)
    result: dict = {"texts": len(case.answers), "tokens": sum(case.lengths), "padding": case.padding, "rounds": rounds}
    result["sides"] = {}
    expected = None
    for name, run in sides.items():
        scores, tokens, flops = counted(model, run)
        expected = expected or scores
        error = float(np.abs(np.subtract(scores, expected)).max())
        result["sides"][name] = {"tokens": tokens, "flops": flops, "peak_bytes": peak_bytes(run), "error": error}
    for name, seconds in cpu_seconds(sides, rounds).items():
        result["sides"][name]["seconds"] = seconds
    return result


def cpu_seconds(sides: dict[str, Callable], rounds: int) -> dict[str, float]:
    """The median over rounds, in each of which every side has its turn."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: median(times) for name, times in seconds.items()}


def pair_set(name: str) -> dict:
    """Tokens computed when a set of pairs is evaluated, against every text of every pair by itself."""
    model, tokenizer = llama(layers=1, hidden=16), word_tokenizer()
    pairs = [
        {
            "prompt": conversation(row["prompt"]) + " ",
            "chosen": conversation(row["chosen"]),
            "rejected": conversation(row["rejected"]),
        }
        for row in rows(name)
    ]
    alone = sum(
        len(row["prompt"].split()) + len(row[side].split()) + 1 for row in pairs for side in ("chosen", "rejected")
    )
    scorer = GRMScorer(model, tokenizer)
    _, computed, _ = counted(model, lambda: scorer.score_pairs(pairs))
    return {"pairs": len(pairs), "tokens_alone": alone, "tokens_computed": computed}


def run_all(small: bool) -> dict:
    torch.set_num_threads(1)
    model, tokenizer = llama(**({"layers": 2, "hidden": 64} if small else {})), word_tokenizer()
    scale = 10 if small else 1
    cases = {f"n = {n}": best_of_n(n, scale=scale) for n in (1, 4, 16, 64)}
    cases["n = 16, equal"] = best_of_n(16, equal=True, scale=scale)
    if DATA.is_dir():
        cases["64 unrelated"] = unrelated(16 if small else 64)
    results: dict = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, one thread",
        "versions": {name: version(name) for name in ("grm-hf", "torch", "transformers", "tokenizers")},
        "model": {"type": "llama", "layers": 8, "hidden": 512, "vocabulary": 32_768, "dtype": "float32"},
        "cases": {},
    }
    for name, case in cases.items():
        rounds = 1 if small else max(3, 24 // len(case.answers))
        results["cases"][name] = measure(model, tokenizer, case, rounds)
        print(f"{name}: {speedups(results['cases'][name])}", file=sys.stderr)
    if DATA.is_dir() and not small:
        results["rm_bench"] = pair_set("rm_bench")
    return results


# -------------------------------------------------------------------------------------------------------------- report


def speedups(case: dict, measure: str = "seconds", against: str = CONTENDERS[0]) -> dict[str, float]:
    base = case["sides"][against][measure]
    return {name: round(base / side[measure], 2) for name, side in case["sides"].items()}


def section(results: dict) -> str:
    model, versions = results["model"], results["versions"]
    lines = [
        "## Scoring",
        "",
        "`python benchmarks/scoring.py`",
        "",
        "Speed-up over `pipeline('text-classification')` at batch 8 in the given order, by CPU time, median of "
        f"interleaved rounds. A {model['type']} of {model['layers']} layers, hidden size {model['hidden']}, "
        f"vocabulary {model['vocabulary']}, {model['dtype']}, random weights; {results['machine']}; "
        f"{', '.join(f'{name} {number}' for name, number in versions.items())}. `n` answers to one prompt of "
        f"{PROMPT} tokens; answers of lognormal length, median {ANSWER}, sigma {SIGMA} ('equal' and n = 1: {ANSWER}). "
        "'Padding' is the number of tokens that the pipeline computes for each real token. 'Unrelated' texts are "
        "those of hh-rlhf.",
        "",
        f"| texts | padding | {' | '.join(CONTENDERS[1:])} | must be |",
        f"|---|---|{'---|' * len(CONTENDERS)}",
    ]
    for name, case in results["cases"].items():
        found = speedups(case)
        cells = [f"{found[side]:.2f}" if side in found else "" for side in CONTENDERS[1:]]
        lines.append(f"| {name} | {case['padding']:.2f} | {' | '.join(cells)} | >= {TARGETS[name]} |")
    if "64 unrelated" in results["cases"]:
        ratio = speedups(results["cases"]["64 unrelated"], against="pipeline, batch 1")["ours"]
        lines += [
            "",
            f"Unrelated texts, against the pipeline at batch 1: {ratio:.2f} (must be >= {UNRELATED_AGAINST_BATCH_1}).",
        ]
    lines += [
        "",
        "Counts of the same runs, ours relative to the pipeline at batch 8.",
        "",
        "| texts | tokens computed | FLOPs | peak memory above weights | largest difference of a score |",
        "|---|---|---|---|---|",
    ]
    for name, case in results["cases"].items():
        ours, base = case["sides"]["ours"], case["sides"][CONTENDERS[0]]
        ratios = [f"{ours[what] / base[what]:.2f}" for what in ("tokens", "flops", "peak_bytes")]
        lines.append(f"| {name} | {' | '.join(ratios)} | {ours['error']:.0e} |")
    if "rm_bench" in results:
        found = results["rm_bench"]
        ratio = found["tokens_computed"] / found["tokens_alone"]
        lines += [
            "",
            f"Evaluating rm_bench ({found['pairs']} pairs, a token a word or sign): {found['tokens_computed']} tokens "
            f"computed, {ratio:.3f} of the {found['tokens_alone']} that every text of every pair by itself has (must "
            f"be <= {RM_BENCH_TOKENS}).",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Scoring, against what is built on transformers alone.")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    if not args.report:
        results = run_all(args.small)
        if args.small:
            print(section(results))
            return
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_section("scoring", section(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
