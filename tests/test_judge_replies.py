"""How a judge's reply is read: usable, or not and why; the same for the MLLM judge and every evaluator."""

import json
from pathlib import Path

import pytest

from balcap_mega.rewards.mllm import questions
from balcap_mega.rewards.mllm.failures import Unusable, explanation
from balcap_mega.rewards.mllm.replies import Completion, usable_text

DATA = Path(__file__).parent / "data"
REPLIES = json.loads((DATA / "judge_replies.json").read_text())
REFUSALS = json.loads((DATA / "judge_refusals.json").read_text())


def completion(content, finish_reason="stop", **message) -> Completion:
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish_reason}
    return Completion.model_validate({"choices": [choice]})


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_is_used_or_named(name):
    case = REPLIES[name]
    question = questions.language("A cat sits on a red sofa.")
    try:
        grades = question.accept(Completion.model_validate_json(json.dumps(case["reply"])))
    except Unusable as error:
        assert case["verdict"].casefold() == f"unusable: {error.reason.replace('_', ' ')}".casefold()
    else:
        assert case["verdict"] == "use"
        assert (grades.clarity, grades.fluency, grades.coherency) == (8, 9, 7)
        assert all(type(grade) is int for _, grade in grades)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("<think>A or B? B.</think>\n\nB", "B"),
        ("A or B? B.</think>B", "B"),  # where the template has opened the thoughts
        ("B\n", "B"),
        ([{"type": "thinking", "thinking": "A?"}, {"type": "text", "text": "B"}], "B"),
    ],
)
def test_a_text_is_what_follows_the_thoughts(text, read):
    assert usable_text(completion(text).choices[0]).strip() == read


@pytest.mark.parametrize(
    ("content", "finish_reason", "reason"),
    [
        ("B", "length", "truncated"),
        ("<think>A or B", "stop", "empty"),
        ("<think>A or B</think> \n", "stop", "empty"),
        (" \n", "stop", "empty"),
        ([], "stop", "empty"),
        ("B", "content_filter", "refusal"),
    ],
)
def test_a_text_that_is_cut_withheld_or_blank_is_not_used(content, finish_reason, reason):
    with pytest.raises(Unusable) as caught:
        usable_text(completion(content, finish_reason).choices[0])
    assert caught.value.reason == reason


def test_a_cut_text_is_used_only_where_its_beginning_is_the_answer():
    cut = completion("B. A red", "length").choices[0]
    assert usable_text(cut, cut_is_fine=True) == "B. A red"
    for content in (None, "", "<think>A or B"):
        with pytest.raises(Unusable, match="truncated"):
            usable_text(completion(content, "length").choices[0], cut_is_fine=True)


def test_a_long_hostile_reply_is_read_in_no_time():
    for hostile in ("```" + " " * 2**22, "<think>" * 2**19, "`" * 2**22, "{" * 2**20):
        with pytest.raises(Unusable):
            questions.language("A cat.").accept(completion(hostile))


@pytest.mark.parametrize("name", REFUSALS)
def test_a_servers_own_words_are_kept(name):
    body = REFUSALS[name]["body"]
    message = body["error"]["message"] if "error" in body else body["detail"]
    assert explanation(json.dumps(body).encode(), "sk-secret-123") == message


def test_a_servers_own_words_are_short_plain_and_free_of_keys():
    key = "sk-proj-0123456789abcdef/XYZ"
    told = explanation(f"Wrong key {key}, {key[:12]}, Bearer abc.def, sk-other1234567\x1b[2J\n\u202e ok".encode(), key)
    assert told.startswith("Wrong key …") and told.endswith("ok")
    assert not any(part in told for part in ("0123456", "sk-", "abc.def", "\x1b", "\n", "\u202e"))
    assert len(explanation(b"x" * 10000)) == 300
    assert explanation(b"[" * 50000) and explanation(b"\xff\xfe") and explanation(b"") == ""
    assert explanation(b'{"detail": [{"msg": "Input should be a valid string"}]}') == "Input should be a valid string"
