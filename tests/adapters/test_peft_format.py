import dataclasses
import json
import math

import pytest
import torch
from making_adapters import PREFIX, lora, product, write

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files.reading import inspect
from lora_lab.adapters.formats.peft import peft_config
from lora_lab.errors import AdapterError, LoraLabWarning, TunerError

Q, K = "layers.0.q_proj", "layers.0.k_proj"


def refusal(folder, **options) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(AdapterError) as caught:
        Adapter.load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# keys: prefixes


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "base_model.model.",
        "module.",
        "module.base_model.model.",
        "base_model.model.module.",
        "_orig_mod.",
        "_orig_mod.base_model.model.",
        "base_model.model._orig_mod.",
        "module._orig_mod.base_model.model.",
        "_orig_mod.module.base_model.model._orig_mod.",
        "_fsdp_wrapped_module.base_model.model.",
        "base_model.model._fsdp_wrapped_module.",
        "_forward_module.base_model.model.",
        "base_model.model.base_model.model.",
    ],
)
@pytest.mark.parametrize(
    "module",
    [
        "layers.0.q_proj",
        "layers._fsdp_wrapped_module.0._checkpoint_wrapped_module.q_proj",
        "layers.0.q_proj._orig_mod",
    ],
)
def test_wrapper_prefixes_outside_and_inside_leave_the_clean_name(tmp_path, prefix, module):
    tensors = lora(module, prefix=prefix)
    adapter = Adapter.load(write(tmp_path, tensors))
    assert list(adapter.tensors) == [f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"]
    torch.testing.assert_close(adapter.updates[Q].delta(), 2 * product(tensors))


@pytest.mark.parametrize("module", ["encoder.module.0.fc", "my_orig_mod.fc", "lora_router.fc", "model.base_model.fc"])
def test_names_that_only_resemble_a_wrapper_stay(tmp_path, module):
    assert list(Adapter.load(write(tmp_path, lora(module))).sites) == [module]


def test_a_lora_key_under_base_model_alone_is_no_shared_tensor(tmp_path):
    adapter = Adapter.load(write(tmp_path, lora("layers.0.q_proj", prefix="base_model.")))
    assert (len(adapter.sites), adapter.others) == (1, [])


def test_two_keys_for_one_tensor_are_refused(tmp_path):
    folder = write(tmp_path, {**lora(Q), **lora(Q, prefix="module.", seed=1)})
    assert f"two tensors each for {Q}.lora_A, {Q}.lora_B" in refusal(folder)


def test_modules_are_sorted_by_number(tmp_path):
    tensors = {key: t for i in (10, 9, 0) for key, t in lora(f"layers.{i}.q_proj").items()}
    assert list(Adapter.load(write(tmp_path, tensors)).sites) == [f"layers.{i}.q_proj" for i in (0, 9, 10)]


# keys: adapter names

NAMES = ["default", "lora", "weight", "bias", "task-a", "v1.2", "a.b.c", "lora_A", "lora_B", "0", "ä"]


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_name_inside_the_keys_is_taken_out(tmp_path, name):
    tensors = lora(Q, name=name)
    folder = write(tmp_path, tensors)
    for options in ({}, {"adapter_name": name}):
        adapter = Adapter.load(folder, **options)
        assert list(adapter.tensors) == [f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"]
        torch.testing.assert_close(adapter.updates[Q].delta(), 2 * product(tensors))


@pytest.mark.parametrize("other", ["two", "weight", "v1.2", "one.more"])
def test_of_two_adapters_in_one_file_one_is_chosen_by_name(tmp_path, other):
    one, two = lora(Q, name="one", seed=1), lora(Q, name=other, seed=2)
    heads = {
        f"{PREFIX}head.modules_to_save.one.weight": torch.full((2,), 1.0),
        f"{PREFIX}head.modules_to_save.{other}.weight": torch.full((2,), 2.0),
    }
    folder = write(tmp_path, {**one, **two, **heads})
    text = refusal(folder)
    assert "holds several adapters" in text
    assert "'one'" in text
    assert f"{other!r}" in text
    for name, tensors, head in (("one", one, 1.0), (other, two, 2.0)):
        adapter = Adapter.load(folder, adapter_name=name)
        torch.testing.assert_close(adapter.updates[Q].delta(), 2 * product(tensors))
        assert adapter.others == [f"{PREFIX}head.weight"]
        assert adapter.tensors[f"{PREFIX}head.weight"].tolist() == [head, head]


def test_a_name_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    folder = write(tmp_path / "named", lora(Q, name="one"))
    assert "has no adapter 'two'; it holds 'one'" in refusal(folder, adapter_name="two")
    folder = write(tmp_path / "plain", lora(Q))
    assert "has no adapter 'two'; it holds (unnamed)" in refusal(folder, adapter_name="two")


def test_a_clash_is_told_also_where_one_of_two_adapters_is_chosen(tmp_path):
    folder = write(
        tmp_path,
        {**lora(Q, name="one"), **lora(Q, name="one", prefix="module."), **lora(Q, name="two"), **lora(K, name="two")},
    )
    assert "two tensors each for" in refusal(folder, adapter_name="one")
    assert len(Adapter.load(folder, adapter_name="two").sites) == 2


# kinds of layers


@pytest.mark.parametrize("end", ["", ".default"])
def test_an_embedding_has_its_delta_in_the_layout_of_its_table(tmp_path, end):
    A, B = torch.randn(2, 10), torch.randn(6, 2)
    key = f"{PREFIX}embed.lora_embedding_"
    adapter = Adapter.load(write(tmp_path, {f"{key}A{end}": A, f"{key}B{end}": B}))
    assert adapter.sites["embed"].kind == "embedding"
    assert list(adapter.tensors) == [f"{key}A", f"{key}B"]
    torch.testing.assert_close(adapter.updates["embed"].delta(), 2 * (B @ A).T)


@pytest.mark.parametrize("kernel", [(3,), (1,), (3, 2), (1, 1), (3, 2, 2)])
def test_a_convolution_has_its_delta_in_the_layout_of_its_kernel(tmp_path, kernel):
    A, B = torch.randn(2, 4, *kernel), torch.randn(6, 2, *[1] * len(kernel))
    adapter = Adapter.load(write(tmp_path, {f"{PREFIX}c.lora_A.weight": A, f"{PREFIX}c.lora_B.weight": B}))
    assert adapter.sites["c"].kind == f"conv{len(kernel)}d"
    wanted = torch.einsum("or,ri...->oi...", B.flatten(1), A) * 2
    torch.testing.assert_close(adapter.updates["c"].delta(), wanted)


def test_fan_in_fan_out_transposes_linear_modules_alone(tmp_path):
    linear, (A, B) = lora(Q), (torch.randn(2, 10), torch.randn(6, 2))
    embedding = {f"{PREFIX}e.lora_embedding_A": A, f"{PREFIX}e.lora_embedding_B": B}
    kernel = {f"{PREFIX}c.lora_A.weight": torch.randn(2, 4, 3), f"{PREFIX}c.lora_B.weight": torch.randn(6, 2, 1)}
    folder = write(tmp_path, {**linear, **embedding, **kernel}, fan_in_fan_out=True)
    updates = Adapter.load(folder).updates
    torch.testing.assert_close(updates[Q].delta(), 2 * product(linear).T)
    torch.testing.assert_close(updates["e"].delta(), 2 * (B @ A).T)
    assert updates["c"].shape == (6, 4, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_narrow_factors_are_multiplied_in_float32_and_kept_as_they_are(tmp_path, dtype):
    tensors = lora(Q, dtype=dtype)
    adapter = Adapter.load(write(tmp_path, tensors))
    assert {t.dtype for t in adapter.tensors.values()} == {dtype}
    assert adapter.updates[Q].A.dtype == torch.float32
    torch.testing.assert_close(adapter.updates[Q].delta(), 2 * product(tensors))


def test_float64_stays_float64(tmp_path):
    A, B = torch.full((2, 3), 1 / 3, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    adapter = Adapter.load(write(tmp_path, {f"{PREFIX}{Q}.lora_A.weight": A, f"{PREFIX}{Q}.lora_B.weight": B}))
    assert torch.equal(adapter.updates[Q].delta(), 2 * A)


def test_one_wide_factor_is_enough_for_float64(tmp_path):
    A, B = lora(Q).values()
    folder = write(tmp_path, {f"{PREFIX}{Q}.lora_A.weight": A, f"{PREFIX}{Q}.lora_B.weight": B.double()})
    assert Adapter.load(folder).updates[Q].A.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_factors_that_are_no_floating_point_are_refused_by_name(tmp_path, dtype):
    text = refusal(write(tmp_path, {**lora(Q), **lora(K, dtype=dtype)}))
    assert K in text
    assert str(dtype) in text
    assert Q not in text


@pytest.mark.parametrize(
    ("A", "B", "reason"),
    [
        ((8,), (6, 2), "sharded"),
        ((2, 4), (12,), "sharded"),
        ((0,), (0,), "sharded"),
        ((2, 0), (6, 2), "sharded"),
        ((0, 4), (6, 0), "sharded"),
        ((), (), "sharded"),
        ((2, 4), (6, 3), "another adapter's half"),
        ((2, 4, 3), (6, 2), "another adapter's half"),
        ((4, 4, 3, 3), (8, 2, 1, 1), "grouped convolution"),
    ],
)
def test_factors_that_are_no_pair_are_refused_with_their_shapes(tmp_path, A, B, reason):
    folder = write(
        tmp_path,
        {**lora(K), f"{PREFIX}{Q}.lora_A.weight": torch.ones(A), f"{PREFIX}{Q}.lora_B.weight": torch.ones(B)},
    )
    text = refusal(folder)
    assert Q in text
    assert K not in text
    assert f"lora_A {list(A)} and lora_B {list(B)}" in text
    assert reason in text


@pytest.mark.parametrize(("kept", "missing"), [("lora_A", "lora_B"), ("lora_B", "lora_A")])
def test_half_a_pair_is_refused_with_the_half_that_is_missing(tmp_path, kept, missing):
    tensors = {key: t for key, t in lora(Q).items() if kept in key}
    assert f"{Q} has no {missing}" in refusal(write(tmp_path, {**tensors, **lora(K)}))


def test_of_many_problems_some_are_shown_and_all_are_counted(tmp_path):
    tensors = {f"{PREFIX}layers.{i}.q.lora_A.weight": torch.ones(2, 4) for i in range(7)}
    text = refusal(write(tmp_path, tensors))
    assert "layers.0.q has no lora_B" in text
    assert "(7 in all)" in text


def test_every_non_finite_tensor_is_counted(tmp_path):
    tensors = {**lora(Q), **lora(K, dtype=torch.float8_e5m2), f"{PREFIX}head.weight": torch.tensor([math.inf, 1])}
    tensors[f"{PREFIX}{Q}.lora_A.weight"][0, :3] = math.nan
    tensors[f"{PREFIX}{K}.lora_B.weight"].view(torch.uint8)[0, 0] = 0x7C  # Inf
    text = refusal(write(tmp_path, tensors))
    assert f"{Q}.lora_A.weight (3 of 8)" in text
    assert f"{K}.lora_B.weight (1 of 12)" in text
    assert "head.weight (1 of 2)" in text


# the configuration: scales


def test_each_module_has_its_own_rank_alpha_and_scale(tmp_path):
    ranks = {"layers.0.q_proj": 2, "layers.1.q_proj": 3, "layers.0.v_proj": 1, "layers.1.v_proj": 4}
    tensors = {key: t for name, rank in ranks.items() for key, t in lora(name, rank=rank).items()}
    config = {
        "r": 2,
        "lora_alpha": 8,
        "rank_pattern": {"^layers\\.1\\.q_proj": 3, "layers.0.v_proj": 1, "1.v_proj": 4},
        "alpha_pattern": {r".*\.1\..*": 6, "v_proj": 5},
    }
    wanted = {"layers.0.q_proj": 8 / 2, "layers.1.q_proj": 6 / 3, "layers.0.v_proj": 5.0, "layers.1.v_proj": 6 / 4}
    plain = Adapter.load(write(tmp_path / "plain", tensors, **config))
    assert {name: site.scale for name, site in plain.sites.items()} == pytest.approx(wanted)
    assert {name: site.rank for name, site in plain.sites.items()} == ranks
    rs = Adapter.load(write(tmp_path / "rs", tensors, **config, use_rslora=True))
    wanted = {name: scale * math.sqrt(ranks[name]) for name, scale in wanted.items()}
    assert {name: site.scale for name, site in rs.sites.items()} == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("q_proj", True),
        ("layers.0.q_proj", True),
        ("0.q_proj", True),
        ("^layers.0.q_proj", True),
        (r"layers\.\d+\.[qk]_proj", True),
        (".*q_proj", True),
        ("proj", False),
        ("layers.0", False),
        ("^q_proj", False),
        ("q_proj.", False),
        ("(", False),
    ],
)
def test_patterns_match_as_pefts_do(tmp_path, pattern, matches):
    folder = write(tmp_path, lora(Q), alpha_pattern={pattern: 10})
    if matches:
        adapter = Adapter.load(folder)
    else:
        with pytest.warns(LoraLabWarning, match="matches no module and has no effect") as caught:
            adapter = Adapter.load(folder)
        assert repr(pattern) in str(caught[0].message)
    assert adapter.sites[Q].scale == (5 if matches else 2)


def test_the_first_pattern_that_matches_wins_also_after_saving(tmp_path):
    tensors = {**lora("layers.0.q_proj"), **lora("layers.1.q_proj")}
    # In the alphabet the narrow pattern comes first, and would win.
    folder = write(tmp_path / "in", tensors, alpha_pattern={"q_proj": 32, "layers.1.q_proj": 4})
    adapter = Adapter.load(folder)
    assert {site.scale for site in adapter.sites.values()} == {16}
    for target in ("out", "out.safetensors"):
        again = Adapter.load(adapter.save(tmp_path / target))
        assert {site.scale for site in again.sites.values()} == {16}


@pytest.mark.parametrize("alpha", [True, "16", [8], {}, math.nan, math.inf])
def test_an_alpha_that_is_no_number_is_refused_with_the_module(tmp_path, alpha):
    text = refusal(write(tmp_path, lora(Q), lora_alpha=alpha))
    assert f"{Q}: lora_alpha is {alpha!r}; a number belongs there" in text
    text = refusal(write(tmp_path, {**lora(Q), **lora(K)}, alpha_pattern={"k_proj": alpha}))
    assert f"{K}: lora_alpha is {alpha!r}" in text


@pytest.mark.parametrize("alpha", [1, 0.5, 64, -2])
def test_any_number_is_an_alpha(tmp_path, alpha):
    assert Adapter.load(write(tmp_path, lora(Q), lora_alpha=alpha)).sites[Q].scale == alpha / 2


def test_an_alpha_of_zero_is_told_since_the_adapter_does_nothing(tmp_path):
    with pytest.warns(LoraLabWarning, match="1 of 1 modules have zero delta"):
        Adapter.load(write(tmp_path, lora(Q), lora_alpha=0))


@pytest.mark.parametrize("config", [{"lora_alpha": None}, {}])
def test_without_an_alpha_pefts_default_of_8_is_used_and_told(tmp_path, config):
    folder = write(tmp_path, lora(Q), **config)
    if not config:
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    with pytest.warns(LoraLabWarning, match="gives no lora_alpha: PEFT's default of 8 is used"):
        adapter = Adapter.load(folder)
    assert adapter.sites[Q].scale == 4
    assert adapter.config["lora_alpha"] == 8


def test_without_a_rank_the_tensors_give_each_modules_own(tmp_path):
    ranks = {Q: 2, K: 2, "layers.0.v_proj": 5}
    tensors = {key: t for name, rank in ranks.items() for key, t in lora(name, rank=rank).items()}
    folder = write(tmp_path / "in", tensors, r=None, lora_alpha=10)
    with pytest.warns(LoraLabWarning, match="gives no r: taken from the tensors"):
        adapter = Adapter.load(folder)
    assert {name: site.scale for name, site in adapter.sites.items()} == {Q: 5, K: 5, "layers.0.v_proj": 2}
    again = Adapter.load(adapter.save(tmp_path / "out"))
    assert again.sites == adapter.sites


@pytest.mark.parametrize("r", [True, "2", 0, -1, 2.5, [2]])
def test_a_rank_that_is_no_count_is_refused(tmp_path, r):
    assert f"r is {r!r} in the config; a rank of at least 1 belongs there" in refusal(write(tmp_path, lora(Q), r=r))


def test_ranks_that_differ_from_the_config_are_grouped_in_one_line(tmp_path):
    tensors = {key: t for i in range(5) for key, t in lora(f"layers.{i}.q_proj", rank=3).items()}
    text = refusal(write(tmp_path, tensors))
    assert "rank 3 in the file and 2 in the config" in text
    assert "layers.0.q_proj, layers.1.q_proj, layers.2.q_proj (5 in all)" in text


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", [["q_proj"], "q_proj", 3])
def test_a_pattern_that_is_no_object_is_refused(tmp_path, field, value):
    assert f"{field} is a {type(value).__name__}" in refusal(write(tmp_path, lora(Q), **{field: value}))


@pytest.mark.parametrize("value", [None, {}])
def test_an_empty_pattern_may_be_null(tmp_path, value):
    assert Adapter.load(write(tmp_path, lora(Q), rank_pattern=value, alpha_pattern=value)).sites[Q].scale == 2


# the configuration: years


def test_a_config_of_2023_loads_without_a_word(tmp_path):
    folder = write(tmp_path, lora(Q), enable_lora=[True], merge_weights=True, fan_in_fan_out=False, bias="none")
    assert Adapter.load(folder).sites[Q].scale == 2


def test_a_field_of_the_future_is_told_when_it_is_on(tmp_path):
    off = write(tmp_path / "off", lora(Q), use_future=False, future_config=None, future_list=[])
    assert Adapter.load(off).sites[Q].scale == 2
    on = write(tmp_path / "on", lora(Q), use_future=True, another_future={"x": 1})
    with pytest.warns(LoraLabWarning, match="does not know, and ignores: another_future, use_future"):
        assert Adapter.load(on).config["use_future"] is True


def test_every_field_of_the_installed_peft_is_known():
    from peft import LoraConfig

    unknown = {f.name for f in dataclasses.fields(LoraConfig)} - peft_config.LORA_FIELDS
    assert not unknown


@pytest.mark.parametrize("content", [{"peft_type": None}, {"peft_type": ""}, {"peft_type": 3}, {"r": 2}, {}])
def test_a_config_without_a_type_is_refused(tmp_path, content):
    folder = write(tmp_path, lora(Q))
    (folder / "adapter_config.json").write_text(json.dumps(content))
    assert f"peft_type is {content.get('peft_type')!r} in the config; PEFT writes LORA" in refusal(folder)
    assert inspect(folder).problems


@pytest.mark.parametrize("written", ["LORA", "lora", "PeftType.LORA"])
def test_the_type_is_read_in_every_spelling(tmp_path, written):
    adapter = Adapter.load(write(tmp_path, lora(Q), peft_type=written))
    assert adapter.tuner == "LORA"
    assert adapter.updates


def test_a_type_that_peft_does_not_know_is_named(tmp_path):
    assert "peft_type 'NOVEL' is none that the installed PEFT knows" in refusal(
        write(tmp_path, lora(Q), peft_type="novel")
    )


# tensors beside the pairs


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("head.weight", "head.weight"),
        ("head.modules_to_save.weight", "head.weight"),
        ("head.modules_to_save.default.weight", "head.weight"),
        ("head.modules_to_save.default.dense.weight", "head.dense.weight"),
        ("head.modules_to_save.default.0.out.bias", "head.0.out.bias"),
        ("module.head.modules_to_save.default._orig_mod.weight", "head.weight"),
        ("embed.token_adapter.trainable_tokens_delta", "embed.token_adapter.trainable_tokens_delta"),
        ("embed.token_adapter.trainable_tokens_delta.default", "embed.token_adapter.trainable_tokens_delta"),
        ("layers.0.q_proj.base_layer.bias", "layers.0.q_proj.base_layer.bias"),
        ("score.bias", "score.bias"),
    ],
)
@pytest.mark.parametrize("name", ["", "default"])
def test_other_tensors_are_kept_under_the_keys_that_peft_reads(tmp_path, written, canonical, name):
    config = {"trainable_token_indices": [4, 5, 9]} if "tokens" in written else {}
    adapter = Adapter.load(write(tmp_path, {**lora(Q, name=name), PREFIX + written: torch.arange(3.0)}, **config))
    assert adapter.others == [PREFIX + canonical]
    assert adapter.tensors[PREFIX + canonical].tolist() == [0, 1, 2]
    assert list(adapter.sites) == [Q]


def test_copies_of_the_base_head_are_left_out_and_told_once(tmp_path):
    raw = {
        f"{PREFIX}head.original_module.weight": torch.ones(1),
        f"{PREFIX}head.original_module.bias": torch.ones(1),
        f"{PREFIX}head.modules_to_save.default.weight": torch.zeros(1),
    }
    folder = write(tmp_path, {**lora(Q, name="default"), **raw})
    with pytest.warns(LoraLabWarning, match="2 copies of the base model's weights left out") as caught:
        adapter = Adapter.load(folder)
    assert len(caught) == 1
    assert adapter.others == [f"{PREFIX}head.weight"]


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_of_a_whole_state_dict_only_the_adapter_is_kept(tmp_path, bias):
    raw = {
        f"{PREFIX}{Q}.base_layer.weight": torch.ones(6, 4),
        f"{PREFIX}{Q}.base_layer.bias": torch.ones(6),
        f"{PREFIX}norm.weight": torch.ones(4),
        f"{PREFIX}head.modules_to_save.default.weight": torch.zeros(1),
    }
    folder = write(tmp_path, {**lora(Q, name="default"), **raw}, bias=bias)
    left_out = 3 if bias == "none" else 2
    with pytest.warns(LoraLabWarning, match=f"{left_out} copies of the base model's weights left out"):
        adapter = Adapter.load(folder)
    kept = [f"{PREFIX}{Q}.base_layer.bias"] if bias != "none" else []
    assert sorted(adapter.others) == sorted([*kept, f"{PREFIX}head.weight"])


def test_a_resized_embedding_that_peft_saved_is_kept(tmp_path):
    key = f"{PREFIX}embed_tokens.base_layer.weight"
    assert Adapter.load(write(tmp_path, {**lora(Q), key: torch.ones(3, 2)})).others == [key]


# LoRA whose delta is no product


@pytest.mark.parametrize(
    ("extra", "config", "word"),
    [
        ({"lora_magnitude_vector": (6,)}, {"use_dora": True}, "DoRA"),
        ({"lora_magnitude_vector.weight": (6,)}, {"use_dora": True}, "DoRA"),
        ({"lora_B.bias": (6,)}, {"lora_bias": True}, "lora_bias"),
        ({"lora_diag": (2,)}, {"kasa_config": {"beta": 1}}, "kasa_config"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, "PiSSA"),
        ({}, {"init_lora_weights": "olora"}, "olora"),
        ({}, {"init_lora_weights": "corda"}, "corda"),
        ({}, {"init_lora_weights": "loftq"}, "loftq"),
        ({}, {"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({}, {"use_qalora": True}, "use_qalora"),
        ({}, {"use_bdlora": {"x": 1}}, "use_bdlora"),
    ],
)
def test_what_is_no_product_loads_and_refuses_delta_maths_by_name(tmp_path, extra, config, word):
    tensors = {**lora(Q), **{f"{PREFIX}{Q}.{key}": torch.ones(shape) for key, shape in extra.items()}}
    adapter = Adapter.load(write(tmp_path, tensors, **config))
    assert list(adapter.sites) == [Q]
    assert len(adapter.sites[Q].keys) == 2 + len(extra)
    assert not adapter.others
    with pytest.raises(TunerError, match=word) as caught:
        _ = adapter.updates
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", None])
def test_other_initialisations_are_plain_products(tmp_path, init):
    assert Adapter.load(write(tmp_path, lora(Q), init_lora_weights=init)).updates


def test_dora_magnitudes_lose_their_suffix_and_keep_their_module(tmp_path):
    for end in ("", ".weight", ".default.weight"):
        name = "default" if "default" in end else ""
        tensors = {**lora(Q, name=name), f"{PREFIX}{Q}.lora_magnitude_vector{end}": torch.ones(6)}
        adapter = Adapter.load(write(tmp_path, tensors, use_dora=True))
        assert adapter.sites[Q].keys["lora_magnitude_vector"] == f"{PREFIX}{Q}.lora_magnitude_vector"


def test_a_stack_of_expert_weights_is_told_apart_from_a_wrong_rank(tmp_path):
    folder = write(tmp_path, lora("mlp.experts", rank=8), target_parameters=["mlp.experts.up_proj"])
    adapter = Adapter.load(folder)
    assert (adapter.sites["mlp.experts"].kind, adapter.sites["mlp.experts"].scale) == ("parameter", 2)
    with pytest.raises(TunerError, match="target_parameters"):
        _ = adapter.updates


def test_invocation_tokens_are_told(tmp_path):
    with pytest.warns(LoraLabWarning, match="acts only after those tokens"):
        Adapter.load(write(tmp_path, lora(Q), alora_invocation_tokens=[5]))


# other tuners, by hand (those that PEFT itself writes are in test_peft_reference.py)


@pytest.mark.parametrize(
    ("tuner", "parts"),
    [
        ("LOHA", ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]),
        ("LOKR", ["lokr_w1", "lokr_w2_a", "lokr_w2_b"]),
        ("OFT", ["oft_R.weight"]),
        ("HIRA", ["hira_A", "hira_B"]),
        ("VERA", ["vera_lambda_b", "vera_lambda_d"]),
        ("IA3", ["ia3_l"]),
        ("ADALORA", ["lora_A", "lora_B", "lora_E"]),
    ],
)
@pytest.mark.parametrize("raw", [False, True])
def test_every_tuner_has_its_sites_and_a_delta_or_a_reason_for_none(tmp_path, tuner, parts, raw):
    def written(part: str) -> str:
        head, dot, end = part.partition(".")
        return f"{head}.default{dot}{end}" if raw else part

    tensors = {f"{PREFIX}{module}.{written(part)}": torch.ones(2, 2) for module in (Q, K) for part in parts}
    adapter = Adapter.load(write(tmp_path, tensors, peft_type=tuner, target_modules=["q_proj", "k_proj"]))
    assert adapter.tuner == tuner
    assert sorted(adapter.sites) == sorted([Q, K])
    assert all(site.kind == tuner.lower() and site.scale is None for site in adapter.sites.values())
    assert sorted(adapter.tensors) == sorted(f"{PREFIX}{module}.{part}" for module in (Q, K) for part in parts)
    assert not adapter.others
    if tuner in ("LOHA", "LOKR"):  # of ones, at the scale 8 / 2 of PEFT's alpha: 4 · 2 · 2 and 4 · 1 ⊗ 2
        wanted = torch.full((2, 2), 16.0) if tuner == "LOHA" else torch.full((4, 4), 8.0)
        assert all(torch.equal(update.delta(), wanted) for update in adapter.updates.values())
        return
    with pytest.raises(TunerError, match=tuner):
        _ = adapter.updates


def test_matrices_that_modules_share_belong_to_none(tmp_path):
    shared = {"base_model.vera_A": torch.ones(2, 4), "base_model.vera_B": torch.ones(6, 2)}
    own = {f"{PREFIX}{Q}.vera_lambda_b": torch.ones(6), f"{PREFIX}{Q}.vera_lambda_d": torch.ones(2)}
    adapter = Adapter.load(write(tmp_path, {**shared, **own}, peft_type="VERA"))
    assert list(adapter.sites) == [Q]
    assert adapter.others == list(shared)


# other formats


def test_a_whole_model_is_refused_with_what_it_holds(tmp_path):
    text = refusal(write(tmp_path, {f"model.layers.{i}.q_proj.weight": torch.ones(2, 2) for i in range(5)}))
    assert "no LoRA tensors found" in text
    assert "model.layers.0.q_proj.weight" in text
    assert "(5 in all)" in text


def test_a_file_of_another_tuner_than_its_config_says_is_refused(tmp_path):
    assert "no LOHA tensors found" in refusal(write(tmp_path, lora(Q), peft_type="LOHA"))


# inspect


def test_inspect_lists_what_load_refuses(tmp_path):
    tensors = {**lora(Q), **lora(K, rank=3)}
    tensors[f"{PREFIX}{Q}.lora_A.weight"][0, 0] = math.nan
    listing = inspect(write(tmp_path, tensors))
    assert list(listing.adapter.sites) == [K, Q]
    assert listing.format == "peft"
    assert len(listing.problems) == 2
    assert "rank 3 in the file" in listing.problems[0]
    assert "non-finite" in listing.problems[1]
