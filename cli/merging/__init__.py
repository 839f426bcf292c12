"""Several adapters in one: merge them, compare all merges, compare adapters by their weights.

Knows the options of merges and tables of them; computes nothing.
"""
