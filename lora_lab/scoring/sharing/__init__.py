"""Work shared out among processes of this machine or workers of a Ray cluster; none outlives its driver.

Knows items and workers; nothing of what an item computes.
"""
