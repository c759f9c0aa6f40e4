"""Whether a display has reached the browser."""

import panel as pn
from panel.custom import JSComponent


class Arrival(JSComponent):
    """Nothing to see: it says when the browser has drawn the display that it is part of.

    A notebook's front end throws away what it is sent before that, so changes wait until `there`.
    """

    _esm = """export function render({ model }) { model.send_msg("drawn") }"""

    def __init__(self, **params):
        self._drawn = False
        super().__init__(**{"width": 0, "height": 0, "margin": 0, **params})

    def _handle_msg(self, msg):
        self._drawn = True

    @property
    def there(self) -> bool:
        """Drawn; or shown nowhere, or on a served page, which waits by itself."""
        views = (pn.state._views[ref] for ref in self._models if ref in pn.state._views)
        return self._drawn or all(comm is None for *_, comm in views)
