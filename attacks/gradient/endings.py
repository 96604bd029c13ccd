"""Where texts end, and with which token: what the head's gradient adds to the prefixes.

Under a shifted causal loss a text's last token is input to nothing that is scored, so no span
holds it; it is a label all the same.

Shape suffixes: V vocabulary, D width, M distinct prefixes, L leaves, T tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from scipy.stats import norm

from attacks.gradient.flow import FALSE_LABELS, Flow, Weight
from attacks.gradient.prefixes import Prefix, PrefixTree
from attacks.threat import Gradient, OpenModel

AMBIGUOUS = "a last token is ambiguous: the tied embedding hides it"
RUN = "a text that repeats one token to its end has no length"
UNREAD = "a last token is lost: no label stands out of the noise"
BROKEN = "not all prefixes are found, so that no last token is"


@dataclass(frozen=True)
class Branches:
    """A tree of prefixes, without repeats that lead nowhere, and its nodes by equal rows.

    Attributes:
        after: the tokens that go on from each node.
        groups: nodes that share a row, shortest first; they share their predictions too.
        index: of each node's group.
    """

    after: dict[Prefix, list[int]] = field(repr=False)
    groups: tuple[list[Prefix], ...] = field(repr=False)
    index: dict[Prefix, int] = field(repr=False)

    @classmethod
    def of(cls, tree: PrefixTree) -> Branches:
        """Prune and group."""
        after: dict[Prefix, list[int]] = defaultdict(list)
        kept: list[Prefix] = []
        for node in reversed(tree.nodes):  # children before parents
            if node not in tree.repeats or node in after:
                kept.append(node)
                after[node[:-1]].append(node[-1])
        groups: list[list[Prefix]] = []
        index: dict[Prefix, int] = {}
        for node in reversed(kept):
            index[node] = index[node[:-1]] if node in tree.repeats else len(groups)
            if index[node] == len(groups):
                groups.append([])
            groups[index[node]].append(node)
        return cls(dict(after), tuple(groups), index)

    @property
    def leaves(self) -> list[Prefix]:
        """Nodes that nothing goes on from."""
        return [node for node in self.index if node not in self.after]


def complete(
    model: OpenModel, gradient: Gradient, tree: PrefixTree, read: frozenset[int]
) -> tuple[set[Prefix], set[str]]:
    """Texts, each a prefix and its last token where that is known; and why some are shorter.

    A tied embedding adds to the head's gradient in the rows of tokens that were read, so that their
    labels cannot be seen; that something ends, and goes to none of the others, can.

    Where the prefixes do not account for the head's gradient, some are missing. Then the others are
    given as they are, if it is clear which rows lie in the span; otherwise without their last
    token, as a row that passes by chance leads nowhere.

    Args:
        model: known to the adversary.
        gradient: of the sum of the texts' losses, each to a weight of its own.
        tree: the prefixes found.
        read: tokens that are input somewhere.
    """
    branches = Branches.of(tree)
    hidden = read if model.tied else frozenset[int]()
    flow = _flow(model, gradient, branches, hidden)
    if flow is None or not flow.explained:
        return {leaf if tree.clear else leaf[:-1] for leaf in branches.leaves}, {BROKEN}
    texts: set[Prefix] = set()
    notes: set[str] = set()
    for m, group in enumerate(branches.groups):
        last, labels = group[-1], flow.labels[m]
        onward = {token: node for node in group for token in branches.after.get(node, ())}
        child = {token: branches.index[(*node, token)] for token, node in onward.items()}
        for token, weight in labels.items():
            if token not in child:
                run = (*last, token) in tree.repeats
                texts.add(last if run else (*last, token))
                notes.update({RUN} if run else ())
            elif child[token] != m and _stays(weight, [flow.through[child[token]]], flow.least):
                texts.add((*onward[token], token))
        if hidden:
            rest = _less(flow.through[m], labels.values())
            running_on = {c for token, c in child.items() if token in hidden and c != m}
            if _stays(rest, [flow.through[c] for c in running_on], flow.least):
                texts.add(last)
                notes.add(AMBIGUOUS)
        # A leaf that nothing runs through passed by chance.
        if not child and not labels and _stays(flow.through[m], [], flow.least):
            texts.add(last)
            notes.add(AMBIGUOUS if hidden else UNREAD)
    return texts, notes


def _flow(
    model: OpenModel, gradient: Gradient, branches: Branches, hidden: frozenset[int]
) -> Flow | None:
    """None if there are more prefixes than the head has room for, or some are alike to it."""
    leaves = branches.leaves
    ids_LT = torch.zeros(len(leaves), max(map(len, leaves)), dtype=torch.int64)
    place: dict[Prefix, tuple[int, int]] = {}
    for row, leaf in enumerate(leaves):
        ids_LT[row, : len(leaf)] = torch.tensor(leaf)
        place.update({leaf[: t + 1]: (row, t) for t in range(len(leaf))})
    hidden_LTD, logits_LTV = model.predict(ids_LT)
    row_M, position_M = torch.tensor([place[group[0]] for group in branches.groups]).T
    ids_V = torch.arange(len(gradient.head_VD))
    ids_V = ids_V[~torch.isin(ids_V, torch.tensor(sorted(hidden), dtype=torch.int64))]
    probability_MV = logits_LTV[row_M, position_M].double().softmax(1)[:, ids_V]
    hidden_MD = hidden_LTD[row_M, position_M]
    try:
        return Flow.of(
            gradient.head_VD[ids_V], ids_V, hidden_MD, probability_MV, gradient.resolution
        )
    except ValueError:
        return None


def _less(weight: Weight, others: Iterable[Weight]) -> Weight:
    others = list(others)
    return Weight(
        weight.value - sum(other.value for other in others),
        math.hypot(weight.std, *(other.std for other in others)),
    )


def _stays(weight: Weight, running_on: Iterable[Weight], least: float) -> bool:
    """Whether some of a weight does not run on.

    In magnitudes, for either sign; more may run on than came in, where the first tokens of a text
    are not scored.
    """
    magnitudes = (Weight(abs(other.value), other.std) for other in running_on)
    rest = _less(Weight(abs(weight.value), weight.std), magnitudes)
    return rest.value > max(float(norm.isf(FALSE_LABELS)) * rest.std, least)
