"""What an answer hangs on: adapters, examples, the question, and the code that makes adapters out of adapters."""

from dataclasses import replace

import pytest
from making_adapters import random_adapter
from peft import LoraConfig

from lora_lab.analysis.merge_tables.question import CompareMerges
from lora_lab.analysis.questions import Interpolate, Stability, Sweep
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Execution
from lora_lab.tasks import digests
from lora_lab.tasks.kinds.digits import Digits

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder, tasks = tmp_path_factory.mktemp("pair"), [Digits("identity"), Digits("mod3")]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=r"vit\.layers\.[01]\..*fc1")
    made = [random_adapter(task, folder / str(i), config, seed=i, scale=0.05) for i, task in enumerate(tasks)]
    return [replace(a, record={"task": task.record}) for a, task in zip(made, tasks, strict=True)]


@pytest.mark.parametrize(
    ("question", "anew"),
    [
        (Interpolate(points=3, spaces=("delta",)), {"delta:"}),
        (Sweep(kinds=("structured", "rank"), draws=1), {"other:"}),
        (CompareMerges(methods=("average",), coefficients=(1.0,)), {"Merged"}),
        (Stability(samples=2), set()),
    ],
)
def test_what_a_method_made_is_asked_again_when_its_code_has_changed_and_nothing_else(
    pair, tmp_path, monkeypatch, question, anew
):
    tasks, scored, keep = [Digits("identity"), Digits("mod3")], [], Evaluator._keep
    monkeypatch.setattr(Evaluator, "_keep", lambda self, *kept: (scored.append(kept[1]), keep(self, *kept)))

    def asked():
        scored.clear()
        several = isinstance(question, CompareMerges)
        given = (pair, tasks) if several else (pair[:2] if isinstance(question, Interpolate) else pair[:1], tasks[0])
        result = question.run(*given, Execution(cache=tmp_path))
        return result.provenance["run"], set(scored)

    run, first = asked()
    assert asked() == (run, set())
    monkeypatch.setattr(digests, "of_transforms", lambda: "changed")
    other, again = asked()
    assert (other != run) == bool(anew)
    assert len(again) == sum(key[:6] in anew for key in first)
    assert {key[:6] for key in again} == anew
