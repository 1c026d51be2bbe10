"""Plant bugs in hip_triton.py, one at a time, and show which test of test_hip.py catches each.

    python extras/mutants.py            # all; prints a Markdown table
    python extras/mutants.py causal     # those with "causal" in their names

Each bug goes into a temporary copy of the tree, where the tests that have "triton" in their names run in
Triton's interpreter.  Exit status 1 if a bug survives, if its text no longer stands exactly once in
hip_triton.py, or if the tests fail without any bug.
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

MUTANTS = [  # name, text that stands once in hip_triton.py, text in its place
    ("ties go to the higher position",
     "sort_key(b_score, o_position ^ NO_BLOCK)", "sort_key(b_score, o_position)"),
    ("negative scores order backwards",
     "tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)", "b_bits"),
    ("branches numbered left halves first, so not by position",
     "best(b_new, o_c % N * 2 + o_c // N, N)", "best(b_new, o_c, N)"),
    ("an empty branch is not masked",
     "b_block = tl.where(b_cf < b_cl, b_block, -1)", "b_block = tl.minimum(b_block, hi - 1)"),
    ("an overflowed block scores like an empty branch",
     "tl.maximum(b_s, LOWEST)", "b_s"),
    ("query rows past Tq take part in the search",
     "m_r = (o_r < BLOCK_Q // STRIDE_Q) & (o_row < Tq)", "m_r = o_r < BLOCK_Q // STRIDE_Q"),
    ("rows of the next query block take part in the search",
     "m_r = (o_r < BLOCK_Q // STRIDE_Q) & (o_row < Tq)", "m_r = o_row < Tq"),
    ("stride_q ignored",
     "o_row = i_n * BLOCK_Q + o_r * STRIDE_Q", "o_row = i_n * BLOCK_Q + o_r"),
    ("stride_k ignored",
     "tl.arange(0, KEYS) * STRIDE_K", "tl.arange(0, KEYS)"),
    ("one round too few",
     "tl.maximum(rounds, 1)", "tl.maximum(rounds - 1, 1)"),
    ("scores of the round before last are taken for known",
     "& (r == rounds - 1)", "& (r >= rounds - 2)"),
    ("domain ends one block late",
     "tl.maximum((start - WINDOW + 1) // BLOCK_K, LO)", "tl.maximum((start - WINDOW) // BLOCK_K + 1, LO)"),
    ("keys' head stride dropped in the search",
     "i_k.to(tl.int64) * s_k[1]\n\n", "0\n\n"),
    ("heads of a group spread instead of side by side",
     "p_v += i_b.to(tl.int64) * s_v[0] + (i_h // (H // HKV)).to(tl.int64) * s_v[1]",
     "p_v += i_b.to(tl.int64) * s_v[0] + (i_h % HKV).to(tl.int64) * s_v[1]"),
    ("previous blocks not removed when found again",
     "m_again = (o_w > 0) &", "m_again = (o_w < 0) &"),
    ("previous blocks taken from outside the domain",
     "m_p = (b_old >= LO) & (b_old < hi)", "m_p = b_old >= 0"),
    ("previous selection of another query block",
     "p_previous + i_g * PREVIOUS", "p_previous + (i_g - i_n) * PREVIOUS"),
    ("no causal mask in sink and window of query blocks",
     "o_t < end, o_t[None, :] <= o_own[:, None]", "o_t < end, (o_t < end)[None, :]"),
    ("causal mask off by one",
     "o_t < end, o_t[None, :] <= o_own[:, None]", "o_t < end, o_t[None, :] < o_own[:, None]"),
    ("no causal mask in decoding",
     "o_t < Tk, o_t[None, :] <= o_own[:, None]", "o_t < Tk, (o_t < Tk)[None, :]"),
    ("later values are loaded",
     "o_t < end, o_t[None, :]", "o_t < end + TILE, o_t[None, :]"),
    ("padding of a selection counts as block 0",
     "return o_t, (b_block >= 0) & (o_t < Tk)", "return tl.maximum(o_t, 0), o_t < Tk"),
    ("wrong page: token order within a block",
     "o_t = b_block * BLOCK_K + o_x % BLOCK_K", "o_t = b_block * BLOCK_K + (o_x + 1) % BLOCK_K + 1"),
    ("window starts one block late",
     "start = tl.load(p_start + i_n).to(tl.int32)", "start = tl.load(p_start + i_n).to(tl.int32) + BLOCK_K"),
    ("stale accumulator",
     "b_acc * b_old[:, None], input_precision", "b_acc, input_precision"),
    ("stale sum",
     "b_l = b_l * b_old + tl.sum(b_p, 1)", "b_l = b_l + tl.sum(b_p, 1)"),
    ("softmax of natural powers with a scale for powers of two",
     "/ math.log(2)", "* 1.0"),
    ("parts are added up without rescaling",
     "b_w = tl.exp2(b_m - tl.max(b_m, 0))", "b_w = tl.where(m_s, 1.0, 0.0)"),
    ("a share of the window is left out",
     "tl.minimum((i_s + 1) * share, length)", "tl.minimum((i_s + 1) * share, length - TILE)"),
    ("decoding: every head reads the first head's blocks",
     "p_blocks += (i_b * H + i_h).to(tl.int64) * M", "p_blocks += (i_b * H + i_k * G).to(tl.int64) * M"),
    ("decoding: a share of the blocks goes to all heads of the group",
     "(o_h >= i_h) & (o_h", "(o_h >= 0) & (o_h"),
    ("rows past Tq are attended for and stored",
     "m_r, m_d = (o_in < BLOCK_Q) & (o_row < Tq), o_d < D", "m_r, m_d = o_in < BLOCK_Q, o_d < D"),
    ("cache: a page that this call needs is given up",
     "tl.store(p_used + b_slot, call,", "tl.store(p_used + b_slot, call - 1,"),
    ("cache: of equally old pages the last slots are given up",
     "other=0), call) * SLOTS + o_s", "other=0), call) * SLOTS + SLOTS - 1 - o_s"),
    ("cache: new pages take their slots in reverse",
     "tl.cumsum(m_out.to(tl.int32), 0) - 1", "misses.to(tl.int32) - tl.cumsum(m_out.to(tl.int32), 0)"),
    ("cache: a page that is gone stays in the page table",
     "tl.store(bank[0] + b_old, -1, mask=b_old >= 0)", "tl.store(bank[0] + b_old, -1, mask=b_old < -1)"),
    ("cache: a page that is wanted twice is looked up twice",
     "tl.maximum(o_c - 1, 0), 0) != b_want)", "tl.maximum(o_c - 1, 0), 0) >= 0)"),
    ("cache: pages of the first head",
     "bank[part] + i_x * pages * BLOCK * D", "bank[part] + 0 * pages * BLOCK * D"),
    ("cache: first keys of a page instead of every stride_k-th",
     "* BLOCK + o_in * STRIDE", "* BLOCK + o_in"),
    ("cache: values do not come in",
     "tl.static_range(6, len(bank), 2)", "tl.static_range(6, 8, 2)"),
    ("cache: slots of the first head are given away",
     "tl.store(p_slot + b_in, i_x * slots + o_s,", "tl.store(p_slot + b_in, o_s,"),
    ("cache: a page that comes in is noted as one of the first head",
     "tl.store(p_page + o_s, i_x * pages + b_in,", "tl.store(p_page + o_s, b_in,"),
    ("cache: steps that look up nothing are not counted",
     "hits = again *", "hits = 0 *"),
    ("cache: a page that the window has reached goes unnoticed",
     "sizes == [lo, first, last]", "sizes[:2] == [lo, first]"),
    ("cache: a new selection goes unnoticed",
     "known is blocks and", "known is not None and"),
    ("cache: pages behind the text are looked up",
     "tl.minimum(b_page, last)", "b_page"),
    ("cache: a new token does not reach its slot",
     "m_x & (b_slot >= 0)[:, None]", "m_x & (b_slot >= slots)[:, None]"),
    ("cache: a new token reaches the first token of its slot",
     "* BLOCK + o_t % BLOCK) * D", "* BLOCK) * D"),
    ("cache: new tokens without their stride",
     "o_x * s_v[2]", "o_x * D"),
    ("cache: the search counts slots as whole pages",
     "b_p[:, None] * KEYS", "b_p[:, None] * BLOCK_K"),
    ("cache: every query head of a group searches for the first",
     "tl.program_id(1) * G + i % G", "tl.program_id(1) * G"),
    ("cache: slots of the first key head",
     "i_x.to(tl.int64) * place[1]", "0 * place[1]"),
    ("cache: decoding takes the first head's chosen slots",
     "SINK // BLOCK_K + i_c // CHOSEN * M", "SINK // BLOCK_K"),
    ("cache: query blocks take the first head's chosen slots",
     "SINK // BLOCK_K + i_h % (H // HKV) * M", "SINK // BLOCK_K"),
    ("cache: decoding takes chosen slots for the window's",
     "tl.where(x + o_x < SINK, 0, G * M)", "0"),
    ("cache: query blocks take chosen slots for the window's",
     "tl.where(x + o_x < SINK, 0, H // HKV * M)", "0"),
]  # fmt: skip


def killer(tree: Path) -> str:
    """The first test that fails in this tree, or ''."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = "-m pytest -x -q -p no:cacheprovider test_hip.py -k triton".split()
    run = subprocess.run([sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True)
    if run.returncode == 0:
        return ""
    if run.returncode < 0:  # read or wrote where no memory is; Python then says in which test
        return CRASHED.search(run.stderr)[1] + " (crash)"
    failed = FAILED.search(run.stdout)
    if run.returncode != 1 or failed is None:
        raise RuntimeError(f"the tests could not run:\n{run.stdout[-3000:]}{run.stderr[-1000:]}")
    return failed[1]


def fate(mutant: tuple[str, str, str] | None) -> str:
    """The test that kills this mutant, or '', in a copy of the tree of its own; None is no mutation."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=SKIP)
        if mutant:
            text = (tree / "hip_triton.py").read_text()
            if text.count(mutant[1]) != 1:
                raise RuntimeError(f"not exactly once in hip_triton.py: {mutant[0]}")
            (tree / "hip_triton.py").write_text(text.replace(mutant[1], mutant[2]))
        return killer(tree)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only mutants whose names have all of these words")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (%(default)s)")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if all(word in m[0] for word in options.words)]
    print("| mutation | killed by |\n| --- | --- |", flush=True)
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        sound = pool.submit(fate, None)
        for mutant, test in zip(chosen, pool.map(fate, chosen), strict=True):
            survivors += not test
            print(f"| {mutant[0]} | {test or '**nothing**'} |", flush=True)
        if failed := sound.result():
            print(f"without any bug, {failed} fails: the table says nothing", file=sys.stderr)
    return 1 if survivors or failed else 0


if __name__ == "__main__":
    sys.exit(main())
