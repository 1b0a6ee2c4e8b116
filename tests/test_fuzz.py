"""A seeded hundredth of `make fuzz`, and the counter-examples that it has found."""

import time
from pathlib import Path

import pytest
from PIL import Image

from helpers.data import DataError
from helpers.data.json_formats import read_metadata
from helpers.dev import fuzz, fuzz_outputs
from helpers.messages import parse_text


def test_a_hundredth_of_the_fuzz_finds_nothing(capsys):
    assert fuzz.run(outputs=1000, rows=100, parameter_sets=10) == []
    assert [line.split(": ")[1].split(" cases")[0] for line in capsys.readouterr().out.splitlines() if " cases" in line
            ] == ["500", "500", "1", "20", "10"]


def test_the_hunt_reports_what_it_finds(capsys):
    def check(case):
        if case == 2:
            raise KeyError("x")
        return "odd" if case == 3 else ""

    assert fuzz.hunt("numbers", range(5), check) == ["KeyError: 'x': 2", "odd: 3"]
    assert "5 cases, 2 counter-examples" in capsys.readouterr().out


@pytest.mark.parametrize("planted", ["boxes[:, [1, 0, 3, 2]]", "boxes + 0.001", "boxes[:-1]"])
def test_a_parser_that_is_wrong_is_found(planted, monkeypatch):
    """The check itself can fail: it sees swapped, shifted and lost boxes."""
    real = parse_text

    def wrong(text):
        parsed = real(text)
        object.__setattr__(parsed, "boxes_xyxy_unit", eval(planted, {"boxes": parsed.boxes_xyxy_unit}))
        return parsed

    monkeypatch.setattr(fuzz_outputs, "parse_text", wrong)
    assert any(fuzz_outputs.check(text) for text in fuzz_outputs.mutated(50, seed=1))


@pytest.mark.parametrize("filling", ["\n", "<|box_end|>", " ", "<|im_end|>\n"])
def test_a_long_gap_between_two_corners_is_read_in_linear_time(filling):
    """Found: 4096 special tokens after one corner took eight seconds, and four times that at twice the length."""
    started = time.perf_counter()
    parsed = parse_text("nutrition-table(1,2)" + filling * 4096)
    assert time.perf_counter() - started < 1 and len(parsed.boxes_xyxy_unit) == 0 and parsed.rejected
    assert len(parse_text("nutrition-table(1,2)" + filling * 100 + "(3,4)").boxes_xyxy_unit) == 1


ONCE_AN_ERROR = ['"file_name": "\\u0000"', '"file_name": ""', '"file_name": "."', f'"file_name": "{"a" * 5000}"',
                 '"meta": [[]]', '"meta": "x"', '"width": 1e308', '"height": Infinity', '"width": NaN']


@pytest.mark.parametrize("field", ONCE_AN_ERROR)
def test_fields_that_once_ended_in_another_error(field, tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.jpg")
    objects = '"objects": {"bbox": [[0, 0, 1, 1]], "category_name": ["nutrition-table"]}'
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "0.jpg", {field}, {objects}}}')
    with pytest.raises(DataError, match="metadata.jsonl line 1|0.jpg"):
        read_metadata(tmp_path)
