"""Stock transformers' formats: LLaVA, Idefics3, BLIP-2."""
