"""launch/prepare_data.py, run as its users run it, on the photos and a local judge."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import skimage

from balcap_mega.data.jsonl import read_jsonl
from tests.support.judge_server import Fault, JudgeServer, user_data

REPOSITORY = Path(__file__).parents[1]
PHOTOS = Path(skimage.__file__).parent / "data"


def prepare(server: JudgeServer, data: Path, output: Path, *extra: str, what=()) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "launch/prepare_data.py",
        *what,
        "--source",
        "sharegpt4v",
        "--data",
        data,
        "--output",
        output,
    ]
    command += ["--images", PHOTOS, "--base-url", server.base_url, "--model", "judge", *extra]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


@pytest.fixture
def data(tmp_path) -> Path:
    photos = read_jsonl(REPOSITORY / "tests" / "data" / "photos.jsonl")
    rows = [
        {
            "id": row.id,
            "image": row.image,
            "conversations": [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": row.reference}],
        }
        for row in photos
    ]
    rows[3]["image"] = "README.txt"  # there, and no image
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def test_units_are_extracted_once_and_an_interrupted_run_goes_on(tmp_path, data):
    output = tmp_path / "prepared.jsonl"
    with JudgeServer() as server:
        server.faults["units"] = [Fault(), Fault(status=400)]  # the first is the check
        first = prepare(server, data, output)
        assert first.returncode == 0, first.stderr
        assert "8 rows written, 0 were there" in first.stdout
        assert "1 corrupt, 1 without units" in first.stdout
        lines = output.read_text().splitlines(keepends=True)
        output.write_text("".join(lines[:5]) + lines[5][:40])  # as an interruption leaves it
        server.requests.clear()
        second = prepare(server, data, output)
        assert "4 rows written, 5 were there" in second.stdout
        assert len(server.asked("units")) == 1 + 4
        refused = prepare(server, data, output, "--prefix", "coco/")
        assert refused.returncode == 2 and "no row of the dataset" in refused.stderr
        refused = prepare(server, data, output, "--model", "another")
        assert refused.returncode == 2 and "--model was judge, now another" in refused.stderr
        changed = data.with_name("changed.json")
        changed.write_text(data.read_text().replace("A smiling woman", "A woman"))
        refused = prepare(server, changed, output)
        assert refused.returncode == 2 and "'astronaut' with another reference" in refused.stderr
    prepared = read_jsonl(output)
    assert len({row.id for row in prepared}) == len(prepared) == 9
    astronaut = next(row for row in prepared if row.id == "astronaut")
    assert astronaut.prompt == "What?" and astronaut.units[0].startswith("A smiling woman")


def test_questions_are_kept_that_the_picture_alone_answers_and_asked_for_once(tmp_path, data):
    output = tmp_path / "asked.jsonl"
    rows = json.loads(data.read_text())[:4]  # the last is no image
    data.write_text(json.dumps(rows))
    with JudgeServer() as server:
        server.faults["see"] = [Fault(status=400)]
        first = prepare(server, data, output, what=["questions"])
        assert first.returncode == 0, first.stderr
        assert "2 rows written, 0 were there" in first.stdout and "1 corrupt, 1 without questions" in first.stdout
        for name, count in (("see", 2), ("guess", 2)):  # each question in two orders of its options
            orders = {tuple(user_data(body)["options"].values()) for body in server.asked(name)}
            assert len(server.asked(name)) >= count and len(orders) > 1
        assert all(isinstance(body["messages"][1]["content"], list) for body in server.asked("see"))
        assert all(isinstance(body["messages"][1]["content"], str) for body in server.asked("guess"))
        server.requests.clear()
        again = prepare(server, data, output, what=["questions"])
        assert "1 rows written, 2 were there" in again.stdout and len(server.asked("ask")) == 1 + 1
        refused = prepare(server, data, output, "--count", "7", what=["questions"])
        assert refused.returncode == 2 and "--count was 5, now 7" in refused.stderr
    for row in read_jsonl(output):
        assert [(question.question, question.answer) for question in row.questions] == [("colour", "red")]
