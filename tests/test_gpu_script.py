"""The script that is run where a GPU is lent: its logic at tiny sizes, on the CPU."""

import json

import gpu
import pytest


def test_every_row_is_measured_and_kept(tmp_path, capsys):
    found = gpu.main(["--cpu", "--json", str(tmp_path / "gpu.json")])  # takes seconds: there are 24 rows
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    assert found["card"] == "CPU, tiny sizes"
    assert not [row for row in found["rows"].values() if "error" in row]
    together = {name: row for name, row in found["rows"].items() if "at once" in name or "compiled" in name}
    assert len(together) == 7
    for name, row in together.items():
        assert row["one after another since"] is None, name
        assert row["faster than whole passes"] > 0
        assert row["largest difference"] < (1e-6 if "float32" in name else 1e-2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines[1:]] == list(found["rows"])


def test_rows_that_fail_or_for_which_there_is_no_time_are_named(tmp_path, monkeypatch):
    found = gpu.main(["--cpu", "--minutes", "0"])
    assert {str(row) for row in found["rows"].values()} == {"{'left out': 'after 0.0 minutes'}"}

    def broken(bench, method):
        raise RuntimeError("no\n kernel")

    monkeypatch.setattr(gpu.Bench, "merged", broken)
    found = gpu.main(["--cpu", "--only", "merge", "--json", str(tmp_path / "gpu.json")])
    assert [row["error"] for row in found["rows"].values()] == ["RuntimeError: no kernel"] * 2
    assert json.loads((tmp_path / "gpu.json").read_text()) == found


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no GPU; --cpu runs the logic at tiny sizes" in capsys.readouterr().err
