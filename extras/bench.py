"""Time HiP beside torch's scaled_dot_product_attention, in one run: prefill and decoding, CPU or GPU.

    python extras/bench.py                                       # attention alone, 4k to 32k
    python extras/bench.py --max-tokens 262144 --seconds 300     # to 256k; a dense call may take five minutes
    python extras/bench.py --against ../old/v1                   # and the hip.py of that folder, in turn
    python extras/bench.py --model --repeats 2 --seconds 500     # the whole model
    python extras/bench.py --device cuda --inputs local normal --heads 32 8 --head-size 128

Prints Markdown tables, or --json, and draws a picture.  Every row is kept in --out once it is there, so that
a command goes on where it was interrupted.  Times are medians (least-most) of repeats that take turns, or of
one call where two would pass --seconds.  Dense attention is the fastest of the ways that torch has for it,
all of them timed; where it would pass --seconds, going by the square of the length, it is "not run".

Inputs: `real` are queries, keys and values of a middle layer of the default model, which reads natural text
by HiP, with NTK-scaled positions past its trained length; `local` are noises of many wavelengths along the
text, so that neighbours score alike; `normal` are random.
--against, a git worktree of an earlier commit, say: its code with its own defaults, named "old" here.
Of the floor: the least time that the operations and bytes of a method (`measuring.needed`) take at the speed
of a matrix product and of a copy, measured among them, as a share of its time.  Growth: the exponent of the
time from the length above to this one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import measuring
import torch
import torch.nn.functional as F
from measuring import needed, seconds_of
from tqdm import tqdm

from hip import HiPConfig
from model import Context, Llama, Tokenizer, load

REFRESH = (1, 4, 8)  # refresh intervals of decoding


class Run(NamedTuple):
    """What is timed: a part of a method, or one of dense attention's ways, of which the fastest counts."""

    method: str
    call: Callable
    need: tuple[float, float] | None = None  # operations and bytes of a step
    steps: int = 1  # of decoding, in a call


# --- measuring ---------------------------------------------------------------------------------------------


def process_memory(name: str) -> int | None:
    """VmRSS or VmHWM of this process, bytes; None where the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return 1024 * int(line.split()[1])
    return None


def first_run(run: Callable, device: str) -> tuple[float, int | None]:
    """Seconds, and the most memory beyond what was in use before, in bytes."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = seconds_of(run, device)
        return seconds, (torch.cuda.max_memory_allocated() - before) or None  # of a graph nobody knows
    with suppress(OSError, AttributeError):  # elsewhere than on Linux
        ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed before would hide what is used now
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = process_memory("VmRSS")
    seconds = seconds_of(run, device)
    after = process_memory("VmHWM")
    return seconds, None if before is None or after is None else max(0, after - before)


def take_turns(calls: dict, repeats: int, limit: float, device: str) -> tuple[dict, dict]:
    """Seconds of each call, again and again in turn, as a slow moment hits all alike; and memory.

    The first round warms up and counts only where there is no time, `limit` seconds, for a second.
    """
    first = {name: first_run(run, device) for name, run in calls.items()}
    rounds = {name: min(repeats, int(limit / max(first[name][0], 1e-9))) for name in calls}
    times = {name: [] if rounds[name] else [first[name][0]] for name in calls}
    for i in range(max(rounds.values())):
        for name, run in calls.items():
            if i < rounds[name]:
                times[name].append(seconds_of(run, device))
    return times, {name: memory for name, (_, memory) in first.items()}


def measured(runs: dict[str, Run], repeats: int, options: argparse.Namespace) -> dict:
    """A row: by method times, memory, and share of its floor; and the times of all that was run.

    The machine's ceilings take their turns among them, so that the floor is of the same minute.
    """
    ceilings = measuring.ceilings(options.device, options.dtype)
    calls = {name: run.call for name, run in runs.items()} | {
        name: call for name, (call, _) in ceilings.items()
    }
    times, memory = take_turns(calls, repeats, options.seconds, options.device)
    reached = {name: work / statistics.median(times.pop(name)) for name, (_, work) in ceilings.items()}
    times = {name: [x / runs[name].steps for x in each] for name, each in times.items()}
    methods = {}
    for method in dict.fromkeys(run.method for run in runs.values()):
        parts = [name for name, run in runs.items() if run.method == method]
        if method == "dense":
            parts = [min(parts, key=lambda name: statistics.median(times[name]))]
        total = [sum(each) for each in zip(*(times[name] for name in parts), strict=False)]
        needs = [runs[name].need for name in parts]
        least = None if None in needs else sum(measuring.floor(need, reached) for need in needs)
        methods[method] = {
            "times": total,
            "parts": parts,
            "share": least and least / statistics.median(total),
            "memory": max((memory[name] for name in parts if memory[name] is not None), default=None),
        }
    return {"ceilings": reached, "methods": methods, "times": times}


# --- inputs ------------------------------------------------------------------------------------------------


def capture(model: Llama, tokenizer: Tokenizer, T: int, options: argparse.Namespace) -> list[torch.Tensor]:
    """q, k, v of a middle layer while the model reads T tokens of natural text."""
    layer = model.config.layers // 2
    # the layers above it are not needed
    model = measuring.stretched(Llama(replace(model.config, layers=layer + 1), model.weights), T)
    context, pieces = Context(model, T, HiPConfig(), kernels=options.kernels), []
    measuring.watch(context, lambda i, q, k, v: pieces.append(q) if i == layer else None)
    text = torch.tensor([measuring.natural_text(tokenizer, T)], device=model.device)
    measuring.read(context, text, what="real inputs")
    return [x.to(options.dtype) for x in (torch.cat(pieces, 2), context.k[layer], context.v[layer])]


def synthetic(kind: str, T: int, options: argparse.Namespace) -> list[torch.Tensor]:
    """Random q, k, v: `normal`, or `local`, the sum of noises that change every 1, 4, 16, ... tokens."""
    generator, tensors = torch.Generator().manual_seed(0), []
    for heads in (options.heads[0], options.heads[1], options.heads[1]):
        x = torch.randn(options.batch * heads, options.head_size, T, generator=generator)
        for step in (4**i for i in range(1, 8) if 4**i < T and kind == "local"):
            slow = torch.randn(*x.shape[:2], T // step + 1, generator=generator)
            x += 2 * F.interpolate(slow, size=T, mode="linear")
        x = (x / x.std()).to(options.device, options.dtype).transpose(1, 2)
        tensors.append(x.unflatten(0, (options.batch, heads)).contiguous())
    return tensors


# --- what is timed -----------------------------------------------------------------------------------------


def reading(method: str, qkv: list, cfg: HiPConfig, kernels: ModuleType, need: dict) -> dict[str, Run]:
    """Search and sparse attention of a prompt."""
    (q, k, v), found = qkv, {}

    def search() -> None:
        found["selection"] = kernels.select_blocks(q, k, cfg)

    def attend() -> None:
        kernels.sparse_attention(q, k, v, found["selection"], cfg)

    return {
        f"{method}: search": Run(method, search, need.get("search")),
        f"{method}: sparse": Run(method, attend, need.get("sparse")),
    }


def decoding(method: str, qkv: list, cfg: HiPConfig, kernels: ModuleType, need: dict) -> dict[str, Run]:
    """As many steps as share a selection; the search remembers, as the model's does."""
    (q, k, v), T, most = qkv, qkv[1].shape[2], max(REFRESH)
    memory = kernels.select_blocks(q[:, :, -most - 1 : -most], k[:, :, :-most], cfg)

    def steps(count: int) -> None:
        for t in range(T - count, T):
            now = q[:, :, t : t + 1], k[:, :, : t + 1]
            if t == T - count:
                selection = kernels.select_blocks(*now, cfg, memory)
            kernels.sparse_attention(*now, v[:, :, : t + 1], selection, cfg)

    runs = {}
    for r in REFRESH:  # a step's share of a search, and its attention
        each = [x / r + y for x, y in zip(need["search"], need["sparse"], strict=True)] if need else None
        runs[f"{method} refresh {r}"] = Run(f"{method} refresh {r}", partial(steps, r), each, r)
    return runs


def attention_row(phase: str, qkv: list, cfg: HiPConfig, dense: bool, options: argparse.Namespace) -> dict:
    """Dense attention, HiP, and HiP of another folder, of the same inputs."""
    (B, H, T, D), Hkv, Tq = qkv[0].shape, qkv[1].shape[1], qkv[0].shape[2] if phase == "prefill" else 1
    cfg = cfg if phase == "prefill" else cfg.decoding
    need, runs = needed(B, Tq, T, (D, H, Hkv), cfg, qkv[0].dtype.itemsize), {}
    if dense:
        ways = measuring.dense_ways(qkv[0][:, :, -Tq:], *qkv[1:])
        runs = {f"dense: {way}": Run("dense", call, need["dense"]) for way, call in ways.items()}
    steps = reading if phase == "prefill" else decoding
    if options.against:
        old, old_cfg = options.against
        runs |= steps("old", qkv, old_cfg, old, {})
    runs |= steps("HiP", qkv, cfg, options.kernels, need)
    if phase == "decoding" and qkv[0].is_cuda:  # as a server would: no Python between the launches
        runs = {name: run._replace(call=measuring.graphed(run.call)) for name, run in runs.items()}
    return measured(runs, options.repeats * (1 if phase == "prefill" else 10), options)


def model_row(
    phase: str,
    T: int,
    loaded: tuple[Llama, Tokenizer],
    cfg: HiPConfig,
    dense: bool,
    options: argparse.Namespace,
) -> dict:
    """The same of the whole model: reading T tokens of natural text, or writing behind them."""
    (model, tokenizer), block = loaded, max(REFRESH)
    c, size, Tq = model.config, model.dtype.itemsize, T if phase == "prefill" else 1
    text = torch.tensor([measuring.natural_text(tokenizer, T + 1)], device=model.device)
    weights = sum(x.numel() for name, x in model.weights.items() if x.ndim == 2 and "embed" not in name)
    weights += 0 if phase == "prefill" else model.weights["embed_tokens.weight"].numel()
    own = cfg if phase == "prefill" else cfg.decoding
    need = needed(1, Tq, T, (c.head_size, c.heads, c.kv_heads), own, size)

    def whole(**share: float) -> tuple[float, float]:  # all layers' attention, and the weights
        parts = [[c.layers * n * x for x in need[name]] for name, n in share.items()]
        return tuple(map(sum, zip((2 * Tq * weights, size * weights), *parts, strict=True)))

    def read(method: str, room: int = 0) -> Context:
        context = Context(model, T + room, cfg, method, options.kernels)
        measuring.read(context, text[:, :T], what=method)
        return context

    if phase == "prefill":
        runs = {"HiP": Run("HiP", partial(read, "hip"), whole(search=1, sparse=1))}
        runs |= {"dense": Run("dense", partial(read, "dense"), whole(dense=1))} if dense else {}
        return measured(runs, options.repeats, options)
    context = read("hip", block * (len(REFRESH) + 1) * (options.repeats + 1))

    def write(method: str, refresh: int) -> None:
        # one cache for all: what is in it costs no time
        context.method, context.decoding = method, replace(cfg.decoding, refresh_interval=refresh)
        for _ in range(block):
            model.logits(context.decode(text[:, T:])[0, -1])

    # a refresh comes first: it takes up the memory of the prompt
    names = {r: f"HiP refresh {r}" for r in REFRESH}
    runs = {
        x: Run(x, partial(write, "hip", r), whole(search=1 / r, sparse=1), block) for r, x in names.items()
    }
    runs["dense"] = Run("dense", partial(write, "dense", 1), whole(dense=1), block)
    return measured(runs, options.repeats, options)


# --- tables and picture ------------------------------------------------------------------------------------


def median(method: dict) -> float:
    return statistics.median(method["times"])


def columns(row: dict, names: list[str], unit: str, T: int, above: tuple[int, dict]) -> dict[str, str]:
    """A row of the table.  names: of the methods.  above: length and methods of the row above."""
    methods, last = row["methods"], names[-1]
    shown = [x for x in names if x == "dense" or x.endswith(last[3:])]  # of decoding the longest interval

    def each(show: Callable) -> str:
        return ", ".join(show(x) if x in methods else "-" for x in shown)

    def growth(x: str) -> str:
        T0, old = above
        return f"{math.log(median(methods[x]) / median(old[x])) / math.log(T / T0):.2f}" if x in old else "-"

    out = {}
    for x in names:
        times = [time * (1000 if unit == "ms" else 1) for time in methods[x]["times"]] if x in methods else []
        digits = max(0, 2 - math.floor(math.log10(min(times)))) if times else 0
        spread = f"{min(times):.{digits}f}-{max(times):.{digits}f}" if len(times) > 1 else "once"
        out[f"{x}, {unit}"] = f"{statistics.median(times):.{digits}f} ({spread})" if times else "not run"
    if len(methods[last]["parts"]) > 1:
        out["of it search"] = (
            f"{statistics.median(row['times'][f'{last}: search']) / median(methods[last]):.0%}"
        )
    for x in shown[:-1]:
        out[f"{x} / {last}"] = f"{median(methods[x]) / median(methods[last]):.3g}" if x in methods else "-"
    out[f"growth: {', '.join(shown)}"] = each(growth)
    out["of the floor"] = each(lambda x: "-" if methods[x]["share"] is None else f"{methods[x]['share']:.0%}")
    out["MiB"] = each(
        lambda x: "-" if methods[x]["memory"] is None else f"{methods[x]['memory'] / 2**20:.0f}"
    )
    out["dense by"] = methods["dense"]["parts"][0].partition(": ")[2] or None if "dense" in methods else None
    return out


def show(records: list[dict]) -> None:
    """A table for prefill, one for decoding."""
    for phase in ("prefill", "decoding"):
        rows, above, mine = [], {}, [x for x in records if x["settings"]["phase"] == phase]
        unit = "s" if max(median(run) for x in mine for run in x["methods"].values()) > 0.5 else "ms"
        names = sorted(
            {name for x in mine for name in x["methods"]}, key=lambda x: (x[0] == "H", x[0] == "o", x)
        )
        for record in mine:
            T, kind = record["settings"]["tokens"], record["settings"]["inputs"]
            row = columns(record, names, unit, T, above.get(kind, (T, {})))
            rows.append({"tokens": f"{T:,}", "inputs": kind} | row)
            above[kind] = T, record["methods"]
        print(f"\n{phase}\n\n" + measuring.records_table(rows))
    product, copy = (statistics.median(x["ceilings"][i] for x in records) / 1e9 for i in ("product", "copy"))
    print(f"\nceilings, median of all rows: product {product:,.0f} GFLOP/s, copy {copy:,.1f} GB/s")


def draw(records: list[dict], path: str) -> None:
    """Time against length, dense dashed, old dotted and HiP solid, a marker for each kind of input."""
    plt = measuring.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, phase, more in ((axes[0], "prefill", ""), (axes[1], "decoding", f" refresh {max(REFRESH)}")):
        rows = [x for x in records if x["settings"]["phase"] == phase]
        for marker, kind in zip("os^D", dict.fromkeys(x["settings"]["inputs"] for x in rows), strict=False):
            for name, style in {"dense": "--", "old" + more: ":", "HiP" + more: "-"}.items():
                points = [
                    (x["settings"]["tokens"], median(x["methods"][name]))
                    for x in rows
                    if x["settings"]["inputs"] == kind and name in x["methods"]
                ]
                if points:
                    face = "black" if name.startswith("HiP") else "white"
                    line = dict(marker=marker, color="black", markerfacecolor=face, lw=1)
                    axis.plot(*zip(*points, strict=True), style, label=f"{name}, {kind}", **line)
        axis.set(title=phase, xlabel="tokens", ylabel="seconds", yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}", file=sys.stderr)


# --- the command -------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    parser = measuring.options_parser(__doc__)
    add = parser.add_argument
    add("--max-tokens", type=int, default=32768, metavar="N", help="4,096 doubled up to here (%(default)s)")
    add("--model", action="store_true", help="time the whole default model")
    add("--against", metavar="DIR", help="a folder with another hip.py, timed as well")
    add("--inputs", nargs="+", choices=("real", "local", "normal"), default=["real", "local", "normal"])
    add("--real-tokens", type=int, default=65536, metavar="N", help="longest real inputs (%(default)s)")
    add("--heads", type=int, nargs=2, default=[9, 3], help="query and key heads of synthetic inputs (9 3)")
    add("--head-size", type=int, default=64, help="(%(default)s)")
    add("--batch", type=int, default=1, help="of synthetic inputs (%(default)s)")
    add("--repeats", type=int, default=5, help="ten times as many of decoding alone (%(default)s)")
    add("--seconds", type=float, default=60, help="most time for the repeats of one call (%(default)s)")
    return parser


def main() -> None:
    options = arguments().parse_args()
    cfg = measuring.configure(HiPConfig(), options.set)
    lengths = sorted(options.tokens or [2**n for n in range(12, 40) if 2**n <= options.max_tokens])
    if not lengths or lengths[0] < 64:
        raise ValueError("--tokens must be at least 64, --max-tokens 4096")
    for name in ("batch", "repeats", "head_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")
    if options.heads[1] < 1 or options.heads[0] % options.heads[1]:
        raise ValueError(f"--heads must be query heads and a divisor of them, not {options.heads}")
    if options.against and options.model:
        raise ValueError("--against times attention alone: it must come without --model")
    options.kernels, old = measuring.kernels_for(options.device), options.against
    if old:
        options.against = measuring.other_version(old, options.device)
        old = measuring.code_hash(old, "hip", options.kernels.__name__)
    kinds = ["the model's"] if options.model else options.inputs
    if options.model or "real" in kinds:
        loaded = load(None, getattr(torch, options.dtype or "", None), options.device)
    default = "float32" if options.device == "cpu" else "bfloat16"
    options.dtype = loaded[0].dtype if options.model else getattr(torch, options.dtype or default)
    shape = [] if options.model else [options.heads, options.head_size, options.batch]
    common = dict(model=options.model, config=vars(cfg), shape=shape, dtype=str(options.dtype), old=old)
    results = measuring.Results(options.out, "bench", options.device, **common)

    records, dense_before = [], {}
    for T, kind in tqdm([(T, kind) for T in lengths for kind in kinds], desc="lengths and inputs"):
        if kind == "real" and T > options.real_tokens:
            continue
        qkv = None
        for phase in ("prefill", "decoding"):
            settings = dict(phase=phase, tokens=T, inputs=kind, repeats=options.repeats)
            # by the square of the length, from the last length that was measured
            T0, last = dense_before.get((phase, kind), (T, 0))
            dense = phase == "decoding" or last * (T / T0) ** 2 <= options.seconds
            record = results.get(**settings)
            if record is None or (dense and "dense" not in record["methods"]):
                if options.model:
                    row = model_row(phase, T, loaded, cfg, dense, options)
                else:
                    if qkv is None:
                        qkv = capture(*loaded, T, options) if kind == "real" else synthetic(kind, T, options)
                    row = attention_row(phase, qkv, cfg, dense, options)
                record = results.put(row, **settings)
            if "dense" in record["methods"]:
                dense_before[phase, kind] = T, median(record["methods"]["dense"])
            records.append(record)
    if options.json:
        print(json.dumps(records, indent=1))
        return
    print(
        f"{cfg}, {options.dtype} on {measuring.device_name(options.device)}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    show(records)
    draw(records, f"{options.out}/bench{'-model' * options.model}.png")


if __name__ == "__main__":
    sys.exit(measuring.command(main))
