"""`opticnerve import`: LLaVA-1.5, LLaVA-NeXT, BLIP-2 and InstructBLIP checkpoints of transformers become folders of
opticnerve with the same logits.

    source.py     what is read, and what is refused before any weight is
    llava.py      CLIP-ViT (or SigLIP, …) × mlp × splice, with tiling for LLaVA-NeXT
    blip2.py      ViT × qformer × splice
    assemble.py   moving tensors from their modules into ours
    verify.py     every tensor accounted for, the same logits
    run.py        all of it in order
"""

from opticnerve.models.import_hf.run import FAMILIES, Imported, import_checkpoint

__all__ = ["FAMILIES", "Imported", "import_checkpoint"]
