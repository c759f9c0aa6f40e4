"""Findings of a session, remembered: one pass for all that are missing."""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.observe import Kept, declared_settings, observe
from sdl_explorer.models.dictionary import SparseDictionary

KEPT = 48


class CachedFindings:
    """Results by (state, finding, rows, settings), the newest 48."""

    def __init__(self):
        self._found: dict[Hashable, tuple[Any, dict[str, Any]]] = {}
        self._guard = threading.Lock()

    def find(
        self,
        findings: Sequence[Callable],
        state: Hashable,
        dictionary: SparseDictionary,
        rows: Activations,
        known: dict[str, Any],
        settings: dict[str, Any],
        progress: Callable[[float], None] | None = None,
        kept: Callable[[], Kept | None] = lambda: None,
    ) -> list:
        """The results in order. Each finding gets the settings that it declares, out of `known` (where not
        None) and `settings`; a setting that none declares raises TypeError. `state` names the weights and
        what is known of them; of `known`, the anchors and seeds alone can change beside it. `kept()` gives the codes of
        these rows that outlived an earlier pass; it is asked where something is missing."""
        unknown = set(settings) - set().union(*(declared_settings(f) for f in findings))
        if unknown:
            raise TypeError(f"find: no finding in {[f.__name__ for f in findings]} takes {sorted(unknown)}.")
        offered = {name: value for name, value in known.items() if value is not None} | settings
        requests = {f: {k: v for k, v in offered.items() if k in declared_settings(f)} for f in findings}
        told = set(settings) | {"anchors", "seeds"}
        keys = {f: (state, f, rows.n, *((k, _token(v)) for k, v in sorted(requests[f].items()) if k in told)) for f in findings}
        with self._guard:
            found = {f: self._found[keys[f]] for f in findings if keys[f] in self._found}
        missing = [f for f in findings if f not in found]
        if missing:
            asked = [(f, requests[f]) for f in missing]
            results = observe(dictionary, rows.to(dictionary.device), asked, progress=progress, kept=kept())
            # a request is kept with its result, so that an id in a key is not used again meanwhile
            found |= {f: (result, requests[f]) for f, result in zip(missing, results, strict=True)}
            with self._guard:
                self._found |= {keys[f]: found[f] for f in missing}
                for old in list(self._found)[:-KEPT]:
                    del self._found[old]
        return [found[f][0] for f in findings]


def _token(value: Any) -> Hashable:
    """A setting as part of a key: plain values by value, everything else by identity."""
    return value if isinstance(value, (int, float, str, bool, tuple, type(None))) else id(value)
