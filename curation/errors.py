"""The one exception for what a user can cause and a user can mend."""

import errno
import re

from curation.secrets import hide

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")

GO_ON = "run the same command again: finished parts are kept"


class UserError(Exception):
    """One sentence that says what is wrong, where, and what to do. Caught once, in `cli/`.

    exit_code: 2 when the user asked wrongly (a bad option, file or configuration), 1 when the work
    itself failed (a full disk, a missing model, an unwritable folder).
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(_CONTROL.sub(" ", hide(message)).strip())
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, int]]:
        return (UserError, (str(self), self.exit_code))


def mendable(error: BaseException, what: str) -> UserError | None:
    """A full memory or disk, which any line may meet, as a sentence about `what`; None: it is something else."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, MemoryError):
        return UserError(
            f"{what}: out of memory ({str(error) or 'an allocation failed'}); lower memory_per_worker or use fewer "
            f"workers, then {GO_ON}",
            exit_code=1,
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = error.filename or what
        return UserError(f"{where}: no space left on the disk; free some and {GO_ON}", exit_code=1)
    return None
