"""The journal of replies: whose it is, and who waits for whom."""

import fcntl

import pytest

from ip2p_ray import storage
from ip2p_ray.errors import StageError
from ip2p_ray.object_files import ObjectFolder
from ip2p_ray.stages import journals
from ip2p_ray.triplets.journal import Journal


def test_a_journal_in_a_bucket_is_one_runs_alone(bucket, tmp_path):
    journal, folder = f"{bucket}/journal", str(tmp_path)
    with journals.held(journal, folder):
        assert len(Journal(ObjectFolder(journal))) == 0
        assert storage.exists(f"{journal}/.lock")
    assert not storage.exists(f"{journal}/.lock")
    storage.write_manifest(f"{folder}/replies", storage.Manifest(dataset="replies"))
    with journals.held("s3://no-such-bucket/journal", folder):
        pass  # nothing is going to be asked for


def test_one_who_still_asks_for_a_journal_is_waited_for(tmp_path):
    journal = str(tmp_path / "journal")
    with journals.sign(journal) as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        with pytest.raises(StageError, match="another run is asking for the journal"):
            journals.wait_for_others(journal, None, wait_s=0.3)
        journals.wait_for_others(journal, str(tmp_path / "signs"), wait_s=0.3)
    journals.wait_for_others(journal, None, wait_s=0.3)


def test_in_a_bucket_nobody_waits_for_a_sign():
    assert journals.sign("s3://bucket/journal") is None
    journals.wait_for_others("s3://bucket/journal", None, wait_s=0.0)
