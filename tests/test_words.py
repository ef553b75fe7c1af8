"""Lengths in words: English as blanks have it, scripts without blanks by their letters, and no join that shortens."""

import json
from pathlib import Path

import pytest
import torch

from balcap_mega.algorithm.batch import RewardBatch
from balcap_mega.algorithm.length_gate import control_length
from balcap_mega.algorithm.words import count_words
from balcap_mega.config.schema import AlgorithmConfig, DataConfig
from balcap_mega.data.sources import build_datasets

PHOTO_ROWS = Path(__file__).parent / "data" / "photos.jsonl"
ENGLISH = "a large red kite flies above a green field under the blue sky today"
# The same sentence, "a red kite above a field" and the like, in scripts with no blanks between words.
UNSPACED = {
    "Chinese": "一只棕色的小狗坐在灰色的沙发上，旁边放着一本打开的书。",
    "Japanese": "茶色の子犬がグレーのソファに座っている。",
    "Thai": "ว่าวสีแดงลอยอยู่เหนือทุ่งนาสีเขียว",
    "Lao": "ວ່າວສີແດງຢູ່ເທິງທົ່ງນາສີຂຽວ",
    "Khmer": "ខ្លែងក្រហមមួយនៅលើវាលស្រែពណ៌បៃតង",
    "Burmese": "အနီရောင်စွန်တစ်ခုသည်လယ်ကွင်းအပေါ်တွင်ရှိသည်",
}


def test_english_counts_by_its_blanks():
    texts = [json.loads(line)["reference"] for line in PHOTO_ROWS.read_text().splitlines()]
    texts += [record.reference for record in build_datasets(DataConfig(train_size=50, eval_size=1), seed=0)[0]]
    texts += [
        "It's 10:30 - the man's U.S. flag (well-worn) costs $1,000.",
        "A black-and-white photo of a cat.",
        "Une image de l'arbre qu'il aime.",
        "빨간 연이 들판 위에 있다",
        "उसने हिन्दी में कहा",
        "می\u200cخواهم بروم",
        "ＡＢＣ\u3000ｄｅｆ",
        "a\xa0red\u202fkite",
        "",
    ]
    assert [count_words(text) for text in texts] == [len(text.split()) for text in texts]


@pytest.mark.parametrize("script", UNSPACED)
def test_scripts_without_blanks_have_lengths(script):
    sentence = UNSPACED[script]
    assert 4 <= count_words(sentence) <= 20
    assert count_words(sentence * 30) == pytest.approx(30 * count_words(sentence))
    assert count_words(sentence * 2) / count_words(sentence) == 2  # exactly: the gate's bounds are inclusive
    lengths = torch.tensor([count_words(sentence * times) for times in (30, 2, 1)])
    rewards = RewardBatch(
        values=torch.ones(1, 3), valid=torch.ones(1, 3, dtype=torch.bool), names=("linguistic",),
        lengths=lengths, reference_lengths=lengths[2].expand(3), group_ids=torch.zeros(3, dtype=torch.int64),
    )  # fmt: skip
    assert control_length(rewards, AlgorithmConfig())[1].tolist() == [True, False, False]


def test_words_of_two_scripts_add_up():
    assert count_words("一只red kite") == pytest.approx(count_words("一只") + 2)
    assert count_words("红red绿green") == pytest.approx(count_words("红绿") + 2)


@pytest.mark.parametrize(
    "join",
    ["-", "_", "/", "\u2010", "\u2014", "\xad", "\u200b", "\u2060", "\ufeff", "\u200d", "\u3164", "\u2800", ".", ""],
)
def test_a_join_does_not_shorten(join):
    words = ENGLISH.split()
    whole = join.join(words)
    pairs = " ".join(join.join(pair) for pair in zip(words[::2], words[1::2]))
    assert count_words(whole) > 0.4 * len(words)
    if join:
        assert count_words(whole) >= len(words)
        assert count_words(pairs) >= 0.8 * len(words)
