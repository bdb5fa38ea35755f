"""What the models of both methods share: which modules are adapted, checked before the first one is touched.

PEFT injects adapters module by module, so an error in the middle would leave a model half wrapped, and a merge that
fails at one layer would leave the others merged. Both loops are therefore run dry first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from peft import TaskType
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from peft_sparse.linears import bits, check_float, dequantize_model, replace_module, reshard, several_places
from peft_sparse.storage import record_facts
from peft_sparse.tuners.adapter_state import (
    adapter_keys,
    cast_to_base_dtype,
    check_adapter_state,
    check_modules_to_save,
    check_trainable_tokens,
    labels_of,
    names_with_weights,
)
from peft_sparse.tuners.injecting import adding, check_adapter_name, configs_kept, take_back, warn_of_no_copy
from peft_sparse.tuners.merging import RoundingErrors, check_not_merged, keep_tied, warn_of_untrained
from peft_sparse.tuners.offloading import check_loads_whole, keep_adapters_loaded
from peft_sparse.tuners.sparse_config import SparseConfig, include_all_linear
from peft_sparse.tuners.sparse_layer import SparseLayer
from peft_sparse.tuners.targets import check_alone, check_linear, default_targets_of, targets_by_name

# What rooms above do with each merged model of transformers before its user gets it.
AFTER_MERGE: list[Callable[[PreTrainedModel], None]] = []


class SparseTuner(BaseTuner):
    """Base of `PstModel` and `SppModel`."""

    tuner_layer_cls: type[SparseLayer] = SparseLayer
    # What the method adapts, for messages.
    _linears = "torch.nn.Linear and transformers' Conv1D with floating point weights"
    # Default targets are found by structure, in `_prepare_model`, so there is no table of model types.
    target_module_mapping: dict[str, list[str]] = {}
    _just_loaded: dict[str, torch.Tensor]
    # Where modules are that the model has in several places, while layers are put around them or taken off again.
    _several_places: dict[nn.Module, list[tuple[nn.Module, str]]]

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        check_loads_whole(model, peft_config)
        with configs_kept(model):
            super().__init__(model, peft_config, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: SparseConfig, model_config: dict) -> SparseConfig:
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """See PEFT; a model to which an adapter cannot be added is as it was."""
        check_adapter_name(adapter_name, self.tuner_layer_cls)
        warn_of_no_copy(self, adapter_name)
        self._several_places = several_places(model)
        with adding(model, self.tuner_layer_cls, adapter_name):
            super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_model(self, peft_config: SparseConfig, model: nn.Module) -> None:
        peft_config.check_again()
        if not hasattr(self, "trainable_before"):  # PEFT freezes the base model with its first adapter
            # Names, since keeping the parameters would keep their memory when something replaces them.
            self.trainable_before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if peft_config.target_modules is None:
            peft_config.target_modules = default_targets_of(peft_config, model)  # type: ignore[assignment] # PEFT's habit
        include_all_linear(peft_config, model)
        targets = targets_by_name(model, lambda name: self._check_target_module_exists(peft_config, name))
        for name, module in targets.items():
            self._check_target(name, module)
        check_alone(targets, model)
        peft_config.names_found = names_with_weights(model, peft_config.modules_to_save)
        check_modules_to_save(peft_config, model, targets)
        check_trainable_tokens(peft_config.trainable_token_indices, model)
        self._check_targets(targets, peft_config)
        by_default = peft_config.labels in (None, peft_config.labels_found)
        if by_default and peft_config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
            peft_config.labels = peft_config.labels_found = labels_of(model)

    def _check_target(self, name: str, module: nn.Module) -> None:
        """Raises:
        ValueError: if the module cannot be adapted."""
        check_linear(name, module, type(self).__name__, self.tuner_layer_cls, self._linears)

    def _check_targets(self, targets: dict[str, nn.Module], peft_config: SparseConfig) -> None:
        """What a method wants of its targets, by full name; raises ValueError or warns."""

    def _create_and_replace(
        self,
        peft_config: SparseConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            target.mark_new(adapter_name)
            return
        self._check_target(current_key, target)  # again for targets that a state dict chose
        layer = self.tuner_layer_cls(target, current_key)
        layer.update_layer(adapter_name, peft_config)
        layer.mark_new(adapter_name)
        layer.set_adapter(self.active_adapters)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's also moves adapters to the device of `weight`, which a PackedLinear and a RoBERTa's classification
        # head have not, and which of an offloaded layer is no place to be. They are in place since `update_layer`.
        for holder, name in self._several_places.get(child, [(parent, child_name)]):
            setattr(holder, name, new_module)

    def keep_adapters_loaded(self) -> None:
        """Bring in adapter weights that accelerate has offloaded, for good: to train them after a whole model with
        adapters was dispatched. Base weights stay where they are. Make the optimizer afterwards."""
        for layer in self.sparse_layers():
            keep_adapters_loaded(layer)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # The last thing that PEFT does when it has loaded an adapter, after it dispatched an offloaded model anew.
        stored = self.__dict__.pop("_just_loaded", {})
        for name, layer in self.named_modules():
            if isinstance(layer, self.tuner_layer_cls):
                prefix = f"base_model.{name}."
                own = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
                keep_adapters_loaded(layer, own)
                if not autocast_adapter_dtype:
                    cast_to_base_dtype(layer, adapter_name)
        super()._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """What PEFT enters around each forward, with the forward's arguments; it drops `adapter_names` afterwards."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "A forward has the active adapters for its whole batch, since each makes a weight of its own, got "
                f"adapter_names={kwargs['adapter_names']!r}; call `set_adapter(name)` and give it the rows of one "
                "adapter at a time."
            )
        return nullcontext()

    # Merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_all_merges(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        reshard(self.model)
        super().unmerge_adapter()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_all_merges(adapter_names)
        self._several_places = several_places(self.model)
        tied = getattr(getattr(self.model, "config", None), "tie_word_embeddings", False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")  # see below
            unloaded = super()._unload_and_optionally_merge(
                merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
        if merge and tied:
            keep_tied(unloaded)
        if merge and isinstance(unloaded, PreTrainedModel):
            method = self.prefix.removesuffix("_")
            # transformers puts these into the model card when it pushes
            unloaded.add_model_tags(["sparse", "pruned", method])
            record_facts(unloaded, method=method)
            for action in AFTER_MERGE:
                action(unloaded)
        return unloaded

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize_to: torch.dtype | None = None,
    ) -> nn.Module:
        """Merge adapters into the base model and return that, see PEFT. Exactly the zeros that the forward used stay.

        Args:
            progressbar, safe_merge, adapter_names: as in PEFT.
            dequantize_to: for a base model that bitsandbytes has quantised. None: merged weights are quantised again,
                as PEFT does, and a warning states the error. torch.bfloat16, torch.float16 or torch.float32: the whole
                model becomes a dense one of this dtype, with nothing quantised left.

        Raises:
            ValueError, RuntimeError: see [`SparseLayer.merged_weight`]; and for `dequantize_to` on a model that is not
                quantised. The model is as it was then.
        """
        if dequantize_to is None:
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)
        check_float(dequantize_to)
        if not any(bits(module) is not None for module in self.model.modules()):
            raise ValueError(
                "`dequantize_to` is for a model that bitsandbytes has quantised, got one without such layers; leave "
                "it out, and cast the merged model with `.to(dtype)`."
            )
        self._check_all_merges(adapter_names, dequantize_to)
        for layer in self.sparse_layers():
            if bits(layer.base_layer) is not None:
                replace_module(self.model, layer, layer.dequantized(dequantize_to, adapter_names))
        merged = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        return dequantize_model(merged, dequantize_to)

    def _check_all_merges(self, adapter_names: list[str] | None, dtype: torch.dtype | None = None) -> None:
        """Every layer's merge without writing, so that an error leaves the whole model as it was.

        Args:
            dtype: of what quantised layers become; None: they are quantised again.

        Raises:
            ValueError, RuntimeError: see [`SparseLayer.merged_weight`]; or for an adapter that the model has not.
        """
        unknown = [name for name in adapter_names or () if name not in self.peft_config]
        if unknown:
            raise ValueError(
                f"`adapter_names` is a list of the model's adapters, got {adapter_names!r}; it has "
                f"{', '.join(map(repr, self.peft_config))}. Nothing was merged."
            )
        reshard(self.model)
        layers = self.sparse_layers()
        errors, untrained = RoundingErrors(), list[str]()
        for layer in layers:
            names = layer.active_adapters if adapter_names is None else adapter_names
            names = [name for name in names if name not in layer.merged_adapters]
            with layer.weights_loaded():
                merged = layer.merged_weight(names)
                errors.add(layer.module_name, merged, layer.requantized(merged, dtype))
                if any(layer.prunes_untrained(name) for name in layer.present_adapters(names)):
                    untrained.append(layer.module_name)
        errors.warn(dtype)
        if len(untrained) < len(layers):
            warn_of_untrained(untrained)

    def sparse_layers(self) -> list[SparseLayer]:
        """The tuner layers of this method in the model."""
        return [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]

    def add_weighted_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """Refused, where PEFT has no message for it. Raises TypeError."""
        raise TypeError(
            f"Adapters of {type(self).__name__} have no weighted sum, since they multiply or mask the weight; compose "
            "them with `model.base_model.set_adapter([...])`, and merge what is active."
        )

    # Loading

    def take_back(self, model: nn.Module, adapter_name: str) -> None:
        """Remove an adapter whose weights do not fit, see [`injecting.take_back`]."""
        take_back(model, self, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SparseConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """PEFT's remapping, with all tensors checked before the first one is loaded."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        current, tuner = model.state_dict(), getattr(model, "base_model", None)
        try:
            for layer in model.modules():
                if isinstance(layer, cls.tuner_layer_cls):
                    check_not_merged(layer, adapter_name, "Weights are loaded into")
            check_adapter_state(remapped, current, adapter_keys(model, cls.tuner_layer_cls, adapter_name), cls.prefix)
            cls._check_loaded(model, adapter_name, remapped)
        except ValueError:
            if isinstance(tuner, SparseTuner) and config.awaits_weights:
                tuner.take_back(model, adapter_name)
            raise
        config.awaits_weights = False
        if isinstance(tuner, SparseTuner) and any(tensor.is_meta for tensor in current.values()):
            tuner._just_loaded = remapped  # see `_cast_adapter_dtype`
        return remapped

    @classmethod
    def _check_loaded(cls, model: nn.Module, adapter_name: str, loaded: dict[str, torch.Tensor]) -> None:
        """What a method wants of the tensors that are about to be loaded, by their key in the model; raises
        ValueError."""
