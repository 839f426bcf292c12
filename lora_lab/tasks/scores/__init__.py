"""What counts as right: metrics by name, calibration, and how good models are by one of them.

Knows columns of scores; nothing of models, and of where examples come from.
"""
