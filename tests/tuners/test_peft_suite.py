"""PEFT's own tests, run against our tuners: what PEFT asks of its methods it asks of ours.

The runner, `peft_suite/run_peft_suite.py` of the shared folder, points the parametrised tests of PEFT's source archive
at the configs that tests/peft_suite/adapter.json names. The archive is that of the PEFT version installed here; pip
fetches it once into pytest's cache. Each run is a process of its own, as the runner sets up paths and the Hub's cache.
"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ADAPTER = Path(__file__).resolve().parents[1] / "peft_suite" / "adapter.json"

# Fewest tests that must pass, by suite, for both methods together: a suite that silently ran nothing is a failure.
# Two methods with the default rows pass 567, 12 and 54 of PEFT 0.20.0's, more of a later PEFT's.
SUITES = {"custom": 550, "multi": 12, "config": 50}


@pytest.fixture(scope="module")
def peft_sdist(pytestconfig: pytest.Config) -> Path:
    """The source archive of the installed PEFT, which carries its tests."""
    version = importlib.metadata.version("peft")
    folder = pytestconfig.cache.mkdir("peft_sdist")
    archive = folder / f"peft-{version}.tar.gz"
    if not archive.exists():
        # no build isolation: pip reads the archive's metadata with the setuptools that is installed here
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder)]
        command = [sys.executable, "-m", "pip", "download", *options, f"peft=={version}"]
        fetched = subprocess.run(command, capture_output=True, text=True)
        if fetched.returncode or not archive.exists():
            reason = fetched.stderr.strip().splitlines()[-1:] or [f"no {archive.name} came"]
            pytest.skip(f"pip could not fetch the source archive of peft {version}: {reason[0]}")
    return archive


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_peft_suite(suite: str, shared: Path, peft_sdist: Path):
    runner = shared / "peft_suite" / "run_peft_suite.py"
    if not runner.exists():
        pytest.skip("peft_suite/run_peft_suite.py is not in the shared folder")
    command = [sys.executable, str(runner), "--sdist", str(peft_sdist), "--adapter", str(ADAPTER)]
    command += ["--suite", suite, "--min", str(SUITES[suite])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    # pytest shows what is printed when the test fails; the last line counts passed, failed and skipped
    print(result.stdout, result.stderr, sep="\n")
    assert result.returncode == 0, (result.stdout.strip().splitlines() or ["the runner printed nothing"])[-1]
