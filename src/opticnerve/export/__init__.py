"""Docked models in the formats of other engines, each proved by that engine in a process of its own.

export.py       a model in, a folder in another format out: all of it or nothing
formats.py      what every format promises, and their names
simplify.py     adapter, calibration and picture size folded into plain weights
samples.py      the fixed prompts and pictures
parity.py       what our model says to them, and how far the engine's answer is from it
probe.py        the engine in a process of its own; `checks/` are the programs that run there
hf_*.py         stock transformers: LLaVA, Idefics3, BLIP-2; hf_common.py is what they share
gguf*.py        llama.cpp: the language model, its tokenizer, the vision encoder
merged.py       opticnerve's own folder
publish.py      an export with its card, on a hub
"""
