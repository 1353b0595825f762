"""Ordered (path regex, value) rules over a tree: one engine for labels and for shardings."""

import re
from collections.abc import Sequence
from typing import Any

import jax

from trainer.errors import UserError

Rules = Sequence[tuple[str, Any]]


def paths(tree: Any) -> list[str]:
    """The path of every leaf, in the order of `jax.tree.leaves`, such as `encoder/dense_0/kernel`."""
    return [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def path_of(keys: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as text: names and indices joined by slashes."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def assign(rules: Rules, tree: Any, *, what: str = "rule") -> Any:
    """The tree with each leaf replaced by the value of the first rule whose regex matches the leaf's whole path.

    Args:
      rules: ordered (regex, value) pairs; the regex must match from the first to the last character of a path.
      tree: any pytree; only its paths are used.
      what: how to call a rule in error messages, such as "label rule".

    Raises:
      UserError: a regex does not compile, no rule matches a leaf, or a rule matches no leaf that earlier rules leave.
    """
    compiled = [_compile(pattern, what) for pattern, _ in rules]
    names = paths(tree)
    matches = [next((i for i, regex in enumerate(compiled) if regex.fullmatch(name)), None) for name in names]
    unmatched = [name for name, match in zip(names, matches, strict=True) if match is None]
    if unmatched:
        raise UserError(f"no {what} matches {_some(unmatched)}; rules match whole paths, and '.*' matches every one")
    for i, regex in enumerate(compiled):
        if i not in matches:
            taken = [name for name in names if regex.fullmatch(name)]
            found = f" that is left: earlier rules match {_some(taken)}" if taken else f"; some paths: {_some(names)}"
            raise UserError(f"{what} {regex.pattern!r} matches no parameter{found}")
    return jax.tree.unflatten(jax.tree.structure(tree), [rules[i][1] for i in matches if i is not None])


def _compile(pattern: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{what} {pattern!r} is not a regular expression: {error}") from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
