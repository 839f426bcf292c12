import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from making_adapters import random_adapter as from_noise
from making_measured import measured, places
from peft import HiraConfig, LoraConfig

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.lowrank import LowRank, combine
from lora_lab.analysis.lines import connectivity
from lora_lab.analysis.lines.connectivity import BARRIERS, Interpolate
from lora_lab.analysis.lines.points import LineModels, MixPoint
from lora_lab.analysis.measured import scored
from lora_lab.cli import parsing
from lora_lab.errors import MismatchError, OptionError, TunerError
from lora_lab.merging.paths import SPACES, Paths, Space
from lora_lab.results.stats import Sampled
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.examples import pack, unpack
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.digests import of_transforms
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.tasks.task import Scores

pytestmark = pytest.mark.usefixtures("few_digits")

CASES = Path(__file__).parents[1] / "cases"
TARGETS = r"vit\.layers\.[0-3]\..*(q_proj|v_proj|fc1)"


def random_adapter(seed, tmp, config=None, scale=0.06, record=None):
    """An adapter of random weights on the digits base, read back from what PEFT saves."""
    task = Digits("relabel")
    config = config or LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)
    adapter = from_noise(task, tmp / f"r{seed}", config, seed=seed, scale=scale)
    return replace(adapter, record=record or {"task": task.record, "method": "lora", "seed": seed})


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [random_adapter(seed, folder) for seed in range(3)]


def interpolate(adapters, task, *, device=None, cache=None, progress=None, **options):
    on = Execution(device=device, cache=cache, progress=progress)
    return Interpolate(**options).run(adapters, task, on)


@pytest.fixture(scope="module")
def result(adapters):
    return interpolate(adapters[:2], Digits("relabel"), points=5, spaces=("factors", "delta", "aligned"))


def dense(adapter):
    return {name: update.delta().double() for name, update in adapter.updates.items()}


@pytest.mark.parametrize("weights", [(0.3, 0.7, 0.0), (0.2, 0.3, 0.5), (1.0, -0.5, 0.25)])
def test_every_space_is_its_dense_definition(adapters, weights):
    paths = Paths(adapters)
    delta, factors, matched = (dense(paths.mix(weights, space)) for space in ("delta", "factors", "matched"))
    for name in adapters[0].sites:
        updates = [adapter.updates[name] for adapter in adapters]
        expected = sum(w * u.delta().double() for w, u in zip(weights, updates, strict=True))
        assert torch.allclose(delta[name], expected, atol=1e-6)
        A = sum(w * u.A.double() for w, u in zip(weights, updates, strict=True))
        B = sum(w * u.B.double() for w, u in zip(weights, updates, strict=True))
        assert torch.allclose(factors[name], B @ A, atol=1e-6)
        target = sum(w * u.delta().double().norm() for w, u in zip(weights, updates, strict=True))
        assert matched[name].norm() == pytest.approx(float(abs(target)), rel=1e-5)
        assert torch.allclose(matched[name], (B @ A) * target / (B @ A).norm(), atol=1e-5)


def test_factors_minus_delta_is_the_cross_term(adapters):
    paths, t = Paths(adapters[:2]), 0.3
    factors, delta = dense(paths.mix((1 - t, t), "factors")), dense(paths.mix((1 - t, t), "delta"))
    for name in adapters[0].sites:
        a, b = (adapter.updates[name] for adapter in adapters[:2])
        cross = -t * (1 - t) * (a.B - b.B).double() @ (a.A - b.A).double()
        assert torch.allclose(factors[name] - delta[name], cross, atol=1e-6)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(
    "weights", [(0.5, 0.5, 0.0), (0.2, 0.3, 0.5), (0.0, 1.0, 0.0), (0.5, 0.0, 0.0), (0.0, -2.0, 0.0)]
)
def test_norms_from_cores_are_the_dense_norms(adapters, space, weights):
    paths = Paths(adapters)
    expected = torch.stack([delta.norm() for delta in dense(paths.mix(weights, space)).values()]).norm()
    assert paths.norm(weights, space) == pytest.approx(float(expected), rel=1e-5)


def test_a_new_space_has_the_norm_of_what_it_mixes(adapters, monkeypatch):
    mix = lambda updates, weights: 2.0 * combine(updates, weights)  # noqa: E731
    monkeypatch.setitem(SPACES.entries, "doubled", Space(mix, needs_factors=False))
    paths = Paths(adapters)
    assert paths.norm((0.5, 0.3, 0.2), "doubled") == pytest.approx(2 * paths.norm((0.5, 0.3, 0.2), "delta"), rel=1e-6)
    result = interpolate(adapters[:2], Digits("relabel"), points=3, spaces=("doubled",), ratios=[[1, 1]])
    assert {row["space"] for row in result.rows()} == {"doubled"}
    assert "shrinkage" not in result.summary


def test_an_adapter_at_half_the_weight_has_a_quarter_of_its_norm_in_factors_and_half_of_it_otherwise(adapters):
    whole, paths = adapters[0].total_norm, Paths(adapters)
    for space, share in (("factors", 0.25), ("aligned", 0.25), ("matched", 0.5), ("delta", 0.5)):
        assert paths.norm((0.5, 0.0, 0.0), space) == pytest.approx(share * whole, rel=1e-5), space


@pytest.mark.parametrize("side", ["A", "B"])
def test_factors_that_cancel_are_zero_at_any_norm(adapters, side):
    """b's ΔW is −a's, so that half of each is 0; a third of a rounding error is no direction either."""
    a = adapters[0]
    turned = {
        name: LowRank(u.A * (-1.0 if side == "A" else 1.0), u.B * (-1.0 if side == "B" else 1.0), u.shape)
        for name, u in a.updates.items()
    }
    paths = Paths([a.with_updates(a.updates, source="a"), a.with_updates(turned, source="b")])
    near = torch.finfo(torch.float32).eps / 3
    for weights in ((0.5, 0.5), (0.5, 0.5 + near)):
        assert all(float(delta.norm()) == 0 for delta in dense(paths.mix(weights, "matched")).values())
        assert paths.norm(weights, "matched") == 0
    assert paths.norm((0.5, 0.5), "factors") == pytest.approx(0, abs=1e-6)


def test_an_adapter_with_all_the_weight_is_returned_itself(adapters):
    paths = Paths(adapters)
    for space in SPACES:
        assert paths.mix((0.0, 1.0, 0.0), space) is adapters[1]


def test_mixing_leaves_the_inputs_alone(adapters):
    before = [{key: tensor.clone() for key, tensor in adapter.tensors.items()} for adapter in adapters]
    for space in SPACES:
        Paths(adapters).mix((0.4, 0.4, 0.2), space)
    for adapter, tensors in zip(adapters, before, strict=True):
        assert all(torch.equal(adapter.tensors[key], tensor) for key, tensor in tensors.items())


def test_a_gauge_twin_is_flat_in_delta_and_has_the_known_false_barrier_in_factors():
    expected = json.loads((CASES / "L01_gauge_twin_interpolation/expected.json").read_text())
    a, twin = (Adapter.load(CASES / "L01_gauge_twin_interpolation" / name) for name in ("a", "twin"))
    paths = Paths([a, twin])
    middle, own = dense(paths.mix((0.5, 0.5), "delta")), dense(a)
    for name in own:
        assert torch.allclose(middle[name], own[name], atol=1e-6)
    assert paths.norm((0.5, 0.5), "delta") == pytest.approx(expected["total_delta_fro"], rel=1e-5)
    assert paths.norm((0.5, 0.5), "factors") == pytest.approx(expected["factor_mid_total"], rel=1e-5)
    false = dense(paths.mix((0.5, 0.5), "factors"))
    off = torch.stack([(false[name] - own[name]).norm() for name in own]).norm() / a.total_norm
    assert float(off) == pytest.approx(expected["factor_mid_rel_err"], rel=1e-4)


def test_alignment_undoes_the_gauge_of_a_twin():
    a, twin = (Adapter.load(CASES / "L01_gauge_twin_interpolation" / name) for name in ("a", "twin"))
    middle, own = dense(Paths([a, twin]).mix((0.5, 0.5), "aligned")), dense(a)
    for name in own:
        assert torch.allclose(middle[name], own[name], atol=1e-5)


def test_a_twin_on_the_digits_has_a_barrier_in_factors_only(adapters):
    a = adapters[0]
    generator = torch.Generator().manual_seed(0)
    updates = {}
    for name, update in a.updates.items():
        R = torch.linalg.qr(torch.randn(update.rank, update.rank, generator=generator))[0]
        updates[name] = LowRank(R.T @ update.A, update.B @ R, update.shape)
    twin = a.with_updates(updates, source="twin")
    found = interpolate(
        [a, twin], Digits("relabel"), points=3, spaces=("factors", "delta", "aligned"), split="validation"
    )
    height = {
        row["space"]: row["value"]
        for row in found.summary["barriers"]
        if row["metric"] == "loss" and row["barrier"] == "entezari"
    }
    assert height["delta"] == pytest.approx(0, abs=1e-5)
    assert height["aligned"] == pytest.approx(0, abs=1e-4)
    assert abs(found.rows(space="factors", t=0.5)[0]["loss"] - found.rows(space="factors", t=0.0)[0]["loss"]) > 1e-3


def test_pairs_of_unknown_methods_are_each_their_own_group_and_mixed_pairs_are_named(adapters):
    """LoRA, LoRA, CoTo, and two adapters whose records are gone."""
    records = [{"method": "lora"}, {"method": "lora"}, {"method": "coto"}, {}, {}]
    five = [
        replace(adapter, record=record, source=f"a{i}")
        for i, (adapter, record) in enumerate(zip([*adapters, *adapters[:2]], records, strict=True))
    ]
    rows = [
        {
            **connectivity._who(five, pair),
            "space": "delta",
            "metric": "loss",
            "barrier": "frankle",
            "value": float(sum(pair)),
        }
        for pair in itertools.combinations(range(5), 2)
    ]
    found = {row["method"]: (row["pairs"], row["mean"]) for row in connectivity._over_pairs(rows)}
    assert found["lora"] == (1, 1.0)
    assert found["coto – lora"] == (2, 2.5)
    assert found["a3 – a4"] == (1, 7.0)
    assert {name: pairs for name, (pairs, _) in found.items() if name.startswith(("a3 –", "a4 –"))} == {
        "a3 – lora": 2,
        "a4 – lora": 2,
        "a3 – coto": 1,
        "a4 – coto": 1,
        "a3 – a4": 1,
    }


def test_end_points_equal_the_adapters_own_scores_exactly(adapters, result):
    for t, adapter in ((0.0, adapters[0]), (1.0, adapters[1])):
        own = score(Digits("relabel"), adapter)
        for row in result.rows(t=t):
            assert row["loss"] == own.mean_loss
            assert row["accuracy"] == pytest.approx(own.accuracy, abs=1e-12)


def test_points_between_equal_a_model_with_the_dense_delta_added(adapters, result):
    task = Digits("relabel")
    for space in ("factors", "delta"):
        model = task.build_model()
        for name, delta in dense(Paths(adapters[:2]).mix((0.5, 0.5), space)).items():
            model.get_submodule(name).weight.data += delta.float()
        expected = task.score(model)
        assert result.rows(space=space, t=0.5)[0]["loss"] == pytest.approx(expected.mean_loss, abs=1e-4)


def test_factors_bring_the_matched_curve_and_norms_along(result):
    assert result.parameters["spaces"] == ["factors", "matched", "delta", "aligned"]
    rows = {space: result.rows(space=space) for space in result.parameters["spaces"]}
    ends = rows["factors"][0]["norm"], rows["factors"][-1]["norm"]
    assert rows["factors"][2]["norm"] < 0.75 * sum(ends) / 2
    # matched by module, so the total is at most the mean of the totals and close to it
    assert rows["matched"][2]["norm"] == pytest.approx(sum(ends) / 2, rel=1e-3)
    assert all(row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] for row in result.rows())


def test_barriers_follow_their_definitions():
    t = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    L = np.array([1.0, 1.5, 4.0, 3.0, 2.0])[:, None]
    assert height("frankle", L, t) == 4 - 1.5
    assert height("entezari", L, t) == 4 - 1.5
    assert height("max_end", L, t) == 4 - 2
    assert height("midpoint", L, t) == 4
    tilted = np.array([0.0, 3.0, 3.5, 3.8, 4.0])[:, None]
    assert height("frankle", tilted, t) == 2
    assert height("entezari", tilted, t) == 2
    assert height("max_end", tilted, t) == 0
    assert np.isnan(height("midpoint", L[:4], t[:4]))


def height(name, L, t):
    return Sampled(L, L).largest(lambda each: BARRIERS[name](each, t))[0]


GRID = np.linspace(0, 1, 11)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (np.full(11, 0.1), False),
        (0.1 + 0.04 * GRID, False),
        (0.1 + 1.6 * GRID * (1 - GRID), True),
        (0.1 + 0.3 * np.minimum(1, 5 * np.minimum(GRID, 1 - GRID)), True),
    ],
    ids=["flat", "chord", "bump", "plateau"],
)
def test_intervals_of_barriers_hold_the_true_one_and_find_none_where_there_is_none(error, found):
    """Percentiles of a resampled maximum would claim a barrier on a flat line in two runs of three."""
    generator = np.random.default_rng(0)

    def profile(L):
        return BARRIERS["entezari"](L, GRID)

    truth, inside, claimed = profile(error[:, None]).max(), [], []
    for seed in range(60):
        common, own = generator.random(500) < error[:, None], generator.random((11, 500)) < error[:, None]
        wrong = np.where(generator.random((11, 500)) < 0.15, own, common)  # most examples agree along the line
        _, low, high = Sampled.of(wrong.astype(float), seed=seed, resamples=300).largest(profile)
        inside.append(low <= truth + 1e-12 and truth <= high + 1e-12)
        claimed.append(low > 0)
    assert np.mean(inside) > 0.9
    assert np.mean(claimed) == 1 if found else np.mean(claimed) < 0.1


def test_the_interval_of_a_difference_of_two_maxima_holds_the_true_one():
    generator = np.random.default_rng(0)
    lines = np.concatenate([0.1 + 1.2 * GRID * (1 - GRID), 0.1 + 0.2 * GRID * (1 - GRID)])
    inside = []
    for seed in range(60):
        wrong = (generator.random(500) < lines[:, None]).astype(float)
        value, low, high = Sampled.of(wrong, seed=seed, resamples=300).largest(
            lambda L: BARRIERS["entezari"](L[:11], GRID), lambda L: BARRIERS["entezari"](L[11:], GRID)
        )
        inside.append(low <= (1.2 - 0.2) / 4 <= high)
        assert low < value < high
    assert np.mean(inside) > 0.9


def test_the_share_that_goes_is_what_does_not_stay():
    """A bump of 1 of which .25 stays, on every example alike."""
    bump = (4 * GRID * (1 - GRID))[:, None] * np.ones(20)
    factors, matched = Sampled.of(bump, seed=0), Sampled.of(bump / 4, seed=0)
    cells = connectivity._shrinkage(factors, matched, GRID)
    assert (cells["barrier"], cells["stays"], cells["removed"]) == pytest.approx((1, 0.25, 0.75))
    assert cells["share"] == pytest.approx(0.75)
    assert connectivity._shrinkage(factors, factors, GRID)["share"] == 0


def test_barriers_are_not_said_to_be_negative(adapters):
    """Of a flat line with noise every interval of a largest value would begin below 0, as none is."""
    wrong = np.random.default_rng(0).random((11, 60)) < 0.3
    found, line = measured({"correct": ~wrong}, "accuracy"), places(11)
    flat = found.worse(line, "accuracy")
    profile = BARRIERS["entezari"]
    assert flat.largest(lambda L: profile(L, GRID))[1] < 0
    summary = connectivity._summary(adapters[:2], ["factors"], {((0, 1), "factors"): line}, found, GRID)
    low = {row["barrier"]: row["low"] for row in summary["barriers"]}
    assert [low[name] for name in ("frankle", "entezari", "max_end")] == [0, 0, 0]
    midpoint = next(row for row in summary["barriers"] if row["barrier"] == "midpoint")
    assert midpoint["value"] == pytest.approx(1 - wrong[5].mean())  # the accuracy itself
    assert midpoint["low"] < midpoint["value"] < midpoint["high"]
    cells = connectivity._shrinkage(flat, flat, GRID)
    assert (cells["barrier_low"], cells["stays_low"]) == (0, 0)
    assert cells["removed_low"] < 0  # which a difference may be


@pytest.mark.parametrize("points", [11, 21, 101])
def test_every_point_of_a_line_is_a_point_of_its_own(points):
    line = [connectivity._on_line((0, 1), float(t), 2, "factors") for t in np.linspace(0, 1, points)]
    assert len({point.key for point in line}) == points


def test_the_aligned_line_of_a_pair_does_not_hang_on_other_adapters(adapters):
    three, two = Paths(adapters), Paths(adapters[1:])
    among, alone = three.mix([0.0, 0.3, 0.7], "aligned"), two.mix([0.3, 0.7], "aligned")
    for name in alone.sites:
        torch.testing.assert_close(among.updates[name].delta(), alone.updates[name].delta())
    assert three.norm([0.0, 0.3, 0.7], "aligned") == pytest.approx(two.norm([0.3, 0.7], "aligned"))
    assert two.norm([0.3, 0.7], "aligned") == pytest.approx(alone.total_norm, rel=1e-5)
    mixed = three.mix([0.2, 0.3, 0.5], "aligned")
    assert three.norm([0.2, 0.3, 0.5], "aligned") == pytest.approx(mixed.total_norm, rel=1e-5)


def test_a_journal_of_another_device_is_not_taken_over(adapters, tmp_path, monkeypatch):
    task = Digits("relabel")
    options = {"points": 3, "spaces": ("delta",), "cache": tmp_path}
    interpolate(adapters[:2], task, **options, device=torch.device("cpu"))
    monkeypatch.setattr(MixPoint, "apply", lambda *given: pytest.fail("computed afresh"))
    interpolate(adapters[:2], task, **options, device=torch.device("cpu"))
    with pytest.raises(pytest.fail.Exception, match="afresh"):
        interpolate(adapters[:2], task, **options, device=torch.device("meta"))


def test_shrinkage_splits_the_barrier_into_what_goes_and_what_stays(result):
    heights = {
        (row["space"], row["metric"]): row["value"]
        for row in result.summary["barriers"]
        if row["barrier"] == "entezari"
    }
    for row in result.summary["shrinkage"]:
        assert row["barrier"] == heights["factors", row["metric"]]
        assert row["stays"] == heights["matched", row["metric"]]
        assert row["removed"] == pytest.approx(row["barrier"] - row["stays"])
        assert row["removed_low"] <= row["removed"] <= row["removed_high"]


def test_the_same_run_gives_the_same_result(adapters, result):
    again = interpolate(adapters[:2], Digits("relabel"), points=5, spaces=("factors", "delta", "aligned"))
    assert again.columns == result.columns
    assert again.summary == result.summary
    assert again.provenance["run"] == result.provenance["run"]


def test_three_adapters_give_every_pair_a_matrix_and_ratios(adapters):
    ratios = parsing.ratios("0:1,1:2,1:1:1", "--ratios")
    found = interpolate(adapters, Digits("relabel"), points=3, spaces=("delta",), ratios=ratios, split="validation")
    assert {tuple(row["indices"]) for row in found.rows(ratio=None)} == {(0, 1), (0, 2), (1, 2)}
    matrix = np.array(found.summary["matrix"]["delta"]["loss"])
    assert (matrix == matrix.T).all()
    assert (np.diag(matrix) == 0).all()
    thirds = found.rows(ratio="1:1:1")
    assert len(thirds) == 1
    assert thirds[0]["weights"] == pytest.approx([1 / 3] * 3)
    assert len(found.rows(ratio="1:2")) == 3
    own = score(Digits("relabel"), adapters[1], "validation")
    assert found.rows(ratio="0:1", indices=[0, 1])[0]["loss"] == own.mean_loss
    over = {(row["space"], row["metric"], row["barrier"]): row for row in found.summary["over_pairs"]}
    assert over["delta", "loss", "entezari"]["mean"] == pytest.approx(matrix[np.triu_indices(3, 1)].mean())


def test_a_killed_run_goes_on_with_the_same_numbers(adapters, tmp_path):
    task = Digits("relabel")
    options = {"points": 4, "spaces": ("factors",), "split": "validation"}
    whole = interpolate(adapters[:2], task, **options)

    def kill(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interpolate(adapters[:2], task, **options, cache=tmp_path, progress=kill)
    seen = []
    resumed = interpolate(adapters[:2], task, **options, cache=tmp_path, progress=lambda *n: seen.append(n))
    assert seen[0] == (1, 6)  # known already
    assert seen[-1] == (6, 6)
    assert resumed.columns == whole.columns
    assert resumed.summary == whole.summary


def test_a_finer_line_computes_only_what_is_new(adapters, tmp_path, monkeypatch):
    options, applied, apply = {"spaces": ("delta",), "split": "validation"}, [], MixPoint.apply
    monkeypatch.setattr(MixPoint, "apply", lambda self, *rest: (applied.append(self.key), apply(self, *rest))[1])
    for points, new in ((3, 3), (5, 2), (5, 0)):
        applied.clear()
        interpolate(adapters[:2], Digits("relabel"), points=points, cache=tmp_path, **options)
        assert len(applied) == new


def test_runs_are_told_apart_by_every_bit_of_their_inputs(adapters, tmp_path):
    task, question = Digits("relabel"), Interpolate(points=3)
    name, update = next(iter(adapters[0].updates.items()))
    turned = LowRank(update.A.flip(0), update.B.flip(1))
    twin = adapters[0].with_updates({**adapters[0].updates, name: turned}, source=adapters[0].source)
    same = adapters[0].with_updates(adapters[0].updates, source=adapters[0].source)
    ids = [
        question.run_id([same, adapters[1]], task),
        question.run_id([twin, adapters[1]], task),
        Interpolate(points=5).run_id([same, adapters[1]], task),
        Interpolate(points=3, split="validation").run_id([same, adapters[1]], task),
        question.run_id([same, adapters[1]], Digits("invert")),
        *(Interpolate(points=3, ratios=((1.0, w),)).run_id([same, adapters[1]], task) for w in (2.0, 2.0000001)),
    ]
    assert len(set(ids)) == 7
    path = same.save(tmp_path / "x.safetensors")
    again = replace(Adapter.load(path), source=same.source)
    assert question.run_id([again, adapters[1]], task) == ids[0]


def test_points_that_are_one_model_are_evaluated_once(adapters):
    points = [MixPoint((1.0, 0.0), space) for space in SPACES] + [MixPoint((0.5, 0.5), "delta")] * 2
    evaluator = Evaluator(adapters[:2], Digits("relabel"), split="validation", build=LineModels)
    found = scored(evaluator, points, ())
    assert evaluator.evaluated == 2
    assert list(found) == ["own:0", f"delta:0=0.5,1=0.5 {of_transforms()}"]


def test_packed_scores_come_back_bit_by_bit():
    generator = np.random.default_rng(0)
    loss, margin = generator.random((2, 13)).astype(np.float32).astype(np.float64)
    scores = Scores.judged(loss, generator.random(13) < 0.5, margin, generator.random((13, 3)).astype(np.float32))
    again = unpack(pack(scores))
    assert list(again.columns) == ["loss", "correct", "margin"]
    for name, column in scores.columns.items():
        assert (again[name] == column).all()
        assert again[name].dtype == column.dtype
    assert (again.logits == scores.logits).all()
    odd = {"count": np.arange(5) - 2**40, "share": generator.random(5), "none": np.full(5, np.nan)}
    again = unpack(pack(Scores(odd)))
    for name, column in odd.items():
        assert np.array_equal(again[name], column, equal_nan=name == "none")


def test_the_factor_line_works_for_tuners_without_a_delta(tmp_path):
    config = HiraConfig(r=3, target_modules=TARGETS)
    pair = [random_adapter(seed, tmp_path, config, scale=0.3) for seed in (0, 1)]
    found = interpolate(pair, Digits("relabel"), points=3, split="validation")
    assert found.parameters["spaces"] == ["factors"]
    assert [row["norm"] for row in found.rows()] == [None] * 3
    middle = Paths(pair).mix((0.5, 0.5), "factors")
    for key, tensor in middle.tensors.items():
        assert torch.allclose(tensor, (pair[0].tensors[key] + pair[1].tensors[key]) / 2)
    with pytest.raises(TunerError, match="HIRA"):
        interpolate(pair, Digits("relabel"), points=3, spaces=("delta",))


def test_different_ranks_have_a_delta_line_and_no_factor_line(adapters, tmp_path):
    other = random_adapter(7, tmp_path, LoraConfig(r=2, target_modules=TARGETS))
    task = Digits("relabel")
    found = interpolate([adapters[0], other], task, points=3, spaces=("delta",), split="validation")
    assert len(found.rows()) == 3
    with pytest.raises(
        MismatchError, match=r"different shapes.*lora_A.weight is \[4, 64\] and \[2, 64\].*the space delta"
    ):
        interpolate([adapters[0], other], task, points=3)


def test_different_scales_are_folded_in_before_factors_are_averaged(adapters, tmp_path):
    a = adapters[0]
    rescaled = replace(
        a,
        config={**a.config, "lora_alpha": 12},
        sites={name: replace(site, scale=3.0) for name, site in a.sites.items()},
    )
    mixed = Paths([a, rescaled]).mix((0.5, 0.5), "factors")
    for name, update in mixed.updates.items():
        assert torch.allclose(update.delta(), a.updates[name].delta() * 1.5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_heads_are_averaged_with_the_rest_and_as_finely_as_they_are_kept(tmp_path, dtype, wide):
    config = LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["classifier"], init_lora_weights=False)
    pair = [random_adapter(seed, tmp_path, config) for seed in (0, 1)]
    key = next(key for key in pair[0].others if key.endswith("classifier.weight"))
    heads = [torch.sqrt(a.tensors[key].double() ** 2 + 0.01).to(dtype) for a in pair]  # to the last bits of each
    pair = [replace(a, tensors={**a.tensors, key: head}) for a, head in zip(pair, heads, strict=True)]
    for space in ("factors", "delta"):
        mixed = Paths(pair).mix((0.25, 0.75), space).tensors[key]
        expected = (0.25 * heads[0].to(wide) + 0.75 * heads[1].to(wide)).to(dtype)
        assert mixed.dtype == dtype
        assert torch.equal(mixed, expected)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"config": {"peft_type": "LORA", "alora_invocation_tokens": [5]}}, "after different tokens: alora_invocation"),
        ({"config": {"peft_type": "LOHA"}}, "different tuners: LORA and LOHA"),
        ({"config": {"peft_type": "LORA", "use_dora": True}}, "different tuners: plain LoRA, against DoRA"),
    ],
)
def test_adapters_that_do_not_fit_together_are_refused(adapters, change, text):
    config = {**adapters[0].config, **change["config"]}
    with pytest.raises(MismatchError, match=text):
        Paths([adapters[0], replace(adapters[1], config=config)])


def test_tuners_without_a_delta_are_not_mixed_across_settings_they_compute_with(tmp_path):
    from peft import LoHaConfig

    pair = [random_adapter(i, tmp_path, LoHaConfig(r=2, alpha=8 + 24 * i, target_modules=TARGETS)) for i in (0, 1)]
    with pytest.raises(MismatchError, match="cannot be mixed: alpha is 8 and 32, which LOHA computes with"):
        Paths(pair)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("space", ["factors", "delta"])
def test_a_head_in_one_adapter_only_is_refused_before_anything_runs(adapters, tmp_path, swapped, space):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, modules_to_save=["classifier"])
    pair = [adapters[0], random_adapter(9, tmp_path, config)]
    with pytest.raises(MismatchError, match=r"differ in whole tensors: classifier.bias, classifier.weight"):
        interpolate(pair[::-1] if swapped else pair, Digits("relabel"), points=3, spaces=(space,))


def test_mixtures_need_a_space_they_are_scored_in(adapters):
    with pytest.raises(OptionError, match="mixtures are scored in factors and delta"):
        interpolate(adapters[:2], Digits("relabel"), spaces=("aligned",), ratios=[[1, 1]])


def test_different_modules_are_named(adapters):
    sites = dict(list(adapters[1].sites.items())[:-2])
    with pytest.raises(MismatchError, match=r"update different modules: vit.layers.3"):
        Paths([adapters[0], replace(adapters[1], sites=sites)])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("1:x", "ratio '1:x': numbers"),
        ("1", "has 1 weights; with 2 adapters"),
        ("1:1:1", "has 3 weights; with 2 adapters"),
        ("0:0", "not all of them 0"),
        ("-1:2", "weights of 0 or more"),
        ("1e308:1e308", "weights of 0 or more"),
    ],
)
def test_ratios_that_cannot_be_are_refused(adapters, text, match):
    with pytest.raises(OptionError, match=match):
        Interpolate(ratios=parsing.ratios(text, "--ratios")).check(adapters[:2])


def test_too_few_points_or_adapters_are_refused(adapters):
    with pytest.raises(OptionError, match="points is 1; it must be at least 2"):
        interpolate(adapters[:2], Digits("relabel"), points=1)
    with pytest.raises(OptionError, match="two adapters"):
        interpolate(adapters[:1], Digits("relabel"))
    with pytest.raises(OptionError, match="unknown space 'delat'"):
        interpolate(adapters[:2], Digits("relabel"), spaces=("delat",))


def test_the_question_is_its_record_and_its_checks(adapters):
    question = Interpolate(points=3, spaces=("factors",), ratios=((1.0, 2.0),), seed=4)
    said = {"points": 3, "spaces": ["factors"], "ratios": ["1:2"], "metric": [], "split": "test", "examples": None}
    said["behaviour"] = None
    assert question.record == {**said, "seed": 4}
    found = question.run(adapters[:2], Digits("relabel"))
    assert {name: found.parameters[name] for name in ("points", "ratios", "split", "seed")} == {
        name: question.record[name] for name in ("points", "ratios", "split", "seed")
    }
    assert found.provenance["run"] == question.run_id(adapters[:2], Digits("relabel"))
    with pytest.raises(OptionError, match="at least 2"):
        Interpolate(points=1)
    with pytest.raises(OptionError, match="unknown space 'delat'"):
        Interpolate(spaces=("delat",))
