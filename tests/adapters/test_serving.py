"""What servers take: one rank and one scale with the same ΔW, and what they cannot take refused by name."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files.serving import SERVERS, fitted, server, servers, uniform
from lora_lab.errors import AdapterError, LoraLabError, OptionError, TunerError

Q, K, V = (f"model.layers.{i}.self_attn.{p}_proj" for i, p in ((0, "q"), (0, "k"), (1, "v")))
PREFIX = "base_model.model."
DOCS = Path(__file__).parents[2] / "docs" / "servers.md"


def adapter(tmp_path, ranks, *, dtype=torch.float32, extra=None, **config):
    """Modules of these ranks, written as PEFT writes them and read again."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = dict(extra or {})
    for module, rank in ranks.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, 16).to(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(12, rank).to(dtype)
    first = next(iter(ranks.values()))
    plain = {
        "peft_type": "LORA",
        "r": first,
        "lora_alpha": 16,
        "target_modules": sorted(ranks),
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != first},
        **config,
    }
    tmp_path.mkdir(exist_ok=True)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(plain))
    return Adapter.load(tmp_path)


def as_a_server_reads(folder):
    """ΔW by r and lora_alpha alone, as SGLang and, with each tensor's own rank, llama.cpp have it."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    deltas = {}
    for key, A in tensors.items():
        if ".lora_A." in key:
            B = tensors[key.replace("lora_A", "lora_B")]
            assert len(A) == B.shape[1] == config["r"]
            scale = config["lora_alpha"] / config["r"]
            deltas[key.removeprefix(PREFIX).removesuffix(".lora_A.weight")] = scale * B.double() @ A.double()
    return deltas


@given(
    ranks=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    alpha=st.sampled_from([1, 3, 16, 0.5]),
    alphas=st.dictionaries(st.sampled_from([Q, K, V]), st.sampled_from([2, 7, 32]), max_size=3),
    rslora=st.booleans(),
    name=st.sampled_from(["vllm", "sglang", "llamacpp"]),
)
@settings(max_examples=25, deadline=None)
def test_a_server_that_reads_r_and_alpha_alone_gets_the_same_update(
    tmp_path_factory, ranks, alpha, alphas, rslora, name
):
    folder = tmp_path_factory.mktemp("uneven")
    given_ = adapter(
        folder, dict(zip((Q, K, V), ranks, strict=True)), lora_alpha=alpha, alpha_pattern=alphas, use_rslora=rslora
    )
    made = fitted(given_, name).adapter
    config = made.config
    assert (config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (False, {}, {})
    made.save(folder / "made")
    served = as_a_server_reads(folder / "made")
    again = Adapter.load(folder / "made")
    for module, update in given_.updates.items():
        assert torch.allclose(served[module], update.delta().double(), rtol=1e-5, atol=1e-6)
        assert torch.allclose(again.updates[module].delta(), update.delta(), rtol=1e-5, atol=1e-6)


def test_what_has_one_rank_and_scale_stays_bit_for_bit(tmp_path):
    plain = adapter(tmp_path / "a", {Q: 4, K: 4})
    made = fitted(plain, "vllm")
    assert made.changes == ()
    assert all(torch.equal(made.adapter.tensors[key], tensor) for key, tensor in plain.tensors.items())


def test_changes_are_told_with_the_rounding(tmp_path):
    uneven = adapter(tmp_path / "a", {Q: 4, K: 2, V: 4}, dtype=torch.bfloat16, alpha_pattern={V: 5}, use_rslora=True)
    made, changes = uniform(uneven)
    assert [change.partition(" ")[0] for change in changes] == ["1", "2", "use_rslora"]
    assert "1 of 3 modules are filled with zeros to rank 4" in changes[0]
    (told,) = re.findall(r"rounded by at most ([\d.e-]+)", changes[1])
    worst = max(
        float((made.updates[m].delta() - u.delta()).norm() / u.delta().norm()) for m, u in uneven.updates.items()
    )
    assert 0 < worst < 2**-8
    assert float(told) < 2**-8
    assert uniform(uneven, 8)[0].config["r"] == 8
    with pytest.raises(OptionError, match="a module has rank 4, more than 2; prune it first"):
        uniform(uneven, 2)


def test_the_limit_that_the_server_must_be_started_for_is_said(tmp_path):
    assert fitted(adapter(tmp_path / "a", {Q: 16}), "vllm").advice == ()
    (told,) = fitted(adapter(tmp_path / "b", {Q: 40}), "vllm").advice
    assert told == "start it with --max-lora-rank 64, since the rank is 40"
    with pytest.raises(OptionError, match="takes ranks up to 512; this adapter has 600: prune it first"):
        fitted(adapter(tmp_path / "c", {Q: 600}), "vllm")


HEAD = {f"{PREFIX}lm_head.weight": torch.ones(3, 16)}


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("vllm", {"extra": HEAD, "modules_to_save": ["lm_head"]}, "takes no whole tensors but of classifier, score"),
        ("sglang", {"extra": HEAD, "modules_to_save": ["lm_head"]}, "takes no whole tensors, and this adapter has"),
        ("llamacpp", {"init_lora_weights": "pissa"}, "takes plain LoRA only: .*PiSSA"),
    ],
)
def test_what_a_server_cannot_take_is_refused_by_name(tmp_path, name, options, told):
    with pytest.raises((AdapterError, TunerError), match=f"{name} .*{told}"):
        fitted(adapter(tmp_path / "a", {Q: 4}, **options), name)


def test_a_classifier_goes_to_vllm(tmp_path):
    head = {f"{PREFIX}score.weight": torch.ones(3, 16)}
    made = fitted(adapter(tmp_path / "a", {Q: 4}, extra=head, modules_to_save=["score"]), "vllm").adapter
    assert made.others == [f"{PREFIX}score.weight"]


def test_names_are_listed_for_sglang(tmp_path):
    pattern = adapter(tmp_path / "a", {Q: 4, V: 4}, target_modules=r".*\.[qv]_proj", rank_pattern={})
    made = fitted(pattern, "sglang")
    assert made.adapter.config["target_modules"] == [Q, V]
    assert "target_modules is a list of the modules' names" in made.changes


def test_an_unknown_server_is_told_with_the_nearest():
    with pytest.raises(LoraLabError, match="vllm"):
        server("vlm")


def test_the_docs_show_the_table():
    assert tuple(servers()) == SERVERS
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in DOCS.read_text().splitlines()]
    shown = {row[0]: row[1:] for row in rows if row[0] in SERVERS and len(row) == 7}
    for name, facts in servers().items():
        assert shown[name] == [
            facts.version,
            facts.format,
            "yes" if facts.uniform else "no",
            ", ".join(map(str, facts.ranks)) or "any",
            "yes" if facts.dora else "no",
            "all" if facts.saved is None else ", ".join(facts.saved) or "none",
        ]


def test_merge_and_prune_write_for_a_server(tmp_path, lora_lab):
    for name, ranks in (("a", {Q: 4, K: 2}), ("b", {Q: 3, K: 3})):
        adapter(tmp_path / name, ranks)
    code, out, err = lora_lab("merge", "a", "b", "-o", "merged", "--for", "vllm", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["changes"]
    merged = as_a_server_reads(tmp_path / "merged")
    a, b = (Adapter.load(tmp_path / name).updates for name in "ab")
    for module in (Q, K):
        assert torch.allclose(merged[module].float(), a[module].delta() + b[module].delta(), atol=1e-5)
    assert Adapter.load(tmp_path / "merged").record["fitted"]["for"] == "vllm"
    code, out, err = lora_lab("prune", "a", "--rank", "3", "-o", "small", "--uniform-rank", "--json")
    assert code == 0, err
    assert json.loads(out)["changes"] == [
        "1 of 2 modules are filled with zeros to rank 3",
        "1 of 2 modules hold in B how their scale differs from 8 (exactly)",
    ]
    assert as_a_server_reads(tmp_path / "small")[K].shape == (12, 16)
    code, _, err = lora_lab("merge", "a", "b", "-o", "merged.safetensors", "--for", "vllm")
    assert code != 0
    assert "vllm takes a folder" in err
    assert not (tmp_path / "merged.safetensors").exists()
