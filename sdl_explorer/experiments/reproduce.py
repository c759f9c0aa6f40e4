"""`sdl-explorer reproduce NAME`: the published tables and figures of arXiv 2512.05534 as commands."""

from collections.abc import Callable
from pathlib import Path

from sdl_explorer.experiments.anchoring import anchoring
from sdl_explorer.experiments.figures import fig4, fig6, fig7
from sdl_explorer.experiments.outcome import Outcome
from sdl_explorer.experiments.tables import SIZES, TABLES, run_table

FIGURES: dict[str, Callable[..., Outcome]] = {"fig4": fig4, "fig6": fig6, "fig7": fig7, "anchoring": anchoring}
NAMES = (*TABLES, *FIGURES)


def reproduce(name: str, size: str, folder, device: str = "auto", say: Callable[[str], None] = lambda text: None, **data) -> Outcome:
    """Run one experiment and write its data (CSV), figure, manifest and page into `folder`, its runs below it.

    Run it again to go on where it was interrupted. `data`: `images` and `model` of `anchoring`.
    """
    if name not in NAMES or size not in SIZES:
        raise ValueError(f"reproduce: {name!r} at {size!r} is unknown. There are {', '.join(NAMES)}; sizes: {', '.join(SIZES)}.")
    given = {key: value for key, value in data.items() if value is not None}
    if given and name != "anchoring":
        raise ValueError(f"reproduce {name}: {', '.join(given)} belongs to anchoring. Leave it out.")
    folder = Path(folder).expanduser()
    outcome = run_table(name, size, folder, device, say) if name in TABLES else FIGURES[name](size, folder, device, say, **given)
    outcome.write(folder, name)
    return outcome
