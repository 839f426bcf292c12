import math
from dataclasses import replace
from math import comb
from types import SimpleNamespace

import numpy as np
import pytest
from peft import LoHaConfig
from scipy import stats
from test_game import TARGETS, random_adapter

from lora_lab.adapters.groups import players
from lora_lab.analysis.coalitions.game import Game
from lora_lab.analysis.coalitions.keep_sets import KeepSetScores, _interval
from lora_lab.analysis.coalitions.stability import keep_sets
from lora_lab.analysis.questions import Stability
from lora_lab.errors import LoraLabWarning, OptionError
from lora_lab.games.coalitions import all_coalitions
from lora_lab.games.progressive import binomial, inequality, stratum
from lora_lab.results.stats import Sampled, half_of_strata, proportion
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.tasks.scores.metrics import METRICS
from lora_lab.tasks.task import Scores

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return random_adapter(tmp_path_factory.mktemp("stability") / "a", scale=0.1)


@pytest.fixture(scope="module")
def result(adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return Stability(split="validation", grid=(0.0, 0.3, 0.5, 1.0)).run(
        [adapter], Digits("relabel"), Execution(cache=folder)
    )


@pytest.fixture(scope="module")
def scores(adapter):
    game = Game(Evaluator([adapter], Digits("relabel"), split="validation"), players(adapter))
    return game.scores(all_coalitions(4), logits=True), game.evaluator.labels


SIZES = all_coalitions(4).sum(1)


def test_the_curve_by_size_averages_all_keep_sets(result, scores):
    losses = np.array([s.mean_loss for s in scores[0]])
    for k in range(5):
        (row,) = result.rows(rescaled=False, family="k-of-G", label=str(k))
        own = losses[k == SIZES]
        assert row["sets"] == len(own)
        assert row["loss"] == pytest.approx(own.mean(), abs=1e-6)
        assert row["loss_worst"] == pytest.approx(own.max(), abs=1e-6)
        assert row["loss_spread"] == pytest.approx(own.std(ddof=1) if len(own) > 1 else 0, abs=1e-6)


def test_the_curve_by_probability_is_the_expectation_over_independent_coins(result, scores):
    shares = np.array([s.accuracy for s in scores[0]])
    for p in (0.0, 0.3, 0.5, 1.0):
        weights = p**SIZES * (1 - p) ** (4 - SIZES)
        (row,) = result.rows(rescaled=False, family="p", label=f"{p:g}")
        assert row["accuracy"] == pytest.approx(weights @ shares, abs=1e-6)
        assert row["accuracy_worst"] == pytest.approx(shares[weights > 0].min(), abs=1e-6)  # of those that can come


def test_accuracies_have_the_intervals_of_errors_and_epsilon_is_of_errors(result, scores):
    """1 − what `proportion` says of wrong answers, and the largest rise of their share by a paired bootstrap."""
    wrong = np.stack([np.logical_not(s.correct) for s in scores[0]])
    for k in range(5):
        (row,) = result.rows(rescaled=False, family="k-of-G", label=str(k))
        value, low, high = proportion(wrong[k == SIZES].astype(np.float64).mean(0))
        found = [row[name] for name in ("accuracy", "accuracy_low", "accuracy_high")]
        assert found == pytest.approx([1 - value, 1 - high, 1 - low], abs=1e-9)
    (summary, _) = result.summary["adapters"]
    (row,) = [r for r in summary["epsilon"] if (r["family"], r["metric"]) == ("non-empty keep-sets", "accuracy")]
    expected = Sampled.of(wrong[[15, *range(1, 15)]], seed=0).largest(lambda means: means[1:] - means[0])
    assert [row["value"], row["low"], row["high"]] == pytest.approx(expected, abs=1e-9)
    assert summary["accuracy"] == pytest.approx(1 - wrong[15].mean())


def test_the_inequality_is_that_of_the_loss_whatever_metric_is_asked_for(adapter):
    asked = {"grid": (0.3,), "rescale": False, "examples": 20}
    found = [Stability(**asked, metric=metric).run([adapter], Digits("relabel")) for metric in ((), ("accuracy",))]
    one, other = (each.summary["adapters"][0]["inequality"] for each in found)
    assert one == other
    assert len(one) == 2
    assert not [name for name in found[1].columns if name.startswith("loss")]


def test_leaving_one_out_and_one_alone(result, scores):
    losses = np.array([s.mean_loss for s in scores[0]])
    for family, places in (("leave-one-out", [15 - 2**i for i in range(4)]), ("one-alone", [2**i for i in range(4)])):
        rows = result.rows(rescaled=False, family=family)
        assert [row["loss"] for row in rows] == pytest.approx(losses[places], abs=1e-6)
        assert [row["label"] for row in rows] == [f"vit.layers.{i}" for i in range(4)]


def test_epsilon_is_the_largest_rise_and_names_its_keep_set(result, scores):
    losses = np.array([s.mean_loss for s in scores[0]])
    rise = losses - losses[15]
    found = {(row["family"], row["metric"]): row for row in result.summary["adapters"][0]["epsilon"]}
    proper = found["non-empty keep-sets", "loss"]
    assert proper["value"] == pytest.approx(rise[1:15].max(), abs=1e-6)
    assert proper["low"] <= proper["value"] <= proper["high"]
    assert not proper["lower_bound"]
    worst = 1 + int(rise[1:15].argmax())
    assert all((f"vit.layers.{i}" in proper["worst_set"]) == bool(worst >> i & 1) for i in range(4)) or (
        "all but" in proper["worst_set"]
    )
    one = found["leave-one-out", "loss"]
    assert one["value"] == pytest.approx(max(rise[15 - 2**i] for i in range(4)), abs=1e-6)


@pytest.mark.parametrize("law", ["independent", "at least one"])
def test_both_sides_of_the_inequality_and_the_inequality(result, scores, law):
    """All 16 keep-sets are there, so that both sides are sums over the law's own masks, and exact."""
    found, labels = scores
    rows = [row for row in result.summary["adapters"][0]["inequality"] if row["law"] == law]
    for row, p in zip(rows, (0.0, 0.3, 0.5, 1.0), strict=True):
        weights = p**SIZES * (1 - p) ** (4 - SIZES)
        if law == "at least one":
            weights = np.where(SIZES > 0, weights, 0) / (1 - (1 - p) ** 4) if p else (SIZES == 1) / 4
        assert weights.sum() == pytest.approx(1)
        assert row["left"] == pytest.approx(weights @ [s.mean_loss for s in found], abs=1e-5)
        right = 0.0
        for k in range(5):
            logits = np.mean([s.logits for s, size in zip(found, SIZES, strict=True) if size == k], axis=0)
            log_total = np.log(np.exp(logits).sum(1))
            mean = (log_total - logits[np.arange(len(labels)), labels]).mean()
            right += weights[k == SIZES].sum() * mean
        assert row["right"] == pytest.approx(right, abs=1e-5)
        assert row["gap"] >= -1e-9
        assert (row["gap"] > 1e-4) == (0 < p < 1 or (law == "at least one" and p == 0))  # one mask alone has none


def test_rescaled_keep_sets_have_their_updates_multiplied(adapter, result):
    game = Game(
        Evaluator([adapter], Digits("relabel"), split="validation"), players(adapter), worth="loss", rescale=True
    )
    expected = -game(all_coalitions(4)[SIZES == 2]).mean()
    (row,) = result.rows(rescaled=True, family="k-of-G", label="2")
    assert row["loss"] == pytest.approx(expected, abs=1e-6)
    assert row["loss"] != pytest.approx(result.rows(rescaled=False, family="k-of-G", label="2")[0]["loss"], abs=1e-3)


def test_fixed_patterns_are_scored(adapter, result):
    evaluator = Evaluator([adapter], Digits("relabel"), split="validation")
    even = [name for name in evaluator.names if ".0." in name or ".2." in name]
    (row,) = result.rows(family="fixed", label="even", rescaled=False)
    assert row["loss"] == pytest.approx(evaluator.scores([evaluator.keeping(even)])[0].mean_loss, abs=1e-6)


def test_fixed_patterns_are_rescaled_too(adapter, result):
    evaluator = Evaluator([adapter], Digits("relabel"), split="validation")
    low = [name for name in evaluator.names if ".0." in name or ".1." in name]
    (row,) = result.rows(family="fixed", label="low", rescaled=True)
    assert row["loss"] == pytest.approx(evaluator.scores([evaluator.keeping(low, 2.0)])[0].mean_loss, abs=1e-6)


def test_progress_is_of_all_adapters_and_of_both_scalings(adapter):
    told = []
    on = Execution(progress=lambda done, total: told.append((done, total)))
    asked = Stability(examples=8, samples=4, grid=(0.5,), rescale=True)
    result = asked.run([adapter, replace(adapter, source="another")], Digits("relabel"), on)
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert {total for _, total in told} == {len(told)}
    assert len(told) > 2 * result.summary["adapters"][0]["keep_sets"]


def test_adapters_of_one_parity_and_of_different_players(adapter):
    from lora_lab.pruning.modules import keep_modules

    even = keep_modules(adapter, [name for name in adapter.sites if ".0." in name or ".2." in name])
    found = Stability(examples=20, rescale=False).run([even], Digits("relabel"))
    assert "odd" not in {row["label"] for row in found.rows(family="fixed")}
    with pytest.raises(OptionError, match="2, 4 players; look at them one by one"):
        Stability(examples=20).run([adapter, even], Digits("relabel"))


def test_sampled_keep_sets_estimate_the_enumerated_ones(adapter):
    by = {f"{kind}{i}": rf"layers\.{i}\..*{kind}" for i in range(4) for kind in ("proj", "fc1")}
    every, shorten = (
        Stability(players=by, samples=20, every=flag, rescale=False, examples=25).run([adapter], Digits("relabel"))
        for flag in (True, False)
    )
    assert every.summary["adapters"][0]["exhaustive"]
    assert not shorten.summary["adapters"][0]["exhaustive"]
    inside = []
    for row in shorten.rows(family="k-of-G"):
        (truth,) = every.rows(family="k-of-G", label=row["label"])
        inside.append(row["loss_low"] <= truth["loss"] <= row["loss_high"])
        assert row["loss_high"] - row["loss_low"] >= truth["loss_high"] - truth["loss_low"] - 0.3
    assert np.mean(inside) > 0.9
    assert shorten.summary["adapters"][0]["epsilon"][0]["lower_bound"]


def test_tuners_without_a_scale_are_not_rescaled(tmp_path):
    loha = random_adapter(tmp_path / "l", LoHaConfig(r=2, target_modules=TARGETS), scale=0.2)
    found = Stability(examples=20).run([loha], Digits("relabel"))
    assert {row["rescaled"] for row in found.rows()} == {False}


def test_a_keep_set_whose_loss_is_not_finite_is_named_and_left_out(adapter):
    import dataclasses

    import torch

    key = adapter.sites["vit.layers.1.mlp.fc1"].keys["lora_B"]
    lone = {**adapter.tensors, key: torch.full_like(adapter.tensors[key], torch.finfo(torch.float32).max)}
    broken = dataclasses.replace(adapter, tensors=lone)
    with pytest.warns(LoraLabWarning, match="not finite"), pytest.raises(Exception, match="with everything on"):
        Stability(examples=20, rescale=False).run([broken], Digits("relabel"))


@pytest.mark.parametrize(("n", "samples"), [(4, 100), (7, 10), (40, 6)])
def test_keep_sets_of_a_size_are_different_and_as_many_as_there_are(n, samples):
    found = keep_sets(n, samples, seed=1)
    assert len(np.unique(found, axis=0)) == len(found)
    sizes = np.bincount(found.sum(1), minlength=n + 1)
    assert sizes.tolist() == [min(samples, comb(n, k)) for k in range(n + 1)]
    assert (found == keep_sets(n, samples, seed=1)).all()


def test_binomial_weights():
    assert binomial(3, 0.25) == pytest.approx([27 / 64, 27 / 64, 9 / 64, 1 / 64])
    assert binomial(5, 0.0).tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"samples": 1}, "samples is 1"),
        ({"grid": (0.2, 1.5)}, "p is 1.5"),
        ({"players": "x"}, "unknown set of players"),
    ],
)
def test_options_that_cannot_be_are_refused(adapter, options, text):
    with pytest.raises(OptionError, match=text):
        Stability(**{"samples": 5, "grid": (0.5,), **options}).check([adapter])


def test_intervals_of_few_keep_sets_are_students(adapter):
    found = Stability(players="module", samples=3, every=False, examples=40, rescale=False).run(
        [adapter], Digits("relabel")
    )
    sampled = [row for row in found.rows(family="k-of-G") if not row["exhaustive"]]
    assert sampled
    for row in sampled:
        assert row["sets"] == 3
        by_sets = stats.t.ppf(0.975, 2) * row["loss_spread"] / math.sqrt(3)
        assert row["loss_high"] - row["loss"] > by_sets  # and the examples' share
    one = half_of_strata([(0.04, 3)])
    assert one == pytest.approx(stats.t.ppf(0.975, 2) * 0.2)
    assert half_of_strata([(0.04, 30), (0.04, 30)]) == pytest.approx(stats.t.ppf(0.975, 58) * math.sqrt(0.08))
    assert half_of_strata([]) == 0


def test_the_interval_of_epsilon_holds_the_true_one():
    """Twelve keep-sets are equally bad: the largest rise found is above the true one, in resamples higher still."""
    generator, inside = np.random.default_rng(0), []
    for seed in range(60):
        whole = generator.random(500) < 0.1
        redrawn = generator.random((12, 500)) < 0.08
        kept = np.where(redrawn, generator.random((12, 500)) < 0.1 + 0.01 / 0.08, whole)
        sampled = Sampled.of(np.vstack([whole, kept]).astype(float), seed=seed, resamples=300)
        _, low, high = sampled.largest(lambda L: L[1:] - L[0])
        inside.append(low <= 0.01 <= high)
    assert np.mean(inside) > 0.9


def test_without_keep_sets_that_kept_their_logits_there_is_no_inequality():
    assert list(inequality({}, 3, (0.2, 0.5))) == []
    one = {1: stratum(np.zeros((3, 2, 4)), np.zeros(2, int), 3)}
    assert [(row["law"], row["p"]) for row in inequality(one, 3, (0.0,))] == [("at least one", 0.0)]
    assert [row["covered"] for row in inequality(one, 3, (0.5,))] == pytest.approx([3 / 7, 3 / 8])


class Known:
    """A game of known losses on a few examples, in place of one on a model: 6 players, each of another weight."""

    n_players, rescale = 6, False

    def __init__(self):
        self.player_names = [f"p{i}" for i in range(6)]
        self.players = SimpleNamespace(left_out=[])
        task = SimpleNamespace(
            name="known",
            classifies=False,
            needs_logits=False,
            metrics=("accuracy", "loss"),
            metric=METRICS.__getitem__,
            columns=lambda scores, examples: scores.columns,
        )
        self.evaluator = SimpleNamespace(
            task=task,
            adapter=SimpleNamespace(source="known"),
            data=None,
            examples=2,
            scores=lambda masks, logits: [],
        )

    def losses(self, sets):
        """2 − the share of the weights 1 … 6 that is on, and .3 where both of the first two are off."""
        return 2 - sets @ np.arange(1, 7) / 21 + 0.3 * ~sets[:, :2].any(1)

    def scores(self, sets, *, logits):
        return [
            Scores.judged(loss + np.array([-0.1, 0.1]), np.array([True, False]), np.zeros(2))
            for loss in self.losses(sets)
        ]

    def mask(self, row):
        return row

    def warn(self, why, coalitions, of):
        assert not coalitions

    def name_of(self, row):
        return "".join("01"[int(on)] for on in row)


def seen(sets):
    game = Known()
    return game, KeepSetScores(game, sets, {}, seed=0)


def test_epsilon_of_each_family_is_that_of_its_keep_sets():
    game, found = seen(all_coalitions(6))
    every = all_coalitions(6)
    size, rise = every.sum(1), game.losses(every) - 1
    epsilon = {row["family"]: row["value"] for row in found.summary(())["epsilon"] if row["metric"] == "loss"}
    assert epsilon["non-empty keep-sets"] == pytest.approx(rise[(size > 0) & (size < 6)].max())
    assert epsilon["half or more kept"] == pytest.approx(rise[(size >= 3) & (size < 6)].max())
    assert epsilon["half or more kept"] > rise[(size > 3) & (size < 6)].max() + 0.1  # halves are among them
    assert epsilon["leave-one-out"] == pytest.approx(6 / 21)


@pytest.mark.parametrize("p", [0.25, 0.7])
def test_the_spread_of_the_p_curve_is_that_over_its_masks(p):
    game, found = seen(all_coalitions(6))
    every = all_coalitions(6)
    chances, losses = p ** every.sum(1) * (1 - p) ** (6 - every.sum(1)), game.losses(every)
    (row,) = [row for row in found.rows((p,)) if row["family"] == "p"]
    assert row["loss"] == pytest.approx(chances @ losses)
    assert row["loss_spread"] == pytest.approx(math.sqrt(chances @ losses**2 - (chances @ losses) ** 2))


def test_the_interval_of_the_p_curve_adds_the_variances_of_its_sizes():
    """Sizes 0 to 6, 4 keep-sets of each that has more: Σ weight² s²/4 · (1 − 4/there are), and that of the examples."""
    sets = keep_sets(6, 4, seed=3)
    game, found = seen(sets)
    losses, size = game.losses(sets), sets.sum(1)
    parts, spread = [], 0.0
    mean = 0.0
    for k in range(7):
        own, of = losses[size == k], comb(6, k)
        mean += binomial(6, 0.4)[k] * own.mean()
        s2 = own.var(ddof=1) if len(own) > 1 else 0.0
        spread += binomial(6, 0.4)[k] * (s2 * (of - 1) / of + own.mean() ** 2)
        if len(own) < of:
            parts.append((binomial(6, 0.4)[k] ** 2 * s2 / 4 * (1 - 4 / of), 4))
    (row,) = [row for row in found.rows((0.4,)) if row["family"] == "p"]
    by_examples = stats.t.ppf(0.975, 1) * 0.1  # two examples, at −.1 and .1
    assert row["loss"] == pytest.approx(mean)
    assert row["loss_high"] - row["loss"] == pytest.approx(math.hypot(half_of_strata(parts), by_examples))
    assert row["loss_spread"] == pytest.approx(math.sqrt(spread - mean**2))
    (three,) = [row for row in found.rows(()) if row["family"] == "k-of-G" and row["label"] == "3"]
    by_sets = stats.t.ppf(0.975, 3) * losses[size == 3].std(ddof=1) / 2 * math.sqrt(1 - 4 / 20)
    assert three["loss_high"] - three["loss"] == pytest.approx(math.hypot(by_sets, by_examples))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_curves_of_sampled_keep_sets_hold_those_of_all(share):
    """By size and by p, from 5 keep-sets of each size; the examples are the same ones, and two are enough."""
    every = all_coalitions(6)
    chances = share ** every.sum(1) * (1 - share) ** (6 - every.sum(1))
    inside = []
    for seed in range(60):
        game, found = seen(keep_sets(6, 5, seed=seed))
        losses = game.losses(every)
        for row in found.rows((share,)):
            if row["family"] == "p":
                by_sets = math.sqrt((row["loss_high"] - row["loss"]) ** 2 - (stats.t.ppf(0.975, 1) * 0.1) ** 2 + 1e-12)
                inside.append(abs(row["loss"] - chances @ losses) <= by_sets + 1e-9)
            elif row["family"] == "k-of-G":
                by_sets = math.sqrt((row["loss_high"] - row["loss"]) ** 2 - (stats.t.ppf(0.975, 1) * 0.1) ** 2 + 1e-12)
                inside.append(abs(row["loss"] - losses[every.sum(1) == int(row["label"])].mean()) <= by_sets + 1e-9)
    assert np.mean(inside) > 0.9


def test_both_ends_of_a_mean_are_widened_by_the_choice_of_sets():
    """11, 12, 13: t₂·√(1/3) for the examples, and 3 besides; root of the sum of squares to either side."""
    row = _interval("loss", METRICS["loss"], np.array([11.0]), np.array([11.0, 12.0, 13.0]), 3.0)
    half = math.hypot(4.302653 / math.sqrt(3), 3.0)
    assert (row["loss"], row["loss_low"], row["loss_high"]) == pytest.approx((12, 12 - half, 12 + half))
