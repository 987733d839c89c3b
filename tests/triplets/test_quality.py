import pytest

from ip2p_ray.triplets.examples import KINDS, read_examples
from ip2p_ray.triplets.quality import OTHER, Tally, kind_of, verb_of
from ip2p_ray.triplets.reply import Triplet


def triplet(number, instruction="make it night"):
    return Triplet(f"a boat {number}", instruction, f"a boat {number} at night")


@pytest.mark.parametrize(
    ("instruction", "verb", "kind"),
    [
        ("Make it winter", "make", "season"),
        ("Please, remove the boat", "remove", "removal"),
        ("could you paint it in watercolor", "paint", "medium"),
        ("add a parrot", "add", "addition"),
        ("let's turn the dog into a cat", "turn", "subject_swap"),
        ("make her smile", "make", "expression"),
        ("hmm", "hmm", OTHER),
        ("...", "", OTHER),
    ],
)
def test_verb_and_kind_of_an_instruction(instruction, verb, kind):
    assert verb_of(instruction) == verb
    assert kind_of(instruction) == kind


def test_three_in_four_kinds_are_those_of_the_hand_written_examples():
    examples = [example for example in read_examples() if example.kind != "mix"]
    right = sum(kind_of(row.triplet.instruction) == row.kind for row in examples)
    assert right >= 0.75 * len(examples)
    assert {kind_of(row.triplet.instruction) for row in examples} <= {*KINDS, OTHER}


def test_counts_and_a_draw_that_does_not_depend_on_the_order():
    rows = [triplet(number) for number in range(200)] + [triplet(0, "MAKE IT NIGHT")]
    forwards, backwards = Tally(), Tally()
    for row in rows:
        forwards.add(row)
    for row in reversed(rows):
        backwards.add(row)
    quality = forwards.quality()
    assert quality == backwards.quality()
    assert quality.triplets == 201
    assert quality.verbs == {"make": 201}
    assert quality.kinds == {"time_of_day": 201}
    assert quality.lengths["caption"] == {3: 201}
    assert quality.instructions == 1
    assert len(set(quality.shown)) == 50
    assert quality.shown != sorted(quality.shown, key=lambda row: row.caption)


def test_fewer_than_are_shown_are_all_shown():
    tally = Tally(shown=3)
    assert not tally.quality().shown
    tally.add(triplet(1))
    assert tally.quality().shown == [triplet(1)]
