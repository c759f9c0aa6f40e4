"""Importing this package registers the methods; `param.descendents(Method, concrete=True)` lists them."""

from sdl_explorer.models.methods.base import Context, Method
from sdl_explorer.models.methods.jumprelu import JumpReLU
from sdl_explorer.models.methods.relu import ReLU
from sdl_explorer.models.methods.topk import BatchTopK, TopK

__all__ = ["BatchTopK", "Context", "JumpReLU", "Method", "ReLU", "TopK"]
