"""What the crew's tests have done in other processes; imports nothing heavy."""

import os
import time
from pathlib import Path

from repcon.errors import UserError


def count(upto, post, report):
    for number in range(upto):
        report((os.getpid(), post.threads, number))


def refuse(post, report):
    raise UserError("field x: wrong; mend it")


def die_once(folder, post, report):
    marker = Path(folder, "died")
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), 9)
    report("alive")


def die(post, report):
    os._exit(3)


def wait_for_ever(folder, post, report):
    try:
        report("started")
        time.sleep(60)
    except KeyboardInterrupt:
        Path(folder, "asked").touch()
        raise
