"""Reward models on real preference pairs: `examples/train_grm.py` run on three training files with four text losses
and the seeds in `SEEDS`, from the pretrained stories260K model, tested on held-out pairs and on HHH alignment.

    python benchmarks/real_data.py             # what is not yet done, then the section in docs/results.md
    python benchmarks/real_data.py --report    # the section only, from docs/results/real_data.json
    python benchmarks/real_data.py --select    # the search for the learning rate, on a part of one training file

The data (`shared/data`) and the model (`shared/models/stories260K`) are expected beside the repository. A run that is
interrupted goes on where it stopped: finished trainings are lines of `runs/real_data/runs.jsonl`.
"""

import argparse
import json
import math
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from results_page import ROOT, write_section
from stories260k import SHARED, SOURCE, load
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from grm_hf import GRMScorer
from grm_hf.metrics import accuracy, bootstrap_interval, length_bias, pair_margins, pair_wins, seed_interval
from grm_hf.pairs import Encoder


sys.path.insert(0, str(ROOT / "examples"))
import train_grm  # noqa: E402


DATA = SHARED / "data"
WORK = ROOT / "runs" / "real_data"
RESULTS = ROOT / "docs" / "results" / "real_data.json"

# Training file: what is tested. No prompt of a training file is in the files it is tested on, which is checked.
FILES = {
    "hh_helpful_base_train": ("hh_helpful_base_eval", "hhh_alignment"),
    "ultrafeedback_train": ("ultrafeedback_eval", "hhh_alignment"),
    "alpaca_eval_train": ("alpaca_eval_eval", "hhh_alignment"),
}
EVAL_ROWS = 200  # of a longer evaluation file, drawn at random
REGULARIZERS = ("none", "sft", "dpo_noref", "dpo")
SEEDS = range(5)
# The same for every run. Weight and temperature of the text loss, schedule and clipping are the paper's.
SETTINGS = {
    "max_rows": 256,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "max_grad_norm": 5.0,
    "max_length": 512,
    "overlength": "truncate_left",
    "alpha": 0.01,
    "beta": 0.1,
    "pair_loss": "bt",
    "layout": "shared_prefix",
}
RATES = (1e-4, 3e-4, 1e-3)  # candidates of --select
MACHINE = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "epoch",
}
PACKAGES = ("grm-hf", "torch", "transformers", "trl", "tokenizers")


# ---------------------------------------------------------------------------------------------------------------- runs


def train(folder: Path, **settings):
    """The example, called as from the command line; returns its trainer."""
    options = {"model": WORK / "base", "output_dir": folder, **SETTINGS, **MACHINE, **settings}
    return train_grm.main([part for name, value in options.items() for part in (f"--{name}", str(value))])


def pairs(name: str):
    return load_dataset("parquet", data_files=str(DATA / f"{name}.parquet"), split="train")


def sample(rows):
    """At most `EVAL_ROWS` rows."""
    return rows.shuffle(seed=0).select(range(EVAL_ROWS)) if len(rows) > EVAL_ROWS else rows


def first_user_turn(row: dict) -> str:
    return next(message["content"] for message in row["prompt"] if message["role"] == "user")


def check_apart(train_name: str, eval_name: str) -> None:
    """Raises if a training and an evaluation file have a prompt in common."""
    seen, tested = ({first_user_turn(row) for row in pairs(name)} for name in (train_name, eval_name))
    if common := seen & tested:
        raise ValueError(f"{train_name} and {eval_name} have {len(common)} prompts in common; test on another file.")


@torch.no_grad()
def perplexity(lm, tokenizer, rows: list[dict], batch_size: int = 16) -> float:
    """exp of the mean negative log-likelihood, in nats, of a token of the chosen responses."""
    encoder = Encoder(tokenizer, SETTINGS["max_length"], SETTINGS["overlength"])
    texts = sorted((encoder.encode(row["prompt"], row["chosen"]) for row in rows), key=lambda text: len(text.ids))
    total = tokens = 0
    for i in range(0, len(texts), batch_size):
        batch = texts[i : i + batch_size]
        width = len(batch[-1].ids)
        ids = torch.tensor([text.ids + [0] * (width - len(text.ids)) for text in batch])
        position = torch.arange(width)
        real = position < torch.tensor([len(text.ids) for text in batch])[:, None]
        response = real & (position >= torch.tensor([text.start for text in batch])[:, None])
        logits = lm(input_ids=ids, attention_mask=real.long()).logits[:, :-1]  # (B, width - 1, V)
        targets = ids.masked_fill(~response, -100)[:, 1:]
        total += cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        tokens += int((targets != -100).sum())
    return math.exp(total / tokens)


def evaluate(model, tokenizer, rows: list[dict]) -> dict:
    """Which pairs are won (a character a pair: 1, 0, or = for a tie), length bias, perplexity."""
    chosen, rejected = zip(*GRMScorer(model, tokenizer).score_pairs(rows), strict=True)
    margins = pair_margins(chosen, rejected)
    bias = length_bias(chosen, rejected, *lengths(rows))
    return {
        "wins": "".join("1" if m > 0 else "0" if m < 0 else "=" for m in margins),
        "length": round(bias["length_pearson_within"], 4),
        "perplexity": round(perplexity(model.lm, tokenizer, rows), 3),
    }


def lengths(rows: list[dict]) -> tuple[list[int], list[int]]:
    """Characters of the chosen and of the rejected responses."""
    first, second = ([len(row[side][0]["content"]) for row in rows] for side in ("chosen", "rejected"))
    return first, second


def one_run(train_name: str, regularizer: str, seed: int, sets: dict[str, list[dict]]) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    trainer = train(
        WORK / "model" / train_name, train=DATA / f"{train_name}.parquet", regularizer=regularizer, seed=seed
    )
    counts = trainer.data_counts["train"]
    return {
        "train": train_name,
        "regularizer": regularizer,
        "seed": seed,
        "rows": [len(pairs(train_name)), counts.rows, counts.truncated, counts.response_cut, counts.dropped],
        "loss": round(trainer.state.log_history[-1]["train_loss"], 4),
        "eval": {name: evaluate(trainer.model, trainer.processing_class, sets[name]) for name in FILES[train_name]},
        "wall": round(time.perf_counter() - wall, 1),
        "cpu": round(time.process_time() - cpu, 1),
    }


def run_all() -> None:
    """Every run that has no line yet, seed by seed, so that what there is at any time is balanced."""
    for train_name, eval_names in FILES.items():
        for eval_name in eval_names:
            check_apart(train_name, eval_name)
    sets = {name: sample(pairs(name)).to_list() for names in FILES.values() for name in names}
    evals = describe(sets)
    done = {(run["train"], run["regularizer"], run["seed"]) for run in finished()}
    for seed in SEEDS:
        for train_name in FILES:
            for regularizer in REGULARIZERS:
                if (train_name, regularizer, seed) not in done:
                    run = one_run(train_name, regularizer, seed, sets)
                    with open(WORK / "runs.jsonl", "a", encoding="utf-8") as file:
                        file.write(json.dumps({**run, "settings": fingerprint()}) + "\n")
                    collect(evals)


def select() -> None:
    """A Bradley-Terry run at each of `RATES` on four fifths of each training file's prompts, judged on the others."""
    path = WORK / "selection.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in FILES:
        rows = pairs(name)
        turns = [first_user_turn(row) for row in rows]
        held_out = set(sorted(set(turns))[::5])
        train_rows = rows.select([i for i, turn in enumerate(turns) if turn not in held_out])
        eval_rows = sample(rows.select([i for i, turn in enumerate(turns) if turn in held_out]))
        train_rows.to_parquet(WORK / "select_train.parquet")
        eval_rows.to_parquet(WORK / "select_eval.parquet")
        for rate in RATES:
            drawn = min(SETTINGS["max_rows"], len(train_rows))
            if str(rate) not in found.setdefault(name, {"pairs": len(eval_rows), "drawn": drawn}):
                trainer = train(
                    WORK / "model" / "select",
                    train=WORK / "select_train.parquet",
                    eval=WORK / "select_eval.parquet",
                    regularizer="none",
                    learning_rate=rate,
                    seed=1000,
                )
                loss = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row][-1]
                found[name][str(rate)] = round(loss, 4)
                path.write_text(json.dumps(found), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------- results


def fingerprint() -> dict:
    """What a finished run must have been made with to count."""
    return {**SETTINGS, "eval_rows": EVAL_ROWS, "versions": {name: version(name) for name in PACKAGES}}


def finished() -> list[dict]:
    path = WORK / "runs.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [run for run in map(json.loads, lines) if run.pop("settings") == fingerprint()]


def describe(sets: dict[str, list[dict]]) -> dict:
    """What the tables say of each evaluation file: the prompt of each pair, as a number; the share of pairs in which
    the longer response is the chosen one; pairs that were cut, and cut inside a response; the base's perplexity."""
    tokenizer = AutoTokenizer.from_pretrained(WORK / "base")
    lm = AutoModelForCausalLM.from_pretrained(WORK / "base")
    encoder = Encoder(tokenizer, SETTINGS["max_length"], SETTINGS["overlength"])
    result = {}
    for name, rows in sets.items():
        prompts = [json.dumps(row["prompt"]) for row in rows]
        numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        sides = [[encoder.encode(row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in rows]
        result[name] = {
            "prompts": [numbers[prompt] for prompt in prompts],
            "longer": round(accuracy(pair_margins(*lengths(rows))), 4),
            "truncated": sum(any(text.truncated for text in pair) for pair in sides),
            "response_cut": sum(any(text.response_cut for text in pair) for pair in sides),
            "perplexity": round(perplexity(lm, tokenizer, rows), 3),
        }
    return result


def collect(evals: dict) -> None:
    """Everything the section is made of, in `RESULTS`: one line a run."""
    selection = WORK / "selection.json"
    results = {
        "settings": fingerprint(),
        "selection": json.loads(selection.read_text(encoding="utf-8")) if selection.is_file() else None,
        "evals": evals,
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in results.items()]
    lines.append('"runs": [\n' + ",\n".join(map(json.dumps, finished())) + "\n]")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- report


def verdict(*intervals: tuple[float, float]) -> str:
    """"higher" or "lower" where every interval of a difference is on that side of zero."""
    if all(low > 0 for low, _ in intervals):
        return "higher"
    if all(high < 0 for _, high in intervals):
        return "lower"
    return "no difference shown"


def over_seeds(values: list[float]) -> tuple[float, tuple[float, float]]:
    """Mean and 95 % interval (Student's t)."""
    result = seed_interval(values)
    return result["mean"], (result["low"], result["high"])


def wins_of(scores: dict) -> np.ndarray:
    return pair_wins([{"1": 1, "0": -1, "=": 0}[pair] for pair in scores["wins"]])


def section(results: dict) -> str:
    """The section of docs/results.md: every number and every verdict in it is computed here from the results file."""
    settings, evals = results["settings"], results["evals"]
    table = {(run["train"], run["regularizer"], run["seed"]): run for run in results["runs"]}
    seeds = [  # those that every cell has: differences are paired
        seed
        for seed in sorted({run["seed"] for run in results["runs"]})
        if all((name, regularizer, seed) in table for name in FILES for regularizer in REGULARIZERS)
    ]
    if len(seeds) < 2:
        raise ValueError(f"The results file has {len(seeds)} complete seeds; intervals need 2. Go on with the runs.")
    counted = [table[name, regularizer, s] for name in FILES for regularizer in REGULARIZERS for s in seeds]

    lines: dict[str, list[str]] = {"accuracy": [], "length": [], "perplexity": []}
    verdicts: dict[str, list[str]] = {name: [] for name in lines}
    above_chance, beyond_length = [], []
    for train_name, eval_name in ((name, e) for name, names in FILES.items() for e in names):
        prompts = evals[eval_name]["prompts"]
        scores = {r: [table[train_name, r, seed]["eval"][eval_name] for seed in seeds] for r in REGULARIZERS}
        wins = {r: 100 * np.stack([wins_of(score) for score in scores[r]]) for r in REGULARIZERS}  # (seeds, pairs)
        for r in REGULARIZERS:
            names = f"| {train_name} | {eval_name} | {r} "
            mean, spread = over_seeds(wins[r].mean(1))
            sample = bootstrap_interval(wins[r].mean(0), prompts)
            above_chance.append(sample[0] > 50)
            beyond_length.append(mean > 100 * evals[eval_name]["longer"])
            row = f"{names}| {mean:.1f} | {_span(spread, 1)} | {_span(sample, 1)} "
            if r == "none":
                row += "| | | | baseline |"
            else:
                difference = wins[r] - wins["none"]
                mean, spread = over_seeds(difference.mean(1))
                sample = bootstrap_interval(difference.mean(0), prompts)
                verdicts["accuracy"].append(verdict(spread, sample))
                row += f"| {mean:+.1f} | {_span(spread, 1)} | {_span(sample, 1)} | {verdicts['accuracy'][-1]} |"
            lines["accuracy"].append(row)
            for quantity, digits in (("length", 2), ("perplexity", 1)):
                ours, theirs = ([score[quantity] for score in scores[x]] for x in (r, "none"))
                mean, spread = over_seeds(ours)
                before = f"| {evals[eval_name]['perplexity']:.1f} " if quantity == "perplexity" else ""
                row = f"{names}{before}| {mean:.{digits}f} | {_span(spread, digits)} "
                if r == "none":
                    row += "| | | baseline |"
                else:
                    mean, spread = over_seeds([a - b for a, b in zip(ours, theirs, strict=True)])
                    verdicts[quantity].append(verdict(spread))
                    row += f"| {mean:+.{digits}f} | {_span(spread, digits)} | {verdicts[quantity][-1]} |"
                lines[quantity].append(row)

    def count(quantity: str) -> str:
        words = ("higher", "lower", "no difference shown")
        found = ", ".join(f"{verdicts[quantity].count(word)} {word}" for word in words)
        return f"{len(verdicts[quantity])} comparisons with `none`: {found}."

    def head(*names: str) -> list[str]:
        return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]

    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    options = ", ".join(f"`{name}={settings[name]}`" for name in SETTINGS)
    wall, cpu = (sum(run[clock] for run in counted) / 60 for clock in ("wall", "cpu"))
    cut = ("pairs cut", "of these, inside a response")
    columns, interval = ("trained on", "tested on", "text loss"), ("over seeds", "over prompts")
    return "\n".join(
        [
            "## Real preference data, from a base of 260,032 parameters",
            "",
            "`python benchmarks/real_data.py` (needs `shared/data` and `shared/models` beside the repository).",
            "",
            "`examples/train_grm.py` on three files of real preference pairs, from stories260K, a language model "
            "trained on English children's stories with a vocabulary of 512 pieces and a context of 512 tokens. It "
            "can hardly read these texts, so this shows how the training behaves on real input and says nothing about "
            "what GRM does for a base of useful size. `none` is a Bradley-Terry model with the same head, pairs, "
            "steps and settings; a seed draws the reward head and the order of pairs, alike for all text losses.",
            "",
            f"- {len(seeds)} seeds, so {len(counted)} runs: {wall:.0f} minutes of wall time on one thread of a shared "
            f"machine, {cpu:.0f} of processor time.",
            "- Sizes were cut once for machine time, from 600 training and 300 test pairs to those below, after three "
            "runs of the larger size had finished (hh, all but `dpo`, seed 0; not counted here). Five seeds were "
            "planned.",
            f"- Settings, alike for every run: {options}.",
            *_selection(results["selection"], settings["learning_rate"]),
            "- The intervals are 95 %. Over seeds: Student's t on the means of the runs; it holds for these test "
            "pairs. Over prompts: test prompts drawn with replacement (bootstrap, each with all its pairs), of the "
            "average over seeds; it holds for these runs. Differences are paired by seed and by pair. A verdict on "
            "accuracy needs both intervals on one side of zero. Nothing is corrected for the number of comparisons.",
            f"- Versions: {versions}.",
            "",
            "### Data",
            "",
            "No prompt of a training file is in the files it is tested on. Pairs to train on are drawn at random, "
            f"alike for every run; so are {settings['eval_rows']} of a test file that has more. A text longer than "
            "the context loses its beginning: the prompt first, then that of the response.",
            "",
            *head("training file", "pairs", "drawn", *cut, "left out"),
            *(f"| {name} | {' | '.join(map(str, table[name, 'none', seeds[0]]['rows']))} |" for name in FILES),
            "",
            *head("test file", "pairs", "prompts", *cut, "chosen is the longer one, %"),
            *(
                f"| {name} | {len(about['prompts'])} | {len(set(about['prompts']))} | {about['truncated']} | "
                f"{about['response_cut']} | {100 * about['longer']:.1f} |"
                for name, about in evals.items()
            ),
            "",
            "### Accuracy, %",
            "",
            f"{sum(above_chance)} of {len(above_chance)} lines are above chance (interval over prompts above 50 %), "
            f"{sum(beyond_length)} of {len(beyond_length)} are better than always choosing the longer response. "
            + count("accuracy"),
            "",
            *head(*columns, "accuracy", *interval, "minus `none`", *interval, "verdict"),
            *lines["accuracy"],
            "",
            "### Length",
            "",
            "Correlation (Pearson) of the difference in reward with the difference in characters between the two "
            "responses of a pair: 0 where the reward does not follow length. " + count("length"),
            "",
            *head(*columns, "correlation", "over seeds", "minus `none`", "over seeds", "verdict"),
            *lines["length"],
            "",
            "### Does the hidden state still speak?",
            "",
            "Perplexity of a token of the chosen test responses under the kept language-model head, before and after "
            "training (lower is better). " + count("perplexity"),
            "",
            *head(*columns, "before", "after", "over seeds", "minus `none`", "over seeds", "verdict"),
            *lines["perplexity"],
        ]
    )


def _span(interval: tuple[float, float], digits: int) -> str:
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def _selection(selection: dict | None, rate: float) -> list[str]:
    if selection is None:
        return []
    means = {r: sum(file[str(r)] for file in selection.values()) / len(selection) for r in RATES}
    if rate != min(means, key=means.get):
        raise ValueError(f"learning_rate is {rate}, and the search found {means}.")
    found = ", ".join(f"{loss:.4f} at {r}" for r, loss in means.items())
    parts = ", ".join(f"{f['pairs']} of {name} after training on {f['drawn']}" for name, f in selection.items())
    return [
        f"- The learning rate {rate} is the one with the lowest mean loss of `none` on pairs held out of the training "
        f"files ({parts}): {found} (`--select`). No test file was used."
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--report", action="store_true", help="only write the section in docs/results.md")
    parser.add_argument("--select", action="store_true", help="only search for the learning rate")
    args = parser.parse_args()
    if not args.report:
        if missing := [path for path in (DATA, SOURCE) if not path.is_dir()]:
            sys.exit(f"{missing[0]} is missing: the data and the model do not come with this repository.")
        os.environ["HF_HUB_OFFLINE"] = "1"
        torch.set_num_threads(1)
        if not (WORK / "base" / "config.json").is_file():
            model, tokenizer = load()
            model.save_pretrained(WORK / "base")
            tokenizer.save_pretrained(WORK / "base")
        (select if args.select else run_all)()
    if not args.select:
        write_section("real_data", section(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
