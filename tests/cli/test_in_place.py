"""An adapter is replaced by what is made of it only where that is asked for, and only one that lora-lab wrote."""

import pytest
from making_adapters import lora, write

from lora_lab.adapters.adapter import Adapter


@pytest.fixture(params=["a.safetensors", "a"])
def own(request, tmp_path):
    """An adapter of lora-lab's, as a lone file and as a folder."""
    write(tmp_path / "peft", lora(), target_modules=["q_proj"])
    return Adapter.load(tmp_path / "peft").save(tmp_path / request.param)


@pytest.mark.parametrize("verb", [("prune", "--rank", "1"), ("convert", "--dtype", "bf16")])
def test_in_place_takes_the_adapters_place(own, lora_lab, verb):
    code, _, err = lora_lab(verb[0], own, *verb[1:], "--in-place")
    assert code == 0, err
    (site,) = Adapter.load(own).sites.values()
    assert (site.rank == 1) == (verb[0] == "prune")


def test_without_it_an_input_stays(own, lora_lab):
    before = Adapter.load(own).identity
    code, _, err = lora_lab("prune", own, "--rank", "1", "-o", own, "--force")
    assert code == 1
    assert "one of the inputs; the output needs another name" in err
    code, _, err = lora_lab("prune", own, "--rank", "1", "-o", "b", "--in-place")
    assert code == 1
    assert "one of them is needed" in err
    assert Adapter.load(own).identity == before


def test_what_lora_lab_did_not_write_is_not_replaced(tmp_path, lora_lab):
    write(tmp_path / "peft", lora(), target_modules=["q_proj"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "peft").iterdir()}
    code, _, err = lora_lab("prune", "peft", "--rank", "1", "--in-place")
    assert code == 1
    assert "lora-lab did not write" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "peft").iterdir()} == before


def test_of_a_lone_file_it_is_said_who_reads_it(own, lora_lab):
    for name, told in (("b.safetensors", True), ("folder", False)):
        code, out, err = lora_lab("prune", own, "--rank", "1", "-o", name)
        assert code == 0, err
        assert ("other programs load a folder" in " ".join(out.split())) == told
