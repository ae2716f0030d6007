"""An adapter and the reward model it was trained on, merged into one standalone folder."""

import json
import os
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging

from ..configuration_grm import take_policies
from ..devices import evaluating
from ..folders import new_folder, readable, require_base
from ..modeling_grm import GRMForSequenceClassification
from ..scoring.golden import FILE as GOLDEN
from ..scoring.golden import save_golden, tolerance


logger = logging.get_logger(__name__)


def merge_adapter(adapter: str | Path, output_dir: str | Path, dtype="auto") -> GRMForSequenceClassification:
    r"""
    Merge an adapter folder (a checkpoint of a LoRA run) into the reward model it was trained on, and save the result.
    It loads like any other model, without PEFT. The written folder is loaded again, and its rewards and LM logits are
    compared with those of the adapter.

    Args:
        adapter (`str` or `Path`):
            Folder with `adapter_config.json`.
        output_dir (`str` or `Path`):
            New or empty folder for the merged model, its code and its tokenizer.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Dtype to load the reward model in. With `"auto"` it is the stored one, or float32, with a warning, if
            rounding the merged weights to the stored one changes the rewards.

    Returns:
        [`GRMForSequenceClassification`], merged, as it was loaded from `output_dir`.

    Raises:
        `ValueError`: the folder has no adapter, the adapter has no reward head or cannot be merged exactly, or
            `output_dir` is not empty. Nothing is written then.
    """
    with readable(adapter) as place:
        try:
            return _merge(place, output_dir, dtype)
        except _RoundedError as error:
            if dtype != "auto" or error.dtype == torch.float32:
                raise
            kind = str(error.dtype).removeprefix("torch.")
            logger.warning(
                f"Rounded to {kind}, the merged weights of the adapter in '{adapter}' give other rewards. The merged "
                "model is in float32."
            )
            return _merge(place, output_dir, torch.float32)


class _RoundedError(ValueError):
    """The merged model, in this dtype, is not the adapter and its base."""

    def __init__(self, message: str, dtype: torch.dtype):
        super().__init__(message)
        self.dtype = dtype


def _merge(adapter: str, output_dir: str | Path, dtype) -> GRMForSequenceClassification:
    config = Path(adapter) / "adapter_config.json"
    if not config.is_file():
        raise ValueError(f"'{adapter}' has no adapter_config.json: it is not an adapter folder, nothing is merged.")
    settings = json.loads(config.read_text(encoding="utf-8"))
    if "score" not in (settings.get("modules_to_save") or []):
        raise ValueError(
            f"The adapter in '{adapter}' does not carry the reward head (modules_to_save is "
            f"{settings.get('modules_to_save')}): the merged model would score with an untrained one. Train with "
            "modules_to_save=['score'], which GRMRewardTrainer does by itself."
        )
    with new_folder(output_dir) as folder:
        base = GRMForSequenceClassification.find_base(settings["base_model_name_or_path"], adapter)
        require_base(base, adapter)
        model = GRMForSequenceClassification.from_pretrained(base, dtype=dtype)
        take_policies(model.config, adapter)
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        wrapped = PeftModel.from_pretrained(model, adapter)
        expected = _outputs(wrapped)
        if ends != (model.get_input_embeddings(), model.get_output_embeddings()):
            _untie(model)
        _unwrap_saved_modules(model)
        try:
            merged = wrapped.merge_and_unload()
        except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"peft cannot merge the adapter in '{adapter}' ({settings['peft_type']}): {error}. Use the adapter as "
                "it is: `GRMForSequenceClassification.from_pretrained` loads it."
            ) from error
        merged.save_pretrained(folder)
        del wrapped, merged, model
        golden, tokenizer = Path(adapter) / GOLDEN, None
        if golden.is_file():  # `grm verify` then compares with the adapter's rewards
            shutil.copy(golden, folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(adapter)
            tokenizer.save_pretrained(folder)
        except (OSError, ValueError) as error:
            logger.warning(f"No tokenizer was found in '{adapter}', so none was saved in '{output_dir}' ({error}).")
        loaded = GRMForSequenceClassification.from_pretrained(folder, dtype=dtype)
        outputs = zip(("rewards", "LM logits", "attributes"), expected, _outputs(loaded), strict=True)
        limit = min(tolerance(loaded), 5e-2)  # one machine: only the sums of weights are rounded again
        for what, before, after in outputs:
            difference = float((after - before).abs().max() / before.abs().max().clamp(min=1))
            if not difference <= limit:
                raise _RoundedError(
                    f"Merged into one model, the adapter in '{adapter}' has other {what} (they differ by "
                    f"{difference:.1e}, relative; {limit:.0e} is rounding). Nothing was written. Use the "
                    "adapter as it is: `GRMForSequenceClassification.from_pretrained` loads it.",
                    loaded.dtype,
                )
        if dtype == torch.float32 and golden.is_file() and tokenizer is not None:
            save_golden(loaded, tokenizer, folder)  # those of the adapter may be in the dtype of its base
    loaded.name_or_path = loaded.config._name_or_path = os.fspath(output_dir)
    return loaded


@torch.no_grad()
def _outputs(model) -> tuple[torch.Tensor, ...]:
    """Rewards, LM logits and attributes (rewards again without) of two rows of tokens over the whole vocabulary."""
    embeddings = model.get_input_embeddings().weight
    ids = torch.linspace(0, embeddings.shape[0] - 1, 32, device=embeddings.device).long().view(2, 16)
    with evaluating(model):
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), return_lm_logits=True)
    attributes = out.logits if out.attributes is None else out.attributes
    return out.logits.float().cpu(), out.lm_logits.float().cpu(), attributes.float().cpu()


def _untie(model: GRMForSequenceClassification) -> None:
    """Give the LM head its own weight: merging an adapter into one of two tied weights would change both."""
    inside = set(model.get_input_embeddings().modules())
    own = {parameter for module in inside for parameter in module.parameters(recurse=False)}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if module not in inside and parameter in own:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    for config in (model.config, model.config.text_config):
        config.tie_word_embeddings = False


def _unwrap_saved_modules(model: nn.Module) -> None:
    """Unwrap modules that were trained in full: some methods of peft leave them wrapped."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.modules_to_save[module.active_adapters[0]])
