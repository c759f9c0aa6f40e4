"""One contender in a process of its own: `python benchmarks/peers NAME JOB THREADS`.

Reads a line with a number of steps, answers with a line of their seconds; the end of input ends it.
"""

import importlib.util
import json
import os
import sys
import time
import warnings
from pathlib import Path

HERE = Path(__file__).parent


def main(name: str, job: str, threads: str) -> None:
    sys.stdout, answers = sys.stderr, sys.stdout
    say = lambda **facts: print(json.dumps(facts), file=answers, flush=True)
    warnings.simplefilter("ignore")
    import torch
    from job import Job, Missing

    torch.set_num_threads(int(threads))
    job = Job(**json.loads(job))
    spec = importlib.util.spec_from_file_location(f"contender_{name}", HERE / f"step_{name}.py")
    contender = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(contender)
        step = contender.build(job)
    except Missing:
        return say(missing="has no such method")
    except ImportError as error:
        return say(missing=f"cannot be imported: {error}")
    l0 = step()  # the first one allocates
    say(torch=torch.__version__, version=version(name), l0=None if l0 is None else float(l0))
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            wait(torch, job.device)
            began = time.perf_counter()
            step()
            wait(torch, job.device)
            seconds.append(time.perf_counter() - began)
        say(seconds=seconds, megabytes=peak(torch, job.device))


def wait(torch, device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak(torch, device: str) -> float:
    """Megabytes at most so far: of the device, or of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    if os.name == "nt":
        return float("nan")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    packages = {
        "sae_lens": "sae-lens",
        "dictionary_learning": "dictionary-learning",
        "sparsify": "eai-sparsify",
        "overcomplete": "overcomplete",
    }
    try:
        return version(packages[name]) if name in packages else ""
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    main(*sys.argv[1:])
