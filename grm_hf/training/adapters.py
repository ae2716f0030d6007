"""Adapters (PEFT) on a reward model: their settings, as peft makes them for the bare language model; a base that they
can name; and further training of adapters.
"""

import copy
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from transformers.utils import logging
from trl import clone_chat_template

from ..modeling_grm import GRMForSequenceClassification


logger = logging.get_logger(__name__)


def trainable(model):
    """The model to train: the model itself, or the adapter that was loaded into it, made trainable."""
    wrapped = vars(model).get("_adapted")  # kept by `GRMForSequenceClassification.from_pretrained`
    if wrapped is not None and not is_peft_model(model):
        for name, config in wrapped.peft_config.items():
            config.inference_mode = False
            wrapped.set_adapter(name)
        model = wrapped
    if is_peft_model(model):
        for config in model.peft_config.values():
            _refuse_virtual_tokens(config)
        if model.active_adapters != ["default"]:
            raise ValueError(
                f"The active adapter is {' and '.join(map(repr, model.active_adapters))}. Peft saves any other than "
                "'default' in a folder of its own, where no loader looks. Train one adapter, of the name 'default': "
                "leave `adapter_name` out where it is made or loaded."
            )
        score = getattr(model.get_base_model(), "score", None)
        if score is not None and not any(parameter.requires_grad for parameter in score.parameters()):
            raise ValueError(
                "This PeftModel does not train the reward head. Make it with modules_to_save=['score'] (and "
                "`is_trainable=True` where it is loaded), or pass the reward model and a `peft_config`."
            )
    elif any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "`model` has the layers of an adapter in it, and is not the PeftModel. Pass what get_peft_model(...) or "
            "PeftModel.from_pretrained(...) returned: they change the model that they are given."
        )
    return model


def require_room(folder, has_adapter: bool) -> None:
    """Refuse, before training, an output folder from which the result could not be loaded: that of a whole model for
    an adapter, and the other way round."""
    name = "config.json" if has_adapter else "adapter_config.json"
    if Path(folder, name).is_file():
        one, other = ("whole model", "adapter") if has_adapter else ("adapter", "whole model")
        raise ValueError(
            f"'{folder}' holds a{'n' * (one == 'adapter')} {one} ({name}), and this run would save "
            f"a{'n' * (other == 'adapter')} {other} there. No loader takes both: choose another `output_dir`."
        )


def for_reward_model(peft_config, model: GRMForSequenceClassification):
    """
    The same settings for a reward model. Its head is trained and saved in full. If targets are left out or name
    experts, they are those that peft knows for the language model.

    Args:
        peft_config ([`~peft.PeftConfig`]):
            The user's settings; they are not changed.
        model ([`GRMForSequenceClassification`]):
            The model that they will be used on.

    Raises:
        `ValueError`: a method that cannot train a reward head.
    """
    _refuse_virtual_tokens(peft_config)
    if not hasattr(peft_config, "modules_to_save"):
        raise ValueError(
            f"{type(peft_config).__name__} cannot train the reward head: it has no `modules_to_save`. Use LoRA or "
            "another method that has."
        )
    settings = copy.deepcopy(peft_config)
    settings.inference_mode = False  # as saved adapters say; nothing would be trained
    if getattr(settings, "target_modules", "none") is None or _has_experts(model.lm):
        _aim_as_on(model.lm, settings)
    if isinstance(settings.target_modules, (list, set)) and "score" in settings.target_modules:
        settings.target_modules = sorted(set(settings.target_modules) - {"score"})
        logger.warning("The reward head `score` is trained in full; it gets no adapter beside that.")
    settings.task_type = settings.task_type or "SEQ_CLS"
    settings.modules_to_save = list(dict.fromkeys([*(settings.modules_to_save or []), "score"]))
    return settings


def _refuse_virtual_tokens(peft_config):
    if peft_config.is_prompt_learning:
        raise ValueError(
            f"{type(peft_config).__name__} puts virtual tokens before a text. The positions that the reward and the "
            "text loss are read at would be others, and such adapters do not load with a reward model. Use LoRA or "
            "another method that changes weights."
        )


def _has_experts(lm):
    config = lm.config
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def _aim_as_on(lm, settings):
    """Fill in the targets that peft finds for the bare language model, on a copy without weights."""
    asked = copy.deepcopy(settings)
    asked.modules_to_save, asked.task_type = None, None
    if hasattr(asked, "init_lora_weights"):
        asked.init_lora_weights = True  # the others need weights
    with torch.device("meta"):
        bare = type(lm)(copy.deepcopy(lm.config))
    resolved = get_peft_model(bare, asked).peft_config["default"]
    for name in ("target_modules", "feedforward_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
        if getattr(resolved, name, None):
            setattr(settings, name, getattr(resolved, name))


def clone_template(model, tokenizer, args, peft_config):
    """Take over the chat template of another tokenizer (`args.chat_template_path`) before the adapter is made, so its
    base has the new tokens; they are trained with the adapter. As [`~trl.RewardTrainer`], for any family."""
    path = args.chat_template_path
    if path is None or (Path(path).is_file() and path.endswith((".jinja", ".j2"))):
        return peft_config
    _, _, added = clone_chat_template(model, tokenizer, path)
    args.chat_template_path = None
    if not added:
        return peft_config
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name.split(".")[-1] for name, module in model.named_modules()}
    indices = dict(getattr(peft_config, "trainable_token_indices", None) or {})
    indices[names[embeddings]] = sorted({*indices.get(names[embeddings], []), *added})
    peft_config.trainable_token_indices = indices
    if head.weight is not embeddings.weight:
        peft_config.modules_to_save = list(dict.fromkeys([*peft_config.modules_to_save, names[head]]))
    return peft_config


def give_a_folder(model, args, tokenizer, always: bool) -> None:
    """
    Save a reward model before training, so its adapters can name it: a model that exists only in memory, or (`always`)
    one that a path alone does not find, for instance another revision.

    If an adapter named the raw language model instead, it would load as a classifier with a random head.
    """
    if model.name_or_path and not always:
        if (here := Path(model.name_or_path)).is_dir():  # from another working directory, a Hub id
            model.name_or_path = model.config._name_or_path = str(here.resolve())
        return
    folder = Path(args.output_dir) / "base"
    with args.main_process_first(desc="saving the untrained reward model"):
        if args.process_index == 0:
            if (folder / "config.json").is_file():
                _require_same_body(model, folder)
            else:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
    model.name_or_path = model.config._name_or_path = str(folder.resolve())


def _require_same_body(model, folder):
    """Refuse to give adapters a base folder that holds another language model (the head travels with the adapter)."""
    saved = GRMForSequenceClassification.from_pretrained(folder, dtype=model.dtype).lm.state_dict()
    state = model.lm.state_dict()
    if saved.keys() != state.keys() or any(not torch.equal(saved[key], state[key].cpu()) for key in saved):
        raise ValueError(
            f"'{folder}' holds the base of earlier adapters in this output folder, and the model given is another "
            "one. Choose another `output_dir`, or delete the folder if those adapters are no longer wanted."
        )


def require_head(folder: Path) -> None:
    """Assert that an adapter was saved with the reward head."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
    assert any(".score." in key for key in keys), f"{path} was saved without the reward head: {keys[:3]}"
