"""What is merged fits together, or it is said what does not: weights, base models, shapes, absent modules."""

import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making_adapters import PREFIX, lora, product, write
from tiny_models import SHAPES, adapter, update, updates

from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import LoraLabWarning, MismatchError, OptionError, TunerError
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources, Weights, base_of
from lora_lab.tasks.kinds.digits import Digits

CASES = Path(__file__).parents[1] / "cases"
LAYERS = [f"model.layers.{i}.q_proj" for i in range(5)]


def layered(source: str = "a", **config) -> Adapter:
    return adapter({name: update(2, (4, 4), i) for i, name in enumerate([*LAYERS, "model.head"])}, source, **config)


# weights


def test_without_any_weights_each_counts_once():
    assert Sources([layered(), layered()]).weights_of(LAYERS[0]) == [1.0, 1.0]


@given(st.integers(-3, 12), st.floats(-2, 2), st.floats(-2, 2))
def test_a_line_over_layers_is_straight_between_its_points_and_flat_beyond(layer, low, high):
    weights = Weights((1.0, 1.0), layers=({2: low, 6: high}, {0: 1.0})).of("any", layer)
    t = min(max((layer - 2) / 4, 0), 1)
    assert weights == pytest.approx([(1 - t) * low + t * high, 1.0])


def test_a_line_gives_its_mean_to_a_module_outside_of_all_layers():
    sources = Sources([layered(), layered("b")], Weights((1, 1), layers=({0: 1, 4: 0}, {1: 0, 2: 4, 4: 2})))
    assert [sources.weights_of(name)[0] for name in LAYERS] == [1, 0.75, 0.5, 0.25, 0]
    assert [sources.weights_of(name)[1] for name in LAYERS] == [0, 0, 4, 3, 2]
    assert sources.weights_of("model.head") == [0.5, 2.0]


def test_of_patterns_the_first_that_is_found_counts():
    patterns = {r"layers\.[01]\.": (1.0, 0.0), "q_proj": (0.0, 1.0)}
    sources = Sources([layered(), layered("b")], Weights((0.5, 0.5), patterns))
    assert [sources.weights_of(name) for name in LAYERS] == [[1, 0], [1, 0], [0, 1], [0, 1], [0, 1]]
    assert sources.weights_of("model.head") == [0.5, 0.5]
    assert list(sources.weights.record) == [*patterns, "default"]


def test_weights_of_each_kind_reach_the_sum_and_the_record():
    a, b = layered(), layered("b")
    for weights, record in (
        ([2.0, -1.0], [2.0, -1.0]),
        (Weights((1.0, 1.0), layers=({0: 1, 4: 0}, {0: 0, 4: 1})), ["0:1,4:0", "0:0,4:1"]),
    ):
        sources = Sources([a, b], weights)
        merged = merge(sources, "task-arithmetic").adapter
        for name in LAYERS:
            x, y = sources.weights_of(name)
            wanted = (x + y) * a.updates[name].delta()
            torch.testing.assert_close(merged.updates[name].delta(), wanted, rtol=0, atol=1e-5)
        assert merged.record["merge"]["weights"] == record


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ([1, 1, 1], "2 adapters and 3 weights; one weight an adapter is needed"),
        ([1, float("nan")], "weights: nan is no weight; finite numbers are needed"),
        (Weights((1.0,)), "2 adapters and 1 weights"),
        (Weights((1.0, 1.0), {"q_proj": (1.0, 1.0, 1.0)}), "2 adapters and 3 weights"),
        (Weights((1.0, 1.0), {"q_proj": (1.0, float("inf"))}), "inf is no weight"),
        (Weights((1.0, 1.0), layers=({0: 1.0},)), "2 adapters and 1 lines of layer:weight"),
        (Weights((1.0, 1.0), layers=({0: 1.0}, {0: float("nan")})), "nan is no weight"),
    ],
)
def test_weights_that_do_not_fit_the_adapters_are_refused(weights, text):
    with pytest.raises(OptionError, match=text):
        Sources([layered(), layered("b")], weights)


def test_a_pattern_that_matches_no_module_is_refused_with_what_there_is():
    with pytest.raises(OptionError, match=r"weights: 'v_proj' matches no module; there are: .*q_proj.* \(6 in all\)"):
        Sources([layered()], Weights((1.0,), {"v_proj": (2.0,)}))


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [1.0, math.inf]])
def test_plain_weights_are_counted_and_finite(weights):
    with pytest.raises(OptionError, match=r"weights"):
        Sources([layered(), layered("b")], weights)


# what fits together


def test_no_adapter_is_refused():
    with pytest.raises(OptionError, match="no adapter was given"):
        Sources([])


def test_different_names_of_the_base_are_told_with_both_names():
    with pytest.warns(LoraLabWarning, match="a and b name different base models, 'tiny' and 'other'"):
        Sources([layered(), layered("b", base_model_name_or_path="other")])
    Sources([layered(), layered("b", base_model_name_or_path=None)])  # what is not known is not held against it
    Sources([layered(), layered("b", base_model_name_or_path="tiny/")])  # the same folder


@pytest.mark.parametrize(
    ("field", "a", "b"),
    [
        ("alora_invocation_tokens", [5, 6], None),
        ("alora_invocation_tokens", None, [5, 6]),
        ("alora_invocation_tokens", [5], [9]),
        ("layer_replication", [[0, 2]], None),
        ("layer_replication", None, [[0, 2]]),
    ],
)
def test_updates_of_other_inputs_or_other_layers_are_refused_in_any_order(field, a, b):
    with pytest.raises(MismatchError, match=rf"{field} is .* and "):
        Sources([layered("x", **{field: a}), layered("y", **{field: b})])
    both = merge(Sources([layered("x", **{field: a}), layered("y", **{field: a})])).adapter
    assert both.config.get(field) == a


def test_different_names_of_the_base_are_told_even_where_the_first_names_none():
    bases = (None, "tiny", "other")
    with pytest.warns(LoraLabWarning, match="'tiny' and 'other'"):
        Sources([layered(f"a{i}", base_model_name_or_path=base) for i, base in enumerate(bases)])


def test_different_layouts_are_refused():
    with pytest.raises(MismatchError, match="a and b store their weights in different layouts: fan_in_fan_out"):
        Sources([layered(), layered("b", fan_in_fan_out=True)])


def test_different_shapes_are_refused_with_the_module_and_both_sources():
    b = adapter({LAYERS[1]: update(1, (4, 5), 0)}, "b")
    with pytest.raises(MismatchError, match=r"a and b: model\.layers\.1\.q_proj is \(4, 4\) and \(4, 5\)"):
        Sources([layered(), b])


def test_a_kernel_and_a_matrix_of_as_many_numbers_do_not_fit():
    a, b = adapter({"net.conv": update(1, (4, 2, 3), 0)}, "a"), adapter({"net.conv": update(1, (4, 6), 0)}, "b")
    with pytest.raises(MismatchError, match=r"net\.conv is \(4, 2, 3\) and \(4, 6\)"):
        Sources([a, b])


def test_modules_come_in_natural_order_and_those_left_alone_are_listed():
    a = adapter({f"net.{i}": update(1, (3, 3), i) for i in (0, 2, 10)}, "a")
    b = adapter({f"net.{i}": update(2, (3, 3), i) for i in (1, 10)}, "b")
    sources = Sources([a, b])
    assert sources.modules == ["net.0", "net.1", "net.2", "net.10"]
    assert sources.absent == [["net.1"], ["net.0", "net.2"]]
    assert [u.rank for u in sources.updates_of("net.0")] == [1, 0]
    assert torch.equal(sources.updates_of("net.0")[1].delta(), torch.zeros(3, 3))
    assert merge(sources).adapter.record["merge"]["absent"] == {"a": 1, "b": 2}
    assert "absent" not in merge(Sources([a])).adapter.record or not merge(Sources([a])).adapter.record["absent"]


def test_updates_of_two_precisions_meet_in_the_wider_one():
    narrow, wide = (
        adapter({"net.x": update(1, (3, 3), 0)}, "a"),
        adapter({"net.x": update(1, (3, 3), 1, dtype=torch.float64)}, "b"),
    )
    assert {u.A.dtype for u in Sources([narrow, wide]).updates_of("net.x")} == {torch.float64}
    assert {u.A.dtype for u in Sources([narrow]).updates_of("net.x")} == {torch.float32}


def test_scales_are_those_that_each_adapter_has_in_each_module(tmp_path):
    name = "layers.0.q_proj"
    tensors = lora(name, rank=4, seed=1)
    A, B = tensors.values()
    for i, (config, scale) in enumerate(
        [
            ({"lora_alpha": 8}, 2.0),
            ({"lora_alpha": 8, "use_rslora": True}, 4.0),
            ({"lora_alpha": 1, "alpha_pattern": {"q_proj": 12}}, 3.0),
            ({"r": 2, "rank_pattern": {"layers.0.q_proj": 4}, "lora_alpha": 2}, 0.5),
        ]
    ):
        made = Adapter.load(write(tmp_path / str(i), tensors, **{"r": 4, **config}))
        (found,) = Sources([made]).updates_of(name)
        torch.testing.assert_close(found.delta(), scale * B @ A)


def test_dora_without_its_base_is_refused_by_name(tmp_path):
    tensors = {**lora(), f"{PREFIX}layers.0.q_proj.lora_magnitude_vector": torch.ones(6)}
    made = Adapter.load(write(tmp_path / "dora", tensors, use_dora=True))
    with pytest.raises(TunerError, match=r"dora: DoRA rescales .*; no base model was given"):
        Sources([made])


def test_the_merged_adapter_is_made_like_the_first_with_the_modules_of_all():
    a = adapter({"layers.0.fc": update(1, (8, 6), 0)}, "a", task_type="FEATURE_EXTRACTION")
    b = adapter(updates(1), "b")
    made = merge(Sources([a, b])).adapter
    assert set(made.updates) == set(SHAPES)
    assert made.config["task_type"] == "FEATURE_EXTRACTION"
    assert made.config["base_model_name_or_path"] == "tiny"


def test_a_part_has_its_own_weights_tasks_and_modules_and_builds_no_base_again(tmp_path):
    tensors = {**lora(), f"{PREFIX}layers.0.q_proj.lora_magnitude_vector": torch.ones(6)}
    dora = Adapter.load(write(tmp_path / "dora", tensors, use_dora=True))
    built = []

    def base():
        built.append(torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict()])}))
        torch.manual_seed(0)
        built[-1]["layers"][0]["q_proj"] = torch.nn.Linear(4, 6, bias=False)
        return built[-1]

    first, last = (adapter({"layers.0.q_proj": update(2, (6, 4), seed)}, "a") for seed in (1, 2))
    other = adapter({"layers.0.fc": update(1, (8, 6), 0)}, "other")
    tasks = [Digits(name) for name in ("relabel", "invert", "identity", "mod3")]
    whole = Sources([first, other, dora, last], base=base, tasks=tasks)
    part = whole.part([3, 2], [0.5, 2.0])
    assert len(built) == 1
    assert part.tasks == [tasks[3], tasks[2]]
    assert part.modules == ["layers.0.q_proj"]
    assert (whole.weights.plain, len(whole.modules)) == ((1.0,) * 4, 2)
    weight = built[0]["layers"][0]["q_proj"].weight
    changed = weight + 2 * product(lora())
    exact = changed / changed.norm(dim=1, keepdim=True) - weight  # DoRA's ΔW, its magnitudes all 1
    made = merge(part).adapter.updates["layers.0.q_proj"].delta()
    torch.testing.assert_close(made, 0.5 * last.updates["layers.0.q_proj"].delta() + 2 * exact, rtol=1e-4, atol=1e-5)
    with pytest.raises(OptionError, match="2 adapters and 1 weights"):
        whole.part([0, 1], [1.0])


@pytest.mark.parametrize("recorded", [True, False])
def test_what_builds_the_base_can_be_sent_to_workers(recorded):
    """Of an adapter without a plain ΔW: from the folder that is given, and from the task that its record names."""
    task = Digits("relabel")
    dora = replace(layered(), config={"peft_type": "LORA", "use_dora": True})
    needy = replace(dora, record={"task": task.record}) if recorded else replace(dora, sites={})
    base = base_of([needy], None if recorded else str(CASES / "_bases/llama_tiny"))
    there = pickle.loads(pickle.dumps(base))().state_dict()
    here = base().state_dict()
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in here)
    if recorded:
        assert here.keys() == task.build_model().state_dict().keys()
