"""Views of what lies between adapters: the line, one layer at a time, along training, planes, curves, sharpness.

Knows rows of results; computes nothing.
"""
