"""LyCORIS' files: ΔW against dense formulas and against PEFT's layers, and what is refused by name.

The formulas are those of the package lycoris-lora (4.1), whose own modules gave the same ΔW when this was written.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from lora_lab import Adapter, inspect, merge
from lora_lab.errors import AdapterError, LoraLabWarning, TunerError
from lora_lab.pruning.ranks import prune_rank
from tests.adapters.test_kohya import CONV, FULL, TEXT, UNET, load, one, pair, problems, random

ROWS, COLUMNS = 12, 8


def loha(name=UNET, rank=2, rows=ROWS, columns=COLUMNS, alpha=1.0, kernel=(), core=False, seed=0):
    size = torch.Size(kernel).numel()
    parts = {}
    for i in (1, 2):
        if core:
            parts[f"hada_w{i}_a"] = random(rank, rows, seed=seed + 10 * i)
            parts[f"hada_w{i}_b"] = random(rank, columns, seed=seed + 10 * i + 1)
            parts[f"hada_t{i}"] = random(rank, rank, *kernel, seed=seed + 10 * i + 2)
        else:
            parts[f"hada_w{i}_a"] = random(rows, rank, seed=seed + 10 * i)
            parts[f"hada_w{i}_b"] = random(rank, columns * size, seed=seed + 10 * i + 1)
    return named(name, parts, alpha)


def named(name, parts, alpha=None):
    tensors = {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.tensor(float(alpha))}


def parts_of(tensors):
    return {key.partition(".")[2]: tensor for key, tensor in tensors.items()}


def dense_loha(tensors, shape):
    p = parts_of(tensors)
    products = []
    for i in (1, 2):
        a, b, t = p[f"hada_w{i}_a"], p[f"hada_w{i}_b"], p.get(f"hada_t{i}")
        products.append(a @ b if t is None else torch.einsum("ijk,jc,ir->rck", t.flatten(2), b, a))
    return (products[0].reshape(shape) * products[1].reshape(shape)) * p["alpha"] / len(p["hada_w1_b"])


def lokr(name=UNET, *, first=(3, 2), second=(4, 4), kernel=(), ranks=(None, 2), core=False, alpha=1.0, seed=0):
    """W1 [3, 2] and W2 [4, 4 (, kernel)], each whole or of a rank."""
    parts = {}
    size = torch.Size(kernel).numel()
    for i, (rows, columns), rank in ((1, first, ranks[0]), (2, second, ranks[1])):
        if rank is None:
            parts[f"lokr_w{i}"] = random(rows, columns, *(kernel if i == 2 else ()), seed=seed + i)
        elif core and i == 2:
            parts["lokr_w2_a"], parts["lokr_w2_b"] = random(rank, rows, seed=seed), random(rank, columns, seed=seed + 5)
            parts["lokr_t2"] = random(rank, rank, *kernel, seed=seed + 7)
        else:
            parts[f"lokr_w{i}_a"] = random(rows, rank, seed=seed + 3 * i)
            parts[f"lokr_w{i}_b"] = random(rank, columns * (size if i == 2 else 1), seed=seed + 4 * i)
    return named(name, parts, alpha)


def dense_lokr(tensors, kernel=()):
    p = parts_of(tensors)
    w1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    if "lokr_w2" in p:
        w2 = p["lokr_w2"]
    elif "lokr_t2" in p:
        w2 = torch.einsum("ijk,ir,jc->rck", p["lokr_t2"].flatten(2), p["lokr_w2_a"], p["lokr_w2_b"])
    else:
        w2 = p["lokr_w2_a"] @ p["lokr_w2_b"]
    w2 = w2.reshape(len(p["lokr_w2"]) if "lokr_w2" in p else 4, 4, *kernel)
    rank = next((len(p[key]) for key in ("lokr_w2_b", "lokr_w1_b") if key in p), None)
    scale = 1.0 if rank is None else float(p["alpha"]) / rank
    return scale * torch.kron(w1.reshape(*w1.shape, *[1] * len(kernel)), w2)


def in_peft(folder, adapter, layer, name):
    """The change that PEFT makes to the layer with this adapter."""
    adapter.save(folder / "peft", format="peft")
    path = FULL[name].split(".")[1:]
    inner = model = nn.ModuleDict({})
    for part in path[:-1]:
        inner[part] = nn.ModuleDict({})
        inner = inner[part]
    inner[path[-1]] = layer
    before = layer.weight.detach().clone()
    merged = PeftModel.from_pretrained(model, folder / "peft" / FULL[name].split(".")[0]).merge_and_unload()
    return merged.get_submodule(".".join(path)).weight.detach() - before


SHAPES = {(): nn.Linear, (1, 1): nn.Conv2d, (3, 3): nn.Conv2d}


@pytest.mark.parametrize(("kernel", "core"), [((), False), ((3, 3), False), ((3, 3), True)])
def test_loha_is_the_product_of_two_products_and_peft_gives_the_same(tmp_path, kernel, core):
    name = CONV if kernel else UNET
    tensors = loha(name, kernel=kernel, core=core, alpha=3.0)
    adapter = load(tmp_path, tensors)
    wanted = dense_loha(tensors, (ROWS, COLUMNS, *kernel))
    assert adapter.tuner == "LOHA"
    assert one(adapter).shape == wanted.shape
    assert one(adapter).rank == 4
    torch.testing.assert_close(one(adapter).delta(), wanted)
    layer = nn.Conv2d(COLUMNS, ROWS, kernel, bias=False) if kernel else nn.Linear(COLUMNS, ROWS, bias=False)
    torch.testing.assert_close(in_peft(tmp_path, adapter, layer, name), wanted)


LOKRS = [
    {},
    {"ranks": (1, 1)},
    {"ranks": (None, None)},
    {"ranks": (None, None), "alpha": 7.0},
    {"ranks": (None, 1), "kernel": (3, 3)},
    {"ranks": (None, None), "kernel": (3, 3)},
    {"ranks": (None, 1), "kernel": (3, 3), "core": True},
]


@pytest.mark.parametrize("options", LOKRS)
def test_lokr_is_a_kronecker_product_and_peft_gives_the_same(tmp_path, options):
    """Of two whole matrices alpha is not used. Sizes are those that PEFT splits 12 and 8 into."""
    kernel = options.get("kernel", ())
    name = CONV if kernel else UNET
    tensors = lokr(name, first=(3, 2), second=(4, 4), **{"ranks": (None, 1), **options})
    adapter = load(tmp_path, tensors)
    wanted = dense_lokr(tensors, kernel)
    assert adapter.tuner == "LOKR"
    assert one(adapter).shape == wanted.shape == (12, 8, *kernel)
    torch.testing.assert_close(one(adapter).delta(), wanted)
    layer = nn.Conv2d(8, 12, kernel, bias=False) if kernel else nn.Linear(8, 12, bias=False)
    torch.testing.assert_close(in_peft(tmp_path, adapter, layer, name), wanted)


def test_sizes_are_split_as_in_peft():
    from peft.tuners.lokr.layer import factorization

    from lora_lab.adapters.formats.lycoris import _split

    for size in range(1, 200):
        for factor in (-1, *range(1, 20)):
            assert _split(size, factor) == factorization(size, factor), (size, factor)


def test_matrices_that_peft_splits_in_no_such_way_are_told(tmp_path):
    tensors = lokr(first=(4, 2), second=(3, 4), ranks=(None, None))
    with pytest.warns(LoraLabWarning, match="split in a way that PEFT's LoKr layers are not"):
        adapter = load(tmp_path, tensors)
    wanted = torch.kron(tensors[f"{UNET}.lokr_w1"], tensors[f"{UNET}.lokr_w2"])
    torch.testing.assert_close(one(adapter).delta(), wanted)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 6)] * 4),
    ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 1000),
    alpha=st.floats(0.25, 8),
)
def test_products_are_exact_at_every_rank(sizes, ranks, seed, alpha):
    """Also where the rank of the products exceeds that of any matrix of their size."""
    from lora_lab.adapters.formats import products

    rows, columns, more_rows, more_columns = sizes
    draw = [
        random(*shape, seed=seed + i).double()
        for i, shape in enumerate([(rows, ranks[0]), (ranks[0], columns), (rows, ranks[1]), (ranks[1], columns)])
    ]
    update = products.loha(dict(zip(products.LOHA, draw, strict=False)), alpha, "x")
    torch.testing.assert_close(update.delta(), alpha * (draw[0] @ draw[1]) * (draw[2] @ draw[3]))
    assert update.rank <= min(rows, columns)
    other = [random(more_rows, ranks[1], seed=seed).double(), random(ranks[1], more_columns, seed=seed).double()]
    names = ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")
    update = products.lokr(dict(zip(names, [*draw[:2], *other], strict=True)), alpha, "x")
    torch.testing.assert_close(update.delta(), alpha * torch.kron(draw[0] @ draw[1], other[0] @ other[1]))
    assert update.rank <= min(rows * more_rows, columns * more_columns)


@pytest.mark.parametrize("kernel", [(), (3, 3), (1, 1)])
def test_a_whole_difference_is_exact(tmp_path, kernel):
    diff = random(ROWS, COLUMNS, *kernel)
    with pytest.warns(LoraLabWarning, match="full is read as a LoRA with the same ΔW, of ranks up to"):
        adapter = load(tmp_path, {f"{CONV}.diff": diff})
    assert adapter.tuner == "LORA"
    assert torch.equal(one(adapter).delta(), diff)


@pytest.mark.filterwarnings("ignore:.*full is read as a LoRA")
def test_an_alpha_beside_a_whole_difference_is_told(tmp_path):
    with pytest.warns(LoraLabWarning, match=f"{CONV}.alpha is not used"):
        adapter = load(tmp_path, named(CONV, {"diff": random(4, 4)}, alpha=2.0))
    assert torch.equal(one(adapter).delta(), random(4, 4))


def test_kinds_may_be_mixed_where_each_has_a_delta(tmp_path):
    tensors = {**pair(TEXT), **loha(UNET), **named(CONV, {"diff": random(ROWS, COLUMNS, 3, 3)})}
    with pytest.warns(LoraLabWarning, match="full, loha, lora is read as a LoRA with the same ΔW, of ranks up to 12"):
        adapter = load(tmp_path, tensors)
    updates = adapter.updates
    up, down = tensors[f"{TEXT}.lora_up.weight"], tensors[f"{TEXT}.lora_down.weight"]
    torch.testing.assert_close(updates[FULL[TEXT]].delta(), 0.5 * up @ down)
    wanted = dense_loha(loha(UNET), (ROWS, COLUMNS))
    torch.testing.assert_close(updates[FULL[UNET]].delta(), wanted)
    assert torch.equal(updates[FULL[CONV]].delta(), random(ROWS, COLUMNS, 3, 3))
    adapter.save(tmp_path / "out.safetensors")  # in the format that such names are of
    assert inspect(tmp_path / "out.safetensors").format == "kohya"
    again = Adapter.load(tmp_path / "out.safetensors")
    assert all(torch.equal(again.updates[name].delta(), update.delta()) for name, update in updates.items())


@pytest.mark.parametrize("make", [loha, lambda name: lokr(name, first=(3, 2), ranks=(None, 1))])
def test_dora_of_a_product_is_the_dora_of_a_lora(tmp_path, make):
    magnitude = random(12, 1).abs() + 0.1
    with pytest.warns(LoraLabWarning, match="is read as a LoRA with the same ΔW"):
        adapter = load(tmp_path, {**make(UNET), f"{UNET}.dora_scale": magnitude})
    layer = nn.Linear(8, 12, bias=False)
    weight = layer.weight.detach().clone()
    delta = dense_loha(make(UNET), (12, 8)) if make is loha else dense_lokr(make(UNET))
    wanted = magnitude * (weight + delta) / (weight + delta).norm(dim=1, keepdim=True)
    torch.testing.assert_close(weight + in_peft(tmp_path, adapter, layer, UNET), wanted)


def glora(**changes):
    parts = {
        "a1.weight": random(8, 2),
        "a2.weight": torch.zeros(2, 8),
        "b1.weight": random(12, 2),
        "b2.weight": random(2, 8),
    }
    return named(UNET, {**parts, **changes}, alpha=1.0)


@pytest.mark.filterwarnings("ignore:.*is read as a LoRA")
def test_glora_has_a_delta_where_it_leaves_the_base_alone(tmp_path):
    wanted = 0.5 * random(12, 2) @ random(2, 8)
    torch.testing.assert_close(one(load(tmp_path, glora())).delta(), wanted)
    first = {"b1.weight": random(2, 8), "b2.weight": random(12, 2)}  # as the first version had them
    torch.testing.assert_close(one(load(tmp_path, glora(**first))).delta(), wanted)
    found = problems(tmp_path, glora(**{"a2.weight": random(2, 8)}))
    assert f"{UNET}.a1.weight and a2: multiply the base weight (GLoRA)" in found[0]


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_ia3_multiplies_the_base_as_in_peft(tmp_path, on_input, kernel):
    name, size = CONV if kernel else UNET, 8 if on_input else 12
    weight = random(1, size, 1, 1) if kernel else random(size)
    tensors = {f"{name}.weight": weight, f"{name}.on_input": torch.tensor(int(on_input))}
    if on_input:
        adapter = load(tmp_path, tensors)
    else:
        with pytest.warns(LoraLabWarning, match="PEFT multiplies a layer's bias, too"):
            adapter = load(tmp_path, tensors)
    assert adapter.tuner == "IA3"
    layer = nn.Conv2d(8, 12, kernel, bias=False) if kernel else nn.Linear(8, 12, bias=False)
    axis = [1, size] if on_input else [size, 1]
    wanted = layer.weight.detach() * weight.reshape(*axis, *[1] * len(kernel))
    torch.testing.assert_close(in_peft(tmp_path, adapter, layer, name), wanted)
    with pytest.raises(TunerError, match="IA3 updates are no plain product"):
        _ = adapter.updates


@pytest.mark.parametrize(
    ("tensors", "line"),
    [
        ({f"{UNET}.oft_blocks": random(4, 3, 3)}, f"{UNET}.oft_blocks: turns the outputs of the base weight"),
        ({f"{UNET}.oft_diag": random(4, 3, 3)}, f"{UNET}.oft_diag: turns the outputs of the base weight"),
        ({**pair(), f"{UNET}.diff_b": random(6)}, f"{UNET}.diff_b: a change of a bias"),
        ({**pair(), f"{TEXT}.w_norm": random(6)}, f"{TEXT}.w_norm: a change of a norm's weight"),
        ({**pair(), f"{TEXT}.b_norm": random(6)}, f"{TEXT}.b_norm: a change of a norm's weight"),
        ({**pair(), f"{TEXT}.diff": random(6)}, f"{TEXT}.diff: a change of a vector"),
        ({**loha(), f"{UNET}.scalar": torch.ones(1)}, f"{UNET}.scalar: a factor of ΔW"),
        ({**loha(), **pair()}, f"{UNET}: is loha and lora at once"),
        ({**loha(), f"{UNET}.alpha": torch.ones(2)}, f"{UNET}.alpha: an alpha of shape [2]"),
        ({**loha(), f"{TEXT}.alpha": torch.ones(1)}, f"{TEXT}.alpha: the tensors that it belongs to are missing"),
        ({k: t for k, t in loha().items() if "w2_b" not in k}, f"{UNET}: hada_w2_a or _b is missing"),
        ({**loha(), f"{UNET}.hada_w2_a": random(5, 2)}, f"{UNET}: its two products are 12 × 8 and 5 × 8"),
        ({**loha(), f"{UNET}.hada_w2_a": random(12, 3)}, f"{UNET}: tensors of hada_w2 of shapes [12, 3] and [2, 8]"),
        (
            {f"{UNET}.lokr_w1": torch.ones(300, 300), f"{UNET}.lokr_w2": torch.ones(300, 300)},
            f"{UNET}: a ΔW of 90000 × 90000 at rank 90000 is too large",
        ),
        ({f"{UNET}.lokr_w1": random(2, 2)}, f"{UNET}: lokr_w2_a and lokr_w2_b are missing"),
        ({**lokr(), f"{UNET}.lokr_w2_a": torch.ones(4, 2, dtype=torch.int8)}, f"{UNET}: tensors of torch.int8"),
        ({f"{UNET}.weight": random(6), f"{TEXT}.on_input": torch.ones(1)}, "one weight and one number on_input"),
        ({**pair(), f"{TEXT}.weight": random(6), f"{TEXT}.on_input": torch.ones(1)}, f"{TEXT}: IA³ beside other kinds"),
        ({**loha(), f"{UNET}.dora_scale": torch.ones(1, 8)}, f"{UNET}.dora_scale: a DoRA magnitude for each input"),
        ({**loha(), f"{UNET}.hada_w1_a": random(12, 2) / 0}, "non-finite values"),
        ({**loha(), "lora_unet_x.mask": random(2)}, "lora_unet_x.mask: changes the model in a way that is not known"),
    ],
)  # fmt: skip
def test_what_has_no_delta_of_its_own_is_named(tmp_path, tensors, line):
    found = problems(tmp_path, tensors)
    assert any(line in problem for problem in found), found
    with pytest.raises(AdapterError):
        Adapter.load(tmp_path / "in.safetensors")


def test_pefts_own_loha_has_its_delta_without_a_base(tmp_path):
    """With patterns of ranks and alphas, as PEFT trains it; against its own layers."""
    from peft import LoHaConfig, get_peft_model

    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(8, 12), "b": nn.Linear(12, 6)})
    config = LoHaConfig(r=2, alpha=4, rank_pattern={"b": 3}, alpha_pattern={"a": 5}, target_modules=["a", "b"])
    config.init_weights = False
    peft_model = get_peft_model(model, config)
    peft_model.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    for name, update in adapter.updates.items():
        layer = peft_model.base_model.model.get_submodule(name)
        torch.testing.assert_close(update.delta(), layer.get_delta_weight("default"))
    assert adapter.total_norm > 0
    assert adapter.as_lora.tuner == "LORA"


def test_loha_and_lokr_are_merged_and_pruned_without_a_base(tmp_path):
    first, second = loha(UNET), lokr(UNET, first=(3, 2), ranks=(None, 1))
    deltas = dense_loha(first, (12, 8)), dense_lokr(second)
    adapters = [load(tmp_path, first), load(tmp_path, second)]
    merged = merge(adapters, "task-arithmetic", weights=[1.0, 2.0])
    adapter = getattr(merged, "adapter", merged)
    torch.testing.assert_close(one(adapter).delta(), deltas[0] + 2 * deltas[1])
    pruned = prune_rank(adapters[0], rank=1)
    U, S, Vh = torch.linalg.svd(deltas[0])
    torch.testing.assert_close(one(pruned.adapter).delta(), S[0] * torch.outer(U[:, 0], Vh[0]), rtol=1e-4, atol=1e-5)
    assert pruned.error == pytest.approx(float(S[1:].norm() / S.norm()), rel=1e-4)
    pruned.adapter.save(tmp_path / "out.safetensors")
    assert sorted(load_file(tmp_path / "out.safetensors")) == [
        f"{UNET}.{end}" for end in ("alpha", "lora_down.weight", "lora_up.weight")
    ]


@pytest.mark.parametrize("form", ["kohya", "comfy", "diffusers"])
def test_formats_of_loras_get_the_same_delta_as_a_lora(tmp_path, form):
    from lora_lab.adapters.files.converting import converted, save

    adapter = load(tmp_path, {**loha(UNET), **loha(CONV, kernel=(3, 3))})
    made = converted(adapter, form)
    assert made.changes == ["LOHA is written as a LoRA with the same ΔW, of ranks up to 4"]
    read, _ = save(made.adapter, tmp_path / "out.safetensors")
    assert read.layout.format == form
    for name, update in adapter.updates.items():
        torch.testing.assert_close(read.updates[name].delta(), update.delta())
    with pytest.raises(TunerError, match="cannot hold this adapter: LOHA updates"):
        adapter.save(tmp_path / "no.safetensors")


@pytest.mark.parametrize(
    "make", [loha, lambda name: lokr(name, first=(3, 2), ranks=(None, 2)), lambda name: lokr(name)]
)
def test_inspect_measures_products_as_their_updates(tmp_path, make):
    from lora_lab.adapters.formats import products

    adapter = load(tmp_path, make(UNET))
    site, scale = adapter.sites[FULL[UNET]], products.scales_of(adapter.sites, adapter.config)[FULL[UNET]]
    shape, norm, rank = products.measures(site, adapter.tensors, adapter.tuner, scale)
    assert shape == one(adapter).shape
    assert norm == pytest.approx(float(one(adapter).delta().norm()), rel=1e-5)
    assert rank == pytest.approx(one(adapter).effective_rank(), rel=1e-5)
