"""`reward_accuracy`, a metric for reward models, as a community module of `evaluate`.

The mathematics is in `metrics.py` beside this file, which needs numpy only and works without `evaluate`.
"""

import datasets
import evaluate

from .metrics import graded_metrics, one_to_many_metrics, pairwise_metrics


_DESCRIPTION = """
How good a reward model is, from its rewards: accuracy on preference pairs with a rule for ties and with intervals,
calibration, scores of subsets and sections, length bias; accuracy and reciprocal rank of one correct response against
several wrong ones; best-of-n, rank correlation and STARC distance against a gold reward.
"""

_CITATION = """
@inproceedings{yang2024regularizing,
  title = {Regularizing Hidden States Enables Learning Generalizable Reward Model for {LLMs}},
  author = {Yang, Rui and Ding, Ruomeng and Lin, Yong and Zhang, Huan and Zhang, Tong},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  url = {https://arxiv.org/abs/2406.10216},
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: rewards of the chosen responses, a list of floats. In the configuration "graded": for each prompt, a
        list of the rewards of its responses.
    references: rewards of the rejected responses, a list of floats. In the configuration "one_to_many": for each
        prompt a list of the rewards of its rejected responses. In "graded": for each prompt the gold rewards of its
        responses.
    ties: what a tie counts for the accuracies: 0, 0.5, 1 or "drop"; in "one_to_many" also "share", 1/k with k
        responses at the top. Default: 0.5 for pairs, 0 in "one_to_many".
    temperature: divides the margins before log_loss, brier and ece are computed. Default: 1. Pairs only.
    groups: the prompt of each pair, for the interval that draws whole prompts. Pairs only.
    subsets: the subset of each row. Not in "graded".
    sections: "rewardbench", or for each section a list of its subsets or a mapping from these to weights. Not in
        "graded".
    chosen_lengths, rejected_lengths: lengths of the responses, for the length bias. Pairs only.
    level: of the intervals. Default: 0.95.
    resamples, seed: of the bootstrap. Default: 2000, 0. Not in "one_to_many".

Returns:
    A flat dictionary of Python floats; the card lists the names.

Examples:
    >>> metric = evaluate.load("spaces/reward_accuracy")
    >>> results = metric.compute(predictions=[2.0, 1.0, 0.0], references=[1.0, 1.0, 1.0])
    >>> results["accuracy"], round(results["log_loss"], 4)
    (0.5, 0.7732)

    >>> metric = evaluate.load("spaces/reward_accuracy", "one_to_many")
    >>> results = metric.compute(predictions=[2.0, 1.0], references=[[1.0, 0.0, -1.0], [1.0, 3.0, 0.0]])
    >>> results["accuracy"], round(results["mrr"], 4)
    (0.5, 0.6667)

    >>> metric = evaluate.load("spaces/reward_accuracy", "graded")
    >>> results = metric.compute(predictions=[[1.0, 2.0, 3.0]], references=[[0.0, 1.0, 0.5]])
    >>> results["best_of_1"], round(results["best_of_2"], 4), round(results["kendall"], 4)
    (0.5, 0.6667, 0.3333)
"""

# float64: in float32 two close rewards become a tie.
_NUMBER = datasets.Value("float64")
_FEATURES = {
    "default": {"predictions": _NUMBER, "references": _NUMBER},
    "one_to_many": {"predictions": _NUMBER, "references": datasets.Sequence(_NUMBER)},
    "graded": {"predictions": datasets.Sequence(_NUMBER), "references": datasets.Sequence(_NUMBER)},
}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RewardAccuracy(evaluate.Metric):
    def _info(self):
        if self.config_name not in _FEATURES:
            raise ValueError(f"No configuration {self.config_name!r}; there are {', '.join(map(repr, _FEATURES))}.")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(_FEATURES[self.config_name]),
            reference_urls=[
                "https://arxiv.org/abs/2403.13787",
                "https://arxiv.org/abs/2506.01937",
                "https://arxiv.org/abs/2410.01729",
                "https://arxiv.org/abs/2309.15257",
            ],
        )

    def _compute(
        self,
        predictions,
        references,
        ties=None,
        temperature=None,
        groups=None,
        subsets=None,
        sections=None,
        chosen_lengths=None,
        rejected_lengths=None,
        level=None,
        resamples=None,
        seed=None,
    ):
        report = {"one_to_many": one_to_many_metrics, "graded": graded_metrics}.get(self.config_name, pairwise_metrics)
        given = {
            "ties": ties,
            "temperature": temperature,
            "groups": groups,
            "subsets": subsets,
            "sections": sections,
            "chosen_lengths": chosen_lengths,
            "rejected_lengths": rejected_lengths,
            "level": level,
            "resamples": resamples,
            "seed": seed,
        }
        given = {name: value for name, value in given.items() if value is not None}
        unknown = sorted(set(given) - set(report.__kwdefaults__))
        if unknown:
            raise ValueError(f"The configuration {self.config_name!r} does not use {', '.join(unknown)}.")
        return report(predictions, references, **given)
