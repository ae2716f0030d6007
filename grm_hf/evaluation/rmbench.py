"""RM-Bench (THU-KEG): three right and three wrong answers to a prompt, in rising style."""

from .examples import NAME, TEXT, TEXTS, Example, Source, one_of
from .suite import Suite, parts_by


STYLES = 3  # concise, detailed plain text, detailed markdown
DOMAINS = ("chat", "code", "math", "safety")
DOMAIN_NAMES = ("chat", "code", "math", "safety-refuse", "safety-response")
LEVELS = {
    "easy": [(i, j) for i in range(STYLES) for j in range(STYLES) if i > j],
    "normal": [(i, i) for i in range(STYLES)],
    "hard": [(i, j) for i in range(STYLES) for j in range(STYLES) if i < j],
}


def load(rows):
    for row in rows:
        if "domain" in row:
            domain = row("domain", one_of(*DOMAIN_NAMES))
        else:  # the file of one domain
            domain = row.file.split("/")[-1].split("_")[0]
            if domain not in DOMAIN_NAMES:
                raise row.error(
                    "there is no field `domain`, and the file is not called <domain>_filtered.json with one of "
                    f"{list(DOMAIN_NAMES)}"
                )
        sides = [row("chosen", TEXTS), row("rejected", TEXTS)]
        if any(len(side) != STYLES for side in sides):
            raise row.error(
                f"there are {len(sides[0])} chosen and {len(sides[1])} rejected responses; {STYLES} of each are "
                "required, in rising style"
            )
        responses = [text for side in sides for text in side]
        name = f"{domain}/{row('id', NAME)}"
        yield Example(row("prompt", TEXT), responses, list(range(STYLES)), domain.split("-")[0], name)


def figures(examples, scores):
    """Cell (i, j): a right answer of style i above a wrong one of style j."""
    cells = {
        (i, j): parts_by((e.subset for e in examples), (float(row[i] > row[STYLES + j]) for row in scores))
        for i in range(STYLES)
        for j in range(STYLES)
    }
    domains = [domain for domain in DOMAINS if domain in cells[0, 0]]
    values = {}
    for domain in domains:
        levels = {
            level: sum(cells[cell][domain].mean for cell in members) / len(members)
            for level, members in LEVELS.items()
        }
        values |= {f"domain/{domain}": sum(levels.values()) / len(levels)}
        values |= {f"domain/{domain}/{level}": value for level, value in levels.items()}
    for level in LEVELS:
        values[level] = sum(values[f"domain/{domain}/{level}"] for domain in domains) / len(domains)
    for (i, j), parts in cells.items():
        values[f"cell/{i}/{j}"] = sum(parts[domain].mean for domain in domains) / len(domains)
    # (hard + normal + easy) / 3 is the mean of the nine cells, for each item.
    shares = [
        sum(row[i] > row[STYLES + j] for i in range(STYLES) for j in range(STYLES)) / STYLES**2 for row in scores
    ]
    return values, parts_by((example.subset for example in examples), shares, weight=1.0)


SUITES = (
    Suite(
        name="rm-bench",
        measures="subtle errors, against style: right answers in plain words above wrong ones in markdown",
        headline="mean of the 4 domains, each the mean of easy, normal and hard",
        ties="wrong",
        rows=(1327,),
        licence="none stated",
        url="https://github.com/THU-KEG/RM-Bench",
        fields=(frozenset({"id", "prompt", "chosen", "rejected"}),),
        load=load,
        figures=figures,
        parts=DOMAINS,
        hub=(Source("THU-KEG/RM-Bench", None, "train", "total_dataset"),),
    ),
)
