"""llama.cpp's format: the language model, its tokenizer, the vision encoder."""
