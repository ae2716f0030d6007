"""The cost of GRM on a GPU; the published model's candidate on all pairs and the study's remaining units there. It
needs a GPU and takes at most nine minutes.

    python benchmarks/gpu.py [--minutes 9]   # what has no file yet in docs/results/gpu, then candidate and study
    python benchmarks/gpu.py --report        # the section of docs/benchmarks.md, from what there is
    python benchmarks/gpu.py --toy           # on any processor, at toy size, to see that it works; writes nothing

Training: forward, backward and AdamW at the shape of Llama-3.2-1B in bfloat16, on lengths of hh and ultrafeedback
(real ones with `shared/data`). MFU is the FLOPs of the computed tokens (formula of benchmarks/training.py), divided by
the time and by the GPU's dense bfloat16 peak. Sharing computes fewer tokens for the same pairs, so its gain shows in
pairs a second. Scoring: `GRMScorer` against the transformers pipeline. The candidate and its Bradley-Terry twin:
benchmarks/published_model.py. The study: benchmarks/real_base.py, several at a time.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median

import published_model
import torch
from datasets import Dataset
from real_base import digest, write
from scoring import word_tokenizer
from sections import ROOT, write_section
from training import ALPHA, BETA, ORIGINAL, REAL, TRL, Shape, Sides, Work, batches_of, load, pair, total, work
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, pipeline
from trl import RewardConfig, RewardTrainer

from grm_hf import GRMForSequenceClassification, GRMRewardConfig, GRMRewardTrainer, GRMScorer


RESULTS = ROOT / "docs" / "results" / "gpu"
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}  # dense bfloat16, FLOP/s
PADDED, PACKED, SHARED = (f"sft, {layout}" for layout in ("padded", "packed", "shared_prefix"))
SIDES = (TRL, ORIGINAL, PADDED, PACKED, SHARED)
GOAL = 0.40  # MFU without sharing
CANDIDATE = "broad"  # of the published model: all pairs
TOY = Shape(2, 64, 176, 32, 512)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def language_model(shape: Shape) -> LlamaForCausalLM:
    """Random weights in bfloat16, with heads of 64 channels (16 at toy size): the cost of a token does not depend on
    them."""
    head = 64 if shape.hidden >= 512 else 16
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // head,
        num_key_value_heads=shape.keys // head,
        max_position_embeddings=16_384,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16).to(device())


class GpuSides(Sides):
    """The sides of benchmarks/training.py on this device, in bfloat16, one at a time."""

    def __init__(self, shape: Shape, folder: str):
        self.folder, self.tokenizer, self.shape = folder, word_tokenizer(shape.vocabulary), shape
        self.trainers = {}
        self.grm = GRMForSequenceClassification.from_base(language_model(shape), head_type="linear").train()

    def trainer(self, name: str) -> RewardTrainer:
        common = {"bf16": torch.cuda.is_available(), "gradient_checkpointing": False, "report_to": "none"}
        common["use_cpu"] = not torch.cuda.is_available()
        given = {
            "train_dataset": Dataset.from_list([pair([2] * 9, [3], [4], 16)]), "processing_class": self.tokenizer
        }
        if name == TRL:
            config = LlamaForCausalLM.config_class.from_dict(self.grm.lm.config.to_dict())
            config.num_labels = 1
            with torch.device("meta"):
                classifier = LlamaForSequenceClassification(config)
            classifier.model, classifier.score.weight = self.grm.lm.model, self.grm.score.weight
            classifier.score.weight.data = classifier.score.weight.data.to(torch.bfloat16)
            made = RewardTrainer(classifier, RewardConfig(f"{self.folder}/trl", **common), **given)
        else:
            regularizer, _, layout = name.partition(", ")
            settings = {"regularizer": regularizer, "alpha": ALPHA, "beta": BETA, "layout": layout}
            made = GRMRewardTrainer(self.grm, GRMRewardConfig(f"{self.folder}/{name}", **settings, **common), **given)
            assert made.layout == layout, made.layout
        made.current_gradient_accumulation_steps = 1  # set by `train`
        return made

    def __call__(self, name: str):
        if name == ORIGINAL:
            return self.original
        trainer = self.trainer(name)

        def step(pairs: list[dict]) -> torch.Tensor:
            batch = {
                key: value.to(device()) if isinstance(value, torch.Tensor) else value
                for key, value in trainer.data_collator(pairs).items()
            }
            return trainer.training_step(trainer.model, batch)

        return step


def train(settings: dict) -> dict:
    """Seconds a step (median), its real tokens, FLOPs by the formula, and peak memory, of one side on one data set."""
    shape = Shape(**settings["shape"])
    pairs = load(settings["data"], shape.vocabulary, settings["shrink"])
    batches = batches_of(pairs, settings["pairs"], "random")[: settings["batches"] + settings["warmup"]]
    with tempfile.TemporaryDirectory() as folder:
        sides = GpuSides(shape, folder)
        step = sides(settings["side"])
        optimizer = torch.optim.AdamW(sides.grm.parameters(), lr=1e-6, fused=torch.cuda.is_available())
        seconds = []
        for number, batch in enumerate(batches):
            if number == settings["warmup"] and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            synchronize()
            started = time.perf_counter()
            step(batch)
            optimizer.step()
            optimizer.zero_grad()
            synchronize()
            seconds.append(time.perf_counter() - started)
    measured = batches[settings["warmup"] :]
    return {
        "seconds": seconds[settings["warmup"] :],
        "tokens": sum(len(p["chosen_ids"]) + len(p["rejected_ids"]) for batch in measured for p in batch),
        "work": asdict(total([work(batch, settings["side"]) for batch in measured])),
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def score(settings: dict) -> dict:
    """Seconds for the same conversations by `GRMScorer` and by the pipeline in batches of 8, after a first run."""
    shape = Shape(**settings["shape"])
    pairs = load(settings["data"], shape.vocabulary, settings["shrink"])[: settings["pairs"]]
    grm = GRMForSequenceClassification.from_base(language_model(shape), head_type="linear").eval()
    tokenizer = word_tokenizer(shape.vocabulary)
    texts = [tokenizer.decode(p[f"{side}_ids"]) for p in pairs for side in ("chosen", "rejected")]
    contenders = {
        "GRMScorer": lambda: GRMScorer(grm, tokenizer, max_tokens_per_batch=32_768).score(texts),
        "pipeline": lambda: pipeline("text-classification", grm, tokenizer=tokenizer, device=device())(
            texts, batch_size=8, truncation=True, max_length=1024
        ),
    }
    found = {}
    for name, run in contenders.items():
        seconds = []
        for _ in range(2):
            synchronize()
            started = time.perf_counter()
            run()
            synchronize()
            seconds.append(time.perf_counter() - started)
        found[name] = min(seconds)
    return {"seconds": found, "texts": len(texts), "tokens": sum(len(tokenizer(text).input_ids) for text in texts)}


def units(toy: bool) -> list[dict]:
    common = {"shape": asdict(TOY if toy else REAL["Llama-3.2-1B"]), "shrink": 16 if toy else 1}
    sizes = {"pairs": 2, "batches": 2, "warmup": 1} if toy else {"pairs": 16, "batches": 12, "warmup": 3}
    training = [
        {"kind": "train", "data": data, "side": side, **sizes, **common}
        for data in ("hh", "ultrafeedback")
        for side in SIDES
    ]
    return [*training, {"kind": "score", "data": "ultrafeedback", "pairs": 4 if toy else 256, **common}]


def peak() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for key, flops in PEAK.items() if key in name), None)


def do(settings: dict) -> dict:
    result = {"train": train, "score": score}[settings["kind"]](settings)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"settings": settings, "device": name, "peak_flops": peak(), "torch": torch.__version__, **result}


# -------------------------------------------------------------------------------------------------------------- report


def section(results: list[dict]) -> str:
    lines = [
        "## On a GPU",
        "",
        "`python benchmarks/gpu.py`",
        "",
        f"{results[0]['device']}, torch {results[0]['torch']}. Forward, backward and AdamW at the shape of "
        f"Llama-3.2-1B, bfloat16. Goal: an MFU of {GOAL} without sharing.",
        "",
        "| lengths | side | pairs/s | tokens/s | MFU | peak memory, GB |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        settings = result["settings"]
        if settings["kind"] == "train":
            lines.append(f"| {settings['data']} | {settings['side']} | " + " | ".join(_figures(result)) + " |")
    for result in results:
        if result["settings"]["kind"] == "score":
            ours, theirs = (result["seconds"][name] for name in ("GRMScorer", "pipeline"))
            lines += [
                "",
                f"Scoring {result['texts']} texts ({result['settings']['data']} lengths): "
                f"{result['tokens'] / ours:,.0f} tokens a second, {theirs / ours:.2f} times the pipeline's.",
            ]
    return "\n".join(lines)


def _figures(result: dict) -> list[str]:
    settings, step = result["settings"], median(result["seconds"])
    seconds = step * len(result["seconds"])
    done = sum(_flops(result).values())
    mfu = f"{done / seconds / result['peak_flops']:.3f}" if result["peak_flops"] else ""
    memory = f"{result['peak_bytes'] / 1e9:.1f}" if result["peak_bytes"] else ""
    return [f"{settings['pairs'] / step:.1f}", f"{result['tokens'] / seconds:,.0f}", mfu, memory]


def _flops(result: dict) -> dict[str, float]:
    return Work(**result["work"]).flops(Shape(**result["settings"]["shape"]))


# ---------------------------------------------------------------------------------------------------------------- main


def run_all(toy: bool, results: Path, until: float) -> list[dict]:
    """Runs the units without a file, as far as the time allows."""
    found = []
    for settings in units(toy):
        path = results / f"{digest(settings)}.json"
        if not path.is_file():
            if time.monotonic() > until:
                print(f"no time left for {settings['kind']} {settings.get('side', '')}; run this again")
                continue
            result = do(settings)
            write(path, result)
            print(settings["kind"], settings["data"], settings.get("side", ""), result["seconds"], flush=True)
        found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def finished(command: list[str], until: float) -> bool:
    """Runs a command. At that time, or if this process is interrupted, it ends with all the processes it started."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code:
        print(f"{' '.join(command[1:])} ended with {code}")
    return True


def go_on(until: float, workers: int) -> None:
    """The candidate and its twin, then the study's remaining units, until the time is over. What is cut off is done
    again later."""
    names = (CANDIDATE, f"{CANDIDATE}_bt")
    left = [["published_model.py", name] for name in names if not (published_model.RESULTS / f"{name}.json").is_file()]
    for script, *arguments in [*left, ["real_base.py", "--workers", str(workers)]]:
        command = [sys.executable, str(Path(__file__).parent / script), *arguments]
        if not finished(command, until):
            print(f"no time left for {script} {' '.join(arguments)}; run this again")


def main() -> None:
    parser = argparse.ArgumentParser(description="Training and scoring on a GPU, and the study's remaining units.")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--workers", type=int, default=6, help="units of the study at a time")
    parser.add_argument("--report", action="store_true", help="only write the section, from the results files")
    parser.add_argument("--toy", action="store_true", help="toy size on any processor; writes nothing")
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    if args.toy:
        with tempfile.TemporaryDirectory() as folder:
            print(section(run_all(True, Path(folder), until)))
        return
    if not args.report:
        if not torch.cuda.is_available():
            sys.exit("There is no GPU here. `--toy` shows that the script works.")
        RESULTS.mkdir(parents=True, exist_ok=True)
        run_all(False, RESULTS, until)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    if not results:
        sys.exit(f"{RESULTS} has no results yet.")
    write_section("gpu", section(results))
    if not args.report:
        go_on(until, args.workers)


if __name__ == "__main__":
    main()
