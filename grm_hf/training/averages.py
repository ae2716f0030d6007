"""The averages of a log line: sums over the pairs since the line before, and the values that are not sums. They are
exact for batches of any size, over accumulation and over ranks.
"""

from collections.abc import Callable

import torch


EXTREMES: dict[str, tuple[Callable, Callable]] = {
    "min_reward": (torch.amin, torch.minimum),
    "max_reward": (torch.amax, torch.maximum),
}
MEANS = ("margin", "pair_loss", "text_loss", "aux_loss", "kl")  # over pairs
ACCURACIES = ("accuracy", "implicit_accuracy")  # over pairs whose soft label is no tie


class Averages:
    """
    Adds up batches of pairs and gives their averages.

    ```python
    >>> import torch
    >>> from grm_hf.training.averages import Averages

    >>> averages = Averages()
    >>> averages.add({"chosen": torch.tensor([1.0, 2.0]), "rejected": torch.tensor([0.0, 3.0])})
    >>> averages.add({"chosen": torch.tensor([4.0]), "rejected": torch.tensor([2.0])})
    >>> logged = averages.take()
    >>> round(logged["accuracy"], 4), round(logged["margin"], 4), logged["min_reward"]
    (0.6667, 0.6667, 0.0)
    >>> averages.take()
    {}

    ```
    """

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, columns: dict[str, torch.Tensor], gather: Callable | None = None) -> None:
        """
        Adds a batch.

        Args:
            columns (`dict[str, torch.Tensor]`):
                One value for each pair, `(B,)`: rewards `chosen` and `rejected`, and any of `loss`, `pair_loss`,
                `text_loss`, `aux_loss`, `kl`, `implicit_accuracy`, `nll` and `nll_tokens`; soft labels `label`.
            gather (`Callable`, *optional*):
                Gives the rows of all processes, without those that a sampler repeats. Without it, [`~Averages.take`]
                combines the processes.
        """
        chosen, rejected, *_ = (columns[name] for name in ("chosen", "rejected"))
        rows = {
            "pairs": torch.ones_like(chosen),
            "decided": (columns["label"] != 0.5) if "label" in columns else torch.ones_like(chosen),
            "accuracy": (chosen > rejected).to(chosen.dtype),
            "margin": chosen - rejected,
            "reward": chosen + rejected,
            "reward_squared": chosen**2 + rejected**2,
            "min_reward": torch.minimum(chosen, rejected),
            "max_reward": torch.maximum(chosen, rejected),
            **{name: column for name, column in columns.items() if name not in ("chosen", "rejected", "label")},
        }
        rows |= {name: rows[name] * rows["decided"] for name in ACCURACIES if name in rows}
        table = torch.stack([column.double() for column in rows.values()], dim=1)
        if gather is not None:
            table = gather(table)
        for name, values in zip(rows, table.unbind(1), strict=True):
            if name in EXTREMES:
                of_all, of_two = EXTREMES[name]
                extreme = of_all(values)
                self._sums[name] = of_two(self._sums[name], extreme) if name in self._sums else extreme
            else:
                self._sums[name] = self._sums.get(name, 0) + values.sum()

    def take(self, gather: Callable | None = None) -> dict[str, float]:
        """
        The averages since the last call; then starts again from nothing.

        Args:
            gather (`Callable`, *optional*):
                Takes a `(1, n)` tensor of this process and gives the `(processes, n)` of all.

        Returns:
            `dict[str, float]`: means over pairs, `min_reward`, `mean_reward`, `max_reward`, `std_reward`, and
            `perplexity` of the chosen responses. Empty if nothing was added.
        """
        sums, self._sums = self._sums, {}
        if not sums:
            return {}
        names = sorted(sums)
        values = torch.stack([torch.as_tensor(sums[name], dtype=torch.float64) for name in names])
        if gather is not None:
            columns = gather(values[None]).unbind(1)
            of_all = [EXTREMES[name][0] if name in EXTREMES else torch.sum for name in names]
            values = torch.stack([reduce(column) for reduce, column in zip(of_all, columns, strict=True)])
        total = dict(zip(names, values.tolist(), strict=True))
        pairs = total["pairs"]
        mean = total["reward"] / (2 * pairs)
        averages = {name: total[name] / total["decided"] for name in ACCURACIES if name in total and total["decided"]}
        averages |= {name: total[name] / pairs for name in (*MEANS, "loss") if name in total}
        averages |= {"min_reward": total["min_reward"], "mean_reward": mean, "max_reward": total["max_reward"]}
        averages["std_reward"] = max(total["reward_squared"] / (2 * pairs) - mean**2, 0.0) ** 0.5
        if total.get("nll_tokens"):
            averages["perplexity"] = float(torch.tensor(total["nll"] / total["nll_tokens"]).exp())
        return averages
