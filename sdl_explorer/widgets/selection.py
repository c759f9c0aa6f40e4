"""Bokeh's selected indices and the viewer's selection, both ways."""

import holoviews as hv
from holoviews.core import Dimensioned

KINDS = ("latent", "feature")


class PlotLink:
    """Links one plot with `host.state`: its first source that has a `latent` or `feature` column.

    Reading: a tap or a brush gives row indices; their ids become the selection, a single one the primary too.
    Writing: at every redraw the state's ids become the selected indices, so that a plot never disagrees with the state.
    """

    def __init__(self, host):
        self.host = host
        self._sources: dict[str, tuple] = {}  # by document root, since each display has a source of its own
        self._writing = False

    @property
    def linked(self) -> bool:
        """The plot has something to select."""
        return bool(self._sources)

    def attach(self, element: Dimensioned) -> Dimensioned:
        """The element, with this link among its hooks. Plots of several panels have nothing to select."""
        if isinstance(element, hv.Layout):
            return element
        hooks = hv.Store.lookup_options("bokeh", element, "plot").kwargs.get("hooks", [])
        return element.opts(hooks=[*(h for h in hooks if h != self._hook), self._hook], backend="bokeh")

    def _hook(self, plot, element) -> None:
        for part in plot.traverse(lambda p: p):
            source = getattr(part, "handles", {}).get("source")
            kind = next((k for k in KINDS if source is not None and k in source.data), None)
            if kind is None:
                continue
            if source.id not in self._sources:
                self._sources[source.id] = source
                source.selected.on_change("indices", self._reader(source, kind))
            self._write(source, kind)
            return

    def _write(self, source, kind: str) -> None:
        chosen = set(getattr(self.host.state, f"selected_{kind}s"))
        rows = [row for row, i in enumerate(source.data[kind]) if int(i) in chosen] if chosen else []
        if list(source.selected.indices) != rows:
            self._writing = True
            try:
                source.selected.indices = rows
            finally:
                self._writing = False

    def _reader(self, source, kind: str):
        def read(attr, old, rows) -> None:
            if not self._writing:
                ids = source.data[kind]
                self.host.select(**{f"{kind}s": tuple(int(ids[row]) for row in rows if row < len(ids))})

        return read
