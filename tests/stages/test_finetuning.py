import json
import logging
from dataclasses import asdict

import pytest

from ip2p_ray.stages.finetuning import Tuned, finetune_at_server
from ip2p_ray.testing import Behaviour, FaultyServer
from ip2p_ray.triplets.endpoint import Endpoint
from ip2p_ray.triplets.examples import load_examples
from ip2p_ray.triplets.finetune import Score, split_examples, training_file
from ip2p_ray.triplets.openai_finetune import Tuning, TuningConfig, _digest

CONFIG = TuningConfig(model="base")


def finished(folder, examples):
    """The state of a job that succeeded, so that only the scores are left to be made."""
    train, held_out = split_examples(examples, 0.3)
    tuning = Tuning(
        digest=_digest(training_file(train), CONFIG),
        status="succeeded",
        file_id="file-0",
        job_id="job-0",
        model="ft:base",
    )
    (folder / "finetuning.json").write_text(json.dumps(asdict(tuning)))
    return held_out


def tuned(server, folder, examples):
    endpoint = Endpoint(base_url=server.url, api_key_env=None, backoff_s=0.01)
    return finetune_at_server(examples, str(folder), CONFIG, endpoint=endpoint, held_out=0.3)


def test_both_models_are_scored_and_paid_for_once(tmp_path):
    examples = load_examples()[:30]
    held_out = finished(tmp_path, examples)
    with FaultyServer(Behaviour(models=("base", "ft:base"))) as server:
        found = tuned(server, tmp_path, examples)
        assert found.model == "ft:base"
        assert found.before.replies == found.after.replies == found.after.valid == len(held_out)
        asked = server.counts.requests.copy()
        assert tuned(server, tmp_path, examples) == found
        assert server.counts.requests == asked


def test_a_new_model_is_named_though_the_quota_ends_before_its_score(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="ip2p_ray")
    examples = load_examples()[:30]
    finished(tmp_path, examples)
    with FaultyServer(Behaviour(models=("base", "ft:base"), quota=False)) as server:
        found = tuned(server, tmp_path, examples)
    assert (found.model, found.before, found.after) == ("ft:base", None, None)
    assert caplog.text.index("the new model is ft:base") < caplog.text.index("quota")


def test_a_model_that_only_can_be_tuned_is_not_scored(tmp_path):
    examples = load_examples()[:30]
    finished(tmp_path, examples)
    with FaultyServer(Behaviour(models=("ft:base",))) as server:
        found = tuned(server, tmp_path, examples)
    assert found.before is None
    assert found.after.validity == 1.0


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [(24, 13, True), (24, 23, True), (24, 24, False), (13, 24, False), (None, 1, False)],
)
def test_a_model_that_became_worse_is_told(before, after, told):
    def scored(valid):
        return None if valid is None else Score(replies=26, valid=valid, reasons={})

    tuned = Tuned(model="new", before=scored(before), after=scored(after))
    assert (tuned.warning is not None) == told
    if told:
        assert f"of 26 held-out captions it has {after} valid edits, that one has 24" in (
            tuned.warning
        )
