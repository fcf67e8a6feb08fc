"""Records, tokens, the length policy, the schedule and rows."""
import csv
import gzip
import http.server
import importlib.util
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT, pair_ids

import data
import mallowspo
import train
from data import (
    BadData,
    Schedule,
    Tokenizer,
    collate,
    examine,
    load_pairs,
    pack,
    parse,
    read_lines,
)
from train import write_jsonl

GOOD = {"prompt": "Ada asks:", "chosen": " yes", "rejected": " no"}


@pytest.mark.parametrize("item, words", [
    ([1, 2], "is a list"), ("text", "is a string"), (7, "the number 7"), (None, "is null"), ({}, "has no 'prompt'"),
    ({**GOOD, "prompt": None}, "'prompt' is null"), ({**GOOD, "chosen": 17}, "'chosen' is the number 17"),
    ({**GOOD, "rejected": ["a"]}, "'rejected' is a list"), ({**GOOD, "chosen": ""}, "'chosen' is empty"),
    ({**GOOD, "rejected": ""}, "'rejected' is empty"), ({**GOOD, "rejected": " yes"}, "the same text"),
    ({"prompt": "a", "chosen": "b", "reject": "c"}, "has no 'rejected' (it has 'prompt', 'chosen', 'reject')"),
    ({**GOOD, "chosen": "\ud83d yes"}, "half of a surrogate pair"), ({**GOOD, "dispersion": 0}, "'dispersion' is 0"),
    ({**GOOD, "dispersion": 1.5}, "'dispersion' is 1.5"),
    ({**GOOD, "dispersion": True}, "'dispersion' is True"), ({**GOOD, "dispersion": math.nan}, "'dispersion' is nan"),
    ({"chosen": "a", "rejected": "b"}, "not dialogues"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}, "differ before the last"),
])
def test_bad_records_say_what_is_wrong(item, words):
    with pytest.raises(BadData) as error:
        parse(item)
    assert words in str(error.value)


def test_anthropic_form_splits_at_the_last_turn():
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more?\n\nAssistant:"
    record = parse({"chosen": start + " yes", "rejected": start + " no"})
    assert record == (start, " yes", " no", None, None, None, None, "dialogues")


def test_sft_needs_no_rejected():
    assert parse({"prompt": "a", "chosen": "b"}, need_rejected=False).rejected == ""
    with pytest.raises(BadData, match="'rejected'"):
        parse({"prompt": "a", "chosen": "b"})


def test_broken_files_name_the_line(tmp_path, tokenizer):
    good = json.dumps(GOOD).encode()
    for content, words in [
            (good + b"\n{\"prompt\": \"a\", \"ch", "f.jsonl:2: not JSON"), (b"\xff\xfe\n", "f.jsonl:1: not UTF-8"),
            (good + b"\n[]\n", "f.jsonl:2: is a list"), (b"", "no pairs"), (b"\n \n", "no pairs"),
            (b"[" * 100_000, "f.jsonl:1: not")]:
        (tmp_path / "f.jsonl").write_bytes(content)
        with pytest.raises(BadData) as error:
            load_pairs(tmp_path / "f.jsonl", tokenizer, 50)
        assert words in str(error.value)
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(good * 1000)[:-20])
    with pytest.raises(BadData, match="gzip file is broken"):
        list(read_lines(tmp_path / "f.jsonl.gz"))
    (tmp_path / "f.jsonl.gz").write_bytes(good)
    with pytest.raises(BadData, match=r"jsonl.gz:1: the gzip file is broken"):
        list(read_lines(tmp_path / "f.jsonl.gz"))
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(BadData, match=str(path)):
            list(read_lines(path))


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "f.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    assert [json.loads(line) for _, line in read_lines(tmp_path / "f.jsonl")] == [GOOD]


def test_skip_bad_counts(tmp_path, tokenizer):
    (tmp_path / "f.jsonl").write_text("\n".join([json.dumps(GOOD), "{", json.dumps({**GOOD, "chosen": 3})]))
    data = load_pairs(tmp_path / "f.jsonl", tokenizer, 50, skip_bad=True)
    assert len(data.pairs) == 1 and data.bad == 2 and "skipped 2 bad records" in str(data)


# --- tokens -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer(make_model):
    return Tokenizer(make_model())


def special_tokenizer(folder, kind, eos="</s>"):
    """A BPE tokenizer that adds <s> ("start"), <s> and </s> ("both") or a space before texts ("space")."""
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>" if kind == "space" else None))
    names = ["<s>", "</s>", "<unk>"]
    if kind == "space":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        alphabet = list("abcdefghijklmnopqrstuvwxyzA:\n.?")
    else:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=names, show_progress=False,
                                  initial_alphabet=sorted(alphabet))
    backend.train_from_iterator(["the yes and the no of it"] * 5, trainer)
    if kind == "start":
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    if kind == "both":
        backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>",
                                                               special_tokens=[("<s>", 0), ("</s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return Tokenizer(folder)


@pytest.mark.parametrize("kind, bos", [("plain", []), ("start", [0]), ("both", [0])])
def test_start_and_end_tokens_stand_once(tmp_path, kind, bos):
    tokenizer = special_tokenizer(tmp_path, kind)
    prompt, chosen, rejected = pair_ids(tokenizer, parse(GOOD))
    assert tokenizer.bos == bos and prompt[:len(bos)] == bos and prompt.count(0) == len(bos)
    assert chosen[-1] == rejected[-1] == 1 and chosen.count(1) == 1
    written = parse({"prompt": "<s>Ada asks:" if bos else "Ada asks:", "chosen": " yes</s>", "rejected": " no"})
    assert pair_ids(tokenizer, written) == (prompt, chosen, rejected)                 # none is doubled


def test_end_token_given_as_object_or_id(tmp_path):
    assert special_tokenizer(tmp_path, "plain", {"content": "</s>"}).eos == 1
    for broken in ("{", '{"eos_token": {}}', "[]"):
        (tmp_path / "tokenizer_config.json").write_text(broken)
        with pytest.raises(BadData, match=r"not JSON|no end token"):
            Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(BadData, match="no end token"):
        Tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    assert Tokenizer(tmp_path).eos == 2


def test_tokens_decode_to_the_text(tmp_path, tokenizer):
    """For any split of a text, also with a tokenizer that puts a space before whatever it is given."""
    spaced = special_tokenizer(tmp_path, "space")
    text = "Ada asks: is the yes of it\nthe no? and the rest."
    for one in (tokenizer, spaced):
        for cut in range(1, len(text) - 1):
            prompt, chosen, _ = pair_ids(one, parse({"prompt": text[:cut], "chosen": text[cut:], "rejected": "x"}))
            assert one.text(prompt + chosen[:-1]) == text
    with pytest.raises(BadData, match="do not decode to their text"):
        pair_ids(spaced, parse({**GOOD, "chosen": " \N{SNOWMAN}"}))                 # an unknown character


def test_not_a_tokenizer(tmp_path):
    with pytest.raises(BadData, match=r"no tokenizer.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadData, match="not a tokenizer"):
        Tokenizer(tmp_path)


def test_length_policy(tmp_path):
    tokenizer = special_tokenizer(tmp_path, "start")
    rng = np.random.default_rng(0)
    rows = [{"prompt": "p" * rng.integers(1, 40), "chosen": "c" * rng.integers(1, 40),
             "rejected": "r" * rng.integers(1, 40)} for _ in range(200)]
    write_jsonl(tmp_path / "f.jsonl", rows)
    data = load_pairs(tmp_path / "f.jsonl", tokenizer, 36, max_dropped=1)
    assert len(data.pairs) + data.dropped == 200 and data.cut > 0 and data.dropped > 0
    for pair in data.pairs:
        row = rows[int(pair.where.rsplit(":")[-1]) - 1]
        assert tokenizer.text(pair.chosen[:-1]) == row["chosen"]
        assert tokenizer.text(pair.rejected[:-1]) == row["rejected"]
        assert pair.prompt[0] == 0 and row["prompt"].endswith(tokenizer.text(pair.prompt[1:])) and len(pair.prompt) > 1
        total = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
        assert total <= 36 and (total == 36 or tokenizer.text(pair.prompt[1:]) == row["prompt"])
    with pytest.raises(BadData, match=r"f.jsonl:\d+: a response does not fit into --max-tokens 36"):
        load_pairs(tmp_path / "f.jsonl", tokenizer, 36)


# --- chats --------------------------------------------------------------------------------------------------

TEMPLATES = Path(__file__).parent / "templates"      # in the published structure of each family
TURN_ENDS = {"llama3": "<|eot_id|>", "qwen25": "<|im_end|>", "qwen3": "<|im_end|>", "smollm2": "<|im_end|>",
             "whitespace": "<|im_end|>", "mistral": "</s>", "zephyr": "</s>", "gemma": "<end_of_turn>"}


def say(*contents, first="user"):
    """Messages of the user and the assistant in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


SYSTEM = [{"role": "system", "content": "Be  brief.\n"}]
CHATS = [say("Hi?"), say("Hi?", "Yes \N{SNOWMAN}", "and <|im_end|> \"quoted\" &amp; 'so'?"), SYSTEM + say("  Hi\n\n"),
         SYSTEM + say("a", "<think>\nhm\n</think>\n\nb", "c")]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """chat_model(template, start token added by the tokenizer) -> our Tokenizer and that of transformers."""
    def make(template, adds_start=False, **config):
        folder = tmp_path_factory.mktemp("chat")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        special = ["<s>", *sorted({*TURN_ENDS.values()}), "<|im_start|>", "<|start_header_id|>", "<|end_header_id|>",
                   "<start_of_turn>"]
        backend.train_from_iterator(["the user and the assistant of it"] * 5, tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, show_progress=False,
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())))
        if adds_start:
            backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A",
                                                                              special_tokens=[("<s>", 0)])
        backend.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    return make


def test_many_at_once_are_as_one_by_one(chat_model, tokenizer):
    """Texts are encoded in one call, a prompt once up to its last added token: same ids, same errors."""
    answers = ["Sure.", " Sure", "\n\nthe end", "the", "<|im_end|> it", "\t", "a  b"]
    chats = [parse({"prompt": chat, "chosen": one, "rejected": other}) for chat in CHATS + [say("a <start_of_turn>")]
             for one, other in itertools.pairwise(answers)]
    texts = [parse({"prompt": "the user" + end, "chosen": one, "rejected": other}) for end in ("", " ", "\n", "</s>")
             for one, other in itertools.pairwise(answers)]

    def alone(tokens, record):
        try:
            return pair_ids(tokens, record)
        except BadData as error:
            return str(error)[:500]
    models = [chat_model((TEMPLATES / f"{name}.jinja").read_text(), start)[0]
              for name in TURN_ENDS for start in (False, True)]
    models += [chat_model(end + "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}" + end)[0]
               for end in ("", "<s>", "<s> ")]
    for ours in [*models, tokenizer]:
        for records in (chats, texts, chats[:3] + texts[:3]):
            with ThreadPoolExecutor(1) as thread:
                found = [each if isinstance(each, tuple) else str(each) for each in ours.pairs(records, thread)()]
            assert found == [alone(ours, record) for record in records]
            for record, ids in zip(records, found):
                if isinstance(record.prompt, list) and isinstance(ids, tuple):
                    assert_ids_of_the_whole(ours, record, *ids)


def assert_ids_of_the_whole(ours, record, prompt, *answers):
    """The ids are those of the rendered texts, each encoded in one piece."""
    def encode(text):
        return ours.backend.encode(text, add_special_tokens=False).ids
    assert prompt == encode(ours.render(record.prompt, True))
    for side, answer in zip((record.chosen, record.rejected), answers):
        whole, both = encode(ours.render([*record.prompt, *side], False)), prompt + answer
        if whole[:len(prompt)] == prompt:
            both = both if both == whole[:len(both)] else both[:-1]              # it got an end token
            assert both == whole[:len(both)] and not ours.text(whole[len(both):]).strip()


@pytest.mark.parametrize("name", TURN_ENDS)
def test_chats_are_rendered_and_tokenised_as_by_transformers(chat_model, name):
    ours, theirs = chat_model((TEMPLATES / f"{name}.jinja").read_text(), adds_start=True)
    end = ours.backend.token_to_id(TURN_ENDS[name])
    for chat in CHATS:
        if name == "gemma" and chat[0]["role"] == "system":
            with pytest.raises(BadData, match="TemplateError: no role system here"):
                ours.render(chat, True)
            continue
        for answer in (True, False):
            assert ours.render(chat, answer) == theirs.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=answer)
        prompt, *responses = pair_ids(ours, parse({"prompt": chat, "chosen": "Sure.", "rejected": "No way, the end"}))
        assert prompt == ours.prompt(chat)
        for ids, text in zip(responses, ("Sure.", "No way, the end")):
            whole = theirs.apply_chat_template(chat + say(text, first="assistant"), return_dict=False)
            both = prompt + ids
            assert both == whole[:len(both)] and not theirs.decode(whole[len(both):]).strip()
            assert ids[-1] == end and ids.count(end) == 1 and both.count(0) == ("bos_token" in ours_source(name))


def ours_source(name):
    return (TEMPLATES / f"{name}.jinja").read_text()


@pytest.mark.parametrize("rstrip", [False, True])
def test_chats_where_special_tokens_take_in_white_space(tmp_path, rstrip):
    """A tokenizer that puts a space before every text, and tokens that swallow the line break behind them."""
    ours = special_tokenizer(tmp_path, "space")
    ours.backend.add_special_tokens([tokenizers.AddedToken(text, rstrip=rstrip)
                                     for text in ("<|user|>", "<|assistant|>", "<|end|>")])
    ours.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}")
    ours, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompt, chosen, _ = pair_ids(ours, parse({"prompt": say("is it?"), "chosen": "yes.", "rejected": "no"}))
    whole = theirs.apply_chat_template(say("is it?", "yes."), return_dict=False)
    assert prompt + chosen == whole[:len(prompt + chosen)] and theirs.decode(chosen).endswith("<|end|>")
    with pytest.raises(BadData, match="tokens of 'prompt' and 'rejected' do not decode"):
        pair_ids(ours, parse({"prompt": say("is it?"), "chosen": "yes.", "rejected": "\N{SNOWMAN}"}))


def test_where_a_template_is_found(chat_model):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages[0].content }}!"}]
    chat = say("a")
    for config, text in (({"chat_template": named}, "a!"), ({"chat_template": "{{ bos_token }}"}, "<s>")):
        ours, theirs = chat_model(None, **config)
        assert ours.render(chat, True) == theirs.apply_chat_template(chat, tokenize=False) == text
    ours, _ = chat_model("file", chat_template="config")
    assert ours.render(chat, True) == "file"
    ours, _ = chat_model(None)
    with pytest.raises(BadData, match="no chat template"):
        pair_ids(ours, parse({"prompt": chat, "chosen": "b", "rejected": "c"}))


PLAIN = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
         "{% if add_generation_prompt %}assistant:{% endif %}")


def test_a_turn_without_an_end_token_gets_one(chat_model):
    ours, _ = chat_model(PLAIN)
    prompt, chosen, _ = pair_ids(ours, parse({"prompt": say("a"), "chosen": "b", "rejected": "c"}))
    assert ours.text(prompt) == "user: a\nassistant:" and ours.text(chosen) == " b\n</s>"
    _, chosen, _ = pair_ids(ours, parse({"prompt": say("a"), "chosen": "b</s> more", "rejected": "c"}))
    assert ours.text(chosen) == " b</s> more\n</s>"                            # one in the middle is not the end


@pytest.mark.parametrize("template, words", [
    ("{{ raise_exception('roles!') }}", "TemplateError: roles!"), ("{% if %}", "TemplateSyntaxError"),
    ("{{ messages[0].content + none }}", "TypeError"), ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{{ messages.__class__.__base__.__subclasses__() }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"), ("{% include 'x' %}", "fails"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
     "TimeoutError: still running"),
    ("{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}", "Error"),
    ("{{ 'x' * 10 ** 11 }}", "MemoryError"), ("{{ 9 ** (9 ** 9) }}", "Error"),
    ("{{ 'x'.center(10 ** 11) }}", "MemoryError"),
    ("{{ '%99999999999d' % messages|length }}", "Error"),
    ("{{ 'x' * 9999999 }}", "OverflowError: 9,999,999 characters"),
    ("{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}", "Error"),
    ("{{ messages|length }}", "not prefix-stable"), ("{{ messages[0].content }}", "not prefix-stable"),
])
def test_templates_that_cannot_be_used_name_the_record(tmp_path, monkeypatch, chat_model, template, words):
    monkeypatch.setattr("data.RENDERING", (0.4, 1 << 28))
    def limits():
        return (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL),
                resource.getrlimit(resource.RLIMIT_AS))
    before = limits()
    ours, _ = chat_model(template)
    write_jsonl(tmp_path / "f.jsonl", [{"prompt": say("a"), "chosen": "b", "rejected": "c"}])
    start = time.perf_counter()
    with pytest.raises(BadData) as error:
        load_pairs(tmp_path / "f.jsonl", ours, 50)
    assert time.perf_counter() - start < 5
    assert "f.jsonl:1: the chat template" in str(error.value) and words in str(error.value)
    assert len(str(error.value)) < 600 and limits() == before


def test_conversations_split_after_the_last_shared_message():
    chosen, rejected = SYSTEM + say("a", "b", "c", "yes"), SYSTEM + say("a", "b", "c", "no")
    shared = SYSTEM + say("a", "b", "c")
    answers = say("yes", first="assistant"), say("no", first="assistant")
    expected = (shared, *answers, None, None, None, None, "conversations")
    for prompt in ({}, {"prompt": "c"}, {"prompt": "a"}, {"prompt": shared}):
        assert parse({**prompt, "chosen": chosen, "rejected": rejected}) == expected
    assert parse({"chosen": chosen}, need_rejected=False)[:3] == (*expected[:2], "")
    parts = [{"type": "text", "text": "ye"}, {"type": "text", "text": "s"}]
    chosen = [*shared, {"role": "assistant", "content": parts, "name": None}]
    assert parse({"chosen": chosen, "rejected": rejected}) == expected


@pytest.mark.parametrize("prompt, chosen, rejected", [
    (say("a"), "b", "c"), ("a", say("b", first="assistant"), say("c", first="assistant")),
    (say("a"), say("b", first="assistant"), say("c", first="assistant"))])
def test_a_string_among_messages_is_one_message(prompt, chosen, rejected):
    assert parse({"prompt": prompt, "chosen": chosen, "rejected": rejected}) == (
        say("a"), say("b", first="assistant"), say("c", first="assistant"), None, None, None, None, "messages")


@pytest.mark.parametrize("item, words", [
    ({"prompt": say("a"), "chosen": "b", "rejected": say("c", first="assistant")}, "differ in form"),
    ({"chosen": say("a", "b"), "rejected": "\n\nHuman: a\n\nAssistant: b"}, "differ in form"),
    ({"chosen": say("a", "b"), "rejected": say("x", "b")}, "the prompt: nothing;"),
    ({"chosen": say("a", "b"), "rejected": say("a", "b", "c", "d")}, "the responses: nothing; user, assistant"),
    ({"chosen": say("a", "b", "c"), "rejected": say("a", "b", "d")}, "user, assistant; and the responses: user"),
    ({"chosen": say("a", "b"), "rejected": say("a", "b")}, "the same text"),
    ({"prompt": "x", "chosen": say("a", "b"), "rejected": say("a", "c")}, "'prompt' is not what"),
    ({"prompt": say("a", "b"), "chosen": "c", "rejected": "d"}, "the prompt: user, assistant"),
    ({"prompt": [], "chosen": "c", "rejected": "d"}, "'prompt' is a list"),
    ({"prompt": say("a"), "chosen": "", "rejected": "d"}, "'chosen' is empty"),
    ({"prompt": [{"role": "bot", "content": "a"}], "chosen": "c", "rejected": "d"}, "message 1: has the role 'bot'"),
    ({"prompt": [{"from": "human", "value": "a"}], "chosen": "c", "rejected": "d"}, "(it has 'from', 'value')"),
    ({"prompt": [{"role": "user"}], "chosen": "c", "rejected": "d"}, "as content null"),
    ({"prompt": [{"role": ["user"], "content": 3}], "chosen": "c", "rejected": "d"}, "as content the number 3"),
    ({"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}], "chosen": "c", "rejected": "d"},
     "'prompt', message 1: has the role 'user' and as content a list"),
    ({"prompt": [{"role": "user", "content": "a", "name": "\ud83d"}], "chosen": "c", "rejected": "d"}, "surrogate"),
    ({**GOOD, "votes": [0, 0]}, "'votes' is [0, 0]"), ({**GOOD, "votes": [1]}, "'votes' is [1]"),
    ({**GOOD, "votes": [True, 2]}, "'votes'"), ({**GOOD, "votes": [1, 2.0]}, "'votes'"),
    ({**GOOD, "votes": [-1, 2]}, "'votes'"), ({**GOOD, "votes": {"a": 1}}, "'votes'"),
    ({**GOOD, "votes": "12"}, "'votes'"), ({**GOOD, "scores": [1]}, "'scores' is [1]"),
    ({**GOOD, "scores": [1, "2"]}, "'scores' is [1, '2']"), ({**GOOD, "scores": 3}, "'scores' is 3"),
    ({**GOOD, "score_chosen": 3}, "'scores' is [3, None]"), ({**GOOD, "scores": [True, 1]}, "'scores' is [True"),
    ({**GOOD, "scores": [3, 1], "score_chosen": 3, "score_rejected": 2}, "'scores' is [3, 1], but score_chosen"),
])
def test_bad_chats_and_votes_say_what_is_wrong(item, words):
    with pytest.raises(BadData) as error:
        parse(item)
    assert words in str(error.value)


def test_scores_reach_the_pair(tmp_path, tokenizer):
    write_jsonl(tmp_path / "f.jsonl", [{**GOOD, "scores": [3, 1.5]}, {**GOOD, "score_chosen": -8, "score_rejected": 1},
                                       {**GOOD, "scores": None, "score_chosen": 2, "score_rejected": 1},
                                       {**GOOD, "scores": None}, GOOD])
    pairs = load_pairs(tmp_path / "f.jsonl", tokenizer, 50).pairs
    assert [pair.scores for pair in pairs] == [[3, 1.5], [-8, 1], [2, 1], None, None]


def test_numbers_of_any_size(make_model, tmp_path, tokenizer):
    """Beyond 64 bits too, whether the method looks at them or not."""
    huge = [{**GOOD, "chosen": f" {word}", "scores": [10 ** 20, i], "rewards": [10 ** 20, 0]}
            for i, word in enumerate(["yes", "no"])]
    write_jsonl(tmp_path / "f.jsonl", [{**record, "rejected": " the"} for record in huge])
    split = data.Split.plan(load_pairs(tmp_path / "f.jsonl", tokenizer, 50).pairs, 2, 0, None, 64, torch.device("cpu"))
    assert split.advantage[1].tolist() == pytest.approx([5e19, -5e19])
    job = {"model": str(make_model()), "data": str(tmp_path / "f.jsonl"), "steps": 1, "samples": 0, "device": "cpu"}
    for number, more in enumerate([{"loss": "dpo"}, {"dispersion": "scores"}]):
        train.fit(train.Config(**job, **more, out=str(tmp_path / str(number))), train.join_world(train.Config()))
        assert json.loads((tmp_path / str(number) / "run.json").read_text())["finished"]


def test_votes_reach_the_pair(tmp_path, tokenizer):
    write_jsonl(tmp_path / "f.jsonl", [{**GOOD, "votes": [3, 1]}, GOOD])
    assert [pair.votes for pair in load_pairs(tmp_path / "f.jsonl", tokenizer, 50).pairs] == [[3, 1], None]
    with pytest.raises(BadData, match=r"f\.jsonl:2: no 'votes'"):
        load_pairs(tmp_path / "f.jsonl", tokenizer, 50, needed=("votes",))
    left = load_pairs(tmp_path / "f.jsonl", tokenizer, 50, needed=("votes",), skip_bad=True)
    assert (len(left.pairs), left.bad) == (1, 1)


def test_responses_that_become_the_same_tokens(chat_model):
    ours, _ = chat_model((TEMPLATES / "llama3.jinja").read_text())             # this template trims
    with pytest.raises(BadData, match="the same tokens"):
        pair_ids(ours, parse({"prompt": say("a"), "chosen": "b", "rejected": "b "}))


# --- files --------------------------------------------------------------------------------------------------

def test_arrays_and_several_files(tmp_path, tokenizer):
    rows = [{**GOOD, "chosen": f" {i}\x00"} for i in range(3)]
    (tmp_path / "a.json").write_text("\ufeff\n" + json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    write_jsonl(tmp_path / "c.json", rows)                                     # lines, whatever its name
    for names in ("a.json", "b.json.gz", "c.json"):
        pairs = load_pairs(tmp_path / names, tokenizer, 50).pairs
        assert [pair.where for pair in pairs] == [f"{tmp_path / names}:{i}" for i in (1, 2, 3)]
    several = load_pairs([tmp_path / "a.json", str(tmp_path / "c.json")], tokenizer, 50).pairs
    assert len(several) == 6 and several[3].where.endswith("c.json:1")
    assert tokenizer.text(several[4].chosen[:-1]) == " 1\x00"
    rows[1]["chosen"] = 5
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(BadData, match=r"a.json:2: 'chosen' is the number 5"):
        load_pairs(tmp_path / "a.json", tokenizer, 50)


@pytest.mark.parametrize("name, content, words", [
    ("f.jsonl", b'{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}',
     "f.jsonl:1: not JSON (a name appears twice among 'prompt', 'prompt'"),
    ("f.jsonl", b'{"prompt": "a", "chosen": "c", "rejected": "d", "x": NaN}', "f.jsonl:1: not JSON"),
    ("f.jsonl", b'{"prompt": "a", "chosen": "c", "rejected": "d", "x": [-Infinity]}', "'-Infinity'"),
    ("f.jsonl", b'{"prompt": "a", "chosen": "c", "rejected": "d", "x": ' + b"9" * 5000 + b"}", "f.jsonl:1: not JSON"),
    ("f.json", b'[{"prompt": "a"}, ', "f.json:1: not JSON"), ("f.json", b"[" * 100_000, "f.json:1: not JSON"),
    ("f.json", b"[] []", "f.json:1: not JSON"), ("f.json", b"[]", "no pairs"),
    ("f.json", b"[\xff]", "f.json:1: not UTF-8"),
    ("f.parquet", b"PAR1", "Parquet"),
    ("f.csv", b"prompt,chosen,rejected\na,b\n", "f.csv:2: does not have as many fields"),
    ("f.csv", b'prompt,chosen,rejected,votes\na,b,c,"[2"\n', "f.csv:2: 'votes' is '[2'"),
])
def test_files_that_are_no_records(tmp_path, tokenizer, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData) as error:
        load_pairs(tmp_path / name, tokenizer, 50)
    assert words in str(error.value)


def test_brackets_of_any_depth(tmp_path, tokenizer):
    for depth in range(900, 1000):
        row = json.dumps({"prompt": [{"role": "user", "content": "a", "x": 1}], "chosen": "b", "rejected": "c"})
        row = row.replace("1", "[" * depth + "]" * depth)
        for name, text in (("f.jsonl", row), ("f.json", f"[{row}]")):
            (tmp_path / name).write_text(text)
            with pytest.raises(BadData, match=r"no chat template|recursion"):
                load_pairs(tmp_path / name, tokenizer, 50)


def test_a_line_without_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("data.LONGEST", (1 << 20, 1 << 20))
    with open(tmp_path / "f.jsonl", "wb") as file:
        file.truncate(1 << 33)                                                 # 8 GiB of nothing
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(b" " * (1 << 24)))
    (tmp_path / "f.json").write_bytes(b"[" + b" " * (1 << 21) + b"]")
    for name in ("f.jsonl", "f.jsonl.gz", "f.json"):
        tracemalloc.start()
        with pytest.raises(BadData, match=f"{name}:1: longer than 1,048,576 bytes"):
            list(read_lines(tmp_path / name))
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
        tracemalloc.stop()


HUB = """
import sys; from data import BadData, fetch, find_model
for call in sys.argv[1:]:
    try:
        print((fetch if call.startswith("hf:") else find_model)(call))
    except BadData as error:
        print("BadData:", error)
"""


def ask_hub(tmp_path, *names, **environment):
    """What fetch or find_model prints for each name, in a process with that environment."""
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", HUB, *names], cwd=tmp_path, env={**os.environ, **environment},
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines()


def test_the_hub_from_its_cache(tmp_path):
    sha, folder = "0123456789" * 4, {}
    for kind, file in (("models", "config.json"), ("datasets", "data/train.jsonl")):
        folder[kind] = tmp_path / "hub" / f"{kind}--some--thing" / "snapshots" / sha
        (folder[kind] / file).parent.mkdir(parents=True)
        (folder[kind] / file).write_text("{}")
        (folder[kind].parents[1] / "refs").mkdir()
        (folder[kind].parents[1] / "refs" / "main").write_text(sha)
    (tmp_path / "own" / "model").mkdir(parents=True)
    found = ask_hub(tmp_path, "own/model", "own", "some/thing", f"some/thing@{sha}", "other/thing", "some/thing@v2",
                    "hf://datasets/some/thing/data/train.jsonl", f"hf://datasets/some/thing@{sha}/data/train.jsonl",
                    "hf://datasets/some/thing/data/test.jsonl", "hf://models/a/b/c", HF_HUB_OFFLINE="1")
    assert found[:4] == ["own/model", "own", str(folder["models"]), str(folder["models"])]
    assert found[6:8] == [str(folder["datasets"] / "data/train.jsonl")] * 2
    assert all(found[i].startswith("BadData: ") and "LocalEntryNotFoundError" in found[i] for i in (4, 5))
    assert found[8] == "BadData: hf://datasets/some/thing/data/test.jsonl: no such file"
    assert "not of the form hf://datasets/owner/name/path" in found[9]


def test_the_hub_out_of_reach_or_unwilling(tmp_path):
    class Unwilling(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            code = "GatedRepo" if "gated" in self.path else "RepoNotFound"
            self.send_response(403 if code == "GatedRepo" else 404)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", f"{code} indeed")
            self.send_header("Content-Length", "0")
            self.end_headers()
        do_HEAD = do_GET

        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unwilling)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = ["some/gated", "some/missing", "hf://datasets/some/gated/a.jsonl", "hf://datasets/some/missing/a.jsonl"]
    found = ask_hub(tmp_path, *names, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()
    for name, line, kind in zip(names, found, ("GatedRepoError", "RepositoryNotFoundError") * 2, strict=True):
        assert line.startswith(f"BadData: {name}: ") and kind in line
    for name, line in zip(names, ask_hub(tmp_path, *names, HF_ENDPOINT="http://127.0.0.1:9"), strict=True):
        assert line.startswith(f"BadData: {name}: ") and "LocalEntryNotFoundError" in line


# --- the doctor ---------------------------------------------------------------------------------------------

def doctor(capsys, *names, tokenizer=None, max_tokens=1024, examples=0):
    """The doctor's verdict on files, its report, its numbers by the words after them, and its lengths."""
    good = examine([str(name) for name in names], tokenizer, max_tokens, examples)
    report = capsys.readouterr().out
    numbers = {what.strip(): number
               for number, what in re.findall(r"^ *([\d,.]+%?)  +([a-z][^:\n<]*)", report, re.MULTILINE)}
    lengths = {name: [int(x.replace(",", "")) for x in row.split()]
               for name, row in re.findall(r"^(prompt|chosen|rejected) +([\d, ]+)$", report, re.MULTILINE)}
    return good, report, numbers, lengths


def test_the_doctor_counts_what_it_should(tmp_path, tokenizer, capsys):
    chat = {"chosen": say("a", "b"), "rejected": say("a", "ccc")}
    rows = [GOOD, GOOD, {**GOOD, "chosen": " no", "rejected": " yes"}, {**GOOD, "rejected": " yes"}, {"prompt": "a"},
            chat, {"prompt": say("a"), "chosen": "b", "rejected": "d"}, {**GOOD, "rejected": "much longer " * 9},
            {"prompt": "b"}]
    write_jsonl(tmp_path / "f.jsonl", rows)
    with open(tmp_path / "f.jsonl", "ab") as file:
        file.write(b"{\n\xff\n")
    (tmp_path / "g.jsonl.gz").write_bytes(b"no gzip")
    good, report, numbers, lengths = doctor(capsys, tmp_path / "f.jsonl", tmp_path / "g.jsonl.gz")
    assert not good and "12 records, 6 of them usable pairs" in report
    for what, count in {"strings": 4, "conversations": 1, "messages": 1, "records are bad": 6,
                        "records have identical responses": 1, "pairs repeat an earlier one exactly": 1}.items():
        assert numbers[what] == str(count)
    assert "2  pairs are contradicted" in report and numbers["pairs have the prompt of an earlier one"] == "4"
    for words in ("f.jsonl:4: 'chosen' and", "2    has no 'chosen'", "f.jsonl:10: not JSON"):
        assert words in report
    assert lengths["chosen"] == [1, 2, 4, 4, 4, 4] and lengths["rejected"][-1] == 108
    assert numbers["of the responses start with a space"] == "58.3%"           # 7 of 12
    assert "41.7%  of the pairs: the chosen" in report                         # " yes" twice, and one tie
    good, report, numbers, lengths = doctor(capsys, tmp_path / "f.jsonl", tokenizer=tokenizer)
    assert not good and "holds messages, but the tokenizer has no chat template" in report
    write_jsonl(tmp_path / "f.jsonl", [GOOD, {**GOOD, "prompt": "Ada asks: " * 9}, {**GOOD, "rejected": "x" * 99}])
    good, report, numbers, lengths = doctor(capsys, tmp_path / "f.jsonl", tokenizer=tokenizer, max_tokens=20,
                                            examples=1)
    ids = pair_ids(tokenizer, parse(GOOD))
    assert not good and numbers["prompts lose their beginning at --max-tokens 20"] == "1"
    assert "1  pairs are dropped" in report
    assert lengths["prompt"][0] == len(ids[0]) and lengths["chosen"] == [len(ids[1])] * 6 and "<end>|" in report
    write_jsonl(tmp_path / "f.jsonl", [GOOD])
    assert doctor(capsys, tmp_path / "f.jsonl", tokenizer=tokenizer)[0]
    (tmp_path / "f.jsonl").write_text("")
    assert not doctor(capsys, tmp_path / "f.jsonl")[0]


@pytest.mark.skipif("HH" not in os.environ, reason="HH names no file of Anthropic's harmless pairs")
def test_the_doctor_on_real_pairs(tmp_path, capsys, tokenizer):
    """Against facts counted here from the file itself, with the tokenizers package alone."""
    lines = gzip.decompress(Path(os.environ["HH"]).read_bytes()).split(b"\n")[:1800]
    rows = [json.loads(line) for line in lines]
    (tmp_path / "hh.jsonl").write_bytes(b"\n".join(lines))
    encode = tokenizer.backend.encode_batch
    lengths = {name: [len(found.ids) + (name != "prompt") for found in encode([row[name] for row in rows])]
               for name in ("prompt", "chosen", "rejected")}
    good, report, numbers, found = doctor(capsys, tmp_path / "hh.jsonl", tokenizer=tokenizer, max_tokens=4000)
    assert good and numbers["records have identical responses"] == numbers["records are bad"] == "0"
    assert not any(row["chosen"] == row["rejected"] for row in rows)
    assert all(row[side].startswith(" ") for row in rows for side in ("chosen", "rejected"))
    assert numbers["strings"] == "1,800" and numbers["of the responses start with a space"] == "100.0%"
    for name, counts in lengths.items():
        counts = sorted(counts)
        for share, value in zip((0.05, 0.25, 0.5, 0.75, 0.95, 1), found[name]):
            assert counts[int(share * 1799)] - 0.5 <= value <= counts[min(1799, int(share * 1799) + 1)] + 0.5
    longer = sum((c > r) + (c == r) / 2 for c, r in zip(lengths["chosen"], lengths["rejected"])) / 1800
    assert f"{longer:.1%}  of the pairs: the chosen" in report
    assert numbers["pairs have the prompt of an earlier one"] == str(1800 - len({row["prompt"] for row in rows}))


def test_the_doctor_as_a_command(run, tmp_path, make_model, pairs):
    done = run("data.py", pairs, pairs, "--model", make_model(), "--show", 1)
    assert done.returncode == 0 and "100 records" in done.stdout and "scored ones" in done.stdout and not done.stderr
    (tmp_path / "f.jsonl").write_text("{")
    done = run("data.py", tmp_path / "f.jsonl")
    assert done.returncode == 1 and "<- wrong" in done.stdout and "f.jsonl:1: not JSON" in done.stdout


# --- schedule and rows --------------------------------------------------------------------------------------

@pytest.mark.parametrize("count, batch_size, world", [(1, 1, 1), (7, 2, 2), (50, 8, 3), (10, 64, 4), (33, 4, 1)])
def test_every_epoch_is_a_permutation(count, batch_size, world):
    costs = np.random.default_rng(count).integers(5, 60, count).tolist()
    schedule = Schedule(costs, batch_size, seed=3, tokens_per_row=100)
    orders = []
    for epoch in range(2):
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        orders.append([i for step in steps for i in schedule.batch(step)])
        assert sorted(orders[-1]) == list(range(count))
        for step in steps:
            shares = [schedule.rows(step, rank, world) for rank in range(world)]
            assert len({len(share) for share in shares}) == 1
            assert sorted(i for share in shares for row in share for i in row) == sorted(schedule.batch(step))
            assert all(sum(costs[i] for i in row) <= 100 for share in shares for row in share)
    assert count == 1 or orders[0] != orders[1]
    assert Schedule(costs, batch_size, 3, 100).batch(1) == schedule.batch(1)


def test_packing_is_tight():
    costs = np.random.default_rng(0).integers(20, 300, 64).tolist()
    rows = pack(list(range(64)), costs, 2048)
    assert len(rows) <= math.ceil(sum(costs) / 2048) + 1
    assert [0] in pack([0], [5000], 100)                                        # it ends, whatever the budget


def test_collate_lays_out_a_shared_prompt():
    rows = collate([([1, 2, 3], [10, 11, 12], [20]), ([4], [13, 14], [21, 22])], 16)
    assert rows.tokens.tolist() == [[1, 2, 3, 10, 11, 4, 13, 21]]               # without last tokens of responses
    assert rows.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 1]]
    assert rows.segments.tolist() == [[0, 0, 0, 1, 1, 16, 17, 18]]
    assert rows.source.tolist() == [2, 3, 4, 2, 5, 6, 5, 7]
    assert rows.target.tolist() == [10, 11, 12, 20, 13, 14, 21, 22]
    assert rows.sum_by_response(torch.ones(8)).tolist() == rows.length.tolist() == [[3, 1], [2, 2]]
    with pytest.raises(ValueError, match="16 responses; a row holds at most 15"):
        collate([([1], *[[2]] * 16)], 16)


# --- files that people have -------------------------------------------------------------------------------------

USER = [{"role": "user", "content": "is it?"}]
STEER = {"context": USER, "response1": "yes", "response2": "no", "overall_preference": -2,
         "individual_preference": [{"score": -2}, {"score": -1}, {"score": 1}]}
SHP = {"history": "is it?", "human_ref_A": "yes", "human_ref_B": "no", "labels": 1, "score_A": 7, "score_B": 2}
PKU = {"prompt": "is it?", "response_0": "no", "response_1": "yes", "better_response_id": 1}
SHARE = {"conversations": [{"from": "human", "value": "is it?"}], "chosen": {"from": "gpt", "value": "yes"},
         "rejected": {"from": "gpt", "value": "no"}}
SHAPED = [
    ("Orca", {"system": "", "question": "is it?", "chosen": "yes", "rejected": "no"}, {}),
    ("argilla's Orca", {"system": "", "input": "is it?", "chosen": "yes", "rejected": "no", "status": "tie"}, {}),
    ("Alpaca", {"instruction": "is it?", "input": "", "chosen": "yes", "rejected": "no", "scores": [3, 1]},
     {"scores": [3, 1]}),
    ("Alpaca, two outputs", {"instruction": "is it?", "output": ["yes", "no"]}, {}),
    ("stack-exchange", {"question": "is it?", "response_j": "yes", "response_k": "no", "qid": 7}, {}),
    ("PKU-SafeRLHF", PKU, {}), ("ShareGPT", SHARE, {}), ("SHP", SHP, {"votes": [7, 2]}),
    ("SHP", {**SHP, "labels": 0, "human_ref_A": "no", "human_ref_B": "yes"}, {"votes": [2, 7]}),
    ("HelpSteer3", STEER, {"votes": [2, 1]}),
    ("HelpSteer3", {**STEER, "response1": "no", "response2": "yes", "overall_preference": 3,
                    "individual_preference": [{"score": 3}]}, {"votes": [1, 0]}),
    ("HelpSteer3", {**STEER, "individual_preference": []}, {}),
]


@pytest.mark.parametrize("shape, item, more", SHAPED)
def test_shapes_are_known_by_their_columns(shape, item, more):
    record = parse(item)
    assert record[:3] == (USER, [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}])
    assert record.form == shape and all(getattr(record, name) == value for name, value in more.items())
    assert record.form in data.FORMS


def test_shapes_train(run, make_model, tmp_path):
    """Two steps on all shapes in one file; then a run that uses the votes of the shapes that have them."""
    shutil.copytree(make_model(), tmp_path / "model")
    settings = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    settings["chat_template"] = ("{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
                                 "{% if add_generation_prompt %}assistant: {% endif %}")
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(settings))
    write_jsonl(tmp_path / "f.jsonl", [item for _, item, _ in SHAPED] + [{**STEER, "overall_preference": 0}])
    done = run("train.py", "--model", tmp_path / "model", "--data", tmp_path / "f.jsonl", "--out", tmp_path / "out",
               "--steps", 2, "--batch-size", 6, "--samples", 0)
    assert done.returncode == 0 and "skipped 1 without a preference" in done.stdout, done.stderr
    assert all(shape in done.stdout for shape, *_ in SHAPED)
    with_votes = [item for _, item, more in SHAPED if "votes" in more]
    write_jsonl(tmp_path / "votes.jsonl", with_votes)
    done = run("train.py", "--model", tmp_path / "model", "--data", tmp_path / "votes.jsonl", "--samples", 0,
               "--out", tmp_path / "votes", "--dispersion", "votes", "--phi-star", 1, "--steps", 1)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "votes/dispersion.jsonl").read_text().splitlines()]
    lam = {line["index"]: line["weight"] for line in lines}
    want = [mallowspo.lam_of_votes(torch.tensor(more["votes"])).item() for _, _, more in SHAPED if "votes" in more]
    assert [lam[i] for i in range(len(want))] == pytest.approx(want, rel=1e-5)


def test_a_system_message_comes_first():
    record = parse({"system": "Be brief.", "question": "q", "chosen": "a", "rejected": "b"})
    assert [message["role"] for message in record.prompt] == ["system", "user"]


@pytest.mark.parametrize("item, words", [
    ({**PKU, "better_response_id": 2}, "taken for PKU-SafeRLHF: 'better_response_id' is 2, neither 0 nor 1"),
    ({**PKU, "better_response_id": None}, "neither 0 nor 1"),
    ({**SHP, "labels": "1"}, "taken for SHP: 'labels' is '1'"),
    ({**SHP, "score_A": -1}, "'votes'"), ({**STEER, "overall_preference": 5}, "not numbers from -3 to 3"),
    ({**STEER, "individual_preference": [{"score": "x"}]}, "not numbers from -3 to 3"),
    ({**STEER, "overall_preference": 0}, "no preference"), ({**PKU, "response_1": ""}, "'chosen' is empty"),
    ({"instruction": "a", "output": ["b"]}, "'output' is a list, not [chosen, rejected]"),
    ({**STEER, "individual_preference": 3}, "'individual_preference' is 3, not a list of objects"),
    ({**STEER, "individual_preference": [1]}, "not a list of objects"),
    ({**SHARE, "conversations": [{"from": ["x"], "value": "a"}]}, "not one with 'from' and 'value'"),
    ({"instruction": ["a"], "input": "b", "chosen": "c", "rejected": "d"}, "'instruction' is a list"),
    ({"instruction": "a", "input": {}, "output": ["c", 4]}, "'rejected' is the number 4"),
    ({"instruction": "a", "input": {"b": 1}, "chosen": "c", "rejected": "d"}, "'input' an object, not texts"),
    ({"system": 0, "question": "a", "chosen": "c", "rejected": "d"}, "as content the number 0"),
    ({**PKU, "better_response_id": [1]}, "neither 0 nor 1"),
    ({**SHARE, "chosen": "yes"}, "not one with 'from' and 'value'"), ({**SHARE, "conversations": "a"}, "is a string"),
    ({"system": "", "question": "a", "input": "b", "chosen": "c", "rejected": "d"}, "of Orca and of argilla's Orca"),
    ({"question": "a", "response_j": 3, "response_k": "b"}, "'chosen' is the number 3")])
def test_shapes_that_are_wrong(item, words):
    with pytest.raises(BadData, match=re.escape(words)):
        parse(item)


def test_what_is_missing_is_said_with_what_is_there():
    with pytest.raises(BadData, match=re.escape("either (it has 'chosen', 'rejected', 'x')")):
        parse({"chosen": "a", "rejected": "b", "x": 1})
    with pytest.raises(BadData, match="under 'data': write that list alone"):
        parse({"data": [GOOD]})
    assert parse({**GOOD, "data": [1]}) == parse(GOOD)                           # a column of that name does no harm


def test_ties_are_passed_over_and_counted(tokenizer, tmp_path, capsys):
    strings = {"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 1, "score_A": 1, "score_B": 0}
    write_jsonl(tmp_path / "f.jsonl", [{**STEER, "overall_preference": 0}] * 2 + [GOOD])
    found = load_pairs(tmp_path / "f.jsonl", tokenizer, 50)
    assert found.ties == 2 and len(found.pairs) == 1 and "skipped 2 without a preference" in str(found)
    write_jsonl(tmp_path / "g.jsonl", [{**STEER, "overall_preference": 0}] * 2)
    with pytest.raises(BadData, match="no pairs in it"):
        load_pairs(tmp_path / "g.jsonl", tokenizer, 50)
    write_jsonl(tmp_path / "h.jsonl", [strings, {**STEER, "overall_preference": 0}])
    assert data.examine([str(tmp_path / "h.jsonl")], None, 50, 0)
    shown = capsys.readouterr().out
    assert "1  pairs carry votes: --dispersion votes uses it" in shown and "1  records have no preference" in shown


def test_columns_of_any_name(tokenizer, tmp_path):
    write_jsonl(tmp_path / "f.jsonl", [{"q": GOOD["prompt"], "good": GOOD["chosen"], "bad": GOOD["rejected"]}])
    columns = ["prompt=q", "chosen=good", "rejected=bad"]
    named = load_pairs(tmp_path / "f.jsonl", tokenizer, 50, columns=columns).pairs[0]
    write_jsonl(tmp_path / "g.jsonl", [GOOD])
    assert named.digest() == load_pairs(tmp_path / "g.jsonl", tokenizer, 50).pairs[0].digest()
    with pytest.raises(BadData, match="has no 'q', which --columns takes for prompt"):
        load_pairs(tmp_path / "g.jsonl", tokenizer, 50, columns=columns)
    for words in (["prompt"], ["text=q"]):
        with pytest.raises(BadData, match="each must be OURS=THEIRS"):
            data.read_columns(words)


def test_csv_and_parquet_are_read_as_json_lines_are(tokenizer, tmp_path):
    rows = [{**GOOD, "chosen": f' yes, "{i}"\nand more', "votes": [i + 1, 1]} for i in range(5)]
    write_jsonl(tmp_path / "f.jsonl", rows)
    want = load_pairs(tmp_path / "f.jsonl", tokenizer, 50).pairs
    with open(tmp_path / "f.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "f.csv.gz").write_bytes(gzip.compress((tmp_path / "f.csv").read_bytes()))
    names = ["f.csv", "f.csv.gz"]
    if importlib.util.find_spec("pyarrow"):
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f.parquet",
                                                           row_group_size=2)
        (tmp_path / "without_ending").write_bytes((tmp_path / "f.parquet").read_bytes())
        names += ["f.parquet", "without_ending"]
    for name in names:
        found = load_pairs(tmp_path / name, tokenizer, 50).pairs
        assert [(pair.digest(), pair.votes) for pair in found] == [(pair.digest(), pair.votes) for pair in want], name
    with pytest.raises(BadData, match="a folder; give its files"):
        load_pairs(tmp_path, tokenizer, 50)


def test_long_fields_of_csv(tokenizer, tmp_path):
    long = {**GOOD, "note": "x" * 300_000}                          # more than the csv module takes by default
    with open(tmp_path / "f.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, long)
        writer.writeheader()
        writer.writerow(long)
    assert len(load_pairs(tmp_path / "f.csv", tokenizer, 50).pairs) == 1
    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(b"prompt,chosen,rejected\n" + b"x" * 10 ** 8))
    tracemalloc.start()
    with pytest.raises(BadData, match=r"bomb.csv.gz:2: longer than 4,194,304 bytes"):
        load_pairs(tmp_path / "bomb.csv.gz", tokenizer, 50)
    assert tracemalloc.get_traced_memory()[1] < 5e7
    tracemalloc.stop()
    rows = (b"a,b," + b"c" * 10 ** 5 + b"\n") * 99
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"prompt,chosen,rejected\n" + rows))
    with pytest.raises(BadData, match=r"rows.csv.gz:\d+: unpacks to over 50 times the size of the gzip file"):
        list(read_lines(tmp_path / "rows.csv.gz"))


def test_a_damaged_cache_is_never_trusted(tokenizer, tmp_path):
    """Flip a bit or cut off the end, 200 times: the cache is made again, unless its content is the same."""
    rows = [{**GOOD, "chosen": f" yes {i}", "votes": [i + 1, 0], "scores": [i, 0.5]} for i in range(20)]
    write_jsonl(tmp_path / "f.jsonl", rows)
    path, settings = tmp_path / "cache/f.safetensors", (50, 0.1, False, True, (), None, iter)
    written = []

    def write(path, save):
        path.parent.mkdir(exist_ok=True)
        save(path)
        written.append(path)
    want = data.cached_pairs(path, write, (tmp_path / "f.jsonl",), tokenizer, *settings)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for turn in range(200):
        damaged = bytearray(content)
        place = int(rng.integers(len(damaged)))
        if turn % 4:
            damaged[place] ^= 1 << int(rng.integers(8))
        else:
            damaged = damaged[:place]
        path.write_bytes(damaged)
        found = data.cached_pairs(path, write, (tmp_path / "f.jsonl",), tokenizer, *settings)
        assert found[1:] == want[1:] and len(found.pairs) == len(want.pairs)
        for one, other in zip(found.pairs, want.pairs):
            assert one[3:] == other[3:] and all(np.array_equal(a, b) for a, b in zip(one[:3], other[:3]))
    assert len(written) > 190
    path.write_bytes(content)
    found = data.cached_pairs(path, None, (tmp_path / "f.jsonl",), tokenizer, *settings)
    assert str(path) in Path("/proc/self/maps").read_text() and len(found.pairs) == 20       # not read, but mapped
