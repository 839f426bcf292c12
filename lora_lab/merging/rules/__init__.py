"""What methods of merging do with one module's updates: rules on entries, factors, subspaces, and those that learn.

Knows matrices, factors and weights; nothing of files, ranks of outputs, and choices on validation data.
"""
