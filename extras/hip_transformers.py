"""HiP attention in the causal models of the library transformers, under the name "hip".

    from hip_transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="hip")
    model.config.hip = HiPConfig(top_k=1024)  # may be missing, or a dict of fields
    print(tokenizer.decode(model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=100)[0]))

The rows of a batch are read as by `model.py`, cut to their real tokens; those of one length together, others
one by one.  Each piece of a prompt has a dense tail, for nobody says which is the last, so pieces of
`dense_tail` or fewer tokens are dense.
Layers with a sliding window of their own keep it.

The library hands over keys and values, but no cache.  The keys *are* what the cache holds, though, be it a
tensor or the handle of hip_offload_transformers.py: what a layer remembers of a generation is an attribute of
that, where a hook finds it before the next call.  It dies with the cache.  Whatever else touches cached keys
(beam search reorders, `crop` cuts) leaves a new tensor without it, and the next step searches afresh.

Refused: gradients, dropout, bidirectional, cross and chunked attention, masks and biases of one's own, sinks,
soft-caps, packed sequences, paged caches.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hip  # noqa: E402
from hip import HiPConfig, Selection  # noqa: E402
from model import MEMORY_QUERIES, cut, first_memory  # noqa: E402

try:
    import transformers
    from transformers import masking_utils
except ImportError as error:
    raise ValueError(f"HiP needs transformers 5.17 or later ({error})") from error
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17):
    raise ValueError(f"HiP needs transformers 5.17 or later, not {transformers.__version__}")

# tensors that come along and leave attention as it is; any other may be sinks, a bias, an index, ...
HARMLESS = ("position_ids", "cache_position", "token_type_ids", "mm_token_type_ids", "num_items_in_batch")
not_compiled = torch.compiler.disable(reason="HiP's search depends on the data: compile without fullgraph")
logger = transformers.logging.get_logger(__name__)
found = threading.local()  # from the hook to the attention call that follows in the same thread


def register() -> None:
    """Make "hip" a name for `attn_implementation`, and `hip` an attribute of configs that is checked."""
    transformers.AttentionInterface.register("hip", attention)
    transformers.AttentionMaskInterface.register("hip", mask)
    transformers.PreTrainedConfig.hip = property(get_hip, set_hip, delete_hip)


def checked(cfg: HiPConfig | dict | None, make: Callable) -> HiPConfig | None:
    """What `config.hip` stands for, made by HiPConfig or `remembered`.  ValueError for what it cannot be."""
    try:
        return cfg if cfg is None or isinstance(cfg, HiPConfig) else make(**cfg)
    except TypeError as error:
        raise ValueError(f"config.hip must be a HiPConfig or a dict of its fields, not {cfg!r}") from error


# asked for by every layer at every step
remembered = functools.lru_cache(typed=True)(HiPConfig)


def get_hip(config: transformers.PreTrainedConfig) -> HiPConfig | None:
    """`config.hip`, which is kept as a dict of fields, for that can be printed and saved."""
    if "hip" not in vars(config):
        raise AttributeError("hip")
    return checked(vars(config)["hip"], remembered)


def set_hip(config: transformers.PreTrainedConfig, cfg: HiPConfig | dict | None) -> None:
    """Of a model, and of the models that it is made of: attention knows the config of its own alone."""
    checked(cfg, HiPConfig)
    vars(config)["hip"] = dict(vars(cfg)) if isinstance(cfg, HiPConfig) else cfg
    for part in vars(config).values():
        if isinstance(part, transformers.PreTrainedConfig):
            part.hip = cfg


def delete_hip(config: transformers.PreTrainedConfig) -> None:
    vars(config).pop("hip", None)
    for part in vars(config).values():
        if isinstance(part, transformers.PreTrainedConfig):
            del part.hip


def settings(config: transformers.PreTrainedConfig) -> HiPConfig:
    return getattr(config, "hip", None) or HiPConfig()


@functools.cache
def decoding(cfg: HiPConfig) -> HiPConfig:
    return cfg.decoding


def kernels(device: torch.device, head_size: int) -> ModuleType:
    """Triton's on a GPU where triton is installed, for the head sizes that they take, else the reference."""
    fast = device.type == "cuda" and importlib.util.find_spec("triton")
    lib = importlib.import_module("hip_triton" if fast else "hip")
    if fast and head_size not in lib.HEAD_SIZES:
        sizes = f"head sizes of {', '.join(map(str, lib.HEAD_SIZES))}, not {head_size}"
        logger.warning_once(f"HiP's Triton kernels take {sizes}: hip.py takes their place, more slowly")
        return hip
    return lib


def read(row: tuple | None, q: Tensor, past: list, cfg: HiPConfig, scale: float | None, dense: bool) -> tuple:
    """Attention of rows, q (B, H, Tq, D) at the end of T tokens, as model.py's `Context` does it: (o, row).

    row: what decoding remembers, a selection and the steps since the prompt; None if this is a prompt.
    past: keys and values (B, Hkv, T, D), in decoding also an offloaded cache's `hip.Pages`.  dense: whether
    the layer is.
    """
    (k, v), (selection, steps), lib, out = past, row or (None, 0), kernels(q.device, q.shape[3]), []
    Tq, T, unit = q.shape[2], k.shape[2], max(cfg.block_q, hip.PIECE * (1 if q.device.type == "cpu" else 8))
    body = Tq if row else max(0, Tq - cfg.dense_tail)
    if body and not dense:
        own = decoding(cfg) if row else cfg
        if body < Tq:
            k, v = (x[:, :, : T - Tq + body] for x in past)
        if steps % cfg.refresh_interval == 0:
            previous = selection if cfg.memory else None
            selection = lib.select_blocks(q[:, :, :body], k, own, previous, scale=scale)
        out.append(lib.sparse_attention(q[:, :, :body], k, v, selection, own, scale=scale))
    for a, b in [*(cut(0, body, unit) if dense else []), *cut(body, Tq, unit)]:
        k, v = (x[:, :, : T - Tq + b] for x in past)
        out.append(hip.dense_attention(q[:, :, a:b], k, v, scale=scale))
    if row:
        return torch.cat(out, 2), (selection, steps + 1)
    selection = first_memory(q[:, :, -MEMORY_QUERIES:], past[0], cfg, scale=scale) if cfg.memory else None
    return torch.cat(out, 2), (selection, 0)


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
    cfg, Tq, stored = settings(module.config), query.shape[2], not isinstance(key, Tensor)
    refuse(module, query, attention_mask, kwargs | dict(dropout=dropout, rope_clip=cfg.rope_clip))
    if attention_mask is not None and attention_mask.ndim == 4:  # a sliding window
        own = transformers.AttentionInterface()["sdpa"]
        return own(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if find_memory not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(find_memory, with_kwargs=True)
    memory, found.memory = getattr(found, "memory", None), None
    T = key.length + Tq if stored else key.shape[2]
    T = T if attention_mask is None else attention_mask.shape[1]  # tokens read
    # a memory is good for its own layer and settings, if nothing was read since
    good = memory is not None and memory[0] == (id(module), cfg, T - Tq)
    rows = list(memory[1]) if good else [(None, 0)] * len(query)
    prompt, dense = Tq > 1 or T == 1, module.layer_idx < cfg.dense_layers
    cache, (key, value) = key, key.begin(query, attention_mask, cfg, good) if stored else (key, value)
    out = torch.zeros_like(query)  # zeros come out for padding
    for members, n, new in groups(rows, attention_mask, T, Tq, alone=stored):
        at = slice(members[0], members[-1] + 1) if members[-1] - members[0] < len(members) else members
        q = query[at][:, :, new]
        past = [x[at][:, :, new if stored else n] for x in (key, value)]
        past = cache.add(members[0], *past, prompt or dense) if stored else past
        (first, steps), chosen = rows[members[0]], [rows[b][0] for b in members]
        first = first and Selection(torch.cat([x.blocks for x in chosen]), first.window_start)
        out[at, :, new], (first, steps) = read(
            None if prompt else (first, steps), q, past, cfg, scaling, dense
        )
        for i, b in enumerate(members):
            rows[b] = first and Selection(first.blocks[i : i + 1], first.window_start), steps
    cache.hip_memory = (id(module), cfg, T), rows
    return out.transpose(1, 2), None


def groups(rows: list, mask: Tensor | None, T: int, Tq: int, alone: bool) -> Iterator[tuple]:
    """Rows of a batch that can be read together: their numbers, and which tokens and which queries are real.

    They have as many real tokens, behind padding if there is any, and a selection of the same age.  Rows with
    padding elsewhere, and `alone`, come one by one.
    """
    left = mask is None or bool((mask[:, 1:] >= mask[:, :-1]).all())
    found: dict[tuple, list[int]] = {}
    counts = [(T, Tq)] * len(rows)
    if mask is not None:
        counts = list(zip(mask.sum(1).tolist(), mask[:, -Tq:].sum(1).tolist(), strict=True))
    for b, (selection, steps) in enumerate(rows):
        alike = steps, selection and selection.blocks.shape, b if alone or not left else -1
        if counts[b][1]:
            found.setdefault((*counts[b], *alike), []).append(b)
    for (n, new, *_), members in found.items():
        seen = (slice(T - n, T), slice(Tq - new, Tq)) if left else (mask[members[0]], mask[members[0], -Tq:])
        yield members, *seen


def refuse(module: nn.Module, query: Tensor, attention_mask: Tensor | None, kwargs: dict) -> None:
    """ValueError, in one sentence, for what HiP would get wrong."""
    own_mask, packed = attention_mask is not None and attention_mask.ndim != 2, False
    position = kwargs.get("position_ids")
    if position is not None and position.ndim == 2 and not own_mask:
        real = torch.ones_like(position) if attention_mask is None else attention_mask[:, -query.shape[2] :]
        packed = ((position.diff() < 1) & real[:, 1:] & real[:, :-1]).any()
    for cause, here in {
        **{name: isinstance(x, Tensor) and name not in HARMLESS for name, x in kwargs.items()},
        "rope_clip, for keys come rotated": kwargs["rope_clip"],
        "dropout": kwargs["dropout"],
        "gradients (missing: torch.no_grad())": torch.is_grad_enabled() and query.requires_grad,
        "attention that is not causal": False in (getattr(module, "is_causal", 1), kwargs.get("is_causal")),
        "a mask or bias of one's own, or attention in chunks": own_mask and not kwargs.get("sliding_window"),
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
