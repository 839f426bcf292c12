"""Whatever stands in place of a file or folder, and wherever output is sent: one line, no traceback, nothing left."""

import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from making_adapters import lora, write

from lora_lab.adapters.adapter import Adapter
from lora_lab.results.result import Result

TASK = """kind = "text-classification"
base = "base"
data = "rows.csv"
text = "text"
label = "label"
"""
DEEP = "[" * 50_000 + "]" * 50_000
RESULT = '"kind": "sweep", "parameters": {}, "summary": {}, "provenance": {}'


def adapter(path):
    source = write(path.with_name("peft"), lora())
    Adapter.load(source).save(path)


@pytest.fixture
def place(tmp_path):
    """A folder with an adapter, a task file and an empty file."""
    adapter(tmp_path / "a.safetensors")
    (tmp_path / "task.toml").write_text(TASK)
    (tmp_path / "file").write_text("mine")
    Result("sweep", {}, {}, {"by_method": []}).save(tmp_path / "r.json")
    return tmp_path


def before_and_after(place):
    return sorted((str(path), path.lstat().st_size) for path in place.rglob("*"))


def told(result, *words):
    code, out, err = result
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("warning:")]
    assert code in (1, 2), (code, err)
    assert len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    assert "Traceback" not in err
    assert not out
    for word in words:
        assert word in lines[0], lines[0]


LONG = "x" * 300
ARGUMENTS = {
    "a name of 300 characters": ["inspect", LONG],
    "a long name with an ending": ["inspect", f"{LONG}.safetensors"],
    "a long result": ["figure", f"{LONG}.json", "-o", "x.pdf"],
    "a long output": ["merge", "a.safetensors", "-o", LONG],
    "a long output file": ["prune", "a.safetensors", "--rank", "1", "-o", f"{LONG}.safetensors"],
    "a long output folder": ["interpolate", "a.safetensors", "a.safetensors", "-o", LONG],
    "a long task": ["evaluate", "a.safetensors", "--task", f"{LONG}.toml"],
    "a long path": ["inspect", "/".join(["x" * 200] * 30)],
    "nobody's home": ["inspect", "~nobody-at-all/x"],
    "nobody's configuration": ["inspect", "a.safetensors", "--config", "~nobody-at-all/x.json"],
    "a folder for a result": ["figure", "peft", "-o", "x.pdf"],
    "a folder for a task": ["evaluate", "a.safetensors", "--task", "./peft"],
    "a folder for a configuration": ["inspect", "a.safetensors", "--config", "."],
    "a file for the folder of an input": ["inspect", "file/x.safetensors"],
    "a file for the folder of an output": ["merge", "a.safetensors", "-o", "file/m.safetensors"],
    "a file for an output folder": ["interpolate", "a.safetensors", "a.safetensors", "-o", "file"],
    "a file for the parent of an output folder": ["sweep", "a.safetensors", "-o", "file/out"],
    "a text for an adapter": ["inspect", "file"],
    "a text for a result": ["figure", "file", "-o", "x.pdf"],
    "a text for a task": ["evaluate", "a.safetensors", "--task", "./file"],
    "a full device for an adapter": ["merge", "a.safetensors", "-o", "/dev/full", "--force"],
    "a full device for a result": ["evaluate", "a.safetensors", "-o", "/dev/full", "--force"],
    "a device for an input": ["inspect", "/dev/null"],
    "a file that is not ours": ["prune", "a.safetensors", "--rank", "1", "-o", "file", "--force"],
    "a folder that is not ours": ["merge", "a.safetensors", "-o", "peft", "--force"],
    "its own input": ["prune", "a.safetensors", "--rank", "1", "-o", "a.safetensors", "--force"],
    "an undecodable name": ["inspect", "\udcff.safetensors"],
    "an undecodable result": ["figure", "\udcff.json", "-o", "x.pdf"],
    "an undecodable task": ["evaluate", "a.safetensors", "--task", "\udcff.toml"],
    "an empty name": ["inspect", ""],
    "a folder without a name": ["merge", "a.safetensors", "-o", ""],
    "a result that is no figure": ["figure", "r.json", "-o", "x.pdf"],
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_odd_names_and_places_are_one_line_and_leave_nothing(lora_lab, place, case):
    before = before_and_after(place)
    told(lora_lab(*ARGUMENTS[case]))
    assert before_and_after(place) == before


def pipe(path):
    os.mkfifo(path)


def listening(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize("make", [pipe, listening, Path.mkdir, lambda path: path.symlink_to(path.name)])
def test_a_special_file_for_an_output_is_named_and_stays(lora_lab, place, make):
    path = place / "odd.safetensors"
    make(path)
    for verb in (["merge", "a.safetensors"], ["prune", "a.safetensors", "--rank", "1"]):
        for force in ([], ["--force"]) if make is not Path.mkdir else ([],):
            told(lora_lab(*verb, "-o", path.name, *force), "odd.safetensors: ")
    assert os.path.lexists(path)


TASK_FILES = {
    "nul": TASK.replace("base", "ba\0se"),
    "escaped nul": TASK.replace('"base"', '"ba\\u0000se"'),
    "escaped nul in data": TASK.replace('"rows.csv"', '"rows\\u0000.csv"'),
    "latin-1": TASK.encode() + b'# caf\xe9\nname = "\xe9"\n',
    "utf-16": TASK.encode("utf-16"),
    "deep": "a = " + DEEP,
    "deep tables": "a" + ".a" * 5000 + " = 1",
    "digits": "limit = " + "9" * 10_000,
    "empty": "",
    "not TOML": "kind: text-classification",
    "huge name": TASK.replace('"base"', '"' + "x" * 100_000 + '"'),
    "nobody's home": TASK.replace('"base"', '"~nobody-at-all/base"'),
    "twice": TASK + TASK,
}
for _name in (
    "kind",
    "base",
    "data",
    "text",
    "label",
    "splits",
    "split_seed",
    "limit",
    "max_length",
    "labels",
    "dtype",
):
    for _value in ("-1", "nan", "[]", "{}", "[[1]]", "1979-05-27", '{a = "b"}', "true", '""'):
        _lines = [line for line in TASK.splitlines() if not line.startswith(f"{_name} =")]
        TASK_FILES[f"{_name} = {_value}"] = "\n".join([*_lines, f"{_name} = {_value}"]) + "\n"


@pytest.mark.parametrize("case", TASK_FILES)
def test_damaged_task_files_are_one_line(lora_lab, place, case):
    content = TASK_FILES[case]
    (place / "task.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    told(lora_lab("evaluate", "a.safetensors", "--task", "task.toml"))


RESULTS = {
    "deep": '{"format": "lora-lab result 1", "columns": ' + DEEP + "}",
    "digits": '{"format": "lora-lab result 1", "x": ' + "9" * 10_000 + "}",
    "nul": "\0" * 100,
    "list": "[1, 2]",
    "cut": '{"format": "lora-lab result 1", "kind": "sw',
    "foreign": '{"r": 8, "peft_type": "LORA"}',
    "kind": '{"format": "lora-lab result 1", "columns": {}, ' + RESULT.replace('"sweep"', "[1]") + "}",
    "unknown kind": '{"format": "lora-lab result 1", "columns": {}, ' + RESULT.replace("sweep", "swoop") + "}",
    "column": '{"format": "lora-lab result 1", "columns": {"a": 3}, ' + RESULT + "}",
    "columns": '{"format": "lora-lab result 1", "columns": [1], ' + RESULT + "}",
    "lengths": '{"format": "lora-lab result 1", "columns": {"a": [1], "b": []}, ' + RESULT + "}",
    "checksum": '{"format": "lora-lab result 1", "columns": {}, "sha256": 3, ' + RESULT + "}",
    "summary": '{"format": "lora-lab result 1", "columns": {}, ' + RESULT.replace("{}", "[]", 2) + "}",
    "without rows": '{"format": "lora-lab result 1", "columns": {}, ' + RESULT + "}",
}


@pytest.mark.parametrize("case", RESULTS)
def test_damaged_results_are_one_line(lora_lab, place, case):
    (place / "r.json").write_text(RESULTS[case])
    told(lora_lab("figure", "r.json", "-o", "x.pdf"), "" if "kind" in case or "rows" in case else "r.json: ")
    assert not (place / "x.pdf").exists()


def test_what_the_system_refuses_is_one_line(lora_lab, place, monkeypatch):
    from lora_lab.files import disk

    """Root may read and write everything, so that permission is refused by hand."""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "some/file")

    for name, verb in (
        ("read_json", ["figure", "r.json", "-o", "x.pdf"]),
        ("read_header", ["inspect", "a.safetensors"]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(disk, name, refuse)
            told(lora_lab(*verb), "some/file: Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        told(lora_lab("merge", "a.safetensors", "-o", "m"), "m: cannot be written (no permission to write in ")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        told(lora_lab("prune", "a.safetensors", "--rank", "1", "-o", "m"), "cannot be written (Permission denied)")
    assert not (place / "m").exists()


def test_a_bug_still_shows_its_traceback(lora_lab, place, monkeypatch):
    from lora_lab.files import disk

    def bug(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr(disk, "read_json", bug)
    with pytest.raises(ValueError, match="a bug"):
        lora_lab("figure", "r.json", "-o", "x.pdf")


# In processes of their own: what only a process can lack.


def run(*arguments, code="", **options):
    line = f"{code}\nfrom lora_lab.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", line, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        text=True,
        timeout=120,
        **{"capture_output": "stdout" not in options, **options},
    )
    return done.returncode, done.stdout or "", done.stderr or ""


def test_a_current_folder_that_is_gone_is_one_line(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = "import os, sys; os.rmdir(os.getcwd())"
    told(run("figure", "r.json", "-o", "x.pdf", code=code, cwd=gone))


@pytest.mark.parametrize("number", [1, 2])
def test_a_closed_stream_takes_no_file_for_itself(place, number):
    code, _, err = run("inspect", "a.safetensors", code=f"import os; os.close({number})", cwd=place)
    assert "Traceback" not in err
    assert code == (1 if number == 1 else 0)
    if number == 1:
        assert err.splitlines() == ["error: standard output: cannot be written (Bad file descriptor)"]


def test_a_full_standard_output_is_one_line(place):
    with open("/dev/full", "w") as full:
        code, _, err = run("figure", "--help", stdout=full, stderr=subprocess.PIPE)
    assert (code, err.splitlines()) == (1, ["error: standard output: cannot be written (No space left on device)"])


def test_a_reader_that_has_gone_is_silent(place):
    read, write_ = os.pipe()
    os.close(read)
    code, _, err = run("figure", "--help", stdout=write_, stderr=subprocess.PIPE)
    os.close(write_)
    assert (code, err) == (1, "") or err.startswith("error: standard output: cannot be written (Broken pipe)")


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(place):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    before = before_and_after(place)
    told(run("prune", "a.safetensors", "--rank", "1", "-o", "m", cwd=place, preexec_fn=limit), "File too large")
    assert before_and_after(place) == before
