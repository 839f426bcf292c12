"""What `lora-lab plane` says of the best point."""

from types import SimpleNamespace

import pytest

from lora_lab.cli.lines.plane import show


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (0.02, -0.01, 0.05, "better than the best of the three by 0.020 [-0.010, 0.050]"),
        (-0.02, -0.041, 0.001, "worse than the best of the three by 0.020 [-0.001, 0.041]"),
    ],
)
def test_a_point_that_loses_is_called_worse(capsys, value, low, high, said):
    gain = {"metric": "accuracy", "x": 1.0, "y": 2.0, "value": value, "low": low, "high": high}
    show(
        SimpleNamespace(
            provenance={"examples": 5},
            parameters={"split": "test", "metrics": {"accuracy": {}}},
            summary={"corners": [], "gains": [gain]},
        )
    )
    assert said in " ".join(capsys.readouterr().out.split())
