"""The reward model of this project, `models/grm-smollm2-135m`: a LoRA adapter and a head on SmolLM2-135M-Instruct.

    python benchmarks/published_model.py CANDIDATE    # train one of `CANDIDATES`, judge it on the validation pairs
    python benchmarks/published_model.py --list       # what the candidates reached

A candidate leaves `docs/results/published/CANDIDATE.json` and, in `runs/published/CANDIDATE`, its model. All of them
are trained on pairs whose licence allows publication, and are compared on the validation pairs of `grm_hf.base`.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from real_base import ROOT, autocast, precision, short_rows, write

from grm_hf import GRMRewardConfig, GRMRewardTrainer, GRMScorer, base
from grm_hf.metrics import accuracy, fit_temperature, log_loss, pair_margins
from grm_hf.training import CHECKPOINTING


RESULTS = ROOT / "docs" / "results" / "published"
RUNS = ROOT / "runs" / "published"
NAME = "grm-smollm2-135m"
RANK = 8
# Training data of a candidate: sources of the shipped pairs, and files of `shared/data` (MIT).
COMMON = {"regularizer": "sft", "seed": 0, "epochs": 2, "learning_rate": 5e-4, "rank": RANK, "files": []}
SHIPPED = ["pandalm", "ultrafeedback", "gsm8k"]
CANDIDATES: dict[str, dict] = {
    "shipped": {**COMMON, "sources": SHIPPED},
    "instructions": {**COMMON, "sources": ["pandalm", "ultrafeedback"]},
    "with_hh": {**COMMON, "sources": SHIPPED, "files": ["hh_singleturn"]},
    "instructions_full": {**COMMON, "sources": ["pandalm", "ultrafeedback"], "learning_rate": 3e-5, "rank": None},
}
# The Bradley-Terry twin of each: the same but for the text loss.
CANDIDATES |= {f"{name}_bt": {**candidate, "regularizer": "none"} for name, candidate in CANDIDATES.items()}


def training_pairs(candidate: dict) -> Dataset:
    columns = ("prompt", "chosen", "rejected")
    rows = base.load_pairs("train", tuple(candidate["sources"])).to_list()
    rows += [row for file in candidate["files"] for row in short_rows(file)]
    return Dataset.from_list([{name: row[name] for name in columns} for row in rows])


def train(name: str) -> GRMRewardTrainer:
    candidate = CANDIDATES[name]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    lora = None
    if candidate["rank"] is not None:
        lora = LoraConfig(r=candidate["rank"], lora_alpha=2 * candidate["rank"], target_modules="all-linear")
    trainer = GRMRewardTrainer(
        model=str(base.folder("package")),
        args=GRMRewardConfig(
            str(RUNS / name),
            regularizer=candidate["regularizer"],
            model_init_kwargs={"head_hidden_size": 576, "dtype": "float32" if lora is None else "bfloat16"},
            learning_rate=candidate["learning_rate"],
            num_train_epochs=candidate["epochs"],
            seed=candidate["seed"],
            per_device_train_batch_size=8,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            max_grad_norm=5.0,
            max_length=512,
            layout="shared_prefix",
            max_tokens_per_batch=2048,
            bf16=precision() == "bf16",
            use_cpu=not torch.cuda.is_available(),
            **{CHECKPOINTING: False},
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            logging_steps=10,
        ),
        train_dataset=training_pairs(candidate),
        peft_config=lora,
    )
    trainer.train()
    return trainer


def validation_margins(trainer: GRMRewardTrainer) -> dict[str, np.ndarray]:
    """Chosen minus rejected reward of the validation pairs, by source."""
    rows = base.load_pairs("validation").to_list()
    scorer = GRMScorer(trainer.model, trainer.processing_class, max_tokens_per_batch=2048, layout="shared_prefix")
    with autocast():
        pairs = scorer.score_pairs([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])
    margins, sources = pair_margins(*zip(*pairs, strict=True)), np.array([row["source"] for row in rows])
    return {source: margins[sources == source] for source in dict.fromkeys(sources.tolist())}


def finish(trainer: GRMRewardTrainer) -> dict:
    """Judge a trained candidate on the validation pairs, fit its temperature on them, and save it with its card."""
    model = trainer.model
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)  # as it is published
    margins = validation_margins(trainer)
    temperature, at_bound = fit_temperature(np.concatenate(list(margins.values())))
    config = (model.get_base_model() if hasattr(model, "peft_config") else model).config
    config.reward_temperature = 1.0 if at_bound else round(temperature, 3)
    config.base_model = base.MODEL_ID
    trainer.save_model()
    trainer.create_model_card(NAME)
    return {
        "temperature": config.reward_temperature,
        "validation": {
            source: {
                "pairs": len(values),
                "accuracy": round(accuracy(values), 4),
                "log_loss": round(log_loss(values), 4),
            }
            for source, values in margins.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and judge candidates for the published model.")
    parser.add_argument("candidate", nargs="?", choices=list(CANDIDATES))
    parser.add_argument("--list", action="store_true", help="what the candidates reached on the validation pairs")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if args.list:
        for path in sorted(RESULTS.glob("*.json")):
            print(path.stem, json.loads(path.read_text())["validation"])
    elif args.candidate is None:
        parser.error("name a candidate, or --list")
    else:
        started = time.process_time()
        trainer = train(args.candidate)
        result = {
            "candidate": CANDIDATES[args.candidate],
            "base": base.origin(base.folder("package")),
            "pairs": trainer.data_counts["train"].rows,
            "loss": [log["loss"] for log in trainer.state.log_history if "loss" in log],
            **finish(trainer),
            "processor_seconds": round(time.process_time() - started),
        }
        write(Path(RESULTS / f"{args.candidate}.json"), result)
        print(result["validation"])


if __name__ == "__main__":
    main()
