"""Results as HTML that reads in light, dark and on a telephone. What visitors and models wrote is escaped here."""

import html
import math

import metrics
from tables import shorten


CSS = """
.rm { --a: #7c3aed; --b: #0f766e; --up: 37, 99, 235; --down: 217, 83, 10; --strength: .6;
  --line: rgba(100, 116, 139, .35);
  color: var(--body-text-color); font-size: 1rem; line-height: 1.5; }
.dark .rm { --a: #a78bfa; --b: #2dd4bf; --up: 96, 165, 250; --down: 251, 146, 60; --strength: .5;
  --line: rgba(148, 163, 184, .35); }
.rm h3 { margin: 1.5rem 0 .45rem; font-size: 1.05rem; font-weight: 650; color: inherit; }
.rm p { margin: .3rem 0; }
.rm .quiet { opacity: .78; font-size: .9rem; }
.rm .problem { border-left: 4px solid rgb(var(--down)); padding: .55rem .9rem; background: rgba(var(--down), .1);
  border-radius: 4px; overflow-wrap: anywhere; }
.rm .notice { border-left: 4px solid rgb(var(--up)); padding: .55rem .9rem; background: rgba(var(--up), .1);
  border-radius: 4px; overflow-wrap: anywhere; }
.rm .verdict { font-size: 1.5rem; font-weight: 650; line-height: 1.3; margin: .2rem 0 .3rem; }
.rm span.a { color: var(--a) !important; } .rm span.b { color: var(--b) !important; }
.rm .bars { display: grid; grid-template-columns: minmax(1.6rem, max-content) 1fr 5.2rem; gap: .45rem .7rem;
  align-items: center; }
.rm .bars .name { font-weight: 700; }
.rm .bars .value { text-align: right; font-variant-numeric: tabular-nums; font-weight: 600; }
.rm .track { position: relative; height: 1.7rem; border-radius: 4px; background: rgba(100, 116, 139, .12); }
.rm .track i { position: absolute; top: 0; bottom: 0; }
.rm .track .fill { top: .2rem; bottom: .2rem; border-radius: 3px; background: var(--a); }
.rm .track.b .fill { background: var(--b); }
.rm .track .zero { left: 50%; width: 2px; margin-left: -1px; background: var(--body-text-color); opacity: .75; }
.rm .scale { position: relative; height: 1.2rem; font-size: .8rem; opacity: .78; font-variant-numeric: tabular-nums; }
.rm .scale span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.rm .scale span:first-child { transform: none; } .rm .scale span:last-child { transform: translateX(-100%); }
.rm .share { display: flex; height: 2rem; border-radius: 5px; overflow: hidden; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.rm .share div { display: flex; align-items: center; padding: 0 .6rem; white-space: nowrap; overflow: hidden;
  box-sizing: border-box; min-width: 0; }
.rm .share div:first-child { background: var(--a); } .rm .share div:last-child { background: var(--b);
  justify-content: flex-end; flex: 1; }
.rm .share div { color: #fff; } .dark .rm .share div { color: #0b1120; }
.rm .heat { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.95; margin: .25rem 0 .6rem;
  font-size: 1.02rem; }
.rm .heat span { padding: .16rem 0; border-radius: 3px; }
.rm .heat span.special, .rm .seen span.special { font-family: var(--font-mono, monospace); font-size: .8em;
  opacity: .85; outline: 1px dashed var(--line); outline-offset: -1px; border-radius: 3px; padding: .1rem .15rem;
  white-space: nowrap; }
.rm .heat span:hover { outline: 2px solid currentColor; outline-offset: 0; }
.rm .legend { display: flex; align-items: center; gap: .6rem; font-size: .85rem; opacity: .9; flex-wrap: wrap;
  font-variant-numeric: tabular-nums; }
.rm .legend i { width: 9rem; height: .8rem; border-radius: 3px; border: 1px solid var(--line);
  background: linear-gradient(90deg, rgba(var(--down), var(--strength)), rgba(var(--down), 0) 50%,
  rgba(var(--up), 0) 50%, rgba(var(--up), var(--strength))); }
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
.rm .plot .y { right: 100%; margin-right: .45rem; transform: translateY(-50%); opacity: .8; }
.rm .plot .x { top: 100%; margin-top: .3rem; transform: translateX(-50%); opacity: .8; }
.rm .plot .end { margin-left: .45rem; transform: translateY(-50%); font-weight: 700;
  background: var(--body-background-fill); padding: 0 .2rem; border-radius: 3px; line-height: 1.2; z-index: 1; }
.rm .plot .dot { position: absolute; width: 11px; height: 11px; margin: -5.5px; border-radius: 50%; }
.rm .plot .dot::after { content: ""; position: absolute; inset: 3px; border-radius: 50%; background: currentColor; }
.rm .plot .dot:hover::after { inset: 0; }
.rm p.axis { text-align: center; font-size: .85rem; opacity: .8; }
.rm table { border-collapse: collapse; margin: .3rem 0; }
.rm table, .rm tr, .rm td, .rm th { border: 0; background: none; color: inherit; }
.rm td, .rm th { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; font-weight: 400; }
.rm thead th { font-weight: 650; }
.rm td.number, .rm th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.rm .wide { overflow-x: auto; } .rm .wide table, .rm .full { width: 100%; }
.rm .full td.text { min-width: 0; width: 100%; }
.rm td.text { min-width: 9rem; } .rm td:first-child:not(.number) { min-width: 6.6rem; }
.rm details { margin: .4rem 0; } .rm summary { cursor: pointer; font-weight: 600; }
.rm .seen { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .95rem; padding: .6rem .8rem; line-height: 1.75;
  background: rgba(100, 116, 139, .1); border-radius: 4px; max-height: 22rem; overflow-y: auto; }
.rm .seen .answer { border-bottom: 2px solid currentColor; }
.rm .seen .unseen { opacity: .6; }
.rm .two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 0 2rem; }
.rm ul { margin: .2rem 0 .2rem 1.1rem; padding: 0; list-style: disc; }
.rm svg.reliability { width: 100%; height: auto; max-width: 27rem; display: block; }
.rm svg.reliability text { fill: currentColor; font-size: 14px; }
"""


def escape(value: object) -> str:
    return html.escape(str(value))


def page(*parts: str) -> str:
    return f'<div class="rm">{"".join(parts)}</div>'


def problem(message: object) -> str:
    return page(f'<p class="problem" role="alert">{escape(message)}</p>')


def notice(message: str) -> str:
    return page(f'<p class="notice">{escape(message)}</p>')


def signed(value: float) -> str:
    text = f"{value:+.4g}" if abs(value) >= 1000 else f"{value:+.3f}"
    return text.replace("-", "−")


def percent(value: float) -> str:
    """Never 0 or 100 %, which no probability here is."""
    if value < 0.001:
        return "< 0.1 %"
    return "> 99.9 %" if value > 0.999 else f"{100 * value:.1f} %"


def letter(name: str) -> str:
    return f'<span class="{name.lower()}">{name}</span>'


# ---------------------------------------------------------------------------------------------------------- comparison


def comparison(result: dict) -> str:
    """All of one comparison (see `reward_models.compare`)."""
    answers = result["answers"]
    said = escape(result["verdict"])
    for name in "AB":
        said = said.replace(f"answer {name}", f'answer <span class="{name.lower()}">{name}</span>')
    difference = result["rewards"]["A"] - result["rewards"]["B"]
    return page(
        f'<p class="verdict">{said}</p>',
        f"<p>Reward of A minus reward of B: <b>{signed(difference)}</b>.</p>",
        f"<h3>Rewards</h3>{bars([(letter(name), name.lower(), answers[name]['reward']) for name in 'AB'])}",
        standardised(answers),
        f"<h3>Probability that A beats B</h3>{probability_bar(result)}",
        f"<h3>The reward after each token</h3>{heat_maps(answers)}{trace(answers)}",
        f"<h3>The other head</h3>{other_head(result)}",
        f"<h3>What the model saw</h3>{seen(answers)}",
        f'<p class="quiet">{escape(result["model"])}'
        + (f" at {escape(result['revision'][:12])}" if result["revision"] else "")
        + f"; both answers in {result['seconds']:.2f} s on {escape(result['device'])}.</p>",
    )


def bars(rows: list[tuple[str, str, float]]) -> str:
    """Diverging bars around zero: label (HTML), class, value."""
    largest = max((abs(value) for _, _, value in rows), default=0) or 1
    parts = []
    for label, kind, value in rows:
        width = 50 * abs(value) / largest
        left = 50 if value >= 0 else 50 - width
        parts.append(
            f'<span class="name">{label}</span><div class="track {kind}">'
            f'<i class="fill" style="left:{left:.2f}%;width:{width:.2f}%"></i><i class="zero"></i></div>'
            f'<span class="value">{signed(value)}</span>'
        )
    ends = "".join(
        f'<span style="left:{place}%">{text}</span>'
        for place, text in ((0, signed(-largest)), (50, "0"), (100, signed(largest)))
    )
    return f'<div class="bars">{"".join(parts)}<span></span><div class="scale">{ends}</div><span></span></div>'


def standardised(answers: dict) -> str:
    values = {name: answer["standardised"] for name, answer in answers.items()}
    if values["A"] is None:
        return '<p class="quiet">A reward has no unit and no zero of its own: only differences mean something.</p>'
    both = ", ".join(f"{letter(name)} {signed(value)}" for name, value in values.items())
    return (
        '<p class="quiet">In standard deviations from the mean reward of the model’s last evaluation set: '
        f"{both}. Zero itself means nothing.</p>"
    )


def probability_bar(result: dict) -> str:
    p = result["probability_a"]
    left, right = (f"{name} {percent(share)}" if share >= 0.25 else "" for name, share in (("A", p), ("B", 1 - p)))
    return (
        f'<div class="share" role="img" aria-label="A {percent(p)}, B {percent(1 - p)}">'
        f'<div style="width:{100 * p:.2f}%;{"padding:0" if not left else ""}">{left}</div>'
        f'<div style="{"padding:0" if not right else ""}">{right}</div></div>'
        f'<p class="quiet">P(A beats B) = {percent(p)}: sigmoid of the difference over the temperature, '
        f"{scale(result)}.</p>"
    )


def scale(result: dict) -> str:
    own = result["model_temperature"]
    return f"{result['temperature']:g}" + ("" if own == 1 else f" × {own:g} (the model’s own)")


def heat_maps(answers: dict) -> str:
    """Both answers, each token coloured by the reward of the text that ends there."""
    largest = max(abs(token["reward"]) for answer in answers.values() for token in answer["tokens"]) or 1
    parts = []
    for name, answer in answers.items():
        previous, spans = answer["reward_before"], []
        for token in answer["tokens"]:
            told = f"reward {signed(token['reward'])}"
            if previous is not None:
                told += f", change {signed(token['reward'] - previous)}"
            if token["logprob"] is not None:
                told += f", expected with {percent(math.exp(token['logprob']))}"
            spans.append(
                f'<span class="{"special" if token["special"] else ""}" title="{escape(told)}" '
                f'style="background:{colour(token["reward"] / largest)}">{visible(token["text"])}</span>'
            )
            previous = token["reward"]
        parts.append(f'<div class="heat"><b>{letter(name)}</b>  {"".join(spans)}</div>')
    legend = (
        f'<div class="legend"><span>{signed(-largest)}</span><i></i><span>{signed(largest)}</span>'
        "<span>Point at a token for its numbers.</span></div>"
    )
    return f'<div class="two">{"".join(parts)}</div>{legend}'


def colour(share: float) -> str:
    return f"rgba(var(--{'up' if share >= 0 else 'down'}), calc(var(--strength) * {min(1.0, abs(share)):.3f}))"


def visible(text: str) -> str:
    return escape(text).replace("\n", "⏎\n") or "·"


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
        if len(line) <= 120:
            for i, value in enumerate(line):
                text = answers[name]["tokens"][i - skipped]["text"] if i >= skipped else "(end of the prompt)"
                over.append(
                    f'<span class="dot {name.lower()}" style="left:{x(i):.2f}%;top:{y(value):.2f}%" '
                    f'title="{name}, token {i}: {escape(text)} {signed(value)}"></span>'
                )
        top = ends[name]
        if close:  # the labels would lie on each other
            lower = name == ("A" if ends["A"] > ends["B"] else "B")
            top = (ends["A"] + ends["B"]) / 2 + (5 if lower else -5)
        over.append(
            f'<span class="end {name.lower()}" style="left:{x(len(line) - 1):.2f}%;top:{top:.2f}%">'
            f"{name} {signed(line[-1])}</span>"
        )
    return (
        '<div class="plot" role="img" aria-label="Reward after each token of A and of B">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none">{"".join(drawn)}</svg>{"".join(over)}'
        '</div><p class="axis">tokens of the answer (0: the prompt alone); A solid, B dashed</p>'
    )


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers in an interval, zero among them if it lies there."""
    raw = (high - low) / 4
    base = 10 ** math.floor(math.log10(raw))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= raw)
    return [round(i * step, 12) + 0.0 for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def other_head(result: dict) -> str:
    """The language-model head: how likely each answer is, and where it and the reward head part."""
    answers, heads = result["answers"], result["heads"]
    if heads is None:
        return "<p>This model has no language-model head any more: its reward head took its place.</p>"
    if heads["likelier"] is None:
        said = "The language-model head finds both answers equally likely."
    elif heads["agree"]:
        said = f"The heads agree: the language-model head, too, finds answer {heads['likelier']} likelier."
    elif result["preferred"] is None:
        said = f"The rewards are equal; the language-model head finds answer {heads['likelier']} likelier."
    else:
        said = (
            f"The heads disagree: the reward head prefers answer {result['preferred']}, the language-model head finds "
            f"answer {heads['likelier']} likelier."
        )
    rows = "".join(
        f'<tr><th>{letter(name)}</th><td class="number">{number(answer["mean_logprob"], signed)}</td>'
        f'<td class="number">{number(answer["perplexity"], perplexity)}</td></tr>'
        for name, answer in answers.items()
    )
    parts = [
        f"<p>{said}</p><table><thead><tr><th></th><th class='number'>mean log-likelihood</th>"
        f"<th class='number'>perplexity</th></tr></thead><tbody>{rows}</tbody></table>"
    ]
    lists = []
    for name, answer in answers.items():
        items = "".join(
            f"<li>“{escape(row['text'].strip())}”: the reward {'falls' if row['step'] < 0 else 'rises'} by "
            f"{abs(row['step']):.3f}, though the language model was {'less' if row['step'] < 0 else 'more'} surprised "
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
    """Tokens, truncation and end of each text, and the text itself as the model got it."""
    parts = []
    for name, answer in answers.items():
        facts = answer["seen"]
        inside = "".join(token_of(token, "") for token in facts["prompt"])
        inside += "".join(token_of(token, "answer") for token in answer["tokens"])
        unknown = (
            f'<p class="problem">{facts["unknown"]} of its tokens stand for words that the tokenizer does not know: '
            "the reward is blind to them.</p>"
            if facts["unknown"]
            else ""
        )
        parts.append(
            f"<div><p><b>{letter(name)}</b> has {facts['tokens']:,} tokens, {facts['answer_tokens']:,} of them the "
            f"answer’s. {truncation(facts)} {ending(facts)}</p>{unknown}"
            f'<details><summary>The text of {letter(name)}</summary><div class="seen">{inside}</div></details></div>'
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
        f'<tr><td>{names[key]}</td><td class="number">{signed(row["A"])}</td>'
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
        f"<h3>Swap check</h3><p>{said}</p><table><thead><tr><th></th><th class='number'>{letter('A')}</th>"
        f"<th class='number'>{letter('B')}</th></tr></thead><tbody>{rows}</tbody></table>"
    )


# ------------------------------------------------------------------------------------------------------- best of n


def ranking(result: dict, answers: list[str]) -> str:
    """Answers by reward (see `reward_models.rank`)."""
    rewards, order = result["rewards"], result["order"]
    largest = max(map(abs, rewards)) or 1
    rows = []
    for place, i in enumerate(order, 1):
        width = 50 * abs(rewards[i]) / largest
        left = 50 if rewards[i] >= 0 else 50 - width
        cut = f" <b>({result['cut'][i]} tokens cut)</b>" if result["cut"][i] else ""
        rows.append(
            f'<tr><td class="number">{place}</td><td class="text">{escape(shorten(answers[i], 400))}{cut}'
            f'<div class="track a" style="height:.9rem;margin-top:.3rem"><i class="fill" style="left:{left:.2f}%;'
            f'width:{width:.2f}%"></i><i class="zero"></i></div></td>'
            f'<td class="number"><b>{signed(rewards[i])}</b><br>'
            f'<span class="quiet">{percent(result["share"][i])}</span></td></tr>'
        )
    n, expected = 1, []
    while n < len(rewards):
        expected.append((n, metrics.best_of_n(rewards, rewards, n)))
        n *= 2
    expected.append((len(rewards), max(rewards)))
    best_of = ", ".join(f"{n}: {signed(value)}" for n, value in expected)
    return page(
        f'<p class="verdict">Answer {order[0] + 1} is the best of {len(rewards)}.</p>',
        "<table class='full'><thead><tr><th class='number'>rank</th><th>answer</th>"
        f"<th class='number'>reward<br>share</th></tr></thead><tbody>{''.join(rows)}</tbody></table>",
        f'<p class="quiet">Share: softmax of the rewards over the temperature, {scale(result)}. Expected reward of '
        f"the best of so many answers drawn from these: {best_of}.</p>",
    )


# ---------------------------------------------------------------------------------------------------------- batch


MEANING = {
    "accuracy": "the chosen answer has the higher reward",
    "tie_rate": "two equal rewards",
    "mean_margin": "chosen minus rejected",
    "median_margin": "the same, less moved by a few large ones",
    "log_loss": "nats; a coin has 0.6931",
    "brier": "squared error; a coin has 0.25",
    "ece": "distance of confidence from accuracy",
    "temperature": "the one with the lowest log loss here",
}
SHOWN = 50


def batch(rows: list[dict], scores: list[dict], result: dict, reliability: list[dict]) -> str:
    """Metrics of a table of pairs, the calibration plot and the first rows."""
    named = [(name, result[name], meaning) for name, meaning in MEANING.items()]
    named += [(name, value, "") for name, value in result.items() if name.startswith(("accuracy/", "subset_mean"))]
    table = "".join(
        f"<tr><td>{escape(name).replace('_', '_<wbr>')}</td><td class='number'>{value:.4f}</td>"
        f"<td class='quiet'>{meaning}</td></tr>"
        for name, value, meaning in named
    )
    cut = sum(score["cut_tokens"] > 0 for score in scores)
    body = "".join(
        f'<tr><td class="number">{i}</td><td class="text">{escape(shorten(row.get("prompt") or "–"))}</td>'
        f'<td class="text">{escape(shorten(row["chosen"]))}</td>'
        f'<td class="text">{escape(shorten(row["rejected"]))}</td>'
        f'<td class="number">{signed(score["chosen_reward"])}</td>'
        f'<td class="number">{signed(score["rejected_reward"])}</td>'
        f'<td class="number"><b>{signed(score["margin"])}</b></td></tr>'
        for i, (row, score) in enumerate(zip(rows[:SHOWN], scores, strict=False), 1)
    )
    low, high = (f"{100 * result[f'accuracy_ci_{end}']:.1f}" for end in ("low", "high"))
    notes = [f"95 % interval (Wilson; takes the pairs for independent): {low} to {high} %."]
    if cut:
        notes.append(f"{cut} pairs were longer than the model reads and lost the beginning of their prompt.")
    if result["temperature_at_bound"]:
        notes.append("No temperature fits: the rewards make no error here, or do no better than a coin.")
    if any("margin" in row for row in rows):
        notes.append("The table had scores of this page: the new ones took their places.")
    if len(rows) > SHOWN:
        notes.append(f"The first {SHOWN} pairs are shown; all are in the download.")
    return page(
        f'<p class="verdict">Accuracy {100 * result["accuracy"]:.1f} % on {len(rows)} pairs</p>',
        *(f'<p class="quiet">{note}</p>' for note in notes),
        f'<div class="two"><div><h3>Metrics</h3><table>{table}</table></div>'
        f"<div><h3>Is the model as right as it is sure?</h3>{reliability_plot(reliability, len(rows))}</div></div>",
        "<h3>Pairs</h3><div class='wide'><table><thead><tr><th class='number'></th><th>prompt</th><th>chosen</th>"
        "<th>rejected</th><th class='number'>chosen</th><th class='number'>rejected</th><th class='number'>margin</th>"
        f"</tr></thead><tbody>{body}</tbody></table></div>",
    )


def reliability_plot(rows: list[dict], n: int) -> str:
    """Confidence against accuracy, a dot for each bin, its area the share of the pairs; on the dashed line the model
    is right as often as it says."""
    left, right, top, bottom = 46, 408, 14, 292

    def x(confidence: float) -> float:
        return left + (right - left) * (confidence - 0.5) * 2

    def y(share: float) -> float:
        return bottom - (bottom - top) * share

    parts = [
        f'<line x1="{left}" x2="{right}" y1="{y(share):.1f}" y2="{y(share):.1f}" stroke="currentColor" opacity=".2"/>'
        f'<text x="{left - 7}" y="{y(share) + 5:.1f}" text-anchor="end">{share:g}</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    parts += [
        f'<text x="{x(c):.1f}" y="{bottom + 20}" text-anchor="middle">{c:g}</text>'
        for c in (0.5, 0.6, 0.7, 0.8, 0.9, 1)
    ]
    parts.append(
        f'<line x1="{x(0.5)}" y1="{y(0.5)}" x2="{x(1)}" y2="{y(1)}" stroke="currentColor" stroke-dasharray="5 4"/>'
        f'<text x="{(left + right) / 2}" y="{bottom + 42}" text-anchor="middle">confidence of the model</text>'
        f'<text x="12" y="{(top + bottom) / 2}" text-anchor="middle" transform="rotate(-90 12 {(top + bottom) / 2})">'
        "accuracy</text>"
    )
    for row in rows:
        parts.append(
            f'<circle cx="{x(row["confidence"]):.1f}" cy="{y(row["accuracy"]):.1f}" '
            f'r="{4 + 14 * math.sqrt(row["n"] / n):.1f}" style="fill:var(--a)" opacity=".8">'
            f"<title>{row['n']:.0f} pairs: confidence {row['confidence']:.3f}, accuracy {row['accuracy']:.3f}</title>"
            "</circle>"
        )
    return (
        '<svg class="reliability" viewBox="0 0 424 340" role="img" aria-label="Calibration plot">'
        f"{''.join(parts)}</svg>"
    )
