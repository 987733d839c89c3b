"""Edits with an engine in this process."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Sequence

from PIL import Image, UnidentifiedImageError

from ip2p_ray.editor import Editor
from ip2p_ray.engine import Engine, EngineConfig, EngineRequest, Observer, Preview, Ticket
from ip2p_ray.errors import ImageError, LargeImageError, QueueFullError, StoppedError
from ip2p_ray.images import FORMATS, MAX_PIXELS, UNREADABLE, check_pixels, far_too_large
from serve.orders import BusyError, Defaults, Edited, Order, ReplicaLostError

LONGEST = 16
"""How many times as long as wide a picture may be; the model would not see what is on it."""


class EngineEditing:
    """`Editing` by an engine, whose editor may be exchanged while requests run."""

    def __init__(
        self, editor: Editor, config: EngineConfig, *, observer: Observer | None = None
    ) -> None:
        self._config, self._observer = config, observer
        self._engine = Engine(editor, config, observer=observer)

    @property
    def engine(self) -> Engine:
        """The one that takes new requests."""
        return self._engine

    async def edit(self, order: Order) -> list[Edited]:
        """One picture a seed; see `Editing`."""
        requests = await self._requests(order)
        tickets = self._submit(requests, None)
        try:
            pictures = await asyncio.gather(*(_picture(ticket) for ticket in tickets))
            made = [
                asyncio.to_thread(_edited, order, request, picture, request.steps)
                for request, picture in zip(requests, pictures, strict=True)
            ]
            return list(await asyncio.gather(*made))
        finally:
            for ticket in tickets:
                ticket.cancel()

    async def stream(self, order: Order) -> AsyncGenerator[Edited, None]:
        """Previews and at last the picture; see `Editing`."""
        [request] = await self._requests(order)
        loop = asyncio.get_running_loop()
        shown: asyncio.Queue[tuple[int, Image.Image] | None] = asyncio.Queue()

        def show(step: int, _steps: int, picture: Image.Image) -> None:
            loop.call_soon_threadsafe(shown.put_nowait, (step, picture))

        [ticket] = self._submit([request], show)
        ticket.future.add_done_callback(lambda _: loop.call_soon_threadsafe(shown.put_nowait, None))
        try:
            while (preview := await shown.get()) is not None:
                step, picture = preview
                yield await asyncio.to_thread(_edited, order, request, picture, step)
            picture = await _picture(ticket)
            yield await asyncio.to_thread(_edited, order, request, picture, request.steps)
        finally:
            ticket.cancel()

    async def defaults(self) -> Defaults:
        """The editor's own settings."""
        settings = self._engine.editor.settings
        return {
            "steps": settings.steps,
            "text_guidance_scale": settings.text_guidance_scale,
            "image_guidance_scale": settings.image_guidance_scale,
        }

    async def ready(self) -> bool:
        """Whether the engine runs."""
        self._engine.check()
        return True

    async def exchange(self, editor: Editor) -> None:
        """Another editor from the next request on; what was begun ends with the former one."""
        former = self._engine
        self._engine = Engine(editor, self._config, observer=self._observer)
        await asyncio.to_thread(former.close)

    async def close(self) -> None:
        """Ends the engine after what was begun is done."""
        await asyncio.to_thread(self._engine.close)

    async def _requests(self, order: Order) -> list[EngineRequest]:
        await asyncio.to_thread(check_upload, order.image)
        settings = self._engine.editor.settings
        stated = {
            name: getattr(settings, name) if getattr(order, name) is None else getattr(order, name)
            for name in ("steps", "text_guidance_scale", "image_guidance_scale")
        }
        return [
            EngineRequest(
                image=order.image,
                instruction=order.instruction,
                mask=order.mask,
                size=order.size,
                seed=seed,
                previews=order.previews,
                deadline_s=order.deadline_s,
                **stated,
            )
            for seed in order.seeds
        ]

    def _submit(self, requests: Sequence[EngineRequest], show: Preview | None) -> list[Ticket]:
        try:
            return self._engine.submit_all(list(requests), show)
        except QueueFullError as error:
            raise BusyError(str(error)) from error
        except StoppedError as error:
            raise ReplicaLostError(str(error)) from error


def check_upload(data: bytes) -> None:
    """Looks at an image's header alone.

    Raises:
        ImageError: not an image, one of too many pixels, an animation, or a strip far longer than
            wide.
    """
    try:
        Image.init()
        with Image.open(io.BytesIO(data), formats=[f for f in FORMATS if f in Image.OPEN]) as image:
            check_pixels(image)
            long, short = max(image.size), min(image.size)
            # the second picture of an MPO is the other eye's; frames are not counted, a GIF may
            # have a million
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise ImageError("image has several frames or pages; send one of them")
            if long > LONGEST * short:
                raise ImageError(
                    f"image has {image.width} x {image.height} pixels; one side is at most "
                    f"{LONGEST} times as long as the other"
                )
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise LargeImageError(far_too_large(MAX_PIXELS)) from error
    except ImageError:
        raise
    except UNREADABLE as error:
        cause = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise ImageError(
            f"image cannot be decoded ({cause}); send a whole file in one of {', '.join(FORMATS)}"
        ) from error


async def _picture(ticket: Ticket) -> Image.Image:
    try:
        return await asyncio.wrap_future(ticket.future)
    except StoppedError as error:
        raise ReplicaLostError(str(error)) from error


def _edited(order: Order, request: EngineRequest, picture: Image.Image, step: int) -> Edited:
    return Edited(
        data=_encode(picture, order),
        width=picture.width,
        height=picture.height,
        seed=request.seed,
        step=step,
        steps=request.steps,
        text_guidance_scale=float(request.text_guidance_scale),
        image_guidance_scale=float(request.image_guidance_scale),
    )


def _encode(picture: Image.Image, order: Order) -> bytes:
    stream = io.BytesIO()
    if order.output_format == "png":
        # the quickest level that still packs: the picture is waited for
        picture.save(stream, "PNG", compress_level=3)
    else:
        quality = 95 if order.output_compression is None else order.output_compression
        picture.save(stream, order.output_format, quality=quality)
    return stream.getvalue()
