"""Every error that a user can mend. Nothing of ours or Keras' is imported here.

An error carries its parts as attributes, so that no code has to take a message apart. `str(error)` names Python arguments. A
command prints `summary`, the first `details` and `hint`, which names flags, and ends with `exit_code`.
"""


class UserError(Exception):
    """An error that a user can mend.

    Args:
        summary: one line, without a full stop: what is wrong, with the argument and the value.
        argument: the name of the Python argument at fault, if it is one.
        hint: what to do about it on the command line, in one sentence without a full stop.
        details: one line for each fault, where there are many.
    """

    exit_code = 1

    def __init__(self, summary, *, argument=None, hint=None, details=()):
        super().__init__("\n  ".join([str(summary), *details]))
        self.summary = str(summary)
        self.argument = argument
        self.hint = hint
        self.details = tuple(details)


class ArgumentError(UserError, ValueError):
    """An argument with a value that it can't have."""

    exit_code = 2


class RecipeError(ArgumentError):
    """A setting of a recipe that no run can have, or that does not fit the images, the weights or the run."""


class DifferentRunError(RecipeError):
    """A run that can't be resumed because its settings differ.

    Args:
        run_dir: the run folder.
        differences: name of the setting -> the value of the run, and the one received, as text.
    """

    def __init__(self, run_dir, differences):
        self.run_dir = run_dir
        self.differences = dict(differences)
        super().__init__(
            f"`run_dir` holds a run with other settings: {run_dir}. {self.differences_text}",
            argument="run_dir",
            hint="Resume it with its own settings, or train in another --run-dir",
        )

    @property
    def differences_text(self):
        return ", ".join(f"{name} was {stored} and is {received}" for name, (stored, received) in self.differences.items())

    def __reduce__(self):  # by pickle, which would call the class with the message alone
        return type(self), (self.run_dir, self.differences)


class OccupiedError(ArgumentError, FileExistsError):
    """A folder that already holds something that would be overwritten."""


class RunError(UserError):
    """A run folder that can't be read or written."""


class NoRunError(RunError):
    """A folder that holds no run."""

    exit_code = 2


class BusyError(RunError):
    """A folder that another process is writing to."""


class DataError(UserError):
    """Images that are missing or broken."""


class UnavailableError(DataError):
    """A data set that is not on disk and can't be downloaded, unlike one with a broken copy on disk."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that can't be read, or does not fit its network. `details` names every key that is wrong."""


class MissingPackageError(UserError, ImportError):
    """A package that a feature needs and that is not installed."""


class DivergedError(UserError, FloatingPointError):
    """A loss or an output that is NaN or infinite, or the same for every class."""


class OutOfMemoryError(UserError, MemoryError):
    """Work that does not fit into the memory of the device."""


class ExportError(UserError, RuntimeError):
    """An artifact that can't be written, or that its runtime can't run."""


class SearchError(UserError):
    """A search of which no trial could be trained."""


class DistributedError(UserError):
    """A search whose chief or workers can't be reached."""


class ServingError(UserError):
    """A server that does not answer, or answers with something else."""


class ImageError(UserError, ValueError):
    """An image that can't be read, or that a server refuses. The message does not name it."""


def first_line(error):
    """The first line of an error's message without its full stop, or the error's name if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
