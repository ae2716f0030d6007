"""UltraFeedback as pairs of whole chats: H4's, and the one that Argilla cleaned."""

from functools import partial

from ..evaluation.examples import NUMBER, Skipped, Source
from .configuration import Configuration, DataSet, chat, pair


def preference(row, better, worse):
    chosen, rejected = (chat(row, side) for side in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1] or not chosen[:-1]:
        raise row.error(
            "`chosen` and `rejected` do not share the messages before their last one, which are the prompt"
        )
    margin = row(better, NUMBER) - row(worse, NUMBER)
    if {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        yield Skipped("pairs whose last message is not the assistant's")
    elif not margin > 0:  # NaN, too; which of two equal ones is called chosen is chance
        yield Skipped("pairs whose chosen response is not rated higher")
    else:
        yield pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], margin=float(margin))


def _data_set(repo, better, worse, splits):
    return DataSet(
        repo=repo,
        licence="MIT",
        configurations={
            "preference": Configuration(
                "pairs; `margin` is the difference of the two scores",
                partial(preference, better=better, worse=worse),
                frozenset({"chosen", "rejected", better, worse}),
                ("margin",),
                {name: Source(repo, None, split, name) for name, split in splits.items()},
            )
        },
        trl_rows=True,
    )


DATA_SETS = (
    _data_set(
        "HuggingFaceH4/ultrafeedback_binarized",
        "score_chosen",
        "score_rejected",
        {"train": "train_prefs", "test": "test_prefs"},
    ),
    _data_set(
        "argilla/ultrafeedback-binarized-preferences-cleaned", "chosen-rating", "rejected-rating", {"train": "train"}
    ),
)
