"""Tasks that users write in Python: the class, and the file that it is loaded from.

Knows the user's code and how its errors are told; nothing of the kinds that a file can describe.
"""
