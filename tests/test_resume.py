"""Runs that are stopped, killed, out of disk or fed bad numbers, and then resume."""
import builtins
import json
import math
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_train import refused, rows_of

import mallowspo
import model as model_file
import train
from data import Schedule
from train import BadConfig, Config, RunFailed, World, checkpoints, fit

ALONE = World(0, 1, torch.device("cpu"), torch.float32)
TIMED = {"seconds", "pairs_per_second", "tokens_per_second", "memory_gib"}


@pytest.fixture
def job(make_model, pairs, tmp_path):
    """job(stop_at=step, **settings): fit in this process; a SIGTERM comes during step stop_at."""
    torch.set_num_threads(1)

    def call(stop_at=None, model=None, **settings):
        base = {"model": str(model or make_model()), "data": str(pairs), "out": str(tmp_path / "out"), "steps": 6,
                "batch_size": 16, "lr": 1e-3, "samples": 1, "sample_tokens": 4, "max_tokens": 64, "eval_pairs": 10,
                "eval_every": 2, "log_every": 100}
        cfg = Config(**{**base, **settings})
        ask = lambda step, model: os.kill(os.getpid(), signal.SIGTERM) if step == stop_at else None
        if stop_at is None:
            return fit(cfg, ALONE)
        with pytest.raises(KeyboardInterrupt):
            fit(cfg, ALONE, ask)
        assert [path.name for path in checkpoints(Path(cfg.out))] == [f"step-{stop_at + 1:08}"]
    return call


def records(out):
    return {name: [{k: v for k, v in row.items() if k not in TIMED} for row in rows_of(out / f"{name}.jsonl")]
            for name in ("metrics", "evaluations", "samples", "dispersion")}


def same(one, two):
    start, theirs = (load_file(out / "model.safetensors") for out in (one, two))
    assert all(torch.equal(start[name], theirs[name]) for name in start)
    assert records(one) == records(two)


@pytest.mark.parametrize("family, dtype", [("llama-tied", torch.bfloat16), ("gpt2", torch.float32)])
def test_a_stopped_run_ends_as_one_that_was_not(job, make_model, tmp_path, capsys, family, dtype):
    model = make_model(family, dtype)
    job(model=model, out=str(tmp_path / "whole"))
    job(model=model, stop_at=0)
    job(model=model, stop_at=3, resume=True)
    with open(tmp_path / "out/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 1}\n{"step": 5, "lo')              # as a run that was killed leaves them
    job(model=model, resume=True)
    assert "start       after step 4" in capsys.readouterr().out
    same(tmp_path / "whole", tmp_path / "out")
    assert [row["step"] for row in rows_of(tmp_path / "out/metrics.jsonl")] == list(range(6))
    assert [row["step"] for row in rows_of(tmp_path / "out/evaluations.jsonl")] == [0, 2, 4, 6]
    assert not (tmp_path / "out/checkpoint").exists()
    job(model=model, resume=True)
    assert "there is nothing to do" in capsys.readouterr().out


def test_a_run_from_a_finished_run_is_killed_at_its_end(job, tmp_path, monkeypatch):
    """Such a --model folder has a run.json of its own, which says that it is finished."""
    job(out=str(tmp_path / "first"), steps=2)
    job(model=tmp_path / "first", out=str(tmp_path / "whole"))
    monkeypatch.setattr(train, "finish", lambda *arguments: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        job(model=tmp_path / "first")
    monkeypatch.undo()
    assert checkpoints(tmp_path / "out") and not train.read_json(tmp_path / "out/run.json")["finished"]
    job(model=tmp_path / "first", resume=True)
    same(tmp_path / "whole", tmp_path / "out")


def test_a_file_for_scores_that_is_none_leaves_all_as_it_was(job, pairs, tmp_path):
    job(steps=2)
    for name in (str(pairs), "/proc/no/scores"):
        with pytest.raises((BadConfig, train.BadData)):
            job(steps=2, reference=name)
    assert train.read_json(tmp_path / "out/run.json")["finished"]


def test_a_step_has_one_number(job, capsys):
    """The third step is 3 in its own line, in the checkpoint, in the evaluation and where the run resumes."""
    job(stop_at=2, log_every=1, eval_every=3)
    job(resume=True, log_every=1, eval_every=3)
    said = re.findall(r"^(?:step +\d+(?:/6|  held out)|start +\w+ step \d+)", capsys.readouterr().out, re.MULTILINE)
    assert [re.sub(" +", " ", words) for words in said] == [
        "start with step 1", "step 0 held out", "step 1/6", "step 2/6", "step 3/6", "start after step 3",
        "step 3 held out", "step 4/6", "step 5/6", "step 6/6", "step 6 held out"]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process stays here")
def test_the_memory_of_loading_is_not_that_of_the_steps(job, monkeypatch, tmp_path):
    load, peaks = train.load_checkpoint, []

    def greedy(*arguments):
        with mmap.mmap(-1, 1 << 29) as half_a_gib:
            for place in range(0, 1 << 29, 4096):
                half_a_gib[place] = 1
        load(*arguments)
        peaks.append(train.peak_memory(ALONE))
    monkeypatch.setattr(train, "load_checkpoint", greedy)
    job(stop_at=2)
    job(resume=True)
    assert rows_of(tmp_path / "out/metrics.jsonl")[-1]["memory_gib"] < peaks[0] - 0.3


def test_a_power_that_is_learned_goes_on_where_it_stopped(job, tmp_path):
    flags = dict(batch_size=4, dispersion_power="learn", dispersion="field", lr=5e-3)      # ten steps in an epoch
    job(out=str(tmp_path / "whole"), **flags, steps=12)
    job(stop_at=2, **flags, steps=12)
    assert {row["agrees"] for row in rows_of(tmp_path / "out/dispersion.jsonl")} == {None}      # until the end
    agrees = json.loads((checkpoints(tmp_path / "out")[0] / "state.json").read_text())["agrees"]
    job(resume=True, **flags, steps=12)
    same(tmp_path / "whole", tmp_path / "out")
    one, two = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "out"))
    assert one["trust"] == two["trust"] and one["trust"]["pairs"] == 36
    powers = [row["dispersion_power"] for row in rows_of(tmp_path / "out/metrics.jsonl")]
    index = [row["entropy"] for row in rows_of(tmp_path / "out/dispersion.jsonl")]
    met = [i for step in (1, 2) for i in Schedule([1] * 40, 4, 0, 99).batch(step)]
    kappa = mallowspo.fit_trust(torch.tensor(agrees), torch.tensor([index[i] for i in met])).kappa
    found = {row["index"]: row["agrees"] for row in rows_of(tmp_path / "out/dispersion.jsonl")}
    assert [found[i] for i in met] == agrees
    assert powers[:2] == [0, 0] and 0 < powers[3] == pytest.approx(kappa) and powers[2] != powers[3]
    assert powers[10] == powers[11] == one["dispersion_power"] == min(max(one["trust"]["kappa"], 0), 8)
    weights = [row["weight"] for row in rows_of(tmp_path / "out/dispersion.jsonl")]
    assert sum(weights) / len(weights) == pytest.approx(1)


def test_half_a_removed_checkpoint_is_no_obstacle(job, tmp_path):
    """As left by a run that was killed while it removed its last checkpoint."""
    job(stop_at=1)
    (tmp_path / "out/checkpoint/new/model").mkdir(parents=True)
    (tmp_path / "out/checkpoint/new/model/config.json").write_text("{}")
    job(resume=True, save_every=0)
    assert not (tmp_path / "out/checkpoint").exists()


def test_resume_refuses_another_run(job, make_model, pairs, tmp_path, capsys):
    job(resume=True, stop_at=1)
    assert "there is no checkpoint" in capsys.readouterr().out
    out, other = tmp_path / "out", tmp_path / "other.jsonl"
    with pytest.raises(BadConfig, match="step-00000002 is from an interrupted run; --resume continues it"):
        job()
    other.write_text("".join(pairs.read_text().splitlines(keepends=True)[1:]))
    for name, value, words in [
            ("lr", 2e-3, r"lr \(0.001, now 0.002\)"), ("steps", 7, r"steps \(6, now 7\)"), ("seed", 1, "seed"),
            ("beta", 0.2, r"beta \(None, now 0.2\)"), ("loss", "dpo", "loss"), ("batch_size", 8, "batch_size"),
            ("decay", "linear", "decay"), ("eval_pairs", 9, "data .*, eval_pairs"), ("data", str(other), r"data \("),
            ("model", make_model("gpt2"), r"model \("), ("clip", 2.0, "clip"), ("max_tokens", 63, "max_tokens"),
            ("dtype", "bfloat16", r"dtype \(auto, now bfloat16\)")]:
        with pytest.raises(BadConfig, match=f"with other settings: .*{words}"):
            job(resume=True, **{name: value})
    with open(checkpoints(out)[0] / "state.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(BadConfig, match=r"state.safetensors is not as it was written"):
        job(resume=True)
    shutil.rmtree(out / "checkpoint")
    job(resume=True)
    with pytest.raises(BadConfig, match=r"run.json is from a run with other settings: lr"):
        job(resume=True, lr=1e-2)
    job(lr=1e-2)                                                            # a finished run is replaced, and it says so
    assert "in place of the finished run" in capsys.readouterr().out


def test_lists_and_flags_that_are_newer_than_the_record_do_not_stand_in_the_way(job, tmp_path):
    flags = dict(lora_rank=2, lora_targets=("q", "down"))
    job(stop_at=2, **flags)
    path = checkpoints(tmp_path / "out")[0] / "state.json"
    state = json.loads(path.read_text())
    del state["run"]["config"]["compile"]                                   # as written before --compile existed
    path.write_text(json.dumps(state))
    with pytest.raises(BadConfig, match=r"with other settings: lora_targets"):
        job(resume=True, **{**flags, "lora_targets": ("q",)})
    job(resume=True, **flags)
    assert len(rows_of(tmp_path / "out/metrics.jsonl")) == 6


def test_what_may_change(job, pairs, tmp_path):
    job(stop_at=2)
    moved = shutil.copy(pairs, tmp_path / "moved.jsonl")
    job(resume=True, data=str(moved), eval_every=1, save_every=1, samples=2, tokens_per_row=100, on_nonfinite="skip")
    assert [row["step"] for row in rows_of(tmp_path / "out/evaluations.jsonl")] == [0, 2, 3, 4, 5, 6]
    job(out=str(tmp_path / "whole"))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all((one[name] - two[name]).abs().max() < 1e-5 for name in one)


def test_a_reference_that_was_removed_is_made_again(job, tmp_path):
    """By the model of --model, not by the weights trained since."""
    job(out=str(tmp_path / "whole"))
    job(stop_at=2)
    (tmp_path / "out/cache/reference.safetensors").unlink()
    job(resume=True)
    same(tmp_path / "whole", tmp_path / "out")


# --- the disk -------------------------------------------------------------------------------------------------

def whole(folder):
    state = json.loads((folder / "state.json").read_text())
    return all(train.sha256(folder / name) == digest for name, digest in state["sha256"].items())


def test_an_error_at_any_file_operation_of_a_save(job, tmp_path, monkeypatch):
    """Fail the k-th operation, for all k: a whole checkpoint remains each time; some of them are resumed."""
    saves, save, out = [], train.save_checkpoint, tmp_path / "out"
    monkeypatch.setattr(train, "save_checkpoint", lambda *arguments: (saves.append(arguments), save(*arguments)))
    job(out=str(tmp_path / "end"))
    job(stop_at=1)
    last, _ = saves[-1]
    count, fail_at = [0], [0]

    def failing(real):
        def call(*arguments, **named):
            count[0] += 1
            if count[0] == fail_at[0]:
                raise OSError(28, "No space left on device")
            return real(*arguments, **named)
        return call
    kept, k, again = tmp_path / "kept", 0, 0
    shutil.copytree(out, kept)
    while count[0] >= k:                                          # until there is no k-th operation
        shutil.rmtree(out)
        shutil.copytree(kept, out)
        k += 1
        count[0], fail_at[0] = 0, k
        with monkeypatch.context() as patch:
            for place, names in ((os, "replace fsync open mkdir chmod unlink rmdir"), (builtins, "open"),
                                 (Path, "write_text write_bytes mkdir"), (model_file, "save_file"),
                                 (train, "save_file sha256"), (shutil, "rmtree")):
                for name in names.split():
                    patch.setattr(place, name, failing(getattr(place, name)))
            try:
                save(last, 3)                                        # as step 3, with the weights of step 2
            except RunFailed as error:
                assert "cannot be written ([Errno 28]" in str(error) and "bytes are free in" in str(error)
        found = checkpoints(out)
        assert found and all(map(whole, found)), k
        if k % 25 == 5 and found[0].name == "step-00000002":
            job(resume=True)
            same(tmp_path / "end", out)
            again += 1
    assert k > 40 and again


def test_a_disk_that_is_full(job, make_model, pairs, tmp_path, monkeypatch):
    """Files may have at most 300 kB, as much as the weights take."""
    job(stop_at=1)
    out = tmp_path / "out"
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); " \
           f"sys.path.insert(0, {str(ROOT)!r}); import train; train.main()"
    flags = ["--config", out / "run.json", "--resume", "--save-every", 1]
    done = subprocess.run([sys.executable, "-c", code, *map(str, flags)], capture_output=True, text=True)
    refused(done, "the checkpoint of step 3 cannot be written", status=1)
    assert "File too large" in done.stderr and f"--resume continues from {out}/checkpoint/step-00000002" in done.stderr
    assert all(map(whole, checkpoints(out)))
    job(resume=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(BadConfig, match="bytes are needed there, 1,000 are free"):
        job(out=str(tmp_path / "other"))


# --- bad numbers ----------------------------------------------------------------------------------------------

def spoil(monkeypatch, steps, how):
    """Make the first pair of some steps bad."""
    score_pairs, train_step, now = train.score_pairs, train.train_step, [None, None]

    def bad_scores(policy, method, split, indices, step, world):
        outcome = score_pairs(policy, method, split, indices, step, world)
        hit = torch.tensor([now[0] in steps and i == now[1] for i in indices])
        loss = outcome.loss.clone()
        loss[hit] = how(outcome.loss[hit])
        return outcome._replace(loss=loss)

    def note(run, split, step):
        now[:] = step, split.schedule.batch(step)[0]
        return train_step(run, split, step)
    monkeypatch.setattr(train, "score_pairs", bad_scores)
    monkeypatch.setattr(train, "train_step", note)


@pytest.mark.parametrize("what, how", [
    ("loss", lambda loss: loss * math.nan), ("loss", lambda loss: loss + math.inf),
    ("gradient", lambda loss: loss + (loss - loss.detach()).abs().sqrt())])       # 0, and its slope is nan
def test_bad_numbers(job, pairs, tmp_path, monkeypatch, capsys, what, how):
    spoil(monkeypatch, {3}, how)
    with pytest.raises(RunFailed, match=f"step 4: the {what} is not finite; .*{pairs}:[0-9]+") as error:
        job(save_every=2)
    assert (str(error.value).count(str(pairs)) == 1) == (what == "loss")        # it knows which pair
    out, = [path.parent.parent for path in checkpoints(tmp_path / "out")]
    assert all(p.isfinite().all() for p in load_file(checkpoints(out)[0] / "state.safetensors").values())
    job(resume=True, on_nonfinite="skip")
    assert f"step     4  skipped: the {what} is not finite" in (said := capsys.readouterr().out)
    assert "1 steps were skipped" in said and json.loads((out / "run.json").read_text())["skipped"] == [3]
    text = (out / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    rows = rows_of(out / "metrics.jsonl")
    assert len(rows) == 6 and rows[3]["loss" if what == "loss" else "grad_norm"] is None


def test_skipping_ends_after_so_many_in_a_row(job, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "IN_A_ROW", 3)
    spoil(monkeypatch, {1, 2, 4, 5, 6}, lambda loss: loss * math.nan)
    with pytest.raises(RunFailed, match="step 7: the loss is not finite"):
        job(steps=9, on_nonfinite="skip", save_every=0)
    assert len(rows_of(tmp_path / "out/metrics.jsonl")) == 6


def test_steps_of_the_scaler_are_no_errors(monkeypatch):
    """float16 needs a GPU; this tests the scaler's rules alone."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = train.AdamW([p], 1e-3)
    for scale in (4.0, 2.0, 1.0):
        assert scaler.get_scale() == scale                       # at 1, inf is an error
        (scaler.scale(p.sum()) * math.inf).backward()
        scaler.unscale_(optimizer)
        scaler.update()                                          # without optimizer.step(), as if skipped
        p.grad = None


def test_json_has_null_for_what_is_no_number(tmp_path):
    train.write_json(tmp_path / "a.json", {"a": [math.nan, {"b": math.inf}], "c": -math.inf, "d": 0.1})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, {"b": None}], "c": None, "d": 0.1}


def test_the_card_of_a_run_that_ends_without_a_number(tmp_path):
    figures = {"step": 4, "loss": math.nan, "accuracy": 0.5, "margin": 0}
    train.append_json(tmp_path / "evaluations.jsonl", figures, ALONE)
    record = {"steps": 4, "pairs": 8, "data_sha256": "", "phi_star": None, "dispersion_power": 0.0, "trust": None}
    card = train.model_card(Config(model="some/model", data="pairs.jsonl", out=str(tmp_path)), record)
    for row in ("| held-out loss | None |", "| held-out accuracy | 0.5 |", "| steps | 4 |"):
        assert row in card


# --- more than one --------------------------------------------------------------------------------------------

def test_two_runs_in_one_folder(job, tmp_path):
    (tmp_path / "out").mkdir()
    with train.lock_folder(tmp_path / "out/lock"), pytest.raises(BadConfig, match="another run is writing there"):
        job()
    job()


def test_two_runs_share_a_reference(tmp_path):
    """Two runs that write at once lose no scores; the lock works between threads, too."""
    path = tmp_path / "r.safetensors"

    def write(n):
        for i in range(40):
            one = np.full(3, i, dtype=np.float32)
            train.add_scores(path, "key", {bytes([n, i] + 14 * [0]): train.Scores(one, one)})
    runs = [threading.Thread(target=write, args=(n,)) for n in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    found = train.read_reference(path, "key")
    assert {key[:2] for key in found} == {bytes([n, i]) for n in range(2) for i in range(40)}
    assert all(score.logp.tolist() == 3 * [key[1]] for key, score in found.items())


@pytest.mark.parametrize("seconds", [0, 60])
def test_an_interrupted_reference_pass_goes_on(job, tmp_path, monkeypatch, capsys, seconds):
    """Its scores are written every so many seconds, and at the interruption."""
    rows, collate, path = [0], train.collate, tmp_path / "out/cache/reference.safetensors"

    def interrupted(groups, branches, device):
        rows[0] += 1
        if rows[0] == 4:                                           # the first one measures the memory
            assert path.exists() == (seconds == 0)
            raise KeyboardInterrupt(signal.SIGINT)
        return collate(groups, branches, device)
    monkeypatch.setattr(train, "collate", interrupted)
    monkeypatch.setattr(train, "SCORES_SECONDS", seconds)
    with pytest.raises(KeyboardInterrupt):
        job(tokens_per_row=100)
    done = len(load_file(path)["digest"])
    job(tokens_per_row=100)
    assert done and f"scoring {50 - done} pairs" in capsys.readouterr().out
    job(out=str(tmp_path / "whole"), tokens_per_row=100)
    same(tmp_path / "whole", tmp_path / "out")


# --- as a user meets it -----------------------------------------------------------------------------------------

def start(make_model, pairs, out, *flags, torchrun=()):
    command = [sys.executable, *torchrun, ROOT / "train.py", "--model", make_model(), "--data", pairs, "--out", out,
               "--samples", 0, "--steps", 5000, "--log-every", 5000, *flags]
    run = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    while run.poll() is None and not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size):
        time.sleep(0.05)
    return run


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals(make_model, pairs, tmp_path, number, status):
    run = start(make_model, pairs, tmp_path / "out")
    run.send_signal(number)
    said, error = run.communicate(timeout=60)
    found, = checkpoints(tmp_path / "out")
    assert f"{number.name}: stopping after this step" in said
    assert run.returncode == status and f"{number.name}; --resume continues from {found}" in error
    assert len(error.splitlines()) == 1 and whole(found)
    assert len(rows_of(tmp_path / "out/metrics.jsonl")) == int(found.name[5:])


def test_the_second_ctrl_c_leaves_at_once(make_model, pairs, tmp_path):
    cfg = Config(model=str(make_model()), data=str(pairs), out=str(tmp_path), steps=4, samples=0)

    def impatient(step, model):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            assert len(rows_of(tmp_path / "metrics.jsonl")) == 1                  # still running
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
            pytest.fail("was not interrupted")
    with pytest.raises(KeyboardInterrupt):
        fit(cfg, ALONE, impatient)
    assert not checkpoints(tmp_path)


def test_torchrun(make_model, pairs, tmp_path):
    """A signal stops both ranks after the same step; a rank that fails brings down the other one, with its message."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = start(make_model, pairs, tmp_path / "out", torchrun=torchrun)
    run.send_signal(signal.SIGTERM)
    error = run.communicate(timeout=60)[1]
    assert "SIGTERM; --resume continues from" in error and len(checkpoints(tmp_path / "out")) == 1, error
    (tmp_path / "fail.py").write_text(f"""if True:
        import os, sys; sys.path.insert(0, {str(ROOT)!r})
        import train
        train_step = train.train_step
        def failing(run, split, step):
            if step == 2 and os.environ["RANK"] == "1":
                raise train.RunFailed("as asked")
            return train_step(run, split, step)
        train.train_step = failing
        train.main()""")
    command = [sys.executable, *torchrun, tmp_path / "fail.py", "--model", make_model(), "--data", pairs, "--out",
               tmp_path / "b", "--steps", 9]
    began = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "train.py: error: as asked" in done.stderr and time.perf_counter() - began < 60


def test_torture(run):
    done = run("tests/torture.py", "--kills", 3, "--rank-kills", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("bit for bit") == 2
