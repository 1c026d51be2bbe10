"""Everything that needs a real GPU, in one command: tests, ceilings, times beside torch's flash attention.

    python extras/gpu_check.py --out results.json

Prints a Markdown table last.  Times are medians, by CUDA events; inputs are random and rotated, so no run
finds its own keys in the cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import hip_triton  # noqa: E402
from hip import HiPConfig, dense_attention  # noqa: E402

SHAPES = ((128, 32, 8), (64, 9, 3))  # head size, query heads, key heads


def milliseconds(run: Callable[[int], object], sets: int, budget_ms: float = 300) -> float:
    """Median time of run(i), i rotating over the input sets, after a warm-up."""
    times: list[float] = []
    while len(times) < 5 or (sum(times) < budget_ms and len(times) < 50):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(len(times) % sets)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def graphed(run: Callable[[int], object], sets: int) -> Callable[[int], object]:
    """run as CUDA graphs, one for each input set: a serving loop does not pay Python for every launch."""
    graphs = []
    for i in range(sets):
        run(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(i)
        graphs.append(graph)
    return lambda i: graphs[i].replay()


def ceilings() -> dict:
    x = torch.randn(2**30, device="cuda")  # 4 GiB
    y = torch.empty_like(x)
    copy = milliseconds(lambda i: y.copy_(x), 1)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda i: a @ b, 1)
    return {"copy_TB_per_s": 8 * 2**30 / copy / 1e9, "bf16_TFLOP_per_s": 2 * 8192**3 / product / 1e9}


def inputs(B: int, Tq: int, T: int, D: int, H: int, Hkv: int) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.randn(B, h, t, D, device="cuda", dtype=torch.bfloat16) for h, t in ((H, Tq), (Hkv, T), (Hkv, T))
    )


def compare(B: int, T: int, decoding: bool, shape: tuple[int, int, int], cfg: HiPConfig) -> dict:
    """One row: flash attention, search and sparse attention, in milliseconds."""
    D, H, Hkv = shape
    sets = 1 if B * T * Hkv * D > 2**28 else 2
    data = [inputs(B, 1 if decoding else T, T, D, H, Hkv) for _ in range(sets)]
    chosen = [hip_triton.select_blocks(q, k, cfg) for q, k, _ in data]

    def flash(i):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return dense_attention(*data[i])

    def search(i):
        return hip_triton.select_blocks(*data[i][:2], cfg)

    def sparse(i):
        return hip_triton.sparse_attention(*data[i], chosen[i], cfg)

    runs = {"flash_ms": flash, "search_ms": search, "sparse_ms": sparse}
    if decoding:
        runs = {name: graphed(run, sets) for name, run in runs.items()}
    row = {
        "phase": "decoding" if decoding else "prefill",
        "D": D,
        "heads": f"{H}/{Hkv}",
        "batch": B,
        "tokens": T,
    }
    row |= {name: milliseconds(run, sets) for name, run in runs.items()}
    for every in (1, cfg.refresh_interval) if decoding else (1,):
        row[f"speedup_r{every}"] = row["flash_ms"] / (row["search_ms"] / every + row["sparse_ms"])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="gpu_check.json")
    parser.add_argument("--no-tests", action="store_true")
    options = parser.parse_args()
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": [],
        "config": vars(HiPConfig()),
    }
    if not options.no_tests:
        tests = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-k",
            "triton",
            "-p",
            "no:cacheprovider",
            "test_hip.py",
        ]
        done = subprocess.run(tests, cwd=HERE, capture_output=True, text=True, timeout=400)
        result["tests"] = done.stdout[-3000:]
        print(done.stdout[-3000:], done.stderr[-500:])
    result |= ceilings()
    cfg = HiPConfig()
    plan = [(1, 2**n, False) for n in range(13, 20)] + [
        (B, 2**n, True) for B in (1, 32) for n in (13, 15, 17, 19)
    ]
    for shape in SHAPES:
        for B, T, decoding in plan:
            try:
                result["rows"].append(compare(B, T, decoding, shape, cfg))
            except torch.OutOfMemoryError:
                result["rows"].append({"phase": "out of memory", "D": shape[0], "batch": B, "tokens": T})
            torch.cuda.empty_cache()
            Path(options.out).write_text(json.dumps(result, indent=1))
    print({key: value for key, value in result.items() if key not in ("rows", "tests", "config")})
    columns = list(dict.fromkeys(key for row in result["rows"] for key in row))
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in result["rows"]:
        cells = (row.get(c, "") for c in columns)
        print("| " + " | ".join(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells) + " |")


if __name__ == "__main__":
    main()
