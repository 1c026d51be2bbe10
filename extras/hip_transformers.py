"""HiP attention in the causal models of the library transformers, under the name "hip".

    from hip_transformers import HiPOffloadedCache, register

    register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="hip")
    model.config.hip = dict(top_k=1024)  # fields of HiPConfig; may be left out
    text = tokenizer(text, return_tensors="pt")
    print(tokenizer.decode(model.generate(**text, max_new_tokens=100)[0]))
    cache = HiPOffloadedCache(model.config, max_tokens=100_000, store="disk")  # keys and values in a file
    print(tokenizer.decode(model.generate(**text, max_new_tokens=100, past_key_values=cache)[0]))

The rows of a batch are read as by `model.py`, cut to their real tokens; those of one length together, others
one by one.  One query behind a cache is a decoding step.  More are a piece of a prompt, whatever the cache
has been through; each piece has a dense tail, for nobody says which is the last, so `dense_tail` or fewer
queries are dense.  Layers with a sliding window of their own keep it.

The library hands over keys and values, but no cache.  The keys *are* what the cache holds, though, be it a
tensor or the handle of `HiPOffloadedCache`: what a layer remembers of a generation is an attribute of that,
where a hook finds it before the next call.  It dies with the cache.  Whatever else touches cached keys (beam
search reorders, `crop` cuts) leaves a new tensor without it, and the next step searches afresh.  For many
requests at a time (`generate_batch`, `transformers serve --continuous-batching`) the library has one cache,
in pages; there memory goes by the name of the request (`paged_attention`).

Refused: gradients, dropout, bidirectional, cross and chunked attention, masks and biases of one's own for
more than `dense_tail` queries, sinks, soft-caps, packed sequences.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hip  # noqa: E402
from hip import HiPConfig, Selection  # noqa: E402
from model import MEMORY_QUERIES, PAYS, at_a_time, cut, first_memory  # noqa: E402

try:
    import transformers
    from transformers import DynamicCache, PreTrainedConfig, masking_utils
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
except ImportError as error:
    raise ValueError(f"HiP needs transformers 5.17 or later ({error})") from error
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
if VERSION < (5, 17):
    raise ValueError(f"HiP needs transformers 5.17 or later, not {transformers.__version__}")

# tensors that come along and leave attention as it is; any other may be sinks, a bias, an index, ...
HARMLESS = ("position_ids", "cache_position", "token_type_ids", "mm_token_type_ids", "num_items_in_batch")
PAGED = ("position_ids", "cu_seq_lens_q", "block_table", "logits_indices", "logits_processor_args")
not_compiled = torch.compiler.disable(reason="HiP's search depends on the data: compile without fullgraph")
logger = transformers.logging.get_logger(__name__)
found = threading.local()  # from the hook to the attention call that follows in the same thread


def register() -> None:
    """Make "hip" a name for `attn_implementation`, and `hip` an attribute of configs that is checked."""
    transformers.AttentionInterface.register("hip", attention)
    transformers.AttentionMaskInterface.register("hip", mask)
    transformers.PreTrainedConfig.hip = property(get_hip, set_hip, delete_hip)
    # without masks, which need not be made for this one
    transformers.AttentionInterface.register("hip_paged", paged_attention)
    switch = ContinuousBatchingManager.switch_to_cb_friendly_attn
    if VERSION >= (5, 20) and not hasattr(switch, "__wrapped__"):
        ContinuousBatchingManager.switch_to_cb_friendly_attn = or_hip(switch)


def or_hip(switch: Callable) -> Callable:
    """The library knows by name what reads its pages, and "hip" is none: it is "hip_paged" meanwhile."""

    @functools.wraps(switch)
    def run(manager, model, *args, **kwargs) -> None:
        if model.config._attn_implementation != "hip":
            return switch(manager, model, *args, **kwargs)
        model.set_attn_implementation("hip_paged")
        manager._original_attn_impl = "hip"

    return run


def checked(cfg: HiPConfig | dict | None) -> HiPConfig | None:
    """What `config.hip` stands for.  ValueError for what it cannot be."""
    if cfg is None or isinstance(cfg, HiPConfig):
        return cfg
    if not isinstance(cfg, dict):
        raise ValueError(f"config.hip must be a HiPConfig or a dict of its fields, not {cfg!r}")
    names = HiPConfig.__dataclass_fields__
    if wrong := [name for name in cfg if name not in names]:
        raise ValueError(
            f"config.hip has no field {wrong[0]!r}, but {', '.join(x for x in names if x != 'beam')}"
        )
    return HiPConfig(**cfg)


# asked for by every layer at every step
remembered = functools.lru_cache(typed=True)(HiPConfig)


def get_hip(config: PreTrainedConfig) -> HiPConfig | None:
    """`config.hip`, which is kept as a dict of all fields, for that can be printed and saved."""
    kept = vars(config).get("hip")
    try:
        return kept and remembered(**kept)
    except TypeError:  # kept before `register`, and wrong
        return checked(kept)


def set_hip(config: PreTrainedConfig, cfg: HiPConfig | dict | None) -> None:
    """Of a model, and of the models that it is made of: attention knows the config of its own alone."""
    cfg = checked(cfg)
    vars(config)["hip"] = cfg and dict(vars(cfg))
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            part.hip = cfg


def delete_hip(config: PreTrainedConfig) -> None:
    vars(config).pop("hip", None)
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            del part.hip


def settings(config: PreTrainedConfig) -> HiPConfig:
    return config.hip or remembered()


def own_settings(module: nn.Module) -> HiPConfig:
    """Of the layer whose attention this is."""
    layer, layers = getattr(module, "layer_idx", None), getattr(module.config, "num_hidden_layers", 1)
    return of_layer(settings(module.config), layer or 0, layers)


of_layer = functools.cache(HiPConfig.of_layer)
decoding = functools.cache(lambda cfg: cfg.decoding)


def kernels(device: torch.device, head_size: int) -> ModuleType:
    """Triton's on a GPU where triton is installed, for the head sizes that they take, else the reference."""
    fast = device.type == "cuda" and importlib.util.find_spec("triton")
    lib = importlib.import_module("hip_triton" if fast else "hip")
    if fast and head_size not in lib.HEAD_SIZES:
        sizes = f"head sizes of {', '.join(map(str, lib.HEAD_SIZES))}, not {head_size}"
        logger.warning_once(f"HiP's Triton kernels take {sizes}: hip.py takes their place, more slowly")
        return hip
    return lib


class Row(NamedTuple):
    """What is remembered of a text, or of some of one length."""

    steps: int = 0  # since the prompt
    recent: Tensor | None = None  # the latest queries (B, H, n, D), if they are remembered
    selection: Selection | None = None  # None until decoding asks for it


NOTHING = Row()


def read(row: Row | None, q: Tensor, past: list, cfg: HiPConfig, scale: float | None, dense: bool) -> tuple:
    """Attention of rows, q (B, H, Tq, D) at the end of T tokens, as model.py's `Context` does it: (o, row).

    row: what is remembered; None if this is a prompt.  past: keys and values (B, Hkv, T, D), in decoding also
    a cache's `hip.Pages`.  dense: whether the layer is.
    """
    (k, v), (steps, recent, kept), lib, out = past, row or NOTHING, kernels(q.device, q.shape[3]), []
    Tq, T, unit = q.shape[2], k.shape[2], at_a_time(cfg, q.device)
    own, body = (decoding(cfg), Tq) if row else (cfg, max(0, Tq - cfg.dense_tail))
    latest = q if row is None or recent is None else torch.cat([recent, q], 2)
    latest = latest[:, :, -max(MEMORY_QUERIES, decoding(cfg).block_q) :]
    start = T - Tq - steps % cfg.refresh_interval  # where the first query's selection is, or would be, from
    first = body if dense else min(body, covered(start, own, 0 if row else unit))
    first = 0 if isinstance(k, hip.Pages) else first
    whole = T if T == Tq else unit  # without keys before the queries
    for a, b in [*cut(0, first, whole), *[(first, body)] * (first < body), *cut(body, Tq, unit)]:
        k, v = past if b == Tq else (x[:, :, : T - Tq + b] for x in past)
        if (a, b) != (first, body):
            out.append(hip.dense_attention(q[:, :, a:b], k, v, scale=scale))
            continue
        if row is None:
            kept = lib.select_blocks(q[:, :, a:b], k, own, scale=scale)
        elif steps % cfg.refresh_interval == 0:
            if kept is None and recent is not None:
                kept = begun(recent, k[:, :, : T - 1], cfg, scale)
            asking = q if recent is None or T < own.block_q else as_many(latest, own.block_q)
            kept = lib.select_blocks(asking, k, own, kept if cfg.memory else None, scale=scale)
        out.append(lib.sparse_attention(q[:, :, a:b], k, v, kept, own, scale=scale))
    o = out[0] if len(out) == 1 else torch.cat(out, 2)
    if row is None:
        return o, Row(0, latest.clone() if cfg.memory else None)
    return o, Row(steps + 1, latest if cfg.memory else None, kept)


def as_many(latest: Tensor, rows: int) -> Tensor:
    """So many of the latest queries (B, H, n, D); the first stands for those that are not there."""
    first = latest[:, :, :1].expand(-1, -1, max(0, rows - latest.shape[2]), -1)
    return torch.cat([first, latest], 2)[:, :, -rows:]


def covered(start: int, cfg: HiPConfig, unit: int) -> int:
    """How many queries from position `start` on attend densely, as in `Context.covered`; unit: 0 in decoding.

    By default the first 3,584 tokens of a prompt, in early layers 12,800; 1,343 and 12,288 on a GPU.
    """
    same = -(-(cfg.covered - start) // cfg.block_q) * cfg.block_q
    return max(0, same, (PAYS * cfg.covered - start) // unit * unit if unit else 0)


def begun(recent: Tensor | None, k: Tensor, cfg: HiPConfig, scale: float | None) -> Selection | None:
    """What decoding starts from behind keys k (1, Hkv, T, D), of which the last queries are remembered.

    Found when it is wanted, where keys are at hand: of all pieces of a prompt only the last one's is, none
    behind what an assistant guessed, and it costs several times what dense attention of so few queries does.
    """
    oracle = kernels(k.device, k.shape[3]).oracle_blocks
    last = recent if recent is None else recent[:, :, -MEMORY_QUERIES:]
    return last if last is None else first_memory(last, k, cfg, scale=scale, oracle=oracle)


@not_compiled
def find_memory(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Hook before an attention module: its memory hangs on the cached keys, before new ones join them."""
    layer = getattr(kwargs.get("past_key_values"), "layers", ())[module.layer_idx :][:1]
    found.memory = getattr(layer and layer[0].keys, "hip_memory", None)


@not_compiled
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The library's attention function: q (B, H, Tq, D), k and v (B, Hkv, T, D), what `mask` returned.

    T may exceed the tokens read (static caches).  Returns ((B, Tq, H, D), None).  ValueError: see `refuse`.
    """
    cfg, Tq, stored = own_settings(module), query.shape[2], not isinstance(key, Tensor)
    refuse(module, query, attention_mask, cfg, kwargs | dict(dropout=dropout, stored=stored))
    if attention_mask is not None and attention_mask.ndim == 4:  # a sliding window, or one's own
        own = transformers.AttentionInterface()["sdpa"]
        return own(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if find_memory not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(find_memory, with_kwargs=True)
    memory, found.memory = getattr(found, "memory", None), None
    T = key.length + Tq if stored else key.shape[2]
    T = T if attention_mask is None else attention_mask.shape[1]  # tokens read
    # a memory is good for its own layer and settings, if nothing was read since
    good = memory is not None and memory[0] == (id(module), cfg, T - Tq)
    rows = list(memory[1]) if good else [NOTHING] * len(query)
    prompt, dense = Tq > 1 or T == 1, module.layer_idx < cfg.dense_layers
    cache, (key, value) = key, key.begin(query, attention_mask, cfg, good) if stored else (key, value)
    # zeros come out for padding
    out = torch.empty_like(query) if attention_mask is None else torch.zeros_like(query)
    for members, n, new in groups(rows, attention_mask, T, Tq, alone=stored):
        at = slice(members[0], members[-1] + 1) if members[-1] - members[0] < len(members) else members
        q = query[at][:, :, new]
        past = [x[at][:, :, new if stored else n] for x in (key, value)]
        past = cache.add(members[0], *past, prompt or dense) if stored else past
        row = None if prompt else together([rows[b] for b in members])
        o, row = read(row, q, past, cfg, scaling, dense)
        if o.shape == query.shape:
            out = o
        else:
            out[at, :, new] = o
        if stored and prompt and not dense:
            row = row._replace(selection=begun(row.recent, past[0], cfg, scaling))
        for i, b in enumerate(members):
            rows[b] = alone(row, i) if len(members) > 1 else row
    cache.hip_memory = (id(module), cfg, T), rows
    return out.transpose(1, 2), None


def groups(rows: list[Row], mask: Tensor | None, T: int, Tq: int, alone: bool) -> Iterator[tuple]:
    """Rows of a batch that can be read together: their numbers, and which tokens and which queries are real.

    They have as many real tokens, behind padding if there is any, and memories of one kind and age.  Rows
    with padding elsewhere, and `alone`, come one by one.
    """
    left = mask is None or bool((mask[:, 1:] >= mask[:, :-1]).all())
    found: dict[tuple, list[int]] = {}
    counts = [(T, Tq)] * len(rows)
    if mask is not None:
        counts = list(zip(mask.sum(1).tolist(), mask[:, -Tq:].sum(1).tolist(), strict=True))
    for b, (steps, recent, kept) in enumerate(rows):
        shapes = None if recent is None else recent.shape, kept and kept.blocks.shape
        alike = steps, *shapes, b if alone or not left else -1
        if counts[b][1]:
            found.setdefault((*counts[b], *alike), []).append(b)
    for (n, new, *_), members in found.items():
        seen = (slice(T - n, T), slice(Tq - new, Tq)) if left else (mask[members[0]], mask[members[0], -Tq:])
        yield members, *seen


def together(rows: list[Row]) -> Row:
    """Of several texts one, that are alike."""
    if len(rows) == 1:
        return rows[0]
    steps, recent, kept = rows[0]
    recent = recent if recent is None else torch.cat([row.recent for row in rows])
    return Row(steps, recent, kept and Selection(torch.cat([row.selection.blocks for row in rows]), kept[1]))


def alone(row: Row, i: int) -> Row:
    """Text i of some."""
    steps, recent, kept = row
    recent = recent if recent is None else recent[i : i + 1]
    return Row(steps, recent, kept and Selection(kept.blocks[i : i + 1], kept.window_start))


# --- many requests at a time: the library's paged cache ----------------------------------------------------


class Table(NamedTuple):
    """Where the tokens of a request are, in place of a `hip.Bank`; every stride-th of a block is wanted."""

    slot_of: Tensor  # (T,) rows of the cache
    keys: int  # of a block, of those that are wanted
    stride: int


class Paged(hip.Pages):
    """Keys and values of one request, in the pages of the library's cache, for the query at its end."""

    @classmethod
    def of(cls, pages: list[Tensor], slots: Tensor, cfg: HiPConfig) -> Paged:
        """pages: keys and values (rows, Hkv, D); slots: in which rows its tokens are."""
        thin = Table(slots, cfg.block_k // cfg.stride_k, cfg.stride_k)
        shape, whole = (1, pages[0].shape[1], len(slots), pages[0].shape[2]), Table(slots, cfg.block_k, 1)
        return cls(pages, (thin, whole), shape, whole)

    dtype = property(lambda self: self.store[0].dtype)

    def take(self, blocks: Tensor) -> list[Tensor]:
        """As `hip.Rows.take`."""
        (slot_of, keys, stride), Hkv, S = self.bank, self.shape[1], blocks.shape[1]
        tokens = blocks[..., None] * (keys * stride) + torch.arange(keys, device=blocks.device) * stride
        head = (torch.arange(S, device=blocks.device) // (S // Hkv)).view(S, 1, 1, 1)
        rows = slot_of[tokens.clamp(0, self.shape[2] - 1)] * Hkv + head
        pages = self.store[:1] if self.bank is self.banks[0] else self.store  # a search needs no values
        return [F.embedding(rows, x.flatten(0, 1)) for x in pages]


@not_compiled
def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    cache=None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The library's attention function of continuous batching: q (1, H, Tq, D), k and v (1, Hkv, Tq, D).

    The Tq tokens are of many requests, one behind another; what each read before lies in the cache's pages.
    A step of one token takes from these the blocks that it chose, on a GPU all.  Returns as `attention`.
    """
    cfg, layer, others = own_settings(module), module.layer_idx, kwargs | dict.fromkeys(PAGED)
    refuse(module, query, None, cfg, others | dict(dropout=dropout))
    if cache is None:
        raise ValueError('attn_implementation="hip_paged" is what generate_batch sets: use "hip"')
    table = cache.layer_to_allocator[layer]
    slots, write = (kwargs[x][table.index] for x in ("read_index", "write_index"))
    window, dense = getattr(table, "sliding_window", None), layer < cfg.dense_layers
    if window:  # pages are a ring, so the library tells what to look at
        pages = [x[0].transpose(0, 1) for x in cache.update(key, value, layer, dict(kwargs))]
        slots = torch.arange(len(pages[0]), device=query.device)
    else:  # write what is new, and read nothing
        table.update(*(x[0].transpose(0, 1) for x in (key, value)), layer, slots[:0], write)
        pages = [x.flatten(0, 1) for x in table.get_cache_for_block_table(layer)]  # (rows, Hkv, D) each
        slots = slots if len(slots) else write
    # a request goes by its name, which its last page tells, for that is its own
    names = {blocks[-1]: name for name, blocks in table.block_table.items() if blocks}
    memories = vars(cache).setdefault("hip_memory", {})
    memories[layer] = memory = {x: y for x, y in memories.get(layer, {}).items() if x in table.block_table}
    ends = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"][table.layer_type].tolist()
    out = torch.zeros_like(query)  # zeros come out for padding
    for (a, b), (first, last) in zip(*map(pairwise, ends), strict=True):
        q, mine, new, T = query[:, :, a:b], slots[first:last], b - a, last - first
        if new == 0:
            continue
        prompt = new > 1 or T == 1
        if window or prompt or dense or query.is_cuda:
            past = [x[mine].transpose(0, 1)[None].contiguous() for x in pages]
        else:
            past = [Paged.of(pages, mine, decoding(cfg))] * 2
        if window:
            seen = torch.ones(new, T, dtype=torch.bool, device=q.device)
            seen = seen.tril(T - new).triu(T - new - window + 1)
            out[:, :, a:b] = F.scaled_dot_product_attention(q, *past, seen, scale=scaling, enable_gqa=True)
            continue
        name = names.get(int(write[b - 1]) // table.block_physical_stride)
        tokens, row = memory.get(name, (None, NOTHING))
        row = None if prompt else row if tokens == (cfg, T - new) else NOTHING
        out[:, :, a:b], row = read(row, q, past, cfg, scaling, dense)
        if prompt and not dense:
            row = row._replace(selection=begun(row.recent, past[0], cfg, scaling))
        memory[name] = (cfg, T), row
    return out.transpose(1, 2), None


# --- keys and values elsewhere: in host memory, or in a file ------------------------------------------------


class HiPOffloadedCache(DynamicCache):
    """For `past_key_values`: up to max_tokens of a text, or of each text of a batch with its padding.

    config: the model's.  store, folder, resident_tokens: as `OffloadedKVCache`, whose bound counts for each
    row by itself.  `reset()` empties it for another text.  ValueError when it cannot be.

    A layer hands over no keys but a handle, `Stored`, from which HiP takes the pages that it chose; any other
    attention that touches the handle ends in a sentence.  Each row of a batch has an `OffloadedKVCache` of
    its own in each layer, made with the first tokens, when sizes, dtype and device are known.  Padding is not
    stored.  Layers with a sliding window of their own keep that window, as the library does it.

    While a layer reads a prompt, its keys and values are on the device, all of them; then they are written,
    once.  For another piece of a prompt, or to check what an assistant guessed, all that it has is brought in
    again, and in `dense_layers` at every step.  `crop` forgets pages; beam search copies the store of every
    beam that goes on twice, at every step.

    Refused: any attention but HiP's, more tokens than the cache was made for, other rows, padding, settings
    or model than it began with, going on where an error cut a call short.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_tokens: int,
        store: str = "host",
        folder: str | None = None,
        resident_tokens: int | None = None,
    ):
        if type(max_tokens) is not int or max_tokens < 1:
            raise ValueError(f"max_tokens must be a whole number of at least 1, not {max_tokens!r}")
        super().__init__(config=config)
        self.max_tokens = max_tokens
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[i] = OffloadedLayer(max_tokens, store, folder, resident_tokens)
            elif type(layer) is not DynamicSlidingWindowLayer:
                raise ValueError(f"HiPOffloadedCache has no place for layer {i}, which needs a {layer}")

    @not_compiled  # else it is compiled for every layer by itself
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> tuple:
        """The library's: take a layer's new keys and values (B, Hkv, T, D), return what attention gets."""
        if layer_idx == 0:  # nothing of this call is written yet
            lengths = {layer.get_seq_length() for layer in self.layers}
            if len(lengths) > 1:
                raise ValueError("an error cut a call with this cache short: reset() it, or make a new one")
            if (T := lengths.pop() + key_states.shape[2]) > self.max_tokens:
                raise ValueError(f"the cache was made for max_tokens={self.max_tokens}, too few for {T}")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def stores(self) -> list[hip.OffloadedKVCache]:
        """Of every layer and row; their `counts()` and `resident_tokens()` tell what happened."""
        layers = [layer for layer in self.layers if isinstance(layer, OffloadedLayer)]
        return [store for layer in layers for store in layer.keys.rows]


class OffloadedLayer(DynamicLayer):
    """A layer of the cache, whose keys are a handle."""

    is_croppable, supports_early_init = True, False

    def __init__(self, max_tokens: int, *settings):
        super().__init__()
        self.max_tokens, self.settings = max_tokens, settings
        self.reset()

    def reset(self) -> None:
        self.keys = self.values = Stored(self.max_tokens, *self.settings)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Stored, Stored]:
        self.keys.new = key_states, value_states  # `attention` stores them, for it knows what is padding
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.length

    def get_max_length(self) -> int:
        return self.max_tokens

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop wants minus the number of tokens to remove, not {tokens_to_remove}")
        self.keys.crop(-tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.keys.select([b for b in range(len(self.keys.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.keys.rows:
            self.keys.select(torch.arange(len(self.keys.rows))[indices.cpu()].tolist())

    reorder_cache = batch_select_indices

    def __copy__(self) -> OffloadedLayer:  # else both would write to one store
        return copy.deepcopy(self)


class Stored:
    """A layer's keys and values, which `hip_transformers.attention` alone can read.

    rows: of each row of the batch a store of its real tokens.  new: keys and values (B, Hkv, Tq, D) that are
    still to be stored.  hip_memory: what `attention` left here, None before it, or when it came to no end.
    """

    def __init__(self, max_tokens: int, *settings):
        self.max_tokens, self.settings = max_tokens, settings
        self.rows, self.new, self.hip_memory = [], None, None

    def __deepcopy__(self, memo: dict) -> Stored:
        other = Stored(self.max_tokens, *self.settings)
        vars(other).update(vars(self), rows=[self.twin(row) for row in self.rows])
        return other

    def __reduce_ex__(self, protocol):
        raise ValueError("a HiPOffloadedCache cannot be pickled: keep its text, and read that again")

    def twin(self, row: hip.OffloadedKVCache) -> hip.OffloadedKVCache:
        other = self.make()
        other.append(0, *row.read(0))
        return other

    def forget(self, length: int) -> None:
        """Memory is lost when the rows are no longer what they were, or as long."""
        self.hip_memory = self.hip_memory and ((*self.hip_memory[0][:2], length), [NOTHING] * len(self.rows))

    def select(self, rows: list[int]) -> None:
        """Go on with these rows; one that is there again gets a store of its own."""
        again = [b in rows[:i] for i, b in enumerate(rows)]
        self.rows = [self.twin(self.rows[b]) if x else self.rows[b] for b, x in zip(rows, again, strict=True)]
        self.forget(self.length)

    def crop(self, count: int) -> None:
        """Cut the last tokens off.  Where some were padding, the next call says that rows are too short."""
        for row in self.rows:
            row.length[0] = max(0, row.length[0] - count)
            page = row.length[0] // row.block
            for bank in row.banks[0]:  # what is no longer whole is nowhere on the device
                bank.page_of.scatter_(1, bank.slot_of[:, page:-1], bank.pages)
                bank.slot_of[:, page:-1] = bank.slots
        self.forget(max(0, self.length - count))

    def __getattr__(self, name: str):
        raise ValueError(
            'HiPOffloadedCache can be read by attn_implementation="hip" alone: set that, or use another cache'
        )

    __getitem__ = __getattr__

    @property
    def length(self) -> int:
        """Tokens read, with padding."""
        return self.hip_memory[0][2] if self.hip_memory else 0

    def begin(self, query: Tensor, mask: Tensor | None, cfg: HiPConfig, good: bool) -> tuple[Tensor, Tensor]:
        """What is new, when it fits what is here.  query (B, H, Tq, D), mask (B, T), cfg: as in `attention`.

        good: whether what `attention` remembers is of the same layer and settings, and as long.  ValueError,
        with nothing written, if it must be and is not.
        """
        (k, v), self.new = self.new, None
        (B, Hkv, Tq, D), H = k.shape, query.shape[1]
        if not self.rows:
            shape = 1, 1, Hkv, self.max_tokens, D
            try:
                cache = kernels(k.device, k.shape[3]).OffloadedKVCache
                made = shape, H, cfg.decoding, k.dtype, k.device, *self.settings
                # tensors made in inference mode cannot be written outside
                self.make = torch.inference_mode(False)(functools.partial(cache, *made))
                self.rows = [self.make() for _ in range(B)]
            except ValueError as error:
                raise ValueError(f"{error} (for one layer of one row)") from error
        elif not good:
            raise ValueError(
                "this cache was begun with other settings or another model, or an error cut a "
                "call with it short: reset() it, or make a new one"
            )
        stored = [row.length[0] for row in self.rows]
        expected = [self.length] * B if mask is None else mask[:, :-Tq].sum(1).tolist()
        if stored != expected:
            raise ValueError(
                f"the cache holds rows of {stored} tokens, and not {expected}: go on with the "
                "same rows and an attention_mask that hides the same padding"
            )
        self.hip_memory = None  # until `attention` has come to its end
        return k, v

    def add(self, b: int, k: Tensor, v: Tensor, whole: bool) -> list[Tensor] | list[hip.Pages]:
        """Store a row's next k, v (1, Hkv, n, D).  Returns all that it then has: whole, or as pages."""
        row = self.rows[b]
        past = [torch.cat(x, 2) for x in zip(row.read(0), (k, v), strict=True)] if whole else None
        row.append(0, k, v)
        return past or [row.layer(0)] * 2


# --- what is refused ---------------------------------------------------------------------------------------


def refuse(module: nn.Module, query: Tensor, attention_mask: Tensor | None, cfg: HiPConfig, kwargs: dict):
    """ValueError, in one sentence, for what HiP would get wrong."""
    own_mask, packed = attention_mask is not None and attention_mask.ndim != 2, False
    few = query.shape[2] <= cfg.dense_tail and not kwargs.get("stored")  # they are dense in any case
    position = kwargs.get("position_ids")
    if position is not None and position.ndim == 2 and position.shape[1] > 1 and not own_mask:
        real = torch.ones_like(position) if attention_mask is None else attention_mask[:, -query.shape[2] :]
        packed = ((position.diff() < 1) & real[:, 1:] & real[:, :-1]).any()
    for cause, here in {
        **{name: isinstance(x, Tensor) and name not in HARMLESS for name, x in kwargs.items()},
        "rope_clip, for keys come rotated": cfg.rope_clip,
        "dropout": kwargs["dropout"],
        "gradients (missing: torch.no_grad())": torch.is_grad_enabled() and query.requires_grad,
        "attention that is not causal": False in (getattr(module, "is_causal", 1), kwargs.get("is_causal")),
        "a mask or bias of one's own, or attention in chunks": own_mask
        and not (kwargs.get("sliding_window") or few),
        "packed sequences": packed,
        "modules without a layer_idx": getattr(module, "layer_idx", None) is None,
        "softcap": kwargs.get("softcap"),
        "output_attentions": kwargs.get("output_attentions"),
    }.items():
        if here:
            raise ValueError(f"HiP attention cannot do {cause}: use another attn_implementation")


@not_compiled
def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    *,
    config,
    mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs,
) -> Tensor | None:
    """The library's mask function: (B, tokens read) bool, False for padding, or None if all keys are real.

    A sliding window's is the library's own (B, 1, Tq, Tk).  ValueError for any other that is not just causal.
    """
    if local_size is not None:  # of four dimensions always, for `attention` to tell it by
        kwargs |= dict(mask_function=mask_function, attention_mask=attention_mask, local_size=local_size)
        kwargs["allow_is_causal_skip"] = False
        return masking_utils.sdpa_mask(batch_size, q_length, kv_length, q_offset, **kwargs)
    if mask_function is not masking_utils.causal_mask_function:
        raise ValueError("HiP attention cannot do packed sequences, bidirectional attention or other masks")
    model = transformers.MODEL_MAPPING.get(type(config), None)
    if not getattr(model, "_can_set_attn_implementation", lambda: True)():
        raise ValueError(f"HiP cannot reach the attention of {config.model_type} models, which is their own")
    T = int(q_offset) + q_length
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, T, dtype=torch.bool, device=kwargs.get("device"))
    if attention_mask.shape[1] < T:
        raise ValueError(f"attention_mask must cover all {T} tokens, not the last {attention_mask.shape[1]}")
    return None if T == kv_length and attention_mask.all() else attention_mask[:, :T]
