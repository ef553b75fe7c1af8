"""The model families that can be trained, by the `model_type` of their config.json."""

from balcap_mega.models.families.interface import Family
from balcap_mega.models.families.llava import Llava
from balcap_mega.models.families.qwen2_5_vl import Qwen2_5_VL
from balcap_mega.models.families.qwen3_vl import Qwen3_VL

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Qwen2_5_VL(),
        Qwen3_VL(),
        Llava(),
    )
}
