"""A table beside every plot: row focus is selection, with the keyboard alone too."""

import pandas as pd
import panel as pn
from bokeh.models.widgets.tables import NumberFormatter

from sdl_explorer.widgets.kit import RowKeys

PAGE = 12
ROW = 34


class TableTwin(pn.viewable.Viewer):
    """Remote pages of a DataFrame. Its first `latent` or `feature` column makes rows selectable."""

    def __init__(self, host, label: str, on_rows=None, rows: int = PAGE, multiple: bool = False):
        super().__init__()
        self.host, self.on_rows, self.kind = host, on_rows, None
        self._syncing = False
        self.table = pn.widgets.Tabulator(
            pd.DataFrame(),
            pagination="remote",
            page_size=rows,
            height=ROW * (rows + 1) + 60,
            selectable=True if multiple else 1,
            disabled=True,
            show_index=False,
            sizing_mode="stretch_width",
            layout="fit_data_fill",
            css_classes=["sdlx-table"],
        )
        self.table.param.watch(self._picked, "selection")
        self._view = RowKeys(self.table, self._move, label=label)

    def __panel__(self):
        return self._view

    def show(self, frame: pd.DataFrame) -> None:
        """Another frame in the same table; the selection follows the state."""
        self.kind = next((k for k in ("latent", "feature") if k in frame.columns), None)
        self._syncing = True
        try:
            self.table.formatters = {
                name: NumberFormatter(format="0.[0000]") for name in frame.columns if pd.api.types.is_float_dtype(frame[name])
            }
            self.table.value = frame.reset_index(drop=True)
        finally:
            self._syncing = False
        self.sync()

    def sync(self) -> None:
        """Focus the row of the primary."""
        if self.kind is None or self.on_rows is not None or len(self.table.value) == 0:
            return
        primary = getattr(self.host.state, f"primary_{self.kind}")
        rows = (self.table.value[self.kind] == primary).to_numpy().nonzero()[0] if primary is not None else []
        self._focus(int(rows[0]) if len(rows) else None)

    def _focus(self, row: int | None) -> None:
        self._syncing = True
        try:
            self.table.selection = [] if row is None else [row]
            if row is not None:
                self.table.page = row // self.table.page_size + 1
        finally:
            self._syncing = False

    def _move(self, move: str) -> None:
        n = len(self.table.value)
        if n == 0:
            return
        at = self.table.selection[0] if self.table.selection else -1
        page = self.table.page_size
        to = {"up": at - 1, "down": at + 1, "pageup": at - page, "pagedown": at + page, "home": 0, "end": n - 1}[move]
        row = min(max(to, 0), n - 1)
        self._focus(row)
        self._announce([row])

    def _picked(self, event) -> None:
        if not self._syncing:
            self._announce(event.new)

    def _announce(self, rows: list[int]) -> None:
        if self.on_rows is not None:
            self.on_rows(list(rows))
        elif rows and self.kind is not None:
            self.host.select(**{f"{self.kind}s": (int(self.table.value[self.kind].iloc[rows[0]]),)})
