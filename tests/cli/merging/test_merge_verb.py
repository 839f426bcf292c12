"""`lora-lab merge` through the installed entry point."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from making_adapters import lora, random_adapter, write
from peft import LoraConfig

from lora_lab.adapters.adapter import Adapter
from lora_lab.merging.merged import merge
from lora_lab.merging.methods import MERGES
from lora_lab.merging.sources import Sources
from lora_lab.results import schema
from lora_lab.results.reports import REPORTS
from lora_lab.scoring.evaluate import score
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.tasks.task import Split

CASES = Path(__file__).parents[2] / "cases"
HEADS = CASES / "M13_heads_conflict"


@pytest.fixture
def refused(lora_lab, tmp_path):
    """Arguments of `merge`, words → asserts one line with these words, exit code 1, and a folder as it was before."""

    def run(*arguments, words):
        before = contents(tmp_path)
        code, out, err = lora_lab("merge", *arguments)
        assert (code, out) == (1, ""), err
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        for word in words:
            assert word in lines[0], (word, lines[0])
        assert contents(tmp_path) == before

    return run


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


MODULES = ("layers.0.q_proj", "layers.1.q_proj", "layers.2.q_proj")


@pytest.fixture
def abc(tmp_path):
    """Three random adapters in the folder, as the README's a, b and c; the last has a rank of its own."""
    for i, (name, rank) in enumerate({"a": 2, "b": 2, "c": 3}.items()):
        tensors = {}
        for m, module in enumerate(MODULES):
            tensors |= lora(module, rank=rank, seed=10 * i + m)
        write(tmp_path / name, tensors, r=rank, target_modules=["q_proj"], base_model_name_or_path="tiny")
    return ["a", "b", "c"]


def loaded(*names):
    return [Adapter.load(name) for name in names]


def same(found, wanted, tolerance=1e-5):
    assert set(found.updates) == set(wanted.updates)
    for name, update in wanted.updates.items():
        torch.testing.assert_close(found.updates[name].delta(), update.delta(), rtol=tolerance, atol=tolerance)


def test_three_adapters_are_merged_by_the_line_that_the_readme_has(lora_lab, abc, tmp_path):
    line = ["--method", "ties", "--set", "density=0.2", "--weights", "1,1,0.5", "-o", "merged/"]
    code, out, err = lora_lab("merge", *abc, *line)
    assert code == 0, err
    for words in ("Merged to merged", "ties", "density=0.2", "1, 1, 0.5", "0 (exact)"):
        assert words in out
    wanted = merge(Sources(loaded(*abc), [1, 1, 0.5]), "ties", options={"density": 0.2})
    found = Adapter.load("merged")
    same(found, wanted.adapter)
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert {path.name for path in tmp_path.iterdir()} == {*abc, "merged"}
    made = found.record["merge"]
    assert (made["method"], made["weights"]) == ("ties", [1, 1, 0.5])
    assert made["options"] == {"density": 0.2, "scope": "global", "scale": 1.0}
    assert [entry["adapter"] for entry in made["inputs"]] == abc
    assert all(len(entry["sha256"]) == 16 for entry in made["inputs"])
    card = (tmp_path / "merged" / "README.md").read_text()
    for words in ("base_model: tiny", "# A merge by ties", "density = 0.2", "* c, sha256"):
        assert words in card


def test_a_lone_file_is_written_and_merged_again(lora_lab, abc, tmp_path):
    code, out, err = lora_lab("merge", *abc, "-o", "x.safetensors")
    assert code == 0, err
    assert "task-arithmetic" in out
    same(Adapter.load("x.safetensors"), merge(Sources(loaded(*abc))).adapter)
    assert {path.name for path in tmp_path.iterdir()} == {*abc, "x.safetensors"}
    code, _, err = lora_lab("merge", "x.safetensors", "a", "--weights", "1,-1", "-o", "y.safetensors")
    assert code == 0, err
    same(Adapter.load("y.safetensors"), merge(Sources(loaded("b", "c"))).adapter)


def test_the_report_is_json_where_it_is_asked_for(lora_lab, abc):
    code, out, err = lora_lab("merge", *abc, "--method", "average", "--coefficient", 2, "-o", "m", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert (report["path"], report["method"], report["coefficient"]) == ("m", "average", 2.0)
    assert (report["error"], report["ranks"], report["trials"]) == (0.0, "4", None)  # 7, cut to the 4 columns
    assert report["errors"] == dict.fromkeys(MODULES, 0.0)
    same(Adapter.load("m"), merge(Sources(loaded(*abc)), "average", coefficient=2.0).adapter)


def test_the_methods_are_listed_with_what_they_are_and_no_adapter(lora_lab, tmp_path):
    code, out, err = lora_lab("merge", "--methods")
    assert code == 0, err
    for name, entry in MERGES.items():
        row = next(line for line in out.splitlines() if line.split()[:1] == [name])
        assert row.split()[1:3] == [entry.data, "free" if entry.gauge_free else "hangs"]
    assert "density=0.2" in next(line for line in out.splitlines() if line.startswith("ties"))
    code, out, err = lora_lab("merge", "--methods", "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert [row["name"] for row in rows] == list(MERGES)
    jsonschema = pytest.importorskip("jsonschema")
    said = schema.columns_of(REPORTS["merge-methods"])
    for row in rows:
        assert set(row) == set(said)
        jsonschema.validate(row, schema.json_schema("merge-methods"))
        assert row["options"] == MERGES[row["name"]].defaults()
    told = {row["name"]: row for row in rows}
    assert told["ties"]["source"] == "Yadav et al. 2023, arXiv:2306.01708"
    assert told["dare"]["formula"] == "λ Σ wᵢ mᵢ∘ΔWᵢ / p, entries of mᵢ 1 with chance p = density, else 0"
    assert (told["dare"]["works_on"], told["average"]["works_on"]) == ("single entries", "a weighted sum")
    assert all(row["formula"] and row["works_on"] for row in rows)
    assert (told["lorahub"]["data"], told["regmean"]["data"], told["ties"]["data"]) == ("labels", "inputs", "none")
    assert not list(tmp_path.iterdir())
    code, out, err = lora_lab("merge")
    assert (code, out) == (1, "")
    assert "no adapter was given" in err


def test_a_rank_tells_its_error(lora_lab, abc):
    code, out, err = lora_lab("merge", *abc, "--rank", 2, "-o", "m", "--json")
    assert code == 0, err
    report = json.loads(out)
    whole, cut = merge(Sources(loaded(*abc))).adapter, Adapter.load("m")
    assert {update.rank for update in cut.updates.values()} == {2}
    for name, update in whole.updates.items():
        S = update.singular_values()
        assert report["errors"][name] == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-4)
    gone = sum(float((cut.updates[name] - update).norm()) ** 2 for name, update in whole.updates.items())
    assert report["error"] == pytest.approx(gone**0.5 / whole.total_norm, rel=1e-4)
    worst = max(report["errors"], key=report["errors"].get)
    _, out, _ = lora_lab("merge", *abc, "--rank", 2, "-o", "m2")
    assert f"{report['error']:.4g}, most in {worst}: {report['errors'][worst]:.4g}" in out


def test_half_precision_tells_its_error(lora_lab, abc):
    code, out, err = lora_lab("merge", *abc, "--dtype", "bfloat16", "-o", "m", "--json")
    assert code == 0, err
    assert 1e-4 < json.loads(out)["error"] < 1e-2
    assert {tensor.dtype for tensor in Adapter.load("m").tensors.values()} == {torch.bfloat16}


def test_heads_follow_the_option(lora_lab):
    a, c = HEADS / "a", HEADS / "c"
    own = Adapter.load(a)
    code, out, err = lora_lab("merge", a, c, "--heads", "first", "-o", "first.safetensors")
    assert code == 0, err
    assert "first" in out
    first = Adapter.load("first.safetensors")
    assert own.others
    assert all(torch.equal(first.tensors[key], own.tensors[key]) for key in own.others)
    code, _, err = lora_lab("merge", a, c, "--heads", "average", "-o", "average")
    assert code == 0, err
    average, other = Adapter.load("average"), Adapter.load(c)
    for key in own.others:
        torch.testing.assert_close(average.tensors[key], (own.tensors[key] + other.tensors[key]) / 2)


def test_heads_kept_apart_lie_beside_the_merged_adapter(lora_lab, refused):
    line = [HEADS / "a", HEADS / "b", "--heads", "keep-own", "-o"]
    code, _, err = lora_lab("merge", *line, "kept")
    assert code == 0, err
    assert sorted(path.name for path in Path("kept/heads").iterdir()) == ["a.safetensors", "b.safetensors"]
    assert not Adapter.load("kept").others
    refused(*line, "kept", words=["kept: exists already"])
    code, _, err = lora_lab("merge", *line, "kept", "--force")
    assert code == 0, err


def test_heads_kept_apart_do_not_fit_into_a_lone_file(refused):
    for a, b in (("a", "b"), ("a", "c")):
        line = [HEADS / a, HEADS / b, "--heads", "keep-own", "-o", "kept.safetensors"]
        refused(*line, words=["kept.safetensors", "heads kept apart", "a folder is needed"])


def test_heads_that_differ_are_refused_without_an_option(refused):
    refused(HEADS / "a", HEADS / "c", "-o", "m", words=["classifier.weight", "--heads", "keep-own", "average", "first"])
    refused(HEADS / "a", HEADS / "b", "-o", "m", words=["classifier.weight", "(2, 16)", "(3, 16)", "--heads"])
    refused(HEADS / "a", HEADS / "b", "--heads", "average", "-o", "m", words=["cannot be averaged", "(3, 16)"])
    refused(HEADS / "a", HEADS / "c", "--heads", "mine", "-o", "m", words=["'mine'", "keep-own"])


# weights


def test_weights_of_single_modules_come_from_a_json_file(lora_lab, abc, tmp_path):
    content = {r"layers\.0\.": [1, 0, 0], r"layers\.[01]\.": [0, 0.5, 0], "default": [0, 0, -1]}
    (tmp_path / "w.json").write_text(json.dumps(content))
    code, out, err = lora_lab("merge", *abc, "--weights", "w.json", "-o", "m")
    assert code == 0, err
    assert "default: 0, 0, -1" in out
    a, b, c = (adapter.updates for adapter in loaded(*abc))
    found = Adapter.load("m").updates
    for name, wanted in zip(MODULES, (a[MODULES[0]], 0.5 * b[MODULES[1]], -c[MODULES[2]]), strict=True):
        torch.testing.assert_close(found[name].delta(), wanted.delta())
    assert Adapter.load("m").record["merge"]["weights"] == content


def test_weights_are_lines_over_the_layers(lora_lab, abc):
    lines = ["--weights", "0:1,2:0", "--weights", "0:0,2:1", "--weights", "1:-2"]
    code, out, err = lora_lab("merge", *abc, *lines, "-o", "m")
    assert code == 0, err
    assert "0:1,2:0, 0:0,2:1, 1:-2" in out
    a, b, c = (adapter.updates for adapter in loaded(*abc))
    found = Adapter.load("m").updates
    for layer, name in enumerate(MODULES):
        wanted = (1 - layer / 2) * a[name].delta() + layer / 2 * b[name].delta() - 2 * c[name].delta()
        torch.testing.assert_close(found[name].delta(), wanted, rtol=1e-5, atol=1e-5)


WEIGHTS = [
    (["1,1"], ["3 adapters and 2 weights"]),
    (["1,1,x"], ["weights '1,1,x'", "numbers with commas"]),
    (["1,1,nan"], ["nan is no weight", "finite"]),
    (["1,1,1", "1,1,1"], ["weights are given twice"]),
    (["0:1,2:0"], ["3 adapters and 1 lines", "one line an adapter"]),
    (["0:1", "0:1", "0:x"], ["'0:x'", "layer:weight pairs are needed"]),
    (["0:1", "0:1", "-1:1"], ["'-1:1'", "layers count from 0"]),
    (["0:1", "0:1", "1,0:1"], ["'1,0:1'", "layer:weight pairs are needed"]),
    (["none.json"], ["none.json", "cannot be read"]),
]


@pytest.mark.parametrize(("given", "words"), WEIGHTS)
def test_weights_that_cannot_be_read_are_refused(refused, abc, given, words):
    options = [part for text in given for part in ("--weights", text)]
    refused(*abc, *options, "-o", "m", words=words)


JSONS = [
    ({"q_proj": [1, 1]}, ["'q_proj'", "3 adapters and 2 weights"]),
    ({"q_proj": 1}, ["'q_proj' has 1", "a list of 3 numbers"]),
    ({"q_proj": [1, True, "x"]}, ["'q_proj'", "a list of 3 numbers"]),
    ({"(": [1, 1, 1]}, ["not a regular expression"]),
    ({"k_proj": [1, 1, 1]}, ["'k_proj' matches no module", "layers.0.q_proj"]),
    ([1, 1, 1], ["w.json"]),
    ({"q_proj": [1, 1, float("inf")]}, ["inf is no weight"]),
]


@pytest.mark.parametrize(("content", "words"), JSONS)
def test_a_file_of_weights_that_does_not_fit_is_refused(refused, abc, tmp_path, content, words):
    (tmp_path / "w.json").write_text(json.dumps(content))
    refused(*abc, "--weights", "w.json", "-o", "m", words=words)


# outputs


@pytest.mark.parametrize("output", ["m", "m.safetensors"])
def test_an_output_that_is_there_stays_unless_it_is_forced(lora_lab, refused, abc, output):
    code, _, err = lora_lab("merge", "a", "-o", output)
    assert code == 0, err
    refused(*abc, "-o", output, words=[f"{output}: exists already", "--force replaces it"])
    same(Adapter.load(output), Adapter.load("a"))
    for flag in ("--force", "--overwrite"):
        code, _, err = lora_lab("merge", *abc, "-o", output, flag)
        assert code == 0, err
    same(Adapter.load(output), merge(Sources(loaded(*abc))).adapter)


def test_a_folder_with_other_files_is_not_replaced_even_if_it_is_forced(refused, abc, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refused(*abc, "-o", "mine", "--force", words=["mine: holds more than an adapter (notes.txt)"])


ERRORS = [
    ([], ["-o names the adapter to write"]),
    (["--method", "tise", "-o", "m"], ["unknown method 'tise'", "did you mean 'ties'"]),
    (["--set", "density=0.2", "-o", "m"], ["unknown option of task-arithmetic 'density'", "scale"]),
    (["--method", "ties", "--set", "density", "-o", "m"], ["--set 'density'", "NAME=VALUE"]),
    (["--method", "ties", "--set", "density=high", "-o", "m"], ["--set density=high", "a number is needed"]),
    (["--method", "ties", "--set", "density=0", "-o", "m"], ["density is 0", "above 0 and up to 1"]),
    (["--method", "ties", "--set", "density=1", "--set", "density=1", "-o", "m"], ["density is given twice"]),
    (["--method", "cat", "--set", "scale=1", "-o", "m"], ["cat has no options to set"]),
    (["--method", "knots", "--set", "inner=tise", "-o", "m"], ["'tise'", "did you mean 'ties'"]),
    (["--method", "factor-average", "-o", "m"], ["factors of ranks", "cannot be averaged", "average"]),
    (["--method", "average", "--weights", "1,-1,0", "-o", "m"], ["sum to 0"]),
    (["--method", "slerp", "--weights", "1,1,-1", "-o", "m"], ["slerp has no negative weights"]),
    (["--rank", 0, "-o", "m"], ["rank is 0"]),
    (["--dtype", "half", "-o", "m"], ["'half'", "float16"]),
    (["--coefficient", "nan", "-o", "m"], ["finite number"]),
    (["--device", "abacus", "-o", "m"], ["'abacus'"]),
    (["--method", "fisher", "-o", "m"], ["a: carries no record of its task", "--task"]),
    (["--search", "coefficient=1,2", "-o", "m"], ["a: carries no record of its task", "--task"]),
    (["--search", "density=1,2", "-o", "m"], ["unknown option of task-arithmetic 'density'"]),
    (["--search", "coefficient", "-o", "m"], ["NAME=VALUE,VALUE"]),
    (["--search", "scale=0..1", "-o", "m"], ["can be searched for coefficient only"]),
    (["--ray", "auto", "-o", "m"], ["--ray shares out what --search tries", "divided by --jobs alone"]),
    (
        ["--method", "fisher", "--task", "digits/relabel", "--set", "examples=8", "-o", "m"],
        ["another base model", "layers.0.q_proj"],
    ),
    (["--method", "fisher", "--task", "digits/relable", "-o", "m"], ["did you mean 'digits/relabel'"]),
    (["--method", "fisher", "--set", "normalize=yes", "-o", "m"], ["normalize=yes", "true or false"]),
    (["missing", "-o", "m"], ["missing: no such file or folder"]),
]


@pytest.mark.parametrize(("line", "words"), ERRORS)
def test_what_cannot_be_done_is_said_in_one_line_and_leaves_nothing_behind(refused, abc, line, words):
    refused(*abc, *line, words=words)


def test_adapters_of_different_bases_or_shapes_are_refused(refused, abc, tmp_path):
    write(tmp_path / "other", lora("x.y"), base_model_name_or_path="big")
    refused("a", "other", "-o", "m", words=["a and other have different base models", "'tiny'", "'big'"])
    write(tmp_path / "wide", lora(MODULES[0], columns=5), base_model_name_or_path="tiny")
    refused("a", "wide", "-o", "m", words=["a and wide", MODULES[0], "(6, 4)", "(6, 5)"])


def test_modules_that_an_adapter_leaves_alone_are_told(lora_lab, abc, tmp_path):
    write(tmp_path / "one", lora(MODULES[0], seed=5), base_model_name_or_path="tiny")
    code, out, err = lora_lab("merge", "a", "one", "-o", "m")
    assert code == 0, err
    assert "one leaves alone" in out
    assert "2 modules, its ΔW is 0 there" in out


def test_what_does_not_fit_into_half_precision_is_refused_by_its_place(refused, abc):
    refused(*abc, "--dtype", "float16", "--coefficient", "1e9", "-o", "m.safetensors", words=["float16 cannot hold"])


@pytest.mark.parametrize("folder", ["adapter", "adapter_weight_suffix"])
def test_dora_needs_the_base_and_gets_it(lora_lab, refused, folder):
    dora = CASES / "R28_dora" / folder
    refused(dora, "-o", "m", words=["DoRA", "no base model was given"])
    code, _, err = lora_lab("merge", dora, "--base", CASES / "_bases/llama_tiny", "-o", "m")
    assert code == 0, err
    from safetensors.torch import load_file

    for name, wanted in load_file(CASES / "R28_dora/expected_delta.safetensors").items():
        torch.testing.assert_close(Adapter.load("m").updates[name].delta(), wanted, rtol=1e-5, atol=1e-6)
    refused(dora, "--base", CASES / "_bases/gpt2_tiny", "-o", "n", words=["has no module", "another base?"])


# methods and searches that look at data


@pytest.fixture
def digits(saved, monkeypatch):
    """Two random adapters of the digit tasks, of which only every tenth example is there, and no test split."""
    whole = Digits._load

    def few(self, split):
        assert split != "test", "the test split was read"
        return Split({name: tensor[::10] for name, tensor in whole(self, split).inputs.items()})

    monkeypatch.setattr(Digits, "_load", few)
    return saved


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The adapters, with the records of their tasks."""
    folder, paths = tmp_path_factory.mktemp("digits"), []
    for seed, labelling in enumerate(("relabel", "invert")):
        task = Digits(labelling)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "fc1"])
        adapter = random_adapter(task, folder / f"raw-{labelling}", config, seed=seed, scale=0.05)
        record = {"task": task.record, "method": "lora", "seed": seed}
        paths.append(replace(adapter, record=record).save(folder / f"{labelling}.safetensors"))
    return paths


def test_a_search_takes_what_does_best_on_validation_data_and_shows_what_was_tried(lora_lab, digits, tmp_path):
    line = ["--method", "ties", "--search", "coefficient=0.25,3", "--search", "density=0.1,1", "--exact"]
    code, out, err = lora_lab("merge", *digits, *line, "-o", "m", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert [(t["density"], t["coefficient"]) for t in report["trials"]] == [
        (density, coefficient) for density in (0.1, 1.0) for coefficient in (0.25, 3.0)
    ]
    best = max(report["trials"], key=lambda trial: (trial["accuracy"], -trial["loss"]))
    assert (report["options"]["density"], report["coefficient"]) == (best["density"], best["coefficient"])
    scores = [score(Digits(name), Adapter.load("m"), "validation") for name in ("relabel", "invert")]
    assert sum(s.accuracy for s in scores) / 2 == pytest.approx(best["accuracy"])
    assert sum(s.mean_loss for s in scores) / 2 == pytest.approx(best["loss"], rel=1e-4)
    assert Adapter.load("m").record["merge"]["trials"] == report["trials"]
    code, out, err = lora_lab("merge", *digits, "--search", "coefficient=0.5,1", "-o", "n")
    assert code == 0, err
    assert "2 tried on the validation splits, best first" in out


def test_an_interval_is_searched_from_the_shell(lora_lab, digits):
    line = ["--search", "coefficient=0.1..2", "--task", "digits/relabel", "-o", "m", "--json"]
    code, out, err = lora_lab("merge", digits[0], *line)
    assert code == 0, err
    report = json.loads(out)
    assert 3 < len(report["trials"]) <= 25
    assert 0.1 <= report["coefficient"] <= 2
    assert report["coefficient"] in [trial["coefficient"] for trial in report["trials"]]


@pytest.mark.parametrize(
    ("method", "few"),
    [
        ("fisher", ["examples=8"]),
        ("regmean", ["examples=20"]),
        ("lorahub", ["evaluations=5"]),
        ("adamerging", ["steps=3"]),
        ("nsc", ["steps=3"]),
        ("ziplora", ["steps=3"]),
        ("cat-learned", ["steps=3", "free=true"]),
    ],
)
def test_methods_that_look_at_data_take_the_tasks_that_the_adapters_record(lora_lab, digits, method, few):
    options = [part for text in few for part in ("--set", text)]
    code, out, err = lora_lab("merge", *digits, "--method", method, *options, "-o", "m.safetensors")
    assert code == 0, err
    assert few[0] in out
    found = Adapter.load("m.safetensors")
    assert set(found.updates) == set(Adapter.load(digits[0]).updates)
    assert 0 < found.total_norm < 10 * Adapter.load(digits[0]).total_norm
    assert [entry["task"]["name"] for entry in found.record["merge"]["inputs"]] == ["digits/relabel", "digits/invert"]


def test_tasks_are_one_for_all_or_one_an_adapter(refused, abc):
    given = ["--task", "digits/relabel", "--task", "digits/invert"]
    refused(*abc, "--method", "fisher", *given, "-o", "m", words=["3 adapters and 2 tasks"])
