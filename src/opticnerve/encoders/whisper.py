"""Whisper's encoder as an audio encoder (Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak
Supervision", section 2.2).

The wrapped model is transformers' own, untouched; its decoder is never built. Two things are ours: a window shorter
than Whisper's 30 seconds, and the mean of neighbouring frames, so that a short clip costs the language model few
tokens.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder as Transformer

from opticnerve.common import hub
from opticnerve.common.cache import weight_files
from opticnerve.common.hub import UNREADABLE, read_config, says_how, unreadable
from opticnerve.encoders.base import Encoder, all_real, load_exactly, load_part
from opticnerve.starter import weights
from opticnerve.types import Features, OpticNerveError

SAMPLING_RATE = 16_000
MEL_FRAMES = 100  # a second of sound: one every 10 ms
FRAMES = 50  # a second of sound, after the second convolution's stride of 2
# What of a WhisperConfig the encoder is built from.
ENCODER_KEYS = (
    "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "encoder_layerdrop", "num_mel_bins",
    "max_source_positions", "activation_function", "scale_embedding", "dropout", "attention_dropout",
    "activation_dropout",
)  # fmt: skip


class WhisperEncoder(Encoder):
    """Log-mel spectrograms of one window → a vector for every `pool / 50` seconds.

    Args:
        architecture: a `WhisperConfig` as a dict; of it, the encoder's part (`ENCODER_KEYS`) is kept.
        seconds: length of the window, whole seconds; the model's own (30) by default. A shorter window is encoded
            with the first `50 * seconds` entries of the position table, so that a two-second clip costs 100 positions
            and not 1,500. Whisper was trained on 30 seconds; its positions are sinusoids, which count from the window's
            start.
        pool: mean of so many neighbouring frames after the encoder; divides `50 * seconds`.
        layer: "last" for the last hidden state (after the final norm), or a whole number for an entry of
            `hidden_states`.

    A window is always full: shorter sound is padded with silence before the spectrogram, as Whisper was trained, and
    Whisper's encoder takes no mask. So every token counts as real.
    """

    modality: ClassVar[Literal["image", "audio"]] = "audio"

    def __init__(
        self, *, architecture: dict[str, Any], seconds: int | None = None, pool: int = 1,
        layer: int | Literal["last"] = "last",
    ) -> None:  # fmt: skip
        super().__init__()
        architecture = encoder_part(architecture)
        positions = int(architecture["max_source_positions"])
        self.seconds = positions // FRAMES if seconds is None else seconds
        self.pool, self.layer = pool, layer
        self._check(positions, int(architecture["encoder_layers"]))
        config = WhisperConfig(**{**architecture, "max_source_positions": FRAMES * self.seconds})
        self.model = Transformer(config)
        self.mels = int(config.num_mel_bins)
        self.hidden_size = int(config.d_model)
        self.num_tokens = FRAMES * self.seconds // pool
        self.options = {"architecture": architecture, "seconds": self.seconds, "pool": pool, "layer": layer}

    def _check(self, positions: int, layers: int) -> None:
        longest = positions // FRAMES
        if not isinstance(self.seconds, int) or not 1 <= self.seconds <= longest:
            raise OpticNerveError(
                f"seconds: {self.seconds!r} is no window of this Whisper, whose {positions} positions are {longest} "
                f"seconds; give a whole number from 1 to {longest}",
                kind="out-of-range",
            )
        frames = FRAMES * self.seconds
        if not isinstance(self.pool, int) or self.pool < 1 or frames % self.pool:
            fits = ", ".join(str(n) for n in range(1, frames + 1) if frames % n == 0)
            raise OpticNerveError(
                f"pool: the {frames} frames of {self.seconds} seconds cannot be pooled by {self.pool!r}; "
                f"{frames} is divided by {fits}",
                kind="out-of-range",
            )
        if self.layer != "last" and not (isinstance(self.layer, int) and -layers - 1 <= self.layer <= layers):
            raise OpticNerveError(
                f"layer {self.layer!r}: this encoder has hidden states 0 to {layers}, or 'last'", kind="out-of-range"
            )

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> WhisperEncoder:
        """`name`: hub name or folder of a Whisper in transformers' format, an OpenAI `.pt` file, or a starter name.

        Raises:
            OpticNerveError: no Whisper, or weights of its encoder missing or of another shape.
        """
        files: list[str] = []
        if weights.is_starter(name):
            files = [str(weights.audio_encoder(name).file())]
            architecture, state = read_openai(Path(files[0]))
        elif name.endswith(".pt"):
            files = [name]
            architecture, state = read_openai(Path(name))
        else:
            architecture, state = _read_transformers(name)
            options = {**_window(name, architecture), **options}
            files = weight_files(Path(hub.fetch(name)))
        with torch.device("meta"):
            audio_encoder = cls(architecture=architecture, **options)
        state["embed_positions.weight"] = state["embed_positions.weight"][: FRAMES * audio_encoder.seconds].clone()
        load_exactly(audio_encoder.model, state, f"the weights of {name!r} are not those of its encoder", assign=True)
        audio_encoder.files = files
        return audio_encoder

    @classmethod
    def planned(cls, name: str, **options: Any) -> WhisperEncoder:
        """The same encoder without its weights."""
        options.pop("architecture", None)
        if weights.is_starter(name):
            return cls(architecture=weights.audio_encoder(name).architecture, **options)
        if name.endswith(".pt"):
            return cls(architecture=read_openai(Path(name))[0], **options)
        architecture = _config(name).to_dict()
        return cls(architecture=architecture, **{**_window(name, architecture), **options})

    def forward(self, input_features: Tensor) -> Features:
        """Log-mel `input_features` (B, mels, 100 * seconds) → `Features` (B, 50 * seconds / pool, hidden_size)."""
        if self.layer == "last":
            frames_BTD = self.model(input_features).last_hidden_state
        else:
            frames_BTD = self.model(input_features, output_hidden_states=True).hidden_states[self.layer]
        return all_real(frames_BTD.unflatten(1, (self.num_tokens, self.pool)).mean(2))

    def states(self, media: Tensor, **asked: bool) -> dict[str, Any]:
        out = self.model(media, **asked)
        return {"hidden_states": out.get("hidden_states"), "attentions": out.get("attentions")}

    def feature_extractor(self) -> Any:
        """Mono sound of 16 kHz → log-mel windows of `media_shape`; longer sound is cut off, so split it before."""
        return WhisperFeatureExtractor(feature_size=self.mels, chunk_length=self.seconds, sampling_rate=SAMPLING_RATE)

    def blocks(self) -> list[nn.Module]:
        return list(self.model.layers)

    @property
    def media_shape(self) -> tuple[int, ...]:
        return (self.mels, MEL_FRAMES * self.seconds)


def encoder_part(architecture: dict[str, Any]) -> dict[str, Any]:
    """Of a `WhisperConfig` as a dict, what the encoder needs; what is not given is as in transformers' defaults.

    Raises:
        OpticNerveError: a key that no WhisperConfig has.
    """
    model_type = architecture.get("model_type", "whisper")
    if model_type != "whisper":
        raise OpticNerveError(
            f"{model_type!r} is no Whisper; type: whisper takes Whisper's encoder", kind="unsupported"
        )
    known = WhisperConfig().to_dict()
    if unknown := sorted(set(architecture) - set(known)):
        raise OpticNerveError(
            f"a WhisperConfig has no {', '.join(unknown)}; the encoder takes {', '.join(ENCODER_KEYS)}",
            kind="unknown-key",
        )
    return {key: architecture.get(key, known[key]) for key in ENCODER_KEYS}


def from_openai(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors of an OpenAI state dict (github.com/openai/whisper, model.py) by transformers' names."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("encoder."):
            for pattern, ours in _OPENAI_NAMES:
                name = re.sub(pattern, ours, name)
            renamed[name] = tensor
    return renamed


_OPENAI_NAMES = [
    (r"^encoder\.", ""),
    (r"^blocks\.", "layers."),
    (r"\battn_ln\b", "self_attn_layer_norm"),
    (r"\bmlp_ln\b", "final_layer_norm"),
    (r"\bmlp\.0\b", "fc1"),
    (r"\bmlp\.2\b", "fc2"),
    (r"\battn\.query\b", "self_attn.q_proj"),
    (r"\battn\.key\b", "self_attn.k_proj"),
    (r"\battn\.value\b", "self_attn.v_proj"),
    (r"\battn\.out\b", "self_attn.out_proj"),
    (r"^ln_post\b", "layer_norm"),
    (r"^positional_embedding$", "embed_positions.weight"),
]


def read_openai(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Architecture and encoder weights (float32) of an OpenAI checkpoint: `{"dims": …, "model_state_dict": …}`."""
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        dims, tensors = stored["dims"], stored["model_state_dict"]
        architecture = {
            "num_mel_bins": dims["n_mels"], "max_source_positions": dims["n_audio_ctx"],
            "d_model": dims["n_audio_state"], "encoder_attention_heads": dims["n_audio_head"],
            "encoder_layers": dims["n_audio_layer"], "encoder_ffn_dim": 4 * dims["n_audio_state"],
        }  # fmt: skip
    except FileNotFoundError as e:
        raise OpticNerveError(
            f"there is no {file}; give an OpenAI Whisper .pt file, a folder, or a hub name", kind="missing-file"
        ) from e
    except (KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise OpticNerveError(f"{file} is no OpenAI Whisper checkpoint: {type(e).__name__} {e}", kind="damaged") from e
    # Stored in half precision; the arithmetic's precision is the recipe's business.
    return encoder_part(architecture), {name: tensor.float() for name, tensor in from_openai(tensors).items()}


class _EncoderAlone(Transformer):
    """For reading a whole Whisper: what is not its encoder's is passed over."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", "^proj_out", "^projector", "^classifier", "^layer_weights"]  # noqa: RUF012


def _read_transformers(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = _config(name)
    names = {r"^(model\.)?encoder\.": ""}
    model = load_part(_EncoderAlone, hub.fetch(name), name, "encoder", config=config, key_mapping=names)
    return encoder_part({k: getattr(config, k) for k in ENCODER_KEYS}), model.state_dict()


def _config(name: str) -> Any:
    config = read_config(name)
    if config.model_type != "whisper":
        raise OpticNerveError(
            f"{name!r} ({config.model_type}) is no Whisper; type: whisper takes Whisper's encoder", kind="unsupported"
        )
    return config


# What the encoder's window and its frames a second rest on: Whisper's own, for all of its sizes.
_SPECTROGRAM = {"sampling_rate": SAMPLING_RATE, "hop_length": SAMPLING_RATE // MEL_FRAMES, "n_fft": 400,
                "padding_value": 0.0, "dither": 0.0}  # fmt: skip


def _window(name: str, architecture: dict[str, Any]) -> dict[str, Any]:
    """`seconds`, where a checkpoint's feature extractor says another window than the positions hold.

    A folder without preprocessor_config.json is taken for a Whisper as OpenAI published it.

    Raises:
        OpticNerveError: the file cannot be read, or makes spectrograms otherwise than Whisper's.
    """
    if not says_how(name, "feature_extractor"):
        return {}
    try:
        own: Any = WhisperFeatureExtractor.from_pretrained(name)
    except (*UNREADABLE, ZeroDivisionError) as e:
        raise unreadable(f"how {name!r} prepares sound", e, "restore its preprocessor_config.json") from e
    wanted = {**_SPECTROGRAM, "feature_size": int(architecture["num_mel_bins"])}
    odd = [f"{k}: {getattr(own, k)}, not {v}" for k, v in wanted.items() if getattr(own, k) != v]
    if odd:
        raise OpticNerveError(
            f"{name!r} prepares sound as Whisper's encoder here cannot ({'; '.join(odd)})", kind="unsupported"
        )
    whole = int(architecture["max_source_positions"]) // FRAMES
    return {} if own.chunk_length == whole else {"seconds": int(own.chunk_length)}
