"""Sources with tiny tasks, for merges that look at data."""

import pytest
from planted_tasks import Tiny, adapter_for

from lora_lab.merging.sources import Sources


@pytest.fixture
def sources(tmp_path):
    """(kind, weights, options of the tasks) → two random adapters with a task each."""

    def make(kind="linear", weights=(1.0, 1.0), seeds=(0, 1), inputs=(0, 1), **options):
        adapters = [adapter_for(tmp_path, kind, seed) for seed in seeds]
        return Sources(adapters, weights, tasks=[Tiny(kind, seed, **options) for seed in inputs])

    return make
