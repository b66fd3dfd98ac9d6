"""In which pieces a dispatch runs: which lookups share a launch, and in what order.

Used by the live buffer, which runs them, and by the plan of the cost model, which times them.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeprof.replay.cache.residency import AT_ONCE, Planned


def pieces_of(planned: Sequence[Planned], *, streamed: bool) -> list[list[int]]:
    """Returns the places in the dispatch of the lookups of each piece, pieces in order.

    Lookups that the host computes are in none. Streamed, hits run first, then what was copied
    ahead, then what is copied at once, or into the slot of one of those, then what is copied into
    the slot of one of these, and so on: nobody waits for a reader of its own piece, nor for a copy
    that was asked for later than its own. Otherwise every lookup is a piece.

    Args:
        planned: The lookups of a dispatch.
        streamed: One launch streams the weights of several experts.
    """
    on_device = [place for place, step in enumerate(planned) if not step.on_host]
    if not streamed:
        return [[place] for place in on_device]
    level: dict[int, int] = {}
    pieces: dict[int, list[int]] = {}
    for place in on_device:
        step = planned[place]
        if step.hit or step.ahead:
            own = int(step.ahead)
        else:
            # A reader comes before whoever waits for it.
            own = 2 if step.after == AT_ONCE else max(2, level[step.after] + 1)
        level[place] = own
        pieces.setdefault(own, []).append(place)
    return [pieces[own] for own in sorted(pieces)]


def copies_of(planned: Sequence[Planned], pieces: Sequence[Sequence[int]]) -> list[list[int]]:
    """Returns the places whose copies are asked for before each piece, and after the last.

    A copy is asked for as soon as the piece that reads what lies in its slot was launched; then in
    order of the pieces that read it. Copies for later lookups alone (the host computes) come last.

    Args:
        planned: The lookups of a dispatch.
        pieces: As `pieces_of` returns them.

    Returns:
        One list per piece, and one more.
    """
    piece_of = {place: index for index, piece in enumerate(pieces) for place in piece}
    found: list[list[int]] = [[] for _ in range(len(pieces) + 1)]
    for place in sorted(piece_of, key=lambda place: (piece_of[place], place)):
        step = planned[place]
        if step.loads:
            found[0 if step.after == AT_ONCE else piece_of[step.after] + 1].append(place)
    found[-1] += [place for place, step in enumerate(planned) if step.on_host and step.loads]
    return found
