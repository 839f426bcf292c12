"""Training by several processes together, as torchrun starts them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import OptionError
from lora_lab.results.result import Result
from lora_lab.tasks.digits import Digits
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

STEPS = 16


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"],
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port"],
}


def together(tmp_path, launcher, *options):
    """A training by two processes."""
    launch = [sys.executable, "-m", *LAUNCHERS[launcher], str(free_port())]
    run = ["-m", "lora_lab.training", "--method", "coto", "--steps", str(STEPS), "--device", "cpu", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *run], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Trained adapters") == 1  # one of them speaks


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_as_one_with_the_same_batch(tmp_path, launcher):
    together(tmp_path, launcher, "--save-every", "8", "-o", "two.safetensors")
    both, log2 = Adapter.load(tmp_path / "two.safetensors"), Result.load(tmp_path / "two.train.json")
    alone, log = train(Digits("relabel"), Recipe(method="coto", steps=STEPS))
    assert list(log2.columns["mask"]) == list(log.columns["mask"])
    assert np.allclose(log2.columns["loss"], log.columns["loss"], rtol=1e-4)
    for name, update in alone.updates.items():
        assert (both.updates[name] - update).norm() <= 1e-3 * max(update.norm(), 1e-3)
    assert both.record["recipe"] == {**alone.record["recipe"], "save_every": 8}
    assert Adapter.load(tmp_path / "two.checkpoints" / "checkpoint-8").record["step"] == 8


def test_two_processes_try_several_settings(tmp_path):
    together(tmp_path, "torchrun", "--lr", "1e-3,1e-2", "-o", "best.safetensors")
    tried = Result.load(tmp_path / "best.tuning.json")
    assert tried.columns["learning_rate"] == [1e-3, 1e-2]
    best = Adapter.load(tmp_path / "best.safetensors")
    assert best.record["recipe"]["learning_rate"] == tried.rows(chosen=True)[0]["learning_rate"]


def test_a_run_that_was_killed_outright_goes_on_to_the_same_adapter(tmp_path):
    options = ["--steps", "160", "--save-every", "10", "-o", str(tmp_path / "cut.safetensors")]
    command = [sys.executable, "-m", "lora_lab.training", "--method", "coto", "--device", "cpu", *options]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "cut.checkpoints" / "checkpoint-30" / "trainer_state.json").exists():
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "cut.safetensors").exists()
    assert subprocess.run(command, capture_output=True).returncode == 0
    kept = sorted(int(p.name[11:]) for p in (tmp_path / "cut.checkpoints").glob("checkpoint-*"))
    assert kept == list(range(10, 161, 10))
    whole, log = train(Digits("relabel"), Recipe(method="coto", steps=160))
    resumed = Adapter.load(tmp_path / "cut.safetensors")
    assert all(torch.equal(tensor, resumed.tensors[key]) for key, tensor in whole.tensors.items())
    assert Result.load(tmp_path / "cut.train.json").columns == log.columns


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(OptionError, match="a batch of 16 cannot be shared out evenly among 3 processes"):
        train(Digits("relabel"), Recipe(method="lora", steps=2))


def test_a_logger_that_is_not_there_is_named():
    with pytest.raises(OptionError, match="--report-to nonsense"):
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
    run = [sys.executable, "-c", "from lora_lab.cli import main; main()", "train", "--seeds", "0-1"]
    options = ["--steps", "100000", "--save-every", "20", "--jobs", "2", "-o", "runs"]
    process = subprocess.Popen(
        [*run, *options],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell in the background has it ignored
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("runs/*.checkpoints/checkpoint-20"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    send(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
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
