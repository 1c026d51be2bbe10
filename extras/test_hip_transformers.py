"""HiP in models of the library transformers: the same numbers as the library's attention and as model.py.

    python -m pytest extras/test_hip_transformers.py

All models but one are tiny and random.  "Alone" is model.py's `Context`, which reads one row without padding.
"""

import copy
import functools
import gc
import importlib.util
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StaticCache,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import hip_transformers  # noqa: E402
from hip_transformers import HiPOffloadedCache, OffloadedLayer  # noqa: E402

import generate as command  # noqa: E402
import hip  # noqa: E402
import model as llama  # noqa: E402
from hip import HiPConfig  # noqa: E402

hip_transformers.register()
settings.register_profile("hip", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("hip")
COVERS = HiPConfig(top_k=256, block_k=8, block_q=16, window=16, sink=4, dense_tail=10)  # 290 tokens and more
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


def changed(cfg, **fields):
    return HiPConfig(**vars(cfg) | fields)


SMALL = changed(COVERS, top_k=32, stride_k=2, dense_tail=5, refresh_interval=4, early_factor=1)


def change(thing, **fields):
    vars(thing).update(fields)


def tiny(name="llama", **fields):
    """A random model of the library, with attention by HiP."""
    sizes = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes | fields)).eval()
    for key, x in model.named_parameters():  # norms and biases must not be ones and zeros
        x.data = torch.randn_like(x) * (0.2 if x.ndim == 2 else 0.5) + ("norm" in key)
    model.set_attn_implementation("hip")
    model.config.hip = SMALL
    return model


def read_alone(theirs, cfg, tokens, T):
    """Logits by model.py with the same weights: T tokens of prompt (1, T + steps), then decoding."""
    c = theirs.config
    config = llama.ModelConfig(
        c.model_type,
        c.hidden_size,
        c.num_hidden_layers,
        c.num_attention_heads,
        c.num_key_value_heads,
        theirs.model.layers[0].self_attn.head_dim,
        c.intermediate_size,
        c.vocab_size,
        512,
        c.rms_norm_eps,
        c.rope_parameters["rope_theta"],
        (),
        False,
    )
    weights = {key.removeprefix("model."): x.detach() for key, x in theirs.state_dict().items()}
    context = llama.Context(llama.Llama(config, weights), tokens.shape[1], cfg)
    parts = [context.prefill(tokens[:, :T]), *map(context.decode, tokens[:, T:].split(1, 1))]
    return context.model.logits(torch.cat(parts, 1))


@contextmanager
def watched():
    """Every call of HiP's attention function: what came, from a handle what is new, and what it returned."""
    calls = []

    def attention(module, q, key, value, mask, **kwargs):
        k, v = (key, value) if isinstance(key, torch.Tensor) else key.new
        T = k.shape[2] if mask is None else mask.shape[1]
        k, v = k[:, :, :T].clone(), v[:, :, :T].clone()
        output = hip_transformers.attention(module, q, key, value, mask, **kwargs)
        calls.append(SimpleNamespace(q=q, k=k, v=v, o=output[0].transpose(1, 2)))
        return output

    AttentionInterface.register("hip", attention)
    yield calls
    hip_transformers.register()


class OneLayer:
    """A model of one layer for model.py's Context: a "token" is its queries, keys and values."""

    def __init__(self, q, k):
        (_, H, _, D), Hkv = q.shape, k.shape[1]
        self.config = SimpleNamespace(layers=1, heads=H, kv_heads=Hkv, head_size=D)
        self.dtype, self.device, self.heads = q.dtype, q.device, [H, Hkv, Hkv]

    def embed(self, x):
        return x.clone()

    def project(self, layer, x, ops):
        return x.unflatten(2, (sum(self.heads), -1)).transpose(1, 2)

    def behind(self, layer, x, o, ops):
        x[..., : o.shape[1] * o.shape[3]] = o.transpose(1, 2).flatten(2)

    def norm(self, name, x):
        return x.unflatten(2, (sum(self.heads), -1)).transpose(1, 2)[:, : self.heads[0]]

    def rope(self, start, end):
        return ()


def attend_alone(calls, layer, b, seen, sizes, cfg, offload=None):
    """Row b of a layer's calls, and model.py's Context on its real tokens, seen (T,): (output, expected)."""
    cfg, start = changed(cfg, dense_layers=int(layer < cfg.dense_layers)), 0
    context = llama.Context(OneLayer(calls[0].q, calls[0].k), len(seen), cfg, offload=offload)
    for i, call in enumerate(calls):
        Tq = call.q.shape[2]
        real, start = seen[start : start + Tq], start + Tq
        q, k, v, o = (x[b : b + 1, :, -Tq:][:, :, real] for x in (call.q, call.k, call.v, call.o))
        if real.any():
            x = torch.cat([q, k, v], 1).transpose(1, 2).flatten(2)
            yield o, (context.prefill if i < len(sizes) else context.decode)(x)


def offloaded(model, max_tokens=400, **fields):
    return HiPOffloadedCache(model.config, max_tokens, **fields)


CACHES = [pytest.param(lambda model: DynamicCache(), id="resident"), pytest.param(offloaded, id="offloaded")]


def some_tokens(*shape, seed=0):  # but 0, which generate takes for padding
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed))


TEXT = some_tokens(1, 50)
LEAST = (1 + 4 + 5) * 8 + 2 * 4 * 8  # SMALL's sink, chosen and window for attention, one round of the search
STORES = [dict(store="host"), dict(store="disk", resident_tokens=LEAST)]


@torch.no_grad()
def read(model, tokens, sizes, mask=None, cache=None):
    """Logits of tokens (B, T) read in pieces of these sizes, then one by one; mask (B, T) False: padding."""
    cache = DynamicCache() if cache is None else cache
    parts, start = [], cache.get_seq_length()
    for piece in tokens.split([*sizes, *[1] * (tokens.shape[1] - sum(sizes))], 1):
        end = start + piece.shape[1]
        more = (
            {}
            if mask is None
            else dict(
                attention_mask=mask[:, :end].long(),
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, start:end],
            )
        )
        parts.append(model(piece, past_key_values=cache, **more).logits)
        start = end
    return torch.cat(parts, 1)


def together(actions):
    threads = [threading.Thread(target=action) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.fixture(autouse=True, scope="module")
def one_thread():  # is faster for such small models, and much so beside other work
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def searches(monkeypatch):
    """Every search from now on: [(q, previous, result)]."""
    calls, search, oracle = [], hip.select_blocks, hip.oracle_blocks

    def select_blocks(q, k, cfg, previous=None, **more):
        calls.append((q, previous, search(q, k, cfg, previous, **more)))
        return calls[-1][2]

    def oracle_blocks(*how, **named):  # whose search is none of these
        with monkeypatch.context() as inside:
            inside.setattr(hip, "select_blocks", search)
            return oracle(*how, **named)

    monkeypatch.setattr(hip, "select_blocks", select_blocks)
    monkeypatch.setattr(hip, "oracle_blocks", oracle_blocks)
    return calls


@pytest.fixture
def proper(monkeypatch):
    """HiP proper also for queries that `covered` lets attend densely."""
    monkeypatch.setattr(hip_transformers, "covered", lambda *_: 0)


# --- the same as the library, and as model.py --------------------------------------------------------------

LAYERS = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": {},
    "mistral": dict(sliding_window=None),
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "smollm3": {},
    "mixtral": dict(sliding_window=None),
    "gpt2": {},
    "granite": dict(attention_multiplier=0.4),
    "qwen2 sliding": dict(sliding_window=40, layer_types=LAYERS, use_sliding_window=True),
    "gemma3_text": dict(sliding_window=40, layer_types=LAYERS[::-1], head_dim=32),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_its_own_attention_where_the_budget_covers_the_context(name, searches, proper):
    model = tiny(name.split()[0], **FAMILIES[name])
    model.config.hip = COVERS
    tokens, mask = some_tokens(2, 150), torch.ones(2, 150, dtype=torch.long)
    mask[0, :70] = 0
    results = {}
    for implementation in ("sdpa", "hip"):  # live
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results[implementation] = [
                (
                    model.generate(tokens, attention_mask=m, max_new_tokens=20, **GREEDY),
                    model(tokens, attention_mask=m).logits[m.bool()],
                )
                for m in (torch.ones_like(mask), mask)
            ]
        assert bool(searches) == (implementation == "hip")
    for (tokens, logits), (same, expected) in zip(*results.values(), strict=True):
        assert torch.equal(tokens, same)
        close(logits, expected)


@pytest.mark.parametrize("sliding_window", [50, 300])
def test_layers_with_a_sliding_window_keep_it_even_while_it_covers_the_text(searches, sliding_window):
    model = tiny("mistral", sliding_window=sliding_window)
    ours = read(model, some_tokens(1, 210), [200])
    model.set_attn_implementation("sdpa")
    close(ours, read(model, some_tokens(1, 210), [200], mask=torch.ones(1, 210, dtype=torch.bool)))
    assert not searches


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(memory=False),
        dict(dense_layers=1),
        dict(dense_tail=0),
        dict(per_head=True, score="max"),
        dict(early_factor=2),
    ],
)
def test_a_model_reads_and_decodes_as_model_py_does(name, fields):
    model, tokens = tiny(name), some_tokens(1, 345)
    model.config.hip = cfg = changed(SMALL, **fields)
    ours, expected = read(model, tokens, [333]), read_alone(model, cfg, tokens, 333)
    dense = read_alone(model, changed(cfg, dense_layers=9), tokens, 333)
    same, sparse = ((x - expected).abs().amax(-1)[0, 100:] for x in (ours, dense))
    # rounding differs between the two, so two blocks that score alike may swap, which some positions see
    assert (same < 1e-4).float().mean() > 0.8 and (sparse > 0.01).float().mean() > 0.8


@st.composite
def batches(draw):
    """(tokens, mask, sizes of the prompt's pieces, settings) of a padded batch, six steps of decoding."""
    T, side = draw(st.integers(1, 260)), draw(st.sampled_from(["left", "right"]))
    sizes = list(map(len, torch.arange(T).split(draw(st.sampled_from([16, 40, 64, 260])))))
    assume(sizes[-1] > 1 or T == 1)  # a last piece of one token is read as a decoding step
    lengths = [T, *draw(st.lists(st.one_of(st.just(T), st.integers(1, T)), max_size=2))]
    place = torch.arange(T) if side == "right" else torch.arange(T).flip(0)
    mask = torch.nn.functional.pad(place < torch.tensor(lengths)[:, None], (0, 6), value=True)
    cfg = changed(
        SMALL,
        dense_tail=draw(st.sampled_from([0, 5, 15])),
        memory=draw(st.booleans()),
        dense_layers=draw(st.sampled_from([0, 0, 1])),
        block_q=draw(st.sampled_from([4, 16])),
    )
    return some_tokens(len(lengths), T + 6, seed=T), mask, sizes, cfg


@given(batches())
def test_every_row_of_a_padded_batch_in_chunks_is_that_row_alone_read_as_by_model_py(batch):
    tokens, mask, sizes, cfg = batch
    model = tiny()
    model.config.hip = cfg
    with watched() as calls:
        read(model, tokens, sizes, mask)
    for b, seen in enumerate(mask):
        for layer in (0, 1):
            for output, expected in attend_alone(calls[layer::2], layer, b, seen, sizes, cfg):
                torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_rows_of_as_many_tokens_are_read_together(model, searches):
    lengths = torch.tensor([200, 150, 200, 200])
    mask = (torch.arange(200).flip(0) < lengths[:, None]).long()
    model.generate(some_tokens(4, 200), attention_mask=mask, max_new_tokens=5, **GREEDY)
    layers = model.config.num_hidden_layers
    assert [len(q) for q, *_ in searches[: 2 * layers]] == [3, 1] * layers  # in the prompt
    assert [len(q) for q, *_ in searches[2 * layers :]] == [3, 1] * layers  # in decoding


def test_a_scale_of_the_models_own_is_that_of_search_and_memory_too():
    model = tiny("granite", attention_multiplier=0.4)
    with watched() as calls:
        read(model, some_tokens(1, 345), [333])
    for call in calls:
        call.q *= 0.4 * 16**0.5  # then the usual scale is as good
    for layer in (0, 1):
        seen = torch.ones(345, dtype=torch.bool)
        for output, expected in attend_alone(calls[layer::2], layer, 0, seen, [333], SMALL):
            close(output, expected)


# --- generations and what they remember --------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("block_q", [4, 16])
def test_decoding_searches_every_refresh_interval_from_the_selection_before(searches, memory, block_q):
    model = tiny()
    model.config.hip = changed(SMALL, memory=memory, block_q=block_q)
    with watched() as calls:
        read(model, some_tokens(1, 352), [160, 178, 4])
    # the first 64 queries, whom the budget covers, and the last piece are dense
    rows = 4 if memory else 1  # that search together
    assert [q.shape[2] for q, *_ in searches] == [91, 91, 173, 173] + [
        rows
    ] * 6  # steps 0, 4, 8 of two layers
    every = [torch.cat([call.q for call in calls[layer::2]], 2) for layer in (0, 1)]
    for i, (q, *_) in enumerate(searches[4:]):
        assert torch.equal(q, every[i % 2][:, :, : 342 + i // 2 * 4 + 1][:, :, -rows:])
    for i, (_, previous, _) in enumerate(searches[4:]):
        if not memory:
            assert previous is None
        elif i > 1:
            assert torch.equal(previous.blocks, searches[4 + i - 2][2].blocks)
        else:
            assert_exact(previous, calls[4 + i].q, calls[4 + i].k)


def test_decoding_behind_a_prompt_of_one_token_is_as_in_model_py(model):
    seen = torch.ones(70, dtype=torch.bool)
    with watched() as calls:
        read(model, some_tokens(1, 70), [1])
    for layer in (0, 1):
        for output, expected in attend_alone(calls[layer::2], layer, 0, seen, [1], SMALL):
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def assert_exact(selection, q, k):
    """It has the exact best blocks of each of the last queries."""
    n, T = min(16, q.shape[2]), k.shape[2]
    each = [
        hip.oracle_blocks(q[:, :, -j:][:, :, :1], k[:, :, : T - j + 1], SMALL).blocks for j in range(n, 0, -1)
    ]
    assert torch.equal(selection.blocks, torch.cat(each, 3))


def test_decoding_behind_a_second_prompt_starts_from_the_end_of_that_prompt(model, searches):
    cache = DynamicCache()
    read(model, some_tokens(1, 203), [200], cache=cache)
    with watched() as calls:
        read(model, some_tokens(1, 101, seed=1), [100], cache=cache)
    for layer in (0, 1):
        assert_exact(searches[layer - 2][1], calls[layer].q, calls[layer].k)


@pytest.mark.parametrize("new", CACHES)
def test_interleaved_generations_of_any_batch_size_are_each_as_if_alone(model, new):
    tokens = [some_tokens(1, 320), some_tokens(2, 320, seed=1), some_tokens(1, 320)]
    tokens[2][0, 100:200] = some_tokens(100, seed=2)  # same length and last tokens as the first
    caches = [new(model) for _ in tokens]
    expected = [read(model, x, [300], cache=new(model)) for x in tokens]
    ours = [[read(model, x[:, :300], [300], cache=cache)] for x, cache in zip(tokens, caches, strict=True)]
    for i in range(300, 320):
        for j in (0, 1, 2):
            ours[j].append(read(model, tokens[j][:, i : i + 1], [], cache=caches[j]))
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(torch.cat(one, 1), other)


@pytest.mark.parametrize("new", CACHES)
def test_generations_in_two_threads_are_each_as_if_alone(model, new):
    tokens = [some_tokens(1, 200, seed=seed) for seed in (0, 1)]

    def generate(i, results):
        options = GREEDY | dict(past_key_values=new(model), max_new_tokens=20)
        results[i] = model.generate(tokens[i], **options).tolist()

    expected, ours = {}, {}
    for i in (0, 1):
        generate(i, expected)
    together([lambda i=i: generate(i, ours) for i in (0, 1)])
    assert ours == expected


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: copy.copy(cache)])
def test_a_copied_cache_is_a_generation_of_its_own_that_remembers_the_common_start(model, copied, searches):
    start, tokens = some_tokens(1, 300), [some_tokens(1, 6, seed=seed) for seed in (1, 2)]
    expected = [read(model, torch.cat([start, x], 1), [300])[:, 300:] for x in tokens]
    first = DynamicCache()
    read(model, start, [300], cache=first)
    second = copied(first)
    second.layers = [copied(layer) for layer in first.layers]
    searches.clear()
    ours = [[], []]
    for i in range(6):
        for j, cache in enumerate([first, second]):
            ours[j].append(read(model, tokens[j][:, i : i + 1], [], cache=cache))
    assert all(torch.equal(torch.cat(x, 1), y) for x, y in zip(ours, expected, strict=True))
    assert all(previous is not None for _, previous, _ in searches)


def by_another_attention(model, cache):
    model.set_attn_implementation("sdpa")
    read(model, some_tokens(1, 1), [], cache=cache, mask=torch.ones(1, 204, dtype=torch.bool))
    model.set_attn_implementation("hip")


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(
    "what",
    [
        by_another_attention,
        lambda model, cache: change(model.config, hip=changed(SMALL, block_k=16)),
        lambda model, cache: cache.layers.reverse(),
    ],
)
def test_nothing_is_remembered_across_foreign_tokens_other_settings_or_layers(searches, static, what):
    model = tiny()
    cache = StaticCache(model.config, max_cache_len=300) if static else DynamicCache()
    read(model, some_tokens(1, 203), [200], cache=cache)
    what(model, cache)
    searches.clear()
    read(model, some_tokens(1, 1), [], cache=cache)
    assert [previous for _, previous, _ in searches] == [None, None]


def test_memory_dies_with_the_generation(model):
    cache = DynamicCache()
    read(model, some_tokens(1, 210), [200], cache=cache)
    selections = [weakref.ref(cache.layers[i].keys.hip_memory[1][0].selection.blocks) for i in (0, 1)]
    assert all(blocks() is not None for blocks in selections)
    del cache
    gc.collect()
    assert all(blocks() is None for blocks in selections)


@pytest.mark.parametrize("new", CACHES)
def test_a_second_prompt_may_follow_an_answer(model, new):
    parts = [some_tokens(1, n, seed=n) for n in (100, 9, 70, 9, 3, 9)]
    model.config.hip = COVERS
    cache = new(model)
    ours = [
        read(model, part, [n] if n > 9 or n == 3 else [], cache=cache)
        for part, n in zip(parts, (100, 9, 70, 9, 3, 9), strict=True)
    ]
    model.set_attn_implementation("sdpa")
    expected = read(model, torch.cat(parts, 1), [200])
    model.set_attn_implementation("hip")
    model.config.hip = SMALL
    close(torch.cat(ours, 1), expected)


def test_pieces_of_up_to_dense_tail_tokens_are_dense_behind_any_cache(model, searches):
    tokens, sizes = some_tokens(1, 203), [5] * 40 + [3]
    ours = read(model, tokens, sizes)
    model.set_attn_implementation("sdpa")
    expected = read(model, tokens, sizes)
    model.set_attn_implementation("hip")
    close(ours, expected)
    assert not searches


@pytest.mark.parametrize("padded", [False, True])
def test_generation_with_a_static_cache_is_generation_with_a_growing_one(model, padded):
    for T in (200, 150):  # the second time in the same cache
        mask = torch.ones(2, T, dtype=torch.long)
        mask[1, : 50 * padded] = 0
        options = GREEDY | dict(attention_mask=mask, max_new_tokens=20)
        expected = model.generate(some_tokens(2, T), **options)
        ours = model.generate(some_tokens(2, T), cache_implementation="static", **options)
        assert torch.equal(ours, expected)


def test_a_static_cache_needs_no_mask(model):
    expected, tokens = read(model, some_tokens(1, 210), [200]), some_tokens(1, 210)
    cache = StaticCache(model.config, max_cache_len=300)
    assert torch.equal(read(model, tokens, [200], cache=cache), expected)
    cache.reset()
    assert torch.equal(read(model, tokens, [200], cache=cache), expected)


@torch.no_grad()
def test_a_mask_may_reach_beyond_the_tokens_read(model):
    tokens = some_tokens(2, 100)
    longer = torch.ones(2, 130)
    longer[0, :20] = 0
    close(model(tokens, attention_mask=longer).logits, model(tokens, attention_mask=longer[:, :100]).logits)


@pytest.mark.parametrize("new", CACHES)
@pytest.mark.parametrize("chunk", [32, 64, 100])
def test_prefill_in_chunks_is_what_generate_does_with_a_chunk_size(model, chunk, new):
    options = GREEDY | dict(past_key_values=new(model), max_new_tokens=20)
    generated = model.generate(some_tokens(1, 200), prefill_chunk_size=chunk, **options)
    sizes = list(map(len, torch.arange(200).split(chunk)))
    logits = read(model, generated[:, :-1], sizes)
    assert torch.equal(logits[:, 199:].argmax(-1), generated[:, 200:])


def test_what_is_kept_of_a_prompt_is_small_and_the_blocks_are_found_by_the_first_step(model, monkeypatch):
    cache, found, first = DynamicCache(), [], hip_transformers.first_memory
    monkeypatch.setattr(
        hip_transformers,
        "first_memory",
        lambda q, k, *x, **y: found.append(k.shape[2]) or first(q, k, *x, **y),
    )
    read(model, some_tokens(1, 300), [150, 150], cache=cache)
    kept = [layer.keys.hip_memory[1][0].recent for layer in cache.layers]
    assert [x.untyped_storage().nbytes() for x in kept] == [4 * 16 * 16 * 4] * 2  # 16 queries of four heads
    assert not found
    read(model, some_tokens(1, 3), [], cache=cache)
    assert found == [300, 300]
    read(model, some_tokens(1, 70), [50])  # its first steps are dense
    assert found[2:] == [66, 66]  # where they end


def test_beam_search_searches_at_every_step_without_memory(model, searches):
    model.generate(some_tokens(1, 200), max_new_tokens=6, num_beams=3, **GREEDY)
    steps = [previous for q, previous, _ in searches if q.shape[2] == 1]
    assert steps == [None] * (5 * 2)  # of three beams together


def test_a_compiled_model_gives_the_same_tokens_and_fullgraph_is_refused():
    plain, compiled = tiny(), tiny()
    expected = plain.generate(some_tokens(1, 200), max_new_tokens=10, **GREEDY)
    compiled.forward = torch.compile(compiled.forward, backend="eager")
    assert torch.equal(compiled.generate(some_tokens(1, 200), max_new_tokens=10, **GREEDY), expected)
    whole = torch.compile(plain, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="compile without fullgraph"), torch.no_grad():
        whole(some_tokens(1, 200))


# --- every way to generate, every cache --------------------------------------------------------------------

WAYS = {  # options of generate; what the library has moved to the hub (dola, contrastive, ...) is not here
    "greedy": {},
    "sampling": dict(do_sample=True, top_k=20),
    "several samples": dict(do_sample=True, num_return_sequences=3),
    "beams": dict(num_beams=3),
    "sampled beams": dict(num_beams=3, do_sample=True),
    "an assistant": dict(assistant_model=tiny(num_hidden_layers=1)),
    "an assistant, sampling": dict(assistant_model=tiny(num_hidden_layers=1), do_sample=True),
    "its own first layer as assistant": dict(assistant_early_exit=1),
    "prompt look-up": dict(prompt_lookup_num_tokens=3),
    "guidance": dict(guidance_scale=1.5, negative_prompt_ids=some_tokens(1, 30, seed=1)),
    "penalties": dict(repetition_penalty=1.3, no_repeat_ngram_size=2),
    "pieces of a prompt": dict(prefill_chunk_size=64),
    "no cache": dict(use_cache=False),
    "static cache": dict(cache_implementation="static"),
    "quantized cache": dict(cache_implementation="quantized", cache_config=dict(backend="fp8")),
    "offloaded cache": dict(cache_implementation="offloaded"),  # the library's, of a GPU
    "offloaded static cache": dict(cache_implementation="offloaded_static"),
}


NO_SUCH_CACHE = AssertionError, ImportError, ValueError  # without a GPU, or in an older library


@pytest.mark.parametrize(
    "new, way",
    [(lambda model: None, way) for way in WAYS] + [(offloaded, way) for way in [*WAYS][:-5]],
)
def test_every_way_to_generate_gives_the_librarys_tokens_where_the_budget_covers(new, way, proper):
    options, results = GREEDY | WAYS[way] | dict(max_new_tokens=15), []
    model, text = tiny(), TEXT.repeat(1, 4)
    models = [model, *[x for x in options.values() if isinstance(x, LlamaForCausalLM)]]
    for implementation in ("sdpa", "hip"):
        for x in models:
            x.set_attn_implementation(implementation)
            x.config.hip = COVERS
        torch.manual_seed(0)
        cache = new(model) if implementation == "hip" else None
        try:
            results.append(model.generate(text, past_key_values=cache, **options))
        except NO_SUCH_CACHE as error:
            assert "cache_implementation" in options and implementation == "sdpa"
            pytest.skip(str(error))
    assert torch.equal(*results)


def rebuilt(cache):
    return DynamicCache([(layer.keys, layer.values) for layer in cache.layers])


def sliced(cache):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :100], layer.values[:, :, :100]


CHANGES = {  # what is done with a cache of two rows of 150 tokens; which of these go on, and how long
    "nothing": (lambda cache: None, [0, 1], 150),
    "cropped": (lambda cache: cache.crop(-37), [0, 1], 113),
    "cropped to nothing": (lambda cache: cache.crop(-150), [0, 1], 0),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1], 150),
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1], 150),
    "selected": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1], 150),
    "selected by a mask": (lambda cache: cache.batch_select_indices(torch.tensor([False, True])), [1], 150),
    "copied": (copy.deepcopy, [0, 1], 150),
    "sliced": (sliced, [0, 1], 100),
    "rebuilt": (rebuilt, [0, 1], 150),
}
KEPT = [*CHANGES][:-2]  # there are no tensors to slice in an offloaded cache


def behind(model, cache, change, n):
    """Logits of n tokens and an answer of nine behind a cache that was changed, and all tokens then read."""
    change, rows, T = CHANGES[change]
    cache = change(cache) or cache
    tokens = torch.cat([some_tokens(2, 150)[rows][:, :T], some_tokens(len(rows), n + 9, seed=n)], 1)
    return read(model, tokens[:, T:], [n], cache=cache), tokens


@pytest.mark.parametrize("n", [2, 10, 40])
@pytest.mark.parametrize(
    "new, change",
    [(DynamicCache, x) for x in CHANGES] + [(lambda: offloaded(tiny()), x) for x in KEPT],
)
def test_a_question_may_follow_behind_any_cache(model, new, change, n, proper):
    cache, model.config.hip = new(), COVERS
    read(model, some_tokens(2, 150), [150], cache=cache)
    ours, tokens = behind(model, cache, change, n)
    model.set_attn_implementation("sdpa")
    expected = read(model, tokens, [tokens.shape[1]])[:, -n - 9 :]
    model.set_attn_implementation("hip")
    model.config.hip = SMALL
    close(ours, expected)


@pytest.mark.parametrize("change", CHANGES)
def test_a_short_question_is_dense_behind_any_cache(model, change, searches):
    cache = DynamicCache()
    read(model, some_tokens(2, 150), [150], cache=cache)
    searches.clear()
    with watched() as calls:
        behind(model, cache, change, 5)
    assert len(searches) == 2 * 3 * (CHANGES[change][2] > 0)  # of nine decoding steps, behind more than 14
    for call in calls[:2]:
        close(call.o, hip.dense_attention(call.q, call.k, call.v))


@torch.no_grad()
def test_few_queries_may_have_a_mask_of_their_own(model):
    seen, results = torch.ones(1, 1, 5, 55, dtype=torch.bool), []
    seen[..., 50:] = torch.eye(5, dtype=torch.bool)  # five guesses at one next token
    for implementation in ("sdpa", "hip"):
        model.set_attn_implementation(implementation)
        cache = model(TEXT, past_key_values=DynamicCache()).past_key_values
        more = dict(attention_mask=seen, position_ids=torch.full((1, 5), 50), past_key_values=cache)
        results.append(model(some_tokens(1, 5), **more).logits)
    close(*results)


@pytest.mark.parametrize("change", KEPT)
@pytest.mark.parametrize("store", STORES)
def test_an_offloaded_cache_that_was_changed_goes_on_as_one_that_is_not_offloaded(model, change, store):
    results, text = [], some_tokens(2, 150)
    for cache in (DynamicCache(), offloaded(model, **store)):
        read(model, text, [130], cache=cache)  # with decoding, so that there are pages on the device
        results.append([behind(model, copy.deepcopy(cache), change, n)[0] for n in (1, 3, 40)])
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


def test_what_was_cropped_is_found_nowhere(model):
    text, other, results = some_tokens(1, 300), some_tokens(1, 120, seed=1), []
    for cache in (DynamicCache(), offloaded(model)):
        read(model, text, [200], cache=cache)
        cache.crop(-120)
        results.append(read(model, other, [], cache=cache))
    close(*results)


def test_copies_of_an_offloaded_cache_go_their_own_ways(model):
    cache, text = offloaded(model), some_tokens(1, 320)
    read(model, text[:, :300], [300], cache=cache)
    caches = [cache, copy.deepcopy(cache), copy.copy(cache)]
    caches[2].layers = [copy.copy(layer) for layer in cache.layers]
    answers = [some_tokens(1, 20, seed=seed) for seed in range(3)]
    ours = [[], [], []]
    for i in range(20):
        for j in range(3):
            ours[j].append(read(model, answers[j][:, i : i + 1], [], cache=caches[j]))
    for j in range(3):
        expected = read(model, torch.cat([text[:, :300], answers[j]], 1), [300])[:, 300:]
        close(torch.cat(ours[j], 1), expected)


# --- many requests at a time -------------------------------------------------------------------------------


needs_pages = pytest.mark.skipif(hip_transformers.VERSION < (5, 20), reason="needs transformers 5.20")


def batching(count=12, many=1, **fields):
    """Arguments of the library's continuous batching."""
    sampled = dict(do_sample=many > 1, num_return_sequences=many)
    return dict(
        generation_config=GenerationConfig(**sampled, eos_token_id=-1, pad_token_id=0, max_new_tokens=count),
        continuous_batching_config=ContinuousBatchingConfig(
            **dict(num_blocks=64, page_size=16, max_batch_tokens=2048, seed=0) | fields
        ),
    )


def batch(model, texts, many=1, **fields):
    """What the library's continuous batching answers to texts (lists of tokens)."""
    outputs = model.generate_batch(texts, **batching(many=many, **fields))
    assert [output.error for output in outputs.values()] == [None] * len(texts) * many
    return [output.generated_tokens for output in outputs.values()]


TEXTS = [some_tokens(1, T, seed=T)[0].tolist() for T in (200, 33, 1, 150, 201)]
TEXTS.append(TEXTS[0][:120] + TEXTS[3][:60])  # begins as another one does


@needs_pages
@pytest.mark.parametrize("name", ["llama", "qwen3", "granite", "gemma3_text", "qwen2 sliding"])
def test_many_requests_at_once_get_the_answers_of_one_by_one(name, searches):
    model = tiny(name.split()[0], **FAMILIES[name])
    for model.config.hip in (SMALL, changed(SMALL, dense_layers=1, memory=False)):
        expected = [answer(model, text) for text in TEXTS]
        searches.clear()
        assert batch(model, TEXTS) == expected
        assert searches or model.config.hip.dense_layers
    assert model.config._attn_implementation == "hip"


def answer(model, text, count=12):
    return model.generate(torch.tensor([text]), **GREEDY | dict(max_new_tokens=count))[
        0, len(text) :
    ].tolist()


@needs_pages
@pytest.mark.parametrize(
    "fields", [dict(max_batch_tokens=64), dict(num_blocks=20), dict(num_blocks=20, many=2)]
)
def test_prompts_in_pieces_and_requests_that_wait_get_the_librarys_answers_where_the_budget_covers(
    fields, proper
):
    model, results = tiny(), []
    model.config.hip = COVERS
    for implementation in ("sdpa", "hip"):
        model.set_attn_implementation(implementation)
        results.append(batch(model, TEXTS, **fields))
    assert results[0] == results[1]


@needs_pages
def test_a_request_decodes_from_its_pages_with_the_memory_that_it_has_alone(searches):
    model = tiny()
    answer(model, TEXTS[0])
    expected = [(q.shape, previous) for q, previous, _ in searches]
    searches.clear()
    batch(model, TEXTS[:1])
    for (shape, before), (q, previous, _) in zip(expected, searches, strict=True):
        assert shape == q.shape and (before is None) == (previous is None)
        assert before is None or torch.equal(before.blocks, previous.blocks)


@needs_pages
def test_a_name_that_is_used_again_inherits_no_memory(model, searches):
    text, steps = TEXTS[3], []
    with model.continuous_batching_context_manager(**batching()) as manager:
        # nine pages of the last one are there already, so it is one token
        for name, prompt in (("you", TEXTS[1]), ("me", text), ("me", text[:145])):
            manager.add_request(prompt, request_id=name, max_new_tokens=12)
            while not (result := manager.get_result(timeout=1)) or not result.is_finished():
                assert manager.is_running()
            steps.append([previous for q, previous, _ in searches if q.shape[2] < 5])
            searches.clear()
        memories = manager.batch_processor.cache.hip_memory
    assert steps[1][0] is not None and steps[2][:2] == [None, None] and steps[2][2] is not None
    assert [[*memory] for memory in memories.values()] == [["me"], ["me"]]


@needs_pages
def test_what_hip_cannot_do_fails_the_request_and_says_why():
    model = tiny("gemma2", head_dim=16, layer_types=["full_attention"] * 2)
    outputs = model.generate_batch([TEXTS[1]], **batching())
    assert ["HiP attention cannot do softcap" in output.error for output in outputs.values()] == [True]


def test_pages_without_a_cache_are_refused(model):
    model.set_attn_implementation("hip_paged")
    with pytest.raises(ValueError, match="is what generate_batch sets"), torch.no_grad():
        model(TEXT)
    model.set_attn_implementation("hip")


# --- keys and values elsewhere -----------------------------------------------------------------------------

NO_TAIL = changed(SMALL, dense_tail=0)  # then the plain path and this one do the very same


@settings(max_examples=20)
@given(batches(), st.sampled_from(STORES))
def test_every_row_of_an_offloaded_batch_is_that_row_alone_read_as_by_model_py(batch, store):
    tokens, mask, sizes, cfg = batch
    model = tiny()
    model.config.hip = cfg
    with watched() as calls:
        read(model, tokens, sizes, mask, cache=offloaded(model, tokens.shape[1], **store))
    for b, seen in enumerate(mask):
        for layer in (0, 1):
            for output, expected in attend_alone(calls[layer::2], layer, b, seen, sizes, cfg, store):
                torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("llama", torch.float32),
        ("qwen3", torch.float32),
        ("granite", torch.float32),
        ("llama", torch.bfloat16),
    ],
)
def test_logits_with_an_offloaded_cache_are_those_without(name, dtype, store):
    model, tokens = tiny(name, **FAMILIES[name]).to(dtype), some_tokens(2, 230)
    model.config.hip = NO_TAIL
    cache = offloaded(model, **store)
    assert torch.equal(read(model, tokens, [120, 90], cache=cache), read(model, tokens, [120, 90]))
    assert (cache.get_seq_length(), cache.get_max_length()) == (230, 400)
    on_disk = store["store"] == "disk"
    assert [(x.store.dtype, x.mapping is not None) for x in cache.stores] == [(dtype, on_disk)] * 4
    if dtype == torch.float32:  # the tail's rounding differs
        for model.config.hip in (SMALL, changed(SMALL, dense_layers=1)):
            close(read(model, tokens, [200], cache=offloaded(model, **store)), read(model, tokens, [200]))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    "options",
    [{}, dict(do_sample=True, num_return_sequences=3), dict(prefill_chunk_size=64), dict(dense_layers=1)],
)
def test_generation_with_an_offloaded_cache_gives_the_tokens_of_generation_without(options, store):
    model, mask, options = tiny(), torch.ones(2, 200, dtype=torch.long), dict(options)
    model.config.hip, mask[0, :50] = changed(SMALL, dense_layers=options.pop("dense_layers", 0)), 0
    results = []
    for cache in (None, offloaded(model, **store)):
        torch.manual_seed(0)
        results.append(
            model.generate(
                some_tokens(2, 200),
                attention_mask=mask,
                max_new_tokens=20,
                past_key_values=cache,
                **GREEDY | options,
            )
        )
    assert torch.equal(*results)


@pytest.mark.parametrize("store", STORES)
def test_a_conversation_with_an_offloaded_cache_is_that_without_padded_rows_too(model, store):
    results = []
    for cache in (DynamicCache(), offloaded(model, **store)):
        tokens, mask = some_tokens(2, 150), torch.ones(2, 150, dtype=torch.long)
        mask[1, :60] = 0
        for turn in (1, 2, 3):
            options = GREEDY | dict(attention_mask=mask, max_new_tokens=9, past_key_values=cache)
            tokens = torch.cat([model.generate(tokens, **options), some_tokens(2, 40, seed=turn)], 1)
            mask = torch.nn.functional.pad(mask, (0, 49), value=1)
        results.append(tokens)
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["qwen2 sliding", "gemma3_text"])
def test_only_layers_that_see_everything_are_offloaded(name):
    model, tokens = tiny(name.split()[0], **FAMILIES[name]), some_tokens(2, 210)
    cache = offloaded(model)
    ours = read(model, tokens, [120, 80], cache=cache)
    close(ours, read(model, tokens, [120, 80], cache=DynamicCache(config=model.config)))
    layers = dict(zip(model.config.layer_types, cache.layers, strict=True))
    assert isinstance(layers["full_attention"], OffloadedLayer) and len(cache.stores) == 2
    assert layers["sliding_attention"].keys.shape[2] == 39


@pytest.mark.parametrize("bound", [None, LEAST, 150])
def test_no_more_is_on_the_device_than_the_bound_allows(model, bound, monkeypatch):
    given, update = [], OffloadedLayer.update
    monkeypatch.setattr(
        OffloadedLayer,
        "update",
        lambda layer, k, v: given.extend([weakref.ref(k), weakref.ref(v)]) or update(layer, k, v),
    )
    cache = offloaded(model, resident_tokens=bound)
    read(model, some_tokens(2, 320), [300], cache=cache)
    assert len(given) == 2 * 2 * 21 and not any(x() is not None for x in given)
    assert len(cache.stores) == 4
    for store in cache.stores:
        assert 0 < store.resident_tokens() <= store.bound and store.bound == (bound or store.bound)
        slots = [bank.rows[0].shape[0] * bank.rows[0].shape[1] // 2 for bank in store.banks[0]]
        assert sum(slots) <= store.bound  # (heads * slots, tokens of a page, D) each
        assert store.counts()["attention_misses"] > 0


def test_a_prompt_is_written_once_and_nothing_is_brought_back(model):
    cache = offloaded(model)
    read(model, some_tokens(2, 200), [200], cache=cache)
    written = 2 * 2 * 200 * 16 * 4  # keys and values of two heads
    for store in cache.stores:
        counts = store.counts()
        assert counts.pop("moved_bytes") == written and not any(counts.values())


def test_stores_and_memory_die_with_the_cache_or_its_reset(model):
    def parts(cache):
        read(model, some_tokens(1, 210), [200], cache=cache)
        return [
            weakref.ref(x)
            for layer in cache.layers
            for x in (layer.keys, layer.keys.rows[0], layer.keys.hip_memory[1][0].selection.blocks)
        ]

    caches = [offloaded(model)]
    first = parts(caches[0])
    caches[0].reset()
    second = parts(caches[0])
    assert all(x() is None for x in first) and all(x() is not None for x in second)
    caches.clear()
    assert all(x() is None for x in second)


def test_an_emptied_cache_takes_another_text_and_other_settings():
    model = tiny()
    cache = offloaded(model)
    read(model, some_tokens(1, 210), [200], cache=cache)
    cache.reset()
    model.config.hip = changed(NO_TAIL, block_k=16)
    tokens = some_tokens(2, 300, seed=1)
    assert torch.equal(read(model, tokens, [290], cache=cache), read(model, tokens, [290]))


def test_inference_mode_may_be_left_and_entered_between_calls(model):
    tokens, cache = some_tokens(1, 320), offloaded(model)
    with torch.inference_mode():
        parts = [read(model, tokens[:, :200], [200], cache=cache)]
    parts.append(read(model, tokens[:, 200:310], [100], cache=cache))
    with torch.inference_mode():
        parts.append(read(model, tokens[:, 310:], [], cache=cache))
    close(torch.cat(parts, 1), read(model, tokens, [200, 100]))


def test_a_compiled_model_takes_an_offloaded_cache():
    plain, compiled = tiny(), tiny()
    compiled.forward = torch.compile(compiled.forward, backend="eager")
    options = GREEDY | dict(max_new_tokens=10)
    expected = plain.generate(some_tokens(1, 200), **options)
    ours = compiled.generate(some_tokens(1, 200), past_key_values=offloaded(compiled), **options)
    assert torch.equal(ours, expected)


UNTOUCHED = [  # what the sentence says, what is done with a cache of two rows of 200 tokens; step() decodes
    ('by attn_implementation="hip" alone', lambda m, c, step: m.set_attn_implementation("sdpa") or step()),
    ("set that, or use another", lambda m, c, step: m.set_attn_implementation("eager") or step()),
    ("other settings", lambda m, c, step: change(m.config, hip=changed(NO_TAIL, block_k=16)) or step()),
    ("another model", lambda m, c, step: read(tiny(), some_tokens(2, 1), [], cache=c)),
    ("max_tokens=215, too few for 216", lambda m, c, step: read(m, some_tokens(2, 16), [16], cache=c)),
    (r"rows of \[200, 150\] tokens, and not \[200\]", lambda m, c, step: m(TEXT[:, :1], past_key_values=c)),
    (r", and not \[200, 200\]", lambda m, c, step: m(some_tokens(2, 1), past_key_values=c)),
    ("do gradients", lambda m, c, step: torch.enable_grad()(step)()),
    ('by attn_implementation="hip" alone', lambda m, c, step: sliced(c)),
    ('by attn_implementation="hip" alone', lambda m, c, step: rebuilt(c)),
    ("crop wants minus", lambda m, c, step: c.layers[0].crop(1)),
    ("cannot be pickled: keep its text", lambda m, c, step: pickle.dumps(c)),
    (
        "a mask or bias of one's own",
        lambda m, c, step: m(
            TEXT[:1, :1].repeat(2, 1), past_key_values=c, attention_mask=torch.ones(2, 1, 1, 201) > 0
        ),
    ),
]


@pytest.mark.parametrize("words, do", UNTOUCHED)
def test_what_an_offloaded_cache_cannot_do_is_refused_and_leaves_it_untouched(words, do):
    model, mask = tiny(), torch.ones(2, 215, dtype=torch.bool)
    model.config.hip, mask[1, :50] = NO_TAIL, False
    tokens, cache = some_tokens(2, 215), offloaded(model, 215)
    expected = read(model, tokens, [200], mask)
    ours = [read(model, tokens[:, :200], [200], mask[:, :200], cache=cache)]

    def step(i=200):
        return model(
            tokens[:, i : i + 1],
            past_key_values=cache,
            attention_mask=mask[:, : i + 1].long(),
            position_ids=(mask.cumsum(1) - 1)[:, i : i + 1],
        ).logits

    with pytest.raises(ValueError, match=words) as error, torch.no_grad():
        do(model, cache, step)
    assert "\n" not in str(error.value)
    model.set_attn_implementation("hip")
    model.config.hip = NO_TAIL
    with torch.no_grad():
        ours += [step(i) for i in range(200, 215)]
    assert torch.equal(torch.cat(ours, 1)[mask], expected[mask])


@pytest.mark.parametrize(
    "words, fields, options",
    [
        ("max_tokens=205, too few for 206", dict(max_tokens=205), {}),
        ("max_tokens must be a whole number", dict(max_tokens="many"), {}),
        ("max_tokens must be .* at least 1", dict(max_tokens=0), {}),
        ("store must be host or disk", dict(store="dsk"), {}),
        (r"at least 144, .*not 143 \(for one layer of one row\)", dict(resident_tokens=143), {}),
        ("cannot be had in /no/such: No such", dict(store="disk", folder="/no/such"), {}),
        ("GB of host memory: too much", dict(max_tokens=10**15), {}),
    ],
)
def test_generation_that_an_offloaded_cache_cannot_do_is_refused_in_a_sentence(model, words, fields, options):
    options = GREEDY | dict(max_new_tokens=9) | options
    with pytest.raises(ValueError, match=words) as error:
        model.generate(some_tokens(1, 200), past_key_values=offloaded(model, **fields), **options)
    assert "\n" not in str(error.value)


def test_an_offloaded_cache_for_layers_of_another_kind_is_refused():
    config = AutoConfig.for_model("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"])
    with pytest.raises(ValueError, match="no place for layer 0, which needs a LinearAttentionLayer"):
        HiPOffloadedCache(config, 100)


ERRORS = {  # where an error comes up: in which function, after how many calls of it
    "in the first layer's attention": ("sparse_attention", 0),
    "behind it": ("forward", 0),
    "in the last layer's, for its second row": ("sparse_attention", 3),
    "while the second row is stored": ("append", 1),
    "while the last layer is stored": ("append", 2),
}


@pytest.mark.parametrize("where", ERRORS)
@pytest.mark.parametrize("T", [200, 1])
def test_a_cache_in_which_an_error_cut_a_call_short_is_refused_until_it_is_emptied(monkeypatch, where, T):
    model, tokens, (name, countdown) = tiny(), some_tokens(2, 221), ERRORS[where]
    model.config.hip = NO_TAIL
    cache = offloaded(model)
    owner = dict(forward=model.model.layers[0].mlp, append=hip.OffloadedKVCache).get(name, hip)
    whole = getattr(owner, name)

    def broken(*args, **kwargs):
        nonlocal countdown
        countdown -= 1
        if countdown == -1:
            raise OSError("no luck")
        return whole(*args, **kwargs)

    if T == 1:
        read(model, tokens[:, :220], [220], cache=cache)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no luck"):
        patch.setattr(owner, name, broken)
        read(model, tokens[:, :T], [T], cache=cache)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"an error cut a call with .* short: reset\(\) it"):
            read(model, tokens[:, :T], [T], cache=cache)
    cache.reset()
    assert torch.equal(read(model, tokens, [220], cache=cache), read(model, tokens, [220]))


# --- what is refused ---------------------------------------------------------------------------------------

POSITIONS = torch.cat([torch.arange(20), torch.arange(30)])[None]  # of two sequences in one row
NINE = GREEDY | dict(max_new_tokens=9)
REFUSED = {  # what the sentence says: the model, what is done with it
    "dropout": (dict(attention_dropout=0.1), lambda m: m.train()(TEXT)),
    "gradients": ({}, lambda m: torch.enable_grad()(m)(TEXT)),
    "not causal": ({}, lambda m: change(m.model.layers[0].self_attn, is_causal=False) or m(TEXT)),
    "bidirectional attention": ({}, lambda m: change(m.config, is_causal=False) or m(TEXT)),
    "a mask or bias of one's own": ({}, lambda m: m(TEXT, attention_mask=torch.zeros(1, 1, 50, 50))),
    "attention in chunks": (dict(name="llama4_text", attention_chunk_size=40), lambda m: m(TEXT)),
    "do softcap": (dict(name="gemma2", head_dim=16, layer_types=["full_attention"] * 2), lambda m: m(TEXT)),
    "s_aux": (dict(name="gpt_oss", head_dim=16), lambda m: m(TEXT)),
    "output_attentions": ({}, lambda m: m(TEXT, output_attentions=True)),
    "do packed sequences:": ({}, lambda m: m(TEXT, position_ids=POSITIONS)),
    "do packed sequences: ": ({}, lambda m: m(TEXT, position_ids=POSITIONS, attention_mask=POSITIONS < 29)),
    "do packed sequences,": ({}, lambda m: m(TEXT, position_ids=POSITIONS, use_cache=False)),
    "must cover all 100 tokens": (
        {},
        lambda m: m(TEXT, past_key_values=m(TEXT).past_key_values, attention_mask=torch.ones_like(TEXT)),
    ),
    "of bloom models": (
        dict(name="bloom"),
        lambda m: change(m.config, _attn_implementation_internal="hip") or m(TEXT),
    ),
    "layer_idx": ({}, lambda m: change(m.model.layers[0].self_attn, layer_idx=None) or m(TEXT, use_cache=0)),
    "rope_clip": ({}, lambda m: change(m.config, hip=dict(rope_clip=64)) or m(TEXT)),
    "beam is gone: .* so set top_k instead": ({}, lambda m: change(m.config, hip=dict(beam=2)) or m(TEXT)),
    "config.hip has no field 'topk', but top_k": (
        {},
        lambda m: change(m.config, hip=dict(topk=64)) or m(TEXT),
    ),
    "config.hip must be a": ({}, lambda m: change(m.config, hip="fast") or m(TEXT)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_hip_cannot_do_is_refused_in_a_sentence(words):
    fields, do = REFUSED[words]
    model = tiny(**fields)
    with pytest.raises(ValueError, match=words) as error, torch.no_grad():
        do(model)
    assert "\n" not in str(error.value)


def test_a_bidirectional_model_is_refused():
    config = AutoConfig.for_model("bert", hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(ValueError, match="bidirectional"), torch.no_grad():
        AutoModel.from_config(config, attn_implementation="hip")(TEXT)


@pytest.mark.parametrize("version", [None, "4.57.1", "5.16.2"])
def test_a_missing_or_old_transformers_is_refused(monkeypatch, version):
    if version:
        monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    else:
        monkeypatch.setitem(sys.modules, "transformers", None)
    again = importlib.util.spec_from_file_location("again", hip_transformers.__file__)
    with pytest.raises(ValueError, match=f"transformers 5.17 or later.*{version or 'transformers'}"):
        again.loader.exec_module(importlib.util.module_from_spec(again))


# --- settings, kernels, processes, server ------------------------------------------------------------------


def test_settings_travel_in_config_json(tmp_path, model):
    kept = tiny()
    kept.config.hip = vars(SMALL)
    kept.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hip")
    assert hip_transformers.settings(loaded.config) == SMALL
    del kept.config.hip
    assert hip_transformers.settings(kept.config) == HiPConfig()
    ours, theirs = (x.generate(some_tokens(1, 200), max_new_tokens=10, **GREEDY) for x in (loaded, model))
    assert torch.equal(ours, theirs)


def composite():
    """A tiny model of an image part and a text part, which has a config of its own."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vision = CLIPVisionConfig(**small, image_size=8, patch_size=4)
    config = LlavaConfig(vision_config=vision, text_config=tiny().config, image_token_id=255)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation="hip").eval()


def test_a_composite_model_hears_its_settings(tmp_path):
    whole, tokens, results = composite(), some_tokens(1, 200), []
    del whole.config.hip
    for config, cfg in ((whole.config, SMALL), (whole.config.text_config, SMALL), (whole.config, COVERS)):
        config.hip = cfg
        assert hip_transformers.settings(whole.model.language_model.config) == cfg
        with torch.no_grad():
            results.append(whole(tokens).logits)
    assert torch.equal(*results[:2]) and not torch.equal(*results[1:])
    whole.config.hip = vars(SMALL)
    whole.save_pretrained(tmp_path)
    again = type(whole).from_pretrained(tmp_path)
    assert hip_transformers.settings(again.config) == SMALL
    assert hip_transformers.settings(again.model.language_model.config) == SMALL


def test_settings_may_be_given_with_the_folder_and_wrong_ones_are_refused_in_a_sentence(tmp_path):
    kept = tiny()
    kept.save_pretrained(tmp_path)
    load = functools.partial(AutoModelForCausalLM.from_pretrained, tmp_path, attn_implementation="hip")
    assert load().config.hip == SMALL
    model = load(hip=dict(top_k=64, block_k=8))
    assert model.config.hip == AutoConfig.from_pretrained(tmp_path, hip=model.config.hip).hip
    assert model.config.hip == HiPConfig(top_k=64, block_k=8)
    assert '"dense_tail": 64' in str(model.config)  # what was not given is shown too
    for wrong, words in (
        (dict(topk=64), "no field 'topk', but top_k"),
        (dict(top_k=63), "top_k must be a power"),
    ):
        kept.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=words):
            load(hip=wrong)
        config = json.loads((tmp_path / "config.json").read_text()) | dict(hip=wrong)
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=words) as error:
            load()
        assert "\n" not in str(error.value)


def test_the_library_says_whether_it_has_an_attention(model):
    assert model.get_correct_attn_implementation("hip") == "hip"
    with pytest.raises(ValueError, match='attn_implementation="hop"` is not supported'):
        model.get_correct_attn_implementation("hop")
    with pytest.warns(FutureWarning, match="prefix is no longer needed"):
        model.set_attn_implementation("paged|hip")
    assert model.config._attn_implementation == "hip"


def test_settings_that_cannot_work_are_refused_when_they_are_set():
    for model in (tiny(), composite()):
        model.config.hip = SMALL
        for wrong in (
            dict(topk=64),
            dict(top_k=63),
            dict(beam=2),
            "fast",
            5,
            ["top_k"],
            vars(SMALL) | dict(x=1),
        ):
            with pytest.raises(ValueError, match="config.hip must be|top_k must be|beam is gone|no field"):
                model.config.hip = wrong
            assert model.config.hip == SMALL


@pytest.mark.parametrize("form", [lambda cfg: cfg, vars, lambda cfg: dict(top_k=32, block_k=8)])
@pytest.mark.parametrize("make", [tiny, composite])
def test_settings_survive_printing_copying_saving_and_loading(tmp_path, form, make):
    model = make()
    model.config.hip = form(SMALL)
    wanted = model.config.hip
    assert isinstance(wanted, HiPConfig) and wanted.top_k == 32
    assert '"top_k": 32' in str(model.config) and repr(model.config) and model.config.to_json_string()
    assert copy.deepcopy(model.config).hip == wanted
    assert type(model.config).from_dict(model.config.to_dict()).hip == wanted
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hip"]["block_k"] == 8
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.hip == wanted and type(model).from_pretrained(tmp_path).config.hip == wanted


def test_head_sizes_that_the_triton_kernels_do_not_take_are_the_reference_s_and_said_once(monkeypatch):
    lib, gpu = SimpleNamespace(HEAD_SIZES=(32, 64)), torch.device("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package)
    monkeypatch.setattr(importlib, "import_module", lambda name: lib if name == "hip_triton" else hip)
    said = []
    monkeypatch.setattr(hip_transformers.logger, "warning", lambda text, *_, **__: said.append(text))
    assert [hip_transformers.kernels(gpu, D) for D in (32, 48, 64, 48, 48)] == [lib, hip, lib, hip, hip]
    assert said == [
        "HiP's Triton kernels take head sizes of 32, 64, not 48: hip.py takes their place, more slowly"
    ]


@pytest.mark.parametrize(
    "device, triton, name", [("cuda", True, "hip_triton"), ("cuda", False, "hip"), ("cpu", True, "hip")]
)
def test_the_triton_kernels_are_taken_on_a_gpu_where_triton_is_installed(monkeypatch, device, triton, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package == "triton" and triton or None)
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(name=name, HEAD_SIZES=(32,)))
    assert hip_transformers.kernels(torch.device(device), 32).name == name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, dict(cache_implementation="static"), dict(prefill_chunk_size=64)])
def test_a_model_on_a_gpu_reads_and_decodes_by_the_triton_kernels(monkeypatch, options):
    import hip_triton

    model, calls = tiny(head_dim=32).cuda(), []
    select_blocks = hip_triton.select_blocks
    monkeypatch.setattr(hip_triton, "select_blocks", lambda *x: calls.append(x) or select_blocks(*x))
    tokens, results = some_tokens(2, 150).cuda(), []
    for implementation, model.config.hip in (("sdpa", None), ("hip", COVERS)):
        model.set_attn_implementation(implementation)
        results.append(model.generate(tokens, max_new_tokens=20, **GREEDY | options))
    assert torch.equal(*results) and calls


@needs_pages
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_many_requests_on_a_gpu_get_the_answers_of_the_librarys_attention():
    model, results = tiny(head_dim=32).cuda(), []
    for implementation, model.config.hip in (("sdpa", None), ("hip", COVERS)):
        model.set_attn_implementation(implementation)
        results.append(batch(model, TEXTS))
    assert results[0] == results[1]


@pytest.mark.parametrize("dense_layers", [0, 1])
def test_an_offloaded_cache_searches_when_one_that_is_not_offloaded_does(dense_layers):
    # of a prompt so long only one half may choose everything, but a search does not pay yet: that is of no
    # concern to decoding, or the two would look at other keys
    fields = dict(top_k=64, early_factor=1, window=256, sink=0, dense_layers=dense_layers)
    cfg, model, text = HiPConfig(**fields), tiny(max_position_embeddings=2048), some_tokens(1, 460)
    model.config.hip = cfg
    assert cfg.covered < 400 and llama.PAYS * cfg.covered - 400 > llama.at_a_time(cfg, model.device)
    caches, logits = [DynamicCache(), offloaded(model, 460)], []
    with torch.inference_mode():
        for cache in caches:
            model(text[:, :400], past_key_values=cache)
            steps = [model(text[:, i : i + 1], past_key_values=cache).logits for i in range(400, 460)]
            logits.append(torch.cat(steps, 1))
    torch.testing.assert_close(*logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("store", STORES)
def test_an_offloaded_cache_on_a_gpu_gives_the_tokens_of_generation_without(store):
    model, tokens = tiny(head_dim=32).cuda(), some_tokens(2, 150).cuda()
    cache = offloaded(model, **store)
    results = [model.generate(tokens, max_new_tokens=20, past_key_values=x, **GREEDY) for x in (None, cache)]
    assert torch.equal(*results) and cache.stores[0].banks[0][0].rows[0].is_cuda


ONE_PROCESS = """
import json, os, sys
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import hip_transformers
hip_transformers.register()
heads = set()
def attention(module, query, *rest, **more):
    heads.add(query.shape[1])
    return hip_transformers.attention(module, query, *rest, **more)
AttentionInterface.register("hip", attention)
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="hip",
                                             distributed_config=DistributedConfig(tp_plan="auto"))
tokens = torch.tensor(json.loads(sys.argv[2]))
tokens = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False)
with open(sys.argv[3] + os.environ["RANK"], "w") as file:
    json.dump([sorted(heads), tokens.tolist()], file)
"""


def environment():
    return os.environ | dict(PYTHONPATH=str(HERE), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")


def test_two_processes_with_half_of_the_heads_each_give_the_tokens_of_one(tmp_path, model):
    kept = tiny()
    kept.config.hip = vars(SMALL)
    kept.save_pretrained(tmp_path)
    (tmp_path / "run.py").write_text(ONE_PROCESS)
    tokens = some_tokens(2, 120)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*torchrun, tmp_path / "run.py", tmp_path, json.dumps(tokens.tolist()), tmp_path / "out"],
        check=True,
        timeout=120,
        env=environment(),
    )
    expected = model.generate(tokens, max_new_tokens=12, **GREEDY).tolist()
    for rank in (0, 1):
        assert json.loads((tmp_path / f"out{rank}").read_text()) == [[2], expected]


BATCHING = ["--continuous-batching", "--cb-num-blocks", "64"]


@pytest.fixture(params=[[], pytest.param(BATCHING, marks=needs_pages)], ids=["in turn", "at once"])
def server(tmp_path, request):
    """(address, folder) of the library's server with a tiny HiP model, one word per token."""
    kept = tiny()
    kept.config.hip = vars(SMALL)
    kept.save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(256)}))
    words.pre_tokenizer = WhitespaceSplit()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template).save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [str(tmp_path), "--host", "127.0.0.1", "--port", str(port), *request.param]
    with subprocess.Popen([sys.executable, HERE / "hip_serve.py", *options], env=environment()) as process:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1", str(tmp_path)
        process.terminate()


def test_the_librarys_server_answers_clients_at_once_whoever_leaves_or_is_refused(server, model):
    import openai  # no other test needs it

    address, folder = server
    texts, answers = [some_tokens(150, seed=seed).tolist() for seed in (0, 1)], {}

    def ask(i, stream, leave=False, **more):
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
            message = dict(role="user", content=" ".join(f"w{token}" for token in texts[i]))
            more |= dict(model=folder, messages=[message], max_tokens=20, temperature=0, stream=stream)
            answer = client.chat.completions.create(**more)
            if leave:
                return next(iter(answer))
            parts = [x.choices[0].delta for x in answer] if stream else [answer.choices[0].message]
            answers[i, stream] = "".join(part.content or "" for part in parts), len(parts)

    def be_refused():
        with pytest.raises(openai.APIStatusError):
            ask(1, False, extra_body=dict(nonsense=1))
        answers["refused"] = True

    asked = [lambda i=i, stream=stream: ask(i, stream) for i in (0, 1) for stream in (True, False)]
    together([lambda: ask(0, True, leave=True), be_refused, *asked])
    assert answers["refused"]
    for i, text in enumerate(texts):
        expected = model.generate(torch.tensor([text]), max_new_tokens=20, **GREEDY)[0, 150:].tolist()
        for stream in (True, False):
            answer, parts = answers[i, stream]
            assert answer.split() == [f"w{token}" for token in expected] and (parts > 10) == stream


def test_the_default_model_as_a_transformers_folder_finds_the_passkey(tmp_path):
    ours, tokenizer = llama.load()
    c = ours.config
    config = LlamaConfig(
        hidden_size=c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        head_dim=c.head_size,
        num_key_value_heads=c.kv_heads,
        intermediate_size=c.hidden,
        vocab_size=c.vocabulary,
        pad_token_id=0,
        max_position_embeddings=c.context,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tied,
        rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta),
        hip=dict(top_k=128, window=64),
    )
    theirs = LlamaForCausalLM(config).to(ours.dtype)
    theirs.model.load_state_dict(ours.weights)
    theirs.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.fast).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hip")
    words = AutoTokenizer.from_pretrained(tmp_path)
    text, key = command.make_passkey(tokenizer, 1500, 0.4, seed=7)
    prompt = words(text, return_tensors="pt")
    for cache in (None, offloaded(model, 2000, store="disk")):
        tokens = model.generate(**prompt, past_key_values=cache, max_new_tokens=6, do_sample=False)[0]
        assert key in words.decode(tokens[prompt.input_ids.shape[1] :])
