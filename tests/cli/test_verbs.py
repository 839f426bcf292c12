import contextlib
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from lora_lab.adapters.adapter import Adapter
from lora_lab.cli import main

pytestmark = pytest.mark.usefixtures("few_digits", "quick_figures")

CASES = Path(__file__).parents[1] / "cases"
SHORT = ["--steps", "6", "--batch-size", "8"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two short CoTo runs, made by the command itself."""
    folder, said = tmp_path_factory.mktemp("pair"), io.StringIO()
    command = ["train", "--seeds", "0-1", "--jobs", "1", "-o", str(folder), *SHORT, "--json"]
    with contextlib.redirect_stdout(said), warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        main(command)
    assert not ended.value.code
    assert [run["summary"]["steps"] for run in json.loads(said.getvalue())] == [6, 6]
    return [folder / "coto-s0.safetensors", folder / "coto-s1.safetensors"]


def one_line(result, *words, code=1):
    found, out, err = result
    assert found == code, err
    lines = [line for line in err.splitlines() if not line.startswith("warning:") and line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], (word, lines[0])
    assert not out


@pytest.mark.parametrize(
    "verb",
    [
        "quickstart",
        "train",
        "interpolate",
        "plane",
        "curve",
        "checkpoints",
        "sharpness",
        "stability",
        "shapley",
        "compare",
        "merge",
        "compare-merges",
        "prune",
        "convert",
        "fuse",
        "verify",
        "extract",
        "sweep",
        "evaluate",
        "inspect",
        "record",
        "tasks",
        "figure",
        "report",
        "doctor",
        "reproduce",
    ],
)
def test_every_verb_has_help_with_an_example(lora_lab, verb):
    code, out, _ = lora_lab(verb, "--help")
    assert code == 0
    assert f"lora-lab {verb}" in out.partition("Example:")[2]


def test_from_training_to_figure_as_the_readme_says(lora_lab, pair, tmp_path):
    code, out, err = lora_lab("interpolate", *pair, "--points", 3, "--ratios", "0:1,1:1")
    assert code == 0, err
    assert "factors A, B averaged: accuracy barrier" in out
    assert "1:1 of coto-s0, coto-s1" in out
    names = {f"interpolate.{end}" for end in ("json", "pdf", "png")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".outcomes", *names}
    again, out2, err = lora_lab("interpolate", *pair, "--points", 3, "--ratios", "0:1,1:1")
    assert (again, out2) == (0, out)
    assert "this very result is there already" in err
    one_line(lora_lab("interpolate", *pair, "--points", 5), "interpolate.json: exists already; --force replaces it")
    code, out, _ = lora_lab("interpolate", *pair, "--points", 3, "-o", "other", "--json")
    assert json.loads(out)["parameters"]["spaces"] == ["factors", "matched", "delta"]
    code, _, err = lora_lab(
        "figure", "out/interpolate.json", "other/interpolate.json", "-o", "x.pdf", "--width", "single"
    )
    assert code == 0
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")
    one_line(lora_lab("figure", "out/interpolate.json", "-o", "x.pdf"), "x.pdf: exists already")


def test_layers_are_mixed_one_at_a_time_from_the_shell(lora_lab, pair, tmp_path):
    few = ("--layerwise", "--points", 2, "--split", "validation")
    code, out, err = lora_lab("interpolate", *pair, *few, "--players", "type")
    assert code == 0, err
    assert "q_proj, others of coto-s1" in out
    assert (tmp_path / "out" / "layerwise.png").exists()
    one_line(lora_lab("interpolate", *pair, *few, "--ratios", "1:1"), "--layerwise mixes ΔW", "leave --space, --ratios")
    one_line(lora_lab("interpolate", *pair, "--players", "type"), "--players are mixed one at a time with --layerwise")


def test_runs_are_scored_along_their_training_from_the_shell(lora_lab, tmp_path):
    code, _, err = lora_lab(
        "train", "--seeds", "0-1", "--jobs", 1, *SHORT, "--save-every", 3, "--p0", 0.9, "-o", "runs"
    )
    assert code == 0, err
    places = [f"runs/coto-s{seed}.checkpoints" for seed in (0, 1)]
    few = ("--examples", 20, "--spaces", "delta,factors", "--keep", "low", "--csv")
    code, out, err = lora_lab("checkpoints", *places, *few)
    assert code == 0, err
    assert "up to 12 variants" in err
    assert out.count("midpoint, factors  coto-s0, coto-s1  ") == 2
    assert "After 3 steps (test split, 20 examples)" in out
    names = {f"checkpoints.{end}" for end in ("json", "pdf", "png", "csv")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".outcomes", *names}
    again, out2, err = lora_lab("checkpoints", *places, *few)
    assert (again, out2) == (0, out)
    assert "this very result is there already" in err
    code, _, err = lora_lab("figure", "out/checkpoints.json", "--metric", "loss", "-o", "loss.png")
    assert code == 0, err
    one_line(lora_lab("checkpoints", "runs"), "runs: holds no checkpoint-STEP folder", "training with --save-every")
    one_line(lora_lab("checkpoints", "runs/coto-s0.safetensors"), "no such folder", "NAME.checkpoints")
    one_line(lora_lab("checkpoints", places[0], "--keep", "lowest"), "unknown pattern 'lowest'", "did you mean 'low'")
    one_line(lora_lab("checkpoints", places[0], "--spaces", "deltas"), "did you mean 'delta'")


def test_merges_are_compared_from_the_shell(lora_lab, pair, tmp_path):
    few = ["--methods", "average,ties", "--coefficients", "0.5,1"]
    code, out, err = lora_lab("compare-merges", *pair, *few, "--set", "ties.density=0.5", "--latex")
    assert code == 0, err
    assert "ensemble of logits 1:1" in out
    assert "up to " in err
    names = {f"compare-merges.{end}" for end in ("json", "pdf", "png", "tex")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".outcomes", *names}
    assert (tmp_path / "out" / "compare-merges.tex").read_text().startswith(r"\begin{tabular}")
    again, out2, err = lora_lab("compare-merges", *pair, *few, "--set", "ties.density=0.5")
    assert (again, out2) == (0, out)
    assert "this very result is there already" in err
    one_line(lora_lab("compare-merges", *pair, *few), "exists already")
    one_line(lora_lab("compare-merges", pair[0]), "two adapters or more")
    one_line(lora_lab("compare-merges", *pair, "--methods", "tise"), "did you mean 'ties'")
    one_line(lora_lab("compare-merges", *pair, "--set", "dare.density=0.5", "--methods", "ties"), "not among")
    one_line(lora_lab("compare-merges", *pair, "--coefficients", "a"), "numbers with commas")


def test_merges_at_equal_rank_stand_beside_nulls_on_the_shell(lora_lab, pair, tmp_path):
    few = ["--methods", "average,ties", "--coefficients", "1", "--ratios", "1:1"]
    code, out, err = lora_lab("compare-merges", *pair, *few, "--rank", "1,exact", "--nulls", "permuted", "--draws", 2)
    assert code == 0, err
    lines = {line.split("  ")[0]: line for line in out.partition("with nulls")[0].splitlines()}
    for part in ("ties 1:1", "ties (exact) 1:1"):
        assert any(word in lines[part] for word in ("cannot be told", "ahead", "behind"))
    assert "kB" in lines["ties 1:1"]
    assert "MB" in lines["ties (exact) 1:1"]
    assert "permuted  others" in out
    assert "2 draws cannot give a p-value below 0.33; at least 20 are needed" in out
    assert "initial A of the adapters of every set: separate (mean cosine" in out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--rank", "0"], "--rank is 0; it must be at least 1"),
        (["--rank", "65"], "a rank of 65 was asked for; the modules of these adapters have ranks up to 64"),
        (["--rank", "four"], "unknown rank 'four'; there are: largest, sum, exact"),
        (["--rank", "2.5"], "--rank '2.5': a whole number is needed, or a word such as largest"),
        (["--nulls", "gausian"], "did you mean 'gaussian'"),
        (["--nulls", "permuted", "--draws", "0"], "--draws"),
        (["--replaced", "some"], "there are: others, all"),
    ],
)
def test_impossible_ranks_and_nulls_are_one_line_and_nothing_is_written(lora_lab, pair, tmp_path, options, told):
    one_line(lora_lab("compare-merges", *pair, "--methods", "ties", *options, "-o", "new"), told)
    assert not (tmp_path / "new" / "compare-merges.json").exists()


def test_a_merge_comes_back_at_a_rank_in_words(lora_lab, pair, tmp_path):
    for word, rank in (("largest", 4), ("sum", 8)):
        code, _, err = lora_lab("merge", *pair, "--method", "ties", "--rank", word, "--heads", "first", "-o", word)
        assert code == 0, err
        assert {site.rank for site in Adapter.load(tmp_path / word).sites.values()} == {rank}
    one_line(lora_lab("merge", *pair, "--rank", "most", "-o", "x"), "unknown rank 'most'; there are: largest, sum")
    one_line(lora_lab("merge", *pair, "--rank", "99", "-o", "x"), "a rank of 99 was asked for")
    assert not (tmp_path / "x").exists()


FEW = ["--examples", 12]


def test_shapley_without_an_adapter_takes_the_newest_or_trains_one(lora_lab, tmp_path, monkeypatch):
    from lora_lab.tasks.kinds.digits import Digits

    monkeypatch.setattr(Digits, "steps", 6)
    code, out, err = lora_lab("shapley", "--samples", 200, *FEW)
    assert code == 0, err
    assert "no adapter given and none of your own below this folder: training coto-s0.safetensors" in err
    assert "exact, 64 coalitions" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".outcomes",
        *(f"shapley.{end}" for end in ("json", "pdf", "png")),
    }
    code, out2, err = lora_lab("shapley", "--samples", 200, *FEW)
    assert (code, out2) == (0, out)
    assert "the newest of your own below this folder is coto-s0.safetensors" in err
    assert "this very result is there already" in err
    code, out, err = lora_lab("shapley", "--worth", "loss", *FEW, "--force", "--json")
    assert json.loads(out)["parameters"]["worth"] == "loss"
    assert "to be computed: up to 0 variants" in err
    code, _, err = lora_lab("shapley", *FEW)
    assert code == 1
    assert "error: out/shapley.json: exists already; --force replaces it" in err


def test_shapley_of_several_adapters_with_every_option(lora_lab, pair):
    options = ["--players", "type-layer", "--estimator", "antithetic", "--samples", 2, "--order", 2, *FEW]
    code, out, err = lora_lab("shapley", *pair, *options)
    assert code == 0, err
    assert "regression from the same coalitions differs by up to" in out or "biased" not in out
    assert "Shapley values of coto-s1" in out
    for kind in ("shapley:heatmap", "shapley:bars", "shapley:interactions"):
        code, _, err = lora_lab("figure", "out/shapley.json", "--kind", kind, "-o", f"{kind[8:]}.pdf")
        assert code == 0, err
    code, out, err = lora_lab(
        "shapley", pair[0], "--estimator", "owen", "--set", "nodes=2", "--samples", 8, "-o", "owen", *FEW
    )
    assert code == 0, err
    assert "biased by the grid of 2 probabilities" in out


def test_stability_shows_curves_epsilon_and_the_inequality(lora_lab, pair, tmp_path):
    code, out, err = lora_lab("stability", pair[0], "--p", "0.25,0.75", *FEW)
    assert code == 0, err
    for words in ("k-of-G 3", "p 0.75", "leave-one-out vit.layers.5", "fixed even", "E[loss] ≥ Σ", "half or more kept"):
        assert words in out
    assert (tmp_path / "out" / "stability.pdf").stat().st_size > 5000
    for kind in ("stability:p", "stability:leave-one-out"):
        assert lora_lab("figure", "out/stability.json", "--kind", kind, "-o", f"{kind[10:]}.pdf")[0] == 0


def test_sweep_shows_patterns_sparsities_and_ranks(lora_lab, pair, tmp_path):
    options = ["--sparsities", "0,0.5", "--draws", 2, *FEW]
    code, out, err = lora_lab("sweep", *pair, *options)
    assert code == 0, err
    for words in ("top-shapley:3", "magnitude 0.5", "svd 2", "mean ± s.d. over adapters"):
        assert words in out
    code, out, err = lora_lab("sweep", pair[0], "--rank", *options, "-o", "rank")
    assert code == 0
    assert "structured" not in out
    assert "to be computed: up to 16 variants" in err


@pytest.mark.parametrize(
    ("options", "modules", "words"),
    [
        (["--keep", "every-other"], 18, "18 of 36"),
        (["--keep", "type:q,v"], 12, "12 of 36"),
        (["--keep", "top-norm:2"], 12, "67% saved"),
        (["--keep", "top-shapley:1", "--split", "validation"], 6, "6 of 36"),
        (["--keep", "top-taylor:1", "--split", "validation"], 6, "6 of 36"),
        (["--keep", "top-drop:2"], 12, "12 of 36"),
        (["--keep", "random:2", "--seed", "3"], 12, "12 of 36"),
        (["--rank", "2"], 36, "72 of 144"),
        (["--energy", "0.9"], 36, "relative error"),
        (["--method", "delta-magnitude", "--sparsity", "0.3"], 36, "30.0%"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_pruned_adapters_are_smaller_and_load_again(lora_lab, pair, tmp_path, options, modules, words):
    from peft import PeftModel

    from lora_lab.adapters.adapter import Adapter
    from lora_lab.scoring.evaluate import score
    from lora_lab.tasks.kinds.digits import Digits

    code, out, err = lora_lab("prune", pair[0], *options, "-o", "small")
    assert code == 0, err
    assert words in out
    found = Adapter.load(tmp_path / "small")
    assert len(found.sites) == modules
    assert found.record["pruned"]
    assert "pruned since" in lora_lab("inspect", "small")[1]
    task = Digits("relabel")
    theirs = task.score(PeftModel.from_pretrained(task.build_model(), tmp_path / "small"))
    assert score(task, found).loss == pytest.approx(theirs.loss, abs=1e-5)
    one_line(lora_lab("prune", pair[0], *options, "-o", "small"), "small: exists already")


def test_a_long_run_is_asked_about_first(lora_lab, pair, monkeypatch):
    from lora_lab.scoring.evaluator import Evaluator

    monkeypatch.setattr(Evaluator, "pace", 100.0)
    code, out, err = lora_lab("shapley", pair[0], *FEW)
    assert code == 1
    assert "--yes goes ahead, fewer samples or examples take less" in err
    assert not out
    assert "error: this may take" in err
    assert lora_lab("shapley", pair[0], *FEW, "--yes")[0] == 0


def test_evaluate_shows_intervals_and_writes_json(lora_lab, pair, tmp_path):
    code, out, _ = lora_lab("evaluate", *pair, "--split", "validation", "-o", "scores.json")
    assert code == 0
    assert "(base model alone)" in out
    rows = json.loads((tmp_path / "scores.json").read_text())["columns"]
    assert rows["adapter"] == ["(base model alone)", "coto-s0", "coto-s1"]


def test_training_one_adapter_writes_it_with_its_log_and_figure(lora_lab, tmp_path):
    code, out, err = lora_lab("train", "--method", "lora", "-o", "a.safetensors", *SHORT)
    assert code == 0, err
    assert "a.safetensors" in out
    names = {"a.safetensors", "a.train.json", "a.train.pdf", "a.train.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    one_line(lora_lab("train", "-o", "a.safetensors", *SHORT), "a.safetensors: exists already; --force replaces it")
    code, _, _ = lora_lab("train", "-o", "folder", *SHORT, "--group", "all=.")
    assert (tmp_path / "folder" / "adapter_config.json").exists()
    groups = json.loads((tmp_path / "folder.train.json").read_text())["parameters"]["groups"]
    assert list(groups) == ["all"]
    code, _, err = lora_lab("train", "-o", "for-mlx", "--format", "mlx", "--method", "lora", *SHORT)
    assert code == 0, err
    assert json.loads((tmp_path / "for-mlx" / "adapter_config.json").read_text())["fine_tune_type"] == "lora"
    one_line(lora_lab("train", "-o", "x", "--format", "comfy", *SHORT), "x: comfy is a format of lone files")
    one_line(lora_lab("train", "-o", "x", "--format", "mxl", *SHORT), "unknown format 'mxl' (did you mean 'mlx'?)")
    assert not (tmp_path / "x").exists()


def test_inspect_as_json_has_the_promised_shape(lora_lab, pair):
    code, out, _ = lora_lab("inspect", pair[0], "--json")
    found = json.loads(out)
    assert code == 0
    about = {"path", "schema", "ok", "problems", "notes", "format", "record"}
    assert set(found) == {*about, "tuner", "base_model", "modules", "other_tensors", "total_norm", "hash"}
    assert (found["ok"], found["problems"], found["schema"]) == (True, [], 3)
    assert set(found["modules"][0]) == {"name", "type", "rank", "scale", "dtype", "shape", "norm", "effective_rank"}
    assert len(found["modules"]) == 36
    assert found["total_norm"] == pytest.approx(sum(m["norm"] ** 2 for m in found["modules"]) ** 0.5)
    assert found["record"]["method"] == "coto"
    code, out, _ = lora_lab("inspect", pair[0])
    assert "36 modules, ranks 4" in out


REFUSED = [
    ("R18_nan_inf_weights/adapter", ["model.layers.0.self_attn.v_proj", "non-finite"]),
    ("R21_unpaired_lora_A/adapter", ["model.layers.1.self_attn.v_proj", "lora_B"]),
    ("R22_rank_differs_from_config/adapter", ["rank 4", "8 in the config"]),
    ("R14_adapter_name_inside_keys/adapter_two_in_one_file", ["--adapter-name", "one", "two"]),
]
ODD = [
    ("R28_dora/adapter", ["DoRA"]),
    ("K10_pissa_olora_init/adapter", ["pissa"]),
    ("K15_all_zero_B/adapter_all_zero", ["4 of 4 modules have zero delta (untrained?)"]),
    ("K03_single_file_no_config/adapter_only.safetensors", ["--alpha"]),
]


@pytest.mark.parametrize(("case", "words"), [*REFUSED, *ODD])
def test_inspect_reports_on_what_other_verbs_refuse(lora_lab, case, words):
    code, out, _ = lora_lab("inspect", CASES / case, "--json")
    found, usable = json.loads(out), (case, words) in ODD
    assert (code, found["ok"], found["problems"] == []) == (int(not usable), usable, usable)
    told = " ".join(found["notes" if usable else "problems"])
    for word in words:
        assert word.removeprefix("--").replace("-", "_" if word.startswith("--") else "-") in told
    code, out, err = lora_lab("inspect", CASES / case)
    assert code == int(not usable)
    assert ("warning: " if usable else "error: ") in err
    assert words[0] in err


def test_inspect_of_several_paths_goes_on_after_one_that_is_none(lora_lab, pair):
    paths = [pair[0], "none.safetensors", CASES / REFUSED[0][0], pair[1]]
    code, out, err = lora_lab("inspect", *paths, "--json")
    found = json.loads(out)
    assert code == 1
    assert [each["path"] for each in found] == [str(path) for path in paths]
    assert [each["ok"] for each in found] == [True, False, False, True]
    assert found[1]["problems"] == ["none.safetensors: no such file or folder"]
    assert (found[1]["format"], found[1]["modules"]) == (None, [])
    assert len({frozenset(each) for each in found}) == 1
    code, out, err = lora_lab("inspect", *paths)
    assert code == 1
    assert out.count("36 modules, ranks 4") == 2
    assert err.startswith("error: none.safetensors: no such file or folder")
    code, out, _ = lora_lab("inspect", *pair, "--json")
    assert (code, len(json.loads(out))) == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--method", "cotoo"], ["unknown method 'cotoo'", "did you mean 'coto'"]),
        (["train", "--task", "digits/relable"], ["did you mean 'digits/relabel'"]),
        (["train", "--peft", "lroa"], ["unknown tuner 'lroa'", "did you mean 'lora'"]),
        (["train", "--sed", "1"], ["no such option", "--sed", "--seed", "--seeds"]),
        (["train", "--seeds", "0-x"], ["seeds '0-x'"]),
        (["train", "--seeds", "3,3"], ["different seeds"]),
        (["train", "--ramp", "liner"], ["did you mean 'linear'"]),
        (["train", "--group", "a=(", *SHORT], ["not a regular expression"]),
        (["train", "--group", "=x", *SHORT], ["NAME=REGEX"]),
        (["train", "--peft-config", "none.json"], ["none.json"]),
        (["train", "--jobs", "0"], ["0 jobs side by side"]),
        (["trian"], ["no such command 'trian'", "Did you mean 'train'"]),
        (["interpolate", "a.safetensors", "b.safetensors"], ["a.safetensors: no such file"]),
        (["interpolate", CASES / "R01_rslora_scaling/adapter", CASES / "R01_rslora_scaling/adapter"], ["--task"]),
        (["interpolate", CASES / "R01_rslora_scaling/adapter"], ["two adapters"]),
        (["evaluate", "org/name"], ["org/name: no such file or folder here", "hub"]),
        (["inspect", CASES / "R05_config_is_lfs_pointer/adapter"], ["adapter_config.json", "LFS"]),
        (["inspect", CASES / "R07_truncated_safetensors/adapter_cut_data"], ["truncated", "3064"]),
        (["figure", "none.json", "-o", "x.pdf"], ["none.json: no such file"]),
        (["shapley", "none.safetensors"], ["none.safetensors: no such file"]),
        (["prune", "x", "-o", "y"], ["in one way: --keep, --method with --sparsity, --rank"]),
        (["prune", "x", "--keep", "even", "--rank", "2", "-o", "y"], ["in one way"]),
        (["prune", "x", "--method", "random", "-o", "y"], ["--method random needs --sparsity"]),
        (["prune", "x", "--keep", "even"], ["-o names the adapter"]),
        (["stability", "x", "--p", "a"], ["--p 'a'", "such as 0.25,0.5,0.75"]),
        (["sweep", "x", "--sparsities", "half"], ["--sparsities 'half'"]),
        (["tasks", "--example", "text"], ["unknown kind of task 'text'"]),
        (["train", "--metric", "loss"], ["--metric chooses among settings; no option with ☰ has several values"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, list) else None,
)
def test_bad_input_gives_one_line_and_writes_nothing(lora_lab, tmp_path, arguments, words):
    one_line(lora_lab(*arguments), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prune", "x", "--keep", "random:2", "--seed", "-1"], "--seed is -1; it must be at least 0"),
        (["prune", "x", "--keep", "top-shapley:2", "--samples", "0"], "--samples is 0; it must be at least 1"),
        (["prune", "x", "--rank", "0"], "--rank is 0; it must be at least 1"),
        (["prune", "x", "--sparsity", "1.5"], "--sparsity is 1.5; it must be from 0 to 1"),
        (["prune", "x", "--energy", "nan"], "--energy is nan; a finite number is needed"),
        (["merge", "x", "--rank", "-2"], "--rank is -2; it must be at least 1"),
        (["train", "--lr", "1e-3,-1"], "--lr is -1.0; it must be above 0"),
        (["train", "--weight-decay", "-1"], "--weight-decay is -1.0; it must be at least 0"),
        (["train", "--max-grad-norm", "-1"], "--max-grad-norm is -1.0; it must be at least 0"),
        (["stability", "x", "--p", "0.5,2"], "--p is 2.0; it must be from 0 to 1"),
        (["shapley", "x", "--until-se", "0"], "--until-se is 0.0; it must be above 0"),
        (["interpolate", "x", "y", "--points", "1"], "--points is 1; it must be at least 2"),
        (["evaluate", "x", "--jobs", "0"], "--jobs is 0; it must be at least 1"),
        (["quickstart", "--jobs", "0"], "--jobs is 0; it must be at least 1"),
    ],
)
def test_a_number_out_of_bounds_is_refused_by_its_flag(lora_lab, tmp_path, arguments, words):
    one_line(lora_lab(*arguments), words)
    assert not list(tmp_path.iterdir())


def test_a_lone_file_without_a_configuration_takes_one_by_option(lora_lab, pair, tmp_path):
    from lora_lab.adapters.adapter import Adapter

    files = []
    for i, path in enumerate(pair):
        adapter = Adapter.load(path)
        adapter.save(tmp_path / f"folder{i}")
        (tmp_path / str(i)).mkdir()
        files.append(
            (tmp_path / f"folder{i}" / "adapter_model.safetensors").rename(tmp_path / str(i) / "x.safetensors")
        )
    config = tmp_path / "folder0" / "adapter_config.json"
    options = ["--task", "digits/relabel", "--json"]
    _, own, _ = lora_lab("evaluate", *pair, *options)
    code, out, err = lora_lab("evaluate", *files, "--config", config, *options)
    assert code == 0, err
    assert json.loads(out)["columns"]["loss"] == json.loads(own)["columns"]["loss"]
    code, out, _ = lora_lab("inspect", files[0], "--alpha", "8", "--json")
    assert {module["scale"] for module in json.loads(out)["modules"]} == {2.0}


def test_usage_errors_exit_with_2_in_one_line(lora_lab):
    one_line(lora_lab("train", "--seed", "abc"), "--seed", code=2)
    one_line(lora_lab("train", "--steps", "abc"), "--steps 'abc': a whole number is needed")
    one_line(lora_lab("figure", "x.json"), "--output", code=2)


def test_adapters_that_do_not_fit_are_refused_before_anything_is_written(lora_lab, pair, tmp_path):
    other = CASES / "R01_rslora_scaling/adapter"
    one_line(lora_lab("interpolate", pair[0], other, "--task", "digits/relabel"), "different base models")
    one_line(lora_lab("interpolate", *pair, "--space", "detla"), "did you mean 'delta'")
    one_line(lora_lab("interpolate", *pair, "--ratios", "1:1:1"), "ratio '1:1:1' has 3 weights")
    one_line(lora_lab("interpolate", *pair, "--split", "tset", "--points", "2"), "did you mean 'test'")
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["shapley", "--players", "layrs"], ["unknown set of players 'layrs'", "did you mean 'layer'"]),
        (["shapley", "--players", "x=nothing"], ["player 'x' ('nothing') matches no module", "vit.layers.0"]),
        (["shapley", "--players", "a=q_proj", "--players", "b=layers"], ["players overlap", "matches a, b"]),
        (
            ["shapley", "--worth", "f1"],
            ["unknown worth of task digits/relabel: 'f1'", "accuracy, loss, brier, ece, log-likelihood, margin"],
        ),
        (["shapley", "--estimator", "exct"], ["did you mean 'exact'"]),
        (["shapley", "--estimator", "shapiq:Nothing"], ["unknown estimator of shapiq 'Nothing'"]),
        (["shapley", "--estimator", "owen", "--set", "node=3"], ["did you mean 'nodes'"]),
        (["shapley", "--estimator", "owen", "--set", "nodes=x"], ["--set nodes=x: a whole number is needed"]),
        (["shapley", "--set", "nodes=3"], ["the default estimator has no options to set"]),
        (["shapley", "--estimator", "exact", "--set", "budget=5"], ["exact has no options to set"]),
        (["shapley", "--estimator", "exact", "--budget", "10"], ["exact values of 6 players need 64"]),
        (["shapley", "--samples", "0"], ["samples is 0; it must be at least 1"]),
        (["shapley", "--budget", "3", "--estimator", "antithetic"], ["a budget of 3 coalitions"]),
        (["shapley", "--split", "tset"], ["did you mean 'test'"]),
        (["stability", "--samples", "1"], ["samples is 1; it must be at least 2"]),
        (["stability", "--p", "2"], ["--p is 2.0; it must be from 0 to 1"]),
        (["sweep", "--criteria", "magnitud"], ["did you mean 'magnitude'"]),
        (["sweep", "--sparsities", "1.5"], ["--sparsities is 1.5; it must be from 0 to 1"]),
        (["prune", "--keep", "evn", "-o", "y"], ["did you mean 'even'"]),
        (["prune", "--keep", "top-norm:7", "-o", "y"], ["7 of 6 players", "1 to 6 can"]),
        (["prune", "--keep", "top-shapley:9", "-o", "y"], ["9 of 6 players"]),
        (["prune", "--keep", "top-gates:9", "-o", "y"], ["9 of 6 players"]),
        (
            ["shapley", "--estimator", "sensitivity", "--set", "passes=1"],
            ["1 passes; a coalition and its complement are 2"],
        ),
        (
            ["shapley", "--estimator", "joint", "--budget", "1"],
            ["a budget of 1 coalitions; at least 2 are needed: nobody, and all"],
        ),
        (["prune", "--keep", "type:gate", "-o", "y"], ["no module of type 'gate'", "fc1"]),
        (["prune", "--sparsity", "1.5", "-o", "y"], ["sparsity is 1.5", "from 0 to 1"]),
        (["prune", "--sparsity", "1", "-o", "y"], ["nothing would be left"]),
        (["prune", "--rank", "0", "-o", "y"], ["at least 1"]),
        (["prune", "--ratio", "2", "--energy", "0.5", "-o", "y"], ["both of energy and ratio"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:50] if isinstance(value, list) else None,
)
def test_bad_options_of_analyses_give_one_line(lora_lab, pair, tmp_path, arguments, words):
    verb, *options = arguments
    one_line(lora_lab(verb, pair[0], *options), *words)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".pdf")]
    assert not (tmp_path / "y").exists()


def test_loha_has_no_ranks_of_its_own_but_is_cut_to_one(lora_lab, tmp_path):
    code, _, err = lora_lab("train", "--peft", "loha", "--rank", 2, "-o", "h.safetensors", *SHORT)
    assert code == 0, err
    one_line(lora_lab("shapley", "h.safetensors", "--players", "rank"), "LOHA has no rank-1 components")
    assert lora_lab("prune", "h.safetensors", "--rank", 1, "-o", "cut")[0] == 0
    from lora_lab import Adapter

    assert {site.rank for site in Adapter.load(tmp_path / "cut").sites.values()} == {1}
    assert lora_lab("shapley", "h.safetensors", *FEW)[0] == 0
    assert lora_lab("prune", "h.safetensors", "--keep", "odd", "-o", "y")[0] == 0


def test_a_configuration_of_another_tuner_than_the_one_asked_for_is_refused(lora_lab, tmp_path):
    from lora_lab.adapters.adapter import Adapter

    config = tmp_path / "loha.json"
    config.write_text('{"peft_type": "LOHA", "r": 2}')
    line = ["train", "--peft-config", config, "-o", "a.safetensors", *SHORT]
    said = "the configuration is for LOHA, the tuner asked for is lora"
    one_line(lora_lab(*line, "--peft", "lora"), said)
    assert list(tmp_path.iterdir()) == [config]
    assert lora_lab(*line)[0] == 0
    assert Adapter.load("a.safetensors").tuner == "LOHA"
    config.write_text('{"peft_type": "LOHAA"}')
    one_line(lora_lab(*line, "--force"), "unknown tuner 'lohaa'", "did you mean 'loha'")


def test_a_bug_shows_its_traceback(lora_lab, monkeypatch, pair):
    import lora_lab.analysis.lines.connectivity as connect

    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(connect.Interpolate, "run", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        lora_lab("interpolate", *pair)


def test_an_interrupt_leaves_no_output_and_the_same_command_goes_on(lora_lab, monkeypatch, pair, tmp_path):
    from lora_lab.scoring.models import TaskModels

    original, calls = TaskModels.score, []

    def interrupted(self, model, examples, index=0):
        calls.append(examples)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, model, examples, index)

    monkeypatch.setattr(TaskModels, "score", interrupted)
    one_line(lora_lab("interpolate", *pair, "--points", 3), "interrupted", code=130)
    assert not list((tmp_path / "out").glob("interpolate.*"))
    code, _, _ = lora_lab("interpolate", *pair, "--points", 3)
    assert code == 0
    assert len(calls) == 4 + 5 - 3
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == [".outcomes"]


def test_the_installed_command_leaves_nothing_to_be_collected_and_main_leaves_all(monkeypatch):
    import gc
    from importlib.metadata import entry_points

    from lora_lab.cli import program as command

    (installed,) = entry_points(group="console_scripts", name="lora-lab")
    assert installed.load() is command.script
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with pytest.raises(SystemExit):
        main(["tasks", "--example", "clip"])
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() <= frozen  # some of what was frozen may be gone
    monkeypatch.setattr(command, "main", lambda arguments: sys.exit(len(arguments)))
    try:
        with pytest.raises(SystemExit) as ended:
            command.script(["a", "b", "c"])
        assert ended.value.code == 3
        assert gc.get_freeze_count() > frozen
        assert gc.get_threshold() > before
    finally:
        gc.set_threshold(*before)


def test_no_module_called_cli_is_installed():
    done = subprocess.run(
        [sys.executable, "-c", "import cli"], capture_output=True, text=True, cwd=CASES, env={"PATH": ""}
    )
    assert "No module named 'cli'" in done.stderr


def test_results_do_not_hang_on_the_number_of_threads(pair):
    from lora_lab.adapters.adapter import Adapter
    from lora_lab.scoring.evaluate import score
    from lora_lab.tasks.choosing import task_of

    adapter = Adapter.load(pair[0])
    before = score(task_of(adapter), adapter).loss
    torch.set_num_threads(2)
    try:
        assert score(task_of(adapter), adapter).loss == pytest.approx(before, abs=1e-5)
    finally:
        torch.set_num_threads(1)
