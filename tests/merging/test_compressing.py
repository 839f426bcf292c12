"""Compress-then-merge against HOOI on dense ΔW, and what its rank and its bases promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making_adapters import lora, write
from making_updates import gauged, random_update

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.lowrank import LowRank, combine
from lora_lab.errors import OptionError
from lora_lab.merging.merged import merge
from lora_lab.merging.methods import rule_of, rules
from lora_lab.merging.rules.subspaces import ctm
from lora_lab.merging.sources import Sources

F64 = torch.float64
FEW = settings(max_examples=15, deadline=None)
SEEDS = st.integers(0, 2**16)


def several(seed, ranks=(3, 2, 3)):
    return [random_update(100 * seed + i, rows=9, columns=8, rank=rank) for i, rank in enumerate(ranks)]


def merged_by(updates, weights, inner="task-arithmetic", **options):
    shared = ctm(updates, **{name: options.pop(name) for name in ("rank", "beta") if name in options})
    return shared.back(rule_of(inner)(shared.cores, weights, **options))


def dense_ctm(deltas, weights, inner, rank, beta):
    """Proxies, HOOI and coordinates of dense matrices, with the signs of the columns left to chance."""
    mean = sum(d.norm() for d in deltas) / len(deltas)
    X = [d / d.norm() * (beta * d.norm() + (1 - beta) * mean) for d in deltas]

    def leading(squares):
        return torch.linalg.svd(squares).U[:, :rank]

    Q, before = leading(sum(x.T @ x for x in X)), 0.0
    for _ in range(1000):
        P = leading(sum(x @ Q @ Q.T @ x.T for x in X))
        Q = leading(sum(x.T @ P @ P.T @ x for x in X))
        held = sum(float((P.T @ x @ Q).square().sum()) for x in X)
        if held <= before * (1 + 1e-6):
            break
        before = held
    return P @ rule_of(inner)([P.T @ d @ Q for d in deltas], weights) @ Q.T


@pytest.mark.parametrize("inner", ["task-arithmetic", "ties", "magnitude", "slerp", "breadcrumbs"])
@FEW
@given(SEEDS, st.integers(1, 5), st.sampled_from([0.0, 0.25, 1.0]))
def test_it_is_hooi_of_the_dense_matrices(inner, seed, rank, beta):
    updates, weights = several(seed), [1.0, 0.5, 2.0]
    found = merged_by(updates, weights, inner, rank=rank, beta=beta)
    wanted = dense_ctm([u.delta() for u in updates], weights, inner, rank, beta)
    assert found.rank <= rank
    torch.testing.assert_close(found.delta(), wanted, rtol=0, atol=1e-7 * float(wanted.norm()))


@pytest.mark.parametrize("inner", rules())
def test_it_knows_no_gauge_and_no_scale_of_the_proxies(inner):
    updates, weights = several(3), [1.0, 0.5, 2.0]
    found = merged_by(updates, weights, inner, rank=2).delta()
    turned = merged_by([gauged(u, i) for i, u in enumerate(updates)], weights, inner, rank=2).delta()
    torch.testing.assert_close(turned, found, rtol=0, atol=1e-6 * float(found.norm()))
    larger = merged_by([3 * u for u in updates], weights, inner, rank=2).delta()
    torch.testing.assert_close(larger, 3 * found, rtol=0, atol=1e-6 * float(larger.norm()))


@FEW
@given(SEEDS)
def test_with_room_for_all_directions_nothing_is_lost_and_with_less_more(seed):
    updates, weights = several(seed), [1.0, -0.5, 2.0]
    whole = combine(updates, weights)
    errors = [float((merged_by(updates, weights, rank=r) - whole).norm()) for r in (8, 5, 3, 1)]
    assert errors[0] < 1e-9 * whole.norm()
    assert errors == sorted(errors)
    # of a sum, no two bases do better than its own singular vectors (Eckart & Young)
    for rank, error in zip((5, 3, 1), errors[1:], strict=True):
        assert error >= (1 - 1e-12) * float((whole.truncate(rank)[0] - whole).norm())


def test_the_first_of_the_common_directions_is_that_of_the_proxies_and_not_of_the_largest():
    # three in a direction, one ten times as large in another: of one direction, the three count more than the one
    e, f = torch.eye(4, dtype=F64)[:, :1], torch.eye(4, dtype=F64)[:, 1:2]
    updates = [LowRank(e.T, e)] * 3 + [LowRank(10 * f.T, f)]
    kept = merged_by(updates, [1.0] * 4, rank=1).delta()
    torch.testing.assert_close(kept, 3 * e @ e.T)
    kept = merged_by(updates, [1.0] * 4, rank=1, beta=1.0).delta()
    torch.testing.assert_close(kept, 10 * f @ f.T)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank is 0; a whole number of at least 1 is needed"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"beta": 1.5}, "beta is 1.5; a share from 0 to 1 is needed"),
    ],
)
def test_it_says_what_cannot_be(options, text):
    with pytest.raises(OptionError, match=text):
        ctm(several(0), **options)


def test_a_rank_that_is_asked_for_is_the_one_that_it_merges_in(tmp_path):
    adapters = [
        Adapter.load(write(tmp_path / f"{seed}", lora("net.q_proj", rank=3, rows=9, columns=8, seed=seed), r=3))
        for seed in range(3)
    ]
    whole = {"density": 1.0}
    found = merge(Sources(adapters), "ctm", options=whole, rank=2)
    wanted = merge(Sources(adapters), "ctm", options={"rank": 2, **whole})
    cut = merge(Sources(adapters), "ctm", options={"rank": 3, **whole}, rank=2)
    assert found.error == wanted.error == 0 < cut.error
    assert found.options["rank"] == 2
    one, two, three = (each.adapter.updates["net.q_proj"].delta() for each in (found, wanted, cut))
    torch.testing.assert_close(one, two)
    assert float((one - three).norm()) > 1e-3 * float(one.norm())
    assert merge(Sources(adapters), "ctm").adapter.updates["net.q_proj"].rank == 3
