"""Training over several holders of data: what they send, as vectors."""

from privlm.federated.update import Layout, UnexpectedTensors, gradient_update

__all__ = ["Layout", "UnexpectedTensors", "gradient_update"]
