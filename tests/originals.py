"""Reward models as others publish them, written by their arithmetic."""

import json

import torch
from safetensors.torch import load_file, save_file
from tiny import llama_tokenizer, tiny_lm
from torch import nn


TOKENIZER = llama_tokenizer()
VOCABULARY = len(TOKENIZER)
IDS = [[256, 7, 91, 33, 250, 2, 14, 259], [256, 5, 5, 80, 258], list(range(40, 75))]


def body(family="llama", **overrides):
    defaults = {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "eos_token_id": TOKENIZER.eos_token_id}
    return tiny_lm(family, **{**defaults, **overrides})


def value_head(width=32, inner=24, layers=1, bias=True):
    """The authors' head: `summary` of a Sequential, or of one Linear for `layers=0`."""
    torch.manual_seed(7)
    if layers == 0:
        return nn.Linear(width, 1, bias=bias)
    steps = []
    for i in range(layers):
        steps += [nn.Linear(width if i == 0 else inner, inner), nn.ReLU()]
    return nn.Sequential(*steps, nn.Linear(inner, 1))


def named(head, prefix="v_head.summary"):
    return {f"{prefix}.{name}": tensor.detach().clone() for name, tensor in head.state_dict().items()}


@torch.no_grad()
def theirs(lm, head):
    """The original's arithmetic, in float64: the head on the last of `hidden_states`, at the last token."""
    if lm.config.model_type != "mixtral":  # its kernel knows float32 alone
        lm, head = lm.double(), head.double()
    rewards = []
    for ids in IDS:
        out = lm(input_ids=torch.tensor([ids]), output_hidden_states=True)
        rewards.append(head(out.hidden_states[-1])[0, len(ids) - 1, 0].item())
    return rewards


def write(folder, lm, tensors=None, settings=None, tokenizer=TOKENIZER):
    """A folder with a language model, further tensors in the same file, and further settings in its config.json."""
    lm.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file({**load_file(path), **(tensors or {})}, path, metadata={"format": "pt"})
    configure(folder, **(settings or {}))
    return folder


def configure(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
