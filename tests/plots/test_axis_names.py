"""Axes are named by metric and unit."""

import pytest

from lora_lab.plots.views.shapley import _unit
from lora_lab.results.result import Result


@pytest.mark.parametrize(
    ("worth", "said", "expected"),
    [
        ("accuracy", {"about": "", "unit": "share", "higher": True}, "accuracy"),
        ("loss", {"about": "", "unit": "nats", "higher": False}, "loss removed (nats)"),
        ("exact_match", {"about": "", "unit": "share", "higher": True}, "exact match"),
        ("log-likelihood", None, "log-likelihood (nats)"),
    ],
)
def test_the_axis_of_values_names_the_worth_and_its_unit(worth, said, expected):
    metrics = {worth: said} if said else {}
    assert _unit([Result("shapley", {}, {"worth": worth, "metrics": metrics}, {}, {})]) == expected
