"""The rule-based judge of `scenes`: exact, immediate, and made to resist the hacks that captioners learn under RL."""

from concurrent.futures import Future

from balcap_mega.data.scenes import SceneRecord
from balcap_mega.data.scenes.grammar import reference_units, unit_text
from balcap_mega.rewards.judge import Judgement
from balcap_mega.rewards.scenes.answering import answer
from balcap_mega.rewards.scenes.discourse import Discourse, follow
from balcap_mega.rewards.scenes.reading import read
from balcap_mega.rewards.scenes.style import assess
from balcap_mega.rewards.scenes.verify import bind, verify


class SceneJudge:
    """A `Judge` that knows the scene. It reads any text: every word of it belongs to some assertion, is grammar, or
    repeats what was said; what it cannot see in the scene counts against precision.

    pointability: False lets what points at nothing, moods and praise, pass as true, as a lenient judge does
    answers:      also answer the record's questions, from the caption alone
    lenient:      take what is guessed or contradicted for said, as a multimodal LLM does that looks each unit up in the
                  caption: any statement of a unit covers it, but a denial
    """

    def __init__(self, pointability: bool = True, *, answers: bool = False, lenient: bool = False):
        self.pointability, self.answers, self.lenient = pointability, answers, lenient

    def judge(self, record: SceneRecord, caption: str) -> Judgement:
        sentences = read(caption)
        discourse = follow(sentences, self.lenient)
        binding = bind(discourse, record.scene, shared=self.lenient)
        assertions, covered, implied = verify(
            caption, discourse, binding, record.scene, self.pointability, self.lenient
        )
        units = reference_units(record.scene)
        style = assess(caption, sentences, discourse, implied)
        return Judgement(
            assertions=assertions,
            covered=tuple(unit in covered for unit in units),
            clarity=style.clarity,
            fluency=style.fluency,
            coherency=style.coherency,
            answers=self._answers(record, discourse) if self.answers else None,
            units=tuple(unit_text(record.scene, unit) for unit in units),
        )

    @staticmethod
    def _answers(record: SceneRecord, discourse: Discourse) -> tuple[float, ...]:
        return tuple(question.credit(answer(question, discourse)) for question in record.questions or ())

    def submit(self, record: SceneRecord, caption: str, *, quotes: bool = False) -> Future[Judgement]:
        """A future that is done already; the places of the assertions are always there."""
        future: Future[Judgement] = Future()
        future.set_result(self.judge(record, caption))
        return future

    def close(self) -> None:
        """Nothing is held open."""


__all__ = ["SceneJudge"]
