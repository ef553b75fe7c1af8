"""A run, typed: every key a YAML file may hold, its type, its default and its bounds.

Unknown keys are refused (`load.py` names the nearest one). Checks that need only one section stand with it; checks
across sections stand in `RunConfig`. Their messages read "problem; remedy", which `load.py` splits.

A key that is marked `MAY_CHANGE` may have another value when a run goes on; any other key would make it another run.
The mark on a section stands for every key in it.
"""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
MAY_CHANGE = "may change when the run goes on"  # metadata of a field: `Annotated[type, MAY_CHANGE]`

COMPONENTS = ("precision", "recall", "linguistic")  # of the reward, as a judge gives them


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The policy: a Hugging Face folder, or a small random one made on the spot for the CPU quickstart and tests."""

    path: str | None = None
    tiny: str | None = None  # a family of balcap_mega/models/families, by name
    freeze_vision: bool = True
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] = "blockwise"
    recompute: Literal["none", "selective", "full"] = "none"

    @model_validator(mode="after")
    def one_source(self):
        if (self.path is None) == (self.tiny is None):
            raise ValueError(
                f"path={self.path} and tiny={self.tiny}; set exactly one of model.path (a Hugging Face folder) and "
                "model.tiny (the name of a model family), the other to null"
            )
        return self

    @model_validator(mode="after")
    def fp8_beside_bfloat16(self):
        if self.fp8 != "none" and self.dtype != "bfloat16":
            raise ValueError(f"fp8={self.fp8} quantises bfloat16, not dtype={self.dtype}; set model.dtype=bfloat16")
        return self


class ParallelConfig(Section):
    """Megatron layout; data parallelism is what remains of the world size.

    offload: engine and learner take turns in the device's memory. The engine sleeps while the learner trains; gradients
        and the optimizer's state leave the device while the engine generates. `auto`: on GPUs.
    A run ends when no rank has finished anything for `timeout_seconds`, or one gave no sign of life for
    `silence_seconds`. The default is below the 600 s after which PyTorch aborts collectives of groups that others made.
    """

    tensor: Positive = 1
    pipeline: Positive = 1
    sequence: bool = False
    distributed_optimizer: bool = True
    offload: Literal["auto", "always", "never"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_seconds: Positive = 540
    silence_seconds: Annotated[int, Field(ge=5)] = 60

    @model_validator(mode="after")
    def sequence_needs_tensor(self):
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence=true needs tensor >= 2; set parallel.sequence=false or raise parallel.tensor")
        return self


class DataConfig(Section):
    """`scenes` draws its images from the seed; the others read `path` and find images under `image_root`.

    eval_among: the images held out are the `eval_size` of the lowest path hashes among the first so many of the file;
        by default the first `eval_size` themselves. Rows that are appended then move none. Give it where a file is
        sorted, as many images as it has now; in a file that has fewer, appended rows still move some.
    too_long: what becomes of records whose prompt and picture leave no room for a caption in rollout.max_model_len.
        They are found before the first step; at most `max_missing_fraction` of a dataset may be left out.
    """

    source: Literal["scenes", "sharegpt4v", "jsonl"] = "scenes"
    path: str | None = None
    image_root: str | None = None
    image_prefixes: tuple[str, ...] = ()  # keep only images whose path starts with one of these
    train_size: Positive = 4096
    eval_size: Positive = 256
    eval_among: Positive | None = None
    image_backend: Literal["pil", "dali"] = "pil"
    max_pixels: Annotated[int, Field(ge=28 * 28)] | None = None  # larger pictures are shrunk to it as they are loaded
    max_missing_fraction: Annotated[Fraction, MAY_CHANGE] = 0.01
    too_long: Literal["refuse", "leave_out"] = "refuse"

    @model_validator(mode="after")
    def files_need_a_path(self):
        if self.source != "scenes" and self.path is None:
            raise ValueError(f"source={self.source} reads a file; set data.path to the annotations")
        return self


class WarmupConfig(Section):
    """Supervised steps before RL. On `scenes` they teach a fluent captioner with realistic flaws."""

    steps: Annotated[int, Field(ge=0)] = 0
    batch_size: Positive = 64
    learning_rate: NonNegative = 1e-3


class RolloutConfig(Section):
    """vLLM: prompts a step, captions a prompt, and how they are sampled.

    top_p: below 1, captions come from the nucleus alone, while the trainer differentiates the whole distribution. That
        bias is not corrected, and neither ratio nor mismatch shows it; a run says so as it begins.
    memory_fraction: what the engine may take of a GPU, weights and cache and all. The learner's weights stay beside it;
        what else the learner needs does not, unless `parallel.offload` is never.
    """

    prompts_per_step: Positive = 64
    group_size: Annotated[int, Field(ge=2)] = 8
    max_tokens: Positive = 512
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    tensor_parallel: Annotated[Positive, MAY_CHANGE] = 1
    max_model_len: Positive = 4096
    memory_fraction: Annotated[float, Field(gt=0, lt=1), MAY_CHANGE] = 0.6
    fp8: bool = False
    verify_refit_every: Annotated[int, Field(ge=0), MAY_CHANGE] = 50  # checksums of every n-th refit; 0: never
    timeout_seconds: Annotated[Positive, MAY_CHANGE] = 600


class LengthGateConfig(Section):
    """Caption length over reference length, both in `unit`; the bounds are inclusive. τ_l and τ_u of BalCapRL.

    words: of any script, by `balcap_mega.algorithm.words`: what stands between blanks, and where words have none
    between them, by their letters.
    components: the rewards that length control acts on, the gate and the linear penalty alike
    """

    lower: NonNegative = 0.5
    upper: NonNegative = 2.0
    unit: Literal["words", "tokens"] = "words"
    components: tuple[str, ...] = ("linguistic",)

    @model_validator(mode="after")
    def ordered(self):
        if self.lower > self.upper:
            raise ValueError(
                f"lower={self.lower} is above upper={self.upper}, no caption would pass; "
                "give lower <= upper, such as 0.5 and 2.0"
            )
        return self


class AlgorithmConfig(Section):
    """Rewards to gradient. Weights go by name, never by position.

    truncated: what a caption is worth that was cut at rollout.max_tokens. `score`: what the judge says of it, like any
        other. `mask`: it is judged and counts in its group's mean and deviation, but is left out of the loss.
    """

    weights: dict[str, NonNegative] = {
        "precision": 1.0,
        "recall": 1.0,
        "linguistic": 1.0,
    }
    normalization: Literal["gdpo", "grpo"] = "gdpo"
    length_control: Literal["gate", "linear", "none"] = "gate"
    gate: LengthGateConfig = LengthGateConfig()
    linear_penalty: NonNegative = 1.0
    whiten: bool = True
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    kl_weight: NonNegative = 0.0
    importance_cap: Annotated[float, Field(gt=0)] | None = 2.0
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] = "token_mean"
    ratio_level: Literal["token", "sequence"] = "token"
    entropy_weight: NonNegative = 0.0
    truncated: Literal["score", "mask"] = "score"
    fused: bool = True

    @model_validator(mode="after")
    def some_weight(self):
        if not any(self.weights.values()):
            raise ValueError("every weight is 0; give at least one of precision, recall, linguistic a positive weight")
        return self


JudgeQuestion = Literal["split", "verify", "units", "cover", "language"]
QUESTIONS_OF = {"precision": ("split", "verify"), "recall": ("units", "cover"), "linguistic": ("language",)}


class DialectConfig(Section):
    """How an endpoint's server differs from the chat completions that OpenAI documents.

    token_limit:     what the limit of a reply is called
    temperature:     whether temperature and top_p may be sent; some models take no other than their own
    seed:            whether a seed may be sent
    replies:         how JSON is asked for; `none` leaves it to the prompt
    patterns:        whether a JSON schema may hold regular expressions
    thinking_tokens: added to the limit of every reply, for a judge that thinks before it answers
    extra_body:      sent as it stands, such as {chat_template_kwargs: {enable_thinking: false}}; never a key
    """

    token_limit: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    temperature: bool = True
    seed: bool = True
    replies: Literal["json_schema", "json_object", "none"] = "json_schema"
    patterns: bool = True
    thinking_tokens: Annotated[int, Field(ge=0)] = 0
    extra_body: dict[str, JsonValue] = {}

    @field_validator("extra_body")
    @classmethod
    def beside_the_question(cls, body: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if taken := sorted({"model", "messages", "response_format", "n", "stream"} & set(body)):
            raise ValueError(f"{', '.join(taken)} belong to the question; leave them out of extra_body")
        return body


class JudgeEndpoint(Section):
    """An OpenAI-compatible endpoint. The key is read from the environment variable `api_key_env`, never from here.

    base_url:    its address, or a list of them: each serves the same model, and an image's requests go to one of them
    concurrency: requests that an address gets at once from the whole job, at most; fewer while it labours
    What stands here is shown in logs and reports, so an address with credentials in it is refused.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: str | tuple[str, ...]
    model: str
    api_key_env: str | None = None
    concurrency: Positive = 64
    timeout_seconds: Positive = 120
    max_retries: Annotated[int, Field(ge=0)] = 4
    dialect: DialectConfig = DialectConfig()

    @property
    def addresses(self) -> tuple[str, ...]:
        return (self.base_url,) if isinstance(self.base_url, str) else self.base_url

    @field_validator("base_url", mode="before")
    @classmethod
    def plain_addresses(cls, base_url: Any) -> Any:
        addresses = base_url if isinstance(base_url, list | tuple) else [base_url]
        if not addresses or len(set(map(str, addresses))) < len(addresses):
            raise ValueError("it names no address, or one twice; give each server once")
        if not all(isinstance(address, str) and _is_plain_address(address) for address in addresses):
            raise ValueError(
                "it is no plain http(s) address; write it as https://host:port/v1, a key never within it but in the "
                "environment variable that api_key_env names"
            )
        return base_url if isinstance(base_url, str) else tuple(base_url)

    @field_validator("api_key_env")
    @classmethod
    def a_variables_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", name):
            raise ValueError("it is no name of an environment variable; give the name, in capitals, not the key itself")
        return name


def _is_plain_address(base_url: str) -> bool:
    try:
        address = urlsplit(base_url)
        plain = address.scheme in ("http", "https") and bool(address.hostname) and (address.port or 1) > 0
    except ValueError:
        return False
    return plain and not set(base_url) & set("@?#\\ ,") and base_url.isprintable()


class RewardConfig(Section):
    """Who judges: the rules of `scenes`, or a multimodal LLM at `endpoint`.

    A component's questions may go to another endpoint, and so may each question: only `verify` sees the picture, the
    others can go to a small text model.
    """

    judge: Literal["scenes", "mllm"] = "scenes"
    endpoint: Annotated[JudgeEndpoint | None, MAY_CHANGE] = None
    component_endpoints: Annotated[dict[Literal["precision", "recall", "linguistic"], JudgeEndpoint], MAY_CHANGE] = {}
    question_endpoints: Annotated[dict[JudgeQuestion, JudgeEndpoint], MAY_CHANGE] = {}
    cache_dir: Annotated[str | None, MAY_CHANGE] = None
    max_missing_fraction: Annotated[Fraction, MAY_CHANGE] = 0.2

    def endpoints(self) -> dict[str, JudgeEndpoint]:
        """Whom each question goes to, by the question's name; empty where no LLM judges."""
        if self.endpoint is None:
            return {}
        return {
            question: self.question_endpoints.get(question, self.component_endpoints.get(component, self.endpoint))
            for component, questions in QUESTIONS_OF.items()
            for question in questions
        }

    def endpoint_key(self, question: str) -> str:
        """The key under which that question's endpoint stands."""
        if question in self.question_endpoints:
            return f"rewards.question_endpoints.{question}"
        component = next(name for name, questions in QUESTIONS_OF.items() if question in questions)
        if component in self.component_endpoints:
            return f"rewards.component_endpoints.{component}"
        return "rewards.endpoint"

    @model_validator(mode="after")
    def mllm_needs_endpoint(self):
        if self.judge == "mllm" and self.endpoint is None:
            raise ValueError("judge=mllm asks an endpoint; set rewards.endpoint.base_url and rewards.endpoint.model")
        return self


class PackingConfig(Section):
    """Microbatches of at most `row_tokens` tokens; each prompt's image and text once, unless told otherwise."""

    row_tokens: Positive = 16384
    shared_prefix: bool = True


class OptimizerConfig(Section):
    learning_rate: NonNegative = 1e-6
    weight_decay: NonNegative = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    updates_per_step: Positive = 1  # minibatches that one step's rollouts are split into
    warmup_steps: Annotated[int, Field(ge=0)] = 0


class UpdateCheck(Section):
    """What an update may not be past, and whether it is applied all the same (warn), left out (skip), or the last."""

    policy: Literal["stop", "skip", "warn"]
    bound: NonNegative


class TrendCheck(Section):
    """What a metric may not be past in `steps` steps in a row, and whether the run then stops or only says so."""

    policy: Literal["stop", "warn"]
    bound: NonNegative
    steps: Positive


class HealthConfig(Section):
    """What is wrong with a run, and what then happens; `balcap_mega.training.guard.health` says what each is about.

    non_finite:      loss, gradients or logprobs; an update that is left out (skip) moves neither weights nor optimizer
    mismatch:        nats by which trainer and engine differ in a token's logprob, on average
    skipped:         share of a step's updates that were left out
    constant_reward: standard deviation of a component over the step's captions
    missing_reward:  share of captions without a component; one step past rewards.max_missing_fraction is the last
    truncated:       share of captions that were cut at rollout.max_tokens
    low_entropy:     nats a token
    short_captions, long_captions: caption length over reference length
    """

    non_finite: Literal["stop", "skip"] = "stop"
    mismatch: UpdateCheck = UpdateCheck(policy="stop", bound=0.2)
    skipped: TrendCheck = TrendCheck(policy="stop", bound=0.0, steps=10)
    constant_reward: TrendCheck = TrendCheck(policy="warn", bound=1e-6, steps=20)
    missing_reward: TrendCheck = TrendCheck(policy="warn", bound=0.1, steps=20)
    truncated: TrendCheck = TrendCheck(policy="warn", bound=0.5, steps=20)
    low_entropy: TrendCheck = TrendCheck(policy="warn", bound=0.01, steps=20)
    short_captions: TrendCheck = TrendCheck(policy="warn", bound=0.1, steps=20)
    long_captions: TrendCheck = TrendCheck(policy="warn", bound=5.0, steps=20)

    @field_validator("*", mode="before")
    @classmethod
    def on_top_of_the_default(cls, value, field):
        """So that a file may give a check's policy alone."""
        default = cls.model_fields[field.field_name].default
        return {**default.model_dump(), **value} if isinstance(value, dict) and isinstance(default, Section) else value


class CheckpointConfig(Section):
    """Written while training goes on. After a signal the run ends within `grace_seconds`, as a rule with one more."""

    every: Positive = 50
    keep: Positive = 2
    timeout_seconds: Positive = 1800
    grace_seconds: Positive = 300


class CaptionQaFiles(Section):
    """CaptionQA's questions (JSON, JSON Lines or Parquet), and a folder of pictures named by their id."""

    questions: str
    images: str
    max_tokens: Positive = 4  # of an answer; a judge that thinks first takes its endpoint's dialect.thinking_tokens


class DcScoreFiles(Section):
    """DeCapBench's annotations (JSON Lines, with `oracle_caption`), and the folder of its pictures."""

    annotations: str
    images: str


class BenchmarkConfig(Section):
    """Benchmarks of the policy every `eval_every` steps, judged beside the training, which they never end or delay.

    endpoint:     the judge; that of `rewards` where there is none. One of its own takes no part of the rewards' rate
    wait_seconds: what is still judged after the last step is waited for so long
    """

    captionqa: CaptionQaFiles | None = None
    dcscore: DcScoreFiles | None = None
    endpoint: JudgeEndpoint | None = None
    prompt: str = "Describe this image in detail."
    wait_seconds: Annotated[int, Field(ge=0, le=480)] = 300

    @property
    def wanted(self) -> bool:
        return self.captionqa is not None or self.dcscore is not None


class RunConfig(Section):
    """One training run. `balcap_mega.config.load.load_config` builds it from YAML and `key=value` overrides."""

    output_dir: Annotated[str, MAY_CHANGE]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    steps: Annotated[int, Field(ge=0), MAY_CHANGE] = 1000
    eval_every: Annotated[int, Field(ge=0), MAY_CHANGE] = 0  # 0: before and after RL only
    # What of a run's inputs may have other content now than when it began: the rows to train on, what model.path holds.
    accept_changed: Annotated[tuple[Literal["rows", "checkpoint"], ...], MAY_CHANGE] = ()
    model: ModelConfig
    parallel: Annotated[ParallelConfig, MAY_CHANGE] = ParallelConfig()  # checkpoints load at any layout
    data: DataConfig = DataConfig()
    warmup: WarmupConfig = WarmupConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    packing: Annotated[PackingConfig, MAY_CHANGE] = PackingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: Annotated[CheckpointConfig, MAY_CHANGE] = CheckpointConfig()
    health: Annotated[HealthConfig, MAY_CHANGE] = HealthConfig()
    benchmarks: Annotated[BenchmarkConfig, MAY_CHANGE] = BenchmarkConfig()

    @model_validator(mode="after")
    def benchmarks_are_judged(self):
        if self.benchmarks.wanted and not self.eval_every:
            raise ValueError("benchmarks are taken every eval_every=0 steps; set eval_every, such as 50")
        if self.benchmarks.wanted and not (self.benchmarks.endpoint or self.rewards.endpoint):
            raise ValueError("benchmarks have no judge; set benchmarks.endpoint.base_url and benchmarks.endpoint.model")
        return self

    @model_validator(mode="after")
    def judge_fits_data(self):
        if (self.rewards.judge == "scenes") != (self.data.source == "scenes"):
            raise ValueError(
                f"rewards.judge={self.rewards.judge} cannot judge data.source={self.data.source}; the rule-based judge "
                "knows only scenes: use judge=scenes with source=scenes and judge=mllm with any other"
            )
        return self

    @model_validator(mode="after")
    def components_are_known(self):
        controlled = () if self.algorithm.length_control == "none" else self.algorithm.gate.components
        for key, names in (("weights", self.algorithm.weights), ("gate.components", controlled)):
            if unknown := sorted(set(names) - set(COMPONENTS)):
                raise ValueError(
                    f"algorithm.{key}.{unknown[0]} names no reward of this run; name some of "
                    f"{', '.join(map(repr, COMPONENTS))}"
                )
        return self

    @model_validator(mode="after")
    def fp8_rollouts_are_corrected(self):
        if self.rollout.fp8 and self.algorithm.importance_cap is None:
            raise ValueError(
                "rollout.fp8=true samples from another policy than the one trained; set algorithm.importance_cap, "
                "such as 2.0, or rollout.fp8=false"
            )
        return self
