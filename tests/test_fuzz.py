"""Broken input for the parser, the data's readers and the parameters: only the documented errors come.

`make test-all` tries a hundred times as much. A counter-example is printed, and belongs at the end of this file.
"""

import ast
import copy
import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline_runner import SOURCE
from tiny_exports import FORMATS, export, undecoded

from helpers import data, evaluate
from helpers.boxes import CATEGORIES
from helpers.messages import NO_TABLE, parse_text, target_text
from helpers.recipes import PARAMETERS
from helpers.settings import ParameterError, settle

TIMES = int(os.environ.get("FUZZ", 1))
# The same cases each time where there are few; where there are many, none may take 2 s.
tried = settings(max_examples=500 * TIMES, deadline=2000 if TIMES > 1 else None, derandomize=TIMES == 1, database=None,
                 suppress_health_check=list(HealthCheck))

# --- a model's answers ------------------------------------------------------------------------------------------------

SEEN = ("nutrition-table<box>(265,492),(735,842)>", "nutrition-table(278,495),(726,625)",
        "<|object_ref_start|>the nutrition table<|object_ref_end|><|box_start|>(0,0),(1000,1000)<|box_end|><|im_end|>",
        "The bounding box is (12, 40), (510, 620).", '{"bbox_2d": [10, 20, 300, 400], "label": "nutrition-table"}',
        "<ref>nutrition-table</ref><box>(1,2),(3,4)</box>", NO_TABLE, "")
PIECES = ("<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "<|im_end|>", "<box>", "</box>", "(", ")", ",", "\n",
          "(1,2),(3,4)", "-", "1" * 9, "0" * 9, "999999", "1e3", "1.5", "٣", "²", "\u200b", "\x00", "𝟙", " ", NO_TABLE)
LONGEST = 40_000  # characters: 4096 tokens, the most that max_new_tokens allows, are fewer
pieces = st.sampled_from([*PIECES, *CATEGORIES]) | st.integers(-50, 1100).map(str)


@st.composite
def answers(draw) -> str:
    """A right answer with up to four boxes."""
    edges = st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True).map(sorted)
    corners = draw(st.lists(st.tuples(edges, edges), max_size=4))
    boxes = [[y0 / 1000, x0 / 1000, y1 / 1000, x1 / 1000] for (y0, y1), (x0, x1) in corners]
    return target_text({"bbox": boxes, "category_name": [draw(st.sampled_from(CATEGORIES)) for _ in boxes]})


@st.composite
def broken_answers(draw) -> str:
    """A right answer, or one that was seen, changed up to six times."""
    text = draw(answers() | st.sampled_from(SEEN))
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(text)))
        stop = start + draw(st.sampled_from((1, 2, 8, 40)))
        piece = draw(pieces | answers())
        text = draw(st.sampled_from([
            text[:start] + text[stop:],  # lost
            text[:start],  # cut at the token limit
            text[:stop] + text[start:],  # said twice
            text + 30 * text[start:],  # said on and on
            text[:start] + piece + text[start:],
            text[:start] + piece + text[stop:],
            text[:start] + text[start:stop][::-1] + text[stop:],
            re.sub(r"<\|\w+\|>", "", text),  # decoded without special tokens
            text.swapcase(),
        ]))[:LONGEST]
    return text


def check_reading(text: str, parse=parse_text) -> None:
    """The parser never raises, says what it did not use, and a box is what is written."""
    parsed = parse(text)
    boxes = parsed.boxes_xyxy_unit
    assert boxes.shape == (len(parsed.labels), 4) and len(parsed.spans) == len(parsed.labels)
    assert ((boxes >= 0) & (boxes <= 1)).all() and (boxes[:, :2] < boxes[:, 2:]).all()
    last = 0
    for box, (start, stop) in zip(boxes, parsed.spans, strict=True):
        assert start >= last, "spans overlap or are out of order"
        last = stop
        written = re.findall(r"-?[0-9]+", re.sub(r"<\|\w+\|>", "", text[start:stop]))
        assert [int(number) for number in written] == [round(number * 1000) for number in box]
    assert not parsed.empty_answer or not len(boxes) and not parsed.rejected and NO_TABLE in text.lower()
    assert len(boxes) or parsed.empty_answer or parsed.rejected


@tried
@given(broken_answers() | st.text() | st.lists(pieces | st.text(max_size=3), max_size=30).map("".join))
def test_whatever_a_model_writes_is_read_as_written_or_rejected_in_words(text):
    check_reading(text)


@pytest.mark.parametrize("wrong", [lambda boxes: boxes[:, [1, 0, 3, 2]], lambda boxes: boxes + 0.001,
                                   lambda boxes: boxes[:-1]])
def test_a_parser_that_is_wrong_is_found(wrong):
    """The check itself can fail: it sees swapped, shifted and lost boxes."""
    def parse(text):
        parsed = parse_text(text)
        object.__setattr__(parsed, "boxes_xyxy_unit", wrong(parsed.boxes_xyxy_unit))
        return parsed

    with pytest.raises(AssertionError):
        check_reading(SEEN[0], parse)


# --- annotation files -------------------------------------------------------------------------------------------------

ODD = [None, True, -1, 0, 1e308, float("nan"), "", "x", "../x.jpg", ".", [], {}, [[]], [None], {"a": 1}, 2**70, 10**400,
       "\0", [1, 2, 3], [[1, 2, 3, 4]], "a.jpg", ["nutrition-table"], "é" * 400]  # fmt: skip
BYTES = [b"", b"7", b"nan", b"-", b"<", b">", b"\n", b"[", b"1e999", b"\0", b" 0.5", b"\xe9", b"\xff\xfe"]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(*path, key), *places(inner, (*path, key))]]


def broken(value: Any, draw: random.Random) -> Any:
    """A copy of `value` with one to three of its parts removed or replaced."""
    value = copy.deepcopy(value)
    for _ in range(min(draw.randint(1, 3), len(places(value)))):
        *way, last = draw.choice(places(value))
        inner = value
        for key in way:
            inner = inner[key]
        if draw.random() < 0.25:
            del inner[last]
        else:
            inner[last] = copy.deepcopy(draw.choice(ODD))
    return value


def broken_bytes(value: bytes, draw: random.Random) -> bytes:
    """`value` with something put in, or in the place of one or eight bytes."""
    at = draw.randrange(len(value) + 1)
    return value[:at] + draw.choice(BYTES) + value[at + draw.choice([0, 0, 1, 8]) :]


def accepted_or_refused(root: Path) -> bool:
    """Whether the folder loads; it may be refused, in one line. No picture outside of it is ever named."""
    try:
        raw = data.load_raw(str(root), unlabelled="negative", val_share=1)
        for picture in undecoded(raw["val"]):
            assert Path(picture["path"]).is_relative_to(root)
        data.clean(raw, data.audit(raw))
        evaluate.score(data.raw_truth(raw["val"]), [], resamples=0)
    except data.DataError as error:
        assert str(error) and "\n" not in str(error)
        return False
    return True


@pytest.mark.parametrize("kind", FORMATS)
def test_a_broken_annotation_file_is_refused_in_one_line_or_read(kind, tmp_path):
    draw, root, read = random.Random(kind), export(tmp_path / "set", kind), 0
    files = sorted(file for file in root.rglob("*.*") if file.suffix != ".jpg")
    for _ in range(15 * TIMES):
        file = draw.choice(files)
        good = file.read_bytes()
        if file.suffix.startswith(".json") and draw.random() < 0.7:
            parts = good.splitlines() if file.suffix == ".jsonl" else [good]
            file.write_text("\n".join(map(json.dumps, broken(list(map(json.loads, parts)), draw))))
        else:
            file.write_bytes(broken_bytes(good, draw))
        read += accepted_or_refused(root)
        file.write_bytes(good)
    assert read < 15 * TIMES


# --- parameters -------------------------------------------------------------------------------------------------------

VALUES = (None, True, False, -1, 0, 1, 7, 2**40, 0.5, 1e-9, "", " ", "None", "0,1", "r4-joint", "7b", "tiny", "auto",
          "best", "../x", "/proc/x", "/dev/null", "~", "~nobody/x", "\x00", "a" * 5000, "é\n", "x/y", [], {}, (1, 2))
some = st.dictionaries(st.sampled_from([*PARAMETERS] * 9 + [name[:-1] for name in PARAMETERS]),
                       st.sampled_from(VALUES) | st.text(), min_size=1, max_size=5)
CELL = SOURCE.read_text().split('# %% tags=["parameters"]')[1].split("# %%")[0]
DEFAULTS = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(CELL).body}


@settings(tried, max_examples=200 * TIMES, deadline=None)
@given(some)
def test_whatever_papermill_injects_gives_a_run_or_one_sentence(injected):
    cell = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in injected.items())
    with mock.patch.dict(os.environ):
        try:
            run = settle(DEFAULTS | injected | {"In": ["", cell]})
            assert set(run.values) == set(PARAMETERS)
        except ParameterError as error:
            assert str(error) and "\n" not in str(error)


# --- counter-examples that were found ---------------------------------------------------------------------------------


@pytest.mark.parametrize("filling", ["\n", "<|box_end|>", " ", "<|im_end|>\n"])
def test_a_long_gap_between_two_corners_is_read_in_linear_time(filling):
    """Found: 4096 special tokens after one corner took eight seconds, and four times that at twice the length."""
    started = time.perf_counter()
    parsed = parse_text("nutrition-table(1,2)" + filling * 4096)
    assert time.perf_counter() - started < 1 and len(parsed.boxes_xyxy_unit) == 0 and parsed.rejected
    assert len(parse_text("nutrition-table(1,2)" + filling * 100 + "(3,4)").boxes_xyxy_unit) == 1
