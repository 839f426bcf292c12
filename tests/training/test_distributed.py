"""Masks in several processes under plain DistributedDataParallel."""

import os

import pytest
import torch
from making_processes import server
from test_coto import Tokens, llama
from torch.nn.parallel import DistributedDataParallel

from lora_lab.training.coto import Switches

MASKS = [[True, False], [False, True], [True, False], [True, True]]


def steps(model, rows, switched):
    """A few steps of AdamW with decay, each with its mask; the adapter's weights after each."""
    optimizer = torch.optim.AdamW([p for p in switched.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    states = []
    with Switches(switched) as switches:
        for mask in MASKS:
            switches.set(mask)
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            states.append({n: p.detach().clone() for n, p in switched.named_parameters() if p.requires_grad})
    return states


def work(rank, folder, checkpointing):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = recomputing(llama(blocks=2).train(), checkpointing)
    states = steps(DistributedDataParallel(model), Tokens().ids[rank * 4 : rank * 4 + 4], model)
    torch.save(states, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def recomputing(model, how):
    """The model, which computes activations of its blocks again: None for not, else whether re-entrantly."""
    if how is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": how})
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        model.enable_input_require_grads()  # a re-entrant checkpoint has a gradient only where its input has one
    return model


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_every_process_takes_the_steps_of_one_with_all_the_data(tmp_path, checkpointing):
    """Without find_unused_parameters: layers that are off stay as they are, the others as in one process."""
    processes = [server().Process(target=work, args=(rank, tmp_path, checkpointing)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    model = llama(blocks=2).train()
    expected = steps(model, Tokens().ids[:8], model)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    before = {n: p for n, p in llama(blocks=2).named_parameters() if p.requires_grad}
    for mask, mine, theirs, alone in zip(MASKS, one, two, expected, strict=True):
        for name, weights in mine.items():
            assert torch.equal(weights, theirs[name])
            assert weights == pytest.approx(alone[name], abs=1e-5)
            on = mask[int(name.partition(".layers.")[2][0])]
            assert torch.equal(weights, before[name]) != on, name
        before = mine
