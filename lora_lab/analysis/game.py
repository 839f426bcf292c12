"""The game on an adapter: which of its parts are on, and what is the model worth then?

Dropout stability, structured pruning and Shapley values are three questions put to one `Game`. It is called as shapiq
calls games: coalitions bool [n, players] → worths float [n].
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import identity
from lora_lab.adapters.groups import Players
from lora_lab.errors import LoraLabWarning, OptionError, TunerError, some, unknown
from lora_lab.games.estimators import Bools
from lora_lab.results.result import Journal, fingerprint, provenance
from lora_lab.results.stats import Floats
from lora_lab.scoring.examples import Examples, Sent, bare, examples_of, pack, remembered
from lora_lab.scoring.execution import Cost as Cost
from lora_lab.scoring.execution import Execution
from lora_lab.scoring.execution import Progress as Progress
from lora_lab.scoring.prefixes import Layout, State, Variant, Variants
from lora_lab.scoring.scorer import Answer, Effort, Look, Make, Others, Scorer, ScorerSetup, Several
from lora_lab.scoring.workers import Workers
from lora_lab.tasks.task import Scores, Task, resolve_device

_FORMAT = 2
"""Of the journal's entries: another one is another journal."""

# A worker's batch is a minute's work, so that little is lost with it, but not fewer variants than these: cut into 32,
# the coalitions of antithetic orders over 80 blocks share .50 of their blocks in place of .52; cut into 8, .45.
_LEAST, _SECONDS = 32, 60.0

WORTHS: dict[str, Callable[[Scores], Floats]] = {
    "accuracy": lambda scores: scores.correct.astype(np.float64),
    "loss": lambda scores: -scores.loss,
    "log-likelihood": lambda scores: -scores.loss,
    "margin": lambda scores: scores.margin,
}
"""Name → worth of each example, signed so that what helps is positive.

In classification the loss is the negative log-likelihood of the right label, so that the two are one number here.
"""


class Outcomes:
    """Per-example scores of an adapter's variants: each computed once, kept in a journal, shared by all questions.

    The journal lies in the folder `cache`, under a name made from the adapter's bits, the task and the examples; so
    another question about them finds what is known, and a killed run goes on. `examples` draws so many with seed 0.
    With `workers`, its workers do the computing, and no model is built here.
    """

    def __init__(
        self,
        adapter: Adapter,
        task: Task,
        *,
        split: str = "test",
        examples: int | None = None,
        device: torch.device | None = None,
        cache: Path | None = None,
        share: bool = True,
        progress: Progress | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.adapter, self.task = adapter, task
        self.device = device or (torch.device(workers.device) if workers else resolve_device())
        self.progress = progress
        self.workers = workers
        self._sent = Sent.of(task) if workers else None
        self._data = task.split(split).subset(examples)
        self._on = Examples.of(task, split, examples) if workers else Examples(split, examples)
        who = identity(adapter)
        self.run = fingerprint([_FORMAT, who, examples_of(task, split), len(self._data), self.device.type])
        self._worn = fingerprint(["scorer", who, task.record, str(self.device), share])
        self._journal = Journal(cache / f"{self.run}.jsonl", self.run) if cache else None
        self._known: dict[str, Scores] = {}
        self._share = share
        self._effort = Effort()
        self.evaluated = 0

    @property
    def examples(self) -> int:
        """Examples that every variant is scored on."""
        return len(self._data)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """The right label of every example."""
        labels: npt.NDArray[np.int64] = self._data.inputs["labels"].cpu().numpy()
        return labels

    @property
    def batches(self) -> int:
        """Batches that every variant is scored on."""
        return -(-len(self._data) // self.task.batch_size)

    @property
    def names(self) -> list[str]:
        """The adapted modules, in the order of a variant's states."""
        return list(self.layout.names)

    @property
    def layout(self) -> Layout:
        """The blocks of the model, and what variants share by them."""
        return self._looked[0] if self.workers else self.variants.layout

    @property
    def variants(self) -> Variants:
        """The engine of this process, on a model of its own that wears the adapter."""
        return self._scorer.variants

    @property
    def effort(self) -> Effort:
        """What the scores took so far, here or in the workers."""
        return self._effort if self.workers else self._scorer.effort

    def keeping(self, modules: Collection[str], factor: float = 1.0) -> Variant:
        """The variant with exactly these modules on, their updates scaled by `factor`."""
        missing = sorted(set(modules) - set(self.names))
        if missing:
            raise OptionError(f"{self.adapter.source}: adapts no module {some(missing)}; there are: {some(self.names)}")
        return tuple(factor if name in modules else 0.0 for name in self.names)

    def of(self, variants: Sequence[Variant], *, logits: bool = False) -> list[Scores]:
        """Scores of every variant (with logits on request), computing what is not known yet."""
        keys = [_key(variant) for variant in variants]
        missing = {
            key: variant for key, variant in zip(keys, variants, strict=True) if not self._find(key, logits=logits)
        }
        if missing:
            self._compute(missing, logits=logits)
        return [self._known[key] for key in keys]

    def of_others(self, makes: Mapping[str, Make], *, progress: Progress | None = None) -> dict[str, Scores]:
        """Scores of other adapters in this one's place, by keys of the caller's that they are known by.

        They must be of the same tuner and adapt no other modules; ranks may differ. With workers, what makes them must
        be picklable: they are made where they are scored.
        """
        missing = {key: make for key, make in makes.items() if not self._find(f"other:{key}", logits=False)}
        if missing and self.workers:
            parts = self.workers.cut(list(missing), self._most)
            questions = [Others(tuple(part), tuple(missing[key] for key in part), self._on) for part in parts]
            self._ask(questions, progress, prefix="other:")
        else:
            for done, (key, make) in enumerate(missing.items(), 1):
                self._keep(f"other:{key}", self._scorer.score_other(make, self._on))
                if progress:
                    progress(done, len(missing))
        empty = [key for key in makes if f"other:{key}" not in self._known]
        base = dict.fromkeys(empty, self.of([self.keeping([])])[0]) if empty else {}
        return {key: base[key] if key in base else self._known[f"other:{key}"] for key in makes}

    def of_other(self, key: str, make: Make) -> Scores:
        """`of_others` for one."""
        return self.of_others({key: make})[key]

    def cost(self, variants: Iterable[Variant], *, logits: bool = False) -> Cost:
        """What `of` would compute for these variants; the seconds are extrapolated from one timed batch."""
        missing = [v for k, v in {_key(v): v for v in variants}.items() if not self._find(k, logits=logits)]
        batches = self.batches
        blocks, naive = self.layout.cost(missing) * batches, self.layout.blocks * len(missing) * batches
        share = blocks / naive if naive else 1.0
        return Cost(len(missing), blocks, naive, self.seconds(len(missing)) * share)

    def seconds(self, passes: int) -> float:
        """How long so many forward passes over all examples take, the workers side by side; one batch is timed."""
        return passes * self.pace * self.batches / (self.workers.size if self.workers else 1)

    @cached_property
    def pace(self) -> float:
        """Seconds of a forward pass on one batch with everything on, timed once."""
        return self._looked[1] if self.workers else self._scorer.pace(self._on)

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.adapter, self.task, device=self.device, share=self._share)

    @cached_property
    def _setup(self) -> ScorerSetup:
        assert self._sent is not None
        return ScorerSetup(bare(self.adapter), self._sent, str(self.device), self._share, self._worn)

    @cached_property
    def _looked(self) -> tuple[Layout, float]:
        """What a worker tells of its model."""
        assert self.workers is not None
        (found,) = self.workers.map(self._setup, [Look(self._on)])
        layout, pace = found
        self._effort = Effort(why_not=layout.why_not)
        return layout, pace

    @property
    def _most(self) -> int:
        return max(_LEAST, int(_SECONDS / (self.pace * self.batches)))

    def _find(self, key: str, *, logits: bool) -> bool:
        """Whether the variant is known, in memory or in the journal."""
        if key not in self._known:
            for name in (f"{key} logits", key):
                scores = remembered(self._journal, name, self.examples)
                if scores is not None:
                    self._known[key] = scores
                    break
        return key in self._known and (not logits or self._known[key].logits is not None)

    def _compute(self, missing: Mapping[str, Variant], *, logits: bool) -> None:
        keys, variants = list(missing), list(missing.values())
        if self.workers:
            parts = self.workers.cut(self.layout.walk(variants)[0], self._most)  # neighbours share the longest prefixes
            questions = [
                Several(tuple(keys[i] for i in part), tuple(variants[i] for i in part), self._on, logits)
                for part in parts
            ]
            self._ask(questions, self.progress)
            return
        for done, (i, scores) in enumerate(self._scorer.scores(variants, self._on, logits=logits), 1):
            self._keep(keys[i], scores)
            if self.progress:
                self.progress(done, len(keys))

    def _ask(self, questions: Sequence[Several | Others], progress: Progress | None, *, prefix: str = "") -> None:
        """Put questions to the workers, and keep what comes back."""
        total, done = sum(len(question.keys) for question in questions), 0

        def keep(question: Several | Others, answer: Answer) -> None:
            nonlocal done
            scores, effort, dtype = answer
            self.task.dtype = dtype or self.task.dtype
            self._effort += effort
            for key, each in zip(question.keys, scores, strict=True):
                self._keep(prefix + key, each)
            done += len(scores)
            if progress:
                progress(done, total)

        assert self.workers is not None
        self.workers.map(self._setup, questions, keep)

    def _keep(self, key: str, scores: Scores | None) -> None:
        if scores is None:  # the base, which is known as the variant with nothing on
            return
        self._known[key] = scores
        self.evaluated += 1
        if self._journal is not None:
            self._journal.add(key + (" logits" if scores.logits is not None else ""), pack(scores))


class Game:
    """Players of an adapter and the worth of their coalitions: bool [n, players] → float [n], a mean over examples.

    Modules of no player are always on, and so are heads. With `rescale` the updates of a coalition of k of n players
    are multiplied by n/k. A worth is NaN where the loss is not finite, and a warning names the coalition; the others
    keep theirs.
    """

    def __init__(self, outcomes: Outcomes, players: Players, *, worth: str = "accuracy", rescale: bool = False) -> None:
        if worth not in WORTHS:
            raise unknown("worth", worth, WORTHS)
        if rescale and not outcomes.adapter.scalable:
            raise TunerError(f"{outcomes.adapter.source}: {outcomes.adapter.tuner} has no scale to multiply")
        self.outcomes, self.players, self.worth, self.rescale = outcomes, players, worth, rescale
        self.n_players = len(players)
        self.player_names = players.names

    def __call__(self, coalitions: Bools) -> Floats:
        """Worth of each coalition."""
        means: Floats = self.per_example(coalitions).mean(1)
        return means

    def per_example(self, coalitions: Bools) -> Floats:
        """Worth of each coalition on each example, [n, examples]; NaN where the loss is not finite."""
        return np.stack([_finite(WORTHS[self.worth](s), s) for s in self.scores(coalitions)])

    def scores(self, coalitions: Bools, *, logits: bool = False) -> list[Scores]:
        """Scores of each coalition; those whose loss is not finite are named in a warning."""
        rows = np.atleast_2d(coalitions)
        found = self.outcomes.of([self.variant(row) for row in rows], logits=logits)
        bad = [self.name_of(row) for row, s in zip(rows, found, strict=True) if not np.isfinite(s.loss).all()]
        if bad:
            warnings.warn(
                f"{self.outcomes.adapter.label}: the loss is not finite for {len(bad)} of {len(found)} coalitions, "
                f"which are left out: {'; '.join(bad[:3])}",
                LoraLabWarning,
                stacklevel=3,
            )
        return found

    def cost(self, coalitions: Bools, *, logits: bool = False) -> Cost:
        """What calling the game with these coalitions would compute."""
        return self.outcomes.cost([self.variant(row) for row in np.atleast_2d(coalitions)], logits=logits)

    def blocks(self, coalitions: Bools) -> int:
        """Block evaluations a batch for these coalitions, if nothing were known."""
        return self.outcomes.layout.cost([self.variant(row) for row in coalitions])

    def variant(self, coalition: Bools) -> Variant:
        """The states that a coalition means."""
        if len(coalition) != self.n_players:
            raise OptionError(f"a coalition of {len(coalition)} places for {self.n_players} players")
        factor = self.n_players / max(1, int(coalition.sum())) if self.rescale else 1.0
        switched: dict[str, State] = {}
        ranks: dict[str, list[bool]] = {}
        for on, units in zip(coalition, self.players.units.values(), strict=True):
            for name, rank in units:
                if rank is None:
                    switched[name] = factor if on else 0.0
                else:
                    ranks.setdefault(name, []).append(bool(on))
        switched |= {name: _ranks(mask, factor) for name, mask in ranks.items()}
        return tuple(switched.get(name, 1.0) for name in self.outcomes.names)

    def name_of(self, coalition: Bools) -> str:
        """A coalition in words."""
        on = [name for name, is_on in zip(self.player_names, coalition, strict=True) if is_on]
        off = [name for name in self.player_names if name not in on]
        if not on or not off:
            return "no player" if off else "all players"
        return some(on, 6) if len(on) <= len(off) else f"all but {some(off, 6)}"


class Scored(Protocol):
    """What a question says of the examples that it is scored on."""

    @property
    def split(self) -> str: ...  # noqa: D102

    @property
    def examples(self) -> int | None: ...  # noqa: D102


def outcomes_of(question: Scored, adapter: Adapter, task: Task, on: Execution) -> Outcomes:
    """The scores of the adapter's variants on the question's examples."""
    where: dict[str, Any] = {"device": on.device, "cache": on.cache, "progress": on.progress, "workers": on.workers}
    return Outcomes(adapter, task, split=question.split, examples=question.examples, **where)


def measured(outcomes: Outcomes, adapters: Sequence[Adapter], *, began: float, run: str) -> dict[str, Any]:
    """The provenance of what was asked of these adapters since `began` (time.perf_counter)."""
    return provenance(
        inputs=[Path(adapter.source) for adapter in adapters],
        elapsed_s=time.perf_counter() - began,
        examples=outcomes.examples,
        run=run,
        device=str(outcomes.device),
        dtype=outcomes.task.dtype,
        workers=outcomes.workers.size if outcomes.workers else None,
    )


def _finite(worth: Floats, scores: Scores) -> Floats:
    return np.where(np.isfinite(scores.loss), worth, np.nan)


def _ranks(mask: Sequence[bool], factor: float) -> State:
    if all(mask) or not any(mask):
        return factor if all(mask) else 0.0
    return tuple(factor if on else 0.0 for on in mask)


def _key(variant: Variant) -> str:
    """A short text that equal variants share: a sign a module or rank (x, <1> …: factors), and what the factors are."""
    states = [part for state in variant for part in (state if isinstance(state, tuple) else (state,))]
    factors = sorted(set(states) - {0.0, 1.0})
    signs = {0.0: "0", 1.0: "1"} | {factor: f"<{i}>" if i else "x" for i, factor in enumerate(factors)}
    shown = (f"({''.join(signs[s] for s in state)})" if isinstance(state, tuple) else signs[state] for state in variant)
    return "".join(shown) + "".join(f"*{factor!r}" for factor in factors)
