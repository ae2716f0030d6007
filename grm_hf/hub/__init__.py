"""The Hub: pushes of complete models (`publish.py`), their cards (`card.py`), other layouts in (`convert.py`) and out
(`export.py`), and new code for a saved model (`refresh.py`)."""

from ..native import load_export
from .convert import Converted, convert
from .export import Exported, export
from .publish import push_folder, push_model
from .refresh import Refreshed, refresh


__all__ = [
    "Converted",
    "Exported",
    "Refreshed",
    "convert",
    "export",
    "load_export",
    "push_folder",
    "push_model",
    "refresh",
]
