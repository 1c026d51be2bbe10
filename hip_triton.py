"""HiP attention as Triton kernels: the public functions of hip.py, same names, same order, same results.

Read hip.py first; it says what is computed and why.  This file says how a GPU does it:

    search_kernel     one launch: a program owns one query block of one search and runs all rounds of the tree
                      search in registers; scores never reach memory and the host never waits
    attention_kernel  flash attention (one pass, running maximum and sum) over a query block's own tokens
    split_kernel      the same for decoding, where there are few queries: programs share out the tokens ...
    merge_kernel      ... and this one adds up their parts
    norm_kernel       of a model: a sum and its norm ...
    gated_kernel      ... the middle of its feed-forward part ...
    fill_kernel       ... and what it has projected, rotated, keys and values in its cache
    find_kernel       of an offloaded cache: finds room for the pages that a query attends to ...
    copy_kernel       ... and brings those in that were missing

All rows of a query block, `block_q` queries of each head of its group, share the keys that are gathered.

Glossary.  Names as in hip.py: B, H, Hkv, S, Tq, Tk, D, NQ, M, and f, l for a node [f, l) of the search.
    i_  index of a program or of the thing it owns       o_  offsets along a dimension       m_  mask
    p_  pointer, after set-up to the program's own part  b_  a block of values in registers
    s_  the four strides of a (B, H, T, D) tensor        BLOCK_D  D rounded up to a power of two
    GROUP  query heads that share a search, H / S        SHARED  searches that share a key head, S / Hkv
Capitals are compile-time constants.  Tq and Tk are not, so that a longer text compiles nothing anew.

Layout is (B, H, T, D) with any strides.  Products accumulate in float32, and float32 inputs multiply in full
precision (IEEE, never tf32).  Within a head offsets have 32 bits where they suffice (OFFSET).  Runs with
Triton 3.6 to 3.9 on NVIDIA and AMD, and without a GPU in Triton's interpreter (TRITON_INTERPRET=1 set before
the import; not in bfloat16).  There are no gradients.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import hip
from hip import HiPConfig, Keys, Pages, Rope, Selection

try:
    import triton
    import triton.language as tl
except ImportError as e:
    raise ImportError("hip_triton needs Triton: `pip install triton` (Linux), or use hip.py") from e

HEAD_SIZES = (32, 64, 80, 96, 128, 256)
NO_BLOCK, LOWEST = tl.constexpr(hip.NO_BLOCK), tl.constexpr(hip.LOWEST)
INF = tl.constexpr(math.inf)
PAIRS = tl.constexpr(8192)  # comparisons that `before` and `best` have in registers at once


class Begun(NamedTuple):
    """The first tokens of a cache, in place of k or of v in decoding: how many, is read on the device.

    So a decoding step is the same for any number, and can be recorded as a CUDA graph.
    """

    rows: Tensor | Pages  # (B, Hkv, tokens, D)
    length: Tensor  # (1,) int64, at least 1


def without_length(*kv: Keys | Begun) -> tuple:
    """Keys, or keys and values, and the length that they have on the device, or None."""
    begun = isinstance(kv[0], Begun)
    return *(x.rows if begun else x for x in kv), kv[0].length if begun else None


# --- scores ------------------------------------------------------------------------------------------------


@triton.jit
def head(p, s, i_b, i_h):
    """Where a head of a (B, H, T, D) tensor begins."""
    return p + i_b.to(tl.int64) * s[0] + i_h.to(tl.int64) * s[1]


@triton.jit
def tokens_of(p_length, Tk):
    """How many tokens there are: Tk, unless that is to be read on the device."""
    if p_length is not None:
        Tk = tl.load(p_length).to(tl.int32)
    return Tk


@triton.jit
def load_rows(p, s_d, o_row, m_row, table, o_at, D: tl.constexpr):
    """Rows at offsets o_row (N,), as a tuple: (N, BLOCK_D), or with a table two halves (N, BLOCK_D / 2).

    Where positions are clipped a head has halves because the points that are turned are (d, d + D / 2); this
    turns them, for positions o_at (N,), and rounds to the dtype.  Equals hip.rotate.
    Masks: m_row (N,) rows to load, others are 0; the padding of D; positions above 0, since nothing turns
    there: so most keys, which are far, read no table.
    """
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    if table is None:
        o_d = tl.arange(0, BLOCK_D)
        p += o_row[:, None] + o_d[None, :] * s_d
        b_rows = (tl.load(p, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0),)
    else:
        o_d = tl.arange(0, BLOCK_D // 2)
        p += o_row[:, None] + o_d[None, :] * s_d
        m, o_table = m_row[:, None] & (o_d < D // 2)[None, :], o_at[:, None] * (D // 2) + o_d[None, :]
        b_a, b_b = tl.load(p, mask=m, other=0.0), tl.load(p + D // 2 * s_d, mask=m, other=0.0)
        m &= (o_at > 0)[:, None]
        b_cos = tl.load(table[0] + o_table, mask=m, other=1.0)
        b_sin = tl.load(table[1] + o_table, mask=m, other=0.0)
        b_x, b_y = b_a.to(tl.float32), b_b.to(tl.float32)
        b_rows = (b_x * b_cos - b_y * b_sin).to(b_a.dtype), (b_y * b_cos + b_x * b_sin).to(b_b.dtype)
    return b_rows


@triton.jit
def products(b_q, keys, o_t, o_p, m_t, D: tl.constexpr):
    """q . k of rows of `load_rows` and the keys at positions o_t (T,): (R, T) float32.

    keys: pointer, strides of a token and of a number, rotary table or None, position that it calls 0.
    o_p (T,): where the keys are, o_t unless that is a bank.  Masks: m_t (T,) keys to load, others count as 0.
    """
    p_k, s_t, s_d, table, origin = keys
    b_k = load_rows(p_k, s_d, o_p * s_t, m_t, table, tl.maximum(o_t - origin, 0), D)  # hip.rotated
    b_s = tl.dot(b_q[0], tl.trans(b_k[0]), input_precision="ieee")
    if table is not None:
        b_s = tl.dot(b_q[1], tl.trans(b_k[1]), b_s, input_precision="ieee")
    return b_s


@triton.jit
def soften(b_s, b_m, b_l):
    """Scores (R, T) join a running softmax of powers of two, maximum b_m (R,) and sum b_l (R,).

    Returns their powers, by what older powers shrink, maximum and sum.  A row may have nothing yet.
    """
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    b_top = tl.where(tl.abs(b_new) == INF, 0.0, b_new)
    b_p, b_old = tl.exp2(b_s - b_top[:, None]), tl.exp2(b_m - b_top)
    return b_p, b_old, b_new, b_l * b_old + tl.sum(b_p, 1)


# --- the search --------------------------------------------------------------------------------------------


@triton.jit
def before(b_a, b_b):
    """How many of the pairs (a, b) (C,) go before each: with higher a, or equal a and lower b."""
    C: tl.constexpr = b_a.shape[0]
    SLICE: tl.constexpr = max(1, min(C, PAIRS // C))
    o_rank = tl.zeros([C], tl.int32)
    for x in range(0, C, SLICE):
        o_x = x + tl.arange(0, SLICE)
        b_xa, b_xb = tl.gather(b_a, o_x, 0)[:, None], tl.gather(b_b, o_x, 0)[:, None]
        m = (b_xa > b_a[None, :]) | ((b_xa == b_a[None, :]) & (b_xb < b_b[None, :]))
        o_rank += tl.sum(m.to(tl.int32), 0)
    return o_rank


@triton.jit
def best(b_score, b_order, KEEP: tl.constexpr):
    """Where the KEEP best scores stand, the best first; of equals the lower order.  Chooses as hip.best.

    Every score is compared with every other: a few hundred of them are ranked sooner than sorted.
    """
    C: tl.constexpr = b_score.shape[0]
    SLICE: tl.constexpr = max(1, min(C, PAIRS // C))
    o_rank, o_keep = before(b_score, b_order), tl.zeros([KEEP], tl.int32)
    for x in range(0, C, SLICE):
        o_x = x + tl.arange(0, SLICE)
        m = tl.gather(o_rank, o_x, 0)[:, None] == tl.arange(0, KEEP)[None, :]
        o_keep += tl.sum(tl.where(m, o_x[:, None], 0), 0)
    return o_keep


@triton.jit
def side_by_side(b_x, b_y):
    """(M,) and (M,) as (2 * M,), one behind the other."""
    return tl.reshape(tl.permute(tl.join(b_x, b_y), (1, 0)), 2 * b_x.shape[0])


@triton.jit
def score_blocks(
    b_q,
    b_seen,
    keys,
    b_block,
    count,
    scale,
    MASS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STRIDE_K: tl.constexpr,
    TILE: tl.constexpr,
):
    """Scores of the first `count` of b_block (C,), of others anything; -inf where it is -1: hip.score_blocks.

    TILE keys at a time: the first key of each of its blocks, then the second of each, and so on, so that a
    thread has all keys of a block in its own registers.  Masks: m_s blocks to look at (a domain ends before
    the keys do, so none can overrun).
    """
    C: tl.constexpr = b_block.shape[0]
    KEYS: tl.constexpr = BLOCK_K // STRIDE_K
    SHARE: tl.constexpr = TILE // KEYS  # blocks of one tile
    o_c, o_in = tl.arange(0, C), tl.arange(0, KEYS) * STRIDE_K
    b_score = tl.full([C], -INF, tl.float32)
    for i in range(0, count, SHARE):
        o_s = i + tl.arange(0, SHARE)
        b_s = tl.gather(b_block, tl.minimum(o_s, C - 1), 0)
        m_s = (o_s < count) & (b_s >= 0)
        m_t = tl.reshape(tl.broadcast_to(m_s[None, :], KEYS, SHARE), TILE)
        o_t = tl.reshape(o_in[:, None] + b_s[None, :] * BLOCK_K, TILE)
        b_s = products(b_q, keys, o_t, o_t, m_t, D)
        b_s = tl.max(tl.reshape(b_s, b_s.shape[0], KEYS, SHARE), 1) * scale  # (R, SHARE) loudest of each row
        b_s -= b_seen[:, None]
        b_new = tl.max(b_s, 0)
        if MASS:
            b_top = tl.where(tl.abs(b_new) == INF, 0.0, b_new)
            b_new = b_top + tl.log2(tl.sum(tl.exp2(b_s - b_top[None, :]), 0))
        b_new = tl.where(m_s, tl.where(b_new > LOWEST, b_new, LOWEST), -INF)
        b_score = tl.where(o_c // SHARE == i // SHARE, tl.gather(b_new, o_c % SHARE, 0), b_score)
    return b_score


@triton.jit(do_not_specialize=["Tq", "Tk", "W"])
def search_kernel(
    p_q,
    p_k,
    p_previous,
    p_blocks,
    p_start,
    p_length,
    table,
    s_q,
    s_k,
    Tq,
    Tk,
    W,
    scale,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    LO: tl.constexpr,
    WINDOW: tl.constexpr,
    M: tl.constexpr,
    REPRESENTATIVE: tl.constexpr,
    MASS: tl.constexpr,
    PER: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Choose M blocks by tree search.  Equals hip.select_blocks.

    Grid (NQ, S, B); a program owns one query block of one search, with all of its rounds: row r is query
    r % PER of those that search, of head r // PER of the group.  p_previous: (B, S, NQ, W) blocks, W = 0 for
    none; p_blocks: (B, S, NQ, M); int32.  p_start: (NQ,) int64.  table: cos and sin, or None; contiguous all.
    scale: with MASS times log2(e), since scores are powers of two then.
    Masks: m_r rows that exist, m_t tokens of sink and window that exist, the causal mask there, m_old
    previous blocks of this domain, m_real branches that are not empty.  Scores are float32.
    """
    i_n, i_s, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_g = (i_b * tl.num_programs(1) + i_s).to(tl.int64) * tl.num_programs(0) + i_n
    Tk = tokens_of(p_length, Tk)
    start = Tk - Tq + i_n * BLOCK_Q  # position of the block's first query
    hi = tl.maximum((start - WINDOW + 1) // BLOCK_K, LO)
    tl.store(p_start + i_n, hi.to(tl.int64) * BLOCK_K)  # the same from all searches
    n = hi - LO

    o_r, o_x = tl.arange(0, ROWS), tl.arange(0, TILE)
    o_in = o_r % PER * STRIDE_Q
    o_row = i_n * BLOCK_Q + o_in
    m_r, o_own = (o_r < GROUP * PER) & (o_row < Tq), o_row + Tk - Tq
    o_row = (o_r // PER).to(tl.int64) * s_q[1] + o_row.to(tl.int64) * s_q[2]
    b_q = load_rows(head(p_q, s_q, i_b, i_s * GROUP), s_q[3], o_row, m_r, table, o_in + CLIP, D)
    s_t = tl.full([], 1, OFFSET) * s_k[2]
    keys = head(p_k, s_k, i_b, i_s // SHARED), s_t, s_k[3], table, start - CLIP

    b_seen = tl.zeros([ROWS], tl.float32)
    if MASS:  # what a row sees anyway; a sum of 1 shrinks to nothing when the first tile joins
        b_m, b_l = tl.full([ROWS], -INF, tl.float32), tl.full([ROWS], 1.0, tl.float32)
        end = tl.where(n > 0, tl.minimum(start + BLOCK_Q, Tk), 0)
        for x in range(0, end - n * BLOCK_K, TILE):
            o_t = x + o_x + tl.where(x + o_x < LO * BLOCK_K, 0, n * BLOCK_K)
            m_t = o_t < end
            b_s = products(b_q, keys, o_t, o_t, m_t, D) * scale
            b_s = tl.where(m_t[None, :] & (o_t[None, :] <= o_own[:, None]), b_s, -INF)
            _, _, b_m, b_l = soften(b_s, b_m, b_l)
        b_seen = b_m + tl.log2(b_l)
    b_seen = tl.where(m_r, b_seen, INF)  # a row that is none has no share

    # ceil(log2(n / M)) rounds, one at least, for the scores; then previous blocks, M at a time
    rounds = tl.sum(((tl.full([32], M, tl.int64) << tl.arange(0, 32).to(tl.int64)) < n).to(tl.int32))
    rounds = tl.where(n > 0, tl.maximum(rounds, 1), 0)
    more = tl.where(n > 2 * M, tl.cdiv(W, M), 0)  # where all were looked at, nothing is to be remembered
    o_m, o_c = tl.arange(0, M), tl.arange(0, 2 * M)
    b_f = LO + (n * o_m.to(tl.int64) // M).to(tl.int32)  # Alg. 1, l. 1: node j is the blocks [f, l)
    b_l = LO + (n * (o_m + 1).to(tl.int64) // M).to(tl.int32)
    b_score = tl.full([M], -INF, tl.float32)
    for r in range(rounds + more):
        # Alg. 1, l. 5-8: branch c is the left half of node c, or the right half of node c - M; behind the
        # rounds it is a previous block, or a node that was kept
        o_w = (r - rounds) * M + o_m
        b_old = tl.load(p_previous + i_g * W + o_w, mask=(o_w >= 0) & (o_w < W), other=-1)
        m_old = (b_old >= LO) & (b_old < hi)
        b_mid = tl.where(r < rounds, (b_f + b_l) // 2, b_f)
        b_cf = side_by_side(tl.where(r < rounds, b_f, b_old), b_mid)
        b_cl = side_by_side(tl.where(r < rounds, b_mid, b_old + m_old.to(tl.int32)), b_l)
        m_real = b_cf < b_cl
        if r >= rounds:  # each block once
            b_order = tl.where(m_real, b_cf, NO_BLOCK - o_c)
            m_real &= before(b_order, o_c) == before(b_order, tl.zeros_like(o_c))
            b_cl = tl.where(m_real, b_cl, b_cf)
        b_block = b_cf
        if REPRESENTATIVE == "center":
            b_block = (b_cf + b_cl) // 2
        elif REPRESENTATIVE == "last":
            b_block = b_cl - 1
        b_block = tl.where(m_real, b_block, -1)  # an empty branch has none
        # the score of what was kept is known, and in the last round that of the right half, which is the
        # block that spoke for the node
        known = (r >= rounds) | ((REPRESENTATIVE == "center") & (r > 0) & (r == rounds - 1))
        count = tl.where(known, M, 2 * M)
        b_new = score_blocks(b_q, b_seen, keys, b_block, count, scale, MASS, D, BLOCK_K, STRIDE_K, TILE)
        b_new = tl.where(o_c < count, b_new, side_by_side(b_score, b_score))  # l. 9-10
        b_new = tl.where(m_real, b_new, -INF)
        o_keep = best(b_new, tl.where(m_real, b_cf, NO_BLOCK - o_c), M)  # Alg. 1, l. 11
        b_f, b_l = tl.gather(b_cf, o_keep, 0), tl.gather(b_cl, o_keep, 0)
        b_score = tl.gather(b_new, o_keep, 0)
    o_place = before(tl.zeros_like(o_m), tl.where(b_f < b_l, b_f, NO_BLOCK - o_m))  # ascending, then -1
    tl.store(p_blocks + i_g * M + o_place, tl.where(b_f < b_l, b_f, -1))


def select_blocks(
    q: Tensor, k: Keys, cfg: HiPConfig, previous: Selection | None = None, *, scale=None, rope=None
) -> Selection:
    """hip.select_blocks in one launch: its arguments, result and errors, and the errors of `check_device`.

    k may be a `Begun`, too, and so may k and v of `sparse_attention`.
    Of an offloaded cache it reads the keys in the store.  hip.py searches where the device cannot reach that,
    and for a group of so many rows that they do not fit.
    """
    k, length = without_length(k)
    hip.check_call(q, (k,), cfg, scale, rope)
    check_device(q, previous or (), "previous")
    check_length(q, length, cfg.block_q)
    (B, H, Tq, D), (_, Hkv, Tk, _) = q.shape, k.shape
    S, NQ = H if cfg.per_head else Hkv, -(-Tq // cfg.block_q)
    group = cfg, H // S, S // Hkv, D, q.dtype
    constants = search_constants(*group, min(Tq, cfg.block_q))
    if previous is not None:
        hip.check_selection(previous, "previous", B, (S,), NQ)
    fits = length is not None or constants["ROWS"] * D <= MOST_QUERIES
    if not fits or isinstance(k, Pages) and not reachable(k.store[0], q.device):
        return hip.select_blocks(q, k, cfg, previous, scale=scale, rope=rope)
    if isinstance(k, Pages):
        k = k.store[0][:, :, :Tk]
    blocks = torch.empty(B, S, NQ, cfg.budget, dtype=torch.int32, device=q.device)
    start = torch.empty(NQ, dtype=torch.int64, device=q.device)
    old = blocks[..., :0] if previous is None else previous.blocks.int().contiguous()
    scale = (D**-0.5 if scale is None else scale) / (math.log(2) if cfg.score == "mass" else 1)
    sizes = q.stride(), k.stride(), Tq, Tk, old.shape[3], scale
    with torch.cuda.device_of(q):
        search_kernel[NQ, S, B](
            q, k, old, blocks, start, length, table(rope), *sizes, OFFSET=offset(k), **constants
        )
    return Selection(blocks, start)


def oracle_blocks(q: Tensor, k: Tensor, cfg: HiPConfig, *, scale=None, rope=None) -> Selection:
    """hip.oracle_blocks in one launch: a search that remembers every block."""
    return select_blocks(q, k, cfg, hip.every_block(q, k, cfg), scale=scale, rope=rope)


def table(rope: Rope | None) -> Rope | None:
    """The argument `table` of the kernels."""
    return None if rope is None else tuple(x.contiguous() for x in rope)


def offset(*tensors: Tensor) -> tl.dtype:
    """Whole numbers that can count what lies within a head."""
    most = max(x.shape[2] * x.stride(2) + x.shape[3] * x.stride(3) for x in tensors)
    return tl.int32 if most < 2**31 else tl.int64


# --- attention ---------------------------------------------------------------------------------------------


@triton.jit
def own_tokens(p_blocks, start, end, o_own, M: tl.constexpr, SINK: tl.constexpr, BLOCK_K: tl.constexpr):
    """How a query block's own tokens are counted through: chosen blocks, then sink, then window.

    Returns how many tokens M chosen blocks have, how many the sink has, how many there are in all, and the
    last that each row sees (R,), whose positions are o_own.  The window begins at `start`, and nobody sees
    tokens from `end` on.
    """
    o_m = tl.arange(0, triton.next_power_of_2(max(1, M)))
    b_block = tl.load(p_blocks + o_m, mask=o_m < M, other=-1)
    count, sink = tl.sum((b_block >= 0).to(tl.int32), 0) * BLOCK_K, tl.minimum(SINK, end)
    o_last = count + tl.where(o_own < sink, o_own, sink + tl.maximum(o_own - start, -1))
    return count, sink, count + sink + tl.maximum(end - start, 0), o_last


@triton.jit
def attend(
    first,
    last,
    b_acc,
    b_m,
    b_l,
    rows,
    keys,
    values,
    tokens,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of a query block's own tokens `first` to `last` join its rows' softmax: b_acc (R, D), b_m and b_l (R,).

    rows: queries, last tokens that they see, scale times log2(e); keys: as in `products`; values: pointer and
    two strides; tokens: chosen blocks, how many tokens they have, how many the sink has, where the window
    begins, one position behind all, `paged` of split_kernel and the number of the key head.
    Masks: m_t (T,) tokens that some row may see (no later key or value is loaded), and the causal mask; the
    padding of D.  Without MASKED all are tokens of chosen blocks, which every row sees.
    """
    b_q, o_last, scale = rows
    p_v, s_t, s_d = values
    p_blocks, count, sink, start, end, paged, i_x = tokens
    o_d = tl.arange(0, triton.next_power_of_2(D))
    for x in range(first, last, TILE):
        o_x = x + tl.arange(0, TILE)
        b_block = tl.load(p_blocks + o_x // BLOCK_K, mask=o_x < count, other=0)
        # an old selection of a longer text gives a wrong result, but reads nothing that is not there
        o_t, m_t = tl.minimum(b_block * BLOCK_K + o_x % BLOCK_K, end - 1), tl.full([TILE], 1, tl.int1)
        if MASKED:
            o_y, m_t = o_x - count, o_x < last
            o_t = tl.where(o_y < 0, o_t, tl.where(o_y < sink, o_y, o_y - sink + start))
        o_p = o_t
        if paged is not None:
            p_slot = paged[0] + i_x.to(tl.int64) * paged[1] + o_t // BLOCK_K
            o_p = tl.load(p_slot, mask=m_t, other=0).to(tl.int32) * BLOCK_K + o_t % BLOCK_K
        b_s = products(b_q, keys, o_t, o_p, m_t, D) * scale
        if MASKED:
            b_s = tl.where(o_x[None, :] <= o_last[:, None], b_s, -INF)
        b_p, b_old, b_m, b_l = soften(b_s, b_m, b_l)
        p = p_v + (o_p * s_t)[:, None] + o_d[None, :] * s_d
        b_v = tl.load(p, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None], input_precision="ieee")
    return b_acc, b_m, b_l


@triton.jit(do_not_specialize=["Tq", "Tk"])
def attention_kernel(
    p_q,
    p_k,
    p_v,
    p_blocks,
    p_start,
    p_o,
    table,
    s_q,
    s_k,
    s_v,
    s_o,
    Tq,
    Tk,
    scale,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LO: tl.constexpr,
    M: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attention over selected blocks, sink and window.  Equals hip.sparse_attention.

    Grid (NQ * PARTS, S, B); a program owns ROWS rows of one query block, 1 / PARTS of it: row r of the block
    is query r % BLOCK_Q of head r // BLOCK_Q of the group.  p_blocks: (B, S, NQ, M) int32, p_start: (NQ,)
    int64, p_o: (B, H, Tq, D), stride 1 in D.  table: cos and sin, or None; this, blocks and start contiguous.
    Masks: m_r rows that exist, the padding of D; else as `attend`.  Accumulates in float32.
    """
    PARTS: tl.constexpr = (GROUP * BLOCK_Q + ROWS - 1) // ROWS
    i_n, i_s, i_b = tl.program_id(0) // PARTS, tl.program_id(1), tl.program_id(2)
    i_k, i_g = i_s // SHARED, (i_b * tl.num_programs(1) + i_s).to(tl.int64)
    p_blocks += (i_g * (tl.num_programs(0) // PARTS) + i_n) * M

    o_r, o_d = tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS), tl.arange(0, triton.next_power_of_2(D))
    o_h, o_in = o_r // BLOCK_Q, o_r % BLOCK_Q
    o_row, begin = i_n * BLOCK_Q + o_in, Tk - Tq + i_n * BLOCK_Q
    m_r, o_own = (o_h < GROUP) & (o_row < Tq), o_row + Tk - Tq
    o_q = o_h.to(tl.int64) * s_q[1] + o_row.to(tl.int64) * s_q[2]
    b_q = load_rows(head(p_q, s_q, i_b, i_s * GROUP), s_q[3], o_q, m_r, table, o_in + CLIP, D)
    b_acc = tl.zeros([ROWS, o_d.shape[0]], tl.float32)
    b_m, b_l = tl.full([ROWS], -INF, tl.float32), tl.zeros([ROWS], tl.float32)

    start, end = tl.load(p_start + i_n).to(tl.int32), tl.max(tl.where(m_r, o_own, 0), 0) + 1
    count, sink, last, o_last = own_tokens(p_blocks, start, end, o_own, M, LO * BLOCK_K, BLOCK_K)
    whole, one = count // TILE * TILE, tl.full([], 1, OFFSET)
    keys = head(p_k, s_k, i_b, i_k), one * s_k[2], s_k[3], table, begin - CLIP
    values = head(p_v, s_v, i_b, i_k), one * s_v[2], s_v[3]
    rows, tokens = (b_q, o_last, scale), (p_blocks, count, sink, start, end, None, 0)
    b_acc, b_m, b_l = attend(0, whole, b_acc, b_m, b_l, rows, keys, values, tokens, False, D, BLOCK_K, TILE)
    b_acc, b_m, b_l = attend(whole, last, b_acc, b_m, b_l, rows, keys, values, tokens, True, D, BLOCK_K, TILE)
    o_o = o_h.to(tl.int64) * s_o[1] + o_row.to(tl.int64) * s_o[2]
    p_o = head(p_o, s_o, i_b, i_s * GROUP) + o_o[:, None] + o_d[None, :]
    tl.store(p_o, (b_acc / b_l[:, None]).to(p_o.dtype.element_ty), mask=m_r[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["Tq", "Tk"])
def split_kernel(
    p_q,
    p_k,
    p_v,
    p_blocks,
    p_start,
    p_part,
    p_stat,
    p_length,
    table,
    paged,
    s_q,
    s_k,
    s_v,
    Tq,
    Tk,
    scale,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LO: tl.constexpr,
    M: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """A share of hip.sparse_attention for one query block of few rows: decoding.

    Grid (PARTS, S, B); a program owns a share of the tokens of one query block, for all of its rows: row r is
    query r % Tq of head r // Tq of the group.  p_part: (B, H, Tq, PARTS, D) values, p_stat: (.., PARTS, 2)
    maximum and sum; float32.  paged: None, or where k and v are a bank its page table (B * Hkv, pages) and
    `pages`.  The rest as in attention_kernel.
    """
    i_p, i_s, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_k, i_g = i_s // SHARED, (i_b * tl.num_programs(1) + i_s).to(tl.int64)
    p_blocks += i_g * M
    Tk = tokens_of(p_length, Tk)

    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, triton.next_power_of_2(D))
    o_h, o_row = o_r // Tq, o_r % Tq
    m_r, o_own = o_h < GROUP, o_row + Tk - Tq
    o_q = o_h.to(tl.int64) * s_q[1] + o_row.to(tl.int64) * s_q[2]
    b_q = load_rows(head(p_q, s_q, i_b, i_s * GROUP), s_q[3], o_q, m_r, table, o_row + CLIP, D)
    b_acc = tl.zeros([ROWS, o_d.shape[0]], tl.float32)
    b_m, b_l = tl.full([ROWS], -INF, tl.float32), tl.zeros([ROWS], tl.float32)

    start = tl.load(p_start).to(tl.int32)
    count, sink, last, o_last = own_tokens(p_blocks, start, Tk, o_own, M, LO * BLOCK_K, BLOCK_K)
    share, one = tl.cdiv(tl.cdiv(last, tl.num_programs(0)), TILE) * TILE, tl.full([], 1, OFFSET)
    keys = head(p_k, s_k, i_b, i_k), one * s_k[2], s_k[3], table, Tk - Tq - CLIP
    values = head(p_v, s_v, i_b, i_k), one * s_v[2], s_v[3]
    i_x = i_b * (tl.num_programs(1) // SHARED) + i_k
    rows, tokens = (b_q, o_last, scale), (p_blocks, count, sink, start, Tk, paged, i_x)
    first, last = i_p * share, tl.minimum((i_p + 1) * share, last)
    b_acc, b_m, b_l = attend(first, last, b_acc, b_m, b_l, rows, keys, values, tokens, True, D, BLOCK_K, TILE)
    o_part = ((i_g * GROUP + o_h) * Tq + o_row) * tl.num_programs(0) + i_p
    tl.store(p_part + o_part[:, None] * D + o_d[None, :], b_acc, mask=m_r[:, None] & (o_d < D)[None, :])
    tl.store(p_stat + o_part * 2, b_m, mask=m_r)
    tl.store(p_stat + o_part * 2 + 1, b_l, mask=m_r)


@triton.jit
def merge_kernel(p_part, p_stat, p_o, s_o, D: tl.constexpr, PARTS: tl.constexpr):
    """Softmax over all from the softmax of the parts: the other half of hip.sparse_attention for decoding.

    Grid (Tq, H, B); a program owns one query of one head.  p_o: stride 1 in D.  Masks: m_s parts that exist,
    m_d the padding of D.  Accumulates in float32.
    """
    i_t, i_h, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    i_q = (i_b * tl.num_programs(1) + i_h) * tl.num_programs(0) + i_t
    o_s, o_d = tl.arange(0, triton.next_power_of_2(PARTS)), tl.arange(0, triton.next_power_of_2(D))
    m_s, m_d = o_s < PARTS, o_d < D
    o_s += i_q * PARTS
    b_m = tl.load(p_stat + o_s * 2, mask=m_s, other=-INF)
    b_l = tl.load(p_stat + o_s * 2 + 1, mask=m_s, other=0.0)
    b_part = tl.load(p_part + o_s[:, None] * D + o_d[None, :], mask=m_s[:, None] & m_d[None, :], other=0.0)
    b_w = tl.exp2(b_m - tl.max(b_m, 0))
    b_o = tl.sum(b_part * b_w[:, None], 0) / tl.sum(b_l * b_w, 0)
    p_o = head(p_o, s_o, i_b, i_h) + i_t * s_o[2] + o_d
    tl.store(p_o, b_o.to(p_o.dtype.element_ty), mask=m_d)


def sparse_attention(
    q: Tensor, k: Keys, v: Keys, selection: Selection, cfg: HiPConfig, *, scale=None, rope=None
) -> Tensor:
    """hip.sparse_attention: its arguments, result and errors, and the errors of `check_device`.

    A window may begin anywhere, not only with a block: the host would have to wait to find that out.
    """
    k, v, length = without_length(k, v)
    hip.check_call(q, (k, v), cfg, scale, rope)
    check_device(q, selection, "selection")
    check_length(q, length, 1)
    (B, H, Tq, D), Hkv, Tk, NQ = q.shape, *k.shape[1:3], -(-q.shape[2] // cfg.block_q)
    hip.check_selection(selection, "selection", B, (Hkv, H), NQ)
    paged = None
    if isinstance(k, Pages):
        bank = k.bank
        bank.attended(selection, length, Tk, cfg)
        (k, v), paged = (x.view(B, Hkv, -1, D) for x in bank.rows), (bank.slot_of, bank.slot_of.shape[1])
    blocks, start = selection.blocks.int().contiguous(), selection.window_start.contiguous()
    # in the order of hidden states, where a model needs it next
    o, S, M = torch.empty(B, Tq, H, D, dtype=q.dtype, device=q.device).transpose(1, 2), *blocks.shape[1::2]
    scale = (D**-0.5 if scale is None else scale) / math.log(2)  # for powers of two
    strides = q.stride(), k.stride(), v.stride()
    sizes, OFFSET = (cfg, H // S, S // Hkv, D, q.dtype, M), offset(k, v)
    with torch.cuda.device_of(q):
        if NQ > 1 or H // S * Tq > SPLIT_ROWS and paged is None and length is None:
            constants = attention_constants(*sizes)
            grid = NQ * -(-H // S * cfg.block_q // constants["ROWS"]), S, B
            more = *strides, o.stride(), Tq, Tk, scale
            attention_kernel[grid](q, k, v, blocks, start, o, table(rope), *more, OFFSET=OFFSET, **constants)
        else:
            most = M * cfg.block_k + cfg.sink + cfg.window + 2 * cfg.block_k
            shape = B, H, Tq, min(MOST_PARTS, -(-most // SPLIT_TOKENS))
            part, stat = (torch.empty(*shape, n, dtype=torch.float32, device=q.device) for n in (D, 2))
            more = part, stat, length, table(rope), paged, *strides, Tq, Tk, scale
            constants = split_constants(*sizes, Tq)
            split_kernel[shape[3], S, B](q, k, v, blocks, start, *more, OFFSET=OFFSET, **constants)
            merge_kernel[Tq, H, B](part, stat, o, o.stride(), D=D, PARTS=shape[3])
    return o


def hip_attention(
    q: Tensor, k: Keys, v: Keys, cfg: HiPConfig, selection: Selection | None = None, *, scale=None, rope=None
) -> tuple[Tensor, Selection]:
    """Search, unless a selection is given, then attend: (o, selection).  Else as its parts."""
    selection = select_blocks(q, k, cfg, scale=scale, rope=rope) if selection is None else selection
    return sparse_attention(q, k, v, selection, cfg, scale=scale, rope=rope), selection


# --- the model ---------------------------------------------------------------------------------------------


@triton.jit
def norm_kernel(p_x, p_more, p_weight, p_o, s_x, s_more, s_n, eps, C: tl.constexpr):
    """RMS norm of a row, to which another is added first, in place.  Equals model.norm.

    Grid (T, B); a program owns one row of (B, T, C) tensors, stride 1 in C.  p_weight: (C,).
    Masks: the padding of C.  Sum and norm are float32, the norm that of the sum in its dtype.
    """
    i_t, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, triton.next_power_of_2(C))
    m = o_c < C
    p_x += i_b * s_x[0] + i_t * s_x[1] + o_c
    b_x = tl.load(p_x, mask=m, other=0.0)
    if p_more is not None:
        b_more = tl.load(p_more + i_b * s_more[0] + i_t * s_more[1] + o_c, mask=m, other=0.0)
        b_x = (b_x.to(tl.float32) + b_more.to(tl.float32)).to(b_x.dtype)
        tl.store(p_x, b_x, mask=m)
    b_x = b_x.to(tl.float32)
    b_x *= tl.rsqrt(tl.sum(b_x * b_x, 0) / C + eps) * tl.load(p_weight + o_c, mask=m).to(tl.float32)
    tl.store(p_o + i_b * s_n[0] + i_t * s_n[1] + o_c, b_x.to(p_o.dtype.element_ty), mask=m)


def norm(weight: Tensor, eps: float, x: Tensor, more: Tensor | None = None) -> Tensor:
    """model.norm of x (B, T, C), and of x + more, in one launch."""
    check_runs(x, "x")
    (B, T, C), o = x.shape, torch.empty_like(x)
    strides = x.stride(), (x if more is None else more).stride(), o.stride()
    with torch.cuda.device_of(x):
        warps = min(16, max(1, triton.next_power_of_2(C) // 256))
        norm_kernel[T, B](x, more, weight, o, *strides, eps, C=C, num_warps=warps)
    return o


@triton.jit
def gated_kernel(p_h, p_o, N, SIZE: tl.constexpr):
    """silu of one half of a row times the other half.  Equals model.gated.

    Grid (rows, N / SIZE); a program owns SIZE numbers of one row.  p_h: (rows, 2 * N), p_o: (rows, N),
    contiguous.  Masks: the padding of N.
    """
    i, o_n = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    p_h += i * 2 * N + o_n
    b_gate, b_up = tl.load(p_h, mask=o_n < N).to(tl.float32), tl.load(p_h + N, mask=o_n < N).to(tl.float32)
    b_o = b_gate / (1 + tl.exp(-b_gate)) * b_up
    tl.store(p_o + i * N + o_n, b_o.to(p_o.dtype.element_ty), mask=o_n < N)


def gated(h: Tensor) -> Tensor:
    """model.gated in one launch."""
    N, SIZE = h.shape[-1] // 2, 1024
    h, o = h.contiguous(), h.new_empty(*h.shape[:-1], N)
    with torch.cuda.device_of(h):
        gated_kernel[o.numel() // N, triton.cdiv(N, SIZE)](h, o, N, SIZE=SIZE)
    return o


@triton.jit(do_not_specialize=["T"])
def fill_kernel(
    p_h,
    p_q,
    p_k,
    p_v,
    p_length,
    table,
    s_h,
    s_q,
    s_k,
    s_v,
    T,
    H: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Heads of a projection to where they belong, queries and keys rotated.  Equals model.fill.

    Grid (T / ROWS, H + 2 * HKV, B); a program owns ROWS tokens of one head.  p_h: (B, H + 2 * HKV, T, D).
    With p_length keys and values are one token, number `length` - 1 of theirs.  table: cos and sin, of
    (T, D / 2) each, or None.  p_q, p_k, p_v: stride 1 in D.  Masks: m_t tokens that exist, the padding of D.
    """
    i_t, i_x, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_t = i_t * ROWS + tl.arange(0, ROWS)
    m_t, o_at, one = o_t < T, tl.where(i_x < H + HKV, o_t + 1, 0), tl.full([], 1, tl.int64)
    if table is not None:  # row 0, where `load_rows` turns nothing, stands for the values, and is not there
        table = table[0] - D // 2, table[1] - D // 2
    b_x = load_rows(head(p_h, s_h, i_b, i_x), s_h[3], o_t * s_h[2], m_t, table, o_at, D)
    first = one - 1
    if p_length is not None:
        first += tl.load(p_length) - 1
    if i_x < H:
        p_to, s_t = head(p_q, s_q, i_b, i_x), one * s_q[2]
    elif i_x < H + HKV:
        p_to, s_t = head(p_k, s_k, i_b, i_x - H) + first * s_k[2], one * s_k[2]
    else:
        p_to, s_t = head(p_v, s_v, i_b, i_x - H - HKV) + first * s_v[2], one * s_v[2]
    SIZE: tl.constexpr = D // len(b_x)  # of a part
    o_d = tl.arange(0, b_x[0].shape[1])
    for i in tl.static_range(len(b_x)):
        p = p_to + (o_t * s_t)[:, None] + (i * SIZE + o_d)[None, :]
        tl.store(p, b_x[i], mask=m_t[:, None] & (o_d < SIZE)[None, :])


def fill(h: Tensor, rope: Rope | None, q: Tensor, k: Tensor | Begun, v: Tensor | Begun) -> None:
    """model.fill in one launch; a single token is the last one of k and v that are `Begun`."""
    check_device(q)
    k, v, length = without_length(k, v)
    B, heads, T, D = h.shape
    ROWS = min(32, triton.next_power_of_2(T))
    strides, sizes = (x.stride() for x in (h, q, k, v)), dict(H=q.shape[1], HKV=k.shape[1], D=D, ROWS=ROWS)
    with torch.cuda.device_of(h):
        grid = triton.cdiv(T, ROWS), heads, B
        fill_kernel[grid](h, q, k, v, length, table(rope), *strides, T, **sizes)


# --- the offloaded cache -----------------------------------------------------------------------------------
#
# A GPU reads pinned host memory by itself, so kernels can bring pages in, and the search needs none: it looks
# at few keys, each once.  Attention is told in which slots of the bank its pages lie (`paged`), and reads the
# last slot, which is NaN, for a page that is nowhere.


def reachable(store: Tensor, device: torch.device) -> bool:
    """Whether kernels on the device can read the store: it is there, or in pinned host memory."""
    return store.device == device or store.is_pinned()


@triton.jit(do_not_specialize=["Tk", "count", "room", "pages", "slots"])
def find_kernel(
    p_blocks,
    p_start,
    p_length,
    p_slot_of,
    p_page_of,
    p_last_use,
    p_call,
    p_counted,
    p_page,
    p_slot,
    Tk,
    count,
    room,
    pages,
    slots,
    BLOCK_K: tl.constexpr,
    LO: tl.constexpr,
    N: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Slots for the pages that a query attends to.  Equals hip.Bank.find of these, but for what it copies.

    Grid (heads,); a program owns the bank of one head, whose pages are `count` chosen blocks, the sink, and
    the latest `room` of the window.  What is missing takes the slots that were used least recently.  p_page,
    p_slot: (heads, N), what copy_kernel is to bring in.  With p_length that is the last page, too, which has
    a token more.  The rest are fields of the bank.  Masks: m_x pages that are to be here, each once; m_new
    those that are not.
    """
    i_h, o_x, o_s = tl.program_id(0).to(tl.int64), tl.arange(0, N), tl.arange(0, SLOTS)
    last = (tokens_of(p_length, Tk) - 1) // BLOCK_K
    first, sink = (tl.load(p_start) // BLOCK_K).to(tl.int32), tl.minimum(LO, last + 1)
    b_chosen, o_w = tl.load(p_blocks + i_h * count + o_x, mask=o_x < count, other=-1), o_x - count - sink
    b_window = tl.where((o_w < room) & (last - o_w >= first), last - o_w, -1)
    b_page = tl.where(o_x < count, b_chosen, tl.where(o_w < 0, o_x - count, b_window))
    m_x = (b_page >= 0) & (b_page <= last)
    b_order = tl.where(m_x, b_page, -1 - o_x)
    m_x &= before(b_order, o_x) == before(b_order, tl.zeros_like(o_x))
    p_slot_of, p_page_of = p_slot_of + i_h * (pages + 1), p_page_of + i_h * (slots + 1)
    p_last_use += i_h * (slots + 1)
    b_slot = tl.load(p_slot_of + b_page, mask=m_x, other=0).to(tl.int32)
    m_new, call = m_x & (b_slot == slots), tl.load(p_call + i_h) + 1
    tl.store(p_call + i_h, call)
    tl.atomic_add(p_counted, tl.sum((m_x & (b_slot < slots)).to(tl.int64), 0))
    tl.atomic_add(p_counted + 1, tl.sum(m_new.to(tl.int64), 0))
    tl.store(p_last_use + b_slot, call, mask=m_x & (b_slot < slots))
    if tl.sum(m_new.to(tl.int32), 0) > 0:
        tl.debug_barrier()  # other threads are to see that
        b_use = tl.load(p_last_use + o_s, mask=o_s < slots, other=call)
        o_least = (tl.sort((b_use + 1) * SLOTS + o_s) % SLOTS).to(tl.int32)  # the first of them are given up
        o_nth = tl.maximum(tl.cumsum(m_new.to(tl.int32), 0) - 1, 0)
        b_slot = tl.where(m_new, tl.gather(o_least, o_nth, 0), b_slot)
        b_gone = tl.load(p_page_of + b_slot, mask=m_new, other=0)
        tl.store(p_slot_of + b_gone, slots, mask=m_new)  # never a page that is wanted now
        tl.store(p_slot_of + b_page, b_slot, mask=m_new)
        tl.store(p_page_of + b_slot, b_page, mask=m_new)
        tl.store(p_last_use + b_slot, call, mask=m_new)
    if p_length is not None:
        m_new |= m_x & (b_page == last)
    tl.store(p_page + i_h * N + o_x, tl.where(m_new, b_page, pages))
    tl.store(p_slot + i_h * N + o_x, b_slot)


@triton.jit(do_not_specialize=["pages", "slots"])
def copy_kernel(
    p_page,
    p_slot,
    p_store,
    p_rows,
    pages,
    slots,
    KEYS: tl.constexpr,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
):
    """Copy pages to slots, of each page KEYS tokens, every STRIDE-th.  Equals hip.Bank.fetch.

    Grid (n, heads, 1 or 2); a program owns one page of one head, of keys or of values.  p_page, p_slot:
    (heads, n), p_store: (1 or 2, heads, pages, KEYS * STRIDE, D), p_rows: (1 or 2, heads, slots, KEYS, D);
    contiguous.  Masks: what is no page, the padding of D.
    """
    i_h, i_x = tl.program_id(1), tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    page, slot = tl.load(p_page + i_x), tl.load(p_slot + i_x)
    i_h = (tl.program_id(2) * tl.num_programs(1) + i_h).to(tl.int64)
    o_t, o_d = tl.arange(0, KEYS)[:, None], tl.arange(0, triton.next_power_of_2(D))[None, :]
    m = (o_d < D) & (page < pages)
    b_x = tl.load(p_store + ((i_h * pages + page) * KEYS + o_t) * STRIDE * D + o_d, mask=m)
    tl.store(p_rows + ((i_h * slots + slot) * KEYS + o_t) * D + o_d, b_x, mask=m)


class Bank(hip.Bank):
    """hip.Bank; where the device reaches the store, pages come in without the host."""

    def attended(self, selection: Selection, length: Tensor | None, Tk: int, cfg: HiPConfig) -> None:
        """Brings in all that a query attends to.

        The window has room for cfg.refresh_interval steps; of one that has grown longer the start is missing,
        which in a bank is NaN.
        """
        heads, device = len(self.slot_of), self.slot_of.device
        blocks, start = selection.blocks.int().contiguous(), selection.window_start
        count, sink = blocks.numel() // heads, min(cfg.sink_blocks, self.pages)
        room = max(1, self.slots - count - sink if self.slots < self.pages else self.pages)
        N, SLOTS = (triton.next_power_of_2(max(16, x)) for x in (count + sink + room, self.slots))
        page, slot = (torch.empty(heads, N, dtype=torch.int32, device=device) for _ in "ps")
        tables = self.slot_of, self.page_of, self.last_use, self.call, self.counted, page, slot
        sizes = Tk, count, room, self.pages, self.slots
        constants = dict(BLOCK_K=self.keys, LO=sink, N=N, SLOTS=SLOTS, num_warps=8)
        with torch.cuda.device_of(page):
            find_kernel[heads,](blocks, start, length, *tables, *sizes, **constants)
        self.fetch(page, slot)

    def fetch(self, page: Tensor, slot: Tensor) -> None:
        if not reachable(self.store, page.device):
            return super().fetch(page.long(), slot.long())
        sizes = dict(KEYS=self.keys, STRIDE=self.stride, D=self.rows.shape[4])
        with torch.cuda.device_of(page):
            grid = *page.shape[::-1], len(self.rows)
            copy_kernel[grid](page, slot, self.store, self.rows, self.pages, self.slots + 1, **sizes)


class OffloadedKVCache(hip.OffloadedKVCache):
    """hip.OffloadedKVCache, its arguments and errors, with the banks of this file."""

    bank = Bank

    def fill(self, layer: int, h: Tensor, rope: Rope | None, q: Tensor, length: Tensor) -> Begun:
        """`fill` of a token into a store that the device reaches; returns what stands for k and for v."""
        fill(h, rope, q, *(Begun(x, length) for x in self.store[layer]))
        return Begun(replace(self.layer(layer), shape=self.shape[1:]), length)

    def filled(self) -> None:
        """All layers have a token more, which the host has to be told of a recorded step."""
        self.length, new = [n + 1 for n in self.length], self.store[:, :, :, :, 0]
        self.moved += new.numel() * new.itemsize


# --- launch configurations ---------------------------------------------------------------------------------

SPLIT_ROWS = 64  # rows of a query block up to which tokens are split; more are work enough as they are
SPLIT_TOKENS, MOST_PARTS = 128, 64  # of split_kernel: tokens of a program, and programs of a query block
MOST_QUERIES = 65536  # numbers that the rows of a search may have, as they stay in shared memory: 512 x 128


def tiles(kernel: str, rows: int, D: int, dtype: torch.dtype, clip: bool) -> dict:
    """How a kernel goes about query blocks of so many rows: rows of a program, keys of a tile, warps, stages.

    All that there is to tune.  In 16 bits with D 64 and 128 it is the fastest, on an H200, of some that spill
    no register there (extras/prove.py); other sizes are guesses.  On an A100 the kernels with
    clipped positions spill.
    """
    ROWS, wide = max(16, triton.next_power_of_2(rows)), D > 64
    if dtype == torch.float32:  # no matrix units: products keep their operands in registers
        ROWS = min(ROWS, max(16, 4096 // triton.next_power_of_2(D))) if kernel == "attention" else ROWS
        return dict(
            ROWS=ROWS, TILE=32 if D == 32 else 16, num_warps=4 if ROWS * D <= 2048 else 8, num_stages=1
        )
    if kernel == "attention":
        ROWS = min(ROWS, 64 if D > 128 or rows % 128 else 128)
        if clip:
            return dict(ROWS=ROWS, TILE=32, num_warps=4, num_stages=1)
        return dict(
            ROWS=ROWS, TILE=64 if ROWS == 64 and D <= 128 else 32, num_warps=ROWS // 16 or 1, num_stages=2
        )
    if kernel == "split":
        return dict(ROWS=ROWS, TILE=64, num_warps=2 if wide else 4, num_stages=2)
    if ROWS <= 32:  # decoding
        if clip:
            return dict(ROWS=ROWS, TILE=32, num_warps=8, num_stages=2)
        return dict(ROWS=ROWS, TILE=64 if D > 128 else 128, num_warps=4, num_stages=2)
    few = ROWS <= 128
    return dict(
        ROWS=ROWS, TILE=64, num_warps=4 if few else 8, num_stages=1 if clip else 2 + (few and D <= 128)
    )


@functools.cache
def search_constants(cfg: HiPConfig, group: int, shared: int, D: int, dtype: torch.dtype, Tq: int) -> dict:
    """Constants and options of search_kernel, for query blocks of Tq queries of each head."""
    per = triton.next_power_of_2(triton.cdiv(Tq, cfg.stride_q))
    sizes = tiles("search", group * per, D, dtype, cfg.rope_clip is not None)
    sizes["TILE"] = max(sizes["TILE"], cfg.block_k // cfg.stride_k)
    more = dict(BLOCK_Q=cfg.block_q, STRIDE_Q=cfg.stride_q, STRIDE_K=cfg.stride_k, WINDOW=cfg.window, PER=per)
    more |= dict(REPRESENTATIVE=cfg.representative, MASS=cfg.score == "mass")
    return common_constants(cfg, group, shared, D, cfg.budget) | more | sizes


@functools.cache
def attention_constants(cfg: HiPConfig, group: int, shared: int, D: int, dtype: torch.dtype, M: int) -> dict:
    """Constants and options of attention_kernel, for M blocks of a selection."""
    sizes = tiles("attention", group * cfg.block_q, D, dtype, cfg.rope_clip is not None)
    return common_constants(cfg, group, shared, D, M) | dict(BLOCK_Q=cfg.block_q) | sizes


@functools.cache
def split_constants(
    cfg: HiPConfig, group: int, shared: int, D: int, dtype: torch.dtype, M: int, Tq: int
) -> dict:
    """Constants and options of split_kernel, for M blocks of a selection."""
    sizes = tiles("split", group * Tq, D, dtype, cfg.rope_clip is not None)
    return common_constants(cfg, group, shared, D, M) | sizes


def common_constants(cfg: HiPConfig, group: int, shared: int, D: int, M: int) -> dict:
    sizes = dict(
        CLIP=cfg.rope_clip or 0, BLOCK_K=cfg.block_k, LO=min(cfg.sink_blocks, 2**30 // cfg.block_k), M=M
    )
    return dict(GROUP=group, SHARED=shared, D=D) | sizes


# --- checks at the door ------------------------------------------------------------------------------------


def check_device(q: Tensor, selection: Selection | tuple = (), name: str = "") -> None:
    """ValueError, with what to do, where the kernels cannot run: head size, device, dtype."""
    if q.shape[3] not in HEAD_SIZES:
        raise ValueError(f"q must have a head size D of {HEAD_SIZES}, not {q.shape[3]}; hip.py takes any")
    check_runs(q, "q")
    for part in selection:
        if part.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, not on {part.device}")


def check_runs(x: Tensor, name: str) -> None:
    if triton.knobs.runtime.interpret:
        if x.dtype == torch.bfloat16:
            raise ValueError(f"{name} must be float32 or float16: Triton's interpreter is wrong in bfloat16")
    elif not x.is_cuda:
        where = f"not {x.device}; use hip.py, or set TRITON_INTERPRET=1 first"
        raise ValueError(f"{name} must be on a GPU, {where}")


def check_length(q: Tensor, length: Tensor | None, most: int) -> None:
    if length is None:
        return
    if q.shape[2] > most or length.shape != (1,) or (length.dtype, length.device) != (torch.int64, q.device):
        got = f"{tuple(length.shape)} {length.dtype} on {length.device} for {q.shape[2]}"
        raise ValueError(
            f"length must be (1,) torch.int64 on {q.device} for {most} queries or fewer, not {got}"
        )
