"""`lora-lab compare` from the shell."""

import json

import pytest
from making_adapters import lora, write

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
    assert "a and c are near-duplicates (cosine 1.000000)" in out
    assert "a and c share their initial A" in out
    assert out.splitlines()[-1] in (
        "by likeness: b, a, c",
        "by likeness: b, c, a",
        "by likeness: a, c, b",
        "by likeness: c, a, b",
    )
    names = {f"compare.{end}" for end in ("json", "pdf", "png", "csv", "tex")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    again, out2, err = lora_lab("compare", *three)
    assert (again, out2) == (0, out)
    assert "this very result is there already" in err
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
