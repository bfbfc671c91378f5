"""Docked models in the formats of other engines, each proved by that engine in a process of its own.

export.py     a model in, a folder in another format out: all of it or nothing
formats.py    what every format promises, their names, and opticnerve's own folder
simplify.py   what other engines have no place for: refused, or folded into plain weights
samples.py    the fixed prompts and pictures
parity.py     what our model says to them, what the engine says (`checks/` run there), and how far apart they are
hf/           stock transformers: LLaVA, Idefics3, BLIP-2
gguf/         llama.cpp
publish.py    an export with its card, on a hub
"""
