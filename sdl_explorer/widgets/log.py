"""C5: one sentence per commit, as a table that the keyboard can walk."""

import pandas as pd
import panel as pn

from sdl_explorer.views.history import LogLine, log_lines, log_reading
from sdl_explorer.widgets.kit import Text, button, sheet
from sdl_explorer.widgets.table_twin import TableTwin


def log_table(commits, look) -> pd.DataFrame:
    return pd.DataFrame(log_lines(commits, look), columns=LogLine._fields)


class Log(pn.viewable.Viewer):
    def __init__(self, host):
        super().__init__()
        self.host, self._drawn, self._row = host, None, None
        self.reading = Text("", role="status", css_classes=["sdlx-reading"])
        self.table = TableTwin(host, "Log of the run", on_rows=self._chosen, rows=8)
        self.python = Text("", tone="quiet", visible=False, css_classes=["sdlx-python"])
        self.checkout = button("Check out", "log-checkout", self._checkout, disabled=True)
        self.show = button("Show the Python", "log-python", self._python, disabled=True)
        buttons = pn.Row(self.checkout, self.show, margin=0)
        self._view = sheet(Text("What has happened?", tag="h2"), self.reading, self.table, buttons, self.python, name="card-C5")

    def __panel__(self):
        return self._view

    def refresh(self) -> None:
        commits, head = self.host.session.commits, self.host.session.head.id
        self.checkout.disabled = self._row is None or self.host.snapshot.running or not self.host.session.writable
        if self._drawn == (commits, head):
            return
        self._drawn, self._row = (commits, head), None
        self.reading.text = log_reading(commits)
        frame = log_table(commits, self.host.look())
        frame["branch"] = frame["on_branch"].map({True: "this branch", False: "another branch"})
        self.table.show(frame[["shape", "sentence", "branch", "commit"]])  # the sentence begins with the step

    def _chosen(self, rows: list[int]) -> None:
        self._row = rows[0] if rows else None
        self.show.disabled = self._row is None
        self.refresh()

    def _commit(self) -> str:
        return self.table.table.value["commit"].iloc[self._row]

    async def _checkout(self, event) -> None:
        commit = self._commit()
        await self.host.do(self.host.session.revert, commit, said=f"Checked out {commit}. Nothing was deleted.")

    def _python(self, event) -> None:
        line = next(line for line in log_lines(self.host.session.commits, self.host.look()) if line.commit == self._commit())
        self.python.text, self.python.visible = line.python or f"session.revert({line.commit!r})", True
