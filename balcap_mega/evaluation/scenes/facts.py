"""DCScore on `scenes`: F1 over the caption's assertions and the reference's facts, by DCScore's own arithmetic."""

from balcap_mega.data.scenes.grammar import reference_units
from balcap_mega.data.scenes.world import Scene
from balcap_mega.evaluation.dcscore_scoring import score_trial
from balcap_mega.evaluation.scenes.account import Account
from balcap_mega.evaluation.scenes.truth import Checked


def dcscore(account: Account, checked: list[Checked], scene: Scene) -> float:
    """(F1 of all + F1 of the relevant) / 2, in [0, 1].

    A sentence that tells nothing visible is a fact that is neither relevant nor verified. What is said once more is the
    same fact. True statements that the reference does not make count as DCScore counts them, in both its sums.
    """
    oracle = {fact: number for number, fact in enumerate(reference_units(scene))}
    predicted, verification, matching = [], [], []
    for number, each in enumerate(checked):
        predicted.append({"fact": number, "relevance": 1})
        verification.append({"fact": number, "verification": int(each.true)})
        matching.append({"fact": number, "matched_oracle_id": oracle.get(each.fact) if each.true else None})
    for number, sentence in enumerate(account.sentences, start=len(checked)):
        if sentence.idle == sentence.words:
            predicted.append({"fact": number, "relevance": 0})
            verification.append({"fact": number, "verification": 0})
            matching.append({"fact": number, "matched_oracle_id": None})
    trial = score_trial(predicted, len(oracle), verification, matching, mend=True)
    return (trial.f1 + trial.f1_relevant) / 2
