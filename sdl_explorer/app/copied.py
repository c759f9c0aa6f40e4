"""Copy as Python: lines that give a card's numbers in a cell that has the session."""

from sdl_explorer.diagnosis.compare import Control
from sdl_explorer.diagnosis.compared import Compared
from sdl_explorer.repair import Repair
from sdl_explorer.trial import Trial
from sdl_explorer.views.view import Chosen


def lines_of(reader, view) -> str:
    """For the cell of a notebook: `reader` knows the session and what is looked at."""
    if Control in view.of:
        return f"explorer.scoreboard(before={(reader.compared() or ('', ''))[0]!r}, controls=5)"
    if Compared in view.of:
        last = reader.session.last_compared
        return f"explorer.compare_with({repr(reader.session.commits[0].id) if last is None else last.python})"
    if Repair in view.of or Trial in view.of:
        last = reader.session.last_repair if Repair in view.of else reader.session.last_trial
        return "explorer.log" if last is None else f"explorer.{last.python}.table()"
    findings = [one.__name__ for one in view.of if hasattr(one, "accumulator") and reader.knows(one)]
    chosen = [(one, getattr(reader.look(), one.field)) for one in view.of if isinstance(one, Chosen) and reader.knows(one.finding)]
    lines = [f"explorer.session.revert({reader.session.head.id!r})"]
    lines += [f"explorer.session.find([{', '.join(findings)}])"] if findings else ["explorer.log"]
    lines += [f"explorer.session.find({one.finding.__name__}, {one.setting}={value!r})" for one, value in chosen if value]
    return "\n".join(lines)
