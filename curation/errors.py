"""The one exception for what a user can cause and a user can mend."""

from curation.secrets import hide


class UserError(Exception):
    """One sentence that says what is wrong, where, and what to do. Caught once, in `cli/`.

    exit_code: 2 when the user asked wrongly (a bad option, file or configuration), 1 when the work
    itself failed (a full disk, a missing model, an unwritable folder).
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(hide(message))
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, int]]:
        return (UserError, (str(self), self.exit_code))
