"""config.json of the released checkpoints of all families, as it stands on the Hugging Face hub."""

from typing import Any

from balcap_mega.models.families import FAMILIES

RELEASED: dict[str, dict[str, Any]] = {
    name: config for family in FAMILIES.values() for name, config in family.released.items()
}
