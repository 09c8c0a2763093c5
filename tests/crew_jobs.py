"""What the crew's tests have done in other processes; imports nothing heavy."""

import os
import struct
import sys
import threading
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


def die_in_a_report_once(folder, post, report):
    marker = Path(folder, "died")
    if not marker.exists():
        marker.touch()
        os.write(int(sys.argv[1]), struct.pack("!i", 1_000_000) + b"x" * 1000)  # the pipe's length, then a part of it
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


def two_threads(count, size, post, report):
    threads = [threading.Thread(target=lambda: [report(bytes(size)) for _ in range(count)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def finish_when_asked(folder, post, report):
    try:
        report("started")
        time.sleep(60)
    except KeyboardInterrupt:
        report("finished what it was writing")
        Path(folder, "kept").touch()
        raise
