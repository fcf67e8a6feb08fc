"""Records, tokens, the length policy, the schedule and rows; and the population of the demo."""
import gzip
import json
import math

import numpy as np
import pytest
import tokenizers
import torch

from data import BadData, Schedule, Tokenizer, at_kl, collate, load_pairs, pack, parse, read_lines, write_jsonl

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
    assert record == (start, " yes", " no", None, None, "dialogues")


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
    """A BPE over bytes with a start token that the tokenizer adds itself, or one that puts a space before texts."""
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
    prompt, chosen, rejected = tokenizer.pair(parse(GOOD))
    assert tokenizer.bos == bos and prompt[:len(bos)] == bos and prompt.count(0) == len(bos)
    assert chosen[-1] == rejected[-1] == 1 and chosen.count(1) == 1
    written = parse({"prompt": "<s>Ada asks:" if bos else "Ada asks:", "chosen": " yes</s>", "rejected": " no"})
    assert tokenizer.pair(written) == (prompt, chosen, rejected)                 # none is doubled


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
            prompt, chosen, _ = one.pair(parse({"prompt": text[:cut], "chosen": text[cut:], "rejected": "x"}))
            assert one.text(prompt + chosen[:-1]) == text
    with pytest.raises(BadData, match="do not decode to their text"):
        spaced.pair(parse({**GOOD, "chosen": " \N{SNOWMAN}"}))                 # an unknown character


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
        assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= 36
    with pytest.raises(BadData, match=r"f.jsonl:\d+: a response does not fit into --max-tokens 36"):
        load_pairs(tmp_path / "f.jsonl", tokenizer, 36)


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
    assert [0] in pack([0], [5000], 100)                                        # ends, whatever the budget


def test_collate_lays_out_a_shared_prompt():
    rows = collate([([1, 2, 3], [10, 11, 12], [20]), ([4], [13, 14], [21, 22])])
    assert rows.tokens.tolist() == [[1, 2, 3, 10, 11, 4, 13, 21]]               # no response's last token
    assert rows.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 1]]
    assert rows.segments.tolist() == [[0, 0, 0, 1, 1, 16, 17, 18]]
    assert rows.source.tolist() == [2, 3, 4, 2, 5, 6, 5, 7]
    assert rows.target.tolist() == [10, 11, 12, 20, 13, 14, 21, 22]
    assert rows.total(torch.ones(8)).tolist() == rows.length.tolist() == [[3, 1], [2, 2]]


# --- the population -----------------------------------------------------------------------------------------

def test_population_judges_at_the_exact_rates(population):
    counts, wins = torch.zeros(24, 6, 6), population.wins
    for i, row in enumerate(population.judgements(48_000, seed=5)):
        better, worse = (population.answers[i % 24].index(row[side].strip()) for side in ("chosen", "rejected"))
        counts[i % 24, better, worse] += 1
    total = counts + counts.transpose(1, 2)
    z = (counts / total - wins) / (wins * (1 - wins) / total).sqrt()
    assert z[:, ~torch.eye(6, dtype=torch.bool)].abs().max() < 5
    assert torch.allclose(wins + wins.transpose(1, 2), torch.ones(24, 6, 6).double())


def test_population_asks_readable_questions(population, tokenizer):
    assert len(set(population.questions)) == 24 and all(len(set(words)) == 6 for words in population.answers)
    rows = list(population.favourites(48, 0))
    assert rows[0]["prompt"].endswith(" asks: What is one plus one?\nAnswer:") and rows[0]["chosen"] == " two"
    assert all(len(tokenizer.response(" " + word)) == 2 for words in population.answers for word in words)


def test_measures_against_sampling(population):
    generator = torch.Generator().manual_seed(0)
    ref, logp = (torch.randn(24, 2, 6, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    found = population.measure(logp, ref)
    p, r = logp.exp(), ref.exp()
    both, six, wins = range(2), range(6), population.wins[3]
    kl = sum(p[3, n, i] * (logp[3, n, i] - ref[3, n, i]) for n in both for i in six) / 2
    win = sum(p[3, n, i] * r[3, n, j] * wins[i, j] for n in both for i in six for j in six) / 2
    assert found["kl"][3].item() == pytest.approx(kl.item())
    assert found["win_rate"][3].item() == pytest.approx(win.item())
    same = population.measure(ref, ref)
    assert torch.allclose(same["win_rate"], torch.tensor(0.5).double()) and (same["reward_accuracy"] == 0.5).all()
    ideal = population.measure(ref - torch.arange(6.0), ref)
    assert ideal["reward_accuracy"].mean().item() == pytest.approx(population.best_accuracy())
    best = torch.maximum(population.wins, 1 - population.wins)
    assert best[:, torch.ones(6, 6).triu(1).bool()].mean().item() == pytest.approx(population.best_accuracy())
    assert found["elsewhere"].abs().max() < 1e-6


def test_figures_at_a_kl_lie_between_two_steps():
    path = {"kl": [0.0, 0.1, 0.3, 0.2], "win_rate": [0.5, 0.6, 0.7, 0.65]}
    assert at_kl(path, 0.2) == {"kl": pytest.approx(0.2), "win_rate": pytest.approx(0.65)}
    assert at_kl(path, 0.1)["win_rate"] == pytest.approx(0.6) and at_kl(path, 0.4) is None
