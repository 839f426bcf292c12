"""What stands beside the factors: used exactly, carried along, or refused by name."""

import math

import pytest
import torch
from making_adapters import PREFIX, lora, product, write
from safetensors.torch import save_file

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files.reading import inspect
from lora_lab.errors import AdapterError, LoraLabWarning

Q, K = "layers.0.q_proj", "layers.0.k_proj"


def refusal(folder, **options) -> str:
    with pytest.raises(AdapterError) as caught:
        Adapter.load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# alpha


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_without_a_config_each_alpha_tensor_gives_its_modules_scale(tmp_path, shape, dtype):
    tensors = {**lora(Q), **lora(K, rank=4), f"{Q}.alpha": torch.full(shape, 1, dtype=dtype)}
    tensors[f"{PREFIX}{K}.alpha"] = torch.full(shape, 16, dtype=dtype)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.warns(LoraLabWarning, match="lora_alpha of 2 modules is taken from their alpha tensors"):
        adapter = Adapter.load(tmp_path / "x.safetensors")
    assert {name: site.scale for name, site in adapter.sites.items()} == {Q: 1 / 2, K: 16 / 4}
    assert not adapter.others
    again = Adapter.load(adapter.save(tmp_path / "out"))
    assert {name: site.scale for name, site in again.sites.items()} == {Q: 1 / 2, K: 16 / 4}
    torch.testing.assert_close(again.updates[Q].delta(), product(lora(Q)) / 2)


def test_modules_without_an_alpha_tensor_take_what_is_given_or_their_rank(tmp_path):
    save_file({**lora(Q), **lora(K), f"{Q}.alpha": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    with pytest.warns(LoraLabWarning) as caught:
        scales = {n: s.scale for n, s in Adapter.load(tmp_path / "x.safetensors").sites.items()}
    assert scales == {Q: 0.5, K: 1}
    assert any("assumed equal to the rank" in str(w.message) for w in caught)
    with pytest.warns(LoraLabWarning) as caught:
        adapter = Adapter.load(tmp_path / "x.safetensors", alpha=6)
    assert any("alpha 6 is not used where the file has alpha tensors" in str(w.message) for w in caught)
    assert {n: s.scale for n, s in adapter.sites.items()} == {Q: 0.5, K: 3}


def test_an_alpha_tensor_fills_a_config_without_one_and_never_contradicts_it(tmp_path):
    tensors = {**lora(Q), f"{PREFIX}{Q}.alpha": torch.tensor(1.0)}
    with pytest.warns(LoraLabWarning, match="lora_alpha of 1 modules is taken"):
        assert Adapter.load(write(tmp_path / "none", tensors, lora_alpha=None)).sites[Q].scale == 0.5
    assert Adapter.load(write(tmp_path / "same", tensors, lora_alpha=1)).sites[Q].scale == 0.5
    text = refusal(write(tmp_path / "other", tensors, lora_alpha=4))
    assert f"{Q}.alpha is 1, but the config gives that module lora_alpha 4" in text
    rs = Adapter.load(write(tmp_path / "rs", tensors, lora_alpha=1, use_rslora=True))
    assert rs.sites[Q].scale == pytest.approx(1 / math.sqrt(2))


@pytest.mark.parametrize("alpha", [torch.ones(3), torch.tensor([]), torch.tensor(1j)])
def test_an_alpha_of_no_one_number_is_refused(tmp_path, alpha):
    assert f"{Q}.alpha has the shape" in refusal(write(tmp_path, {**lora(Q), f"{PREFIX}{Q}.alpha": alpha}))


# pruned factors


@pytest.mark.parametrize("name", ["", "default"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_a_pruned_factor_is_the_product_with_its_mask(tmp_path, name, dtype):
    tensors = lora(Q, name=name)
    A, B = list(tensors)
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]])
    pruned = {f"{A}_orig": tensors[A], f"{A}_mask": mask.to(dtype), B: tensors[B]}
    adapter = Adapter.load(write(tmp_path, pruned))
    torch.testing.assert_close(adapter.updates[Q].delta(), 2 * tensors[B] @ (tensors[A] * mask))
    assert not adapter.others


@pytest.mark.parametrize("end", ["weight_orig", "weight_mask"])
def test_half_of_a_pruned_factor_is_refused(tmp_path, end):
    tensors = {**lora(Q), f"{PREFIX}{K}.lora_A.{end}": torch.ones(2, 4), **lora(K)}
    assert f"{K}.lora_A.{end}" in refusal(write(tmp_path, tensors))


# what is refused


@pytest.mark.parametrize(
    "end",
    [
        *("dora_scale", "diff", "diff_b", "lora_mid.weight", "lora_A.weight_g", "lora_B.default.weight_v"),
        *("lora_A.parametrizations.weight.original0", "lora_A.default.parametrizations.weight.original"),
        *("lora_A.qweight", "lora_A.default.qzeros", "lora_A.weight.absmax", "lora_A.weight.quant_map"),
        *("lora_A.weight.quant_state.bitsandbytes__nf4", "lora_A.scales", "lora_A.default", "lora_A.x.y", "w_norm"),
        *(
            "lora_novelty.weight",
            "lora_E",
            "scaling",
            "weight",
            "lora_B.default.extra",
            "dora_scale.default",
            "lora_diag",
        ),
    ],
)
def test_a_tensor_that_changes_the_update_or_may_is_refused_by_name(tmp_path, end):
    folder = write(tmp_path, {**lora(Q), **lora(K), f"{PREFIX}{Q}.{end}": torch.ones(6, 2)})
    text = refusal(folder)
    assert Q in text
    assert end.split(".default")[0].removesuffix(".weight") in text
    assert set(inspect(folder).adapter.sites) == {Q, K}


@pytest.mark.parametrize(
    "key", ["head.weight.absmax", "norm.diff", "head.qweight", "x.parametrizations.weight.original"]
)
def test_a_whole_tensor_that_is_no_plain_weight_is_refused_by_name(tmp_path, key):
    assert key in refusal(write(tmp_path, {**lora(Q), PREFIX + key: torch.ones(2)}))


def test_an_early_pefts_bias_of_an_adapted_module_gets_todays_name(tmp_path):
    adapter = Adapter.load(write(tmp_path, {**lora(Q), f"{PREFIX}{Q}.bias": torch.arange(6.0)}, bias="lora_only"))
    assert adapter.others == [f"{PREFIX}{Q}.base_layer.bias"]


def test_trained_tokens_have_a_row_for_each_of_the_configs_ids(tmp_path):
    tensors = {**lora(Q), f"{PREFIX}embed.token_adapter.trainable_tokens_delta": torch.ones(2, 4)}
    for name, said in (("list", [3, 4]), ("named", {"embed": [3, 4]})):
        assert Adapter.load(write(tmp_path / name, tensors, trainable_token_indices=said)).others
    for name, said in (("few", [3]), ("none", None), ("other", {"lm_head": [3, 4]})):
        text = refusal(write(tmp_path / name, tensors, trainable_token_indices=said))
        assert "embed.token_adapter.trainable_tokens_delta has 2 rows" in text
        assert f"embed {1 if said == [3] else 0} token ids" in text


@pytest.mark.parametrize("key", ["x" * 2000 + ".lora_A.weight", "layers.\x1b[31m.lora_A.weight", "a\nb.lora_A.weight"])
def test_a_name_that_cannot_be_shown_is_refused(tmp_path, key):
    text = refusal(write(tmp_path, {**lora(Q), key: torch.ones(2, 4)}))
    assert text.isprintable()
    assert len(text) < 500


# shards


@pytest.mark.parametrize(("part", "what"), [("lora_B", "rows"), ("lora_A", "columns")])
def test_a_shard_that_is_zero_in_every_module_is_told(tmp_path, part, what):
    tensors = {
        key: t
        for i, rows in enumerate((16, 8, 32))
        for key, t in lora(f"layers.{i}.q", rows=rows, columns=rows).items()
    }
    for key, tensor in tensors.items():
        if part in key:
            long = tensor if part == "lora_B" else tensor.T
            long[len(long) // 2 :] = 0
    with pytest.warns(LoraLabWarning, match=f"{what} of {part} from 50% to 100% are zero in every module"):
        Adapter.load(write(tmp_path / "shard", tensors))
    tensors[f"{PREFIX}layers.1.q.{part}.weight"][:] = 1
    Adapter.load(write(tmp_path / "whole", tensors))  # a warning is an error here


def test_one_row_that_is_zero_in_small_modules_is_no_shard(tmp_path):
    tensors = {key: t for i in range(2) for key, t in lora(f"layers.{i}.q", rows=8, columns=8).items()}
    for key, tensor in tensors.items():
        if "lora_B" in key:
            tensor[3] = 0
    Adapter.load(write(tmp_path, tensors))  # a warning is an error here


def test_a_whole_weight_of_an_adapted_module_is_told(tmp_path):
    whole = {f"{PREFIX}{Q}.base_layer.weight": torch.ones(6, 4)}
    with pytest.warns(LoraLabWarning, match=rf"1 adapted modules come with a whole weight .*: {Q}"):
        adapter = Adapter.load(write(tmp_path / "linear", {**lora(Q), **lora(K), **whole}))
    assert adapter.others == list(whole)
    embedding = {
        f"{PREFIX}embed.lora_embedding_A": torch.ones(2, 8),
        f"{PREFIX}embed.lora_embedding_B": torch.ones(6, 2),
        f"{PREFIX}embed.base_layer.weight": torch.ones(8, 6),
    }
    Adapter.load(write(tmp_path / "grown", embedding))  # a warning is an error here
