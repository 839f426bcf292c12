"""Merges that are written as they go: little in memory, and what a killed run has made is not made again."""

import contextlib
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from making_adapters import PREFIX, lora, write
from making_processes import server

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files import reading
from lora_lab.errors import FileError, LoraLabNote
from lora_lab.files.resuming import place_of
from lora_lab.merging import merged as merging
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources
from lora_lab.merging.writing import spool as spooling
from lora_lab.merging.writing.export import save
from lora_lab.merging.writing.spool import spooled

MODULES = [f"layers.{i}.q" for i in range(9)]
RESUMED = ("task-arithmetic", "ties", "knots", "tsv", "della")
OPTIONS = {"della": {"seed": 3}}
SETTINGS = {"coefficient": 0.7, "rank": 4, "exact": False, "heads": None, "dtype": None, "trials": None}


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Adapters as of large files, and every module put on the disk as it comes."""
    monkeypatch.setattr(reading, "_AT_ONCE", 0)
    monkeypatch.setattr(spooling, "_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # which takes most of the time


def adapters(folder, seeds=(0, 1, 2)):
    made = []
    for seed in seeds:
        tensors = {}
        for i, name in enumerate(MODULES):
            tensors |= lora(name, rank=3, rows=40 + i, columns=30, seed=10 * seed + i, dtype=torch.bfloat16)
        made.append(write(folder / str(seed), tensors, r=3, lora_alpha=6))
    return made


def run(paths, path, method, progress=None, **settings):
    """A merge written to `path`."""
    sources, options, settings = Sources(list(map(Adapter.load, paths))), OPTIONS.get(method, {}), SETTINGS | settings
    with spooled(path, sources, method, options, settings) as spool:
        made = merge(sources, method, options=options, progress=progress, spool=spool, jobs=1, **settings)
        save(made, path)


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _die_after(folder, paths, method, modules):
    """In a process of its own: a run that is killed when so many modules are merged."""
    reading._AT_ONCE, spooling._SECONDS = 0, 0.0

    def die(done, total):
        if done == modules:
            os.kill(os.getpid(), signal.SIGKILL)

    run(paths, folder / "out", method, die)


@pytest.mark.parametrize("method", RESUMED)
def test_a_merge_that_is_killed_goes_on_where_it_was_to_the_same_end(tmp_path, monkeypatch, method):
    paths = adapters(tmp_path)
    run(paths, tmp_path / "whole", method)
    at = random.Random(method).randrange(1, len(MODULES))
    process = server().Process(target=_die_after, args=(tmp_path, paths, method, at))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    finish, again = merging._finished, []
    monkeypatch.setattr(merging, "_finished", lambda *args: again.append(args[-1]) or finish(*args))
    with pytest.warns(LoraLabNote, match=rf"out: {at} of 9 modules are merged already, by a run that was ended before"):
        run(paths, tmp_path / "out", method)
    assert [what.rpartition(" ")[2] for what in again] == MODULES[at:]
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not place_of(tmp_path / "out").exists()


def interrupted(paths, path, method, after=4):
    class EndError(Exception):
        pass

    def stop(done, _):
        if done == after:
            raise EndError

    with pytest.raises(EndError):
        run(paths, path, method, stop)
    assert len(list(place_of(path).glob("checkpoint/*.safetensors"))) == after


@pytest.mark.parametrize("other", ["adapter", "alpha", "settings", "code", "damage", "method"])
def test_what_was_merged_otherwise_is_merged_anew(tmp_path, monkeypatch, other):
    paths, settings, method = adapters(tmp_path), {}, "task-arithmetic"
    interrupted(paths, tmp_path / "out", method)
    if other == "adapter":
        adapters(tmp_path, [7])
        os.replace(tmp_path / "7" / "adapter_model.safetensors", tmp_path / "0" / "adapter_model.safetensors")
    elif other == "alpha":
        config = paths[0] / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 6', '"lora_alpha": 12'))
    elif other == "settings":
        settings["coefficient"] = 0.6
    elif other == "method":
        method = "average"
    elif other == "code":
        monkeypatch.setattr(spooling, "of_transforms", lambda: "another")
    else:
        shard = sorted(place_of(tmp_path / "out").glob("checkpoint/*.safetensors"))[0]
        os.truncate(shard, shard.stat().st_size - 1)
    done = []
    with pytest.warns(LoraLabNote) if other == "damage" else contextlib.nullcontext():
        run(paths, tmp_path / "out", method, lambda i, _: done.append(i), **settings)
    assert done == list(range(4 if other == "damage" else 1, 10))  # three shards were whole
    run(paths, tmp_path / "again", method, **settings)
    assert content(tmp_path / "out") == content(tmp_path / "again")


def test_a_quick_merge_leaves_nothing_beside_it_even_when_it_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(spooling, "_SECONDS", 60.0)
    paths = adapters(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())

    def fail(done, _):
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(paths, tmp_path / "out", "cat", fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_two_runs_do_not_write_one_output(tmp_path):
    paths = adapters(tmp_path)

    def another(done, _):
        if done == 2:
            run(paths, tmp_path / "out", "cat")

    with pytest.raises(FileError, match=r"out: another process is writing it$"):
        run(paths, tmp_path / "out", "cat", another)


def test_an_adapter_that_is_cut_short_meanwhile_is_one_line(tmp_path):
    paths = adapters(tmp_path)
    file = paths[1] / "adapter_model.safetensors"

    def cut(done, _):
        if done == 2:
            os.truncate(file, file.stat().st_size - 1)

    with pytest.raises(FileError, match=r"1/adapter_model\.safetensors: changed while it was being read$"):
        run(paths, tmp_path / "out", "cat", cut)
    assert not (tmp_path / "out").exists()


LARGE = """
import resource, sys, torch
from pathlib import Path
from lora_lab.adapters.files import reading
from lora_lab.adapters.adapter import Adapter
from lora_lab.merging import merged
from lora_lab.merging.writing import spool
from lora_lab.merging.writing.export import save
from lora_lab.merging.sources import Sources
from lora_lab.pruning.ranks import prune_rank

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

*paths, out = map(Path, sys.argv[1:])
torch.set_num_threads(1)
spool.MOST, reading._AT_ONCE = 2**24, 0
Adapter.load(paths[0].parent / "small").total_norm  # what is imported and set up once
before = peak()
sources = Sources([Adapter.load(path) for path in paths])
settings = {"coefficient": 1.0, "rank": None, "exact": False, "heads": None, "dtype": None, "trials": None}
with spool.spooled(out, sources, "cat", {}, settings) as made:
    save(merged.merge(sources, "cat", spool=made, **settings), out)
print(peak() - before)
before = peak()
save_to = out.with_name("pruned")
prune_rank(Adapter.load(paths[0]), rank=32).adapter.save(save_to)
print(peak() - before)
"""


def test_large_adapters_are_merged_and_pruned_in_the_memory_of_one(tmp_path):
    """Four files of 49 MB of a 70B model's shapes; in a process of its own, since peaks never fall: four seconds."""
    shapes = {"q": (8192, 8192), "gate": (28672, 8192), "up": (28672, 8192), "down": (8192, 28672)}
    tensors = {}
    for name, (rows, columns) in shapes.items():
        A, B = lora(rank=64, rows=rows, columns=columns, dtype=torch.bfloat16).values()
        for i in range(3):
            place = f"{PREFIX}layers.{i}.{name}"
            tensors |= {f"{place}.lora_A.weight": A.clone(), f"{place}.lora_B.weight": B.clone()}
    for seed in range(4):
        write(tmp_path / str(seed), tensors, r=64, lora_alpha=64)
    write(tmp_path / "small", lora())
    size = (tmp_path / "0" / "adapter_model.safetensors").stat().st_size
    command = [sys.executable, "-c", LARGE, *(tmp_path / str(seed) for seed in range(4)), tmp_path / "out"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    merged, pruned = map(int, said.stdout.split())
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size > 3.9 * size
    assert merged < 2 * size
    assert pruned < 2 * size
