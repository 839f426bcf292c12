"""When which adapters are on during CoTo training: probabilities and masks, without any trainer.

"Come Together, But Not Right Now" (CoTo), arXiv:2506.05713.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_lab.errors import OptionError
from lora_lab.options import check_options
from lora_lab.registry import Registry

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


def linear(s: float) -> float:
    """s."""
    return s


def exponential(s: float) -> float:
    """(eˢ − 1) / (e − 1)."""
    return math.expm1(s) / math.expm1(1.0)


def sine(s: float) -> float:
    """sin(πs/2)."""
    return math.sin(math.pi * s / 2)


RAMPS: Registry[Callable[[float], float]] = Registry(
    "ramp",
    "lora_lab.ramps",
    None,
    {
        "linear": linear,
        "exponential": exponential,
        "sine": sine,
    },
)
"""How far the ramp has come at the share s of its length; each goes from 0 to 1."""


@dataclass(frozen=True)
class Schedule:
    """p(t): the probability that a group of adapters is on at optimiser step t of T.

    p(t) = p0 + (1 − p0)·ramp(t / ⌈stage·T⌉), and 1 from step ⌈stage·T⌉ on: the last phase trains all adapters.
    `law` says how a mask comes from p (see MASK_LAWS): uniform (CoTo), high (CoTo-H) or low (CoTo-L) layers dropped
    first, or depth (stochastic depth: survival falls with the layer's index and stays constant in time;
    p0 is then the survival of the last layer).
    """

    ramp: str = "linear"
    p0: float = 0.1
    stage: float = 0.75
    law: str = "uniform"

    def __post_init__(self) -> None:
        check_options(self)
        _ = RAMPS[self.ramp], MASK_LAWS[self.law]
        if not 0 <= self.p0 <= 1:
            raise OptionError(f"p0 is {self.p0}; a probability between 0 and 1 is needed")
        if not 0 <= self.stage <= 1:
            raise OptionError(f"the stage ratio is {self.stage}; a share between 0 and 1 is needed")

    def progress(self, step: int, steps: int) -> float:
        """Share of the way from the first step (0) to the end of the ramp (1)."""
        end = math.ceil(self.stage * steps)
        return RAMPS[self.ramp](step / end) if step < end else 1.0

    def probability(self, step: int, steps: int) -> float:
        """p at optimiser step `step` (from 0) of `steps`."""
        if MASK_LAWS[self.law].chances:
            return self.p0
        return self.p0 + (1 - self.p0) * self.progress(step, steps)

    def survival(self, groups: int) -> list[float]:
        """Of a law that is constant in time, each group's chance to be on in a step, given that at least one is."""
        chances = MASK_LAWS[self.law].chances
        if chances is None:
            raise OptionError(f"the chances of the law {self.law!r} change from step to step")
        each = chances(self.p0, groups)
        some_on = -math.expm1(sum(math.log1p(-chance) if chance < 1 else -math.inf for chance in each))
        return [chance / some_on for chance in each] if some_on > 0 else [1 / groups] * groups

    def mask(self, step: int, steps: int, groups: int, seed: int) -> Mask:
        """Which of the groups are on at this step; at least one is. A function of its arguments alone.

        So a resumed run, a recomputed forward pass and every rank of a distributed run see the same mask.
        """
        generator = np.random.default_rng([seed, step])
        return MASK_LAWS[self.law].draw(self.probability(step, steps), groups, generator)


def uniform(p: float, groups: int, generator: np.random.Generator) -> Mask:
    """Every group on with probability p, given that at least one is; p = 0 gives one group at random.

    The conditional law itself, drawn group by group without a rejection loop.
    """
    return conditional_bernoulli([p] * groups, generator)


def high(p: float, groups: int, generator: np.random.Generator) -> Mask:
    """Nested dropout, high groups dropped first: the lowest j stay, j ~ Binomial(groups, p) given j ≥ 1."""
    count = int(uniform(p, groups, generator).sum())  # the number of ones has exactly that law
    return np.arange(groups) < count


def low(p: float, groups: int, generator: np.random.Generator) -> Mask:
    """Nested dropout, low groups dropped first: the highest j stay, j ~ Binomial(groups, p) given j ≥ 1."""
    return high(p, groups, generator)[::-1].copy()


def depth(p: float, groups: int, generator: np.random.Generator) -> Mask:
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): group l of 1 … G survives with 1 − (l/G)(1 − p)."""
    return conditional_bernoulli(_by_depth(p, groups), generator)


def _by_depth(p: float, groups: int) -> list[float]:
    return [1 - (1 - p) * level / groups for level in range(1, groups + 1)]


@dataclass(frozen=True)
class MaskLaw:
    """How a mask comes from p."""

    draw: Callable[[float, int, np.random.Generator], Mask]
    """(p, groups, generator) → bool[groups] with at least one True."""
    chances: Callable[[float, int], list[float]] | None = None
    """Of a law that is constant in time, (p0, groups) → each group's chance; None where p grows along the ramp."""


MASK_LAWS = Registry(
    "law",
    "lora_lab.mask_laws",
    MaskLaw,
    {"uniform": MaskLaw(uniform), "high": MaskLaw(high), "low": MaskLaw(low), "depth": MaskLaw(depth, _by_depth)},
)
"""Laws of the masks by name."""


def conditional_bernoulli(p: Sequence[float], generator: np.random.Generator) -> Mask:
    """Independent Bernoulli(pᵢ) given that at least one is 1, sampled sequentially; one uniform per entry.

    Where all remaining pᵢ are 0 the limit of equal, vanishing p is taken: one of them, uniformly.
    """
    draws = generator.random(len(p))
    mask = np.zeros(len(p), dtype=np.bool_)
    with np.errstate(divide="ignore"):
        log_none = np.cumsum(np.log1p(-np.asarray(p, dtype=np.float64))[::-1])[::-1]
    for i, chance in enumerate(p):
        if mask.any():
            mask[i] = draws[i] < chance
            continue
        some_left = -math.expm1(log_none[i])  # probability that any of i … G is 1
        mask[i] = draws[i] < (chance / some_left if some_left > 0 else 1 / (len(p) - i))
    return mask


def activation_probability(p: float, groups: int) -> float:
    """Chance of each group to be on under `uniform`: p / (1 − (1 − p)^G), and 1/G at p = 0."""
    return p / -math.expm1(groups * math.log1p(-p)) if 0 < p < 1 else (1.0 if p else 1 / groups)
