"""What docs/add-a-method.md says, done: its package is installed as pip would, and its merges merge."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest
import torch
from making_adapters import lora, write

import lora_lab
from lora_lab.adapters.adapter import Adapter
from lora_lab.merging.merged import merge
from lora_lab.merging.methods import MERGES
from lora_lab.merging.sources import Sources
from lora_lab.registry import Registry

PAGE = (Path(__file__).parents[2] / "docs/add-a-method.md").read_text()
MODULE, REGISTERED = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
PROJECT = tomllib.loads(re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)[0])


@pytest.fixture
def pair(tmp_path):
    return [Adapter.load(write(tmp_path / f"{seed}", lora("net.q_proj", seed=seed))) for seed in (0, 1)]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The page's package on the path with its metadata; registries look for packages anew, then forget them."""
    (tmp_path / "smallest.py").write_text(MODULE)
    metadata = tmp_path / "lora_lab_smallest-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lora-lab-smallest\nVersion: 0.1\n")
    ((group, points),) = PROJECT["project"]["entry-points"].items()
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(MERGES, "entries", dict(MERGES.entries))
    monkeypatch.setattr(MERGES, "_offered", None)


def test_the_package_of_the_page_brings_a_merge_and_an_inner_rule(pair, installed):
    assert len([line for line in MODULE.splitlines() if line.strip()]) <= 15
    merged = merge(Sources(pair), "smallest", options={"scale": 2.0}).adapter.updates["net.q_proj"].delta()
    a, b = (adapter.updates["net.q_proj"].delta() for adapter in pair)
    assert torch.allclose(merged, 2 * torch.where(a.abs() <= b.abs(), a, b), atol=1e-5)
    assert merge(Sources(pair), "knots", options={"inner": "smallest"}).adapter.sites
    assert "smallest" in list(MERGES)


def test_the_merge_that_the_page_registers_merges(pair, installed):
    exec(compile(REGISTERED, "add-a-method.md", "exec"), {"torch": torch})
    merged = merge(Sources(pair), "largest").adapter.updates["net.q_proj"].delta()
    a, b = (adapter.updates["net.q_proj"].delta() for adapter in pair)
    assert torch.allclose(merged, torch.where(a.abs() >= b.abs(), a, b), atol=1e-5)


def test_the_table_names_every_registry_with_its_group():
    named = dict(re.findall(r"\| `([\w.]+)`, `(lora_lab\.\w+)` \|", PAGE))
    for where, group in named.items():
        module, _, name = where.rpartition(".")
        registry = getattr(importlib.import_module(f"lora_lab.{module}"), name)
        assert isinstance(registry, Registry)
        assert registry.group == group
    source = "".join(path.read_text() for path in Path(lora_lab.__file__).parent.rglob("*.py"))
    groups = set(re.findall(r'Registry\(\s*"[^"]+",\s*"(lora_lab\.\w+)"', source))
    assert groups == {*named.values(), "lora_lab.merges"}


def test_the_table_of_formats_is_the_registry():
    from lora_lab.adapters.formats.registry import FORMATS, WRITTEN

    page = (Path(__file__).parents[2] / "docs/formats.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    shown = {row[0]: row[3].partition(" ")[0] for row in rows if row[0] in FORMATS}
    assert shown == {name: "yes" if entry.write else "no" for name, entry in FORMATS.items()}
    assert {name for name, entry in FORMATS.items() if entry.write} == set(WRITTEN)
