"""The joint with PEFT: the one file that touches its registry of methods and its functions.

PEFT's `register_peft_method` is public, but a method's type has to be a member of the `PeftType` enum first, and an
enum cannot be extended by its users. `_add_peft_type` adds the member by hand, with all that `enum` itself would have
set, so that `list(PeftType)`, `PeftType("PST")`, `in`, pickling and JSON treat it like a native one.

Three functions of PEFT are wrapped, for our adapters alone. Two read a folder without asking the method whose it is:
`PeftModel.load_adapter` the weights of an adapter that is there already (so does Trainer, when it resumes and when it
takes the best model), and `PeftConfig.from_pretrained`, by which transformers' own `load_adapter` reads a config. A
bit that has flipped in such a folder would be another model, as would weights under another config, and a pickle would
be opened. The third, `PeftModel.from_pretrained`, takes a config of the caller's, and an adapter that is made for
weights which then do not fit has to go again. Nothing else of PEFT or transformers is changed.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from peft import PeftConfig, PeftModel, PeftType
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

_checked: list[Any] = []  # the configs whose folders are looked at before PEFT reads them


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Make a method known to PEFT. Registering the same classes again does nothing.

    Args:
        name: lower case; its upper-cased form becomes the member of `PeftType` and `name + "_"` the parameter prefix,
            which transformers relies on when it loads or deletes an adapter.
        config_cls: its `from_pretrained` raises ValueError if the weights in a folder are not those that were saved
            with the config in it, and so does a config's `check_saved(folder, subfolder, **kwargs)`, which also does
            if they compute something else under this config. A config's `awaiting(folder, subfolder, **kwargs)` is a
            context in which its adapter is made for those weights, so `awaits_weights` is true until they are read.
        model_cls: its `take_back(model, adapter_name)` removes an adapter whose weights do not fit.

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
    if not _checked:
        _check_before_weights_are_read()
        _check_where_a_config_is_read()
        _know_what_a_config_is_for()
    _checked.append(config_cls)


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


def _check_before_weights_are_read() -> None:
    load_adapter = PeftModel.load_adapter

    @functools.wraps(load_adapter)
    def checked(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config: Any = self.peft_config.get(adapter_name)
        if type(config) in _checked:  # of a new adapter PEFT asks the config itself
            try:
                config.check_saved(model_id, **kwargs)
            except ValueError:
                if config.awaits_weights:
                    self.base_model.take_back(self, adapter_name)
                raise
        return load_adapter(self, model_id, adapter_name, *args, **kwargs)

    wrapped: Any = PeftModel
    wrapped.load_adapter = checked


def _check_where_a_config_is_read() -> None:
    read: Any = PeftConfigMixin.from_pretrained.__func__

    @functools.wraps(read)
    def checked(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        config = read(cls, pretrained_model_name_or_path, *args, **kwargs)
        if type(config) in _checked and not issubclass(cls, type(config)):
            return type(config).from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return config

    wrapped: Any = PeftConfigMixin
    wrapped.from_pretrained = classmethod(checked)


def _know_what_a_config_is_for() -> None:
    load: Any = PeftModel.from_pretrained.__func__
    signature = inspect.signature(load)

    @functools.wraps(load)
    def loaded(cls: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(cls, *args, **kwargs).arguments
        config: Any = arguments.get("config")
        if type(config) not in _checked:
            return load(cls, *args, **kwargs)
        with config.awaiting(arguments["model_id"], **arguments.get("kwargs", {})):
            return load(cls, *args, **kwargs)

    wrapped: Any = PeftModel
    wrapped.from_pretrained = classmethod(loaded)
