"""What can go wrong, one exception type a cause. The command line prints them; nothing else catches them.

A message says what was expected, what was found, where, and what to do.
"""

from __future__ import annotations


class WeightportError(Exception):
    """Base of every error that a user can cause. `exit_status` is what the command line ends with."""

    exit_status = 1


class UsageError(WeightportError):
    """The command was asked for something that it does not do."""

    exit_status = 2


class CheckpointError(WeightportError):
    """A checkpoint file cannot be read: missing, truncated, malformed, or claiming bytes that it does not hold."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint file that only executing it could read. It was not executed."""


class UnknownFamilyError(WeightportError):
    """No family recognises the checkpoint, or it belongs to another family than the one asked for."""


class FamilyError(WeightportError):
    """A family's declaration cannot be used, or lacks the stage that was asked for."""


class CoverageError(WeightportError):
    """Source and target tensors do not meet: missing, surplus, claimed twice, or of the wrong shape."""


class ConfigurationError(WeightportError):
    """The checkpoint's options contradict its tensors, or ask for what the native model cannot hold."""


class AdapterError(WeightportError):
    """A LoRA adapter is malformed, belongs to another base, or asks for what the native model cannot carry."""


class NonFiniteError(WeightportError):
    """A weight holds NaN or infinity."""


class VocabularyError(WeightportError):
    """A vocabulary is missing, malformed, or does not fit the checkpoint's embedding."""


class OutputError(WeightportError):
    """The output cannot be written: it exists, the disk is full, or the folder is not writable."""


class ReferenceFileError(WeightportError):
    """A reference file is malformed, of another version or family, or does not fit the model."""

    exit_status = 2


class ParityError(WeightportError):
    """The converted model departs from the original."""


class DataError(WeightportError):
    """A data set cannot be read: a file or image is missing, broken or empty, or its columns do not fit."""


class MissingDataError(DataError, UsageError):
    """There is nothing at the path that was given for a data set."""


class MissingVocabularyError(VocabularyError, UsageError):
    """There is nothing at the path that was given for a vocabulary."""


class RecipeError(UsageError):
    """A recipe or a setting on the command line names what does not exist, or has a value that cannot be meant."""


class TrainingError(WeightportError):
    """A training run cannot start or go on: nothing to train, no space for checkpoints, a loss that is no number."""
