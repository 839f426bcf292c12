"""Tables of merges: sets of adapters, methods at equal rank, nulls, paired differences, and what foretells losses.

Knows methods by their entries alone, and nothing of how they merge.
"""
