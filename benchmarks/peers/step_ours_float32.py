"""sdl_explorer, on a machine as if it had no bfloat16 instructions."""

import os

os.environ["SDL_EXPLORER_CANDIDATES"] = "float32"

from step_ours import build  # noqa: F401
