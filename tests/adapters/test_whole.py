"""Whole tensors of several adapters: tokens go by their ids, running statistics have no mean, PEFT loads what comes."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import adapter, update

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.formats.keys import PREFIX
from lora_lab.errors import AdapterError, MismatchError
from lora_lab.merging.merged import merge
from lora_lab.merging.paths import Paths
from lora_lab.merging.sources import Sources
from lora_lab.merging.writing.export import save

KEY = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
DIMENSION = 3


def row(token, seed=0):
    """What an adapter has learnt for a token: told from the token and the adapter."""
    return torch.arange(DIMENSION) + 10.0 * token + 1000.0 * seed


def trained(seed, tokens, rows_of=None):
    made = adapter({"model.q": update(2, (4, DIMENSION), seed)}, f"t{seed}", trainable_token_indices=tokens)
    rows = torch.stack([row(token, seed if rows_of is None else rows_of) for token in tokens])
    return replace(made, tensors={**made.tensors, KEY: rows})


def test_rows_of_different_tokens_are_united_by_their_ids():
    merged = merge(Sources([trained(0, [7, 2], 0), trained(1, [5, 2], 0)])).adapter
    ids = merged.config["trainable_token_indices"]
    assert sorted(ids) == [2, 5, 7]
    for token, found in zip(ids, merged.tensors[KEY], strict=True):
        assert torch.equal(found, row(token))


def test_tokens_whose_rows_differ_are_named_and_follow_the_option():
    sources = Sources([trained(0, [7, 2]), trained(1, [2, 5])])
    with pytest.raises(MismatchError, match=r"embed_tokens\.\S+: rows of the tokens 2 differ .*`heads`"):
        merge(sources)
    for how, twice in (("average", (row(2, 0) + row(2, 1)) / 2), ("first", row(2, 0))):
        merged = merge(sources, heads=how).adapter
        found = dict(zip(merged.config["trainable_token_indices"], merged.tensors[KEY], strict=True))
        assert found.keys() == {7, 2, 5}
        assert torch.equal(found[2], twice)
        assert torch.equal(found[7], row(7, 0))
        assert torch.equal(found[5], row(5, 1))


def test_as_many_other_tokens_are_not_averaged_row_by_row_on_a_line():
    with pytest.raises(MismatchError, match="t0 and t1 train different tokens: 5, 7 in one only"):
        Paths([trained(0, [7, 2]), trained(1, [2, 5])]).check("delta")
    mixed = Paths([trained(0, [7, 2]), trained(1, [2, 7])]).mix([0.25, 0.75], "delta")
    assert mixed.config["trainable_token_indices"] == [7, 2]
    wanted = torch.stack([0.25 * row(token, 0) + 0.75 * row(token, 1) for token in (7, 2)])
    torch.testing.assert_close(mixed.tensors[KEY], wanted)


@pytest.mark.parametrize("given", [None, [1], [1, 1], {"lm_head": [1, 2]}])
def test_rows_whose_tokens_nobody_knows_are_refused(given):
    made = trained(0, [1, 2])
    lost = replace(made, config={**made.config, "trainable_token_indices": given})
    with pytest.raises(AdapterError, match=r"t0: .*has 2 rows; trainable_token_indices must name as many"):
        merge(Sources([lost, lost]))


@pytest.mark.parametrize("how", [None, "average", "first", "keep-own"])
@pytest.mark.parametrize("form", [lambda ids: ids, lambda ids: {"embed_tokens": ids}])
def test_peft_loads_merged_tokens_for_the_same_ids(base_model, tmp_path, how, form):
    found = []
    for seed, ids in enumerate(([3, 9], [9, 4] if how else [4])):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=form(ids), init_lora_weights=False)
        model = get_peft_model(base_model("llama").float(), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "trainable_tokens_delta" in name:
                    parameter.normal_()
        model.save_pretrained(tmp_path / f"t{seed}")
        found.append(Adapter.load(tmp_path / f"t{seed}"))
    merged = merge(Sources(found), heads=how)
    save(merged, tmp_path / "m")
    embedding = PeftModel.from_pretrained(base_model("llama").float(), tmp_path / "m").get_input_embeddings()
    tokens = torch.tensor([3, 4, 9, 1])
    seen = dict(zip(tokens.tolist(), embedding(tokens).detach(), strict=True))
    key = next(key for key in found[0].tensors if key.endswith("tokens_delta"))
    a, b = (adapter.tensors[key] for adapter in found)
    base = base_model("llama").float().get_input_embeddings()(tokens)
    assert torch.equal(seen[1], base[3])
    if how == "keep-own":
        assert torch.equal(seen[3], base[0])
        own = load_file(tmp_path / "m" / "heads" / "t1.safetensors")
        assert torch.equal(own[key], b)
        assert own[key.replace("trainable_tokens_delta", "token_indices")].tolist() == [9, 4]
        return
    assert torch.equal(seen[3], a[0])
    assert torch.equal(seen[4], b[-1])
    both = (a[1] + b[0]) / 2 if how == "average" else a[1]
    torch.testing.assert_close(seen[9], both, rtol=0, atol=1e-6)


def with_statistics(seed, mean):
    made = adapter({"model.q": update(2, (4, DIMENSION), seed)}, f"n{seed}", modules_to_save=["norm"])
    own = {"running_mean": torch.full((4,), mean), "num_batches_tracked": torch.tensor(int(mean))}
    return replace(made, tensors={**made.tensors, **{f"{PREFIX}norm.{name}": tensor for name, tensor in own.items()}})


def test_running_statistics_are_averaged_nowhere():
    pair = [with_statistics(0, 1.0), with_statistics(1, 2.0)]
    for name in ("average", None):
        with pytest.raises(MismatchError, match=r"norm\.(running_mean|num_batches_tracked)"):
            merge(Sources(pair), heads=name)
    assert merge(Sources(pair), heads="first").adapter.tensors[f"{PREFIX}norm.running_mean"].tolist() == [1.0] * 4
    with pytest.raises(MismatchError, match=r"norm\.\S+ differs, and running statistics"):
        Paths(pair).check("delta")
    Paths([pair[0], with_statistics(1, 1.0)]).check("delta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_heads_are_averaged_in_float64_where_they_are_float64(dtype):
    """1 + 1e-12, which float32 does not know: the mean of it and 1 is 1 + 5e-13."""
    pair = []
    for seed, extra in enumerate((0.0, 1e-12)):
        made = adapter({"model.q": update(2, (4, DIMENSION), seed)}, f"h{seed}", modules_to_save=["score"])
        head = {f"{PREFIX}score.weight": torch.full((2, 3), 1 + extra, dtype=torch.float64).to(dtype)}
        pair.append(replace(made, tensors={**made.tensors, **head}))
    wanted = 1 + 5e-13 if dtype == torch.float64 else 1.0
    for found in (Paths(pair).mix([0.5, 0.5], "delta"), merge(Sources(pair), heads="average").adapter):
        head = found.tensors[f"{PREFIX}score.weight"]
        assert head.dtype == dtype
        assert float(head[0, 0]) == pytest.approx(wanted, rel=0, abs=1e-14)
