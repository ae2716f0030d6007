"""A batch of preference pairs as padded rows, as one packed row, or as one row of trees in which every common prefix
stands once; and the attention that the last two need.

`shared_prefix` is the padded computation without its repetitions: a token's hidden state depends on its position and
on the tokens before it, so sequences that begin alike share the states of what they share. Each token is computed
once, at the position it has in its own sequence; a branch attends to its prefix and to itself.

What a branch attends to is said by an explicit table, never inferred from position ids. It travels in the place of
the attention mask, as a `(1, 1, segments, 4)` integer tensor: transformers hands a mask of four dimensions to the
attention function as it is, and any attention function but ours refuses integers.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, PreTrainedConfig

from .modeling_grm import GRMForSequenceClassification


LAYOUTS = ("auto", "padded", "packed", "shared_prefix")
ATTENTION = "grm_segments"
MIN_SHARED = 8  # tokens: below that, a branch's mask and copied keys cost more than what it saves


# ------------------------------------------------------------------------------------------------------------- batches


@dataclass
class Forest:
    """
    Sequences laid out in one row, each common prefix of at least `MIN_SHARED` tokens once.

    Args:
        ids, positions (`list[int]`):
            Token and position of each place in the row.
        segments (`list[tuple[int, int, int, int]]`):
            Runs of the row, in order: start, length, parent segment (-1: none), and how many tokens come before the
            run, namely the first ones of the sequence that ends with the parent.
        paths (`list[list[int]]`):
            For each sequence, the place in the row of each of its tokens.
    """

    ids: list[int]
    positions: list[int]
    segments: list[tuple[int, int, int, int]]
    paths: list[list[int]]


def plant(sequences: Sequence[Sequence[int]], share: bool = True) -> Forest:
    """Lay token sequences out in one row, with (`share`) or without their common prefixes merged."""
    forest = Forest([], [], [], [[] for _ in sequences])
    # In sorted order the longest prefix that a sequence has in common with any before it, it has with its neighbour.
    order = sorted(range(len(sequences)), key=lambda i: list(sequences[i])) if share else range(len(sequences))
    before: Sequence[int] = ()
    path: list[int] = []
    segment = -1
    for i in order:
        ids = sequences[i]
        shared = _common_prefix(before, ids) if share else 0
        if shared < MIN_SHARED and shared < len(ids):
            shared, segment = 0, -1
        start, own = len(forest.ids), len(ids) - shared
        path = [*path[:shared], *range(start, start + own)]
        if own:
            forest.segments.append((start, own, segment, shared))
            segment = len(forest.segments) - 1
        forest.ids += ids[shared:]
        forest.positions += range(shared, len(ids))
        forest.paths[i], before = path, ids
    return forest


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass
class PairCollator:
    """
    Turns tokenised preference pairs into a batch. With B pairs, sequences 0 to B-1 are the chosen ones and B to 2B-1
    the rejected ones; an index is a position in the flattened `(rows, length)` batch.

    Args:
        pad_token_id (`int`):
            Token that fills rows up.
        layout (`str`, *optional*, defaults to `"padded"`):
            `"padded"` (a sequence a row, as TRL's `DataCollatorForPreference`), `"packed"` (all in one row) or
            `"shared_prefix"` (all in one row, common prefixes once).
        text (`str`, *optional*, defaults to `"none"`):
            Whose response tokens the text loss needs: `"none"`, `"chosen"` or `"both"`.
        pad_to_multiple_of (`int`, *optional*):
            Fill rows up to a multiple of this length.
        max_tokens (`int`, *optional*):
            Split the pairs, in their order, into batches of at most so many tokens, padding included (a longer pair
            is a batch by itself), and return `{"parts": [batch, ...]}`.

    A pair is a `dict` with `chosen_ids`, `rejected_ids` (`list[int]`), `chosen_start`, `rejected_start` (`int`, index
    of the first response token; needed with a text loss), and optionally `margin`, `ref_chosen_logps`,
    `ref_rejected_logps` (`float`). A response at index 0 has no hidden state that predicts its first token: this token
    is left out of the text loss.

    Returns:
        `dict` of tensors: `input_ids`; `attention_mask` (padded), or `position_ids`, `segments` (see [`Forest`]),
        `read_index` `(2B,)` and `output_rows` (every index whose hidden state is read); with a text loss `text_index`,
        `text_targets`, `text_owner` `(num_tokens,)`; `margin` `(B,)` and `ref_logps` `(2B,)` if the pairs have them.
    """

    pad_token_id: int
    layout: str = "padded"
    text: str = "none"
    pad_to_multiple_of: int | None = None
    max_tokens: int | None = None

    def __post_init__(self):
        if self.layout not in LAYOUTS[1:]:
            raise ValueError(f"layout={self.layout!r} is unknown: a collator takes one of {LAYOUTS[1:]}.")
        if self.text not in ("none", "chosen", "both"):
            raise ValueError(f"text={self.text!r} is unknown: use 'none', 'chosen' or 'both'.")

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.max_tokens is None:
            return self._batch(pairs)
        parts: list[list[dict[str, Any]]] = [[]]
        sizes: list[int] = []
        for pair in pairs:
            sequences = (pair["chosen_ids"], pair["rejected_ids"])
            if self.layout == "padded":
                sizes.append(max(map(len, sequences)))
                tokens = 2 * len(sizes) * self._length(max(sizes))
            else:
                sizes.append(len(plant(sequences, share=self.layout == "shared_prefix").ids))
                tokens = self._length(sum(sizes))
            if parts[-1] and tokens > self.max_tokens:
                parts.append([])
                sizes = sizes[-1:]
            parts[-1].append(pair)
        return {"parts": [self._batch(part) for part in parts]}

    def _batch(self, pairs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = [pair["chosen_ids"] for pair in pairs] + [pair["rejected_ids"] for pair in pairs]
        batch, paths = self._padded(sequences) if self.layout == "padded" else self._one_row(sequences)
        if self.text != "none":
            starts = [pair["chosen_start"] for pair in pairs]
            if self.text == "both":
                starts += [pair["rejected_start"] for pair in pairs]
            batch |= _text_tokens(sequences, starts, paths)
        if "margin" in pairs[0]:
            batch["margin"] = torch.tensor([pair["margin"] for pair in pairs], dtype=torch.float)
        if "ref_chosen_logps" in pairs[0]:
            names = ("ref_chosen_logps", "ref_rejected_logps")
            batch["ref_logps"] = torch.tensor([pair[name] for name in names for pair in pairs], dtype=torch.float)
        if "read_index" in batch:
            rows = [batch["read_index"], *([batch["text_index"]] if "text_index" in batch else [])]
            batch["output_rows"] = torch.cat(rows).unique()
        return batch

    def _length(self, tokens: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-tokens // multiple) * multiple

    def _padded(self, sequences):
        length = self._length(max(map(len, sequences)))
        padding = [[self.pad_token_id] * (length - len(ids)) for ids in sequences]
        batch = {
            "input_ids": torch.tensor([[*ids, *pad] for ids, pad in zip(sequences, padding, strict=True)]),
            "attention_mask": torch.tensor(
                [[1] * len(ids) + [0] * len(pad) for ids, pad in zip(sequences, padding, strict=True)]
            ),
        }
        return batch, [range(i * length, i * length + len(ids)) for i, ids in enumerate(sequences)]

    def _one_row(self, sequences):
        forest = plant(sequences, share=self.layout == "shared_prefix")
        tokens = len(forest.ids)
        if fill := self._length(tokens) - tokens:
            forest.ids += [self.pad_token_id] * fill
            forest.positions += range(fill)
            forest.segments.append((tokens, fill, -1, 0))
        batch = {
            "input_ids": torch.tensor([forest.ids]),
            "position_ids": torch.tensor([forest.positions]),
            "segments": torch.tensor(forest.segments),
            "read_index": torch.tensor([path[-1] for path in forest.paths]),
        }
        return batch, forest.paths


def _text_tokens(sequences, starts, paths):
    index, targets, owner = [], [], []
    for i, start in enumerate(starts):
        first = max(start, 1)
        targets += sequences[i][first:]
        index += paths[i][first - 1 : -1]
        owner += [i] * max(len(sequences[i]) - first, 0)
    columns = {"text_index": index, "text_targets": targets, "text_owner": owner}
    return {name: torch.tensor(column, dtype=torch.long) for name, column in columns.items()}


def model_kwargs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The part of a [`PairCollator`] batch that the model's forward takes."""
    names = ("input_ids", "attention_mask", "position_ids", "read_index", "output_rows")
    kwargs = {name: batch[name] for name in names if name in batch}
    if "segments" in batch:
        kwargs["attention_mask"] = batch["segments"][None, None]
    return kwargs


# ----------------------------------------------------------------------------------------------------------- attention


class _Plan:
    """The table of segments as the attention function uses it, made once for all layers."""

    def __init__(self, table: list[list[int]]):
        self.starts = [start for start, *_ in table]
        self.lengths = [length for _, length, *_ in table]
        self.prefixes: list[list[tuple[int, int]]] = []  # of each segment: (segment, how many of its first tokens)
        for _, _, parent, shared in table:
            runs = [*self.prefixes[parent], (parent, self.lengths[parent])] if shared else []
            ends = itertools.accumulate((n for _, n in runs), initial=0)
            cut = [(s, min(n, shared - end)) for (s, n), end in zip(runs, ends, strict=False)]
            self.prefixes.append([(s, n) for s, n in cut if n > 0])
        self.masks: dict[tuple, torch.Tensor] = {}
        self.varlen: tuple | None = None

    def mask(self, queries: int, keys: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """`(queries, keys)`, 0 or -inf: the last query sees all keys, each one before it a key less at the end; with
        `window`, only so many keys back."""
        key = (queries, keys, window, like.dtype, like.device)
        if key not in self.masks:
            at = torch.arange(keys - queries, keys, device=like.device)[:, None]
            to = torch.arange(keys, device=like.device)
            seen = to <= at if window is None else (to <= at) & (to > at - window)
            self.masks[key] = torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, float("-inf"))
        return self.masks[key]

    def ragged(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """For ragged batches: places of each segment's keys, ends of queries and of keys, longest of each."""
        if self.varlen is None:
            runs = [
                [*((self.starts[s], n) for s, n in prefix), (start, length)]
                for prefix, start, length in zip(self.prefixes, self.starts, self.lengths, strict=True)
            ]
            keys = [sum(n for _, n in run) for run in runs]
            places = [place for run in runs for start, n in run for place in range(start, start + n)]
            ends = [[0, *itertools.accumulate(lengths)] for lengths in (self.lengths, keys)]
            cu_q, cu_k = (torch.tensor(e, dtype=torch.int32, device=device) for e in ends)
            self.varlen = torch.tensor(places, device=device), cu_q, cu_k, max(self.lengths), max(keys)
        return self.varlen


_plans = WeakTensorKeyDictionary()  # one for all layers of a forward, and for those that the backward runs again


def _plan_of(attention_mask: torch.Tensor | None) -> _Plan:
    if attention_mask is None or attention_mask.dim() != 4 or attention_mask.is_floating_point():
        raise ValueError(
            f"The attention {ATTENTION!r} serves packed and shared-prefix batches only, and this one has no table of "
            "segments. Make it by `PairCollator(layout='packed' or 'shared_prefix')` and pass it by `model_kwargs`."
        )
    if attention_mask not in _plans:
        _plans[attention_mask] = _Plan(attention_mask[0, 0].tolist())
    return _plans[attention_mask]


# What decoders hand down that does not change the attention. Anything else might (sinks, biases, chosen blocks).
HARMLESS = {
    "cache_position",
    "num_items_in_batch",
    "output_rows",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
}


def segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers' `AttentionInterface`: each segment of the row attends to its prefix and to
    itself, causally. `attention_mask` holds the table of segments; `query` is `(1, heads, tokens, head_dim)`."""
    plan = _plan_of(attention_mask)
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in HARMLESS)
    if unknown or is_causal is False or query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{type(module).__name__} asks for attention that packed and shared-prefix layouts do not have "
            f"(arguments {unknown}, is_causal={is_causal}, queries {tuple(query.shape)}, keys {tuple(key.shape)}). "
            "Use layout='padded'."
        )
    assert sum(plan.lengths) == query.shape[2], (plan.lengths, query.shape)
    if (flash := _flash_kernel(query, value, dropout, softcap)) is not None:
        return flash(query, key, value, plan.ragged(query.device), scaling, dropout, sliding_window, softcap), None

    queries, keys, values = (x.split(plan.lengths, 2) for x in (query, key, value))
    outputs = []
    for i, prefix in enumerate(plan.prefixes):
        q, k, v = queries[i], keys[i], values[i]
        if prefix:
            k, v = (torch.cat([*(x[s][:, :, :n] for s, n in prefix), x[i]], 2) for x in (keys, values))
        window = sliding_window if sliding_window is not None and k.shape[2] > sliding_window else None
        if softcap is not None:
            out = _softcapped(q, k, v, plan.mask(q.shape[2], k.shape[2], window, q), scaling, dropout, softcap)
        else:
            whole = not prefix and window is None
            mask = None if whole else plan.mask(q.shape[2], k.shape[2], window, q)
            out = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=whole, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, 1), None


def _softcapped(q, k, v, mask, scaling, dropout, softcap):
    """Gemma 2: scores go through `softcap * tanh(scores / softcap)`, which no kernel of torch does on CPU."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap + mask
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return F.dropout(weights, dropout) @ v


def _flash_kernel(query, value, dropout, softcap) -> Callable | None:
    """A kernel on ragged batches, where there is one: flash-attn's, or the one that torch brings along."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return None
    if query.shape[-1] > 256 or query.shape[-1] != value.shape[-1]:
        return None
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return None
    try:
        from flash_attn import flash_attn_varlen_func

        return lambda *args: _flash_attn(flash_attn_varlen_func, *args)
    except ImportError:
        pass
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return None if dropout or softcap is not None else lambda *args: _torch_varlen(varlen_attn, *args)


def _rows(query, key, value, places):
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return query, key.index_select(0, places), value.index_select(0, places)


def _flash_attn(kernel, query, key, value, ragged, scaling, dropout, window, softcap):
    places, *ends = ragged
    window = (-1 if window is None else window - 1, 0)
    return kernel(
        *_rows(query, key, value, places),
        *ends,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=window,
        softcap=softcap or 0.0,
    )[None]


def _torch_varlen(kernel, query, key, value, ragged, scaling, dropout, window, softcap):
    places, *ends = ragged
    window = (-1 if window is None else window - 1, 0)
    grouped = query.shape[1] != key.shape[1]
    return kernel(*_rows(query, key, value, places), *ends, scale=scaling, window_size=window, enable_gqa=grouped)[
        None
    ]


AttentionInterface.register(ATTENTION, segment_attention)


@contextmanager
def layout_attention(model: nn.Module, layout: str, implementation: str = ATTENTION) -> Iterator[None]:
    """
    Within it, `model` runs batches of `layout`. Keep the backward inside as well: gradient checkpointing runs layers
    again there. Outside, the model has the attention it was loaded with, so nothing of this is ever saved.

    Args:
        model (`nn.Module`):
            The model, as it is or wrapped (PEFT, DDP, FSDP).
        layout (`str`):
            What [`resolve_layout`] returned. Nothing happens for `"padded"`.
    """
    configs = [getattr(module, "config", None) for module in model.modules()] if layout != "padded" else []
    before = {id(c): (c, c._attn_implementation) for c in configs if isinstance(c, PreTrainedConfig)}
    if layout == "padded" or any(name == implementation for _, name in before.values()):  # or within it already
        yield
        return
    hooks = _finish_read_rows_only(model)
    try:
        for config, _ in before.values():
            config._attn_implementation = implementation
        yield
    finally:
        for config, name in before.values():
            config._attn_implementation = name
        for hook in hooks:
            hook.remove()


def _finish_read_rows_only(model: nn.Module) -> list:
    """The last layer must make keys and values of every token, but queries and all that follows them only where its
    output is read (`output_rows`). Hooks on those parts of the layer, which work on each token by itself, see to that;
    layers with other names for them are left whole."""
    decoder = next(m for m in model.modules() if isinstance(m, GRMForSequenceClassification)).model
    stacks = [m for m in decoder.modules() if isinstance(m, nn.ModuleList)]
    last = next(m for m in stacks if len(m) == decoder.config.num_hidden_layers)[-1]
    rows: list[torch.Tensor | None] = [None]
    lengths: dict[nn.Module, int] = {}

    def remember(_, args, kwargs):
        rows[0] = kwargs.get("output_rows")

    def gather(module, args):
        if rows[0] is None or not args or args[0].dim() != 3:
            return None
        lengths[module] = args[0].shape[1]
        return args[0].index_select(1, rows[0]), *args[1:]

    def scatter(module, _, output):
        if module not in lengths:
            return None
        whole = output.new_zeros(1, lengths.pop(module), output.shape[-1])
        return whole.index_copy(1, rows[0], output)

    hooks = [last.register_forward_pre_hook(remember, with_kwargs=True)]
    for name, module in last.named_modules():
        if name in ("mlp", "self_attn.q_proj", "self_attn.o_proj"):
            hooks += [module.register_forward_pre_hook(gather), module.register_forward_hook(scatter)]
    return hooks


# ----------------------------------------------------------------------------------------------------------- exactness


def resolve_layout(
    layout: str, model: GRMForSequenceClassification, warn: Callable[[str], None] = warnings.warn
) -> str:
    """
    The layout to train with: `layout`, if it is exact for this model, otherwise `"padded"`. One look at the model's
    class and configuration, and one run of a few tokens in both layouts.

    Args:
        layout (`str`):
            `"padded"`, `"packed"`, `"shared_prefix"`, or `"auto"` for the fastest exact one.
        model ([`GRMForSequenceClassification`]):
            The model, as it is or wrapped by PEFT.
        warn (`Callable`, *optional*):
            Takes the one message that says why it is `"padded"`.

    Returns:
        `str`: `"padded"`, `"packed"` or `"shared_prefix"`.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown: use one of {LAYOUTS}.")
    if layout == "padded":
        return layout
    wanted = "shared_prefix" if layout == "auto" else layout
    reason = _why_inexact(wanted, model)
    if reason is None:
        return wanted
    warn(
        f"layout={layout!r}: using 'padded', because {wanted!r} is not exact for this model: {reason}. Results are "
        "the same, steps are slower. Set layout='padded' to silence this."
    )
    return "padded"


def _why_inexact(layout: str, model: GRMForSequenceClassification) -> str | None:
    decoder = model.get_decoder()
    config = decoder.config
    name = type(decoder).__name__
    if not getattr(decoder, "_supports_attention_backend", False):
        return f"{name} does not compute its attention through transformers' AttentionInterface"
    layer_types = getattr(config, "layer_types", None)
    if other := sorted(set(layer_types or ()) - {"full_attention", "sliding_attention"}):
        return f"{name} has layers of type {', '.join(other)}"
    if any(p.is_meta or p.numel() == 0 for p in model.parameters()):
        return None  # weights are elsewhere (ZeRO-3, meta device): there is nothing to try it on
    try:
        error, tolerance, windows = _try(layout, model)
    except Exception as problem:
        return f"a trial run failed with {type(problem).__name__}: {problem}"
    if layer_types:
        sliding = layer_types.count("sliding_attention")
    else:
        sliding = config.num_hidden_layers if getattr(config, "sliding_window", None) else 0
    if windows != sliding:
        return f"{sliding} layers of {name} have a sliding window, and {windows} say so to the attention function"
    if not error <= tolerance:
        return f"in a trial run hidden states differed by {error:.1e} (relative; {tolerance:.0e} is rounding)"
    return None


@torch.no_grad()
def _try(layout: str, model: GRMForSequenceClassification) -> tuple[float, float, int]:
    """Relative difference of hidden states between `layout` and padded rows, what rounding explains, and the number of
    layers that asked for a sliding window."""
    embeddings = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(embeddings.shape[0], (n,), generator=generator).tolist()  # noqa: E731
    pairs = []
    for prompt, chosen, rejected in ((2 * MIN_SHARED, 5, 4), (MIN_SHARED, 2, 6)):
        shared = draw(prompt)
        pair = {"chosen_ids": shared + draw(chosen), "rejected_ids": shared + draw(rejected)}
        pairs.append(pair | {"chosen_start": prompt, "rejected_start": prompt})
    windows: list[int] = []

    def attention(*args, sliding_window=None, **kwargs):
        windows.append(sliding_window is not None)
        return segment_attention(*args, sliding_window=sliding_window, **kwargs)

    AttentionInterface.register(f"{ATTENTION}_trial", attention)
    hidden = []
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for name in ("padded", layout):
            batch = {k: v.to(embeddings.device) for k, v in PairCollator(0, name, text="both")(pairs).items()}
            with layout_attention(model, name, f"{ATTENTION}_trial"):
                model(
                    **model_kwargs(batch),
                    lm_fn=lambda states, _, at=batch["text_index"]: hidden.append(states.flatten(0, 1)[at]),
                )
    finally:
        for module in training:
            module.training = True
    expected, found = hidden
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(expected.dtype, 5e-2)
    expected, found = expected.double(), found.double()
    return float((found - expected).norm() / expected.norm()), tolerance, sum(windows)
