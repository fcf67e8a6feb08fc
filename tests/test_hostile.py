"""Files from strangers: each ends soon, in one clear line and bounded memory, and runs and writes nothing."""
import contextlib
import gzip
import hashlib
import io
import json
import multiprocessing
import resource
import shutil
import struct
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import pair_ids
from safetensors.numpy import load_file, save_file

import data
import train
from data import Tokenizer, load_pairs, parse, read_lines
from model import Transformer
from train import read_reference

SECONDS, ROOM = 20, 1536 << 10                                      # ROOM: KiB beyond what the process already has
GOOD = {"prompt": "Ada asks:", "chosen": " yes", "rejected": " no"}


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def bounded(job):
    """(name of the exception, its text) of job() in a process of its own; its time and its memory are bounded."""
    def child():
        torch.set_num_threads(1)                                    # the threads of the parent are not here
        before, found = peak(), ("none", "")
        try:
            found = "none", job()
        except BaseException as error:
            found = type(error).__name__, str(error)
        theirs.send((*found, peak() - before))
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child)
    start = time.perf_counter()
    process.start()
    theirs.close()
    try:
        assert ours.poll(SECONDS), f"still running after {SECONDS} seconds"
        kind, text, memory = ours.recv()
        process.join()
        assert time.perf_counter() - start < SECONDS and memory < ROOM, f"{memory >> 10} MiB"
    finally:
        process.kill()
    return kind, text


def refused(job, kind, words):
    """job() raises this kind of error, in one line that is no longer than a screen."""
    found, text = bounded(job)
    assert found == kind and words in text, f"{found}: {text[:1000]}"
    assert "\n" not in text and text.isprintable() and len(text) < 2500


def command(script, *arguments):
    """(exit status, standard output, standard error) of a script's main() with these arguments."""
    def job():
        out, said = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            try:
                script(list(map(str, arguments)))
                status = 0
            except SystemExit as end:
                status = end.code
            except BaseException:
                status = traceback.format_exc()
        return status, out.getvalue(), said.getvalue()
    kind, found = bounded(job)
    assert kind == "none", found
    return found


# --- records ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer(make_model):
    return Tokenizer(make_model())


def packed(part, count, level=9):
    """gzip of `count` times the same bytes, without ever holding them all in memory."""
    raw = io.BytesIO()
    with gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=level) as file:
        for _ in range(count):
            file.write(part)
    return raw.getvalue()


MIB, GIB = 1 << 20, 1 << 30
LINE = json.dumps(GOOD).encode() + b"\n"
BOMBS = {
    "a.jsonl.gz": (lambda: packed(b"a" * MIB, 1024, 1), ":1: longer than"),
    "blank.jsonl.gz": (lambda: packed(b"\n" * MIB, 64), "times the size of the gzip file"),
    "same.jsonl.gz": (lambda: packed(LINE * 10000, 40), "times the size of the gzip file"),
    "array.json.gz": (lambda: packed(b"[" * MIB, 100), ":1: longer than"),
    "lists.json": (lambda: b"[" + b"[]," * (4 * MIB) + b"0]", ":1: is a list"),
    "lists.jsonl": (lambda: b'{"prompt": [' + b"[]," * MIB + b'0], "chosen": "b", "rejected": "c"}', ":1: 'prompt' is"),
    "long.json": (lambda: json.dumps([{**GOOD, "prompt": "a" * (8 * MIB)}]).encode(), ":1: longer than"),
    "names.jsonl": (lambda: json.dumps({f"\x1b[2J\n{i}": i for i in range(10 ** 5)}).encode(), ":1: has no 'prompt'"),
    "role.jsonl": (lambda: json.dumps({**GOOD, "prompt": [{"role": "x" * MIB}]}).encode(), ":1: 'prompt', message 1"),
    "roles.jsonl": (lambda: json.dumps({"chosen": [{"role": "user", "content": ""}] * 10 ** 4}).encode(), ":1: "),
    "votes.jsonl": (lambda: json.dumps({**GOOD, "votes": [0] * MIB}).encode(), ":1: 'votes' is"),
    "number.jsonl": (lambda: b'{"prompt": "a", "chosen": "b", "rejected": ' + b"9" * 4000 + b"}", ":1: 'rejected' is"),
    "deep.jsonl": (lambda: b'{"a":' * (MIB // 2), ":1: not JSON"),
    "deep.json": (lambda: b'[{"a":' * (4 * MIB), ":1: not JSON"),
    "surrogates.jsonl": (lambda: LINE + b'{"prompt": "a", "chosen": "\\ud83d", "rejected": "b"}', ":2: 'chosen' holds"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_records_that_are_too_much(tmp_path, tokenizer, name):
    make, words = BOMBS[name]
    (tmp_path / name).write_bytes(make())
    load = (lambda: sum(1 for _ in read_lines(tmp_path / name))) if "same" in name else (
        lambda: load_pairs(tmp_path / name, tokenizer, 50))
    refused(load, "BadData", words)


@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.txt"])
def test_a_gigabyte_of_nothing(tmp_path, tokenizer, name):
    with open(tmp_path / name, "wb") as file:
        file.write(b"[" * (name == "f.json"))
        file.truncate(GIB)
    refused(lambda: load_pairs(tmp_path / name, tokenizer, 50), "BadData", f"{name}:1: longer than")


def test_the_longest_record_that_is_read(tmp_path, tokenizer):
    """As long as is allowed, with a token for each byte."""
    text = "\N{SNOWMAN}" * ((data.LONGEST[0] - 100) // 3)
    (tmp_path / "f.jsonl").write_text(json.dumps({**GOOD, "prompt": text}, ensure_ascii=False), encoding="utf-8")
    assert bounded(lambda: load_pairs(tmp_path / "f.jsonl", tokenizer, 50).cut) == ("none", 1)


# --- tokenizers and chat templates --------------------------------------------------------------------------

def changed_tokenizer(make_model, folder, **changes):
    """Copy a model's tokenizer.json with some keys changed; model=dict changes keys inside its "model"."""
    content = json.loads((make_model() / "tokenizer.json").read_text())
    content["model"] |= changes.pop("model", {})
    shutil.copy(make_model() / "tokenizer_config.json", folder)
    (folder / "tokenizer.json").write_text(json.dumps({**content, **changes}))


PAIR = {"prompt": "a b", "chosen": "c", "rejected": "d"}


@pytest.mark.parametrize("changes", [
    {"model": {"vocab": {}, "merges": []}}, {"model": {"vocab": {"a": 2 ** 40}}}, {"model": {"vocab": {"a": -1}}},
    {"model": {"merges": [["a", "nothing"]]}}, {"model": {"continuing_subword_prefix": "yyyy"}},
    {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}}, {"model": {"type": "Other"}},
    {"model": {"type": "Unigram", "vocab": [["x", 0.0]], "unk_id": None}}, {"model": None, "version": "9"},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"decoder": {"type": "Strip", "content": "a", "start": 10 ** 9, "stop": 10 ** 9}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": False}},
    {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<end>", "type_id": 0}}],
                        "pair": [], "special_tokens": {"<end>": {"id": "<end>", "ids": [0], "tokens": ["<end>"]}}}}])
def test_tokenizers_that_are_none(make_model, tmp_path, changes):
    """Some fail when they are read, some at the first text, some with a panic in Rust."""
    changes = {**changes, "model": changes.get("model") or {}}
    changed_tokenizer(make_model, tmp_path, **changes)
    refused(lambda: pair_ids(Tokenizer(tmp_path), parse(PAIR)), "BadData", "tokenizer")


@pytest.mark.parametrize("content", [
    b"", b"\xff\xfe", b"\0" * 100, b"[]", b"null", b"[" * MIB, b'{"model":' * MIB, b"\x80\x04.", b'{"version": "1.0"'])
def test_files_that_are_no_tokenizer(make_model, tmp_path, content):
    changed_tokenizer(make_model, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    refused(lambda: Tokenizer(tmp_path), "BadData", "not a tokenizer")
    with open(tmp_path / "tokenizer.json", "ab") as file:
        file.truncate(4 * GIB)
    refused(lambda: Tokenizer(tmp_path), "BadData", "tokenizer.json: longer than")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
@pytest.mark.parametrize("content, words", [
    (b"[" * 10 ** 6, "not JSON"), (b'{"a": NaN}', "not JSON"), (b'{"a": 1, "a": 2}', "a name appears twice"),
    (b"\xff", "not UTF-8"), (b'{"eos_token": "\\ud800", "eos_token_id": "0"}', "token"),
    (b'{"eos_token": ["a"], "eos_token_id": {"a": 1}}', "no end token"), (b'{"eos_token_id": [-1, 0]}', "no end token"),
    (b'{"eos_token_id": 1e30}', "no end token"), (b'{"eos_token_id": true}', "no end token")])
def test_settings_of_tokenizers(make_model, tmp_path, name, content, words):
    changed_tokenizer(make_model, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    refused(lambda: Tokenizer(tmp_path), "BadData", words)


CHAT = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}
DEEP = ("{% set n = namespace(x=[0], y=[0]) %}{% for i in range(60) %}"
        "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}")


@pytest.mark.parametrize("template, words", [
    ("{{ raise_exception('\x1b[2J\nTraceback') }}", "x1b[2J"), (5, "AttributeError"),
    ("{{ '\ud800' }}{% for m in messages %}{{ m.content }}{% endfor %}", "tokenizer"),
    ([{"name": ["default"], "template": "x"}], "unhashable"), ([{"name": "default", "template": {}}], "AttributeError"),
    ("{{ cycler.__init__.__globals__.os.system('touch RAN') }}", "SecurityError"),
    ("{{ raise_exception.__globals__ }}", "is empty"), ("{{ messages | attr('__class__') }}", "is empty"),
    ("{{ '{0.__class__.__mro__}'.format(messages) }}", "SecurityError"), ("{% import 'os' as os %}", "fails"),
    ("{{ self._TemplateReference__context }}", "is empty"), ("{% set messages[0].content = 'x' %}", "Error"),
    (DEEP + "{{ n.x }}", "Error"),
    ("{{ messages | tojson(indent=10**10) }}", "MemoryError"), ("{{ lipsum(n=10**9) }}", "TimeoutError")])
def test_templates_that_reach_out(make_model, tmp_path, monkeypatch, template, words):
    monkeypatch.setattr("data.RENDERING", (1.0, 1 << 28))
    monkeypatch.chdir(tmp_path)
    changed_tokenizer(make_model, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "<end>"}))
    refused(lambda: pair_ids(Tokenizer(tmp_path), parse(CHAT)), "BadData", words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_template_that_no_signal_interrupts(make_model, tmp_path, monkeypatch):
    """The process ends itself, as nothing else can stop it."""
    monkeypatch.setattr("data.RENDERING", (0.5, 1 << 28))
    changed_tokenizer(make_model, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(DEEP + "{{ n.x == n.y }}")
    process = multiprocessing.get_context("fork").Process(target=lambda: pair_ids(Tokenizer(tmp_path), parse(CHAT)))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 1


def test_a_template_is_given_its_time_once(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr("data.RENDERING", (1.0, 1 << 28))
    changed_tokenizer(make_model, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
                                                  "{% endfor %}")
    train.write_jsonl(tmp_path / "f.jsonl", [CHAT] * 100)
    refused(lambda: load_pairs(tmp_path / "f.jsonl", Tokenizer(tmp_path), 50, skip_bad=True), "BadData",
            "(100 bad records skipped)")


# --- folders of models --------------------------------------------------------------------------------------

@pytest.fixture
def folder(make_model, tmp_path):
    """A copy of a model's folder."""
    return shutil.copytree(make_model(), tmp_path / "model")


def header(content, body=b"", length=None):
    """A safetensors file with this header, true or not."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + body


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("content", [
    b"", b"abc", b"\0" * 4096, header({}, length=2 ** 63), header({}, length=2 ** 64 - 1), header({}, length=10 ** 8),
    header({"a": tensor(offsets=(0, 400))}, b"0000"), header({"a": tensor(), "b": tensor(offsets=(2, 6))}, b"000000"),
    header({"a": tensor(offsets=(4, 0))}, b"0000"), header({"a": tensor(offsets=(4, 8))}, b"0" * 8),
    header({"a": tensor(shape=(7,))}, b"0000"), header({"a": tensor(shape=(-1,))}, b"0000"),
    header({"a": tensor(shape=(2 ** 40, 2 ** 40))}, b"0000"), header({"a": tensor("X9")}, b"0000"),
    header({"a": tensor(offsets=(0.0, 4.0))}, b"0000"), header({"a": tensor(), "b": []}, b"0000"), header([]),
    header({"__metadata__": {"a": 3}}), header(b"\xff"), header(b"[" * MIB), header(b'{"a":' * MIB)])
def test_headers_that_lie(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refused(lambda: Transformer.from_pretrained(folder), "BadModel", "not a whole safetensors file")


@pytest.mark.parametrize("name, kind, shape, words", [
    ("lm_head.weight", "F32", (), "has the shape ()"), ("model.norm.weight", "F32", (0,), "has the shape (0,)"),
    ("model.norm.weight", "F32", (48, 1, 1), "has the shape (48, 1, 1)"),
    ("\x1b[2J\n" * 999, "F32", (1,), "has no place"),
    *(("model.norm.weight", kind, (48,), "model.norm.weight' is of torch.")
      for kind in ("I32", "U8", "BOOL", "C64", "F8_E4M3", "F8_E8M0", "F4"))])
def test_tensors_that_do_not_fit(folder, name, kind, shape, words):
    size = {"C64": 64, "I32": 32, "F32": 32, "F4": 4}.get(kind, 8) * int(np.prod(shape)) // 8
    (folder / "model.safetensors").unlink()
    (folder / "a.safetensors").write_bytes(header({name: tensor(kind, shape, (0, size))}, bytes(size)))
    (folder / "z.safetensors").write_bytes(header({"x": tensor("U8", (MIB,), (0, MIB))}, bytes(MIB)))   # room enough
    index = {"weight_map": {name: "a.safetensors", "x": "z.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: Transformer.from_pretrained(folder), "BadModel", words)


def test_a_transposed_matrix_of_three_dimensions(make_model, tmp_path):
    folder = shutil.copytree(make_model("gpt2"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("h.0.attn.c_attn.weight"))
    save_file({**tensors, name: tensors[name][None]}, folder / "model.safetensors")
    refused(lambda: Transformer.from_pretrained(folder), "BadModel", "has the shape (1, 48, 144)")


PICKLE = b"cos\nsystem\n(S'touch RAN'\ntR."


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.bin"])
def test_no_pickle_is_loaded(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(PICKLE + bytes(MIB))
    if name == "x.bin":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "x.bin"}}')
    refused(lambda: Transformer.from_pretrained(folder), "BadModel",
            "not a whole safetensors file" if name == "model.safetensors" else "bin")
    assert not (folder / "RAN").exists()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "{outside}", "model", "", "..", "a\0b", "\ud800",
                                  "x" * 5000, "sub/x.safetensors", "config.json", "link.safetensors"])
def test_an_index_that_names_files_elsewhere(folder, tmp_path, name):
    outside = (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(outside, folder / "sub")
    if name == "link.safetensors":
        (folder / name).symlink_to(outside)
    index = {"weight_map": {"lm_head.weight": name.format(outside=outside)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: Transformer.from_pretrained(folder), "BadModel",
            "a link that leads out" if name == "link.safetensors" else "names the file")


def test_links_of_the_hub_and_links_elsewhere(make_model, tmp_path):
    repository = tmp_path / "models--some--thing"
    shutil.copytree(make_model(), repository / "blobs")
    (repository / "snapshots" / "0123").mkdir(parents=True)
    for path in (repository / "blobs").iterdir():
        (repository / "snapshots" / "0123" / path.name).symlink_to(Path("../../blobs") / path.name)
    Transformer.from_pretrained(repository / "snapshots" / "0123")
    (repository / "snapshots" / "0123" / "notes.txt").symlink_to("/etc/passwd")
    refused(lambda: Transformer.from_pretrained(repository / "snapshots" / "0123"), "BadModel", "notes.txt: a link")


HUGE = 10 ** 4000


@pytest.mark.parametrize("family, changes, words", [
    *(("llama-tied", {name: value}, "config.json: ") for value in (HUGE, -1, 0, 2.0, 1e300, "x", True, [1], {"a": 1})
      for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")),
    ("llama-tied", {"num_hidden_layers": 10 ** 6}, "for its layers, found 1000000"),
    ("llama-tied", {"max_position_embeddings": HUGE}, "for its positions"),
    ("gpt2", {"n_embd": "x" * 999}, "config.json: "), ("gpt2", {"n_positions": HUGE}, "config.json: "),
    ("neox", {"head_dim": 10 ** 11, "rope_parameters": {"partial_rotary_factor": "a"}}, "config.json: "),
    ("llama-tied", {"rope_parameters": {"rope_theta": HUGE}}, "config.json: "),
    ("llama-tied", {"rope_parameters": {"rope_theta": 2 ** 70}}, "config.json: "),
    ("llama-tied", {"rope_parameters": {"rope_type": "linear", "factor": 2 ** 70}}, "config.json: "),
    ("llama-tied", {"rope_parameters": {"rope_type": ["linear"]}}, "config.json: "),
    ("llama-tied", {"rms_norm_eps": HUGE}, "config.json: "), ("llama-tied", {"hidden_act": {"a": []}}, "config.json: "),
    ("llama-tied", {"layer_types": ["\x1b[2J\n"] * 10 ** 5}, "layer_types"),
    ("llama-tied", {"quantization_config": {"x\n": ["\x1b"] * 10 ** 5}}, "quantization_config"),
    ("llama-tied", {"model_type": ["x\n"] * 10 ** 5}, "config.json: "), ("llama-tied", {"model_type": "x\n" * 99}, "x"),
    ("llama-tied", {"eos_token_id": ["x" * 10 ** 5]}, "eos_token_id"),
    ("llama-tied", {"surprise": {"a": [{}] * 99}}, None)])
def test_configurations(make_model, tmp_path, family, changes, words):
    folder = shutil.copytree(make_model(family), tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))
    if words is None:
        assert bounded(lambda: Transformer.from_pretrained(folder) and None) == ("none", None)
    else:
        refused(lambda: Transformer.from_pretrained(folder), "BadModel", words)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_json_of_a_model(folder, name):
    for content, words in [(b"[" * MIB, "not JSON"), (b'{"a":' * MIB, "not JSON"), (b'{"a": 1, "a": 2}', "not JSON"),
                           (b'{"a": NaN}', "not JSON"), (b'{"a": -Infinity}', "not JSON"), (b"\xff", "not JSON"),
                           (b"[]", "not a JSON object"), (b"\0", "not JSON"), (b"", "not JSON"),
                           (b'{"a": ' + b"9" * 9999 + b"}", "not JSON")]:
        (folder / name).write_bytes(content)
        refused(lambda: Transformer.from_pretrained(folder), "BadModel", f"{name}: {words}")
    with open(folder / name, "ab") as file:
        file.truncate(4 * GIB)
    refused(lambda: Transformer.from_pretrained(folder), "BadModel", "longer than")


# --- what a run reads: --config, --reference, --resume ------------------------------------------------------

def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_command_lines(folder, pairs, tmp_path, tokenizer):
    """Exit status 2, no traceback, and nothing is written."""
    before = names(tmp_path)
    flags = ["--model", folder, "--data", pairs, "--out", tmp_path / "out"]
    for content, words in [("[" * MIB, "not JSON"), ('{"lr": 1, "lr": 2}', "twice"), ('{"lr": NaN}', "not JSON"),
                           ('{"lr": 1e999}', "--lr is inf"), ('{"lr": {"a": []}}', "invalid float"),
                           ('{"reference": "a\\u0000b"}', "--reference"), ('{"config": [1]}', "not a JSON object"),
                           ('{"eval_data": ["\\ud800"]}', "--eval-data")]:
        config = tmp_path.with_suffix(".json")
        config.write_text(content)
        status, _, said = command(train.main, "--config", config, *flags)
        assert status == 2 and words in said and "Traceback" not in said, said
    (folder / "tokenizer.json").write_text("[]")
    status, _, said = command(train.main, *flags)
    assert status == 2 and said.count("\n") == 1 and "not a tokenizer" in said
    assert names(tmp_path) == before


SCORES = {"digest": np.zeros((2, 16), np.uint8), "length": np.array([1, 2], np.int32), "logp": np.zeros(3, np.float32),
          "entropy": np.zeros(3, np.float32)}


@pytest.mark.parametrize("changes", [
    {"digest": np.zeros(32, np.uint8)}, {"digest": np.zeros((2, 15), np.uint8)}, {"digest": np.zeros((2, 2), np.int64)},
    {"digest": np.zeros((3, 16), np.uint8)}, {"digest": np.array(3, np.uint8)}, {"length": np.array([-1, 4], np.int32)},
    {"length": np.array([1, 1], np.int32)}, {"length": np.array([1, 2 ** 31 - 1], np.int32)},
    {"length": np.array([1.0, 2.0])}, {"length": np.array(3, np.int32)}, {"length": np.zeros((2, 2), np.int32)},
    {"logp": np.zeros((3, 1), np.float32)}, {"logp": np.zeros(3)}, {"logp": np.zeros(4, np.float32)},
    {"entropy": np.zeros(2, np.float32)}, {"entropy": np.full(3, np.nan, np.float32)}, {"logp": None}])
def test_files_of_scores(tmp_path, changes):
    path = tmp_path / "r.safetensors"
    save_file({name: x for name, x in {**SCORES, **changes}.items() if x is not None}, path, {"key": "k"})
    refused(lambda: read_reference(path, "k"), "BadData", f"{path}: not a whole file of scores")


def test_scores_in_types_that_numpy_has_not(tmp_path):
    path = tmp_path / "r.safetensors"
    for kind, size in (("BF16", 2), ("F8_E4M3", 1), ("F4", 0.5)):
        sizes = {"digest": ("U8", (2, 16), 32), "length": ("I32", (2,), 8), "logp": (kind, (4,), int(4 * size)),
                 "entropy": ("F32", (4,), 16)}
        content, at = {"__metadata__": {"key": "k"}}, 0
        for name, (dtype, shape, count) in sizes.items():
            content[name], at = tensor(dtype, shape, (at, at + count)), at + count
        path.write_bytes(header(content, bytes(at)))
        refused(lambda: read_reference(path, "k"), "BadData", "not a whole file of scores")


@pytest.fixture
def stopped(make_model, pairs, tmp_path):
    """A run that was stopped after its second step: its flags, and the folder of its checkpoint."""
    flags = ["--model", make_model(), "--data", pairs, "--out", tmp_path / "out", "--steps", 4, "--save-every", 2,
             "--batch-size", 8, "--samples", 0]
    save = train.save_checkpoint

    def job():
        def once(*arguments):
            save(*arguments)
            raise SystemExit(0)
        train.save_checkpoint = once
        train.main(list(map(str, flags)))
    assert bounded(job) == ("SystemExit", "0")
    return flags, train.checkpoints(tmp_path / "out")[0]


def test_scores_of_other_lengths(stopped):
    """The right key and the right pairs, but not their tokens."""
    flags, _ = stopped
    path = Path(flags[5]) / "cache/reference.safetensors"
    with train.safe_open(path, "np") as file:
        key, digests = file.metadata()["key"], file.get_tensor("digest")
    for length in (0, 1, 99):
        each = np.zeros(len(digests) * length, np.float32)
        save_file({"digest": digests, "length": np.full(len(digests), length, np.int32), "logp": each, "entropy": each},
                  path.with_name("other.safetensors"), {"key": key})
        status, _, said = command(train.main, *flags, "--resume", "--reference", path.with_name("other.safetensors"))
        assert status == 2 and said.count("\n") == 1 and "tokens than the reference's scores" in said, (status, said)


def test_checkpoints_of_strangers(stopped, tmp_path):
    """Refused before any step; files outside a checkpoint that its state.json names are not even read."""
    flags, folder = stopped
    good = json.loads((folder / "state.json").read_text())
    digests, none = good["sha256"], hashlib.sha256(b"").hexdigest()
    for changes, words in [
            ({"sha256": {**digests, "../../../../dev/zero": none}}, "is not as it was written"),
            ({"sha256": {**digests, "/dev/zero": none}}, "is not as it was written"),
            ({"sha256": {name: x for name, x in digests.items() if "state" not in name}}, "state.safetensors is"),
            ({"sha256": {name: [] for name in digests}}, "is not as it was written"), ({"sha256": [1]}, "sha256"),
            ({"step": -1}, "step"), ({"step": "2"}, "step"), ({"step": True}, "step"), ({"seconds": None}, "seconds"),
            ({"agrees": 3}, "agrees"), ({"agrees": ["1"]}, "agrees"), ({"agrees": [2, [0]]}, "agrees"),
            ({"skipped": 3}, "skipped"), ({"scaler": []}, "scaler"), ({"run": []}, "run"),
            ({"run": {"config": []}}, "has no settings of a run"),
            ({"run": {**good["run"], "schema": 0}}, "has no settings of a run")]:
        (folder / "state.json").write_text(json.dumps({**good, **changes}))
        status, _, said = command(train.main, *flags, "--resume")
        assert status == 2 and said.count("\n") == 1 and words in said, (changes, status, said)
    for content in (b"", b"[]", b"[" * MIB, b"{}", PICKLE):
        (folder / "state.json").write_bytes(content)
        status, _, said = command(train.main, *flags, "--resume")
        assert status == 2 and said.count("\n") == 1, (content[:9], status, said)
    tensors = load_file(folder / "state.safetensors")
    name = next(iter(tensors))
    for changes in ({"weight.other": tensors[name]}, {name: tensors[name][:1]}, {"x": tensors[name]}):
        save_file({**tensors, **changes}, folder / "state.safetensors")
        digests["state.safetensors"] = train.sha256(folder / "state.safetensors")
        (folder / "state.json").write_text(json.dumps(good))
        status, _, said = command(train.main, *flags, "--resume")
        assert status == 2 and said.count("\n") == 1 and "which is not of this model" in said, (status, said)
