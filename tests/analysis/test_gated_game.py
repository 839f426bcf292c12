"""Gates of real adapters: their gradients are those of scaled adapters, example by example."""

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoraConfig
from test_game import TARGETS, evaluator_of, random_adapter

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.groups import players
from lora_lab.adapters.models.gates import Gates
from lora_lab.analysis.coalitions.gates import GatedGame
from lora_lab.analysis.questions import Shapley
from lora_lab.errors import LoraLabWarning, OptionError, TunerError
from lora_lab.games import estimators
from lora_lab.games.coalitions import all_coalitions
from lora_lab.results.stats import mean_and_error, student
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Execution
from lora_lab.scoring.gates import GatedPass, Passed
from lora_lab.scoring.sharing.workers import open_workers
from lora_lab.tasks.kinds import digits
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.tasks.kinds.language.language import NO_TARGET, CausalLM

pytestmark = pytest.mark.usefixtures("few_digits")

STEP = 0.02


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return random_adapter(tmp_path_factory.mktemp("gates") / "a")


class Halved(Digits):
    """The digits on a base in bfloat16."""

    def build_model(self):
        return super().build_model().bfloat16()


def gated_game(adapter, by="layer", worth="loss", task=None, **options):
    evaluator = Evaluator([adapter], task or Digits("relabel"), split="validation", examples=50, **options)
    return GatedGame(evaluator, players(adapter, by), worth=worth)


def passed(game, gate, **options):
    units = tuple(game.players.units.values())
    found = game.evaluator.answers([GatedPass(units, gate, game.worth, **options)])[0]
    found = found.smooth(game.worth, options.get("temperature", 2.0))
    return found.numbers, found.slopes, found.apart


def losses(adapter, units, gates):
    """Loss of every example where B's columns of each player are multiplied by its gate."""
    tensors = {key: tensor.clone() for key, tensor in adapter.tensors.items()}
    for gate, members in zip(gates, units.values(), strict=True):
        for name, rank in members:
            tensors[adapter.sites[name].keys["lora_B"]][:, slice(None) if rank is None else rank] *= gate
    scaled = evaluator_of(Adapter(tensors, adapter.config, adapter.sites), examples=50)
    return scaled.scores([scaled.keeping(scaled.names)])[0].loss


@pytest.mark.parametrize("by", ["layer", "type", "module", "rank"])
def test_slopes_are_the_finite_differences_of_scaled_adapters_on_every_example(adapter, by):
    game = gated_game(adapter, by)
    worths, slopes, apart = passed(game, 0.6)
    units, n = game.players.units, len(game.players)
    assert apart
    assert worths == pytest.approx(-losses(adapter, units, [0.6] * n), abs=2e-5)
    for player in (0, n // 2, n - 1):
        up, down = (0.6 + sign * STEP * (np.arange(n) == player) for sign in (1, -1))
        expected = -(losses(adapter, units, up) - losses(adapter, units, down)) / (2 * STEP)
        assert slopes[:, player] == pytest.approx(expected, rel=0.02, abs=3e-4)
        assert np.abs(expected).max() > 3e-3


@pytest.mark.filterwarnings("ignore:.*lora_B.bias")
@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}], ids=lambda o: next(iter(o), "plain")
)
def test_the_ends_are_the_coalitions_and_the_slopes_add_up(tmp_path, options):
    made = random_adapter(tmp_path / "a", LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, **options))
    game = gated_game(made)
    ends = game.per_example(np.array([[False] * 4, [True] * 4]))
    assert passed(game, 0.0)[0] == pytest.approx(ends[0], abs=1e-5)
    assert passed(game, 1.0)[0] == pytest.approx(ends[1], abs=1e-5)
    slope = (passed(game, 0.5 + STEP)[0] - passed(game, 0.5 - STEP)[0]) / (2 * STEP)
    assert passed(game, 0.5)[1].sum(1) == pytest.approx(slope, rel=0.02, abs=1e-3)
    assert game(all_coalitions(4)) == pytest.approx(gated_game(made)(all_coalitions(4)))  # nothing is left behind


def test_a_base_in_bfloat16_has_nearly_the_slopes_of_float32(adapter):
    half, single = passed(gated_game(adapter, task=Halved("relabel")), 0.5), passed(gated_game(adapter), 0.5)
    assert half[1].dtype == np.float32
    distance = np.linalg.norm(half[1].mean(0) - single[1].mean(0)) / np.linalg.norm(single[1].mean(0))
    assert 0 < distance < 0.1


def test_batches_of_another_size_change_nothing(adapter):
    game = gated_game(adapter)
    whole, cut = passed(game, 0.5), passed(game, 0.5, batch=7)
    assert cut[0] == pytest.approx(whole[0], abs=1e-5)
    assert cut[1] == pytest.approx(whole[1], abs=1e-4)


def test_rows_that_are_no_examples_keep_the_sum_of_the_slopes():
    gates = Gates(2)
    values = torch.full((3, 2), 0.5, requires_grad=True)
    gates.set(values)
    output = torch.arange(10.0).reshape(5, 2)
    (slope,) = torch.autograd.grad(gates.multiply(output, [1], -1).sum(), values)
    assert slope.sum(0).tolist() == pytest.approx([0, 45])
    assert not gates.apart


def test_examples_of_several_rows_have_intervals_only_one_by_one(adapter, monkeypatch):
    monkeypatch.setattr(Digits, "rows_are_examples", False)
    game = gated_game(adapter)
    assert not passed(game, 0.5)[2]
    assert passed(game, 0.5, batch=1)[2]
    rows = Shapley(worth="loss", estimator="gates", split="validation").run([adapter], Digits("relabel")).rows()
    assert [row["se_examples"] for row in rows] == [None] * 4


def test_accuracy_goes_by_the_smoothed_margin(adapter):
    game = gated_game(adapter, worth="accuracy")
    margin = gated_game(adapter, worth="margin").per_example(np.ones((1, 4), dtype=bool))[0]
    worths, *_ = passed(game, 1.0, temperature=3.0)
    assert worths == pytest.approx(1 / (1 + np.exp(-margin / 3)), abs=1e-5)
    found = game.along(np.array([0.5]), np.array([1.0]), temperature=3.0)
    assert found.ends[1] == pytest.approx(worths.mean(), abs=1e-6)


def test_the_answer_tells_the_gap_and_intervals_over_examples(adapter):
    task = Digits("relabel")
    result = Shapley(worth="loss", estimator="gates", split="validation").run([adapter], task)
    (summary,), rows = result.summary["adapters"], result.rows()
    game = GatedGame(Evaluator([adapter], task, split="validation"), players(adapter), worth="loss")
    x, w = np.polynomial.legendre.leggauss(3)
    slopes = sum(w[k] / 2 * passed(game, (x[k] + 1) / 2)[1].astype(float) for k in range(3))
    assert [row["value"] for row in rows] == pytest.approx(slopes.mean(0), abs=1e-6)
    assert [row["se"] for row in rows] == [0] * 4
    assert [row["se_examples"] for row in rows] == pytest.approx(mean_and_error(slopes)[1], rel=1e-4)
    assert rows[0]["high"] - rows[0]["low"] == pytest.approx(2 * student(80) * rows[0]["se_examples"])
    empty, full = game(np.array([[False] * 4, [True] * 4]))
    gap = abs(slopes.mean(0).sum() - (full - empty))
    assert summary["efficiency_gap"] == pytest.approx(gap, abs=1e-6)
    assert summary["gates"]["efficiency_gap"] == summary["efficiency_gap"]
    assert summary["evaluations"] == 2
    assert summary["gates"]["passes"] == 3
    assert summary["bias"]


def test_beside_coalitions_both_values_are_told(adapter):
    question = Shapley(worth="loss", estimator="antithetic+link", split="validation", samples=8)
    result = question.run([adapter], Digits("relabel"))
    alone = Shapley(worth="loss", estimator="gates", split="validation").run([adapter], Digits("relabel"))
    rows = result.rows()
    assert [row["gates"] for row in rows] == [row["value"] for row in alone.rows()]
    apart = max(abs(row["gates"] - row["value"]) for row in rows)
    assert result.summary["adapters"][0]["gates"]["largest"] == pytest.approx(apart)
    assert result.summary["adapters"][0]["bias"] is None
    assert all(row["se"] > 0 and row["se_examples"] > 0 for row in rows)


def test_passes_with_gradients_are_counted(adapter):
    on = Execution()
    costs = [
        Shapley(worth=worth, estimator="gates", options={"nodes": 4}, split="validation").cost(
            adapter, Digits("relabel"), on
        )
        for worth in ("loss", "accuracy")
    ]
    assert [cost.variants for cost in costs] == [2 + 12, 2 + 12]


@pytest.mark.parametrize("worth", ["loss", "accuracy"])
def test_a_killed_run_makes_no_pass_a_second_time(adapter, tmp_path, monkeypatch, worth):
    question = Shapley(worth=worth, estimator="joint", split="validation", samples=4)
    whole = question.run([adapter], Digits("relabel"))
    made, told = [], []

    def until_the_second(self, evaluator):
        made.append(self.gates)
        if len(made) == 2:
            raise KeyboardInterrupt
        return call(self, evaluator)

    call = GatedPass.__call__
    monkeypatch.setattr(GatedPass, "__call__", until_the_second)
    on = Execution(cache=tmp_path / "cache", progress=lambda done, total: told.append((done, total)))
    with pytest.raises(KeyboardInterrupt):
        question.run([adapter], Digits("relabel"), on)
    again = question.run([adapter], Digits("relabel"), on)
    assert len(made) == 2 + 2  # the first was kept, the second and third were not
    assert again.rows() == whole.rows()
    assert [each for each in told if each[1] == 3] == [(1, 3), (2, 3), (3, 3)]


def test_passes_of_a_journal_that_do_not_fit_are_made_again(adapter, tmp_path, monkeypatch):
    on = Execution(cache=tmp_path / "cache")
    kept = passed(gated_game(adapter, on=on), 0.5)
    monkeypatch.setattr(Passed, "packed", lambda self: {"numbers": "", "slopes": "", "apart": True, "smoothed": False})
    passed(gated_game(adapter, on=on), 0.25)
    with pytest.warns(LoraLabWarning, match=r"a pass that does not fit \(0 numbers, not 50\)"):
        passed(gated_game(adapter, on=on), 0.25)
    again = passed(gated_game(adapter, on=on), 0.5)
    assert (again[0] == kept[0]).all()
    assert (again[1] == kept[1]).all()


def test_gates_of_their_own_a_player(adapter):
    game = gated_game(adapter)
    mixed = (0.2, 1.0, 0.7, 0.0)
    worths, slopes, _ = passed(game, mixed)
    units = game.players.units
    assert worths == pytest.approx(-losses(adapter, units, mixed), abs=2e-5)
    up, down = ((0.2, 1.0, 0.7 + sign * STEP, 0.0) for sign in (1, -1))
    expected = -(losses(adapter, units, up) - losses(adapter, units, down)) / (2 * STEP)
    assert slopes[:, 2] == pytest.approx(expected, rel=0.02, abs=3e-4)


@pytest.mark.parametrize("by", ["layer", "rank"])
def test_taylor_is_the_product_of_the_weights_and_their_gradient(adapter, by):
    """∂f/∂g = ⟨B, ∂f/∂B⟩, by finite differences of B: f((1 ± ε) B_i)."""
    question = Shapley(by, worth="loss", estimator="taylor", split="validation", examples=50)
    result = question.run([adapter], Digits("relabel"))
    units = gated_game(adapter, by).players.units
    for player in (0, len(units) - 1):
        up, down = (1 + sign * STEP * (np.arange(len(units)) == player) for sign in (1, -1))
        expected = -(losses(adapter, units, up) - losses(adapter, units, down)).mean() / (2 * STEP)
        assert result.rows()[player]["value"] == pytest.approx(expected, rel=0.02, abs=3e-4)
    assert all(row["se_examples"] > 0 for row in result.rows())
    assert "ranking alone" in result.summary["adapters"][0]["bias"]
    assert question.cost(adapter, Digits("relabel")).variants == 2 + 3


@pytest.mark.filterwarnings("ignore:.*lora_B.bias")
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=lambda o: next(iter(o), "plain"))
def test_drop_is_the_share_of_the_outputs(tmp_path, options):
    made = random_adapter(tmp_path / "a", LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS, **options))
    game = gated_game(made)
    model = game.evaluator.models.attached.model
    norms, hooks = dict.fromkeys(game.players.names, 0.0), []
    for player, units in game.players.units.items():
        for name, _ in units:

            def beyond(layer, args, out, player=player):
                layer._disable_adapters = True
                norms[player] += float((out - layer.forward(*args)).double().square().sum())
                layer._disable_adapters = False

            hooks.append(game.evaluator.models.attached.layers[name].register_forward_hook(beyond))
    with torch.inference_mode():
        for batch in game.evaluator.models.batches(game.evaluator.drawn("validation")):
            game.evaluator.task.logits(model, batch)
    for hook in hooks:
        hook.remove()
    shares = np.array(list(norms.values())) / sum(norms.values())
    assert estimators.estimate(game, 4, estimator="drop").values == pytest.approx(shares, rel=1e-3)


def test_what_single_ranks_put_out_is_that_of_adapters_with_one_alone(tmp_path):
    made = random_adapter(tmp_path / "a", LoraConfig(r=2, lora_alpha=6, target_modules=r"vit\.layers\.0\..*fc1"))
    outputs = gated_game(made, "rank").outputs()
    for rank in (0, 1):
        tensors = {key: tensor.clone() for key, tensor in made.tensors.items()}
        (site,) = made.sites.values()
        tensors[site.keys["lora_B"]][:, 1 - rank] = 0
        alone = gated_game(Adapter(tensors, made.config, made.sites), "module")
        assert outputs[rank] == pytest.approx(alone.outputs()[0], rel=1e-4)


def test_without_pairs_intervals_are_those_of_the_prior(adapter):
    question = Shapley(worth="loss", estimator="joint", split="validation", samples=8, budget=2)
    for row in question.run([adapter], Digits("relabel")).rows():
        half = np.hypot(1.959964 * row["se"], student(80) * row["se_examples"])
        assert row["high"] - row["value"] == pytest.approx(half)
        assert row["se"] > 0


def test_joint_values_on_each_example_add_up_and_hold_its_margin(adapter):
    game = gated_game(adapter, worth="accuracy")
    found = estimators.estimate(game, 4, estimator="joint", samples=1, budget=8)
    by_example = found.known_of + found.weights @ game.per_example(found.coalitions)
    assert by_example.mean(1) == pytest.approx(found.values, abs=1e-9)
    ends = game.per_example(np.array([[False] * 4, [True] * 4]))
    assert by_example.sum(0) == pytest.approx(ends[1] - ends[0], abs=1e-6)


@pytest.mark.usefixtures("forked_workers")
def test_workers_give_the_same_numbers(adapter, few_digits, monkeypatch):
    monkeypatch.setattr(digits, "images", few_digits)  # which the workers have, too
    question = Shapley(worth="accuracy", estimator="joint", split="validation", samples=2)
    here = question.run([adapter], Digits("relabel"), Execution(device="cpu"))
    with open_workers(2, device="cpu") as workers:
        there = question.run([adapter], Digits("relabel"), Execution(workers=workers))
    assert there.rows() == here.rows()


@pytest.mark.parametrize(
    ("config", "question", "error", "text"),
    [
        (LoHaConfig(r=2, target_modules=TARGETS), {}, TunerError, "LOHA has no scale .*, so a gate means nothing"),
        (
            LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
            {"players": "rank"},
            TunerError,
            "single ranks have no gates",
        ),
        (LoraConfig(r=2, target_modules=TARGETS), {"options": {"nodes": 0}}, OptionError, "0 nodes"),
        (LoraConfig(r=2, target_modules=TARGETS), {"options": {"knots": 3}}, OptionError, "nodes"),
    ],
)
def test_what_has_no_gates_is_refused_by_name(tmp_path, config, question, error, text):
    made = random_adapter(tmp_path / "a", config)
    with pytest.raises(error, match=text):
        Shapley(worth="loss", estimator="gates", split="validation", **question).run([made], Digits("relabel"))


def test_targets_of_texts_are_those_that_are_judged():
    task = object.__new__(CausalLM)
    logits = torch.randn(3, 6, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(1))
    labels[1, 3:] = NO_TARGET
    scores, targets = (method(logits, {"labels": labels}) for method in (task.judge_logits, task.targets_of))
    assert targets.mean(targets.loss).numpy() == pytest.approx(scores.loss, abs=1e-6)
    assert targets.mean(targets.margin).numpy() == pytest.approx(scores.margin, abs=1e-6)
    assert targets.mean((targets.margin > 0).float()).numpy() == pytest.approx(scores.correct, abs=1e-6)
