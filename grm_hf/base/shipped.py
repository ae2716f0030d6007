"""Real preference pairs that this package ships. `pairs/NOTICE` names origin and licence of each source."""

from pathlib import Path


FOLDER = Path(__file__).parent / "pairs"
SPLITS = ("train", "validation", "test")


def load_pairs(split: str, sources: tuple[str, ...] | None = None):
    r"""
    Args:
        split (`str`):
            `"train"`, `"validation"` (to choose settings by) or `"test"`. No prompt is in two of them.
        sources (`tuple[str, ...]`, *optional*):
            Only the rows of these: `"pandalm"`, `"gsm8k"`, `"ultrafeedback"` (train, validation), `"hhh"` (test).

    Returns:
        [`~datasets.Dataset`] with `id`, `prompt`, `chosen`, `rejected` (messages), `subset`, `source`.

    Raises:
        `ValueError`: there is no such split, or it has no row of a source.
    """
    import pyarrow.parquet as pq
    from datasets import Dataset

    if split not in SPLITS:
        raise ValueError(f"`split` is {split!r}; it must be one of {SPLITS}.")
    rows = pq.read_table(FOLDER / f"{split}.parquet").to_pylist()
    if sources is not None:
        if missing := sorted(set(sources) - {row["source"] for row in rows}):
            raise ValueError(f"{split} has no rows of {missing}; it has {sorted({row['source'] for row in rows})}.")
        rows = [row for row in rows if row["source"] in sources]
    return Dataset.from_list(rows)
