"""Analysis of LoRA adapters: training with CoTo, mode connectivity, stability, merging and pruning.

    import lora_lab as ll

    a, b = (ll.train("digits/relabel", seed=seed) for seed in (0, 1))
    ll.figure(ll.interpolate([a, b])).savefig("line.pdf")

What stands here is loaded when it is first used: the import itself loads neither torch nor numpy. The rooms below
hold the rest; each one's first lines say what it knows.
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.adapters.adapter import Adapter as Adapter
    from lora_lab.adapters.files.reading import inspect as inspect
    from lora_lab.adapters.lowrank import LowRank as LowRank
    from lora_lab.api.around import checkpoints as checkpoints
    from lora_lab.api.around import curve as curve
    from lora_lab.api.around import layerwise as layerwise
    from lora_lab.api.around import plane as plane
    from lora_lab.api.around import reproduce as reproduce
    from lora_lab.api.around import sharpness as sharpness
    from lora_lab.api.showing import figure as figure
    from lora_lab.api.showing import report as report
    from lora_lab.api.steps import compare as compare
    from lora_lab.api.steps import compare_merges as compare_merges
    from lora_lab.api.steps import convert as convert
    from lora_lab.api.steps import evaluate as evaluate
    from lora_lab.api.steps import extract as extract
    from lora_lab.api.steps import fuse as fuse
    from lora_lab.api.steps import interpolate as interpolate
    from lora_lab.api.steps import load as load
    from lora_lab.api.steps import merge as merge
    from lora_lab.api.steps import prune as prune
    from lora_lab.api.steps import record as record
    from lora_lab.api.steps import shapley as shapley
    from lora_lab.api.steps import stability as stability
    from lora_lab.api.steps import sweep as sweep
    from lora_lab.api.steps import task as task
    from lora_lab.api.steps import train as train
    from lora_lab.api.steps import verify as verify
    from lora_lab.errors import LoraLabError as LoraLabError
    from lora_lab.results.result import Result as Result
    from lora_lab.scoring.execution import Execution as Execution
    from lora_lab.tasks.python.own import Task as Task
    from lora_lab.tasks.scores.metrics import Metric as Metric
    from lora_lab.training.coto import CoToCallback as CoToCallback
    from lora_lab.training.recipe import Recipe as Recipe
    from lora_lab.training.schedule import Schedule as Schedule

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "adapters.adapter": ("Adapter",),
        "adapters.lowrank": ("LowRank",),
        "adapters.files.reading": ("inspect",),
        "api.steps": (
            "compare",
            "compare_merges",
            "evaluate",
            "extract",
            "fuse",
            "interpolate",
            "load",
            "convert",
            "merge",
            "prune",
            "record",
            "shapley",
            "stability",
            "sweep",
            "task",
            "train",
            "verify",
        ),
        "api.around": ("checkpoints", "curve", "layerwise", "plane", "reproduce", "sharpness"),
        "errors": ("LoraLabError",),
        "results.result": ("Result",),
        "scoring.execution": ("Execution",),
        "api.showing": ("figure", "report"),
        "tasks.scores.metrics": ("Metric",),
        "tasks.python.own": ("Task",),
        "training.coto": ("CoToCallback",),
        "training.recipe": ("Recipe",),
        "training.schedule": ("Schedule",),
    },
)
