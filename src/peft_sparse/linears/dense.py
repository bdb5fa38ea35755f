"""What pruning and sparse training leave dense: weights inside the blocks that belong to no linear, such as those of
all experts in one parameter, which may be most of the model."""

from __future__ import annotations

import warnings

from torch import nn

from peft_sparse.linears.blocks import find_block_lists


def warn_of_dense_parameters(model: nn.Module, stacklevel: int = 4) -> None:
    """Warn of the parameters that stay dense where the linears of a model's blocks are made sparse, if there are any.

    Args:
        stacklevel: of the warning, counted from here.
    """
    dense = {
        f"{block_list.name}.{index}.{path}.{last}".replace("..", "."): parameter
        for block_list in find_block_lists(model)
        for index, block in block_list.blocks.named_children()
        for path, module in block.named_modules()
        for last, parameter in module.named_parameters(recurse=False)
        if _is_fused_weight(module, parameter)
    }
    if not dense:
        return
    (name, first), numel = next(iter(dense.items())), sum(parameter.numel() for parameter in dense.values())
    share = numel / max(sum(parameter.numel() for parameter in model.parameters()), 1)
    warnings.warn(
        f"Only linears are pruned, so {len(dense)} parameters that hold weights of several experts, heads or "
        f"projections at once stay dense, {share:.0%} of the model, such as `{name}` "
        f"({' x '.join(map(str, first.shape))}); the linears around them are pruned.",
        stacklevel=stacklevel,
    )


def _is_fused_weight(module: nn.Module, parameter: nn.Parameter) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return parameter.dim() == 2
    is_one = parameter.dim() == 3 and min(parameter.shape) > 1 and parameter.is_floating_point()
    return is_one and not isinstance(module, nn.modules.conv._ConvNd)
