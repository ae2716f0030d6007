"""What a reward model says about an answer with both of its heads: the reward, and seven opinions that the LM head
gives without training. Formulas, sources, costs and limits: docs/signals.md.

A signal is a row of `SIGNALS`. Its function asks for token sequences ([`Reading`]) and gets what the model computed of
them ([`Read`]). All that several signals ask for is computed once, in rows that share what they have in common, so a
signal costs what it adds. A larger value speaks for the answer.

This file knows no model: what computes is `grm_hf.scoring.reader`, and in the Space, which carries a copy, its own.
"""

import math
import re
import statistics
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch


if TYPE_CHECKING:
    from .encoding import Encoded, Encoder


# ------------------------------------------------------------------------------------------------------------- wording

# What a user may say next, in the six dimensions of FLR (arXiv 2409.13948); the sentences are ours.
FOLLOW_UPS = {
    "understanding": {
        "positive": ["That is exactly what I meant.", "You got my question right.", "Yes, this is what I wanted."],
        "negative": ["That is not what I meant.", "You got my question wrong.", "No, I wanted something else."],
    },
    "relevance": {
        "positive": ["All of this is to the point.", "This helps with my problem.", "You kept to the subject."],
        "negative": ["Most of this is beside the point.", "This has nothing to do with it.", "You left the subject."],
    },
    "correctness": {
        "positive": ["I checked it, and it is right.", "All of that is true.", "It works as you said."],
        "negative": ["I checked it, and it is wrong.", "Some of that is false.", "It does not work as you said."],
    },
    "engagingness": {
        "positive": ["I enjoyed reading this.", "I would like to hear more.", "What a good conversation."],
        "negative": ["This was dull to read.", "I would rather stop here.", "What a tedious conversation."],
    },
    "informativeness": {
        "positive": ["I learned a lot from this.", "Nothing is missing here.", "The details are useful."],
        "negative": ["I learned nothing from this.", "The main part is missing.", "The details are useless."],
    },
    "following": {
        "positive": ["You did all that I asked for.", "The form is as I wanted it.", "You kept to my limits."],
        "negative": ["You ignored what I asked for.", "I wanted another form.", "You ignored my limits."],
    },
}


@dataclass(frozen=True)
class Wording:
    """
    What is said to the LM head, in English. Pass one in the language of your chats.

    Attributes:
        follow_ups (`dict`): Dimension to `{"positive": [...], "negative": [...]}`, sentences of the user.
        question (`str`): The user's question whether the answer is good, for `judge`.
        yes, no (`str`): What the assistant may say to it.
        pair (`str`): Both answers, `{a}` and `{b}`, as one turn of the assistant.
        which (`str`): The user's question which of them is better.
        letters (`tuple[str, str]`): What the assistant may say to it.
        critique (`str`): The user's request for a critique.
    """

    follow_ups: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=lambda: FOLLOW_UPS)
    question: str = "Is that a correct and helpful answer to what I asked? Say Yes or No."
    yes: str = "Yes"
    no: str = "No"
    pair: str = "Answer A:\n{a}\n\nAnswer B:\n{b}"
    which: str = "Which of the two answers is better? Say A or B."
    letters: tuple[str, str] = ("A", "B")
    critique: str = "Name in a few sentences what is right, what is wrong and what is missing in that answer."

    def __post_init__(self):
        if not self.follow_ups:
            raise ValueError("`follow_ups` is empty; at least one dimension is required.")
        for name, sets in self.follow_ups.items():
            for side in ("positive", "negative"):
                sentences = sets.get(side)
                if not sentences or isinstance(sentences, str) or not all(isinstance(s, str) for s in sentences):
                    raise ValueError(
                        f"`follow_ups` has no list of sentences for {name!r}, {side!r}. A dimension is "
                        '{"positive": [...], "negative": [...]}.'
                    )
        if "{a}" not in self.pair or "{b}" not in self.pair:
            raise ValueError(f"`pair` is {self.pair!r}; it must hold {{a}} and {{b}}.")
        if self.yes == self.no or len(set(self.letters)) != 2:
            raise ValueError("`yes` and `no`, and the two `letters`, must differ.")


@dataclass(frozen=True)
class Settings:
    """
    What the signals are computed with.

    Attributes:
        beta (`float`): Scale of the implicit reward.
        alpha (`float`): Temperature of the endogenous reward.
        reference: For `implicit`: the language model before training, as a Hub id, folder or live model; or its
            log-probabilities of the answers, a number for each chat. `None`: the model with its adapter switched off.
        draws (`int`): Draws of dropout.
        dropout (`float`, *optional*): Its probability; the head's own, or 0.1 as the original trained with.
        generate (`bool`): Whether the LM head may write, which `critique` needs.
        max_new_tokens (`int`): Most tokens of a critique.
        wording ([`Wording`]): What is said to the LM head.
    """

    beta: float = 0.1
    alpha: float = 1.0
    reference: Any = None
    draws: int = 32
    dropout: float | None = None
    generate: bool = False
    max_new_tokens: int = 128
    wording: Wording = field(default_factory=Wording)

    def __post_init__(self):
        for name in ("beta", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be a positive number.")
        if self.draws < 2:
            raise ValueError(f"`draws` is {self.draws}; a spread needs at least 2.")
        if self.dropout is not None and not 0 < self.dropout < 1:
            raise ValueError(f"`dropout` is {self.dropout}; it must lie between 0 and 1.")
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` is {self.max_new_tokens}; it must be at least 1.")

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Settings":
        if unknown := sorted(set(given) - set(cls.__dataclass_fields__)):
            raise ValueError(f"`{unknown[0]}` is no setting of signals; there are {list(cls.__dataclass_fields__)}.")
        return cls(**given)


# ------------------------------------------------------------------------------------------------------------- reading


class Reading(NamedTuple):
    """
    A token sequence to compute.

    Attributes:
        ids (`tuple[int, ...]`): The sequence.
        start (`int`): Its first token whose probability counts.
        text (`bool`): Whether the LM head is asked.
        values (`bool`): Whether the soft value of the state behind the last token is needed as well.
        draws (`bool`): Whether rewards under dropout are needed.
        reference (`bool`): Whether the reference is asked instead of the model.
    """

    ids: tuple[int, ...]
    start: int
    text: bool = False
    values: bool = False
    draws: bool = False
    reference: bool = False

    @property
    def key(self) -> Hashable:
        return self.ids, self.start, self.reference


class Writing(NamedTuple):
    """Token ids for the LM head to go on from."""

    ids: tuple[int, ...]


class Read(NamedTuple):
    """
    What a model computed of a [`Reading`].

    Attributes:
        reward (`float`): At the last token.
        tokens (`int`): Number of tokens that count.
        logp (`float`): Sum of their log-probabilities.
        soft (`float`): Sum of their logits, each minus the soft value of the state before it.
        first, last (`float`): Soft values of the state before the first token that counts, and behind the last one.
        draws (`tuple[float, ...]`): Rewards under dropout.
    """

    reward: float
    tokens: int
    logp: float
    soft: float
    first: float
    last: float
    draws: tuple[float, ...]

    @property
    def mean(self) -> float:
        return self.logp / max(self.tokens, 1)


def dropout_masks(config, width: int, settings: Settings) -> torch.Tensor:
    """What dropout multiplies hidden states by, `(draws, width)`. The same for every answer, so that a difference of
    two answers is one of the answers, and the same in every process."""
    probability = settings.dropout or config.head_dropout or 0.1
    kept = torch.rand(settings.draws, width, generator=torch.Generator().manual_seed(0)) >= probability
    return kept.double() / (1 - probability)


# ------------------------------------------------------------------------------------------------------------- signals


@dataclass
class Asked:
    """
    A chat that signals are asked about.

    Attributes:
        answer ([`Encoded`]): Its token ids.
        messages (`list[dict]`, *optional*): Its messages, of which the last one is the answer; `None` for text.
        text (`str`): The text of that one.
        extras (`dict`): Its tools, and further arguments of the chat template.
        encoder ([`Encoder`]), settings ([`Settings`]): What it is asked with.
        name (`str`): What an error calls it.
        reference_logp (`float`, *optional*): The reference's log-probability of the answer, where it is known.
    """

    answer: "Encoded"
    messages: list[dict] | None
    text: str
    extras: dict[str, Any]
    encoder: "Encoder"
    settings: Settings
    name: str = "chat"
    reference_logp: float | None = None

    def reading(self, **wanted) -> Reading:
        return Reading(tuple(self.answer.ids), self.answer.start, **wanted)

    def behind(self, *turns: tuple[str, str]) -> list[dict]:
        """The messages and further turns, each a role and a text."""
        if self.messages is None:
            raise ValueError("this is text, and the next turn of a chat is asked for. Give messages, or a prompt.")
        return [*self.messages, *({"role": role, "content": text} for role, text in turns)]

    def probability(self, messages: list[dict]) -> Reading:
        """For the probability of the text of the last message."""
        encoded = self.encoder.encode_open(messages, **self.extras)
        return Reading(tuple(encoded.ids), encoded.start, text=True)


Values = dict[str, Any]  # the signal under "", and what belongs to it by name
Asking = Generator[list, list, Values]


def head(chat: Asked) -> Asking:
    (read,) = yield [chat.reading()]
    return {"": read.reward}


def likelihood(chat: Asked) -> Asking:
    (read,) = yield [chat.reading(text=True)]
    return {"": read.mean, "sum": read.logp}


def implicit(chat: Asked) -> Asking:
    beta, known = chat.settings.beta, chat.reference_logp
    asked = [] if known is not None else [chat.reading(text=True, reference=True)]
    read, *reference = yield [chat.reading(text=True), *asked]
    reference_logp = reference[0].logp if known is None else known
    return {"": beta * (read.logp - reference_logp), "reference_logp": reference_logp}


def implicit_free(chat: Asked) -> Asking:
    (read,) = yield [chat.reading(text=True)]
    return {"": chat.settings.beta * read.logp}


def endogenous(chat: Asked) -> Asking:
    (read,) = yield [chat.reading(text=True, values=True)]
    return {"": read.soft + read.first - read.last}


def judge(chat: Asked) -> Asking:
    wording = chat.settings.wording
    answers = [chat.behind(("user", wording.question), ("assistant", word)) for word in (wording.yes, wording.no)]
    yes, no = yield [chat.probability(messages) for messages in answers]
    return {"": math.exp(yes.logp), "no": math.exp(no.logp)}


def judge_pair(a: Asked, b: Asked) -> Asking:
    """Probability that `a` is the better one, the mean over both orders."""
    wording = a.settings.wording
    prompt = a.behind()[:-1]
    if prompt != b.behind()[:-1]:
        raise ValueError("the two answers have different conversations before them, so they cannot be compared.")
    asked = []
    for first, second in ((a, b), (b, a)):
        texts = {"{a}": first.text, "{b}": second.text}
        both = "".join(texts.get(part, part) for part in re.split(r"(\{[ab]\})", wording.pair))
        for letter in wording.letters:
            said = (("assistant", both), ("user", wording.which), ("assistant", letter))
            asked.append(a.probability([*prompt, *({"role": role, "content": text} for role, text in said)]))
    ab, ba, ba_first, ab_second = yield asked
    first, second = ab.logp - ba.logp, ab_second.logp - ba_first.logp
    return {
        # The mean of both sigmoids, and exactly 1/2 for opposite verdicts, so that a tie is a tie.
        "": 0.5 + (math.tanh(first / 2) + math.tanh(second / 2)) / 4,
        "when_first": sigmoid(first),
        "when_second": sigmoid(second),
        "letters": sum(math.exp(read.logp) for read in (ab, ba, ba_first, ab_second)) / 2,
    }


def follow_up(chat: Asked) -> Asking:
    sets = chat.settings.wording.follow_ups
    places = [(name, side, text) for name, both in sets.items() for side in both for text in both[side]]
    reads = yield [chat.probability(chat.behind(("user", text))) for _, _, text in places]
    by_set: dict[tuple[str, str], list[float]] = {}
    for (name, side, _), read in zip(places, reads, strict=True):
        by_set.setdefault((name, side), []).append(read.mean)
    means = {key: statistics.fmean(values) for key, values in by_set.items()}
    parts = {name: means[name, "positive"] - means[name, "negative"] for name in sets}
    return {"": statistics.fmean(parts.values()), **parts}


def critique(chat: Asked) -> Asking:
    request = ("user", chat.settings.wording.critique)
    (text,) = yield [Writing(tuple(chat.encoder.encode_prompt(chat.behind(request), **chat.extras)))]
    if text.strip():
        encoded = chat.encoder.encode_chat(chat.behind(request, ("assistant", text)), **chat.extras)
        reading = Reading(tuple(encoded.ids), encoded.start)
    else:
        reading = chat.reading()  # nothing was said
    (read,) = yield [reading]
    return {"": read.reward, "text": text}


def dropout(chat: Asked) -> Asking:
    (read,) = yield [chat.reading(draws=True)]
    return {"": statistics.fmean(read.draws), "spread": statistics.stdev(read.draws)}


class Signal(NamedTuple):
    """
    A row of `SIGNALS`.

    Attributes:
        needs (`str`): What it needs besides the model and a chat: nothing, `"messages"`, `"reference"` or
            `"generate"`.
        function (`Callable`): Of an [`Asked`].
        sentence (`str`): What it says, for a reader.
        is_reward (`bool`): Whether its differences are on the scale of the reward.
        pair (`Callable`, *optional*): Of two [`Asked`], where a pair is asked about as one.
        reads (`tuple[str, ...]`): The [`Settings`] that it depends on.
    """

    needs: str
    function: Callable[[Asked], Asking]
    sentence: str
    is_reward: bool = False
    pair: Callable[[Asked, Asked], Asking] | None = None
    reads: tuple[str, ...] = ()


SIGNALS = {
    "head": Signal("", head, "The reward head: the number that training was about.", True),
    "likelihood": Signal("", likelihood, "The LM head: mean log-probability of the answer's tokens."),
    "implicit": Signal(
        "reference", implicit, "How much likelier training has made the answer, times beta.",
        reads=("beta", "reference"),
    ),
    "implicit_free": Signal(
        "", implicit_free, "`implicit` without a reference: log-probability times beta.", reads=("beta",)
    ),
    "endogenous": Signal(
        "", endogenous, "The reward for which the LM head would be the best policy (EndoRM).", reads=("alpha",)
    ),
    "judge": Signal(
        "messages", judge, "The LM head's verdict: p(Yes); of a pair, the better one.", pair=judge_pair,
        reads=("wording",),
    ),
    "follow_up": Signal(
        "messages", follow_up, "How much likelier a pleased next turn is than a displeased one.", reads=("wording",)
    ),
    "critique": Signal(
        "generate", critique, "The reward behind a critique that the LM head wrote.", True,
        reads=("generate", "max_new_tokens", "wording"),
    ),
    "dropout": Signal(
        "", dropout, "Mean reward over draws of the head's dropout, with its spread.", True, reads=("draws", "dropout")
    ),
}


def checked(names: Iterable[str], settings: Settings) -> tuple[str, ...]:
    """Names of signals, each once; `ValueError` for one that is unknown, or that the settings switch off."""
    if isinstance(names, str):
        raise ValueError(f"`signals` is the text {names!r}; give a list of names, [{names!r}].")
    found = tuple(dict.fromkeys(names))
    if unknown := [name for name in found if name not in SIGNALS]:
        raise ValueError(f"there is no signal {unknown[0]!r}; the signals are {', '.join(SIGNALS)}.")
    for name in found:
        if SIGNALS[name].needs == "generate" and not settings.generate:
            raise ValueError(f"{name!r} lets the LM head write, which is slow: ask for it by generate=True.")
    return found


def unread(given: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of the settings that none of the signals depends on."""
    return sorted(set(given) - {setting for name in names for setting in SIGNALS[name].reads})


def run(
    askings: dict[Any, Asking], read: Callable, write: Callable, said: Callable[[Any], str], turn
) -> dict[Any, Values]:
    """
    Run functions of signals side by side, so that what they ask for is computed together, and once.

    Args:
        askings (`dict`): What the functions returned, by any key.
        read (`Callable`): Of `list[Reading]`, gives `list[Read]`.
        write (`Callable`): Of `list[Writing]`, gives `list[str]`.
        said (`Callable`): Of a key: what an error calls it.
        turn: What is held while they tokenize.
    """
    found: dict[Any, Values] = {}
    answers: dict[Any, Any] = dict.fromkeys(askings)
    while answers:
        asked: dict[Any, list] = {}
        with turn:
            for key, answer in answers.items():
                try:
                    asked[key] = askings[key].send(answer)
                except StopIteration as done:
                    found[key] = done.value
                except ValueError as error:
                    raise ValueError(f"{said(key)}: {error}") from error
        merged: dict[Hashable, Reading] = {}
        texts: dict[Writing, str] = {}
        for one in (one for several in asked.values() for one in several):
            if isinstance(one, Writing):
                texts[one] = ""
            else:
                other = merged.get(one.key, one)
                wanted = {name: getattr(one, name) or getattr(other, name) for name in ("text", "values", "draws")}
                merged[one.key] = one._replace(**wanted)
        reads = dict(zip(merged, read(list(merged.values())), strict=True)) if merged else {}
        texts = dict(zip(texts, write(list(texts)), strict=True)) if texts else {}
        answers = {
            key: [texts[one] if isinstance(one, Writing) else reads[one.key] for one in several]
            for key, several in asked.items()
        }
    return found


def check_threshold(threshold: float | None) -> None:
    """`ValueError` for a least agreement that no share can be."""
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"`threshold` is {threshold}; it is a share of the signals, from 0 to 1.")


def record_of(values: dict[str, Values]) -> dict[str, Any]:
    """One flat record: a signal under its name, what belongs to it under `name/detail`."""
    return {
        f"{name}/{detail}" if detail else name: value
        for name, details in values.items()
        for detail, value in details.items()
    }


# ----------------------------------------------------------------------------------------------------------- agreement


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def divergence(probabilities: Iterable[float]) -> float:
    """
    Jensen-Shannon divergence of probabilities of the same event, in bits: the entropy of their mean minus the mean of
    their entropies. 0 where all are equal, 1 where half of them are sure of it and half of the opposite.

    >>> divergence([0.7, 0.7]), divergence([0.0, 1.0])
    (0.0, 1.0)
    """
    found = list(probabilities)
    return max(0.0, _entropy(statistics.fmean(found)) - statistics.fmean(map(_entropy, found)))


def _entropy(p: float) -> float:
    return -sum(x * math.log2(x) for x in (p, 1 - p) if x > 0)


@dataclass(frozen=True)
class Comparison:
    """
    Two answers to one prompt, by several signals.

    Attributes:
        winner (`str`): `"a"` or `"b"`, by the reward head; `"tie"` for equal rewards.
        probabilities (`dict[str, float]`): By each signal, that `a` is the better answer.
        agreement (`float`): Share of the signals that are on the winner's side, the head among them; 0 for a tie.
        divergence (`float`): [`divergence`] of the probabilities.
        abstain (`bool`): Whether the agreement is below the threshold. Without a threshold, never.
        threshold (`float`, *optional*): That threshold.
        a, b (`dict`): The record of each answer, as [`GRMScorer.signals`] gives it.
        details (`dict`): What signals say about the pair as one, such as `judge/when_first`.
    """

    winner: str
    probabilities: dict[str, float]
    agreement: float
    divergence: float
    abstain: bool
    threshold: float | None
    a: dict[str, Any] = field(repr=False)
    b: dict[str, Any] = field(repr=False)
    details: dict[str, Any] = field(repr=False)

    def lean(self, name: str) -> float:
        """How far a signal prefers `a`, in its own unit: the difference of its values; for a signal that is asked
        about the pair as one, its probability minus 1/2."""
        return self.probabilities[name] - 0.5 if SIGNALS[name].pair else self.a[name] - self.b[name]


def compared(
    names: Sequence[str],
    a: dict[str, Any],
    b: dict[str, Any],
    pairs: dict[str, Values],
    scales: Mapping[str, float],
    threshold: float | None,
) -> Comparison:
    """A [`Comparison`] of two records. `scales` is what a signal's difference is divided by before the sigmoid."""
    leans = {name: pairs[name][""] - 0.5 if name in pairs else a[name] - b[name] for name in names}
    probabilities = {
        name: pairs[name][""] if name in pairs else sigmoid(lean / scales.get(name, 1.0))
        for name, lean in leans.items()
    }
    margin = a["head"] - b["head"]
    winner = "tie" if margin == 0 else "a" if margin > 0 else "b"
    agreement = sum(lean > 0 if margin > 0 else lean < 0 for lean in leans.values()) / len(leans) if margin else 0.0
    abstain = threshold is not None and agreement < threshold
    return Comparison(
        winner, probabilities, agreement, divergence(probabilities.values()), abstain, threshold, a, b,
        record_of({name: {key: v for key, v in found.items() if key} for name, found in pairs.items()}),
    )
