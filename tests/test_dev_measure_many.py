"""The look at the memory of a large job."""

import subprocess
import sys

from PIL import Image

from helpers.dev.measure_many import watch, write_photos


def test_photos_are_written_with_one_bad_in_a_thousand(tmp_path):
    write_photos(tmp_path / "files", 1100)
    photos = sorted((tmp_path / "files" / "photos").iterdir())
    assert len(photos) == 1100 and photos[999].read_text() == "no picture"
    assert Image.open(photos[0]).size == Image.open(photos[123]).size
    assert photos[0].samefile(photos[123])  # a link: no room is taken again


def test_memory_and_parts_are_seen_until_the_process_ends(tmp_path, capsys):
    (tmp_path / "parts").mkdir()
    code = f"""
import time
for number in range(3):
    time.sleep(0.3)
    open({str(tmp_path / 'parts')!r} + f"/{{number}}.jsonl", "w").close()
time.sleep(0.3)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    seen = watch(process, tmp_path, 3, every=0.05)
    assert process.wait() == 0
    assert seen["parts"].tolist() == sorted(seen["parts"]) and seen["parts"].max() == 3
    assert (seen["MiB"] > 1).any() and "192 pictures after" in capsys.readouterr().out
