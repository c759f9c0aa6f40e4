"""Activations and where they come from: generated with a known truth, stored, or captured from a network."""

from sdl_explorer.data.activations import Activations, Block, Examples, Passage, Truth
from sdl_explorer.data.anchors import Anchors, Pins
from sdl_explorer.data.bench import LinearBench
from sdl_explorer.data.capture import capture
from sdl_explorer.data.hierarchy import HierarchyBench
from sdl_explorer.data.shards import Removed
from sdl_explorer.data.sources import PARTS, Generated, Part, Source, stream
from sdl_explorer.data.store import Stored

__all__ = [
    "PARTS",
    "Activations",
    "Anchors",
    "Block",
    "Examples",
    "Generated",
    "HierarchyBench",
    "LinearBench",
    "Part",
    "Passage",
    "Pins",
    "Removed",
    "Source",
    "Stored",
    "Truth",
    "capture",
    "stream",
]
