"""The demo: the Bradley-Terry baseline and GRM, trained alike on the same pairs of the demo world, over several seeds.

    grm demo [--output runs/demo] [--seeds 5] [--quick]

Writes `results.json` (every number of every run), `report.md` (the tables it prints), `learning_curve.png` and
`model/`, one trained reward model with its card, which is then loaded and scores in a process that cannot import
grm_hf.
"""

import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM

from ..devices import quiet
from ..lab.base_model import build_model, build_tokenizer, perplexity, pretrain, tokenize_documents
from ..lab.world import World


BASELINE = "Bradley-Terry"
SAVED = "GRM sft, alpha 0.01"  # the paper's preset; fixed beforehand, not chosen by its result
METHODS: dict[str, dict] = {
    BASELINE: {"regularizer": "none"},
    SAVED: {"regularizer": "sft", "alpha": 0.01},
    # The text losses sum over tokens. Answers here are more than ten times shorter than those the paper's alpha was
    # chosen for, so ten times its weight is closer to what it meant there.
    "GRM sft, alpha 0.1": {"regularizer": "sft", "alpha": 0.1},
    "GRM dpo_noref, alpha 0.1": {"regularizer": "dpo_noref", "alpha": 0.1},
}
NAME = "grm-demo-world"  # of the saved model, on its card
WORLD_SEED = 0
DOMAINS = {"id": "in-distribution", "ood": "out-of-distribution"}
NO_DIFFERENCE = "no difference shown"
TEST_SEED = 10_000  # of test pairs and held-out documents; training seeds count from 0


@dataclass(frozen=True)
class Size:
    pretrain_steps: int = 700
    train_pairs: int = 2000
    test_pairs: int = 500
    epochs: int = 2
    batch_size: int = 16
    learning_rate: float = 1e-3
    evaluations: int = 5

    @property
    def steps(self) -> int:
        return self.epochs * math.ceil(self.train_pairs / self.batch_size)


QUICK = Size(pretrain_steps=100, train_pairs=160, test_pairs=100, epochs=1, evaluations=2)

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


def run(output_dir: str | Path = "runs/demo", seeds: int = 5, quick: bool = False) -> dict:
    """
    Trains every method of `METHODS` with every seed and compares each with the baseline, seed by seed.

    A seed draws the training pairs and their labels, the reward head and the order of batches; base model and test
    pairs are the same for all. Runs have one thread each, so that no number depends on the number of cores, and take
    place in other processes, up to four at a time: a script that calls this needs `if __name__ == "__main__":`.

    Args:
        output_dir (`str` or `Path`, *optional*, defaults to `"runs/demo"`):
            Folder for the results; files of an earlier run in it are replaced.
        seeds (`int`, *optional*, defaults to `5`):
            Number of seeds, at least 2 (one has no spread).
        quick (`bool`, *optional*, defaults to `False`):
            A short run that shows the machinery works and nothing else.

    Returns:
        `dict`: what `results.json` holds.

    Raises:
        `ImportError`: matplotlib or the training extra is missing (before anything is trained).
        `ValueError`: fewer than 2 seeds.
    """
    started = time.perf_counter()
    if seeds < 2:
        raise ValueError(f"seeds is {seeds}; intervals over seeds need at least 2.")
    try:
        import matplotlib  # noqa: F401

        from ..training import GRMRewardTrainer  # noqa: F401
    except ImportError as error:
        raise ImportError(f"The demo needs its extra: pip install 'grm-hf[demo]' ({error}).") from error
    size = QUICK if quick else Size()
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        _pretrain(folder, size)
        jobs = [(method, seed, folder, size, output / "model") for seed in range(seeds) for method in METHODS]
        workers = min(4, os.cpu_count() or 1, len(jobs))
        spawn = multiprocessing.get_context("spawn")  # a fork of a process that has used threads may hang
        with ProcessPoolExecutor(workers, mp_context=spawn, initializer=quiet) as pool:
            futures = [pool.submit(train_one, *job) for job in jobs]
            try:
                for future in tqdm(as_completed(futures), "training", total=len(jobs), unit="run"):
                    future.result()  # raises here what a run raised
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        runs = [future.result() for future in futures]
        world, tokenizer = World(WORLD_SEED), build_tokenizer(World(WORLD_SEED))
        before = _perplexities(LlamaForCausalLM.from_pretrained(folder), tokenizer, world, size)

    results = {
        "size": asdict(size),
        "quick": quick,
        "seeds": seeds,
        "perplexity_before": before,
        "comparison": _compare(runs),
        "reloaded": _reload(output / "model", world),
        "runs": runs,
        "workers": workers,
        "seconds": round(time.perf_counter() - started, 1),
    }
    report = _report(results, output)
    (output / "model" / "README.md").write_text(model_card(results), encoding="utf-8")
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (output / "report.md").write_text(report, encoding="utf-8")
    _plot(runs, output / "learning_curve.png")
    print(report)
    return results


def _pretrain(folder: str, size: Size) -> None:
    """The base and its tokenizer, into a folder."""
    world = World(WORLD_SEED)
    tokenizer = build_tokenizer(world)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tqdm(total=size.pretrain_steps, unit="step", desc="pretraining") as progress:
        base = pretrain(build_model(tokenizer), tokenizer, world, size.pretrain_steps, on_step=progress.update)
    torch.set_num_threads(threads)
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_one(method: str, seed: int, base: str, size: Size, save_to: Path) -> dict:
    """Trains one reward model on the base in a folder and measures it; saves it to `save_to` if it is the one to keep.

    Returns:
        `dict`: final accuracy and perplexity by domain, accuracy over steps, seconds of training.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, set_seed

    from ..modeling_grm import GRMForSequenceClassification
    from ..training import GRMRewardConfig, GRMRewardTrainer
    from ..training.run_card import facts_of_run

    assert size.steps % size.evaluations == 0, (size.steps, size.evaluations)  # the last evaluation is the result
    world = World(WORLD_SEED)
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_seed(seed)  # the head is drawn next, the same for every method
    model = GRMForSequenceClassification.from_base(base)
    with tempfile.TemporaryDirectory() as folder:
        args = GRMRewardConfig(
            folder,
            **METHODS[method],
            seed=seed,
            num_train_epochs=size.epochs,
            per_device_train_batch_size=size.batch_size,
            per_device_eval_batch_size=128,
            learning_rate=size.learning_rate,
            warmup_steps=size.steps // 10,
            max_length=model.config.max_position_embeddings,
            eval_strategy="steps",
            eval_steps=size.steps // size.evaluations,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        trainer = GRMRewardTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(world.pairs("id", size.train_pairs, seed, noisy=True)),
            eval_dataset={
                domain: Dataset.from_list(world.pairs(domain, size.test_pairs, TEST_SEED, noisy=False))
                for domain in DOMAINS
            },
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    history = trainer.state.log_history
    curve = {
        domain: [[entry["step"], entry[key]] for entry in history if key in entry]
        for domain, key in ((domain, f"eval_{domain}_accuracy") for domain in DOMAINS)
    }
    result = {
        "method": method,
        "seed": seed,
        "accuracy": {domain: points[-1][1] for domain, points in curve.items()},
        "perplexity": _perplexities(model.lm, tokenizer, world, size),
        "curve": curve,
        "seconds": round(history[-1]["train_runtime"], 1),
    }
    if method == SAVED and seed == 0:
        trainer.save_model(str(save_to))
        facts = facts_of_run(trainer, NAME, example=_example(world))
        result["card"] = json.loads(json.dumps(facts))  # as the results file gives it back
    return result


def _perplexities(lm, tokenizer, world: World, size: Size) -> dict[str, float]:
    """Perplexity on held-out documents of each domain."""
    return {
        domain: perplexity(lm, tokenize_documents(tokenizer, world.documents(domain, size.test_pairs, TEST_SEED)))
        for domain in DOMAINS
    }


def _example(world: World) -> tuple[str, list[str]]:
    """A question, a good answer and a bad one."""
    question = world.questions("ood")[0]
    entity, relation = world.asked(question)
    right = world.facts[entity, relation.name]
    wrong = next(value for value in relation.values if value != right)
    statement = relation.statements[0]
    return question, [
        f"happy to help. {statement.format(s=f'the {entity}', v=right)}",
        f"what a silly question. {statement.format(s=f'the {entity}', v=wrong)}",
    ]


def _reload(folder: Path, world: World) -> list[dict]:
    """Scores a good and a bad answer from the saved folder, here and in a process that cannot import grm_hf."""
    from ..scoring import GRMScorer

    question, answers = _example(world)
    chats = [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for answer in answers]
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
    assert all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) for a, b in zip(here, there, strict=True)), (here, there)
    return [
        {"question": question, "answer": answer, "gold": world.gold(question, answer), "here": a, "clean_process": b}
        for answer, a, b in zip(answers, here, there, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------- results


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval by Student's t over at least 2 independent values."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, _t_quantile(n - 1) * math.sqrt(variance / n)


def _t_quantile(df: int) -> float:
    """0.975 quantile of Student's t, where the integral of its density from 0 reaches 0.475."""
    t = torch.linspace(0, 13, 130_001, dtype=torch.float64)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    area = torch.cumulative_trapezoid(scale * (1 + t**2 / df) ** (-(df + 1) / 2), t)
    return float(t[1 + int(torch.searchsorted(area, 0.475))])


def _compare(runs: list[dict]) -> dict:
    """For each quantity, domain and method: mean, half width, and the paired difference from the baseline."""
    comparison: dict = {}
    for quantity, sign in (("accuracy", 1), ("perplexity", -1)):  # which direction is better
        for domain in DOMAINS:
            by_method = {m: [r[quantity][domain] for r in runs if r["method"] == m] for m in METHODS}
            for method, values in by_method.items():
                mean, half = interval(values)
                entry: dict[str, float | str] = {"mean": mean, "half_width": half}
                if method != BASELINE:
                    paired = [a - b for a, b in zip(values, by_method[BASELINE], strict=True)]
                    difference, half = interval(paired)
                    entry |= {"difference": difference, "difference_half_width": half}
                    # Equal differences in all seeds (a few seeds, a small test set) leave no interval to judge by.
                    shown = abs(difference) > half > 0
                    entry["verdict"] = ("better" if difference * sign > 0 else "worse") if shown else NO_DIFFERENCE
                comparison.setdefault(quantity, {}).setdefault(domain, {})[method] = entry
    return comparison


def _table(results: dict, quantity: str, digits: int, scale: float) -> list[str]:
    lines = ["| split | method | mean | difference from baseline | verdict |", "|---|---|---|---|---|"]
    for domain, name in DOMAINS.items():
        if quantity == "perplexity":
            lines.append(f"| {name} | base, before | {results['perplexity_before'][domain]:.{digits}f} | | |")
        for method, e in results["comparison"][quantity][domain].items():
            mean = f"{scale * e['mean']:.{digits}f} ± {scale * e['half_width']:.{digits}f}"
            difference = (
                f"{scale * e['difference']:+.{digits}f} ± {scale * e['difference_half_width']:.{digits}f}"
                if "verdict" in e
                else ""
            )
            lines.append(f"| {name} | {method} | {mean} | {difference} | {e.get('verdict', 'baseline')} |")
    return lines


def comparison_tables(results: dict, level: str = "##") -> list[str]:
    """What was compared, as Markdown under headings of this level."""
    size = results["size"]
    return [
        f"{results['seeds']} seeds, {size['train_pairs']} training pairs with noisy labels, {size['test_pairs']} test "
        "pairs per split ordered by gold reward.",
        "Means with 95 % intervals over seeds; differences are paired by seed. One world, one base model, one test "
        "set: the intervals say nothing about others. No correction for the number of comparisons.",
        *["", "**A quick run: it shows that everything works, not which method is better.**"] * results["quick"],
        "",
        f"{level} Accuracy (%)",
        "",
        *_table(results, "accuracy", 1, 100),
        "",
        f"{level} Perplexity of the language-model head on held-out text (lower is better)",
        "",
        *_table(results, "perplexity", 2, 1),
        "",
    ]


def model_card(results: dict) -> str:
    """The card of the saved model, from what `results.json` holds."""
    from ..hub.card import write_card

    (facts,) = (run["card"] for run in results["runs"] if "card" in run)
    lines = [
        "",
        "## The demo world",
        "",
        "This model has read about a small made-up world and knows no words of any other. It is what `grm demo` "
        f"trains with the method {SAVED}, seed 0, and is good for trying out tools. In-distribution (`id`) pairs "
        "speak of topics it was trained on, out-of-distribution (`ood`) pairs of others. Beside the demo's other "
        "methods:",
        "",
        *comparison_tables(results, "###"),
    ]
    return write_card(*facts) + "\n".join(lines)


def _report(results: dict, output: Path) -> str:
    lines = [
        "# Demo results",
        "",
        *comparison_tables(results),
        f"## {SAVED}, seed 0, from `{output / 'model'}` in a process without grm_hf",
        "",
        "| question | answer | gold | reward here | reward there |",
        "|---|---|---|---|---|",
        *(
            f"| {r['question']} | {r['answer']} | {r['gold']:.2f} | {r['here']:.6f} | {r['clean_process']:.6f} |"
            for r in results["reloaded"]
        ),
        "",
        f"Every number: `{output / 'results.json'}`. Plot: `{output / 'learning_curve.png'}`. "
        f"Time: {results['seconds']:.0f} s, {results['workers']} runs at a time.",
        "",
    ]
    return "\n".join(lines)


def _plot(runs: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (domain, name) in zip(figure.subplots(1, 2, sharey=True), DOMAINS.items(), strict=True):
        for method in METHODS:
            curves = [run["curve"][domain] for run in runs if run["method"] == method]
            steps = [step for step, _ in curves[0]]
            points = [interval([curve[i][1] for curve in curves]) for i in range(len(steps))]
            mean = [m for m, _ in points]
            axes.plot(steps, mean, marker="o", markersize=3, label=method)
            axes.fill_between(steps, [m - h for m, h in points], [m + h for m, h in points], alpha=0.15)
        axes.set(title=name, xlabel="training step")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("pairwise accuracy (95 % interval over seeds)")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)
