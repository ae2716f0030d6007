"""Reward models of other makers, converted to ours: `grm convert`.

The names and shapes of the weights decide the layout, because config.json may be wrong (that of the authors' linear
models says `mlp`). Every weight must find a place, or nothing is written. No code of the source is run, and pickles
are read as weights only. docs/formats.md lists the layouts.
"""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from ..configuration_grm import BOS_POLICIES, POLICIES, GRMConfig
from ..folders import new_folder, readable, require_base
from ..modeling_grm import GRMForSequenceClassification
from ..native import REWARD_MODELS
from ..scoring.golden import save_golden
from .tokenizer import load_tokenizer


logger = logging.get_logger(__name__)

PICKLES = {  # downloaded only if their twins are missing
    "model*.safetensors": "pytorch_model*.bin",
    "value_head.safetensors": "value_head.bin",
    "adapter_model.safetensors": "adapter_model.bin",
}
WEIGHTS = (*PICKLES, *PICKLES.values())
TEXTS = ("*.json", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*")
# Fields of a source's configuration about its reward head and its code; ours has them elsewhere.
FOREIGN = re.compile(r"auto_map|architectures|vhead_.*|summary_dropout_prob|num_labels|id2label|label2id|problem_type")


Layer = tuple[torch.Tensor, torch.Tensor | None]  # weight and bias


class Source(NamedTuple):
    """
    What a format reads a reward head from.

    Args:
        name (`str`): Hub id or folder, for messages.
        weights (`dict[str, torch.Tensor]`): Of the head alone, by their names without what PEFT and TRL put around.
        settings (`dict`): Its config.json.
    """

    name: str
    weights: dict[str, torch.Tensor]
    settings: dict


class Format(NamedTuple):
    """
    A known format of reward models. To add one, write its function and its row.

    Args:
        name (`str`): The name that `grm convert` prints.
        head (`str`): Name of its head's weights, in front of the number of a layer.
        read (`Callable`): The layers of the head, with a ReLU between two; none if a source is not of this format.
        bos_policy (`str`): How its training read a chat.
        head_dropout (`float`): Dropout before its head while training, if its configuration does not say.
    """

    name: str
    head: str
    read: Callable[[Source], list[Layer]]
    bos_policy: str
    head_dropout: float


def _grm_authors(source: Source) -> list[Layer]:
    """Their MLP is a value head with ReLU. Their linear models have a classifier's head, and say whose they are."""
    layers = _layers(source, "v_head.summary")
    if any(name.startswith("vhead_") for name in source.settings):
        return layers or _layers(source, "score")
    return layers if len(layers) > 1 else []


def _value_head(source: Source) -> list[Layer]:
    return _layers(source, "v_head.summary")


def _reward_model(source: Source) -> list[Layer]:
    """Of vLLM and SGLang: the class says that there is a ReLU."""
    known = set(source.settings.get("architectures") or ()) & set(REWARD_MODELS)
    return _layers(source, "score") if known else []


def _classifier(source: Source) -> list[Layer]:
    layers = _layers(source, "score")
    return layers if len(layers) == 1 else []


FORMATS = (  # the first that reads something; the authors' code renders a chat, then adds special tokens again
    Format("GRM authors", "v_head.summary", _grm_authors, "double", 0.1),
    Format("value head (TRL, LLaMA-Factory)", "v_head.summary", _value_head, "single", 0.1),
    Format("Qwen2ForRewardModel, Qwen3ForRewardModel", "score", _reward_model, "single", 0.0),
    Format("classifier", "score", _classifier, "single", 0.0),
)
HEADS = sorted({form.head for form in FORMATS})
WRAPPED = {head.split(".")[0] for head in HEADS}  # as an adapter's configuration names a head
HEAD = re.compile(rf"({'|'.join(map(re.escape, HEADS))})(?:\.(\d+))?\.(weight|bias)")
# A setting that says what stands between the layers of a head.
ACTIVATION = re.compile(r".*(head|summary|score|classifier)\w*_act(ivation)?(_fn|_function)?")


@dataclass(frozen=True)
class Converted:
    """
    The result of [`convert`].

    Attributes:
        model ([`GRMForSequenceClassification`]): The converted model.
        layout (`str`): The layout of the source.
        lm_head (`str`): Where the LM head came from.
    """

    model: GRMForSequenceClassification
    layout: str
    lm_head: str


def convert(
    source: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    *,
    bos_policy: str | None = None,
    max_length: int | None = None,
    revision: str | None = None,
) -> Converted:
    r"""
    Convert a reward model of another layout and save it, with its tokenizer and golden rows.

    The weights are in memory once. The reward head computes in float32; the original rounds to the dtype of its head.

    Args:
        source (`str` or `Path`):
            Hub id or folder: a value head (`v_head.summary.*`) beside a causal language model, in the same files or in
            `value_head.safetensors`; a stock sequence or token classifier with one label; `Qwen2ForRewardModel` or
            `Qwen3ForRewardModel`; or a LoRA adapter with one of these heads.
        output (`str` or `Path`):
            Folder to write, new or empty.
        base (`str` or `Path`, *optional*):
            Hub id or folder of the causal language model below. For an adapter the default is the base that it names.
            For a classifier without an LM head (and without a tied one) it is required, and its LM head is used.
        bos_policy (`str`, *optional*):
            `"single"` or `"double"`, the BOS policy of the source's training. By default `"double"` for checkpoints of
            the GRM authors' code, `"single"` for others.
        max_length (`int`, *optional*):
            Longest sequence to score, at least 1. By default that of the source's tokenizer.
        revision (`str`, *optional*):
            Revision of `source` on the Hub.

    Returns:
        [`Converted`].

    Raises:
        `ValueError`: weights are missing, left over, of a wrong shape, or more than one head; the source needs its own
        code; `output` is not empty or is the working directory. Nothing is written then.

    Source: the value head is that of the authors' code for arXiv 2406.10216, and of TRL's `ValueHead`.
    """
    if bos_policy is not None and bos_policy not in BOS_POLICIES:
        raise ValueError(f"`bos_policy` is {bos_policy!r}; it must be one of {BOS_POLICIES}.")
    if max_length is not None and max_length < 1:
        raise ValueError(f"`max_length` is {max_length}; a sequence to score has at least 1 token.")
    with readable(source) as place, new_folder(output) as out:
        folder = _local(place, revision)
        adapter = (folder / "adapter_config.json").is_file()
        settings = _settings(folder, source, adapter)
        form, layers, names = _head(folder, str(source), settings, adapter)
        tokenizer = load_tokenizer(str(folder))
        if tokenizer is None and base is not None:
            tokenizer = load_tokenizer(str(base))
        if adapter:
            lm, base = _adapted(folder, str(source), base, tokenizer)
            lm_head = f"of the base '{base}'"
        else:
            lm, lm_head = _body(folder, str(source), settings, names, None if base is None else str(base))

        layout = f"{form.name}, {'MLP' if len(layers) > 1 else 'linear'} head{', LoRA adapter' if adapter else ''}"
        policies = {name: settings[name] for name in POLICIES if name in settings}
        policies["bos_policy"] = bos_policy or policies.get("bos_policy", form.bos_policy)
        limit = max_length or policies.get("max_sequence_length") or getattr(tokenizer, "model_max_length", None)
        policies["max_sequence_length"] = limit if limit is not None and limit < 10**9 else None  # else: not set
        spec, state = _our_head(layers, settings.get("head_hidden_size"))
        config = GRMConfig(
            text_config=lm.config,
            head_dropout=settings.get("summary_dropout_prob", form.head_dropout),  # while training only
            base_model=str(base) if base is not None else settings.get("base_model"),
            dtype=lm.dtype,
            **spec,
            **policies,
        )
        if config.pad_token_id is None and tokenizer is not None:
            config.pad_token_id = tokenizer.pad_token_id
        model = GRMForSequenceClassification(config, lm=lm)
        width = model._read_width()
        if (read := layers[0][0].shape[1]) != width:
            raise ValueError(f"The reward head of '{source}' reads {read} numbers, the language model gives {width}.")
        model.score.load_state_dict(state)
        if (text := model.config.text_config).tie_word_embeddings and not _tied(lm):
            text.tie_word_embeddings = False  # the config says tied, but the file has two different matrices
        model.eval().save_pretrained(out)
        if tokenizer is None:
            logger.warning(f"'{source}' has no tokenizer: none was saved, and no golden rows.")
        else:
            tokenizer.save_pretrained(out)
            save_golden(model, tokenizer, out)
    return Converted(model, layout, lm_head)


# --------------------------------------------------------------------------------------------------------------- files


def _local(source: str, revision: str | None) -> Path:
    """The folder, downloaded if it is a Hub id. Pickles are downloaded only if their safetensors are missing."""
    if os.path.isdir(source):
        return Path(source)
    safe = [*TEXTS, *PICKLES]
    folder = Path(snapshot_download(source, revision=revision, allow_patterns=safe))
    if pickles := [name for twin, name in PICKLES.items() if not _files(folder, twin)]:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=[*safe, *pickles]))
    return folder


def _files(folder: Path, *patterns: str) -> list[Path]:
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    return [path for path in paths if path.suffix in (".safetensors", ".bin")]


def _settings(folder: Path, source, adapter: bool) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        if adapter:
            return {}
        raise ValueError(f"'{source}' has neither config.json nor adapter_config.json: it is no model.")
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("model_type") == GRMConfig.model_type:
        raise ValueError(f"'{source}' is a GRM of this package already: there is nothing to convert.")
    if settings.get("quantization_config"):
        raise ValueError(f"'{source}' is quantised. Convert the model it was made from, and quantise that.")
    return settings


def _read(path: Path, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """The wanted tensors of a weights file."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}
        # `weights_only`: a pickle may hold code. Files of old versions of torch cannot be mapped into memory.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, SafetensorError, EOFError, IndexError, RuntimeError) as error:
        raise ValueError(f"'{path}' is torn, or holds more than weights, and is not read. ({error})") from error
    return {name: tensor for name, tensor in state.items() if wanted(name)}


def _plain(name: str) -> str:
    """A name without the prefixes of PEFT and TRL."""
    while (shorter := re.sub(r"^(base_model\.model|pretrained_model)\.(?=.*\.)", "", name)) != name:
        name = shorter
    return re.sub(r"\.modules_to_save(?=\.)|\.default(?=\.|$)", "", name)


def _twice(source, name):
    return f"'{source}' holds {name} twice, with different numbers. Remove the file that is old."


def _head(folder: Path, source: str, settings: dict, adapter: bool) -> tuple[Format, list[Layer], set[str]]:
    """The format of a source, the layers of its reward head, and the names of their weights."""
    files = _files(folder, *WEIGHTS)
    if not files:
        raise ValueError(f"'{source}' has no weights (none of {', '.join(WEIGHTS)}).")
    weights: dict[str, torch.Tensor] = {}
    for path in files:
        for name, tensor in _read(path, lambda name: bool(HEAD.fullmatch(_plain(name)))).items():
            name = _plain(name)
            if name in weights and not torch.equal(weights[name], tensor):
                raise ValueError(_twice(source, name))
            weights[name] = tensor
    if not weights:
        other = " A causal language model is no reward model: train one from it."
        if adapter:
            other = " An adapter that this package has trained is merged by `grm merge`."
        known = "` nor `".join(HEADS[::-1])
        raise ValueError(f"'{source}' has no reward head: neither `{known}` in its weights.{other}")
    parts = [HEAD.fullmatch(name) for name in weights]
    if len({(part[1], part[2] is not None) for part in parts if part}) > 1:
        there = sorted(weights)
        raise ValueError(f"'{source}' holds more than one reward head: {there}. Remove what is not the head.")
    for form in FORMATS:
        if layers := form.read(Source(source, weights, settings)):
            break
    else:
        raise ValueError(
            f"The reward head of '{source}' has several layers ({', '.join(sorted(weights))}), and nothing says what "
            f"stands between two. A GRM has ReLU there: if this head has, name one of {', '.join(REWARD_MODELS)} as "
            "`architectures` in config.json."
        )
    for name, value in settings.items():
        if len(layers) > 1 and ACTIVATION.fullmatch(name) and str(value or "relu").lower() != "relu":
            raise ValueError(
                f"The reward head of '{source}' has {value!r} between two layers (`{name}` in config.json); the head "
                "of a GRM has ReLU there, so it cannot be converted."
            )
    return form, layers, set(weights)


def _layers(source: Source, prefix: str) -> list[Layer]:
    """The layers of the head whose weights are named so, in their order; none without such weights."""
    parts = [part for name in source.weights if (part := HEAD.fullmatch(name)) and part[1] == prefix]
    numbers = sorted({int(part[2] or 0) for part in parts})
    layers = []
    for number in numbers:
        start = f"{prefix}.{number}" if parts[0][2] is not None else prefix
        if f"{start}.weight" not in source.weights:
            raise ValueError(f"'{source.name}' has {start}.bias, but no {start}.weight.")
        layers.append((source.weights[f"{start}.weight"].float(), source.weights.get(f"{start}.bias")))
    # An activation, which has no weights, stands between two layers: their numbers are even.
    shapes = [tuple(weight.shape) for weight, _ in layers]
    widths = {shape[0] for shape in shapes[:-1]} | {shape[-1] for shape in shapes[1:]}
    if any(len(shape) != 2 for shape in shapes) or numbers != list(range(0, 2 * len(layers), 2)) or len(widths) > 1:
        there = {name: tuple(tensor.shape) for name, tensor in sorted(source.weights.items())}
        raise ValueError(
            f"The reward head of '{source.name}' has an unknown form: {there}. It must be one linear layer, or "
            "layers of one width with a ReLU between two."
        )
    if layers and shapes[-1][0] != 1:
        raise ValueError(
            f"The reward head of '{source.name}' gives {shapes[-1][0]} numbers; a reward model gives one."
        )
    return layers


# ------------------------------------------------------------------------------------------------------ language model


def _no_load_report(record) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _load(folder: str | Path, source: str, config=None):
    """A causal language model, with the names that its files lack or have in excess, for [`_require`]."""
    reporter = getLogger("transformers.modeling_utils")
    reporter.addFilter(_no_load_report)
    try:
        config = config or AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            trust_remote_code=False,
            weights_only=True,
            key_mapping={r"^pretrained_model\.": ""},  # TRL's wrapper under DeepSpeed
        )
    except ValueError as error:
        raise ValueError(
            f"'{source}' is no causal language model that transformers knows; code that comes with a model is never "
            f"run here. ({error})"
        ) from error
    finally:
        reporter.removeFilter(_no_load_report)


def _require(source: str, info: dict, missing: set, spare: set):
    """Refuse weights that do not fit, by name. `missing` may be missing; `spare` belongs elsewhere."""
    left = sorted(name for name in info["unexpected_keys"] if _plain(name) not in spare)
    lacking = sorted(set(info["missing_keys"]) - missing)
    shapes = [f"{key} {tuple(there)}, not {tuple(wanted)}" for key, there, wanted in info["mismatched_keys"]]
    for names, what in (
        (lacking, "lacks weights of its language model"),
        (shapes, "has weights of another shape than its config.json says"),
        (left, "holds weights that have no place in a reward model"),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"'{source}' {what}: {names[:5]}{more}. Nothing was converted.")


def _body(folder: Path, source: str, settings: dict, head: set, base: str | None):
    kept = {name: value for name, value in settings.items() if not FOREIGN.fullmatch(name) and name not in POLICIES}
    for name in ("head_hidden_size", "base_model", "sentence_transformers", "tied_lm_head"):
        kept.pop(name, None)
    if settings.get("tied_lm_head"):
        kept["tie_word_embeddings"] = True
    if "model_type" not in kept:
        raise ValueError(f"The config.json of '{source}' has no `model_type`.")
    try:
        config = AutoConfig.for_model(kept.pop("model_type"), **kept)
    except ValueError as error:
        raise ValueError(
            f"'{source}' is of a type that transformers does not know; code that comes with a model is never run "
            f"here. ({error})"
        ) from error
    lm, info = _load(folder, source, config)
    # tied weights are not among the missing
    own = {name for name, part in lm.named_parameters() if part in set(lm.get_output_embeddings().parameters())}
    _require(source, info, own, head | _zero_biases(folder, info["unexpected_keys"]))
    if missing := own & set(info["missing_keys"]):
        if base is None:
            raise ValueError(
                f"'{source}' has no LM head ({sorted(missing)}), which a GRM keeps, and its config.json "
                "does not tie it to the embeddings. Say which model it was trained from: `grm convert --base ID`."
            )
        _borrow_lm_head(lm, base, missing)
        return lm, f"of the base '{base}'"
    if base is not None:
        logger.warning(f"'{source}' has a LM head of its own, so `base` gives none.")
    return lm, "tied to the embeddings" if _tied(lm) else "its own"


def _zero_biases(folder: Path, names) -> set:
    """Names of projection biases that are zero; `grm export` adds them to a Llama for the engines."""
    ends = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
    biases: dict[str, torch.Tensor] = {}
    if wanted := {name for name in names if name.endswith(ends)}:
        for path in _files(folder, "model*.safetensors"):
            biases.update(_read(path, lambda name: name in wanted))
    return {name for name, tensor in biases.items() if not tensor.any()}


def _borrow_lm_head(lm, base: str, names: set):
    """Put the LM head of `base` into `lm`. Nothing else is read from `base`."""
    folder = _local(base, None)
    embedding = next(name for name, part in lm.named_parameters() if part is lm.get_input_embeddings().weight)
    weights: dict[str, torch.Tensor] = {}
    wanted = {*names, embedding}
    for path in _files(folder, *WEIGHTS):
        for name, tensor in _read(path, lambda name: _plain(name).removeprefix("lm.") in wanted).items():
            weights[_plain(name).removeprefix("lm.")] = tensor
    if names - set(weights) and not _says_tied(folder):
        raise ValueError(
            f"'{base}' has no LM head ({sorted(names - set(weights))}), and its config.json does not tie it "
            "to the embeddings. `base` must be the language model that this one was trained from, not a classifier: "
            "`grm convert --base ID`."
        )
    for name in sorted(names):
        ours = lm.get_parameter(name)
        theirs = weights.get(name, weights.get(embedding) if name.endswith("weight") else None)
        if theirs is None or theirs.shape != ours.shape:
            raise ValueError(
                f"The LM head of '{base}' does not fit: {name} is "
                f"{'missing' if theirs is None else tuple(theirs.shape)}, and must be {tuple(ours.shape)}. `base` "
                "must be the model that this one was trained from, with the same vocabulary."
            )
        with torch.no_grad():
            ours.copy_(theirs)


def _says_tied(folder: Path) -> bool:
    """Whether the configuration ties the LM head to the embeddings; if it does not say, its type decides."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):
        return False
    return config.get_text_config().tie_word_embeddings


def _tied(lm) -> bool:
    return lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


def _adapted(folder: Path, source: str, base, tokenizer):
    """The base of a LoRA adapter, with the adapter merged into it."""
    try:
        from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    except ImportError as error:
        raise ImportError(f"'{source}' is an adapter: to convert it, `pip install peft`.") from error
    config = PeftConfig.from_pretrained(str(folder))
    if base is None:
        require_base(base := config.base_model_name_or_path, source, "name the base: `grm convert --base ID`")
    lm, info = _load(base, str(base))
    _require(str(base), info, set(), set())

    state: dict[str, torch.Tensor] = {}
    for path in _files(folder, *WEIGHTS):
        for name, tensor in _read(path, lambda name: not HEAD.fullmatch(_plain(name))).items():
            if _plain(name) in state and not torch.equal(state[_plain(name)], tensor):
                raise ValueError(_twice(source, _plain(name)))
            state[_plain(name)] = tensor
    rows = lm.get_input_embeddings().weight.shape[0]
    _make_room(lm, tokenizer, state, source)
    # The value head was wrapped with the model, but is not part of it here. No class of PEFT fits the task.
    config.modules_to_save = [name for name in config.modules_to_save or () if name not in WRAPPED] or None
    config.task_type, config.inference_mode = None, True
    wrapped = get_peft_model(lm, config)
    state = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    report: Any = set_peft_model_state_dict(wrapped, state)
    own = {name for name, _ in wrapped.named_parameters() if "default" in name.split(".")}
    adapter = dict(
        missing_keys=[_plain(name) for name in report.missing_keys if name in own],
        unexpected_keys=[_plain(name) for name in report.unexpected_keys],
        mismatched_keys=[],
    )
    _require(source, adapter, set(), set())
    merged = wrapped.merge_and_unload()
    new = merged.get_output_embeddings().weight[rows:]
    if len(new) and not new.any():
        logger.warning(f"The LM head of '{base}' has no rows for the last {len(new)} tokens of '{source}': zeros.")
    return merged, str(base)


def _make_room(lm, tokenizer, state, source):
    """Adds rows for tokens that the base lacks: those that the adapter brings (PEFT saves resized embeddings), or the
    row of a padding token, which some of the authors' models add. A padding row is never read."""
    embeddings = lm.get_input_embeddings().weight
    name = next(name for name, part in lm.named_parameters() if part is embeddings)
    brought = state.get(name, state.get(name.replace(".weight", ".base_layer.weight")))
    rows = len(embeddings if brought is None else brought)
    tokens = rows if tokenizer is None else max(rows, len(tokenizer))
    padding = {tokenizer.pad_token_id} if tokenizer is not None and brought is None else set()
    if new := set(range(rows, tokens)) - padding:
        raise ValueError(
            f"The tokenizer of '{source}' has tokens that neither its base nor the adapter has a row for: "
            f"{tokenizer.convert_ids_to_tokens(sorted(new))}. `base` must be the model that it was trained from."
        )
    if tokens != (old := len(embeddings)):
        lm.resize_token_embeddings(tokens, mean_resizing=False)
        with torch.no_grad():
            lm.get_input_embeddings().weight[old:] = 0
            lm.get_output_embeddings().weight[old:] = 0


# ---------------------------------------------------------------------------------------------------------------- head


def _our_head(layers: list[Layer], width: int | None):
    """Configuration fields and state of our head, which is the same function."""
    layers = [(weight, None if bias is None else bias.float()) for weight, bias in layers]
    if len(layers) == 1:
        (weight, bias) = layers[0]
        if bias is None or not bias.any():
            return dict(head_type="linear"), {"weight": weight}
        # Our linear head has no bias. relu(z) - relu(-z) is z to the last bit, because one of the two is zero.
        layers = [(torch.cat([weight, -weight]), torch.zeros(2)), (torch.tensor([[1.0, -1.0]]), bias)]
    ours = [(weight, torch.zeros(len(weight)) if bias is None else bias) for weight, bias in layers]
    (first, first_bias), (last, last_bias) = ours[0], ours[-1]
    if len(ours) == 2 and width and not any(part[width:].any() for part in (first, first_bias, last[0])):
        ours = [(first[:width], first_bias[:width]), (last[:, :width], last_bias)]  # `grm export` had padded it
    state = {}
    for number, (weight, bias) in enumerate(ours):
        name = "out" if number == len(ours) - 1 else f"dense.{number}"
        state.update({f"{name}.weight": weight, f"{name}.bias": bias})
    spec = dict(head_type="mlp", head_hidden_size=ours[0][0].shape[0], head_num_layers=len(ours) - 1)
    return spec, state
