"""What script and little words can tell of a text's language, and what they cannot."""

import pytest

from ip2p_ray.language import is_english
from ip2p_ray.triplets.examples import load_examples


@pytest.mark.parametrize(
    "text",
    [
        "A cat on a mat",
        "Vintage Red Leather Sofa",
        "The Duke of Rio de Janeiro on the beach at Le Havre",
        "La Paz",
        "Caf\u00e9 in Z\u00fcrich with the Nguy\u1ec5n family",
        "Mount Fuji \u5bcc at dawn in the spring",
        "",
        "1999",
    ],
)
def test_english(text):
    assert is_english(text)


@pytest.mark.parametrize(
    "text",
    [
        "Ein Hund mit einem Ball auf der Wiese",
        "Un chat sur une table dans la cuisine",
        "Una casa en el bosque con un perro",
        "Il gatto della vicina nel giardino di una villa",
        "Uma menina com um cachorro e dos gatos na praia",
        "Een hond in het park voor een huis",
        "\u043a\u043e\u0448\u043a\u0430 \u043d\u0430 \u043e\u043a\u043d\u0435",
        "\u732b\u304c\u7a93\u8fba\u3067\u5bdd\u3066\u3044\u308b",
        "cat \u0642\u0637\u0629 \u0639\u0644\u0649 \u0627\u0644\u0646\u0627\u0641\u0630\u0629",
    ],
)
def test_other_languages(text):
    assert not is_english(text)


def test_what_it_cannot_tell_is_said_in_its_module():
    assert is_english("Vintage Ledersofa Braun")


def test_all_hand_written_texts_are_english():
    triplets = load_examples()
    texts = [text for t in triplets for text in (t.caption, t.instruction, t.edited_caption)]
    assert [text for text in texts if not is_english(text)] == []
