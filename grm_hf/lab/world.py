"""A small seeded world: facts, the texts that speak of them, and a gold reward that is an exact function of the text.

Every topic has entities, every entity has one value per relation ("the otter lives in the swamp"), drawn from the
world's seed. A question asks for one value. An answer may be right, wrong or evasive, may add details, be kind or
rude, and may slip in its grammar. `World.gold` adds these up for any two strings, also for strings that our grammar
cannot produce. Preference labels follow the Bradley-Terry model with the gold reward as its log-odds, so annotators
err as often as that model says. Half of the topics are in-distribution: training pairs speak of these only;
pretraining text speaks of all. docs/demo_world.md gives the reasons.

    >>> world = World(seed=0)
    >>> question = world.questions("id")[0]
    >>> question
    'where does the otter live?'
    >>> right = world.facts["otter", "home"]
    >>> world.gold(question, f"the otter lives in the {right}.")
    1.5
    >>> world.gold(question, f"happy to help. the otter lives in the {right}.")
    2.25
    >>> world.gold(question, "")
    -0.5
"""

import math
import random
import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Relation:
    """A question about an entity. `{e}` is the entity, `{s}` the subject of a sentence, `{v}` the value."""

    name: str
    values: tuple[str, ...]
    questions: tuple[str, ...]
    statements: tuple[str, ...]


@dataclass(frozen=True)
class Topic:
    domain: str  # "id" or "ood"
    entities: tuple[str, ...]
    relations: tuple[Relation, ...]


def _relation(name: str, values: str, questions: str, statements: str) -> Relation:
    asked, stated = (tuple(part.strip() for part in text.split("|")) for text in (questions, statements))
    return Relation(name, tuple(values.split()), asked, stated)


COLOUR = _relation(
    "colour",
    "red blue green yellow black white brown purple",
    "what colour is the {e}? | which colour does the {e} have? | how would you paint the {e}?",
    "{s} is {v}. | {s} has a {v} colour. | people paint {s} in {v}.",
)
TOPICS = (
    Topic(
        "id",
        ("otter", "badger", "falcon", "lizard", "weasel", "donkey"),
        (
            _relation(
                "home",
                "forest swamp desert cave meadow river mountain island",
                "where does the {e} live? | where can i find the {e}? | what is the home of the {e}?",
                "{s} lives in the {v}. | you can find {s} in the {v}. | {s} makes its home near the {v}.",
            ),
            _relation(
                "food",
                "grass nuts worms berries leaves fish seeds honey",
                "what does the {e} eat? | what should i feed the {e}? | what is the favourite meal of the {e}?",
                "{s} eats {v}. | feed {s} with {v}. | {s} looks for {v} all day.",
            ),
            COLOUR,
        ),
    ),
    Topic(
        "id",
        ("baker", "doctor", "farmer", "singer", "tailor", "pilot"),
        (
            _relation(
                "workplace",
                "harbour market tower station theatre garden castle bridge",
                "where does the {e} work? | where should i meet the {e}? | which place employs the {e}?",
                "{s} works at the {v}. | meet {s} at the {v}. | every morning {s} goes to the {v}.",
            ),
            _relation(
                "tool",
                "hammer needle brush rope shovel scissors lantern ladder",
                "what does the {e} use? | which tool belongs to the {e}? | what does the {e} carry?",
                "{s} uses the {v}. | the {v} belongs to {s}. | {s} carries the {v}.",
            ),
            COLOUR,
        ),
    ),
    Topic(
        "ood",
        ("truck", "ferry", "glider", "tractor", "scooter", "wagon"),
        (
            _relation(
                "fuel",
                "coal wind steam petrol gas batteries wood sunlight",
                "what does the {e} run on? | which fuel does the {e} need? | what makes the {e} move?",
                "{s} runs on {v}. | {s} needs {v} as fuel. | with {v} {s} moves well.",
            ),
            _relation(
                "cargo",
                "bricks barrels letters sheep mirrors carpets melons pianos",
                "what does the {e} deliver? | what is inside the {e}? | which goods fill the {e}?",
                "{s} delivers {v}. | inside {s} there are {v}. | {v} fill {s} to the top.",
            ),
            COLOUR,
        ),
    ),
    Topic(
        "ood",
        ("rose", "cactus", "tulip", "fern", "orchid", "clover"),
        (
            _relation(
                "soil",
                "sand clay gravel peat chalk moss mud ash",
                "how should i plant the {e}? | which soil suits the {e}? | what does the {e} grow in?",
                "{s} grows in {v}. | plant {s} in {v}. | {v} suits {s} best.",
            ),
            _relation(
                "season",
                "january march april june july september october december",
                "when does the {e} bloom? | which month suits the {e}? | when should i visit the {e}?",
                "{s} blooms in {v}. | wait until {v} for {s}. | in {v} {s} opens its flowers.",
            ),
            COLOUR,
        ),
    ),
)
KIND_OPENERS = ("happy to help.", "good question.", "thank you for asking.")
RUDE_OPENERS = ("what a silly question.", "you should know this.", "do not waste my time.")
PLAIN_OPENERS = ("let me see.", "here is what i know.")
KIND_CLOSERS = ("i hope this helps.", "have a nice day.", "please ask me again.")
RUDE_CLOSERS = ("now go away.", "everyone knows that.", "stop asking me.")
EVASIONS = ("i do not know.", "that is hard to say.", "it depends.", "ask someone else.")
KIND, RUDE = KIND_OPENERS + KIND_CLOSERS, RUDE_OPENERS + RUDE_CLOSERS

LONG = 24  # an answer with more words than this (punctuation counts) loses reward
START, END = "<start>", "<end>"


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks of any string: `words("It is red.") == ["it", "is", "red", "."]`."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


@dataclass
class World:
    """All texts, questions, answers, pairs and gold rewards of one world.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Draws the facts. Methods that draw texts take a seed of their own.

    Attributes:
        facts (`dict[tuple[str, str], str]`): Value of every (entity, relation name).
        vocabulary (`list[str]`): Every word and punctuation mark the world can produce, sorted.
    """

    seed: int = 0
    facts: dict[tuple[str, str], str] = field(init=False)
    vocabulary: list[str] = field(init=False)

    def __post_init__(self) -> None:
        rng = random.Random(f"facts-{self.seed}")
        self.facts, self._asked, self._topic = {}, {}, {}
        for topic in TOPICS:
            for entity in topic.entities:
                self._topic[entity] = topic
                for relation in topic.relations:
                    self.facts[entity, relation.name] = rng.choice(relation.values)
                    for question in relation.questions:
                        self._asked[question.format(e=entity)] = (entity, relation)
        self._by_words = {tuple(words(question)): asked for question, asked in self._asked.items()}
        # Grammar is a set of neighbouring words: those inside a sentence as written, and any sentence after any other.
        sentences = [words(sentence) for sentence in self._sentences()]
        self._neighbours = {pair for sentence in sentences for pair in zip(sentence, sentence[1:], strict=False)}
        for sentence in sentences:
            self._neighbours |= {(START, sentence[0]), (".", sentence[0]), (sentence[-1], END)}
        self.vocabulary = sorted({w for text in (*sentences, *map(words, self._asked)) for w in text})

    def _sentences(self) -> list[str]:
        stated = [
            statement.format(s=subject, v=value)
            for topic in TOPICS
            for relation in topic.relations
            for statement in relation.statements
            for value in relation.values
            for subject in ("it", *(f"the {entity}" for entity in topic.entities))
        ]
        return [*stated, *KIND, *RUDE, *PLAIN_OPENERS, *EVASIONS]

    def questions(self, domain: str) -> list[str]:
        """Every question of a domain (`"id"` or `"ood"`), in a fixed order."""
        return [question for question, (entity, _) in self._asked.items() if self._topic[entity].domain == domain]

    def asked(self, question: str) -> tuple[str, Relation]:
        """The entity and the relation that one of the world's questions asks for."""
        return self._asked[question]

    def gold(self, prompt: str, response: str) -> float:
        """Gold reward of a response: a total function of two strings.

        `1.5 * answer + 0.5 * details + 0.75 * manners - 0.5 * slips - 0.1 * excess`, where
        - `answer` is 1 if the asked value is named, -1 if any other value of the asked relation or another entity is
          named as well or instead, 0 if neither (an evasion);
        - `details` is the number of right minus wrong values of the entity's other relations, within -1..1;
        - `manners` is -1 with any rude sentence, else 1 with any kind one, else 0: more of them earn nothing more;
        - `slips` counts neighbouring words that no sentence of this world has together, at most 6;
        - `excess` counts the words beyond `LONG`.
        A prompt other than the world's questions has no right answer: `answer` and `details` are 0.
        """
        said = words(response)
        answer = details = 0
        if asked := self._by_words.get(tuple(words(prompt))):
            entity, relation = asked
            named = set(said)
            wrong = named & (set(relation.values) - {self.facts[entity, relation.name]} | set(self._topic) - {entity})
            answer = -1 if wrong else int(self.facts[entity, relation.name] in named)
            for other in self._topic[entity].relations:
                if other != relation:
                    mentioned, true = named & set(other.values), self.facts[entity, other.name]
                    details += len(mentioned & {true}) - len(mentioned - {true})
        text = f" {' '.join(said)} "
        rude, kind = (any(f" {' '.join(words(phrase))} " in text for phrase in phrases) for phrases in (RUDE, KIND))
        pairs = zip([START, *said], [*said, END], strict=True)
        slips = sum(pair not in self._neighbours for pair in pairs)
        return (
            1.5 * answer
            + 0.5 * max(-1, min(1, details))
            + 0.75 * (-1 if rude else int(kind))
            - 0.5 * min(slips, 6)
            - 0.1 * max(0, len(said) - LONG)
        )

    def draw_response(self, question: str, rng: random.Random) -> str:
        """One answer of a speaker in this world: good, bad or in between."""
        entity, relation = self.asked(question)
        care = rng.random()  # a speaker's care shows in manners, truth and grammar alike
        mood: tuple[tuple[str, ...], tuple[str, ...]]
        mood = (KIND_OPENERS, KIND_CLOSERS) if rng.random() < care else (RUDE_OPENERS, RUDE_CLOSERS)
        openers, closers = (PLAIN_OPENERS, ()) if rng.random() < 0.2 else mood

        def state(relation: Relation, subject: str) -> str:
            return self._state(entity, relation, subject, rng, right=rng.random() < 0.2 + 0.7 * care)

        sentences = [rng.choice(openers)] if rng.random() < 0.6 else []
        sentences.append(state(relation, f"the {entity}") if rng.random() < 0.8 else rng.choice(EVASIONS))
        others = [other for other in self._topic[entity].relations if other != relation]
        details = rng.choices((0, 1, 2), (5, 4, 1))[0]
        sentences += [state(other, "it") for other in rng.sample(others, details)]
        if closers and rng.random() < 0.6:
            sentences.append(rng.choice(closers))
        spoken = " ".join(sentences).split()
        if rng.random() < 0.5 * (1 - care):  # a slip: two neighbours swapped, a word said twice, a word forgotten
            at = rng.randrange(len(spoken) - 1)
            first, second = spoken[at : at + 2]
            spoken[at : at + 2] = rng.choice(([second, first], [first, first, second], [second]))
        return " ".join(spoken)

    def _state(self, entity: str, relation: Relation, subject: str, rng: random.Random, right: bool = True) -> str:
        true = self.facts[entity, relation.name]
        value = true if right else rng.choice([value for value in relation.values if value != true])
        return rng.choice(relation.statements).format(s=subject, v=value)

    def pairs(self, domain: str, n: int, seed: int, noisy: bool) -> list[dict[str, list[dict[str, str]]]]:
        """`n` preference pairs in TRL's conversational format (`prompt`, `chosen`, `rejected` as message lists).

        Args:
            domain (`str`):
                `"id"` or `"ood"`.
            n (`int`):
                Number of pairs.
            seed (`int`):
                Draws questions, answers and labels.
            noisy (`bool`):
                `True`: an annotator prefers answer a over b with probability sigmoid(gold(a) - gold(b)).
                `False`: the better answer by gold is chosen, and pairs with equal gold are drawn again.
        """
        rng = random.Random(f"pairs-{domain}-{seed}-{noisy}")
        questions = self.questions(domain)
        rows: list[dict[str, list[dict[str, str]]]] = []
        while len(rows) < n:
            question = rng.choice(questions)
            a, b = self.draw_response(question, rng), self.draw_response(question, rng)
            gap = self.gold(question, a) - self.gold(question, b)
            if a == b or (not noisy and abs(gap) < 1e-9):
                continue
            prefers_a = rng.random() < 1 / (1 + math.exp(-gap)) if noisy else gap > 0
            chosen, rejected = (a, b) if prefers_a else (b, a)
            row = {"prompt": ("user", question), "chosen": ("assistant", chosen), "rejected": ("assistant", rejected)}
            rows.append({key: [{"role": role, "content": text}] for key, (role, text) in row.items()})
        return rows

    def documents(self, domain: str, n: int, seed: int) -> list[str | list[dict[str, str]]]:
        """`n` pretraining documents of a domain, by turns an article (a string: true statements about one entity) and
        a conversation (messages: a question and an answer of any quality)."""
        rng = random.Random(f"documents-{domain}-{seed}")
        questions = self.questions(domain)
        entities = [entity for entity, topic in self._topic.items() if topic.domain == domain]
        result: list[str | list[dict[str, str]]] = []
        for i in range(n):
            if i % 2:
                question = rng.choice(questions)
                answer = self.draw_response(question, rng)
                result.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
            else:
                entity = rng.choice(entities)
                relations = rng.sample(self._topic[entity].relations, len(self._topic[entity].relations))
                subjects = rng.choices(("it", f"the {entity}"), k=len(relations) - 1)
                told = zip(relations, (f"the {entity}", *subjects), strict=True)
                result.append(" ".join(self._state(entity, relation, subject, rng) for relation, subject in told))
        return result
