"""A merged adapter as a file or folder that PEFT loads, checked against what was merged, with a card that says how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_lab import escape, files
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files.converting import same_bits, verify
from lora_lab.errors import OptionError
from lora_lab.files.ownership import METADATA
from lora_lab.merging.merged import Merged
from lora_lab.results.result import provenance


def save(
    merged: Merged,
    path: Path,
    *,
    inputs: Sequence[Path] = (),
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the adapter, check that the file gives exactly its ΔW, and put it in its place.

    A folder gets a README.md that tells how it was made, and with keep-own `heads/LABEL.safetensors` for each source.
    """
    files.refuse_existing(path, force=force, inputs=inputs)
    if path.suffix in (".bin", ".pt", ".pth", ".json"):
        raise OptionError(f"{path}: NAME.safetensors, or a name without an ending for a PEFT folder, is needed")
    lone = path.suffix == ".safetensors"
    if lone and merged.heads:
        raise OptionError(f"{path}: with heads kept apart, a folder is needed, not a lone file")
    adapter = recorded(merged, inputs).adapter
    progress(1, 3)
    with files.replacing(path) as beside:
        adapter.save(beside)
        if not lone:
            files.write_bytes(beside / "README.md", card(adapter).encode())
            for label, tensors in merged.heads.items():
                (beside / "heads").mkdir(exist_ok=True)
                mark = {"format": "pt", f"{METADATA}head": label}
                files.write_safetensors(beside / "heads" / f"{label}.safetensors", tensors, mark)
        progress(2, 3)
        if not same_bits(beside, adapter):  # another format, or a fault that is then told
            verify(beside, adapter)
    progress(3, 3)
    return path


def recorded(merged: Merged, inputs: Sequence[Path] = ()) -> Merged:
    """The merge with what its file records beside: versions, and the hashes of the files that it was made from."""
    made = merged.adapter.record["merge"]
    if "versions" in made:
        return merged
    here = provenance()
    made = {**made, "versions": here["versions"], "commit": here["commit"]}
    if inputs:
        hashes = [files.file_hash(file) if file.exists() else None for file in inputs]
        made["inputs"] = [{**entry, "sha256": h} for entry, h in zip(made["inputs"], hashes, strict=True)]
    return replace(merged, adapter=replace(merged.adapter, record={**merged.adapter.record, "merge": made}))


def card(adapter: Adapter) -> str:
    """The model card of a merged adapter."""
    import yaml

    made = adapter.record["merge"]
    front: dict[str, Any] = {
        "library_name": "peft",
        **({"base_model": adapter.base_model} if adapter.base_model else {}),
    }
    front["tags"] = ["lora", "merge", "lora-lab"]
    lines = [
        "---",
        *yaml.safe_dump(front, sort_keys=False, default_flow_style=None, width=4096).splitlines(),
        "---",
        "",
    ]
    lines += [f"# A merge by {made['method']}", "", "| | |", "|---|---|"]
    rows = {"options": ", ".join(f"{name} = {value}" for name, value in made["options"].items()) or "none"}
    rows["weights"] = words(made["weights"])
    if made["coefficient"] != 1:
        rows["coefficient"] = f"{made['coefficient']:g}"
    rows["rank"] = made["ranks"]
    rows["relative error of ΔW"] = f"{made['error']:.3g}"
    if made["heads"]:
        rows["heads"] = made["heads"]
    rows |= {
        name: made["versions"][name] for name in ("lora-lab", "peft", "torch") if made.get("versions", {}).get(name)
    }
    lines += [f"| {name} | {escape.markdown(text)} |" for name, text in rows.items()]
    lines += ["", "Merged from:", ""]
    for entry in made["inputs"]:
        task = entry.get("task")
        named = task.get("name", task.get("kind")) if isinstance(task, Mapping) else None
        about = [entry.get("method"), named and f"on {named}", entry.get("sha256") and f"sha256 {entry['sha256']}"]
        lines.append(f"* {escape.markdown(', '.join(str(part) for part in (entry['adapter'], *about) if part))}")
    return "\n".join(lines) + "\n"


def words(weights: Any) -> str:
    """Weights as a line of text."""
    if isinstance(weights, Mapping):
        return "; ".join(f"{name}: {', '.join(f'{w:g}' for w in listed)}" for name, listed in weights.items())
    return ", ".join(w if isinstance(w, str) else f"{w:g}" for w in weights)
