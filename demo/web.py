"""A web page that makes and edits pictures with a trained model; it ends with Ctrl-C."""

import argparse
import math
import os
import queue
import random
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageChops

if __name__ == "__main__":
    sys.path[0] = str(
        Path(__file__).resolve().parents[1]
    )  # not demo/, where demo.py would hide the package

from generate import add_model_args, load_pipeline, side_by_side
from models.editing import MAX_PIXELS, cropped, opened
from models.pipeline import Pictures, TokenBridgePipeline, to_pictures
from models.sampling import ORDERS, SCHEDULES, SamplingOptions
from util import errors
from util.args import check_range, new_parser
from util.data.images import confidence_maps, png_settings, read_settings
from util.errors import UserError
from util.log import log
from util.process_group import process_group

try:
    import gradio as gr
    from gradio.processing_utils import save_file_to_cache
except ImportError:
    print(
        "error: the page needs a package that is not installed: pip install gradio", file=sys.stderr
    )
    sys.exit(2)

MAX_PICTURES, MAX_WAITING = 16, 32  # of one request; requests that wait
MAX_UPLOAD = 20 * 2**20  # bytes
KEPT = 3600  # seconds that pictures lie on disk
SHOWN_PIXELS = 512  # width of the picture that one draws on, about
ANY = -1  # choice of no class
WORKER = "pictures"  # thread in which the model works
#: Settings of sampling that the page has controls for; others stay at their defaults.
SAMPLING = ("num_iter", "cfg", "cfg_schedule", "temperature", "order")
#: Parts of a picture to cover without drawing: left, top, right, bottom as shares of its size.
AREAS = {
    "upper half": (0, 0, 1, 0.5),
    "lower half": (0, 0.5, 1, 1),
    "left half": (0, 0, 0.5, 1),
    "right half": (0.5, 0, 1, 1),
    "middle": (0.25, 0.25, 0.75, 0.75),
}
#: Of events that need no turn of the model.
QUICK: dict[str, Any] = {
    "concurrency_limit": None,
    "api_visibility": "private",
    "show_progress": "hidden",
}
PAINT = (255, 0, 160, 160)  # of the mask
CSS = """
.gradio-container {max-width: 1280px !important; width: 100%; margin: auto}
#picture, #confidence {height: auto !important; padding-top: 28px}
#picture :is(button, .image-frame), #confidence :is(button, .image-frame) {width: 100%}
#picture img, #confidence img {width: 100% !important; height: auto !important; aspect-ratio: 1; object-fit: contain}
#picture .empty, #confidence .empty {aspect-ratio: 1}
#picture img, #confidence img, #gallery img {image-rendering: pixelated}
#gallery .grid-wrap {min-height: 0; padding-top: 28px}
#gallery .grid-container {grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)) !important}
#gallery .caption-label {font-size: 11px; max-width: 100%}
"""


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = new_parser(__doc__)
    add_model_args(parser)
    text = "where the page is served; 0.0.0.0 lets other machines in, all that reach this one"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    parser.add_argument("--port", type=int, default=7860, help="where the page is served")
    return parser


# --------------------------------------------------------------------------------------------------------------------
# Making, while others watch.


class Gone(Exception):
    """Nobody waits for the pictures any more."""


def filling(
    pipe: TokenBridgePipeline, turn: threading.Lock, **request
) -> Iterator[tuple | Pictures]:
    """Yields the step, the number of steps and the pictures so far, and at last the finished :class:`Pictures`.

    Steps that pass while the last one is shown are skipped. Closing the iterator ends the work with its next step.

    Args:
        turn: held while the model works.
        request: arguments of the pipeline.

    Raises:
        UserError: see the pipeline.
    """
    frames: queue.SimpleQueue = queue.SimpleQueue()
    gone = threading.Event()

    def callback(*frame) -> None:
        if gone.is_set():
            raise Gone
        frames.put(frame)

    def work() -> None:
        try:
            with turn:
                frames.put(pipe(**request, callback=callback))
        except BaseException as error:
            frames.put(error)

    threading.Thread(target=work, name=WORKER, daemon=True).start()
    try:
        while True:
            frame = frames.get()
            while isinstance(frame, tuple) and not frames.empty():
                frame = frames.get()
            if isinstance(frame, BaseException):
                raise frame
            yield frame
            if isinstance(frame, Pictures):
                return
    finally:
        gone.set()


def stored(image: Image.Image, folder: str, name: str = "picture.png", **options) -> str:
    """Path of ``image`` as a PNG in Gradio's ``folder`` of files to serve; ``options`` are Pillow's.

    Given a picture, Gradio writes the file anew each time, while a browser may be reading it.
    """
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / name
        image.save(path, **options)
        return save_file_to_cache(path, folder)


class Shown(NamedTuple):
    """A finished picture."""

    file: str  # a PNG that holds its settings
    confidence: str  # a PNG
    text: str


def finished(
    pipe: TokenBridgePipeline, made: Pictures, sampling: dict[str, Any], folder: str
) -> list[Shown]:
    """Stores pictures, and tells what is shown of them."""
    shown = []
    maps = to_pictures(confidence_maps(made.confidence, pipe.model.config["img_size"]))
    for row, image in enumerate(made.images):
        label, seed = made.labels and made.labels[row], made.seeds[row]
        settings = {"class_labels": None if label is None else [label], "seeds": [seed], **sampling}
        name = f"class-{'any' if label is None else label}-seed-{seed}.png"
        path = stored(image, folder, name, pnginfo=png_settings(settings))
        text = f"seed {seed}: {made.log_likelihoods[row]:.1f} nats"
        shown.append(Shown(path, stored(maps[row], folder), text))
    return shown


# --------------------------------------------------------------------------------------------------------------------
# Masks.


def shown_size(size: int) -> int:
    """The multiple of ``size`` pixels in which one draws on a picture."""
    return size * max(1, round(SHOWN_PIXELS / size))


def editor_value(image: Image.Image | None, area: str | None, folder: str) -> dict[str, Any] | None:
    """A picture to draw on, enlarged, whose ``area`` is covered; its files in ``folder``."""
    if image is None:
        return None
    size = shown_size(image.width)
    layers = []
    if area is not None:
        layer = Image.new("RGBA", (size, size))
        layer.paste(PAINT, tuple(round(share * size) for share in AREAS[area]))
        layers = [stored(layer, folder)]
    large = stored(image.resize((size, size), Image.Resampling.NEAREST), folder)
    return {"background": large, "layers": layers, "composite": None}


def drawn_mask(value: dict[str, Any] | None, size: int) -> Image.Image:
    """A mask of ``size`` pixels each way, white wherever anything is drawn; UserError if it covers nothing, or all."""
    mask = Image.new("L", (size, size))
    for layer in (value or {}).get("layers", []):
        alpha = layer.convert("RGBA").getchannel("A").resize((size, size), Image.Resampling.BOX)
        mask = ImageChops.lighter(mask, alpha.point([0] + [255] * 255))
    low, high = mask.getextrema()
    if low == high:
        covers = (
            "everything: to make all of it anew, generate"
            if low
            else "nothing: draw on what is to be made anew"
        )
        raise UserError(f"the mask covers {covers}")
    return mask


def named(error: UserError, path: str) -> gr.Error:
    """What the page says of a file, without the place where this machine keeps it."""
    return gr.Error(str(error).replace(path, Path(path).name), print_exception=False)


# --------------------------------------------------------------------------------------------------------------------
# The page.


class Results(NamedTuple):
    """What one sees."""

    status: gr.Textbox
    picture: gr.Image
    confidence: gr.Image
    gallery: gr.Gallery
    download: gr.DownloadButton
    again: gr.Button
    made: gr.State  # a list of Shown


def class_choices(names: Sequence[str]) -> list[tuple[str, int]]:
    """Classes to choose from, by name and number."""
    told = [name if name == str(label) else f"{name} ({label})" for label, name in enumerate(names)]
    return [("any class", ANY), *((name, label) for label, name in enumerate(told))]


def add_controls(pipe: TokenBridgePipeline) -> tuple[gr.Dropdown, gr.Number, gr.Slider]:
    """Adds what is made: class, seed, number of pictures."""
    label = gr.Dropdown(
        class_choices(pipe.class_names), value=0, label="Class", info="Type to search", allow_custom_value=True,
        elem_id="class",
    )  # fmt: skip
    with gr.Row():
        seed = gr.Number(
            0,
            label="Seed",
            precision=0,
            minimum=0,
            maximum=2**32 - 1,
            min_width=120,
            elem_id="seed",
        )
        count = gr.Slider(
            1, MAX_PICTURES, 1, step=1, label="Pictures", min_width=120, elem_id="count"
        )
    gr.Button("Another seed", size="sm").click(
        lambda: random.randrange(2**32 - MAX_PICTURES), None, seed, **QUICK
    )
    return label, seed, count


def add_sampling(pipe: TokenBridgePipeline) -> list[gr.components.Component]:
    """Adds how it is made: controls of SAMPLING."""
    length, wide = pipe.model.seq_len, {"min_width": 240}
    with gr.Accordion("Sampling", open=True), gr.Row():
        usual_steps = min(SamplingOptions.num_iter, length)
        steps = gr.Slider(1, length, usual_steps, step=1, label="Steps", elem_id="steps", **wide)
        text = "Towards the class; 1 is without"
        usual = (
            3.0 if pipe.model.config["label_drop_prob"] else 1.0
        )  # guidance needs unlabeled training
        cfg = gr.Slider(
            0, 10, usual, step=0.05, label="Guidance", info=text, elem_id="guidance", **wide
        )
        text = "Below 1 more typical"
        temperature = gr.Slider(
            0,
            2,
            SamplingOptions.temperature,
            step=0.01,
            label="Temperature",
            info=text,
            elem_id="temperature",
            **wide,
        )
        schedule = gr.Radio(
            list(SCHEDULES),
            value=SamplingOptions.cfg_schedule,
            label="Guidance over the steps",
            **wide,
        )
        text = "Of tokens: at random, by rows, the surest first"
        order = gr.Radio(
            list(ORDERS),
            value=SamplingOptions.order,
            label="Order",
            info=text,
            elem_id="order",
            **wide,
        )
    return [steps, cfg, schedule, temperature, order]


def add_results() -> tuple[Results, gr.Button]:
    """Adds the pictures and what is said of them, and a button to cancel."""
    with gr.Row():
        text = "Nothing made yet"
        status = gr.Textbox(
            text, show_label=False, container=False, interactive=False, scale=3, elem_id="status"
        )
        cancel = gr.Button("Cancel", min_width=80, elem_id="cancel")
    look = {
        "type": "filepath",
        "format": "png",
        "interactive": False,
        "buttons": ["fullscreen"],
        "min_width": 150,
    }
    with gr.Row():
        picture = gr.Image(label="Picture", elem_id="picture", **look)
        confidence = gr.Image(label="Confidence (yellow: sure)", elem_id="confidence", **look)
    with gr.Row():
        again = gr.Button("Edit this picture", interactive=False, min_width=150, elem_id="again")
        download = gr.DownloadButton(
            "Download", interactive=False, min_width=150, elem_id="download"
        )
    gallery = gr.Gallery(
        label="All: choose one", height="auto", format="png", allow_preview=False, buttons=[], visible=False,
        elem_id="gallery",
    )  # fmt: skip
    return Results(
        status, picture, confidence, gallery, download, again, gr.State([], time_to_live=KEPT)
    ), cancel


def add_editor(
    pipe: TokenBridgePipeline,
) -> tuple[gr.UploadButton, gr.ImageEditor, gr.Dropdown, gr.Button]:
    """Adds what one edits with: a picture's file, the picture to draw on, a part to cover, the button."""
    upload = gr.UploadButton("Open a picture", file_types=["image"], size="sm", elem_id="open")
    canvas = [shown_size(pipe.model.config["img_size"])] * 2
    editor = gr.ImageEditor(
        type="pil", format="png", sources=(), transforms=(), layers=False, buttons=[], elem_id="editor",
        canvas_size=canvas, fixed_canvas=True,
        label="Draw the mask", brush=gr.Brush(40, ["#ff00a0a0"], color_mode="fixed"),
        eraser=gr.Eraser(40),
    )  # fmt: skip
    area = gr.Dropdown(list(AREAS), value=None, label="Or cover a part of it", elem_id="area")
    return upload, editor, area, gr.Button("Make it anew", variant="primary", elem_id="edit")


class Maker:
    """What the page's buttons do.

    Args:
        pipe: makes the pictures of all visitors, one request after the other.
        folder: of finished pictures.
    """

    def __init__(self, pipe: TokenBridgePipeline, folder: str):
        self.pipe, self.folder, self.turn = pipe, folder, threading.Lock()

    def generate(
        self, label: int | str, seed: int | None, count: float, *sampling, **edit
    ) -> Iterator[tuple]:
        """Yields values of :class:`Results` while ``count`` pictures are made; gr.Error tells what is wrong."""
        settings = dict(zip(SAMPLING, sampling, strict=True))
        first, count = int(seed or 0), int(count)
        request = {**settings, **edit, "class_labels": None if label == ANY else label}
        request["seeds"] = range(first, first + count)
        try:
            for made in filling(self.pipe, self.turn, **request):
                if isinstance(made, Pictures):
                    shown = finished(
                        self.pipe, made.ranked() if edit else made, settings, self.folder
                    )
                    status, picture, confidence, download, again = show(shown)
                    all_files = gr.update(
                        value=[(each.file, each.text) for each in shown], visible=count > 1
                    )
                    yield status, picture, confidence, all_files, download, again, shown
                else:
                    step, steps, images = made
                    sheet = stored(side_by_side(images, math.ceil(count**0.5)), self.folder)
                    later = gr.update(interactive=False)
                    yield (
                        f"Step {step} of {steps}",
                        sheet,
                        None,
                        gr.update(visible=False),
                        later,
                        later,
                        [],
                    )
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def edit(
        self, source: Image.Image | None, drawn: dict[str, Any] | None, *how
    ) -> Iterator[tuple]:
        """As :meth:`generate`, what is drawn on in ``source`` made anew, the most likely first."""
        try:
            if source is None:
                raise UserError("there is no picture to edit: open one, or make one and choose it")
            mask = drawn_mask(drawn, self.pipe.model.config["img_size"])
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        yield from self.generate(*how, image=source, mask_image=mask)

    def opened(self, path: str) -> tuple[Image.Image, dict[str, Any] | None]:
        """A picture to edit, as the model sees it, and what one draws on."""
        try:
            picture = cropped(opened(path, "the picture"), self.pipe.model.config["img_size"])
        except UserError as error:
            raise named(error, path) from error
        return picture, editor_value(picture, None, self.folder)

    def covered(self, picture: Image.Image | None, area: str | None) -> dict[str, Any] | None:
        """See :func:`editor_value`."""
        return editor_value(picture, area, self.folder)

    def settings(self, path: str) -> list:
        """Values of the controls, from a PNG's settings: class, seed, and those of SAMPLING."""
        try:
            told = read_settings(path)
            try:
                sampling = self.pipe.checked_options(
                    {name: told[name] for name in SAMPLING if name in told}
                )
                label = (
                    ANY
                    if told["class_labels"] is None
                    else self.pipe.class_number(told["class_labels"][0])
                )
                values = [
                    label,
                    int(told["seeds"][0]),
                    *(getattr(sampling, name) for name in SAMPLING),
                ]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path} holds settings of another kind ({errors.reason(error)})"
                ) from error
        except UserError as error:
            raise named(error, path) from error
        return values


def show(shown: list[Shown], number: int = 0) -> tuple:
    """What :class:`Results` show of one of several pictures: status, picture, confidence, buttons."""
    one = shown[number]
    ready = gr.update(interactive=True)
    return (
        f"Made: {one.text}",
        one.file,
        one.confidence,
        gr.update(value=one.file, interactive=True),
        ready,
    )


def choose(shown: list[Shown], chosen: gr.SelectData) -> tuple:
    """See :func:`show`."""
    return show(shown, chosen.index)


def build(pipe: TokenBridgePipeline, folder: str) -> gr.Blocks:
    """The page of a model; its files lie in ``folder``, which no other server may use."""
    os.environ["GRADIO_TEMP_DIR"] = folder
    size = pipe.model.config["img_size"]
    with gr.Blocks(
        title="TokenBridge", analytics_enabled=False, delete_cache=(KEPT // 6, KEPT)
    ) as page:
        gr.Markdown(
            f"# TokenBridge\n{len(pipe.class_names)} classes, {size}x{size} pixels, {pipe.model.seq_len} tokens"
        )
        source = gr.State(None, time_to_live=KEPT)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                label, seed, count = add_controls(pipe)
                with gr.Tabs() as tabs:
                    with gr.Tab("Generate", id="generate"):
                        generate = gr.Button("Generate", variant="primary", elem_id="generate")
                    with gr.Tab("Edit", id="edit"):
                        upload, editor, area, edit = add_editor(pipe)
                load = gr.UploadButton(
                    "Settings from a PNG", file_types=[".png"], size="sm", elem_id="load"
                )
            with gr.Column(scale=3, min_width=320):
                results, cancel = add_results()
        sampling = add_sampling(pipe)
        maker = Maker(pipe, folder)
        how = [label, seed, count, *sampling]
        common = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        look = {
            "scroll_to_output": True,
            "show_progress": "minimal",
            "show_progress_on": results.status,
        }
        running = [
            generate.click(maker.generate, how, list(results), **common, **look),
            edit.click(maker.edit, [source, editor, *how], list(results), **common, **look),
        ]
        cancel.click(lambda: "Cancelled", None, results.status, cancels=running, **QUICK)
        upload.upload(maker.opened, upload, [source, editor], **QUICK)
        area.input(maker.covered, [source, area], editor, **QUICK)
        load.upload(maker.settings, load, [label, seed, *sampling], **QUICK)
        one = [results.status, results.picture, results.confidence, results.download, results.again]
        results.gallery.select(choose, results.made, one, **QUICK)
        results.again.click(
            lambda path: (*maker.opened(path), gr.Tabs(selected="edit")),
            results.picture,
            [source, editor, tabs],
            **QUICK,
        )
    return page


def launch(page: gr.Blocks, host: str, port: int, block: bool = True) -> None:
    """Serves the page; UserError if the address cannot be used.

    Args:
        block: whether to return only after Ctrl-C.
    """
    try:
        socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        ).close()
    except OSError as error:
        why = f"{errors.reason(error)}; choose another --port or --host"
        raise UserError(f"cannot serve on {host}, port {port}: {why}") from error
    page.queue(max_size=MAX_WAITING, api_open=False).launch(
        server_name=host, server_port=port, share=False, allowed_paths=[], max_file_size=MAX_UPLOAD,
        run_history=False, enable_monitoring=False, mcp_server=False, pwa=False, ssr_mode=False, footer_links=[],
        theme=gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"]), css=CSS,
        state_session_capacity=100, quiet=True, prevent_thread_lock=True,
    )  # fmt: skip
    log.info("serving on %s; Ctrl-C ends it", page.local_url)
    if block:
        page.block_thread()


def main() -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device) as device:
        check_range(args, 1, 65535, "port")
        signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # removes visitors' pictures, as Ctrl-C does
        Image.MAX_IMAGE_PIXELS = (
            MAX_PIXELS // 2
        )  # Pillow refuses twice as many, whoever opens an image
        pipe = load_pipeline(args, device)
        with tempfile.TemporaryDirectory() as folder:
            launch(build(pipe, folder), args.host, args.port)


if __name__ == "__main__":
    errors.run(main)
