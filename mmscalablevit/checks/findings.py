# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What is wrong in a data set, counted."""

from collections.abc import Iterator

_NAMED = 3


class Findings:
    """The faults of one data set, each with every place where it was found."""

    def __init__(self) -> None:
        self.errors: dict[str, list[str]] = {}
        self.warnings: dict[str, list[str]] = {}

    def error(self, fault: str, place: object) -> None:
        """Add what breaks or silently spoils training."""
        self.errors.setdefault(fault, []).append(str(place))

    def warn(self, fault: str, place: object) -> None:
        """Add what is allowed but perhaps not meant."""
        self.warnings.setdefault(fault, []).append(str(place))

    def lines(self) -> Iterator[str]:
        """One line for each fault: how often, and the first places."""
        for kind, faults in (('error', self.errors), ('warning', self.warnings)):
            for fault, places in faults.items():
                more = len(places) - _NAMED
                count = f' ({len(places)} times)' if len(places) > 1 else ''
                rest = f' and {more} more' if more > 0 else ''
                yield f'{kind}: {fault}{count}: {", ".join(places[:_NAMED])}{rest}'
