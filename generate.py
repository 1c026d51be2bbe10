"""Generate text with a small Llama that attends by HiP.  `python generate.py --prompt-file long.txt`

The answer goes to standard output as it is made; progress, warnings and the summary go to standard error.
Exit status: 0 done, 2 an input or a setting is wrong (one line says what), 130 interrupted.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import json
import os
import random
import resource
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from hip import HiPConfig
from model import METHODS, Context, Tokenizer, generate, load

FILLER = "The grass is green.|The sky is blue.|The sun is yellow.|Here we go.|There and back again.".split("|")
OPENING = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_passkey(tokenizer: Tokenizer, tokens: int, depth: float = 0.5, seed: int = 0) -> tuple[str, str]:
    """A text of at most `tokens` tokens, as close as whole sentences allow, that hides five digits: (text, digits).

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
        raise ValueError(f"--make-passkey needs at least {len(tokenizer.encode(text(0)))} tokens, not {tokens}")
    # every sentence has more tokens than one: bisect for the most that fit
    return text(bisect.bisect(range(tokens), False, key=lambda n: not fits(n)) - 1), key


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt-file", metavar="FILE", help="UTF-8 text; - is standard input")
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument(
        "--make-passkey", metavar="N", type=int, help="print a passkey prompt of N tokens and stop"
    )
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
        choices=METHODS,
        default="hip",
        help="streaming: sink and window only, a baseline (%(default)s)",
    )
    add("--max-new-tokens", metavar="N", type=int, default=128, help="(%(default)s)")
    add("--temperature", metavar="X", type=float, default=0.0, help="0 is greedy (%(default)s)")
    add("--seed", metavar="N", type=int, default=0, help="of sampling and of --make-passkey (%(default)s)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--chat", action="store_true", default=None, help="one user message (when the model has a template)"
    )
    form.add_argument("--raw", action="store_false", dest="chat", help="plain text that the model continues")
    add("--prefill-chunk", metavar="N", type=int, default=2048, help="tokens read at a time (%(default)s)")
    add("--json", action="store_true", help="the summary as one JSON line")
    for name, text in {
        "top_k": "keys that the search chooses for a block of queries",
        "block_k": "keys in a block",
        "beam": "how much wider than top_k the search keeps looking",
        "stride_q": "every n-th query takes part in the search",
        "stride_k": "every n-th key of a block takes part in the search",
        "sink": "first tokens, always attended to",
        "window": "latest tokens, always attended to",
        "dense_layers": "first layers that attend densely",
        "refresh_interval": "decoding steps that share one selection",
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
        "--no-memory",
        action="store_false",
        dest="memory",
        help="decoding starts without the prompt tail's selection",
    )
    return parser


def read_prompt(options: argparse.Namespace) -> str:
    if options.prompt is not None:
        text = options.prompt
    else:
        try:
            source = (
                sys.stdin.buffer.read()
                if options.prompt_file == "-"
                else Path(options.prompt_file).read_bytes()
            )
            text = source.decode()
        except OSError as error:
            raise ValueError(
                f"the prompt file {options.prompt_file} cannot be read: {error.strerror}"
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt file {options.prompt_file} must be UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError("the prompt must not be empty")
    return text


def run(options: argparse.Namespace) -> None:
    for name, ok, wanted in (
        ("max_new_tokens", options.max_new_tokens >= 1, "at least 1"),
        ("temperature", 0 <= options.temperature < float("inf"), "0 or more"),
        ("passkey_depth", 0 <= options.passkey_depth <= 1, "from 0 to 1"),
    ):
        if not ok:
            raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, not {getattr(options, name)}")
    cfg = HiPConfig(
        **{
            f.name: getattr(options, f.name)
            for f in dataclasses.fields(HiPConfig)
            if hasattr(options, f.name)
        }
    )
    if options.prefill_chunk < 1 or options.prefill_chunk % cfg.block_q:
        raise ValueError(f"--prefill-chunk must be a multiple of {cfg.block_q}, not {options.prefill_chunk}")
    text = None if options.make_passkey is not None else read_prompt(options)
    model, tokenizer = load(options.model, DTYPES.get(options.dtype), options.device)
    if text is None:
        text, key = make_passkey(tokenizer, options.make_passkey, options.passkey_depth, options.seed)
        print(text)
        print(f"the pass key is {key}", file=sys.stderr)
        return
    if options.chat and not tokenizer.template:
        raise ValueError("--chat needs a model with a chat template; this one has none: use --raw")
    chat = bool(tokenizer.template) if options.chat is None else options.chat
    tokens = tokenizer.encode(text, chat)
    if len(tokens) + options.max_new_tokens > model.config.context:
        print(
            f"warning: {len(tokens)} prompt tokens and {options.max_new_tokens} new ones are more than the "
            f"{model.config.context} that the model was trained to read",
            file=sys.stderr,
        )

    started = time.perf_counter()
    context = Context(model, len(tokens) + options.max_new_tokens, cfg, options.attention)
    with tqdm(total=len(tokens), unit="token", desc="prompt", leave=False) as bar:
        for hidden in context.prefill(torch.tensor([tokens], device=model.device), options.prefill_chunk):
            bar.update(hidden.shape[1])
    read = time.perf_counter()
    stream, answer = tokenizer.stream(), 0
    for token in generate(
        context, hidden, options.max_new_tokens, tokenizer.eos, options.temperature, options.seed
    ):
        answer += 1
        print(stream(token), end="", flush=True)
    print(stream(None), flush=True)
    done = time.perf_counter()
    on_gpu = model.device.type == "cuda"
    peak = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    summary = {
        "attention": options.attention,
        "prompt_tokens": len(tokens),
        "new_tokens": answer,
        "prefill_tokens_per_s": round(len(tokens) / (read - started), 1),
        "decode_tokens_per_s": round(answer / (done - read), 1),
        "score_share": round(context.scores / context.dense_scores, 4),
        "peak_memory_gb": round(peak / 1e9, 2),
    }
    if options.json:
        print(json.dumps(summary), file=sys.stderr)
        return
    print(
        "{prompt_tokens} prompt tokens at {prefill_tokens_per_s}/s, {new_tokens} new ones at {decode_tokens_per_s}/s; "
        "{attention} computed {score_share:.1%} of the dense score matrix; peak memory {peak_memory_gb} GB".format(
            **summary
        ),
        file=sys.stderr,
    )


def main() -> int:
    try:
        run(arguments().parse_args())
        return 0
    except ValueError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or Python complains when it flushes at exit
        return 0


if __name__ == "__main__":
    sys.exit(main())
