"""The specification as tests.

First HiP itself (hip.py, and hip_triton.py where it can run), then the model and the command line.  Small
whole numbers as inputs make every score exact, with many ties, so that selections must be equal to the last block.
"""

import importlib.util
import inspect
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hip
from hip import HiPConfig, Selection, dense_attention, hip_attention, select_blocks, sparse_attention

settings.register_profile("hip", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("hip")
HERE = Path(__file__).parent

# --- cases ------------------------------------------------------------------------------------------------

FAMILIES = ("normal", "whole", "constant", "spike", "huge")


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


def select_naively(q, k, cfg, previous=None):
    """The search in plain loops, from DESIGN section 3 alone: a list of block numbers per (b, h, query block)."""
    (B, H, Tq, _), (Hkv, Tk) = q.shape, k.shape[1:3]
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
            keys = range(block * cfg.block_k, (block + 1) * cfg.block_k, cfg.stride_k)
            return max(
                float(q[b, h, r].float() @ k[b, h // (H // Hkv), t].float()) for r in rows for t in keys
            )

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


def as_lists(selection):
    blocks = selection.blocks
    return {
        (b, h, i): [x for x in blocks[b, h, i].tolist() if x >= 0]
        for b in range(blocks.shape[0])
        for h in range(blocks.shape[1])
        for i in range(blocks.shape[2])
    }


def attend_naively(q, k, v, selection, cfg, dtype=torch.float32):
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
    s = (q.to(dtype) @ k.transpose(2, 3) * D**-0.5).masked_fill(~allowed, -math.inf)
    return s.softmax(-1) @ v


def kept_mass(scores, selection, cfg):
    """Sum over query blocks of the exp-scores (B, H, NQ, blocks) that a selection keeps."""
    blocks = selection.blocks.long()
    return (scores.exp().gather(3, blocks.clamp(min=0)) * (blocks >= 0)).sum(-1)


# --- the configuration and the door ---------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="previous must"):
        select_blocks(q, k, cfg, select_blocks(q[:, :2], k, cfg))


# --- the search -------------------------------------------------------------------------------------------


@given(whole(most_tokens=150), st.booleans())
def test_the_search_is_the_one_of_the_design(case, remember):
    q, k, _, cfg = case
    previous = hip.random_blocks(q, k, cfg, torch.Generator().manual_seed(1)) if remember else None
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


# --- attention ----------------------------------------------------------------------------------------------


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


# --- the kernels: everything again through hip_triton.py --------------------------------------------------------

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
KERNEL_DTYPES = (torch.float32, torch.float16) + (
    (torch.bfloat16,) if GPU else ()
)  # the interpreter has no bf16
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
few = settings(max_examples=12)


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


def run(function, *arguments):
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
    previous = hip.random_blocks(q, k, cfg, torch.Generator().manual_seed(1)) if remember else None
    found, wanted = run(kernels.select_blocks, q, k, cfg, previous), select_blocks(q, k, cfg, previous)
    assert found.blocks.dtype == torch.int32 and found.window_start.dtype == torch.int64
    assert torch.equal(found.blocks, wanted.blocks) and torch.equal(found.window_start, wanted.window_start)


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
    close_enough(run(kernels.sparse_attention, q, k, v, selection, cfg), q, k, v, selection, cfg)


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
    selection = run(kernels.select_blocks, q2, k2, cfg)
    assert torch.equal(selection.blocks, select_blocks(q, k, cfg).blocks)
    o = run(kernels.sparse_attention, q2, k2, v2, selection, cfg)
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
    selection = run(kernels.select_blocks, q, k, cfg)
    assert torch.equal(selection.blocks, select_blocks(q, k, cfg).blocks)
    if Tk > Tq:
        assert (selection.blocks[:, :, -1] >= 0).sum(-1).unique().tolist() == [min(4, blocks)]
    close_enough(run(kernels.sparse_attention, q, k, v, selection, cfg), q, k, v, selection, cfg)


@needs_triton
def test_triton_refuses_what_it_cannot_run_and_says_what_to_do(kernels):
    x, cfg = torch.zeros(1, 1, 4, 40, device=DEVICE), HiPConfig()
    with pytest.raises(ValueError, match="head size"):
        kernels.select_blocks(x, x, cfg)
    y = torch.zeros(1, 1, 4, 64, device=DEVICE)
    with pytest.raises(ValueError, match="k must"):
        kernels.select_blocks(y, y.half(), cfg)
    code = "import torch, hip, hip_triton as h; x = torch.zeros(1, 1, 4, 64); h.select_blocks(x, x, hip.HiPConfig())"
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain, cwd=HERE)
    assert "ValueError: q must be on a GPU" in done.stderr
    code = "import sys; sys.modules['triton'] = None; import hip_triton"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain, cwd=HERE)
    assert "ImportError: hip_triton needs Triton: `pip install triton`" in done.stderr
