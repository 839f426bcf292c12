"""Tasks that users write in Python: from code, and from a file that the command line names."""

import json

import numpy as np
import pytest
import torch
from making_adapters import write
from torch import nn

from lora_lab.analysis.lines.connectivity import Interpolate
from lora_lab.analysis.questions import Evaluate, Shapley
from lora_lab.errors import DivergedError, FileError, OptionError, TaskError, TrustError
from lora_lab.files.disk import read_json
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.execution import Execution
from lora_lab.tasks import from_record
from lora_lab.tasks.python.own import Task
from lora_lab.tasks.python.python_file import line_of
from lora_lab.tasks.scores.metrics import METRICS
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe


class Regressor(nn.Module):
    """y = w · relu(V x), and its squared error."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x, y=None):
        found = self.out(self.hidden(x).relu())[:, 0]
        return {"prediction": found, "loss": None if y is None else ((found - y) ** 2).mean()}


def fresh():
    torch.manual_seed(0)
    return Regressor()


def data(split):
    generator = np.random.default_rng(("train", "validation", "test").index(split))
    x = generator.normal(size=(30, 4)).astype(np.float32)
    return {"x": x, "y": x.sum(1)}


def squared(model, batch):
    found = model(batch["x"])["prediction"]
    return {"prediction": found, "target": batch["y"], "loss": (found - batch["y"]) ** 2}


def task(**changes):
    given = {"model": fresh, "data": data, "score": squared, "metrics": ("rmse", "pearson", "loss"), **changes}
    return Task(**{"name": "sums", "batch_size": 8, "target_modules": ["hidden"], "steps": 8, **given})


def test_an_adapter_is_trained_scored_and_compared_on_it(tmp_path):
    own = task(learning_rate=0.05)
    adapters = [train(own, Recipe("lora", seed=seed))[0] for seed in (0, 1)]
    result = Evaluate().run(adapters, own, Execution(cache=tmp_path))
    assert result.columns["adapter"] == ["(base model alone)", "lora-s0", "lora-s1"]
    scores = score(own, adapters[0])
    error = scores["prediction"] - data("test")["y"]
    assert result.columns["rmse"][1] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    assert result.columns["pearson"][1] == pytest.approx(
        np.corrcoef(scores["prediction"], data("test")["y"])[0, 1], rel=1e-5
    )
    assert result.columns["loss"][0] > result.columns["loss"][1]  # it has learned something
    assert result.parameters["metrics"]["rmse"] == {
        "about": "root of the mean squared error",
        "unit": "",
        "higher": False,
    }
    values = Shapley(worth="loss").run(adapters[:1], own).summary["adapters"][0]
    assert values["full"] == pytest.approx(-scores.loss.mean(), rel=1e-5)
    line = Interpolate(points=3).run(adapters, own)
    assert line.columns["rmse"][0] == pytest.approx(result.columns["rmse"][1], rel=1e-5)
    assert list(line.parameters["metrics"]) == ["rmse", "loss"]


def test_columns_are_their_own_metrics_where_none_is_named(tmp_path):
    own = task(metrics=(), score=lambda model, batch: {"first": batch["x"][:, 0], "correct": batch["y"] > 0})
    adapter = train(task(), Recipe("lora", steps=1))[0]
    result = Evaluate(base=False).run([adapter], own)
    assert result.columns["first"] == [pytest.approx(data("test")["x"][:, 0].mean(), rel=1e-5)]
    assert result.columns["correct"] == [pytest.approx((data("test")["y"] > 0).mean())]
    assert result.parameters["metrics"]["correct"]["about"] == METRICS["accuracy"].about


def test_chosen_metrics_are_named_and_unknown_ones_refused():
    adapter = train(task(), Recipe("lora", steps=1))[0]
    result = Evaluate(base=False, metric=("pearson",)).run([adapter], task())
    assert {"pearson", "pearson_low", "pearson_high"} <= set(result.columns)
    assert "rmse" not in result.columns
    with pytest.raises(OptionError, match=r"metric of task sums: 'accuracy'.*there are: rmse, pearson, loss"):
        Evaluate(metric=("accuracy",)).run([adapter], task())


def test_a_column_of_a_task_that_names_no_metric_can_be_chosen():
    adapter = train(task(), Recipe("lora", steps=1))[0]
    result = Evaluate(base=False, metric=("target",)).run([adapter], task(metrics=()))
    assert result.columns["target"] == [pytest.approx(data("test")["y"].mean(), rel=1e-4)]
    assert "prediction" not in result.columns
    with pytest.raises(OptionError, match=r"'targets' .did you mean 'target'"):
        Evaluate(base=False, metric=("targets",)).run([adapter], task(metrics=()))


def test_texts_are_found_by_the_places_of_examples():
    texts = ["a", "bb", "ccc", "dddd"]

    def lengths(model, batch):
        return {"exact_match": [len(texts[i]) == int(x) for i, x in zip(batch["index"], batch["x"], strict=True)]}

    own = Task(model=fresh, data={"test": {"x": [1, 2, 3, 5]}}, score=lengths, batch_size=3)
    assert score(own, None)["exact_match"].tolist() == [True, True, True, False]
    assert score(own, None)["exact_match"].dtype == bool


CALLS = []


def changing(model, batch):
    """One column more each time."""
    CALLS.append("xyzuvw"[len(CALLS)])
    return dict.fromkeys(CALLS, batch["y"])


WRONG = {
    "a list": (lambda m, b: [1.0], "its score gave a list; name → one number"),
    "nothing": (lambda m, b: {}, "its score gave an empty dict; name → one number an example is needed"),
    "other columns": (changing, "its score gave x and then x, y of one batch; the same columns are needed"),
    "too few": (lambda m, b: {"loss": b["y"][:-1]}, r"'loss' as the shape \[7\] for 8 examples"),
    "a mean": (lambda m, b: {"loss": b["y"].mean()}, "'loss' as a single number for 8 examples"),
    "a matrix": (lambda m, b: {"x": b["x"]}, r"'x' as the shape \[8, 4\] for 8 examples"),
    "texts": (lambda m, b: {"x": ["a"] * 8}, "'x' as <U1; numbers are needed"),
    "no number": (lambda m, b: {"x": b["y"] * float("nan")}, "'x' with 8 values that are no finite numbers"),
    "chance": (lambda m, b: {"x": torch.rand(8)}, "two scorings of one batch differ in 'x'"),
    "an error elsewhere": (lambda m, b: {"x": json.loads("{")}, r"its score: test_own.py, line \d+: JSONDecodeError"),
    "an error": (lambda m, b: {"x": b["z"]}, r"its score: test_own.py, line \d+: KeyError: 'z'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_score_must_not_give_is_told_in_one_line(wrong):
    function, message = WRONG[wrong]
    with pytest.raises(TaskError, match=message) as raised:
        score(task(score=function), None)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("task sums: ")


def test_a_loss_that_is_no_number_has_diverged():
    with pytest.raises(DivergedError, match="its score gave 'loss' with 8 values that are no finite numbers"):
        score(task(score=lambda m, b: {"loss": b["y"] / 0}), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"train": {"x": [1.0]}}}, "no test split; its data has train"),
        ({"data": {"test": {"x": [1.0], "y": [1.0, 2.0]}}}, "examples of different number: x 1, y 2"),
        ({"data": {"test": {"x": 3.0}}}, "x is a single number"),
        ({"data": {"test": {"x": ["a", "b"]}}}, "x is no tensor .*texts are looked up by the batch's 'index'"),
        ({"data": {"test": {"index": [1]}}}, "'index' is the name of the examples' places"),
        ({"data": {"test": [1]}}, "is a list; name → tensor is needed"),
        ({"data": lambda split: 1 / 0}, r"its test split: test_own.py, line \d+: ZeroDivisionError"),
        ({"model": lambda: "x"}, "its model is a str; a torch module is needed"),
        ({"model": lambda: 1 / 0}, r"its model: test_own.py, line \d+: ZeroDivisionError"),
        ({"learning": 1}, "unknown setting of a task 'learning'"),
        ({"score": 3}, "`score` is 3; a function is needed"),
    ],
)
def test_other_mistakes_are_told_too(changes, message):
    with pytest.raises((TaskError, OptionError), match=message):
        score(task(**changes), None)


class Silent(Regressor):
    """A model that gives a prediction and no loss."""

    def forward(self, x, y=None):
        return super().forward(x)


class Bare(Regressor):
    """A model that does not know the targets at all, and gives a tensor."""

    def forward(self, x):
        return super().forward(x)["prediction"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Silent, "training goes by model.*loss, and its model gives none of x, y; .* or a training loop of your own"),
        (Bare, "training calls model.*loss: .*unexpected keyword argument 'y'"),
    ],
)
def test_a_model_that_gives_no_loss_is_refused_before_it_is_trained(model, message):
    with pytest.raises(TaskError, match=message) as caught:
        train(task(model=model), Recipe("lora", seed=0))
    assert "\n" not in str(caught.value)


def test_an_edited_metric_is_asked_again(tmp_path):
    """A number that the score uses, and the data."""
    adapter = train(task(), Recipe("lora", steps=1))[0]

    def found(factor, own_data=data):
        own = task(score=lambda m, b: {"x": b["y"] * factor}, data=own_data, metrics=())
        return Evaluate(base=False).run([adapter], own, Execution(cache=tmp_path)).columns["x"][0]

    assert found(2.0) == pytest.approx(2 * found(1.0))
    assert found(1.0, lambda split: {name: values + 1 for name, values in data(split).items()}) != found(1.0)


def test_no_record_leads_to_its_code(tmp_path):
    adapter = train(task(), Recipe("lora", steps=1))[0]
    record = adapter.record["task"]
    assert (record["kind"], record["name"]) == ("python", "sums")
    with pytest.raises(TrustError, match=r"trained on a task in Python .sums.*only where you name it"):
        from_record(record)


FILE = '''
"""A task of my own."""

import torch
from torch import nn

import beside
from lora_lab import Task

FACTOR = 1.0


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(4, 1)

    def forward(self, x):
        return self.hidden(x)[:, 0]


def model():
    torch.manual_seed(0)
    return Model()


def score(model, batch):
    return {"x": FACTOR * model(batch["x"])}


def build():
    return Task(model=model, data=beside.DATA, score=score)


qa = Task(model=model, data=beside.DATA, score=score)
'''


@pytest.fixture
def file(tmp_path):
    (tmp_path / "beside.py").write_text('DATA = {"test": {"x": [[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 1.0, 0.0]]}}\n')
    (tmp_path / "my_task.py").write_text(FILE)
    tensors = {"base_model.model.hidden.lora_A.weight": torch.ones(1, 4)}
    tensors["base_model.model.hidden.lora_B.weight"] = torch.ones(1, 1)
    write(tmp_path / "a", tensors, r=1, lora_alpha=1, target_modules=["hidden"])
    return tmp_path / "my_task.py"


def test_a_file_is_named_on_the_command_line(file, lora_lab):
    for name in ("my_task.py", "my_task.py:qa", "my_task.py:build", file):
        code, out, err = lora_lab("evaluate", "a", "--task", name, "--json")
        assert code == 0, err
        columns = json.loads(out)["columns"]
        assert columns["x"][1] - columns["x"][0] == pytest.approx((10 + 1) / 2)  # ΔW = (1, 1, 1, 1)
    code, twos, err = lora_lab("evaluate", "a", "--task", "my_task.py", "--jobs", 2, "--json")
    assert code == 0, err
    assert json.loads(twos)["columns"] == json.loads(out)["columns"]
    code, out, _ = lora_lab("evaluate", "a", "--task", "my_task.py")
    assert "(base model alone)" in out
    assert "qa" in out


@pytest.mark.parametrize(
    ("edit", "name", "message"),
    [
        (("", ""), "none.py:qa", "none.py: no such Python file"),
        (("", ""), "my_task.py:qb", "my_task.py: 'qb'"),
        (("", ""), "my_task.py:FACTOR", "FACTOR is a float; a Task, or a function that gives one, is needed"),
        (("FACTOR = 1.0", "FACTOR = 1 / 0"), "my_task.py", "my_task.py, line 10: ZeroDivisionError: division by zero"),
        (("FACTOR = 1.0", "FACTOR = = 1"), "my_task.py", "line 10: SyntaxError"),
        (("FACTOR *", "NONE *"), "my_task.py", "its score: my_task.py, line 28: NameError"),
        (("qa = ", "qb = build()\\nqa = "), "my_task.py", "holds 2 tasks (qb, qa)"),
    ],
)
def test_mistakes_in_a_file_are_told_by_its_line(file, lora_lab, edit, name, message):
    file.write_text(FILE.replace(*(text.replace("\\n", "\n") for text in edit)))
    code, out, err = lora_lab("evaluate", "a", "--task", name)
    assert (code, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_recipe_and_a_record_name_no_code(file, lora_lab):
    (file.parent / "r.yaml").write_text("steps:\n  - evaluate: {adapters: [a], task: my_task.py, output: x.json}\n")
    code, _, err = lora_lab("run", "r.yaml")
    assert code == 1
    assert "a task in Python runs only where you name it" in err


def test_an_error_within_this_package_is_told_by_the_users_own_line_that_led_there(tmp_path):
    with pytest.raises(FileError) as caught:
        read_json(tmp_path / "none.json")
    assert line_of(caught.value).startswith("test_own.py, line ")
