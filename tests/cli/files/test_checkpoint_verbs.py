"""The verbs on whole checkpoints, as a user calls them."""

import json

import peft
import pytest
import torch
from making_checkpoints import QV, merged, train, write_base
from safetensors.torch import load_file

import lora_lab as ll
from lora_lab.adapters.adapter import Adapter
from lora_lab.results import schema
from lora_lab.results.reports import REPORTS

PLAIN = peft.LoraConfig(r=2, target_modules=QV)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base in bfloat16 and an adapter of it."""
    folder = tmp_path_factory.mktemp("made")
    base = write_base("llama", folder / "base", torch.bfloat16)
    return base, train("llama", base, folder / "a", PLAIN)


def one_line(result, *words):
    code, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert (code, out, len(lines)) == (1, "", 1), err
    for word in words:
        assert word in lines[0], (word, lines[0])


def as_documented(verb, out):
    report = json.loads(out)
    assert set(report) == set(schema.columns_of(REPORTS[verb]))
    pytest.importorskip("jsonschema").validate(report, schema.json_schema(verb))
    return report


def test_fuse_writes_a_folder_and_says_what_rounding_took(lora_lab, made, tmp_path):
    base, adapter = made
    code, out, err = lora_lab("fuse", base, adapter, "-o", "out", "--max-shard-size", "0.000006")
    assert code == 0, err
    assert "parameters changed" in out
    assert "most in model.layers." in out
    assert "to be written: 11.4 kB in 2 files, about 0 s" in err
    wanted = merged("llama", base, adapter)
    got = {key: t for path in (tmp_path / "out").glob("*.safetensors") for key, t in load_file(path).items()}
    assert set(got) == set(wanted)
    assert all(torch.allclose(got[key].float(), wanted[key].float(), rtol=2**-7, atol=1e-4) for key in wanted)
    code, out, err = lora_lab("fuse", base, adapter, "-o", "out", "--force", "--json")
    assert code == 0, err
    report = as_documented("fuse", out)
    recipe = json.loads((tmp_path / "out" / "fuse.json").read_text())["recipe"]
    assert recipe["steps"] == [{"fuse": {"base": "base", "adapters": ["a"]}}]
    assert 1e-4 < report["error"] < 1e-2
    assert report["files"] == ["config.json", "fuse.json", "generation_config.json", "model.safetensors"]


def test_fuse_from_python_is_the_same(made, tmp_path):
    base, adapter = made
    fused = ll.fuse(base, adapter, tmp_path / "out", coefficients=[0.5], progress=False)
    assert fused.parameters == 4
    assert json.loads((tmp_path / "out" / "fuse.json").read_text())["coefficients"] == [0.5]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fuse", "BASE", "A"], ["-o names the folder to write"]),
        (["fuse", "BASE", "A", "-o", "x.safetensors"], ["x.safetensors: a folder is written"]),
        (["fuse", "nowhere", "A", "-o", "x"], ["nowhere: no such folder or file", "hf download"]),
        (["fuse", "A", "A", "-o", "x"], ["the base has no module"]),
        (["fuse", "BASE", "BASE", "-o", "x"], ["base"]),
        (["fuse", "BASE", "A", "-o", "BASE", "--force"], ["base: one of the inputs"]),
        (["fuse", "BASE", "A", "-o", "x", "--coefficients", "1,2"], ["1 adapters and 2 coefficients"]),
        (["fuse", "BASE", "A", "-o", "x", "--coefficients", "nan"], ["finite"]),
        (["fuse", "BASE", "A", "-o", "x", "--max-shard-size", "0"], ["--max-shard-size is 0"]),
        (["fuse", "BASE", "A", "-o", "x", "--heads", "best"], ["'best'"]),
        (["fuse", "BASE/config.json", "A", "-o", "x"], ["config.json", "not a safetensors file"]),
        (["verify", "BASE", "A"], ["a base, one adapter or more, and the checkpoint"]),
        (["verify", "BASE", "A", "nowhere"], ["nowhere: no such folder or file"]),
        (["verify", "BASE", "A", "A", "--coefficients", "1,2"], ["1 adapters and 2 coefficients"]),
        (["extract", "BASE", "BASE", "-o", "x", "--rank", "2"], ["no weight of a layer differs"]),
        (["extract", "BASE", "A", "-o", "x"], ["--rank, --energy or --ratio"]),
        (["extract", "BASE", "A", "-o", "x", "--rank", "2"], ["have no parameter in common"]),
        (["extract", "BASE", "BASE", "--rank", "2"], ["-o names the adapter to write"]),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(lora_lab, made, tmp_path, arguments, words):
    base, adapter = made
    given = [each.replace("BASE", str(base)) if each != "A" else str(adapter) for each in arguments]
    one_line(lora_lab(*given), *words)
    assert list(tmp_path.iterdir()) == []


def test_verify_says_yes_or_no_by_its_exit_code_too(lora_lab, made, tmp_path):
    base, adapter = made
    ll.fuse(base, adapter, tmp_path / "right", progress=False)
    ll.fuse(base, adapter, tmp_path / "half", coefficients=(0.5,), progress=False)
    code, out, err = lora_lab("verify", base, adapter, "right")
    assert code == 0, err
    assert "to be read: 22.8 kB, about 0 s" in err
    assert out.splitlines()[-1] == "yes: base + adapter, exactly, in all 4 parameters that are adapted"
    code, out, _ = lora_lab("verify", base, adapter, "half")
    assert code == 1
    assert out.splitlines()[-1].startswith("no: 4 of 4 have ΔW times a factor (× 0.5")
    assert "scaled" in out
    code, out, _ = lora_lab("verify", base, adapter, base, "--json")
    assert code == 1
    report = as_documented("verify", out)
    assert [finding["kind"] for finding in report["findings"]] == ["missing"] * 4
    assert lora_lab("verify", base, adapter, "half", "--coefficients", "0.5")[0] == 0
    assert ll.verify(base, [adapter, adapter], "half", coefficients=(1, -0.5), progress=False).right


def test_extract_finds_the_adapter_again(lora_lab, made, tmp_path):
    base, adapter = made
    ll.fuse(base, adapter, tmp_path / "tuned", progress=False)
    code, out, err = lora_lab("extract", base, "tuned", "-o", "found", "--rank", 8)
    assert code == 0, err
    assert "to be read: 22.8 kB, about 0 s" in err
    assert ["ranks", "2"] in [line.split() for line in out.splitlines()]
    assert lora_lab("verify", base, "found", "tuned")[0] == 0
    code, out, err = lora_lab("extract", base, "tuned", "-o", "found", "--force", "--energy", "0.5", "--json")
    assert code == 0, err
    report = as_documented("extract", out)
    assert report["modules"] == len(report["ranks"]) == 4
    assert set(report["ranks"].values()) <= {1, 2}
    (step,) = Adapter.load("found").record["recipe"]["steps"]
    assert step["extract"].items() >= {"base": "base", "tuned": "tuned", "energy": 0.5}.items()
    made_here = ll.extract(base, "tuned", energy=0.5, progress=False)
    assert made_here.record["extract"]["error"] == report["error"]
    one_line(lora_lab("extract", base, "tuned", "-o", "found", "--rank", 8), "found: exists already")
