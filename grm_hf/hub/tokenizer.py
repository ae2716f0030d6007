"""Loads the tokenizer of a folder or repository, and writes its files so that transformers 4 reads them too
(rewardbench needs 4)."""

import json
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils import logging
from transformers.utils.hub import has_file


logger = logging.get_logger(__name__)

FILE = "tokenizer_config.json"
TOKENIZERS = (FILE, "tokenizer.json")


def spell_for_transformers_4(folder: str | Path) -> None:
    """
    Rewrites the two entries of `tokenizer_config.json` that transformers 5 writes and 4 cannot read: the class
    `TokenizersBackend`, which 4 calls `PreTrainedTokenizerFast`, and a list of `extra_special_tokens`, which 4 calls
    `additional_special_tokens`. transformers 5 reads either. Does nothing if there is nothing to rewrite.

    Args:
        folder (`str` or `Path`):
            Folder of a tokenizer. The target of a linked file does not change.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return
    given = json.loads(path.read_text(encoding="utf-8"))
    settings = dict(given)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if settings != given:
        new = path.with_name(f"{FILE}.new")
        new.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(path)


def load_tokenizer(place, **hub):
    """The tokenizer of a folder or Hub id, without code of its own; `None` if there is none."""
    try:
        # transformers 5.0 makes an empty one where there are no files.
        if not any(has_file(place, name, **hub) for name in TOKENIZERS):
            return None
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **hub)
    except (OSError, ValueError) as error:
        logger.warning(f"The tokenizer of '{place}' cannot be loaded: {error}")
        return None
