"""Many photos on Ray: the lines of the local command, whatever happens to workers, machines and the command itself."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import finished_model
import psutil
import pyarrow.dataset
import pytest

from helpers import predict
from helpers.settings import ParameterError
from helpers.use.inputs import Picture
from helpers.use.photos import main, predict_on_ray, predict_photos

ray, cluster_utils = pytest.importorskip("ray"), pytest.importorskip("ray.cluster_utils")
LIMIT = 400  # seconds for a command


@pytest.fixture(scope="module")
def cluster():
    """Two machines of four CPUs each, that is two groups of processes of this one."""
    node = {"num_cpus": 4, "object_store_memory": 2**27}
    started = cluster_utils.Cluster(initialize_head=True, head_node_args=node)
    started.node = started.add_node(**node)
    yield started
    started.shutdown()


@pytest.fixture(scope="module")
def photos(tmp_path_factory, model):
    """A folder of 160 photos and a file that is none, and their lines by the local command."""
    folder, output = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("local")
    scenes = [finished_model.scene(number) for number in range(4)]
    for number in range(160):
        (folder / f"{number:03}.jpg").write_bytes(scenes[number % 4])
    (folder / os.fsdecode(b"n\xf6.jpg")).write_bytes(b"hello")
    return folder, output


def command(photos: Path, output: Path, model: Path, address: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "helpers.use.photos", str(photos), str(output), "--model", str(model), "--batch-size",
            "2", "--ray", address, *more]


def lines_of(output: Path) -> dict[str, dict]:
    return {line["image_id"]: line for line in predict.read_jsonl(output / "predictions.jsonl")}


def written(output: Path) -> int:
    """How many lines Ray has written for good."""
    files = [str(file) for file in (output / "ray" / "done").glob("*.parquet") if "pending" not in file.name]
    return pyarrow.dataset.dataset(files).count_rows() if files else 0


def wait_for(process: subprocess.Popen, output: Path, count: int) -> None:
    start = time.monotonic()
    while written(output) < count:
        assert process.poll() is None and time.monotonic() - start < LIMIT, process.stderr.read()
        time.sleep(0.2)


def test_ray_writes_the_lines_of_the_local_command(model, photos, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for file in sorted(photos[0].iterdir())[-9:]:
        shutil.copy(file, few)
    done = subprocess.run(command(few, tmp_path / "out", model, "here", "--crops"), capture_output=True, text=True,
                          timeout=LIMIT)
    assert done.returncode == 0 and "9 pictures, 8 with a box, 0 without, 1 unreadable" in done.stdout, done.stderr
    predict_photos(str(few), tmp_path / "here", model, crops=True, batch_size=2)
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "here")
    assert len([*(tmp_path / "out").rglob("crops/**/*.jpg")]) == 8 and not (tmp_path / "out" / "ray").exists()


def test_an_address_where_no_ray_is_ends_in_a_sentence(model, photos, tmp_path):
    for address in ("127.0.0.1:9", "auto"):
        with pytest.raises(SystemExit, match=f"^no Ray cluster answers at --ray {address} .*; start one"):
            main(command(photos[0], tmp_path / "out", model, address)[3:])
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


@pytest.mark.slow
def test_what_an_actor_refuses_is_said(cluster, model, tmp_path):
    options = {"model": model, "output": tmp_path, "read": str, "crops": False, "batch_size": 2}  # and no job.json
    with pytest.raises(ParameterError, match=f"^OUTPUT={tmp_path} is not there on .*: all machines must share it.$"):
        list(predict_on_ray([Picture("1", "1", "1")], options, 2, cluster.address, tmp_path / "ray"))
    ray.shutdown()


@pytest.mark.slow
def test_a_killed_worker_a_new_machine_and_a_lost_one_cost_no_line(cluster, model, photos, tmp_path):
    folder, local = photos
    process = subprocess.Popen(command(folder, tmp_path / "out", model, cluster.address), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    wait_for(process, tmp_path / "out", 8)
    workers = [one for one in psutil.process_iter() if one.name().startswith("ray::MapWorker")]
    workers[0].kill()
    added = cluster.add_node(num_cpus=4, object_store_memory=2**27)
    wait_for(process, tmp_path / "out", 60)
    cluster.remove_node(cluster.node)
    cluster.node = added
    _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, said[-3000:]
    predict_photos(str(folder), local, model, batch_size=2)
    assert lines_of(tmp_path / "out") == lines_of(local) and len(lines_of(local)) == 161


@pytest.mark.slow
def test_a_command_that_was_killed_makes_only_what_is_missing(cluster, model, photos, tmp_path):
    start = command(photos[0], tmp_path / "out", model, cluster.address)
    process = subprocess.Popen(start, stderr=subprocess.PIPE, text=True)
    wait_for(process, tmp_path / "out", 30)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(10)  # Ray ends the workers of a command that is gone
    before = written(tmp_path / "out")
    done = subprocess.run(start, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0 and "161 pictures" in done.stdout, done.stderr[-3000:]
    assert int(re.search(r"finished. (\d+) rows", done.stderr)[1]) == 161 - before < 140
    done = subprocess.run(start, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0 and "161 pictures" in done.stdout and "rows" not in done.stderr
