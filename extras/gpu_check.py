"""Everything that needs a real GPU, in one command: tests, a memory check, and every speed the README states.

    python extras/gpu_check.py                             # all of it, within --seconds
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
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import measuring
import offload
import torch
from measuring import ROOT, cold_milliseconds, floor, graphed, now
from offload import ROUNDS, WARM, Way
from torch.nn.attention import SDPBackend, sdpa_kernel

import hip
from hip import HiPConfig
from model import Context, Llama, Tokenizer, generate, load, rope_frequencies

SHAPES = ((128, 32, 8), (64, 9, 3))  # head size, query and key heads: of Llama 3 8B, of the default model
K = 1024
SIZES = {  # (batch, tokens) or tokens of each part, and decoding steps of a round
    "cuda": dict(
        prefill=[(1, 2**n * K) for n in range(3, 10)],
        decoding=[(B, T * K) for B in (1, 32) for T in (8, 32, 128, 512)],
        layer=(32 * K, 128 * K, 512 * K),
        whole=(32 * K, 128 * K),
        model=(8 * K - 256, 32 * K),
        steps=64,
    ),
    "cpu": dict(prefill=[(1, K)], decoding=[(2, K)], layer=[8 * K], whole=[512], model=(512, K), steps=40),
}
ODD = HiPConfig(top_k=32, block_q=16, block_k=8, stride_q=2, stride_k=2, sink=5, window=33)
CASES = {  # of the memory check; the last three are those of the timings, which then need compile nothing
    "odd": (80, 5, 1, ODD),
    "odd, clipped": (80, 5, 1, replace(ODD, rope_clip=41)),
    "odd, the paper's": (80, 4, 2, replace(ODD, score="max", per_head=True)),
    "clipped": (64, 9, 3, HiPConfig(rope_clip=4096)),
    "D 64": (64, 9, 3, HiPConfig()),
    "D 128": (128, 32, 8, HiPConfig()),
}
CUDNN, REST = SDPBackend.CUDNN_ATTENTION, [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


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
    def reached(self) -> dict[str, float]:
        """The two ceilings: operations/s of a matrix product, bytes/s of a copy, read and written."""
        runs = measuring.ceilings(self.device, self.dtype)
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
        (model, tokenizer), g = self.model, torch.Generator().manual_seed(1)
        if tokenizer:
            return torch.tensor([measuring.natural_text(tokenizer, tokens)], device=self.device)
        return torch.randint(model.config.vocabulary, (1, tokens), generator=g).to(self.device)


# --- correctness -------------------------------------------------------------------------------------------


def checks(job: Job) -> Iterator[dict]:
    """All tests, in several processes, and the memory checks beside them: nothing is timed meanwhile."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    listed = subprocess.run(
        [*pytest, "--collect-only", "-q", "test_hip.py"], cwd=ROOT, text=True, capture_output=True
    )
    # dealt out one by one, first those that compile kernels: they take longest
    tests = sorted(re.findall(r"^test_hip\.py::.*", listed.stdout, re.M), key=lambda x: "triton" not in x)
    hands, pytest = min(12, os.cpu_count() or 1), [*pytest, "-v", "-rfEs", "--tb=short"]
    memcheck = "compute-sanitizer --tool memcheck --padding 4096 --report-api-errors no --launch-timeout 0"
    memcheck = [*memcheck.split(), sys.executable, __file__, "--case"]  # torch takes long to start
    jobs = {f"tests {i + 1}": pytest + tests[i::hands] for i in range(hands)}
    jobs |= {f"memcheck, {x}": [*memcheck, x] for x in (*CASES, "planted")}

    def run(name: str) -> subprocess.CompletedProcess:
        env = dict(os.environ, PYTHONUNBUFFERED="1", OMP_NUM_THREADS="2")
        if "memcheck" in name:  # without torch's own cache of memory it knows where each tensor ends
            env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        limit = ["timeout", "--signal=KILL", str(int(0.42 * job.options.seconds))]  # all that the job started
        out = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return subprocess.run(limit + jobs[name], cwd=ROOT, env=env, text=True, errors="replace", **out)

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
    import triton
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    import hip_triton as kernels

    @triton.jit
    def planted_kernel(p_x):
        tl.store(p_x + tl.program_id(0), 0.0)

    if name == "planted":  # more programs than there are numbers: they write past the end
        planted_kernel[(2000,)](torch.ones(1000, device="cuda"))
        return torch.cuda.synchronize()
    (D, H, Hkv, cfg), launched, launch = CASES[name], set(), JITFunction.__getitem__
    JITFunction.__getitem__ = lambda self, grid: launched.add(self.fn.__name__) or launch(self, grid)
    dtypes = (torch.bfloat16, torch.float32) if "odd" in name else (torch.bfloat16,)
    for Tq, dtype in product((1, 33, 200), dtypes):
        T, rope, chosen = 2999 if name != "clipped" else 4999, None, None
        q, k, v = (torch.randn(2, h, t, D).to("cuda", dtype) for h, t in ((H, Tq), (Hkv, T), (Hkv, T)))
        if cfg.rope_clip:
            angle = torch.arange(cfg.rope_clip + cfg.block_q)[:, None] * rope_frequencies(1e5, D)
            rope = angle.cos().cuda(), angle.sin().cuda()
        for _ in range(2):  # afresh, then remembering
            chosen = kernels.select_blocks(q, k, cfg, chosen, rope=rope)
        o = kernels.sparse_attention(q, k, v, chosen, cfg, rope=rope)
        assert o.isfinite().all(), (Tq, dtype)
        if rope is None and dtype == torch.bfloat16 and Tq <= cfg.block_q:
            cache = kernels.OffloadedKVCache((1, 2, Hkv, T, D), H, cfg, dtype, "cuda")
            cache.append(0, k, v)
            for _ in range(2):  # all pages missing, then there
                kernels.select_blocks(q, cache.layer(0), cfg, chosen)
                paged = kernels.sparse_attention(q, cache.layer(0), cache.layer(0), chosen, cfg)
            assert torch.equal(paged, o), Tq
    torch.cuda.synchronize()
    print("launched:", *launched)


# --- attention alone ---------------------------------------------------------------------------------------


def attention(phase: str, job: Job) -> Iterator[dict]:
    """Milliseconds of dense attention, of a search, and of sparse attention to what was found."""
    copy, matmul = job.reached["copy"] / 1e12, job.reached["product"] / 1e12
    yield {"note": f"ceilings: copy {copy:.2f} TB/s, product {matmul:,.0f} TFLOP/s"}
    for heads, (B, T) in product(SHAPES, job.sizes[phase]):
        row = {"D, heads": "{}, {}/{}".format(*heads), "batch": B, "tokens": T}
        try:
            yield row | attention_times(job, B, T, heads, phase == "decoding")
        except torch.OutOfMemoryError:
            yield row | {"dense ms": "does not fit"}


def attention_times(job: Job, B: int, T: int, heads: tuple[int, int, int], decoding: bool) -> dict:
    (D, H, Hkv), Tq, cfg, kernels, host, sets = heads, 1 if decoding else T, HiPConfig(), job.kernels, [], []
    cfg = cfg.decoding if decoding else cfg
    for _ in range(1 if B * T * Hkv * D > 2**28 else 2):  # sets of inputs
        shapes = (H, Tq), (Hkv, T), (Hkv, T)
        q, k, v = (torch.randn(B, h, t, D, device=job.device, dtype=job.dtype) for h, t in shapes)
        chosen = kernels.select_blocks(q, k, cfg)
        # a decoding step remembers the selection before it
        runs = {"search": partial(kernels.select_blocks, q, k, cfg, chosen if decoding else None)}
        runs |= {"sparse": partial(kernels.sparse_attention, q, k, v, chosen, cfg)}
        sets.append(runs | measuring.dense_ways(q, k, v))
    for _ in range(6):
        began = now()
        sets[0]["search"](), sets[0]["sparse"]()
        host.append(1000 * (time.perf_counter() - began))
    if decoding and job.cuda:
        sets = [{name: graphed(run) for name, run in runs.items()} for runs in sets]
    found = {name: cold_milliseconds([runs[name] for runs in sets], job.device) for name in sets[0]}
    way = min(found.keys() - {"search", "sparse"}, key=found.get)
    ms = {"dense": found[way], "search": found["search"], "sparse": found["sparse"]}
    need = measuring.needed(B, Tq, T, heads, cfg, job.dtype.itemsize)
    shares = {name: 1000 * floor(need[name], job.reached) / x for name, x in ms.items()}
    row = {f"{name} ms": x for name, x in ms.items()} | {"dense by": way or "torch"}
    for n in (1, cfg.refresh_interval) if decoding else (1,):
        title = f"speed-up, refresh {n}" if decoding else "speed-up"
        row[title] = ms["dense"] / (ms["search"] / n + ms["sparse"])
    row["of the floors"] = ", ".join(f"{x:.0%}" for x in shares.values())
    return row | {"launch ms": statistics.median(host[1:]), "more": found}


# --- the offloaded cache -----------------------------------------------------------------------------------


def one_layer(job: Job, T: int) -> Iterator[Way]:
    return offload.one_layer(T, job.room, job.device, ("host", "disk"))


def whole_model(job: Job, T: int) -> Iterator[Way]:
    """The model reads T tokens, and decodes behind them."""
    model, text = measuring.stretched(job.model[0], T + job.room), job.text(T + job.room)

    def step(context: Context, i: int) -> torch.Tensor:
        hidden = context.decode(text[:, T + i : T + i + 1])
        model.logits(hidden[0, -1]).argmax().item()  # as a loop has to that goes on with this token
        return hidden

    Context(model, T, HiPConfig(), "hip", job.kernels).prefill(text[:, : min(T, 2 * K)])  # compiles
    for kept in ("device", "host", "disk"):
        store = {} if kept == "device" else {"offload": {"store": kept}}
        context = Context(model, T + job.room, HiPConfig(), "hip", job.kernels, **store)
        began = now()
        context.prefill(text[:, :T])
        yield Way(kept, partial(step, context), context.cache, T / (now() - began))


def offloaded(prepare, part: str, job: Job) -> Iterator[dict]:
    if part == "whole":
        yield {"note": job.what}
    for T in job.sizes[part]:
        yield from offload.take_turns(T, prepare(job, T), job.steps)


# --- the model ---------------------------------------------------------------------------------------------


def end_to_end(job: Job) -> Iterator[dict]:
    """Reading a prompt, and greedy decoding behind it; dense with one backend preferred, then another."""
    (model, _), plan = job.model, []
    yield {"note": job.what}
    dense = {"dense, cudnn": [CUDNN, *REST], "dense, flash": REST} if job.cuda else {"dense": []}
    for T in job.sizes["model"]:
        # as generate.py does: past the trained length positions are clipped
        clip = model.config.context // 2 if T + job.room > model.config.context else None
        plan += [(T, name, hip, None) for name in dense]
        plan += [(T, "hip-triton", job.kernels, clip), (T, "hip", hip, clip)]
        plan += [(T, "hip-triton, not clipped", job.kernels, None)] if clip else []
    for T, name, kernels, clip in sorted(plan, key=lambda x: x[1] == "hip"):  # the slow one last
        text, cfg, reads, stamps, backends = job.text(T), HiPConfig(rope_clip=clip), [], [], dense.get(name)
        with sdpa_kernel(backends, set_priority=True) if backends else nullcontext():
            while len(reads) < 2 or (len(reads) <= ROUNDS and sum(reads[1:]) + reads[-1] < 8):  # one warms up
                context = hidden = None
                began, method = now(forget=True), "hip" if backends is None else "dense"
                context = Context(model, T + job.room + 1, cfg, method, kernels)
                hidden = context.prefill(text)
                reads.append(now() - began)
            for i, _ in enumerate(generate(context, hidden, job.room + 1, set())):
                stamps += [time.perf_counter()] if i >= WARM and (i - WARM) % job.steps == 0 else []
                if len(stamps) > 1 and stamps[-1] - stamps[0] > 10:
                    break
        rounds = [b - a for a, b in zip(stamps, stamps[1:], strict=False)]
        speeds = T / statistics.median(reads[1:]), job.steps / statistics.median(rounds)
        row = {"tokens": T, "attention": name} | {
            "prefill tokens/s": speeds[0],
            "decoding tokens/s": speeds[1],
        }
        yield row | {"peak GB": torch.cuda.max_memory_allocated() / 1e9, "more": [reads, rounds]}


# --- the command -------------------------------------------------------------------------------------------

PARTS = {  # in the order of importance
    "checks": (checks, "test_hip.py natively; every kernel under compute-sanitizer, and a planted bug"),
    "prefill": (
        partial(attention, "prefill"),
        "attention alone, median GPU times of cold inputs, dense by torch's fastest backend; shares of the "
        "floors in the order of the times; launch: the host's time for search and sparse",
    ),
    "decoding": (
        partial(attention, "decoding"),
        "a step of attention alone as CUDA graphs, as in a serving loop (launch: without), with a selection "
        "to remember; else as prefill",
    ),
    "layer": (
        partial(offloaded, one_layer, "layer"),
        "decoding of one layer, 9/3 heads, D 64: keys and values on the device, in host memory, on disk",
    ),
    "whole": (partial(offloaded, whole_model, "whole"), "the same of the default model, less its weights"),
    "model": (end_to_end, "the default model end to end"),
}


def show(result: dict) -> None:
    print("\n" + ", ".join(f"{x}: {result[x]}" for x in ("device", "date", "torch", "triton", "seconds")))
    for part, rows in result["parts"].items():
        notes, rows = [x["note"] for x in rows if "note" in x], [x for x in rows if "note" not in x]
        table = f"\n\n{offload.rows_table(rows)}" * bool(rows)
        print(f"\n{part}:", "; ".join([PARTS[part][1], *notes]) + table)


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
    result = {
        "device": measuring.device_name(options.device),
        "date": str(datetime.date.today()),
        "torch": torch.__version__,
        "triton": getattr(sys.modules.get("triton"), "__version__", None),
        "command": sys.argv,
        "config": vars(HiPConfig()),
        "seconds": {},
        "parts": {},
    }
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
    sys.exit(measuring.command(main))
