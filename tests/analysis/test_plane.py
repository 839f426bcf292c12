"""The plane through three adapters: coordinates from inner products, and every point the mix that it stands for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making_adapters import random_adapter
from making_measured import measured, places
from peft import LoraConfig

from lora_lab.adapters.lowrank import combine
from lora_lab.analysis.lines.landscape import Plane
from lora_lab.analysis.lines.plane import Axes, _gain
from lora_lab.errors import DivergedError, MismatchError, OptionError
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.kinds.digits import Digits

pytestmark = pytest.mark.usefixtures("few_digits")

TASK = Digits("relabel")
TARGETS = r"vit\.layers\.[0-1]\..*(q_proj|fc1)"


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    made = []
    for seed, rank in enumerate((2, 3, 4)):
        config = LoraConfig(r=rank, lora_alpha=6, target_modules=TARGETS)
        made.append(random_adapter(TASK, folder / f"r{seed}", config, seed=seed, scale=0.1 + 0.02 * seed))
    return made


@pytest.fixture(scope="module")
def result(three):
    return Plane(points=3, margin=0.5, split="validation").run(three, TASK)


def flat(adapter):
    """All of ΔW in one vector."""
    return torch.cat([update.delta().double().flatten() for update in adapter.updates.values()])


@given(st.integers(0, 1000), st.floats(-3, 3), st.floats(-3, 3))
def test_coordinates_are_isometric_to_the_points_that_they_stand_for(seed, x, y):
    points = np.random.default_rng(seed).normal(size=(3, 7)) * [[1], [2], [0.5]]
    axes = Axes.of(points @ points.T, ("a", "b", "c"))
    for corner, point in zip(axes.corners, points, strict=True):
        assert np.linalg.norm(corner) == pytest.approx(np.linalg.norm(point - points[0]), abs=1e-9)
        assert np.array(axes.weights(*corner)) @ points == pytest.approx(point, abs=1e-9)
    weights = axes.weights(x, y)
    there = np.array(weights) @ points
    assert sum(weights) == pytest.approx(1)
    assert axes.norm(weights) == pytest.approx(np.linalg.norm(there), rel=1e-9)
    for corner, point in zip(axes.corners, points, strict=True):
        assert np.hypot(*(corner - [x, y])) == pytest.approx(np.linalg.norm(there - point), abs=1e-9)


def test_the_grid_covers_the_corners_with_an_equal_margin_on_all_sides():
    points = np.array([[0.0, 0.0], [4.0, 0.0], [1.0, 2.0]])
    grid = np.array(Axes.of(points @ points.T, ("a", "b", "c")).grid(5, 0.25))
    assert len(grid) == 25
    assert grid.min(0) == pytest.approx([-1, -1])
    assert grid.max(0) == pytest.approx([5, 3])


def test_every_point_is_scored_as_the_mix_of_these_weights(three, result):
    deltas = torch.stack([flat(adapter) for adapter in three])
    for row in result.rows()[::3]:
        updates = {
            name: combine([adapter.updates[name] for adapter in three], row["weights"]) for name in three[0].updates
        }
        mixed = three[0].with_updates(updates, source="mixed")
        there = torch.tensor(row["weights"], dtype=torch.float64) @ deltas
        assert row["loss"] == pytest.approx(score(TASK, mixed, "validation").mean_loss, rel=1e-5)
        assert row["norm"] == pytest.approx(float(there.norm()), rel=1e-5)
        mean = sum(w * float(d.norm()) for w, d in zip(row["weights"], deltas, strict=True))
        assert row["matched_norm"] == pytest.approx(mean, rel=1e-5)
        assert np.hypot(row["x"], row["y"]) == pytest.approx(float((there - deltas[0]).norm()), rel=1e-5)


def test_the_corners_are_the_adapters_themselves(three, result):
    corners = result.summary["corners"]
    assert [corner["adapter"] for corner in corners] == [adapter.label for adapter in three]
    for adapter, corner in zip(three, corners, strict=True):
        own = score(TASK, adapter, "validation")
        assert (corner["loss"], corner["accuracy"]) == pytest.approx((own.mean_loss, own.accuracy))
        assert corner["norm"] == pytest.approx(corner["matched_norm"]) == pytest.approx(adapter.total_norm, rel=1e-6)


def test_the_base_is_a_point_of_its_own_plane(three):
    found = Plane(base=True, points=2, margin=0.0, split="validation").run(three[:2], TASK)
    base = found.summary["corners"][2]
    own = score(TASK, None, "validation")
    assert (base["adapter"], base["norm"]) == ("base", 0)
    assert (base["loss"], base["accuracy"]) == pytest.approx((own.mean_loss, own.accuracy))
    lengths = [np.hypot(base["x"] - corner["x"], base["y"] - corner["y"]) for corner in found.summary["corners"][:2]]
    assert lengths == pytest.approx([adapter.total_norm for adapter in three[:2]], rel=1e-6)


def test_in_the_plane_of_the_base_the_norm_matched_points_are_the_rescaled_line(three):
    a, b = (flat(adapter) for adapter in three[:2])
    gram = np.zeros((3, 3))
    gram[:2, :2] = [[float(p @ q) for q in (a, b)] for p in (a, b)]
    axes = Axes.of(gram, ("a", "b", "base"))
    for t in (0.25, 0.5, 0.9):
        line = (1 - t) * a + t * b
        target = (1 - t) * float(a.norm()) + t * float(b.norm())
        factor = target / float(line.norm())
        weights = (factor * (1 - t), factor * t, 1 - factor)
        assert axes.norm(weights) == pytest.approx(target) == pytest.approx(axes.matched_norm(weights, 2))
    assert np.isnan(axes.matched_norm((-0.2, 0.1, 1.1), 2))


def gain_of(losses, at):
    return _gain(measured({"loss": losses}, "loss"), "loss", places(len(losses)), at)


def test_where_no_point_is_better_than_another_there_is_no_gain():
    draws = np.random.default_rng(0).normal(1, 1, size=(300, 103, 60))
    gains = [gain_of(values, [(float(i), 0.0) for i in range(100)]) for values in draws]
    assert all(gain["x"] == values[3:, ::2].mean(1).argmin() for gain, values in zip(gains, draws, strict=True))
    assert 0.92 < np.mean([gain["low"] <= 0 <= gain["high"] for gain in gains]) < 0.98
    assert np.mean([gain["value"] for gain in gains]) == pytest.approx(0, abs=0.03)
    # what looking at many points would claim
    assert np.mean([values[:3].mean(1).min() - values[3:].mean(1).min() for values in draws]) > 0.15


def test_a_gain_is_found_with_its_interval():
    values = np.random.default_rng(0).normal(1, 0.5, size=(1, 400)).repeat(23, 0)
    values[3:] += np.arange(20)[:, None] / 10 + 0.02 * np.random.default_rng(1).normal(size=(20, 400))
    values[9] -= 0.8  # 0.6 above the corners before: now 0.2 below them
    gain = gain_of(values, [(0.0, float(i)) for i in range(20)])
    assert gain["low"] < 0.2 < gain["high"] < gain["low"] + 0.01
    assert gain["y"] == 6


def test_a_second_run_finds_every_point_in_the_journal(three, result, tmp_path, monkeypatch):
    from lora_lab.analysis.lines.points import MixPoint

    question = Plane(points=2, split="validation", examples=30)
    first = question.run(three, TASK, Execution(cache=tmp_path))
    monkeypatch.setattr(MixPoint, "apply", lambda *given: pytest.fail("computed afresh"))
    again = question.run(three, TASK, Execution(cache=tmp_path))
    assert again.columns == first.columns
    assert first.provenance["examples"] == 30


def test_three_points_on_a_line_are_named(three):
    a, b = three[:2]
    between = {name: combine([a.updates[name], b.updates[name]], [0.3, 0.7]) for name in a.updates}
    twice = {name: 2.0 * update for name, update in a.updates.items()}
    cases = [
        ([a, b, a.with_updates(between, source="mean")], False, r"r0, r1, mean lie on one line in ΔW: mean is .*away"),
        ([a, a.with_updates(a.updates, source="twin"), b], False, "r0 and twin have one ΔW, so no plane"),
        ([a, b, a.with_updates(a.updates, source="twin")], False, "r0 and twin have one ΔW, so no plane"),
        ([a, b, b.with_updates(b.updates, source="twin")], False, "r1 and twin have one ΔW, so no plane"),
        ([a, a.with_updates(twice, source="twice")], True, "r0, twice, base lie on one line"),
    ]
    for adapters, base, text in cases:
        with pytest.raises(MismatchError, match=text) as raised:
            Plane(base=base).check(adapters)
        assert "\n" not in str(raised.value)


def test_what_cannot_be_a_plane_is_refused(three):
    with pytest.raises(OptionError, match=r"a plane goes through three adapters, or two and the base .`base`.; 2 were"):
        Plane().check(three[:2])
    with pytest.raises(OptionError, match=r"goes through two adapters and the base; 3 were given"):
        Plane(base=True).check(three)
    with pytest.raises(OptionError, match=r"^points is 1; it must be at least 2"):
        Plane(points=1)
    key = "base_model.model.classifier.weight"
    headed = [replace(one, tensors={**one.tensors, key: torch.ones(10, 64)}) for one in three[:2]]
    with pytest.raises(MismatchError, match="r0: brings whole tensors of its own, such as a head, which the base"):
        Plane(base=True).check(headed)


def test_a_point_whose_loss_is_no_number_is_told(three):
    huge = [
        one.with_updates({name: 1e25 * update for name, update in one.updates.items()}, source=one.source)
        for one in three
    ]
    with pytest.raises(DivergedError, match=r"the model's loss is not finite on 80 examples with weights 1, 0, 0 in"):
        Plane(points=2, split="validation").run(huge, TASK)
