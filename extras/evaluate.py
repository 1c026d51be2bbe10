"""Measure what HiP costs in quality on the real model: perplexity of a natural text, and the passkey task.

    python extras/evaluate.py perplexity --tokens 8192
    python extras/evaluate.py passkey --tokens 4000 8000

Each prints a Markdown table; any field of HiPConfig can be set (`--set stride_q=2 beam=1`).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics  # CPython's own language reference: long natural text on any machine

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from generate import make_passkey  # noqa: E402
from hip import HiPConfig  # noqa: E402
from model import METHODS, Context, Llama, Tokenizer, generate, load  # noqa: E402

TEXT_START = 20_000  # tokens of the text that are skipped
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def perplexity(model: Llama, tokens: list[int], cfg: HiPConfig, method: str = "hip") -> float:
    """exp of the mean loss per token when the text is read as one prompt."""
    text, loss, start = torch.tensor([tokens], device=model.device), 0.0, 0
    for hidden in Context(model, len(tokens), cfg, method).prefill(text):
        targets = text[0, start + 1 : start + 1 + hidden.shape[1]]
        start += hidden.shape[1]
        for h, t in zip(hidden[0, : len(targets)].split(1024), targets.split(1024), strict=True):
            loss += float(F.cross_entropy(model.logits(h), t, reduction="sum"))
    return float(torch.tensor(loss / (len(tokens) - 1)).exp())


def find_passkey(
    model: Llama, tokenizer: Tokenizer, tokens: int, depth: float, cfg: HiPConfig, method: str
) -> bool:
    """Whether the model, reading and answering by `method`, names the five digits."""
    text, key = make_passkey(tokenizer, tokens, depth, seed=round(100 * depth) + tokens)
    prompt = tokenizer.encode(text)
    context = Context(model, len(prompt) + 12, cfg, method)
    *_, hidden = context.prefill(torch.tensor([prompt], device=model.device))
    return key in tokenizer.fast.decode(list(generate(context, hidden, 12, tokenizer.eos)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("perplexity", "passkey"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--set", metavar="FIELD=N", nargs="*", default=[], help="fields of HiPConfig")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    cfg = HiPConfig(**{name: int(value) for name, value in (item.split("=") for item in options.set)})
    model, tokenizer = load(dtype=getattr(torch, options.dtype or "", None))
    text = tokenizer.encode("\n".join(topics.values()))[TEXT_START:]
    rows, bar = (
        [],
        tqdm(total=len(options.tokens) * len(options.methods) * (1 if options.task == "perplexity" else 5)),
    )
    for tokens in options.tokens:
        for method in options.methods:
            started = time.perf_counter()
            if options.task == "perplexity":
                result = f"{perplexity(model, text[:tokens], cfg, method):.3f}"
                bar.update()
            else:
                result = ""
                for depth in DEPTHS:
                    result += "x" if find_passkey(model, tokenizer, tokens, depth, cfg, method) else "-"
                    bar.update()
            rows.append(f"| {tokens} | {method} | {result} | {time.perf_counter() - started:.0f} s |")
    bar.close()
    print(f"{cfg}, {model.dtype}")
    print(f"| tokens | method | {options.task} | time |\n| --- | --- | --- | --- |", *rows, sep="\n")


if __name__ == "__main__":
    main()
