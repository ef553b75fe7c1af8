"""Evaluators that can be trusted: unusable is not wrong, what was paid for is kept, and old is not new."""

import json
import shutil
import sys

import pytest
from PIL import Image

from balcap_mega.errors import UserError
from balcap_mega.evaluation import caparena, captionqa_questions
from balcap_mega.evaluation.pictures import Pictures
from balcap_mega.evaluation.session import fill, load_prompts
from balcap_mega.rewards.mllm.failures import Unusable
from tests.support.judge_server import Fault, JudgeServer, RuleJudge
from tests.test_evaluation import (
    BattleReplies,
    DcScoreReplies,
    caparena_files,  # noqa: F401
    captionqa_files,  # noqa: F401
    dcscore_files,  # noqa: F401
    evaluate,
    is_check,
    replay,
    report,
    user_text,
)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("balcap_mega.rewards.mllm.client.LONGEST_WAIT_SECONDS", 0.01)


# Unusable is not wrong


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(body='{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}'), "truncated"),
        (Fault(body='{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}'), "empty"),
        (Fault(content="", finish_reason="content_filter"), "refusal"),
        (Fault(content="I think that", finish_reason="length"), "truncated"),
    ],
)
def test_an_unusable_reply_is_asked_again_and_is_no_wrong_answer(monkeypatch, captionqa_files, fault, reason):  # noqa: F811
    data, options, output = captionqa_files
    with JudgeServer(replay(data["replies"])) as server:
        server.faults["plain"] = [Fault(content="A"), fault]
        assert evaluate(monkeypatch, "captionqa", server, *options, "--concurrency", 1) == 0
        assert json.loads(output.read_text()) == data["expected"]  # asked again
        shutil.move(output, output.with_name("before.json"))
        server.faults["plain"] = [Fault(content="A"), fault]
        few = [*options, "--concurrency", 1, "--max-retries", 0, "--max-unjudged", 0.1]
        assert evaluate(monkeypatch, "captionqa", server, *few) == 0
    counts = report(output)["not_judged"]
    assert counts.pop("empty", 0) == 1 + (reason == "empty")  # one reply of the fixture is blank
    assert counts == ({} if reason == "empty" else {reason: 1})


def test_a_cut_reply_that_begins_with_its_letter_counts(monkeypatch, captionqa_files):  # noqa: F811
    data, options, output = captionqa_files
    with JudgeServer(replay(data["replies"])) as server:
        server.faults["plain"] = [Fault(content="A"), Fault(content="B. The red", finish_reason="length")]
        assert evaluate(monkeypatch, "captionqa", server, *options, "--concurrency", 1) == 0
    first = next(iter(json.loads(output.read_text()).values()))[0]
    assert first["model_response"] == "B. The red" and first["model_answer"] is not None


def test_where_nothing_could_be_judged_there_is_no_score(monkeypatch, captionqa_files, dcscore_files, capsys):  # noqa: F811
    for name, (_, options, output) in (("captionqa", captionqa_files), ("dcscore", dcscore_files)):
        with JudgeServer(lambda name, body: "A") as server:
            server.faults["plain"] = [Fault(content="A"), *[Fault(status=400)] * 200]
            assert evaluate(monkeypatch, name, server, *options, "--concurrency", 1) == 3
        error = capsys.readouterr().err
        assert "there is no score: 0 of" in error and "http_400" in error
        assert not output.with_name(output.name + ".report.json").exists()


def test_captionqa_keeps_every_answer_that_was_paid_for(monkeypatch, captionqa_files, capsys):  # noqa: F811
    """With every third request refused. Before, one refusal dropped all later answers about its image."""
    data, options, output = captionqa_files
    asked: list[str] = []

    def every_third_fails(name, body):
        if not is_check(body):
            asked.append(user_text(body))
        return "A" if is_check(body) else data["replies"][user_text(body)] or "none"

    total = sum(map(len, data["expected"].values())) + 1
    with JudgeServer(every_third_fails) as server:
        server.faults["plain"] = [Fault(content="A"), *[Fault(), Fault(), Fault(status=400)] * (total // 3)]
        for fault in server.faults["plain"][1:]:
            fault.content = None
        assert evaluate(monkeypatch, "captionqa", server, *options, "--concurrency", 1) == 3
        paid = len(asked)
        assert paid == total - total // 3
        assert sum(map(len, json.loads(output.read_text()).values())) == paid
        assert report(output)["not_judged"] == {"http_400": total // 3}
        assert f"{paid} of {total} judged; not judged: {total // 3} http_400" in capsys.readouterr().err
        assert evaluate(monkeypatch, "captionqa", server, *options) == 0
    assert len(asked) == len(set(asked)) == total


def test_dcscore_keeps_what_was_answered_before_a_request_failed(monkeypatch, dcscore_files):  # noqa: F811
    data, options, output = dcscore_files
    options[1].write_text(json.dumps(data["captions"][1]))
    with JudgeServer(DcScoreReplies(data["replies"])) as server:
        server.faults["plain"] = [Fault(content="A"), Fault(), Fault(), Fault(status=400)]  # the verification
        assert evaluate(monkeypatch, "dcscore", server, *options) == 3
        kept = json.loads((output / "0.json").read_text())["eval_details"]["replies"]
        assert {name: len(texts) for name, texts in kept.items()} == {"extract": 1, "match": 3, "verify": 0}
        server.requests.clear()
        assert evaluate(monkeypatch, "dcscore", server, *options) == 0
        [(_, verification)] = server.requests[1:]
    assert "Photo 1" in user_text(verification) and not isinstance(verification["messages"][1]["content"], str)


def test_dcscore_asks_for_the_choices_that_a_judge_left_out(monkeypatch, dcscore_files):  # noqa: F811
    """Most servers but OpenAI's and vLLM's answer `n` with one choice."""
    data, options, output = dcscore_files
    whole, turn = DcScoreReplies(data["replies"]), {}

    def one_choice(name, body):
        if is_check(body):
            return "A"
        key = json.dumps(body["messages"])
        if not turn.get(key):
            replies = whole(name, body)
            turn[key] = list(replies) if isinstance(replies, list) else [replies]
        return turn[key].pop(0)

    with JudgeServer(one_choice) as server:
        evaluate(monkeypatch, "dcscore", server, *options, "--concurrency", 1)
        assert {body["n"] for _, body in server.requests if not is_check(body)} == {1, 2, 3}
    figures = report(output)["figures"]
    assert figures["dcscore"] == pytest.approx(data["dcscore"], abs=1e-6) and figures["images"] == 4


def test_caparena_takes_no_blank_reason_and_tries_five_times(monkeypatch, caparena_files):  # noqa: F811
    for blank in ("Reason: \nJudgment: Tie", "Reason:\n\nJudgment: Tie"):
        with pytest.raises(Unusable):
            caparena.read_judgment(blank)
    _, options, _ = caparena_files
    retries = options.index("--max-retries")
    options = options[:retries] + options[retries + 2 :]
    with JudgeServer(lambda name, body: "A" if is_check(body) else "Reason: \nJudgment: Tie") as server:
        assert evaluate(monkeypatch, "caparena", server, *options) == 3
        assert len(server.requests) == 1 + 5 * 13


def test_options_beyond_the_letters_are_refused_before_anything_is_asked():
    rows = [{"id": "nat_1", "question": "Which?", "choices": [f"c{i}" for i in range(26)], "answer": "c3"}]
    with pytest.raises(UserError, match="27 options"):
        captionqa_questions.plan(rows, {"nat_1": "x"})


# Old is not new


def _changed(options: list, name: str, change) -> list:
    """`options` with another file for one of them."""
    place = options.index(name) + 1
    other = options[place].with_name("other_" + options[place].name)
    other.write_text(change(options[place].read_text()))
    return [*options[:place], other, *options[place + 1 :]]


def _refusals(monkeypatch, capsys, benchmark, server, others: dict[str, list], output) -> None:
    """Each of `others`, by what the refusal must name, is refused before anything is asked; so are nameless results."""
    asked = len(server.requests)
    for named, options in others.items():
        assert evaluate(monkeypatch, benchmark, server, *options) == 2, named
        error = capsys.readouterr().err
        assert "another making" in error and named in error and f"delete {output}" in error
    fingerprint = output.with_name(output.name + ".fingerprint.json")
    kept = fingerprint.read_text()
    fingerprint.unlink()
    assert evaluate(monkeypatch, benchmark, server, *next(iter(others.values()))) == 2
    assert "says what they were made from" in capsys.readouterr().err
    assert len(server.requests) == asked
    fingerprint.write_text(kept)


def test_captionqa_refuses_results_of_another_making(monkeypatch, captionqa_files, capsys, tmp_path):  # noqa: F811
    data, options, output = captionqa_files
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "captionqa.txt").write_text("Answer with a letter.")
    with JudgeServer(replay(data["replies"])) as server, JudgeServer(replay(data["replies"])) as moved:
        assert evaluate(monkeypatch, "captionqa", server, *options) == 0
        others = {
            "--captions": _changed(options, "--captions", lambda text: text.replace("a", "e", 1)),
            "--questions": _changed(options, "--questions", lambda text: text.replace("suit", "coat")),
            "--mend was False, now True": [*options, "--mend"],
            "--seed was 0, now 1": [*options, "--seed", 1],
            "--max-tokens": [*options, "--max-tokens", 64],
            "--prompts": [*options, "--prompts", tmp_path / "prompts"],
            "--judge-model was judge, now another": [*options, "--judge-model", "another"],
        }
        _refusals(monkeypatch, capsys, "captionqa", server, others, output)
        assert evaluate(monkeypatch, "captionqa", moved, *options) == 2
        assert "--judge-moved" in capsys.readouterr().err and not moved.requests
        assert evaluate(monkeypatch, "captionqa", moved, *options, "--judge-moved", "--max-retries", 0) == 0
        # The remedy works: without the old results the new ones are made, and no trace of the old ones is left.
        output.unlink()
        assert evaluate(monkeypatch, "captionqa", moved, *options, "--mend", "--max-unjudged", 1) == 0
    assert report(output)["settings"]["mend"] == "True"
    assert report(output)["spent_all_runs"] == report(output)["spent_this_run"]


def test_dcscore_refuses_results_of_another_making(monkeypatch, dcscore_files, capsys):  # noqa: F811
    data, options, output = dcscore_files
    options = [*options, "--max-unjudged", 1]
    with JudgeServer(DcScoreReplies(data["replies"])) as server:
        assert evaluate(monkeypatch, "dcscore", server, *options) == 0
        others = {
            "--captions": _changed(options, "--captions", lambda text: text.replace("Photo 1", "Photo 2", 1)),
            "--annotations": _changed(
                options, "--annotations", lambda text: text.replace('"oracle_facts": ["', '"oracle_facts": ["x ', 1)
            ),
            "--mend": [*options, "--mend"],
        }
        _refusals(monkeypatch, capsys, "dcscore", server, others, output)


def test_caparena_refuses_results_of_another_making_and_mends_its_own(monkeypatch, caparena_files, capsys):  # noqa: F811
    data, options, output = caparena_files
    options = [*options, "--max-unjudged", 1, "--max-retries", 0]
    with JudgeServer(BattleReplies(data["replies"])) as server:
        assert evaluate(monkeypatch, "caparena", server, *options) == 0
        changed = _changed(options, "--captions", lambda text: text.replace('": "', '": "x ', 1))
        _refusals(monkeypatch, capsys, "caparena", server, {"--captions": changed}, output)
        as_published = report(output)["figures"]["judged"]
        assert evaluate(monkeypatch, "caparena", server, *options, "--mend") == 0  # the same replies, read otherwise
    assert report(output)["figures"]["judged"] > as_published


# b-CapScore


@pytest.fixture
def two_references(tmp_path):
    """Three pictures; the first has two references, one half covered and one wholly."""
    rows = []
    for name, units in (("a", ["A cat.", "A dog."]), ("a", ["A cat.", "A hat."]), ("b", ["A cat."]), ("c", ["A cat."])):
        rows.append({"image": f"{name}.png", "reference": " ".join(units), "units": units})
    (tmp_path / "references.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in "abc":
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.png")
    captions = {"a.png": "A cat. A dog.", "b.png": "A cat.", "c.png": "A cat. The mood is warm."}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    options = ["--captions", tmp_path / "captions.json", "--references", tmp_path / "references.jsonl"]
    return [*options, "--images", tmp_path, "--output", tmp_path / "judged.jsonl"], tmp_path / "judged.jsonl"


def test_each_reference_of_an_image_counts_once(monkeypatch, two_references):
    options, output = two_references
    with JudgeServer(RuleJudge(("A cat", "A dog"))) as server:
        assert evaluate(monkeypatch, "bcapscore", server, *options) == 0
        server.requests.clear()
        assert evaluate(monkeypatch, "bcapscore", server, *options) == 0
        assert len(server.asked("split")) == len(server.asked("cover")) == 1  # the check's: all rows are known again
    figures = report(output)["figures"]
    precision, recall, linguistic = 100 * (1 + 1 + 1 + 0.5) / 4, 100 * (1 + 0.5 + 1 + 1) / 4, 90
    assert (figures["precision"], figures["recall"]) == (pytest.approx(precision), pytest.approx(recall))
    assert figures["b_capscore"] == pytest.approx(3 / (1 / precision + 1 / recall + 1 / linguistic))
    each = [3 / (1 / p + 1 / r + 1 / 0.9) for p, r in ((1, 1), (1, 0.5), (1, 1), (0.5, 1))]
    assert figures["mean_b_capscore"] == pytest.approx(100 * sum(each) / 4)
    assert figures["captions"] == 4


def test_all_captions_are_there_before_the_first_request(monkeypatch, two_references, capsys):
    options, _ = two_references
    options[1].write_text(json.dumps({"a.png": "A cat.", "b.png": "A cat."}))
    with JudgeServer() as server:
        assert evaluate(monkeypatch, "bcapscore", server, *options) == 2
    assert "c.png has none" in capsys.readouterr().err and not server.requests


def test_another_reference_or_picture_is_refused(monkeypatch, two_references, capsys):
    options, output = two_references
    with JudgeServer(RuleJudge(("A cat",))) as server:
        assert evaluate(monkeypatch, "bcapscore", server, *options) == 0
        others = {
            "--references": _changed(options, "--references", lambda text: text.replace("A hat", "A bat")),
            "--captions": _changed(options, "--captions", lambda text: text.replace("A dog", "A fox")),
        }
        _refusals(monkeypatch, capsys, "bcapscore", server, others, output)
        Image.new("RGB", (64, 64), "blue").save(options[5] / "b.png")
        assert evaluate(monkeypatch, "bcapscore", server, *options) == 2
    assert "picture 'b.png'" in capsys.readouterr().err


# For the one who evaluates


def test_one_broken_picture_does_not_end_the_run(monkeypatch, two_references, capsys):
    options, output = two_references
    whole = (options[5] / "b.png").read_bytes()
    (options[5] / "b.png").write_bytes(whole[:60])
    with JudgeServer(RuleJudge(("A cat", "A dog"))) as server:
        assert evaluate(monkeypatch, "bcapscore", server, *options) == 2
        error = capsys.readouterr().err
        assert "--max-unjudged" in error and "'b.png' is " in error and "data." not in error
        assert evaluate(monkeypatch, "bcapscore", server, *options, "--max-unjudged", 0.5) == 0
        assert report(output)["not_judged"] == {"unreadable_picture": 1} and report(output)["judged"] == 3
        (options[5] / "b.png").write_bytes(whole)
        server.requests.clear()
        assert evaluate(monkeypatch, "bcapscore", server, *options) == 0  # only the mended picture is judged
        assert len(server.asked("verify")) == 1 + 1 and report(output)["judged"] == 4  # one is the check's


def test_errors_speak_of_the_options_at_hand(monkeypatch, two_references, capsys):
    options, _ = two_references
    with JudgeServer() as server:
        for change, named in (
            (["--references", "/no/such.jsonl"], "--references /no/such.jsonl"),
            (["--judge-url", "host:8000/v1"], "--judge-url"),
            (["--concurrency", "0"], "--concurrency=0"),
            (["--api-key-env", "NOT_SET_ANYWHERE"], "--api-key-env names NOT_SET_ANYWHERE"),
        ):
            assert evaluate(monkeypatch, "bcapscore", server, *options, *change) == 2
            error = capsys.readouterr().err
            assert named in error and not any(key in error for key in ("data.", "rewards.", "base_url", "endpoint."))


def test_a_reference_that_cannot_be_used_is_named(monkeypatch, two_references, capsys):
    options, _ = two_references
    options[3].write_text(options[3].read_text() + '{"image": "d.png", "reference": "\\ud800"}\n')
    with JudgeServer() as server:
        assert evaluate(monkeypatch, "bcapscore", server, *options) == 2
    assert "references.jsonl:5" in capsys.readouterr().err


def test_a_judges_dialect_is_an_option_that_its_refusal_names(monkeypatch, captionqa_files, capsys):  # noqa: F811
    data, options, _ = captionqa_files
    asked = []

    def answer(name, body):
        asked.append(body)
        return replay(data["replies"])(name, body)

    said = json.dumps({"error": {"message": "Extra inputs are not permitted: max_completion_tokens"}})
    with JudgeServer(answer) as server:
        server.faults["plain"] = [Fault(status=400, body=said)]
        assert evaluate(monkeypatch, "captionqa", server, *options) == 2
        error = capsys.readouterr().err
        assert "not permitted: max_completion_tokens" in error and "set --dialect token_limit=max_tokens" in error
        dialect = ["--dialect", "token_limit=max_tokens", "--dialect", "temperature=false"]
        assert evaluate(monkeypatch, "captionqa", server, *options, *dialect) == 0
        assert asked[-1]["max_tokens"] == 4 and not {"max_completion_tokens", "temperature"} & asked[-1].keys()
        assert evaluate(monkeypatch, "captionqa", server, *options) == 2  # another dialect, other results
        server.faults["plain"] = [Fault(content="", finish_reason="length")]
        assert evaluate(monkeypatch, "captionqa", server, *options, *dialect, "--max-retries", 0) == 2
    assert "--dialect thinking_tokens=4096" in capsys.readouterr().err


def test_parquet_without_pyarrow_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        captionqa_questions.read_questions(tmp_path / "questions.parquet")


def test_prompts_take_the_authors_wording_as_it_stands(tmp_path):
    """Theirs are str.format templates with doubled braces, and CapArena's names the reference caption_ref."""
    theirs = 'List dicts [{{"fact": [ATOMIC FACT]}}, ...]\n{caption}'
    assert fill(theirs, caption="{A} cat") == 'List dicts [{"fact": [ATOMIC FACT]}, ...]\n{A} cat'
    for name in ("caparena", "caparena_request"):
        (tmp_path / f"{name}.txt").write_text("Caption 1:\n{caption_1}\nCaption 2:\n{caption_2}\n{caption_ref}")
    battle = {"img": "a.png", "caption1": "one", "caption2": "two", "ref": "three"}
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    pictures = Pictures.look_at(tmp_path, ["a.png"])
    run = caparena.CapArenaRun([battle], pictures, tmp_path, load_prompts(caparena.PROMPTS, tmp_path))
    assert user_text(run._body(battle)) == "Caption 1:\none\nCaption 2:\ntwo\nthree"
    (tmp_path / "caparena_request.txt").write_text("{caption_1} {caption_ref}")
    with pytest.raises(UserError, match=r"has no \{caption_2\}"):
        load_prompts(caparena.PROMPTS, tmp_path)


@pytest.mark.parametrize("benchmark", ["bcapscore", "dcscore", "captionqa", "caparena"])
def test_help_says_what_files_which_judge_and_whose_data(monkeypatch, capsys, benchmark):
    with JudgeServer() as server:
        assert evaluate(monkeypatch, benchmark, server, "--help") == 0
    text = capsys.readouterr().out
    for what in ("arXiv", "--captions", '{"', "judge:", "data:", "--max-unjudged"):
        assert what in text
    assert len(text.splitlines()) < 80
    if benchmark == "bcapscore":
        assert "harmonic mean of the three corpus means" in text and "mean_b_capscore" in text
