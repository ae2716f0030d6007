"""Loads the model and the tokenizer that a run begins with, by id or folder: a causal language model, a reward model,
or an adapter of one. Arguments for the Hub (`revision`, `subfolder`, `token`, ...) apply to configuration, weights and
tokenizer alike.
"""

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import find_adapter_config_file, logging

from ..configuration_grm import GRMConfig
from ..folders import require_base
from ..modeling_grm import HUB_ARGUMENTS, GRMForSequenceClassification


logger = logging.get_logger(__name__)


def hub_arguments(model_init_kwargs: dict | None) -> dict:
    """The arguments in `model_init_kwargs` that say where files are."""
    given = model_init_kwargs or {}
    return {name: given[name] for name in (*HUB_ARGUMENTS, "gguf_file") if given.get(name) is not None}


def load_model(path: str, args, quantization_config=None):
    """
    A reward model, or the adapter of one as a trainable [`~peft.PeftModel`].

    Args:
        path (`str`):
            Hub id or folder of a causal language model, a reward model or an adapter.
        args ([`GRMRewardConfig`]):
            Its `model_init_kwargs` and `trust_remote_code` are read.
        quantization_config (*optional*):
            As in [`~trl.RewardTrainer`].
    """
    kwargs = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError("`quantization_config` is given twice: to the trainer and in `args.model_init_kwargs`.")
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    kwargs = {"dtype": torch.float32, **{k: v for k, v in kwargs.items() if v is not None or k == "device_map"}}
    trust = kwargs.pop("trust_remote_code", args.trust_remote_code)
    return _load(path, kwargs, trust)


def _load(path, kwargs, trust):
    hub = hub_arguments(kwargs)
    if _is_adapter(path, hub):
        hub.pop("gguf_file", None)
        place = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
        named = PeftConfig.from_pretrained(path, **hub).base_model_name_or_path
        base = GRMForSequenceClassification.find_base(named, Path(path, hub.get("subfolder", "")))
        require_base(base, path)
        wrapped = PeftModel.from_pretrained(_load(base, place, trust), path, is_trainable=True, **hub)
        wrapped.peft_config["default"].base_model_name_or_path = base  # where it was found
        return wrapped
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust, **hub)
    if config.model_type == GRMConfig.model_type:
        ignored = sorted(k for k in kwargs if k.startswith(("head_", "attribute_")))
        if ignored:
            logger.warning(f"'{path}' is a reward model already: {ignored} are ignored, its own head is kept.")
        kwargs = {k: v for k, v in kwargs.items() if k not in ignored}
        return GRMForSequenceClassification.from_pretrained(path, **kwargs)
    return GRMForSequenceClassification.from_base(path, trust_remote_code=trust, **kwargs)


def _is_adapter(path, hub):
    folder = Path(path, hub.get("subfolder", ""))
    if (folder / "config.json").is_file() or "gguf_file" in hub:
        return False
    return find_adapter_config_file(path, **{k: v for k, v in hub.items() if k != "proxies"}) is not None


def load_tokenizer(source: str | None, args, hub: dict):
    """The tokenizer of the model that the run begins with."""
    if not source:
        raise ValueError(
            "The model was made in memory, so its tokenizer is not known. Pass `processing_class=tokenizer`."
        )
    return AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code, **hub)
