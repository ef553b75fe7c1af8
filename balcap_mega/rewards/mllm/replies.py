"""What a chat-completions reply holds: its text or its JSON, or the reason why it is not usable.

The MLLM judge and every evaluator read replies here and nowhere else. A reply that is not usable raises `Unusable`,
whose `reason` is one of

truncated   cut at the token limit
refusal     declined by the model, or withheld by the server's content filter
empty       no text, or thoughts alone
not_json    no JSON where JSON was asked for
off_schema  JSON of another shape, or with values out of range
"""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from balcap_mega.rewards.mllm.failures import Unusable

CUT = ("length", "max_tokens")
WITHHELD = ("content_filter", "safety", "refusal")
FENCE = "```"
TEXT_PARTS = ("text", "output_text")

Reply = TypeVar("Reply", bound=BaseModel)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text_of_parts(content: Any) -> Any:
    """Some servers give the content in parts, thoughts among them."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") in TEXT_PARTS]
    return "".join(text for text in texts if isinstance(text, str))


WHOLE = BeforeValidator(_whole)
"""For an integer that a judge may have written with a point: 10.0 is 10, 7.5 is none."""
Tokens = Annotated[int, Field(ge=0, lt=2**40), BeforeValidator(lambda count: 0 if count is None else count)]


class PromptDetails(BaseModel):
    cached_tokens: Tokens = 0


class Usage(BaseModel):
    """Tokens, as far as the server counts them; `prompt_tokens_details` says what its prefix cache had."""

    prompt_tokens: Tokens = 0
    completion_tokens: Tokens = 0
    prompt_tokens_details: PromptDetails | None = None

    @property
    def cached_tokens(self) -> int:
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details is not None else 0


class Message(BaseModel):
    content: Annotated[str | None, BeforeValidator(_text_of_parts)] = None
    refusal: str | None = None


class Choice(BaseModel):
    message: Message
    finish_reason: str | None = None


class Completion(BaseModel):
    """The part of a chat completion that is read here."""

    choices: list[Choice] = Field(min_length=1)
    usage: Usage | None = None


def usable_text(choice: Choice, *, cut_is_fine: bool = False) -> str:
    """A choice's text, without the thoughts before it. Raises Unusable where there is none to rely on.

    cut_is_fine: for a question whose answer stands at the beginning, such as a letter
    """
    if choice.message.refusal or (choice.finish_reason or "").lower() in WITHHELD:
        raise Unusable("refusal")
    cut = (choice.finish_reason or "").lower() in CUT
    text = _after_thoughts(choice.message.content or "")
    if cut and not (cut_is_fine and text.strip()):
        raise Unusable("truncated")
    if not text.strip():
        raise Unusable("empty")
    return text


def usable_json(choice: Choice, form: type[Reply]) -> Reply:
    """A choice's JSON, bare or fenced, as a `form`. Raises Unusable where it is not usable or of another form."""
    try:
        return form.model_validate_json(_unfenced(usable_text(choice)))
    except ValidationError as error:
        kinds = {detail["type"] for detail in error.errors(include_url=False)}
        raise Unusable("not_json" if kinds == {"json_invalid"} else "off_schema") from None


def _after_thoughts(text: str) -> str:
    if _begins_as_json(text):
        return text  # an answer, whatever its strings say
    thoughts, end, answer = text.partition("</think>")
    if end:
        return answer
    return "" if thoughts.lstrip().startswith("<think>") else text


def _unfenced(text: str) -> str:
    """What stands between a Markdown fence and the last one; the text itself where there are none."""
    first, last = text.find(FENCE), text.rfind(FENCE)
    if _begins_as_json(text) or first == last:
        return text
    return text[first + len(FENCE) : last].lstrip().removeprefix("json")


def _begins_as_json(text: str) -> bool:
    return text.lstrip().startswith(("{", "["))
