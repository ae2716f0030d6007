"""`grm verify FOLDER --url ...`: compares the golden rows of a folder with the rewards of a running server."""

from pathlib import Path

from transformers.utils.hub import cached_file

from ..rewards.remote import PROTOCOLS, RemoteScorer
from ..rewards.rollouts import Rendered
from ..scoring.golden import FILE, HALF, RELATIVE_TO, TOLERANCES, GoldenError, read_rows, scale_of


def verify_served(path: str | Path, url: str, api_key: str | None = None) -> str:
    """
    Ask a server for the rewards of a folder's golden rows, and compare.

    Args:
        path (`str` or `Path`):
            Hub id or folder with golden rows. No weights are read.
        url (`str`):
            Address of the server: `grm serve`, or vLLM with the plugin. Without a path, the stored token ids go to
            `/classify`, which both have. With a path, the chats go to that route.
        api_key (`str`, *optional*):
            Key of the server.

    Returns:
        `str`: a table of the rows.

    Raises:
        [`GoldenError`]: a reward differs by more than rounding.
        `ValueError`: there are no golden rows, or the server refuses them; `ConnectionError`: it does not answer.
    """
    path, bare = str(path), url.rstrip("/")
    content = read_rows(str(cached_file(path, FILE)))
    named = any(bare.split("?")[0].endswith(route) for route in PROTOCOLS)
    remote = RemoteScorer(bare if named else f"{bare}/classify", tokenizer=path, api_key=api_key)
    sent = [row["chat"] if named else Rendered(row["ids"]) for row in content["rows"]]
    dtype = content["saved_with"]["dtype"]
    limit = TOLERANCES.get(dtype, HALF)
    scale = scale_of(row["score"] for row in content["rows"])
    lines, wrong, worst = ["row  tokens      stored      served  difference"], [], 0.0
    for number, (row, served) in enumerate(zip(content["rows"], remote.score(sent), strict=True)):
        off = abs(served - row["score"]) / scale
        holds, worst = off <= limit, max(worst, off)
        mark = "" if holds else "  DIFFERS"
        lines.append(f"{number:3}  {len(row['ids']):6} {row['score']:11.6f} {served:11.6f}     {off:.1e}{mark}")
        if not holds:
            wrong.append(number)
    lines.append(f"a difference, {RELATIVE_TO}, may be {limit:.0e} (saved in {dtype})")
    table = "\n".join(lines)
    if wrong:
        why = "\nThe server may compute in half precision, as vLLM does without `--dtype float32`." * (worst <= HALF)
        raise GoldenError(f"'{url}': golden rows {wrong} of {len(lines) - 2} do not hold.\n{table}{why}")
    return table
