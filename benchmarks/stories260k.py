"""A real pretrained language model that fits into a megabyte: stories260K of karpathy/llama2.c (260,032 parameters,
trained on English children's stories), as a transformers `LlamaForCausalLM` with a fast tokenizer and a plain chat
template.

    python benchmarks/stories260k.py FOLDER [--source FOLDER_OF_THE_ORIGINAL_FILES]

writes a folder that loads like any base model. The original files, `stories260K.bin` and `tok512.bin`, are expected in
`shared/models/stories260K` beside the repository.
"""

import argparse
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


SHARED = Path(__file__).resolve().parents[2] / "shared"
SOURCE = SHARED / "models" / "stories260K"

# There is no special token for a turn, so roles are words. BOS and EOS are the model's own.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['role'].capitalize() + ': ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def load(source: Path = SOURCE) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model, in evaluation mode, and its tokenizer.

    Args:
        source (`Path`, *optional*):
            Folder with `stories260K.bin` and `tok512.bin`.

    Raises:
        `FileNotFoundError`: they are not there.
    """
    for name in ("stories260K.bin", "tok512.bin"):
        if not (source / name).is_file():
            raise FileNotFoundError(
                f"{source / name} is missing: it is one of the two files of stories260K, which do not come with this "
                "repository. Put them there (its source: karpathy/llama2.c)."
            )
    return load_model(source / "stories260K.bin"), load_tokenizer(source / "tok512.bin")


def load_model(path: Path) -> LlamaForCausalLM:
    """llama2.c's first checkpoint format: seven int32, then every tensor for all layers at once, in float32."""
    data = path.read_bytes()
    dim, ffn, layers, heads, kv_heads, vocabulary, context = struct.unpack("<7i", data[:28])
    assert vocabulary > 0, f"vocabulary {vocabulary}: a negative one means an output matrix of its own"
    numbers, position = np.frombuffer(data, "<f4", offset=28), 0

    def take(*shape):
        nonlocal position
        start, position = position, position + int(np.prod(shape))
        return torch.from_numpy(numbers[start:position].reshape(shape).copy())

    head_dim = dim // heads

    def halves(weight):
        # (heads * head_dim, dim): from rotating neighbours (2i, 2i + 1) to rotating halves (i, i + head_dim / 2)
        return weight.view(-1, head_dim // 2, 2, dim).transpose(1, 2).reshape(weight.shape)

    state = {"model.embed_tokens.weight": take(vocabulary, dim)}
    stacks = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, kv_heads * head_dim, dim),
        "self_attn.v_proj": take(layers, kv_heads * head_dim, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, ffn, dim),
        "mlp.down_proj": take(layers, dim, ffn),
        "mlp.up_proj": take(layers, ffn, dim),
    }
    for name, stack in stacks.items():
        for layer, weight in enumerate(stack):
            turned = halves(weight) if name.endswith(("q_proj", "k_proj")) else weight
            state[f"model.layers.{layer}.{name}.weight"] = turned
    state["model.norm.weight"] = take(dim)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    rotary = 2 * context * head_dim // 2  # two tables that transformers computes by itself
    assert position + rotary == len(numbers), (position, rotary, len(numbers))

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=dim,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=context,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    model.load_state_dict(state)
    return model.eval()


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Sentencepiece BPE (a score for each piece; the adjacent pair whose union scores highest is merged first), as
    merges in the order of the scores."""
    data, position = path.read_bytes(), 4  # the first int32 is the length of the longest piece
    pieces, scores = [], []
    while position < len(data):
        score, length = struct.unpack_from("<fi", data, position)
        pieces.append(data[position + 8 : position + 8 + length].decode("utf-8"))
        scores.append(score)
        position += 8 + length
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    pieces = [piece.replace(" ", "▁") for piece in pieces]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    assert len(vocabulary) == len(pieces), "two pieces are equal"
    merges = [
        (piece[:cut], piece[cut:])
        for i, piece in sorted(enumerate(pieces), key=lambda item: -scores[item[0]])
        if i > 258  # behind the special tokens and the 256 raw bytes
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:3]])
    backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="stories260K as a folder that loads like any base model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, default=SOURCE)
    args = parser.parse_args()
    try:
        model, tokenizer = load(args.source)
    except FileNotFoundError as error:
        sys.exit(str(error))
    model.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)


if __name__ == "__main__":
    main()
