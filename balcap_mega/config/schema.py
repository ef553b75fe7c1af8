"""A run, typed: every key a YAML file may hold, its type, its default and its bounds.

Unknown keys are refused (`load.py` names the nearest one). Checks that need only one section stand with it; checks
across sections stand in `RunConfig`. Their messages read "problem; remedy", which `load.py` splits.

The string below a key says what it is for; `launch/pretrain_rl.py --explain` prints them all.

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

JUDGED = ("precision", "recall", "linguistic")  # the components that the judge gives; b-CapScore is of these three


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The policy: a Hugging Face folder, or a small random one made on the spot for the CPU quickstart and tests."""

    path: str | None = None
    """Hugging Face folder that training starts from, or a model's id on the Hub: fetched once a host, its safetensors,
    JSON and tokenizer files alone, at a commit that becomes part of the run."""
    revision: str | None = None
    """Branch, tag or commit of a model of the Hub; null: its main branch, and when a run goes on, where it began."""
    tiny: str | None = None
    """Make a small random model of this family instead of reading `path`; a name in balcap_mega/models/families."""
    freeze_vision: bool = True
    """Leave the vision tower and its projector as they are."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights and activations; master weights, moments and gradients are float32."""
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    """FP8 format of the decoder's linear layers; needs a GPU and Transformer Engine."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] = "blockwise"
    """How FP8 scales are chosen."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that backward computes again instead of keeping them."""

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
    """Megatron layout; data parallelism is what remains of the world size."""

    tensor: Positive = 1
    """Ranks that share each layer."""
    pipeline: Positive = 1
    """Stages that the layers are split into."""
    sequence: bool = False
    """Also split norms and dropout, along the sequence, over the tensor-parallel ranks."""
    distributed_optimizer: bool = True
    """Split float32 weights and moments over data-parallel ranks."""
    offload: Literal["auto", "always", "never"] = "auto"
    """Use the device's memory one after the other: the engine sleeps while the learner trains, and gradients and
    optimizer state leave the device while the engine generates. `auto`: on GPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the GPU where there is one."""
    timeout_seconds: Positive = 540
    """End the run when no rank has finished anything for so long. The default is below the 600 s after which PyTorch
    aborts collectives."""
    silence_seconds: Annotated[int, Field(ge=5)] = 60
    """End the run when one rank has given no sign of life for so long."""

    @model_validator(mode="after")
    def sequence_needs_tensor(self):
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence=true needs tensor >= 2; set parallel.sequence=false or raise parallel.tensor")
        return self


class ParquetColumns(Section):
    """Which columns of a parquet data set hold what."""

    image: str = "image"
    """Bytes, a struct of `bytes` and `path` as Hugging Face's data sets have, or a path below data.image_root."""
    reference: str = "reference"
    """The caption that others are compared with: a text, or a list of one."""
    prompt: str | None = None
    """The question; null: the one that JSON lines have by default."""
    id: str | None = None
    """What a record is called; null: its file and row."""
    units: str | None = None
    """A list of the facts in the reference, where they are known."""


class DataConfig(Section):
    """`scenes` draws its images from the seed; the others read `path` and find images under `image_root`."""

    source: Literal["scenes", "sharegpt4v", "jsonl", "parquet"] = "scenes"
    """Where records come from; `scenes` draws them."""
    path: str | None = None
    """Annotation file of sharegpt4v and jsonl; of parquet, a file or the folder of several."""
    columns: ParquetColumns = ParquetColumns()
    """Of source=parquet."""
    image_root: str | None = None
    """Folder that the annotations' image paths start from."""
    image_prefixes: tuple[str, ...] = ()
    """Keep only images whose path starts with one of these."""
    train_size: Positive = 4096
    """Records to train on."""
    eval_size: Positive = 256
    """Held-out records."""
    eval_among: Positive | None = None
    """Hold out the `eval_size` images of the lowest path hashes among the first so many of the file; null: the first
    `eval_size` themselves. Rows that are appended then move none. Give it where a file is sorted, as many images as it
    has now; in a file that has fewer, appended rows still move some."""
    image_backend: Literal["pil", "dali"] = "pil"
    """What decodes JPEGs."""
    max_pixels: Annotated[int, Field(ge=28 * 28)] | None = None
    """Shrink larger pictures to this as they are loaded."""
    pad_to_square: bool = False
    """Lay pictures on a square of mean colour, as LLaVA's own training did. Its published processor crops a quarter off
    every 4:3 picture, which judge and reference cover. Whoever serves the trained policy should pad as well."""
    max_missing_fraction: Annotated[Fraction, MAY_CHANGE] = 0.01
    """Stop when a larger share of images cannot be read."""
    too_long: Literal["refuse", "leave_out"] = "refuse"
    """What becomes of records whose prompt and picture leave no room for a caption in rollout.max_model_len. They are
    found before the first step; at most `max_missing_fraction` of a dataset may be left out."""

    @model_validator(mode="after")
    def files_need_a_path(self):
        if self.source != "scenes" and self.path is None:
            raise ValueError(f"source={self.source} reads a file; set data.path to the annotations")
        return self


class WarmupConfig(Section):
    """Supervised steps before RL. On `scenes` they teach a fluent captioner with realistic flaws."""

    steps: Annotated[int, Field(ge=0)] = 0
    """Supervised steps; 0: none."""
    batch_size: Positive = 64
    """Captions a step, over all ranks."""
    learning_rate: NonNegative = 1e-3
    """Peak, after a linear rise and before half a cosine to 0."""


class RolloutConfig(Section):
    """vLLM: prompts a step, captions a prompt, and how they are sampled."""

    prompts_per_step: Positive = 64
    """Images a step, over all ranks."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Captions sampled for each image (G)."""
    ahead: Annotated[int, Field(ge=0, le=1)] = 0
    """Steps that captions are sampled ahead. 1: those of the next step before this step's update, so that the judge has
    a whole step for them. They are one update old then, which algorithm.importance corrects. A run that is prolonged
    begins its new steps as a first step: with captions of its own."""
    max_tokens: Positive = 512
    """Longest caption."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of sampling and of the trainer's logprobs alike."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus to sample from. Below 1 the trainer still differentiates the whole distribution: that bias is not
    corrected, and neither ratio nor mismatch shows it; a run says so as it begins."""
    tensor_parallel: Annotated[Positive, MAY_CHANGE] = 1
    """Consecutive ranks that share one engine."""
    max_model_len: Positive = 4096
    """Longest image, prompt and caption together, in tokens."""
    memory_fraction: Annotated[float, Field(gt=0, lt=1), MAY_CHANGE] = 0.6
    """Share of a GPU's memory for the engine, weights and cache together. The learner's weights stay beside it."""
    fp8: bool = False
    """Quantise the engine's decoder; needs a GPU and algorithm.importance_cap."""
    verify_refit_every: Annotated[int, Field(ge=0), MAY_CHANGE] = 50
    """Compare checksums of all weights in every n-th refit; 0: never."""
    timeout_seconds: Annotated[Positive, MAY_CHANGE] = 600
    """Longest wait for a step's captions, and for another rank in a refit."""


class LengthGateConfig(Section):
    """Caption length over reference length, both in `unit`; the bounds are inclusive. τ_l and τ_u of BalCapRL."""

    lower: NonNegative = 0.5
    """τ_l: least length over reference length that passes."""
    upper: NonNegative = 2.0
    """τ_u: largest length over reference length that passes."""
    unit: Literal["words", "tokens"] = "words"
    """Words of any script: what stands between blanks, and where words have none between them, by their letters
    (`balcap_mega.algorithm.words`)."""
    components: tuple[str, ...] = ("linguistic",)
    """Rewards that length control acts on, the gate and the linear penalty alike."""

    @model_validator(mode="after")
    def ordered(self):
        if self.lower > self.upper:
            raise ValueError(
                f"lower={self.lower} is above upper={self.upper}, no caption would pass; "
                "give lower <= upper, such as 0.5 and 2.0"
            )
        return self


class AlgorithmConfig(Section):
    """Rewards to gradient. Weights go by name, never by position; a component that has none weighs 1."""

    weights: dict[str, NonNegative] = {
        "precision": 1.0,
        "recall": 1.0,
        "linguistic": 1.0,
    }
    """Of each reward in the sum of normalised rewards."""
    normalization: Literal["gdpo", "grpo"] = "gdpo"
    """gdpo: normalise each reward in its group, then sum. grpo: sum, then normalise."""
    length_control: Literal["gate", "linear", "none"] = "gate"
    """What becomes of the rewards `gate.components` of captions that are too long or too short."""
    gate: LengthGateConfig = LengthGateConfig()
    """The bounds of `length_control: gate`."""
    linear_penalty: NonNegative = 1.0
    """Slope of `length_control: linear`."""
    whiten: bool = True
    """Normalise advantages over the batch, by sequence."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """ε_low: ratios below 1 - ε_low are clipped."""
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    """ε_high: ratios above 1 + ε_high are clipped."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound of the ratio where the advantage is negative; null: none."""
    kl_weight: NonNegative = 0.0
    """Of the KL divergence (k3) from the policy that RL started with; 0: none, and no reference is kept."""
    importance: Literal["truncate", "token_band", "sequence_band"] = "truncate"
    """How the loss corrects for captions that come from another policy than the one that an update begins with: from
    the engine, and with rollout.ahead from weights one update older. By w, the probability of a token under the latter
    over that under the former. truncate: weight min(w, importance_cap). token_band (IcePop): weight w, and 0 outside
    importance_token_band. sequence_band: that of truncate, and 0 for all tokens of a caption whose geometric mean of w
    is outside importance_sequence_band."""
    importance_cap: Annotated[float, Field(gt=0)] | None = 2.0
    """Largest weight of truncate and sequence_band; null: all their weights are 1, which under truncate corrects
    nothing."""
    importance_token_band: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 5.0)
    """Least and largest w of a token that token_band trains on."""
    importance_sequence_band: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.9, 1.1)
    """Least and largest geometric mean of w of a caption that sequence_band trains on."""
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] = "token_mean"
    """How token losses become one loss."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Ratio of each token, or of the whole sequence."""
    entropy_weight: NonNegative = 0.0
    """Of the entropy bonus."""
    truncated: Literal["score", "mask"] = "score"
    """What a caption is worth that was cut at rollout.max_tokens. score: what the judge says of it. mask: it counts in
    its group's mean and deviation, but is left out of the loss."""
    fused: bool = True
    """Use the Triton kernels where they can run."""

    @property
    def corrects(self) -> bool:
        """Whether `importance` does anything."""
        return self.importance != "truncate" or self.importance_cap is not None

    @field_validator("importance_token_band", "importance_sequence_band")
    @classmethod
    def around_one(cls, band: tuple[float, float]) -> tuple[float, float]:
        if not band[0] < 1 < band[1]:
            raise ValueError(
                f"{list(band)} leaves out what both policies agree on; give a number below 1 and one above, such as "
                "[0.5, 5.0]"
            )
        return band

    @model_validator(mode="after")
    def some_weight(self):
        if not any(self.weights.values()):
            raise ValueError("every weight is 0; give at least one component a positive weight")
        return self


JudgeQuestion = Literal["split", "verify", "units", "cover", "language"]
QUESTIONS_OF = {"precision": ("split", "verify"), "recall": ("units", "cover"), "linguistic": ("language",)}


class DialectConfig(Section):
    """How an endpoint's server differs from the chat completions that OpenAI documents."""

    token_limit: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    """What the limit of a reply is called."""
    temperature: bool = True
    """Send temperature and top_p; some models take no other than their own."""
    seed: bool = True
    """Send a seed."""
    replies: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How JSON is asked for; none: by the prompt alone."""
    patterns: bool = True
    """Let a JSON schema hold regular expressions."""
    thinking_tokens: Annotated[int, Field(ge=0)] = 0
    """Added to the limit of every reply, for a judge that thinks before it answers."""
    extra_body: dict[str, JsonValue] = {}
    """Sent as it stands, such as {chat_template_kwargs: {enable_thinking: false}}; never a key."""

    @field_validator("extra_body")
    @classmethod
    def beside_the_question(cls, body: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if taken := sorted({"model", "messages", "response_format", "n", "stream"} & set(body)):
            raise ValueError(f"{', '.join(taken)} belong to the question; leave them out of extra_body")
        return body


class JudgeEndpoint(Section):
    """An OpenAI-compatible endpoint. The key is read from the environment variable `api_key_env`, never from here.

    What stands here is shown in logs and reports, so an address with credentials in it is refused.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: str | tuple[str, ...]
    """Address such as http://judge:8000/v1, or a list of them: each serves the same model, and an image's requests go
    to one of them."""
    model: str
    """Name that the endpoint serves the model under."""
    api_key_env: str | None = None
    """Environment variable that holds the key."""
    concurrency: Positive = 64
    """Most requests that an address gets at once from the whole job; fewer while it labours."""
    timeout_seconds: Positive = 120
    """Longest wait for one reply."""
    max_retries: Annotated[int, Field(ge=0)] = 4
    """Times that a failed request is sent again."""
    dialect: DialectConfig = DialectConfig()
    """How the server differs from what OpenAI documents."""

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


class ComponentConfig(Section):
    """Where one component of the reward comes from: what the judge finds, by its name, or a class of one's own, as
    `balcap_mega.rewards.own` says.
    """

    source: str
    """precision, recall or linguistic, as the judge gives them; or `package.module:Class`."""
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
        return self.source in JUDGED

    @model_validator(mode="after")
    def a_known_source(self):
        if not self.judged and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.source):
            raise ValueError(
                f"source={self.source} is nothing that a judge gives; name one of {', '.join(JUDGED)}, or a class of "
                "your own as package.module:Class"
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
    endpoint: Annotated[JudgeEndpoint | None, MAY_CHANGE] = None
    """The multimodal judge."""
    component_endpoints: Annotated[dict[Literal["precision", "recall", "linguistic"], JudgeEndpoint], MAY_CHANGE] = {}
    """Another endpoint for some rewards, by reward."""
    question_endpoints: Annotated[dict[JudgeQuestion, JudgeEndpoint], MAY_CHANGE] = {}
    """Another endpoint for some questions, by question."""
    cache_dir: Annotated[str | None, MAY_CHANGE] = None
    """Folder for reference units and judgements that are asked once."""
    max_missing_fraction: Annotated[Fraction, MAY_CHANGE] = 0.2
    """Stop a step before its update when a larger share of rewards is missing."""

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
    def asks_judge(self) -> bool:
        return any(component.judged for component in self.components.values())

    @model_validator(mode="after")
    def mllm_needs_endpoint(self):
        if self.judge == "mllm" and self.endpoint is None and self.asks_judge:
            raise ValueError("judge=mllm asks an endpoint; set rewards.endpoint.base_url and rewards.endpoint.model")
        return self


class PackingConfig(Section):
    """Microbatches of at most `row_tokens` tokens; each prompt's image and text once, unless told otherwise."""

    row_tokens: Positive = 16384
    """Most tokens in a microbatch."""
    shared_prefix: bool = True
    """Compute image and prompt once for all captions of a group."""


class OptimizerConfig(Section):
    learning_rate: NonNegative = 1e-6
    """After `warmup_steps`; constant."""
    weight_decay: NonNegative = 0.0
    """Of matrices; vectors are not decayed."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's ε."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients with a larger global norm are scaled down to it."""
    updates_per_step: Positive = 1
    """Minibatches that one step's rollouts are split into."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of the learning rate's linear rise."""


class UpdateCheck(Section):
    """What an update may not be past, and whether it is applied all the same (warn), left out (skip), or the last."""

    policy: Literal["stop", "skip", "warn"]
    """warn: apply the update all the same. skip: leave it out. stop: end the run before it."""
    bound: NonNegative
    """What the value may not exceed."""


class TrendCheck(Section):
    """What a metric may not be past in `steps` steps in a row, and whether the run then stops or only says so."""

    policy: Literal["stop", "warn"]
    """What happens after `steps` such steps."""
    bound: NonNegative
    """What the metric may not be past."""
    steps: Positive
    """Steps in a row."""


class HealthConfig(Section):
    """What is wrong with a run, and what then happens; `balcap_mega.training.guard.health` says what each is about."""

    non_finite: Literal["stop", "skip"] = "stop"
    """Loss, gradients or logprobs. skip: leave the update out, it moves neither weights nor optimizer."""
    mismatch: UpdateCheck = UpdateCheck(policy="stop", bound=0.2)
    """Nats by which trainer and engine differ in a token's logprob, on average."""
    skipped: TrendCheck = TrendCheck(policy="stop", bound=0.0, steps=10)
    """Share of a step's updates that were left out."""
    constant_reward: TrendCheck = TrendCheck(policy="warn", bound=1e-6, steps=20)
    """Standard deviation of a reward over the step's captions."""
    missing_reward: TrendCheck = TrendCheck(policy="warn", bound=0.1, steps=20)
    """Share of captions without a reward; one step past rewards.max_missing_fraction is the last."""
    truncated: TrendCheck = TrendCheck(policy="warn", bound=0.5, steps=20)
    """Share of captions that were cut at rollout.max_tokens."""
    low_entropy: TrendCheck = TrendCheck(policy="warn", bound=0.01, steps=20)
    """Nats a token."""
    short_captions: TrendCheck = TrendCheck(policy="warn", bound=0.1, steps=20)
    """Caption length over reference length."""
    long_captions: TrendCheck = TrendCheck(policy="warn", bound=5.0, steps=20)
    """Caption length over reference length."""

    @field_validator("*", mode="before")
    @classmethod
    def on_top_of_the_default(cls, value, field):
        """So that a file may give a check's policy alone."""
        default = cls.model_fields[field.field_name].default
        return {**default.model_dump(), **value} if isinstance(value, dict) and isinstance(default, Section) else value


class CheckpointConfig(Section):
    """Written while training goes on. After a signal the run ends within `grace_seconds`, as a rule with one more."""

    every: Positive = 50
    """Steps between two checkpoints."""
    keep: Positive = 2
    """Newest checkpoints that stay on disk."""
    timeout_seconds: Positive = 1800
    """Longest time that writing one may take."""
    grace_seconds: Positive = 300
    """Longest time from a signal to the end of the run, as a rule with one more checkpoint."""


class RecordConfig(Section):
    """What stays on disk of every step's captions and verdicts: one file a step in output_dir/rollouts."""

    keep: Literal["all", "extremes", "none"] = "all"
    """Captions of each image: all, the best and the worst one, or nothing. launch/replay.py needs all."""
    max_gib: Annotated[float, Field(gt=0)] = 10.0
    """Disk space for them; the oldest steps make room for new ones."""


class CaptionQaFiles(Section):
    """CaptionQA's questions (JSON, JSON Lines or Parquet), and a folder of pictures named by their id."""

    questions: str
    """JSON, JSON Lines or Parquet."""
    images: str
    """Folder of pictures named by their id."""
    max_tokens: Positive = 4
    """Of an answer; a judge that thinks first takes its endpoint's dialect.thinking_tokens."""


class DcScoreFiles(Section):
    """DeCapBench's annotations (JSON Lines, with `oracle_caption`), and the folder of its pictures."""

    annotations: str
    """JSON Lines, with `oracle_caption`."""
    images: str
    """Folder of the pictures."""


class BenchmarkConfig(Section):
    """Benchmarks of the policy every `eval_every` steps, judged beside the training, which they never end or delay."""

    captionqa: CaptionQaFiles | None = None
    """CaptionQA's files; null: not measured."""
    dcscore: DcScoreFiles | None = None
    """DCScore's files; null: not measured."""
    endpoint: JudgeEndpoint | None = None
    """The judge; null: that of `rewards`. One of its own takes no part of the rewards' rate."""
    prompt: str = "Describe this image in detail."
    """What the policy is asked for."""
    wait_seconds: Annotated[int, Field(ge=0, le=480)] = 300
    """Longest wait, after the last step, for what is still judged."""

    @property
    def wanted(self) -> bool:
        return self.captionqa is not None or self.dcscore is not None


class RunConfig(Section):
    """One training run. `balcap_mega.config.load.load_config` builds it from YAML and `key=value` overrides."""

    output_dir: Annotated[str, MAY_CHANGE]
    """Folder for all that the run leaves behind; the same command goes on from what is there."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of data order, sampling, drawn scenes and random weights."""
    steps: Annotated[int, Field(ge=0), MAY_CHANGE] = 1000
    """Steps of reinforcement learning."""
    eval_every: Annotated[int, Field(ge=0), MAY_CHANGE] = 0
    """Steps between two evaluations on held-out records; 0: before and after only."""
    accept_changed: Annotated[tuple[Literal["rows", "checkpoint"], ...], MAY_CHANGE] = ()
    """Inputs that may have other content now than when the run began: the rows to train on, what model.path holds."""
    model: ModelConfig
    """The policy."""
    parallel: Annotated[ParallelConfig, MAY_CHANGE] = ParallelConfig()
    """How the policy is laid out over ranks."""
    data: DataConfig = DataConfig()
    """Records and images."""
    warmup: WarmupConfig = WarmupConfig()
    """Supervised steps before RL."""
    rollout: RolloutConfig = RolloutConfig()
    """The vLLM engine and its sampling."""
    rewards: RewardConfig = RewardConfig()
    """Who judges."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """From rewards to gradients."""
    packing: Annotated[PackingConfig, MAY_CHANGE] = PackingConfig()
    """Microbatches."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    checkpoint: Annotated[CheckpointConfig, MAY_CHANGE] = CheckpointConfig()
    """What a run resumes from."""
    rollouts: Annotated[RecordConfig, MAY_CHANGE] = RecordConfig()
    """The steps' captions on record."""
    health: Annotated[HealthConfig, MAY_CHANGE] = HealthConfig()
    """What stops a run that has gone wrong."""
    benchmarks: Annotated[BenchmarkConfig, MAY_CHANGE] = BenchmarkConfig()
    """Benchmarks of the policy every `eval_every` steps."""

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
            if unknown := sorted(set(names) - set(self.rewards.components)):
                remedy = f"name some of {', '.join(map(repr, self.rewards.components))}"
                remedy += ", or set algorithm.length_control=none" if key == "gate.components" else ""
                raise ValueError(f"algorithm.{key}.{unknown[0]} names no component of rewards.components; {remedy}")
        if not any(self.algorithm.weights.get(name, 1.0) for name in self.rewards.components):
            raise ValueError("every component of rewards.components weighs 0; give one a positive algorithm.weights")
        return self

    @model_validator(mode="before")
    @classmethod
    def every_component_weighs(cls, tree: Any) -> Any:
        """Weights that are not given are 1 for each component."""
        try:
            names, algorithm = list(tree["rewards"]["components"]), tree.get("algorithm") or {}
            if "weights" in algorithm:
                return tree
            return tree | {"algorithm": algorithm | {"weights": dict.fromkeys(names, 1.0)}}
        except (KeyError, TypeError, AttributeError):  # nothing to weigh, or what the fields' own types will refuse
            return tree

    @model_validator(mode="after")
    def old_captions_are_corrected(self):
        if self.rollout.ahead and not self.algorithm.corrects:
            raise ValueError(
                "rollout.ahead=1 trains on captions of older weights; set algorithm.importance_cap, such as 2.0, or "
                "rollout.ahead=0"
            )
        return self

    @model_validator(mode="after")
    def fp8_rollouts_are_corrected(self):
        if self.rollout.fp8 and not self.algorithm.corrects:
            raise ValueError(
                "rollout.fp8=true samples from another policy than the one trained; set algorithm.importance_cap, "
                "such as 2.0, or rollout.fp8=false"
            )
        return self
