"""What a pruning by ranks or by entries will take, told before it begins."""

from __future__ import annotations

from lora_lab.adapters.adapter import Adapter
from lora_lab.forecast import IO_SECONDS, Forecast, bytes_of, slowness
from lora_lab.pruning.entries import CRITERIA
from lora_lab.side_by_side import usual_jobs

_CUT, _CUT_A_RANK = 25.0, 0.4
"""Nanoseconds an entry of the factors to order their units and to measure what is lost, and as many more a rank."""
_CHOSEN = 25.0
"""Nanoseconds an entry to find the lowest scores."""
_FACTORED = 0.9
"""Nanoseconds to factor a dense matrix: rows × columns × the smaller of them, in float64."""
_DENSE_COPIES = 6
"""Of a dense ΔW that is factored, as many in float32 are held at a time."""


def forecast(
    adapter: Adapter, *, rank: int | None = None, criterion: str | None = None, jobs: int | None = None
) -> Forecast:
    """What cutting the adapter to the rank, or pruning entries by a criterion of CRITERIA, will take at the most."""
    given, work, rank_kept, written, largest = bytes_of(adapter.tensors), 0.0, 0, 0, 0
    of_delta = criterion is not None and CRITERIA[criterion].of_delta
    for name, update in adapter.updates.items() if adapter.why_no_delta is None else ():
        rows, columns = update.B.shape[0], update.A.shape[1]
        own = min(rows, columns) if of_delta else update.rank
        kept = min(own, rank or own)
        width = max(adapter.tensors[key].itemsize for key in adapter.sites[name].keys.values())
        written, rank_kept = written + kept * (rows + columns) * width, max(rank_kept, kept)
        if of_delta:
            work += rows * columns * (_CHOSEN + _FACTORED * min(rows, columns))
            largest = max(largest, rows * columns)
        elif criterion is None:
            work += own * (rows + columns) * (_CUT + _CUT_A_RANK * own)
        else:
            work += own * (rows + columns) * _CHOSEN
    written = written or given
    seconds = IO_SECONDS * (given + written) + work * slowness() * 1e-9
    memory = given + written + (jobs or usual_jobs()) * _DENSE_COPIES * 4 * largest
    return Forecast(len(adapter.sites), rank_kept, written, seconds, memory)
