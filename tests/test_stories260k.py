"""`benchmarks/stories260k.py`: llama2.c's files against its own arithmetic, written down here a second time in numpy,
and against the text that the original prints."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import stories260k  # noqa: E402


DIM, FFN, LAYERS, HEADS, KV_HEADS, VOCABULARY, CONTEXT = 16, 24, 2, 4, 2, 11, 8
HEAD = DIM // HEADS
SHAPES = {
    "embedding": (VOCABULARY, DIM),
    "attention_norm": (LAYERS, DIM),
    "wq": (LAYERS, DIM, DIM),
    "wk": (LAYERS, KV_HEADS * HEAD, DIM),
    "wv": (LAYERS, KV_HEADS * HEAD, DIM),
    "wo": (LAYERS, DIM, DIM),
    "ffn_norm": (LAYERS, DIM),
    "w1": (LAYERS, FFN, DIM),
    "w2": (LAYERS, DIM, FFN),
    "w3": (LAYERS, FFN, DIM),
    "norm": (DIM,),
    "rotary": (CONTEXT, HEAD),
}
needs_files = pytest.mark.skipif(
    not stories260k.SOURCE.is_dir(), reason="needs shared/models/stories260K beside the repository"
)


def theirs(w, ids):
    """The forward pass of llama2.c: rotary positions turn neighbours (2i, 2i + 1). Logits of the last token."""

    def norm(x, weight):
        return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def turn(x):  # (T, heads, HEAD)
        angle = np.arange(len(x))[:, None] / 10_000.0 ** (np.arange(0, HEAD, 2) / HEAD)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    x, future = w["embedding"][ids], np.triu(np.ones((len(ids), len(ids)), bool), 1)
    for i in range(LAYERS):
        y = norm(x, w["attention_norm"][i])
        q = turn((y @ w["wq"][i].T).reshape(-1, HEADS, HEAD))
        k = turn((y @ w["wk"][i].T).reshape(-1, KV_HEADS, HEAD))
        v = (y @ w["wv"][i].T).reshape(-1, KV_HEADS, HEAD)
        k, v = (np.repeat(z, HEADS // KV_HEADS, axis=1) for z in (k, v))
        scores = np.where(future, -np.inf, np.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weights, v).reshape(-1, DIM) @ w["wo"][i].T
        y = norm(x, w["ffn_norm"][i])
        gate = y @ w["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["w3"][i].T)) @ w["w2"][i].T
    return norm(x[-1], w["norm"]) @ w["embedding"].T


def test_a_checkpoint_gives_the_logits_of_llama2_c(tmp_path):
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape).astype("<f4") for name, shape in SHAPES.items()}
    header = struct.pack("<7i", DIM, FFN, LAYERS, HEADS, KV_HEADS, VOCABULARY, CONTEXT)
    (tmp_path / "tiny.bin").write_bytes(header + b"".join(weight.tobytes() for weight in weights.values()))
    ids = [1, 7, 7, 3, 10, 0]
    ours = stories260k.load_model(tmp_path / "tiny.bin")(torch.tensor([ids])).logits[0, -1]
    np.testing.assert_allclose(ours.detach().numpy(), theirs(weights, ids), rtol=1e-4, atol=1e-4)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="stories260K.bin is missing"):
        stories260k.load(tmp_path)


@needs_files
def test_greedy_decoding_gives_the_text_of_the_original():
    model, tokenizer = stories260k.load()
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_032
    text = tokenizer.decode(model.generate(torch.tensor([[1]]), max_new_tokens=60, do_sample=False)[0, 1:])
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she "
        "saw a big, red ball."
    )


@needs_files
def test_token_ids_are_those_of_the_original_algorithm():
    tokenizer = stories260k.load_tokenizer(stories260k.SOURCE / "tok512.bin")
    data, position, pieces, scores = (stories260k.SOURCE / "tok512.bin").read_bytes(), 4, [], []
    while position < len(data):
        score, length = struct.unpack_from("<fi", data, position)
        scores.append(score)
        pieces.append(data[position + 8 : position + 8 + length])
        position += 8 + length
    number = {piece: i for i, piece in enumerate(pieces)}

    def encode(text):
        """Characters, or their bytes; then the adjacent pair with the best score becomes one, until there is none."""
        ids = [number[b" "]]
        for character in text:
            raw = character.encode()
            ids += [number[raw]] if raw in number else [byte + 3 for byte in raw]
        while True:
            unions = [number.get(pieces[a] + pieces[b]) for a, b in zip(ids, ids[1:], strict=False)]
            best = max((scores[u], -i) for i, u in enumerate([*unions, 0]) if u is not None)
            if -best[1] == len(unions):
                return ids
            ids[-best[1] : 2 - best[1]] = [unions[-best[1]]]

    scores[0] = -np.inf  # the entry that stands for "no pair" above
    for text in (
        "Lily loved the big, red ball.",
        "  two blanks,\n\nnewlines\tand a tab",
        "naïve café, 你好 🙂",
        "x = {'a': 1}; # 100%",
        "Thethethe aaaa ssss",
    ):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == encode(text), text
        assert tokenizer.decode(ids) == text


@needs_files
def test_a_conversation_begins_with_bos_and_ends_with_eos():
    tokenizer = stories260k.load_tokenizer(stories260k.SOURCE / "tok512.bin")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert ids[0] == 1 and ids[-1] == 2 and ids.count(1) == ids.count(2) == 1
    assert tokenizer.decode(ids[1:-1]) == "User: Hi\nAssistant: Yes."
