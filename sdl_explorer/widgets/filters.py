"""Filters as chips, each with an ×; a filter selects the latents that pass. One more chip counts what is selected."""

import panel as pn

from sdl_explorer.state import keep, strictest
from sdl_explorer.views.words import count
from sdl_explorer.widgets.kit import Words, button, stack


class FilterChips(pn.viewable.Viewer):
    def __init__(self, host):
        super().__init__()
        self.host, self._drawn = host, None
        self.said = Words(host, "", role="status", css_classes=["sdlx-filter-said"])
        self._chips = pn.Row(margin=0, styles={"flex-wrap": "wrap"})  # in a notebook a FlexBox takes later stylesheets from the internet
        self._view = stack(self._chips, self.said, visible=False, css_classes=["sdlx-filters"])

    def __panel__(self):
        return self._view

    def refresh(self) -> None:
        filters, table = self.host.state.filters, self.host.cached_table()
        selected = len(self.host.state.selected_latents)
        if self._drawn == (filters, selected, id(table)):
            return
        self._drawn = (filters, selected, id(table))
        self._view.visible = bool(filters) or selected > 1
        if not self._view.visible:
            return
        chips = [button(f"{one.label} ×", "chip", lambda event, one=one: self._remove(one)) for one in filters]
        if filters:
            chips.append(button("Clear all", "clear-all", lambda event: self.host.clear_filters()))
        if selected > 1:
            chips.append(button(f"{count(selected)} latents selected ×", "selected", lambda event: self.host.select(latents=())))
        self._chips.objects = chips
        self.said.text = self._say(filters, table) if filters and table is not None else ""

    def _say(self, filters, table) -> str:
        kept = int(keep(filters, table).sum())
        if kept:
            return f"{count(kept)} of {count(len(table))} latents."
        worst, removed = strictest(filters, table)
        return f"0 of {count(len(table))} latents. The strictest filter is {worst.label} (removes {count(removed)}). [Relax] [Clear all]"

    def _remove(self, one) -> None:
        self.host.filter(*(f for f in self.host.state.filters if f != one))
