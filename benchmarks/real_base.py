"""Does GRM help on a real base? Each method trains all weights of SmolLM2-135M-Instruct (`grm_hf.base`) on the same
real preference pairs in the same order. The tests are in and out of distribution.

    python benchmarks/real_base.py               # every unit that has no file yet, the most informative first
    python benchmarks/real_base.py --workers 2   # two at a time
    python benchmarks/real_base.py --list        # what there is, and what is left
    python benchmarks/results.py                 # its page, from the units that there are

A unit is one run and one small JSON file, named by a digest of its settings. You may interrupt it: units without a
file are done again. Each unit is a process of its own, with one thread and a low priority.

Each method has its own learning rate: one run on 600 RMB pairs at each rate of `RATES` (and at `HIGHER`, where the
last of these is the best), with one seed, judged by the log loss on held-out training pairs. The rate then holds for
every data set. Only short pairs of `shared/data` beside the repository are used: prompt and response have at most
1,000 characters.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from grm_hf import GRMRewardConfig, GRMRewardTrainer, GRMScorer, base
from grm_hf.metrics import accuracy, length_bias, log_loss, pair_margins
from grm_hf.pairs import Encoder
from grm_hf.training import CHECKPOINTING


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "real_base"
DATA = Path(os.environ.get("GRM_DATA", ROOT.parent / "shared" / "data"))

METHODS = {  # name: what the trainer is given
    "linear": {"regularizer": "none", "head_type": "linear"},
    "none": {"regularizer": "none", "head_type": "mlp"},
    "sft": {"regularizer": "sft", "head_type": "mlp"},
    "dpo_noref": {"regularizer": "dpo_noref", "head_type": "mlp"},
    "dpo": {"regularizer": "dpo", "head_type": "mlp"},
}
# What goes beyond the paper, for the page on objectives. The sum to zero weighs more than by its authors' rule (0.001
# for each pair of a step, here 0.008), so that an effect can show.
OBJECTIVES = {
    "none_zero": METHODS["none"] | {"batch_sum_to_zero": 0.1},
    "sft_zero": METHODS["sft"] | {"batch_sum_to_zero": 0.1},
    "bnrm": {"regularizer": "none", "head_type": "bnrm"},
}
# Whose learning rate a method has, if not its own.
RATE_OF = {"none_zero": "none", "sft_zero": "sft"}
# The same for every run. Weight and temperature of the text loss, schedule, clipping and the head are the paper's.
RECIPE = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "max_grad_norm": 5.0,
    "max_length": 512,
    "alpha": 0.01,
    "beta": 0.1,
    "pair_loss": "bt",
    "layout": "shared_prefix",
    "max_tokens_per_batch": 1024,
}
RATES = (3e-5, 1e-4, 3e-4)  # candidates, for each method; 1e-5 was worse than 3e-5 for `none`
HIGHER = 1e-3  # one more, for a method of which the last of them is the best
SELECTION = {"train": "rmb", "pairs": 600, "flipped": 0.0, "seed": 1000}
# Training set: file, and how many of its pairs are held out (whole prompts): RMB's to choose the learning rate,
# PandaLM's as a test set.
TRAIN = {"rmb": ("rmb_pairwise_train", 200), "pandalm": ("pandalm_testset", 200)}
# Test set: file, and how many of its short rows, drawn by prompt.
TESTS = {
    "rmb": ("rmb_pairwise_eval", None),
    "hhh": ("hhh_alignment", None),
    "hh_harmless": ("hh_harmless_base_eval", 150),
    "hh_helpful": ("hh_helpful_base_eval", 150),
    "pandalm": ("pandalm_testset", None),  # those held out
    "rm_bench": ("rm_bench", 80),  # of each of chat, safety-refuse, safety-response
    "gsm8k": ("gsm8k_solutions", 100),
}
SHORT = 1000  # characters of prompt and response together
# What the judge of an experiment on over-optimisation learns from (the study's runs are its proxies): files, and the
# most characters of prompt and response together.
GOLD = {"rmb_pairwise_train": 1500, "pandalm_testset": 1500, "ultrafeedback_train": 1500, "autoj_pairwise": 1500}
PROMPTS = (
    "What is a good way to learn the names of the stars?",
    "My sister is sad because her cat died. What can I say to her?",
    "Write two sentences about the sea.",
    "How do I boil an egg?",
    "What is 17 plus 25?",
)
PACKAGES = ("grm-hf", "torch", "transformers", "trl", "tokenizers")


# --------------------------------------------------------------------------------------------------------------- units


def plan() -> list[tuple[str, dict]]:
    """Every run of the study, the most informative first: (method, training data)."""
    runs = []
    for train, pairs, flipped, methods, seeds in (
        ("rmb", 600, 0.0, ("none", "sft"), 8),
        ("pandalm", 500, 0.0, ("none", "sft"), 8),
        ("rmb", 600, 0.25, ("none", "sft"), 8),
        ("rmb", 600, 0.0, ("dpo_noref", "linear", "dpo"), 5),
        ("rmb", 600, 0.0, ("dpo_noref",), range(5, 8)),
        ("rmb", 1200, 0.0, ("none", "sft"), 5),
    ):
        for seed in range(seeds) if isinstance(seeds, int) else seeds:
            runs += [(m, {"train": train, "pairs": pairs, "flipped": flipped, "seed": seed}) for m in methods]
    return runs


def objectives_plan() -> list[tuple[str, dict]]:
    """The runs that the page on objectives has beside those of the study."""
    runs = []
    for methods, flipped in ((("none_zero", "sft_zero"), (0.0, 0.25)), (("bnrm",), (0.0,))):
        for share in flipped:
            for seed in range(5):
                runs += [(m, {"train": "rmb", "pairs": 600, "flipped": share, "seed": seed}) for m in methods]
    return runs


def common(origin: str, method: str = "") -> dict:
    """The settings that all units of a method share; they are part of the settings that name a file."""
    objective = {"objective": OBJECTIVES[method]} if method in OBJECTIVES else {}
    return {**objective, "base": origin, "precision": precision(), "recipe": RECIPE, "short": SHORT}


def selection_units(method: str, origin: str, rates: tuple[float, ...] = RATES) -> list[dict]:
    return [
        {"kind": "select", "method": method, "learning_rate": rate, **SELECTION, **common(origin, method)}
        for rate in rates
    ]


def run_unit(method: str, data: dict, rate: float, origin: str) -> dict:
    return {"kind": "run", "method": method, "learning_rate": rate, **data, "tests": TESTS, **common(origin, method)}


def gold_unit(rate: float, origin: str) -> dict:
    return {
        "kind": "gold", "method": "none", "learning_rate": rate, "seed": 0, "files": GOLD, "tests": TESTS,
        **common(origin),
    }  # fmt: skip


def base_unit(origin: str) -> dict:
    """The base before any training: its answers, and how likely it finds the fixed texts."""
    return {"kind": "base", **common(origin)}


def digest(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def file_of(settings: dict, results: Path) -> Path:
    return results / f"{digest(settings)}.json"


def candidate_rates(losses: dict[float, float]) -> tuple[float, ...]:
    """The rates that a method needs, given the log losses on held-out pairs that are known."""
    at_the_end = set(RATES) <= set(losses) and min(RATES, key=losses.__getitem__) == RATES[-1]
    return (*RATES, HIGHER) if at_the_end else RATES


def best_rate(losses: dict[float, float]) -> float | None:
    """The rate with the lowest log loss on held-out pairs, or `None` while one is missing."""
    rates = candidate_rates(losses)
    return min(rates, key=losses.__getitem__) if set(rates) <= set(losses) else None


def selection_losses(method: str, origin: str, results: Path) -> dict[float, float]:
    paths = {
        settings["learning_rate"]: file_of(settings, results)
        for settings in selection_units(RATE_OF.get(method, method), origin, (*RATES, HIGHER))
    }
    return {
        rate: json.loads(path.read_text())["held_out"]["log_loss"] for rate, path in paths.items() if path.is_file()
    }


def chosen_rate(method: str, origin: str, results: Path) -> float | None:
    return best_rate(selection_losses(method, origin, results))


def units(origin: str, results: Path) -> list[dict]:
    """Settings of every unit that can be named today, in order: a method's runs appear once its rate is chosen."""
    named: list[dict] = [base_unit(origin)]
    for runs in (plan(), objectives_plan()):
        for method, data in runs:
            if method not in RATE_OF and method not in {unit.get("method") for unit in named}:
                named += selection_units(method, origin, candidate_rates(selection_losses(method, origin, results)))
            rate = chosen_rate(method, origin, results)
            if rate is not None:
                named.append(run_unit(method, data, rate, origin))
        rate = chosen_rate("none", origin, results)
        if rate is not None and runs == plan():
            named.append(gold_unit(rate, origin))
    return named


# ---------------------------------------------------------------------------------------------------------------- data


def first_user_turn(row: dict) -> str:
    return next(message["content"] for message in row["prompt"] if message["role"] == "user")


def is_short(row: dict, longest: int = SHORT) -> bool:
    prompt = sum(len(message["content"]) for message in row["prompt"])
    return all(prompt + len(row[side][0]["content"]) <= longest for side in ("chosen", "rejected"))


@cache
def short_rows(name: str, longest: int = SHORT) -> list[dict]:
    """The short rows of a file, prompt by prompt; a hash orders the prompts."""
    path = DATA / f"{name}.parquet"
    if not path.is_file():
        sys.exit(f"{path} is missing. Set GRM_DATA to the folder with the preference pairs.")
    rows = load_dataset("parquet", data_files=str(path), split="train").to_list()
    rows = [row for row in rows if is_short(row, longest)]
    return sorted(rows, key=lambda row: (hashlib.sha256(first_user_turn(row).encode()).hexdigest(), row["id"]))


def split(train: str) -> tuple[list[dict], list[dict]]:
    """Pairs to train on, and those held out: whole prompts until there are enough."""
    name, held = TRAIN[train]
    rows = short_rows(name)
    turns = {first_user_turn(row) for row in rows[:held]}
    return [r for r in rows if first_user_turn(r) not in turns], [r for r in rows if first_user_turn(r) in turns]


def training_rows(train: str, pairs: int, flipped: float, seed: int) -> list[dict]:
    """The pairs of one run, in order; the same for every method. `flipped` of them have their labels exchanged."""
    rows = split(train)[0]
    if len(rows) < pairs:
        raise ValueError(f"{train}: {len(rows)} pairs to train on, {pairs} wanted.")
    draw = random.Random(seed)
    rows = draw.sample(rows, pairs)
    turned = set(draw.sample(range(pairs), round(flipped * pairs)))
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["rejected" if i in turned else "chosen"],
            "rejected": row["chosen" if i in turned else "rejected"],
        }
        for i, row in enumerate(rows)
    ]


def gold_rows() -> list[dict]:
    """The pairs of `GOLD`, in order. None has a prompt of a test set, or of the pairs that proxies learn from."""
    known = [*short_rows("rmb_pairwise_train"), *(row for test in TESTS for row in test_rows(test))]
    turns = {first_user_turn(row) for row in known}
    rows = [row for file, longest in GOLD.items() for row in short_rows(file, longest)]
    rows = [row for row in rows if first_user_turn(row) not in turns]
    random.Random(0).shuffle(rows)
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


@cache
def test_rows(test: str) -> list[dict]:
    """The rows of a test set. None of its prompts is in a training set."""
    name, count = TESTS[test]
    rows = split("pandalm")[1] if test == "pandalm" else short_rows(name)
    trained = {first_user_turn(row) for train in TRAIN for row in split(train)[0]}
    rows = [row for row in rows if first_user_turn(row) not in trained]
    if test == "rm_bench":  # item by item: an item's rows share texts (at most six), and few texts give many rows
        domains = ("chat", "safety-refuse", "safety-response")
        return [row for d in domains for row in [row for row in rows if row["subset"] == d][:count]]
    return rows[:count]


def about_tests() -> dict:
    """The facts about each row of each test set that the page needs, without its text: the prompt, as a number;
    characters of the two responses; for RM-Bench the domain and the styles of the two (0 concise, 1 detailed, 2
    Markdown)."""
    about = {}
    for test in TESTS:
        rows = test_rows(test)
        numbers = {turn: i for i, turn in enumerate(dict.fromkeys(map(first_user_turn, rows)))}
        about[test] = {
            "prompts": [numbers[first_user_turn(row)] for row in rows],
            **{side: [len(row[side][0]["content"]) for row in rows] for side in ("chosen", "rejected")},
        }
        if test == "rm_bench":
            meta = [json.loads(row["meta"]) for row in rows]
            about[test] |= {
                "domains": [row["subset"] for row in rows],
                "styles": [f"{m['chosen_style']}{m['rejected_style']}" for m in meta],
            }
    return about


# ----------------------------------------------------------------------------------------------------------------- run


def precision() -> str:
    """bfloat16 autocast where the processor (or GPU) multiplies it, else float32."""
    fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "float32"


def autocast():
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(kind, torch.bfloat16) if precision() == "bf16" else nullcontext()


def trained(settings: dict, folder: Path, work: str) -> GRMRewardTrainer:
    if settings["kind"] == "gold":
        rows = gold_rows()
    else:
        rows = training_rows(*(settings[name] for name in ("train", "pairs", "flipped", "seed")))
    method = {**(METHODS | OBJECTIVES)[settings["method"]]}
    head = method.pop("head_type")
    trainer = GRMRewardTrainer(
        model=str(folder),
        args=GRMRewardConfig(
            work,
            **method,
            model_init_kwargs={"head_type": head},
            learning_rate=settings["learning_rate"],
            seed=settings["seed"],
            bf16=settings["precision"] == "bf16",
            use_cpu=not torch.cuda.is_available(),
            **{CHECKPOINTING: False},
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            logging_steps=5,
            **settings["recipe"],
        ),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    return trainer


def scored(trainer: GRMRewardTrainer, rows: list[dict]) -> dict:
    """Rewards of both responses of every row; each text is computed once, under the autocast of training."""
    scorer = GRMScorer(trainer.model, trainer.processing_class, max_tokens_per_batch=2048, layout="shared_prefix")
    with autocast():
        pairs = scorer.score_pairs([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])
    chosen, rejected = zip(*pairs, strict=True)
    margins = pair_margins(chosen, rejected)
    lengths = ([len(row[side][0]["content"]) for row in rows] for side in ("chosen", "rejected"))
    return {
        "pairs": len(rows),
        "accuracy": round(accuracy(margins), 4),
        "log_loss": round(log_loss(margins), 4),
        "length": round(length_bias(chosen, rejected, *lengths)["length_pearson_within"], 4),
        "chosen": [round(reward, 4) for reward in chosen],
        "rejected": [round(reward, 4) for reward in rejected],
    }


def perplexity(lm, tokenizer, rows: list[dict]) -> float:
    """exp of the mean negative log-likelihood, in nats, of a token of the chosen responses."""
    sums, tokens = zip(*log_likelihoods(lm, tokenizer, rows, "chosen"), strict=True)
    return math.exp(-sum(sums) / sum(tokens))


@torch.no_grad()
def log_likelihoods(lm, tokenizer, rows: list[dict], side: str, batch_size: int = 8) -> list[tuple[float, int]]:
    """Of each row's response the log-probability under `lm`, in nats, and its number of tokens. Equal texts are
    computed once."""
    encoder = Encoder(tokenizer, RECIPE["max_length"])
    encoded = [encoder.encode(row["prompt"], row[side]) for row in rows]
    distinct = {(tuple(text.ids), text.start): text for text in encoded}
    texts = list(distinct.values())
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
    found: list[tuple[float, int]] = [(0.0, 0)] * len(texts)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = [texts[i] for i in numbers]
        width = len(batch[-1].ids)
        ids = torch.tensor([text.ids + [0] * (width - len(text.ids)) for text in batch], device=lm.device)
        position = torch.arange(width, device=lm.device)
        real = position < torch.tensor([len(text.ids) for text in batch], device=lm.device)[:, None]
        response = real & (position >= torch.tensor([text.start for text in batch], device=lm.device)[:, None])
        with autocast():
            logits = lm(input_ids=ids, attention_mask=real.long()).logits[:, :-1].float()  # (B, width - 1, V)
        targets = ids.masked_fill(~response, -100)[:, 1:]
        losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)
        for i, loss, count in zip(numbers, losses.tolist(), (targets != -100).sum(1).tolist(), strict=True):
            found[i] = (-loss, count)
    places = {key: i for i, key in enumerate(distinct)}
    return [found[places[tuple(text.ids), text.start]] for text in encoded]


@torch.no_grad()
def written(lm, tokenizer) -> list[str]:
    """The greedy answer of the LM head to each of `PROMPTS`, at most 40 tokens."""
    answers = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(lm.device)
        with autocast():
            ids = lm.generate(**inputs, max_new_tokens=40, do_sample=False)
        answers.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def do(settings: dict, folder: Path) -> dict:
    """One unit."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    result: dict = {"settings": settings}
    if settings["kind"] == "base":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        with tempfile.TemporaryDirectory() as work:
            trainer = trained(settings, folder, work)
        lm, tokenizer = trainer.model.eval().lm, trainer.processing_class
        result["pairs"] = trainer.data_counts["train"].rows
        result["training_seconds"] = round(time.process_time())
        result["loss"] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    if settings["kind"] == "select":
        result["held_out"] = scored(trainer, split(settings["train"])[1])
    else:
        result["perplexity"] = round(perplexity(lm, tokenizer, test_rows("hhh")), 3)
        result["written"] = written(lm, tokenizer)
    if settings["kind"] in ("run", "gold"):
        result["tests"] = {test: scored(trainer, test_rows(test)) for test in TESTS}
    result["processor_seconds"] = round(time.process_time())
    result["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result["versions"] = {name: version(name) for name in PACKAGES}
    return result


def write(path: Path, result: dict) -> None:
    """The whole file or none."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(result, separators=(",", ":"), ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)


# ---------------------------------------------------------------------------------------------------------------- main


def describe(settings: dict) -> str:
    names = ("kind", "train", "pairs", "flipped", "method", "learning_rate", "seed")
    return " ".join(str(settings[name]) for name in names if name in settings)


def show(origin: str, results: Path) -> None:
    named = units(origin, results)
    for settings in named:
        path = file_of(settings, results)
        print("done" if path.is_file() else "left", path.name, describe(settings))
    planned = [method for method, _ in [*plan(), *objectives_plan()]]
    waiting = sum(chosen_rate(method, origin, results) is None for method in planned)
    done = sum(file_of(settings, results).is_file() for settings in named)
    print(f"{done} done, {len(named) - done + waiting} left, {waiting} of them behind the choice of a learning rate")


def work(origin: str, folder: Path, results: Path, workers: int) -> None:
    """Keep `workers` processes busy until nothing is left."""
    running: dict[str, subprocess.Popen] = {}
    failed: set[str] = set()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    while True:
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                print(f"{time.strftime('%H:%M:%S')} {name} ended with {process.returncode}", flush=True)
                if process.returncode != 0:
                    failed.add(name)
        left = [
            settings
            for settings in units(origin, results)
            if not file_of(settings, results).is_file() and digest(settings) not in {*running, *failed}
        ]
        if not left and not running:
            break
        for settings in left[: workers - len(running)]:
            print(f"{time.strftime('%H:%M:%S')} {digest(settings)} {describe(settings)}", flush=True)
            command = [sys.executable, __file__, "--results", str(results), "--folder", str(folder), "--unit"]
            running[digest(settings)] = subprocess.Popen([*command, json.dumps(settings)], env=environment)
        time.sleep(5)
    if failed:
        sys.exit(f"failed: {sorted(failed)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="The study on a real base: every unit that has no file yet.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="what there is and what is left")
    parser.add_argument("--folder", type=Path, help="of the base (default: of the package, everywhere the same)")
    parser.add_argument("--unit", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    results = args.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    folder = args.folder or base.folder("package")
    if args.unit is not None:
        os.setpriority(os.PRIO_PROCESS, 0, 10)
        write(file_of(args.unit, results), do(args.unit, folder))
    elif args.list:
        show(base.origin(folder), results)
    else:
        with open(results / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                sys.exit(f"Another process works in {results}.")
            write(results / "tests.json", about_tests())
            work(base.origin(folder), folder, results, args.workers)


if __name__ == "__main__":
    main()
