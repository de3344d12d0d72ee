"""`whet report`: the page of one or several runs, once or again and again."""

import time

from whet.errors import UserError
from whet.flags.report import Config
from whet.progress import say
from whet.report.run_page import read_run, write_page

EVERY_S = 5


def main(config: Config) -> int:
    """Write the page, and with --watch keep it fresh."""
    if not config.runs:
        raise UserError("whet report: name at least one run folder")
    if not config.watch:
        say(str(write_page(config.runs, config.html)))
        return 0
    say(f"{write_page(config.runs, config.html, EVERY_S)}: written every {EVERY_S} s; Ctrl-C ends")
    while not all(read_run(path).finished for path in config.runs):
        time.sleep(EVERY_S)
        write_page(config.runs, config.html, EVERY_S)
    write_page(config.runs, config.html)
    say("all runs are finished")
    return 0
