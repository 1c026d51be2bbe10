"""Compile every kernel of hip_triton.py to machine code, without a GPU, and print what became of it.

    python extras/compile_report.py                                  # all: hundreds of compilations, a while
    python extras/compile_report.py --target sm_90 --dim 64 128 --dtype float16

Exit status 1 if a kernel with D <= 128 spills registers, or one needs more shared memory than its chip has;
the kernels with clipped positions (-rope) hold two turns of everything and may spill, which costs them less
than more warps would, as the search of an offloaded cache (search-bank) may in float32.
Registers and spills are read from the machine code by the cuobjdump inside Triton's wheel, for gfx942 from
its assembly.
Not with TRITON_INTERPRET=1: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hip_triton
from hip import HiPConfig

KIB = 1024
TARGETS = {  # name: target, shared memory of one program
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TRITON_NAME = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
KERNELS = ("search", "search-few", "attention", "split", "merge", "search-rope", "attention-rope",
           "split-rope", "search-bank", "attention-bank", "split-bank", "look_up", "append")
SLOTS = 1088  # of a search bank for 128k tokens
OPTIONS = ("num_warps", "num_stages")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MATRIX = re.compile(r"(?<![.\w])(HMMA|HGMMA|UTC\w*MMA)\b|\b(v_mfma)_")


class Row(NamedTuple):
    kernel: str
    D: int
    dtype: str
    target: str
    registers: int
    spills: int  # bytes of local memory that registers were spilled to
    shared: int  # bytes
    matrix: str

    def problem(self) -> str:
        """What is wrong with this kernel, or ''."""
        limit = TARGETS[self.target][1]
        large = "rope" in self.kernel or (self.kernel, self.dtype) == ("search-bank", "float32")
        if self.D <= 128 and self.spills and not large:
            return f"{self.kernel} D={self.D} {self.dtype} {self.target} spills {self.spills} bytes"
        if self.shared > limit:
            return f"{self.kernel} D={self.D} {self.dtype} {self.target}: shared {self.shared} > {limit}"
        return ""


def source(kernel: str, D: int, dtype: torch.dtype, cfg: HiPConfig, H: int = 9, Hkv: int = 3):
    """(ASTSource, options) of a kernel as hip_triton launches it on contiguous tensors.

    -rope: with clipped positions; -bank: from an offloaded cache; -few: with few programs; the last two
    with a single query.
    """
    kernel, _, kind = kernel.partition("-")
    cfg, M = replace(cfg, rope_clip=4096 if kind == "rope" else None), cfg.budget
    chosen, slots, few = H // Hkv * M, SLOTS if kind == "bank" else 0, kind in ("few", "bank")
    Tq = 1 if few else cfg.block_q
    constants = {
        "search": lambda: hip_triton.search_constants(cfg, H, Hkv, D, dtype, Tq, M, slots, few),
        "attention": lambda: hip_triton.attention_constants(cfg, H, Hkv, D, dtype, M),
        "split": lambda: hip_triton.split_constants(cfg, H, Hkv, D, dtype, M, 1),
        "merge": lambda: hip_triton.merge_constants(D, 8),
        "look_up": lambda: hip_triton.look_up_constants(cfg.block_k, 1, chosen, chosen + 20, chosen + 23, D),
        "append": lambda: hip_triton.append_constants(cfg.block_k, Hkv, D),
    }[kernel]()
    constants = dict(constants)
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    fn = getattr(hip_triton, f"{kernel}_kernel")
    plain = {"p_start": "*i64", "p_part": "*fp32", "p_stat": "*fp32"}
    plain |= {"p_blocks": "*i32", "p_previous": "*i32", "p_place": "*i32", "p_cos": "*fp32", "p_sin": "*fp32"}
    pointer = "*" + TRITON_NAME[dtype]
    tuples = {"place": ("*i32", "i32"), "bank": ("*i64",) * 4 + ("i32",) * 2 + (pointer,) * 2}
    if kernel != "search":
        tuples["bank"] += (pointer,) * 2  # values too
    if kernel in ("search", "attention", "split"):
        given = {"rope": ("p_cos", "p_sin"), "bank": ("place", "bank")}.get(kind, ())
        absent = {"p_cos", "p_sin", "place", "bank"}.intersection(fn.arg_names).difference(given)
        constants |= dict.fromkeys(absent)
    signature, attrs = {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("s_"):  # strides: the last is a constant 1, others divide by 16
            signature[name] = ("i32", "i32", "i32", "constexpr")
            constants[(i, 3)] = 1
            attrs |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
        elif name in tuples:
            signature[name] = tuples[name]
            attrs |= {(i, j): [["tt.divisibility", 16]] for j, x in enumerate(tuples[name]) if x[0] == "*"}
        elif name.startswith("p_"):
            signature[name] = plain.get(name, pointer)
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    return ASTSource(fn, signature, constants, attrs), options


def read_cuda(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes spilled and matrix instructions of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()

        def dump(option: str) -> str:
            return subprocess.run(
                [str(CUOBJDUMP), option, f.name], check=True, capture_output=True, text=True
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


def compile_all(
    targets: Iterable[str] = tuple(TARGETS),
    dims: Iterable[int] = hip_triton.HEAD_SIZES,
    dtypes: Iterable[str] = tuple(DTYPES),
    kernels: Iterable[str] = KERNELS,
    cfg: HiPConfig = HiPConfig(),  # noqa: B008
) -> Iterator[Row]:
    """One Row for each combination, as soon as it is compiled."""
    for kernel in kernels:
        for target in targets:
            for D in dims:
                for dtype in dtypes:
                    src, options = source(kernel, D, DTYPES[dtype], cfg)
                    compiled = triton.compile(src, target=TARGETS[target][0], options=options)
                    if target.startswith("sm_"):
                        registers, spills, matrix = read_cuda(compiled.asm["cubin"])
                    else:
                        registers, spills, matrix = read_amd(compiled.asm["amdgcn"])
                    yield Row(kernel, D, dtype, target, registers, spills, compiled.metadata.shared, matrix)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dim", nargs="+", type=int, choices=hip_triton.HEAD_SIZES,
                        default=list(hip_triton.HEAD_SIZES))  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    print("| kernel | D | dtype | target | registers | spills | shared memory | matrix instructions |")
    print("| --- " * 8 + "|")
    problems = []
    for row in compile_all(args.target, args.dim, args.dtype, args.kernel):
        print("| " + " | ".join(str(x) for x in row) + " |", flush=True)
        problems += filter(None, [row.problem()])
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
