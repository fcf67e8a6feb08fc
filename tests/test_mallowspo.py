"""The formulas against enumeration, float64 and high-precision arithmetic."""
import inspect
import itertools
import math
import textwrap

import mpmath
import people
import pytest
import torch
from conftest import ROOT

import bandit
import mallowspo
from mallowspo import LINKS, LOSSES, Method, fit_trust, lam_of_votes, objective, pair_probability


def enumerate_kendall(n, phi):
    """All rankings of n items (ranks of the centre's items) and their exact probabilities."""
    ranks = torch.tensor(list(itertools.permutations(range(n))))                          # (n!, n)
    distance = sum((ranks[:, i] > ranks[:, j]).long() for i in range(n) for j in range(i + 1, n))
    weights = phi ** distance.double()
    return ranks, weights / weights.sum(), weights.sum()


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("phi", [0.05, 0.3, 0.7, 0.95])
def test_kendall_model_equals_enumeration(n, phi):
    ranks, probability, z = enumerate_kendall(n, phi)
    lam = torch.tensor(-math.log(phi), dtype=torch.float64)
    assert abs(people.log_partition(n, lam) - z.log()) < 1e-12
    for i in range(n):
        for j in range(n):
            if i != j:
                exact = probability[ranks[:, i] < ranks[:, j]].sum()
                assert abs(mallowspo.pair_probability(torch.tensor(float(j - i)).double(), lam) - exact) < 1e-12


def test_partition_at_a_coin_toss():
    assert people.log_partition(5, torch.zeros(())).item() == pytest.approx(math.log(120), rel=1e-6)


def test_sampler_has_the_exact_rates():
    lam, count = -math.log(0.6), 200_000
    ranks = bandit.sample_rankings(count, 5, lam, torch.Generator().manual_seed(0))
    assert torch.equal(ranks.sort(1).values, torch.arange(5).expand(count, 5))
    for i in range(5):
        for j in range(i + 1, 5):
            exact = mallowspo.pair_probability(torch.tensor(float(j - i)), torch.tensor(lam)).item()
            rate = (ranks[:, i] < ranks[:, j]).double().mean().item()
            assert abs(rate - exact) < 4.5 * math.sqrt(exact * (1 - exact) / count), (i, j)


def kendall_reference(h, lam):
    """-log g in high precision, from the window form with its bridge."""
    h, lam = mpmath.mpf(h), mpmath.mpf(lam)
    x = max(min(h, 1), -1)
    centre = h + (3 * x - x ** 3) / 4
    a = abs(centre) - mpmath.mpf(1) / 2

    def G(x):
        return x / (1 - mpmath.exp(-x)) if x else mpmath.mpf(1)
    g = (G(lam * (a + 1)) - G(lam * a)) / lam
    return -mpmath.log(g if centre > 0 else 1 - g)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_kendall_link_against_high_precision(dtype, bound):
    generator = torch.Generator().manual_seed(3)
    lam = (10 ** (torch.rand(150, generator=generator, dtype=torch.float64) * 7.4 - 6)).to(dtype)
    size = 10 ** (torch.rand(150, generator=generator, dtype=torch.float64) * 10 - 6)
    h = (size * (torch.randint(2, (150,), generator=generator) * 2 - 1)).to(dtype).requires_grad_()
    loss = LINKS["mallows-phi"](h, lam)
    slope, = torch.autograd.grad(loss.sum(), h)
    assert torch.isfinite(loss).all() and torch.isfinite(slope).all()
    for i in range(150):
        exponent = lam[i].item() * abs(h[i].item())
        if exponent > 600:                    # the exact value needs that many digits; use the asymptote
            assert h[i] > 0 or loss[i].item() == pytest.approx(exponent, rel=0.05)
            continue
        with mpmath.workdps(60 + int(exponent)):
            want = kendall_reference(h[i].item(), lam[i].item())
            derivative = mpmath.diff(lambda s, i=i: kendall_reference(s, lam[i].item()), h[i].item())
            if want > 1e-30:
                assert abs(loss[i].item() - want) <= bound * abs(want), (h[i], lam[i])
                assert abs(slope[i].item() - derivative) <= bound * abs(derivative), (h[i], lam[i])


def test_kendall_link_is_finite_and_monotone_everywhere():
    h = torch.cat([-torch.logspace(4, -7, 300), torch.zeros(1), torch.logspace(-7, 4, 300)]).requires_grad_()
    for lam in [0.0, 1e-6, 1e-3, 0.1, 0.8, 0.9, 1.0, 3.0, 30.0]:
        loss = LINKS["mallows-phi"](h, torch.tensor(lam))
        slope, = torch.autograd.grad(loss.sum(), h)
        assert torch.isfinite(loss).all() and torch.isfinite(slope).all(), lam
        assert (slope <= 0).all() and (loss.diff() <= 1e-6 * loss[1:].abs()).all(), lam
    half = LINKS["mallows-phi"](torch.tensor([0.0, -3.0], dtype=torch.bfloat16), torch.tensor(0.7))
    assert half.dtype == torch.float32


def test_links_equal_float64_definitions():
    h = torch.linspace(-30, 30, 601, dtype=torch.float64)
    lam = torch.tensor(0.9, dtype=torch.float64)
    wanted = {"sigmoid": torch.log1p(torch.exp(-h)), "mallows-theta": torch.log1p(torch.exp(-2 * 0.9 * h)),
              "square": (h - 0.5) ** 2, "hinge": (1 - h).clamp(min=0)}
    for name, want in wanted.items():
        assert torch.allclose(LINKS[name](h, lam), want, rtol=1e-12, atol=1e-12), name
        assert torch.allclose(LINKS[name](h.float(), lam.float()).double(), want, rtol=2e-5, atol=1e-6), name


def batch(rows=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ref = -torch.rand(rows, 2, generator=generator) * 50
    logp = ref + torch.randn(rows, 2, generator=generator) * 5
    return logp, ref, torch.randint(1, 40, (rows, 2), generator=generator), torch.rand(rows, generator=generator) * 2


def test_dpo_equals_its_definition():
    logp, ref, length, _ = batch()
    out = objective(LOSSES["dpo"], logp, ref, length, torch.ones(64))
    h = 0.1 * ((logp - ref)[:, 0] - (logp - ref)[:, 1])
    assert torch.allclose(out.loss, torch.nn.functional.binary_cross_entropy_with_logits(h, torch.ones(64),
                                                                                         reduction="none"))
    assert torch.allclose(out.margin, h, atol=1e-6)
    swapped = objective(LOSSES["dpo"], logp.flip(1), ref.flip(1), length.flip(1), torch.ones(64))
    assert torch.equal(swapped.accuracy, 1 - out.accuracy)


def test_reductions_are_exact():
    logp, ref, length, weight = batch()
    one = torch.ones(64)
    dpo = objective(LOSSES["dpo"], logp, ref, length, one).loss
    h = torch.linspace(-9, 9, 999)
    assert torch.equal(LINKS["mallows-theta"](h, torch.full_like(h, 0.5)), LINKS["sigmoid"](h, None))
    assert torch.equal(objective(LOSSES["mallows-theta"], logp, ref, length, one).loss, dpo)       # lam = 1/2
    plugged = LOSSES["dpo"]._replace(dispersion="entropy")                                         # theta by plug-in
    assert torch.allclose(objective(plugged, logp, ref, length, weight).loss,
                          objective(LOSSES["mallows-theta"], logp, ref, length, weight).loss, atol=1e-6)
    assert torch.equal(objective(LOSSES["mallows-ipo"], logp, ref, length, one).loss,
                       objective(LOSSES["ipo"], logp, ref, length, one).loss)
    neutral = dict(alpha=1.0, eta=0.0, margin=0.0, sft=0.0, beta=0.1)
    for name in ("simpo", "rainbowpo"):
        assert torch.equal(objective(LOSSES[name]._replace(**neutral), logp, ref, length, one).loss, dpo)
    sft = objective(LOSSES["sft"], logp, ref, length, one).loss
    assert torch.allclose(sft, -logp[:, 0] / length[:, 0])
    assert torch.allclose(objective(LOSSES["dpo"]._replace(sft=0.5), logp, ref, length, one).loss, dpo + 0.5 * sft)


@pytest.mark.parametrize("name", LOSSES)
def test_every_method_is_finite_and_pulls_the_right_way(name):
    advantage = torch.linspace(-100, 100, 128).view(64, 2)
    for scale in (1.0, 1e4):
        logp, ref, length, weight = batch()
        logp = (logp * scale).requires_grad_()
        out = objective(LOSSES[name], logp, ref, length, weight, advantage=advantage)
        grad, = torch.autograd.grad(out.loss.sum(), logp)
        assert all(torch.isfinite(value).all() for value in (*out, grad))
        if name not in ("ipo", "mallows-ipo", "exo", "cdpo", "hpo"):         # these pull back what has gone too far
            assert (grad[:, 0] <= 0).all() and (grad[:, 1] >= 0).all()
    start = objective(LOSSES[name], ref, ref, length, weight, advantage=advantage)
    if LOSSES[name].alpha == 1 and name not in ("exo", "r-dpo", "hpo", "focalpo"):      # tests/test_neighbours.py
        assert (start.accuracy == 0.5).all()
        want = {"square": 0.25, "hinge": 1.0}.get(LOSSES[name].link, math.log(2))
        assert torch.allclose(start.loss, torch.full((64,), want), atol=3e-7, rtol=0)


def test_theta_weights_equal_the_authors_loss():
    """-logsigmoid(beta * logits * -0.29 * log(H)), as their trainer computes it."""
    logp, ref, length, _ = batch()
    entropy = torch.rand(64) * 0.5 + 0.01
    weight = mallowspo.dispersion_weight(entropy, 0.29)
    ours = objective(LOSSES["mallows-theta"], logp, ref, length, weight).loss
    logits = (logp - ref)[:, 0] - (logp - ref)[:, 1]
    theirs = -torch.nn.functional.logsigmoid(0.1 * logits * -0.29 * torch.log(entropy))
    assert torch.allclose(ours, theirs, rtol=1e-5)


def test_dispersion_weight():
    entropy = torch.tensor([0.01, 0.2, 0.9])
    for power in (0.0, 0.5, 1.0):
        phi_star = mallowspo.calibrate_phi_star(entropy, power)
        weight = mallowspo.dispersion_weight(entropy, phi_star, power)
        assert weight.mean().item() == pytest.approx(1, abs=1e-6)
        assert torch.equal(weight, torch.ones(3)) if power == 0 else (weight.diff() < 0).all()
    poles = mallowspo.dispersion_weight(torch.tensor([0.0, 1.0]), 1.0)
    assert torch.isfinite(poles).all() and (poles > 0).all()
    assert mallowspo.count_clamped(torch.tensor([0.0, 0.5, 1.0])) == 2
    two = torch.tensor([[math.log(10), 0.0]])
    assert mallowspo.dispersion_index(two, 10).item() == pytest.approx(0.5)


def test_phi_weight_of_one_has_dpos_slope_at_the_start():
    for weight in (0.5, 1.0, 2.0):
        h = torch.zeros((), requires_grad=True)
        slope, = torch.autograd.grad(mallowspo.kendall_logit(h, torch.tensor(weight)), h)
        assert weight <= slope.item() <= 1.17 * weight


def test_table_has_no_unknown_link():
    assert all(isinstance(row, Method) and (row.link is None or row.link in LINKS) for row in LOSSES.values())


@pytest.mark.parametrize("voters", [1, 3, 9])
def test_lam_from_votes_is_right_on_average_for_every_outcome(voters):
    """Simulated annotators judge neighbours, with phi drawn uniformly.  Among pairs with the same votes, the
    mean of the true lam is the estimate, and cruder estimates are farther from the truth."""
    generator = torch.Generator().manual_seed(voters)
    lam = -torch.rand(200_000, generator=generator, dtype=torch.float64).log()
    agree = pair_probability(torch.ones_like(lam), lam)
    first = (torch.rand(len(lam), voters, generator=generator, dtype=torch.float64) < agree[:, None]).sum(-1)
    estimate = lam_of_votes(torch.stack([first, voters - first], -1))
    for count in range(voters + 1):
        found = lam[first == count]
        if len(found) > 100:
            assert abs(found.mean() - estimate[first == count][0]) < 4 * found.std() / len(found) ** 0.5
    share = (first + 1) / (voters + 2)                                                    # one vote more on each side
    crude = (share / (1 - share)).log().clamp(min=0)
    error = [((guess - lam) ** 2).mean() for guess in (estimate, crude, torch.ones_like(lam))]
    assert error[0] < min(error[1:])


def test_lam_from_votes_against_quadrature():
    votes = torch.tensor([[[0, 0], [1, 0], [2, 1]], [[0, 3], [40, 2], [1000, 0]]])
    with mpmath.workdps(30):
        def mean(w, l):
            density = [lambda p, k=k: (-mpmath.log(p)) ** k * p ** l / (1 + p) ** (w + l) for k in (0, 1)]
            below, above = (mpmath.quad(f, [0, 0.001, 0.01, 0.1, 1]) for f in density)
            return float(above / below)
        exact = [[mean(*pair) for pair in row] for row in votes.tolist()]
    assert torch.allclose(lam_of_votes(votes), torch.tensor(exact, dtype=torch.float64), rtol=1e-4)
    assert lam_of_votes(votes)[0, 0] == pytest.approx(1, abs=1e-3), "without votes the mean of the prior"


# --- how far the index may be trusted -----------------------------------------------------------------------

def simulate_agreement(seed, pairs, kappa, c):
    """Whether the policy got the pairs right, and their indices, drawn from the model in fit_trust."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(pairs, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    x = (-index.log()).log()
    right = torch.sigmoid(torch.exp(c + kappa * (x - x.mean())))
    return torch.bernoulli(right, generator=generator), index


@pytest.mark.parametrize("seed, kappa, c", [(0, 0, -1), (1, 1, 0), (2, 2.5, 0.5), (3, -1, 0), (4, 0.5, -3)])
def test_trust_is_the_most_probable_one(seed, kappa, c):
    """The gradient vanishes there (30 digits); the standard error follows from the expected curvature."""
    agrees, index = simulate_agreement(seed, 80, kappa, c)
    found = fit_trust(agrees, index)
    with mpmath.workdps(30):
        x = [mpmath.log(-mpmath.log(mpmath.mpf(h))) for h in index.tolist()]
        x = [value - sum(x) / len(x) for value in x]

        def slope(c, kappa):
            odds = [mpmath.exp(c + kappa * value) for value in x]
            parts = [(1 / (1 + mpmath.exp(-o)) - y) * o for o, y in zip(odds, agrees.tolist())]
            return sum(parts) + c / 4, sum(p * value for p, value in zip(parts, x)) + kappa

        exact = mpmath.findroot(slope, (found.c, found.kappa))
        odds = [mpmath.exp(exact[0] + exact[1] * value) for value in x]
        bend = [o ** 2 / (1 + mpmath.exp(-o)) / (1 + mpmath.exp(o)) for o in odds]
        cross = sum(b * v for b, v in zip(bend, x))
        information = sum(b * v * v for b, v in zip(bend, x)) + 1
        se = (information - cross ** 2 / (sum(bend) + mpmath.mpf(1) / 4)) ** -0.5
    assert (found.c, found.kappa) == pytest.approx([float(value) for value in exact], abs=1e-5)
    assert found.se == pytest.approx(float(se), rel=1e-4)


@pytest.mark.parametrize("kappa", [0, 1, 2.4])
def test_known_trust_is_recovered(kappa):
    found = [fit_trust(*simulate_agreement(seed, 5000, kappa, 0)) for seed in range(100)]
    assert sum(abs(trust.kappa - kappa) < 2 * trust.se for trust in found) >= 90
    assert abs(sum(trust.kappa for trust in found) / 100 - kappa) < 0.1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("agrees, index", [
    (torch.ones(200), torch.rand(200)), (torch.zeros(200), torch.rand(200)), (torch.ones(0), torch.ones(0)),
    (torch.arange(200) % 2, torch.full((200,), 0.3)), (torch.arange(10) % 3 > 0, torch.linspace(0.1, 0.9, 10)),
    (torch.full((200,), 0.5), torch.rand(200)), (torch.arange(200) % 2, torch.arange(200) % 3 / 2.0),
    (torch.ones(200), torch.full((200,), torch.nan))])
def test_trust_in_hard_cases_stays_near_the_prior(agrees, index):
    trust = fit_trust(agrees, index)
    assert abs(trust.kappa) < 2 and abs(trust.c) < 8 and 0 < trust.se <= 1


def test_accuracy_by_quartile_goes_from_disagreement_to_agreement():
    index = torch.tensor([0.9, 0.1, torch.nan, 0.5, 0.3, 0.8, 0.2, 0.6, 0.4])
    agrees = torch.tensor([0, 1, 0, 0.5, 1, 0, 1, 0, 1])
    assert mallowspo.accuracy_by_quartile(agrees, index) == [0.0, 0.25, 1.0, 1.0]
    assert mallowspo.accuracy_by_quartile(agrees[:1], index[:1]) == [0.0, None, None, None]


def test_scores_count_by_their_gap_whatever_its_unit_and_sign():
    scores = torch.tensor([[8.0, 5.0], [2.0, 3.0], [4.0, 4.0]])
    phi = mallowspo.phi_of_scores(scores, scores)
    assert phi.log().tolist() == pytest.approx([-9 / 4, -3 / 4, 0])
    assert torch.allclose(mallowspo.phi_of_scores(100 * scores.flip(-1), 100 * scores), phi)
    assert (mallowspo.phi_of_scores(torch.ones(3, 2), torch.ones(3, 2)) == 1).all(), "no gap anywhere"


def test_the_snippet_runs_and_stands_in_the_readme():
    """The few lines that show how to use the formulas in another loop, as mallowspo.py and README.md have them."""
    doc = inspect.cleandoc(mallowspo.__doc__)
    start = doc.index("  from mallowspo import LOSSES, calibrate_phi_star")
    last = "print(outcome.accuracy.mean(), outcome.margin.mean())"
    snippet = textwrap.dedent(doc[start:doc.index(last) + len(last)])
    generator = torch.Generator().manual_seed(0)
    entropy, vocab_size = torch.rand(32, 2, generator=generator) * 5 + 0.1, 1000
    ref_logp = -torch.rand(32, 2, generator=generator) * 50
    length = torch.randint(1, 40, (32, 2), generator=generator)
    i = torch.randperm(32, generator=generator)[:8]
    logp = (ref_logp[i] + torch.randn(8, 2, generator=generator)).requires_grad_()
    names = {"entropy": entropy, "vocab_size": vocab_size, "logp": logp, "ref_logp": ref_logp, "length": length, "i": i}
    exec(snippet, names)
    assert (logp.grad[:, 0] < 0).all() and (logp.grad[:, 1] > 0).all()
    assert names["index"].shape == names["weight"].shape == (32,) and names["outcome"].loss.shape == (8,)
    assert names["weight"].mean().item() == pytest.approx(1, abs=1e-6)

    lines = [line.strip() for line in snippet.splitlines()]
    readme = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
    assert lines[0] in readme, "README.md lacks the snippet"
    at = readme.index(lines[0])
    assert readme[at:at + len(lines)] == lines
