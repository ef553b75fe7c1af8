"""All measures of a captioner of `scenes`, of which only b-CapScore is made of what it is rewarded for."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from balcap_mega.algorithm.words import count_words
from balcap_mega.data.scenes import SceneRecord
from balcap_mega.evaluation.scenes.account import Account
from balcap_mega.evaluation.scenes.arena import arena, impression
from balcap_mega.evaluation.scenes.facts import dcscore
from balcap_mega.evaluation.scenes.reader import read
from balcap_mega.evaluation.scenes.truth import check
from balcap_mega.evaluation.scenes.utility import utility
from balcap_mega.rewards.judge import COMPONENTS, b_capscore
from balcap_mega.rewards.scenes import SceneJudge


@dataclass(frozen=True)
class SceneMeasures:
    """Means over the captions.

    utility:    answers of a reader who has the caption alone, 0-100
    arena:      preference over three fixed captioners, -100 to 100
    dcscore:    DCScore's F1 over assertions, 0-100
    b_capscore: of the strict judge, whatever judge a run was rewarded by, 0-100
    length:     words of the captions over words of their references
    repetition: share of what is told that was told before, in whatever words, 0-100
    pointless:  share of the words that name nothing visible, 0-100
    """

    utility: float
    arena: float
    dcscore: float
    b_capscore: float
    length: float
    repetition: float
    pointless: float


def measure(records: Sequence[SceneRecord], captions: Sequence[str]) -> SceneMeasures:
    """One caption a record, in the same order."""
    scenes = [record.scene for record in records]
    accounts = [read(caption) for caption in captions]
    checked = [check(account, scene) for account, scene in zip(accounts, scenes, strict=True)]
    judge = SceneJudge()
    judged = [judge.judge(record, caption).components() for record, caption in zip(records, captions, strict=True)]
    lengths = zip(captions, records, strict=True)
    return SceneMeasures(
        utility=100 * fmean(utility(account, scene) for account, scene in zip(accounts, scenes)),
        arena=arena(scenes, [impression(account, each) for account, each in zip(accounts, checked)]),
        dcscore=100 * fmean(dcscore(*each) for each in zip(accounts, checked, scenes)),
        b_capscore=100 * b_capscore(*(fmean(each[name] for each in judged) for name in COMPONENTS)),
        length=fmean(count_words(caption) / count_words(record.reference) for caption, record in lengths),
        repetition=100 * fmean(_repetition(account) for account in accounts),
        pointless=100 * fmean(_pointless(account) for account in accounts),
    )


def _repetition(account: Account) -> float:
    told = len(account.statements) + account.restated
    return account.restated / told if told else 0.0


def _pointless(account: Account) -> float:
    words = sum(sentence.words for sentence in account.sentences)
    return sum(sentence.idle for sentence in account.sentences) / words if words else 0.0
