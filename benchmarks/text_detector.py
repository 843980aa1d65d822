"""How often the ingest's text detector finds burnt-in text, and how often it sees some in vain.

    python -m benchmarks.text_detector [pictures per kind]

Random words in the fonts of this machine and of matplotlib, 4 to 12 % of the picture high, white or
yellow with a dark rim, or white on a black bar, at random places; on textures of random roughness,
and on the same with up to 40 ellipses and rectangles. Numbers: docs/ingest.md.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.text_share import text_mask

_HEIGHT, _WIDTH = 360, 640
_WORDS = """the quick brown fox jumps over a lazy dog while Breaking News tonight 2024 subscribe
    LIVE channel weather report why not now HELLO world"""


def texture(rng):
    """Colour noise whose spectrum falls as 1 / f ** (0.8 to 1.6), RGB (h w 3)."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(_WIDTH), np.fft.fftfreq(_HEIGHT)))
    frequency[0, 0] = 1
    layers = []
    for _ in range(3):
        noise = rng.standard_normal((_HEIGHT, _WIDTH))
        spectrum = np.fft.fft2(noise) / frequency ** rng.uniform(0.8, 1.6)
        spectrum[0, 0] = 0
        layer = np.fft.ifft2(spectrum).real
        layers.append(layer / layer.std() * rng.uniform(20, 60) + rng.uniform(60, 190))
    return np.clip(np.stack(layers, -1), 0, 255).astype(np.uint8)


def shapes(rng):
    image = Image.fromarray(texture(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(3, 40)):
        x, y, width, height = rng.integers([0, 0, 5, 5], [_WIDTH, _HEIGHT, 150, 150])
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        colour = tuple(rng.integers(0, 256, 3).tolist())
        shape((int(x), int(y), int(x + width), int(y + height)), fill=colour)
    return np.asarray(image)


def add_text(picture, rng, fonts):
    """The picture with a line of text, and the box it is in."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    size = int(_HEIGHT * rng.uniform(0.04, 0.12))
    font = ImageFont.truetype(fonts[rng.integers(len(fonts))], size)
    text = " ".join(rng.choice(_WORDS.split(), rng.integers(2, 6)))
    left, top, right, bottom = (int(v) for v in draw.textbbox((0, 0), text, font=font))
    x = int(rng.uniform(0, max(1, _WIDTH - (right - left))))
    y = int(rng.uniform(0, _HEIGHT - (bottom - top) - size * 0.3))
    style = rng.integers(3)
    if style == 0:
        draw.rectangle((x - 4, y, x + right + 4, y + bottom + 4), fill=(0, 0, 0))
        draw.text((x, y), text, font=font, fill=(240, 240, 240))
    else:
        fill = (255, 255, 255) if style == 1 else (255, 240, 0)
        rim = max(1, size // 14)
        draw.text((x, y), text, font=font, fill=fill, stroke_width=rim, stroke_fill=(0, 0, 0))
    rows = slice(max(0, y + top), min(_HEIGHT, y + bottom))
    return np.asarray(image), (rows, slice(max(0, x + left), min(_WIDTH, x + right)))


def grey(picture):
    return np.asarray(Image.fromarray(picture).convert("L"))


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    fonts = sorted(
        str(p) for p in Path(matplotlib.get_data_path(), "fonts/ttf").glob("DejaVu*.ttf")
    )
    fonts = [font for font in fonts if "Display" not in font]
    for make in (texture, shapes):
        rng = np.random.default_rng(0)
        covered, false_shares = [], []
        for _ in range(count):
            picture = make(rng)
            false_shares.append(text_mask(grey(picture)).mean())
            lettered, box = add_text(picture, rng, fonts)
            covered.append(text_mask(grey(lettered))[box].mean())
        covered, false_shares = np.array(covered), np.array(false_shares)
        print(
            f"{make.__name__}: {count} pictures; found (half of the text covered) "
            f"{(covered >= 0.5).mean():.1%}, covered {covered.mean():.1%}; seen in vain "
            f"{(false_shares > 0).mean():.1%}, over 1 % of the picture "
            f"{(false_shares > 0.01).mean():.1%}, on average {false_shares.mean():.3%} of it"
        )


if __name__ == "__main__":
    main()
