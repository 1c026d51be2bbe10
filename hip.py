"""HiP attention: a causal attention that looks at O(log T) keys to choose the few that matter to a query.

Attention scores are local: a key beside a good key tends to be good too.  So one need not score all T keys to
find the best.  Cut the past into N stretches, split each in two, look at *one* block of keys in the middle of
each half, keep the N better halves and split those again, until every stretch is a single block.  That takes
log2(T) rounds at a fixed cost each.  Exact attention over the chosen blocks, a few sink tokens at the start
and a window of recent tokens then replaces attention over everything.  No training, no change of weights.

Queries share the work in blocks of `block_q` rows and keys are chosen in blocks of `block_k`, so all products
are matrix products.

HiP is the first third of this file, down to `sparse_attention`: config, search, scores, attention.  Behind it
stand selections to compare with, gathering, positions clipped at a distance, checks, the offloaded KV cache.

Paper: "A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned
Attention", ICLR 2025, arXiv 2406.09827.  `# Alg. 1` below points into its Algorithm 1.

    paper   code               meaning
    k       top_k              keys that the search may choose for a query block
    b_q     block_q            queries that share one selection
    b_k     block_k            keys in a block, the unit that is chosen
    b_sq    stride_q           every stride_q-th query row of a block takes part in the search
    b_sk    stride_k           every stride_k-th key of a block takes part in the search
    l_d     dense_layers       first layers of the model that attend densely
    r_m     refresh_interval   decoding steps that share one selection

    B batch, H query heads, Hkv key/value heads, Tq and Tk tokens, D head size
    NQ = ceil(Tq / block_q) query blocks, M = top_k // block_k chosen blocks, N = beam * M nodes of the search
    G query blocks of all heads and batch rows, numbered through (or a piece of them), R rows of a query block

Layout is (B, H, T, D).  Query head h reads key head h // (H // Hkv).  Queries are the last Tq of Tk tokens,
row i at position Tk - Tq + i, so that reading a prompt, reading it in chunks and decoding are one function.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# keys of one piece of work, in bytes: few enough to stay in a CPU's cache between gather and product, enough
# to keep its matrix units busy
PIECE_BYTES = 4 << 20
NO_BLOCK = 2**31 - 1  # sorts behind every block; leaves this file as -1
LOWEST = torch.finfo(torch.float32).min  # of a real block, whatever overflowed: above an empty branch's -inf


@dataclass(frozen=True)
class HiPConfig:
    """All numbers of the method; sizes in tokens unless said otherwise.  ValueError if one cannot work.

    Differs from the paper: blocks of 16 keys instead of 2, which is faster, and `beam`, `memory` and
    `dense_tail`, which win back what the larger blocks lose.  The paper's setting is
    `HiPConfig(block_k=2, beam=1, dense_layers=3, dense_tail=0, memory=False)`.
    """

    top_k: int = 512
    block_q: int = 64
    block_k: int = 16
    stride_q: int = 2
    stride_k: int | None = None  # None: 2 in blocks of 16 keys or more (README, results), else 1
    beam: int = 2  # the search keeps beam * top_k keys' worth of nodes; 1 is the paper
    sink: int = 16  # first tokens, always attended to
    window: int = 256  # latest positions that a query always sees, itself included
    representative: str = "center"  # block that stands for a stretch: "center", "first" or "last"
    rope_clip: int | None = None  # the farthest that positions tell apart; None: any distance (`Clipped`)
    # read by the model, not by the functions of this file
    dense_layers: int = 0
    refresh_interval: int = 8  # decoding steps
    dense_tail: int = 64  # last queries of a prompt that attend densely
    memory: bool = True  # decoding starts from the prompt tail's exact selection and carries it on

    def __post_init__(self):
        def check(ok: bool, name: str, wanted: str):
            if not ok:
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)!r}")

        if self.stride_k is None:
            large = isinstance(self.block_k, int) and self.block_k >= 16
            object.__setattr__(self, "stride_k", 2 if large else 1)
        for name in ("stride_k", *(f.name for f in fields(self) if f.type == "int")):
            least = 0 if name in ("sink", "dense_layers", "dense_tail") else 1
            check(type(getattr(self, name)) is int and getattr(self, name) >= least, name,
                  f"a whole number of at least {least}")
        for name in ("top_k", "block_q", "block_k", "beam"):
            check(getattr(self, name).bit_count() == 1, name, "a power of two")
        check(self.top_k % self.block_k == 0, "top_k", f"a multiple of block_k={self.block_k}")
        check(self.block_q % self.stride_q == 0, "stride_q", f"a divisor of block_q={self.block_q}")
        check(self.block_k % self.stride_k == 0, "stride_k", f"a divisor of block_k={self.block_k}")
        check(self.representative in ("center", "first", "last"), "representative", "center, first or last")
        check(isinstance(self.memory, bool), "memory", "True or False")
        check(self.rope_clip is None or type(self.rope_clip) is int and self.rope_clip >= 1, "rope_clip",
              "None or a whole number of at least 1")

    @property
    def budget(self) -> int:  # M
        return self.top_k // self.block_k

    @property
    def sink_blocks(self) -> int:  # lo, where every domain begins
        return -(-self.sink // self.block_k)


class Selection(NamedTuple):
    """What each query block attends to besides the sink; with q, k, v and a config it fixes the output."""

    blocks: torch.Tensor  # (B, H, NQ, M) int32, chosen key blocks, ascending, then -1
    window_start: torch.Tensor  # (NQ,) int64, position at which the window begins


Rope = tuple[torch.Tensor, torch.Tensor]  # cos and sin of each position's D / 2 angles: (rows, D / 2) float32


# --- positions ---------------------------------------------------------------------------------------------


def domain(Tq: int, Tk: int, cfg: HiPConfig, device: torch.device | str = "cpu") -> tuple[int, torch.Tensor]:
    """Blocks [lo, hi) that a query block may choose from: behind the sink, before the window.

    Returns lo, the same for all, and hi, (NQ,) int64.  A domain ends before the window of the block's *first*
    query begins, so it lies in the past of every query of the block and needs no causal mask.
    """
    start = torch.arange(Tk - Tq, Tk, cfg.block_q, device=device)  # (NQ,) position of a block's first query
    lo = cfg.sink_blocks
    return lo, ((start - cfg.window + 1) // cfg.block_k).clamp(min=lo)


def query_blocks(q: torch.Tensor, block_q: int) -> torch.Tensor:
    """The query blocks of (B, H, Tq, D) heads: (G, R, D).  A last block repeats its first row until full."""
    Tq = q.shape[2]
    R = min(block_q, Tq)
    NQ = -(-Tq // R)
    if Tq % R:
        first = q[:, :, (NQ - 1) * R, None]
        q = torch.cat([q, first.expand(-1, -1, NQ * R - Tq, -1)], 2)
    return q.unflatten(2, (NQ, R)).flatten(0, 2)


def row_positions(Tq: int, Tk: int, cfg: HiPConfig, device: torch.device) -> torch.Tensor:
    """Positions (NQ, R) of the rows of `query_blocks`."""
    R = min(cfg.block_q, Tq)
    first = torch.arange(Tk - Tq, Tk, R, device=device)[:, None]
    own = first + torch.arange(R, device=device)
    return own.where(own < Tk, first)


def number(heads: int, NQ: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Head and query block of each of the G = heads * NQ query blocks: two (G,) tensors."""
    g = torch.arange(heads * NQ, device=device)
    return g // NQ, g % NQ


# --- the search --------------------------------------------------------------------------------------------


def best(scores: torch.Tensor, count: int, block: torch.Tensor | None = None) -> torch.Tensor:
    """Where the `count` highest of (..., C) scores stand, in any order; among equals the lower block wins.

    block: (..., C), None: 0, 1, 2 ...
    """
    if block is None:
        block = torch.arange(scores.shape[-1], device=scores.device)
    # whole numbers in the order of the scores and then of the blocks: `topk` of these takes a third of the
    # time of a stable sort
    bits = (scores + 0.0).view(torch.int32)  # no -0.0
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32
    return order.sub_(block).topk(count, sorted=False).indices


def search(score: Callable, lo: int, n: torch.Tensor, cfg: HiPConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Paper Alg. 1: the blocks of [lo, lo + n) that survive the tree search, and their scores.

    score: (G, C) blocks -> (G, C) float32; n: (G,).  Returns (G, N) blocks, NO_BLOCK where a node is empty,
    and (G, N) float32.  Differs from the paper: bounds are rounded down; there are beam * M nodes.
    """
    N, most, scores = cfg.beam * cfg.budget, int(n.max()), None
    bounds = lo + n[:, None] * torch.arange(N + 1, device=n.device) // N
    nodes = torch.stack([bounds[:, :-1], bounds[:, 1:]], -1)  # (G, N, 2): Alg. 1, l. 1, node j is [f, l)
    # ceil(log2(widest node)) rounds, one at least, for the scores; a round too many splits [f, f+1) into
    # nothing and itself: no change
    rounds = max(1, (-(-most // N) - 1).bit_length())
    for r in range(rounds):
        f, l = nodes.unbind(-1)
        mid = (f + l) >> 1  # a division of whole numbers takes ten times as long
        branches = torch.stack([f, mid, mid, l], -1).view(-1, 2 * N, 2)  # Alg. 1, l. 5-8: two of each node
        f, l = branches.unbind(-1)
        speaker = {"center": (f + l) >> 1, "first": f, "last": l - 1}[cfg.representative]
        speaker = speaker.clamp(lo, lo + max(0, most - 1))  # an empty branch may point outside
        if scores is not None and r == rounds - 1 and cfg.representative == "center":
            # the nodes have two blocks at most, of which the right one spoke: its score is known
            scores = torch.stack([score(speaker[:, ::2]), scores], -1).flatten(1)
        else:
            scores = score(speaker)
        scores = scores.masked_fill(f == l, -math.inf)  # Alg. 1, l. 9-10: one block speaks for all
        keep = best(scores, N, f)  # Alg. 1, l. 11
        if cfg.rope_clip is not None:
            keep = keep.sort(-1).values  # in order of position, so that near and far keys stand in runs
        nodes, scores = branches.gather(1, keep[..., None].expand(-1, -1, 2)), scores.gather(1, keep)
    f, l = nodes.unbind(-1)
    return torch.where(f < l, f, NO_BLOCK), scores


def merge(blocks: torch.Tensor, scores: torch.Tensor, M: int) -> torch.Tensor:
    """The M best of the candidates (G, C), each block once: (G, M), ascending, then -1."""
    blocks, order = blocks.sort(dim=-1, stable=True)
    again = F.pad(blocks[:, 1:] == blocks[:, :-1], (1, 0))
    blocks = torch.where(again, NO_BLOCK, blocks)
    scores = scores.gather(1, order).masked_fill(blocks == NO_BLOCK, -math.inf)
    blocks = blocks.gather(1, best(scores, M, blocks)).sort(dim=-1).values
    return blocks.masked_fill_(blocks == NO_BLOCK, -1)


def select_blocks(q: torch.Tensor, k: torch.Tensor, cfg: HiPConfig, previous: Selection | None = None, *,
                  rope: Rope | None = None) -> Selection:
    """Choose up to M key blocks for every query block, by tree search.  (Paper section 3, Alg. 1)

    q: (B, H, Tq, D), k: (B, Hkv, Tk, D); float32, float16 or bfloat16; scores are taken in float32.
    previous: an earlier selection with the same B, H and NQ; its blocks stay candidates.
    rope: with cfg.rope_clip, cos and sin of positions 0, 1, ...: (rows, D / 2) float32 each, at least
    min(Tk, rope_clip + Tq) rows; q and k are then not rotated yet.

    Returns a Selection.  Raises ValueError when shapes, dtypes or devices do not fit together.
    The selection of a block sees all of the block's queries, later ones too, but no later key or value.

    Differs from the paper: `beam` and `previous` add candidates; all are scored by themselves and the best M
    stay.  So a wide search costs search alone, and a block once found yields to better ones only.
    """
    check_inputs(q, k)
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    clip = clipped(q, Tk, cfg, rope)
    lo, hi = domain(Tq, Tk, cfg, q.device)
    NQ, M = len(hi), cfg.budget
    if previous is not None:
        check_selection(previous, B, H, NQ, "previous")
    out = torch.empty(B * H * NQ, M, dtype=torch.int32, device=q.device)
    if int(hi.max()) == lo:  # sink and window cover everything
        return Selection(out.fill_(-1).view(B, H, NQ, M), hi * cfg.block_k)
    rows, own = search_rows(q, Tk, cfg, clip)
    own = own.repeat(B * H, 1)  # (G, R)
    keys = key_blocks(H, cfg.block_k, cfg.stride_k, k, thin=NQ > 1)
    turned = turned_blocks(H, cfg.stride_k, k, Tq, cfg, clip)
    heads, index = number(B * H, NQ, q.device)
    for g in pieces(len(out), 64, q.device):
        i, score = index[g], partial(block_scores, [x[g] for x in rows], own[g], keys, heads[g], cfg=cfg,
                                     clip=clip, turned=turned)
        blocks, scores = search(score, lo, hi[i] - lo, cfg)
        if previous is not None and previous.blocks.shape[3]:
            old = previous.blocks.flatten(0, 2)[g].long()
            inside = (lo <= old) & (old < hi[i, None])
            blocks = torch.cat([blocks, old.where(inside, NO_BLOCK)], 1)
            scores = torch.cat([scores, score(old.where(inside, lo))], 1)
        out[g] = merge(blocks, scores, M)
    return Selection(out.view(B, H, NQ, M), hi * cfg.block_k)


# --- scores ------------------------------------------------------------------------------------------------


def search_rows(q: torch.Tensor, Tk: int, cfg: HiPConfig,
                clip: Clipped | None) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Rows that take part in the search, (G, R, D) for `products`, and their positions (NQ, R)."""
    own = row_positions(q.shape[2], Tk, cfg, q.device)[:, :: cfg.stride_q]
    rows = turned_rows(q, clip, cfg.stride_q)
    return [query_blocks(x, cfg.block_q // cfg.stride_q) for x in rows], own


def block_scores(q: list[torch.Tensor], own: torch.Tensor, k: Blocks | Paged, head: torch.Tensor,
                 blocks: torch.Tensor, cfg: HiPConfig, clip: Clipped | None,
                 turned: Callable | None = None) -> torch.Tensor:
    """Score of key blocks (G, C), the largest product of strided keys and `search_rows`: (G, C) float32.

    own: positions (G, R) of the rows.  turned: see `turned_blocks`.
    """
    C, n, scores = blocks.shape[1], cfg.block_k // cfg.stride_k, []
    in_block = torch.arange(0, cfg.block_k, cfg.stride_k, device=blocks.device)
    for g in pieces(len(blocks), PIECE_BYTES // (4 * C * n * q[0].shape[2]), blocks.device):
        tokens = blocks[g][:, :, None] * cfg.block_k + in_block if clip else None  # (G, C, n)
        b_k = [] if turned else k.take(head[g], blocks[g])
        keys, near = both_ways(b_k, tokens, clip, turned, k, head[g], blocks[g])
        s = products([x[g].float() for x in q], own[g], tokens, keys, near, clip, keys_first=True)
        # (G, c * n, R): the n * R products of a block lie side by side in memory
        scores.append(joined([x.unflatten(1, (-1, n)).flatten(2).amax(-1) for x in s], 1))
    return joined(scores, 0).clamp_(min=LOWEST)


def products(q: list[torch.Tensor], own: torch.Tensor, tokens: torch.Tensor | None, keys: Callable,
             near: Callable, clip: Clipped | None, keys_first: bool = False) -> list[torch.Tensor]:
    """q . k of rows (G, R, D) and keys of C blocks of n: (G, R, C * n) float32, or (G, C * n, R).

    keys, near: of a slice of the C blocks the keys (G, c, n, D), as they came and, with clip, rotated; own
    (G, R) and tokens (G or 1, C, n): with clip, positions.  In runs of keys: `joined` puts them together.
    """
    if len(q) == 1:  # no clip, or nothing that is far
        return [product(q[0], near(slice(None)), keys_first)]
    return clip.products(q, own, tokens, keys, near, keys_first)


def product(q: torch.Tensor, k: torch.Tensor, keys_first: bool) -> torch.Tensor:
    k = k.flatten(1, 2).float()
    return torch.bmm(k, q.transpose(1, 2)) if keys_first else torch.bmm(q, k.transpose(1, 2))


def joined(runs: list[torch.Tensor], dim: int) -> torch.Tensor:
    return torch.cat(runs, dim) if len(runs) > 1 else runs[0]


# --- attention ---------------------------------------------------------------------------------------------


def sparse_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selection: Selection, cfg: HiPConfig,
                     *, scale: float | None = None, rope: Rope | None = None) -> torch.Tensor:
    """Exact attention over sink, selected blocks and window.  (Paper section 3.2, block sparse attention)

    q: (B, H, Tq, D); k, v: (B, Hkv, Tk, D); one dtype.  scale: factor on q . k, default D ** -0.5.
    selection: from `select_blocks`, `oracle_blocks` or `random_blocks`, or an earlier one: the window then
    reaches from its own window_start to the query, however long that has become.  rope: as `select_blocks`.

    Returns (B, H, Tq, D) in q's dtype; scores and softmax are float32.  ValueError when inputs do not fit.
    """
    check_inputs(q, k, v)
    (B, H, Tq, D), Tk, device = q.shape, k.shape[2], q.device
    own = row_positions(Tq, Tk, cfg, device)
    NQ, R = own.shape
    check_selection(selection, B, H, NQ, "selection")
    if (selection.window_start % cfg.block_k).any():
        raise ValueError(f"selection must have windows that begin with a block of {cfg.block_k} tokens")
    scale, clip = D**-0.5 if scale is None else scale, clipped(q, Tk, cfg, rope)
    rows = [query_blocks(x, cfg.block_q) for x in turned_rows(q, clip)]
    turned = turned_blocks(H, 1, k, Tq, cfg, clip)
    far = key_blocks(H, cfg.block_k, 1, k) if turned else None  # then only far keys are wanted as they came
    past = key_blocks(H, cfg.block_k, 1, *((v,) if turned else (k, v)))
    lo = min(cfg.sink_blocks, -(-Tk // cfg.block_k))
    in_block, sink = torch.arange(cfg.block_k, device=device), torch.arange(lo, device=device)
    first = selection.window_start // cfg.block_k
    window = torch.arange(max(0, int((own.amax(1) // cfg.block_k + 1 - first).max())), device=device)

    out = torch.empty(B * H * NQ, R, D, dtype=q.dtype, device=device)
    heads, index = number(B * H, NQ, device)
    looked_at = lo + selection.blocks.shape[3] + len(window)
    for g in pieces(len(out), PIECE_BYTES // (4 * D * cfg.block_k * looked_at), device):
        head, i = heads[g], index[g]
        chosen = selection.blocks.flatten(0, 2)[g].long()  # (G, M)
        if padded := bool((chosen < 0).any()):
            chosen = chosen[:, (chosen >= 0).any(0)]  # what is padding for all need not be gathered
        M = chosen.shape[1]
        blocks = torch.cat([sink.expand(len(i), -1), chosen.clamp(min=0), first[i, None] + window], 1)
        tokens = blocks[..., None] * cfg.block_k + in_block  # (G, C, block_k) positions looked at
        *b_k, b_v = past.take(head, blocks)  # (G, C, block_k, D)
        b_q, at = [x[g].float() * scale for x in rows], own[i]
        keys, near = both_ways(b_k, tokens, clip, turned, far, head, blocks)
        s = joined(products(b_q, at, tokens, keys, near, clip), 2)  # (G, R, C * block_k)
        # causal mask: all that the first row sees is in the past of the others, so only behind it, unless a
        # short text's sink reaches into the window
        seen = int((at[:, 0] - selection.window_start[i]).min())
        behind = (lo + M) * cfg.block_k + seen + 1 if seen >= 0 else 0
        later = tokens.flatten(1)[:, None, behind:] > at[:, :, None]
        s[:, :, behind:].masked_fill_(later, -math.inf)
        if padded:
            padding = (chosen < 0).repeat_interleave(cfg.block_k, 1)
            s[:, :, lo * cfg.block_k : (lo + M) * cfg.block_k].masked_fill_(padding[:, None], -math.inf)
        out[g] = s.softmax(-1).to(v.dtype) @ b_v.flatten(1, 2)
    return out.view(B, H, NQ * R, D)[:, :, :Tq]


def hip_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cfg: HiPConfig,
                  selection: Selection | None = None, *, scale: float | None = None,
                  rope: Rope | None = None) -> tuple[torch.Tensor, Selection]:
    """Search, unless a selection is given, then attend: (o, selection).  Else as its parts."""
    selection = select_blocks(q, k, cfg, rope=rope) if selection is None else selection
    return sparse_attention(q, k, v, selection, cfg, scale=scale, rope=rope), selection


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
                    scale: float | None = None) -> torch.Tensor:
    """Causal attention over everything, the oracle: torch's own.  Shapes as `sparse_attention`."""
    check_inputs(q, k, v)
    (_, H, Tq, _), (Hkv, Tk), mask = q.shape, k.shape[1:3], None
    if Tq == 1:
        # heads that share keys as rows of one product, many times faster on a CPU; and not by cuDNN, which
        # plans anew for each length: decoding would be four times slower
        rows = q.unflatten(1, (Hkv, -1)).flatten(2, 3)  # (B, Hkv, H / Hkv, D)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(rows, k, v, scale=scale).reshape(q.shape)
    if Tq < Tk:  # torch would align the triangle to the start; ours ends where the keys end
        mask = torch.full((Tq, Tk), -math.inf, dtype=q.dtype, device=q.device).triu_(Tk - Tq + 1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=Tq == Tk, scale=scale, enable_gqa=H != Hkv)


def dense_by_pieces(q: torch.Tensor, k: torch.Tensor | Paged, v: torch.Tensor | Paged, cfg: HiPConfig, *,
                    scale: float | None = None, rope: Rope | None = None) -> torch.Tensor:
    """Causal attention over everything, a run of keys at a time, so that not all need be near at once.

    Equals `dense_attention` but for rounding, and can clip positions; for a prompt's tail and dense layers.
    Arguments as `sparse_attention`.
    """
    check_inputs(q, k, v)
    (B, H, Tq, D), (Hkv, Tk) = q.shape, k.shape[1:3]
    scale, clip = D**-0.5 if scale is None else scale, clipped(q, Tk, cfg, rope)
    rows = [x.unflatten(1, (Hkv, -1)).flatten(2, 3).flatten(0, 1).float() * scale  # (B * Hkv, rows, D)
            for x in turned_rows(q, clip)]
    own = torch.arange(Tk - Tq, Tk, device=q.device).repeat(H // Hkv).expand(B * Hkv, -1)  # (B * Hkv, rows)
    o, total, top = torch.zeros_like(rows[0]), 0.0, torch.full_like(rows[0][..., :1], -math.inf)
    token_bytes = 4 * B * (H * Tq + 2 * Hkv * D)  # of scores, key and value
    for piece in pieces(Tk, max(256, PIECE_BYTES // token_bytes), q.device):
        tokens = torch.arange(piece.start, piece.stop, device=q.device)
        b_k, b_v = (x.narrow(2, piece.start, len(tokens)).flatten(0, 1).float() for x in (k, v))
        at_k = tokens[None, :, None]
        s = joined(products(rows, own, at_k, *both_ways([b_k[:, :, None]], at_k, clip), clip), 2)
        if piece.stop > Tk - Tq:
            s.masked_fill_(tokens > own[..., None], -math.inf)
        highest = torch.maximum(top, s.amax(-1, keepdim=True))
        p, shrink, top = (s - highest).exp_(), (top - highest).exp(), highest
        o = o * shrink + p @ b_v
        total = total * shrink + p.sum(-1, keepdim=True)
    return (o / total).to(v.dtype).view(B, H, Tq, D)


def count_scores(Tq: int, Tk: int, selection: Selection, cfg: HiPConfig, searched: bool = True) -> int:
    """Products q . k of one head in this call, to be set against dense attention's Tq * Tk, or half of it.

    searched: count the search as well as the attention.  An upper bound: masked entries of sink and window
    are counted too, and scores of a last round that are known; of `previous` nothing.
    """
    lo, hi = domain(Tq, Tk, cfg)
    rows = min(cfg.block_q, Tq)
    last = torch.arange(len(hi)) * cfg.block_q + rows + Tk - Tq
    keys = (last - selection.window_start.cpu()) + lo * cfg.block_k + selection.blocks.shape[3] * cfg.block_k
    total = int(torch.minimum(keys, last).sum()) * rows
    if searched:
        N = cfg.beam * cfg.budget
        rounds = ((hi - lo) / N).clamp(min=1).log2().ceil().clamp(min=1) * (hi > lo)
        total += int(rounds.sum()) * 2 * N * (cfg.block_k // cfg.stride_k) * -(-rows // cfg.stride_q)
    return total


# --- selections to compare with ----------------------------------------------------------------------------


def oracle_blocks(q: torch.Tensor, k: torch.Tensor, cfg: HiPConfig, *,
                  rope: Rope | None = None) -> Selection:
    """The exact best M blocks by the search's own block score: what `select_blocks` aims at, in O(T^2).

    Arguments, result and errors as `select_blocks`.
    """
    check_inputs(q, k)
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    clip = clipped(q, Tk, cfg, rope)
    blocks = min(int(domain(Tq, Tk, cfg)[1].max()), Tk // cfg.block_k)  # later ones are nobody's domain
    rows, own = search_rows(q, Tk, cfg, clip)
    NQ, R = own.shape
    own = own.flatten().expand(B * H, -1)  # (B * H, NQ * R)
    rows = [x.unflatten(0, (B * H, NQ)).flatten(1, 2).float() for x in rows]
    scores = torch.empty(B * H, NQ, blocks, device=q.device)
    for c in pieces(blocks, 256, q.device):
        tokens = torch.arange(c.start * cfg.block_k, c.stop * cfg.block_k, device=q.device)
        keys = k.narrow(2, c.start * cfg.block_k, len(tokens)).unflatten(2, (-1, cfg.block_k))
        keys = keys[..., :: cfg.stride_k, :].float().repeat_interleave(H // k.shape[1], 1).flatten(0, 1)
        tokens = tokens.view(1, -1, cfg.block_k)[..., :: cfg.stride_k]
        near = clip.keys(keys, tokens) if clip and c.stop * cfg.block_k > clip.zero else keys
        step = max(1, 16 // R)  # query blocks at once: single rows would be little work
        for i in range(0, NQ, step):
            part = slice(i * R, (i + step) * R)
            s = products([x[:, part] for x in rows], own[:, part], tokens, lambda x, keys=keys: keys[:, x],
                         lambda x, near=near: near[:, x], clip, keys_first=True)
            s = joined(s, 1)
            s = s.view(B * H, c.stop - c.start, -1, s.shape[2] // R, R).amax((2, 4))
            scores[:, i : i + step, c] = s.transpose(1, 2)
    return best_of_domain(scores.clamp_(min=LOWEST).view(B, H, NQ, blocks), Tq, Tk, cfg)


def random_blocks(q: torch.Tensor, k: torch.Tensor, cfg: HiPConfig,
                  generator: torch.Generator | None = None) -> Selection:
    """M blocks of each domain at random, the paper's baseline for what pruning by score is worth.

    Arguments, result and errors as `select_blocks`; `generator` makes it repeatable.
    """
    check_inputs(q, k)
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    _, hi = domain(Tq, Tk, cfg, q.device)
    blocks = min(int(hi.max()), Tk // cfg.block_k)
    scores = torch.rand(B, H, len(hi), blocks, generator=generator, device=q.device)
    return best_of_domain(scores, Tq, Tk, cfg)


def best_of_domain(scores: torch.Tensor, Tq: int, Tk: int, cfg: HiPConfig) -> Selection:
    """The M best blocks of every domain, from a score for each block: (B, H, NQ, blocks)."""
    lo, hi = domain(Tq, Tk, cfg, scores.device)
    scores = F.pad(scores, (0, cfg.budget))  # a domain may have fewer than M
    block = torch.arange(scores.shape[3], device=scores.device)
    outside = (block < lo) | (block >= hi[:, None])  # (NQ, blocks)
    keep = best(scores.masked_fill_(outside, -math.inf), cfg.budget)
    keep = torch.where((keep >= lo) & (keep < hi[:, None]), keep, NO_BLOCK).sort(-1).values.int()
    return Selection(keep.masked_fill_(keep == NO_BLOCK, -1), hi * cfg.block_k)


# --- gathering ---------------------------------------------------------------------------------------------


def pieces(total: int, size: int, device: torch.device) -> Iterator[slice]:
    """0 .. total - 1 in runs of `size`, and of more on a GPU."""
    size = max(1, size if device.type == "cpu" else 64 * size)
    return (slice(start, min(total, start + size)) for start in range(0, total, size))


class Blocks:
    """Key blocks of (B, Hkv, T, D) tensors, as rows of one matrix that `index_select` gathers fast.

    A view: a cache of which only a part is filled is not copied.  `Paged`, which stands for the keys of an
    `OffloadedKVCache`, has this `take` too: whoever gathers by it need not know where the keys are.
    """

    def __init__(self, query_heads: int, block_k: int, stride: int, *tensors: torch.Tensor):
        self.block, self.stride, self.length, self.parts = block_k, stride, tensors[0].shape[2], []
        self.in_block = torch.arange(0, block_k, stride, device=tensors[0].device)
        self.room = [x.new_empty(0) for x in tensors]
        for x in tensors:
            B, H, T, D = x.shape
            if x.stride(3) != 1 or x.stride(2) != D or x.stride(1) % D or x.stride(0) % D:
                x = x.contiguous()
            batch, head = x.stride(0) // D, x.stride(1) // D
            group = query_heads // H
            first = [b * batch + h // group * head for b in range(B) for h in range(query_heads)]
            # token t of query head g, numbered through B * query heads, is row first[g] + t of `tokens`, and
            # the block that begins with it the same row of `blocks`, whose rows overlap
            first = torch.tensor(first, device=x.device)
            rows = (B - 1) * batch + (H - 1) * head + T
            tokens = x.as_strided((rows, D), (D, 1))
            blocks = x.as_strided((max(0, rows + 1 - block_k), block_k * D), (D, 1))
            self.parts.append((first, tokens, blocks))

    def take(self, head: torch.Tensor, blocks: torch.Tensor) -> list[torch.Tensor]:
        """Every stride-th key of blocks (G, C) of heads (G,), numbered through B * H: (G, C, keys, D) each.

        A token past the end is the last token once more.  The result is good until the next call.
        """
        taken, at = [], blocks * self.block
        by_token = self.stride > 1 or int(at.max()) + self.block > self.length
        if by_token:
            at = (at[..., None] + self.in_block).clamp(max=self.length - 1).flatten(1)
        for i, (first, tokens, whole) in enumerate(self.parts):
            row = first.index_select(0, head)[:, None] + at
            x = gather(tokens if by_token else whole, row.flatten(), self.room, i)
            taken.append(x.view(*blocks.shape, len(self.in_block), -1))
        return taken


def gather(rows: torch.Tensor, row: torch.Tensor, room: list[torch.Tensor], i: int) -> torch.Tensor:
    """rows[row], in room[i]: fresh pages of memory each time cost the system more than the copy does."""
    if torch.is_grad_enabled() and rows.requires_grad:
        return rows.index_select(0, row)
    size = len(row) * rows.shape[1]
    if len(room[i]) < size:
        room[i] = rows.new_empty(size)
    return torch.index_select(rows, 0, row, out=room[i][:size].view(len(row), -1))


def key_blocks(query_heads: int, block_k: int, stride: int, *tensors: torch.Tensor | Paged,
               thin: bool = False) -> Blocks | Paged:
    """What gathers from these tensors, or from their stand-ins in an offloaded cache.

    thin: much is gathered, so every stride-th key is copied first, as float32.
    """
    if isinstance(tensors[0], Paged):  # keys and values both, whichever this stands for
        return tensors[0]
    if thin:
        tensors, block_k, stride = [x[:, :, ::stride].float() for x in tensors], block_k // stride, 1
    return Blocks(query_heads, block_k, stride, *tensors)


# --- clipped positions -------------------------------------------------------------------------------------


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (..., D), float32: the halves of a head are the coordinates of D / 2 points."""
    (a, b), o = x.float().chunk(2, -1), torch.empty(x.shape, device=x.device)
    first, second = o.chunk(2, -1)  # written in place: torch.cat is 20 times slower here
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return o


class Clipped:
    """Rotary positions of a call whose distances end at cfg.rope_clip: min(own - token, clip).

    So no model meets a distance that it was not trained for (the rule of ReRoPE; not in the paper).  q and k
    come un-rotated.  Of a near pair both are rotated by their positions; for all others the query alone is
    turned, by clip.
    """

    def __init__(self, Tq: int, Tk: int, cfg: HiPConfig, rope: Rope):
        self.clip, self.Tq, self.Tk, (self.cos, self.sin) = cfg.rope_clip, Tq, Tk, rope
        # row 0 of the table stands for this position: what is before it is far from every query, so that a
        # table of clip + Tq rows suffices, however long the text
        self.zero = max(0, Tk - Tq - self.clip)

    def rows(self, q: torch.Tensor, stride: int = 1) -> list[torch.Tensor]:
        """Every stride-th of q (B, H, Tq, D), float32: for near keys, and for far ones if there are any."""
        own, q = slice(self.Tk - self.Tq - self.zero, self.Tk - self.zero, stride), q[:, :, ::stride]
        near = rotate(q, self.cos[own], self.sin[own])
        far = [rotate(q, self.cos[self.clip], self.sin[self.clip])] if self.Tk > self.clip else []
        return [near, *far]

    def keys(self, k: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Keys (G, C, n, D) rotated by their positions (G or 1, C, n), float32."""
        # only what is far from every query, or no key, lies outside of the table
        at = (tokens - self.zero).clamp(0, len(self.cos) - 1)
        turn = (x.index_select(0, at.flatten()).unflatten(0, at.shape) for x in (self.cos, self.sin))
        return rotate(k, *turn)

    def products(self, q: list[torch.Tensor], own: torch.Tensor, tokens: torch.Tensor, keys: Callable,
                 near: Callable, keys_first: bool) -> list[torch.Tensor]:
        """`products` of rows for near keys and rows for far ones."""
        (_, C, n), runs, dim = tokens.shape, [], 1 if keys_first else 2
        is_near = (tokens[:, :, -1] > own.amin(1, keepdim=True) - self.clip).any(0)  # (C,) in some pair
        is_far = (tokens[:, :, 0] <= own.amax(1, keepdim=True) - self.clip).any(0)
        # far pairs are in the first `end` blocks, near ones behind the first `start`; where these overlap,
        # both are computed: little, where blocks stand in order
        is_near, is_far = is_near.nonzero().flatten().tolist(), is_far.nonzero().flatten().tolist()
        start, end = is_near[0] if is_near else C, is_far[-1] + 1 if is_far else 0
        if end > 0:
            runs.append(product(q[1], keys(slice(0, end)), keys_first))
        if start < C:
            runs.append(product(q[0], near(slice(start, C)), keys_first))
        if start < end:
            last, both, token = own - self.clip, (end - start) * n, tokens[:, start:end].flatten(1)
            clipped = token[:, :, None] <= last[:, None] if keys_first else token[:, None] <= last[:, :, None]
            distant, mixed = runs[0].split((start * n, both), dim)
            nearby, rest = runs[1].split((both, (C - end) * n), dim)
            runs = [distant, mixed.where(clipped, nearby), rest]
        return runs


def clipped(q: torch.Tensor, Tk: int, cfg: HiPConfig, rope: Rope | None) -> Clipped | None:
    """The positions of a call, None without rope.  ValueError if rope does not fit."""
    check_rope(rope, q, Tk, cfg)
    return None if rope is None else Clipped(q.shape[2], Tk, cfg, rope)


def turned_rows(q: torch.Tensor, clip: Clipped | None, stride: int = 1) -> list[torch.Tensor]:
    """Every stride-th of q (B, H, Tq, D) for `products`: as they came, or as `Clipped.rows`."""
    return clip.rows(q, stride) if clip else [q[:, :, ::stride]]


def both_ways(b_k: list[torch.Tensor], tokens: torch.Tensor | None, clip: Clipped | None,
              turned: Callable | None = None, k: Blocks | None = None, head: torch.Tensor | None = None,
              blocks: torch.Tensor | None = None) -> tuple[Callable, Callable]:
    """keys and near of `products`.

    b_k: [all keys (G, C, n, D)]; or [], and either kind is gathered when asked for, from k and by `turned`.
    """
    def keys(c: slice) -> torch.Tensor:
        return b_k[0][:, c] if b_k else k.take(head, blocks[:, c])[0]

    def near(c: slice) -> torch.Tensor:
        if turned:
            return turned(head, blocks[:, c])
        return clip.keys(keys(c), tokens[:, c]) if clip else keys(c)

    return keys, near


def turned_blocks(query_heads: int, stride: int, k: torch.Tensor | Paged, Tq: int, cfg: HiPConfig,
                  clip: Clipped | None) -> Callable | None:
    """Keys rotated before they are gathered, if many query blocks gather the same; None: as they come.

    Returns a function that gathers as `Blocks.take`, of blocks that are near some query.
    """
    if clip is None or isinstance(k, Paged) or Tq <= cfg.block_q:
        return None
    lo, skip = divmod(clip.zero, cfg.block_k)  # the first block of these, tokens of it that are far
    near, far = k[:, :, clip.zero - skip :: stride], -(-skip // stride)  # the first `far` of these are far
    turned = torch.zeros(near.shape, device=k.device)
    at = slice(far * stride - skip, k.shape[2] - clip.zero, stride)
    turned[:, :, far:] = rotate(near[:, :, far:], clip.cos[at], clip.sin[at])
    rows = Blocks(query_heads, cfg.block_k // stride, 1, turned)
    return lambda head, blocks: rows.take(head, (blocks - lo).clamp(min=0))[0]


# --- checks at the door ------------------------------------------------------------------------------------


def check_inputs(q: torch.Tensor, *kv: torch.Tensor) -> None:
    """ValueError, naming what came and what was wanted, unless q and the keys and values fit together."""
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q must be (B, H, Tq, D) with no empty dimension, not {tuple(q.shape)}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q must be float32, float16 or bfloat16, not {q.dtype}")
    B, H, Tq, D = q.shape
    for name, x in zip("kv", kv, strict=False):
        if x.ndim != 4 or x.shape[0] != B or x.shape[3] != D or x.shape[1] == 0 or H % x.shape[1]:
            raise ValueError(f"{name} must be ({B}, Hkv, Tk, {D}), Hkv dividing {H}, not {tuple(x.shape)}")
        if x.shape[2] < Tq:
            raise ValueError(f"{name} must hold the queries' own positions, {Tq} or more, not {x.shape[2]}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} like q, not {x.dtype} on {x.device}")
    if len({x.shape for x in kv}) > 1:
        raise ValueError(f"k and v must have one shape, not {tuple(kv[0].shape)} and {tuple(kv[1].shape)}")


def check_rope(rope: Rope | None, q: torch.Tensor, Tk: int, cfg: HiPConfig) -> None:
    if (rope is None) != (cfg.rope_clip is None):
        raise ValueError("rope must be given with rope_clip, and only then; "
                         f"rope_clip is {cfg.rope_clip} here")
    if rope is None:
        return
    half, wanted = q.shape[3] // 2, min(Tk, cfg.rope_clip + q.shape[2])
    for x in rope:
        if x.ndim != 2 or x.shape[1] != half or len(x) < wanted or x.dtype != torch.float32 or q.shape[3] % 2:
            raise ValueError(f"rope must be cos and sin, each ({wanted} or more, {half}) float32, not "
                             f"{tuple(x.shape)} {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"rope must be on {q.device} like q, not on {x.device}")


def check_selection(selection: Selection, B: int, H: int, NQ: int, name: str) -> None:
    if selection.blocks.shape[:3] != (B, H, NQ) or selection.window_start.shape != (NQ,):
        raise ValueError(f"{name} must be for {B} x {H} heads and {NQ} query blocks, not blocks "
                         f"{tuple(selection.blocks.shape)} and {len(selection.window_start)} windows")


# --- the offloaded cache -----------------------------------------------------------------------------------
#
# A query block needs few keys, so few need be near.  `OffloadedKVCache` keeps all keys and values in a store:
# host memory, or a file.  On the device each layer has two banks of pages, a page being one key block of one
# key/value head: one bank for what the search looks at, one for what attention looks at.  A page table says
# in which slot of the bank a page lies; a page that is missing is copied there, in place of the one that was
# used least recently.  The functions above learn nothing of this: a `Paged` takes the place of k or v, and
# its `take` answers with the very rows that `Blocks.take` gathers, so that no result changes by a bit.


def nth_of_its_kind(x: torch.Tensor) -> torch.Tensor:
    """How many equal numbers stand before each of sorted ones: (n,)."""
    return torch.arange(len(x), device=x.device) - torch.searchsorted(x, x)


class Bank:
    """The pages of some heads that are on the device: slots, page table, and counts of what happened.

    store: (heads, pages, block_k, D) tensors that share one page table, keys or keys and values.
    slots: pages that a head may have here.  Of each page every stride-th token is held.
    """

    def __init__(self, store: list[torch.Tensor], slots: int, stride: int, device: torch.device):
        self.store, self.slots, self.block, self.stride = store, slots, store[0].shape[2], stride
        heads, self.pages, _, D = store[0].shape
        shape = heads * slots, self.block // stride, D
        self.rows = [torch.full(shape, math.nan, dtype=x.dtype, device=device) for x in store]
        # pages and slots are numbered through heads; the last entry of a table, -1, is of what is nowhere
        self.slot_of = torch.full((heads * self.pages + 1,), -1, device=device)  # page table
        self.page_of = torch.full((heads * slots,), -1, device=device)  # its inverse, -1: a free slot
        self.last_use = torch.full((heads * slots + 1,), -1, device=device)  # call that last needed a slot
        self.used = self.last_use[:-1].view(heads, slots)
        self.narrowed = 0  # bytes that were moved without a slot
        self.latest, self.found = None, 0  # what the last call wanted and where it is; how many pages
        self.counts = [0, 0]  # hits, misses
        # of hip_triton's kernels: their counts, and calls that wanted the same and are yet to be counted
        self.counted, self.again = torch.zeros(2, dtype=torch.long, device=device), 0

    @property
    def hits(self) -> int:
        self.settle()
        return self.counts[0] + int(self.counted[0])

    @property
    def misses(self) -> int:
        return self.counts[1] + int(self.counted[1])

    @property
    def evictions(self) -> int:
        return self.misses - int((self.page_of >= 0).sum())

    @property
    def bytes(self) -> int:
        """Moved to the device."""
        return self.narrowed + self.misses * sum(rows[0].nbytes for rows in self.rows)

    def settle(self) -> None:
        """Count what kernels have left to be counted, before the last call is another."""
        if self.again:  # kernels number the calls of each head
            self.counted[0] += self.again * (self.used == self.used.amax(1, keepdim=True)).sum()
            self.again = 0

    def find(self, wanted: torch.Tensor) -> torch.Tensor:
        """Slots (n,) of pages (n,), both numbered through heads; of a head no more pages than slots."""
        self.settle()
        # what is nowhere, -1, reads and writes the last entry of a table, which nobody else does
        call, slot = self.used.max() + 1, self.slot_of[wanted]
        self.last_use[slot], new = call, wanted[slot < 0].unique()
        if len(new):
            # as many slots of a head as it has new pages go out, least recently used first (the pages of this
            # call stand last), and take these in the order of their numbers
            h = new // self.pages
            nth = nth_of_its_kind(h)
            age = self.used * self.slots + torch.arange(self.slots, device=h.device)  # of equals the lower
            oldest = age.topk(int(nth.max()) + 1, largest=False).indices  # (heads, most new pages of one)
            s = (h * self.slots + oldest[h, nth]).sort().values
            self.slot_of[self.page_of[s]] = -1
            self.slot_of[new], self.page_of[s], self.last_use[s] = s, new, call
            self.wait()
            for rows, store in zip(self.rows, self.store, strict=True):
                pages = store.flatten(0, 1).index_select(0, new.to(store.device))[:, :: self.stride]
                rows.index_copy_(0, s, pages.to(rows.device))
            slot = self.slot_of[wanted]
        self.found = int((self.used == call).sum())
        self.counts = [self.counts[0] + self.found - len(new), self.counts[1] + len(new)]
        return slot

    def take(self, head: torch.Tensor, page: torch.Tensor, room: list[torch.Tensor]) -> list[torch.Tensor]:
        """Pages (G, C) of heads (G,): (G, C, keys, D) of each store; in several goes if slots are too few."""
        wanted = (head[:, None] * self.pages + page).flatten()
        shape, goes = (*page.shape, *self.rows[0].shape[1:]), 1
        if same := bool(self.latest) and torch.equal(self.latest[0], wanted):  # mostly so while decoding
            self.counts[0] += self.found
        elif int(head.bincount().max()) * page.shape[1] > self.slots:  # else slots suffice in any case
            each, back = wanted.unique(return_inverse=True)
            # the n-th page of a head comes in go n // slots
            go = nth_of_its_kind(each // self.pages)[back] // self.slots
            goes = int(go.max()) + 1
        if goes == 1:
            slot = self.latest[1] if same else self.find(wanted)
            self.latest = wanted, slot
            return [gather(x.flatten(1), slot, room, i).view(shape) for i, x in enumerate(self.rows)]
        out, self.latest = [x.new_empty(shape) for x in self.rows], None
        for n in range(goes):
            slot = self.find(wanted[go == n])
            for x, rows in zip(out, self.rows, strict=True):
                x.flatten(0, 1)[go == n] = rows[slot]
        return out

    def wait(self) -> None:
        """Until all that was appended stands in the store."""
        if self.counted.is_cuda:
            torch.cuda.current_stream(self.counted.device).synchronize()

    def overwrite(self, page: int, token: int, new: torch.Tensor) -> None:
        """Write (parts, heads, n, D) behind the first `token` tokens of a page, in heads that have it."""
        slot = self.slot_of[page : -1 : self.pages]
        here = slot >= 0
        if not here.all():
            slot, new = slot[here], new[:, here]
        for rows, x in zip(self.rows, new, strict=True):
            rows[slot, token : token + x.shape[1]] = x


class Paged:
    """Stands for the k or v (B, Hkv, T, D) of an offloaded cache in the functions of this file."""

    ndim = 4

    def __init__(self, bank: Bank, part: int, shape: tuple[int, ...], group: int):
        self.bank, self.part, self.shape, self.group, self.store = bank, part, shape, group, bank.store[part]
        self.block, self.dtype, self.device = bank.block, self.store.dtype, bank.rows[0].device
        self.room = [x.new_empty(0) for x in bank.rows]

    def take(self, head: torch.Tensor, blocks: torch.Tensor) -> list[torch.Tensor]:
        """As `Blocks.take`; from a bank of keys and values both, whichever this stands for."""
        page = blocks.clamp(max=(self.shape[2] - 1) // self.block)
        return self.bank.take(head // self.group, page, self.room)

    def first(self, tokens: int) -> Paged:
        """The first `tokens` of them."""
        return Paged(self.bank, self.part, (*self.shape[:2], tokens, self.shape[3]), self.group)

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """Tokens (B, Hkv, length, D) straight from the store, as `torch.narrow` does it; dim must be 2."""
        B, H, _, D = self.shape
        self.bank.wait()
        x = self.store.flatten(1, 2).narrow(dim - 1, start, length).to(self.device)
        self.bank.narrowed += x.nbytes
        return x.view(B, H, length, D)


class OffloadedKVCache:
    """Keys and values of all layers in a store, and on the device only what is in use.  (Paper section 4)

    shape: (layers, B, Hkv, tokens, D) that it can hold, for H query heads; of `dtype`, used on `device`.
    store: "host" for host memory (pinned beside a GPU), "disk" for a file in `folder` (None: the system's
    folder for temporary files), which has no name and so vanishes with the process, however that ends.
    resident_tokens: most tokens of a layer and key/value head on the device.  None: as the paper has it,
    top_k + window + sink for attention, where top_k counts for each query head that shares the key/value
    head, and 2 * top_k / stride_k * log2(tokens) for the search, which is what one search looks at.

    Differs from the paper: misses are copied in before a kernel runs, not noticed by it.  ValueError when the
    bound or the store cannot be; OSError when the file cannot be written.
    """

    def __init__(self, shape: tuple[int, ...], H: int, cfg: HiPConfig, dtype: torch.dtype,
                 device: torch.device | str = "cpu", store: str = "host", folder: str | None = None,
                 resident_tokens: int | None = None):
        layers, B, Hkv, tokens, D = shape
        self.shape, self.group, self.length, block = shape, H // Hkv, [0] * layers, cfg.block_k
        pages, keys = -(-tokens // block), block // cfg.stride_k  # keys: of a page, that the search looks at
        chosen = self.group * cfg.budget + -(-(cfg.sink + cfg.window + cfg.block_q) // block) + 2
        looked_at = 2 * cfg.budget * math.ceil(math.log2(max(2, tokens)))
        bound = chosen * block + looked_at * keys if resident_tokens is None else resident_tokens
        if bound < block + keys:
            raise ValueError(f"resident_tokens must be at least {block + keys}, a page of each bank, "
                             f"not {bound}")
        chosen = min(chosen, (bound - keys) // block)  # attention needs all of its pages in every step
        looked_at = (bound - chosen * block) // keys
        self.bound, self.mapping, self.stream = bound, None, None
        if torch.device(device).type == "cuda":
            self.stream = torch.cuda.Stream(device)
        self.store = self.allocate((layers, 2, B * Hkv, pages, block, D), dtype, store, folder)
        self.banks = [(Bank([x[0]], min(pages, looked_at), cfg.stride_k, device),
                       Bank(list(x), min(pages, chosen), 1, device)) for x in self.store]
        self.written = 0  # bytes

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, store: str,
                 folder: str | None) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        need = f"a cache of {self.shape[3]} tokens needs {size / 1e9:.1f} GB"
        if store == "host":
            try:
                return torch.zeros(shape, dtype=dtype, pin_memory=self.stream is not None)
            except RuntimeError as error:
                raise ValueError(f"{need} of host memory: too much; store it on disk") from error
        if store != "disk":
            raise ValueError(f"store must be host or disk, not {store!r}")
        try:
            # without a name: nobody can truncate it, and it is gone with the process, even a killed one
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a disk that is full later would be a signal
                self.mapping = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise ValueError(f"{need} in a file, which cannot be had in {folder or tempfile.gettempdir()}: "
                             f"{error.strerror}") from error
        return torch.frombuffer(self.mapping, dtype=dtype).view(shape)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k, v (B, Hkv, T, D) behind the tokens that the layer has."""
        start, T = self.length[layer], k.shape[2]
        if start + T > self.shape[3]:
            raise ValueError(f"the cache holds {self.shape[3]} tokens, and {start + T} are too many")
        self.write(layer, start, k, v)
        self.length[layer] += T
        self.written += k.nbytes + v.nbytes
        if self.mapping:  # what was read and written stays with the system, no longer with this process
            self.mapping.madvise(mmap.MADV_DONTNEED)

    def write(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Into the store, and into the slot of a page that was begun; the search only meets full pages."""
        T, block, new = k.shape[2], self.store.shape[4], torch.stack([k, v]).flatten(1, 2)  # (2, heads, T, D)
        stored = self.store.flatten(3, 4)[layer, :, :, start : start + T]
        if self.stream:
            here = torch.cuda.current_stream(new.device)
            self.stream.wait_stream(here)
            new.record_stream(self.stream)
            with torch.cuda.stream(self.stream):
                stored.copy_(new, non_blocking=True)
            here.wait_stream(self.stream)  # whoever reads the store does it after this
        else:
            stored.copy_(new)
        if rest := -start % block:
            self.banks[layer][1].overwrite(start // block, start % block, new[:, :, :rest])

    def search_keys(self, layer: int, tokens: int | None = None) -> Paged:
        """The layer's first `tokens` keys, None for all, for `select_blocks` and `oracle_blocks`."""
        return self.paged(self.banks[layer][0], 0, self.length[layer] if tokens is None else tokens)

    def keys(self, layer: int) -> Paged:
        """The layer's keys, for attention; always together with `values`."""
        return self.paged(self.banks[layer][1], 0, self.length[layer])

    def values(self, layer: int) -> Paged:
        return self.paged(self.banks[layer][1], 1, self.length[layer])

    def paged(self, bank: Bank, part: int, tokens: int) -> Paged:
        _, B, Hkv, _, D = self.shape
        return Paged(bank, part, (B, Hkv, tokens, D), self.group)

    def counts(self) -> dict[str, int]:
        """Pages found and missed in the two banks, over all layers and heads, and bytes moved either way."""
        counts = {"moved_bytes": self.written + sum(bank.bytes for pair in self.banks for bank in pair)}
        for name, banks in zip(("search", "attention"), zip(*self.banks, strict=True), strict=True):
            counts |= {f"{name}_{x}": sum(getattr(bank, x) for bank in banks) for x in ("hits", "misses")}
        return counts

    def resident_tokens(self) -> int:
        """Most tokens that a layer and head has on the device; a slot stays full, so also the most ever."""
        return max(sum(int((bank.used >= 0).sum(1).max()) * (bank.block // bank.stride) for bank in pair)
                   for pair in self.banks)
