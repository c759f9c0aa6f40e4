"""What an experiment leaves: a tidy table, a page of words, a figure, and every setting."""

import json
import platform
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from sdl_explorer.models.atomic import write_file
from sdl_explorer.views.reproduced import save_figure


class Outcome(NamedTuple):
    """`settings` must hold whatever decides the numbers."""

    table: pd.DataFrame
    page: str
    figure: object  # a HoloViews element, of views/reproduced.py
    settings: dict

    def write(self, folder: Path, name: str) -> None:
        """NAME.csv, .md, .html (no network needed) and .json, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        machine = {"processor": platform.processor() or platform.machine(), "system": platform.system()}
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        record = {"experiment": name, "machine": machine, "versions": versions, **self.settings}
        write_file(folder / f"{name}.json", json.dumps(record, indent=1, default=str).encode())
        write_file(folder / f"{name}.csv", self.table.to_csv(index=False).encode())
        write_file(folder / f"{name}.md", self.page.encode())
        save_figure(self.figure, folder / name)


def markdown_table(table: pd.DataFrame) -> str:
    """A table in Markdown; numbers with three digits, what is missing as a dash."""
    cell = lambda value: "–" if value is None or value != value else f"{value:.3g}" if isinstance(value, float) else str(value)
    rows = [list(table.columns), ["---"] * len(table.columns), *([cell(v) for v in row] for row in table.itertuples(index=False))]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
