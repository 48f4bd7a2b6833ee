"""What a user says about the data, as one typed value."""

from __future__ import annotations

from dataclasses import dataclass

from unsharp.data.augment import AUGMENTATIONS
from unsharp.data.corruption import Corruption
from unsharp.errors import UserError, unknown


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data, and how the network receives them.

    Args:
        name: Source: `unsharp list data` names them.
        dir: Local directory (hub layout or image folder) or .npz file; None downloads from the hub.
        test_dir: Directory or .npz file of the test set, where it is not part of `dir`.
        size: Side in pixels: shorter side resized to it, centre cropped; None keeps the source's own size.
        mean: Mean per channel on the scale [0, 1] (one value or one per channel); None takes the source's.
        std: Standard deviation per channel on the scale [0, 1]; None takes the source's.
        augment: Augmentation while training: auto, none, crop, flip, crop_flip, resized_crop_flip.
        corrupt: Corrupt the training images, once and for all, by NAME or NAME:SEVERITY from 1 to 5 (3 if left out), as
            gaussian_noise:3. There are gaussian_noise, impulse_noise, gaussian_blur, glass_blur, snow, brightness,
            contrast. Test images stay as they are.
        id_column: Column (or key of the .npz) with a stable id for each sample; None takes the position in the
            source.
        label_column: Column (or key of the .npz) of the labels; None takes the source's own.
        image_column: Column (or key of the .npz) of the images; None takes the source's own.
        classes: Keep the first so many classes only.
        per_class: Keep the first so many training samples of each class only.
        validation: Samples held out of the training to choose settings on: so many of each class (1 or more), or such
            a share of each (below 1); the last ones, after `per_class` has cut. They are neither trained on nor tested.
        class_order: Text file with one class name per line, in the order of the network's outputs.
        workers: Processes that decode a set too large for the device; results do not depend on it.
    """

    name: str = "digits"
    dir: str | None = None
    test_dir: str | None = None
    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: str = "auto"
    corrupt: str | None = None
    id_column: str | None = None
    label_column: str | None = None
    image_column: str | None = None
    classes: int | None = None
    per_class: int | None = None
    validation: int | float | None = None
    class_order: str | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "classes", "per_class"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        held = self.validation
        if held is not None and not (0 < held < 1 or (held >= 1 and float(held).is_integer())):
            raise UserError(f"validation must be a share below 1 or a whole number of at least 1, got {held}")
        if self.workers < 0:
            raise UserError(f"workers must be at least 0, got {self.workers}")
        if self.augment != "auto" and self.augment not in AUGMENTATIONS:
            raise unknown("augmentation", self.augment, ["auto", *AUGMENTATIONS])
        if self.corrupt is not None:
            Corruption.read(self.corrupt)
        if self.std is not None and not all(s > 0 for s in self.std):
            raise UserError(f"std must be above 0 in each channel, got {self.std}")
