"""The model's history: commits in order, and what can be done from one of them."""

import panel as pn

from sdl_explorer.views.history import sentence
from sdl_explorer.views.theme import commit_mark
from sdl_explorer.views.words import count
from sdl_explorer.widgets.kit import CommitTicks, Text, button, row, stack


def lineage(commits, head) -> set[str]:
    """Ids of a commit and its ancestors."""
    parents = {commit.id: commit.parent for commit in commits}
    line, at = set(), head
    while at in parents and at not in line:
        line.add(at)
        at = parents[at]
    return line


class Timeline(pn.viewable.Viewer):
    def __init__(self, host):
        super().__init__()
        self.host = host
        self.ticks = CommitTicks(self._pick, css_classes=["sdlx-timeline"])
        self.said = Text("", role="status", css_classes=["sdlx-commit"])
        self.checkout = button("Check out", "checkout", self._checkout)
        self.compare = button("Compare with now", "compare", self._compare)
        self.branch = button("Copy as Python", "commit-python", self._python)
        self.python = Text("", tone="quiet", visible=False, css_classes=["sdlx-python"])
        self._detail = row(self.said, self.checkout, self.compare, self.branch, visible=False)
        self._view = stack(self.ticks, self._detail, self.python)

    def __panel__(self):
        return self._view

    def refresh(self) -> None:
        commits, head = tuple(self.host.session.commits), self.host.session.head
        line = lineage(commits, head.id if head else None)
        ticks = [
            {
                "id": commit.id,
                "step": f"{count(commit.step)}",
                "glyph": commit_mark(commit.kind).shape,
                "kind": commit.kind,
                "label": sentence(commit) + (" (checked out)" if head and commit.id == head.id else ""),
                "current": bool(head and commit.id == head.id),
                "ghost": commit.id not in line,
            }
            for commit in commits
        ]
        if ticks != self.ticks.commits:
            self.ticks.commits = ticks
        picked = self._picked()
        self._detail.visible = picked is not None
        if picked is not None:
            self.said.text = sentence(picked)
            self.checkout.disabled = self.host.snapshot.running or not self.host.session.writable
        else:
            self.python.visible = False

    def _picked(self):
        return next((commit for commit in self.host.session.commits if commit.id == self.ticks.picked), None)

    def _pick(self, commit: str) -> None:
        self.ticks.picked = "" if commit == self.ticks.picked else commit
        self.python.visible = False
        self.refresh()

    async def _checkout(self, event) -> None:
        commit = self._picked()
        await self.host.do(self.host.session.revert, commit, said=f"Checked out {sentence(commit)}. Nothing was deleted.")

    def _compare(self, event) -> None:
        head = self.host.session.head
        self.host.state.param.update(compare=(self._picked().id, head.id), page="Compare")

    def _python(self, event) -> None:
        self.python.text = self._picked().python or f"session.revert({self._picked().id!r})"
        self.python.visible = not self.python.visible
