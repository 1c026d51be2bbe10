"""HiP attention: a causal attention that looks at O(log T) keys to choose the few that matter to a query.

Attention scores are local: a key beside a good key tends to be good too.  So one need not score all T keys to
find the best.  Cut the past into N stretches, split each in two, look at *one* block of keys in the middle of
each half, keep the N better halves and split those again, until every stretch is a single block.  That takes
log2(T) rounds at a fixed cost each.  Exact attention over the chosen blocks, a few sink tokens at the start
and a window of recent tokens then replaces attention over everything.  No training, no change of weights.

Queries share the work in blocks of `block_q` rows and keys are chosen in blocks of `block_k`, so all products
are matrix products.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F

# gathered keys of one piece of work, in bytes: few enough to stay in a CPU's cache between gather and
# product, enough to keep its matrix units busy
PIECE_BYTES = 3 << 20
NO_BLOCK = 2**31 - 1  # sorts behind every block; leaves this file as -1


@dataclass(frozen=True)
class HiPConfig:
    """All numbers of the method; sizes in tokens unless said otherwise.  ValueError if one cannot work.

    Differs from the paper: blocks of 16 keys instead of 2, which is faster, and `beam`, `memory` and
    `dense_tail`, which win back what the larger blocks lose.  The paper's setting is
    `HiPConfig(block_k=2, stride_q=2, beam=1, dense_layers=3, dense_tail=0, memory=False)`.
    """

    top_k: int = 512
    block_q: int = 64
    block_k: int = 16
    stride_q: int = 4  # half the search of stride 2, for 1 % of perplexity (README, results)
    stride_k: int = 1
    beam: int = 2  # the search keeps beam * top_k keys' worth of nodes; 1 is the paper
    sink: int = 16  # first tokens, always attended to
    window: int = 256  # latest positions that a query always sees, itself included
    representative: str = "center"  # block that stands for a stretch: "center", "first" or "last"
    # read by the model, not by the functions of this file
    dense_layers: int = 0
    refresh_interval: int = 8  # decoding steps
    dense_tail: int = 64  # last queries of a prompt that attend densely
    memory: bool = True  # decoding starts from the prompt tail's exact selection and carries it on

    def __post_init__(self):
        def check(ok: bool, name: str, wanted: str):
            if not ok:
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)!r}")

        for name in (f.name for f in fields(self) if f.type == "int"):
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

    @property
    def budget(self) -> int:  # M
        return self.top_k // self.block_k


class Selection(NamedTuple):
    """What each query block attends to besides the sink; with q, k, v and a config it fixes the output."""

    blocks: torch.Tensor  # (B, H, NQ, M) int32, chosen key blocks, ascending, then -1
    window_start: torch.Tensor  # (NQ,) int64, position at which the window begins


# --- positions and pieces ----------------------------------------------------------------------------------


def domain(Tq: int, Tk: int, cfg: HiPConfig, device: torch.device | str = "cpu") -> tuple[int, torch.Tensor]:
    """Blocks [lo, hi) that a query block may choose from: behind the sink, before the window.

    Returns lo, the same for all, and hi, (NQ,) int64.  A domain ends before the window of the block's *first*
    query begins, so it lies in the past of every query of the block and needs no causal mask.
    """
    lo = -(-cfg.sink // cfg.block_k)
    start = torch.arange(Tk - Tq, Tk, cfg.block_q, device=device)  # (NQ,) position of a block's first query
    return lo, ((start - cfg.window + 1) // cfg.block_k).clamp(min=lo)


class Heads:
    """The tokens of a (B, H, T, D) tensor as rows of one matrix, which `index_select` gathers fast.

    A view: a cache of which only a part is filled, or heads that are a transposed projection, are not copied.
    """

    def __init__(self, x: torch.Tensor, query_heads: int):
        B, H, T, D = x.shape
        if x.stride(3) != 1 or any(stride % D for stride in x.stride()):
            x = x.contiguous()
        batch, head, self.step = (stride // D for stride in x.stride()[:3])
        last_row = (B - 1) * batch + (H - 1) * head + (T - 1) * self.step
        self.rows = x.as_strided((last_row + 1, D), (D, 1))
        first = torch.arange(B)[:, None] * batch + torch.arange(H) * head  # (B, H) row of token 0
        self.first = first.repeat_interleave(query_heads // H, 1).flatten().to(x.device)  # (B * query heads,)
        self.last_token = T - 1

    def take(self, head: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (G, L) of heads (G,), numbered through B * H: (G, L, D).  Past the end: the last token."""
        row = self.first[head, None] + tokens.clamp(max=self.last_token) * self.step
        return self.rows.index_select(0, row.flatten()).unflatten(0, row.shape)


def pieces(total: int, size: int, device: torch.device) -> Iterator[slice]:
    """0 .. total - 1 in runs of `size`, and of more on a GPU."""
    size = max(1, size if device.type == "cpu" else 64 * size)
    return (slice(start, min(total, start + size)) for start in range(0, total, size))


def number(heads: int, NQ: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Head and query block of each of the G = heads * NQ query blocks: two (G,) tensors."""
    g = torch.arange(heads * NQ, device=device)
    return g // NQ, g % NQ


# --- scores ------------------------------------------------------------------------------------------------


def search_rows(q: Heads, head: torch.Tensor, i: torch.Tensor, Tq: int, cfg: HiPConfig) -> torch.Tensor:
    """The query rows by which blocks are scored, every stride_q-th of query block i: (G, D, R) float32."""
    in_block = torch.arange(0, min(cfg.block_q, Tq), cfg.stride_q, device=i.device)
    rows = i[:, None] * cfg.block_q + in_block  # (G, R)
    rows = torch.where(rows < Tq, rows, rows[:, :1])  # past the end: row 0 again, which changes no maximum
    return q.take(head, rows).float().transpose(1, 2).contiguous()


def block_scores(q: torch.Tensor, k: Heads, head: torch.Tensor, blocks: torch.Tensor,
                 cfg: HiPConfig) -> torch.Tensor:
    """Score of key blocks (G, C): the largest q . k of its strided keys with query rows (G, D, R).  (G, C)"""
    G, C = blocks.shape
    in_block = torch.arange(0, cfg.block_k, cfg.stride_k, device=q.device)
    scores = []
    for g in pieces(G, PIECE_BYTES // (4 * C * len(in_block) * q.shape[1]), q.device):
        tokens = (blocks[g, :, None] * cfg.block_k + in_block).flatten(1)
        keys = k.take(head[g], tokens).float()  # (G, C * keys, D)
        scores.append((keys @ q[g]).view(-1, C, len(in_block) * q.shape[2]).amax(-1))
    return finite(torch.cat(scores))


def finite(scores: torch.Tensor) -> torch.Tensor:
    """Keep the score of a real block above the -inf of an empty branch, whatever overflowed."""
    return scores.clamp_(min=torch.finfo(torch.float32).min)


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` highest of (..., C) scores stand, ascending; among equals the first wins."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values


# --- the search --------------------------------------------------------------------------------------------


def search(score: Callable, lo: int, n: torch.Tensor, cfg: HiPConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Paper Alg. 1: the blocks of [lo, lo + n) that survive the tree search, and their scores.

    score: (G, C) blocks -> (G, C) float32; n: (G,).  Returns (G, N) blocks, ascending, NO_BLOCK where a node
    is empty, and (G, N) float32.  Differs from the paper: bounds are rounded down; there are beam * M nodes.
    """
    N, last, scores = cfg.beam * cfg.budget, max(0, int(n.max()) - 1), None
    j = torch.arange(N + 1, device=n.device)
    bounds = lo + n[:, None] * j // N  # (G, N + 1)
    f, l = bounds[:, :-1], bounds[:, 1:]  # Alg. 1, l. 1: node j is the blocks [f, l)
    widest = -(-int(n.max()) // N)
    # one round at least, for the scores; a round too many splits [f, f+1) into nothing and itself: no change
    rounds = max(1, math.ceil(math.log2(max(1, widest))))
    for r in range(rounds):
        mid = (f + l) // 2
        f = torch.stack([f, mid], -1)  # Alg. 1, l. 5-8: two branches of each node, (G, N, 2)
        l = torch.stack([mid, l], -1)
        speaker = {"center": (f + l) // 2, "first": f, "last": l - 1}[cfg.representative].clamp(lo, lo + last)
        if scores is not None and r == rounds - 1 and cfg.representative == "center":
            # of two blocks the right one spoke for the node, so its score is known: saves 1/8 of the search
            new = torch.stack([score(speaker[:, :, 0]), scores], -1)
        else:
            new = score(speaker.flatten(1)).view_as(f)
        scores = new.masked_fill(f == l, -math.inf).flatten(1)  # Alg. 1, l. 9-10: one block speaks for all
        # Alg. 1, l. 11; branches stand in order of position, so that ties go to the lower one
        keep = best(scores, N)
        f, l, scores = (x.flatten(1).gather(1, keep) for x in (f, l, scores))
    return torch.where(f < l, f, NO_BLOCK), scores


def merge(blocks: torch.Tensor, scores: torch.Tensor, M: int) -> torch.Tensor:
    """The M best of the candidates (G, C), each block once: (G, M), ascending, then NO_BLOCK."""
    blocks, order = blocks.sort(dim=-1, stable=True)
    again = F.pad(blocks[:, 1:] == blocks[:, :-1], (1, 0))
    blocks = torch.where(again, NO_BLOCK, blocks)
    scores = scores.gather(1, order).masked_fill(blocks == NO_BLOCK, -math.inf)
    return blocks.gather(1, best(scores, M)).sort(dim=-1).values


def select_blocks(q: torch.Tensor, k: torch.Tensor, cfg: HiPConfig,
                  previous: Selection | None = None) -> Selection:
    """Choose up to M key blocks for every query block, by tree search.  (Paper section 3, Alg. 1)

    q: (B, H, Tq, D), k: (B, Hkv, Tk, D); float32, float16 or bfloat16; scores are taken in float32.
    previous: an earlier selection with the same B, H and NQ; its blocks stay candidates.

    Returns a Selection.  Raises ValueError when shapes, dtypes or devices do not fit together.
    The selection of a block sees all of the block's queries, later ones too, but no later key or value.

    Differs from the paper: `beam` and `previous` add candidates; all are scored by themselves and the best M
    stay.  So a wide search costs search alone, and a block once found yields to better ones only.
    """
    check_inputs(q, k)
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    lo, hi = domain(Tq, Tk, cfg, q.device)
    NQ, M = len(hi), cfg.budget
    if previous is not None:
        check_selection(previous, B, H, NQ, "previous")
    queries, keys = Heads(q, H), Heads(k, H)
    out = torch.empty(B * H * NQ, M, dtype=torch.int32, device=q.device)
    if int(hi.max()) == lo:  # sink and window cover everything
        return Selection(out.fill_(-1).view(B, H, NQ, M), hi * cfg.block_k)
    heads, index = number(B * H, NQ, q.device)
    for g in pieces(len(out), 64, q.device):
        head, i = heads[g], index[g]
        rows = search_rows(queries, head, i, Tq, cfg)

        def score(blocks, rows=rows, head=head):
            return block_scores(rows, keys, head, blocks, cfg)

        blocks, scores = search(score, lo, hi[i] - lo, cfg)
        if previous is not None:
            old = previous.blocks.flatten(0, 2)[g].long()
            inside = (lo <= old) & (old < hi[i, None])
            blocks = torch.cat([blocks, torch.where(inside, old, NO_BLOCK)], 1)
            scores = torch.cat([scores, score(old.clamp(min=0))], 1)
        out[g] = merge(blocks, scores, M).int()
    return Selection(out.masked_fill_(out == NO_BLOCK, -1).view(B, H, NQ, M), hi * cfg.block_k)


def oracle_blocks(q: torch.Tensor, k: torch.Tensor, cfg: HiPConfig) -> Selection:
    """The exact best M blocks by the search's own block score: what `select_blocks` aims at, in O(T^2).

    Arguments, result and errors as `select_blocks`.
    """
    check_inputs(q, k)
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    _, hi = domain(Tq, Tk, cfg, q.device)
    blocks = min(int(hi.max()), Tk // cfg.block_k)  # later ones are nobody's domain
    head, queries = torch.arange(B * H, device=q.device), Heads(q, H)
    keys = k[:, :, : blocks * cfg.block_k].unflatten(2, (blocks, cfg.block_k))[..., :: cfg.stride_k, :]
    keys = keys.flatten(2, 3).float().repeat_interleave(H // k.shape[1], 1).flatten(0, 1)  # (B * H, keys, D)
    scores = []
    for i in range(len(hi)):
        rows = search_rows(queries, head, torch.full_like(head, i), Tq, cfg)
        products = (keys @ rows).view(B * H, blocks, cfg.block_k // cfg.stride_k * rows.shape[2])
        scores.append(finite(products.amax(-1)))
    return best_of_domain(torch.stack(scores, 1).view(B, H, len(hi), blocks), Tq, Tk, cfg)


def random_blocks(q: torch.Tensor, k: torch.Tensor, cfg: HiPConfig,
                  generator: torch.Generator | None = None) -> Selection:
    """M blocks of each domain at random, the paper's baseline for what pruning by score is worth.

    Arguments, result and errors as `select_blocks`; `generator` makes it repeatable.
    """
    check_inputs(q, k)
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    _, hi = domain(Tq, Tk, cfg, q.device)
    scores = torch.rand(B, H, len(hi), int(hi.max()), generator=generator, device=q.device)
    return best_of_domain(scores, Tq, Tk, cfg)


def best_of_domain(scores: torch.Tensor, Tq: int, Tk: int, cfg: HiPConfig) -> Selection:
    """The M best blocks of every domain, from a score for each block: (B, H, NQ, blocks)."""
    lo, hi = domain(Tq, Tk, cfg, scores.device)
    block = torch.arange(scores.shape[3], device=scores.device)
    outside = (block < lo) | (block >= hi[:, None])  # (NQ, blocks)
    scores = F.pad(scores.masked_fill(outside, -math.inf), (0, cfg.budget), value=-math.inf)
    keep = best(scores, cfg.budget)
    keep = torch.where((keep >= lo) & (keep < hi[:, None]), keep, NO_BLOCK).sort(-1).values.int()
    return Selection(keep.masked_fill_(keep == NO_BLOCK, -1), hi * cfg.block_k)


# --- attention ---------------------------------------------------------------------------------------------


def sparse_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selection: Selection, cfg: HiPConfig,
                     *, scale: float | None = None) -> torch.Tensor:
    """Exact attention over sink, selected blocks and window.  (Paper section 3.2, block sparse attention)

    q: (B, H, Tq, D); k, v: (B, Hkv, Tk, D); one dtype.  scale: factor on q . k, default D ** -0.5.
    selection: from `select_blocks`, `oracle_blocks` or `random_blocks`, or an earlier one: the window then
    reaches from its own window_start to the query, however long that has become.

    Returns (B, H, Tq, D) in q's dtype; scores and softmax are float32.  ValueError when inputs do not fit.
    """
    check_inputs(q, k, v)
    (B, H, Tq, D), Tk = q.shape, k.shape[2]
    NQ, R = -(-Tq // cfg.block_q), min(cfg.block_q, Tq)
    check_selection(selection, B, H, NQ, "selection")
    scale = D**-0.5 if scale is None else scale
    device = q.device
    queries, keys, values = Heads(q, H), Heads(k, H), Heads(v, H)

    in_block, in_rows = torch.arange(cfg.block_k, device=device), torch.arange(R, device=device)
    heads, index = number(B * H, NQ, device)
    first = torch.arange(NQ, device=device) * cfg.block_q  # (NQ,) first query row of each block
    sink = torch.arange(-(-cfg.sink // cfg.block_k) * cfg.block_k, device=device)
    longest = int((first + Tk - Tq + R - selection.window_start).max())
    window = torch.arange(max(0, longest), device=device)
    chosen = selection.blocks.shape[3] * cfg.block_k

    out = torch.empty(B * H * NQ, R, D, dtype=q.dtype, device=device)
    for g in pieces(len(out), PIECE_BYTES // (4 * D * (chosen + len(sink) + len(window))), device):
        head, i = heads[g], index[g]
        blocks = selection.blocks.flatten(0, 2)[g]  # (G, M)
        of_blocks = (blocks.long()[:, :, None] * cfg.block_k + in_block).flatten(1).clamp(min=0)
        of_window = selection.window_start[i, None] + window
        tokens = torch.cat([of_blocks, sink.expand(len(i), -1), of_window], 1)  # (G, L) positions looked at
        rows = first[i, None] + in_rows  # (G, R)
        b_q, b_k = queries.take(head, rows).float() * scale, keys.take(head, tokens).float()
        s = b_q @ b_k.transpose(1, 2)  # (G, R, L)
        # causal mask: not for the search's blocks, which lie in the past, nor for what all queries are past
        past = int((rows[:, 0] + Tk - Tq - selection.window_start[i]).min())
        past = chosen + (len(sink) + past if past > 0 else 0)
        later = tokens[:, None, past:] > (rows + Tk - Tq)[:, :, None]
        s[:, :, past:].masked_fill_(later, -math.inf)
        if (blocks < 0).any():
            padding = (blocks < 0).repeat_interleave(cfg.block_k, 1)
            s[:, :, :chosen].masked_fill_(padding[:, None], -math.inf)
        out[g] = s.softmax(-1).to(v.dtype) @ values.take(head, tokens)
    return out.view(B, H, NQ * R, D)[:, :, :Tq]


def hip_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cfg: HiPConfig,
                  selection: Selection | None = None, *, scale: float | None = None,
                  ) -> tuple[torch.Tensor, Selection]:
    """Search, unless a selection is given, then attend: (o, selection).  Else as its parts."""
    selection = select_blocks(q, k, cfg) if selection is None else selection
    return sparse_attention(q, k, v, selection, cfg, scale=scale), selection


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
                    scale: float | None = None) -> torch.Tensor:
    """Causal attention over everything, the oracle: torch's own.  Shapes as `sparse_attention`."""
    check_inputs(q, k, v)
    (_, H, Tq, _), (Hkv, Tk) = q.shape, k.shape[1:3]
    mask = None
    if 1 < Tq < Tk:  # torch would align the triangle to the start; ours ends where the keys end
        mask = torch.full((Tq, Tk), -math.inf, dtype=q.dtype, device=q.device).triu_(Tk - Tq + 1)
    causal, gqa = Tq == Tk, H != Hkv
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa)


def count_scores(Tq: int, Tk: int, selection: Selection, cfg: HiPConfig, searched: bool = True) -> int:
    """Products q . k of one head in this call, to be set against dense attention's Tq * Tk, or half of it.

    searched: count the search as well as the attention.  Masked entries of sink and window are counted too.
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


def check_selection(selection: Selection, B: int, H: int, NQ: int, name: str) -> None:
    if selection.blocks.shape[:3] != (B, H, NQ) or selection.window_start.shape != (NQ,):
        raise ValueError(f"{name} must be for {B} x {H} heads and {NQ} query blocks, not blocks "
                         f"{tuple(selection.blocks.shape)} and {len(selection.window_start)} windows")
