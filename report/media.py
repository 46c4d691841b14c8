"""Spectrograms as PNG and sound as MP3, as data: addresses that a page can embed."""
import base64
import io

import numpy as np

GREY_LEVELS = 32  # no eye tells more apart, and so few halve the bytes


def data_address(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def grey_png(values: np.ndarray, low: float, high: float) -> bytes:
    """(rows, columns), first row at the bottom, as a grey picture: `low` black, `high` white.

    Values that are not finite are black, or white if plus infinity.
    """
    finite = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    share = np.clip((finite - low) / max(high - low, 1e-9), 0, 1)
    levels = np.round(share * (GREY_LEVELS - 1))
    return _png(levels[::-1] * 255 / (GREY_LEVELS - 1))


def colour_png(opacity: np.ndarray, colour: str) -> bytes:
    """(rows, columns) opacities 0 to 1, first row at the bottom, of one colour "#rrggbb"."""
    pixels = np.empty((*opacity.shape, 4), np.uint8)
    pixels[..., :3] = list(bytes.fromhex(colour[1:]))
    pixels[..., 3] = np.round(255 * np.clip(opacity, 0, 1))
    return _png(pixels[::-1])


def _png(pixels):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels, np.uint8)).save(file, "PNG", optimize=True)
    return file.getvalue()


def mp3(wave: np.ndarray, rate: int) -> bytes | None:
    """(samples,) float32, scaled to a peak of 0.9, as a small mono MP3.

    None if libsndfile has no encoder for it.
    """
    import soundfile as sf

    wave = np.asarray(wave, np.float32)
    wave = wave * np.float32(0.9 / max(1e-6, np.abs(wave).max(initial=0)))
    file = io.BytesIO()
    try:
        with sf.SoundFile(file, "w", rate, 1, format="MP3", compression_level=0.8) as out:
            # One second at a time: libsndfile's encoders have overrun their stack on long writes.
            for start in range(0, len(wave), rate):
                out.write(wave[start:start + rate])
    except (sf.SoundFileError, RuntimeError, ValueError, TypeError):
        return None
    return file.getvalue()
