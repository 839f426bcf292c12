"""Adapters, updates and tasks as they show themselves."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from making_adapters import lora, write

from lora_lab.adapters import describe
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import tensor_digest
from lora_lab.adapters.lowrank import LowRank
from lora_lab.results.result import fingerprint
from lora_lab.tasks.kinds.registry import from_name
from lora_lab.tasks.task import Scores, Split


@pytest.fixture
def adapter(tmp_path):
    tensors = lora("layers.0.q_proj") | lora("layers.1.q_proj", seed=1) | lora("layers.0.up_proj", seed=2)
    return Adapter.load(write(tmp_path / "a", tensors, base_model_name_or_path="org/base"))


def test_an_adapter_says_in_a_line_what_it_is(adapter):
    assert repr(adapter) == "Adapter(a: LORA of rank 2 in 3 modules of org/base)"
    record = {"method": "coto", "seed": 3, "task": {"name": "digits/relabel"}}
    assert repr(replace(adapter, record=record)).endswith("of org/base, trained by coto on digits/relabel with seed 3)")
    smaller = adapter.with_updates({"layers.0.q_proj": adapter.updates["layers.0.q_proj"]}, source="x")
    assert repr(smaller) == "Adapter(x: LORA of rank 2 in 1 module of org/base)"
    uneven = {**adapter.updates, "layers.0.up_proj": adapter.updates["layers.0.up_proj"].truncate(1)[0]}
    assert "of rank 1 to 2 in 3 modules" in repr(adapter.with_updates(uneven, source="x"))


def test_a_notebook_shows_a_row_for_each_type_of_module(adapter):
    rows = re.findall(r"<tr><td>(.*?)</td></tr>", adapter._repr_html_())
    norms = {name: update.delta().norm().item() for name, update in adapter.updates.items()}
    both = math.hypot(norms["layers.0.q_proj"], norms["layers.1.q_proj"])
    assert [row.split("</td><td>") for row in rows] == [
        ["q_proj", "2", "2", str(2 * 2 * (4 + 6)), f"{both:.4g}"],
        ["up_proj", "1", "2", str(2 * (4 + 6)), f"{norms['layers.0.up_proj']:.4g}"],
    ]


def test_an_adapter_without_a_plain_product_has_no_norm(adapter):
    dora = replace(adapter, config={**adapter.config, "use_dora": True})
    assert "<td>20</td><td>–</td>" in dora._repr_html_()


@pytest.mark.parametrize(
    "change",
    [
        {"source": "evil\x1b[2J\n<b>.safetensors"},
        {"record": {"task": ["x"], "method": {"a": 1}, "seed": "\u202e<script>"}},
        {"record": {"task": {"kind": "<img src=x>\r\n" * 99}, "method": None}},
        {"record": {"task": None, "method": "x" * 10_000}},
        {"config": {"peft_type": "LO\nRA<i>", "base_model_name_or_path": ["<u>", "\x07"]}},
        {"sites": {}, "tensors": {}},
    ],
)
def test_what_files_say_is_shown_in_one_short_line_and_does_nothing(adapter, change):
    odd = replace(adapter, **change)
    line, html = repr(odd), odd._repr_html_()
    assert line.isprintable()
    assert len(line) < 500
    assert set(re.findall(r"<(\w+)", html)) <= {"table", "caption", "tr", "th", "td"}
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", html)


def test_numbers_that_are_none_break_no_line(adapter):
    tensors = {key: torch.full_like(tensor, torch.nan) for key, tensor in adapter.tensors.items()}
    odd = replace(adapter, tensors=tensors)
    assert repr(odd) == repr(adapter)
    assert "<td>nan</td>" in odd._repr_html_()


def test_an_update_shows_its_shape_and_no_numbers():
    assert repr(LowRank(torch.zeros(2, 12), torch.zeros(5, 2), (5, 3, 4))) == "LowRank(5 × 3 × 4 of rank 2, float32)"


def test_a_task_and_its_examples_show_no_numbers():
    task = from_name("digits/mod3")
    assert repr(task) == "Digits(digits/mod3: y mod 3)"
    task.about = "a\n\x1b[31m"
    assert repr(task) == r"Digits(digits/mod3: a\n\x1b[31m)"
    split = Split({"input_ids": torch.zeros(4, 9), "labels": torch.zeros(4)})
    assert repr(split) == "Split(4 examples: input_ids [4, 9], labels [4])"
    scores = Scores.judged(np.array([0.25, 0.75]), np.array([True, False]), np.array([1.0, -1.0]))
    assert repr(scores) == "Scores(2 examples: mean loss 0.5, correct 0.5, margin 0)"


def test_adapters_whose_modules_have_changed_places_are_not_one(adapter):
    """The same tensors under each other's names, and the same norm, whatever order they are held in."""
    first, second = "base_model.model.layers.0.q_proj", "base_model.model.layers.1.q_proj"
    swap = {f"{a}.lora_{x}.weight": f"{b}.lora_{x}.weight" for a, b in ((first, second), (second, first)) for x in "AB"}
    exchanged = replace(adapter, tensors={swap.get(key, key): tensor for key, tensor in adapter.tensors.items()})
    assert exchanged.total_norm == adapter.total_norm
    assert fingerprint(exchanged.identity) != fingerprint(adapter.identity)
    otherwise_held = replace(adapter, tensors=dict(reversed(adapter.tensors.items())))
    assert fingerprint(otherwise_held.identity) == fingerprint(adapter.identity)


def test_an_adapter_is_hashed_once_and_its_transforms_anew(adapter, monkeypatch):
    hashed = []
    monkeypatch.setattr(describe, "tensor_digest", lambda tensors: hashed.append(1) or tensor_digest(tensors))
    fresh = replace(adapter, source="fresh")
    assert fresh.identity == fresh.identity
    assert len(hashed) == 1
    doubled = replace(fresh, tensors={key: 2 * tensor for key, tensor in fresh.tensors.items()})
    assert doubled.identity != fresh.identity


def test_patterns_of_a_configuration_count_in_their_order(adapter):
    """Of patterns that match one module the first counts; where there is no ΔW no norm tells them apart."""
    patterns = {"q_proj": 8, "layers.0.q_proj": 2}
    one, other = (
        replace(adapter, config={**adapter.config, "use_dora": True, "alpha_pattern": dict(each)})
        for each in (patterns.items(), reversed(patterns.items()))
    )
    assert fingerprint(one.identity) != fingerprint(other.identity)


def test_tensors_of_the_same_bits_in_another_shape_are_not_the_same():
    tensor = torch.arange(6.0)
    assert len({tensor_digest([each]) for each in (tensor, tensor.view(2, 3), tensor.view(torch.int32))}) == 3
