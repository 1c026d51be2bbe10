"""Measure what HiP costs in quality on the real model, and what each of its parts contributes.

    python extras/evaluate.py perplexity --tokens 8192       # of CPython's language reference, by position
    python extras/evaluate.py decoding --tokens 8192         # the same of its last tokens, read one at a time
    python extras/evaluate.py passkey --tokens 4000 8000     # length x depth, and a heat map
    python extras/evaluate.py needles --tokens 4000 8000     # several, asked for late, changed since
    python extras/evaluate.py coverage --tokens 8192         # recall and attention mass, by layer and head
    python extras/evaluate.py tasks --tokens 4000 8000       # nine, of natural text, beside dense attention
    python extras/evaluate.py lost --tasks keys              # where answers are lost: prompt or decoding
    python extras/evaluate.py perplexity --sweep             # hip with other settings; or --sweep top_k

    # past the trained length: four ways in one table
    python extras/evaluate.py perplexity --tokens 16384 32768 \\
        --methods dense dense-ntk streaming:rope_clip=768 hip:rope_clip=4096

Prints Markdown tables, or --json.  Each result is kept in --out as soon as it is there, so that a command
goes on where it was interrupted.

Methods: dense; hip; paper, its own settings; bare, those in blocks of 16; streaming, sink and window alone;
random and oracle, random and the exact best blocks; snapshot, no search while decoding; no-memory; no-tail;
dense-ntk and hip-ntk, with rotary frequencies stretched to the length.  `hip:score=max,top_k=512` is one of
them with other fields of HiPConfig, and `hip/dense` reads the prompt by the one and decodes by the other.

`tasks` and `lost` ask what people ask of a long text, in the manner of RULER (Hsieh et al. 2024), in natural
text that is on any machine, CPython's language reference and library, begun elsewhere for each sample:

    one, values, keys    one of eight hidden numbers; four of one thing; four of eight things
    trace                which variables have a value, through a chain of assignments
    copy                 a hidden code of 32 digits
    words                the three made-up words that come most often
    passage              how a sentence of the text itself goes on
    constant, signature  of a long program: what a name is set to, what arguments a function takes
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import measuring
import torch
import torch.nn.functional as F
from measuring import OutOfTime, kernels_for, positive, read, table
from tqdm import tqdm

import hip
from generate import FILLER, NEEDLE, OPENING, QUESTION
from hip import HiPConfig, Selection
from model import Context, Llama, Tokenizer, generate, load

TEXT_START = 20_000  # tokens of the text that are skipped
ROWS = HiPConfig().block_q  # queries of a sample of `coverage`: one query block

# --- methods -----------------------------------------------------------------------------------------------


class Method(NamedTuple):
    """A way to attend: Context's method, fields of HiPConfig, and what stands in for the search."""

    attention: str = "hip"
    fields: dict = {}
    select: Callable | None = None  # (kernels, q, k, cfg, previous) -> Selection
    ntk: bool = False  # rotary frequencies stretched to the length


def at_random(kernels: ModuleType, q, k, cfg, previous=None, **more) -> Selection:
    return hip.random_blocks(q, k, cfg)


def exactly(kernels: ModuleType, q, k, cfg, previous=None, **more) -> Selection:
    return hip.oracle_blocks(q, k, cfg, **more)


def from_memory(kernels: ModuleType, q, k, cfg, previous=None, *, rope=None) -> Selection:
    """Decoding: the best of what the prompt's end chose, for ever.  In a prompt: the search."""
    if previous is None:
        return kernels.select_blocks(q, k, cfg, rope=rope)
    keys, blocks = hip.source(q, (k,), cfg, None, rope), previous.blocks
    hi = hip.domain(q.shape[2], k.shape[2], cfg, q.device)[1]
    groups = q.unflatten(1, (blocks.shape[1], -1))  # (B, S, H / S, rows, D)
    ((_, x),) = hip.query_blocks(groups, keys, hi, cfg, None)
    old, seen = blocks.long().where(blocks >= 0, hip.NO_BLOCK), hip.seen_anyway(x, keys, cfg)
    scores = hip.score_blocks(x, keys.thin(cfg.stride_k, copy=False), seen, cfg, old)
    return Selection(hip.best_of(old, scores, cfg.budget).int(), hi * cfg.block_k)


PAPER = dict(top_k=512, score="max", per_head=True, early_factor=1, dense_tail=0, memory=False)
METHODS = {  # a new method is a line here
    "dense": Method("dense"),
    "hip": Method(),
    "paper": Method(fields=PAPER | dict(block_k=2, stride_k=1, dense_layers=3)),
    "bare": Method(fields=PAPER | dict(block_k=16, stride_k=2)),  # the paper's search in blocks of 16
    "streaming": Method("streaming"),
    "random": Method(select=at_random),
    "oracle": Method(select=exactly),
    "snapshot": Method(select=from_memory),  # memory without search: decoding keeps to the tail's snapshot
    # more, by name only
    "no-memory": Method(fields=dict(memory=False)),
    "no-tail": Method(fields=dict(dense_tail=0)),
    "dense-ntk": Method("dense", ntk=True),
    "hip-ntk": Method(ntk=True),
}
DEFAULT = list(METHODS)[:8]
LOST = ["dense", "hip", "hip/dense", "dense/hip", "hip/oracle", "oracle/hip", "oracle"]
SWEEP = dict(
    top_k=(512, 1024, 4096), block_q=(16, 32, 128), block_k=(8, 16), stride_q=(1, 4, 8), stride_k=(1, 2, 8)
)
SWEEP |= dict(score=("max",), per_head=(True,), representative=("first", "last"))
SWEEP |= dict(refresh_interval=(1, 4, 16), early_factor=(1, 2), dense_tail=(0, 16))
IDLE = {  # where a field shows nothing: a refresh in a prompt, a dense tail there or in one query block
    "perplexity": ("refresh_interval", "dense_tail"),
    "coverage": ("refresh_interval", "dense_tail", "block_q"),
}


def resolve(name: str, base: HiPConfig) -> list[tuple[Method, HiPConfig]]:
    """What "hip:score=max,top_k=512" stands for; of "hip/dense" what each half does."""
    halves = []
    for half in name.split("/"):
        kind, _, items = half.partition(":")
        if kind not in METHODS:
            raise ValueError(f"a method must be one of {', '.join(METHODS)}, not {kind!r}")
        cfg = replace(base, **METHODS[kind].fields)
        halves.append((METHODS[kind], measuring.configure(cfg, items.split(",") if items else [])))
    simple = all(method.attention != "streaming" and not method.ntk for method, _ in halves)
    if len(halves) > 1 and not (len(halves) == 2 and simple):
        raise ValueError(f"a method of halves must be two, each dense or by HiP, not {name!r}")
    return halves


class Halved(Context):
    """Reads a prompt with one config and one kernels module, and decodes with others."""

    halves: list[tuple[HiPConfig, ModuleType]]

    def prefill(self, tokens: torch.Tensor, **more) -> torch.Tensor:
        cfg, self.kernels = self.halves[0]
        self.configure(cfg)
        return super().prefill(tokens, **more)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        cfg, self.kernels = self.halves[1]
        self.configure(cfg)
        return super().decode(tokens)


def open_context(model: Llama, name: str, base: HiPConfig, capacity: int) -> Context:
    """An empty context that attends by the method."""
    torch.manual_seed(0)  # of the random blocks
    resolved, halves = resolve(name, base), []
    for (method, cfg), (_, other) in zip(resolved, reversed(resolved), strict=True):
        kernels = kernels_for(model.device.type)
        if method.select:
            select, attend = partial(method.select, kernels), kernels.sparse_attention
            kernels = SimpleNamespace(select_blocks=select, sparse_attention=attend)
        if method.attention == "dense":  # this way a dense prompt leaves its memory to decoding by HiP
            cfg = replace(other, dense_layers=model.config.layers)
        halves.append((cfg, kernels))
    if len(halves) == 1:
        model = measuring.stretched(model, capacity) if method.ntk else model
        return Context(model, capacity, cfg, method.attention, kernels)
    context = Halved(model, capacity, halves[0][0])
    context.halves = halves
    return context


# --- perplexity --------------------------------------------------------------------------------------------


def losses(context: Context, tokens: list[int], one_by_one: int, seconds: float) -> torch.Tensor:
    """Loss of every token but the first, (T - 1,); the last `one_by_one` are read by decoding."""
    text, body = torch.tensor([tokens], device=context.model.device), len(tokens) - one_by_one
    hidden = [read(context, text[:, :body], seconds)]
    hidden = torch.cat(hidden + [context.decode(text[:, i : i + 1]) for i in range(body, text.shape[1])], 1)
    pairs = zip(hidden[0, :-1].split(1024), text[0, 1:].split(1024), strict=True)
    return torch.cat([F.cross_entropy(context.model.logits(h), t, reduction="none").cpu() for h, t in pairs])


def perplexity(context: Context, text: list[int], options: argparse.Namespace) -> dict:
    """exp of the mean loss: of the whole text and of its segments, or of the last tokens alone."""
    if options.measure == "decoding":
        loss = losses(context, text, options.steps, options.seconds)[-options.steps :]
        return {"perplexity": float(loss.mean().exp())}
    loss = F.pad(losses(context, text, 0, options.seconds), (1, 0), value=math.nan)  # (T,)
    return {
        "perplexity": float(loss.nanmean().exp()),
        "segments": [float(x.nanmean().exp()) for x in loss.split(options.segment)],
    }


# --- needles -----------------------------------------------------------------------------------------------

# wordings that dense attention solves at 4,000 tokens, `several` nearly: with names of persons, ordinals
# or things instead of cities this small model confuses them more
CITIES = ("Paris", "London", "Tokyo")
NUMBER = (
    "\nThe special magic number of {city} is {key}. Remember it. "
    "{key} is the special magic number of {city}.\n"
)
CHANGE = (
    "\nThe special magic number of {city} has changed. It is now {key}. Remember it. "
    "{key} is now the special magic number of {city}.\n"
)
ASK = "\n\nWhat is the special magic number of {city}{now}? The special magic number of {city}{now} is"
OTHER = "\n\nWhat color is the sky? The sky is"
ANSWER = 8  # tokens in which the five digits must come


class Needle(NamedTuple):
    """What is hidden in a prompt, and what is asked about it."""

    needles: list[tuple[float, str]]  # depth and text
    end: str  # of the prompt
    turns: list[tuple[int, str, str]]  # tokens that the model writes before, question, answer


def passkey(depth: float, a: str, b: str, c: str) -> Needle:
    """One needle, asked for at the end of the prompt: what `generate.py --make-passkey` makes."""
    return Needle([(depth, NEEDLE.format(key=a))], QUESTION, [(0, "", a)])


def several(depth: float, a: str, b: str, c: str) -> Needle:
    """Three needles, asked for one after another."""
    needles = [NUMBER.format(city=city, key=key) for city, key in zip(CITIES, (a, b, c), strict=True)]
    ask = [ASK.format(city=city, now="") for city in CITIES]
    return Needle(
        [((depth + i / 3) % 1, needle) for i, needle in enumerate(needles)],
        ask[0],
        [(0, "", a), (0, "." + ask[1], b), (0, "." + ask[2], c)],
    )


def late(depth: float, a: str, b: str, c: str) -> Needle:
    """A needle asked for when other text has been written, so that the prompt's tail cannot know of it."""
    return Needle([(depth, NEEDLE.format(key=a))], OTHER, [(16, QUESTION, a)])


def changed(depth: float, a: str, b: str, c: str) -> Needle:
    """A value that changes; the last one counts."""
    needles = [(depth / 2, NUMBER.format(city="Paris", key=a)), (depth, CHANGE.format(city="Paris", key=b))]
    return Needle(needles, ASK.format(city="Paris", now=" now"), [(0, "", b)])


NEEDLES = {"passkey": passkey, "several": several, "late": late, "changed": changed}


def in_filler(tokenizer: Tokenizer, tokens: int, task: Needle) -> list[int]:
    """A prompt of `tokens` tokens, or a few less: the needles in as much filler as fits."""

    def prompt(sentences: int) -> list[int]:
        text = [FILLER[i % len(FILLER)] for i in range(sentences)]
        for depth, needle in sorted(task.needles, reverse=True):  # from the end, or places would move
            text.insert(round(depth * sentences), needle)
        return tokenizer.encode(OPENING + " ".join(text) + task.end)

    if len(prompt(0)) > tokens:
        raise ValueError(f"--tokens must be at least {len(prompt(0))} for this task, not {tokens}")
    return prompt(bisect.bisect(range(tokens), False, key=lambda n: len(prompt(n)) > tokens) - 1)


def write(
    context: Context, hidden: torch.Tensor, tokenizer: Tokenizer, count: int, until: str = ""
) -> tuple[str, torch.Tensor]:
    """Continue greedily by `count` tokens, or up to a text: (what was written, hidden state)."""
    ids, text = [], ""
    while len(ids) < count and not (until and until in text):
        ids.append(int(context.model.logits(hidden[0, -1]).argmax()))
        hidden = context.decode(torch.tensor([ids[-1:]], device=hidden.device))
        text = tokenizer.fast.decode(ids)
    return text, hidden


def find(
    opened: Callable[[int], Context], tokenizer: Tokenizer, tokens: int, case: dict, seconds: float
) -> dict:
    """One case, a trial of a task at a depth: which answers were found, and what was said.

    opened: from a capacity to an empty context.
    """
    dice = random.Random(round(100 * case["depth"]) + tokens + 1000 * case["trial"])
    plan = NEEDLES[case["task"]](case["depth"], *(str(dice.randint(10000, 99999)) for _ in CITIES))
    prompt = torch.tensor([in_filler(tokenizer, tokens, plan)])
    questions = [tokenizer.encode(question) if question else [] for _, question, _ in plan.turns]
    room = sum(map(len, questions)) + sum(free + ANSWER for free, _, _ in plan.turns)
    context, found, said = opened(prompt.shape[1] + room), [], []
    hidden = read(context, prompt.to(context.model.device), seconds)
    for (free, _, answer), question in zip(plan.turns, questions, strict=True):
        _, hidden = write(context, hidden, tokenizer, free)
        for token in question:
            hidden = context.decode(torch.tensor([[token]], device=hidden.device))
        text, hidden = write(context, hidden, tokenizer, ANSWER, answer)
        found.append(answer in text)
        said.append(text)
    return {"found": found, "said": said}


# --- coverage ----------------------------------------------------------------------------------------------


def seen(selection: Selection, cfg: HiPConfig, Tk: int) -> torch.Tensor:
    """Which positions one query block of each search may attend to, but for the causal mask: (S, Tk) bool."""
    chosen, blocks = selection.blocks[0, :, 0].long(), -(-Tk // cfg.block_k)  # (S, M)
    chosen = chosen.where(chosen >= 0, blocks)  # padding goes to a block behind the last
    mask = torch.zeros(len(chosen), blocks + 1, device=chosen.device).scatter(1, chosen, 1).bool()
    mask = mask[:, :blocks].repeat_interleave(cfg.block_k, 1)[:, :Tk]
    mask[:, : cfg.sink_blocks * cfg.block_k] = True
    mask[:, int(selection.window_start[0]) :] = True
    return mask


def weights(q: torch.Tensor, k: torch.Tensor, cfg: HiPConfig, rope: hip.Rope | None = None) -> torch.Tensor:
    """Dense attention of one query block, the mean of its rows: (H, Tk)."""
    (_, H, _, _), (_, Hkv, Tk, _), keys = q.shape, k.shape, hip.source(q, (k,), cfg, None, rope)
    hi = torch.zeros(1, dtype=torch.int64, device=q.device)
    ((_, x),) = hip.query_blocks(q.unflatten(1, (Hkv, -1)), keys, hi, cfg, None)
    every = torch.arange(-(-Tk // cfg.block_k), device=q.device).expand(1, Hkv, 1, -1)
    (b_k,) = hip.gather(x, keys, every, cfg)  # (1, Hkv, 1, any, D)
    s = x.q @ b_k.transpose(3, 4) * x.scale + hip.later(x, every, cfg, torch.float32)
    return s.softmax(-1).view(H, -1, s.shape[4]).mean(1)[:, :Tk]


def mass_of(weight: torch.Tensor, selection: Selection, cfg: HiPConfig) -> torch.Tensor:
    """Share of the attention (H, Tk) of one query block that the selection sees: (H,)."""
    mask = seen(selection, cfg, weight.shape[1])
    # each search serves the query heads of its group
    return (weight * mask.repeat_interleave(len(weight) // len(mask), 0)).sum(1)


def covered(
    q: torch.Tensor, k: torch.Tensor, name: str, base: HiPConfig, weight: torch.Tensor
) -> torch.Tensor:
    """Of one query block: share of the exact best blocks that the method finds, and of the mass.  (2, H)"""
    ((method, cfg),) = resolve(name, base)
    select = kernels_for(q.device.type).select_blocks
    if method.attention == "streaming":  # as Context has it
        cfg = replace(cfg, window=cfg.window + cfg.top_k)
        chosen = hip.no_blocks(q, k.shape, cfg)
    else:
        chosen = (partial(method.select, None) if method.select else select)(q, k, cfg)
    best = hip.oracle_blocks(q, k, cfg).blocks[0, :, 0]  # (S, M)
    found = (best[:, :, None] == chosen.blocks[0, :, :1]).any(-1) & (best >= 0)
    recall = found.sum(1) / (best >= 0).sum(1)
    return torch.stack([recall.repeat_interleave(len(weight) // len(recall)), mass_of(weight, chosen, cfg)])


def coverage(
    model: Llama, text: list[int], names: list[str], base: HiPConfig, options: argparse.Namespace
) -> dict[str, dict]:
    """Recall and mass by method, (layers, heads), the mean over query blocks in the text's second half.

    The text is read densely, so that all methods choose for the same queries out of the same keys.
    """
    context, half = open_context(model, "dense", base, len(text)), len(text) / 2
    totals = {name: torch.zeros(2, model.config.layers, model.config.heads) for name in names}
    at = [int(half * (1 + (i + 0.5) / options.samples)) // ROWS * ROWS for i in range(options.samples)]

    def see(layer: int, q: torch.Tensor, k: torch.Tensor, _v) -> None:
        for p in at:
            b_q, b_k = q[:, :, p : p + ROWS], k[:, :, : p + ROWS]
            weight = weights(b_q, b_k, HiPConfig())
            for name in names:
                totals[name][:, layer] += covered(b_q, b_k, name, base, weight).cpu() / len(at)

    measuring.watch(context, see)
    read(context, torch.tensor([text], device=model.device), options.seconds)
    return {name: {"recall": x[0].tolist(), "mass": x[1].tolist()} for name, x in totals.items()}


# --- tasks: what people ask of a long text -----------------------------------------------------------------

FACTS = "Facts are hidden in the following text. Memorize them: you will be asked about them at the end.\n\n"
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


def natural(code: bool, dice: random.Random) -> list[str]:
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
    between, opening = ("\n", "") if code else ("\n\n", FACTS)
    for attempt in range(100):
        dice = random.Random(f"{name} {seed} {attempt}")
        text = natural(code, dice)
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


def solve(
    opened: Callable, tokenizer: Tokenizer, tokens: int, case: dict, seconds: float, look: bool
) -> dict:
    """One sample of a task: its score, 0 to 1, and what was said.

    look: with whole methods by HiP also the mass that the selection covers, (layers, heads): of the prompt's
    last query block, as if that did not attend densely, and of decoding, the mean over its steps.
    """
    asked = sample(case["task"], tokenizer, tokens, case["seed"])
    prompt = torch.tensor([tokenizer.encode(asked.prompt)])
    context, T = opened(prompt.shape[1] + asked.room), prompt.shape[1]
    rope, c = context.clipped, context.model.config
    masses = {"question": torch.zeros(c.layers, c.heads), "answer": torch.zeros(c.layers, c.heads)}

    def see(layer: int, q: torch.Tensor, k: torch.Tensor, _v) -> None:
        cfg = context.cfgs[layer]
        q, chosen = q[:, :, -cfg.block_q :], context.selection[layer]
        if k.shape[2] == T:
            chosen = context.kernels.select_blocks(q, k, cfg, rope=rope)
        if k.shape[2] >= T:
            dense, part = layer < cfg.dense_layers, "question" if k.shape[2] == T else "answer"
            masses[part][layer] += 1 if dense else mass_of(weights(q, k, cfg, rope), chosen, cfg).cpu()

    if look := look and context.method == "hip" and not isinstance(context, Halved):
        measuring.watch(context, see)
    hidden = read(context, prompt.to(context.model.device), seconds)
    said = tokenizer.fast.decode([*generate(context, hidden, asked.room, tokenizer.eos)])
    masses["answer"] /= context.steps
    more = {"mass": {name: x.tolist() for name, x in masses.items()}} if look else {}
    return {"score": score(asked, said), "said": said} | more


# --- tables and pictures -----------------------------------------------------------------------------------


def show_perplexity(records: dict, options: argparse.Namespace) -> None:
    """A row for each length and method, a column for each segment of the text."""
    head = [f"perplexity of the last {options.steps}"]
    if options.measure == "perplexity":
        head = ["perplexity", *(f"from {i:,}" for i in range(0, max(options.tokens), options.segment))]
    rows = []
    for (tokens, name), record in records.items():
        numbers = (record.get("perplexity"), *record.get("segments", []))
        cells = [f"{x:.3f}" for x in numbers if x is not None] or ["not run"]
        cells += [None] * (len(head) - len(cells))
        rows.append([f"{tokens:,}", name, *cells, round(record["seconds"])])
    print(table(["tokens", "method", *head, "s"], rows))


def show_needles(records: dict, options: argparse.Namespace) -> None:
    """Share of the answers found and, depth by depth, whether all (x), some (o) or none (-) were."""

    def shares(tokens: int, name: str, task: str) -> list[float]:
        """Of each depth."""
        runs = {x: [records[tokens, name, task, x, i] for i in range(options.trials)] for x in options.depths}
        return [fmean(fmean(run.get("found", [math.nan])) for run in trials) for trials in runs.values()]

    rows = []
    for tokens, name in itertools.product(options.tokens, options.methods):
        by_depth = {task: shares(tokens, name, task) for task in options.tasks}
        mean = {task: fmean(x) for task, x in by_depth.items()}
        marks = {task: "".join({0: "-", 1: "x"}.get(x, "o") for x in each) for task, each in by_depth.items()}
        cells = ["not run" if math.isnan(x) else f"{x:.2f} {marks[task]}" for task, x in mean.items()]
        ran = {task: x for task, x in mean.items() if not math.isnan(x)}
        if ran:
            worst = min(ran, key=ran.get)
            cells += [f"{fmean(ran.values()):.2f}", f"{ran[worst]:.2f} ({worst})"]
        rows.append([f"{tokens:,}", name, *cells, *[None] * (2 + len(mean) - len(cells))])
    print(table(["tokens", "method", *options.tasks, "mean", "worst task"], rows))
    print("\ndepths:", *options.depths)
    for task in options.tasks:
        panels = {name: [shares(tokens, name, task) for tokens in options.tokens] for name in options.methods}
        panels = {name: [list(column) for column in zip(*rows, strict=True)] for name, rows in panels.items()}
        title = f"{task}: share of the answers found"
        axes = ("tokens", options.tokens), ("depth", options.depths)
        draw(f"{options.out}/{task}.png", title, panels, *axes)


def show_coverage(records: dict, options: argparse.Namespace) -> None:
    """Mean, worst layer and worst head of each method, then the mass by layer."""
    for tokens in options.tokens:
        results = {
            name: (torch.tensor(x["recall"]), torch.tensor(x["mass"]))  # (layers, heads) both
            for (T, name), x in records.items()
            if T == tokens and "mass" in x
        }
        if not results:
            print(f"\n{tokens:,} tokens: not run")
            continue
        rows = []
        for name, (recall, mass) in results.items():
            worst = [f"{x.mean(1).min():.3f} (layer {int(x.mean(1).argmin())})" for x in (recall, mass)]
            layer, head = divmod(int(mass.argmin()), mass.shape[1])
            cells = [f"{recall.mean():.3f}", worst[0], f"{mass.mean():.3f}", worst[1]]
            rows.append([name, *cells, f"{mass.min():.3f} (layer {layer}, head {head})"])
        print(f"\n{tokens:,} tokens\n")
        print(table(["method", "recall", "worst layer", "mass", "worst layer", "worst head"], rows))
        masses = {name: mass for name, (_, mass) in results.items()}
        show_mass(f"{options.out}/coverage-{tokens}.png", f"{tokens:,} tokens", masses)
        if {"hip", "random"} <= masses.keys():
            more = int((masses["hip"].mean(1) > masses["random"].mean(1)).sum())
            print(f"\nhip covers more mass than random blocks in {more} of {len(mass)} layers")


def show_mass(path: str, title: str, masses: dict[str, torch.Tensor]) -> None:
    """Mass (layers, heads): its mean and worst head by layer, and a picture."""
    layers, heads = next(iter(masses.values())).shape
    rows = [[i, *(f"{x[i].mean():.3f} ({x[i].min():.3f})" for x in masses.values())] for i in range(layers)]
    print("\n" + table(["mass of layer (worst head)", *masses], rows))
    panels, axes = {name: x.tolist() for name, x in masses.items()}, [("head", heads), ("layer", layers)]
    draw(path, f"attention mass covered, {title}", panels, *((name, range(n)) for name, n in axes))


def points(records: dict, options: argparse.Namespace) -> dict:
    """Of each length, method and task the sum over the samples; nan where one was given up."""
    found = dict.fromkeys(itertools.product(options.tokens, options.methods, options.tasks), 0.0)
    for (*key, _), record in records.items():
        found[tuple(key)] += record.get("score", math.nan)
    return found


def shown(x: float) -> str:
    return "not run" if math.isnan(x) else f"{x:.3g}"


def show_tasks(records: dict, options: argparse.Namespace) -> None:
    """A row for each task, a column for each length and method, with dense attention's own points beside."""
    found, columns = points(records, options), []
    names = [name for name in options.methods if name != "dense"] or ["dense"]
    beside, half = names != options.methods, options.samples / 2
    for tokens, name in itertools.product(options.tokens, names):
        cells, ours, dense = [], 0.0, 0.0
        for task in options.tasks:
            x, y = found[tokens, name, task], found.get((tokens, "dense", task), math.nan)
            cell = f"{shown(x)} / {shown(y)}" if beside else shown(x)
            cells.append(f"({cell})" if beside and not y >= half else cell)
            if y >= half and not math.isnan(x):
                ours, dense = ours + x, dense + y
        columns.append([f"{tokens:,}, {name}", *cells, f"{ours / dense:.0%}" if dense else None])
    head, *rows = zip([f"points of {options.samples}", *options.tasks, "of dense"], *columns, strict=True)
    print(table(head, rows if beside else rows[:-1]))
    if beside:
        print("\nmethod / dense; in brackets, and not in the last row, where dense finds less than half")
    panels = {
        name: [[found[tokens, name, x] / options.samples for tokens in options.tokens] for x in options.tasks]
        for name in options.methods
    }
    axes = ("tokens", options.tokens), ("task", options.tasks)
    draw(f"{options.out}/tasks.png", "share of the answers found", panels, *axes)


def show_lost(records: dict, options: argparse.Namespace) -> None:
    """Points by what read the prompt and what decoded; then the attention mass that whole methods cover."""
    found, columns = points(records, options), list(itertools.product(options.tokens, options.tasks))
    rows = [[name, *(shown(found[T, name, task]) for T, task in columns)] for name in options.methods]
    print(table([f"points of {options.samples}", *(f"{T:,}, {task}" for T, task in columns)], rows))
    print("\nA/B: the prompt by A, decoding by B.  oracle: at each search the exact best blocks")
    print("\nquestion: the prompt's end, as if that did not attend densely.  answer: decoding")
    for tokens in options.tokens:
        masses: dict[str, list] = {}
        for (T, name, *_), record in records.items():
            for part, x in record.get("mass", {}).items() if T == tokens else ():
                masses.setdefault(f"{name}, {part}", []).append(torch.tensor(x))
        if masses:
            means = {name: torch.stack(x).nanmean(0) for name, x in masses.items()}
            show_mass(f"{options.out}/lost-{tokens}.png", f"{tokens:,} tokens", means)


def draw(path: str, title: str, panels: dict[str, list], x: tuple[str, list], y: tuple[str, list]) -> None:
    """Heat maps, white 0 and grey 1, with the numbers in them."""
    plt, across = measuring.pyplot(), min(4, len(panels))
    down = -(-len(panels) // across)
    width, height = max(2.2, 0.4 * len(x[1])), max(2.0, 0.25 * len(y[1]) + 0.7)
    figure, axes = plt.subplots(
        down, across, figsize=(width * across + 1, height * down + 0.5), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (name, grid) in zip(axes.flat, panels.items(), strict=False):
        axis.imshow(grid, cmap="Greys", vmin=0, vmax=1.5, aspect="auto")  # 1.5: black text stays readable
        axis.set_title(name, fontsize=8)
        axis.set(xlabel=x[0], ylabel=y[0])
        axis.set_xticks(range(len(x[1])), [f"{value:,}" for value in x[1]], fontsize=7)
        axis.set_yticks(range(len(y[1])), map(str, y[1]), fontsize=7)
        for i, j in itertools.product(range(len(y[1])), range(len(x[1]))):
            text = "not run" if math.isnan(grid[i][j]) else f"{grid[i][j]:.2g}"
            axis.text(j, i, text, ha="center", va="center", fontsize=6)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}", file=sys.stderr)


# --- the command -------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    parser = measuring.Parser(description=__doc__)
    measuring.common_options(parser)
    add = parser.add_argument
    kinds = ("perplexity", "decoding", "passkey", "needles", "coverage", "tasks", "lost")
    add("measure", choices=kinds, help="what to measure, as above")
    add("--methods", nargs="+", metavar="M", help=f"({' '.join(DEFAULT)}; of `tasks` and `lost` others)")
    add("--sweep", nargs="*", choices=SWEEP, metavar="FIELD", help="hip with other values of fields (of all)")
    add("--model", metavar="M", help=".gguf file, checkpoint folder or hub id (SmolLM2-135M-Instruct)")
    add("--segment", type=positive, default=4096, help="tokens of a column of `perplexity` (%(default)s)")
    add("--steps", type=positive, default=256, help="tokens of `decoding` (%(default)s)")
    add("--tasks", nargs="+", metavar="T", help="of `needles` and `tasks` (all), of `lost` (keys)")
    add("--depths", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9], metavar="X", help="of needles")
    add(
        "--trials", type=positive, default=1, help="of each length and depth, with other digits (%(default)s)"
    )
    add("--samples", type=positive, help="query blocks of `coverage` (16); of each task and length (10)")
    add("--seconds", type=float, default=3600, help="a text that takes longer is given up (%(default)s)")
    return parser


def settle(options: argparse.Namespace, base: HiPConfig) -> None:
    """Fill in what the options leave open; ValueError for what cannot work."""
    usual = [4000, 8000] if options.measure in ("passkey", "needles", "tasks") else [8192]
    options.tokens = options.tokens or usual
    known = {"passkey": ["passkey"], "needles": list(NEEDLES)}.get(options.measure, list(TASKS))
    options.tasks = options.tasks or (["keys"] if options.measure == "lost" else known)
    if wrong := [task for task in options.tasks if task not in known]:
        raise ValueError(f"a task must be one of {', '.join(known)}, not {wrong[0]!r}")
    if options.samples is None:
        options.samples = 16 if options.measure == "coverage" else 10
    usual = {"tasks": ["dense", "hip"], "lost": LOST}.get(options.measure, DEFAULT)
    names = options.methods or (usual if options.sweep is None else ["hip"])
    if options.sweep is not None:
        swept = options.sweep or [field for field in SWEEP if field not in IDLE.get(options.measure, ())]
        names = [*names, *(f"hip:{field}={value}" for field in swept for value in SWEEP[field])]
    if options.measure == "coverage":  # dense attention has everything, memory is of decoding
        names = [name for name in names if not name.startswith(("dense", "snapshot"))]
    options.methods = list(dict.fromkeys(names))
    for name in options.methods:
        (_, cfg), *more = resolve(name, base)
        if options.measure == "coverage" and (more or cfg.block_q != ROWS or cfg.rope_clip):
            raise ValueError(f"coverage needs block_q={ROWS}, no rope_clip and no halves, not {name}")
    least = {"decoding": options.steps + 1, "coverage": 2048}.get(options.measure, 2)
    if min(options.tokens) < least:
        raise ValueError(f"--tokens must be at least {least}, not {min(options.tokens)}")
    if not all(0 <= depth <= 1 for depth in options.depths):
        raise ValueError("--depths must be from 0 to 1")


def main() -> None:
    options = arguments().parse_args()
    base = measuring.configure(HiPConfig(), options.set)
    settle(options, base)
    model, tokenizer = load(options.model, getattr(torch, options.dtype or "", None), options.device)
    common = dict(model=options.model, dtype=str(model.dtype))
    results = measuring.Results(options.out, "evaluate", options.device, **common)
    # a job measures one method, but for coverage, which reads the text once for all
    kind = "needles" if options.measure == "passkey" else options.measure
    groups = [options.methods] if kind == "coverage" else [[name] for name in options.methods]
    cases, text = [{}], []
    detail = {"perplexity": "segment", "decoding": "steps", "coverage": "samples"}.get(kind)
    details = {detail: getattr(options, detail)} if detail else {}
    if kind == "needles":
        cases = itertools.product(options.tasks, options.depths, range(options.trials))
        cases = [dict(zip(("task", "depth", "trial"), case, strict=True)) for case in cases]
    elif kind in ("tasks", "lost"):
        cases = [dict(task=x, seed=i) for x, i in itertools.product(options.tasks, range(options.samples))]
        details = {"prompts": measuring.code_hash(measuring.ROOT, "extras/evaluate")}
    else:
        text = measuring.natural_text(tokenizer, max(options.tokens), TEXT_START)

    def measure(tokens: int, names: list[str], case: dict) -> dict[str, dict]:
        if kind == "coverage":
            return coverage(model, text[:tokens], names, base, options)
        (name,) = names
        opened, more = partial(open_context, model, name, base), (tokenizer, tokens, case, options.seconds)
        if kind == "needles":
            return {name: find(opened, *more)}
        if kind in ("tasks", "lost"):
            return {name: solve(opened, *more, look=kind == "lost")}
        return {name: perplexity(open_context(model, name, base, tokens), text[:tokens], options)}

    records, jobs = {}, list(itertools.product(options.tokens, groups, cases))
    for tokens, names, case in tqdm(jobs, desc=options.measure):
        same = dict(measure=kind, tokens=tokens) | case | details
        settings = {
            name: same | dict(method=name, config=[vars(cfg) for _, cfg in resolve(name, base)])
            for name in names
        }
        old = {name: results.get(**settings[name]) for name in names}
        again = options.seconds  # what was given up in less time
        missing = [x for x, record in old.items() if not record or record.get("gave_up", math.inf) < again]
        started = time.monotonic()
        try:
            new = measure(tokens, missing, case) if missing else {}
        except OutOfTime:
            new = {name: {"gave_up": options.seconds} for name in missing}
        seconds = time.monotonic() - started
        old |= {name: results.put(x | {"seconds": seconds}, **settings[name]) for name, x in new.items()}
        records |= {(tokens, name, *case.values()): record for name, record in old.items()}
    if options.json:
        print(json.dumps(list(records.values()), indent=1))
        return
    print(f"{base}, {model.dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    shows = dict(needles=show_needles, coverage=show_coverage, tasks=show_tasks, lost=show_lost)
    shows.get(kind, show_perplexity)(records, options)


if __name__ == "__main__":
    sys.exit(measuring.command(main))
