"""Trainer checkpoints of one run: stamped with its record, sealed, and found again when the run goes on."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lora_lab import files
from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import FileError, LoraLabWarning
from lora_lab.files.trust import Origin, seal
from lora_lab.results.result import finite

SEAL = "seal.json"
"""The file in a checkpoint that says what its other files are; written last, so one without it is not whole."""
_NEEDED = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
"""Without these a run would go on as another: from zeros, without momentum, or at another learning rate."""


class StampCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Seals every Trainer checkpoint, with the record in it: it can be analysed like a finished adapter."""

    def __init__(self, record: Mapping[str, Any], base: Mapping[str, Any]) -> None:
        self._record, self._base = record, base

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rewrite the header of the checkpoint's adapter, then write down what all files are."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter = Adapter.load(folder)
        stamped = dataclasses.replace(
            adapter,
            record={**self._record, "step": state.global_step},
            config={**adapter.config, **self._base},
            origin=Origin(own=True),
        )
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            for file in stamped.save(Path(beside) / "adapter").iterdir():
                file.replace(folder / file.name)
        held = {path.name: files.file_hash(path) for path in sorted(folder.iterdir()) if _is_sealed(path)}
        files.write_json(folder / SEAL, _sealed({"step": state.global_step, "files": held}))


def _sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """With the seal of this user's key: what goes on from a checkpoint is signed as the user's own."""
    return {**content, "seal": seal(json.dumps(content, sort_keys=True).encode())}


def _is_sealed(path: Path) -> bool:
    """Other processes may still write the states of their random generators."""
    return path.is_file() and path.name != SEAL and not path.name.startswith("rng_state_")


def last_checkpoint(folder: Path, record: Mapping[str, Any], data: str) -> Path | None:
    """The newest whole checkpoint of this very run in the folder, None without one; the folder is marked as the run's.

    A checkpoint that is not as it was sealed (a file missing, cut or of another step) is passed over with a warning for
    the one before. Raises FileError where the folder holds the checkpoints of another run.
    """
    mark, run = folder / "run.json", {**finite(record), "data": data}
    if not mark.exists():
        files.write_json(mark, run)
        return None
    if files.read_json(mark) != run:
        raise FileError(f"{folder}: holds the checkpoints of another run; remove it, or give another output name")
    numbers = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    steps = sorted((int(number) for number in numbers if number.isdigit()), reverse=True)
    unfinished = [step for step in steps if step < int(run["recipe"]["steps"])]
    for i, step in enumerate(unfinished):
        path = folder / f"checkpoint-{step}"
        problem = _problem(path, step)
        if problem is None:
            return path
        before = f"checkpoint-{unfinished[i + 1]} is tried" if i + 1 < len(unfinished) else "training starts again"
        warnings.warn(f"{path}: not used, {problem}; {before}", LoraLabWarning, stacklevel=2)
    return None


def _problem(path: Path, step: int) -> str | None:
    """Why a run cannot go on from this checkpoint; None where it can."""
    try:
        content = files.read_json(path / SEAL)
    except FileError:
        return f"it has no {SEAL} that can be read, so it was not written to its end"
    held = content.get("files")
    if not isinstance(held, dict) or any(name not in held for name in _NEEDED):
        return f"its {SEAL} lists no {', '.join(name for name in _NEEDED if name not in (held or {}))}"
    if content.get("step") != step:
        return f"it is of step {content.get('step')}"
    if content != _sealed({key: value for key, value in content.items() if key != "seal"}):
        return f"its {SEAL} is not by this user's key (see SECURITY.md), or by an earlier version"
    for name, wanted in held.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if files.file_hash(path / name) != wanted:
            return f"{name} is not as it was written"
    return None
