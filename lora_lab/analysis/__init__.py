"""The questions: are adapters connected, stable, worth their parts, mergeable, prunable? A result for each.

Knows everything below it; draws nothing.
"""
