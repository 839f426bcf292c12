"""The house keeps its plan: rooms import only from those below them, nothing imports the cli, every file is shipped."""

import ast
import graphlib
import importlib
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lora_lab"
MODULES = sorted(PACKAGE.rglob("*.py"))
COMMANDS = sorted((ROOT / "cli").rglob("*.py"))
ROOM = 2000  # lines; a room that outgrows them gets inner rooms
FACES = [path for path in (*MODULES, *COMMANDS) if path.name == "__init__.py"]

ROOMS = [  # from the ground up; a room may import from itself and from those before it
    "ground",  # single files: brief, errors, escape, hub, lazy, options, progress, registry
    "files",
    "results",
    "plots",
    "pages",
    "games",
    "adapters",
    "geometry",
    "tasks",
    "tasks.kinds",  # whose face the one of tasks shows
    "scoring",
    "training",
    "merging",
    "fusing",
    "pruning",
    "analysis",
    "claims",
    "api",  # and lora_lab/__init__.py, which shows it
]


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("lora_lab", *parts) if parts[0] == "cli" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module):
    parts = module.split(".")
    if parts == ["lora_lab"]:
        return "api"
    if ".".join(parts[1:3]) in ROOMS:
        return ".".join(parts[1:3])
    return parts[1] if (PACKAGE / parts[1]).is_dir() else "ground"


def imports(path):
    """(module of lora_lab, whether only for types or inside a function) for every import of the file."""
    known = {name_of(other) for other in MODULES}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in below]
        for name in names:
            if name.split(".")[0] == "lora_lab":
                yield name, node not in tree.body


def test_every_room_is_in_the_plan():
    assert {room_of(name_of(path)) for path in MODULES} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_downward(room):
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    for path in MODULES:
        if room_of(name_of(path)) == room:
            for name, _ in imports(path):
                # of a room by its name, what it gives away is told by the room's own face
                shown = path.name == "__init__.py" and name.startswith(
                    f"{name_of(path)}."
                )  # an inner room, by its outer
                if name != "lora_lab" and not shown:
                    assert room_of(name) in allowed, f"{name_of(path)} imports {name}"


def test_no_module_imports_itself_by_a_detour():
    graph = {}
    for path in MODULES:
        if path.name != "__init__.py":
            graph[name_of(path)] = {name for name, deferred in imports(path) if not deferred and name != "lora_lab"}
    list(graphlib.TopologicalSorter(graph).static_order())  # a CycleError names the circle


def test_no_room_is_larger_than_one_can_read_in_a_sitting():
    lines = Counter()
    for path in (*MODULES, *COMMANDS):
        lines[str(path.parent.relative_to(ROOT))] += len(path.read_text().splitlines())
    assert not {room: size for room, size in lines.items() if size > ROOM}


def test_every_room_says_what_it_is_for_and_what_it_does_not_know():
    for path in FACES:
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text, path
        if path.parent != PACKAGE and path.parent.name != "plots":
            assert "nows" in text, path


@pytest.mark.parametrize("path", FACES, ids=lambda path: path.parent.name)
def test_a_face_gives_away_what_it_declares(path):
    tree = ast.parse(path.read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {alias.asname for block in blocks for node in block.body for alias in node.names}
    package = __import__(name_of(path), fromlist=["*"])
    assert declared == set(getattr(package, "__all__", ()))
    below = {other.stem for other in path.parent.glob("*.py")} | {
        other.parent.name for other in path.parent.glob("*/*.py")
    }
    assert not declared & below  # a name must not turn into a module once that is imported
    for name in declared:
        assert getattr(package, name) is not None


OTHER_COMMANDS = ("--short=12", "`ray start --head`", "torchrun --nproc-per-node")


@pytest.mark.parametrize("room", ROOMS)
def test_the_library_keeps_no_words_of_the_command_line(room):
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())) if room_of(name_of(path)) == room else ():
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and "\n" not in text and not any(other in text for other in OTHER_COMMANDS):
                # the example of a task file, of several lines, says how it is used
                assert not re.search(r"(^|[\s`]|(?<!var)\()--[a-z]|`lora-lab ", text), f"{path}: {text!r}"


BIG = re.compile(r"\b(Tensor|Floats|Bools|NDArray)\b|Mapping\[str, float\]")


def test_dataclasses_that_hold_tensors_print_in_one_line():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and "dataclass" in "".join(map(ast.unparse, node.decorator_list)):
                hints = [ast.unparse(field.annotation) for field in node.body if isinstance(field, ast.AnnAssign)]
                if any(BIG.search(hint) for hint in hints if "Callable" not in hint):
                    made = getattr(importlib.import_module(name_of(path)), node.name)
                    assert not made.__dataclass_params__.repr, f"{path}: {node.name}"
                    assert made.__repr__ is not object.__repr__, f"{path}: {node.name}"


OUTER = {path.parent.name: path for path in PACKAGE.glob("*/__init__.py")}


@pytest.mark.parametrize("path", [*MODULES, *COMMANDS], ids=lambda path: path.stem)
def test_what_is_taken_from_a_room_by_its_name_is_given_away_there(path):
    tree = ast.parse(path.read_text())
    rooms = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "lora_lab"
        for alias in node.names
        if alias.name in OUTER
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in rooms:
            room = rooms[node.value.id]
            given = __import__(f"lora_lab.{room}", fromlist=["*"]).__all__
            below = {other.stem for other in OUTER[room].parent.glob("*.py")}
            assert node.attr in {*given, *below}, f"{room}.{node.attr}"


def test_nothing_imports_the_command_line_or_the_figures():
    for path in [*MODULES, *(ROOT / "figures").glob("*.py")]:
        assert "lora_lab.cli" not in path.read_text()


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_verbs_import_nothing_heavy_at_the_top(path):
    heavy = {"torch", "transformers", "peft", "datasets", "sklearn", "scipy", "matplotlib", "numpy", "ray"}
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not heavy & {name.split(".")[0] for name in names}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is packed."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("lora_lab", "cli"):
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                target = folder / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def wanted():
    """Every file of the package as it is installed."""
    packed = {str(path.relative_to(ROOT)) for path in MODULES}
    packed |= {f"lora_lab/{path.relative_to(ROOT)}" for path in COMMANDS}
    packed |= {f"lora_lab/pages/page.{ending}" for ending in ("html", "css", "js")}
    return packed | {"lora_lab/data/digits_vit.safetensors", "lora_lab/plots/lora-lab.mplstyle", "lora_lab/py.typed"}


def test_the_wheel_holds_every_room_and_no_stray_module(source, tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, source]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wanted() <= names
    assert {name.split("/")[0] for name in names} == {"lora_lab", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    assert {name for name in names if name.endswith(".py")} == {name for name in wanted() if name.endswith(".py")}


def test_the_source_distribution_holds_every_room(source, tmp_path):
    code = f"import setuptools.build_meta as build; build.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=source, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {name.replace("lora_lab/cli/", "cli/") for name in wanted()} <= names
