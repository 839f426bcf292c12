"""What `import lora_lab as ll` gives: steps from a task to a figure, the loss around adapters, figures and pages.

Knows every room; the command line does not go through it.
"""
