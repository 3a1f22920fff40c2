"""A command's options as people know them: a short ``--help``, all of them in ``--help-all``, and mistakes by name.

    earlytom run --ratio 0.1      ->   usage: earlytom run ...
                                       earlytom run: error: unknown option --ratio; did you mean --retain-ratio?

Options are never abbreviated: a script that says ``--retain`` would break, or mean something else, on the day on which
a second option begins so.
"""

import argparse
import difflib
import itertools
import sys
from collections.abc import Iterable
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """argparse's parser. A command's namespace has one name more, ``given``: the names of the options that were on the
    command line, so that a command can refuse those that it would ignore."""

    def __init__(self, *, chooses: bool = False, **settings: Any) -> None:
        """``chooses``: it is the one that chooses a command."""
        super().__init__(allow_abbrev=False, **settings)
        self._chooses = chooses
        self._rare: list[tuple[argparse.Action, str]] = []
        if not chooses:
            self.add_argument("--help-all", action=_HelpAll, nargs=0, help="show all options and exit")

    def add_rare(self, *flags: str, to: Any = None, help: str, **settings: Any) -> None:  # noqa: A002
        """As ``add_argument``, for an option that few people need: only ``--help-all`` shows it.

        ``to`` is the argument group it belongs to, if any.
        """
        action = (to or self).add_argument(*flags, help=argparse.SUPPRESS, **settings)
        self._rare.append((action, help))
        self.epilog = f"--help-all shows {len(self._rare)} more options."

    def print_help_all(self) -> None:
        """Print what ``--help`` leaves out, too."""
        self.epilog = None
        for action, text in self._rare:
            action.help = text
        self.print_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, except that a command knows all of its options, or ends in its own usage and status 2.

        Mistakes in names come before options that are missing: the missing one may be the misspelt one.
        """
        words = list(sys.argv[1:] if args is None else args)
        if self._chooses:
            self._given(itertools.takewhile(lambda word: word.startswith("-"), words))
            return super().parse_known_args(words, namespace)
        given = self._given(words)
        found, others = super().parse_known_args(words, namespace)
        if others:
            self.error(f"nothing is known to do with {' '.join(map(repr, others))}: every value belongs to an option.")
        found.given = given
        return found, others

    def _given(self, words: Iterable[str]) -> frozenset[str]:
        """Names of the options among ``words``; ends the program for one that is unknown, or that comes twice."""
        given: set[str] = set()
        meant = list(itertools.takewhile(lambda word: word != "--", words))
        for word, after in itertools.zip_longest(meant, meant[1:], fillvalue=""):
            flag = word.partition("=")[0]
            if not flag.startswith("--") or " " in flag:  # what argparse takes for a value too
                continue
            action = self._option_string_actions.get(flag)
            if action is None:
                self.error(f"unknown option {flag}{self._hint(flag)}")
            if word == flag and action.nargs in (None, "?") and self._like_an_option(after):
                self.error(f"argument {flag}: {after!r} looks like an option: write {flag}={after} to mean the value.")
            if action.dest in given and isinstance(action, argparse._StoreAction):
                self.error(f"{flag} is given twice: give one value.")
            given.add(action.dest)
        return frozenset(given)

    def _like_an_option(self, word: str) -> bool:
        """Whether argparse takes for an option what is none, such as the file -x.mp4; not the number -0.5."""
        mistaken = word.startswith("-") and not word.startswith("--") and word not in self._option_string_actions
        return mistaken and self._parse_optional(word) is not None

    def _hint(self, flag: str) -> str:
        known = {option.strip("-"): option for option in self._option_string_actions if option.startswith("--")}
        wrong = flag.strip("-").replace("_", "-").lower()
        # --ratio is a part of --retain-ratio, whatever letters it shares with others.
        parts = [name for name in known if wrong in name.split("-")]
        near = parts[:1] or difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
        return f"; did you mean {known[near[0]]}?" if near else f": {self.prog} --help lists what there is."


class _HelpAll(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parser.print_help_all()
        parser.exit()
