"""Time HiP: attention alone, a whole model, an offloaded cache; on a CPU or, with --device cuda, on a GPU.

    python extras/speed.py attention                    # search and attention, beside torch's attention
    python extras/speed.py attention --device cuda      # longer texts, shapes of two models, batches
    python extras/speed.py attention --against ../old   # and by the code of a git worktree, in turn
    python extras/speed.py model                        # SmolLM2-135M reads a text and writes behind it
    python extras/speed.py model --shape 8b --device cuda    # random weights in the shape of Llama 3 8B
    python extras/speed.py transformers --checkpoint DIR    # a model of the library, on one GPU or on several
    python extras/speed.py offload                      # decoding of one layer, its keys here or elsewhere
    python extras/speed.py offload --tokens 1000000 --layers 30 --stores disk --dtype bfloat16 --folder DIR
    python extras/speed.py attention --help             # the options of one of them

Prints Markdown tables, or --json.  Every row is kept in --out once it is there, so that a command goes on
where it was interrupted.  Times are medians of repeats that take turns, or of one call where two would pass
--seconds.  Dense attention counts by the fastest of torch's ways; where it would pass --seconds, going by the
square of the length, it is "not run".  On a GPU no input of attention alone is in a cache when a call begins.

Exit status 1: an offloaded cache gave other bits than a resident one, or held more than its bound.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import hashlib
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import measuring
import torch
import torch.nn.functional as F
from measuring import SHAPES, now, positive, seconds_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import hip
from hip import HiPConfig, OffloadedKVCache
from model import SIZES, Context, Llama, Tokenizer, default_dtype, load, packaged_model

Job = tuple[dict, Callable[[], dict]]  # settings under which a result is kept, and what measures it

# --- repeats -----------------------------------------------------------------------------------------------


def process_memory(name: str) -> int | None:
    """VmRSS or VmHWM of this process, bytes; None where the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return 1024 * int(line.split()[1])
    return None


def first_run(run: Callable, clock: Callable, device: str) -> tuple[float, int | None]:
    """Seconds, and the most memory beyond what was in use before, in bytes."""
    if device == "cuda":
        now(forget=True)
        before = torch.cuda.memory_allocated()
        seconds = clock(run)
        return seconds, (torch.cuda.max_memory_allocated() - before) or None  # of a graph nobody knows
    with suppress(OSError, AttributeError):  # elsewhere than on Linux
        ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed before would hide what is used now
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = process_memory("VmRSS")
    seconds = clock(run)
    after = process_memory("VmHWM")
    return seconds, None if before is None or after is None else max(0, after - before)


def take_turns(calls: dict, options: argparse.Namespace, clock: Callable, repeats: int) -> tuple[dict, dict]:
    """Seconds of each call, again and again in turn, as a slow moment hits all alike; and memory.

    clock: from a call to its seconds.  The first round warms up.  It counts only where there is no time,
    `options.seconds`, for a second, and never on a GPU, where it compiles.
    """
    first = {name: first_run(run, clock, options.device) for name, run in calls.items()}
    times = {name: [] for name in calls}
    for name, run in [*calls.items()] * repeats:
        last = times[name][-1] if times[name] else first[name][0]
        in_time = sum(times[name]) + last <= options.seconds
        if in_time or (options.device == "cuda" and not times[name]):
            times[name].append(clock(run))
    times = {name: x or [first[name][0]] for name, x in times.items()}
    return times, {name: memory for name, (_, memory) in first.items()}


# --- attention alone ---------------------------------------------------------------------------------------

REAL = 65536  # tokens of the longest real inputs: a model has to read them first


def real(T: int, shape: str, options: argparse.Namespace) -> list[torch.Tensor]:
    """q, k, v of a middle layer while the default model reads T tokens of natural text."""
    model, tokenizer = options.loaded()
    layer = model.config.layers // 2
    # the layers above it are not needed
    model = measuring.stretched(Llama(replace(model.config, layers=layer + 1), model.weights), T)
    context, pieces = Context(model, T, HiPConfig(), kernels=options.kernels), []
    measuring.watch(context, lambda i, q, k, v: pieces.append(q) if i == layer else None)
    text = torch.tensor([measuring.natural_text(tokenizer, T)], device=model.device)
    measuring.read(context, text, what="real inputs")
    return [x.to(options.dtype) for x in (torch.cat(pieces, 2), context.k[layer], context.v[layer])]


def normal(T: int, shape: str, options: argparse.Namespace) -> list[torch.Tensor]:
    """Random q, k, v."""
    heads, kv_heads, D = (SHAPES[shape][x] for x in ("heads", "kv_heads", "head_size"))
    g = torch.Generator(options.device).manual_seed(0)
    new = dict(generator=g, device=options.device, dtype=options.dtype)
    return [torch.randn(1, H, T, D, **new) for H in (heads, kv_heads, kv_heads)]


def local(T: int, shape: str, options: argparse.Namespace) -> list[torch.Tensor]:
    """The sum of noises that change every 1, 4, 16, ... tokens, so that neighbours score alike."""
    g, tensors = torch.Generator(options.device).manual_seed(1), []
    for x in normal(T, shape, options):
        x = x[0].float().transpose(1, 2)  # (H, D, T)
        for step in (4**i for i in range(1, 8) if 4**i < T):
            slow = torch.randn(*x.shape[:2], T // step + 1, generator=g, device=x.device)
            x += 2 * F.interpolate(slow, size=T, mode="linear")
        tensors.append((x / x.std()).to(options.dtype).transpose(1, 2)[None].contiguous())
    return tensors


INPUTS = {"real": real, "local": local, "normal": normal}


def hip_calls(name: str, phase: str, qkv: list, cfg: HiPConfig, kernels: ModuleType) -> dict[str, Callable]:
    """Search, and attention to what it found.

    In decoding the latest queries search, and the last attends; it remembers the selection before.
    """
    (q, k, v), step = qkv, phase == "decoding"
    latest = q[:, :, -cfg.block_q :] if step and hasattr(cfg, "early_factor") else q[:, :, -1:] if step else q
    found, q = kernels.select_blocks(latest, k, cfg), q[:, :, -1:] if step else q
    before = (found,) if step else ()
    return {
        f"{name} search": partial(kernels.select_blocks, latest, k, cfg, *before),
        f"{name} attention": partial(kernels.sparse_attention, q, k, v, found, cfg),
    }


def attention_row(phase: str, qkv: list, cfg: HiPConfig, dense: bool, options: argparse.Namespace) -> dict:
    """Dense attention by each of torch's ways, HiP, and HiP of another folder, of the same inputs.

    The machine's ceilings take their turns among them, so that the floor is of the same minute.
    """
    (q, k, v), step = qkv, phase == "decoding"
    versions = {"old": options.against} if options.against else {}
    versions["HiP"] = options.kernels, cfg
    latest, q = q, q[:, :, -1:] if step else q
    calls, every = {f"dense {way}": x for way, x in measuring.dense_ways(q, k, v).items() if dense}, {}
    for name, (kernels, own) in versions.items():
        own = getattr(own, "decoding", own) if step else own
        every[name] = own.refresh_interval if step else 1
        calls |= hip_calls(name, phase, [latest, k, v], own, kernels)
    if step and q.is_cuda:  # as a server would: no Python between the launches
        calls = {name: measuring.graphed(call) for name, call in calls.items()}
    ceilings = measuring.ceilings(options.device, options.dtype)
    turns = calls | {name: call for name, (call, _) in ceilings.items()}
    clock = partial(seconds_of, device=options.device)
    times, memory = take_turns(turns, options, clock, options.repeats * (10 if step else 1))
    reached = {name: work / statistics.median(times[name]) for name, (_, work) in ceilings.items()}
    (B, H, Tq, D), (_, Hkv, T, _) = q.shape, k.shape
    need = measuring.needed(B, Tq, T, (D, H, Hkv), cfg.decoding if step else cfg, q.dtype.itemsize)
    floors = {name: measuring.floor(x, reached) for name, x in need.items()}
    return {"times": times, "memory": memory, "floors": floors, "ceilings": reached, "every": every}


def attention(options: argparse.Namespace, cfg: HiPConfig, records: list[dict]) -> Iterator[Job]:
    """Search and attention of a prompt, and of a step of decoding behind it, beside torch's attention.

    Inputs: `real` are queries, keys and values of a middle layer of the default model, which reads natural
    text by HiP, with NTK-scaled positions past its trained length; `local` are noises of many wavelengths
    along the text, so that neighbours score alike; `normal` are random.
    --against, a git worktree of an earlier commit, say: its code with its own defaults, named "old" here.
    Of the floor: the least time that the operations and bytes (`measuring.needed`) take at the speed of a
    matrix product and of a copy, measured among them.
    On a GPU decoding is replayed as CUDA graphs, as in a server.
    """
    for shape, T, kind in product(options.shapes, options.tokens, options.inputs):
        if kind == "real" and (shape != "135m" or T > REAL):
            continue
        qkv = functools.cache(partial(INPUTS[kind], T, shape, options))

        def measure(phase: str, batch: int, dense: bool, qkv: Callable = qkv) -> dict:
            q, k, v = qkv()
            q = q[:, :, -cfg.decoding.block_q :] if phase == "decoding" else q
            inputs = [x.repeat(batch, 1, 1, 1) if batch > 1 else x.contiguous() for x in (q, k, v)]
            return attention_row(phase, inputs, cfg, dense, options)

        for phase, B in (("prefill", 1), *(("decoding", B) for B in options.batch)):
            same = dict(phase=phase, inputs=kind, shape=shape, batch=B)
            known = [x for x in records if same.items() <= x["settings"].items() and x["settings"]["dense"]]
            # by the square of the length, from the last that was measured
            last = [typical(x, "dense") * (T / x["settings"]["tokens"]) ** 2 for x in known[-1:]]
            dense = phase == "decoding" or not last or last[0] <= options.seconds
            yield same | dict(tokens=T, dense=dense), partial(measure, phase, B, dense)


def way(record: dict) -> str:
    """The fastest of torch's ways: "dense" and its name."""
    times = record["times"]
    return min((x for x in times if x.startswith("dense")), key=lambda x: statistics.median(times[x]))


def typical(record: dict, name: str) -> float:
    """Median time of "dense", "HiP" or "old", in decoding with its share of a search."""
    times = record["times"]
    if name == "dense":
        return statistics.median(times[way(record)])
    found, attended = (statistics.median(times[f"{name} {part}"]) for part in ("search", "attention"))
    return found / record["every"][name] + attended


def show_attention(records: list[dict]) -> bool:
    """A table for prefill, one for decoding."""
    for phase in ("prefill", "decoding"):
        rows = []
        for record in (x for x in records if x["settings"]["phase"] == phase):
            settings, times, memory = record["settings"], record["times"], record["memory"]
            names = [x for x in ("dense", "old", "HiP") if x != "dense" or settings["dense"]]
            names = [x for x in names if x != "old" or "old" in record["every"]]
            row = {x: settings[x] for x in ("tokens", "inputs", "shape", "batch")}
            row |= {"dense ms": "not run"} | {f"{x} ms": 1000 * typical(record, x) for x in names}
            for part in ("search", "attention"):
                spread = [1000 * x for x in times[f"HiP {part}"]]
                middle, ends = cell(statistics.median(spread)), f"{cell(min(spread))}-{cell(max(spread))}"
                row[f"{part} ms (least-most)"] = f"{middle} ({ends})" if spread[1:] else middle
            row |= {f"{x} / HiP": typical(record, x) / typical(record, "HiP") for x in names if x != "HiP"}
            least = {"search": "HiP search", "sparse": "HiP attention"}
            least |= {"dense": way(record)} if settings["dense"] else {}
            share = {x: record["floors"][x] / statistics.median(times[y]) for x, y in least.items()}
            row["of the floor"] = ", ".join(f"{x} {y:.0%}" for x, y in share.items())
            used = [y for x, y in memory.items() if x.startswith("HiP") and y is not None]
            row["MiB"] = max(used) / 2**20 if used else None
            rows.append(row | {"dense by": way(record).partition(" ")[2] if settings["dense"] else None})
        print(f"\n{phase}\n\n{rows_table(rows)}" if rows else "")
    product, copy = (statistics.median(x["ceilings"][i] for x in records) / 1e9 for i in ("product", "copy"))
    print("\nold, HiP: search and attention; of decoding a share of a search, by refresh_interval")
    print(
        "of the floor: the least time that operations and bytes take at the ceilings, as a share of the time"
    )
    print(f"ceilings, median of all rows: product {product:,.0f} GFLOP/s, copy {copy:,.1f} GB/s")
    return True


# --- decoding, resident and offloaded ----------------------------------------------------------------------

WARM, ROUNDS = 16, 3  # decoding steps that warm up, and rounds, of which the median counts


class Way(NamedTuple):
    """A way to decode, or a place where keys and values are kept."""

    name: str
    step: Callable[[int], torch.Tensor]  # does step i of decoding and returns its output
    cache: OffloadedKVCache | None = None
    layers: int = 1  # times are of one of so many


def fingerprint(x: torch.Tensor) -> str:
    return hashlib.sha256(x.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:8]


def decode(prepared: Iterable[Way], options: argparse.Namespace) -> list[dict]:
    """Rounds of `options.steps` steps, the ways in turn: a row for each.

    prepared: makes the ways one by one, so that it is seen what each holds on a GPU.
    """
    ways, held, memory, steps = [], {}, torch.cuda.memory_allocated(), options.steps
    for each in prepared:
        ways.append(each)
        held[each.name] = torch.cuda.memory_allocated() - memory
        memory += held[each.name]
    times, peak, moved, outputs = ({each.name: [] for each in ways} for _ in range(4))
    for first in (0, *range(WARM, WARM + ROUNDS * steps, steps)):
        for name, step, cache, layers in ways:
            counts, memory = Counter(cache and cache.counts()), torch.cuda.memory_allocated()
            count, started = steps if first else WARM, now(forget=True)
            outputs[name] += [step(i) for i in range(first, first + count)]
            times[name].append(1000 * (now() - started) / count / layers)
            peak[name].append(torch.cuda.max_memory_allocated() - memory + held[name])
            moved[name].append(Counter(cache and cache.counts()) - counts)
        if not first:
            began = now()  # kernels are compiled
        elif now() - began > options.seconds:
            break
    rows = []
    for name, _, cache, layers in ways:
        n = sum(moved[name][1:], Counter())
        hits = [n[f"{x}_hits"] / max(1, n[f"{x}_hits"] + n[f"{x}_misses"]) for x in ("search", "attention")]
        row = {"way": name, "ms a step": statistics.median(times[name][1:])}
        if cache:
            row |= {
                "hits: search, attention": ", ".join(f"{x:.1%}" for x in hits),
                "MB moved a step": n["moved_bytes"] / 1e6 / steps / len(times[name][1:]) / layers,
                "tokens on the device": cache.resident_tokens(),
                "bound": cache.bound,
            }
        rows.append(row | {"MB on the GPU": max(peak[name]) / 1e6 or None, "times": times[name]})
        rows[-1]["outputs"] = list(map(fingerprint, outputs[name]))
    return rows


def show_decoding(records: list[dict]) -> bool:
    """A row for each way; True if what is offloaded equals what is resident, and is within its bound."""
    every, shown, ok = [(x["settings"]["tokens"], row) for x in records for row in x["rows"]], [], True
    near = {T: row for T, row in every if row["way"] in ("device", "hip")}
    for T, row in every:
        out = {"tokens": T} | row
        if "bound" in row and T in near:
            out["of resident"] = f"{near[T]['ms a step'] / row['ms a step']:.1%}"
            equal = [a == b for a, b in zip(near[T]["outputs"], row["outputs"], strict=False)]
            out["equal steps"] = f"{sum(equal)}/{len(equal)}"
            ok = ok and all(equal) and row["tokens on the device"] <= row["bound"]
        shown.append({x: y for x, y in out.items() if x not in ("times", "outputs")})
    print("\n" + rows_table(shown))
    return ok


# --- a whole model -----------------------------------------------------------------------------------------

RIVALS = ("llama.cpp", "llama.cpp-flash")
WAYS = ("dense", "dense-flash", "hip", "unclipped", "host", "disk", "pytorch", *RIVALS)
REST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
BACKENDS = {"dense": [SDPBackend.CUDNN_ATTENTION, *REST], "dense-flash": REST}


def model_floors(model: Llama, B: int, T: int, cfg: HiPConfig, dense: bool) -> tuple[float, float]:
    """Least seconds to read B texts of T tokens, and for a step: of weights, keys, values and arithmetic."""
    c, size, device = model.config, model.dtype.itemsize, model.device.type
    reached = {
        name: work / min(seconds_of(run, device) for _ in range(3))
        for name, (run, work) in measuring.ceilings(device, model.dtype).items()
    }
    matrices = [x for name, x in model.weights.items() if name.startswith("layers.") and x.ndim == 2]
    layers, seconds = sum(x.numel() for x in matrices), []
    for Tq, numbers in (T, layers), (1, layers + c.width * c.vocabulary):
        heads = c.head_size, c.heads, c.kv_heads
        weights = measuring.floor((2 * B * Tq * numbers, numbers * size), reached)
        for i in (0, 1):  # each half of the layers
            how = cfg.of_layer(i, 2).decoding if Tq == 1 else cfg.of_layer(i, 2)
            need = measuring.needed(B, Tq, T, heads, how, size)
            names = ["dense"] if dense else ["search", "sparse"]
            part = {x: measuring.floor(need[x], reached) for x in names}
            part["search"] = part.get("search", 0) / (cfg.refresh_interval if Tq == 1 else 1)
            weights += c.layers / 2 * sum(part.values())
        seconds.append(weights)
    return tuple(seconds)


def model_row(T: int, name: str, cfg: HiPConfig, options: argparse.Namespace) -> dict:
    """The model reads T tokens, and decodes behind them."""
    (model, tokenizer), room = options.loaded(), WARM + ROUNDS * options.steps
    g, context, B = torch.Generator().manual_seed(1), None, options.batch
    text = torch.randint(model.config.vocabulary, (B, T + room), generator=g).to(model.device)
    if tokenizer:
        text = torch.tensor([measuring.natural_text(tokenizer, T + room)] * B, device=model.device)
    if name in RIVALS:
        return rival_row(text[0].tolist(), T, name, options)
    kernels = hip if name == "pytorch" else options.kernels
    how = dict(
        kernels=kernels,
        offload={"store": name, "folder": options.folder} if name in ("host", "disk") else None,
    )

    def read() -> float:
        nonlocal context
        context = None  # or two would be there at once
        context = Context(model, T + room, cfg, "dense" if "dense" in name else "hip", batch=B, **how)
        began = now()
        measuring.read(context, text[:, :T], what=name)
        return now() - began

    def step(i: int) -> torch.Tensor:
        hidden = context.decode(text[:, T + i : T + i + 1])
        model.logits(hidden[:, -1]).argmax(-1).tolist()  # as a loop has to that goes on with these tokens
        return hidden

    with (
        sdpa_kernel(BACKENDS[name], set_priority=True) if name in BACKENDS and text.is_cuda else nullcontext()
    ):
        times, memory = take_turns({name: read}, options, lambda run: run(), options.repeats)
        (row,) = decode([Way(name, step, context.cache)], options)
    floors = model_floors(model, B, T, cfg, "dense" in name)
    row["MB on the GPU"] = None  # but for what decoding adds it stands in the peak
    peak = {"peak GB beside the weights": memory[name] and memory[name] / 1e9}
    seconds = statistics.median(times[name]), row["ms a step"] / 1000
    shares = ", ".join(f"{x / y:.0%}" for x, y in zip(floors, seconds, strict=True))
    shares = {"of the floor: reading, decoding": shares}
    return {"rows": [{"way": name} | speeds(B, T, *seconds) | shares | row | peak]}


def speeds(B: int, T: int, reading: float, step: float) -> dict:
    each = {"prefill tokens/s": B * T / reading, "decoding tokens/s": B / step}
    return {"seconds to read": reading} | each


def rival_row(tokens: list[int], T: int, name: str, options: argparse.Namespace) -> dict:
    """What a CPU's user would take instead, with as many threads: quantised weights, dense attention."""
    if options.shape or options.batch > 1:
        raise ValueError("llama.cpp reads one text, by a model's file: leave out --shape and --batch")
    try:
        import llama_cpp
    except ImportError as error:
        raise ValueError("llama.cpp needs its package: `pip install llama-cpp-python`") from error
    threads = torch.get_num_threads()
    how = dict(n_threads=threads, n_threads_batch=threads, flash_attn="flash" in name, verbose=False)
    other = llama_cpp.Llama(str(options.model or packaged_model()), n_ctx=len(tokens), **how)

    def read() -> float:
        other.reset()
        began = now()
        other.eval(tokens[:T])
        return now() - began

    def step(i: int) -> torch.Tensor:
        other.eval(tokens[T + i : T + i + 1])
        return torch.tensor([other.sample(temp=0)])

    times, _ = take_turns({name: read}, options, lambda run: run(), options.repeats)
    (row,) = decode([Way(name, step)], options)
    reading = statistics.median(times[name])
    return {"rows": [{"way": name} | speeds(1, T, reading, row["ms a step"] / 1000) | row]}


def model(options: argparse.Namespace, cfg: HiPConfig, records: list[dict]) -> Iterator[Job]:
    """A whole model reads a text and decodes behind it, densely, by HiP, and by HiP with keys elsewhere.

    Natural text, or random tokens for random weights.  The ways:

    dense, dense-flash  torch's attention; on a GPU by cuDNN, and by FlashAttention
    hip                 as in generate.py: positions are clipped past the trained length
    unclipped           the same without clipping, for its time: it answers nonsense there
    host, disk          hip with keys and values in host memory, in a file
    pytorch             hip.py on a GPU, where the others run hip_triton.py
    llama.cpp           the same GGUF file by llama-cpp-python, on a CPU, with as many threads
    llama.cpp-flash     by its other attention, which reads faster and decodes more slowly

    Of the floor: the least time for weights, keys and values, and arithmetic, as a share of the time.
    """
    trained, name = options.loaded()[0].config.context, options.model or options.shape
    for T, each in product(options.tokens, options.ways):
        long = T + WARM + ROUNDS * options.steps > trained
        elsewhere = {"cpu": ("dense-flash", "pytorch"), "cuda": RIVALS}[options.device]
        if (each == "unclipped" and not long) or each in elsewhere:
            continue
        own = replace(cfg, rope_clip=trained // 2) if long and each != "unclipped" else cfg
        same = dict(tokens=T, way=each, model=name, steps=options.steps, batch=options.batch)
        yield same, partial(model_row, T, each, own, options)


# --- a model of the library transformers -------------------------------------------------------------------

LIBRARY_WAYS = ("sdpa", "hip", "host")


def make_checkpoint(folder: str, shape: str, device: str) -> None:
    """Save random weights as a Llama of the library."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = measuring.random_model(shape, torch.bfloat16, device)
    c = model.config
    config = LlamaConfig(
        **{theirs: getattr(c, ours) for ours, (theirs, _) in SIZES.items()},
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_size,
        vocab_size=c.vocabulary,
        tie_word_embeddings=c.tied,
        rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta),
    )
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    weights = model.weights.items()
    named = {x if x.startswith("lm_head") else f"model.{x}": y.contiguous() for x, y in weights}
    empty.save_pretrained(folder, state_dict=named)


@torch.inference_mode()
def library_row(model: Callable, name: str, T: int, cfg: HiPConfig, options: argparse.Namespace) -> dict:
    """The model reads T random tokens and goes on greedily: the second time of both counts."""
    from hip_transformers import HiPOffloadedCache
    from transformers import DynamicCache

    model, room, times = model(), T + WARM + options.steps, []
    model.config.hip = cfg
    model.set_attn_implementation("sdpa" if name == "sdpa" else "hip")
    g = torch.Generator().manual_seed(0)
    text = torch.randint(model.config.vocab_size, (1, T), generator=g).to(model.device)

    def following(tokens: torch.Tensor) -> torch.Tensor:
        began = now()
        logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
        new = logits[:, -1:].argmax(-1)
        times.append(now() - began)
        return new

    for _ in range(2):
        cache = HiPOffloadedCache(model.config, room) if name == "host" else DynamicCache(config=model.config)
        with sdpa_kernel(BACKENDS["dense"], set_priority=True) if text.is_cuda else nullcontext():
            written = [following(text)]
    for _ in range(WARM + options.steps):
        written.append(following(written[-1]))
    step = 1000 * statistics.mean(times[2 + WARM :])
    return {"seconds to read": times[1], "ms a step": step, "written": fingerprint(torch.cat(written, 1))}


def transformers(options: argparse.Namespace, cfg: HiPConfig, records: list[dict]) -> Iterator[Job]:
    """A Llama of the library reads random tokens and writes: by sdpa, by HiP, with keys in host memory.

    --checkpoint: its folder, made of random weights where there is none and --shape says which.  On several
    GPUs of one host, each with its share of the heads, in place of python:

        torchrun --nproc-per-node 2 extras/speed.py transformers --checkpoint DIR --device cuda

    "written" is a fingerprint of the tokens.  With --dtype float32 it shows whether one GPU writes the same:
    in 16 bits sums that are made in another order round otherwise.
    """
    from hip_transformers import register
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    register()
    folder, processes = options.checkpoint, int(os.environ.get("WORLD_SIZE", 1))
    if not (Path(folder) / "config.json").is_file():
        if not options.shape or processes > 1:
            raise ValueError(f"{folder} has no model: make one, by one process, with --shape")
        make_checkpoint(folder, options.shape, options.device)
    how = dict(dtype=options.dtype, attn_implementation="hip")
    how |= dict(distributed_config=DistributedConfig(tp_plan="auto")) if processes > 1 else {}

    @functools.cache
    def model() -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(folder, **how)
        return model if processes > 1 else model.to(options.device)

    for T, name in product(options.tokens, options.ways):
        same = dict(tokens=T, way=name, model=folder, processes=processes, steps=options.steps)
        yield same, partial(library_row, model, name, T, cfg, options)


def show_library(records: list[dict]) -> bool:
    names = "tokens", "way", "processes"
    rows = [{x: record["settings"][x] for x in names} | record for record in records]
    print("\n" + rows_table([{x: y for x, y in row.items() if x not in ("settings", "at")} for row in rows]))
    return True


# --- a layer on synthetic keys -----------------------------------------------------------------------------

H, HKV, D, CHUNK, ANCHOR = 9, 3, 64, 8192, 64


def chunk(layer: int, start: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (1, HKV, tokens, D) of a layer from token `start`, a multiple of CHUNK, on."""

    def anchors(part):
        seed = torch.Generator().manual_seed(9973 * layer + part)
        return torch.randn(1, HKV, CHUNK // ANCHOR, D, generator=seed)

    n, noise = start // CHUNK, torch.Generator().manual_seed(layer + 7919 * start)
    ends = torch.cat([anchors(n), anchors(n + 1)[:, :, :1]], 2)
    share = torch.arange(ANCHOR)[:, None] / ANCHOR
    k = (ends[:, :, :-1, None] * (1 - share) + ends[:, :, 1:, None] * share).flatten(2, 3)
    k = 2 * k + 0.3 * torch.randn(k.shape, generator=noise)
    return k[:, :, :tokens].to(dtype), torch.randn(k.shape, generator=noise)[:, :, :tokens].to(dtype)


def chunks(layer: int, tokens: int, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return (chunk(layer, i, min(CHUNK, tokens - i), dtype) for i in range(0, tokens, CHUNK))


def decoding(layer: int, tokens: int, steps: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """q (1, H, 1, D), k and v (1, HKV, 1, D) of each step; q drifts, and jumps every 16 steps."""
    g, queries = torch.Generator().manual_seed(31 + layer), []
    for step in range(steps):
        if step % 16 == 0:
            start = int(torch.randint(tokens // CHUNK, (1,), generator=g)) * CHUNK
            base = chunk(layer, start, CHUNK, torch.float32)[0][:, :, ::ANCHOR]
            anchor = int(torch.randint(base.shape[2], (1,), generator=g))
            of = base[:, :, anchor].repeat_interleave(H // HKV, 1)
        of = of + 0.1 * torch.randn(of.shape, generator=g)
        new = [torch.randn(1, HKV, 1, D, generator=g).to(dtype) for _ in "kv"]
        queries.append((of[:, :, None].to(dtype), *new))
    return queries


class Decoder:
    """Decoding steps of one layer: a selection every refresh_interval steps, remembered.

    append(k, v) writes a token; past() is then keys and values, or the layer of a cache in place of both.
    """

    def __init__(self, cfg: HiPConfig, kernels: ModuleType, append: Callable, past: Callable):
        self.cfg, self.kernels, self.append, self.past = cfg, kernels, append, past
        self.selection, self.step, self.recent = None, 0, []

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.append(k, v)
        keys, values = self.past()
        self.recent = [*self.recent, q][-self.cfg.block_q :]
        if self.step % self.cfg.refresh_interval == 0:
            latest = torch.cat(self.recent, 2) if len(self.recent) == self.cfg.block_q else q
            self.selection = self.kernels.select_blocks(latest, keys, self.cfg, self.selection)
        self.step += 1
        return self.kernels.sparse_attention(q, keys, values, self.selection, self.cfg)


def offloaded_decoder(cache: OffloadedKVCache, layer: int, cfg: HiPConfig, kernels: ModuleType) -> Decoder:
    return Decoder(cfg, kernels, partial(cache.append, layer), lambda: [cache.layer(layer)] * 2)


def resident_decoder(kv: list[torch.Tensor], length: int, cfg: HiPConfig, kernels: ModuleType) -> Decoder:
    """kv: keys and values, with room behind the first `length` tokens."""

    def append(*new):
        nonlocal length
        for x, y in zip(kv, new, strict=True):
            x[:, :, length : length + 1] = y
        length += 1

    return Decoder(cfg, kernels, append, lambda: [x[:, :, :length] for x in kv])


def resident(layer: int, tokens: int, steps: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """All keys and values of a layer, with room for the steps."""
    whole = [torch.cat(x, 2) for x in zip(*chunks(layer, tokens, dtype), strict=True)]
    return [torch.nn.functional.pad(x, (0, 0, 0, steps)).to(device) for x in whole]


def one_layer(T: int, options: argparse.Namespace) -> Iterator[Way]:
    """Attention of one layer behind T tokens; or of several, of which the resident cache has first and last.

    Between anchors drawn every 64 tokens keys change gradually, plus noise; a query resembles one anchor, or
    the last query.
    """
    cfg, kernels, dtype, device = options.cfg.decoding, options.kernels, options.dtype, options.device
    layers, steps = range(options.layers), WARM + ROUNDS * options.steps
    new = {n: [[x.to(device) for x in step] for step in decoding(n, T, steps, dtype)] for n in layers}
    kv = {n: resident(n, T, steps, dtype, device) for n in {0, layers[-1]}}

    def way(name: str, decoders: dict[int, Decoder], cache: OffloadedKVCache | None = None) -> Way:
        def step(i: int) -> torch.Tensor:
            out = {n: decoder(*new[n][i]) for n, decoder in decoders.items()}
            return torch.cat([out[n] for n in kv])

        return Way(name, step, cache, len(decoders))

    yield way("device", {n: resident_decoder(x, T, cfg, kernels) for n, x in kv.items()})
    for store in options.stores:
        shape = len(layers), 1, HKV, T + steps, D
        cache = kernels.OffloadedKVCache(shape, H, cfg, dtype, device, store, options.folder)
        for n in tqdm(layers, desc=store, leave=False):
            for k, v in chunks(n, T, dtype):
                cache.append(n, k.to(device), v.to(device))
        yield way(store, {n: offloaded_decoder(cache, n, cfg, kernels) for n in layers}, cache)


def offload(options: argparse.Namespace, cfg: HiPConfig, records: list[dict]) -> Iterator[Job]:
    """Decoding steps of attention alone, keys and values on the device, in host memory, in a file.

    Of a layer with 9 query and 3 key heads, D 64, on keys with locality.  Each step is compared with the
    resident cache, bit for bit; of several layers the first and the last are.  Times are of one layer.
    """
    options.cfg = cfg
    for T in options.tokens:
        if T < CHUNK:
            raise ValueError(f"--tokens must be at least {CHUNK}, not {T}")
        settings = dict(tokens=T, **{x: getattr(options, x) for x in ("layers", "steps", "stores")})
        yield settings, lambda T=T: {"rows": decode(one_layer(T, options), options)}


# --- the command -------------------------------------------------------------------------------------------


def cell(x: object) -> object:
    """A number as tables here show it."""
    digits = ",.0f" if not isinstance(x, float) or x >= 100 else ".3g"
    return format(x, digits) if isinstance(x, int | float) else x


def rows_table(rows: list[dict]) -> str:
    return measuring.records_table([{x: cell(y) for x, y in row.items()} for row in rows])


class Part(NamedTuple):
    """What can be timed."""

    jobs: Callable[..., Iterator[Job]]
    show: Callable[[list[dict]], bool]  # prints the tables; False if something is wrong
    tokens: dict[str, list[int]]  # lengths, by device


PARTS = {
    "attention": Part(
        attention,
        show_attention,
        {"cpu": [2**n for n in range(12, 16)], "cuda": [2**n for n in range(13, 20)]},
    ),
    "model": Part(model, show_decoding, {"cpu": [8000], "cuda": [8000, 32000, 128000]}),
    "transformers": Part(transformers, show_library, {"cpu": [8000], "cuda": [8000, 32000, 128000]}),
    "offload": Part(
        offload, show_decoding, {"cpu": [2**n for n in range(13, 21)], "cuda": [2**15, 2**17, 2**19]}
    ),
}


def arguments() -> argparse.ArgumentParser:
    parser = measuring.Parser(description=__doc__)
    adds = {}
    for name, command in measuring.subcommands(parser, {x: part.jobs for x, part in PARTS.items()}).items():
        measuring.common_options(command)
        adds[name] = add = command.add_argument
        add("--seconds", type=float, help="most time for the repeats of a call (on a CPU 60, on a GPU 10)")
        if name not in ("offload", "transformers"):
            add(
                "--repeats",
                type=positive,
                default=5,
                metavar="N",
                help="(5; of a step of attention alone 50)",
            )
        if name != "attention":
            add("--steps", type=positive, default=64, metavar="N", help="decoding steps of a round (64)")
        if name in ("model", "offload"):
            add("--folder", metavar="DIR", help="for the file on disk (the system's temporary folder)")
    add = adds["attention"]
    add("--against", metavar="DIR", help="a folder with another hip.py, timed as well with its own defaults")
    add("--inputs", nargs="+", choices=INPUTS, help="(on a CPU all, on a GPU normal)")
    add("--shapes", nargs="+", choices=SHAPES, help="of which model heads are (on a CPU 135m, on a GPU all)")
    add("--batch", type=positive, nargs="+", metavar="N", help="of decoding (on a CPU 1, on a GPU 1 and 32)")
    add = adds["model"]
    add("--model", metavar="M", help=".gguf file, checkpoint folder or hub id (SmolLM2-135M-Instruct)")
    add("--shape", choices=SHAPES, help="random weights in the shape of a model, in place of --model")
    add("--batch", type=positive, default=1, metavar="N", help="texts that are read at once (1)")
    add(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=[*WAYS][:-3],
        metavar="WAY",
        help="(all but the last three)",
    )
    add = adds["transformers"]
    add("--checkpoint", metavar="DIR", required=True, help="folder of the model")
    add("--shape", choices=SHAPES, help="make it, of random weights, unless it is there")
    add("--ways", nargs="+", choices=LIBRARY_WAYS, default=LIBRARY_WAYS, metavar="WAY", help="(all)")
    add = adds["offload"]
    add("--stores", nargs="+", choices=("host", "disk"), default=["host"], help="(host)")
    add("--layers", type=positive, default=1, metavar="N", help="each with keys and values of its own (1)")
    return parser


def settle(options: argparse.Namespace) -> None:
    """Fill in what the options leave open."""
    gpu, what = options.device == "cuda", options.what
    options.kernels = measuring.kernels_for(options.device)
    options.seconds = options.seconds or (10 if gpu else 60)
    options.tokens = sorted(options.tokens or PARTS[what].tokens[options.device])
    options.dtype = getattr(torch, options.dtype) if options.dtype else default_dtype(options.device)
    name, shape = (vars(options).get(x) for x in ("model", "shape"))
    options.rank = os.environ.get("RANK", "0") if what == "transformers" else "0"
    if options.rank != "0":  # of several processes each keeps its own results, and the first shows them
        options.out = str(Path(options.out) / options.rank)
    if name and shape:
        raise ValueError("--shape comes in place of --model, not beside it")
    if what == "attention":
        options.inputs = options.inputs or (["normal"] if gpu else [*INPUTS])
        options.shapes = options.shapes or ([*SHAPES] if gpu else ["135m"])
        options.batch = options.batch or ([1, 32] if gpu else [1])

    @functools.cache
    def loaded() -> tuple[Llama, Tokenizer | None]:
        if shape:
            return measuring.random_model(shape, options.dtype, options.device), None
        return load(name, options.dtype, options.device)

    options.loaded = loaded


def main() -> int:
    options = arguments().parse_args()
    cfg = measuring.configure(HiPConfig(), options.set)
    settle(options)
    common = {x: vars(options).get(x) for x in ("what", "repeats", "seconds")}
    if folder := vars(options).get("against"):
        options.against = measuring.other_version(folder, options.device)
        common["old"] = measuring.code_hash(folder, "hip", options.kernels.__name__)
    common |= dict(config=vars(cfg), dtype=str(options.dtype))
    results = measuring.Results(options.out, "speed", options.device, **common)
    part, records, ok = PARTS[options.what], [], True
    try:
        for settings, measure in tqdm(part.jobs(options, cfg, records), desc=options.what, unit="row"):
            try:
                records.append(results.get(**settings) or results.put(measure(), **settings))
            except torch.OutOfMemoryError:
                print(f"\ndoes not fit: {settings}", file=sys.stderr)
            gc.collect()
            torch.cuda.empty_cache()  # does nothing where there is no GPU
    finally:  # interrupted as well
        first = options.rank == "0"
        if first and options.json:
            print(json.dumps(records, indent=1))
        elif first and records:
            where = f"{measuring.device_name(options.device)}, torch {torch.__version__}"
            print(f"{cfg}, {options.dtype} on {where}, {torch.get_num_threads()} threads")
            ok = part.show(records)
    return int(not ok)


if __name__ == "__main__":
    sys.exit(measuring.command(main))
