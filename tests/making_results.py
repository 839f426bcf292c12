"""Results with made-up numbers, as the questions write them: small ones, and those of real sizes."""

import itertools
import math

import numpy as np

from lora_lab.analysis.merge_tables.predictors import PREDICTORS
from lora_lab.results.result import Result, columns
from lora_lab.training.schedule import Schedule

METRICS = {
    "accuracy": {"about": "share of examples that are right", "unit": "share", "higher": True},
    "loss": {"about": "mean loss of an example", "unit": "nats", "higher": False},
}
LOOKS = {"factors": ("factors A, B averaged", 1), "matched": ("factors, ‖ΔW‖ matched", 4), "delta": ("ΔW averaged", 0)}


def line(method="lora", pairs=((0, 1),), spaces=("factors", "matched", "delta"), depth=0.3, ratios=()):
    grid = np.linspace(0, 1, 5)
    rows, barriers = [], []
    for k, (i, j) in enumerate(pairs):
        who = {"members": [f"{method}{i}", f"{method}{j}"], "indices": [i, j], "method": method}
        for space in spaces:
            dip = {"factors": depth + 0.1 * k, "matched": 0.02}.get(space, 0.0)
            for t in grid:
                rows.append(
                    {**who, "space": space, "t": float(t), "ratio": None, **cells(0.9 - dip * 4 * t * (1 - t), t)}
                )
            barriers.append({**who, "space": space, "metric": "accuracy", "barrier": "entezari", "value": dip})
        for ratio in ratios:
            rows.append({**who, "space": "delta", "t": None, "ratio": ratio, **cells(0.8 + 0.01 * k, 0.5)})
    count = 1 + max(max(pair) for pair in pairs)
    adapters = [{"label": f"{method}{i}", "method": method} for i in range(count)]
    parameters = {"spaces": list(spaces), "adapters": adapters, "task": {"name": "digits/relabel"}, "split": "test"}
    parameters["metrics"] = METRICS
    parameters["looks"] = {space: {"label": label, "place": place} for space, (label, place) in LOOKS.items()}
    return Result("interpolate", columns(rows), parameters, {"barriers": barriers}, {"examples": 500})


def cells(accuracy, t):
    return {
        "accuracy": accuracy,
        "accuracy_low": accuracy - 0.02,
        "accuracy_high": accuracy + 0.02,
        "loss": 1 - accuracy,
        "loss_low": 0.9 - accuracy,
        "loss_high": 1.1 - accuracy,
        "norm": 10 * (1 - 2 * t * (1 - t)),
    }


def plane(names=("a", "b", "base"), side=9):
    """A valley around (1, 1), with corners at (0, 0), (3, 0), (1, 2)."""
    grid = np.linspace(-1, 4, side)
    rows = []
    for y in grid:
        for x in grid:
            far = float(np.hypot(x - 1, y - 1))
            norms = {"norm": 1 + far, "matched_norm": 2.5 if x < 3 else None}
            rows.append(
                {"x": float(x), "y": float(y), "weights": [0.2, 0.3, 0.5], **norms, **cells(0.95 - 0.1 * far, 0)}
            )
    corners = [
        {"adapter": name, "x": x, "y": y, "weights": [0, 0, 1], "norm": 2.0, "matched_norm": 2.0, **cells(0.9, 0)}
        for name, (x, y) in zip(names, ((0, 0), (3, 0), (1, 2)), strict=True)
    ]
    said = {"points": side, "task": {"name": "digits/relabel"}, "split": "test", "adapters": [], "metrics": METRICS}
    gains = [{"metric": "loss", "value": 0.01, "low": -0.01, "high": 0.03, "x": 1.0, "y": 1.0}]
    return Result("plane", columns(rows), said, {"corners": corners, "gains": gains}, {"examples": 500})


def curve(spaces=("delta", "factors"), shapes=("bezier", "polychain")):
    """A line that dips where factors are mixed, and curves that do not."""
    rows = []
    for space in spaces:
        for path in ("line", "matched line", *shapes):
            dip = 0.3 if (space, path) == ("factors", "line") else 0.01
            for t in np.linspace(0, 1, 5):
                place = {"space": space, "path": path, "t": float(t), "arc": float(t) ** 1.2}
                rows.append({**place, **cells(0.9 - dip * 4 * t * (1 - t), t)})
    looks = {"bezier": {"label": "quadratic Bézier", "place": 1}, "polychain": {"label": "one bend", "place": 2}}
    said = {"points": 5, "spaces": list(spaces), "shapes": list(shapes), "looks": looks, "metrics": METRICS}
    said |= {"task": {"name": "digits/relabel"}, "split": "test", "adapters": []}
    return Result("curve", columns(rows), said, {}, {"examples": 500})


def reproduce(names=("midpoint", "barrier", "balance", "time"), tasks=("digits/relabel",)):
    """Claims of every verdict and direction, in several units, one without a number."""
    rows = []
    for i, name in enumerate(names):
        for task in tasks:
            value = (0.2, -0.003, -0.08, 0.0)[i % 4]
            rows.append(
                {
                    "claim": name,
                    "says": f"{name} is so",
                    "source": "somebody",
                    "published": "",
                    "published_of": None,
                    "published_unit": None,
                    "published_control": None,
                    "published_treated": None,
                    "published_difference": None,
                    "task": task,
                    "statistic": "score",
                    "where": {},
                    "direction": ("higher", "lower", "equal")[i % 3],
                    "least": 0.01,
                    "treated": {"method": "coto"},
                    "control": {"method": "lora"},
                    "unit": ("accuracy", "accuracy", "", "s")[i % 4],
                    "of_treated": 0.9 + value,
                    "of_control": 0.9,
                    "difference": value,
                    "difference_low": value - 0.05,
                    "difference_high": value + 0.05,
                    "seeds": 5,
                    "units": 10,
                    "paired": True,
                    "p_holds": 0.01,
                    "p_fails": 0.9,
                    "verdict": ("holds", "does not hold", "cannot be told")[i % 3],
                    "why": None,
                }
            )
    said = {"testbed": "digits", "about": "", "tasks": list(tasks), "merged": [], "seeds": 5, "recipe": {}}
    return Result("reproduce", columns(rows), said, {"verdicts": {"holds": 1}})


def checkpoints(methods=("lora", "coto"), runs=3, steps=(10, 20, 30, 40), spaces=("delta", "factors", "matched")):
    """Runs that get better along training; midpoints and pruned ones lag behind, less where p rises to 1."""
    rows = []
    for (k, step), (i, method) in itertools.product(enumerate(steps), enumerate(methods)):
        pairs = list(itertools.combinations(range(runs), 2))
        models = [(name, None, [run]) for name in ("alone", "pruned") for run in range(runs)]
        models += [("midpoint", space, pair) for pair in pairs for space in spaces]
        models += [("average", "delta", range(runs))] * (runs > 2)
        for model, space, members in models:
            who = {"step": step, "model": model, "space": space, "indices": [runs * i + j for j in members]}
            who |= {"members": [f"{method}-s{j}" for j in members], "method": method}
            who |= {"p": min(1.0, 0.1 + 0.3 * k) if i % 2 else None}
            rows.append({**who, **cells(0.4 + 0.1 * k - 0.05 * (model != "alone") + 0.01 * members[0], 0)})
    said = {"spaces": list(spaces), "keep": "every-other", "steps": list(steps), "runs": [], "metrics": METRICS}
    said |= {"task": {"name": "digits/relabel"}, "split": "test"}
    return Result("checkpoints", columns(rows), said, {}, {"examples": 500})


def sharpness(names=("lora-s0", "coto-s0")):
    """Eigenvalues over three decades; the initial trace is negative, and one training diverged."""
    rows, rates = [], []
    for i, name in enumerate(names):
        who = {"adapter": name, "method": "lora", "seed": i}
        for k, at in enumerate(("trained", "balanced", "initial")):
            value = 0.3 * (i + 1) * 10.0 ** (k - 1)
            ends = {"sharpness": value, "sharpness_low": -0.1 * value, "sharpness_high": 2 * value}
            trace = {"trace": value * (5 - 3 * k), "trace_low": 0.0, "trace_high": 9 * value}
            largest = {
                "rate_gd": 2 / value,
                "rate_momentum": 3.8 / value,
                "rate_adam": None if k == 2 else 0.02 / value,
            }
            rows.append({**who, "at": at, **ends, **trace, **largest})
        for k in range(5):
            loss = None if k == 4 else 0.5 - 0.1 * min(k, 2)
            rates.append({**who, "rate": 1e-3 * 4**k, "loss": loss, "accuracy": None, "chosen": k == 2})
    said = {"task": {"name": "digits/relabel"}, "split": "train", "adapters": []}
    said["metrics"] = {name: METRICS[name] for name in ("loss", "accuracy")}
    return Result("sharpness", columns(rows), said, {"rates": rates}, {"examples": 200})


def layerwise(layers=4):
    """A barrier in the second layer, from one side more than from the other."""
    barriers = []
    for index, metric, k in itertools.product((0, 1), METRICS, range(layers)):
        height = 0.2 / (1 + index) * (k == 1)
        ends = {"value": height, "low": 0.0, "high": height + 0.01}
        ends |= {"exchange": 0.1 * (1 - 2 * index), "exchange_low": -0.2, "exchange_high": 0.2}
        barriers.append({"group": f"model.layers.{k}", "others": "ab"[index], "index": index, "metric": metric, **ends})
    said = {"players": "layer", "task": {"name": "digits/relabel"}, "split": "test", "adapters": []}
    said["metrics"] = METRICS
    return Result("layerwise", {}, said, {"barriers": barriers}, {"examples": 500})


def merges(methods=("lora", "coto"), names=("average", "ties"), seeds=2, ratios=(None,)):
    rows, sets, curves = [], [], []
    for method in methods:
        for seed in range(seeds):
            for ratio in ratios:
                head = {"set": f"{method} {seed} {ratio}", "method": method, "seed": seed, "ratio": ratio}
                for name in ("alone", *names):
                    value = 0.7 + 0.01 * seed + 0.05 * (method == "coto")
                    ends = {"": value, "_low": value - 0.02, "_high": value + 0.03}
                    cell = {key + end: v for key in ("accuracy", "normalised") for end, v in ends.items()}
                    coefficient = None if name == "alone" else 1.0
                    cell |= {"merge": name, "coefficient": coefficient, "chosen": True, "loss": 1.0}
                    sets.append({**head, **cell, "at_edge": False})
                    rows.append({**head, **cell, "task": "t1"})
                    if name != "alone":
                        points = {"coefficient": [0.1, 1.0, 3.0], "accuracy": [value] * 3}
                        curves.append({**head, "merge": name, **points})
    table = [
        {"method": m, "merge": n, "ratio": r, "sets": seeds, "at_edge": 0, "coefficient": 1.0, "accuracy": 0.7}
        for m in methods
        for n in ("alone", *names)
        for r in ratios
    ]
    parameters = {"merges": list(names), "one_task": ratios != (None,), "task_names": ["t1", "t2"], "split": "test"}
    parameters["metrics"] = {"accuracy": METRICS["accuracy"]}
    return Result(
        "compare-merges",
        columns(rows),
        parameters,
        {"sets": sets, "by_method": table, "curves": curves},
        {"examples": 500},
    )


def run(method="coto", steps=40, groups=4):
    schedule = Schedule()
    log = {
        "step": list(range(steps)),
        "p": [schedule.probability(t, steps) if method == "coto" else 1.0 for t in range(steps)],
        "mask": [
            "".join("01"[int(on)] for on in schedule.mask(t, steps, groups, 0)) if method == "coto" else None
            for t in range(steps)
        ],
        "loss": [1 / (t + 1) for t in range(steps)],
        "learning_rate": [1e-3] * steps,
    }
    names = {f"layers.{i}": [f"layers.{i}.q"] for i in range(groups)}
    return Result("train", log, {"record": {"method": method, "seed": 0}, "groups": names})


def tried_result(method, values, **more):
    """What some settings gave, without training: (learning rate, an accuracy a seed, whether it is chosen)."""
    rows = [
        {"method": method, "seed": seed, "learning_rate": rate, **more, "accuracy": value, "loss": 1.0, "chosen": best}
        for rate, seeds, best in values
        for seed, value in enumerate(seeds)
    ]
    said = {"task": {"name": "x"}, "options": ["learning_rate", *more], "criterion": "accuracy"}
    return Result("tuning", columns(rows), said)


def shapley_result(labels=("lora-s0", "coto-s0"), players="type-layer", trace=5, interactions=False):
    rows, summaries = [], []
    for a, label in enumerate(labels):
        names = [(t, layer) for layer in range(3) for t in ("k_proj", "q_proj", "fc1")]
        if players == "layer":
            names = [(None, layer) for layer in range(3)]
        for i, (kind, layer) in enumerate(names):
            value = 0.1 * (a + 1) + 0.01 * i - 0.02 * (i == 0)
            rows.append(
                {
                    "adapter": label,
                    "method": label.partition("-")[0],
                    "seed": int(label[-1]),
                    "player": f"{kind}.{layer}" if kind else f"vit.layers.{layer}",
                    "encoder": "",
                    "type": kind,
                    "layer": layer,
                    "value": value,
                    "low": value - 0.03,
                    "high": value + 0.03,
                }
            )
        steps = [{"evaluations": 10 * 2**k, "values": [0.1 + 0.1 / 2**k], "se": [0.1 / 2**k]} for k in range(trace)]
        summaries.append({"adapter": label, "estimator": "antithetic", "trace": steps})
        if interactions:
            table = [[0.0, 0.2, None], [0.2, 0.0, -0.1], [None, -0.1, 0.0]]
            summaries[-1]["interactions"] = {"players": ["a.0", "a.1", "a.2"], "values": table}
    parameters = {"worth": "accuracy", "players": players, "task": {"name": "digits/relabel"}, "split": "test"}
    return Result("shapley", columns(rows), parameters, {"adapters": summaries}, {"examples": 500})


def stability_result(labels=("lora-s0", "coto-s0"), rescaled=(False, True), metric="accuracy"):
    rows = []
    for a, label in enumerate(labels):
        for scaled in rescaled:
            who = {"adapter": label, "method": label[:4], "seed": a, "rescaled": scaled}
            for family, count in (("k-of-G", 4), ("p", 3), ("leave-one-out", 3), ("one-alone", 3)):
                for k in range(count):
                    value = 0.2 + 0.2 * k - 0.05 * a
                    ends = {metric: value, f"{metric}_low": value - 0.1, f"{metric}_high": value + 0.1}
                    cells = {"label": f"x.{k}", "share": k / 3, **ends, f"{metric}_worst": value - 0.05}
                    rows.append({**who, "family": family, **cells})
    parameters = {"players": "layer", "task": {"name": "digits/relabel"}, "split": "test"}
    parameters["metrics"] = {metric: METRICS["accuracy"]}
    return Result("stability", columns(rows), parameters, {}, {"examples": 500})


def sweep_result(labels=("lora-s0", "coto-s0")):
    rows = []
    for a, label in enumerate(labels):
        who = {"adapter": label, "method": label[:4], "seed": a}
        cells = [("structured", "all", "all"), ("structured", "even", "even"), ("structured", "random", "random:3")]
        cells += [("unstructured", c, s) for c in ("magnitude", "random") for s in ("0", "0.5", "0.9")]
        cells += [("rank", c, r) for c in ("svd", "random") for r in ("1", "2")]
        for i, (kind, criterion, place) in enumerate(cells):
            draws = 5 if criterion == "random" else 1
            accuracy = 0.9 - 0.03 * i + 0.05 * a
            ends = {"accuracy": accuracy, "accuracy_low": accuracy - 0.02, "accuracy_high": accuracy + 0.02}
            rows.append({**who, "kind": kind, "criterion": criterion, "label": place, "draws": draws, **ends})
    parameters = {"task": {"name": "digits/relabel"}, "split": "test", "metrics": METRICS}
    return Result("sweep", columns(rows), parameters, {}, {"examples": 500})


def compared(names=("a", "b", "c"), layers=4, merges=("average", "ties")):
    """Pairs of adapters that differ the more the farther apart they are in the list; the last has ΔW = 0."""
    rows, parts, inside = [], [], []
    groups = ["", *(f"model.layers.{layer}" for layer in range(layers))]
    for i, j in itertools.combinations(range(len(names)), 2):
        cosine = 1 / (1 + j - i)
        for k, group in enumerate(groups):
            who = {"first": names[i], "second": names[j], "indices": [i, j], "level": "layer" if k else "total"}
            angles = {f"{side}_mean": 1.57 - cosine * k / (layers + 1) for side in ("left", "right")}
            overlaps = {"left_overlap": cosine / 2, "right_overlap": cosine / 4}
            none = j == len(names) - 1 > 1
            chance = {"left_over_chance": 8 * cosine, "right_over_chance": 2 * cosine}
            apart = {"distance": 1 + j - i, "A_shared": (i + j) % 2 == 0, **chance}
            rows.append({**who, "group": group, "cosine": None if none else cosine, **angles, **overlaps, **apart})
    for i, name in enumerate(names):
        values = [(i + 1) / (1 + k) if i < len(names) - 1 else 0.0 for k in range(16)]
        parts.append({"adapter": name, "level": "total", "group": "", "spectrum": values})
        for k, group in enumerate(groups):
            counts = {
                "intruders": (i + k) % 7,
                "looked_at": 10,
                "left_over_chance": 1 + i / (1 + k),
            }
            inside.append({"adapter": name, "level": "layer" if k else "total", "group": group, **counts})
    places = [(math.cos(i), math.sin(i) * i, i % 3 + 1 if i % 2 else None) for i in range(len(names))]
    points = [
        {"adapter": name, "x": x, "y": y, "tsne_x": 20 * y, "tsne_y": 30 * x, "start": start}
        for name, (x, y, start) in zip([*names, None], [*places, (0.0, 0.0, None)], strict=True)
    ]
    told = [
        {"merge": merge, "outcome": outcome, "predictor": predictor}
        | {"correlation": 0.5 - 0.1 * i, "correlation_low": 0.1 - 0.1 * i, "correlation_high": 0.7 - 0.1 * i}
        for merge in merges
        for outcome in ("accuracy", "loss")
        for i, predictor in enumerate(PREDICTORS)
    ]
    summary = {
        "adapters": [{"adapter": name} for name in names],
        "parts": parts,
        "inside": inside,
        "map": points,
        "map_held": 0.75,
        "forecast": told,
        "order": list(range(len(names)))[::-1],
    }
    return Result("compare", columns(rows), {"levels": ["layer"]}, summary, {})


def long_names(count):
    """Names of 60 characters that differ in their middle only."""
    return [f"meta-llama_Llama-3.1-70B-Instruct-domain-{i:03d}-rank16-alpha32-x" for i in range(count)]


def of_real_size(view, adapters=9, layers=80):
    """Results for a view: so many adapters of unknown method with long names, so many layers, small values."""
    return REAL_SIZES[view.partition(":")[0]](view, long_names(adapters), layers)


def _lines(view, names, layers):
    count = max(2, len(names))
    names = long_names(count)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    result = line(pairs=pairs, depth=0.002 if count < 9 else 0.1, ratios=("0:1", "1:2", "1:1", "2:1", "1:0"))
    result.parameters["adapters"] = [{"label": name, "method": name} for name in names]
    values = [0.002 * (i + 1) * (j + 1) / count for i, j in pairs for _ in result.parameters["spaces"]]
    barriers = [
        {**row, "members": [names[i] for i in row["indices"]], "value": value}
        for row, value in zip(result.summary["barriers"], values, strict=True)
    ]
    result.summary["barriers"] = barriers
    rows = [{**row, "method": " – ".join(names[i] for i in row["indices"])} for row in result.rows()]
    return [Result(result.kind, columns(rows), result.parameters, result.summary, result.provenance)]


def _games(view, names, layers):
    names = names[:16] if view.endswith(("heatmap", "interactions")) else names  # a panel each
    types = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    players = [(kind, layer) for layer in range(layers) for kind in (types if "heatmap" in view else (None,))]
    rows, summaries = [], []
    for a, name in enumerate(names):
        for i, (kind, layer) in enumerate(players):
            value = -0.0004 if i % 11 == a else 0.002 + 0.01 * layer / layers
            at = {"player": f"model.layers.{layer}" + (f".{kind}" if kind else ""), "type": kind, "layer": layer}
            cells = {"value": value, "low": value - 0.0003, "high": value + 0.0003}
            rows.append({"adapter": name, "method": name, "seed": 0, "encoder": "", **at, **cells})
        steps = [
            {"evaluations": 10 * 2**k, "values": [0.1 + 0.1 / 2**k], "se": [0.1 / (a + 1) / 2**k]} for k in range(9)
        ]
        table = [[0.0 if i == j else 0.0004 * (a - i % 3) for j in range(layers)] for i in range(layers)]
        pairs = {"players": [f"model.layers.{i}" for i in range(layers)], "values": table}
        summaries.append({"adapter": name, "estimator": "antithetic", "trace": steps, "interactions": pairs})
    said = {"worth": "accuracy", "players": "layer", "task": {"name": "digits/relabel"}, "split": "test"}
    return [Result("shapley", columns(rows), said, {"adapters": summaries}, {"examples": 500})]


def _kept(view, names, layers):
    rows = []
    for a, name in enumerate(names):
        for scaled in (False, True):
            who = {"adapter": name, "method": name, "seed": a, "rescaled": scaled}
            for family, count in (("k-of-G", layers), ("p", 10), ("leave-one-out", layers), ("one-alone", layers)):
                for k in range(count):
                    value = 0.2 + 0.6 * k / count - 0.002 * a
                    ends = {"accuracy": value, "accuracy_low": value - 0.002, "accuracy_high": value + 0.002}
                    cells = {"label": f"model.layers.{k}", "share": k / count, **ends, "accuracy_worst": value - 0.05}
                    rows.append({**who, "family": family, **cells})
    said = {"players": "layer", "task": {"name": "digits/relabel"}, "split": "test"}
    said["metrics"] = METRICS
    return [Result("stability", columns(rows), said, {}, {"examples": 500})]


def _pruned(view, names, layers):
    patterns = ["all", "even", "odd", "low", "high", "random:3", "top-shapley:0.5", "encoder:vision_model"]
    patterns += [f"type:{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")]
    patterns += [f"layers:{k}-{k + layers // 4 - 1}" for k in range(0, layers, layers // 4)]
    cells = [("structured", name, name) for name in patterns]
    cells += [("unstructured", c, f"{s / 10:g}") for c in ("magnitude", "random", "wanda") for s in range(10)]
    cells += [("rank", c, str(r)) for c in ("svd", "random", "energy") for r in (1, 2, 4, 8, 16, 32, 64)]
    rows = []
    for a, name in enumerate(names):
        for i, (kind, criterion, place) in enumerate(cells):
            value = 0.9 - 0.02 * (i % 10) + 0.002 * a
            ends = {"accuracy": value, "accuracy_low": value - 0.002, "accuracy_high": value + 0.002}
            who = {"adapter": name, "method": name, "seed": a, "kind": kind, "criterion": criterion}
            rows.append({**who, "label": place, "draws": 5 if criterion == "random" else 1, **ends})
    said = {"task": {"name": "digits/relabel"}, "split": "test", "metrics": METRICS}
    return [Result("sweep", columns(rows), said, {}, {"examples": 500})]


def _merged(view, names, layers):
    """Forty merges where all are in one panel, half of them without a cut, beside nulls."""
    kinds = ("average", "task-arithmetic", "factor-average", "ties", "dare-ties", "tsv", "core-space", names[0])
    ratios = ("0:1", "1:4", "1:1", "4:1", "1:0") if view.endswith("ratios") else (None,)
    if view in ("compare-merges", "compare-merges:bars"):
        kinds = ("ensemble of logits", *kinds, *(f"knots:a-rule-of-our-own-with-a-name-{i:02d}" for i in range(12)))
        kinds += tuple(f"{name} (exact)" for name in kinds[1:20])
        return [with_nulls(merges(methods=names, names=kinds, seeds=1))]
    return [merges(methods=names, names=kinds, seeds=1, ratios=ratios)]


def with_nulls(result):
    """The result with classes and sizes of its merges, and with two nulls in the place of the others and of all."""
    for row in result.summary["by_method"]:
        exact, none = row["merge"].endswith("(exact)"), row["merge"] in ("alone", "ensemble of logits")
        row["category"] = "reference" if none else "exact" if exact else "equal rank"
        row |= {"rank": 768 if exact else 16, "bytes": 123_456_789 if none or exact else 86_016}
    result.summary["nulls"] = [
        {key: row[key] for key in ("method", "merge", "ratio")}
        | {"null": null, "replaced": replaced, "draws": 20}
        | {"normalised_low": low + 0.01 * k, "normalised_high": low + 0.02 + 0.02 * k}
        for row in result.summary["by_method"]
        if row["category"] != "reference"
        for k, null in enumerate(("spectrum", "shuffled-layers"))
        for replaced, low in (("others", 0.6), ("all", 0.1))
    ]
    return result


def _runs(view, names, layers):
    names = names[:16]  # three panels each
    made = [run("coto" if i % 2 else "lora", steps=200, groups=layers) for i in range(len(names))]
    for one, name in zip(made, names, strict=True):
        one.parameters["record"] = {"method": name, "seed": 0}
    return made


def _tried(view, names, layers):
    rates = [(1e-4 * 2**k, [0.6 + 0.02 * k, 0.602 + 0.02 * k], k == 4) for k in range(8)]
    return [tried_result(name, rates) for name in names]


REAL_SIZES = {
    "compare": lambda view, names, layers: [
        compared(names, layers, ("average", "task-arithmetic", "ties", *names[:9]))
    ],
    "interpolate": _lines,
    "layerwise": lambda view, names, layers: [layerwise(layers)],
    "checkpoints": lambda view, names, layers: [checkpoints(names[:9], 3, [250 * (k + 1) for k in range(12)])],
    "reproduce": lambda view, names, layers: [reproduce([*names, *map(str, range(layers // 2))])],
    "sharpness": lambda view, names, layers: [sharpness(names[:12] if view.endswith("rates") else names)],
    "curve": lambda view, names, layers: [curve(("delta", "aligned", "factors"), ("bezier", "polychain", *names[:5]))],
    "plane": lambda view, names, layers: [plane(names[3 * i : 3 * i + 3]) for i in range(min(3, len(names) // 3))],
    "shapley": _games,
    "stability": _kept,
    "sweep": _pruned,
    "compare-merges": _merged,
    "train": _runs,
    "tuning": _tried,
}
