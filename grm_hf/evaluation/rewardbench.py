"""RewardBench 1 and 2 (allenai) and M-RewardBench, whose subsets and weights are those of RewardBench 1."""

from ..metrics import REWARDBENCH, cohen_kappa, one_to_many, rewardbench2_tie_shares, section_means
from .examples import NAME, TEXT, TEXTS, Example, Source, one_of
from .suite import Part, Suite, parts_by, subset_figures, wins_of


SUBSETS = tuple(subset for section in REWARDBENCH.values() for subset in section)
SUBSETS_2 = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
ENGLISH = "eng_Latn"
LANGUAGES = (
    "arb_Arab ces_Latn deu_Latn ell_Grek fra_Latn heb_Hebr hin_Deva ind_Latn ita_Latn jpn_Jpan kor_Hang nld_Latn "
    "pes_Arab pol_Latn por_Latn ron_Latn rus_Cyrl spa_Latn tur_Latn ukr_Cyrl vie_Latn zho_Hans zho_Hant"
).split()


def present_sections(names) -> dict[str, dict[str, float]]:
    """The sections of RewardBench 1, with the subsets that are in `names`, as in the official code."""
    present = {
        section: {name: weight for name, weight in members.items() if name in names}
        for section, members in REWARDBENCH.items()
    }
    return {section: members for section, members in present.items() if members}


def weigh(parts: dict[str, Part], prefix: str = "", share: float = 1.0) -> dict[str, Part]:
    """Parts called `prefix` and a subset, with the weight of the subset in the mean of the sections."""
    sections = present_sections({name.removeprefix(prefix) for name in parts if name.startswith(prefix)})
    weights = {
        prefix + name: share * weight / sum(members.values()) / len(sections)
        for members in sections.values()
        for name, weight in members.items()
    }
    return {name: parts[name]._replace(weight=weight) for name, weight in weights.items()}


def section_figures(means: dict[str, float], prefix: str = "section/") -> dict[str, float]:
    sections = section_means(means, present_sections(means))
    return {prefix + name: score for name, score in sections.items()}


# ------------------------------------------------------------------------------------------------------- RewardBench 1


def load_1(rows):
    for row in rows:
        subset = row("subset", one_of(*SUBSETS))
        pair = [row("chosen", TEXT), row("rejected", TEXT)]
        yield Example(row("prompt", TEXT), pair, [0], subset, f"{subset}/{row('id', NAME)}")


def figures_1(examples, scores):
    wins = wins_of(examples, scores)
    parts = parts_by((example.subset for example in examples), wins)
    means = {name: part.mean for name, part in parts.items()}
    return section_figures(means) | subset_figures(parts), weigh(parts)


# ------------------------------------------------------------------------------------------------------- RewardBench 2


def load_2(rows):
    for row in rows:
        subset = row("subset", one_of(*SUBSETS_2))
        chosen, rejected, name = row("chosen", TEXTS), row("rejected", TEXTS), str(row("id", NAME))
        for field, answers in (("num_correct", chosen), ("num_incorrect", rejected)):
            if field in row and row.values[field] != len(answers):
                raise row.error(f"`{field}` is {row.values[field]} and there are {len(answers)} such responses")
        meta = {}
        if subset == "Ties":
            role, _, number = name.partition(":")
            if role not in ("ref", "tied") or not number:
                raise row.error(f"`id` is {name!r}; the subset Ties names its rows 'ref:<number>' and 'tied:<number>'")
            meta = {"group": f"ties:{number}"}
        elif len(chosen) != 1:
            raise row.error(f"`chosen` holds {len(chosen)} responses; outside of Ties one is right")
        yield Example(
            row("prompt", TEXT), [*chosen, *rejected], list(range(len(chosen))), subset, f"{subset}/{name}", meta
        )


def figures_2(examples, scores):
    wins = one_to_many(
        [row[0] for row in scores], [row[len(e.correct) :] for e, row in zip(examples, scores, strict=True)], "share"
    )[:, 0]
    parts = parts_by((example.subset for example in examples), wins.tolist(), weight=1.0)
    if "Ties" in parts:
        owners = parts.pop("Ties").owners
        ids = [examples[owner].id.removeprefix("Ties/") for owner in owners]
        if {name.partition(":")[0] for name in ids} == {"ref", "tied"}:  # otherwise the formula has no value
            shares = rewardbench2_tie_shares(
                ids, [scores[owner] for owner in owners], [len(examples[owner].correct) for owner in owners]
            )
            # Their sum is the score of the subset, so their mean is that of `len(shares)` times each.
            parts["Ties"] = Part(1.0, (len(shares) * shares).tolist(), owners)
    if not parts:
        raise ValueError("there are rows of Ties alone, and not of both kinds, 'ref' and 'tied'; no score is defined.")
    return subset_figures(parts), parts


# ------------------------------------------------------------------------------------------------------- M-RewardBench


def load_m(rows):
    for row in rows:
        language = row.file.split("/")[0].partition(".")[0]
        if language not in (ENGLISH, *LANGUAGES):
            raise row.error(
                f"the file is called {language!r}; a file or folder for each language is required, called as on the "
                f"Hub: {ENGLISH}, {', '.join(LANGUAGES)}"
            )
        # English is RewardBench 1, whose column has another name.
        subset = row("source" if "source" in row or language != ENGLISH else "subset", one_of(*SUBSETS))
        name = f"{subset}/{row('id', NAME)}"
        pair = [row("chosen", TEXT), row("rejected", TEXT)]
        yield Example(row("prompt", TEXT), pair, [0], f"{language}/{subset}", f"{language}/{name}", {"group": name})


def figures_m(examples, scores):
    wins = wins_of(examples, scores)
    parts = parts_by((example.subset for example in examples), wins)
    languages = list(dict.fromkeys(name.split("/")[0] for name in parts))
    translated = [language for language in languages if language != ENGLISH] or languages
    outcome = {example.id: win for example, win in zip(examples, wins, strict=True)}
    figures, weighted = {}, {}
    for language in languages:
        prefix = f"{language}/"
        means = {name.removeprefix(prefix): part.mean for name, part in parts.items() if name.startswith(prefix)}
        sections = section_figures(means, f"section/{prefix}")
        figures |= {f"language/{language}": sum(sections.values()) / len(sections)} | sections
        if language in translated:
            weighted |= weigh(parts, prefix, 1 / len(translated))
        both = [
            (outcome[f"{ENGLISH}/{name.removeprefix(prefix)}"], win)
            for name, win in outcome.items()
            if name.startswith(prefix) and f"{ENGLISH}/{name.removeprefix(prefix)}" in outcome
        ]
        if language != ENGLISH and len({label for pair in both for label in pair}) == 2:
            figures[f"kappa/{language}"] = cohen_kappa(*zip(*both, strict=True))
    if kappas := [value for name, value in figures.items() if name.startswith("kappa/")]:
        figures["kappa"] = sum(kappas) / len(kappas)
    return figures, weighted


PAIR = frozenset({"prompt", "chosen", "rejected", "subset", "id"})

SUITES = (
    Suite(
        name="rewardbench",
        measures="chat, hard chat, safety and reasoning: the better of two answers",
        headline="mean of the 4 sections, each the weighted mean of its subsets (`math-prm` counts 984)",
        ties="wrong",
        rows=(2985,),
        licence="ODC-BY",
        url="https://github.com/allenai/reward-bench",
        fields=(PAIR,),
        load=load_1,
        figures=figures_1,
        parts=SUBSETS,
        hub=(Source("allenai/reward-bench", None, "filtered", "filtered"),),
    ),
    Suite(
        name="rewardbench2",
        measures="the best of 4 answers, and equally right answers that must stay close (Ties)",
        headline="mean of the 6 subsets",
        ties="1/n with n at the top; Ties by its own formula",
        rows=(1865,),
        licence="ODC-BY",
        url="https://github.com/allenai/reward-bench",
        fields=(frozenset({"id", "prompt", "chosen", "rejected", "subset", "num_correct"}),),
        load=load_2,
        figures=figures_2,
        parts=SUBSETS_2,
        hub=(Source("allenai/reward-bench-2", None, "test", "test"),),
    ),
    Suite(
        name="m-rewardbench",
        measures="RewardBench in 23 languages, and agreement with English",
        headline="mean over the languages without English of the mean of their sections; `kappa` beside it",
        ties="wrong",
        rows=(),
        licence="ODC-BY",
        url="https://github.com/Cohere-Labs-Community/m-rewardbench",
        fields=(frozenset({"prompt", "chosen", "rejected", "source", "id"}), PAIR),
        load=load_m,
        figures=figures_m,
        parts=tuple(f"{language}/{subset}" for language in LANGUAGES for subset in SUBSETS),
        hub=(
            Source("allenai/reward-bench", None, "filtered", ENGLISH),
            *(Source("CohereLabsCommunity/multilingual-reward-bench", code, "test", code) for code in LANGUAGES),
        ),
    ),
)
