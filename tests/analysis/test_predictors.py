"""Rank correlations of numbers of pairs with what merges lose: closed forms, honest intervals, and what is refused."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from making_adapters import lora, write

from lora_lab.adapters.adapter import Adapter
from lora_lab.analysis.comparing import Compare
from lora_lab.analysis.merge_tables.predictors import forecast, rank_correlation
from lora_lab.analysis.merge_tables.table import ALONE
from lora_lab.errors import MismatchError, OptionError
from lora_lab.results import schema
from lora_lab.results.result import Result, columns


@pytest.fixture
def seeds(tmp_path):
    return [Adapter.load(write(tmp_path / f"s{i}", lora(rows=30, columns=20, seed=i))) for i in range(4)]


def merged(adapters, loss, *, merge="average", ratio="1:1", kind="compare-merges", seeds=True):
    """A result in which the merge of every pair loses so many nats and half as much of its accuracy, .8 alone.

    Seeds of one task are scored once, beside the mean of both; others once each.
    """
    rows = []
    for i, adapter in enumerate(adapters):
        rows.append({"set": f"alone {adapter.label}", "merge": ALONE, "adapter": adapter.label, "loss": 0.25 + i})
        rows[-1] |= {"accuracy": 0.8, "chosen": True, "ratio": None, "category": "reference"}
    for i, j in itertools.combinations(range(len(adapters)), 2):
        for k, chosen in itertools.product((i,) if seeds else (i, j), (True, False)):
            lost = loss(i, j) if chosen else 9.0
            own = 0.25 + ((i + j) / 2 if seeds else k)
            cells = {"accuracy": 0.8 * (1 - lost / 2), "loss": own + lost, "chosen": chosen, "category": "equal rank"}
            where = {
                "set": f"lora {ratio} of {i}, {j}" if seeds else f"lora, seed {i}{j}",
                "ratio": ratio if seeds else None,
            }
            rows.append({**where, "merge": merge, "adapter": adapters[k].label, **cells})
            rows.append({**rows[-1], "merge": "ensemble", "category": "reference", "loss": 7.0})
    said = [{"label": adapter.label, "norm": adapter.total_norm} for adapter in adapters]
    metrics = {"accuracy": {"about": "share right", "unit": "share", "higher": True}}
    return Result(kind, columns(rows), {"adapters": said, "metrics": metrics}, {}, {})


@pytest.mark.parametrize("one_task", [True, False])
def test_a_merge_that_loses_what_pairs_lack_in_cosine_is_told_by_the_cosine(seeds, one_task):
    pairs = {tuple(row["indices"]): row for row in Compare().run(seeds).rows(level="total")}
    result = Compare(levels=()).run(
        seeds, merges=[merged(seeds, lambda i, j: 1 - pairs[i, j]["cosine"], seeds=one_task)]
    )
    assert schema.why_not(result.kind, result.schema, result.columns, result.summary) is None
    rows = {(row["outcome"], row["predictor"]): row for row in result.summary["forecast"]}
    assert {row["merge"] for row in result.summary["forecast"]} == {"average"}
    for outcome, factor in (("loss", 1), ("accuracy", 0.5)):
        row = rows[outcome, "cosine"]
        assert row["correlation"] == pytest.approx(-1)
        assert row["correlation_low"] == pytest.approx(-1)
        assert -0.99 < row["correlation_high"] < 0.5  # six pairs of four adapters tell little
        assert (row["merge"], row["sets"], row["adapters"]) == ("average", 6, 4)
        np.testing.assert_allclose(
            sorted(row["points"]), sorted([p["cosine"], factor * (1 - p["cosine"])] for p in pairs.values())
        )
    x, y = np.array(rows["loss", "norm_ratio"]["points"]).T
    ratios = [max(p["norm_ratio"], 1 / p["norm_ratio"]) for p in pairs.values()]
    assert sorted(x) == pytest.approx(sorted(ratios))
    assert rows["loss", "norm_ratio"]["correlation"] == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert ("loss", "sign_excess") not in rows  # signs were not counted
    assert Compare(levels=()).run_id(seeds) != Compare(levels=()).run_id(seeds, None, [merged(seeds, lambda i, j: i)])


@pytest.mark.parametrize(("unit", "higher", "sign"), [("", True, -1), ("", False, 1)])
def test_a_metric_that_is_no_share_is_lost_by_as_much_as_it_gets_worse(seeds, unit, higher, sign):
    pairs = {tuple(row["indices"]): row for row in Compare().run(seeds).rows(level="total")}
    result = merged(seeds, lambda i, j: 1 - pairs[i, j]["cosine"])
    rows = [{**row, "odds": sign * (row.pop("loss") + 0.5)} | {"loss": 1.0} for row in result.rows()]
    named = {"odds": {"about": "made up", "unit": unit, "higher": higher}}
    other = Result(result.kind, columns(rows), {**result.parameters, "metrics": named}, {}, {})
    found = {
        (row["outcome"], row["predictor"]): row
        for row in Compare(levels=()).run(seeds, merges=[other]).summary["forecast"]
    }
    assert {outcome for outcome, _ in found} == {"odds", "loss"}
    row = found["odds", "cosine"]
    assert row["correlation"] == pytest.approx(-1)  # the less alike, the more is lost
    np.testing.assert_allclose(sorted(row["points"]), sorted([p["cosine"], 1 - p["cosine"]] for p in pairs.values()))
    with pytest.raises(OptionError, match="results of merges by accuracy and by odds; a forecast is of one metric"):
        Compare(levels=()).run(seeds, merges=[result, other])


def without_own(result):
    """The merges alone, as of seeds that were compared in the ratio 1:1 only."""
    return replace(result, columns=columns([row for row in result.rows() if row["merge"] != ALONE]))


def test_what_cannot_be_correlated_is_told_in_one_line(seeds, tmp_path):
    pairs = {tuple(row["indices"]): row for row in Compare().run(seeds).rows(level="total")}
    whole = merged(seeds, lambda i, j: i + j)
    other = Adapter.load(write(tmp_path / "other" / "s1", lora(rows=30, columns=20, seed=9)))
    for adapters, results, error, text in [
        (
            seeds,
            [merged(seeds[:3], lambda i, j: i)],
            OptionError,
            "^3 sets of these adapters .by their labels. in the results",
        ),
        (seeds, [merged(seeds, lambda i, j: i, ratio="1:2")], OptionError, "^0 sets of these adapters"),
        (seeds, [without_own(merged(seeds, lambda i, j: i))], OptionError, "no adapter's own score.*ratio 0:1 has it$"),
        (seeds[:3], [whole], OptionError, "^3 sets of these adapters"),
        (
            [*seeds[:1], other, *seeds[2:]],
            [whole],
            MismatchError,
            "s1: ‖ΔW‖ is .* of the s1 whose merges were compared",
        ),
        (
            seeds,
            [merged(seeds, lambda i, j: i, kind="sweep")],
            OptionError,
            "^a result of sweep was given; those of comp",
        ),
    ]:
        with pytest.raises(error, match=text) as raised:
            forecast(adapters, pairs, results)
        assert "\n" not in str(raised.value)
        with pytest.raises(error, match=text):
            Compare().check(adapters, merges=results)


def test_a_constant_has_no_correlation():
    pairs = [(i, i + 1) for i in range(6)]
    assert rank_correlation(np.ones(6), np.arange(6.0), pairs) == (None, None, None)


def test_of_pairs_apart_the_interval_is_the_usual_one():
    """Bonett & Wright's, with Student's t for the adapters; by hand for ρ = .6 of ten pairs of twenty adapters."""
    x, y = np.arange(10.0), np.array([0, 1, 5, 2, 9, 4, 8, 3, 6, 7.0])
    rho = scipy.stats.spearmanr(x, y).statistic
    value, low, high = rank_correlation(x, y, [(2 * i, 2 * i + 1) for i in range(10)])
    half = scipy.stats.t.ppf(0.975, 19) * math.sqrt((1 + rho**2 / 2) / 7)
    assert value == pytest.approx(rho)
    assert low <= math.tanh(math.atanh(rho) - half) + 1e-12
    assert high >= math.tanh(math.atanh(rho) + half) - 1e-12


@pytest.mark.parametrize(("adapters", "weight"), [(5, 1.0), (8, 1.0), (8, 0.0), (12, 3.0)])
def test_intervals_hold_the_truth_though_pairs_share_adapters(adapters, weight):
    """Numbers of pairs with an effect of each adapter; ρ is that of a population of 400 adapters (3 s)."""

    def draw(rng, count):
        own, extra = rng.normal(size=(2, count)), rng.normal(size=(2, count, count))
        pairs = list(itertools.combinations(range(count), 2))
        i, j = np.array(pairs).T
        x = weight * (own[0, i] + own[0, j]) + extra[0, i, j]
        return x, 0.8 * x + weight * (own[1, i] + own[1, j]) + extra[1, i, j], pairs

    x, y, _ = draw(np.random.default_rng(99), 400)
    truth = scipy.stats.spearmanr(x, y).statistic
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        _, low, high = rank_correlation(*draw(rng, adapters))
        held += low <= truth <= high
    assert held >= 0.9 * 200
