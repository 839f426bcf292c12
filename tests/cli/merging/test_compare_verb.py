"""`lora-lab compare` from the shell."""

import json

import peft
import pytest
from making_adapters import lora, write
from making_checkpoints import QV, train, write_base

import lora_lab as library
from lora_lab.adapters.adapter import Adapter
from lora_lab.geometry import delta_hash

pytestmark = pytest.mark.usefixtures("quick_figures")


@pytest.fixture
def three(tmp_path):
    """Two adapters and a copy of the first with a larger alpha."""
    made = []
    for name, seed, alpha in (("a", 0, 4), ("b", 1, 4), ("c", 0, 5)):
        parts = [lora(f"layers.{i}.q_proj", seed=10 * seed + i, rows=40, columns=30) for i in range(2)]
        tensors = {key: tensor for part in parts for key, tensor in part.items()}
        made.append(write(tmp_path / name, tensors, lora_alpha=alpha))
    return made


def test_adapters_are_compared_from_the_shell(lora_lab, three, tmp_path):
    code, out, err = lora_lab("compare", *three, "--csv", "--latex")
    assert code == 0, err
    assert "a and c are near-duplicates (cosine 1.000000, 2.0e-01 of ΔW apart, ‖ΔW‖ as 0.8 : 1)" in out
    assert "a and c share their initial A" in out
    assert out.splitlines()[-1] in (
        "by likeness: b, a, c",
        "by likeness: b, c, a",
        "by likeness: a, c, b",
        "by likeness: c, a, b",
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"compare.{end}" for end in ("json", "csv", "tex")}
    again, out2, err = lora_lab("compare", *three, "--figure")
    assert (again, out2) == (0, out)
    assert "this very result is there already" in err
    assert (tmp_path / "out" / "compare.pdf").exists()
    assert lora_lab("compare", *three[:2], "--force")[0] == 0  # whose figure that was not
    assert not (tmp_path / "out" / "compare.pdf").exists()
    assert lora_lab("compare", *three, "--force")[0] == 0
    code, out, err = lora_lab("compare", *three[:2])
    assert (code, out) == (1, "")
    assert "compare.json: exists already; --force replaces it" in err


def test_a_pair_is_shown_by_layer_and_type(lora_lab, three):
    code, out, err = lora_lab("compare", *three[:2])
    assert code == 0, err
    assert "layers.1" in out.partition("By layer")[2].partition("By type")[0]
    assert "q_proj" in out.partition("By type")[2]
    code, out, _ = lora_lab("compare", *three[:2], "--signs", "-o", "signs")
    assert "a and b agree in the sign of 0." in out
    code, out, _ = lora_lab("compare", *three[:2], "--levels", "module", "-o", "other", "--json")
    content = json.loads(out)
    assert content["kind"] == "compare"
    assert content["columns"]["group"] == ["", "layers.0.q_proj", "layers.1.q_proj"]


def test_inspect_shows_the_hash_that_all_gauges_share(lora_lab, tmp_path):
    tensors = lora("layers.0.q_proj", rows=40, columns=30)
    A, B = tensors
    write(tmp_path / "a", tensors)
    write(tmp_path / "b", {A: tensors[A].flip(0) * 4, B: tensors[B].flip(1) / 4})
    write(tmp_path / "c", {A: tensors[A], B: -tensors[B]})
    a, b, c = (json.loads(lora_lab("inspect", name, "--json")[1]) for name in "abc")
    assert a["hash"] == b["hash"] == delta_hash(Adapter.load(tmp_path / "a").updates)
    assert a["hash"] != c["hash"]
    assert f"hash of ΔW {a['hash']}" in lora_lab("inspect", "a")[1]
    write(tmp_path / "d", tensors, use_dora=True)
    out = lora_lab("inspect", "d", "--json")[1]
    assert json.loads(out)["hash"] is None


def test_bad_input_is_one_line_and_leaves_nothing(lora_lab, three, tmp_path):
    write(tmp_path / "wide", lora("layers.0.q_proj", rows=40, columns=31))
    for arguments, text in [
        ([three[0]], "1 adapter given; to compare, two or more are needed"),
        ([three[0], "wide"], "layers.0.q_proj is 40 × 30 and 40 × 31"),
        ([three[0], "nowhere"], "nowhere"),
        ([*three[:2], "--levels", "layr"], "did you mean 'layer'"),
        ([*three[:2], "--energy", "0"], "--energy"),
    ]:
        code, out, err = lora_lab("compare", *arguments)
        assert (code, out) == (1, ""), err
        assert [line for line in err.splitlines() if line.startswith("error:")] == err.splitlines()
        assert len(err.splitlines()) == 1
        assert text in err
        assert not (tmp_path / "out").exists()


@pytest.fixture
def on_base(tmp_path):
    """A tiny base, and an adapter of it whose ΔW is larger than W."""
    base = write_base("llama", tmp_path / "base")
    train("llama", base, tmp_path / "a", peft.LoraConfig(r=2, lora_alpha=200, target_modules=QV))
    return base


def test_intruders_are_counted_in_a_base_and_lowered(lora_lab, on_base, tmp_path):
    code, out, err = lora_lab("compare", "a", "--base", "base", "--threshold", "0.8", "--levels", "layer", "--figure")
    assert code == 0, err
    assert "4 weights of the base are decomposed: about" in err
    assert "In base, by layer" in out
    assert "Pairs" not in out
    assert (tmp_path / "out" / "compare.pdf").exists()
    found = json.loads(
        lora_lab("compare", "a", "--base", "base", "--threshold", "0.8", "--levels", "layer", "--json")[1]
    )["summary"]["inside"]
    count = found[0]["intruders"]
    assert [row["group"] for row in found] == ["", "model.layers.0", "model.layers.1"]
    assert 0 < count == found[1]["intruders"] + found[2]["intruders"] <= found[0]["looked_at"]
    told = {}
    for more in ([], ["--exact"]):
        name = f"b{len(more)}"
        code, out, err = lora_lab(
            "prune", "a", "--intruders", "0.5", "--threshold", "0.8", "--base", "base", *more, "-o", name, "--json"
        )
        assert code == 0, err
        told[bool(more)] = json.loads(out)
        assert sum(told[bool(more)]["intruders"].values()) == count
    assert told[True]["cut"] < 1e-6 < told[False]["cut"]
    assert told[True]["ranks"][0] == told[False]["ranks"][0] + count
    assert (
        f"{count} in"
        in lora_lab("prune", "a", "--intruders", "0.5", "--threshold", "0.8", "--base", "base", "-o", "c")[1]
    )
    own = Adapter.load(tmp_path / "b0").tensors
    again = library.prune(tmp_path / "a", intruders=0.5, threshold=0.8, base=tmp_path / "base").tensors
    assert all((own[key] == again[key]).all() for key in own)


def test_bad_bases_are_one_line_and_leave_nothing(lora_lab, on_base, three, tmp_path):
    for arguments, text in [
        (["compare", "a", "--base", "nowhere"], "nowhere"),
        (["compare", *map(str, three[:2]), "--base", "base"], "the base has no module layers.0.q_proj"),
        (["compare", "a"], "1 adapter given; to compare, two or more are needed"),
        (["compare", *map(str, three), "--tsne"], "3 adapters; t-SNE needs at least 4"),
        (["prune", "a", "--intruders", "0.5", "-o", "out"], "--intruders needs --base"),
        (["prune", "a", "--intruders", "-1", "--base", "base", "-o", "out"], "--intruders"),
        (["prune", "a", "--intruders", "0.5", "--rank", "1", "-o", "out"], "in one way: --keep"),
    ]:
        code, out, err = lora_lab(*arguments)
        assert (code, out) == (1, ""), err
        lines = [line for line in err.splitlines() if "are decomposed" not in line]
        assert len(lines) == 1, err
        assert text in lines[0]
        assert not (tmp_path / "out").exists()
