"""Curves with a trained control point: the right gradients, ends that stay, runs that go on, lines to stand beside."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making_adapters import random_adapter
from peft import LoraConfig
from peft_models import quiet_embeddings
from transformers.pytorch_utils import Conv1D

from lora_lab.adapters.adapter import Adapter, stored
from lora_lab.adapters.models.attached import attach
from lora_lab.analysis.lines.connectivity import BARRIERS
from lora_lab.analysis.lines.curves.control_factors import ControlFactors
from lora_lab.analysis.lines.curves.control_points import CURVES, ControlTraining, Training, _midpoint
from lora_lab.analysis.lines.curves.curve import CURVE_SPACES, _ends, _mean_over, arc_shares
from lora_lab.analysis.lines.landscape import Curve
from lora_lab.analysis.lines.points import MixPoint
from lora_lab.errors import FileError, LoraLabWarning, MismatchError, OptionError, TunerError
from lora_lab.merging.paths import SPACES, Paths
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.execution import Execution
from lora_lab.scoring.sharing.workers import open_workers
from lora_lab.tasks.kinds import digits
from lora_lab.tasks.kinds.digits import Digits

pytestmark = pytest.mark.usefixtures("few_digits")

TASK = Digits("relabel")
TARGETS = r"vit\.layers\.[0-1]\..*(q_proj|fc1)"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("pair"), LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS)
    made = [random_adapter(TASK, folder / f"r{seed}", config, seed=seed, scale=0.1) for seed in (0, 1)]
    return [replace(one, record={"task": TASK.record, "method": "lora", "seed": i}) for i, one in enumerate(made)]


def how(shape="bezier", space="factors", steps=8, **changed):
    given = {"learning_rate": 1e-2, "batch_size": 8, "rank": None, "checks": 4, "seed": 0, **changed}
    return Training(shape, space, steps, **given)


@pytest.fixture(scope="module")
def result(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("controls")
    question = Curve(points=5, steps=24, checks=2, batch_size=8, split="validation", spaces=("delta", "factors"))
    return question.run(pair, TASK, folder=folder), folder


@given(st.floats(0, 1))
def test_weights_of_curves_sum_to_one_and_their_ends_are_the_adapters(t):
    for curve in CURVES.values():
        weights = curve.weights(t)
        assert sum(weights) == pytest.approx(1)
        assert min(weights) >= 0
        assert (curve.weights(0.0), curve.weights(1.0)) == ((1, 0, 0), (0, 0, 1))


def test_a_bezier_is_de_casteljaus_and_a_polychain_turns_at_its_control_point():
    a, c, b = np.array([0.0, 0.0]), np.array([1.0, 3.0]), np.array([4.0, 0.0])
    for t in (0.2, 0.5, 0.9):
        first, second = (1 - t) * a + t * c, (1 - t) * c + t * b
        assert np.array(CURVES["bezier"].weights(t)) @ [a, c, b] == pytest.approx((1 - t) * first + t * second)
    assert CURVES["polychain"].weights(0.5) == (0, 1, 0)
    assert CURVES["polychain"].weights(0.25) == pytest.approx((0.5, 0.5, 0))
    assert CURVES["polychain"].weights(0.9) == pytest.approx((0, 0.2, 0.8))


@pytest.mark.parametrize("space", ["delta", "factors"])
def test_gradients_reach_the_control_point_through_the_mixture(pair, space):
    training = ControlTraining(pair, how(space=space), TASK, CPU)
    points, t = training._points, 0.3
    weights = CURVES["bezier"].weights(t)
    live = points.live(training._models.attached, training._start)
    batch = training._batch(0)
    caught = []

    class NoStep(torch.optim.Adam):
        def step(self):
            caught.extend(leaf.grad.clone() for leaf in points.leaves)

    training._shape = replace(CURVES["bezier"], weights=lambda _: weights)
    torch.nn.utils.clip_grad_norm_, clip = lambda *_: None, torch.nn.utils.clip_grad_norm_
    try:
        training._step(training._models.attached.model.train(), live, NoStep(points.leaves), 0)
    finally:
        torch.nn.utils.clip_grad_norm_ = clip
    # by hand: the gradient of what the model wears, and the chain rule of each space
    control = points.adapter(points.leaves)
    mixed = Paths([pair[0], control, pair[1]]).mix(weights, space)
    with attach(TASK.build_model(), mixed) as attached:
        keys = [key for name in control.sites for key in mixed.sites[name].keys.values()]
        own = attached.live(keys)
        for tensor in own:
            tensor.requires_grad_(True)
        attached.model.train()
        gradients = torch.autograd.grad(attached.model(**batch).loss, own)
    rank = pair[0].sites[next(iter(pair[0].sites))].rank
    for i in range(0, len(gradients), 2):
        A, B = gradients[i : i + 2]
        if space == "delta":  # A = [A_a; A_c; A_b], B = [w_a B_a, w_c B_c, w_b B_b]
            A, B = A[rank:-rank], weights[1] * B[:, rank:-rank]
        else:  # A = w_a A_a + w_c A_c + w_b A_b
            A, B = weights[1] * A, weights[1] * B
        assert torch.allclose(caught[i], A, atol=1e-6, rtol=1e-4)
        assert torch.allclose(caught[i + 1], B, atol=1e-6, rtol=1e-4)


class Mixed(torch.nn.Module):
    """A layer of every layout that factors are stored in, and one without factors."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(7, 5)
        self.picture = torch.nn.Conv2d(3, 4, 2)
        self.turned = Conv1D(6, 5)
        self.head = torch.nn.Linear(6, 2)

    def build_model(self):
        return Mixed()


@pytest.mark.parametrize("space", ["delta", "factors"])
def test_every_layout_is_mixed_as_the_space_says_and_gives_its_gradients_back(tmp_path, space):
    config = {"r": 2, "target_modules": ["words", "picture", "turned"], "modules_to_save": ["head"]}
    config |= {"fan_in_fan_out": True}
    with quiet_embeddings():
        ends = [random_adapter(Mixed(), tmp_path / str(i), LoraConfig(**config), seed=i, scale=1.0) for i in (0, 1)]
    start, weights = _midpoint(ends, how(space=space)), (0.3, 0.6, 0.1)
    points = ControlFactors(ends, start, CPU, summed=SPACES[space].needs_factors)
    names, whole = list(start.sites), [key for key in start.others if "head" in key]
    assert {start.sites[name].kind for name in names} == {"embedding", "conv2d", "linear"}
    assert len(whole) == 2
    # the same by the space's own function, which gradients find their way through
    leaves, expected = [], []
    for name in names:
        a, c, b = (each.updates[name] for each in (ends[0], start, ends[1]))
        c = replace(c, A=c.A.clone().requires_grad_(), B=c.B.clone().requires_grad_())
        leaves += [c.A, c.B]
        expected += stored(SPACES[space].mix([a, c, b], weights), start.sites[name].kind, True)
    for key in whole:
        a, c, b = (each.tensors[key] for each in (ends[0], start, ends[1]))
        leaves.append(c.clone().requires_grad_())
        expected.append(weights[0] * a + weights[1] * leaves[-1] + weights[2] * b)
    mixed = points.mixed(weights)
    gradients = [torch.randn_like(tensor) for tensor in mixed]
    for tensor, wanted in zip(mixed, expected, strict=True):
        assert torch.allclose(tensor, wanted, atol=1e-6)
    torch.autograd.backward(expected, gradients)
    points.take_gradients(gradients, weights)
    for leaf, wanted in zip(points.leaves, leaves, strict=True):
        assert torch.allclose(leaf.grad, wanted.grad, atol=1e-6)
    points.take_gradients([None] * len(gradients), weights)
    assert all(leaf.grad is None for leaf in points.leaves)


def test_the_cost_is_told_in_passes_over_the_examples_that_are_scored(pair, tmp_path):
    question = Curve(points=5, steps=24, checks=2, batch_size=8, split="validation", examples=20)
    question, told = replace(question, spaces=("factors",), shapes=("bezier",)), []

    def stop(cost):
        told.append(cost)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        question.run(pair, TASK, Execution(confirm=stop), folder=tmp_path)
    # both ends and three points on each of three ways; a step is three passes; three checks at five places of 80
    assert told[0].variants == round(2 + 3 * 3 + (24 * 8 * 3 + 3 * 5 * 80) / 20)
    assert told[0].seconds > 0


@pytest.mark.usefixtures("forked_workers")
def test_control_points_are_trained_by_workers_bit_for_bit_as_here(pair, few_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "images", few_digits)  # which the workers have, too
    question = Curve(points=3, steps=2, checks=1, batch_size=8, split="validation", spaces=("delta", "factors"))
    question = replace(question, shapes=("bezier",))
    steps, task = [], Digits("relabel")  # of whose splits nothing is kept yet
    alone = question.run(pair, task, folder=tmp_path)
    monkeypatch.setattr(ControlTraining, "train", lambda *_: pytest.fail("trained in the driver"))
    (tmp_path / "there").mkdir()
    with open_workers(2, device="cpu") as workers:
        on = Execution(workers=workers, progress=lambda done, total: steps.append((done, total)))
        there = question.run(pair, task, on, folder=tmp_path / "there")
    assert there.summary["controls"] == alone.summary["controls"]
    assert there.columns == alone.columns
    assert (4, 4) in steps
    for name in ("curve-bezier-delta", "curve-bezier-factors"):
        one, other = (Adapter.load(folder / f"{name}.safetensors") for folder in (tmp_path, tmp_path / "there"))
        assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)


@pytest.mark.usefixtures("forked_workers")
def test_a_damaged_checkpoint_that_a_worker_finds_is_told_here(pair, few_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "images", few_digits)
    (tmp_path / f"control-{ControlTraining(pair, how(), TASK, CPU).run}.safetensors").write_bytes(b"nothing")
    question = Curve(points=3, steps=8, checks=4, batch_size=8, learning_rate=1e-2, shapes=("bezier",))
    with (
        open_workers(1, device="cpu") as workers,
        pytest.warns(LoraLabWarning, match="starts again"),
    ):
        replace(question, spaces=("factors",)).run(pair, TASK, Execution(workers=workers, cache=tmp_path))


@pytest.mark.parametrize(("space", "rank", "expected"), [("delta", None, 4), ("delta", 3, 3), ("factors", None, 2)])
def test_the_control_point_starts_at_the_midpoint(pair, space, rank, expected):
    training = ControlTraining(pair, how(space=space, rank=rank), TASK, CPU)
    middle = Paths(pair).mix([0.5, 0.5], space)
    for name, update in training._start.updates.items():
        best = middle.updates[name].truncate(expected)[0]
        assert update.rank == expected
        assert torch.allclose(update.delta(), best.delta(), atol=1e-6)


def test_training_finds_what_the_straight_line_has_not(pair, result):
    for control in result[0].summary["controls"]:
        trace = control["trace"]
        assert [row["step"] for row in trace] == [0, 12, 24]
        assert control["step"] == min(trace, key=lambda row: row["validation_loss"])["step"] > 0
    for gain in result[0].summary["gains"]:
        if gain["metric"] == "loss" and gain["over"] == "line":
            assert gain["low"] <= gain["value"] <= gain["high"]
    means = {(row["space"], row["path"]): row["value"] for row in means_of(result[0], "loss", "t")}
    assert means["factors", "bezier"] < means["factors", "line"] - 0.05


def means_of(result, metric, by):
    return [row for row in result.summary["means"] if (row["metric"], row["by"]) == (metric, by)]


def test_gains_are_differences_of_barriers_and_means_are_integrals(result):
    found, grid = result[0], np.linspace(0, 1, 5)
    for gain in found.summary["gains"]:
        heights = [
            next(
                row["value"]
                for row in found.summary["barriers"]
                if (row["space"], row["path"], row["metric"], row["barrier"], row["by"])
                == (gain["space"], path, gain["metric"], "entezari", "t")
            )
            for path in (gain["over"], gain["path"])
        ]
        assert gain["value"] == pytest.approx(heights[0] - heights[1])
    row = next(row for row in means_of(found, "loss", "t") if row["path"] == "bezier")
    losses = [point["loss"] for point in found.rows(space=row["space"], path="bezier")]
    assert row["value"] == pytest.approx(float(np.interp(np.linspace(0, 1, 100001), grid, losses).mean()), rel=1e-4)
    assert _mean_over(np.array([0, 0.25, 1]), np.array([[0.0], [1.0], [3.0]])) == pytest.approx([0.125 + 1.5])
    by_arc = [row for row in found.summary["barriers"] if row["by"] == "arc"]
    assert {row["barrier"] for row in by_arc} == {"entezari"}
    row = next(row for row in by_arc if (row["path"], row["metric"]) == ("polychain", "loss"))
    points = found.rows(space=row["space"], path="polychain")
    losses, arcs = (np.array([point[key] for point in points]) for key in ("loss", "arc"))
    assert row["value"] == pytest.approx(float(BARRIERS["entezari"](losses[:, None], arcs).max()))


def test_all_ways_share_their_ends_and_a_polychain_passes_through_its_control_adapter(pair, result):
    found, folder = result
    own = [score(TASK, adapter, "validation") for adapter in pair]
    for space in ("delta", "factors"):
        for path in ("line", "matched line", "bezier", "polychain"):
            rows = found.rows(space=space, path=path)
            for row, scores in ((rows[0], own[0]), (rows[-1], own[1])):
                assert row["loss"] == pytest.approx(scores.mean_loss)
        control = Adapter.load(folder / f"curve-polychain-{space}.safetensors")
        assert control.origin.own
        assert control.record["task"] == TASK.record
        assert control.record["curve"]["ends"] == [adapter.label for adapter in pair]
        middle = found.rows(space=space, path="polychain")[2]
        assert middle["loss"] == pytest.approx(score(TASK, control, "validation").mean_loss, rel=1e-5)


@pytest.mark.parametrize("space", ["delta", "factors"])
def test_the_matched_line_keeps_the_norm_of_every_module(pair, space):
    paths, t = Paths(pair), 0.3
    matched = paths.mix([1 - t, t], SPACES[space].rescaled)
    line = paths.mix([1 - t, t], space)
    for name, update in matched.updates.items():
        target = (1 - t) * pair[0].updates[name].norm() + t * pair[1].updates[name].norm()
        assert update.norm() == pytest.approx(target, rel=1e-5)
        factor = target / line.updates[name].norm()
        assert torch.allclose(update.delta(), factor * line.updates[name].delta(), atol=1e-6)


def test_updates_that_cancel_are_zero_at_any_norm(pair):
    opposite = pair[0].with_updates({name: -update for name, update in pair[0].updates.items()}, source="b")
    paths = Paths([pair[0], opposite])
    assert paths.norm([0.5, 0.5], "matched-delta") == 0
    assert all(not update.delta().any() for update in paths.mix([0.5, 0.5], "matched-delta").updates.values())


def test_an_untrained_curve_is_the_straight_line_where_that_is_mixed(pair):
    """A Bézier whose control point is the midpoint is the line, at the same t."""
    question = Curve(
        points=4, steps=1, learning_rate=1e-12, checks=1, shapes=("bezier",), spaces=("delta", "aligned"), split="test"
    )
    found = question.run(pair, TASK)
    for space in ("delta", "aligned"):
        line, curve = (found.rows(space=space, path=path) for path in ("line", "bezier"))
        for one, other in zip(line, curve, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert other["norm"] == pytest.approx(one["norm"], rel=1e-5)
            assert other["arc"] == pytest.approx(one["arc"], abs=1e-5)
        assert [row["arc"] for row in line] == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-5) or space == "aligned"
    aligned = SPACES["aligned"]
    for name in pair[0].updates:
        pairs = [adapter.updates[name] for adapter in pair]
        expected = aligned.mix(aligned.prepare(pairs), [2 / 3, 1 / 3])
        ends = [adapter.updates[name] for adapter in _ends(pair, "aligned")]
        assert torch.allclose(SPACES["factors"].mix(ends, [2 / 3, 1 / 3]).delta(), expected.delta(), atol=1e-6)


def test_arc_shares_are_those_of_the_chords(pair):
    line = [MixPoint(weights, "delta") for weights in ((1.0, 0.0), (0.7, 0.3), (0.7, 0.0), (0.0, 1.0))]
    shares, length = arc_shares(Paths(pair), line)
    flat = [torch.cat([u.delta().double().flatten() for u in adapter.updates.values()]) for adapter in pair]
    places = torch.tensor([point.weights for point in line], dtype=torch.float64) @ torch.stack(flat)
    chords = (places[1:] - places[:-1]).norm(dim=1)
    assert length == pytest.approx(float(chords.sum()), rel=1e-5)
    assert shares[1:] == pytest.approx((chords.cumsum(0) / chords.sum()).numpy(), rel=1e-5)
    assert shares[0] == 0


@pytest.mark.parametrize("space", ["factors", "delta"])  # of which one has a control point whose B lies transposed
def test_a_run_that_was_killed_goes_on_with_the_same_numbers(pair, tmp_path, space):
    whole = ControlTraining(pair, how(space=space), TASK, CPU).train()
    steps = []

    def killed(done, total):
        steps.append(done)
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ControlTraining(pair, how(space=space), TASK, CPU).train(tmp_path, killed)
    again = []
    found = ControlTraining(pair, how(space=space), TASK, CPU).train(
        tmp_path, lambda done, total: again.append((done, total))
    )
    assert steps == [1, 2, 3, 4, 5]
    assert again == [(5, 8), (6, 8), (7, 8), (8, 8)]  # the last check was after 4
    assert found.trace == whole.trace
    assert found.step == whole.step
    assert all(torch.equal(found.adapter.tensors[key], tensor) for key, tensor in whole.adapter.tensors.items())
    idle = ControlTraining(pair, how(space=space), TASK, CPU).train(tmp_path, lambda *_: pytest.fail("trained again"))
    assert idle.trace == whole.trace


def test_a_damaged_checkpoint_is_told_and_training_starts_again(pair, tmp_path):
    training = ControlTraining(pair, how(steps=2, checks=1), TASK, CPU)
    whole = training.train(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.warns(LoraLabWarning, match="not used .*; the training starts again"):
        again = ControlTraining(pair, how(steps=2, checks=1), TASK, CPU).train(tmp_path)
    assert again.trace == whole.trace


def test_another_seed_or_rate_is_another_training(pair):
    runs = [ControlTraining(pair, how(**one), TASK, CPU).run for one in ({}, {"seed": 1}, {"learning_rate": 1e-3})]
    assert len(set(runs)) == 3
    assert ControlTraining(pair, how(), TASK, CPU).run == runs[0]
    assert ControlTraining(pair[::-1], how(), TASK, CPU).run not in runs


def test_every_turn_through_the_split_takes_every_example_once(pair):
    training = ControlTraining(pair, how(batch_size=300), TASK, CPU)
    seen = [training._batch(step)["labels"] for step in range(10)]  # three turns through 1000
    labels = TASK.split("train").inputs["labels"]
    drawn = torch.cat(seen)
    assert [len(batch) for batch in seen] == [300] * 10
    for turn in range(3):
        part = drawn[1000 * turn : 1000 * (turn + 1)]
        assert torch.equal(part.bincount(), labels.bincount())
    assert not torch.equal(drawn[:1000], drawn[1000:2000])
    fresh = ControlTraining(pair, how(batch_size=300), TASK, CPU)
    assert torch.equal(fresh._batch(7)["labels"], seen[7])


def test_random_state_is_left_as_it_was(pair):
    before = torch.get_rng_state()
    ControlTraining(pair, how(steps=1, checks=1), TASK, CPU).train()
    assert torch.equal(before, torch.get_rng_state())


def test_what_lies_in_a_control_points_place_is_kept(pair, tmp_path):
    question = Curve(points=3, steps=1, checks=1, shapes=("bezier",), spaces=("factors",), split="validation")
    place = tmp_path / "curve-bezier-factors.safetensors"
    pair[0].save(place)
    with pytest.raises(FileError, match=r"curve-bezier-factors.safetensors: exists already"):
        question.run(pair, TASK, Execution(progress=lambda *_: pytest.fail("trained")), folder=tmp_path)
    place.unlink()
    first = question.run(pair, TASK, folder=tmp_path)
    made = Adapter.load(place)
    assert made.record["run"] == first.provenance["run"]
    assert question.run(pair, TASK, folder=tmp_path).columns == first.columns  # its own, written again


def test_what_no_curve_goes_between_is_refused(pair, tmp_path):
    other = LoraConfig(r=2, target_modules=r"vit\.layers\.0\..*q_proj")
    fewer = random_adapter(TASK, tmp_path / "fewer", other, scale=0.1)
    wider = random_adapter(TASK, tmp_path / "wider", LoraConfig(r=3, target_modules=TARGETS), scale=0.1)
    dora = random_adapter(TASK, tmp_path / "dora", LoraConfig(r=2, use_dora=True, target_modules=TARGETS), scale=0.1)
    for adapters, error, text in [
        (pair[:1], OptionError, "a curve goes from one adapter to another; 1 were given"),
        ([*pair, fewer], OptionError, "a curve goes from one adapter to another; 3 were given"),
        ([pair[0], fewer], MismatchError, "update different modules: vit.layers.0.mlp.fc1"),
        ([dora, dora], TunerError, "dora: no ΔW from the factors alone"),
        ([pair[0], wider], MismatchError, "factors of different shapes, not to be averaged"),
    ]:
        with pytest.raises(error, match=text) as raised:
            Curve().check(adapters)
        assert "\n" not in str(raised.value)
    Curve(spaces=("delta", "aligned")).check([pair[0], wider])
    with pytest.raises(OptionError, match="no shape of a curve was named"):
        Curve(shapes=()).check(pair)
    with pytest.raises(OptionError, match=r"unknown space 'dleta' .did you mean 'delta'"):
        Curve(spaces=("dleta",))


def test_adapters_of_different_ranks_have_a_curve_in_aligned_factors(pair, tmp_path):
    wider = random_adapter(TASK, tmp_path / "wider", LoraConfig(r=3, target_modules=TARGETS), scale=0.1)
    question = Curve(points=3, steps=1, checks=1, shapes=("polychain",), spaces=("aligned",), split="validation")
    found = question.run([pair[0], wider], TASK)
    assert found.summary["controls"][0]["rank"] == 3
    assert CURVE_SPACES["aligned"].prepare is not None
