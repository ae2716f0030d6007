"""The Hub: pushes of complete models (`publish.py`), their cards (`card.py`), other layouts in (`convert.py`) and out
(`export.py`), new code for a saved model (`refresh.py`), and extrapolated weights (`expo.py`)."""

from ..native import load_export
from .convert import Converted, convert
from .expo import Extrapolated, extrapolate
from .export import Exported, export
from .publish import push_folder, push_model
from .refresh import Refreshed, refresh


__all__ = [
    "Converted",
    "Exported",
    "Extrapolated",
    "Refreshed",
    "convert",
    "export",
    "extrapolate",
    "load_export",
    "push_folder",
    "push_model",
    "refresh",
]
