"""Model outputs to fuzz the parser with, and what must hold of whatever it reads."""

import random
import re
from collections.abc import Iterator

import numpy as np

from helpers.boxes import CATEGORIES
from helpers.messages import NO_TABLE, parse_text, target_text

# spellings that fine-tuned and untrained models were seen to give
SEEN = ("nutrition-table<box>(265,492),(735,842)>", "nutrition-table(278,495),(726,625)",
        "<|object_ref_start|>the nutrition table<|object_ref_end|><|box_start|>(0,0),(1000,1000)<|box_end|><|im_end|>",
        "The bounding box is (12, 40), (510, 620).", '{"bbox_2d": [10, 20, 300, 400], "label": "nutrition-table"}',
        "<ref>nutrition-table</ref><box>(1,2),(3,4)</box>", NO_TABLE, "")
PIECES = ("<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "<|im_end|>", "<box>", "</box>", "(", ")", ",", "\n",
          "(1,2),(3,4)", "-", "1" * 9, "0" * 9, "999999", "1e3", "1.5", "٣", "²", "\u200b", "\x00", "𝟙", " ", NO_TABLE)
NUMBER, TAG = re.compile(r"-?[0-9]+"), re.compile(r"<\|\w+\|>")
LONGEST = 40_000  # characters: 4096 tokens, the most that max_new_tokens allows, are fewer


def answer(draw: random.Random) -> str:
    """A right answer with 0 to 4 boxes."""
    boxes = []
    for _ in range(draw.choice((0, 1, 1, 1, 2, 4))):
        (x0, x1), (y0, y1) = (sorted(draw.sample(range(1001), 2)) for _ in "xy")
        boxes.append([y0 / 1000, x0 / 1000, y1 / 1000, x1 / 1000])
    return target_text({"bbox": boxes, "category_name": [draw.choice(CATEGORIES) for _ in boxes]})


def mutated(count: int, seed: int) -> Iterator[str]:
    """Real answers, each with 0 to 6 mutations."""
    draw = random.Random(f"outputs {seed}")
    for _ in range(count):
        text = draw.choice((answer(draw), answer(draw), draw.choice(SEEN)))
        for _ in range(draw.randrange(7)):
            text = _mutate(text, draw)[:LONGEST]
        yield text


def _mutate(text: str, draw: random.Random) -> str:
    start = draw.randrange(len(text) + 1)
    stop = min(len(text), start + draw.choice((1, 1, 2, 8, 40)))
    return draw.choice((
        lambda: text[:start] + text[stop:],  # lost
        lambda: text[:start],  # cut at the token limit
        lambda: text[:stop] + text[start:],  # said twice
        lambda: text + text[start:] * draw.choice((1, 30)),  # said on and on
        lambda: text[:start] + draw.choice(PIECES) + text[start:],
        lambda: text[:start] + str(draw.randrange(-50, 1100)) + text[stop:],
        lambda: text[:start] + text[start:stop][::-1] + text[stop:],
        lambda: text[:start] + answer(draw) + text[stop:],
        lambda: re.sub(r"<\|\w+\|>", "", text),  # decoded without special tokens
        lambda: text.swapcase(),
    ))()


def generated(count: int, seed: int) -> list[str]:
    """Texts that hypothesis makes of anything at all, and of the pieces that answers are made of."""
    import hypothesis
    from hypothesis import strategies as st

    texts: list[str] = []
    pieces = st.sampled_from([*PIECES, *CATEGORIES]) | st.integers(-10, 1010).map(str) | st.text(max_size=3)

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, database=None, deadline=None, derandomize=False,
                         phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.text() | st.lists(pieces, max_size=30).map("".join))
    def collect(text: str) -> None:
        texts.append(text)

    collect()
    return texts


def check(text: str) -> str:
    """What is wrong with the parser's reading of `text`, or "": it never raises, and a box is what is written."""
    parsed = parse_text(text)
    boxes = parsed.boxes_xyxy_unit
    if boxes.shape != (len(parsed.labels), 4) or len(parsed.spans) != len(parsed.labels):
        return "labels, boxes and spans are not as many"
    if not np.isfinite(boxes).all() or (boxes < 0).any() or (boxes > 1).any():
        return "a coordinate outside 0-1"
    if (boxes[:, 2:] <= boxes[:, :2]).any():
        return "a box without area"
    last = 0
    for box, (start, stop) in zip(boxes, parsed.spans, strict=True):
        if start < last:
            return "spans overlap or are out of order"
        last = stop
        written = [int(number) for number in NUMBER.findall(TAG.sub("", text[start:stop]))]
        if written != [round(number * 1000) for number in box]:
            return f"{box} was read where {text[start:stop]!r} is written"
    if parsed.empty_answer and (len(boxes) or parsed.rejected or NO_TABLE not in text.lower()):
        return "an empty answer that is none"
    if not (len(boxes) or parsed.empty_answer or parsed.rejected):
        return "nothing was read, and nothing is said about it"
    return ""
