"""Real rankings: files that are wrong, and what people.py finds in those that are right."""
import json
import os
import subprocess
import sys
from pathlib import Path

import people
import pytest
import torch

import bandit

FIXTURE = Path(__file__).parent / "rankings.soi"
PREFLIB = Path(os.environ.get("PREFLIB", "nowhere"))
DOTS, APA = sorted((PREFLIB / "00024-dots").glob("*.soc")), sorted((PREFLIB / "00028-apa").glob("*.soi"))
needs_preflib = pytest.mark.skipif(not DOTS, reason="PREFLIB is not a folder with 00024-dots and 00028-apa")


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Run people.py in this process and give back its JSON."""
    def go(*words):
        monkeypatch.setattr(sys, "argv", ["people.py", *map(str, words), "--out", str(tmp_path)])
        people.main()
        return json.loads((tmp_path / "people.json").read_text())
    return go


def test_moments_at_uniform_and_near():
    for lam in (0.0, 1e-9):
        mean, variance = people.distance_moments(5, torch.tensor(lam, dtype=torch.float64))
        assert mean == pytest.approx(5, abs=1e-7) and variance == pytest.approx(25 / 6, abs=1e-7)


@needs_preflib
def test_people_dots(go):
    record = go(*DOTS, "--seeds", 30, "--pairs", 256)
    assert [item["phi"] for item in record["files"]] == pytest.approx([.771, .701, .585, .536], abs=.002)
    assert all(item["centre"] == [1, 2, 3, 4] and item["items"] == 4 for item in record["files"])
    minus = {row["index"]: row["minus DPO"] for row in record["rows"]}
    assert minus["phi, inverted entropy"] < -3
    assert minus["phi, shuffled index"] > 2
    assert .97 < bandit.pick(record["rows"], "slope", index="phi, best index")[0] < 1.07


@needs_preflib
def test_people_elections(go):
    record = go(*APA[:2], "--seeds", 2, "--pairs", 64)
    assert [item["voters"] for item in record["files"]] == [10978, 10623]
    assert [item["voters in file"] for item in record["files"]] == [18723, 17469]
    assert [item["phi"] for item in record["files"]] == pytest.approx([.7943, .8381], abs=.002)


def test_people_on_the_fixture(go):
    record = go(FIXTURE, FIXTURE, "--seeds", 3, "--pairs", 8)
    item = record["files"][0]
    assert (item["items"], item["voters"], item["voters in file"]) == (4, 20, 25)
    assert item["centre"] == [2, 1, 3, 4] and 0 < item["phi"] < 1
    ballots = people.read_rankings(str(FIXTURE))
    assert ballots.ranks.tolist()[1] == [0, 1, 2, 3]        # the order 1,2,3 leaves out 4: it is the last
    assert len(record["rows"]) == 8


HEAD = "# NUMBER ALTERNATIVES: 3\n"


@pytest.mark.parametrize("text, line, word", [
    (HEAD + "# NUMBER VOTERS: 9\n5: 1,2,3\n", 2, "9 voters"),
    (HEAD + "# NUMBER UNIQUE ORDERS: 2\n5: 1,2,3\n", 2, "unique orders"),
    (HEAD + "5: 1,2,3\n\n4: 1,2,2\n", 4, "item 2 appears twice"),
    (HEAD + "5: 1,{2,3}\n", 2, "tie"),
    (HEAD + "5: 1,2,4\n", 2, "unknown item 4"),
    (HEAD + "5: 1,2,0\n", 2, "unknown item 0"),
    (HEAD + "0: 1,2,3\n", 2, "COUNT"),
    (HEAD + "-1: 1,2,3\n", 2, "COUNT"),
    (HEAD + "five: 1,2,3\n", 2, "COUNT"),
    (HEAD + "5: 1,2\n", 2, "2 items of 3"),
    (HEAD + "5: 1,2,3\n5: 1,2,3\n", 3, "order appeared before"),
    (HEAD + "5: 1,2,3\n# NUMBER ALTERNATIVES: 4\n", 3, "key appeared before"),
    (HEAD, 1, "without an order"),
    ("", 1, "without an order"),
    ("5: 1,2,3\n", 1, "NUMBER ALTERNATIVES"),
    ("# NUMBER ALTERNATIVES: three\n", 1, "whole number"),
    (b"\x89PNG\r\n\x1a\n\0\xff", 1, "not a text file"),
])
def test_bad_rankings_get_file_and_line(tmp_path, text, line, word):
    path = tmp_path / "bad.soc"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(people.BadFile, match=rf"bad\.soc:{line}: .*{word}"):
        people.read_rankings(str(path))


@pytest.mark.parametrize("words, word", [
    ([], "PrefLib.org"), (["not/there.soc"], "not/there.soc"), ([FIXTURE.parent], "tests"),
    ([FIXTURE, "--seeds", "0"], "--seeds"), ([FIXTURE, "--pairs", "few"], "--pairs"),
])
def test_silly_arguments_get_one_line(run, words, word, tmp_path):
    done = run("people.py", *words, "--out", tmp_path)
    assert done.returncode == 2 and word in done.stderr.splitlines()[-1]


def test_it_runs_as_a_script(tmp_path):
    (tmp_path / "bad.soc").write_text("5: 1,2,3\n")
    words = ["tests/people.py", tmp_path / "bad.soc", "--out", tmp_path]
    done = subprocess.run([sys.executable, *words], cwd=FIXTURE.parent.parent, capture_output=True, text=True)
    assert done.returncode == 2 and "bad.soc:1: " in done.stderr and "Traceback" not in done.stderr
