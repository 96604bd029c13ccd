"""Split inference: the client keeps both ends of the model, a server runs the blocks between.

The server receives one hidden state a token and never a token or a logit. A hidden state is not
private by itself: whoever knows the model reads the token off it, unless noise hides it.
"""

from privlm.split.client import SplitClient
from privlm.split.local import Request, run_in_memory
from privlm.split.messages import NonFiniteRows, Session, received_rows
from privlm.split.partition import ClientPart, Cut, ServerPart, client_part, server_part
from privlm.split.protection import GaussianNoise, Plain, Protection, RowBudgetSpent, gaussian_delta
from privlm.split.server import SplitServer

__all__ = [
    "ClientPart",
    "Cut",
    "GaussianNoise",
    "NonFiniteRows",
    "Plain",
    "Protection",
    "Request",
    "RowBudgetSpent",
    "ServerPart",
    "Session",
    "SplitClient",
    "SplitServer",
    "client_part",
    "gaussian_delta",
    "received_rows",
    "run_in_memory",
    "server_part",
]
