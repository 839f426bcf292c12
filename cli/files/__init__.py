"""Adapters and checkpoints as files: inspect, convert, fuse, verify, extract.

Knows what is told of a file; looks at no task.
"""
