"""Row to messages to target text, and a model's text to boxes."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers.boxes import CATEGORIES, xyxy_unit_to_yxyx_unit
from helpers.messages import NO_TABLE, parse_text, target_text, to_messages

PROMPT = "Detect the bounding box of the nutrition table."


def unit(name, numbers):
    return f"<|object_ref_start|>{name}<|object_ref_end|><|box_start|>{numbers}<|box_end|>"


@pytest.fixture
def row():
    """A row of the data set's schema with two tables, the lower one first."""
    boxes = [[0.82311719, 0.39508920, 0.9998784, 0.67132866], [0.48716729, 0.27339744, 0.64093405, 0.73044872]]
    return {"image_id": "0041129077641_1", "image": Image.new("RGB", (40, 30), "white"), "width": 40, "height": 30,
            "meta": {"barcode": "0041129077641", "off_image_id": "1", "image_url": ""},
            "objects": {"bbox": boxes, "category_id": [3, 0],
                        "category_name": ["nutrition-table-text", "nutrition-table"]}}


def test_golden_row_before_the_chat_template(row):
    text = ("<|object_ref_start|>nutrition-table<|object_ref_end|><|box_start|>(273,487),(730,641)<|box_end|>"
            "<|object_ref_start|>nutrition-table-text<|object_ref_end|><|box_start|>(395,823),(671,1000)<|box_end|>")
    assert to_messages(row, PROMPT) == {
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": text}]}],
        "images": [row["image"]],
    }


def test_a_row_without_boxes_says_that_there_is_no_table():
    text = target_text({"bbox": [], "category_id": [], "category_name": []})
    assert text == "no nutrition table"
    parsed = parse_text(text)
    assert parsed.empty_answer and parsed.labels == [] and parsed.rejected == []
    assert parsed.boxes_xyxy_unit.shape == (0, 4)


@st.composite
def objects_with_area(draw, thinnest=0.002):
    count = draw(st.integers(1, 4))
    corners = hnp.arrays(np.float64, (count, 2), elements=st.floats(0, 1 - thinnest))
    low = draw(corners)
    sides = draw(hnp.arrays(np.float64, (count, 2), elements=st.floats(thinnest, 1)))
    boxes = np.concatenate([low, np.minimum(low + sides, 1)], axis=1)
    names = st.sampled_from((*CATEGORIES, "barcode", "price table", "logo 2"))
    return {
        "bbox": xyxy_unit_to_yxyx_unit(boxes).tolist(),
        "category_name": draw(st.lists(names, min_size=count, max_size=count)),
    }


@given(objects_with_area())
def test_target_text_round_trips_to_half_a_thousandth(objects):
    parsed = parse_text(target_text(objects))
    assert parsed.rejected == [] and not parsed.empty_answer
    assert sorted(parsed.labels) == sorted(objects["category_name"])
    truth = np.array(objects["bbox"])[:, [1, 0, 3, 2]]
    distance = np.abs(truth[:, None] - parsed.boxes_xyxy_unit[None]).max(axis=2)  # [truth, parsed]
    assert (distance.min(axis=1) <= 0.0005 + 1e-9).all() and (distance.min(axis=0) <= 0.0005 + 1e-9).all()
    plain = target_text(objects)
    for token in ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"):
        plain = plain.replace(token, "")
    np.testing.assert_array_equal(parse_text(plain).boxes_xyxy_unit, parsed.boxes_xyxy_unit)
    assert parse_text(plain).labels == parsed.labels


@given(objects_with_area(thinnest=1e-7))
def test_a_thin_box_keeps_an_area(objects):
    parsed = parse_text(target_text(objects))
    assert len(parsed.labels) == len(objects["bbox"]) and parsed.rejected == []


READ = [  # a text, the names in it and the boxes in thousandths
    # lines from the raw outputs of two published models on the real validation pictures
    ("nutrition-table<box>(265,492),(735,842)>", ["nutrition-table"], [[265, 492, 735, 842]]),
    ("nutrition-table<box>(328,133),(700,806)></box>", ["nutrition-table"], [[328, 133, 700, 806]]),
    ("nutrition-table<box>(19,13),(951,617)", ["nutrition-table"], [[19, 13, 951, 617]]),
    ("nutrition-table-small-energy(841,500),(896,672)", ["nutrition-table-small-energy"], [[841, 500, 896, 672]]),
    # other spellings, and several boxes
    (unit("a", "(1,2),(3,4)<|box_end|><|box_start|>(5,6),(7,8)"), ["a", "a"], [[1, 2, 3, 4], [5, 6, 7, 8]]),
    (unit("a", "(1,2),(3,4)") + unit("b", "(5,6),(7,8)") + "<|im_end|>\n", ["a", "b"], [[1, 2, 3, 4], [5, 6, 7, 8]]),
    ("<ref>a</ref><box>(1,2),(3,4)</box>", ["a"], [[1, 2, 3, 4]]),
    ("a ( 1 , 2 ) ( 3 , 4 )", ["a"], [[1, 2, 3, 4]]),
    ("(1,2),(3,4)", [""], [[1, 2, 3, 4]]),
]


@pytest.mark.parametrize(("text", "labels", "thousandths"), READ)
def test_every_spelling_is_read_as_written(text, labels, thousandths):
    parsed = parse_text(text)
    assert parsed.labels == labels and parsed.rejected == []
    assert (parsed.boxes_xyxy_unit * 1000).round(9).tolist() == thousandths


def test_a_published_answer_that_ran_into_the_token_limit():
    parsed = parse_text(
        "nutrition-table<box>(238,219),(578,638)>\n\nnutrition-table<box>(609,344),(796,544)>\n\n"
        "nutrition-table<box>(125,570),(244,854)>\n\nnutrition-table<box>(609,556),(1000,"
    )
    assert parsed.labels == ["nutrition-table"] * 3
    assert parsed.boxes_xyxy_unit[2].tolist() == [0.125, 0.57, 0.244, 0.854]
    assert parsed.rejected == [
        "'nutrition-table': a name without a box",
        "'(609,556),(1000': not a whole box, (x0,y0),(x1,y1)",
    ]


@pytest.mark.parametrize(("text", "why"), [
    ("", "empty completion"),
    ("<|im_end|>", "empty completion"),
    (unit("a", "(30,20),(10,40)"), "swapped corners"),
    (unit("a", "(30,20),(50,10)"), "swapped corners"),
    (unit("a", "(30,20),(1001,40)"), "outside 0-1000"),
    (unit("a", "(-1,20),(100,40)"), "outside 0-1000"),
    (unit("a", "(1,20),(1" + "0" * 5000 + ",40)"), "outside 0-1000"),
    (unit("a", "(30,20),(30,40)"), "no area"),
    (unit("a", "(30,20),(40,"), "not a whole box"),
    (unit("a", "(0.3,0.2),(0.4,0.5)"), "not a whole box"),
    ("nutrition-table", "a name without a box"),
    ('{"bbox_2d": [1, 2, 3, 4]}', "neither name nor box"),
    ("I see a label.\nIt is nice.", "a name without a box"),
])
def test_what_is_not_used_is_reported(text, why):
    parsed = parse_text(text)
    assert parsed.labels == [] and parsed.boxes_xyxy_unit.shape == (0, 4) and not parsed.empty_answer
    assert any(why in piece and len(piece) < 150 for piece in parsed.rejected), parsed.rejected


def test_good_boxes_survive_bad_neighbours():
    parsed = parse_text("Here it is:\n" + unit("a", "(1,2),(3,4)") + unit("b", "(9,9),(1,1)") + "no nutrition table")
    assert parsed.labels == ["a"] and not parsed.empty_answer
    assert len(parsed.rejected) == 3


def test_denial_before_a_box_is_no_name():
    parsed = parse_text(NO_TABLE + "<|box_start|>(1,2),(3,4)<|box_end|>")
    assert parsed.labels == [""] and not parsed.empty_answer and "denies" in parsed.rejected[0]


@pytest.mark.parametrize(("box", "names", "message"), [
    ([0.1, 0.1, 0.1, 0.5], ["a"], "no area"),
    ([0.1, 0.1, 0.3, 1.5], ["a"], "leaves the picture"),
    ([0.1, 0.1, 0.3, 0.5], [], "1 boxes but 0"),
    ([0.1, 0.1, 0.3, 0.5], ["a<|box_end|>"], "cannot stand"),
    ([0.1, 0.1, 0.3, 0.5], ["No nutrition table"], "cannot stand"),
])
def test_rows_that_the_format_cannot_carry_are_refused(box, names, message):
    with pytest.raises(ValueError, match=message):
        target_text({"bbox": [box], "category_name": names})


def test_a_prompt_with_a_special_token_is_refused():
    row = {"image": None, "objects": {"bbox": [], "category_name": []}}
    with pytest.raises(ValueError, match=r"has the special token <\|image_pad\|> in it"):
        to_messages(row, "Where is <|image_pad|>?")
    assert to_messages(row, 'a "<b>" | <|> c')["prompt"][0]["content"][1]["text"] == 'a "<b>" | <|> c'
