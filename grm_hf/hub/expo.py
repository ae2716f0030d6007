"""ExPO: the weights of a training run, extrapolated beyond the model that it ended with (for reward models:
HelpSteer2-Preference, 2410.01257)."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from ..folders import new_folder, readable
from ..metrics import accuracy
from ..modeling_grm import GRMForSequenceClassification
from ..pairs import labels_of
from ..scoring import GRMScorer, golden
from . import card
from .tokenizer import load_tokenizer, spell_for_transformers_4


FORMULA = "theta_1 + {a:g} * (theta_1 - theta_0)"
# What may differ between two models of one architecture: the scale of the rewards, limits, and how each was loaded.
_FREE = {
    *("reward_mean", "reward_std", "reward_temperature", "signals", "base_model", "max_sequence_length", "overlength"),
    *("dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path", "_attn_implementation_autoset"),
}


@dataclass
class Extrapolated:
    """
    The result of [`extrapolate`].

    Args:
        a (`float`):
            The factor that was used.
        accuracies (`dict[float, float]`):
            Accuracy on the validation pairs, for each factor that was tried; a tie of two rewards is half right. Empty
            without pairs.
        model ([`GRMForSequenceClassification`]):
            The model, as it was loaded from the output folder.
    """

    a: float
    accuracies: dict[float, float]
    model: GRMForSequenceClassification


def extrapolate(
    start: str | Path,
    end: str | Path,
    output_dir: str | Path,
    a: float | Sequence[float],
    pairs: Iterable[dict] | None = None,
) -> Extrapolated:
    r"""
    Write the reward model with the weights `theta_1 + a (theta_1 - theta_0)`, where `theta_0` is the model that a run
    began with, and `theta_1` the one that it ended with. `a = 0` gives `theta_1` and `a = -1` gives `theta_0`, to the
    last bit. The arithmetic is in float32; each weight is then rounded to the dtype that `theta_1` has.

    An adapter is merged into its base first, in float32, since the factors of a low-rank update cannot be
    extrapolated one by one. The result is then a whole model in float32.

    Configuration, tokenizer and maximum length are those of `theta_1`. The golden rows are new. `reward_mean` and
    `reward_std` are those over the pairs, or 0 and 1 without them.

    Args:
        start, end (`str` or `Path`):
            Folders (or Hub ids) of two reward models or adapters of one architecture.
        output_dir (`str` or `Path`):
            New or empty folder for the model, its code, its tokenizer, its golden rows and its card.
        a (`float` or `Sequence[float]`):
            The factor. Of several, the one with the best accuracy on `pairs` is used; of equals the one closest to 0.
        pairs (`Iterable[dict]`, *optional*):
            Validation pairs, as for [`GRMScorer.score_pairs`]; and `label`, as in training: below 0.5, `rejected` is
            the better one, and a tie of 0.5 counts for no accuracy.

    Returns:
        [`Extrapolated`].

    Raises:
        `ValueError`: the two differ in architecture, head, policies or tokenizer; there are several factors and no
            pairs; or `output_dir` is not empty. Nothing is written then.
    """
    factors = [float(a)] if isinstance(a, (int, float)) else [float(factor) for factor in a]
    rows = None if pairs is None else list(pairs)
    if not factors or not np.isfinite(factors).all():
        raise ValueError(f"`a` is {a!r}; it must be a finite number, or several of them.")
    if rows is None and len(factors) > 1:
        raise ValueError(f"`a` is {a!r}; to choose one of several, give validation pairs.")
    if rows is not None and not rows:
        raise ValueError("there are no validation pairs.")
    labels = np.array([] if rows is None else labels_of(rows, "validation"))
    if rows is not None and (labels == 0.5).all():
        raise ValueError("every validation pair is a tie: its label is 0.5.")
    with readable(start) as first, readable(end) as last, new_folder(output_dir) as folder:
        theta_0, model = _whole(first), _whole(last)
        _require_one_architecture(theta_0, model, first, last)
        tokenizer = load_tokenizer(last)
        if tokenizer is None:
            raise ValueError(f"'{last}' has no tokenizer, so nothing says how the result reads a text.")
        if _reading(tokenizer) != _reading(load_tokenizer(first)):
            raise ValueError(f"the tokenizers of '{first}' and '{last}' differ; their weights do not belong together.")
        begun, ended = theta_0.state_dict(), {name: value.clone() for name, value in model.state_dict().items()}
        accuracies, moments = {}, {}
        for factor in factors if rows is not None else ():
            _set_weights(model, begun, ended, factor)
            accuracies[factor], moments[factor] = _accuracy(model, tokenizer, rows, labels)
        best = min(factors, key=lambda factor: (-accuracies.get(factor, 0.0), abs(factor)))
        _set_weights(model, begun, ended, best)
        del theta_0, begun, ended
        config = model.config
        config.forget_rewards()  # they were those of theta_1
        config.reward_mean, config.reward_std = moments.get(best, (0.0, 1.0))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        spell_for_transformers_4(folder)
        golden.save_golden(model, tokenizer, folder)
        text = _card(model, tokenizer, Path(output_dir).resolve().name, first, last, best, accuracies, rows)
        (folder / "README.md").write_text(text, encoding="utf-8")
        golden.verify(folder)
        loaded = GRMForSequenceClassification.from_pretrained(folder, dtype="auto")
    return Extrapolated(best, accuracies, loaded)


def _whole(place: str) -> GRMForSequenceClassification:
    """The model of a folder, with its adapter merged in."""
    if Path(place, "adapter_config.json").is_file() and not Path(place, "config.json").is_file():
        from .merge import merge_adapter  # needs peft

        with TemporaryDirectory(prefix="grm_expo_") as temporary:
            return merge_adapter(place, Path(temporary) / "merged", dtype=torch.float32)
    return GRMForSequenceClassification.from_pretrained(place, dtype="auto")


def _require_one_architecture(first, last, first_place: str, last_place: str) -> None:
    """Refuse two models whose weights do not correspond."""
    differ = f"'{first_place}' and '{last_place}' are no two models of one architecture: "
    one, other = _settings(first.config), _settings(last.config)
    for name in sorted({*one, *other}):
        if one.get(name) != other.get(name):
            raise ValueError(f"{differ}`{name}` is {one.get(name)!r} and {other.get(name)!r}.")
    one, other = first.state_dict(), last.state_dict()
    for name in sorted({*one, *other}):
        shapes = [tuple(state[name].shape) if name in state else None for state in (one, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{differ}the shapes of {name} are {shapes[0]} and {shapes[1]}.")


def _settings(config) -> dict:
    """The settings that a score depends on, but for weights and limits. A rate of dropout is none."""
    fields = config.to_dict()
    text = {f"text_config.{name}": value for name, value in fields.pop("text_config").items()}
    free = {*_FREE, *(f"text_config.{name}" for name in _FREE)}
    return {k: v for k, v in {**fields, **text}.items() if k not in free and "drop" not in k}


def _reading(tokenizer):
    """What decides how a text becomes token ids, and the ids of the golden texts."""
    if tokenizer is None:
        return None
    texts = json.dumps(golden.CHATS, ensure_ascii=False)
    return tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer(texts)["input_ids"]


@torch.no_grad()
def _set_weights(model, begun: dict, ended: dict, a: float) -> None:
    """Put `theta_1 + a (theta_1 - theta_0)` into the model."""
    for name, weight in model.state_dict().items():
        one, zero = ended[name], begun[name]
        if not one.is_floating_point():
            weight.copy_(one)
        else:
            # `lerp` computes from the nearer end, so that both ends are exact.
            weight.copy_(torch.lerp(zero.float(), one.float(), 1 + a))


def _accuracy(model, tokenizer, rows, labels) -> tuple[float, tuple[float, float]]:
    """Accuracy on the pairs whose label is no tie, and mean and standard deviation of all rewards."""
    rewards = np.array(GRMScorer(model, tokenizer).score_pairs(rows))
    margins = ((rewards[:, 0] - rewards[:, 1]) * np.sign(labels - 0.5))[labels != 0.5]
    return accuracy(margins), (float(rewards.mean()), float(rewards.std()))


def _card(model, tokenizer, name, first, last, a, accuracies, rows) -> str:
    """The card: the weights in one formula, and the loss and the data of the run."""
    readme = Path(last, "README.md")
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    datasets = card.metadata(text).get("datasets", []) if text else []
    loss = re.search(r"^Loss: `(.+)`$", text, re.MULTILINE)
    facts = card.facts_of_model(model.config, tokenizer, name, model)
    facts |= {
        "datasets": datasets,
        "weights": FORMULA.format(a=a),
        "formula": loss[1] if loss else None,
        "training": [
            ("theta_0, where the run began", Path(first).name),
            ("theta_1, where it ended", Path(last).name),
            *((f"accuracy with a = {factor:g}", f"{accuracies[factor]:.4f}") for factor in sorted(accuracies)),
            *([("validation pairs", len(rows))] if rows else []),
        ],
    }
    tags = [*card.TAGS, "expo"]
    return card.write_card(card.metadata_of(model.config, name, tags, datasets, False), facts)
