"""A checkpoint as it lies: its model without weights, which tensor is which parameter, the files beside.

Knows names and shapes; nothing of adapters.
"""
