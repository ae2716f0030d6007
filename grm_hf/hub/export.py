"""A reward model in a layout of other tools, which do not know this package: `grm export`.

A linear head becomes the native `...ForSequenceClassification` of the body's family. An MLP head on a Llama or Qwen2
body becomes `Qwen2ForRewardModel`, which vLLM and SGLang have, on a Qwen3 body SGLang's `Qwen3ForRewardModel`: their
head is as wide as the body, so ours is padded with zero units. A BNRM head in use is an MLP head, whose first hidden
layer is its factors if it has no other. The export is the same function, or it is refused: before the folder appears,
the export is loaded again and scores the golden rows. The LM head stays behind.

The engines choose a class by `architectures` alone. A Llama body therefore keeps `model_type: llama`: for `qwen2`,
transformers 5.23 loads any tokenizer as a Qwen2Tokenizer, which splits texts differently.
"""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    __version__,
)
from transformers.utils import logging

from ..chats import as_messages
from ..configuration_grm import POLICIES, as_in_transformers_4
from ..encoding import Encoder
from ..folders import new_folder, readable
from ..heads_grm import GRMFactorWeights
from ..modeling_grm import GRMForSequenceClassification
from ..native import (
    REWARD_MODELS,
    ZERO_BIAS,
    Qwen2ForRewardModel,
    Qwen3ForRewardModel,
    as_qwen2_config,
    load_export,
)
from ..scoring.golden import CHATS, FILE, RELATIVE_TO, GoldenError, differs, read_rows, save_golden, scale_of
from ..scoring.scorer import GRMScorer
from .tokenizer import load_tokenizer


logger = logging.get_logger(__name__)

# Rotary embeddings that depend on the position only; Qwen2 computes them as Llama does.
ROPES = ("default", "linear", "llama3")
# Families for which SGLang has a sequence classifier (docs/formats.md lists them).
SGLANG = ("llama", "qwen2", "qwen3", "gemma2")
# Those whose `score` has a bias there; SGLang draws it at random if the file has none.
SGLANG_BIAS = ("qwen2", "qwen3")
# Tokenizers differ in contractions, digits, blanks, line breaks and scripts.
PROBE = "It's 12345 things, DON'T\n\n\t  count   them: 3.14159 / 2\r\n élan, Ελλάς, 東京 — 🙂 __init__(x=1)\n"
# Additions to the template: a second BOS, and an EOS for turns that have no end, if training had them.
PREFIXES = ("", "{{ bos_token }}")
SUFFIXES = ("", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")


@dataclass(frozen=True)
class Exported:
    """
    The result of [`export`].

    Attributes:
        architecture (`str`): The class that the folder holds.
        difference (`float`): Largest difference of a golden reward, relative to the largest of them, or 1.
    """

    architecture: str
    difference: float


def export(source: str | Path, output: str | Path, *, revision: str | None = None) -> Exported:
    r"""
    Save a reward model in a layout that transformers, vLLM and SGLang know, with tokenizer, chat template, golden rows
    and a card that says how to serve it.

    The weights are in memory once, and once more later to check the result.

    Args:
        source (`str` or `Path`):
            Hub id or folder of a reward model of this package (an adapter: `grm merge` it first).
        output (`str` or `Path`):
            Folder to write, new or empty.
        revision (`str`, *optional*):
            Revision of `source` on the Hub.

    Returns:
        [`Exported`].

    Raises:
        `ValueError`: the model has no exact counterpart (the message gives the reason), or `output` is not empty.
        Nothing is written then.
    """
    hub = {} if revision is None else {"revision": revision}
    with readable(source) as source, new_folder(output) as out:
        model = GRMForSequenceClassification.from_pretrained(source, **hub).eval()
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(f"'{source}' is an adapter. Merge it first: `grm merge {source} FOLDER`.")
        if getattr(model.config.text_config, "quantization_config", None) or getattr(model, "is_quantized", False):
            raise ValueError(f"'{source}' is quantised. Export the model it was made from, and quantise that.")
        if (tokenizer := load_tokenizer(source, **hub)) is None:
            raise ValueError(f"'{source}' has no tokenizer, without which nobody can serve it.")
        head = _plain_head(model)
        save_golden(model, tokenizer, out)
        probe = tokenizer(PROBE)["input_ids"]
        linear = model.config.head_type == "linear"
        config = _config(model, tokenizer)
        if linear:
            _require_pad(tokenizer, out, config)
        served = _serving(tokenizer, model.config, config)
        native = _classifier(model, head, config) if linear else _reward_model(model, head, config)
        state = native.state_dict()
        if linear and config.model_type in SGLANG_BIAS:
            state[ZERO_BIAS] = torch.zeros(1, dtype=torch.float32)
        native.save_pretrained(out, state_dict=state)
        _mark(out / FILE, config.architectures[0])
        _tell_transformers_4(out / "config.json")
        tokenizer.padding_side = "right"  # native classes with absolute positions know no other side
        tokenizer.save_pretrained(out)
        temperature = model.config.reward_temperature
        del model, head, native, state
        difference = _check(out, probe)
        text = _card(Path(output).name, config, tokenizer, out, served, temperature, difference)
        (out / "README.md").write_text(text, encoding="utf-8")
    return Exported(config.architectures[0], difference)


# ------------------------------------------------------------------------------------------------------------- layouts


def _plain_head(model):
    """The reward head without attributes, which is the same function; `ValueError` if there is none."""
    config, score = model.config, model.score
    if config.attribute_names is None:
        return score
    logger.warning(f"An export gives the reward alone: {', '.join(config.attribute_names)} stay behind.")
    if config.attribute_weights is None:
        return score.reward
    if config.attribute_weights == "gate" or config.attribute_combiner != "sum":
        raise ValueError(
            "The reward is no fixed sum of the attributes (attribute_weights="
            f"{config.attribute_weights!r}, attribute_combiner={config.attribute_combiner!r}), which engines have no "
            "head for. vLLM serves the model as it is with the plugin of grm_hf (docs/serving.md); or fix the weights "
            "by `grm_hf.scoring.fit_attribute_weights`."
        )
    head = copy.deepcopy(score.attributes)
    last = head if config.head_type == "linear" else head.out
    weights = torch.tensor(config.attribute_weights, dtype=torch.float64)
    for name, part in list(last.named_parameters()):
        setattr(last, name, nn.Parameter((weights @ part.double())[None].to(part.dtype)))
    return head


def _config(model, tokenizer):
    """The configuration of the body as a classifier's, with our policies added: other tools ignore them, and `grm
    convert` reads them."""
    ours, text = model.config, model.config.text_config
    config = copy.deepcopy(text)
    if ours.head_type != "linear":
        _require_layout(ours, text)
        config.head_hidden_size = ours.head_hidden_size
        # There is no LM head in the file for a loader to tie.
        config.tied_lm_head, config.tie_word_embeddings = text.tie_word_embeddings, False
    for name in ("auto_map", "architectures"):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    config.name_or_path = ""
    config.id2label, config.label2id = {0: "REWARD"}, {"REWARD": 0}
    config.problem_type = "regression"  # no sigmoid in the pipeline and in vLLM
    config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    config.dtype = text.dtype or model.lm.dtype
    config.pad_token_id = tokenizer.pad_token_id
    for name in (*POLICIES, "base_model"):
        setattr(config, name, getattr(ours, name))
    return config


def _classifier(model, score, config):
    """The native classifier around the live body: no weight is copied."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"transformers has no sequence classifier for bodies of type '{config.model_type}', so there is nothing "
            "to export to. Load the model itself with trust_remote_code=True."
        )
    with torch.device("meta"):
        native = AutoModelForSequenceClassification.from_config(config)
    prefix, head = native.base_model_prefix, getattr(native, "score", None)
    weight = score.weight
    fits = isinstance(head, nn.Linear) and head.weight.shape == weight.shape and head.bias is None
    if not fits or type(getattr(native, prefix, None)) is not type(model.model):
        raise ValueError(
            f"{type(native).__name__} does not have this body and one bias-free `score`: it is no exact counterpart."
        )
    setattr(native, prefix, model.model)
    # In float32, as here: vLLM computes with it, transformers rounds it to the dtype of the body.
    native.score.weight = nn.Parameter(weight.detach())
    config.architectures, native.config = [type(native).__name__], config
    assert not any(part.is_meta for part in native.parameters())
    return native


def _require_layout(ours, text):
    """Refuse models that `Qwen2ForRewardModel` and `Qwen3ForRewardModel` do not compute."""
    if text.model_type not in ("llama", "qwen2", "qwen3"):
        raise ValueError(
            "An MLP or BNRM head can be exported on Llama, Qwen2 and Qwen3 bodies alone, for which engines have a "
            f"reward model; this one is '{text.model_type}'. vLLM serves the model as it is with the plugin of "
            "grm_hf, and `grm serve` does without an engine (docs/serving.md); or train one with head_type='linear'."
        )
    bnrm = ours.head_type == "bnrm"
    if (layers := ours.head_num_layers + bnrm) != 1:  # the factors are one more
        raise ValueError(
            f"The engines' reward models have one hidden layer in their head; this one has {layers}"
            + (", its factors included" if bnrm else "")
            + ". vLLM serves it as it is with the plugin of grm_hf (docs/serving.md)"
            + ("; or train one with head_num_layers=0." if bnrm else ".")
        )
    if ours.head_hidden_size > text.hidden_size:
        raise ValueError(
            f"The engines' reward models have a head as wide as the body, {text.hidden_size}; this one has "
            f"head_hidden_size={ours.head_hidden_size}, and units cannot be left out. vLLM serves it as it is with "
            "the plugin of grm_hf (docs/serving.md)."
        )
    if text.hidden_act != "silu":
        raise ValueError(f"The engines' Qwen2 and Qwen3 have silu in their layers; this body has {text.hidden_act!r}.")
    if text.model_type != "llama":
        if text.use_sliding_window:
            raise ValueError("This body has a sliding window, which vLLM and SGLang do not compute alike.")
        return
    if text.head_dim != (width := text.hidden_size // text.num_attention_heads):
        raise ValueError(
            f"Qwen2 has attention heads of hidden_size / num_attention_heads = {width}; this body has "
            f"head_dim={text.head_dim}."
        )
    if text.attention_bias or text.mlp_bias:
        raise ValueError("This Llama has biases (attention_bias, mlp_bias) that Qwen2 has no place for.")
    rope = text.rope_parameters
    if rope["rope_type"] not in ROPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"Qwen2 is not known to rotate as this body does, by {rope}; exact are {ROPES}.")


def _reward_model(model, score, config):
    with torch.device("meta"):
        if config.model_type == "qwen3":
            native = Qwen3ForRewardModel(config)
        else:
            native = Qwen2ForRewardModel(as_qwen2_config(config))
    state = {f"model.{name}": tensor for name, tensor in model.model.state_dict().items()}
    for name, part in native.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")) and name not in state:
            state[name] = torch.zeros(part.shape, dtype=model.lm.dtype)  # Llama has none
    first, last = score.dense[0], score.out
    weights = last.distribution()[0] if isinstance(last, GRMFactorWeights) else last.weight
    units, width = first.weight.shape
    for name, part in (("0.weight", first.weight), ("0.bias", first.bias), ("2.weight", weights)):
        padded = torch.zeros(width if name == "0.bias" else (width if name == "0.weight" else 1, width))
        padded[(slice(None), slice(units)) if name == "2.weight" else slice(units)] = part.detach()
        state[f"score.{name}"] = padded  # relu(0) * 0 adds nothing
    state["score.2.bias"] = last.bias.detach()
    native.load_state_dict(state, assign=True)
    config.architectures, native.config = [type(native).__name__], config
    return native


def _mark(path: Path, architecture: str):
    """Say in the golden rows what `grm verify` must load. The rewards are those of the model before the export."""
    content = {"exported_as": architecture, **json.loads(path.read_text(encoding="utf-8"))}
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _tell_transformers_4(path: Path):
    """Also write the configuration in transformers 4's spelling: engines with 4 would otherwise rotate by a
    default."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["torch_dtype"] = fields.get("dtype")
    try:
        fields = {**as_in_transformers_4(fields), **fields}
    except ValueError as error:
        logger.warning(f"The exported model needs engines that use transformers 5. ({error})")
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- tokens


def _require_pad(tokenizer, folder: Path, config):
    """Native classifiers read the last token that is not the padding token, whatever the attention mask says."""
    pad = tokenizer.pad_token_id
    if pad is None:
        logger.warning("The tokenizer has no padding token: in transformers the export scores one text at a time.")
        return
    rows = json.loads((folder / FILE).read_text(encoding="utf-8"))["rows"]
    ends = {tokenizer.eos_token_id, *(row["ids"][-1] for row in rows)}
    if pad not in ends:
        return
    usable = [
        str(token)
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and number not in {*ends, tokenizer.bos_token_id} and number < config.vocab_size
    ]
    raise ValueError(
        f"The padding token {tokenizer.pad_token!r} also ends texts. The native classifier of {config.model_type} "
        "finds the end of a text by skipping padding tokens, so it would read the token before. Give the tokenizer "
        f"another one ({', '.join(map(repr, usable[:3])) or 'a token that no text ends with'}): set "
        "`tokenizer.pad_token`, and save it in the model's folder. No score of the reward model changes."
    )


def _serving(tokenizer, ours, config) -> dict:
    """Make the chat template write the ids of training, and find out how others get them.

    Returns `template` (whether messages give them), with the `prefix` and `suffix` that the template got; and `text`
    (whether rendered text that is tokenised with special tokens gives them: as it is, `""`, or without its BOS, the
    string to remove).
    """
    encoder = replace(Encoder.from_config(tokenizer, ours), max_length=None)
    original, chats = tokenizer.chat_template, [as_messages(chat) for chat in CHATS]
    if original is None:
        return {"template": False, "text": None}
    expected = [encoder.encode_chat(chat).ids for chat in chats]

    def written(template):
        tokenizer.chat_template = template
        return [tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"] for chat in chats]

    if isinstance(original, str):
        for prefix in PREFIXES if tokenizer.bos_token else PREFIXES[:1]:
            for suffix in SUFFIXES:
                # Jinja drops the last line break of a template; with a suffix it is no longer the last.
                template = prefix + (original.removesuffix("\n") + suffix if suffix else original)
                if written(template) == expected:
                    if prefix:
                        config.bos_policy = "single"  # it stands in the template now
                    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
                    bos = str(tokenizer.bos_token)
                    for removed in ("", bos):
                        if [tokenizer(text.removeprefix(removed))["input_ids"] for text in texts] == expected:
                            return {"template": True, "text": removed, "prefix": prefix, "suffix": suffix}
                    return {"template": True, "text": None, "prefix": prefix, "suffix": suffix}
    tokenizer.chat_template = original
    logger.warning("The chat template alone does not give the token ids of training: send token ids (see the card).")
    return {"template": False, "text": None}


# -------------------------------------------------------------------------------------------------------------- checks


@torch.no_grad()
def _check(folder: Path, probe: list[int]) -> float:
    """Load the written folder and score the golden rows, alone and as one batch. Returns the largest relative
    difference."""
    rows = read_rows(folder / FILE)["rows"]
    native, tokenizer = load_export(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer(PROBE)["input_ids"] != probe:
        raise ValueError(
            f"Beside a model of type '{native.config.model_type}', transformers {__version__} makes a "
            f"{type(tokenizer).__name__} of this model's tokenizer, which splits texts differently. A server would "
            "send the model other tokens than those of training."
        )
    scorer = GRMScorer(native, tokenizer, deterministic=True)
    for number, row in enumerate(rows):
        if (ids := list(scorer.encode(row["chat"]).ids)) != row["ids"]:
            raise GoldenError(f"golden row {number} of the export has other token ids.\n{ids}\n{row['ids']}")
    batches = [[row] for row in rows] + ([rows] if tokenizer.pad_token_id is not None else [])
    worst, scale = 0.0, scale_of(row["score"] for row in rows)
    for batch in batches:
        inputs = {"input_ids": [row["ids"] for row in batch]}
        padded = tokenizer.pad(inputs, padding=len(batch) > 1, return_tensors="pt")
        rewards = native(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits[:, 0].tolist()
        for row, reward in zip(batch, rewards, strict=True):
            if differs(reward, row["score"], scale, native):
                raise GoldenError(f"the export scores {reward}, the model {row['score']}, for\n{row['chat']}")
            worst = max(worst, abs(reward - row["score"]) / scale)
    return worst


# ---------------------------------------------------------------------------------------------------------------- card


def _card(name, config, tokenizer, folder: Path, served: dict, temperature, difference) -> str:
    """The README.md of an export."""
    row = read_rows(folder / FILE)["rows"][0]
    architecture = config.architectures[0]
    linear = architecture not in REWARD_MODELS
    metadata: dict = {"library_name": "transformers", "pipeline_tag": "text-classification"}
    if config.base_model:
        metadata["base_model"] = config.base_model
    metadata["tags"] = ["reward-model", "grm"]
    given = {"messages": as_messages(row["chat"])} if served["template"] else {"input": [row["ids"]]}
    limit = config.max_sequence_length
    length = f" --max-model-len {limit}" if limit else ""
    reads = "messages, through the chat template" if served["template"] else "token ids, as `grm_hf` makes them"
    lines = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n",
        f"# {name}\n",
        f"A reward model ([GRM](https://arxiv.org/abs/2406.10216)) as `{config.architectures[0]}`: it reads a chat "
        "and returns one number, raw, higher for the better answer. Only differences between answers to the same "
        f"prompt mean something: `sigmoid((reward_a - reward_b) / {temperature:g})` is the probability that A is "
        "preferred.\n",
        f"Exported by `grm export`, which loaded it again and scored `{FILE}`: the largest difference from the "
        f"original, {RELATIVE_TO}, was {difference:.1e} ({config.dtype}).",
        "`grm verify` of grm_hf repeats that. `grm convert` makes a GRM of it again.\n",
        "## What it reads\n",
        f"- {reads[0].upper()}{reads[1:]}. The reward is that of the last token.",
    ]
    if served.get("prefix"):
        lines.append("- The template writes BOS as often as training did.")
    if served.get("suffix"):
        lines.append("- The template writes an EOS behind a finished turn, as training did.")
    lines.append(
        f"- At most {limit} tokens. Longer texts lost their beginning in training; engines refuse or cut them."
        if limit
        else "- No maximum length was set."
    )
    if linear:
        pad = tokenizer.pad_token
        lines.append(
            f"- In transformers a batch is padded on the right with {pad!r}; no text may end with it."
            if pad is not None
            else "- In transformers one text at a time: there is no padding token."
        )
    lines += ["- It has no LM head: it cannot generate.\n"]
    example = row["chat"]["response"]
    if linear:
        lines += [
            "## transformers\n",
            "```python\nimport torch\nfrom transformers import AutoModelForSequenceClassification, AutoTokenizer\n",
            f'model = AutoModelForSequenceClassification.from_pretrained("{name}")',
        ]
        if served["template"]:
            lines += [
                f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
                f"chat = {json.dumps(as_messages(row['chat']))}",
                'inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)',
            ]
        else:
            lines.append(f'inputs = {{"input_ids": torch.tensor([{row["ids"]}])}}')
        lines += [
            "with torch.no_grad():\n    print(model(**inputs).logits.item())\n```\n",
            f"It prints about {row['score']:.4f} (answer {example!r}).\n",
        ]
    else:
        lines += [
            "transformers has no class of this name; `grm_hf.hub.load_export` has. The first golden row (answer "
            f"{example!r}) has reward {row['score']:.4f}.\n"
        ]
    body = json.dumps({"model": name, **given, **({"use_activation": False} if linear else {})})
    lines += ["## Serve\n", "### vLLM\n"]
    if architecture == Qwen3ForRewardModel.__name__:
        lines.append("It has no such class. It serves the GRM that this was made from, with grm_hf's plugin.\n")
    else:
        lines += [
            "The tests of grm_hf run this layout in vLLM on a CPU.\n",
            f"```bash\nvllm serve {name} --runner pooling{length}",
            f"curl localhost:8000/{'classify' if linear else 'pooling'} -H 'Content-Type: application/json' -d "
            f"'{_quoted(body)}'\n```\n",
            "The reward is `data[0].probs[0]`. Before 0.11.2 `use_activation` was `activation`.\n"
            if linear
            else "The answer has a number for each token: the reward is the last, `data[0].data[-1]`.\n",
        ]
    lines.append("### SGLang\n\nFrom its source: it needs a GPU, and was not run. Compare with the reward above.\n")
    if linear and config.model_type not in SGLANG:
        lines.append(f"It has no sequence classifier for bodies of type '{config.model_type}', as far as we know.")
    elif served["text"] is None:
        lines.append("It is sent text, which its tokenizer turns into other ids than those of training: not exact.")
    else:
        text = tokenizer.apply_chat_template(as_messages(row["chat"]), tokenize=False).removeprefix(served["text"])
        lines += [
            f"```bash\npython -m sglang.launch_server --model-path {name} --is-embedding",
            "curl localhost:30000/classify -H 'Content-Type: application/json' -d "
            f"'{_quoted(json.dumps({'model': name, 'text': [text]}))}'\n```\n",
            "The reward is `[0].embedding[0]`. The text is the rendered chat"
            + (f" without its first {served['text']!r}, which the tokenizer adds." if served["text"] else "."),
        ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return text.replace("'", "'\\''")
