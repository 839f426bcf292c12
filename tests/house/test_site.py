"""The site's pages are written from what there is, its links lead somewhere, and the tutorials run."""

import importlib.util
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch

from lora_lab.adapters.adapter import Adapter
from lora_lab.cli.studies import recipes
from lora_lab.cli.verbs import VERBS
from lora_lab.merging.methods import MERGES
from lora_lab.registry import Registry
from lora_lab.results.result import Result
from lora_lab.results.schema import kinds

ROOT = Path(__file__).parents[2]
ROOMS = {path.name for path in (ROOT / "lora_lab").iterdir() if path.is_dir()}
CODE = re.compile(r"```(?:py|python)\n(.*?)```", re.DOTALL)
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("site_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(build, tmp_path_factory):
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(build, "OUT", tmp_path_factory.mktemp("site") / "docs")
        build.main(["--pages", "--no-examples"])
        yield build.OUT / "pages"


def test_every_verb_merge_and_kind_of_result_has_its_place(pages, build):
    for verb in VERBS:
        text = (pages / f"verb-{verb}.md").read_text()
        assert text.startswith(f"# {verb}\n")
        assert f"lora-lab {verb}" in text
    page = (pages / "verb-interpolate.md").read_text()
    assert "| `-o`, `--output` |" in page
    assert re.search(r"\| `--seed` \| [^|]* \| `0` \|", page)
    assert re.search(
        r"\| `--rescale/--no-rescale` \| [^|]* \| `--rescale` \|", (pages / "verb-stability.md").read_text()
    )
    assert re.search(r"\| `--every/--no-every` \| [^|]* \|  \|", (pages / "verb-stability.md").read_text())  # either
    assert re.search(r"\| `--coefficient` \| [^|]* \| `1.0` \|", (pages / "verb-merge.md").read_text())
    table = (pages / "merges.md").read_text()
    for name, entry in MERGES.items():
        assert f"| [{name}](#{name}) | {build.cell(entry.formula)} |" in table
        assert f"\n## {name}\n" in table
    told = (pages / "results.md").read_text()
    assert all(f"## {name}\n" in told for name in kinds())
    keys = Result("evaluate", {}).to_json()
    assert all(f"`{key}`" in told for key in keys)
    assert f"`{keys['format']}`" in told


def test_every_registry_is_a_table_of_all_its_names_with_what_each_is(pages, build):
    import lora_lab

    source = "".join(path.read_text() for path in Path(lora_lab.__file__).parent.rglob("*.py"))
    groups = set(re.findall(r'Registry\(\s*"[^"]+",\s*"(lora_lab\.\w+)"', source))
    listed = [getattr(import_module(each.module), each.name) for each in build.site_tables.LISTED]
    assert {each.group for each in listed if isinstance(each, Registry)} == groups - {"lora_lab.merges"}
    sections = (pages / "names.md").read_text().split("\n## ")[1:]
    for section, registry in zip(sections, listed, strict=True):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("| `")]
        assert [row[0].strip(" `") for row in rows] == list(registry)
        for row in rows:
            assert row[1].strip()
            assert row[-1].strip(" `").split(".")[0] in ROOMS
            assert "<" not in row[-1]  # a function without a name of its own is told by its file or class


def test_every_verb_has_an_example_of_its_own_that_is_run(build):
    assert {each["verb"] for each in build.listed() if "verb" in each} == set(VERBS)
    for each in build.listed():
        assert build.lines(each)
        assert all(line.startswith(f"lora-lab {each.get('verb', '')}") for line in build.lines(each))


def test_the_checkpoints_examples_give_the_adapter_back(pages, build, lora_lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verbs = ("fuse", "verify", "extract")
    (script,) = {block for verb in verbs for block in CODE.findall((pages / f"verb-{verb}.md").read_text())}
    exec(compile(script, "make_model.py", "exec"), {})
    for verb in verbs:
        (example,) = [each for each in build.listed() if each.get("verb") == verb]
        for line in build.lines(example):
            assert lora_lab(*shlex.split(line)[1:])[0] == 0
    given, back = (Adapter.load(name).updates for name in ("adapter", "back"))
    assert given.keys() == back.keys()
    assert all(torch.allclose(given[name].delta(), back[name].delta(), atol=1e-5) for name in given)


def test_the_recipe_of_its_page_is_one_that_can_be_run(pages, build, tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", (pages / "verb-run.md").read_text(), flags=re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(text)
    assert [step.verb for step in recipes.read(tmp_path / "recipe.yaml")] == ["merge", "prune", "evaluate"]


def test_all_links_between_pages_lead_to_a_page(pages):
    for path in pages.glob("*.md"):
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith(("http", "#", "mailto:")):
                assert (pages / target.partition("#")[0]).exists(), f"{path.name}: {target}"


def test_every_page_begins_with_what_it_answers(pages):
    told = re.compile(r"# .*\n\n\*\*What this page answers:\*\* ")
    others = ("verb-", "tutorial-", "index", "contributing", "changelog", "security")
    for path in pages.glob("*.md"):
        assert path.name.startswith(others) or told.match(path.read_text()), path.name


def test_every_page_is_in_the_order_of_the_site(pages):
    nav = (pages.parent / "mkdocs.yml").read_text()
    for path in pages.glob("*.md"):
        assert re.search(rf"[ ]{re.escape(path.name)}$", nav, re.M), path.name


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_the_tutorials_run(path, build, few_digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(text for is_code, text in build.cells(path) if is_code)
    short = re.sub(r"steps=\d+", "steps=4", code)
    exec(compile(short, str(path), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out
    assert all(text for _, text in build.cells(path))
