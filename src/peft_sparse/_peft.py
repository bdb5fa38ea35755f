"""The joint with PEFT: the one file that touches its registry of methods.

PEFT's `register_peft_method` is public, but a method's type has to be a member of the `PeftType` enum first, and an
enum cannot be extended by its users. `_add_peft_type` adds the member by hand, with all that `enum` itself would have
set, so that `list(PeftType)`, `PeftType("PST")`, `in`, pickling and JSON treat it like a native one. Nothing else of
PEFT or transformers is changed.
"""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Make a method known to PEFT. Registering the same classes again does nothing.

    Args:
        name: lower case; its upper-cased form becomes the member of `PeftType` and `name + "_"` the parameter prefix,
            which transformers relies on when it loads or deletes an adapter.

    Raises:
        ImportError: if PEFT already has another method of this name or prefix.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(name.upper())
    if registered is not None:
        if _qualified_name(registered) == _qualified_name(config_cls):
            return
        raise ImportError(
            f"PEFT already has a method called {name.upper()} ({_qualified_name(registered)}), so peft_sparse cannot "
            f"register its own ({_qualified_name(config_cls)}); use that one without importing peft_sparse, or "
            "install a version of peft_sparse that knows about it."
        )
    owners = [str(owner) for owner, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if prefix == f"{name}_"]
    if owners:
        raise ImportError(
            f"The parameter prefix '{name}_' already belongs to PEFT's method {owners[0]}, so peft_sparse cannot "
            f"register {name.upper()}; install a version of peft_sparse that fits this version of peft."
        )
    _add_peft_type(name.upper())
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=f"{name}_")


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _add_peft_type(name: str) -> None:
    """Add a member to `PeftType`, unless it is there."""
    if name in PeftType.__members__:
        return
    enum: Any = PeftType  # the attributes below belong to the enum module
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(enum._member_names_)
    enum._member_names_.append(name)
    if hasattr(PeftType, "_add_member_"):  # Python 3.13 and later
        enum._add_member_(name, member)
    else:
        enum._member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    enum._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.13 and later: what `in` looks at
        enum._hashable_values_.append(name)
