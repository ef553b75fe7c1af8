"""Fixtures shared by the tests: tiny checkpoints of both families, made once a session."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

CAPTIONS = [
    "A large red circle is to the left of a small blue square.",
    "There are two green triangles above a striped yellow star.",
    "The image shows three shapes on a white background.",
]


def pytest_collection_modifyitems(items):
    """What may take longest starts first, or at the end one of several workers is left alone with it."""
    limits = {item.path: [] for item in items}
    for item in items:
        limits[item.path].append(getattr(item.get_closest_marker("timeout"), "args", (0,))[0])
    items.sort(key=lambda item: -max(limits[item.path]))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """`tiny_checkpoint(family, **overrides)` -> folder of a random checkpoint (see `write_tiny_checkpoint`)."""
    from balcap_mega.models.tiny import write_tiny_checkpoint

    made = {}

    def make(family: str, **overrides):
        key = repr((family, sorted(overrides.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            made[key] = write_tiny_checkpoint(folder, family, CAPTIONS * 20, **overrides)
        return made[key]

    return make
