import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.editor import Editor, EditSettings
from ip2p_ray.engine import Engine, EngineConfig, EngineRequest, Observer
from ip2p_ray.engine.preparation import Preparation
from ip2p_ray.engine.request import Ticket
from ip2p_ray.engine.row import Batch
from ip2p_ray.errors import (
    ConfigError,
    DeadlineError,
    ImageError,
    Ip2pError,
    QueueFullError,
    StoppedError,
)
from ip2p_ray.testing import tiny_stable_diffusion

SETTINGS = EditSettings(steps=4, resolution=16, max_pixels=1024)


@pytest.fixture(scope="module")
def editor():
    return Editor(tiny_stable_diffusion(in_channels=8), settings=SETTINGS)


def with_sampler(editor, sampler):
    return Editor(editor.model, settings=replace(SETTINGS, sampler=sampler))


def picture(seed=0, width=16, height=16):
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def request(seed=0, **changes):
    usual = {
        "image": picture(seed),
        "instruction": "make the cat blue",
        "seed": seed,
        "steps": 4,
        "text_guidance_scale": 7.5,
        "image_guidance_scale": 1.5,
    }
    return EngineRequest(**{**usual, **changes})


def deep_mask():
    """16 bits, of which one level is transparent."""
    mask = Image.new("I;16", (16, 16))
    mask.info["transparency"] = 0
    return mask


CROWD = [
    request(0),
    request(1, steps=7),
    request(2, steps=1, text_guidance_scale=3.0),
    request(3, image_guidance_scale=0.5, steps=3),
    request(4, instruction="add a red dog"),
    request(5, image=picture(5, 32, 16), steps=5),
]
"""Requests of every kind; the last has a size of its own."""


def edited_by_library(editor, asked):
    return editor.edit(
        asked.image,
        asked.instruction,
        seed=asked.seed,
        steps=asked.steps,
        text_guidance_scale=asked.text_guidance_scale,
        image_guidance_scale=asked.image_guidance_scale,
    )


def distance(one, other):
    assert one.size == other.size
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


class Log(Observer):
    """Keeps what it is told."""

    def __init__(self):
        self.steps, self.stages, self.lookups, self.queues = [], Counter(), Counter(), []

    def stepped(self, rows, most, seconds):
        self.steps.append((rows, most, seconds))

    def staged(self, stage, seconds):
        self.stages[stage] += 1

    def looked_up(self, cache, found):
        self.lookups[cache, found] += 1

    def queued(self, waiting, running):
        self.queues.append((waiting, running))


class FailingModel(StableDiffusion):
    """Fails as it is told to."""

    def fail_when(self, wrong, error):
        """Raises the error for a batch of the UNet of which `wrong(rows)` is true."""
        self.wrong, self.error = wrong, error
        return self

    def denoise(self, x, sigma, text, image_latents=None, **attention):
        if self.wrong(x.shape[0]):
            raise self.error
        return super().denoise(x, sigma, text, image_latents, **attention)


def failing(editor, wrong, error):
    model = FailingModel(**vars(editor.model)).fail_when(wrong, error)
    return Editor(model, settings=SETTINGS)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m"])
def test_a_picture_is_the_librarys_alone_and_in_a_crowd(editor, sampler):
    editor = with_sampler(editor, sampler)
    truth = [edited_by_library(editor, asked) for asked in CROWD]
    with Engine(editor, EngineConfig(batch_size=8)) as engine:
        alone = [engine.submit(asked).result(60) for asked in CROWD]
        crowd = [ticket.result(60) for ticket in engine.submit_all(list(CROWD))]
    for wanted, one, other in zip(truth, alone, crowd, strict=True):
        assert distance(wanted, one) <= 1
        assert distance(one, other) <= 1


@torch.inference_mode()
def test_latents_and_noise_streams_do_not_depend_on_neighbours(editor):
    editor = with_sampler(editor, "euler_ancestral")
    prepared = Preparation(editor, Observer(), cache_bytes=2**20)
    same_size = CROWD[:5]

    def rows():
        return [prepared.row(Ticket(asked, None)) for asked in same_size]

    [alone, *others], null = rows(), prepared.text("")
    for row in (alone, *others):
        single = Batch(editor, null, [row])
        while not row.arrived:
            single.advance()
        single.scatter()
    crowd = rows()
    running = list(crowd)
    while running:
        batch = Batch(editor, null, running)
        batch.advance()
        batch.scatter()
        running = [row for row in running if not row.arrived]
    for one, other in zip((alone, *others), crowd, strict=True):
        assert torch.equal(one.generator.get_state(), other.generator.get_state())
        spread = one.progress.x.std()
        assert (one.progress.x - other.progress.x).abs().max() < 1e-4 * max(1.0, spread)


def test_a_request_joins_and_leaves_while_another_runs(editor):
    begun = threading.Event()
    with Engine(editor, EngineConfig(batch_size=2)) as engine:
        long = engine.submit(request(1, steps=3000, previews=1000), lambda *_: begun.set())
        assert begun.wait(60)
        short = engine.submit(request(2, steps=2))
        assert short.result(60).size == (16, 16)
        assert not long.future.done()
        long.cancel()


def test_beyond_the_queue_requests_are_refused_all_or_none(editor):
    with Engine(editor, EngineConfig(batch_size=1, max_waiting=2)) as engine:
        long = engine.submit(request(0, steps=5000))
        while engine.load != (0, 1):
            time.sleep(0.01)
        with pytest.raises(QueueFullError, match="at most 2"):
            engine.submit_all([request(1), request(2), request(3)])
        tickets = engine.submit_all([request(1), request(2)])
        with pytest.raises(QueueFullError):
            engine.submit(request(3))
        long.cancel()
        assert [ticket.result(60).size for ticket in tickets] == [(16, 16)] * 2
        assert engine.submit(request(3)).result(60)


def test_without_a_queue_the_places_of_the_batch_can_be_had(editor):
    with Engine(editor, EngineConfig(batch_size=2, max_waiting=0)) as engine:
        tickets = engine.submit_all([request(0), request(1)])
        assert all(ticket.result(60) for ticket in tickets)


def test_a_cancelled_request_gives_up_its_place_at_the_next_step(editor):
    with Engine(editor, EngineConfig(batch_size=1)) as engine:
        long, waiting = engine.submit_all([request(0, steps=100_000), request(1)])
        assert long.cancel()
        assert waiting.result(60)
        with pytest.raises(CancelledError):
            long.result(1)
        assert not waiting.cancel()


def test_a_deadline_holds_in_the_batch_and_in_the_queue(editor):
    with Engine(editor, EngineConfig(batch_size=1)) as engine:
        running = engine.submit(request(0, steps=100_000, deadline_s=0.5))
        waiting = engine.submit(request(1, deadline_s=0.2))
        after = engine.submit(request(2))
        for late in (running, waiting):
            with pytest.raises(DeadlineError, match="not done after"):
                late.result(60)
        assert after.result(60)


def test_previews_come_in_order_and_become_the_picture(editor):
    shown = []
    with Engine(with_sampler(editor, "euler")) as engine:
        ticket = engine.submit(
            request(0, steps=8, previews=3), lambda step, steps, seen: shown.append((step, seen))
        )
        made = ticket.result(60)
    assert [step for step, _ in shown] == [2, 4, 6]
    assert {seen.size for _, seen in shown} == {(16, 16)}
    assert distance(shown[-1][1], made) < 255
    assert request(steps=2, previews=10).preview_steps() == {1}


def test_outside_the_mask_no_pixel_changes(editor):
    source = picture(7, 32, 32)
    mask = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (8, 8, 24, 30))
    asked = request(7, image=source, mask=mask, size=(32, 32), steps=6)
    with Engine(editor) as engine:
        masked, free = (
            ticket.result(60) for ticket in engine.submit_all([asked, replace(asked, mask=None)])
        )
    found, before = np.asarray(masked), np.asarray(source)
    inside = np.zeros((32, 32), dtype=bool)
    inside[8:30, 8:24] = True
    assert (found[~inside] == before[~inside]).all()
    assert (found[inside] != before[inside]).any(axis=-1).mean() > 0.9
    assert distance(masked, free) > 0


def test_the_mask_is_blended_into_the_latents_too(editor):
    """Where nothing may change, what is decoded is the source's own latents."""
    prepared = Preparation(editor, Observer(), cache_bytes=2**20)
    mask = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    mask.putpixel((0, 0), (0, 0, 0, 0))
    with torch.inference_mode():
        row = prepared.row(Ticket(request(3, mask=mask), None))
        batch = Batch(editor, prepared.text(""), [row])
        while not row.arrived:
            batch.advance()
        batch.scatter()
        source = row.image_latents * editor.model.scaling_factor
        kept = ~row.editable.expand_as(source)
        assert kept.float().mean() > 0.5
        assert not torch.allclose(row.progress.x[~kept], source[~kept], atol=1e-2)
        torch.testing.assert_close(row.progress.x[kept], source[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (Image.new("RGBA", (8, 16)), "mask has 8 x 16 pixels, the image 16 x 16"),
        (Image.new("RGB", (16, 16)), "mask has no transparency"),
        (deep_mask(), "mask has more than 8 bits"),
        (b"not a picture", "mask cannot be decoded"),
    ],
)
def test_a_mask_that_cannot_be_used_is_told(editor, mask, told):
    with Engine(editor) as engine, pytest.raises(ImageError, match=told):
        engine.submit(request(0, mask=mask)).result(60)


@pytest.mark.parametrize(
    ("size", "told"),
    [((15, 16), "multiple of"), ((0, 16), "multiple of"), ((64, 64), "at most 1024 pixels")],
)
def test_sizes_that_the_model_does_not_edit_are_refused(editor, size, told):
    with Engine(editor) as engine, pytest.raises(ConfigError, match=told):
        engine.submit(request(0, size=size)).result(60)


def test_a_broken_image_fails_alone(editor):
    with Engine(editor) as engine:
        good, bad, empty = engine.submit_all(
            [request(0), request(1, image=b"no image"), request(2, instruction=" ")]
        )
        with pytest.raises(ImageError, match="cannot be decoded"):
            bad.result(60)
        assert good.result(60)
        assert distance(empty.result(60), picture(2)) == 0


def test_what_was_encoded_lately_is_not_encoded_again(editor):
    log = Log()
    with Engine(editor, observer=log) as engine:
        first = engine.submit(request(0)).result(60)
        again = engine.submit(request(0)).result(60)
        assert distance(first, again) == 0
        assert log.lookups["image", True] == 1
        assert log.lookups["text", True] == 1
        engine.submit(request(0, image=picture(1))).result(60)
    assert log.lookups["image", False] == 2


def test_an_observer_is_told_of_batches_and_stages(editor):
    log = Log()
    with Engine(editor, EngineConfig(batch_size=4), observer=log) as engine:
        engine.submit(request(9, steps=50)).result(60)  # so that the others are ready together
        for ticket in engine.submit_all([request(seed, steps=50) for seed in range(4)]):
            ticket.result(60)
    assert log.stages == dict.fromkeys(("preparation", "admission", "steps", "decoding"), 5)
    assert max(rows for rows, _, _ in log.steps) > 1
    assert {most for _, most, _ in log.steps} == {4}
    assert log.queues[-1] == (0, 0)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m"])
def test_where_memory_is_short_the_batch_is_halved_and_nothing_is_lost(editor, sampler):
    """Not even a draw of a noise stream: the pictures are the same."""
    tight = failing(editor, lambda rows: rows > 6, torch.OutOfMemoryError("out of memory"))
    tight = with_sampler(tight, sampler)
    with Engine(tight, EngineConfig(batch_size=6)) as engine:
        made = [ticket.result(60) for ticket in engine.submit_all(list(CROWD))]
    for asked, found in zip(CROWD, made, strict=True):
        truth = edited_by_library(with_sampler(editor, sampler), asked)
        assert distance(found, truth) <= 1


def test_pictures_too_large_for_the_device_fail_alone(editor):
    full = failing(editor, lambda rows: True, torch.OutOfMemoryError("out of memory"))
    with Engine(full) as engine:
        for seed in range(5):
            with pytest.raises(ConfigError, match="size 16x16 takes more memory"):
                engine.submit(request(seed)).result(60)
        engine.check()


def test_a_moment_without_memory_is_got_over(editor):
    class Moments(FailingModel):
        """Fails its first three batches of more than one row."""

        left = 3

        def denoise(self, x, sigma, text, image_latents=None, **attention):
            if x.shape[0] > 3 and Moments.left:
                Moments.left -= 1
                raise torch.OutOfMemoryError("out of memory")
            return StableDiffusion.denoise(self, x, sigma, text, image_latents, **attention)

    log = Log()
    short = Editor(Moments(**vars(editor.model)), settings=SETTINGS)
    with Engine(short, EngineConfig(batch_size=8), observer=log) as engine:
        long = [request(seed, steps=230) for seed in range(4)]
        for ticket in engine.submit_all(long):
            ticket.result(120)
    assert min(most for _, most, _ in log.steps) < 8
    assert log.steps[-1][1] > min(most for _, most, _ in log.steps)


def test_an_observer_that_fails_loses_nothing(editor):
    class Broken(Observer):
        def stepped(self, rows, most, seconds):
            raise KeyError(rows)

        staged = queued = looked_up = stepped

    with Engine(editor, observer=Broken()) as engine:
        assert engine.submit(request(0)).result(60)


def test_an_observer_is_told_when_the_last_request_is_cancelled(editor):
    log = Log()
    with Engine(editor, observer=log) as engine:
        ticket = engine.submit(request(0, steps=100_000))
        until(lambda: engine.load == (0, 1))
        ticket.cancel()
        until(lambda: log.queues[-1] == (0, 0))


def test_previews_of_one_do_not_hold_up_the_picture_of_another(editor):
    begun, go_on = threading.Event(), threading.Event()
    order, log = [], Log()

    def show(step, _steps, _picture):
        begun.set()
        go_on.wait(60)
        order.append(step)

    config = EngineConfig(batch_size=2)
    with Engine(with_sampler(editor, "euler"), config, observer=log) as engine:
        many = engine.submit(request(0, steps=20_000, previews=5000), show)
        assert begun.wait(60)
        one = engine.submit(request(1, steps=1))
        one.future.add_done_callback(lambda _: order.append("one"))
        until(lambda: log.stages["steps"] == 1)  # it has made its step
        time.sleep(0.5)  # previews pile up, and the picture waits behind the first
        go_on.set()
        assert one.result(60)
        many.cancel()
    assert order.index("one") <= 2


def test_a_deadline_holds_while_others_are_prepared(editor):
    large = Image.new("RGB", (6000, 6000))
    with Engine(editor) as engine:
        before = engine.submit_all([request(seed, image=large) for seed in range(6)])
        began = time.monotonic()
        late = engine.submit(request(9, deadline_s=0.05))
        with pytest.raises(DeadlineError):
            late.result(60)
        assert not before[-1].future.done(), time.monotonic() - began
        for ticket in before:
            ticket.cancel()


def until(true):
    ends = time.monotonic() + 60
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_a_failed_step_is_told_and_the_engine_goes_on(editor):
    broken = failing(editor, lambda rows: rows == 6, RuntimeError("a kernel failed"))
    with Engine(broken, EngineConfig(batch_size=2)) as engine:
        assert engine.submit(request(0)).result(60)
        pair = engine.submit_all([request(1, steps=500), request(2, steps=500)])
        for ticket in pair:
            with pytest.raises(RuntimeError, match="a kernel failed"):
                ticket.result(60)
        engine.check()
        assert engine.submit(request(3)).result(60)


def test_a_device_that_always_fails_stops_the_engine(editor):
    broken = failing(editor, lambda rows: True, RuntimeError("a kernel failed"))
    engine = Engine(broken, EngineConfig(batch_size=1))
    tickets = engine.submit_all([request(seed) for seed in range(5)])
    for ticket in tickets[:3]:
        with pytest.raises(RuntimeError, match="a kernel failed"):
            ticket.result(60)
    for ticket in tickets[3:]:
        with pytest.raises(StoppedError, match="a kernel failed"):
            ticket.result(60)
    with pytest.raises(Ip2pError, match="a kernel failed"):
        engine.check()
    with pytest.raises(StoppedError):
        engine.submit(request(0))
    engine.close()


def test_closing_finishes_what_was_begun_or_cancels_it(editor):
    engine = Engine(editor, EngineConfig(batch_size=1))
    tickets = engine.submit_all([request(0), request(1)])
    engine.close()
    assert all(ticket.result(0) for ticket in tickets)
    with pytest.raises(StoppedError):
        engine.submit(request(2))
    engine = Engine(editor, EngineConfig(batch_size=1))
    tickets = engine.submit_all([request(0, steps=100_000), request(1, steps=100_000)])
    engine.close(drain=False)
    assert all(ticket.future.cancelled() for ticket in tickets)


def test_large_pictures_take_the_place_of_several(editor):
    log = Log()
    with Engine(editor, EngineConfig(batch_size=3), observer=log) as engine:
        large = [request(k, image=picture(k, 32, 32), size=(32, 32), steps=20) for k in range(3)]
        for ticket in engine.submit_all(large):
            assert ticket.result(60).size == (32, 32)
    assert {rows for rows, _, _ in log.steps} == {1}


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": True},
        {"previews": -1},
        {"deadline_s": 0},
        {"deadline_s": float("inf")},
        {"mask": "mask.png"},
        {"image_guidance_scale": None},
        {"text_guidance_scale": float("nan")},
    ],
)
def test_a_request_that_makes_no_sense_is_refused(change):
    with pytest.raises(ConfigError):
        request(0, **change)


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"max_waiting": -1}, {"cache_bytes": -1}])
def test_a_config_that_makes_no_sense_is_refused(change):
    with pytest.raises(ConfigError):
        EngineConfig(**change)
