import pytest
from lora_lab.cli import parsing

from lora_lab.errors import OptionError


def test_values_are_numbers_with_commas():
    assert parsing.values("1e-3,2e-3", "--lr", float) == [1e-3, 2e-3]
    with pytest.raises(OptionError, match=r"--rank '2,x': a whole number is needed"):
        parsing.values("2,x", "--rank", int)
    with pytest.raises(OptionError, match="given twice"):
        parsing.values("2,2", "--rank", int)
