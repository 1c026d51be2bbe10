"""Compile every kernel of hip_triton.py to machine code, without a GPU, and print what became of it.

    python extras/compile_report.py                                  # all: hundreds of compilations, a while
    python extras/compile_report.py --target sm_90 --dim 64 128 --dtype float16 --heads 32/8

Exit status 1 if a kernel with D <= 128 spills registers (but not in float32, which has no matrix units and is
there to compare with, nor clipped positions on sm_80, whose matrix units take all operands from registers),
or one needs more shared memory than its chip has.
Registers and spills are read from the machine code by the cuobjdump inside Triton's wheel, for gfx942 from
its assembly.
Not with TRITON_INTERPRET=1: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import argparse
import itertools
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
import triton.language as tl
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
KERNELS = (  # -step: of a single query, -rope: with clipped positions, -bank: from an offloaded cache
    "search", "search-rope", "search-step", "search-step-rope", "attention", "attention-rope",
    "split", "split-rope", "split-bank", "merge", "copy",
)  # fmt: skip
OPTIONS = ("num_warps", "num_stages")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
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
        limit, name = TARGETS[self.target][1], " ".join(str(x) for x in self[:5])
        old = self.target == "sm_80" and "rope" in self.kernel
        if self.D <= 128 and self.spills and self.dtype != "float32" and not old:
            return f"{name} spills {self.spills} bytes"
        return f"{name} shared {self.shared} > {limit}" if self.shared > limit else ""


def source(
    kernel: str, heads: tuple[int, int], D: int, dtype: torch.dtype, cfg: HiPConfig
) -> tuple[ASTSource, dict]:
    """(ASTSource, options) of a kernel as hip_triton launches it on contiguous tensors."""
    (kernel, *kinds), (H, Hkv), M = kernel.split("-"), heads, cfg.budget
    cfg = replace(cfg, rope_clip=4096 if "rope" in kinds else None)
    group = (cfg, H // Hkv, 1, D, dtype)
    constants = {
        "search": lambda: hip_triton.search_constants(*group, 1 if "step" in kinds else cfg.block_q),
        "attention": lambda: hip_triton.attention_constants(*group, M),
        "split": lambda: hip_triton.split_constants(*group, M, 1),
        "merge": lambda: dict(D=D, PARTS=11),
        "copy": lambda: dict(KEYS=cfg.block_k, STRIDE=1, D=D),
    }[kernel]()
    options = {name: constants[name] for name in OPTIONS if name in constants}
    fn = getattr(hip_triton, f"{kernel}_kernel")
    constants = {name: x for name, x in constants.items() if name not in OPTIONS}
    if "OFFSET" in fn.arg_names:
        constants["OFFSET"] = tl.int32
    typed = dict.fromkeys(("p_start", "p_page", "p_slot"), "*i64")
    typed |= dict.fromkeys(("p_blocks", "p_previous"), "*i32")
    typed |= dict.fromkeys(("p_part", "p_stat"), "*fp32") | dict(scale="fp32")
    # strides: of those the last is a constant 1
    typed |= dict.fromkeys(("s_q", "s_k", "s_v"), ("i32", "i32", "i32", "constexpr"))
    typed |= {"table": ("*fp32", "*fp32")} if "rope" in kinds else {}
    typed |= {"paged": ("*i64", "i32")} if "bank" in kinds else {}
    signature, attrs = {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in ("table", "paged") and name not in typed:
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
    heads: Iterable[str] = (),
    cfg: HiPConfig = HiPConfig(),  # noqa: B008
) -> Iterator[Row]:
    """One Row for each combination, as soon as it is compiled."""
    for kernel, target, D, dtype in itertools.product(kernels, targets, dims, dtypes):
        for group in heads or ["9/3" if D <= 64 else "32/8"]:
            H, Hkv = map(int, group.split("/"))
            src, options = source(kernel, (H, Hkv), D, DTYPES[dtype], cfg)
            compiled = triton.compile(src, target=TARGETS[target][0], options=options)
            if target.startswith("sm_"):
                registers, spills, matrix = read_cuda(compiled.asm["cubin"])
            else:
                registers, spills, matrix = read_amd(compiled.asm["amdgcn"])
            yield Row(kernel, group, D, dtype, target, registers, spills, compiled.metadata.shared, matrix)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    dims = hip_triton.HEAD_SIZES
    parser.add_argument("--dim", nargs="+", type=int, choices=dims, default=list(dims))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    more = (
        "query heads/key heads; default: those of a small model, 9/3, and above D = 64 of a large one, 32/8"
    )
    parser.add_argument("--heads", nargs="+", default=[], help=more)
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    print(
        "| kernel | heads | D | dtype | target | registers | spills | shared memory | matrix instructions |"
    )
    print("| --- " * 9 + "|")
    problems = []
    for row in compile_all(args.target, args.dim, args.dtype, args.kernel, args.heads):
        print("| " + " | ".join(str(x) for x in row) + " |", flush=True)
        problems += filter(None, [row.problem()])
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
