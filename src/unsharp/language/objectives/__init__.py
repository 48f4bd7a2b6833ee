"""Objectives of language unlearning, one file each."""

from unsharp.language.objectives.base import OBJECTIVES, LanguageObjective, SampleLosses, Task

__all__ = ["OBJECTIVES", "LanguageObjective", "SampleLosses", "Task"]
