"""The one error a user is expected to see."""


class UserError(Exception):
    """Bad input that its sender can mend: names the file, the key and the value, and says what to do.

    Entry points print it as one line and exit with status 2; everything else is a bug and keeps its traceback.
    """

    def __init__(self, problem: str, *, remedy: str):
        super().__init__(f"{problem} — {remedy}")
        self.problem = problem
        self.remedy = remedy
