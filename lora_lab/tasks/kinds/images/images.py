"""What tasks on images share: pictures from files and tables, as the base's image processor makes them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lora_lab.errors import FileError, TaskError
from lora_lab.files.confined import check_image
from lora_lab.files.trust import Reach
from lora_lab.tasks.kinds.labelled import LabelledTask
from lora_lab.tasks.settings import Column, Count, Settings
from lora_lab.tasks.task import Split

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")

DATA = """\
data = "pictures"             # a folder with a folder a class (or train/CLASS/…, test/CLASS/…), a dataset from the hub,
#                             # a parquet file with images, or a csv, json or jsonl file with a column of paths
# data = {train = "train.csv", validation = "dev.csv", test = "test.csv"}
# image = "image"             # column with the images, or with their paths, relative to the file
# label = "label"             # column with the label: a name, or a number from 0
"""

"""Where the images are, for the example file of every kind."""


@dataclass(frozen=True, kw_only=True)
class ImageKeys(Settings):
    """The keys that kinds with images share."""

    image: Column = "image"
    label: Column = "label"
    labels: list[str] | None = None
    image_size: Count | None = None

    columns: ClassVar[tuple[str, ...]] = ("image", "label")


class ImageTask(LabelledTask):
    """What both kinds share: images as the base's processor makes them, each read once."""

    def _load(self, split: str) -> Split:
        rows = self._limited(split)
        self._columns(rows.column_names)
        labels = self._labels({self.settings.label: self._cells(rows, self.settings.label)})
        indices = self._chosen(split, labels)
        values = self._cells(rows.select(indices), self.settings.image)  # alone: a few shots may be of a million images
        return Split({"pixel_values": self._pixels(split, values), "labels": labels[indices]})

    def _chosen(self, split: str, labels: Tensor) -> list[int]:
        """The examples of the split that are used."""
        return list(range(len(labels)))

    @cached_property
    def _tables(self) -> dict[str, Any]:
        """The data with its images as files and bytes, so that one that cannot be read can be named."""
        import datasets

        tables = dict(super()._tables)
        for split, table in tables.items():
            if isinstance(table.features.get(self.settings.image), datasets.Image):
                tables[split] = table.cast_column(self.settings.image, datasets.Image(decode=False))
        return tables

    def _pixels(self, split: str, values: Sequence[object]) -> Tensor:
        """[images, channels, height, width], filled one by one: as a list they would take twice the memory."""
        data = self.settings.data
        path = Path(data if isinstance(data, str) else data.get(split, data.get("train", "")))
        folder = path if path.is_dir() else path.parent
        stacked = torch.empty(0)
        for i, value in enumerate(values):
            image = _read(value, folder, f"task {self.name}: image {i} of its {split} split", self.reach)
            pixels = self._processed(_in_channels(image, self._channels))
            if not i:
                stacked = torch.empty(len(values), *pixels.shape)
            if pixels.shape != stacked.shape[1:] or len(pixels) != self._channels:
                raise TaskError(
                    f"task {self.name}: the image processor of {self.settings.base!r} makes {list(pixels.shape)} of "
                    f"image {i}; {[self._channels, *stacked.shape[2:]]} is needed"
                )
            stacked[i] = pixels
        return stacked

    def _processed(self, image: Image.Image) -> Tensor:
        if self._processor is None:
            small = image.resize(self._plain_size, Image.Resampling.BILINEAR)
            scaled = np.asarray(small, dtype=np.float32) / 127.5 - 1
            return torch.from_numpy(scaled.reshape(*scaled.shape[:2], -1)).permute(2, 0, 1)
        try:
            pixels = self._processor(images=image, return_tensors="pt", **self._options)["pixel_values"][0]
        except ValueError as error:  # for one, means of three colours for a base that sees one
            why = str(error).partition("\n")[0]
            raise TaskError(f"task {self.name}: the image processor of {self.settings.base!r} fails: {why}") from error
        assert isinstance(pixels, Tensor)
        return pixels

    @cached_property
    def _processor(self) -> Any:
        """The base's image processor, in the backend that everybody has; None where there is none."""
        from transformers import AutoImageProcessor

        try:
            return self.pretrained(AutoImageProcessor, backend="pil")
        except TaskError:
            if any(self._has(name) for name in _PROCESSORS):
                raise
            return None

    def _has(self, file: str) -> bool:
        """Whether the base has a file; True as well where it cannot be told for want of a network."""
        from transformers.utils import cached_file

        name, revision = self.settings.base, self.settings.revision
        try:
            path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        except OSError:
            return True
        return path is not None

    @cached_property
    def _options(self) -> dict[str, Any]:
        """What the processor is told besides its own settings."""
        size = self.settings.image_size
        options: dict[str, Any] = {}
        if getattr(self._processor, "do_convert_rgb", None):
            options["do_convert_rgb"] = False  # the image has the base's channels already
        for key in ("size", "crop_size") if size else ():
            default = getattr(self._processor, key, None)
            if default:
                options[key] = {side: size for side, value in dict(default).items() if value is not None}
        return options

    @property
    def _plain_size(self) -> tuple[int, int]:
        """(Width, height) without a processor."""
        size = self.settings.image_size or getattr(self._vision_config, "image_size", None)
        if size is None:
            raise TaskError(
                f"task {self.name}: {self.settings.base!r} does not say how large images are; give image_size"
            )
        return (size, size) if isinstance(size, int) else (size[1], size[0])

    @property
    def _vision_config(self) -> Any:
        return getattr(self.config, "vision_config", self.config)

    @property
    def _channels(self) -> int:
        channels = int(getattr(self._vision_config, "num_channels", 3))
        if channels not in (1, 3):
            raise TaskError(f"task {self.name}: {self.settings.base!r} sees {channels} channels; images have 1 or 3")
        return channels

    @property
    def other_size(self) -> bool:
        """Whether the images are not as large as those that the base was trained on."""
        size = self.settings.image_size
        return size is not None and getattr(self._vision_config, "image_size", size) not in (size, [size, size])


def _read(value: object, folder: Path, where: str, reach: Reach) -> Image.Image:
    """The image, upright: of a path (relative to the folder), of bytes, or of both as datasets keeps them."""
    parts: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
    content = value if isinstance(value, bytes) else parts.get("bytes")
    path = value if isinstance(value, str) else parts.get("path")
    if content is None and path is None:
        raise TaskError(f"{where} is a {type(value).__name__}; a picture or the path of one is needed")
    file = folder / (path or "")
    if content is None:
        check_image(file, reach, where)
    name = str(file) if content is None else f"{where} ({path})" if path else where
    name = name if reach.quotes else where
    try:
        with Image.open(io.BytesIO(content) if content is not None else file) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise FileError(f"{name}: this image is missing") from error
    except Exception as error:  # the readers of Pillow raise many kinds
        raise FileError(f"{name}: cannot be read as an image ({str(error).partition(chr(10))[0]})") from error


def _in_channels(image: Image.Image, channels: int) -> Image.Image:
    """The image in grey for one channel, else in red, green and blue; transparency is dropped."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":  # of a palette, some entries may be transparent in ways that only RGBA holds
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")
