"""Prove the kernels: compiled for real chips without a GPU, run on a GPU, and tests that catch planted bugs.

    python extras/prove.py compile            # every kernel's registers, spills, shared memory: a while
    python extras/prove.py compile --target sm_90 --dim 64 128 --dtype float16 --heads 32/8
    python extras/prove.py gpu                # on a GPU: all tests, and every kernel under compute-sanitizer
    python extras/prove.py mutants            # bugs, planted one at a time, and the test that catches each
    python extras/prove.py mutants causal     # those with "causal" in their names

Prints Markdown tables, row by row.  Exit status 1: something is not as it should be.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from measuring import ROOT, Parser, command, kernels_for, positive, subcommands

from hip import HiPConfig
from model import rope_frequencies

# --- the kernels compiled ----------------------------------------------------------------------------------

KIB = 1024
TARGETS = {  # name: arguments of Triton's GPUTarget, shared memory of one program
    "sm_80": ("cuda", 80, 32, 163 * KIB),
    "sm_90": ("cuda", 90, 32, 227 * KIB),
    "sm_100": ("cuda", 100, 32, 227 * KIB),
    "gfx942": ("hip", "gfx942", 64, 64 * KIB),
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TRITON_NAME = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
KERNELS = (  # -rope: positions are clipped, or turned by fill; -step: of decoding, from a cache
    # that is `Begun`; -bank: from an offloaded cache
    "search", "search-rope", "search-step", "search-step-rope", "attention", "attention-rope",
    "split", "split-rope", "split-bank", "split-step", "merge", "norm", "gated", "fill", "fill-rope",
    "fill-step-rope", "find", "find-step", "copy",
)  # fmt: skip
OPTIONS = ("num_warps", "num_stages")
MATRIX = re.compile(r"(?<![.\w])(HMMA|HGMMA|UTC\w*MMA)\b|\b(v_mfma)_")


class Row(NamedTuple):
    kernel: str
    heads: str
    D: int
    dtype: str
    target: str
    registers: int
    spills: int  # bytes of local memory that registers were spilled to
    shared: int  # bytes
    matrix: str

    def problem(self) -> str:
        """What is wrong with this kernel, or ''."""
        limit, name = TARGETS[self.target][3], " ".join(str(x) for x in self[:5])
        old = self.target == "sm_80" and "rope" in self.kernel
        if self.D <= 128 and self.spills and self.dtype != "float32" and not old:
            return f"{name} spills {self.spills} bytes"
        return f"{name} shared {self.shared} > {limit}" if self.shared > limit else ""


def source(
    kernel: str, heads: tuple[int, int], D: int, dtype: torch.dtype, cfg: HiPConfig
) -> tuple[object, dict]:
    """(ASTSource, options) of a kernel as hip_triton launches it on contiguous tensors."""
    import triton.language as tl
    from triton.compiler import ASTSource

    import hip_triton

    (kernel, *kinds), (H, Hkv), M = kernel.split("-"), heads, cfg.budget
    cfg = replace(cfg.decoding if "step" in kinds else cfg, rope_clip=4096 if "rope" in kinds else None)
    group = (cfg, H // Hkv, 1, D, dtype)
    constants = {
        "search": lambda: hip_triton.search_constants(*group, cfg.block_q),
        "attention": lambda: hip_triton.attention_constants(*group, M),
        "split": lambda: hip_triton.split_constants(*group, M, 1),
        "merge": lambda: dict(D=D, PARTS=11),
        "norm": lambda: dict(C=H * D),
        "gated": lambda: dict(SIZE=1024),
        "find": lambda: dict(BLOCK_K=cfg.block_k, LO=cfg.sink_blocks, N=256, SLOTS=256, num_warps=8),
        "copy": lambda: dict(KEYS=cfg.block_k, STRIDE=1, D=D),
        "fill": lambda: dict(H=H, HKV=Hkv, D=D, ROWS=32),
    }[kernel]()
    options = {name: constants[name] for name in OPTIONS if name in constants}
    fn = getattr(hip_triton, f"{kernel}_kernel")
    constants = {name: x for name, x in constants.items() if name not in OPTIONS}
    if "OFFSET" in fn.arg_names:
        constants["OFFSET"] = tl.int32
    tables = ("p_slot_of", "p_page_of", "p_last_use", "p_call", "p_counted")
    typed = dict.fromkeys(("p_start", *tables), "*i64")
    typed |= dict.fromkeys(("p_blocks", "p_previous", "p_page", "p_slot"), "*i32")
    typed |= dict.fromkeys(("p_part", "p_stat"), "*fp32") | dict(scale="fp32", eps="fp32")
    # strides: of those the last is a constant 1
    typed |= dict.fromkeys(("s_h", "s_q", "s_k", "s_v", "s_o"), ("i32", "i32", "i32", "constexpr"))
    typed |= dict.fromkeys(("s_x", "s_more", "s_n"), ("i32", "i32", "constexpr"))
    typed |= {"table": ("*fp32", "*fp32")} if "rope" in kinds else {}
    typed |= {"paged": ("*i64", "i32")} if "bank" in kinds else {}
    typed |= {"p_length": "*i64"} if "step" in kinds else {}
    signature, attrs = {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in ("table", "paged", "p_length") and name not in typed:
            constants[name] = None
        plain = "*" + TRITON_NAME[dtype] if name.startswith("p_") else "i32"
        kind = signature[name] = "constexpr" if name in constants else typed.get(name, plain)
        for j, part in enumerate(kind) if isinstance(kind, tuple) else ():
            if part == "constexpr":
                constants[(i, j)] = 1
            elif part[0] == "*" or name.startswith("s_"):
                attrs[(i, j)] = [["tt.divisibility", 16]]
        if kind[0] == "*":
            attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn, signature, constants, attrs), options


def read_cuda(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes spilled and matrix instructions of a cubin."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()

        def dump(option: str) -> str:
            return subprocess.run(
                [str(cuobjdump), option, f.name], check=True, capture_output=True, text=True
            ).stdout

        usage, code = dump("--dump-resource-usage"), dump("--dump-sass")
    numbers = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    found = {a or b for a, b in MATRIX.findall(code)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"], " ".join(sorted(found))


def read_amd(assembly: str) -> tuple[int, int, str]:
    """Vector registers, bytes of private memory and matrix instructions of a kernel's assembly."""

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])

    found = {a or b for a, b in MATRIX.findall(assembly)}
    return number("vgpr_count"), number("private_segment_fixed_size"), " ".join(sorted(found))


def compiled(options: argparse.Namespace) -> Iterator[Row]:
    """One Row for each combination, as soon as it is compiled."""
    import triton
    from triton.backends.compiler import GPUTarget

    todo = itertools.product(options.kernel, options.target, options.dim, options.dtype)
    for kernel, target, D, dtype in todo:
        for group in options.heads or ["9/3" if D <= 64 else "32/8"]:
            H, Hkv = map(int, group.split("/"))
            what, how = source(kernel, (H, Hkv), D, DTYPES[dtype], HiPConfig())
            done = triton.compile(what, target=GPUTarget(*TARGETS[target][:3]), options=how)
            read, kind = (read_cuda, "cubin") if target.startswith("sm_") else (read_amd, "amdgcn")
            registers, spills, matrix = read(done.asm[kind])
            yield Row(kernel, group, D, dtype, target, registers, spills, done.metadata.shared, matrix)


def prove_compile(options: argparse.Namespace) -> int:
    """Compile every kernel of hip_triton.py to machine code, without a GPU, and show what became of it.

    Wrong is a kernel with D <= 128 that spills registers (but not in float32, which has no matrix units and
    is there to compare with, nor with clipped positions on sm_80, whose matrix units take all operands from
    registers), and one that needs more shared memory than its chip has.  Registers and spills are read from
    the machine code by the cuobjdump inside Triton's wheel, for gfx942 from its assembly.
    """
    try:
        import triton

        import hip_triton
    except ImportError as error:
        raise ValueError(str(error)) from error
    if triton.knobs.runtime.interpret:
        raise ValueError("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    options.dim = options.dim or hip_triton.HEAD_SIZES
    if wrong := [D for D in options.dim if D not in hip_triton.HEAD_SIZES]:
        sizes = ", ".join(map(str, hip_triton.HEAD_SIZES))
        raise ValueError(f"--dim must be of {sizes}, not {wrong[0]}")
    if wrong := [x for x in options.heads if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", x)]:
        raise ValueError(f"--heads must be query heads/key heads, such as 32/8, not {wrong[0]!r}")
    head(*"kernel,heads,D,dtype,target,registers,spills,shared memory,matrix instructions".split(","))
    problems = []
    for row in compiled(options):
        line(*row)
        problems += filter(None, [row.problem()])
    print(*problems, sep="\n", end="\n" * bool(problems), file=sys.stderr)
    return int(bool(problems))


# --- on a GPU ----------------------------------------------------------------------------------------------

ODD = HiPConfig(top_k=32, block_q=16, block_k=8, stride_q=2, stride_k=2, sink=5, window=33)
CASES = {  # of the memory check
    "odd": (80, 5, 1, ODD),
    "odd, clipped": (80, 5, 1, replace(ODD, rope_clip=41)),
    "odd, the paper's": (80, 4, 2, replace(ODD, score="max", per_head=True)),
    "clipped": (64, 9, 3, HiPConfig(rope_clip=4096)),
    "D 64": (64, 9, 3, HiPConfig()),
    "D 128": (128, 32, 8, HiPConfig()),
}


def prove_gpu(options: argparse.Namespace) -> int:
    """Run test_hip.py on a GPU, and every kernel under compute-sanitizer.

    The tests run in several processes and the memory checks beside them, of which one has a bug that must be
    found.  The output of what fails follows the table.
    """
    kernels_for("cuda")
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    listed = subprocess.run(
        [*pytest, "--collect-only", "-q", "test_hip.py"], cwd=ROOT, text=True, capture_output=True
    )
    # dealt out one by one, first those that compile kernels: they take longest
    tests = sorted(re.findall(r"^test_hip\.py::.*", listed.stdout, re.M), key=lambda x: "triton" not in x)
    hands, pytest = min(12, os.cpu_count() or 1), [*pytest, "-v", "-rfEs", "--tb=short"]
    memcheck = "compute-sanitizer --tool memcheck --padding 4096 --report-api-errors no --launch-timeout 0"
    memcheck = [*memcheck.split(), sys.executable, __file__, "case"]  # torch takes long to start
    jobs = {f"tests {i + 1}": pytest + tests[i::hands] for i in range(hands)}
    jobs |= {f"memcheck, {x}": [*memcheck, x] for x in (*CASES, "planted")}

    def run(name: str) -> subprocess.CompletedProcess:
        env = dict(os.environ, PYTHONUNBUFFERED="1", OMP_NUM_THREADS="2")
        if "memcheck" in name:  # without torch's own cache of memory it knows where each tensor ends
            env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        limit = ["timeout", "--signal=KILL", str(options.seconds)]  # all that the job started
        out = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return subprocess.run(limit + jobs[name], cwd=ROOT, env=env, text=True, errors="replace", **out)

    total, launched, wrong = Counter(), set(), []
    head("what", "result")
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
            wrong += [] if ok else [f"{name}:\n{done.stdout[-6000:]}"]
            line(name, last[:900])
    missing = {*re.findall(r"^def (\w+_kernel)\(", (ROOT / "hip_triton.py").read_text(), re.M)} - launched
    line("all tests", ", ".join(f"{n} {x}" for x, n in total.items()))
    line("kernels not checked", ", ".join(missing) or "none")
    print(*wrong, sep="\n\n", end="\n" * bool(wrong), file=sys.stderr)
    return int(bool(wrong or missing))


def memory_case(options: argparse.Namespace) -> None:
    """Launch every kernel at awkward shapes: one of the memory checks of `gpu`.

    compute-sanitizer must find nothing; in "planted" it must.
    """
    import triton
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    import hip_triton as kernels

    @triton.jit
    def planted_kernel(p_x):
        tl.store(p_x + tl.program_id(0), 0.0)

    kernels_for("cuda")
    name = options.case
    if name == "planted":  # more programs than there are numbers: they write past the end
        planted_kernel[(2000,)](torch.ones(1000, device="cuda"))
        return torch.cuda.synchronize()
    (D, H, Hkv, cfg), launched, launch = CASES[name], set(), JITFunction.__getitem__
    JITFunction.__getitem__ = lambda self, grid: launched.add(self.fn.__name__) or launch(self, grid)
    dtypes = (torch.bfloat16, torch.float32) if "odd" in name else (torch.bfloat16,)
    for Tq, dtype in itertools.product((1, 33, 200), dtypes):
        T, rope, chosen = 2999 if name != "clipped" else 4999, None, None
        q, k, v = (torch.randn(2, h, t, D).to("cuda", dtype) for h, t in ((H, Tq), (Hkv, T), (Hkv, T)))
        if cfg.rope_clip:
            angle = torch.arange(cfg.rope_clip + cfg.block_q)[:, None] * rope_frequencies(1e5, D)
            rope = angle.cos().cuda(), angle.sin().cuda()
        for _ in range(2):  # afresh, then remembering
            chosen = kernels.select_blocks(q, k, cfg, chosen, rope=rope)
        o = kernels.sparse_attention(q, k, v, chosen, cfg, rope=rope)
        assert o.isfinite().all(), (Tq, dtype)
        if rope is None and dtype == torch.bfloat16 and Tq == 1:
            cache = kernels.OffloadedKVCache((1, 2, Hkv, T, D), H, cfg, dtype, "cuda")
            cache.append(0, k, v)
            for _ in range(2):  # all pages missing, then there
                kernels.select_blocks(q, cache.layer(0), cfg, chosen)
                paged = kernels.sparse_attention(q, cache.layer(0), cache.layer(0), chosen, cfg)
            assert torch.equal(paged, o), Tq
        h = torch.randn(2, Tq, H + 2 * Hkv, D).to("cuda", dtype).transpose(1, 2)
        turn = torch.rand(2, Tq, D // 2, device="cuda").unbind()
        kernels.fill(h, turn, q, k[:, :, -Tq:], v[:, :, -Tq:])
        x = torch.randn(2, Tq + 5, H * D, device="cuda", dtype=dtype)[:, :Tq]
        kernels.gated(kernels.norm(torch.ones(H * D, device="cuda", dtype=dtype), 1e-6, x, x.contiguous()))
        if Tq == 1:
            length = torch.tensor([T], device="cuda")
            kernels.fill(h, None, q, *(begun := [kernels.Begun(x, length) for x in (k, v)]))
            chosen = kernels.select_blocks(q, begun[0], cfg, chosen, rope=rope)
            assert kernels.sparse_attention(q, *begun, chosen, cfg, rope=rope).isfinite().all()
    torch.cuda.synchronize()
    print("launched:", *launched)


# --- bugs planted ------------------------------------------------------------------------------------------

SKIP = shutil.ignore_patterns(".*", "__pycache__", "*.gguf", "*.safetensors")
FAILED = re.compile(r"^(?:FAILED|ERROR) \S*?::(\S+)", re.MULTILINE)
CRASHED = re.compile(r"test_hip\.py\", line \d+ in (test_\w+)")

TESTS = {  # file: which tests are to catch its bugs; the compiler would find none of them
    "hip.py": "not hip_triton and not compile",
    "hip_triton.py": "(hip_triton or kernel or on_the_device or norms) and not compiles",
}


def killer(tree: Path, file: str) -> str:
    """The first test of this file that fails in this tree, or ''."""
    interpreted = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    env = {**os.environ, **interpreted, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*"-m pytest -x -q -p no:cacheprovider test_hip.py -k".split(), TESTS[file]]
    run = subprocess.run([sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True)
    if run.returncode == 0:
        return ""
    if run.returncode < 0:  # read or wrote where no memory is; Python then says in which test
        found = CRASHED.search(run.stderr)  # it may come later, when memory is freed
        return f"{found[1] if found else 'a test'} (crash)"
    failed = FAILED.search(run.stdout)
    if run.returncode != 1 or failed is None:
        raise RuntimeError(f"the tests could not run:\n{run.stdout[-3000:]}{run.stderr[-1000:]}")
    return failed[1]


def fate(mutant: tuple[str, str, str, str]) -> str:
    """The test that kills this mutant, or '', in a copy of the tree of its own; equal texts are no bug."""
    file, name, text, other = mutant
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=SKIP)
        code = (tree / file).read_text()
        if code.count(text) != 1 and text != other:
            raise RuntimeError(f"not exactly once in {file}: {name}")
        (tree / file).write_text(code.replace(text, other))
        return killer(tree, file)


def prove_mutants(options: argparse.Namespace) -> int:
    """Plant bugs, one at a time, and show which test of test_hip.py catches each.

    Each bug goes into a temporary copy of the tree, where the tests of the file that has it run, those of
    kernels in Triton's interpreter.  Wrong is a bug that survives, one whose text no longer stands exactly
    once in its file, and a test that fails without any bug.
    """
    chosen = [m for m in MUTANTS if all(word in m[1] for word in options.words)]
    if not chosen:
        raise ValueError(f"no bug has a name with {' and '.join(options.words)}")
    head("mutation", "killed by")
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        sound = [pool.submit(fate, (file, "", "", "")) for file in {m[0]: 0 for m in chosen}]
        for mutant, test in zip(chosen, pool.map(fate, chosen), strict=True):
            survivors += not test
            line(f"{mutant[0]}: {mutant[1]}", test or "**nothing**")
        if failed := ", ".join(filter(None, (x.result() for x in sound))):
            print(f"without any bug, {failed} fails: the table says nothing", file=sys.stderr)
    return int(bool(survivors or failed))


# --- the command -------------------------------------------------------------------------------------------


def head(*names: str) -> None:
    line(*names)
    line(*["---"] * len(names))


def line(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> int:
    parser = Parser(description=__doc__)
    runs = dict(compile=prove_compile, gpu=prove_gpu, case=memory_case, mutants=prove_mutants)
    commands = subcommands(parser, runs)
    add = commands["compile"].add_argument
    add("--target", nargs="+", choices=TARGETS, default=[*TARGETS], metavar="T", help=", ".join(TARGETS))
    add("--dim", nargs="+", type=positive, metavar="D", help="head sizes (all)")
    add("--dtype", nargs="+", choices=DTYPES, default=[*DTYPES], metavar="T", help=", ".join(DTYPES))
    add("--kernel", nargs="+", choices=KERNELS, default=[*KERNELS], metavar="K", help=", ".join(KERNELS))
    heads = "query heads/key heads (those of a small model, 9/3, and above D = 64 of a large one, 32/8)"
    add("--heads", nargs="+", default=[], metavar="H/HKV", help=heads)
    add = commands["gpu"].add_argument
    add("--seconds", type=positive, default=240, help="a process that takes longer is ended (%(default)s)")
    commands["case"].add_argument("case", choices=[*CASES, "planted"])
    add = commands["mutants"].add_argument
    add("words", nargs="*", metavar="WORD", help="only bugs whose names have all of these words")
    add("--jobs", type=positive, default=1, metavar="N", help="how many at a time (%(default)s)")
    options = parser.parse_args()
    return runs[options.what](options) or 0


# --- the bugs ----------------------------------------------------------------------------------------------

MUTANTS = [  # file, name, text that stands once in it, text in its place
    *(("hip_triton.py", *mutant) for mutant in [
    # the model
    ("a token is written one place too late", "first += tl.load(p_length) - 1", "first += tl.load(p_length)"),
    ("values are rotated", "tl.where(i_x < H + HKV, o_t + 1, 0)", "o_t + 1"),
    ("rotation by the position before",
     "tl.where(i_x < H + HKV, o_t + 1, 0)", "tl.where(i_x < H + HKV, o_t, 0)"),
    ("keys stand where values belong", "elif i_x < H + HKV:", "elif i_x >= H + HKV:"),
    ("the search does not ask how many tokens there are",
     "    Tk = tokens_of(p_length, Tk)\n    start", "    start"),
    ("the sum is not kept", "        tl.store(p_x, b_x, mask=m)\n", ""),
    ("the norm of what was there before",
     "tl.store(p_x, b_x, mask=m)\n    b_x", "tl.store(p_x, b_x, mask=m)\n        b_x -= b_more\n    b_x"),
    ("the padding counts in a mean", "tl.sum(b_x * b_x, 0) / C", "tl.sum(b_x * b_x, 0) / o_c.shape[0]"),
    ("a norm without its least", "/ C + eps)", "/ C)"),
    ("rows of a norm lie close", "p_x += i_b * s_x[0]", "p_x += i_b * tl.num_programs(0) * s_x[1]"),
    ("gates and values change places", "b_gate / (1 + tl.exp(-b_gate)) * b_up", "b_up / (1 + tl.exp(-b_up)) * b_gate"),  # noqa: E501
    ("gates do not count themselves",
     "b_gate / (1 + tl.exp(-b_gate)) * b_up", "b_up / (1 + tl.exp(-b_gate))"),
    # the search
    ("ties go to the higher position", "(b_xb < b_b[None, :])", "(b_xb > b_b[None, :])"),
    ("lower scores are better", "m = (b_xa > b_a[None, :])", "m = (b_xa < b_a[None, :])"),
    ("a block that is there again keeps its place",
     "b_new = tl.where(m_real, b_new, -INF)", "b_new = b_new + 0.0"),
    ("an overflowed block scores like an empty branch",
     "tl.where(b_new > LOWEST, b_new, LOWEST)", "b_new"),
    ("query rows past Tq take part in the search",
     "m_r, o_own = (o_r < GROUP * PER) & (o_row < Tq)", "m_r, o_own = (o_r < GROUP * PER)"),
    ("heads of the next group take part in the search",
     "m_r, o_own = (o_r < GROUP * PER) & (o_row < Tq)", "m_r, o_own = o_row < Tq"),
    ("all heads of a group search for the first",
     "(o_r // PER).to(tl.int64) * s_q[1]", "(o_r * 0).to(tl.int64) * s_q[1]"),
    ("the search of a group begins with another's head",
     "b_q = load_rows(head(p_q, s_q, i_b, i_s * GROUP), s_q[3], o_row,",
     "b_q = load_rows(head(p_q, s_q, i_b, i_s), s_q[3], o_row,"),
    ("stride_q ignored", "o_in = o_r % PER * STRIDE_Q", "o_in = o_r % PER"),
    ("stride_k ignored", "tl.arange(0, KEYS) * STRIDE_K", "tl.arange(0, KEYS)"),
    ("keys of a tile block by block, but read as if key by key",
     "o_in[:, None] + b_s[None, :] * BLOCK_K", "o_in[None, :] + b_s[:, None] * BLOCK_K"),
    ("one round too few", "tl.maximum(rounds, 1)", "tl.maximum(rounds - 1, 1)"),
    ("a program without rows reads before the keys",
     "tl.max(tl.where(m_r, o_own, 0), 0) + 1", "tl.max(tl.where(m_r, o_own, -1), 0) + 1"),
    ("scores of the round before last are taken for known", "(r == rounds - 1)", "(r >= rounds - 2)"),
    ("the block beside the center speaks",
     "b_block = (b_cf + b_cl) // 2", "b_block = (b_cf + b_cl - 1) // 2"),
    ("domain ends one block late",
     "tl.maximum((start - WINDOW + 1) // BLOCK_K, LO)", "tl.maximum((start - WINDOW) // BLOCK_K + 1, LO)"),
    ("all windows begin where the last one does", "tl.store(p_start + i_n,", "tl.store(p_start,"),
    ("blocks are not in order",
     "tl.where(b_f < b_l, b_f, NO_BLOCK - o_m))  # asc", "NO_BLOCK - o_m)  # asc"),
    ("searches do not share key heads", "i_s // SHARED), s_t", "i_s), s_t"),
    ("head stride dropped", "+ i_h.to(tl.int64) * s[1]", ""),
    ("batch stride dropped", "+ i_b.to(tl.int64) * s[0]", ""),
    # the score "mass"
    ("mass: what a row sees anyway does not count",
     "b_s -= b_seen[:, None]", "b_s -= tl.where(b_seen == INF, INF, 0.0)[:, None]"),
    ("mass: the loudest row counts alone",
     "tl.log2(tl.sum(tl.exp2(b_s - b_top[None, :]), 0))", "0.0"),
    ("rows that are none take part in the search", "b_seen = tl.where(m_r, b_seen, INF)", "b_seen = b_seen + 0.0"),  # noqa: E501
    ("mass: rows see later tokens of the window",
     "m_t[None, :] & (o_t[None, :] <= o_own[:, None])", "m_t[None, :] & (o_t[None, :] < end)"),
    ("mass: no row sees the sink", "tl.where(x + o_x < LO * BLOCK_K, 0, n * BLOCK_K)", "n * BLOCK_K"),
    ("mass: the window's last tile is not seen",
     "range(0, end - n * BLOCK_K, TILE)", "range(0, end - n * BLOCK_K - TILE, TILE)"),
    ("mass: natural powers with a scale for powers of two",
     '(math.log(2) if cfg.score == "mass" else 1)', "1"),
    # previous blocks
    ("previous blocks taken from outside the domain", "(b_old >= LO) & (b_old < hi)", "b_old >= 0"),
    ("previous blocks not removed when found again",
     "m_real &= before(b_order, o_c) ==", "m_real &= before(b_order, o_c) >="),
    ("of previous blocks only the first M", "tl.cdiv(W, M), 0)", "tl.minimum(tl.cdiv(W, M), 1), 0)"),
    ("previous selection of another query block", "p_previous + i_g * W", "p_previous + (i_g - i_n) * W"),
    # clipped positions
    ("clip: keys far away are turned back", "tl.maximum(o_t - origin, 0)", "tl.abs(o_t - origin)"),
    ("clip: the search counts from the query block", "table, start - CLIP", "table, start"),
    ("clip: attention counts from the query block", "table, begin - CLIP", "table, begin"),
    ("clip: decoding counts from the query block", "table, Tk - Tq - CLIP", "table, Tk - Tq"),
    ("clip: searching rows are turned as if stride_q were 1",
     "m_r, table, o_in + CLIP, D)\n    s_t", "m_r, table, o_r % PER + CLIP, D)\n    s_t"),
    ("clip: all rows of a query block are turned as the first",
     "m_r, table, o_in + CLIP, D)\n    b_acc", "m_r, table, o_in * 0 + CLIP, D)\n    b_acc"),
    ("clip: all decoded rows are turned as the first", "table, o_row + CLIP", "table, o_row * 0 + CLIP"),
    ("clip: half of a head is left out",
     'b_s = tl.dot(b_q[1], tl.trans(b_k[1]), b_s, input_precision="ieee")', "b_s += 0.0"),
    ("clip: turned the other way", "b_y * b_cos + b_x * b_sin", "b_y * b_cos - b_x * b_sin"),
    ("clip: position 1 is not turned", "m &= (o_at > 0)[:, None]", "m &= (o_at > 1)[:, None]"),
    # attention
    ("no causal mask", "o_x[None, :] <= o_last[:, None]", "(o_x < last)[None, :]"),
    ("causal mask off by one", "o_x[None, :] <= o_last[:, None]", "o_x[None, :] < o_last[:, None]"),
    ("later keys and values are loaded", "o_x - count, o_x < last", "o_x - count, o_x < last + TILE"),
    ("padding of a selection counts as block 0",
     "tl.sum((b_block >= 0).to(tl.int32), 0) * BLOCK_K", "M * BLOCK_K"),
    ("wrong tokens of a block", "+ o_x % BLOCK_K, end - 1)", "+ o_x % BLOCK_K // 2, end - 1)"),
    ("no mask in a tile that the chosen blocks do not fill",
     "whole, one = count // TILE * TILE", "whole, one = tl.cdiv(count, TILE) * TILE"),
    ("a sink longer than the text", "tl.minimum(SINK, end)", "SINK"),
    ("rows in the sink see all of it", "o_own < sink, o_own,", "o_own < 0, o_own,"),
    ("window starts one block late",
     "start, end = tl.load(p_start + i_n).to(tl.int32)",
     "start, end = tl.load(p_start + i_n).to(tl.int32) + BLOCK_K"),
    ("all windows start as the first", "tl.load(p_start + i_n)", "tl.load(p_start)"),
    ("decoding: window starts one block late",
     "start = tl.load(p_start).to(tl.int32)", "start = tl.load(p_start).to(tl.int32) + BLOCK_K"),
    ("blocks of another query block",
     "(tl.num_programs(0) // PARTS) + i_n) * M", "(tl.num_programs(0) // PARTS)) * M"),
    ("stale accumulator", "b_acc * b_old[:, None], input_precision", "b_acc, input_precision"),
    ("stale sum", "b_l * b_old + tl.sum(b_p, 1)", "b_l + tl.sum(b_p, 1)"),
    ("softmax of natural powers with a scale for powers of two",
     "/ math.log(2)  # for", "* 1.0  # for"),
    ("rows past Tq are attended for and stored",
     "m_r, o_own = (o_h < GROUP) & (o_row < Tq)", "m_r, o_own = (o_h < GROUP)"),
    ("heads of the next group are attended for and stored",
     "m_r, o_own = (o_h < GROUP) & (o_row < Tq)", "m_r, o_own = (o_row < Tq)"),
    ("all heads of a group are stored as the first",
     "o_o = o_h.to(tl.int64) * s_o[1] + o_row", "o_o = o_row"),
    ("a query block has rows of the next", "tl.program_id(0) % PARTS * ROWS", "tl.program_id(0) * ROWS"),
    ("decoding: a group begins with another's head",
     "b_q = load_rows(head(p_q, s_q, i_b, i_s * GROUP), s_q[3], o_q, m_r, table, o_row",
     "b_q = load_rows(head(p_q, s_q, i_b, i_s), s_q[3], o_q, m_r, table, o_row"),
    ("decoding: a share of the tokens is left out",
     "tl.minimum((i_p + 1) * share, last)", "tl.minimum((i_p + 1) * share, last - TILE)"),
    ("decoding: all shares in one place", "* tl.num_programs(0) + i_p", "* tl.num_programs(0)"),
    ("decoding: parts are added up without rescaling",
     "b_w = tl.exp2(b_m - tl.max(b_m, 0))", "b_w = tl.where(m_s, 1.0, 0.0)"),
    # the offloaded cache
    ("cache: slots of the first head", "paged[0] + i_x.to(tl.int64) * paged[1]", "paged[0]"),
    ("cache: a page that has a token more stays as it was",
     "m_new |= m_x & (b_page == last)", "m_new |= m_x & (b_page > last)"),
    ("cache: pages before the window come in", "(last - o_w >= first)", "(last >= first)"),
    ("cache: the window lacks its first page", "(last - o_w >= first)", "(last - o_w > first)"),
    ("cache: the sink does not come in", "tl.where(o_w < 0, o_x - count, b_window)", "b_window"),
    ("cache: a page comes in twice",
     "m_x &= before(b_order, o_x) == before(b_order, tl.zeros_like(o_x))", "m_x &= o_x >= 0"),
    ("cache: pages that were there are not marked as used",
     "tl.store(p_last_use + b_slot, call, mask=m_x & (b_slot < slots))", "call += 0"),
    ("cache: pages that came in are not marked as used",
     "        tl.store(p_last_use + b_slot, call, mask=m_new)\n", ""),
    ("cache: the latest used is given up", "tl.sort((b_use + 1) * SLOTS + o_s)", "tl.sort((call - b_use) * SLOTS + o_s)"),  # noqa: E501
    ("cache: all take one slot", "tl.gather(o_least, o_nth, 0)", "tl.gather(o_least, o_nth * 0, 0)"),
    ("cache: a page that is gone stays in the page table",
     "        tl.store(p_slot_of + b_gone, slots, mask=m_new)  # never a page that is wanted now\n", ""),
    ("cache: slots do not know their pages",
     "        tl.store(p_page_of + b_slot, b_page, mask=m_new)\n", ""),
    ("cache: pages that were there are missed",
     "tl.atomic_add(p_counted + 1, tl.sum(m_new.to(tl.int64), 0))",
     "tl.atomic_add(p_counted + 1, tl.sum(m_x.to(tl.int64), 0))"),
    ("cache: pages of the first head come in", "(i_h * pages + page)", "page"),
    ("cache: pages come in to the first head", "(i_h * slots + slot)", "slot"),
    ("cache: values do not come in",
     "grid = *page.shape[::-1], len(self.rows)", "grid = *page.shape[::-1], 1"),
    ]),
    *(("hip.py", *mutant) for mutant in [
    ("a number that is a bool passes",
     "whole, wanted = type(x) is int and", "whole, wanted = isinstance(x, int) and"),
    ("strides need not divide their blocks",
     'check("stride_q", self.block_q % self.stride_q == 0,', 'check("stride_q", True,'),
    ("sink of a begun block is rounded down",
     "return -(-self.sink // self.block_k)", "return self.sink // self.block_k"),
    ("a selection of any number of searches passes", "or got[1] not in S", ""),
    ("domain ends one block late",
     "((start - cfg.window + 1) // cfg.block_k).clamp(min=lo)",
     "((start - cfg.window + 1) // cfg.block_k + 1).clamp(min=lo)"),
    ("window is one token short",
     "((start - cfg.window + 1) // cfg.block_k).clamp(min=lo)",
     "((start - cfg.window + 2) // cfg.block_k).clamp(min=lo)"),
    ("a domain may end before it begins", ".clamp(min=lo)", ".clamp(min=0)"),
    ("nodes rounded up",
     "bounds = lo + n * torch.arange(M + 1, device=n.device) // M",
     "bounds = lo - (-n * torch.arange(M + 1, device=n.device) // M)"),
    ("one round too few",
     "return max(1, (-(-n // self.budget) - 1).bit_length())",
     "return max(1, (-(-n // self.budget) - 1).bit_length() - 1)"),
    ("halves: the left one is the larger", "mid = (f + l) // 2  #", "mid = (f + l + 1) // 2  #"),
    ("center of a branch rounded up", '"center": (f + l) // 2,', '"center": (f + l + 1) // 2,'),
    ("last block of a branch is the next one's first", '"last": l - 1}', '"last": l}'),
    ("first block of a branch is its second", '"first": f,', '"first": (f + 1).minimum(l - 1),'),
    ("an empty branch is scored",
     "scores = scores.masked_fill(block == NO_BLOCK, -math.inf)", "scores = scores"),
    ("scores of the round before last are taken for known",
     "r == rounds - 1 and cfg", "r >= rounds - 2 and cfg"),
    ("known scores are those of the left halves",
     "torch.stack([score(block[..., ::2]), scores], -1)",
     "torch.stack([scores, score(block[..., 1::2])], -1)"),
    ("known scores though the first block spoke",
     'and cfg.representative == "center":', 'and cfg.representative != "last":'),
    ("an empty node is a block", "return f.where(f < l, NO_BLOCK), scores", "return f, scores"),
    ("mass is not compared with what is seen anyway",
     "x.scale - seen[:, :, :, None]", "x.scale - (seen[:, :, :, None] == math.inf) * 1e38"),
    ("mass: the loudest row decides", 's.logsumexp(4) if cfg.score == "mass" else s.amax(4)', "s.amax(4)"),
    ("mass: all keys of a block count", "s = s.amax(4) * x.scale", "s = s.logsumexp(4) * x.scale"),
    ("mass where the largest product is asked for",
     's.logsumexp(4) if cfg.score == "mass" else', "s.logsumexp(4) if True else"),
    ("an overflowed block scores like an empty branch",
     "return s.where(s > LOWEST, LOWEST)", "return s.nan_to_num(-math.inf, math.inf, -math.inf)"),
    ("scale dropped in the scores", "s = s.amax(4) * x.scale", "s = s.amax(4)"),
    ("seen without the causal mask",
     "s.masked_fill_(later(x, blocks, cfg, s.dtype) < 0, -math.inf).logsumexp(4)", "s.logsumexp(4)"),
    ("seen without scale",
     "s = x.q * x.scale @ b_k.transpose(3, 4)", "s = x.q @ b_k.transpose(3, 4)"),
    ("seen begins a block late",
     "blocks = sink_and_window(x, cfg)", "blocks = sink_and_window(x._replace(hi=x.hi + 1), cfg)"),
    ("rows that do not exist take part",
     "return seen.masked_fill(x.first[:, None] + x.row >= keys.shape[2], math.inf)", "return seen"),
    ("the last row does not take part",
     "x.first[:, None] + x.row >= keys.shape[2],", "x.first[:, None] + x.row >= keys.shape[2] - 1,"),
    ("query blocks of a run without a domain end the run",
     "if (n := int(x.hi.max()) - lo) == 0:", "if (n := int(x.hi.min()) - lo) == 0:"),
    ("of equals the later is better", "order -= torch.arange", "order += torch.arange"),
    ("negative scores order backwards", "torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)", "bits"),
    ("minus zero is less than zero", "bits = (scores + 0.0).view", "bits = scores.view"),
    ("scores compared in half their digits", ".long() << 32", ".long() >> 12 << 44"),
    ("a block that is there twice counts twice",
     "again = F.pad(blocks[..., 1:] == blocks[..., :-1], (1, 0)) | (blocks == NO_BLOCK)",
     "again = blocks == NO_BLOCK"),
    ("scores stay where they were when blocks are sorted",
     "keep = best(scores.gather(-1, order).masked_fill(again", "keep = best(scores.masked_fill(again"),
    ("the selection is not ascending",
     "gather(-1, keep).sort().values\n", "gather(-1, keep).sort(descending=True).values\n"),
    ("padding leaves as a number", "return blocks.masked_fill(blocks == NO_BLOCK, -1)", "return blocks"),
    ("previous blocks of the sink stay",
     "(lo <= old) & (old < x.hi[..., None])", "(0 <= old) & (old < x.hi[..., None])"),
    ("previous blocks of the window stay",
     "(lo <= old) & (old < x.hi[..., None])", "(lo <= old) & (old <= x.hi[..., None])"),
    ("previous blocks are forgotten",
     "blocks = torch.cat([blocks, old], 3)",
     "blocks = torch.cat([blocks, torch.full_like(old, NO_BLOCK)], 3)"),
    ("previous selection of the first query blocks",
     "old = previous.blocks[:, :, i].long()", "old = previous.blocks[:, :, : i.stop - i.start].long()"),
    ("previous: texts and searches change places",
     "old = previous.blocks[:, :, i].long()",
     "old = previous.blocks[:, :, i].long().transpose(0, 1).reshape(B, S, -1, previous.blocks.shape[3])"),
    ("previous: only the first 2 M are scored, again and again",
     "*(score(part) for part in old.split(2 * M, 3))",
     "*(score(old[..., : part.shape[3]]) for part in old.split(2 * M, 3))"),
    ("causal mask off by one", "[:, None] > x.row\n", "[:, None] >= x.row\n"),
    ("no causal mask", "[:, None] > x.row\n", "[:, None] > NO_BLOCK + x.row\n"),
    ("the last row sees what is later than all", ".clamp(0, cfg.block_q)\n", ".clamp(0, cfg.block_q - 1)\n"),
    ("padding of a selection is seen",
     "chosen.where(chosen >= 0, NO_BLOCK)", "chosen.clamp(min=0)"),
    ("one mask for query blocks that are not alike",
     "one if (behind == one).all() else behind", "one"),
    ("a column that is padding for one is dropped for all",
     "(chosen >= 0).flatten(0, 2).any(0)", "(chosen >= 0).flatten(0, 2).all(0)"),
    ("attention without scale", "mask, scale=x.scale)", "mask, scale=D**-0.5)"),
    ("the window begins at its middle",
     "torch.cat([sink.expand(*x.hi.shape, -1), x.hi[..., None] + window], 3)",
     "torch.cat([sink.expand(*x.hi.shape, -1), (x.hi[..., None] + x.last[:, None]) // 2 + window], 3)"),
    ("the window ends with the first row", "last = (first + row[-1])", "last = (first + row[0])"),
    ("the sink is one block short",
     "sink = torch.arange(min(cfg.sink_blocks, int(x.last.max()) + 1)",
     "sink = torch.arange(min(max(0, cfg.sink_blocks - 1), int(x.last.max()) + 1)"),
    ("query blocks of a result change places",
     "o.view(B, S, -1, H // S, rows, D).transpose(2, 3)",
     "o.view(B, S, -1, H // S, rows, D).flip(2).transpose(2, 3)"),
    ("rows of a group in the order of rows",
     "b_q.transpose(2, 3).flatten(3, 4)", "b_q.transpose(2, 3).transpose(3, 4).flatten(3, 4)"),
    ("positions of rows of a group repeated one by one", "row.repeat(group)", "row.repeat_interleave(group)"),
    ("positions count from the first query", "first + Tk - Tq  #", "first  #"),
    ("searches of a key head spread instead of side by side",
     "tokens.unflatten(1, (self.shape[1], -1))  #",
     "tokens.unflatten(1, (-1, self.shape[1])).transpose(1, 2)  #"),
    ("heads of a group spread instead of side by side",
     "for i, x in query_blocks(q.unflatten(1, (S, -1)), keys, start",
     "for i, x in query_blocks(q.unflatten(1, (-1, S)).transpose(1, 2), keys, start"),
    ("stride_q is ignored", "keys, hi, cfg, scale, cfg.stride_q)", "keys, hi, cfg, scale)"),
    ("a search per head looks for its group",
     "S, (lo, hi) = H if cfg.per_head else keys.shape[1],", "S, (lo, hi) = keys.shape[1],"),
    ("runs are no powers of two", "n = 1 << max(1, n).bit_length() - 1", "n = max(1, n - 1)"),
    ("stride_k: tokens of a block without their stride",
     "inside = torch.arange(0, cfg.block_k, stride, device=blocks.device)",
     "inside = torch.arange(cfg.block_k // stride, device=blocks.device)"),
    ("thin rows: first keys of a block",
     "self.inside = torch.arange(0, block, stride, device=tensors[0].device)",
     "self.inside = torch.arange(block // stride, device=tensors[0].device)"),
    ("thin copy: the second keys",
     "self.tensors[0][:, :, ::stride]", "self.tensors[0][:, :, stride // 2 :: stride]"),
    ("thin copy in half precision",
     "self.tensors[0][:, :, ::stride].float()", "self.tensors[0][:, :, ::stride].half().float()"),
    ("thin copy forgets positions", "self.block // stride, self.rope)", "self.block // stride)"),
    ("a table that is not contiguous is taken as if",
     "x.stride(3) != 1 or x.stride(2) != D or", "x.stride(3) != 1 or"),
    ("texts lie as close as heads",
     "first = (b[:, None] * text + h * head)", "first = (b[:, None] * H * head + h * head)"),
    ("rows behind the text are read",
     ".clamp(0, self.shape[2] - 1)", ".clamp(0, len(self.tables[0][1]) - 1)"),
    ("rows are not rotated within their block",
     "y[cfg.rope_clip + row] for y", "y[cfg.rope_clip + 0 * row] for y"),
    ("rows begin one position late", "y[cfg.rope_clip + row] for y", "y[cfg.rope_clip - 1 + row] for y"),
    ("keys count from the last row",
     "cfg, stride) - x.first[:, None]", "cfg, stride) - (x.first + x.row[-1])[:, None]"),
    ("keys are clipped one position late",
     "rotated(b_k, at + cfg.rope_clip, keys.rope)", "rotated(b_k, at + cfg.rope_clip - 1, keys.rope)"),
    ("far for one query block is far for all",
     "(at > 0).flatten(0, -2).any(0)", "(at > 0).flatten(0, -2).all(0)"),
    ("positions are clamped to 1",
     "at[..., c:].clamp(0, len(y) - 1)", "at[..., c:].clamp(1, len(y) - 1)"),
    ("rotation backwards",
     "addcmul_(b, sin, value=-1)\n    out[..., 1, :].addcmul_(a, sin)",
     "addcmul_(b, sin)\n    out[..., 1, :].addcmul_(a, sin, value=-1)"),
    ("the oracle misses the first blocks",
     "every = torch.arange(-(-k.shape[2] // cfg.block_k),", "every = torch.arange(4, 4 - -k.shape[2] // cfg.block_k,"),  # noqa: E501
    ("the oracle sees every second block",
     "every = torch.arange(-(-k.shape[2] // cfg.block_k),", "every = torch.arange(0, -(-k.shape[2] // cfg.block_k), 2,"),  # noqa: E501
    ("random blocks: the later are likelier",
     "Selection(best_of(every, scores, M).int()",
     "Selection(best_of(every, scores + torch.arange(every.shape[3]) * 0.02, M).int()"),
    ("random blocks in the default dtype",
     "generator=generator, dtype=torch.float32, device=q.device)", "generator=generator, device=q.device)"),
    ("dense: without the scale",
     "F.scaled_dot_product_attention(rows, k, v, scale=scale)", "F.scaled_dot_product_attention(rows, k, v)"),
    ("dense: queries stand at the front", "(Tk - Tq, 0)", "(0, Tk - Tq)"),
    ("dense: a query sees the next", "triu_(1)", "triu_(2)"),
    ("autocast reaches the scores",
     "with torch.no_grad(), torch.autocast(q.device.type, enabled=False):", "with torch.no_grad():"),
    ("autocast reaches attention",
     "with torch.autocast(q.device.type, enabled=False):\n        for", "if True:\n        for"),
    ("the search has gradients",
     "with torch.no_grad(), torch.autocast(q.device.type, enabled=False):",
     "with torch.autocast(q.device.type, enabled=False):"),
    ("counts: known scores are counted",
     "((2 * rounds - known) * cfg.budget + old)", "(2 * rounds * cfg.budget + old)"),
    ("counts: previous is not counted",
     "((2 * rounds - known) * cfg.budget + old)", "((2 * rounds - known) * cfg.budget)"),
    ("counts: previous blocks that nobody needs are counted",
     "old = previous if n > 2 * cfg.budget else 0", "old = previous"),
    ("previous blocks are forgotten one round too long",
     "and n > 2 * M:", "and n > 4 * M:"),
    ("a step is gathered without room for the next",
     "last=(x.first + cfg.refresh_interval)", "last=x.first"),
    ("what a step attends to lies in another order than its positions",
     "tokens_of(seen, cfg)[:, :, 0], *(y", "tokens_of(seen, cfg)[:, :, 0].flip(2), *(y"),
    ("counts: what is seen anyway is not counted",
     'if cfg.score == "mass" else 0\n            total', 'if cfg.score == "sum" else 0\n            total'),
    ("counts: padding is not counted",
     "chosen = int((blocks[:, :, i] >= 0).flatten(0, 2).any(0).sum())",
     "chosen = int((blocks[:, :, i] >= 0).flatten(0, 2).all(0).sum())"),
    ("cache: rows move, and the page table does not",
     "self.slot_of.scatter_(1, self.page_of, place)", "place = place"),
    ("cache: rows of a head go to another",
     "every = self.through(order).flatten()", "every = self.through(order.flip(0)).flatten()"),
    ("cache: a page that is written anew is still there as it was",
     "bank.forget(page + 1, -(-end // self.block))", "pass"),
    ("cache: a page that has just begun is not written where it is near",
     "rows[heads, bank.slot_of[:, page], first : first + new.shape[1]] = new",
     "rows[heads, bank.slot_of[:, page], first : first + new.shape[1] * bool(first)] = new[:, : len(new[0]) * bool(first)]"),  # noqa: E501
    ("cache: a page of this call is given up",
     "self.last_use.scatter_(1, slot, self.call.expand_as(slot))\n        self.counted", "self.counted"),
    ("cache: the most recently used page is given up", "largest=False).indices", "largest=True).indices"),
    ("cache: a page that came in is not marked as used",
     "self.last_use.scatter_(1, slot, self.call.expand_as(slot))\n        self.fetch", "self.fetch"),
    ("cache: a page that is gone stays in the page table",
     "self.slot_of.scatter_(1, self.page_of.gather(1, slot), self.slots)", "pass"),
    ("cache: slots do not know their pages", "self.page_of.scatter_(1, slot, page)", "pass"),
    ("cache: a page that is wanted twice comes in twice",
     "page[:, 1:].masked_fill_(page[:, 1:] == page[:, :-1].clone(), self.pages)  # each once", ""),
    ("cache: hits are counted with misses",
     "torch.stack([(slot < self.slots).sum(), new.sum()])",
     "torch.stack([(page < self.pages).sum(), new.sum()])"),
    ("cache: pages of the first head",
     "self.store[:, far_head, far_page, :: self.stride]",
     "self.store[:, 0 * far_head, far_page, :: self.stride]"),
    ("cache: the search gets first keys",
     "self.store[:, far_head, far_page, :: self.stride]", "self.store[:, far_head, far_page, : self.keys]"),
    ("cache: a begun page is not overwritten",
     "first : first + new.shape[1]] = new", "first : first + new.shape[1] * (not first)] = new[:, : len(new[0]) * (not first)]"),  # noqa: E501
    ("cache: a begun page is overwritten from its start",
     "first : first + new.shape[1]] = new", ": new.shape[1]] = new"),
    ("cache: values are stored as keys",
     "zip(self.store[layer], bank.rows, (k, v), strict=True)",
     "zip(self.store[layer], bank.rows, (k, k), strict=True)"),
    ("cache: a layer has the pages of layer 0",
     "return Pages(self.store[layer]", "return Pages(self.store[0]"),
    ("cache: more tokens than it holds", "if end > self.shape[3]:", "if end > self.shape[3] + 1:"),
    ("cache: the least is a page too low", "if self.bound < least:", "if self.bound < least - keys:"),
    ("cache: attention has a page less than a step needs",
     "window = -(-(cfg.window + rows) // block) + 2", "window = -(-(cfg.window + rows) // block) - 1"),
    ("cache: bound grows with the text", "round * cfg.rounds(pages)", "round * (pages // 256)"),
    ("early layers choose as late ones do", "top_k=self.top_k * more, early", "top_k=self.top_k, early"),
    ("decoding searches by one query", "rows = min(self.block_q, self.refresh_interval) if", "rows = 1 if"),
    ("of the latest queries only some search", "block_q=block_q, stride_q=1,", "block_q=block_q,"),
    ("decoding looks at no more keys", "max(1, self.stride_k // 2)", "self.stride_k"),
    ("late layers choose as early ones do", "if 2 * layer < layers else 1", "if layer < layers else 1"),
    ("the layer in the middle is early", "if 2 * layer < layers else 1", "if 2 * layer <= layers else 1"),
    ("cache: begun page in place of what is no block",
     "page = blocks.where(blocks * block < self.shape[2], 0)",
     "page = blocks.clamp(0, (self.shape[2] - 1) // block)"),
    ("cache: slots of the first head",
     "return slot + torch.arange(heads, device=slot.device)[:, None] * slots", "return slot + 0 * slots"),
    ("cache: bytes of keys are moved alone", "self.moved += k.nbytes + v.nbytes", "self.moved += k.nbytes"),
    ("cache: reading gives room that is empty",
     "self.store[layer][:, :, :, : self.length[layer]].to(", "self.store[layer].to("),
    ("cache: the file has a name",
     "tempfile.TemporaryFile(dir=folder)", "tempfile.NamedTemporaryFile(dir=folder, delete=False)"),
    ("cache: a prompt is served",
     "if not one or (cfg.block_k, cfg.stride_k) != (block, stride):",
     "if (cfg.block_k, cfg.stride_k) != (block, stride):"),
    ("cache: the search of other keys than it holds",
     "if not one or (cfg.block_k, cfg.stride_k) != (block, stride):", "if not one or cfg.block_k != block:"),
    ]),
]  # fmt: skip


if __name__ == "__main__":
    sys.exit(command(main))
