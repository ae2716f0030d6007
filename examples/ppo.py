# /// script
# requires-python = ">=3.11"
# dependencies = ["grm-hf[ppo]"]
# ///
"""Train a policy with PPO on the rewards of a Generalizable Reward Model. The value model starts from it too. TRL had
a PPO trainer up to version 1.12: `pip install -e ".[ppo]"` in a separate environment.

    python examples/ppo.py --model Qwen/Qwen3-0.6B --reward_model models/grm-smollm2-135m \
        --train prompts.jsonl --output_dir runs/ppo

The policy may have another tokenizer than the reward model (its value model then starts from the policy), but needs a
padding token that is not its EOS token. `--response_length`, `--kl_coef` and `--missing_eos_penalty` are the settings
to look at first; all of `PPOConfig` are options, or lines of a YAML file (`--config FILE`). `--transform standardize`
(or `log_sigmoid`, ...) changes what the policy is trained on, `--lora` trains an adapter.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser
from trl.experimental.ppo import PPOConfig, PPOTrainer

from grm_hf import GRMForSequenceClassification
from grm_hf.rewards import ppo_reward_model, self_test


FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass
class Arguments:
    """What to train on which prompts, for which reward."""

    model: str = field(metadata={"help": "Hub id or folder of the policy, an instruction-tuned language model."})
    reward_model: str = field(metadata={"help": "Hub id or folder of the reward model."})
    train: str = field(metadata={"help": "Hub id or file with a column `prompt`: messages, or a user's message."})
    train_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    samples: int = field(default=8, metadata={"help": "Prompts kept apart, whose answers are shown while training."})
    transform: str | None = field(
        default=None, metadata={"help": "standardize, log_sigmoid, ...: see grm_hf.rewards.Transform."}
    )
    reference: float | None = field(default=None, metadata={"help": "Reference reward of the transformation."})
    lora: bool = field(default=False, metadata={"help": "Train a LoRA adapter, not all weights of the policy."})


def load_prompts(source: str, split: str, tokenizer) -> Dataset:
    """The prompts as messages, and as the token ids that the policy gets."""
    kind = FORMATS.get(Path(source).suffix)
    rows = load_dataset(kind, data_files=source, split="train") if kind else load_dataset(source, split=split)
    prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in rows["prompt"]]
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    return Dataset.from_dict({"prompt": prompts, "input_ids": tokenizer(texts, add_special_tokens=False).input_ids})


def main(argv: list[str] | None = None) -> PPOTrainer:
    args, config = TrlParser((Arguments, PPOConfig)).parse_args_and_config(argv, fail_with_unknown_args=True)
    if config.stop_token is None and config.stop_token_id is None:
        config.stop_token = "eos"  # otherwise PPO also scores what the policy writes behind the end of its answer
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    prompts = load_prompts(args.train, args.train_split, tokenizer)
    reward_model = ppo_reward_model(
        args.reward_model, tokenizer, prompts=prompts, transform=args.transform, reference=args.reference
    )
    if AutoTokenizer.from_pretrained(args.reward_model).get_vocab() == tokenizer.get_vocab():
        value_model = GRMForSequenceClassification.from_pretrained(args.reward_model)
    else:
        value_model = GRMForSequenceClassification.from_base(args.model)
    value_model.freeze_lm_head()  # values do not use it, and DDP refuses parameters without a gradient

    data = prompts.select_columns("input_ids").train_test_split(test_size=args.samples, seed=0)
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(args.model),
        ref_model=None,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear") if args.lora else None,
    )
    self_test(trainer)
    trainer.train()
    trainer.save_model()
    print(f"saved in {config.output_dir}")
    return trainer


if __name__ == "__main__":
    main()
