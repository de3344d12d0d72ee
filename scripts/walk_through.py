"""A command of Whet with the README's walk-through as defaults: for the scripts beside it."""

from collections.abc import Mapping, Sequence

from whet.cli import main


def run(command: str, defaults: Mapping[str, str], flags: Sequence[str]) -> int:
    """Run `whet <command>`; returns its exit code."""
    return main([command, *with_defaults(defaults, flags)])


def with_defaults(defaults: Mapping[str, str], flags: Sequence[str]) -> list[str]:
    """`flags` after those defaults that they do not set themselves; a --config file sets all."""
    given = {flag.partition("=")[0] for flag in flags}
    if "--config" in given:
        return list(flags)
    return [word for pair in defaults.items() if pair[0] not in given for word in pair] + [*flags]
