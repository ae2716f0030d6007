"""The entry points that vLLM calls (pyproject.toml). `register` runs in every process of vLLM, possibly several times,
so it imports nothing that starts a device. It names the model class by a string; vLLM imports it to build the model.
"""

import asyncio
import logging
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..configuration_grm import GRMConfig


logger = logging.getLogger(f"vllm.{__name__}")

ARCHITECTURE = "GRMForSequenceClassification"
MODEL = f"grm_hf.serving.vllm_model:{ARCHITECTURE}"


def register() -> None:
    """Entry point of the group `vllm.general_plugins`."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    AutoConfig.register(GRMConfig.model_type, GRMConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL)
    MODELS_CONFIG_MAP[ARCHITECTURE] = GRMModelConfig


class GRMModelConfig:
    """The checks of vLLM before it starts an engine: a folder that cannot be served is refused here, with the
    remedy."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        from vllm import ModelRegistry

        config = model_config.hf_config
        body = body_architecture(config.text_config)
        if body not in ModelRegistry.get_supported_archs():
            raise ValueError(
                f"vLLM has no {body or 'causal language model'} for bodies of type '{config.text_config.model_type}'. "
                f"Serve the model with `grm serve {model_config.model}`."
            )
        info = ModelRegistry.inspect_model_cls([body], model_config)[0]
        if info.is_hybrid or info.has_inner_state or info.is_attention_free or info.supports_multimodal:
            raise ValueError(
                f"vLLM's {body} keeps a state besides the attention cache, or reads more than text, which this plugin "
                f"does not pass on. Serve the model with `grm serve {model_config.model}`."
            )
        longest = config.max_sequence_length
        if longest is not None and longest < model_config.max_model_len:
            logger.info(
                "max_model_len is %d, the longest text that the reward model scores: training cut the beginning of "
                "longer ones, and vLLM would read them whole.",
                longest,
            )
            model_config.max_model_len = longest
        settle_dtype(model_config)
        tell_what_to_send(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        return


def body_architecture(text_config: Any) -> str | None:
    """Name of the causal language model of a body, the same in transformers and in vLLM."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text_config.model_type)
    return name if name is None or isinstance(name, str) else name[0]


def tell_what_to_send(model_config: Any) -> None:
    """Warn if vLLM's own routes turn messages or text into other token ids than training did."""
    from transformers import AutoTokenizer

    from .tokens import inexact_forms

    name = model_config.tokenizer or model_config.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=model_config.tokenizer_revision)
    except (OSError, ValueError) as error:
        logger.warning("The tokenizer of '%s' cannot be loaded, so token ids must be sent. (%s)", name, error)
        return
    if wrong := inexact_forms(tokenizer, model_config.hf_config):
        logger.warning(
            "Of %s, vLLM does not make the token ids of training ('%s'). To /classify and /pooling send token ids "
            "(`grm_hf.GRMScorer(...).encode(chat).ids`) instead; the routes of grm_hf (VLLM_PLUGINS=grm,grm_score) "
            "are exact.",
            " and ".join(wrong),
            name,
        )


def settle_dtype(model_config: Any) -> None:
    """vLLM serves a folder in float32 in float16, and knows bodies that cannot be computed in that by their own
    `model_type` alone."""
    import torch
    from vllm.config import model as settings

    body, saved = model_config.hf_config.text_config.model_type, model_config.hf_config.dtype
    if model_config.dtype == torch.float16 and body in getattr(settings, "_FLOAT16_NOT_SUPPORTED_MODELS", ()):
        logger.warning("Bodies of type '%s' cannot be computed in float16, so bfloat16 is used.", body)
        model_config.dtype = torch.bfloat16
    if saved == torch.float32 != model_config.dtype:
        logger.warning(
            "The model was saved in float32 and is computed in %s, so rewards differ by its rounding. "
            "`--dtype float32` gives those of GRMScorer.",
            str(model_config.dtype).removeprefix("torch."),
        )


# -------------------------------------------------------------------------------------------------------------- routes


class Routes:
    """An endpoint plugin of vLLM: one route of `grm_hf.serving.routes` on vLLM's own server. It is loaded only if
    VLLM_PLUGINS names it and `grm`."""

    required_tasks = ("classify",)

    def __init__(self, route: str):
        self.name, self.route = f"grm_{route}", route

    def attach_router(self, app: Any) -> None:
        from .routes import router

        app.include_router(router((self.route,), lambda request: request.app.state.grm_engine))

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        if not hasattr(state, "grm_engine"):
            state.grm_engine = VLLMEngine(engine_client)


score_routes, openrlhf_routes, llamafactory_routes, slime_routes, tei_routes = (
    partial(Routes, route) for route in ("score", "openrlhf", "llamafactory", "slime", "tei")
)


class VLLMEngine:
    """Computes rewards behind the routes on a vLLM server (see `routes.Engine`)."""

    max_texts = 4096

    def __init__(self, client: Any):
        from transformers import AutoTokenizer

        from ..encoding import Encoder
        from ..rewards.rollouts import RolloutEncoder

        settings = client.vllm_config.model_config
        self.client, self.config = client, settings.hf_config
        if getattr(self.config, "model_type", None) != "grm":
            raise ValueError(f"'{settings.model}' is no GRM folder, and the routes of grm_hf serve nothing else.")
        self.name = settings.served_model_name
        self.vocab_size = settings.get_vocab_size()
        tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer, revision=settings.tokenizer_revision)
        self.rollouts = RolloutEncoder(Encoder.from_config(tokenizer, self.config))
        self._tokenise = ThreadPoolExecutor(1, "tokenise")

    async def encode(self, encode):
        return await asyncio.get_running_loop().run_in_executor(self._tokenise, encode, self.rollouts)

    async def rewards(self, ids: list[list[int]]) -> list[float]:
        return await asyncio.gather(*map(self._reward, ids))

    async def _reward(self, ids: list[int]) -> float:
        from vllm import PoolingParams

        params = PoolingParams(task="classify", use_activation=False)
        prompt, request_id = {"prompt_token_ids": ids}, f"grm-{uuid.uuid4().hex}"
        async for output in self.client.encode(prompt, params, request_id):
            reward = output.outputs.data
        return float(reward)
