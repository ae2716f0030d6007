"""The averages of a log line: sums over the pairs since the line before, and the values that are not sums. They are
exact for batches of any size, over accumulation and over ranks.
"""

from collections.abc import Callable

import torch


EXTREMES: dict[str, tuple[Callable, Callable]] = {
    "min_reward": (torch.amin, torch.minimum),
    "max_reward": (torch.amax, torch.maximum),
}
MEANS = ("margin", "pair_loss", "text_loss", "kl")  # over pairs
ROW_MEANS = ("attribute_loss", "aux_loss", "loss")  # over pairs and rated completions
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
                `text_loss`, `aux_loss`, `kl`, `implicit_accuracy`, `nll` and `nll_tokens`; soft labels `label`;
                `is_pair`, which is 0 for a rated completion; for an attribute `mse_NAME`, the sum of its squared
                errors, and `ratings_NAME`, their number.
            gather (`Callable`, *optional*):
                Gives the rows of all processes, without those that a sampler repeats. Without it, [`~Averages.take`]
                combines the processes.
        """
        chosen, rejected, *_ = (columns[name] for name in ("chosen", "rejected"))
        pairs = columns.get("is_pair", torch.ones_like(chosen))
        rows = {
            "rows": torch.ones_like(chosen),
            "pairs": pairs,
            "decided": (columns["label"] != 0.5) if "label" in columns else torch.ones_like(chosen),
            "accuracy": (chosen > rejected).to(chosen.dtype),
            "margin": chosen - rejected,
            "reward": chosen + rejected,
            "reward_squared": chosen**2 + rejected**2,
            "min_reward": torch.minimum(chosen, rejected),
            "max_reward": torch.maximum(chosen, rejected),
            **{n: column for n, column in columns.items() if n not in ("chosen", "rejected", "label", "is_pair")},
        }
        if "is_pair" in columns:
            of_rows = [name for name in rows if name in ROW_MEANS or name.startswith(("mse_", "ratings_"))]
            for name in rows.keys() - {"rows", *of_rows}:
                nothing = {"min_reward": torch.inf, "max_reward": -torch.inf}.get(name, 0.0)
                rows[name] = torch.where(pairs > 0, rows[name].double(), nothing)
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
            `perplexity` of the chosen responses; over ratings `mse_NAME` of each attribute. Empty if nothing was
            added. What had no pair or no rating is left out.
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
        averages = {name: total[name] / total["rows"] for name in ROW_MEANS if name in total}
        for name in (name.removeprefix("ratings_") for name in total if name.startswith("ratings_")):
            if total[f"ratings_{name}"]:
                averages[f"mse_{name}"] = total[f"mse_{name}"] / total[f"ratings_{name}"]
        if not (pairs := total["pairs"]):
            return averages
        mean = total["reward"] / (2 * pairs)
        averages |= {name: total[name] / total["decided"] for name in ACCURACIES if name in total and total["decided"]}
        averages |= {name: total[name] / pairs for name in MEANS if name in total}
        averages |= {"min_reward": total["min_reward"], "mean_reward": mean, "max_reward": total["max_reward"]}
        averages["std_reward"] = max(total["reward_squared"] / (2 * pairs) - mean**2, 0.0) ** 0.5
        if total.get("nll_tokens"):
            averages["perplexity"] = float(torch.tensor(total["nll"] / total["nll_tokens"]).exp())
        return averages
