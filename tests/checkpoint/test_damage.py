"""A damaged folder is an error, never a wrong model; and a save that ends in the middle damages nothing."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from peft_sparse.checkpoint import commit, load_sparse, save_sparse, shards
from peft_sparse.pruning import prune_magnitude
from peft_sparse.storage.files import SafetensorsFile, crc32
from peft_sparse.storage.format import config_crc32, file_metadata

import models

NAME = "model.layers.0.mlp.up_proj.weight"
fuzz = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def same(model: LlamaForCausalLM, expected: LlamaForCausalLM) -> bool:
    ours, theirs = model.state_dict(), expected.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return prune_magnitude(models.tiny_llama(seed=1), sparsity=0.6)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_sparse(model, folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def fits_or_raises(folder: Path, model: LlamaForCausalLM, saved: Path) -> None:
    """Either an error that names a file or tensor, or exactly the model: a flip may hit white space."""
    try:
        loaded = load_sparse(folder)
    except ValueError as error:
        names = [path.name for path in saved.iterdir()] + list(model.state_dict())
        assert any(name in str(error) for name in names), error
        return
    assert same(loaded, model)
    assert loaded.config.to_json_string() == load_sparse(saved).config.to_json_string()
    assert loaded.generation_config == model.generation_config


@fuzz
@given(st.data())
def test_flipped_bytes(saved, model, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "flipped"
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    path = folder / data.draw(st.sampled_from(sorted(path.name for path in saved.iterdir())))
    content = bytearray(path.read_bytes())
    # Headers are a small part of a file, and the part where a flip could do most.
    header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(content) - 1)))
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    fits_or_raises(folder, model, saved)


@fuzz
@given(st.data())
def test_files_cut_short(saved, model, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "cut"
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    path = folder / data.draw(st.sampled_from(sorted(path.name for path in saved.iterdir())))
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    fits_or_raises(folder, model, saved)


def test_every_single_bit_of_a_tensor_counts(copy):
    path = next(path for path in copy.glob("*.safetensors") if NAME + ".bitmask" in SafetensorsFile(path).header)
    file = SafetensorsFile(path)
    content = path.read_bytes()
    start = len(content) - max(entry["data_offsets"][1] for entry in file.header.values())
    begin, end = file.header[NAME + ".bitmask"]["data_offsets"]
    for bit in range(0, 8 * (end - begin), 37):
        flipped = bytearray(content)
        flipped[start + begin + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=rf"`{NAME}.bitmask` is damaged: its CRC-32"):
            load_sparse(copy)


def test_a_missing_file(saved, copy):
    for path in saved.iterdir():
        if path.name == "README.md":
            continue
        (copy / path.name).unlink()
        with pytest.raises(ValueError, match=r"config.json" if path.name == "config.json" else path.name) as caught:
            load_sparse(copy)
        if path.suffix == ".safetensors":
            assert f"It holds `{sorted(SafetensorsFile(path).header)[0]}`" in str(caught.value)
        shutil.copy(path, copy)


def test_a_file_cut_short_names_the_first_tensor_that_is_not_there(saved, copy):
    path = next(path for path in copy.glob("*.safetensors") if NAME + ".values" in SafetensorsFile(path).header)
    file, content = SafetensorsFile(path), path.read_bytes()
    start = len(content) - max(entry["data_offsets"][1] for entry in file.header.values())
    begin, end = file.header[NAME + ".values"]["data_offsets"]
    for length in (start + begin, start + begin + 1, start + end - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"cut short \(`{NAME}.values` is not there in full\)"):
            load_sparse(copy)


def test_the_only_file_is_missing(model, tmp_path):
    save_sparse(model, tmp_path)
    (tmp_path / "sparse_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"sparse_model.safetensors.* It holds `model.layers.0.mlp.down_proj.weight`"):
        load_sparse(tmp_path)


def test_files_of_two_saves(model, saved, copy, tmp_path):
    """The same names and shapes, other weights."""
    save_sparse(prune_magnitude(models.tiny_llama(seed=2), sparsity=0.6), tmp_path / "other", max_shard_size="30KB")
    for path in (tmp_path / "other").glob("*.safetensors"):
        shutil.copy(path, copy)
        with pytest.raises(ValueError, match=rf"{path.name}.* or of another save"):
            load_sparse(copy)
        shutil.copy(saved / path.name, copy)
    assert same(load_sparse(copy), model)


def tamper(folder: Path, change) -> None:
    """Change a file's tensors and the shapes in its metadata, with checksums that are right everywhere."""
    config = json.loads((folder / "config.json").read_text())
    path = next(path for path in folder.glob("*.safetensors") if NAME + ".bitmask" in SafetensorsFile(path).header)
    tensors, metadata = load_file(path), json.loads(SafetensorsFile(path).metadata["peft_sparse"])
    change(tensors, metadata["shapes"], config)
    save_file(tensors, path, file_metadata(metadata["shapes"], {key: crc32(x) for key, x in tensors.items()}))
    config["peft_sparse"]["files"][path.name] = SafetensorsFile(path).header_crc32
    config["peft_sparse"]["crc32"] = config_crc32(config)
    (folder / "config.json").write_text(json.dumps(config))


def more_bits(tensors, shapes, config):
    mask = tensors[NAME + ".bitmask"]
    mask[0, 0] = 255 if mask[0, 0] != 255 else 254


def fewer_values(tensors, shapes, config):
    tensors[NAME + ".values"] = tensors[NAME + ".values"][1:].clone()


def another_width(tensors, shapes, config):
    tensors[NAME + ".bitmask"] = tensors[NAME + ".bitmask"][:, :-1].clone()


def another_dtype(tensors, shapes, config):
    tensors[NAME + ".bitmask"] = tensors[NAME + ".bitmask"].short()


def another_shape(tensors, shapes, config):
    shapes[NAME] = [shapes[NAME][0] * 2, shapes[NAME][1] // 2]


def bits_after_the_end(tensors, shapes, config):
    shapes[NAME] = [shapes[NAME][0], shapes[NAME][1] - 4]


def no_bitmask(tensors, shapes, config):
    del tensors[NAME + ".bitmask"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (more_bits, "each bit of its bitmask that is set has a value, got"),
        (fewer_values, "each bit of its bitmask that is set has a value, got"),
        (another_width, r"its bitmask is uint8 \(48, 4\), got uint8 \(48, 3\)"),
        (another_dtype, r"its bitmask is uint8 \(48, 4\), got int16"),
        (another_shape, r"its bitmask is uint8 \(96, 2\), got"),
        (bits_after_the_end, r"the bits after its last column \(28\) are 0"),
        (no_bitmask, "in only one of"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_tampered_tensors_with_right_checksums(copy, change, message, verify):
    tamper(copy, change)
    shapes = "" if verify else "|by config.json"  # which are compared with the model's first where nothing else is
    with pytest.raises(ValueError, match=message + shapes) as caught:
        load_sparse(copy, verify_checksums=verify)
    assert NAME in str(caught.value)


@pytest.mark.parametrize("size", [40, 10**12])  # the second of which no machine has the memory for
@pytest.mark.parametrize("packed", [False, True])
def test_a_config_of_another_size(copy, size, packed):
    config = json.loads((copy / "config.json").read_text())
    config["intermediate_size"] = size
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"got `.*mlp.*weight` of \(.*{size}.* by config.json"):
        load_sparse(copy, packed=packed, verify_checksums=False)


def test_a_config_of_another_architecture(copy):
    config = json.loads((copy / "config.json").read_text())
    config["model_type"] = "gpt2"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"whose config is a GPT2Config, got LlamaForCausalLM"):
        load_sparse(copy, verify_checksums=False)


@pytest.mark.parametrize("dtype", ["floaty", "int8", torch.int32])
def test_a_dtype_that_no_model_has(saved, dtype):
    with pytest.raises(ValueError, match=r"`dtype` of a model is a floating one"):
        load_sparse(saved, dtype=dtype)


def test_tensors_that_do_not_fit_the_model(copy):
    tamper(copy, lambda tensors, shapes, config: tensors.update(stray=torch.zeros(1)))
    with pytest.raises(ValueError, match=r"only one of sparse_model.safetensors.index.json"):
        load_sparse(copy)


@pytest.mark.parametrize("version", [2, 0, "1", None, True])
def test_another_version(copy, version):
    def change(tensors, shapes, config):
        config["peft_sparse"]["version"] = version

    tamper(copy, change)
    with pytest.raises(ValueError, match=rf"reads version 1 of the packed format, got version {version!r}"):
        load_sparse(copy)


def test_the_switch(saved, copy, model):
    """Without checksums, what is wrong in itself is still seen, and a config that was changed on purpose loads."""
    config = json.loads((copy / "config.json").read_text())
    config["max_position_embeddings"] = 128
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json is as it was saved .*`verify_checksums=False`"):
        load_sparse(copy)
    loaded = load_sparse(copy, verify_checksums=False)
    assert loaded.config.max_position_embeddings == 128
    assert same(loaded, model)


# Saves that end in the middle


class Ended(BaseException):
    """As if the process were killed."""


def steps_of(monkeypatch, action, last: int | None) -> int:
    """Run `action` and count what it does to the names in folders; raise `Ended` before the one of number `last`."""
    done = 0

    def counted(real):
        def call(*args, **kwargs):
            nonlocal done
            if done == last:
                raise Ended
            done += 1
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (Path, "rename"), (Path, "unlink"), (os, "fsync"), (shutil, "rmtree")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        action()
    return done


@pytest.mark.parametrize("size", ["30KB", "1GB"])
def test_whenever_a_save_ends_the_folder_holds_the_old_model_or_the_new(model, saved, tmp_path, monkeypatch, size):
    new = prune_magnitude(models.tiny_llama(seed=2), sparsity=0.8)
    total = steps_of(monkeypatch, lambda: save_sparse(new, tmp_path / "whole", max_shard_size=size), None)
    assert total > 8
    found = []
    for last in range(total + 10):
        folder = Path(shutil.copytree(saved, tmp_path / f"old-{last}"))
        try:
            steps_of(monkeypatch, lambda: save_sparse(new, folder, max_shard_size=size), last)  # noqa: B023
            ended = False
        except Ended:
            ended = True
        loaded = load_sparse(folder)
        found.append("new" if same(loaded, new) else "old")
        assert same(loaded, new) or same(loaded, model)
        save_sparse(new, folder, max_shard_size=size)  # and the next save tidies up
        assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
        assert same(load_sparse(folder), new)
        if not ended:
            break
    assert not ended
    assert found == sorted(found, reverse=True)  # old, ..., old, new, ..., new
    assert len(set(found)) == 2


def test_a_first_save_that_ends_leaves_nothing_that_loads(model, tmp_path, monkeypatch):
    for last in range(20):
        folder = tmp_path / str(last)
        try:
            steps_of(monkeypatch, lambda: save_sparse(model, folder), last)  # noqa: B023
        except Ended:
            try:
                assert same(load_sparse(folder), model)
            except ValueError:
                continue
        assert same(load_sparse(folder), model)


def test_a_save_while_another_one_writes(model, saved, tmp_path, monkeypatch):
    """As of two ranks: neither takes the other's new files for what a killed save has left."""
    other, folder = prune_magnitude(models.tiny_llama(seed=2), sparsity=0.8), tmp_path / "both"
    real, inside = shards.pack_folder, []

    def pack(*args):
        real(*args)
        if not inside:
            inside.append("the other one")
            save_sparse(other, folder)
            assert same(load_sparse(folder), other)

    monkeypatch.setattr("peft_sparse.checkpoint.save.pack_folder", pack)
    save_sparse(model, folder, max_shard_size="30KB")
    assert same(load_sparse(folder), model)
    assert {path.name for path in folder.iterdir()} == {path.name for path in saved.iterdir()}


@pytest.mark.skipif(os.name == "nt", reason="no locks on folders")
def test_a_save_waits_until_another_one_is_in_its_place(model, tmp_path, monkeypatch):
    other, folder = prune_magnitude(models.tiny_llama(seed=2), sparsity=0.8), tmp_path / "both"
    second = threading.Thread(target=save_sparse, args=(other, folder))
    real, waited = os.replace, []

    def replace(*args):
        real(*args)
        if not waited and threading.current_thread() is not second:
            second.start()
            second.join(timeout=1)
            waited.append(second.is_alive())

    monkeypatch.setattr(os, "replace", replace)
    save_sparse(model, folder)
    second.join()
    assert waited == [True]
    assert same(load_sparse(folder), other)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_that_is_forked_while_files_move_stops_no_later_save(tmp_path):
    with commit.locked(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        with commit.locked(tmp_path, wait=False) as free:
            assert free
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_an_error_while_saving_changes_nothing(model, saved, copy, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("peft_sparse.checkpoint.shards.save_file", fail)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    for folder in (copy, copy.parent / "fresh"):
        with pytest.raises(OSError, match="no space left"):
            save_sparse(model, folder)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert not (copy.parent / "fresh").exists()
