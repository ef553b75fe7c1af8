"""`scenes`: an endless captioning dataset with its ground truth, for machines without data or accelerators."""

from balcap_mega.data.scenes.dataset import PROMPT, SceneRecord, ScenesDataset
from balcap_mega.data.scenes.flawed import flawed_caption, vocabulary

__all__ = ["PROMPT", "SceneRecord", "ScenesDataset", "flawed_caption", "vocabulary"]
