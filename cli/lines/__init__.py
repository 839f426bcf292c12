"""Questions between adapters: the line, planes, trained curves, sharpness, along training.

Knows tables of points and barriers; computes nothing.
"""
