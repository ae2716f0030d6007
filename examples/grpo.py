# /// script
# requires-python = ">=3.11"
# dependencies = ["grm-hf[train]"]
# ///
"""Train a policy with GRPO on the rewards of a Generalizable Reward Model: several answers to each prompt are scored,
and each is compared with the others. The policy may have another tokenizer than the reward model.

    python examples/grpo.py --model Qwen/Qwen3-0.6B --reward_model models/grm-smollm2-135m \
        --train prompts.jsonl --output_dir runs/grpo

`--transform standardize` (or `log_sigmoid`, ...) changes what the policy is trained on, `--lora` trains an adapter.
Every setting of `GRPOConfig` is an option too, or a line of a YAML file (`--config FILE`).
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, TrlParser

from grm_hf.rewards import grm_reward_func


FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass
class Arguments:
    """What to train on which prompts, for which reward."""

    model: str = field(metadata={"help": "Hub id or folder of the policy, an instruction-tuned language model."})
    reward_model: str = field(metadata={"help": "Hub id or folder of the reward model."})
    train: str = field(metadata={"help": "Hub id or file with a column `prompt`: messages, or a user's message."})
    train_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    transform: str | None = field(
        default=None, metadata={"help": "standardize, log_sigmoid, ...: see grm_hf.rewards.Transform."}
    )
    reference: float | None = field(default=None, metadata={"help": "Reference reward of the transformation."})
    lora: bool = field(default=False, metadata={"help": "Train a LoRA adapter, not all weights of the policy."})


def load_prompts(source: str, split: str) -> Dataset:
    """The prompts as messages, and nothing else: one row each."""
    kind = FORMATS.get(Path(source).suffix)
    rows = load_dataset(kind, data_files=source, split="train") if kind else load_dataset(source, split=split)
    prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in rows["prompt"]]
    return Dataset.from_dict({"prompt": prompts})


def main(argv: list[str] | None = None) -> GRPOTrainer:
    args, config = TrlParser((Arguments, GRPOConfig)).parse_args_and_config(argv, fail_with_unknown_args=True)
    trainer = GRPOTrainer(
        model=args.model,
        reward_funcs=grm_reward_func(args.reward_model, transform=args.transform, reference=args.reference),
        args=config,
        train_dataset=load_prompts(args.train, args.train_split),
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear") if args.lora else None,
    )
    trainer.train()
    trainer.save_model()
    print(f"saved in {config.output_dir}")
    return trainer


if __name__ == "__main__":
    main()
