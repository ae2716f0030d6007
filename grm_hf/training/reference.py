"""Reference log-probabilities for the `dpo` text loss, computed once before training and kept beside the run.

A file is used again only if its fingerprint matches: the reference's weights, the token ids that the model gets (and
with them template, truncation and special tokens), where responses begin, the dtype and the attention. A few rows are
always computed again, because a fingerprint cannot prove that the stored values are right.
"""

import hashlib
import json
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging

from ..devices import evaluating, is_whole
from ..layouts import PairCollator


logger = logging.get_logger(__name__)

COLUMNS = ("chosen_ids", "rejected_ids", "chosen_start", "rejected_start")
LIVE_ROWS = 4


def fingerprint(lm: torch.nn.Module, dataset: Dataset) -> str:
    """Sha-256 of everything that a reference log-probability depends on, above all the language model `lm`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(lm.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(str(getattr(lm.config, "_attn_implementation", None)).encode())
    for batch in dataset.select_columns(list(COLUMNS)).iter(batch_size=1000):
        digest.update(json.dumps([batch[column] for column in COLUMNS]).encode())
    return digest.hexdigest()


def precompute(trainer, dataset: Dataset, name: str) -> Dataset:
    """Add the columns `ref_chosen_logps` and `ref_rejected_logps`, from the cache of this run or by one pass.

    Args:
        trainer ([`GRMRewardTrainer`]):
            Before its first step: its model is the reference.
        dataset ([`~datasets.Dataset`]):
            Tokenised pairs.
        name (`str`):
            Name of the split, for the file and for messages.

    Raises:
        `ValueError`: the cached values are not those of the model.
    """
    if "ref_chosen_logps" in dataset.column_names and "ref_rejected_logps" in dataset.column_names:
        return dataset
    accelerator = trainer.accelerator
    path = Path(trainer.args.output_dir) / "reference_logps" / f"{name}.safetensors"
    mark = fingerprint(accelerator.unwrap_model(trainer.model).lm, dataset)
    logps = _read(path, mark, name)
    if logps is None:
        logps = _compute(trainer, dataset, name)
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"logps": logps}, path, metadata={"fingerprint": mark})
    else:
        count = min(LIVE_ROWS, len(dataset))
        live = _compute(trainer, dataset.select(range(count)), name)
        if not torch.allclose(live, logps[:count], rtol=1e-3, atol=1e-2):
            raise ValueError(
                f"The reference log-probabilities in {path} are not what the model gives (first rows: cached "
                f"{logps[:count].tolist()}, live {live.tolist()}). Delete the file; they will be computed again."
            )
    accelerator.wait_for_everyone()
    return dataset.add_column("ref_chosen_logps", logps[:, 0].tolist()).add_column(
        "ref_rejected_logps", logps[:, 1].tolist()
    )


def why_adapter_off_is_not_the_start(trainer) -> str | None:
    """The reason why the model with its adapter switched off is not the model at the start of training, or `None` if
    it is. One batch decides: the log-probabilities are equal, and no trained weight changes them."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not is_whole(model):
        return None
    pairs = (row for row in trainer.train_dataset if row.get("is_pair", True))
    rows = [dict(row) for row, _ in zip(pairs, range(LIVE_ROWS), strict=False)]
    if not rows:
        return None  # rated completions alone: no text loss is computed
    collate = PairCollator(trainer.processing_class.pad_token_id, trainer.layout, text="both")
    batch = send_to_device(collate(rows), trainer.accelerator.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model), trainer.compute_loss_context_manager():
        with torch.no_grad():
            start = trainer.response_logps(model, batch)
        with model.disable_adapter():
            off = trainer.response_logps(model, batch)
            still = [parameter for parameter in trained if parameter.requires_grad]  # peft stops those of the adapter
            reached = torch.autograd.grad(off.sum(), still, allow_unused=True) if off.requires_grad and still else ()
    if not torch.equal(off, start):
        return "it changes the model already at the start (it has been trained before, or begins with other weights)"
    if any(gradient is not None for gradient in reached):
        return "weights outside of the adapter are trained as well (for instance bias='all')"
    return None


def _read(path: Path, mark: str, name: str) -> torch.Tensor | None:
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("fingerprint") != mark:
            logger.warning(
                f"The reference log-probabilities in {path} belong to another model, data or template. They are "
                f"computed again for the {name} data."
            )
            return None
        logger.info(f"Reference log-probabilities of the {name} data read from {path}.")
        return file.get_tensor("logps")


@torch.no_grad()
def _compute(trainer, dataset: Dataset, name: str) -> torch.Tensor:
    """`(len(dataset), 2)` sums over response tokens, chosen and rejected, in the order of the dataset."""
    accelerator = trainer.accelerator
    columns = [column for column in COLUMNS if column in dataset.column_names]
    loader = accelerator.prepare_data_loader(
        DataLoader(
            dataset.select_columns(columns),
            batch_size=trainer.args.per_device_eval_batch_size,
            collate_fn=trainer.data_collator,
            shuffle=False,
        )
    )
    model = accelerator.unwrap_model(trainer.model).to(accelerator.device)
    rows = []
    with evaluating(model):
        for inputs in tqdm(loader, f"Reference ({name})", disable=not accelerator.is_local_main_process):
            with trainer.compute_loss_context_manager():
                logps = trainer.response_logps(model, inputs)
            rows.append(accelerator.gather_for_metrics(logps.float().view(2, -1).T.contiguous()).cpu())
    return torch.cat(rows)
