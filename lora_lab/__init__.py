"""Analysis of LoRA adapters: training with CoTo, mode connectivity, stability, merging and pruning.

Import what you need from its module, for example ``from lora_lab.adapter import Adapter``. This file imports
nothing, so that ``lora-lab --help`` and the drawing of figures stay light.
"""
