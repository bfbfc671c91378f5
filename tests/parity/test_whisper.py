"""Whisper's encoder as an audio encoder: the bare model's numbers, in a shorter window, pooled, and from OpenAI's file."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperEncoder as Bare

from errors import refused
from opticnerve.encoders.base import last_blocks
from opticnerve.encoders.whisper import WhisperEncoder, from_openai, read_openai
from opticnerve.starter import weights as starter
from opticnerve.types import OpticNerveError

SIZES: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "num_mel_bins": 8,
}  # fmt: skip


def config(positions: int = 150) -> Any:
    """A Whisper of three seconds (or 30), with a decoder that must not be built."""
    return tf.WhisperConfig(
        **SIZES, max_source_positions=positions, vocab_size=60, decoder_layers=1, decoder_attention_heads=2,
        decoder_ffn_dim=24, max_target_positions=10, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip


def random_whisper(cls: Any, positions: int = 150) -> Any:
    """Norms and biases that do something, too, and positions that are no sinusoids, so that a wrong slice shows."""
    torch.manual_seed(0)
    model = cls(config(positions)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = str(tmp_path_factory.mktemp("whisper"))
    random_whisper(tf.WhisperModel).save_pretrained(made)
    return made


def mels(seconds: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, 8, 100 * seconds, generator=torch.Generator().manual_seed(1))


def hear(audio_encoder: WhisperEncoder, sound: Tensor) -> Tensor:
    with torch.no_grad():
        return audio_encoder.eval()(sound).tokens_BND


class TestAgainstTransformers:
    def test_thirty_seconds_unpooled(self, tmp_path: Path) -> None:
        whole = random_whisper(tf.WhisperForConditionalGeneration, 1500)
        whole.save_pretrained(tmp_path)
        audio_encoder = WhisperEncoder.from_pretrained(str(tmp_path))
        assert (audio_encoder.seconds, audio_encoder.num_tokens, audio_encoder.media_shape) == (30, 1500, (8, 3000))
        with torch.no_grad():
            wanted = whole.model.encoder(mels(30)).last_hidden_state
        assert (hear(audio_encoder, mels(30)) - wanted).abs().max() <= 1e-5

    @pytest.mark.parametrize("layer", ["last", -1, -2, 0, 1])
    @pytest.mark.parametrize("pool", [1, 5, 150])
    def test_every_layer_pooled_by_hand(self, folder: str, layer: Any, pool: int) -> None:
        bare = tf.WhisperModel.from_pretrained(folder).eval().encoder
        with torch.no_grad():
            out = bare(mels(), output_hidden_states=True)
        state = out.last_hidden_state if layer == "last" else out.hidden_states[layer]
        means = torch.stack([state[:, i : i + pool].mean(1) for i in range(0, 150, pool)], 1)
        audio_encoder = WhisperEncoder.from_pretrained(folder, pool=pool, layer=layer)
        heard = hear(audio_encoder, mels())
        assert heard.shape == means.shape == (2, audio_encoder.num_tokens, audio_encoder.hidden_size)
        assert (heard - means).abs().max() <= 1e-5

    @pytest.mark.parametrize("seconds", [1, 2])
    def test_a_shorter_window_takes_the_first_positions(self, folder: str, seconds: int) -> None:
        weights = tf.WhisperModel.from_pretrained(folder).encoder.state_dict()
        bare = Bare(config(50 * seconds)).eval()
        weights["embed_positions.weight"] = weights["embed_positions.weight"][: 50 * seconds]
        bare.load_state_dict(weights)
        audio_encoder = WhisperEncoder.from_pretrained(folder, seconds=seconds)
        with torch.no_grad():
            wanted = bare(mels(seconds)).last_hidden_state
        assert (hear(audio_encoder, mels(seconds)) - wanted).abs().max() <= 1e-5

    @pytest.mark.parametrize("kind", [tf.WhisperForAudioClassification, Bare])
    def test_other_heads_and_a_bare_encoder_load_too(self, tmp_path: Path, kind: Any) -> None:
        model = random_whisper(kind)
        model.save_pretrained(tmp_path)
        bare = getattr(model, "encoder", model)
        with torch.no_grad():
            wanted = bare(mels()).last_hidden_state
        assert (hear(WhisperEncoder.from_pretrained(str(tmp_path)), mels()) - wanted).abs().max() <= 1e-5

    def test_the_feature_extractor_is_whispers(self, folder: str) -> None:
        audio_encoder = WhisperEncoder.from_pretrained(folder, seconds=2)
        extract = audio_encoder.feature_extractor()
        sound = np.random.default_rng(0).normal(size=16_000).astype(np.float32)
        ours = extract([sound, sound[:5_000]], sampling_rate=16_000, return_tensors="pt")["input_features"]
        assert ours.shape == (2, *audio_encoder.media_shape)
        theirs = tf.WhisperFeatureExtractor(feature_size=8)(sound, sampling_rate=16_000, return_tensors="pt")
        # One second of sound in two of silence or in 30: the same spectrogram, but at the frame that sees the end.
        torch.testing.assert_close(ours[0, :, :198], theirs["input_features"][0, :, :198])
        assert hear(audio_encoder, ours).shape == (2, 100, 16)


class TestContract:
    def test_options_build_it_again_and_so_does_the_plan(self, folder: str) -> None:
        audio_encoder = WhisperEncoder.from_pretrained(folder, seconds=2, pool=4, layer=-2)
        again = WhisperEncoder(**audio_encoder.options)
        again.load_state_dict(audio_encoder.state_dict())
        assert torch.equal(hear(again, mels(2)), hear(audio_encoder, mels(2)))
        with torch.device("meta"):
            planned = WhisperEncoder.planned(folder, seconds=2, pool=4, layer=-2)
        assert planned.options == audio_encoder.options
        assert {k: v.shape for k, v in planned.state_dict().items()} == {
            k: v.shape for k, v in audio_encoder.state_dict().items()
        }
        assert not any("decoder" in key for key in audio_encoder.options["architecture"])

    def test_every_token_is_real(self, folder: str) -> None:
        features = WhisperEncoder.from_pretrained(folder, seconds=1, pool=5)(mels(1))
        assert features.mask_BN.all()
        assert features.mask_BN.shape == (2, 10)

    def test_files_and_modality(self, folder: str) -> None:
        audio_encoder = WhisperEncoder.from_pretrained(folder)
        assert audio_encoder.modality == "audio"
        assert [Path(f).name for f in audio_encoder.weight_files()] == ["model.safetensors"]

    def test_last_blocks(self, folder: str) -> None:
        audio_encoder = WhisperEncoder.from_pretrained(folder)
        before = hear(audio_encoder, mels())
        with torch.no_grad():
            for parameter in last_blocks(audio_encoder, 1)[0].parameters():
                parameter.add_(1.0)
        assert not torch.allclose(hear(audio_encoder, mels()), before)


class TestRefusals:
    @pytest.mark.parametrize("seconds", [0, 4, 1.5, "2"])
    def test_seconds(self, folder: str, seconds: Any) -> None:
        with refused("out-of-range", 150, 3, 1):
            WhisperEncoder.from_pretrained(folder, seconds=seconds)

    @pytest.mark.parametrize("pool", [0, 3, 101])
    def test_pool(self, folder: str, pool: int) -> None:
        with refused("out-of-range", 100, 2, pool, 1, 4, 5):
            WhisperEncoder.from_pretrained(folder, seconds=2, pool=pool)

    @pytest.mark.parametrize("layer", [3, -4, "first"])
    def test_layer(self, folder: str, layer: Any) -> None:
        with refused("out-of-range", f"layer {layer!r}", 0, 2, "'last'"):
            WhisperEncoder.from_pretrained(folder, layer=layer)

    def test_no_whisper(self, language_folder: Any) -> None:
        for make in (WhisperEncoder.from_pretrained, WhisperEncoder.planned):
            with refused("unsupported", "llama", "whisper"):
                make(language_folder())

    def test_an_unknown_key(self) -> None:
        with refused("unknown-key", "WhisperConfig", "d_modle", "d_model"):
            WhisperEncoder(architecture={"d_modle": 16})

    def test_missing_weights(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        random_whisper(tf.WhisperModel).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors.pop("encoder.layers.1.fc1.weight")
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with refused("mismatch", "layers.1.fc1.weight"):
            WhisperEncoder.from_pretrained(str(tmp_path))


def to_openai(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names → OpenAI's, written apart from what it tests."""
    parts = {
        "self_attn.q_proj": "attn.query", "self_attn.k_proj": "attn.key", "self_attn.v_proj": "attn.value",
        "self_attn.out_proj": "attn.out", "self_attn_layer_norm": "attn_ln", "final_layer_norm": "mlp_ln",
        "fc1": "mlp.0", "fc2": "mlp.2",
    }  # fmt: skip
    made = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name):
            name = f"blocks.{found[1]}.{parts[found[2]]}.{found[3]}"
        name = name.replace("embed_positions.weight", "positional_embedding").replace("layer_norm.", "ln_post.")
        made[f"encoder.{name}"] = tensor
    return made


class TestOpenAI:
    @pytest.fixture
    def bare(self) -> Any:
        return random_whisper(Bare)

    @pytest.fixture
    def file(self, bare: Any, tmp_path: Path) -> Path:
        dims = {
            "n_mels": 8, "n_audio_ctx": 150, "n_audio_state": 16, "n_audio_head": 2, "n_audio_layer": 2,
            "n_vocab": 60, "n_text_ctx": 10, "n_text_state": 16, "n_text_head": 2, "n_text_layer": 1,
        }  # fmt: skip
        state = {**to_openai(bare.state_dict()), "decoder.token_embedding.weight": torch.zeros(60, 16)}
        torch.save({"dims": dims, "model_state_dict": state}, tmp_path / "tiny.pt")
        return tmp_path / "tiny.pt"

    def test_names_there_and_back(self, bare: Any) -> None:
        there = to_openai(bare.state_dict())
        assert "encoder.blocks.1.attn.query.weight" in there
        assert "encoder.blocks.1.attn.key.bias" not in there
        back = from_openai({**there, "decoder.ln.weight": torch.ones(1)})
        assert back.keys() == bare.state_dict().keys()
        assert all(torch.equal(back[k], v) for k, v in bare.state_dict().items())

    def test_the_file_gives_the_same_numbers(self, bare: Any, file: Path) -> None:
        audio_encoder = WhisperEncoder.from_pretrained(str(file))
        with torch.no_grad():
            wanted = bare(mels()).last_hidden_state
        assert (hear(audio_encoder, mels()) - wanted).abs().max() <= 1e-5
        assert audio_encoder.weight_files() == [str(file)]
        with torch.device("meta"):
            assert WhisperEncoder.planned(str(file)).options == audio_encoder.options

    @pytest.mark.parametrize(
        ("change", "refusal"),
        [
            (lambda s: s.pop("encoder.ln_post.bias"), ("mismatch", "layer_norm.bias")),
            (lambda s: s.update({"encoder.extra": torch.ones(1)}), ("mismatch", "tiny.pt", "extra")),
            (
                lambda s: s.update({"encoder.conv1.bias": torch.ones(3)}),
                ("mismatch", "conv1.bias", 3, 16),
            ),
        ],
    )
    def test_a_file_that_is_not_whole(self, file: Path, change: Any, refusal: tuple[Any, ...]) -> None:
        stored = torch.load(file, weights_only=True)
        change(stored["model_state_dict"])
        torch.save(stored, file)
        with refused(*refusal):
            WhisperEncoder.from_pretrained(str(file))

    def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "a.pt").write_bytes(b"no weights")
        torch.save({"weights": 1}, tmp_path / "b.pt")
        for name in ("a.pt", "b.pt"):
            with refused("damaged", "OpenAI"):
                read_openai(tmp_path / name)
        with refused("missing-file", "c.pt"):
            read_openai(tmp_path / "c.pt")


def test_an_unknown_starter_ear() -> None:
    with refused("unknown-name", "'starter/whisper'", "starter/whisper-tiny.en"):
        WhisperEncoder.planned("starter/whisper")


@pytest.fixture(scope="module")
def tiny_en() -> Path:
    try:
        return starter.audio_encoder("starter/whisper-tiny.en").file()
    except OpticNerveError as e:
        pytest.skip(str(e))


@pytest.mark.slow
class TestStarterWeights:
    def test_the_plan_knows_their_shapes(self, tiny_en: Path) -> None:
        audio_encoder = WhisperEncoder.from_pretrained("starter/whisper-tiny.en", seconds=2, pool=5)
        with torch.device("meta"):
            planned = WhisperEncoder.planned("starter/whisper-tiny.en", seconds=2, pool=5)
        assert planned.options == audio_encoder.options
        assert (audio_encoder.num_tokens, audio_encoder.hidden_size, audio_encoder.media_shape) == (20, 384, (80, 200))
        assert len(audio_encoder.blocks()) == 4

    def test_their_positions_are_the_papers_sinusoids(self, tiny_en: Path) -> None:
        """Half precision was kept of them; one that was converted under another name would not fit."""
        audio_encoder = WhisperEncoder.from_pretrained("starter/whisper-tiny.en")
        fresh = Bare(tf.WhisperConfig(**audio_encoder.options["architecture"]))
        ours, theirs = (m.embed_positions.weight for m in (audio_encoder.model, fresh))
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)

    def test_whispers_decoder_writes_down_what_our_ear_hears(self, tiny_en: Path, tmp_path: Path) -> None:
        """The decoder of the same file, converted here, on our features: it names the animals in the sentence."""
        if (speak := shutil.which("espeak-ng")) is None:
            pytest.skip("espeak-ng is not installed (Debian: apt-get install espeak-ng)")
        pytest.importorskip("soundfile", reason="sound needs `pip install 'opticnerve[audio]'`")
        from opticnerve.data.media.audio import open_audio

        subprocess.run([speak, "-v", "en-us", "-w", tmp_path / "a.wav", "The dog looks at the cat."], check=True)
        audio_encoder = WhisperEncoder.from_pretrained("starter/whisper-tiny.en").eval()
        sound = audio_encoder.feature_extractor()(
            open_audio(tmp_path / "a.wav"), sampling_rate=16_000, return_tensors="pt"
        )
        decoder = whole_whisper(tiny_en)
        features = tf.modeling_outputs.BaseModelOutput(last_hidden_state=hear(audio_encoder, sound["input_features"]))
        said = [50257, 50362]  # <|startoftranscript|><|notimestamps|>
        with torch.no_grad():
            while said[-1] != 50256 and len(said) < 20:
                logits = decoder(encoder_outputs=features, decoder_input_ids=torch.tensor([said])).logits
                said.append(int(logits[0, -1].argmax()))
        dog, looks, cat = 3290, 3073, 3797  # " dog", " looks", " cat" in GPT-2's vocabulary
        assert {dog, looks, cat} <= set(said), said


def whole_whisper(file: Path) -> Any:
    """The decoder of an OpenAI file in transformers' model."""
    tensors = torch.load(file, weights_only=True)["model_state_dict"]
    model = tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            **starter.audio_encoder("starter/whisper-tiny.en").architecture, vocab_size=51864, decoder_layers=4,
            decoder_attention_heads=6, decoder_ffn_dim=1536,
        )
    ).eval()  # fmt: skip
    names = [
        (r"cross_attn_ln", "encoder_attn_layer_norm"), (r"\bcross_attn\.", "encoder_attn."),
        (r"\battn_ln", "self_attn_layer_norm"), (r"\battn\.", "self_attn."), (r"mlp_ln", "final_layer_norm"),
        (r"mlp\.0", "fc1"), (r"mlp\.2", "fc2"), (r"\.query\.", ".q_proj."), (r"\.key\.", ".k_proj."),
        (r"\.value\.", ".v_proj."), (r"\.out\.", ".out_proj."), (r"blocks\.", "layers."), (r"^decoder\.ln\.", "decoder.layer_norm."),
        (r"token_embedding", "embed_tokens"), (r"positional_embedding", "embed_positions.weight"),
    ]  # fmt: skip
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("decoder."):
            for pattern, ours in names:
                name = re.sub(pattern, ours, name)
            renamed[name.removeprefix("decoder.")] = tensor.float()
    model.model.decoder.load_state_dict(renamed)
    model.tie_weights()
    return model
