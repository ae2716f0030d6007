"""The attention of packed and shared-prefix batches (`grm_hf.layouts`): each segment of a row attends to its prefix
and to itself.

An explicit table says what a segment attends to; position ids do not. The table takes the place of the attention mask,
as a `(1, 1, segments, 4)` integer tensor: transformers passes a mask with four dimensions to the attention function
unchanged. [`serve_segments`] wraps the attention function that a model calls: a call with a table goes to ours, any
other call to the original. Each call decides for itself, so threads may run different layouts on one model, and
configurations and saved files do not change.
"""

import functools
import itertools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_grm import GRMConfig


# On a CPU, so many queries at a time attend to the keys that they see: torch's kernel computes the others too.
# Only where plain causal attention is longer than so many keys does it leave most of them out itself.
BLOCK, CAUSAL_KEYS = 64, 1024
# Its backward in bfloat16 is slower than that of two products of so many queries. These keep their weights for it: so
# only up to a number of keys.
PRODUCTS_BLOCK, PRODUCTS_KEYS = 128, 512


class _Plan:
    """The table of segments as the attention function uses it, made once for all layers."""

    def __init__(self, table: list[list[int]]):
        self.starts = [start for start, *_ in table]
        self.lengths = [length for _, length, *_ in table]
        self.prefixes: list[list[tuple[int, int]]] = []  # for each segment: (segment, how many of its first tokens)
        for _, _, parent, shared in table:
            runs = [*self.prefixes[parent], (parent, self.lengths[parent])] if shared else []
            ends = itertools.accumulate((n for _, n in runs), initial=0)
            cut = [(s, min(n, shared - end)) for (s, n), end in zip(runs, ends, strict=False)]
            self.prefixes.append([(s, n) for s, n in cut if n > 0])
        keys = (n + sum(m for _, m in prefix) for n, prefix in zip(self.lengths, self.prefixes, strict=True))
        self.longest = max(keys)
        self.masks: dict[tuple, torch.Tensor] = {}
        self.varlen: tuple | None = None
        self.windowed = 0  # calls that asked for a sliding window

    def mask(self, queries: int, keys: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """`(queries, keys)`, 0 or -inf: the last query sees all keys, and each query before it one key fewer; with
        `window`, only that many keys back. On a CPU, a part of one mask that serves every block."""
        rows, columns = (PRODUCTS_BLOCK, self.longest) if like.device.type == "cpu" else (queries, keys)
        key = (rows, columns, window, like.dtype, like.device)
        if key not in self.masks:
            at = torch.arange(columns - rows, columns, device=like.device)[:, None]
            to = torch.arange(columns, device=like.device)
            seen = to <= at if window is None else (to <= at) & (to > at - window)
            self.masks[key] = torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, float("-inf"))
        return self.masks[key][-queries:, -keys:]

    def ragged(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """For ragged batches: places of each segment's keys, ends of queries and keys, and the longest of both."""
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


def is_table(attention_mask) -> bool:
    """Whether the attention mask is a table of segments."""
    return (
        isinstance(attention_mask, torch.Tensor)
        and attention_mask.dtype == torch.int64
        and attention_mask.dim() == 4
        and attention_mask.shape[:2] == (1, 1)
        and attention_mask.shape[-1] == 4
    )


def plan_of(table: torch.Tensor) -> _Plan:
    """The plan for a table of segments; the same object for all layers."""
    if table not in _plans:
        _plans[table] = _Plan(table[0, 0].tolist())
    return _plans[table]


# Arguments of decoders that do not change the attention. Any other might (sinks, biases, chosen blocks).
HARMLESS = {
    "cache",
    "cache_params",
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
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """An attention function for transformers: each segment of the row attends to its prefix and to itself, causally.
    `attention_mask` holds the table of segments; `query` is `(1, heads, tokens, head_dim)`."""
    plan = plan_of(attention_mask)
    plan.windowed += sliding_window is not None
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in HARMLESS)
    if unknown or is_causal is False or query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{type(module).__name__} asks for attention that packed and shared-prefix layouts do not have "
            f"(arguments {unknown}, is_causal={is_causal}, queries {tuple(query.shape)}, keys {tuple(key.shape)}). "
            "Use layout='padded'."
        )
    assert sum(plan.lengths) == query.shape[2], (plan.lengths, query.shape)
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:  # rotary parts are in float32
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    if (flash := _flash_kernel(query, value, dropout, softcap)) is not None:
        return flash(query, key, value, plan.ragged(query.device), scaling, dropout, sliding_window, softcap), None

    on_cpu = query.device.type == "cpu"
    half = query.dtype in (torch.bfloat16, torch.float16)
    queries, keys, values = (x.split(plan.lengths, 2) for x in (query, key, value))
    outputs = []
    for i, prefix in enumerate(plan.prefixes):
        k, v = keys[i], values[i]
        if prefix:
            k, v = (torch.cat([*(x[s][:, :, :n] for s, n in prefix), x[i]], 2) for x in (keys, values))
        # Checkpointing runs the first pass of a training without gradients: it has to compute as the second one does.
        backward = torch.is_grad_enabled() or module.training
        products = softcap is not None or (on_cpu and half and backward and k.shape[2] <= PRODUCTS_KEYS)
        causal = not prefix and not products and (sliding_window is None or k.shape[2] <= sliding_window)
        block = PRODUCTS_BLOCK if products else BLOCK
        if not on_cpu or (causal and (half or k.shape[2] > CAUSAL_KEYS)):
            block = plan.lengths[i]
        at = k.shape[2] - plan.lengths[i]
        for q in queries[i].split(block, 2):
            at += q.shape[2]  # the keys that the last of these queries sees
            window = sliding_window if sliding_window is not None and at > sliding_window else None
            whole = q.shape[2] == at and window is None and not products
            mask = None if whole else plan.mask(q.shape[2], at, window, q)
            seen = q, k[:, :, :at], v[:, :, :at], mask, dropout
            if products:
                out = _products(*seen, scaling, softcap)
            else:
                grouped = q.shape[1] != k.shape[1]
                out = F.scaled_dot_product_attention(*seen, is_causal=whole, scale=scaling, enable_gqa=grouped)
            outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, 1), None


def _products(q, k, v, mask, dropout, scaling, softcap):
    """Attention as two matrix products. In bfloat16 on a CPU, training takes about 0.6 of the time of torch's kernel.
    For Gemma 2, scores go through `softcap * tanh(scores / softcap)`, which no kernel of torch does on CPU."""
    groups = q.shape[1] // k.shape[1]
    by_key = q[0].reshape(k.shape[1], groups * q.shape[2], q.shape[3])  # the heads of a key, one after another
    if softcap is None:
        mask = mask.float()
    k, v, mask = k[0].transpose(1, 2), v[0], mask.repeat(groups, 1).expand(k.shape[1], -1, -1)
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(q.device.type, enabled=False):  # it would round scores, and keep weights in float32 as well
        if softcap is None:
            weights = _Weights.apply(by_key, k, mask, scaling)
        else:
            weights = torch.softmax(torch.tanh(by_key @ k * (scaling / softcap)) * softcap + mask, -1)
    return (F.dropout(weights, dropout) @ v).reshape(q.shape[:3] + v.shape[2:])


class _Weights(torch.autograd.Function):
    """`softmax(scaling * q @ k + mask)` with scores in float32: rounded to bfloat16, large ones (Qwen2 adds a bias to
    keys) give other weights. What the backward keeps and computes is in the dtype of `q`."""

    @staticmethod
    def forward(ctx, q, k, mask, scaling):
        weights = torch.softmax(torch.baddbmm(mask, q.float(), k.float(), alpha=scaling), -1).to(q.dtype)
        ctx.save_for_backward(q, k, weights)
        ctx.scaling = scaling
        return weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        q, k, weights = ctx.saved_tensors
        scores = torch._softmax_backward_data(gradient, weights, -1, q.dtype) * ctx.scaling
        return scores @ k.transpose(1, 2), q.transpose(1, 2) @ scores, None, None


def _flash_kernel(query, value, dropout, softcap) -> Callable | None:
    """A kernel for ragged batches, if there is one: flash-attn's or torch's."""
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


# --------------------------------------------------------------------------------------------------------- in a model


_installing = threading.Lock()


def grm_within(model: nn.Module) -> Any:
    """The GRM in `model`, which may be wrapped (PEFT, DDP, FSDP), or `None`. Its class may also be the copy of ours
    that `trust_remote_code=True` loads from the model's folder."""
    grm = lambda m: isinstance(m, PreTrainedModel) and m.config.model_type == GRMConfig.model_type  # noqa: E731
    return next(filter(grm, model.modules()), None)


def serve_segments(model: nn.Module) -> None:
    """
    Lets `model` run packed and shared-prefix batches too. Call it again after a change of the layers or of the
    attention implementation; a repeated call costs almost nothing.

    Args:
        model (`nn.Module`):
            The model, as it is or wrapped (PEFT, DDP, FSDP).
    """
    decoder = grm_within(model).model
    name = decoder.config._attn_implementation
    with _installing:
        if name in ALL_ATTENTION_FUNCTIONS:
            if not hasattr(ALL_ATTENTION_FUNCTIONS[name], "serves_segments"):
                AttentionInterface.register(name, _either(ALL_ATTENTION_FUNCTIONS[name]))
        else:  # "eager" is a function of this name in each family's module
            for file in {sys.modules[type(m).__module__] for m in decoder.modules()}:
                eager = getattr(file, "eager_attention_forward", None)
                if eager is not None and not hasattr(eager, "serves_segments"):
                    file.eager_attention_forward = _either(eager)  # type: ignore[attr-defined]
        _finish_read_rows_only(decoder)


def _either(attention: Callable) -> Callable:
    """An attention function that is ours for tables of segments and `attention` for everything else."""

    @functools.wraps(attention)
    def either(module, query, key, value, attention_mask=None, *args, **kwargs):
        chosen = segment_attention if is_table(attention_mask) else attention
        return chosen(module, query, key, value, attention_mask, *args, **kwargs)

    either.serves_segments = True  # type: ignore[attr-defined]
    return either


class _LastLayer(threading.local):
    """One pass of this thread through the last layer: which of how many rows are read afterwards, and which parts of
    the layer work on these rows only."""

    reference: Callable[[], torch.Tensor | None] = staticmethod(lambda: None)  # weak: forgotten with the batch
    length = 0
    parts: frozenset[nn.Module] = frozenset()

    def rows(self, hidden: torch.Tensor) -> torch.Tensor | None:
        rows = self.reference()
        return None if rows is None else rows.to(hidden.device)


_last = _LastLayer()


def _finish_read_rows_only(decoder: PreTrainedModel) -> None:
    """The last layer needs keys and values of every token, but queries and later parts only where its output is read
    (`output_rows`, an argument of the call). Hooks on those parts, which work on each token by itself, select these
    rows. Layers with other names for them run on all rows."""
    stacks = [m for m in decoder.modules() if isinstance(m, nn.ModuleList)]
    last = next((m for m in stacks if len(m) == decoder.config.num_hidden_layers), None)
    if last is None:
        return
    for name, module in last[-1].named_modules():
        # Checkpointing runs the layer again without its own hooks (transformers 5.24), but with those of its parts.
        if name in ("", "self_attn", "attn", "attention") and _enter not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_enter, with_kwargs=True)
            if not name:
                module.register_forward_hook(_leave, always_call=True)
        by_token = name in ("mlp", "self_attn.q_proj", "self_attn.o_proj")
        if by_token and _gather not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_gather)
            module.register_forward_hook(_scatter)


def _enter(module, args, kwargs):
    hidden, rows = args[0] if args else kwargs["hidden_states"], kwargs.get("output_rows")
    _last.reference = (lambda: None) if rows is None else weakref.ref(rows)
    _last.length, _last.parts = hidden.shape[1], frozenset()


def _leave(module, args, output):
    _last.reference, _last.parts = lambda: None, frozenset()


def _gather(module, args):
    # A part within a part (a layer that PEFT wrapped afterwards) gets rows that the outer part has selected already.
    if not args or args[0].dim() != 3 or args[0].shape[1] != _last.length:
        return None
    if (rows := _last.rows(args[0])) is None:
        return None
    _last.parts |= {module}
    return args[0].index_select(1, rows), *args[1:]


def _scatter(module, args, output):
    if module not in _last.parts:
        return None
    _last.parts -= {module}
    whole = output.new_zeros(1, _last.length, output.shape[-1])
    return whole.index_copy(1, _last.rows(output), output)
