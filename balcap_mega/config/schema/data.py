"""Records and images."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from balcap_mega.config.schema.base import MAY_CHANGE, Fraction, NonNegative, Positive, Section


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
    questions: str | None = None
    """A list of structs of `question`, `choices` and `answer`, for the reward utility."""


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
    threads: Annotated[int, Field(ge=0, le=256), MAY_CHANGE] = 4
    """Threads of each rank that read, decode and process the next pictures while devices work; 0: each picture when it
    is asked for."""
    ahead_gib: Annotated[NonNegative, MAY_CHANGE] = 8.0
    """Bound on a rank's host memory for pictures: half for those that wait to be used, half for decoded ones that may
    be asked for again."""
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
