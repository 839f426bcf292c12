"""Merges at their edges: seeds that are not given, numbers that do not fit, modules without a change, odd tuners."""

import warnings
from dataclasses import replace

import peft
import pytest
import torch
from peft_models import logits, randomised
from tiny_models import Tiny, adapter, deltas, update

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.formats.layout import Layout
from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import FileError, LoraLabError, LoraLabWarning, OptionError, TunerError
from lora_lab.merging.merged import merge
from lora_lab.merging.methods import MERGES, check, rules
from lora_lab.merging.sources import Sources
from lora_lab.merging.writing.export import save
from lora_lab.tasks.task import Split

RULES = rules()

TWINS = {"layers.0.fc": (8, 6), "layers.1.fc": (8, 6)}
RANDOM = ("dare", "dare-ties", "della")


def twins(count: int = 2, dtype: torch.dtype = torch.float32) -> Sources:
    """Adapters whose two modules have the same ΔW."""
    made = [dict.fromkeys(TWINS, update(2, (8, 6), seed, dtype=dtype)) for seed in range(count)]
    return Sources([adapter(each, f"a{i}") for i, each in enumerate(made)])


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# seeds


@pytest.mark.parametrize("method", RANDOM)
def test_modules_of_one_shape_are_thinned_each_in_its_own_way(method):
    found = deltas(merge(twins(), method).adapter)
    assert not torch.equal(*found.values())


@pytest.mark.parametrize("inner", RANDOM)
@pytest.mark.parametrize("method", ["knots", "core-space"])
def test_modules_are_thinned_each_in_its_own_way_inside_of_a_subspace_too(method, inner):
    found = deltas(merge(twins(), method, options={"inner": inner}).adapter)
    assert float((found["layers.0.fc"] - found["layers.1.fc"]).norm()) > 0.01


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((name, {}) for name in MERGES if "seed" in MERGES[name].defaults() and not MERGES[name].reads_data),
        *((name, {"inner": "dare"}) for name in ("knots", "core-space")),
    ],
)
def test_the_default_seed_in_the_record_gives_the_merge_again(method, options):
    first = merge(twins(), method, options=options)
    recorded = first.adapter.record["merge"]["options"]
    assert recorded["seed"] == 0
    again = merge(twins(), method, options=recorded)
    torch.testing.assert_close(deltas(again.adapter), deltas(first.adapter), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [name for name in MERGES if not MERGES[name].reads_data],
)
def test_what_the_record_says_makes_the_merge_again(method):
    sources = twins(3)
    first = merge(sources, method, coefficient=0.7, rank=2)
    made = first.adapter.record["merge"]
    again = merge(sources, made["method"], options=made["options"], coefficient=made["coefficient"], rank=made["rank"])
    torch.testing.assert_close(deltas(again.adapter), deltas(first.adapter), rtol=0, atol=1e-5)


# numbers that do not fit


@pytest.mark.parametrize("method", ["magnitude", "task-arithmetic"])
def test_what_float16_cannot_hold_is_refused_by_module(method):
    large = LowRank(torch.full((1, 6), 1e3), torch.full((8, 1), 1e3))
    options = {"density": 1.0} if method == "magnitude" else {}
    with pytest.raises(LoraLabError, match=r"layers\.0\.fc.*float16|float16.*layers\.0\.fc"):
        merge(Sources([adapter({"layers.0.fc": large})]), method, options=options, coefficient=100.0, dtype="float16")


def test_what_float16_cannot_hold_is_not_written(tmp_path):
    large = LowRank(torch.full((1, 6), 1e3), torch.full((8, 1), 1e3))
    with pytest.raises(LoraLabError, match="float16 cannot hold"):
        save(merge(Sources([adapter({"layers.0.fc": large})]), coefficient=100.0, dtype="float16"), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("method", "rank"), [("task-arithmetic", None), ("ties", None), ("ties", 2), ("iso-c", 2)])
def test_the_error_of_a_narrow_file_is_the_true_one(tmp_path, dtype, method, rank):
    sources = twins(3)
    exact = deltas(merge(sources, method).adapter)
    merged = merge(sources, method, rank=rank, dtype=dtype)
    found = deltas(Adapter.load(save(merged, tmp_path / "m.safetensors")))
    gone = {name: float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact}
    for name, error in gone.items():
        assert merged.errors[name] == pytest.approx(error, rel=0.03)
    size = torch.stack([delta.norm() for delta in exact.values()])
    total = float((torch.tensor(list(gone.values())) * size).norm() / size.norm())
    assert merged.error == pytest.approx(total, rel=0.03)
    assert {t.dtype for t in merged.adapter.tensors.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("coefficient", [float("inf"), float("nan")])
def test_a_coefficient_that_is_not_finite_is_refused(coefficient):
    with pytest.raises(LoraLabError, match="finite number is needed"):
        merge(twins(), coefficient=coefficient)


def test_a_coefficient_of_zero_is_nothing_at_no_error():
    merged = merge(twins(), "ties", coefficient=0.0)
    assert merged.error == 0
    assert all(float(delta.abs().max()) == 0 for delta in deltas(merged.adapter).values())


# modules without a change


def test_a_module_without_a_change_is_written_without_a_word_on_temporary_files(tmp_path):
    a = adapter({"layers.0.fc": update(2, (8, 6), 0)}, "a")
    b = adapter({name: update(2, (8, 6), 1) for name in ("layers.0.fc", "layers.1.fc")}, "b")
    merged = merge(Sources([a, b], [1.0, 0.0]))
    save(merged, tmp_path / "m")  # any warning is an error
    with pytest.warns(LoraLabWarning, match="zero delta"):
        assert Adapter.load(tmp_path / "m").updates["layers.1.fc"].norm() == 0


@pytest.mark.parametrize("method", [name for name in MERGES if not MERGES[name].reads_data])
def test_adapters_that_cancel_leave_zeros_that_peft_can_load(method, tmp_path):
    nothing = adapter({name: 0.0 * update(2, shape, 0) for name, shape in TWINS.items()}, "a")
    merged = merge(Sources([nothing, nothing]), method)
    assert all(float(delta.abs().max()) == 0 for delta in deltas(merged.adapter).values())
    assert min(u.rank for u in merged.adapter.updates.values()) >= 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraLabWarning)
        save(merged, tmp_path / "m")
    net = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList(torch.nn.ModuleDict({"fc": torch.nn.Linear(6, 8)}) for _ in "ab")}
    )
    loaded = peft.PeftModel.from_pretrained(net, tmp_path / "m")
    assert float(loaded.base_model.model.layers[0]["fc"].get_delta_weight("default").abs().max()) == 0


# the file


def test_a_file_that_lost_a_module_is_not_kept(tmp_path, monkeypatch):
    merged = merge(twins())
    true = Adapter.save

    def forgetful(adapter, path, **options):
        kept = {name: u for name, u in adapter.updates.items() if name != "layers.1.fc"}
        return true(adapter.with_updates(kept, source=str(path)), path, **options)

    monkeypatch.setattr(Adapter, "save", forgetful)
    for target in ("m", "m.safetensors"):
        with pytest.raises(FileError, match=rf"{target}: the file does not hold the modules that were written"):
            save(merged, tmp_path / target)
    assert not list(tmp_path.iterdir())


def test_a_file_in_another_format_is_checked_by_its_delta(tmp_path, monkeypatch):
    merged = merge(twins())
    merged = replace(merged, adapter=replace(merged.adapter, layout=Layout("mlx")))
    save(merged, tmp_path / "right")
    true = Adapter.save

    def wrong(adapter, path, **options):
        return true(replace(adapter, tensors={k: t * 1.001 for k, t in adapter.tensors.items()}), path, **options)

    monkeypatch.setattr(Adapter, "save", wrong)
    with pytest.raises(FileError, match=r"does not give the ΔW of layers\.[01]\.fc"):
        save(merged, tmp_path / "wrong")
    assert [path.name for path in tmp_path.iterdir()] == ["right"]


def test_a_failed_replacement_leaves_what_was_there(tmp_path, monkeypatch):
    save(merge(twins()), tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}

    def broken(*args):
        raise FileError("broken")

    monkeypatch.setattr("lora_lab.merging.writing.export.same_bits", broken)
    with pytest.raises(FileError, match="broken"):
        save(merge(twins(3)), tmp_path / "m", force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


# options


@pytest.mark.parametrize("name", [name for name in RULES if name != "slerp"])
def test_options_of_an_inner_rule_are_those_of_the_rule_itself(name):
    own = MERGES[name].defaults()
    assert MERGES["knots"].defaults({"inner": name}) == {"inner": "ties", **own}
    assert check("core-space", {"inner": name, **own}) == {"inner": name, **own}


def test_a_number_of_clusters_that_is_not_whole_is_refused():
    with pytest.raises(OptionError, match="clusters"):
        merge(twins(), "lego", options={"clusters": 2.5})


def test_options_of_the_inner_rule_that_is_set_can_be_searched(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    adapter({"layers.0.fc": update(2, (8, 6), 0)}).save(tmp_path / "a")
    from lora_lab.cli import main

    inner = ["--method", "knots", "--set", "inner=breadcrumbs", "--search", "gamma=0.01,0.1"]
    with warnings.catch_warnings(), pytest.raises(SystemExit):
        main(["merge", "a", "a", *inner, "-o", "x"])
    assert "unknown option" not in capsys.readouterr().err  # that there is no task is what it may say


# bases


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fisher_takes_a_base_of_any_dtype(dtype):
    class Other(Tiny):
        def build_model(self):
            return super().build_model().to(dtype)

        def _load(self, split):
            inputs = dict(super()._load(split).inputs)
            return Split({**inputs, "x": inputs["x"].to(dtype)})

    made = [adapter({"layers.0.fc": update(2, (8, 6), seed)}, f"a{seed}") for seed in range(2)]
    found, wanted = (
        deltas(merge(Sources(made, tasks=[kind(0), kind(1)]), "fisher").adapter)["layers.0.fc"]
        for kind in (Other, Tiny)
    )
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_a_tuner_of_vectors_is_refused_by_name(base_model, tmp_path):
    model = peft.get_peft_model(base_model("llama"), peft.LNTuningConfig(target_modules=["input_layernorm"]))
    randomised(model).save_pretrained(tmp_path / "norms")
    with pytest.raises(TunerError, match="LN_TUNING"):
        merge(Sources([Adapter.load(tmp_path / "norms")], base=lambda: base_model("llama")))


def test_trained_tokens_are_merged_into_an_embedding_that_peft_loads(base_model, tmp_path):
    config = peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"])
    model = randomised(peft.get_peft_model(base_model("llama"), config))
    model.save_pretrained(tmp_path / "tokens")
    merged = merge(Sources([Adapter.load(tmp_path / "tokens")], base=lambda: base_model("llama")))
    loaded = peft.PeftModel.from_pretrained(base_model("llama"), save(merged, tmp_path / "m")).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


def test_a_merged_file_holds_nothing_of_another_tuner(base_model, tmp_path):
    config = peft.VeraConfig(r=2, target_modules=["q_proj", "o_proj"])
    randomised(peft.get_peft_model(base_model("llama"), config)).save_pretrained(tmp_path / "vera")
    merged = merge(Sources([Adapter.load(tmp_path / "vera")] * 2, base=lambda: base_model("llama")))
    assert not [key for key in merged.adapter.tensors if "vera" in key]
