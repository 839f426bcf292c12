"""Trained curves between two adapters: their control points, how these learn, and what a curve is worth.

Knows the line that a curve is compared to; nothing of planes and single layers.
"""
