import json

import pytest

from ip2p_ray import notes
from ip2p_ray.errors import DatasetError


def test_what_was_written_before_there_were_notes_is_read(tmp_path):
    old = {"dataset": "latents", "config": {}, "digest": "d", "attempts": [1.5, 2.0]}
    (tmp_path / notes.ORIGIN).write_text(json.dumps(old))
    noted = notes.read_noted(str(tmp_path))
    assert (noted.dataset, noted.attempts, noted.note) == ("latents", [1.5, 2.0], None)


def test_fields_of_later_versions_are_passed_over(tmp_path):
    new = {"dataset": "latents", "attempts": [1.0], "now": {"done": 3, "weather": "rain"}}
    (tmp_path / notes.ORIGIN).write_text(json.dumps(new))
    assert notes.read_noted(str(tmp_path)).note == notes.Note(done=3)


def test_nothing_is_noted_where_nobody_has_begun(tmp_path):
    assert notes.read_noted(str(tmp_path)) is None


def test_an_unreadable_origin_names_its_file(tmp_path):
    (tmp_path / notes.ORIGIN).write_text("{")
    with pytest.raises(DatasetError, match=notes.ORIGIN):
        notes.read_noted(str(tmp_path))
