"""HiP in the library transformers with keys and values elsewhere: in host memory, or in a file.

    from hip_offload_transformers import HiPOffloadedCache

    cache = HiPOffloadedCache(model.config, max_tokens=100_000, store="disk")
    model.generate(**tokenizer(text, return_tensors="pt"), past_key_values=cache, max_new_tokens=100)

A layer of this cache hands over no keys but a handle, `Stored`, from which HiP takes the pages that it chose;
any other attention that touches the handle ends in a sentence.  Each row of a batch has an `OffloadedKVCache`
of its own in each layer, made with the first tokens, when sizes, dtype and device are known.  Padding is not
stored.  Layers with a sliding window of their own keep that window, as the library does it.

While a layer reads a prompt, its keys and values are on the device, all of them; then they are written, once.
For another piece of a prompt all that it has is brought in again, and in `dense_layers` at every step.

Refused: any attention but HiP's, more tokens than the cache was made for, other rows, padding, settings or
model than it began with, beam and assisted search, `crop`, copies, going on where an error cut a call short.
"""

from __future__ import annotations

import torch
from hip_transformers import HiPConfig, hip, kernels, not_compiled
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class HiPOffloadedCache(DynamicCache):
    """For `past_key_values`: up to max_tokens of a text, or of each text of a batch with its padding.

    config: the model's.  store, folder, resident_tokens: as `OffloadedKVCache`, whose bound counts for each
    row by itself.  `reset()` empties it for another text.  ValueError when it cannot be.
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

    is_croppable = supports_early_init = False

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

    def refuse(self, *args, **kwargs):
        raise ValueError(
            "HiPOffloadedCache can do no beam search, assisted generation, crop or copy: "
            "use a cache of the library"
        )

    crop = reorder_cache = batch_repeat_interleave = batch_select_indices = __reduce_ex__ = refuse


class Stored:
    """A layer's keys and values, which `hip_transformers.attention` alone can read.

    rows: of each row of the batch a store of its real tokens.  new: keys and values (B, Hkv, Tq, D) that are
    still to be stored.  hip_memory: what `attention` left here, None before it, or when it came to no end.
    """

    def __init__(self, max_tokens: int, *settings):
        self.max_tokens, self.settings = max_tokens, settings
        self.rows, self.new, self.hip_memory = [], None, None

    def __getattr__(self, name: str):
        raise ValueError(
            'HiPOffloadedCache can be read by attn_implementation="hip" alone: set that, or use another cache'
        )

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
                with torch.inference_mode(False):  # tensors made in that mode cannot be written outside
                    self.rows = [
                        cache(shape, H, cfg.decoding, k.dtype, k.device, *self.settings) for _ in range(B)
                    ]
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
