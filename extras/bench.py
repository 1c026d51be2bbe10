"""Time HiP beside torch's scaled_dot_product_attention, in one run: prefill and decoding, CPU or GPU.

    python extras/bench.py                                       # attention alone, 4k to 32k
    python extras/bench.py --max-tokens 262144 --seconds 300     # to 256k; a dense call may take five minutes
    python extras/bench.py --model --repeats 2 --seconds 500     # the whole model
    python extras/bench.py --device cuda --inputs local normal --heads 32 8 --head-size 128

Prints Markdown tables, or --json, and draws a picture.  Every row is kept in --out once it is there, so that
a command goes on where it was interrupted.  Times are medians (least-most) of repeats that take turns, or of
one call where two would pass --seconds.  Dense attention that would pass them, going by the square of the
length, is "not run".

Inputs: `real` are queries, keys and values of a middle layer of the default model, which reads natural text
by HiP, with NTK-scaled positions past its trained length; `local` are noises of many wavelengths along the
text, so that neighbours score alike; `normal` are random.
Of the ceiling: in prefill the products that a method needs, per second, as a share of what a matrix product
reaches; in decoding the keys and values that it reads (HiP: for every query head anew) as a share of what a
copy moves.  Growth: the exponent of the time from the length above to this one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import measuring
import torch
import torch.nn.functional as F
from measuring import table
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from hip import HiPConfig, Selection, count_scores, domain
from model import Context, Llama, Tokenizer, load

REFRESH = (1, 4, 8)  # refresh intervals of decoding


# --- measuring ---------------------------------------------------------------------------------------------


def seconds_of(run: Callable, device: str) -> float:
    if device.startswith("cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def graphed(run: Callable) -> Callable:
    """run as a CUDA graph: a serving loop does not pay Python for every launch."""
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return lambda run=run: graph.replay()  # run keeps alive the tensors that the graph reads


def cold_milliseconds(runs: list[Callable], device: str) -> float:
    """Median time of runs that differ in their inputs, one after the other; the first warms up.

    On a GPU a GiB is written twice before each: no input is in a cache then, and the host has launched the
    whole run by the time it begins.  What takes seconds runs twice, all else up to 30 times.
    """
    flush = torch.empty(2**30 if device.startswith("cuda") else 0, dtype=torch.int8, device=device)
    times: list[float] = []
    while len(times) < 2 or (len(times) < 31 and sum(times) + times[-1] < 4):
        flush.zero_().zero_()
        times.append(seconds_of(runs[len(times) % len(runs)], device))
    return 1000 * statistics.median(times[1:])


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


def take_turns(runs: dict[str, Callable], repeats: int, limit: float, device: str) -> tuple[dict, dict]:
    """Seconds of each run, again and again in turn: a slow moment of the machine hits all alike.  And memory.

    The first round warms up and counts only where there is no time, `limit` seconds, for a second.
    """
    first = {name: first_run(run, device) for name, run in runs.items()}
    rounds = {name: min(repeats, int(limit / max(first[name][0], 1e-9))) for name in runs}
    times = {name: [] if rounds[name] else [first[name][0]] for name in runs}
    for i in range(max(rounds.values())):
        for name, run in runs.items():
            if i < rounds[name]:
                times[name].append(seconds_of(run, device))
    return times, {name: memory for name, (_, memory) in first.items()}


def ceilings(device: str, dtype: torch.dtype) -> dict[str, tuple[Callable, int]]:
    """A matrix product and a copy, and their FLOP and bytes."""
    n, length = (8192, 2**30) if device.startswith("cuda") else (2048, 2**27)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(length // dtype.itemsize, device=device, dtype=dtype)
    y = torch.empty_like(x)
    return {"matmul": (lambda: a @ b, 2 * n**3), "copy": (lambda: y.copy_(x), 2 * length)}


def measured(phase: str, runs: dict[str, tuple[Callable, int, float]], repeats: int,
             options: argparse.Namespace) -> dict:
    """A row from runs, each with its steps and a step's FLOP (prefill) or bytes (decoding).

    The machine's ceilings take their turns among them, so that a share of a ceiling is of the same minute.
    """
    calls = {name: run[0] for name, run in (runs | options.ceilings).items()}
    times, memory = take_turns(calls, repeats, options.seconds, options.device)
    reached = {name: work / statistics.median(times[name]) for name, (_, work) in options.ceilings.items()}
    times = {name: [x / steps for x in times[name]] for name, (_, steps, _) in runs.items()}
    work = {name: run[2] for name, run in runs.items()}
    if "search" in runs:
        times["hip"] = [a + b for a, b in zip(times["search"], times["sparse"], strict=False)]
        work["hip"] = work["search"] + work["sparse"]
        memory["hip"] = max((memory[x] for x in ("search", "sparse") if memory[x] is not None), default=None)
    if "grouped" in runs:  # the faster of the two counts
        best = min(("dense", "grouped"), key=lambda name: statistics.median(times[name]))
        times["dense"], memory["dense"] = times[best], memory[best]
    ceiling = reached["matmul" if phase == "prefill" else "copy"]
    return {"ceilings": reached, "runs": {
        name: {"times": x, "share": work[name] / statistics.median(x) / ceiling, "memory": memory[name]}
        for name, x in times.items()}}


def products(Tq: int, Tk: int, cfg: HiPConfig) -> tuple[int, int]:
    """q . k products of one head in a search, and in the attention behind it."""
    _, hi = domain(Tq, Tk, cfg)
    selection = Selection(torch.empty(1, 1, len(hi), cfg.budget), hi * cfg.block_k)
    attended = count_scores(Tq, Tk, selection, cfg, searched=False)
    return count_scores(Tq, Tk, selection, cfg) - attended, attended


def needed(B: int, Tq: int, Tk: int, heads: tuple[int, int, int], cfg: HiPConfig, size: int) -> dict:
    """Operations, and bytes of device memory, that dense attention, search and sparse attention cannot avoid.

    heads: D, H, Hkv; size: bytes of a number.  A pair of query and key costs 2 D operations for q . k, and
    2 D more where it is attended to.  Dense: all causal pairs; reads q, k, v and writes o, once.  Search:
    rows that take part times keys of looked-at blocks; reads these rows and keys, writes the selection.
    Sparse: pairs of sink, selection and window; reads q, and keys and values there, writes o.  Keys count for
    every query block anew, chosen ones for every query head, others for every key head (query heads look at
    many of the same); but never more than all once, as in prefill.
    """
    (D, H, Hkv), (searched, attended) = heads, products(Tq, Tk, cfg)  # products of one head
    NQ, rows, top_k = -(-Tq // cfg.block_q), min(Tq, cfg.block_q), cfg.top_k
    searched += top_k // cfg.stride_k if Tq == 1 else 0  # decoding scores what it remembers as well
    taking, near = -(-rows // cfg.stride_q), attended / rows - NQ * top_k
    queries, keys, token = B * H * Tq * D * size, B * Hkv * Tk * D * size, B * D * size
    looked_at = min(keys, token * Hkv * searched / taking)
    gathered = min(keys, token * (H * NQ * top_k + Hkv * near))
    pairs, written = Tq * Tk - Tq * (Tq - 1) // 2, 4 * B * H * NQ * cfg.budget
    return {"dense": (4 * B * H * D * pairs, 2 * queries + 2 * keys),
            "search": (2 * B * H * D * searched, queries * taking / rows + looked_at + written),
            "sparse": (4 * B * H * D * attended, 2 * queries + 2 * gathered)}


# --- inputs ------------------------------------------------------------------------------------------------


def capture(model: Llama, tokenizer: Tokenizer, T: int, options: argparse.Namespace) -> list[torch.Tensor]:
    """q, k, v of a middle layer while the model reads T tokens of natural text."""
    layer = model.config.layers // 2
    # the layers above it are not needed
    model = measuring.stretched(Llama(replace(model.config, layers=layer + 1), model.weights), T)
    context, parts = Context(model, T, HiPConfig(), kernels=options.kernels), []
    measuring.watch(context, lambda i, *qkv: parts.append(qkv) if i == layer else None)
    text = torch.tensor([measuring.natural_text(tokenizer, T)], device=model.device)
    with tqdm(total=T, unit="token", desc="real inputs", leave=False) as bar:
        for hidden in context.prefill(text):
            bar.update(hidden.shape[1])
    return [torch.cat(x, 2).to(options.dtype).contiguous() for x in zip(*parts, strict=True)]


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


# --- attention alone ---------------------------------------------------------------------------------------


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Dense causal attention by torch; on a GPU by its flash backend."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] == k.shape[2],
                                              enable_gqa=q.shape[1] != k.shape[1])


def attention_runs(phase: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cfg: HiPConfig,
                   kernels: ModuleType) -> dict[str, Callable]:
    """What is timed: dense attention beside search and sparse attention, or beside steps of decoding."""
    if phase == "prefill":
        found = {}
        return {"dense": lambda: sdpa(q, k, v),
                "search": lambda: found.update(selection=kernels.select_blocks(q, k, cfg)),
                "sparse": lambda: kernels.sparse_attention(q, k, v, found["selection"], cfg)}
    T, most = k.shape[2], max(REFRESH)
    memory = kernels.select_blocks(q[:, :, -most - 1 : -most], k[:, :, :-most], cfg)
    last, grouped = q[:, :, -1:], q[:, :, -1].unflatten(1, (k.shape[1], -1))

    def steps(count: int) -> None:
        """As many steps as share a selection; the search remembers, as the model's does."""
        for t in range(T - count, T):
            now = q[:, :, t : t + 1], k[:, :, : t + 1]
            if t == T - count:
                selection = kernels.select_blocks(*now, cfg, memory)
            kernels.sparse_attention(*now, v[:, :, : t + 1], selection, cfg)

    # a step of dense attention can also take the query heads that share keys as rows, without any copy
    runs = {"dense": lambda: sdpa(last, k, v), "grouped": lambda: sdpa(grouped, k, v)}
    runs |= {f"refresh {count}": partial(steps, count) for count in REFRESH}
    if q.is_cuda:  # as a server would: no Python between the launches
        runs = {name: graphed(run) for name, run in runs.items()}
    return runs


def attention_row(phase: str, qkv: list[torch.Tensor], cfg: HiPConfig, dense: bool,
                  options: argparse.Namespace) -> dict:
    """Times and memory of one length, and the FLOP (prefill) or bytes (decoding) of each run."""
    (B, H, T, D), Hkv, size = qkv[0].shape, qkv[1].shape[1], qkv[0].dtype.itemsize
    runs = attention_runs(phase, *qkv, cfg, options.kernels)
    if phase == "prefill":
        searched, attended = products(T, T, cfg)
        work = {"dense": 2 * T * (T + 1), "search": 2 * searched, "sparse": 4 * attended}
        work = {name: B * H * D * x for name, x in work.items() if dense or name != "dense"}
    else:
        searched, attended = products(1, T, cfg)
        work = dict.fromkeys(("dense", "grouped"), 2 * Hkv * T)
        work |= {f"refresh {r}": H * (searched / r + 2 * attended) for r in REFRESH}
        work = {name: B * D * size * x for name, x in work.items()}
    steps = {f"refresh {r}": r for r in REFRESH}
    repeats = options.repeats * (1 if phase == "prefill" else 10)
    return measured(phase, {x: (runs[x], steps.get(x, 1), work[x]) for x in work}, repeats, options)


# --- the whole model ---------------------------------------------------------------------------------------


def model_row(phase: str, T: int, model: Llama, tokenizer: Tokenizer, cfg: HiPConfig, dense: bool,
              options: argparse.Namespace) -> dict:
    """The same of the whole model: reading T tokens of natural text, or writing behind them."""
    c, block = model.config, max(REFRESH)
    text = torch.tensor([measuring.natural_text(tokenizer, T + 1)], device=model.device)
    linear = sum(x.numel() for name, x in model.weights.items() if x.ndim == 2 and "embed" not in name)
    unit, size = c.layers * c.head_size, model.dtype.itemsize

    def read(method: str, room: int = 0) -> Context:
        context = Context(model, T + room, cfg, method, options.kernels)
        with tqdm(total=T, unit="token", desc=method, leave=False) as bar:
            for hidden in context.prefill(text[:, :T]):
                bar.update(hidden.shape[1])
        return context

    if phase == "prefill":
        searched, attended = products(T, T, cfg)
        work = {"dense": 2 * T * (T + 1), "hip": 2 * searched + 4 * attended}
        runs = {name: (partial(read, name), 1, c.heads * unit * x + 2 * T * linear)
                for name, x in work.items() if dense or name != "dense"}
        return measured(phase, runs, options.repeats, options)
    searched, attended = products(1, T, cfg)
    weights = linear + model.weights["embed_tokens.weight"].numel()
    context = read("hip", block * (len(REFRESH) + 1) * (options.repeats + 1))

    def write(method: str, refresh: int) -> None:
        # one cache for all: what is in it costs no time
        context.method, context.cfg = method, replace(cfg, refresh_interval=refresh)
        for _ in range(block):
            model.logits(context.decode(text[:, T:])[0, -1])

    # a refresh comes first: it takes up the memory of the prompt
    work = {r: c.heads * unit * (searched / r + 2 * attended) for r in REFRESH}
    runs = {f"refresh {r}": (partial(write, "hip", r), block, size * (weights + x)) for r, x in work.items()}
    runs["dense"] = partial(write, "dense", 1), block, size * (weights + 2 * c.kv_heads * unit * T)
    return measured(phase, runs, options.repeats, options)


# --- tables and picture ------------------------------------------------------------------------------------


def median(run: dict) -> float:
    return statistics.median(run["times"])


def columns(runs: dict, phase: str, unit: str, T: int, above: tuple[int, dict]) -> dict[str, str]:
    """A row of the table.  above: length and runs of the row above with the same inputs."""
    ways = {"hip": "HiP"} if phase == "prefill" else {f"refresh {r}": f"HiP, refresh {r}" for r in REFRESH}

    def each(show: Callable) -> str:
        """Of dense attention and of HiP, with the longest refresh interval."""
        return ", ".join(show(x) if x in runs else "-" for x in ("dense", [*ways][-1]))

    def growth(x: str) -> str:
        T0, old = above
        return f"{math.log(median(runs[x]) / median(old[x])) / math.log(T / T0):.2f}" if x in old else "-"

    row = {}
    for x, title in ({"dense": "dense"} | ways).items():
        times = [time * (1000 if unit == "ms" else 1) for time in runs[x]["times"]] if x in runs else []
        digits = max(0, 2 - math.floor(math.log10(min(times)))) if times else 0
        spread = f"{min(times):.{digits}f}-{max(times):.{digits}f}" if len(times) > 1 else "once"
        row[f"{title}, {unit}"] = f"{statistics.median(times):.{digits}f} ({spread})" if times else "not run"
    if "search" in runs:
        row["of it search"] = f"{median(runs['search']) / median(runs['hip']):.0%}"
    for x, title in ways.items():
        row["dense / " + title] = f"{median(runs['dense']) / median(runs[x]):.3g}" if "dense" in runs else "-"
    row["growth: dense, HiP"] = each(growth)
    row["of the ceiling"] = each(lambda x: f"{runs[x]['share']:.0%}")
    row["MiB"] = each(lambda x: "-" if runs[x]["memory"] is None else f"{runs[x]['memory'] / 2**20:.0f}")
    return row


def show(records: list[dict]) -> None:
    """A table for prefill, one for decoding."""
    for phase in ("prefill", "decoding"):
        rows, above, mine = [], {}, [x for x in records if x["settings"]["phase"] == phase]
        unit = "s" if max(median(run) for x in mine for run in x["runs"].values()) > 0.5 else "ms"
        for record in mine:
            T, kind, runs = record["settings"]["tokens"], record["settings"]["inputs"], record["runs"]
            rows.append({"tokens": f"{T:,}", "inputs": kind}
                        | columns(runs, phase, unit, T, above.get(kind, (T, {}))))
            above[kind] = T, runs
        print(f"\n{phase}\n\n" + table([*rows[0]], [[*row.values()] for row in rows]))
    product, copy = (statistics.median(x["ceilings"][i] for x in records) / 1e9 for i in ("matmul", "copy"))
    print(f"\nceilings, median of all rows: product {product:,.0f} GFLOP/s, copy {copy:,.1f} GB/s")


def draw(records: list[dict], path: str) -> None:
    """Time against length, dense dashed and HiP solid, a marker for each kind of input."""
    plt = measuring.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, phase, hip in ((axes[0], "prefill", "hip"), (axes[1], "decoding", f"refresh {max(REFRESH)}")):
        rows = [x for x in records if x["settings"]["phase"] == phase]
        for marker, kind in zip("os^D", dict.fromkeys(x["settings"]["inputs"] for x in rows), strict=False):
            for name, style, face in (("dense", "--", "white"), (hip, "-", "black")):
                points = [(x["settings"]["tokens"], median(x["runs"][name])) for x in rows
                          if x["settings"]["inputs"] == kind and name in x["runs"]]
                title = name if name == "dense" else "HiP" if name == "hip" else f"HiP, {name}"
                axis.plot([x for x, _ in points], [y for _, y in points], style, marker=marker, color="black",
                          markerfacecolor=face, lw=1, label=f"{title}, {kind}")
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
    options.kernels = measuring.kernels_for(options.device)
    kinds = ["the model's"] if options.model else options.inputs
    if options.model or "real" in kinds:
        model, tokenizer = load(None, getattr(torch, options.dtype or "", None), options.device)
    if options.model:
        options.dtype = model.dtype
    else:
        default = "float32" if options.device == "cpu" else "bfloat16"
        options.dtype = getattr(torch, options.dtype or default)
    options.ceilings = ceilings(options.device, options.dtype)
    shape = [] if options.model else [options.heads, options.head_size, options.batch]
    results = measuring.Results(options.out, "bench", options.device, model=options.model, config=vars(cfg),
                                shape=shape, dtype=str(options.dtype))

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
            if record is None or (dense and "dense" not in record["runs"]):
                if options.model:
                    row = model_row(phase, T, model, tokenizer, cfg, dense, options)
                else:
                    if qkv is None:
                        qkv = (capture(model, tokenizer, T, options) if kind == "real"
                               else synthetic(kind, T, options))
                    row = attention_row(phase, qkv, cfg, dense, options)
                record = results.put(row, **settings)
            if "dense" in record["runs"]:
                dense_before[phase, kind] = T, median(record["runs"]["dense"])
            records.append(record)
    if options.json:
        print(json.dumps(records, indent=1))
        return
    print(f"{cfg}, {options.dtype} on {measuring.device_name(options.device)}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads")
    show(records)
    draw(records, f"{options.out}/bench{'-model' * options.model}.png")


if __name__ == "__main__":
    sys.exit(measuring.command(main))
