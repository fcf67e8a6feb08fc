"""The theory and the simulator: closed forms against enumeration, the link against 60 digits, and the
simulator's claims with few, fixed seeds.  Bounds are measured: a failing test means that a formula changed.
"""
import contextlib
import io
import itertools
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import mpmath
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import people  # noqa: E402
import theory  # noqa: E402

import bandit  # noqa: E402
import data  # noqa: E402
import mallowspo  # noqa: E402

torch.set_num_threads(1)


def run(*words):
    """bandit.py in this process (importing torch anew takes seconds): exit status, stdout, stderr."""
    out, err, argv, status = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["bandit.py", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            bandit.main()
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = argv
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    """Run one experiment of bandit.py and return its JSON."""
    out = tmp_path_factory.mktemp("bandit")

    def go(name, *words):
        status, _, err = run(name, *words, "--out", out)
        assert status == 0, err
        return json.loads((out / f"{name}.json").read_text())
    return go


def rows(record, value, **where):
    found = bandit.pick(record["rows"], value, **where)
    assert found, f"no row has {where}"
    return found


# --- theory -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", range(2, 8))
def test_closed_forms_agree_with_enumeration(n):
    lam = bandit.to_lam([.01, .05, .1, .2, .3, .5, .7, .8, .9, .95, .99])
    i, j = bandit.pairs_of(n)
    ranks = bandit.enumerate_rankings(n)                                                # (n!, n)
    cost = people.kendall_distance(ranks).double()                                      # (n!,)
    p = torch.softmax(-lam[:, None] * cost, -1)                                         # (phis, n!)
    mean, variance = people.distance_moments(n, lam)
    summed = (p * cost).sum(-1)
    for name, ours, right in (
            ("log Z", people.log_partition(n, lam), (-lam[:, None] * cost).logsumexp(-1)),
            ("mean", mean, summed),
            ("variance", variance, (p * (cost - summed[:, None]) ** 2).sum(-1)),
            ("favourite", bandit.top_choice(n, lam), p @ (ranks == 0).double()),
            ("pair", bandit.truth(n, lam)[..., i, j], bandit.pair_rates(ranks, p)[..., i, j])):
        assert (ours - right).abs().max() < 1e-12, name


def test_sampler_follows_the_model():
    lam, n = torch.tensor(0.5, dtype=torch.float64), 5
    ranks = bandit.sample_rankings(50_000, n, lam.item(), torch.Generator().manual_seed(0))
    seen = bandit.pair_rates(ranks, torch.ones(len(ranks), dtype=torch.float64))
    i, j = bandit.pairs_of(n)
    assert (seen - bandit.truth(n, lam))[i, j].abs().max() < 4 * (0.25 / 50_000) ** .5
    centre, fitted = people.fit_rankings(ranks, torch.ones(len(ranks), dtype=torch.float64))
    assert centre.tolist() == [0, 1, 2, 3, 4] and abs(fitted - lam) < 0.01


def test_spearman_is_never_below_the_theta_link(go):
    record = go("spearman")
    assert min(rows(record, "smallest")) > -1e-12
    assert max(rows(record, "side by side")) < 1e-12
    assert .12 <= max(rows(record, "largest error", n=5)) <= .16


def oracle(h, lam):
    """g(h), log g(h) and its slope, with 60 digits; for h < 0 from one fraction, as 1 - g needs thousands."""
    with mpmath.workdps(60):
        lam, h = mpmath.mpf(lam), mpmath.mpf(h)
        phi = mpmath.exp(-lam)

        def below(a):                                      # g(-a) = 1 - [(a+1) / (1-phi^(a+1)) - a / (1-phi^a)]
            tail = phi ** a
            return tail * (a * (1 - phi) - phi * (1 - tail)) / ((1 - tail) * (1 - phi * tail))
        log_g = (lambda x: mpmath.log1p(-below(x))) if h > 0 else (lambda x: mpmath.log(below(-x)))
        return float(mpmath.exp(log_g(h))), float(log_g(h)), float(mpmath.diff(log_g, h))


@pytest.mark.parametrize("lam", [1e-6, 1e-4, 1e-3, .02, .3, 1., 3., 10., 30.])
def test_link_in_float32_against_60_digits(lam):
    h = torch.tensor([1., 1.5, 2, 3.25, 7, 30, 100, 1000, 1e4], dtype=torch.float32)
    h = torch.cat([h, -h]).requires_grad_()
    lam = torch.tensor(lam, dtype=torch.float32)
    loss = mallowspo.LINKS["mallows-phi"](h, lam)
    slope, = torch.autograd.grad(loss.sum(), h)
    for x, value, grad in zip(h.tolist(), loss.tolist(), slope.tolist(), strict=True):
        g, log_g, d_log_g = oracle(x, lam.item())
        for name, ours, right in (("log g", -value, log_g), ("gradient", -grad, d_log_g)):
            assert ours == ours and abs(ours) != float("inf")
            if abs(right) > 1e-37:                     # below, float32 itself has fewer digits
                assert ours == pytest.approx(right, rel=1e-5), (name, x, lam)
        if g > 1e-37:
            ours = mallowspo.pair_probability(torch.tensor(x), lam).item()
            assert ours == pytest.approx(g, rel=1e-5), ("g", x, lam)


def test_link_is_finite_everywhere_in_float32():
    h = torch.cat([torch.zeros(1), torch.logspace(-8, 4, 97)])
    h = torch.cat([-h, h])[:, None].requires_grad_()
    lam = torch.cat([torch.zeros(1), torch.logspace(-6, 1.477, 60)])
    loss = mallowspo.LINKS["mallows-phi"](h, lam)
    slope, = torch.autograd.grad(loss.sum(), h)
    assert torch.isfinite(loss).all() and torch.isfinite(slope).all()


def test_bridge_moves_no_integer_gap_and_only_rises():
    lam = torch.tensor([.01, .5, 3.], dtype=torch.float64)
    g = mallowspo.pair_probability(torch.linspace(-3, 3, 1201, dtype=torch.float64)[:, None], lam)
    assert (g.diff(dim=0) > 0).all()
    for gap in (1., 2., 5.):
        ours = mallowspo.pair_probability(torch.tensor(gap, dtype=torch.float64), lam)
        printed = theory.as_printed(torch.tensor(gap, dtype=torch.float64), lam)
        assert torch.allclose(ours, printed, rtol=1e-10)


def test_estimators_invert_what_they_should():
    lam = torch.tensor([.01, .1, .7, 3., 4.6], dtype=torch.float64)
    for n in (2, 5, 10, 100):
        assert (bandit.lam_of_entropy(bandit.favourite_entropy(n, lam), n) - lam).abs().max() < 1e-8
        assert (theory.lam_of_disagreement(theory.disagreement(n, lam), n) - lam).abs().max() < 1e-8
    ranks = bandit.enumerate_rankings(5)
    exact = torch.softmax(-lam[:, None] * people.kendall_distance(ranks), -1)           # (lams, 5!)
    centre, fitted = people.fit_rankings(ranks, exact)
    assert (fitted - lam).abs().max() < 1e-8 and (centre == torch.arange(5)).all()
    swapped = ranks[:, [1, 0, 2, 3, 4]]                    # now item 1 is the best of all, item 0 the second
    assert people.fit_rankings(swapped, exact[2])[0].tolist() == [1, 0, 2, 3, 4]
    two = mallowspo.pair_probability(torch.arange(1., 3), torch.tensor(.7))
    right = (2 * 2 * two[0] * (1 - two[0]) + 2 * two[1] * (1 - two[1])) / 3
    assert theory.disagreement(3, torch.tensor(.7)).item() == pytest.approx(right.item(), rel=1e-5)


# --- engine -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("link", ["sigmoid", "mallows-theta", "mallows-phi", "square"])
def test_engine_finds_what_gradient_descent_finds(link):
    """The fit is stationary, and no other start does better: Adam from elsewhere ends at the same place."""
    lam = bandit.to_lam([.2, .6, .9])
    wins = bandit.draw_pairs(bandit.np.random.default_rng(1), bandit.truth(4, lam), 200)
    found = bandit.fit_policy(link, wins, lam)
    u = torch.tensor([.3, -.2, .1, 0], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([u], lr=.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 1500)
    i, j = torch.arange(4)[:, None], torch.arange(4)
    share = wins / wins.sum()
    for _ in range(1500):
        adam.zero_grad()
        (share * mallowspo.LINKS[link](u[i] - u[j], lam[:, None, None])).sum().backward()
        adam.step()
        schedule.step()
    assert (u.detach() - u.detach().mean() - found).abs().max() < 1e-3


def test_growth_is_what_gradient_descent_does(go):
    """Gradient flow, integrated in one go, against plain gradient descent in small steps."""
    record = go("growth", "--phis", ".05", ".9")
    for phi in (.05, .9):
        for method, link in bandit.METHODS.items():
            u = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            for _ in range(1000):
                slope, = torch.autograd.grad(mallowspo.LINKS[link](u[0] - u[1], bandit.to_lam(phi)), u)
                u = (u - .1 * slope).detach().requires_grad_()
            margin = (u[0] - u[1]).item()
            assert margin == pytest.approx(rows(record, "margin", phi=phi, method=method, time=100.)[0], rel=.02)
    pace = {method: rows(record, "per e-fold", phi=.05, method=method, time=1e6)[0] for method in bandit.METHODS}
    assert pace["mallows-theta"] == pytest.approx(1 / (2 * bandit.to_lam(.05).item()), rel=.05)
    assert pace["dpo"] > 2 * pace["mallows-phi"] and pace["ipo"] == 0
    assert (rows(record, "per e-fold", phi=.9, method="mallows-phi", time=1e6)[0]
            > 5 * rows(record, "per e-fold", phi=.9, method="dpo", time=1e6)[0])


# --- claims -----------------------------------------------------------------------------------------------------

def test_optimum(go):
    slope = {method: rows(record := go("optimum"), "slope", method=method) for method in bandit.METHODS}
    assert {.01, .98} <= set(rows(record, "phi"))
    assert all(abs(s - 1) < 1e-3 for s in slope["mallows-phi"])
    assert max(slope["dpo"]) / min(slope["dpo"]) > 50
    assert max(slope["mallows-theta"]) / min(slope["mallows-theta"]) < 1.3
    halved = go("optimum", "--n", 4, "--beta", 2, "--methods", "mallows-phi")
    target = torch.softmax(-torch.arange(4) / 2, 0)[0].item()
    assert all(best == pytest.approx(target, abs=1e-4) for best in rows(halved, "best"))


def test_frontier(go):
    record = go("frontier", "--seeds", 2)
    place = {(row["judge"], row["method"]): row["place"] for row in record["rows"] if row["pairs"] == "infinite"}
    assert place["consensus", "mallows-phi"] < place["consensus", "best possible"] + .005 < .68
    assert place["consensus", "dpo"] > .9
    assert place["annotator", "ipo"] < place["annotator", "best possible"] + .005 < 1.18
    assert place["annotator", "mallows-phi"] > 1.25


def test_samples(go):
    record = go("samples", "--phis", .9, .95, "--seeds", 20)
    for row in record["rows"]:
        if row["N lam^2"] < .5:
            assert row["ratio"] > 1, row
        if row["N lam^2"] >= 30:
            assert row["ratio"] < .5, row


def test_shared(go):
    record = go("shared", "--pairs", 256, "--seeds", 8)
    excess = {row["index"]: row["excess"] for row in record["rows"]}
    assert excess["dpo"] > 100
    assert excess["phi, best index"] < 3
    assert excess["phi, entropy proxy"] < 10
    assert excess["phi, shuffled index"] > excess["dpo"]
    assert abs(excess["phi, one index"] - excess["dpo"]) < 8


def test_estimate():
    result = theory.estimate(types.SimpleNamespace(phis=None, pairs=None, seeds=8, seed=0))
    claims = {text: holds for text, holds, _ in result.claims}
    assert claims["the entropy proxy orders prompts by dispersion"] and claims["inverting the entropy gives lam"]
    rmse = {row["estimator"]: row["rmse"] for row in result.rows if row["n"] == 5 and row["answers"] == 1024}
    assert rmse["inverted, pseudo-count"] < .08 and rmse["entropy proxy (the paper)"] > .2


def test_the_link_as_printed_is_of_no_use_and_ours_is(tmp_path):
    done = subprocess.run([sys.executable, "tests/theory.py", "link", "--out", tmp_path], cwd=ROOT)
    claims = json.loads((tmp_path / "link.json").read_text())["claims"]
    assert [holds for _, holds, _ in claims] == [False, True] and done.returncode == 0


# --- the command line -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, word", [
    (["optimum", "--phis", "0"], "--phis"), (["optimum", "--phis", "1.2"], "--phis"), (["optimum", "--n", "1"], "--n"),
    (["shared", "--seeds", "0"], "--seeds"), (["shared", "--pairs", "0"], "--pairs"), (["nonsense"], "nonsense"),
    (["optimum", "--beta", "nan"], "--beta"), (["optimum", "--method", "dpo"], "--method"),
    (["optimum", "--out", __file__], "test_bandit.py"), (["shared", "--seeds", "few"], "few"),
])
def test_silly_arguments_get_one_line(words, word, tmp_path):
    status, _, err = run(*words, *([] if "--out" in words else ["--out", tmp_path]))
    assert status == 2 and word in err.splitlines()[-1]


def test_same_seed_same_numbers(go, tmp_path):
    words = ["--seeds", 2, "--pairs", 32]
    first = go("shared", *words)["rows"]
    assert first == go("shared", *words)["rows"] != go("shared", *words, "--seed", 1)["rows"]


def test_a_learned_power_never_loses_and_a_useless_index_gets_none(go):
    record = go("trust", "--seeds", 4)
    for row in record["rows"]:
        if row["power"] == "learned":
            assert row["ratio"] < (1 if row["r"] == "useless" else 0.85), row
            assert row["learned"] < 0.4 if row["r"] == "useless" else row["learned"] > 0.1
    assert min(rows(record, "learned", r=0, power="learned")) > 0.8
    assert min(rows(record, "ratio", r="useless", power="power 1")) > 1.1
    assert max(rows(record, "ratio", r=0.5)) < 0.4              # little noise is cheap; much loses to DPO
    assert sum(rows(record, "ratio", r=1.5, power="power 1")) / 3 > 1
    assert all(holds for _, holds, _ in record["claims"])


# --- the neighbours that need a sampler ---------------------------------------------------------------------

OPT = types.SimpleNamespace(n=5, seeds=3, seed=0, phis=None, pairs=None)


def loop_regret(loop, crowd=None, rounds=3, **more):
    torch.manual_seed(OPT.seed)
    crowd = crowd or bandit.Crowd(OPT)
    return bandit.run_loop(crowd, loop, torch.ones(len(crowd.lam)).double(), 2, rounds, **more)


def test_momentum_zero_is_iterated_dpo_and_more_goes_further(monkeypatch):
    plain = loop_regret(bandit.LOOPS["iterated DPO"])
    assert torch.equal(loop_regret(bandit.LOOPS["Accelerated PO"]._replace(momentum=0.0)), plain)
    learned, descend = [], bandit.descend

    def note(*arguments):
        learned.append(list(descend(*arguments))[-1])
        return [learned[-1]]
    monkeypatch.setattr(bandit, "descend", note)
    crowd = bandit.Crowd(OPT)
    found = loop_regret(bandit.LOOPS["Accelerated PO"], crowd)
    hats = [crowd.start, *(parts[0] for parts in learned)]
    for k in (1, 2, 3):                                            # theta = hat_k + (hat_k - hat_{k - 1}) / 2
        assert torch.allclose(crowd.regret(1.5 * hats[k] - 0.5 * hats[k - 1]), found[:, k])


def test_a_perfect_discriminator_is_gold():
    """If nobody disagrees and the discriminator knows the order, its labels are the people's."""
    def crowd():
        made = bandit.Crowd(OPT)
        made.chances = torch.ones(5, 5).triu(1).double().expand_as(made.chances)
        return made
    perfect = lambda crowd, gold, weight: -torch.arange(5.0).double().expand(3, len(crowd.lam), 5)
    found = loop_regret(bandit.Loop(silver=1), crowd(), discriminate=perfect)
    assert torch.equal(found, loop_regret(bandit.Loop(), crowd()))
    learned = bandit.fit_discriminator(made := crowd(), made.judge(made.draw(made.logp(made.start), 200)),
                                       torch.ones(8).double())
    assert (learned.mean(1).diff(dim=-1) < 0).all()                # it finds the common order


def test_advantage_loss_is_least_where_log_ratios_are_advantages():
    ratio, weight = torch.tensor([[[[1.25, -1.25]]]]).double(), torch.tensor([2.0]).double()
    assert bandit.advantage_loss(ratio, torch.zeros_like(ratio), weight, 0.2).item() == 0       # 2 * .2 * 1.25 = 1/2
    assert bandit.advantage_loss(-ratio, torch.zeros_like(ratio), weight, 0.2).item() == pytest.approx(2.0)


def test_online_claims_that_the_full_run_found(go):
    record = go("online", "--seeds", 20)
    for loop in ("Accelerated PO", "D2PO", "APA"):
        known, none = (rows(record, "place", loop=loop, dispersion=source, labels=8)[0] for source in ("known", "none"))
        assert known < none
    silver, plain = (rows(record, "place", loop=loop, dispersion="none", labels=2)[0]
                     for loop in ("D2PO", "iterated DPO"))
    assert silver < plain - 0.1


def test_equal_denoising_errors_are_log_two_and_points_improve(go):
    torch.manual_seed(OPT.seed)
    parts = bandit.perceptron(3, 5, 48, 48, 2)
    loss = bandit.preference_loss(parts, parts, torch.tensor([0.3, 1.7]))
    assert torch.allclose(loss, torch.full((3,), math.log(2)))
    record = go("diffusion", "--seeds", 2)
    assert all(rate > 0.55 for rate in rows(record, "win rate", step=150))


def test_the_denoiser_learns_and_sampling_finds_the_clouds():
    torch.manual_seed(OPT.seed)
    *_, parts = bandit.descend(bandit.perceptron(3, 5, 48, 48, 2), bandit.denoising_loss, 400, .005)
    half = torch.tensor([-1.0, 1.0]).repeat(128).expand(3, -1)
    x = bandit.sample_points(parts, torch.randn(3, 256, 2), half)
    assert ((x[..., 1] > 0) == (half > 0)).float().mean() > 0.97
    assert (x.abs() - 1).abs().mean() < 0.35                        # around (+-1, +-1), with a spread of .25


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


def test_population_asks_readable_questions(population, tmp_path):
    assert len(set(population.questions)) == 24 and all(len(set(words)) == 6 for words in population.answers)
    for name, content in population.tokenizer_files().items():
        (tmp_path / name).write_bytes(content)
    tokenizer, rows = data.Tokenizer(tmp_path), list(population.favourites(48, 0))
    assert rows[0]["prompt"].endswith(" asks: What is one plus one?\nAnswer:") and rows[0]["chosen"] == " two"
    assert all(len(tokenizer.response(" " + word)) == 2 for words in population.answers for word in words)


def test_measures_against_sampling(population):
    generator = torch.Generator().manual_seed(0)
    ref, logp = (torch.randn(24, 2, 6, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    found = population.measure(logp, ref)
    p, r = logp.exp(), ref.exp()
    kl, win = torch.zeros(24), 0.0
    for q, n, i in itertools.product(range(24), range(2), range(6)):
        kl[q] += p[q, n, i] * (logp[q, n, i] - ref[q, n, i]) / 2
        win += sum(p[q, n, i] * r[q, n, j] * population.wins[q, i, j] for j in range(6)).item() / 48
    assert found["kl"] == pytest.approx(kl.mean().item()) and found["win_rate"] == pytest.approx(win)
    assert found["kl_agreed"] == pytest.approx(kl[:12].mean().item())
    assert found["kl_disputed"] == pytest.approx(kl[12:].mean().item())
    same = population.measure(ref, ref)
    assert same["win_rate"] == pytest.approx(0.5) and same["reward_accuracy"] == 0.5
    ideal = population.measure(ref - torch.arange(6.0), ref)
    assert ideal["reward_accuracy"] == pytest.approx(population.best_accuracy())
    best = torch.maximum(population.wins, 1 - population.wins)
    assert best[:, torch.ones(6, 6).triu(1).bool()].mean().item() == pytest.approx(population.best_accuracy())
    assert abs(found["elsewhere"]) < 1e-6
    assert population.measure(ref - math.log(2), ref)["elsewhere"] == pytest.approx(0.5)


def test_figures_at_a_kl_lie_between_two_betas():
    """They are interpolated linearly in the square root of the KL."""
    runs = [{"method": "dpo", "beta": 1.0, "kl": 0.09, "win_rate": 0.53},
            {"method": "dpo", "beta": 0.2, "kl": 0.25, "win_rate": 0.55}]
    assert bandit.at_kl(runs, "dpo", 0.16) == {"beta": pytest.approx(0.6), "kl": pytest.approx(0.17),
                                               "win_rate": pytest.approx(0.54)}
    assert bandit.at_kl(runs, "dpo", 0.09)["win_rate"] == 0.53 and bandit.at_kl(runs, "dpo", 0.25) is None
    assert bandit.at_kl(runs, "ipo", 0.16) is None


def test_the_report_compares_with_dpo_where_both_have_gone_equally_far(population):
    run = {"beta": 1.0, "power": 0.0, "kl_agreed": 0.1, "kl_disputed": 0.1, "reward_accuracy": 0.7, "elsewhere": 0.01}
    runs = [{**run, "method": name, "kl": kl, "win_rate": 0.5 + gain + kl / 10, "consensus_rank": 1 - gain - kl}
            for name, gain in (("dpo", 0.0), ("ahead", 0.1), ("behind", -0.1)) for kl in (0.1, 0.3)]
    runs.append({**runs[0], "method": "elsewhere"})
    records = [{"where": f"pairs.jsonl:{i + 1}", "entropy": i % 24 / 24} for i in range(48)]
    content, text = bandit.report(population, runs, records)
    assert content["dispersion_rank_correlation"] == pytest.approx(1) and content["runs"] == runs
    assert "there was no dispersion index" in bandit.report(population, runs, [])[1]
    ahead, behind, elsewhere = text.splitlines()[-3:]
    assert "win rate +0.1000 (better), consensus rank -0.1000 (better), reward accuracy +0.0000 (as good)" in ahead
    assert "win rate -0.1000 (worse), consensus rank +0.1000 (worse)" in behind and "no runs on both sides" in elsewhere


def test_the_reference_meets_every_answer(population):
    said = [row["chosen"].strip() for row in population.favourites(9600, 0) if row["prompt"].endswith("says:")]
    words = {word for answers in population.answers for word in answers}
    assert set(said) == words and len(said) == 2400
