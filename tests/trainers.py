"""A training run of seconds: pairs, a model, settings, and the trainer on them. Needs TRL."""

import numpy as np
import pytest
import torch
from tiny import chatml_tokenizer, tiny_llama


pytest.importorskip("trl", reason="needs the extra `train`")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402

from grm_hf import GRMForSequenceClassification, GRMRewardConfig, GRMRewardTrainer  # noqa: E402


TOKENIZER = chatml_tokenizer()
WORDS = "one two three four five six seven eight nine ten".split()


def rows(count=16, seed=0):
    rng = np.random.default_rng(seed)

    def words(low, high):
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    return [
        {
            "prompt": [{"role": "user", "content": words(1, 6)}],
            "chosen": [{"role": "assistant", "content": words(1, 6) + " good"}],
            "rejected": [{"role": "assistant", "content": words(1, 6) + " bad"}],
        }
        for _ in range(count)
    ]


def pairs(count=16, seed=0, **columns):
    dataset = Dataset.from_list(rows(count, seed))
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


def rated_between(dataset):
    """The same rows, some of them as rated completions (the fifth to the eighth among them), some with ratings."""
    made = []
    for number, row in enumerate(dataset):
        ratings = {"help": float(number % 3), "short": None if number % 4 == 1 else -1.0}
        if number % 3 == 1 or 4 <= number < 8:
            row = {"prompt": row["prompt"], "completion": row["chosen"], **ratings}
        elif number % 2:
            row = {**row, **{f"rejected_{name}": rating for name, rating in ratings.items()}}
        made.append(row)
    columns = dict.fromkeys(name for row in made for name in row)
    return Dataset.from_list([{**columns, **row} for row in made])


def base(seed=0, **config):
    return tiny_llama(TOKENIZER, seed, **config)


def grm(seed=0, head_type="mlp", **config):
    attributes = {name: config.pop(name) for name in list(config) if name.startswith("attribute_")}
    return GRMForSequenceClassification.from_base(base(seed, **config), head_type, head_hidden_size=8, **attributes)


def settings(folder, kind=GRMRewardConfig, **kwargs):
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return kind(str(folder), **{**defaults, **kwargs})


def trainer(folder, model=None, data=None, evaluation=None, peft_config=None, extra=None, **kwargs):
    return GRMRewardTrainer(
        model=grm() if model is None else model,
        args=settings(folder, **kwargs),
        train_dataset=pairs() if data is None else data,
        eval_dataset=evaluation,
        processing_class=TOKENIZER,
        peft_config=peft_config,
        **(extra or {}),
    )


def lora(**kwargs):
    return LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", **kwargs)


def logged(run, name):
    return [row[name] for row in run.state.log_history if name in row]


CHATS = [[*row["prompt"], *row["chosen"]] for row in rows(3, seed=5)]


def scores_here(model):
    """The scores of `CHATS`, in this process."""
    model.eval()
    found = []
    for chat in CHATS:
        inputs = TOKENIZER.apply_chat_template(chat, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            found.append(model(**inputs).logits.item())
    return found
