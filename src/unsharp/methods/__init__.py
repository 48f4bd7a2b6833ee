"""Stage 5b: the methods, one file each."""

from unsharp.methods.base import METHODS, AppliedMethod, Method, PhasedMethod, Problem

__all__ = ["METHODS", "AppliedMethod", "Method", "PhasedMethod", "Problem"]
