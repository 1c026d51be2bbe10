"""The specification of hip.py and hip_triton.py, as tests.

A `Case` is drawn: sizes, numbers, configuration, and what was selected before.  `run` is hip.py, or the
kernels on the device that is there; `holds` is above what is held to both, and `pytest -k hip_triton` runs
the kernels alone.  What they should give is said once more, in plain loops over whole matrices of float64.

With score="max" small whole numbers make every score exact, with many ties: then selections must be equal.
Else two candidates may be swapped if their scores agree within rounding.
"""

import importlib
import inspect
import itertools
import math
import os
import re
import subprocess
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, seed, settings, stateful
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton, which torch imports when hip.py asks for its masks

import hip  # noqa: E402
import model  # noqa: E402
from hip import HiPConfig, Selection, dense_attention, hip_attention, sparse_attention  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
HERE = Path(__file__).parent
HALVES = (torch.float16, torch.bfloat16)
SMALL = HiPConfig(top_k=16, block_k=4, block_q=16, stride_k=2, sink=5, window=9, refresh_interval=4)
THREADS = torch.get_num_threads()
torch.set_num_threads(1)  # tensors are so small that threads would wait for each other
settings.register_profile("hip", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("hip")

# --- cases -------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """What was drawn; inputs follow from it: q, k, v, rope and previous, on the CPU."""

    B: int
    H: int
    Hkv: int
    Tq: int
    Tk: int
    D: int
    family: str
    dtype: torch.dtype
    seed: int
    cfg: HiPConfig
    scale: float | None = None
    old: str | None = None  # what previous is: "random" blocks of the domain, or "wild"
    width: int = 1  # of a wild one
    rounded: bool = False  # rotated rows are rounded to the dtype before they are scored, as by kernels

    def __post_init__(self):
        self.S, self.NQ = self.H if self.cfg.per_head else self.Hkv, -(-self.Tq // self.cfg.block_q)
        self.g, self.rope, self.previous = torch.Generator().manual_seed(self.seed), None, None
        self.q, self.k, self.v = (
            self.tensor(self.B, heads, tokens, self.D)
            for heads, tokens in ((self.H, self.Tq), (self.Hkv, self.Tk), (self.Hkv, self.Tk))
        )
        self.exact = self.family in ("whole", "constant")  # every score is
        if self.cfg.rope_clip:
            # as short as it may be, and not to be read behind that
            table = rotary_table(self.cfg.rope_clip + min(self.cfg.block_q, self.Tq), self.D, self.exact)
            self.rope = tuple(torch.cat([x, torch.full_like(x[:2], 9.0)]) for x in table)
        if self.old == "random":
            self.previous = hip.random_blocks(self.q, self.k, self.cfg, self.g)
        if self.old == "wild":
            shape, most = (self.B, self.S, self.NQ, self.width), self.Tk // self.cfg.block_k + 3
            blocks = torch.randint(-2, most, shape, generator=self.g, dtype=torch.int32)
            self.previous = Selection(blocks, torch.zeros(self.NQ, dtype=torch.int64))

    def tensor(self, *shape):
        x = torch.randn(shape, generator=self.g)
        if self.family == "whole":
            x = torch.randint(-3, 4, shape, generator=self.g).float()
        if self.family == "constant":
            x = torch.ones(shape)
        if self.family == "spike":
            x *= 0.1
            x.view(-1)[torch.randint(x.numel(), (1,), generator=self.g)] = 30.0
        return (100 * x if self.family == "huge" else x).to(self.dtype)


def rotary_table(rows, D, quarters=False):
    """cos and sin of each position; quarters: of whole quarter turns, so that whole numbers stay whole."""
    if quarters:
        turn = torch.arange(rows)[:, None] * torch.arange(1, D // 2 + 1) % 4
        return torch.tensor([1.0, 0, -1, 0])[turn], torch.tensor([0.0, 1, 0, -1])[turn]
    angle = torch.arange(rows)[:, None] * 100.0 ** (-torch.arange(D // 2) * 2 / D)
    return angle.cos(), angle.sin()


@st.composite
def cases(
    draw, kernels=False, families=("normal", "whole", "constant", "spike", "huge"), dtypes=None, **fixed
):
    """Awkward sizes of everything.  `fixed` are fields of the case or of its configuration."""

    def one_of(*options):
        return draw(st.sampled_from(options))

    slow = kernels and not GPU  # Triton's interpreter, which is wrong in bfloat16, too
    block_k, block_q, family = one_of(1, 2, 4, 8, 16), one_of(1, 4, 16), one_of(*families)
    cfg = dict(
        top_k=block_k * one_of(1, 2, 4),
        block_q=block_q,
        block_k=block_k,
        stride_q=one_of(*(n for n in (1, 2, 4) if n <= block_q)),
        stride_k=one_of(*(n for n in (1, 2) if n <= block_k)),
        sink=one_of(0, 1, draw(st.integers(0, 20))),
        window=one_of(1, draw(st.integers(1, 40)), draw(st.integers(1, 40))),
        representative=one_of("center", "first", "last"),
        score="max" if family == "whole" else one_of("mass", "max"),  # else equal up to the last bit
        per_head=one_of(False, False, True),
        rope_clip=one_of(None, None, 1, 5, 20, 60, 400),
    )
    block, most = max(block_k, block_q), 90 if slow else 220
    Tk = draw(st.one_of(st.integers(1, most), st.sampled_from([1, 3 * block - 1, 3 * block, 3 * block + 1])))
    Tq = one_of(1, Tk, draw(st.integers(1, Tk)))
    Hkv, halves = one_of(1, 2, 3), HALVES[:1] if slow else HALVES
    case = dict(
        B=one_of(1, 2),
        H=Hkv * one_of(1, 2, 3, 4),
        Hkv=Hkv,
        Tq=min(Tq, 5 * block_q + 1) if slow else Tq,
        Tk=Tk,
        D=one_of(*(32, 64, 80) if kernels and GPU else (32,) if kernels else (4, 8)),
        family=family,
        dtype=one_of(*dtypes or (torch.float32, *halves)),
        seed=draw(st.integers(0, 2**16)),
        scale=one_of(None, None, 0.3),
        old=one_of(None, None, "random", "wild", "wild"),
        width=draw(st.integers(0, 5 * cfg["top_k"] // block_k)),
        rounded=kernels,
    )
    for name, x in fixed.items():
        (case if name in case else cfg)[name] = x
    return Case(**case, cfg=HiPConfig(**cfg))


EXACT = dict(families=("whole", "constant"))


class Run:
    """The functions of hip.py or of hip_triton.py: tensors go to the device and back."""

    def __init__(self, name):
        self.module, self.kernels = importlib.import_module(name), name == "hip_triton"

    def __getattr__(self, name):
        function = getattr(self.module, name)

        def call(*arguments, **named):
            arguments, named = to(DEVICE, (arguments, named))
            torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody has written is NaN
            try:
                return to("cpu", function(*arguments, **named))
            finally:
                torch.use_deterministic_algorithms(False)

        return call

    def select(self, case, **change):
        """Without a previous selection, if none is given."""
        named = dict(q=case.q, k=case.k, cfg=case.cfg, scale=case.scale, rope=case.rope)
        return self.select_blocks(**named | change)

    def attend(self, case, selection, **change):
        named = dict(q=case.q, k=case.k, v=case.v, cfg=case.cfg, scale=case.scale, rope=case.rope)
        return self.sparse_attention(selection=selection, **named | change)


def to(device, tree):
    return tree_map_only(torch.Tensor, lambda x: x.to(device), tree)


@pytest.fixture(scope="module", params=["hip", "hip_triton"])
def run(request):
    if request.param == "hip_triton":
        pytest.importorskip("triton")
    return Run(request.param)


def holds(examples, few, *more, **fixed):
    """A property (run, case, ...): of hip.py in so many cases, of the kernels, which take longer, in few."""

    def decorate(wanted):
        def test(run):
            phases = [Phase.generate] if run.kernels else settings.default.phases  # shrinking takes minutes
            decorated = given(st.tuples(cases(run.kernels, **fixed), *more))(
                lambda drawn: wanted(run, *drawn)
            )
            decorated = seed(zlib.crc32(wanted.__name__.encode()))(decorated)
            settings(max_examples=few if run.kernels else examples, phases=phases)(decorated)()

        test.__name__, test.__doc__ = wanted.__name__, wanted.__doc__
        return test

    return decorate


# --- the same in plain loops -------------------------------------------------------------------------------


def products(case, dtype=torch.float64):
    """scale * q . k, as each query block sees the keys, of inputs in dtype: (B, H, Tq, Tk)."""
    wide, cfg, Tq, Tk = torch.promote_types(dtype, torch.float32), case.cfg, case.Tq, case.Tk
    q, k = case.q.to(wide), case.k.to(wide).repeat_interleave(case.H // case.Hkv, 1)
    scale = case.D**-0.5 if case.scale is None else case.scale
    if case.rope is None:
        return q @ k.transpose(2, 3) * scale

    def turned(x, at):
        (a, b), (cos, sin) = x.chunk(2, 3), (table[at].to(wide) for table in case.rope)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], 3).to(dtype).to(wide)

    result = torch.empty(case.B, case.H, Tq, Tk, dtype=wide)
    for i in range(0, Tq, cfg.block_q):
        rows, qs = torch.arange(i, min(i + cfg.block_q, Tq)), Tk - Tq + i
        at = (torch.arange(Tk) - qs + cfg.rope_clip).clamp(0, cfg.rope_clip + len(rows) - 1)  # later: any
        b_q = turned(q[:, :, rows], cfg.rope_clip + rows - i)
        result[:, :, rows] = b_q @ turned(k, at).transpose(2, 3) * scale
    return result


class QueryBlock(NamedTuple):
    """Query block i of search s of text b: its domain, and what each block of that is worth."""

    key: tuple[int, int, int]  # b, s, i
    lo: int
    hi: int
    scores: list[float]
    slack: float  # by which equal scores may differ

    def score(self, block):
        return self.scores[block - self.lo]


def query_blocks(case):
    cfg, group = case.cfg, case.H // case.S
    pairs = products(case, case.dtype if case.rounded and case.dtype in HALVES else torch.float64).double()
    for b, s, i in itertools.product(range(case.B), range(case.S), range(case.NQ)):
        qs = case.Tk - case.Tq + i * cfg.block_q
        lo = math.ceil(cfg.sink / cfg.block_k)
        hi = max(lo, (qs - cfg.window + 1) // cfg.block_k)
        if hi == lo:
            yield QueryBlock((b, s, i), lo, hi, [], 0.0)
            continue
        rows = torch.arange(i * cfg.block_q, min(case.Tq, (i + 1) * cfg.block_q), cfg.stride_q)
        each = pairs[b, s * group : (s + 1) * group, rows].flatten(0, 1)  # (rows of all heads, Tk)
        own, t = (case.Tk - case.Tq + rows).repeat(group)[:, None], torch.arange(case.Tk)
        seen = ((t < lo * cfg.block_k) | (t >= hi * cfg.block_k)) & (t <= own)
        loudest = each[:, lo * cfg.block_k : hi * cfg.block_k].unflatten(1, (hi - lo, cfg.block_k))
        loudest = loudest[:, :, :: cfg.stride_k].amax(2)
        if cfg.score == "mass":
            scores = (loudest - each.masked_fill(~seen, -math.inf).logsumexp(1, keepdim=True)).logsumexp(0)
        else:
            scores = loudest.amax(0)
        slack = 0.0 if case.exact else 4e-6 * (1 + float(each.abs().max()))
        yield QueryBlock((b, s, i), lo, hi, scores.tolist(), slack)


def keep(candidates, score, count, slack, liked):
    """The best `count`: higher score first, then lower position; within the slack, what is liked."""
    ranked = sorted(candidates, key=lambda x: (-score(x), x))
    edge = score(ranked[count - 1]) if len(ranked) > count else -math.inf
    if slack and edge > -math.inf:
        ranked.sort(key=lambda x: (0 if abs(score(x) - edge) <= slack else edge - score(x), not liked(x), x))
    return sorted(ranked[:count])


def search(case, block, previous, found):
    """The blocks that a query block chooses; where scores agree within the slack, those that were found."""
    M, lo, n = case.cfg.top_k // case.cfg.block_k, block.lo, block.hi - block.lo
    speaker = {"center": lambda f, l: (f + l) // 2, "first": lambda f, l: f, "last": lambda f, l: l - 1}

    def score(branch):
        return block.score(speaker[case.cfg.representative](*branch)) if branch[0] < branch[1] else -math.inf

    nodes, again = [(lo + n * j // M, lo + n * (j + 1) // M) for j in range(M)], True
    while again:
        branches = [half for f, l in nodes for half in ((f, (f + l) // 2), ((f + l) // 2, l))]
        nodes = keep(branches, score, M, block.slack, lambda x: any(x[0] <= y < x[1] for y in found))
        again = any(l - f > 1 for f, l in nodes)
    chosen = {f for f, l in nodes if f < l} | {x for x in previous if lo <= x < block.hi}
    return keep(chosen, block.score, M, block.slack, found.__contains__)


def chosen(selection, key):
    return [x for x in selection.blocks[key].tolist() if x >= 0]


def visible(case, selection):
    """What each query attends to: (B, H, Tq, Tk)."""
    cfg, t = case.cfg, torch.arange(case.Tk)
    result = torch.zeros(case.B, case.H, case.Tq, case.Tk, dtype=torch.bool)
    for b, h, i in itertools.product(range(case.B), range(case.H), range(case.NQ)):
        rows = slice(i * cfg.block_q, (i + 1) * cfg.block_q)
        sink = t < math.ceil(cfg.sink / cfg.block_k) * cfg.block_k
        result[b, h, rows] = sink | (t >= selection.window_start[i])
        for x in chosen(selection, (b, h * selection.blocks.shape[1] // case.H, i)):
            result[b, h, rows, x * cfg.block_k : (x + 1) * cfg.block_k] = True
    return result.tril(case.Tk - case.Tq)


def attend(case, selection, dtype=torch.float64):
    s = products(case, dtype).masked_fill(~visible(case, selection), -math.inf)
    return s.softmax(3).to(dtype) @ case.v.repeat_interleave(case.H // case.Hkv, 1).to(dtype)


def assert_attention(o, case, selection):
    """o is at most twice as far from float64 as the plain computation in its own dtype, plus rounding."""
    assert o.dtype == case.dtype and o.shape == case.q.shape
    true, plain = attend(case, selection), attend(case, selection, case.dtype).double()
    values, eps = float(case.v.abs().max()), torch.finfo(torch.float32).eps
    # float32 scores of size s carry an error of s * eps, whoever sums them
    scores = float(case.q.abs().max().double() * case.k.abs().max()) * case.D * (case.scale or case.D**-0.5)
    rounding = 2 * torch.finfo(case.dtype).eps * max(1.0, values) + 4 * eps * scores * values
    assert (o.double() - true).abs().max() <= 2 * (plain - true).abs().max() + rounding


def some_selection(run, case, kind, age=0):
    """As one is that was made when the text was `age` tokens shorter."""
    k, far = case.k[:, :, : max(case.Tq, case.Tk - age)], 2**31 - 1
    if kind == "searched":
        return run.select(case, k=k)
    wide = replace(case.cfg, top_k=4 * case.cfg.top_k)  # attention takes as many blocks as there are
    blocks, start = hip.random_blocks(case.q, k, wide, case.g)
    if kind == "holes":
        gone = (torch.rand(blocks.shape, generator=case.g) < 0.5) | (blocks < 0)
        blocks = blocks.masked_fill(gone, far).sort(3).values
        blocks = blocks.masked_fill(blocks == far, -1)
    return Selection(blocks, start)


KINDS = st.sampled_from(["searched", "random", "holes"])

# --- the configuration and the door ------------------------------------------------------------------------


WRONG = [
    *itertools.product(["top_k", "block_q", "block_k"], [0, 48, 16.0, True]),
    *itertools.product(["stride_q", "stride_k"], [0, 3, 128, 1.0]),
    *itertools.product(["sink", "dense_layers", "dense_tail"], [-1, 1.0, True]),
    *itertools.product(["window", "refresh_interval", "rope_clip"], [0, -1, 2.0, True]),
    *itertools.product(["per_head", "memory"], [1, None, "yes"]),
    *(("top_k", 8), ("representative", "middle"), ("score", "sum")),
]


@pytest.mark.parametrize("name, wrong", WRONG)
def test_a_configuration_that_cannot_work_is_refused_by_name(name, wrong):
    with pytest.raises(ValueError, match=f"^{name} must be .*, not {re.escape(repr(wrong))}$"):
        HiPConfig(**{name: wrong})


def test_a_configuration_of_version_1_is_told_what_replaces_its_beam():
    with pytest.raises(ValueError, match="beam is gone: .*top_k"):
        HiPConfig(beam=2)


@pytest.mark.parametrize("steps, rows", [(1, 1), (3, 2), (8, 8), (100, 16)])
def test_as_many_queries_search_in_decoding_as_then_share_a_selection(steps, rows):
    cfg = HiPConfig(block_q=16, stride_q=4, refresh_interval=steps)
    assert cfg.decoding == replace(cfg, block_q=rows, stride_q=1, stride_k=cfg.stride_k // 2)
    alone = replace(cfg, memory=False)
    assert alone.decoding == replace(cfg.decoding, memory=False, block_q=1)
    assert replace(cfg, stride_k=1).decoding.stride_k == 1


def test_early_layers_choose_more():
    cfg = HiPConfig(top_k=64, early_factor=8)
    chosen = [[cfg.of_layer(i, n).top_k for i in range(n)] for n in (1, 2, 5)]
    assert chosen == [[512], [512, 64], [512, 512, 512, 64, 64]]
    assert cfg.of_layer(0, 2) == replace(cfg, top_k=512, early_factor=1) == cfg.of_layer(0, 2).of_layer(0, 2)


@given(cases(old="wild"))
def test_how_many_query_blocks_are_worked_on_at_a_time_changes_nothing(case):
    wanted, pieces = Run("hip").select(case, previous=case.previous), (hip.GATHERED, hip.PIECE)
    o = Run("hip").attend(case, wanted)
    try:
        hip.GATHERED = hip.PIECE = 1
        found = Run("hip").select(case, previous=case.previous)
        assert torch.equal(found.blocks, wanted.blocks)
        torch.testing.assert_close(Run("hip").attend(case, found), o, atol=1e-3, rtol=1e-2)
    finally:
        hip.GATHERED, hip.PIECE = pieces


def test_inputs_that_do_not_fit_are_refused_by_name(run):
    q, k, cfg = torch.zeros(1, 4, 8, 32), torch.zeros(1, 2, 9, 32), HiPConfig(rope_clip=20)
    (cos, sin), blocks = rotary_table(28, 32), torch.full((1, 2, 1, 64), -1, dtype=torch.int32)
    fits = dict(q=q, k=k, v=k, scale=1.0, rope=(cos, sin), cfg=cfg, blocks=blocks, start=torch.tensor([16]))
    for words, change in [
        (r"q must be \(B, H, Tq, D\) with no empty dimension, not \(4, 8, 32\)", dict(q=q[0])),
        ("q must be .*, not .1, 4, 0, 32.", dict(q=q[:, :, :0])),
        ("q must be float32, float16 or bfloat16, not torch.float64", dict(q=q.double())),
        ("k must be .1, Hkv, Tk, 32., Hkv dividing 3, not .1, 2, 9, 32.", dict(q=q[:, :3])),
        ("k must be .*, not .1, 2, 9, 16.", dict(k=k[..., :16])),
        ("k must be .*, not .2, 2, 9, 32.", dict(k=k.repeat(2, 1, 1, 1))),
        ("k must be .*, not .1, 0, 9, 32.", dict(k=k[:, :0])),
        ("k must hold the queries' own positions, 8 or more, not 7", dict(k=k[:, :, :7])),
        ("k must be .*float32 on .* like q, not torch.float16", dict(k=k.half())),
        ("k must be .*float32 on .* like q, not .* on meta", dict(k=k.to("meta"))),
        ("v must be .*float32 on .* like q, not torch.float16", dict(v=k.half())),
        ("v must hold the queries' own positions, 8 or more, not 7", dict(v=k[:, :, :7])),
        ("k and v must have one shape, not .1, 2, 9, 32. and .1, 1, 9, 32.", dict(v=k[:, :1])),
        *(("scale must be a positive number, not", dict(scale=x)) for x in (0, -1.0, math.nan, math.inf)),
        ("rope must be given with rope_clip, and only then; .* 20", dict(rope=None)),
        ("rope must be given with rope_clip, and only then; .* None", dict(cfg=HiPConfig())),
        ("rope must be cos and sin, .*28 or more.* 16.*, not .27, 16.", dict(rope=(cos, sin[:27]))),
        ("rope must be cos and sin, .*, not .28, 15.", dict(rope=(cos[:, :15], sin))),
        ("rope must be cos and sin, .*, not .16,.", dict(rope=(cos[0], sin))),
        ("rope must be .*float32.*, not .*torch.float64", dict(rope=(cos.double(), sin))),
        ("rope must be .*like q, not .*on meta", dict(rope=(cos, sin.to("meta")))),
        ("(previous|selection) must be of 1 texts.* 2 .*2, 2, 1, 64", dict(blocks=blocks.repeat(2, 1, 1, 1))),
        ("(previous must .*2 searches|selection must .*2 or 4 s).* 3, ", dict(blocks=blocks[:, [0, 0, 0]])),
        ("(previous|selection) must .*1 query blocks.*1, 2, 2, 64", dict(blocks=blocks.repeat(1, 1, 2, 1))),
        ("(previous|selection) must .*1 query blocks.* 2 windows", dict(start=torch.zeros(2).long())),
    ]:
        x = tree_map_only(torch.Tensor, lambda y: y if y.is_meta else y.to(DEVICE), fits | change)
        more, selection = dict(scale=x["scale"], rope=x["rope"]), Selection(x["blocks"], x["start"])
        if "v" not in change:
            with pytest.raises(ValueError, match=f"^{words}"):
                run.module.select_blocks(x["q"], x["k"], x["cfg"], selection, **more)
        with pytest.raises(ValueError, match=f"^{words}"):
            run.module.sparse_attention(x["q"], x["k"], x["v"], selection, x["cfg"], **more)
        with pytest.raises(ValueError, match=f"^{words}"):
            run.module.hip_attention(x["q"], x["k"], x["v"], x["cfg"], selection, **more)
    with pytest.raises(ValueError, match="selection must have windows that begin with a block of 32 tokens"):
        sparse_attention(q, k, k, Selection(blocks, torch.tensor([3])), HiPConfig())
    with pytest.raises(ValueError, match="v must be"):
        dense_attention(q, k, k.half())


# --- the search --------------------------------------------------------------------------------------------


def assert_chosen(selection, case, wanted):
    """Every block that a query block chooses is the one that `wanted` (query block, found) says."""
    M, shape = case.cfg.top_k // case.cfg.block_k, (case.B, case.S, case.NQ)
    assert selection.blocks.shape == (*shape, M) and selection.blocks.dtype == torch.int32
    assert selection.window_start.shape == (case.NQ,) and selection.window_start.dtype == torch.int64
    for block in query_blocks(case):
        found, row = chosen(selection, block.key), selection.blocks[block.key].tolist()
        assert row == found + [-1] * (M - len(found))
        assert found == wanted(block, found)
        assert selection.window_start[block.key[2]] == block.hi * case.cfg.block_k


@holds(250, 16)
def test_the_search_is_the_one_that_is_specified(run, case):
    def wanted(block, found):
        previous = [] if case.previous is None else case.previous.blocks[block.key].tolist()
        return search(case, block, previous, found)

    assert_chosen(run.select(case, previous=case.previous), case, wanted)


@given(cases())
def test_the_oracle_has_the_best_blocks_by_the_same_score(case):
    def wanted(block, found):
        M, every = case.cfg.top_k // case.cfg.block_k, range(block.lo, block.hi)
        return keep(every, block.score, M, block.slack, found.__contains__)

    selection = hip.oracle_blocks(case.q, case.k, case.cfg, scale=case.scale, rope=case.rope)
    assert_chosen(selection, case, wanted)


@holds(40, 6, **EXACT, block_k=1, top_k=16, stride_k=1)
def test_a_domain_of_two_blocks_for_each_node_is_searched_exactly(run, case):
    lo, hi = hip.domain(case.Tq, case.Tk, case.cfg)
    covered = hi - lo <= 32
    exact = hip.oracle_blocks(case.q, case.k, case.cfg, scale=case.scale, rope=case.rope).blocks
    found = run.select(case, previous=case.previous).blocks
    assert torch.equal(found[:, :, covered], exact[:, :, covered])


@holds(40, 6, families=("normal", "whole"), old="random")
def test_what_is_remembered_is_lost_only_to_better_blocks(run, case):
    afresh, found = run.select(case), run.select(case, previous=case.previous)
    for block in query_blocks(case):
        both = {*chosen(afresh, block.key), *chosen(case.previous, block.key)}
        best = sorted(map(block.score, both), reverse=True)[: case.cfg.budget]
        kept = sorted(map(block.score, chosen(found, block.key)), reverse=True)
        assert all(a >= b - block.slack for a, b in zip(kept, best, strict=True))


SCORES = st.sampled_from([-math.inf, hip.LOWEST, -2.5, -0.0, 0.0, 3e38, math.inf])


@given(st.lists(SCORES, min_size=1, max_size=9), st.integers(1, 9))
@example([-0.0, 0.0], 1)
def test_of_equal_scores_the_earlier_block_wins(scores, count):
    count = min(count, len(scores))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert hip.best(torch.tensor([scores]), count)[0].tolist() == sorted(order[:count])


@pytest.mark.parametrize("score", ["mass", "max"])
def test_where_scores_are_local_the_search_beats_random_pruning_and_never_the_oracle(run, score):
    T, cfg = 4097, HiPConfig(top_k=128, block_k=4, sink=0, window=1, block_q=1, stride_q=1, score=score)
    g, k = torch.Generator().manual_seed(0), torch.zeros(1, 4, T, 32)
    k[..., 0] = torch.randn(1, 4, T, generator=g).cumsum(2) / 8  # a random walk over positions
    q = torch.eye(32)[0].expand(1, 4, 1, 32).contiguous()
    loud = k[:, :, : T - 1, 0].unflatten(2, (-1, 4))[..., ::2].amax(3).exp()[:, :, None]  # (1, 4, 1, blocks)
    exact, luck = hip.oracle_blocks(q, k, cfg, scale=1.0), hip.random_blocks(q, k, cfg, g)
    every = run.select_blocks(q, k, cfg, scale=1.0), exact, luck
    found, exact, luck = (loud.gather(3, x.blocks.long()).sum(3) for x in every)
    assert (found > 2 * luck).all() and (found > 0.7 * exact).all() and (found <= exact * 1.0001).all()


@given(cases())
def test_random_blocks_are_blocks_of_the_domain_and_repeatable(case):
    one, same = (hip.random_blocks(case.q, case.k, case.cfg, case.g.manual_seed(1)) for _ in range(2))
    assert torch.equal(one.blocks, same.blocks)
    assert_chosen(one, case, lambda block, found: sorted({x for x in found if block.lo <= x < block.hi}))
    for block in query_blocks(case):
        assert len(chosen(one, block.key)) == min(case.cfg.budget, block.hi - block.lo)


def test_random_blocks_are_equally_likely():
    cfg = HiPConfig(top_k=4, block_k=1, block_q=1, stride_q=1, stride_k=1, sink=0, window=1, per_head=True)
    q, k = torch.zeros(2, 6, 1, 4).expand(-1, -1, 800, -1), torch.zeros(2, 2, 810, 4)
    blocks = hip.random_blocks(q, k, cfg, torch.Generator().manual_seed(0)).blocks
    times = blocks[blocks < 10].bincount(minlength=10)  # of the ten that all query blocks may choose
    assert times.min() > 0.8 * times.max() and len(blocks[:, :, -1].unique(dim=1)[0]) > 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("score", ["mass", "max"])
def test_a_block_whose_scores_overflow_is_still_a_block(run, score):
    cfg = HiPConfig(top_k=2, block_k=1, stride_k=1, block_q=1, stride_q=1, sink=1, window=1, score=score)
    for T, sign in itertools.product((3, 4, 6, 9), (1, -1)):
        q, k = torch.full((1, 1, 1, 32), 1e30), torch.full((1, 1, T, 32), sign * 1e30)
        for function in (run.select_blocks, hip.oracle_blocks):
            assert function(q, k, cfg).blocks.flatten().tolist() == ([1, 2] if T > 3 else [1, -1])


# --- attention ---------------------------------------------------------------------------------------------


@holds(250, 16, KINDS, st.integers(0, 12))
def test_attention_is_softmax_over_sink_selected_blocks_and_window(run, case, kind, age):
    selection = some_selection(run, case, kind, age)
    o = run.attend(case, selection)
    assert_attention(o, case, selection)
    more = dict(scale=case.scale, rope=case.rope)
    same, returned = run.hip_attention(case.q, case.k, case.v, case.cfg, selection, **more)
    assert torch.equal(same, o) and torch.equal(returned.blocks, selection.blocks)


@holds(30, 4, top_k=256)
def test_a_budget_that_covers_the_text_is_dense_attention(run, case):
    o, selection = run.hip_attention(case.q, case.k, case.v, case.cfg, scale=case.scale, rope=case.rope)
    everything = Selection(selection.blocks[..., :0], torch.zeros(case.NQ, dtype=torch.int64))
    assert visible(case, selection).equal(visible(case, everything))
    assert_attention(o, case, everything)


@given(cases(Tq=1, rope_clip=None), st.sampled_from(["searched", "random"]), st.integers(0, 7))
def test_what_a_query_and_those_behind_it_attend_to_is_gathered_at_once(case, kind, age):
    selection, then = some_selection(Run("hip"), case, kind, age), max(1, case.Tk - age)
    at, *kv = hip.attended(case.q, case.k[:, :, :then], case.v[:, :, :then], selection, case.cfg)
    searches, seen = at.shape[1], visible(case, selection)[:, :, 0]  # (B, H, Tk)
    for b, s in itertools.product(range(case.B), range(searches)):
        now, end = (int((at[b, s] < x).sum()) for x in (then, case.Tk))
        order = at[b, s, :end]  # what is there, then room, in the order of the text
        assert (order[:now] < then).all() and order[now:].tolist() == list(range(then, case.Tk))
        wanted = seen[b, s * case.H // searches].nonzero()[:, 0]
        assert order.sort().values.tolist() == wanted.tolist()
        for x, y in zip(kv, (case.k, case.v), strict=True):
            assert torch.equal(x[b, s, :now], y[b, s * case.Hkv // searches, order[:now]])


@given(cases())
def test_dense_attention_is_softmax_over_everything(case):
    none = hip.no_blocks(case.q, case.k.shape, replace(case.cfg, window=case.Tk))
    everything = Selection(none.blocks, torch.zeros(case.NQ))
    assert_attention(Run("hip").attend(case, none), case, everything)  # that of clipped positions, too
    case = replace(case, cfg=replace(case.cfg, rope_clip=None))
    assert_attention(dense_attention(case.q, case.k, case.v, scale=case.scale), case, everything)


@given(cases(dtypes=[torch.float32], families=("normal", "spike")), KINDS)
def test_gradients_are_those_of_masked_dense_attention(case, kind):
    selection, weight = some_selection(Run("hip"), case, kind), case.tensor(*case.q.shape)
    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    found, wanted = (
        torch.autograd.grad((o * weight).sum(), inputs)
        for o in (Run("hip").attend(case, selection), attend(case, selection))
    )
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
@holds(50, 8, st.data())
def test_no_later_key_or_value_reaches_a_query(run, case, data):
    row, cfg, before = data.draw(st.integers(0, case.Tq - 1)), case.cfg, case.Tk - case.Tq
    i = row // cfg.block_q
    selection = run.select(case, previous=case.previous)
    o = run.attend(case, selection)
    # later queries of a block take part in its search, and with "mass" what these see anyway
    q, k, end = case.q.clone(), case.k.clone(), min(case.Tq, (i + 1) * cfg.block_q)
    q[:, :, end:], k[:, :, before + (end if cfg.score == "mass" else i * cfg.block_q) :] = math.nan, math.nan
    again = run.select(case, previous=case.previous, q=q, k=k)
    assert torch.equal(again.blocks[:, :, : i + 1], selection.blocks[:, :, : i + 1])
    q, k, v = case.q.clone(), case.k.clone(), case.v.clone()
    q[:, :, row + 1 :], k[:, :, before + row + 1 :] = math.nan, 1e4  # torch's attention adds its mask to NaN
    v[:, :, before + row + 1 :] = torch.finfo(case.dtype).max  # no weight but nothing can bear this
    assert torch.equal(run.attend(case, selection, q=q, k=k, v=v)[:, :, : row + 1], o[:, :, : row + 1])


def in_pieces(run, case, cuts):
    """hip_attention of a prompt in pieces that end at these queries: (output, blocks)."""
    before, parts = case.Tk - case.Tq, []
    for a, b in itertools.pairwise([0, *cuts]):
        k, v = (x[:, :, : before + b] for x in (case.k, case.v))
        more = dict(scale=case.scale, rope=case.rope)
        parts.append(run.hip_attention(case.q[:, :, a:b], k, v, case.cfg, **more))
    return torch.cat([o for o, _ in parts], 2), torch.cat([x.blocks for _, x in parts], 2)


@holds(40, 5, st.data(), **EXACT)
def test_a_prompt_read_in_pieces_is_the_prompt_read_at_once(run, case, data):
    cut = data.draw(st.integers(0, case.NQ - 1)) * case.cfg.block_q
    o, blocks = in_pieces(run, case, [*[cut] * (cut > 0), case.Tq])
    selection = run.select(case)
    assert torch.equal(blocks, selection.blocks)
    assert_attention(o, case, selection)


@pytest.mark.parametrize("change", [{}, dict(score="max", window=1500), dict(rope_clip=99, per_head=True)])
def test_pieces_of_whole_runs_give_the_same_bits(change, request):
    request.addfinalizer(lambda: torch.set_num_threads(1))
    torch.set_num_threads(THREADS)
    T, size = 4 * hip.PIECE + 77, hip.PIECE
    case = Case(1, 4, 2, T, T, 16, "normal", torch.float32, 0, HiPConfig(**dict(top_k=256) | change))
    whole = in_pieces(Run("hip"), case, [T])
    for cuts in (range(size, T, size), range(3 * size, T, 3 * size)):
        assert all(map(torch.equal, in_pieces(Run("hip"), case, [*cuts, T]), whole))


@holds(30, 4, st.integers(1, 12), Tq=1)
def test_a_reused_selection_never_loses_a_token_that_was_in_the_window(run, case, steps):
    old = max(1, case.Tk - steps)
    selection = run.select(case, k=case.k[:, :, :old])
    for tokens in torch.arange(case.Tk).split(case.D):  # weights are equal, and values say which are not 0
        v = torch.zeros_like(case.v)
        v[:, :, tokens, : len(tokens)] = torch.eye(len(tokens), dtype=case.dtype)
        o = run.attend(case, selection, q=torch.zeros_like(case.q), v=v)
        assert (o[..., : len(tokens)][..., tokens > old - 1 - case.cfg.window] > 0).all()


@holds(30, 5, per_head=True)
def test_a_search_per_query_head_is_one_key_head_for_each(run, case):
    k, v = (x.repeat_interleave(case.H // case.Hkv, 1) for x in (case.k, case.v))
    cfg, selection = replace(case.cfg, per_head=False), run.select(case, previous=case.previous)
    same = run.select(case, k=k, cfg=cfg, previous=case.previous)
    assert torch.equal(selection.blocks, same.blocks)
    assert torch.equal(run.attend(case, selection), run.attend(case, selection, k=k, v=v, cfg=cfg))


@holds(30, 4, **EXACT)
def test_permuting_texts_and_heads_permutes_the_result(run, case):
    turn = torch.arange(case.H).unflatten(0, (case.Hkv, -1)).flip(0).flatten()  # groups stay together
    searches = turn if case.cfg.per_head else torch.arange(case.Hkv).flip(0)
    moved, selection = dict(q=case.q.flip(0)[:, turn], k=case.k.flip(0, 1)), run.select(case)
    found = run.select(case, **moved)
    assert torch.equal(found.blocks, selection.blocks.flip(0)[:, searches])
    o = run.attend(case, selection).flip(0)[:, turn]
    torch.testing.assert_close(run.attend(case, found, **moved, v=case.v.flip(0, 1)), o)


@holds(30, 3, KINDS)
def test_layout_in_memory_changes_nothing_and_nothing_beside_is_read(run, case, kind):
    def room(x):  # part of a larger cache
        fill = math.nan if x.is_floating_point() else 2**20
        return torch.full([n + 9 for n in x.shape], fill).to(x)[4:-5, 4:-5, 4:-5, 4:-5].copy_(x)

    def far(x, *strides):
        return torch.full([4 * x.numel() + 9999], math.nan).to(x).as_strided(x.shape, strides).copy_(x)

    selection = some_selection(run, case, kind)
    found, o = run.select(case).blocks, run.attend(case, selection)
    for layout in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: room(x.transpose(2, 3)).transpose(2, 3),
        lambda x: torch.full([n + 3 for n in x.shape[:3]] + [case.D], math.nan).to(x)[3:, 3:, 3:].copy_(x),
        lambda x: far(x, x[0].numel() + 2 * x.shape[1] + 1, x[0, 0].numel() + 2, x.shape[3], 1),
        lambda x: far(x, x[0].numel(), x[0, 0].numel(), 1, x.shape[2]),
    ):
        q, k, v = (layout(x.to(DEVICE)) for x in (case.q, case.k, case.v))
        moved = Selection(room(selection.blocks), selection.window_start.repeat_interleave(2)[::2])
        assert torch.equal(run.select(case, q=q, k=k).blocks, found)
        assert torch.equal(run.attend(case, moved, q=q, k=k, v=v), o)


@pytest.mark.parametrize("sink", [100, 2**40])
def test_a_sink_longer_than_the_text_is_the_whole_text(run, sink):
    case = Case(1, 4, 2, 50, 50, 32, "normal", torch.float32, 0, HiPConfig(sink=sink))
    selection = run.select(case)
    torch.testing.assert_close(run.attend(case, selection), dense_attention(case.q, case.k, case.v))
    for other in (selection, *(f(case.q, case.k, case.cfg) for f in (hip.oracle_blocks, hip.random_blocks))):
        assert (other.blocks == -1).all()


# --- what stands around a call -----------------------------------------------------------------------------


AROUND = [
    lambda on: torch.set_default_dtype(torch.float16 if on else torch.float32),
    lambda on: torch.set_default_device("meta" if on else None),
    lambda on: torch.set_autocast_enabled(DEVICE, on),  # to bfloat16 on a CPU, float16 on a GPU
]


@pytest.mark.parametrize("change", [{}, dict(rope_clip=20, per_head=True)], ids=str)
def test_default_dtype_default_device_and_autocast_change_no_bit(run, change):
    cfg, g = HiPConfig(**vars(SMALL) | change), torch.Generator()
    case = Case(1, 4, 2, 20, 70, 32, "normal", torch.float32, 0, cfg, 0.3, "wild", 9)

    def results():
        found, more = run.select(case, previous=case.previous), dict(scale=0.3, rope=case.rope)
        others = hip.oracle_blocks(case.q, case.k, cfg, **more), hip.random_blocks(case.q, case.k, cfg, g)
        cache = run.module.OffloadedKVCache((1, 1, 2, 70, 32), 4, cfg, case.dtype, DEVICE)
        cache.append(0, case.k.to(DEVICE), case.v.to(DEVICE))
        q, pages = case.q[:, :, -1:], cache.layer(0)
        o, step = run.hip_attention(q, pages, pages, cfg, **more)
        dense = dense_attention(case.q, case.k, case.v, scale=0.3)
        count = hip.count_scores(20, 70, found, cfg, previous=9)
        return *found, *others[0], *others[1], *step, o, dense, run.attend(case, found), torch.full((), count)

    g.manual_seed(0)
    wanted = results()
    for set_to in AROUND:
        g.manual_seed(0)
        set_to(True)
        try:
            found = results()
        finally:
            set_to(False)
        for x, y in zip(found[:-1], wanted[:-1], strict=True):
            assert x.dtype == y.dtype and x.device == y.device and torch.equal(x, y)


@pytest.mark.parametrize("change, Tq", [({}, 40), (dict(rope_clip=20), 1)], ids=str)
def test_compiled_functions_give_the_eager_result(change, Tq):
    case = Case(1, 4, 2, Tq, 130, 8, "normal", torch.float32, 0, HiPConfig(**vars(SMALL) | change))
    torch._dynamo.reset()
    compiled = torch.compile(hip_attention, backend="aot_eager")  # C++ that is made from it takes minutes
    wanted, found = (f(case.q, case.k, case.v, case.cfg, rope=case.rope) for f in (hip_attention, compiled))
    assert torch.equal(found[1].blocks, wanted[1].blocks)
    torch.testing.assert_close(found[0], wanted[0])


class Products(TorchFunctionMode):
    """Counts the products of rows that functions of torch compute."""

    count = 0

    def __torch_function__(self, function, types, arguments=(), named=None):
        if "matmul" in function.__name__:
            self.count += arguments[0].shape[:-1].numel() * arguments[1].shape[-1]
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.count += arguments[0].shape[:-1].numel() * arguments[1].shape[2]
        return function(*arguments, **named or {})


@settings(max_examples=160)
@given(cases(), KINDS)
def test_the_products_that_are_counted_are_those_that_are_computed(case, kind):
    selection, heads = some_selection(Run("hip"), case, kind), case.B * case.H
    with Products() as attention:
        Run("hip").attend(case, selection)
    assert heads * hip.count_scores(case.Tq, case.Tk, selection, case.cfg, searched=False) == attention.count
    with Products() as both:
        found = Run("hip").select(case, previous=case.previous)
        Run("hip").attend(case, found)
    width = 0 if case.previous is None else case.previous.blocks.shape[3]
    assert heads * hip.count_scores(case.Tq, case.Tk, found, case.cfg, True, width) == both.count


def test_the_work_of_a_prompt_grows_almost_linearly():
    cfg = HiPConfig()

    def scores(T):
        hi = hip.domain(T, T, cfg)[1]
        blocks = torch.zeros(1, 1, len(hi), cfg.budget)
        return hip.count_scores(T, T, Selection(blocks, hi * cfg.block_k), cfg)

    growth = [scores(2 * T) / scores(T) for T in (2**15, 2**17, 2**19)]
    assert all(2 < x < 2.3 for x in growth) and growth == sorted(growth, reverse=True)
    assert scores(2**17) < 0.1 * (2**17) ** 2 / 2


# --- clipped positions -------------------------------------------------------------------------------------


@holds(30, 4, **EXACT, rope_clip=300, dtypes=[torch.float32])
def test_a_clip_longer_than_the_text_is_plain_rotary_attention(run, case):
    def turned(x, at):
        (a, b), (cos, sin) = x.chunk(2, 3), (y[at] for y in rotary_table(case.Tk, case.D, quarters=True))
        return torch.cat([a * cos - b * sin, b * cos + a * sin], 3)

    k, q = turned(case.k, torch.arange(case.Tk)), turned(case.q, torch.arange(case.Tk - case.Tq, case.Tk))
    plain = dict(q=q, k=k, rope=None, cfg=replace(case.cfg, rope_clip=None))
    wanted = run.select(case, previous=case.previous, **plain)
    assert torch.equal(run.select(case, previous=case.previous).blocks, wanted.blocks)
    o = run.attend(case, wanted, **plain)
    torch.testing.assert_close(run.attend(case, wanted), o, atol=1e-5, rtol=1e-5)


@holds(30, 4, st.integers(1, 9), families=("normal",), dtypes=[torch.float32], rope_clip=20, sink=0)
def test_with_clipped_positions_only_distances_count(run, case, shift):
    blocks, start = some_selection(run, case, "random")
    size = shift * case.cfg.block_k
    front = torch.full((case.B, case.Hkv, size, case.D), 1e4)
    k, v = (torch.cat([front, x], 2) for x in (case.k, case.v))
    moved = Selection(blocks.where(blocks < 0, blocks + shift), start + size)
    o = run.attend(case, Selection(blocks, start))
    torch.testing.assert_close(run.attend(case, moved, k=k, v=v), o, atol=1e-5, rtol=1e-5)


# --- the offloaded cache -----------------------------------------------------------------------------------


def least(*arguments):
    """The least bound that a cache may have, as it says itself."""
    with pytest.raises(
        ValueError, match="resident_tokens must be at least .*, as a step needs, not 0"
    ) as error:
        hip.OffloadedKVCache(*arguments, resident_tokens=0)
    bound = int(str(error.value).split()[5].rstrip(","))
    with pytest.raises(ValueError, match=f"resident_tokens must be at least {bound}, .*, not {bound - 1}"):
        hip.OffloadedKVCache(*arguments, resident_tokens=bound - 1)
    return bound


STEPS = st.integers(1, 40), st.integers(1, 9)  # and of those that share a selection


@holds(60, 4, st.sampled_from(["host", "disk"]), st.sampled_from([None, 0, 24]), *STEPS)
def test_an_offloaded_cache_changes_no_bit_of_any_step(run, case, store, spare, steps, refresh):
    cfg, shape = replace(case.cfg, refresh_interval=refresh), (2, case.B, case.Hkv, case.Tk, case.D)
    bound = None if spare is None else least(shape, case.H, cfg, case.dtype) + spare
    more = dict(store=store, resident_tokens=bound)
    cache = run.module.OffloadedKVCache(shape, case.H, cfg, case.dtype, DEVICE, **more)
    first = max(0, case.Tk - (min(steps, 9) if run.kernels and not GPU else steps))
    layers = [(case.k, case.v, case.q), (case.v, case.k, -case.q)]
    for layer, (k, v, _) in enumerate(layers):
        cache.append(layer, *(x[:, :, :first].to(DEVICE) for x in (k, v)))
    old = [case.previous and Selection(case.previous.blocks[:, :, :1], case.previous.window_start[:1])] * 2
    for end in range(first + 1, case.Tk + 1):
        for layer, (k, v, q) in enumerate(layers):
            cache.append(layer, *(x[:, :, end - 1 : end].to(DEVICE) for x in (k, v)))
            q, near, pages = q[:, :, -(end % case.Tq) - 1, None], dict(cfg=cfg), cache.layer(layer)
            whole, near = dict(q=q, k=k[:, :, :end], cfg=cfg), dict(q=q, k=pages, cfg=cfg)
            if (end - first - 1) % refresh == 0:
                wanted, old[layer] = (run.select(case, previous=old[layer], **x) for x in (whole, near))
                assert all(map(torch.equal, old[layer], wanted))
            o = run.attend(case, old[layer], **near, v=pages)
            assert (
                torch.equal(o, run.attend(case, old[layer], **whole, v=v[:, :, :end])) and o.isfinite().all()
            )
            assert cache.resident_tokens() <= cache.bound and bound in (None, cache.bound)
    for layer, (k, v, _) in enumerate(layers):
        assert all(map(torch.equal, to("cpu", cache.read(layer)), (k, v)))


class Decoding(stateful.RuleBasedStateMachine):
    """An offloaded cache of two heads, and beside it the pages of each that should be near (test below)."""

    CFG = HiPConfig(top_k=8, block_k=4, block_q=16, sink=3, window=1, refresh_interval=1)
    SHAPE, run = (1, 1, 2, 70, 32), None

    def __init__(self):
        super().__init__()
        bound = least(self.SHAPE, 2, self.CFG, torch.float32)
        more = dict(device=DEVICE, resident_tokens=bound)
        self.cache = self.run.module.OffloadedKVCache(self.SHAPE, 2, self.CFG, torch.float32, **more)
        self.q, self.k, self.v = torch.randn(3, 1, 2, 70, 32, generator=torch.Generator().manual_seed(0))
        self.length, self.calls, self.near, self.used = 0, 0, [set(), set()], [{}, {}]
        self.asked = []  # (chosen of head 0, of head 1, first page of the window)
        self.counts = dict(
            search_hits=0, search_misses=0, attention_hits=0, attention_misses=0, moved_bytes=0
        )

    @stateful.rule(tokens=st.integers(1, 9))
    def append(self, tokens):
        new = slice(self.length, min(self.length + tokens, 70))
        self.cache.append(0, self.k[:, :, new].to(DEVICE), self.v[:, :, new].to(DEVICE))
        self.counts["moved_bytes"] += 2 * self.k[:, :, new].nbytes
        self.length = new.stop

    @stateful.precondition(lambda self: self.length > 0)
    @stateful.rule(data=st.data())
    def attend(self, data):
        last = (self.length - 1) // 4
        start = max(1, data.draw(st.integers(last - 2, last)))
        chosen = st.sets(st.integers(1, start - 1), max_size=2) if start > 1 else st.just(set())
        asked = data.draw(
            st.sampled_from([data.draw(st.tuples(chosen, chosen, st.just(start))), *self.asked[-3:]])
        )
        if last - asked[2] <= 2:  # the window has not grown too long
            self.ask(asked)

    def ask(self, asked):
        last = (self.length - 1) // 4
        self.asked.append(asked)
        blocks = torch.tensor([(sorted(x) + [-1, -1])[:2] for x in asked[:2]], dtype=torch.int32)
        selection = Selection(blocks[None, :, None], torch.tensor([asked[2] * 4]))
        q, k, v, pages = (
            self.q[:, :, :1],
            *(x[:, :, : self.length] for x in (self.k, self.v)),
            self.cache.layer(0),
        )
        o = self.run.sparse_attention(q, k, v, selection, self.CFG)
        assert torch.equal(self.run.sparse_attention(q, pages, pages, selection, self.CFG), o)
        bank, self.calls = self.cache.banks[0][1], self.calls + 1
        for head in (0, 1):
            before, used, needed = (
                self.near[head],
                self.used[head],
                {0, *asked[head], *range(asked[2], last + 1)},
            )
            near = self.near[head] = {x for x in bank.page_of[head].tolist() if x < bank.pages}
            gone, idle = before - near, (before & near) - needed
            assert near == before - gone | needed and len(gone) == max(0, len(before | needed) - bank.slots)
            assert all(used[x] <= used[y] for x in gone for y in idle)  # the least recently used
            self.counts["attention_hits"] += len(needed & before)
            self.counts["attention_misses"] += len(needed - before)
            self.counts["moved_bytes"] += len(needed - before) * 2 * 4 * 32 * 4
            used.update(dict.fromkeys(needed, self.calls))

    @stateful.invariant()
    def what_is_counted_has_happened(self):
        assert self.cache.counts() == self.counts
        assert self.cache.resident_tokens() == 4 * max(map(len, self.near)) <= self.cache.bound


def test_an_offloaded_cache_driven_at_random_gives_up_the_least_recently_used_page(run):
    machine = type("DecodingOf", (Decoding,), dict(run=run))
    scripted = machine()
    scripted.append(70)
    for chosen in [(1, 2), (5, 6), (9, 10), (1, 2), (7, 7), (9, 10), (5, 6)]:  # given up, wanted again; twice
        scripted.ask((chosen, chosen[::-1], 15))
        scripted.what_is_counted_has_happened()
    how = dict(max_examples=8, phases=[Phase.generate]) if run.kernels else dict(max_examples=40)
    stateful.run_state_machine_as_test(machine, settings=settings(**how, stateful_step_count=25))


@given(st.sampled_from([2, 4, 8]), st.integers(1, 12), st.lists(st.integers(1, 12), min_size=1, max_size=12))
def test_what_a_step_attends_to_stays_right_while_tokens_are_appended(block_k, often, pieces):
    more = dict(top_k=8, block_k=block_k, stride_k=1, window=5, sink=3, block_q=4)
    cfg = HiPConfig(**more, refresh_interval=often).decoding
    q, k, v = torch.randn(3, 1, 2, 200, 4, generator=torch.Generator().manual_seed(0))
    cache, T = hip.OffloadedKVCache((1, 1, 2, 200, 4), 2, cfg, torch.float32), 0
    for step, new in enumerate([60, *pieces]):
        cache.append(0, k[:, :, T : T + new], v[:, :, T : T + new])
        T, pages, query = T + new, cache.layer(0), q[:, :, step : step + 1]
        near = k[:, :, :T], v[:, :, :T]
        selection = hip.select_blocks(query, near[0], cfg)
        (at, *kept), (same, *wanted) = (
            hip.attended(query, *kv, selection, cfg) for kv in ((pages,) * 2, near)
        )
        assert torch.equal(at, same)
        n = int((at[0, 0] < T).sum())
        for x, y in zip(kept, wanted, strict=True):
            assert torch.equal(x[:, :, :n], y[:, :, :n])
        for _ in range(min(new % often, 200 - T)):  # of some that share the selection, too
            cache.append(0, k[:, :, T : T + 1], v[:, :, T : T + 1])
            T, n = T + 1, n + 1
            assert int(at[0, 0, n - 1]) == T - 1
            for x, y in zip(kept, (k, v), strict=True):
                assert torch.equal(x[:, :, n - 1], y[:, :, T - 1])
        if T > 180:
            break


def test_the_tokens_on_the_device_grow_as_the_logarithm_of_the_text():
    cfg = HiPConfig()
    bounds = [hip.OffloadedKVCache((1, 1, 1, 2**n, 4), 1, cfg, torch.float32).bound for n in (16, 17, 18, 19)]
    assert [b - a for a, b in itertools.pairwise(bounds)] == [2 * cfg.top_k // cfg.stride_k] * 3
    near = cfg.sink + cfg.top_k + cfg.window + cfg.refresh_interval
    rounds = 16 - math.log2(cfg.top_k)
    assert 0 <= bounds[0] - rounds * 2 * cfg.top_k // cfg.stride_k - near < 4 * cfg.block_k


def test_a_file_of_an_offloaded_cache_cannot_be_found_or_outlive_it(tmp_path):
    cache = hip.OffloadedKVCache((1, 1, 1, 100, 4), 1, SMALL, torch.float32, store="disk", folder=tmp_path)
    cache.append(0, *torch.ones(2, 1, 1, 50, 4))
    assert list(tmp_path.iterdir()) == []
    assert all(x.shape == (1, 1, 50, 4) and (x == 1).all() for x in cache.read(0))


NOT_TO_BE_HAD = {
    "store must be host or disk, not 'tape'": dict(store="tape"),
    "a file, which cannot be had in /no/such: No such file": dict(store="disk", folder="/no/such"),
    "a file, which cannot be had in /proc": dict(store="disk", folder="/proc"),
    "3200000.0 GB in a file, which cannot be had in ": dict(store="disk", tokens=10**14),
    "needs 3200000.0 GB of host memory: too much; store it on disk": dict(tokens=10**14),
}


@pytest.mark.parametrize("words", NOT_TO_BE_HAD)
def test_an_offloaded_cache_that_cannot_be_had_is_refused(words):
    more = dict(tokens=100) | NOT_TO_BE_HAD[words]
    with pytest.raises(ValueError, match=words):
        hip.OffloadedKVCache((1, 1, 1, more.pop("tokens"), 4), 1, SMALL, torch.float32, **more)


def test_an_offloaded_cache_refuses_what_it_cannot_hold_or_serve(run):
    cache = run.module.OffloadedKVCache((1, 1, 2, 99, 32), 4, SMALL, torch.float32, DEVICE)
    new = torch.ones(2, 1, 2, 100, 32, device=DEVICE)
    for tokens in (100, 2):
        with pytest.raises(ValueError, match="the cache holds 99 tokens, and 100 are too many"):
            cache.append(0, *new[:, :, :, :tokens])
        cache.append(0, *new[:, :, :, : tokens - 2])
    pages, q = cache.layer(0), torch.ones(1, 4, 2, 32)
    none = hip.no_blocks(q, pages.shape, SMALL)
    wrong = (q, SMALL, "2 queries"), (q[:, :, :1], replace(SMALL, block_k=8), "of 8")
    for b_q, cfg, words in (*wrong, (q[:, :, :1], replace(SMALL, stride_k=1), "stride_k 1")):
        for call in (
            lambda q=b_q, cfg=cfg: run.select_blocks(q, pages, cfg),
            lambda q=b_q, cfg=cfg: run.sparse_attention(q, pages, pages, none, cfg),
        ):
            with pytest.raises(ValueError, match=f"offloaded cache is for single queries .* of 4 .*{words}"):
                call()


# --- the kernels -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton")
    return importlib.import_module("hip_triton")


def test_hip_triton_has_the_signatures_of_the_reference(kernels):
    for name in ("select_blocks", "sparse_attention", "hip_attention", "OffloadedKVCache"):
        assert inspect.signature(getattr(kernels, name)) == inspect.signature(getattr(hip, name))


def test_the_search_keeps_nothing_for_gradients():
    case, kept = Case(1, 2, 1, 40, 150, 8, "normal", torch.float32, 0, SMALL), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, kept.append):
        hip.select_blocks(case.q.requires_grad_(), case.k.requires_grad_(), SMALL)
        hip.oracle_blocks(case.q, case.k, SMALL)
    assert not kept


@pytest.mark.parametrize("Tq", [1, 40])  # of few query blocks keys are taken from where they are, else copied
@pytest.mark.parametrize("score", ["max", "mass"])
def test_every_nth_key_of_a_block_takes_part_in_full_precision(run, score, Tq):
    cfg = replace(SMALL, top_k=32, block_k=8, stride_k=4, window=5, score=score)
    for number in range(3):
        case = Case(1, 2, 1, Tq, 150, 32, "normal", torch.float32, number, cfg, scale=1e-6)
        case.k *= 1e5  # more than 16 bits can hold
        selection = run.select(case)
        assert_chosen(selection, case, lambda block, found, case=case: search(case, block, [], found))
        if Tq == 1:
            cache = run.module.OffloadedKVCache((1, 1, 1, 150, 32), 2, cfg, torch.float32, DEVICE)
            cache.append(0, *to(DEVICE, (case.k, case.v)))
            assert torch.equal(run.select(case, k=cache.layer(0)).blocks, selection.blocks)


@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("blocks", [0, 1, 4, 5, 8, 9])
def test_the_last_query_block_on_the_edges_of_its_domain(run, heads, blocks):
    # it has one row, and stands exactly so many blocks behind the sink, or one position before that
    cfg = HiPConfig(top_k=32, block_k=8, block_q=16, stride_q=4, sink=3, window=5, score="max")
    for missing in (0, 1):
        Tk = max(17, 8 + 8 * blocks + 4 + 1 - missing)
        case = Case(1, *heads, 17, Tk, 32, "whole", torch.float32, blocks, cfg)
        selection = run.select(case)
        assert_chosen(selection, case, lambda block, found, case=case: search(case, block, [], found))
        assert_attention(run.attend(case, selection), case, selection)
        assert Tk == 17 or (selection.blocks[0, 0, -1] >= 0).sum() == min(4, blocks - missing)


@pytest.mark.parametrize("clip", [None, 20])
def test_how_many_tokens_a_cache_has_may_be_known_on_the_device_alone(kernels, clip):
    cfg = replace(SMALL, rope_clip=clip)
    case = Case(1, 6, 2, 1, 50, 32, "normal", torch.float32, 0, cfg, old="wild", width=9)
    rope, previous = to(DEVICE, (case.rope, case.previous))
    caches = [torch.full((1, 2, 60, 32), math.nan, device=DEVICE) for _ in "kv"]
    length = torch.tensor([1], device=DEVICE)
    begun = [kernels.Begun(x, length) for x in caches]
    for end in range(1, 51):
        h = torch.cat([case.q + end, *(x[:, :, end - 1 : end] for x in (case.k, case.v))], 1).to(DEVICE)
        q = torch.empty(1, 6, 1, 32, device=DEVICE)
        kernels.fill(h, None, q, *begun)
        if end in (1, 2, 17, 49, 50):
            k, v = (x[:, :, :end] for x in caches)
            named = dict(previous=previous, rope=rope)
            wanted, got = (kernels.select_blocks(q, x, cfg, **named) for x in (k, begun[0]))
            assert all(map(torch.equal, got, wanted))
            o = kernels.sparse_attention(q, *begun, got, cfg, rope=rope)
            assert torch.equal(o, kernels.sparse_attention(q, k, v, got, cfg, rope=rope))
        length += 1
    assert all(torch.equal(x[:, :, :50].cpu(), y) for x, y in zip(caches, (case.k, case.v), strict=True))
    assert all(x[:, :, 50:].isnan().all() for x in caches)
    for wrong in (length.int(), length.repeat(2)):
        with pytest.raises(ValueError, match="length must be"):
            kernels.select_blocks(q, kernels.Begun(caches[0], wrong), cfg, rope=rope)


@pytest.mark.parametrize("C", [1, 80, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_and_gates_of_a_model_are_those_of_the_reference(kernels, C, dtype):
    g = torch.Generator().manual_seed(C)
    whole, more, weight = (
        torch.randn(n, generator=g).to(DEVICE, dtype) for n in ((2, 5, 2 * C), (2, 3, 2 * C), 2 * C)
    )

    def results(module, kind):
        x, y, w = (x.to(kind, copy=True) for x in (whole[:, 1:4], more, weight))
        x = torch.cat([x.new_full((2, 1, 2 * C), math.nan), x], 1)[:, 1:]  # not in one piece
        return module.norm(w, 1e-3, x), module.norm(w, 1e-3, x, y), x, module.gated(x)

    exact, plain, found = results(model, torch.float32), results(model, dtype), results(kernels, dtype)
    for x, y, z in zip(found, plain, exact, strict=True):
        assert x.dtype == dtype and (x - z).abs().max() <= 2 * (y - z).abs().max() + 1e-5 * z.abs().max()
    assert torch.equal(found[2], plain[2])


@pytest.mark.parametrize(
    "method, change, store",
    [("dense", {}, None), ("hip", {}, "host"), ("hip", dict(rope_clip=25, dense_layers=1), None)],
    ids=str,
)
def test_a_model_reads_and_decodes_by_the_kernels_as_by_the_reference(kernels, method, change, store):
    sizes = dict(width=64, layers=2, heads=4, kv_heads=2, head_size=32, hidden=48, vocabulary=99, context=200)
    config = model.ModelConfig("qwen3", **sizes, norm_eps=1e-6, rope_theta=1e4, rope_divisor=(), tied=True)
    g = torch.Generator().manual_seed(0)
    weights = {x: torch.randn(shape, generator=g).to(DEVICE) / 8 for x, shape in config.shapes().items()}
    tokens = torch.randint(99, (1, 61), generator=g)
    cfg, results, misses = replace(SMALL, refresh_interval=3, dense_tail=5, **change), [], []
    for module in (hip, kernels, kernels)[: 2 + GPU]:
        offload = store and dict(store=store)
        context = model.Context(model.Llama(config, weights), 61, cfg, method, module, offload=offload)
        if len(results) == 2:  # eager, where a GPU would have recorded steps
            context.replay = lambda x, search, step=context.step: step(x)
        hidden = [context.prefill(tokens[:, :45])]
        hidden += [context.decode(tokens[:, i : i + 1]) for i in range(45, 53)]
        hidden += [context.prefill(tokens[:, 53:56])]  # a further question
        hidden += [context.decode(tokens[:, i : i + 1]) for i in range(56, 61)]
        results.append((torch.cat(hidden, 1).cpu(), context.scores, context.dense_scores))
        misses.append(context.cache.counts()["attention_misses"] if store else 0)
    (wanted, *counts), (got, *others), (eager, *_) = (*results, results[-1])[:3]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(got, eager) and counts == others
    assert misses[1] == misses[-1] >= misses[0] >= (store is not None)  # hip.py looks when it searches


@pytest.mark.parametrize("Tq", [1, 5, 7, 8, 16])
def test_decoding_with_many_rows_for_a_key_head(run, Tq):
    # 9 heads of a group: just below and above the number of rows up to which kernels share out the keys
    case = Case(2, 9, 1, Tq, 75, 32, "normal", torch.float32, Tq, SMALL)
    selection = run.select(case)
    assert_attention(run.attend(case, selection), case, selection)


@pytest.fixture
def bounds(kernels, monkeypatch):
    """Makes the interpreter refuse what is read or written outside of the tensors that a kernel is given."""
    if DEVICE != "cpu":
        pytest.skip("a GPU has compute-sanitizer for this")
    from triton.runtime import interpreter

    known, run = [], interpreter.InterpretedFunction.run

    def noted(self, *arguments, **named):
        tensors = [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor) and x.numel()]
        last = [sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) for x in tensors]
        known[:] = [(x.data_ptr(), x.data_ptr() + n * x.itemsize) for x, n in zip(tensors, last, strict=True)]
        return run(self, *arguments, **named)

    for name, place in ("create_masked_load", 0), ("create_masked_store", 1):  # where the mask stands
        plain = getattr(interpreter.InterpreterBuilder, name)

        def touch(self, pointers, *more, name=name, place=place, plain=plain):
            at = pointers.data[more[place].data.astype(bool)]
            inside = np.any([(first <= at) & (at <= last) for first, last in known], 0)
            assert inside.all(), f"{name}: {at[~inside]} is outside of {known}"
            return plain(self, pointers, *more)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, touch)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", noted)


@pytest.mark.parametrize("clip", [None, 9])
@pytest.mark.parametrize("block_q", [16, 64])  # of 64 rows of a head two programs share the work
@pytest.mark.parametrize("Tq", [1, 65])  # the last query block has one row
def test_no_kernel_touches_memory_outside_of_its_tensors(bounds, kernels, Tq, block_q, clip):
    cfg = replace(SMALL, block_q=block_q, rope_clip=clip, score="mass")
    for heads, Tk in (((1, 1), 150), ((3, 1), 143)):
        case = Case(2, *heads, Tq, Tk, 128, "normal", torch.float32, Tk, cfg)
        x = dict(k=case.k, cfg=cfg, rope=case.rope)
        old = kernels.select_blocks(case.q, **x)
        kernels.sparse_attention(
            case.q, v=case.v, selection=kernels.select_blocks(case.q, previous=old, **x), **x
        )
    cache = kernels.OffloadedKVCache((1, 2, 1, 143, 128), 3, cfg, torch.float32)
    cache.append(0, case.k, case.v)
    pages = cache.layer(0)
    chosen = kernels.select_blocks(case.q[:, :, -1:], pages, cfg, rope=case.rope)
    kernels.sparse_attention(case.q[:, :, -1:], pages, pages, chosen, cfg, rope=case.rope)


def apart(*command):
    """Run Python without the interpreter of Triton."""
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=plain, cwd=HERE)


def test_hip_triton_refuses_what_it_cannot_run_and_says_what_to_do(kernels):
    x, y = (torch.zeros(1, 1, 4, D, device=DEVICE) for D in (40, 64))
    for call in (kernels.select_blocks, lambda q, k, cfg: kernels.hip_attention(q, k, k, cfg)):
        with pytest.raises(ValueError, match="q must have a head size D of .*, not 40; hip.py takes any"):
            call(x, x, SMALL)
    far = Selection(torch.zeros(1, 1, 1, 2, dtype=torch.int32, device="meta"), torch.zeros(1).long())
    with pytest.raises(ValueError, match="selection must be on .* like q, not on meta"):
        kernels.sparse_attention(y, y, y, far, SMALL)
    if not GPU:
        with pytest.raises(ValueError, match="interpreter is wrong in bfloat16"):
            kernels.select_blocks(y.bfloat16(), y.bfloat16(), SMALL)
    code = "import torch, hip, hip_triton as t; x = torch.zeros(1, 1, 4, 64); "
    code += "t.hip_attention(x, x, x, hip.HiPConfig())"
    assert "ValueError: q must be on a GPU" in apart("-c", code).stderr
    code = "import sys; sys.modules['triton'] = None; import hip_triton"
    assert "ImportError: hip_triton needs Triton: `pip install triton`" in apart("-c", code).stderr


def test_hip_triton_compiles_for_real_chips_without_spilling(kernels):
    # a sample; `extras/prove.py compile` without more compiles all of them
    names = ["search", "search-step", "attention", "split", "merge", "norm", "find", "copy"]
    done = apart(
        "extras/prove.py",
        "compile",
        "--target",
        "sm_80",
        "sm_90",
        "--dtype",
        "bfloat16",
        "--dim",
        "64",
        "128",
        "--kernel",
        *names,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MMA" in done.stdout and done.stdout.count("\n| ") >= 4 * len(names)


@pytest.mark.skipif(not GPU, reason="there is nothing to wait for")
def test_hip_triton_decodes_from_an_offloaded_cache_without_waiting_for_the_device(kernels):
    cfg, new = HiPConfig(top_k=64, window=64), torch.randn(4, 1, 2, 3000, 64, device=DEVICE).bfloat16()
    cache = kernels.OffloadedKVCache((1, 1, 2, 4096, 64), 4, cfg, torch.bfloat16, DEVICE)
    cache.append(0, *new[:2])
    selection = None
    try:
        for step in range(40):
            cache.append(0, *new[:2, :, :, step : step + 1])
            q, pages = new[2:, 0, :, step : step + 1].reshape(1, 4, 1, 64), cache.layer(0)
            if step % 8 == 0:
                selection = kernels.select_blocks(q, pages, cfg, selection)
            kernels.sparse_attention(q, pages, pages, selection, cfg)
            if step == 16:  # all is compiled
                torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
