"""The pages: a question each, and the cards that answer it."""

from sdl_explorer.registry import members
from sdl_explorer.training.interventions import Intervention
from sdl_explorer.views.view import find_view, views
from sdl_explorer.widgets.absorbed import Absorbed
from sdl_explorer.widgets.card import Card
from sdl_explorer.widgets.concepts import ChildrenCard, LabelCard
from sdl_explorer.widgets.control import ControlForm
from sdl_explorer.widgets.examples import ExampleCards
from sdl_explorer.widgets.intervene import OWN, form_of
from sdl_explorer.widgets.log import Log
from sdl_explorer.widgets.page import Page
from sdl_explorer.widgets.pair import PairForm
from sdl_explorer.widgets.preview import Held, Preview
from sdl_explorer.widgets.problems import Problems
from sdl_explorer.widgets.repair import RepairForm
from sdl_explorer.widgets.theory import TheoryCards
from sdl_explorer.widgets.tiles import Tiles
from sdl_explorer.widgets.trial import TrialForm
from sdl_explorer.widgets.twins import TwinCard

QUESTIONS = {
    "Overview": "Is this dictionary healthy, and what is wrong first?",
    "Alignment": "Which true features were learned, by which latent, and how well?",
    "Latents": "Does each latent mean one thing, several, or nothing?",
    "Intervene": "What can be repaired, and what would it change?",
    "Absorption": "Which latents go silent where a more special one takes over?",
    "Landscape": "Why did training stop here, and do the theorems apply to this model?",
    "Compare": "Did it help more than simply training on?",
}


def cards(host, page: str, leave_out=()) -> list[Card]:
    """The registered views of a page, in the order of their ids' registration."""
    return [Card(host, view) for view in views(page) if view.id not in leave_out]


def _overview(host):
    return [Tiles(host), Problems(host), *cards(host, "overview", leave_out=("O2",)), Card(host, find_view("A2"))]


def _alignment(host):
    return cards(host, "alignment")


def _latents(host):
    return [*(Card(host, find_view(id)) for id in ("P2", "P1", "P3", "P4", "P6")), ExampleCards(host)]


def _intervene(host):
    kinds = {name: kind for name, kind in members(Intervention).items() if kind is not Held.makes}
    ours = [name for name in OWN if name in kinds]
    forms = [form_of(host, kinds[name]) for name in dict.fromkeys([*ours, *kinds])]
    preview = Preview(host, Card(host, find_view("R3")))
    repair, trial = Card(host, find_view("R5")), Card(host, find_view("R6"))
    others = cards(host, "intervene", leave_out=("R3", "R5", "R6"))
    return [RepairForm(host), repair, *forms, preview, Held(host), *others, TrialForm(host, forms), trial]


class FamilyCard(Card):
    """A card about true parents and children; it is not there where nobody knows any."""

    def refresh(self) -> None:
        self._view.visible = self.host.has_families
        if self._view.visible:
            super().refresh()


def _absorption(host):
    of_truth = [FamilyCard(host, find_view(id)) for id in ("H1", "H2", "H3", "H4")]
    suspected = [*cards(host, "absorption", leave_out=[card.view.id for card in of_truth]), PairForm(host)]
    labelled = [LabelCard(host, find_view("H7")), ChildrenCard(host)]
    if host.has_families:
        return [*of_truth, Absorbed(host), *suspected, *labelled]
    return [*labelled, *suspected, Absorbed(host), *of_truth]


def _landscape(host):
    return [*(Card(host, find_view(id)) for id in ("L1", "L3", "L2", "T")), TheoryCards(host)]


def _compare(host):
    order = {"C3": 0, "C1": 1}
    pairs = sorted(cards(host, "compare", leave_out=("C6",)), key=lambda card: order.get(card.view.id, 2))
    return [ControlForm(host), *pairs, TwinCard(host), Log(host)]


PARTS = {
    "Overview": _overview,
    "Alignment": _alignment,
    "Latents": _latents,
    "Intervene": _intervene,
    "Absorption": _absorption,
    "Landscape": _landscape,
    "Compare": _compare,
}


def make(host, title: str, visible: bool = False) -> Page:
    """One page of an explorer."""
    return Page(title, QUESTIONS[title], lambda: PARTS[title](host), visible=visible)
