"""Tiny tokenizers and models, built in code: no network, no files, the same in every process."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


# The three templates differ in what decides where a reward is read: ChatML ends a turn with a special token and a line
# break, the Llama one writes BOS itself, and the bare one ends a turn with nothing.
CHATML = (
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{%- endif %}"
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
