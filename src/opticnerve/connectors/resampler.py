"""A few learned latents read the encoder's tokens by attention: as many soft tokens as one likes, whatever came in.

Sources: Flamingo's perceiver resampler (Alayrac et al. 2022, section 2.1) in the form of Idefics2 (Laurençon et al.
2024, What matters when building vision-language models?, section 3.3). The layers are transformers'.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2MLP, Idefics2PerceiverResampler

from opticnerve.connectors.base import Connector, check_activation, check_counts
from opticnerve.types import Features, OpticNerveError


class ResamplerConnector(Connector):
    """A gated perceptron to the language model's width, then a perceiver resampler: Idefics2's connector.

    Weight for weight transformers' `Idefics2Connector`. Masked tokens are not attended to. The latents that come out
    are all real, unless no token of their picture is.

    Args:
        in_size, out_size, in_tokens, calibrate: see `Connector`.
        num_latents: soft tokens that come out for one image.
        depth: number of resampler blocks.
        heads: attention heads of the latents' queries.
        key_value_heads: heads of keys and values, each shared by `heads` / `key_value_heads` query heads.
        head_dim: width of a head.
        activation: of both perceptrons, a name from transformers' `ACT2FN`.
        intermediate_size: hidden width of the perceptron before the resampler; 3.5 × `out_size` by default, as Idefics2
            has it.
    """

    any_shape = True
    keeps_grid = False

    def __init__(
        self, *, in_size: int, out_size: int, in_tokens: int, num_latents: int = 64, depth: int = 3, heads: int = 16,
        key_value_heads: int = 4, head_dim: int = 96, activation: str = "silu", intermediate_size: int | None = None,
        calibrate: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(in_size=in_size, out_size=out_size, in_tokens=in_tokens, calibrate=calibrate)
        intermediate = round(3.5 * out_size) if intermediate_size is None else intermediate_size
        check_counts(
            "resampler", num_latents=num_latents, depth=depth, heads=heads, key_value_heads=key_value_heads,
            head_dim=head_dim, intermediate_size=intermediate,
        )  # fmt: skip
        if heads % key_value_heads:
            raise OpticNerveError(
                f"resampler heads ({heads}) must be a multiple of key_value_heads ({key_value_heads}): "
                "each pair of keys and values serves as many queries",
                kind="wrong-shape",
            )
        check_activation(activation)
        config = Idefics2PerceiverConfig(
            hidden_size=out_size, hidden_act=activation, resampler_n_latents=num_latents, resampler_depth=depth,
            resampler_n_heads=heads, resampler_head_dim=head_dim, num_key_value_heads=key_value_heads,
        )  # fmt: skip
        self.modality_projection = Idefics2MLP(in_size, intermediate, out_size, activation)
        self.perceiver_resampler = Idefics2PerceiverResampler(config)
        # transformers starts all latents at one; equal latents get equal gradients and would stay one token for ever.
        nn.init.normal_(self.perceiver_resampler.latents, std=config.initializer_range)
        self.num_latents = num_latents
        self.options |= {
            "num_latents": num_latents, "depth": depth, "heads": heads, "key_value_heads": key_value_heads,
            "head_dim": head_dim, "activation": activation, "intermediate_size": intermediate_size,
        }  # fmt: skip

    @property
    def num_tokens(self) -> int:
        return self.num_latents

    def project(self, features: Features) -> Features:
        context_BND = self.modality_projection(features.tokens_BND)
        # transformers looks at the mask's values; the meta device, where `plan` counts, has none.
        mask_BN, sampler = features.mask_BN.to(torch.long), self.perceiver_resampler
        if mask_BN.is_meta:
            latents_BMD = sampler.latents.unsqueeze(0).expand(context_BND.shape[0], -1, -1)
            for layer in sampler.layers:
                latents_BMD = layer(latents_BMD, context_BND, attention_mask=None, position_ids=None)
            latents_BMD = sampler.norm(latents_BMD)
        else:
            latents_BMD = sampler(context=context_BND, attention_mask=mask_BN)
        any_B1 = features.mask_BN.any(1, keepdim=True)
        return Features(latents_BMD, any_B1.expand(-1, self.num_latents))
