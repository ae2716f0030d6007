"""Published preference data as rows that the trainer takes: pairs with a `margin` or a soft `label`, and rated
responses."""

from .data_sets import DATA_SETS
from .loading import load_preferences


__all__ = ["DATA_SETS", "load_preferences"]
