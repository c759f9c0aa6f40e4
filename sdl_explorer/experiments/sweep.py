"""A grid of settings over seeds: `sweep(session, grid, seeds)` and `sdl-explorer sweep FILE`."""

import itertools
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from sdl_explorer.data.sources import Source
from sdl_explorer.experiments.cells import Cell, run_cells, summarise
from sdl_explorer.models.methods import Method, TopK
from sdl_explorer.registry import member
from sdl_explorer.session import Session

OF_SESSION = ("batch_size", "lr", "warmup_steps", "decay_steps", "dead_after")
OF_START = ("normalise", "centre", "pre_bias")  # told where they are not what a session does by itself


def sweep(
    session: Session,
    grid: Mapping[str, Sequence],
    seeds: Sequence[int] = (0, 1, 2),
    *,
    steps: int = 1_000,
    folder,
    say: Callable[[str], None] = lambda text: None,
) -> pd.DataFrame:
    """Train every combination of `grid` for `steps` with every seed, on this session's data, and judge each alike.

        sweep(session, {"method.k": [4, 8], "n_latents": [64, 128]}, seeds=[0, 1, 2], folder="sweeps/k")

    A key is a setting of the session (lr, batch_size, n_latents, ...) or "method.NAME". Each cell is a run folder under
    `folder`; run the same again to go on. The table is tidy: a row per cell, failed cells named; `summarise(table, by)` gives
    means and intervals. The session itself is left as it is.
    """
    kept = {name: getattr(session, name) for name in OF_SESSION}
    kept |= {name: getattr(session, name) for name in OF_START if getattr(session, name) != session.param[name].default}
    return _run(
        session.source, session.method, {"n_latents": session.n_latents, **kept}, grid, seeds, steps, Path(folder), session.device, say
    )


def sweep_file(
    path, folder=None, device: str = "auto", say: Callable[[str], None] = lambda text: None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The sweep that a TOML file describes: (a row per cell, means with intervals), also as CSV files in its folder.

    steps = 1000
    seeds = [0, 1, 2]
    n_latents = 128
    [source]
    kind_of_data = "LinearBench"
    n_features = 100
    d_in = 77
    [method]
    name = "TopK"
    [grid]
    "method.k" = [2, 3, 4]
    """
    path = Path(path).expanduser()
    text = tomllib.loads(path.read_text())
    data, recipe, grid = dict(text.pop("source", {})), dict(text.pop("method", {})), text.pop("grid", {})
    steps, seeds = text.pop("steps", 1_000), text.pop("seeds", [0, 1, 2])
    source = member(Source, data.pop("kind_of_data", "LinearBench"))(**data)
    method = member(Method, recipe.pop("name", TopK.__name__))(**recipe)
    folder = Path(folder) if folder is not None else path.with_suffix("")
    settings = {"n_latents": 4 * source.width_in, **text}
    table = _run(source, method, settings, grid, seeds, steps, folder, device, say)
    summary = summarise(table, list(grid))
    table.to_csv(folder / "cells.csv", index=False)
    summary.to_csv(folder / "summary.csv", index=False)
    return table, summary


def _run(source, method, base: dict, grid, seeds, steps, folder: Path, device: str, say) -> pd.DataFrame:
    cells = list(_cells(source, method, base, grid, seeds, steps))
    folder.mkdir(parents=True, exist_ok=True)
    return run_cells(cells, folder, device, say)


def _cells(source, method, base: dict, grid, seeds, steps):
    known = {"n_latents", *OF_SESSION, *OF_START}
    for name in {*grid, *base}:
        if name not in known and not (name.startswith("method.") and name.removeprefix("method.") in method.param):
            own = ", ".join(f"method.{p}" for p in method.param if p != "name")
            raise ValueError(f"sweep: there is no setting {name!r}. There are: {', '.join(sorted(known))}, {own}.")
    for values in itertools.product(*grid.values()):
        labels = dict(zip(grid, values, strict=True))
        changed = {k.removeprefix("method."): v for k, v in labels.items() if k.startswith("method.")}
        kept = {k: v for k, v in method.param.values().items() if k != "name"}
        settings = base | {k: v for k, v in labels.items() if not k.startswith("method.")}
        n_latents = settings.pop("n_latents")
        for seed in seeds:
            yield Cell(labels, source, type(method)(**kept | changed), n_latents, steps, seed, settings=settings)
