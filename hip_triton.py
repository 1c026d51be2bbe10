"""HiP attention as Triton kernels: the public functions of hip.py, same names, same order, same results.

Read hip.py first; it says what is computed and why.  This file says how a GPU does it:

    search_kernel     one launch: a program owns one query block of one head and runs all rounds of the tree
                      search in registers; scores never reach memory and the host never waits
    attention_kernel  flash attention (one pass, running maximum and sum) over a query block's own tokens
    split_kernel      the same for decoding, where there are few queries: programs share out the keys ...
    merge_kernel      ... and this one adds up their parts
    look_up_kernel    page table of an offloaded cache: one program finds, evicts and copies in for a key head
    append_kernel     writes new keys and values to where an offloaded cache keeps them

Glossary.  Names as in hip.py: B, H, Hkv, Tq, Tk, D, NQ, M, N, and f, l for a node [f, l) of the search.
    i_  index of a program or of the thing it owns       o_  offsets along a dimension       m_  mask
    p_  pointer, after set-up to the program's own part  b_  a block of values in registers
    s_  the four strides of a (B, H, T, D) tensor        BLOCK_D  D rounded up to a power of two
Capitals are compile-time constants.  Tq and Tk are not, so that a longer text compiles nothing anew.

With CLIP (rope_clip, 0 for none) q and k come un-rotated, and a head is loaded as two halves, BLOCK_D / 2
wide, because the points that rotary embedding turns are (d, d + D / 2).

Layout is (B, H, T, D) with any strides.  Products accumulate in float32, float32 inputs multiply in full
precision (IEEE, never tf32), and offsets have 64 bits.  Runs with Triton 3.6 to 3.9 on NVIDIA and AMD, and
without a GPU in Triton's interpreter (TRITON_INTERPRET=1 set before the import; not in bfloat16).
"""

from __future__ import annotations

import functools
import math

import torch

import hip
from hip import Bank, HiPConfig, Paged, Rope, Selection, check_inputs, check_rope, check_selection, domain

try:
    import triton
    import triton.language as tl
except ImportError as e:
    raise ImportError("hip_triton needs Triton: `pip install triton` (Linux), or use hip.py") from e

HEAD_SIZES = (32, 64, 80, 96, 128, 256)
NO_BLOCK = tl.constexpr(2**31 - 1)  # sorts behind every block; leaves the kernel as -1
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # score of a real block whose products overflowed


# --- scores ------------------------------------------------------------------------------------------------


@triton.jit
def rotate(b_a, b_b, p_cos, p_sin, o_at, m_at):
    """Halves of heads turned by entries o_at of the table, in float32 and back.  Equals hip.rotate."""
    b_cos, b_sin = tl.load(p_cos + o_at, mask=m_at, other=1.0), tl.load(p_sin + o_at, mask=m_at, other=0.0)
    b_x, b_y = b_a.to(tl.float32), b_b.to(tl.float32)
    return (b_x * b_cos - b_y * b_sin).to(b_a.dtype), (b_y * b_cos + b_x * b_sin).to(b_a.dtype)


@triton.jit
def load_queries(p_q, s_q, o_row, o_own, m_r, p_cos, p_sin, CLIP: tl.constexpr, D: tl.constexpr,
                 BLOCK_D: tl.constexpr):
    """Rows o_row (R,) at positions o_own (R,), as a tuple for `products`.

    Without CLIP that is b_q (R, BLOCK_D) alone.  Else both halves turned for near keys, both turned for far
    ones, positions, the last that is far from every row, the last row's own, and the table.
    Masks: m_r (R,) rows to load, the padding of D.
    """
    if CLIP == 0:
        o_d = tl.arange(0, BLOCK_D)
        p = p_q + o_row[:, None].to(tl.int64) * s_q[2] + o_d[None, :] * s_q[3]
        b_q = (tl.load(p, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0),)
    else:
        o_d = tl.arange(0, BLOCK_D // 2)
        m_q = m_r[:, None] & (o_d < D // 2)[None, :]
        p = p_q + o_row[:, None].to(tl.int64) * s_q[2] + o_d[None, :] * s_q[3]
        b_a, b_b = tl.load(p, mask=m_q, other=0.0), tl.load(p + D // 2 * s_q[3], mask=m_q, other=0.0)
        start = tl.min(tl.where(m_r, o_own, NO_BLOCK)) - CLIP
        o_at = (o_own - tl.maximum(start, 0))[:, None] * (D // 2) + o_d[None, :]  # a table is short: 32 bits
        o_clip = tl.full([1, 1], CLIP, tl.int32) * (D // 2) + o_d[None, :]
        near_a, near_b = rotate(b_a, b_b, p_cos, p_sin, o_at, m_q)
        last = tl.max(tl.where(m_r, o_own, -1))
        # where nothing is far the table may be too short for it
        far_a, far_b = rotate(b_a, b_b, p_cos, p_sin, o_clip, m_q & (last >= CLIP))
        b_q = (near_a, near_b, far_a, far_b, o_own, start, last, p_cos, p_sin)
    return b_q


@triton.jit
def products(b_q, p_k, s_k, o_t, o_p, m_t, CLIP: tl.constexpr, D: tl.constexpr):
    """q . k of the rows of `load_queries` and keys o_t (T,): (R, T) float32.  Equals hip.products.

    o_p (T,): where in p_k the keys are, o_t itself unless that is a bank.  With CLIP a tile that is wholly
    near or wholly far costs one product, not two.  Masks: m_t (T,) keys to load, all others count as 0; the
    padding of D; rows of the table that near keys need.
    """
    if CLIP == 0:
        o_d = tl.arange(0, b_q[0].shape[1]).to(tl.int64)
        p = p_k + o_p[None, :].to(tl.int64) * s_k[2] + o_d[:, None] * s_k[3]
        b_k = tl.load(p, mask=m_t[None, :] & (o_d < D)[:, None], other=0.0)  # (D, T)
        b_s = tl.dot(b_q[0], b_k, input_precision="ieee")
    else:
        near_a, near_b, far_a, far_b, o_own, start, last, p_cos, p_sin = b_q
        o_d = tl.arange(0, near_a.shape[1])
        m_k = m_t[None, :] & (o_d < D // 2)[:, None]
        p = p_k + o_p[None, :].to(tl.int64) * s_k[2] + o_d[:, None].to(tl.int64) * s_k[3]
        b_a, b_b = tl.load(p, mask=m_k, other=0.0), tl.load(p + D // 2 * s_k[3], mask=m_k, other=0.0)
        b_s = tl.zeros([near_a.shape[0], o_t.shape[0]], tl.float32)
        if tl.min(tl.where(m_t, o_t, NO_BLOCK)) <= last - CLIP:
            b_s = tl.dot(far_b, b_b, tl.dot(far_a, b_a, input_precision="ieee"), input_precision="ieee")
        if tl.max(tl.where(m_t, o_t, -1)) > start:
            o_at = (o_t - tl.maximum(start, 0))[None, :] * (D // 2) + o_d[:, None]
            m_at = m_k & ((o_t > start) & (o_t <= last))[None, :]
            b_ta, b_tb = rotate(b_a, b_b, p_cos, p_sin, o_at, m_at)
            b_n = tl.dot(near_b, b_tb, tl.dot(near_a, b_ta, input_precision="ieee"), input_precision="ieee")
            b_s = tl.where(o_own[:, None] - o_t[None, :] < CLIP, b_n, b_s)
    return b_s


# --- the search --------------------------------------------------------------------------------------------


@triton.jit
def sort_key(b_score, o_rest):
    """One int64 that orders like (score, o_rest >= 0); -0 and 0 are equal scores."""
    b_bits = tl.where(b_score == 0, 0.0, b_score).to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)  # a float's bits, below zero in reverse
    return (b_bits.to(tl.int64) << 32) | o_rest.to(tl.int64)


@triton.jit
def best(b_score, o_position, KEEP: tl.constexpr):
    """Positions of the KEEP best scores, ascending; of equals the lower position stays: hip.best."""
    b_key = tl.sort(sort_key(b_score, o_position ^ NO_BLOCK), descending=True)
    b_key = tl.gather(b_key, tl.arange(0, KEEP), 0)
    return tl.sort((b_key & NO_BLOCK).to(tl.int32) ^ NO_BLOCK)


@triton.jit
def score_blocks(b_q, p_k, s_k, bank, i_x, b_block, count, CLIP: tl.constexpr, D: tl.constexpr,
                 BLOCK_K: tl.constexpr, STRIDE_K: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
                 SLOTS: tl.constexpr):
    """Scores of the first `count` of b_block (C,); -inf where it is -1 or further back: hip.block_scores.

    TILE keys at a time, so that registers do not grow with the number of nodes.  With SLOTS p_k are the slots
    of a bank, which holds every STRIDE_K-th key of some pages of head i_x.  Masks: m_s blocks to look at (a
    domain ends before the keys do, so none can overrun).
    """
    C: tl.constexpr = b_block.shape[0]
    KEYS: tl.constexpr = BLOCK_K // STRIDE_K
    SHARE: tl.constexpr = TILE // KEYS  # blocks of one tile
    o_c, o_in = tl.arange(0, C), tl.arange(0, KEYS) * STRIDE_K
    if SLOTS > 0:
        b_slot = find(bank, i_x, 0, tl.where(o_c < count, b_block, -1), BLOCK_K, STRIDE_K, D, BLOCK_D, SLOTS)
    b_score = tl.full([C], float("-inf"), tl.float32)
    for i in range(0, count, SHARE):
        o_s = i + tl.arange(0, SHARE)
        b_s = tl.gather(b_block, tl.minimum(o_s, C - 1), 0)
        m_s = (o_s < count) & (b_s >= 0)
        m_t = tl.reshape(tl.broadcast_to(m_s[:, None], SHARE, KEYS), TILE)
        o_t = tl.reshape(b_s[:, None] * BLOCK_K + o_in[None, :], TILE)
        o_p = o_t
        if SLOTS > 0:
            b_p = tl.gather(b_slot, tl.minimum(o_s, C - 1), 0)
            o_p = tl.reshape(b_p[:, None] * KEYS + tl.arange(0, KEYS)[None, :], TILE)
        b_s = tl.max(products(b_q, p_k, s_k, o_t, o_p, m_t, CLIP, D), 0)  # (TILE,) best row of each key
        b_s = tl.max(tl.reshape(b_s, SHARE, KEYS), 1)
        b_s = tl.where(m_s, tl.maximum(b_s, LOWEST), float("-inf"))
        b_score = tl.where(o_c // SHARE == i // SHARE, tl.gather(b_s, o_c % SHARE, 0), b_score)
    return b_score


@triton.jit
def widen(b_x, W: tl.constexpr, fill):
    """b_x (C,) with `fill` behind it up to W."""
    o_w, C = tl.arange(0, W), b_x.shape[0]
    return tl.where(o_w < C, tl.gather(b_x, tl.minimum(o_w, C - 1), 0), fill)


@triton.jit(do_not_specialize=["Tq", "Tk"])
def search_kernel(p_q, p_k, p_previous, p_blocks, p_cos, p_sin, s_q, s_k, bank, Tq, Tk, H: tl.constexpr,
                  HKV: tl.constexpr, D: tl.constexpr, CLIP: tl.constexpr, BLOCK_Q: tl.constexpr,
                  BLOCK_K: tl.constexpr, STRIDE_Q: tl.constexpr, STRIDE_K: tl.constexpr, LO: tl.constexpr,
                  WINDOW: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PREVIOUS: tl.constexpr,
                  REPRESENTATIVE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
                  TILE: tl.constexpr, SLOTS: tl.constexpr):
    """Choose M blocks by tree search.  Equals hip.select_blocks (search_rows, search and merge).

    Grid (NQ, H, B); a program owns one query block of one query head, with all of its rounds.  p_previous:
    (B, H, NQ, PREVIOUS) blocks, PREVIOUS = 0 for none; p_blocks: (B, H, NQ, M); int32, contiguous.
    From an offloaded cache p_k are the SLOTS of the search bank (else 0), and the grid is (1, Hkv, B): a
    program owns all query blocks of all query heads of a key head, for they share a page table.
    Masks: m_r rows that exist (others stand for row 0 once more, which changes no maximum), m_p previous
    blocks of this domain.  Scores are float32, compared as integers (sort_key).
    """
    G: tl.constexpr = H // HKV
    NQ, i_b = tl.cdiv(Tq, BLOCK_Q) if SLOTS > 0 else tl.num_programs(0), tl.program_id(2)
    for i in range(NQ * G if SLOTS > 0 else 1):
        i_n = i // G if SLOTS > 0 else tl.program_id(0)
        i_h = tl.program_id(1) * G + i % G if SLOTS > 0 else tl.program_id(1)
        i_k, i_g = i_h // G, (i_b * H + i_h).to(tl.int64) * NQ + i_n
        p_qh = p_q + i_b.to(tl.int64) * s_q[0] + i_h.to(tl.int64) * s_q[1]
        p_kh = p_k + i_b.to(tl.int64) * s_k[0] + i_k.to(tl.int64) * s_k[1]

        o_r = tl.arange(0, ROWS)
        o_row = i_n * BLOCK_Q + o_r * STRIDE_Q
        m_r = (o_r < BLOCK_Q // STRIDE_Q) & (o_row < Tq)
        o_row = tl.where(m_r, o_row, i_n * BLOCK_Q)
        m_all = tl.full([ROWS], 1, tl.int1)
        b_q = load_queries(p_qh, s_q, o_row, o_row + Tk - Tq, m_all, p_cos, p_sin, CLIP, D, BLOCK_D)

        start = Tk - Tq + i_n * BLOCK_Q  # position of the block's first query
        hi = tl.maximum((start - WINDOW + 1) // BLOCK_K, LO)
        n = hi - LO
        # ceil(log2(n / N)) rounds, one at least, for the scores
        rounds = tl.sum(((tl.full([32], N, tl.int64) << tl.arange(0, 32).to(tl.int64)) < n).to(tl.int32))
        rounds = tl.where(n > 0, tl.maximum(rounds, 1), 0)

        o_n, o_c = tl.arange(0, N), tl.arange(0, 2 * N)
        b_f = LO + (n * o_n.to(tl.int64) // N).to(tl.int32)  # Alg. 1, l. 1: node j is the blocks [f, l)
        b_l = LO + (n * (o_n + 1).to(tl.int64) // N).to(tl.int32)
        b_score = tl.full([N], float("-inf"), tl.float32)
        for r in range(rounds):
            # Alg. 1, l. 5-8: branch c is the left half of node c, or the right half of node c - N
            b_cf, b_cl = tl.gather(b_f, o_c % N, 0), tl.gather(b_l, o_c % N, 0)
            b_mid = (b_cf + b_cl) // 2
            b_cf, b_cl = tl.where(o_c < N, b_cf, b_mid), tl.where(o_c < N, b_mid, b_cl)
            b_block = (b_cf + b_cl) // 2 if REPRESENTATIVE == "center" else (
                b_cf if REPRESENTATIVE == "first" else b_cl - 1)
            b_block = tl.where(b_cf < b_cl, b_block, -1)  # an empty branch has none
            # in the last round the right half is the block that spoke for the node: its score is known
            known = (REPRESENTATIVE == "center") & (r > 0) & (r == rounds - 1)
            count = tl.where(known, N, 2 * N)
            b_new = score_blocks(b_q, p_kh, s_k, bank, i_b * HKV + i_k, b_block, count, CLIP, D, BLOCK_K,
                                 STRIDE_K, BLOCK_D, TILE, SLOTS)  # l. 9-10
            b_old = tl.where(b_block >= 0, tl.gather(b_score, o_c % N, 0), float("-inf"))
            b_new = tl.where(o_c < count, b_new, b_old)
            o_keep = best(b_new, o_c % N * 2 + o_c // N, N)  # Alg. 1, l. 11
            o_keep = o_keep % 2 * N + o_keep // 2
            b_f, b_l = tl.gather(b_cf, o_keep, 0), tl.gather(b_cl, o_keep, 0)
            b_score = tl.gather(b_new, o_keep, 0)
        b_block = tl.where(b_f < b_l, b_f, NO_BLOCK)

        if PREVIOUS > 0:  # put the blocks of the previous selection among the candidates, each block once
            O: tl.constexpr = triton.next_power_of_2(PREVIOUS)
            W: tl.constexpr = max(N, O)
            o_p, o_w = tl.arange(0, O), tl.arange(0, 2 * W)
            b_old = tl.load(p_previous + i_g * PREVIOUS + o_p, mask=o_p < PREVIOUS, other=-1)
            m_p = (b_old >= LO) & (b_old < hi)
            b_old = tl.where(m_p, b_old, -1)
            b_new = score_blocks(b_q, p_kh, s_k, bank, i_b * HKV + i_k, b_old, O, CLIP, D, BLOCK_K, STRIDE_K,
                                 BLOCK_D, TILE, SLOTS)
            b_old = widen(tl.where(m_p, b_old, NO_BLOCK), W, NO_BLOCK)
            b_block = tl.reshape(tl.join(widen(b_block, W, NO_BLOCK), b_old), 2 * W)
            b_new = widen(b_new, W, float("-inf"))
            b_score = tl.reshape(tl.join(widen(b_score, W, float("-inf")), b_new), 2 * W)
            b_key = tl.sort((b_block.to(tl.int64) << 32) | o_w)  # ascending blocks, copies side by side
            b_block = (b_key >> 32).to(tl.int32)
            m_again = (o_w > 0) & (tl.gather(b_block, tl.maximum(o_w - 1, 0), 0) == b_block)
            b_block = tl.where(m_again, NO_BLOCK, b_block)
            b_new = tl.gather(b_score, (b_key & NO_BLOCK).to(tl.int32), 0)
            b_score = tl.where(m_again, float("-inf"), b_new)
        if b_block.shape[0] > M:
            b_block = tl.gather(b_block, best(b_score, tl.arange(0, b_block.shape[0]), M), 0)
        b_block = tl.sort(b_block)
        tl.store(p_blocks + i_g * M + tl.arange(0, M), tl.where(b_block == NO_BLOCK, -1, b_block))


def select_blocks(q: torch.Tensor, k: torch.Tensor, cfg: HiPConfig, previous: Selection | None = None, *,
                  rope: Rope | None = None) -> Selection:
    """hip.select_blocks in one launch: its arguments, result and errors, and the errors of `check_device`.

    From an offloaded cache by hip.py if the search bank is not `within_reach` of what one round looks at.
    """
    check_inputs(q, k)
    check_device(q, previous or (), "previous")
    (B, H, Tq, D), (Hkv, Tk), paged = q.shape, k.shape[1:3], isinstance(k, Paged)
    NQ, most = -(-Tq // cfg.block_q), 2 * cfg.beam * cfg.budget
    if previous is not None:
        check_selection(previous, B, H, NQ, "previous")
        most = max(most, previous.blocks.shape[3])
    if paged and not within_reach(k.bank, most):
        return hip.select_blocks(q, k, cfg, previous, rope=rope)
    check_rope(rope, q, Tk, cfg)
    blocks = torch.empty(B, H, NQ, cfg.budget, dtype=torch.int32, device=q.device)
    old = blocks[..., :0] if previous is None else previous.blocks.int().contiguous()
    grid, slots, bank = (NQ, H, B), 0, None
    if paged:
        grid, slots, bank = (1, Hkv, B), k.bank.slots, pointers(k.bank)
        k.bank.latest = None  # its pages may move
        k = k.bank.rows[0].view(B, Hkv, -1, D)
    with torch.cuda.device_of(q):
        search_kernel[grid](q, k, old, blocks, *table(rope), q.stride(), k.stride(), bank, Tq, Tk,
                            **search_constants(cfg, H, Hkv, D, q.dtype, min(Tq, cfg.block_q), old.shape[3],
                                               slots, math.prod(grid) <= FEW))
    return Selection(blocks, windows(Tq, Tk, cfg, q.device))


def windows(Tq: int, Tk: int, cfg: HiPConfig, device: torch.device) -> torch.Tensor:
    """Positions (NQ,) at which the windows begin.  Of a single one `window_starts` is told, too."""
    if Tq > cfg.block_q:
        return domain(Tq, Tk, cfg, device)[1] * cfg.block_k
    start = int(domain(Tq, Tk, cfg)[1]) * cfg.block_k  # on the host, which so need not wait for the device
    window_start = torch.full((1,), start, device=device)
    window_start.on_host = [start]
    return window_start


def table(rope: Rope | None) -> tuple[torch.Tensor | None, ...]:
    """The arguments p_cos and p_sin of the kernels."""
    return (None, None) if rope is None else tuple(x.contiguous() for x in rope)


# --- attention ---------------------------------------------------------------------------------------------


@triton.jit
def chosen_tokens(p_blocks, o_x, Tk, BLOCK_K: tl.constexpr, M: tl.constexpr):
    """Position of the o_x-th token of the selected blocks; whether it is one: not -1, not past the keys."""
    b_block = tl.load(p_blocks + o_x // BLOCK_K, mask=o_x < M * BLOCK_K, other=-1)
    o_t = b_block * BLOCK_K + o_x % BLOCK_K
    return o_t, (b_block >= 0) & (o_t < Tk)


@triton.jit
def placed(place, i_x, first, o_x, o_t, m_t, BLOCK_K: tl.constexpr):
    """Where in the keys the tokens at positions o_t are: there, or as `look_up` says for key head i_x.

    first: entry of its list at which the blocks begin of which these are tokens o_x.
    """
    o_p = o_t
    if place is not None:
        p = place[0] + i_x.to(tl.int64) * place[1] + (first + o_x // BLOCK_K)
        o_p = tl.load(p, mask=m_t, other=0) * BLOCK_K + o_t % BLOCK_K
    return o_p


@triton.jit
def count_chosen(p_blocks, BLOCK_K: tl.constexpr, M: tl.constexpr):
    """Tokens of the selected blocks up to the last that is not padding."""
    o_m = tl.arange(0, triton.next_power_of_2(M))
    b_block = tl.load(p_blocks + o_m, mask=o_m < M, other=-1)
    return tl.max(tl.where(b_block >= 0, o_m + 1, 0)) * BLOCK_K


@triton.jit
def attend(b_q, b_acc, b_m, b_l, p_k, p_v, s_k, s_v, o_t, o_p, m_t, m_s, scale, CLIP: tl.constexpr,
           D: tl.constexpr):
    """Add tokens o_t (T,) to a running softmax: maximum b_m (R,), sum b_l (R,), weighted values b_acc (R, D).

    Masks: m_t (T,) tokens to load, all others count as 0; m_s (R, T) pairs of query and token that exist; the
    padding of D.  scale: the softmax's, times log2(e).
    """
    b_s = products(b_q, p_k, s_k, o_t, o_p, m_t, CLIP, D) * scale
    b_s = tl.where(m_s, b_s, float("-inf"))
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    b_top = tl.where(b_new == float("-inf"), 0.0, b_new)  # a row without a token yet
    b_p = tl.exp2(b_s - b_top[:, None])
    b_old = tl.exp2(b_m - b_top)
    b_l = b_l * b_old + tl.sum(b_p, 1)
    o_d = tl.arange(0, b_acc.shape[1]).to(tl.int64)
    p = p_v + o_p[:, None].to(tl.int64) * s_v[2] + o_d[None, :] * s_v[3]
    b_v = tl.load(p, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None], input_precision="ieee")
    return b_acc, b_new, b_l


@triton.jit(do_not_specialize=["Tq", "Tk"])
def attention_kernel(p_q, p_k, p_v, p_blocks, p_start, p_o, p_cos, p_sin, s_q, s_k, s_v, place, Tq, Tk, scale,
                     H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, CLIP: tl.constexpr,
                     BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SINK: tl.constexpr, M: tl.constexpr,
                     ROWS: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr):
    """Attention over selected blocks, sink and window.  Equals hip.sparse_attention.

    Grid (NQ * PARTS, H, B); a program owns ROWS rows of one query block of one head, 1 / PARTS of the block.
    p_blocks: (B, H, NQ, M) int32, p_start: (NQ,) int64, p_o: (B, H, Tq, D); contiguous.  place: see `placed`.
    Masks: m_r rows of this block that exist, m_t tokens that exist and that some row of the program may see
    (no later key or value is loaded), m_s the causal mask of sink and window.  Accumulates in float32.
    """
    PARTS: tl.constexpr = (BLOCK_Q + ROWS - 1) // ROWS
    i_n, i_h, i_b = tl.program_id(0) // PARTS, tl.program_id(1), tl.program_id(2)
    i_x, i_c = i_b * HKV + i_h // (H // HKV), SINK // BLOCK_K + i_h % (H // HKV) * M
    i_g = (i_b * H + i_h).to(tl.int64)
    p_blocks += (i_g * (tl.num_programs(0) // PARTS) + i_n) * M
    p_q += i_b.to(tl.int64) * s_q[0] + i_h.to(tl.int64) * s_q[1]
    p_k += i_b.to(tl.int64) * s_k[0] + (i_h // (H // HKV)).to(tl.int64) * s_k[1]
    p_v += i_b.to(tl.int64) * s_v[0] + (i_h // (H // HKV)).to(tl.int64) * s_v[1]

    o_r, o_d, o_x = tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.arange(0, TILE)
    o_in = tl.program_id(0) % PARTS * ROWS + o_r  # row within the query block
    o_row = i_n * BLOCK_Q + o_in
    m_r, m_d = (o_in < BLOCK_Q) & (o_row < Tq), o_d < D
    m_q = m_r[:, None] & m_d[None, :]
    o_own = o_row + Tk - Tq  # position of each query
    b_q = load_queries(p_q, s_q, o_row, o_own, m_r, p_cos, p_sin, CLIP, D, BLOCK_D)
    b_acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    b_m, b_l = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    end = tl.max(tl.where(m_r, o_own, -1)) + 1

    for x in range(0, count_chosen(p_blocks, BLOCK_K, M), TILE):
        o_t, m_t = chosen_tokens(p_blocks, x + o_x, Tk, BLOCK_K, M)
        o_p, m_s = placed(place, i_x, i_c, x + o_x, o_t, m_t, BLOCK_K), m_t[None, :]
        b_acc, b_m, b_l = attend(b_q, b_acc, b_m, b_l, p_k, p_v, s_k, s_v, o_t, o_p, m_t, m_s, scale, CLIP, D)
    start = tl.load(p_start + i_n).to(tl.int32)
    for x in range(0, SINK + tl.maximum(end - start, 0), TILE):
        o_t = tl.where(x + o_x < SINK, x + o_x, x + o_x - SINK + start)
        m_t, m_s = o_t < end, o_t[None, :] <= o_own[:, None]
        i_w = tl.where(x + o_x < SINK, 0, H // HKV * M)
        o_p = placed(place, i_x, i_w, x + o_x, o_t, m_t, BLOCK_K)
        b_acc, b_m, b_l = attend(b_q, b_acc, b_m, b_l, p_k, p_v, s_k, s_v, o_t, o_p, m_t, m_s, scale, CLIP, D)
    p_o += (i_g * Tq + o_row[:, None]) * D + o_d[None, :]
    tl.store(p_o, (b_acc / b_l[:, None]).to(p_o.dtype.element_ty), mask=m_q)


@triton.jit(do_not_specialize=["Tq", "Tk"])
def split_kernel(p_q, p_k, p_v, p_blocks, p_start, p_part, p_stat, p_cos, p_sin, s_q, s_k, s_v, place, Tq,
                 Tk, scale, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, CLIP: tl.constexpr,
                 BLOCK_K: tl.constexpr, SINK: tl.constexpr, M: tl.constexpr, LOCAL: tl.constexpr,
                 CHOSEN: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr):
    """A share of hip.sparse_attention for one query block of few rows: decoding.

    Grid (LOCAL + G * CHOSEN, Hkv, B), G = H / Hkv.  The first LOCAL programs of a KV head each own a share of
    sink and window, for all its G query heads at once, which read the same keys there; then each query head
    has CHOSEN programs for its own selected blocks.  Row r of a program is query r % Tq of head r // Tq.
    p_part: (B, H, Tq, LOCAL + CHOSEN, D) values, p_stat: (... , 2) maximum and sum; float32.  place: see
    `placed`.
    Masks: m_r rows whose share this is, m_t tokens that exist and some row may see, m_s the causal mask.
    """
    G: tl.constexpr = H // HKV
    i_s, i_k, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_c = tl.maximum(i_s - LOCAL, 0)  # which share of the selected blocks, heads counted through
    o_r, o_d, o_x = tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.arange(0, TILE)
    i_h, i_x = i_k * G + i_c // CHOSEN, i_b * HKV + i_k
    o_h, o_row = i_k * G + o_r // Tq, o_r % Tq
    m_r, m_d = (o_r < Tq * G) & (o_h >= i_h) & (o_h < i_h + tl.where(i_s < LOCAL, G, 1)), o_d < D
    m_q = m_r[:, None] & m_d[None, :]
    p_blocks += (i_b * H + i_h).to(tl.int64) * M
    p_q += i_b.to(tl.int64) * s_q[0] + o_h[:, None].to(tl.int64) * s_q[1]
    p_k += i_b.to(tl.int64) * s_k[0] + i_k.to(tl.int64) * s_k[1]
    p_v += i_b.to(tl.int64) * s_v[0] + i_k.to(tl.int64) * s_v[1]

    o_own = o_row + Tk - Tq
    b_q = load_queries(p_q, s_q, o_row, o_own, m_r, p_cos, p_sin, CLIP, D, BLOCK_D)
    b_acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    b_m, b_l = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)

    share = tl.cdiv(tl.cdiv(count_chosen(p_blocks, BLOCK_K, M), CHOSEN), TILE) * TILE
    first = i_c % CHOSEN * share
    last = tl.where(i_s < LOCAL, first, tl.minimum(first + share, M * BLOCK_K))
    for x in range(first, last, TILE):
        o_t, m_t = chosen_tokens(p_blocks, x + o_x, Tk, BLOCK_K, M)
        i_w = SINK // BLOCK_K + i_c // CHOSEN * M
        o_p, m_s = placed(place, i_x, i_w, x + o_x, o_t, m_t, BLOCK_K), m_t[None, :]
        b_acc, b_m, b_l = attend(b_q, b_acc, b_m, b_l, p_k, p_v, s_k, s_v, o_t, o_p, m_t, m_s, scale, CLIP, D)
    start = tl.load(p_start).to(tl.int32)
    length = SINK + tl.maximum(Tk - start, 0)
    share = tl.cdiv(tl.cdiv(length, LOCAL), TILE) * TILE
    last = tl.where(i_s < LOCAL, tl.minimum((i_s + 1) * share, length), 0)
    for x in range(i_s * share, last, TILE):
        o_t = tl.where(x + o_x < SINK, x + o_x, x + o_x - SINK + start)
        m_t, m_s = o_t < Tk, o_t[None, :] <= o_own[:, None]
        o_p = placed(place, i_x, tl.where(x + o_x < SINK, 0, G * M), x + o_x, o_t, m_t, BLOCK_K)
        b_acc, b_m, b_l = attend(b_q, b_acc, b_m, b_l, p_k, p_v, s_k, s_v, o_t, o_p, m_t, m_s, scale, CLIP, D)
    o_part = ((i_b * H + o_h).to(tl.int64) * Tq + o_row) * (LOCAL + CHOSEN)
    o_part += tl.where(i_s < LOCAL, i_s, LOCAL + i_c % CHOSEN)
    tl.store(p_part + o_part[:, None] * D + o_d[None, :], b_acc, mask=m_q)
    tl.store(p_stat + o_part * 2, b_m, mask=m_r)
    tl.store(p_stat + o_part * 2 + 1, b_l, mask=m_r)


@triton.jit
def merge_kernel(p_part, p_stat, p_o, D: tl.constexpr, PARTS: tl.constexpr, BLOCK_S: tl.constexpr,
                 BLOCK_D: tl.constexpr):
    """Softmax over all from the softmax of the parts: the other half of hip.sparse_attention for decoding.

    Grid (B * H * Tq,); a program owns one query of one head.  Masks: m_s parts that exist, m_d the padding
    of D.  Accumulates in float32.
    """
    i_q = tl.program_id(0).to(tl.int64)
    o_s, o_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    m_s, m_d = o_s < PARTS, o_d < D
    o_s += i_q * PARTS
    b_m = tl.load(p_stat + o_s * 2, mask=m_s, other=float("-inf"))
    b_l = tl.load(p_stat + o_s * 2 + 1, mask=m_s, other=0.0)
    b_part = tl.load(p_part + o_s[:, None] * D + o_d[None, :], mask=m_s[:, None] & m_d[None, :], other=0.0)
    b_w = tl.exp2(b_m - tl.max(b_m, 0))
    b_o = tl.sum(b_part * b_w[:, None], 0) / tl.sum(b_l * b_w, 0)
    tl.store(p_o + i_q * D + o_d, b_o.to(p_o.dtype.element_ty), mask=m_d)


def sparse_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selection: Selection, cfg: HiPConfig,
                     *, scale: float | None = None, rope: Rope | None = None) -> torch.Tensor:
    """hip.sparse_attention: its arguments, result and errors, and the errors of `check_device`.

    From an offloaded cache query block by query block, out of its bank.  Where kernels cannot look up there,
    hip.py puts the pages side by side for them; with rope that is a ValueError, and a case for hip.py alone.
    """
    check_inputs(q, k, v)
    check_device(q, selection, "selection")
    (B, H, Tq, _), (Hkv, Tk) = q.shape, k.shape[1:3]
    NQ = -(-Tq // cfg.block_q)
    check_selection(selection, B, H, NQ, "selection")
    check_rope(rope, q, Tk, cfg)
    split = NQ == 1 and H // Hkv * Tq <= SPLIT_ROWS
    if not isinstance(k, Paged):
        return launch(q, k, v, Tk, selection, cfg, scale, rope, split)
    starts, more = window_starts(selection), (cfg, scale, rope, split)
    if NQ == 1:
        return from_bank(q, k, v, selection, starts[0], *more)
    parts = []
    for i in range(NQ):
        rows = slice(i * cfg.block_q, min(Tq, (i + 1) * cfg.block_q))
        one = Selection(selection.blocks[:, :, i : i + 1], selection.window_start[i : i + 1])
        past = (x.first(Tk - Tq + rows.stop) for x in (k, v))
        parts.append(from_bank(q[:, :, rows], *past, one, starts[i], *more))
    return torch.cat(parts, 2)


def side_by_side(k: Paged, v: Paged, selection: Selection, cfg: HiPConfig) -> tuple:
    """All that one query block looks at as plain tensors: (k, v, selection), for kernels that want these.

    Sink, the blocks of every query head of the group, window: in this order, so that a kernel meets the same
    tokens at the same places as in the whole cache.  selection: with NQ = 1.
    """
    (B, Hkv, Tk, D), lo, start = k.shape, cfg.sink_blocks, int(selection.window_start)
    chosen = selection.blocks.reshape(B * Hkv, -1).long()  # (heads, group * M)
    if start == lo * cfg.block_k:  # none: then sink and window stay at their places
        chosen = chosen[:, :0]
    device, behind = chosen.device, lo + chosen.shape[1]
    window = torch.arange(start, max(start, Tk), cfg.block_k, device=device) // cfg.block_k
    blocks = [torch.arange(lo, device=device).expand(len(chosen), -1), chosen.clamp(min=0)]
    blocks = torch.cat([*blocks, window.expand(len(chosen), -1)], 1)
    parts = k.take(torch.arange(len(chosen), device=device) * k.group, blocks)
    end = Tk + behind * cfg.block_k - start
    k, v = (x.view(B, Hkv, -1, D)[:, :, :end] for x in parts)
    place = selection.blocks
    if chosen.shape[1]:
        place = lo + torch.arange(chosen.shape[1], dtype=torch.int32, device=device).expand_as(chosen)
        place = place.where(chosen >= 0, -1).view_as(selection.blocks)
    return k, v, Selection(place, torch.full_like(selection.window_start, behind * cfg.block_k))


def from_bank(q: torch.Tensor, k: Paged, v: Paged, selection: Selection, start: int, cfg: HiPConfig,
              scale: float | None, rope: Rope | None, split: bool) -> torch.Tensor:
    """sparse_attention of one query block, whose window begins at `start`, from an offloaded cache."""
    if (place := look_up(k, selection.blocks, start, cfg)) is not None:
        near = (x.bank.rows[x.part].view(*k.shape[:2], -1, k.shape[3]) for x in (k, v))
        return launch(q, *near, k.shape[2], selection, cfg, scale, rope, split, place)
    if rope is not None:
        raise ValueError("rope must be None where kernels cannot use an offloaded cache")
    k, v, selection = side_by_side(k, v, selection, cfg)
    return launch(q, k, v, k.shape[2], selection, cfg, scale, None, split)


def window_starts(selection: Selection) -> list[int]:
    """Where the windows begin; the device is asked if `windows` has not noted it."""
    start = selection.window_start
    if not hasattr(start, "on_host"):
        start.on_host = start.tolist()
    return start.on_host


def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, Tk: int, selection: Selection, cfg: HiPConfig,
           scale: float | None, rope: Rope | None, split: bool, place: tuple | None = None) -> torch.Tensor:
    """The kernels of sparse_attention; split: share out the keys of the only query block.

    place: from `look_up`, where k and v are the slots of a bank.
    """
    (B, H, Tq, D), Hkv, NQ = q.shape, k.shape[1], selection.blocks.shape[2]
    blocks, start = selection.blocks.int().contiguous(), selection.window_start.contiguous()
    if not blocks.shape[3]:  # a kernel wants one at least
        blocks = blocks.new_full((B, H, NQ, 1), -1)
    M, scale = blocks.shape[3], (D**-0.5 if scale is None else scale) / math.log(2)  # for powers of two
    o = torch.empty(B, H, Tq, D, dtype=q.dtype, device=q.device)
    more = *table(rope), q.stride(), k.stride(), v.stride(), place, Tq, Tk, scale
    with torch.cuda.device_of(q):
        if not split:
            constants = attention_constants(cfg, H, Hkv, D, q.dtype, M)
            grid = (NQ * -(-cfg.block_q // constants["ROWS"]), H, B)
            attention_kernel[grid](q, k, v, blocks, start, o, *more, **constants)
            return o
        constants = split_constants(cfg, H, Hkv, D, q.dtype, M, Tq)
        LOCAL, CHOSEN = constants["LOCAL"], constants["CHOSEN"]
        shape = (B, H, Tq, LOCAL + CHOSEN)
        part, stat = (torch.empty(*shape, n, dtype=torch.float32, device=q.device) for n in (D, 2))
        split_kernel[(LOCAL + H // Hkv * CHOSEN, Hkv, B)](
            q, k, v, blocks, start, part, stat, *more, **constants)
        merge_kernel[(B * H * Tq,)](part, stat, o, **merge_constants(D, LOCAL + CHOSEN))
    return o


def hip_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cfg: HiPConfig,
                  selection: Selection | None = None, *, scale: float | None = None,
                  rope: Rope | None = None) -> tuple[torch.Tensor, Selection]:
    """Search, unless a selection is given, then attend: (o, selection).  Else as its parts."""
    selection = select_blocks(q, k, cfg, rope=rope) if selection is None else selection
    return sparse_attention(q, k, v, selection, cfg, scale=scale, rope=rope), selection


# --- the offloaded cache -----------------------------------------------------------------------------------
#
# A GPU reads and writes pinned host memory by itself, so kernels can do what hip.py's cache does on the host:
# the page tables are read and changed on the device alone, and nobody waits for anybody.  Pages are not put
# side by side: attention is told in which slots they are (`placed`).


def pointers(bank: Bank) -> tuple:
    """The argument `bank` of kernels: tables, counts, sizes, then store and slots of keys (and of values)."""
    parts = (x for part in zip(bank.store, bank.rows, strict=True) for x in part)
    return bank.slot_of, bank.page_of, bank.used, bank.counted, bank.pages, bank.slots, *parts


def within_reach(bank: Bank, count: int) -> bool:
    """Whether kernels can find `count` pages of a head at once: the slots suffice, and the store is near."""
    near = bank.store[0].device == bank.counted.device or bank.store[0].is_pinned()
    return near and min(count, bank.pages) <= bank.slots


@triton.jit
def copy_pages(p_from, b_from, p_to, b_to, count, BLOCK: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr,
               BLOCK_D: tl.constexpr):
    """Copy `count` pages b_from (C,) to slots b_to (C,), of each page's BLOCK tokens every STRIDE-th.

    Masks: m_x tokens of these pages, and the padding of D.
    """
    KEYS: tl.constexpr = BLOCK // STRIDE
    TOKENS: tl.constexpr = COPY // BLOCK_D
    o_x, o_d = tl.arange(0, TOKENS), tl.arange(0, BLOCK_D)
    for x in range(0, count * KEYS, TOKENS):
        o_c, o_in = (x + o_x) // KEYS, (x + o_x) % KEYS
        m_x = (o_c < count)[:, None] & (o_d < D)[None, :]
        o_c = tl.minimum(o_c, b_from.shape[0] - 1)
        o_f = tl.gather(b_from, o_c, 0).to(tl.int64) * BLOCK + o_in * STRIDE
        o_t = tl.gather(b_to, o_c, 0).to(tl.int64) * KEYS + o_in
        b_x = tl.load(p_from + o_f[:, None] * D + o_d[None, :], mask=m_x)
        tl.store(p_to + o_t[:, None] * D + o_d[None, :], b_x, mask=m_x)


@triton.jit
def find(bank, i_x, again, b_page, BLOCK: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr,
         BLOCK_D: tl.constexpr, SLOTS: tl.constexpr):
    """Slots of pages b_page (C,) of key head i_x, -1 for none.  Brings in what is missing as hip.Bank.find.

    In this function pages and slots are counted from the head's first, in the bank's tables through heads.
    again: how often the last call found its pages once more, to be counted.  SLOTS: of a head, rounded up to
    a power of two.  A head belongs to one program, but to all threads of it: barriers stand where one may
    read what another wrote, or write what another has yet to read.
    Masks: m_s slots that exist, m_one each page once, m_hit pages that are here, m_new that are not, m_out
    slots whose page goes.
    """
    C: tl.constexpr = b_page.shape[0]
    i_x, pages, slots, p_counted = i_x.to(tl.int64), bank[4], bank[5], bank[3]
    p_slot, p_page, p_used = bank[0] + i_x * pages, bank[1] + i_x * slots, bank[2] + i_x * slots
    o_c, o_s = tl.arange(0, C), tl.arange(0, SLOTS)
    m_s = o_s < slots
    tl.debug_barrier()
    b_used = tl.load(p_used + o_s, mask=m_s, other=-1)
    call = tl.max(b_used, 0) + 1
    hits = again * tl.sum((m_s & (b_used == call - 1)).to(tl.int64), 0)
    b_want = tl.sort(tl.where(b_page < 0, NO_BLOCK, b_page))
    m_one = (b_want != NO_BLOCK) & ((o_c == 0) | (tl.gather(b_want, tl.maximum(o_c - 1, 0), 0) != b_want))
    b_slot = tl.load(p_slot + b_want, mask=m_one, other=-1) - i_x * slots
    m_hit, m_new = m_one & (b_slot >= 0), m_one & (b_slot < 0)
    misses = tl.sum(m_new.to(tl.int64), 0)
    tl.debug_barrier()
    tl.store(p_used + b_slot, call, mask=m_hit)
    tl.atomic_add(p_counted, hits + tl.sum(m_hit.to(tl.int64), 0), sem="relaxed")
    if misses > 0:
        tl.debug_barrier()
        # as many slots, those with the lowest last use and number: bisect for the highest of them
        b_key = tl.where(m_s, tl.load(p_used + o_s, mask=m_s, other=0), call) * SLOTS + o_s
        low, high = tl.min(b_key, 0), call * SLOTS
        while low < high:
            middle = (low + high) >> 1
            enough = tl.sum((b_key <= middle).to(tl.int64), 0) >= misses
            low, high = tl.where(enough, low, middle + 1), tl.where(enough, middle, high)
        m_out = b_key <= low
        # take the new pages, both in order
        b_new = tl.sort(tl.where(m_new, b_want, NO_BLOCK))
        b_in = tl.gather(b_new, tl.where(m_out, tl.cumsum(m_out.to(tl.int32), 0) - 1, 0), 0)
        b_old = tl.load(p_page + o_s, mask=m_out, other=-1)
        tl.atomic_add(p_counted + 1, misses, sem="relaxed")
        tl.debug_barrier()
        tl.store(bank[0] + b_old, -1, mask=b_old >= 0)
        tl.store(p_slot + b_in, i_x * slots + o_s, mask=m_out)
        tl.store(p_page + o_s, i_x * pages + b_in, mask=m_out)
        tl.store(p_used + o_s, call, mask=m_out)
        tl.debug_barrier()
        b_to = tl.load(p_slot + b_new, mask=o_c < misses, other=0)  # counted through heads
        for part in tl.static_range(6, len(bank), 2):
            p_store = bank[part] + i_x * pages * BLOCK * D
            copy_pages(p_store, b_new, bank[part + 1], b_to, misses, BLOCK, STRIDE, D, BLOCK_D)
        tl.debug_barrier()
    b_slot = tl.load(p_slot + b_page, mask=b_page >= 0, other=0) - i_x * slots
    return tl.where(b_page >= 0, b_slot, -1).to(tl.int32)


@triton.jit(do_not_specialize=["first", "last", "count", "again"])
def look_up_kernel(p_blocks, p_place, bank, first, last, count, again, LO: tl.constexpr, CHOSEN: tl.constexpr,
                   PAGES: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
                   BLOCK_D: tl.constexpr):
    """Find all pages that a query block looks at, as `side_by_side` does.

    Grid (B * Hkv,); a program owns a key head: LO pages of the sink, CHOSEN blocks of all its query heads,
    then the window from page `first` on, `count` in all, none behind page `last`.  p_blocks: (B * Hkv,
    CHOSEN), p_place: (B * Hkv, PAGES) slots; int32, contiguous.  again: as in `find`.
    Masks: m_b chosen blocks.
    """
    i_x, o_c = tl.program_id(0).to(tl.int64), tl.arange(0, PAGES)
    o_b = o_c - LO
    m_b = (o_b >= 0) & (o_b < CHOSEN)
    b_page = tl.maximum(tl.load(p_blocks + i_x * CHOSEN + o_b, mask=m_b, other=0), 0)
    b_page = tl.where(m_b, b_page, tl.where(o_b < 0, o_c, first + o_b - CHOSEN))
    b_page = tl.where(o_c < count, tl.minimum(b_page, last), -1)
    b_slot = find(bank, i_x, again, b_page, BLOCK, 1, D, BLOCK_D, SLOTS)
    tl.store(p_place + i_x * PAGES + o_c, b_slot)


def look_up(k: Paged, blocks: torch.Tensor, start: int, cfg: HiPConfig) -> tuple | None:
    """Where sink, blocks (B, H, 1, M) and the window from `start` on are in the bank of k; for `placed`.

    Returns slots (B * Hkv, PAGES) int32 and PAGES, or None if that is not `within_reach`.  A decoding step
    mostly looks at what the step before it did, known by the same tensor `blocks`, and finds it where it was.
    """
    (B, Hkv, Tk, D), bank, lo = k.shape, k.bank, cfg.sink_blocks
    first, last, chosen = start // bank.block, (Tk - 1) // bank.block, blocks[0].numel() // Hkv
    known, *sizes, place = bank.latest or (None,) * 5
    if known is blocks and sizes == [lo, first, last]:
        bank.again += 1
        return place
    count = lo + chosen + max(0, last + 1 - first)
    if not within_reach(bank, count):
        return None
    constants = look_up_constants(bank.block, lo, chosen, count, bank.slots, D)
    place = torch.empty(B * Hkv, constants["PAGES"], dtype=torch.int32, device=k.device), constants["PAGES"]
    with torch.cuda.device_of(blocks):
        look_up_kernel[(B * Hkv,)](blocks.int().contiguous(), place[0], pointers(bank), first, last, count,
                                   bank.again, **constants)
    bank.latest, bank.again = (blocks, lo, first, last, place), 0
    return place


@triton.jit(do_not_specialize=["start", "T"])
def append_kernel(p_k, p_v, bank, s_k, s_v, start, T, HKV: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
                  BLOCK_D: tl.constexpr, TOKENS: tl.constexpr):
    """Write T keys and values behind the first `start`.  Equals hip.OffloadedKVCache.write.

    Grid (cdiv(T, TOKENS), Hkv, B); a program owns TOKENS tokens of a key head.
    Masks: m_x tokens that exist and the padding of D, m_s those whose page has a slot.
    """
    i_k, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_x, pages = i_b * HKV + i_k, bank[4]
    o_x, o_d = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK_D)[None, :]
    o_t, m_x = start + o_x, (o_x < T)[:, None] & (o_d < D)
    b_slot = tl.load(bank[0] + i_x * pages + o_t // BLOCK, mask=o_x < T, other=-1)
    o_store = ((i_x * pages * BLOCK + o_t) * D)[:, None] + o_d
    o_slot = ((b_slot * BLOCK + o_t % BLOCK) * D)[:, None] + o_d
    m_s, o_x = m_x & (b_slot >= 0)[:, None], o_x[:, None].to(tl.int64)
    b_k = tl.load(p_k + i_b * s_k[0] + i_k * s_k[1] + o_x * s_k[2] + o_d * s_k[3], mask=m_x)
    b_v = tl.load(p_v + i_b * s_v[0] + i_k * s_v[1] + o_x * s_v[2] + o_d * s_v[3], mask=m_x)
    tl.store(bank[6] + o_store, b_k, mask=m_x)
    tl.store(bank[7] + o_slot, b_k, mask=m_s)
    tl.store(bank[8] + o_store, b_v, mask=m_x)
    tl.store(bank[9] + o_slot, b_v, mask=m_s)


class OffloadedKVCache(hip.OffloadedKVCache):
    """hip.OffloadedKVCache, its arguments and errors; one kernel writes what is appended."""

    def write(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        bank, (B, Hkv, T, D) = self.banks[layer][1], k.shape
        if not within_reach(bank, 0):
            return super().write(layer, start, k, v)
        check_device(k)
        constants = append_constants(bank.block, Hkv, D)
        with torch.cuda.device_of(k):
            append_kernel[(-(-T // constants["TOKENS"]), Hkv, B)](
                k, v, pointers(bank), k.stride(), v.stride(), start, T, **constants)


# --- launch configurations ---------------------------------------------------------------------------------

SPLIT_ROWS = 64  # query rows of a KV head up to which keys are split; more are work enough as they are
SPLIT_TOKENS = 128  # keys of one program of split_kernel
FEW = 132  # programs of search_kernel, as many as an H100 has units to run them
COPY = tl.constexpr(8192)  # numbers that copy_pages has on the way at once


def at_least_16(n: int) -> int:
    """n, or the next power of two."""
    return max(16, triton.next_power_of_2(n))


def tiles(D: int, dtype: torch.dtype, cfg: HiPConfig) -> dict:
    """Keys of a tile and warps of a program, by head size and dtype: small enough that no register spills.

    Not so with clipped positions and D 128: 8 warps, which that needs, are up to 13 times slower on an H100.
    """
    BLOCK_D = triton.next_power_of_2(D)
    if dtype == torch.float32:  # no matrix units: products keep their operands in registers
        tile, warps = 32 if BLOCK_D == 32 else 16, 4 if BLOCK_D < 128 else 8
        return dict(BLOCK_D=BLOCK_D, TILE=tile, num_warps=warps, num_stages=1)
    tile, warps = (64, 4) if BLOCK_D < 128 else (32, 4) if BLOCK_D < 256 else (32, 8)
    if cfg.rope_clip is not None:  # twice the queries and keys to hold
        tile, warps = (32, 4) if BLOCK_D < 256 else (16, 8)
        return dict(BLOCK_D=BLOCK_D, TILE=tile, num_warps=warps, num_stages=1)
    return dict(BLOCK_D=BLOCK_D, TILE=tile, num_warps=warps, num_stages=2)


@functools.cache
def search_constants(cfg: HiPConfig, H: int, Hkv: int, D: int, dtype: torch.dtype, Tq: int, previous: int,
                     slots: int = 0, few: bool = False) -> dict:
    """Constants and options of search_kernel; Tq: queries of a block; previous: blocks of a selection.

    slots: of a bank; few: there are no more programs than FEW.
    """
    sizes, rows = tiles(D, dtype, cfg), at_least_16(triton.cdiv(Tq, cfg.stride_q))
    if dtype != torch.float32 and D <= 128 and cfg.rope_clip is not None:
        sizes["TILE"] = 64  # spills, and is twice as fast on an H100 as tiles that do not
    elif dtype != torch.float32 and D <= 128:
        # one warp, whose sorts need no barriers, or two: up to twice as fast on an H100 as more
        sizes |= dict(TILE=16, num_warps=1) if D > 64 else dict(TILE=64, num_warps=2)
        sizes["num_stages"] = 3
        # a program that has a unit of the GPU to itself uses all of it: 1.6 times as fast on an H100.  Not
        # from 64 rows on, where more warps multiply in another way, and so may choose otherwise
        if few and rows < 64:
            sizes |= dict(TILE=8192 // sizes["BLOCK_D"], num_warps=8)
    sizes["TILE"] = max(sizes["TILE"], cfg.block_k // cfg.stride_k)
    if slots and rows < 64:  # pages to sort and move
        sizes["num_warps"] = 8
    return dict(H=H, HKV=Hkv, D=D, CLIP=cfg.rope_clip or 0, BLOCK_Q=cfg.block_q, BLOCK_K=cfg.block_k,
                STRIDE_Q=cfg.stride_q, STRIDE_K=cfg.stride_k, LO=cfg.sink_blocks,
                WINDOW=cfg.window, M=cfg.budget, N=cfg.beam * cfg.budget, PREVIOUS=previous,
                REPRESENTATIVE=cfg.representative, ROWS=rows, SLOTS=slots and at_least_16(slots), **sizes)


@functools.cache
def attention_constants(cfg: HiPConfig, H: int, Hkv: int, D: int, dtype: torch.dtype, M: int) -> dict:
    """Constants and options of attention_kernel; M: blocks of the selection."""
    sink = cfg.sink_blocks * cfg.block_k
    most = 16 if D > 64 else 32
    if dtype != torch.float32 and (cfg.rope_clip is None or D <= 128):
        most = 64  # with which 4 warps multiply as one group: 6 times as fast with clipped positions
    rows = min(most, at_least_16(cfg.block_q))
    return dict(H=H, HKV=Hkv, D=D, CLIP=cfg.rope_clip or 0, BLOCK_Q=cfg.block_q, BLOCK_K=cfg.block_k,
                SINK=sink, M=M, ROWS=rows, **tiles(D, dtype, cfg))


@functools.cache
def split_constants(cfg: HiPConfig, H: int, Hkv: int, D: int, dtype: torch.dtype, M: int, Tq: int) -> dict:
    """Constants and options of split_kernel; M: blocks of the selection."""
    sink = cfg.sink_blocks * cfg.block_k
    return dict(H=H, HKV=Hkv, D=D, CLIP=cfg.rope_clip or 0, BLOCK_K=cfg.block_k, SINK=sink, M=M,
                LOCAL=triton.cdiv(sink + cfg.window + cfg.block_k, SPLIT_TOKENS),
                CHOSEN=triton.cdiv(M * cfg.block_k, SPLIT_TOKENS),
                ROWS=at_least_16(H // Hkv * Tq), **tiles(D, dtype, cfg))


@functools.cache
def merge_constants(D: int, parts: int) -> dict:
    """Constants and options of merge_kernel."""
    return dict(D=D, PARTS=parts, BLOCK_S=triton.next_power_of_2(parts), BLOCK_D=triton.next_power_of_2(D))


@functools.cache
def look_up_constants(block: int, lo: int, chosen: int, count: int, slots: int, D: int) -> dict:
    """Constants and options of look_up_kernel: pages of sink and chosen blocks, pages in all, slots."""
    return dict(LO=lo, CHOSEN=chosen, PAGES=at_least_16(count), SLOTS=at_least_16(slots), BLOCK=block, D=D,
                BLOCK_D=triton.next_power_of_2(D), num_warps=4)


@functools.cache
def append_constants(block: int, Hkv: int, D: int) -> dict:
    """Constants and options of append_kernel."""
    return dict(HKV=Hkv, BLOCK=block, D=D, BLOCK_D=triton.next_power_of_2(D), TOKENS=16)


# --- checks at the door ------------------------------------------------------------------------------------


def check_device(q: torch.Tensor, selection: Selection | tuple = (), name: str = "") -> None:
    """ValueError, with what to do, where the kernels cannot run: head size, device, dtype."""
    if q.shape[3] not in HEAD_SIZES:
        raise ValueError(f"q must have a head size D of {HEAD_SIZES}, not {q.shape[3]}; hip.py takes any")
    if triton.knobs.runtime.interpret:
        if q.dtype == torch.bfloat16:
            raise ValueError("q must be float32 or float16: Triton's interpreter is wrong in bfloat16")
    elif not q.is_cuda:
        raise ValueError(f"q must be on a GPU, not {q.device}; use hip.py, or set TRITON_INTERPRET=1 first")
    for part in selection:
        if part.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, not on {part.device}")
