"""`scenes`: an endless captioning dataset with its ground truth, for machines without data or accelerators."""

from balcap_mega.data.scenes.dataset import SceneRecord, ScenesDataset
from balcap_mega.data.scenes.flawed import flawed_caption, vocabulary
from balcap_mega.data.scenes.grammar import PROMPT
from balcap_mega.data.scenes.habits import habitual_caption

__all__ = ["PROMPT", "SceneRecord", "ScenesDataset", "flawed_caption", "habitual_caption", "vocabulary"]
