"""The loss around the primary latent and its partner: which region they are in, and what bends inside it."""

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.landscape import Landscape, probe_landscape
from sdl_explorer.views.frame import TYPE, colorbar_style, drawable, empty_table, finite, frame, sample
from sdl_explorer.views.theme import BACKGROUND, SEQUENTIAL, TEXT
from sdl_explorer.views.view import Chosen, view
from sdl_explorer.views.words import NO_SELECTION, count, plural

OF = (check_health, Chosen(probe_landscape, "latents", "primary_latent"))
NAMED = 9  # regions with a number on the map
SAID = 4  # regions in the sentence
EDGE = 0.14  # radians around the map: a mark on its border is whole
REGIONS = ("number", "sets", "share of the map", "least loss", "largest loss")
QUARTERS = [(k * np.pi / 2, word) for k, word in enumerate(("0", "π/2", "π", "3π/2", "2π"))]
ONLY_TWO = "2-D slice; most directions are not shown"
SEAM = "#000000"  # of borders and marks over cividis, which is the same in both themes
HALO = "#FFFFFF"


# L1 ------------------------------------------------------------------------------------------------------------------


@view("Which region are two encoder rows in, and what loss is left there?", id="L1", of=OF, page="landscape", cost="job")
def region_map(health, landscape, look):
    """Both encoder rows turn in one plane, each at its own length in it. Colour: the loss once the decoder rows of the two are at their
    least squares, all other latents held. Black lines: borders, where other inputs fire them; numbers: the largest regions, told in the
    sentence and the table. ● where the rows are now, ★ the least loss on the map. The loss inside a region is often flat, so descent
    changes it only by crossing a border."""
    found, theme = landscape.map, look.theme
    turns, step = (-EDGE, 2 * np.pi + EDGE), 2 * np.pi / len(found.angles[0])
    layers: list = _image(found.profiled, (0, 0, 2 * np.pi, 2 * np.pi), "loss left", theme)
    layers.append(hv.Segments(_borders(found.region, step), ["x0", "y0", "x1", "y1"]).opts(color=SEAM, line_width=1))
    places = _middles(found.region, min(NAMED, len(found.regions)))
    at = {"x": [step * (x + 0.5) for _, x in places], "y": [step * (y + 0.5) for y, _ in places]}
    layers.append(hv.Points(at, ["x", "y"]).opts(color=HALO, size=20, alpha=0.85, line_color=SEAM))
    numbers = hv.Labels({**at, "text": [str(i + 1) for i in range(len(places))]}, ["x", "y"], "text")
    layers.append(numbers.opts(text_color=SEAM, **TYPE))
    layers += _here(found.here, theme) + _best(found, theme)
    first, second = landscape.latents
    return frame(
        hv.Overlay(layers),
        look,
        xlim=turns,
        ylim=turns,
        xlabel=f"angle of latent {first}'s encoder row",
        ylabel=f"angle of latent {second}'s encoder row",
        title=f"{ONLY_TWO}. Plane of {found.plane[0]} and {found.plane[1]}",
        height=460,
        xticks=QUARTERS,
        yticks=QUARTERS,
        show_grid=False,
    )


@region_map.reading
def _(health, landscape, look):
    found, (first, second) = landscape.map, landscape.latents
    silent = [f"latent {i} is silent" for i, quiet in zip(landscape.latents, landscape.silent, strict=True) if quiet]
    regions = "; ".join(
        f"{i + 1}: {region.label} on {region.share:.0%}, loss {_span(region.least, region.largest)}"
        for i, region in enumerate(found.regions[:SAID])
    )
    also = f"; {count(len(found.regions) - SAID)} more in the table" if len(found.regions) > SAID else ""
    return (
        f"Latents {first} and {second}{': ' + ', '.join(silent) if silent else ''}. Loss {landscape.loss:.4g} on "
        f"{plural(landscape.n_rows, 'row')}; with their decoder rows at least squares {found.profiled_here:.4g}, and "
        f"{found.best[0]:.4g} at the best angles of this plane. {plural(len(found.regions), 'region')}, by what fires either latent: "
        f"{regions}{also}."
    )


@region_map.table
def _(health, landscape, look):
    if nothing(landscape):
        return empty_table(*REGIONS)
    rows = [(i + 1, r.label, r.share, r.least, r.largest) for i, r in enumerate(landscape.map.regions)]
    return pd.DataFrame(rows, columns=REGIONS)


@region_map.empty
def _(health, landscape, look):
    return nothing(landscape)


# L2 ------------------------------------------------------------------------------------------------------------------


@view("Is the loss convex in each block inside this region?", id="L2", of=OF, page="landscape", cost="job")
def biconvex_slice(health, landscape, look):
    """The loss of the inputs that tell regions apart (above), as the encoder rows of the two latents move along one random direction and
    their decoder rows along another, as far as each input keeps the latents that it fires. Along either axis it is convex
    (Theorem 3.2 of arXiv 2512.05534, v5/6); along a diagonal it need not be. Lines join equal losses. ● the latents as they are."""
    cut, theme = landscape.slice, look.theme
    reads, writes = (_ends(x) for x in (cut.reads, cut.writes))
    layers: list = _image(cut.loss, (reads[0], writes[0], reads[1], writes[1]), "loss", theme)
    layers += _level_lines(cut)
    layers.append(_mark([0.0], [0.0], "circle", "now", 12))
    return frame(
        hv.Overlay(layers),
        look,
        xlim=reads,
        ylim=writes,
        xlabel="encoder rows along A (lengths of the rows)",
        ylabel="decoder rows along B (lengths)",
        title=f"{ONLY_TWO}. Latents {landscape.latents[0]} and {landscape.latents[1]}",
        height=400,
        show_grid=False,
    )


@biconvex_slice.reading
def _(health, landscape, look):
    cut = landscape.slice
    each = "convex along the encoder and along the decoder" if cut.convex_in_each else "not convex in each block"
    both = (
        "; along the diagonals it is convex too"
        if cut.convex_in_both
        else f"; along a diagonal it rises {cut.gap_both:.2g} above its chord"
    )
    return (
        f"On this slice the loss of {_named(landscape.map.probes)} alone is {each}: no middle lies above its chord by more "
        f"than {max(cut.gap_reads, cut.gap_writes, 0):.2g} of the largest loss{both}. {cut.inside:.0%} of the slice has the "
        f"pattern of the model, up to {cut.reads[-1]:.2g} lengths of the encoder rows."
    )


@biconvex_slice.table
def _(health, landscape, look):
    if nothing(landscape):
        return empty_table("encoder", "decoder", "loss")
    cut = landscape.slice
    t, s = np.meshgrid(cut.writes, cut.reads, indexing="ij")
    return pd.DataFrame({"encoder": s.ravel(), "decoder": t.ravel(), "loss": cut.loss.ravel()})


@biconvex_slice.empty
def _(health, landscape, look):
    return nothing(landscape)


# what they share -----------------------------------------------------------------------------------------------------


def nothing(landscape: Landscape | None) -> str | None:
    """Why there is no landscape: it is that of the primary latent."""
    return NO_SELECTION if landscape is None else None


def _named(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]


def _image(losses: np.ndarray, bounds: tuple[float, float, float, float], label: str, theme: str) -> list:
    """Losses (rows upwards) as colours; nothing where none is finite."""
    if not finite(losses).size:
        return []
    image = hv.Image(drawable(losses)[::-1], bounds=bounds, kdims=["a", "b"], vdims=["loss"])
    style = {"cmap": SEQUENTIAL, "clim": _range(losses), "colorbar": True, "clabel": label, "colorbar_opts": colorbar_style(theme)}
    return [image.opts(**style, tools=["hover"])]


def _span(least: float, largest: float) -> str:
    return f"{least:.3g}" if f"{least:.3g}" == f"{largest:.3g}" else f"{least:.3g} to {largest:.3g}"


def _range(values) -> tuple[float, float]:
    """Colour limits that hold every finite value."""
    known = finite(values)
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    return (low, high) if high - low > 1e-9 * max(abs(high), 1e-300) else (low, low + max(abs(low), 1.0) * 0.01)


def _ends(values) -> tuple[float, float]:
    known = finite(values)
    return (float(known.min()), float(known.max())) if known.size > 1 and known.min() < known.max() else (-1.0, 1.0)


def _borders(region: np.ndarray, step: float) -> list[tuple[float, float, float, float]]:
    """Edges between cells of different regions."""
    y, x = np.nonzero(region[:, 1:] != region[:, :-1])
    upright = [(step * (b + 1), step * a, step * (b + 1), step * (a + 1)) for a, b in zip(y, x, strict=True)]
    y, x = np.nonzero(region[1:] != region[:-1])
    return upright + [(step * b, step * (a + 1), step * (b + 1), step * (a + 1)) for a, b in zip(y, x, strict=True)]


def _middles(region: np.ndarray, n: int) -> list[tuple[int, int]]:
    """For each of the first n regions the cell furthest from its borders, (row, column)."""
    places = []
    for i in range(n):
        inside, place = region == i, (0, 0)
        while inside.any():
            place = tuple(int(k) for k in np.argwhere(inside)[inside.sum() // 2])
            padded = np.pad(inside, 1)
            inside = inside & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
        places.append(place)
    return places


def _here(here, theme: str) -> list:
    """Where the rows are; a line where one of them has no angle."""
    first, second = here
    if first is not None and second is not None:
        return [_mark([first], [second], "circle", "now", 13)]
    lines: list = []
    if first is not None:
        lines.append(hv.VLine(first).opts(color=HALO, line_width=3, line_dash="dashed"))
    if second is not None:
        lines.append(hv.HLine(second).opts(color=HALO, line_width=3, line_dash="dashed"))
    return [*lines, sample("now: the other row has no angle", "dash", TEXT[theme])] if lines else []


def _best(found, theme: str) -> list:
    loss, first, second = found.best
    return [_mark([first], [second], "star", "least loss on the map", 17)] if np.isfinite(loss) else []


def _mark(x, y, marker: str, label: str, size: int) -> hv.Points:
    """A mark that is seen on any colour of the map."""
    points = hv.Points((x, y), ["x", "y"], label=label)
    return points.opts(marker=marker, color=HALO, line_color=SEAM, line_width=2, size=size)


def _level_lines(cut) -> list:
    """Lines of equal loss, eight of them, closer where the loss is low."""
    import contourpy

    low, high = _range(cut.loss)
    if not np.isfinite(cut.loss).all():
        return []
    levels = low + (high - low) * np.linspace(0, 1, 10)[1:-1] ** 2
    lines = contourpy.contour_generator(cut.reads, cut.writes, cut.loss)
    paths = [line for level in levels for line in lines.lines(level)]
    return [hv.Path(paths).opts(color=BACKGROUND["light"], line_width=1, alpha=0.7)] if paths else []
