"""Which texts lie behind this gradient? Closed forms and the span check."""

from attacks.gradient.closed_forms import embedding_tokens, label_of, labels, linear_input
from attacks.gradient.span import recover_texts, span

__all__ = ["embedding_tokens", "label_of", "labels", "linear_input", "recover_texts", "span"]
