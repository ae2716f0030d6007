"""The demo trains a Bradley-Terry reward model and GRM from one start on the same real pairs, and compares what they
learned and what they still say.

    grm demo [--output runs/demo] [--pairs 160]

Writes `results.json` (every number), `report.md` (what it prints), `learning_curve.png` and `model/`: the GRM with its
card. This model is then loaded in a process that cannot import grm_hf, and scores two answers there.
"""

import json
import math
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from .. import base
from ..devices import quiet
from ..metrics import accuracy, bootstrap_interval, log_loss, pair_margins, pair_wins
from .language import answers, perplexity


METHODS: dict[str, dict] = {
    "Bradley-Terry": {"regularizer": "none"},
    "GRM": {"regularizer": "sft", "alpha": 0.01},  # the paper's preset; fixed beforehand, not chosen by its result
}
SAVED = "GRM"
NAME = "grm-demo"  # of the saved model, on its card
TESTS = {"held-out pairs": "pandalm", "HHH": "hhh"}
PROMPTS = [
    "What is a good way to learn the names of the stars?",
    "My sister is sad because her cat died. What can I say to her?",
    "Write two sentences about the sea.",
    "How do I boil an egg?",
    "Name three animals that can fly.",
]
EXAMPLE = (
    "How do I keep bread fresh?",
    [
        "Keep it in a paper bag or a bread box at room temperature, and freeze what you will not eat in two days.",
        "Bread bread bread. I do not care about your bread.",
    ],
)
GIGABYTES = 6  # memory of one run at its peak, rounded up

CLEAN_PROCESS = """
import sys
sys.modules["grm_hf"] = None
import json
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, chats = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
inputs = [tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True) for chat in chats]
print(json.dumps([model(**row).logits.item() for row in inputs]))
"""


def run(
    output_dir: str | Path = "runs/demo", pairs: int = 160, tests: int = 100, folder: str | Path | None = None
) -> dict:
    """
    Trains both methods and compares them. Each run has one thread; two run at a time if processors and memory allow
    it. They are processes of their own: a script that calls this needs `if __name__ == "__main__":`.

    Args:
        output_dir (`str` or `Path`, *optional*, defaults to `"runs/demo"`):
            Folder for the results; files of an earlier run in it are replaced.
        pairs (`int`, *optional*, defaults to `160`):
            Pairs to train on.
        tests (`int`, *optional*, defaults to `100`):
            Largest number of pairs of each test set.
        folder (`str` or `Path`, *optional*):
            A base to use instead of [`grm_hf.base.folder`].

    Returns:
        `dict`: the content of `results.json`.

    Raises:
        `ImportError`: the training extra, matplotlib or gguf is missing (before anything is trained).
        `OSError`: the base is not at hand.
    """
    started = time.perf_counter()
    try:
        import matplotlib  # noqa: F401

        from ..training import GRMRewardTrainer  # noqa: F401
    except ImportError as error:
        raise ImportError(f"The demo needs its extra: pip install 'grm-hf[demo]' ({error}).") from error
    origin = str(folder) if folder else None
    folder = Path(folder or base.folder())
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    memory = psutil.virtual_memory().available / 1e9
    workers = at_a_time(memory)
    about = {
        "base": origin or base.origin(folder),
        "precision": "bf16" if _fast_bf16() else "float32",
        "pairs": pairs,
        "workers": workers,
    }
    print(
        f"base: {about['base']}\n{pairs} pairs, each trained on once by {' and by '.join(METHODS)}, in "
        f"{about['precision']}, {workers} at a time ({memory:.0f} GB of memory are free)"
    )

    spawn = multiprocessing.get_context("spawn")  # a fork of a process that has used threads may hang
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=quiet) as pool:
        futures: list[Future] = [
            pool.submit(train_one, method, str(folder), output, pairs, tests, workers) for method in METHODS
        ]
        futures.append(pool.submit(measure_base, str(folder), tests))
        try:
            *runs, before = [future.result() for future in futures]  # raises here what a run raised
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

    results = {
        **about,
        "before": before,
        "runs": dict(zip(METHODS, runs, strict=True)),
        "comparison": compare(dict(zip(METHODS, runs, strict=True)), tests),
        "reloaded": _reload(output / "model"),
        "seconds": round(time.perf_counter() - started, 1),
    }
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _plot(results, output / "learning_curve.png")
    text = report(results, output)
    (output / "report.md").write_text(text, encoding="utf-8")
    print(text)
    return results


def at_a_time(memory: float) -> int:
    """How many runs go on together with so many GB of free memory, on this machine's processors; at least one."""
    return max(1, min(len(METHODS), os.cpu_count() or 1, int(memory / GIGABYTES)))


def _fast_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _autocast():
    return torch.autocast("cpu", torch.bfloat16, enabled=_fast_bf16())


def _test_pairs(source: str, tests: int):
    rows = base.load_pairs("test", (source,)).shuffle(seed=0)
    return rows.select(range(min(tests, len(rows))))


class _Forecast(TrainerCallback):
    """Says how long the demo will take, from the first steps of a run."""

    SKIPPED, MEASURED = 1, 3  # the first step warms up

    def __init__(self, method: str, test_tokens: float, workers: int):
        self.method, self.test_tokens, self.workers = method, test_tokens, workers

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.SKIPPED:
            self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.SKIPPED + self.MEASURED and self.method == next(iter(METHODS)):
            step = (time.perf_counter() - self.started) / self.MEASURED
            # A test pair takes a third of a training pair: there is no backward pass.
            steps = state.max_steps + self.test_tokens / (3 * args.per_device_train_batch_size)
            minutes = (step * steps * -(-len(METHODS) // self.workers) + 60) / 60
            print(f"this machine takes {step:.1f} s a step: about {minutes:.0f} minutes in all", flush=True)


def train_one(method: str, folder: str, output: Path, pairs: int, tests: int, workers: int) -> dict:
    """Trains one reward model and measures it; saves it to `output / "model"` if it is the one to keep."""
    from ..modeling_grm import GRMForSequenceClassification
    from ..training import CHECKPOINTING, GRMRewardConfig, GRMRewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)  # the head is drawn next, the same for every method
    model = GRMForSequenceClassification.from_base(folder, dtype=torch.float32)
    train = base.load_pairs("train", ("pandalm",)).shuffle(seed=0)
    train = train.select(range(min(pairs, len(train))))
    held_out = {source: _test_pairs(source, tests) for source in TESTS.values()}
    with tempfile.TemporaryDirectory() as work:
        off: dict[str, Any] = {CHECKPOINTING: False}
        args = GRMRewardConfig(
            work,
            **METHODS[method],
            seed=0,
            num_train_epochs=1,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            learning_rate=3e-5,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            max_length=512,
            layout="shared_prefix",
            max_tokens_per_batch=1024,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=_fast_bf16(),
            **off,
        )
        trainer = GRMRewardTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=[_Forecast(method, sum(map(len, held_out.values())), workers)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model.config.dtype = torch.bfloat16  # as the base is stored, so the saved model is the measured one
        for parameter in model.lm.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        trainer.evaluate()
        if method == SAVED:
            trainer.create_model_card(NAME)
            trainer.save_model(str(output / "model"))
            (output / "model" / "README.md").write_bytes((Path(work) / "README.md").read_bytes())
    history = trainer.state.log_history
    rewards = {source: trainer.eval_pairs[f"eval_{source}", trainer.state.global_step] for source in held_out}
    model.eval()
    with _autocast():
        result = {
            "curve": [[log["step"], log["pair_loss"], log["accuracy"]] for log in history if "pair_loss" in log],
            "rewards": {source: rows[:, :2].round(4).tolist() for source, rows in rewards.items()},
            "perplexity": perplexity(model.lm, tokenizer, held_out["hhh"].to_list()),
            "answers": answers(model.lm, tokenizer, PROMPTS),
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {**result, "seconds": next(log["train_runtime"] for log in history if "train_runtime" in log), "peak": peak}


def measure_base(folder: str, tests: int) -> dict:
    """Perplexity and answers of the base, before any training."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if _fast_bf16() else torch.float32).eval()
    with _autocast():
        return {
            "perplexity": perplexity(lm, tokenizer, _test_pairs("hhh", tests).to_list()),
            "answers": answers(lm, tokenizer, PROMPTS),
        }


def compare(runs: dict[str, dict], tests: int) -> dict:
    """For each test set: pairs, accuracy and log loss of each method, the difference GRM - Bradley-Terry in accuracy,
    all accuracies with 95 % intervals over prompts (bootstrap; the difference is paired), and the accuracy of choosing
    the longer response."""
    comparison = {}
    for name, source in TESTS.items():
        rows = _test_pairs(source, tests)
        prompts = [json.dumps(prompt) for prompt in rows["prompt"]]
        lengths = ([len(message[0]["content"]) for message in rows[side]] for side in ("chosen", "rejected"))
        entry: dict = {"pairs": len(rows), "longer": accuracy(pair_margins(*lengths))}
        wins = {}
        for method, result in runs.items():
            margins = pair_margins(*np.array(result["rewards"][source]).T)
            wins[method] = pair_wins(margins)
            entry[method] = {
                "accuracy": accuracy(margins),
                "interval": list(bootstrap_interval(wins[method], prompts)),
                "log_loss": log_loss(margins),
            }
        baseline, ours = wins.values()
        entry["difference"] = {
            "accuracy": float((ours - baseline).mean()),
            "interval": list(bootstrap_interval(ours - baseline, prompts)),
        }
        comparison[name] = entry
    return comparison


def _reload(folder: Path) -> list[dict]:
    """Scores a good and a bad answer from the saved folder, here and in a process that cannot import grm_hf."""
    from ..scoring import GRMScorer

    question, given = EXAMPLE
    chats = [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for answer in given]
    here = GRMScorer(str(folder)).score(chats)
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", CLEAN_PROCESS, str(folder.resolve()), json.dumps(chats)],
            cwd=cache,
            env={**os.environ, "HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"The model in '{folder}' did not load in a clean process:\n{done.stderr}")
    there = json.loads(done.stdout.splitlines()[-1])
    # bfloat16, and the texts are batched differently
    assert all(math.isclose(a, b, rel_tol=0.05, abs_tol=0.05) for a, b in zip(here, there, strict=True)), (here, there)
    return [
        {"question": question, "answer": answer, "here": a, "clean_process": b}
        for answer, a, b in zip(given, here, there, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------- results


def _percent(entry: dict) -> str:
    low, high = entry["interval"]
    return f"{100 * entry['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def report(results: dict, output: Path) -> str:
    baseline, ours = METHODS
    lines = [
        "# Demo results",
        "",
        f"{results['base']}. {results['pairs']} pairs, one epoch, one seed, {results['precision']}.",
        "",
        "## Accuracy, %",
        "",
        f"| test set | pairs | {baseline} | {ours} | {ours} - {baseline} | the longer response |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in results["comparison"].items():
        low, high = entry["difference"]["interval"]
        verdict = "" if low > 0 or high < 0 else ", no difference shown"
        lines.append(
            f"| {name} | {entry['pairs']} | {_percent(entry[baseline])} | {_percent(entry[ours])} | "
            f"{100 * entry['difference']['accuracy']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}){verdict} | "
            f"{100 * entry['longer']:.1f} |"
        )
    lines += [
        "",
        "Intervals are 95 %, over test prompts; the difference is paired. They say nothing about other seeds: the "
        "study in docs/results.md repeats them.",
        "",
        "## The LM head",
        "",
        f"Perplexity of HHH's chosen answers: base {results['before']['perplexity']:.2f}, "
        + ", ".join(f"{method} {run['perplexity']:.2f}" for method, run in results["runs"].items())
        + ".",
        "",
        "Greedy answers of at most 40 tokens:",
        "",
        f"| prompt | base | {baseline} | {ours} |",
        "|---|---|---|---|",
    ]
    columns = [results["before"]["answers"], *(results["runs"][method]["answers"] for method in METHODS)]
    for prompt, *said in zip(PROMPTS, *columns, strict=True):
        lines.append("| " + " | ".join([prompt, *(_cell(text) for text in said)]) + " |")
    lines += [
        "",
        f"## {SAVED}, from `{output / 'model'}`, in a process without grm_hf",
        "",
        f"{results['reloaded'][0]['question']}",
        "",
        "| answer | reward here | reward there |",
        "|---|---|---|",
        *(f"| {row['answer']} | {row['here']:.3f} | {row['clean_process']:.3f} |" for row in results["reloaded"]),
        "",
        f"Every number: `{output / 'results.json'}`. Plot: `{output / 'learning_curve.png'}`. Time: "
        f"{results['seconds']:.0f} s, {results['workers']} at a time; most memory of a run: "
        f"{max(run['peak'] for run in results['runs'].values()) / 1e9:.1f} GB.",
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _plot(results: dict, path: Path) -> None:
    """Loss and accuracy on training pairs, each before the step that trains on it, averaged over the steps so far."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for method, run in results["runs"].items():
        steps, *columns = np.array(run["curve"]).T
        for panel, values in zip(axes, columns, strict=True):
            width = min(10, len(values))
            smooth = np.convolve(values, np.ones(width) / width, "valid")
            panel.plot(steps[width - 1 :], smooth, label=method)
    for panel, name in zip(axes, ("Bradley-Terry loss", "accuracy"), strict=True):
        panel.set(title=f"{name} on pairs not yet trained on, mean of 10 steps", xlabel="training step (8 pairs)")
        panel.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=150)
