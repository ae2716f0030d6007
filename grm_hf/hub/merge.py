"""An adapter and the reward model it was trained on, merged into one standalone folder."""

import json
import shutil
from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer
from transformers.utils import logging

from ..modeling_grm import GRMForSequenceClassification
from ..scoring.golden import FILE as GOLDEN


logger = logging.get_logger(__name__)


def merge_adapter(adapter: str, output_dir: str, dtype="auto") -> GRMForSequenceClassification:
    r"""
    Merge an adapter folder (a checkpoint of a LoRA run) into the reward model it was trained on and save the result,
    which loads like any other: no adapter, no PEFT.

    Args:
        adapter (`str`):
            Folder with `adapter_config.json`.
        output_dir (`str`):
            Where the merged model, its code and its tokenizer go.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Dtype to load the reward model in.

    Returns:
        [`GRMForSequenceClassification`], merged.

    Raises:
        `ValueError`: the folder holds no adapter, or one without the reward head.
    """
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
    model = GRMForSequenceClassification.from_pretrained(settings["base_model_name_or_path"], dtype=dtype)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(output_dir)
    if (golden := Path(adapter) / GOLDEN).is_file():  # `grm verify` then holds the merged model to the adapter's
        shutil.copy(golden, output_dir)
    try:
        AutoTokenizer.from_pretrained(adapter).save_pretrained(output_dir)
    except (OSError, ValueError) as error:
        logger.warning(f"No tokenizer was found in '{adapter}', so none was saved in '{output_dir}' ({error}).")
    return merged
