"""A figure as source text that its author can change: plain matplotlib, or PGF for LaTeX.

Knows what was drawn on Axes; nothing of results.
"""
