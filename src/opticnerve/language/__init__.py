"""Language models: loading, chat templates, think blocks, LoRA."""
