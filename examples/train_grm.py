# /// script
# requires-python = ">=3.11"
# dependencies = ["grm-hf[train]"]
# ///
"""Train a Generalizable Reward Model on preference pairs: a Hub dataset or a local file (parquet, JSON lines, CSV) in
any of TRL's preference formats, starting from any causal language model.

    python examples/train_grm.py --model Qwen/Qwen3-0.6B --train trl-lib/ultrafeedback_binarized --output_dir runs/grm

`--regularizer` chooses the text loss (none, sft, dpo_noref, dpo, ...), `--lora` trains an adapter. Every setting of
`GRMRewardConfig` is an option too, or a line of a YAML file (`--config FILE`). The output folder loads anywhere
with `AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import TrlParser

from grm_hf import GRMRewardConfig, GRMRewardTrainer


FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass
class Arguments:
    """What to train on what."""

    model: str = field(metadata={"help": "Hub id or folder of a causal language model."})
    train: str = field(metadata={"help": "Hub id or file of the training pairs."})
    eval: str | None = field(default=None, metadata={"help": "Hub id or file of pairs to evaluate on at the end."})
    train_split: str = field(default="train", metadata={"help": "Split of a Hub dataset to train on."})
    eval_split: str = field(default="test", metadata={"help": "Split of a Hub dataset to evaluate on."})
    max_rows: int | None = field(default=None, metadata={"help": "Train on that many rows, drawn at random."})
    lora: bool = field(default=False, metadata={"help": "Train a LoRA adapter and the reward head, not all weights."})


def load_pairs(source: str, split: str) -> Dataset:
    """Preference pairs of a file, or of a split of a Hub dataset."""
    if kind := FORMATS.get(Path(source).suffix):
        return load_dataset(kind, data_files=source, split="train")
    return load_dataset(source, split=split)


def main(argv: list[str] | None = None) -> GRMRewardTrainer:
    args, config = TrlParser((Arguments, GRMRewardConfig)).parse_args_and_config(argv, fail_with_unknown_args=True)
    train = load_pairs(args.train, args.train_split)
    if args.max_rows is not None and args.max_rows < len(train):
        train = train.shuffle(seed=0).select(range(args.max_rows))

    trainer = GRMRewardTrainer(
        model=args.model,
        args=config,
        train_dataset=train,
        eval_dataset=load_pairs(args.eval, args.eval_split) if args.eval else None,
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear") if args.lora else None,
    )
    trainer.train()
    if args.eval:
        metrics = trainer.evaluate()
        print(f"accuracy on {args.eval}: {metrics['eval_accuracy']:.3f}")
    trainer.save_model()
    print(f"saved in {config.output_dir}")
    return trainer


if __name__ == "__main__":
    main()
