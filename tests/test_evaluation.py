"""The benchmarks, run as users run them, against a local judge that replays replies.

The expected numbers in tests/data/{dcscore,captionqa,caparena}.json are what the original authors' own scripts computed
from the same replies: MAGAer13/DeCapBench, bronyayang/CaptionQA and njucckevin/CapArena.
"""

import json
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
import skimage

from balcap_mega.errors import UserError
from balcap_mega.evaluation import caparena, captionqa_questions, dcscore, dcscore_scoring
from balcap_mega.evaluation.session import fill
from tests.support.judge_server import Fault, JudgeServer, RuleJudge

TESTS = Path(__file__).parent
PHOTOS = Path(skimage.__file__).parent / "data"


def fixture(name: str) -> dict:
    return json.loads((TESTS / "data" / f"{name}.json").read_text(encoding="utf-8"))


def evaluate(monkeypatch, benchmark: str, server: JudgeServer, *options) -> int:
    """Run launch/evaluate.py; return its exit status."""
    command = ["evaluate.py", benchmark, "--judge-url", server.base_url, "--judge-model", "judge", *map(str, options)]
    monkeypatch.setattr(sys, "argv", command)
    try:
        runpy.run_path(str(TESTS.parent / "launch" / "evaluate.py"), run_name="__main__")
    except SystemExit as exit:
        return exit.code
    return 0


def report(output: Path) -> dict:
    return json.loads(output.with_name(output.name + ".report.json").read_text())


def user_text(body: dict) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def is_check(body: dict) -> bool:
    return user_text(body) == "Reply with the letter A."


# DCScore


class DcScoreReplies:
    """The fixture's replies: of photo k's n-th try, to each of its three questions."""

    def __init__(self, replies: dict[str, list[dict]]):
        self.replies = replies
        self.tries: Counter[str] = Counter()

    def __call__(self, name: str, body: dict):
        if is_check(body):
            return "A"
        kind = "extract" if body["n"] == 1 else "match" if isinstance(body["messages"][1]["content"], str) else "verify"
        photo = (re.findall(r"Photo (\d+)", user_text(body)) or ["8"])[-1]  # photo 8's caption states nothing
        self.tries[photo] += kind == "extract"
        of_photo = self.replies[photo]
        return of_photo[min(self.tries[photo], len(of_photo)) - 1][kind]


@pytest.fixture
def dcscore_files(tmp_path):
    data = fixture("dcscore")
    for name in ("captions", "annotations"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data[name]))
    options = ["--captions", tmp_path / "captions.jsonl", "--annotations", tmp_path / "annotations.jsonl"]
    return data, [*options, "--images", PHOTOS, "--output", tmp_path / "results"], tmp_path / "results"


def test_dcscore_is_the_originals_image_by_image(monkeypatch, dcscore_files):
    data, options, output = dcscore_files
    with JudgeServer(DcScoreReplies(data["replies"])) as server:
        assert evaluate(monkeypatch, "dcscore", server, *options) == 3  # five of nine images are void
    for name, expected in data["expected"].items():
        result = json.loads((output / f"{name}.json").read_text())
        assert result["valid"] == expected.pop("valid")
        for key, value in expected.items():
            assert result["eval_details"][key] == pytest.approx(value, abs=1e-6)
    figures = report(output)["figures"]
    assert figures["dcscore"] == pytest.approx(data["dcscore"], abs=1e-6)
    assert figures["images"] == 4 and figures["invalid"] == 5
    assert report(output)["judged"] == 4 and sum(report(output)["not_judged"].values()) == 5


def test_dcscore_mended_scores_captions_that_the_original_drops(dcscore_files, monkeypatch):
    data, options, output = dcscore_files
    with JudgeServer(DcScoreReplies(data["replies"])) as server:
        assert evaluate(monkeypatch, "dcscore", server, *options, "--mend") == 3
        valid = {i: json.loads((output / f"{i}.json").read_text())["valid"] for i in range(9)}
        assert [i for i in valid if not valid[i]] == [0, 6]  # replies that cannot be read stay void
        nothing_stated = json.loads((output / "8.json").read_text())
        assert nothing_stated["eval_details"]["f1_score"] == 0
        asked = len(server.requests)
        server.answer.tries.clear()
        assert evaluate(monkeypatch, "dcscore", server, *options, "--mend", "--max-unjudged", 0.25) == 0
        again = len(server.requests) - asked
    assert again == 1 + 5 * 2 + 5 * 1  # the check; five tries at each void image, as far as its replies can be read
    spent = report(output)
    assert spent["spent_all_runs"]["requests"] == asked + again and spent["spent_this_run"]["requests"] == again


def test_dcscore_weighs_ids_and_relevance_as_documented():
    predicted = [{"fact": "a", "relevance": 1}, {"fact": "b", "relevance": 0}, {"fact": "c", "relevance": 1}]
    verification = [{"fact": fact, "verification": 1} for fact in "abc"]
    matching = [{"fact": fact, "matched_oracle_id": given} for fact, given in zip("abc", [0, "0", 9])]
    trial = dcscore_scoring.score_trial(predicted, 2, verification, matching, mend=False)
    assert trial.recall == pytest.approx(3 / 2)  # "0" and 0 apart, and 9 counts: more than everything is recalled
    mended = dcscore_scoring.score_trial(predicted, 2, verification, matching, mend=True)
    assert mended.recall == pytest.approx((0.5 + 0.5 + 1) / (2 + 1))
    assert mended.recall_relevant == pytest.approx((1 + 1) / (2 + 1))
    matching[1]["matched_oracle_id"] = 0
    trial = dcscore_scoring.score_trial(predicted, 2, verification, matching, mend=False)
    assert trial.recall_relevant == pytest.approx((0.5 + 1) / 2)  # weighed by b too, which is not relevant


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ('```json\n[{"a": 1}]\n```', [{"a": 1}]),
        ("text ```json [{'a': None}]``` text", [{"a": None}]),
        ('```json\n[{"a": null}]\n```', [{"a": None}]),
        ('[{"a": "it\'s"}]', [{"a": "it's"}]),
        ("sorry", None),
        ("[" * 100_000, None),
    ],
)
def test_dcscore_reads_replies_as_python_then_as_json(text, read):
    assert dcscore_scoring.parse_reply(text) == read


def test_dcscore_names_rows_that_cannot_be_scored(monkeypatch, dcscore_files, capsys):
    data, options, _ = dcscore_files
    rows = [{**data["captions"][0], "image_path": "unknown.jpg"}]
    options[1].write_text(json.dumps(rows[0]) + "\n")
    with JudgeServer() as server:
        assert evaluate(monkeypatch, "dcscore", server, *options) == 2
    assert "row 0" in capsys.readouterr().err and not server.requests


def test_dcscore_refuses_annotations_whose_captions_could_not_be_written():
    """Before a checkpoint captions anything: `check_captions` would refuse what it writes."""
    rows = {row["image_name"]: dict(row) for row in fixture("dcscore")["annotations"]}
    for row in rows.values():
        row["oracle_caption"] = f"Of {row['image_name']}."
    assert dcscore.oracle_captions(rows) == {name: f"Of {name}." for name in rows}
    del rows[max(rows)]["oracle_caption"]
    with pytest.raises(UserError, match=re.escape(f"no oracle_caption of {max(rows)!r}")):
        dcscore.oracle_captions(rows)


# CaptionQA


@pytest.fixture
def captionqa_files(tmp_path):
    data = fixture("captionqa")
    (tmp_path / "captions.json").write_text(json.dumps(data["captions"]))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data["rows"]))
    options = ["--captions", tmp_path / "captions.json", "--questions", tmp_path / "questions.jsonl"]
    return data, [*options, "--output", tmp_path / "answers.json"], tmp_path / "answers.json"


def replay(replies: dict[str, str]):
    return lambda name, body: "A" if is_check(body) else replies[user_text(body)]


def test_captionqa_is_the_originals_answer_by_answer(monkeypatch, captionqa_files):
    data, options, output = captionqa_files
    with JudgeServer(replay(data["replies"])) as server:
        assert evaluate(monkeypatch, "captionqa", server, *options) == 0
        (asked, *_) = [body for _, body in server.requests if not is_check(body)]
    assert (asked["temperature"], asked["max_completion_tokens"]) == (0, 4)
    assert json.loads(output.read_text()) == data["expected"]
    assert report(output)["not_judged"] == {"empty": 1}  # where the original takes a blank reply for a wrong answer
    answers = [answer for of_image in data["expected"].values() for answer in of_image]
    figures = report(output)["figures"]
    assert figures["score"] == pytest.approx(100 * sum(a["score"] for a in answers) / len(answers), abs=1e-6)
    assert {row["name"] for row in report(output)["breakdown"]} >= {"natural", "document", "Attributes", "unknown"}


def test_captionqa_goes_on_after_failures_and_interruptions(monkeypatch, captionqa_files):
    data, options, output = captionqa_files
    with JudgeServer(replay(data["replies"])) as server:
        server.faults["plain"] = [Fault(), Fault(), Fault(), *[Fault(status=400)] * 4]  # four questions get no reply
        server.faults["plain"][0].content = "A"
        for fault in server.faults["plain"][1:3]:
            fault.hang_up = True
        assert evaluate(monkeypatch, "captionqa", server, *options, "--concurrency", 1, "--max-retries", 2) == 3
        partly = json.loads(output.read_text())
        assert sum(map(len, partly.values())) < sum(map(len, data["expected"].values()))
        server.requests.clear()
        assert evaluate(monkeypatch, "captionqa", server, *options) == 0
        assert json.loads(output.read_text()) == data["expected"]
        assert len(server.requests) < 1 + sum(map(len, data["expected"].values()))
        server.requests.clear()
        assert evaluate(monkeypatch, "captionqa", server, *options, "--max-retries", 0) == 0
        assert len(server.requests) == 2  # nothing left but the check and the question that gets a blank reply


def test_captionqa_quirks_and_their_mending():
    yes_no = captionqa_questions.is_yes_no
    assert yes_no("What do the eyes show?", ["Green eyes", "Snow"], mend=False)
    assert not yes_no("What do the eyes show?", ["Green eyes", "Snow"], mend=True)
    assert yes_no("Is it red or blue?", ["Red", "Blue"], mend=False)
    assert not yes_no("Is it red or blue?", ["Red", "Blue"], mend=True)
    for mend in (False, True):
        assert yes_no("Is it red?", ["Yes", "No"], mend) and not yes_no("What is it?", ["A cat", "A dog"], mend)
    letters = {"B\n": ("B", "B"), "\nA": ("A", "A"), "(c)": ("C", "C"), "C, a cat": ("C", "C"), "x\nB": ("B", None)}
    for reply, (original, mended) in letters.items():
        assert captionqa_questions.read_letter(reply, 4, mend=False) == original, reply
        if mended is not None:
            assert captionqa_questions.read_letter(reply, 4, mend=True) == mended, reply
    rows = [{"id": "nat_1", "question": "What?", "choices": ["a", "b", "c"], "answer": "a"}]
    assert not captionqa_questions.plan(rows, {}) and len(captionqa_questions.plan(rows, {}, mend=True)) == 1
    (question,) = captionqa_questions.plan(rows, {"nat_1": "x"})
    letter = captionqa_questions.LETTERS[question.order.index(3)]
    assert question.result(letter, mend=False)["score"] == 0.3833
    assert question.result(letter, mend=True)["score"] == pytest.approx(1 / 3 + 0.05)


def test_captionqa_reads_the_datasets_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{**row, "images": [b"never read"]} for row in fixture("captionqa")["rows"] if "choices" not in row]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_uniform(rows)), tmp_path / "q.parquet")
    captions = fixture("captionqa")["captions"]
    read = captionqa_questions.read_questions(tmp_path / "q.parquet")
    assert "images" not in read[0]
    assert captionqa_questions.plan(read, captions) == captionqa_questions.plan(_uniform(rows), captions)


def _uniform(rows):
    """Parquet's columns have one type: every category a list."""
    for row in rows:
        for question in row["questions"]:
            if not isinstance(question["category"], list):
                question["category"] = [question["category"]]
    return rows


# CapArena-Auto


@pytest.fixture
def caparena_files(tmp_path):
    data = fixture("caparena")
    (tmp_path / "captions.json").write_text(json.dumps(data["captions"]))
    (tmp_path / "battles.json").write_text(json.dumps(data["battles"]))
    options = ["--captions", tmp_path / "captions.json", "--battles", tmp_path / "battles.json", "--images", PHOTOS]
    options += ["--name", "Our-Model", "--max-retries", 4, "--output", tmp_path / "Our-Model.json"]
    return data, options, tmp_path / "Our-Model.json"


class BattleReplies:
    """The fixture's replies about an image, in order, over and over the last."""

    def __init__(self, replies: dict[str, list[str]]):
        self.replies = {image: list(texts) for image, texts in replies.items()}

    def __call__(self, name: str, body: dict) -> str:
        if is_check(body):
            return "A"
        texts = self.replies[re.search(r"caption of (\S+) by", user_text(body))[1]]
        return texts.pop(0) if len(texts) > 1 else texts[0]


def test_caparena_is_the_originals_battle_by_battle(monkeypatch, caparena_files):
    data, options, output = caparena_files
    with JudgeServer(BattleReplies(data["replies"])) as server:
        monkeypatch.setattr("balcap_mega.rewards.mllm.client.LONGEST_WAIT_SECONDS", 0.01)
        assert evaluate(monkeypatch, "caparena", server, *options) == 3  # six battles count
    battles = json.loads(output.read_text())
    assert [{k: battle.get(k) for k in ("img", "source1", "judge")} for battle in battles] == data["expected_battles"]
    figures = report(output)["figures"]
    for name, value in data["expected"].items():
        assert figures[name] == pytest.approx(value, abs=1e-6)
    assert figures["battles"] == 13 and figures["judged"] == 6


def test_caparena_goes_on_with_the_battles_of_its_file(monkeypatch, caparena_files):
    data, options, output = caparena_files
    with JudgeServer(BattleReplies(data["replies"])) as server:
        monkeypatch.setattr("balcap_mega.rewards.mllm.client.LONGEST_WAIT_SECONDS", 0.01)
        evaluate(monkeypatch, "caparena", server, *options)
        first = json.loads(output.read_text())
        server.requests.clear()
        assert evaluate(monkeypatch, "caparena", server, *options) == 3
        assert evaluate(monkeypatch, "caparena", server, *options, "--seed", 9) == 2  # another order of captions
    assert {user_text(b) for _, b in server.requests[1:]} == {user_text(server.requests[-1][1])}  # the one unjudged
    again = json.loads(output.read_text())
    assert [b["caption1"] for b in again] == [b["caption1"] for b in first]


def test_caparena_quirks_and_their_mending():
    for text, original, mended in [
        ("Caption 1 is better.", caparena.FIRST, caparena.FIRST),
        ("**Caption 2 is better**", None, caparena.SECOND),
        ("<Tie>", None, caparena.TIE),
        ("Caption 3 is better", None, None),
        ("Tie", caparena.TIE, caparena.TIE),
    ]:
        assert caparena.winner(text, mend=False) == original and caparena.winner(text, mend=True) == mended
    won = {"source1": "m", "source2": "b", "caption1": "x y", "caption2": "z", "judge": caparena.FIRST}
    battles = [{**won, "ref_model": caparena.BASELINES[0]}] * 3
    assert caparena.summarize(battles, "m", mend=False)["score_gpt"] == 1.5
    assert caparena.summarize(battles, "m", mend=True)["score_gpt"] == 100


def test_caparena_knows_short_baseline_names():
    battles = {"a.jpg": {"captions": {"human": "h", "cog": "theirs"}, "ref_model": "cog"}}
    (battle,) = caparena.draw_battles(battles, {"a.jpg": "ours"}, "m", seed=0)
    assert battle["ref_model"] == caparena.BASELINES[1]
    assert {battle["caption1"], battle["caption2"]} == {"ours", "theirs"}


# b-CapScore


def test_bcapscore_judges_goes_on_and_reports(monkeypatch, tmp_path):
    references = TESTS / "data" / "photos.jsonl"
    photos = [json.loads(line) for line in references.read_text().splitlines()]
    captions = {photo["image"]: " ".join(photo["units"][:3]) + " The mood is warm." for photo in photos}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    truths = tuple(unit for photo in photos for unit in photo["units"])
    output = tmp_path / "judged.jsonl"
    options = ["--captions", tmp_path / "captions.json", "--references", references, "--images", PHOTOS]
    options += ["--output", output, "--price-prompt", 2.5, "--price-completion", 10, "--max-retries", 0]
    with JudgeServer(RuleJudge(truths)) as server:
        server.faults["verify"] = [Fault(), *[Fault(status=500)] * 2]  # the first is the check
        assert evaluate(monkeypatch, "bcapscore", server, *options) == 3
        assert report(output)["figures"]["incomplete"] == 2
        assert report(output)["not_judged"] == {"no_precision": 2}
        output.write_text(output.read_text() + '{"image": "cut off')
        server.requests.clear()
        assert evaluate(monkeypatch, "bcapscore", server, *options) == 0
        # The check's five; what was answered of the two captions is not asked again.
        assert len(server.asked("verify")) == 1 + 2 and len(server.requests) == 5 + 2
    figures = report(output)["figures"]
    assert figures["incomplete"] == 0 and figures["captions"] == 10
    recall = sum(3 / len(photo["units"]) for photo in photos) / len(photos)
    assert figures["precision"] == pytest.approx(75) and figures["recall"] == pytest.approx(100 * recall)
    assert figures["b_capscore"] == pytest.approx(3 / (1 / 75 + 1 / (100 * recall) + 1 / 90))
    spent = report(output)["spent_all_runs"]
    assert spent["dollars"] == pytest.approx((2.5 * spent["prompt_tokens"] + 10 * spent["completion_tokens"]) / 1e6)


def test_a_judge_that_does_not_answer_is_a_clear_error(monkeypatch, captionqa_files, capsys):
    _, options, _ = captionqa_files
    with JudgeServer() as server:
        server.faults["*"] = [Fault(status=401)] * 9
        assert evaluate(monkeypatch, "captionqa", server, *options) == 2
    assert "http_401" in capsys.readouterr().err


def test_prompts_are_filled_once():
    assert fill("a {x} {y} {z} {'k': 1}", x="{y}", y="Y{x}") == "a {y} Y{x} {z} {'k': 1}"
