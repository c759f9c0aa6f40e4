"""Findings of a session, remembered: one pass for all that are missing."""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.observe import declared_settings, observe
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
    ) -> list:
        """The results in order. Each finding gets the settings that it declares, out of `known` (where not
        None) and `settings`; a setting that none declares raises TypeError. `state` names the weights."""
        unknown = set(settings) - set().union(*(declared_settings(f) for f in findings))
        if unknown:
            raise TypeError(f"find: no finding in {[f.__name__ for f in findings]} takes {sorted(unknown)}.")
        offered = {name: value for name, value in known.items() if value is not None} | settings
        requests = {f: {k: v for k, v in offered.items() if k in declared_settings(f)} for f in findings}
        keys = {f: (state, f, rows.n, *((k, _token(v)) for k, v in sorted(requests[f].items()))) for f in findings}
        missing = [f for f in findings if keys[f] not in self._found]
        if missing:
            results = observe(dictionary, rows.to(dictionary.device), [(f, requests[f]) for f in missing], progress=progress)
            with self._guard:  # a request is kept with its result, so that an id in a key is not used again meanwhile
                self._found |= {keys[f]: (result, requests[f]) for f, result in zip(missing, results, strict=True)}
        with self._guard:
            results = [self._found[keys[f]][0] for f in findings]
            for old in list(self._found)[:-KEPT]:
                del self._found[old]
        return results


def _token(value: Any) -> Hashable:
    """A setting as part of a key: plain values by value, everything else by identity."""
    return value if isinstance(value, (int, float, str, bool, tuple, type(None))) else id(value)
