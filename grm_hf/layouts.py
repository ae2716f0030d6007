"""A batch of preference pairs as padded rows, as one packed row, or as one row of trees that has every common prefix
once; and which of these a model can run exactly.

`shared_prefix` is the padded computation without its repetitions. A token's hidden state depends on its position and
on the tokens before it, so sequences share the states of a common beginning. Each token is computed once, at its
position in its own sequence. A branch attends to its prefix and to itself (`grm_hf.attention`).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from .attention import plan_of, serve_segments
from .devices import evaluating
from .modeling_grm import GRMForSequenceClassification, computes_in


MIN_SHARED = 8  # tokens: a shorter prefix saves less than a branch's mask and copied keys cost


# ------------------------------------------------------------------------------------------------------------- batches


class Segment(NamedTuple):
    """
    A run of tokens in a row that follow each other in all their sequences.

    Args:
        start, length (`int`):
            Where it stands in the row.
        parent (`int`):
            The segment before it in its sequences; -1 for none.
        shared (`int`):
            How many tokens come before the run in its sequences. They are the first tokens of the sequence that ends
            with `parent`. If that sequence is longer than `shared`, the two part within it.

    Three answers. The first two begin alike. The third parts from the second within the part that the second shares:

    ```python
    >>> prompt, begin = list(range(10)), list(range(10, 20))
    >>> forest = plant([prompt + begin + [31, 32], prompt + begin + [41], prompt + [51, 52, 53]])
    >>> for segment in forest.segments:
    ...     print(segment)
    Segment(start=0, length=22, parent=-1, shared=0)
    Segment(start=22, length=1, parent=0, shared=20)
    Segment(start=23, length=3, parent=1, shared=10)
    >>> forest.ids[20:]
    [31, 32, 41, 51, 52, 53]
    >>> forest.positions[20:]  # each token at the position that it has in its own sequence
    [20, 21, 20, 10, 11, 12]
    >>> forest.paths[2]  # where the tokens of the third sequence stand
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 23, 24, 25]

    ```
    """

    start: int
    length: int
    parent: int
    shared: int


@dataclass
class Forest:
    """
    Sequences laid out in one row, each common prefix of at least `MIN_SHARED` tokens once.

    Args:
        ids, positions (`list[int]`):
            Token and position of each place in the row.
        segments (`list[Segment]`):
            The runs of the row, in order.
        paths (`list[list[int]]`):
            For each sequence, the place in the row of each of its tokens.
    """

    ids: list[int]
    positions: list[int]
    segments: list[Segment]
    paths: list[list[int]]


def plant(sequences: Sequence[Sequence[int]], share: bool = True) -> Forest:
    """Lay token sequences out in one row, with (`share`) or without their common prefixes merged."""
    forest = Forest([], [], [], [[] for _ in sequences])
    # In sorted order a sequence has its longest common prefix with its neighbour.
    order = sorted(range(len(sequences)), key=lambda i: list(sequences[i])) if share else range(len(sequences))
    before: Sequence[int] = ()
    path: list[int] = []
    segment = -1
    for i in order:
        ids = sequences[i]
        shared = common_prefix(before, ids) if share else 0
        if shared < MIN_SHARED and shared < len(ids):
            shared, segment = 0, -1
        start, own = len(forest.ids), len(ids) - shared
        path = [*path[:shared], *range(start, start + own)]
        if own:
            forest.segments.append(Segment(start, own, segment, shared))
            segment = len(forest.segments) - 1
        forest.ids += ids[shared:]
        forest.positions += range(shared, len(ids))
        forest.paths[i], before = path, ids
    return forest


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Layout(Protocol):
    """
    How token sequences lie in a batch: a row of `LAYOUTS`. Whatever else depends on the layout asks its row.

    Attributes:
        segments (`bool`):
            Whether rows hold several sequences, which the attention of `grm_hf.attention` keeps apart. Such a layout
            is tried on a model before it is used ([`resolve_layout`]).
        shares (`bool`):
            Whether one token may stand for several sequences, so that an average over tokens is another one.
    """

    @property
    def segments(self) -> bool: ...

    @property
    def shares(self) -> bool: ...

    def lay_out(self, sequences: Sequence[Sequence[int]], pad_token_id: int, multiple: int | None) -> tuple:
        """See [`lay_out`]."""

    def size(self, pair: Sequence[Sequence[int]]) -> int:
        """What a pair needs, for `tokens`."""

    def tokens(self, sizes: Sequence[int], multiple: int | None) -> int:
        """How many tokens a batch of pairs of these sizes has at most, padding included."""

    def batches(
        self, texts: Sequence[Sequence[int]], max_tokens: int, ranks: int, enough: int | None = None
    ) -> list[list[int]]:
        """Which of `texts`, which are sorted, are computed together in at most `max_tokens` tokens. A batch of
        `enough` tokens grows no more, unless the next text shares its beginning."""


class Padded:
    """A sequence a row, filled up to the longest. This is what every model is made for."""

    segments = shares = False

    def lay_out(self, sequences, pad_token_id, multiple):
        length = filled(max(map(len, sequences)), multiple)
        padding = [[pad_token_id] * (length - len(ids)) for ids in sequences]
        batch = {
            "input_ids": torch.tensor([[*ids, *pad] for ids, pad in zip(sequences, padding, strict=True)]),
            "attention_mask": torch.tensor(
                [[1] * len(ids) + [0] * len(pad) for ids, pad in zip(sequences, padding, strict=True)]
            ),
        }
        return batch, [range(i * length, i * length + len(ids)) for i, ids in enumerate(sequences)]

    def size(self, pair):
        return max(map(len, pair))

    def tokens(self, sizes, multiple):
        return 2 * len(sizes) * filled(max(sizes), multiple)

    def batches(self, texts, max_tokens, ranks, enough=None):
        max_tokens = min(max_tokens, enough or max_tokens)
        batches = []
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        while order:  # the first is the longest of those left: every row of the batch is padded to it
            count = max(1, max_tokens // len(texts[order[0]]))
            batches.append(order[:count])
            order = order[count:]
        return batches


@dataclass(frozen=True)
class OneRow:
    """All sequences in one row; with `shares`, what they have in common at their beginnings once."""

    shares: bool
    segments = True

    def lay_out(self, sequences, pad_token_id, multiple):
        forest = plant(sequences, self.shares)
        tokens = len(forest.ids)
        if fill := filled(tokens, multiple) - tokens:
            forest.ids += [pad_token_id] * fill
            forest.positions += range(fill)
            forest.segments.append(Segment(tokens, fill, -1, 0))
        read = torch.tensor([path[-1] for path in forest.paths])
        batch = {
            "input_ids": torch.tensor([forest.ids]),
            "position_ids": torch.tensor([forest.positions]),
            "segments": torch.tensor(forest.segments),
            "read_index": read,
            "output_rows": read.unique(),
        }
        return batch, forest.paths

    def size(self, pair):
        return len(plant(pair, self.shares).ids)

    def tokens(self, sizes, multiple):
        return filled(sum(sizes), multiple)

    def batches(self, texts, max_tokens, ranks, enough=None):
        new = [len(text) for text in texts]  # tokens that a text adds to a row behind its predecessor
        if self.shares:
            for i, neighbours in enumerate(pairwise(texts), 1):
                shared = common_prefix(*neighbours)
                new[i] -= shared if shared >= MIN_SHARED else 0
        budget = min(max_tokens, -(-sum(new) // ranks))  # a row for each process
        batches, room = [], -1
        for i, text in enumerate(texts):
            full = enough is not None and budget - room >= enough and new[i] == len(text)
            if room < new[i] or full:
                batches.append([])
                room = budget - len(text)
            else:
                room -= new[i]
            batches[-1].append(i)
        return batches


# To add one: a row here, and its attention in `grm_hf.attention` if it attends to something new.
LAYOUTS: dict[str, Layout] = {
    "padded": Padded(),
    "packed": OneRow(shares=False),
    "shared_prefix": OneRow(shares=True),
}
FASTEST = "shared_prefix"  # what "auto" tries


def filled(tokens: int, multiple: int | None) -> int:
    return -(-tokens // (multiple or 1)) * (multiple or 1)


def lay_out(
    sequences: Sequence[Sequence[int]], layout: str, pad_token_id: int = 0, pad_to_multiple_of: int | None = None
) -> tuple[dict[str, torch.Tensor], Sequence[Sequence[int]]]:
    """
    Makes a batch of token sequences, for training and for scoring.

    Args:
        sequences (`Sequence[Sequence[int]]`):
            Token ids, at least one in each.
        layout (`str`):
            A name in `LAYOUTS`: `"padded"` (a sequence a row), `"packed"` (all in one row) or `"shared_prefix"` (all
            in one row, common prefixes once).
        pad_token_id (`int`, *optional*, defaults to `0`):
            Token that fills rows up.
        pad_to_multiple_of (`int`, *optional*):
            Fill rows up to a multiple of this length.

    Returns:
        The batch for [`model_kwargs`]: `input_ids`, and `attention_mask` (padded), or `position_ids`, `segments`
        `(num_segments, 4)`, `read_index` `(num_sequences,)` (where each reward is read) and `output_rows` (every index
        whose hidden state is read); and for each sequence the index of each of its tokens in the flattened batch.
    """
    return LAYOUTS[layout].lay_out(sequences, pad_token_id, pad_to_multiple_of)


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
            Split the pairs, in their order, into batches of at most this many tokens with padding, and return
            `{"parts": [batch, ...]}`. A longer pair is a batch by itself.

    A pair is a `dict` with `chosen_ids`, `rejected_ids` (`list[int]`), `chosen_start`, `rejected_start` (`int`, index
    of the first response token; needed with a text loss), and optionally `margin`, `label`, `ref_chosen_logps`,
    `ref_rejected_logps` (`float`), `is_pair` (`bool`), `chosen_ratings`, `rejected_ratings` (`list[float]`). If a
    response starts at index 0, no hidden state predicts its first token, and the text loss leaves this token out.

    Returns:
        `dict` of tensors: `input_ids`; `attention_mask` (padded), or `position_ids`, `segments` (see [`Forest`]),
        `read_index` `(2B,)` and `output_rows` (every index whose hidden state is read); with a text loss `text_index`,
        `text_targets`, `text_owner` `(num_tokens,)`; `margin`, `label` and `is_pair` `(B,)`, `ref_logps` `(2B,)` and
        `ratings` `(2B, num_attributes)` if the pairs have them.
    """

    pad_token_id: int
    layout: str = "padded"
    text: str = "none"
    pad_to_multiple_of: int | None = None
    max_tokens: int | None = None

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} is unknown: a collator takes one of {tuple(LAYOUTS)}.")
        if self.text not in ("none", "chosen", "both"):
            raise ValueError(f"text={self.text!r} is unknown: use 'none', 'chosen' or 'both'.")

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.max_tokens is None:
            return self._batch(pairs)
        layout = LAYOUTS[self.layout]
        parts: list[list[dict[str, Any]]] = [[]]
        sizes: list[int] = []
        for pair in pairs:
            sizes.append(layout.size((pair["chosen_ids"], pair["rejected_ids"])))
            if parts[-1] and layout.tokens(sizes, self.pad_to_multiple_of) > self.max_tokens:
                parts.append([])
                sizes = sizes[-1:]
            parts[-1].append(pair)
        return {"parts": [self._batch(part) for part in parts]}

    def _batch(self, pairs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = [pair["chosen_ids"] for pair in pairs] + [pair["rejected_ids"] for pair in pairs]
        batch, paths = lay_out(sequences, self.layout, self.pad_token_id, self.pad_to_multiple_of)
        if self.text != "none":
            starts = [pair["chosen_start"] for pair in pairs]
            if self.text == "both":
                starts += [pair["rejected_start"] for pair in pairs]
            batch |= text_tokens(sequences, starts, paths)
        for name in ("margin", "label", "is_pair"):
            if name in pairs[0]:
                batch[name] = torch.tensor([pair[name] for pair in pairs], dtype=torch.float)
        if "chosen_ratings" in pairs[0]:
            names = ("chosen_ratings", "rejected_ratings")
            batch["ratings"] = torch.tensor([pair[name] for name in names for pair in pairs], dtype=torch.float)
        if "ref_chosen_logps" in pairs[0]:
            names = ("ref_chosen_logps", "ref_rejected_logps")
            batch["ref_logps"] = torch.tensor([pair[name] for name in names for pair in pairs], dtype=torch.float)
        if "output_rows" in batch and "text_index" in batch:
            batch["output_rows"] = torch.cat([batch["output_rows"], batch["text_index"]]).unique()
        return batch


def text_tokens(sequences, starts, paths) -> dict[str, torch.Tensor]:
    """Of each sequence from its `start` on: `text_index`, where a token is predicted, `text_targets`, the token, and
    `text_owner`, the sequence, each `(num_tokens,)`. A token at index 0 is predicted nowhere."""
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


def num_sequences(batch: dict[str, torch.Tensor]) -> int:
    """Number of sequences in a batch; of a [`PairCollator`] `2B`, chosen above rejected."""
    return batch["read_index" if "read_index" in batch else "input_ids"].shape[0]


def sequence_lengths(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Number of tokens of each sequence, `(num_sequences,)`: the same in every layout (a shared prefix counts for
    each)."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum(-1)
    return batch["position_ids"].flatten()[batch["read_index"]] + 1


def embedded_positions(model) -> int | None:
    """How many positions a model has an embedding for; `None` where positions are not embedded (rotary, ALiBi)."""
    decoder, tokens = model.get_decoder(), model.get_input_embeddings()
    tables = (n for n, m in decoder.named_modules() if isinstance(m, nn.Embedding) and m is not tokens)
    learned = any("pos" in name.split(".")[-1] or name.endswith("wpe") for name in tables)
    return decoder.config.max_position_embeddings if learned else None


# ----------------------------------------------------------------------------------------------------------- exactness


def resolve_layout(
    layout: str, model: GRMForSequenceClassification, warn: Callable[[str], None] = warnings.warn
) -> str:
    """
    The layout to train with: `layout` if it is exact for this model, otherwise `"padded"`. Reads the model's class and
    configuration, and runs a few tokens in both layouts.

    Args:
        layout (`str`):
            `"padded"`, `"packed"`, `"shared_prefix"`, or `"auto"` for the fastest exact one.
        model ([`GRMForSequenceClassification`]):
            The model, as it is or wrapped by PEFT.
        warn (`Callable`, *optional*):
            Gets the message that says why the result is `"padded"`.

    Returns:
        `str`: `"padded"`, `"packed"` or `"shared_prefix"`.
    """
    wanted = FASTEST if layout == "auto" else layout
    if wanted not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown: use one of {('auto', *LAYOUTS)}.")
    if not LAYOUTS[wanted].segments:
        return wanted
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
        return None  # weights are elsewhere (ZeRO-3, meta device), so nothing can be tried
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
    """Relative difference of hidden states between `layout` and padded rows, the part that rounding explains, and the
    number of layers that asked for a sliding window."""
    embeddings = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(embeddings.shape[0], (n,), generator=generator).tolist()  # noqa: E731
    pairs = []
    for prompt, chosen, rejected in ((2 * MIN_SHARED, 5, 4), (MIN_SHARED, 2, 6)):
        shared = draw(prompt)
        pair = {"chosen_ids": shared + draw(chosen), "rejected_ids": shared + draw(rejected)}
        pairs.append(pair | {"chosen_start": prompt, "rejected_start": prompt})
    hidden, dtypes = [], set()
    serve_segments(model)
    with evaluating(model):
        for name in ("padded", layout):
            batch = {k: v.to(model.device) for k, v in PairCollator(0, name, text="both")(pairs).items()}
            inputs = model_kwargs(batch)

            def keep(states, _, at=batch["text_index"]):
                hidden.append(states.flatten(0, 1)[at])
                dtypes.add(computes_in(states))  # here, within an autocast that a trainer put around the forward

            model(**inputs, lm_fn=keep)
    expected, computed = hidden
    tolerance = max({torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2) for dtype in dtypes)
    expected, computed = expected.double(), computed.double()
    error = float((computed - expected).norm() / expected.norm())
    return error, tolerance, plan_of(inputs["attention_mask"]).windowed
