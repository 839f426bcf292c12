"""Merges scored: a model for every task, and options and coefficients chosen on validation data.

Knows how a merge becomes something to score; nothing of what methods do with updates.
"""
