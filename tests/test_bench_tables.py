"""The README's table of speeds is the one that was measured."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def step():
    spec = importlib.util.spec_from_file_location("benchmark_step", ROOT / "benchmarks" / "step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_says_what_was_measured():
    runs = json.loads((ROOT / "benchmarks" / "results" / "step-cpu.json").read_text())["runs"]
    assert {(run["job"]["method"], run["job"]["m"]) for run in runs} == {
        (method, m) for method in step().METHODS for m in (4096, 16384, 65536)
    }
    assert step().summary(runs) in (ROOT / "README.md").read_text()


def test_a_line_compares_with_the_fastest_other_library():
    figure = lambda speed: {"samples_a_second": speed, "of_the_floor": speed / 1000}
    found = {"floor": figure(1000), "ours": figure(900), "bare": figure(800), "sae_lens": figure(100), "overcomplete": figure(300)}
    job = {"method": "relu", "m": 4096, "l0": 64}
    line = step().summary([{"job": job, "figures": found}]).splitlines()[-1]
    assert line == "| ReLU, L0 near 64 | 4,096 | 900 | 0.90 | 3.0x (overcomplete) | 9.0x |"
    del found["overcomplete"], found["sae_lens"]
    assert step().summary([{"job": job | {"l0": 0}, "figures": found}]).splitlines()[-1] == "| ReLU, dense | 4,096 | 900 | 0.90 | - | - |"
