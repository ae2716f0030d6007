"""A GRM as a model of vLLM. The body is the family's own causal language model without its LM head. The reward head in
float32 is the classifier of the pooler, which reads the last token.
"""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces_base import default_pooling_type
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    StageMissingLayer,
    init_vllm_registered_model,
    maybe_prefix,
    no_init_weights,
)

from ..heads_grm import build_head
from .vllm_plugin import body_architecture


LM_HEADS = ("lm.lm_head.", "lm.embed_out.", "lm.output.")


@default_pooling_type(seq_pooling_type="LAST")
class GRMForSequenceClassification(nn.Module):
    """The architecture that [`grm_hf.serving.vllm_plugin.register`] names; nothing else imports it."""

    is_pooling_model = True
    # The reward loop of verl starts vLLM itself. It patches this and looks for `model`, whatever it serves.
    compute_logits = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        text = config.text_config
        with no_init_weights(
            self, lambda module: StageMissingLayer("output", module), targets=(LogitsProcessor, ParallelLMHead)
        ):
            self.lm = init_vllm_registered_model(
                vllm_config,
                prefix=maybe_prefix(prefix, "lm"),
                hf_config=text,
                architectures=[body_architecture(text)],
            )
        width = getattr(text, "word_embed_proj_dim", None) or text.hidden_size  # OPT projects before its LM head
        self.score = build_head(config, width).float().eval()
        self.pooler = DispatchPooler.for_seq_cls(vllm_config.model_config.pooler_config, classifier=self.score)

    @property
    def model(self) -> nn.Module:
        """The body without its LM head."""
        return getattr(self.lm, "model", self.lm)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.lm.embed_input_ids(input_ids)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        """Hidden states of the batch, `(num_tokens, hidden_size)`."""
        return self.lm(input_ids, positions, intermediate_tensors, inputs_embeds)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the weights of a GRM folder. `ValueError` for a reward head that is missing or has another shape."""
        kept = ((name, weight) for name, weight in weights if not name.startswith(LM_HEADS))
        loaded = AutoWeightsLoader(self).load_weights(kept)
        if missing := sorted({f"score.{name}" for name, _ in self.score.named_parameters()} - loaded):
            raise ValueError(
                f"The checkpoint lacks {missing} of its reward head, which would be random. Restore the folder as "
                "`save_pretrained` wrote it; `grm verify FOLDER` checks it. An adapter is merged first: `grm merge "
                "ADAPTER FOLDER`."
            )
        return loaded
