"""GPTQModel's `dynamic`: regular expressions over layer names, each with what it changes of the settings.

    {"+:PATTERN" or "PATTERN": {"bits": 8, …}, "-:PATTERN": {}}

As GPTQModel reads it: a pattern must match from the beginning of the name, not up to its end (`re.match`); those
that exclude ("-:") are tried first, and of the rest the first that matches counts.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ropewalk.errors import QuantizeConfigError

MAX_PATTERN = 512  # characters; the longest seen has under 100
MAX_PATTERNS = 4096
SECONDS = 5.0  # for patterns that could take forever


@dataclass(frozen=True)
class Rule:
    """One entry of `dynamic`.

    Attributes:
        text: the pattern with its prefix.
        pattern: the pattern.
        excludes: whether a layer that matches stays as it is ("-:").
        overrides: what it changes otherwise.
    """

    text: str
    pattern: re.Pattern[str]
    excludes: bool
    overrides: Mapping[str, Any]


def parse_dynamic(raw: Any, source: object) -> tuple[Rule, ...]:
    """Return the rules in the order in which they are tried.

    Raises:
        QuantizeConfigError: not an object of objects, too many or too long patterns, or one that is not a pattern.
    """
    if raw is None or raw is False:
        return ()
    if not isinstance(raw, dict):
        raise QuantizeConfigError(source, "dynamic, an object from patterns to settings", repr(raw)[:80])
    if len(raw) > MAX_PATTERNS:
        raise QuantizeConfigError(source, f"at most {MAX_PATTERNS} patterns in dynamic", len(raw))
    rules = []
    for text, overrides in raw.items():
        excludes = text.startswith("-:")
        if not isinstance(overrides, dict) and not (excludes and not overrides):
            raise QuantizeConfigError(source, f"an object of settings for dynamic's {text!r}", repr(overrides)[:80])
        if len(text) > MAX_PATTERN:
            raise QuantizeConfigError(source, f"patterns of at most {MAX_PATTERN} characters in dynamic", len(text))
        try:
            pattern = re.compile(text[2:] if text.startswith(("-:", "+:")) else text)
        except (re.error, RecursionError, OverflowError) as error:
            raise QuantizeConfigError(source, "a regular expression in dynamic", f"{text!r} ({error})") from None
        rules.append(Rule(text, pattern, excludes, overrides or {}))
    return tuple(sorted(rules, key=lambda rule: not rule.text.startswith("-")))


def match_rules(rules: Sequence[Rule], names: Iterable[str], source: object) -> dict[str, Rule]:
    """Return name -> the rule that counts for it, for the names that have one.

    Raises:
        QuantizeConfigError: patterns that take longer to match than is sensible.
    """
    names = list(names)
    if all(_is_quick(rule.pattern.pattern) for rule in rules):
        first = _first_matches([rule.pattern for rule in rules], names)
    else:
        first = _in_another_process([rule.pattern.pattern for rule in rules], names, source)
    return {name: rules[i] for name, i in zip(names, first, strict=True) if i is not None}


def _first_matches(patterns: list[re.Pattern[str]], names: list[str]) -> list[int | None]:
    return [next((i for i, pattern in enumerate(patterns) if pattern.match(name)), None) for name in names]


def _is_quick(pattern: str) -> bool:
    """Tell whether matching surely ends soon: at most three things are repeated, none of them a group."""
    return len(re.findall(r"[*+{]", pattern)) <= 3 and not re.search(r"\)[*+{]", pattern)


def _in_another_process(patterns: list[str], names: list[str], source: object) -> list[int | None]:
    # Python's `re` can take exponential time and cannot be interrupted from within.
    code = (
        "import json, re, sys\n"
        "patterns, names = json.load(sys.stdin)\n"
        "patterns = [re.compile(p) for p in patterns]\n"
        "json.dump([next((i for i, p in enumerate(patterns) if p.match(n)), None) for n in names], sys.stdout)"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-W", "ignore", "-c", code],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        expected = f"patterns in dynamic that match {len(names)} layer names within {SECONDS:g} seconds"
        slow = next(p for p in patterns if not _is_quick(p))
        raise QuantizeConfigError(source, expected, f"ones that take longer, such as {slow!r}") from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise QuantizeConfigError(source, "patterns in dynamic that can be tried", error) from None
    found: list[int | None] = json.loads(done.stdout)
    return found
