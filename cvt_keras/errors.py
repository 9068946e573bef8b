"""Every error that a user can fix. This module imports nothing of the package and no Keras.

The parts of an error are attributes, so that no code has to parse a message. `str(error)` names Python arguments. A command
prints `summary`, the first `details` and `hint`, which names flags, and exits with `exit_code`.
"""


class UserError(Exception):
    """An error that a user can fix.

    Args:
        summary: one line without a full stop: what is wrong, with the argument and the value.
        argument: the name of the wrong Python argument, if an argument is wrong.
        hint: how to fix it on the command line, in one sentence without a full stop.
        details: one line per fault, if there are several.
    """

    exit_code = 1

    def __init__(self, summary, *, argument=None, hint=None, details=()):
        super().__init__("\n  ".join([str(summary), *details]))
        self.summary = str(summary)
        self.argument = argument
        self.hint = hint
        self.details = tuple(details)


class ArgumentError(UserError, ValueError):
    """An argument with an invalid value."""

    exit_code = 2


class RecipeError(ArgumentError):
    """A setting of a recipe that is invalid, or does not fit the images, the weights or the run."""


class DifferentRunError(RecipeError):
    """A run that can't be resumed because its settings differ.

    Args:
        run_dir: the run folder.
        differences: setting name -> (value of the run, received value), both as text.
        hint: as in `UserError`.
    """

    def __init__(self, run_dir, differences, hint):
        self.run_dir = run_dir
        self.differences = dict(differences)
        super().__init__(
            f"`run_dir` holds a run with other settings: {run_dir}. {self.differences_text}",
            argument="run_dir",
            hint=hint,
        )

    @property
    def differences_text(self):
        return "; ".join(
            f"{name}: {stored} in the run, now {received}" for name, (stored, received) in self.differences.items()
        )

    def __reduce__(self):  # pickle would call the class with the message as its only argument
        return type(self), (self.run_dir, self.differences, self.hint)


class OccupiedError(ArgumentError, FileExistsError):
    """A folder whose content would be overwritten."""


class RunError(UserError):
    """A run folder that can't be read or written."""


class NoRunError(RunError):
    """A folder without a run."""

    exit_code = 2


class BusyError(RunError):
    """A folder that another process is writing to."""


class DataError(UserError):
    """Images that are missing or broken."""


class UnavailableError(DataError):
    """A data set that is not on disk and can't be downloaded. A broken copy on disk is a `DataError`."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that can't be read, or does not fit its network. `details` names every wrong key."""


class CheckpointFileError(CheckpointError):
    """A file that is damaged, or holds no checkpoint. The summary is a predicate, to which a caller adds the file's name."""


class MissingPackageError(UserError, ImportError):
    """A required package that is not installed."""


class DivergedError(UserError, FloatingPointError):
    """A loss or an output that is NaN or infinite, or the same for every class."""


class OutOfMemoryError(UserError, MemoryError):
    """The device has too little memory."""


class ExportError(UserError, RuntimeError):
    """An exported file that can't be written, or that its runtime can't run."""


class SearchError(UserError):
    """A search in which every trial failed."""


class DistributedError(UserError):
    """Other processes of a search or a training that can't be reached, or failed."""


class ServingError(UserError):
    """A server that does not answer, or gives an unexpected answer."""


class ImageError(UserError, ValueError):
    """An image that can't be read, or that a server rejects. The message does not name the image."""


def first_line(error):
    """The first line of an error's message without its full stop, or the name of its class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
