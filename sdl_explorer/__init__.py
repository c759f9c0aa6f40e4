"""Train, diagnose and repair sparse dictionaries: SAEs, transcoders and crosscoders.

The public names load when they are first used, so `import sdl_explorer` costs nothing: no torch, and
never panel, holoviews or bokeh unless the explorer itself is asked for.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "sdl_explorer.data.activations": ("Activations", "Truth"),
    "sdl_explorer.data.anchors": ("Anchors",),
    "sdl_explorer.data.bench": ("LinearBench",),
    "sdl_explorer.data.hierarchy": ("HierarchyBench",),
    "sdl_explorer.data.synth": ("SynthBench",),
    "sdl_explorer.data.spikes": ("SpikeIn",),
    "sdl_explorer.data.store": ("Stored",),
    "sdl_explorer.data.capture": ("capture",),
    "sdl_explorer.data.wordnet": ("read_nouns",),
    "sdl_explorer.models.dictionary": ("SparseDictionary",),
    "sdl_explorer.models.methods": (
        "BatchTopK",
        "BatchTopKAux",
        "Gated",
        "JumpReLU",
        "Matryoshka",
        "MultiTopK",
        "Pursuit",
        "ReLU",
        "TopK",
        "TopKAux",
    ),
    "sdl_explorer.models.methods.classical": ("learn_classically",),
    "sdl_explorer.models.methods.pursuit": ("with_pursuit",),
    "sdl_explorer.models.rewrites": ("as_jumprelu",),
    "sdl_explorer.training.interventions": ("Anchor", "Release", "Resample"),
    "sdl_explorer.training.prune": ("Prune",),
    "sdl_explorer.training.realign": ("Realign",),
    "sdl_explorer.training.split": ("Split",),
    "sdl_explorer.training.unabsorb": ("Unabsorb",),
    "sdl_explorer.diagnosis.health": ("check_health",),
    "sdl_explorer.diagnosis.landscape": ("probe_landscape",),
    "sdl_explorer.diagnosis.alignment": ("align",),
    "sdl_explorer.diagnosis.absorption": ("find_absorption",),
    "sdl_explorer.diagnosis.candidates": ("suspect_absorption",),
    "sdl_explorer.diagnosis.examples": ("find_examples",),
    "sdl_explorer.diagnosis.explain": ("explain",),
    "sdl_explorer.diagnosis.causes": ("trace_causes",),
    "sdl_explorer.diagnosis.groups": ("trace_groups",),
    "sdl_explorer.diagnosis.pairs": ("count_pairs",),
    "sdl_explorer.diagnosis.meanings": ("suspect_polysemantic",),
    "sdl_explorer.diagnosis.patterns": ("trace_patterns",),
    "sdl_explorer.diagnosis.probes": ("score_absorption",),
    "sdl_explorer.diagnosis.realisable": ("realise",),
    "sdl_explorer.diagnosis.realisable_pair": ("realise_pair",),
    "sdl_explorer.diagnosis.recovery": ("score_recovery",),
    "sdl_explorer.diagnosis.redundancy": ("find_redundant",),
    "sdl_explorer.diagnosis.scores": ("detector_scores",),
    "sdl_explorer.diagnosis.spiked": ("precision_on_spikes",),
    "sdl_explorer.diagnosis.theory": ("check_theory",),
    "sdl_explorer.diagnosis.twins": ("find_twins",),
    "sdl_explorer.session": ("Session",),
    "sdl_explorer.experiments.sweep": ("sweep",),
    "sdl_explorer.app.explorer": ("Explorer", "explore"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'sdl_explorer' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}.")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
