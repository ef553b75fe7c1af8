"""Measures of captions of `scenes` that are not the reward: by rules over the scene, with a reader of their own."""

from balcap_mega.evaluation.scenes.measures import SceneMeasures, measure

__all__ = ["SceneMeasures", "measure"]
