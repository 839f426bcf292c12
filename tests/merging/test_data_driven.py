import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from making_adapters import PREFIX, write
from planted_tasks import (
    KINDS,
    LAYER,
    LAYERS,
    QUICK,
    Net,
    Tiny,
    Two,
    adapter_for,
    close,
    coefficients_of,
    deltas_of,
    merged,
    quick,
    texts,
    two_layers,
)
from torch import nn
from torch.nn.functional import cross_entropy

from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import MismatchError, OptionError, TunerError
from lora_lab.merging.merged import merge
from lora_lab.merging.methods import MERGES
from lora_lab.merging.rules import layer_inputs
from lora_lab.merging.sources import Sources, Weights
from lora_lab.merging.validation import search as searching
from lora_lab.merging.validation.task_models import MergeModels
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.task import Split

# Fisher


def information(task, delta):
    """By definition: the mean over examples of Σ_y p(y|x) (∂ log p(y|x)/∂W)², one example and one label at a time."""
    model, split = task.build_model().double(), task.split("train")
    weight = model.net["lin"].weight
    weight += delta
    weight.requires_grad_()
    total = torch.zeros_like(delta, dtype=torch.float64)
    for x in split.inputs["x"].double():
        logs = model(x[None]).logits[0].log_softmax(-1)
        for log in logs:
            (gradient,) = torch.autograd.grad(log, weight, retain_graph=True)
            total += log.exp().detach() * gradient.square()
    return total / len(split)


def fisher_by_hand(sources, floor=1e-6):
    deltas = deltas_of(sources)
    each = torch.stack([information(task, d) for task, d in zip(sources.tasks, deltas, strict=True)])
    each += floor * each.mean()
    each *= torch.tensor(sources.weights_of(LAYER)).reshape(-1, *[1] * (each.ndim - 1))
    return (each * torch.stack(deltas)).sum(0) / each.sum(0)


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_is_the_mean_weighted_by_the_information_of_each_task(sources, kind):
    made = sources(kind, (1.0, 0.4))
    close(merged(made, "fisher"), fisher_by_hand(made))


def test_normalised_fisher_weighs_by_information_of_norm_one(sources):
    made = sources("linear")
    deltas = deltas_of(made)
    each = [information(task, delta) for task, delta in zip(made.tasks, deltas, strict=True)]
    each = torch.stack([one / one.norm() for one in each])
    wanted = (each * torch.stack(deltas)).sum(0) / each.sum(0)
    close(merged(made, "fisher", normalize=True, floor=0), wanted)
    assert (merged(made, "fisher", floor=0).double() - wanted).norm() > 1e-2


def test_fisher_of_a_linear_softmax_is_the_closed_form(sources):
    made = sources()
    task, delta = made.tasks[0], deltas_of(made)[0]
    x = task.split("train").inputs["x"].double()
    model = task.build_model().double()
    model.net["lin"].weight += delta
    p = model(x).logits.softmax(-1)
    # E_y (1[k = y] - p_k)² x_j² = p_k (1 - p_k) x_j²
    close(information(task, delta), torch.einsum("nk,nj->kj", p * (1 - p), x.square()) / len(x), 1e-10)


def chances(task, delta, split):
    """What is told from and with which chances, at the places before targets: [targets, in], [targets, 3]."""
    inputs = task.split(split).inputs
    x = inputs["x"][:, :-1][inputs["labels"][:, 1:] != -100]
    model = task.build_model()
    model.net["lin"].weight = nn.Parameter(model.net["lin"].weight + delta)
    return x.double(), model(x).logits.double().softmax(-1)


def test_fisher_of_texts_is_right_on_average_over_what_it_draws(tmp_path):
    made = texts(tmp_path, examples=6)
    x, p = chances(made.tasks[0], deltas_of(made)[0], "train")
    exact = torch.einsum("nk,nj->kj", p * (1 - p), x.square()) / 6
    models = MergeModels(made)
    drawn = torch.stack([layer_inputs.information(models, 0, 6, seed)[LAYER] for seed in range(900)]).double()
    error = drawn.std(0) / 900**0.5
    assert ((drawn.mean(0) - exact).abs() < 4 * error).all()
    assert (error < 0.3 * exact).all()
    assert not torch.equal(merged(made, "fisher", seed=0), merged(made, "fisher", seed=1))
    assert torch.equal(merged(made, "fisher", seed=0), merged(texts(tmp_path, examples=6), "fisher", seed=0))


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_of_equal_adapters_is_the_adapter(sources, kind):
    made = sources(kind, (0.3, 2.0), seeds=(0, 0))
    close(merged(made, "fisher"), deltas_of(made)[0])


def test_fisher_of_a_deep_layer_and_of_one_before_it_are_of_one_backward_pass(tmp_path):
    made = Sources([two_layers(tmp_path, seed, ["one", "two"]) for seed in (0, 1)], tasks=[Two(seed=0), Two(seed=1)])
    found = merge(made, "fisher", options={"floor": 0.0}).adapter.updates
    each = []
    for i, task in enumerate(made.tasks):
        model = task.build_model().double()
        for name in made.modules:
            model.get_submodule(name).weight += made.updates_of(name)[i].delta()
        weights = [model.get_submodule(name).weight.requires_grad_() for name in made.modules]
        total = [torch.zeros_like(weight) for weight in weights]
        for x in task.split("train").inputs["x"].double():
            for log in model.two(model.one(x).tanh()).log_softmax(-1):
                slopes = torch.autograd.grad(log, weights, retain_graph=True)
                total = [t + log.exp().detach() * slope.square() for t, slope in zip(total, slopes, strict=True)]
        each.append(total)
    for m, name in enumerate(made.modules):
        deltas = [update.delta() for update in made.updates_of(name)]
        close(found[name].delta(), (each[0][m] * deltas[0] + each[1][m] * deltas[1]) / (each[0][m] + each[1][m]))


def test_equal_information_gives_the_average(tmp_path):
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    task = Tiny("linear", x=x)
    first = adapter_for(tmp_path, "linear", 0)
    A, B = list(first.tensors)
    same = torch.ones(3, 1)  # added to all logits, it changes no chance
    shift = {**first.tensors, A: torch.cat([first.tensors[A], torch.ones(1, 4)])}
    shift[B] = torch.cat([first.tensors[B], same], dim=1)
    second = Adapter.load(write(tmp_path / "shifted", shift, r=3, lora_alpha=6, target_modules=["lin"]))
    made = Sources([first, second], [1.0, 3.0], tasks=[task, task])
    a, b = deltas_of(made)
    close(b - a, 2 * torch.ones(3, 4))
    close(merged(made, "fisher"), 0.25 * a + 0.75 * b)


def test_fisher_averages_what_no_task_depends_on(tmp_path):
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 0
    adapters = [adapter_for(tmp_path, "linear", seed) for seed in (0, 1)]
    made = Sources(adapters, [1.0, 3.0], tasks=[Tiny("linear", seed, x=x) for seed in (0, 1)])
    a, b = deltas_of(made)
    close(merged(made, "fisher")[:, 1], (0.25 * a + 0.75 * b)[:, 1])
    close(merged(made, "fisher", floor=1e9), 0.25 * a + 0.75 * b)


# RegMean


def outputs(task, delta):
    """What the layer's inputs make of ΔW alone, in float64 and differentiable in ΔW."""
    layer = task.build_model().double().net["lin"]
    x = task.split("train").inputs["x"].double()
    zero = dict.fromkeys(["bias"], torch.zeros_like(layer.bias))
    return torch.func.functional_call(layer, {"weight": delta, **zero}, (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_regmean_is_where_the_squared_distance_of_all_outputs_has_no_slope(sources, kind):
    made = sources(kind, (1.0, 0.4), examples=60)
    found = merged(made, "regmean", off_diagonal=1.0, ridge=1e-12).double()
    deltas = [delta.double() for delta in deltas_of(made)]

    def distance(W):
        each = [
            w * (outputs(task, W) - outputs(task, delta)).square().sum()
            for task, delta, w in zip(made.tasks, deltas, made.weights_of(LAYER), strict=True)
        ]
        return sum(each)

    def slope(W):
        W = W.clone().requires_grad_()
        return torch.autograd.grad(distance(W), W)[0].norm()

    average = (deltas[0] + 0.4 * deltas[1]) / 1.4
    assert distance(found) < distance(average)
    assert slope(found) < 1e-5 * slope(average)


def test_regmean_is_the_least_squares_solution(sources):
    made = sources("linear", (1.0, 0.4), examples=60)
    X = [task.split("train").inputs["x"].double() for task in made.tasks]
    parts = [
        (math.sqrt(w) * x, math.sqrt(w) * x @ delta.T.double())
        for x, w, delta in zip(X, made.weights_of(LAYER), deltas_of(made), strict=True)
    ]
    wanted = torch.linalg.lstsq(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])).solution.T
    close(merged(made, "regmean", off_diagonal=1.0, ridge=1e-12), wanted, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
def test_regmean_of_equal_inputs_is_the_average(sources, kind, off_diagonal):
    made = sources(kind, (1.0, 3.0), inputs=(0, 0), examples=60)
    a, b = deltas_of(made)
    close(merged(made, "regmean", off_diagonal=off_diagonal), 0.25 * a + 0.75 * b)


def test_regmean_without_off_diagonals_weighs_columns_by_the_size_of_their_inputs(sources):
    made = sources("linear", (1.0, 0.4))
    sizes = [task.split("train").inputs["x"].double().square().sum(0) for task in made.tasks]
    shares = torch.stack([w * size for w, size in zip(made.weights_of(LAYER), sizes, strict=True)])
    wanted = (shares[:, None] * torch.stack(deltas_of(made))).sum(0) / shares.sum(0)
    close(merged(made, "regmean", off_diagonal=0.0, ridge=1e-12), wanted, 1e-5)


def test_regmean_averages_directions_that_no_task_uses(tmp_path):
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 0
    adapters = [adapter_for(tmp_path, "linear", seed) for seed in (0, 1)]
    made = Sources(adapters, [1.0, 3.0], tasks=[Tiny("linear", seed, x=x) for seed in (0, 1)])
    a, b = deltas_of(made)
    close(merged(made, "regmean", off_diagonal=1.0)[:, 1], (0.25 * a + 0.75 * b)[:, 1])


def test_regmean_stays_in_factor_space(sources):
    update = merge(sources("linear", examples=60), "regmean").adapter.updates[LAYER]
    assert update.rank == 3  # four, which a layer of three outputs cannot have
    wide = dict(MERGES["regmean"](sources("linear", examples=60)))[LAYER]
    assert wide.rank == 4


class Padded(Tiny):
    """Texts of some words, padded with a token of huge inputs; an example is told from the mean over its words."""

    def __init__(self, seed, words, *, batch_size=32, examples=24):
        super().__init__("tokens", seed, examples=examples)
        self.words, self.batch_size = words, batch_size

    def build_model(self):
        model = super().build_model()
        table = torch.randn(20, 4, generator=torch.Generator().manual_seed(3))
        table[0] = 100.0

        def forward(input_ids, attention_mask):
            share = attention_mask[..., None].float()
            out = model.net["lin"](table[input_ids])
            return SimpleNamespace(logits=(out * share).sum(1) / share.sum(1))

        model.table, model.forward = table, forward
        return model

    def _load(self, split):
        generator = torch.Generator().manual_seed(2 * self.seed + (split == "train"))
        lengths = torch.randint(*self.words, (self.examples,), generator=generator)
        mask = torch.arange(self.words[1])[None] < lengths[:, None]
        ids = torch.randint(1, 20, mask.shape, generator=generator) * mask
        labels = torch.arange(self.examples) % 3
        return Split({"input_ids": ids, "attention_mask": mask.long(), "labels": labels})


def of_texts(tmp_path, tasks):
    return Sources([adapter_for(tmp_path, "tokens", seed) for seed in (0, 1)], tasks=tasks)


@pytest.mark.parametrize("gram", ["mean", "sum"])
def test_regmean_of_texts_is_the_closed_form_over_words_without_padding(tmp_path, gram):
    made = of_texts(tmp_path, [Padded(0, (2, 6)), Padded(1, (9, 20))])
    sizes = []
    for task in made.tasks:
        inputs = task.split("train").inputs
        words = task.build_model().table[inputs["input_ids"][inputs["attention_mask"].bool()]].double()
        sizes.append(words.square().mean(0) if gram == "mean" else words.square().sum(0))
    shares = torch.stack(sizes) / sum(sizes)
    wanted = (shares[:, None] * torch.stack(deltas_of(made))).sum(0)
    close(merged(made, "regmean", off_diagonal=0.0, ridge=1e-12, gram=gram), wanted, 1e-5)


def test_regmean_hangs_neither_on_the_length_of_texts_nor_on_the_size_of_batches(tmp_path):
    short, long = (3, 4), (40, 41)
    found = [
        merged(of_texts(tmp_path, [Padded(0, short, batch_size=size), Padded(1, long, batch_size=size)]), "regmean")
        for size in (1, 7, 32)
    ]
    for other in found[1:]:
        close(other, found[0], 1e-5)
    made = of_texts(tmp_path, [Padded(0, short, examples=200), Padded(1, long, examples=200)])
    a, b = (delta.double() for delta in deltas_of(made))
    merge_ = merged(made, "regmean", off_diagonal=0.0).double()
    share = float(((merge_ - b) * (a - b)).sum() / (a - b).square().sum())
    assert share == pytest.approx(0.5, abs=0.05)  # words of both are drawn alike


def test_options_that_are_filled_up_and_texts_of_the_model_itself_are_known_by_their_masks():
    mask, targets = torch.ones(2, 3, 4), torch.full((2, 3, 4), 5)
    targets[0, 2], mask[:, :, 3] = -100, 0
    model = nn.Module()
    model.register_buffer("prompt_attention_mask", torch.tensor([[1, 1, 0]]))
    masks = layer_inputs.masks_of(model, {"attention_mask": mask, "targets": targets})
    assert [int(m.sum()) for m in masks] == [15, 2]
    for shape, count in (((6, 4, 5), 15), ((24, 1, 5), 15), ((1, 3, 5), 2), ((6, 3, 5), 18)):
        assert layer_inputs.unpadded(torch.zeros(shape), masks).shape == (count, 5)


def test_an_unknown_gram_is_refused(sources):
    with pytest.raises(OptionError, match="unknown gram 'median'"):
        merged(sources(), "regmean", gram="median")


def test_an_off_diagonal_that_is_no_share_is_refused(sources):
    with pytest.raises(OptionError, match=r"off_diagonal is 1\.5; a share from 0 to 1"):
        merged(sources(), "regmean", off_diagonal=1.5)


def test_regmean_of_weights_that_are_all_zero_is_refused(sources):
    with pytest.raises(OptionError):
        merged(sources("linear", (0.0, 0.0)), "regmean")


# LoraHub


def objective(sources, coefficients, penalty=0.05):
    """The mean validation loss of Σ cᵢ ΔWᵢ, scored on models of its own, plus the penalty."""
    adapters = [replace(adapter, config={**adapter.config}) for adapter in sources.adapters]
    mixed = Sources(adapters, list(coefficients), tasks=sources.tasks)
    made = merge(mixed, "task-arithmetic").adapter
    losses = [score(task, made, "validation").mean_loss for task in sources.tasks]
    return sum(losses) / len(losses) + penalty * sum(map(abs, coefficients)) / len(coefficients)


def test_lorahub_does_better_on_validation_data_than_its_start(sources):
    made = sources(planted=3.0 * torch.eye(3, 4))
    found = coefficients_of(made, merged(made, "lorahub"))
    assert objective(made, found) < objective(made, [0.5, 0.5]) - 0.05
    assert max(map(abs, found)) <= 1.5 + 1e-6
    for nearby in ([0.1, 0], [-0.1, 0], [0, 0.1], [0, -0.1]):
        near = [c + d for c, d in zip(found, nearby, strict=True)]
        if max(map(abs, near)) <= 1.5:
            assert objective(made, near) > objective(made, found) - 1e-4


def test_lorahub_keeps_its_coefficients_within_the_bound(sources):
    made = sources(planted=None)
    found = coefficients_of(made, merged(made, "lorahub", bound=0.2))
    assert max(map(abs, found)) <= 0.2 + 1e-6


def test_a_larger_penalty_gives_smaller_coefficients(sources):
    made = sources(planted=3.0 * torch.eye(3, 4))
    small, large = (coefficients_of(made, merged(made, "lorahub", penalty=penalty)) for penalty in (0.0, 5.0))
    assert sum(map(abs, large)) < sum(map(abs, small))


def test_lorahub_multiplies_the_weights(sources):
    made = sources("linear", (1.0, 0.0))
    found = coefficients_of(made, merged(made, "lorahub"))
    assert abs(found[1]) < 1e-6
    assert abs(found[0]) > 1e-3


def test_lorahub_mixes_at_most_as_often_as_it_may(sources, monkeypatch):
    from lora_lab.merging.validation.task_models import MergeModels

    asked, scores = [], MergeModels.scores
    monkeypatch.setattr(
        MergeModels, "scores", lambda self, index, *rest: (asked.append(index), scores(self, index, *rest))[1]
    )
    merged(sources(), "lorahub", evaluations=9)
    assert asked == [0, 1] * 9


def test_lorahub_mixes_at_most_as_often_as_it_may_when_that_is_rarely(sources):
    made = sources()
    close(torch.tensor(coefficients_of(made, merged(made, "lorahub", evaluations=1))), torch.tensor([0.5, 0.5]))


def test_lorahub_refuses_no_evaluations_and_no_bound(sources):
    for options in ({"evaluations": 0}, {"bound": 0.0}):
        with pytest.raises(OptionError, match="must be above 0"):
            merged(sources(), "lorahub", **options)


# all of them


@pytest.mark.parametrize("method", [name for name in MERGES if MERGES[name].reads_data])
def test_labels_are_looked_at_where_the_entry_says_so_alone(sources, method):
    same = torch.equal(quick(sources(), method), quick(sources(shuffle=True), method))
    assert same == (MERGES[method].data == "inputs")


@pytest.mark.parametrize("method", [name for name in MERGES if MERGES[name].reads_data])
def test_the_test_split_is_never_read(sources, method):
    made = sources()
    quick(made, method)
    assert all("test" not in task._splits for task in made.tasks)
    with pytest.raises(AssertionError, match="the test split was read"):
        made.tasks[0].split("test")


@pytest.mark.parametrize("method", [name for name in MERGES if MERGES[name].reads_data])
def test_one_answer_whatever_the_global_random_state(sources, method):
    torch.manual_seed(1)
    first = quick(sources(), method)
    torch.manual_seed(2)
    assert torch.equal(first, quick(sources(), method))


@pytest.mark.parametrize(
    ("method", "few"),
    [
        ("fisher", {"examples": 5}),
        ("regmean", {"examples": 8}),
        *((name, {"batch_size": 3}) for name in ("adamerging", "ziplora", "cat-learned")),
    ],
)
def test_a_seed_draws_the_examples(sources, method, few):
    made = sources()
    zero = quick(made, method, seed=0, **few)
    assert torch.equal(zero, quick(sources(), method, seed=0, **few))
    assert not torch.equal(zero, quick(made, method, seed=1, **few))


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_an_adapter_of_weight_0_is_left_out(sources, method):
    made = sources("linear", (2.0, 0.0), examples=60)
    close(quick(made, method), deltas_of(made)[0])


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_weights_count_by_their_ratio(sources, method):
    a, b, c = (merged(sources("linear", weights), method) for weights in ((1.0, 3.0), (2.0, 6.0), (3.0, 1.0)))
    close(a, b)
    assert float((a - c).norm()) > 0.1


def test_weights_can_differ_between_modules(sources):
    made = sources("linear", Weights((1.0, 0.0), {"lin": (0.0, 1.0)}))
    close(merged(made, "fisher"), deltas_of(made)[1])


@pytest.mark.parametrize("method", [name for name in MERGES if MERGES[name].reads_data])
def test_scale_multiplies_the_result(sources, method):
    close(quick(sources(), method, scale=-0.5), -0.5 * quick(sources(), method), 1e-5)


@pytest.mark.parametrize("method", [name for name in MERGES if MERGES[name].reads_data])
def test_an_adapter_may_leave_a_module_alone(tmp_path, method):
    adapters = [two_layers(tmp_path, 0, ["one", "two"]), two_layers(tmp_path, 1, ["two"])]
    made = Sources(adapters, tasks=[Two(seed=0), Two(seed=1)])
    updates = merge(made, method, options=QUICK[method], exact=True).adapter.updates
    assert list(updates) == ["one", "two"]
    only, found = made.updates_of("one")[0].delta(), updates["one"].delta()
    if method in ("lorahub", "adamerging", "nsc", "cat-learned"):  # a multiple of the only one
        close(found, only * float((only * found).sum() / only.square().sum()))
    elif method == "regmean":  # both see the same kind of input, and the other one's ΔW is 0
        assert 0.2 < float((only * found).sum() / only.square().sum()) < 0.8
    elif method == "ziplora":  # a multiple of every column
        shares = found / only
        close(shares, shares[:1].expand_as(shares))
    else:  # entry by entry a share
        assert bool(((found / only) > 0).all() & ((found / only) < 1).all())


@pytest.mark.parametrize("method", [name for name in MERGES if MERGES[name].reads_data])
def test_without_tasks_it_is_said_what_is_missing(tmp_path, method):
    with pytest.raises(OptionError, match="the adapters' own tasks, or `task`, are needed"):
        merge(Sources([adapter_for(tmp_path, "linear", 0)]), method)


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_a_layer_that_is_used_twice_in_a_pass_is_refused_by_name(sources, method):
    with pytest.raises(TunerError, match=r"net.lin is used several times in one pass"):
        merged(sources(twice=True), method)


@pytest.mark.parametrize("method", ["fisher", "regmean"])
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(2, 2, 3, padding="same"), nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")]
)
def test_convolutions_that_unfold_differently_are_refused(tmp_path, method, layer, monkeypatch):
    monkeypatch.setitem(LAYERS, "odd", (lambda: layer, (2, 4, 5), (2, 3, 3), (1, 1)))
    tensors = {
        f"{PREFIX}{LAYER}.lora_A.weight": torch.randn(2, 2, 3, 3),
        f"{PREFIX}{LAYER}.lora_B.weight": torch.randn(2, 2, 1, 1),
    }
    adapter = Adapter.load(write(tmp_path / "odd", tensors, target_modules=["lin"]))
    with pytest.raises(TunerError, match="inputs of plain convolutions only"):
        merged(Sources([adapter], tasks=[Tiny("odd", x=torch.randn(8, 2, 4, 5))]), method)


@pytest.mark.parametrize("method", [name for name in MERGES if MERGES[name].reads_data])
def test_the_models_of_one_merge_leave_no_trace_in_the_next(sources, method):
    made = sources()
    first = quick(made, method)
    quick(sources("linear", seeds=(2, 3)), method)
    assert torch.equal(first, quick(made, method))


def test_the_cost_is_known_beforehand():
    tasks = [Tiny(seed=0), Tiny(seed=1)]
    assert MERGES["fisher"].examples_read({"examples": 10}, tasks) == 2 * 10 * (1 + 3 * 3)
    assert MERGES["regmean"].examples_read({"examples": 10}, tasks) == 20
    assert MERGES["lorahub"].examples_read({"evaluations": 5}, tasks) == 5 * 2 * 24
    for method, passes in (("adamerging", 3), ("nsc", 3), ("cat-learned", 3), ("ziplora", 4)):
        assert MERGES[method].examples_read({"steps": 7, "batch_size": 4}, tasks) == passes * 7 * 4 * 2


# searches


class Planted(Tiny):
    """Two labels and two halves of examples: one is right above a coefficient of 0.6, the other below 1."""

    labels = 2
    best = 0.8

    def __init__(self):
        super().__init__("linear")
        self.name = "planted"

    def build_model(self):
        layer = nn.Linear(2, 2)
        nn.init.zeros_(layer.bias)
        layer.weight.data = torch.tensor([[0.0, 0.0], [0.0, 10.0]])
        return Net(layer).requires_grad_(False).eval()

    def _load(self, split):
        assert split == "validation", f"the {split} split was read"
        x = torch.tensor([[1.0, -0.6], [-1.0, 1.0]]).repeat(6, 1)
        return Split({"x": x, "labels": torch.ones(12, dtype=torch.long)})


@pytest.fixture
def planted(tmp_path):
    """Two adapters that add up to one unit of the direction that is searched."""
    adapters = []
    for name, share in (("a", 0.25), ("b", 0.75)):
        tensors = {
            f"{PREFIX}{LAYER}.lora_A.weight": torch.tensor([[10.0 * share, 0.0]]),
            f"{PREFIX}{LAYER}.lora_B.weight": torch.tensor([[0.0], [1.0]]),
        }
        adapters.append(Adapter.load(write(tmp_path / name, tensors, r=1, lora_alpha=1, target_modules=["lin"])))
    task = Planted()
    return Sources(adapters, tasks=[task, task])


def loss_at(coefficient):
    z = torch.tensor([coefficient - 0.6, 1.0 - coefficient], dtype=torch.float64) * 10
    return float(cross_entropy(torch.stack([torch.zeros(2), z], dim=1), torch.ones(2, dtype=torch.long)))


def test_a_grid_finds_the_coefficient_and_all_trials_are_kept(planted):
    found = searching.search(planted, "task-arithmetic", {"coefficient": searching.Grid((0.5, 0.8, 0.9, 2))})
    assert (found.coefficient, found.options) == (0.8, {})
    assert [trial["coefficient"] for trial in found.trials] == [0.5, 0.8, 0.9, 2.0]
    assert [trial["accuracy"] for trial in found.trials] == [0.5, 1.0, 1.0, 0.5]
    for trial in found.trials:
        assert trial["loss"] == pytest.approx(loss_at(trial["coefficient"]), rel=1e-5)


def test_accuracy_counts_before_the_loss(planted, monkeypatch):
    # three examples are right above 0.6, one is right below 0.125 and very wrong beyond
    x = torch.tensor([[1.0, -0.6]] * 3 + [[-8.0, 1.0]])
    labels = torch.ones(4, dtype=torch.long)
    monkeypatch.setattr(Planted, "_load", lambda self, split: Split({"x": x, "labels": labels}))
    found = searching.search(planted, "task-arithmetic", {"coefficient": searching.Grid((0.1, 0.65))})
    assert [trial["accuracy"] for trial in found.trials] == [0.25, 0.75]
    assert found.trials[0]["loss"] < found.trials[1]["loss"]
    assert found.coefficient == 0.65


def test_an_interval_finds_the_coefficient_with_few_trials(planted):
    found = searching.search(planted, "task-arithmetic", {"coefficient": searching.Interval(0.1, 2)})
    assert found.coefficient == pytest.approx(Planted.best, abs=0.005 * 1.9)
    assert 3 < len(found.trials) <= 25
    assert all(0.1 <= trial["coefficient"] <= 2 for trial in found.trials)
    lowest = min(found.trials, key=lambda trial: trial["loss"])
    assert lowest["coefficient"] == found.coefficient


def test_options_are_tried_in_all_combinations_with_the_coefficient(planted):
    given = {"scale": (0.5, 2.0), "density": (0.25, 1.0), "coefficient": (0.4, 1.6, 9.0)}
    spaces = {name: searching.Grid(values) for name, values in given.items()}
    seen = []
    found = searching.search(planted, "ties", spaces, on=Execution(progress=lambda *done: seen.append(done)))
    tried = [(t["scale"], t["density"], t["coefficient"]) for t in found.trials]
    assert tried == list(itertools.product(*given.values()))
    assert seen == [(i + 1, 12) for i in range(12)]
    # ties takes the mean of 2.5 and 7.5, half of what their sum is
    assert found.options["scale"] * found.coefficient / 2 == pytest.approx(0.4)
    assert set(found.options) == {"scale", "density"}


def test_options_beside_the_search_are_kept_and_the_given_coefficient_is_tried(planted):
    spaces = {"scale": searching.Grid((0.5, 1, 4))}
    found = searching.search(planted, "task-arithmetic", spaces, coefficient=0.8)
    assert (found.options, found.coefficient) == ({"scale": 1.0}, 0.8)
    found = searching.search(
        planted, "task-arithmetic", {"coefficient": searching.Grid((0.4, 0.8))}, options={"scale": 2.0}
    )
    assert (found.options, found.coefficient) == ({"scale": 2.0}, 0.4)


def test_equal_tasks_are_scored_once_a_trial(planted, monkeypatch):
    asked, judge = [], Planted.judge
    monkeypatch.setattr(Planted, "judge", lambda self, *rest, **more: (asked.append(1), judge(self, *rest, **more))[1])
    searching.search(planted, "average", {"coefficient": searching.Grid((1, 2, 3))})
    assert len(asked) == 3


def test_the_cost_of_a_search_is_told_first_from_one_timed_batch(planted, monkeypatch):
    asked, costs, judge = [], [], Planted.judge
    monkeypatch.setattr(Planted, "batch_size", 1)
    monkeypatch.setattr(Planted, "judge", lambda self, *rest, **more: (asked.append(1), judge(self, *rest, **more))[1])

    def confirm(cost):
        costs.append(cost)
        raise KeyboardInterrupt

    spaces = {"scale": searching.Grid((1, 2)), "coefficient": searching.Grid((1, 2, 3))}
    with pytest.raises(KeyboardInterrupt):
        searching.search(planted, "average", spaces, on=Execution(confirm=confirm))
    assert len(asked) <= 6  # of one batch of the twelve
    assert costs[0].variants == 6
    assert costs[0].seconds > 0


def test_what_a_search_found_is_what_the_merge_makes(planted):
    found = searching.search(planted, "task-arithmetic", {"coefficient": searching.Interval(0.1, 2)})
    made = merge(planted, "task-arithmetic", options=found.options, coefficient=found.coefficient, trials=found.trials)
    best = min(found.trials, key=lambda trial: trial["loss"])
    assert score(Planted(), made.adapter, "validation").mean_loss == pytest.approx(best["loss"], rel=1e-6)
    assert made.adapter.record["merge"]["trials"] == found.trials


@pytest.mark.parametrize(("low", "high"), [(2, 1), (1, 1), (math.nan, 1), (0, math.inf)])
def test_an_interval_that_is_none_is_refused(low, high):
    with pytest.raises(OptionError, match="must be finite, the lower one below the other"):
        searching.Interval(low, high)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_finite_numbers_are_refused(value):
    with pytest.raises(OptionError, match="finite numbers are needed"):
        searching.Grid((1, value))


def test_a_value_that_the_method_refuses_is_refused_in_a_search(planted):
    with pytest.raises(OptionError, match="density is 2; a share"):
        searching.search(planted, "ties", {"density": searching.Grid((2,))})


def test_a_search_without_tasks_says_what_is_missing(tmp_path):
    with pytest.raises(OptionError, match="or `task`, are needed"):
        searching.search(Sources([adapter_for(tmp_path, "linear", 0)]), "average", {})


def test_models_refuse_an_adapter_of_another_base(tmp_path):
    tensors = {f"{PREFIX}else.lora_A.weight": torch.ones(2, 4), f"{PREFIX}else.lora_B.weight": torch.ones(3, 2)}
    other = Adapter.load(write(tmp_path / "other", tensors, target_modules=["else"]))
    for method in [name for name in MERGES if MERGES[name].reads_data]:
        with pytest.raises(MismatchError, match="no module else"):
            merge(Sources([other], tasks=[Tiny()]), method)
