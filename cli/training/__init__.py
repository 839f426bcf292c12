"""How adapters come to be: train them, record what others' do not say, list what there is to train on.

Knows recipes and tasks; asks nothing of adapters that are there.
"""
