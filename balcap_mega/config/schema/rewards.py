"""The components of the reward, and who gives them."""

import re
from typing import Annotated, Any, Literal

from pydantic import field_validator, model_validator

from balcap_mega.config.schema.base import MAY_CHANGE, Fraction, Positive, Section
from balcap_mega.config.schema.endpoint import JudgeEndpoint

JudgedReward = Literal["precision", "recall", "linguistic", "utility"]
JUDGED = ("precision", "recall", "linguistic")  # BalCapRL's components; b-CapScore is of these three
JudgeQuestion = Literal["split", "verify", "units", "cover", "language", "answer"]
QUESTIONS_OF: dict[JudgedReward, tuple[JudgeQuestion, ...]] = {  # what a judge gives, and what it is asked for that
    "precision": ("split", "verify"),
    "recall": ("units", "cover"),
    "linguistic": ("language",),
    "utility": ("answer",),
}


class ComponentConfig(Section):
    """Where one component of the reward comes from: what the judge finds, by its name, or a class of one's own, as
    `balcap_mega.rewards.own` says.
    """

    source: str
    """precision, recall, linguistic or utility, as the judge gives them; or `package.module:Class`."""
    options: dict[str, Any] = {}
    """Of the class: the keyword arguments of its constructor."""
    path: Annotated[str | None, MAY_CHANGE] = None
    """Folder that the class's package stands in, where that is not installed."""
    concurrency: Annotated[Positive, MAY_CHANGE] = 16
    """Captions that the class is asked about at once, each from a thread."""
    timeout_seconds: Annotated[Positive, MAY_CHANGE] = 120
    """From the end of a caption to its reward, which is missing afterwards."""

    @model_validator(mode="before")
    @classmethod
    def source_alone(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @property
    def judged(self) -> bool:
        """Whether the configured judge gives it."""
        return self.source in QUESTIONS_OF

    @model_validator(mode="after")
    def a_known_source(self):
        if not self.judged and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.source):
            raise ValueError(
                f"source={self.source} is nothing that a judge gives; name one of {', '.join(QUESTIONS_OF)}, or a "
                "class of your own as package.module:Class"
            )
        if self.judged and (self.options or self.path):
            raise ValueError(f"source={self.source} comes from the judge; leave out options and path")
        return self


class RewardConfig(Section):
    """The components of the reward, and who judges: the rules of `scenes`, or a multimodal LLM at `endpoint`.

    A component's questions may go to another endpoint, and so may each question: only `verify` sees the picture, the
    others can go to a small text model.
    """

    components: dict[str, ComponentConfig] = {name: ComponentConfig(source=name) for name in JUDGED}
    """The reward's, by the name that they have in weights, metrics and reports."""
    pointability: bool = True
    """Whether an assertion must point at something visible to count in precision; false: truth alone counts."""
    judge: Literal["scenes", "mllm"] = "scenes"
    """The rules of `scenes`, or a multimodal LLM."""
    reading: Literal["strict", "lenient"] = "strict"
    """How the rules of `scenes` read a caption. lenient: as a multimodal LLM does that looks each unit up in it, any
    statement covers a unit, one that is guessed or contradicted too."""
    endpoint: Annotated[JudgeEndpoint | None, MAY_CHANGE] = None
    """The multimodal judge."""
    component_endpoints: Annotated[dict[JudgedReward, JudgeEndpoint], MAY_CHANGE] = {}
    """Another endpoint for some rewards, by reward."""
    question_endpoints: Annotated[dict[JudgeQuestion, JudgeEndpoint], MAY_CHANGE] = {}
    """Another endpoint for some questions, by question."""
    cache_dir: Annotated[str | None, MAY_CHANGE] = None
    """Folder for reference units and judgements that are asked once."""
    max_missing_fraction: Annotated[Fraction, MAY_CHANGE] = 0.2
    """Stop a step before its update when a larger share of rewards is missing."""

    def endpoints(self) -> dict[JudgeQuestion, JudgeEndpoint]:
        """Whom each question that is asked goes to, by the question's name; empty where no LLM judges."""
        if (default := self.endpoint) is None:
            return {}
        return {
            question: self.question_endpoints.get(question, self.component_endpoints.get(component, default))
            for component in self.judged
            for question in QUESTIONS_OF[component]
        }

    def endpoint_key(self, question: str) -> str:
        """The key under which that question's endpoint stands."""
        if question in self.question_endpoints:
            return f"rewards.question_endpoints.{question}"
        component = next(name for name, questions in QUESTIONS_OF.items() if question in questions)
        if component in self.component_endpoints:
            return f"rewards.component_endpoints.{component}"
        return "rewards.endpoint"

    @field_validator("components")
    @classmethod
    def names_that_can_be_told_apart(cls, components: dict[str, ComponentConfig]) -> dict[str, ComponentConfig]:
        if not components:
            raise ValueError("there is no component; name at least one")
        for name, component in components.items():
            taken = name in ("b_capscore", "length_ratio", "gate_rate") or name.endswith(("_std", "_missing"))
            if taken or not re.fullmatch(r"[a-z]\w*", name, re.ASCII):
                raise ValueError(
                    f"{name!r} cannot be a component's name, which also names its metrics; give it another, of small "
                    "letters, digits and underscores"
                )
            if name in JUDGED and component.source != name:
                raise ValueError(
                    f"{name} is a part of b-CapScore, not {component.source}; give that another name, or the source "
                    f"{name}"
                )
        return components

    @property
    def judged(self) -> tuple[JudgedReward, ...]:
        """What the judge is asked for, of precision, recall, linguistic and utility."""
        named = {component.source for component in self.components.values()}
        return tuple(source for source in QUESTIONS_OF if source in named)

    @property
    def questions(self) -> tuple[JudgeQuestion, ...]:
        """Those that a multimodal judge is asked for it."""
        return tuple(question for source in self.judged for question in QUESTIONS_OF[source])

    @property
    def asks_judge(self) -> bool:
        return bool(self.judged)

    @model_validator(mode="after")
    def lenient_rules(self):
        if self.reading == "lenient" and self.judge != "scenes":
            raise ValueError(
                f"reading=lenient is of the rules of scenes, not of judge={self.judge}; leave rewards.reading out"
            )
        return self

    @model_validator(mode="after")
    def mllm_needs_endpoint(self):
        if self.judge == "mllm" and self.endpoint is None and self.asks_judge:
            raise ValueError("judge=mllm asks an endpoint; set rewards.endpoint.base_url and rewards.endpoint.model")
        return self
