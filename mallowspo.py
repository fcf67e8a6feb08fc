"""MallowsPO: preference optimisation with a dispersion index (arXiv 2405.14953, ICLR 2025).  Every formula.

People agree on some prompts ("1 + 1 = ?") and disagree on others ("the best pizza?").  A Mallows ranking
model puts that into one number per prompt x, the dispersion phi(x) in (0, 1]: near 0 everybody agrees, at 1 the
ranking is a coin toss.  MallowsPO is DPO that knows this number.  With lam(x) = -log phi(x) >= 0,

    r(y) = |y|^-eta * sum_t a_t * (log pi(y_t) - alpha * log ref(y_t))      implicit reward of response y, over beta
    h    = beta * (r(chosen) - T(r(rejected)) - margin) + b * (|chosen| - |rejected|)
    loss = mu * L(h; lam(x))  +  likelihood terms                           L = -log g, g: a person agrees (see LINKS)

where |y| counts the scored tokens, the end token too.  A method is a row of settings of these three lines (the table
LOSSES); what a row does not set is neutral: token weights a_t = 1, T the identity, mu = 1, all else 0.  The link g of
MallowsPO-theta (Spearman's rho) is DPO's sigmoid with beta scaled per pair, that of MallowsPO-phi (Kendall's tau) is
curved; theta and phi are the paper's names.  A link without lam (DPO's, IPO's) takes weight(x) * h in place of h, so
dispersion plugs into any row; DPO with it is MallowsPO-theta.  Where lam comes from, pair by pair:

    entropy of the reference -> index H, a stand-in for phi -> weight = phi_star * -log H, mean 1 -> lam = c * weight

(phi_star is a scale, not a phi; c is 1/2 for theta, 1 for phi: the loss uses phi = H^(c * phi_star).)  How far H may
be trusted can be learned from the pairs themselves, see fit_trust.  In a training loop of your own:

  from mallowspo import LOSSES, calibrate_phi_star, dispersion_index, dispersion_weight, objective

  # Once, over the P training pairs.  entropy: (P, 2) nats, the mean over the scored tokens of each response of the
  # reference's next-token entropy, torch.special.entr(logits.float().softmax(-1)).sum(-1).
  index = dispersion_index(entropy, vocab_size)                  # (P,) near 0: people agree, 1: a coin toss
  weight = dispersion_weight(index, calibrate_phi_star(index))   # (P,) mean 1; all 1: no dispersion

  # In every step, for the pairs i of the batch.  logp: (B, 2) the policy's log-probability of the chosen and of the
  # rejected response, summed over its tokens; ref_logp: (P, 2) the reference's; length: (P, 2) how many tokens.
  outcome = objective(LOSSES["mallows-theta"], logp, ref_logp[i], length[i], weight[i])
  outcome.loss.mean().backward()
  print(outcome.accuracy.mean(), outcome.margin.mean())

(Rows with token weights, an advantage or several references need more than this: see objective and section 2.)

    python mallowspo.py             prints what the dispersion does to the loss

The file: 1. the objective -> 2. its terms that have a formula of their own -> 3. the dispersion index and weight ->
4. the links g (the ranking models behind them are in bandit.py).  Functions on tensors; the loss is float32 of
float32, float64 of float64.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------------------------------------
# 1. The objective: a table of methods, and one function.

class Method(NamedTuple):
    """One row of settings of the equation at the top; every column but the link is also a flag of train.py, and
    LOSSES["dpo"]._replace(beta=0.05) changes one.  (objective takes the weights: it does not look at `dispersion`.)"""
    link: str | None              # a name of LINKS; None: no preference term
    dispersion: str = "constant"  # source of the weight: "constant" (1), "entropy", or a field of the record
    beta: float = 0.1             # scale of h: the larger, the nearer to the reference the policy stays
    alpha: float = 1.0            # share of the reference in the reward; 0 is reference-free
    eta: float = 0.0              # 1 divides the log-ratio by the response's length
    margin: float = 0.0           # what r(chosen) must lead by, in units of r
    sft: float = 0.0              # weight of the chosen response's negative log-likelihood per token
    token_weights: str = "equal"  # a_t: "equal" (1), or a name of TOKEN_WEIGHTS
    token_decay: float = 0.98     # of "decay": a token's weight, as a share of that of the token before
    token_cap: float = 2.0        # of "difference": the most that is added to a token's weight
    clip_rejected: bool = False   # T = max(0, .): no more push once the rejected one is below the reference
    length_term: float = 0.0      # b: what a longer chosen response is ahead by, per token
    smoothing: float = 0.0        # share of the labels held to be wrong
    unbiased: bool = False        # of smoothing: correct for the wrong labels instead of fitting them
    focal: float = 0.0            # mu = g^focal: less weight to pairs that the policy gets wrong
    focal_gradient: bool = False  # of focal: the gradient passes through mu too
    advantage: float = 0.0        # weight of a likelihood of both responses, by the record's "rewards"
    advantage_beta: float = 1.0   # of advantage: so much above the mean reward weighs e times more
    reference_mix: str = "adaptive"     # of several references: weights by how sure each is, or "equal"
    reference_clip: float = 0.1   # of several references: how far log ref may be from the first's, as a share


# Columns that say how another one, or one of its values, works: without it they have no meaning.
PARTS = {"token_decay": "token_weights decay", "token_cap": "token_weights difference", "unbiased": "smoothing",
         "focal_gradient": "focal", "advantage_beta": "advantage"}

LOSSES = {
    # The papers stand beside the LINKS, or here by arXiv number.  Defaults are the authors' where they are known;
    # r-dpo's length_term is from SamPO's code, and those of focalpo and hpo are guesses.  IPO averages over tokens, as
    # its authors confirmed; the hinge keeps the reference, as in TRL; RainbowPO's margin is (1 - alpha) * 0.1.  (ORPO
    # is missing: its log p - log(1 - p) is no difference of log-probabilities.)
    "dpo":           Method("sigmoid"),
    "cdpo":          Method("sigmoid", smoothing=0.1),                                  # Mitchell 2023, a note
    "robust":        Method("sigmoid", smoothing=0.1, unbiased=True),                   # 2403.00409
    "ipo":           Method("square", eta=1.0),
    "hinge":         Method("hinge"),
    "exo":           Method("exo"),
    "dpo-norm":      Method("sigmoid", beta=10.0, eta=1.0),
    "simpo":         Method("sigmoid", beta=10.0, alpha=0.0, eta=1.0, margin=0.3),      # 2405.14734, Eq. 6
    "cpo":           Method("sigmoid", alpha=0.0, sft=1.0),                             # 2401.08417
    "r-dpo":         Method("sigmoid", length_term=0.01),                               # 2403.19159
    "rainbowpo":     Method("sigmoid", "entropy", beta=10.0, alpha=0.25, eta=1.0, margin=0.075),    # 2410.04203
    "decay-dpo":     Method("sigmoid", token_weights="decay"),                          # 2502.14340
    "focalpo":       Method("sigmoid", focal=0.05),                                     # 2501.06645
    "minor-dpo":     Method("sigmoid", clip_rejected=True),                             # 2408.09834
    "bmc":           Method("sigmoid", beta=0.01, token_weights="difference"),          # 2408.07471, its loss
    "sampo":         Method("sigmoid", token_weights="sample"),                         # 2406.10957
    "hpo":           Method("sigmoid", advantage=0.1),                                  # 2405.17956
    "mrpo":          Method("sigmoid"),                                                 # 2405.16388, --references
    "mallows-theta": Method("mallows-theta", "entropy"),
    "mallows-phi":   Method("mallows-phi", "entropy"),
    "mallows-ipo":   Method("square", "entropy", eta=1.0),
    "mallows-simpo": Method("sigmoid", "entropy", beta=10.0, alpha=0.0, eta=1.0, margin=0.3),
    "sft":           Method(None, alpha=0.0, sft=1.0),
}


class Outcome(NamedTuple):
    """What the objective says of each pair; every field is (B,).  Only the loss carries a gradient."""
    loss: Tensor
    accuracy: Tensor           # 1 where the chosen reward is the higher, 1/2 where they tie (of sft: no meaning)
    margin: Tensor             # chosen_reward - rejected_reward: without T, b, the margin of Method and dispersion
    chosen_reward: Tensor      # beta * r(chosen), nats
    rejected_reward: Tensor
    chosen_logp: Tensor        # the policy's log-probability, mean over the tokens, nats
    rejected_logp: Tensor


def objective(method: Method, logp: Tensor, ref_logp: Tensor, length: Tensor, weight: Tensor,
              plain: Tensor | None = None, advantage: Tensor | None = None) -> Outcome:
    """The loss of each pair, and what to report of it.

    logp, ref_logp: (B, 2) log-probability (nats) of the chosen and the rejected response under policy and
    reference, summed over its tokens;  length: (B, 2) how many tokens those are (0 for a missing response, as
    sft allows);  weight: (B,) of the pairs, without gradient.  Float32 or float64.  With token weights, logp and
    ref_logp are sums of a_t * log-probability (see token_weights), and plain is the policy's sum without a_t, for the
    likelihood terms.  advantage: (B, 2) see advantages; rows with that term need it."""
    plain = logp if plain is None else plain
    count = length.to(logp.dtype).clamp(min=1)
    reward = (logp - method.alpha * ref_logp) / count ** method.eta                     # (B, 2)
    nll = -plain / count                                                                # (B, 2) per token
    loss = method.sft * nll[:, 0]                                                       # (B,)
    if method.advantage:
        loss = loss + method.advantage * (advantage_factor(advantage, method) * nll).mean(-1)
    if method.link is not None:
        chosen, rejected = reward[:, 0], reward[:, 1]
        if method.clip_rejected:
            rejected = rejected.clamp(min=0)        # at 0, where training starts, its gradient passes: as in DPO
        h = method.beta * (chosen - rejected - method.margin)                           # (B,)
        if method.length_term:
            h = h + method.length_term * (count[:, 0] - count[:, 1])
        if method.link not in LAM_OF_WEIGHT:
            h = weight * h                   # a link that ignores lam: MallowsPO as a plug-in
        loss = loss + preference_loss(method, h, lam_of(method, weight))

    reward = method.beta * reward.detach()                                              # (B, 2)
    margin = reward[:, 0] - reward[:, 1]
    accuracy = (margin.sign() + 1) / 2
    nll = nll.detach()
    return Outcome(loss, accuracy, margin, reward[:, 0], reward[:, 1], -nll[:, 0], -nll[:, 1])


def preference_loss(method: Method, h: Tensor, lam: Tensor) -> Tensor:
    """mu * -log g(h; lam), with some of the labels held to be wrong; elementwise.

    Smoothing by e: (1 - e) L(h) + e L(-h) is the mean loss of somebody who errs so often (cDPO), and
    ((1 - e) L(h) - e L(-h)) / (1 - 2 e) has, over such labels, the mean of the loss without errors (robust)."""
    right = LINKS[method.link](h, lam)
    loss = right
    if method.smoothing:
        wrong_share = method.smoothing
        if method.unbiased:
            wrong_share = -method.smoothing / (1 - 2 * method.smoothing)
        loss = (1 - wrong_share) * right + wrong_share * LINKS[method.link](-h, lam)
    if method.focal:
        factor = torch.exp(-method.focal * right)                                       # g^focal
        # With its gradient, a pair with g < e^(-1 / focal) is unlearned: at the start, every one if focal > 1.44.
        loss = (factor if method.focal_gradient else factor.detach()) * loss
    return loss


# ------------------------------------------------------------------------------------------------------------
# 2. Terms that have a formula of their own.

TOKEN_WEIGHTS = {
    # (method, logp (N,) of the tokens under the policy, place (N,) in the response from 0, mask (N,)) -> a_t (N,)
    "decay": lambda method, logp, place, mask: method.token_decay ** place.to(logp.dtype),
    "sample": lambda method, logp, place, mask: mask.to(logp.dtype),
    "difference": lambda method, logp, place, mask: 1 + mask * torch.exp(-logp).clamp(max=method.token_cap),
}


def token_weights(method: Method, logp: Tensor, place: Tensor, mask: Tensor) -> Tensor:
    """(N,) weights a_t of response tokens, the same for policy and reference, without gradient.

    "decay" (2502.14340): earlier tokens count more.  "sample" (SamPO): mask has as many tokens of the longer
    response, drawn at random, as the shorter one has.  "difference" (BMC): tokens that the other response lacks
    (mask) count 1 + min(1 / pi, cap), with the policy's pi for the reference too (the authors' code takes its own)."""
    return TOKEN_WEIGHTS[method.token_weights](method, logp.detach(), place, mask)


def advantages(rewards: Tensor) -> Tensor:
    """(P, 2) rewards of both responses -> (P, 2) how much better each is than their mean.  The mean stands in for HPO's
    value head, which would be a second network."""
    rewards = rewards.double()
    return rewards - rewards.mean(-1, keepdim=True)


def advantage_factor(advantage: Tensor, method: Method) -> Tensor:
    """exp(A / beta'), the weight of a response's likelihood in HPO; 20 at most, as is usual for such weights."""
    return torch.exp((advantage / method.advantage_beta).clamp(max=math.log(20)))


def mixed_reference(method: Method, logps: Tensor) -> Tensor:
    """(K, P, 2) log-probabilities of both responses under K references -> (P, 2) under their harmonic mean (MRPO).

    1 / sum_k (share_k / ref_k), where the log-probabilities of each further reference are first clipped to (1 -+ eps)
    times those of the first.  eps = reference_clip is split between chosen and rejected in proportion to the mean
    log-probability; adaptive shares follow |log ref_k(chosen) - log ref_k(rejected)|."""
    logps = logps.double()
    size = logps.mean(0).abs()                                                          # (P, 2)
    eps = method.reference_clip * size / size.sum(-1, keepdim=True).clamp(min=1e-30)
    near = logps.clamp((1 + eps) * logps[0], (1 - eps) * logps[0])                      # (K, P, 2), below 0
    sure = torch.ones_like(logps[..., 0])                                               # (K, P)
    if method.reference_mix == "adaptive":
        sure = logps.diff(dim=-1)[..., 0].abs().clamp(min=1e-30)
    share = (sure / sure.sum(0))[..., None]                                             # (K, P, 1)
    return logps[0] - (share.log() + logps[0] - near).logsumexp(0)


# ------------------------------------------------------------------------------------------------------------
# 3. The dispersion index H(x): how much people disagree about x, guessed from how undecided the reference is.

INDEX_RANGE = (1e-4, 1 - 1e-4)      # -log has a pole at 0, and a weight of 0 drops the pair


def dispersion_index(entropy: Tensor, vocab_size: int) -> Tensor:
    """(P, 2) mean next-token entropies (nats) of the reference over each response -> (P,) index H(x) in [0, 1].

    The mean of the two, divided by log(vocab_size), as in the authors' code (as printed, in MallowsPO Eq. 13-14,
    it sums over tokens and leaves [0, 1]).  H stands in for phi(x): 0 is agreement, 1 is a coin toss."""
    return entropy.mean(-1) / math.log(vocab_size)


def dispersion_weight(index: Tensor, phi_star: float, power: float = 1.0) -> Tensor:
    """weight(x) = phi_star * (-log H(x))^power: large where people agree, near 0 where they do not.

    index: any shape, H(x) or a known phi(x); clamped to INDEX_RANGE.  MallowsPO (Eq. 13-14) is power = 1.  Other powers
    are ours: a smaller one trusts a noisy index less (0 ignores it), a larger one spreads a timid index (fit_trust)."""
    return phi_star * (-index.clamp(*INDEX_RANGE).log()) ** power


def calibrate_phi_star(index: Tensor, power: float = 1.0) -> float:
    """The phi_star that makes the mean weight over these prompts 1, so that beta means what it means in DPO.

    The authors' code has 0.29 here, which is this number for one model and one data set."""
    return 1 / dispersion_weight(index.double(), 1.0, power).mean().item()


def count_clamped(index: Tensor) -> int:
    """How many of the indices lie outside INDEX_RANGE."""
    low, high = INDEX_RANGE
    return int(((index < low) | (index > high)).sum())


def phi_of_scores(scores: Tensor, training: Tensor) -> Tensor:
    """(P, 2) ratings of the chosen and of the rejected response by a judge -> (P,) phi = exp(-|gap| / usual gap).

    Ours, by Bradley and Terry: the log-odds that a person agrees with another are proportional to the gap, whichever
    response it favours.  The unit of a rating is arbitrary: training (Q, 2) sets the usual gap, the mean of its own."""
    usual = training.double().diff(dim=-1).abs().mean().clamp(min=1e-30)
    return torch.exp(-scores.double().diff(dim=-1)[..., 0].abs() / usual)


class Trust(NamedTuple):
    """How far the pairs bear an index out; the field names are those of the model in fit_trust."""
    kappa: float               # the power of -log H that fits them; 0: the index says nothing, below: the opposite
    se: float                  # standard error of kappa; 1 is the prior's, with nothing learned
    c: float                   # log of those log-odds for a typical pair


TRUST_PRIOR = (2.0, 1.0)       # standard deviations of c and of kappa around 0
POWERS = (0.0, 8.0)            # what a learned power is clipped to


def fit_trust(agrees: Tensor, index: Tensor) -> Trust:
    """How far the index may be trusted, by the pairs themselves: maximum a posteriori of

        P(agrees) = sigmoid(exp(c + kappa * x)),    x = log(-log H), centred over the pairs

    agrees: (P,) 1 where the policy's margin had the right sign before the pair was trained on, else 0;  index: (P,) H,
    as for dispersion_weight.  Ties (1/2) and pairs whose index is nan are left out.

    Ours.  A policy that has learned something is right more often where people agree, so its log-odds of being right
    are a measure of lam, and the model says that lam is proportional to a power of -log H: (-log H)^kappa.  Kappa is
    the power to give to dispersion_weight, clipped to POWERS: an index that says nothing ends near 0, which is DPO.
    Its limits: a prompt that the policy has not learned yet looks like one on which people disagree; few pairs weigh
    less than the prior (TRUST_PRIOR); and the standard error takes pairs for independent, so it is too small where
    many pairs share few prompts.  Newton's method with the expected curvature, halved until it gains."""
    x = (-index.double().cpu().clamp(*INDEX_RANGE).log()).log()
    agrees = agrees.double().cpu()
    counts = (agrees != 0.5) & ~x.isnan()
    agrees, x = agrees[counts], x[counts]                                               # (P,)
    if len(x):
        x = x - x.mean()
    design = torch.stack([torch.ones_like(x), x], 1)                                    # (P, 2)
    precision = torch.tensor(TRUST_PRIOR, dtype=torch.float64).square().reciprocal()    # (2,)

    def look(at: Tensor) -> tuple[Tensor, Tensor]:
        """At (c, kappa): the log-odds of the pairs (P,), which stand for lam, and minus the log-posterior."""
        lam = (design @ at).clamp(max=50).exp()
        return lam, (F.softplus(lam) - agrees * lam).sum() + (precision * at * at).sum() / 2

    at = torch.zeros(2, dtype=torch.float64)
    lam, value = look(at)
    for _ in range(100):
        right = torch.sigmoid(lam)
        gradient = design.T @ ((right - agrees) * lam) + precision * at
        curvature = design.T @ ((right * torch.sigmoid(-lam) * lam ** 2)[:, None] * design) + torch.diag(precision)
        move = torch.linalg.solve(curvature, gradient)
        if gradient @ move < 1e-12:
            break
        for _ in range(60):
            there, least = look(at - move)
            if least <= value:
                at, lam, value = at - move, there, least
                break
            move = move / 2
    se = torch.linalg.inv(curvature)[1, 1].sqrt()
    return Trust(at[1].item(), se.item(), at[0].item())


def accuracy_by_quartile(agrees: Tensor, index: Tensor) -> list[float | None]:
    """Share of pairs that agree (see fit_trust) in each quarter of them, from the one where the index sees most
    disagreement to the one where it sees least; None for a quarter without pairs."""
    known = agrees[~index.isnan()].double().cpu()
    order = index[~index.isnan()].cpu().argsort(descending=True, stable=True)
    return [part.mean().item() if len(part) else None for part in known[order].tensor_split(4)]


# The links that take lam, and what a weight of 1 is in lam: beta then means what it means in DPO (the slope of
# the logit at h = 0 is about 1).  For the other links the weight multiplies h (see objective).
LAM_OF_WEIGHT = {"mallows-theta": 0.5, "mallows-phi": 1.0}


def lam_of(method: Method, weight: Tensor) -> Tensor:
    """lam(x) = -log phi(x) that a weight stands for under this method (of links without lam: 1/2, as for theta)."""
    return LAM_OF_WEIGHT.get(method.link, 0.5) * weight


def lam_of_votes(votes: Tensor) -> Tensor:
    """(..., 2) people for the chosen and for the rejected response -> (...,) lam: its mean, given the votes.

    Ours.  The two are taken for neighbours in the ranking, so that a person votes for the chosen one with probability
    1 / (1 + phi) = sigmoid(lam); the prior on phi is uniform from 0 to 1.  Votes of 1 : 0 give a lam of 1.19,
    3 : 0 give 1.59 and 2 : 1 give 0.77."""
    lam = (torch.arange(8192, dtype=torch.float64) + 0.5) / 200                         # 0 to 41, midpoints
    kinds, place = votes.double().cpu().reshape(-1, 2).unique(dim=0, return_inverse=True)
    people, against = kinds.sum(-1, keepdim=True), kinds[:, 1:]                         # (kinds, 1)
    log_density = people * F.logsigmoid(lam) - (against + 1) * lam                      # d phi = -phi d lam
    return (log_density.softmax(-1) @ lam)[place].view(votes.shape[:-1]).to(votes.device)


# ------------------------------------------------------------------------------------------------------------
# 4. The links.  LINKS[name](h, lam) is the loss of one pair: -log g(h; lam), where g is a probability (g itself
#    underflows where the loss is large).  Element by element, shapes broadcast.

LINKS = {
    "sigmoid":       lambda h, lam: -F.logsigmoid(h),                      # DPO: arXiv 2305.18290, Eq. 7
    "mallows-theta": lambda h, lam: -F.logsigmoid(2 * lam * h),            # Spearman's rho: MallowsPO, Eq. 12
    "mallows-phi":   lambda h, lam: -F.logsigmoid(kendall_logit(h, lam)),  # Kendall's tau: MallowsPO, Eq. 11
    "square":        lambda h, lam: (h - 0.5) ** 2,                        # IPO: 2310.12036, Eq. 17, * beta^2
    "hinge":         lambda h, lam: F.relu(1 - h),                         # SLiC-HF: arXiv 2305.10425
    "exo":           lambda h, lam: exo_divergence(h),                     # EXO: arXiv 2402.00856
}
BRIDGE = 1.0    # half-width of the bridge over the Kendall link's jump at h = 0; up to 1, g is exact at integer h


def exo_divergence(h: Tensor, e: float = 1e-3) -> Tensor:
    """KL of the policy's choice (q, 1 - q), q = sigmoid(h), from a label's (1 - e, e): DPO's KL is the other way."""
    log_q, log_not = F.logsigmoid(h), F.logsigmoid(-h)
    return log_q.exp() * (log_q - math.log1p(-e)) + log_not.exp() * (log_not - math.log(e))


def kendall_logit(h: Tensor, lam: Tensor) -> Tensor:
    """logit g(h; lam) of the Kendall link (MallowsPO, Eq. 11), a pair probability of Kendall's model:

        g(h) = (h+1) / (1 - phi^(h+1)) - h / (1 - phi^h)   for h > 0,    g(-h) = 1 - g(h),    phi = exp(-lam)

    Two things are ours.  *The bridge*: as printed, g jumps at h = 0, where every training run starts (the paper's
    remedy could not be found).  With G(x) = x / (1 - e^-x), g(h) is the mean slope of G over the window
    lam * [h, h+1], for h < 0 over lam * [h-1, h]: at h = 0 the window's centre jumps from -1/2 to 1/2 (times lam).
    Ours slides there, smoothly and monotonically, from h - 1/2 at h = -1 to h + 1/2 at h = 1.
    *The arithmetic*: as printed, g is 0/0 at small lam or h and cancels for h < 0; what follows equals it where
    |h| >= 1, to rounding, in value and gradient, for lam in [0, 30] and |h| up to 1e4.  The slope at h = 0 is 1.0
    to 1.17 lam for lam up to 4.5, less beyond."""
    dtype = torch.promote_types(torch.promote_types(h.dtype, lam.dtype), torch.float32)
    h, lam = torch.broadcast_tensors(h.to(dtype), lam.to(dtype).clamp(max=80.0))        # e^-80: certainty
    x = (h / BRIDGE).clamp(-1, 1)
    centre = h + (3 * x - x ** 3) / 4                       # h - 1/2 ... h + 1/2
    # Training starts at centre = 0.  There abs() has the gradient 0, and nothing would be learned.
    a = torch.where(centre < 0, -centre, centre) - 0.5      # the window [a, a + 1], mirrored to a centre >= 0
    # Each form sees harmless input where the other one is used: an infinite gradient, times 0, would be nan.
    series = lam * (a + 1) < 0.9
    near = _logit_series(torch.where(series, a, 0.0), torch.where(series, lam, 0.0))
    far = _logit_closed(torch.where(series, 1.0, a), torch.where(series, 1.0, lam))
    logit = torch.where(series, near, far)
    return torch.where(centre < 0, -logit, logit)


def _logit_closed(a: Tensor, lam: Tensor) -> Tensor:
    """log g - log(1 - g) over the window [a, a + 1], for lam * (a + 1) >= 0.9: far enough from 0/0."""
    z, phi = lam * a, torch.exp(-lam)
    slope = lam * _mean_decay(z)                            # (1 - phi^a) / a
    rest = -torch.expm1(-lam)                               # 1 - phi
    return z + torch.log(slope - rest * torch.exp(-z)) - torch.log(rest - phi * slope)


def _mean_decay(z: Tensor) -> Tensor:
    """(1 - e^-z) / z, the mean of e^-t over [0, z]; near 0, where its gradient cancels, a Taylor series."""
    small = z.abs() < 0.5
    near, far = torch.where(small, z, 0.0), torch.where(small, 1.0, z)
    taylor = torch.zeros_like(z)
    for k in range(16, -1, -1):
        taylor = taylor * -near + 1 / math.factorial(k + 1)
    return torch.where(small, taylor, -torch.expm1(-far) / far)


# B_2k / (2k)!, the even Taylor coefficients of G(x) = x / (1 - e^-x) = 1 + x/2 + x^2/12 - x^4/720 + ...
G_SERIES = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160, -691 / 1307674368000, 1 / 74724249600,
            -3617 / 10670622842880000, 43867 / 5109094217170944000, -174611 / 802857662698291200000)


def _logit_series(a: Tensor, lam: Tensor) -> Tensor:
    """The same for lam * (a + 1) < 0.9, where g is 1/2 and a little: the mean slope of G, term by term."""
    x, y = lam * (a + 1), lam * a
    p, q = x * x, y * y
    excess, term = torch.zeros_like(p), torch.ones_like(p)
    power = torch.ones_like(p)
    for coefficient in G_SERIES:                            # term = (p^k - q^k) / (p - q), power = q^k
        excess = excess + coefficient * term
        power = power * q
        term = term * p + power
    excess = excess * (x + y)                               # g - 1/2
    return torch.log1p(2 * excess) - torch.log1p(-2 * excess)


def pair_probability(gap: Tensor, lam: Tensor) -> Tensor:
    """P(a person ranks item i above item j) when the centre puts i `gap` places above j (negative: below).

    Exact at every integer gap, for any number of items.  The loss of MallowsPO-phi is -log of it, h the gap.
    """
    return torch.sigmoid(kendall_logit(gap, lam))


def main():
    """Print what the dispersion does to the loss and to its slope."""
    gaps = torch.tensor([-4.0, -1.0, 0.0, 1.0, 4.0])

    def show(link: str, lam: float, dispersion: str) -> None:
        h = gaps.clone().requires_grad_()
        loss = LINKS[link](h, torch.tensor(lam))
        slope, = torch.autograd.grad(loss.sum(), h)
        cells = [f"{value:7.3f} ({grad:+.2f})" for value, grad in zip(loss.tolist(), slope.tolist())]
        print(f"{link:<13} {dispersion:<11} | " + "".join(cells))

    print("The loss of a pair, and its slope in h = beta * (log-ratio chosen - rejected), of DPO and of MallowsPO at")
    print("dispersion phi (1: a coin toss, near 0: all agree).\n")
    print("loss          phi    lam  | " + "".join(f"   h = {h:+.0f}      " for h in gaps))
    show("sigmoid", 0.5, "")
    for link in ("mallows-theta", "mallows-phi"):
        print()
        for phi in (0.05, 0.2, 0.5, 0.8, 0.95):
            show(link, -math.log(phi), f"{phi:<4} {-math.log(phi):<6.3f}")
    print("\nWhere people agree, a pair that the policy gets wrong pulls hard; where they do not, hardly at all.")


if __name__ == "__main__":
    main()
