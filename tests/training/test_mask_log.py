"""Numbers about masks in the log: against masks compared one by one."""

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model

from peft_sparse import PstConfig, SppConfig, pack_model, prune_magnitude, sparsity_report
from peft_sparse.training.mask_log import MaskLog, counted_sparsity, score_statistics
from peft_sparse.tuners.pst import PstLinear

from models import tiny_bert, tiny_llama


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, PstLinear)]


def masks_of(model):
    return torch.cat([layer.get_mask("default").flatten() for layer in layers_of(model)])


@pytest.mark.parametrize("settings", [{"sparsity": 0.75}, {"pattern": "2:4"}, {"importance": "movement"}])
def test_churn_is_the_share_of_weights_that_changed_state(settings):
    model = get_peft_model(tiny_bert(), PstConfig(**settings))
    log, before = MaskLog(model), masks_of(model)
    for step in (3, 5, 10):
        model.base_model.set_sparsity_step(step, 10)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "pst_" in name:
                parameter.data += 0.05 * torch.randn(parameter.shape)
        numbers, now = log.measure(model), masks_of(model)
        assert numbers["mask_churn"] == pytest.approx(float((before != now).double().mean()))
        assert numbers["sparsity"] == pytest.approx(float((~now).double().mean()))
        assert numbers["sparsity"] == pytest.approx(counted_sparsity(model)["sparsity"])
        before = now
    assert log.measure(model)["mask_churn"] == 0


def test_score_statistics_are_those_of_all_scores_together():
    model = get_peft_model(tiny_bert(), PstConfig(sparsity=0.75))
    assert "score_pruned_mean" not in score_statistics(model)  # nothing is pruned yet
    model.base_model.set_sparsity_step(10, 10)
    scores = torch.cat([layer.get_scores("default").flatten() for layer in layers_of(model)]).double()
    mask, found = masks_of(model), score_statistics(model)
    assert found["score_mean"] == pytest.approx(float(scores.mean()), rel=1e-5)
    assert found["score_std"] == pytest.approx(float(scores.std(correction=0)), rel=1e-5)
    assert found["score_kept_mean"] == pytest.approx(float(scores[mask].mean()), rel=1e-5)
    assert found["score_pruned_mean"] == pytest.approx(float(scores[~mask].mean()), rel=1e-5)


def test_scores_are_what_the_mask_is_selected_from():
    model = get_peft_model(tiny_bert(), PstConfig(sparsity=0.5, init_weights=False))
    model.base_model.set_sparsity_step(10, 10)
    for layer in layers_of(model):
        scores, mask = layer.get_scores("default"), layer.get_mask("default")
        assert scores[mask].min() >= scores[~mask].max()


def test_spp_has_sparsity_and_no_churn():
    model = get_peft_model(prune_magnitude(tiny_llama(), "2:4"), SppConfig(r=4))
    log = MaskLog(model)
    for name, parameter in model.named_parameters():
        if "spp_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    assert log.measure(model) == {"sparsity": 0.5, "mask_churn": 0.0}


def test_a_packed_layer_without_a_value_is_counted():
    """Its parameter is empty, as one that ZeRO-3 has put away, but all of it is here."""
    base = prune_magnitude(tiny_llama(), sparsity=0.5)
    base.model.layers[0].mlp.up_proj.weight.data.zero_()
    model = get_peft_model(pack_model(base), SppConfig())
    share = sparsity_report(model).total_sparsity
    assert share > 0.5 and MaskLog(model).measure(model)["sparsity"] == pytest.approx(share)


@pytest.mark.parametrize("config", [PstConfig(sparsity=0.75, schedule="constant"), SppConfig()], ids=["pst", "spp"])
def test_numbers_of_a_model_whose_weights_accelerate_keeps_elsewhere(config):
    found = []
    for offloaded in (False, True):
        base = prune_magnitude(tiny_llama())
        torch.manual_seed(0)
        model = get_peft_model(cpu_offload(base, execution_device="cpu") if offloaded else base, config)
        found.append(MaskLog(model).measure(model))
    assert found[0]["sparsity"] in (0.5, 0.75) and found[1] == found[0]


@pytest.mark.parametrize("last", ["a", "b"])
def test_of_several_adapters_in_a_layer_the_zeros_are_those_of_the_last(last):
    """It is given what the one before has made of the base weight, and its mask is what the forward has."""
    shares = {"a": 0.75, "b": 0.5}
    model = get_peft_model(tiny_llama(), PstConfig(sparsity=shares["a"], init_weights=False), adapter_name="a")
    model.add_adapter("b", PstConfig(sparsity=shares["b"], init_weights=False))
    order = ["b", "a"] if last == "a" else ["a", "b"]
    model.base_model.set_adapter(order)
    log = MaskLog(model)
    model.base_model.set_sparsity_step(10, 10)
    numbers, masks, scores, kept = log.measure(model), [], [], []
    for layer in layers_of(model):
        given = layer.effective_weight(order[0])
        masks.append((layer.effective_weight(last, given) != 0).flatten())
        for name, weight in zip(order, (None, given), strict=True):
            scores.append(layer.get_scores(name, weight).flatten())
            kept.append(layer.get_mask(name, weight).flatten())
    share = sparsity_report(model).total_sparsity
    assert share == pytest.approx(shares[last]) and numbers["sparsity"] == share
    assert numbers["mask_churn"] == pytest.approx(float((~torch.cat(masks)).double().mean()))  # all were kept before
    assert counted_sparsity(model)["sparsity"] == share
    kept_mean = torch.cat(scores)[torch.cat(kept)].double().mean()
    assert numbers["score_kept_mean"] == pytest.approx(float(kept_mean), rel=1e-5)
