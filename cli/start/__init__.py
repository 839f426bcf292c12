"""Where one begins: a first figure (quickstart), and whether the installation is whole (doctor).

Knows the shortest way through the verbs of the other groups.
"""
