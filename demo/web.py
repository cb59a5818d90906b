"""Serve a web page that generates and edits images with a trained model, until Ctrl-C."""

import argparse
import json
import math
import os
import queue
import random
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # The project root instead of demo/, where demo.py would hide the package of this name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import util.interpreter  # noqa: F401, before all packages

from PIL import Image, ImageChops

from generate import add_pipeline_args, load_pipeline
from models.editing import (
    MAX_PIXELS,
    REGIONS,
    center_crop,
    open_image,
    outpainted,
    region_box,
)
from models.pipeline import DEFAULT_STRENGTH, GeneratedImages, TokenBridgePipeline, to_pil
from models.sampling import ORDERS, SCHEDULES, SamplingOptions
from util import errors
from util.args import check_range, new_parser
from util.data.images import confidence_maps, image_grid, png_settings, read_settings
from util.errors import UserError
from util.log import counted, log
from util.process_group import process_group

try:
    import gradio as gr
    from gradio.processing_utils import save_file_to_cache
except ImportError:
    print("error: gradio is not installed: pip install gradio", file=sys.stderr)
    sys.exit(2)

MAX_IMAGES = 16  # per request
MAX_WAITING = 32  # requests in the queue
MAX_UPLOAD = 20 * 2**20  # bytes
LIFETIME = 3600  # seconds before files and states of visitors are deleted
EDITOR_PIXELS = 512  # approximate width of the image in the mask editor
ANY = -1  # the choice "any class"
WORKER = "generation"  # name of the thread that runs the model
#: Sampling options with controls on the page; others keep their defaults.
SAMPLING = ("num_iter", "cfg", "cfg_schedule", "temperature", "order")
#: The same, of heads that have it.
HEAD_SAMPLING = "head_steps"
#: Arguments of Gradio events that do not run the model.
QUICK: dict[str, Any] = {
    "concurrency_limit": None,
    "api_visibility": "private",
    "show_progress": "hidden",
}
MASK_COLOR = (255, 0, 160, 160)  # RGBA
CSS = """
.gradio-container {max-width: 1280px !important; width: 100%; margin: auto}
#picture, #confidence {height: auto !important; padding-top: 28px}
#picture :is(button, .image-frame), #confidence :is(button, .image-frame) {width: 100%}
#picture img, #confidence img {width: 100% !important; height: auto !important}
#picture img, #confidence img {aspect-ratio: 1; object-fit: contain}
#picture .empty, #confidence .empty {aspect-ratio: 1}
#picture img, #confidence img, #gallery img {image-rendering: pixelated}
#gallery .grid-wrap {min-height: 0; padding-top: 28px}
#gallery .grid-container {grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)) !important}
#gallery .caption-label {font-size: 11px; max-width: 100%}
"""


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(__doc__)
    add_pipeline_args(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address of the page; 0.0.0.0 admits every machine that can reach this one",
    )
    parser.add_argument("--port", type=int, default=7860, help="port of the page")
    return parser


# --------------------------------------------------------------------------------------------------
# Generation in a thread, with intermediate images


class Cancelled(Exception):
    """The visitor no longer waits for the images."""


def stream_images(
    pipe: TokenBridgePipeline, lock: threading.Lock, **request
) -> Iterator[tuple | GeneratedImages]:
    """Yield the images after each step, and finally the :class:`GeneratedImages`.

    The intermediate items are tuples: the step, the number of steps, the images so far. Steps that
    finish while the previous one is shown are skipped. Closing the iterator stops the generation
    at its next step.

    Args:
        lock: held while the model runs.
        request: arguments of the pipeline.

    Raises:
        UserError: see the pipeline.
    """
    frames: queue.SimpleQueue = queue.SimpleQueue()
    cancelled = threading.Event()

    def callback(*frame) -> None:
        if cancelled.is_set():
            raise Cancelled
        frames.put(frame)

    def run() -> None:
        try:
            with lock:
                frames.put(pipe(**request, callback=callback))
        except BaseException as error:
            frames.put(error)

    threading.Thread(target=run, name=WORKER, daemon=True).start()
    try:
        while True:
            frame = frames.get()
            while isinstance(frame, tuple) and not frames.empty():
                frame = frames.get()
            if isinstance(frame, BaseException):
                raise frame
            yield frame
            if isinstance(frame, GeneratedImages):
                return
    finally:
        cancelled.set()


def save_to_cache(image: Image.Image, folder: str, name: str = "image.png", **options) -> str:
    """Save ``image`` as a PNG in Gradio's ``folder`` of served files, and return its path.

    If Gradio gets an image instead of a path, it writes the file again every time, while a browser
    may be reading it.

    Args:
        options: of Pillow's ``save``.
    """
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / name
        image.save(path, **options)
        return save_file_to_cache(path, folder)


class ImageFiles(NamedTuple):
    """The files and the caption of a generated image."""

    image: str  # a PNG that contains its settings
    confidence: str  # a PNG
    caption: str


def save_images(
    pipe: TokenBridgePipeline, generated: GeneratedImages, sampling: dict[str, Any], folder: str
) -> list[ImageFiles]:
    """Save generated images and their confidence maps; return their files."""
    files = []
    size = pipe.model.config["img_size"]
    maps = to_pil(confidence_maps(generated.confidence, size, generated.kept))
    for row, image in enumerate(generated.images):
        label = generated.labels and generated.labels[row]
        seed = generated.seeds[row]
        settings = {"class_labels": None if label is None else [label], "seeds": [seed], **sampling}
        name = generated.file_name(row)
        path = save_to_cache(image, folder, name, pnginfo=png_settings(settings))
        title = "any class" if label is None else pipe.class_names[label]
        caption = f"{title}, seed {seed}: {generated.log_likelihoods[row]:.1f} nats"
        files.append(ImageFiles(path, save_to_cache(maps[row], folder), caption))
    return files


# --------------------------------------------------------------------------------------------------
# Masks


def editor_size(size: int) -> int:
    """Return the width of the mask editor: a multiple of ``size``, about :data:`EDITOR_PIXELS`."""
    return size * max(1, round(EDITOR_PIXELS / size))


def editor_value(
    image: Image.Image | None, region: str | None, folder: str
) -> dict[str, Any] | None:
    """Return the mask editor's value: the enlarged image, and a layer that covers ``region``.

    Args:
        region: a name in :data:`models.editing.REGIONS`, or None.
        folder: for the files.
    """
    if image is None:
        return None
    size = editor_size(image.width)
    layers = []
    if region is not None:
        layer = Image.new("RGBA", (size, size))
        layer.paste(MASK_COLOR, region_box(region, size))
        layers = [save_to_cache(layer, folder)]
    large = save_to_cache(image.resize((size, size), Image.Resampling.NEAREST), folder)
    return {"background": large, "layers": layers, "composite": None}


def drawn_mask(value: dict[str, Any] | None, size: int) -> Image.Image:
    """Return a mask of ``size`` x ``size`` pixels, white wherever something is drawn.

    Args:
        value: of the mask editor.

    Raises:
        UserError: the mask covers nothing, or everything.
    """
    mask = Image.new("L", (size, size))
    for layer in (value or {}).get("layers", []):
        alpha = layer.convert("RGBA").getchannel("A").resize((size, size), Image.Resampling.BOX)
        mask = ImageChops.lighter(mask, alpha.point([0] + [255] * 255))
    low, high = mask.getextrema()
    if low == high:
        raise UserError(
            "the mask covers everything: use the Generate tab instead"
            if low
            else "the mask covers nothing: draw on the parts to regenerate"
        )
    return mask


def file_error(error: UserError, path: str) -> gr.Error:
    """Return the error for the page, with the name of the file instead of its path here."""
    return gr.Error(str(error).replace(path, Path(path).name), print_exception=False)


# --------------------------------------------------------------------------------------------------
# Page


class ResultViews(NamedTuple):
    """The components that show results."""

    status: gr.Textbox
    picture: gr.Image
    confidence: gr.Image
    gallery: gr.Gallery
    download: gr.DownloadButton
    again: gr.Button
    files: gr.State  # a list of ImageFiles


def class_choices(names: Sequence[str]) -> list[tuple[str, int]]:
    """Return the titles and numbers of the classes to choose from."""
    titles = [
        name if name == str(label) else f"{name} ({label})" for label, name in enumerate(names)
    ]
    return [("any class", ANY), *((title, label) for label, title in enumerate(titles))]


def add_controls(pipe: TokenBridgePipeline) -> tuple[gr.Dropdown, gr.Number, gr.Slider]:
    """Add the controls for class, seed and number of images."""
    label = gr.Dropdown(
        class_choices(pipe.class_names),
        value=0,
        label="Class",
        info="Type to search",
        allow_custom_value=True,
        elem_id="class",
    )
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
        count = gr.Slider(1, MAX_IMAGES, 1, step=1, label="Images", min_width=120, elem_id="count")
    gr.Button("Another seed", size="sm").click(
        lambda: random.randrange(2**32 - MAX_IMAGES), None, seed, **QUICK
    )
    return label, seed, count


def sampling_names(pipe: TokenBridgePipeline) -> tuple[str, ...]:
    """Return the sampling options that have controls on the page of a model."""
    has_steps = HEAD_SAMPLING in pipe.model.head.option_names()
    return (*SAMPLING, HEAD_SAMPLING) if has_steps else SAMPLING


def add_sampling(pipe: TokenBridgePipeline) -> list[gr.components.Component]:
    """Add the controls for the options of :func:`sampling_names`."""
    length = pipe.model.seq_len
    # Guidance needs a model that was trained with unlabeled images.
    default_cfg = 3.0 if pipe.model.config["label_drop_prob"] else 1.0
    wide: dict[str, Any] = {"min_width": 240}
    with gr.Accordion("Sampling", open=True), gr.Row():
        default_steps = min(SamplingOptions.num_iter, length)
        steps = gr.Slider(1, length, default_steps, step=1, label="Steps", elem_id="steps", **wide)
        cfg = gr.Slider(
            0,
            10,
            default_cfg,
            step=0.05,
            label="Guidance",
            info="Scale of classifier-free guidance; 1 is without",
            elem_id="guidance",
            **wide,
        )
        temperature = gr.Slider(
            0,
            2,
            SamplingOptions.temperature,
            step=0.01,
            label="Temperature",
            info="Below 1: less diverse",
            elem_id="temperature",
            **wide,
        )
        schedule = gr.Radio(
            list(SCHEDULES),
            value=SamplingOptions.cfg_schedule,
            label="Guidance over the steps",
            **wide,
        )
        order = gr.Radio(
            list(ORDERS),
            value=SamplingOptions.order,
            label="Order",
            info="Of tokens: random, row by row, well spread, or the most confident first",
            elem_id="order",
            **wide,
        )
        controls: list[gr.components.Component] = [steps, cfg, schedule, temperature, order]
        if HEAD_SAMPLING in sampling_names(pipe):
            head: Any = pipe.model.head
            head_steps = gr.Slider(
                1,
                head.channel_steps,
                head.num_passes(None),
                step=1,
                label="Steps of the head",
                info="Passes that predict a token's channels",
                elem_id="head_steps",
                **wide,
            )
            controls.append(head_steps)
    return controls


def add_results() -> tuple[ResultViews, gr.Button]:
    """Add the images with status and confidence, and a button to cancel."""
    with gr.Row():
        status = gr.Textbox(
            "Nothing generated yet",
            show_label=False,
            container=False,
            interactive=False,
            scale=3,
            elem_id="status",
        )
        cancel = gr.Button("Cancel", min_width=80, elem_id="cancel")
    look: dict[str, Any] = {
        "type": "filepath",
        "format": "png",
        "interactive": False,
        "buttons": ["fullscreen"],
        "min_width": 150,
    }
    with gr.Row():
        picture = gr.Image(label="Image", elem_id="picture", **look)
        title = "Confidence (yellow: high, gray: kept)"
        confidence = gr.Image(label=title, elem_id="confidence", **look)
    with gr.Row():
        again = gr.Button("Edit this image", interactive=False, min_width=150, elem_id="again")
        download = gr.DownloadButton(
            "Download", interactive=False, min_width=150, elem_id="download"
        )
    gallery = gr.Gallery(
        label="All images: choose one",
        height="auto",
        format="png",
        allow_preview=False,
        buttons=[],
        visible=False,
        elem_id="gallery",
    )
    files = gr.State([], time_to_live=LIFETIME)
    return ResultViews(status, picture, confidence, gallery, download, again, files), cancel


class Editor(NamedTuple):
    """The components that edit an image."""

    upload: gr.UploadButton
    mask: gr.ImageEditor
    area: gr.Dropdown
    edit: gr.Button
    margin: gr.Slider
    extend: gr.Button
    strength: gr.Slider
    vary: gr.Button


def add_editor(pipe: TokenBridgePipeline) -> Editor:
    """Add the upload of an image, the mask editor, and the controls of three ways to edit."""
    size = pipe.model.config["img_size"]
    upload = gr.UploadButton("Open an image", file_types=["image"], size="sm", elem_id="open")
    width = editor_size(size)
    editor = gr.ImageEditor(
        type="pil",
        format="png",
        sources=(),
        transforms=(),
        layers=False,
        buttons=[],
        elem_id="editor",
        canvas_size=(width, width),
        fixed_canvas=True,
        label="Draw the mask",
        brush=gr.Brush(40, ["#ff00a0a0"], color_mode="fixed"),
        eraser=gr.Eraser(40),
    )
    area = gr.Dropdown(list(REGIONS), value=None, label="Or mask a region", elem_id="area")
    edit = gr.Button("Regenerate the mask", variant="primary", elem_id="edit")
    with gr.Row():
        largest = (size - 1) // 2
        margin = gr.Slider(
            1, largest, -(-size // 4), step=1, label="Margin in pixels", elem_id="margin"
        )
        extend = gr.Button("Extend the image", min_width=120, elem_id="extend")
    with gr.Row():
        strength = gr.Slider(
            0.05,
            1,
            DEFAULT_STRENGTH,
            step=0.05,
            label="Share of tokens to regenerate",
            elem_id="strength",
        )
        vary = gr.Button("Vary the image", min_width=120, elem_id="vary")
    return Editor(upload, editor, area, edit, margin, extend, strength, vary)


class Actions:
    """The actions of the page's buttons.

    Args:
        pipe: generates the images of all visitors, one request after another.
        folder: of generated images.
    """

    def __init__(self, pipe: TokenBridgePipeline, folder: str):
        self.pipe = pipe
        self.folder = folder
        self.size = pipe.model.config["img_size"]
        self.names = sampling_names(pipe)
        self.lock = threading.Lock()

    def generate(
        self, label: int | str, seed: int | None, count: float, *sampling, **edit
    ) -> Iterator[tuple]:
        """Yield values of :class:`ResultViews` while ``count`` images are generated.

        Raises:
            gr.Error: a setting is invalid.
        """
        settings = dict(zip(self.names, sampling, strict=True))
        first, count = int(seed or 0), int(count)
        request = {**settings, **edit, "class_labels": None if label == ANY else label}
        request["seeds"] = range(first, first + count)
        try:
            for frame in stream_images(self.pipe, self.lock, **request):
                if isinstance(frame, GeneratedImages):
                    generated = frame.ranked() if edit else frame
                    files = save_images(self.pipe, generated, settings, self.folder)
                    status, image, confidence, download, again = show(files)
                    captioned = [(item.image, item.caption) for item in files]
                    gallery = gr.update(value=captioned, visible=count > 1)
                    yield status, image, confidence, gallery, download, again, files
                else:
                    step, steps, images = frame
                    status = f"Step {step} of {steps}"
                    grid = image_grid(images, math.ceil(count**0.5))
                    path = save_to_cache(grid, self.folder)
                    hidden = gr.update(visible=False)
                    disabled = gr.update(interactive=False)
                    yield status, path, None, hidden, disabled, disabled, []
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def edit(
        self,
        source: Image.Image | None,
        prepare: Callable[[Image.Image], dict[str, Any]],
        controls: Sequence,
    ) -> Iterator[tuple]:
        """Regenerate parts of ``source``; see :meth:`generate`. Most likely first.

        Args:
            prepare: returns the pipeline's arguments for the image.
            controls: arguments of :meth:`generate`.
        """
        try:
            if source is None:
                raise UserError(
                    "there is no image to edit: open one, or generate one and choose it"
                )
            request = prepare(source)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        yield from self.generate(*controls, **request)

    def regenerate(
        self, source: Image.Image | None, editor: dict[str, Any] | None, *controls
    ) -> Iterator[tuple]:
        """Regenerate what is masked in the mask editor."""

        def prepare(image: Image.Image) -> dict[str, Any]:
            return {"image": image, "mask_image": drawn_mask(editor, self.size)}

        yield from self.edit(source, prepare, controls)

    def extend(self, source: Image.Image | None, margin: float, *controls) -> Iterator[tuple]:
        """Generate ``margin`` pixels around the image."""

        def prepare(image: Image.Image) -> dict[str, Any]:
            image, mask = outpainted(image, self.size, int(margin))
            return {"image": image, "mask_image": mask}

        yield from self.edit(source, prepare, controls)

    def vary(self, source: Image.Image | None, strength: float, *controls) -> Iterator[tuple]:
        """Regenerate a share of the tokens."""
        yield from self.edit(source, lambda image: {"image": image, "strength": strength}, controls)

    def open(self, path: str) -> tuple[Image.Image, dict[str, Any] | None]:
        """Return an image to edit, cropped to the model's size, and the mask editor's value."""
        try:
            image = center_crop(open_image(path, "the image"), self.size)
        except UserError as error:
            raise file_error(error, path) from error
        return image, editor_value(image, None, self.folder)

    def cover(self, image: Image.Image | None, region: str | None) -> dict[str, Any] | None:
        """Return the mask editor's value with ``region`` masked; see :func:`editor_value`."""
        return editor_value(image, region, self.folder)

    def settings(self, path: str) -> list:
        """Return the settings stored in a PNG: class, seed, options, and what is not restored."""
        try:
            stored = read_settings(path)
            try:
                sampling = self.pipe.checked_options(
                    {name: stored[name] for name in self.names if stored.get(name) is not None}
                )
                label = ANY
                if stored["class_labels"] is not None:
                    label = self.pipe.class_number(stored["class_labels"][0])
                seed = int(stored["seeds"][0])
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path} contains settings of another program ({errors.reason(error)})"
                ) from error
        except UserError as error:
            raise file_error(error, path) from error
        values = [getattr(sampling, name) for name in self.names]
        if HEAD_SAMPLING in self.names:
            head: Any = self.pipe.model.head
            values[-1] = head.num_passes(values[-1])
        return [label, seed, *values, self.loaded_status(stored, Path(path).name)]

    def loaded_status(self, stored: Mapping[str, Any], name: str) -> str:
        """Return a text that says which of a PNG's settings the page does not restore."""
        defaults = {**asdict(SamplingOptions()), "gen_seed": 0, "strength": None}
        defaults = json.loads(json.dumps(defaults))  # as in the PNG, which has no tuples
        missing = [
            f"{option} {value}"
            for option, value in stored.items()
            if option in defaults and option not in self.names and value != defaults[option]
        ]
        others = len(stored["seeds"]) - 1
        missing += [counted(others, "other image")] if others else []
        text = f"Settings of {name}"
        return f"{text}, without {', '.join(missing)}" if missing else text


def show(files: list[ImageFiles], number: int = 0) -> tuple:
    """Return the values for one image: status, image, confidence, download and edit button."""
    file = files[number]
    download = gr.update(value=file.image, interactive=True)
    again = gr.update(interactive=True)
    return f"Generated: {file.caption}", file.image, file.confidence, download, again


def choose(files: list[ImageFiles], chosen: gr.SelectData) -> tuple:
    """Return the values for the image that the visitor chose; see :func:`show`."""
    return show(files, chosen.index)


def build(pipe: TokenBridgePipeline, folder: str) -> gr.Blocks:
    """Return the page of a model.

    Args:
        folder: for the files of the page; no other server may use it.
    """
    os.environ["GRADIO_TEMP_DIR"] = folder
    size = pipe.model.config["img_size"]
    actions = Actions(pipe, folder)
    with gr.Blocks(
        title="TokenBridge", analytics_enabled=False, delete_cache=(LIFETIME // 6, LIFETIME)
    ) as page:
        # Components
        gr.Markdown(
            f"# TokenBridge\n{len(pipe.class_names)} classes, {size}x{size} pixels, "
            f"{pipe.model.seq_len} tokens"
        )
        source = gr.State(None, time_to_live=LIFETIME)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                label, seed, count = add_controls(pipe)
                with gr.Tabs() as tabs:
                    with gr.Tab("Generate", id="generate"):
                        generate = gr.Button("Generate", variant="primary", elem_id="generate")
                    with gr.Tab("Edit", id="edit"):
                        editor = add_editor(pipe)
                load = gr.UploadButton(
                    "Settings from a PNG", file_types=[".png"], size="sm", elem_id="load"
                )
            with gr.Column(scale=3, min_width=320):
                results, cancel = add_results()
        sampling = add_sampling(pipe)

        # Events
        controls = [label, seed, count, *sampling]
        run_model: dict[str, Any] = {
            "outputs": list(results),
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "api_visibility": "private",
            "scroll_to_output": True,
            "show_progress": "minimal",
            "show_progress_on": results.status,
        }
        running: list[Any] = [
            generate.click(actions.generate, controls, **run_model),
            editor.edit.click(actions.regenerate, [source, editor.mask, *controls], **run_model),
            editor.extend.click(actions.extend, [source, editor.margin, *controls], **run_model),
            editor.vary.click(actions.vary, [source, editor.strength, *controls], **run_model),
        ]
        cancel.click(lambda: "Cancelled", None, results.status, cancels=running, **QUICK)
        editor.upload.upload(actions.open, editor.upload, [source, editor.mask], **QUICK)
        editor.area.input(actions.cover, [source, editor.area], editor.mask, **QUICK)
        load.upload(actions.settings, load, [label, seed, *sampling, results.status], **QUICK)
        one = [results.status, results.picture, results.confidence, results.download, results.again]
        results.gallery.select(choose, results.files, one, **QUICK)
        results.again.click(
            lambda path: (*actions.open(path), gr.Tabs(selected="edit")),
            results.picture,
            [source, editor.mask, tabs],
            **QUICK,
        )
    return page


def launch(page: gr.Blocks, host: str, port: int, block: bool = True) -> None:
    """Serve the page.

    Args:
        block: whether to return only after Ctrl-C.

    Raises:
        UserError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise UserError(
            f"cannot serve on {host}, port {port}: {errors.reason(error)}; choose another --port "
            "or --host"
        ) from error
    page.queue(max_size=MAX_WAITING, api_open=False).launch(
        server_name=host,
        server_port=port,
        share=False,
        allowed_paths=[],
        max_file_size=MAX_UPLOAD,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
        footer_links=[],
        theme=gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"]),
        css=CSS,
        state_session_capacity=100,
        quiet=True,
        prevent_thread_lock=True,
    )
    log.info("serving on %s; stop with Ctrl-C", page.local_url)
    if block:
        page.block_thread()


def main() -> None:
    """Run the command line."""
    args = get_args_parser().parse_args()
    with process_group(args.device) as device:
        check_range(args, 1, 65535, "port")
        # SIGTERM removes the temporary folder of images, as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # Pillow refuses images of more than twice as many pixels, also those that Gradio opens.
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
        pipe = load_pipeline(args, device)
        with tempfile.TemporaryDirectory() as folder:
            launch(build(pipe, folder), args.host, args.port)


if __name__ == "__main__":
    errors.run(main)
