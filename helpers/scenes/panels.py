"""Nutrition panels, and the tables that only look like them. Each function paints into the whole of `image`."""

import random

from PIL import Image, ImageDraw

from helpers.scenes.text import Color, fit, paragraph, put

US_ROWS = ["Total Fat", "  Saturated Fat", "  Trans Fat", "Cholesterol", "Sodium", "Total Carbohydrate",
           "  Dietary Fiber", "  Total Sugars", "Protein", "Vitamin D", "Calcium", "Iron", "Potassium", "Vitamin A",
           "Vitamin C", "Thiamin", "Niacin"]
NOTE = ("*The % Daily Value tells you how much a nutrient in a serving of food contributes to a daily diet. "
        "2,000 calories a day is used for general nutrition advice.")


class Style:
    """How the tables of one product look: family, colours, lines. Drawn once a product, so its tables are alike."""

    def __init__(self, rng: random.Random, paper: Color, ink: Color, accent: Color):
        self.family = rng.choice(["liberation"] * 4 + ["roboto-condensed"] * 4 + ["dejavu"] * 2 + ["dejavu-serif"])
        self.paper, self.ink, self.accent = paper, ink, accent
        self.frame = rng.choice([0, 0, 1, 1, 1, 2, 3])
        self.rules = rng.choice(["rows", "rows", "rows", "grid", "none", "head", "dots"])
        self.zebra = rng.random() < 0.22
        self.head_fill = rng.random() < 0.3
        self.bold_title = rng.random() < 0.8
        self.upper = rng.random() < 0.15
        self.comma = rng.random() < 0.6
        self.tint = tuple(int(0.86 * p + 0.14 * i) for p, i in zip(paper, ink))

    def number(self, rng: random.Random, high: float, digits: int = 1) -> str:
        text = f"{rng.random() * high:.{digits}f}"
        return text.replace(".", ",") if self.comma else text


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
    y = 0.15 * step
    if title:
        title = title.upper() if style.upper else title
        big = fit(title, style.family, style.bold_title, w - 3 * pad, 1.05 * step)
        if style.head_fill:
            draw.rectangle((0, 0, w, y + 1.3 * step), fill=style.accent)
        put(image, pad + 1, y + 1.0 * step, title, (style.family, style.bold_title, big),
            style.paper if style.head_fill else style.ink)
        y += 1.3 * step
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


def us_panel(rng: random.Random, image: Image.Image, style: Style, title: str) -> None:
    """The American label: a large title, thick bars, calories large, rows with % daily value."""
    draw, (w, h) = ImageDraw.Draw(image), image.size
    count = max(5, min(len(US_ROWS), round(h / w * 8), int(h / 9)))
    step = h / (count + 5.6)
    size = fit("Total Carbohydrate 28g  100%", style.family, True, w * 0.94, 0.86 * step)
    pad, ink = max(2, round(0.025 * w)), style.ink
    draw.rectangle((0, 0, w - 1, h - 1), outline=ink, width=max(1, round(w / 120)))
    big = fit(title, style.family, True, w - 2 * pad - 2, 1.9 * step)
    y = 1.45 * step
    put(image, pad, y, title, (style.family, True, big), ink)
    put(image, pad, y + 0.95 * step, f"Serving size {rng.randint(1, 4)} cup ({rng.randint(20, 250)}g)",
        (style.family, False, size), ink)
    y += 1.2 * step
    draw.rectangle((pad, y, w - pad, y + 0.35 * step), fill=ink)
    large = rng.choice([1.0, 1.3, 1.3])  # the label of before 2016 prints the calories no larger than the rest
    put(image, pad, y + 1.35 * step, "Calories", (style.family, True, int(size * large)), ink)
    put(image, w - pad, y + 1.4 * step, str(rng.randint(5, 70) * 10), (style.family, True, int(size * large**2)), ink, "r")
    y += 1.55 * step
    draw.rectangle((pad, y, w - pad, y + 0.18 * step), fill=ink)
    for i, name in enumerate(US_ROWS[:count]):
        indent, y = (size if name.startswith(" ") else 0), y + step
        if large == 1.0 and i > 8:
            pair = f"{name} {rng.randint(0, 40)}%  •  {rng.choice(US_ROWS[9:])} {rng.randint(0, 40)}%"
            put(image, w / 2, y, pair, (style.family, False, fit(pair, style.family, False, 0.9 * w, size)), ink, "c")
            continue
        shift = put(image, pad + indent, y, name.strip(), (style.family, not indent and i < 9, size), ink)
        put(image, pad + indent + shift + size * 0.3, y, f"{rng.randint(0, 40)}{rng.choice(['g', 'mg'])}",
            (style.family, False, size), ink)
        put(image, w - pad, y, f"{rng.randint(0, 60)}%", (style.family, i < 9, size), ink, "r")
        thick = i == 8 and count > 9
        draw.line((pad + indent, y + 0.2 * step, w - pad, y + 0.2 * step), fill=ink, width=3 if thick else 1)
    paragraph(image, (pad, y + 0.3 * step, w - pad, h - 2), [(word, False) for word in NOTE.split()], style.family,
              ink, 0.7 * size)


def us_wide(rng: random.Random, image: Image.Image, style: Style, title: str) -> None:
    """The tabular American label for low, wide places: title block, then the rows in two columns."""
    draw, (w, h) = ImageDraw.Draw(image), image.size
    draw.rectangle((0, 0, w - 1, h - 1), outline=style.ink, width=1)
    left = w * rng.uniform(0.22, 0.3)
    first, _, second = title.partition(" ")
    big = min(fit(first, style.family, True, left * 0.9, h * 0.24), fit(second, style.family, True, left * 0.9, h * 0.24))
    for i, line in enumerate((first, second, "4 servings", f"Calories {rng.randint(5, 60) * 10}")):
        face = (style.family, i != 2, big if i < 2 else max(4, int(big * 0.62)))
        put(image, 0.05 * left, h * (0.22 + 0.23 * i), line, face, style.ink)
    rows = max(3, min(6, int(h / 9)))
    step, column = h / (rows + 0.8), (w - left) / 2
    size = fit("Total Carbohydrate 28g 00%", style.family, False, column * 0.93, 0.8 * step)
    for c in range(2):
        x = left + c * column
        draw.line((x, 2, x, h - 2), fill=style.ink, width=2 - c)
        for r in range(rows):
            y = (r + 1) * step
            name = US_ROWS[(c * rows + r) % len(US_ROWS)].strip()
            put(image, x + 4, y, f"{name} {rng.randint(0, 40)}g", (style.family, r % 3 == 0, size), style.ink)
            put(image, x + column - 4, y, f"{rng.randint(0, 60)}%", (style.family, False, size), style.ink, "r")
            draw.line((x + 3, y + 0.2 * step, x + column - 3, y + 0.2 * step), fill=style.ink, width=1)


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
    draw.rounded_rectangle((0, 0, w - 1, h - 1), radius=min(w, h) * rng.uniform(0.15, 0.5), fill=fill, outline=style.ink,
                           width=max(1, round(min(w, h) / 40)))
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


def draw_panel(rng: random.Random, image: Image.Image, style: Style, words: dict, category: str, american: bool) -> None:
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
        us_panel(rng, image, style, rng.choice(["Nutrition Facts"] * 5 + ["Valeur nutritive", "Nutrition Facts / Datos", "Información Nutricional"]))
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
    cell = {"cooking": lambda: rng.choice([f"{rng.randint(2, 45)} min", f"{rng.randint(14, 24)}0 °C"]),
            "price": lambda: rng.choice(["{} €", "€ {}", "${}", "{}"]).format(style.number(rng, 30, 2)),
            "dosage": lambda: rng.choice([f"{rng.randint(1, 12)} × {rng.randint(2, 25)}0 ml", f"{rng.randint(20, 400)} g"])}
    rows = [[name, *[cell[kind]() for _ in range(columns)]] for name in names[:count]]
    heads = {"cooking": ["°C", "min", "W"], "price": ["x1", "x2", "x6"], "dosage": ["ml", "5 kg", "10 kg"]}[kind]
    table(image, style, title, heads[:columns] if rng.random() < 0.5 else [], rows)


