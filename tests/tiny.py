"""Tiny tokenizers and models, built in code: no network, no files, the same in every process."""

import json

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from grm_hf import GRMForSequenceClassification


# The three templates differ in what decides where a reward is read: ChatML ends a turn with a special token and a line
# break, the Llama one writes BOS itself, and the bare one ends a turn with nothing.
CHATML = (
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{%- for call in message.tool_calls or [] %}<tool_call>{{ call | tojson }}</tool_call>{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|header|>' + message.role + '<|/header|>\n' + message.content + '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\n' }}{%- endif %}"
)
BARE = (
    "{%- for message in messages %}{{- '\n' + message.role + ': ' + message.content }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '\nassistant: ' }}{%- endif %}"
)


def byte_tokenizer(template=None, add_bos=False, add_eos=False, merges=(), special=(), **tokens):
    """
    Byte-level BPE: any text, decoded back exactly.

    Args:
        template: Chat template.
        add_bos, add_eos: Whether the tokenizer itself puts these around a text, as its post-processor does it.
        merges: Pairs of tokens that become one, e.g. `[("a", "b")]`; a space is written `Ġ`.
        special: Further special tokens.
        **tokens: `bos_token`, `eos_token`, `pad_token`, ... of the wrapper.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    named = [token for token in tokens.values() if token not in special]
    backend.add_special_tokens([AddedToken(token, special=True) for token in [*named, *special]])
    if add_bos or add_eos:
        bos, eos = (tokens.get("bos_token"), tokens.get("eos_token"))
        backend.post_processor = processors.TemplateProcessing(
            single=[*[bos] * add_bos, "$A", *[eos] * add_eos],
            special_tokens=[(token, backend.token_to_id(token)) for token in {bos, eos} if token],
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **tokens)


def chatml_tokenizer(**options):
    """ChatML, as Qwen's: no BOS, `<|im_end|>` is EOS, tools in a system turn."""
    options = {"special": ["<|im_start|>"], "eos_token": "<|im_end|>", "pad_token": "<|pad|>", **options}
    return byte_tokenizer(CHATML, **options)


def llama_tokenizer(**options):
    """As Llama 3's: the template writes BOS, and the tokenizer adds BOS to any text; a turn ends with `<|eot|>`."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    special = ["<|header|>", "<|/header|>", "<|eot|>"]
    return byte_tokenizer(LLAMA, **{"add_bos": True, "special": special, **tokens, **options})


def bare_tokenizer(**options):
    """A template whose turns have no end, and a tokenizer that adds nothing."""
    return byte_tokenizer(BARE, **{"eos_token": "</s>", "pad_token": "<pad>", **options})


def word_tokenizer(words, template=CHATML, special=("<|im_start|>",), **tokens):
    """One token per word, with the space before it, and one per line break: ids that can be written out by hand."""
    tokens = {"unk_token": "<unk>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>", **tokens}
    vocab = {token: i for i, token in enumerate([*tokens.values(), *special, "\n", *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=tokens["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[^\s]+"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True) for token in [*tokens.values(), *special]])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **tokens)


# Twenty decoders: model type and what differs from the common dimensions. Where a family scales or caps its logits,
# the number is one that shows at this size.
COMMON = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    vocab_size=101,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
FAMILIES = {
    "bloom": ("bloom", dict(tie_word_embeddings=True)),
    "cohere": ("cohere", dict(logit_scale=0.25, tie_word_embeddings=True)),
    "falcon": ("falcon", dict(tie_word_embeddings=True)),
    "gemma2": (
        "gemma2",
        dict(head_dim=8, sliding_window=4, final_logit_softcapping=1.0, tie_word_embeddings=True),
    ),
    "gemma3_text": ("gemma3_text", dict(head_dim=8, sliding_window=4, tie_word_embeddings=True)),
    "gpt2": ("gpt2", dict(n_inner=64, tie_word_embeddings=True)),
    "gpt_neox": ("gpt_neox", {}),
    "granite": (
        "granite",
        dict(logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.3),
    ),
    "llama": ("llama", {}),
    "llama_tied": ("llama", dict(tie_word_embeddings=True)),
    "mistral": ("mistral", dict(sliding_window=4)),
    "mixtral": ("mixtral", dict(num_local_experts=4)),
    "olmo2": ("olmo2", {}),
    "opt": ("opt", dict(ffn_dim=64, word_embed_proj_dim=32, tie_word_embeddings=True)),
    "opt_projected": ("opt", dict(ffn_dim=64, word_embed_proj_dim=16, tie_word_embeddings=True)),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", dict(head_dim=8)),
    "qwen3_moe": ("qwen3_moe", dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)),
}


# Decoders with an oddity each: where the body lies, what the LM head does, layers that are no attention. Not in every
# release, and not checked on transformers 4.
ODD_FAMILIES = {
    "falcon_h1": (
        "falcon_h1",
        dict(lm_head_multiplier=3.0, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
    ),
    "gemma3n_text": (
        "gemma3n_text",
        dict(
            head_dim=8,
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            sliding_window=4,
            activation_sparsity_pattern=[0.0] * 4,
            vocab_size_per_layer_input=101,
            hidden_size_per_layer_input=8,
            laurel_rank=4,
            final_logit_softcapping=1.0,
            tie_word_embeddings=True,
        ),
    ),
    "llama4_text": ("llama4_text", dict(head_dim=8, intermediate_size_mlp=64, num_local_experts=4)),
    "qwen3_5_text": (
        "qwen3_5_text",
        dict(
            head_dim=8,
            num_hidden_layers=4,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        dict(
            num_hidden_layers=3, lru_width=32, attention_window_size=8, logits_soft_cap=1.0, tie_word_embeddings=True
        ),
    ),
}
ODD_FAMILIES = {name: row for name, row in ODD_FAMILIES.items() if row[0] in CONFIG_MAPPING}


def tiny_lm(family="llama", **overrides):
    """A causal language model of one of `FAMILIES` or `ODD_FAMILIES`, always the same one: no bias is zero and no norm
    is one, so that whatever is lost on the way shows in the numbers."""
    model_type, own = {**FAMILIES, **ODD_FAMILIES}[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**COMMON, **own, **overrides}))
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return lm.eval()


LENGTHS = (7, 1, 4, 9)
# How far a reward may move, relative to the larger of 1 and the reward; docs/numerics.md measures how far it does.
FLOAT32, BFLOAT16 = 1e-6, 1e-2


def tiny_grm(family="llama", head_type="mlp", **overrides):
    torch.manual_seed(1)
    attributes = {name: overrides.pop(name) for name in list(overrides) if name.startswith("attribute_")}
    return GRMForSequenceClassification.from_base(
        tiny_lm(family, **overrides), head_type=head_type, head_hidden_size=16, **attributes
    )


def tiny_llama(tokenizer, seed=0, **config):
    """A Llama for one tokenizer, as small as a training test needs it. Its weights are those of `seed`."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **config}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **special, **sizes))


def chat_grm(tokenizer, family="llama", seed=0, head_hidden_size=8, **overrides):
    """A reward model for chats of one tokenizer; `seed` is of its head."""
    torch.manual_seed(seed)
    lm = tiny_lm(family, **{"vocab_size": len(tokenizer), "max_position_embeddings": 512, **overrides})
    return GRMForSequenceClassification.from_base(lm, head_hidden_size=head_hidden_size).eval()


# Every other way from a hidden state to a reward than one MLP.
OTHER_HEADS = {
    "attributes beside": {"attribute_names": ["a", "b"]},
    "weighted attributes": {"attribute_names": ["a", "b"], "attribute_weights": [0.7, -0.3]},
    "a gate": {"attribute_names": ["a", "b"], "attribute_weights": "gate", "attribute_combiner": "geometric"},
    "a mean": {"attribute_names": ["a", "b"], "attribute_weights": [1, 2], "attribute_combiner": "harmonic"},
    "factors": {"head_type": "bnrm"},
}


def with_head(name, tokenizer):
    """A reward model for chats of one tokenizer with one of `OTHER_HEADS`, whose rewards differ visibly."""
    lm = tiny_llama(tokenizer)
    model = GRMForSequenceClassification.from_base(lm, head_hidden_size=8, **OTHER_HEADS[name]).eval()
    with torch.no_grad():
        for parameter in model.score.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return model


def texts(lengths=LENGTHS, seed=0):
    """Token ids of several lengths, without any special token."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 101, (length,), generator=generator) for length in lengths]


def pad(rows, left, width=None, token=0):
    """`left` says for each row (or for all) how many padding tokens come first: all of them, or none."""
    width = width or max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), token), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - len(row) if (left if isinstance(left, bool) else left[i]) else 0
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    return ids, mask


def score(model, ids, mask=None, **kwargs):
    with torch.no_grad():
        return model(ids, attention_mask=mask, **kwargs).logits.squeeze(-1)


def alone(model, rows):
    return torch.cat([score(model, row[None], torch.ones(1, len(row))) for row in rows])


def assert_same(found, wanted, tolerance=FLOAT32):
    """To rounding: matrix products of some processors depend on where in memory a weight lies."""
    scale = wanted.abs().clamp(min=1)
    assert ((found.double() - wanted.double()).abs() <= tolerance * scale).all(), (found, wanted)


def multimodal(kind="gemma3"):
    from transformers import (
        CLIPVisionConfig,
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    if kind == "qwen3_5":
        transformers = pytest.importorskip("transformers")
        if not hasattr(transformers, "Qwen3_5Config"):
            pytest.skip("this transformers has no Qwen 3.5")
        text = tiny_lm("qwen3_5_text").config.to_dict()
        vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
        ids = dict(image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
        config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, **ids)
        return transformers.Qwen3_5ForConditionalGeneration(config).eval()

    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=101)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=28)
    if kind == "gemma3":
        text = {**text, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "model_type": "gemma3_text"}
        vision = SiglipVisionConfig(**vision, patch_size=14)
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        return Gemma3ForConditionalGeneration(config).eval()
    vision = CLIPVisionConfig(**vision, patch_size=14)
    config = LlavaConfig(text_config=LlamaConfig(**text), vision_config=vision, image_token_index=99)
    return LlavaForConditionalGeneration(config).eval()


def write_rows(path, rows):
    """Rows as JSONL; the path as a string."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(text):
    """The rows of JSONL, which only a line break ends."""
    return [json.loads(line) for line in text.split("\n") if line]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}
