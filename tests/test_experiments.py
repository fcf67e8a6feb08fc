"""The language-model experiments, on a small scale: they run, resume after a kill, and measure correctly."""
import json
import math
from types import SimpleNamespace

import experiments
import numpy as np
import pytest
import torch

import train
from data import Pair
from model import Transformer


def options(out, *more):
    return ["--quick", "--out", str(out), "--seeds", "1", "--device", "cpu", *more]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files for --data and --votes, in the form of HH and of PandaLM."""
    folder, words = tmp_path_factory.mktemp("files"), "no yes perhaps never always sometimes".split()
    train.write_jsonl(folder / "pairs.jsonl", (
        {"prompt": f"\n\nHuman: {'Say it. ' * (i % 5 + 1)}{i}\n\nAssistant:", "chosen": f" {words[i % 6]}",
         "rejected": f" {words[i % 6 - 1]} and no"} for i in range(20)))
    train.write_jsonl(folder / "votes.jsonl", (
        {"instruction": f"Say {i}.", "input": "Now." if i % 2 else "", "response1": words[i % 6],
         "response2": words[i % 6 - 1], "annotator1": "1", "annotator2": str(1 + i % 2), "annotator3": i % 3}
        for i in range(12)))
    return "--data", str(folder / "pairs.jsonl"), "--votes", str(folder / "votes.jsonl")


def test_all_of_it_runs_and_goes_on(files, tmp_path, capsys, monkeypatch):
    more = "--methods", "dpo", "phi, true", "phi, majority and votes", "--betas", "0.1"
    experiments.main(["sft", *options(tmp_path), "--rates", "1e-3"])
    reviews, losses = lines(tmp_path / "sft/reviews.jsonl"), lines(tmp_path / "sft/model/metrics.jsonl")
    assert len(reviews) > 10 and all(review["chosen"].strip() for review in reviews) and losses[0]["loss"] > 0
    more += "--model", str(tmp_path / "sft/model")                 # the others start from there
    experiments.main(["sentiment", *options(tmp_path), *more])
    experiments.main(["dialogue", *options(tmp_path), *files])
    experiments.main(["index", *options(tmp_path)])
    experiments.main(["people", *options(tmp_path), *files[2:], "--methods", "dpo, majority", "votes, power 3"])
    experiments.main(["report", *options(tmp_path)])
    said = capsys.readouterr().out
    assert "phi, majority and votes" in said and "minus dpo's" in said and "length-corrected" in said
    rows = {name: lines(tmp_path / f"{name}.jsonl") for name in ("sentiment", "dialogue", "index", "people")}
    assert [row["method"] for row in rows["sentiment"] if "beta" in row] == list(more[1:4])
    assert [row["method"] for row in rows["dialogue"] if "beta" in row] == list(experiments.DIALOGUE)
    assert len(rows["index"]) == 3 * 10                             # a run of one step says nothing on first sight
    assert all(len(row["log_ratios"]["held-out"]) == 4 for row in rows["dialogue"] if "beta" in row)
    runs = [row for row in rows["people"] if "fold" in row]
    found = [(row["fold"], row["method"], row["power"]) for row in runs]
    assert found == [(fold, *each) for fold in range(5) for each in (("dpo, majority", 0.0), ("votes, power 3", 3.0))]
    asked = [task for row in runs[::2] for task in row["tasks"]]
    assert len(set(asked)) == len(asked) > 5
    path, fits = tmp_path / "sentiment.jsonl", []                   # killed while it wrote the last row but one
    whole = path.read_text().splitlines()
    kept = [line for line in whole if '"phi, true"' not in line]
    path.write_text("\n".join(kept) + '\n{"method": "phi, tr')
    monkeypatch.setattr(experiments.Task, "fit", lambda task, *a, fit=experiments.Task.fit, **k: fits.append(k) or fit(
        task, *a, **k))
    experiments.main(["sentiment", *options(tmp_path), *more])
    assert len(fits) == 1 and fits[0]["dispersion"] == "field"
    again, before = ([{**row, "seconds": 0} for row in found if row.get("method") == "phi, true"]
                     for found in (experiments.read_rows(path), rows["sentiment"]))
    assert again == before                                          # to the last bit


def test_errors_are_plain(capsys, tmp_path):
    for arguments, word in ((["sentiment"], "--model"), (["dialogue", "--quick"], "--data"),
                            (["index", "--part", "3/2", "--quick"], "--part"), (["people", "--quick"], "--votes"),
                            (["index", "--model", str(tmp_path / "no")], "no tokenizer.json"),
                            (["dialogue", "--quick", "--data", "no.jsonl", "--votes", "no.jsonl"], "no.jsonl")):
        with pytest.raises(SystemExit) as left:
            experiments.main([*arguments, "--out", str(tmp_path)])
        assert left.value.code == 2 and word in capsys.readouterr().err


def test_openings_and_their_judges():
    """Every kind is in both parts; how often the better one is preferred follows from the kind's noise."""
    parts = experiments.openings()
    assert [len(part) for part in parts] == [200, 100] and not set(parts[0]) & set(parts[1])
    assert all({kind for kind, _ in part} == set(range(20)) for part in parts)
    items = [{"kind": 9, "prompt": "p", "texts": ["good", "bad"], "scores": [0.5, -0.4]}] * 4000
    records = experiments.judged_pairs(items, seed=0)
    votes = np.array([record["votes"] for record in records])
    want = 1 / (1 + math.exp(-0.9 / experiments.NOISE[9]))
    assert np.mean([record["chosen"] == "good" for record in records]) == pytest.approx(want, abs=0.03)
    assert (votes.sum(1) == 3).all() and (votes[:, 0] > 0).all()
    good = [votes[0] if record["chosen"] == "good" else votes[1] for record, votes in zip(records, votes)]
    assert np.mean(good) / 3 == pytest.approx(want, abs=0.03)
    majority = [experiments.by_majority(record) for record in records]
    assert all(record["votes"][0] > record["votes"][1] for record in majority)
    assert all({r["chosen"], r["rejected"]} == {"good", "bad"} for r in majority)


def test_the_area_by_counting():
    rng = np.random.default_rng(0)
    reading, label = rng.integers(0, 6, 60), rng.integers(0, 2, 60)
    ones, zeros = reading[label == 1], reading[label == 0]
    want = np.mean([(a > b) + (a == b) / 2 for a in ones for b in zeros])
    assert experiments.area(reading, label) == pytest.approx(want, abs=1e-12)
    assert math.isnan(experiments.area(reading, np.ones(60)))
    found, se = experiments.area_se(reading, label, np.arange(60))
    assert found == experiments.area(reading, label) and 0.04 < se < 0.12


def test_readings_by_hand():
    pair = Pair(*(np.array(ids, dtype=np.int32) for ids in ([9], [1, 2, 3], [1, 5])), None, "made:1")
    scores = train.Scores(np.array([-1, -2, -3, -4, -6.0]), np.array([1, 2, 6, 1, 4.0]))
    found = {name: reading(scores, pair) for name, reading in experiments.READINGS.items()}
    assert [float(value) for value in found.values()] == [-2.75, -1, -2.75, -2, -2.5, 0.5, 3, 1]


def test_kl_of_samples_is_the_sum_over_the_vocabulary(make_model):
    """Against the sum by hand, one prompt at a time; 0 if the policy is the reference."""
    policy, reference = (Transformer.from_pretrained(make_model(name)) for name in ("llama-tied", "llama-biased"))
    prompts, responses = [[5, 6, 7], [8], [9, 10]], [[1, 2], [3, 4, 5, 6], []]
    found = experiments.kl_of_samples(policy, reference, prompts, responses, 4)
    for prompt, response, value in zip(prompts, responses, found):
        ids, want = torch.tensor([prompt + response]), 0.0
        with torch.no_grad():
            ours, theirs = (model.logits(ids)[0].log_softmax(-1) for model in (policy, reference))
        for t in range(len(response) + (len(response) < 4)):        # the end token too, if there is room
            at = len(prompt) - 1 + t
            want += sum(math.exp(a) * (a - b) for a, b in zip(ours[at].tolist(), theirs[at].tolist()))
        assert value == pytest.approx(want, rel=1e-4)
    assert abs(experiments.kl_of_samples(policy, policy, prompts, responses, 4)).max() == 0


def test_folds_share_no_instruction(tmp_path):
    votes = tmp_path / "votes.jsonl"
    train.write_jsonl(votes, ({"instruction": f"Say {i % 9}.", "input": f"{i}", "response1": "yes", "response2": "no",
                               "annotator1": "2", "annotator2": str(1 + i % 2), "annotator3": 2} for i in range(60)))
    experiments.split_by_task(SimpleNamespace(args=SimpleNamespace(votes=votes, quick=False), folder=tmp_path))
    seen = []
    for fold in range(experiments.FOLDS):
        held_out, majority, unanimous = (lines(tmp_path / f"{name}{fold}.jsonl")
                                         for name in ("held-out", "majority", "unanimous"))
        assert len(held_out) + len(majority) == 60 and all(record["chosen"] == " no" for record in majority)
        assert not {record["task"] for record in held_out} & {record["task"] for record in majority}
        assert unanimous == [record for record in majority if record["votes"] == [3, 0]] and unanimous
        seen += [record["prompt"] for record in held_out]
    assert len(set(seen)) == len(seen) == 60


def test_equal_kl_in_the_middle():
    """Both reach 2 to 3 nats; at 2.5 the scores differ by .1.  Without a common range, or runs: nothing."""
    runs = [{"method": method, "seed": 0, "kl": kl, "score": kl ** 0.5 + more, "score_se": 0.3}
            for method, more, kls in (("phi", 0.1, (2.0, 4.0)), ("dpo", 0.0, (1.0, 3.0)), ("ipo", 0.0, (5.0, 6.0)))
            for kl in kls]
    assert experiments.middle(runs, "phi", "dpo", 0) == 2.5
    assert experiments.compare_at(runs, "phi", "dpo", 2.5, 0) == (pytest.approx(0.1), pytest.approx(0.3 * 2 ** 0.5))
    for method, seed in (("ipo", 0), ("phi", 1), ("theta", 0)):
        assert math.isnan(experiments.middle(runs, method, "dpo", seed))
        assert experiments.compare_at(runs, method, "dpo", math.nan, seed) is None


def test_error_over_groups():
    """Two pairs of one instruction count as one if they are equal."""
    values, group = np.array([1.0, 1.0, 0.0, 0.0, 1.0, 1.0]), np.array([0, 0, 1, 1, 2, 2])
    once = np.array([1.0, 0.0, 1.0])
    want = f"{once.mean():+.3f} +- {once.std() / 3 ** 0.5:.3f}"
    assert experiments.mean_se_of_groups(values, group) == want
