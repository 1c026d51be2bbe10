"""Renew what notebooks/search.html plays: real searches of the default model, noted while hip.py runs them.

    python notebooks/build_page.py     # under a minute; the page is then whole: no server, no network

The page itself is written by hand, all but the lines between its two markers.  Those are made here, as JSON,
one line for each text: the text of every key block, the attention that each gets, its score, and the rounds
of `hip.select_blocks`.  Nothing is searched in the page, and nothing here: `trace` listens to hip.py.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # threads that wait without spinning; torch asks when it is imported
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import base64
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent), str(HERE.parent / "extras")]

from measuring import watch  # noqa: E402

import hip  # noqa: E402
from generate import make_passkey  # noqa: E402
from hip import HiPConfig  # noqa: E402
from model import Context, Llama, Tokenizer, load  # noqa: E402

PAGE = HERE / "search.html"
BEGIN, END = '<script type="application/json" id="data">\n', "\n</script>"
NODES = (8, 16, 32, 64)  # budgets; few are easier to watch; 32 is the default of late layers
HEADS = ((0, 0), (5, 1), (8, 1), (20, 1))  # layer, key head: such as look far back, at much and at little
PLACES = (0.6, 0.75, 0.9, 1.0)  # query blocks, as shares of the text
LONGEST = 8000  # tokens of a text, below what the model was trained for; and a block's number fits a byte


class Round(NamedTuple):
    """One round of one search: its branches, in order; those of no block are left out."""

    first: Tensor  # (branches,) int64: a branch is the blocks [first, last)
    last: Tensor
    speaker: Tensor  # the block that stands for it
    score: Tensor  # float32, the speaker's
    kept: Tensor  # bool
    looked: int  # blocks that were scored in this round; of the last the right halves are known


class Trace(NamedTuple):
    edges: (
        Tensor  # (M + 1,) of the nodes to begin with, the first block of the domain and the end of the last
    )
    rounds: list[Round]
    chosen: Tensor  # blocks, ascending
    exact: Tensor  # the same of `oracle_blocks`
    scores: Tensor  # (hi - lo,) float32, of every block of the domain


@contextmanager
def heard(name: str, note: Callable) -> Iterator[None]:
    """Meanwhile note(arguments, result) hears of each call of that function of hip.py."""
    function = getattr(hip, name)

    def run(*args, **named):
        result = function(*args, **named)
        note(args, result)
        return result

    with mock.patch.object(hip, name, run):
        yield


def trace(q: Tensor, k: Tensor, cfg: HiPConfig) -> Trace:
    """What `hip.select_blocks` does for one query block and one search, and what it aims at.

    q: (1, heads that search together, rows, D), k: (1, 1, Tk, D), the rows being the last of Tk tokens.
    hip.py is heard where it scores blocks and where it keeps the best.  Which stretch a block speaks for
    follows from what was kept; that it is the middle of it, and what is left at the end, is checked.
    """
    asked, kept, every = [], [], []

    def scored(args: tuple, scores: Tensor) -> tuple[Tensor, Tensor]:  # which blocks, and how
        whole = (x for x in args if isinstance(x, Tensor) and not x.is_floating_point())
        return next(x for x in whole if x.shape == scores.shape).flatten(), scores.flatten()

    with (
        heard("score_blocks", lambda *call: asked.append(scored(*call)[0])),
        heard("best", lambda args, keep: kept.append((args[0].flatten(), keep.flatten()))),
    ):
        selection = hip.select_blocks(q, k, cfg)
    with heard("score_blocks", lambda *call: every.append(scored(*call))):
        oracle = hip.oracle_blocks(q, k, cfg)
    lo, hi, M = cfg.sink_blocks, int(selection.window_start[0]) // cfg.block_k, cfg.budget
    if not asked:
        raise ValueError(f"nothing to search in {k.shape[2]} tokens: sink and window cover them")

    edges, rounds = lo + (hi - lo) * torch.arange(M + 1) // M, []
    f, l = edges[:-1], edges[1:]
    for blocks, (score, keep) in zip(asked, kept, strict=False):  # the last call of best orders the result
        mid = (f + l) // 2
        f, l = torch.stack([f, mid], 1).flatten(), torch.stack([mid, l], 1).flatten()
        speaker, survived, real = (f + l) // 2, torch.zeros(2 * M, dtype=torch.bool), f < l
        survived[keep] = True
        there = real if len(blocks) == 2 * M else real[::2]
        assert torch.equal(blocks[there], speaker[:: 2 * M // len(blocks)][there]), "another block spoke"
        looked = int(blocks[there].unique().numel())
        rounds.append(Round(*(x[real] for x in (f, l, speaker, score, survived)), looked))
        f, l = f[survived], l[survived]
    chosen, exact = (x.blocks[0, 0, 0].long() for x in (selection, oracle))
    chosen, exact = chosen[chosen >= 0], exact[exact >= 0]
    assert torch.equal(f[f < l].sort().values, chosen), "other blocks were chosen"
    known = torch.full((hi - lo,), torch.nan)
    for blocks, score in every:
        inside = (lo <= blocks) & (blocks < hi)
        known[blocks[inside] - lo] = score[inside]
    assert not known.isnan().any(), "a block has no score"
    return Trace(edges, rounds, chosen, exact, known)


def attention_of_blocks(q: Tensor, k: Tensor, block: int) -> Tensor:
    """The share of dense attention that each key block gets: q (H, rows, D), k (Tk, D): (H, blocks)."""
    (_, R, D), Tk = q.shape, len(k)
    s = (q.float() @ k.float().T * D**-0.5).masked_fill(
        torch.arange(Tk) > torch.arange(Tk - R, Tk)[:, None], -torch.inf
    )
    share = s.softmax(-1).mean(1)
    return torch.nn.functional.pad(share, (0, -Tk % block)).unflatten(1, (-1, block)).sum(2)


def read(net: Llama, tokens: list[int]) -> tuple[list[Tensor], Tensor]:
    """Read a text densely: queries (H, T, D) of each layer, and keys (layers, Hkv, T, D)."""
    context, queries = Context(net, len(tokens), HiPConfig(), "dense"), []
    watch(context, lambda layer, q, k, v: queries.append(q[0]))
    context.prefill(torch.tensor([tokens]))
    return queries, context.k[:, 0]


# --- the page's data ---------------------------------------------------------------------------------------


def packed(x: Tensor, kind: str) -> str:
    """Whole numbers as base64: "u1" bytes, "<u2" pairs of them."""
    return base64.b64encode(x.numpy().astype(kind).tobytes()).decode()


def search_data(found: Trace) -> dict:
    rounds = [packed(torch.stack([x.first, x.last, x.kept.long()], 1), "u1") for x in found.rounds]
    looked = [x.looked for x in found.rounds]
    edges, exact = packed(found.edges, "u1"), packed(found.exact, "u1")
    return {"edges": edges, "looked": looked, "rounds": rounds, "exact": exact}


def way_data(q: Tensor, k: Tensor, attention: Tensor, nodes: tuple[int, ...], **how: object) -> dict:
    """One way to search for one query block: all scores, and a search for each number of nodes."""
    block = HiPConfig().block_k
    found = {M: trace(q, k, HiPConfig(top_k=block * M, **how)) for M in nodes}
    scores = found[nodes[0]].scores
    low, high = float(scores.min()), float(scores.max())
    levels = ((scores - low) / max(high - low, 1e-6) * 65535).round()
    return {
        "range": [round(low, 4), round(high, 4)],
        "scores": packed(levels, "<u2"),
        "attention": packed((attention * 65535).round(), "<u2"),
        "searches": {M: search_data(x) for M, x in found.items()},
    }


def text_data(net: Llama, tokenizer: Tokenizer, title: str, text: str, heads=HEADS, nodes=NODES) -> dict:
    """All that the page knows of a text."""
    cfg, group = HiPConfig(), net.config.heads // net.config.kv_heads
    encoding = tokenizer.fast.encode(text)
    ids, starts = encoding.ids[:LONGEST], [start for start, _ in encoding.offsets] + [len(text)]
    queries, keys = read(net, ids)
    # the first token of a block may begin within a character; no character is to be lost or told twice
    edges = [starts[min(i, len(ids))] for i in range(0, len(ids) + cfg.block_k, cfg.block_k)]
    data = {
        "title": title,
        "tokens": len(ids),
        "blocks": [text[a:b] for a, b in zip(edges, edges[1:], strict=False)],
        "queries": [],
    }
    for place in PLACES:
        end = len(ids) if place == 1 else int(place * len(ids)) // cfg.block_q * cfg.block_q
        hi = hip.domain(cfg.block_q, end, cfg)[1]
        query = {
            "end": end,
            "hi": int(hi),
            "text": text[starts[end - cfg.block_q] : starts[end]],
            "heads": [],
        }
        for layer, head in heads:
            q = queries[layer][None, head * group : (head + 1) * group, end - cfg.block_q : end].float()
            k = keys[layer, None, head : head + 1, :end].float()
            share = attention_of_blocks(q[0], k[0, 0], cfg.block_k)  # (group, blocks)
            ways = [way_data(q, k, share.mean(0), nodes)]
            for i in range(group):  # the paper's: every query head for itself, by its largest product
                ways.append(way_data(q[:, i : i + 1], k, share[i], nodes, score="max", per_head=True))
            query["heads"].append(ways)
        data["queries"].append(query)
    return data


def texts(tokenizer: Tokenizer) -> dict[str, str]:
    passkey, _ = make_passkey(tokenizer, 4000)
    return {
        "A hidden pass key": passkey,
        "The README": (HERE.parent / "README.md").read_text(encoding="utf-8"),
        "A program, hip.py": (HERE.parent / "hip.py").read_text(encoding="utf-8"),
    }


def page_data(net: Llama, tokenizer: Tokenizer) -> Iterator[str]:
    """The lines of the page's JSON."""
    cfg, group = HiPConfig(), net.config.heads // net.config.kv_heads
    common = {
        "block_k": cfg.block_k,
        "block_q": cfg.block_q,
        "stride_k": cfg.stride_k,
        "stride_q": cfg.stride_q,
        "lo": cfg.sink_blocks,
        "window": cfg.window,
        "group": group,
        "nodes": NODES,
        "heads": HEADS,
    }
    yield json.dumps(common)[:-1] + ', "texts": ['
    for i, (title, text) in enumerate(texts(tokenizer).items()):
        line = json.dumps(text_data(net, tokenizer, title, text), separators=(",", ":"), ensure_ascii=False)
        yield "," * (i > 0) + line.replace("<", "\\u003c")  # nothing there may end the script
    yield "]}"


def main() -> None:
    started, page = time.monotonic(), PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END, 1)[1]
    with torch.inference_mode():
        data = "\n".join(page_data(*load(dtype=torch.float32)))
    PAGE.write_text(before + BEGIN + data + END + after, encoding="utf-8")
    print(f"{PAGE.name}: {time.monotonic() - started:.0f} s, {PAGE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
