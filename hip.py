"""HiP attention: a causal attention that looks at O(log T) keys to choose the few that matter to a query.

Attention scores are local: a key beside a good key tends to be good too.  So one need not score all T keys to
find the best.  Cut the past into M stretches (*nodes*), split each in two (its *branches*), look at *one*
block of keys in the middle of each branch, keep the M better branches and split those again, until every one
is a single block: at most log2(T) rounds at a fixed cost each.  Exact attention over the chosen blocks, a few
sink tokens at the start and a window of recent tokens then replaces attention over everything.  No training,
no change of weights.

Work is shared in blocks, so that all of it is matrix products: a *query block* is `block_q` consecutive
queries of all query heads that share a key head, and it chooses blocks of `block_k` keys for all its rows.

Paper: "A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned
Attention", ICLR 2025, arXiv 2406.09827.  `Alg. 1, l. n` below points into its Algorithm 1; its symbols stand
beside the fields of `HiPConfig`.

    B texts, H query heads, Hkv key heads, Tq and Tk tokens, D head size
    S heads that search (Hkv, or H with per_head), NQ query blocks of each, n of them worked on at a time
    M = top_k // block_k nodes of a search, and blocks that it may choose
    R rows of a query block: of each head of a group block_q, or in a search every stride_q-th of these
    C key blocks, N keys of one: block_k, or in a search every stride_k-th of these

Layout is (B, H, T, D).  Query head h reads key head h // (H // Hkv).  Queries are the last Tq of Tk tokens,
row i at position Tk - Tq + i, so that reading a prompt, reading it in pieces and decoding are one function.

HiP is told from here to the end of `sparse_attention` and what it calls.  Behind that stand selections to
compare with, clipped positions, checks, and the offloaded cache.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GATHERED = 32768  # keys that are gathered at a time, to stay in a CPU's cache, or those of one query block
PIECE = 512  # queries of a head that are worked on at a time, at most, or one query block
NO_BLOCK = 2**31 - 1  # padding: later than every query, so masked, and sorts last; leaves this file as -1
LOWEST = torch.finfo(torch.float32).min  # least score of a real block, above the -inf of what is none

Rope = tuple[Tensor, Tensor]  # cos and sin of positions 0, 1, ...: (positions, D / 2) float32, constants
Keys = "Tensor | Pages"  # (B, Hkv, Tk, D), or a layer of an offloaded cache


@dataclass(frozen=True)
class HiPConfig:
    """All numbers of the method; sizes in tokens unless said otherwise.  ValueError if one cannot work.

    Differs from the paper, whose setting is `HiPConfig(top_k=512, block_k=2, stride_k=1, score="max",
    per_head=True, dense_layers=3, early_factor=1, dense_tail=0, memory=False)`.
    """

    top_k: int = 1024  # k: keys that the search may choose for a query block
    block_q: int = 64  # b_q: consecutive queries that share one selection
    block_k: int = 32  # b_k: keys in a block, the unit that is chosen
    stride_q: int = 2  # b_sq: every stride_q-th query of a block takes part in the search
    stride_k: int = 4  # b_sk: every stride_k-th key of a block takes part in the search
    sink: int = 16  # first tokens, rounded up to whole blocks: always attended to
    window: int = 256  # latest positions that a query sees at least, itself included
    representative: str = "center"  # block that stands for a branch: "center", "first" or "last"
    score: str = "mass"  # what a block is worth: "mass", or "max", the paper's (`score_blocks`)
    per_head: bool = False  # a search for each query head, as in the paper, not for each key head
    rope_clip: int | None = None  # distance from which on keys are equally far (`rotated`); None: none is
    # of the model:
    dense_layers: int = 0  # l_d: first layers, which attend densely
    early_factor: int = 4  # by how much more layers of the first half may choose (`of_layer`)
    refresh_interval: int = 8  # r_m: decoding steps that share one selection
    dense_tail: int = 64  # last queries of a prompt that attend densely
    memory: bool = True  # decoding remembers earlier queries (`decoding`), and blocks that were chosen
    beam: InitVar[None] = None  # of version 1

    def __post_init__(self, beam: None):
        def check(name: str, ok: bool, wanted: str):
            if not ok:
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)!r}")

        if beam is not None:
            raise ValueError("beam is gone: all that a search keeps is chosen now, so set top_k instead")
        for f in fields(self):
            x, least = getattr(self, f.name), 0 if f.name in ("sink", "dense_layers", "dense_tail") else 1
            whole, wanted = type(x) is int and x >= least, f"a whole number of at least {least}"
            if f.type == "int":
                check(f.name, whole, wanted)
            if f.type == "int | None":
                check(f.name, whole or x is None, "None or " + wanted)
            if f.type == "bool":
                check(f.name, type(x) is bool, "True or False")
        for name in ("top_k", "block_q", "block_k", "early_factor"):
            check(name, getattr(self, name).bit_count() == 1, "a power of two")
        check("top_k", self.top_k % self.block_k == 0, f"a multiple of block_k={self.block_k}")
        check("stride_q", self.block_q % self.stride_q == 0, f"a divisor of block_q={self.block_q}")
        check("stride_k", self.block_k % self.stride_k == 0, f"a divisor of block_k={self.block_k}")
        check("representative", self.representative in ("center", "first", "last"), "center, first or last")
        check("score", self.score in ("mass", "max"), "mass or max")

    @property
    def budget(self) -> int:  # M
        return self.top_k // self.block_k

    @property
    def sink_blocks(self) -> int:  # lo, where every domain begins
        return -(-self.sink // self.block_k)

    def of_layer(self, layer: int, layers: int) -> HiPConfig:
        """Of a layer of a model: what early layers do not see is lost to all that follow."""
        more = self.early_factor if 2 * layer < layers else 1
        return replace(self, top_k=self.top_k * more, early_factor=1)

    @property
    def decoding(self) -> HiPConfig:
        """For decoding: the latest queries search together, as many as then share the selection.

        So a query block is of time, not of one step, and what was wanted lately stays in sight.  These are
        few queries, which can afford to look at twice as many keys of a block.
        """
        rows = min(self.block_q, self.refresh_interval) if self.memory else 1
        block_q = 1 << rows.bit_length() - 1  # a power of two
        return replace(self, block_q=block_q, stride_q=1, stride_k=max(1, self.stride_k // 2))

    @property
    def covered(self) -> int:
        """First tokens of a text, which may choose everything: HiP is dense attention, unless clipped."""
        return (self.sink_blocks + self.budget + 1) * self.block_k + self.window - 1

    def rounds(self, n: int) -> int:
        """Of a search among n blocks: until the widest node is one block; one at least, for the scores."""
        return max(1, (-(-n // self.budget) - 1).bit_length())


class Selection(NamedTuple):
    """What each query block attends to besides the sink; with q, k, v and a config it fixes the output."""

    blocks: Tensor  # (B, S, NQ, M) int32, chosen key blocks, ascending, then -1
    window_start: Tensor  # (NQ,) int64, position at which the window begins


def hip_attention(
    q: Tensor, k: Keys, v: Keys, cfg: HiPConfig, selection: Selection | None = None, *, scale=None, rope=None
) -> tuple[Tensor, Selection]:
    """Search, unless a selection is given, then attend: (o, selection).  Arguments and errors as below."""
    selection = select_blocks(q, k, cfg, scale=scale, rope=rope) if selection is None else selection
    return sparse_attention(q, k, v, selection, cfg, scale=scale, rope=rope), selection


# --- the search --------------------------------------------------------------------------------------------


def select_blocks(
    q: Tensor, k: Keys, cfg: HiPConfig, previous: Selection | None = None, *, scale=None, rope=None
) -> Selection:
    """Choose up to M key blocks for every query block, by tree search.  (Paper section 3, Alg. 1)

    q: (B, H, Tq, D), k: (B, Hkv, Tk, D); float32, float16 or bfloat16; scores are taken in float32.
    previous: an earlier selection of as many searches and query blocks; its blocks stay candidates.
    scale: float, factor on q . k, default D ** -0.5.
    rope: with cfg.rope_clip, for q and k not rotated yet (`rotated`): rope_clip + block_q positions or more.

    Returns a Selection.  ValueError when shapes, dtypes or devices do not fit together.
    Within a query block the choice is not causal: blocks that a row gets can depend on later rows of it and,
    with "mass", on keys that those see; on nothing behind the block.  Attention itself is causal.
    Differs from the paper: one search for the query heads that share a key head (not with cfg.per_head); a
    score that estimates attention mass (not with cfg.score="max"); `previous`, whose better blocks stay.
    """
    (B, H, Tq, _), keys, M = q.shape, source(q, (k,), cfg, scale, rope), cfg.budget
    S, (lo, hi) = H if cfg.per_head else keys.shape[1], domain(Tq, keys.shape[2], cfg, q.device)
    if previous is not None:
        check_selection(previous, "previous", B, (S,), len(hi))
    chosen = torch.full((B, S, len(hi), M), -1, dtype=torch.int32, device=q.device)
    thin = keys.thin(cfg.stride_k, copy=len(hi) > 1)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):  # what is in float32 stays so
        for i, x in query_blocks(q.unflatten(1, (S, -1)), keys, hi, cfg, scale, cfg.stride_q):
            if (n := int(x.hi.max()) - lo) == 0:  # sink and window cover everything
                continue
            score = partial(score_blocks, x, thin, seen_anyway(x, keys, cfg), cfg)
            blocks, scores = search(x.hi, score, cfg)  # (B, S, n, M) each
            # where all were looked at, nothing is to be remembered
            if previous is not None and previous.blocks.shape[3] and n > 2 * M:
                old = previous.blocks[:, :, i].long()
                old = old.where((lo <= old) & (old < x.hi[..., None]), NO_BLOCK)
                blocks = torch.cat([blocks, old], 3)
                # as many at a time as in a round, so that pages of an offloaded cache are sure to fit
                scores = torch.cat([scores, *(score(part) for part in old.split(2 * M, 3))], 3)
            chosen[:, :, i] = best_of(blocks, scores, M)
    return Selection(chosen, hi * cfg.block_k)


def domain(Tq: int, Tk: int, cfg: HiPConfig, device: torch.device | str = "cpu") -> tuple[int, Tensor]:
    """Blocks [lo, hi) to choose from, behind the sink, before the window: lo of all, hi (NQ,) int64.

    They end before the window of the block's *first* query: all its queries see them without a causal mask.
    """
    start, lo = torch.arange(Tk - Tq, Tk, cfg.block_q, device=device), cfg.sink_blocks  # first queries (NQ,)
    return lo, ((start - cfg.window + 1) // cfg.block_k).clamp(min=lo)


def search(hi: Tensor, score: Callable[[Tensor], Tensor], cfg: HiPConfig) -> tuple[Tensor, Tensor]:
    """Paper Alg. 1: the blocks of domains [lo, hi (..)) that survive, and their scores: (.., M) each.

    score: gives blocks (.., C) their scores.  Nodes that are empty end as NO_BLOCK.  A domain of at most M
    blocks is returned whole: attention is then dense.  Of at most 2 * M all are scored, so the result is that
    of `oracle_blocks`.
    """
    M, lo, n = cfg.budget, cfg.sink_blocks, (hi - cfg.sink_blocks)[..., None]
    bounds = lo + n * torch.arange(M + 1, device=n.device) // M  # rounded down; the paper rounds to nearest
    f, l = bounds[..., :-1], bounds[..., 1:]  # Alg. 1, l. 1: node j is the blocks [f, l)
    # a narrower domain than the widest needs fewer rounds, and more change nothing: [f, f + 1) stays
    scores, rounds = None, cfg.rounds(int(n.max()))
    for r in range(rounds):
        mid = (f + l) // 2  # Alg. 1, l. 5-8: two branches of each node
        f, l = torch.stack([f, mid], -1).flatten(-2), torch.stack([mid, l], -1).flatten(-2)  # (.., 2 * M)
        block = {"center": (f + l) // 2, "first": f, "last": l - 1}[cfg.representative]
        block = block.where(f < l, NO_BLOCK)  # Alg. 1, l. 9-10: one block speaks for all
        if scores is not None and r == rounds - 1 and cfg.representative == "center":
            # nodes have one or two blocks now; the center, which has spoken for them, is their right branch:
            # only the left ones are still to be scored
            scores = torch.stack([score(block[..., ::2]), scores], -1).flatten(-2)
        else:
            scores = score(block)
        scores = scores.masked_fill(block == NO_BLOCK, -math.inf)
        keep = best(scores, M)  # Alg. 1, l. 11
        f, l, scores = f.gather(-1, keep), l.gather(-1, keep), scores.gather(-1, keep)
    return f.where(f < l, NO_BLOCK), scores


def score_blocks(x: QueryBlocks, keys: Rows | Pages, seen: Tensor, cfg: HiPConfig, blocks: Tensor) -> Tensor:
    """What key blocks (B, S, n, C) are worth to their query blocks: as many float32, at least LOWEST.

    "max": the largest product.  "mass": the log of the sum over rows of exp(the row's largest product - what
    it has seen), an estimate of attention: no row outvotes the rest by being loud.  seen: of `seen_anyway`.
    """
    b_k, *_ = gather(x, keys, blocks, cfg)  # (B, S, n, C * N, D)
    s = (b_k @ x.q.transpose(3, 4)).unflatten(3, (blocks.shape[3], -1))  # (B, S, n, C, N, R)
    s = s.amax(4) * x.scale - seen[:, :, :, None]  # (B, S, n, C, R); -inf of a row that does not exist
    s = s.logsumexp(4) if cfg.score == "mass" else s.amax(4)
    return s.where(s > LOWEST, LOWEST)


def seen_anyway(x: QueryBlocks, keys: Rows | Pages, cfg: HiPConfig) -> Tensor:
    """What scores of a row are compared with: (B, S, n, R) float32, inf for a row that does not exist.

    "mass": logsumexp of its products with all keys in sink and window; "max": 0.
    """
    seen = torch.zeros(x.q.shape[:4], dtype=torch.float32, device=x.q.device)
    if cfg.score == "mass":
        blocks = sink_and_window(x, cfg)
        b_k, *_ = gather(x, keys, blocks, cfg)
        s = x.q * x.scale @ b_k.transpose(3, 4)  # (B, S, n, R, C * N)
        seen = s.masked_fill_(later(x, blocks, cfg, s.dtype) < 0, -math.inf).logsumexp(4)
    return seen.masked_fill(x.first[:, None] + x.row >= keys.shape[2], math.inf)


def best(scores: Tensor, count: int) -> Tensor:
    """Where the `count` highest of (.., C) scores stand, ascending; of equals the earlier is better."""
    # the bits of a float, as a whole number that sorts alike, above the place: `topk` of these takes a third
    # of the time of a stable sort
    bits = (scores + 0.0).view(torch.int32)  # no -0.0
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32
    order -= torch.arange(scores.shape[-1], device=scores.device)
    return order.topk(count, sorted=False).indices.sort().values


def best_of(blocks: Tensor, scores: Tensor, M: int) -> Tensor:
    """The M best of the candidates (.., C), C at least M, each block once: (.., M), ascending, then -1."""
    blocks, order = blocks.sort(stable=True)
    again = F.pad(blocks[..., 1:] == blocks[..., :-1], (1, 0)) | (blocks == NO_BLOCK)
    keep = best(scores.gather(-1, order).masked_fill(again, -math.inf), M)
    blocks = blocks.masked_fill(again, NO_BLOCK).gather(-1, keep).sort().values
    return blocks.masked_fill(blocks == NO_BLOCK, -1)


# --- attention ---------------------------------------------------------------------------------------------


def sparse_attention(
    q: Tensor, k: Keys, v: Keys, selection: Selection, cfg: HiPConfig, *, scale=None, rope=None
) -> Tensor:
    """Exact attention over sink, selected blocks and window.  (Paper section 3.2, block sparse attention)

    q: (B, H, Tq, D); k, v: (B, Hkv, Tk, D); one dtype.  scale, rope: as `select_blocks`.
    selection: of as many searches as its shape says.  It may be an earlier one: the window then reaches from
    its own window_start to the query, however long that has become.

    Returns (B, H, Tq, D) in q's dtype; scores and softmax are float32.  ValueError when inputs do not fit.
    """
    keys = source(q, (k, v), cfg, scale, rope)
    (B, H, Tq, D), (blocks, start), S = q.shape, selection, selection.blocks.shape[1]
    NQ, rows = -(-Tq // cfg.block_q), min(cfg.block_q, Tq)  # rows of a head
    check_selection(selection, "selection", B, (keys.shape[1], H), NQ, cfg.block_k)
    out = q.new_empty(B, S, H // S, NQ, rows, D)
    dtype = torch.promote_types(q.dtype, torch.bfloat16)  # not float16, in which scores overflow on a CPU
    with torch.autocast(q.device.type, enabled=False):
        for i, x in query_blocks(q.unflatten(1, (S, -1)), keys, start // cfg.block_k, cfg, scale):
            seen = everything_seen(x, blocks[:, :, i], cfg)  # (B, S, n, C)
            b_k, b_v = gather(x, keys, seen, cfg, dtype)  # (B, S, n, C * N, D)
            mask = later(x, seen, cfg, dtype)  # (.., R, C * N)
            b_q, b_k, b_v, mask = (y.flatten(0, 1) for y in (x.q.to(dtype), b_k, b_v, mask))
            o = F.scaled_dot_product_attention(b_q, b_k, b_v, mask, scale=x.scale)  # (B * S, n, R, D)
            out[:, :, :, i] = o.view(B, S, -1, H // S, rows, D).transpose(2, 3)
    return out.view(B, H, NQ * rows, D)[:, :, :Tq]


# --- query blocks and the keys that they see ---------------------------------------------------------------


class QueryBlocks(NamedTuple):
    """n query blocks of each search, side by side in the text: the unit of work."""

    q: Tensor  # (B, S, n, R, D) float32; R counts heads of a group, then rows
    row: Tensor  # (R,) where in its query block a row stands
    first: Tensor  # (n,) position of a block's first row; rows at Tk and behind do not exist
    last: Tensor  # (n,) key block in which the last row stands
    hi: Tensor  # (B, S, n) key block with which the window begins: the end of a domain
    scale: float


def query_blocks(q, keys, hi, cfg, scale, stride=1) -> Iterator[tuple[slice, QueryBlocks]]:
    """All query blocks of q (B, S, H / S, Tq, D), some at a time, with windows from key blocks hi (NQ,).

    stride: of the rows that take part.  keys: `Rows` or `Pages`.
    """
    (B, S, group, Tq, D), Tk, rows = q.shape, keys.shape[2], min(cfg.block_q, q.shape[3])  # of a head
    row, scale = torch.arange(0, rows, stride, device=q.device), D**-0.5 if scale is None else scale
    # so many at a time that what they gather, in a search by some of the rows 2 * M blocks, fits the cache; a
    # power of two, so that a prompt is cut alike in pieces of any multiple of PIECE queries
    chosen = cfg.top_k if stride == 1 else 2 * cfg.top_k // cfg.stride_k
    n = min(GATHERED // (B * S * (chosen + cfg.sink + cfg.window + cfg.block_q)), PIECE // cfg.block_q)
    n = 1 << max(1, n).bit_length() - 1
    for i in (slice(start, min(len(hi), start + n)) for start in range(0, len(hi), n)):
        first = torch.arange(i.start * rows, i.stop * rows, rows, device=q.device)  # among the queries
        b_q = q[:, :, :, (first[:, None] + row).clamp(max=Tq - 1)].float()  # (B, S, H / S, n, rows, D)
        if keys.rope is not None:  # a query block begins at position rope_clip (`rotated`)
            b_q = rotate(b_q, *(y[cfg.rope_clip + row] for y in keys.rope))
        b_q, first = b_q.transpose(2, 3).flatten(3, 4), first + Tk - Tq  # (B, S, n, R, D); among the keys
        last = (first + row[-1]).clamp(max=Tk - 1) // cfg.block_k
        yield i, QueryBlocks(b_q, row.repeat(group), first, last, hi[i].expand(B, S, -1), scale)


def sink_and_window(x: QueryBlocks, cfg: HiPConfig) -> Tensor:
    """Key blocks (B, S, n, C) that query blocks see in any case; some may be later than all of their rows."""
    sink = torch.arange(min(cfg.sink_blocks, int(x.last.max()) + 1), device=x.q.device)
    window = torch.arange(max(0, int((x.last + 1 - x.hi).max())), device=x.q.device)
    return torch.cat([sink.expand(*x.hi.shape, -1), x.hi[..., None] + window], 3)


def everything_seen(x: QueryBlocks, chosen: Tensor, cfg: HiPConfig) -> Tensor:
    """Key blocks (B, S, n, C) that query blocks attend to: chosen (B, S, n, M), sink, window."""
    chosen = chosen[..., (chosen >= 0).flatten(0, 2).any(0)].long()  # padding for all is not gathered
    return torch.cat([chosen.where(chosen >= 0, NO_BLOCK), sink_and_window(x, cfg)], 3)


def tokens_of(blocks: Tensor, cfg: HiPConfig, stride: int = 1) -> Tensor:
    """Positions (.., C * N) of every stride-th token of blocks (.., C)."""
    inside = torch.arange(0, cfg.block_k, stride, device=blocks.device)
    return (blocks[..., None] * cfg.block_k + inside).flatten(-2)


def later(x: QueryBlocks, blocks: Tensor, cfg: HiPConfig, dtype: torch.dtype) -> Tensor:
    """The causal mask: -inf where a key of blocks (B, S, n, C) is later than a row, or none, else 0.

    (.., R, C * N): one for each query block, or (1, 1, 1, ..) where these differ only in what lies before
    their first rows, which all rows see.
    """
    # by how much a token is later than the first row; by block_q it is later than any
    behind = (tokens_of(blocks, cfg) - x.first[:, None]).clamp(0, cfg.block_q)
    one = behind[:1, :1, :1]
    # rows of a table: on a CPU many times faster than to compare each token with each row
    late = torch.arange(cfg.block_q + 1, device=x.row.device)[:, None] > x.row
    table = torch.zeros_like(late, dtype=dtype).masked_fill_(late, -math.inf)
    return F.embedding(one if (behind == one).all() else behind, table).transpose(-1, -2)


def gather(x: QueryBlocks, keys: Rows | Pages, blocks: Tensor, cfg: HiPConfig, dtype=torch.float32) -> list:
    """Keys (B, S, n, C * N, D) of blocks (B, S, n, C), as these query blocks see them, and values if any."""
    b_k, *b_v = (y.flatten(3, 4).to(dtype) for y in keys.take(blocks))
    if keys.rope is not None:
        stride = cfg.block_k * blocks.shape[3] // b_k.shape[3]  # of the rows that keys has
        at = tokens_of(blocks, cfg, stride) - x.first[:, None]
        b_k = rotated(b_k, at + cfg.rope_clip, keys.rope)
    return [b_k, *b_v]


def attended(
    q: Tensor, k: Keys, v: Keys, selection: Selection, cfg: HiPConfig, rope: Rope | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a query (B, H, 1, D) attends to: positions (B, S, N), keys and values (B, S, N, D), not rotated.

    For decoding, which gathers once for all steps that share a selection: behind the query's own position is
    room for tokens to come.  All searches have chosen as many blocks.  Of an offloaded cache with a search
    for each key head the rows are its own, until it is asked again, and what is appended appears in them.
    """
    keys, S = source(q, (k, v), cfg, None, rope), selection.blocks.shape[1]
    start = selection.window_start // cfg.block_k
    ((_, x),) = query_blocks(q.unflatten(1, (S, -1)), keys, start, cfg, None)
    x = x._replace(last=(x.first + cfg.refresh_interval) // cfg.block_k)
    seen = everything_seen(x, selection.blocks, cfg)
    rows = (keys.beside if S == keys.shape[1] else keys.take)(seen)
    return tokens_of(seen, cfg)[:, :, 0], *(y.flatten(2, 4) for y in rows)  # n is 1


class Rows:
    """Rows of the key blocks of (B, Hkv, T, D) tensors: keys, or keys and values.

    All heads are one table of rows, with gaps: a cache of which a part is filled is not copied.
    """

    def __init__(self, tensors: tuple[Tensor, ...], block: int, rope: Rope | None, stride: int = 1):
        self.tensors, self.shape, self.block, self.rope = tensors, tensors[0].shape, block, rope
        self.inside = torch.arange(0, block, stride, device=tensors[0].device)
        self.tables = []  # (where heads begin, all rows (.., D))
        for x in tensors:
            B, H, T, D = x.shape
            if x.stride(3) != 1 or x.stride(2) != D or x.stride(1) % D or x.stride(0) % D:
                x = x.contiguous()
            text, head = x.stride(0) // D, x.stride(1) // D
            b, h = (torch.arange(n, device=x.device) for n in (B, H))
            first = (b[:, None] * text + h * head).view(B, H, 1, 1, 1, 1)
            table = x.as_strided(((B - 1) * text + (H - 1) * head + T, D), (D, 1))
            self.tables.append((first, table))

    def take(self, blocks: Tensor) -> list[Tensor]:
        """The rows (B, S, n, C, N, D) of blocks (B, S, n, C), of each tensor."""
        tokens = (blocks[..., None] * self.block + self.inside).clamp(0, self.shape[2] - 1)
        tokens = tokens.unflatten(1, (self.shape[1], -1))  # (B, Hkv, S / Hkv, n, C, N)
        return [F.embedding(first + tokens, table).flatten(1, 2) for first, table in self.tables]

    beside = take

    def thin(self, stride: int, copy: bool) -> Rows:
        """Keys alone, every stride-th row of a block; copy: as float32, since much will be gathered."""
        if not copy:
            return Rows(self.tensors[:1], self.block, self.rope, stride)
        return Rows((self.tensors[0][:, :, ::stride].float(),), self.block // stride, self.rope)


# --- selections to compare with ----------------------------------------------------------------------------


def oracle_blocks(q: Tensor, k: Tensor, cfg: HiPConfig, *, scale=None, rope=None) -> Selection:
    """The exact best M blocks by the search's own score, in O(T^2).  Else as `select_blocks`, its like."""
    check(q, (k,), scale)
    return select_blocks(q, k, cfg, every_block(q, k, cfg), scale=scale, rope=rope)


def every_block(q: Tensor, k: Tensor, cfg: HiPConfig) -> Selection:
    """As a `previous` selection, of which the best stay: makes a search exact, one by kernels, too."""
    hi = domain(q.shape[2], k.shape[2], cfg)[1].to(q.device)
    every = torch.arange(-(-k.shape[2] // cfg.block_k), dtype=torch.int32, device=q.device)
    return Selection(every.expand(len(q), (q if cfg.per_head else k).shape[1], len(hi), -1), hi)


def random_blocks(q: Tensor, k: Tensor, cfg: HiPConfig, generator=None) -> Selection:
    """M blocks of each domain at random, the paper's baseline.  Else as `select_blocks`."""
    check(q, (k,))
    (B, H, Tq, _), (_, Hkv, Tk, _), M = q.shape, k.shape, cfg.budget
    lo, hi = domain(Tq, Tk, cfg, q.device)
    every = torch.arange(lo, max(lo + M, int(hi.max())), device=q.device)
    every = every.where(every < hi[:, None], NO_BLOCK).expand(B, H if cfg.per_head else Hkv, -1, -1)
    scores = torch.rand(every.shape, generator=generator, dtype=torch.float32, device=q.device)
    return Selection(best_of(every, scores, M).int(), hi * cfg.block_k)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scale=None) -> Tensor:
    """Causal attention over everything: torch's own.  Shapes as `sparse_attention`."""
    check(q, (k, v), scale)
    (_, H, Tq, _), (Hkv, Tk), mask = q.shape, k.shape[1:3], None
    if 1 < Tq < Tk and q.is_cuda:  # without a mask in memory
        from torch.nn.attention.bias import causal_lower_right  # which imports a compiler: seconds

        mask = causal_lower_right(Tq, Tk)
    elif 1 < Tq < Tk:  # a mask of bits torch would turn into this one, but slower
        mask = torch.full((Tq, Tq), -math.inf, dtype=q.dtype, device=q.device).triu_(1)
        mask = F.pad(mask, (Tk - Tq, 0))
    with torch.autocast(q.device.type, enabled=False):
        if Tq == 1:  # heads that share keys as rows of one product: many times faster on a CPU
            rows = q.unflatten(1, (Hkv, -1)).flatten(2, 3)  # (B, Hkv, H / Hkv, D)
            return F.scaled_dot_product_attention(rows, k, v, scale=scale).reshape(q.shape)
        causal = dict(is_causal=Tq == Tk, enable_gqa=H != Hkv)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, **causal)


def no_blocks(q: Tensor, keys: torch.Size, cfg: HiPConfig) -> Selection:
    """Sink and window alone, of q (B, H, Tq, D) and keys of a shape (B, Hkv, Tk, D); window=Tk is dense."""
    hi = domain(q.shape[2], keys[2], cfg, q.device)[1]
    none = torch.empty(len(q), keys[1], len(hi), 0, dtype=torch.int32, device=q.device)
    return Selection(none, hi * cfg.block_k)


def count_scores(
    Tq: int, Tk: int, selection: Selection, cfg: HiPConfig, searched: bool | int = True, previous: int = 0
) -> int:
    """Products q . k of a query head in this call, those that are masked too; dense attention has Tq * Tk.

    searched: with the search, of these queries or of so many latest ones; and with so many blocks of a
    `previous` selection for each query block.
    """
    (blocks, start), bk, total = (x.cpu() for x in selection), cfg.block_k, 0
    keys = Rows((torch.zeros(1, 1, Tk, 1, device="cpu"),), bk, None)

    def cut(T: int, hi: Tensor, stride: int = 1):  # how query blocks are cut, and no more
        q = torch.zeros(*blocks.shape[:2], 1, T, 1, device="cpu")
        return query_blocks(q, keys, hi, cfg, None, stride)

    for i, x in cut(Tq, start // bk):
        chosen = int((blocks[:, :, i] >= 0).flatten(0, 2).any(0).sum())
        total += len(x.first) * len(x.row) * bk * (chosen + sink_and_window(x, cfg).shape[3])
    T = Tq if searched is True else min(searched, Tk)
    lo, hi = domain(T, Tk, cfg)
    for _, x in cut(T, hi, cfg.stride_q) if T else ():
        n = int(x.hi.max()) - lo
        if n > 0:
            rounds = cfg.rounds(n)
            known = rounds > 1 and cfg.representative == "center"  # one half of the last round's scores
            old = previous if n > 2 * cfg.budget else 0
            scored = ((2 * rounds - known) * cfg.budget + old) * bk // cfg.stride_k
            seen = bk * sink_and_window(x, cfg).shape[3] if cfg.score == "mass" else 0
            total += len(x.first) * len(x.row) * (scored + seen)
    return total


# --- clipped positions -------------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (..., D), float32: the halves of a head are the coordinates of D / 2 points."""
    x = x.float()
    a, b = x.chunk(2, -1)
    out = x.unflatten(-1, (2, -1)) * cos.unsqueeze(-2)  # (..., 2, D / 2): few passes over much memory
    out[..., 0, :].addcmul_(b, sin, value=-1)
    out[..., 1, :].addcmul_(a, sin)
    return out.flatten(-2)


def rotated(b_k: Tensor, at: Tensor, rope: Rope) -> Tensor:
    """Keys (.., N, D), overwritten, as queries see them when positions are clipped: at (.., N), or 0.

    A query block begins at position rope_clip, and what lies before 0 stands there, where a rotation is none:
    no distance passes rope_clip + block_q - 1, or what a model was trained for.  (After ReRoPE; ours)
    """
    # for speed: what stands before the first column that is near to some query block needs no rotation
    near = (at > 0).flatten(0, -2).any(0).nonzero()
    c = int(near[0]) if len(near) else at.shape[-1]
    turn = (F.embedding(at[..., c:].clamp(0, len(y) - 1), y) for y in rope)
    b_k[..., c:, :] = rotate(b_k[..., c:, :], *turn)
    return b_k


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
    """The same of rope, and of what an offloaded cache serves."""
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
    one = q.shape[2] == 1 or q.shape[2] == cfg.block_q and len(kv) == 1  # a query block can search
    if not one or (cfg.block_k, cfg.stride_k) != (block, stride):
        wanted = f"single queries with key blocks of {block} and stride_k {stride}"
        got = f"{q.shape[2]} queries, blocks of {cfg.block_k} and stride_k {cfg.stride_k}"
        raise ValueError(f"an offloaded cache is for {wanted}, not for {got}")


def source(q: Tensor, kv: tuple, cfg: HiPConfig, scale: float | None, rope: Rope | None) -> Rows | Pages:
    """Where the rows of k (and v) are taken from, when all is checked."""
    check_call(q, kv, cfg, scale, rope)
    return replace(kv[0], rope=rope) if isinstance(kv[0], Pages) else Rows(kv, cfg.block_k, rope)


def check_selection(selection: Selection, name: str, B: int, S: tuple[int, ...], NQ: int, block: int = 1):
    """The same of a selection, which may be of any of S searches."""
    got, windows = tuple(selection.blocks.shape), len(selection.window_start)
    if len(got) != 4 or got[0] != B or got[1] not in S or got[2] != NQ or windows != NQ:
        wanted = f"{B} texts, {' or '.join(map(str, dict.fromkeys(S)))} searches and {NQ} query blocks"
        raise ValueError(f"{name} must be of {wanted}, not of blocks {got} and {windows} windows")
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
    """The pages of some heads that are on the device, so many slots for each head, and a page table.

    store: (1 or 2, heads, pages, block, D), keys, or keys and values; every stride-th token is held.
    """

    def __init__(self, store: Tensor, slots: int, stride: int, device: torch.device | str):
        parts, heads, self.pages, block, D = store.shape
        self.store, self.slots, self.stride, self.keys = store, slots, stride, block // stride
        shape = parts, heads, slots + 1, self.keys, D
        self.rows = torch.full(shape, math.nan, dtype=store.dtype, device=device)
        # what is nowhere is in the last slot, and in a free slot is the last page: both are there to be
        # written to, not to be read, so that nothing below depends on what the page tables hold
        self.slot_of = torch.full((heads, self.pages + 1), slots, device=device)  # the page table
        self.page_of = torch.full((heads, slots + 1), self.pages, device=device)  # its inverse
        self.last_use = torch.full((heads, slots + 1), -1, device=device)  # call that last needed a slot
        self.call = torch.zeros(heads, 1, dtype=torch.int64, device=device)
        self.counted = torch.zeros(2, dtype=torch.int64, device=device)  # hits, misses

    def find(self, wanted: Tensor) -> Tensor:
        """Slots of pages wanted (heads, n), with what is missing brought in: (heads, n)."""
        if wanted.shape[1] > self.slots < self.pages:
            needed = f"{wanted.shape[1]} pages of a head are needed at once"
            raise ValueError(f"resident_tokens is too few: {needed}, and {self.slots} fit")
        self.call += 1
        page = wanted.sort(1).values
        page[:, 1:].masked_fill_(page[:, 1:] == page[:, :-1].clone(), self.pages)  # each once
        slot = self.slot_of.gather(1, page)
        new = (slot == self.slots) & (page < self.pages)
        self.last_use.scatter_(1, slot, self.call.expand_as(slot))
        self.counted += torch.stack([(slot < self.slots).sum(), new.sum()])
        # the n-th new page takes the slot that was used n-th least recently; those of this call stand last
        least = self.last_use[:, :-1].topk(min(page.shape[1], self.slots), largest=False).indices
        nth = (new.cumsum(1) - 1).clamp(0, least.shape[1] - 1)
        slot, page = least.gather(1, nth).where(new, self.slots), page.where(new, self.pages)
        self.slot_of.scatter_(1, self.page_of.gather(1, slot), self.slots)
        self.slot_of.scatter_(1, page, slot)
        self.page_of.scatter_(1, slot, page)
        self.last_use.scatter_(1, slot, self.call.expand_as(slot))
        self.fetch(page, slot)
        return self.slot_of.gather(1, wanted)

    def first(self, wanted: Tensor) -> Tensor:
        """Rows (1 or 2, heads, n, block, D) of pages wanted (heads, n), each once, now in the first slots."""
        slot = self.find(wanted)
        other = torch.ones_like(self.page_of, dtype=torch.bool).scatter_(1, slot, False)
        order = torch.cat([slot, other.nonzero()[:, 1].view(len(slot), -1)], 1)
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        every = self.through(order).flatten()
        self.rows = self.rows.flatten(1, 2).index_select(1, every).view_as(self.rows)
        self.page_of, self.last_use = self.page_of.gather(1, order), self.last_use.gather(1, order)
        self.slot_of.scatter_(1, self.page_of, place)
        return self.rows[:, :, : wanted.shape[1]]

    def through(self, slot: Tensor) -> Tensor:
        """Slots (heads, n), counted through all heads."""
        heads, slots = self.page_of.shape
        return slot + torch.arange(heads, device=slot.device)[:, None] * slots

    def forget(self, start: int, end: int) -> None:
        """Pages start to end are no longer here."""
        slot = self.slot_of[:, start:end]
        self.page_of.scatter_(1, slot, self.pages)
        self.slot_of[:, start:end] = self.slots

    def fetch(self, page: Tensor, slot: Tensor) -> None:
        """Copy pages (heads, n) from the store to slots (heads, n), where the page is one."""
        head, n = (page < self.pages).nonzero(as_tuple=True)
        if len(head):  # the copy to the host also waits until all that was appended stands in the store
            far_head, far_page = (x.to(self.store.device) for x in (head, page[head, n]))
            found = self.store[:, far_head, far_page, :: self.stride]
            self.rows[:, head, slot[head, n]] = found.to(self.rows.device)


@dataclass(frozen=True)
class Pages:
    """A layer of an offloaded cache, in place of k and of v, for the query that stands at the end of it."""

    store: Tensor  # all keys and all values, (2, B, Hkv, tokens, D)
    banks: tuple[Bank, Bank]  # of the search, of attention
    shape: tuple[int, ...]  # (B, Hkv, Tk, D) of those that were written
    bank: Bank  # the one that rows are taken from
    rope: Rope | None = None

    dtype = property(lambda self: self.store.dtype)
    device = property(lambda self: self.bank.slot_of.device)

    def thin(self, stride: int, copy: bool) -> Pages:
        """As `Rows.thin`: pages of the search hold no other rows."""
        return replace(self, bank=self.banks[0])

    def beside(self, blocks: Tensor) -> list[Tensor]:
        """As `take` of blocks (B, Hkv, 1, C), each once: no copy, but the first rows of the bank itself."""
        there = blocks[..., : int((blocks[0, 0, 0] < self.bank.pages).sum())]
        rows = self.bank.first(there.flatten(0, 1)[:, 0])
        return [x.unflatten(0, blocks.shape[:2])[:, :, None] for x in rows]

    def take(self, blocks: Tensor) -> list[Tensor]:
        """As `Rows.take`."""
        heads, block = len(self.bank.page_of), self.banks[1].keys
        page = blocks.where(blocks * block < self.shape[2], 0)  # of what is none, one that is whole
        slot = self.bank.through(self.bank.find(page.reshape(heads, -1)))
        rows = (F.embedding(slot.view(blocks.shape), x.flatten(2).flatten(0, 1)) for x in self.bank.rows)
        return [x.unflatten(4, (-1, self.shape[3])) for x in rows]


class OffloadedKVCache:
    """Keys and values of all layers in a store, and on the device only what decoding uses.  (Paper section 4)

    shape: (layers, B, Hkv, tokens, D) that it can hold, for H query heads; of `dtype`, used on `device`.
    cfg: of the queries that it serves, in a model its first layer's `decoding`.
    store: "host" for host memory (pinned beside a GPU), "disk" for a file in `folder` (None: the system's for
    temporary files), which has no name and so vanishes with the process, however that ends.
    resident_tokens: most tokens of a layer and key head on the device.  None, as in the paper: for attention
    sink, top_k and window, for the search what one looks at, 2 * top_k / stride_k in each of log2(tokens /
    top_k) rounds; with per_head for each head of the group.  ValueError when that or the store cannot be.

    A prompt is read beside this cache and written once (`append`); `layer` then serves single queries.
    Differs from the paper: misses are copied in before a kernel runs, not noticed by it.
    """

    bank = Bank

    def __init__(self, shape, H, cfg, dtype, device="cpu", store="host", folder=None, resident_tokens=None):
        (layers, B, Hkv, tokens, D), block, keys = shape, cfg.block_k, cfg.block_k // cfg.stride_k
        self.shape, self.block, self.length, self.mapping, self.moved = shape, block, [0] * layers, None, 0
        pages, group = -(-tokens // block), H // Hkv if cfg.per_head else 1
        # it begins before the first query of a block that searches, and grows until the next search
        rows = cfg.refresh_interval + min(cfg.refresh_interval, cfg.block_q)
        window = -(-(cfg.window + rows) // block) + 2
        attended = min(pages, group * (cfg.sink_blocks + cfg.budget + window))
        round = group * 2 * cfg.budget  # pages that one round of a search looks at
        least, most = (attended * block + min(pages, x) * keys for x in (round, round * cfg.rounds(pages)))
        self.bound = most if resident_tokens is None else resident_tokens
        if self.bound < least:
            raise ValueError(f"resident_tokens must be at least {least}, as a step needs, not {self.bound}")
        if store not in ("host", "disk"):
            raise ValueError(f"store must be host or disk, not {store!r}")
        looked_at = min(pages, (self.bound - attended * block) // keys)
        pin = torch.device(device).type == "cuda"
        self.store = self.allocate((layers, 2, B, Hkv, pages * block, D), dtype, store, folder, pin)
        self.banks = []
        for x in self.store.unflatten(4, (pages, block)).flatten(2, 3):  # (2, B * Hkv, pages, block, D)
            search = self.bank(x[:1], looked_at, cfg.stride_k, device)
            self.banks.append((search, self.bank(x, attended, 1, device)))

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
        start, end, bank = self.length[layer], self.length[layer] + k.shape[2], self.banks[layer][1]
        if end > self.shape[3]:
            raise ValueError(f"the cache holds {self.shape[3]} tokens, and {end} are too many")
        page, first = divmod(start, self.block)
        heads = torch.arange(len(bank.slot_of), device=bank.slot_of.device)
        for stored, rows, new in zip(self.store[layer], bank.rows, (k, v), strict=True):
            parts = [(stored, new)]
            if stored.is_pinned():  # head by head a device writes by itself
                parts = zip(stored.flatten(0, 1), new.flatten(0, 1), strict=True)
            for to, x in parts:
                to[..., start:end, :].copy_(x, non_blocking=True)
            # this page may be near, for attention; the search only meets full ones
            new = new[:, :, : self.block - first].flatten(0, 1)  # (heads, any, D)
            rows[heads, bank.slot_of[:, page], first : first + new.shape[1]] = new
        bank.forget(page + 1, -(-end // self.block))
        self.length[layer] = end
        self.moved += k.nbytes + v.nbytes
        if self.mapping:  # what was written stays with the system, no longer with this process
            self.mapping.madvise(mmap.MADV_DONTNEED)

    def layer(self, layer: int) -> Pages:
        """The layer's tokens so far, in place of k and of v, for the query that stands at their end."""
        shape = (*self.shape[1:3], self.length[layer], self.shape[4])
        return Pages(self.store[layer], self.banks[layer], shape, self.banks[layer][1])

    def read(self, layer: int) -> list[Tensor]:
        """All keys and all values of a layer, (B, Hkv, T, D), copied to the device: for a further prompt."""
        whole = self.store[layer][:, :, :, : self.length[layer]].to(self.banks[layer][0].rows.device)
        self.moved += whole.nbytes
        return list(whole)

    def counts(self) -> dict[str, int]:
        """Pages found and missed in the two banks, over all layers and heads, and bytes moved either way."""
        counts = {"moved_bytes": self.moved}
        for name, banks in zip(("search", "attention"), zip(*self.banks, strict=True), strict=True):
            hits, misses = sum(bank.counted for bank in banks).tolist()
            counts |= {f"{name}_hits": hits, f"{name}_misses": misses}
            counts["moved_bytes"] += misses * banks[0].rows[:, 0, 0].nbytes
        return counts

    def resident_tokens(self) -> int:
        """Most tokens of a layer and head on the device; a slot stays full, so also the most ever."""
        return max(sum(int((x.page_of < x.pages).sum(1).max()) * x.keys for x in pair) for pair in self.banks)
