"""Merges whose coefficients are learned, against objectives written down once more on dense ΔW."""

import pytest
import torch
from planted_tasks import (
    KINDS,
    LAYER,
    QUICK,
    Tiny,
    Two,
    adapter_for,
    close,
    coefficients_of,
    deltas_of,
    merged,
    texts,
    two_layers,
)
from torch.nn.functional import cross_entropy

from lora_lab.errors import DivergedError, OptionError
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources

LEARNED = ["adamerging", "nsc", "ziplora", "cat-learned"]


def logits_of(task, delta, split):
    """What a task's one layer says of a split with this ΔW, differentiable in it."""
    model = task.build_model()
    weight, inputs = model.net["lin"].weight, task.split(split).inputs
    return torch.func.functional_call(model, {"net.lin.weight": weight + delta}, (inputs["x"],)).logits, inputs


# AdaMerging


def entropy(sources, coefficients):
    """The summed mean entropy on validation inputs of Σ λᵢ ΔWᵢ, differentiable in λ."""
    total = torch.zeros(())
    for task in sources.tasks:
        model = task.build_model()
        weight = model.net["lin"].weight
        delta = sum(c * d for c, d in zip(coefficients, deltas_of(sources), strict=True))
        x = task.split("validation").inputs["x"]
        logits = torch.func.functional_call(model, {"net.lin.weight": weight + delta}, (x,)).logits
        total = total + torch.special.entr(logits.softmax(-1)).sum(-1).mean()
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_adamerging_makes_predictions_more_certain_than_its_start(sources, kind):
    made = sources(kind)
    found = coefficients_of(made, merged(made, "adamerging", steps=40))
    assert entropy(made, found) < entropy(made, [0.3, 0.3]) - 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_of_adamerging_goes_down_the_slope_of_the_summed_entropy(sources, kind):
    made = sources(kind)
    start = torch.full((2,), 0.3, requires_grad=True)
    (slope,) = torch.autograd.grad(entropy(made, start), start)
    found = coefficients_of(made, merged(made, "adamerging", steps=1, batch_size=24, learning_rate=0.05))
    close(torch.tensor(found), 0.3 - 0.05 * slope.sign(), 1e-4)  # Adam's first step is the rate


def test_adamerging_multiplies_the_weights(sources):
    made = sources("linear", (2.0, 0.0))
    found = coefficients_of(made, merged(made, "adamerging", steps=1, learning_rate=0.01))
    assert abs(found[1]) < 1e-6
    assert found[0] == pytest.approx(0.6, abs=0.021)


def test_adamerging_has_a_coefficient_for_every_module(tmp_path):
    adapters = [two_layers(tmp_path, seed, ["one", "two"]) for seed in (0, 1)]
    made = Sources(adapters, tasks=[Two(seed=0), Two(seed=1)])
    updates = merge(made, "adamerging", options={"steps": 20}).adapter.updates
    found = []
    for name in made.modules:
        columns = torch.stack([u.delta().flatten() for u in made.updates_of(name)], dim=1)
        solution = torch.linalg.lstsq(columns, updates[name].delta().flatten()[:, None]).solution[:, 0]
        close(columns @ solution, updates[name].delta().flatten())
        found += solution.tolist()
    assert len({round(coefficient, 3) for coefficient in found}) == 4


def test_adamerging_of_texts_looks_at_the_places_of_targets_alone(tmp_path):
    made = texts(tmp_path)
    start = torch.full((2,), 0.3, requires_grad=True)
    total = torch.zeros(())
    for task in made.tasks:
        delta = sum(c * d for c, d in zip(start, deltas_of(made), strict=True))
        inputs = task.split("validation").inputs
        places = inputs["labels"][:, 1:] != -100
        logits = inputs["x"] @ (task.build_model().net["lin"].weight + delta).T + task.build_model().net["lin"].bias
        total = total + torch.special.entr(logits[:, :-1][places].softmax(-1)).sum(-1).mean()
    (slope,) = torch.autograd.grad(total, start)
    found = coefficients_of(made, merged(made, "adamerging", steps=1, batch_size=24, learning_rate=0.05))
    close(torch.tensor(found), 0.3 - 0.05 * slope.sign(), 1e-4)


# null-space compression


def two_sources(folder, weights=(1.0, 1.0)):
    adapters = [two_layers(folder, seed, ["one", "two"]) for seed in (0, 1)]
    return Sources(adapters, weights, tasks=[Two(seed=0), Two(seed=1)])


def outside(sources, coefficients):
    """The summed share of inputs outside of the rows of the task's A, λ [modules, adapters] on both layers."""
    total = torch.zeros((), dtype=torch.float64)
    for i, task in enumerate(sources.tasks):
        model, x = task.build_model().double(), task.split("validation").inputs["x"].double()
        delta = sum(c * u.delta().double() for c, u in zip(coefficients[0], sources.updates_of("one"), strict=True))
        hidden = (x @ (model.one.weight + delta).T + model.one.bias).tanh()
        for name, seen in (("one", x), ("two", hidden)):
            A = sources.updates_of(name)[i].A.double()
            projected = seen @ A.T @ torch.linalg.inv(A @ A.T) @ A
            total = total + ((seen - projected).norm(dim=1) / seen.norm(dim=1)).mean() / 2
    return total


def lambdas(sources, updates):
    found = []
    for name in sources.modules:
        columns = torch.stack([u.delta().flatten().double() for u in sources.updates_of(name)], dim=1)
        found.append(torch.linalg.lstsq(columns, updates[name].delta().flatten().double()[:, None]).solution[:, 0])
    return torch.stack(found)


def test_the_first_step_of_nsc_goes_down_the_slope_of_what_is_outside_of_the_rows(tmp_path):
    made = two_sources(tmp_path)
    start = torch.full((2, 2), 0.5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(outside(made, start), start)
    updates = merge(made, "nsc", options={"steps": 1, "batch_size": 24, "learning_rate": 0.05}).adapter.updates
    found = lambdas(made, updates)
    # AdamW: λ (1 − 0.05 · 0.01), less the rate; the last layer's inputs hang on no λ of its own
    close(found[0], 0.5 * (1 - 0.05 * 0.01) - 0.05 * slope[0].sign())
    close(found[1], torch.full((2,), 0.5))


def test_nsc_brings_inputs_into_the_rows(tmp_path):
    made = two_sources(tmp_path)
    found = lambdas(made, merge(made, "nsc", options={"steps": 60, "learning_rate": 0.02}).adapter.updates)
    assert outside(made, found) < outside(made, torch.full((2, 2), 0.5)) - 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_nsc_of_one_layer_stays_at_the_mean_as_no_input_hangs_on_it(sources, kind):
    made = sources(kind, (2.0, -1.0))
    one, two = deltas_of(made)
    close(merged(made, "nsc", steps=3), 0.5 * (2 * one - two))
    close(merged(made, "nsc", steps=3, start=0.6), 0.3 * (2 * one - two))


# learned concatenation


def training_loss(sources, coefficients):
    total = torch.zeros(())
    for task in sources.tasks:
        delta = sum(c * d for c, d in zip(coefficients, deltas_of(sources), strict=True))
        logits, inputs = logits_of(task, delta, "train")
        total = total + cross_entropy(logits, inputs["labels"])
    return total


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_of_learned_concatenation_goes_down_the_slope_of_the_summed_loss(sources, kind, free):
    made = sources(kind, shuffle=True)
    z = (torch.full((2,), 0.5) if free else torch.zeros(2)).requires_grad_()
    (slope,) = torch.autograd.grad(training_loss(made, z if free else z.softmax(-1)), z)
    moved = z.detach() - 0.05 * slope.sign()
    found = merged(made, "cat-learned", steps=1, batch_size=24, learning_rate=0.05, free=free)
    close(torch.tensor(coefficients_of(made, found)), moved if free else moved.softmax(-1))


def test_learned_concatenation_finds_the_adapter_that_is_planted_in_the_labels(tmp_path):
    adapters = [adapter_for(tmp_path, "linear", seed) for seed in (0, 1)]
    planted = adapters[0].updates[LAYER].delta()
    made = Sources(adapters, tasks=[Tiny("linear", seed, planted=planted) for seed in (0, 1)])
    shares = coefficients_of(made, merged(made, "cat-learned", steps=80, learning_rate=0.1))
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert shares[0] > 0.8
    free = coefficients_of(made, merged(made, "cat-learned", steps=80, learning_rate=0.1, free=True))
    assert training_loss(made, free) < training_loss(made, shares) < training_loss(made, [0.5, 0.5]) - 0.01


def test_learned_concatenation_shares_out_among_those_that_change_the_module(tmp_path):
    adapters = [two_layers(tmp_path, 0, ["one", "two"]), two_layers(tmp_path, 1, ["two"])]
    made = Sources(adapters, tasks=[Two(seed=0), Two(seed=1)])
    found = merge(made, "cat-learned", options={"steps": 5}).adapter.updates["one"]
    close(found.delta(), made.updates_of("one")[0].delta())


def test_learned_concatenation_of_texts_looks_at_the_places_of_targets(tmp_path):
    made = texts(tmp_path)
    z = torch.zeros(2, requires_grad=True)
    total = torch.zeros(())
    for task in made.tasks:
        delta = sum(c * d for c, d in zip(z.softmax(-1), deltas_of(made), strict=True))
        inputs = task.split("train").inputs
        layer = task.build_model().net["lin"]
        logits = inputs["x"] @ (layer.weight + delta).T + layer.bias
        total = total + task.targets_of(logits, inputs).mean(task.targets_of(logits, inputs).loss).mean()
    (slope,) = torch.autograd.grad(total, z)
    found = coefficients_of(made, merged(made, "cat-learned", steps=1, batch_size=24, learning_rate=0.05))
    close(torch.tensor(found), (-0.05 * slope.sign()).softmax(-1))


# ZipLoRA


def by_columns(kind, delta, m):
    """ΔW with each input's contribution times its number, in the layout of the stored weight."""
    return m[:, None] * delta if kind == "gpt2" else (delta.flatten(1) * m).reshape(delta.shape)


def zip_objective(sources, kind, ms, penalty):
    total = torch.zeros(())
    deltas = deltas_of(sources)
    for i, task in enumerate(sources.tasks):
        both = sum(by_columns(kind, delta, m) for delta, m in zip(deltas, ms, strict=True))
        merged_logits, own = (logits_of(task, delta, "validation")[0] for delta in (both, deltas[i]))
        total = total + (merged_logits - own).square().mean() + penalty * (ms[0] * ms[1]).abs().mean()
    return total


def columns_of(sources, kind, found):
    """The numbers of two adapters from the merged ΔW: column by column a least squares problem of two unknowns."""
    flat = [(d.T if kind == "gpt2" else d.flatten(1)).double() for d in (*deltas_of(sources), found)]
    pairs = torch.stack(flat[:2], dim=-1).transpose(0, 1)  # [columns, rows, 2]
    return torch.linalg.lstsq(pairs, flat[2].T[..., None]).solution[..., 0].T.float()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_of_ziplora_goes_down_the_slope_of_its_objective(sources, kind):
    made = sources(kind)
    deltas = deltas_of(made)
    columns = deltas[0].shape[0] if kind == "gpt2" else deltas[0][0].numel()
    ms = [torch.ones(columns, requires_grad=True) for _ in deltas]
    slopes = torch.autograd.grad(zip_objective(made, kind, ms, 0.5), ms)
    found = merged(made, "ziplora", steps=1, batch_size=24, learning_rate=0.05, penalty=0.5)
    close(columns_of(made, kind, found), 1 - 0.05 * torch.stack(slopes).sign(), 2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_ziplora_keeps_each_tasks_outputs_better_than_the_sum(sources, kind):
    made = sources(kind)
    ms = columns_of(made, kind, merged(made, "ziplora", steps=60, learning_rate=0.05))
    ones = torch.ones_like(ms)
    assert zip_objective(made, kind, ms, 0.01) < 0.7 * zip_objective(made, kind, ones, 0.01)


def test_ziplora_multiplies_the_weights_and_leaves_one_adapter_alone(sources, tmp_path):
    alone = Sources([adapter_for(tmp_path, "linear", 0)], [1.0], tasks=[Tiny("linear", 0)])
    close(merged(alone, "ziplora", steps=3), deltas_of(alone)[0])
    made = sources("linear", (2.0, 0.0))
    close(merged(made, "ziplora", steps=1, learning_rate=1e-6), 2 * deltas_of(made)[0])


def test_ziplora_refuses_a_negative_penalty(sources):
    with pytest.raises(OptionError, match="penalty is -1; a number of at least 0 is needed"):
        merged(sources(), "ziplora", penalty=-1.0)


# all of them


@pytest.mark.parametrize("method", LEARNED)
def test_it_refuses_no_steps_and_no_rate(sources, method):
    for options in ({"steps": 0}, {"batch_size": 0}):
        with pytest.raises(OptionError, match="must be at least 1"):
            merged(sources(), method, **options)
    with pytest.raises(OptionError, match="learning_rate is -1; a number above 0 is needed"):
        merged(sources(), method, learning_rate=-1.0)


def test_an_objective_that_is_not_finite_is_told_with_its_task(sources):
    with pytest.raises(DivergedError, match="the objective on linear-0 is not finite"):
        merged(sources(), "ziplora", steps=3, learning_rate=1e30)


@pytest.mark.parametrize("method", LEARNED)
def test_how_far_it_is_is_told(sources, method):
    told = []
    merge(sources(), method, options=QUICK[method], progress=lambda *counts: told.append(counts))
    assert told[:3] == [(1, 15), (2, 15), (3, 15)]
    assert told[-1] == (1, 1)  # modules
