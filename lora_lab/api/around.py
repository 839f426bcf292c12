"""What `import lora_lab as ll` gives about the loss around and between adapters; given as in steps.py."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from lora_lab.api.given import Adapters, Path_, TaskLike, answered, from_options, shown
from lora_lab.options import checked
from lora_lab.results.result import Result
from lora_lab.scoring.execution import Execution


@checked
def plane(
    adapters: Adapters,
    task: TaskLike = None,
    *,
    on: Execution | None = None,
    progress: bool = True,
    trust_record: bool = False,
    **options: Any,
) -> Result:
    """Loss and accuracy on the plane through three adapters; `options` are the fields of `Plane`."""
    from lora_lab.analysis.lines.landscape import Plane

    telling = shown(on, "scoring a plane", progress)
    return answered(from_options(Plane, options), adapters, task, trust_record, telling)


@checked
def curve(
    adapters: Adapters,
    task: TaskLike = None,
    *,
    folder: Path_ | None = None,
    on: Execution | None = None,
    progress: bool = True,
    trust_record: bool = False,
    **options: Any,
) -> Result:
    """Curves with a trained control point between two adapters, beside lines; `options` are the fields of `Curve`.

    The control points are saved as adapters in `folder`.
    """
    from lora_lab.analysis.lines.landscape import Curve

    telling = shown(on, "training and scoring curves", progress)
    place = None if folder is None else Path(folder)
    return answered(from_options(Curve, options), adapters, task, trust_record, telling, folder=place)


@checked
def checkpoints(
    runs: Annotated[Path_ | Sequence[Path_], "the folder of a run's checkpoints, or a list of them"],
    task: TaskLike = None,
    *,
    on: Execution | None = None,
    progress: bool = True,
    trust_record: bool = False,
    **options: Any,
) -> Result:
    """Scores along training, alone, pruned and averaged; `options` are the fields of `Checkpoints`.

    A run is a folder that a Trainer wrote checkpoint-STEP folders to, such as NAME.checkpoints of `train`.
    """
    from lora_lab.analysis.lines.along import common_checkpoints
    from lora_lab.analysis.lines.landscape import Checkpoints

    telling = shown(on, "scoring checkpoints", progress)
    paths: list[Path_] = [*common_checkpoints([runs] if isinstance(runs, str | os.PathLike) else runs)]
    return answered(from_options(Checkpoints, options), paths, task, trust_record, telling)


@checked
def sharpness(
    adapters: Adapters,
    task: TaskLike = None,
    *,
    on: Execution | None = None,
    progress: bool = True,
    trust_record: bool = False,
    **options: Any,
) -> Result:
    """Curvature of the loss around adapters, and the rates it allows; `options` are the fields of `Sharpness`."""
    from lora_lab.analysis.lines.landscape import Sharpness

    telling = shown(on, "measuring curvature", progress)
    return answered(from_options(Sharpness, options), adapters, task, trust_record, telling)


@checked
def layerwise(
    adapters: Adapters,
    task: TaskLike = None,
    *,
    on: Execution | None = None,
    progress: bool = True,
    trust_record: bool = False,
    **options: Any,
) -> Result:
    """Two adapters mixed in one layer at a time, a barrier each; `options` are the fields of `Layerwise`."""
    from lora_lab.analysis.lines.landscape import Layerwise

    telling = shown(on, "mixing layers", progress)
    return answered(from_options(Layerwise, options), adapters, task, trust_record, telling)


@checked
def reproduce(
    folder: Path_,
    claims: Sequence[str] = (),
    *,
    on: Execution | None = None,
    processes: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Result:
    """Claims of papers put to the test in a folder: trained, measured, judged; `options` are those of `Reproduce`.

    What the folder holds already is kept. `processes` train, and then answer questions, side by side, by default one a
    core.
    """
    from lora_lab.claims.reproduce import Reproduce
    from lora_lab.progress import bar

    question = from_options(Reproduce, {"claims": list(claims), **options})
    return question.run(Path(folder), on or Execution(), processes=processes, stage=bar if progress else None)
