"""The real base of this project, SmolLM2-135M-Instruct, as a folder that needs no network; and real pairs."""

from .reward_base import BASE_NAME, find_base, published
from .shipped import load_pairs
from .smollm2 import MODEL_ID, folder, origin


__all__ = ["BASE_NAME", "MODEL_ID", "find_base", "folder", "load_pairs", "origin", "published"]
