"""HiP attention: a causal attention that looks at O(log T) keys to choose the few that matter to a query.

Attention scores are local: a key beside a good key tends to be good too.  So one need not score all T keys to
find the best.  Cut the past into M stretches (*nodes*), split each in two (its *branches*), look at *one*
block of keys in the middle of each branch, keep the M better branches and split those again, until every one
is a single block.  That takes at most log2(T) rounds at a fixed cost each.  Exact attention over the chosen
blocks, a few sink tokens at the start and a window of recent tokens then replaces attention over everything.
No training, no change of weights.

Work is shared in blocks, so that all of it is matrix products: a *query block* is `block_q` consecutive
queries of all query heads that share a key head, and it chooses blocks of `block_k` keys for all its rows.

Paper: "A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned
Attention", ICLR 2025, arXiv 2406.09827.  `Alg. 1, l. n` below points into its Algorithm 1.

    paper   code               meaning
    k       top_k              keys that the search may choose for a query block
    b_q     block_q            consecutive queries that share one selection
    b_k     block_k            keys in a block, the unit that is chosen
    b_sq    stride_q           every stride_q-th query of a block takes part in the search
    b_sk    stride_k           every stride_k-th key of a block takes part in the search
    l_d     dense_layers       first layers of the model that attend densely
    r_m     refresh_interval   decoding steps that share one selection

    B batch, H query heads, Hkv key heads, Tq and Tk tokens, D head size
    S heads that search (Hkv, or H with per_head), NQ query blocks of each
    M = top_k // block_k nodes of a search, and blocks that it may choose
    G query blocks that are worked on at a time, R rows of one, C key blocks of each, N keys of one

Layout is (B, H, T, D).  Query head h reads key head h // (H // Hkv).  Queries are the last Tq of Tk tokens,
row i at position Tk - Tq + i, so that reading a prompt, reading it in pieces and decoding are one function.

HiP is told from here to the end of `sparse_attention` and what it calls.  Behind that stand selections to
compare with, clipped positions, checks, and the offloaded cache.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GATHERED = 32768  # keys that are gathered at a time, to stay in a CPU's cache, or those of one query block
PIECE = 512  # queries of a head that are worked on at a time, at most, or one query block
NO_BLOCK = 2**31 - 1  # padding: later than every query, so masked, and sorts last; leaves this file as -1
LOWEST = torch.finfo(torch.float32).min  # least score of a real block, above the -inf of what is none

Rope = tuple[Tensor, Tensor]  # cos and sin of positions 0, 1, ...: (positions, D / 2) float32


@dataclass(frozen=True)
class HiPConfig:
    """All numbers of the method; sizes in tokens unless said otherwise.  ValueError if one cannot work.

    Differs from the paper: one search for all query heads of a key head, ranked by attention mass, in blocks
    of 32 keys, with `decode_factor`, `dense_tail` and `memory`.  The paper's setting is `HiPConfig(top_k=512,
    block_k=2, stride_k=1, score="max", per_head=True, dense_layers=3, decode_factor=1, dense_tail=0,
    memory=False)`.
    """

    top_k: int = 2048
    block_q: int = 64
    block_k: int = 32
    stride_q: int = 2
    stride_k: int = 4
    sink: int = 16  # first tokens, rounded up to whole blocks: always attended to
    window: int = 256  # latest positions that a query sees at least, itself included
    representative: str = "center"  # block that stands for a branch: "center", "first" or "last"
    score: str = "mass"  # what a block is worth: "mass", or "max", the paper's (`score_blocks`)
    per_head: bool = False  # a search for each query head, as in the paper, not for each key head
    rope_clip: int | None = None  # distance from which on keys are equally far (`rotated`); None: none is
    # read by the model; in this file only the cache asks for one of them
    dense_layers: int = 0
    refresh_interval: int = 8  # decoding steps
    decode_factor: int = 2  # by how much more decoding chooses, and of how many more keys (`decoding`)
    dense_tail: int = 64  # last queries of a prompt that attend densely
    memory: bool = True  # decoding begins with the best blocks of a prompt's end, and refreshes remember
    beam: InitVar[None] = None  # of version 1

    def __post_init__(self, beam: None):
        def check(ok: bool, name: str, wanted: str):
            if not ok:
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)!r}")

        if beam is not None:
            raise ValueError("beam is gone: all that a search keeps is chosen now, so set top_k instead")
        for f in fields(self):
            least = 0 if f.name in ("sink", "dense_layers", "dense_tail") else 1
            x, wanted = getattr(self, f.name), f"a whole number of at least {least}"
            if f.type == "int":
                check(type(x) is int and x >= least, f.name, wanted)
            if f.type == "int | None":
                check(x is None or type(x) is int and x >= least, f.name, "None or " + wanted)
            if f.type == "bool":
                check(type(x) is bool, f.name, "True or False")
        for name in ("top_k", "block_q", "block_k", "decode_factor"):
            check(getattr(self, name).bit_count() == 1, name, "a power of two")
        check(self.top_k % self.block_k == 0, "top_k", f"a multiple of block_k={self.block_k}")
        check(self.block_q % self.stride_q == 0, "stride_q", f"a divisor of block_q={self.block_q}")
        check(self.block_k % self.stride_k == 0, "stride_k", f"a divisor of block_k={self.block_k}")
        check(self.representative in ("center", "first", "last"), "representative", "center, first or last")
        check(self.score in ("mass", "max"), "score", "mass or max")

    @property
    def decoding(self) -> HiPConfig:
        """For decoding: decode_factor times top_k, and as many times more keys that take part in the search.

        A step's attention costs little beside the model's weights, and much of an answer is lost there.
        """
        wider = dict(top_k=self.top_k * self.decode_factor, decode_factor=1)
        return replace(self, **wider, stride_k=max(1, self.stride_k // self.decode_factor))

    @property
    def budget(self) -> int:  # M
        return self.top_k // self.block_k

    @property
    def sink_blocks(self) -> int:  # lo, where every domain begins
        return -(-self.sink // self.block_k)


class Selection(NamedTuple):
    """What each query block attends to besides the sink; with q, k, v and a config it fixes the output."""

    blocks: Tensor  # (B, S, NQ, M) int32, chosen key blocks, ascending, then -1
    window_start: Tensor  # (NQ,) int64, position at which the window begins


def in_float32(function: Callable) -> Callable:
    """What the function computes in float32 stays so where the caller has switched autocast on."""

    @functools.wraps(function)
    def run(q: Tensor, *args, **named):
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *args, **named)

    return run


def hip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cfg: HiPConfig,
    selection: Selection | None = None,
    *,
    scale: float | None = None,
    rope: Rope | None = None,
) -> tuple[Tensor, Selection]:
    """Search, unless a selection is given, then attend: (o, selection).  Arguments and errors: as below."""
    selection = select_blocks(q, k, cfg, scale=scale, rope=rope) if selection is None else selection
    return sparse_attention(q, k, v, selection, cfg, scale=scale, rope=rope), selection


# --- the search --------------------------------------------------------------------------------------------


@torch.no_grad()
@in_float32
def select_blocks(
    q: Tensor,
    k: Tensor | Pages,
    cfg: HiPConfig,
    previous: Selection | None = None,
    *,
    scale: float | None = None,
    rope: Rope | None = None,
) -> Selection:
    """Choose up to M key blocks for every query block, by tree search.  (Paper section 3, Alg. 1)

    q: (B, H, Tq, D), k: (B, Hkv, Tk, D); float32, float16 or bfloat16; scores are taken in float32.
    previous: an earlier selection of as many searches and query blocks; its blocks stay candidates.
    scale: factor on q . k, default D ** -0.5.
    rope: with cfg.rope_clip, cos and sin of positions 0, 1, ...: (rope_clip + block_q or more, D / 2) float32
    each; q and k are then not rotated yet (`rotated`).

    Returns a Selection.  Raises ValueError when shapes, dtypes or devices do not fit together.
    A query block's choice is made by all of its queries: which key blocks of the past one of them gets can
    depend on later queries of the same block and, with "mass", on keys that these see; on nothing behind it.
    Attention itself is causal.

    Differs from the paper: one search for the query heads that share a key head (not with cfg.per_head); a
    score that estimates attention mass (not with cfg.score="max"); `previous`, whose better blocks stay.
    """
    keys = source(q, (k,), cfg, scale, rope)
    hi, S, M = domain(q.shape[2], keys.shape[2], cfg, q.device)[1], searches(q, keys, cfg), cfg.budget
    if previous is not None:
        check_selection(previous, "previous", len(q), (S,), len(hi))
    blocks = torch.full((len(q), S, len(hi), M), -1, dtype=torch.int32, device=q.device)
    thin = keys.thin(cfg.stride_k, copy=len(hi) > 1)
    for i, x in searching_blocks(q, keys, cfg, scale):
        found, scores = search(x, thin, cfg)
        if previous is not None and previous.blocks.shape[3]:
            old = of_run(previous.blocks, i)  # (G, any)
            old = old.where((cfg.sink_blocks <= old) & (old < x.hi[:, None]), NO_BLOCK)
            found = torch.cat([found, old], 1)
            # at a time no more than a round looks at: so many pages of an offloaded cache are sure to fit
            scores = torch.cat([scores, *(score_blocks(x, thin, b, cfg) for b in old.split(2 * M, 1))], 1)
        blocks[:, :, i] = best_of(found, scores, M).int().view(-1, len(q), S, M).movedim(0, 2)
    return Selection(blocks, hi * cfg.block_k)


def domain(Tq: int, Tk: int, cfg: HiPConfig, device: torch.device | str = "cpu") -> tuple[int, Tensor]:
    """Blocks [lo, hi) that a query block may choose from: behind the sink, before the window.

    Returns lo, the same for all, and hi, (NQ,) int64.  A domain ends before the window of the block's *first*
    query begins, so it lies in the past of every query of the block and needs no causal mask.
    """
    start = torch.arange(Tk - Tq, Tk, cfg.block_q, device=device)  # (NQ,) position of a block's first query
    lo = cfg.sink_blocks
    return lo, ((start - cfg.window + 1) // cfg.block_k).clamp(min=lo)


def search(x: QueryBlocks, keys: Rows | Pages, cfg: HiPConfig) -> tuple[Tensor, Tensor]:
    """Paper Alg. 1: the blocks of [lo, hi) that survive the tree search, and their scores: (G, M) each.

    A domain of at most M blocks is returned whole: attention is then dense.  Of one of at most 2 * M all
    blocks are scored: the choice is then the oracle's.  Nodes that are empty end as NO_BLOCK.
    """
    M, lo, n = cfg.budget, cfg.sink_blocks, (x.hi - cfg.sink_blocks)[:, None]
    bounds = lo + n * torch.arange(M + 1, device=n.device) // M  # rounded down; the paper rounds to nearest
    f, l = bounds[:, :-1], bounds[:, 1:]  # Alg. 1, l. 1: node j is the blocks [f, l)
    # a narrower domain than the widest needs fewer rounds, and more change nothing: [f, f + 1) stays
    scores, rounds = None, rounds_of(int(n.max()), cfg)
    for r in range(rounds):
        mid = (f + l) // 2  # Alg. 1, l. 5-8: two branches of each node
        f, l = torch.stack([f, mid], 2).flatten(1), torch.stack([mid, l], 2).flatten(1)  # (G, 2 * M)
        block = {"center": (f + l) // 2, "first": f, "last": l - 1}[cfg.representative]
        block = block.where(f < l, NO_BLOCK)
        if scores is not None and r == rounds - 1 and cfg.representative == "center":
            # a node has two blocks at most now, and the one that stood for it, (f + l) // 2, is its right
            # branch, of which the score is known
            scores = torch.stack([score_blocks(x, keys, block[:, ::2], cfg), scores], 2).flatten(1)
        else:
            scores = score_blocks(x, keys, block, cfg)  # Alg. 1, l. 9-10: one block speaks for all
        scores = scores.masked_fill(block == NO_BLOCK, -math.inf)
        keep = best(scores, M)  # Alg. 1, l. 11
        f, l, scores = f.gather(1, keep), l.gather(1, keep), scores.gather(1, keep)
    return f.where(f < l, NO_BLOCK), scores


def rounds_of(n: int, cfg: HiPConfig) -> int:
    """Rounds until the widest of M nodes over n blocks is a single block; one at least, for the scores."""
    return max(1, (-(-n // cfg.budget) - 1).bit_length())


def score_blocks(x: QueryBlocks, keys: Rows | Pages, blocks: Tensor, cfg: HiPConfig) -> Tensor:
    """What key blocks (G, C) are worth to their query blocks: (G, C) float32, at least LOWEST.

    "max": the largest product of all.  "mass": the logarithm of the sum over rows of exp(largest product of
    the row) / (sum of exp over what the row sees anyway), so that no row outvotes the rest by being loud.
    """
    (G, C), R = blocks.shape, x.q.shape[1]
    _, b_k = gather(x, keys, blocks, cfg)  # (G, C * N, D)
    s = (b_k.float() @ x.q.transpose(1, 2)).view(G, C, -1, R).amax(2) * x.scale  # (G, C, R); scale > 0
    s = s - x.seen[:, None]
    s = s.logsumexp(2) if cfg.score == "mass" else s.amax(2)
    return s.where(s > LOWEST, LOWEST)


def seen_anyway(x: QueryBlocks, keys: Rows | Pages, cfg: HiPConfig) -> Tensor:
    """What the scores of each row are compared with: (G, R) float32, inf for a row that does not exist.

    "mass": the logarithm of the sum of exp over its products with all keys in sink and window; "max": 0.
    """
    seen = torch.zeros_like(x.at, dtype=torch.float32)
    if cfg.score == "mass":
        blocks = sink_and_window(x, x.hi * cfg.block_k, keys.shape[2], cfg)
        tokens, b_k, *_ = gather(x, keys, blocks, cfg)  # (G, C * N), (G, C * N, D)
        s = x.q * x.scale @ b_k.float().transpose(1, 2)  # (G, R, C * N)
        seen = s.masked_fill_(later(x, tokens), -math.inf).logsumexp(2)
    return seen.masked_fill(x.at >= keys.shape[2], math.inf)


def best(scores: Tensor, count: int) -> Tensor:
    """Where the `count` highest of (G, C) scores stand, ascending; of equals the earlier is better."""
    # whole numbers in the order of the scores and then of the places: `topk` of these takes a third of the
    # time of a stable sort
    bits = (scores + 0.0).view(torch.int32)  # no -0.0
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32
    order -= torch.arange(scores.shape[1], device=scores.device)
    return order.topk(count, sorted=False).indices.sort().values


def best_of(blocks: Tensor, scores: Tensor, M: int) -> Tensor:
    """The M best of the candidates (G, C), C at least M, each block once: (G, M), ascending, then -1."""
    blocks, order = blocks.sort(stable=True)
    again = F.pad(blocks[:, 1:] == blocks[:, :-1], (1, 0)) | (blocks == NO_BLOCK)
    keep = best(scores.gather(1, order).masked_fill(again, -math.inf), M)
    blocks = blocks.masked_fill(again, NO_BLOCK).gather(1, keep).sort().values
    return blocks.masked_fill(blocks == NO_BLOCK, -1)


# --- attention ---------------------------------------------------------------------------------------------


@in_float32
def sparse_attention(
    q: Tensor,
    k: Tensor | Pages,
    v: Tensor | Pages,
    selection: Selection,
    cfg: HiPConfig,
    *,
    scale: float | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """Exact attention over sink, selected blocks and window.  (Paper section 3.2, block sparse attention)

    q: (B, H, Tq, D); k, v: (B, Hkv, Tk, D); one dtype.  scale, rope: as `select_blocks`.
    selection: from `select_blocks`, `oracle_blocks` or `random_blocks`, or an earlier one: the window then
    reaches from its own window_start to the query, however long that has become.  How many query heads share
    its blocks is told by their shape.

    Returns (B, H, Tq, D) in q's dtype; scores and softmax are float32.  ValueError when inputs do not fit.
    """
    keys = source(q, (k, v), cfg, scale, rope)
    (B, H, Tq, D), (blocks, start), bk = q.shape, selection, cfg.block_k
    S, NQ, rows = blocks.shape[1], -(-Tq // cfg.block_q), min(cfg.block_q, Tq)  # rows of a head
    check_selection(selection, "selection", B, (keys.shape[1], H), NQ, bk)
    out = q.new_empty(B, S, H // S, NQ, rows, D)
    dtype = torch.promote_types(q.dtype, torch.bfloat16)  # not float16, in which scores overflow on a CPU
    for i in runs(NQ, B * S, cfg, q.device):
        x = query_blocks(q, keys, i, S, cfg, scale=scale)
        chosen = of_run(blocks, i)  # (G, M)
        chosen = chosen[:, (chosen >= 0).any(0)]  # what is padding for all need not be gathered
        chosen = chosen.where(chosen >= 0, NO_BLOCK)
        always = sink_and_window(x, start[i].repeat_interleave(B * S), keys.shape[2], cfg)
        tokens, b_k, b_v = gather(x, keys, torch.cat([chosen, always], 1), cfg)  # (G, C * N), twice (.., D)
        unseen = later(x, tokens)[:, None]  # (G or 1, 1, R, C * N)
        mask = torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, -math.inf)  # added to the scores
        b_q, b_k, b_v = (y.to(dtype)[:, None] for y in (x.q, b_k, b_v))  # rows as of one head
        o = F.scaled_dot_product_attention(b_q, b_k, b_v, mask, scale=x.scale)  # (G, 1, R, D)
        out[:, :, :, i] = o.view(-1, B, S, H // S, rows, D).movedim(0, 3)
    return out.view(B, H, NQ * rows, D)[:, :, :Tq]


def sink_and_window(x: QueryBlocks, start: Tensor, Tk: int, cfg: HiPConfig) -> Tensor:
    """Blocks (G, C) that query blocks see in any case, with windows from start (G,) on; some may be late."""
    first = (start // cfg.block_k)[:, None]
    last = x.at.amax(1, keepdim=True).clamp(max=Tk - 1) // cfg.block_k
    sink = torch.arange(min(cfg.sink_blocks, -(-Tk // cfg.block_k)), device=x.q.device).expand(len(x.q), -1)
    window = torch.arange(max(0, int((last + 1 - first).max())), device=x.q.device)
    return torch.cat([sink, first + window], 1)


# --- query blocks and the keys that they see ---------------------------------------------------------------


class QueryBlocks(NamedTuple):
    """G query blocks, a run of them of all searches: the unit of work.

    G counts the run's query blocks, then texts, then searches; R counts heads of a group, then rows.
    """

    q: Tensor  # (G, R, D) float32
    at: Tensor  # (G, R) positions of the rows, the block's first first; Tk or more: no such row
    head: Tensor  # (G,) key head of each, numbered through B * Hkv
    scale: float
    hi: Tensor | None = None  # of those that search: (G,) end of the domain
    seen: Tensor | None = None  # and (G, R), `seen_anyway`


def gathered(device: torch.device | str) -> int:
    """Keys that are gathered at a time, unless one query block needs more."""
    return GATHERED if torch.device(device).type == "cpu" else 64 * GATHERED  # a GPU wants few launches


def runs(NQ: int, heads: int, cfg: HiPConfig, device: torch.device | str) -> list[slice]:
    """NQ query blocks, so many at a time that the keys which they look at, for so many heads, fit the cache.

    Powers of two, so that a prompt read in pieces of any multiple of PIECE queries has the same runs.
    """
    size = gathered(device) // (heads * (cfg.top_k + cfg.sink + cfg.window + cfg.block_q))
    size = 1 << max(1, min(size, PIECE // cfg.block_q)).bit_length() - 1
    return [slice(start, min(NQ, start + size)) for start in range(0, NQ, size)]


def query_blocks(q, keys: Rows | Pages, i: slice, S: int, cfg, *, stride=1, scale=None) -> QueryBlocks:
    """Every stride-th row of query blocks i of (B, H, Tq, D), of all S searches."""
    (B, H, Tq, D), (_, Hkv, Tk, _) = q.shape, keys.shape
    R = min(cfg.block_q, Tq)
    inside = torch.arange(0, R, stride, device=q.device)
    # (query blocks, rows of a head)
    row = torch.arange(i.start * R, i.stop * R, R, device=q.device)[:, None] + inside
    b_q = q[:, :, row.clamp(max=Tq - 1)].float()  # (B, H, query blocks, rows of a head, D)
    if keys.rope is not None:  # a query block begins at position rope_clip (`rotated`)
        b_q = rotate(b_q, *(y[cfg.rope_clip + inside] for y in keys.rope))
    b_q = b_q.unflatten(1, (S, -1)).movedim(3, 0).flatten(3, 4).flatten(0, 2)  # (G, R, D)
    at = (row + Tk - Tq).repeat(1, H // S).repeat_interleave(B * S, 0)
    head = (torch.arange(B * S, device=q.device) // (S // Hkv)).repeat(len(row))
    return QueryBlocks(b_q, at, head, D**-0.5 if scale is None else scale)


def searching_blocks(q, keys: Rows | Pages, cfg, scale) -> Iterator[tuple[slice, QueryBlocks]]:
    """Which query blocks have something to choose, some at a time, with what a search needs to know."""
    (lo, hi), S = domain(q.shape[2], keys.shape[2], cfg, q.device), searches(q, keys, cfg)
    for i in runs(len(hi), len(q) * S, cfg, q.device):
        if int(hi[i].max()) > lo:  # else sink and window cover everything
            x = query_blocks(q, keys, i, S, cfg, stride=cfg.stride_q, scale=scale)
            x = x._replace(hi=hi[i].repeat_interleave(len(q) * S))
            yield i, x._replace(seen=seen_anyway(x, keys, cfg))


def later(x: QueryBlocks, tokens: Tensor) -> Tensor:
    """The causal mask: which tokens (G, C * N) are later than which rows, (G, R, C * N), or padding.

    All rows of a query block see what lies before its first.  Where query blocks differ in that alone, one
    mask, G = 1, is enough.
    """
    behind = (tokens - x.at[:, :1]).clamp(min=0)  # by how much a token is later than the first row
    behind = behind[:1] if (behind == behind[:1]).all() else behind
    return behind[:, None] > (x.at - x.at[:, :1])[: len(behind), :, None]


def of_run(blocks: Tensor, i: slice) -> Tensor:
    """Blocks (B, S, NQ, any) of a selection, for the query blocks of a run: (G, any)."""
    return blocks[:, :, i].movedim(2, 0).flatten(0, 2).long()


def searches(q: Tensor, keys: Rows | Pages, cfg: HiPConfig) -> int:
    return q.shape[1] if cfg.per_head else keys.shape[1]


def gather(x: QueryBlocks, keys: Rows | Pages, blocks: Tensor, cfg: HiPConfig) -> list[Tensor]:
    """Tokens (G, C * N) of key blocks (G, C), keys (.., D) as these query blocks see them, values (.., D)."""
    b_k, *b_v = keys.take(x.head, blocks)  # (G, C, N, D)
    stride = cfg.block_k // b_k.shape[2]
    tokens = blocks[..., None] * cfg.block_k + torch.arange(0, cfg.block_k, stride, device=blocks.device)
    if keys.rope is not None:
        b_k = rotated(b_k, tokens - x.at[:, :1, None] + cfg.rope_clip, keys.rope)
    return [tokens.flatten(1), *(y.flatten(1, 2) for y in (b_k, *b_v))]


class Rows:
    """Rows of the key blocks of (B, Hkv, T, D) tensors: keys, or keys and values.

    This and `Pages`, its kind for an offloaded cache, alone know where keys are.  A cache of which a part is
    filled is not copied: all heads are one table of rows, with gaps.
    """

    def __init__(self, tensors: tuple[Tensor, ...], block: int, rope: Rope | None = None, stride: int = 1):
        self.tensors, self.shape, self.block, self.rope = tensors, tensors[0].shape, block, rope
        self.inside = torch.arange(0, block, stride, device=tensors[0].device)
        self.tables = []
        for x in tensors:
            B, H, T, D = x.shape
            if x.stride(3) != 1 or x.stride(2) != D or x.stride(1) % D or x.stride(0) % D:
                x = x.contiguous()
            batch, head = x.stride(0) // D, x.stride(1) // D
            heads = torch.arange(B * H, device=x.device)
            table = x.as_strided(((B - 1) * batch + (H - 1) * head + T, D), (D, 1))
            self.tables.append((heads // H * batch + heads % H * head, table))  # a head's first row, all rows

    def take(self, head: Tensor, blocks: Tensor) -> list[Tensor]:
        """The rows (G, C, N, D) of blocks (G, C) of heads (G,), of each tensor."""
        tokens = (blocks[..., None] * self.block + self.inside).clamp(0, self.shape[2] - 1)  # (G, C, N)
        return [F.embedding(first[head, None, None] + tokens, table) for first, table in self.tables]

    def thin(self, stride: int, copy: bool) -> Rows:
        """Every stride-th row of a block; copy: as float32, since much will be gathered."""
        if not copy:
            return Rows(self.tensors, self.block, self.rope, stride)
        return Rows((self.tensors[0][:, :, ::stride].float(),), self.block // stride, self.rope)


# --- selections to compare with ----------------------------------------------------------------------------


@torch.no_grad()
@in_float32
def oracle_blocks(
    q: Tensor, k: Tensor, cfg: HiPConfig, *, scale: float | None = None, rope: Rope | None = None
) -> Selection:
    """The exact best M blocks by the search's own block score: what `select_blocks` aims at, in O(T^2).

    Arguments but `previous`, result and errors as `select_blocks`.
    """
    keys = source(q, (k,), cfg, scale, rope)
    (lo, hi), S, M = domain(q.shape[2], keys.shape[2], cfg, q.device), searches(q, keys, cfg), cfg.budget
    chosen = torch.full((len(q), S, len(hi), M), -1, dtype=torch.int32, device=q.device)
    thin = keys.thin(cfg.stride_k, copy=True)
    for i, x in searching_blocks(q, keys, cfg, scale):
        every = torch.arange(lo, lo + max(M, int(x.hi.max()) - lo), device=q.device).expand(len(x.q), -1)
        part = max(1, gathered(q.device) // (len(x.q) * cfg.block_k // cfg.stride_k))
        scores = torch.cat([score_blocks(x, thin, some, cfg) for some in every.split(part, 1)], 1)
        found = best_of(every.where(every < x.hi[:, None], NO_BLOCK), scores, M)
        chosen[:, :, i] = found.int().view(-1, len(q), S, M).movedim(0, 2)
    return Selection(chosen, hi * cfg.block_k)


def random_blocks(
    q: Tensor, k: Tensor, cfg: HiPConfig, generator: torch.Generator | None = None
) -> Selection:
    """M blocks of each domain at random, the paper's baseline for what pruning by score is worth.

    Arguments, result and errors as `select_blocks`; `generator` makes it repeatable.
    """
    check(q, (k,))
    (lo, hi), S, M = domain(q.shape[2], k.shape[2], cfg, q.device), searches(q, k, cfg), cfg.budget
    every = torch.arange(lo, lo + max(M, int(hi.max()) - lo), device=q.device)
    every = every.where(every < hi[:, None], NO_BLOCK).repeat(len(q) * S, 1)  # (B * S * NQ, blocks)
    scores = torch.rand(every.shape, generator=generator, dtype=torch.float32, device=q.device)
    return Selection(best_of(every, scores, M).int().view(len(q), S, len(hi), M), hi * cfg.block_k)


@in_float32
def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Causal attention over everything: torch's own.  Shapes as `sparse_attention`."""
    check(q, (k, v), scale)
    (_, H, Tq, _), (Hkv, Tk) = q.shape, k.shape[1:3]
    if Tq == 1:  # heads that share keys as rows of one product: many times faster on a CPU
        rows = q.unflatten(1, (Hkv, -1)).flatten(2, 3)  # (B, Hkv, H / Hkv, D)
        return F.scaled_dot_product_attention(rows, k, v, scale=scale).reshape(q.shape)
    mask = None
    if Tq < Tk and q.is_cuda:  # without a mask in memory
        from torch.nn.attention.bias import causal_lower_right  # which imports a compiler: seconds

        mask = causal_lower_right(Tq, Tk)
    elif Tq < Tk:
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril_(Tk - Tq)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=Tq == Tk, scale=scale, enable_gqa=H != Hkv)


def no_blocks(q: Tensor, keys: torch.Size, cfg: HiPConfig) -> Selection:
    """Sink and window alone, for q (B, H, Tq, D) behind keys of the shape (B, Hkv, Tk, D).

    A window of Tk tokens makes of it dense attention, and of clipped positions the only one there is.
    """
    hi = domain(q.shape[2], keys[2], cfg, q.device)[1]
    none = torch.empty(len(q), keys[1], len(hi), 0, dtype=torch.int32, device=q.device)
    return Selection(none, hi * cfg.block_k)


def count_scores(
    Tq: int, Tk: int, selection: Selection, cfg: HiPConfig, searched: bool = True, previous: int = 0
) -> int:
    """Products q . k that a query head has in this call, to be set against dense attention's Tq * Tk.

    searched: count the search as well as the attention, with so many blocks of a `previous` selection for
    each query block.  What is computed and then masked counts too.
    """
    (B, S, NQ, _), M, bk, R = selection.blocks.shape, cfg.budget, cfg.block_k, min(cfg.block_q, Tq)
    (lo, hi), (blocks, start), total = domain(Tq, Tk, cfg), (x.cpu() for x in selection), 0
    first = torch.arange(NQ, device="cpu") * R + Tk - Tq  # (NQ,) position of a block's first row

    def always(i: slice, start: Tensor, stride: int) -> int:  # keys of sink and the longest window
        last = (first[i] + (R - 1) // stride * stride).clamp(max=Tk - 1)
        return bk * (min(lo, -(-Tk // bk)) + max(0, int((last // bk + 1 - start[i] // bk).max())))

    for i in runs(NQ, B * S, cfg, selection.blocks.device):
        chosen, n = int((blocks[:, :, i] >= 0).flatten(0, 2).any(0).sum()), int(hi[i].max()) - lo
        total += (i.stop - i.start) * R * (bk * chosen + always(i, start, 1))
        if searched and n > 0:
            rounds = rounds_of(n, cfg)
            known = M if rounds > 1 and cfg.representative == "center" else 0
            scored = (2 * M * rounds - known + previous) * bk // cfg.stride_k
            seen = always(i, hi * bk, cfg.stride_q) if cfg.score == "mass" else 0
            total += (i.stop - i.start) * -(-R // cfg.stride_q) * (scored + seen)
    return total


# --- clipped positions -------------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (..., D), float32: the halves of a head are the coordinates of D / 2 points."""
    a, b = x.chunk(2, -1)
    out = x.unflatten(-1, (2, -1)) * cos.unsqueeze(-2)  # (..., 2, D / 2): few passes over much memory
    out[..., 0, :].addcmul_(b, sin, value=-1)
    out[..., 1, :].addcmul_(a, sin)
    return out.flatten(-2)


def rotated(b_k: Tensor, at: Tensor, rope: Rope) -> Tensor:
    """Keys (G, C, N, D) rotated to positions at (G, C, N), which count from rope_clip before the query block.

    A query block begins at position rope_clip, and what lies before 0 stands there, where a rotation is none.
    So no distance passes rope_clip + block_q - 1, and no model meets one that it was not trained for (after
    ReRoPE; not in the paper).
    """
    # for speed: what stands before the first column that is near to some query block needs no rotation
    near = (at[:, :, -1] > 0).any(0).nonzero()
    c = int(near[0]) if len(near) else at.shape[1]
    turn = (F.embedding(at[:, c:].clamp(0, len(y) - 1), y) for y in rope)
    return torch.cat([b_k[:, :c].float(), rotate(b_k[:, c:], *turn)], 1)


# --- checks at the door ------------------------------------------------------------------------------------


def check(q: Tensor, kv: tuple, scale: float | None = None) -> None:
    """ValueError, naming what came and what was wanted, unless q and k (and v) fit together."""
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q must be (B, H, Tq, D) with no empty dimension, not {tuple(q.shape)}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q must be float32, float16 or bfloat16, not {q.dtype}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be a positive number, not {scale}")
    B, H, Tq, D = q.shape
    for name, x in zip("kv", kv, strict=False):
        if len(x.shape) != 4 or (x.shape[0], x.shape[3]) != (B, D) or x.shape[1] == 0 or H % x.shape[1]:
            raise ValueError(f"{name} must be ({B}, Hkv, Tk, {D}), Hkv dividing {H}, not {tuple(x.shape)}")
        if x.shape[2] < Tq:
            raise ValueError(f"{name} must hold the queries' own positions, {Tq} or more, not {x.shape[2]}")
        if (x.dtype, x.device) != (q.dtype, q.device):
            raise ValueError(f"{name} must be {q.dtype} on {q.device} like q, not {x.dtype} on {x.device}")
    if len({x.shape for x in kv}) > 1:
        raise ValueError(f"k and v must have one shape, not {tuple(kv[0].shape)} and {tuple(kv[1].shape)}")


def check_call(q: Tensor, kv: tuple, cfg: HiPConfig, scale: float | None, rope: Rope | None) -> None:
    check(q, kv, scale)
    if (rope is None) != (cfg.rope_clip is None):
        raise ValueError(f"rope must be given with rope_clip, and only then; that is {cfg.rope_clip} here")
    for x in rope or ():
        half, wanted = q.shape[3] / 2, cfg.rope_clip + min(cfg.block_q, q.shape[2])
        if x.ndim != 2 or x.shape[1] != half or len(x) < wanted:
            raise ValueError(f"rope must be cos and sin, {wanted} or more x {half:g}, not {tuple(x.shape)}")
        if (x.dtype, x.device) != (torch.float32, q.device):
            raise ValueError(f"rope must be float32 on {q.device} like q, not {x.dtype} on {x.device}")
    if not isinstance(kv[0], Pages):
        return
    block, stride = kv[0].banks[1].keys, kv[0].banks[0].stride
    if (q.shape[2], cfg.block_k, cfg.stride_k) != (1, block, stride):
        raise ValueError(
            f"an offloaded cache is for single queries with key blocks of {block} and stride_k {stride}, not "
            f"for {q.shape[2]} queries, blocks of {cfg.block_k} and stride_k {cfg.stride_k}"
        )


def source(q: Tensor, kv: tuple, cfg: HiPConfig, scale: float | None, rope: Rope | None) -> Rows | Pages:
    """Where the rows of k (and v) are taken from, when all is checked."""
    check_call(q, kv, cfg, scale, rope)
    pages = isinstance(kv[0], Pages)
    return replace(kv[0], parts=len(kv), rope=rope) if pages else Rows(kv, cfg.block_k, rope)


def check_selection(selection: Selection, name: str, B: int, S: tuple[int, ...], NQ: int, block: int = 1):
    got, wanted = tuple(selection.blocks.shape), " or ".join(map(str, dict.fromkeys(S)))
    if len(got) != 4 or got[0] != B or got[1] not in S or got[2] != NQ or len(selection.window_start) != NQ:
        raise ValueError(
            f"{name} must be of {B} texts, {wanted} searches and {NQ} query blocks, not of blocks {got} "
            f"and {len(selection.window_start)} windows"
        )
    if block > 1 and (selection.window_start % block).any():
        raise ValueError(f"{name} must have windows that begin with a block of {block} tokens")


# --- the offloaded cache -----------------------------------------------------------------------------------
#
# A decoded token needs few keys, so few need be near.  `OffloadedKVCache` keeps all keys and values in a
# store: host memory, or a file.  On the device each layer has two banks of pages, a page being one key block
# of one key head: one bank for what the search looks at, one for what attention looks at.  A page table says
# in which slot of the bank a page lies; a page that is missing is copied there, in place of the one that was
# used least recently.  Search and attention learn nothing of this: `Pages.take` stands beside `Rows.take`.


class Bank:
    """The pages of some heads that are on the device: slots, page table, and counts of what happened.

    store: (heads, pages, block, D) tensors that share one page table: keys, or keys and values.
    slots: pages that a head may have here.  Of each page every stride-th token is held.
    """

    def __init__(self, store: list[Tensor], slots: int, stride: int, device: torch.device | str):
        heads, self.pages, block, D = store[0].shape
        self.store, self.slots, self.stride, self.keys = store, slots, stride, block // stride
        self.rows = [
            torch.full((heads, slots + 1, self.keys, D), math.nan, dtype=x.dtype, device=device)
            for x in store
        ]
        # what is nowhere is in the last slot, and in a free slot is the last page: both are there to be
        # written to, not to be read, so that nothing below depends on what the page tables hold
        self.slot_of = torch.full((heads, self.pages + 1), slots, device=device)  # the page table
        self.page_of = torch.full((heads, slots + 1), self.pages, device=device)  # its inverse
        self.last_use = torch.full((heads, slots + 1), -1, device=device)  # call that last needed a slot
        self.first = torch.arange(heads, device=device)[:, None] * (slots + 1)  # slots counted through heads
        self.call, self.counted = 0, torch.zeros(2, dtype=torch.int64, device=device)  # hits, misses

    def find(self, wanted: Tensor) -> Tensor:
        """Slots of pages wanted (heads, n), with what is missing brought in: (heads, n)."""
        if wanted.shape[1] > self.slots < self.pages:
            raise ValueError(
                f"resident_tokens is too few: {wanted.shape[1]} pages of a head are needed at once, "
                f"and {self.slots} fit"
            )
        self.call += 1
        page = wanted.sort(1).values
        page[:, 1:].masked_fill_(page[:, 1:] == page[:, :-1].clone(), self.pages)  # each once
        slot = self.slot_of.gather(1, page)
        new = (slot == self.slots) & (page < self.pages)
        self.last_use.scatter_(1, slot, self.call)
        self.counted += torch.stack([(slot < self.slots).sum(), new.sum()])
        # the n-th new page takes the slot that was used n-th least recently; those of this call stand last
        least = self.last_use[:, :-1].topk(min(page.shape[1], self.slots), largest=False).indices
        nth = (new.cumsum(1) - 1).clamp(0, least.shape[1] - 1)
        slot = least.gather(1, nth).where(new, self.slots)
        page = page.where(new, self.pages)
        self.slot_of.scatter_(1, self.page_of.gather(1, slot), self.slots)
        self.slot_of.scatter_(1, page, slot)
        self.page_of.scatter_(1, slot, page)
        self.last_use.scatter_(1, slot, self.call)
        self.fetch(page, slot)
        return self.slot_of.gather(1, wanted)

    def fetch(self, page: Tensor, slot: Tensor) -> None:
        """Copy pages (heads, n) from the store to slots (heads, n), where the page is one."""
        head, n = (page < self.pages).nonzero(as_tuple=True)
        if len(head):  # the copy to the host also waits until all that was appended stands in the store
            from_head, from_page = head.to(self.store[0].device), page[head, n].to(self.store[0].device)
            for rows, store in zip(self.rows, self.store, strict=True):
                rows[head, slot[head, n]] = store[from_head, from_page, :: self.stride].to(rows.device)

    def overwrite(self, page: int, token: int, new: list[Tensor]) -> None:
        """Write (heads, n, D) behind the first `token` tokens of a page, in the heads that have it."""
        slot, heads = self.slot_of[:, page], torch.arange(len(self.slot_of), device=self.slot_of.device)
        for rows, x in zip(self.rows, new, strict=True):
            rows[heads, slot, token : token + x.shape[1]] = x

    def resident(self) -> int:
        """Most tokens of a head that are here."""
        return int((self.page_of < self.pages).sum(1).max()) * self.keys


@dataclass(frozen=True)
class Pages:
    """A layer of an offloaded cache, in place of k and of v, for the query that stands at the end of it."""

    store: list[Tensor]  # all keys and all values, (B, Hkv, tokens, D)
    banks: tuple[Bank, Bank]  # of the search, of attention
    shape: tuple[int, ...]  # (B, Hkv, Tk, D) of those that were written
    bank: Bank  # the one that rows are taken from, of so many tensors
    parts: int = 2
    rope: Rope | None = None

    dtype = property(lambda self: self.store[0].dtype)
    device = property(lambda self: self.bank.slot_of.device)

    def thin(self, stride: int, copy: bool) -> Pages:
        """As `Rows.thin`: pages of the search hold no other rows."""
        return replace(self, bank=self.banks[0], parts=1)

    def take(self, head: Tensor, blocks: Tensor) -> list[Tensor]:
        """As `Rows.take`, for as many blocks of each head, all heads in turn."""
        heads, block = len(self.bank.slot_of), self.banks[1].keys
        page = blocks.where(blocks * block < self.shape[2], 0)  # of what is no block, one that is whole
        slot = self.bank.find(page.view(heads, -1)) + self.bank.first
        rows = (x.flatten(2).flatten(0, 1) for x in self.bank.rows[: self.parts])
        return [F.embedding(slot.view(blocks.shape), x).unflatten(2, (-1, self.shape[3])) for x in rows]


class OffloadedKVCache:
    """Keys and values of all layers in a store, and on the device only what decoding uses.  (Paper section 4)

    shape: (layers, B, Hkv, tokens, D) that it can hold, for H query heads; of `dtype`, used on `device`.
    cfg: of the queries that it serves, in a model its `decoding`.
    store: "host" for host memory (pinned beside a GPU), "disk" for a file in `folder` (None: the system's
    folder for temporary files), which has no name and so vanishes with the process, however that ends.
    resident_tokens: most tokens of a layer and key head on the device.  None: as the paper has it, for
    attention sink, top_k and window, for the search what one search looks at, 2 * top_k / stride_k in each
    of log2(tokens / top_k) rounds; with a search per query head for each head of the group.

    A prompt is read beside this cache, layer by layer, and written once (`append`); what `layer` returns
    serves the queries behind it.  Differs from the paper: misses are copied in before a kernel runs, not
    noticed by it.  ValueError when the bound or the store cannot be.
    """

    bank = Bank

    def __init__(
        self,
        shape: tuple[int, ...],
        H: int,
        cfg: HiPConfig,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        store: str = "host",
        folder: str | None = None,
        resident_tokens: int | None = None,
    ):
        (layers, B, Hkv, tokens, D), block, keys = shape, cfg.block_k, cfg.block_k // cfg.stride_k
        self.shape, self.block, self.length, self.mapping, self.moved = shape, block, [0] * layers, None, 0
        pages, group = -(-tokens // block), H // Hkv if cfg.per_head else 1
        window = -(-(cfg.window + cfg.refresh_interval) // block) + 2  # it grows until the next search
        attended = min(pages, group * (cfg.sink_blocks + cfg.budget + window))
        round = group * 2 * cfg.budget  # pages that one round of a search looks at
        least = attended * block + min(pages, round) * keys
        if resident_tokens is None:
            resident_tokens = attended * block + min(pages, round * rounds_of(pages, cfg)) * keys
        if resident_tokens < least:
            wanted = f"at least {least}, as a step needs"
            raise ValueError(f"resident_tokens must be {wanted}, not {resident_tokens}")
        if store not in ("host", "disk"):
            raise ValueError(f"store must be host or disk, not {store!r}")
        self.bound, looked_at = resident_tokens, min(pages, (resident_tokens - attended * block) // keys)
        pin = torch.device(device).type == "cuda"
        self.store = self.allocate((layers, 2, B, Hkv, pages * block, D), dtype, store, folder, pin)
        self.banks = []
        for x in self.store:
            k, v = x.unflatten(3, (pages, block)).flatten(1, 2)  # (B * Hkv, pages, block, D)
            search = self.bank([k], looked_at, cfg.stride_k, device)
            self.banks.append((search, self.bank([k, v], attended, 1, device)))

    def allocate(self, shape: tuple, dtype: torch.dtype, store: str, folder: str | None, pin: bool) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        need = f"a cache of {self.shape[3]} tokens needs {size / 1e9:.1f} GB"
        try:
            if store == "host":
                return torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=pin)
            # without a name: nobody can truncate it, and it is gone with the process, even a killed one
            with tempfile.TemporaryFile(dir=folder) as file:
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):  # a disk that is full later would be a signal
                    os.posix_fallocate(file.fileno(), 0, size)
                self.mapping = mmap.mmap(file.fileno(), size)
        except RuntimeError as error:
            raise ValueError(f"{need} of host memory: too much; store it on disk") from error
        except OSError as error:
            where, why = folder or tempfile.gettempdir(), error.strerror
            raise ValueError(f"{need} in a file, which cannot be had in {where}: {why}") from error
        return torch.frombuffer(self.mapping, dtype=dtype).view(shape)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write k, v (B, Hkv, T, D) behind the tokens that the layer has; ValueError if they are too many."""
        start, T = self.length[layer], k.shape[2]
        if start + T > self.shape[3]:
            raise ValueError(f"the cache holds {self.shape[3]} tokens, and {start + T} are too many")
        for stored, new in zip(self.store[layer], (k, v), strict=True):
            stored[:, :, start : start + T].copy_(new, non_blocking=True)
        rest = -start % self.block  # of a page that was begun; the search only meets full ones
        if rest:
            new = [x[:, :, :rest].flatten(0, 1) for x in (k, v)]
            self.banks[layer][1].overwrite(start // self.block, start % self.block, new)
        self.length[layer] += T
        self.moved += k.nbytes + v.nbytes
        if self.mapping:  # what was written stays with the system, no longer with this process
            self.mapping.madvise(mmap.MADV_DONTNEED)

    def layer(self, layer: int) -> Pages:
        """The layer's tokens so far, in place of k and of v, for the query that stands at their end."""
        shape = (*self.shape[1:3], self.length[layer], self.shape[4])
        return Pages(list(self.store[layer]), self.banks[layer], shape, self.banks[layer][1])

    def read(self, layer: int) -> list[Tensor]:
        """All keys and all values of a layer, (B, Hkv, T, D), copied to the device: for a further prompt."""
        device = self.banks[layer][0].rows[0].device
        whole = [x[:, :, : self.length[layer]].to(device) for x in self.store[layer]]
        self.moved += sum(x.nbytes for x in whole)
        return whole

    def counts(self) -> dict[str, int]:
        """Pages found and missed in the two banks, over all layers and heads, and bytes moved either way."""
        counts = {"moved_bytes": self.moved}
        for name, banks in zip(("search", "attention"), zip(*self.banks, strict=True), strict=True):
            hits, misses = torch.stack([bank.counted for bank in banks]).sum(0).tolist()
            page = sum(rows[0, 0].nbytes for rows in banks[0].rows)
            counts |= {f"{name}_hits": hits, f"{name}_misses": misses}
            counts["moved_bytes"] += misses * page
        return counts

    def resident_tokens(self) -> int:
        """Most tokens that a layer and head has on the device; a slot stays full, so also the most ever."""
        return max(sum(bank.resident() for bank in pair) for pair in self.banks)
