"""Trainer checkpoints of one run: stamped with its record, and found again by the run that goes on from them."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lora_lab import files
from lora_lab.adapter import Adapter
from lora_lab.errors import FileError
from lora_lab.result import finite
from lora_lab.trust import Origin


class StampCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Puts the record into every Trainer checkpoint, so that it can be analysed like a finished adapter."""

    def __init__(self, record: Mapping[str, Any], base: Mapping[str, Any]) -> None:
        self._record, self._base = record, base

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rewrite the header of the checkpoint's adapter."""
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


def last_checkpoint(folder: Path, record: Mapping[str, Any], data: str) -> str | None:
    """The newest checkpoint of this very run in the folder, if there is one; the folder is marked as this run's."""
    mark, run = folder / "run.json", {**finite(record), "data": data}
    if mark.exists():
        if files.read_json(mark) != run:
            raise FileError(f"{folder}: holds the checkpoints of another run; remove it, or give another output name")
        steps = [int(p.name[11:]) for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
        unfinished = [step for step in steps if step < int(finite(record)["recipe"]["steps"])]
        return str(folder / f"checkpoint-{max(unfinished)}") if unfinished else None
    files.write_json(mark, run)
    return None
