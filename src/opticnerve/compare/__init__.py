"""Experiments that compare designs under one budget: when to fuse, which connector, why stages.

Each is one command (`opticnerve compare …`): rows of recipes, run over several seeds, then a report; see
docs/compare.md.
"""
