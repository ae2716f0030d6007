"""A Generalizable Reward Model: one decoder whose last hidden state feeds two heads, the reward head `score` and the
language-model head that came with the base (Yang et al., arXiv 2406.10216).

The model owns the base's *complete* causal language model as `lm`, so that every family's own head (tied or not, soft
capped, scaled, with bias) stays exact. The reward is read at the last real token of each row, found in the attention
mask, never by comparing token ids with a padding id.

This file is shipped to the Hub as it is: it imports torch, transformers and its two neighbours, nothing else
(and peft, if there is an adapter to load).
"""

import inspect
import json
import math
import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple, find_adapter_config_file

from .configuration_grm import TRANSFORMERS_4, GRMConfig
from .heads_grm import build_head


HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass
class GRMOutput(ModelOutput):
    """
    Output of [`GRMForSequenceClassification`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
            Mean squared error between rewards and `labels`.
        logits (`torch.FloatTensor` of shape `(batch_size, 1)`):
            Rewards, raw (no sigmoid).
        lm_logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`, *optional*):
            Next-token scores of the language-model head, with `return_lm_logits=True`.
        lm_output (`Any`, *optional*):
            What `lm_fn` returned.
        past_key_values, hidden_states, attentions:
            As the decoder returns them.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    lm_logits: torch.FloatTensor | None = None
    lm_output: object | None = None
    past_key_values: object | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None


def last_token_positions(attention_mask):
    """Column of the last real token of each row, for left, right and no padding: `(B, T)` to `(B,)`."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (columns * (attention_mask != 0)).argmax(-1)


class GRMForSequenceClassification(PreTrainedModel, GenerationMixin):
    r"""
    A reward model that can still speak. Make one with [`~GRMForSequenceClassification.from_base`], load one with
    [`~GRMForSequenceClassification.from_pretrained`].

    Args:
        config ([`GRMConfig`]):
            Configuration.
        lm ([`~transformers.PreTrainedModel`], *optional*):
            A live causal language model to own. Made from `config.text_config` if left out.

    Attributes:
        lm: the base's complete causal language model.
        model: its decoder (the name that `base_model_prefix` gives, for TRL's PPO and PEFT).
        score: the reward head, `(..., hidden_size)` to `(..., 1)`, in float32 whatever the dtype of `lm`.
    """

    config_class = GRMConfig
    # transformers 4 (rewardbench) looks for weights under this name; there TRL's PPO computes logits it does not use.
    base_model_prefix = "lm" if TRANSFORMERS_4 else "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # `forward` takes any argument; Trainer would leave it to divide accumulated losses
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules = ["score"]
    _keep_in_fp32_modules_strict = ["score"]

    def __init__(self, config, lm=None):
        if config.num_labels != 1:
            raise ValueError(
                f"A reward model gives one number, found {config.num_labels} labels. Leave `num_labels` at 1."
            )
        _refuse_base(config.text_config, "The `text_config`")
        super().__init__(config)
        if lm is None:
            lm = AutoModelForCausalLM.from_config(config.text_config)
        else:
            for part in (*lm.modules(), *lm.parameters()):
                part._is_hf_initialized = True  # `post_init` would draw new weights for what lacks the mark
        # One configuration object for all: a pad id that TRL writes, an attention that a user sets reach every layer.
        config.text_config = lm.config
        self.lm = lm
        self.generation_config = lm.generation_config
        self._no_split_modules = list(lm._no_split_modules or [])  # transformers 5.0 does not collect them
        # Not `hidden_size`: OPT's decoder may project to another width before its head.
        self.score = build_head(config, self._read_width()).float()
        self.post_init()

    @property
    def model(self):
        body = self.lm.base_model
        return body if body is not self.lm else self.lm.get_decoder()  # Gemma 3 in transformers 4

    # ------------------------------------------------------------------------------------------------- making, loading

    @classmethod
    def from_base(
        cls,
        base,
        head_type="mlp",
        head_hidden_size=1024,
        head_num_layers=1,
        head_dropout=0.0,
        **load_kwargs,
    ):
        r"""
        Make a reward model from a causal language model: its weights and language-model head are kept as they are, the
        reward head is new (random: train it).

        Args:
            base (`str` or [`~transformers.PreTrainedModel`]):
                Hub id or folder of a causal language model of any decoder family, or a live one (which the reward
                model then owns).
            head_type (`str`, *optional*, defaults to `"mlp"`):
                See [`GRMConfig`], also for `head_hidden_size`, `head_num_layers` and `head_dropout`.
            **load_kwargs:
                Passed to `AutoModelForCausalLM.from_pretrained` (`dtype`, `revision`, `device_map`,
                `quantization_config`, `attn_implementation`, ...).

        Returns:
            [`GRMForSequenceClassification`].

        Raises:
            `ValueError`: the base is a reward model already, multimodal, an encoder, a classifier or an adapter, or
            lacks weights.
        """
        base_model = None
        if isinstance(base, torch.nn.Module):
            if load_kwargs:
                raise ValueError(
                    f"`base` is a live model, so {sorted(load_kwargs)} cannot be applied. Pass them when you load it."
                )
            lm = base
        else:
            base_model = os.fspath(base)
            lm = _load_base(base_model, load_kwargs)
        if getattr(lm, "peft_config", None):
            raise ValueError(
                "`base` carries an adapter. Merge it (`merge_and_unload()`) and pass the language model you get."
            )
        _refuse_base(lm.config, type(lm).__name__)
        if lm.get_output_embeddings() is None:
            raise ValueError(
                f"{type(lm).__name__} has no language-model head, which GRM keeps and trains. Load the base with "
                "AutoModelForCausalLM, not with AutoModel or a classification class."
            )
        config = GRMConfig(
            text_config=lm.config,
            head_type=head_type,
            head_hidden_size=head_hidden_size,
            head_num_layers=head_num_layers,
            head_dropout=head_dropout,
            dtype=lm.dtype,
            base_model=base_model,
        )
        model = cls(config, lm=lm)
        model.score.to(lm.device)
        for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "hf_quantizer", "quantization_method"):
            if hasattr(lm, name):
                setattr(model, name, getattr(lm, name))
        if getattr(lm.config, "quantization_config", None) is not None:
            config.quantization_config = lm.config.quantization_config
        if hasattr(lm, "hf_device_map"):
            model.hf_device_map = {f"lm.{k}" if k else "lm": v for k, v in lm.hf_device_map.items()}
        return model.train(lm.training)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        allow_missing_head=False,
        output_loading_info=False,
        **kwargs,
    ):
        r"""
        Load a saved reward model, or an adapter folder trained on one. Takes what
        [`~transformers.PreTrainedModel.from_pretrained`] takes; unlike it, raises when a weight is missing, has
        another shape, or has no place in the model.

        Args:
            pretrained_model_name_or_path (`str`):
                Hub id or folder.
            allow_missing_head (`bool`, *optional*, defaults to `False`):
                Accept a checkpoint whose reward head is missing; the head is then random. Anything else that is
                missing is refused all the same.

        Raises:
            `ValueError`: the folder holds another kind of model, or weights that do not fit.
        """
        path = pretrained_model_name_or_path
        adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
        adapter_name = kwargs.pop("adapter_name", "default")
        adapter = adapter_kwargs.pop("_adapter_model_path", None)  # set by an Auto class, and `path` is then its base
        if path is not None:
            path = os.fspath(path)
            hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
            base = _base_of_adapter(path, hub)
            if adapter is None and base is not None:
                adapter, path = path, base
                adapter_kwargs = {**hub, **adapter_kwargs}
                for name in ("revision", "subfolder"):  # the adapter's
                    hub.pop(name, None)
                    kwargs.pop(name, None)
            _require_grm(path, adapter, hub)
        # Shapes that differ are reported below, with what to do, together with whatever else is wrong.
        kwargs["ignore_mismatched_sizes"] = True
        model, info = super().from_pretrained(path, *model_args, output_loading_info=True, **kwargs)
        _check_loaded(path, info, allow_missing_head)
        if adapter is not None:
            _load_adapter(model, os.fspath(adapter), adapter_name, adapter_kwargs)
        return (model, info) if output_loading_info else model

    def _init_weights(self, module):
        # torch's own defaults, as the original head has; through `torch.nn.init`, which loaded weights are shielded
        # from. Only the reward head gets here: the language model initialises itself.
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_features)
                nn.init.uniform_(module.bias, -bound, bound)

    # --------------------------------------------------------------------------------------------- embeddings, LM head

    def get_input_embeddings(self):
        return self.lm.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.lm.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.lm.set_output_embeddings(value)

    def get_decoder(self):
        return self.model

    def lm_logits(self, hidden_states):
        """Next-token scores of hidden states, as the base itself computes them: `(..., hidden_size)` to
        `(..., vocab_size)`. [`~GRMForSequenceClassification.lm_head_is_exact`] tells whether that holds."""
        logits = self.get_output_embeddings()(hidden_states)
        config = self.config.text_config
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (scale := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / scale
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits

    @torch.no_grad()
    def lm_head_is_exact(self):
        """Whether [`~GRMForSequenceClassification.lm_logits`] gives what the base's own forward gives (one run)."""
        device = self.get_input_embeddings().weight.device
        input_ids = torch.arange(4, device=device)[None] % self.config.vocab_size
        training = self.lm.training
        self.lm.eval()
        out = self.lm(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), output_hidden_states=True)
        theirs = out.logits.float()
        ours = self.lm_logits(out.hidden_states[-1].to(theirs.device)).float()
        self.lm.train(training)
        tolerance = 1e-4 if out.logits.dtype == torch.float32 else 2e-2
        return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())

    def freeze_lm_head(self):
        """Stop gradients of the language-model head, for losses that do not use it: under DDP a parameter without
        gradient is an error. A tied head is left alone, since it is the input embedding."""
        head = self.get_output_embeddings()
        if head.weight is not self.get_input_embeddings().weight:
            head.requires_grad_(False)

    def generate(self, *args, **kwargs):
        """Generate text with the kept language-model head, exactly as the base would."""
        self.lm.generation_config = self.generation_config
        return self.lm.generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return self.lm.prepare_inputs_for_generation(*args, **kwargs)

    # --------------------------------------------------------------------------------------------------------- forward

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        token_type_ids=None,
        read_index=None,
        return_lm_logits=False,
        logits_to_keep=0,
        lm_fn=None,
        **kwargs,
    ):
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids; or `inputs_embeds`, `(batch_size, sequence_length, hidden_size)`.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Non-zero at real tokens; with a cache, of the cached ones too. Without it, leading and trailing padding
                ids are taken as padding; if the padding id is missing or also begins or ends texts, a single row is
                taken as unpadded and a batch is refused.
            labels (`torch.FloatTensor` of shape `(batch_size,)`, *optional*):
                Target rewards, for regression.
            read_index (`torch.LongTensor` of shape `(num_sequences,)`, *optional*):
                Where rewards are read, as positions in the flattened `(batch_size * sequence_length)` hidden states;
                for layouts that put several sequences in a row. `logits` is then `(num_sequences, 1)`.
            return_lm_logits (`bool`, *optional*, defaults to `False`):
                Also compute the language-model logits, of the positions that `logits_to_keep` selects.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to `0`):
                As in transformers: the last so many positions, or an index; 0 is all.
            lm_fn (`Callable`, *optional*):
                Called as `lm_fn(hidden_states, model)` with the last hidden states `(batch_size, sequence_length,
                hidden_size)`; its result is `lm_output`. Losses on the language-model head are computed here, inside
                the forward that DDP and FSDP wrap.

        Returns:
            [`GRMOutput`].
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("Pass `input_ids` or `inputs_embeds`.")
        if given.shape[0] == 0:
            return GRMOutput(logits=self.score.forward(given.new_zeros(0, self._read_width(), dtype=torch.float32)))
        if read_index is None:
            attention_mask = self._readable_mask(input_ids, given, attention_mask, past_key_values)
        if past_key_values is None:
            use_cache = bool(use_cache)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            if "position_ids" in inspect.signature(self.model.forward).parameters:
                # Left padding would shift absolute positions (GPT-2, OPT).
                position_ids = ((attention_mask != 0).long().cumsum(-1) - 1).clamp(min=0)[:, -given.shape[1] :]
        arguments = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            **kwargs,
        )
        if position_ids is not None:
            arguments["position_ids"] = position_ids
        if return_lm_logits:
            out = self.lm(**arguments, output_hidden_states=True, logits_to_keep=logits_to_keep, return_dict=True)
            hidden, lm_logits = out.hidden_states[-1], out.logits
        else:
            out = self.model(**arguments, output_hidden_states=output_hidden_states, return_dict=True)
            hidden, lm_logits = out.last_hidden_state, None

        if read_index is not None:
            read = hidden.flatten(0, 1)[read_index]
        else:
            length = hidden.shape[1]
            at = length - 1 if attention_mask is None else last_token_positions(attention_mask[:, -length:])
            read = hidden[torch.arange(hidden.shape[0], device=hidden.device), at]
        rewards = self.score(read)
        loss = None
        if labels is not None:
            loss = nn.functional.mse_loss(rewards.squeeze(-1), labels.to(rewards.dtype).view(-1))
        return GRMOutput(
            loss=loss,
            logits=rewards,
            lm_logits=lm_logits,
            lm_output=None if lm_fn is None else lm_fn(hidden, self),
            past_key_values=getattr(out, "past_key_values", None),
            hidden_states=out.hidden_states if output_hidden_states else None,
            attentions=getattr(out, "attentions", None),
        )

    def _read_width(self):
        return self.get_output_embeddings().weight.shape[-1]

    def _readable_mask(self, input_ids, given, mask, cache):
        """The mask `(B, cached + T)`, 0 or 1, that says where each row ends; `None` for a single unpadded row."""
        rows, length = given.shape[:2]
        if mask is None:
            pad, ends = self.config.pad_token_id, (self.config.bos_token_id, self.config.eos_token_id)
            if input_ids is not None and cache is None and pad is not None and not _among(pad, ends):
                real = input_ids != pad
                mask = real.cumsum(-1).bool() & real.flip(-1).cumsum(-1).flip(-1).bool()
            elif rows == 1:
                return None
            else:
                raise ValueError(
                    f"A batch of {rows} rows without `attention_mask`: rows may be padded, and nothing tells padding "
                    f"from text (pad_token_id={pad}, bos and eos {ends}). Pass the `attention_mask` that the "
                    "tokenizer returns."
                )
        if mask.dim() != 2:
            raise ValueError(
                f"`attention_mask` has {mask.dim()} dimensions; to find each row's last token it must be (batch_size, "
                "sequence_length). With a mask of another shape, say where to read by `read_index`."
            )
        expected = (rows, length + (0 if cache is None else cache.get_seq_length()))
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"`attention_mask` is {tuple(mask.shape)}; the batch, cached tokens included, is {expected}. Pass a "
                "mask with a number for each of them."
            )
        mask = (mask != 0).long()
        real = mask[:, -length:].any(-1) if length else mask.new_zeros(rows)
        if not torch.compiler.is_compiling() and not real.all():
            row = int(real.long().argmin())
            raise ValueError(f"Row {row} of the batch has no token: `attention_mask` is zero everywhere in it.")
        return mask


# ------------------------------------------------------------------------------------------------------ loading checks


def _among(token, ends):
    return any(token in (end if isinstance(end, (list, tuple)) else [end]) for end in ends)


def _load_base(base, load_kwargs):
    """Load the causal language model `base` and refuse one that comes with weights missing."""
    hub = {name: load_kwargs[name] for name in HUB_ARGUMENTS if load_kwargs.get(name) is not None}
    if _base_of_adapter(base, hub) is not None:
        raise ValueError(
            f"'{base}' is an adapter. Load it with peft on its language model, merge it (`merge_and_unload()`), and "
            "pass the language model you get."
        )
    config = AutoConfig.from_pretrained(base, trust_remote_code=load_kwargs.get("trust_remote_code"), **hub)
    _refuse_base(config, f"'{base}'")
    if any("Classification" in name for name in config.architectures or ()):
        raise ValueError(
            f"'{base}' holds a classifier ({config.architectures[0]}), whose head would be dropped. Pass the causal "
            "language model it was made from; to start from its body all the same, load it with AutoModelForCausalLM "
            "and pass the live model."
        )
    lm, info = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True, **load_kwargs)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"'{base}' lacks {len(missing)} weights of {type(lm).__name__}, among them {missing[:3]}: they would be "
            "random. A base must be a complete causal language model; check that the folder holds one and that its "
            "config.json belongs to its weights."
        )
    return lm


def _refuse_base(config, name):
    """Refuse, before anything is built, a configuration that is not a text-only decoder's."""
    kind = f"{name} ({config.model_type})"
    if config.model_type == GRMConfig.model_type:
        raise ValueError(f"{kind} is a reward model already: load it with `from_pretrained`, or pass its `.lm`.")
    if config.get_text_config() is not config and not getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{kind} is multimodal: its configuration nests that of its text model. A reward model is made from a "
            "text-only language model. Load the complete model as `full` and copy its text model out: "
            "`lm = AutoModelForCausalLM.from_config(full.config.get_text_config())`, "
            "`lm.base_model.load_state_dict(full.get_decoder().state_dict())`, "
            "`lm.get_output_embeddings().load_state_dict(full.get_output_embeddings().state_dict())`; then pass `lm` "
            "to `GRMForSequenceClassification.from_base`."
        )
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    seq2seq = getattr(config, "is_encoder_decoder", False)
    if encoder or seq2seq or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{kind} is no decoder that AutoModelForCausalLM knows. A reward model is made from a causal language "
            "model, whose last token has seen the whole text: pass one, such as Llama, Qwen, Gemma, Mistral or GPT-2."
        )


def _base_of_adapter(path, hub):
    """What an adapter says it was trained on; `None` for a folder or repository that holds a model."""
    folder = os.path.join(path, hub.get("subfolder", ""))
    if os.path.exists(os.path.join(folder, "config.json")):
        if os.path.exists(os.path.join(folder, "adapter_config.json")):
            raise ValueError(
                f"'{folder}' holds both a model and an adapter (config.json and adapter_config.json): move one away."
            )
        return None
    file = find_adapter_config_file(path, **{name: value for name, value in hub.items() if name != "proxies"})
    if file is None:
        return None
    with open(file, encoding="utf-8") as stream:
        return json.load(stream).get("base_model_name_or_path") or ""


def _require_grm(path, adapter, hub):
    """Refuse, before anything is built, a configuration that is not a reward model's."""
    if adapter is None:
        GRMConfig.get_config_dict(path, **hub)
        return
    said = "does not say which reward model it was trained on"
    error = None
    if path:
        said = f"says that it was trained on '{path}', which is no reward model that can be loaded from here"
        try:
            GRMConfig.get_config_dict(path, **hub)
            return
        except (OSError, ValueError) as caught:
            error = caught
    raise ValueError(
        f"The adapter '{adapter}' {said}. Load the reward model it belongs to with `from_pretrained`, then "
        "the adapter with `peft.PeftModel.from_pretrained(model, adapter)`."
    ) from error


def _load_adapter(model, adapter, name, hub):
    """Put an adapter into `model`, by peft itself: transformers (5.0 to at least 5.12) leaves out the head that the
    adapter brings, and then reports on the adapter only, not on the model below."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ImportError(f"'{adapter}' is an adapter: to load it, `pip install peft`.") from error
    config = PeftConfig.from_pretrained(adapter, **hub)
    config.inference_mode = True
    wrapped = PeftModel(model, config, name)  # changes the layers of `model` itself
    try:
        report = wrapped.load_adapter(adapter, name, torch_device=str(model.device), **hub)
    except (KeyError, RuntimeError) as error:  # the head, or another module that it brings whole
        raise ValueError(
            f"'{adapter}' does not fit its adapter_config.json and the reward model below, and was not loaded: it "
            f"lacks {error}. Restore the files as `save_pretrained` wrote them."
        ) from error
    own = [key for key, _ in wrapped.named_parameters() if name in key.split(".")]
    missing = [key.removeprefix("base_model.model.") for key in own if key in report.missing_keys]
    _check_loaded(adapter, dict(missing_keys=missing, unexpected_keys=report.unexpected_keys, mismatched_keys=()))
    model._hf_peft_config_loaded = True


def _check_loaded(path, info, allow_missing_head=False):
    """Refuse a model that `from_pretrained` reports as incomplete, or whose file holds more than the model took."""
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    shapes = sorted(info["mismatched_keys"])  # (key, shape in the file, shape in the model); in transformers 4 the key
    head = [key for key in missing if key.startswith("score.")]
    body = [key for key in missing if not key.startswith("score.")]
    if not shapes and not unexpected and not body and (allow_missing_head or not head):
        return
    parts = [f"'{path}' does not fit its config.json and was not loaded."]
    if head:
        parts.append(f"The reward head lacks {head}, which would be random.")
    if body:
        parts.append(f"The language model lacks {_some(body)}, which would be random.")
    if shapes:
        found = [
            shape if isinstance(shape, str) else f"{shape[0]} {tuple(shape[1])}, not {tuple(shape[2])}"
            for shape in shapes
        ]
        parts.append(f"Of another shape than config.json says: {_some(found)}.")
    if unexpected:
        parts.append(f"The file holds weights that the model has no place for: {_some(unexpected)}.")
    if missing and unexpected:
        parts.append("Were the missing ones renamed?")
    if head and not (body or shapes or unexpected):
        parts.append("To train a new head on this body, pass `allow_missing_head=True`.")
    else:
        parts.append("Restore the files as `save_pretrained` wrote them.")
    raise ValueError(" ".join(parts))


def _some(names):
    return f"{names[:5]}{' and more' if len(names) > 5 else ''}"
