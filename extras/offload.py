"""The offloaded cache measured: what stays on the device as a text grows, and a million tokens on disk.

    python extras/offload.py table                          # 8k to 1M tokens, one layer, host memory
    python extras/offload.py million --folder DIR           # 30 layers, 23 GB in a file in DIR
    python extras/offload.py table --device cuda --tokens 32768 131072 524288 --store disk

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
from collections.abc import Callable
from types import ModuleType

import torch
from measuring import kernels_for
from tqdm import tqdm

import hip
from hip import HiPConfig, OffloadedKVCache

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


def fill(cache: OffloadedKVCache, layer: int, tokens: int, dtype: torch.dtype) -> None:
    for start in range(0, tokens, CHUNK):
        new = chunk(layer, start, min(CHUNK, tokens - start), dtype)
        cache.append(layer, *(x.to(cache.banks[layer][0].rows[0].device) for x in new))


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
    """Decoding steps of one layer over some cache: a selection every refresh_interval steps, remembered.

    append(k, v) writes a token; past() is then keys for the search, keys, and values.
    """

    def __init__(self, cfg: HiPConfig, kernels: ModuleType, append: Callable, past: Callable):
        self.cfg, self.kernels, self.append, self.past = cfg, kernels, append, past
        self.selection, self.step = None, 0

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.append(k, v)
        search_keys, keys, values = self.past()
        if self.step % self.cfg.refresh_interval == 0:
            self.selection = self.kernels.select_blocks(q, search_keys, self.cfg, self.selection)
        self.step += 1
        return self.kernels.sparse_attention(q, keys, values, self.selection, self.cfg)


def offloaded_decoder(cache: OffloadedKVCache, layer: int, cfg: HiPConfig, kernels: ModuleType) -> Decoder:
    return Decoder(cfg, kernels, lambda *new: cache.append(layer, *new),
                   lambda: (cache.search_keys(layer), cache.keys(layer), cache.values(layer)))


def resident_decoder(k: torch.Tensor, v: torch.Tensor, length: int, cfg: HiPConfig,
                     kernels: ModuleType) -> Decoder:
    """k, v: with room behind the first `length` tokens."""
    def append(*new):
        nonlocal length
        for x, y in zip((k, v), new, strict=True):
            x[:, :, length : length + 1] = y
        length += 1

    return Decoder(cfg, kernels, append, lambda: tuple(x[:, :, :length] for x in (k, k, v)))


def resident(layer: int, tokens: int, steps: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """All keys and values of a layer, with room for the steps."""
    out = [torch.empty(1, HKV, tokens + steps, D, dtype=dtype) for _ in "kv"]
    for start in range(0, tokens, CHUNK):
        for x, part in zip(out, chunk(layer, start, min(CHUNK, tokens - start), dtype), strict=True):
            x[:, :, start : start + part.shape[2]] = part
    return out


def decode(decoder: Decoder, steps: list, wait: Callable[[], None]) -> tuple[list[torch.Tensor], float]:
    """Outputs of some steps, and milliseconds of each on average, without waiting for the device between."""
    wait()
    started = time.perf_counter()
    outputs = [decoder(*new) for new in steps]
    wait()
    return outputs, 1e3 * (time.perf_counter() - started) / len(steps)


def hit_rates(cache: OffloadedKVCache) -> list[float]:
    """Of the search's and of attention's bank."""
    n = cache.counts()
    return [n[f"{x}_hits"] / (n[f"{x}_hits"] + n[f"{x}_misses"]) for x in ("search", "attention")]


def table(options: argparse.Namespace) -> None:
    cfg, kernels = HiPConfig(), kernels_for(options.device)
    dtype, wait = torch.float32, lambda: None
    if kernels is not hip:
        dtype, wait = torch.bfloat16, torch.cuda.synchronize
    r, steps = cfg.refresh_interval, options.steps or 64
    if steps < 3 * r:
        raise ValueError(f"--steps must be at least {3 * r}, for two runs of {r} to warm up, not {steps}")
    print("| tokens | on the device | bound | search hits | attention hits | resident ms | offloaded ms "
          "| ratio |\n" + "| --- " * 8 + "|")
    for T in options.tokens:
        shape = 1, 1, HKV, T + steps, D
        cache = kernels.OffloadedKVCache(shape, H, cfg, dtype, options.device, options.store, options.folder)
        fill(cache, 0, T, dtype)
        k_all, v_all = (x.to(options.device) for x in resident(0, T, steps, dtype))
        near = resident_decoder(k_all, v_all, T, cfg, kernels)
        far, times = offloaded_decoder(cache, 0, cfg, kernels), []
        new = [[x.to(options.device) for x in step] for step in decoding(0, T, steps, dtype)]
        for i in range(0, steps - r + 1, r):  # a search, and the steps that it serves
            (wanted, a), (found, b) = (decode(decoder, new[i : i + r], wait) for decoder in (near, far))
            if not all(map(torch.equal, wanted, found)) or cache.resident_tokens() > cache.bound:
                raise RuntimeError(f"at {T} tokens a step from {i} to {i + r} differs, or passes the bound")
            times.append((a, b))
        # the first two runs compile: a search without and one with memory
        (a, b), rates = (statistics.median(x) for x in zip(*times[2:], strict=True)), hit_rates(cache)
        print(f"| {T:,} | {cache.resident_tokens():,} | {cache.bound:,} | {rates[0]:.1%} | {rates[1]:.1%} "
              f"| {a:.3f} | {b:.3f} | {a / b:.2f} |", flush=True)


def million(options: argparse.Namespace) -> None:
    cfg, dtype, T, layers = HiPConfig(), torch.bfloat16, options.tokens[0], options.layers
    steps = options.steps or 32
    cache = OffloadedKVCache((layers, 1, HKV, T + steps, D), H, cfg, dtype, store="disk",
                             folder=options.folder)
    filling = time.perf_counter()
    for layer in tqdm(range(layers), desc="fill", unit="layer", leave=False):
        fill(cache, layer, T, dtype)
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
    r = cfg.refresh_interval
    step = statistics.median(sum(times[i : i + r]) / r for i in range(0, max(1, steps - r + 1), r))
    rates = hit_rates(cache)
    print(f"{T:,} tokens in {layers} layers: file of {cache.store.nbytes / 1e9:.1f} GB filled in "
          f"{filled - filling:.0f} s; {steps} steps at {step:.0f} ms for all layers; on the device "
          f"{cache.resident_tokens():,} tokens of a layer and head (bound {cache.bound:,}); found there "
          f"{rates[0]:.1%} of the search's and {rates[1]:.1%} of attention's pages; peak memory of the "
          f"process {peak / 1e9:.2f} GB")
    for layer, found in outputs.items():
        decoder = resident_decoder(*resident(layer, T, steps, dtype), T, cfg, hip)
        same = [torch.equal(o, decoder(*step)) for o, step in zip(found, new[layer], strict=True)]
        print(f"layer {layer}: {sum(same)} of {len(same)} steps equal the all-resident ones bit for bit")
        if not all(same):
            sys.exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("table", "million"))
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths (8k to 1M; 1M)")
    parser.add_argument("--layers", type=int, default=30, help="of million (%(default)s)")
    parser.add_argument("--steps", type=int, help="decoding steps (64; 32)")
    parser.add_argument("--store", choices=("host", "disk"), default="host", help="of table (%(default)s)")
    parser.add_argument("--device", default="cpu", help="of table (%(default)s)")
    parser.add_argument("--folder", help="for the file on disk (the system's temporary folder)")
    options = parser.parse_args()
    lengths = [2**n for n in range(13, 21)] if options.what == "table" else [1_000_000]
    options.tokens = options.tokens or lengths
    try:
        (table if options.what == "table" else million)(options)
        return 0
    except (ValueError, OSError) as error:
        print(f"offload.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
