"""These tests need the owners of the formats: `make oracle` runs them in an environment of their own.

There, a missing owner is an error and never a skip. No other run collects this folder.
"""

import sae_lens

if not sae_lens.__version__.startswith("6.54."):
    raise ImportError(f"tests/oracle are written for sae-lens 6.54 and {sae_lens.__version__} is installed. Run make oracle.")
