"""What is wrong first, and two buttons for each: look at it, or open what could help. Nothing is applied from here."""

from sdl_explorer.diagnosis.explain import explain
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.verdict import Verdict
from sdl_explorer.views.problems import SHOWN_ON, problems_html
from sdl_explorer.views.view import find_view
from sdl_explorer.widgets.card import Card
from sdl_explorer.widgets.kit import Html


class Problems(Card):
    """The verdicts as sentences."""

    def __init__(self, host):
        super().__init__(host, find_view("O2"))
        self._verdicts: list[Verdict] = []
        self.sentences = Html("", on_pick=self._pick, css_classes=["sdlx-problems"])

    def needs(self):
        """After the numbers of the tiles, which need not wait for it; while training, in every other round."""
        health, mine = (self.host.findings.now(finding) for finding in (check_health, explain))
        return ([explain] if health is not None and (mine is None or mine.version < health.version) else []), []

    def _draw(self, found, look) -> None:
        self._verdicts = found.values[0]
        self.sentences.html = problems_html(self._verdicts, look)
        self._plot.objects = [self.sentences]

    def _pick(self, pick: str) -> None:
        place, _, what = pick.partition(" ")
        if not place.isdigit() or int(place) >= len(self._verdicts):
            return
        verdict = self._verdicts[int(place)]
        if what == "show":
            self.host.select(latents=verdict.latents, page=SHOWN_ON.get(verdict.id, "Latents"))
        elif what == "help":
            self.host.propose(verdict)
