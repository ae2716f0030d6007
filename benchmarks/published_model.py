"""The reward model of this project, `models/grm-smollm2-135m`: a LoRA adapter and a head on SmolLM2-135M-Instruct.

    python benchmarks/published_model.py CANDIDATE    # train one of `CANDIDATES`, judge it on the validation pairs
    python benchmarks/published_model.py --list       # what the candidates reached

A candidate leaves `docs/results/published/CANDIDATE.json` and, in `runs/published/CANDIDATE`, its model. All of them
are trained on pairs whose licence allows publication, and are compared on the validation pairs of `grm_hf.base`.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from real_base import ROOT, TESTS, autocast, first_user_turn, precision, short_rows, write
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from grm_hf import GRMForSequenceClassification, GRMRewardConfig, GRMRewardTrainer, GRMScorer, base
from grm_hf.metrics import accuracy, fit_temperature, log_loss, pair_margins
from grm_hf.training import CHECKPOINTING


RESULTS = ROOT / "docs" / "results" / "published"
RUNS = ROOT / "runs" / "published"
NAME = "grm-smollm2-135m"
RANK = 8
OFF_TOPIC_VALIDATION = 60  # pairs
LONGEST = 1500  # characters of prompt and response together, in a file
# What a candidate is trained on: sources of the shipped pairs; files of `shared/data` (MIT) beside them; and pairs
# made from these, in which the rejected response answers another prompt (`off_topic`: how many). With `full`, all
# linear layers are trained themselves, and their difference from the base is then cut to rank `RANK`.
COMMON = {
    "regularizer": "sft",
    "seed": 0,
    "epochs": 1,
    "learning_rate": 2e-4,
    "rank": RANK,
    "full": False,
    "files": [],
    "off_topic": 0,
}
INSTRUCTIONS = ["pandalm", "ultrafeedback"]
FULL = {**COMMON, "sources": INSTRUCTIONS, "full": True}
BROAD = ["ultrafeedback_train", "hh_harmless_base_train"]
CANDIDATES: dict[str, dict] = {
    "on_topic": {**FULL, "learning_rate": 1e-4, "off_topic": 300},
    "on_topic_slow": {**FULL, "learning_rate": 5e-5, "off_topic": 300},
    "on_topic_few": {**FULL, "learning_rate": 1e-4, "off_topic": 100},
    "on_topic_few_slow": {**FULL, "learning_rate": 6e-5, "off_topic": 100},
    "broad": {**FULL, "learning_rate": 1e-4, "off_topic": 300, "files": BROAD},
}
# The Bradley-Terry twin of each: the same but for the text loss.
CANDIDATES |= {f"{name}_bt": {**candidate, "regularizer": "none"} for name, candidate in CANDIDATES.items()}


def training_pairs(candidate: dict) -> Dataset:
    columns = ("prompt", "chosen", "rejected")
    rows = base.load_pairs("train", tuple(candidate["sources"])).to_list()
    if candidate["files"]:
        tested = {first_user_turn(row) for file, _ in TESTS.values() for row in short_rows(file)}
        held = tested | {first_user_turn(row) for row in base.load_pairs("validation").to_list()}
        seen = {row["id"] for row in rows}
        added = [row for file in candidate["files"] for row in short_rows(file, LONGEST) if row["id"] not in seen]
        rows += [row for row in added if first_user_turn(row) not in held]
    rows += off_topic(rows, candidate["off_topic"])
    return Dataset.from_list([{name: row[name] for name in columns} for row in rows])


def off_topic(rows: list[dict], pairs: int) -> list[dict]:
    """A prompt's chosen response over the chosen response to another prompt, `pairs` times; the prompts in turn."""
    drawn = list({first_user_turn(row): row for row in rows}.values())
    random.Random(0).shuffle(drawn)
    made = []
    for i in range(pairs):
        row, behind = drawn[i % len(drawn)], i + 1 + i // len(drawn)
        others = (drawn[(behind + j) % len(drawn)]["chosen"] for j in range(len(drawn)))
        other = next(chosen for chosen in others if chosen != row["chosen"])
        made.append({"prompt": row["prompt"], "chosen": row["chosen"], "rejected": other})
    return made


def make_trainer(name: str, full: bool) -> GRMRewardTrainer:
    """The trainer of a candidate: of all linear layers and the head, or of an adapter of rank `RANK` and the head."""
    candidate = CANDIDATES[name]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    set_seed(candidate["seed"])  # the head is drawn next
    model = GRMForSequenceClassification.from_base(
        base.folder("package"), head_hidden_size=576, dtype=torch.float32 if full else torch.bfloat16
    )
    lora = LoraConfig(r=candidate["rank"], lora_alpha=2 * candidate["rank"], target_modules="all-linear")
    if full:
        model.lm.requires_grad_(False)
        for layer in linear_layers(model).values():
            layer.requires_grad_(True)
    return GRMRewardTrainer(
        model=model,
        args=GRMRewardConfig(
            str(RUNS / name),
            regularizer=candidate["regularizer"],
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
            logging_steps=5,
        ),
        train_dataset=training_pairs(candidate),
        processing_class=AutoTokenizer.from_pretrained(base.folder("package")),
        peft_config=None if full else lora,
    )


def linear_layers(model) -> dict[str, torch.nn.Linear]:
    """The linear layers of the decoder, by name."""
    decoder = model.lm.model
    return {name: layer for name, layer in decoder.named_modules() if isinstance(layer, torch.nn.Linear)}


@torch.no_grad()
def cut(trained: GRMRewardTrainer, name: str) -> GRMRewardTrainer:
    """The difference of a model trained in full from its base as an adapter: of each layer the best approximation of
    rank `RANK`. The adapter is in a trainer as one that had trained it."""
    trainer = make_trainer(name, full=False)
    new, start = linear_layers(trained.model), base_weights()
    adapters = {
        key.split("lm.model.")[-1]: module
        for key, module in trainer.model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert adapters.keys() == new.keys() == start.keys()
    for key, adapter in adapters.items():
        difference = new[key].weight.double() - start[key].to(new[key].weight.device).double()
        left, values, right = torch.linalg.svd(difference, full_matrices=False)
        roots = values[:RANK].sqrt()
        adapter.lora_A["default"].weight.copy_(roots[:, None] * right[:RANK])
        adapter.lora_B["default"].weight.copy_(left[:, :RANK] * roots / adapter.scaling["default"])
    trainer.model.get_base_model().score.modules_to_save["default"].load_state_dict(trained.model.score.state_dict())
    trainer.state = trained.state
    return trainer


def base_weights() -> dict[str, torch.Tensor]:
    lm = AutoModelForCausalLM.from_pretrained(base.folder("package"), dtype=torch.float32)
    return {name: layer.weight for name, layer in lm.model.named_modules() if isinstance(layer, torch.nn.Linear)}


def validation_margins(trainer: GRMRewardTrainer) -> dict[str, np.ndarray]:
    """Chosen minus rejected reward of the validation pairs, by source; `off_topic` is a source made from them."""
    rows = base.load_pairs("validation").to_list()
    rows += [{**row, "source": "off_topic"} for row in off_topic(rows, OFF_TOPIC_VALIDATION)]
    scorer = GRMScorer(trainer.model, trainer.processing_class, max_tokens_per_batch=2048, layout="shared_prefix")
    with autocast():
        pairs = scorer.score_pairs([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])
    margins, sources = pair_margins(*zip(*pairs, strict=True)), np.array([row["source"] for row in rows])
    return {source: margins[sources == source] for source in dict.fromkeys(sources.tolist())}


def judged(margins: dict[str, np.ndarray]) -> dict:
    return {
        source: {
            "pairs": len(values),
            "accuracy": round(accuracy(values), 4),
            "log_loss": round(log_loss(values), 4),
        }
        for source, values in margins.items()
    }


def finish(trainer: GRMRewardTrainer) -> dict:
    """Judge an adapter on the validation pairs, fit its temperature on them, and save it with its card."""
    model = trainer.model
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)  # as it is published
    margins = validation_margins(trainer)
    temperature, at_bound = fit_temperature(np.concatenate(list(margins.values())))
    config = model.get_base_model().config
    config.reward_temperature = 1.0 if at_bound else round(temperature, 3)
    config.base_model = base.MODEL_ID
    trainer.save_model()
    trainer.create_model_card(NAME)
    return {"temperature": config.reward_temperature, "validation": judged(margins)}


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
        candidate = CANDIDATES[args.candidate]
        trainer = make_trainer(args.candidate, candidate["full"])
        trainer.train()
        before = {}
        if candidate["full"]:
            before = {"validation_before_the_cut": judged(validation_margins(trainer))}
            trainer = cut(trainer, args.candidate)
        result = {
            "candidate": candidate,
            "base": base.origin(base.folder("package")),
            "pairs": trainer.data_counts["train"].rows,
            "loss": [log["loss"] for log in trainer.state.log_history if "loss" in log],
            **before,
            **finish(trainer),
            "processor_seconds": round(time.process_time() - started),
        }
        write(Path(RESULTS / f"{args.candidate}.json"), result)
        print(result["validation"])


if __name__ == "__main__":
    main()
