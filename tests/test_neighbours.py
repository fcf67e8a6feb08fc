"""Every row of LOSSES against its formula, written again from the paper in plain Python: its value, its
gradient, its reduction to the neighbouring method, and the mistakes that are easily made with it."""
import collections
import dataclasses
import math
import types
import weakref

import numpy as np
import pytest
import torch
from conftest import ROOT  # noqa: F401 (its directory is where the scripts are)

import mallowspo
import train
from data import Pair, Split, differing_tokens, sampled_tokens
from mallowspo import LOSSES, mixed_reference, objective

ALONE = train.World(0, 1, torch.device("cpu"), torch.float32)              # without autocast
SIZES = [(3, 5), (7, 2), (4, 4), (1, 6), (9, 8), (2, 1)]            # tokens of chosen and of rejected


def make_split(sizes=SIZES, seed=0):
    """Pairs with random ids, and random log-probabilities of each token under a reference, in float64."""
    rng, pairs = np.random.default_rng(seed), []
    for i, (chosen, rejected) in enumerate(sizes):
        ids = [rng.integers(6, size=n).astype(np.int32) for n in (2, chosen, rejected)]
        pairs.append(Pair(*ids, None, f"made:{i}", rewards=rng.normal(size=2).tolist()))
    split = Split.plan(pairs, len(pairs), seed, None, 2048, torch.device("cpu"))
    split.ref_tokens = {i: -rng.exponential(1.5, size=sum(size)) for i, size in enumerate(sizes)}
    sums = [[halves.sum() for halves in np.split(split.ref_tokens[i], [size[0]])] for i, size in enumerate(sizes)]
    split.ref_logp = torch.tensor(np.array(sums))
    split.weight = torch.tensor(rng.uniform(0.2, 2, len(pairs)))
    split.advantage = mallowspo.advantages(torch.tensor([pair.rewards for pair in pairs], dtype=torch.float64))
    return split


def policy_tokens(split, seed=1, noise=0.7):
    """Each pair's token log-probabilities under a policy, chosen then rejected."""
    rng = np.random.default_rng(seed)
    return [np.minimum(split.ref_tokens[i] + noise * rng.normal(size=len(split.ref_tokens[i])), -0.01)
            for i in range(len(split.pairs))]


def losses(method, split, tokens, step=0):
    """The loss of each pair, as train.py computes it for a policy that gives these log-probabilities."""
    def policy(*inputs):
        return torch.cat(list(tokens)), None
    return train.score_pairs(policy, method, split, list(range(len(split.pairs))), step, ALONE)


# --- the formulas once more -----------------------------------------------------------------------------------

def log_sigma(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


class Case:
    """One pair in plain numbers.  frozen: the policy's log-probabilities where they carry no gradient."""

    def __init__(self, split, i, tokens, frozen, weight):
        n, pair = len(split.pairs[i].chosen), split.pairs[i]
        self.w, self.l = tokens[:n].tolist(), tokens[n:].tolist()
        self.frozen_w, self.frozen_l = frozen[:n].tolist(), frozen[n:].tolist()
        self.rw, self.rl = split.ref_tokens[i][:n].tolist(), split.ref_tokens[i][n:].tolist()
        self.c, self.pair, self.rewards = weight, pair, pair.rewards
        self.draw = [split.schedule.seed, 0, i]

    def margin(self, aw=None, al=None):
        """R(w) - R(l), with token weights if given."""
        aw, al = aw or [1] * len(self.w), al or [1] * len(self.l)
        return (sum(a * (p - r) for a, p, r in zip(aw, self.w, self.rw))
                - sum(a * (p - r) for a, p, r in zip(al, self.l, self.rl)))

    def mean_margin(self, alpha=1.0):
        return (sum(p - alpha * r for p, r in zip(self.w, self.rw)) / len(self.w)
                - sum(p - alpha * r for p, r in zip(self.l, self.rl)) / len(self.l))

    def nll(self):
        return -sum(self.w) / len(self.w)


def bmc(x):
    mw, ml = differing_tokens(x.pair, None)
    aw = [1 + m * min(math.exp(-p), 2.0) for m, p in zip(mw, x.frozen_w)]
    al = [1 + m * min(math.exp(-p), 2.0) for m, p in zip(ml, x.frozen_l)]
    return -log_sigma(x.c * 0.01 * x.margin(aw, al))


def sampo(x):
    mw, ml = sampled_tokens(x.pair, x.draw)
    return -log_sigma(x.c * 0.1 * x.margin(mw.astype(float).tolist(), ml.astype(float).tolist()))


def decay(x):
    return -log_sigma(x.c * 0.1 * x.margin([0.98 ** t for t in range(len(x.w))], [0.98 ** t for t in range(len(x.l))]))


def hpo(x):
    middle = sum(x.rewards) / 2
    terms = [math.exp(reward - middle) * -sum(side) / len(side) for reward, side in zip(x.rewards, (x.w, x.l))]
    return -log_sigma(x.c * 0.1 * x.margin()) + 0.1 * sum(terms) / 2


def exo(x):
    q, e = 1 / (1 + math.exp(-x.c * 0.1 * x.margin())), 1e-3
    return q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e)


def focalpo(x):
    frozen = sum(p - r for p, r in zip(x.frozen_w, x.rw)) - sum(p - r for p, r in zip(x.frozen_l, x.rl))
    return math.exp(0.05 * log_sigma(x.c * 0.1 * frozen)) * -log_sigma(x.c * 0.1 * x.margin())


def minor(x):
    chosen, rejected = sum(x.w) - sum(x.rw), sum(x.l) - sum(x.rl)
    return -log_sigma(x.c * 0.1 * (chosen - max(0.0, rejected)))


def theta(x):                                                   # phi = exp(-lam), 2 lam = the weight
    return -log_sigma(-2 * math.log(math.exp(-x.c / 2)) * 0.1 * x.margin())


def kendall(x):                                                 # as printed where it holds, |h| >= 1
    h, phi = 10 * x.margin(), math.exp(-x.c)
    a = abs(h)
    g = (a + 1) / (1 - phi ** (a + 1)) - a / (1 - phi ** a)
    return -math.log(g if h > 0 else 1 - g)


FORMULAS = {
    "dpo": lambda x: -log_sigma(x.c * 0.1 * x.margin()),
    "cdpo": lambda x: -0.9 * log_sigma(x.c * 0.1 * x.margin()) - 0.1 * log_sigma(-x.c * 0.1 * x.margin()),
    "robust": lambda x: (-0.9 * log_sigma(x.c * 0.1 * x.margin()) + 0.1 * log_sigma(-x.c * 0.1 * x.margin())) / 0.8,
    "ipo": lambda x: 0.1 ** 2 * (x.c * x.mean_margin() - 1 / (2 * 0.1)) ** 2,
    "hinge": lambda x: max(0.0, 1 - x.c * 0.1 * x.margin()),
    "exo": exo,
    "dpo-norm": lambda x: -log_sigma(x.c * 10 * x.mean_margin()),
    "simpo": lambda x: -log_sigma(x.c * (10 * x.mean_margin(alpha=0) - 3.0)),                    # gamma 3
    "cpo": lambda x: -log_sigma(x.c * 0.1 * (sum(x.w) - sum(x.l))) + x.nll(),
    "r-dpo": lambda x: -log_sigma(x.c * (0.1 * x.margin() + 0.01 * (len(x.w) - len(x.l)))),
    "rainbowpo": lambda x: -log_sigma(x.c * 10 * (x.mean_margin(alpha=0.25) - (1 - 0.25) * 0.1)),
    "decay-dpo": decay, "focalpo": focalpo, "minor-dpo": minor, "bmc": bmc, "sampo": sampo, "hpo": hpo,
    "mrpo": lambda x: -log_sigma(x.c * 0.1 * x.margin()),       # with one reference; more of them below
    "mallows-theta": theta,
    "mallows-phi": kendall,
    "mallows-ipo": lambda x: 0.1 ** 2 * (x.c * x.mean_margin() - 1 / (2 * 0.1)) ** 2,
    "mallows-simpo": lambda x: -log_sigma(x.c * (10 * x.mean_margin(alpha=0) - 3.0)),
    "sft": lambda x: x.nll(),
}


def method_of(name):
    return LOSSES[name]._replace(beta=10.0) if name == "mallows-phi" else LOSSES[name]      # for |h| >= 1


def test_every_row_has_its_formula():
    assert FORMULAS.keys() == LOSSES.keys()


@pytest.mark.parametrize("dispersion", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradient(name, dispersion):
    split, method = make_split(), method_of(name)
    if not dispersion:
        split.weight = torch.ones_like(split.weight)
    numbers = policy_tokens(split)
    tokens = [torch.tensor(each, requires_grad=True) for each in numbers]
    found = losses(method, split, tokens).loss
    gradient = torch.autograd.grad(found.sum(), tokens)
    for i, each in enumerate(numbers):
        def formula(live, i=i, each=each):
            return FORMULAS[name](Case(split, i, live, each, split.weight[i].item()))
        if name == "mallows-phi" and abs(10 * Case(split, i, each, each, 1).margin()) < 1:
            continue                                            # the bridge: tests/test_mallowspo.py
        assert found[i].item() == pytest.approx(formula(each), rel=1e-10), i
        for t in range(len(each)):
            step = np.zeros(len(each))
            step[t] = 1e-5
            slope = (formula(each + step) - formula(each - step)) / 2e-5
            assert gradient[i][t].item() == pytest.approx(slope, rel=1e-5, abs=1e-8), (i, t)


# --- each term set to its neutral value is the method without it, to the last bit ---------------------------------

@pytest.mark.parametrize("name, neutral", [
    ("cdpo", {"smoothing": 0.0}), ("robust", {"smoothing": 0.0}), ("r-dpo", {"length_term": 0.0}),
    ("decay-dpo", {"token_decay": 1.0}), ("focalpo", {"focal": 0.0}), ("minor-dpo", {"clip_rejected": False}),
    ("bmc", {"beta": 0.1, "token_cap": 0.0}), ("hpo", {"advantage": 0.0}), ("mrpo", {}),
    ("dpo-norm", {"beta": 0.1, "eta": 0.0}), ("cpo", {"alpha": 1.0, "sft": 0.0})])
def test_reductions_to_dpo(name, neutral):
    split = make_split()
    tokens = [torch.tensor(each) for each in policy_tokens(split)]
    ours = losses(LOSSES[name]._replace(**neutral), split, tokens)
    for one, other in zip(ours, losses(LOSSES["dpo"], split, tokens)):
        assert torch.equal(one, other)


def test_reductions_of_single_pairs():
    split = make_split([(4, 4), (3, 3)])
    tokens = [torch.tensor(each) for each in policy_tokens(split)]
    dpo = losses(LOSSES["dpo"], split, tokens).loss
    assert torch.equal(losses(LOSSES["sampo"], split, tokens).loss, dpo)           # equal lengths: all are drawn
    ahead = [torch.where(torch.arange(len(each)) < 3, each, torch.from_numpy(split.ref_tokens[i]) + 0.1)
             for i, each in enumerate(tokens)]
    minor, dpo = (losses(LOSSES[name], split, ahead).loss for name in ("minor-dpo", "dpo"))
    assert torch.equal(minor[1], dpo[1])                                           # the rejected one is ahead


# --- mistakes that are easily made ------------------------------------------------------------------------------

def test_focal_factor_with_its_gradient_unlearns():
    """dL/dh = -p^g (1 - p) (1 + g log p): at the start, p = 1/2, its sign turns at g = 1 / log 2."""
    h = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for gamma, detached, through in ((1.0, -1, -1), (2.0, -1, +1)):
        for flag, sign in ((False, detached), (True, through)):
            method = LOSSES["focalpo"]._replace(focal=gamma, focal_gradient=flag)
            slope, = torch.autograd.grad(mallowspo.preference_loss(method, h, torch.tensor(0.5)).sum(), h)
            assert slope.sign() == sign
            if flag:
                assert slope.item() == pytest.approx(-0.5 ** gamma * 0.5 * (1 + gamma * math.log(0.5)))


def test_minor_dpo_starts_as_dpo():
    """At the first step R(rejected) is 0, and the clip lets its gradient pass."""
    split = make_split()
    slopes = []
    for name in ("minor-dpo", "dpo"):
        tokens = [torch.tensor(split.ref_tokens[i], requires_grad=True) for i in range(len(SIZES))]
        slopes.append(torch.autograd.grad(losses(LOSSES[name], split, tokens).loss.sum(), tokens))
    for minor, dpo in zip(*slopes):
        assert torch.equal(minor, dpo) and dpo.abs().min() > 0


def test_sampled_tokens_are_shared_and_follow_from_seed_step_and_pair():
    split = make_split(seed=3)
    same = [torch.tensor(split.ref_tokens[i]) for i in range(len(SIZES))]
    assert torch.allclose(losses(LOSSES["sampo"], split, same).loss, torch.tensor(math.log(2)).double(), atol=1e-15)
    draws = [split.token_inputs("sample", [i], step)[1] for i in (0, 1, 3) for step in (0, 1, 2)]
    for i, (chosen, rejected) in zip((0, 1, 3), ((3, 5), (7, 2), (1, 6))):
        _, mask = split.token_inputs("sample", [i], 0)
        assert mask[:chosen].sum() == mask[chosen:].sum() == min(chosen, rejected)
    again = make_split(seed=3)
    again = [again.token_inputs("sample", [i], step)[1] for i in (0, 1, 3) for step in (0, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(draws, again))
    _, together = split.token_inputs("sample", [3, 0], 1)                          # other pairs in the row: the same
    assert torch.equal(together, torch.cat([draws[7], draws[1]]))
    assert len({tuple(draw.tolist()) for draw in draws[3:6]}) > 1                  # other steps: other tokens


def test_differing_tokens():
    pair = Pair(np.array([9]), np.array([1, 2, 3, 4, 7]), np.array([1, 5, 3, 4, 6, 8, 7]), None, "made:1")
    chosen, rejected = differing_tokens(pair, None)
    assert chosen.tolist() == [False, True, False, False, False]
    assert rejected.tolist() == [False, True, False, False, True, True, False]


def test_length_term_has_the_sign_of_the_reward():
    """The best policy for a reward r(y) - a |y| is ref(y) exp((r(y) - a |y|) / beta) / Z.  People who judge
    by r alone prefer w to l with log-odds r(w) - r(l); at that policy, the h of the loss must equal them."""
    generator = torch.Generator().manual_seed(0)
    reward, length = torch.randn(5, generator=generator).double(), torch.tensor([3, 8, 1, 5, 2])
    ref = torch.randn(5, generator=generator).double().log_softmax(0)
    policy = (ref + (reward - 0.3 * length) / 0.7).log_softmax(0)
    method = LOSSES["r-dpo"]._replace(beta=0.7, length_term=0.3)
    for w in range(5):
        for loser in range(5):
            both = torch.tensor([[w, loser]])
            loss = objective(method, policy[both], ref[both], length[both], torch.ones(1)).loss
            assert loss.item() == pytest.approx(-log_sigma((reward[w] - reward[loser]).item()), rel=1e-6)


def test_robust_loss_is_unbiased_and_smoothed_is_not():
    """Over labels that are wrong with chance e, the mean of the robust loss is DPO's with the right labels."""
    h, half = torch.linspace(-3, 3, 13, dtype=torch.float64), torch.tensor(0.5)
    right, wrong = (mallowspo.preference_loss(LOSSES["robust"], x, half) for x in (h, -h))
    dpo = mallowspo.preference_loss(LOSSES["dpo"], h, half)
    assert torch.allclose(0.9 * right + 0.1 * wrong, dpo)
    right, wrong = (mallowspo.preference_loss(LOSSES["cdpo"], x, half) for x in (h, -h))
    assert not torch.allclose(0.9 * right + 0.1 * wrong, dpo)


@pytest.mark.parametrize("mix", ["adaptive", "equal"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_references(mix, count):
    rng = np.random.default_rng(0)
    base = -rng.uniform(5, 60, size=(20, 2))
    all_of_them = np.stack([base] + [base * rng.uniform(0.8, 1.25, size=base.shape) for _ in range(count - 1)])
    method = LOSSES["mrpo"]._replace(reference_mix=mix)
    found = mixed_reference(method, torch.from_numpy(all_of_them))
    for p in range(20):
        mean = [sum(abs(all_of_them[k, p, side]) for k in range(count)) / count for side in (0, 1)]
        near = [[0.0, 0.0] for _ in range(count)]
        for k in range(count):
            for side in (0, 1):
                eps, first = 0.1 * mean[side] / sum(mean), base[p, side]
                near[k][side] = min(max(all_of_them[k, p, side], (1 + eps) * first), (1 - eps) * first)
        sure = [abs(all_of_them[k, p, 0] - all_of_them[k, p, 1]) if mix == "adaptive" else 1 for k in range(count)]
        for side in (0, 1):
            inverse = sum(s / sum(sure) / math.exp(near[k][side]) for k, s in enumerate(sure))
            assert found[p, side].item() == pytest.approx(-math.log(inverse), rel=1e-9)
    same = torch.from_numpy(base).expand(count, 20, 2)
    assert torch.allclose(mixed_reference(method, same), same[0], rtol=1e-14)


def test_no_answers_in_common_and_unsure_references():
    logps = torch.tensor([[[-5.0, -5.0]], [[-7.0, -7.0]]])                         # no reference prefers anything
    assert torch.isfinite(mixed_reference(LOSSES["mrpo"], logps)).all()
    assert torch.isfinite(mixed_reference(LOSSES["mrpo"], torch.zeros(2, 1, 2))).all()     # pairs not visited


def test_advantage_factor_is_bounded():
    factor = mallowspo.advantage_factor(torch.tensor([0.0, 1.0, 1e9, -1e9]), LOSSES["hpo"])
    assert factor.tolist() == pytest.approx([1, math.e, 20, 0])


# --- TRL's own code on the same numbers, where it is installed ---------------------------------------------------

def trl_loss(split, tokens, loss_type, beta, smoothing):
    """What DPOTrainer's loss makes of these log-probabilities; its model and accelerator are stand-ins."""
    trainer = pytest.importorskip("trl").DPOTrainer
    sides = [[each[:len(pair.chosen)] for each, pair in zip(tokens, split.pairs)],
             [each[len(pair.chosen):] for each, pair in zip(tokens, split.pairs)]]
    logps = torch.nn.utils.rnn.pad_sequence([torch.tensor(side) for both in sides for side in both], batch_first=True)
    lengths = torch.tensor([len(side) for both in sides for side in both])
    mask = (torch.arange(logps.shape[1] + 1) <= lengths[:, None]).long()           # the first token is the prompt's
    mask[:, 0] = 0
    outputs = types.SimpleNamespace(log_probs=logps, entropy=logps, mean_logits=logps, is_top1=mask[:, 1:].bool())
    accelerator = types.SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    stand_in = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0],
        beta=beta, label_smoothing=smoothing, use_weighting=False, _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0, _tp_size=1)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask,
              "ref_chosen_logps": split.ref_logp[:, 0], "ref_rejected_logps": split.ref_logp[:, 1]}
    return trainer._compute_loss(stand_in, lambda **_: outputs, inputs, False).item()


@pytest.mark.parametrize("name, loss_type, beta, smoothing, factor", [
    ("dpo", "sigmoid", 0.1, 0.0, 1), ("robust", "robust", 0.1, 0.1, 1), ("ipo", "ipo", 0.1, 0.0, 0.1 ** 2),
    ("hinge", "hinge", 0.1, 0.0, 1), ("exo", "exo_pair", 0.1, 1e-3, 1), ("dpo-norm", "sigmoid_norm", 10.0, 0.0, 1)])
def test_trl_agrees(name, loss_type, beta, smoothing, factor):
    split = make_split()
    split.weight = torch.ones_like(split.weight)
    tokens = policy_tokens(split)
    ours = losses(LOSSES[name], split, [torch.tensor(each) for each in tokens]).loss.mean().item()
    assert ours == pytest.approx(factor * trl_loss(split, tokens, loss_type, beta, smoothing), rel=1e-6)


@pytest.mark.parametrize("name, loss_type, smoothing", [("simpo", "simpo", 0.0), ("cpo", "sigmoid", 0.0)])
def test_trl_cpo_trainer_agrees(name, loss_type, smoothing):
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    split, method = make_split(), LOSSES[name]
    split.weight = torch.ones_like(split.weight)
    tokens = policy_tokens(split)
    sums = [[part.mean() if method.eta else part.sum() for part in np.split(each, [len(pair.chosen)])]
            for each, pair in zip(tokens, split.pairs)]
    stand_in = types.SimpleNamespace(alpha=0.0, beta=method.beta, loss_type=loss_type, label_smoothing=smoothing,
                                     simpo_gamma=method.beta * method.margin,
                                     accelerator=types.SimpleNamespace(device="cpu"))
    theirs, *_ = trainer.cpo_loss(stand_in, *torch.tensor(np.array(sums)).unbind(1))
    ours = losses(method._replace(sft=0.0), split, [torch.tensor(each) for each in tokens]).loss
    assert torch.allclose(ours, theirs)


# --- in the trainer ----------------------------------------------------------------------------------------------

def test_references_in_the_trainer(run, make_model, pairs, tmp_path):
    """The same model as a further reference changes nothing, another one does; its scores are kept in a file."""
    other = tmp_path / "other"
    model = train.Transformer.from_pretrained(make_model())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)
    model.save_pretrained(other)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (other / file).write_bytes((make_model() / file).read_bytes())
    flags = ["train.py", "--model", make_model(), "--data", pairs, "--steps", 4, "--batch-size", 10, "--samples", 0,
             "--lr", 1e-3, "--eval-pairs", 10]
    plain = run(*flags, "--loss", "dpo", "--out", tmp_path / "dpo")
    same = run(*flags, "--loss", "mrpo", "--references", make_model(), "--out", tmp_path / "same")
    differs = run(*flags, "--loss", "mrpo", "--references", other, make_model(), "--out", tmp_path / "differs")
    assert plain.returncode == same.returncode == differs.returncode == 0, same.stderr + differs.stderr
    assert "WARNING" not in same.stdout + differs.stdout and "the first loss" in differs.stdout
    weights = [train.Transformer.from_pretrained(tmp_path / name).state_dict() for name in ("dpo", "same", "differs")]
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=1e-6)
    assert any(not torch.equal(tensor, weights[2][name]) for name, tensor in weights[0].items())
    assert sorted(path.name for path in (tmp_path / "differs/cache").glob("reference*.safetensors")) == [
        "reference-2.safetensors", "reference-3.safetensors", "reference.safetensors"]


def test_one_model_at_a_time_is_in_memory(make_model, pairs, tmp_path, monkeypatch):
    """The policy, too, makes room while a further reference is scored, and is read again afterwards."""
    opened, read = [], train.Transformer.from_pretrained

    def alone(folder, *arguments):
        assert all(model() is None for _, model in opened)
        model = read(folder, *arguments)
        opened.append((str(folder), weakref.ref(model)))
        return model
    monkeypatch.setattr(train.Transformer, "from_pretrained", alone)
    one, two, three = (str(make_model(name)) for name in ("llama-tied", "llama-grouped", "gpt2"))
    train.fit(train.Config(model=one, references=(two, three), data=(str(pairs),), loss="mrpo", steps=2, samples=0,
                           out=str(tmp_path), lora_rank=2, device="cpu"), ALONE)
    assert [folder for folder, _ in opened] == [one, two, three, one]


def test_sampled_tokens_after_a_resume(run, make_model, pairs, tmp_path):
    flags = ["train.py", "--model", make_model(), "--data", pairs, "--batch-size", 10, "--samples", 0, "--lr", 1e-3,
             "--loss", "sampo", "--steps", 6]
    assert run(*flags, "--out", tmp_path / "whole").returncode == 0
    cfg = train.Config(model=str(make_model()), data=(str(pairs),), batch_size=10, samples=0, lr=1e-3, loss="sampo",
                       steps=6, save_every=1, out=str(tmp_path / "stopped"), device="cpu")

    def stop(step, model):
        if step == 3:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        train.fit(cfg, train.World(0, 1, torch.device("cpu"), torch.float32), stop)
    train.fit(dataclasses.replace(cfg, resume=True), train.World(0, 1, torch.device("cpu"), torch.float32))
    whole, resumed = (train.Transformer.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("loss", ["sampo", "bmc", "mrpo"])
def test_two_processes_take_the_steps_of_one(run, make_model, pairs, tmp_path, loss):
    flags = ["train.py", "--model", make_model(), "--data", pairs, "--steps", 3, "--batch-size", 10, "--samples", 0,
             "--lr", 3e-6, "--loss", loss]
    if loss == "mrpo":
        flags += ["--references", make_model("llama-biased")]
    for processes in (1, 2):
        done = run(*flags, "--out", tmp_path / str(processes), processes=processes)
        assert done.returncode == 0 and "WARNING" not in done.stdout, done.stderr
    one, two = (train.Transformer.from_pretrained(tmp_path / name).state_dict() for name in ("1", "2"))
    assert all((tensor - two[name]).abs().max() <= 1e-6 for name, tensor in one.items())


@pytest.mark.parametrize("flags, words", [
    (["--loss", "mrpo"], "--references is missing"),
    (["--loss", "sampo", "--references", "x"], "cannot be used with --token-weights"),
    (["--loss", "minor-dpo", "--alpha", 0], "--clip-rejected is about the reference"),
    (["--loss", "sft", "--focal", 1], "--focal has no meaning for --loss sft"),
    (["--loss", "dpo", "--token-decay", 0.9], "--token-decay needs --token-weights decay"),
    (["--loss", "sampo", "--token-decay", 0.9], "--token-decay needs --token-weights decay"),
    (["--loss", "decay-dpo", "--token-cap", 1], "--token-cap needs --token-weights difference"),
    (["--loss", "dpo", "--unbiased"], "--unbiased needs --smoothing"),
    (["--loss", "cdpo", "--smoothing", 0.5], "it must be from 0 to below 0.5"),
    (["--loss", "hpo"], "no 'rewards'"),
])
def test_terms_that_do_not_go_together(run, make_model, pairs, tmp_path, flags, words):
    done = run("train.py", "--model", make_model(), "--data", pairs, "--out", tmp_path, *flags)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
