"""What comes from workers is what comes without them, whoever dies: two processes and a cluster of two."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from journals import entries
from making_adapters import random_adapter
from peft import LoraConfig
from squaring import Squares

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.groups import players
from lora_lab.analysis.coalitions.game import Game
from lora_lab.analysis.lines.connectivity import Interpolate
from lora_lab.analysis.merge_tables.table import CompareMerges
from lora_lab.analysis.questions import Evaluate, Shapley, Stability, Sweep
from lora_lab.errors import FileError, LoraLabError, LoraLabWarning, MismatchError, OptionError, TaskError
from lora_lab.games.coalitions import all_coalitions
from lora_lab.merging.sources import Sources
from lora_lab.merging.validation.search import Grid, Interval, search
from lora_lab.merging.validation.task_models import MergeModels
from lora_lab.results.result import Result
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.examples import Examples
from lora_lab.scoring.execution import Execution
from lora_lab.scoring.sharing import local as local_module
from lora_lab.scoring.sharing import ray as module
from lora_lab.scoring.sharing import workers as opening
from lora_lab.scoring.sharing.workers import open_workers
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.training.recipe import Recipe
from lora_lab.training.runs import Job, train_all

TARGETS = r"vit\.layers\.[0-3]\..*(q_proj|fc1)"
DIED = pytest.warns(LoraLabWarning, match=r"a worker died \(.+\); its batch is given to another")


@pytest.fixture(scope="module")
def local(forked_workers):
    with open_workers(2) as opened:
        yield opened


@pytest.fixture(scope="module")
def cluster():
    import ray.cloudpickle

    # workers of a cluster cannot import the tests
    ray.cloudpickle.register_pickle_by_value(sys.modules[Squares.__module__])
    with open_workers(ray="local:2") as opened:
        yield opened


@pytest.fixture(params=["local", "cluster"])
def workers(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder, task = tmp_path_factory.mktemp("distribute"), Digits("relabel")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS)
    made = [random_adapter(task, folder / f"a{seed}", config, seed=seed, scale=0.06) for seed in (0, 1)]
    return [replace(a, record={"task": task.record, "method": "lora", "seed": i}) for i, a in enumerate(made)]


def game_of(adapter, **execution):
    evaluator = Evaluator([adapter], Digits("relabel"), Execution(**execution), split="validation", examples=60)
    return Game(evaluator, players(adapter))


def test_shapley_values_are_the_same(workers, pair):
    options = {"worth": "loss", "estimator": "antithetic", "samples": 4, "examples": 60}
    costs = []
    found = Shapley(**options).run(pair, Digits("relabel"), Execution(workers=workers, confirm=costs.append))
    assert found.columns == Shapley(**options).run(pair, Digits("relabel")).columns
    assert found.provenance["workers"] == 2
    assert found.provenance["dtype"] == "float32"
    assert found.summary["adapters"][0]["engine"]["block_evaluations"] > 0
    assert costs[0].seconds > 0


def test_coalitions_go_through_passes_together_there_too(local, pair):
    coalitions = all_coalitions(4)
    found = game_of(pair[0], workers=local, coalitions_at_once=5)
    np.testing.assert_allclose(found(coalitions), game_of(pair[0])(coalitions), rtol=1e-6)
    assert found.evaluator.effort.apart is None
    alone = game_of(pair[0], workers=local)
    alone(coalitions)
    assert found.evaluator.effort.computed > alone.evaluator.effort.computed  # the first passes are tried


def test_stability_is_the_same(local, pair):
    options = {"players": {"low": r"layers\.[01]", "high": r"layers\.[23]"}, "samples": 3, "examples": 60}
    found, alone = (
        Stability(**options).run(pair[:1], Digits("relabel"), Execution(workers=each)) for each in (local, None)
    )
    assert found.columns == alone.columns
    assert found.summary == alone.summary


def test_sweeps_are_the_same_down_to_the_base_alone(local, pair):
    options = {"sparsities": [0.5, 1.0], "draws": 2, "examples": 40}
    told = []
    found = Sweep(**options).run(
        pair[:1], Digits("relabel"), Execution(workers=local, progress=lambda *n: told.append(n))
    )
    assert found.columns == Sweep(**options).run(pair[:1], Digits("relabel")).columns
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1]


def test_lines_are_the_same(local, pair):
    options = {"points": 3, "ratios": [[1, 2]], "split": "validation"}
    found, alone = (
        Interpolate(**options).run(pair, Digits("relabel"), Execution(workers=each)) for each in (local, None)
    )
    assert found.columns == alone.columns
    assert found.summary == alone.summary
    assert found.provenance["dtype"] == "float32"


def test_scores_of_adapters_and_their_base_are_the_same(local, pair):
    told = []
    found, alone = (
        Evaluate().run(pair, Digits("relabel"), Execution(workers=each, progress=lambda *n: told.append(n)))
        for each in (local, None)
    )
    assert found.columns == alone.columns
    assert found.columns["adapter"] == ["(base model alone)", "a0", "a1"]
    assert told == [(1, 3), (2, 3), (3, 3)] * 2


def test_comparisons_are_the_same_and_say_what_cannot_be_merged(local, pair, tmp_path):
    config = LoraConfig(r=3, lora_alpha=4, target_modules=TARGETS)
    tasks = [Digits("identity"), Digits("mod3")]
    wide = random_adapter(tasks[1], tmp_path / "wide", config, scale=0.06)
    both = [
        replace(a, record={"task": task.record, "method": "lora", "seed": 0})
        for a, task in zip((pair[0], wide), tasks, strict=True)
    ]
    few = {"nulls": ("permuted",), "draws": 1, "replaced": ("all",)}
    question = CompareMerges(methods=("average", "dare", "factor-average"), coefficients=(0.5,), **few)
    on = Execution(workers=local, cache=tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        question.run(both, tasks, replace(on, progress=_interrupt_after(6)))
    found = question.run(both, tasks, on)
    alone = question.run(both, tasks)
    assert found.columns == alone.columns
    assert found.summary == alone.summary
    assert [row["merge"] for row in found.summary["skipped"]] == ["factor-average"]
    assert 0 < found.provenance["evaluations"] < alone.provenance["evaluations"]


@pytest.fixture(scope="module")
def tasks_of_their_own(pair):
    tasks = [Digits("identity"), Digits("mod3")]
    records = [{"task": task.record, "method": "lora", "seed": 0} for task in tasks]
    return Sources([replace(a, record=record) for a, record in zip(pair, records, strict=True)], tasks=tasks)


@pytest.mark.parametrize(
    ("method", "spaces", "pieces"),
    [
        ("ties", {"density": Grid((0.2, 1.0)), "coefficient": Grid((0.3, 1, 2))}, 2),
        ("average", {"coefficient": Grid((0.5, 1.0, 2.0))}, 2),  # one merge, its coefficients side by side
        ("average", {"coefficient": Interval(0.5, 2)}, 1),
        ("regmean", {"examples": Grid((4, 8))}, 2),
    ],
)
def test_searches_of_merges_are_the_same(local, tasks_of_their_own, monkeypatch, method, spaces, pieces):
    asked, told, of = [], [], local.map
    monkeypatch.setattr(local, "map", lambda *given: (asked.append(len(given[1])), of(*given))[1])
    monkeypatch.setattr(MergeModels, "score", None)
    there = search(tasks_of_their_own, method, spaces, on=Execution(workers=local, progress=lambda *n: told.append(n)))
    monkeypatch.undo()
    assert asked == [pieces]
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert there == search(tasks_of_their_own, method, spaces)


def test_a_search_whose_worker_is_killed_or_that_is_interrupted_comes_to_the_same(
    local, tasks_of_their_own, monkeypatch
):
    spaces = {"density": Grid((0.2, 0.5, 1.0)), "coefficient": Grid((0.5, 1))}
    here = search(tasks_of_their_own, "ties", spaces)
    with pytest.raises(KeyboardInterrupt):
        search(tasks_of_their_own, "ties", spaces, on=Execution(workers=local, progress=_interrupt_after(2)))
    asks, ask = [], local_module._Process.ask

    def dying(self, *given):
        ask(self, *given)
        asks.append(given)
        if len(asks) == 2:
            self._process.kill()

    monkeypatch.setattr(local_module._Process, "ask", dying)
    with DIED:
        there = search(tasks_of_their_own, "ties", spaces, on=Execution(workers=local))
    assert there == here
    assert len(asks) == 4


def test_a_search_refuses_for_workers_what_it_refuses_here(local, tasks_of_their_own):
    for on in (Execution(), Execution(workers=local)):
        with pytest.raises(OptionError, match="density is 2; a share"):
            search(tasks_of_their_own, "ties", {"density": Grid((0.5, 2))}, on=on)


def test_trainings_are_the_same_and_are_saved_here(workers, request, tmp_path):
    task = Digits("relabel").record
    recipes = [Recipe(method="coto", seed=seed, steps=6, batch_size=8) for seed in (0, 1)]
    there, here = (
        [Job(task, recipe, tmp_path / where / f"{recipe.seed}.safetensors") for recipe in recipes]
        for where in ("there", "here")
    )
    told = []
    logs = train_all(there, workers=workers, progress=lambda *n: told.append(n))
    steps = 6 if workers is request.getfixturevalue("local") else 1  # a cluster tells of whole trainings
    assert (1, 2 * steps) in told
    assert told[-1] == (2 * steps, 2 * steps)
    for job, log, own, same in zip(there, logs, here, train_all(here, processes=1), strict=True):
        assert log.columns == same.columns
        assert all(path.exists() for path in job.beside)
        a, b = Adapter.load(job.path), Adapter.load(own.path)
        assert a.record["recipe"] == b.record["recipe"]
        assert all(torch.equal(a.tensors[key], b.tensors[key]) for key in b.tensors)
    with pytest.raises(OptionError, match="one of the two"):
        train_all(there, workers=workers, processes=2, force=True)


def _interrupt_after(count):
    def progress(done, total):
        if done >= count:
            raise KeyboardInterrupt

    return progress


def test_a_worker_that_is_killed_in_mid_run_loses_nothing_and_doubles_nothing(workers, pair, tmp_path):
    victims = []

    def kill(done, total):
        if not victims:  # the other worker is in the middle of a batch
            victims.append(next(worker for worker in workers._workers if worker.place is not None))
            getattr(victims[0], "_process", victims[0]).kill()

    while len({process for process, _ in workers.map(Squares(tmp_path), [5] * 8)}) < 2:
        pass  # until both have started
    game = game_of(pair[0], workers=workers, cache=tmp_path, progress=kill)
    with DIED:
        worths = game(all_coalitions(4))
    assert len(victims) == 1
    assert (worths == game_of(pair[0])(all_coalitions(4))).all()
    assert game.evaluator.evaluated == 16


@pytest.mark.parametrize("stop", ["with workers", "without"])
def test_a_run_goes_on_where_it_was_with_other_numbers_of_workers(workers, pair, tmp_path, monkeypatch, stop):
    first = game_of(
        pair[0], workers=workers if stop == "with workers" else None, cache=tmp_path, progress=_interrupt_after(6)
    )
    with pytest.raises(KeyboardInterrupt):
        first(all_coalitions(4))
    known = first.evaluator.evaluated
    assert 6 <= known < 16
    monkeypatch.setattr(workers, "size", 1)
    again = game_of(pair[0], workers=workers, cache=tmp_path)
    assert (again(all_coalitions(4)) == game_of(pair[0])(all_coalitions(4))).all()
    assert again.evaluator.evaluated == 16 - known


def test_a_batch_whose_worker_dies_is_answered_by_another(workers, tmp_path):
    kept = []
    with DIED:
        found = workers.map(Squares(tmp_path), [1, -2, 3, 4], lambda item, answer: kept.append((item, answer[1])))
    assert [square for _, square in found] == [1, 4, 9, 16]
    assert sorted(kept) == [(-2, 4), (1, 1), (3, 9), (4, 16)]


def test_a_batch_that_ends_every_worker_is_given_up(workers, tmp_path):
    with (
        DIED,
        pytest.raises(LoraLabError, match=r"a batch of work ended 3 workers, the last one so: .*(died|exit code 1)"),
    ):
        workers.map(Squares(tmp_path), [666])
    assert workers.map(Squares(tmp_path), [5])[0][1] == 25


def test_a_worker_builds_once_and_keeps_one_model(workers, tmp_path):
    for _ in range(3):
        workers.map(Squares(tmp_path), [1])
    assert len(list(tmp_path.iterdir())) == 1
    workers.map(Squares(tmp_path, "others"), [1, 2, 3, 4])
    built = len(list(tmp_path.iterdir()))
    workers.map(Squares(tmp_path, "others"), [1])
    assert len(list(tmp_path.iterdir())) == built


@pytest.mark.parametrize("error", [FileError("a.csv: no such file"), OptionError("no"), TaskError("out of range")])
def test_errors_of_the_project_arrive_as_they_are(workers, tmp_path, error):
    with pytest.raises(type(error)) as raised:
        workers.map(Squares(tmp_path), [1, error, 2])
    assert str(raised.value) == str(error)
    assert len(workers.map(Squares(tmp_path), [1, 2, 3])) == 3


def test_other_errors_bring_the_traceback_of_the_worker(workers, tmp_path):
    with pytest.raises(ZeroDivisionError, match=r"(?s)division by 0\nin a worker:.*in answer.*ZeroDivisionError"):
        workers.map(Squares(tmp_path), [ZeroDivisionError("division by 0")])
    with pytest.raises(RuntimeError, match=r"UnportableError: 1 and 2"):
        workers.map(Squares(tmp_path), ["unportable"])


def test_a_setup_that_cannot_be_built_is_tried_again_when_it_is_asked_for_again(workers, tmp_path):
    for _ in range(2):
        with pytest.raises(OSError, match="nothing can be built"):
            workers.map(Squares(tmp_path, "impossible"), [1, 2])


def test_what_is_left_of_a_call_that_failed_does_not_answer_the_next(workers, tmp_path):
    def fail(item, answer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workers.map(Squares(tmp_path), [1, 2, 3], fail)
    assert [square for _, square in workers.map(Squares(tmp_path), [4, 5])] == [16, 25]


def test_workers_use_as_many_threads_as_the_driver(workers, tmp_path):
    assert workers.map(Squares(tmp_path), ["threads"]) == [torch.get_num_threads()]


def test_what_a_worker_reports_of_an_item_is_heard_before_its_answer(local, tmp_path):
    heard = []
    local.map(Squares(tmp_path), [3], lambda *told: heard.append("answer"), lambda *told: heard.append(told))
    assert heard == [(3, 1, 3), (3, 2, 3), (3, 3, 3), "answer"]


def test_processes_are_gone_when_the_context_ends(tmp_path):
    import psutil

    with open_workers(1) as none:
        assert none is None
    with open_workers(2, threads=3) as opened:
        ((process, _),) = opened.map(Squares(tmp_path), [5])
        assert opened.map(Squares(tmp_path), ["threads"]) == [3]
        assert psutil.pid_exists(process)
    assert not psutil.pid_exists(process)


def test_locks_that_a_library_makes_in_a_worker_go_with_it(tmp_path):
    """As those of tqdm's bars: what a killed process leaves in the system is warned of when the command ends."""
    with open_workers(2) as opened:
        (name,) = opened.map(Squares(tmp_path), ["lock"])
    assert name is None  # nothing by which the system would keep it


def test_workers_that_cannot_be_started_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(local_module, "_work", os._exit)
    with open_workers(2) as opened, pytest.raises(LoraLabError, match="workers cannot be started: exit code 1"):
        opened.map(Squares(tmp_path), [1, 2])


def test_workers_take_turns_with_the_gpus_that_this_process_sees(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local_module._gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert local_module._gpus() == ["3", "GPU-5"]


@pytest.mark.parametrize(
    ("options", "text"),
    [({"jobs": 0}, "0 jobs side by side"), ({"jobs": 2, "ray": "auto"}, "jobs counts processes of this machine")],
)
def test_workers_that_cannot_be_are_refused(options, text):
    with pytest.raises(OptionError, match=text), open_workers(**options):
        pass


def test_a_cluster_of_ones_own_listens_to_this_machine_alone(cluster, tmp_path):
    import psutil

    ((worker, _),) = cluster.map(Squares(tmp_path), [5])
    mine = psutil.Process()
    processes = [mine, *mine.children(recursive=True)]
    assert worker in [process.pid for process in processes]
    heard = [
        connection.laddr.ip
        for process in processes
        for connection in (getattr(process, "net_connections", None) or process.connections)(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(heard) > 3
    assert {ip.removeprefix("::ffff:") for ip in heard} <= {"127.0.0.1", "::1"}
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ


def test_batches_are_consecutive_a_few_a_worker_and_no_longer_than_asked(local):
    assert local.cut(range(16)) == [range(i, i + 2) for i in range(0, 16, 2)]
    assert local.cut(range(100), most=5) == [range(i, i + 5) for i in range(0, 100, 5)]
    assert local.cut([]) == []


def test_a_task_that_its_record_does_not_give_again_is_refused(local, pair):
    class Own(Digits):
        pass

    with pytest.raises(OptionError, match=r"task digits/relabel \(Own\) cannot be built again from its record"):
        Shapley().run(pair, Own("relabel"), Execution(workers=local))


def test_other_data_on_a_worker_is_refused():
    task = Digits("relabel")
    assert len(Examples.of(task, "test", 7).of_task(task)) == 7
    with pytest.raises(MismatchError, match="other data in the test split"):
        Examples.of(Digits("identity"), "test").of_task(task)


def test_without_ray_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(OptionError, match=r"^computing on a Ray cluster needs ray, .*: pip install 'lora-lab\[ray\]'$"),
        open_workers(ray="auto"),
    ):
        pass


@pytest.mark.parametrize("spec", ["local", "local:0", "local:-1", "local:x", "", "somewhere", "host:1/0"])
def test_a_cluster_that_cannot_be_is_refused(spec):
    with pytest.raises(OptionError, match="HOST:PORT of a running cluster, or local:N"), open_workers(ray=spec):
        pass


def fake_ray(init=None, *, connected=False, version="2.60.0"):
    return SimpleNamespace(__version__=version, init=init, is_initialized=lambda: connected, shutdown=lambda: None)


@pytest.mark.parametrize("spec", ["auto", "127.0.0.1:6379"])
@pytest.mark.parametrize("version", ["2.51.1", "2.40.0", "1.13.0"])
def test_a_ray_without_authentication_joins_no_cluster(monkeypatch, spec, version):
    monkeypatch.setitem(sys.modules, "ray", fake_ray(lambda **_: pytest.fail("it would connect"), version=version))
    with pytest.raises(OptionError, match=rf"Ray {version} lets anybody .*2\.52 or newer"), open_workers(ray=spec):
        pass


def test_a_cluster_of_ones_own_that_would_listen_to_the_network_is_refused(monkeypatch):
    fake = fake_ray(lambda **_: None)
    fake._private = SimpleNamespace(ray_constants=SimpleNamespace(ENABLE_RAY_CLUSTER=True))
    fake.nodes = lambda: [{"NodeManagerAddress": "192.0.2.2"}]
    monkeypatch.setitem(sys.modules, "ray", fake)
    with pytest.raises(OptionError, match=r"would listen to the network, on 192\.0\.2\.2"), open_workers(ray="local:2"):
        pass
    assert fake._private.ray_constants.ENABLE_RAY_CLUSTER is True


def test_nobody_at_the_address_is_one_line_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", fake_ray(lambda **_: pytest.fail("it would try for ten minutes")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        text = rf"ray 127.0.0.1:{port}: no cluster to be joined \(.*refused\)"
        with pytest.raises(OptionError, match=text), open_workers(ray=f"127.0.0.1:{port}"):
            pass


def test_no_cluster_is_one_line(monkeypatch):
    def init(**_):
        raise ConnectionError("Could not find any running Ray instance.\n  Please specify the one to connect to.")

    monkeypatch.setitem(sys.modules, "ray", fake_ray(init))
    with (
        pytest.raises(OptionError, match=r"no cluster to be joined .*`ray start --head` starts one"),
        open_workers(ray="auto"),
    ):
        pass


@pytest.mark.parametrize("spec", ["local:2", "localhost:6379"])
def test_a_process_has_one_cluster(monkeypatch, spec):
    monkeypatch.setitem(sys.modules, "ray", fake_ray(connected=True))
    with pytest.raises(OptionError, match="uses a Ray cluster already; auto takes that one"), open_workers(ray=spec):
        pass


def nodes(*resources):
    return SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": each} for each in resources])


@pytest.mark.parametrize(
    ("spec", "device", "resources", "expected"),
    [
        ("auto", None, [{"CPU": 8}, {"CPU": 6}], (3, "cpu", {"num_cpus": 4})),
        ("auto", None, [{"CPU": 2}, {"CPU": 3}], (1, "cpu", {"num_cpus": 3})),
        ("auto", None, [{"CPU": 1000}], (64, "cpu", {"num_cpus": 4})),
        ("auto", None, [{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 1}], (3, "cuda", {"num_cpus": 0, "num_gpus": 1})),
        ("auto/2", None, [{"GPU": 4}, {"GPU": 3}], (3, "cuda", {"num_cpus": 0, "num_gpus": 2})),
        ("auto", "cpu", [{"CPU": 8, "GPU": 2}], (2, "cpu", {"num_cpus": 4})),
        ("local:2", "cuda:0", [{"CPU": 2, "GPU": 1}], (2, "cuda", {"num_cpus": 0, "num_gpus": 0.5})),
        ("local:3", None, [{"CPU": 3}], (3, "cpu", {"num_cpus": 1})),
    ],
)
def test_workers_are_one_for_each_gpu_or_for_the_cores_that_the_threads_take(spec, device, resources, expected):
    assert module._shares(nodes(*resources), module._SPEC.fullmatch(spec), device, 4) == expected


@pytest.mark.parametrize(
    ("spec", "device", "text"),
    [
        ("auto", "cuda", "0 GPUs on the Ray cluster"),
        ("auto/2", None, "on GPUs are not to be had"),
        ("auto", "mps", "on mps are not to be had"),
    ],
)
def test_gpus_that_are_not_there_are_refused(spec, device, text):
    with pytest.raises(OptionError, match=text):
        module._shares(nodes({"CPU": 4}), module._SPEC.fullmatch(spec), device, 1)


def test_the_module_itself_loads_neither_torch_nor_ray():
    code = "import sys, lora_lab.scoring.sharing.workers; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def interrupted(command):
    """Exit code, standard error and number of known scores of a command that is interrupted in mid-run."""
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell in the background has it ignored
    )
    deadline = time.monotonic() + 120
    while len(entries(Path("out/.outcomes"))) < 14:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err, len(entries(Path("out/.outcomes")))


def test_an_interrupted_command_ends_its_cluster_and_goes_on_from_its_journal(cluster, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair[0].save("a.safetensors")
    command = [Path(sys.executable).with_name("lora-lab"), "shapley", "a.safetensors", "--players", "module"]
    command += ["--estimator", "exact", "--ray", "local:1"]
    code, err, known = 0, "", 0
    for _ in range(5):  # on a busy machine it may be done before it hears of the interrupt
        shutil.rmtree("out", ignore_errors=True)
        code, err, known = interrupted(command)
        if code:
            break
    assert code == 130
    assert err.splitlines()[-1] == "error: interrupted; nothing half-written was left"
    assert 14 <= known < 256

    evaluated = []
    keep = Evaluator._keep
    monkeypatch.setattr(Evaluator, "_keep", lambda self, *args: (evaluated.append(args), keep(self, *args)))
    monkeypatch.setattr(opening, "open_workers", lambda *_, **__: contextlib.nullcontext(cluster))
    from lora_lab.cli import main

    with pytest.raises(SystemExit) as ended:
        main(command[1:])
    assert not ended.value.code
    assert len(evaluated) == 256 - known
    assert np.isfinite(Result.load(Path("out/shapley.json")).columns["value"]).all()


def test_layers_are_chosen_by_workers_and_the_cost_is_asked_about(local, pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pair[0].save("a.safetensors")
    asked, of = [], local.map
    monkeypatch.setattr(local, "map", lambda *given: (asked.append(given), of(*given))[1])
    from lora_lab.cli import main

    def prune(output, *more):
        options = ["--keep", "top-shapley:2", "--samples", "2", "-o", output, *more]
        with pytest.raises(SystemExit) as ended:
            main(["prune", "a.safetensors", *options])
        return ended.value.code or 0, capsys.readouterr().err

    assert prune("here")[0] == 0
    monkeypatch.setattr(
        opening, "open_workers", lambda *given: contextlib.nullcontext(local if given[0] == 2 else None)
    )
    assert prune("there", "--jobs", "2")[0] == 0
    assert asked
    here, there = Adapter.load("here"), Adapter.load("there")
    assert len(here.sites) == 4
    assert set(there.sites) == set(here.sites)
    monkeypatch.setattr(Evaluator, "pace", 1e4)
    code, err = prune("slow")
    assert code == 1
    assert "error: this may take" in err
    assert not Path("slow").exists()


def test_a_search_of_merges_is_shared_out_and_its_cost_is_asked_about(
    local, tasks_of_their_own, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    paths = [str(a.save(tmp_path / f"{i}.safetensors")) for i, a in enumerate(tasks_of_their_own.adapters)]
    asked, of = [], local.map
    monkeypatch.setattr(local, "map", lambda *given: (asked.append(given), of(*given))[1])
    monkeypatch.setattr(
        opening, "open_workers", lambda *given: contextlib.nullcontext(local if given[0] == 2 else None)
    )
    from lora_lab.cli import main

    def merge(output, *more):
        with pytest.raises(SystemExit) as ended:
            main(["merge", *paths, "--search", "coefficient=0.5,2", "-o", output, *more])
        return ended.value.code or 0, capsys.readouterr().err

    assert merge("here.safetensors")[0] == 0
    assert not asked
    assert merge("there.safetensors", "--jobs", "2")[0] == 0
    assert asked
    assert Path("here.safetensors").read_bytes() == Path("there.safetensors").read_bytes()
    monkeypatch.setattr(Evaluator, "pace", 1e4)
    code, err = merge("slow.safetensors")
    assert code == 1
    assert "to be computed: up to 4 variants" in err
    assert "error: this may take" in err
    assert not Path("slow.safetensors").exists()
    assert merge("slow.safetensors", "--yes")[0] == 0
