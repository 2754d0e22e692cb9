"""When does averaging pay? The exact answer of the noisy quadratic, with a plot.

Near a minimum a loss is 1/2 sum_i h_i x_i^2, and a gradient is h_i x_i plus noise of variance s_i.
SGD at the rates eta_t is linear there, so what it loses after T steps is known without training:

    expected loss = 1/2 sum_i h_i (bias_i + variance_i)
    bias          = x_0^2 prod_t (1 - eta_t h)^2            what is left of the start
    variance     <- (1 - eta_t h)^2 variance + eta_t^2 s    what the noise adds, step by step

The mean of M members has the same bias and, as their noises are independent, 1/M of the variance,
into however many episodes the steps are cut. A constant rate eta ends at the variance
V(eta) ~ eta s / 2h. So M members at eta are, to first order, one run of M T steps at eta / M: both
have the bias (1 - eta h)^(2T) and the variance V(eta) / M. Run it with

    python examples/noisy_quadratic.py noisy_quadratic.png

It takes two seconds and prints the table below. At a shared constant rate that twice the steps
help no more, IMWA is far ahead of them (0.0046 against 0.0077; one member 0.0082). With a rate that
falls to zero, or with few steps, it is behind. With half the rate, or each at its own best rate,
the two are level, IMWA's best rate being about M times the long run's; where that is beyond 2 / h,
from which on steps do not converge, IMWA cannot follow (the last column):

    loss x 1000                      saturated, T = 300         short, T = 10
                                    constant     cosine   constant     cosine
    one run, T                          8.22       3.25      40.11      63.01
    one run, 2 T                        7.66       1.74      24.00      35.87
    one run, 2 T, half the rate         4.46       2.72      37.66      65.38
    IMWA, M = 2                         4.61       2.71      37.01      61.35
    one run, 2 T, its best rate         3.82       1.39      22.28      16.24
    IMWA, its best rate                 3.87       1.40      23.48      17.43
    best rates, IMWA / 2 T              1.92       2.02       1.74       1.16
"""

import sys
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

RATE, MEMBERS = 0.3, 2
COURSES = ("constant", "cosine")
LENGTHS = {"saturated": 300, "short": 10}
# Up to where steps stop to converge: 2 / h, with h = 1 the largest curvature.
RATES = np.geomspace(0.005, 1.95, 120)


@dataclass(frozen=True)
class Quadratic:
    """Curvatures h, variances of the gradient's noise and squared distances from the minimum."""

    curvatures: np.ndarray
    noise: np.ndarray
    start: np.ndarray


def problem() -> Quadratic:
    """A hundred directions from flat to steep; like SGD's, the noise is largest in steep ones."""
    h = np.geomspace(0.001, 1, 100)
    return Quadratic(h, 0.006 * h, np.full(100, 0.03))


def expected_loss(quadratic: Quadratic, rates: np.ndarray, members: int = 1) -> np.ndarray:
    """The expected loss of a mean of members, each trained at these rates.

    Args:
        quadratic: what is minimized.
        rates: (T, ...), the rate of each step.
        members: M; 1 is a plain run. How many episodes they have makes no difference.

    Returns:
        (...), one loss for each course of rates.
    """
    bias, variance = quadratic.start, np.zeros_like(quadratic.start)
    for rate in rates[..., None]:
        shrink = (1 - rate * quadratic.curvatures) ** 2
        bias = shrink * bias
        variance = shrink * variance + rate**2 * quadratic.noise / members
    return 0.5 * ((bias + variance) * quadratic.curvatures).sum(-1)


def course(kind: str, steps: int) -> np.ndarray:
    """Factors (steps, 1) of the rate: "constant", or half a "cosine" down to zero."""
    if kind == "constant":
        return np.ones((steps, 1))
    return 0.5 * (1 + np.cos(np.pi * np.arange(steps) / steps))[:, None]


def arms(quadratic: Quadratic, kind: str, steps: int) -> dict[str, float]:
    """Expected losses of a run, of longer ones and of IMWA."""

    def loss(length: int, rates: np.ndarray, members: int = 1) -> np.ndarray:
        return expected_loss(quadratic, course(kind, length) * rates, members)

    rate, longer = np.array([RATE]), MEMBERS * steps
    return {
        "one run, T": loss(steps, rate)[0],
        "one run, 2 T": loss(longer, rate)[0],
        "one run, 2 T, half the rate": loss(longer, rate / MEMBERS)[0],
        "IMWA, M = 2": loss(steps, rate, MEMBERS)[0],
        "one run, 2 T, its best rate": loss(longer, RATES).min(),
        "IMWA, its best rate": loss(steps, RATES, MEMBERS).min(),
    }


def best_rate_ratio(quadratic: Quadratic, kind: str, steps: int) -> float:
    """IMWA's best rate over that of one run of M T steps."""
    imwa = expected_loss(quadratic, course(kind, steps) * RATES, MEMBERS)
    longer = expected_loss(quadratic, course(kind, MEMBERS * steps) * RATES)
    return RATES[imwa.argmin()] / RATES[longer.argmin()]


def draw(quadratic: Quadratic) -> Figure:
    """Loss over the rate, for both lengths and both courses of the rate."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = iter(figure.subplots(2, 2, sharex=True).flat)
    for name, steps in LENGTHS.items():
        for kind in COURSES:
            axis, factors = next(panels), course(kind, steps)
            twice = course(kind, MEMBERS * steps)
            axis.loglog(RATES, expected_loss(quadratic, factors * RATES), ":", label="one run, T")
            axis.loglog(RATES, expected_loss(quadratic, twice * RATES), "--", label="one run, 2 T")
            imwa = expected_loss(quadratic, factors * RATES, MEMBERS)
            axis.loglog(RATES, imwa, label="IMWA, M = 2")
            axis.axvline(RATE, color="gray", lw=0.5)
            axis.set_title(f"{name} (T = {steps}), {kind} rate")
            axis.set_xlabel("learning rate (the first one)")
            axis.set_ylabel("expected loss")
            axis.legend()
    return figure


if __name__ == "__main__":
    QUADRATIC = problem()
    print(f"{'loss x 1000':29}" + "".join(f"{f'{k}, T = {v}':>22}" for k, v in LENGTHS.items()))
    columns = [(kind, steps) for steps in LENGTHS.values() for kind in COURSES]
    print(" " * 29 + "".join(f"{kind:>11}" for kind, _ in columns))
    table = [arms(QUADRATIC, kind, steps) for kind, steps in columns]
    for arm in table[0]:
        print(f"{arm:29}" + "".join(f"{1000 * losses[arm]:11.2f}" for losses in table))
    ratios = [best_rate_ratio(QUADRATIC, kind, steps) for kind, steps in columns]
    print(f"{'best rates, IMWA / 2 T':29}" + "".join(f"{ratio:11.2f}" for ratio in ratios))
    if len(sys.argv) > 1:
        draw(QUADRATIC).savefig(sys.argv[1])
