import dataclasses
import json
import math
import time

import numpy as np
import pytest
from peft import LoHaConfig, LoraConfig
from test_game import TARGETS, random_adapter

from lora_lab.adapters.groups import players
from lora_lab.analysis.coalitions.balance import balance
from lora_lab.analysis.coalitions.game import Game
from lora_lab.analysis.coalitions.gates import GatedGame
from lora_lab.analysis.coalitions.shapley import choose, newest_adapter
from lora_lab.analysis.questions import Shapley
from lora_lab.errors import LoraLabWarning, OptionError
from lora_lab.files.trust import Origin
from lora_lab.games import estimators
from lora_lab.games.coalitions import all_coalitions
from lora_lab.games.interactions import interactions
from lora_lab.results.stats import student
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.kinds.digits import Digits

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapley")
    return [random_adapter(folder / f"s{seed}", seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def exact(adapters):
    return Shapley(worth="loss", split="validation", order=2).run(adapters, Digits("relabel"))


def test_exact_values_are_those_of_the_game(adapters, exact):
    for i, adapter in enumerate(adapters):
        game = Game(Evaluator([adapter], Digits("relabel"), split="validation"), players(adapter), worth="loss")
        worths = game(all_coalitions(4))
        expected = estimators.exact(lambda c, w=worths: w[c @ (1 << np.arange(4))], 4).values
        rows = exact.rows()[4 * i : 4 * i + 4]
        assert [row["value"] for row in rows] == pytest.approx(expected)
        assert [row["se"] for row in rows] == [0] * 4
        assert exact.summary["adapters"][i]["estimator"] == "exact"
        assert exact.summary["adapters"][i]["full"] == pytest.approx(worths[-1])
        assert exact.summary["adapters"][i]["efficiency_gap"] < 1e-10
        pairs = interactions(game, 4, every=True).values
        assert np.array(exact.summary["adapters"][i]["interactions"]["values"]) == pytest.approx(pairs)


def test_progress_is_of_all_adapters(adapters):
    told = []
    on = Execution(progress=lambda *pieces: told.append(pieces))
    Shapley(estimator="exact", examples=8).run(adapters, Digits("relabel"), on)
    assert told == [(done, 32) for done in range(1, 33)]  # 2⁴ coalitions of each


def test_intervals_over_examples_are_those_of_per_example_values(adapters, exact):
    game = Game(Evaluator([adapters[0]], Digits("relabel"), split="validation"), players(adapters[0]), worth="loss")
    each = game.per_example(all_coalitions(4))
    values = estimators.exact(lambda c: np.zeros(len(c)), 4).weights @ each
    error = values.std(1, ddof=1) / np.sqrt(each.shape[1])
    for i, row in enumerate(exact.rows()[:4]):
        assert row["se_examples"] == pytest.approx(error[i])
        assert row["high"] - row["low"] == pytest.approx(2 * student(each.shape[1]) * error[i])


def test_two_estimates_from_the_same_coalitions_are_compared(adapters):
    found = Shapley(players="module", estimator="antithetic", samples=4, examples=20).run(
        adapters[:1], Digits("relabel")
    )
    summary = found.summary["adapters"][0]
    differences = [abs(row["value"] - row["second"]) for row in found.rows()]
    assert summary["disagreement"]["largest"] == pytest.approx(max(differences))
    assert summary["disagreement"]["estimator"] == "regression"
    draws = found.summary["adapters"][0]["draws"]
    for row in found.rows():
        half = np.hypot(student(draws) * row["se"], student(20) * row["se_examples"])
        assert row["high"] - row["value"] == pytest.approx(half)
        assert row["value"] - row["low"] == pytest.approx(half)
    assert summary["engine"]["block_evaluations"] < summary["engine"]["naive_block_evaluations"]
    trace = summary["trace"]
    assert [row["evaluations"] for row in trace] == sorted(row["evaluations"] for row in trace)


def test_the_default_enumerates_where_that_is_cheaper(adapters):
    evaluator = Evaluator([adapters[0]], Digits("relabel"))
    game = GatedGame(evaluator, players(adapters[0]))
    assert choose(Shapley(), game) == "exact"
    by_module = GatedGame(evaluator, players(adapters[0], "module"))
    assert choose(Shapley(samples=2), by_module) == "joint"
    assert choose(Shapley(budget=8), game) == "joint"


@pytest.mark.parametrize(
    ("config", "by", "expected"),
    [
        (LoraConfig(r=2, target_modules=TARGETS), "rank", "joint"),
        (LoraConfig(r=2, target_modules=TARGETS, use_dora=True), "module", "joint"),
        (LoraConfig(r=2, target_modules=TARGETS, use_dora=True), "rank", "antithetic"),
        (LoHaConfig(r=2, target_modules=TARGETS), "module", "antithetic"),
    ],
)
def test_where_nothing_has_a_gate_orders_are_drawn(tmp_path, config, by, expected):
    made = random_adapter(tmp_path / "a", config)
    game = GatedGame(Evaluator([made], Digits("relabel")), players(made, by))
    assert choose(Shapley(samples=2, budget=100), game) == expected


def test_the_cost_is_told_before_anything_is_computed(adapters):
    told = []

    def refuse(cost):
        told.append(cost)
        raise OptionError("no")

    with pytest.raises(OptionError, match="no"):
        Shapley(split="validation").run(adapters, Digits("relabel"), Execution(confirm=refuse))
    assert told[0].variants == 2 * 16
    assert Shapley(split="validation").cost(adapters[0], Digits("relabel")).variants == 16


@pytest.mark.parametrize("name", ["KernelSHAP", "SHAPIQ", "SVARMIQ", "KernelSHAPIQ", "UnbiasedKernelSHAP"])
def test_shapiq_estimates_on_the_same_game(adapters, exact, name):
    found = Shapley(worth="loss", split="validation", estimator=f"shapiq:{name}", budget=16).run(
        adapters[:1], Digits("relabel")
    )
    assert [row["value"] for row in found.rows()] == pytest.approx([row["value"] for row in exact.rows()[:4]], abs=1e-6)
    assert [row["se"] for row in found.rows()] == [None] * 4


def test_an_adapter_that_changes_nothing_contributes_nothing(tmp_path):
    with pytest.warns(LoraLabWarning, match="zero delta"):
        zero = random_adapter(tmp_path / "zero", scale=0.0)
    found = Shapley(split="validation").run([zero], Digits("relabel"))
    assert [row["value"] for row in found.rows()] == [0.0] * 4
    assert found.summary["adapters"][0]["variation"] is None


def test_values_for_choosing_come_from_the_validation_split(adapters, exact):
    found = Shapley(worth="loss", split="validation").values(adapters[0], Digits("relabel"))
    assert list(found.values()) == pytest.approx([row["value"] for row in exact.rows()[:4]])


def test_adapters_with_different_players_keep_their_own_values(adapters, exact):
    from lora_lab.pruning.modules import keep_modules
    from lora_lab.results.result import by_adapter

    few = keep_modules(adapters[1], [name for name in adapters[1].sites if ".1." in name])
    found = Shapley(worth="loss", split="validation").run([adapters[0], few], Digits("relabel"))
    shown = {rows[0]["adapter"]: rows for rows in by_adapter([found])}
    assert [len(rows) for rows in shown.values()] == [4, 1]
    assert [row["value"] for row in shown["s0"]] == pytest.approx([row["value"] for row in exact.rows()[:4]])


def test_what_shapiq_asked_for_is_counted_whatever_is_known(adapters, tmp_path):
    options = {"estimator": "shapiq:PermutationSamplingSV", "budget": 10, "examples": 20}
    on = Execution(cache=tmp_path)
    counts = [
        Shapley(**options).run(adapters[:1], Digits("relabel"), on).summary["adapters"][0]["evaluations"]
        for _ in range(2)
    ]
    assert counts[0] == counts[1] > 4


def test_balance_of_equal_and_of_single_contributions():
    assert balance(np.full(6, 2.0)) == {"variation": 0.0, "top_third": pytest.approx(1 / 3)}
    assert balance(np.array([1.0, 0, 0]))["top_third"] == 1
    assert balance(np.array([1.0, 2, 6]))["variation"] == pytest.approx(math.sqrt(7) / 3)  # n − 1
    assert balance(np.array([-1.0, -2, -6]))["variation"] == pytest.approx(math.sqrt(7) / 3)
    assert np.isnan(balance(np.zeros(3))["variation"])


def test_the_newest_adapter_below_a_folder_is_found(tmp_path, adapters):
    assert newest_adapter(tmp_path) is None
    own = dataclasses.replace(adapters[0], record={"seed": 0}, origin=Origin(own=True))
    own.save(tmp_path / "runs" / "old.safetensors")
    time.sleep(0.02)
    own.save(tmp_path / "new")
    time.sleep(0.02)
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.safetensors").mkdir()
    own.save(tmp_path / ".hidden" / "newest.safetensors")
    (tmp_path / "model.safetensors").write_bytes((8).to_bytes(8, "little") + json.dumps({"a": 1}).encode())
    adapters[0].save(tmp_path / "somebody-elses.safetensors")
    assert newest_adapter(tmp_path) == tmp_path / "new"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"order": 3}, "order is 3; it must be from 1 to 2"),
        ({"order": 2, "budget": 99}, "a budget holds for values alone"),
        ({"estimator": "exct"}, r"did you mean 'exact'\?"),
        ({"estimator": "shapiq:RegressionFBII"}, "other indices than the Shapley value"),
        ({"estimator": "shapiq:PermutationSamplingSTII"}, "other indices than the Shapley value"),
        ({"estimator": "shapiq:Kernel"}, "unknown estimator of shapiq 'Kernel'.*KernelSHAP"),
        ({"players": "layrs"}, "unknown set of players 'layrs'"),
    ],
)
def test_options_that_cannot_be_are_refused(adapters, options, text):
    with pytest.raises(OptionError, match=text):
        Shapley(**options).check(adapters)
    with pytest.raises(OptionError, match="no adapter"):
        Shapley(players="layer").check([])
