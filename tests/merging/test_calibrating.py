"""Pico against a dense implementation of its formula."""

import math

import pytest
import torch
from making_adapters import lora, write
from making_updates import gauged, random_update

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import OptionError
from lora_lab.merging.merged import merge
from lora_lab.merging.methods import MERGES, check
from lora_lab.merging.rules.calibrating import pico
from lora_lab.merging.sources import Sources

F64 = torch.float64


def several(ranks=(3, 2, 4)):
    return [random_update(10 + i, rows=9, columns=7, rank=rank) for i, rank in enumerate(ranks)]


def calibrated_by_hand(Bs):
    U, S, _ = torch.linalg.svd(torch.cat(Bs, dim=1), full_matrices=True)
    share = torch.zeros(len(U), dtype=F64)
    share[: len(S)] = S.square() / S.square().sum()
    alpha = 1 / (1 + (len(Bs) - 1) * share)
    return [U @ alpha.diag() @ U.T @ B for B in Bs]


def test_calibrated_factors_are_those_of_the_formula():
    updates = several()
    for found, B, update in zip(
        pico(updates, calibration="raw"), calibrated_by_hand([u.B for u in updates]), updates, strict=True
    ):
        torch.testing.assert_close(found.B, B)
        torch.testing.assert_close(found.A, update.A)
    balanced = [u.balanced() for u in updates]
    wanted = calibrated_by_hand([u.B for u in balanced])
    for found, B, update in zip(pico(updates), wanted, balanced, strict=True):
        torch.testing.assert_close(found.delta(), B @ update.A)


def test_balanced_calibration_knows_no_gauge_and_raw_does():
    updates = several()
    turned = [gauged(u, i) for i, u in enumerate(updates)]
    for calibration, same in (("balanced", True), ("raw", False)):
        pairs = zip(pico(updates, calibration=calibration), pico(turned, calibration=calibration), strict=True)
        moved = max(float((a.delta() - b.delta()).norm() / a.delta().norm()) for a, b in pairs)
        assert (moved < 1e-8) == same


def test_of_equal_directions_the_share_and_of_different_ones_less_is_taken():
    # two ΔW in one direction of outputs: share 1, α = 1/2; two in orthogonal ones of one size: share 1/2, α = 2/3
    e, f = torch.eye(4, dtype=F64)[:, :1], torch.eye(4, dtype=F64)[:, 1:2]
    A = torch.ones(1, 3, dtype=F64)
    for B, alpha in ((e, 1 / 2), (f, 2 / 3)):
        found = pico([LowRank(A, e), LowRank(A, B)])
        torch.testing.assert_close(found[0].delta(), alpha * e @ A)


NAMES = ["net.q_proj", "net.v_proj"]


def sources(tmp_path, weights=(1.0, 1.0, 0.5), **config):
    made = []
    for seed in range(3):
        tensors = {}
        for i, name in enumerate(NAMES):
            tensors |= lora(name, rank=3, rows=6, columns=5, seed=10 * seed + i)
        made.append(Adapter.load(write(tmp_path / f"{seed}", tensors, r=3, lora_alpha=6, **config)))
    return Sources(made, weights)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("inner", ["task-arithmetic", "ties", "tsv", "slerp"])
def test_any_method_inside_merges_what_is_calibrated_at_the_mean_of_the_norms_before(tmp_path, inner, turned):
    given = sources(tmp_path, fan_in_fan_out=turned)
    options = {"scope": "module", "density": 0.5} if inner == "ties" else {}
    merged = merge(given, "pico", options={"inner": inner, "calibration": "raw", **options}, exact=True).adapter
    for name in NAMES:
        updates, weights = given.updates_of(name), given.weights_of(name)
        Bs = calibrated_by_hand([(u.A.T if turned else u.B).double() for u in updates])
        dense = [(u.B.double() @ B.T) if turned else B @ u.A.double() for u, B in zip(updates, Bs, strict=True)]
        calibrated = [LowRank(torch.eye(d.shape[1], dtype=F64), d) for d in dense]
        entry = MERGES[inner]
        if entry.rule:
            wanted = entry.rule([d.delta() for d in calibrated], weights, **options)
        else:
            wanted = entry.function(calibrated, weights).delta()
        size = sum(w * float(u.norm()) for u, w in zip(updates, weights, strict=True)) / 3
        wanted = wanted * size / wanted.norm()
        found = merged.updates[name].delta().double()
        if inner == "tsv":  # whose share of the triplets is of the rank: compare what it is given alone
            assert float(found.norm()) == pytest.approx(size, rel=1e-5)
        else:
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * size)


def test_what_has_no_effect_and_what_cannot_be_inside_is_refused():
    assert check("pico", {"inner": "ties", "density": 0.3}) == {"inner": "ties", "density": 0.3}
    for options, text in (
        ({"scale": 2.0}, "scale"),
        ({"inner": "knots"}, "inner rule"),
        ({"inner": "fisher"}, "inner rule"),
        ({"inner": "pico"}, "inner rule"),
    ):
        with pytest.raises(OptionError, match=text):
            check("pico", options)
    with pytest.raises(OptionError, match="did you mean 'raw'"):
        pico(several(), calibration="row")


def test_zeros_stay_zeros():
    nothing = [0.0 * u for u in several((2, 2))]
    assert all(float(u.delta().abs().max()) == 0 for u in pico(nothing))
    assert math.isclose(float(pico(several((2,)))[0].norm()), float(several((2,))[0].norm()))
