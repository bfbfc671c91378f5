"""vLLM's plugin: `vllm serve FOLDER` for docked models that no stock class expresses.

The folder is one of `opticnerve export … --to merged`. vLLM runs the language model with its own class of it (paged
keys and values, batching); vision encoder, audio encoder and connector run as they are, and their soft tokens take the
placeholders' places. Entry point `vllm.general_plugins`; vLLM calls `register` in each of its processes.
Source: vLLM's documentation, "Plugin System" and "Multi-Modal Support".
"""

from __future__ import annotations


def register() -> None:
    """Make opticnerve's classes known to transformers and vLLM. It may be called several times."""
    from vllm import ModelRegistry

    import opticnerve.models  # noqa: F401  (registers configuration and processor with transformers' Auto classes)

    name = "OpticNerveForConditionalGeneration"
    if name not in ModelRegistry.get_supported_archs():
        # By name: a process that only asks what the class can do must not touch the accelerator.
        ModelRegistry.register_model(name, "opticnerve.vllm_plugin.model:OpticNerveInVLLM")
