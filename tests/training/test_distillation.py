"""Distillation: the loss of a hook is the formula's, from another model or from the one with its adapter off."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    BartForConditionalGeneration,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peft_sparse import DistillationCallback, PstConfig, SparsityCallback, SppConfig, distill, prune_magnitude
from peft_sparse.training import finetune, plan_finetune
from peft_sparse.training.distillation import divergence

from models import save_with_tokenizer, tiny_bart, tiny_bert, tiny_gpt2, tiny_llama
from recipes import classifier, language_model

IDS = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(0))


def moved(model):
    """Away from its start, where an adapter that starts at identity is its own teacher."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.train()


def pst(model, **options):
    torch.manual_seed(0)
    return moved(get_peft_model(model, PstConfig(sparsity=0.5, **options)))


def tiny_question_answering():
    torch.manual_seed(0)
    return BertForQuestionAnswering(tiny_bert().config).eval()


def pruned_spp(**options):
    torch.manual_seed(0)
    return moved(get_peft_model(prune_magnitude(tiny_llama(), sparsity=0.5), SppConfig(r=4, **options)))


def test_divergence_is_the_one_of_torch():
    """In float64, T^2 included; T = 1 and equal outputs have none."""
    generator = torch.Generator().manual_seed(2)
    logits, target = (torch.randn(5, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = 4 * F.kl_div((logits / 2).log_softmax(-1), (target / 2).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(divergence(logits, target, 2.0).mean(), expected)
    assert divergence(target, target).abs().max() < 1e-12
    assert divergence(logits.bfloat16(), target.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    "problem_type", [None, "single_label_classification", "multi_label_classification", "regression"]
)
def test_divergence_has_a_gradient_and_its_smallest_value_at_the_teacher(problem_type):
    generator = torch.Generator().manual_seed(3)
    logits, target = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda z: divergence(z, target, 1.5, problem_type), logits.requires_grad_())
    assert (divergence(logits, target, 1.5, problem_type) > 0).all()
    at_teacher = target.clone().requires_grad_()
    divergence(at_teacher, target, 1.5, problem_type).sum().backward()
    assert at_teacher.grad.abs().max() < 1e-12


def test_several_labels_are_choices_of_two():
    logits, target = torch.tensor([[0.3, -2.0]]), torch.tensor([[1.0, 0.5]])
    pairs = [F.kl_div(F.logsigmoid(torch.tensor([z, -z])), torch.sigmoid(torch.tensor([t, -t])), reduction="sum")
             for z, t in zip(logits[0].tolist(), target[0].tolist(), strict=True)]  # fmt: skip
    found = divergence(logits, target, problem_type="multi_label_classification")
    torch.testing.assert_close(found, torch.stack(pairs).mean()[None])


def test_question_answering_has_two_outputs():
    """Where an answer starts and where it ends, each a choice of a token; the mean of both."""
    dense, batch = tiny_question_answering(), {"input_ids": IDS}
    model = pst(copy.deepcopy(dense))
    places = {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 4, 5])}
    plain, target = model(**batch, **places), dense(**batch)
    away = divergence(plain.start_logits, target.start_logits) + divergence(plain.end_logits, target.end_logits)
    with distill(model, weight=0.3):
        torch.testing.assert_close(model(**batch, **places).loss, 0.7 * plain.loss + 0.15 * away.mean())
    with distill(model, tiny_bert()), pytest.raises(ValueError, match="got none for"):
        model(**batch, **places)


def test_the_teacher_of_pst_is_the_dense_model():
    """At every weight, for a classifier; the logits stay the student's."""
    dense = tiny_bert()
    batch = {"input_ids": IDS, "labels": torch.tensor([0, 1, 1])}
    model = pst(copy.deepcopy(dense), task_type="SEQ_CLS")
    plain = model(**batch)
    target = dense(input_ids=IDS).logits
    away = divergence(plain.logits, target, 2.0).mean()
    assert away > 1e-4
    for weight in (0.25, 1.0):
        with distill(model, weight=weight, temperature=2.0):
            found = model(**batch)
        torch.testing.assert_close(found.loss, (1 - weight) * plain.loss + weight * away)
        assert torch.equal(found.logits, plain.logits)
    assert torch.equal(model(**batch).loss, plain.loss)  # the hook is gone


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_tokens_that_are_learned_count(make):
    """A causal model's outputs are of the next token, so the label that counts is the next one."""
    teacher, model = make(seed=5), moved(get_peft_model(prune_magnitude(make(), sparsity=0.5), SppConfig(r=4)))
    labels = IDS.clone()
    labels[:, :3] = -100
    labels[1, 5:] = -100
    mask = torch.ones_like(IDS)
    batch = {"input_ids": IDS, "attention_mask": mask, "labels": labels}
    with distill(model, teacher, weight=1.0):
        found = model(**batch).loss
    logits, target = model(input_ids=IDS).logits, teacher(input_ids=IDS).logits
    rows = [divergence(logits[i, j - 1][None], target[i, j - 1][None])
            for i in range(3) for j in range(1, 7) if labels[i, j] != -100]  # fmt: skip
    torch.testing.assert_close(found, torch.cat(rows).mean())
    with distill(model, teacher, weight=1.0):
        torch.testing.assert_close(model(**batch, num_items_in_batch=40).loss, torch.cat(rows).sum() / 40)


def test_without_labels_all_tokens_but_padding_count():
    teacher, model = tiny_llama(seed=5), pruned_spp()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with distill(model, teacher, weight=1.0):
        found = model(input_ids=IDS, attention_mask=mask).loss
    inputs = {"input_ids": IDS, "attention_mask": mask}
    logits, target = model(**inputs).logits[mask == 1], teacher(**inputs).logits[mask == 1]
    torch.testing.assert_close(found, divergence(logits, target).mean())


def test_an_encoder_decoder():
    """Whose decoder's input is made of the labels."""
    config = tiny_bart().config
    torch.manual_seed(0)
    dense = BartForConditionalGeneration(config).eval()
    model = pst(copy.deepcopy(dense), task_type="SEQ_2_SEQ_LM")
    batch = {"input_ids": IDS, "labels": IDS[:, :4].clone()}
    target = dense(**batch).logits
    with distill(model, weight=1.0):
        found = model(**batch)
    torch.testing.assert_close(found.loss, divergence(found.logits.flatten(0, 1), target.flatten(0, 1)).mean())


def test_nothing_in_evaluation_and_no_trace_left():
    """What was frozen and what was in evaluation mode stay so; the teacher learns nothing."""
    model = pst(tiny_bert(), task_type="SEQ_CLS")
    batch = {"input_ids": IDS, "labels": torch.tensor([0, 1, 1])}
    frozen = [parameter for name, parameter in model.named_parameters() if "pst_A" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.base_model.model.bert.embeddings.eval()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    with distill(model, weight=1.0):
        model(**batch).loss.backward()
        assert flags == [parameter.requires_grad for parameter in model.parameters()]
        assert modes == [module.training for module in model.modules()]
        assert all(parameter.grad is None for parameter in frozen)
        assert any("pst_V" in name and parameter.grad.abs().max() > 0 for name, parameter in model.named_parameters())
        evaluated = model.eval()(**batch).loss
    assert torch.equal(evaluated, model(**batch).loss)


def test_a_batch_without_labels_is_refused():
    model = pst(tiny_bert(), task_type="SEQ_CLS")
    with distill(model), pytest.raises(ValueError, match="labels with each batch"):
        model(input_ids=IDS)
    assert model.training and not model.base_model.model.bert.encoder.layer[0].attention.self.query.disable_adapters


@pytest.mark.parametrize(
    ("values", "rule"),
    [({"weight": 0}, "above 0 and at most 1, got 0"), ({"weight": 1.5}, "got 1.5"), ({"temperature": 0.0}, "got 0.0")],
)
def test_numbers_out_of_range(values, rule):
    with pytest.raises(ValueError, match=rule):
        DistillationCallback(**values)
    with pytest.raises(ValueError, match=rule), distill(tiny_bert(), tiny_bert(), **values):
        pass


def test_a_teacher_that_is_not_loaded():
    with pytest.raises(TypeError, match=r"is a model, got '\./dense'; load it first"):
        DistillationCallback("./dense")


def test_models_that_are_no_teacher_of_their_own():
    """Without its adapter an SPP model is the pruned one, and one without adapters is the student."""
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear"))
    for model in (pruned_spp(), tiny_llama(), lora):
        with pytest.raises(ValueError, match="name a `teacher`"), distill(model):
            pass


def test_outputs_that_do_not_fit():
    model, teacher = pruned_spp(), tiny_llama()
    teacher.resize_token_embeddings(100)
    with distill(model, teacher), pytest.raises(ValueError, match="same tokenizer"):
        model(input_ids=IDS, labels=IDS)


def train(folder, callbacks, **options):
    model = get_peft_model(tiny_bert(), PstConfig(task_type="SEQ_CLS", sparsity=0.5))
    rows = [{"input_ids": row, "labels": label} for row, label in zip(IDS.repeat(4, 1), [0, 1, 1] * 4, strict=True)]
    arguments = TrainingArguments(
        folder, max_steps=4, report_to="none", save_strategy="no", seed=1, use_cpu=True, logging_steps=1,
        learning_rate=1e-2, per_device_train_batch_size=3, **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
    return trainer, model


def test_with_an_unchanged_trainer(tmp_path):
    """One that is interrupted leaves a hook, which the next training takes away."""
    dense = tiny_bert()
    callback = DistillationCallback(weight=1.0)
    trainer, model = train(tmp_path, [SparsityCallback(), callback])
    trainer.train()
    before = divergence(tiny_bert()(input_ids=IDS).logits, dense(input_ids=IDS).logits).mean()
    assert before == 0 and not model._forward_hooks
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 4 and all(0 <= loss < 0.2 for loss in losses)  # cross entropy of two is 0.69

    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    assert len(model._forward_hooks) == 1
    callback.on_train_end(trainer.args, trainer.state, trainer.control)
    assert not model._forward_hooks


class Interrupted(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("again", [[SparsityCallback], [DistillationCallback, SparsityCallback]])
def test_another_training_after_an_interrupted_one(again, tmp_path):
    """Trainer tells no callback that it was interrupted: the teacher stays until another training begins."""
    interrupted, model = train(tmp_path, [SparsityCallback(), DistillationCallback(), Interrupted()])
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert len(copy.deepcopy(model)._forward_hooks) == 1
    during = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            during.append(len(model._forward_hooks))

    with distill(model):  # in a loop of one's own, which is left alone
        callbacks = [*(callback() for callback in again), Look()]
        Trainer(model, interrupted.args, train_dataset=interrupted.train_dataset, callbacks=callbacks).train()
    assert during == [len(again)] * 4 and not model._forward_hooks


@pytest.mark.parametrize("of", [lambda dense, model: dense, lambda dense, model: model, lambda d, m: d.bert])
def test_a_teacher_that_is_the_student(of):
    """`get_peft_model(dense, ...)` puts the adapter into `dense`, which is no longer dense then."""
    dense = tiny_bert()
    model = pst(dense, task_type="SEQ_CLS")
    with (
        pytest.raises(ValueError, match=r"is the one that learns, .* Leave `teacher` out"),
        distill(model, of(dense, model)),
    ):
        pass
    assert dense.training and not model._forward_hooks


def test_a_teacher_that_reads_fewer_tokens():
    model, teacher = pst(tiny_bert(), task_type="SEQ_CLS"), tiny_bert()
    teacher.resize_token_embeddings(50)
    batch = {"input_ids": IDS, "labels": torch.tensor([0, 1, 1])}
    with distill(model, teacher), pytest.raises(ValueError, match=r"got token id \d+ for .* of 50, and 96 in the"):
        model(**batch)
    with distill(model, teacher):
        assert model(**batch | {"input_ids": IDS.clamp(max=49)}).loss.isfinite()


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = pst(tiny_bert(), task_type="SEQ_CLS")
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        with distill(model):
            model(input_ids=IDS, labels=torch.tensor([0, 1, 1])).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_a_recipe_whose_model_is_its_own_teacher(tmp_path, sentences):
    """The loss that is logged is the divergence alone, which starts at zero; labels would cost 0.69."""
    pytest.importorskip("evaluate")
    result = finetune(classifier(tmp_path, sentences, distillation={"weight": 1.0}))
    losses = [entry["loss"] for entry in result.log if "loss" in entry]
    assert len(losses) == 3 and all(0 <= loss < 0.2 for loss in losses)
    assert result.metrics["eval_loss"] > 0.5 and result.sparsity == pytest.approx(0.75, abs=1e-3)


def test_a_recipe_with_a_teacher(tmp_path, sentences):
    """The dense model that is pruned first teaches the pruned one."""
    dense = save_with_tokenizer(tiny_llama(), tmp_path / "llama")
    result = finetune(language_model(tmp_path, sentences, distillation={"teacher": dense, "weight": 1.0}))
    losses = [entry["loss"] for entry in result.log if "loss" in entry]
    assert 0 < losses[-1] < losses[0] < 1 < result.metrics["eval_loss"]
    assert result.zeros_lost is None and result.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("make", "part", "rule"),
    [
        (language_model, {}, "`distillation.teacher` names a dense model, got none with method spp"),
        (classifier, {"weight": 2}, "`distillation`: The teacher's `weight` is above 0 and at most 1, got 2"),
        (classifier, {"temperature": 0}, "`temperature` is above 0, got 0"),
        (classifier, {"techer": "x"}, "did you mean 'teacher'"),
    ],
)
def test_recipes_that_are_refused(make, part, rule, tmp_path, sentences):
    with pytest.raises(ValueError, match=rule):
        make(tmp_path, sentences, distillation=part)


def test_label_smoothing_is_another_loss(tmp_path, sentences):
    with pytest.raises(ValueError, match=r"`training.label_smoothing_factor`, got 0.1; leave it"):
        classifier(tmp_path, sentences, distillation={}, training={"label_smoothing_factor": 0.1})
    assert classifier(tmp_path, sentences, distillation={}, training={"label_smoothing_factor": 0.0})


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_a_loss_that_is_not_the_model_s_is_refused(weight, tmp_path):
    """With a weight of 1 nobody would see that the teacher is not learned from."""
    model = get_peft_model(tiny_llama(), PstConfig(sparsity=0.5))
    rows = [{"input_ids": row, "labels": row} for row in IDS]

    def train(compute_loss_func=None, **options):
        arguments = TrainingArguments(tmp_path, max_steps=1, report_to="none", use_cpu=True, **options)
        callbacks = [SparsityCallback(), DistillationCallback(tiny_llama(seed=3), weight=weight)]
        Trainer(model, arguments, train_dataset=rows, callbacks=callbacks, compute_loss_func=compute_loss_func).train()

    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1, which replaces it; leave it out"):
        train(label_smoothing_factor=0.1)
    rule = "got CausalLMOutputWithPast without; give labels" if weight < 1 else "leave out its `compute_loss_func`"
    with pytest.raises(ValueError, match=rule):
        train(lambda outputs, labels, num_items_in_batch=None: outputs.logits.square().mean())
    train()


def test_a_number_is_regressed_without_labels():
    """transformers notes the kind of problem in a forward with labels."""
    student, teacher = (tiny_bert() for _ in range(2))
    for model in (student, teacher):
        model.classifier, model.config.num_labels = torch.nn.Linear(32, 1), 1
    model = pst(student, task_type="SEQ_CLS")
    with distill(model, teacher, weight=1.0), torch.enable_grad():
        loss = model(input_ids=IDS).loss
    expected = (model(input_ids=IDS).logits - teacher(input_ids=IDS).logits).square().mean()
    assert model.config.problem_type is None and expected > 0
    torch.testing.assert_close(loss, expected)


def test_a_language_model_that_sees_images_learns_the_next_token():
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=tiny_llama().config, image_token_id=95)
    torch.manual_seed(0)
    student, teacher = LlavaForConditionalGeneration(config), LlavaForConditionalGeneration(config).eval()
    model = pst(student, target_modules=r".*language_model.*_proj")
    labels = IDS.clone()
    labels[:, :4] = -100
    with distill(model, teacher, weight=1.0):
        loss = model(input_ids=IDS, labels=labels).loss
        whole = model(input_ids=IDS, labels=labels, num_items_in_batch=18).loss
    rows = slice(3, 6)  # which predict tokens 4 to 6
    logits, target = (one(input_ids=IDS).logits[:, rows].flatten(0, 1) for one in (model, teacher))
    expected = divergence(logits, target)
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(whole, expected.sum() / 18)


def test_teachers_that_are_found_out_before_training(tmp_path, sentences):
    """A head that would be random, of the teacher or of a model that is its own, and other outputs."""
    pytest.importorskip("evaluate")
    bert = tiny_bert()
    bert.config.id2label, bert.config.label2id = {0: "low", 1: "high"}, {"low": 0, "high": 1}
    swapped = save_with_tokenizer(bert, tmp_path / "swapped")
    headless = save_with_tokenizer(tiny_bert().bert, tmp_path / "headless")
    config = tiny_bert().config
    config.num_labels = 3
    other = save_with_tokenizer(BertForSequenceClassification(config), tmp_path / "other")
    model = {"path": headless, "num_labels": 2}
    for parts, rule in (
        (
            {"distillation": {}, "model": model},
            "is one that was tuned for the task, got .*headless' without `classifier",
        ),
        ({"distillation": {"teacher": headless}}, "A teacher was tuned for the task, got .* without `classifier"),
        (
            {
                "distillation": {"teacher": swapped},
                "data": {"text": "text", "label": "name", "labels": ["high", "low"]},
            },
            r"in the same order, got \['low', 'high'\] in `distillation.teach.* and \['high', 'low'\] in the model",
        ),
        ({"distillation": {"teacher": other}}, "got num_labels 3 in `distillation.teacher` .* and 2 in the model"),
    ):
        recipe = classifier(tmp_path, sentences, **parts)
        for run in (plan_finetune, finetune):
            with pytest.raises(ValueError, match=rule):
                run(recipe)
        assert not recipe.output_dir.exists()
