"""Log-probability of given tokens under the LM head, summed per sequence. The `(tokens, vocabulary)` matrix never
exists as a whole: hidden states go through the LM head in chunks of at most `ROWS` rows.

There are two exact ways. If the LM head is one `nn.Linear`, its gradient is computed while the chunk of logits is in
memory (`_LinearHead`: three matrix products a token, as with full logits). Any other LM head (soft-capped, scaled,
with an adapter) goes through `model.lm_logits`, and the backward computes each chunk again.
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .modeling_grm import GRMForSequenceClassification


ROWS = 256

_is_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def sequence_logps(
    hidden_states: torch.Tensor,
    model: GRMForSequenceClassification,
    index: torch.Tensor,
    targets: torch.Tensor,
    owner: torch.Tensor,
    n_sequences: int,
    loss: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    r"""
    Sum of the log-probabilities of each sequence's tokens. Call it inside the model's forward (`lm_fn`).

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Last hidden states.
        model ([`GRMForSequenceClassification`]):
            The model they came from, for its LM head.
        index (`torch.LongTensor` of shape `(num_tokens,)`):
            Position, in the flattened hidden states, that predicts each token.
        targets (`torch.LongTensor` of shape `(num_tokens,)`):
            The tokens.
        owner (`torch.LongTensor` of shape `(num_tokens,)`):
            Number of the sequence each token belongs to, in ascending order.
        n_sequences (`int`):
            Number of sequences `n`; those without tokens get 0.
        loss (`Callable`, *optional*):
            The scalar loss of the `(n,)` sums that the caller will compute, up to a constant factor. Its gradient for
            sequences `i` and `i + n // 2` may depend on these two sums only, as in every loss that is a sum over
            pairs. It saves one matrix product of four and never changes the result: if another gradient arrives, the
            chunks are computed again.

    Returns:
        `torch.Tensor` of shape `(n,)`: natural logarithms, in float32 (float64 for a float64 model), differentiable.
    """
    flat = hidden_states.flatten(0, 1)
    head = model.get_output_embeddings()
    if _is_plain_linear(head, model, flat):
        return _LinearHead.apply(flat, head.weight, head.bias, index, targets, owner, n_sequences, loss)
    logps = [
        checkpoint(_token_logps, flat.index_select(0, i), t, model.lm_logits, use_reentrant=False)
        for i, t in zip(index.split(ROWS), targets.split(ROWS), strict=True)
    ]
    sums = torch.zeros(n_sequences, dtype=logps[0].dtype if logps else _exact(flat.dtype), device=flat.device)
    return sums.index_add(0, owner, torch.cat(logps)) if logps else sums


@torch.no_grad()
def token_values(
    hidden_states: torch.Tensor,
    model: GRMForSequenceClassification,
    index: torch.Tensor,
    targets: torch.Tensor,
    alpha: float = 1.0,
) -> torch.Tensor:
    r"""
    What the LM head says of single tokens, without a gradient. Call it inside the model's forward (`lm_fn`).

    Args:
        hidden_states, model, index, targets:
            As for [`sequence_logps`].
        alpha (`float`, *optional*, defaults to `1.0`):
            Temperature of the soft value.

    Returns:
        `torch.Tensor` of shape `(num_tokens, 3)`: the log-probability of the token; its logit minus the soft value
        (`alpha` times its log-probability at temperature `alpha`); and the soft value of the state that predicts it,
        `alpha * logsumexp(logits / alpha)`.
    """
    flat = hidden_states.flatten(0, 1)
    found = [flat.new_zeros(0, 3, dtype=_exact(flat.dtype))]
    for rows, tokens in zip(index.split(ROWS), targets.split(ROWS), strict=True):
        if not len(rows):
            continue
        logits = model.lm_logits(flat.index_select(0, rows))
        logits = logits.to(_exact(logits.dtype))
        chosen = logits.gather(1, tokens[:, None]).squeeze(1)
        normalizer = logits.logsumexp(1)
        values = normalizer if alpha == 1 else alpha * (logits / alpha).logsumexp(1)
        found.append(torch.stack([chosen - normalizer, chosen - values, values], 1))
    return torch.cat(found)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype that logarithms and sums are taken in."""
    return torch.promote_types(dtype, torch.float32)


def _token_logps(rows: torch.Tensor, targets: torch.Tensor, lm_logits: Callable) -> torch.Tensor:
    logits = lm_logits(rows)
    return -F.cross_entropy(logits.to(_exact(logits.dtype)), targets, reduction="none")


def _is_plain_linear(head: nn.Module, model: GRMForSequenceClassification, flat: torch.Tensor) -> bool:
    """Whether `model.lm_logits` is just this `nn.Linear`, so that its weight can be used directly."""
    hooked = hasattr(head, "_hf_hook") or head._forward_hooks or head._forward_pre_hooks
    if type(head) is not nn.Linear or hooked or type(head.weight.data) is not torch.Tensor or not len(flat):
        return False  # adapters, quantised LM heads, LM heads whose weight is sharded or offloaded until the call
    if head not in _is_plain:
        row = flat[:1].detach()
        with torch.no_grad():
            _is_plain[head] = torch.equal(model.lm_logits(row), head(row))
    return _is_plain[head] and head.weight.numel() > 0


class _LinearHead(torch.autograd.Function):
    """Sums of log-probabilities under `hidden @ weight.T + bias`.

    With G = softmax - onehot of a row, the gradient of sum_i c_i s_i is -c G W for the row and -(c G)^T hidden for the
    weight. The first is linear in c for each row, so it is kept without c. The second mixes rows, so it needs each
    sequence's c while G is in memory: `loss` gives it, pair by pair. The backward checks that it differs from the
    arriving gradient by a constant factor only.
    """

    @staticmethod
    def forward(ctx, flat, weight, bias, index, targets, owner, n_sequences, loss):
        ctx.save_for_backward(flat, weight, bias, index, targets, owner)
        device = flat.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        ctx.gradients, ctx.coefficients = None, None
        chunks = _Chunks(ctx.dtype, flat, weight, bias, index, targets)
        sums = flat.new_zeros(n_sequences, dtype=_exact(ctx.dtype))
        rows_learn, head_learns = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        if head_learns and loss is not None:
            ctx.gradients = _Gradients(ctx.needs_input_grad, weight, bias, len(index))
            ctx.coefficients = _sums_and_gradients(sums, chunks, owner, ctx.gradients, loss)
        elif rows_learn and not head_learns:
            ctx.gradients = _Gradients(ctx.needs_input_grad, weight, bias, len(index))
            _sums_and_row_gradients(sums, chunks, owner, ctx.gradients)
        else:
            _sums_alone(sums, chunks, owner)
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_sums):
        flat, weight, bias, index, targets, owner = ctx.saved_tensors
        gradients, factor = ctx.gradients, 1.0
        ctx.gradients = None  # they are scaled in place: a second backward makes them again
        if gradients is not None and ctx.coefficients is not None:
            factor = _constant_factor(grad_sums, ctx.coefficients)
        if gradients is None or factor is None:
            gradients, factor = _Gradients(ctx.needs_input_grad, weight, bias, len(index)), 1.0
            chunks = _Chunks(ctx.dtype, flat, weight, bias, index, targets)
            for rows in chunks.all_rows():
                chunks.compute(rows)
                gradients.add(rows, chunks, grad_sums[owner[rows]])
        return *gradients.finish(flat, index, grad_sums[owner], factor), None, None, None, None, None


def _sums_alone(sums, chunks, owner):
    """Adds up log-probabilities; a later gradient computes the chunks again."""
    for rows in chunks.all_rows():
        sums.index_add_(0, owner[rows], chunks.compute(rows))


def _sums_and_row_gradients(sums, chunks, owner, gradients):
    """For an LM head that does not learn: the gradient of each row, up to its coefficient, while its logits are in
    memory."""
    for rows in chunks.all_rows():
        sums.index_add_(0, owner[rows], chunks.compute(rows))
        gradients.add(rows, chunks)


def _sums_and_gradients(sums, chunks, owner, gradients, loss):
    """For an LM head that learns: for each pair first the two sums, which give the pair's coefficients, then the
    gradients. Returns the coefficients, `(n_sequences,)`."""
    coefficients = torch.zeros_like(sums)
    for pairs in _pairs(owner, len(sums)):
        for rows in pairs.split(ROWS):
            sums.index_add_(0, owner[rows], chunks.compute(rows))
        sequences = owner[pairs]
        coefficients[sequences] = _gradient(loss, sums)[sequences]
        for rows in pairs.split(ROWS):
            if len(pairs) > ROWS:  # a long pair: its coefficient was not known when its chunks were computed first
                chunks.compute(rows)
            gradients.add(rows, chunks, coefficients[owner[rows]])
    return coefficients


class _Chunks:
    """At most `ROWS` rows at a time: `hidden`, and `residual`, the softmax minus the one-hot target."""

    def __init__(self, dtype, flat, weight, bias, index, targets):
        self.flat, self.index, self.targets = flat, index, targets
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self.buffer = flat.new_empty(min(ROWS, len(index)), len(weight), dtype=_exact(dtype))

    def all_rows(self) -> tuple[torch.Tensor, ...]:
        return torch.arange(len(self.index), device=self.index.device).split(ROWS)

    def compute(self, rows: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the targets of `rows`."""
        targets = self.targets[rows, None]
        self.hidden = self.flat.index_select(0, self.index[rows]).to(self.weight.dtype)
        self.residual = logits = self.buffer[: len(rows)]
        if logits.dtype == self.weight.dtype:
            torch.mm(self.hidden, self.weight.T, out=logits)
            if self.bias is not None:
                logits += self.bias
        else:
            logits.copy_(F.linear(self.hidden, self.weight, self.bias))
        target, top = logits.gather(1, targets), logits.amax(1, keepdim=True)
        torch.softmax(logits, 1, out=logits)
        logps = target - top + logits.amax(1, keepdim=True).log()  # logsumexp = top - log(largest probability)
        logits.scatter_add_(1, targets, torch.full_like(target, -1))
        return logps.squeeze(1)


class _Gradients:
    """The sums over chunks: the gradient of each row before its coefficient, and that of the LM head."""

    def __init__(self, needed, weight, bias, n_rows):
        self.rows = weight.new_empty(n_rows, weight.shape[1]) if needed[0] else None
        self.weight = torch.empty_like(weight) if needed[1] else None
        self.bias = torch.zeros_like(bias) if needed[2] else None
        self.empty = True

    def add(self, rows: torch.Tensor, chunks: _Chunks, coefficients: torch.Tensor | None = None) -> None:
        residual = chunks.residual.to(chunks.weight.dtype)
        if self.rows is not None:
            self.rows.index_copy_(0, rows, (residual @ chunks.weight).to(self.rows.dtype))
        if self.weight is not None:
            assert coefficients is not None
            weighted = chunks.hidden * -coefficients[:, None].to(residual.dtype)
            if self.weight.dtype == residual.dtype:
                torch.addmm(self.weight, residual.T, weighted, beta=0 if self.empty else 1, out=self.weight)
            elif self.empty:
                self.weight.copy_(residual.T @ weighted)
            else:
                self.weight += residual.T @ weighted
        if self.bias is not None:
            assert coefficients is not None
            self.bias -= (residual.T @ coefficients.to(residual.dtype)).to(self.bias.dtype)
        self.empty = False

    def finish(self, flat, index, coefficients, factor):
        """Gradients of `flat`, of the weight and of the bias; `factor` scales those of the LM head."""
        grad_flat = None
        if self.rows is not None:
            rows = self.rows.mul_(-coefficients[:, None]).to(flat.dtype)
            grad_flat = torch.zeros_like(flat).index_add_(0, index, rows)
        if self.empty and self.weight is not None:
            self.weight.zero_()
        if factor != 1:
            self.weight, self.bias = (None if g is None else g.mul_(factor) for g in (self.weight, self.bias))
        return grad_flat, self.weight, self.bias


def _gradient(loss: Callable[[torch.Tensor], torch.Tensor], sums: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        sums = sums.detach().requires_grad_()
        return torch.autograd.grad(loss(sums), sums)[0]


def _constant_factor(grad: torch.Tensor, coefficients: torch.Tensor) -> float | None:
    """`f` if `grad = f * coefficients` up to rounding, otherwise `None`."""
    largest = coefficients.abs().argmax()
    factor = grad[largest] / coefficients[largest]
    epsilon = torch.finfo(grad.dtype).eps
    same = (grad - factor * coefficients).abs() <= epsilon * (64 * grad.abs() + 4 * grad.abs().max())
    factor, same = torch.stack([factor, same.all().to(factor.dtype)]).tolist()
    if not same:
        return None
    return 1.0 if abs(factor - 1) < 4 * epsilon else factor  # 1 spares a pass over the gradient


def _pairs(owner: torch.Tensor, n_sequences: int) -> list[torch.Tensor]:
    """Rows in groups of whole pairs (sequences `i` and `i + n_sequences // 2`) of at most `ROWS`; a longer pair is a
    group of its own."""
    ends = torch.bincount(owner, minlength=n_sequences).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    half = n_sequences // 2
    groups: list[list[int]] = []
    for i in range(half):
        pair = [*range(starts[i], ends[i]), *range(starts[i + half], ends[i + half])]
        if groups and len(groups[-1]) + len(pair) <= ROWS:
            groups[-1] += pair
        else:
            groups.append(pair)
    return [torch.tensor(group, device=owner.device) for group in groups if group]
