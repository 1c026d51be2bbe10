"""What people ask of a long text, as tasks with known answers, in the manner of RULER (Hsieh et al. 2024).

`evaluate.py tasks` and `evaluate.py lost` ask them.  The haystack is natural text that is on any machine,
CPython's language reference and library, begun elsewhere for each sample.

    one, values, keys    one of eight hidden numbers; four of one thing; four of eight things
    trace                which variables have a value, through a chain of assignments
    copy                 a hidden code of 32 digits
    words                the three made-up words that come most often
    passage              how a sentence of the text itself goes on
    constant, signature  of a long program: what a name is set to, what arguments a function takes
"""

from __future__ import annotations

import bisect
import itertools
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from model import Tokenizer

OPENING = (
    "Facts are hidden in the following text. Memorize them: you will be asked about them at the end.\n\n"
)
THINGS = "lantern harbor violin glacier pepper castle meadow copper saddle orchid anchor tunnel".split()
CODED = "zorvak melipso brundel quaxit ferolin talvic".split()


class Sample(NamedTuple):
    """A prompt; texts of which each that appears in the continuation counts; tokens to write at most."""

    prompt: str
    answers: list[str]
    room: int


class Plan(NamedTuple):
    """What is hidden in a text, each at a random place, and what stands at its end."""

    needles: list[str]
    end: str
    answers: list[str]
    room: int


def number_of(thing: str, number: str) -> str:
    return f"One of the special magic numbers for {thing} is: {number}."


def digits(dice: random.Random, count: int = 7) -> str:
    return str(dice.randrange(10 ** (count - 1), 10**count))


def one(dice: random.Random, body: list[str]) -> Plan:
    pairs = [(thing, digits(dice)) for thing in dice.sample(THINGS, 8)]
    thing, number = dice.choice(pairs)
    end = (
        f"What is the special magic number for {thing} in the text?\nThe special magic number for {thing} is:"
    )
    return Plan([number_of(*pair) for pair in pairs], end, [number], 16)


def values(dice: random.Random, body: list[str]) -> Plan:
    thing, numbers = dice.choice(THINGS), [digits(dice) for _ in range(4)]
    end = (
        f"What are all the special magic numbers for {thing} mentioned in the text?\n"
        f"The four special magic numbers for {thing} mentioned in the text are:"
    )
    return Plan([number_of(thing, number) for number in numbers], end, numbers, 60)


def keys(dice: random.Random, body: list[str]) -> Plan:
    pairs = [(thing, digits(dice)) for thing in dice.sample(THINGS, 8)]
    asked = dice.sample(pairs, 4)
    names = ", ".join(thing for thing, _ in asked)
    end = (
        f"What are the special magic numbers for {names} mentioned in the text?\n"
        f"The special magic numbers for {names} mentioned in the text are, in this order:"
    )
    return Plan([number_of(*pair) for pair in pairs], end, [number for _, number in asked], 80)


def trace(dice: random.Random, body: list[str]) -> Plan:
    names = ["".join(dice.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(5)) for _ in range(8)]
    value, other = digits(dice, 5), digits(dice, 5)
    lines = [
        f"VAR {names[0]} = {value}",
        *(f"VAR {b} = VAR {a}" for a, b in zip(names[:3], names[1:4], strict=True)),
    ]
    lines += [
        f"VAR {names[4]} = {other}",
        *(f"VAR {b} = VAR {a}" for a, b in zip(names[4:7], names[5:8], strict=True)),
    ]
    end = (
        f"Which four variables are assigned the value {value} in the text, directly or through others?\n"
        f"The four variables that are assigned the value {value} are:"
    )
    return Plan(lines, end, names[:4], 60)


def copy(dice: random.Random, body: list[str]) -> Plan:
    code = "-".join(digits(dice, 4) for _ in range(8))
    end = "What is the activation code mentioned in the text? Copy it exactly.\nThe activation code is:"
    return Plan([f"The activation code is: {code}."], end, code.split("-"), 60)


def words(dice: random.Random, body: list[str]) -> Plan:
    coded = dice.sample(CODED, 6)
    hidden = [word for word in coded[:3] for _ in range(12)] + [word for word in coded[3:] for _ in range(3)]
    end = (
        f"Of the made-up words {', '.join(sorted(coded))}, which three appear most often in the text?\n"
        "The three made-up words that appear most often are:"
    )
    return Plan([word + "." for word in hidden], end, coded[:3], 24)


def passage(dice: random.Random, body: list[str]) -> Plan:
    text = " ".join(" ".join(body).split())
    sentences = [s.split() for s in re.findall(r"(?<=\. )[A-Z][^.:*`\"]{120,240}\.(?= )", text)]
    sentence = dice.choice([s for s in sentences if text.count(" ".join(s[:8])) == 1 and len(s) > 16])
    begun = " ".join(sentence[:8])
    end = f'One sentence of the text begins with "{begun}". Copy it.\n"{begun}'
    return Plan([], end, [" ".join(sentence[8:11]), " ".join(sentence[11:14])], 32)


def constant(dice: random.Random, body: list[str]) -> Plan:
    text = "\n".join(body)
    found = re.findall(r"^([A-Za-z_]\w{3,}) = ([\w'\"./x -]{2,24})$", text, re.MULTILINE)
    count = Counter(name for name, _ in found)
    found = [pair for pair in found if count[pair[0]] == 1 and pair[1] not in ("True", "None", "False")]
    name, value = dice.choice(found)
    return Plan(
        [], f"# A constant of the program above, as it is defined there:\n{name} =", [f" {value}\n"], 24
    )


def signature(dice: random.Random, body: list[str]) -> Plan:
    text = "\n".join(body)
    found = re.findall(r"^ *def ([a-z]\w{4,})\(([^()\n]{12,70})\):$", text, re.MULTILINE)
    count = Counter(name for name, _ in found)
    name, value = dice.choice([pair for pair in found if count[pair[0]] == 1])
    end = f"# The signature of a function of the program above, as it is defined there:\ndef {name}("
    return Plan([], end, [value + "):"], 40)


TASKS: dict[str, Callable] = {
    "one": one,
    "values": values,
    "keys": keys,
    "trace": trace,
    "copy": copy,
    "words": words,
    "passage": passage,
    "constant": constant,
    "signature": signature,
}
OF_CODE = ("constant", "signature")


def haystack(code: bool, dice: random.Random) -> list[str]:
    """Natural text, begun somewhere: paragraphs of the language reference, or lines of library modules."""
    if code:
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        files = [file for file in files if 4_000 < file.stat().st_size < 120_000]
        return [x for file in dice.sample(files, 12) for x in file.read_text(encoding="utf-8").splitlines()]
    text = [p.strip() for topic in topics.values() for p in topic.split("\n\n") if len(p.strip()) > 40]
    start = dice.randrange(len(text))
    return text[start:] + text[:start]


def sample(name: str, tokenizer: Tokenizer, tokens: int, seed: int) -> Sample:
    """A prompt of a task, of nearly `tokens` tokens.  ValueError where there is no room for it."""
    code = name in OF_CODE
    between, opening = ("\n", "") if code else ("\n\n", OPENING)
    for attempt in range(100):
        dice = random.Random(f"{name} {seed} {attempt}")
        text = haystack(code, dice)
        lengths = itertools.accumulate(len(tokenizer.encode(part + between)) for part in text)
        count = bisect.bisect([*itertools.takewhile(lambda length: length <= tokens, lengths)], tokens)
        state = dice.getstate()
        while count > 0:  # parts of the text, as many as leave room for needles and question
            dice.setstate(state)
            body = text[:count]
            try:
                plan = TASKS[name](dice, body)
            except IndexError:  # there is nothing to ask for in this text
                break
            for needle in plan.needles:
                body.insert(dice.randint(0, len(body)), needle)
            prompt = opening + between.join(body) + "\n\n" + plan.end
            if len(tokenizer.encode(prompt)) <= tokens:
                return Sample(prompt, plan.answers, plan.room)
            count -= max(1, count // 100)
    raise ValueError(f"the task {name} needs more than {tokens} tokens")


def score(sample: Sample, said: str) -> float:
    """Share of the answers that were found, 0 to 1."""
    return sum(answer in said + "\n" for answer in sample.answers) / len(sample.answers)
