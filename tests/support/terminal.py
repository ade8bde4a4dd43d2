"""A program at a terminal of 80 columns: what is on the screen at its end."""

from __future__ import annotations

import os
import pty
import select
import struct
import subprocess
import termios
import time
from fcntl import ioctl

COLUMNS = 80


class Terminal:
    """A program whose three standard streams are a terminal, which is its controlling one.

    Args:
        command: The words of its command line.
        **options: Of subprocess.Popen.
    """

    def __init__(self, command: list[str], **options):
        self._master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        self.process = subprocess.Popen(
            command, **streams, start_new_session=True, preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0), **options
        )
        os.close(slave)
        self.output = ""

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until it has written `text`."""
        end = time.monotonic() + seconds
        while text not in self.output:
            assert time.monotonic() < end, f"no {text!r} in: {self.output}"
            assert self._read(1.0) or self.process.poll() is None, f"no {text!r} in: {self.output}"

    def press(self, keys: bytes) -> None:
        """Press keys; b"\\x03" is Ctrl-C."""
        os.write(self._master, keys)

    def close(self) -> None:
        """Close the terminal: its programs get SIGHUP, and can write no more."""
        os.close(self._master)
        self._master = None

    def code(self, seconds: float = 120) -> int:
        """Wait for the program's end; returns its exit code."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            if self._master is None:
                self.process.wait(seconds)
            elif time.monotonic() > end:
                self.process.kill()
                raise AssertionError(f"it did not end within {seconds} s: {self.output}")
            else:
                self._read(0.1)
        while self._master is not None and self._read(0.1):
            pass
        return self.process.returncode

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        try:
            content = os.read(self._master, 65536)
        except OSError:  # nobody has the other end any more
            return False
        self.output += content.decode(errors="replace")
        return bool(content)

    def screen(self) -> list[str]:
        """The lines as they stand, after all carriage returns."""
        lines, column = [""], 0
        for character in self.output:
            if character == "\n":
                lines.append("")
                column = 0
            elif character == "\r":
                column = 0
            else:
                line = lines[-1].ljust(column)
                lines[-1] = line[:column] + character + line[column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]
