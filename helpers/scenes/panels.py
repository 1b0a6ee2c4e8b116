"""Nutrition panels, and the tables that only look like them. Each function paints into the whole of `image`."""

import random

from PIL import Image, ImageDraw

from helpers.scenes.american import US_TITLES, us_panel, us_wide
from helpers.scenes.text import Style, fit, paragraph, put


def nutrition_rows(rng: random.Random, style: Style, words: dict, count: int, columns: int) -> list[list[str]]:
    """`count` rows of a nutrition table: a name and `columns` values with their units."""
    vitamins = [f"Vitamin {v}" for v in ("A", "B1", "B2", "B6", "B12", "C", "D", "E")] + ["Ca", "Mg", "Fe", "Zn", "K"]
    names = (words["rows"] + vitamins)[:count] if count >= 4 else words["rows"][:count]
    rows = []
    for name in names:
        values = []
        for column in range(columns):
            if name == words["rows"][0]:
                kcal = rng.randint(20, 650)
                both = f"{int(kcal * 4.184)} kJ / {kcal} kcal"
                values.append(both if rng.random() < 0.7 else f"{kcal} kcal")
            elif column == 2:
                values.append(f"{rng.randint(1, 45)}%")
            else:
                unit = rng.choice([" mg", " µg"]) if name in vitamins else " g"
                values.append(style.number(rng, rng.choice([3, 20, 70]), rng.choice([0, 1, 1, 2])) + unit)
        rows.append([name, *values])
    return rows


def _headline(image: Image.Image, style: Style, title: str, step: float, pad: float) -> float:
    """The title line of a table; returns where the next line begins, in pixels from the top."""
    y = 0.15 * step
    title = title.upper() if style.upper else title
    size = fit(title, style.family, style.bold_title, image.size[0] - 3 * pad, 1.05 * step)
    if style.head_fill:
        ImageDraw.Draw(image).rectangle((0, 0, image.size[0], y + 1.3 * step), fill=style.accent)
    put(image, pad + 1, y + 1.0 * step, title, (style.family, style.bold_title, size),
        style.paper if style.head_fill else style.ink)
    return y + 1.3 * step


def table(image: Image.Image, style: Style, title: str, head: list[str], rows: list[list[str]], note: str = "") -> None:
    """A table in the style: title line, head line, rows; the font size follows from the room there is."""
    draw, (w, h) = ImageDraw.Draw(image), image.size
    columns = max(len(row) for row in rows)
    lines = len(rows) + (1.3 if title else 0) + (1 if head else 0) + (1.4 if note else 0)
    pad, step = max(1.0, 0.015 * w), h / (lines + 0.3)
    longest = max((row[0] for row in rows), key=len)
    share = 1.0 if columns == 1 else min(0.62, max(0.3, len(longest) / (len(longest) + 9.5 * (columns - 1))))
    size = fit(longest, style.family, False, share * (w - 2 * pad), 0.78 * step)
    rest = (w - 2 * pad) * (1 - share) / max(1, columns - 1)
    if columns > 1:
        cells = sorted((cell for row in rows for cell in row[1:]), key=len)
        widest = cells[-min(columns, len(cells))]
        size_of_values = min(size, fit(widest, style.family, False, 0.96 * rest, size))
    if style.frame:
        draw.rectangle((0, 0, w - 1, h - 1), fill=None, outline=style.ink, width=style.frame)
    y = _headline(image, style, title, step, pad) if title else 0.15 * step
    for i, row in enumerate(([["", *head]] if head else []) + rows):
        if style.zebra and i % 2:
            draw.rectangle((style.frame, y, w - 1 - style.frame, y + step), fill=style.tint)
        if (style.rules in ("rows", "grid") or (style.rules == "head" and i < 2)) and y > step / 2:
            draw.line((pad, y, w - pad, y), fill=style.ink, width=1)
        bold = bool(head) and i == 0
        put(image, pad + 1 + (size * 0.6 if row[0].startswith(("  ", "of ", "dont", "davon")) else 0),
            y + 0.75 * step, row[0].strip(), (style.family, bold, size), style.ink)
        for c, cell in enumerate(row[1:], start=1):
            small = fit(cell, style.family, bold, 0.96 * rest, size_of_values)
            put(image, pad + (w - 2 * pad) * share + c * rest - 1, y + 0.75 * step, cell,
                (style.family, bold, small), style.ink, "r")
        y += step
    if style.rules == "grid":
        for c in range(columns - 1):
            x = pad + (w - 2 * pad) * share + c * rest
            draw.line((x, 1.4 * step if title else 0, x, y), fill=style.ink, width=1)
    if note:
        paragraph(image, (pad + 1, y, w - pad, h - 1), [(word, False) for word in note.split()], style.family,
                  style.ink, 0.6 * size)


def eu_panel(rng: random.Random, image: Image.Image, style: Style, words: dict) -> None:
    """Rows of nutrients against columns of amounts; as many columns and rows as suit the panel's shape."""
    w, h = image.size
    fits = []
    for columns in (1, 1, 2, 2, 3, 4):
        count = round((8 + 5 * columns) * h / (1.25 * w)) - 2
        fits += [(columns, count)] if 5 <= count <= 15 else []
    columns, count = rng.choice(fits) if fits else ((1, 15) if h > w else (4, 5))
    count = max(3, min(count, int(h / 7) - 2))
    head = rng.sample(words["per"], columns) if columns > 1 or rng.random() < 0.8 else []
    count = max(min(count, 5), round(count * rng.choice([1, 1, rng.uniform(0.55, 1)])))
    note = words["note"] if rng.random() < 0.3 and h / (count + 3) > 8 else ""
    title = rng.choice(words["title"]) if rng.random() < 0.9 or not head else ""
    table(image, style, title, head[:4], nutrition_rows(rng, style, words, count, columns), note)


def linear_panel(rng: random.Random, image: Image.Image, style: Style, words: dict) -> None:
    """A low, wide panel: the nutrients are columns, the amounts rows."""
    names = words["rows"][: max(3, min(8, int(image.size[0] / max(1, image.size[1]) * 1.6)))]
    body = nutrition_rows(rng, style, words, len(names), 2)
    short = [name.split()[-1] for name in names]
    rows = [[words["per"][c], *[row[c + 1].split(" /")[0] for row in body]] for c in range(rng.choice([1, 2, 2]))]
    table(image, style, rng.choice(words["title"]) if rng.random() < 0.7 else "", short, rows)


def text_panel(rng: random.Random, image: Image.Image, style: Style, words: dict) -> None:
    """The nutrition facts as one running paragraph."""
    facts = [(word, True) for word in f"{rng.choice(words['title'])} {words['per'][0]}:".split()]
    for row in nutrition_rows(rng, style, words, rng.randint(6, 12), 1):
        facts += [(word, False) for word in f"{row[0]}: {row[1]}{rng.choice([',', ';', ','])}".split()]
    paragraph(image, (1, 0, *image.size), facts, style.family, style.ink)


def lozenge(rng: random.Random, image: Image.Image, style: Style, name: str, value: str) -> None:
    """One rounded field as on the front of a pack: the nutrient, its amount, its share of the reference intake."""
    draw, (w, h) = ImageDraw.Draw(image), image.size
    fill = rng.choice([style.paper, style.accent, style.tint, (255, 255, 255)])
    ink = (20, 20, 25) if sum(fill) > 330 else (250, 250, 250)
    radius, edge = min(w, h) * rng.uniform(0.15, 0.5) * (min(w, h) > 11), max(1, round(min(w, h) / 40))
    if abs(w - h) <= 2:  # Pillow fails on a radius of half a side there
        radius = min(radius, min(w, h) / 2 - 1.5)
    draw.rounded_rectangle((0, 0, w - 1, h - 1), radius=max(0, radius), fill=fill, outline=style.ink, width=edge)
    lines = [name, *value.split(" / "), f"{rng.randint(1, 40)}%"]
    lines = lines if h > 0.9 * w else [name, value] if h > 0.3 * w else [f"{name} {value}"]
    for i, line in enumerate(lines):
        size = fit(line, style.family, i == 1, w * 0.84, 0.7 * h / len(lines))
        put(image, w / 2, h * (0.1 + 0.8 * (i + 0.75) / len(lines)), line, (style.family, i == 1, size), ink, "c")


def lozenges(rng: random.Random, image: Image.Image, style: Style, words: dict) -> None:
    """The row of fields on the front of a pack (energy, fat, saturates, sugars, salt), or a column of them."""
    (w, h), count = image.size, rng.choice([4, 5, 5])
    body = nutrition_rows(rng, style, words, 8, 1)
    for k, i in enumerate([0, 1, 2, 4, 7][-count:]):
        across = w >= h
        size = (max(4, int(w / count) - 1), h) if across else (w, max(4, int(h / count) - 1))
        field = image.crop((0, 0, *size))
        lozenge(rng, field, style, body[i][0].split()[-1], body[i][1])
        image.paste(field, (round(k * w / count), 0) if across else (0, round(k * h / count)))


def draw_panel(rng: random.Random, image: Image.Image, style: Style, words: dict, category: str,
               american: bool) -> None:
    """A nutrition panel of `category` (a name of `boxes.CATEGORIES`) over the whole of `image`."""
    ratio = image.size[0] / image.size[1]
    energy = f"{rng.randint(100, 2400)} kJ / {rng.randint(20, 650)} kcal"
    if category == "nutrition-table-text":
        text_panel(rng, image, style, words)
    elif category == "nutrition-table-small-energy":
        lozenge(rng, image, style, words["rows"][0].split()[-1], energy)
    elif category == "nutrition-table-small":
        if ratio > 2.2 or ratio < 0.45 or rng.random() < 0.4:
            lozenges(rng, image, style, words)
        else:
            rows = nutrition_rows(rng, style, words, rng.randint(2, 4), 1 + (ratio > 1.5))
            table(image, style, rng.choice(words["title"]), [], rows)
    elif american and ratio < 1.5:
        us_panel(rng, image, style, rng.choice(US_TITLES))
    elif american:
        us_wide(rng, image, style, rng.choice(["Nutrition Facts"] * 3 + ["Valeur nutritive"]))
    elif ratio > 3 and image.size[1] < 110:
        linear_panel(rng, image, style, words)
    else:
        eu_panel(rng, image, style, words)


def lookalike(rng: random.Random, image: Image.Image, style: Style, words: dict, kind: str) -> None:
    """A table of cooking times, prices or doses in the same style: no nutrition panel."""
    w, h = image.size
    title, *names = words[kind]
    rng.shuffle(names)
    count, columns = max(2, min(len(names), int(h / 9) - 1, round(1.6 * h / w * 7))), rng.choice([1, 2, 2, 3])
    cell = {
        "cooking": lambda: rng.choice([f"{rng.randint(2, 45)} min", f"{rng.randint(14, 24)}0 °C"]),
        "price": lambda: rng.choice(["{} €", "€ {}", "${}", "{}"]).format(style.number(rng, 30, 2)),
        "dosage": lambda: rng.choice([f"{rng.randint(1, 12)} × {rng.randint(2, 25)}0 ml",
                                      f"{rng.randint(20, 400)} g"]),
    }
    rows = [[name, *[cell[kind]() for _ in range(columns)]] for name in names[:count]]
    heads = {"cooking": ["°C", "min", "W"], "price": ["x1", "x2", "x6"], "dosage": ["ml", "5 kg", "10 kg"]}[kind]
    table(image, style, title, heads[:columns] if rng.random() < 0.5 else [], rows)


