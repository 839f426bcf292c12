"""The joint estimator: what gates tell of every coalition, mended by a Gaussian process fitted to worths of pairs.

Shapley values hang only on o(S) = (v(S) − v(N∖S))/2, an odd function of z, z_i = ±1 for in or out, and are linear in
it: a monomial Π_{i∈A} z_i gives 2/|A| to each i ∈ A. With h of `expansion` known everywhere, o − o_h gets the prior

    Cov = θ₀ 1[S = T] + θ₁ Σ_i z_i z'_i / n + θ₃ Σ_{i<j<k} w_i w_j w_k (z_i z'_i)(z_j z'_j)(z_k z'_k) / e₃(w)
          + θ_b s² s'² Σ_i z_i z'_i / n + θ_g (g g')³ + θ_s (s s')³ + θ_h o_h o_h' + θ_l (o_l − o_h)(o_l − o_h)'

with s = Σ z_i / n, g = Σ w_i z_i, and w in proportion to φ(h)² and a tenth of their mean: noise of high orders; what
players add; triples, which grow with those in them; what players add where few or nearly all are there; the bend of
the whole, by who is there and by how many; how far h is to be trusted, and the link game l beside it.

The θ maximise the evidence of the pairs times a prior of their own, and the values are the posterior means given o(S)
of the pairs and o(N). From few pairs that is φ(h); from many, a regression with pure interactions; with all pairs the
values are exact (Rasmussen & Williams 2006, sections 2.2, 5.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_lab.brief import Brief
from lora_lab.games.coalitions import Bools, Estimate
from lora_lab.games.expansion import expansion
from lora_lab.games.gates import Control, Diagonal, link
from lora_lab.games.regression import Pairs, efficient, fit_pairs, pairs_among, values_of_bent
from lora_lab.results.stats import Floats

_MOST = 4096  # pairs that a process is fitted to: a matrix of 128 MiB; beyond, a regression does as well
_ROUNDING = 1e-9  # of a variance
_SEARCHED = 256  # pairs that θ is found by
_PRIOR = np.array([[-4.0, 2], [-4, 2], [-5, 2], [-5, 2], [-6, 2], [-6, 2], [-4, 2], [-1, 2]])
"""Mean and standard deviation of log θ₀, θ₁, θ₃, θ_b, θ_g, θ_s, θ_h, θ_l; o² in units of Σφ(h)²/4 + mean (o − o_h)²."""
_RANGE = [(-16.0, 5.0), *[(-20.0, 5.0)] * 7]  # some noise is left, which keeps the matrices far from singular


def joint(along: Diagonal, ends: Floats) -> Control:
    """The game of the expansion about the diagonal, and the fit that joins it with the worths of pairs."""
    linked = link(along, ends)
    known = expansion(along, ends, linked)
    prior = _Prior(known, linked)
    return replace(known, fit=prior.fit)


@dataclass(frozen=True, repr=False)
class _Prior(Brief):
    """What is thought of o − o_h before any coalition was asked for."""

    known: Control
    linked: Control

    def fit(self, coalitions: Bools, worths: Floats) -> Estimate | None:
        """Values of what is left of the game by the posterior of all pairs; None without the worth of nobody or all.

        Standard errors are posterior ones, with every log θ one standard error above its most likely value: few pairs
        leave it uncertain, and the error with it.
        """
        pairs = pairs_among(coalitions, worths)
        if pairs is None:
            return None
        if len(pairs.one) > _MOST:
            return fit_pairs(coalitions, worths)
        n = coalitions.shape[1]
        y = np.append(pairs.odd, pairs.odd_of_all)
        scale = math.sqrt(float((self.known.values**2).sum()) / 4 + float((y**2).mean()))
        if scale == 0:  # everything is worth the same, and the gates say so
            return pairs.estimate("joint", efficient(np.zeros((n, len(y)))), np.zeros(n))
        process = self._process(pairs, scale)
        few = np.unique(np.linspace(0, len(y) - 1, min(len(y), _SEARCHED + 1)).round().astype(int))
        theta, error = _most_likely(process.of(few), y[few] / scale)
        L = efficient(process.solved(theta))
        whole = len(pairs.one) == 2 ** (n - 1) - 1
        se = np.zeros(n) if whole else scale * np.sqrt(process.variances(theta * np.exp(error)))
        return pairs.estimate("joint", L, se)

    def _process(self, pairs: Pairs, scale: float) -> _Process:
        n = pairs.coalitions.shape[1]
        asked = np.vstack([pairs.coalitions[pairs.one], np.ones((1, n), np.bool_)])
        squares = self.known.values**2
        w = squares + 0.1 * squares.mean() if squares.any() else np.ones(n)
        w = w / w.sum()
        z = 2.0 * asked - 1
        g = z @ w
        h, linked = (_odd(control.game, asked) / scale for control in (self.known, self.linked))
        of_h, of_linked = (control.values / scale for control in (self.known, self.linked))
        # (Σ w_i z_i)³ = Σ_i w_i (3 Σw² − 2 w_i²) z_i + 6 Σ_{i<j<k} w_i w_j w_k z_i z_j z_k
        of_g = 2 * w * (3 * (w**2).sum() - 2 * w**2) + 4 * w * _pairs_without(w[None])[0]
        features = np.stack([g**3, z.mean(1) ** 3, h, linked - h], 1)
        values = np.stack([of_g, np.full(n, 2 / n), of_h, of_linked - of_h], 1)
        return _Process(z, w, features, values)


@dataclass(frozen=True, repr=False)
class _Process(Brief):
    """Covariances of o at coalitions z ±1 [m, n], of values, and of both, by the parts of the prior."""

    z: Floats
    w: Floats
    """[n]: sum 1."""
    features: Floats
    """[m, 4]: those parts that are one function each."""
    values: Floats
    """[n, 4]: Shapley values of these."""

    def of(self, rows: Floats) -> _Process:
        """The same at some of the coalitions."""
        return replace(self, z=self.z[rows], features=self.features[rows])

    @property
    def triples(self) -> float:
        """1 / e₃(w); 0 where there are no three players."""
        w = self.w
        third = (1 - 3 * (w**2).sum() + 2 * (w**3).sum()) / 6
        return float(1 / third) if len(w) > 2 else 0.0

    def parts(self) -> list[Floats]:
        """Those of θ₁, θ₃ and θ_b, each [m, m].

        z z'/n; e₃ of the products w_i z_i z'_i, by Newton's identities, over e₃(w); s²s'² z z'/n.
        """
        z, w = self.z, self.w
        linear = z @ z.T / z.shape[1]
        first, second = (z * w) @ z.T, (w**2).sum()
        cubic = first * first
        cubic -= 3 * second
        cubic *= first
        cubic += 2 * ((z * w**3) @ z.T)
        cubic *= self.triples / 6
        square = z.mean(1) ** 2
        return [linear, cubic, linear * np.outer(square, square)]

    def covariance(self, theta: Floats, parts: Sequence[Floats] | None = None) -> Floats:
        """Of o at all coalitions, [m, m]."""
        found: Floats = (self.features * theta[4:]) @ self.features.T
        for share, part in zip(theta[1:4], parts or self.parts(), strict=True):
            found += share * part
        found[np.diag_indices_from(found)] += theta[0]
        return found

    def of_values(self, theta: Floats) -> Floats:
        """Of the values and o at all coalitions, [n, m]."""
        z, n = self.z, self.z.shape[1]
        size = np.round((z.sum(1) + n) / 2).astype(int)
        joined, stayed = _of_noise(n)
        found: Floats = theta[0] * np.where(z > 0, joined[size][:, None], -stayed[size][:, None]).T
        found += theta[1] * 2 / n * z.T
        b = z * self.w
        found += theta[2] * self.triples * 2 / 3 * (b * _pairs_without(b)).T
        found += (self.values * theta[4:]) @ self.features.T
        itself, other = values_of_bent(n)
        found += theta[3] / n * z.mean(1) ** 2 * (other * z.sum(1) + (itself - other) * z.T)
        return found

    def prior(self, theta: Floats) -> Floats:
        """Variances of the values before anything was asked, [n]."""
        n, w = self.z.shape[1], self.w
        joined, _ = _of_noise(n)
        of_noise = joined.sum() * 2 / n  # C(n − 1, k − 1) coalitions of k players that one player is in
        of_triples = self.triples * 4 / 9 * w * _pairs_without(w[None])[0]
        itself, other = values_of_bent(n)
        of_each = theta[0] * of_noise + theta[1] * 4 / n + theta[3] * (itself**2 + (n - 1) * other**2) / n
        found: Floats = of_each + theta[2] * of_triples + self.values**2 @ theta[4:]
        return found

    def solved(self, theta: Floats) -> Floats:
        """What the values take of every o: Cov(φ, o) Cov(o, o)⁻¹, [n, m]."""
        from scipy.linalg import cho_factor, cho_solve

        solved: Floats = cho_solve(cho_factor(self.covariance(theta), overwrite_a=True), self.of_values(theta).T).T
        return solved

    def variances(self, theta: Floats) -> Floats:
        """Of the values, given all o: Var φ − Cov(φ, o) Cov(o, o)⁻¹ Cov(o, φ), [n]."""
        prior = self.prior(theta)
        left: Floats = prior - (self.solved(theta) * self.of_values(theta)).sum(1)
        return np.maximum(left, _ROUNDING * prior)


def _most_likely(process: _Process, y: Floats) -> tuple[Floats, Floats]:
    """θ of the largest evidence times prior, and the standard errors of log θ by Fisher's information.

    −log p(y, θ) = ½ yᵀK⁻¹y + ½ log|K| + ½ Σ ((log θ − μ)/σ)², ∂K/∂log θ_k = θ_k K_k,
    I_kk = ½ tr (K⁻¹ θ_k K_k)² + 1/σ²
    """
    from scipy.linalg import cho_factor, cho_solve
    from scipy.optimize import minimize

    parts, features = process.parts(), process.features
    mean, spread = _PRIOR.T

    def by_part(A: Floats) -> Floats:
        """tr A K_k, of a symmetric A."""
        return np.array([A.trace(), *((A * part).sum() for part in parts), *((A @ features) * features).sum(0)])

    def inverse_of(theta: Floats) -> tuple[Floats, float]:
        factor = cho_factor(process.covariance(theta, parts), lower=True)
        return cho_solve(factor, np.eye(len(y))), 2 * float(np.log(np.diag(factor[0])).sum())

    def unlikely(log_theta: Floats) -> tuple[float, Floats]:
        theta, off = np.exp(log_theta), (log_theta - mean) / spread
        inverse, volume = inverse_of(theta)
        alpha = inverse @ y
        slope = theta * by_part(inverse - np.outer(alpha, alpha)) / 2 + off / spread
        return float(y @ alpha + volume + off @ off) / 2, slope

    found = minimize(unlikely, mean, jac=True, method="L-BFGS-B", bounds=_RANGE, options={"maxiter": 50})
    theta = np.exp(found.x)
    inverse, _ = inverse_of(theta)
    lines = features.T @ inverse @ features
    squares = [
        (inverse**2).sum(),
        *(float(((inverse @ part) * (inverse @ part).T).sum()) for part in parts),
    ]
    information = theta**2 * np.array([*squares, *np.diag(lines) ** 2]) / 2 + 1 / spread**2
    return theta, 1 / np.sqrt(information)


def _odd(game: Callable[[Bools], Floats], coalitions: Bools) -> Floats:
    odd: Floats = (game(coalitions) - game(~coalitions)) / 2
    return odd


def _pairs_without(b: Floats) -> Floats:
    """e₂ of each row of b [m, n] without its i-th number: Σ_{j<k; j,k≠i} b_j b_k, [m, n]."""
    first, second = b.sum(1, keepdims=True) - b, (b**2).sum(1, keepdims=True) - b**2
    found: Floats = (first**2 - second) / 2
    return found


def _of_noise(n: int) -> tuple[Floats, Floats]:
    """Values of o that is 1 at one coalition of k players (and −1 at its complement), k = 0 … n: for those in, out.

    2 (k − 1)! (n − k)! / n! and 2 k! (n − k − 1)! / n!, the second with its sign turned.
    """
    joined = np.array([0.0, *(2 / (n * math.comb(n - 1, k - 1)) for k in range(1, n + 1))])
    return joined, joined[::-1].copy()
