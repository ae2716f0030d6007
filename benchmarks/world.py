"""GRM in the world whose true reward is known (docs/demo_world.md). The Bradley-Terry baseline and three GRMs train on
the same pairs with five seeds. The test pairs are about topics of the training pairs and about other topics.

    python benchmarks/world.py      # 20 minutes on two cores; writes docs/results/world.json
    python benchmarks/results.py    # its page
"""

import json
import math
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version

import torch
from datasets import Dataset
from sections import ROOT
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM, PrinterCallback, set_seed

from grm_hf import GRMForSequenceClassification, GRMRewardConfig, GRMRewardTrainer
from grm_hf.devices import quiet
from grm_hf.lab.base_model import build_model, build_tokenizer, perplexity, pretrain, tokenize_documents
from grm_hf.lab.world import World
from grm_hf.metrics import seed_interval
from grm_hf.training import CHECKPOINTING


RESULTS = ROOT / "docs" / "results" / "world.json"
BASELINE = "Bradley-Terry"
METHODS: dict[str, dict] = {
    BASELINE: {"regularizer": "none"},
    "GRM sft, alpha 0.01": {"regularizer": "sft", "alpha": 0.01},  # the paper's preset
    # The text losses sum over tokens. Answers here are more than ten times shorter than those the paper's alpha was
    # chosen for, so ten times its weight is closer to what it meant there.
    "GRM sft, alpha 0.1": {"regularizer": "sft", "alpha": 0.1},
    "GRM dpo_noref, alpha 0.1": {"regularizer": "dpo_noref", "alpha": 0.1},
}
WORLD_SEED = 0
DOMAINS = {"id": "in-distribution", "ood": "out-of-distribution"}
NO_DIFFERENCE = "no difference shown"
PACKAGES = ("grm-hf", "transformers", "trl", "torch", "datasets", "tokenizers")
TEST_SEED = 10_000  # seed of test pairs and held-out documents; training seeds count from 0


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



def run(size: Size, seeds: int = 5) -> dict:
    """
    Trains every method of `METHODS` with every seed and compares each with the baseline, seed by seed.

    A seed draws the training pairs and their labels, the reward head and the order of batches; base model and test
    pairs are the same for all. Runs have one thread each, so no number depends on the number of cores. They are
    processes of their own, up to four at a time.

    Returns:
        `dict`: the content of `RESULTS`.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        pretrained(folder, size)
        jobs = [(method, seed, folder, size) for seed in range(seeds) for method in METHODS]
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
        before = perplexities(LlamaForCausalLM.from_pretrained(folder), tokenizer, world, size)
    return {
        "size": asdict(size),
        "seeds": seeds,
        "perplexity_before": before,
        "comparison": compare(runs),
        "runs": runs,
        "workers": workers,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }


def pretrained(folder: str, size: Size) -> None:
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


def train_one(method: str, seed: int, base: str, size: Size) -> dict:
    """Trains one reward model on the base in a folder and measures it.

    Returns:
        `dict`: final accuracy and perplexity by domain, accuracy over steps, seconds of training.
    """
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
            **{CHECKPOINTING: False},
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
    return {
        "method": method,
        "seed": seed,
        "accuracy": {domain: points[-1][1] for domain, points in curve.items()},
        "perplexity": perplexities(trainer.model.lm, tokenizer, world, size),
        "curve": curve,
        "seconds": round(history[-1]["train_runtime"], 1),
    }


def perplexities(lm, tokenizer, world: World, size: Size) -> dict[str, float]:
    """Perplexity on held-out documents of each domain."""
    return {
        domain: perplexity(lm, tokenize_documents(tokenizer, world.documents(domain, size.test_pairs, TEST_SEED)))
        for domain in DOMAINS
    }


# ------------------------------------------------------------------------------------------------------------- results


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval by Student's t over the seeds."""
    result = seed_interval(values)
    return result["mean"], (result["high"] - result["low"]) / 2


def compare(runs: list[dict]) -> dict:
    """For each quantity, domain and method: mean, half width, and the paired difference from the baseline."""
    comparison: dict = {}
    for quantity, sign in (("accuracy", 1), ("perplexity", -1)):  # which direction is better
        for domain in DOMAINS:
            by_method = {m: [r[quantity][domain] for r in runs if r["method"] == m] for m in METHODS}
            for method, values in by_method.items():
                mean, half = spread(values)
                entry: dict[str, float | str] = {"mean": mean, "half_width": half}
                if method != BASELINE:
                    paired = [a - b for a, b in zip(values, by_method[BASELINE], strict=True)]
                    difference, half = spread(paired)
                    entry |= {"difference": difference, "difference_half_width": half}
                    # If all seeds have equal differences (few seeds, a small test set), there is no interval to judge
                    # by.
                    shown = abs(difference) > half > 0
                    entry["verdict"] = ("better" if difference * sign > 0 else "worse") if shown else NO_DIFFERENCE
                comparison.setdefault(quantity, {}).setdefault(domain, {})[method] = entry
    return comparison


def table(results: dict, quantity: str, digits: int, scale: float) -> list[str]:
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


def findings(results: dict) -> list[str]:
    """What the run found, in sentences."""
    shown = [
        f"{method} is {100 * abs(e['difference']):.1f} ± {100 * e['difference_half_width']:.1f} points {e['verdict']} "
        f"than {BASELINE} {DOMAINS[domain]}"
        for domain, method, e in against_baseline(results)
        if e["verdict"] != NO_DIFFERENCE
    ]
    before, after = results["perplexity_before"]["id"], results["comparison"]["perplexity"]["id"]
    perplexities = ", ".join(f"{e['mean']:.2f} ± {e['half_width']:.2f} after {method}" for method, e in after.items())
    shown_after = [method for method, e in after.items() if e.get("verdict", NO_DIFFERENCE) != NO_DIFFERENCE]
    return [
        f"{results['seeds']} seeds. Accuracy: {'; '.join([*shown, 'no other difference is shown'])}.",
        f"Perplexity of the LM head {DOMAINS['id']}: {before:.2f} before training, {perplexities}; a difference from "
        f"{BASELINE} is shown for {' and '.join(shown_after) or 'none of them'}.",
    ]


def against_baseline(results: dict) -> list[tuple[str, str, dict]]:
    """Comparisons of accuracy: (domain, method, entry)."""
    return [
        (domain, method, entry)
        for domain in DOMAINS
        for method, entry in results["comparison"]["accuracy"][domain].items()
        if method != BASELINE
    ]


def markdown(results: dict) -> str:
    """docs/results/world.md."""
    size = results["size"]
    lines = [
        "# The world whose true reward is known",
        "",
        "`python benchmarks/world.py` runs the study. `python benchmarks/results.py` writes this page.",
        "",
        f"A small world with a gold reward ([design](../demo_world.md)). {results['versions']}.",
        "",
        f"{results['seeds']} seeds; {size['train_pairs']} training pairs with noisy labels; {size['test_pairs']} test "
        "pairs a split, ordered by gold reward. Values are means with 95 % intervals over seeds; differences are "
        "paired by seed. The intervals hold for this world, base and test set. They are not corrected for the number "
        "of comparisons.",
        "",
        "## Accuracy (%)",
        "",
        *table(results, "accuracy", 1, 100),
        "",
        "## Perplexity of the LM head on held-out text (lower is better)",
        "",
        *table(results, "perplexity", 2, 1),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    RESULTS.write_text(json.dumps(run(Size()), indent=1) + "\n", encoding="utf-8")
