"""Exported reward models as transformers loads them: the native sequence classifiers, and two layouts for MLP heads
that engines have and transformers lacks, `Qwen2ForRewardModel` (vLLM and SGLang) and `Qwen3ForRewardModel` (SGLang).
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, Qwen2Config
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model, Qwen2PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3PreTrainedModel

from .configuration_grm import POLICIES
from .modeling_grm import last_token_positions


class _ForRewardModel:
    """A decoder with `score` = Linear, ReLU, Linear; the hidden layer is as wide as the decoder. The reward is read at
    the last token of the mask."""

    body: type

    def __init__(self, config):
        super().__init__(config)
        self.model = self.body(config)
        width = config.hidden_size
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.post_init()

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        """`(batch_size, sequence_length)` to `.logits` of shape `(batch_size, 1)`."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.model(input_ids, attention_mask=attention_mask, use_cache=use_cache).last_hidden_state
        rows = torch.arange(len(hidden), device=hidden.device)
        return SequenceClassifierOutputWithPast(logits=self.score(hidden[rows, last_token_positions(attention_mask)]))


class Qwen2ForRewardModel(_ForRewardModel, Qwen2PreTrainedModel):
    """The layout of that name in vLLM and SGLang."""

    body = Qwen2Model


class Qwen3ForRewardModel(_ForRewardModel, Qwen3PreTrainedModel):
    """The layout of that name in SGLang."""

    body = Qwen3Model


REWARD_MODELS: dict[str, Any] = {each.__name__: each for each in (Qwen2ForRewardModel, Qwen3ForRewardModel)}
# SGLang's classifiers read this bias and transformers' lack it, so `grm export` writes zeros for it.
ZERO_BIAS = "score.bias"


def load_export(folder: str | Path, **kwargs):
    """Loads an exported model without remote code; refuses missing weights. `.logits` is `(B, 1)`."""
    hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir") if name in kwargs}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **hub)
    loader: Any = AutoModelForSequenceClassification
    if (architecture := (config.architectures or [""])[0]) in REWARD_MODELS:
        loader = REWARD_MODELS[architecture]
        config = as_qwen2_config(config) if loader is Qwen2ForRewardModel else config
    kwargs = {"dtype": "auto", **kwargs, "config": config, "output_loading_info": True}
    model, info = loader.from_pretrained(folder, **kwargs)
    left = set(info["unexpected_keys"]) - {ZERO_BIAS}
    wrong = sorted({*info["missing_keys"], *left, *map(str, info["mismatched_keys"])})
    if wrong:
        raise ValueError(f"'{folder}' does not fit its config.json: {wrong[:5]}. Export the model again.")
    return model.eval()


def as_qwen2_config(config):
    """The configuration with which transformers' Qwen2 computes the body: only the fields that engines read."""
    if config.model_type == "qwen2":
        return config
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "dtype", *POLICIES),
    )
    return Qwen2Config(**{name: copy.deepcopy(getattr(config, name)) for name in same}, use_sliding_window=False)
