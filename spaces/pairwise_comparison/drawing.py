"""Results as HTML, readable in light, in dark and on a telephone. Texts of visitors and models are escaped here."""

import html
import json
import math
import unicodedata

import metrics
from calibration import reliability_plot
from encoding import left_out
from tables import shorten


CSS = """
.rm { --a: #6d28d9; --b: #0f766e; --up: 37, 99, 235; --down: 194, 65, 12; --strength: .5; --quiet: #475569;
  --line: rgba(100, 116, 139, .4); color: var(--body-text-color); font-size: 1rem; line-height: 1.5; }
.dark .rm { --a: #b79cfb; --b: #2dd4bf; --up: 96, 165, 250; --down: 251, 146, 60; --strength: .42; --quiet: #b6c2d2;
  --line: rgba(148, 163, 184, .4); }
.rm h2, .rm h3 { color: inherit; scroll-margin-top: 1rem; }
.rm h2 { font-size: 1.4rem; font-weight: 700; line-height: 1.3; margin: 0 0 .3rem; }
.rm h2:focus { outline: 2px solid var(--a); outline-offset: 4px; border-radius: 2px; }
.rm h3 { margin: 1.5rem 0 .45rem; font-size: 1.05rem; font-weight: 700; }
.rm p { margin: .3rem 0; }
.rm .quiet { color: var(--quiet); font-size: .9rem; }
.rm .problem, .rm .notice, .rm .stale { padding: .5rem .8rem; border-radius: 4px; overflow-wrap: anywhere; }
.rm .problem { border-left: 4px solid rgb(var(--down)); background: rgba(var(--down), .1); }
.rm .notice { border-left: 4px solid rgb(var(--up)); background: rgba(var(--up), .1); }
.rm .stale { border: 2px dashed currentColor; font-weight: 700; }
.rm.old h2, .rm.old .halves { text-decoration: line-through; }
.rm [hidden] { display: none; }
.rm span.a { color: var(--a) !important; } .rm span.b { color: var(--b) !important; }
.rm .a, .rm .b { font-weight: 700; }
.rm .quote { margin: .25rem 0; overflow-wrap: anywhere; }
.rm .bars { display: grid; grid-template-columns: minmax(1.6rem, max-content) 1fr 5.2rem; gap: .35rem .7rem;
  align-items: center; }
.rm .bars .value { text-align: right; font-variant-numeric: tabular-nums; font-weight: 700; }
.rm .track { position: relative; height: 1.4rem; border-radius: 4px; background: rgba(100, 116, 139, .12); }
.rm .track i { position: absolute; top: 0; bottom: 0; }
.rm .track .fill { top: .2rem; bottom: .2rem; border-radius: 3px; background: var(--a); border: 1px solid var(--a);
  box-sizing: border-box; }
.rm .track.b .fill, .rm .share i:last-child { background: repeating-linear-gradient(135deg, var(--b) 0 5px,
  transparent 5px 9px); border: 2px solid var(--b); }
.rm .track .zero { left: 50%; width: 2px; margin-left: -1px; background: var(--body-text-color); }
.rm .scale { position: relative; height: 1.2rem; font-size: .8rem; color: var(--quiet);
  font-variant-numeric: tabular-nums; }
.rm .scale span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.rm .scale span:first-child { transform: none; } .rm .scale span:last-child { transform: translateX(-100%); }
.rm .share { display: flex; height: 1.4rem; border-radius: 5px; overflow: hidden; }
.rm .share i { box-sizing: border-box; min-width: 2px; }
.rm .share i:first-child { background: var(--a); border: 2px solid var(--a); } .rm .share i:last-child { flex: 1; }
.rm .halves { display: flex; justify-content: space-between; font-variant-numeric: tabular-nums; font-weight: 700; }
.rm .heat { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 2.1; margin: .25rem 0 .6rem;
  font-size: 1.02rem; }
.rm .heat span.t { padding: .16rem 0; border-bottom: 0 solid rgb(var(--up)); }
.rm .heat span.t.down { border-bottom-style: dotted; border-bottom-color: rgb(var(--down)); }
.rm .heat span.special, .rm .seen span.special { font-family: var(--font-mono, monospace); font-size: .8em;
  outline: 1px dashed var(--line); outline-offset: -1px; border-radius: 3px; padding: .1rem .15rem;
  white-space: nowrap; }
.rm .heat span.t:hover { outline: 2px solid currentColor; outline-offset: 0; }
.rm .legend { display: flex; align-items: center; gap: .6rem; font-size: .85rem; flex-wrap: wrap;
  font-variant-numeric: tabular-nums; }
.rm .legend i { width: 4.5rem; height: .8rem; border-bottom: 3px solid rgb(var(--up));
  background: linear-gradient(90deg, rgba(var(--up), 0), rgba(var(--up), var(--strength))); }
.rm .legend i.down { border-bottom: 3px dotted rgb(var(--down));
  background: linear-gradient(90deg, rgba(var(--down), var(--strength)), rgba(var(--down), 0)); }
.rm .plot { position: relative; height: 15rem; margin: .9rem 5rem 1.7rem 3.2rem; border-left: 1px solid var(--line);
  border-bottom: 1px solid var(--line); }
.rm .plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; display: block; }
.rm .plot polyline { fill: none; stroke: var(--a); stroke-width: 2.5; vector-effect: non-scaling-stroke;
  stroke-linejoin: round; }
.rm .plot .b polyline { stroke: var(--b); stroke-dasharray: 7 4; }
.rm .plot line { stroke: var(--line); vector-effect: non-scaling-stroke; }
.rm .plot line.zero { stroke: var(--body-text-color); opacity: .55; }
.rm .plot .y, .rm .plot .x, .rm .plot .end { position: absolute; font-size: .8rem; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.rm .plot .y { right: 100%; margin-right: .45rem; transform: translateY(-50%); color: var(--quiet); }
.rm .plot .x { top: 100%; margin-top: .3rem; transform: translateX(-50%); color: var(--quiet); }
.rm .plot .end { margin-left: .45rem; transform: translateY(-50%); font-weight: 700;
  background: var(--body-background-fill); padding: 0 .2rem; border-radius: 3px; line-height: 1.2; z-index: 1; }
.rm .plot .dot { position: absolute; width: 11px; height: 11px; margin: -5.5px; border-radius: 50%; }
.rm .plot .dot::after { content: ""; position: absolute; inset: 3px; border-radius: 50%; background: currentColor; }
.rm .plot .dot.b::after { border-radius: 0; }
.rm .plot .dot:hover::after { inset: 0; }
.rm p.axis { text-align: center; font-size: .85rem; color: var(--quiet); }
.rm table { border-collapse: collapse; margin: .3rem 0; }
.rm table, .rm tr, .rm td, .rm th { border: 0; background: none; color: inherit; }
.rm td, .rm th { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; font-weight: 400; }
.rm thead th, .rm caption { font-weight: 700; text-align: left; }
.rm td.number, .rm th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.rm .wide { overflow-x: auto; } .rm .wide table, .rm .full { width: 100%; }
.rm .full td.text { min-width: 0; width: 100%; }
.rm td.text { min-width: 9rem; } .rm table.metrics td:first-child { min-width: 6.6rem; }
.rm td.token { white-space: pre-wrap; font-family: var(--font-mono, monospace); font-size: .9em; }
.rm details { margin: .4rem 0; } .rm summary { cursor: pointer; font-weight: 700; }
.rm .seen { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .95rem; padding: .6rem .8rem; line-height: 1.75;
  background: rgba(100, 116, 139, .1); border-radius: 4px; max-height: 22rem; overflow-y: auto; }
.rm .seen .answer { border-bottom: 2px solid currentColor; }
.rm .two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 0 2rem; }
.rm ul { margin: .2rem 0 .2rem 1.1rem; padding: 0; list-style: disc; }
.rm svg.reliability { width: 100%; height: auto; max-width: 27rem; display: block; }
.rm svg.reliability text { fill: currentColor; font-size: 14px; }
.rm svg.reliability .dot { fill: var(--a); opacity: .8; }
button[role=tab].selected, button[role=tab][aria-selected=true] { color: #6d28d9 !important; }
.dark button[role=tab].selected, .dark button[role=tab][aria-selected=true] { color: #c4b5fd !important; }
#examples { align-items: center; gap: .5rem; }
#examples > :first-child { flex: 0 0 auto; width: auto; min-width: 0 !important; }
@media (min-width: 900px) { #examples { flex-wrap: nowrap; } }
.prose pre, .prose pre code { white-space: pre-wrap; overflow-wrap: anywhere; }
.status { min-height: 0 !important; } .status p:empty { display: none; }
@media (forced-colors: active) {
  .rm .track .fill, .rm .share i, .rm .plot .dot::after, .rm .track .zero { forced-color-adjust: none; }
  .rm .track .fill, .rm .share i:first-child, .rm .plot .dot::after, .rm .track .zero { background: CanvasText;
    border-color: CanvasText; }
  .rm .track.b .fill, .rm .share i:last-child { border-color: CanvasText;
    background: repeating-linear-gradient(135deg, CanvasText 0 5px, Canvas 5px 9px); }
  .rm .plot polyline, .rm .plot line { stroke: CanvasText !important; }
  .rm .track, .rm .problem, .rm .notice { border: 1px solid CanvasText; }
}
"""


def escape(value: object) -> str:
    return html.escape(str(value).encode("utf-8", "replace").decode())


def page(*parts: str) -> str:
    return f'<div class="rm">{"".join(parts)}</div>'


def problem(message: object) -> str:
    return page(f'<p class="problem" role="alert">{escape(message)}</p>')


def notice(message: str) -> str:
    return page(f'<p class="notice">{escape(message)}</p>')


def headline(text: str) -> str:
    """The heading of a result. The page moves the focus to it."""
    return f'<h2 class="verdict" tabindex="-1">{text}</h2>'


def signed(value: float) -> str:
    text = f"{value:+.4g}" if abs(value) >= 1000 else f"{value:+.3f}"
    return text.replace("-", "−")


def percent(value: float) -> str:
    """A probability in percent, never 0 or 100 %."""
    if value < 0.001:
        return "under 0.1 %"
    return "over 99.9 %" if value > 0.999 else f"{100 * value:.1f} %"


def count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def letter(name: str) -> str:
    return f'<span class="{name.lower()}">{name}</span>'


# ---------------------------------------------------------------------------------------------------------- comparison


def verdict(compared: dict) -> str:
    """The verdict, its texts, and its warnings (see `app.compared_of`)."""
    said = escape(compared["verdict"])
    for name in "AB":
        said = said.replace(f"answer {name}", f"answer {letter(name)}")
    texts, rewards = dict(zip("AB", compared["inputs"][3:], strict=True)), compared["rewards"]
    quotes = "".join(
        f'<p class="quote"><b>{letter(name)}</b> <bdi>“{escape(shorten(texts[name], 70))}”</bdi></p>' for name in "AB"
    )
    p = compared["probability_a"]
    return page(
        headline(said),
        '<p class="stale" hidden="hidden"></p>',
        *(f'<p class="problem warning">{escape(text)}</p>' for text in compared["warnings"]),
        quotes,
        f'<div class="halves"><span>A better: {percent(p)}</span><span>B better: {percent(1 - p)}</span></div>',
        f'<div class="share" role="img" aria-label="Probability that A is better {percent(p)}, that B is better '
        f'{percent(1 - p)}"><i style="width:{100 * p:.2f}%"></i><i></i></div>',
        bars([(letter(name), name.lower(), rewards[name], f"Reward of {name}") for name in "AB"]),
        f'<p class="quiet">A reward is one number for how good the model finds an answer. Only the difference of two '
        f"rewards for one prompt means something: here A − B = {signed(rewards['A'] - rewards['B'])}, which makes "
        f"the probability: its sigmoid at temperature {scale(compared)}.</p>",
        f'<p class="quiet">{escape(compared["note"])}</p>' if compared["note"] else "",
    )


def details(result: dict) -> str:
    """The numbers behind a verdict (see `reward_models.compare`)."""
    answers = {name: {**answer, "units": units(answer["tokens"])} for name, answer in result["answers"].items()}
    as_json = escape(json.dumps(result, ensure_ascii=False))
    return page(
        "<h3>The reward after each token</h3><p>What the model would give if the answer ended there: where it jumps, "
        "the model changed its mind. A token is a word or a part of one; the chat template of the model adds the last "
        f"ones, which close the answer.</p>{heat_maps(answers)}{trace(answers)}{token_tables(answers)}",
        f"<h3>The other head</h3>{other_head(result)}",
        f"<h3>What the model saw</h3>{seen(answers)}",
        standardised(answers),
        '<details><summary>The same as JSON</summary><pre class="seen" tabindex="0" role="region" '
        f'aria-label="The comparison as JSON">{as_json}</pre></details>',
        f'<p class="quiet">{escape(result["model"])}'
        + (f" at {escape(result['revision'][:12])}" if result["revision"] else "")
        + f"; both answers in {result['seconds']:.2f} s on {escape(result['device'])}.</p>",
    )


def warnings(result: dict) -> list[str]:
    """Reasons why the rewards of a comparison may be wrong."""
    found = []
    for name, answer in result["answers"].items():
        facts = answer["seen"]
        if facts["unknown"]:
            found.append(
                f"{name} and its prompt have {count(facts['unknown'], 'word')} that the model does not know: its "
                "reward is blind to them."
            )
        if facts["cut"]:
            where = "the prompt and the beginning of the answer" if facts["answer_cut"] else "the prompt"
            found.append(
                f"{name} is too long for the model, which reads {facts['max_tokens']:,} tokens: "
                f"{count(facts['cut'], 'token')} of {where} were cut."
            )
        found += [f"{name} or its prompt is a text {left_out(what)}." for what in facts["unread"]]
        if facts["end"] is None:
            found.append(f"No end-of-turn token closes {name}: its reward may be that of an unfinished answer.")
    for where, words in result["control_words"].items():
        found.append(
            f"{where[0].upper()}{where[1:]} spells {', '.join(f'“{word}”' for word in words)}, which the model reads "
            "as a control token, not as text."
        )
    return found


def bars(rows: list[tuple[str, str, float, str]]) -> str:
    """Diverging bars around zero: label (HTML), class, value, and its name for a screen reader."""
    largest = max((abs(row[2]) for row in rows), default=0) or 1
    parts = []
    for label, kind, value, told in rows:
        parts.append(
            f'<span aria-hidden="true">{label}</span>{track(value, largest, kind, told)}'
            f'<span class="value" aria-hidden="true">{signed(value)}</span>'
        )
    ends = "".join(
        f'<span style="left:{place}%">{text}</span>'
        for place, text in ((0, f"{signed(-largest)}, worse"), (50, "0"), (100, f"better, {signed(largest)}"))
    )
    scale = f'<span></span><div class="scale" aria-hidden="true">{ends}</div><span></span>'
    return f'<div class="bars">{"".join(parts)}{scale}</div>'


def track(value: float, largest: float, kind: str, told: str, style: str = "") -> str:
    width = 50 * abs(value) / largest
    left = 50 if value >= 0 else 50 - width
    return (
        f'<div class="track {kind}" role="img" aria-label="{escape(told)}: {signed(value)}"{style}>'
        f'<i class="fill" style="left:{left:.2f}%;width:{width:.2f}%"></i><i class="zero"></i></div>'
    )


def standardised(answers: dict) -> str:
    values = {name: answer["standardised"] for name, answer in answers.items()}
    if values["A"] is None:
        return ""
    both = ", ".join(f"{letter(name)} {signed(value)}" for name, value in values.items())
    return (
        '<p class="quiet">In standard deviations from the mean reward of the model’s last evaluation set: '
        f"{both}. Zero itself means nothing.</p>"
    )


def scale(result: dict) -> str:
    own = result["model_temperature"]
    return f"{result['temperature']:g}" + ("" if own == 1 else f" × {own:g} (the model’s own)")


def units(tokens: list[dict]) -> list[dict]:
    """Tokens in their shown form: tokens that make one character, or one sign of several characters, are one unit.
    Each has the number of its first token and of its last, from 1, and the reward after its last."""
    numbered = [{**token, "first": number, "last": number} for number, token in enumerate(tokens, 1)]
    characters = together(numbered, lambda before, token: not before["text"])
    return together(characters, lambda before, token: not token["special"] and joins(before["text"], token["text"]))


def together(parts: list[dict], belong) -> list[dict]:
    found: list[dict] = []
    for part in parts:
        if found and belong(found[-1], part):
            before = found.pop()
            logprobs = before["logprob"], part["logprob"]
            text, logprob = before["text"] + part["text"], None if None in logprobs else sum(logprobs)
            part = {**part, "text": text, "first": before["first"], "logprob": logprob}
        found.append(part)
    return found


def joins(before: str, text: str) -> bool:
    """Whether a text continues the sign that another one ends with."""
    if not before or not text:
        return False
    first, last = text[0], before[-1]
    if last == "\u200d" or first == "\u200d" or unicodedata.category(first) in ("Mn", "Me", "Mc"):
        return True
    flags = [0x1F1E6 <= ord(c) <= 0x1F1FF for c in before[::-1]] + [False]
    return 0x1F3FB <= ord(first) <= 0x1F3FF or (0x1F1E6 <= ord(first) <= 0x1F1FF and flags.index(False) % 2 == 1)


def told_of(unit: dict, previous: float | None) -> str:
    told = f"reward {signed(unit['reward'])}"
    if previous is not None:
        told += f", change {signed(unit['reward'] - previous)}"
    if unit["logprob"] is not None:
        told += f", expected with {percent(math.exp(unit['logprob']))}"
    return told + (f" ({unit['last'] - unit['first'] + 1} tokens)" if unit["last"] > unit["first"] else "")


def heat_maps(answers: dict) -> str:
    """Both answers, each token coloured by the reward of the text that ends there. The line below a token is solid if
    the reward is positive and dotted if it is negative."""
    largest = max(abs(token["reward"]) for answer in answers.values() for token in answer["tokens"]) or 1
    parts = []
    for name, answer in answers.items():
        previous, spans = answer["reward_before"], []
        for unit in answer["units"]:
            share = unit["reward"] / largest
            kind = f"t{' special' if unit['special'] else ''}{' down' if share < 0 else ''}"
            spans.append(
                f'<span class="{kind}" title="{escape(told_of(unit, previous))}" '
                f'style="background:{colour(share)};border-bottom-width:{4 * abs(share):.1f}px">'
                f"{visible(unit['text'])}</span>"
            )
            previous = unit["reward"]
        parts.append(f'<div class="heat" dir="auto"><b>{letter(name)}</b>  {"".join(spans)}</div>')
    legend = (
        f'<div class="legend" aria-hidden="true"><span>{signed(-largest)}</span><i class="down"></i><span>0</span>'
        f"<i></i><span>{signed(largest)}</span><span>Point at a token for its numbers, or open the table.</span></div>"
    )
    return f'<div class="two">{"".join(parts)}</div>{legend}'


def colour(share: float) -> str:
    return f"rgba(var(--{'up' if share >= 0 else 'down'}), calc(var(--strength) * {min(1.0, abs(share)):.3f}))"


def visible(text: str) -> str:
    return escape(text).replace("\n", "⏎\n") or "·"


def token_tables(answers: dict) -> str:
    """A table of all numbers of tokens and dots."""
    parts = []
    for name, answer in answers.items():
        previous, rows = answer["reward_before"], []
        if previous is not None:
            rows.append(
                '<tr><td class="number">0</td><td>(end of the prompt)</td>'
                f'<td class="number">{signed(previous)}</td><td class="number">–</td><td class="number">–</td></tr>'
            )
        for unit in answer["units"]:
            change = "–" if previous is None else signed(unit["reward"] - previous)
            expected = "–" if unit["logprob"] is None else percent(math.exp(unit["logprob"]))
            place = f"{unit['first']}" + (f" to {unit['last']}" if unit["last"] > unit["first"] else "")
            rows.append(
                f'<tr><td class="number">{place}</td><td class="token"><bdi>{visible(unit["text"])}</bdi></td>'
                f'<td class="number">{signed(unit["reward"])}</td><td class="number">{change}</td>'
                f'<td class="number">{expected}</td></tr>'
            )
            previous = unit["reward"]
        heads = "".join(
            f'<th scope="col"{kind}>{head}</th>'
            for head, kind in (("token", ' class="number"'), ("text", ""), ("reward", ' class="number"'),
                               ("change", ' class="number"'), ("expected with", ' class="number"'))
        )  # fmt: skip
        parts.append(
            f"<details><summary>The tokens of {letter(name)} as a table</summary>"
            f'<div class="wide" tabindex="0" role="region" aria-label="Tokens of answer {name}"><table>'
            f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
        )
    return "".join(parts)


def trace(answers: dict) -> str:
    """The reward after each token of both answers as lines; it begins at the end of the prompt."""
    lines = {
        name: ([answer["reward_before"]] if answer["reward_before"] is not None else [])
        + [token["reward"] for token in answer["tokens"]]
        for name, answer in answers.items()
    }
    values = [value for line in lines.values() for value in line]
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.06 * ((high - low) or 1)
    low, high = low - room, high + room
    last = max(len(line) for line in lines.values()) - 1 or 1

    def x(i: int) -> float:
        return 100 * i / last

    def y(value: float) -> float:
        return 100 * (high - value) / (high - low)

    ticks = nice_ticks(low, high)
    drawn, over = [], []
    for tick in ticks:
        kind = ' class="zero"' if tick == 0 else ""
        drawn.append(f'<line{kind} x1="0" x2="100" y1="{y(tick):.2f}" y2="{y(tick):.2f}"/>')
        over.append(f'<span class="y" style="top:{y(tick):.2f}%">{f"{tick:g}".replace("-", "−")}</span>')
    for i in sorted({0, *(round(last * k / 4) for k in range(1, 5))}):
        over.append(f'<span class="x" style="left:{x(i):.2f}%">{i}</span>')
    ends = {name: y(line[-1]) for name, line in lines.items()}
    close = abs(ends["A"] - ends["B"]) < 9 and abs(len(lines["A"]) - len(lines["B"])) * 100 / last < 18
    for name, line in lines.items():
        points = " ".join(f"{x(i):.2f},{y(value):.2f}" for i, value in enumerate(line))
        drawn.append(f'<g class="{name.lower()}"><polyline points="{points}"/></g>')
        skipped = len(line) - len(answers[name]["tokens"])
        dots = [(0, "(end of the prompt)", line[0])] if skipped else []
        dots += [(unit["last"] - 1 + skipped, unit["text"], unit["reward"]) for unit in answers[name]["units"]]
        if len(dots) <= 120:
            over += [
                f'<span class="dot {name.lower()}" style="left:{x(i):.2f}%;top:{y(value):.2f}%" '
                f'title="{name}, token {i}: {escape(text)} {signed(value)}"></span>'
                for i, text, value in dots
            ]
        top = ends[name]
        if close:  # the labels would overlap
            lower = name == ("A" if ends["A"] > ends["B"] else "B")
            top = (ends["A"] + ends["B"]) / 2 + (5 if lower else -5)
        over.append(
            f'<span class="end {name.lower()}" style="left:{x(len(line) - 1):.2f}%;top:{top:.2f}%">'
            f"{name} {signed(line[-1])}</span>"
        )
    told = "; ".join(
        f"{name} begins at {signed(line[0])}, ends at {signed(line[-1])}, lowest {signed(min(line))}, highest "
        f"{signed(max(line))}, {count(len(answers[name]['tokens']), 'token')}"
        for name, line in lines.items()
    )
    return (
        f'<div class="plot" role="img" aria-label="Reward after each token. {told}.">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{"".join(drawn)}</svg>'
        f'{"".join(over)}</div><p class="axis" aria-hidden="true">tokens of the answer (0: the prompt alone); A solid '
        "with round dots, B dashed with square ones</p>"
    )


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers in an interval, zero among them if it lies there."""
    raw = (high - low) / 4
    base = 10 ** math.floor(math.log10(raw))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= raw)
    return [round(i * step, 12) + 0.0 for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def other_head(result: dict) -> str:
    """The LM head: how likely each answer is, and where it and the reward head disagree."""
    answers, heads = result["answers"], result["heads"]
    if heads is None:
        return "<p>This model has no LM head any more: its reward head took its place.</p>"
    if heads["likelier"] is None:
        said = "The LM head finds both answers equally likely."
    elif heads["agree"]:
        said = f"The heads agree: the LM head, too, finds answer {heads['likelier']} likelier."
    elif result["preferred"] is None:
        said = f"The rewards are equal; the LM head finds answer {heads['likelier']} likelier."
    else:
        said = (
            f"The heads disagree: the reward head prefers answer {result['preferred']}, the LM head finds "
            f"answer {heads['likelier']} likelier."
        )
    rows = "".join(
        f'<tr><th scope="row">{letter(name)}</th><td class="number">{number(answer["mean_logprob"], signed)}</td>'
        f'<td class="number">{number(answer["perplexity"], perplexity)}</td></tr>'
        for name, answer in answers.items()
    )
    parts = [
        "<p>A GRM keeps the LM head of the model that it was made from, which says how likely each answer is as text. "
        f"{said}</p><table><thead><tr><th scope='col'>answer</th><th scope='col' class='number'>mean log-likelihood"
        f"</th><th scope='col' class='number'>perplexity</th></tr></thead><tbody>{rows}</tbody></table>"
    ]
    lists = []
    for name, answer in answers.items():
        items = "".join(
            f"<li><bdi>{shown(row['text'])}</bdi>: the reward {'falls' if row['step'] < 0 else 'rises'} by "
            f"{abs(row['step']):.3f}, though the LM head was {'less' if row['step'] < 0 else 'more'} surprised "
            f"than on average in this answer ({percent(row['probability'])})</li>"
            for row in answer["disagreements"]
        )
        if items:
            lists.append(f"<div><p>Where they part in {letter(name)}:</p><ul>{items}</ul></div>")
    parts.append(f'<div class="two">{"".join(lists)}</div>')
    parts.append(
        '<p class="quiet">The mean is over the tokens of the answer, in nats; perplexity is the exponential of its '
        "opposite.</p>"
    )
    return "".join(parts)


def perplexity(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:,.0f}" if value < 1e9 else f"{value:.3g}"


def number(value: float | None, form) -> str:
    return "–" if value is None else form(value)


def seen(answers: dict) -> str:
    """Tokens, truncation and end of each text, and the text that the model got."""
    parts = []
    for name, answer in answers.items():
        facts = answer["seen"]
        inside = "".join(token_of(token, "") for token in facts["prompt"])
        inside += "".join(token_of(token, "answer") for token in answer["tokens"])
        parts.append(
            f"<div><p><b>{letter(name)}</b> has {count(facts['tokens'], 'token')}, {facts['answer_tokens']:,} of "
            f"them the answer’s. {truncation(facts)} {ending(facts)}</p>"
            f'<details><summary>The text of {letter(name)}</summary><div class="seen" tabindex="0" '
            f'role="region" aria-label="The text of {name}">{inside}</div></details></div>'
        )
    return (
        f'<div class="two">{"".join(parts)}</div>'
        '<p class="quiet">The chat template is applied; the answer is underlined, special tokens are framed.</p>'
    )


def truncation(facts: dict) -> str:
    limit = f" (limit {facts['max_tokens']:,})" if facts["max_tokens"] else ""
    if not facts["cut"]:
        return f"Nothing was cut{limit}."
    where = "the prompt and the answer" if facts["answer_cut"] else "the beginning of the prompt"
    return f"<b>{facts['cut']:,} tokens of {where} were cut{limit}.</b>"


def ending(facts: dict) -> str:
    at = f"the reward is read at {shown(facts['read_at'])}"
    if facts["read_before_end"]:
        at += f", {facts['read_before_end']} before the end"
    if facts["end"] is None:
        return f"<b>No end-of-turn token</b> closes it; {at}."
    return f"{shown(facts['end'])} closes it; {at}."


def shown(text: str) -> str:
    return f"<code>{escape(text.strip(' ')).replace(chr(10), '⏎') or '␣'}</code>"


def token_of(token: dict, kind: str) -> str:
    kinds = f"{kind} special" if token["special"] else kind
    return f'<span class="{kinds}">{escape(token["text"])}</span>' if kinds else escape(token["text"])


def swap(result: dict | None) -> str:
    """The swap check (see `reward_models.swap_check`)."""
    if result is None:
        return ""
    names = {"alone": "each alone", "AB": "together, A first", "BA": "together, B first"}
    rows = "".join(
        f'<tr><th scope="row">{names[key]}</th><td class="number">{signed(row["A"])}</td>'
        f'<td class="number">{signed(row["B"])}</td></tr>'
        for key, row in result["rewards"].items()
    )
    largest = result["largest"]
    if largest is None:
        said = "The model has no padding token, so its answers cannot be put into one batch: nothing to swap."
    else:
        size = max(1e-9, *(abs(value) for row in result["rewards"].values() for value in row.values()))
        fine = largest <= 1e-4 * max(1.0, size)
        said = f"Largest difference: {largest:.1e}. " + (
            "A reward depends neither on the order nor on the neighbour, beyond rounding."
            if fine
            else "More than float32 rounds: a low-precision model, or one whose padding leaks into the reward."
        )
    return page(
        f"<h3>Swap check</h3><p>{said}</p><table><thead><tr><th scope='col'>scored</th><th scope='col' "
        f"class='number'>{letter('A')}</th><th scope='col' class='number'>{letter('B')}</th></tr></thead><tbody>"
        f"{rows}</tbody></table>"
    )


def opinions(result: dict) -> str:
    """What both heads say (see `reward_models.opinions`)."""
    rows = "".join(
        f'<tr><th scope="row">{escape(row["name"])}<br><small>{escape(row["sentence"])}</small></th>'
        + "".join(f'<td class="number">{row["values"][name]:.4g}</td>' for name in "AB")
        + f'<td class="number">{percent(row["probability_a"])}</td></tr>'
        for row in result["signals"]
    )
    if result["preferred"] is None:
        said = "Both answers have the same reward."
    else:
        said = (
            f"{result['agreeing']} of {len(result['signals'])} signals prefer answer {result['preferred']}, as the "
            f"reward head does. Their probabilities diverge by {result['divergence']:.2f} bits; 0 is one opinion."
        )
    return page(
        f"<h3>What both heads say</h3><p>{said} Small models are often at chance with all but the first.</p><table>"
        f"<thead><tr><th scope='col'>signal</th><th scope='col' class='number'>{letter('A')}</th><th scope='col' "
        f"class='number'>{letter('B')}</th><th scope='col' class='number'>A is better</th></tr></thead><tbody>{rows}"
        "</tbody></table><p class='quiet'>A judge is asked two things: of one answer whether it is good, in the first "
        "columns; of both which is better, in either order, in the last.</p>"
    )


# ------------------------------------------------------------------------------------------------------- best of n


def ranking(result: dict, answers: list[str]) -> str:
    """Answers by reward (see `reward_models.rank`)."""
    rewards, order = result["rewards"], result["order"]
    largest = max(map(abs, rewards)) or 1
    rows = []
    for i in order:
        place = 1 + sum(reward > rewards[i] for reward in rewards)
        cut = f" <b>({count(result['cut'][i], 'token')} cut)</b>" if result["cut"][i] else ""
        bar = track(rewards[i], largest, "a", f"Reward of answer {i + 1}", ' style="height:.9rem;margin-top:.3rem"')
        rows.append(
            f'<tr><td class="number">{place}</td><th scope="row" class="number">{i + 1}</th>'
            f'<td class="text"><bdi>{escape(shorten(answers[i], 400))}</bdi>{cut}{bar}</td>'
            f'<td class="number"><b>{signed(rewards[i])}</b><br>'
            f'<span class="quiet">{percent(result["share"][i])}</span></td></tr>'
        )
    n, expected = 1, []
    while n < len(rewards):
        expected.append((n, metrics.best_of_n(rewards, rewards, n)))
        n *= 2
    expected.append((len(rewards), max(rewards)))
    best_of = ", ".join(f"{n}: {signed(value)}" for n, value in expected)
    blind = sum(number > 0 for number in result["unknown"])
    warning = f"{count(blind, 'answer')} or their prompt had words that the model does not know." if blind else ""
    first = [i + 1 for i in order[: result["ties"]]]
    said = f"Answer {first[0]} is the best of {len(rewards)}."
    if len(first) == len(rewards):
        said = f"All {len(rewards)} answers have the same reward."
    elif len(first) > 1:
        said = f"Answers {', '.join(map(str, first[:-1]))} and {first[-1]} are the best of {len(rewards)}: they tie."
    return page(
        headline(said),
        f'<p class="problem warning">{warning}</p>' if warning else "",
        "<table class='full'><thead><tr><th scope='col' class='number'>rank</th><th scope='col' class='number'>number"
        "</th><th scope='col'>answer</th><th scope='col' class='number'>reward<br>share</th></tr></thead><tbody>"
        f"{''.join(rows)}</tbody></table>",
        '<p class="quiet">Bars begin at zero: the further right one ends, the better the answer.</p>'
        f'<p class="quiet">Share: softmax of the rewards over the temperature, {scale(result)}. Expected reward of '
        f"the best of so many answers drawn from these: {best_of}.</p>",
    )


# ---------------------------------------------------------------------------------------------------------- batch


MEANING = {
    "accuracy": "the chosen answer has the higher reward; a tie counts as wrong",
    "tie_rate": "two equal rewards",
    "mean_margin": "chosen minus rejected",
    "median_margin": "the same, less moved by a few large ones",
    "log_loss": "nats; a coin has 0.6931",
    "brier": "squared error; a coin has 0.25",
    "ece": "distance of confidence from accuracy",
    "temperature": "the one with the lowest log loss here",
}
SHOWN = 50


def batch(rows: list[dict], scores: list[dict], result: dict, reliability: list[dict], unknown: int) -> str:
    """Metrics of a table of pairs, the calibration plot and the first rows."""
    named = [(name, result[name], meaning) for name, meaning in MEANING.items()]
    named += [(name, value, "") for name, value in result.items() if name.startswith(("accuracy/", "subset_mean"))]
    table = "".join(
        f"<tr><th scope='row'>{escape(name).replace('_', '_<wbr>')}</th><td class='number'>{value:.4f}</td>"
        f"<td class='quiet'>{meaning}</td></tr>"
        for name, value, meaning in named
    )
    cut = sum(score["cut_tokens"] > 0 for score in scores)
    body = "".join(
        f'<tr><th scope="row" class="number">{i}</th><td class="text">{escape(shorten(row.get("prompt") or "–"))}</td>'
        f'<td class="text">{escape(shorten(row["chosen"]))}</td>'
        f'<td class="number">{signed(score["chosen_reward"])}</td>'
        f'<td class="text">{escape(shorten(row["rejected"]))}</td>'
        f'<td class="number">{signed(score["rejected_reward"])}</td>'
        f'<td class="number"><b>{signed(score["margin"])}</b></td></tr>'
        for i, (row, score) in enumerate(zip(rows[:SHOWN], scores, strict=False), 1)
    )
    low, high = (f"{100 * result[f'accuracy_ci_{end}']:.1f}" for end in ("low", "high"))
    notes = [f"95 % interval (Wilson; takes the pairs for independent): {low} to {high} %."]
    faults = []
    if unknown:
        faults.append(f"{count(unknown, 'pair')} had words that the model does not know: its reward is blind to them.")
    if cut:
        faults.append(f"{count(cut, 'pair')} had more tokens than the model reads: the beginning was cut.")
    if result["temperature_at_bound"]:
        notes.append("No temperature fits: the rewards make no error here, or do no better than a coin.")
    if any("margin" in row for row in rows):
        notes.append("The table had scores of this page: the new ones took their places.")
    if len(rows) > SHOWN:
        notes.append(f"The first {SHOWN} pairs are shown; all are in the download.")
    return page(
        headline(f"Accuracy {100 * result['accuracy']:.1f} % on {count(len(rows), 'pair')}"),
        *(f'<p class="problem warning">{fault}</p>' for fault in faults),
        *(f'<p class="quiet">{note}</p>' for note in notes),
        f'<div class="two"><div><h3>Metrics</h3><table class="metrics"><thead><tr><th scope="col">metric'
        f'</th><th scope="col" class="number">value</th><th scope="col">meaning</th></tr></thead><tbody>{table}'
        f"</tbody></table></div>"
        f"<div><h3>Is the model as right as it is sure?</h3>{reliability_plot(reliability, len(rows))}</div></div>",
        "<h3>Pairs</h3><div class='wide' tabindex='0' role='region' aria-label='Pairs'><table><thead><tr><th "
        "scope='col' class='number'>pair</th><th scope='col'>prompt</th><th scope='col'>chosen</th><th scope='col' "
        "class='number'>its reward</th><th scope='col'>rejected</th><th scope='col' class='number'>its reward</th><th "
        f"scope='col' class='number'>margin</th></tr></thead><tbody>{body}</tbody></table></div>",
    )
