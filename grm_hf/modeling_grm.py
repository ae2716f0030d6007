"""A Generalizable Reward Model (Yang et al., arXiv 2406.10216): the last hidden state of one decoder feeds two heads,
the reward head `score` and the base's own LM head.

The model owns the base's *complete* causal language model as `lm`, so every family's LM head (tied or not, soft
capped, scaled, with bias) stays exact. The reward is read at the last real token of each row. The attention mask says
which token that is, not the padding id.

This file is shipped to the Hub as it is, so it imports only torch, transformers and its two neighbours (and peft, if
there is an adapter to load).
"""

import inspect
import json
import math
import os
import shutil
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
)
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple, find_adapter_config_file

from .configuration_grm import TRANSFORMERS_4, GRMConfig, check_attributes, save_policies, take_policies
from .heads_grm import GRMAttributeHead, GRMFactorWeights, build_head


# Names of the cache in releases of transformers and in families, the newest first; and its name in outputs here.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
CACHE = next(name for name in CACHE_NAMES if name in SequenceClassifierOutputWithPast.__dataclass_fields__)
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
PLACE = ("cache_dir", "gguf_file", "local_files_only", "revision", "subfolder")  # what a tokenizer is found by, too
QUANTIZED = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "hf_quantizer", "quantization_method")
SHIPPED = ("configuration_grm.py", "heads_grm.py", "modeling_grm.py")


@dataclass
class GRMOutput(SequenceClassifierOutputWithPast):
    """
    Output of [`GRMForSequenceClassification`]: the fields of a stock sequence classifier (`loss`, `logits`, the
    cache under its name in this transformers, `hidden_states`, `attentions`), and those of the language model.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
            Mean squared error between rewards and `labels`, plus `router_aux_loss_coef` times `aux_loss` if there is
            one.
        logits (`torch.FloatTensor` of shape `(batch_size, 1)`):
            Rewards, raw (no sigmoid).
        lm_logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`, *optional*):
            Next-token scores of the LM head, with `return_lm_logits=True`.
        lm_output (`Any`, *optional*):
            What `lm_fn` returned.
        aux_loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
            Load balancing loss of a mixture of experts as the family computes it, unweighted, with
            `output_router_logits=True`.
        router_logits (`tuple(torch.FloatTensor)`, *optional*):
            Router logits of each layer, with `output_router_logits=True`.
        attributes (`torch.FloatTensor` of shape `(batch_size, num_attributes)`, *optional*):
            Ratings in the order of `config.attribute_names`, if the model has attributes.
        kl (`torch.FloatTensor` of shape `(batch_size,)`, *optional*):
            In training, with `head_type="bnrm"`: the divergence of each text's factors and of the weights from
            `Gamma(1, 1)`. `loss` does not hold it.
    """

    lm_logits: torch.FloatTensor | None = None
    lm_output: object | None = None
    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple | None = None
    attributes: torch.FloatTensor | None = None
    kl: torch.FloatTensor | None = None


def last_token_positions(attention_mask):
    """Column of the last real token of each row, for left, right and no padding: `(B, T)` to `(B,)`."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (columns * (attention_mask != 0)).argmax(-1)


def computes_in(states):
    """The dtype that a forward computes `states` in: autocast's where that is on, whatever dtype they have."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


class _States:
    """The part of a decoder's output that an LM head reads: the last hidden state."""

    def __init__(self, last_hidden_state):
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index):
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name):
        return None


class _Computed:
    """A decoder that has run already: a call returns its output again."""

    def __init__(self, decoder, output):
        self._decoder, self._output = decoder, output

    def __call__(self, *args, **kwargs):
        return self._output

    def __getattr__(self, name):
        value = getattr(self._decoder, name)
        return self if isinstance(value, PreTrainedModel) else value  # OPT calls `model.decoder`


class _AfterDecoder:
    """A causal language model whose `forward` finds that its decoder has run already."""

    def __init__(self, lm, decoder_name, output):
        self._lm, self._name, self._output = lm, decoder_name, output

    def __getattr__(self, name):
        value = getattr(self._lm, name)
        return _Computed(value, self._output) if name == self._name else value


class GRMForSequenceClassification(PreTrainedModel, GenerationMixin):
    r"""
    A reward model that keeps its LM head. Make one with [`~GRMForSequenceClassification.from_base`], load one with
    [`~GRMForSequenceClassification.from_pretrained`].

    Args:
        config ([`GRMConfig`]):
            Configuration.
        lm ([`~transformers.PreTrainedModel`], *optional*):
            A live causal language model, which the reward model then owns. By default it is made from
            `config.text_config`.

    Attributes:
        lm: the base's complete causal language model.
        model: its decoder (the name that `base_model_prefix` gives, for TRL's PPO and PEFT).
        score: the reward head, `(..., hidden_size)` to `(..., 1)`, in float32 whatever the dtype of `lm`. Attributes
            are in it: `score(hidden_states, return_attributes=True)`.
        hub_arguments: what it was loaded with beside its name (`revision`, `subfolder`, ...), for its tokenizer.
    """

    hub_arguments: dict = {}

    config_class = GRMConfig
    # transformers 4 (rewardbench) looks for weights under this name; there TRL's PPO computes logits it does not use.
    base_model_prefix = "lm" if TRANSFORMERS_4 else "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # `forward` takes any argument, so Trainer would let it divide accumulated losses
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules = ["score"]
    _keep_in_fp32_modules_strict = ["score"]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # transformers would copy the file of the subclass, with all its imports; `save_pretrained` copies ours.
        cls._auto_class = None

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
                part._is_hf_initialized = True  # `post_init` would draw new weights for modules without this mark
        # One configuration object for all: a pad id that TRL writes, an attention that a user sets reach every layer.
        config.text_config = lm.config
        self.lm = lm
        self.generation_config = lm.generation_config
        self._no_split_modules = list(lm._no_split_modules or [])  # transformers 5.0 does not collect them
        self._decoder_name = _decoder_name(lm)
        self._decoder_takes = frozenset(inspect.signature(type(self.model).forward).parameters)
        self._lm_takes = frozenset(inspect.signature(type(lm).forward).parameters)
        # Not `hidden_size`, because OPT's decoder may project to another width before its head.
        self.score = build_head(config, self._read_width()).float()
        self.post_init()

    @property
    def model(self):
        return getattr(self.lm, self._decoder_name)

    @property
    def device(self):
        return _a_device(self)

    @property
    def is_gradient_checkpointing(self):
        """Whether layers are checkpointed. peft asks by this name, of which transformers 5.24 warns."""
        new = "is_activation_checkpointing"
        return getattr(self, new) if hasattr(type(self), new) else super().is_gradient_checkpointing

    @property
    def router_aux_loss_coef(self):
        """Weight of `aux_loss` in the family's own loss; `ValueError` for a family that has none."""
        for owner in (self.lm, self.config.text_config):
            if (weight := getattr(owner, "router_aux_loss_coef", None)) is not None:
                return weight
        raise ValueError(
            f"{type(self.lm).__name__} has no `router_aux_loss_coef` to weight its auxiliary loss with. Leave "
            "`output_router_logits` off."
        )

    @classmethod
    def is_custom_code(cls):
        # transformers assumes that the initialisation of custom code overwrites loaded weights. In the whole tree it
        # skips every module without weights of its own, also Falcon-H1's decoder, which fills its layers' buffers.
        return False

    @classmethod
    def _can_set_experts_implementation(cls):
        return True  # transformers looks for experts in this file; `lm` says whether it has them

    def set_experts_implementation(self, experts_implementation):
        """As the base sets it, or refuses it."""
        if isinstance(experts_implementation, dict):
            experts_implementation = experts_implementation.get("text_config", experts_implementation.get(""))
        self.lm.set_experts_implementation(experts_implementation)
        self.config._experts_implementation_internal = self.lm.config._experts_implementation

    # ------------------------------------------------------------------------------------------------- making, loading

    @classmethod
    def from_base(
        cls,
        base,
        head_type="mlp",
        head_hidden_size=1024,
        head_num_layers=1,
        head_dropout=0.0,
        attribute_names=None,
        attribute_weights=None,
        attribute_combiner="sum",
        **load_kwargs,
    ):
        r"""
        Make a reward model from a causal language model. Its weights and LM head stay as they are. The reward
        head is new and random: train it.

        Args:
            base (`str` or [`~transformers.PreTrainedModel`]):
                Hub id or folder of a causal language model of any decoder family, or a live one (which the reward
                model then owns).
            head_type (`str`, *optional*, defaults to `"mlp"`):
                See [`GRMConfig`], also for `head_hidden_size`, `head_num_layers`, `head_dropout`, `attribute_names`,
                `attribute_weights` and `attribute_combiner`.
            **load_kwargs:
                Passed to `AutoModelForCausalLM.from_pretrained` (`dtype`, `revision`, `device_map`,
                `quantization_config`, `attn_implementation`, ...).

        Returns:
            [`GRMForSequenceClassification`].

        Raises:
            `ValueError`: the base is a reward model already, multimodal, an encoder, a classifier or an adapter, or it
            lacks weights.
        """
        base_model = labels = None
        if isinstance(base, torch.nn.Module):
            if load_kwargs:
                raise ValueError(
                    f"`base` is a live model, so {sorted(load_kwargs)} cannot be applied. Pass them when you load it."
                )
            lm = base
        else:
            base_model = os.fspath(base)
            labels = load_kwargs.pop("num_labels", None)
            lm = _load_base(base_model, load_kwargs)
        if getattr(lm, "peft_config", None):
            raise ValueError(
                "`base` carries an adapter. Merge it (`merge_and_unload()`) and pass the language model you get."
            )
        if type(lm).__module__.startswith("transformers_modules."):
            raise ValueError(
                f"{type(lm).__name__} is code that its repository brought. A reward model is saved with a language "
                "model that transformers itself has: pass a base of a type that it knows."
            )
        _refuse_base(lm.config, type(lm).__name__)
        if lm.get_output_embeddings() is None:
            raise ValueError(
                f"{type(lm).__name__} has no LM head, which GRM keeps and trains. Load the base with "
                "AutoModelForCausalLM, not with AutoModel or a classification class."
            )
        config = GRMConfig(
            text_config=lm.config,
            head_type=head_type,
            head_hidden_size=head_hidden_size,
            head_num_layers=head_num_layers,
            head_dropout=head_dropout,
            attribute_names=attribute_names,
            attribute_weights=attribute_weights,
            attribute_combiner=attribute_combiner,
            dtype=lm.dtype,
            base_model=base_model,
            num_labels=labels,  # refuses all but 1
        )
        model = cls(config, lm=lm)
        model.hub_arguments = _place(load_kwargs)
        model.score.to(_a_device(lm))
        for name in QUANTIZED:
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
        Load a saved reward model, or the folder of an adapter trained on one. Arguments are those of
        [`~transformers.PreTrainedModel.from_pretrained`]. A weight that is missing, has another shape or has no place
        in the model is an error.

        Args:
            pretrained_model_name_or_path (`str`):
                Hub id or folder.
            allow_missing_head (`bool`, *optional*, defaults to `False`):
                Accept a checkpoint without a reward head; the head is then random. Any other missing weight is still
                refused.

        Raises:
            `ValueError`: the folder holds another kind of model, or weights that do not fit.
        """
        path = pretrained_model_name_or_path
        adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
        adapter_name = kwargs.pop("adapter_name", "default")
        adapter = adapter_kwargs.pop("_adapter_model_path", None)  # set by an Auto class; `path` is then the base
        if path is not None:
            path = os.fspath(path)
            hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
            base = _base_of_adapter(path, hub)
            if adapter is None and base is not None:
                adapter, path = path, cls.find_base(base, path)
                adapter_kwargs = {**hub, **adapter_kwargs}
                for name in ("revision", "subfolder"):  # the adapter's
                    hub.pop(name, None)
                    kwargs.pop(name, None)
            _require_grm(path, adapter, hub)
            _refuse_two_sets(os.path.join(path, hub.get("subfolder", "")))
        # Different shapes are reported below, with all other faults and with what to do.
        kwargs["ignore_mismatched_sizes"] = True
        model, info = super().from_pretrained(path, *model_args, output_loading_info=True, **kwargs)
        _check_loaded(path, info, allow_missing_head)
        model.hub_arguments = _place(kwargs)
        if adapter is not None:
            _load_adapter(model, os.fspath(adapter), adapter_name, adapter_kwargs)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, is_main_process=True, **kwargs):
        """As [`~transformers.PreTrainedModel.save_pretrained`]. A subclass that is not registered with an Auto class
        is saved with the code of this class, because other processes do not know the subclass. An adapter that
        [`~GRMForSequenceClassification.from_pretrained`] loaded is saved as peft saves it."""
        if (adapted := self.__dict__.get("_adapted")) is not None and not kwargs.get("push_to_hub"):
            if "default" not in adapted.peft_config:
                raise ValueError(
                    f"The adapter is called {', '.join(map(repr, adapted.peft_config))}, and peft would save it in a "
                    "folder of that name, where no loader looks. Load it without `adapter_name`, and save that."
                )
            adapted.save_pretrained(os.fspath(save_directory), is_main_process=is_main_process)
            if is_main_process:
                save_policies(self.config, save_directory)
            return
        ours = self._auto_class is None and type(self) is not GRMForSequenceClassification
        if ours and kwargs.get("push_to_hub"):
            raise ValueError(f"{type(self).__name__} is a subclass. Save it to a folder, and push that folder.")
        before = _weight_files(save_directory)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:  # left by an earlier save in another number of files; transformers does not remove them
            after = _weight_files(save_directory)
            if len(after) == 2:
                for name in [name for name in after if after[name] == before.get(name)]:
                    os.remove(os.path.join(save_directory, name))
        if ours and is_main_process:
            for name in SHIPPED:
                shutil.copy(os.path.join(os.path.dirname(__file__), name), save_directory)

    @staticmethod
    def find_base(name, adapter):
        """Path or id of the base that the adapter in a folder names. The package grm_hf looks in one more place."""
        return name

    def _init_weights(self, module):
        # torch's own defaults, as in the original head. `torch.nn.init` leaves loaded weights alone. Only the reward
        # head gets here: the language model initialises itself.
        if isinstance(module, GRMFactorWeights):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
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
        """Next-token scores of last hidden states, as the base's own forward computes them: `(..., hidden_size)` to
        `(..., vocab_size)`. [`~GRMForSequenceClassification.lm_head_is_exact`] says whether the base needs nothing
        else for them."""
        shape = hidden_states.shape
        out = self._after_decoder(_States(hidden_states.reshape(1, math.prod(shape[:-1]), shape[-1])))
        return out.logits.reshape(*shape[:-1], out.logits.shape[-1])

    def _after_decoder(self, output, **arguments):
        """Output of the base's own forward, from the output of its decoder."""
        arguments = {"output_router_logits": False, "return_dict": True, **arguments}
        arguments = {name: value for name, value in arguments.items() if name in self._lm_takes}
        view = _AfterDecoder(self.lm, self._decoder_name, output)
        return type(self.lm).forward(view, inputs_embeds=output.last_hidden_state, **arguments)

    @torch.no_grad()
    def lm_head_is_exact(self):
        """Whether [`~GRMForSequenceClassification.lm_logits`] equals the base's own forward (takes one run)."""
        input_ids = torch.arange(4, device=self.device)[None] % self.config.vocab_size
        inputs = dict(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
        training = self.lm.training
        self.lm.eval()
        try:
            theirs = self.lm(**inputs).logits
            ours = self.lm_logits(self.model(**inputs).last_hidden_state).to(theirs)
        finally:
            self.lm.train(training)
        tolerance = 1e-4 if computes_in(theirs) in (torch.float32, torch.float64) else 2e-2
        return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())

    def freeze_lm_head(self):
        """Stop gradients of the LM head, for losses that do not use it: under DDP a parameter without a gradient is an
        error. A tied LM head is left alone, because it is the input embedding."""
        head = self.get_output_embeddings()
        if head.weight is not self.get_input_embeddings().weight:
            head.requires_grad_(False)

    def generate(self, *args, **kwargs):
        """Generate text with the LM head, exactly as the base would."""
        self.lm.generation_config = self.generation_config
        return self.lm.generate(*args, **kwargs)

    def generate_batch(self, *args, **kwargs):
        """As [`~GRMForSequenceClassification.generate`], by continuous batching."""
        self.lm.generation_config = self.generation_config
        return self.lm.generate_batch(*args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """The manager of `generate_batch`, on the base."""
        self.lm.generation_config = self.generation_config
        return self.lm.init_continuous_batching(*args, **kwargs)

    def continuous_batching_context_manager(self, *args, **kwargs):
        """The manager of `generate_batch`, on the base, for a `with` statement."""
        self.lm.generation_config = self.generation_config
        return self.lm.continuous_batching_context_manager(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return self.lm.prepare_inputs_for_generation(*args, **kwargs)

    # --------------------------------------------------------------------------------------------------------- forward

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
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
        past_key_values=None,
        **kwargs,
    ):
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids; or `inputs_embeds`, `(batch_size, sequence_length, hidden_size)`.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Non-zero at real tokens; with a cache it covers the cached tokens too. Without a mask, leading and
                trailing padding ids count as padding. If the padding id is missing, or also begins or ends texts, a
                single row counts as unpadded and a batch is refused.
            cache ([`~transformers.Cache`], *optional*):
                Keys and values of the tokens before, for a decoder that keeps them. `past_key_values`, the name before
                transformers 5.24, works too.
            labels (`torch.FloatTensor` of shape `(batch_size,)`, *optional*):
                Target rewards, for regression.
            read_index (`torch.LongTensor` of shape `(num_sequences,)`, *optional*):
                Where rewards are read, as positions in the flattened `(batch_size * sequence_length)` hidden states,
                for layouts with several sequences in a row. `logits` is then `(num_sequences, 1)`. (A list comes from
                transformers' continuous batching, and is passed to the decoder.)
            return_lm_logits (`bool`, *optional*, defaults to `False`):
                Also compute the LM logits of the positions that `logits_to_keep` selects.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to `0`):
                As in transformers: the number of last positions, or an index; 0 means all.
            lm_fn (`Callable`, *optional*):
                Called as `lm_fn(hidden_states, model)` with the last hidden states `(batch_size, sequence_length,
                hidden_size)`; its result is `lm_output`. Compute losses on the LM head here, inside the forward that
                DDP and FSDP wrap.

        Returns:
            [`GRMOutput`].
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("Pass `input_ids` or `inputs_embeds`.")
        if given.shape[0] == 0:
            none, names = given.new_zeros(0, self._read_width(), dtype=torch.float32), self.config.attribute_names
            attributes = None if names is None else given.new_zeros(0, len(names), dtype=torch.float32)
            return GRMOutput(logits=self.score.forward(none), attributes=attributes)
        if cache is not None and past_key_values is not None:
            raise ValueError("`cache` and `past_key_values` are two names of one argument. Pass one of them.")
        cache = cache if cache is not None else past_key_values
        if isinstance(read_index, list):
            kwargs["read_index"], read_index = read_index, None
        if read_index is None:
            attention_mask = self._readable_mask(input_ids, given, attention_mask, cache, position_ids)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            if "position_ids" in self._decoder_takes:
                # Left padding would shift absolute positions (GPT-2, OPT).
                position_ids = ((attention_mask != 0).long().cumsum(-1) - 1).clamp(min=0)[:, -given.shape[1] :]
        arguments = dict(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        arguments["use_cache"] = bool(use_cache) if cache is None else use_cache
        # The configuration decides about what is left out; the decoder takes `None` for a no.
        optional = dict(
            position_ids=position_ids, output_attentions=output_attentions, output_hidden_states=output_hidden_states
        )
        arguments |= {name: value for name, value in optional.items() if value is not None}
        if cache is not None:
            name = next((name for name in CACHE_NAMES if name in self._decoder_takes), None)
            if name is None:
                raise ValueError(f"{type(self.model).__name__} takes no cache. Pass the whole text.")
            arguments[name] = cache
        out = self.model(**arguments, return_dict=True)
        hidden, router_logits = out.last_hidden_state, getattr(out, "router_logits", None)

        if read_index is not None:
            read = hidden.flatten(0, 1)[read_index]
        else:
            length = hidden.shape[1]
            at = length - 1 if attention_mask is None else last_token_positions(attention_mask[:, -length:])
            read = hidden[torch.arange(hidden.shape[0], device=hidden.device), at]
        rewards, attributes, kl = self._heads(read)
        lm_logits = aux_loss = None
        if return_lm_logits or router_logits is not None:
            mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
            after = self._after_decoder(
                out,
                attention_mask=mask,
                output_router_logits=router_logits is not None,
                logits_to_keep=logits_to_keep if return_lm_logits else 1,
            )
            lm_logits, aux_loss = after.logits if return_lm_logits else None, getattr(after, "aux_loss", None)
        loss = None
        if labels is not None:
            loss = nn.functional.mse_loss(rewards.squeeze(-1), labels.to(rewards.dtype).view(-1))
            if aux_loss is not None:
                loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device)
        return GRMOutput(
            loss=loss,
            logits=rewards,
            lm_logits=lm_logits,
            lm_output=None if lm_fn is None else lm_fn(hidden, self),
            **{CACHE: next((value for name, value in out.items() if name in CACHE_NAMES), None)},
            hidden_states=getattr(out, "hidden_states", None),
            attentions=getattr(out, "attentions", None),
            aux_loss=aux_loss,
            router_logits=router_logits,
            attributes=attributes,
            kl=kl,
        )

    def _heads(self, read):
        """Of hidden states the rewards `(n, 1)`, the attributes `(n, K)` and the divergence `(n,)`, if there are."""
        if self.config.attribute_names is not None:
            return *self.score(read, return_attributes=True), None
        if self.training and self.config.head_type == "bnrm":
            rewards, kl = self.score(read, return_kl=True)
            return rewards, None, kl
        return self.score(read), None, None

    def fix_attribute_weights(self, weights):
        """
        Make the reward the sum of the attributes by these weights, in the model and its configuration. A reward head
        beside the attributes, or a gate, is dropped. So are mean, standard deviation and temperature of the rewards
        before, and the choice of signals.

        Args:
            weights (`list[float]`):
                A number for each attribute, in the order of `config.attribute_names`.
        """
        if not isinstance(self.score, GRMAttributeHead):
            raise ValueError(
                "The model has no attributes, or an adapter that carries its head. Merge an adapter first (`grm "
                "merge`): its base keeps the configuration."
            )
        check_attributes(self.config.attribute_names, weights := [*map(float, weights)], "sum")
        self.score.fix(weights)
        self.config.attribute_weights, self.config.attribute_combiner = weights, "sum"
        self.config.forget_rewards()

    def _read_width(self):
        return self.get_output_embeddings().weight.shape[-1]

    def _readable_mask(self, input_ids, given, mask, cache, position_ids):
        """The mask `(B, cached + T)` of 0 and 1 that says where each row ends; `None` for a single unpadded row."""
        rows, length = given.shape[:2]
        if mask is None:
            pad, ends = self.config.pad_token_id, (self.config.bos_token_id, self.config.eos_token_id)
            if input_ids is not None and cache is None and pad is not None and not _among(pad, ends):
                real = input_ids != pad
                mask = real.cumsum(-1).bool() & real.flip(-1).cumsum(-1).flip(-1).bool()
            elif rows > 1:
                raise ValueError(
                    f"A batch of {rows} rows without `attention_mask`: rows may be padded, and nothing tells padding "
                    f"from text (pad_token_id={pad}, bos and eos {ends}). Pass the `attention_mask` that the "
                    "tokenizer returns."
                )
            if position_ids is not None and cache is None:
                _refuse_packed(position_ids, mask)
            if mask is None:
                return None
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
        # transformers 5.0 does not mark RecurrentGemma.
        recurrent = getattr(self.lm, "_is_stateful", False) or self.config.text_config.model_type == "recurrent_gemma"
        if recurrent and not torch.compiler.is_compiling() and not mask[:, 0].all() and not self._skips_left_padding():
            raise ValueError(
                f"{type(self.model).__name__} is recurrent and reads padding on the left as text, which changes the "
                "reward. Pad on the right: `tokenizer.padding_side = 'right'`."
            )
        return mask

    @torch.no_grad()
    def _skips_left_padding(self):
        """Whether padding on the left leaves the hidden states of a text unchanged (two runs, once for each model)."""
        if not hasattr(self, "_left_padding_is_skipped"):
            ids = torch.arange(8, device=self.device)[None] % self.config.vocab_size
            training = self.lm.training
            self.lm.eval()
            try:
                alone = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
                mask = torch.tensor([[0] * 4 + [1] * 8], device=ids.device)
                padded = self.model(input_ids=torch.cat([ids[:, :4], ids], 1), attention_mask=mask, use_cache=False)
            finally:
                self.lm.train(training)
            theirs, ours = alone.last_hidden_state, padded.last_hidden_state[:, 4:]
            tolerance = 1e-4 if computes_in(theirs) in (torch.float32, torch.float64) else 5e-2
            self._left_padding_is_skipped = bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())
        return self._left_padding_is_skipped


def _decoder_name(lm):
    """Name of the part of a causal language model that turns token ids into hidden states."""
    embeddings = lm.get_input_embeddings()
    return next(name for name, part in lm.named_children() if any(module is embeddings for module in part.modules()))


def _a_device(module):
    """A device on which `module` takes inputs, even if its first weights are offloaded to disk."""
    devices = [parameter.device for parameter in module.parameters()]
    last = torch.device("cpu") if hasattr(module, "_hf_hook") else devices[0]  # accelerate takes inputs from anywhere
    return next((device for device in devices if device.type != "meta"), last)


def _refuse_packed(position_ids, mask):
    """Refuse rows that hold several texts without saying where each ends."""
    breaks = position_ids[..., 1:] - position_ids[..., :-1] != 1
    if mask is not None:
        breaks = breaks & mask[:, 1:] & mask[:, :-1]
    if breaks.any():
        raise ValueError(
            "`position_ids` are not consecutive, and there is no `attention_mask`. "
            "A row that holds several texts needs `read_index`, the position of each text's last token, and gives a "
            "reward for each; a row that holds one text needs its `attention_mask`."
        )


# ------------------------------------------------------------------------------------------------------ loading checks


def _among(token, ends):
    return any(token in (end if isinstance(end, (list, tuple)) else [end]) for end in ends)


def _load_base(base, load_kwargs):
    """Load the causal language model `base`; refuse it if weights are missing."""
    hub = {name: load_kwargs[name] for name in HUB_ARGUMENTS if load_kwargs.get(name) is not None}
    if _base_of_adapter(base, hub) is not None:
        raise ValueError(
            f"'{base}' is an adapter. Load it with peft on its language model, merge it (`merge_and_unload()`), and "
            "pass the language model you get."
        )
    gguf_file = load_kwargs.get("gguf_file")
    if gguf_file is None:
        _refuse_own_code(base, load_kwargs.get("trust_remote_code"), hub)
        config = AutoConfig.from_pretrained(base, **hub)
    else:
        config = AutoConfig.from_pretrained(base, gguf_file=gguf_file, **hub)
    _refuse_base(_judged(config), f"'{base}'")
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
    if gguf_file is not None and load_kwargs.get("quantization_config") is None:
        # transformers has dequantised the weights. It still calls the model quantised, and then cannot save it.
        for owner in (lm, lm.config):
            for name in (*QUANTIZED, "quantization_config", "_is_quantized"):
                owner.__dict__.pop(name, None)
    return lm if _judged(lm.config) is lm.config else _text_of(lm, base)


def _refuse_own_code(base, trust_remote_code, hub):
    """Refuse a base whose code is not transformers' own: a saved reward model could not carry it."""
    fields, _ = PretrainedConfig.get_config_dict(base, **hub)
    kind, brings = fields.get("model_type"), fields.get("auto_map") or {}
    known = kind in CONFIG_MAPPING
    if kind == GRMConfig.model_type or not {"AutoConfig", "AutoModelForCausalLM"} & set(brings):
        return
    if trust_remote_code or not known:
        raise ValueError(
            f"'{base}' brings modelling code of its own (`auto_map` in its config.json). A reward model is saved with "
            "the code of GRM and with a language model that transformers itself has, so that it loads anywhere. "
            + (
                f"transformers knows the type {kind!r}: leave `trust_remote_code` out."
                if known
                else f"transformers does not know the type {kind!r}: pass a base of a type that it knows."
            )
        )


def _judged(config):
    """The configuration of the language model in a folder: for a multimodal folder that of its text model, if
    AutoModelForCausalLM knows both."""
    text = config.get_text_config()
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING
    return text if known and not getattr(config, "is_encoder_decoder", False) else config


def _text_of(full, base):
    """The text model of a multimodal model, with the same weights."""
    decoder = full.get_decoder()
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(decoder.config, dtype=full.dtype)
    name = _decoder_name(lm)
    if type(getattr(lm, name)) is not type(decoder):
        _refuse_base(full.config, f"'{base}'")
    setattr(lm, name, decoder)
    lm.set_output_embeddings(full.get_output_embeddings())
    if left := [name for name, part in lm.named_parameters() if part.is_meta]:
        raise ValueError(f"The text model of '{base}' has weights of its own, {_some(left)}: it cannot be taken out.")
    lm.config, lm.generation_config = decoder.config, full.generation_config
    return lm.train(full.training)


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


def _place(arguments):
    return {name: arguments[name] for name in PLACE if arguments.get(name) is not None}


def _base_of_adapter(path, hub):
    """The model that an adapter says it was trained on; `None` for a folder or repository that holds a model."""
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


def _weight_files(folder):
    """The single file of weights and the index of shards that lie in a folder, with the times they were written."""
    paths = {name: os.path.join(folder, name) for name in ("model.safetensors", "model.safetensors.index.json")}
    return {name: os.stat(path).st_mtime_ns for name, path in paths.items() if os.path.isfile(path)}


def _refuse_two_sets(folder):
    """Refuse a folder with a single file of weights beside shards: only the first would be loaded, and it may be the
    older one."""
    if len(_weight_files(folder)) < 2:
        return
    with open(os.path.join(folder, "model.safetensors.index.json"), encoding="utf-8") as stream:
        shards = set(json.load(stream)["weight_map"].values())
    if any(os.path.isfile(os.path.join(folder, shard)) for shard in shards):
        raise ValueError(
            f"'{folder}' holds two sets of weights, model.safetensors and the shards that its index names. Only the "
            "first would be loaded, which may be the older one. Remove the set that does not belong there."
        )


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
    """Put an adapter into `model` with peft. transformers (5.0 to at least 5.12) would leave out the adapter's head,
    and would report on the adapter only, not on the model below."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ImportError(f"'{adapter}' is an adapter: to load it, `pip install peft`.") from error
    config = PeftConfig.from_pretrained(adapter, **hub)
    config.inference_mode = True
    config.base_model_name_or_path = model.name_or_path  # where it was found; so it says when it is saved again
    wrapped = PeftModel(model, config, name)  # changes the layers of `model` itself
    try:
        report = wrapped.load_adapter(adapter, name, torch_device=str(model.device), **hub)
    except (KeyError, RuntimeError) as error:  # the head, or another module that the adapter brings whole
        raise ValueError(
            f"'{adapter}' does not fit its adapter_config.json and the reward model below, and was not loaded: it "
            f"lacks {error}. Restore the files as `save_pretrained` wrote them."
        ) from error
    absent = set(report.missing_keys)
    # A parameter that layers share (VB-LoRA's vectors) is in the file under one of its names.
    present = {id(p) for key, p in wrapped.named_parameters(remove_duplicate=False) if key not in absent}
    own = {key: p for key, p in wrapped.named_parameters() if name in key.split(".")}
    lacking = [key for key, p in own.items() if key in absent and id(p) not in present]
    missing = [key.removeprefix("base_model.model.") for key in lacking]
    _check_loaded(adapter, dict(missing_keys=missing, unexpected_keys=report.unexpected_keys, mismatched_keys=()))
    take_policies(model.config, adapter, hub)
    model._hf_peft_config_loaded = True
    model.__dict__["_adapted"] = wrapped  # not a part of `model`: the PeftModel contains `model`


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
