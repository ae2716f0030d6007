"""A Generalizable Reward Model as verl's custom reward function:

    python -m verl.trainer.main_ppo reward.custom_reward_function.path=examples/recipes/verl_reward.py \
        reward.custom_reward_function.name=compute_score \
        +reward.custom_reward_function.reward_kwargs.model=runs/grm ...

(older versions of verl: without `reward.`; those with `reward_model.reward_manager=batch` take whole batches by
`name=compute_scores`). `model` is the Hub id or folder, or the address of a server (docs/serving.md);
`+reward.custom_reward_function.reward_kwargs.transform=standardize` is one of the transformations of `grm_hf.rewards`,
and `reference` its reference reward. verl does not pass the prompt to a reward function: put it into `extra_info` when
you prepare the data, `row["extra_info"]["prompt"] = row["prompt"]`. The policy may have another tokenizer than the
reward model.
"""

from functools import cache
from threading import Lock

from grm_hf.rewards import grm_reward_func


LOCK = Lock()  # verl's reward loop calls from several threads


@cache
def load(model, transform, reference):
    return grm_reward_func(model, transform=transform, reference=reference)


def compute_scores(
    data_sources, solution_strs, ground_truths, extra_infos, *, model, transform=None, reference=None, **kwargs
):
    """One reward per answer, as a list of floats; for `reward_manager=batch`."""
    prompts = []
    for number, extra in enumerate(extra_infos):
        prompt = (extra or {}).get("prompt")
        if prompt is None:
            raise ValueError(f"answer {number}: its `extra_info` has no `prompt`, so there is nothing to score it by.")
        prompts.append([dict(message) for message in prompt])
    answers = [[{"role": "assistant", "content": answer}] for answer in solution_strs]
    with LOCK:
        return load(model, transform, reference)(prompts, answers)


def compute_score(
    data_source, solution_str, ground_truth, extra_info=None, *, model, transform=None, reference=None, **kwargs
):
    """The reward of one answer, as a float."""
    lists = ([given] for given in (data_source, solution_str, ground_truth, extra_info))
    return compute_scores(*lists, model=model, transform=transform, reference=reference)[0]
