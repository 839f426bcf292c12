"""Intervals of samples of which some have no value."""

import math

import numpy as np
import pytest

from lora_lab.results.stats import around, interval


def test_resamples_without_a_value_are_left_out_and_many_of_them_leave_no_interval():
    samples = np.linspace(0, 1, 1001)
    few, many = samples.copy(), samples.copy()
    few[::40], many[::10] = np.nan, np.nan
    assert interval(few) == pytest.approx(interval(samples), abs=0.01)
    assert np.isnan(interval(many)).all()
    assert np.isnan(around(0.5, (math.nan, math.nan))).all()  # no interval is none of no width
    assert around(0.5, (0.6, 0.7)) == (0.5, 0.7)
    assert np.isnan(around(math.nan, interval(many))).all()
