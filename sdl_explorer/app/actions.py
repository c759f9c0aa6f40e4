"""What the [actions] of fixed words do. Each is an expression that the words match, and a command of the viewer's desk."""

import re
from collections.abc import Callable

from sdl_explorer.diagnosis.compare import ENOUGH

TRAIN = 500


async def _train(desk) -> None:
    await desk.do(desk.session.start, TRAIN if desk.most_steps is None else min(TRAIN, desk.most_steps))


async def _go_back(desk) -> None:
    diverged = desk.snapshot.diverged
    if diverged is None:
        desk.say("No commit is known from before this number went wrong; check one out on the timeline.", "warning")
    else:
        await desk.do(desk.session.revert, diverged.last_finite)


async def _more_pairs(desk) -> None:
    await desk.do(desk.session.control, desk.session.last_control.n_steps, ENOUGH)


async def _anchor(desk) -> None:
    desk.call("anchor")


async def _worst(desk) -> None:
    desk.select_worst()


async def _random(desk) -> None:
    desk.select_random()


async def _relax(desk) -> None:
    desk.relax()


async def _clear(desk) -> None:
    desk.clear_filters()


ACTIONS: dict[str, Callable] = {
    r"\[▸▸ Train 500 steps\]": _train,
    r"\[Go to last finite commit\]": _go_back,
    r"\[Run \d+ more\]": _more_pairs,
    r"\[Anchor\]": _anchor,
    r"Add anchors or class means →": _anchor,
    r"\[Worst\]": _worst,
    r"\[Random\]": _random,
    r"\[Relax\]": _relax,
    r"\[Clear all\]": _clear,
}


def command(action: str) -> Callable | None:
    """What does this; None where nothing does: the browser may send anything."""
    return next((do for expression, do in ACTIONS.items() if re.fullmatch(expression, f"[{action}]") or expression == action), None)
