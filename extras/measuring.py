"""What the commands here share: options, natural text, results kept through interruptions, tables."""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from pydoc_data.topics import topics  # CPython's own language reference: long natural text on any machine
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hip  # noqa: E402
from hip import HiPConfig  # noqa: E402
from model import Context, Llama, ModelConfig, Tokenizer  # noqa: E402


class Results:
    """Records by their settings, in a file of JSON lines; what stands there need not be measured again.

    Settings hold the machine, the versions and a hash of the code that runs, so no stale number is taken.
    """

    def __init__(self, folder: str, name: str, device: str, **common: object):
        self.path = Path(folder) / f"{name}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files = sorted({"hip.py", "model.py", f"{kernels_for(device).__name__}.py"})
        code = "".join(ast.dump(ast.parse((ROOT / file).read_text())) for file in files)  # without comments
        self.common = {"code": hashlib.sha256(code.encode()).hexdigest()[:12], "torch": torch.__version__,
                       "python": platform.python_version(), "threads": torch.get_num_threads(),
                       "device": device_name(device)} | common
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


def options_parser(doc: str) -> argparse.ArgumentParser:
    """The options that both commands have; a wrong one is a ValueError."""
    def refuse(message: str):  # argparse's own way prints the usage as well
        raise ValueError(f"{message} (--help lists all options)")

    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = refuse, parser.add_argument
    add("--tokens", type=int, nargs="+", metavar="N", help="lengths of the text")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of HiPConfig, for all")
    add("--dtype", choices=("float32", "bfloat16", "float16"))
    add("--device", default="cpu", help="on cuda HiP runs as hip_triton (%(default)s)")
    add("--out", default="results", metavar="DIR", help="folder of results and pictures (%(default)s)")
    add("--json", action="store_true", help="print the records, with every single number, instead of tables")
    return parser


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
        import hip_triton
    except ImportError as error:
        raise ValueError(str(error)) from error
    return hip_triton


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()


def natural_text(tokenizer: Tokenizer, tokens: int, skip: int = 0) -> list[int]:
    """Natural text on any machine, never repeated: Python's language reference, then its library."""
    ids = tokenizer.encode("\n".join(topics.values()))
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    while len(ids) < skip + tokens and sources:
        ids += tokenizer.encode("\n" + sources.pop(0).read_text(encoding="utf-8"))
    if len(ids) < skip + tokens:
        raise ValueError(f"the text has {len(ids) - skip} tokens, not {tokens}")
    return ids[skip : skip + tokens]


def random_model(dtype: torch.dtype, device: str, **changes: int) -> Llama:
    """Random weights in the shape of the default model, for times where it is not installed."""
    config = ModelConfig("llama", width=576, layers=30, heads=9, kv_heads=3, head_size=64, hidden=1536,
                         vocabulary=49152, context=8192, norm_eps=1e-5, rope_theta=1e5, rope_divisor=(),
                         tied=True)
    config, g, weights = replace(config, **changes), torch.Generator().manual_seed(0), {}
    for name, shape in config.shapes().items():
        x = torch.randn(shape, generator=g) * shape[-1] ** -0.5 if len(shape) > 1 else torch.ones(shape)
        weights[name] = x.to(device, dtype)
    return Llama(config, weights)


def stretched(model: Llama, tokens: int) -> Llama:
    """The model with NTK-scaled rotary frequencies where `tokens` are more than it was trained to read."""
    c = model.config
    factor = max(1.0, tokens / c.context) ** (c.head_size / (c.head_size - 2))
    return Llama(replace(c, rope_theta=c.rope_theta * factor), model.weights)


def watch(context: Context, see: Callable) -> None:
    """Call see(layer, q, k, v) behind every attention of the context."""
    attend = context.attend

    def seeing(layer, q, k, v, *more, **named):
        o = attend(layer, q, k, v, *more, **named)
        see(layer, q, k, v)
        return o

    context.attend = seeing


def table(head: list, rows: list[list]) -> str:
    """A Markdown table; None is a dash."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join("-" if c is None else str(c) for c in line) + " |" for line in lines)


def pyplot():
    """matplotlib's pyplot, without a display."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("pictures need matplotlib: `pip install matplotlib`") from error
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    return plt


def command(main: Callable[[], None]) -> int:
    """Run main: 0 done, 2 an input or a setting is wrong (one line says what), 130 interrupted."""
    name = Path(sys.argv[0]).name
    try:
        main()
        return 0
    except (ValueError, MemoryError, torch.OutOfMemoryError, OSError) as error:
        print(f"{name}:", " ".join(str(error).split()) or "out of memory", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
