"""Bad input, as a matrix: what there is, what somebody does with it, and the error, with rule, value met and way out.

Whatever it is, everything is as it was afterwards: every weight, every module, every byte of every file.
"""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.prune import l1_unstructured
from transformers import LlamaForCausalLM, TrainerState

from peft_sparse import (
    PstConfig,
    SparsityCallback,
    SppConfig,
    calibration_batches,
    load_sparse,
    owl_sparsity,
    pack_model,
    perplexity,
    prune_magnitude,
    prune_ria,
    prune_sparsegpt,
    prune_wanda,
    pst_param_groups,
    save_sparse,
    sparsity_report,
    uniform_sparsity,
    unpack_model,
    verify_sparsity,
    write_model_card,
)
from peft_sparse.checkpoint import load_model
from peft_sparse.sparsity import NM, Unstructured

from models import VOCAB_SIZE, tiny_bert, tiny_gpt2, tiny_llama

IDS = {"input_ids": torch.arange(3, 11)[None]}
NOT_READ = "quantised in a way that is not read here .the first is `.*proj`, Parameter., so do this before"
PROJECTION = "base_model.model.model.layers.1.mlp.down_proj"


# What there is


@dataclass
class World:
    """A model, a folder, or both, and what they were like."""

    model: Any = None
    folder: Path | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Everything that could be changed by mistake."""
        found: dict[str, Any] = {}
        if isinstance(self.model, nn.Module):
            for name, module in self.model.named_modules():
                ids = [id(parameter) for parameter in module.parameters(recurse=False)]
                found[f"module {name}"] = (type(module), module.training, ids)
            for name, parameter in self.model.named_parameters():
                found[f"trained {name}"] = parameter.requires_grad
            for name, tensor in self.model.state_dict().items():
                if not tensor.is_meta:
                    found[f"tensor {name}"] = bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
            found["config"] = str(getattr(self.model, "config", None))
            found["adapters"] = list(getattr(self.model, "peft_config", {}))
        if self.folder is not None:
            for path in sorted(self.folder.parent.rglob("*")):
                found[f"file {path}"] = path.read_bytes() if path.is_file() else None
        return found


def nothing(place: Path) -> World:
    return World()


def llama(place: Path) -> World:
    return World(tiny_llama())


def gpt2(place: Path) -> World:
    return World(tiny_gpt2())


def bert(place: Path) -> World:
    return World(tiny_bert())


def pruned(place: Path) -> World:
    return World(prune_magnitude(tiny_llama()))


def mlp(place: Path) -> World:
    return World(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))


def odd(place: Path) -> World:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(2))
    return World(model)


def tied(place: Path) -> World:
    """The head has the weight of the embeddings."""
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    return World(model)


def shared_block(place: Path) -> World:
    """As in Zamba2: the second block is another module with the parameters of the first."""
    model = tiny_llama()
    for name, parameter in model.model.layers[0].named_parameters():
        path, _, last = name.rpartition(".")
        setattr(model.model.layers[1].get_submodule(path), last, parameter)
    return World(model)


def attention(place: Path) -> World:
    return World(nn.MultiheadAttention(8, 2))


def meta(place: Path) -> World:
    with torch.device("meta"):
        return World(nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))}))


def infinite(place: Path) -> World:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("inf")
    return World(model)


def masked(place: Path) -> World:
    model = tiny_llama()
    l1_unstructured(model.model.layers[1].mlp.down_proj, "weight", 0.5)
    return World(model)


def parametrized(place: Path) -> World:
    model = tiny_llama()
    weight_norm(model.model.layers[1].mlp.down_proj)
    return World(model)


def foreign(place: Path) -> World:
    """Quantised in a way that is not read, as torchao does it: with float8, which leaves nothing to install."""
    model = tiny_llama()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return World(model)


def packed(place: Path) -> World:
    return World(pack_model(prune_magnitude(tiny_llama(), sparsity=0.8)))


def lora(place: Path) -> World:
    return World(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])))


def pst(place: Path) -> World:
    return World(get_peft_model(tiny_llama(), PstConfig(schedule="constant", sparsity=0.5)))


def spp(place: Path) -> World:
    return World(get_peft_model(prune_magnitude(tiny_llama()), SppConfig()))


def broken_pst(place: Path) -> World:
    world = pst(place)
    world.model.get_submodule(PROJECTION).pst_V["default"].data[0, 0] = float("nan")
    return world


def broken_spp(place: Path) -> World:
    world = spp(place)
    world.model.get_submodule(PROJECTION).spp_B["default"].data[:] = float("inf")
    return world


def saved_pst(place: Path) -> World:
    """An adapter in a folder, and a base model to load it onto."""
    pst(place).model.save_pretrained(place / "adapter")
    return World(tiny_llama(), place / "adapter")


def saved_spp(place: Path) -> World:
    spp(place).model.save_pretrained(place / "adapter")
    return World(prune_magnitude(tiny_llama()), place / "adapter")


def live_pst(place: Path) -> World:
    """An adapter in a folder, and a model that has it, as when a training is resumed."""
    world = pst(place)
    world.model.save_pretrained(place / "adapter")
    return World(world.model, place / "adapter")


def saved_sparse(place: Path) -> World:
    save_sparse(prune_magnitude(tiny_llama(), sparsity=0.8), place / "sparse")
    return World(folder=place / "sparse")


def saved_dense(place: Path) -> World:
    tiny_llama().save_pretrained(place / "dense")
    return World(tiny_llama(), place / "dense")


# What somebody does


def config(cls: type, **settings: Any) -> Callable[[World], Any]:
    return lambda world: cls(**settings)


def adapt(adapter_config: Callable[[], Any], **more: Any) -> Callable[[World], Any]:
    return lambda world: get_peft_model(world.model, adapter_config(), **more)


def call(function: Callable, *args: Any, **kwargs: Any) -> Callable[[World], Any]:
    return lambda world: function(world.model, *args, **kwargs)


def method(path: str, *args: Any, **kwargs: Any) -> Callable[[World], Any]:
    """Call something of the model."""

    def act(world: World) -> Any:
        found = world.model
        for part in path.split("."):
            found = getattr(found, part)
        return found(*args, **kwargs)

    return act


def read_adapter(world: World) -> Any:
    return PeftModel.from_pretrained(world.model, world.folder)


def read_beside(world: World) -> Any:
    return get_peft_model(world.model, PstConfig()).load_adapter(world.folder, "other")


def reread_adapter(world: World) -> Any:
    return world.model.load_adapter(world.folder, "default")


def read_sparse(**settings: Any) -> Callable[[World], Any]:
    return lambda world: load_sparse(world.folder, **settings)


def folder_to(function: Callable, *args: Any, **kwargs: Any) -> Callable[[World], Any]:
    return lambda world: function(world.folder, *args, **kwargs)


def model_and_folder(function: Callable) -> Callable[[World], Any]:
    return lambda world: function(world.model, world.folder)


# How files are broken


def remove(name: str) -> Callable[[World], None]:
    return lambda world: (world.folder / name).unlink()


def content(name: str, value: bytes) -> Callable[[World], None]:
    return lambda world: (world.folder / name).write_bytes(value)


def cut(name: str, share: float) -> Callable[[World], None]:
    def act(world: World) -> None:
        whole = (world.folder / name).read_bytes()
        (world.folder / name).write_bytes(whole[: int(share * len(whole))])

    return act


def flip(name: str, place: int) -> Callable[[World], None]:
    def act(world: World) -> None:
        whole = bytearray((world.folder / name).read_bytes())
        whole[place] ^= 1
        (world.folder / name).write_bytes(whole)

    return act


def settings(name: str, keep_checksums: bool = False, **changes: Any) -> Callable[[World], None]:
    """Change entries of a JSON file, as somebody who edits it would."""

    def act(world: World) -> None:
        found = json.loads((world.folder / name).read_text()) | changes
        if not keep_checksums:
            found.pop("checksums", None)
        (world.folder / name).write_text(json.dumps(found))

    return act


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[World], None]:
    """Change the tensors of an adapter, and take the checksums out, as the message says."""

    def act(world: World) -> None:
        found = load_file(world.folder / "adapter_model.safetensors")
        change(found)
        save_file(found, world.folder / "adapter_model.safetensors")
        settings("adapter_config.json")(world)

    return act


def of(kind: str, found: dict[str, torch.Tensor]) -> str:
    return f"{PROJECTION}.{kind}"


class Bomb:
    """Whoever unpickles it knows."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was opened",))


def only_pickled(world: World) -> None:
    state = load_file(world.folder / "adapter_model.safetensors")
    (world.folder / "adapter_model.safetensors").unlink()
    (world.folder / "adapter_model.bin").write_bytes(pickle.dumps([Bomb(), state]))


def pickled_model(world: World) -> None:
    for path in world.folder.glob("*.safetensors"):
        path.unlink()
    (world.folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (world.folder / "training_args.bin").write_bytes(pickle.dumps(Bomb()))


def another_save(world: World) -> None:
    """The weights of one adapter beside the config of another."""
    torch.manual_seed(5)
    place = world.folder.parent / "second"
    get_peft_model(tiny_llama(), PstConfig(schedule="constant", sparsity=0.5)).save_pretrained(place)
    shutil.copy(place / "adapter_model.safetensors", world.folder)


def wide(world: World) -> None:
    """The adapter of a model whose last linear is wider."""
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj = nn.Linear(48, 40, bias=False)
    get_peft_model(model, PstConfig()).save_pretrained(world.folder)


def deep(world: World) -> None:
    """The adapter of a model with more blocks."""
    llama = tiny_llama()
    more = LlamaForCausalLM(type(llama.config)(**{**llama.config.to_dict(), "num_hidden_layers": 3}))
    get_peft_model(more, PstConfig()).save_pretrained(world.folder)


def to_ids(**changes: Any) -> list[dict[str, Any]]:
    return [{**IDS, **changes}]


@dataclass(frozen=True)
class Case:
    given: Callable[[Path], World]
    when: Callable[[World], Any]
    words: str
    error: type[Exception] = ValueError
    broken: tuple[Callable[[World], None], ...] = ()


def damaged(given: Callable[[Path], World], *broken: Callable, then: Callable, words: str, error=ValueError) -> Case:
    return Case(given, then, words, error, broken)


NAN, INF = float("nan"), float("inf")
ADAPTER, CONFIG, SPARSE = "adapter_model.safetensors", "adapter_config.json", "sparse_model.safetensors"

CONFIGS = {
    "sparsity 1": Case(nothing, config(PstConfig, sparsity=1.0), r"lies in \[0, 1\), got 1.0"),
    "sparsity in percent": Case(nothing, config(PstConfig, sparsity=90), r"lies in \[0, 1\), got 90; 0.9 means"),
    "sparsity below 0": Case(nothing, config(PstConfig, sparsity=-0.1), r"lies in \[0, 1\), got -0.1"),
    "sparsity text": Case(nothing, config(PstConfig, sparsity="0.9"), r"lies in \[0, 1\), got '0.9'"),
    "sparsity NaN": Case(nothing, config(PstConfig, sparsity=NAN), r"lies in \[0, 1\), got nan"),
    "sparsity True": Case(nothing, config(PstConfig, sparsity=True), r"lies in \[0, 1\), got True"),
    "initial sparsity": Case(nothing, config(PstConfig, initial_sparsity=1.5), r"`initial_sparsity`.*got 1.5"),
    "falling ramp": Case(
        nothing, config(PstConfig, initial_sparsity=0.5, sparsity=0.4), "raises the sparsity, got initial_sparsity=0.5"
    ),
    "sparsity beside N:M": Case(
        nothing, config(PstConfig, pattern="2:4", sparsity=0.9), "fixes the sparsity at 0.5, got .*0.9; leave"
    ),
    "sparsity text beside N:M": Case(
        nothing, config(PstConfig, pattern="2:4", sparsity="0.5"), "fixes the sparsity at 0.5, got .*'0.5'; leave"
    ),
    "4:2": Case(nothing, config(PstConfig, pattern="4:2"), r"0 < N < M, got 4:2; for example '2:4'"),
    "0:4": Case(nothing, config(PstConfig, pattern="0:4"), r"0 < N < M, got 0:4"),
    "4:4": Case(nothing, config(PstConfig, pattern="4:4"), r"0 < N < M, got 4:4"),
    "a:b": Case(nothing, config(PstConfig, pattern="a:b"), r"'unstructured' or 'N:M'.*got 'a:b'"),
    "pattern empty": Case(nothing, config(PstConfig, pattern=""), r"'unstructured' or 'N:M'.*got ''"),
    "pattern None": Case(nothing, config(PstConfig, pattern=None), r"'unstructured' or 'N:M'.*got None"),
    "pattern list": Case(nothing, config(PstConfig, pattern=[2, 4]), r"'unstructured' or 'N:M'.*got \[2, 4\]"),
    "pattern by row": Case(
        nothing, config(PstConfig, pattern=Unstructured("row")), "weights of a layer compete, got .*row.*take"
    ),
    "r 0": Case(nothing, config(PstConfig, r=0), "`r` should be a positive integer, got 0"),
    "r text": Case(nothing, config(PstConfig, r="8"), "`r` should be a positive integer, got '8'"),
    "r True": Case(nothing, config(PstConfig, r=True), "`r` should be a positive integer, got True"),
    "r endless": Case(nothing, config(SppConfig, r=10**500), "`r` should be .* at most 2147483647, got one of more"),
    "score_r": Case(nothing, config(PstConfig, score_r=-1), "`score_r` should be a positive integer, got -1"),
    "beta text": Case(nothing, config(PstConfig, beta="1"), "`beta` should be a finite number, got '1'"),
    "alpha1 infinite": Case(nothing, config(PstConfig, alpha1=INF), "`alpha1` should be a finite number, got inf"),
    "alpha2 None": Case(nothing, config(PstConfig, alpha2=None), "`alpha2` should be a finite number, got None"),
    "importance": Case(nothing, config(PstConfig, importance="taylor"), "'magnitude', 'movement', got 'taylor'"),
    "schedule": Case(nothing, config(PstConfig, schedule="cosine"), "'cubic', 'linear', 'constant', got 'cosine'"),
    "weight update": Case(nothing, config(PstConfig, weight_update="lora"), "'low_rank', 'full', 'none', got 'lora'"),
    "nothing to train": Case(
        nothing, config(PstConfig, importance="magnitude", weight_update="none"), "nothing to train; prune .*magnitude"
    ),
    "warm-ups": Case(
        nothing, config(PstConfig, initial_warmup=0.8, final_warmup=0.3), r"sum to at most 1, got 0.8 \+ 0.3"
    ),
    "warm-up below 0": Case(nothing, config(PstConfig, initial_warmup=-0.1), r"`initial_warmup` is a fraction.*-0.1"),
    "warm-up text": Case(nothing, config(PstConfig, final_warmup="0.3"), r"`final_warmup` is a fraction.*got '0.3'"),
    "total steps": Case(
        nothing, config(PstConfig, total_steps=0), "`total_steps` should be a positive integer, got 0"
    ),
    "total steps 1.5": Case(nothing, config(PstConfig, total_steps=1.5), "`total_steps` should be .* got 1.5"),
    "init_weights text": Case(nothing, config(PstConfig, init_weights="false"), "True or False, got 'false'"),
    "inference_mode text": Case(nothing, config(SppConfig, inference_mode="no"), "True or False, got 'no'"),
    "sparsity_pattern list": Case(
        nothing, config(PstConfig, sparsity_pattern=[0.5]), r"a dict from names .*got \[0.5\]"
    ),
    "sparsity_pattern regex": Case(
        nothing, config(PstConfig, sparsity_pattern={"mlp(": 0.5}), r"got 'mlp\(', which is no valid regex"
    ),
    "sparsity_pattern value": Case(
        nothing, config(PstConfig, sparsity_pattern={"mlp": "much"}), r"lies in \[0, 1\), got 'much'"
    ),
    "sparsity_pattern beside N:M": Case(
        nothing, config(PstConfig, pattern="2:4", sparsity_pattern={"mlp": 0.6}), "fixes the sparsity.*leave it out"
    ),
    "spp r 1.5": Case(nothing, config(SppConfig, r=1.5), "`r` should be a positive integer, got 1.5"),
    "spp dropout 1": Case(nothing, config(SppConfig, spp_dropout=1.0), r"probability in \[0, 1\), got 1.0"),
    "spp dropout None": Case(nothing, config(SppConfig, spp_dropout=None), "`spp_dropout` should be .* got None; 0.0"),
    "spp alpha 0": Case(nothing, config(SppConfig, spp_alpha=0), "`spp_alpha` should be above 0, got 0; the authors"),
    "spp alpha infinite": Case(nothing, config(SppConfig, spp_alpha=INF), "`spp_alpha` should be a finite .* got inf"),
    "spp alpha text": Case(nothing, config(SppConfig, spp_alpha="32"), "`spp_alpha` should be a finite .* got '32'"),
    "targets number": Case(
        nothing, config(SppConfig, target_modules=3), "`target_modules` is a list .*regular.* got 3"
    ),
    "targets empty": Case(
        nothing, config(PstConfig, target_modules=[]), "got an empty one; leave it out for the default"
    ),
    "targets regex": Case(
        nothing, config(PstConfig, target_modules="q_proj("), "got 'q_proj\\(', which is none .*mend"
    ),
    "targets mixed": Case(
        nothing, config(PstConfig, target_modules=["q_proj", 1]), r"list of names.*got \['q_proj', 1\]"
    ),
    "excluded regex": Case(
        nothing, config(PstConfig, exclude_modules="*"), r"`exclude_modules`.*got '\*', which is none"
    ),
    "modules_to_save text": Case(
        nothing,
        config(PstConfig, modules_to_save="classifier"),
        r"list of names, got 'classifier'; for one name write \[",
    ),
    "layers below 0": Case(nothing, config(SppConfig, layers_to_transform=[-1]), r"counted from 0: .*got \[-1\]"),
    "layers text": Case(nothing, config(SppConfig, layers_to_transform="0"), "counted from 0: .*got '0'"),
    "layers_pattern alone": Case(nothing, config(SppConfig, layers_pattern="h"), "set both or neither"),
    "regex with layers": Case(
        nothing, config(SppConfig, target_modules=".*", layers_to_transform=[0]), "put the block numbers"
    ),
    "tokens text": Case(nothing, config(SppConfig, trainable_token_indices="7"), "list of token numbers.*got '7'"),
    "tokens below 0": Case(
        nothing, config(PstConfig, trainable_token_indices={"embed_tokens": [-1]}), r"from 0, or a dict.*\[-1\]\}"
    ),
    "task type": Case(nothing, config(PstConfig, task_type="POETRY"), "Invalid task type: 'POETRY'. Must be one of"),
    "checksums": Case(nothing, config(SppConfig, checksums=5), "`checksums` is what saving .*got 5; save or"),
    "checksums of another": Case(
        nothing, config(SppConfig, checksums={"config": "0", "weights": "0"}), r"CRC-32 0\), got .*remove `chec"
    ),
}

MODELS = {
    "width for 2:4": Case(
        odd, adapt(lambda: PstConfig(pattern="2:4")), r"divisible by 4, got 6 in `layers.0.2`; exclude"
    ),
    "no such name": Case(
        llama, adapt(lambda: PstConfig(target_modules=["query"])), r"(?s)query.*not found in the base"
    ),
    "a norm": Case(
        llama,
        adapt(lambda: PstConfig(target_modules=["input_layernorm"])),
        "got LlamaRMSNorm in `model.layers.0.*; take",
    ),
    "an embedding": Case(
        llama,
        adapt(lambda: SppConfig(target_modules=["q_proj", "embed_tokens"])),
        "got Embedding in `model.embed_tok.*; take",
    ),
    "an embedding of GPT-2": Case(
        gpt2,
        adapt(lambda: PstConfig(target_modules=["c_attn", "wte"])),
        "PstModel adapts torch.nn.Linear and transformers' Conv1D with floating point weights, "
        "got Embedding in `transformer.wte`; take",
    ),
    "a whole attention": Case(
        bert, adapt(lambda: SppConfig(target_modules=["attention"])), "got BertAttention in .*attention`; take"
    ),
    "no blocks": Case(mlp, adapt(lambda: PstConfig()), "Sequential has no list of such blocks; name the linears"),
    "attention's own linear": Case(
        attention,
        adapt(lambda: PstConfig(target_modules=["out_proj"])),
        "got NonDynamicallyQuantizableLinear in `out_proj`",
    ),
    "another method's": Case(
        lora,
        lambda world: get_peft_model(world.model.base_model.model, PstConfig(target_modules=["q_proj"])),
        "adapter of another method .*; merge that",
    ),
    "a tied head": Case(
        tied,
        adapt(lambda: SppConfig(target_modules=["q_proj", "lm_head"])),
        "got `lm_head`, whose weight is also that of `model.embed_tokens`, .*; exclude it .*or give it one of its own",
    ),
    "a weight of two linears": Case(
        shared_block,
        adapt(lambda: PstConfig(target_modules=["up_proj"])),
        r"got `model.layers.0.mlp.up_proj`, whose weight is also that of `model.layers.1.mlp.up_proj`",
    ),
    "only weights of two linears": Case(shared_block, adapt(lambda: PstConfig()), "whose weight is also that of"),
    "all excluded": Case(llama, adapt(lambda: SppConfig(exclude_modules=".*")), "excluded"),
    "a weight that torch prunes": Case(
        masked, adapt(lambda: SppConfig()), r"got `.*down_proj`, which computes .*`torch.nn.utils.prune.remove\(module"
    ),
    "a weight that is parametrized": Case(
        parametrized, adapt(lambda: PstConfig()), r"got `.*down_proj`, .*parametrize.remove_parametrizations\(module"
    ),
    "a rank beyond reason": Case(
        llama, adapt(lambda: PstConfig(r=10**8)), "got rank 100000000 for `model.*smaller `r`"
    ),
    "budget for no layer": Case(
        llama, adapt(lambda: PstConfig(sparsity_pattern={"query": 0.5})), r"names at least one linear, got 'query'"
    ),
    "PST on a packed model": Case(
        packed, adapt(lambda: PstConfig()), "which is packed: .*; use `SppConfig`, or call `unp"
    ),
    "a second adapter of one name": Case(
        pst, method("add_adapter", "default", PstConfig()), "(?i)default.*already|exists"
    ),
    "an adapter that is not there": Case(pst, method("set_adapter", "other"), "(?i)other"),
    "an adapter for each row": Case(
        spp, method("forward", **IDS, adapter_names=["default"]), r"got adapter_names=\['default'\]; call `set_adapter"
    ),
    "an adapter for each row, generating": Case(
        pst, method("generate", **IDS, adapter_names=["other"]), r"got adapter_names=\['other'\]; call `set_adapter"
    ),
    "other method beside": Case(spp, method("add_adapter", "second", PstConfig()), "(?i)different|same|type"),
}

ADAPTERS = {
    "no config": damaged(saved_pst, remove(CONFIG), then=read_adapter, words="Can't find 'adapter_config.json'"),
    "config no JSON": damaged(
        saved_pst, content(CONFIG, b"{r: 8"), then=read_adapter, words="Expecting property name"
    ),
    "config cut short": damaged(saved_pst, cut(CONFIG, 0.5), then=read_adapter, words="line|char"),
    "config of no method": damaged(
        saved_pst, settings(CONFIG, peft_type="PSST"), then=read_adapter, words="PSST", error=KeyError
    ),
    "config value": damaged(
        saved_pst, settings(CONFIG, schedule="cosine"), then=read_adapter, words="`schedule` should be one of"
    ),
    "config type": damaged(
        saved_spp, settings(CONFIG, r=[16]), then=read_adapter, words=r"positive integer, got \[16\]"
    ),
    "config damaged": damaged(
        saved_spp,
        settings(CONFIG, keep_checksums=True, spp_alpha=33),
        then=read_adapter,
        words="as it was saved .*remove `c",
    ),
    "config of another rank": damaged(
        saved_pst, settings(CONFIG, r=4), then=read_adapter, words=r"shapes of an adapter .*Nothing was loaded"
    ),
    "config of fewer factors": damaged(
        saved_pst,
        settings(CONFIG, importance="magnitude"),
        then=read_adapter,
        words=r"fits the modules .*Nothing was loaded",
    ),
    "config of more factors": damaged(
        saved_pst,
        settings(CONFIG, importance="movement"),
        then=read_adapter,
        words=r"has all tensors .*pst_S.*are missing",
    ),
    "weights missing": damaged(
        saved_pst, remove(ADAPTER), then=read_adapter, words="was saved with .*got no such file"
    ),
    "weights empty": damaged(
        saved_pst, content(ADAPTER, b""), then=read_adapter, words="cannot be read .*download it again"
    ),
    "weights no safetensors": damaged(
        saved_pst,
        content(ADAPTER, b"PK" * 500),
        then=read_adapter,
        words="whole safetensors file, got .*download it again",
    ),
    "weights cut short": damaged(
        saved_spp, cut(ADAPTER, 0.9), then=read_adapter, words="cannot be read .* damaged or cut short"
    ),
    "weights: a bit of a name": damaged(saved_pst, flip(ADAPTER, 60), then=read_adapter, words="damaged"),
    "weights: a bit of a number": damaged(
        saved_spp, flip(ADAPTER, -7), then=read_adapter, words=r"CRC-32 .*is damaged, or"
    ),
    "whole modules that are not in the weights": damaged(
        saved_spp, settings(CONFIG, modules_to_save=["norm"]), then=read_adapter, words=r"got \['norm'\] in .*again"
    ),
    "whole modules that have adapters": damaged(
        saved_spp,
        settings(CONFIG, modules_to_save=["q_proj"]),
        then=read_adapter,
        words=r"got \['q_proj'\] in .*again",
    ),
    "whole blocks that hold adapters": damaged(
        saved_pst, settings(CONFIG, modules_to_save=["mlp"]), then=read_adapter, words=r"got \['mlp'\] in .*again"
    ),
    "weights of another save": damaged(saved_pst, another_save, then=read_adapter, words="of another save; save or"),
    "only a pickle": damaged(
        saved_pst, only_pickled, then=read_adapter, words="a pickle, which can run code .*safe_serial"
    ),
    "only a pickle, automatically": damaged(
        saved_pst, only_pickled, then=read_beside, words="a pickle, which can run code .*safe_serial"
    ),
    "another width": damaged(
        saved_pst, wide, then=read_adapter, words=r"got \(40, 8\) for .*\(32, 8\) here; load it onto"
    ),
    "more blocks": damaged(
        saved_pst, deep, then=read_adapter, words=r"fits the modules .*layers.2.*which this model has not"
    ),
    "a tensor missing": damaged(
        saved_spp,
        tensors(lambda x: x.pop(of("spp_B", x))),
        then=read_adapter,
        words="got none for .*spp_B.*Nothing was",
    ),
    "integers": damaged(
        saved_spp,
        tensors(lambda x: x.update({of("spp_B", x): x[of("spp_B", x)].view(torch.int32)})),
        then=read_adapter,
        words="of the same kind as the model's, got torch.int32 .*download it again",
    ),
    "NaN": damaged(
        saved_pst,
        tensors(lambda x: x[of("pst_R", x)].fill_(NAN)),
        then=read_adapter,
        words="got 32 NaN or infinite of 32",
    ),
    "a count that is none": damaged(
        saved_pst,
        tensors(lambda x: x[of("pst_pruned", x)].fill_(-1)),
        then=read_adapter,
        words="from 0 up to 1535, got -1",
    ),
    "a count beyond the layer": damaged(
        saved_pst,
        tensors(lambda x: x[of("pst_pruned", x)].fill_(1536)),
        then=read_adapter,
        words="to 1535, got 1536 .*damaged",
    ),
    "a count rounded": damaged(
        saved_pst,
        tensors(lambda x: x.update({of("pst_pruned", x): x[of("pst_pruned", x)].bfloat16()})),
        then=read_adapter,
        words="got torch.bfloat16 for .*torch.int64 here",
    ),
    "resumed: cut short": damaged(
        live_pst, cut(ADAPTER, 0.5), then=reread_adapter, words="(?i)header|incomplete|buffer|invalid", error=Exception
    ),
    "resumed: another width": damaged(live_pst, wide, then=reread_adapter, words="shapes .*Nothing was loaded"),
    "resumed: a tensor missing": damaged(
        live_pst, tensors(lambda x: x.pop(of("pst_A", x))), then=reread_adapter, words="got none for .*pst_A"
    ),
    "resumed: infinite": damaged(
        live_pst, tensors(lambda x: x[of("pst_V", x)].fill_(INF)), then=reread_adapter, words="NaN or infinite"
    ),
    "automatic class": damaged(
        saved_pst,
        settings(CONFIG, base_model_name_or_path="no/such-model"),
        then=lambda world: AutoPeftModelForCausalLM.from_pretrained(world.folder),
        words="(?i)connect|cached|offline",
        error=OSError,
    ),
}

PRUNERS = {
    "magnitude: pattern": Case(llama, call(prune_magnitude, "4:2"), "0 < N < M, got 4:2"),
    "magnitude: sparsity": Case(llama, call(prune_magnitude, sparsity=50), r"lies in \[0, 1\), got 50; 0.9 means"),
    "magnitude: sparsity text beside N:M": Case(
        llama, call(prune_magnitude, "2:4", "0.5"), "fixes .*got .*'0.5'; leave"
    ),
    "magnitude: group": Case(llama, call(prune_magnitude, group="column"), "'layer' .*'row' .*got 'column'"),
    "magnitude: group of N:M": Case(
        llama, call(prune_magnitude, NM(2, 4), group="row"), "each M weights.*leave `group`"
    ),
    "magnitude: a key of the mapping": Case(llama, call(prune_magnitude, sparsity={"query": 0.5}), "got 'query'"),
    "magnitude: a mapping with gaps": Case(llama, call(prune_magnitude, sparsity={"q_proj": 0.5}), "(?s)q_proj|every"),
    "magnitude: no blocks": Case(mlp, call(prune_magnitude), "no list of such blocks; name the linears"),
    "magnitude: quantised": Case(foreign, call(prune_magnitude), f"blocks; .*{NOT_READ}"),
    "magnitude: no such target": Case(llama, call(prune_magnitude, target_modules=["query"]), "got none .*have names"),
    "magnitude: targets number": Case(llama, call(prune_magnitude, target_modules=5), "is a list of names.*, got 5"),
    "magnitude: targets of adapters": Case(
        llama,
        call(prune_magnitude, target_modules="all-linear"),
        "got 'all-linear', which is for adapters; leave it out",
    ),
    "magnitude: excluded number": Case(
        llama, call(prune_magnitude, exclude_modules=[5]), r"list of names.* got \[5\]"
    ),
    "magnitude: all excluded": Case(
        llama, call(prune_magnitude, exclude_modules=".*"), "needs at least one linear, got none"
    ),
    "magnitude: adapters": Case(spp, call(prune_magnitude), "(?i)adapter.*merge"),
    "magnitude: infinity": Case(infinite, call(prune_magnitude), "(?i)finite|infinity"),
    "magnitude: no memory": Case(meta, call(prune_magnitude), "on the meta device .*load"),
    "magnitude: torch prunes it": Case(masked, call(prune_magnitude), "`.*down_proj`, which computes .*prune.remove"),
    "magnitude: parametrized": Case(parametrized, call(prune_magnitude), "computes .*remove_parametrizations"),
    "magnitude: width": Case(odd, call(prune_magnitude, "2:4"), "divisible by 4, got 6 in `layers.0.2`; exclude"),
    "wanda: outside of blocks": Case(
        llama, call(prune_wanda, [IDS], target_modules=["lm_head"]), "got `lm_head`, outside of them; take it out"
    ),
    "wanda: no blocks": Case(mlp, call(prune_wanda, [IDS], target_modules=["0"]), "no list of such blocks|outside"),
    "wanda: sparsity": Case(llama, call(prune_wanda, [IDS], sparsity=NAN), r"lies in \[0, 1\), got nan"),
    "ria: exponent": Case(llama, call(prune_ria, [IDS], exponent=NAN), "(?i)got nan"),
    "sparsegpt: damping": Case(llama, call(prune_sparsegpt, [IDS], damping=-1.0), "(?i)got -1"),
    "sparsegpt: block size": Case(llama, call(prune_sparsegpt, [IDS], block_size=0), "(?i)got 0"),
    "owl: sparsity": Case(llama, call(owl_sparsity, [IDS], 1.5), r"lies in \[0, 1\), got 1.5"),
    "uniform: sparsity": Case(llama, call(uniform_sparsity, -1), r"lies in \[0, 1\), got -1"),
}

DATA = {
    "no batch": Case(llama, call(prune_wanda, []), "at least one batch, got none .*; pass an iterable of dicts"),
    "one batch alone": Case(llama, call(prune_wanda, IDS), "takes several batches, got one dict; pass"),
    "a text": Case(llama, call(prune_wanda, "some text"), "takes several batches, got one str; pass"),
    "lists": Case(llama, call(prune_wanda, [[1, 2, 3]]), "a dict of tensors, got list; pass"),
    "no tensors": Case(
        llama, call(prune_wanda, to_ids(input_ids=[[1, 2]])), "got list for `input_ids` in batch 0; pass"
    ),
    "NaN": Case(
        llama,
        call(prune_sparsegpt, [{"inputs_embeds": torch.full((1, 4, 32), NAN)}]),
        "got NaN .*`inputs_embeds` of batch 0",
    ),
    "too long": Case(
        llama,
        call(prune_wanda, to_ids(input_ids=torch.ones(1, 65, dtype=torch.int64))),
        "context of 64 tokens, got 65 .*cut",
    ),
    "a token beyond": Case(
        llama,
        call(prune_wanda, to_ids(input_ids=torch.tensor([[1, VOCAB_SIZE]]))),
        "from 0 to 95, got 96 .*own tokenizer",
    ),
    "a token below": Case(
        gpt2, call(prune_ria, to_ids(input_ids=torch.tensor([[1, -100]]))), "from 0 to 95, got -100 .*own tokenizer"
    ),
    "tokens as fractions": Case(
        llama, call(prune_wanda, to_ids(input_ids=torch.rand(1, 4))), "are int64 or int32, got torch.float"
    ),
    "no inputs": Case(llama, call(prune_wanda, [{"labels": torch.ones(1, 4, dtype=torch.int64)}]), "input_ids"),
    "a mask of another length": Case(
        llama, call(prune_wanda, to_ids(attention_mask=torch.ones(1, 5))), r"shape \(1, 5\) beside `input_ids` of"
    ),
    "perplexity of one token": Case(
        llama, call(perplexity, torch.tensor([1])), r"at least 2 token ids.*got shape \(1,\)"
    ),
    "perplexity of a table": Case(llama, call(perplexity, torch.ones(2, 4, dtype=torch.int64)), "one row .*got shape"),
    "perplexity of a list": Case(llama, call(perplexity, [1, 2, 3]), "is a tensor of token ids, got list; take"),
    "perplexity beyond": Case(llama, call(perplexity, torch.tensor([1, 2, 500])), "from 0 to 95, got 500"),
    "perplexity window": Case(llama, call(perplexity, torch.arange(9), window=1), "at least 2 .*got 1"),
    "perplexity window text": Case(llama, call(perplexity, torch.arange(9), window="8"), "at least 2 .*got '8'"),
    "batches of nothing": Case(
        nothing, lambda _: calibration_batches([]), "at least one text, row or batch, got an empty"
    ),
    "batches of one dict": Case(nothing, lambda _: calibration_batches(IDS), "is text, rows or batches, got one dict"),
    "batches without tokenizer": Case(
        nothing, lambda _: calibration_batches("abc"), "tokenizer and a length, got none"
    ),
    "batches of no size": Case(nothing, lambda _: calibration_batches([IDS], batch_size=0), "positive integer, got 0"),
}

STORED = {
    "load: None": Case(nothing, lambda _: load_sparse(None), "is a folder, got NoneType, which names none; pass a"),
    "load: a class by its name": Case(
        saved_sparse, read_sparse(model_cls="LlamaForCausalLM"), "is a class, .*got 'LlamaForCausalLM'; pass the class"
    ),
    "pack: no model": Case(nothing, lambda _: pack_model(5), r"in memory \(an nn.Module\), got 5; load it first"),
    "unpack: no model": Case(nothing, lambda _: unpack_model("a"), r"\(an nn.Module\), got 'a'; load it first"),
    "prune: no model": Case(nothing, lambda _: prune_magnitude("a"), r"\(an nn.Module\), got 'a'; load it first"),
    "prune: no model to calibrate": Case(
        nothing, lambda _: prune_wanda(None, [IDS]), r"\(an nn.Module\), got None; load it first"
    ),
    "report: None": Case(nothing, lambda _: sparsity_report(None), "is a folder, got NoneType, which names none"),
    "verify: a state dict": Case(
        llama, lambda world: verify_sparsity(world.model.state_dict()), "got OrderedDict, .*or the model itself"
    ),
    "load: nothing there": Case(
        nothing, lambda _: load_sparse("nowhere/at-all"), "got 'nowhere/at-all', which is no folder here .*check the"
    ),
    "load: no path": Case(
        nothing, lambda _: load_sparse("./nowhere"), "is a folder, got 'nowhere', which is none; pass a folder"
    ),
    "load: dense": Case(saved_dense, read_sparse(), "reads packed checkpoints, got a dense one .*load it with"),
    "load: config missing": damaged(
        saved_sparse, remove("config.json"), then=read_sparse(), words="config.json is missing"
    ),
    "load: config no object": damaged(
        saved_sparse, content("config.json", b"[1]"), then=read_sparse(), words="is a JSON object, got list"
    ),
    "load: config no JSON": damaged(
        saved_sparse, cut("config.json", 0.6), then=read_sparse(), words="JSON, got something"
    ),
    "load: config changed": damaged(
        saved_sparse,
        settings("config.json", rms_norm_eps=0.5),
        then=read_sparse(),
        words="as it was saved .*verify_checks",
    ),
    "load: config of another size": damaged(
        saved_sparse,
        settings("config.json", intermediate_size=40),
        then=read_sparse(verify_checksums=False),
        words="has the tensors of its model, got .*which is .* by config.json",
    ),
    "load: entry no object": damaged(
        saved_sparse, settings("config.json", peft_sparse=7), then=read_sparse(), words="got something else in .*again"
    ),
    "load: file missing": damaged(
        saved_sparse, remove(SPARSE), then=read_sparse(), words="cannot be read .*missing, dam"
    ),
    "load: file cut short": damaged(
        saved_sparse, cut(SPARSE, 0.7), then=read_sparse(), words="cannot be read .* damaged or cut short"
    ),
    "load: a bit of the header": damaged(
        saved_sparse, flip(SPARSE, 70), then=read_sparse(), words="(?s)damaged|cannot be"
    ),
    "load: a bit of a tensor": damaged(
        saved_sparse, flip(SPARSE, -9), then=read_sparse(), words="damaged: its CRC-32 is"
    ),
    "load: a pickle": damaged(
        saved_dense, pickled_model, then=read_sparse(), words="only pickled ones .*are not opened here"
    ),
    "load for the command line: pickled": damaged(
        saved_dense, pickled_model, then=folder_to(load_model), words="only pickled ones .*are not opened here"
    ),
    "load for the command line: no weights": damaged(
        saved_dense,
        remove("model.safetensors"),
        then=folder_to(load_model),
        words=r"model\*\.safetensors, got none in",
    ),
    "load: dense beside packed": damaged(
        saved_sparse,
        lambda world: shutil.copy(world.folder / SPARSE, world.folder / "model.safetensors"),
        then=read_sparse(),
        words="no other weights, got 'model.safetensors' .*take one",
    ),
    "save: adapters": Case(
        saved_spp, lambda world: save_sparse(get_peft_model(tiny_llama(), PstConfig()), world.folder), "merge"
    ),
    "save: torch prunes it": Case(
        masked,
        lambda world: save_sparse(world.model, "sparse"),
        "a parameter of its own, got `.*down_proj`.*prune.remove",
    ),
    "save: quantised": Case(foreign, lambda world: save_sparse(world.model, "sparse"), NOT_READ),
    "save: no transformers model": Case(
        saved_sparse,
        lambda world: save_sparse(nn.Linear(4, 4), world.folder),
        "saves models of transformers, got Linear",
    ),
    "save: beside dense": Case(
        saved_dense, model_and_folder(save_sparse), "no dense weights beside it.*choose another"
    ),
    "save: into a file": Case(
        saved_dense,
        lambda world: save_sparse(world.model, world.folder / "config.json"),
        "into a folder, got .*a file",
    ),
    "save: shard size": Case(
        saved_sparse,
        lambda world: save_sparse(tiny_llama(), world.folder, max_shard_size="5 potatoes"),
        "got '5 potatoes'",
    ),
    "save: method": Case(
        saved_sparse, lambda world: save_sparse(tiny_llama(), world.folder, method="lora"), r"one of \['pst', 'spp'\]"
    ),
    "card: nothing there": Case(nothing, lambda _: write_model_card("./nowhere"), "got none in 'nowhere'"),
    "verify: a pickle": damaged(
        saved_dense, pickled_model, then=folder_to(verify_sparsity), words="run code when they are read"
    ),
    "verify: an adapter": Case(saved_pst, folder_to(verify_sparsity), "got an adapter in .*AutoPeftModel"),
    "verify: another model": Case(
        llama,
        lambda world: verify_sparsity(world.model, reference=tiny_gpt2()),
        "the same layers, got .*pass the model",
    ),
    "verify: other shapes": Case(
        odd,
        lambda world: verify_sparsity(world.model, reference=_reshaped(world.model)),
        "the same shape .*got .*pass",
    ),
    "verify: pattern": Case(
        pruned, call(verify_sparsity, pattern="two of four"), "'unstructured' or 'N:M'.*got 'two of"
    ),
    "verify: nothing to compare": Case(
        pruned, call(verify_sparsity, pattern="unstructured"), "is N:M, .*'unstructured', which any zeros follow; pass"
    ),
    "report: no linear": Case(nothing, lambda _: sparsity_report(nn.ReLU()), "at least one linear, got none in ReLU"),
    "report: quantised": Case(foreign, call(sparsity_report), f"at least one linear, got none .*{NOT_READ}"),
    "report: nothing there": Case(nothing, lambda _: sparsity_report("no folder!"), "is a folder, got 'no folder!'"),
}


def _reshaped(model: nn.Module) -> nn.Module:
    other = odd(Path()).model
    other.layers[1] = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 8))
    return other


def begin_training(world: World) -> Any:
    callback, state = SparsityCallback(), TrainerState(max_steps=4)
    return callback.on_train_begin(SimpleNamespace(), state, SimpleNamespace(), model=world.model)


CALLS = {
    "schedule: no PST": Case(lora, begin_training, "drives PST layers, got .*without an active one; make them"),
    "schedule: step below 0": Case(pst, method("base_model.set_sparsity_step", -1, 4), "`step` counts .* got -1"),
    "schedule: step 0.5": Case(
        pst, method("base_model.set_sparsity_step", 0.5, 4), "in whole numbers from 0, got 0.5"
    ),
    "schedule: no total": Case(pst, method("base_model.set_sparsity_step", 1), "got None; pass it, or set"),
    "schedule: total 0": Case(pst, method("base_model.set_sparsity_step", 1, 0), "got 0; pass it, or set"),
    "schedule: total text": Case(
        pst, method("base_model.set_sparsity_step", 1, "4"), "`total_steps` counts .*got '4'"
    ),
    "groups: a rate below 0": Case(live_pst, call(pst_param_groups, -1, 1e-2), "`lr` is a number from 0 up, got -1"),
    "groups: a rate as text": Case(live_pst, call(pst_param_groups, 1e-3, "1e-2"), "`score_lr` is .*, got '1e-2'"),
    "groups: no rate": Case(live_pst, call(pst_param_groups, None, 1e-2), "`lr` is a number from 0 up, got None"),
    "groups: no PST": Case(spp, call(pst_param_groups, 1e-3, 1e-2), "trainable parameters of PST, got .*; call"),
    "merge: NaN in PST": Case(
        broken_pst, method("merge_and_unload"), "finite weights, got .*`.*down_proj`; train with a lower"
    ),
    "merge: infinity in SPP": Case(broken_spp, method("merge_adapter"), "NaNs detected .*Nothing was merged"),
    "merge: no such adapter": Case(pst, method("merge_adapter", ["other"]), r"got \['other'\]; it has 'default'"),
    "merge: a text": Case(spp, method("merge_adapter", "default"), "is a list of .*got 'default'; it has 'default'"),
    "merge: infinite base": Case(
        infinite,
        lambda world: get_peft_model(world.model, SppConfig()).merge_and_unload(),
        "NaNs detected in the base weight.* got 1 NaN .* of 1536 in `model.*down_proj`.*; load a sound base",
    ),
    "pack: adapters": Case(spp, call(pack_model), "carries an adapter .*; pack the model first"),
    "pack: no such target": Case(pruned, call(pack_model, ["query"]), "at least one linear, got none .*names such as"),
    "pack: quantised": Case(foreign, call(pack_model), f"at least one linear, got none .*{NOT_READ}"),
    "pack: no memory": Case(meta, call(pack_model), "needs weights in memory, got .*load the model"),
    "unpack: adapters": Case(
        packed,
        lambda world: unpack_model(get_peft_model(world.model, SppConfig())),
        "adapter .*call `merge_and_unload",
    ),
    "packed: save_pretrained": Case(
        packed, method("save_pretrained", "packed-as-dense"), "random weights; use .*save_sparse"
    ),
}

TABLES = {
    "config": CONFIGS,
    "model": MODELS,
    "adapter": ADAPTERS,
    "prune": PRUNERS,
    "data": DATA,
    "stored": STORED,
    "call": CALLS,
}
CASES = {f"{table}: {name}": case for table, cases in TABLES.items() for name, case in cases.items()}
# These add an adapter that works before they do what is wrong, so the model is another one afterwards.
CHANGED_BEFORE = {"adapter: only a pickle, automatically", "call: merge: infinite base", "call: unpack: adapters"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_it_is_an_error_that_helps_and_nothing_is_changed(name, tmp_path, monkeypatch):
    case = CASES[name]
    monkeypatch.chdir(tmp_path)  # for paths that a case makes up
    world = case.given(tmp_path / "there")
    for action in case.broken:
        action(world)
    before = world.state()
    with pytest.raises(case.error, match=case.words):
        case.when(world)
    if name not in CHANGED_BEFORE:
        after = world.state()
        assert after.keys() == before.keys()
        assert [key for key in before if after[key] != before[key]] == []
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "there"])


def test_there_are_many_of_them():
    """Distinct ones: no two rows do the same thing."""
    assert len(CASES) >= 60
    assert len({(case.words, case.given) for case in CASES.values()}) > 0.9 * len(CASES)
