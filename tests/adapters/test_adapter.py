import json
import os
import re
from pathlib import Path

import pytest
import torch
from making_adapters import PREFIX, lora, product, write
from safetensors.torch import load_file, save_file

from lora_lab import hub
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files.reading import inspect
from lora_lab.adapters.files.writing import CONFIG_KEY, RECORD_KEY
from lora_lab.adapters.formats.sites import Site
from lora_lab.adapters.lowrank import LowRank
from lora_lab.adapters.models.bases import same_modules
from lora_lab.errors import AdapterError, FileError, LoraLabWarning, MismatchError, OptionError, TaskError
from lora_lab.hub import base_model

Q, K = "layers.0.q_proj", "layers.0.k_proj"


def refusal(path, **options) -> str:
    """The one line with which a path is refused."""
    with pytest.raises(FileError) as caught:
        Adapter.load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# where an adapter is found


def test_a_folder_its_config_and_its_weights_all_name_the_adapter(tmp_path):
    folder = write(tmp_path / "a", lora())
    for path in (folder, folder / "adapter_config.json", folder / "adapter_model.safetensors", str(folder)):
        assert Adapter.load(path).sites[Q].scale == 2


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    write(tmp_path / "a", lora())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Adapter.load("~/a").sites
    assert Adapter.load("~/a", config="~/a/adapter_config.json").sites


def test_a_bin_file_is_read_with_its_neighbour_and_safetensors_come_first(tmp_path):
    folder = write(tmp_path, lora(seed=1))
    torch.save(lora(seed=2), folder / "adapter_model.bin")
    torch.testing.assert_close(Adapter.load(folder).updates[Q].delta(), 2 * product(lora(seed=1)))
    (folder / "adapter_model.safetensors").unlink()
    for path in (folder, folder / "adapter_model.bin"):
        torch.testing.assert_close(Adapter.load(path).updates[Q].delta(), 2 * product(lora(seed=2)))
    (folder / "adapter_model.bin").rename(folder / "other.pt")
    assert Adapter.load(folder / "other.pt").sites[Q].scale == 2


def test_what_is_not_there_is_said(tmp_path):
    assert refusal(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such file or folder"
    assert "no such file or folder" in refusal("nowhere.safetensors")
    assert "no such file or folder" in refusal("a/b/c")
    (tmp_path / "notes.txt").write_text("hello")
    assert "not an adapter; a PEFT folder, a .safetensors or a .bin file is needed" in refusal(tmp_path / "notes.txt")


def test_a_folder_without_an_adapter_says_what_it_lacks(tmp_path):
    assert "no adapter_model.safetensors, no adapter_model.bin, no pytorch_lora_weights.safetensors" in refusal(
        tmp_path
    )
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert "a whole model, not an adapter" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model_index.json"])
def test_a_folder_of_a_sharded_model_or_a_pipeline_is_named(tmp_path, name):
    (tmp_path / name).write_text("{}")
    for i in (1, 2):
        save_file({"w": torch.ones(1)}, tmp_path / f"model-{i}-of-2.safetensors")
    assert "a whole model, not an adapter" in refusal(tmp_path)


def test_the_one_file_of_a_folder_is_read_whatever_its_name_and_several_are_listed(tmp_path):
    save_file(lora(), tmp_path / "style_v2.safetensors")
    with pytest.warns(LoraLabWarning) as told:
        assert list(Adapter.load(tmp_path).sites) == [Q]
    assert "the one safetensors file in it is read: style_v2.safetensors" in str(told[0].message)
    save_file(lora(), tmp_path / "style_v1.safetensors")
    assert "none by an adapter's usual name: style_v1.safetensors, style_v2.safetensors; name one" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"model.q_proj.weight": torch.ones(2, 2), "norm.bias": torch.ones(2)}, "a whole model, not an adapter"),
        ({"emb_params": torch.ones(2, 8)}, "embeddings of new words .textual inversion"),
        ({"model.q_proj.hada_w9": torch.ones(2, 2)}, "another tuner's file.*peft_type"),
    ],
)
def test_what_a_file_holds_instead_of_an_adapter_is_said(tmp_path, tensors, told):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match=told):
        Adapter.load(tmp_path / "x.safetensors")


def test_a_folder_of_adapters_lists_them(tmp_path):
    for name in ("task-b", "task-a"):
        write(tmp_path / name, lora())
    assert "no adapter itself, but holds some: task-a, task-b; name one of them" in refusal(tmp_path)
    assert Adapter.load(tmp_path / "task-a").label == "task-a"


def test_of_a_run_the_last_checkpoint_is_read_and_told(tmp_path):
    for step in (9, 10, 100):
        write(tmp_path / f"checkpoint-{step}", lora(seed=step))
    (tmp_path / "checkpoint-100" / "adapter_model.safetensors").unlink()  # a save that broke off
    write(tmp_path / "checkpoint-best", lora(seed=7))
    with pytest.warns(LoraLabWarning, match="its last checkpoint is read: checkpoint-10"):
        adapter = Adapter.load(tmp_path)
    torch.testing.assert_close(adapter.updates[Q].delta(), 2 * product(lora(seed=10)))
    assert inspect(tmp_path / "checkpoint-9").format == "trainer-checkpoint"


def test_a_finished_adapter_comes_before_its_checkpoints(tmp_path):
    write(tmp_path / "checkpoint-10", lora(seed=1))
    write(tmp_path, lora(seed=2))
    torch.testing.assert_close(Adapter.load(tmp_path).updates[Q].delta(), 2 * product(lora(seed=2)))


# the hub


def test_without_a_network_a_hub_id_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    text = refusal("someone/adapter")
    assert text.startswith("someone/adapter: no such file or folder here, and the Hugging Face hub gave none (")
    assert text.endswith("download it where there is a network and give the folder")


def test_a_hub_that_cannot_be_connected_to_is_asked_once(tmp_path, monkeypatch, capfd):
    asked = []

    def refuse(address, timeout):
        asked.append(address)
        raise OSError("no route")

    hub._within_reach.cache_clear()
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.create_connection", refuse)
    for _ in range(2):
        assert "gave none (it cannot be connected to, and the cache has none); download" in refusal("someone/adapter")
    with pytest.raises(TaskError, match=r"'someone/base' cannot be loaded .*; give a folder"):
        base_model("someone/base")
    assert len(asked) == 1
    assert "Retrying" not in "".join(capfd.readouterr())
    hub._within_reach.cache_clear()


def test_a_hub_id_in_the_local_cache_loads_by_branch_and_commit(tmp_path, monkeypatch):
    cached, commit = tmp_path / "models--someone--adapter", "0123456789abcdef0123456789abcdef01234567"
    write(cached / "snapshots" / commit, lora())
    for branch in ("main", "v1"):
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / branch).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("someone/adapter", "someone/adapter@v1", f"someone/adapter@{commit}"):
        listing = inspect(name)
        assert (listing.format, list(listing.adapter.sites)) == ("hub", [Q])
        assert listing.adapter.source == name
    assert "gave none" in refusal("someone/adapter@v2")


def test_only_the_adapters_files_are_asked_of_the_hub(tmp_path, monkeypatch):
    asked = {}

    def download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(write(tmp_path, lora()))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert Adapter.load("someone/adapter@main").sites
    assert (asked["repo"], asked["revision"]) == ("someone/adapter", "main")
    ours, of_components = asked["allow_patterns"][:6], asked["allow_patterns"][6:]
    assert "unet/adapter_model.safetensors" in of_components
    assert {name.partition("/")[2] for name in of_components} == set(ours[:3])
    assert ours == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_model.bin",
        "pytorch_lora_weights.safetensors",
        "pytorch_lora_weights.bin",
        "adapters.safetensors",
    ]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A hub with one repository of these files, of which each download is noted."""
    asked, files = [], {}

    def download(repo, *, revision, allow_patterns):
        asked.append(allow_patterns)
        (tmp_path / "cache").mkdir(exist_ok=True)
        for name, content in files.items():
            if name in allow_patterns:
                (tmp_path / "cache" / name).write_bytes(content)
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: list(files))
    return asked, files


def test_a_repositorys_one_file_by_another_name_is_read_and_told(repository, tmp_path):
    asked, files = repository
    content = (write(tmp_path / "a", lora()) / "adapter_model.safetensors").read_bytes()
    config = (tmp_path / "a" / "adapter_config.json").read_bytes()
    files |= {"README.md": b"", "style_v2.safetensors": content, "adapter_config.json": config}
    listing = inspect("someone/style")
    assert (listing.format, list(listing.adapter.sites)) == ("hub", [Q])
    assert "the one safetensors file in it is read: style_v2.safetensors" in listing.warnings
    assert len(asked) == 2
    assert inspect("someone/style").adapter.sites.keys() == {Q}
    assert len(asked) == 3  # what is in the cache is not listed again


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a.safetensors", "b.safetensors"], "several safetensors files (a.safetensors, b.safetensors)"),
        (["README.md", "weights/a.safetensors"], "and no safetensors file"),
        (["model.safetensors"], "a whole model, not an adapter"),
    ],
)
def test_a_repository_without_one_such_file_is_refused_and_nothing_large_fetched(repository, names, told):
    asked, files = repository
    files |= dict.fromkeys(names, b"")
    text = refusal("someone/many")
    assert text.startswith("someone/many: ")
    assert told in text
    assert len(asked) == 1


def test_the_one_adapter_among_other_files_of_a_folder_is_read_and_told(tmp_path):
    folder = write(tmp_path / "a", lora())
    (folder / "adapter_model.safetensors").rename(folder / "style.safetensors")
    for name in ("embedding.safetensors", "model.safetensors"):
        save_file({"emb_params": torch.ones(2, 4), "layers.0.q_proj.weight": torch.ones(2)}, folder / name)
    listing = inspect(folder)
    assert listing.adapter.sites.keys() == {Q}
    assert "the one adapter among its 3 safetensors files is read: style.safetensors" in listing.warnings
    save_file(lora(K), folder / "other.safetensors")
    assert "a whole model" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "usual name: other.safetensors, style.safetensors; name one of them" in refusal(folder)


def test_a_local_folder_comes_before_the_hub(tmp_path, monkeypatch):
    write(tmp_path / "someone" / "adapter", lora())
    monkeypatch.chdir(tmp_path)
    assert inspect("someone/adapter").format == "peft"


# where its configuration is found


def test_a_lone_file_takes_its_config_from_the_option_then_its_header_then_beside_it(tmp_path):
    def config(alpha: int) -> str:
        return json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": alpha})

    file = tmp_path / "a.safetensors"
    save_file(lora(), file, {CONFIG_KEY: config(6)})
    (tmp_path / "adapter_config.json").write_text(config(8))
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "adapter_config.json").write_text(config(10))
    for given in (tmp_path / "given", tmp_path / "given" / "adapter_config.json"):
        assert Adapter.load(file, config=given).sites[Q].scale == 5
    assert Adapter.load(file).sites[Q].scale == 3
    save_file(lora(), file)
    assert Adapter.load(file).sites[Q].scale == 4


def test_a_folders_config_comes_before_the_header_of_its_weights(tmp_path):
    folder = write(tmp_path, lora())
    header = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 100})
    save_file(lora(), folder / "adapter_model.safetensors", {CONFIG_KEY: header})
    assert Adapter.load(folder).sites[Q].scale == 2
    (folder / "adapter_config.json").unlink()
    assert Adapter.load(folder).sites[Q].scale == 50


def test_without_a_config_alpha_is_given_or_assumed_to_be_each_rank(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({**lora(Q), **lora(K), **lora("layers.0.v_proj", rank=3)}, file)
    given = Adapter.load(file, alpha=12)
    assert {name: site.scale for name, site in given.sites.items()} == {K: 6, Q: 6, "layers.0.v_proj": 4}
    with pytest.warns(LoraLabWarning, match=r"no configuration found: lora_alpha is assumed equal to the rank"):
        assumed = Adapter.load(file)
    assert {site.scale for site in assumed.sites.values()} == {1}
    assert Adapter.load(assumed.save(tmp_path / "out")).sites == assumed.sites


def test_a_lone_dora_file_is_known_by_its_magnitudes(tmp_path):
    save_file({**lora(), f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(6)}, tmp_path / "a.safetensors")
    assert Adapter.load(tmp_path / "a.safetensors", alpha=4).config["use_dora"] is True


def test_of_two_adapters_in_a_lone_file_each_has_its_own_rank(tmp_path):
    save_file({**lora(name="one"), **lora(name="two", rank=3)}, tmp_path / "a.safetensors")
    for name, rank in (("one", 2), ("two", 3)):
        adapter = Adapter.load(tmp_path / "a.safetensors", alpha=6, adapter_name=name)
        assert (adapter.sites[Q].rank, adapter.sites[Q].scale) == (rank, 6 / rank)


def test_a_given_alpha_fills_a_gap_and_never_overrules_a_config(tmp_path):
    folder = write(tmp_path, lora(), lora_alpha=None)
    assert Adapter.load(folder, alpha=6).sites[Q].scale == 3
    folder = write(tmp_path, lora(), lora_alpha=4)
    assert Adapter.load(folder, alpha=4).sites[Q].scale == 2
    with pytest.warns(LoraLabWarning, match="alpha 6 is not used, the config says 4"):
        assert Adapter.load(folder, alpha=6).sites[Q].scale == 2


@pytest.mark.parametrize(("text", "reason"), [("{", "is not JSON"), ("[1]", "is not a JSON object")])
def test_a_broken_config_in_the_header_is_named(tmp_path, text, reason):
    save_file(lora(), tmp_path / "a.safetensors", {CONFIG_KEY: text})
    message = refusal(tmp_path / "a.safetensors")
    assert f"a.safetensors: {CONFIG_KEY} in its header {reason}" in message


def test_a_given_config_that_is_none_is_refused(tmp_path):
    folder = write(tmp_path / "a", lora())
    assert "nowhere: cannot be read" in refusal(folder, config=tmp_path / "nowhere")
    assert "not JSON but binary data" in refusal(folder, config=folder / "adapter_model.safetensors")


# what an adapter says of itself


def test_label_base_model_and_tuner_are_short_and_plain(tmp_path):
    folder = write(tmp_path / "run-1.5", lora(), base_model_name_or_path="org/base")
    adapter = Adapter.load(folder)
    assert (adapter.label, adapter.base_model, adapter.tuner) == ("run-1.5", "org/base", "LORA")
    for file in ("x.safetensors", "y.bin"):
        assert Adapter({}, {}, {}, source=f"somewhere/{file}").label == file[0]
    assert Adapter({}, {}, {}).label == "adapter"
    assert Adapter.load(write(folder, lora(), base_model_name_or_path="")).base_model is None


def test_the_total_norm_is_that_of_all_updates_together(tmp_path):
    adapter = Adapter.load(write(tmp_path, {**lora(Q, seed=1), **lora(K, seed=2)}))
    together = torch.cat([update.delta().flatten() for update in adapter.updates.values()])
    assert adapter.total_norm == pytest.approx(float(together.norm()), rel=1e-6)


def test_warnings_point_at_the_file_and_the_caller(tmp_path):
    folder = write(tmp_path, lora(), lora_alpha=None)
    with pytest.warns(LoraLabWarning) as caught:
        Adapter.load(folder)
    assert str(caught[0].message).startswith(f"{folder}: ")
    assert caught[0].filename == __file__


# saving


def everything(tmp_path: Path) -> Adapter:
    """An adapter with every dtype, a head, uneven ranks, and a record."""
    tensors = {
        **lora("layers.0.a", dtype=torch.float16),
        **lora("layers.0.b", dtype=torch.bfloat16, rank=3),
        **lora("layers.0.c", dtype=torch.float64),
        **lora("layers.0.d", dtype=torch.float8_e4m3fn),
        f"{PREFIX}embed.lora_embedding_A": torch.randn(2, 10),
        f"{PREFIX}embed.lora_embedding_B": torch.randn(6, 2),
        f"{PREFIX}head.weight": torch.arange(12.0).reshape(3, 4),
        f"{PREFIX}head.steps": torch.tensor(7),
    }
    folder = write(
        tmp_path / "in", tensors, rank_pattern={"b": 3}, alpha_pattern={"a": 1}, target_modules=[*"abcd", "embed"]
    )
    record = {"task": "digits", "seed": 3, "metrics": {"accuracy": 0.5, "loss": None}, "note": "λ"}
    save_file(tensors, folder / "adapter_model.safetensors", {RECORD_KEY: json.dumps(record)})
    return Adapter.load(folder)


@pytest.mark.parametrize("target", ["out", "out.safetensors", "new/folder/out"])
def test_saving_and_loading_gives_every_byte_the_config_and_the_record_back(tmp_path, target):
    adapter = everything(tmp_path)
    assert adapter.record["note"] == "λ"
    path = adapter.save(tmp_path / target)
    assert path == tmp_path / target
    again = Adapter.load(path)
    assert (again.config, again.record, again.sites) == (adapter.config, adapter.record, adapter.sites)
    assert set(again.tensors) == set(adapter.tensors)
    for key, tensor in adapter.tensors.items():
        other = again.tensors[key]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(other.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_the_same_adapter_is_written_to_the_same_bytes(tmp_path):
    adapter = everything(tmp_path)
    for end in ("", ".safetensors"):
        first, second = (
            adapter.save(tmp_path / f"1{end}"),
            Adapter.load(tmp_path / f"1{end}").save(tmp_path / f"2{end}"),
        )
        files = [Path(p) / "adapter_model.safetensors" if not end else p for p in (first, second)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_saved_folder_is_what_peft_reads(tmp_path):
    path = everything(tmp_path).save(tmp_path / "out")
    assert names(path) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((path / "adapter_config.json").read_text())["rank_pattern"] == {"b": 3}
    assert all(key.startswith(PREFIX) for key in load_file(path / "adapter_model.safetensors"))


def test_sets_and_enums_of_a_live_config_are_written_as_json(tmp_path):
    from peft import LoraConfig, TaskType

    config = LoraConfig(r=2, lora_alpha=4, target_modules={"q_proj", "k_proj"}, task_type=TaskType.CAUSAL_LM).to_dict()
    path = Adapter(lora(), config, {}).save(tmp_path / "out")
    again = Adapter.load(path)
    assert again.config["target_modules"] == ["k_proj", "q_proj"]
    assert (again.config["task_type"], again.tuner) == ("CAUSAL_LM", "LORA")


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_an_adapter_in_the_way_is_replaced_whole_and_only_by_force(tmp_path, target):
    old, new = (Adapter.load(write(tmp_path / str(seed), lora(seed=seed))) for seed in (1, 2))
    path = old.save(tmp_path / target)
    with pytest.raises(FileError, match=rf"{target}: exists already; `force` replaces it"):
        new.save(path)
    assert torch.equal(Adapter.load(path).updates[Q].B, old.updates[Q].B)
    new.save(path, force=True)
    assert torch.equal(Adapter.load(path).updates[Q].B, new.updates[Q].B)
    assert names(tmp_path) == sorted(["1", "2", target])


def test_an_adapter_may_replace_the_file_that_it_was_read_from(tmp_path):
    path = Adapter.load(write(tmp_path / "in", lora())).save(tmp_path / "out.safetensors")
    adapter = Adapter.load(path)
    adapter.with_updates({Q: adapter.updates[Q] * 2}, source="test").save(path, force=True)
    torch.testing.assert_close(Adapter.load(path).updates[Q].delta(), 4 * product(lora()))
    torch.testing.assert_close(adapter.updates[Q].delta(), 2 * product(lora()))


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_a_full_disk_leaves_the_old_adapter_and_nothing_else(tmp_path, monkeypatch, target):
    old, new = (Adapter.load(write(tmp_path / str(seed), lora(seed=seed))) for seed in (1, 2))
    path = old.save(tmp_path / target)

    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(FileError, match=rf"{target}.*: cannot be written \(No space left on device\)") as caught:
        new.save(path, force=True)
    assert ".part" not in str(caught.value)
    with pytest.raises(FileError):
        new.save(tmp_path / "fresh")
    assert torch.equal(Adapter.load(path).updates[Q].B, old.updates[Q].B)
    assert names(tmp_path) == sorted(["1", "2", target])


@pytest.mark.parametrize("inside", ["thesis.tex", "checkpoint-10"])
def test_force_replaces_adapters_and_no_other_folder(tmp_path, inside):
    adapter = Adapter.load(write(tmp_path / "in", lora()))
    for path in (tmp_path / "other", adapter.save(tmp_path / "run")):
        (path / inside).mkdir(parents=True)
        with pytest.raises(FileError, match=rf"{path.name}: holds more than an adapter \({inside}\), not replaced"):
            adapter.save(path, force=True)
        assert (path / inside).exists()
    (tmp_path / "empty").mkdir()
    assert Adapter.load(adapter.save(tmp_path / "empty", force=True)).sites


# with_updates


def test_new_updates_are_exact_and_everything_else_is_kept(tmp_path):
    adapter = everything(tmp_path)
    updates = {name: update.truncate(1)[0] if "b" in name else update * 3 for name, update in adapter.updates.items()}
    made = adapter.with_updates(updates, source="made here")
    assert made.source == "made here"
    assert (made.record, made.others) == (adapter.record, adapter.others)
    for target in ("out", "out.safetensors"):
        again = Adapter.load(made.save(tmp_path / target))
        for name, update in updates.items():
            torch.testing.assert_close(again.updates[name].delta(), update.delta())
            assert again.sites[name].rank == update.rank
            assert again.sites[name].scale == 1
            assert again.sites[name].kind == adapter.sites[name].kind
        assert torch.equal(again.tensors[f"{PREFIX}head.weight"], adapter.tensors[f"{PREFIX}head.weight"])


def test_rslora_and_patterns_do_not_scale_twice(tmp_path):
    tensors = {**lora(Q, rank=2), **lora(K, rank=3)}
    folder = write(tmp_path / "in", tensors, use_rslora=True, rank_pattern={"k_proj": 3}, alpha_pattern={"q_proj": 9})
    adapter = Adapter.load(folder)
    again = Adapter.load(adapter.with_updates(adapter.updates, source="same").save(tmp_path / "out"))
    for name, update in adapter.updates.items():
        torch.testing.assert_close(again.updates[name].delta(), update.delta())


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_every_kind_of_layer_survives(tmp_path, fan_in_fan_out):
    tensors = {
        **lora(Q),
        f"{PREFIX}e.lora_embedding_A": torch.randn(2, 10),
        f"{PREFIX}e.lora_embedding_B": torch.randn(6, 2),
        f"{PREFIX}c1.lora_A.weight": torch.randn(2, 4, 3),
        f"{PREFIX}c1.lora_B.weight": torch.randn(6, 2, 1),
        f"{PREFIX}c2.lora_A.weight": torch.randn(2, 4, 3, 5),
        f"{PREFIX}c2.lora_B.weight": torch.randn(6, 2, 1, 1),
        f"{PREFIX}c3.lora_A.weight": torch.randn(2, 4, 3, 1, 2),
        f"{PREFIX}c3.lora_B.weight": torch.randn(6, 2, 1, 1, 1),
    }
    adapter = Adapter.load(write(tmp_path / "in", tensors, fan_in_fan_out=fan_in_fan_out))
    doubled = {name: update + update for name, update in adapter.updates.items()}
    again = Adapter.load(adapter.with_updates(doubled, source="test").save(tmp_path / "out"))
    assert {name: site.kind for name, site in again.sites.items()} == {
        name: site.kind for name, site in adapter.sites.items()
    }
    for name, update in adapter.updates.items():
        torch.testing.assert_close(again.updates[name].delta(), 2 * update.delta())


def test_one_update_may_serve_several_modules(tmp_path):
    adapter = Adapter.load(write(tmp_path / "in", {**lora(Q), **lora(K)}))
    made = adapter.with_updates({Q: adapter.updates[Q], K: adapter.updates[Q]}, source="test")
    again = Adapter.load(made.save(tmp_path / "out"))
    torch.testing.assert_close(again.updates[K].delta(), adapter.updates[Q].delta())


def test_a_convolution_that_the_model_adapter_lacks_keeps_its_shape(tmp_path):
    adapter = Adapter.load(write(tmp_path / "in", lora(Q)))
    kernel = LowRank(torch.randn(2, 12), torch.randn(6, 2), (6, 4, 3))
    made = adapter.with_updates({"c": kernel}, source="test")
    again = Adapter.load(made.save(tmp_path / "out"))
    assert again.sites["c"].kind == "conv1d"
    torch.testing.assert_close(again.updates["c"].delta(), kernel.delta())


@pytest.mark.parametrize(
    ("kept", "base_modules", "targets"),
    [
        (["layers.0.q_proj"], ["layers.0.q_proj", "layers.1.q_proj"], ["layers.0.q_proj"]),
        (["q_proj"], ["q_proj", "layers.0.q_proj"], ["q_proj"]),
        (["layers.0.q_proj"], ["layers.0.q_proj", "vision.layers.0.q_proj"], ["layers.0.q_proj"]),
        (["a.b", "c"], ["a.b", "c", "x.a.b", "x.c", "ac"], ["a.b", "c"]),
    ],
)
def test_modules_that_were_left_out_do_not_come_back_in_peft(tmp_path, kept, base_modules, targets):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    tensors = {key: t for name in base_modules for key, t in lora(name).items()}
    adapter = Adapter.load(write(tmp_path / "in", tensors, target_modules=base_modules, layers_to_transform=[0]))
    made = adapter.with_updates({name: adapter.updates[name] for name in kept}, source="test")
    path = made.save(tmp_path / "out")
    config = LoraConfig.from_pretrained(str(path))
    assert [name for name in base_modules if check_target_module_exists(config, name)] == targets


def test_a_pattern_names_one_module_alone(tmp_path):
    ranks = {"layers.0.q_proj": 1, "x.layers.0.q_proj": 2, "layers.1.q_proj": 2, "layersx0.q_proj": 2}
    tensors = {key: t for name, rank in ranks.items() for key, t in lora(name, rank=2).items()}
    adapter = Adapter.load(write(tmp_path / "in", tensors))
    updates = {name: update.truncate(ranks[name])[0] for name, update in adapter.updates.items()}
    again = Adapter.load(adapter.with_updates(updates, source="test").save(tmp_path / "out"))
    assert {name: (site.rank, site.scale) for name, site in again.sites.items()} == {
        name: (rank, 1) for name, rank in ranks.items()
    }


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"use_qalora": True},
        {"kasa_config": {"beta": 1}},
        {"loftq_config": {"loftq_bits": 4}},
        {"target_parameters": ["x"]},
        {"peft_type": "LOHA", "alpha": 3},
    ],
)
def test_updates_of_any_adapter_are_written_as_plain_lora(tmp_path, config):
    site = Site(Q, "linear", {key.split(".")[-2]: key for key in lora()})
    adapter = Adapter(lora(), {"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM", **config}, {Q: site})
    update = LowRank(torch.randn(2, 4), torch.randn(6, 2))
    made = adapter.with_updates({Q: update}, source="test")
    again = Adapter.load(made.save(tmp_path / "out"))
    assert (again.tuner, again.config["task_type"]) == ("LORA", "CAUSAL_LM")
    torch.testing.assert_close(again.updates[Q].delta(), update.delta())


def test_replicated_layers_stay_replicated(tmp_path):
    adapter = Adapter.load(write(tmp_path, lora(), layer_replication=[[0, 2], [1, 3]]))
    made = adapter.with_updates(adapter.updates, source="test")
    assert made.config["layer_replication"] == [[0, 2], [1, 3]]


def test_an_adapter_of_no_modules_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="an adapter needs at least one module"):
        Adapter.load(write(tmp_path, lora())).with_updates({}, source="test")


def test_transforms_leave_the_adapter_as_it_was(tmp_path):
    adapter = everything(tmp_path)
    before = {key: t.clone() for key, t in adapter.tensors.items()}
    config = json.dumps(adapter.config)
    made = adapter.with_updates({name: update * 0 for name, update in adapter.updates.items()}, source="test")
    assert not made.total_norm
    assert json.dumps(adapter.config) == config
    assert all(
        torch.equal(t.view(torch.uint8), adapter.tensors[k].view(torch.uint8)) for k, t in before.items() if t.ndim
    )


# same_modules


def test_adapters_that_fit_together_pass(tmp_path):
    a = Adapter.load(write(tmp_path / "a", lora(), base_model_name_or_path="org/base"))
    b = Adapter.load(write(tmp_path / "b", lora(seed=1)))
    same_modules([a, b, a])
    same_modules([a])


@pytest.mark.parametrize(
    ("tensors", "config", "text"),
    [
        ({**lora(Q), **lora(K)}, {}, f"update different modules: {K}"),
        (
            {key: t for i in range(5) for key, t in lora(f"layers.{i}.v").items()},
            {},
            r"different modules: layers.0.q_proj, layers.0.v, layers.1.v \(6 in all\)",
        ),
        (lora(Q), {"layer_replication": [[0, 2]]}, r"different layers: layer_replication is None and \[\[0, 2"),
        ({f"{PREFIX}{Q}.hada_w1_a": torch.ones(1)}, {"peft_type": "LOHA"}, "different tuners: LORA and LOHA"),
    ],
)
def test_adapters_that_do_not_fit_are_named_with_what_differs(tmp_path, tensors, config, text):
    a = Adapter.load(write(tmp_path / "a", lora(), base_model_name_or_path="org/base"))
    b = Adapter.load(write(tmp_path / "b", tensors, **config))
    with pytest.raises(MismatchError, match=text) as caught:
        same_modules([a, b])
    assert f"{a.source} and {b.source}" in str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda adapter: adapter.save(3), "`path` is 3; a text or a path is needed"),
        (lambda adapter: adapter.save("x", format=3), "`format` is 3; a text is needed"),
        (lambda adapter: adapter.save("x", force="yes"), "`force` is 'yes'; True or False is needed"),
        (lambda adapter: adapter.with_updates(3, source="x"), "`updates` is 3; a mapping of names is needed"),
        (lambda adapter: adapter.with_updates({"a": 3}, source="x"), "`updates` is {'a': 3}; a mapping"),
    ],
)
def test_arguments_of_another_type_are_told_in_one_line(tmp_path, monkeypatch, call, words):
    monkeypatch.chdir(tmp_path)
    adapter = Adapter.load(write(tmp_path / "a", lora(), target_modules=["q_proj"]))
    with pytest.raises(OptionError, match=re.escape(words)):
        call(adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
