"""Tables of adapters side by side: every number beside dense matrices, and what cannot be compared."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from making_adapters import lora, write
from making_updates import gauged

import lora_lab as ll
from lora_lab.adapters.adapter import Adapter
from lora_lab.analysis.comparing import Compare
from lora_lab.errors import AdapterError, MismatchError, OptionError, TunerError
from lora_lab.geometry import delta_hash
from lora_lab.results import schema

MODULES = ("layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "head")
SHAPE = {"rows": 24, "columns": 16}


def adapter(folder, seed=0, modules=MODULES, rank=2, **more):
    parts = [lora(name, rank=rank, seed=10 * seed + i, **SHAPE, **more) for i, name in enumerate(modules)]
    tensors = {key: tensor for part in parts for key, tensor in part.items()}
    return Adapter.load(write(folder / f"s{seed}", tensors, r=rank, lora_alpha=2 * rank))


def compared(*adapters, **options):
    result = Compare(**options).run(adapters)
    assert schema.why_not(result.kind, result.schema, result.columns, result.summary) is None
    return result


def dense(one, names):
    """Module → ΔW in float64; the scale is 2."""
    return {name: one.updates[name].B.double().numpy() @ one.updates[name].A.double().numpy() for name in names}


def test_every_column_is_what_dense_matrices_give(tmp_path):
    """Of several modules, ΔW is one block-diagonal matrix."""
    ranks = (2, 3)
    a, b = (adapter(tmp_path, seed, rank=rank) for seed, rank in enumerate(ranks))
    result = compared(a, b, levels=("layer", "type", "module"))
    held = {
        ("total", ""): MODULES,
        ("layer", "layers.0"): MODULES[:2],
        ("layer", "layers.1"): MODULES[2:3],
        ("type", "q_proj"): (MODULES[0], MODULES[2]),
        ("type", "v_proj"): MODULES[1:2],
        ("type", "head"): MODULES[3:],
        **{("module", name): (name,) for name in MODULES},
    }
    assert sorted((row["level"], row["group"]) for row in result.rows()) == sorted(held)
    assert result.rows()[0]["level"] == "total"
    for row in result.rows():
        names = held[row["level"], row["group"]]
        one, other = (scipy.linalg.block_diag(*dense(each, names).values()) for each in (a, b))
        values = [np.linalg.svd(each) for each in (one, other)]
        near = {"rel": 1e-8, "abs": 1e-9}
        assert row["modules"] == len(names)
        assert row["norm_first"] == pytest.approx(np.linalg.norm(one), **near)
        assert row["norm_ratio"] == pytest.approx(np.linalg.norm(one) / np.linalg.norm(other), **near)
        assert row["sigma_ratio"] == pytest.approx(values[0][1][0] / values[1][1][0], **near)
        assert row["inner"] == pytest.approx((one * other).sum(), **near)
        assert row["cosine"] == pytest.approx((one * other).sum() / row["norm_first"] / row["norm_second"], **near)
        assert row["distance"] == pytest.approx(np.linalg.norm(one - other), **near)
        for side, size in (("left", SHAPE["rows"]), ("right", SHAPE["columns"])):
            bases = [
                u[:, : k * len(names)] if side == "left" else vh[: k * len(names)].T
                for (u, _, vh), k in zip(values, ranks, strict=True)
            ]
            angles = np.sort(scipy.linalg.subspace_angles(*bases))
            shared = (np.cos(angles) ** 2).sum()
            assert row[f"{side}_overlap"] == pytest.approx(shared / len(angles), **near)
            assert row[f"{side}_over_chance"] == pytest.approx(shared / (len(names) * 6 / size), **near)
            assert row[f"{side}_smallest"] == pytest.approx(angles[0], **near)
            assert row[f"{side}_mean"] == pytest.approx(angles.mean(), **near)
            assert row[f"{side}_largest"] == pytest.approx(angles[-1], **near)
            assert row[f"{side}_grassmann"] == pytest.approx(np.linalg.norm(angles), **near)
        assert row["A_cosine"] is row["A_z"] is row["A_shared"] is None  # of ranks 2 and 3


def test_parts_of_each_adapter_are_those_of_its_singular_values(tmp_path):
    a, b = (adapter(tmp_path, seed) for seed in (0, 1))
    result = compared(a, b)
    part = next(p for p in result.summary["parts"] if p["group"] == "layers.0" and p["adapter"] == "s1")
    values = [np.linalg.svd(delta)[1][:2] for delta in dense(b, MODULES[:2]).values()]
    np.testing.assert_allclose(part["spectrum"], np.sqrt(np.mean(np.square(values), 0)), rtol=1e-9)
    assert part["sigma"] == pytest.approx(max(each[0] for each in values))
    assert part["norm"] == pytest.approx(math.sqrt(2) * np.linalg.norm(part["spectrum"]))
    shares = [each / each.sum() for each in values]
    assert part["effective_rank"] == pytest.approx(np.mean([np.exp(-(s * np.log(s)).sum()) for s in shares]))
    assert part["stable_rank"] == pytest.approx(np.mean([(s**2).sum() / s[0] ** 2 for s in values]))
    assert [one["hash"] for one in result.summary["adapters"]] == [delta_hash(each.updates) for each in (a, b)]
    assert [one["norm"] for one in result.parameters["adapters"]] == pytest.approx([a.total_norm, b.total_norm])


def test_one_initial_factor_is_told_by_its_z(tmp_path):
    a, b = (adapter(tmp_path, seed) for seed in (0, 1))
    nearly = {key: a.tensors[key] + 0.1 * t if ".lora_A." in key else t for key, t in b.tensors.items()}
    c = dataclasses.replace(b, tensors=nearly)
    result = compared(a, b, c)
    apart, shared, _ = result.rows(level="total")
    cosines = [
        float(torch.cosine_similarity(a.tensors[key].flatten(), b.tensors[key].flatten(), 0))
        for key in a.tensors
        if ".lora_A." in key
    ]
    assert apart["A_cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert apart["A_z"] == pytest.approx(np.mean(cosines) * math.sqrt(32), abs=1e-5)
    assert apart["A_shared"] is False
    assert shared["A_shared"] is True
    assert shared["A_z"] > 5


def test_gauge_twins_and_near_duplicates_are_named_and_ordered_beside_each_other(tmp_path):
    a, b = (adapter(tmp_path, seed) for seed in (0, 1))
    twin = a.with_updates({name: gauged(update, 3) for name, update in exact(a).items()}, source="twin")
    near = a.with_updates({name: u + 0.02 * b.updates[name] for name, u in a.updates.items()}, source="near")
    result = compared(a, b, twin, near)
    twins = {(row["first"], row["second"]): row["equal"] for row in result.summary["twins"]}
    assert twins == {("s0", "twin"): True, ("s0", "near"): False, ("twin", "near"): False}
    row = next(row for row in result.summary["twins"] if row["equal"])
    assert row["difference"] < 1e-12
    assert row["cosine"] == pytest.approx(1)
    assert result.summary["order"].index(1) in (0, 3)
    first, second, height, count = result.summary["linkage"][0]
    assert ({first, second}, count) == ({0, 2}, 2)
    assert height == pytest.approx(0, abs=1e-12)
    assert not compared(a, near, similar=1.0).summary["twins"]


def exact(one):
    return {name: ll.LowRank(update.A.double(), update.B.double()) for name, update in one.updates.items()}


def test_a_module_that_one_lacks_is_zero_there(tmp_path):
    a, b = adapter(tmp_path, 0), adapter(tmp_path, 1, MODULES[:1])
    row, *rows = compared(a, b).rows()
    norms = {name: np.linalg.norm(delta) for name, delta in dense(a, MODULES).items()}
    assert row["modules"] == 1
    assert row["norm_first"] == pytest.approx(a.total_norm)
    shared = [dense(each, MODULES[:1])[MODULES[0]] for each in (a, b)]
    rest = sum(norm**2 for name, norm in norms.items() if name != MODULES[0])
    assert row["distance"] == pytest.approx(math.sqrt(np.linalg.norm(shared[0] - shared[1]) ** 2 + rest))
    assert row["cosine"] == pytest.approx((shared[0] * shared[1]).sum() / a.total_norm / b.total_norm)
    alone = next(each for each in rows if each["group"] == "layers.1")
    assert (alone["modules"], alone["norm_ratio"], alone["cosine"], alone["left_mean"]) == (0, None, None, None)
    assert alone["distance"] == pytest.approx(norms["layers.1.q_proj"])


def test_an_update_of_zero_has_no_direction(tmp_path):
    a, b = (adapter(tmp_path, seed) for seed in (0, 1))
    zero = dataclasses.replace(b, tensors={k: t * (".lora_A." in k) for k, t in b.tensors.items()})
    row = compared(a, zero).rows(level="total")[0]
    assert row["distance"] == pytest.approx(a.total_norm)
    assert row["inner"] == row["norm_second"] == 0
    names = ("norm_ratio", "sigma_ratio", "cosine", "left_overlap", "right_grassmann")
    assert {row[name] for name in names} == {None}
    assert row["A_cosine"] is not None
    both = compared(zero, zero)
    assert both.rows(level="total")[0]["distance"] == 0
    assert both.summary["twins"][0]["equal"]


def test_signs_are_counted_where_they_are_asked_for(tmp_path):
    a, b = adapter(tmp_path, 0), adapter(tmp_path, 1, MODULES[:3])
    assert compared(a, b).rows()[0]["sign_agreement"] is None
    row = compared(a, b, levels=(), signs=True).rows()[0]
    deltas = [dense(each, MODULES[:3]) for each in (a, b)]
    same = [np.mean(deltas[0][name] * deltas[1][name] > 0) for name in MODULES[:3]]
    cosines = [
        (deltas[0][name] * deltas[1][name]).sum() / np.linalg.norm(deltas[0][name]) / np.linalg.norm(deltas[1][name])
        for name in MODULES[:3]
    ]
    assert row["sign_agreement"] == pytest.approx(np.mean(same))
    assert row["sign_expected"] == pytest.approx(np.mean(0.5 + np.arcsin(cosines) / np.pi))


def test_an_energy_leaves_out_small_directions(tmp_path):
    a, b = (adapter(tmp_path, seed, rank=4) for seed in (0, 1))
    row = compared(a, b, levels=(), energy=1e-9).rows()[0]
    leading = [[np.linalg.svd(delta) for delta in dense(each, MODULES).values()] for each in (a, b)]
    angles = [math.acos(abs(one[0][:, 0] @ two[0][:, 0])) for one, two in zip(*leading, strict=True)]
    assert row["left_mean"] == pytest.approx(np.mean(angles), rel=1e-6)
    assert row["inner"] == pytest.approx(sum((dense(a, MODULES)[n] * dense(b, MODULES)[n]).sum() for n in MODULES))


def test_convolutions_and_embeddings_are_matrices_as_the_model_stores_them(tmp_path):
    made = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "conv.lora_A.weight": (2, 3, 3, 3),
            "conv.lora_B.weight": (8, 2, 1, 1),
            "embed.lora_embedding_A": (2, 11),
            "embed.lora_embedding_B": (6, 2),
        }
        tensors = {f"base_model.model.{k}": torch.randn(*s, generator=generator) for k, s in shapes.items()}
        made.append(Adapter.load(write(tmp_path / f"c{seed}", tensors)))
    rows = {row["group"]: row for row in compared(*made, levels=("module",)).rows(level="module")}
    assert set(rows) == {"conv", "embed"}
    for name, row in rows.items():
        deltas = [one.updates[name].delta().double().flatten(1).numpy() for one in made]
        assert deltas[0].shape == {"conv": (8, 27), "embed": (11, 6)}[name]
        assert row["inner"] == pytest.approx((deltas[0] * deltas[1]).sum(), rel=1e-5)
        left = [np.linalg.svd(delta)[0][:, :2] for delta in deltas]
        angles = scipy.linalg.subspace_angles(*left)
        assert row["left_grassmann"] == pytest.approx(np.linalg.norm(angles), rel=1e-5)
        assert row["left_over_chance"] == pytest.approx((np.cos(angles) ** 2).sum() * deltas[0].shape[0] / 4, rel=1e-5)


def test_what_cannot_be_compared_is_told_in_one_line(tmp_path):
    a, b = adapter(tmp_path, 0), adapter(tmp_path, 1)
    other = Adapter.load(write(tmp_path / "wide", lora(MODULES[0], rows=24, columns=18)))
    elsewhere = adapter(tmp_path, 2, ("blocks.0.fc1",))
    large = dataclasses.replace(b, tensors={k: t.double() * 1e60 for k, t in b.tensors.items()}, source="large")
    hira = dataclasses.replace(b, config={**b.config, "peft_type": "HIRA"})
    dora = dataclasses.replace(b, config={**b.config, "use_dora": True})
    for given, options, error, text in [
        ([a], {}, OptionError, "^1 adapter given; to compare, two or more are needed"),
        ([], {}, OptionError, "^0 adapters given"),
        ([a, other], {}, MismatchError, r"s0 and .*wide: layers.0.q_proj is 24 × 16 and 24 × 18; adapters of one base"),
        ([a, elsewhere], {}, MismatchError, "update no module together"),
        ([a, dora], {}, TunerError, "no ΔW from the factors alone"),
        ([a, hira], {}, TunerError, "no ΔW from the factors alone: .*HIRA"),
        ([a, large], {}, AdapterError, r"^large: ‖ΔW‖ of head is .*e\+12.; less than 1e\+100 is needed$"),
        ([a, b], {"levels": ("layers",)}, OptionError, "layers"),
        ([a, b], {"energy": 0.0}, OptionError, "energy is 0.0; it must be above 0"),
        ([a, b], {"digits": 0}, OptionError, "digits is 0; it must be from 1 to 12"),
    ]:
        with pytest.raises(error, match=text) as raised:
            ll.compare(given, progress=False, **options)
        assert "\n" not in str(raised.value)


def test_all_pairs_come_in_order_under_labels_that_differ(tmp_path):
    made = [adapter(tmp_path / str(i), 0) for i in range(3)]
    result = ll.compare([made[0], *(one.source for one in made[1:])], levels=[], progress=False)
    assert [row["indices"] for row in result.rows()] == [list(pair) for pair in itertools.combinations(range(3), 2)]
    assert [one["adapter"] for one in result.summary["adapters"]] == ["0/s0", "1/s0", "2/s0"]
    assert all(row["equal"] for row in result.summary["twins"])
