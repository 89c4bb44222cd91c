"""How many tokens are drafted: against costs and acceptances that are known, on a clock of its own."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from ensembler.decoding.decode_stats import DecodingStats
from ensembler.decoding.drafting import DraftSchedule, Round, expected_tokens

Cost = Callable[[int], float]


def cheap_draft(num: int) -> float:
    """A draft of a tenth of the step; a verification of many positions costs little more than one."""
    return 0.1 * num + 0.9 * (1 + 0.05 * (num - 1))


def dear_draft(num: int) -> float:
    """Three equal members, and a verification that costs every position again: no acceptance pays."""
    return num / 3 + 2 / 3 * num


def play(
    pace: DraftSchedule,
    cost: Cost,
    acceptance: Callable[[int], float],
    num_tokens: int,
    *,
    noise: float = 0.0,
    seed: int = 0,
) -> tuple[float, list[int]]:
    """Decode so many tokens; return the seconds that it took and the positions of each round."""
    dice = random.Random(seed)
    done, seconds, rounds = 0, 0.0, []
    while done < num_tokens:
        num = pace.next_round(1, num_tokens - done)
        accepted = 0
        while accepted < num and dice.random() < acceptance(done):
            accepted += 1
        gained = min(accepted + 1, num)
        taken = cost(num) * (1 + noise * dice.random())
        pace.update(Round(num, 1, gained, min(accepted + 1, num), accepted, taken))
        done, seconds, rounds = done + gained, seconds + taken, [*rounds, num]
    return seconds, rounds


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9, 1.0])
def test_expected_tokens(acceptance: float) -> None:
    assert expected_tokens(5, acceptance) == pytest.approx(sum(acceptance**i for i in range(5)))


@pytest.mark.parametrize(("acceptance", "least"), [(0.6, 1.5), (0.8, 2.0), (0.95, 2.8)])
def test_it_is_nearly_as_fast_as_the_best_number(acceptance: float, least: float) -> None:
    num_tokens = 4000
    best = max(expected_tokens(num, acceptance) / cheap_draft(num) for num in range(1, 9))
    seconds, rounds = play(DraftSchedule(8, 0.1), cheap_draft, lambda _: acceptance, num_tokens, noise=0.1)
    gain = num_tokens / seconds
    assert gain > 0.88 * best
    assert gain > 0.9 * least
    assert max(rounds) <= 8


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("num_tokens", [256, 4000])
def test_a_draft_that_cannot_pay_is_given_up(acceptance: float, num_tokens: int) -> None:
    pace = DraftSchedule(8, 1 / 3)
    seconds, _ = play(pace, dear_draft, lambda _: acceptance, num_tokens)
    assert seconds < 1.03 * num_tokens * dear_draft(1) + dear_draft(8)  # and one round, however short the text
    assert pace.reason is not None


@pytest.mark.parametrize("num_tokens", [256, 4000])
def test_a_low_acceptance_is_given_up(num_tokens: int) -> None:
    pace = DraftSchedule(8, 0.3)
    seconds, rounds = play(pace, lambda num: 0.3 * num + 0.7 * (1 + 0.2 * (num - 1)), lambda _: 0.2, num_tokens)
    assert seconds < 1.03 * num_tokens + 3
    assert rounds.count(1) > 0.9 * len(rounds)
    assert pace.reason is not None
    assert pace.reason.startswith("acceptance 0.")


def test_it_is_taken_up_again_where_the_text_becomes_easy() -> None:
    pace = DraftSchedule(8, 0.2)
    cost = lambda num: 0.2 * num + 0.8 * (1 + 0.1 * (num - 1))  # noqa: E731
    _, rounds = play(pace, cost, lambda done: 0.05 if done < 300 else 0.95, 800)
    hard, easy = rounds[150:280], rounds[-30:]
    assert hard.count(1) > 0.9 * len(hard)
    assert sum(num > 1 for num in easy) > 0.8 * len(easy)
    assert pace.reason is None


def test_one_slow_round_does_not_end_it() -> None:
    pace, slow = DraftSchedule(8, 0.1), iter([False] * 4 + [True] + [False] * 10_000)
    seconds, rounds = play(pace, lambda num: cheap_draft(num) * (20 if next(slow) else 1), lambda _: 0.9, 3000)
    assert sum(num > 1 for num in rounds[-200:]) > 150
    assert seconds < 3000 / 1.5


# -- the guarantee ----------------------------------------------------------------------------------------------------


def middling_draft(num: int) -> float:
    """A draft of three tenths of the step: a round of two pays from an acceptance of 0.37 on."""
    return 0.3 * num + 0.7 * (1 + 0.1 * (num - 1))


def play_misled(pace: DraftSchedule, cost: Cost, honest: int, misled: int) -> float:
    """Decode `honest` tokens that are all accepted, then `misled` ones; return the seconds that the latter took.

    The latter are accepted where a plain step asks, and rejected where a round was drafted: the acceptance that is
    measured promises what no round ever gets.
    """
    play(pace, cost, lambda _: 1.0, honest)
    done, seconds = 0, 0.0
    while done < misled:
        num = pace.next_round(1, misled - done)
        pace.update(Round(num, 1, 1, 1, int(num == 1), cost(num)))
        done, seconds = done + 1, seconds + cost(num)
    return seconds


@pytest.mark.parametrize("misled", [300, 4000])
@pytest.mark.parametrize("cost", [cheap_draft, middling_draft])
def test_what_is_lost_is_bounded_where_the_acceptance_misleads(cost: Cost, misled: int) -> None:
    """At most 2 % of the time and one round: nothing was won before."""
    pace = DraftSchedule(8, 0.3)
    seconds = play_misled(pace, cost, 0, misled)
    assert 1.01 * misled < seconds < 1.021 * misled + cost(8)  # and rounds are risked all the same


@pytest.mark.parametrize("misled", [300, 4000])
def test_no_more_than_eight_plain_steps_of_what_was_won_are_lost_again(misled: int) -> None:
    pace, honest = DraftSchedule(8, 0.3), 3000
    seconds = play_misled(pace, middling_draft, honest, misled)
    most = misled + 0.02 * (honest / 2 + seconds) + middling_draft(8) + 8  # half: what the honest tokens took at most
    assert misled < seconds < most


def test_a_draft_that_was_dear_is_tried_again_where_it_became_cheap() -> None:
    """Rounds are not run any more where they are dear, so that their cost has to be forgotten to be seen again."""
    pace = DraftSchedule(8, 0.1)
    _, rounds = play(pace, dear_draft, lambda _: 0.9, 1000)
    assert set(rounds[-200:]) == {1}
    seconds, rounds = play(pace, cheap_draft, lambda _: 0.9, 2000)
    assert sum(num > 1 for num in rounds[-100:]) > 80
    assert seconds < 0.6 * 2000
    assert pace.reason is None


def test_a_plain_step_that_becomes_cheap_for_good_is_noticed_between_rounds() -> None:
    """Rounds cost what they did, a plain step a fifth: what paid does not pay any more."""
    pace = DraftSchedule(8, 0.1)
    _, rounds = play(pace, cheap_draft, lambda _: 0.7, 1500)
    assert sum(num > 1 for num in rounds[-100:]) > 80
    _, rounds = play(pace, lambda num: cheap_draft(num) if num > 1 else 0.2, lambda _: 0.7, 3000)
    assert rounds[-500:].count(1) > 480
    assert pace.reason is not None


def test_a_plain_step_that_becomes_dear_for_good_is_noticed() -> None:
    """A plain step costs twice as much, rounds what they did: what did not pay does now."""
    pace = DraftSchedule(8, 0.3)
    _, rounds = play(pace, middling_draft, lambda done: 0.9 if done < 100 else 0.3, 300)
    assert rounds[-50:].count(1) > 45  # while what rounds cost is remembered still
    seconds, rounds = play(pace, lambda num: middling_draft(num) * (1 if num > 1 else 2), lambda _: 0.3, 3000)
    assert sum(num > 1 for num in rounds[-100:]) > 80
    assert seconds < 0.8 * 2 * 3000


def test_plain_steps_come_back_however_well_drafting_pays() -> None:
    _, rounds = play(DraftSchedule(8, 0.1), cheap_draft, lambda _: 1.0, 8000)
    places = [place for place, num in enumerate(rounds) if num == 1]
    gaps = [later - place for place, later in zip(places, [*places[1:], len(rounds)], strict=True)]
    assert max(gaps) <= 25
    assert sum(gap > 12 for gap in gaps) > 20  # not more often than they have to


def test_there_is_never_more_than_there_is_room_for() -> None:
    pace = DraftSchedule(8, 0.01)
    play(pace, cheap_draft, lambda _: 1.0, 100)
    assert [pace.next_round(1, room) for room in (1, 2, 3)] == [1, 2, 3]
    assert DraftSchedule(1, 0.01).next_round(1, 50) == 1


def test_counts_and_what_follows_from_them() -> None:
    stats = DecodingStats(num_tokens=12, seconds=4.0, phases={"verify": 1.0, "draft": 0.5})
    stats.add(Round(1, 2, 2, 2, 1, 0.1))
    stats.add(Round(4, 2, 5, 6, 3, 0.1))
    stats.add(Round(4, 1, 4, 4, 4, 0.1))
    row = stats.to_row()
    assert (row["num_plain_steps"], row["num_rounds"], row["num_rows"]) == (1, 2, 5)
    assert row["rows_per_step"] == round(5 / 3, 4)
    assert (row["acceptance"], row["tokens_per_round"], row["tokens_per_second"]) == (0.7, 3.0, 3.0)
    assert row["phases"] == {"draft": 0.5, "verify": 1.0, "other": 2.5}
    assert DecodingStats().to_row()["acceptance"] is None
