"""Configuration of a Generalizable Reward Model: the base's text configuration, the reward head, and every policy that
a score depends on (beginning and end tokens, maximum length, scale). One folder thus gives one number.

This file is shipped to the Hub as it is, so it imports only transformers and the heads.
"""

import copy
import json
import math
import os

import transformers
from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import cached_file

from .heads_grm import COMBINERS


AUTO_MAP = {
    "AutoConfig": "configuration_grm.GRMConfig",
    "AutoModel": "modeling_grm.GRMForSequenceClassification",
    "AutoModelForSequenceClassification": "modeling_grm.GRMForSequenceClassification",
}
TRANSFORMERS_4 = transformers.__version__.startswith("4.")  # rewardbench loads a model with it
CHECKED_ON_4 = (
    *("bloom", "cohere", "falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral"),
    *("mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3"),
)
HEAD_TYPES = ("mlp", "linear", "bnrm")
BOS_POLICIES = ("single", "double")
# How a text is read, and the scale of its reward. They travel with an export, and in a file beside an adapter, which
# has no config.json.
POLICIES = ("bos_policy", "max_sequence_length", "overlength", "reward_mean", "reward_std", "reward_temperature")
ADAPTER_POLICIES = "adapter_policies.json"


def save_policies(config, folder):
    """Write `POLICIES` of a configuration beside an adapter."""
    with open(os.path.join(folder, ADAPTER_POLICIES), "w", encoding="utf-8") as stream:
        stream.write(json.dumps({name: getattr(config, name) for name in POLICIES}, indent=2) + "\n")


def take_policies(config, adapter, hub=None):
    """Set in a configuration the `POLICIES` that lie beside an adapter (folder or Hub id). Without the file, which
    only this package writes, the configuration stays as it is."""
    hub = {name: value for name, value in (hub or {}).items() if name != "proxies"}
    for kind in ("missing_entries", "connection_errors"):
        hub[f"_raise_exceptions_for_{kind}"] = False
    file = cached_file(adapter, ADAPTER_POLICIES, **hub)
    if file is not None:
        try:
            with open(file, encoding="utf-8") as stream:
                stored = dict(json.load(stream))
        except (TypeError, ValueError) as error:
            raise ValueError(f"'{file}' cannot be read ({error}). Copy it again, or delete it.") from None
        for name in POLICIES:
            setattr(config, name, stored.get(name, getattr(config, name)))


def _text_property(name):
    """A property of the wrapper that reads and writes the same name of `text_config`."""

    def get(self):
        return getattr(self.text_config, name)

    def set(self, value):
        setattr(self.text_config, name, value)

    return property(get, set, doc=f"`text_config.{name}`.")


def as_in_transformers_4(fields):
    """The fields of a text configuration as transformers 4 reads them. transformers 4 does not know the fields of 5
    for rotary embeddings and kinds of layers: it would use a default and silently give a different score. `ValueError`
    if the fields cannot be translated, or if nobody has checked the translation."""
    fields = dict(fields)
    kind, layers = fields["model_type"], fields.get("layer_types") or []
    rope = fields.pop("rope_parameters", None) or {}
    period = {"gemma2": 2, "gemma3_text": 6}.get(kind, 1)
    usual = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(len(layers))]
    if rope.keys() == {"full_attention", "sliding_attention"} and kind == "gemma3_text":
        fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        known = rope["sliding_attention"]["rope_type"] == "default"
        rope = rope["full_attention"]
    else:
        known = not any(isinstance(value, dict) for value in rope.values())
    rope = dict(rope)
    known = known and rope.get("rope_type", "default") in ("default", "linear", "dynamic", "yarn", "llama3")
    if rope.get("rope_type") == "yarn":
        longest = rope.get("original_max_position_embeddings", 0) * rope["factor"]  # some releases of 4 assume it
        known = known and rope.get("truncate", True) and longest == fields.get("max_position_embeddings")
    if kind not in CHECKED_ON_4 or layers != usual or fields.get("use_sliding_window") or not known:
        raise ValueError(
            f"transformers {transformers.__version__} is not known to compute this model as transformers 5 does (type "
            f"{kind!r}, layers {sorted(set(layers))}, rotary embedding {rope}). Load it with transformers 5."
        )
    if rope:
        for name, of_neox in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
            if name in rope:
                fields[of_neox if kind == "gpt_neox" else name] = rope.pop(name)
        fields["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return fields


def check_attributes(names, weights, combiner):
    """`ValueError` for settings of attributes that do not fit together."""
    if combiner not in COMBINERS:
        raise ValueError(f"`attribute_combiner` is {combiner!r}; it must be one of {tuple(COMBINERS)}.")
    if names is None:
        if weights is not None or combiner != "sum":
            raise ValueError("`attribute_weights` and `attribute_combiner` combine attributes: set `attribute_names`.")
        return
    strings = isinstance(names, (list, tuple)) and all(isinstance(name, str) and name for name in names)
    if not strings or not names or len(set(names)) < len(names):
        raise ValueError(f"`attribute_names` is {names!r}; it must be a list of different names, at least one.")
    if weights is None and combiner != "sum":
        raise ValueError(
            f"attribute_combiner={combiner!r} has no weights, so the reward is not made of attributes. Set "
            "`attribute_weights` to a number for each attribute, or to 'gate'."
        )
    if weights is None or (isinstance(weights, str) and weights == "gate"):
        return
    numbers = isinstance(weights, (list, tuple)) and all(
        isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight)
        for weight in weights
    )
    if not numbers or len(weights) != len(names):
        raise ValueError(
            f"`attribute_weights` is {weights!r}; it must be None, 'gate', or a finite number for each of "
            f"{len(names)} attributes."
        )
    if not COMBINERS[combiner].negative and (min(weights) < 0 or not sum(weights) > 0):
        raise ValueError(
            f"`attribute_weights` is {weights!r}; a {combiner} mean takes weights of at least 0, and one above 0."
        )


class GRMConfig(PretrainedConfig):
    r"""
    Configuration of [`GRMForSequenceClassification`].

    Args:
        text_config ([`~transformers.PretrainedConfig`] or `dict`, *optional*):
            Configuration of the base's complete causal language model. It is copied. Defaults to that of `"llama"`.
        head_type (`str`, *optional*, defaults to `"mlp"`):
            Reward head: `"mlp"` (the paper's: `head_num_layers` of Linear and ReLU, then Linear to one number),
            `"linear"` (one bias-free Linear, what stock sequence classifiers have) or `"bnrm"` (2602.10623: a sum of
            non-negative factors with non-negative weights, which training draws at random; see `GRMBNRMHead`).
        head_hidden_size (`int`, *optional*, defaults to `1024`):
            Width of the MLP head; the number of factors of `"bnrm"`.
        head_num_layers (`int`, *optional*, defaults to `1`):
            Number of hidden layers of the MLP head. `"bnrm"` has as many before its factors, and may have none.
        head_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout on the hidden state before the head, while training. TRL's trainers set every dropout to 0 unless
            `disable_dropout=False`; the original used 0.1.
        attribute_names (`list[str]`, *optional*):
            Attributes that the model rates beside the reward, such as `["helpfulness", "verbosity"]`, by a head of the
            same type. `GRMOutput.attributes` has them in this order.
        attribute_weights (`list[float]` or `str`, *optional*):
            What the reward is made of: `None`, a head of its own; numbers in the order of the names, the attributes
            combined by these; `"gate"`, by a softmax that a further head computes from the same hidden state.
        attribute_combiner (`str`, *optional*, defaults to `"sum"`):
            How weights combine attributes: a row of `heads_grm.COMBINERS`, `"sum"`, `"geometric"` or `"harmonic"`.
        bos_policy (`str`, *optional*, defaults to `"single"`):
            `"single"` never doubles the beginning-of-sequence token. `"double"` is for checkpoints trained as the
            original: rendered chat text is tokenised with special tokens.
        max_sequence_length (`int`, *optional*):
            Longest token sequence that is scored, prompt and response together. Set by the trainer. `None`: no limit.
        overlength (`str`, *optional*, defaults to `"truncate_left"`):
            What scoring does with a longer one: `"truncate_left"` (the response and its terminator stay) or
            `"error"`.
        reward_mean (`float`, *optional*, defaults to `0.0`):
            Mean reward over the last evaluation set (training sets it).
        reward_std (`float`, *optional*, defaults to `1.0`):
            Standard deviation of the reward over the last evaluation set (training sets it).
        reward_temperature (`float`, *optional*, defaults to `1.0`):
            Divides a difference of rewards before the sigmoid that turns it into a probability.
        base_model (`str`, *optional*):
            Hub id of the causal language model this reward model was made from. Never a path.
        signals (`dict`, *optional*):
            What `grm eval --choose` found on a validation file: which signals of the LM head help (`names`), their
            scales, the agreement below which a comparison is abstained from (`threshold`), and the file's digest. No
            score depends on it.

    Example:

    ```python
    >>> from transformers import LlamaConfig
    >>> from grm_hf import GRMConfig

    >>> config = GRMConfig(LlamaConfig(hidden_size=64, vocab_size=100), head_hidden_size=32)
    >>> config.hidden_size, config.head_type, config.num_labels
    (64, 'mlp', 1)

    ```
    """

    model_type = "grm"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = [
        *("cache", "past_key_values", "cache_params", "hidden_states", "attentions"),
        *("lm_logits", "lm_output", "aux_loss", "router_logits", "attributes", "kl"),
    ]

    # What rewardbench, TRL, PEFT and DeepSpeed read (and write) on a model's top-level configuration. Explicit
    # properties: a `__getattr__` would let the base class act on the child's attributes while it initialises.
    vocab_size = _text_property("vocab_size")
    hidden_size = _text_property("hidden_size")
    num_hidden_layers = _text_property("num_hidden_layers")
    num_attention_heads = _text_property("num_attention_heads")
    max_position_embeddings = _text_property("max_position_embeddings")
    pad_token_id = _text_property("pad_token_id")
    bos_token_id = _text_property("bos_token_id")
    eos_token_id = _text_property("eos_token_id")
    use_cache = _text_property("use_cache")
    tie_word_embeddings = _text_property("tie_word_embeddings")
    output_hidden_states = _text_property("output_hidden_states")
    output_attentions = _text_property("output_attentions")

    def __init_subclass__(cls, **kwargs):
        if "__init__" not in cls.__dict__:
            cls.__init__ = cls.__init__  # or the base class writes one that knows nothing of ours
        super().__init_subclass__(**kwargs)
        cls._auto_class = None  # see `GRMForSequenceClassification.__init_subclass__`

    def __init__(
        self,
        text_config=None,
        head_type="mlp",
        head_hidden_size=1024,
        head_num_layers=1,
        head_dropout=0.0,
        attribute_names=None,
        attribute_weights=None,
        attribute_combiner="sum",
        bos_policy="single",
        max_sequence_length=None,
        overlength="truncate_left",
        reward_mean=0.0,
        reward_std=1.0,
        reward_temperature=1.0,
        base_model=None,
        signals=None,
        **kwargs,
    ):
        if head_type not in HEAD_TYPES:
            raise ValueError(f"`head_type` is {head_type!r}; it must be one of {HEAD_TYPES}.")
        if bos_policy not in BOS_POLICIES:
            raise ValueError(f"`bos_policy` is {bos_policy!r}; it must be one of {BOS_POLICIES}.")
        if overlength not in ("truncate_left", "error"):
            raise ValueError(f"`overlength` is {overlength!r}; to score it must be 'truncate_left' or 'error'.")
        if head_type == "mlp" and (head_num_layers < 1 or head_hidden_size < 1):
            raise ValueError(
                f"An MLP head needs at least one layer of at least one unit, found `head_num_layers={head_num_layers}`"
                f" and `head_hidden_size={head_hidden_size}`. For a head without hidden layer use head_type='linear'."
            )
        if head_type == "bnrm" and (head_num_layers < 0 or head_hidden_size < 1):
            raise ValueError(
                "A BNRM head needs at least one factor and no negative number of layers before it, found "
                f"`head_hidden_size={head_hidden_size}` and `head_num_layers={head_num_layers}`."
            )
        if head_type == "bnrm" and attribute_names is not None:
            raise ValueError("A BNRM head has no attributes: set head_type='mlp' or 'linear' for `attribute_names`.")
        check_attributes(attribute_names, attribute_weights, attribute_combiner)
        if text_config is None:
            text_config = AutoConfig.for_model("llama")
        elif isinstance(text_config, dict):
            fields = dict(text_config)
            if "model_type" not in fields:
                raise ValueError(
                    "`text_config` has no `model_type`. Pass the complete configuration of the base's causal language "
                    "model, as `AutoConfig.from_pretrained(base)` returns it."
                )
            if TRANSFORMERS_4:
                fields = as_in_transformers_4(fields)
            text_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        else:
            # The base class pushes its own attention setting into sub-configurations. So the child's is handed on, and
            # a copy is changed: otherwise a live language model would lose its causal mask (transformers 5.23).
            kwargs.setdefault("attn_implementation", text_config._attn_implementation)
            if hasattr(text_config, "_experts_implementation"):
                kwargs.setdefault("experts_implementation", text_config._experts_implementation)
            text_config = copy.deepcopy(text_config)
        labels = kwargs.pop("num_labels", None) or len(kwargs.get("id2label") or [0])
        if labels != 1:
            raise ValueError(f"A reward model gives one number, found {labels} labels. Leave `num_labels` at 1.")
        if not kwargs.get("id2label"):
            kwargs.update(id2label={0: "REWARD"}, label2id={"REWARD": 0})
        # "regression" keeps the text-classification pipeline and vLLM from putting a sigmoid on the reward.
        kwargs["problem_type"] = kwargs.get("problem_type") or "regression"
        # sentence-transformers' CrossEncoder reads this, and would put a sigmoid on the reward.
        kwargs.setdefault("sentence_transformers", {"activation_fn": "torch.nn.modules.linear.Identity"})
        kwargs["dtype"] = kwargs.get("dtype") or getattr(text_config, "dtype", None)
        auto_map = dict(kwargs.pop("auto_map", None) or {})

        self.text_config = text_config
        self.head_type = head_type
        self.head_hidden_size = head_hidden_size
        self.head_num_layers = head_num_layers
        self.head_dropout = head_dropout
        self.attribute_names = None if attribute_names is None else list(attribute_names)
        self.attribute_weights = attribute_weights
        if isinstance(attribute_weights, (list, tuple)):
            self.attribute_weights = [float(weight) for weight in attribute_weights]
        self.attribute_combiner = attribute_combiner
        self.bos_policy = bos_policy
        self.max_sequence_length = max_sequence_length
        self.overlength = overlength
        self.reward_mean = reward_mean
        self.reward_std = reward_std
        self.reward_temperature = reward_temperature
        self.signals = signals
        self.base_model = None if base_model is None or os.path.exists(base_model) else base_model
        # The base class sets its own default for what it does not get; transformers 4 does so for ids and tying too.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "output_hidden_states"):
            if hasattr(text_config, name):
                kwargs.setdefault(name, getattr(text_config, name))
        output_attentions = kwargs.pop("output_attentions", text_config.output_attentions)
        super().__init__(**kwargs)
        self.output_attentions = output_attentions
        # A class can be registered for one Auto class only, so the map names all three. The files that it names are
        # saved beside it; no repository is asked for them again.
        self.auto_map = {**auto_map, **AUTO_MAP}

    def forget_rewards(self):
        """Forget what was measured of rewards that the model no longer gives."""
        self.reward_mean, self.reward_std, self.reward_temperature, self.signals = 0.0, 1.0, 1.0, None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """The configuration file of a reward model. The file of any other model is a `ValueError`: it would otherwise
        become the default configuration, a language model of 7 billion random weights."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        path, model_type = pretrained_model_name_or_path, config.get("model_type")
        if model_type != cls.model_type:
            raise ValueError(
                f"'{path}' holds a model of type {model_type!r}, not a reward model of type 'grm': it has no reward "
                f"head. To make a reward model from it, use `GRMForSequenceClassification.from_base('{path}')` and "
                "train it."
            )
        if not config.get("text_config"):
            raise ValueError(
                f"The config.json of '{path}' has no `text_config`, the configuration of the base's language model. "
                "Restore the file as `save_pretrained` wrote it."
            )
        return config, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """The configuration from a dictionary, changed by keywords. Keywords of `text_config` are written there."""
        wanted = kwargs.pop("return_unused_kwargs", False)
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        for name in list(unused):
            if not hasattr(config, name) and hasattr(config.text_config, name):
                setattr(config.text_config, name, unused.pop(name))
        return (config, unused) if wanted else config

    def to_dict(self):
        """The configuration as a dictionary, without the path the base was loaded from."""
        output = super().to_dict()
        for name in ("output_attentions", "output_hidden_states"):  # `text_config` has them
            output.pop(name, None)
        if isinstance(output.get("text_config"), dict):
            output["text_config"].pop("_name_or_path", None)
        return output
