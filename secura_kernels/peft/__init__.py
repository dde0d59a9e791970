"""SECURA and CURLoRA as one PEFT method, ``PeftType.SECURA``.

Importing this module registers it; then ``get_peft_model(model, SecuraConfig(...))`` and everything
that PEFT, transformers and TRL do with an adapter work as for any other method.
"""

from peft.utils import PeftType, register_peft_method


def _add_peft_type(name: str) -> None:
    """PEFT finds methods by a member of the enumeration ``PeftType``; it has no call to add one."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)


if "SECURA" not in PeftType.__members__:
    _add_peft_type("SECURA")

from .by_token import AdaptersByToken  # noqa: E402
from .config import SecuraConfig  # noqa: E402  (the type must exist)
from .experts import SecuraExperts  # noqa: E402
from .layer import SecuraLinear  # noqa: E402
from .model import SecuraModel  # noqa: E402

register_peft_method(
    name="secura", config_cls=SecuraConfig, model_cls=SecuraModel, prefix="secura_"
)

from .conversion import from_peft  # noqa: E402
from .hotswap import hotswap_adapter  # noqa: E402
from .lora_export import save_as_lora  # noqa: E402

__all__ = [
    "AdaptersByToken",
    "SecuraConfig",
    "SecuraExperts",
    "SecuraLinear",
    "SecuraModel",
    "from_peft",
    "hotswap_adapter",
    "save_as_lora",
]
