"""Read audio with soundfile, and make the log-mel spectrograms that Whisper's encoders read, in numpy."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.media.signatures import describe
from finetune.system.errors import DataError, MissingExtra
from finetune.system.format import format_duration

if TYPE_CHECKING:
    import soundfile

_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "AIFF")
# Second byte of a frame without an ID3 tag: MPEG 1, 2 or 2.5, layer III, with and without a checksum.
_MP3_FRAMES = (0xFB, 0xFA, 0xF3, 0xF2, 0xE3, 0xE2)
# libsndfile also reads raw and rare formats, whose headers it cannot check.
_STARTS = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"FORM", b"ID3", *(bytes((0xFF, low)) for low in _MP3_FRAMES))
_RATES = (1_000, 384_000)
_MOST_CHANNELS = 32
# Some programs count bytes at the end of a WAV file that they do not write.
_PADDING_BYTES = 8
_BLOCK_VALUES = 1 << 20
# Of WAV, by the data type of samples.
_SUBTYPES = {"float32": "FLOAT", "float64": "DOUBLE", "int16": "PCM_16", "int32": "PCM_32"}
# Samples are between -1 and 1; a float file of 16-bit values holds thousands.
_LOUDEST = 100.0


@dataclass(frozen=True, slots=True)
class AudioSettings:
    """How audio becomes a spectrogram: keys of preprocessor_config.json, and the limit of the run's config.

    feature_size: mel bins. chunk_length: seconds that the official extractor pads to.
    """

    max_seconds: float
    feature_size: int = 128
    sampling_rate: int = 16_000
    hop_length: int = 160
    n_fft: int = 400
    chunk_length: int = 300

    def frames(self, samples: int) -> int:
        """Return the columns of the spectrogram of so many samples."""
        return -(-samples // self.hop_length)

    def tokens(self, frames: int) -> int:
        """Return the embeddings of so many columns, which two layers halve.

        Source: `_get_feat_extract_output_lengths` of Qwen2.5-Omni in transformers.
        """
        return ((frames - 1) // 2 + 1 - 2) // 2 + 1

    def log_mel(self, samples: np.ndarray) -> np.ndarray:
        """Return the log-mel spectrogram of samples [N] float32, as [feature_size, frames] float32.

        Equal to WhisperFeatureExtractor's numpy path with `padding="max_length"`, without the columns of padding. The
        extractor needs zeros after the end only as far as a column that sees the last sample.
        """
        from transformers.audio_utils import spectrogram

        frames = self.frames(len(samples))
        most = max(self.chunk_length * self.sampling_rate, len(samples))
        padded = np.pad(samples, (0, min(len(samples) + 2 * self.n_fft, most) - len(samples)))
        window, filters = _filters(self.feature_size, self.sampling_rate, self.n_fft)
        values = spectrogram(
            padded,
            window,
            frame_length=self.n_fft,
            hop_length=self.hop_length,
            power=2.0,
            mel_filters=filters,
            log_mel="log10",
        )[:, :-1]
        scaled = (np.maximum(values, values.max() - 8.0) + 4.0) / 4.0
        return np.ascontiguousarray(scaled[:, :frames])


@lru_cache(maxsize=2)
def _filters(bins: int, rate: int, n_fft: int) -> tuple[np.ndarray, np.ndarray]:
    from transformers.audio_utils import mel_filter_bank, window_function

    return window_function(n_fft, "hann"), mel_filter_bank(
        num_frequency_bins=1 + n_fft // 2,
        num_mel_filters=bins,
        min_frequency=0.0,
        max_frequency=8000.0,
        sampling_rate=rate,
        norm="slaney",
        mel_scale="slaney",
    )


def read_audio(file: io.FileIO, settings: AudioSettings) -> np.ndarray:
    """Return the mean of all channels at the settings' rate, [N] float32.

    Channels are mixed before the rate changes (scipy's polyphase filter), as Qwen's utilities do; those use another
    filter, so that samples are equal only where the file has the settings' rate.

    Raises: DataError, from the header where it is enough; MissingExtra.
    """
    with _opened(file) as sound:
        _check_header(sound, settings)
        mono = np.empty(sound.frames, np.float32)
        read = 0
        for block in sound.blocks(max(1, _BLOCK_VALUES // sound.channels), dtype="float32", always_2d=True):
            mixed = block[: len(mono) - read].mean(axis=1)
            mono[read : read + len(mixed)] = mixed
            read += len(mixed)
        rate, name = sound.samplerate, sound.format
    if read < len(mono) and name != "MP3":  # whose header estimates the length
        raise DataError(f"is cut off: its header says {len(mono)} samples, it has {read}; replace the file")
    mono = mono[:read]
    _check_samples(mono, rate)
    if rate != settings.sampling_rate:
        from scipy.signal import resample_poly

        divisor = math.gcd(rate, settings.sampling_rate)
        mono = resample_poly(mono, settings.sampling_rate // divisor, rate // divisor).astype(np.float32)
    if settings.tokens(settings.frames(len(mono))) < 1:
        shortest = 2 * settings.hop_length / settings.sampling_rate
        raise DataError(f"lasts {len(mono) / settings.sampling_rate:.3f} s, which is no token; use over {shortest} s")
    return mono


def audio_seconds(file: io.FileIO) -> float:
    """Return how long audio lasts, from its header. Raises: DataError; MissingExtra."""
    with _opened(file) as sound:
        return sound.frames / max(sound.samplerate, 1)


def to_wav(array: Any, rate: int) -> bytes:
    """Return samples [N] or [N, channels] as a WAV file of their data type. Raises: DataError; MissingExtra."""
    library = _soundfile()
    stream = io.BytesIO()
    try:
        samples = np.asarray(array)
        subtype = _SUBTYPES.get(str(samples.dtype))
        if subtype is None or samples.ndim not in (1, 2):
            raise DataError(f"is an array {samples.dtype} {samples.shape}, expected float32 or int16 samples [N]")
        library.write(stream, samples, rate, format="WAV", subtype=subtype)
    except (library.LibsndfileError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"cannot be a WAV file of {rate} samples/s ({error}); write samples [N] and their rate"
        ) from error
    return stream.getvalue()


@contextmanager
def _opened(file: io.FileIO) -> Iterator[soundfile.SoundFile]:
    library = _soundfile()
    start = file.read(4096)
    if not start.startswith(_STARTS):
        raise DataError(f"is {describe(start)}, not audio that is read here; save it as WAV, FLAC, OGG or MP3")
    _check_length(start, file)
    file.seek(0)
    try:
        with library.SoundFile(file.fileno(), closefd=False) as sound:
            if sound.format not in _FORMATS:
                raise DataError(f"is {sound.format} audio; save it as WAV, FLAC, OGG or MP3")
            yield sound
    except (library.LibsndfileError, ValueError, OverflowError) as error:
        raise DataError(f"is broken or not audio ({error}); replace the file, or save it as WAV") from error
    except MemoryError as error:
        raise DataError("needs more memory than there is; cut it into parts") from error


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: without libsndfile
        raise MissingExtra('audio needs: pip install "finetune-qlora[audio]"') from error
    return soundfile


def _check_length(start: bytes, file: io.FileIO) -> None:
    """Refuse a WAV file that ends before its header says; libsndfile would read the rest without a word."""
    size = file.seek(0, io.SEEK_END)
    said = int.from_bytes(start[4:8], "little") + 8
    # Programs that write into a pipe cannot know the length; they leave the largest number there.
    if start.startswith(b"RIFF") and size + _PADDING_BYTES < said < 2**31:
        raise DataError(f"is cut off: its header says {said} bytes, it has {size}; replace the file")


def _check_header(sound: soundfile.SoundFile, settings: AudioSettings) -> None:
    rate, channels = sound.samplerate, sound.channels
    if not _RATES[0] <= rate <= _RATES[1]:
        raise DataError(f"has {rate} samples/s, expected {_RATES[0]} to {_RATES[1]}; save it with another rate")
    if not 1 <= channels <= _MOST_CHANNELS:
        raise DataError(f"has {channels} channels, the limit is {_MOST_CHANNELS}; mix them to one")
    if sound.frames < 1:
        raise DataError("has no samples; replace the file")
    if sound.frames > settings.max_seconds * rate:
        raise DataError(
            f"lasts {format_duration(sound.frames / rate)}, the limit is {format_duration(settings.max_seconds)}; "
            "cut it into parts, or raise data.audio.max_seconds"
        )


def _check_samples(mono: np.ndarray, rate: int) -> None:
    bad = ~np.isfinite(mono)
    if bad.any():
        raise DataError(f"holds NaN or infinity, first at {bad.argmax() / rate:.3f} s; save it again")
    peak = np.abs(mono).max(initial=0)
    if peak > _LOUDEST:
        raise DataError(f"holds samples up to {peak:.0f}, expected -1 to 1; divide them, or save 16-bit integers")
