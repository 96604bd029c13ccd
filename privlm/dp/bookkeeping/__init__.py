"""Per-example gradients from one backward pass, kept in books instead of in ``.grad``.

Every operation that uses a trained parameter is replaced by one whose backward
computes the gradient of its input as usual, and enters into a :class:`Book` what
the parameter's gradient is made of: activations and output gradients, or the
per-example gradients themselves. autograd's own weight gradients are never
computed. From the book follow the per-example norms, and then the clipped sum
(Bu et al. 2023, "Differentially private optimization on large model at small cost").
"""

from privlm.dp.bookkeeping.book import Book
from privlm.dp.bookkeeping.interception import UnknownUse
from privlm.dp.bookkeeping.patching import Patches

__all__ = ["Book", "Patches", "UnknownUse"]
