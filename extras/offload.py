"""The offloaded cache measured: what stays on the device as a text grows, and a million tokens on disk.

    python extras/offload.py table                          # 8k to 1M tokens, one layer, host memory
    python extras/offload.py table --stores disk --tokens 32768 131072
    python extras/offload.py million --folder DIR           # 30 layers, 23 GB in a file in DIR

Attention alone, 9 query and 3 key/value heads, D 64, on synthetic keys with locality: between anchors drawn
every 64 tokens keys change gradually, plus noise; a query resembles one anchor, or the last query.  Each step
is compared with the all-resident cache, bit for bit (`million`: on the first and last layer).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from measuring import command, kernels_for, now, records_table
from tqdm import tqdm

import hip
from hip import HiPConfig, OffloadedKVCache

H, HKV, D, CHUNK, ANCHOR = 9, 3, 64, 8192, 64
WARM, ROUNDS = 16, 3  # decoding steps that warm up, and rounds, of which the median counts

# --- a layer on synthetic keys -----------------------------------------------------------------------------


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
        self.selection, self.step = None, 0

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.append(k, v)
        keys, values = self.past()
        if self.step % self.cfg.refresh_interval == 0:
            self.selection = self.kernels.select_blocks(q, keys, self.cfg, self.selection)
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


# --- steps of decoding, the ways in turn -------------------------------------------------------------------


class Way(NamedTuple):
    """A place where keys and values are kept."""

    kept: str
    step: Callable[[int], torch.Tensor]  # does step i of decoding and returns its output
    cache: OffloadedKVCache | None = None
    prefill: float | None = None  # tokens/s


def one_layer(
    T: int, steps: int, device: str, stores: Iterable[str], folder: str | None = None
) -> Iterator[Way]:
    """Attention of one layer, as above, behind T tokens."""
    cfg, kernels = HiPConfig().decoding, kernels_for(device)
    dtype = torch.float32 if kernels is hip else torch.bfloat16
    new = [[x.to(device) for x in step] for step in decoding(0, T, steps, dtype)]
    kv = resident(0, T, steps, dtype, device)
    near = resident_decoder(kv, T, cfg, kernels)
    yield Way("device", lambda i: near(*new[i]))
    for store in stores:
        shape = 1, 1, HKV, T + steps, D
        cache = kernels.OffloadedKVCache(shape, H, cfg, dtype, device, store, folder)
        cache.append(0, *(x[:, :, :T] for x in kv))
        far = offloaded_decoder(cache, 0, cfg, kernels)
        yield Way(store, lambda i, far=far: far(*new[i]), cache)


def take_turns(T: int, prepared: Iterator[Way], steps: int, seconds: float = 25) -> list[dict]:
    """Rounds of so many steps behind T tokens, the ways in turn, the first being resident: a row for each.

    prepared: makes the ways one by one, so that it is seen what each holds on a GPU.
    """
    ways, held, memory = [], {}, torch.cuda.memory_allocated()
    for way in prepared:
        ways.append(way)
        held[way.kept] = torch.cuda.memory_allocated() - memory
        memory += held[way.kept]
    times, peak, moved, outputs = ({way.kept: [] for way in ways} for _ in range(4))
    for first in (0, *range(WARM, WARM + ROUNDS * steps, steps)):
        for name, step, cache, _ in ways:
            counts, memory = Counter(cache and cache.counts()), torch.cuda.memory_allocated()
            count, started = steps if first else WARM, now(forget=True)
            outputs[name] += [step(i) for i in range(first, first + count)]
            times[name].append(1000 * (now() - started) / count)
            peak[name].append(torch.cuda.max_memory_allocated() - memory + held[name])
            moved[name].append(Counter(cache and cache.counts()) - counts)
        if not first:
            began = now()  # kernels are compiled
        elif now() - began > seconds:
            break
    rows, near = [], ways[0].kept
    for name, _, cache, prefill in ways:
        ms = {x: statistics.median(times[x][1:]) for x in (near, name)}
        equal, n = list(map(torch.equal, outputs[name], outputs[near])), sum(moved[name][1:], Counter())
        hits = [n[f"{x}_hits"] / max(1, n[f"{x}_hits"] + n[f"{x}_misses"]) for x in ("search", "attention")]
        row = {
            "tokens": T,
            "kept": name,
            "prefill tokens/s": prefill,
            "ms a step": ms[name],
            "of resident": f"{ms[near] / ms[name]:.1%}",
            "hits: search, attention": ", ".join(f"{x:.1%}" for x in hits) if cache else None,
            "MB moved a step": n["moved_bytes"] / 1e6 / steps / len(moved[name][1:]) if cache else None,
            "tokens on the device": cache and cache.resident_tokens(),
            "bound": cache and cache.bound,
            "MB on the GPU": max(peak[name]) / 1e6 or None,
            "equal steps": f"{sum(equal)}/{len(equal)}",
        }
        ok = all(equal) and (cache is None or cache.resident_tokens() <= cache.bound)
        rows.append(row | {"ok": ok, "more": times[name]})
    return rows


# --- the command -------------------------------------------------------------------------------------------


def cell(x: object) -> object:
    """A number as tables here show it."""
    digits = ",.0f" if not isinstance(x, float) or x >= 100 else ".3g"
    return format(x, digits) if isinstance(x, int | float) else x


def rows_table(rows: list[dict]) -> str:
    hidden = ("ok", "more")
    return records_table([{x: cell(y) for x, y in row.items() if x not in hidden} for row in rows])


def table(options: argparse.Namespace) -> int:
    rows, steps = [], options.steps or 64
    for T in tqdm(options.tokens, desc="lengths", leave=False):
        ways = one_layer(T, WARM + ROUNDS * steps, options.device, options.stores, options.folder)
        rows += take_turns(T, ways, steps)
    print(rows_table(rows))
    return int(not all(row["ok"] for row in rows))


def million(options: argparse.Namespace) -> int:
    cfg, dtype, T, layers = HiPConfig().decoding, torch.bfloat16, options.tokens[0], options.layers
    steps, shape = options.steps or 32, (options.layers, 1, HKV, options.tokens[0] + (options.steps or 32), D)
    cache = OffloadedKVCache(shape, H, cfg, dtype, store="disk", folder=options.folder)
    filling = time.perf_counter()
    for layer in tqdm(range(layers), desc="fill", unit="layer", leave=False):
        for new in chunks(layer, T, dtype):
            cache.append(layer, *new)
    filled = time.perf_counter()
    new = [decoding(layer, T, steps, dtype) for layer in range(layers)]
    decoders = [offloaded_decoder(cache, layer, cfg, hip) for layer in range(layers)]
    outputs, times = {0: [], layers - 1: []}, []
    for i in tqdm(range(steps), desc="decode", unit="step", leave=False):
        started = time.perf_counter()
        for layer in range(layers):
            outputs.get(layer, []).append(decoders[layer](*new[layer][i]))
        times.append(1e3 * (time.perf_counter() - started))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    r, n = cfg.refresh_interval, cache.counts()
    step = statistics.median(sum(times[i : i + r]) / r for i in range(0, max(1, steps - r + 1), r))
    rates = [n[f"{x}_hits"] / (n[f"{x}_hits"] + n[f"{x}_misses"]) for x in ("search", "attention")]
    print(
        f"{T:,} tokens in {layers} layers: file of {cache.store.nbytes / 1e9:.1f} GB filled in "
        f"{filled - filling:.0f} s; {steps} steps at {step:.0f} ms for all layers; on the device "
        f"{cache.resident_tokens():,} tokens of a layer and head (bound {cache.bound:,}); found there "
        f"{rates[0]:.1%} of the search's and {rates[1]:.1%} of attention's pages; peak memory of the "
        f"process {peak / 1e9:.2f} GB"
    )
    for layer, found in outputs.items():
        decoder = resident_decoder(resident(layer, T, steps, dtype, "cpu"), T, cfg, hip)
        same = [torch.equal(o, decoder(*step)) for o, step in zip(found, new[layer], strict=True)]
        print(f"layer {layer}: {sum(same)} of {len(same)} steps equal the all-resident ones bit for bit")
        if not all(same):
            return 1
    return 0


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("what", choices=("table", "million"))
    add("--tokens", type=int, nargs="+", metavar="N", help="lengths (8k to 1M; 1M)")
    add("--layers", type=int, default=30, help="of million (%(default)s)")
    add("--steps", type=int, help="decoding steps: of a round of table (64), of million (32)")
    add("--stores", nargs="+", choices=("host", "disk"), default=["host"], help="of table (host)")
    add("--device", default="cpu", help="of table (%(default)s)")
    add("--folder", help="for the file on disk (the system's temporary folder)")
    options = parser.parse_args()
    lengths = [2**n for n in range(13, 21)] if options.what == "table" else [1_000_000]
    options.tokens = options.tokens or lengths
    if min(options.tokens) < CHUNK:
        raise ValueError(f"--tokens must be at least {CHUNK}, not {min(options.tokens)}")
    return (table if options.what == "table" else million)(options)


if __name__ == "__main__":
    sys.exit(command(main))
