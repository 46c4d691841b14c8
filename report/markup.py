"""HTML as values: whatever `element` did not make is text, and comes out as text. And bytes as data: addresses."""
import base64
import html
import io
import json

import numpy as np

VOID = {"br", "img", "input", "link", "meta"}  # without content or end


class Markup(str):
    """HTML; every other string is text."""


def clean(text):
    """`text` with what cannot be printed, or would turn the text around, as escapes: a\\x07, \\udcff, \\u202e."""
    text = str(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def element(name, /, *content, **attributes):
    """<name attributes>content</name>. Of attributes the last _ is dropped and others become -; None and False leave one
    out, True gives it no value. Content: Markup, text, numbers, None, or lists of these."""
    words = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.removesuffix("_").replace("_", "-") if key != "viewBox" else key
            words.append(key if value is True else f'{key}="{html.escape(clean(value))}"')
    head = " ".join(words)
    return Markup(f"<{head}>" if name in VOID else f"<{head}>{join(*content)}</{name}>")


def join(*content):
    """The pieces one after the other, text escaped."""
    return Markup("".join(part if isinstance(part, Markup) else join(*part) if isinstance(part, (list, tuple))
                          else html.escape(clean(part)) for part in content if part is not None))


def section(name, title, *content):
    return element("section", element("h2", title), content, id=name)


def note(*text):
    return element("p", text, class_="note")


def bdi(text):
    """A name out of the data, which may run from right to left."""
    return element("bdi", text)


def data_block(name, value):
    """A JSON value for the page's script to read; no text in it can end the block."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return Markup(f'<script type="application/json" id="{name}">{text}</script>')


def data_address(kind, content):
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def grey_png(values, low, high, levels=32):
    """(rows, columns), first row at the bottom, as a grey picture: `low` black, `high` white, not finite black. So few
    levels are told apart by no eye and halve the bytes."""
    share = np.clip((np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-9), 0, 1)
    return _png(np.round(share * (levels - 1))[::-1] * 255 / (levels - 1))


def colour_png(opacity, colour):
    """(rows, columns) opacities 0 to 1, first row at the bottom, of one (red, green, blue)."""
    pixels = np.empty((*opacity.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = colour, np.round(255 * np.clip(opacity, 0, 1))
    return _png(pixels[::-1])


def _png(pixels):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels, np.uint8)).save(file, "PNG", optimize=True)
    return file.getvalue()


def mp3(wave, rate):
    """(samples,) float32, raised or lowered to a peak of 0.9, as a small mono MP3, or None where libsndfile has no encoder
    for it."""
    import soundfile as sf

    wave = np.asarray(wave, np.float32)
    wave = wave * np.float32(0.9 / max(1e-6, np.abs(wave).max(initial=0)))
    file = io.BytesIO()
    try:
        with sf.SoundFile(file, "w", rate, 1, format="MP3", compression_level=0.8) as out:
            for i in range(0, len(wave), rate):  # in blocks: libsndfile's encoders have overrun their stack on long writes
                out.write(wave[i:i + rate])
    except (sf.SoundFileError, RuntimeError, ValueError, TypeError):
        return None
    return file.getvalue()
