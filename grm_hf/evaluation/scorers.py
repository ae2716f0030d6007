"""All scorers behind one method, `stream(chats)`, which gives a [`Score`] for each chat. [`GRMScorer`] scores a GRM. A
plain, exact loop scores every other sequence classifier with one label. A digest shows whether two scorers are the
same."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations.peft import find_adapter_config_file

from ..devices import evaluating, own_device
from ..encoding import describe, template_kwargs_of, text_of, tools_of, without_nulls
from ..folders import readable, require_base
from ..modeling_grm import GRMForSequenceClassification
from ..rewards.adapters import PolicyScorer, policy_scorer
from ..rewards.rollouts import Rollout
from ..scoring import GRMScorer, Score


VOLATILE = (
    *("_name_or_path", "architectures", "auto_map", "base_model", "dtype", "signals", "torch_dtype"),
    "transformers_version",
)


class ClassifierScorer:
    """
    Scores with any classifier of one label other than a GRM, one text at a time and without padding. Its forward thus
    reads the same token as in its authors' example. The chat template tokenises a chat, and nothing is added. Without
    a template, prompt and response are a pair of texts, as for cross-encoders. A text that is longer than the model
    can read loses its beginning (a leading BOS stays) and is counted as truncated.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Returns `.logits` of shape `(1, 1)`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer. By default loaded from the same place.
        progress (`bool`, *optional*, defaults to `False`):
            Not used, because `evaluate` shows the progress.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            With several processes: each computes a part, and every one gets all results.
    """

    def __init__(self, model, tokenizer=None, progress=False, accelerator=None):
        labels = getattr(getattr(model, "config", None), "num_labels", None)
        if labels != 1:
            raise ValueError(
                f"{type(model).__name__} has {labels} labels; a reward model has one. A language model becomes one by "
                "training (`grm train`), a checkpoint of another layout by `grm convert`."
            )
        if tokenizer is None:
            if not model.name_or_path:
                raise ValueError("The model was made in memory, so its tokenizer is not known. Pass `tokenizer`.")
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        self.model, self.tokenizer, self.accelerator = model, tokenizer, accelerator
        positions = getattr(model.config, "max_position_embeddings", None)
        tables = [m for n, m in model.named_modules() if n.endswith("position_embeddings")]
        if positions and tables and (offset := getattr(tables[0], "padding_idx", None)) is not None:
            positions -= offset + 1  # RoBERTa counts positions from behind that of its padding
        limits = [tokenizer.model_max_length, positions]
        limits = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 1_000_000]
        self.max_length = min(limits, default=None)

    def stream(self, chats: Iterable) -> Iterator[Score]:
        """As [`GRMScorer.stream`]."""
        texts = [self._encode(chat) for chat in chats]
        ranks = 1 if self.accelerator is None else self.accelerator.num_processes
        rank = 0 if self.accelerator is None else self.accelerator.process_index
        rewards = torch.zeros(len(texts), dtype=torch.float64)
        device = self.model.get_input_embeddings().weight.device
        with torch.no_grad(), evaluating(self.model):
            for number, (inputs, _) in enumerate(texts):
                if number % ranks == rank:
                    tensors = {name: torch.tensor([ids], device=device) for name, ids in inputs.items()}
                    rewards[number] = self.model(**tensors).logits.item()
        if ranks > 1:
            rewards = self.accelerator.reduce(rewards.to(self.accelerator.device), "sum").cpu()
        for (inputs, cut), reward in zip(texts, rewards.tolist(), strict=True):
            yield Score(reward, len(inputs["input_ids"]), cut)

    def _encode(self, chat) -> tuple[dict[str, list[int]], bool]:
        if isinstance(chat, str):
            inputs = self.tokenizer(chat, verbose=False)
        else:
            prompt, response = chat["prompt"], chat["response"]
            if self.tokenizer.chat_template:
                messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
                messages += [{"role": "assistant", "content": response}] if isinstance(response, str) else response
                inputs = self.tokenizer.apply_chat_template(
                    [_in_words(message) for message in messages],
                    tools=tools_of(chat.get("tools")),
                    return_dict=True,
                    **template_kwargs_of(chat),
                )
            elif isinstance(prompt, str) and isinstance(response, str):
                inputs = self.tokenizer(prompt, response, verbose=False)
            else:
                raise ValueError(
                    "these are messages, but the tokenizer has no chat template. Set `tokenizer.chat_template`."
                )
        names = [name for name in self.tokenizer.model_input_names if name in inputs]
        inputs = {name: list(inputs[name]) for name in names}
        ids = inputs["input_ids"]
        extra = 0 if self.max_length is None else len(ids) - self.max_length
        if extra > 0:
            head = int(ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id))
            inputs = {name: [*values[:head], *values[head + extra :]] for name, values in inputs.items()}
        return inputs, extra > 0


def _in_words(message: dict) -> dict:
    """A message without nulls, its text parts joined: a template that reads strings would write a Python list."""
    message = without_nulls(message)
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise ValueError(f"a message has content that is not text: found {describe(parts)}. Give text.")
    return {**message, "content": text_of(message)}


def as_scorer(
    model, tokenizer=None, accelerator=None, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """
    The scorer for `evaluate`.

    Args:
        model: Hub id or folder (of a model, or of a GRM's adapter), live model, [`GRMScorer`], [`RewardEnsemble`], or
            an object with `stream(chats)` or `score(chats)`.
        tokenizer, accelerator: For a model that comes without them.
        trust_remote_code: For a Hub id or folder other than a GRM that brings its own code.
        revision: Revision of a Hub id.
    """
    if isinstance(model, (str, os.PathLike)):
        with readable(model) as place:
            return _load(place, tokenizer, accelerator, trust_remote_code, revision)
    if isinstance(model, torch.nn.Module):
        base: Any = model
        if hasattr(model, "peft_config"):
            base = base.get_base_model()
        if getattr(getattr(base, "config", None), "model_type", None) == "grm":
            return PolicyScorer(model, tokenizer, accelerator=accelerator)
        return ClassifierScorer(model, tokenizer, accelerator=accelerator)
    if tokenizer is not None:
        raise ValueError(f"`tokenizer` is given, and {type(model).__name__} has its own.")
    if type(model) is GRMScorer:  # the same scorer; it also takes answers without text, which official files have
        return PolicyScorer(
            model.model, model.tokenizer, max_tokens_per_batch=model.max_tokens_per_batch,
            deterministic=model.deterministic, layout=model.layout, accelerator=model.accelerator or accelerator,
        )
    if not hasattr(model, "stream") and not hasattr(model, "score"):
        raise ValueError(
            f"{type(model).__name__} is nothing that scores: a Hub id, a folder, a model with one label, a GRMScorer, "
            "a RewardEnsemble, or an object with `score(chats)` is required."
        )
    return model


def _load(path, tokenizer, accelerator, trust_remote_code, revision):
    options = {"revision": revision} if revision else {}
    base, base_options = path, options
    adapter = find_adapter_config_file(path, **options)
    if adapter is not None:
        named = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
        base, base_options = GRMForSequenceClassification.find_base(named, path), {}
        require_base(base, path)
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, **base_options)
    if config.model_type == "grm":
        scorer = policy_scorer(path, tokenizer, load_kwargs=options)
        scorer.accelerator = accelerator
        return scorer
    if adapter is not None:
        raise ValueError(f"{path} is an adapter of a {config.model_type}, which is no GRM. Merge it first, with PEFT.")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        path, trust_remote_code=trust_remote_code, output_loading_info=True, **options
    )
    if info["missing_keys"]:
        raise ValueError(
            f"{path} has no weights for {sorted(info['missing_keys'])[:3]}: it is no reward model, and its scores "
            "would be random. A checkpoint of another layout: `grm convert`."
        )
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    return ClassifierScorer(model.to(own_device()), tokenizer, accelerator=accelerator)


def stream(scorer, chats: list) -> list[Score]:
    """Scores of all `chats`, in their order, by a scorer of `as_scorer`."""
    if not hasattr(scorer, "stream"):
        scores = [Score(float(score), 0, False) for score in scorer.score(chats)]
        if len(scores) != len(chats):
            raise ValueError(f"{type(scorer).__name__}.score gives {len(scores)} scores for {len(chats)} chats.")
        return scores
    if not isinstance(scorer, ClassifierScorer):
        chats = [_with_blank(scorer, chat) for chat in chats]
    if isinstance(scorer, GRMScorer):
        return list(scorer.stream(chats, window=None))
    return list(scorer.stream(chats))


def _with_blank(scorer, chat):
    """A chat whose answer has no text as a policy's answer, because scorers of a GRM take it in this form. Official
    files have such answers, and each counts."""
    if isinstance(chat, str) or not isinstance(chat["response"], str) or chat["response"].strip():
        return chat
    prompt, response = chat["prompt"], chat["response"]
    if isinstance(prompt, list) or getattr(getattr(scorer, "tokenizer", None), "chat_template", None):
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        response = [{"role": "assistant", "content": response}]
    return Rollout(prompt, response, chat.get("tools"), chat.get("chat_template_kwargs") or {})


def name_of(scorer) -> str:
    """A name for tables: the Hub id, the last part of the path, or the name of the class."""
    path = str(getattr(getattr(scorer, "model", None), "name_or_path", None) or "")  # of an adapter, its base
    if getattr(scorer, "source", None) is not None:
        path = scorer.source[0]
    if not path:
        return type(scorer.model if isinstance(scorer, (GRMScorer, ClassifierScorer)) else scorer).__name__
    return Path(path).name if Path(path).exists() else path


def _lasting(settings):
    """A configuration without fields that depend on the way of loading and do not change scores (weights have their
    own dtype)."""
    if not isinstance(settings, dict):
        return settings
    return {name: _lasting(value) for name, value in settings.items() if name not in VOLATILE}


def digest_of(scorer) -> str:
    """A digest of a scorer: all weights, configuration and tokenizer, and how members are combined."""
    model = getattr(scorer, "model", None)
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"{type(scorer).__name__} has no `model` by whose weights it could be told from another, so its results "
            "cannot be kept in a folder and taken up again. Leave `output` out."
        )
    digest = hashlib.sha256()
    for part in [model] if hasattr(model, "config") else model.children():
        config: Any = getattr(part, "config", None)
        digest.update(json.dumps(_lasting(config.to_dict() if config else {}), sort_keys=True, default=str).encode())
    digest.update(repr(getattr(scorer, "settings", None)).encode())
    tokenizer: Any = getattr(scorer, "tokenizer", None)
    if tokenizer is not None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
        digest.update(vocabulary.encode() + str(tokenizer.chat_template).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for piece in tensor.detach().reshape(-1).split(1 << 24):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
