"""Which repairs were tried, what they gained against plain steps and against a sham, and which passed."""

import textwrap

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.repair import LEVEL, Repair
from sdl_explorer.views.frame import frame, limits, row_ticks
from sdl_explorer.views.intervals import Arm, under, whiskers
from sdl_explorer.views.problems import token_of
from sdl_explorer.views.theme import TEXT
from sdl_explorer.views.view import view
from sdl_explorer.views.words import NO_REPAIR, count, plural

ARMS = (
    Arm("vs untreated", "against as many plain steps", "decoder", "circle", 0.12),
    Arm("vs sham", "against resetting at random (sham)", "encoder", "diamond", -0.12),
)
ENDS = [f"{arm.column}{end}" for arm in ARMS for end in ("", " low", " high")]
COLUMNS = ("problem", "verdict", "advice", "harm", *ENDS, "kept", "why")
PASSED = "better than as many plain steps and than the sham"
MOST = 110  # characters under a row


@view("Which repairs pass, and by how much?", id="R5", of=(Repair,), page="intervene", cost="job", columns=COLUMNS)
def repairs(found, look):
    """One row for each verdict that was looked at, in the order in which it was tried: what its advice gained against as many plain
    steps (circle) and against the sham (diamond), with intervals that all tries share. It passes where both intervals lie right of zero.
    Later ones were tried on top of those that passed. Rows without marks could not be tried, and say why."""
    rows = table_of(found).assign(label=lambda table: table["problem"], verdict=lambda table: np.where(table["kept"], "kept", "not kept"))
    low, high = limits([-0.05, 0.05, *rows[ENDS].to_numpy(dtype=float).ravel()])
    layers = [layer for arm in ARMS for layer in whiskers(rows, arm, 1.0, look)]
    words = [f"✓ kept: {PASSED}" if one.kept else f"✗ not kept: {_shortly(one.why)}" for one in found.tried]
    layers += [hv.VLine(0).opts(color=TEXT[look.theme], line_width=1), under(words, rows["kept"], low + 0.01 * (high - low), look)]
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(low, high),
        ylim=(0.3 - len(rows), 0.6),
        xlabel="← worse   gain, as a share of the features or of the variance   better →",
        ylabel="",
        title=f"{plural(found.runs, 'pair')} of {count(found.n_steps)} steps a try, {100 * (1 - LEVEL / found.n_tries):.3g} % intervals",
        height=170 + 54 * len(rows),
        columns=1,
        yticks=row_ticks(
            f"{token_of(one.verdict).shape} {token_of(one.verdict).word} → {type(one.verdict.advice).__name__}" for one in found.tried
        ),
    )


@repairs.reading
def _(found, look):
    return "\n".join(found.lines[:-1] if found.kept and not found.applied else found.lines)  # the form above says how to apply it


@repairs.table
def _(found, look):
    return table_of(found)


@repairs.empty
def _(found, look):
    if found is None:
        return NO_REPAIR
    return None if found.tried else found.reading


def table_of(found: Repair) -> pd.DataFrame:
    """The repair's own table with the words of its verdicts; not-a-number where nothing could be tried."""
    words = [token_of(one.verdict).word for one in found.tried]
    return found.table().assign(problem=words).reindex(columns=list(COLUMNS))


def _shortly(why: str) -> str:
    """Its first sentence; the numbers are drawn above it."""
    first = why.partition(". ")[0] if why.startswith("It ") else why
    return textwrap.shorten(first, MOST, placeholder=" …")
