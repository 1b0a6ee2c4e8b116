"""The American labels: nutrition, upright and tabular, and drug facts. Each paints into the whole of `image`."""

import random

from PIL import Image, ImageDraw

from helpers.scenes.text import Style, fit, paragraph, put

US_ROWS = ["Total Fat", "  Saturated Fat", "  Trans Fat", "Cholesterol", "Sodium", "Total Carbohydrate",
           "  Dietary Fiber", "  Total Sugars", "Protein", "Vitamin D", "Calcium", "Iron", "Potassium", "Vitamin A",
           "Vitamin C", "Thiamin", "Niacin"]
US_TITLES = ["Nutrition Facts"] * 5 + ["Valeur nutritive", "Nutrition Facts / Datos", "Información Nutricional"]
NOTE = ("*The % Daily Value tells you how much a nutrient in a serving of food contributes to a daily diet. "
        "2,000 calories a day is used for general nutrition advice.")


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
    face = (style.family, True, int(size * large**2))
    put(image, w - pad, y + 1.4 * step, str(rng.randint(5, 70) * 10), face, ink, "r")
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
    big = min(fit(word, style.family, True, left * 0.9, h * 0.24) for word in (first, second))
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


DRUG_ROWS = [("Active ingredient", "Purpose"), ("Ibuprofen 200 mg", "Pain reliever"), ("Zinc oxide 10%", "Protectant")]
DRUG_PARTS = {
    "Uses": "temporarily relieves minor aches and pains due to headache backache toothache the common cold",
    "Warnings": "For external use only. Do not use on deep wounds. Ask a doctor before use if you have a fever",
    "When using this product": "keep out of eyes. Rinse with water to remove. Avoid contact with clothing",
    "Keep out of reach of children": "If swallowed, get medical help or contact a Poison Control Center right away",
    "Directions": "adults take 1 tablet every 4 to 6 hours while symptoms persist do not exceed 6 tablets in 24 hours",
    "Other information": "store at 20-25 C avoid high humidity see end flap for expiration date and lot number",
    "Inactive ingredients": "colloidal silicon dioxide corn starch sodium lauryl sulfate stearic acid titanium dioxide",
    "Questions or comments?": "call toll free weekdays 9 AM to 5 PM or visit our site",
}


def drug_facts(rng: random.Random, image: Image.Image, style: Style) -> None:
    """The label of American medicines (21 CFR 201.66): a large title, bars, headings with text or short rows."""
    draw, (w, h), ink = ImageDraw.Draw(image), image.size, style.ink
    pad, bars = max(2, round(0.025 * w)), rng.random() < 0.7
    draw.rectangle((0, 0, w - 1, h - 1), outline=ink, width=max(1, round(w / rng.choice([60, 120]))))
    title = rng.choice(["Drug Facts"] * 3 + ["Lighting Facts", "Drug Facts (continued)"])
    big = fit(title, style.family, True, w - 3 * pad, min(0.16 * h, 0.2 * w))
    put(image, pad + 1, 1.05 * big, title, (style.family, True, big), ink)
    y, size = 1.3 * big, max(4, int(min(0.5 * big, 0.05 * h + 3)))
    draw.rectangle((pad, y, w - pad, y + max(1, 0.12 * big)), fill=ink)
    y += 0.25 * big
    for left, right in rng.sample(DRUG_ROWS, rng.randint(0, 3)):
        y += 1.2 * size
        put(image, pad + 1, y, left, (style.family, True, fit(left, style.family, True, 0.5 * w, size)), ink)
        put(image, w - pad, y, right, (style.family, False, fit(right, style.family, False, 0.4 * w, size)), ink, "r")
        draw.line((pad, y + 0.25 * size, w - pad, y + 0.25 * size), fill=ink, width=1)
    parts = rng.sample(sorted(DRUG_PARTS.items()), rng.randint(2, 6))
    step = (h - 2 - y) / len(parts)
    for heading, text in parts if step > 5 else []:
        words = [(word, True) for word in heading.split()] + [(word, False) for word in text.split()]
        paragraph(image, (pad + 1, y + 0.02 * h, w - pad, y + step - 1), words, style.family, ink, size)
        y += step
        draw.rectangle((pad, y - 1, w - pad, y - 1 + (rng.choice([0, 2]) if bars else 0)), fill=ink)
