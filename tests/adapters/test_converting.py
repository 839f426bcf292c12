"""Adapters in other formats: the same ΔW whatever the way, and nothing lost in silence."""

import itertools
import json
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making_adapters import PREFIX, lora, write
from safetensors.torch import load_file, save_file

import lora_lab as ll
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files.converting import converted, save
from lora_lab.adapters.formats.diffusion.components import numbers_for
from lora_lab.adapters.formats.registry import FORMATS, WRITTEN
from lora_lab.errors import AdapterError, FileError, LoraLabWarning, OptionError, TunerError
from lora_lab.files.trust import Origin

ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
CLIP = "text_encoder.text_model.encoder.layers"
LINEAR = [f"{ATTENTION}.to_q", f"{ATTENTION}.to_out.0", f"{CLIP}.0.self_attn.q_proj", f"{CLIP}.1.mlp.fc1"]
CONV = ["unet.mid_block.resnets.0.conv1", "unet.down_blocks.0.downsamplers.0.conv"]
PAIRS = list(itertools.combinations_with_replacement(WRITTEN, 2))
NO_CONVOLUTIONS = {"mlx"}


def test_the_formats_that_are_written_are_listed():
    assert {name for name, form in FORMATS.items() if form.write} == set(WRITTEN)


def test_the_page_on_formats_tells_of_each_whether_it_is_written():
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    told = {row[0]: row[3].partition(" ")[0] for row in rows[2:]}
    assert told == {name: "yes" if name in WRITTEN else "no" for name in FORMATS}


@st.composite
def specs(draw):
    """(module, rank, alpha) of every module; all numbers as kohya's float32 alphas hold them."""
    names = draw(st.lists(st.sampled_from([*LINEAR, *CONV]), min_size=1, unique=True))
    alphas = st.sampled_from([-3.0, 0.25, 1.0, 2.0, 3.0, 8.0])
    return [(name, draw(st.integers(1, 4)), draw(alphas)) for name in names]


def adapter_of(folder, spec, *, dtype=torch.float32, dora=False, seed=0):
    """A random adapter of these modules, read from PEFT's format."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, rank, _ in spec:
        kernel, ones = ((3, 3), (1, 1)) if name in CONV else ((), ())
        key = f"{PREFIX}{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, 4, *kernel, generator=generator).to(dtype)
        tensors[f"{key}.lora_B.weight"] = torch.randn(6, rank, *ones, generator=generator).to(dtype)
        if dora:
            shape = (1, 6, 1, 1) if kernel else (6,)
            tensors[f"{key}.lora_magnitude_vector"] = torch.rand(shape, generator=generator)
    numbers = numbers_for({name: rank for name, rank, _ in spec}, {name: alpha for name, _, alpha in spec})
    return Adapter.load(write(folder, tensors, **numbers, use_dora=dora, target_modules=[name for name, *_ in spec]))


def saved(adapter, path, format_name):
    """Where it lies in this format: a folder where the format has one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraLabWarning)
        path = path if FORMATS[format_name].file else path.with_suffix(".safetensors")
        return converted(adapter, format_name).adapter.save(path)


def load(path):
    """What lies there, where formats without alphas say that scale 1 is assumed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraLabWarning)
        return Adapter.load(path)


def content(path):
    """Every file below the path, byte for byte."""
    files = [path] if path.is_file() else sorted(inner for inner in path.rglob("*") if inner.is_file())
    return {str(inner.relative_to(path)): inner.read_bytes() for inner in files}


def assert_same(one, other, *, exactly=True):
    assert set(one.sites) == set(other.sites)
    for name, site in one.sites.items():
        if one.why_not_additive is None:
            first, second = (adapter.updates[name].delta() for adapter in (one, other))
            assert torch.equal(first, second) if exactly else torch.allclose(first, second, rtol=1e-5, atol=1e-6)
        if "lora_magnitude_vector" in site.keys:
            magnitudes = [each.tensors[each.sites[name].keys["lora_magnitude_vector"]] for each in (one, other)]
            assert torch.equal(*(magnitude.flatten() for magnitude in magnitudes))


@pytest.mark.parametrize(("first", "second"), PAIRS)
@settings(max_examples=4, deadline=None)
@given(spec=specs(), dora=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_way_through_two_formats_keeps_delta_bit_for_bit(first, second, spec, dora, dtype):
    if NO_CONVOLUTIONS & {first, second}:
        spec = [each for each in spec if each[0] in LINEAR] or [(LINEAR[0], 2, 3.0)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made = adapter_of(root / "made", spec, dora=dora, dtype=dtype)
        one = load(saved(made, root / "one", first))
        two = load(saved(one, root / "two", second))
        assert (one.layout.format, two.layout.format) == (first, second)
        assert_same(made, one)
        assert_same(made, two)
        back = saved(two, root / "back", first)
        again = saved(load(saved(load(back), root / "there", second)), root / "again", first)
        assert content(back) == content(again)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_rslora_keeps_its_delta(tmp_path, first, second):
    spec = [(name, rank, 3.0) for rank, name in enumerate(LINEAR, 1)]
    made = adapter_of(tmp_path / "plain", spec)
    made = Adapter.load(write(tmp_path / "made", dict(made.tensors), **{**made.config, "use_rslora": True}))
    one = load(saved(made, tmp_path / "one", first))
    assert_same(made, load(saved(one, tmp_path / "two", second)), exactly=False)


@pytest.mark.parametrize("name", ["kohya", "comfy"])
def test_a_format_with_several_schemes_of_names_gets_the_one_of_the_model(tmp_path, name):
    spec = [(f"text_encoder_2.{CLIP.partition('.')[2]}.0.mlp.fc1", 2, 2.0), (LINEAR[0], 2, 2.0)]  # of SDXL
    made = adapter_of(tmp_path / "a", spec)
    keys = load_file(saved(made, tmp_path / "x", name))
    direct = load_file(made.save(tmp_path / "y.safetensors", format=name))
    assert keys.keys() == direct.keys()
    assert any("input_blocks" in key for key in keys)


# the type


def test_a_type_is_given_and_what_it_rounds_is_told(tmp_path):
    adapter = adapter_of(tmp_path / "a", [(LINEAR[0], 2, 3.0), (LINEAR[1], 3, 1.0)])
    made = converted(adapter, dtype="bfloat16")
    assert {tensor.dtype for tensor in made.adapter.tensors.values()} == {torch.bfloat16}
    before = torch.cat([update.delta().flatten() for update in adapter.updates.values()])
    after = torch.cat([update.delta().flatten() for update in made.adapter.updates.values()])
    assert made.error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)
    assert made.changes == [f"bfloat16 rounds ΔW by {made.error:.2g} of its norm"]
    exact = converted(made.adapter, dtype="float32")
    assert (exact.error, exact.changes) == (0.0, [])


@pytest.mark.parametrize(
    ("size", "options", "text"),
    [
        (1e30, {"dtype": "float16"}, f"{LINEAR[0]} has entries that float16 cannot hold; float32 can"),
        (1.0, {"dtype": "int8"}, "dtype is 'int8'; one of float32, bfloat16, float16,"),
        (1.0, {"format_name": "difusers"}, "unknown format 'difusers' .did you mean 'diffusers'"),
    ],
)
def test_what_cannot_be_asked_for(tmp_path, size, options, text):
    adapter = adapter_of(tmp_path / "a", [(LINEAR[0], 2, 3.0)])
    large = replace(adapter, tensors={key: size * tensor for key, tensor in adapter.tensors.items()})
    with pytest.raises(OptionError, match=text):
        converted(large, **options)


# saving


def test_a_file_that_does_not_give_delta_is_not_kept(tmp_path, monkeypatch):
    adapter = adapter_of(tmp_path / "a", [(LINEAR[0], 2, 3.0)])
    form = FORMATS["mlx"]

    def wrong(adapter):
        (part,) = form.write(adapter).values()
        return {"": replace(part, tensors={key: 1.001 * tensor for key, tensor in part.tensors.items()})}

    monkeypatch.setitem(FORMATS.entries, "mlx", replace(form, write=wrong))
    with pytest.raises(FileError, match=f"does not give the ΔW of {LINEAR[0]}"):
        save(converted(adapter, "mlx").adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_magnitude_that_is_lost_is_noticed(tmp_path, monkeypatch):
    adapter = adapter_of(tmp_path / "a", [(LINEAR[0], 2, 3.0)], dora=True)
    form = FORMATS["diffusers"]

    def wrong(adapter):
        (part,) = form.write(adapter).values()
        changed = {k: t + k.endswith("magnitude_vector") for k, t in part.tensors.items()}
        return {"": replace(part, tensors=changed)}

    monkeypatch.setitem(FORMATS.entries, "diffusers", replace(form, write=wrong))
    with pytest.raises(FileError, match="does not give the ΔW"):
        save(converted(adapter, "diffusers").adapter, tmp_path / "out")


def test_the_record_goes_along_and_is_signed(tmp_path):
    adapter = adapter_of(tmp_path / "a", [(LINEAR[0], 2, 3.0)])
    own = replace(adapter, record={"method": "lora", "seed": 3}, origin=Origin(own=True))
    for name in WRITTEN:
        again = load(saved(own, tmp_path / name, name))
        assert (again.record, again.origin.own) == ({"method": "lora", "seed": 3}, True)
        again = load(saved(replace(own, origin=Origin()), tmp_path / f"foreign-{name}", name))
        assert (again.record, again.origin.own) == ({"method": "lora", "seed": 3}, False)


def test_tensors_of_no_module_are_left_out_with_a_word(tmp_path):
    flat = LINEAR[0].replace("unet.", "lora_unet_").replace(".", "_")
    pieces = {f"{flat}.lora_down.weight": torch.ones(2, 4), f"{flat}.lora_up.weight": torch.ones(6, 2)}
    save_file({**pieces, f"{flat}.alpha": torch.tensor(2.0), "note": torch.ones(1)}, tmp_path / "k.safetensors")
    with pytest.warns(LoraLabWarning, match="kept as they are: note"):
        adapter = Adapter.load(tmp_path / "k.safetensors")
    with pytest.warns(LoraLabWarning, match="1 tensors of no module are left out: note"):
        made = ll.convert(adapter, "peft")
    assert sorted(inner.name for inner in made.save(tmp_path / "out").iterdir()) == ["unet"]


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "peft"])
def test_another_tuner_and_heads_are_refused_by_name(tmp_path, name):
    adapter = adapter_of(tmp_path / "a", [(LINEAR[0], 2, 3.0)])
    headed = replace(adapter, tensors={**adapter.tensors, f"{PREFIX}unet.head.weight": torch.ones(2)})
    ia3 = {f"{PREFIX}{LINEAR[0]}.ia3_l": torch.ones(2, 1)}
    other = Adapter.load(write(tmp_path / "ia3", ia3, peft_type="IA3"))
    for odd, text in ((headed, "no place for tensors beside the adapter's own .*unet.head.weight"), (other, "IA3")):
        with pytest.raises((TunerError, AdapterError), match=text):
            saved(odd, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


# the verb


def run(lora_lab, *arguments):
    code, out, err = lora_lab("convert", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_the_verb_converts_and_tells(lora_lab, tmp_path):
    adapter_of(tmp_path / "a", [(LINEAR[0], 2, 3.0), (LINEAR[2], 3, 1.0)])
    told = run(lora_lab, "a", "--to", "mlx", "-o", "m")
    assert told == {
        "path": "m",
        "read": "peft",
        "written": "mlx",
        "tuner": "LORA",
        "modules": 2,
        "ranks": [3, 3],
        "dtypes": ["float32"],
        "error": 0.0,
        "changes": [
            "ranks of 1 modules are padded with zeros to 3, MLX's one rank for all",
            "scales that differ are multiplied into lora_b, MLX having one scale for all",
        ],
        "advice": [],
    }
    code, out, _ = lora_lab("convert", "m", "--to", "diffusers", "--dtype", "bfloat16", "-o", "d.safetensors")
    assert code == 0
    for words in ("diffusers, read as mlx", "bfloat16 rounds ΔW by", "relative error of ΔW"):
        assert words in out
    assert {tensor.dtype for tensor in load_file(tmp_path / "d.safetensors").values()} == {torch.bfloat16}


def test_a_folder_of_components_is_replaced_as_any_other_adapter(lora_lab, tmp_path):
    adapter_of(tmp_path / "a", [(LINEAR[0], 2, 3.0), (LINEAR[2], 3, 1.0)])
    assert run(lora_lab, "a", "--to", "peft", "-o", "p")["written"] == "peft"
    code, _, err = lora_lab("convert", "a", "--to", "peft", "-o", "p")
    assert code == 1
    assert "p: exists already; --force replaces it" in err
    run(lora_lab, "a", "--to", "diffusers", "-o", "p", "--force")
    assert [inner.name for inner in (tmp_path / "p").iterdir()] == ["pytorch_lora_weights.safetensors"]
    run(lora_lab, "a", "--to", "mlx", "-o", "p", "--force")
    run(lora_lab, "a", "--to", "peft", "-o", "p", "--force")
    (tmp_path / "p" / "unet" / "notes.txt").write_text("mine")
    code, _, err = lora_lab("convert", "a", "--to", "mlx", "-o", "p", "--force")
    assert code == 1
    assert "holds more than an adapter (unet)" in err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["a", "-o", "x"], "say into what: --to names the format, --for the server or tool, --dtype the type"),
        (["a", "--to", "mlx"], "-o names the adapter to write"),
        (["a", "--to", "mlxx", "-o", "x"], "unknown format 'mlxx' (did you mean 'mlx'?)"),
        (["a", "--to", "kohya", "-o", "x"], "x: kohya is a format of lone files; NAME.safetensors is needed"),
        (["a", "--to", "peft", "-o", "x.safetensors"], "peft needs a file for each model of text_encoder, unet"),
        (["a", "--to", "mlx", "--for", "vllm", "-o", "x"], "vllm takes the format peft, not mlx"),
        (["a", "--to", "mlx", "-o", "a"], "one of the inputs"),
        (["llm", "--to", "diffusers", "-o", "x"], "--rename =unet says whose they are"),
        (["llm", "--to", "kohya", "-o", "x.safetensors"], "layers.0.q_proj"),
    ],
)
def test_the_verb_refuses_in_one_line_and_writes_nothing(lora_lab, tmp_path, arguments, text):
    adapter_of(tmp_path / "a", [(LINEAR[0], 2, 3.0), (LINEAR[2], 3, 1.0)])
    write(tmp_path / "llm", lora())
    before = sorted(tmp_path.rglob("*"))
    code, out, err = lora_lab("convert", *arguments)
    assert (code, out) == (1, "")
    assert text in err
    assert len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_renamed_modules_find_their_component(lora_lab, tmp_path):
    write(tmp_path / "alone", lora("down_blocks.0.attentions.0.proj_in"))
    run(lora_lab, "alone", "--to", "diffusers", "--rename", "=unet", "-o", "d")
    assert list(Adapter.load(tmp_path / "d").sites) == ["unet.down_blocks.0.attentions.0.proj_in"]


# other verbs


def test_what_is_merged_and_pruned_is_in_the_format_that_was_read_or_asked_for(lora_lab, tmp_path):
    made = adapter_of(tmp_path / "a", [(LINEAR[0], 2, 2.0), (LINEAR[2], 2, 2.0)])
    for name in WRITTEN:
        path = saved(made, tmp_path / name, name)
        where = "out" if path.is_dir() else "out.safetensors"
        for arguments in (["merge", path, path], ["prune", path, "--rank", 1]):
            code, _, err = lora_lab(*arguments, "-o", where, "--force")
            assert code == 0, err
            assert load(tmp_path / where).layout.format == name
            code, _, err = lora_lab(*arguments, "--format", "kohya", "-o", "k.safetensors", "--force")
            assert code == 0, err
            assert load(tmp_path / "k.safetensors").layout.format == "kohya"
    code, _, err = lora_lab("merge", "kohya.safetensors", "mlx", "-o", "x")
    assert code == 1
    assert "x: kohya is a format of lone files" in err


def test_adapters_of_several_formats_are_merged_and_that_is_told(lora_lab, tmp_path):
    made = adapter_of(tmp_path / "a", [(LINEAR[0], 2, 2.0), (LINEAR[2], 2, 2.0)])
    saved(made, tmp_path / "k", "kohya")
    saved(made, tmp_path / "d", "diffusers")
    code, _, err = lora_lab("merge", "d", "k.safetensors", "--weights", "1,1", "-o", "both")
    assert code == 0, err
    assert "adapters of several formats: d (diffusers), k.safetensors (kohya); what comes out is in diffusers's" in err
    both = Adapter.load(tmp_path / "both")
    for name, update in made.updates.items():
        torch.testing.assert_close(both.updates[name].delta(), 2 * update.delta())


@pytest.mark.filterwarnings("ignore:.*have zero delta")
@pytest.mark.parametrize("format_name", ["kohya", "comfy"])
def test_a_scale_of_zero_is_written_as_zeros_and_not_as_an_alpha_of_zero(tmp_path, format_name):
    adapter = adapter_of(tmp_path / "a", [(LINEAR[0], 2, 0.0), (CONV[0], 3, 2.0)])
    save(converted(adapter, format_name).adapter, tmp_path / "b.safetensors")
    assert all(float(t) != 0 for key, t in load_file(tmp_path / "b.safetensors").items() if key.endswith("alpha"))
    read = Adapter.load(tmp_path / "b.safetensors")
    assert read.updates[LINEAR[0]].norm() == 0
    assert torch.equal(read.updates[CONV[0]].delta(), adapter.updates[CONV[0]].delta())


@pytest.mark.parametrize("form", [name for name in WRITTEN if name != "peft"])
def test_of_what_no_format_holds_it_is_said_what_can_be_done(tmp_path, form):
    tensors = {f"{PREFIX}layers.0.q_proj.oft_R.weight": torch.zeros(2, 1)}
    config = {"peft_type": "OFT", "oft_block_size": 2, "r": 2, "target_modules": ["q_proj"]}
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        TunerError, match=r"OFT updates are .*; a LoRA that is extracted from its base and the base with"
    ):
        converted(Adapter.load(tmp_path / "a"), form).adapter.save(tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
