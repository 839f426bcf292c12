"""What docs/folder-file.md says, done."""

import re
from pathlib import Path

from lora_lab.cli import folder_file

PAGE = (Path(__file__).parents[2] / "docs/folder-file.md").read_text()


def test_the_pages_file_is_taken_and_its_bounds_are_those_of_the_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    Path("lora-lab.toml").write_text(block)
    shared = {"task": "my-task.toml", "examples": 200, "device": "cpu"}
    assert folder_file.defaults(["shapley", "a"]) == {"shapley": {**shared, "worth": "loss", "samples": 100}}
    assert folder_file.defaults(["stability", "a"]) == {"stability": shared}
    assert folder_file.defaults(["convert", "a"]) == {"convert": {}}
    assert all(f"`{name}`" in PAGE for name in folder_file.TYPED_ONLY)
