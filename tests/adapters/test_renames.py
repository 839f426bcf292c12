"""Adapters whose modules have other names: what is the same by another beginning, and what PEFT makes of it."""

import pytest
import torch
from making_adapters import lora, write
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import adapter, deltas, update

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.lowrank import LowRank
from lora_lab.adapters.renames import rename_all, renamed, require_shared_modules, suggested
from lora_lab.errors import MismatchError, OptionError
from lora_lab.merging.merged import merge
from lora_lab.merging.paths import Paths
from lora_lab.merging.sources import Sources
from lora_lab.merging.writing.export import save

SHAPES = {"layers.0.q": (6, 4), "layers.0.v": (5, 4), "layers.1.q": (6, 4), "layers.10.v": (5, 4)}


def under(head, shapes=SHAPES, seed=0):
    names = {f"{head}.{name}" if head else name: shape for name, shape in shapes.items()}
    return adapter({n: update(2, s, seed + i) for i, (n, s) in enumerate(names.items())}, f"{head or 'bare'}{seed}")


PAIRS = [
    ("language_model.model", "model.language_model"),
    ("model.language_model", "language_model.model"),
    ("model", ""),
    ("", "model"),
    ("model", "model.language_model"),
    ("model.model", "model"),
    ("model", "model.model"),
    ("bert", "roberta"),
]


@pytest.mark.parametrize(("mine", "theirs"), PAIRS)
def test_a_renaming_that_is_offered_makes_the_modules_the_same(mine, theirs):
    first, other = under(mine), under(theirs, seed=9)
    with pytest.raises(
        MismatchError, match=r"update no module together: .*layers\.0\.q, and .*`rename` (\S*)="
    ) as told:
        require_shared_modules([first, other])
    old, _, new = str(told.value).rpartition("`rename` ")[2].split()[0].partition("=")
    moved = rename_all([first, other], [(old, new)])
    assert moved[0] is first
    assert deltas(moved[1]).keys() == deltas(first).keys()
    for name, delta in deltas(other).items():
        assert torch.equal(deltas(moved[1])[f"{mine}.{name.removeprefix(theirs).lstrip('.')}".lstrip(".")], delta)
    merged = merge(Sources(moved)).adapter
    for name, delta in deltas(merged).items():
        assert torch.allclose(delta, deltas(first)[name] + deltas(moved[1])[name], atol=1e-6)
    Paths(moved).mix([0.5, 0.5], "delta")


def test_one_of_two_may_have_more_modules():
    shorten = {name: SHAPES[name] for name in ("layers.0.v", "layers.1.q")}
    assert suggested([under("model")], under("", shorten)) == ("", "model")
    assert suggested([under("model", shorten)], under("")) == ("", "model")


def test_nothing_is_offered_where_shapes_or_names_differ():
    other = {**SHAPES, "layers.1.q": (7, 4)}
    assert suggested([under("model")], under("", other)) is None
    assert suggested([under("model")], under("", {"layers.1.k": (6, 4), **dict(list(SHAPES.items())[1:])})) is None
    one, two = ({f"layers.{i}.q": (6, 4)} for i in (0, 1))
    assert suggested([under("", one)], under("", two)) is None  # another layer
    assert suggested([under("encoder")], under("0.auto_model.encoder")) == ("0.auto_model", "")
    with pytest.raises(MismatchError, match=r"h\.0\.mlp; adapters of one base model are needed"):
        require_shared_modules([under("model"), under("", {"h.0.mlp": (6, 4)})])


def test_adapters_that_hang_together_by_others_are_let_through():
    chain = [under("", {name: SHAPES[name] for name in names}) for names in (list(SHAPES)[:2], list(SHAPES)[1:3])]
    require_shared_modules([chain[0], under("", {"layers.1.q": (6, 4), "layers.10.v": (5, 4)}), chain[1]])
    with pytest.raises(MismatchError, match=r"layers\.0\.q, and layers\.10\.v"):
        require_shared_modules([chain[0], under("", {"layers.10.v": (5, 4)}), chain[1]])


@pytest.mark.parametrize("use", [lambda pair: merge(Sources(pair)), Paths])
def test_merges_and_lines_of_adapters_without_a_common_module_are_refused(use):
    with pytest.raises(MismatchError, match=r"model0 and bare9 update no module together: .*`rename` =model makes"):
        use([under("model"), under("", seed=9)])


def test_different_base_models_are_what_is_said_first():
    other = adapter({"bert.q": update(2, (6, 4), 0)}, "other", base_model_name_or_path="another")
    with pytest.raises(MismatchError, match="different base models: 'tiny' and 'another'"):
        require_shared_modules([under("model"), other])


def test_a_renaming_without_use_or_with_clashes_is_refused():
    with pytest.raises(OptionError, match="no adapter has modules that begin with 'bert', such as model"):
        rename_all([under("model")], [("bert", "x")])
    with pytest.raises(OptionError, match="gives two modules one name"):
        renamed(adapter({"a.q": update(2, (6, 4), 0), "b.q": update(2, (6, 4), 1)}), "a", "b")


def test_patterns_and_whole_tensors_are_renamed_with_the_modules(tmp_path):
    """α/r is 4/2 in one module and 6/3 · 2 in the other, whose pattern names it in full."""
    tensors = lora("model.layers.0.q_proj", rank=2) | lora("model.layers.1.q_proj", rank=3, seed=1)
    tensors["base_model.model.model.norm.weight"] = torch.ones(4)
    patterns = {"rank_pattern": {"^model.layers.1.q_proj": 3}, "alpha_pattern": {"model.layers.1.q_proj": 12}}
    given = {"target_modules": ["q_proj"], "modules_to_save": ["norm"], "layers_to_transform": [0, 1], **patterns}
    before = Adapter.load(write(tmp_path / "a", tensors, **given))
    renamed(before, "model", "text.model").save(tmp_path / "b")
    after = Adapter.load(tmp_path / "b")
    assert set(after.sites) == {"text.model.layers.0.q_proj", "text.model.layers.1.q_proj"}
    for name, delta in deltas(before).items():
        assert torch.equal(deltas(after)[f"text.{name}"], delta)
    assert after.others == ["base_model.model.text.model.norm.weight"]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"rank_pattern": {"layers.1.self_attn.q_proj": 3}}])
def test_an_adapter_of_the_bare_model_renamed_is_the_same_in_the_whole_one_in_peft(base_model, tmp_path, options):
    whole = base_model("llama").float().eval()
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **options)
    wrapped = get_peft_model(whole.model, config)
    wrapped.save_pretrained(tmp_path / "bare")
    renamed(Adapter.load(tmp_path / "bare"), "", "model").save(tmp_path / "renamed")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        states = wrapped.eval()(tokens).last_hidden_state
        loaded = PeftModel.from_pretrained(base_model("llama").float(), tmp_path / "renamed").eval()
        found = loaded(tokens, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found, states, rtol=0, atol=1e-5)


def test_from_the_shell_a_merge_is_refused_and_then_renamed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    under("model").save(tmp_path / "a")
    under("", seed=9).save(tmp_path / "b")
    from lora_lab.cli import main

    def run(*line):
        with pytest.raises(SystemExit) as left:
            main(list(line))
        return left.value.code

    assert run("merge", "a", "b", "-o", "m") == 1
    assert capsys.readouterr().err.replace("\n", " ").endswith("--rename =model makes them the same ")
    assert not (tmp_path / "m").exists()
    assert run("merge", "a", "b", "-o", "m", "--rename", "=model") == 0
    assert set(Adapter.load(tmp_path / "m").sites) == set(under("model").sites)
    assert run("interpolate", "a", "b", "--rename", "model") == 1
    assert "OLD=NEW is needed" in capsys.readouterr().err


# merges that cancel


@pytest.mark.parametrize("target", ["m", "m.safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_difference_of_equal_adapters_is_zero_and_is_written(tmp_path, target, dtype):
    one = under("")
    merged = merge(Sources([one, one], [1.0, -1.0]), dtype=dtype)
    assert merged.error == 0
    save(merged, tmp_path / target)
    with pytest.warns(match="0|zero"):
        found = Adapter.load(tmp_path / target)
    assert all(bool((delta == 0).all()) for delta in deltas(found).values())


def test_a_difference_of_the_last_bit_of_one_entry_is_written_as_it_is(tmp_path):
    """Norm 1e-10 beside factors of norm 2: rounding of their product is as large as a millionth of it."""
    one = LowRank(torch.ones(1, 4), torch.tensor([[1.0], [1e-3], [0.7]]))
    moved = one.B.clone()
    moved[1] = torch.nextafter(moved[1], torch.tensor(1.0))
    pair = [adapter({"net.q": LowRank(one.A, B)}, f"u{i}") for i, B in enumerate((one.B, moved))]
    save(merge(Sources(pair, [-1.0, 1.0])), tmp_path / "m")
    found = deltas(Adapter.load(tmp_path / "m"))["net.q"]
    torch.testing.assert_close(found[1], (moved - one.B)[1].double().expand(4), rtol=1e-5, atol=0)


def test_one_module_in_which_two_adapters_are_equal_becomes_zero_and_the_others_stay(tmp_path):
    one = under("")
    changed = {name: update * (1.0 if name == "layers.0.q" else 3.0) for name, update in one.updates.items()}
    other = one.with_updates(changed, source="other")
    save(merge(Sources([one, other], [-1.0, 1.0])), tmp_path / "m")
    with pytest.warns(match="0|zero"):
        found = deltas(Adapter.load(tmp_path / "m"))
    assert bool((found["layers.0.q"] == 0).all())
    for name in SHAPES.keys() - {"layers.0.q"}:
        torch.testing.assert_close(found[name], 2 * deltas(one)[name], rtol=1e-5, atol=1e-5)


def test_a_merge_that_cancels_is_the_base_model_in_peft(base_model, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base_model("llama").float(), config).save_pretrained(tmp_path / "a")
    one = Adapter.load(tmp_path / "a")
    save(merge(Sources([one, one], [1.0, -1.0])), tmp_path / "m")
    tokens = torch.arange(8)[None]
    base = base_model("llama").float().eval()
    with torch.no_grad():
        wanted = base(tokens).logits
        found = PeftModel.from_pretrained(base, tmp_path / "m").eval()(tokens).logits
    assert torch.equal(found, wanted)
