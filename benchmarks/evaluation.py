"""The cost of a pass over a benchmark: `grm_hf.evaluation.evaluate` against the text-classification pipeline and
against the loop of `rewardbench`, which calls that pipeline for each batch of rows.

    python benchmarks/evaluation.py             # measures (needs a quiet machine), writes its section in benchmarks.md
    python benchmarks/evaluation.py --report    # the section only, from docs/results/evaluation.json
    python benchmarks/evaluation.py --small     # a small model, few rows, one round, to see that it works

All score the same texts with the same weights in one process, one after the other in every round (CPU time, median
over the rounds). rm_bench is read from `shared/data` beside the repository (or where GRM_DATA says); without it this
case is left out.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import scoring
import torch
from sections import ROOT, write_section
from transformers import pipeline

from grm_hf import GRMScorer
from grm_hf.evaluation import evaluate


DATA = Path(os.environ.get("GRM_DATA") or scoring.DATA)
RESULTS = ROOT / "docs" / "results" / "evaluation.json"
SIDES = ("pipeline, batch 8", "rewardbench's loop", "ours")
# Case: least speed-up of `ours` over both others.
TARGETS = {"rm_bench": 2.5, "best of 4": 2.0}
CLOSE = 1e-4  # largest difference of a score between the sides


def rm_bench(items: int) -> list[dict]:
    """Rows spread over RM-Bench in its official form, in words of the benchmark's vocabulary."""
    import pyarrow.parquet as parquet

    found: dict[str, dict] = {}
    for row in parquet.read_table(DATA / "rm_bench.parquet").to_pylist():
        meta = json.loads(row["meta"])
        prompt = scoring.conversation(row["prompt"]) + " "
        item = found.setdefault(meta["item_id"], {"id": meta["item_id"], "domain": row["subset"], "prompt": prompt})
        for side in ("chosen", "rejected"):
            text = scoring.in_words(f"assistant: {row[side][0]['content']}")
            item.setdefault(side, [""] * 3)[meta[f"{side}_style"]] = text
    rows = list(found.values())
    return [rows[i] for i in np.random.default_rng(0).choice(len(rows), items, replace=False)]


def best_of_4(prompts: int, scale: int) -> list[dict]:
    """Rows in the form of RewardBench 2: a prompt, one right and three wrong answers of lognormal length."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(prompts):
        lengths = np.maximum(2, scoring.ANSWER * np.exp(scoring.SIGMA * rng.standard_normal(4)) // scale).astype(int)
        answers = [scoring.words(rng, count) for count in lengths]
        prompt = scoring.words(rng, scoring.PROMPT // scale) + " "
        rows.append({"id": str(number), "prompt": prompt, "chosen": answers[:1], "rejected": answers[1:],
                     "num_correct": 1, "subset": "Math"})
    return rows


def texts_of(rows: list[dict]) -> list[list[str]]:
    return [[f"{row['prompt']}{text} {scoring.EOS}" for text in [*row["chosen"], *row["rejected"]]] for row in rows]


def sides(model, tokenizer, suite: str, rows: list[dict]) -> dict[str, Callable[[], list[list[float]]]]:
    """The sides: each scores the rows and returns the scores of each row's responses."""
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, batch_size=8)
    scorer, texts = GRMScorer(model, tokenizer), texts_of(rows)
    width = len(texts[0])

    def whole():
        flat = [found["score"] for found in pipe([text for row in texts for text in row])]
        return [flat[i : i + width] for i in range(0, len(flat), width)]

    def loop():
        """As its scripts: batches of 8 rows; in each, the pipeline for one response of every row after the other."""
        tokenizer.padding_side = "left"
        try:
            found = []
            for start in range(0, len(texts), 8):
                batch = texts[start : start + 8]
                columns = [
                    pipe([row[j] for row in batch], batch_size=8, truncation=True, max_length=2048, padding=True,
                         function_to_apply="none", return_token_type_ids=False)
                    for j in range(width)
                ]
                found += [[column[i]["score"] for column in columns] for i in range(len(batch))]
            return found
        finally:
            tokenizer.padding_side = "right"

    return {SIDES[0]: whole, SIDES[1]: loop, SIDES[2]: lambda: evaluate(scorer, suite, rows).scores}


def measure(model, tokenizer, suite: str, rows: list[dict], rounds: int) -> dict:
    running = sides(model, tokenizer, suite, rows)
    lengths = [len(text.split()) for row in texts_of(rows) for text in row]
    result: dict = {"rows": len(rows), "texts": len(lengths), "tokens": sum(lengths), "rounds": rounds, "sides": {}}
    expected = None
    for name, run in running.items():
        scores, tokens, _ = scoring.counted(model, run)
        expected = expected or scores
        error = max(float(np.abs(np.subtract(a, b)).max()) for a, b in zip(scores, expected, strict=True))
        if error > CLOSE:
            raise ValueError(f"{suite}: {name} gives other scores than {SIDES[0]}, by {error:.1e}.")
        result["sides"][name] = {"tokens": tokens, "error": error}
    for name, seconds in scoring.cpu_seconds(running, rounds).items():
        result["sides"][name]["seconds"] = seconds
    return result


def run_all(small: bool) -> dict:
    torch.set_num_threads(1)
    model, tokenizer = scoring.llama(**({"layers": 2, "hidden": 64} if small else {})), scoring.word_tokenizer()
    cases = {"best of 4": ("rewardbench2", best_of_4(4 if small else 16, 10 if small else 1))}
    if (DATA / "rm_bench.parquet").is_file():
        cases["rm_bench"] = ("rm-bench", rm_bench(2 if small else 16))
    results: dict = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, one thread",
        "versions": {name: version(name) for name in ("grm-hf", "torch", "transformers")},
        "cases": {},
    }
    for name, (suite, rows) in cases.items():
        results["cases"][name] = measure(model, tokenizer, suite, rows, 1 if small else 3)
        print(f"{name}: {scoring.speedups(results['cases'][name])}", file=sys.stderr)
    return results


def section(results: dict) -> str:
    lines = [
        "## Evaluation",
        "",
        "`python benchmarks/evaluation.py`",
        "",
        "Speed-up of a pass over a benchmark by `evaluate` (a Llama of 8 layers, hidden size 512, float32, random "
        f"weights; {results['machine']}; {', '.join(f'{n} {v}' for n, v in results['versions'].items())}): CPU time, "
        "median of interleaved rounds. All sides give the same scores. rm_bench: real texts, 6 to a prompt, a token a "
        f"word or sign; best of 4: a prompt of {scoring.PROMPT} tokens with 4 answers of lognormal length, median "
        f"{scoring.ANSWER}.",
        "",
        "| rows | texts | over the pipeline at batch 8 | over rewardbench's loop | must be | largest difference of a "
        "score |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in results["cases"].items():
        ratios = [f"{scoring.speedups(case, against=side)['ours']:.2f}" for side in SIDES[:2]]
        lines.append(
            f"| {name} ({case['rows']}) | {case['texts']} | {' | '.join(ratios)} | >= {TARGETS[name]} | "
            f"{max(side['error'] for side in case['sides'].values()):.0e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="A pass over a benchmark, side by side.")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    if not args.report:
        results = run_all(args.small)
        if args.small:
            print(section(results))
            return
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_section("evaluation", section(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
