"""Seeded synthetic corpus of multi-chunk reading tasks, as token ids.

`corpus.json` holds the words and sentence templates, this file and
`bench/src/corpus/` hold the algorithm: both must make the same bytes from the
same seed. README.md describes the tasks and the order of the random draws.
Standard library only.

    python3 corpus.py --task hop1 --chunks 8 --size 64 --seed 1 --count 5
    python3 corpus.py --profile '{"total": 1000}' --split train
    python3 corpus.py --vectors

The first prints contexts of an evaluation task, one JSON object a line; the
second any contexts; the third writes vectors.json, what the port in Rust is
tested against.
"""

import argparse
import json
import pathlib
import sys
import zlib
from dataclasses import dataclass, field

MASK = (1 << 64) - 1
SPEC_PATH = pathlib.Path(__file__).with_name("corpus.json")
# A chunk's free space is always 0 or at least this: the shortest filler.
MIN_FILLER = 4
# `<doc>` and a filler.
MIN_CHUNK_TOKENS = 1 + MIN_FILLER
# Of all chunks together: far below the number of names and of needles.
MAX_CONTEXT_TOKENS = 8192
MAX_CHAIN = 4
# Draws of one name before it is given up.
NAME_DRAWS = 100_000
# Contexts tried for one that has a question of the task.
ATTEMPTS = 1000


class Rng:
    """SplitMix64 (Steele, Lea, Flood, 2014)."""

    def __init__(self, seed):
        self.state = seed & MASK

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def below(self, n):
        """A number in 0..n: the high word of a 64 x 64 bit product."""
        return (self.next() * n) >> 64

    def between(self, low, high):
        """A number in low..=high."""
        return low + self.below(high - low + 1)

    def chance(self, permille):
        return self.below(1000) < permille

    def pick(self, items):
        return items[self.below(len(items))]

    def shuffle(self, items):
        """Fisher-Yates, from the end."""
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]


class Vocabulary:
    """Token strings by id, and every list of `corpus.json` as ids."""

    def __init__(self, spec):
        self.spec = spec
        self.tokens = []
        self.ids = {}
        for word in spec["special"]:
            self._add(word)
        for key in ("numbers", "initials", "finals", "town_finals", "adjectives", "nouns",
                    "ordinals", "roles", "relations"):
            for word in spec[key]:
                self._add(word)
        for group in ("attributes", "town_attributes"):
            for attribute in spec[group]:
                self._add(attribute["name"])
                for word in attribute["values"]:
                    self._add(word)
        for template in self._templates():
            for word in template.split():
                if not word.startswith("{"):
                    self._add(word)

        self.pad, self.bos, self.eos, self.unk, self.doc, self.question, self.answer = range(7)
        self.numbers = self.list("numbers")
        self.initials = self.list("initials")
        self.finals = self.list("finals")
        self.town_finals = self.list("town_finals")
        self.adjectives = self.list("adjectives")
        self.nouns = self.list("nouns")
        self.ordinals = self.list("ordinals")
        self.roles = self.list("roles")
        self.relations = self.list("relations")
        self.attributes = [Attribute(self, a) for a in spec["attributes"]]
        self.town_attributes = [Attribute(self, a) for a in spec["town_attributes"]]
        self.relation_statements = [self.template(t) for t in spec["relation_statements"]]
        self.update = self.ids[spec["update"]]
        self.alias = self.template(spec["alias"])
        self.total = [self.template(t) for t in spec["total"]]
        self.needle = [self.template(t) for t in spec["needle"]]
        self.pair = self.template(spec["pair"])
        self.questions = {k: self.template(t) for k, t in spec["question"].items()}
        self.fillers = [self.template(t) for t in spec["fillers"]]
        self.fillers_by_length = {}
        for filler in self.fillers:
            self.fillers_by_length.setdefault(len(filler), []).append(filler)
        self.pronouns = [self.template(" ".join(spec["pronouns"][k])) for k in ("female", "male")]
        self.possessive = self.ids["'s"]
        self.the = self.ids["The"]
        self.same = self.template(spec["same"])
        self.that_town = self.template(spec["that_town"])
        # Mottos are made of every attribute's value words.
        self.motto_words = [v for a in self.attributes for v in a.values]
        self.tasks = {t["name"]: Task(**t) for t in spec["tasks"]}

    def _templates(self):
        spec = self.spec
        for group in ("attributes", "town_attributes"):
            for attribute in spec[group]:
                yield from attribute["statements"]
        yield from spec["relation_statements"]
        yield spec["update"]
        yield spec["alias"]
        yield from spec["total"]
        yield from spec["needle"]
        yield spec["pair"]
        yield from spec["question"].values()
        yield from spec["fillers"]
        yield from spec["pronouns"]["female"]
        yield from spec["pronouns"]["male"]
        yield spec["same"]
        yield spec["that_town"]
        yield "'s The"

    def _add(self, word):
        if word not in self.ids:
            self.ids[word] = len(self.tokens)
            self.tokens.append(word)

    def list(self, key):
        return [self.ids[w] for w in self.spec[key]]

    def template(self, text):
        """Ids, with slots such as `{S}` left as their letter."""
        return [w[1:-1] if w.startswith("{") else self.ids[w] for w in text.split()]

    def text(self, tokens):
        """The text that the shipped tokenizer turns into `tokens`."""
        out = ""
        for token in tokens:
            word = self.tokens[token]
            out += word[2:] if word.startswith("##") else (" " if out else "") + word
        return out


@dataclass
class Task:
    """What an evaluation asks: kinds of questions, and contexts made for them."""

    name: str
    kinds: list
    profile: dict
    fill: bool = False  # contexts are key-value lists of as many pairs as fit


class Attribute:
    def __init__(self, vocabulary, spec):
        self.name = vocabulary.ids[spec["name"]]
        self.label = spec["name"]
        self.values = [vocabulary.ids[w] for w in spec["values"]]
        self.statements = [vocabulary.template(t) for t in spec["statements"]]


def fill(template, **slots):
    out = []
    for part in template:
        if isinstance(part, str):
            out += slots[part]
        else:
            out.append(part)
    return out


@dataclass
class Profile:
    """How often things happen, in permille where not said otherwise."""

    continuation: int = 300
    role: int = 150
    update: int = 100
    needles: int = 120
    alias: int = 150
    total: int = 300        # of contexts
    relation: int = 600     # of persons
    name_again: int = 200   # sentences that repeat the name
    filler: int = 80
    lookalike: int = 250
    town: int = 120         # of continuation chunks
    attributes: int = 10    # distinct attributes of a context
    facts_min: int = 2
    facts_max: int = 4
    persons: int = 0        # of a chunk at most; 0: one, and one more for every 56 tokens
    pairs: int = 0          # above 0: the context is a key-value list of at most so many pairs


@dataclass
class Person:
    pair: tuple  # (initial, final), by position in the lists
    name: list
    gender: int
    facts: dict = field(default_factory=dict)      # attribute index -> Fact
    relations: dict = field(default_factory=dict)  # relation id -> (Person, kind, chunk)


@dataclass
class Fact:
    value: list
    kind: str
    chunk: int


@dataclass
class Question:
    task: str  # its kind
    question: list
    answer: list
    chunks: list


@dataclass
class Context:
    chunks: list
    questions: list


def held_out(initial, final):
    """Whether a name is kept for tests: one in eight, by position in the lists."""
    return (initial * 31 + final * 17 + initial * final) % 8 == 0


class Builder:
    """One context. The order of draws is part of the format."""

    def __init__(self, vocabulary, profile, chunks, chunk_tokens, rng, test):
        if chunks < 1:
            raise ValueError("a context has a chunk at least")
        if chunk_tokens < MIN_CHUNK_TOKENS:
            raise ValueError(f"a chunk has {MIN_CHUNK_TOKENS} tokens at least")
        if chunks * chunk_tokens > MAX_CONTEXT_TOKENS:
            raise ValueError(f"a context has {MAX_CONTEXT_TOKENS} tokens at most")
        if profile.total > 0 and chunks > len(vocabulary.ordinals):
            raise ValueError(f"a context with totals has {len(vocabulary.ordinals)} chunks at most")
        if profile.facts_min > profile.facts_max:
            raise ValueError("facts_min is above facts_max")
        self.v = vocabulary
        self.p = profile
        self.count = chunks
        self.size = chunk_tokens
        self.rng = rng
        self.test = test
        self.chunks = []
        self.chunk = []
        self.used_names = set()
        self.people = []
        self.towns = {}          # town name -> {attribute index: Fact}
        self.last_town = None
        self.needles = {}
        self.totals = []
        self.meanings = {}       # role id -> Person
        self.subject = None

    def build(self):
        if self.p.pairs:
            return self.pair_list()
        pool = list(range(len(self.v.attributes)))
        self.rng.shuffle(pool)
        self.pool = sorted(pool[:self.p.attributes])
        with_totals = self.rng.chance(self.p.total)
        kind, chain = None, 0
        for index in range(self.count):
            kind, chain = self.next_kind(index, kind, chain)
            self.chunk = [self.v.doc]
            self.index = index
            total_due = with_totals
            if kind == "C":
                self.continuation(chain)
            elif kind == "R":
                self.role_chunk()
            elif kind == "U":
                self.updates()
            elif kind == "N":
                self.needle_list()
            if total_due:
                self.state_total()
            if kind == "P":
                self.person_chunk()
            if self.people and kind != "N" and self.rng.chance(self.p.alias):
                self.define_alias()
            self.pad_chunk()
            self.chunks.append(self.chunk)
        return Context(self.chunks, self.ask())

    def next_kind(self, index, kind, chain):
        rng, p = self.rng, self.p
        if self.subject and kind in ("P", "C") and chain < MAX_CHAIN and rng.chance(p.continuation):
            return "C", chain + 1
        if self.meanings and rng.chance(p.role):
            return "R", 0
        if self.people and rng.chance(p.update):
            return "U", 0
        if rng.chance(p.needles):
            return "N", 0
        return "P", 1

    # -- room ------------------------------------------------------------

    def add(self, sentence):
        """Appends the sentence if what is left can still be filled."""
        left = self.size - len(self.chunk) - len(sentence)
        if left < 0 or 0 < left < MIN_FILLER:
            return False
        self.chunk += sentence
        return True

    def pad_chunk(self):
        lengths = self.v.fillers_by_length
        longest = max(lengths)
        while len(self.chunk) < self.size:
            left = self.size - len(self.chunk)
            if left <= longest:
                self.add(self.rng.pick(lengths[left]))
            else:
                self.add(self.rng.pick(self.v.fillers))

    def maybe_filler(self):
        if self.rng.chance(self.p.filler):
            self.add(self.rng.pick(self.v.fillers))

    # -- names -----------------------------------------------------------

    def new_name(self):
        v, rng = self.v, self.rng
        lookalike = bool(self.people) and rng.chance(self.p.lookalike)
        for _ in range(NAME_DRAWS):
            i, f = rng.below(len(v.initials)), rng.below(len(v.finals))
            if lookalike:
                other = rng.pick(self.people).pair
                if rng.chance(500):
                    i = other[0]
                else:
                    f = other[1]
            if (i, f) not in self.used_names and held_out(i, f) == self.test:
                self.used_names.add((i, f))
                return (i, f)
        raise ValueError("no name is left")

    def new_person(self):
        i, f = self.new_name()
        person = Person((i, f), [self.v.initials[i], self.v.finals[f]], self.rng.below(2))
        self.people.append(person)
        return person

    def value(self, attribute):
        v, rng = self.v, self.rng
        if attribute.values:
            return [rng.pick(attribute.values)]
        if attribute.label == "home":
            return [rng.pick(v.initials), rng.pick(v.town_finals)]
        return [rng.pick(v.motto_words) for _ in range(rng.between(4, 7))]

    # -- sentences -------------------------------------------------------

    def state(self, person, index, subject, possessive, kind, prefix=()):
        attribute = self.v.attributes[index]
        value = self.value(attribute)
        statement = self.rng.pick(attribute.statements)
        if not self.add([*prefix, *fill(statement, S=subject, P=possessive, V=value)]):
            return False
        person.facts[index] = Fact(value, kind, self.index)
        if attribute.label == "home":
            self.last_town = tuple(value)
            self.towns.setdefault(tuple(value), {})
        return True

    def named(self, person):
        return person.name, person.name + [self.v.possessive]

    def pronoun(self, person):
        she, her = self.v.pronouns[person.gender]
        return [she], [her]

    def open_attributes(self, person):
        free = [a for a in self.pool if a not in person.facts]
        self.rng.shuffle(free)
        return free

    def facts(self, person, count, opening, kind):
        """States up to `count` new facts; the first with the opening subject."""
        first = True
        for index in self.open_attributes(person)[:count]:
            if first:
                subject, possessive = opening
            elif kind == "hop1" and self.rng.chance(self.p.name_again):
                subject, possessive = self.named(person)
            else:
                subject, possessive = self.pronoun(person)
            if self.state(person, index, subject, possessive, kind):
                first = False
            self.maybe_filler()
        return not first

    def relate(self, person, subject, possessive, kind):
        others = [p for p in self.people if p is not person]
        free = [r for r in self.v.relations if r not in person.relations]
        if not others or not free or not self.rng.chance(self.p.relation):
            return
        relation, other = self.rng.pick(free), self.rng.pick(others)
        statement = self.rng.pick(self.v.relation_statements)
        if self.add(fill(statement, S=subject, P=possessive, R=[relation], O=other.name)):
            person.relations[relation] = (other, kind, self.index)

    # -- chunks ----------------------------------------------------------

    def person_chunk(self):
        self.subject = None
        limit = self.p.persons or 1 + self.size // 56
        for _ in range(limit):
            if self.size - len(self.chunk) < 14:
                break
            person = self.new_person()
            count = self.rng.between(self.p.facts_min, self.p.facts_max)
            if self.facts(person, count, self.named(person), "hop1"):
                self.subject = person
                self.relate(person, *self.pronoun(person), "hop1")
            else:
                self.people.pop()

    def continuation(self, chain):
        if self.last_town and self.rng.chance(self.p.town):
            self.town_facts()
        person = self.subject
        if self.rng.chance(400):
            opening = self.v.same, self.v.same + [self.v.possessive]
        else:
            opening = self.pronoun(person)
        kind = "coref%d" % chain
        count = self.rng.between(self.p.facts_min, self.p.facts_max)
        if self.facts(person, count, opening, kind):
            self.relate(person, *self.pronoun(person), kind)

    def town_facts(self):
        """"That town": the last one named before this chunk."""
        facts = self.towns[self.last_town]
        free = [i for i in range(len(self.v.town_attributes)) if i not in facts]
        if not free:
            return
        index = self.rng.pick(free)
        attribute = self.v.town_attributes[index]
        value = self.value(attribute)
        if self.add(fill(self.rng.pick(attribute.statements), T=self.v.that_town, V=value)):
            facts[index] = Fact(value, "coref2", self.index)

    def define_alias(self):
        role, person = self.rng.pick(self.v.roles[:4]), self.rng.pick(self.people)
        if self.add(fill(self.v.alias, A=[role], N=person.name)):
            self.meanings[role] = person

    def role_chunk(self):
        """Facts of a person who is only called by a role defined before."""
        roles = [r for r in self.v.roles if r in self.meanings]
        self.rng.shuffle(roles)
        for role in roles[:2]:
            name = [self.v.the, role]
            person = self.meanings[role]
            for index in self.open_attributes(person)[:2]:
                self.state(person, index, name, name + [self.v.possessive], "override")
            self.maybe_filler()

    def updates(self):
        """New values for facts stated under the person's name."""
        for _ in range(1 + self.size // 24):
            person = self.rng.pick(self.people)
            known = [i for i, f in sorted(person.facts.items()) if f.kind == "hop1"]
            if known:
                index = self.rng.pick(known)
                self.state(person, index, *self.named(person), "update", [self.v.update])

    def needle_list(self):
        while self.size - len(self.chunk) >= 16:
            key = (self.rng.pick(self.v.adjectives), self.rng.pick(self.v.nouns))
            value = [self.rng.pick(self.v.numbers), self.rng.pick(self.v.numbers)]
            if key not in self.needles:
                sentence = fill(self.rng.pick(self.v.needle), K=list(key), V=value)
                if self.add(sentence):
                    self.needles[key] = Fact(value, "needle", self.index)
            self.maybe_filler()

    def state_total(self):
        value = [self.rng.pick(self.v.numbers)]
        if self.add(fill(self.rng.pick(self.v.total), V=value)):
            self.totals.append((self.index, value))

    def pair_list(self):
        """Key-value lines over all chunks; values are one number."""
        v, rng = self.v, self.rng
        pairs = []
        per_chunk = -(-self.p.pairs // self.count)
        for index in range(self.count):
            self.chunk, self.index = [v.doc], index
            for _ in range(min(per_chunk, self.p.pairs - len(pairs))):
                i, f = self.new_name()
                name, value = [v.initials[i], v.finals[f]], [rng.pick(v.numbers)]
                if self.add(fill(v.pair, N=name, V=value)):
                    pairs.append((name, Fact(value, "kv", index)))
            self.pad_chunk()
            self.chunks.append(self.chunk)
        questions = [
            Question("kv", fill(v.questions["pair"], N=name), fact.value, [fact.chunk])
            for name, fact in pairs
        ]
        return Context(self.chunks, questions)

    # -- questions -------------------------------------------------------

    def ask(self):
        v, out = self.v, []
        forms = v.questions
        for person in self.people:
            for index, fact in sorted(person.facts.items()):
                attribute = v.attributes[index]
                task = fact.kind
                if attribute.label == "motto" and task == "hop1":
                    task = "copy"
                elif attribute.label == "motto" and task.startswith("coref"):
                    task = "copyref"
                question = fill(forms["attribute"], X=[attribute.name], N=person.name)
                out.append(Question(task, question, fact.value, [fact.chunk]))
            for relation, (other, kind, chunk) in sorted(person.relations.items()):
                question = fill(forms["attribute"], X=[relation], N=person.name)
                out.append(Question(kind, question, other.name, [chunk]))
                for index, fact in sorted(other.facts.items()):
                    if kind == "hop1" and fact.kind == "hop1" and fact.chunk != chunk:
                        attribute = v.attributes[index]
                        if attribute.label == "motto":
                            continue
                        question = fill(forms["hop2"], X=[attribute.name], R=[relation], N=person.name)
                        out.append(Question("hop2", question, fact.value, [chunk, fact.chunk]))
        for town, facts in self.towns.items():
            for index, fact in sorted(facts.items()):
                question = fill(forms["town"], X=[v.town_attributes[index].name], N=list(town))
                out.append(Question("coref2", question, fact.value, [fact.chunk]))
        for key, fact in self.needles.items():
            question = fill(forms["needle"], K=list(key))
            out.append(Question("needle", question, fact.value, [fact.chunk]))
        for chunk, value in self.totals:
            out.append(Question("ordinal", fill(forms["ordinal"], D=[v.ordinals[chunk]]), value, [chunk]))
        if len(self.totals) >= 2:
            for _ in range(len(self.totals)):
                a, b = self.rng.below(len(self.totals)), self.rng.below(len(self.totals))
                (ca, va), (cb, vb) = self.totals[a], self.totals[b]
                larger = self.rng.chance(500)
                if va == vb:
                    continue
                value = (max if larger else min)(va, vb)
                form = forms["larger" if larger else "smaller"]
                question = fill(form, D=[v.ordinals[ca]], E=[v.ordinals[cb]])
                out.append(Question("compare", question, value, sorted([ca, cb])))
        return out


def prompt(vocabulary, question):
    """`<q> ... ? <a>`: what follows the context."""
    return [vocabulary.question, *question, vocabulary.answer]


def mix(seed, index):
    """The seed of sample `index` of a stream."""
    return Rng((seed * 0xD1342543DE82EF95 + index) & MASK).next()


def load(path=SPEC_PATH):
    return Vocabulary(json.loads(path.read_text()))


def sample(vocabulary, profile, chunks, chunk_tokens, seed, test):
    """A context, with every question that can be asked about it."""
    return Builder(vocabulary, profile, chunks, chunk_tokens, Rng(seed), test).build()


def evaluation(vocabulary, task, chunks, chunk_tokens, seed, index, test=True):
    """Context number `index` of a task, with that task's questions in random order.

    Contexts without such a question are passed over.
    """
    profile = Profile(**task.profile)
    if task.fill:
        profile.pairs = chunks * pairs_that_fit(vocabulary, chunk_tokens)
    for attempt in range(ATTEMPTS):
        rng = Rng(mix(mix(seed, index), attempt))
        context = Builder(vocabulary, profile, chunks, chunk_tokens, rng, test).build()
        context.questions = [q for q in context.questions if q.task in task.kinds]
        if context.questions:
            rng.shuffle(context.questions)
            return context
    raise ValueError(f"no context of {chunks} chunks of {chunk_tokens} tokens has a {task.name} question")


def pairs_that_fit(vocabulary, chunk_tokens):
    """Key-value lines of one chunk, whose rest can still be filled."""
    length = len(fill(vocabulary.pair, N=[0, 0], V=[0]))
    count = (chunk_tokens - 1) // length
    left = chunk_tokens - 1 - count * length
    return count - 1 if 0 < left < MIN_FILLER else count


def line(vocabulary, task, test, seed, index, context):
    """One context as a line of JSON."""
    questions = [
        {
            "kind": q.task,
            "chunks": q.chunks,
            "question": q.question,
            "answer": q.answer,
            "prompt_text": vocabulary.text(prompt(vocabulary, q.question)),
            "answer_text": vocabulary.text(q.answer),
        }
        for q in context.questions
    ]
    fields = {
        "task": task,
        "split": "test" if test else "train",
        "seed": seed,
        "index": index,
        "chunks": context.chunks,
        "questions": questions,
    }
    return json.dumps(fields, separators=(",", ":")) + "\n"


# Profiles of the vectors, besides those of the tasks: what training uses.
VECTOR_PROFILES = [
    {},
    {"pairs": 14, "lookalike": 0},
    {"persons": 1, "facts_min": 1, "facts_max": 2, "attributes": 2, "relation": 50, "continuation": 100,
     "total": 0, "needles": 60, "alias": 0, "update": 40, "name_again": 600, "filler": 0, "lookalike": 80},
    {"persons": 2, "facts_min": 1, "facts_max": 3, "attributes": 4, "relation": 250, "continuation": 350,
     "total": 150, "needles": 80, "name_again": 400, "filler": 30},
    {"persons": 1, "facts_min": 1, "facts_max": 2, "attributes": 6, "relation": 300, "continuation": 100,
     "role": 500, "alias": 500, "total": 100, "needles": 30, "filler": 30},
    {"persons": 1, "facts_min": 1, "facts_max": 1, "attributes": 4, "relation": 700, "continuation": 100,
     "total": 1000, "needles": 50, "filler": 30},
    {"town": 1000, "continuation": 700, "lookalike": 1000, "update": 300, "filler": 300},
]
# (chunks, tokens of each)
VECTOR_SIZES = [(4, 48), (8, 64), (6, 100), (16, 128)]
SAMPLE_SIZES = [(1, 5), (2, 16), (4, 24), (5, 44), (8, 64), (3, 256)]
VECTOR_COUNT = 6


def vectors(vocabulary):
    """CRC-32 of lines of both splits, by task and by profile."""
    entries = []

    def add(task, profile, size, test, make):
        seed = len(entries) + 1
        crc = 0
        for index in range(VECTOR_COUNT):
            text = line(vocabulary, task, test, seed, index, make(seed, index))
            crc = zlib.crc32(text.encode(), crc)
        split = "test" if test else "train"
        entries.append({"task": task, "profile": profile, "chunks": size[0], "size": size[1], "split": split,
                        "seed": seed, "count": VECTOR_COUNT, "crc32": crc})

    for test in (False, True):
        for task in vocabulary.tasks.values():
            for size in VECTOR_SIZES:
                add(task.name, None, size, test,
                    lambda seed, index: evaluation(vocabulary, task, *size, seed, index, test))
        for overrides in VECTOR_PROFILES:
            for size in SAMPLE_SIZES:
                profile = Profile(**overrides)
                add("sample", overrides, size, test,
                    lambda seed, index: sample(vocabulary, profile, *size, mix(seed, index), test))
    return entries


def main():
    v = load()
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", choices=list(v.tasks))
    what.add_argument("--profile", type=json.loads, help="as JSON; what is left out has its default")
    what.add_argument("--vectors", action="store_true", help="write vectors.json")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="tokens of a chunk")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=1, help="contexts")
    parser.add_argument("--split", choices=["train", "test"], default="test")
    arguments = parser.parse_args()
    if arguments.vectors:
        rows = ",\n".join(json.dumps(entry) for entry in vectors(v))
        SPEC_PATH.with_name("vectors.json").write_text(f"[\n{rows}\n]\n")
        return
    try:
        write_lines(v, arguments)
    except ValueError as error:
        parser.exit(1, f"Error: {error}\n")


def write_lines(v, arguments):
    chunks, size, seed = arguments.chunks, arguments.size, arguments.seed
    name, test = arguments.task or "sample", arguments.split == "test"
    for index in range(arguments.count):
        if arguments.task:
            context = evaluation(v, v.tasks[name], chunks, size, seed, index, test)
        else:
            context = sample(v, Profile(**arguments.profile), chunks, size, mix(seed, index), test)
        sys.stdout.write(line(v, name, test, seed, index, context))


if __name__ == "__main__":
    main()
