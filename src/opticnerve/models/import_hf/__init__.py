"""`opticnerve import`: checkpoints of transformers' vision-language models, and LLaVA's own, become folders of
opticnerve with the same logits.

    source.py   what is read, what is refused before any weight is, and how tensors move into our modules
    original.py LLaVA's own format and TinyLLaVA's, as transformers' LLaVA
    llava.py    CLIP-ViT (or SigLIP, …) × mlp × splice, with tiling for LLaVA-NeXT and LLaVA-OneVision
    shuffled.py InternVL, Idefics3, SmolVLM: ViT × pixel_shuffle × splice, with tiles that are read one by one
    blip2.py    ViT × qformer × splice
    run.py      all of it in order, and the proof: every tensor accounted for, the same logits
"""
