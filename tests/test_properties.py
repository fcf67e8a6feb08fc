"""What holds for every input: files, tokens, the schedule, packing and rows, on thousands of random ones."""
import gzip
import json
import math
import shutil

import numpy as np
import pytest
from conftest import pair_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import PLAIN, special_tokenizer

from data import BadData, Schedule, Tokenizer, collate, load_pairs, pack, parse, read_pairs
from model import BRANCHES


def drawn(examples, **strategies):
    """Run a test on this many random examples, the same ones each time."""
    def decorate(test):
        return settings(max_examples=examples, derandomize=True, deadline=None, database=None,
                        suppress_health_check=list(HealthCheck))(given(**strategies)(test))
    return decorate


@pytest.fixture(scope="module")
def tokenizer(make_model, tmp_path_factory):
    """Over bytes, so that every text has tokens; with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(make_model() / name, folder)
    (folder / "chat_template.jinja").write_text(PLAIN)
    return Tokenizer(folder)


# --- files --------------------------------------------------------------------------------------------------

ODD = ["\0", "\ud83d", "\udc00x", "\ufeff", "\u2028", "\r\n", "<end>", "\N{SNOWMAN}", "a\u0301", "\U0001f600", " ",
       "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c", "\n\nAssistant:", "\x1b[2J", "{{ 1 }}", ""]
TEXTS = st.one_of(st.sampled_from(ODD), st.text(st.characters(codec=None), max_size=12),
                  st.lists(st.sampled_from(ODD), max_size=3).map("".join))
WHOLE = st.text(min_size=1, max_size=30)                           # whole characters, no half of a surrogate pair
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([10 ** 400, -1, 2 ** 31, 2 ** 63, 0.5, True, 1e-320]))
ANYTHING = st.recursive(st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS), lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)), max_leaves=6)
MESSAGES = st.lists(st.one_of(ANYTHING, st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "bot", 3, None]),
     "content": st.one_of(TEXTS, ANYTHING, st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}),
                                                     max_size=2))},
    optional={"name": ANYTHING})), max_size=4)
SIDES = st.one_of(TEXTS, MESSAGES, ANYTHING)
RECORDS = st.fixed_dictionaries({}, optional={
    "prompt": SIDES, "chosen": SIDES, "rejected": SIDES, "dispersion": ANYTHING, "votes": ANYTHING, "x": ANYTHING})


@st.composite
def good_records(draw):
    """A record that must load, in any of the four forms."""
    prompt, chosen, rejected = (draw(WHOLE.filter(lambda text: "<" not in text)) for _ in range(3))
    rejected = chosen + rejected
    turns = [{"role": "user", "content": prompt}]
    reply = lambda text: [{"role": "assistant", "content": "." + text}]
    record = draw(st.sampled_from([
        {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        {side: f"{prompt}\n\nAssistant:{text}" for side, text in (("chosen", chosen), ("rejected", rejected))},
        {"prompt": turns, "chosen": "." + chosen, "rejected": reply(rejected)[0]["content"]},
        {"chosen": turns + reply(chosen), "rejected": turns + reply(rejected)}]))
    return record | draw(st.sampled_from([{}, {"dispersion": 0.3}, {"votes": [2, 1]}, {"source": ["x", {"y": None}]}]))


@st.composite
def lines(draw):
    """(the content of a line, whether it must load: None if it may or may not)."""
    kind = draw(st.integers(0, 9))
    if kind < 3:
        return json.dumps(draw(good_records())).encode(), True
    if kind == 3:
        return draw(st.binary(max_size=30)).replace(b"\n", b"").lstrip(b"\xef\xbb\xbf"), None   # (that mark: see bom)
    if kind == 4:
        return draw(st.sampled_from([b"", b"  ", b"\t\r"])), None
    record = draw(st.one_of(RECORDS, ANYTHING) if kind > 5 else good_records())
    text = json.dumps(record, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if kind == 9:
        return text[:draw(st.integers(0, len(text)))], None
    if kind == 8 and text.startswith(b'{"'):                        # a key appears twice
        return b'{"prompt": "a", "prompt": "b", ' + text[1:], False
    return text, True if kind == 5 else None


@drawn(1200, content=st.lists(lines(), max_size=6), end=st.sampled_from([b"\n", b"\r\n"]), bom=st.booleans(),
       pack_as=st.sampled_from(["jsonl", "jsonl", "jsonl.gz", "json", "json.gz"]), damage=st.integers(0, 40))
def test_a_file_loads_or_names_its_line(tmp_path_factory, tokenizer, content, end, bom, pack_as, damage):
    """Each line is judged alone: good ones load, bad ones are named (without skip_bad, only the first)."""
    path = tmp_path_factory.getbasetemp() / f"drawn.{pack_as}"
    raw = b"\xef\xbb\xbf" * bom + end.join(line for line, _ in content)
    parquet = raw.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"PAR1")    # or taken for it
    broken = pack_as.endswith("gz") and damage < 4
    raw = gzip.compress(raw)[:-1 - 2 * damage if broken else None] if pack_as.endswith("gz") else raw
    path.write_bytes(raw)
    if parquet or broken or pack_as in ("json", "json.gz"):         # the latter may be arrays: no lines are known
        content = None
    try:
        found = [(where, error) for where, error, _ in read_pairs(path, tokenizer)]
    except BadData as error:                                        # the file as a whole is bad
        assert str(error).startswith(f"{path}:") and content is None
        return
    bad = [(where, str(error)) for where, error in found if isinstance(error, BadData)]
    assert all(message and "\n" not in message and len(message) <= 500 for _, message in bad)
    if content is not None:
        there = {f"{path}:{number}": good for number, (line, good) in enumerate(content, 1) if line.strip()}
        assert [where for where, _ in found] == list(there)
        assert not [where for where, _ in bad if there[where]]
        assert all(where in dict(bad) for where, good in there.items() if good is False)
    if bad:
        with pytest.raises(BadData) as error:
            load_pairs(path, tokenizer, 10 ** 6)
        assert str(error.value) == ": ".join(bad[0])
    if len(bad) < len(found):
        data = load_pairs(path, tokenizer, 10 ** 6, skip_bad=True)
        assert len(data.pairs) == len(found) - len(bad) and data.bad == len(bad)
        assert {pair.where for pair in data.pairs} == {where for where, _ in found} - dict(bad).keys()
    else:
        with pytest.raises(BadData, match=r"drawn.json.*: no pairs in it"):
            load_pairs(path, tokenizer, 10 ** 6, skip_bad=True)


@drawn(600, item=st.one_of(RECORDS, ANYTHING), need=st.booleans())
def test_a_record_is_parsed_or_refused(item, need):
    try:
        record = parse(item, need)
    except BadData as error:
        assert "\n" not in str(error)
        return
    assert record.chosen and (record.rejected or not need) and record.chosen != record.rejected
    assert {type(record.prompt), type(record.chosen)} in ({str}, {list})
    assert record.dispersion is None or 0 < record.dispersion <= 1


# --- tokens -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizers(tokenizer, tmp_path_factory):
    return tokenizer, *(special_tokenizer(tmp_path_factory.mktemp(kind), kind) for kind in ("start", "both"))


SPELT = st.lists(st.one_of(WHOLE, st.sampled_from(["<s>", "</s>", "<end>", "<unk>", " ", "\n", "\0", "yes"])),
                 min_size=1, max_size=4).map("".join)


@drawn(400, prompt=SPELT, chosen=SPELT, rejected=SPELT)
def test_tokens_decode_to_the_text(tokenizers, prompt, chosen, rejected):
    """Exactly, also where a text spells a special token; with one end token and no second start token."""
    for one in tokenizers:
        end, start = one.text([one.eos]), one.text(one.bos)
        if chosen.removesuffix(end) == rejected.removesuffix(end):
            continue
        ids, *sides = pair_ids(one, parse({"prompt": prompt, "chosen": chosen, "rejected": rejected}))
        assert one.text(ids) == start + prompt.removeprefix(start)
        for text, side in zip((chosen, rejected), sides):
            assert side[-1] == one.eos and one.text(side) == text.removesuffix(end) + end
            assert one.text(ids + side) == start + prompt.removeprefix(start) + text.removesuffix(end) + end


# --- schedule, packing, rows --------------------------------------------------------------------------------

COSTS = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@drawn(400, costs=COSTS, batch_size=st.integers(1, 70), seed=st.integers(0, 2 ** 32 - 1), world=st.integers(1, 9),
       spare=st.integers(0, 300), epoch=st.one_of(st.integers(0, 3), st.integers(0, 10 ** 6)))
def test_the_schedule_is_a_permutation_each_epoch(costs, batch_size, seed, world, spare, epoch):
    schedule = Schedule(costs, batch_size, seed, max(costs) + spare)
    assert schedule.steps_per_epoch == math.ceil(len(costs) / batch_size)
    steps, seen = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch), []
    for step in steps:
        batch = schedule.batch(step)
        shares = [schedule.rows(step, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1 and len(batch) <= batch_size
        assert sorted(i for share in shares for row in share for i in row) == sorted(batch)
        assert all(sum(costs[i] for i in row) <= max(costs) + spare for share in shares for row in share)
        assert Schedule(costs, batch_size, seed, 10 ** 6).batch(step) == batch       # whatever was asked before
        seen += batch
    assert sorted(seen) == list(range(len(costs)))


@drawn(400, costs=COSTS, budget=st.integers(1, 400), multiple=st.integers(1, 9), part=st.randoms(use_true_random=False))
def test_packing_loses_nothing_and_keeps_the_budget(costs, budget, multiple, part):
    indices = part.sample(range(len(costs)), part.randint(1, len(costs)))
    rows = pack(indices, costs, budget, multiple)
    assert sorted(i for row in rows for i in row) == sorted(indices) and len(rows) % multiple == 0
    loads = [sum(costs[i] for i in row) for row in rows]
    if max(costs[i] for i in indices) <= budget:
        assert max(loads) <= budget
    else:                                                            # only what fits nowhere exceeds it, alone
        assert all(load <= budget or len(row) == 1 for load, row in zip(loads, rows))


GROUPS = st.integers(0, 3).flatmap(lambda responses: st.lists(st.tuples(
    st.lists(st.integers(0, 999), min_size=1, max_size=8),
    *[st.lists(st.integers(0, 999), max_size=6)] * responses), min_size=1, max_size=5))


@drawn(400, groups=GROUPS.filter(lambda groups: any(map(len, groups[0][1:]))))
def test_each_scored_token_sees_its_prompt_and_its_own_response(groups):
    """In a row, the prediction of a token sees the prompt, then its own response before that token."""
    rows = collate([tuple(map(np.array, group)) for group in groups], BRANCHES)
    tokens, positions, segments = (x[0].tolist() for x in rows.inputs()[:3])
    found = {}
    for source, target, owner in zip(*(x.tolist() for x in (rows.source, rows.target, rows.owner))):
        group, branch = divmod(segments[source], BRANCHES)
        own = (group * BRANCHES, segments[source])                   # the prompt, and its own response
        seen = [j for j in range(source + 1) if segments[j] in own]
        assert [positions[j] for j in seen] == list(range(len(seen)))
        g, r = divmod(owner, len(groups[0]) - 1)
        assert g == group and branch in (0, r + 1)
        before = found.setdefault((g, r), [])
        assert [tokens[j] for j in seen] == [*groups[g][0], *before]
        before.append(target)
    want = {(g, r): ids for g, (_, *responses) in enumerate(groups) for r, ids in enumerate(responses) if ids}
    assert found == want and rows.length.tolist() == [[len(ids) for ids in group[1:]] for group in groups]
    assert len(tokens) == sum(len(prompt) + sum(max(0, len(ids) - 1) for ids in responses)
                              for prompt, *responses in groups)
