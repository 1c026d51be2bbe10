"""Time attention alone, HiP beside torch's own, in one run: prefill and decoding.

    python extras/bench.py --tokens 8192 32768

Prints a Markdown table: seconds (median, and the spread from least to most) and the ratio of medians.
Inputs are random normal, where gathers are least regular.  `--set stride_q=2` changes fields of HiPConfig.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hip import HiPConfig, dense_attention, select_blocks, sparse_attention  # noqa: E402


def timed(runs: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, `repeats` times in turn: a slow moment of the machine hits all alike."""
    seconds = {name: [] for name in runs}
    for repeat in range(repeats + 1):  # the first round warms up
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--heads", type=int, nargs=2, default=[9, 3], help="query heads, key heads (9 3)")
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", metavar="FIELD=N", nargs="*", default=[], help="fields of HiPConfig")
    options = parser.parse_args()
    cfg = HiPConfig(**{name: int(value) for name, value in (item.split("=") for item in options.set)})
    torch.manual_seed(0)
    print(cfg, f"torch {torch.__version__}, {options.dtype} on {options.device}", sep="\n")
    print("| tokens | phase | dense s | search s | sparse s | dense / HiP |\n|" + " --- |" * 6)
    for T in tqdm(options.tokens, leave=False):
        H, Hkv = options.heads
        dtype = getattr(torch, options.dtype)
        q, k, v = (torch.randn(1, h, T, options.head_size).to(options.device, dtype) for h in (H, Hkv, Hkv))
        tqdm.write(row(T, "prefill", q, k, v, cfg, options.repeats))
        tqdm.write(row(T, "decoding", q[:, :, -1:], k, v, cfg, 10 * options.repeats))


def row(
    T: int, phase: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cfg: HiPConfig, repeats: int
) -> str:
    selection = select_blocks(q, k, cfg)
    runs = {
        "dense": lambda: dense_attention(q, k, v),
        "search": lambda: select_blocks(q, k, cfg),
        "sparse": lambda: sparse_attention(q, k, v, selection, cfg),
    }
    seconds = timed(runs, repeats)
    middle = {name: statistics.median(x) for name, x in seconds.items()}
    shown = " | ".join(f"{middle[n]:.4f} ({min(x):.4f}-{max(x):.4f})" for n, x in seconds.items())
    share = 1 if phase == "prefill" else cfg.refresh_interval  # decoding searches once in so many steps
    ratio = middle["dense"] / (middle["search"] / share + middle["sparse"])
    return f"| {T} | {phase} | {shown} | {ratio:.1f} |"


if __name__ == "__main__":
    main()
