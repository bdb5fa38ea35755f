"""SPP's model: places [`SppLinear`] layers, and tells whether the base model has zeros to keep."""

from __future__ import annotations

import math
import os
import warnings

from torch import nn

from peft_sparse.linears import in_out_features, num_zeros, unwrap, weight_parameter
from peft_sparse.tuners.sparse_config import SparseConfig
from peft_sparse.tuners.sparse_model import SparseTuner
from peft_sparse.tuners.spp.layer import SppLinear

# A pruned weight has far more zeros; a dense one has a few by chance, most in half precision.
DENSE_BELOW = 0.01


class SppModel(SparseTuner):
    """Tunes an already pruned model so that its zeros survive training and merging (arXiv 2405.16057).

    Made by `get_peft_model(model, SppConfig())`. Warns if target layers are dense: their weights would only be
    rescaled.
    """

    prefix: str = "spp_"
    tuner_layer_cls = SppLinear

    def _check_targets(self, targets: dict[str, nn.Module], peft_config: SparseConfig) -> None:
        linears = {name: unwrap(module) for name, module in targets.items()}
        dense = [
            name
            for name, linear in linears.items()
            if not weight_parameter(linear).is_meta
            and num_zeros(linear) < DENSE_BELOW * math.prod(in_out_features(linear))
        ]
        if dense and int(os.environ.get("RANK", 0)) == 0:  # the others may not have loaded the weights yet
            warnings.warn(
                f"SPP tunes a model that is already pruned and keeps its zeros, but {len(dense)} of {len(targets)} "
                f"target layers have fewer than {DENSE_BELOW:.0%} zeros (the first is `{dense[0]}`). They would be "
                "rescaled and stay dense; prune the model first, for example with `peft_sparse.prune_wanda`.",
                stacklevel=2,
            )
