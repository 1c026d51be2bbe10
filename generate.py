"""Generate text with a small Llama that attends by HiP.  `python generate.py --prompt-file long.txt`

The answer goes to standard output as it is made; progress, warnings and the summary go to standard error.
Exit status: 0 done, 2 an input or a setting is wrong (one line says what), 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # torch takes seconds to import; until main() can say so, Ctrl-C is quiet
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import bisect
import contextlib
import dataclasses
import importlib
import json
import random
import resource
import time
from pathlib import Path

import torch
from tqdm import tqdm

import hip
from hip import HiPConfig
from model import METHODS, Context, Tokenizer, generate, load

FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
OPENING = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_passkey(tokenizer: Tokenizer, tokens: int, depth: float = 0.5, seed: int = 0) -> tuple[str, str]:
    """A text of `tokens` tokens, or of a few less, that hides five digits in filler: (text, digits).

    depth: 0 hides them at the start, 1 at the end.  Raises ValueError when `tokens` leaves no room.
    """
    key = str(random.Random(seed).randint(10000, 99999))

    def text(sentences: int) -> str:
        filler = [FILLER[i % len(FILLER)] for i in range(sentences)]
        filler.insert(round(depth * sentences), NEEDLE.format(key=key))
        return OPENING + " ".join(filler) + QUESTION

    def fits(sentences: int) -> bool:
        return len(tokenizer.encode(text(sentences))) <= tokens

    if not fits(0):
        raise ValueError(f"--make-passkey needs at least {len(tokenizer.encode(text(0)))}, not {tokens}")
    # every sentence has more tokens than one: bisect for the most that fit
    return text(bisect.bisect(range(tokens), False, key=lambda n: not fits(n)) - 1), key


def tokens_or_off(text: str) -> int | str:
    return text if text == "off" else int(text)


def arguments() -> argparse.ArgumentParser:
    def refuse(message: str):  # argparse's own way prints the usage as well
        raise ValueError(f"{message} (--help lists all options)")

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error, add = refuse, parser.add_argument
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt-file", metavar="FILE", help="UTF-8 text; - is standard input")
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--make-passkey", metavar="N", type=int, help="print a passkey prompt of N tokens")
    add(
        "--passkey-depth",
        metavar="X",
        type=float,
        default=0.5,
        help="where --make-passkey hides it, 0 to 1 (%(default)s)",
    )
    add(
        "--model",
        metavar="M",
        help=".gguf file, checkpoint folder or hub id (SmolLM2-135M-Instruct, as installed)",
    )
    add("--dtype", choices=DTYPES, help="of the weights (bfloat16 where that is fast, else float32)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add(
        "--attention",
        choices=(*METHODS, "hip-triton"),
        default="hip",
        help="streaming: sink and window only; hip-triton: hip by the Triton kernels (%(default)s)",
    )
    add("--max-new-tokens", metavar="N", type=int, default=128, help="(%(default)s)")
    add("--temperature", metavar="X", type=float, default=0.0, help="0 is greedy (%(default)s)")
    add("--seed", metavar="N", type=int, default=0, help="of sampling and of --make-passkey (%(default)s)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--chat", action="store_true", default=None, help="one user message (when the model has a template)"
    )
    form.add_argument("--raw", action="store_false", dest="chat", help="plain text that the model continues")
    add(
        "--prefill-chunk",
        metavar="N",
        type=int,
        default=32768,
        help="tokens of a layer that attend at a time (%(default)s)",
    )
    add("--offload", choices=("host", "disk"), help="keep keys and values there, near only what is in use")
    add("--offload-dir", metavar="DIR", help="where --offload disk puts its file (the system's choice)")
    add(
        "--resident-tokens",
        metavar="N",
        type=int,
        help="most tokens on the device, of a layer and key/value head (by --top-k and length)",
    )
    add("--json", action="store_true", help="the summary as one JSON line")
    for name, text in {
        "top_k": "keys that the search chooses for a block of queries",
        "block_q": "queries in a block",
        "block_k": "keys in a block",
        "stride_q": "every n-th query of a block takes part in the search",
        "stride_k": "every n-th key of a block takes part in the search (in decoding, of half this n)",
        "sink": "first tokens, always attended to",
        "window": "latest tokens, always attended to",
        "dense_layers": "first layers that attend densely",
        "refresh_interval": "decoding steps that share one selection",
        "early_factor": "by how much more the first half of the layers choose",
        "dense_tail": "last tokens of the prompt that attend densely",
    }.items():
        add(
            "--" + name.replace("_", "-"),
            metavar="N",
            type=int,
            default=getattr(HiPConfig, name),
            help=text + " (%(default)s)",
        )
    add(
        "--representative",
        choices=("center", "first", "last"),
        default=HiPConfig.representative,
        help="block that stands for a branch of the search (%(default)s)",
    )
    add(
        "--score",
        choices=("mass", "max"),
        default=HiPConfig.score,
        help="what a block is worth: attention mass, or its largest product, as in the paper (%(default)s)",
    )
    add("--per-head", action="store_true", help="a search for each query head, as in the paper")
    add("--beam", help=argparse.SUPPRESS)  # gone; HiPConfig says what replaces it
    add(
        "--rope-clip",
        metavar="N|off",
        type=tokens_or_off,
        help="positions tell query and key apart up to N tokens (half of what the model was trained to read, "
        "where prompt and answer are longer than that; else off)",
    )
    add(
        "--no-memory",
        action="store_false",
        dest="memory",
        help="decoding searches afresh, by one query alone",
    )
    return parser


def read_prompt(options: argparse.Namespace) -> str:
    name = "--prompt" if options.prompt is not None else f"the prompt file {options.prompt_file}"
    try:
        if options.prompt is not None:
            text = os.fsencode(options.prompt).decode()
        elif options.prompt_file == "-":
            if sys.stdin is None:
                raise ValueError("standard input is closed")
            text = sys.stdin.buffer.read().decode("utf-8-sig")  # a byte-order mark is no text
        else:
            text = Path(options.prompt_file).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{name} must not be empty")
    return text


def run(options: argparse.Namespace) -> None:
    for name, ok, wanted in (
        ("max_new_tokens", options.max_new_tokens >= 1, "at least 1"),
        ("temperature", 0 <= options.temperature < float("inf"), "0 or more"),
        ("seed", 0 <= options.seed < 2**63, "from 0 to 2**63 - 1"),
        ("passkey_depth", 0 <= options.passkey_depth <= 1, "from 0 to 1"),
    ):
        if not ok:
            raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, not {getattr(options, name)}")
    for name, value in vars(options).items():  # of blocks all keys are read; positions have 32 bits
        most = 2**16 if name.startswith("block") else 2**31 - 1
        if isinstance(value, int) and value > most and name not in ("max_new_tokens", "seed"):
            raise ValueError(f"--{name.replace('_', '-')} must be at most {most}, not {value}")
    if options.rope_clip is not None and options.attention == "dense":
        raise ValueError("--rope-clip works with every --attention but dense")
    names = [f.name for f in dataclasses.fields(HiPConfig) if hasattr(options, f.name)]
    chosen = {name: getattr(options, name) for name in [*names, "beam"]}
    cfg = HiPConfig(**chosen | ({"rope_clip": None} if options.rope_clip == "off" else {}))
    if options.prefill_chunk < 1 or options.prefill_chunk % cfg.block_q:
        raise ValueError(f"--prefill-chunk must be a multiple of {cfg.block_q}, not {options.prefill_chunk}")
    offload = None
    if options.offload:
        if options.attention == "dense":
            raise ValueError("--offload works with every --attention but dense")
        offload = dict(
            store=options.offload, folder=options.offload_dir, resident_tokens=options.resident_tokens
        )
    elif options.offload_dir is not None or options.resident_tokens is not None:
        raise ValueError("--offload-dir and --resident-tokens must come with --offload")
    text = None if options.make_passkey is not None else read_prompt(options)
    method, kernels = options.attention, hip
    if method == "hip-triton":
        try:
            method, kernels = "hip", importlib.import_module("hip_triton")
        except ImportError as error:
            raise ValueError(f"--attention hip-triton: {error}") from error
    model, tokenizer = load(options.model, DTYPES.get(options.dtype), options.device)
    if method == "dense" and model.device.type == "cuda":  # so that its steps can be recorded, too
        with contextlib.suppress(ImportError):
            triton = importlib.import_module("hip_triton")
            kernels = triton if model.config.head_size in triton.HEAD_SIZES else hip
    if text is None:
        text, key = make_passkey(tokenizer, options.make_passkey, options.passkey_depth, options.seed)
        print(text, end="", flush=True)  # a last newline would be a token more
        print(f"the pass key is {key}", file=sys.stderr)
        return
    if options.chat and not tokenizer.template:
        raise ValueError("--chat needs a model with a chat template; this one has none: use --raw")
    tokens = tokenizer.encode(text, bool(tokenizer.template) if options.chat is None else options.chat)
    if not tokens:
        raise ValueError("the model's tokenizer makes no token of the prompt")
    trained = model.config.context
    if len(tokens) + options.max_new_tokens > trained:
        if options.rope_clip is None and method != "dense":
            cfg = dataclasses.replace(cfg, rope_clip=max(1, trained // 2))
        remedy = "expect nonsense" if cfg.rope_clip is None else f"positions are clipped at {cfg.rope_clip}"
        print(
            f"note: {len(tokens)} prompt tokens and {options.max_new_tokens} new ones are more than the "
            f"{trained} that the model was trained to read: {remedy}",
            file=sys.stderr,
        )

    started = time.perf_counter()
    context = Context(model, len(tokens) + options.max_new_tokens, cfg, method, kernels, offload=offload)
    form = "{desc}: {percentage:3.0f}%|{bar}| {n} of {total} tokens [{elapsed}<{remaining}{postfix}]"
    with tqdm(total=len(tokens), desc="prompt", bar_format=form, leave=False) as bar:

        def progress(layer: int, done: int) -> None:  # tokens are done when they have passed all layers
            bar.set_postfix_str(f"layer {layer + 1} of {model.config.layers}", refresh=False)
            bar.update((layer * len(tokens) + done) // model.config.layers - bar.n)

        hidden = context.prefill(torch.tensor([tokens], device=model.device), options.prefill_chunk, progress)
    read, at_first = time.perf_counter(), context.cache.counts() if context.cache else {}
    stream, answer = tokenizer.stream(tokens), 0
    for token in generate(
        context, hidden, options.max_new_tokens, tokenizer.eos, options.temperature, options.seed
    ):
        answer += 1
        print(stream(token), end="", flush=True)
    print(stream(None), flush=True)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    summary = {
        "attention": options.attention,
        "prompt_tokens": len(tokens),
        "new_tokens": answer,
        "prefill_tokens_per_s": round(len(tokens) / (read - started), 1),
        "decode_tokens_per_s": round(answer / (done - read), 1),
        "score_share": round(context.scores / context.dense_scores, 4),
        "peak_memory_gb": round((torch.cuda.max_memory_allocated() or peak) / 1e9, 2),
    }
    if context.cache:
        counts, cache = context.cache.counts(), context.cache
        summary |= {
            "resident_tokens": cache.resident_tokens(),
            "resident_bound": cache.bound,
            "stored_tokens": context.length,
            "moved_gb": round(counts["moved_bytes"] / 1e9, 3),
        }
        for bank in ("search", "attention"):  # of the decoding steps; a prompt streams through
            hits, misses = (counts[f"{bank}_{x}"] - at_first[f"{bank}_{x}"] for x in ("hits", "misses"))
            summary[f"{bank}_hit_rate"] = round(hits / max(1, hits + misses), 4)
    words = (
        "{prompt_tokens} prompt tokens at {prefill_tokens_per_s}/s, {new_tokens} new ones at "
        "{decode_tokens_per_s}/s; {attention} computed {score_share:.1%} of the dense score matrix; "
        "peak memory {peak_memory_gb} GB"
    )
    if context.cache:
        words += (
            "; of {stored_tokens} stored tokens at most {resident_tokens} on the device (bound "
            "{resident_bound}), {moved_gb} GB moved; decoding found there {search_hit_rate:.1%} of the "
            "search's pages and {attention_hit_rate:.1%} of attention's"
        )
    print(json.dumps(summary) if options.json else words.format(**summary), file=sys.stderr)


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody may listen
        print(text, file=sys.stderr, flush=True)


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))  # None: closed
    sys.stdout.reconfigure(errors="replace")  # for a terminal that cannot show a character
    try:
        with contextlib.suppress(SystemExit):  # of --help
            run(arguments().parse_args())
        sys.stdout.flush()
        return 0
    except (ValueError, MemoryError) as error:
        say(f"generate.py: {' '.join(str(error).split()) or 'out of memory'}")
        return 2
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        say(f"generate.py: {str(error).splitlines()[0]}")
        return 2
    except KeyboardInterrupt:
        say("\ninterrupted")
        return 130
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes at exit, in vain
        if isinstance(error, BrokenPipeError):  # the reader of our output has seen enough
            return 0
        say(f"generate.py: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
