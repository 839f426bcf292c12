import sqlite3

import making_adapters as adapters
import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoraConfig

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.groups import players
from lora_lab.analysis.coalitions.game import WORTHS, Game
from lora_lab.errors import LoraLabWarning, OptionError, TunerError
from lora_lab.files.ownership import JOURNAL
from lora_lab.games.coalitions import all_coalitions
from lora_lab.scoring.changes import Replacement
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Execution
from lora_lab.scoring.models import seconds_of
from lora_lab.tasks.kinds.digits import Digits

pytestmark = pytest.mark.usefixtures("few_digits")

TARGETS = r"vit\.layers\.[0-3]\..*(q_proj|v_proj|fc1)"


def random_adapter(folder, config=None, scale=0.06, seed=0):
    config = config or LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS)
    return adapters.random_adapter(Digits("relabel"), folder, config, seed=seed, scale=scale)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return random_adapter(tmp_path_factory.mktemp("game") / "a")


def game_of(adapter, by="layer", **options):
    kept = {name: options.pop(name) for name in ("worth", "rescale") if name in options}
    return Game(evaluator_of(adapter, **options), players(adapter, by), **kept)


def evaluator_of(adapter, *, cache=None, progress=None, split="validation", **options):
    return Evaluator([adapter], Digits("relabel"), Execution(cache=cache, progress=progress), split=split, **options)


def test_the_ends_are_the_base_and_the_adapter(adapter):
    task = Digits("relabel")
    for worth, of in {"accuracy": lambda scores: scores.correct, **WORTHS}.items():
        found = game_of(adapter, worth=worth)(np.array([[False] * 4, [True] * 4]))
        expected = [of(score(task, each, "validation")).mean() for each in (None, adapter)]
        assert found == pytest.approx(expected, abs=1e-6)


def test_what_helps_is_positive(adapter):
    task = Digits("relabel")
    scores = score(task, adapter, "validation")
    assert WORTHS["loss"](scores).mean() == -scores.mean_loss
    assert ((WORTHS["margin"](scores) > 0) == scores.correct).all()


@pytest.mark.parametrize("by", ["layer", "type", "module", "rank"])
def test_a_coalition_is_the_adapter_with_the_others_zeroed(adapter, by):
    game = game_of(adapter, by, examples=50)
    coalition = np.random.default_rng(0).random(game.n_players) < 0.5
    tensors = {key: tensor.clone() for key, tensor in adapter.tensors.items()}
    for on, units in zip(coalition, game.players.units.values(), strict=True):
        for name, rank in units:
            B = tensors[adapter.sites[name].keys["lora_B"]]
            B[:, slice(None) if rank is None else rank] *= float(on)
    zeroed = evaluator_of(Adapter(tensors, adapter.config, adapter.sites), examples=50)
    expected = zeroed.scores([zeroed.keeping(zeroed.names)])[0]
    assert game.scores(coalition)[0].loss == pytest.approx(expected.loss, abs=1e-5)


def test_rescaling_multiplies_the_updates_by_n_over_k(adapter):
    game = game_of(adapter, rescale=True, examples=50)
    coalition = np.array([True, False, False, True])
    on = {name for i in (0, 3) for name, _ in list(game.players.units.values())[i]}
    doubled = {name: update * 2.0 for name, update in adapter.updates.items() if name in on}
    plain = evaluator_of(adapter.with_updates(doubled, source="doubled"), examples=50)
    expected = plain.scores([plain.keeping(plain.names)])[0]
    assert game.scores(coalition)[0].loss == pytest.approx(expected.loss, abs=1e-5)


def test_single_ranks_are_rescaled_too(adapter):
    game = game_of(adapter, "rank", rescale=True, examples=50)
    coalition = np.arange(game.n_players) % 2 == 0  # the first rank of each module of two
    tensors = {key: tensor.clone() for key, tensor in adapter.tensors.items()}
    for site in adapter.sites.values():
        B = tensors[site.keys["lora_B"]]
        B[:, 1] = 0
        B *= 2
    doubled = evaluator_of(Adapter(tensors, adapter.config, adapter.sites), examples=50)
    expected = doubled.scores([doubled.keeping(doubled.names)])[0]
    assert game.scores(coalition)[0].loss == pytest.approx(expected.loss, abs=1e-5)


def test_a_damaged_entry_of_the_journal_is_computed_again(adapter, tmp_path):
    first = game_of(adapter, cache=tmp_path, examples=20)
    worths = first(all_coalitions(4))
    del first  # and its journal with it
    (journal,) = tmp_path.glob("*.sqlite")
    with sqlite3.connect(journal) as database:
        database.execute(f"UPDATE {JOURNAL} SET value = substr(value, 2)")
    database.close()
    again = game_of(adapter, cache=tmp_path, examples=20)
    with pytest.warns(LoraLabWarning, match=r"entries that are damaged, or another user's, are computed again"):
        assert (again(all_coalitions(4)) == worths).all()
    assert again.evaluator.evaluated == 16


def test_modules_of_no_player_stay_on_and_are_not_rescaled(adapter):
    game = game_of(adapter, {"first": r"layers\.0", "second": r"layers\.1"}, rescale=True)
    states = dict(zip(game.evaluator.names, game.mask(np.array([True, False])).states, strict=True))
    assert states["vit.layers.0.attention.q_proj"] == 2.0
    assert states["vit.layers.1.attention.q_proj"] == 0.0
    assert states["vit.layers.3.attention.q_proj"] == 1.0


def test_known_coalitions_cost_nothing(adapter, tmp_path):
    first = game_of(adapter, cache=tmp_path, examples=40)
    worths = first(all_coalitions(4))
    assert first.evaluator.evaluated == 16
    first(all_coalitions(4)[::-1])
    assert first.evaluator.evaluated == 16
    again = game_of(adapter, cache=tmp_path, examples=40)
    assert again.cost(all_coalitions(4)).variants == 0
    assert (again(all_coalitions(4)) == worths).all()
    assert (game_of(adapter, cache=tmp_path, examples=40, worth="loss")(all_coalitions(4)) < 0).all()
    assert again.evaluator.evaluated == 0
    by_module = game_of(adapter, "module", cache=tmp_path, examples=40)  # other players, some of the same variants
    assert by_module.cost(np.array([[False] * 12, [True] * 12])).variants == 0


def test_another_adapter_or_other_examples_are_another_journal(adapter, tmp_path):
    other = random_adapter(tmp_path / "b", seed=1)
    runs = {
        Evaluator([one], task, **options).run_of(options.get("split", "test"))
        for one, task in ((adapter, Digits("relabel")), (other, Digits("relabel")), (adapter, Digits("rot90")))
        for options in ({}, {"examples": 30}, {"split": "validation"})
    }
    assert len(runs) == 9


def test_examples_are_drawn_the_same_way_every_time(adapter):
    few, again = (evaluator_of(adapter, split="test", examples=30) for _ in range(2))
    assert (few.labels == again.labels).all()
    assert len(few.labels) == few.examples == 30
    with pytest.raises(OptionError, match="0 examples"):
        evaluator_of(adapter, examples=0)


def test_logits_are_kept_when_asked_for(adapter, tmp_path):
    game = game_of(adapter, cache=tmp_path, examples=20)
    coalition = np.array([[True, False, True, False]])
    plain = game.scores(coalition)[0]
    assert plain.logits is None
    with_logits = game.scores(coalition, logits=True)[0]
    assert with_logits.logits.shape == (20, 10)
    right = with_logits.logits[np.arange(20), game.evaluator.labels]
    others = np.where(np.eye(10)[game.evaluator.labels] > 0, -np.inf, with_logits.logits).max(1)
    assert with_logits.margin == pytest.approx(right - others, abs=1e-5)
    assert (with_logits.loss == plain.loss).all()
    again = game_of(adapter, cache=tmp_path, examples=20)
    assert (again.scores(coalition, logits=True)[0].logits == with_logits.logits).all()
    assert again.evaluator.evaluated == 0


def test_a_loss_that_is_not_finite_is_named_and_the_rest_is_kept(adapter):
    tensors = dict(adapter.tensors)
    key = adapter.sites["vit.layers.2.mlp.fc1"].keys["lora_B"]
    tensors[key] = torch.full_like(tensors[key], torch.finfo(torch.float32).max)
    broken = Adapter(tensors, adapter.config, adapter.sites, source="broken")
    game = game_of(broken, examples=20)
    with pytest.warns(LoraLabWarning, match=r"broken: the loss is not finite for 8 of 16 .*: vit\.layers\.2"):
        worths = game(all_coalitions(4))
    assert (np.isnan(worths) == all_coalitions(4)[:, 2]).all()


def test_the_cost_is_told_before(adapter):
    game = game_of(adapter)
    cost = game.cost(all_coalitions(4))
    assert cost.variants == 16
    assert cost.naive_block_evaluations == 16 * 6 * game.evaluator.batches
    game(all_coalitions(4))
    assert cost.block_evaluations == game.evaluator.effort.computed < cost.naive_block_evaluations
    assert cost.seconds > 0


def test_shapiq_takes_the_game_as_it_is(adapter):
    from shapiq import KernelSHAP

    from lora_lab.games.estimators import exact

    game = game_of(adapter, worth="loss", examples=40)
    found = KernelSHAP(n=4, random_state=0).approximate(budget=16, game=game)
    assert [found[(i,)] for i in range(4)] == pytest.approx(exact(game, 4).values, abs=1e-6)


def test_another_adapter_can_be_scored_in_its_place(adapter, tmp_path):
    other = random_adapter(tmp_path / "b", LoraConfig(r=5, lora_alpha=3, target_modules=TARGETS), seed=3)
    evaluator = evaluator_of(adapter, cache=tmp_path)
    whole = evaluator.scores([evaluator.keeping(evaluator.names)])[0]
    (found,) = evaluator.scores([Replacement("b", lambda _: other)])
    assert found.loss == pytest.approx(score(Digits("relabel"), other, "validation").loss, abs=1e-5)
    again = evaluator_of(adapter)
    assert (again.scores([again.keeping(again.names)])[0].loss == whole.loss).all()
    evaluator.known.clear()
    (known,) = evaluator.scores([Replacement("b", lambda _: pytest.fail("known already"))])
    assert (known.loss == found.loss).all()
    (base,) = evaluator.scores([Replacement("nothing", lambda _: None)])
    assert base.loss == pytest.approx(score(Digits("relabel"), None, "validation").loss, abs=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda a, f: game_of(a, worth="f1"),
            OptionError,
            "worth of task .*: 'f1'.*; there are: accuracy, loss, brier, ece, lo",
        ),
        (lambda a, f: game_of(a)(np.ones((1, 3), bool)), OptionError, "3 places for 4 players"),
        (lambda a, f: game_of(a).evaluator.keeping(["x"]), OptionError, "adapts no module x"),
        (
            lambda a, f: game_of(random_adapter(f, LoHaConfig(r=2, target_modules=TARGETS)), rescale=True),
            TunerError,
            "LOHA has no scale",
        ),
    ],
)
def test_games_that_cannot_be_are_refused(adapter, tmp_path, make, error, text):
    with pytest.raises(error, match=text):
        make(adapter, tmp_path / "x")


def test_an_interrupted_run_goes_on_with_the_same_numbers(adapter, tmp_path):
    def interrupt(done, _):
        if done >= 15:
            raise KeyboardInterrupt

    stopped = game_of(adapter, "module", split="test", cache=tmp_path / "cache", progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        stopped(all_coalitions(12)[::8])
    resumed = game_of(adapter, "module", split="test", cache=tmp_path / "cache")
    shorten = all_coalitions(12)[::8][:40]
    known = 40 - resumed.cost(shorten).variants
    assert known > 0
    fresh = game_of(adapter, "module", split="test")
    assert (resumed(shorten) == fresh(shorten)).all()
    assert resumed.evaluator.evaluated == 40 - known


def test_the_shortest_of_several_timings_is_taken(monkeypatch):
    durations = iter([9.0, 0.5, 0.1, 0.3])  # the first one warms up; with it, there is no time for more than one more
    clock = [0.0]

    def work():
        clock[0] += next(durations)

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert seconds_of(work) == 0.5
    durations = iter([0.1, 0.2, 0.05, 0.3, 0.2, 0.2])
    assert seconds_of(work) == pytest.approx(0.05)
