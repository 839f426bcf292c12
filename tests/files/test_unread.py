"""Tensors that are read when an operation asks for their numbers."""

import copy
import gc
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from lora_lab import files
from lora_lab.errors import FileError
from lora_lab.files import Unread, in_memory, later

REAL = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture
def unread():
    """An unread tensor with a list of the times that it was read."""
    reads = []
    made = Unread(REAL.dtype, REAL.shape, lambda: reads.append(1) or REAL.clone())
    return made, reads


def test_what_is_known_without_the_numbers_reads_nothing(unread):
    tensor, reads = unread
    told = tensor.shape, tensor.ndim, tensor.numel(), tensor.dtype, tensor.itemsize, len(tensor), tensor.device.type
    assert told == (REAL.shape, 2, 12, torch.bfloat16, 2, 4, "cpu")
    assert tensor.is_floating_point()
    assert not tensor.is_complex()
    assert tensor.to("meta").shape == REAL.shape
    assert repr(tensor) == "Unread([4, 3], torch.bfloat16)"
    assert not reads


@pytest.mark.parametrize(
    "operation",
    [
        torch.Tensor.float,
        torch.Tensor.clone,
        torch.Tensor.detach,
        lambda t: t.T,
        lambda t: t[1:],
        lambda t: t.flatten(1).abs(),
        lambda t: t.float() @ t.float().T,
        lambda t: torch.cat([t, REAL]),
        lambda t: REAL + t,
        lambda t: t.aminmax()[1],
        lambda t: torch.linalg.vector_norm(t, dim=1),
        torch.zeros_like,
        in_memory,
        copy.copy,
        lambda t: pickle.loads(pickle.dumps(t)),
    ],
)
def test_an_operation_gives_a_plain_tensor_of_the_right_numbers(unread, operation):
    tensor, reads = unread
    made, wanted = operation(tensor), operation(REAL)
    assert type(made) is torch.Tensor
    assert made.dtype == wanted.dtype
    assert torch.equal(made, wanted)
    assert reads


def test_numbers_leave_torch_as_they_are(unread):
    tensor, _ = unread
    assert tensor.tolist() == REAL.tolist()
    assert float(tensor.sum()) == float(REAL.sum())
    double = later(torch.Tensor.double, tensor)
    assert (double.numpy() == REAL.double().numpy()).all()
    assert copy.deepcopy(tensor) is tensor


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.mul_(2),
        lambda t: t.__setitem__(0, 1.0),
        lambda t: torch.add(REAL, REAL, out=t),
        lambda t: t.copy_(REAL),
        lambda t: t.data_ptr(),
    ],
)
def test_a_change_that_nobody_would_see_is_refused(unread, change):
    tensor, _ = unread
    with pytest.raises(TypeError, match=r"not in memory"):
        change(tensor)


def test_what_is_made_of_it_later_is_made_when_it_is_needed(unread):
    tensor, reads = unread
    made = later(lambda one, two: (one @ two.T).float(), tensor, REAL)
    assert (type(made), made.shape, made.dtype, reads) == (Unread, (4, 4), torch.float32, [])
    assert torch.equal(made, (REAL @ REAL.T).float())
    assert reads == [1]
    assert type(later(torch.Tensor.float, REAL)) is torch.Tensor


@pytest.fixture
def lazily(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": REAL, "b": torch.arange(5.0)}, path)
    return path, files.LazyTensors(path).unread()


def test_a_file_that_another_takes_the_place_of_is_read_on(lazily):
    path, tensors = lazily
    save_file({"a": torch.zeros(1)}, path.with_name("new"))
    os.replace(path.with_name("new"), path)
    assert torch.equal(tensors["a"], REAL)
    path.unlink()
    assert tensors["b"].tolist() == [0, 1, 2, 3, 4]


def test_a_file_that_is_cut_short_or_written_over_is_one_line(lazily):
    path, tensors = lazily
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(FileError, match=r"x\.safetensors: changed while it was being read$"):
        tensors["a"].float()


def test_no_more_files_are_open_than_are_in_use(lazily):
    path, tensors = lazily
    before = len(os.listdir("/proc/self/fd"))
    more = [files.LazyTensors(path).unread() for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before + 20
    one = more[0]["a"]
    del more
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert torch.equal(one, tensors["a"])
