"""Smaller intruders: as PEFT makes them, exact at a larger rank, and cut back with an error that is told."""

import warnings

import peft
import pytest
import torch
from making_checkpoints import QV, in_peft, train, write_base
from peft.tuners.lora.intruders import reduce_intruder_dimension

from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import MismatchError, OptionError
from lora_lab.fusing.weights import Weights
from lora_lab.pruning.intruders import lower_intruders

CASES = {
    "llama": peft.LoraConfig(r=2, lora_alpha=16, target_modules=[*QV, "down_proj"], use_rslora=True),
    "gpt2": peft.LoraConfig(r=2, lora_alpha=8, target_modules=["c_proj"], fan_in_fan_out=True),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    base = write_base(request.param, tmp_path / "base")
    train(request.param, base, tmp_path / "a", CASES[request.param])
    return request.param, base, tmp_path / "a"


def delta(adapter):
    return {name: update.delta().double() for name, update in adapter.updates.items()}


def test_cut_back_they_are_those_of_peft(case):
    name, base, folder = case
    if name == "gpt2":
        pytest.skip("PEFT looks at the inputs of a Conv1D")
    adapter = Adapter.load(folder)
    lowered = lower_intruders(adapter, base=base, top=5, factor=0.5)
    model = in_peft(name, base, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reduce_intruder_dimension(model, top_k=5, mitigation_lambda=0.5, logging_sink=None)
    assert len(lowered.intruders) > 0
    for module, mine in delta(lowered.adapter).items():
        theirs = model.base_model.model.get_submodule(module).get_delta_weight("intruder_reduced")
        torch.testing.assert_close(mine, theirs.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exact", [True, False])
def test_their_singular_values_are_lowered_and_all_others_stay(case, exact, tmp_path):
    _, base, folder = case
    adapter = Adapter.load(folder)
    lowered = lower_intruders(adapter, base=base, top=4, factor=0.25, exact=exact)
    lowered.adapter.save(tmp_path / "b")
    after = Adapter.load(tmp_path / "b")
    weights, changed = Weights(base, [adapter]), Weights(base, [after])
    assert lowered.intruders
    lost = whole = 0.0
    for module in weights.modules:
        W, (update,), (new,) = weights.read(module), weights.updates(module).values(), changed.updates(module).values()
        U, _, _ = torch.linalg.svd(W.double(), full_matrices=False)
        left, values, Vh = torch.linalg.svd(W + update.delta().double(), full_matrices=False)
        found = ((U.T @ left).abs().amax(0) < 0.5) & (torch.arange(len(values)) < 4)
        assert int(found.sum()) == lowered.intruders.get(module, 0)
        wanted = left @ (values * torch.where(found, 0.25, 1.0)).diag() @ Vh - W
        ranks = update.rank + (int(found.sum()) if exact else 0)
        assert after.sites[module].rank == ranks
        best = torch.linalg.svdvals(wanted)
        lost, whole = lost + best[ranks:].square().sum(), whole + best.square().sum()
        off = float((new.delta().double() - wanted).norm())
        assert off == pytest.approx(float(best[ranks:].norm()), rel=1e-3, abs=1e-5)
        if not found.any():
            assert all(
                torch.equal(adapter.tensors[key], after.tensors[key]) for key in adapter.sites[module].keys.values()
            )
    assert lowered.cut == pytest.approx(float((lost / whole).sqrt()), rel=1e-3, abs=1e-6)
    assert (lowered.cut < 1e-6) == exact
    assert after.record["pruned"][-1] == {
        "intruders": 0.25,
        "top": 4,
        "threshold": 0.5,
        "base": "base",
        "exact": exact,
        "from": "a",
    }


def test_a_factor_of_one_changes_nothing(case):
    _, base, folder = case
    adapter = Adapter.load(folder)
    kept = lower_intruders(adapter, base=base, factor=1.0)
    assert kept.error < 1e-6
    with pytest.raises(OptionError, match=r"^the factor of intruders is -1.0; a number of at least 0"):
        lower_intruders(adapter, base=base, factor=-1.0)
    with pytest.raises(MismatchError, match="has no module"):
        lower_intruders(adapter, base=write_base("bert", folder / "bert"))
