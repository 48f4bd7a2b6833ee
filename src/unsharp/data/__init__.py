"""Data: sources by name, samples on the device, repeatable streams of batches."""

from unsharp.data.config import DataConfig
from unsharp.data.draws import COLUMNS, draws
from unsharp.data.foreign import from_torch_dataset
from unsharp.data.loading import load
from unsharp.data.samples import Batch, ImageSamples, Samples, Splits, StreamedSamples, TensorSamples
from unsharp.data.source import SOURCES
from unsharp.data.streams import Stream, evaluation_batches

__all__ = [
    "COLUMNS",
    "SOURCES",
    "Batch",
    "DataConfig",
    "ImageSamples",
    "Samples",
    "Splits",
    "Stream",
    "StreamedSamples",
    "TensorSamples",
    "draws",
    "evaluation_batches",
    "from_torch_dataset",
    "load",
]
