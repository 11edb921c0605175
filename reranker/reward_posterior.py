"""The distribution of a prompt's next reward, given its rewards so far and a prior from other prompts.

The rewards of a prompt are modelled as normal, with a mean and a variance that differ from prompt to prompt: the
conjugate model (Gelman et al., Bayesian Data Analysis, section 3.3), in which everything has a closed form.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

MAX_WEIGHT = 1000
"""Largest weight of a prior, in equivalent observed rewards; used where prompts do not differ at all."""


@dataclass(frozen=True, slots=True)
class Prior:
    """The prior of a prompt's rewards, before the first one is observed.

    `mean` and `sd` are their expected mean and standard deviation. `mean_weight` and `sd_weight` are the strengths of
    these two expectations, in equivalent observed rewards.
    """

    mean: float
    mean_weight: float
    sd: float
    sd_weight: int

    @classmethod
    def of(cls, rewards_P_N: Sequence[Sequence[float]]) -> "Prior":
        """Fits the prior to the reward pools of P prompts, by the method of moments; pools may differ in size.

        Over prompts, the mean of n rewards has variance s²·(1/n + 1/mean_weight). The variance of n rewards is sd²
        times an F-distributed variable with n − 1 and sd_weight = w degrees of freedom: its mean is w/(w − 2), and its
        variance over its squared mean is 2(n − 1 + w − 2)/((n − 1)(w − 4)) (the idea of Smyth 2004 for pooled
        variances).

        Raises:
            ValueError: fewer than two prompts have two rewards, or the rewards of each prompt are all equal.
        """
        pools = [pool for pool in rewards_P_N if len(pool) > 1]
        variances = [variance(pool) for pool in pools]
        if len(pools) < 2 or not any(variances):
            raise ValueError("a prior needs two prompts with at least two rewards each, and rewards that differ")
        n = fmean(len(pool) for pool in pools)
        typical = fmean(variances)
        between = variance([fmean(pool) for pool in pools]) / typical - 1 / n
        scatter = (n - 1) * variance(variances) / typical**2
        weight = (2 * (n - 3) + 4 * scatter) / (scatter - 2) if scatter > 2 else MAX_WEIGHT
        sd_weight = max(1, round(min(weight, MAX_WEIGHT)))
        return cls(
            mean=fmean(fmean(pool) for pool in pools),
            mean_weight=min(MAX_WEIGHT, 1 / between) if between > 0 else MAX_WEIGHT,
            sd=math.sqrt(typical * (1 - 2 / sd_weight) if sd_weight > 2 else typical),
            sd_weight=sd_weight,
        )


UNKNOWN = Prior(mean=0.0, mean_weight=0.0, sd=0.0, sd_weight=-1)
"""No prior knowledge: the prior 1/variance, under which n rewards alone decide, with n - 1 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Predictive:
    """The posterior predictive: the next reward is location + scale·T, with T of Student's t distribution."""

    location: float
    scale: float
    freedom: int

    @classmethod
    def after(cls, rewards_N: Sequence[float], prior: Prior = UNKNOWN) -> "Predictive | None":
        """The distribution after N rewards with mean m and sum of squared deviations S; None while N is too small.

            k = k₀ + n       location = (k₀·m₀ + n·m)/k
            ν = ν₀ + n       scale² = (1 + 1/k)/ν · (ν₀·s₀² + S + k₀·n/k · (m − m₀)²)

        with the prior's mean m₀ of weight k₀ and deviation s₀ of weight ν₀. N is too small while the gain over the
        best has no finite mean, ν < 2, or while no two rewards differ.
        """
        n = len(rewards_N)
        mean = fmean(rewards_N) if n else 0.0
        weight, freedom = prior.mean_weight + n, prior.sd_weight + n
        if freedom < 2 or not weight:
            return None
        squares = prior.sd_weight * prior.sd**2 + sum((reward - mean) * (reward - mean) for reward in rewards_N)
        squares += prior.mean_weight * n / weight * (mean - prior.mean) * (mean - prior.mean)
        location = (prior.mean_weight * prior.mean + n * mean) / weight
        scale = math.sqrt(squares / freedom * (1 + 1 / weight))
        return cls(location, scale, freedom) if scale else None

    def above(self, reward: float) -> float:
        """P(R > reward), with R the next reward."""
        return t_above((reward - self.location) / self.scale, self.freedom)

    def gain_over(self, best: float) -> float:
        """The expected improvement E[(R − best)⁺] over the best reward so far.

            E[(R − best)⁺] = scale · ((ν + z²)/(ν − 1) · f(z) − z · P(T > z)),  z = (best − location)/scale

        where f is the density of T, for which ∫ t·f(t) dt over t > z is (ν + z²)/(ν − 1) · f(z).
        """
        z = (best - self.location) / self.scale
        mean_above = (self.freedom + z * z) / (self.freedom - 1) * t_density(z, self.freedom)
        return max(0.0, self.scale * (mean_above - z * t_above(z, self.freedom)))


def t_density(t: float, freedom: int) -> float:
    """The density of Student's t: Γ((ν+1)/2) / (√(νπ) · Γ(ν/2)) · (1 + t²/ν)^(−(ν+1)/2)."""
    log_constant = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    return math.exp(log_constant - (freedom + 1) / 2 * math.log1p(t * t / freedom))


def t_above(t: float, freedom: int) -> float:
    """P(T > t) for integer degrees of freedom, by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    if not odd:
        within = sine * total
    elif freedom > 1:
        within = 2 / math.pi * (angle + sine * total)
    else:
        within = 2 / math.pi * angle
    return (1 - min(1.0, max(-1.0, within))) / 2  # a sum of a thousand terms may exceed 1 by rounding
