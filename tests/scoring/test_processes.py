"""Training by several processes together, as torchrun starts them."""

import contextlib
import os
import signal
import socket
import time

import numpy as np
import psutil
import pytest
import torch
from making_processes import finished, launched, started

from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import OptionError
from lora_lab.results.result import Result
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

STEPS = 16


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def check_trained_together(folder, recipe):
    """What two processes trained is what one does by the same recipe."""
    both, log2 = Adapter.load(folder / "two.safetensors"), Result.load(folder / "two.train.json")
    alone, log = train(Digits("relabel"), recipe)
    assert list(log2.columns["mask"]) == list(log.columns["mask"])
    assert np.allclose(log2.columns["loss"], log.columns["loss"], rtol=1e-4)
    for name, update in alone.updates.items():
        assert (both.updates[name] - update).norm() <= 1e-3 * max(update.norm(), 1e-3)
    assert both.record["recipe"] == alone.record["recipe"]


def test_two_processes_of_torchrun_try_several_settings_as_one_with_the_same_batch(tmp_path):
    options = ["--method", "coto", "--steps", STEPS, "--lr", "1e-3,1e-2", "--device", "cpu", "-o", "two.safetensors"]
    finished(launched(tmp_path, 2, "lora_lab.training", *options), tmp_path)
    assert (tmp_path / "out.txt").read_text().count("Trained adapters") == 1  # one of them speaks
    tried = Result.load(tmp_path / "two.tuning.json")
    assert tried.columns["learning_rate"] == [1e-3, 1e-2]
    (best,) = tried.rows(chosen=True)
    check_trained_together(tmp_path, Recipe(method="coto", steps=STEPS, learning_rate=best["learning_rate"]))


def test_two_processes_train_as_one_and_keep_checkpoints(tmp_path):
    """By the variables that `accelerate launch` gives each of its processes."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    folders = [tmp_path / str(rank) for rank in range(2)]  # for what each of them says
    command = ["train", "--method", "coto", "--steps", STEPS, "--save-every", 8, "-o", tmp_path / "two.safetensors"]
    runs = []
    for rank, folder in enumerate(folders):
        folder.mkdir()
        runs.append(started(folder, *command, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
    for run, folder in zip(runs, folders, strict=True):
        finished(run, folder)
    assert [(folder / "out.txt").read_text().count("Trained adapters") for folder in folders] == [1, 0]
    check_trained_together(tmp_path, Recipe(method="coto", steps=STEPS, save_every=8))
    assert Adapter.load(tmp_path / "two.checkpoints" / "checkpoint-8").record["step"] == 8


def test_a_run_that_was_killed_outright_goes_on_to_the_same_adapter(tmp_path):
    command = [
        "train",
        "--method",
        "coto",
        "--steps",
        60,
        "--save-every",
        5,
        "--device",
        "cpu",
        "-o",
        "cut.safetensors",
    ]
    run = started(tmp_path, *command)
    while not (tmp_path / "cut.checkpoints" / "checkpoint-15" / "trainer_state.json").exists():
        assert run.is_alive()
        time.sleep(0.01)
    run.kill()
    run.join()
    assert not (tmp_path / "cut.safetensors").exists()
    finished(started(tmp_path, *command), tmp_path)
    kept = sorted(int(p.name[11:]) for p in (tmp_path / "cut.checkpoints").glob("checkpoint-*"))
    assert kept == list(range(5, 61, 5))
    whole, log = train(Digits("relabel"), Recipe(method="coto", steps=60))
    resumed = Adapter.load(tmp_path / "cut.safetensors")
    assert all(torch.equal(tensor, resumed.tensors[key]) for key, tensor in whole.tensors.items())
    assert Result.load(tmp_path / "cut.train.json").columns == log.columns


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(OptionError, match="a batch of 16 cannot be shared out evenly among 3 processes"):
        train(Digits("relabel"), Recipe(method="lora", steps=2))


def test_a_logger_that_is_not_there_is_named():
    with pytest.raises(OptionError, match="`report_to` nonsense"):
        train(Digits("relabel"), Recipe(method="lora", steps=2), report_to="nonsense")


def test_lora_plus_gives_b_its_own_rate_and_bf16_trains():
    plain, fast, half = (
        train(Digits("relabel"), Recipe(method="lora", steps=8, **options))[0]
        for options in ({}, {"lora_plus": 8.0}, {"bf16": True})
    )

    def size_of_b(adapter):
        return sum(float(t.norm()) for key, t in adapter.tensors.items() if "lora_B" in key)

    assert size_of_b(fast) > 2 * size_of_b(plain)
    assert size_of_b(half) == pytest.approx(size_of_b(plain), rel=0.2)
    assert fast.record["recipe"]["lora_plus"] == 8.0
    with pytest.raises(OptionError, match="loha has no B that LoRA"):
        train(Digits("relabel"), Recipe(method="lora", peft="loha", steps=2, lora_plus=8.0))
    with pytest.raises(OptionError, match="lora plus is -1"):
        Recipe(lora_plus=-1)


@pytest.mark.parametrize(("send", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)])
def test_interrupted_trainings_side_by_side_end_in_one_line_and_leave_no_process(tmp_path, send, number):
    options = ["--steps", 100_000, "--save-every", 10, "--jobs", 2, "-o", "runs"]
    process = started(tmp_path, "train", "--seeds", "0-1", *options, session=True)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("runs/*.checkpoints/checkpoint-10"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    send(process.pid, number)
    err = finished(process, tmp_path, 128 + number)
    assert err.split() == ["error:", "interrupted;", "nothing", "half-written", "was", "left"]
    deadline = time.monotonic() + 10
    while (left := running_in(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def running_in(group):
    """Command lines of the processes of a group."""
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(each.pid) == group and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each.cmdline())
    return found
