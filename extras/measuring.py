"""What the commands here share: options, natural text, time and its floors, results that stay, tables."""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import importlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import cache, partial
from inspect import getdoc
from pathlib import Path
from pydoc_data.topics import topics  # CPython's own language reference: long natural text on any machine
from types import ModuleType

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hip  # noqa: E402
from hip import HiPConfig  # noqa: E402
from model import Context, Llama, ModelConfig, Tokenizer  # noqa: E402

# --- options, tables, results ------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Says what is wrong in a ValueError of one line, and prints descriptions as they are."""

    def __init__(self, **more: object):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(**dict(allow_abbrev=False, formatter_class=raw) | more)

    def error(self, message: str):  # argparse's own way prints the usage as well
        raise ValueError(f"{message.removeprefix('argument ')} (--help lists all options)")


def subcommands(parser: Parser, runs: dict[str, Callable]) -> dict[str, argparse.ArgumentParser]:
    """A parser for each name; what its function does is what its --help says."""
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    lines = {name: run.__doc__.split("\n")[0] for name, run in runs.items()}
    return {x: commands.add_parser(x, help=lines[x], description=getdoc(run)) for x, run in runs.items()}


def positive(text: str) -> int:
    """The type of an option that is a number of things."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def common_options(parser: argparse.ArgumentParser) -> None:
    """The options that `evaluate.py` and `speed.py` share."""
    add = parser.add_argument
    add("--tokens", type=positive, nargs="+", metavar="N", help="lengths of the text")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of HiPConfig, for all")
    add("--dtype", choices=("float32", "bfloat16", "float16"))
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="on cuda HiP runs as hip_triton (%(default)s)",
    )
    add("--out", default="results", metavar="DIR", help="folder of results (%(default)s)")
    add("--json", action="store_true", help="print the records, with every single number, instead of tables")


def configure(base: HiPConfig, items: list[str]) -> HiPConfig:
    """The config with the fields that "name=value" items change."""
    known, changes = [f.name for f in fields(HiPConfig)], {}
    for item in items:
        name, equals, value = item.partition("=")
        if name not in known or not equals:
            raise ValueError(f"a setting must be FIELD=VALUE, FIELD one of {', '.join(known)}, not {item!r}")
        try:
            changes[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[name] = value
    return replace(base, **changes)


def kernels_for(device: str) -> ModuleType:
    """hip_triton on a GPU, hip elsewhere."""
    if not device.startswith("cuda"):
        return hip
    if not torch.cuda.is_available():
        raise ValueError(f"the device {device} cannot be used: torch finds no GPU here")
    try:
        return importlib.import_module("hip_triton")
    except ImportError as error:
        raise ValueError(str(error)) from error


def other_version(folder: str, device: str) -> tuple[ModuleType, HiPConfig]:
    """`kernels_for` of another folder, a git worktree of an earlier commit, say; and its default config."""
    names = ("hip", "hip_triton")
    if missing := [name for name in names if not (Path(folder) / f"{name}.py").is_file()]:
        raise ValueError(
            f"--against must be a folder with hip.py and hip_triton.py; {folder} has no {missing[0]}.py"
        )
    ours = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(Path(folder).resolve()))
    try:
        config = importlib.import_module("hip").HiPConfig()
        return kernels_for(device) if device.startswith("cuda") else sys.modules["hip"], config
    finally:
        del sys.path[0]
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(ours)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()


def code_hash(folder: str | Path, *names: str) -> str:
    """Of what the files do, whatever their comments."""
    code = "".join(
        ast.dump(ast.parse((Path(folder) / f"{name}.py").read_text())) for name in sorted({*names})
    )
    return hashlib.sha256(code.encode()).hexdigest()[:12]


class Results:
    """Records by their settings, in a file of JSON lines; what stands there need not be measured again.

    Settings hold the machine, the versions and a hash of the code that runs, so no stale number is taken.
    """

    def __init__(self, folder: str, name: str, device: str, **common: object):
        self.path = Path(folder) / f"{name}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.common = common | {
            "code": code_hash(ROOT, "hip", "model", kernels_for(device).__name__),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "device": device_name(device),
        }
        self.known, old = {}, self.path.read_text() if self.path.exists() else ""
        for line in old.splitlines():
            try:
                record = json.loads(line)
                self.known[self.key(record["settings"])] = record
            except (ValueError, KeyError, TypeError):  # cut off by an interruption
                continue
        if old and not old.endswith("\n"):
            self.write("\n")

    @staticmethod
    def key(settings: dict) -> str:
        return json.dumps(settings, sort_keys=True)

    def get(self, **settings: object) -> dict | None:
        """What is known of these settings: the record, or None."""
        return self.known.get(self.key(self.common | settings))

    def put(self, outcome: dict, **settings: object) -> dict:
        """Keep an outcome, under these settings, and return the record of both."""
        now = datetime.datetime.now().isoformat(timespec="seconds")
        # through JSON, so that a record just made looks like one that was read
        record = json.loads(json.dumps({"settings": self.common | settings, "at": now} | outcome))
        self.known[self.key(record["settings"])] = record
        self.write(json.dumps(record) + "\n")
        return record

    def write(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(text)


def table(head: list, rows: list[list]) -> str:
    """A Markdown table; None is a dash."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join("-" if c is None else str(c) for c in line) + " |" for line in lines)


def records_table(rows: list[dict]) -> str:
    """A Markdown table of rows by column, without the columns that are empty."""
    head = list(dict.fromkeys(name for row in rows for name in row))
    head = [name for name in head if any(row.get(name) is not None for row in rows)]
    return table(head, [[row.get(name) for name in head] for row in rows])


def pyplot():
    """matplotlib's pyplot, without a display."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("pictures need matplotlib: `pip install matplotlib`") from error
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    return plt


def command(main: Callable[[], int | None]) -> int:
    """Run main: 0 done, 2 an input or a setting is wrong (one line says what), 130 interrupted."""
    name = Path(sys.argv[0]).name
    try:
        return main() or 0
    except (ValueError, MemoryError, torch.OutOfMemoryError, OSError) as error:
        print(f"{name}:", " ".join(str(error).split()) or "out of memory", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130


# --- models and texts --------------------------------------------------------------------------------------


def natural_text(tokenizer: Tokenizer, tokens: int, skip: int = 0) -> list[int]:
    """Natural text on any machine, never repeated: Python's language reference, then its library."""
    ids = tokenizer.encode("\n".join(topics.values()))
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    while len(ids) < skip + tokens and sources:
        ids += tokenizer.encode("\n" + sources.pop(0).read_text(encoding="utf-8"))
    if len(ids) < skip + tokens:
        raise ValueError(f"the text has {len(ids) - skip} tokens, not {tokens}")
    return ids[skip : skip + tokens]


SHAPES = {  # of models: SmolLM2-135M, the default one, and Llama 3 8B
    "135m": dict(width=576, layers=30, heads=9, kv_heads=3, hidden=1536, vocabulary=49152)
    | dict(head_size=64, context=8192, tied=True),
    "8b": dict(width=4096, layers=32, heads=32, kv_heads=8, hidden=14336, vocabulary=128256)
    | dict(head_size=128, context=131072, tied=False),
}


def random_model(shape: str, dtype: torch.dtype, device: str) -> Llama:
    """Random weights in the shape of a model, for times where it is not installed."""
    config = ModelConfig("llama", norm_eps=1e-5, rope_theta=5e5, rope_divisor=(), **SHAPES[shape])
    g, weights = torch.Generator(device).manual_seed(0), {}
    for name, shape in config.shapes().items():
        x = torch.randn(shape, generator=g, device=device, dtype=dtype) if len(shape) > 1 else None
        weights[name] = torch.ones(shape, device=device, dtype=dtype) if x is None else x * shape[-1] ** -0.5
    return Llama(config, weights)


def stretched(model: Llama, tokens: int) -> Llama:
    """The model with NTK-scaled rotary frequencies where `tokens` are more than it was trained to read."""
    c = model.config
    factor = max(1.0, tokens / c.context) ** (c.head_size / (c.head_size - 2))
    return Llama(replace(c, rope_theta=c.rope_theta * factor), model.weights)


class OutOfTime(Exception):
    """Reading a text takes longer than it may."""


def read(context: Context, tokens: torch.Tensor, seconds: float = math.inf, what: str = "") -> torch.Tensor:
    """Read a prompt (1, T) with a progress bar: hidden states (1, T, C).  OutOfTime after so many seconds."""
    layers, T, started = context.model.config.layers, tokens.shape[1], time.monotonic()
    with tqdm(total=T, unit="token", desc=what, leave=False) as bar:

        def progress(layer: int, count: int) -> None:
            bar.update((layer * T + count) // layers - bar.n)
            if time.monotonic() - started > seconds:
                raise OutOfTime

        return context.prefill(tokens, progress=progress)


def watch(context: Context, see: Callable) -> None:
    """Call see(layer, q, k, v) behind every attention of the context."""
    attend, context.end = context.attend, None  # a step that was recorded would call nothing

    def seeing(layer, q, k, v, *more, **named):
        o = attend(layer, q, k, v, *more, **named)
        see(layer, q, k, v)
        return o

    context.attend = seeing


class ScoreTable:
    """Block scores (searches, blocks), so that `hip.search` can be watched over them."""

    def __init__(self, scores: torch.Tensor):
        # round by round, the blocks (searches, branches) that were looked at
        self.scores, self.asked = scores.float(), list[torch.Tensor]()

    def score(self, blocks: torch.Tensor) -> torch.Tensor:
        self.asked.append(blocks)
        return self.scores.gather(1, blocks.clamp(0, self.scores.shape[1] - 1))  # no block: any score

    def search(self, M: int, representative: str = "center") -> torch.Tensor:
        """The blocks (searches, M), ascending, that a search with M nodes chooses."""
        cfg = HiPConfig(top_k=M, block_k=1, stride_k=1, sink=0, representative=representative)
        searches, blocks = self.scores.shape
        return hip.search(torch.full((searches,), blocks), self.score, cfg)[0]


# --- time --------------------------------------------------------------------------------------------------


@cache
def gibibyte(device: str) -> torch.Tensor:
    return torch.empty(2**30, dtype=torch.int8, device=device)


def seconds_of(run: Callable, device: str) -> float:
    """Of one run.  On a GPU a GiB is written twice before it: no input is in a cache then, and the host has
    launched the whole run by the time it begins.
    """
    if device.startswith("cuda"):
        gibibyte(device).zero_().zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def now(forget: bool = False) -> float:
    """The time at which the device has done its work.  forget: its peak memory so far."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        if forget:
            torch.cuda.reset_peak_memory_stats()
    return time.perf_counter()


def graphed(run: Callable) -> Callable:
    """run as a CUDA graph: a serving loop does not pay Python for every launch."""
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return lambda run=run: graph.replay()  # run keeps alive the tensors that the graph reads


def dense_ways(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable]:
    """Dense causal attention by each of torch's backends that can do this here; the fastest is what counts.

    A single query also as the rows of one product of the query heads that share keys, without any copy.
    """
    rows = q[:, :, 0].unflatten(1, (k.shape[1], -1)) if q.shape[2] == 1 else None
    backends = ("CUDNN", "FLASH", "EFFICIENT") if q.is_cuda else ("",)
    causal, shared, ways = q.shape[2] == k.shape[2] > 1, q.shape[1] != k.shape[1], {}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str, gqa: bool) -> torch.Tensor:
        with sdpa_kernel(getattr(SDPBackend, f"{backend}_ATTENTION")) if backend else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

    for backend in backends:
        for x, kind, gqa in (
            (q, "", shared),
            *([(rows, "rows", False)] if rows is not None and shared else []),
        ):
            try:  # whether there is such a way shows at the first tokens as well
                attend(x[:, :, :64], k[:, :, :64], v[:, :, :64], backend, gqa)
                ways[f"{backend.lower()} {kind}".strip()] = partial(attend, x, k, v, backend, gqa)
            except RuntimeError:
                continue
    return ways


def ceilings(device: str, dtype: torch.dtype) -> dict[str, tuple[Callable, int]]:
    """A matrix product and a copy, and their operations and bytes."""
    n, length = (8192, 2**30) if device.startswith("cuda") else (2048, 2**27)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(length // dtype.itemsize, device=device, dtype=dtype)
    y = torch.empty_like(x)
    return {"product": (lambda: a @ b, 2 * n**3), "copy": (lambda: y.copy_(x), 2 * length)}


def floor(need: tuple[float, float], reached: dict[str, float]) -> float:
    """Least seconds for so many operations and bytes on a machine that reaches these ceilings."""
    return max(need[0] / reached["product"], need[1] / reached["copy"])


def needed(B: int, Tq: int, Tk: int, heads: tuple[int, int, int], cfg: HiPConfig, size: int) -> dict:
    """Operations, and bytes of memory, that dense attention, search and sparse attention cannot avoid.

    heads: D, H, Hkv; size: bytes of a number.  A pair of query and key costs 2 D operations for q . k, and
    2 D more where it is attended to.  Dense: all causal pairs; reads q, k, v and writes o, once.  Search:
    rows that take part times keys of looked-at blocks, and of sink and window by "mass"; reads both, writes
    the selection.  Sparse: pairs of sink, selection and window; reads q, and keys and values there, writes o.
    Keys count for every query block and search anew, of sink and window for every key head; but never more
    than all once, as in prefill.  A search of a single query scores what it remembers as well.
    """
    (D, H, Hkv), bk, M = heads, cfg.block_k, cfg.budget
    S, (lo, hi) = H if cfg.per_head else Hkv, hip.domain(Tq, Tk, cfg)
    start, n = torch.arange(Tk - Tq, Tk, cfg.block_q), hi - lo  # (NQ,) both
    rows = (Tk - start).clamp(max=cfg.block_q)
    taking = -(-rows // cfg.stride_q) * (n > 0)
    near = start + (rows + 1) / 2 - n * bk  # sink and window of a row, on average
    rounds = torch.tensor([cfg.rounds(x) for x in n.tolist()])
    known = M if cfg.representative == "center" else 0  # scores of the last round
    looked = n.where(n <= 2 * M, 2 * M * rounds - known) + (M if Tq == 1 else 0)
    looked = looked * (bk // cfg.stride_k) * (n > 0)
    chosen, apart = n.clamp(max=M) * bk, near * (n > 0) * (cfg.score == "mass")
    queries, keys, token = B * H * Tq * D * size, B * Hkv * Tk * D * size, B * D * size
    searched = min(keys, token * float((S * looked + Hkv * apart).sum()))
    attended = min(keys, token * float((S * chosen + Hkv * near).sum()))
    pairs, operations = Tq * Tk - Tq * (Tq - 1) // 2, 2 * B * H * D
    searched += queries * float(taking.sum()) / Tq + 4 * B * S * len(n) * M
    return {
        "dense": (2 * operations * pairs, 2 * queries + 2 * keys),
        "search": (operations * float((taking * (looked + apart)).sum()), searched),
        "sparse": (2 * operations * float((rows * (chosen + near)).sum()), 2 * queries + 2 * attended),
    }
