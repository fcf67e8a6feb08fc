"""train.py as a user runs it."""
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file

import mallowspo
import train
from data import Schedule, Split, Tokenizer, load_pairs
from mallowspo import LOSSES
from model import Transformer, add_lora
from train import Config, write_jsonl

# (Adam moves a weight whose gradient is rounding error by up to the learning rate; same_run bounds that, too.)
QUICK = ["--steps", 3, "--batch-size", 16, "--lr", 3e-6, "--samples", 1, "--sample-tokens", 4, "--max-tokens", 64]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory, population):
    path = tmp_path_factory.mktemp("held") / "held.jsonl"
    write_jsonl(path, population.judgements(20, seed=9))
    return path


@pytest.fixture(scope="module")
def trained(run, make_model, pairs, held_out, tmp_path_factory):
    """One run of one process, with one row per step."""
    out = tmp_path_factory.mktemp("out")
    done = run("train.py", "--model", make_model(), "--data", pairs, "--eval-data", held_out, "--out", out, *QUICK)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_first_step_is_the_reference(trained):
    first = rows_of(trained[0] / "metrics.jsonl")[0]
    assert first["step"] == 0 and first["accuracy"] == 0.5 and first["margin"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert "step     1/3  loss 0.6931  accuracy 0.500" in trained[1]
    assert "first loss is 0.693147; for a policy that equals its reference it is 0.693147" in trained[1]


def test_records(trained, pairs):
    out, said = trained
    rows = rows_of(out / "metrics.jsonl")
    evaluations = rows_of(out / "evaluations.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2] and [r["step"] for r in evaluations] == [0, 3]
    assert set(rows[0]) >= {"step", "loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "lr",
                             "grad_norm", "pairs_per_second", "tokens_per_second"}
    assert evaluations[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert evaluations[1]["loss"] < evaluations[0]["loss"]
    found = rows_of(out / "dispersion.jsonl")
    assert len(found) == 48 and sum(r["weight"] for r in found) / 48 == pytest.approx(1, abs=1e-5)
    for row in found:
        assert row["phi"] == pytest.approx(math.exp(-row["weight"] / 2), rel=1e-5) and 0 < row["entropy"] < 1
        assert row["where"] == f"{pairs}:{row['index'] + 1}"
    agrees, schedule = {row["index"]: row["agrees"] for row in found}, Schedule([1] * 50, 16, 0, 99)
    assert all(agrees[i] is None for i in schedule.batch(0))                     # there the policy is the reference
    for step in (1, 2):
        right = [agrees[i] for i in schedule.batch(step)]
        assert set(right) <= {0, 0.5, 1} and sum(right) / 16 == pytest.approx(rows[step]["accuracy"])
    record = json.loads((out / "run.json").read_text())
    assert record["finished"] and record["steps"] == 3 and record["config"]["batch_size"] == 16
    assert f"phi_star {record['phi_star']:.4f} (calibrated)" in said
    sample, = rows_of(out / "samples.jsonl")
    assert sample["prompt"].endswith("Answer:") and {"chosen", "rejected", "before", "after"} <= set(sample)
    assert not [path for path in out.iterdir() if path.suffix == ".new" or path.name.startswith(".")]


def test_weights_follow_from_the_entropy_of_transformers(trained, make_model, pairs):
    """The index of one pair, from transformers' logits alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(make_model())
    tokenizer = transformers.AutoTokenizer.from_pretrained(make_model())
    row = rows_of(trained[0] / "dispersion.jsonl")[7]
    record = rows_of(pairs)[row["index"]]
    means = []
    for side in ("chosen", "rejected"):
        prompt, response = (tokenizer(record[name])["input_ids"] for name in ("prompt", side))
        ids = torch.tensor([prompt + response + [tokenizer.eos_token_id]])
        with torch.no_grad():
            log_p = model(ids).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        means.append(-(log_p.exp() * log_p).sum(-1).mean().item())
    assert row["entropy"] == pytest.approx(sum(means) / 2 / math.log(model.config.vocab_size), abs=1e-6)


def test_the_folder_loads_in_transformers(trained, make_model):
    out, start = trained[0], load_file(make_model() / "model.safetensors")
    saved = load_file(out / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in saved.items()} == {n: (t.shape, t.dtype) for n, t in start.items()}
    assert any(not torch.equal(saved[name], start[name]) for name in start)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out)(ids).logits
        assert (theirs - Transformer.from_pretrained(out).logits(ids)).abs().max() < 1e-4
    assert transformers.AutoTokenizer.from_pretrained(out).eos_token == "<end>"
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]      # a loader finds no other
    card = (out / "README.md").read_text()
    assert card.startswith("---\nbase_model: ") and "preference-trained by mallows-theta" in card
    assert "| held-out loss | 0." in card and "trust" in card and "| beta | 0.1 |" in card and "smoothing" not in card


def same_run(trained, other, exactly=False):
    """The same weights and figures; a mistake that moves every weight a little shows in the mean."""
    start, theirs = (load_file(out / "model.safetensors") for out in (trained, other))
    for name in start:
        gap = (start[name] - theirs[name]).abs()
        assert gap.max() <= (0 if exactly else 1e-6) and gap.mean() <= (0 if exactly else 1e-8), name
    assert (trained / "evaluations.jsonl").exists() == (other / "evaluations.jsonl").exists()
    for file in [path.name for path in trained.glob("[em]*.jsonl")]:
        for one, two in zip(rows_of(trained / file), rows_of(other / file), strict=True):
            for key in set(one) - {"pairs_per_second", "tokens_per_second", "memory_gib", "seconds"}:
                assert one[key] == pytest.approx(two[key], rel=2e-3 if key == "grad_norm" else 1e-4, abs=1e-5), key


@pytest.mark.parametrize("processes, row", [(1, 64), (2, 2048), (3, 50)])
def test_processes_and_rows_change_nothing(trained, run, make_model, pairs, held_out, tmp_path, processes, row):
    """50 pairs in batches of 16 over 2 and 3 processes: neither number divides."""
    done = run("train.py", "--model", make_model(), "--data", pairs, "--eval-data", held_out, "--out", tmp_path / "out",
               "--tokens-per-row", row, *QUICK, processes=processes)
    assert done.returncode == 0, done.stderr
    same_run(trained[0], tmp_path / "out")


def test_a_short_last_batch_over_more_processes_than_pairs(run, make_model, tmp_path, population):
    write_jsonl(tmp_path / "five.jsonl", population.judgements(5, 0))
    flags = ["--model", make_model(), "--data", tmp_path / "five.jsonl", "--batch-size", 4, "--epochs", 2,
             "--samples", 0, "--lr", 3e-6]
    for processes in (1, 2):
        done = run("train.py", *flags, "--out", tmp_path / str(processes), processes=processes)
        assert done.returncode == 0, done.stderr
    same_run(tmp_path / "1", tmp_path / "2")
    assert [r["step"] for r in rows_of(tmp_path / "1/metrics.jsonl")] == [0, 1, 2, 3]


def test_pairs_come_through_a_pipe(make_model, pairs, tmp_path):
    flags = ["--model", make_model(), "--data", "/dev/stdin", "--steps", "1", "--samples", "0", "--out", tmp_path]
    done = subprocess.run([sys.executable, ROOT / "train.py", *flags], input=pairs.read_bytes(), capture_output=True)
    assert done.returncode == 0 and not (tmp_path / "cache/data.safetensors").exists(), done.stderr


def test_curves_and_progress(trained, run, make_model, pairs, held_out, tmp_path, monkeypatch):
    if importlib.util.find_spec("matplotlib"):
        assert (trained[0] / "curves.png").stat().st_size > 10_000
    monkeypatch.setattr(train, "PROGRESS_SECONDS", -1)
    done = run("train.py", "--model", make_model(), "--data", pairs, "--eval-data", held_out, "--out", tmp_path, *QUICK)
    assert done.returncode == 0, done.stderr
    for words in (r"reading     49 records, [\d.,]+ per second", r"reference   1 of \d+ rows, left ",
                  r"held out    1 of \d+ batches, left "):
        assert re.search(words, done.stdout), words


def test_second_run_reuses_the_reference_and_repeats(trained, run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    before = (out / "cache/reference.safetensors").stat().st_mtime_ns
    done = run("train.py", "--config", out / "run.json", "--out", out)
    assert done.returncode == 0 and "all scores reused" in done.stdout, done.stderr
    assert (out / "cache/reference.safetensors").stat().st_mtime_ns == before
    same_run(trained[0], out, exactly=True)
    longer = run("train.py", "--config", out / "run.json", "--out", out, "--steps", 4, "--loss", "dpo")
    assert longer.returncode == 0 and "scoring 2 pairs" in longer.stdout         # the two that step 4 adds
    shorter = run("train.py", "--config", out / "run.json", "--out", out, "--loss", "mallows-theta", "--steps", 3)
    assert shorter.returncode == 0, shorter.stderr
    same_run(trained[0], out, exactly=True)


def test_pairs_are_tokenised_once(run, make_model, pairs, tmp_path):
    """A second run and a second process take them from OUT/cache, unless the file or a setting has changed."""
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    shutil.copy(pairs, data)
    flags = ["train.py", "--model", make_model(), "--data", data, "--out", out, "--steps", 2, "--batch-size", 4,
             "--samples", 0]
    assert run(*flags).returncode == 0
    cache = out / "cache/data.safetensors"
    first, made = load_file(cache), cache.stat().st_mtime_ns

    def as_first():
        now = load_file(cache)
        return now.keys() == first.keys() and all(torch.equal(now[name], first[name]) for name in first)
    for more, processes in (([], 1), ([], 2)):
        done = run(*flags, *more, processes=processes)
        assert done.returncode == 0 and cache.stat().st_mtime_ns == made, done.stderr
    assert run(*flags, "--max-tokens", 60).returncode == 0 and cache.stat().st_mtime_ns != made        # made again
    assert run(*flags).returncode == 0 and as_first()
    data.write_text(data.read_text().replace("one", "two", 1))
    assert run(*flags).returncode == 0 and not as_first()
    cache.write_bytes(b"broken")
    assert run(*flags).returncode == 0 and load_file(cache)["ids"].shape == first["ids"].shape
    dry = tmp_path / "dry"
    assert run(*flags[:-6], "--out", dry, "--dry-run").returncode == 0 and not dry.exists()


def test_a_reference_of_other_weights_is_refused(trained, run, make_model, pairs, tmp_path):
    (tmp_path / "cache").mkdir()
    shutil.copy(trained[0] / "cache/reference.safetensors", tmp_path / "cache")
    done = run("train.py", "--model", make_model("gpt2"), "--data", pairs, "--out", tmp_path, *QUICK)
    refused(done, "reference.safetensors: scored by other weights")
    shutil.copytree(make_model(), tmp_path / "other")
    settings = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps({**settings, "rms_norm_eps": 0.5}))
    done = run("train.py", "--model", tmp_path / "other", "--data", pairs, "--out", tmp_path, *QUICK)
    refused(done, "reference.safetensors: scored by other weights")
    (tmp_path / "cache/reference.safetensors").write_bytes(b"broken")
    refused(run("train.py", "--model", make_model(), "--data", pairs, "--out", tmp_path, *QUICK), "not a whole file")


@pytest.mark.parametrize("loss, dispersion", [(loss, source) for loss, row in LOSSES.items() for source in
                                              ("constant", "entropy") if row.link or source == "constant"])
def test_every_loss_trains(run, make_model, pairs, tmp_path, loss, dispersion):
    rewarded = tmp_path / "rewarded.jsonl"
    write_jsonl(rewarded, [{**row, "rewards": [i % 3, -1]} for i, row in enumerate(rows_of(pairs))])
    more = ["--references", make_model("gpt2")] if loss == "mrpo" else []
    done = run("train.py", "--model", make_model("gpt2"), "--data", rewarded, "--out", tmp_path / "out", "--loss", loss,
               "--dispersion", dispersion, "--eval-pairs", 10, "--epochs", 3, "--batch-size", 20, "--lr", 1e-3,
               "--samples", 0, *more)
    assert done.returncode == 0 and "WARNING" not in done.stdout, done.stdout + done.stderr
    assert ("check " in done.stdout) == (LOSSES[loss].alpha > 0)
    rows = rows_of(tmp_path / "out/metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] and len(rows) == 6


def test_dispersion_of_the_data_and_given_scale(run, make_model, pairs, tmp_path):
    flags = ["train.py", "--model", make_model(), "--data", pairs, *QUICK]
    done = run(*flags, "--out", tmp_path / "a", "--loss", "mallows-phi", "--dispersion", "field", "--phi-star", 1)
    assert done.returncode == 0 and "phi_star 1.0000 (given)" in done.stdout, done.stderr
    records = rows_of(pairs)
    for row in rows_of(tmp_path / "a/dispersion.jsonl"):
        assert row["phi"] == pytest.approx(records[row["index"]]["dispersion"], rel=1e-5)
    done = run(*flags, "--out", tmp_path / "b", "--dispersion-power", 0)
    plain = run(*flags, "--out", tmp_path / "c", "--loss", "dpo")
    assert done.returncode == plain.returncode == 0
    same_run(tmp_path / "b", tmp_path / "c", exactly=True)                       # power 0 is DPO


def test_bfloat16_runs(run, make_model, pairs, tmp_path):
    done = run("train.py", "--model", make_model(), "--data", pairs, "--out", tmp_path, "--dtype", "bfloat16", *QUICK)
    assert done.returncode == 0, done.stderr
    first = rows_of(tmp_path / "metrics.jsonl")[0]
    assert first["accuracy"] == 0.5 and first["loss"] == pytest.approx(math.log(2), abs=1e-6)


# --- bad input ----------------------------------------------------------------------------------------------

def refused(done, words, status=2):
    assert done.returncode == status, done.stdout + done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1 or "usage" in done.stderr          # one line (argparse adds the usage)


GOOD = {"prompt": "Ada asks:", "chosen": " yes", "rejected": " no"}


@pytest.mark.parametrize("lines, words", [
    ([json.dumps(GOOD), '{"prompt": "a", "chos'], "data.jsonl:2: not JSON"),
    ([json.dumps({"prompt": "a", "chosen": "b"})], "data.jsonl:1: has no 'rejected'"),
    ([json.dumps(GOOD), json.dumps({**GOOD, "chosen": 3})], "data.jsonl:2: 'chosen' is the number 3"),
    ([json.dumps({**GOOD, "rejected": ""})], "data.jsonl:1: 'rejected' is empty"),
    ([json.dumps({**GOOD, "rejected": " yes"})], "data.jsonl:1: 'chosen' and 'rejected' are the same"),
    ([json.dumps({**GOOD, "chosen": " yes" * 500})], "data.jsonl:1: a response does not fit into --max-tokens"),
    ([], "data.jsonl: no pairs"),
])
def test_bad_data_is_refused(run, make_model, tmp_path, lines, words):
    (tmp_path / "data.jsonl").write_text("".join(line + "\n" for line in lines))
    done = run("train.py", "--model", make_model(), "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out")
    refused(done, words)
    assert not (tmp_path / "out/run.json").exists()


@pytest.mark.parametrize("flags, words", [
    (["--betta", "1"], "unrecognized arguments: --betta 1"), (["--batch", "1"], "unrecognized arguments: --batch"),
    (["--beta", "abc"], "invalid float value: 'abc'"), (["--steps", "1.5"], "invalid int value"),
    (["--loss", "foo"], "invalid choice: 'foo'"), (["--beta", "-1"], "--beta is -1.0, it must be a number above 0"),
    (["--lr", "nan"], "--lr is nan"), (["--margin", "inf"], "--margin is inf"), (["--eta", "-1"], "--eta is -1.0"),
    (["--model", ""], "--model is '', it must not be empty"), (["--eval-data", "x", "--eval-pairs", 3], "one of them"),
    (["--batch-size", "0"], "--batch-size is 0"),
    (["--dispersion-power", "9"], "--dispersion-power is 9.0"),
    (["--dispersion-power", "a"], "'a' is neither learn nor a number"),
    (["--dispersion", "scores"], "no 'scores'"),
    (["--dispersion-power", "learn", "--loss", "dpo"], "--loss dpo has no dispersion"),
    (["--dispersion-power", "learn", "--phi-star", "1"], "--phi-star is for a power that is given"),
    (["--max-tokens", "5000"], "made for 128 positions"),
    (["--tokens-per-row", "5"], "--tokens-per-row 5 is too small for"), (["--eval-pairs", "50"], "leaves none"),
    (["--device", "cuda"], "no CUDA device"), (["--dtype", "float16"], "needs a GPU"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"), (["--data", "."], ".: a folder; give its files"),
    (["--eval-data", "nowhere.jsonl"], "nowhere.jsonl: no such file"), (["--model", "nowhere"], "nowhere: no"),
    (["--dispersion", "votes"], "no 'votes'"), (["--seed", 2 ** 64], "below 2^32"),
    (["--loss", "sft", "--dispersion", "entropy"], "has no meaning for --loss sft"),
    (["--reference", "."], "a folder, it should be a file"),
    (["--epochs", "2", "--steps", "3"], "--epochs and --steps both say when to stop"),
    (["--clip", "inf"], "--clip is inf"),
    (["--save-every", "-1"], "--save-every is -1"), (["--on-nonfinite", "pray"], "invalid choice: 'pray'"),
    (["--config", "nowhere.json"], "--config nowhere.json: No such file"),
])
def test_bad_flags_are_refused(run, make_model, pairs, tmp_path, flags, words):
    done = run("train.py", "--model", make_model(), "--data", pairs, "--out", tmp_path / "out", *flags, cwd=tmp_path)
    refused(done, words)
    assert not (tmp_path / "out/run.json").exists()


def test_model_and_data_go_together(run, pairs, make_model):
    refused(run("train.py", "--data", pairs), "--model is missing")
    refused(run("train.py", "--model", make_model()), "--data is missing")
    refused(run("train.py", "--resume"), "--resume is for runs with --model")


def test_bad_folders_are_refused(run, make_model, pairs, tmp_path):
    shutil.copytree(make_model(), tmp_path / "model")
    flags = ["train.py", "--model", tmp_path / "model", "--data", pairs, "--out", tmp_path / "out"]
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model/pytorch_model.bin")
    refused(run(*flags), "loading a pickle (*.bin, *.pt) can run any code")
    (tmp_path / "model/pytorch_model.bin").unlink()
    refused(run(*flags), "neither model.safetensors nor its index")
    refused(run(*flags, "--eval-data", "nowhere.jsonl"), "nowhere.jsonl: no such file")     # before the model is read
    (tmp_path / "model/config.json").write_text('{"model_type": "bloom"}')
    refused(run(*flags), "model_type 'bloom' is not one of those supported (gpt2, gpt_neox, llama, mistral, ")
    (tmp_path / "model/config.json").write_text("{")
    refused(run(*flags), "config.json: not JSON")
    assert not (tmp_path / "out").exists()


def test_an_unwritable_output_is_refused(run, make_model, pairs, tmp_path):
    (tmp_path / "file").write_text("")
    flags = ["train.py", "--model", make_model(), "--data", pairs, "--out"]
    refused(run(*flags, make_model()), "is the folder of --model")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/model-00001-of-00002.safetensors").write_text("")
    refused(run(*flags, tmp_path / "b"), "holds weights of another model (model-00001-of-00002.safetensors)")
    done = run(*flags, tmp_path / "file/out", processes=2)
    assert done.returncode == 1 and done.stderr.count("cannot be written") == 2          # torchrun's status
    assert "train.py\", line" not in done.stderr
    refused(run(*flags, tmp_path / "a", "--reference", tmp_path / "file/r.safetensors"), "cannot be written")
    done = run("train.py", "--model", make_model(), "--data", pairs, "--out", tmp_path / "file/out")
    refused(done, "cannot be written")


def test_config_files(run, make_model, pairs, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"model": str(make_model()), "data": str(pairs), "skip_bad": True,
                                                 "steps": None, "beta": 0.3}))
    cfg, given = train.parse_flags(["--config", str(tmp_path / "c.json"), "--beta", "0.2"], {})
    assert cfg.beta == 0.2 and cfg.skip_bad and given["model"] == str(make_model()) and cfg.method.beta == 0.2
    for content, words in [('{"bettta": 1}', "c.json: there is no setting bettta"), ("[1]", "not a JSON object"),
                           ('{"lr": "x"}', "invalid float value: 'x'"), ("{", "not JSON")]:
        (tmp_path / "c.json").write_text(content)
        refused(run("train.py", "--config", tmp_path / "c.json"), words)


def test_bad_numbers_stop_and_name_the_pairs(run, make_model, pairs, tmp_path):
    from safetensors.torch import save_file
    shutil.copytree(make_model("llama-grouped"), tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["model.embed_tokens.weight"][5:] = math.nan
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    done = run("train.py", "--model", tmp_path / "model", "--data", pairs, "--out", tmp_path / "out", "--loss", "dpo",
               "--samples", 0)
    refused(done, f"the reference's scores are not finite; are the weights of --model sound? The pairs: {pairs}:", 1)
    done = run("train.py", "--model", make_model(), "--data", pairs, "--out", tmp_path / "out", "--lr", 1e30,
               "--batch-size", 16, "--samples", 0)
    refused(done, " is not finite", status=1)                     # the loss or, before it, the gradient
    assert "nothing was saved" in done.stderr and f"{pairs}:" in done.stderr
    assert not (tmp_path / "out/model.safetensors").exists()


# --- the demo -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, processes, methods", [
    (["--beta", 0.5], 1, ["dpo", "mallows-phi", "mallows-phi-learn"]),
    (["--loss", "mallows-theta", "--beta", 0.5], 2, ["mallows-theta"])])
def test_demo(run, tmp_path, flags, processes, methods):
    done = run("train.py", "--steps", 48, "--lr", 2e-3, "--out", tmp_path, *flags, processes=processes)
    assert done.returncode == 0 and "DeprecationWarning" not in done.stderr, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["dispersion_rank_correlation"] > 0.9 and [row["method"] for row in report["runs"]] == methods
    for row in report["runs"]:
        assert row["kl"] > 0.05 and row["win_rate"] > 0.52 and row["consensus_rank"] < 0.9
        assert row["elsewhere"] < 0.1 and (row["power"] > 1) == (row["method"] == "mallows-phi-learn")
        assert row["kappa"] > 1, "the index of the demo tells where people agree"
    assert "rank correlation of the dispersion index" in done.stdout
    assert ("beside dpo at KL 0.15 nats" in done.stdout) == ("dpo" in methods)
    assert done.stdout.count("verdict     the index orders these pairs by agreement: trust +") == 1


def test_readme_commands_exist():
    text = (ROOT / "README.md").read_text()
    for command in ("python train.py", "python -m pytest -q tests", "pip install -r requirements.txt"):
        assert command in text


def test_lora_trains_an_adapter_and_resumes_nothing_else(run, make_model, pairs, tmp_path):
    flags = ["--model", make_model(), "--data", pairs, *QUICK, "--lora-rank", 4, "--lr", 1e-2]
    done = run("train.py", *flags, "--out", tmp_path / "a", "--merge", "--lora-targets", "q", "down")
    assert done.returncode == 0, done.stderr
    assert "first loss is 0.693147" in done.stdout and "adapter/ and the model it makes" in done.stdout
    losses = [row["loss"] for row in rows_of(tmp_path / "a/metrics.jsonl")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[2] != losses[0]
    before, after = (load_file(folder / "model.safetensors") for folder in (make_model(), tmp_path / "a"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.endswith(("q_proj.weight", "down_proj.weight")) for name in moved)
    done = run("train.py", *flags, "--out", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b/adapter/adapter_config.json").exists() and not (tmp_path / "b/model.safetensors").exists()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "b/adapter").eos_token == "<end>"
    for folder in ("b", "b/adapter"):
        done = run("train.py", "--model", tmp_path / folder, "--data", pairs, "--out", tmp_path / "c", *QUICK)
        refused(done, "an adapter alone is not a model: give one that it is merged into")


@pytest.mark.parametrize("source", ["votes", "field", "scores"])
def test_the_dispersion_of_the_records(run, make_model, population, tmp_path, source):
    records = [{**record, "votes": [3, i % 3], "score_chosen": 5, "score_rejected": 1 + i % 3}
               for i, record in enumerate(population.judgements(24, seed=3))]
    write_jsonl(tmp_path / "data.jsonl", records)
    done = run("train.py", "--model", make_model(), "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out",
               "--loss", "mallows-phi", "--dispersion", source, "--dispersion-power", 1, *QUICK)
    assert done.returncode == 0, done.stderr
    lam = {"votes": lambda r: mallowspo.lam_of_votes(torch.tensor(r["votes"])).item(),
           "scores": lambda r: r["score_chosen"] - r["score_rejected"],
           "field": lambda r: -math.log(r["dispersion"])}[source]
    mean = sum(map(lam, records)) / len(records)
    for row in rows_of(tmp_path / "out/dispersion.jsonl"):
        assert row["weight"] == pytest.approx(lam(records[row["index"]]) / mean, rel=1e-4)


def test_the_trust_in_the_index_is_learned(run, make_model, population, tmp_path):
    """With scores, the power is learned by default, by two processes as by one; the verdict reports it."""
    records = [{**record, "scores": [i % 5, 1]} for i, record in enumerate(population.judgements(48, seed=3))]
    write_jsonl(tmp_path / "data.jsonl", records)
    for processes in (1, 2):
        done = run("train.py", "--model", make_model(), "--data", tmp_path / "data.jsonl", "--out",
                   tmp_path / str(processes), "--dispersion", "scores", "--eval-pairs", 8, *QUICK, "--steps", 10,
                   "--batch-size", 4, processes=processes)
        assert done.returncode == 0, done.stderr
        assert re.search(r"verdict     .*: trust [+-]\d\.\d\d \+- \d\.\d\d from 36 pairs", done.stdout)
    same_run(tmp_path / "1", tmp_path / "2")
    rows, record = rows_of(tmp_path / "1/metrics.jsonl"), json.loads((tmp_path / "1/run.json").read_text())
    agrees = torch.tensor([row["accuracy"] for row in rows[1:]])
    assert len(record["trust"]["accuracy_by_quartile"]) == 4 and record["trust"]["pairs"] == 36
    assert sum(record["trust"]["accuracy_by_quartile"]) / 4 == pytest.approx(agrees.mean().item())
    assert record["dispersion_power"] == min(max(record["trust"]["kappa"], 0), 8)
    assert len({row["dispersion_power"] for row in rows}) > 3
    assert len(rows_of(tmp_path / "1/evaluations.jsonl")[0]["accuracy_by_quartile"]) == 4


def test_bfloat16_weights_move_at_small_rates():
    """2,000 weights, a gradient of one sign, 100 steps of 5e-7: rounding at random moves them as far as float32 does
    on average, rounding to the nearest leaves nearly all where they were."""
    start = (torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        p, q = (torch.nn.Parameter(start.to(dtype, copy=True)) for _ in range(2))
        theirs, ours = torch.optim.AdamW([p], lr=5e-7, weight_decay=0.0, fused=True), train.AdamW([q], 5e-7)
        for _ in range(100):
            p.grad, q.grad = torch.ones_like(p), torch.full_like(q, 4)
            theirs.step()
            ours.step(torch.tensor(4.0))
        found["theirs", dtype], found["ours", dtype] = (x.detach().float() - start.float() for x in (p, q))
    want, rounded = found["theirs", torch.float32], found["ours", torch.bfloat16]
    assert (found["theirs", torch.bfloat16] == 0).float().mean() > 0.9
    assert abs(rounded.mean() - want.mean()) < 4 * rounded.std() / len(rounded) ** 0.5 and want.mean() < -4.9e-5
    assert torch.allclose(found["ours", torch.float32], want, atol=1e-9)


@pytest.mark.parametrize("kind", ["plain", "checkpointed", "low rank"])
def test_the_measurement_of_memory(make_model, pairs, capsys, kind):
    """The largest row runs forward and backward once; no gradient stays, and the printed sizes are right."""
    model = Transformer.from_pretrained(make_model("llama-grouped"))
    model.checkpointed = kind == "checkpointed"
    if kind == "low rank":
        add_lora(model, 4, 8)
    split = Split.plan(load_pairs(pairs, Tokenizer(make_model("llama-grouped")), 64).pairs, 16, 0, 400, 0, "cpu")
    rows = [row for step in range(split.steps) for row in split.schedule.rows(step)]
    largest = max(sum(split.schedule.costs[i] for i in row) for row in rows)
    world, rows = train.join_world(Config(device="cpu")), []
    model.register_forward_pre_hook(lambda model, inputs: rows.append(inputs[0].numel()))
    train.measure_memory(Config(), model, split, world)
    said = capsys.readouterr().out
    assert rows == [largest] and all(p.grad is None for p in model.parameters())
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shown = re.search(r"parameters (.*), gradients (.*), optimiser (.*) GiB per process", said)
    for text, size in zip(shown.groups(), (4 * count, 4 * trained, 8 * trained)):
        assert float(text) == pytest.approx(size / 2 ** 30, abs=0.006)
    reached = float(re.search(r"reached (\S+) GiB", said)[1])
    assert 0.1 < reached <= train.peak_memory(world) + 0.006                          # the program itself is in it


def test_the_measurement_changes_no_number(run, trained, make_model, pairs, held_out, tmp_path):
    (tmp_path / "without.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport train\n"
                                         "train.measure_memory = lambda *arguments: None\ntrain.main()")
    flags = ["--model", make_model(), "--data", pairs, "--eval-data", held_out, "--out", tmp_path / "out", *QUICK]
    done = subprocess.run([sys.executable, tmp_path / "without.py", *map(str, flags)], capture_output=True, text=True)
    assert done.returncode == 0 and "memory " not in done.stdout, done.stderr
    assert "memory " in trained[1]
    same_run(trained[0], tmp_path / "out", exactly=True)


def test_running_out_of_memory_comes_before_the_reference_pass(make_model, pairs, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore.")
    monkeypatch.setattr(train, "score_pairs", full)
    folder, _ = make_model(), capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train.main(["--model", str(folder), "--data", str(pairs), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert end.value.code == 1 and "lower --tokens-per-row" in error and len(error.splitlines()) == 1
    assert not [*(tmp_path / "out").glob("cache/reference*"), *(tmp_path / "out").glob("run.json")]


@pytest.mark.parametrize("generation, dtype", [(7, torch.float16), (9, torch.bfloat16)])
def test_what_a_gpu_computes_in(monkeypatch, generation, dtype):
    """An old GPU uses float16: torch calls bfloat16 supported there, but emulates it, slowly."""
    for name, answer in [("is_available", True), ("current_device", 0), ("_check_bf16_tensor_supported", True),
                         ("get_device_properties", types.SimpleNamespace(major=generation)), ("set_device", None)]:
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    assert train.join_world(Config()).dtype == dtype


def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(run, make_model, pairs, tmp_path):
    done = run("train.py", "--model", make_model(), "--data", pairs, "--out", tmp_path / "out", "--dry-run", *QUICK)
    assert done.returncode == 0 and "GiB before there is an optimiser" in done.stdout, done.stderr
    assert "reference " not in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, words", [
    (["--shard"], "start them with torchrun"), (["--param-dtype", "bfloat16"], "needs --dtype bfloat16, not float32"),
    (["--merge"], "--merge needs --lora-rank"),
    (["--lora-rank", 4, "--param-dtype", "bfloat16"], "--lora-rank and --param-dtype do not go together"),
    (["--eval-pairs", 1.5], "a share below 1 or a whole number"), (["--lora-rank", -1], "--lora-rank is -1"),
    (["--lora-rank", 4, "--lora-targets", "q_proj"], "invalid choice: 'q_proj'")])
def test_flags_that_do_not_fit_together(run, make_model, pairs, tmp_path, flags, words):
    refused(run("train.py", "--model", make_model(), "--data", pairs, "--out", tmp_path, *flags), words)
