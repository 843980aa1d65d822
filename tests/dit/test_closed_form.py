"""Objectives and samplers against what is known exactly: Gaussian and Gaussian-mixture data.

For such data E[x_0 | x_t] has a closed form. Every objective must have it as its minimum, every sampler
must turn it back into the data, and on one-dimensional data the flow itself is known: it carries
each quantile along.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dit.objective import DDPM, FlowMatching, weights
from dit.samplers import dpmpp_2m, euler, heun, midpoint, run_sampler, unipc


@dataclass(frozen=True)
class Mixture:
    """share (k,), mean (k c), covariance (k c c), all float64; every position of a clip is a draw."""

    share: Tensor
    mean: Tensor
    covariance: Tensor

    def draw(self, shape, generator):
        """Clips (b c f h w)."""
        b, c, *rest = shape
        count = b * math.prod(rest)
        which = torch.multinomial(self.share, count, replacement=True, generator=generator)
        normal = torch.randn(count, c, dtype=torch.float64, generator=generator)
        root = torch.linalg.cholesky(self.covariance)
        x = self.mean[which] + torch.einsum("nij,nj->ni", root[which], normal)
        return x.view(b, *rest, c).movedim(-1, 1).float()

    def ends(self, objective, x_t, t):
        """E[x_0 | x_t] and E[noise | x_t], like x_t: Bayes' rule for every part of the mixture."""
        alpha, sigma = (w.double().view(-1, 1, 1, 1) for w in objective.alpha_sigma(t))
        x = x_t.double().movedim(1, -1)
        odds, x_0, noise = [], [], []
        for share, mean, covariance in zip(self.share, self.mean, self.covariance):
            b = len(alpha)
            a, s = alpha.view(b, 1, 1), sigma.view(b, 1, 1)
            spread = a**2 * covariance + s**2 * torch.eye(len(mean), dtype=torch.float64)
            off = x - alpha[..., None] * mean
            white = torch.einsum("bij,bfhwj->bfhwi", torch.linalg.inv(spread), off)
            odds.append(
                share.log() - spread.logdet().view(b, 1, 1, 1) / 2 - (off * white).sum(-1) / 2
            )
            x_0.append(mean + alpha[..., None] * white @ covariance)
            noise.append(sigma[..., None] * white)
        part = torch.stack(odds).softmax(0)[..., None]
        both = ((part * torch.stack(values)).sum(0).movedim(-1, 1) for values in (x_0, noise))
        return tuple(value.to(x_t.dtype) for value in both)

    def best(self, objective):
        """The denoiser with the least error there is."""

        def denoise(x, t):
            alpha, sigma = (w.view(-1, 1, 1, 1, 1) for w in objective.alpha_sigma(t))
            p, q = weights(objective.prediction, alpha, sigma)
            x_0, noise = self.ends(objective, x, t)
            return p * x_0 + q * noise

        return denoise

    def moments(self):
        mean = self.share @ self.mean
        off = self.mean - mean
        between = torch.einsum("k,ki,kj->ij", self.share, off, off)
        return mean, between + torch.einsum("k,kij->ij", self.share, self.covariance)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


GAUSSIAN = Mixture(f64([1.0]), f64([[1.5, -0.5]]), f64([[[0.5, 0.3], [0.3, 0.4]]]))
MIXTURE = Mixture(
    f64([0.3, 0.7]),
    f64([[-1.5, 0.5], [1.0, -0.5]]),
    f64([[[0.2, -0.1], [-0.1, 0.3]], [[0.3, 0.2], [0.2, 0.25]]]),
)
DATA = pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])

OBJECTIVES = [
    FlowMatching(),
    FlowMatching(prediction="x_0", weighting="cosmap"),
    FlowMatching(t_distribution="uniform", weighting="logit_normal"),
    FlowMatching(t_distribution="mode", weighting="sigma_sqrt"),
    *(
        DDPM(prediction=prediction, schedule=schedule)
        for prediction in ("noise", "v", "x_0")
        for schedule in ("cosine", "linear", "scaled_linear")
    ),
    DDPM(prediction="noise", min_snr_gamma=5.0),
    DDPM(prediction="v", schedule="linear", zero_terminal_snr=True, min_snr_gamma=5.0),
    DDPM(prediction="x_0", schedule="scaled_linear", zero_terminal_snr=True),
]


def label(objective):
    extras = [
        str(value) for key, value in objective.model_dump(exclude_defaults=True).items() if value
    ]
    return "-".join([objective.kind, objective.prediction, *extras])


def slopes(objective, pred, x_0, noise, x_t, t):
    """How the loss changes along six directions of the prediction: mean and standard error (12,)."""
    pred = pred.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective.loss(pred, x_0, noise, t).sum(), pred)
    first, second = x_t[:, :1], x_t[:, 1:]
    ones = torch.ones_like(first)
    directions = (
        ones,
        first,
        second,
        torch.tanh(2 * first),
        torch.tanh(2 * second),
        first * second,
    )
    products = torch.cat([gradient * d for d in directions], 1).movedim(1, 0).flatten(1).double()
    return products.mean(1), products.std(1) / math.sqrt(products.shape[1])


@DATA
@pytest.mark.parametrize("objective", OBJECTIVES, ids=label)
def test_the_best_prediction_is_the_minimum_of_the_loss(objective, data):
    """On 40,000 draws: no slope at the optimum, within 5 standard errors, and one next to it."""
    g = torch.Generator().manual_seed(0)
    shape = (4, 2, 4, 50, 50)
    for level in (0.1, 0.5, 0.9):
        t = torch.full((4,), level)
        x_0, noise = data.draw(shape, g), torch.randn(shape, generator=g)
        x_t = objective.add_noise(x_0, noise, t)
        pred = data.best(objective)(x_t, t)
        mean, error = slopes(objective, pred, x_0, noise, x_t, t)
        assert (error > 0).all()
        assert (mean.abs() < 5 * error).all()
        mean, error = slopes(objective, pred + 0.2 * pred.std(), x_0, noise, x_t, t)
        assert (mean[:2] > 5 * error[:2]).all()  # along the constant direction of both channels
        at_best = objective.loss(pred, x_0, noise, t).mean()
        for wrong in (pred + 0.1 * pred.std(), 0.9 * pred, pred + 0.1 * x_t):
            assert objective.loss(wrong, x_0, noise, t).mean() > at_best


@pytest.mark.parametrize("objective", OBJECTIVES, ids=label)
def test_least_squares_finds_the_best_prediction(objective):
    """For Gaussian data it is affine in x_t: a regression of the target is within 3% of it."""
    g = torch.Generator().manual_seed(1)
    shape = (4, 2, 4, 50, 50)
    for level in (0.1, 0.5, 0.9):
        t = torch.full((4,), level)
        x_0, noise = GAUSSIAN.draw(shape, g), torch.randn(shape, generator=g)
        x_t = objective.add_noise(x_0, noise, t)
        rows = torch.cat([x_t, torch.ones_like(x_t[:, :1])], 1).movedim(1, -1).reshape(-1, 3)
        target = objective.target(x_0, noise, t).movedim(1, -1).reshape(-1, 2)
        fitted = rows @ torch.linalg.lstsq(rows, target).solution
        best = GAUSSIAN.best(objective)(x_t, t).movedim(1, -1).reshape(-1, 2)
        assert best.std() > 0.2
        assert (fitted - best).square().mean().sqrt() < 0.03 * best.square().mean().sqrt()


FLOW_X_0 = FlowMatching(prediction="x_0")
# At t = 1 it still shows 7% of the data, so its samplers start from that and not from noise alone.
STAYS_VISIBLE = DDPM(prediction="x_0", schedule="scaled_linear")
RUNS = [
    ("euler", FlowMatching(), 400),
    ("heun", FlowMatching(shift=3.0), 60),
    ("heun", FLOW_X_0, 60),
    ("midpoint", FLOW_X_0, 60),
    ("midpoint", FlowMatching(), 60),
    ("dpmpp_2m", FlowMatching(shift=3.0), 100),
    ("dpmpp_2m", FLOW_X_0, 100),
    ("unipc", FlowMatching(), 100),
    ("unipc", FLOW_X_0, 100),
    *(
        (name, DDPM(prediction=prediction, schedule=schedule), num_steps)
        for prediction, schedule in (("noise", "linear"), ("v", "cosine"), ("x_0", "scaled_linear"))
        for name, num_steps in (("ddim", 400), ("dpmpp_2m", 200), ("ancestral", 500))
    ),
    ("ddim", DDPM(prediction="v", schedule="scaled_linear", zero_terminal_snr=True), 400),
    ("dpmpp_2m", DDPM(prediction="v", schedule="linear", zero_terminal_snr=True), 200),
]


def moment_errors(points, data):
    """How far mean (2,) and covariance (2 2) of points (n 2) are off, and 5 standard errors of each."""
    mean, covariance = data.moments()
    off = points - mean
    products = torch.einsum("ni,nj->nij", off, off)
    for values, expected in ((points, mean), (products, covariance)):
        error = values.std(0) / math.sqrt(len(points))
        yield (values.mean(0) - expected).abs(), 5 * error


def in_first_part(points, data):
    return ((points - data.mean[0]).norm(dim=1) < (points - data.mean[1]).norm(dim=1)).double()


def as_points(x):
    return x.movedim(1, -1).reshape(-1, 2).double()


@DATA
@pytest.mark.parametrize(
    ("name", "objective", "num_steps"), RUNS, ids=[f"{n}-{label(o)}" for n, o, _ in RUNS]
)
def test_samplers_give_the_data_distribution(name, objective, num_steps, data):
    """Mean and covariance of 16,384 draws within 5 standard errors and 0.01 for the grid; for the
    mixture also the share of draws nearest to each part."""
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    shape, g = (2, 4, 32, 32), torch.Generator().manual_seed(9)
    drawn, noise = data.draw((4, *shape), g), torch.randn(4, *shape, generator=g)
    if objective == STAYS_VISIBLE:
        noise = objective.add_noise(drawn, noise, torch.ones(4))
    x = run_sampler(
        name, data.best(objective), generators, shape, num_steps, objective, noise=noise
    )
    points = as_points(x)
    for off, five_errors in moment_errors(points, data):
        assert (off < five_errors + 0.01).all()
    if data is MIXTURE:
        share = in_first_part(points, data).mean() - in_first_part(as_points(drawn), data).mean()
        assert share.abs() < 5 * math.sqrt(2 * 0.21 / len(points))


def test_zero_terminal_snr_mends_the_start():
    """The scaled linear schedule leaves 7% of the data at t = 1; sampling from noise alone then
    misses the mean, and does not after rescaling (Lin et al. 2023, section 3.1)."""
    assert STAYS_VISIBLE.alpha_bar()[-1].sqrt() > 0.06
    mended = STAYS_VISIBLE.model_copy(update={"zero_terminal_snr": True})
    missed = []
    for objective in (STAYS_VISIBLE, mended):
        generators = [torch.Generator().manual_seed(i) for i in range(4)]
        denoise = GAUSSIAN.best(objective)
        x = run_sampler("ddim", denoise, generators, (2, 4, 32, 32), 200, objective)
        (off, five_errors), _ = moment_errors(as_points(x), GAUSSIAN)
        missed.append(bool((off > five_errors + 0.01).any()))
    assert missed == [True, False]


LINE = Mixture(f64([0.3, 0.7]), f64([[-1.5], [1.0]]), f64([[[0.16]], [[0.36]]]))


def quantiles(x_1, t):
    """Where the flow of LINE takes x_1 ~ N(0, 1) at t: the point with as much mass below it."""
    mass = torch.special.ndtr(x_1)
    spread = ((1 - t) ** 2 * LINE.covariance.flatten() + t**2).sqrt()
    low, high = torch.full_like(x_1, -20), torch.full_like(x_1, 20)
    for _ in range(80):
        middle = (low + high) / 2
        z = (middle[..., None] - (1 - t) * LINE.mean.flatten()) / spread
        below = (LINE.share * torch.special.ndtr(z)).sum(-1) < mass
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def orders(sampler, first, last, counts):
    """log2 of the error's fall from each count of steps to the next, twice as many."""
    g = torch.Generator().manual_seed(0)
    x_1 = torch.randn(1, 1, 4, 8, 8, dtype=torch.float64, generator=g).clamp(-2.5, 2.5)
    start, end = quantiles(x_1, first), quantiles(x_1, last)
    objective, errors = FlowMatching(), []
    for count in counts:
        grid = torch.linspace(first, last, count + 1, dtype=torch.float64)
        x = sampler(LINE.best(objective), start, grid, objective)
        errors.append((x - end).abs().mean().item())
    assert errors[-1] > 1e-9  # far above rounding, so that the falls mean something
    return [math.log2(a / b) for a, b in zip(errors, errors[1:])]


@pytest.mark.parametrize(
    ("sampler", "order"), [(euler, 1), (heun, 2), (midpoint, 2), (dpmpp_2m, 2), (unipc, 3)]
)
def test_order_of_convergence(sampler, order):
    """Between t = 0.95 and 0.05. UniPC's corrector adds one to its order 2 (Zhao et al. 2023)."""
    assert orders(sampler, 0.95, 0.05, (80, 160, 320)) == pytest.approx([order] * 2, abs=0.2)


@pytest.mark.parametrize(
    ("sampler", "order"), [(euler, 1), (heun, 2), (midpoint, 2), (dpmpp_2m, 1.8), (unipc, 2)]
)
def test_order_of_convergence_from_noise_to_data(sampler, order):
    """From t = 1 to 0, where lambda is infinite at both ends.

    There the multistep solvers' first and last steps are of first order, which costs UniPC its third
    order, and 2M a logarithm: error ~ log(n) / n^2.
    """
    assert orders(sampler, 1.0, 0.0, (80, 160, 320)) == pytest.approx([order] * 2, abs=0.15)
