"""What is said of an installation: right where it is, and broken where it cannot work."""

import importlib
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from lora_lab import diagnosis
from lora_lab.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PEFT = "peft>=0.21"


def found(name):
    (check,) = [check for check in diagnosis.checks() if check.name == name]
    return check


@pytest.fixture
def installed(monkeypatch):
    """Gives packages other versions, None for none at all, and lora-lab other requirements."""

    def change(requirements=None, **versions):
        real = metadata.version

        def version(name):
            if versions.get(name, "") is None:
                raise metadata.PackageNotFoundError(name)
            return versions.get(name) or real(name)

        monkeypatch.setattr(metadata, "version", version)
        if requirements is not None:
            monkeypatch.setattr(metadata, "requires", lambda _: requirements)

    return change


def test_every_extra_says_what_it_is_for():
    assert set(EXTRAS) == set(PROJECT["optional-dependencies"]) - {"dev"}
    used = {name for path in ROOT.rglob("lora_lab/**/*.py") for name in re.findall(r'needs\("(\w+)"', path.read_text())}
    assert used <= set(EXTRAS)


def test_this_installation_is_not_broken():
    told = list(diagnosis.checks())
    assert [check for check in told if check.status == "broken"] == []
    assert {check.name for check in told} >= {"lora-lab", "python", "torch", "cpu", "cache", "hub cache", "settings"}


@pytest.mark.parametrize(
    ("version", "status"), [("0.21", "right"), ("0.22.0.dev0", "right"), ("0.20.9", "broken"), (None, "broken")]
)
def test_a_package_must_be_there_in_a_supported_version(installed, version, status):
    installed([PEFT], peft=version)
    check = found("peft")
    assert (check.status, check.found, check.wanted) == (status, version or "", ">=0.21")


@pytest.mark.parametrize(("version", "status"), [(None, "missing"), ("1", "outside"), ("2.3", "right")])
def test_an_extra_may_be_missing_and_says_what_for(installed, version, status):
    installed(["pandas>=2.2; extra == 'pandas'"], pandas=version)
    check = found("pandas")
    assert (check.group, check.status) == ("extra pandas", status)
    assert check.wanted == ">=2.2 for results as data frames"


def test_a_package_may_bring_modules_of_another_name(installed, monkeypatch, tmp_path):
    brought = tmp_path / "nameless_things-9.8.dist-info"
    brought.mkdir()
    (brought / "METADATA").write_text("Metadata-Version: 2.1\nName: nameless-things\nVersion: 9.8\n")
    (brought / "RECORD").write_text("thing_of_other_name/__init__.py,,\nthing_of_other_name/deep/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    installed(["nameless-things>=9.5; extra == 'docs'"])
    assert (found("nameless-things").status, found("nameless-things").found) == ("broken", "9.8, without its files")
    (tmp_path / "thing_of_other_name").mkdir()
    (tmp_path / "thing_of_other_name" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert (found("nameless-things").status, found("nameless-things").found) == ("right", "9.8")


def test_a_package_without_its_files_is_broken(installed, monkeypatch):
    installed([PEFT])
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(diagnosis, "find_spec", lambda name: None)
    assert (found("peft").status, "without its files" in found("peft").found) == ("broken", True)


def test_folders_tell_their_size_and_whether_they_can_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "lora-lab" / "a").mkdir(parents=True)
    (tmp_path / "lora-lab" / "a" / "b").write_bytes(bytes(1500))
    (tmp_path / "lora-lab" / "link").symlink_to(tmp_path / "lora-lab" / "a" / "b")
    assert found("cache").found == f"{tmp_path / 'lora-lab'}, 1.5 kB"
    assert found("hub cache").found == f"{tmp_path / 'hub'}, not there yet"
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert found("hub cache").status == "broken"


def test_the_module_loads_nothing_heavy():
    code = "import sys, lora_lab.diagnosis; print({'torch', 'numpy', 'rich', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
