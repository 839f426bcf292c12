"""Images: classifiers with a head, and CLIP with its classes in words, as a task file describes them."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from lora_lab.adapters.groups import block
from lora_lab.errors import FileError, OptionError, TaskError, unknown
from lora_lab.files.confined import check_image
from lora_lab.files.trust import Reach
from lora_lab.tasks.file import COMMON, LabelledTask, Settings, float_heads
from lora_lab.tasks.heads import probe
from lora_lab.tasks.task import Split

HEADS = ("frozen", "trained", "probe")
ENCODERS = ("both", "vision", "text")
ATTENTION = r".*\.(q_proj|k_proj|v_proj)"
"""Where the paper puts adapters in CLIP; the names are the same in both encoders."""

_LINEAR = r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")

_DATA = """\
data = "pictures"             # a folder with a folder a class (or train/CLASS/…, test/CLASS/…), a dataset from the hub,
#                             # a parquet file with images, or a csv, json or jsonl file with a column of paths
# data = {train = "train.csv", validation = "dev.csv", test = "test.csv"}
# image = "image"             # column with the images, or with their paths, relative to the file
# label = "label"             # column with the label: a name, or a number from 0
"""

CLASSIFICATION_EXAMPLE = (
    """\
# A task of your own: lora-lab train --task this-file.toml
kind = "image-classification"

base = "path/to/model"        # folder or hub id; AutoModelForImageClassification must be able to load it
"""
    + _DATA
    + """\
# labels = ["cat", "dog"]     # names in the order of the model's outputs; by default the dataset's, or sorted
# head = "frozen"             # the classifier: frozen as it is, trained along with the adapter, or a probe: fitted
#                             # to the base's features by logistic regression, then frozen
# image_size = 224            # pixels a side; by default what the base's image processor says
"""
    + COMMON
)

CLIP_EXAMPLE = (
    """\
# A task of your own: lora-lab train --task this-file.toml
kind = "clip"

base = "path/to/clip"         # folder or hub id; CLIPModel must be able to load it
"""
    + _DATA
    + """\
# labels = ["cat", "dog"]     # the classes' names as the prompts have them, in the order of the labels; by default the
#                             # dataset's, with spaces for underscores
# prompt = "a photo of a {}." # or a list of prompts, whose embeddings are averaged
# shots = 16                  # training examples of each class, drawn with split_seed (all, where there are fewer)
# encoders = "both"           # where the adapters are: vision, text, or both
# image_size = 224            # pixels a side; by default what the base's image processor says
"""
    + COMMON.replace('"all-linear"', '["q_proj", "k_proj", "v_proj"]   # within these encoders')
)


@dataclass(frozen=True, kw_only=True)
class _ImageKeys(Settings):
    image: str = "image"
    label: str = "label"
    labels: list[str] | None = None
    image_size: int | None = None

    columns: ClassVar[tuple[str, ...]] = ("image", "label")


@dataclass(frozen=True, kw_only=True)
class ClassificationKeys(_ImageKeys):
    """The keys of an image-classification file."""

    kind: str = "image-classification"
    head: str = "frozen"


@dataclass(frozen=True, kw_only=True)
class ClipKeys(_ImageKeys):
    """The keys of a clip file."""

    kind: str = "clip"
    prompt: str | list[str] = "a photo of a {}."
    shots: int | None = None
    encoders: str = "both"
    target_modules: str | list[str] = ATTENTION


class _Images(LabelledTask):
    """What both kinds share: images as the base's processor makes them, each read once."""

    def _load(self, split: str) -> Split:
        table = self.table(split)
        labels = self._labels(table)
        chosen = self._chosen(split, labels)
        values = table[self.settings.image]
        return Split({"pixel_values": self._pixels(split, [values[i] for i in chosen]), "labels": labels[chosen]})

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
        found = torch.empty(0)
        for i, value in enumerate(values):
            image = _read(value, folder, f"task {self.name}: image {i} of its {split} split", self.reach)
            pixels = self._processed(_in_channels(image, self._channels))
            if not i:
                found = torch.empty(len(values), *pixels.shape)
            if pixels.shape != found.shape[1:] or len(pixels) != self._channels:
                raise TaskError(
                    f"task {self.name}: the image processor of {self.settings.base!r} makes {list(pixels.shape)} of "
                    f"image {i}; {[self._channels, *found.shape[2:]]} is needed"
                )
            found[i] = pixels
        return found

    def _processed(self, image: Image.Image) -> Tensor:
        if self._processor is None:
            small = image.resize(self._plain_size, Image.Resampling.BILINEAR)
            scaled = np.asarray(small, dtype=np.float32) / 127.5 - 1
            return torch.from_numpy(scaled.reshape(*scaled.shape[:2], -1)).permute(2, 0, 1)
        try:
            found = self._processor(images=image, return_tensors="pt", **self._options)["pixel_values"][0]
        except ValueError as error:  # for one, means of three colours for a base that sees one
            why = str(error).partition("\n")[0]
            raise TaskError(f"task {self.name}: the image processor of {self.settings.base!r} fails: {why}") from error
        assert isinstance(found, Tensor)
        return found

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
            found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        except OSError:
            return True
        return found is not None

    @cached_property
    def _options(self) -> dict[str, Any]:
        """What the processor is told besides its own settings."""
        size = self.settings.image_size
        options: dict[str, Any] = {}
        if getattr(self._processor, "do_convert_rgb", None):
            options["do_convert_rgb"] = False  # the image has the base's channels already
        for key in ("size", "crop_size") if size else ():
            own = getattr(self._processor, key, None)
            if own:
                options[key] = {each: size for each, value in dict(own).items() if value is not None}
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
    def _other_size(self) -> bool:
        """Whether the images are not as large as those that the base was trained on."""
        size = self.settings.image_size
        return size is not None and getattr(self._vision_config, "image_size", size) not in (size, [size, size])


class ImageClassification(_Images):
    """An image classifier; adapters go where `target_modules` says, by default into all linear layers but the head."""

    kind = "image-classification"
    Keys = ClassificationKeys

    @classmethod
    def _check(cls, settings: Any, where: str) -> None:
        super()._check(settings, where)
        if settings.head not in HEADS:
            raise unknown(f"head in {where}:", settings.head, HEADS)

    @property
    def trains_head(self) -> bool:  # type: ignore[override]
        """Whether the head is trained along with the adapter."""
        return bool(self.settings.head == "trained")

    def heads(self, model: nn.Module) -> list[str]:
        """The modules outside of the base, or the classifier of a model without such a division."""
        return super().heads(model) or [self._head_name(model)]

    @cached_property
    def labels(self) -> int:  # type: ignore[override]
        """Number of labels: of the names, or of a finished classifier's outputs, or of the numbers in training data."""
        if self._names:
            return len(self._names)
        if self._finished and self.settings.head == "frozen":
            return int(self.config.num_labels)
        return int(self._labels(self.table("train")).max()) + 1

    def build_model(self) -> nn.Module:
        """The base, frozen; a head that the checkpoint lacks is drawn from seed 0, or fitted for a probe."""
        model = self._built_anew()
        if self.settings.head == "probe":
            head = model.get_submodule(self._head_name(model))
            for own, fitted in zip((head.weight, head.bias), self._probe, strict=True):
                own.data = fitted.to(own)
        frozen: nn.Module = model.requires_grad_(False).eval()
        return frozen

    def _built_anew(self) -> Any:
        from transformers import AutoModelForImageClassification

        count = int(self.config.num_labels)
        if self._finished and self.settings.head == "frozen" and count != self.labels:
            raise TaskError(
                f"task {self.name}: {self.settings.base!r} has {count} outputs and the data {self.labels} labels; "
                'head = "trained" or "probe" gives it others'
            )
        other = self._finished and count != self.labels
        with _no_report() if other or not self._finished else contextlib.nullcontext():
            model: Any = self.pretrained_model(
                AutoModelForImageClassification, num_labels=self.labels, ignore_mismatched_sizes=other
            )
        self._head_name(model)  # or TaskError
        float_heads(model, self.heads(model))
        if self._other_size and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            model.forward = partial(model.forward, interpolate_pos_encoding=True)
        return model

    @property
    def _finished(self) -> bool:
        """Whether the checkpoint has a head."""
        return any("ForImageClassification" in name for name in self.config.architectures or [])

    def _head_name(self, model: nn.Module) -> str:
        """The classifier: the last linear module outside of the base and of all blocks that has an output a label."""
        inside = f"{getattr(model, 'base_model_prefix', '')}."
        linear = {n: module for n, module in model.named_modules() if isinstance(module, nn.Linear)}
        name: str
        for name in reversed(linear):
            if linear[name].out_features == self.labels and block(name) == name and not name.startswith(inside):
                return name
        raise TaskError(f"task {self.name}: {type(model).__name__} has no linear head with {self.labels} outputs")

    @cached_property
    def _probe(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the logistic regression on what the base's head sees; kept in the cache."""
        return probe([self.base_digest, self.record, self.labels], self.split("train"), self.labels, self._features)

    @property
    def digest(self) -> Sequence[Tensor]:
        """The probe, which is fitted to other data than is scored."""
        return self._probe if self.settings.head == "probe" else ()

    @torch.inference_mode()
    def _features(self) -> npt.NDArray[np.float64]:
        model = self._built_anew().requires_grad_(False).eval()
        seen: list[npt.NDArray[np.float64]] = []
        head = model.get_submodule(self._head_name(model))
        head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double().numpy()))
        for batch in self.split("train").batches(self.batch_size):
            self.logits(model, batch)
        return np.concatenate(seen)

    def _names_in_data(self) -> list[str] | None:
        return self._in_the_models_order(super()._names_in_data())


class Clip(_Images):
    """Images told apart by the nearest of their classes' prompts, both encoded by CLIP; adapters go into either."""

    kind = "clip"
    rows_are_examples = False
    Keys = ClipKeys

    def __init__(self, settings: Any, name: str) -> None:
        super().__init__(settings, name)
        self.target_modules = self.targets(settings.target_modules)

    def targets(self, asked: str | Sequence[str] | None) -> str | Sequence[str]:
        """The modules asked for, in the encoders of the task."""
        return self.target_modules if asked is None else _within(asked, self.settings.encoders)

    @classmethod
    def _check(cls, settings: Any, where: str) -> None:
        super()._check(settings, where)
        if settings.encoders not in ENCODERS:
            raise unknown(f"encoders in {where}:", settings.encoders, ENCODERS)
        if not settings.prompt:
            raise OptionError(f"{where}: prompt is empty")
        for prompt in _listed(settings.prompt):
            if "{}" not in prompt:
                raise OptionError(f"{where}: prompt {prompt!r} has no {{}} for the name of a class")

    @cached_property
    def labels(self) -> int:  # type: ignore[override]
        """Number of classes."""
        return len(self.classes)

    @cached_property
    def classes(self) -> list[str]:
        """The classes' names, as the prompts have them."""
        names = self._names
        if names is None:
            raise TaskError(
                f"task {self.name}: the labels are numbers; prompts need the classes' names: labels = [...]"
            )
        return names if self.settings.labels else [name.replace("_", " ") for name in names]

    def build_model(self) -> nn.Module:
        """CLIP, frozen, with its classes' prompts; modules are named as in CLIPModel."""
        if self.config.model_type != "clip":
            raise TaskError(f"task {self.name}: {self.settings.base!r} is a {self.config.model_type} model, not a clip")
        model: Any = self.pretrained_model(_classifier())
        model.prompt_with(self._prompts(), len(self.classes))
        model.interpolates = self._other_size
        frozen: nn.Module = model.requires_grad_(False).eval()
        return frozen

    @property
    def digest(self) -> Sequence[Tensor]:
        """The prompts, which name the classes."""
        return list(self._prompts().values())

    def _prompts(self) -> Mapping[str, Tensor]:
        """Tokens of every class in every prompt, class by class."""
        texts = [prompt.replace("{}", name) for name in self.classes for prompt in _listed(self.settings.prompt)]
        longest = self.config.text_config.max_position_embeddings
        found: Mapping[str, Tensor] = self.tokenizer(
            texts, truncation=True, max_length=longest, padding=True, return_tensors="pt"
        )
        return found

    def _chosen(self, split: str, labels: Tensor) -> list[int]:
        shots = self.settings.shots
        if shots is None or split != "train":
            return super()._chosen(split, labels)
        draw = np.random.default_rng(self.settings.split_seed)
        chosen: list[int] = []
        for label in sorted(set(labels.tolist())):  # more shots add to fewer
            chosen += draw.permutation((labels == label).nonzero()[:, 0].numpy())[:shots].tolist()
        return sorted(chosen)


@cache
def _classifier() -> Any:
    from transformers import CLIPModel
    from transformers.modeling_outputs import ImageClassifierOutput

    class ClipClassifier(CLIPModel):  # type: ignore[misc]
        """CLIP as a classifier of images. Prompts are encoded in every pass: adapters may have changed the encoder."""

        interpolates = False

        def prompt_with(self, tokens: Mapping[str, Tensor], classes: int) -> None:
            """Tell images apart by these prompts, as many for each class, class by class."""
            self.classes = classes
            for name in ("input_ids", "attention_mask"):
                self.register_buffer(f"prompt_{name}", tokens[name].to(self.device), persistent=False)

        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
            """Logits [images, classes]: cosines times exp(logit_scale), prompts of one class averaged before."""
            seen = self.get_image_features(pixel_values, interpolate_pos_encoding=self.interpolates).pooler_output
            read = self.get_text_features(self.prompt_input_ids, self.prompt_attention_mask).pooler_output
            seen, read = seen.float(), read.float()  # cosines, which are multiplied by about 100
            classes = _unit(_unit(read).reshape(self.classes, -1, read.shape[-1]).mean(1)).to(seen.device)
            logits = self.logit_scale.exp().to(seen.device) * _unit(seen) @ classes.T
            loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels.to(logits.device))
            return ImageClassifierOutput(loss=loss, logits=logits)

    return ClipClassifier


def _unit(embeds: Tensor) -> Tensor:
    return nn.functional.normalize(embeds, dim=-1)


def _within(modules: str | Sequence[str], encoders: str) -> str | Sequence[str]:
    """Target modules of one encoder alone, or as they are for both."""
    if encoders == "both":
        return modules
    if not isinstance(modules, str):
        modules = rf".*\.({'|'.join(map(re.escape, modules))})"
    elif modules == "all-linear":
        modules = _LINEAR
    return rf"(?={encoders}_model\.)(?:{modules})"


def _listed(prompt: str | list[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else prompt


@contextlib.contextmanager
def _no_report() -> Iterator[None]:
    """Without transformers' table of what a checkpoint lacks, where that is the head and is known."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _read(value: object, folder: Path, where: str, reach: Reach) -> Image.Image:
    """The image, upright: of a path (relative to the folder), of bytes, or of both as datasets keeps them."""
    known: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
    content = value if isinstance(value, bytes) else known.get("bytes")
    path = value if isinstance(value, str) else known.get("path")
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
