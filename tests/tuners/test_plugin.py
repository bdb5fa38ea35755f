"""What importing the package does to PEFT, and what it must not do. Each case has an interpreter of its own."""

import subprocess
import sys
import textwrap

import pytest


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)


def check(code: str) -> None:
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_registers_two_methods_like_native_ones():
    check("""
        import copy, json, pickle
        from peft import PeftType, PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_config
        before = list(PeftType)
        import peft_sparse
        assert [t for t in PeftType if t not in before] == ["PST", "SPP"]
        for name, config in (("PST", peft_sparse.PstConfig), ("SPP", peft_sparse.SppConfig)):
            member = PeftType(name)
            assert member is PeftType[name] is getattr(PeftType, name) and member in PeftType
            assert copy.deepcopy(member) is pickle.loads(pickle.dumps(member)) is member
            assert json.dumps(member) == f'"{name}"' and member.value == name and isinstance(member, PeftType)
            assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is config
            assert type(get_peft_config({"peft_type": name})) is config
    """)


def test_wraps_three_functions_and_changes_nothing_else():
    check("""
        import inspect, peft, transformers, types
        from peft import config, mapping, peft_model, tuners
        from peft.tuners import tuners_utils
        from transformers import modeling_utils, trainer
        modules = [peft, config, mapping, peft_model, tuners, tuners_utils, modeling_utils, trainer]
        def contents():
            found = {}
            for module in modules:
                for name, value in vars(module).items():
                    if isinstance(value, type) and value.__module__.startswith(("peft", "transformers")):
                        for k, v in vars(value).items():
                            if callable(v) or isinstance(v, (classmethod, staticmethod)):
                                found[value.__name__, k] = v
                    if callable(value):
                        found[module.__name__, name] = value
            return found
        before = contents()
        def wrapped():
            return peft.PeftModel.load_adapter, peft.PeftModel.from_pretrained, peft.PeftConfig.from_pretrained
        signatures = [inspect.signature(f) for f in wrapped()]
        import peft_sparse
        after = contents()
        changed = {k for k in before if before[k] is not after.get(k)}
        expected = {("PeftModel", "load_adapter"), ("PeftModel", "from_pretrained")}
        assert changed == expected | {("PeftConfigMixin", "from_pretrained")}, changed
        assert signatures == [inspect.signature(f) for f in wrapped()]
        assert all(f.__doc__ and f.__wrapped__ for f in wrapped())
    """)


def test_importing_and_reloading_twice_is_harmless():
    check("""
        import importlib, sys
        import peft_sparse
        importlib.reload(peft_sparse)
        for name in [n for n in sys.modules if n.startswith("peft_sparse")]:
            del sys.modules[name]
        import peft_sparse
        from peft import PeftType
        assert list(PeftType).count("PST") == 1
    """)


@pytest.mark.parametrize("name, prefix, words", [("PST", "pst_", "already has a method"), ("OTHER", "spp_", "prefix")])
def test_an_upstream_method_of_the_same_name_is_an_import_error(name, prefix, words):
    result = run_python(f"""
        from peft import LoraConfig, PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
        PEFT_TYPE_TO_CONFIG_MAPPING["{name}"] = LoraConfig
        PEFT_TYPE_TO_PREFIX_MAPPING["{name}"] = "{prefix}"
        try:
            import peft_sparse
        except ImportError as error:
            assert "{words}" in str(error) and "install" in str(error), error
        else:
            raise AssertionError("imported")
    """)
    assert result.returncode == 0, result.stderr


def test_import_is_as_light_as_peft():
    """No module that `import peft` does not load, but for our own and the Trainer's callback module."""
    code = "import sys; {}; print(*sorted(m for m in sys.modules if '.' not in m))"
    peft, ours = (set(run_python(code.format(f"import {n}")).stdout.split()) for n in ("peft", "peft_sparse"))
    assert len(peft) > 100
    heavy = {"datasets", "evaluate", "pandas", "pyarrow", "scipy", "sklearn", "matplotlib", "tensorboard", "numba"}
    assert not (ours - peft) & heavy, ours - peft
    assert len(ours - peft) < 30, ours - peft


def test_a_folder_loaded_without_the_import_fails_and_says_the_method(tmp_path):
    check(f"""
        import torch, peft_sparse
        from peft import get_peft_model
        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        get_peft_model(model, peft_sparse.SppConfig(target_modules=["0"])).save_pretrained({str(tmp_path)!r})
    """)
    result = run_python(f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})")
    assert result.returncode != 0 and "SPP" in result.stderr.splitlines()[-1]
