"""Curvature by products alone: against known spectra, and against the whole Hessian of a tiny model."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.adapters.models.attached import attach
from lora_lab.analysis.curvature import (
    Curvature,
    CurvaturePass,
    _trace,
    cut,
    lanczos,
    largest_rates,
    measured,
)
from lora_lab.analysis.lines.landscape import Sharpness
from lora_lab.analysis.sharpness import tried
from lora_lab.errors import OptionError, TaskError
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.training.fit import initial, train
from lora_lab.training.recipe import Recipe

ADAPTER = tiny_models.adapter(tiny_models.updates(0))
TASK = tiny_models.Tiny(0)
SHORT = {"steps": 3, "batch_size": 8, "rank": 2, "target_modules": r"vit\.layers\.[0-1]\..*(q_proj|fc1)"}


class Quadratic:
    """A task whose loss on example i is ½ xᵀ Hᵢ x: what the model says is x, whatever the batch."""

    counts_targets, batch_size = False, 4

    def __init__(self, matrices):
        self.matrices = matrices

    def logits(self, model, batch):
        return model

    def targets_of(self, x, batch):
        losses = torch.stack([x @ self.matrices[i] @ x / 2 for i in batch["labels"]])
        counted = torch.ones(len(losses), 1, dtype=torch.bool)
        return SimpleNamespace(loss=losses[:, None], counted=counted, mean=lambda values: values[:, 0])


def matrix(values, seed=0):
    """A symmetric matrix of these eigenvalues, in float64."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return Q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ Q.T, Q


@given(st.integers(0, 50), st.floats(1.2, 100), st.floats(-50, 0.9))
def test_lanczos_finds_the_ends_of_a_known_spectrum(seed, top, bottom):
    values = [top, *np.linspace(bottom, 1, 29)]
    H, Q = matrix(values, seed)
    start = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found, x = lanczos(lambda v: H @ v, start, 30)
    assert found.largest == pytest.approx(max(values), rel=2e-3)
    assert abs(found.largest - top) <= found.residual + 1e-9
    assert float((H @ x - found.largest * x).norm()) == pytest.approx(found.residual, abs=1e-6 * top)
    assert abs(float(x @ Q[:, 0])) > 0.95


def test_lanczos_ends_with_the_space_and_says_when_it_was_cut_short():
    H, _ = matrix([5.0, 2.0, -7.0])
    start = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    found, _ = lanczos(lambda v: H @ v, start, 30)
    assert (found.largest, found.smallest) == (pytest.approx(5), pytest.approx(-7))
    assert found.iterations <= 3
    none, _ = lanczos(lambda v: 0 * v, start, 30)
    assert (none.largest, none.smallest, none.residual) == (0, 0, 0)
    H, _ = matrix(list(np.linspace(0, 1, 200)))
    start = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    short, _ = lanczos(lambda v: H @ v, start, 4)
    assert short.iterations == 4
    assert short.largest < 1 < short.largest + 3 * short.residual


def test_lanczos_keeps_its_basis_orthogonal_where_plain_iteration_finds_ghosts():
    """With a far outlier the recursion alone finds it again and again, and nothing besides."""
    values = [1e6, *np.linspace(1, 2, 59)]
    H, _ = matrix(values)
    start = torch.ones(60, dtype=torch.float64)
    seen = []

    def product(v):
        seen.append(v)
        return H @ v

    H = H - 2e6 * torch.outer(matrix(values)[1][:, 0], matrix(values)[1][:, 0])  # the outlier is now −1e6
    found, _ = lanczos(product, start, 60)
    basis = torch.stack(seen)
    assert float((basis @ basis.T - torch.eye(len(seen), dtype=torch.float64)).abs().max()) < 1e-10
    assert found.largest == pytest.approx(2, rel=0.05)
    assert found.smallest == pytest.approx(-1e6)


def quadratic(count=40, n=6):
    """A quadratic whose examples have curvatures of their own; its parts, and their matrices."""
    shape = np.random.default_rng(0)
    matrices = [matrix([10 + shape.normal(), *shape.normal(0, 1, n - 1)], seed=7)[0] for _ in range(count)]
    task, x = Quadratic(matrices), torch.ones(n, dtype=torch.float64, requires_grad=True)
    batches = [{"labels": torch.arange(start, start + 4)} for start in range(0, count, 4)]
    return task, x, batches, torch.stack(matrices)


def test_products_are_those_of_the_mean_hessian_and_of_each_part():
    task, x, batches, matrices = quadratic()
    curvature = Curvature(task, x, [x], batches)
    v = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    total, along = curvature.products(v)
    assert torch.allclose(total, matrices.mean(0) @ v)
    parts = torch.stack([part.mean(0) for part in matrices.split(4)])
    assert along == pytest.approx(torch.einsum("i,kij,j->k", v, parts, v).numpy())
    gradients = torch.stack(list(curvature.gradients()))
    assert torch.allclose(gradients, parts @ x)
    assert curvature.losses() == pytest.approx((torch.einsum("i,kij,j->k", x, parts, x) / 2).detach().numpy())


def test_parts_of_different_sizes_count_by_their_examples():
    task, x, _, matrices = quadratic(10)
    curvature = Curvature(task, x, [x], [{"labels": torch.arange(0, 7)}, {"labels": torch.arange(7, 10)}])
    v = torch.ones(6, dtype=torch.float64)
    assert torch.allclose(curvature.product(v), matrices[:10].mean(0) @ v)


def test_what_is_measured_of_a_quadratic_is_its_spectrum():
    task, x, batches, matrices = quadratic()
    asked = CurvaturePass(ADAPTER, iterations=6, probes=400, batch=4, seed=0)
    found = measured(asked, task, x, [x], batches)
    H = matrices.mean(0)
    values = torch.linalg.eigvalsh(H)
    assert found["sharpness"] == pytest.approx(float(values[-1]), rel=2e-3)
    assert found["sharpness_low"] < found["sharpness"] < found["sharpness_high"]
    # the top direction is the same on all examples, so the interval is that of a mean of their eigenvalues
    tops = torch.linalg.eigvalsh(torch.stack([part.mean(0) for part in matrices.split(4)]))[:, -1]
    half = 2.262 * float(tops.std()) / math.sqrt(10)
    assert found["sharpness_high"] - found["sharpness"] == pytest.approx(half, rel=0.05)
    assert found["trace_low"] < float(H.trace()) < found["trace_high"]
    assert found["trace"] == pytest.approx(float(H.trace()), rel=0.1)
    gradients = torch.stack([part.mean(0) @ x.detach() for part in matrices.split(4)])
    D = gradients.square().mean(0).sqrt() + 1e-8
    scaled = torch.linalg.eigvalsh(H / (D.sqrt() * D.sqrt()[:, None]))
    assert found["adam_sharpness"] == pytest.approx(float(scaled[-1]), rel=2e-3)
    assert found["loss"] == pytest.approx(float(x.detach() @ H @ x.detach() / 2))


def test_the_interval_of_a_trace_is_that_of_signs_and_of_examples():
    signs = np.random.default_rng(0).normal(size=(4000, 3, 1)) + np.random.default_rng(1).normal(size=(4000, 1, 5))
    held = [abs(value) <= half for value, half in (_trace(each, np.full(5, 0.2)) for each in signs)]
    assert 0.94 < np.mean(held) <= 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch.func itself
def test_on_a_tiny_model_products_are_those_of_the_whole_hessian():
    from torch.func import functional_call, hessian

    with attach(TASK.build_model().double(), ADAPTER) as attached:
        keys = [key for site in ADAPTER.sites.values() for key in site.keys.values()]
        live = attached.live(keys)
        for tensor in live:
            tensor.data = tensor.data.double()
            tensor.requires_grad_(True)
        split = TASK.split("train")
        batch = {"x": split.inputs["x"].double(), "labels": split.inputs["labels"]}
        names = {id(p): name for name, p in attached.model.named_parameters()}
        sizes = [tensor.numel() for tensor in live]

        def loss(flat):
            pieces = torch.split(flat, sizes)
            given = {names[id(t)]: piece.view_as(t) for t, piece in zip(live, pieces, strict=True)}
            logits = functional_call(attached.model, given, (batch["x"],)).logits
            return torch.nn.functional.cross_entropy(logits, batch["labels"])

        H = hessian(loss)(torch.cat([tensor.detach().flatten() for tensor in live]))
        found = Curvature(InDouble(0), attached.model, live, list(cut([batch], 6)))
        for seed in range(3):
            v = torch.randn(len(H), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            assert torch.allclose(found.product(v), H @ v, atol=1e-9)
        top, _ = lanczos(found.product, torch.ones(len(H), dtype=torch.float64), 60)
        assert top.largest == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-3)


class InDouble(tiny_models.Tiny):
    """Losses in float64."""

    def targets_of(self, logits, batch):
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        right = torch.ones_like(batch["labels"], dtype=torch.bool)
        return SimpleNamespace(loss=loss[:, None], counted=right[:, None], mean=lambda values: values[:, 0])


def test_largest_rates_are_where_the_optimisers_begin_to_diverge():
    """Each is run on ½λx² a little below and a little above its bound."""
    sharpness = 7.0
    rates = largest_rates(sharpness, sharpness)

    def ends(name, share):
        x, m = 1.0, 0.0
        for _ in range(4000):
            g = sharpness * x
            m = {"rate_gd": g, "rate_momentum": 0.9 * m + g, "rate_adam": 0.9 * m + 0.1 * g}[name]
            x -= share * rates[name] * m
            if abs(x) > 1e6:
                return math.inf
        return abs(x)

    for name in rates:
        assert ends(name, 0.99) < 1e-3, name
        assert ends(name, 1.01) == math.inf, name
    assert rates["rate_adam"] == pytest.approx(38 / sharpness)
    assert all(math.isnan(rate) for rate in largest_rates(-1.0, 0.0).values())


@pytest.fixture(scope="module")
def trained():
    return train(Digits("relabel"), Recipe(method="lora", **SHORT))[0]


@pytest.mark.usefixtures("few_digits")
def test_an_adapter_is_measured_as_trained_and_balanced_and_where_it_began(trained, tmp_path):
    task, question = Digits("relabel"), Sharpness(examples=20, iterations=4, probes=2)
    told = []
    found = question.run([trained], task, Execution(cache=tmp_path, progress=lambda *at: told.append(at)))
    rows = {row["at"]: row for row in found.rows()}
    assert list(rows) == ["trained", "balanced", "initial"]
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert rows["trained"]["loss"] == pytest.approx(rows["balanced"]["loss"], rel=1e-5)
    assert rows["trained"]["rate_gd"] == pytest.approx(2 / rows["trained"]["sharpness"])
    assert found.summary["rates"] == [
        {
            "adapter": trained.label,
            "method": "lora",
            "seed": 0,
            "rate": task.learning_rate,
            **{name: trained.record["metrics"]["validation"][name] for name in ("accuracy", "loss")},
            "chosen": True,
        }
    ]
    again = question.run([trained], task, Execution(cache=tmp_path, progress=lambda *at: told.append(at)))
    assert again.columns == found.columns


@pytest.mark.usefixtures("few_digits")
def test_a_second_run_computes_nothing(trained, tmp_path, monkeypatch):
    question = Sharpness(examples=10, iterations=2, probes=2)
    question.run([trained], Digits("relabel"), Execution(cache=tmp_path))
    monkeypatch.setattr(CurvaturePass, "__call__", lambda *given: pytest.fail("computed afresh"))
    question.run([trained], Digits("relabel"), Execution(cache=tmp_path))
    told = replace(question, metric=("accuracy",)).run([trained], Digits("relabel"), Execution(cache=tmp_path))
    assert list(told.parameters["metrics"]) == ["accuracy"]
    assert "loss" not in told.summary["rates"][0]
    with pytest.raises(OptionError, match="metric of task digits/relabel: 'f1'"):
        replace(question, metric=("f1",)).run([trained], Digits("relabel"), Execution(cache=tmp_path))


@pytest.mark.usefixtures("few_digits")
def test_gauge_changes_the_sharpness_as_trained_and_not_when_balanced(trained):
    """B / 4 and 4 A have ΔW unchanged, and the Hessian's block of B 16 times as large."""
    tensors = {key: tensor * (0.25 if "lora_B" in key else 4.0) for key, tensor in trained.tensors.items()}
    twin = replace(trained, tensors=tensors, record={})
    found = Sharpness(examples=10, iterations=5, probes=2).run([replace(trained, record={}), twin], Digits("relabel"))
    one, other = ({row["at"]: row for row in found.rows()[2 * i : 2 * i + 2]} for i in (0, 1))
    assert one["balanced"]["sharpness"] == pytest.approx(other["balanced"]["sharpness"], rel=0.02)
    assert other["trained"]["sharpness"] > 2 * one["trained"]["sharpness"]


@pytest.mark.usefixtures("few_digits")
def test_the_initial_adapter_has_no_update_and_the_a_of_its_seed(trained):
    task = Digits("relabel")
    begun = initial(task, Recipe(method="lora", **SHORT))
    assert begun.sites.keys() == trained.sites.keys()
    assert begun.total_norm == 0
    other = initial(task, Recipe(method="lora", seed=1, **SHORT))
    key = next(key for key in begun.tensors if "lora_A" in key)
    assert not torch.equal(begun.tensors[key], other.tensors[key])
    # three steps at a small rate have not moved A far
    cosine = torch.nn.functional.cosine_similarity(begun.tensors[key].flatten(), trained.tensors[key].flatten(), dim=0)
    assert float(cosine) > 0.99


def test_rates_tried_are_taken_from_records_as_numbers_alone():
    rows = [
        {"learning_rate": 1e-3, "accuracy": 0.9, "loss": 0.4, "chosen": False},
        {"learning_rate": 1e-2, "accuracy": None, "loss": float("nan"), "chosen": True},
        {"learning_rate": "1e-2", "accuracy": 1, "loss": 1},
        "nonsense",
    ]
    given = replace(ADAPTER, record={"tuning": rows, "recipe": {"learning_rate": 5.0}})
    found = [(row["rate"], row["accuracy"], row["loss"], row["chosen"]) for row in tried(given, ("accuracy", "loss"))]
    assert found == [(1e-3, 0.9, 0.4, False), (1e-2, None, None, True)]
    assert list(tried(ADAPTER, ("loss",))) == []
    own = replace(
        ADAPTER, record={"recipe": {"learning_rate": 5.0}, "metrics": {"validation": {"rmse": 0.5, "examples": 9}}}
    )
    (row,) = tried(own, ("rmse", "pearson"))
    assert (row["rate"], row["rmse"], row["pearson"], row["chosen"]) == (5.0, 0.5, None, True)
    assert not {"accuracy", "loss", "examples"} & set(row)


def test_a_model_without_second_derivatives_is_named():
    class Net(tiny_models.Net):
        def forward(self, x):
            logits = super().forward(x).logits
            return SimpleNamespace(logits=torch.cdist(logits, torch.eye(3)))

    task = tiny_models.Tiny(0, Net)
    evaluator = Evaluator([ADAPTER], task, split="train")
    with pytest.raises(TaskError, match=r"^task tiny/0: a layer of its model has no second derivative") as raised:
        CurvaturePass(ADAPTER, 2, 2, 4, 0)(evaluator)
    assert "\n" not in str(raised.value)


def test_a_task_that_says_nothing_of_its_targets_is_named():
    class Own(tiny_models.Tiny):
        def judge_logits(self, logits, batch, *, keep_logits=False):
            return super().judge_logits(logits, batch, keep_logits=keep_logits)

    evaluator = Evaluator([ADAPTER], Own(0), split="train")
    with pytest.raises(TaskError, match=r"Own judges in a way of its own; gradients need its `targets_of`"):
        CurvaturePass(ADAPTER, 2, 2, 4, 0)(evaluator)


def test_bounds():
    with pytest.raises(OptionError, match=r"^iterations is 1; it must be at least 2"):
        Sharpness(iterations=1)
    with pytest.raises(OptionError, match="no adapter was given"):
        Sharpness().run([], TASK)
