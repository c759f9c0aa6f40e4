"""Importing this package registers the methods; `param.descendents(Method, concrete=True)` lists them."""

from sdl_explorer.models.methods.auxiliary import BatchTopKAux, TopKAux
from sdl_explorer.models.methods.base import Context, Method
from sdl_explorer.models.methods.gated import Gated
from sdl_explorer.models.methods.jumprelu import JumpReLU
from sdl_explorer.models.methods.matryoshka import Matryoshka, MultiTopK
from sdl_explorer.models.methods.pursuit import Pursuit
from sdl_explorer.models.methods.relu import ReLU
from sdl_explorer.models.methods.topk import BatchTopK, TopK

__all__ = [
    "BatchTopK",
    "BatchTopKAux",
    "Context",
    "Gated",
    "JumpReLU",
    "Matryoshka",
    "Method",
    "MultiTopK",
    "Pursuit",
    "ReLU",
    "TopK",
    "TopKAux",
]
