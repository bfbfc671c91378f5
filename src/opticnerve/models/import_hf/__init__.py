"""`opticnerve import`: LLaVA-1.5, LLaVA-NeXT, BLIP-2 and InstructBLIP checkpoints of transformers become folders of
opticnerve with the same logits.

    source.py   what is read, what is refused before any weight is, and how tensors move into our modules
    llava.py    CLIP-ViT (or SigLIP, …) × mlp × splice, with tiling for LLaVA-NeXT
    blip2.py    ViT × qformer × splice
    run.py      all of it in order, and the proof: every tensor accounted for, the same logits
"""
