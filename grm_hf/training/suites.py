"""Suites of `grm_hf.evaluation` at the evaluation steps of a training run."""

from transformers import TrainerCallback

from ..devices import is_whole
from ..evaluation import evaluate
from ..scoring import GRMScorer


class SuiteCallback(TrainerCallback):
    """
    Runs suites at each evaluation and adds their figures to its metrics: `eval_<suite>/score`, `.../score_low`,
    `.../score_high`. With several evaluation sets, the suites run once, with the first set.

    Args:
        trainer ([`GRMRewardTrainer`]):
            Its model is scored, and its logs get the figures.
        suites (`list[str]`):
            Names, or `name=PATH` for a suite's files.
        limit (`int`, *optional*):
            Largest number of examples of each suite.
    """

    def __init__(self, trainer, suites: list[str], limit: int | None):
        self.trainer, self.suites, self.limit = trainer, suites, limit
        self.step: int | None = None
        model = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.args.world_size > 1 and not is_whole(model):
            raise ValueError(
                "`eval_suites` needs a model that is whole in each process; this one is split over them. Leave it "
                "out, and run `grm eval` on the checkpoints."
            )

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self.step == state.global_step:
            return
        self.step = state.global_step
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        scorer = GRMScorer(model, trainer.processing_class, accelerator=trainer.accelerator)
        figures = {}
        for suite in self.suites:
            name, _, path = suite.partition("=")
            summary = evaluate(scorer, name, path or None, limit=self.limit).summary
            figures |= {
                f"eval_{name}/{figure}": summary[figure]
                for figure in ("score", "score_low", "score_high")
                if figure in summary
            }
        metrics |= figures
        trainer.log(figures)
