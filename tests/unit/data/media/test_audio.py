"""Audio: the spectrogram and tokens of the official extractor, at any rate and in every format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import _get_feat_extract_output_lengths

from finetune.data.media.audio import AudioSettings
from tests.unit.data.media.samples import audio_file, processor, tone

# Qwen2.5-Omni pads to 300 s; 2 s give the same values and take a moment.
SHORT = {"feature_size": 128, "chunk_length": 2}


def official_mel(samples: np.ndarray) -> np.ndarray:
    """What `Qwen2_5OmniProcessor` gives to the tower: the columns that its mask keeps, by the numpy path."""
    extractor = WhisperFeatureExtractor(**SHORT)
    inputs = extractor.pad({"input_features": [samples[:, None]]}, padding="max_length", max_length=extractor.n_samples)
    kept = extractor(samples, sampling_rate=16_000, return_attention_mask=True)["attention_mask"][0].sum()
    return extractor._np_extract_fbank_features(np.asarray(inputs["input_features"])[..., 0], "cpu")[0][:, :kept]


@pytest.mark.parametrize("length", [401, 480, 1600, 16_000, 16_001, 31_000, 31_700, 31_999, 32_000])
def test_the_spectrogram_equals_the_official_one(length: int):
    samples = tone(2)[:length]
    ours, official = AudioSettings(300, **SHORT).log_mel(samples), official_mel(samples)
    assert ours.shape == official.shape and ours.dtype == np.float32
    assert np.abs(ours - official).max() <= 1e-6


def test_the_spectrogram_is_near_the_one_that_the_official_processor_computes_with_torch():
    samples = tone(1)
    official = WhisperFeatureExtractor(**SHORT)(samples, sampling_rate=16_000, return_tensors="pt")["input_features"][0]
    assert torch.allclose(torch.from_numpy(AudioSettings(300, **SHORT).log_mel(samples)), official[:, :100], atol=1e-4)


@given(samples=st.integers(1, 4_800_000))
@settings(max_examples=300, deadline=None)
def test_frames_and_tokens_equal_the_official_counts(samples: int):
    mask = np.zeros((1, 4_800_000), bool)
    mask[:, :samples] = True
    frames = mask[:, ::160].sum()
    assert AudioSettings(300).frames(samples) == frames
    assert AudioSettings(300).tokens(int(frames)) == _get_feat_extract_output_lengths(torch.tensor(int(frames)))


@pytest.mark.parametrize(
    ("kind", "subtype", "error"),
    [("WAV", "FLOAT", 0), ("WAV", "PCM_16", 1e-4), ("WAV", "PCM_U8", 1e-2), ("FLAC", None, 1e-4), ("OGG", None, 0.2)]
    + [("MP3", None, 0.2), ("OGG", "OPUS", 0.2), ("AIFF", None, 1e-4), ("RF64", "FLOAT", 0)],
)
def test_every_format_gives_its_samples(kind: str, subtype: str | None, error: float):
    ours, samples = processor(), tone(1)
    rate = 48_000 if subtype == "OPUS" else 16_000
    media = ours.measure("audio", audio_file(tone(1, rate), rate, kind, subtype))
    assert abs(media.frames - 100) <= (8 if kind in ("MP3", "OGG") else 0)
    assert media.tokens == ours.audio.tokens(media.frames) and media.grid is None
    mel = ours.mel(media)
    assert mel.shape == (128, media.frames)
    if error == 0:
        assert np.array_equal(mel, ours.audio.log_mel(samples))


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 11_127])
def test_another_rate_gives_the_same_spectrogram_below_its_highest_frequency(rate: int):
    ours = processor()
    time = np.arange(rate) / rate
    content = audio_file((0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32), rate, "WAV", "FLOAT")
    media = ours.measure("audio", content)
    assert media.frames == 100
    expected = ours.audio.log_mel((0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).astype(np.float32))
    loudest = expected[:, 50].argmax()
    assert ours.mel(media)[:, 50].argmax() == loudest
    assert abs(ours.mel(media)[loudest, 50] - expected[loudest, 50]) < 1e-2


def test_channels_are_mixed_to_their_mean():
    ours, stereo = processor(), tone(0.5, channels=2)
    mixed = ours.measure("audio", audio_file(stereo, subtype="FLOAT"))
    mono = ours.measure("audio", audio_file(stereo.mean(axis=1), subtype="FLOAT"))
    assert np.array_equal(ours.mel(mixed), ours.mel(mono))


def test_an_array_with_its_rate_is_the_file_it_would_be():
    ours, samples = processor(), tone(0.5)
    media = ours.measure("audio", {"array": samples, "sampling_rate": 16_000})
    assert media.digest == ours.measure("audio", audio_file(samples, subtype="FLOAT")).digest
