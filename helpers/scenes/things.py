"""The things around a nutrition panel, each painted into the whole of a small picture."""

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from helpers.scenes.american import drug_facts
from helpers.scenes.panels import lookalike
from helpers.scenes.text import FAMILIES, Style, fit, luma, paragraph, put

#: name -> (least, most) width over height that the thing is drawn at
SHAPES = {
    "barcode": (1.0, 2.2), "qr code": (1.0, 1.0), "logo": (0.8, 2.6), "product name": (1.4, 6.0),
    "ingredient list": (0.5, 4.0), "directions": (0.5, 3.0), "cooking table": (0.7, 2.6), "price table": (0.7, 2.6),
    "dosage table": (0.7, 2.6), "best-before stamp": (1.8, 5.5), "recycling mark": (0.9, 1.1), "flag": (1.3, 1.7),
    "seal": (0.95, 1.05), "food picture": (0.7, 1.6), "drug facts": (0.3, 3.0),
}
_L = ["0001101", "0011001", "0010011", "0111101", "0100011", "0110001", "0101111", "0111011", "0110111", "0001011"]
_PARITY = ["LLLLLL", "LLGLGG", "LLGGLG", "LLGGGL", "LGLLGG", "LGGLLG", "LGGGLL", "LGLGLG", "LGLGGL", "LGGLGL"]


def _flip(bits: str) -> str:
    return bits.translate(str.maketrans("01", "10"))


def barcode(rng: random.Random, image: Image.Image, style: Style, words: dict, digits: str) -> None:
    """EAN-13 as in ISO/IEC 15420, with its quiet zone and its digits below."""
    draw, (w, h) = ImageDraw.Draw(image), image.size
    left = "".join(_L[int(d)] if p == "L" else _flip(_L[int(d)])[::-1]
                   for d, p in zip(digits[1:7], _PARITY[int(digits[0])], strict=True))
    bits = "101" + left + "01010" + "".join(_flip(_L[int(d)]) for d in digits[7:]) + "101"
    draw.rectangle((0, 0, w, h), fill=(255, 255, 255))
    ink = rng.choice([(10, 10, 12)] * 5 + [(20, 30, 90), (80, 30, 20)])
    quiet, bottom = 0.06 * w, h - max(5, 0.16 * h)
    strip = np.repeat(np.array([[bit == "1" for bit in bits]], dtype=np.uint8) * 255, 2, axis=0)
    room = max(1, int(w - 2 * quiet)), max(1, int(bottom - 0.04 * h))
    bars = Image.fromarray(strip).resize(room, Image.Resampling.BOX)
    image.paste(ink, (int(quiet), int(0.04 * h)), bars)
    put(image, w / 2, h - 0.04 * h, f"{digits[0]} {digits[1:7]} {digits[7:]}",
        ("liberation", False, fit(digits + "  ", "liberation", False, 0.9 * w, 0.17 * h)), ink, "c")


def qr_code(rng: random.Random, image: Image.Image, style: Style, words: dict, digits: str) -> None:
    """A square of random modules with the three finder patterns of a QR code."""
    n = rng.choice([21, 25, 29])
    cells = np.frombuffer(rng.randbytes(n * n), np.uint8).reshape(n, n) > 127
    finder = np.pad(np.pad(np.pad(np.ones((3, 3), bool), 1), 1, constant_values=True), ((0, 1), (0, 1)))
    cells[:8, :8], cells[:8, -8:], cells[-8:, :8] = finder, finder[:, ::-1], finder[::-1]
    image.paste((255, 255, 255), (0, 0, *image.size))
    inner = [max(1, int(0.88 * side)) for side in image.size]
    modules = Image.fromarray(np.where(cells, 255, 0).astype(np.uint8)).resize(inner, Image.Resampling.NEAREST)
    image.paste((10, 10, 12), [(side - part) // 2 for side, part in zip(image.size, inner, strict=True)], modules)


def logo(rng: random.Random, image: Image.Image, style: Style, words: dict, digits: str) -> None:
    """A brand's mark: a coloured shape with a made-up word."""
    draw, (w, h) = ImageDraw.Draw(image), image.size
    sounds = ["ba", "no", "li", "ru", "ma", "ve", "ko", "sta", "del", "fri"]
    text = "".join(rng.choice(sounds) for _ in range(rng.randint(2, 3)))
    text, family = rng.choice([text.title(), text.upper()]), rng.choice(sorted(FAMILIES))
    fill, ink = style.accent, (255, 255, 255) if sum(style.accent) < 420 else (30, 25, 30)
    kind, box = rng.randrange(5), (0, 0, w - 1, h - 1)
    if kind == 0:
        draw.ellipse(box, fill=fill, outline=ink, width=max(1, h // 25))
    elif kind == 1:
        draw.rounded_rectangle(box, radius=h // 4, fill=fill)
    elif kind == 2:
        right = [(w / 2, 0), (w - 1, h * 0.2), (w - 1, h * 0.8), (w / 2, h - 1)]
        draw.polygon([(0, h * 0.2), *right, (0, h * 0.8)], fill=fill)
    elif kind == 3:
        draw.polygon([(0, 0), (w - 1, h * 0.12), (w * 0.93, h - 1), (w * 0.06, h * 0.9)], fill=fill)
    else:
        draw.ellipse((w * 0.35, 0, w * 0.65, h * 0.45), fill=fill)
        draw.arc((w * 0.05, h * 0.3, w * 0.95, h * 1.2), 200, 340, fill=fill, width=max(2, h // 14))
        ink = style.ink
    size = fit(text, family, True, 0.8 * w, 0.6 * h)
    put(image, w / 2, h / 2 + 0.35 * size + (0.2 * h if kind == 4 else 0), text, (family, True, size), ink, "c")


def product_name(rng: random.Random, image: Image.Image, style: Style, words: dict, digits: str) -> None:
    """The product's name in one or two large lines."""
    w, h = image.size
    lines = rng.choice(words["names"]).split(" ") if w < 3 * h else [rng.choice(words["names"])]
    family, ink = rng.choice(sorted(FAMILIES)), rng.choice([style.accent, style.ink])
    for i, line in enumerate(lines):
        line = line.upper() if style.upper else line
        size = fit(line, family, True, w, 1.0 * h / len(lines))
        put(image, w / 2, h * (i + 0.8) / len(lines), line, (family, True, size), ink, "c")


def running_text(rng: random.Random, image: Image.Image, style: Style, words: dict, heading: str, body: str) -> None:
    """A heading in bold and sentences; as much text as the room takes at a size of 5 to 12 pixels."""
    w, h = image.size
    separator = ", " if heading == "ingredients" else " "
    pieces = words[body].split(", " if heading == "ingredients" else ". ")
    rng.shuffle(pieces)
    want = 2.05 * w * h / (1.2 * rng.uniform(5.5, 0.03 * w + 8) ** 2)
    text, turn = "", 0
    while len(text) < want and len(text) < 700:
        text, turn = text + pieces[turn % len(pieces)] + separator, turn + 1
    flow = [(word, True) for word in words[heading].split()]
    flow += [(word, rng.random() < 0.04) for word in text.split()]
    paragraph(image, (0, 0, w, h), flow, style.family, style.ink, 16)


def best_before(rng: random.Random, image: Image.Image, style: Style, words: dict, digits: str) -> None:
    """A date and lot number as an ink-jet printer stamps them."""
    w, h = image.size
    day = f"{rng.randint(1, 28):02d}{rng.choice('./- ')}{rng.randint(1, 12):02d}"
    date = f"{day}{rng.choice('./- ')}20{rng.randint(24, 29)}"
    lines = [words["best"], date, f"L{rng.randint(1000, 99999)} {rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"]
    lines = lines[rng.randrange(2):] if w < 3.5 * h else lines[1:]
    ink = rng.choice([(15, 15, 20), (15, 15, 20), (40, 40, 120), (120, 20, 30), style.ink])
    ink = ink if abs(luma(ink) - luma(style.paper)) > 70 else style.ink
    if rng.random() < 0.4:
        ImageDraw.Draw(image).rectangle((0, 0, w - 1, h - 1), fill=(245, 245, 240))
        ink = (15, 15, 20)
    for i, line in enumerate(lines):
        size = fit(line, "dejavu-mono", True, 0.94 * w, 0.95 * h / len(lines))
        put(image, 0.03 * w, h * (i + 0.8) / len(lines), line, ("dejavu-mono", True, size), ink)


def recycling(rng: random.Random, image: Image.Image, style: Style, words: dict, digits: str) -> None:
    """Three arrows in a triangle, or the two arrows of the green dot."""
    draw, (w, h), ink = ImageDraw.Draw(image), image.size, rng.choice([style.ink, (20, 120, 50)])
    ink = ink if abs(luma(ink) - luma(style.paper)) > 50 else style.ink
    if rng.random() < 0.3:
        draw.ellipse((0, 0, w - 1, h - 1), fill=ink)
        ring = (w * 0.16, h * 0.16, w * 0.84, h * 0.84)
        for start in (200, 20):
            draw.arc(ring, start, start + 130, fill=style.paper, width=max(2, w // 7))
        return
    corners = [np.array(p) * (w - 1, h - 1) for p in ((0.5, 0.02), (0.98, 0.92), (0.02, 0.92))]
    for a, b in zip(corners, corners[1:] + corners[:1], strict=True):
        start, end, across = a + 0.16 * (b - a), a + 0.66 * (b - a), (b - a)[::-1] * (-0.1, 0.1)
        draw.line([tuple(start), tuple(end)], fill=ink, width=max(2, round(w / 9)))
        draw.polygon([tuple(end + 1.3 * across), tuple(end - 1.3 * across), tuple(a + 0.9 * (b - a))], fill=ink)
    face = ("liberation", True, max(5, int(0.24 * h)))
    put(image, w / 2, 0.78 * h, rng.choice(["1", "5", "PP", "21"]), face, ink, "c")


def flag(rng: random.Random, image: Image.Image, style: Style, words: dict, digits: str) -> None:
    """Three stripes, or a Nordic cross, or a disc, in a country's colours, with a thin edge."""
    draw, (w, h) = ImageDraw.Draw(image), image.size
    colours = [(200, 20, 40), (0, 60, 150), (250, 250, 250), (0, 130, 70), (250, 205, 0), (20, 20, 20), (240, 120, 20)]
    a, b, c = rng.sample(colours, 3)
    kind = rng.randrange(4)
    draw.rectangle((0, 0, w, h), fill=b)
    if kind == 0:
        draw.rectangle((0, 0, w / 3, h), fill=a), draw.rectangle((2 * w / 3, 0, w, h), fill=c)
    elif kind == 1:
        draw.rectangle((0, 0, w, h / 3), fill=a), draw.rectangle((0, 2 * h / 3, w, h), fill=c)
    elif kind == 2:
        draw.rectangle((0.28 * w, 0, 0.44 * w, h), fill=a), draw.rectangle((0, 0.4 * h, w, 0.6 * h), fill=a)
    else:
        draw.ellipse((w / 2 - 0.3 * h, 0.2 * h, w / 2 + 0.3 * h, 0.8 * h), fill=a)
    draw.rectangle((0, 0, w - 1, h - 1), outline=(120, 120, 120), width=1)


def seal(rng: random.Random, image: Image.Image, style: Style, words: dict, digits: str) -> None:
    """A round badge with a toothed edge and a word in it."""
    draw, (w, h) = ImageDraw.Draw(image), image.size
    fill = rng.choice([(30, 120, 50), (200, 160, 40), (190, 30, 40), (30, 60, 140), style.accent])
    teeth, depth = rng.randint(10, 24), rng.uniform(0.8, 0.95)
    angle = np.arange(2 * teeth) * np.pi / teeth
    reach = np.where(np.arange(2 * teeth) % 2, depth, 1.0)
    edge = np.stack([w / 2 * (1 + reach * np.cos(angle)), h / 2 * (1 + reach * np.sin(angle))], axis=1)
    draw.polygon([tuple(point) for point in edge.tolist()], fill=fill)
    draw.ellipse((0.12 * w, 0.12 * h, 0.88 * w, 0.88 * h), outline=(255, 255, 255), width=max(1, w // 40))
    text = rng.choice(["BIO", "100%", "ECO", "V", "0%", "NEW", "TOP", "FAIR"])
    size = fit(text, "dejavu", True, 0.6 * w, 0.5 * h)
    put(image, w / 2, h / 2 + 0.36 * size, text, ("dejavu", True, size), (255, 255, 255), "c")


def food_picture(rng: random.Random, image: Image.Image, style: Style, words: dict, digits: str) -> None:
    """A plate, a bowl or a heap of round things, shaded."""
    draw, (w, h) = ImageDraw.Draw(image), image.size
    hue = rng.choice([(190, 40, 30), (220, 150, 50), (110, 140, 50), (130, 80, 45), (235, 200, 120), (120, 40, 90)])
    if rng.random() < 0.6:
        draw.ellipse((0, 0.1 * h, w - 1, h - 1), fill=(235, 235, 232), outline=(190, 190, 190))
        draw.ellipse((0.1 * w, 0.18 * h, 0.9 * w, 0.88 * h), fill=tuple(int(0.6 * v) for v in hue))
    for _ in range(rng.randint(6, 22)):
        r, x, y = rng.uniform(0.07, 0.17) * min(w, h), rng.uniform(0.22, 0.78) * w, rng.uniform(0.25, 0.78) * h
        shade, stretch = rng.uniform(0.6, 1.25), rng.uniform(0.6, 1.6)
        fill = tuple(min(255, int(v * shade)) for v in hue)
        draw.ellipse((x - r * stretch, y - r, x + r * stretch, y + r), fill=fill)
        draw.ellipse((x - 0.5 * r, y - 0.6 * r, x, y - 0.2 * r), fill=tuple(min(255, v + 45) for v in fill))


DRAW: dict[str, Callable] = {
    "barcode": barcode, "qr code": qr_code, "logo": logo, "product name": product_name,
    "ingredient list": lambda r, i, s, w, d: running_text(r, i, s, w, "ingredients", "words"),
    "directions": lambda r, i, s, w, d: running_text(r, i, s, w, "directions", "steps"),
    "cooking table": lambda r, i, s, w, d: lookalike(r, i, s, w, "cooking"),
    "price table": lambda r, i, s, w, d: lookalike(r, i, s, w, "price"),
    "dosage table": lambda r, i, s, w, d: lookalike(r, i, s, w, "dosage"),
    "best-before stamp": best_before, "recycling mark": recycling, "flag": flag, "seal": seal,
    "food picture": food_picture, "drug facts": lambda r, i, s, w, d: drug_facts(r, i, s),
}
