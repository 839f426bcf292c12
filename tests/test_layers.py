"""The house keeps its floors: imports of lora_lab's own modules go only downward, and nothing imports the cli."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_lab"

LAYERS = [
    {"__init__", "escape", "hub"},
    {"errors"},
    {"ownership", "workplace", "processes"},
    {"files", "keys", "lookup", "matching", "sites", "lowrank", "models", "schedule", "stats", "plot_style", "trust"},
    {"digests"},
    {"result", "beside", "peft_config", "estimators", "rules", "confined"},
    {"checks"},
    {"peft_format"},
    {
        "adapter",
        "interactions",
        "progressive",
        "distribute",
        "subspaces",
        "plot_line",
        "plot_merges",
        "plot_train",
        "plot_shapley",
        "plot_stability",
        "plot_sweep",
    },
    {"task", "attach", "plot", "whole", "renames", "initial", "players", "prune"},
    {"chat", "coto", "digits", "file_task", "probe", "recipe", "variants", "patterns", "sources", "mix"},
    {"text", "survival", "language", "vision", "panel"},
    {"tasks", "layer_inputs"},
    {"evaluate", "fitted"},
    {"scorer"},
    {"connect", "game", "methods"},
    {"trainer", "checkpoints", "merge"},
    {"train", "shapley", "stability", "search", "court"},
    {"sweep", "compare"},
    {"parallel"},
    {"tuning"},
]
FLOOR = {name: floor for floor, names in enumerate(LAYERS) for name in names}
DEFERRED = {
    ("parallel", "train"),
    ("parallel", "plot"),
    ("parallel", "tasks"),
    ("parallel", "task"),
    ("tuning", "adapter"),
    ("tuning", "plot"),
    ("tuning", "tasks"),
    ("tuning", "train"),
}  # kept out of --help


def imports(path):
    """(module of lora_lab, whether at the top of the file) for every import of the file."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lora_lab":
            inner = node.module.split(".")[1:]
            for name in [inner[0]] if inner else [alias.name for alias in node.names]:
                yield name, node in tree.body
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("lora_lab."):
                    yield alias.name.split(".")[1], node in tree.body


def test_every_module_has_its_floor():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(FLOOR)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_go_downward(path):
    for name, at_top in imports(path):
        if (path.stem, name) in DEFERRED:
            assert not at_top
        else:
            assert FLOOR[name] < FLOOR[path.stem], f"{path.stem} imports {name}"


def test_nothing_imports_the_command_line_or_the_figures():
    for path in [*PACKAGE.glob("*.py"), *(ROOT / "figures").glob("*.py")]:
        assert "lora_lab.cli" not in path.read_text()
        assert not any(name in ("cli", "figures") for name, _ in imports(path))


@pytest.mark.parametrize("path", sorted((ROOT / "cli").glob("*.py")), ids=lambda path: path.stem)
def test_verbs_import_nothing_heavy_at_the_top(path):
    heavy = {"torch", "transformers", "peft", "datasets", "sklearn", "scipy", "matplotlib", "numpy", "ray"}
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not heavy & {name.split(".")[0] for name in names}


def test_the_wheel_holds_the_command_line_the_base_model_and_no_stray_module(tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        tmp_path,
        tmp_path / "src",
    ]
    source = tmp_path / "src"
    for name in ("lora_lab", "cli"):
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "lora_lab/cli/interpolate.py" in names
    assert "lora_lab/data/digits_vit.safetensors" in names
    assert "lora_lab/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"lora_lab", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
