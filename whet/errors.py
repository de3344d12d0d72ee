"""The one error type that is reported in a line instead of a traceback."""

import re
import sys


class UserError(Exception):
    """A bad file, flag or datum.

    The message says what was given, what was expected, where (file and line, or flag) and what to
    do. `whet.cli` prints it and exits with code 2. Anything else that is raised is a defect of Whet
    and keeps its traceback.
    """


PASSWORD = re.compile(r"(?<=://)[^/\s]*:[^/\s]*@")


def tell(error: UserError) -> None:
    """Print the problem, or each of the problems, on a line of standard error.

    A password in a URL, `https://user:password@host`, is not shown.
    """
    for line in str(error).splitlines():
        print(f"whet: error: {PASSWORD.sub('***@', line)}", file=sys.stderr)
