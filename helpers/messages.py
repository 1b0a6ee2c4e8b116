"""A row becomes chat messages and a target text; a model's text becomes boxes.

The format and its parser stand together. It is Qwen2-VL's own grounding format: one unit a box, x first, whole
thousandths of the picture's width and height, no spaces:

    <|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(278,495),(726,625)<|box_end|>
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from helpers.boxes import area, reading_order, xyxy_unit_to_xyxy_1000, yxyx_unit_to_xyxy_unit

NO_TABLE = "no nutrition table"  # the whole completion for a picture without one
END_OF_TURN = "<|im_end|>"  # ends a completion; the chat template adds it to a target
SPECIAL = ("<|im_start|>", END_OF_TURN, "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|object_ref_start|>",
           "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")

_NAME = re.compile(r"[^\W_][\w /&'-]*")
_SPECIAL = re.compile(r"<\|\w+\|>")
_MARKUP = re.compile(_SPECIAL.pattern + r"|</?(?:box|ref|obj)>")
_PAIR = r"\(\s*(-?[0-9]+)\s*,\s*(-?[0-9]+)\s*\)"
_BOX = re.compile(_PAIR + r"\s*(?:,\s*)?" + _PAIR)  # white space in one place only, or a long gap takes minutes


@dataclass(frozen=True, eq=False)
class Parsed:
    """What was read from one completion."""

    labels: list[str]  # N names, in the order of the text
    boxes_xyxy_unit: np.ndarray  # float64 [N, 4] in 0-1, each with an area
    spans: list[tuple[int, int]]  # N ranges of characters: where in the text each box's coordinates stand
    rejected: list[str]  # each piece of text that was not used, and why
    empty_answer: bool  # the completion says that there is no table


def check_tokenizer(tokenizer) -> None:
    """Raise ValueError unless `tokenizer` has Qwen2-VL's special tokens, and each digit is a token of its own."""
    for token in SPECIAL:
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise ValueError(f"its tokenizer has no token {token}, which prompts and completions need")
    pairs = ",".join(f"{pair:02}" for pair in range(100))
    pieces = tokenizer.tokenize(pairs)
    if pieces != list(pairs):
        raise ValueError(f"its tokenizer writes {pairs[:8]} as {tokenizer.tokenize(pairs[:8])}, and each digit must be "
                         "a token of its own (is tokenizer.json there?)")


def target_text(objects: Mapping) -> str:
    """The completion that a model should generate, boxes in reading order, without the end-of-turn token.

    `objects` has `bbox` (list of [y0, x0, y1, x1] in 0-1) and `category_name` (list of names, as many).
    No box gives `NO_TABLE`. Coordinates are rounded to the nearest thousandth; a side that would vanish is
    widened to one thousandth. Raises `ValueError` for boxes without area, outside 0-1 or malformed, and for
    names that the format cannot carry: the audit removes such rows.
    """
    names, boxes = list(objects["category_name"]), yxyx_unit_to_xyxy_unit(objects["bbox"])
    if len(names) != len(boxes):
        raise ValueError(f"{len(boxes)} boxes but {len(names)} category names; each box needs one")
    for name in names:
        if not _NAME.fullmatch(name) or name != name.strip() or name.lower() == NO_TABLE:
            raise ValueError(f"category name {name!r} cannot stand in a completion; use letters, digits, spaces and -")
    if (area(boxes) == 0).any():
        raise ValueError(f"box {boxes[area(boxes) == 0][0].tolist()} has no area; drop it before making messages")
    if not names:
        return NO_TABLE
    whole = xyxy_unit_to_xyxy_1000(boxes)
    outward = np.concatenate([np.floor(boxes[:, :2] * 1000), np.ceil(boxes[:, 2:] * 1000)], axis=1).clip(0, 1000)
    meet = np.tile(whole[:, :2] == whole[:, 2:], 2)  # edges that rounding made meet are rounded outwards instead
    corners = np.where(meet, outward, whole).astype(np.int64).tolist()
    return "".join("<|object_ref_start|>{}<|object_ref_end|><|box_start|>({},{}),({},{})<|box_end|>".format(
        names[i], *corners[i]) for i in reading_order(boxes))


def longest_unit(tokenizer, names: Sequence[str]) -> int:
    """Tokens that a box with one of these names takes at most. Raises ValueError where there is no name."""
    if not names:
        raise ValueError("constrained decoding needs names to choose from; give at least one.")
    units = [target_text({"bbox": [[0, 0, 1, 1]], "category_name": [name]}) for name in names]
    return max(len(tokenizer.encode(unit, add_special_tokens=False)) for unit in units) + 4  # 0 may be 999


def special_token(prompt: str) -> str | None:
    """The first special token written out in a prompt, such as `<|image_pad|>`: the tokenizer would take it for one."""
    found = _SPECIAL.search(prompt)
    return found.group() if found else None


def to_messages(row: Mapping, prompt: str) -> dict:
    """One row as TRL's conversational prompt and completion, with the picture.

    Returns `{"prompt": [user message], "completion": [assistant message], "images": [PIL image]}`. The picture
    stands before the text. The chat template adds system message and end-of-turn tokens. Raises `ValueError` for a
    prompt with a special token in it.
    """
    if special_token(prompt):
        raise ValueError(f"the prompt {prompt!r} has the special token {special_token(prompt)} in it; leave it out")
    user = [{"type": "image"}, {"type": "text", "text": prompt}]
    assistant = [{"type": "text", "text": target_text(row["objects"])}]
    return {"prompt": [{"role": "user", "content": user}],
            "completion": [{"role": "assistant", "content": assistant}], "images": [row["image"]]}


def parse_text(text: str) -> Parsed:
    """Reads the boxes out of a completion; never raises, and reports each piece that it did not use.

    Special tokens, `<box>` in its variants and stray `>` are optional, so that text decoded with or without
    special tokens reads alike. The name of a box is the text before it on its line, or the last name when there
    is none. Boxes count as written or not at all: coordinates outside 0-1000, swapped corners and boxes without
    area are rejected, not repaired.
    """
    plain = _MARKUP.sub(lambda tag: "\n" * len(tag.group()), text)
    labels, boxes, spans, rejected = [], [], [], []
    label, end = "", 0
    for match in _BOX.finditer(plain):
        label = _read_label(plain[end : match.start()], rejected) or label
        end = match.end()
        fault = _fault(match.groups())
        if fault:
            rejected.append(_piece(match.group(), fault))
        else:
            labels.append(label)
            boxes.append([int(number) / 1000 for number in match.groups()])
            spans.append(match.span())
    rest = _lines(plain[end:])
    empty_answer = not end and [line.lower() for line in rest] == [NO_TABLE]
    if not end and not rest:
        rejected.append(_piece("", "empty completion"))
    rejected.extend(_piece(line, _why_unread(line)) for line in rest if not empty_answer)
    return Parsed(labels, np.array(boxes, dtype=np.float64).reshape(-1, 4), spans, rejected, empty_answer)


def _lines(text: str) -> list[str]:
    return [line for line in (line.strip(" \t\r>,;:.") for line in text.split("\n")) if line]


def _read_label(gap: str, rejected: list[str]) -> str:
    """The name in the text before a box: its last line. Earlier lines, and lines that are no name, are rejected."""
    lines = _lines(gap)
    label = lines.pop() if lines else ""
    rejected.extend(_piece(line, _why_unread(line)) for line in lines)
    if label.lower() == NO_TABLE:
        rejected.append(_piece(label, "denies a table, and a box follows"))
        return ""
    if label and not _NAME.fullmatch(label):
        rejected.append(_piece(label, _why_unread(label)))
        return ""
    return label


def _why_unread(line: str) -> str:
    if "(" in line or ")" in line:
        return "not a whole box, (x0,y0),(x1,y1)"
    return "a name without a box" if _NAME.fullmatch(line) else "neither name nor box"


def _fault(numbers: tuple[str, ...]) -> str:
    """Why four written numbers are no box, or nothing."""
    if any(len(number) > 6 or not 0 <= int(number) <= 1000 for number in numbers):
        return "coordinate outside 0-1000"
    x0, y0, x1, y1 = map(int, numbers)
    if x1 < x0 or y1 < y0:
        return "swapped corners"
    return "no area" if x0 == x1 or y0 == y1 else ""


def _piece(text: str, why: str) -> str:
    short = text if len(text) <= 80 else text[:77] + "..."
    return f"{short!r}: {why}"
