"""Plant bugs, one at a time, and show which test of test_hip.py catches each.

    python extras/mutants.py            # all; prints a Markdown table
    python extras/mutants.py causal     # those with "causal" in their names

Each bug goes into a temporary copy of the tree, where the tests of the file that has it run, those of kernels
in Triton's interpreter.  Exit status 1 if a bug survives, if its text no longer stands exactly once in its
file, or if the tests fail without any bug.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIP = shutil.ignore_patterns(".*", "__pycache__", "*.gguf", "*.safetensors")
FAILED = re.compile(r"^(?:FAILED|ERROR) \S*?::(\S+)", re.MULTILINE)
CRASHED = re.compile(r"test_hip\.py\", line \d+ in (test_\w+)")

TESTS = {  # file: which tests are to catch its bugs; the compiler would find none of them
    "hip.py": "not hip_triton and not compile",
    "hip_triton.py": "hip_triton and not compiles",
}

MUTANTS = [  # file, name, text that stands once in it, text in its place
    *(("hip_triton.py", *mutant) for mutant in [
    # the search
    ("ties go to the higher position", "(b_xb < b_b[None, :])", "(b_xb > b_b[None, :])"),
    ("lower scores are better", "m = (b_xa > b_a[None, :])", "m = (b_xa < b_a[None, :])"),
    ("a block that is there again keeps its place",
     "b_new = tl.where(m_real, b_new, -INF)", "b_new = b_new + 0.0"),
    ("an overflowed block scores like an empty branch",
     "tl.where(b_new > LOWEST, b_new, LOWEST)", "b_new"),
    ("query rows past Tq take part in the search",
     "m_r, o_own = (o_r < GROUP * PER) & (o_row < Tq)", "m_r, o_own = (o_r < GROUP * PER)"),
    ("heads of the next group take part in the search",
     "m_r, o_own = (o_r < GROUP * PER) & (o_row < Tq)", "m_r, o_own = o_row < Tq"),
    ("all heads of a group search for the first",
     "(o_r // PER).to(tl.int64) * s_q[1]", "(o_r * 0).to(tl.int64) * s_q[1]"),
    ("the search of a group begins with another's head",
     "b_q = load_rows(head(p_q, s_q, i_b, i_s * GROUP), s_q[3], o_row,",
     "b_q = load_rows(head(p_q, s_q, i_b, i_s), s_q[3], o_row,"),
    ("stride_q ignored", "o_in = o_r % PER * STRIDE_Q", "o_in = o_r % PER"),
    ("stride_k ignored", "tl.arange(0, KEYS) * STRIDE_K", "tl.arange(0, KEYS)"),
    ("keys of a tile block by block, but read as if key by key",
     "o_in[:, None] + b_s[None, :] * BLOCK_K", "o_in[None, :] + b_s[:, None] * BLOCK_K"),
    ("one round too few", "tl.maximum(rounds, 1)", "tl.maximum(rounds - 1, 1)"),
    ("scores of the round before last are taken for known", "(r == rounds - 1)", "(r >= rounds - 2)"),
    ("the block beside the center speaks",
     "b_block = (b_cf + b_cl) // 2", "b_block = (b_cf + b_cl - 1) // 2"),
    ("domain ends one block late",
     "tl.maximum((start - WINDOW + 1) // BLOCK_K, LO)", "tl.maximum((start - WINDOW) // BLOCK_K + 1, LO)"),
    ("all windows begin where the last one does", "tl.store(p_start + i_n,", "tl.store(p_start,"),
    ("blocks are not in order",
     "tl.where(b_f < b_l, b_f, NO_BLOCK - o_m))  # asc", "NO_BLOCK - o_m)  # asc"),
    ("searches do not share key heads", "i_s // SHARED), s_t", "i_s), s_t"),
    ("head stride dropped", "+ i_h.to(tl.int64) * s[1]", ""),
    ("batch stride dropped", "+ i_b.to(tl.int64) * s[0]", ""),
    # the score "mass"
    ("mass: what a row sees anyway does not count",
     "b_s -= b_seen[:, None]", "b_s -= tl.where(b_seen == INF, INF, 0.0)[:, None]"),
    ("mass: the loudest row counts alone",
     "tl.log2(tl.sum(tl.exp2(b_s - b_top[None, :]), 0))", "0.0"),
    ("mass: rows that are none have a share", "b_seen = tl.where(m_r, b_seen, INF)", "b_seen = b_seen + 0.0"),
    ("mass: rows see later tokens of the window",
     "m_t[None, :] & (o_t[None, :] <= o_own[:, None])", "m_t[None, :] & (o_t[None, :] < end)"),
    ("mass: no row sees the sink", "tl.where(x + o_x < LO * BLOCK_K, 0, n * BLOCK_K)", "n * BLOCK_K"),
    ("mass: the window's last tile is not seen",
     "range(0, end - n * BLOCK_K, TILE)", "range(0, end - n * BLOCK_K - TILE, TILE)"),
    ("mass: natural powers with a scale for powers of two",
     '(math.log(2) if cfg.score == "mass" else 1)', "1"),
    # previous blocks
    ("previous blocks taken from outside the domain", "(b_old >= LO) & (b_old < hi)", "b_old >= 0"),
    ("previous blocks not removed when found again",
     "m_real &= before(b_order, o_c) ==", "m_real &= before(b_order, o_c) >="),
    ("of previous blocks only the first M", "tl.cdiv(W, M), 0)", "tl.minimum(tl.cdiv(W, M), 1), 0)"),
    ("previous blocks of the next query block", "(o_w >= 0) & (o_w < W)", "o_w >= 0"),
    ("previous selection of another query block", "p_previous + i_g * W", "p_previous + (i_g - i_n) * W"),
    # clipped positions
    ("clip: keys far away are turned back", "tl.maximum(o_t - origin, 0)", "tl.abs(o_t - origin)"),
    ("clip: the search counts from the query block", "table, start - CLIP", "table, start"),
    ("clip: attention counts from the query block", "table, begin - CLIP", "table, begin"),
    ("clip: decoding counts from the query block", "table, Tk - Tq - CLIP", "table, Tk - Tq"),
    ("clip: searching rows are turned as if stride_q were 1",
     "m_r, table, o_in + CLIP, D)\n    s_t", "m_r, table, o_r % PER + CLIP, D)\n    s_t"),
    ("clip: all rows of a query block are turned as the first",
     "m_r, table, o_in + CLIP, D)\n    b_acc", "m_r, table, o_in * 0 + CLIP, D)\n    b_acc"),
    ("clip: all decoded rows are turned as the first", "table, o_row + CLIP", "table, o_row * 0 + CLIP"),
    ("clip: half of a head is left out",
     'b_s = tl.dot(b_q[1], tl.trans(b_k[1]), b_s, input_precision="ieee")', "b_s += 0.0"),
    ("clip: turned the other way", "b_y * b_cos + b_x * b_sin", "b_y * b_cos - b_x * b_sin"),
    ("clip: position 1 is not turned", "m &= (o_at > 0)[:, None]", "m &= (o_at > 1)[:, None]"),
    # attention
    ("no causal mask", "o_x[None, :] <= o_last[:, None]", "(o_x < last)[None, :]"),
    ("causal mask off by one", "o_x[None, :] <= o_last[:, None]", "o_x[None, :] < o_last[:, None]"),
    ("later keys and values are loaded", "o_x - count, o_x < last", "o_x - count, o_x < last + TILE"),
    ("padding of a selection counts as block 0",
     "tl.sum((b_block >= 0).to(tl.int32), 0) * BLOCK_K", "M * BLOCK_K"),
    ("wrong tokens of a block", "+ o_x % BLOCK_K, end - 1)", "+ o_x % BLOCK_K // 2, end - 1)"),
    ("no mask in a tile that the chosen blocks do not fill",
     "whole, one = count // TILE * TILE", "whole, one = tl.cdiv(count, TILE) * TILE"),
    ("a sink longer than the text", "tl.minimum(SINK, end)", "SINK"),
    ("rows in the sink see all of it", "o_own < sink, o_own,", "o_own < 0, o_own,"),
    ("window starts one block late",
     "start, end = tl.load(p_start + i_n).to(tl.int32)",
     "start, end = tl.load(p_start + i_n).to(tl.int32) + BLOCK_K"),
    ("all windows start as the first", "tl.load(p_start + i_n)", "tl.load(p_start)"),
    ("decoding: window starts one block late",
     "start = tl.load(p_start).to(tl.int32)", "start = tl.load(p_start).to(tl.int32) + BLOCK_K"),
    ("blocks of another query block",
     "(tl.num_programs(0) // PARTS) + i_n) * M", "(tl.num_programs(0) // PARTS)) * M"),
    ("stale accumulator", "b_acc * b_old[:, None], input_precision", "b_acc, input_precision"),
    ("stale sum", "b_l * b_old + tl.sum(b_p, 1)", "b_l + tl.sum(b_p, 1)"),
    ("softmax of natural powers with a scale for powers of two",
     "/ math.log(2)  # for", "* 1.0  # for"),
    ("rows past Tq are attended for and stored",
     "m_r, o_own = (o_h < GROUP) & (o_row < Tq)", "m_r, o_own = (o_h < GROUP)"),
    ("heads of the next group are attended for and stored",
     "m_r, o_own = (o_h < GROUP) & (o_row < Tq)", "m_r, o_own = (o_row < Tq)"),
    ("all heads of a group are stored as the first",
     "(i_g * GROUP + o_h) * Tq + o_row) * D", "(i_g * GROUP) * Tq + o_row) * D"),
    ("a query block has rows of the next", "tl.program_id(0) % PARTS * ROWS", "tl.program_id(0) * ROWS"),
    ("decoding: a group begins with another's head",
     "b_q = load_rows(head(p_q, s_q, i_b, i_s * GROUP), s_q[3], o_q, m_r, table, o_row",
     "b_q = load_rows(head(p_q, s_q, i_b, i_s), s_q[3], o_q, m_r, table, o_row"),
    ("decoding: a share of the tokens is left out",
     "tl.minimum((i_p + 1) * share, last)", "tl.minimum((i_p + 1) * share, last - TILE)"),
    ("decoding: all shares in one place", "* tl.num_programs(0) + i_p", "* tl.num_programs(0)"),
    ("decoding: parts are added up without rescaling",
     "b_w = tl.exp2(b_m - tl.max(b_m, 0))", "b_w = tl.where(m_s, 1.0, 0.0)"),
    # the offloaded cache
    ("cache: slots of the first head", "paged[0] + i_x.to(tl.int64) * paged[1]", "paged[0]"),
    ("cache: pages before the window come in", "window.where(window >= first, 0)", "window"),
    ("cache: the sink does not come in", "torch.cat([sink, window])", "window"),
    ("cache: pages of the first head come in", "(i_h * pages + page)", "page"),
    ("cache: pages come in to the first head", "(i_h * slots + slot)", "slot"),
    ("cache: values do not come in",
     "zip(self.store, self.rows, strict=True)", "zip(self.store[:1], self.rows[:1], strict=True)"),
    ]),
]  # fmt: skip


def killer(tree: Path, file: str) -> str:
    """The first test of this file that fails in this tree, or ''."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*"-m pytest -x -q -p no:cacheprovider test_hip.py -k".split(), TESTS[file]]
    run = subprocess.run([sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True)
    if run.returncode == 0:
        return ""
    if run.returncode < 0:  # read or wrote where no memory is; Python then says in which test
        return CRASHED.search(run.stderr)[1] + " (crash)"
    failed = FAILED.search(run.stdout)
    if run.returncode != 1 or failed is None:
        raise RuntimeError(f"the tests could not run:\n{run.stdout[-3000:]}{run.stderr[-1000:]}")
    return failed[1]


def fate(mutant: tuple[str, str, str, str]) -> str:
    """The test that kills this mutant, or '', in a copy of the tree of its own; equal texts are no bug."""
    file, name, text, other = mutant
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=SKIP)
        code = (tree / file).read_text()
        if code.count(text) != 1 and text != other:
            raise RuntimeError(f"not exactly once in {file}: {name}")
        (tree / file).write_text(code.replace(text, other))
        return killer(tree, file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only mutants whose names have all of these words")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (%(default)s)")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if all(word in m[1] for word in options.words)]
    print("| mutation | killed by |\n| --- | --- |", flush=True)
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        sound = [pool.submit(fate, (file, "", "", "")) for file in {m[0]: 0 for m in chosen}]
        for mutant, test in zip(chosen, pool.map(fate, chosen), strict=True):
            survivors += not test
            print(f"| {mutant[0]}: {mutant[1]} | {test or '**nothing**'} |", flush=True)
        if failed := ", ".join(filter(None, (x.result() for x in sound))):
            print(f"without any bug, {failed} fails: the table says nothing", file=sys.stderr)
    return 1 if survivors or failed else 0


if __name__ == "__main__":
    sys.exit(main())
